"""The entropy coder: reversible to the bit, as short as its frequencies allow, the same bytes from a second program."""

from __future__ import annotations

import hashlib
import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from scipy import stats

from coding_toys import Table, frequencies, random_edges, reference_words
from likely.coding import Chain, Columns, Damaged, Mapped, Product, Stack, TorchStack, Uniform, initial_words

SIZES = [1, 2, 3, 5, 255, 256, 257, 2**14, 2**16 - 1, 2**20 + 7]
SIZES += [2**31 - 1, 2**31, 2**31 + 1, 3 * 2**30, 2**32 - 1, 2**32]


def finder(edges):
    def find(part, residues):
        x = np.searchsorted(edges, residues.astype(np.int64), side="right") - 1
        return x, edges[x], np.diff(edges)[x]

    return find


def torch_finder(edges):
    cuts = torch.from_numpy(edges)

    def find(part, residues):
        x = torch.searchsorted(cuts, residues, side="right") - 1
        return x, cuts[x], cuts.diff()[x]

    return find


def random_words(rng, n):
    return rng.integers(0, 1 << 32, n, dtype=np.uint32)


# ------------------------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("precision", range(1, 33))
def test_tables_round_trip_at_every_precision_and_length(precision):
    rng = np.random.default_rng(precision)
    for lanes in (1, 2, 7, 64):
        for n in (0, 1, lanes - 1, lanes, lanes + 1, 5 * lanes + 3):
            for cells in (1, 2, 3, 40):  # 1: one symbol with the full range
                edges = random_edges(rng, precision, cells)
                x = rng.integers(0, len(edges) - 1, n)
                stack = Stack(lanes)
                start = stack.to_words()
                stack.push(edges[x], np.diff(edges)[x], precision)
                assert stack.bits == pytest.approx((precision - np.log2(np.diff(edges)[x])).sum(), abs=1e-9)
                copy = Stack.from_words(stack.to_words(), lanes)
                assert np.array_equal(copy.pop(n, precision, finder(edges)), x)
                assert np.array_equal(copy.to_words(), start)
                assert copy.bits == pytest.approx(-stack.bits, abs=1e-9)
                copy.finish()


def test_blocks_longer_than_the_cache_round_trip():
    rng = np.random.default_rng(0)
    edges = random_edges(rng, 12, 30)
    x = rng.integers(0, 30, 50_001)
    for lanes in (3, 8191, 8192, 8193, 60_000):
        stack = Stack(lanes)
        stack.push(edges[x], np.diff(edges)[x], 12)
        stack.push_uniform(x, 31)
        stack = Stack.from_words(stack.to_words(), lanes)
        assert np.array_equal(stack.pop_uniform(31, len(x)), x)
        assert np.array_equal(stack.pop(len(x), 12, finder(edges)), x)
        stack.finish()


@pytest.mark.parametrize("lanes", [1, 5, 64])
def test_whole_numbers_round_trip_for_every_kind_of_size(lanes):
    rng = np.random.default_rng(lanes)
    powers = [1 << k for k in range(33)]
    for size in SIZES + powers:
        values = np.array([0, size - 1, size // 2, *rng.integers(0, size, 61)])
        stack = Stack(lanes)
        stack.push_uniform(values, size)
        assert stack.bits == pytest.approx(len(values) * math.log2(size), abs=1e-9)
        stack = Stack.from_words(stack.to_words(), lanes)
        assert np.array_equal(stack.pop_uniform(size, len(values)), values)
        stack.finish()


def test_whole_numbers_round_trip_for_a_million_sizes():
    rng = np.random.default_rng(1)
    sizes = (2.0 ** rng.uniform(0, 32, 10**6)).astype(np.int64)
    sizes[: len(SIZES)] = SIZES
    values = rng.integers(0, sizes)
    stack = Stack(1000)
    stack.push_uniform(values, sizes)
    stack = Stack.from_words(stack.to_words(), 1000)
    assert np.array_equal(stack.pop_uniform(sizes), values)
    stack.finish()


def test_pop_then_push_restores_any_message():
    rng = np.random.default_rng(2)
    for _ in range(200):
        lanes, n, precision = int(rng.integers(1, 30)), int(rng.integers(0, 200)), int(rng.integers(1, 33))
        edges = random_edges(rng, precision, int(rng.integers(1, 20)))
        sizes = (2.0 ** rng.uniform(0, 32, n)).astype(np.int64)
        stack = Stack(lanes, random_words(rng, 2000), supply=None)
        before = stack.to_words()
        x = stack.pop(n, precision, finder(edges))
        u = stack.pop_uniform(sizes)
        assert ((u >= 0) & (u < sizes)).all()
        stack.push_uniform(u, sizes)
        stack.push(edges[x], np.diff(edges)[x], precision)
        assert np.array_equal(stack.to_words(), before)
        assert stack.bits == pytest.approx(0, abs=1e-9)


# --------------------------------------------------------------------------------------------------- the byte stream


def test_words_are_those_of_a_scalar_coder_in_pythons_integers():
    rng = np.random.default_rng(3)
    for _ in range(60):
        lanes = int(rng.integers(1, 9))
        pushes, stack = [], Stack(lanes)
        for _ in range(int(rng.integers(0, 6))):
            n, precision = int(rng.integers(0, 40)), int(rng.integers(1, 33))
            if rng.random() < 0.5:
                edges = random_edges(rng, precision, int(rng.integers(1, 20)))
                x = rng.integers(0, len(edges) - 1, n)
                stack.push(edges[x], np.diff(edges)[x], precision)
                pushes.append(("table", edges[x].tolist(), np.diff(edges)[x].tolist(), precision))
            else:
                sizes = (2.0 ** rng.uniform(0, 32, n)).astype(np.int64)
                values = rng.integers(0, sizes)
                stack.push_uniform(values, sizes)
                pushes.append(("uniform", values.tolist(), sizes.tolist(), 0))
        assert stack.to_words().tolist() == reference_words(lanes, pushes)


def test_initial_words_are_splitmix64():
    # upper halves of the first outputs of splitmix64 with seed 0, from its reference program
    assert [f"{w:08x}" for w in initial_words(0, 4)] == ["e220a839", "6e789e6a", "06c45d18", "f88bb8a8"]
    assert np.array_equal(initial_words(0, 100)[37:], initial_words(37, 100))


def test_golden_stream():
    stack = Stack(lanes=3)
    stack.push(np.arange(100) % 7 * 9, np.full(100, 9), 6)
    stack.push_uniform(np.arange(50), 1000 + np.arange(50))
    stack.resize(5)
    stack.push(np.arange(100) * 3, np.full(100, 3), 28)
    digest = hashlib.sha256(stack.to_words().astype("<u4").tobytes()).hexdigest()
    assert digest == "07499c5768b3c5a1b1259e1fa4e817da67dc9d3631a2b60586e14fc4637ce3a7"


@pytest.mark.parametrize("head", [1 << 32, (1 << 33) - 1, 1 << 33, (1 << 64) - 1, 0x123456789ABCDEF0])
def test_heads_of_every_length_are_stored(head):
    heads = np.array([head, 1 << 32, (1 << 64) - 1, 5 << 40], np.uint64)
    words = np.array([7, 8], np.uint32)
    copy = Stack.from_words(Stack.from_state(heads, words).to_words(), 4)
    assert np.array_equal(copy.state()[0], heads)
    assert np.array_equal(copy.state()[1], words)


# -------------------------------------------------------------------------------------------------------- code length


@pytest.mark.parametrize("precision", [1, 4, 8, 16, 24, 28])
def test_length_is_within_a_hundredth_of_a_percent_of_ideal(precision):
    rng = np.random.default_rng(precision)
    edges = random_edges(rng, precision, 200)
    x = np.searchsorted(edges, rng.integers(0, 1 << precision, 200_000), side="right") - 1
    stack = Stack(16)
    start = stack.size_bits
    stack.push(edges[x], np.diff(edges)[x], precision)
    assert stack.size_bits - start == pytest.approx(stack.bits, rel=1e-4)
    stored = 32 * len(stack.to_words())
    assert 0 <= stored - stack.size_bits <= 5 * 16 + 2 * 32  # lengths of the heads, and filling


@pytest.mark.parametrize("size", [s for s in SIZES if s > 1])
def test_uniform_length_is_ideal(size):
    rng = np.random.default_rng(0)
    stack = Stack(16)
    start = stack.size_bits
    stack.push_uniform(rng.integers(0, size, 100_000), size)
    # beyond 2^31 a head keeps too few digits to be spread evenly: at most 0.005 bits a number
    assert stack.size_bits - start == pytest.approx(stack.bits, rel=1e-4 if size != 3 * 2**30 else 2e-4)


def test_constriction_needs_as_many_bits():
    constriction = pytest.importorskip("constriction")
    rng = np.random.default_rng(5)
    p = rng.dirichlet(np.full(40, 0.4))
    x = rng.choice(40, 100_000, p=p).astype(np.int32)
    other = constriction.stream.stack.AnsCoder()
    other.encode_reverse(x, constriction.stream.model.Categorical(p, perfect=True))
    freq = frequencies(p, 24)
    stack = Stack(8)
    Table(freq, 24, np.zeros(len(x), int)).push(stack, x)
    assert 32 * len(stack.to_words()) == pytest.approx(other.num_bits(), rel=1e-3)
    assert stack.bits == pytest.approx(other.num_valid_bits(), rel=1e-4)


def test_opened_lanes_cost_half_a_bit_and_return_their_words():
    rng = np.random.default_rng(6)
    stack = Stack(2, random_words(rng, 5000), supply=None)
    before, words = stack.size_bits, stack.to_words()
    stack.resize(2002)
    # E log2(1 + u) = 2 − 1/ln 2 bits for a uniform word; its standard deviation is 0.28
    assert (stack.size_bits - before) / 2000 == pytest.approx(2 - 1 / math.log(2), abs=4 * 0.29 / 2000**0.5)
    x = rng.integers(0, 100, 5000)
    stack.push_uniform(x, 100)
    stack.resize(3000)
    stack.push_uniform(x, 100)
    stack = Stack.from_words(stack.to_words(), 3000)
    assert np.array_equal(stack.pop_uniform(100, 5000), x)
    stack.resize(2002)
    assert np.array_equal(stack.pop_uniform(100, 5000), x)
    stack.resize(2)
    assert np.array_equal(stack.to_words(), words)


# ----------------------------------------------------------------------------------------------------------- sampling


def test_popping_random_bits_is_sampling():
    rng = np.random.default_rng(7)
    n, cells = 200_000, 12
    p = np.array([2**-k for k in range(1, cells)] + [2.0 ** (1 - cells)])
    freq = frequencies(p, 14)
    expected = n * freq / freq.sum()
    x = Table(freq, 14, np.zeros(n, int)).pop(Stack(256, random_words(rng, 40_000), supply=None))
    counts = np.bincount(x, minlength=cells)
    level = 1e-3
    assert stats.chisquare(counts, expected).pvalue > level
    # the test would see, with more than 99.9 % certainty, 2 % of the largest cell's mass in its neighbour
    shifted = expected.copy()
    shifted[0] -= 0.02 * expected[0]
    shifted[1] += 0.02 * expected[0]
    noncentrality = ((shifted - expected) ** 2 / expected).sum()
    power = stats.ncx2.sf(stats.chi2.isf(level, cells - 1), cells - 1, noncentrality)
    assert power > 0.999


def test_neighbouring_draws_are_independent():
    rng = np.random.default_rng(8)
    n = 100_000
    x = Stack(64, random_words(rng, 40_000), supply=None).pop_uniform(6, n)
    for lag in (1, 64):  # next lane; same lane
        pairs = np.bincount(6 * x[:-lag] + x[lag:], minlength=36)
        assert stats.chisquare(pairs).pvalue > 1e-3
    assert stats.chisquare(np.bincount(x, minlength=6)).pvalue > 1e-3


def test_stirred_pops_are_undone_by_stirred_pushes_and_cost_nothing():
    rng = np.random.default_rng(14)
    edges = random_edges(rng, 16, 50)
    sizes = (2.0 ** rng.uniform(0, 32, 30_000)).astype(np.int64)
    stack = Stack(32, random_words(rng, 60_000), supply=None)
    before, size = stack.to_words(), stack.size_bits
    with stack.stirred():
        x = stack.pop(30_000, 16, finder(edges))
        u = stack.pop_uniform(sizes)
    assert size - stack.size_bits == pytest.approx(-stack.bits, rel=1e-4)
    expected = 30_000 * np.diff(edges) / 2**16
    counts, many = np.bincount(x, minlength=50), expected > 5
    assert stats.chisquare([*counts[many], counts[~many].sum()], [*expected[many], expected[~many].sum()]).pvalue > 1e-3
    with stack.stirred():
        stack.push_uniform(u, sizes)
        stack.push(edges[x], np.diff(edges)[x], 16)
    assert np.array_equal(stack.to_words(), before)


def test_stirred_pops_are_fair_on_top_of_what_was_coded_by_a_wrong_law():
    rng = np.random.default_rng(15)
    x = np.where(rng.random(100_000) < 0.7, 0, rng.integers(0, 16, 100_000))  # coded as if uniform over 16 symbols
    pvalues = []
    for stir in (True, False):
        stack = Stack(50)
        stack.push(x << 20, np.full(len(x), 1 << 20), 24)
        with stack.stirred() if stir else ExitStack():
            drawn = stack.pop(10_000, 24, finder(np.arange(11) * (1 << 24) // 10))
        pvalues.append(stats.chisquare(np.bincount(drawn, minlength=10)).pvalue)
    assert pvalues[0] > 1e-3
    assert pvalues[1] < 1e-9


def test_an_encoder_that_runs_dry_borrows_and_says_how_much():
    stack = Stack(2)
    assert stack.supplied == 2
    x = stack.pop_uniform(1 << 16, 1000)
    assert stack.supplied == pytest.approx(2 + 500, abs=2)
    stack.push_uniform(x, 1 << 16)
    words, lanes = stack.to_words(), 2
    copy = Stack.from_words(words, lanes)
    copy.finish()  # all that was borrowed is there again
    with pytest.raises(Damaged, match="ends early"):
        Stack(2, [1, 2, 3], supply=None).pop_uniform(1 << 16, 1000)


# ------------------------------------------------------------------------------------------------------ hostile input


def test_any_flipped_bit_is_caught_by_the_end_check():
    rng = np.random.default_rng(9)
    edges = random_edges(rng, 12, 20)
    x = np.searchsorted(edges, rng.integers(0, 1 << 12, 400), side="right") - 1
    stack = Stack(8)
    stack.push(edges[x], np.diff(edges)[x], 12)
    words = stack.to_words()
    for bit in rng.choice(32 * len(words), 600, replace=False):
        damaged = words.copy()
        damaged[bit // 32] ^= np.uint32(1 << (bit % 32))
        with pytest.raises(Damaged):
            copy = Stack.from_words(damaged, 8)
            y = copy.pop(400, 12, finder(edges))
            assert y.min() >= 0
            assert y.max() < 20
            copy.finish()


def test_arbitrary_words_give_symbols_or_a_named_error():
    rng = np.random.default_rng(10)
    edges = random_edges(rng, 9, 20)
    for _ in range(600):
        lanes = int(rng.integers(1, 12))
        words = random_words(rng, int(rng.integers(0, 40)))
        if rng.random() < 0.5 and len(words):
            words[-1] = words[-1] & 0x1F  # few bits of lengths, so that more of these get through
        with pytest.raises(Damaged):
            stack = Stack.from_words(words, lanes)
            y = stack.pop(50, 9, finder(edges))
            assert y.min() >= 0
            assert y.max() < 20
            u = stack.pop_uniform(77, 20)
            assert u.min() >= 0
            assert u.max() < 77
            stack.finish()


def test_what_cannot_be_coded_is_refused():
    stack = Stack(2)
    for start, freq in [(0, 0), (250, 7), (-1, 3), (0, -1), (0, 257), (1, 256), (1 << 40, 1)]:
        with pytest.raises(ValueError, match=r"expected freq >= 1 .* at 1"):
            stack.push([0, start], [1, freq], 8)
    for precision in (0, 33):
        with pytest.raises(ValueError, match="precision"):
            stack.push([0], [1], precision)
        with pytest.raises(ValueError, match="precision"):
            stack.pop(1, precision, finder(np.array([0, 1])))
    with pytest.raises(ValueError, match="start: expected integers, got float64"):
        stack.push([0.5], [1], 8)
    for value in (-1, 10, 1 << 40):
        with pytest.raises(ValueError, match=r"values: expected 0 … 9, got .* at 1"):
            stack.push_uniform([3, value], 10)
    for size in (0, -1, (1 << 32) + 1):
        with pytest.raises(ValueError, match="sizes"):
            stack.push_uniform([0], size)
        with pytest.raises(ValueError, match="sizes"):
            stack.pop_uniform(np.array([2, size]))
    with pytest.raises(ValueError, match="lanes"):
        Stack(0)
    with pytest.raises(ValueError, match=r"start: expected shape \(n,\)"):
        stack.push([[0]], [[1]], 8)
    with pytest.raises(ValueError, match="values and sizes"):
        stack.push_uniform([1, 2, 3], [9])
    for sizes, n in ((9, None), ([9, 9], 3), ([[9]], None)):
        with pytest.raises(ValueError, match="sizes: expected one number"):
            stack.pop_uniform(sizes, n)
    with pytest.raises(Damaged, match="lane"):
        Stack.from_words([1, 2, 3], 0)


# ---------------------------------------------------------------------------------------------------- codecs compose


def test_composed_codecs_round_trip_and_their_lengths_add():
    rng = np.random.default_rng(11)
    n = 50
    freq = np.stack([frequencies(rng.dirichlet(np.ones(4)), 10) for _ in range(3)])
    chain = Chain(Uniform((n,), 3), lambda a: Table(freq, 10, a))
    row = Columns([Uniform((n, 2), 9), Uniform((n, 1), 2)], [2, 1])
    codec = Product([chain, row, Mapped(Uniform((n,), 4), lambda x: 3 - x, lambda y: 3 - y)])
    a, b = rng.integers(0, 3, n), rng.integers(0, 4, n)
    columns = np.concatenate([rng.integers(0, 9, (n, 2)), rng.integers(0, 2, (n, 1))], 1)
    stack = Stack(7)
    codec.push(stack, ((a, b), columns, b))
    expected = n * (math.log2(3) + 2 * math.log2(9) + 1 + 2) + Table(freq, 10, a).bits(b).sum()
    assert stack.bits == pytest.approx(expected)
    (a2, b2), columns2, c2 = codec.pop(stack)
    assert np.array_equal(a, a2)
    assert np.array_equal(b, b2)
    assert np.array_equal(columns, columns2)
    assert np.array_equal(b, c2)
    stack.finish()
    with pytest.raises(ValueError, match="shape"):
        Uniform((2, 2), 5).push(stack, np.zeros(4, int))
    with pytest.raises(ValueError, match="last axis"):
        row.push(stack, columns[:, :2])


# ---------------------------------------------------------------------------------------------------- the torch twin


@pytest.mark.parametrize("stir", [False, True])
def test_the_stack_on_tensors_writes_the_same_bytes(stir):
    rng = np.random.default_rng(12)
    for _ in range(40):
        lanes = int(rng.integers(1, 40))
        ours, twin = Stack(lanes), TorchStack(lanes)
        with ExitStack() as both:
            if stir:
                both.enter_context(ours.stirred())
                both.enter_context(twin.stirred())
            same_bytes(rng, ours, twin)


def same_bytes(rng, ours, twin):
    lanes = ours.lanes
    for _ in range(10):
        n, precision = int(rng.choice([0, 1, lanes - 1, lanes, 3 * lanes + 1])), int(rng.integers(1, 33))
        edges = random_edges(rng, precision, int(rng.integers(1, 20)))
        x = rng.integers(0, len(edges) - 1, n)
        sizes = (2.0 ** rng.uniform(0, 32, n)).astype(np.int64)
        sizes[sizes < 2] = 2**32
        kind = rng.integers(0, 5)
        if kind == 0:
            ours.push(edges[x], np.diff(edges)[x], precision)
            twin.push(edges[x], np.diff(edges)[x], precision)
        elif kind == 1:
            drawn = twin.pop(n, precision, torch_finder(edges)).numpy()
            assert np.array_equal(ours.pop(n, precision, finder(edges)), drawn)
        elif kind == 2:
            values = rng.integers(0, sizes)
            ours.push_uniform(values, sizes)
            twin.push_uniform(torch.from_numpy(values), torch.from_numpy(sizes))
        elif kind == 3:
            assert np.array_equal(ours.pop_uniform(sizes), twin.pop_uniform(sizes).numpy())
        else:
            lanes += int(rng.integers(0, 5))
            ours.resize(lanes)
            twin.resize(lanes)
        assert ours.supplied == twin.supplied
        assert ours.bits == pytest.approx(twin.bits, abs=1e-6)
        assert np.array_equal(ours.to_words(), twin.to_words())


def test_the_stack_on_tensors_keeps_its_buffer_and_its_errors():
    rng = np.random.default_rng(13)
    values = rng.integers(0, 2**31, 300_000)
    twin = TorchStack(1000)
    twin.push_uniform(values, 2**31)
    ours = Stack.from_words(twin.to_words(), 1000)
    assert np.array_equal(ours.pop_uniform(2**31, len(values)), values)
    ours.finish()
    twin = TorchStack.from_words(twin.to_words(), 1000)
    assert np.array_equal(twin.pop_uniform(2**31, len(values)).numpy(), values)
    twin.finish()
    with pytest.raises(Damaged, match="ends early"):
        TorchStack(2, [1, 2, 3], supply=None).pop_uniform(1 << 16, 1000)
    with pytest.raises(Damaged, match="ends early"):
        TorchStack(2, [1, 2, 3], supply=None).pop(1000, 8, torch_finder(np.arange(257)))
    with pytest.raises(ValueError, match="freq"):
        twin.push([0], [0], 8)
    with pytest.raises(ValueError, match="values"):
        twin.push_uniform([10], 10)
    with pytest.raises(ValueError, match="sizes"):
        twin.pop_uniform(0, 1)
    with pytest.raises(ValueError, match="precision"):
        twin.push([0], [1], 40)
    with pytest.raises(ValueError, match="start: expected integers"):
        twin.push([0.5], [1], 8)
