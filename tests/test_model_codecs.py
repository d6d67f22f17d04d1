"""Codecs of the closed-form models: every value comes back, at the length of the float model's log-probability."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from torch import Tensor

from likely.checks import Source
from likely.checks.elsewhere import decode_elsewhere
from likely.coding import Stack
from likely.coding.bits_back import decode_rows, encode_rows
from likely.coding.components import ComponentsCodec
from likely.coding.continuum import ordered
from likely.coding.normals import (
    DiagonalNormals,
    ExactProduct,
    FactorInnovations,
    LowRankInnovations,
    cholesky,
    covariances,
    fixed_sum,
    kinds_of,
    low_rank_gains,
    of_present,
)
from likely.coding.rows import Rows
from likely.coding.sequential import Fine
from likely.coding.staircase import CountLaws, Line, Part, Staircases, counts, numbers
from likely.coding.tables import logistic
from likely.contract import Binary, Column, Counts, Integers, Model, NoCodec, Reals, Space, Table, Tokens
from likely.models import find
from likely.models.gaussian import Gaussian
from likely.models.independent import Independent
from likely.models.mixture import Mixture

SPACING, BOUND = 2.0**-8, 16.0
GRID = {"spacing": SPACING, "bound": BOUND}
MIXED = Table(
    columns=(
        Column("height", "real", resolution=0.5, missing=True),
        Column("price", "real", resolution=0.01, missing=True),
        Column("age", "integer"),
        Column("colour", "categorical", levels=4, missing=True),
        Column("smoker", "binary"),
        Column("weight", "real", missing=True),
    )
)
EM = {"components": 6, "passes": 10, "restarts": 1}


def table(n: int, seed: int = 0) -> Tensor:
    """Dependent columns of every kind, heaped, skewed, and with holes; weights are float32."""
    g = torch.Generator().manual_seed(seed)
    z, e = (torch.randn(n, 6, generator=g, dtype=torch.float64) for _ in range(2))
    x = torch.empty(n, 6, dtype=torch.float64)
    x[:, 0] = (2 * (170 + 9 * z[:, 0])).round() / 2
    x[:, 1] = ((3 + 1.2 * z[:, 1]).exp() * 100).round() / 100
    x[:, 1] = torch.where(e[:, 1] > 0.8, 9.99, x[:, 1])
    x[:, 2] = (40 + 15 * z[:, 1] + 5 * e[:, 2]).round().clamp(min=0)
    x[:, 3] = (z[:, 0] + e[:, 3] > 0).double() + 2 * (e[:, 4] > 1).double()
    x[:, 4] = (z[:, 0] > 0.5).double()
    x[:, 5] = (70 + 8 * z[:, 0] + 3 * e[:, 5]).float().double()
    holes = torch.rand(n, 6, generator=g) < 0.15
    holes[:, [2, 4]] = False
    return torch.where(holes, math.nan, x)


def amounts(n: int, missing: bool = False, seed: int = 0) -> Tensor:
    """Counts of means from 0.3 to 10^6."""
    g = np.random.default_rng(seed)
    rate = g.gamma(2.0, 0.5, (n, 1)) * np.array([0.3, 4.0, 200.0, 1e6])
    x = torch.from_numpy(g.poisson(rate * g.gamma([1.0, 3.0, 50.0, 0.4], 1.0, (n, 4)) / [1, 3, 50, 0.4])).double()
    return (
        torch.where(torch.rand(n, 4, generator=torch.Generator().manual_seed(seed)) < 0.2, math.nan, x)
        if missing
        else x
    )


def data(space: Space, n: int, seed: int) -> Tensor:
    if isinstance(space, Table):
        return table(n, seed)
    if isinstance(space, Counts):
        return amounts(n, space.missing, seed)
    x, _ = Source(space, seed=0).sample(n, torch.Generator().manual_seed(seed))
    if isinstance(space, Reals):
        x = ((x / SPACING).round() * SPACING).clamp(-BOUND, BOUND)
    return x


def fitted(model: Model, x: Tensor) -> Model:
    model.estimate([(x, None)])
    return model.eval()


@torch.no_grad()
def promised_bits(model: Model, x: Tensor) -> float:
    """−log2 of the float model's probability; a density times the spacing of the grid, or of the floats."""
    nats = model.bound(x).nats.double().sum()
    if isinstance(model.space, Reals):
        nats += (~torch.isnan(x)).sum() * math.log(SPACING)
    for j, column in enumerate(model.space.columns if isinstance(model.space, Table) else ()):
        if not column.has_probability:
            known = x[:, j][~torch.isnan(x[:, j])]
            nats += torch.exp2(torch.frexp(known)[1].double() - 24).log().sum()  # float32
    return float(-nats / math.log(2))


def round_trip(model: Model, x: Tensor, **arguments: object) -> float:
    """Code and decode a batch on a stack of random bits; the length of the integer tables in bits."""
    codec = model.codec(**arguments)  # type: ignore[arg-type]
    rows = Rows(model.space, arguments.get("spacing"))  # type: ignore[arg-type]
    symbols, present = rows.symbols(x)
    x = rows.values(symbols, present)
    assert bool(codec.legal(x).all())
    stack = Stack(lanes=16)
    before, supplied = stack.state(), stack.supplied
    codec.push(stack, x)
    length = stack.bits
    written = stack.size_bits - 32.0 * (stack.supplied - supplied)
    written -= 32.0 * len(before[1]) + float(np.log2(before[0]).sum())
    assert written == pytest.approx(length, rel=5e-4, abs=48)
    back = codec.pop(stack, len(x), None, present)
    assert torch.equal(back.double().nan_to_num(nan=-1e99), x.double().nan_to_num(nan=-1e99))
    assert stack.bits == pytest.approx(0.0, abs=1e-6)
    return length


SPARE = {"spare_bits": [29]}
CASES: dict[str, tuple[Callable[[], Model], Space, dict[str, object], tuple[float, float]]] = {}
for _space in (
    Binary((3, 4)),
    Binary((3, 4), missing=True),
    Integers((2, 3), 16),
    Tokens(4, 5),
    Counts((4,)),
    Counts((4,), missing=True),
    Reals((3,)),
    Reals((3,), missing=True),
    MIXED,
):
    _title = f"{type(_space).__name__}{' with holes' if _space.missing else ''}"
    _arguments: dict[str, object] = GRID if isinstance(_space, Reals) else SPARE if isinstance(_space, Table) else {}
    CASES[f"independent, {_title}"] = (lambda s=_space: Independent(s), _space, _arguments, (-5e-4, 2e-4))  # type: ignore[misc]
    CASES[f"mixture, {_title}"] = (lambda s=_space: Mixture(s, **EM), _space, _arguments, (-1e-3, 5e-4))  # type: ignore[misc]
    if not isinstance(_space, Tokens):
        _shorter = -2e-4 if isinstance(_space, Reals) else -1.0
        for _rank in (None, 2):
            CASES[f"gaussian{_rank or ''}, {_title}"] = (
                lambda s=_space, r=_rank: Gaussian(s, rank=r),  # type: ignore[misc]
                _space,
                _arguments,
                (_shorter, 1e-3),
            )
for _space in (Reals((3,)), Reals((3,), missing=True)):
    CASES[f"mixture with full covariance, {_space.missing}"] = (
        lambda s=_space: Mixture(s, covariance="full", components=3, passes=3, restarts=1),  # type: ignore[misc]
        _space,
        GRID,
        (-2e-4, 5e-4),
    )
CASES["mixture of Poissons"] = (lambda: Mixture(Counts((4,)), counts="poisson", **EM), Counts((4,)), {}, (-1.0, 5e-4))


@pytest.mark.parametrize("name", CASES)
def test_length_is_that_of_the_float_model(name: str) -> None:
    build, space, arguments, (shorter, longer) = CASES[name]
    model = fitted(build(), data(space, 2000, 1))
    x = data(space, 2500, 2)
    length, promise = round_trip(model, x, **arguments), promised_bits(model, x)
    assert promise * (1 + shorter) <= length <= promise * (1 + longer), f"{length / promise - 1:+.5%}"


@pytest.mark.parametrize("rank", [None, 2])
def test_length_under_a_condition(rank: int | None) -> None:
    space = Table(columns=(Column("group", "categorical", levels=3), Column("age", "real", missing=True)))
    c = torch.stack([torch.arange(3000.0) % 3, torch.randn(3000)], 1).double()
    c[::7, 1] = math.nan
    x = torch.randn(3000, 3).double() @ torch.randn(3, 3).double() + c[:, :1] + c[:, 1:].nan_to_num()
    x = (x / SPACING).round() * SPACING
    model = Gaussian(Reals((3,)), space, rank=rank)
    model.estimate([(x[:2000], c[:2000])])
    codec, stack = model.codec(**GRID), Stack(lanes=8)
    codec.push(stack, x[2000:], c[2000:])
    nats = model.bound(x[2000:], c[2000:]).nats.sum() + x[2000:].numel() * math.log(SPACING)
    assert stack.bits == pytest.approx(float(-nats / math.log(2)), rel=2e-4)
    assert torch.equal(codec.pop(stack, 1000, c[2000:]), x[2000:])


FAR = {
    "table": (
        MIXED,
        torch.tensor(
            [
                [0.5, 0.01, 0, 3, 1, 0.0],
                [-3e9, 1e12, 10**15, 0, 0, -0.0],
                [1e7, -123456.78, -(2**40), 3, 1, 1e300],
                [0.0, 9.99, 2**61, 2, 0, -1e-300],
                [math.nan, math.nan, 7, math.nan, 1, math.nan],
                [170.5, 9.99, 41, 1, 0, 3.4028234663852886e38],
            ],
            dtype=torch.float64,
        ),
    ),
    "counts": (Counts((4,)), torch.tensor([[0, 2**40, 1, 2**61], [10**6, 0, 2**50, 0]]).double()),
    "reals": (Reals((3,)), torch.tensor([[16.0, -16.0, 0.0], [-16.0, 1 / 256, 16.0]], dtype=torch.float64)),
    "levels never seen": (Integers((2, 3), 16), torch.full((3, 2, 3), 15.0)),
}


@pytest.mark.parametrize("name", FAR)
@pytest.mark.parametrize("cls", [Independent, Gaussian, Mixture])
def test_values_far_from_all_that_was_seen_come_back(cls: type[Model], name: str) -> None:
    space, far = FAR[name]
    seen = data(space, 300, 1)
    if isinstance(space, Integers):
        seen = seen.clamp(max=11)
    model = fitted(cls(space, **(EM if cls is Mixture else {})), seen)
    codec = model.codec(**(GRID if isinstance(space, Reals) else {}))
    for x in (far, torch.cat([seen[:5].double(), far]), far[:1], far[:0]):
        present = ~torch.isnan(x)
        rows = Rows(space, SPACING if isinstance(space, Reals) else None)
        x = rows.values(*rows.symbols(x))
        assert bool(codec.legal(x).all())
        payload = encode_rows(codec, x)
        back = decode_rows(codec, payload.data, len(x), None, None if present.all() else present.numpy())
        assert back.shape == x.shape
        assert (
            back.double().nan_to_num(nan=-1e99).numpy().tobytes() == x.double().nan_to_num(nan=-1e99).numpy().tobytes()
        )


@pytest.mark.parametrize("cls", [Independent, Gaussian, Mixture])
def test_what_a_codec_cannot_code_is_not_legal(cls: type[Model]) -> None:
    model = fitted(cls(MIXED, **(EM if cls is Mixture else {})), table(300))
    x = table(1)
    x[0, 5], x[0, :5] = 0.1, 1.0  # 0.1 is no float32
    assert model.codec(spare_bits=[29]).legal(x).tolist() == [[True] * 5 + [False]]
    assert model.codec().legal(x).all()
    reals = fitted(cls(Reals((3,)), **(EM if cls is Mixture else {})), data(Reals((3,)), 300, 0))
    x = torch.tensor([[16.0, 17.0, -16.5]], dtype=torch.float64)
    assert reals.codec(**GRID).legal(x).tolist() == [[True, False, False]]
    with pytest.raises(ValueError, match="symbol"):
        reals.codec(**GRID).push(Stack(), x)


@pytest.mark.parametrize("cls", [Independent, Gaussian, Mixture])
def test_reals_without_a_grid_have_no_codec_and_say_why(cls: type[Model]) -> None:
    with pytest.raises(NoCodec, match="density"):
        cls(Reals((2,))).codec()
    with pytest.raises(ValueError, match=r"expected both or neither, got 0\.5 and None"):
        cls(Reals((2,))).codec(spacing=0.5)


@pytest.mark.parametrize(
    "name", ["gaussian2, Table with holes", "mixture, Table with holes", "mixture, Reals with holes"]
)
def test_decodes_in_another_process_with_other_threads_and_instructions(name: str) -> None:
    build, space, arguments, _ = CASES[name]
    model = fitted(build(), data(space, 1000, 1))
    rows = Rows(space, arguments.get("spacing"))  # type: ignore[arg-type]
    symbols, present = rows.symbols(data(space, 700, 2))
    x = rows.values(symbols, present)
    payload = encode_rows(model.codec(**arguments), x)  # type: ignore[arg-type]
    mask = None if present is None else torch.from_numpy(present)
    back = decode_elsewhere(model, payload.data, len(x), None, mask, **arguments)
    assert torch.equal(back.nan_to_num(nan=-1e99), x.nan_to_num(nan=-1e99))


def test_a_mixture_in_float32_is_a_prior_of_float32_latent_values() -> None:
    model = Mixture(Reals((8,)), components=20, seed=1).float()
    z = ((torch.randn(3000, 8) / SPACING).round() * SPACING).double()
    length = round_trip(model, z, **GRID)
    assert length == pytest.approx(promised_bits(model.double(), z), rel=2e-4)


def test_a_component_is_borrowed_once() -> None:
    model = Mixture(Binary((4,)), components=8)
    with torch.no_grad():
        model.laws[0].logits.zero_()  # components that nothing tells apart
    codec, stack = model.codec(), Stack()
    assert isinstance(codec, ComponentsCodec) and codec.initial
    codec.push(stack, torch.zeros(1, 4))
    assert stack.bits == pytest.approx(4.0, abs=1e-4)
    assert stack.supplied <= 2  # of 32 bits, the lane's own included


# ------------------------------------------------------------------------------------------------------- staircases


def masses(laws: Staircases, symbols: np.ndarray) -> np.ndarray:
    return 2.0 ** -laws.cells(len(symbols)).lengths(symbols.reshape(-1, 1))[:, 0]


def test_numbers_have_the_masses_of_their_laws() -> None:
    parts = [
        Part(np.array([[0.5, 0.1]]), np.array([[3.0, 200.0]]), np.array([[1.0, 40.0]])),
        Part(np.array([[0.2]]), np.array([[0.0]]), np.array([[25.0]]), logistic),
    ]
    atoms = np.array([-5, 60]), np.array([[0.15, 0.05]])
    laws = Staircases([numbers(parts, Line(0.5), atoms)])
    symbols = np.arange(-200, 900)
    edges = (np.arange(-200, 901) - 0.5) * 0.5
    cdf = 0.5 * scipy.stats.norm(3, 1).cdf(edges) + 0.1 * scipy.stats.norm(200, 40).cdf(edges)
    expected = np.diff(cdf + 0.2 * scipy.special.expit(edges / 25.0))
    expected[symbols == -5] += 0.15
    expected[symbols == 60] += 0.05
    found = masses(laws, symbols)
    divergence = np.sum(expected * np.log(expected / found)) - expected.sum() + found.sum()  # nats
    assert 0 <= divergence < 2e-4
    assert found[symbols == 60][0] == pytest.approx(expected[symbols == 60][0], rel=1e-3)


def test_floats_have_the_density_of_their_laws_in_every_octave() -> None:
    law = Part(np.array([[1.0]]), np.array([[0.3]]), np.array([[1.0]]))
    laws = Staircases([numbers([law], Line())])
    x = np.random.default_rng(0).normal(0.3, 1.0, 20_000)
    spacing = np.spacing(np.abs(x))
    promise = -np.log2(scipy.stats.norm(0.3, 1.0).pdf(x) * spacing)
    bits = laws.cells(len(x)).lengths(ordered(x).reshape(-1, 1))[:, 0]
    assert bits.mean() == pytest.approx(promise.mean(), abs=1e-3)
    assert laws.cells(1).lengths(ordered([0.0]).reshape(1, 1)).item() < 29  # not the 1,074 of its spacing


@pytest.mark.parametrize(("mean", "r"), [(0.2, 0.5), (3.0, 10.0), (700.0, 0.3), (4e4, 2.0), (1e6, 1e5), (50.0, None)])
def test_counts_have_the_masses_of_their_laws(mean: float, r: float | None) -> None:
    laws = Staircases([counts([CountLaws(np.log([mean]), None if r is None else np.log([r]), np.zeros(1))])])
    law = scipy.stats.poisson(mean) if r is None else scipy.stats.nbinom(r, r / (r + mean))
    x = law.rvs(4000, random_state=1)
    assert -np.log2(masses(laws, x)).mean() == pytest.approx(-law.logpmf(x).mean() / np.log(2), rel=2e-4)


# ---------------------------------------------------------------------------------------------- normals, by hand


def test_exact_products_have_the_same_bits_in_any_order() -> None:
    g = np.random.default_rng(0)
    coefficients = g.normal(size=(7, 300)) * np.exp(g.normal(size=(7, 1)) * 5)
    x = g.integers(-4096, 4097, (50, 300)).astype(np.float64)
    product = ExactProduct(coefficients, 4096)
    order = g.permutation(300)
    assert np.array_equal(product(x), ExactProduct(coefficients[:, order], 4096)(x[:, order]))
    scale = np.abs(coefficients).max(1) * 4096
    assert np.abs(product(x) - x @ coefficients.T).max(0) == pytest.approx(np.zeros(7), abs=float((1e-8 * scale).max()))
    with pytest.raises(ValueError, match="leave 8 bits"):
        ExactProduct(coefficients, 2.0**45)


def test_responsibilities_are_those_of_scipy() -> None:
    g = np.random.default_rng(1)
    mean, log_scale = g.normal(size=(4, 5)), 0.3 * g.normal(size=(4, 5))
    symbols = g.integers(-900, 900, (40, 5))
    present = g.random((40, 5)) < 0.8
    nats = DiagonalNormals(mean, log_scale, SPACING, BOUND).log_joint(symbols, present)
    each = scipy.stats.norm(mean, np.exp(log_scale)).logpdf(symbols[:, None] * SPACING) + 0.5 * np.log(2 * np.pi)
    assert nats == pytest.approx(np.where(present[:, None], each, 0.0).sum(2), abs=1e-5)


def test_innovations_are_those_of_the_conditional_law() -> None:
    g = np.random.default_rng(2)
    dims, rank, n = 6, 2, 30
    weights = g.normal(size=(dims, rank))
    sigma = weights @ weights.T + 0.3 * np.eye(dims)
    present = g.random((n, dims)) < 0.7
    x = g.normal(size=(n, dims))
    kinds, of_row = kinds_of(present, n, dims)
    full = FactorInnovations(of_present(np.linalg.cholesky(sigma)[None], kinds), of_row)
    low_rank = LowRankInnovations(weights, *low_rank_gains(weights, 0.3, kinds), of_row)
    for j in range(dims):
        for row in np.flatnonzero(present[:, j]):
            o = np.flatnonzero(present[row, :j])
            pull = np.linalg.solve(sigma[np.ix_(o, o)], sigma[o, j])
            assert full.mean(j)[row] == pytest.approx(pull @ x[row, o], abs=1e-12)
            assert low_rank.mean(j)[row] == pytest.approx(pull @ x[row, o], abs=1e-12)
            assert full.deviation(j)[row] ** 2 == pytest.approx(sigma[j, j] - pull @ sigma[o, j])
            assert low_rank.deviation(j)[row] == pytest.approx(full.deviation(j)[row])
        for law in (full, low_rank):
            law.tell(j, np.where(present[:, j], (x[:, j] - law.mean(j)) / law.deviation(j), 0.0))


def test_factors_and_sums_of_a_fixed_order() -> None:
    g = np.random.default_rng(3)
    root = g.normal(size=(3, 5, 5))
    sigma = root @ root.transpose(0, 2, 1) + np.eye(5)
    factors = cholesky(sigma)
    assert factors == pytest.approx(np.linalg.cholesky(sigma))
    assert covariances(factors) == pytest.approx(sigma)
    for n in (1, 2, 7, 64, 100):
        terms = g.normal(size=(n, 2))
        assert fixed_sum(terms) == pytest.approx(terms.sum(0))


@pytest.mark.parametrize(("network", "hidden"), [("conv", [4, 8, 16]), ("conv", [4, 8, 0]), ("mlp", [16])])
def test_narrow_logistics_are_computed_finely_and_wide_ones_are_not(network: str, hidden: list[int]) -> None:
    """A logistic narrower than a level must lie within a small part of it; exact32 alone would put it beside."""
    model = find("vae")(Integers((1, 8, 8), 256), network=network, hidden=hidden, latent_dim=4, likelihood="logistic")
    model.initialise([(torch.randint(0, 256, (64, 1, 8, 8)), None)])
    z = torch.randn(20, 4)
    errors = {}
    for shift in (0.0, -5.0):
        with torch.no_grad():
            (bias,) = (p for name, p in model.likelihood_head.named_parameters() if name.endswith("bias"))
            bias.view(-1, 9)[:, 6:] += shift
            law = model.eval().likelihood(z, None)
        codec = model.codec()
        reproduced = codec._network.run(codec._likelihood, z, None)
        errors[shift] = (reproduced.means - law.means).abs().max().item()
        fine = any(isinstance(module, Fine) for module in codec._network.module.modules())
        assert fine == (shift < 0) == bool((law.log_scales < -4.9).float().mean() > 0.5)
    assert errors[-5.0] < 2e-4 and errors[-5.0] < 0.3 * errors[0.0]
