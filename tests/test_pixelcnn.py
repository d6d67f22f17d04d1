"""What is particular to PixelCNN: causality, the law of a pixel, completion, and a codec that follows the decoder."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.datasets import load_digits

from likely.checks import check_model
from likely.coding import Stack, sequential
from likely.contract import Binary, Integers, Space, Unsupported
from likely.distributions import logistic
from likely.distributions.pixel import PixelBernoulli, PixelMixture
from likely.models.pixelcnn import PixelCNN
from likely.networks.causal import CausalPatch
from likely.noise import KeyedNoise, StreamNoise

COLOURS = Integers((3, 5, 4), 16)


def stream(seed: int) -> StreamNoise:
    return StreamNoise(torch.Generator().manual_seed(seed))


def images(space: Space, n: int, seed: int = 0) -> torch.Tensor:
    levels = space.levels if isinstance(space, Integers) else 2
    return torch.randint(levels, (n, *space.shape), generator=torch.Generator().manual_seed(seed))


def scrambled(space: Space, condition: Space | None = None, **options: object) -> PixelCNN:
    """An instance whose every weight matters."""
    model = PixelCNN(space, condition, **{"width": 12, "layers": 2, "components": 3, "field": (2, 2), **options})
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape))
    model.initialise([(images(space, 50).float(), None if condition is None else torch.zeros(50, *condition.shape))])
    return model.eval()


# Patches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centre", [False, True])
def test_patches_of_all_of_some_and_of_one_position_agree_with_a_loop(centre: bool) -> None:
    patch, x, fill = CausalPatch(2, 1, centre), torch.randn(3, 4, 5, 2), torch.randn(2)
    padded = patch.pad(x, fill)
    found = patch.all(padded)
    for n, i, j in itertools.product(range(3), range(4), range(5)):
        for k, (dy, dx) in enumerate(patch.offsets):
            row, column = i + dy, j + dx
            if row < 0 or (row == 0 and column < 0):
                expected = fill
            elif column < 0:
                expected = x[n, row - 1, 0]
            else:
                expected = x[n, row, min(column, 4)]
            assert torch.equal(found[n, i, j, k], expected)
    positions = torch.randint(20, (3, 7))
    some = patch.some(padded, positions)
    written = patch.empty(3, 4, 5, fill)
    for i, j in itertools.product(range(4), range(5)):
        if centre:
            patch.write(written, i, j, x[:, i, j])
        assert torch.equal(patch.at(written, i, j), found[:, i, j])
        if not centre:
            patch.write(written, i, j, x[:, i, j])
    for n, k in itertools.product(range(3), range(7)):
        assert torch.equal(some[n, k], found[n, positions[n, k] // 5, positions[n, k] % 5])


# The law of a pixel ----------------------------------------------------------------------------------------------


def pixel_law(rows: int, colours: int, levels: int) -> PixelMixture:
    k, pairs = 3, colours * (colours - 1) // 2
    shapes = [(rows, k), (rows, colours, k), (rows, colours, k), (rows, pairs, k), (rows, colours)]
    logits, means, log_scales, slopes, reference = (torch.randn(shape).double() for shape in shapes)
    return PixelMixture(logits, 0.5 * means, log_scales - 1.5, slopes, 0.3 * reference, levels)


def test_a_pixel_has_the_mixture_of_the_paper() -> None:
    law, levels = pixel_law(1, 3, 5), 5
    weights = torch.softmax(law.logits[0], 0).numpy()
    slope = {pair: law.slopes[0, q].numpy() for q, pair in enumerate([(0, 1), (0, 2), (1, 2)])}  # (earlier, later)
    total = 0.0
    for pixel in itertools.product(range(levels), repeat=3):
        u, product = [2 * x / (levels - 1) - 1 for x in pixel], weights.copy()
        for c, x in enumerate(pixel):
            mean = law.means[0, c].numpy().copy()
            for e in range(c):
                mean += slope[e, c] * (u[e] - law.reference[0, e].item())
            scale, half = law.log_scales[0, c].exp().numpy(), 1 / (levels - 1)
            upper = 1.0 if x == levels - 1 else expit((u[c] + half - mean) / scale)
            lower = 0.0 if x == 0 else expit((u[c] - half - mean) / scale)
            product *= upper - lower
        found = law.log_probs(torch.tensor([pixel])).sum().item()
        assert found == pytest.approx(math.log(product.sum()), abs=1e-6)  # the oracle subtracts
        total += math.exp(found)
    assert total == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("binary", [False, True])
def test_the_colours_one_by_one_have_the_law_of_the_pixel(binary: bool) -> None:
    law = PixelBernoulli(torch.randn(6, 4).double(), torch.randn(6, 6).double()) if binary else pixel_law(6, 4, 9)
    x = torch.randint(2 if binary else 9, (6, 4))
    expected, rest = law.log_probs(x), law
    for c in range(4):
        torch.testing.assert_close(rest.first.log_prob(x[:, c]), expected[:, c])
        rest = rest.given(x[:, c])
    assert torch.equal(law[2:4].log_probs(x[2:4]), expected[2:4])


def test_the_codec_s_mass_of_a_level_is_that_of_the_model() -> None:
    torch.manual_seed(3)
    means, log_scales = torch.randn(400, 3), (96 * torch.randn(400, 3) - 160).round() / 64  # the grid of the tables
    x = torch.randint(256, (400, 1))
    x[:40] = torch.tensor([0, 255]).repeat(20).unsqueeze(1)
    expected = logistic.log_level(x.double(), means.double(), log_scales.double(), 256)
    found = sequential.log_level(x, means, log_scales, 256)
    likely = expected > -18
    assert likely.sum() > 600
    torch.testing.assert_close(
        found[likely], expected[likely], rtol=0, atol=0.01
    )  # the table is linear between its steps
    assert found[~likely].max() < -17.9


# The model -------------------------------------------------------------------------------------------------------

OPTIONS = {
    "three colours": (Integers((3, 1, 2), 3), {}),
    "binary colours, two stages, dropout": (Binary((2, 1, 3)), {"stages": 2, "dropout": 0.1}),
    "some positions": (Integers((1, 2, 2), 3), {"positions": 2}),
}


@pytest.mark.parametrize(("space", "options"), OPTIONS.values(), ids=OPTIONS.keys())
def test_options_keep_the_contract(space: Space, options: dict[str, object]) -> None:
    check_model(PixelCNN(space, **{"field": (1, 1), "width": 8, "layers": 1, "components": 2, **options}))


@pytest.mark.parametrize("stages", [1, 3])
def test_a_cell_depends_on_earlier_cells_only(stages: int) -> None:
    model, x = scrambled(COLOURS, stages=stages).double(), images(COLOURS, 1)
    order = [(i, j, c) for i in range(5) for j in range(4) for c in range(3)]
    before = model.column_nats(x)
    for t, (i, j, c) in enumerate(order):
        changed = x.clone()
        changed[0, c, i, j] = (x[0, c, i, j] + 5) % 16
        moved = (model.column_nats(changed) - before)[0].abs() > 1e-12
        first = [k for k, (row, column, colour) in enumerate(order) if moved[colour, row, column]]
        assert min(first) == t
        if j < 3:
            assert moved[:, i, j + 1].all()  # and the next pixel does depend on it


def test_loss_of_some_positions_estimates_the_loss_without_bias() -> None:
    model, x = scrambled(COLOURS, positions=5), images(COLOURS, 40)
    expected = -model.bound(x).nats.mean() / COLOURS.dims
    assert model.loss(x).value.item() == pytest.approx(expected.item(), rel=1e-6)  # in evaluation: of all
    model.train()
    with torch.no_grad():
        values = torch.stack([model.loss(x, None, stream(seed)).value for seed in range(300)])
    assert abs(values.mean() - expected) < 4.5 * values.std() / math.sqrt(300)
    assert values.std() > 0


def test_samples_follow_the_condition_and_its_rows() -> None:
    model = scrambled(Binary((1, 3, 3)), Integers((1,), 2))
    condition = torch.tensor([[0], [1]])
    alone = model.sample(1, condition[1:], KeyedNoise(0, torch.tensor([7])))
    beside = model.sample(2, condition, KeyedNoise(0, torch.tensor([3, 7])))
    assert torch.equal(alone[0], beside[1])


def test_images_are_completed_at_their_end_with_the_model_s_own_frequencies() -> None:
    space = Binary((1, 2, 3))
    model = scrambled(space)
    x = torch.tensor([[[[1.0, 0.0, 1.0], [1.0, torch.nan, torch.nan]]]])
    endings = list(itertools.product([0.0, 1.0], repeat=2))
    whole = torch.stack([torch.cat([x.flatten()[:4], torch.tensor(end)]).reshape(1, 2, 3) for end in endings])
    p = torch.softmax(model.bound(whole).nats, 0)
    drawn = model.impute(x, None, stream(0), draws=4000)
    assert drawn.shape == (4000, 1, 1, 2, 3)
    frequency = torch.tensor([(drawn[:, 0] == image).flatten(1).all(1).float().mean() for image in whole])
    assert ((frequency - p).abs() < 4.5 * (p * (1 - p) / 4000).sqrt() + 1e-3).all()
    best = model.impute(x, None, stream(0), samples=2000)
    marginal = torch.stack([p[[2, 3]].sum(), p[[1, 3]].sum()])
    assert torch.equal(best[0, 0, 1, 1:], (marginal > 0.5).float()) and torch.equal(best[0, 0, 0], x[0, 0, 0])


def test_a_hole_before_an_observed_cell_is_refused() -> None:
    x = images(COLOURS, 2).float()
    x[1, 2, 1, 3] = torch.nan
    with pytest.raises(Unsupported, match=r"example 1: its cell \(channel 2, row 1, column 3\) is missing"):
        scrambled(COLOURS).impute(x)


@pytest.mark.parametrize(
    ("space", "options", "message"),
    [
        (Integers((4,), 3), {}, "is for images"),
        (Integers((5, 2, 2), 3), {}, "C from 1 to 4"),
        (Binary((1, 2, 2), missing=True), {}, "without missing cells"),
        (Binary((1, 2, 2)), {"positions": 2, "stages": 2}, "positions: with more than one stage"),
        (Binary((1, 2, 2)), {"field": (1, 0)}, "columns >= 1"),
        (Binary((1, 2, 2)), {"field": (1,)}, "field: expected rows and columns"),
        (Binary((1, 2, 2)), {"width": 0}, "width: expected 1 or more, got 0"),
    ],
)
def test_what_it_cannot_do_is_refused(space: Space, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PixelCNN(space, **options)


# The codec -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [COLOURS, Integers((1, 4, 4), 256), Binary((2, 4, 4))], ids=str)
@pytest.mark.parametrize("stages", [1, 2])
def test_what_is_pushed_is_popped_and_costs_the_bound(space: Space, stages: int) -> None:
    condition = Integers((1,), 3)
    model, c = scrambled(space, condition, stages=stages), torch.randint(3, (30, 1))
    x = model.sample(30, c, stream(0)).long()
    codec, stack = model.codec(), Stack(lanes=16)
    codec.push(stack, x, c)
    with torch.no_grad():
        bits = -model.bound(x, c).nats.double().sum().item() / math.log(2)
    assert stack.bits == pytest.approx(bits, rel=1e-3)
    assert not codec.initial and codec.legal(x).all()
    copy = Stack.from_words(stack.to_words(), lanes=16)
    assert torch.equal(codec.pop(copy, 30, c), x)
    copy.finish()
    with pytest.raises(ValueError, match="without missing cells"):
        codec.push(Stack(), x.float().index_put((torch.tensor(0),), torch.tensor(torch.nan)), c)


@pytest.mark.parametrize("stages", [1, 2])
def test_the_step_of_the_decoder_equals_the_parallel_pass_to_the_bit(stages: int) -> None:
    model, x = scrambled(COLOURS, stages=stages), images(COLOURS, 9)
    exact = model.codec().networks["model"]
    twin = exact.module
    u = twin._to_unit(x.movedim(1, -1))
    padded = twin.patches[0].pad(u, twin.fill)
    maps = [patches.empty(4, 5, 4, twin.fill if s == 0 else torch.zeros(12)) for s, patches in enumerate(twin.patches)]
    rows = [exact.run(twin._row, padded, i, None) for i in range(5)] if stages == 1 else []
    # All pixels at once, stage after stage, is a third way.
    patch = twin.patches[0].all(padded)
    place = (twin.row.unsqueeze(1) + twin.column).expand(9, 5, 4, -1).flatten(0, 2)
    h = exact.run(twin.stages[0], twin._relative(patch.flatten(0, 2)), place).reshape(9, 5, 4, -1)
    for patches, stage in zip(twin.patches[1:], twin.stages[1:]):
        seen = patches.all(patches.pad(h, torch.zeros(12)))
        h = exact.run(stage, seen.flatten(0, 2).flatten(1)).reshape(9, 5, 4, -1)
    for i, j in itertools.product(range(5), range(4)):
        step = exact.run(twin._step, maps, i, j, None)  # in another batch: of four images
        assert torch.equal(step[0], exact.run(twin.output, h[:4, i, j]))
        if rows:
            for one, row in zip(step, rows[i]):
                assert torch.equal(one, row[9 * j : 9 * j + 4])
        twin.patches[0].write(maps[0], i, j, u[:4, i, j])


def test_digits_are_coded_at_their_bound_after_some_training() -> None:
    x = torch.from_numpy(load_digits().images.astype(np.int64))[:, None]
    space = Integers((1, 8, 8), 17)
    model = PixelCNN(space, width=32, layers=1, components=3)
    model.initialise([(x[:1500], None)])
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(60):
        rows = torch.randint(1500, (64,), generator=torch.Generator().manual_seed(step))
        optimiser.zero_grad()
        model.loss(x[rows]).value.backward()
        optimiser.step()
    held = x[1500:]
    model.eval()
    with torch.no_grad():
        bits = -model.bound(held).nats.double().sum().item() / math.log(2)
    assert bits / held.numel() < 2.6  # independent pixels cost 2.9
    codec, stack = model.codec(), Stack(lanes=32)
    codec.push(stack, held)
    assert stack.bits == pytest.approx(bits, rel=1e-3)
    copy = Stack.from_words(stack.to_words(), lanes=32)
    assert torch.equal(codec.pop(copy, len(held)), held)
