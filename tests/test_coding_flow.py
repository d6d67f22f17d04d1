"""Flows as codecs: bijections of integers and message whose cost is the Jacobian."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import linalg, stats

from coding_toys import Table, frequencies
from likely.coding import (
    Coupling,
    Damaged,
    Dequantise,
    Flow,
    Linear,
    Mapped,
    Rearrange,
    Scale,
    Shift,
    Stack,
    Uniform,
    log_scales,
)
from likely.coding.flow import LIMIT, _factors

GRID = 2**16


def there_and_back(layer, y, lanes=16):
    """Forward from a message of random bits, and inverse; returns the image and its cost in bits."""
    rng = np.random.default_rng(len(y))
    stack = Stack(lanes, rng.integers(0, 1 << 32, 40 + 4 * y.size, dtype=np.uint32), supply=None)
    before = stack.to_words()
    z = layer.forward(stack, y)
    cost = stack.bits
    assert np.array_equal(layer.inverse(stack, z), y)
    assert np.array_equal(stack.to_words(), before)
    # the other way round, from any message and values to the same
    stack = Stack(lanes, rng.integers(0, 1 << 32, 40 + 4 * y.size, dtype=np.uint32), supply=None)
    before = stack.to_words()
    x = layer.inverse(stack, y)
    assert np.array_equal(layer.forward(stack, x), y)
    assert np.array_equal(stack.to_words(), before)
    return z, cost


def test_scales_are_bijective_and_cost_their_jacobian():
    rng = np.random.default_rng(0)
    n = 20_000
    for numbers in (1, 2, 3, 1 << 14, (1 << 14) + 1, (1 << 14) - 1, 10_007, (1 << 24) - 1):
        y = rng.integers(-(1 << 20), 1 << 20, n) if numbers > 1 << 20 else rng.integers(-LIMIT // 2, LIMIT // 2, n)
        y[:4] = [0, -1, 1, -(1 << 19)]
        if numbers < 1 << 12:  # the way back makes values larger
            y //= 1 << 14
        z, cost = there_and_back(Scale(numbers), y)
        assert cost == pytest.approx(-n * math.log2(numbers / 2**14), rel=1e-3, abs=1e-6)
        assert (np.abs(z - y * (numbers / 2**14)) <= numbers / 2**14 + 1).all()
    numbers = np.exp(rng.uniform(np.log(2**10), np.log(2**24), n)).astype(np.int64)
    y = rng.integers(-(1 << 20), 1 << 20, n)
    _, cost = there_and_back(Scale(numbers), y)
    assert cost == pytest.approx(-np.log2(numbers / 2**14).sum(), rel=1e-3)


def test_a_scale_keeps_a_density():
    """Where data is uniform on the grid its image is, too: the cost of the value goes down by as much as it pays."""
    y = np.random.default_rng(1).integers(0, 1 << 10, 50_000)
    stack = Stack(16)
    layer = Scale(5 << 12)  # 1.25
    z = layer.forward(stack, y)
    assert z.min() >= 0
    assert z.max() < 1280
    assert stats.chisquare(np.bincount(z // 40, minlength=32)).pvalue > 1e-3


@pytest.mark.parametrize("c", [1, 2, 5, 12])
def test_linear_maps_are_bijective_and_cost_their_determinant(c):
    rng = np.random.default_rng(c)
    permutation, rotation = -np.eye(c)[rng.permutation(c)], linalg.qr(rng.standard_normal((c, c)))[0]
    for weight in (rng.standard_normal((c, c)), np.eye(c), permutation, rotation):
        y = rng.integers(-(1 << 18), 1 << 18, (3, 500, c))
        z, cost = there_and_back(Linear(weight), y)
        log2_det = np.linalg.slogdet(weight)[1] / math.log(2)
        # pivots are multiples of 2^-16, which moves their logarithm by up to 2^-17 / pivot
        pivots = np.abs(_factors(weight)[2])
        assert cost == pytest.approx(-1500 * log2_det, rel=1e-3, abs=1500 * (2**-16 / pivots).sum())
        exact = y @ weight.T
        assert np.abs(z - exact).max() < 2**-16 * 2**18 * 4 * c * max(1, np.abs(np.linalg.inv(weight)).sum())


def test_factors_are_those_of_lapack():
    weight = np.random.default_rng(3).standard_normal((9, 9))
    order, lower, diagonal, upper = _factors(weight)
    p, l, u = linalg.lu(weight)  # noqa: E741
    assert np.array_equal(np.argmax(p, 0), order)
    assert np.allclose(np.eye(9) + lower, l)
    assert np.allclose(diagonal[:, None] * (np.eye(9) + upper), u)


def test_log_scales_are_rounded_exponentials():
    index = np.arange(-3072, 3073)
    assert np.array_equal(log_scales(index), np.rint(2.0**14 * np.exp(index / 512)).astype(np.int64))
    assert log_scales(10**9) == log_scales(3072)


def network(a):
    """Integers of a: any function will do, as long as it is the same everywhere."""
    mixed = (a[..., ::-1] * 3 + a // 5) % 4001 - 2000
    return mixed * 11, log_scales(mixed)


def layers(c, rng):
    squeeze = Rearrange(lambda y: y.reshape(*y.shape[:-2], -1), lambda y: y.reshape(*y.shape[:-1], 2, c))
    half = np.arange(0, 2 * c, 2)
    return [
        Dequantise(10, levels=256),
        Shift(-(128 << 10)),
        squeeze,
        Linear(rng.standard_normal((2 * c, 2 * c))),
        Coupling(half, network),
        Rearrange(lambda y: y[..., ::-1], lambda y: y[..., ::-1]),
        Coupling(half, network),
        Scale(log_scales(rng.integers(-300, 300, 2 * c))),
    ]


def test_a_whole_flow_is_a_bijection_of_data_and_message():
    rng = np.random.default_rng(4)
    parts = layers(3, rng)
    x = rng.integers(0, 256, (70, 2, 3))
    stack = Stack(8)
    y = x
    for layer in parts:
        y = layer.forward(stack, y)
    base = 1 << (2 + int(np.abs(y).max()).bit_length())
    y = x
    stack = Stack(8)
    flow = Flow(parts, Mapped(Uniform((70, 6), base), lambda v: v + base // 2, lambda v: v - base // 2))
    flow.push(stack, x)
    copy = Stack.from_words(stack.to_words(), 8)
    assert np.array_equal(flow.pop(copy), x)
    copy.finish()


class Normal:
    """N(0, 1) on the grid of 2^-16 between −4 and 4, through 2^13 cells that are cut evenly."""

    def __init__(self, shape):
        edges = np.linspace(-4, 4, 2**13 + 1)
        cells = np.diff(stats.norm.cdf(edges))
        self.cell = Table(frequencies(cells / cells.sum(), 28), 28, np.zeros(shape, int))
        self.fine = Uniform(shape, 8 * GRID // 2**13)

    def push(self, stack, symbols):
        y = symbols + 4 * GRID
        self.fine.push(stack, y % 64)
        stack_cells = y // 64
        edges = self.cell.edges[0]
        stack.push(edges[stack_cells.ravel()], self.cell.freq[0, stack_cells.ravel()], 28)

    def pop(self, stack):
        edges = self.cell.edges[0]

        def find(part, residues):
            x = np.searchsorted(edges, residues.astype(np.int64), side="right") - 1
            return x, edges[x], np.diff(edges)[x]

        cells = stack.pop(self.cell.rows.size, 28, find).reshape(self.cell.rows.shape)
        return cells * 64 + self.fine.pop(stack) - 4 * GRID


def test_the_code_is_as_long_as_the_density_says():
    """z = (x + shift) · s with z ~ N(0, 1): −log2 p(x) = −log2 N(z) − log2 s, from scipy; and drawing inverts it."""
    rng = np.random.default_rng(5)
    n, index = 20_000, 307
    s = log_scales(index) / 2**14
    x = np.rint(np.clip(rng.standard_normal(n), -3.5, 3.5) / s * 2**5).astype(np.int64)  # in units of 2^-5
    flow = Flow([Dequantise(11), Shift(-GRID // 64), Scale(log_scales(index))], Normal((n,)))
    stack = Stack(64)
    flow.push(stack, x)
    # mass of [x, x + 1) / 32, shifted by 1/64: the density at random points of it, hence its mean logarithm
    u = (x[:, None] + (np.arange(64) + 0.5) / 64) / 32 - 1 / 64
    expected = -(stats.norm.logpdf(u * s) / math.log(2) + math.log2(s / 32)).mean(1).sum()
    assert stack.bits == pytest.approx(expected, rel=1e-3)
    copy = Stack.from_words(stack.to_words(), 64)
    assert np.array_equal(flow.pop(copy), x)
    copy.finish()
    drawn = flow.pop(Stack(64, rng.integers(0, 1 << 32, 60_000, dtype=np.uint32), supply=None))
    # x is the floor of a N(shift, 1/s) variable; the grid has 32 steps to the unit
    law = lambda v: stats.norm.cdf(((v / 32) - 1 / 64) * s)  # noqa: E731
    cuts = np.arange(-60, 61, 4)
    mass = np.diff([0, *law(cuts), 1])
    counts = np.bincount(np.searchsorted(cuts, drawn, side="right"), minlength=len(mass))
    assert stats.chisquare(counts, n * mass).pvalue > 1e-3


def test_dequantisation_borrows_and_returns_its_bits():
    x = np.random.default_rng(6).integers(-5, 300, (40, 7))
    for bits in (0, 1, 10, 16):
        z, cost = there_and_back(Dequantise(bits), x)
        assert cost == pytest.approx(-bits * x.size)
        assert np.array_equal(z >> bits, x)
    noise = lambda x: Table(frequencies([0.7, 0.1, 0.1, 0.1], 12), 12, np.zeros(x.shape, int))  # noqa: E731
    z, cost = there_and_back(Dequantise(2, noise), x)
    assert cost == pytest.approx(-noise(x).bits(z - 4 * x).sum())


def test_what_leaves_the_grid_is_refused_or_damaged():
    stack = Stack(4)
    far = np.array([0, LIMIT])
    for layer in (Scale(1 << 14), Linear(np.eye(2)), Coupling([0], lambda a: (a, a + 1)), Dequantise(0)):
        with pytest.raises(ValueError, match="range of the flow's grid") as caught:
            layer.forward(stack, far)
        assert not isinstance(caught.value, Damaged)
        with pytest.raises(Damaged):
            layer.inverse(stack, far)
    with pytest.raises(ValueError, match="range of the flow's grid"):
        Scale((1 << 24) - 1).forward(stack, np.array([LIMIT // 2]))
    with pytest.raises(ValueError, match="range of the flow's grid"):
        Linear([[1.0, 0.5], [0.5, 1.0]]).forward(stack, np.array([LIMIT - 1, LIMIT - 1]))
    with pytest.raises(ValueError, match="expected 0 … 255, got -1 … 3"):
        Dequantise(10, levels=256).forward(stack, np.array([-1, 3]))
    with pytest.raises(Damaged, match="levels"):
        Dequantise(10, levels=256).inverse(stack, np.array([256 << 10]))


def test_impossible_parameters_are_refused():
    for numbers in (0, -1, 1 << 24):
        with pytest.raises(ValueError, match="numbers"):
            Scale(numbers)
    with pytest.raises(ValueError, match="t: expected integers"):
        Shift(0.5)
    with pytest.raises(ValueError, match="bits"):
        Dequantise(17)
    with pytest.raises(ValueError, match="bits"):
        Scale(1, bits=0)
    for weight, words in [
        (np.zeros((2, 2)), "invertible"),
        (np.ones((2, 3)), "square"),
        (np.diag([1.0, math.nan]), "finite"),
        (np.diag([1.0, 1e-9]), "pivots"),
        (np.array([[1e-3, 1e3], [0, 1.0]]), "sum to less"),
    ]:
        with pytest.raises(ValueError, match=words):
            Linear(weight)


def test_damaged_messages_end_in_the_named_error():
    rng = np.random.default_rng(7)
    parts = layers(3, rng)
    x = rng.integers(0, 256, (30, 2, 3))
    base = 1 << 26
    flow = Flow(parts, Mapped(Uniform((30, 6), base), lambda v: v + base // 2, lambda v: v - base // 2))
    stack = Stack(4)
    flow.push(stack, x)
    words = stack.to_words()
    for bit in rng.choice(32 * len(words), 150, replace=False):
        damaged = words.copy()
        damaged[bit // 32] ^= np.uint32(1 << (bit % 32))
        with pytest.raises(Damaged):
            copy = Stack.from_words(damaged, 4)
            flow.pop(copy)
            copy.finish()
