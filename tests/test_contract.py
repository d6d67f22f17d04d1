"""Spaces, bounds, models, noise and units: what every other part relies on."""

from __future__ import annotations

import copy
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from likely import units
from likely.contract import (
    Binary,
    Bound,
    Column,
    Counts,
    Integers,
    Model,
    NoCodec,
    Reals,
    Space,
    Table,
    Tokens,
    Unsupported,
    check_options,
    noise_or_global,
    space_from_json,
    weakest,
)
from likely.noise import KeyedNoise, StreamNoise, content_keys

TABLE = Table(
    columns=(
        Column("colour", "categorical", levels=3),
        Column("height", "real", resolution=0.01, missing=True),
        Column("weight", "real"),
        Column("visits", "integer"),
        Column("member", "binary"),
    )
)
SPACES = [
    Binary((2, 3)),
    Binary((4,), missing=True),
    Integers((3, 4, 4), 256),
    Reals((2,), missing=True),
    Counts((5,)),
    Tokens(7, 27),
    Tokens(7, 27, missing=True),
    TABLE,
]


# Spaces ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_space_survives_json(space: Space) -> None:
    assert space_from_json(json.loads(json.dumps(space.to_json()))) == space


def test_dims_and_probability() -> None:
    assert [space.dims for space in SPACES] == [6, 4, 48, 2, 5, 7, 7, 5]
    assert Integers((2,), 3).has_probability
    assert not Reals((2,)).has_probability
    assert not TABLE.has_probability  # weight lives on a continuum
    on_grid = Table(columns=tuple(column for column in TABLE.columns if column.name != "weight"))
    assert on_grid.has_probability
    assert TABLE.missing
    assert not on_grid.columns[1].coded


@pytest.mark.parametrize(
    ("space", "batch", "message"),
    [
        (Binary((2,)), [[0, 1], [0, 2]], r"x\[1, 1\]: expected a whole number, 0 to 1, got 2 \(example 1\)"),
        (Binary((2,)), [[0, 0.5]], r"x\[0, 1\]: expected a whole number, 0 to 1, got 0\.5"),
        (Integers((2,), 4), [[0, 3], [4, 0]], r"x\[1, 0\]: expected a whole number, 0 to 3, got 4"),
        (Integers((2,), 4), [[0, -1]], r"x\[0, 1\]: .* got -1"),
        (Counts((2,)), [[7, -2]], r"x\[0, 1\]: expected a whole number, from 0 up, got -2"),
        (Tokens(2, 5), [[0, 5]], r"x\[0, 1\]: expected a whole number, 0 to 4, got 5"),
        (Reals((2,)), [[0, math.inf]], r"x\[0, 1\]: expected a finite value, got inf"),
        (Reals((2,), missing=True), [[math.nan, -math.inf]], r"x\[0, 1\]: expected a finite value, got -inf"),
        (Reals((2,)), [[0, math.nan]], r"x\[0, 1\]: expected a value \(this space has no missing cells\), got nan"),
        (Reals((2,)), [[0, 1, 2]], r"x: expected shape \(batch, 2\), got \(1, 3\)"),
        (Reals((2,)), [0, 1], r"x: expected shape \(batch, 2\), got \(2,\)"),
        (
            TABLE,
            [[0, 1.5, 0, 0, 0], [3, 1.5, 0, 0, 0]],
            r"expected a code from 0 to 2, got 3 \(row 1, column 'colour'\)",
        ),
        (TABLE, [[0, 123456.785, 0, 0, 0]], r"expected a multiple of 0\.01, got 123456\.785 "),
        (TABLE, [[0, 1.505, 0, 0, 0]], r"expected a multiple of 0\.01, got 1\.505 \(row 0, column 'height'\)"),
        (TABLE, [[0, 1.5, 0, 0.5, 0]], r"expected a multiple of 1, got 0\.5 \(row 0, column 'visits'\)"),
        (TABLE, [[0, 1.5, math.nan, 0, 0]], r"this column has no missing cells\), got nan \(row 0, column 'weight'\)"),
        (TABLE, [[math.nan, 1.5, 1, 0, 0]], r"this column has no missing cells\), got nan \(row 0, column 'colour'\)"),
    ],
)
def test_what_is_no_batch_is_refused_by_index_and_value(space: Space, batch: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        space.validate(torch.tensor(batch, dtype=torch.float64))


@pytest.mark.parametrize(
    ("value", "message"),
    [([[0.0, 1.0]], "got list"), (torch.zeros(1, 2, dtype=torch.bool), "got dtype torch.bool")],
)
def test_what_is_no_tensor_of_numbers_is_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Reals((2,)).validate(value)  # type: ignore[arg-type]


def test_good_batches_are_accepted() -> None:
    Integers((2,), 256).validate(torch.tensor([[0, 255]], dtype=torch.uint8))
    Counts((1,)).validate(torch.tensor([[10**6]]))
    rows = [[2.0, math.nan, -3.3, 17.0, 1.0], [0.0, 123456.78, 1e9, -4.0, 0.0]]
    TABLE.validate(torch.tensor(rows, dtype=torch.float64))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Integers((2,), 1), "expected at least 2 levels, got 1"),
        (lambda: Binary((0, 2)), r"expected positive sizes in shape, got \(0, 2\)"),
        (lambda: Tokens(3, 1), "expected a vocabulary of at least 2, got 1"),
        (lambda: Table(columns=()), "expected at least one column"),
        (lambda: Column("a", "colour"), "column 'a': expected kind .* got 'colour'"),  # type: ignore[arg-type]
        (lambda: Column("a", "categorical"), "column 'a': expected levels >= 1"),
        (lambda: Column("a", "real", levels=3), "column 'a': .* has no levels, got 3"),
        (lambda: Column("a", "real", resolution=-1.0), "column 'a': expected a positive resolution, got -1"),
        (lambda: Column("a", "categorical", levels=2, resolution=1.0), "expected a positive resolution, got 1"),
        (lambda: space_from_json({"space": "Sphere"}), "space: expected .* got 'Sphere'"),
    ],
)
def test_impossible_spaces_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


# Bounds ------------------------------------------------------------------------------------------------------------


def test_parts_sum_to_nats_and_keep_their_names() -> None:
    bound = Bound("lower bound", {"reconstruction": torch.tensor([1.0, 2.0]), "kl": torch.tensor([-0.5, -0.25])})
    assert bound.nats.tolist() == [0.5, 1.75]
    first = bound.map(lambda part: part[:1])
    assert list(first.parts) == ["reconstruction", "kl"]
    assert first.nats.tolist() == [0.5]


def test_a_bound_has_a_kind_and_parts_of_one_shape() -> None:
    with pytest.raises(ValueError, match=r"kind: expected .* got 'guess'"):
        Bound("guess", {"a": torch.zeros(2)})  # type: ignore[arg-type]
    for parts in ({}, {"a": torch.zeros(2), "b": torch.zeros(3)}, {"a": torch.zeros(2, 1)}):
        with pytest.raises(ValueError, match="parts: expected tensors of one shape"):
            Bound("exact", parts)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_part_that_is_not_finite_is_named_with_its_example(value: float) -> None:
    bound = Bound("exact", {"fine": torch.zeros(3), "broken": torch.tensor([0.0, 0.0, value])})
    with pytest.raises(FloatingPointError, match=r"part 'broken' of the bound is .* for example 2"):
        bound.check_finite()


def test_the_weakest_kind_wins() -> None:
    assert weakest("exact", "exact") == "exact"
    assert weakest("exact", "lower bound") == "lower bound"
    assert weakest("estimate", "lower bound", "exact") == "estimate"


# Models ------------------------------------------------------------------------------------------------------------


class Toy(Model):
    """One rate for every cell."""

    spaces = (Binary, Counts)

    def __init__(self, space, condition=None, *, latent_dim=16, hidden=(4, 4)):
        super().__init__(space, condition)
        self.rate = torch.nn.Parameter(torch.zeros(()))

    def bound(self, x, condition=None, noise=None):
        return Bound("exact", {"rate": self.rate.expand(len(x)) - 1.5 * x.flatten(1).sum(1)})


def test_config_is_what_the_constructor_was_given_and_its_defaults() -> None:
    assert Toy(Binary((2,)), hidden=(8,)).config == {"latent_dim": 16, "hidden": (8,)}
    assert Toy.name() == "test_contract"


def test_unknown_options_are_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"no option 'latent_dims'; did you mean 'latent_dim'\? .*latent_dim, hidden"):
        Toy(Binary((2,)), latent_dims=3)
    with pytest.raises(ValueError, match="no option 'zzz' \\("):
        check_options(Toy, {"zzz": 1})


def test_a_space_or_condition_that_does_not_suit_is_refused() -> None:
    with pytest.raises(Unsupported, match="is defined on Binary, Counts; got Reals"):
        Toy(Reals((2,)))
    with pytest.raises(Unsupported, match="takes no condition"):
        Toy(Binary((2,)), Integers((1,), 3))


def test_loss_is_minus_the_bound_per_dimension() -> None:
    model = Toy(Binary((2, 2)))
    x = torch.tensor([[[0.0, 1], [1, 1]], [[0, 0], [0, 0]]])
    loss = model.loss(x)
    assert loss.value.item() == pytest.approx((1.5 * 3 / 2) / 4)
    assert loss.log["rate"].item() == pytest.approx(-2.25)
    assert not loss.log["rate"].requires_grad


def test_a_model_says_what_it_cannot_do() -> None:
    model = Toy(Binary((2,)))
    assert not model.can("encode")
    assert model.can("sample")
    with pytest.raises(NoCodec, match="has no codec"):
        model.codec()


def test_a_copy_is_a_model_of_its_own() -> None:
    model = Toy(Binary((2,)), latent_dim=3)
    twin = copy.deepcopy(model)
    twin.rate.data += 1.0
    assert twin.config == model.config
    assert twin.space == model.space
    assert model.rate.item() == 0.0


# Noise -------------------------------------------------------------------------------------------------------------


def test_keyed_noise_is_a_function_of_seed_and_key_alone() -> None:
    keys = torch.arange(6)
    whole = KeyedNoise(3, keys)
    first, second = whole.normal((6, 4)), whole.uniform((6, 2, 2))
    order = torch.tensor([5, 0, 2])
    part = KeyedNoise(3, keys[order])
    assert torch.equal(part.normal((3, 4)), first[order])
    assert torch.equal(part.uniform((3, 2, 2)), second[order])
    assert not torch.equal(KeyedNoise(4, keys).normal((6, 4)), first)


def test_keyed_noise_is_the_same_in_whatever_pieces_it_is_drawn() -> None:
    normal, uniform = KeyedNoise(3, torch.arange(5)).normal((5, 200)), KeyedNoise(3, torch.arange(5)).uniform((5, 200))
    noise, at = KeyedNoise(3, torch.arange(5)), 0
    for size in (1, 1, 7, 60, 1, 90, 2, 3):
        drawn = noise.uniform((5, size)) if size % 2 else noise.normal((5, size))
        assert torch.equal(drawn, (uniform if size % 2 else normal)[:, at : at + size])
        at += size


def test_keyed_noise_has_the_distribution_it_names() -> None:
    noise = KeyedNoise(0, torch.arange(20_000))
    normal, uniform = noise.normal((20_000, 3)).double().numpy(), noise.uniform((20_000, 3)).double().numpy()
    for j in range(3):
        assert stats.kstest(normal[:, j], "norm").pvalue > 1e-4
        assert stats.kstest(uniform[:, j], "uniform").pvalue > 1e-4
    assert 0.0 < uniform.min() < uniform.max() < 1.0
    together = np.concatenate([normal, uniform], 1)
    correlation = np.corrcoef(together.T) - np.eye(6)
    assert np.abs(correlation).max() < 5 / math.sqrt(20_000)
    neighbours = np.corrcoef(normal[:-1, 0], normal[1:, 0])[0, 1]  # streams of consecutive keys
    assert abs(neighbours) < 5 / math.sqrt(20_000)


def test_keyed_noise_refuses_another_number_of_examples() -> None:
    with pytest.raises(ValueError, match="expected 3 examples on the first axis, got \\(2, 4\\)"):
        KeyedNoise(0, torch.arange(3)).normal((2, 4))


def test_content_keys_depend_on_the_values_of_the_example_and_nothing_else() -> None:
    x = torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0], [math.nan, 2.0], [0.0, 2.0]])
    keys = content_keys(x)
    assert keys[0] == keys[2]
    assert len(set(keys.tolist())) == 4
    assert torch.equal(content_keys(x[1:3]), keys[1:3])
    assert torch.equal(content_keys(x.double()), keys)
    assert torch.equal(content_keys(torch.tensor([[1, 2]], dtype=torch.uint8)), keys[:1])
    condition = torch.tensor([[0], [0], [1], [0], [0]])
    with_condition = content_keys(x, condition)
    assert with_condition[0] != with_condition[2]
    assert torch.equal(content_keys(x, None), keys)
    with pytest.raises(ValueError, match="at least one batch"):
        content_keys(None)


def test_stream_noise_of_a_part_is_the_part_of_the_noise() -> None:
    whole = StreamNoise(torch.Generator().manual_seed(1)).normal((10, 3))
    part = StreamNoise(torch.Generator().manual_seed(1), rows=(4, 7, 10)).normal((3, 3))
    assert torch.equal(part, whole[4:7])
    with pytest.raises(ValueError, match="expected 3 examples"):
        StreamNoise(rows=(4, 7, 10)).normal((2, 3))


def test_noise_is_the_given_one_or_the_global_one() -> None:
    given = StreamNoise(torch.Generator().manual_seed(0))
    assert noise_or_global(given, torch.zeros(1)) is given
    torch.manual_seed(5)
    drawn = noise_or_global(None, torch.zeros(1)).normal((2, 2))
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.randn(2, 2))


# Units -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [2, 3, 27, 256, 65_536])
@pytest.mark.parametrize("shape", [(1,), (3, 8, 8)])
def test_a_uniform_model_costs_log2_levels_a_dimension(levels: int, shape: tuple[int, ...]) -> None:
    dims = math.prod(shape)
    nats = -dims * math.log(levels)
    assert units.bits_per_dim(nats, dims) == pytest.approx(math.log2(levels), abs=1e-12)
    assert units.code_length_bits(nats) == pytest.approx(dims * math.log2(levels))
    assert units.perplexity(nats, dims) == pytest.approx(levels)


def test_units_of_arrays_and_back() -> None:
    values = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    assert torch.allclose(units.nats(units.bits(values)), values, atol=1e-15)
    assert np.allclose(units.bits_per_dim(values.numpy(), 2), -values.numpy() / math.log(2) / 2)
    assert units.bits_per_byte(-80 * math.log(2.0), 20) == pytest.approx(4.0)
    for call in (
        lambda: units.bits_per_dim(1.0, 0),
        lambda: units.bits_per_byte(1.0, 0),
        lambda: units.perplexity(1.0, 0),
    ):
        with pytest.raises(ValueError, match="expected a positive"):
            call()
