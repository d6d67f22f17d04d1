"""Codecs of distributions: whole mass, length against the float law, round trips, sampling, hostile parameters."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import scipy.special as sp
import scipy.stats as st
import torch

from likely.coding import Damaged, Stack
from likely.coding.categories import BernoulliCells, CategoricalCells, TabulatedCells, edges_of
from likely.coding.cells import Cells, Placed, elias_pop, elias_steps, floor_log2, share_pop, share_steps
from likely.coding.continuum import DoubleCells, from_ordered, ordered
from likely.coding.counts import BinomialCells, MultinomialRows, NegativeBinomialCells
from likely.coding.described import DescribedCells, PatternCells
from likely.coding.distributions import codec_of
from likely.coding.intervals import GridCells, LogisticCells, NormalCells
from likely.coding.tables import inverse_scale, logistic, normal, shares
from likely.contract import Column, Table
from likely.distributions import (
    Bernoulli,
    Categorical,
    DiscretizedLogisticMixture,
    GridLogisticMixture,
    Multinomial,
    NegativeBinomial,
    Normal,
    StudentT,
    head,
)
from likely.distributions.heads import TableDistribution

RNG = np.random.default_rng
BITS = 1.0 / np.log(2.0)


def random_stack(lanes: int = 64, words: int = 400_000, seed: int = 0) -> Stack:
    return Stack(lanes, RNG(seed).integers(0, 1 << 32, words, dtype=np.uint32), supply=None)


def returns(codec, symbols, lanes: int = 16) -> None:  # type: ignore[no-untyped-def]
    """Symbols come back, the stack is as it was, and it grew by the length that the codec says."""
    stack = Stack(lanes)
    codec.push(stack, symbols)
    if hasattr(codec, "lengths"):
        assert stack.bits == pytest.approx(codec.lengths(symbols).sum(), rel=1e-9, abs=1e-6)
    np.testing.assert_array_equal(codec.pop(stack), symbols)
    stack.finish()


def undoes_its_pop(codec, words: int = 400_000) -> None:  # type: ignore[no-untyped-def]
    """What was popped from random bits, pushed again, gives the same bits."""
    stack = random_stack(words=words)
    before = stack.to_words()
    symbols = codec.pop(stack)
    assert not np.array_equal(stack.to_words(), before)
    codec.push(stack, symbols)
    np.testing.assert_array_equal(stack.to_words(), before)


def whole(codec: Cells, symbols: np.ndarray) -> None:
    """Over all symbols in order, one a cell of the same law: frequencies are ≥ 1, adjoin, and fill the range."""
    (step,) = (step.all() if isinstance(step, Placed) else step for step in codec._steps(symbols))
    assert step.freq.min() >= 1
    assert step.start[0] == 0
    np.testing.assert_array_equal(step.start[1:], (step.start + step.freq)[:-1])
    assert step.start[-1] + step.freq[-1] == 1 << step.precision


#: Parameters as a broken or malicious network might give them.
EXTREME = np.float32([0.0, -0.0, 1e-45, 1.0, -7.3, 88.0, -104.0, 3e38, -3e38, 1e20, -1e20])


# ------------------------------------------------------------------------------------------------------------- tables


def test_the_tables_follow_their_laws_and_are_monotone() -> None:
    t = np.linspace(-40.0, 40.0, 400_001)
    for law, reference in ((logistic(), sp.expit(t)), (normal(), st.norm.cdf(t))):
        value = law.cdf(t * law.steps + law.centre)
        np.testing.assert_allclose(value, reference, atol=4e-6, rtol=0)
        assert value[0] == 0 and value[-1] == 1 and (np.diff(value) >= 0).all()
        inside = (reference > 1e-8) & (reference < 1e-2)
        np.testing.assert_allclose(value[inside], reference[inside], rtol=1e-3)
        assert (np.diff(law.value) >= 0).all()


def test_scales_lie_on_their_grid() -> None:
    s = RNG(0).uniform(-20, 20, 1000).astype(np.float32)
    np.testing.assert_allclose(inverse_scale(s), np.exp(-np.rint(s.astype(float) * 64) / 64), rtol=1e-13)
    assert np.isfinite(inverse_scale(EXTREME)).all() and (inverse_scale(EXTREME) > 0).all()


def test_shares_sum_to_one_exactly() -> None:
    units = RNG(0).integers(0, 1 << 30, (40, 1000)) * RNG(1).integers(0, 2, (40, 1000))
    units[0] = np.maximum(units[0], 1)
    portions = shares(units)
    total = np.zeros(1000)
    for portion in portions:
        total += portion
    assert (total == 1.0).all()
    np.testing.assert_allclose(portions, units / units.sum(0), atol=2**-29)


def test_every_size_of_a_uniform_number_and_every_length_of_an_elias_code() -> None:
    rng = RNG(0)
    sizes = np.concatenate(
        [np.arange(1, 40), 1 << np.arange(63), (1 << np.arange(1, 63)) - 1, (1 << np.arange(62)) + 1]
    )
    values = np.concatenate([np.zeros_like(sizes), sizes - 1, (rng.random(len(sizes)) * (sizes - 1)).astype(np.int64)])
    sizes = np.tile(sizes, 3)
    values = np.minimum(values, sizes - 1)
    stack = Stack(5)
    for step in reversed(share_steps(values, sizes)):
        step.push(stack)
    np.testing.assert_array_equal(share_pop(stack, sizes), values)
    for step in reversed(elias_steps(values)):
        step.push(stack)
    np.testing.assert_array_equal(elias_pop(stack, len(values)), values)
    sizes = np.full(2000, (1 << 45) + 12345)
    for step in share_steps(rng.integers(0, sizes), sizes):
        step.push(stack)
    assert stack.bits == pytest.approx(np.log2(sizes.astype(float)).sum(), rel=1e-7)
    assert floor_log2(values + 1).tolist() == [int(value + 1).bit_length() - 1 for value in values]


# ------------------------------------------------------------------------------------------- mass of every alphabet


@pytest.mark.parametrize("logit", [*EXTREME, *np.float32([0.01, 2.0, -16.9])])
def test_binary_mass_is_whole(logit: np.float32) -> None:
    whole(BernoulliCells(np.full(2, logit)), np.arange(2))


@pytest.mark.parametrize("levels", [1, 2, 3, 64, 65, 1000, 5000])
def test_categorical_mass_is_whole(levels: int) -> None:
    rng = RNG(levels)
    for scale in (0.0, 1.0, 30.0):
        logits = (scale * rng.normal(size=levels)).astype(np.float32)
        whole(CategoricalCells(np.tile(logits, (levels, 1))), np.arange(levels))
    logits = np.resize(EXTREME, levels)
    whole(CategoricalCells(np.tile(logits, (levels, 1))), np.arange(levels))
    logits = np.full(levels, -np.inf, np.float32)
    logits[-1] = 0.0
    whole(CategoricalCells(np.tile(logits, (levels, 1))), np.arange(levels))


@pytest.mark.parametrize("levels", [2, 3, 256, 4097, 65536])
def test_logistic_mass_is_whole(levels: int) -> None:
    rng = RNG(levels)
    cases = [(rng.normal(size=3), rng.normal(size=3), rng.normal(size=3) * 3 - 3) for _ in range(6)]
    cases += [tuple(rng.permutation(EXTREME)[:3] for _ in range(3)) for _ in range(12)]  # type: ignore[misc]
    for numbers in cases:
        logits, means, log_scales = (np.tile(np.float32(a), (levels, 1)) for a in numbers)
        whole(LogisticCells(logits, means, log_scales, levels), np.arange(levels))
        whole(LogisticCells(logits[:, :1], means[:, :1], log_scales[:, :1], levels), np.arange(levels))


@pytest.mark.parametrize(
    ("mean", "log_scale"), [*zip(EXTREME, EXTREME[::-1]), (0.3, -2.0), (15.99, 1.0), (-20.0, -5.0)]
)
def test_normal_mass_is_whole(mean: float, log_scale: float) -> None:
    n = 2 * 2048 + 1
    codec = NormalCells(np.full(n, mean, np.float32), np.full(n, log_scale, np.float32), 2.0**-8, 8.0)
    assert np.exp2(-codec.lengths(np.arange(-2048, 2049))).sum() == pytest.approx(1.0, abs=1e-9)


def test_mass_of_a_number_of_several_digits_is_whole() -> None:
    levels = 70_001  # two digits, the last block of which is not full
    for mean, log_scale in ((0.2, -1.0), (0.99, -6.0), (3e38, 0.0), (-0.5, 3e38)):
        numbers = [np.full((levels, 1), a, np.float32) for a in (0.0, mean, log_scale)]
        lengths = LogisticCells(*numbers, levels).lengths(np.arange(levels))  # type: ignore[arg-type]
        assert np.exp2(-lengths).sum() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("log_mean", [-39.0, -3.0, 0.0, 2.0, 5.0])
@pytest.mark.parametrize("log_r", [-19.0, -2.0, 0.0, 9.0, 19.0])
def test_count_mass_is_whole(log_mean: float, log_r: float) -> None:
    codec = NegativeBinomialCells(np.full(33, log_mean), np.full(33, log_r))
    (step,) = [s for s in codec._steps(np.r_[np.arange(32), 32]) if getattr(s, "precision", 0) == 28][:1]
    assert step.freq.min() >= 1
    np.testing.assert_array_equal(step.start[1:], (step.start + step.freq)[:-1])
    assert step.start[-1] + step.freq[-1] == 1 << 28
    tail = codec._tail(np.arange(1))
    assert tail.start[0, 0] == 0 and tail.start[-1, 0] == 1 << 28 and (np.diff(tail.start[:, 0]) >= 1).all()
    n = 4000
    lengths = NegativeBinomialCells(np.full(n, log_mean), np.full(n, log_r)).lengths(np.arange(n))
    assert np.exp2(-lengths).sum() <= 1.0 + 1e-9
    if log_r >= 0:
        assert np.exp2(-lengths).sum() == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("trials", [1, 5, 31, 32, 33, 40, 100, 3000])
@pytest.mark.parametrize("odds", [0.0, 1e-12, 0.03, 0.7, 1.0])
def test_binomial_mass_is_whole(trials: int, odds: float) -> None:
    n = trials + 1
    codec = BinomialCells(np.full(n, trials), np.full(n, odds))
    assert np.exp2(-codec.lengths(np.arange(n))).sum() == pytest.approx(1.0, abs=1e-9)


# ----------------------------------------------------------------------------------- length against the float law


def excess(codec, symbols, log_prob) -> float:  # type: ignore[no-untyped-def]
    """Coded length over −log2 p, relative."""
    nats = -log_prob.double().sum().item() if isinstance(log_prob, torch.Tensor) else -log_prob.sum()
    return codec.lengths(symbols).sum() / (nats * BITS) - 1.0


def normals(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_binary_length() -> None:
    logits = 4.0 * normals(1000, 100)
    x = (torch.rand(1000, 100, generator=torch.Generator().manual_seed(1)) < torch.sigmoid(logits)).long()
    law = Bernoulli(logits.double())
    assert abs(excess(codec_of(Bernoulli(logits)), x.numpy(), law.log_prob(x))) < 1e-4  # measured 0.001 %
    rare = torch.full((1000, 100), -11.0)  # p = 1.7e-5: 100,000 cells with one 1
    x = torch.zeros(1000, 100)
    x[3, 3] = 1
    assert abs(excess(codec_of(Bernoulli(rare)), x.long().numpy(), Bernoulli(rare.double()).log_prob(x))) < 1e-3


@pytest.mark.parametrize(("levels", "scale"), [(3, 1.0), (40, 3.0), (300, 6.0), (20_000, 2.0)])
def test_categorical_length(levels: int, scale: float) -> None:
    n = 2_000_000 // levels
    logits = scale * normals(n, levels)
    rng = RNG(0)
    x = (logits.numpy() + rng.gumbel(size=logits.shape)).argmax(1)
    law = Categorical(logits.double(), 0)
    assert abs(excess(codec_of(Categorical(logits, 0)), x, law.log_prob(torch.tensor(x)))) < 5e-4


def mixture(
    n: int, k: int, levels: int, seed: int = 0
) -> tuple[DiscretizedLogisticMixture, DiscretizedLogisticMixture]:
    logits, means, scales = normals(3, n, k, seed=seed)
    numbers = logits, 0.4 * means, scales - 3.0
    return DiscretizedLogisticMixture(*numbers, levels, 0), DiscretizedLogisticMixture(
        *(a.double() for a in numbers), levels, 0
    )


def draws(law: DiscretizedLogisticMixture, seed: int = 0) -> np.ndarray:
    """Draws by inversion in NumPy."""
    rng, n = RNG(seed), len(law.means)
    chosen = (law.logits.numpy() + rng.gumbel(size=law.logits.shape)).argmax(1)
    mean, scale = law.means.numpy()[np.arange(n), chosen], np.exp(law.log_scales.numpy()[np.arange(n), chosen])
    u = mean + scale * rng.logistic(size=n)
    return np.clip(np.rint((u + 1) / 2 * (law.levels - 1)), 0, law.levels - 1).astype(np.int64)


@pytest.mark.parametrize(("k", "levels"), [(1, 256), (3, 256), (5, 20), (5, 65536), (2, 1_000_000)])
def test_logistic_length(k: int, levels: int) -> None:
    single, law = mixture(50_000, k, levels)
    x = draws(law)
    assert abs(excess(codec_of(single), x, law.log_prob(torch.tensor(x).double()))) < 1e-4


def test_normal_length_on_a_grid() -> None:
    rng = RNG(0)
    mean, log_scale = rng.normal(size=100_000).astype(np.float32), rng.normal(-2, 0.8, 100_000).astype(np.float32)
    i = np.rint((mean + np.exp(log_scale) * rng.normal(size=len(mean))) * 256)
    law = st.norm(mean.astype(float), np.exp(log_scale.astype(float)))
    mass = np.log(law.cdf((i + 0.5) / 256) - law.cdf((i - 0.5) / 256))
    assert abs(excess(NormalCells(mean, log_scale), i.astype(np.int64), mass)) < 1e-4
    ends = np.float32([0.0, 0.0])
    lengths = NormalCells(ends, ends, 0.25, 2.0).lengths([-8, 8])  # the outer cells take the tails
    np.testing.assert_allclose(lengths, -np.log2(st.norm.cdf(-1.875)), rtol=1e-3)


def columns(n: int, dtype: torch.dtype = torch.float32) -> GridLogisticMixture:
    """Whole numbers with spikes, a fine grid of two digits, a narrow law far from 0, and a continuum."""
    numbers = normals(n, 4, 11, seed=1)
    weights, means, log_scales = numbers[..., :5].clone(), 0.8 * numbers[..., 5:8], 0.6 * numbers[..., 8:] - 1.2
    weights[:, 1:, 3:] = -torch.inf
    weights[:, 2, 3] = 1.0
    return GridLogisticMixture(
        weights.to(dtype), means.to(dtype), log_scales.to(dtype),
        torch.tensor([40.0, 2e5, -1e9, 3.7], dtype=torch.float64),
        torch.tensor([12.0, 1e5, 3.0, 12.3], dtype=torch.float64),
        torch.tensor([1.0, 0.5, 0.01, 0.0], dtype=torch.float64),
        torch.tensor([[40.0, 0.0], [0.0, 0.0], [-1e9 + 5.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
    )  # fmt: skip


def grid_draws(n: int) -> np.ndarray:
    law, rng = columns(n, torch.float64), RNG(3)
    chosen = (law.logits.numpy() + rng.gumbel(size=law.logits.shape)).argmax(-1)
    pick = np.minimum(chosen, 2)[..., None]
    mean, spread = (np.take_along_axis(a.numpy(), pick, -1)[..., 0] for a in (law.means, law.given_log_scales.exp()))
    x = law.location.numpy() + law.scale.numpy() * (mean + spread * rng.logistic(size=mean.shape))
    spike = np.take_along_axis(np.broadcast_to(law.atoms.numpy(), (n, 4, 2)), np.clip(chosen - 3, 0, 1)[..., None], -1)
    x = np.where(chosen > 2, spike[..., 0], x)
    r = law.resolution.numpy()
    return np.where(r > 0, np.rint(x / np.where(r > 0, r, 1.0)) * np.where(r > 0, r, 1.0), x)


def as_symbols(x: np.ndarray) -> np.ndarray:
    steps = np.rint(x[:, :3] / np.array([1.0, 0.5, 0.01]))
    return np.concatenate([steps.astype(np.int64), ordered(x[:, 3:])], 1)


def test_grid_columns_length() -> None:
    n = 20_000
    x = grid_draws(n)
    codec, law = codec_of(columns(n)), columns(n, torch.float64)
    lengths = codec.lengths(as_symbols(x))
    nats = -law.log_prob(torch.tensor(x)).numpy()
    bits = nats * BITS
    bits[:, 3] -= np.log2(np.spacing(np.abs(x[:, 3])))  # a float stands for the reals nearest to it
    tame = bits < np.where(np.arange(4) == 3, 75.0, 30.0)  # beyond, an escape is shorter than the law
    for j, most in enumerate((2e-4, 1e-4, 1e-4, 5e-4)):
        good = tame[:, j]
        assert good.mean() > 0.99
        assert abs(lengths[good, j].sum() / bits[good, j].sum() - 1.0) < most


@pytest.mark.parametrize("r", [0.05, 1.0, 30.0, 8000.0])
@pytest.mark.parametrize("mean", [0.02, 1.0, 40.0, 1e3, 1e6])
def test_negative_binomial_length(r: float, mean: float) -> None:
    n = 20_000 if mean < 30 else 3000
    x = RNG(0).negative_binomial(r, r / (r + mean), n)
    codec = NegativeBinomialCells(np.full(n, np.log(mean)), np.full(n, np.log(r)))
    law = st.nbinom.logpmf(x, r, r / (r + mean))
    assert abs(excess(codec, x, law)) < 1e-3  # measured: up to 0.02 %


def test_negative_binomial_length_with_a_law_for_every_cell() -> None:
    rng = RNG(0)
    log_mean, log_r = rng.normal(1.0, 3.0, 30_000).astype(np.float32), rng.normal(size=30_000).astype(np.float32)
    r, mean = np.exp(log_r.astype(float)), np.exp(log_mean.astype(float))
    x = rng.negative_binomial(r, r / (r + mean))
    codec = codec_of(NegativeBinomial(torch.tensor(log_mean), torch.tensor(log_r), 0))
    assert abs(excess(codec, x, st.nbinom.logpmf(x, r, r / (r + mean)))) < 3e-4
    returns(codec, x, 256)


@pytest.mark.parametrize(("trials", "p"), [(20, 0.3), (60, 0.5), (1000, 0.02), (10_000, 0.5), (1_000_000, 1e-3)])
def test_binomial_length(trials: int, p: float) -> None:
    x = RNG(0).binomial(trials, p, 3000)
    codec = BinomialCells(np.full(3000, trials), np.full(3000, p / (1 - p)))
    assert abs(excess(codec, x, st.binom.logpmf(x, trials, p))) < 1e-3
    returns(codec, x)


@pytest.mark.parametrize(("n", "cells", "total"), [(300, 7, 5.0), (30, 1001, 200.0), (4, 3, 1e6)])
def test_multinomial_length_and_round_trip(n: int, cells: int, total: float) -> None:
    rng = RNG(0)
    logits = 2.0 * normals(n, cells)
    counts = rng.negative_binomial(3.0, 3.0 / (3.0 + total), n)
    p = sp.softmax(logits.double().numpy(), 1)
    x = np.stack([rng.multinomial(c, q / q.sum()) for c, q in zip(counts, p)])
    law = Multinomial(logits, NegativeBinomial(torch.full((n,), float(np.log(total))), torch.tensor(np.log(3.0)), 0))
    codec = codec_of(law)
    reference = st.nbinom.logpmf(counts, 3.0, 3.0 / (3.0 + total))
    reference = reference + [st.multinomial.logpmf(a, a.sum(), q / q.sum()) for a, q in zip(x, p)]
    assert abs(excess(codec, x, reference)) < 1e-3
    returns(codec, x)


# -------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("lanes", [1, 7, 300])
def test_every_codec_returns_its_symbols(lanes: int) -> None:
    rng, n = RNG(0), 60 if lanes == 1 else 500
    logits = rng.normal(size=(n, 3)).astype(np.float32)
    returns(BernoulliCells(3 * logits), rng.integers(0, 2, (n, 3)), lanes)
    for levels in (1, 2, 50, 100, 5000):
        returns(
            CategoricalCells(3 * rng.normal(size=(n, levels)).astype(np.float32)), rng.integers(0, levels, n), lanes
        )
    for k, levels in ((1, 256), (3, 256), (2, 65536), (2, 10_000_000)):
        numbers = rng.normal(size=(3, n, k)).astype(np.float32)
        returns(LogisticCells(*numbers, levels), rng.integers(0, levels, n), lanes)  # most of them far in the tails
    returns(NormalCells(logits[:, 0], logits[:, 1]), rng.integers(-4096, 4097, n), lanes)
    returns(
        TabulatedCells(edges_of(rng.integers(0, 50, (3, 17))), rng.integers(0, 3, n)), rng.integers(0, 17, n), lanes
    )
    counts = np.concatenate([rng.integers(0, 100, n - 8), 1 << np.array([0, 5, 20, 33, 40, 47, 49, 50])])
    returns(NegativeBinomialCells(3 * logits[:, 0], logits[:, 1]), counts, lanes)
    x = as_symbols(grid_draws(n))
    x[:9, 0] = [-(1 << 61), 1 << 61, -(10**15), 10**15, 0, 40, 41, 39, -729]
    returns(codec_of(columns(n)), x, lanes)


def test_floats_come_back_to_the_bit() -> None:
    rng, n = RNG(0), 3000
    numbers = rng.normal(size=(3, n, 2)).astype(np.float32)
    x = 3.7 + 12.3 * rng.standard_cauchy(n)
    x[:12] = [0.0, -0.0, 5e-324, -5e-324, 1e308, -1e308, np.inf, -np.inf, np.nan, 3.7, 1e-5, -1e12]
    returns(DoubleCells(*numbers, 3.7, 12.3), ordered(x), 64)
    assert from_ordered(ordered(x)).tobytes() == x.tobytes()
    assert (np.diff(ordered(np.sort(x[9:]))) > 0).all()
    with np.errstate(over="ignore"):
        half = x.astype(np.float32).astype(np.float64)
    codec = DoubleCells(*numbers, 3.7, 12.3, spare_bits=29)
    returns(codec, ordered(half), 64)
    saved = DoubleCells(*numbers, 3.7, 12.3).lengths(ordered(half)) - codec.lengths(ordered(half))
    assert np.median(saved) == pytest.approx(29.0, abs=0.01)
    with pytest.raises(ValueError, match=r"symbols\[9\]: expected the rank of a float64 whose last 29 bits are 0"):
        codec.push(Stack(), ordered(np.where(np.arange(n) == 9, 3.7, half)))


def test_absent_cells_cost_nothing_and_come_back_as_zero() -> None:
    rng, n = RNG(0), 300
    x, present = as_symbols(grid_draws(n)), rng.random((n, 4)) < 0.7
    present[:, 1] = False
    codec = codec_of(columns(n), present)
    wild = np.where(present, x, -(1 << 62))
    stack = Stack(8)
    codec.push(stack, wild)
    assert codec.legal(wild).all()
    lengths = codec.lengths(wild)
    assert (lengths[~present] == 0).all() and (lengths[present] > 0).all()
    np.testing.assert_allclose(lengths[present], codec_of(columns(n)).lengths(x)[present])
    np.testing.assert_array_equal(codec.pop(stack), np.where(present, x, 0))
    stack.finish()
    for make in (
        lambda p: BernoulliCells(np.zeros((4, 2), np.float32), p),
        lambda p: CategoricalCells(np.zeros((4, 2, 3), np.float32), p),
        lambda p: NegativeBinomialCells(np.zeros((4, 2)), np.zeros(()), p),
        lambda p: NormalCells(np.zeros((4, 2)), np.zeros(2), present=p),
    ):
        mask = np.array([[True, False]] * 4)
        returns(make(mask), np.array([[1, 0]] * 4))
        returns(make(np.zeros((4, 2), bool)), np.zeros((4, 2), np.int64))
        with pytest.raises(ValueError, match="present: expected a bool mask of shape"):
            make(mask[:3])


def test_empty_batches() -> None:
    for codec in (
        BernoulliCells(np.zeros((0, 3), np.float32)),
        CategoricalCells(np.zeros((0, 5), np.float32)),
        LogisticCells(*np.zeros((3, 0, 2), np.float32), 256),
        NegativeBinomialCells(np.zeros(0), np.zeros(0)),
        MultinomialRows(np.zeros((0, 4)), np.zeros(0), np.zeros(0)),
        codec_of(columns(0)),
    ):
        returns(codec, np.zeros(codec.shape, np.int64))


def test_equal_rows_that_share_memory_and_rows_of_their_own_give_the_same_bits() -> None:
    logits = normals(1, 3, 5)
    one, own = Stack(4), Stack(4)
    x = RNG(0).integers(0, 5, (200, 3))
    shared = codec_of(Categorical(logits.expand(200, 3, 5)))
    assert isinstance(shared, TabulatedCells)
    shared.push(one, x)
    codec_of(Categorical(logits.repeat(200, 1, 1))).push(own, x)
    np.testing.assert_array_equal(one.to_words(), own.to_words())


def test_a_table_codes_its_columns_in_order() -> None:
    space = Table(
        columns=(
            Column("a", "integer"),
            Column("b", "categorical", levels=4),
            Column("c", "real"),
            Column("d", "binary"),
        )
    )
    torch.manual_seed(0)
    table = head("table", space, (3,))
    rng = RNG(0)
    x = np.stack([rng.integers(0, 90, 400), rng.integers(0, 4, 400), rng.normal(size=400), rng.integers(0, 2, 400)], 1)
    table.initialise([(torch.tensor(x), None)])
    with torch.no_grad():
        rows = table(torch.randn(400, 3))
    assert isinstance(rows, TableDistribution)
    codec = codec_of(rows)
    symbols = np.stack([x[:, 0], x[:, 1], ordered(x[:, 2]).astype(float), x[:, 3]], 1).astype(np.int64)
    symbols[:, 2] = ordered(x[:, 2])
    returns(codec, symbols)
    ideal = -rows.log_prob(torch.tensor(x)).numpy() * BITS
    ideal[:, 2] -= np.log2(np.spacing(np.abs(x[:, 2])))
    np.testing.assert_allclose(codec.lengths(symbols).sum(0), ideal.sum(0), rtol=2e-3)
    symbols[7, 1] = 4
    assert not codec.legal(symbols)[7, 1] and codec.legal(symbols).sum() == 1599
    with pytest.raises(ValueError, match=r"column 1: symbols\[7\]: expected a code from 0 to 3, got 4"):
        codec.push(Stack(), symbols)


# ----------------------------------------------------------------------------------- popping random bits is sampling


def law_cases() -> list:  # type: ignore[type-arg]
    n = 60_000
    logits = np.float32([0.1, 1.0, -2.0, 0.5])
    k, m, s = np.float32([0.5, 0.0]), np.float32([-0.6, 0.5]), np.float32([-1.0, -2.0])
    single, levels = DiscretizedLogisticMixture(*(torch.tensor(a)[None] for a in (k, m, s)), 9, 0), torch.arange(9)
    grid = GridLogisticMixture(
        torch.tensor([[[0.5, 0.2, 0.4]]]), torch.tensor([[[-0.5, 1.0]]]), torch.tensor([[[-1.0, -0.3]]]),
        torch.tensor([4.0]), torch.tensor([2.0]), torch.tensor([1.0]), torch.tensor([[3.0]]),
    )  # fmt: skip
    values = torch.arange(-4, 16).double()
    r = np.exp(0.3)
    return [
        (BernoulliCells(np.full(n, 0.8, np.float32)), [0, 1], [1 - sp.expit(0.8), sp.expit(0.8)]),
        (CategoricalCells(np.tile(logits, (n, 1))), range(4), sp.softmax(logits.astype(float))),
        (LogisticCells(*(np.tile(a, (n, 1)) for a in (k, m, s)), 9), range(9), single.log_prob(levels).exp().numpy()),
        (
            codec_of(GridLogisticMixture(
                grid.logits.expand(n, 1, 3), grid.means.expand(n, 1, 2), grid.given_log_scales.expand(n, 1, 2),
                grid.location, grid.scale, grid.resolution, grid.atoms,
            )),
            values.long().tolist(), grid.log_prob(values[:, None]).exp()[:, 0].numpy(),
        ),
        (
            NormalCells(np.full(n, 0.3, np.float32), np.full(n, -0.5, np.float32), 0.25, 4.0), range(-12, 13),
            np.diff(st.norm.cdf((np.arange(-12, 14) - 0.5) * 0.25, 0.3, np.exp(-0.5))),
        ),
        (
            NegativeBinomialCells(np.full(n // 4, 2.5), np.full(n // 4, 0.3)), range(60),
            st.nbinom.pmf(range(60), r, r / (r + np.exp(2.5))),
        ),
        (
            BinomialCells(np.full(n // 4, 90), np.full(n // 4, 0.8)), range(91),
            st.binom.pmf(range(91), 90, 0.8 / 1.8),
        ),
        (
            TabulatedCells(edges_of([[5, 1, 4]]), 0, (n,)), range(3), [0.5, 0.1, 0.4],
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("case", range(8))
def test_popping_random_bits_draws_from_the_law_and_pushing_gives_the_bits_back(case: int) -> None:
    """χ² over 60,000 draws (15,000 counts): a law off by ± 4 % (8 %), even and odd symbols in turn, is refused."""
    codec, support, law = law_cases()[case]
    drawn = codec.pop(random_stack(words=200_000)).reshape(-1)
    observed = np.array([(drawn == v).sum() for v in support], float)
    expected = np.asarray(law) * len(drawn)
    keep = expected > 10

    def p_value(expected: np.ndarray) -> float:
        o, e = np.append(observed[keep], len(drawn) - observed[keep].sum()), expected[keep]
        e = np.append(e, max(len(drawn) - e.sum(), 1e-3))
        used = e > 5
        statistic = ((o - e)[used] ** 2 / e[used]).sum()
        return st.chi2.sf(statistic, used.sum() - 1)

    assert p_value(expected) > 1e-3
    off = 0.04 * (60_000 / len(drawn)) ** 0.5
    assert p_value(expected * (1.0 + off * (-1.0) ** np.arange(len(expected)))) < 1e-3
    undoes_its_pop(codec)


def test_numbers_of_several_digits_and_floats_are_drawn_from_their_law() -> None:
    """Kolmogorov and Smirnov over 20,000 draws: a shift of the law by 0.1 of its scale is refused (checked)."""
    n = 20_000
    one = np.ones((n, 1), np.float32)
    fine = LogisticCells(0 * one, 0.2 * one, -2 * one, 1_000_000).pop(random_stack())
    u = (2.0 * fine + RNG(0).random(n)) / 999_999 - 1.0
    floats = from_ordered(DoubleCells(0 * one, 0.2 * one, -2 * one, 5.0, 3.0).pop(random_stack()))
    for x in (u, (floats - 5.0) / 3.0):
        assert st.kstest(x, st.logistic(0.2, np.exp(-2.0)).cdf).pvalue > 1e-3
        assert st.kstest(x, st.logistic(0.2 + 0.1 * np.exp(-2.0), np.exp(-2.0)).cdf).pvalue < 1e-3
    undoes_its_pop(LogisticCells(0 * one, 0.2 * one, -2 * one, 1_000_000))
    undoes_its_pop(DoubleCells(0 * one, 0.2 * one, -2 * one, 5.0, 3.0))


def test_multinomial_rows_undo_their_pop() -> None:
    codec = MultinomialRows(normals(200, 30).numpy(), np.full(200, 4.0), np.zeros(200))
    undoes_its_pop(codec)
    totals = codec.pop(random_stack()).sum(1)
    assert totals.mean() == pytest.approx(np.exp(4.0), abs=4 * np.exp(4.0) / 200**0.5)


def test_hostile_bits_under_hostile_parameters_end_in_a_symbol_or_a_named_error() -> None:
    rng = RNG(0)
    n = 64
    pick = [rng.choice(EXTREME, (n, 2)) for _ in range(3)]
    for words in (np.full(5000, 0xFFFFFFFF), np.zeros(5000), rng.integers(0, 1 << 32, 5000)):
        for codec in (
            BernoulliCells(pick[0]),
            CategoricalCells(pick[0]),
            LogisticCells(*pick, 256),
            LogisticCells(*pick, 100_000_000),
            NormalCells(pick[0], pick[1]),
            NegativeBinomialCells(pick[0], pick[1]),
            MultinomialRows(pick[0], pick[1][:, 0], pick[2][:, 0]),
            GridCells(pick[0], pick[1], pick[2], 3.0, 1e9, 1e-3, np.zeros(0)),
            DoubleCells(*pick, 1e200, 1e3),
        ):
            stack = Stack(16, words.astype(np.uint32), supply=None)
            try:
                symbols = codec.pop(stack)
                assert symbols.shape == codec.shape
                again = Stack(16)
                if codec.legal(symbols).all():
                    codec.push(again, symbols)
                    np.testing.assert_array_equal(codec.pop(again), symbols)
            except Damaged:
                pass


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_parameters_that_are_no_numbers_are_refused_with_their_index(bad: float) -> None:
    def at(shape: tuple[int, ...], index: tuple[int, ...]) -> torch.Tensor:
        values = torch.zeros(shape)
        values[index] = bad
        return values

    fine = torch.zeros(4, 2, 3)
    cases = [
        (Bernoulli(at((4, 2), (3, 1))), r"logits\[3, 1\]"),
        (Categorical(at((4, 2, 3), (1, 0, 2))), r"logits\[1, 0, 2\]"),
        (DiscretizedLogisticMixture(fine, at((4, 2, 3), (2, 1, 0)), fine, 256), r"means\[2, 1, 0\]"),
        (DiscretizedLogisticMixture(at((4, 2, 3), (2, 1, 0)), fine, fine, 256), r"logits\[2, 1, 0\]"),
        (Normal(at((4,), (2,)), torch.zeros(())), r"mean\[2\]"),
        (Normal(torch.zeros(4), at((4,), (2,))), r"log_scale\[2\]"),
        (NegativeBinomial(at((4,), (0,)), torch.zeros(4)), r"log_mean\[0\]"),
        (NegativeBinomial(torch.zeros(4), at((4,), (0,))), r"log_dispersion\[0\]"),
        (Multinomial(at((4, 3), (1, 1)), NegativeBinomial(torch.zeros(4), torch.zeros(4), 0)), r"logits\[1, 1\]"),
    ]
    for distribution, where in cases:
        with pytest.raises(ValueError, match=where + ": expected a finite number.*got"):
            codec_of(distribution)
    broken = columns(5)
    broken.means[3, 1, 0] = bad
    with pytest.raises(ValueError, match=r"column 1: means\[3, 0\]: expected a finite number"):
        codec_of(broken)


def test_a_row_of_logits_needs_one_that_is_finite() -> None:
    logits = torch.full((3, 4), -torch.inf)
    logits[:2, 1] = 0.0
    with pytest.raises(ValueError, match=r"logits\[2, 0\]: expected a finite number somewhere"):
        codec_of(Categorical(logits, 0))
    with pytest.raises(TypeError, match="StudentT has no codec"):
        codec_of(StudentT(torch.zeros(1), torch.zeros(1), torch.zeros(1)))


def test_symbols_outside_the_alphabet_are_refused_and_not_legal() -> None:
    codec = NegativeBinomialCells(np.zeros((2, 2)), np.zeros(2))
    assert codec.legal([[0, -1], [1 << 50, (1 << 50) + 1]]).tolist() == [[True, False], [True, False]]
    with pytest.raises(ValueError, match=r"symbols\[0, 1\]: expected a count from 0 to \d+, got -1"):
        codec.push(Stack(), [[0, -1], [0, 0]])
    with pytest.raises(ValueError, match=r"symbols: expected shape \(2, 2\), got \(2,\)"):
        codec.push(Stack(), [0, 1])
    with pytest.raises(ValueError, match=r"symbols: expected integers, got float64"):
        codec.push(Stack(), [[0.5, 1], [0, 0]])
    with pytest.raises(ValueError, match=r"symbols\[1, 0\]: expected 0 or 1, got 2"):
        BernoulliCells(np.zeros((2, 1), np.float32)).push(Stack(), [[0], [2]])
    with pytest.raises(ValueError, match=r"symbols\[0\]: expected a whole number from 0 to 255, got 256"):
        LogisticCells(*np.zeros((3, 1, 1), np.float32), 256).push(Stack(), [256])
    with pytest.raises(ValueError, match="ascend strictly"):
        TabulatedCells([[0, 2, 2, 4]], 0, (1,))


# ------------------------------------------------------------------------------------------ laws that travel with data


def test_bytes_under_their_own_counts() -> None:
    rng = RNG(0)
    text = rng.choice(np.arange(97, 123), 20_000, p=rng.dirichlet(np.full(26, 0.7)))
    codec = DescribedCells((20_000,), 256)
    returns(codec, text)
    counts = np.bincount(text)
    entropy = -(counts[counts > 0] * np.log2(counts[counts > 0] / 20_000)).sum()
    assert entropy < codec.bits(text) < entropy + 26 * 16 + 230 * 4
    for shape, levels in (((0,), 256), ((1,), 1), ((5,), 1), ((3, 2), 2)):
        returns(DescribedCells(shape, levels), np.zeros(shape, np.int64))
    with pytest.raises(ValueError, match="symbols: expected codes from 0 to 3, got 9"):
        DescribedCells((2,), 4).push(Stack(), [0, 9])


def test_the_pattern_of_holes_by_rows_or_by_columns() -> None:
    rng = RNG(0)
    few = np.array([[1, 1, 1, 1, 1], [0, 1, 1, 0, 1], [1, 0, 0, 1, 1]], bool)[rng.choice(3, 5000, p=[0.9, 0.07, 0.03])]
    many = rng.random((5000, 40)) < rng.random(40)
    entropy = 5000 * st.entropy([0.9, 0.07, 0.03], base=2)
    assert PatternCells(few.shape).bits(few) == pytest.approx(entropy, rel=0.05)
    shares_ = many.mean(0)
    entropy = -5000 * (shares_ * np.log2(shares_) + (1 - shares_) * np.log2(1 - shares_)).sum()
    assert PatternCells(many.shape).bits(many) < entropy + 40 * 14
    for mask in (few, many, np.ones((5000, 9), bool), np.zeros((0, 4), bool), np.zeros((3, 1), bool)):
        codec, stack = PatternCells(mask.shape), Stack(256)
        codec.push(stack, mask)
        assert stack.bits == pytest.approx(codec.bits(mask), rel=1e-9)
        np.testing.assert_array_equal(codec.pop(stack), mask)
        stack.finish()
    assert PatternCells((5000, 9)).bits(np.ones((5000, 9), bool)) < 40
    stack = random_stack(words=20_000)
    assert PatternCells((50, 3)).pop(stack).shape == (50, 3)


# ------------------------------------------------------------------------------------------------------ stable bytes


def test_frequencies_never_change() -> None:
    """Digests of starts and lengths for fixed parameters: a change here breaks files that exist."""
    x = np.arange(400)
    numbers = ((np.arange(3600) * 7919 % 5003 - 2501) / np.float32(1024.0)).astype(np.float32).reshape(3, 400, 3)
    cases: dict[str, tuple[Cells, np.ndarray]] = {
        "bernoulli": (BernoulliCells(numbers[0, :, 0]), x % 2),
        "categorical": (CategoricalCells(numbers[0]), x % 3),
        "logistic": (LogisticCells(*numbers, 256), x % 256),
        "two digits": (LogisticCells(*numbers, 100_000), x * 250),
        "normal": (NormalCells(numbers[0, :, 0], numbers[1, :, 0]), x - 200),
        "grid": (GridCells(*numbers[:, :, :3], 5.0, 30.0, 0.5, np.zeros(0)), x - 100),  # type: ignore[misc]
        "double": (DoubleCells(*numbers, 5.0, 30.0), ordered(x * 0.37)),
        "counts": (NegativeBinomialCells(2 * numbers[0, :, 0], numbers[1, :, 0]), x),
        "binomial": (BinomialCells(x + 1, (x + 1.0) / 500.0), x // 2),
    }
    digests = {}
    for name, (codec, symbols) in cases.items():
        stack = Stack(8)
        codec.push(stack, symbols)
        digests[name] = hashlib.sha256(stack.to_words().astype("<u4").tobytes()).hexdigest()[:16]
    assert digests == GOLDEN


GOLDEN = {
    "bernoulli": "14a2b36938640377",
    "categorical": "91005da3fd8d3f21",
    "logistic": "6bb73a5bee391113",
    "two digits": "007f0ac9f5a7cdcc",
    "normal": "349afd24d1379453",
    "grid": "4d20832a5e045641",
    "double": "346a4cae6bf3f86b",
    "counts": "6f4ebab3adbdf487",
    "binomial": "08cc3c0906c5f2b4",
}
