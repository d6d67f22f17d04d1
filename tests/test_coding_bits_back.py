"""Bits-back, its ramp, hierarchies, autoregressive codecs: as long as the bound says, on models that can be summed."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from typing import ClassVar

import numpy as np
import pytest
import torch

from coding_toys import Table, frequencies
from likely.coding import (
    Autoregressive,
    BitsBack,
    Chain,
    Damaged,
    Mapped,
    Schedule,
    Stack,
    Uniform,
    bit_swap,
    decode_rows,
    encode_rows,
)
from likely.coding.bits_back import choose_schedule, trial

PRECISION = 20


class Discrete:
    """p(z) p(x | z) with 16 latent states and 64 values, the exact posterior or a tempered one; rows ``(n, 1)``."""

    initial = True
    networks: ClassVar[dict[str, object]] = {}

    def __init__(self, temper: float = 1.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.prior = frequencies(rng.dirichlet(np.ones(16)), PRECISION)[None]
        self.likelihood = frequencies(rng.dirichlet(np.full(64, 0.2), 16), PRECISION)
        joint = (self.prior[0, :, None] * self.likelihood / 4.0**PRECISION) ** temper
        self.posterior = frequencies((joint / joint.sum(0)).T, PRECISION)

    def of(self, n):
        return BitsBack(
            Table(self.prior, PRECISION, np.zeros((n, 1), int)),
            lambda z: Table(self.likelihood, PRECISION, z),
            lambda x: Table(self.posterior, PRECISION, x),
        )

    def push(self, stack, x, condition=None):
        self.of(len(x)).push(stack, np.asarray(x))

    def pop(self, stack, n, condition=None, present=None):
        return self.of(n).pop(stack)

    def probabilities(self):
        """Of the integers: p(x); mean and variance over q(z | x) of log2 p(x, z) − log2 q(z | x)."""
        p_z, p_x, q = self.prior[0] / 2**PRECISION, self.likelihood / 2**PRECISION, self.posterior.T / 2**PRECISION
        joint = p_z[:, None] * p_x
        gain = np.log2(joint) - np.log2(q)
        elbo = (q * gain).sum(0)
        return joint.sum(0), elbo, (q * (gain - elbo) ** 2).sum(0)


@pytest.mark.parametrize("temper", [1.0, 0.7])
def test_coded_length_is_the_negative_elbo_of_the_integers(temper):
    model = Discrete(temper)
    p, elbo, variance = model.probabilities()
    rng = np.random.default_rng(1)
    x = rng.choice(64, (200_000, 1), p=p / p.sum())
    payload = encode_rows(model, x)
    expected = -elbo[x].sum()
    assert payload.ideal_bits == pytest.approx(expected, rel=1e-3)
    assert abs(payload.ideal_bits - expected) < 4 * variance[x].sum() ** 0.5 + 1e-5 * expected
    evidence = -np.log2(p[x]).sum()
    if temper == 1.0:
        assert payload.ideal_bits == pytest.approx(evidence, rel=1e-5)  # the posterior is exact: nothing is lost
    else:
        assert expected > 1.005 * evidence
    # what the file adds: header, what was borrowed, at most 6 bits for each lane, filling of three groups of words
    added = 8 * len(payload.data) - payload.ideal_bits
    assert 0 < added < 48 + payload.initial_bits + 6 * payload.schedule.lanes + 3 * 32 + 1e-4 * expected
    # borrowed: the first lanes, and the posterior of one row (under 20 bits), in whole words
    assert payload.initial_bits <= 32 * (payload.schedule.lanes // 32 + 2)
    assert np.array_equal(decode_rows(model, payload.data, len(x)), x)


def test_draws_are_fair_only_from_stirred_bits():
    """Without stirring, z is drawn from what the last z left; where its law is not the prior, the bound is missed."""

    class Unstirred(Stack):
        _stir = staticmethod(lambda *heads, **options: None)

    model = Discrete(0.5)
    p, elbo, variance = model.probabilities()
    x = np.random.default_rng(1).choice(64, (2_000, 30), p=p / p.sum())
    errors = []
    for stack in (Stack(16), Unstirred(16)):
        for batch in x:
            model.push(stack, batch[:, None])
        errors.append((stack.bits + elbo[x].sum()) / variance[x].sum() ** 0.5)
        for batch in x[::-1]:
            assert np.array_equal(model.pop(stack, 30)[:, 0], batch)
        stack.finish()
    assert abs(errors[0]) < 3
    assert errors[1] > 6


def test_without_the_ramp_the_first_batch_is_borrowed():
    model = Discrete(0.5)
    p, _, _ = model.probabilities()
    x = np.random.default_rng(2).choice(64, (4096, 1), p=p / p.sum())
    ramp = encode_rows(model, x, schedule=Schedule(64, 1, 12, 13))
    flat = Stack(64)
    model.push(flat, x)
    assert 32 * flat.supplied > 20 * ramp.initial_bits
    assert flat.bits == pytest.approx(ramp.ideal_bits, rel=0.02)


def test_bit_swap_borrows_one_layer_only():
    rng = np.random.default_rng(3)
    n, cells = 500, 256

    def conditional(seed):
        freq = frequencies(np.random.default_rng(seed).dirichlet(np.full(cells, 5.0), cells), PRECISION)
        return lambda given: Table(freq, PRECISION, given)

    prior = Uniform((n,), cells)
    likelihoods, posteriors = [conditional(k) for k in (0, 1, 2)], [conditional(k) for k in (3, 4, 5)]
    swap = bit_swap(prior, likelihoods, posteriors)
    at_once = BitsBack(  # all layers are drawn before anything is coded
        Mapped(
            Chain(prior, lambda z3: Chain(likelihoods[2](z3), lambda z2: likelihoods[1](z2))),
            lambda z: (z[2], (z[1], z[0])),
            lambda w: (w[1][1], w[1][0], w[0]),
        ),
        lambda z: likelihoods[0](z[0]),
        lambda x: Mapped(
            Chain(posteriors[0](x), lambda z1: Chain(posteriors[1](z1), lambda z2: posteriors[2](z2))),
            lambda z: (z[0], (z[1], z[2])),
            lambda w: (w[0], w[1][0], w[1][1]),
        ),
    )
    x = rng.integers(0, cells, n)
    borrowed = []
    for codec in (swap, at_once):
        stack = Stack(8)
        before = stack.supplied
        codec.push(stack, x)
        borrowed.append(32 * (stack.supplied - before) - 8 * 15.5)  # the heads went from 2^32.5 to 2^48 on average
        copy = Stack.from_words(stack.to_words(), 8)
        assert np.array_equal(codec.pop(copy), x)
        copy.finish()
    layer = n * 7.86  # bits of one draw: entropy of a Dirichlet(5) table of 256 cells, near enough
    assert borrowed[0] == pytest.approx(layer, rel=0.03)
    assert borrowed[1] == pytest.approx(3 * layer, rel=0.03)


def test_hierarchy_costs_its_bound():
    """Two layers over few states: mean length over all draws equals the enumerated bound."""
    rng = np.random.default_rng(4)
    tables = {name: frequencies(rng.dirichlet(np.ones(4), 4), 16) for name in ("x_z1", "z1_z2", "q1", "q2")}
    top = frequencies(rng.dirichlet(np.ones(4)), 16)[None]
    n = 40_000
    x = rng.integers(0, 4, n)

    def of(name):
        return lambda given: Table(tables[name], 16, given)

    codec = bit_swap(Table(top, 16, np.zeros(n, int)), [of("x_z1"), of("z1_z2")], [of("q1"), of("q2")])
    stack = Stack(16)
    codec.push(stack, x)
    p = {name: table / 2**16 for name, table in tables.items()}
    bound = np.zeros(4)
    for value in range(4):
        for z1 in range(4):
            for z2 in range(4):
                q = p["q1"][value, z1] * p["q2"][z1, z2]
                joint = top[0, z2] / 2**16 * p["z1_z2"][z2, z1] * p["x_z1"][z1, value]
                bound[value] += q * (math.log2(joint) - math.log2(q))
    deviation = 4 * 3 / n**0.5  # four standard errors: one draw's cost varies by less than 3 bits
    assert stack.bits / n == pytest.approx(-bound[x].mean(), abs=deviation)
    assert np.array_equal(codec.pop(stack), x)


# ----------------------------------------------------------------------------------------------------------- the ramp


@pytest.mark.parametrize("n", [0, 1, 2, 3, 100, 10_000, 123_457])
def test_the_schedule_takes_every_row_once_and_runs_backwards(n):
    for arguments in ((1, 1, 4, 1), (256, 16, 8, 13), (4096, 65535, 12, 64), (9, 3, 5, 255)):
        schedule = Schedule(*arguments)
        steps = list(schedule.steps(n))
        assert sum(s.stop - s.first for s in steps) == n
        assert all(a.stop == b.first for a, b in pairwise(steps))
        assert list(schedule.backwards(n)) == steps[::-1]
        for s in steps:
            assert s.lanes == min(schedule.lanes, max(1, schedule.lanes // 32) + s.first * schedule.opening // 16)
            rows = max(1, min(1 << schedule.batch_log2, s.first * schedule.growth // 64))
            assert s.stop == min(n, s.first + rows)


def test_the_ramp_of_ten_thousand_rows_has_few_steps():
    assert len(list(Schedule(256, 16, 8, 13).steps(10_000))) < 80


def test_no_schedule_takes_more_than_bounded_memory():
    schedule = Schedule(65535, 1, 4, 1)
    assert next(iter(schedule.backwards(10**12))).stop == 10**12
    assert len(schedule._ramp(10**12)) < 70_000
    for wrong in ({"lanes": 0}, {"opening": 0}, {"batch_log2": 3}, {"batch_log2": 17}, {"growth": 0}, {"growth": 256}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Schedule(**{"lanes": 1, **wrong})


class Cells:
    """Independent cells, ``(n, 3)`` with values below 50 plus the condition; NaN cells are left out.  Tensors."""

    initial = False
    networks: ClassVar[dict[str, object]] = {}

    def push(self, stack, x, condition=None):
        there = ~torch.isnan(x)
        offset = torch.zeros(len(x), 1) if condition is None else condition
        values = (x - offset)[there].long().numpy()
        Uniform(values.shape, 50).push(stack, values)

    def pop(self, stack, n, condition=None, present=None):
        present = torch.ones(n, 3, dtype=torch.bool) if present is None else present
        x = torch.full((n, 3), math.nan)
        x[present] = torch.from_numpy(Uniform((int(present.sum()),), 50).pop(stack)).float()
        return x if condition is None else x + condition


@pytest.mark.parametrize("n", [0, 1, 2, 65, 3000])
def test_rows_with_holes_and_conditions_round_trip(n):
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(0, 50, (n, 3), generator=generator).float()
    condition = torch.randint(0, 9, (n, 1), generator=generator).float()
    holes = torch.rand(n, 3, generator=generator) < 0.2
    x = (x + condition).masked_fill(holes, math.nan)
    payload = encode_rows(Cells(), x, condition)
    cells = int((~holes).sum())
    assert payload.ideal_bits == pytest.approx(cells * math.log2(50))
    assert 8 * len(payload.data) <= payload.ideal_bits * 1.0001 + 48 + 6 * payload.schedule.lanes + 5 * 32
    assert payload.initial_bits == 32  # the first lane
    seen = []
    y = decode_rows(Cells(), payload.data, n, condition, ~holes, progress=seen.append)
    assert torch.equal(x.nan_to_num(-1), y.nan_to_num(-1))
    assert seen == sorted(seen)
    assert (seen or [0])[-1] == n


def test_lanes_follow_the_size_of_the_data():
    x = torch.zeros(200_000, 3)
    for n, low, high in [(10, 1, 1), (2_000, 4, 12), (50_000, 110, 256), (200_000, 600, 900)]:
        assert low <= choose_schedule(x[:n].shape, trial(Cells(), x[:n])).lanes <= high
        payload = encode_rows(Cells(), x[:n])
        overhead = 8 * len(payload.data) / payload.ideal_bits - 1
        assert overhead < 0.002 + 200 / payload.ideal_bits
    assert choose_schedule(x.shape, trial(Cells(), x), lanes=77).lanes == 77


# ------------------------------------------------------------------------------------------------------------- damage


def test_golden_payload():
    """Ramp, stirring, lanes and their words: these bytes must come out for ever."""
    model = Discrete(0.5)
    payload = encode_rows(model, (np.arange(500) ** 2 % 64)[:, None], schedule=Schedule(20, 3, 5, 20))
    assert hashlib.sha256(payload.data).hexdigest()[:32] == "27d324295d77e3f4b38aae2ff9c5030f"


def test_damaged_rows_never_pass_for_others():
    model = Discrete(0.5)
    p, _, _ = model.probabilities()
    rng = np.random.default_rng(5)
    x = rng.choice(64, (250, 1), p=p / p.sum())
    data = encode_rows(model, x).data
    caught = 0
    for _ in range(150):
        damaged = bytearray(data)
        kind = rng.integers(0, 4)
        if kind == 0:
            damaged[rng.integers(0, len(data))] ^= 1 << rng.integers(0, 8)
        elif kind == 1:
            damaged[rng.integers(0, 6)] = rng.integers(0, 256)
        elif kind == 2:
            del damaged[rng.integers(0, len(data)) :]
        else:
            damaged = bytearray(rng.bytes(6 + 4 * int(rng.integers(0, 60))))
            damaged[:6] = data[:6]
        try:
            y = decode_rows(model, bytes(damaged), len(x))
        except Damaged:
            caught += 1
        else:  # a change of the schedule that this number of rows does not see
            assert np.array_equal(x, y)
            assert damaged[6:] == data[6:]
    assert caught > 120
    with pytest.raises(Damaged):
        decode_rows(model, data, len(x) - 1)
    with pytest.raises(Damaged):
        decode_rows(model, data + b"\0\0\0\0", len(x))
    with pytest.raises(Damaged):
        decode_rows(model, data[:-2], len(x))
    with pytest.raises(Damaged):
        decode_rows(model, b"", 0)


# ------------------------------------------------------------------------------------------------------ autoregressive


@pytest.mark.parametrize("parallel", [False, True])
def test_a_markov_chain_costs_its_exact_probability(parallel):
    rng = np.random.default_rng(6)
    n, length, states = 40, 30, 7
    first, move = (
        frequencies(rng.dirichlet(np.ones(states)), 24),
        frequencies(rng.dirichlet(np.ones(states), states), 24),
    )
    table = np.concatenate([move, first[None]])
    calls = []

    def rows(t, prefix):
        return np.full(n, states) if t == 0 else prefix[:, t - 1]

    def step(t, prefix):
        assert prefix.shape == (n, t)
        calls.append(t)
        return Table(table, 24, rows(t, prefix))

    def whole(x):
        return [Table(table, 24, rows(t, x)) for t in range(length)]

    codec = Autoregressive((n, length), step, whole if parallel else None)
    x = rng.integers(0, states, (n, length))
    stack = Stack(16)
    codec.push(stack, x)
    assert calls == ([] if parallel else list(range(length)))
    log2_p = np.log2(first[x[:, 0]] / 2**24).sum() + np.log2(move[x[:, :-1], x[:, 1:]] / 2**24).sum()
    assert stack.bits == pytest.approx(-log2_p)
    calls.clear()
    stack = Stack.from_words(stack.to_words(), 16)
    assert np.array_equal(codec.pop(stack), x)
    assert calls == list(range(length))
    stack.finish()
    with pytest.raises(ValueError, match="shape"):
        codec.push(stack, x[:, 1:])
    with pytest.raises(ValueError, match="shape"):
        Autoregressive((5,), step)
