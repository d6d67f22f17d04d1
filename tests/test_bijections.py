"""Every bijection: its volume against autograd, its inverse, its gradients near and far; and the flows made of them."""

from __future__ import annotations

import itertools
import math
import runpy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import chi2, multivariate_normal
from torch import Tensor, nn

from likely.bijections import (
    LU,
    ActNorm,
    Additive,
    Affine,
    Arcsinh,
    Autoregressive,
    Bijection,
    Chain,
    Conditioned,
    Continuous,
    Coupling,
    Elementwise,
    Householder,
    Inverse,
    InvertibleConvolution,
    Logistics,
    Logit,
    Mixing,
    Permutation,
    Planar,
    Radial,
    Reverse,
    Sigmoid,
    Softplus,
    Spline,
    Sylvester,
    Unconditional,
)
from likely.bijections.roots import increasing_root
from likely.contract import Column, NoCodec, Reals, Table, Unsupported
from likely.models.iaf import IAF
from likely.models.maf import MAF
from likely.models.nsf import NSF
from likely.models.realnvp import RealNVP
from likely.networks.masked import MaskedMLP
from likely.noise import KeyedNoise, StreamNoise

D, CONTEXT = 4, 3


class Maps(nn.Module):
    """A small convolutional conditioner: numbers for ``changed`` channels."""

    def __init__(self, seen: int, changed: int, numbers: int) -> None:
        super().__init__()
        self.layer = nn.Conv2d(seen, numbers * changed, 3, padding=1)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.layer(x)


CHECKERS = [[[(i + j + c) % 2 == 0 for j in range(3)] for i in range(2)] for c in range(2)]
VECTOR, MAP = (D,), (2, 2, 3)

#: name: (maker, shape of an example, whether it has a context)
BIJECTIONS: dict[str, tuple[Callable[[], Bijection], tuple[int, ...], bool]] = {
    "affine": (lambda: Unconditional(Affine(), VECTOR), VECTOR, False),
    "additive": (lambda: Unconditional(Additive(), MAP), MAP, False),
    "arcsinh": (lambda: Unconditional(Arcsinh(), VECTOR), VECTOR, False),
    "sigmoid": (lambda: Unconditional(Sigmoid(), VECTOR), VECTOR, False),
    "softplus": (lambda: Unconditional(Softplus(), VECTOR), VECTOR, False),
    "logit of sigmoid": (lambda: Chain(Unconditional(Sigmoid(), MAP), Unconditional(Logit(), MAP)), MAP, False),
    "spline": (lambda: Unconditional(Spline(5, 2.0), MAP), MAP, False),
    "spline, linear tails, other box": (lambda: Unconditional(Spline(3, (-1.0, 4.0), "linear"), VECTOR), VECTOR, False),
    "spline of one bin": (lambda: Unconditional(Spline(1, 3.0, "linear"), VECTOR), VECTOR, False),
    "logistics": (lambda: Unconditional(Logistics(3), VECTOR), VECTOR, False),
    "conditioned": (lambda: Conditioned(Spline(4), VECTOR, CONTEXT, (8,)), VECTOR, True),
    "conditioned map": (lambda: Conditioned(Affine(), MAP, CONTEXT, (8,)), MAP, True),
    "coupling": (lambda: Coupling(Spline(4), [1, 0, 0, 1], hidden=(8,)), VECTOR, False),
    "coupling, given": (
        lambda: Coupling(Affine(), [0, 1, 0, 0], hidden=(8, 8), context=CONTEXT, residual=True), VECTOR, True
    ),
    "coupling of all, given": (lambda: Coupling(Logistics(2), [0] * D, hidden=(8,), context=CONTEXT), VECTOR, True),
    "coupling of channels": (lambda: Coupling(Spline(3), [1, 0], Maps(1, 1, 8)), MAP, False),
    "coupling of a checkerboard": (lambda: Coupling(Affine(), torch.tensor(CHECKERS), Maps(2, 2, 2)), MAP, False),
    "autoregressive": (lambda: Autoregressive(Affine(), D, hidden=(9, 7)), VECTOR, False),
    "autoregressive, narrow": (lambda: Autoregressive(Affine(), D, hidden=(2,), order=[3, 1, 0, 2]), VECTOR, False),
    "autoregressive map": (lambda: Autoregressive(Spline(3), 12, hidden=(13,)), MAP, False),
    "autoregressive, given": (
        lambda: Autoregressive(
            Spline(4, 3.0, "linear"), D, hidden=(8, 8), order=[2, 0, 3, 1], context=CONTEXT, residual=True
        ),
        VECTOR, True,
    ),
    "autoregressive of one cell, given": (lambda: Autoregressive(Affine(), 1, context=CONTEXT), (1,), True),
    "inverse autoregressive": (lambda: Inverse(Autoregressive(Affine(), D, context=CONTEXT)), VECTOR, True),
    "autoregressive logistics": (lambda: Autoregressive(Logistics(2), D, hidden=(8,)), VECTOR, False),
    "permutation": (lambda: Permutation([2, 0, 3, 1]), VECTOR, False),
    "reverse": (lambda: Reverse(2), MAP, False),
    "mixing": (lambda: Mixing(D), VECTOR, False),
    "LU": (lambda: LU(D), VECTOR, False),
    "LU from a permutation": (lambda: LU(D, start="permutation"), VECTOR, False),
    "LU from the identity": (lambda: LU(2, start="identity"), MAP, False),
    "convolution": (lambda: InvertibleConvolution(2), MAP, False),
    "convolution, plain": (lambda: InvertibleConvolution(2, decomposed=False), MAP, False),
    "reflections": (lambda: Householder(D, 3), VECTOR, False),
    "actnorm": (lambda: ActNorm(D), VECTOR, False),
    "actnorm of channels": (lambda: ActNorm(2), MAP, False),
    "planar": (lambda: Planar(D), VECTOR, False),
    "planar, given": (lambda: Planar(D, CONTEXT), VECTOR, True),
    "radial": (lambda: Radial(D), VECTOR, False),
    "radial, given": (lambda: Radial(D, CONTEXT), VECTOR, True),
    "Sylvester": (lambda: Sylvester(D, 2), VECTOR, False),
    "Sylvester, given": (lambda: Sylvester(D, context=CONTEXT), VECTOR, True),
    "continuous": (lambda: Continuous(D, (8,)), VECTOR, False),
    "continuous, given, rk4": (lambda: Continuous(D, (8,), CONTEXT, solver="rk4", steps=16), VECTOR, True),
    "chain": (
        lambda: Chain(ActNorm(D), LU(D), Autoregressive(Spline(3), D, hidden=(8,)), Inverse(LU(D)), Reverse(D)),
        VECTOR, False,
    ),
}  # fmt: skip

#: Those whose inverse is right to the tolerance of a solver only, and those that end in an interval.
SOLVED = [name for name in BIJECTIONS if name.startswith("continuous")]
EXACT = [name for name in BIJECTIONS if name not in SOLVED]
OPEN = [name for name in EXACT if name not in ("sigmoid", "softplus", "logit of sigmoid")]


def made(name: str, n: int = 3, size: float = 0.4) -> tuple[Bijection, Tensor, Tensor | None]:
    """The bijection in float64 with every weight moved, n examples, and their context."""
    maker, shape, given = BIJECTIONS[name]
    with torch.random.fork_rng():
        torch.manual_seed(5)
        bijection = maker().double()
        with torch.no_grad():
            for parameter in bijection.parameters():
                parameter.add_(size * torch.randn_like(parameter))
        x = 1.5 * torch.randn(n, *shape, dtype=torch.float64)
        return bijection, x, torch.randn(n, CONTEXT, dtype=torch.float64) if given else None


def jacobians(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """∂ function / ∂ x of every example by itself, shape ``(n, D, D)``."""
    size = x[0].numel()
    found = [torch.autograd.functional.jacobian(lambda v, i=i: function(v, i), x[i]) for i in range(len(x))]
    return torch.stack([jacobian.reshape(size, size) for jacobian in found])


def own(context: Tensor | None, i: int) -> Tensor | None:
    return None if context is None else context[i : i + 1]


@pytest.mark.parametrize("name", BIJECTIONS)
def test_volume_is_that_of_autograd(name: str) -> None:
    bijection, x, context = made(name)
    _, log_det = bijection(x, context)
    assert log_det.shape == (len(x),)
    expected = jacobians(lambda v, i: bijection(v[None], own(context, i))[0].flatten(), x).slogdet()[1]
    torch.testing.assert_close(log_det, expected, rtol=1e-9, atol=1e-6 if name in SOLVED else 1e-9)
    assert (
        name in ("additive", "permutation", "reverse", "reflections", "logit of sigmoid") or log_det.abs().max() > 1e-3
    )


@pytest.mark.parametrize("name", BIJECTIONS)
def test_inverse_comes_back_with_the_opposite_volume(name: str) -> None:
    bijection, x, context = made(name, n=7)
    z, log_det = bijection(x, context)
    back, log_det_back = bijection.inverse(z, context)
    tolerance = 1e-6 if name in SOLVED else 1e-8
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=10 * tolerance)
    if name == "spline":
        assert (z - x).abs().max() > 0.1  # it does something


@pytest.mark.parametrize("name", EXACT)
def test_single_precision_comes_back_too(name: str) -> None:
    bijection, x, context = made(name, n=50, size=0.2)
    bijection, x = bijection.float(), x.float()
    context = None if context is None else context.float()
    with torch.no_grad():
        z, log_det = bijection(x, context)
        back, log_det_back = bijection.inverse(z, context)
        again, _ = bijection(back, context)
    assert z.dtype == log_det.dtype == back.dtype == torch.float32
    torch.testing.assert_close(again, z, rtol=3e-5, atol=3e-5)  # to rounding, where a flat curve lets x itself be vague
    torch.testing.assert_close(back, x, rtol=0, atol=3e-3)
    torch.testing.assert_close(log_det_back, -log_det, rtol=0, atol=2e-2)


@pytest.mark.parametrize("name", EXACT)
def test_gradients_go_both_ways(name: str) -> None:
    """By finite differences: of x, z and every parameter, through the map and through its inverse."""
    bijection, x, context = made(name, n=2)
    weights = torch.randn(2, *x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def value(function: Callable[..., tuple[Tensor, Tensor]], at: Tensor) -> Tensor:
        y, log_det = function(at, context)
        return (weights[0] * y + 0.1 * weights[1] * y.square()).sum() + log_det.sin().sum()

    with torch.no_grad():
        z, _ = bijection(x, context)
    for function, at in ((bijection, x.clone()), (bijection.inverse, z.clone())):
        leaves = [at.requires_grad_(), *(p for p in bijection.parameters())]
        slopes = torch.autograd.grad(value(function, at), leaves, allow_unused=True)
        for leaf, slope in zip(leaves, slopes):
            if slope is None:
                continue
            direction = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            direction /= direction.norm()
            with torch.no_grad():
                values = []
                for sign in (1.0, -1.0):
                    leaf.add_(sign * 1e-6 * direction)
                    values.append(value(function, at))
                    leaf.sub_(sign * 1e-6 * direction)
            expected = (values[0] - values[1]) / 2e-6
            torch.testing.assert_close((slope * direction).sum(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", OPEN)
def test_far_outside_all_is_finite(name: str, dtype: torch.dtype) -> None:
    bijection, x, context = made(name, n=6)
    bijection = bijection.to(dtype)
    context = None if context is None else context.to(dtype)
    for far in (1e2, 1e6):
        for function in (bijection, bijection.inverse):
            if name == "arcsinh" and function == bijection.inverse:
                continue  # grows like an exponential: there is nothing out there
            at = (x.sign() * far).to(dtype).requires_grad_()
            y, log_det = function(at, context)
            assert torch.isfinite(y).all() and torch.isfinite(log_det).all()
            parameters = [p for p in bijection.parameters() if p.requires_grad]
            slopes = torch.autograd.grad((y / far).sum() + log_det.sum(), [at, *parameters], allow_unused=True)
            assert all(slope is None or torch.isfinite(slope).all() for slope in slopes)


@pytest.mark.parametrize("name", [name for name, (_, _, given) in BIJECTIONS.items() if given and name not in SOLVED])
def test_the_context_matters_and_is_asked_for(name: str) -> None:
    bijection, x, context = made(name)
    assert context is not None
    context = context.requires_grad_()
    z, log_det = bijection(x, context)
    (slope,) = torch.autograd.grad(z.sum() + log_det.sum(), context)
    assert (slope != 0).any(1).all()
    if "autoregressive" not in name:
        with pytest.raises(ValueError, match="context: this bijection was built with one, got None"):
            bijection(x)


# Elementwise transforms --------------------------------------------------------------------------------------------

TRANSFORMS: dict[str, Elementwise] = {
    "affine": Affine(),
    "arcsinh": Arcsinh(),
    "spline": Spline(6, (-2.0, 3.0)),
    "spline, linear tails": Spline(6, 2.0, "linear"),
    "logistics": Logistics(4),
    "softplus": Softplus(),
    "sigmoid": Sigmoid(),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_increases_with_a_continuous_slope(name: str) -> None:
    transform = TRANSFORMS[name]
    x = torch.linspace(-6.0, 6.0, 24001, dtype=torch.float64)
    random = torch.Generator().manual_seed(2)
    for _ in range(3):
        numbers = 0.7 * torch.randn(transform.numbers, 1, generator=random, dtype=torch.float64)
        z, log_slope = transform.forward(x, numbers.expand(-1, len(x)))
        assert (z.diff() > 0).all()
        between = torch.log(z.diff() / x.diff())
        middle = 0.5 * (log_slope[1:] + log_slope[:-1])
        assert (between - middle).abs().max() < 0.05  # no jump, not at a knot and not at an end of the box
        back, _ = transform.inverse(z[::50], numbers.expand(-1, len(z[::50])))
        torch.testing.assert_close(back, x[::50], rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["arcsinh", "affine", "spline", "spline, linear tails", "logistics"])
def test_zero_numbers_are_mild(name: str) -> None:
    transform = TRANSFORMS[name]
    x = torch.linspace(-8.0, 8.0, 101, dtype=torch.float64)
    z, log_slope = transform.forward(x, torch.zeros(transform.numbers, 101, dtype=torch.float64))
    expected = torch.asinh(x) if name == "arcsinh" else x
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-12)
    if name != "arcsinh":
        torch.testing.assert_close(log_slope, torch.zeros_like(x), rtol=0, atol=1e-12)


def spline_of_the_paper(x: float, numbers: np.ndarray, bins: int, box: float) -> tuple[float, float]:
    """Equations 4 and 5 of Durkan et al. 2019, one number at a time."""
    if abs(x) >= box:
        return x, 1.0

    def sizes(raw: np.ndarray) -> np.ndarray:
        share = np.exp(raw) / np.exp(raw).sum()
        return 2 * box * (1e-3 + (1 - 1e-3 * bins) * share)

    xs = -box + np.concatenate([[0.0], np.cumsum(sizes(numbers[:bins]))])
    ys = -box + np.concatenate([[0.0], np.cumsum(sizes(numbers[bins : 2 * bins]))])
    raw = numbers[2 * bins :] + math.log(math.expm1(1 - 1e-3))
    slopes = np.concatenate([[1.0], 1e-3 + np.log1p(np.exp(raw)), [1.0]])
    k = int(np.searchsorted(xs, x, side="right")) - 1
    w, h = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
    s, t = h / w, (x - xs[k]) / w
    below = s + (slopes[k + 1] + slopes[k] - 2 * s) * t * (1 - t)
    z = ys[k] + h * (s * t**2 + slopes[k] * t * (1 - t)) / below
    slope = s**2 * (slopes[k + 1] * t**2 + 2 * s * t * (1 - t) + slopes[k] * (1 - t) ** 2) / below**2
    return z, slope


def test_spline_is_that_of_the_paper() -> None:
    spline, random = Spline(5, 2.5), np.random.default_rng(0)
    for _ in range(60):
        x, numbers = 1.5 * random.normal(), random.normal(size=spline.numbers)
        z, log_slope = spline.forward(torch.tensor([x], dtype=torch.float64), torch.tensor(numbers).unsqueeze(1))
        expected = spline_of_the_paper(x, numbers, 5, 2.5)
        assert (z.item(), log_slope.exp().item()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("tails", ["identity", "linear"])
@pytest.mark.parametrize("bins", [1, 2, 7])
def test_the_spline_s_written_derivative(tails: str, bins: int) -> None:
    """Against the plain operations, first and second order; forward mode and vmap take these."""
    spline = Spline(bins, (-2.0, 3.0), tails)
    random = torch.Generator().manual_seed(bins)
    x = (3 * torch.randn(5, 4, generator=random, dtype=torch.float64)).requires_grad_()
    numbers = torch.randn(spline.numbers, 5, 4, generator=random, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 5, 4, generator=random, dtype=torch.float64)
    assert (x.abs() > 3).any() and (x.abs() < 2).any()

    def slopes(found: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        value = (weights[0] * found[0]).sum() + (weights[1] * found[1]).sum()
        first = torch.autograd.grad(value, (x, numbers), create_graph=True)
        second = torch.autograd.grad(sum(s.sin().sum() for s in first), (x, numbers))
        return (*found, *first, *second)

    written, plain = slopes(spline.forward(x, numbers)), slopes(spline.plain(x, numbers))
    for got, expected in zip(written, plain):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["relu", "elu", "tanh", "gelu", "silu", "softplus"])
def test_autoregressive_steps_written_derivative(activation: str, residual: bool) -> None:
    """Two steps as one node against each by itself and the plain operations, first and second order; the way back;
    and the same under autocast."""
    torch.manual_seed(1)
    options = {"context": CONTEXT, "activation": activation, "residual": residual}
    first = Autoregressive(Affine(), D, hidden=(8, 8, 8), order=[2, 0, 3, 1], **options)
    steps = Chain(first, Autoregressive(Affine(), D, hidden=(8, 8), order=[1, 0, 2, 3], **options)).double()
    x = torch.randn(6, D, dtype=torch.float64, requires_grad=True)
    context = torch.randn(6, CONTEXT, dtype=torch.float64, requires_grad=True)
    leaves = [x, context, *steps.parameters()]
    with torch.no_grad():
        for parameter in steps.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    weights = torch.randn(6, D, dtype=torch.float64)

    def slopes(found: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        value = (weights * found[0]).sum() + found[1].sin().sum()
        first = torch.autograd.grad(value, leaves, create_graph=True)
        second = torch.autograd.grad(sum(slope.sin().sum() for slope in first), leaves)
        return (*found, *first, *second)

    def one_by_one(apply: Callable[[Autoregressive, Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        z, log_det = x, torch.zeros(6, dtype=torch.float64)
        for step in steps:
            z, more = apply(step, z)
            log_det = log_det + more
        return z, log_det

    def plain(step: Autoregressive, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_slope = step.columns(x, *step.arguments(context))
        return z.t(), log_slope.sum(0)

    expected = slopes(one_by_one(plain))
    for found in (steps(x, context), one_by_one(lambda step, x: step(x, context))):
        for got, wanted in zip(slopes(found), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        z, _ = steps(x, context)
        torch.testing.assert_close(steps.inverse(z, context)[0], x.detach(), rtol=0, atol=1e-8)
    steps, x, context = steps.float(), x.detach().float(), context.detach().float()
    wanted = steps(x, context)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = steps(x, context)[0]
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
        got.sum().backward()


def test_the_way_back_of_one_example_leaves_the_parameters_and_can_be_gone_on_from() -> None:
    """What is computed without a graph writes on nothing that is given, and is a constant of a graph to come."""
    torch.manual_seed(0)
    step = Autoregressive(Affine(), D, hidden=(8, 8), context=CONTEXT)
    with torch.no_grad():
        for parameter in step.parameters():
            parameter.normal_()
    before = {name: tensor.clone() for name, tensor in step.state_dict().items()}
    z, context = torch.randn(1, D), torch.randn(1, CONTEXT)
    with torch.no_grad():
        x, log_det = step.inverse(z, context)
    for name, tensor in step.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    again, backwards = step(x, context)
    torch.testing.assert_close(again, z, rtol=0, atol=1e-4)
    torch.testing.assert_close(backwards, -log_det)
    (again.sum() + (log_det * backwards).sum()).backward()
    assert all(parameter.grad is not None for parameter in step.parameters())


def test_logistics_are_a_mixture() -> None:
    """σ(z) is the mixture's distribution function, and its slope the density."""
    transform = Logistics(3)
    numbers = torch.randn(9, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = torch.linspace(-5, 5, 41, dtype=torch.float64)
    z, log_slope = transform.forward(x, numbers.expand(-1, 41))
    logits, means, raw = numbers.reshape(3, 3)
    shares, scales = logits.softmax(0), (7 * (raw / 7).tanh()).exp()
    cdf = sum(p * torch.sigmoid((x - m) / s) for p, m, s in zip(shares, means, scales))
    torch.testing.assert_close(z.sigmoid(), cdf, rtol=1e-10, atol=1e-12)
    slope = log_slope.exp() * z.sigmoid() * (-z).sigmoid()
    density = sum(
        p * torch.sigmoid((x - m) / s) * torch.sigmoid((m - x) / s) / s for p, m, s in zip(shares, means, scales)
    )
    torch.testing.assert_close(slope, density, rtol=1e-9, atol=1e-12)


def test_a_root_is_found_where_newton_alone_would_leave() -> None:
    """arctan sends Newton's method away from far starts; a cubic has slope 0 at its root."""
    target = torch.tensor([0.0, 1.2, -1.5], dtype=torch.float64)
    found = increasing_root(lambda x: (torch.atan(x), 1 / (1 + x * x)), target, target * 0 - 1e6, target * 0 + 1e7)
    torch.testing.assert_close(found, target.tan(), rtol=1e-9, atol=1e-12)
    zero = increasing_root(lambda x: (x**3, 3 * x * x), target * 0, target * 0 - 1.0, target * 0 + 3.0)
    assert zero.abs().max() < 1e-5


# What is particular to some ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "context", "residual"), [((5,), 0, False), ((9, 6), 2, False), ((7, 7, 7), 2, True)])
def test_masked_network_is_triangular_and_walks_to_the_same_numbers(width, context, residual) -> None:
    torch.manual_seed(0)
    order = [3, 0, 4, 1, 2]
    network = MaskedMLP(5, 3, width, context, order, "tanh", residual).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(4, 5, dtype=torch.float64)
    given = torch.randn(4, context, dtype=torch.float64) if context else None
    slopes = torch.autograd.functional.jacobian(lambda v: network(v, given).sum((0, 1)), x).sum(1)
    for a, b in itertools.product(range(5), range(5)):
        sees = order.index(b) < order.index(a)
        assert bool(slopes[a, b] != 0) == sees, f"cell {a} and cell {b}"
    for graph in (True, False):
        with torch.set_grad_enabled(graph):
            walk = network.walk(4, given)
            steps = [next(walk)] + [walk.send(x[:, feature]) for feature in order[:-1]]
            torch.testing.assert_close(torch.stack(steps, 2), network(x, given)[:, :, order])


def test_degrees_of_hidden_units_cover_the_features() -> None:
    for features, width, context in itertools.product((1, 2, 5, 64), (1, 3, 64, 100), (0, 2)):
        (degrees,) = MaskedMLP(features, 1, (width,), context).degrees
        lowest = 0 if context or features == 1 else 1
        assert degrees == sorted(degrees) and degrees[-1] == features - 1
        if width >= features - lowest:
            assert set(degrees) == set(range(lowest, features))


def test_a_residual_network_starts_linear_and_refuses_what_is_none() -> None:
    torch.manual_seed(0)
    network, *others = (MaskedMLP(4, 3, hidden, residual=None).double() for hidden in ((9, 9), (9, 8), (9,)))
    assert network.residual and not any(other.residual for other in others)
    x = torch.randn(2, 6, 4, dtype=torch.float64)
    torch.testing.assert_close(network(x[0] + x[1]) + network(0.0 * x[0]), network(x[0]) + network(x[1]))
    for hidden in ((9,), (9, 8)):
        with pytest.raises(ValueError, match="hidden: a residual network has two layers or more, of one width, got"):
            MaskedMLP(4, 3, hidden, residual=True)
    with pytest.raises(RuntimeError, match="_starts_linear"):
        network.load_state_dict(MaskedMLP(4, 3, (9, 9), residual=False).state_dict())


def test_mask_is_refused_that_changes_nothing_and_order_that_is_none() -> None:
    with pytest.raises(ValueError, match="expected cells to change"):
        Coupling(Affine(), [True, True])
    with pytest.raises(ValueError, match="order: expected a permutation of 0 to 2"):
        Permutation([0, 0, 2])
    with pytest.raises(ValueError, match="order: expected a permutation of 0 to 1"):
        Autoregressive(Affine(), 2, order=[1, 2])
    with pytest.raises(ValueError, match="tails: expected 'identity' or 'linear', got 'none'"):
        Spline(4, 1.0, "none")
    with pytest.raises(ValueError, match="bounds: expected finite lo < hi, got 2"):
        Spline(4, (2.0, 1.0))


def test_actnorm_starts_from_the_data_and_survives_a_constant() -> None:
    x = (
        torch.randn(50, 3, 2, 2, generator=torch.Generator().manual_seed(0))
        * torch.tensor([2.0, 0.1, 0.0])[:, None, None]
    )
    x = x + 7.0
    norm = ActNorm(3)
    norm.initialise(x)
    z, log_det = norm(x)
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.std((0, 2, 3), correction=0), torch.tensor([1.0, 1.0, 0.0]), rtol=1e-4, atol=1e-4)
    assert torch.isfinite(log_det).all() and norm.log_scale[2] == 0


def test_a_chain_starts_each_from_what_those_before_it_make() -> None:
    x = 5 + 3 * torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    first, second = ActNorm(2), ActNorm(2)
    chain = Chain(first, Mixing(2), second)
    chain.initialise(x)
    z, _ = chain(x)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(2), rtol=1e-4, atol=1e-4)
    assert first.shift.abs().max() > 1 > second.shift.abs().max()


def test_hutchinson_is_right_on_average_and_its_noise_is_given() -> None:
    torch.manual_seed(0)
    exact = Continuous(3, (8,), solver="rk4", steps=8)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.mul_(3.0)
    estimate = Continuous(3, (8,), trace="hutchinson", solver="rk4", steps=8)
    estimate.load_state_dict(exact.state_dict())
    x = torch.randn(1, 3).expand(4000, 3)
    with torch.no_grad():
        estimate.noise = KeyedNoise(0, torch.arange(4000))
        z, found = estimate(x)
        torch.testing.assert_close(z, exact(x)[0])
        expected = exact(x[:1])[1].item()
    error = found.std().item() / math.sqrt(4000)
    assert abs(found.mean().item() - expected) < 4.5 * error
    assert abs(expected) > 10 * error  # the right sign could be told


# Flows -------------------------------------------------------------------------------------------------------------

FLOWS = {"maf": MAF, "iaf": IAF, "nsf": NSF, "realnvp": RealNVP}


def flow(name: str, size: float = 0.3, dims: int = 3, **options):
    """A small flow in float64 with every weight moved."""
    torch.manual_seed(1)
    model = FLOWS[name](Reals((dims,)), transforms=2, hidden=(8,), activation="tanh", **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model.eval()


def test_a_linear_flow_is_a_normal_law() -> None:
    """ActNorm and LU before a normal base: N(−W⁻¹b …, (AᵀA)⁻¹) in closed form."""
    torch.manual_seed(0)
    linear = Chain(ActNorm(3), LU(3), Householder(3)).double()
    with torch.no_grad():
        for parameter in linear.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model = MAF(Reals((3,)), transforms=1).double()
    model.bijection = linear
    x = torch.randn(9, 3, dtype=torch.float64)
    zero = torch.zeros(1, 3, dtype=torch.float64)
    b = linear(zero)[0].detach().numpy()[0]
    a = np.stack([linear(e[None])[0].detach().numpy()[0] - b for e in torch.eye(3).double()], 1)
    law = multivariate_normal(-np.linalg.solve(a, b), np.linalg.inv(a.T @ a))
    np.testing.assert_allclose(model.bound(x).nats.detach().numpy(), law.logpdf(x.numpy()), rtol=1e-10)


@pytest.mark.parametrize("name", FLOWS)
def test_mass_of_a_plane_is_one_by_quadrature(name: str) -> None:
    model = flow(name, dims=2, tails="normal")
    edges = torch.linspace(-16.0, 16.0, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(edges, edges)
    with torch.no_grad():
        mass = model.bound(grid).nats.exp().sum().item() * float(edges[1] - edges[0]) ** 2
    assert mass == pytest.approx(1.0, abs=5e-3)


@pytest.mark.parametrize("name", FLOWS)
def test_samples_come_as_often_as_the_density_says(name: str) -> None:
    """z of samples, through the density's direction, is standard normal: radius by χ², and each pair of signs.

    Power: a model whose samples were scaled by 1.05, or whose one pair of cells had correlation 0.06, would fail with
    probability above 0.99 (20,000 samples; each statistic is held to 4.5 of its standard errors).
    """
    model, n = flow(name), 20_000
    with torch.no_grad():
        x = model.sample(n, noise=StreamNoise(torch.Generator().manual_seed(0)))
        z = model.encode(x)

    def statistics(z: Tensor) -> list[float]:
        radius = chi2.cdf(z.square().sum(1).numpy(), z.shape[1])
        found = [(radius.mean() - 0.5) * math.sqrt(12 * n), (radius.var() - 1 / 12) * math.sqrt(180 * n)]
        found += [(z[:, i] * z[:, j]).mean().item() * math.sqrt(n) for i in range(3) for j in range(i)]
        return found

    assert max(map(abs, statistics(z))) < 4.5
    assert max(map(abs, statistics(1.05 * z))) > 4.5
    mixed = torch.cat([z[:, :2], (0.06 * z[:, :1] + math.sqrt(1 - 0.06**2) * z[:, 2:])], 1)
    assert max(map(abs, statistics(mixed))) > 4.5


def test_one_autoregressive_transform_has_the_conditionals_of_its_cells() -> None:
    """column_nats of one transform: what changing later cells cannot change."""
    torch.manual_seed(0)
    model = MAF(Reals((3,)), transforms=1, hidden=(8,)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    other = x.clone()
    other[:, 2] += 1.0
    with torch.no_grad():
        before, after = model.column_nats(x), model.column_nats(other)
        torch.testing.assert_close(before[:, :2], after[:, :2])
        assert (before[:, 2] != after[:, 2]).all()
        torch.testing.assert_close(before.sum(1), model.bound(x).nats)


@pytest.mark.parametrize("name", FLOWS)
def test_no_row_is_out_of_reach(name: str) -> None:
    """With heavy tails a row of 1,000 deviations costs some hundred nats at most, not half a million."""
    torch.manual_seed(0)
    x = torch.randn(500, 3)
    far = torch.tensor([[1e3, 0.0, 0.0], [-1e3, 1e3, -1e3]])
    model = FLOWS[name](Reals((3,)), transforms=2, hidden=(8,))
    model.initialise([(x, None)])
    assert (model.bound(far).nats > -500).all()
    model.loss(far).value.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    plain = FLOWS[name](Reals((3,)), transforms=2, hidden=(8,), tails="normal")
    plain.initialise([(x, None)])
    assert (plain.bound(far).nats < -1e4).all()


def test_start_brings_raw_columns_to_standard_units_with_their_volume() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.tensor([1e6, -3.0]) + torch.tensor([1e4, 1e-3]) * torch.randn(4000, 2, generator=random)
    model = NSF(Reals((2,)), transforms=1, hidden=(8,), tails="normal")
    model.initialise([(x[:2500], None), (x[2500:], None)])
    nats = model.bound(x).nats.mean().item()
    entropy = 2 * 0.5 * math.log(2 * math.pi * math.e) + math.log(1e4) + math.log(1e-3)
    assert nats == pytest.approx(-entropy, abs=0.1)


def test_a_table_is_its_codes_and_its_numbers_given_them() -> None:
    columns = (Column("kind", "categorical", levels=3), Column("a", "real"), Column("n", "integer"))
    torch.manual_seed(0)
    kind = torch.randint(3, (3000,)).double()
    rows = torch.stack([kind, torch.randn(3000).double() + 4 * kind, torch.poisson(3.0 + kind)], 1)
    model = NSF(Table(columns=columns), transforms=1, hidden=(16,))
    model.initialise([(rows, None)])
    bound = model.bound(rows)
    assert bound.kind == "lower bound" and list(bound.parts) == ["base", "log_det", "codes"]
    assert NSF(Table(columns=columns[:2])).kind == "exact"
    z = model.encode(rows)
    torch.testing.assert_close(model.decode(z), rows, rtol=1e-5, atol=1e-4)
    drawn = model.sample(200, noise=StreamNoise(torch.Generator().manual_seed(0)))
    model.space.validate(drawn)
    weights = model.log_weights(rows[:300], None, 64, StreamNoise(torch.Generator().manual_seed(0)))
    assert (weights.logsumexp(1) - math.log(64)).mean() > weights.mean()  # more draws, a tighter bound


def test_what_a_flow_is_not_for_is_refused_with_what_is() -> None:
    with pytest.raises(Unsupported, match=r"needs complete examples.*fill the holes first.*'made'"):
        NSF(Reals((2,), missing=True))
    with pytest.raises(Unsupported, match="needs a numeric column, got none; use model 'made'"):
        MAF(Table(columns=(Column("a", "binary"),)))
    with pytest.raises(NoCodec, match="models with a codec for such data are"):
        IAF(Reals((2,))).codec()
    with pytest.raises(ValueError, match="conditioner: expected 'autoregressive' or 'coupling', got 'coupled'"):
        NSF(Reals((2,)), conditioner="coupled")
    with pytest.raises(ValueError, match="tails: expected 'heavy' or 'normal', got 'fat'"):
        RealNVP(Reals((2,)), tails="fat")


def test_recipe_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    papers = Path(__file__).parent.parent / "papers"
    monkeypatch.syspath_prepend(str(papers))
    monkeypatch.setattr("sys.argv", ["maf_uci.py", "--dry-run"])
    runpy.run_path(str(papers / "maf_uci.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("# ")
