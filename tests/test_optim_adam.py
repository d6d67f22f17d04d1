"""The Adam family against torch.optim, against the papers' formulas in NumPy, and against itself after a resume."""

import copy
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from likely.optim import Adam, AdaMax, AdamW, NAdam, UpdateRule, clip_by_global_norm, frame
from likely.optim.frame import stochastic_rounding
from optim_processes import RULES, STEPS, advance, network, values

FAMILY = [Adam, AdamW, AdaMax, NAdam]


def descend(optimizer, parameters, gradients):
    """Steps with given gradients: a list of lists."""
    for step in gradients:
        for parameter, gradient in zip(parameters, step):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()


def pair(n=1, dtype=torch.float64, shape=(4, 3), seed=0):
    """The same parameters twice."""
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(shape, generator=generator).to(dtype) for _ in range(n)]
    return [[nn.Parameter(value.clone()) for value in start] for _ in range(2)]


def noise(steps, n=1, dtype=torch.float64, shape=(4, 3), seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator).to(dtype) for _ in range(n)] for _ in range(steps)]


@pytest.fixture
def in_float64():
    """PyTorch's own scalars of the state (μ₁ … μ_t of NAdam) have the default type."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Against torch.optim ------------------------------------------------------------------------------------------

SAME = {
    "Adam": (lambda p: Adam(p), lambda p: torch.optim.Adam(p)),
    "Adam by formula": (lambda p: Adam(p, fused=False), lambda p: torch.optim.Adam(p)),
    "Adam, penalty": (
        lambda p: Adam(p, betas=(0.8, 0.99), weight_decay=0.1, fused=False),
        lambda p: torch.optim.Adam(p, betas=(0.8, 0.99), weight_decay=0.1),
    ),
    "AdamW": (lambda p: AdamW(p, weight_decay=0.1), lambda p: torch.optim.AdamW(p, weight_decay=0.1)),
    "AdamW by formula": (
        lambda p: AdamW(p, weight_decay=0.1, fused=False),
        lambda p: torch.optim.AdamW(p, weight_decay=0.1),
    ),
    "AMSGrad": (lambda p: Adam(p, amsgrad=True), lambda p: torch.optim.Adam(p, amsgrad=True)),
    "AMSGrad by formula": (
        lambda p: Adam(p, amsgrad=True, fused=False),
        lambda p: torch.optim.Adam(p, amsgrad=True),
    ),
    "AdaMax": (lambda p: AdaMax(p, lr=1e-3), lambda p: torch.optim.Adamax(p, lr=1e-3)),
    "NAdam": (lambda p: NAdam(p, lr=1e-3), lambda p: torch.optim.NAdam(p, lr=1e-3)),
    "NAdam, decay": (
        lambda p: NAdam(p, lr=1e-3, weight_decay=0.1, decay="lr"),
        lambda p: torch.optim.NAdam(p, lr=1e-3, weight_decay=0.1, decoupled_weight_decay=True),
    ),
}


def trained(make, dtype, steps=1000):
    """A small network after steps of regression on ever new examples."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        single = {"dtype": torch.float32}
        model = nn.Sequential(nn.Linear(5, 8, **single), nn.Tanh(), nn.Linear(8, 3, **single)).to(dtype)
    examples = torch.randn(steps, 16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    optimizer = make(model.parameters())
    for x in examples:
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin()).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", SAME)
def test_equals_torch_over_1000_steps_in_float64(name, in_float64):
    ours, theirs = (trained(make, torch.float64) for make in SAME[name])
    assert (ours - theirs).norm() <= 1e-12 * theirs.norm()


@pytest.mark.parametrize("name", SAME)
def test_equals_torch_over_1000_steps_in_float32(name):
    ours, theirs = (trained(make, torch.float32) for make in SAME[name])
    assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


def test_equals_torchs_kernel_to_the_bit():
    ours, theirs = (
        trained(AdamW, torch.float32, 50),
        trained(lambda p: torch.optim.AdamW(p, fused=True), torch.float32, 50),
    )
    assert torch.equal(ours, theirs)


def test_goes_on_from_a_state_of_torch(in_float64):
    for ours, theirs, names in (
        (AdamW, torch.optim.AdamW, {"m", "v"}),
        (lambda p: Adam(p, amsgrad=True), lambda p: torch.optim.Adam(p, amsgrad=True), {"m", "v", "v_max"}),
        (AdaMax, torch.optim.Adamax, {"m", "u"}),
        (NAdam, torch.optim.NAdam, {"mu_product", "m", "v"}),
    ):
        a, b = pair(2)
        reference, own = theirs(a), ours(b)
        gradients = noise(20, 2)
        descend(reference, a, gradients[:10])
        own.load_state_dict(copy.deepcopy(reference.state_dict()))
        for p, q in zip(a, b):
            q.data.copy_(p)
        descend(reference, a, gradients[10:])
        descend(own, b, gradients[10:])
        assert set(own.state[b[0]]) == {"step"} | names
        for p, q in zip(a, b):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_parameters_without_a_gradient_stand_still_and_are_not_counted(in_float64):
    """Three parameters that begin and pause at different steps."""
    generator = torch.Generator().manual_seed(2)
    gradients = noise(60, 3)
    for step in gradients:
        for i in range(3):
            if torch.rand((), generator=generator) < 0.4:
                step[i] = None
    for ours, theirs in (
        (AdamW, torch.optim.AdamW),
        (lambda p: Adam(p, fused=False), torch.optim.Adam),
        (NAdam, torch.optim.NAdam),
    ):
        a, b = pair(3)
        descend(theirs(a), a, gradients)
        own = ours(b)
        descend(own, b, gradients)
        for p, q in zip(a, b):
            torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
        counts = [sum(step[i] is not None for step in gradients) for i in range(3)]
        assert [int(own.state[q]["step"]) for q in b] == counts


# By hand ------------------------------------------------------------------------------------------------------


def first_two(make, first=2.0, second=-1.0):
    """How far a parameter moves in its first two steps."""
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = make([w])
    moves = []
    for gradient in (first, second):
        before = w.item()
        w.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        moves.append(w.item() - before)
    return moves


@pytest.mark.parametrize("fused", [None, False])
def test_first_steps_of_adam_by_hand(fused):
    """β = (½, ¾), ε = 1, α = 1, g = 2, −1.

    1: m = 1, m̂ = 2; v = 1, v̂ = 4; −2 / (2 + 1).
    2: m = ½ − ½ = 0.  With g = 1 instead of −1: m = 1, m̂ = 4/3; v = ¾ + ¼ = 1, v̂ = 1 / (7/16) = 16/7.
    """

    def make(p):
        return Adam(p, lr=1.0, betas=(0.5, 0.75), eps=1.0, fused=fused)

    assert first_two(make) == pytest.approx([-2 / 3, 0.0], abs=1e-15)
    assert first_two(make, 2.0, 1.0)[1] == pytest.approx(-(4 / 3) / (4 / math.sqrt(7) + 1), rel=1e-14)


def test_first_steps_of_the_others_by_hand():
    """β = (½, ¾), α = 1, g = 2, 1, so that m = 1, 1 and m̂ = 2, 4/3; v̂ = 4, 16/7 unless said otherwise."""
    common = {"lr": 1.0, "betas": (0.5, 0.75)}

    def moves(rule, second=1.0, **options):
        return first_two(lambda p: rule(p, **common, **options), 2.0, second)

    inside = [-2 / math.sqrt(5), -(4 / 3) / math.sqrt(16 / 7 + 1)]
    assert moves(Adam, eps=1.0, epsilon="inside") == pytest.approx(inside, rel=1e-14)
    # √(1 − β₂) / (1 − β₁) · m / (√v + ε̂) = ½ / ½ · 1 / (1 + 1), then √(7/16) / ¾ · 1 / (1 + 1)
    folded = [-0.5, -math.sqrt(7) / 6]
    assert moves(Adam, eps=1.0, epsilon="folded") == pytest.approx(folded, rel=1e-14)
    assert moves(Adam, eps=1.0, bias_correction=False) == pytest.approx([-0.5, -0.5], rel=1e-14)
    # v₀ = 1: v = ¾ + 1, then ¾ · 7/4 + ¼
    ones = [-0.5 / 0.5 / (math.sqrt(1.75) + 1), -math.sqrt(7) / 3 / (math.sqrt(1.5625) + 1)]
    assert moves(Adam, eps=1.0, epsilon="folded", v_init=1.0) == pytest.approx(ones, rel=1e-14)
    # g = 2, 0: v = 1, ¾, of which the larger is 1; m = 1, ½
    assert moves(Adam, 0.0, eps=1.0, amsgrad=True, bias_correction=False) == pytest.approx([-0.5, -0.25], rel=1e-14)
    # u = 2, then max(¾ · 2, 1) = 3/2
    assert moves(AdaMax, eps=0.0) == pytest.approx([-1.0, -(4 / 3) / 1.5], rel=1e-14)
    # ψ = 0: μ = ½ · ½ = ¼ always; 1: (¾ · 2 / ¾ + ¼ · 1 / (15/16)) / (2 + 1)
    first = -(2 + 4 / 15) / 3
    second = -(0.75 / (15 / 16) + 0.25 / (63 / 64)) / (4 / math.sqrt(7) + 1)
    assert moves(NAdam, eps=1.0, momentum_decay=0.0) == pytest.approx([first, second], rel=1e-14)


# Against the formulas -----------------------------------------------------------------------------------------


def adam_in_numpy(theta, gradients, alpha, beta1, beta2, eps, epsilon, corrected, amsgrad, v):
    """Adam as the docstring of its module writes it, in the order of Algorithm 1."""
    m = np.zeros_like(theta)
    v = np.full_like(theta, v)
    largest = np.zeros_like(theta)
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        largest = np.maximum(largest, v)
        c1, c2 = (1 - beta1**t, 1 - beta2**t) if corrected else (1, 1)
        m_hat, used = m / c1, largest if amsgrad else v
        if epsilon == "outside":
            theta = theta - alpha * m_hat / (np.sqrt(used / c2) + eps)
        elif epsilon == "inside":
            theta = theta - alpha * m_hat / np.sqrt(used / c2 + eps)
        else:
            theta = theta - alpha * np.sqrt(c2) / c1 * m / (np.sqrt(used) + eps)
    return theta


@pytest.mark.parametrize("epsilon", ["outside", "inside", "folded"])
@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("amsgrad", [True, False])
def test_conventions_of_epsilon_against_their_formulas(epsilon, corrected, amsgrad):
    for start in (0.0, 1.0):
        (a, _), gradients = pair(), noise(40)
        options = {"epsilon": epsilon, "bias_correction": corrected, "amsgrad": amsgrad, "v_init": start}
        expected = adam_in_numpy(
            a[0].detach().numpy(),
            [g[0].numpy() for g in gradients],
            *(0.01, 0.8, 0.95, 0.1),
            *(epsilon, corrected, amsgrad, start),
        )
        descend(Adam(a, 0.01, (0.8, 0.95), 0.1, **options), a, gradients)
        np.testing.assert_allclose(a[0].detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_the_folded_form_is_algorithm_1_if_epsilon_is_rescaled_in_every_step():
    """Section 2: with ε̂ = ε √(1 − β₂^t) the two are one; with a constant ε̂ the first steps are smaller."""
    a, b = pair()
    outside, folded = Adam(a, 0.01, eps=0.1), Adam(b, 0.01, eps=0.1, epsilon="folded")
    for t, gradients in enumerate(noise(30), 1):
        folded.param_groups[0]["eps"] = 0.1 * math.sqrt(1 - 0.999**t)
        descend(outside, a, [gradients])
        descend(folded, b, [gradients])
    torch.testing.assert_close(a[0], b[0], rtol=1e-12, atol=1e-14)
    constant = first_two(lambda p: Adam(p, 0.01, eps=0.1, epsilon="folded"))[0]
    assert constant == pytest.approx(-0.01 * 2 / (2 + 0.1 / math.sqrt(0.001)), rel=1e-12)


@pytest.mark.parametrize("rule", FAMILY)
@pytest.mark.parametrize("decay", ["l2", "lr", "schedule"])
def test_weight_decay_against_its_formula(rule, decay):
    """A schedule halves the rate: α_t λ is halved, and so is η_t λ, which does not depend on α."""
    a, b = pair()
    optimizer = rule(a, lr=0.2, weight_decay=0.3, decay=decay)
    plain = rule(b, lr=0.2, weight_decay=0.0, decay=decay)
    for rate, gradients in zip((0.2, 0.1), noise(2)):
        optimizer.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = rate
        before = a[0].detach().clone()
        b[0].data.copy_(before)
        if decay == "l2":
            descend(plain, b, [[gradients[0] + 0.3 * before]])
            kept = 1.0
        else:
            descend(plain, b, [gradients])
            kept = 1 - 0.3 * (rate if decay == "lr" else rate / 0.2)
        descend(optimizer, a, [gradients])
        torch.testing.assert_close(a[0].detach(), b[0].detach() - (1 - kept) * before, rtol=1e-12, atol=1e-14)


def test_both_scalings_of_the_decay_are_named_and_related():
    a, b = pair()
    descend(AdamW(a, lr=0.1, weight_decay=0.2, decay="lr"), a, noise(5))
    descend(AdamW(b, lr=0.1, weight_decay=0.02, decay="schedule"), b, noise(5))
    torch.testing.assert_close(a[0], b[0], rtol=1e-13, atol=1e-15)


# What the paper says of the step ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", FAMILY)
def test_diagonal_rescaling_of_the_gradient_changes_nothing(rule):
    """Section 2.1, to the bit: the scales are powers of four, whose squares float32 holds."""
    a, b = pair(dtype=torch.float32)
    scale = 4.0 ** torch.randint(-6, 7, (4, 3), generator=torch.Generator().manual_seed(5))
    gradients = noise(50, dtype=torch.float32)
    options = {"eps": 0.0, "weight_decay": 0.0}
    descend(rule(a, **options), a, gradients)
    descend(rule(b, **options), b, [[g[0] * scale] for g in gradients])
    assert torch.equal(a[0], b[0])


def largest_move(make, gradients):
    w = nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer, largest = make([w]), 0.0
    for gradient in gradients:
        before = w.detach().clone()
        descend(optimizer, [w], [[gradient]])
        largest = max(largest, float((w.detach() - before).abs().max()))
    return largest


def test_steps_are_bounded():
    """Section 2.1: |Δ| is about α at most, and exactly by the Cauchy–Schwarz inequality.

    With w₁ and w₂ the weights of the steps in m̂ and v̂, |m̂| / √v̂ ≤ √(Σ w₁² / w₂), which gradients in proportion to
    w₁ / w₂ reach.  After long silence it is the paper's (1 − β₁) / √(1 − β₂).  For AdaMax it is Σ w₁ β₂^{−age}.
    """
    t, beta1, beta2 = 20, 0.9, 0.99

    def adam(p):
        return Adam(p, lr=0.01, betas=(beta1, beta2), eps=1e-30)

    def adamax(p):
        return AdaMax(p, lr=0.01, betas=(beta1, beta2), eps=0.0)

    age = torch.arange(t - 1, -1, -1, dtype=torch.float64)
    w1, w2 = ((1 - beta) / (1 - beta**t) * beta**age for beta in (beta1, beta2))
    of_adam, of_adamax = float((w1**2 / w2).sum().sqrt()), float((w1 * beta2**-age).sum())
    assert largest_move(adam, (w1 / w2)[:, None].unbind()) == pytest.approx(0.01 * of_adam, rel=1e-12)
    assert largest_move(adamax, (beta2**-age)[:, None].unbind()) == pytest.approx(0.01 * of_adamax, rel=1e-12)

    generator = torch.Generator().manual_seed(0)
    heavy = [torch.randn(2000, generator=generator, dtype=torch.float64) ** 5 for _ in range(t)]
    assert 0.005 < largest_move(adam, heavy) <= 0.01 * of_adam
    assert 0.005 < largest_move(adamax, heavy) <= 0.01 * of_adamax
    silence = [torch.zeros(1, dtype=torch.float64)] * 3000 + [torch.full((1,), 7.0, dtype=torch.float64)]
    assert largest_move(adam, silence) == pytest.approx(0.01 * 0.1 / math.sqrt(0.01), rel=1e-9)


def test_bias_correction_against_the_expectation():
    """Section 3: E[m̂_t] = E[g], E[v̂_t] = E[g²], over all 2⁸ equally likely sequences of gradients in {−1, 3}."""
    sequences = torch.tensor(list(itertools.product([-1.0, 3.0], repeat=8)), dtype=torch.float64)
    w = nn.Parameter(torch.zeros(256, dtype=torch.float64))
    optimizer = Adam([w], betas=(0.9, 0.99), eps=0.0)
    for t in range(1, 9):
        descend(optimizer, [w], [[sequences[:, t - 1]]])
        m, v = optimizer.state[w]["m"], optimizer.state[w]["v"]
        assert float(m.mean()) / (1 - 0.9**t) == pytest.approx(1.0, rel=1e-13)
        assert float(v.mean()) / (1 - 0.99**t) == pytest.approx(5.0, rel=1e-13)


@pytest.mark.parametrize(("amsgrad", "where"), [(False, 1.0), (True, -1.0)])
def test_the_counterexample_of_reddi_kale_and_kumar(amsgrad, where):
    """Theorem 1: f_t(x) = C x if t mod 3 = 1, else −x, on [−1, 1], C = 4, β₁ = 0, β₂ = 1 / (1 + C²), α_t = α / √t.

    The best point is −1; Adam ends at the worst, AMSGrad at the best.
    """
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Adam([x], betas=(0.0, 1 / 17), eps=0.0, bias_correction=False, amsgrad=amsgrad)
    for t in range(1, 6001):
        optimizer.param_groups[0]["lr"] = 0.5 / math.sqrt(t)
        descend(optimizer, [x], [[torch.full((1,), 4.0 if t % 3 == 1 else -1.0, dtype=torch.float64)]])
        x.data.clamp_(-1.0, 1.0)
    assert x.item() == pytest.approx(where, abs=0.05)


# bfloat16 -----------------------------------------------------------------------------------------------------


def test_stochastic_rounding_is_unbiased():
    """At 2²⁰ draws a point the standard deviation of the mean is below 5e-4 of the gap between two values.

    The bound is five of them; a bias of 1 % of the gap would be found with a probability above 1 − 1e-9.
    """
    n, gap = 2**20, 2.0**-7
    for i, fraction in enumerate((0.01, 0.25, 0.5, 0.9)):
        for sign in (1.0, -1.0):
            x = torch.full((n,), sign * (1.0 + fraction * gap))
            rounded = stochastic_rounding(x, seed=7, t=i + 1, number=3)
            up = (rounded.float().abs() - 1.0) / gap
            assert set(up.unique().tolist()) == {0.0, 1.0}
            exact = float((x[0].abs() - 1.0) / gap)
            assert abs(float(up.double().mean()) - exact) < 5 * math.sqrt(exact * (1 - exact) / n)


def carried(n, **key):
    """Whether each of n numbers halfway between two values was rounded up."""
    return (stochastic_rounding(torch.full((n,), 1.0 + 2.0**-8), **{"seed": 0, "t": 1, **key}) > 1).double()


def test_stochastic_rounding_has_no_visible_structure():
    """Neighbours, steps, parameters, parts and seeds are uncorrelated: |r| < 5 / √n at n = 2¹⁸."""
    n = 2**18
    first = carried(n)
    others = [carried(n, **{key: value}) for key, value in
              {"seed": 1, "t": 2, "number": 1, "part": 1, "offset": n}.items()]  # fmt: skip
    others += [first.roll(lag) for lag in (1, 2, 3, 16, 512)]
    for other in others:
        assert abs(float(np.corrcoef(first, other)[0, 1])) < 5 / math.sqrt(n)


def test_stochastic_rounding_depends_on_the_place_alone():
    x = torch.randn(1000)
    whole = stochastic_rounding(x, seed=3, t=5)
    assert torch.equal(whole[100:], stochastic_rounding(x[100:], seed=3, t=5, offset=100))
    assert torch.equal(whole, stochastic_rounding(x.reshape(10, 100), seed=3, t=torch.tensor(5.0)).flatten())


def test_stochastic_rounding_keeps_what_needs_none():
    exact = torch.tensor([0.0, -0.0, 1.5, -3.0, 2.0**-126, math.inf, -math.inf])
    assert torch.equal(stochastic_rounding(exact, seed=0, t=1).float(), exact)
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32)  # not a number, with all payloads set
    assert stochastic_rounding(bits.view(torch.float32), seed=0, t=1).isnan().all()


def test_bfloat16_is_moved_in_float32():
    """State and update are those of a float32 parameter; only the parameter is rounded, to the nearest."""
    for rule in FAMILY:
        (a, _), gradients = pair(dtype=torch.bfloat16), noise(3, dtype=torch.bfloat16)
        optimizer = rule(a, lr=0.05)
        b = nn.Parameter(a[0].detach().float())
        reference = rule([b], lr=0.05, **({"fused": False} if issubclass(rule, Adam) else {}))
        for step in gradients:
            b.data.copy_(a[0].float())
            descend(optimizer, a, [step])
            descend(reference, [b], [[step[0].float()]])
            assert torch.equal(a[0], b.to(torch.bfloat16))
        for name, value in reference.state[b].items():
            assert torch.equal(optimizer.state[a[0]][name], value) and value.dtype != torch.bfloat16


def test_small_steps_in_bfloat16_need_stochastic_rounding():
    """A step of 1/8 of the gap: never made to the nearest; in the mean of 4,096 parameters made stochastically."""
    start = torch.ones(4096, dtype=torch.bfloat16)
    nearest, stochastic = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    gradient = -torch.ones_like(start)
    for w, rounding in ((nearest, "nearest"), (stochastic, "stochastic")):
        descend(Adam([w], lr=2.0**-10, eps=0.0, rounding=rounding), [w], [[gradient]] * 40)
    assert torch.equal(nearest, start)
    # every step adds 2⁻¹⁰ in the mean, with a variance below (2⁻⁷)² / 4 a step and parameter
    assert float(stochastic.detach().double().mean()) == pytest.approx(
        1 + 40 * 2.0**-10, abs=5 * 2**-8 * math.sqrt(40 / 4096)
    )


# Resuming, processes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_steps_are_equal_to_the_bit(name, dtype):
    straight, resumed = network(dtype), network(dtype)
    advance(straight, RULES[name](straight.parameters()), range(STEPS))
    first = RULES[name](resumed.parameters())
    advance(resumed, first, range(7))
    second = RULES[name](resumed.parameters())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    advance(resumed, second, range(7, STEPS))
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters()))


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The parameters that two processes, started by torchrun, came to."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("optim_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("name", RULES)
def test_two_processes(two, name):
    """Both hold the same parameters; resumed is straight on, to the bit; shared out (FSDP2) is one process."""
    first, second = two
    for key in (key for key in first if key.startswith(f"{name} ")):
        assert all(torch.equal(a, b) for a, b in zip(first[key], second[key])), key
    for dtype in (torch.float32, torch.bfloat16):
        straight, resumed = (first[f"{name} {dtype} {how}"] for how in ("straight", "resumed"))
        assert all(torch.equal(a, b) for a, b in zip(straight, resumed))
    alone = network(torch.float64)
    advance(alone, RULES[name](alone.parameters()), range(STEPS))
    for a, b in zip(first[f"{name} shared out"], values(alone)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_state_dicts_share_no_memory():
    a, _ = pair(3)
    optimizer = NAdam(a)
    descend(optimizer, a, noise(2, 3))
    tensors = [value for state in optimizer.state_dict()["state"].values() for value in state.values()]
    assert len({value.data_ptr() for value in tensors}) == len(tensors) == 3 * 4


# Sparse gradients ---------------------------------------------------------------------------------------------


def sparse(rows, width=3, height=6, seed=0, dtype=torch.float64):
    """A gradient with the given rows, of which some are given twice."""
    rows = [*rows, rows[0]]
    values = torch.randn(len(rows), width, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return torch.sparse_coo_tensor(torch.tensor([rows]), values, (height, width), check_invariants=True)


def test_sparse_adam_equals_torchs():
    """PyTorch's SparseAdam has the folded form."""
    a, b = pair(shape=(6, 3))
    theirs, ours = torch.optim.SparseAdam(a, lr=0.01), Adam(b, lr=0.01, epsilon="folded")
    for step in range(50):
        gradient = sparse([step % 6, (2 * step + 1) % 6], seed=step)
        descend(theirs, a, [[gradient]])
        descend(ours, b, [[gradient]])
    torch.testing.assert_close(a[0], b[0], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("rule", FAMILY)
def test_sparse_gradients_touch_only_their_rows(rule):
    """Rows that are present move as a dense parameter of those rows would; the others neither move nor decay."""
    (a, _) = pair(shape=(6, 3))
    optimizer = rule(a, lr=0.01, weight_decay=0.1)
    start = a[0].detach().clone()
    rows = nn.Parameter(start[[1, 4]].clone())
    dense = rule([rows], lr=0.01, weight_decay=0.1)
    for step in range(5):
        gradient = sparse([1, 4], seed=step)
        descend(optimizer, a, [[gradient]])
        descend(dense, [rows], [[gradient.to_dense()[[1, 4]]]])
    torch.testing.assert_close(a[0][[1, 4]], rows, rtol=1e-13, atol=1e-15)
    assert torch.equal(a[0][[0, 2, 3, 5]], start[[0, 2, 3, 5]])


# The frame ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", FAMILY)
def test_maximize_is_the_negative_gradient(rule):
    a, b = pair()
    descend(rule(a, maximize=True), a, noise(5))
    descend(rule(b), b, [[-g[0]] for g in noise(5)])
    assert torch.equal(a[0], b[0])


def test_closure_is_called_with_gradients_enabled():
    w = nn.Parameter(torch.tensor([2.0]))
    optimizer = Adam([w], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0 and w.item() == pytest.approx(1.5)


def test_groups_have_options_of_their_own():
    """Rates, moments and a convention of ε differ; each group moves as an optimiser of its own would."""
    a, b = pair(2)
    options = [{"lr": 0.1, "betas": (0.5, 0.9)}, {"lr": 0.01, "eps": 0.5, "epsilon": "folded"}]
    together = Adam([{"params": [p], **o, "note": "mine"} for p, o in zip(a, options)], lr=1.0)
    for gradients in noise(4, 2):
        descend(together, a, [gradients])
    for i, (p, o) in enumerate(zip(b, options)):
        descend(Adam([p], **o), [p], [[step[i]] for step in noise(4, 2)])
    assert all(torch.equal(p, q) for p, q in zip(a, b))


def test_schedulers_of_torch_work():
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = Adam([w], lr=0.1, eps=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(3):
        descend(optimizer, [w], [[torch.ones(1, dtype=torch.float64)]])
        scheduler.step()
    assert w.item() == pytest.approx(-0.175, rel=1e-12)


def test_runs_through_the_cache_change_nothing(monkeypatch):
    """Cut into runs of seven elements, over the ends of parameters, in float64 and stochastically rounded."""
    for dtype, rounding in ((torch.float64, "nearest"), (torch.bfloat16, "stochastic")):
        found = []
        for size in (7, 2**17):
            monkeypatch.setattr(frame, "CACHED", size)
            a, _ = pair(3, dtype)
            a.append(nn.Parameter(torch.zeros(5, 4, dtype=dtype).T))  # not contiguous: stays in one piece
            optimizer = Adam(a, lr=0.05, fused=False, rounding=rounding)
            descend(optimizer, a, [[*step, torch.ones(4, 5, dtype=dtype)] for step in noise(5, 3, dtype)])
            found.append(a)
        for p, q in zip(*found):
            torch.testing.assert_close(p, q, rtol=1e-13 if dtype == torch.float64 else 0, atol=0)


@pytest.mark.parametrize("rule", FAMILY)
def test_capturable_counts_on_the_device(rule):
    """The tensor of the count and of the rate take the place of numbers, with the precision of float32."""
    a, b = pair(dtype=torch.float32)
    gradients = noise(200, dtype=torch.float32)
    options = {"fused": False} if issubclass(rule, Adam) else {}
    optimizer = rule(a, lr=torch.tensor(1e-3), capturable=True, **options)
    descend(optimizer, a, gradients)
    descend(rule(b, lr=1e-3, **options), b, gradients)
    torch.testing.assert_close(a[0], b[0], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("make", [lambda p: AdamW(p, lr=torch.tensor(0.01)), lambda p: NAdam(p, lr=torch.tensor(0.01))])
def test_step_compiles_as_one_graph(make):
    """Without a break in the graph, and twice at most: the state is made in the first step."""
    a, b = pair(2, torch.float32)
    eager, traced = make(a), make(b)
    torch._dynamo.reset()
    step = torch.compile(lambda: traced.step(), backend="aot_eager", fullgraph=True)
    for gradients in noise(6, 2, torch.float32):
        descend(eager, a, [gradients])
        for p, gradient in zip(b, gradients):
            p.grad = gradient.clone()
        step()
    for p, q in zip(a, b):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: Adam(p, lr=-1.0), "lr: expected a number, zero or more, got -1.0"),
        (lambda p: Adam(p, betas=(0.9, 1.0)), r"betas: expected two numbers from 0 to below 1, got \(0.9, 1.0\)"),
        (lambda p: Adam(p, betas=0.9), "betas: expected two numbers from 0 to below 1, got 0.9"),
        (lambda p: Adam(p, eps=-1e-8), "eps: expected a number, zero or more, got -1e-08"),
        (lambda p: Adam(p, epsilon="root"), "epsilon: expected one of outside, inside, folded, got 'root'"),
        (lambda p: Adam(p, v_init=-1.0), "v_init: expected a number, zero or more, got -1.0"),
        (lambda p: AdamW(p, decay="L2"), "decay: expected one of l2, lr, schedule, got 'L2'"),
        (lambda p: AdamW(p, weight_decay=math.nan), "weight_decay: expected a number, zero or more, got nan"),
        (lambda p: AdaMax(p, rounding="up"), "rounding: expected one of nearest, stochastic, got 'up'"),
        (lambda p: NAdam(p, momentum_decay=-1), "momentum_decay: expected a number, zero or more, got -1"),
        (lambda p: Adam([{"params": p, "beta": (0.9, 0.9)}]), "options such as 'betas', got 'beta'"),
        (lambda p: Adam([torch.zeros(2, dtype=torch.complex64)]), "expected parameters of real floating point"),
        (
            lambda p: Adam([torch.zeros(2, dtype=torch.float16)], rounding="stochastic"),
            "rounding: expected 'nearest' for parameters of float16, got 'stochastic'",
        ),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(2))])


def test_what_cannot_be_done_is_refused():
    w = nn.Parameter(torch.zeros(6, 3))
    optimizer = Adam([w], fused=True, epsilon="folded")
    with pytest.raises(ValueError, match="fused: expected contiguous float32 or float64"):
        descend(optimizer, [w], [[torch.ones(6, 3)]])
    w.grad = torch.eye(6, 3).to_sparse()
    with pytest.raises(ValueError, match="expected gradients sparse in their first axis, got 2 sparse axes"):
        Adam([w]).step()

    class Whole(UpdateRule):
        def is_elementwise(self, bucket, group):
            return False

    w.grad = sparse([1], dtype=torch.float32)
    with pytest.raises(ValueError, match="Whole: expected dense gradients, got a sparse one"):
        Whole([w], {"lr": 1.0}).step()


# Clipping -----------------------------------------------------------------------------------------------------


def test_clipping_against_its_formula():
    """One norm over types and over sparse rows; gradients below it are left to the bit."""
    dense, half, rows, idle = (nn.Parameter(torch.zeros(6, 3)) for _ in range(4))
    half.data = half.data.bfloat16()

    def fill():
        dense.grad, half.grad, rows.grad = (
            torch.full((6, 3), 2.0),
            torch.full((6, 3), 1.5).bfloat16(),
            sparse([1, 4]).float(),
        )
        return [p.grad.to_dense().double() for p in (dense, half, rows)]

    before = fill()
    norm = math.sqrt(sum(float(g.square().sum()) for g in before))
    for limit in (1.0, 2 * norm):
        fill()
        assert clip_by_global_norm([dense, half, rows, idle], limit).item() == pytest.approx(norm, rel=1e-6)
        for p, g in zip((dense, half, rows), before):
            wanted = g * min(1.0, limit / norm)
            rounding = 2**-8 if p is half else 1e-6
            torch.testing.assert_close(p.grad.to_dense().double(), wanted, rtol=rounding if limit < norm else 0, atol=0)
    assert idle.grad is None and clip_by_global_norm([idle], 1.0).item() == 0.0
    dense.grad[0, 0] = math.nan
    assert clip_by_global_norm([dense], 1.0).isnan() and dense.grad.isnan().all()
    with pytest.raises(ValueError, match="max_norm: expected a positive number, got 0"):
        clip_by_global_norm([dense], 0.0)


def test_clipping_equals_torchs():
    a, b = (list(network().parameters()) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for p, q in zip(a, b):
        p.grad = torch.randn(p.shape, generator=generator)
        q.grad = p.grad.clone()
    torch.testing.assert_close(clip_by_global_norm(a, 0.5), torch.nn.utils.clip_grad_norm_(b, 0.5))
    for p, q in zip(a, b):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=0)
