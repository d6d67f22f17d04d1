"""What is particular to the transformer: attention, causality, the cache, runs of symbols, completion, its codec."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import likely
from documents import run
from likely.coding import Stack
from likely.contract import Binary, Column, Integers, Space, Table, Tokens, Unsupported
from likely.evaluation.sequences import running_nats
from likely.models.gaussian import Gaussian
from likely.models.transformer import Transformer
from likely.networks.attention import Attention, rotations, turns
from likely.networks.ngrams import NGrams
from likely.networks.transformer import TransformerLayers
from likely.noise import KeyedNoise, StreamNoise

MIXED = Table(
    columns=(
        Column("colour", "categorical", levels=3),
        Column("size", "real", resolution=0.5),
        Column("visits", "integer"),
        Column("member", "binary"),
    )
)
HOLES = Table(columns=(Column("a", "categorical", levels=3, missing=True), Column("b", "binary", missing=True)))


def stream(seed: int) -> StreamNoise:
    return StreamNoise(torch.Generator().manual_seed(seed))


def scrambled(space: Space, condition: Space | None = None, **options: object) -> Transformer:
    """An instance in float32 whose every weight matters."""
    model = Transformer(space, condition, **{"width": 16, "layers": 2, "heads": 2, "hidden": 16, **options})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.35 * torch.randn(parameter.shape))
    return model.eval()


def rows_of(space: Space, n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if isinstance(space, Table):
        cells = [torch.randint(c.levels or 6, (n,), generator=generator) * (c.resolution or 1.0) for c in space.columns]
        return torch.stack(cells, 1).double()
    levels = {Binary: 2}.get(type(space)) or getattr(space, "vocab", None) or space.levels  # type: ignore[attr-defined]
    return torch.randint(levels, (n, *space.shape), generator=generator).double()


# Attention -------------------------------------------------------------------------------------------------------


def test_rotations_are_cosines_and_sines() -> None:
    angle = np.arange(700)[:, None] * 10_000.0 ** (-np.arange(0, 12, 2) / 12)
    found = rotations(700, 12).numpy()
    np.testing.assert_allclose(found, [np.cos(angle), np.sin(angle)], rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_that_of_the_paper(causal: bool) -> None:
    torch.manual_seed(0)
    layer, x = Attention(8, 2, causal).double(), torch.randn(2, 5, 8, dtype=torch.float64)
    weight, bias = layer.qkv.weight.detach().numpy(), torch.randn(24).double()
    layer.qkv.bias.data = bias
    q, k, v = np.split(x.numpy() @ weight.T + bias.numpy(), 3, -1)

    def turned(row: np.ndarray, t: int) -> np.ndarray:  # features f and f + 2 as a complex number
        z = (row[:2] + 1j * row[2:]) * np.exp(1j * t * 10_000.0 ** (-np.arange(0, 4, 2) / 4))
        return np.concatenate([z.real, z.imag])

    expected = np.zeros((2, 5, 8))
    for n, head, i in itertools.product(range(2), range(2), range(5)):
        part = slice(4 * head, 4 * head + 4)
        seen = range(i + 1) if causal else range(5)
        scores = np.array([turned(q[n, i, part], i) @ turned(k[n, j, part], j) / 2 for j in seen])
        weights = np.exp(scores) / np.exp(scores).sum()
        expected[n, i, part] = sum(w * v[n, j, part] for w, j in zip(weights, seen))
    found = layer(x, turns(rotations(5, 4)))
    np.testing.assert_allclose(found.detach().numpy(), layer.output(torch.from_numpy(expected)).detach(), atol=1e-12)


def test_a_mask_says_who_sees_whom() -> None:
    layers = TransformerLayers(6, 8, 2, 2, causal=False).double()
    torch.nn.init.normal_(layers.blocks[0].attention.output.weight)
    x, mask = torch.randn(1, 6, 8, dtype=torch.float64), torch.ones(6, 6, dtype=torch.bool).tril()
    causal = TransformerLayers(6, 8, 2, 2).double()
    causal.load_state_dict(layers.state_dict())
    torch.testing.assert_close(layers(x, mask=mask), causal(x))
    assert not torch.allclose(layers(x), causal(x))


# The model -------------------------------------------------------------------------------------------------------

SPACES = [Tokens(7, 4), Integers((2, 3), 5), Binary((1, 2, 3)), MIXED]


@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
def test_a_cell_depends_on_all_earlier_cells_and_on_no_later_one(space: Space) -> None:
    model, x = scrambled(space).double(), rows_of(space, 1)
    before = model.column_nats(x).flatten()
    for t in range(space.dims):
        changed = x.clone().reshape(1, -1)
        changed[0, t] = 1.0 - changed[0, t] if changed[0, t] in (0.0, 1.0) else 0.0
        moved = (model.column_nats(changed.reshape(x.shape)).flatten() - before).abs() > 1e-12
        assert not moved[:t].any()
        assert moved[t:].all()


@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
def test_the_walk_with_its_cache_gives_the_laws_of_the_whole_pass(space: Space) -> None:
    model, x = scrambled(space, Integers((1,), 3)).double(), rows_of(space, 5)
    c = torch.tensor([[0], [1], [2], [0], [1]])
    expected = model.column_nats(x, c).flatten(1)
    with torch.no_grad():
        walk = model._walk(5, model._context(c))
        law = next(walk)
        for t in range(space.dims):
            cell = x.flatten(1)[:, t]
            torch.testing.assert_close(law.log_prob(cell.unsqueeze(1))[:, 0], expected[:, t], rtol=1e-10, atol=1e-12)
            if t + 1 < space.dims:
                law = walk.send(cell)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_draws_in_any_precision_and_under_autocast(dtype: torch.dtype) -> None:
    model = Transformer.tiny(Tokens(9, 5)).to(dtype)
    model.space.validate(model.sample(4, None, StreamNoise(torch.Generator().manual_seed(0))))
    with torch.autocast("cpu", torch.bfloat16):
        model.float().space.validate(model.sample(4, None, StreamNoise(torch.Generator().manual_seed(0))))


def test_the_walk_reads_runs_of_symbols() -> None:
    model = scrambled(Tokens(7, 4), ngrams=(2, 3), ngram_bits=6).double()
    x = rows_of(model.space, 4)
    with torch.no_grad():
        expected = model.column_nats(x)
        walk = model._walk(4, None)
        law = next(walk)
        for t in range(7):
            torch.testing.assert_close(law.log_prob(x[:, t : t + 1])[:, 0], expected[:, t], rtol=1e-10, atol=1e-12)
            law = walk.send(x[:, t]) if t < 6 else law


@pytest.mark.parametrize("activation", ["relu", "elu", "gelu", "silu", "softplus", "tanh"])
def test_a_walk_through_the_layers_gives_what_they_give_at_once(activation: str) -> None:
    torch.manual_seed(0)
    layers = TransformerLayers(5, 12, 3, 2, 20, activation).double()
    for parameter in layers.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        walk = layers.walk(4, x)
        found = torch.stack([walk(x[:, t]) for t in range(5)], 1)
        torch.testing.assert_close(found, layers(x), rtol=0, atol=1e-12)
    assert torch.equal(x, before)


def test_the_order_of_what_came_before_matters_by_rotation_alone() -> None:
    model = scrambled(Tokens(6, 5)).double()
    torch.nn.init.zeros_(model.place)
    x = torch.tensor([[1, 2, 3, 4, 0, 0], [3, 2, 1, 4, 0, 0]])
    assert (model.column_nats(x)[0, 5] - model.column_nats(x)[1, 5]).abs() > 1e-4


def test_a_condition_moves_every_law() -> None:
    model, x = scrambled(Tokens(5, 4), Integers((1,), 2)).double(), rows_of(Tokens(5, 4), 1)
    first, second = (model.column_nats(x, torch.tensor([[c]])) for c in (0, 1))
    assert ((first - second).abs() > 1e-6).all()


def test_the_values_under_each_pattern_of_holes_have_one_law() -> None:
    model = scrambled(HOLES).double()
    for values in ([0.0, 1.0, 2.0], [math.nan]), ([math.nan], [0.0, 1.0]), ([0.0, 1.0, 2.0], [0.0, 1.0]):
        rows = torch.tensor(list(itertools.product(*values)), dtype=torch.float64)
        bound = model.bound(rows)
        assert bound.kind == "exact"
        assert bound.nats.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    there, missing = model.column_nats(torch.tensor([[1.0, 0.0], [math.nan, 0.0]], dtype=torch.float64))[:, 1]
    assert (there - missing).abs() > 1e-6  # the law sees that the first cell is missing


def test_tied_vectors_are_one_parameter_and_survive_saving(tmp_path) -> None:  # type: ignore[no-untyped-def]
    from likely.training import load_weights, save_weights

    model = scrambled(Tokens(5, 4), tied=True)
    assert model.cells.head.output.weight is model.cells.embedding.weight  # type: ignore[union-attr]
    save_weights(model, tmp_path / "model.safetensors")
    again = Transformer(Tokens(5, 4), width=16, layers=2, heads=2, hidden=16, tied=True).eval()
    load_weights(again, tmp_path / "model.safetensors")
    x = rows_of(Tokens(5, 4), 3)
    assert torch.equal(again.bound(x).nats, model.bound(x).nats)


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        (Binary((3,), missing=True), {}, "without missing cells, or tables"),
        (Tokens(4, 3), {"width": 20, "heads": 3}, "heads: expected a number that divides half the width"),
        (Tokens(4, 3), {"layers": 0}, "layers: expected 1 or more, got 0"),
        (Binary((4,)), {"tied": True}, "tied"),
        (MIXED, {"tied": True}, "tied"),
        (MIXED, {"likelihood": "normal"}, "each column of a table has its own"),
        (Binary((4,)), {"ngrams": (2,)}, "ngrams: only tokens"),
        (Tokens(4, 3), {"ngrams": (1,)}, "lengths from 2 up"),
    ],
)
def test_what_it_cannot_do_is_refused(space: Space, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Transformer(space, **{"width": 16, **options})


# Runs of symbols -------------------------------------------------------------------------------------------------


def test_a_run_has_the_same_vector_wherever_it_stands() -> None:
    ngrams, x = NGrams((2, 4), 16, vocab=5, width=3), torch.randint(5, (40, 9))
    torch.nn.init.normal_(ngrams.embedding.weight)
    found, known = ngrams(x), {}
    for n, t in itertools.product(range(40), range(9)):
        run = tuple(x[n, max(t - 3, 0) : t + 1].tolist()) if t >= 3 else ("begin", *x[n, : t + 1].tolist())
        expected = known.setdefault(run, found[n, t])
        assert torch.equal(found[n, t], expected)
    assert len({tuple(v.tolist()) for v in known.values()}) == len(known)  # and no two share one
    for start in range(9):
        assert torch.equal(ngrams(x[:, : start + 1], start)[:, 0], found[:, start])


def test_runs_are_dropped_as_a_whole_and_in_training_only() -> None:
    ngrams, x = NGrams((2,), 8, vocab=5, width=3, dropout=0.5), torch.randint(5, (20, 9))
    torch.nn.init.ones_(ngrams.embedding.weight)
    torch.manual_seed(0)
    dropped = ngrams(x)[..., 0]
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(ngrams.eval()(x), torch.ones(20, 9, 3))


# Samples and completions -----------------------------------------------------------------------------------------


def test_samples_follow_the_condition_and_its_rows() -> None:
    model = scrambled(Tokens(5, 4), Integers((1,), 2))
    condition = torch.tensor([[0], [1]])
    alone = model.sample(1, condition[1:], KeyedNoise(0, torch.tensor([7])))
    beside = model.sample(2, condition, KeyedNoise(0, torch.tensor([3, 7])))
    assert torch.equal(alone[0], beside[1])


def agree(drawn: torch.Tensor, states: torch.Tensor, p: torch.Tensor, slack: float = 1e-3) -> None:
    """The frequencies of draws are those of the states."""
    frequency = torch.stack([(drawn == state).flatten(1).all(1).double().mean() for state in states])
    assert ((frequency - p).abs() < 4.5 * (p * (1 - p) / len(drawn)).sqrt() + slack).all()


@pytest.mark.parametrize("holes", [(2, 3), (0, 2)], ids=["after a prefix", "anywhere"])
def test_completions_have_the_conditional_frequencies(holes: tuple[int, ...]) -> None:
    space = Tokens(4, 3)
    model, x = scrambled(space).double(), torch.tensor([[1.0, 0.0, 2.0, 1.0]], dtype=torch.float64)
    states = x.repeat(9, 1)
    states[:, list(holes)] = torch.tensor(list(itertools.product(range(3), repeat=2)), dtype=torch.float64)
    p = torch.softmax(model.bound(states).nats.detach(), 0)
    x[:, list(holes)] = math.nan
    drawn = model.impute(x, None, stream(0), draws=6000, samples=6000)
    assert drawn.shape == (6000, 1, 4)
    agree(drawn[:, 0], states, p, 1e-3 if holes == (2, 3) else 0.02)  # resampling draws with replacement
    best = model.impute(x, None, stream(0), samples=2000)
    for t in holes:
        share = [p[states[:, t] == symbol].sum() for symbol in range(3)]
        assert best[0, t] == int(np.argmax(share))


def test_best_values_of_a_table_are_values_of_it() -> None:
    model, x = scrambled(MIXED), rows_of(MIXED, 6)
    x[:, [1, 3]] = math.nan
    filled = model.impute(x, None, stream(0))
    MIXED.validate(filled)
    assert torch.equal(filled[:, [0, 2]], x[:, [0, 2]])


# The codec -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("space", "options"),
    [(Tokens(12, 6), {"ngrams": (2, 3)}), (Integers((1, 3, 3), 64), {}), (MIXED, {})],
    ids=["tokens", "levels", "table"],
)
def test_what_is_pushed_is_popped_and_costs_the_bound(space: Space, options: dict[str, object]) -> None:
    model, c = scrambled(space, Integers((1,), 3), **options), torch.randint(3, (30, 1))
    x = model.sample(30, c, stream(0))
    codec, stack = model.codec(), Stack(lanes=16)
    codec.push(stack, x, c)
    with torch.no_grad():
        bits = -model.bound(x, c).nats.double().sum().item() / math.log(2)
    assert stack.bits == pytest.approx(bits, rel=3e-3)
    assert not codec.initial and codec.legal(x).all()
    copy = Stack.from_words(stack.to_words(), lanes=16)
    assert torch.equal(codec.pop(copy, 30, c).to(x.dtype), x)
    copy.finish()
    assert codec.pop(Stack(), 0, c[:0]).shape == (0, *space.shape)


def test_the_step_of_the_decoder_equals_the_parallel_pass_to_the_bit() -> None:
    space = Tokens(10, 6)
    model, x = scrambled(space, ngrams=(2,)), rows_of(space, 9).long()
    exact = model.codec().networks["model"]
    twin = exact.module
    whole = exact.run(twin._hidden, x, None)
    walk = twin._walk(4, None, exact.run)  # in another batch: of the last four
    law = next(walk)
    for t in range(10):
        assert torch.equal(law.logits, exact.run(twin.cells.law, whole[5:, t], t).logits)
        law = walk.send(x[5:, t]) if t < 9 else law


# A running text --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_a_running_text_is_predicted_once_from_what_came_before(stride: int) -> None:
    model = scrambled(Tokens(3, 2)).double()
    texts = torch.tensor(list(itertools.product(range(2), repeat=7)))
    nats = torch.stack([running_nats(model, text, stride) for text in texts])
    assert nats.sum(1).exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    text, found = texts[77], nats[77]
    starts, done = [*range(0, 4, stride), 4], 0
    for start in starts:
        for t in range(done, start + 3):
            both = text[start : start + 3].repeat(2, 1)
            both[:, t - start] = torch.tensor([0, 1])
            column = model.column_nats(both)[:, t - start].detach()
            assert found[t] == pytest.approx(column[text[t]].item(), abs=1e-12)
            assert column.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
        done = start + 3


def test_a_running_text_needs_a_model_that_goes_from_left_to_right() -> None:
    text = torch.zeros(9, dtype=torch.int64)
    with pytest.raises(ValueError, match="from left to right, got 'gaussian'"):
        running_nats(Gaussian(likely.contract.Reals((3,))), text, 1)
    model = scrambled(Tokens(4, 3))
    with pytest.raises(ValueError, match="stride: expected 1 to 4, got 5"):
        running_nats(model, text, 5)
    with pytest.raises(ValueError, match="at least 4 symbols"):
        running_nats(model, text[:3], 1)


# From the user's side --------------------------------------------------------------------------------------------


def test_texts_go_on_from_a_prefix(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "verses.txt"
    file.write_bytes(b"to be or not to be, " * 40)
    fitted = likely.fit(file, "transformer", out=tmp_path / "run", read={"length": 16}, progress=False,
                        width=16, layers=1, steps=5, batch_size=8)  # fmt: skip
    texts = fitted.sample(3, prefix="to bé", seed=1)
    assert [text[:5] for text in texts] == ["to bé"] * 3 and len(set(texts)) == 3
    assert texts == fitted.sample(3, prefix="to bé", seed=1)
    outcome = run("sample", tmp_path / "run", "-n", "1", "--prefix", "or not")
    assert outcome.code == 0 and outcome.raw.startswith(b"or not")
    outcome = run("sample", tmp_path / "run", "-n", "1", "--prefix", "more than sixteen bytes")
    assert outcome.code == 1 and "prefix: expected fewer symbols than the 16" in outcome.errors
    with pytest.raises(ValueError, match="temperature"):
        fitted.sample(1, prefix="to", temperature=0.5)


def test_a_prefix_is_one_of_the_data() -> None:
    lines = ["CCO", "CC", "CCCO", "OC"] * 5
    fitted = likely.fit(lines, "transformer", width=16, layers=1, steps=3, batch_size=8, progress=False)
    assert all(text.startswith("CO") for text in fitted.sample(4, prefix="CO"))
    with pytest.raises(ValueError, match="prefix: expected symbols of 'CO', got 'N'"):
        fitted.sample(1, prefix="CN")
    independent = likely.fit(lines, "independent", progress=False)
    with pytest.raises(ValueError, match="prefix"):
        likely.fit(np.zeros((9, 2)), "independent", progress=False).sample(1, prefix="C")
    assert independent.schema.space == fitted.schema.space


def test_unsupported_spaces_name_what_is() -> None:
    with pytest.raises(Unsupported, match="Binary, Integers, Tokens, Table"):
        Transformer(likely.contract.Reals((2,)))
