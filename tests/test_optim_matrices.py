"""Shampoo, SOAP and Muon: against slow float64 programs written from the papers, and what their theory promises."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linprog
from torch import Tensor, nn

from likely import processor
from likely.optim import matrices
from likely.optim.adam import AdamW, adam_update, quick_adam_update
from likely.optim.matrixrule import matrix_groups
from likely.optim.muon import Muon
from likely.optim.shampoo import START, Shampoo
from likely.optim.soap import SOAP, soap_update

Array = NDArray[np.float64]
#: As a user calls them, with what makes them exact.
EXACT: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "muon": lambda params, **options: Muon(params, **{"precision": "full", "method": "svd", **options}),
    "shampoo": lambda params, **options: Shampoo(params, **{"interval": 3, **options}),
    "soap": lambda params, **options: SOAP(params, **{"interval": 3, **options}),
}


def gradients(shape: tuple[int, ...], steps: int, seed: int = 0) -> list[Array]:
    """Gradients that are correlated along both sides and in time, as those of a network are."""
    rng = np.random.default_rng(seed)
    mixers = [np.linalg.qr(rng.normal(size=(n, n)))[0] * np.geomspace(3, 0.1, n) for n in shape]
    state, found = rng.normal(size=shape), []
    for _ in range(steps):
        state = 0.7 * state + rng.normal(size=shape)
        g = state
        for axis, mixer in enumerate(mixers):
            g = np.moveaxis(np.tensordot(mixer, g, (1, axis)), 0, axis)
        found.append(g)
    return found


def run(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, steps: list[Array]) -> Array:
    for g in steps:
        parameter.grad = torch.from_numpy(g).to(parameter.dtype)
        optimizer.step()
    return parameter.detach().double().numpy()


def parameter(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.from_numpy(np.random.default_rng(9).normal(size=shape)).to(dtype))


# Oracles: one step after another, one parameter, float64 ------------------------------------------------------


def side(g: Array, axis: int) -> Array:
    rows = np.moveaxis(g, axis, 0).reshape(g.shape[axis], -1)
    return rows @ rows.T


def along(g: Array, matrix: Array, axis: int) -> Array:
    return np.moveaxis(np.tensordot(matrix, g, (1, axis)), 0, axis)


def power(p: Array, exponent: float) -> Array:
    values, vectors = np.linalg.eigh(p)
    return (vectors * values**exponent) @ vectors.T


def turns_of(w: Array, every: int) -> list[int]:
    """The longest side has the first turn, and so on."""
    by_length = sorted(range(w.ndim), key=lambda i: -w.shape[i])
    return [by_length.index(i) % every for i in range(w.ndim)]


def oracle_shampoo(w: Array, steps: list[Array], lr: float, eps: float) -> Array:
    """Gupta, Koren & Singer 2018, Algorithm 2 (Algorithm 1 for matrices)."""
    w, k = w.copy(), w.ndim
    h = [eps * np.eye(n) for n in w.shape]
    for g in steps:
        update = g
        for i in range(k):
            h[i] = h[i] + side(g, i)
            update = along(update, power(h[i], -1 / (2 * k)), i)
        w -= lr * update
    return w


def oracle_shampoo_grafted(
    w: Array,
    steps: list[Array],
    lr: float,
    b1: float,
    b2: float,
    eps: float,
    matrix_eps: float,
    decay: float,
    every: int,
) -> Array:
    """Shi et al. 2023 (arXiv 2309.06497), Algorithm 1, with Adam grafting and decoupled decay; a turn for each side."""
    w, turns, roots = w.copy(), turns_of(w, every), {}
    p = [np.zeros((n, n)) for n in w.shape]
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(steps, 1):
        p = [b2 * x + (1 - b2) * side(g, i) for i, x in enumerate(p)]
        for i in range(2):
            if (t - 1) % every == turns[i]:
                roots[i] = power(p[i] / (1 - b2**t) + matrix_eps * np.eye(len(p[i])), -0.25)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m_hat = m / (1 - b1**t)
        graft = m_hat / (np.sqrt(v / (1 - b2**t)) + eps)
        update = roots[0] @ m_hat @ roots[1] if len(roots) == 2 else graft
        w = (1 - lr * decay) * w - lr * update * np.linalg.norm(graft) / np.linalg.norm(update)
    return w


def oracle_soap(
    w: Array, steps: list[Array], lr: float, b1: float, b2: float, eps: float, decay: float, every: int
) -> Array:
    """Vyas et al. 2024, Algorithms 3 and 4; the first moment is kept unrotated, as there.

    The first steps give the bases, a step a side, and do not move; columns are sorted as in the authors' program.
    """
    w, turns, q = w.copy(), turns_of(w, every), {}
    m, v = np.zeros_like(w), np.zeros_like(w)
    p, start = [np.zeros((n, n)) for n in w.shape], 1 + max(turns)
    for step_number, g in enumerate(steps[:start]):
        p = [b2 * x + (1 - b2) * side(g, i) for i, x in enumerate(p)]
        q |= {i: np.linalg.eigh(p[i])[1][:, ::-1] for i in range(w.ndim) if turns[i] == step_number}
        w *= 1 - lr * decay
    for t, g in enumerate(steps[start:], 1):
        turned, m = g, b1 * m + (1 - b1) * g
        m_turned = m
        for i, basis in q.items():
            turned, m_turned = along(turned, basis.T, i), along(m_turned, basis.T, i)
        v = b2 * v + (1 - b2) * turned**2
        step = m_turned / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        for i, basis in q.items():
            step = along(step, basis, i)
        w = (1 - lr * decay) * w - lr * step
        p = [b2 * x + (1 - b2) * side(g, i) for i, x in enumerate(p)]
        for i, (x, basis) in enumerate(zip(p, [q[i] for i in range(w.ndim)])):
            if (start + t - 1) % every == turns[i]:
                order = np.argsort(-np.diag(basis.T @ x @ basis), kind="stable")
                v = np.take(v, order, axis=i)
                q[i] = np.linalg.qr(x @ basis[:, order])[0]
    return w


def oracle_muon(w: Array, steps: list[Array], lr: float, mu: float, decay: float, nesterov: bool) -> Array:
    """Jordan et al. 2024 with the scale of Liu et al. 2025, and an exact singular value decomposition."""
    w = w.copy()
    b = np.zeros_like(w)
    for g in steps:
        b = mu * b + g
        u, _, vt = np.linalg.svd(g + mu * b if nesterov else b, full_matrices=False)
        w = w - lr * decay * w - lr * 0.2 * math.sqrt(max(w.shape)) * (u @ vt)
    return w


@pytest.mark.parametrize("shape", [(5, 7), (7, 5), (3, 4, 5)])
def test_shampoo_is_the_papers_algorithm(shape: tuple[int, ...]) -> None:
    steps, w = gradients(shape, 60), parameter(shape)
    expected = oracle_shampoo(w.detach().numpy(), steps, 0.1, 1e-4)
    options = {"betas": (0.0, 1.0), "graft": "none", "interval": 1, "matrix_eps": 1e-4, "weight_decay": 0.0}
    found = run(Shampoo([w], lr=0.1, merge=False, **options), w, steps)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("every", [1, 4])
def test_shampoo_with_averages_and_grafting(every: int) -> None:
    steps, w = gradients((5, 7), 80), parameter((5, 7))
    expected = oracle_shampoo_grafted(w.detach().numpy(), steps, 0.01, 0.9, 0.95, 1e-8, 1e-6, 0.1, every)
    options = {"matrix_eps": 1e-6, "interval": every, "weight_decay": 0.1}
    found = run(Shampoo([w], lr=0.01, betas=(0.9, 0.95), **options), w, steps)
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", [(6, 6), (5, 6), (6, 5), (3, 4, 5)])
@pytest.mark.parametrize("every", [1, 4])
def test_soap_is_the_papers_algorithm(shape: tuple[int, ...], every: int) -> None:
    """Sides differ by at most one: the first gradient would leave a basis undefined in its null space."""
    steps, w = gradients(shape, 80), parameter(shape)
    expected = oracle_soap(w.detach().numpy(), steps, 0.01, 0.9, 0.95, 1e-8, 0.1, every)
    found = run(SOAP([w], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, interval=every, merge=False), w, steps)
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (7, 5)])
def test_muon_is_the_published_algorithm(shape: tuple[int, ...], nesterov: bool) -> None:
    steps, w = gradients(shape, 200), parameter(shape)
    expected = oracle_muon(w.detach().numpy(), steps, 0.01, 0.9, 0.1, nesterov)
    found = run(EXACT["muon"]([w], lr=0.01, momentum=0.9, nesterov=nesterov, weight_decay=0.1), w, steps)
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)


# torch.optim.Muon ---------------------------------------------------------------------------------------------


def small_network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 6)]
    return nn.Sequential(*layers).to(dtype)


def descend(model: nn.Module, optimizers: list[torch.optim.Optimizer], steps: int, seed: int = 0) -> None:
    """Steps of a small regression."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(32, 12, generator=generator).to(next(model.parameters()).dtype)
        target = torch.sin(x[:, :6] * 2) * x[:, 6:]
        model.zero_grad()
        (model(x) - target).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("precision", ["full", "bfloat16"])
def test_muon_equals_torchs(adjust: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 steps; in full precision PyTorch's is made to orthogonalise in float64 too."""
    dtype = torch.float64 if precision == "full" else torch.float32
    if precision == "full":
        monkeypatch.setattr(Tensor, "bfloat16", lambda x: x.clone())
    theirs, ours = small_network(dtype), small_network(dtype)
    parts = [[p for p in theirs.parameters() if (p.dim() == 2) == two] for two in (True, False)]
    muon = torch.optim.Muon(parts[0], lr=0.01, weight_decay=0.1, adjust_lr_fn=adjust)
    rest = torch.optim.AdamW(parts[1], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    jordan = {"method": "newton-schulz", "iterations": 5, "precision": precision, "adjust": adjust}
    both = Muon(ours.parameters(), lr=0.01, weight_decay=0.1, **jordan)
    steps = 3 if precision == "bfloat16" else 1000 if adjust == "original" else 50
    descend(theirs, [muon, rest], steps)
    descend(ours, [both], steps)
    tolerance = 1e-12 if precision == "full" else 1e-3
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert (a - b).abs().max() <= tolerance * b.abs().max()


# Products in bfloat16 -----------------------------------------------------------------------------------------

#: Largest relative error of rounding to bfloat16; of some dozens of operations in float32 one after another.
HALF, SINGLE = 2.0**-8, 2.0**-18


@pytest.mark.parametrize("shape", [(5, 7), (64, 48), (130, 300)])
def test_soaps_products_in_bfloat16_err_as_much_as_rounding_may(shape: tuple[int, int]) -> None:
    """Against float64.  Each of two products in a row rounds both factors, and the last one its result: five times.

    So turned gradients err by at most D = ((1 + u)⁵ − 1) |Q_L|ᵀ |G| |Q_R|.  √V̂ is a norm of them over time, hence errs
    by at most that norm of D, M̂ by their mean of D; N' = M̂ / (√V̂ + ε) and the products back follow.
    """
    rng = np.random.default_rng(4)
    basis = [np.linalg.qr(rng.normal(size=(n, n)))[0].astype(np.float32) for n in shape]
    left, right = (q.astype(np.float64) for q in basis)
    chain = (1 + HALF) ** 5 * (1 + SINGLE) - 1
    tensors = [torch.from_numpy(q)[None] for q in basis]
    m, v = torch.zeros(1, *shape), torch.zeros(1, *shape)
    exact_m, exact_v, error_m, error_v = (np.zeros(shape) for _ in range(4))
    b1, b2, eps = 0.9, 0.95, 1.0
    for t, g in enumerate(gradients(shape, 4, seed=1), 1):
        g = (g / g.std()).astype(np.float32).astype(np.float64)
        turned, error = left.T @ g @ right, chain * np.abs(left).T @ np.abs(g) @ np.abs(right)
        exact_m, error_m = b1 * exact_m + (1 - b1) * turned, b1 * error_m + (1 - b1) * error
        exact_v, error_v = b2 * exact_v + (1 - b2) * turned**2, b2 * error_v + (1 - b2) * error**2
        m_hat, below = exact_m / (1 - b1**t), np.sqrt(exact_v / (1 - b2**t)) + eps
        step, change = m_hat / below, np.sqrt(error_v / (1 - b2**t))
        error = (error_m / (1 - b1**t) + np.abs(step) * change) / np.maximum(below - change, eps) + SINGLE * np.abs(
            step
        )
        bound = np.abs(left) @ (error + chain * (np.abs(step) + error)) @ np.abs(right).T
        found = soap_update(torch.from_numpy(g).float()[None], m, v, tensors, t, b1, b2, eps, precision="bfloat16")
        off = np.abs(found[0].double().numpy() - left @ step @ right.T)
        assert (off <= bound).all()
        assert off.max() > 2.0**-20  # float32 would not err so much


@pytest.mark.parametrize("shape", [(1, 64, 48), (3, 70, 130), (1, 520, 530)])
def test_statistics_of_rounded_gradients_are_summed_in_float32(shape: tuple[int, int, int]) -> None:
    """A Gram matrix whose factors need no rounding is as good as in float32, and one that is rounded stays ⪰ 0."""
    g = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for x, factor in ((g.to(torch.bfloat16).float(), 0.0), (g, HALF)):
        total = torch.ones(shape[0], shape[1], shape[1])
        matrices.accumulate_gram(total, x, 0.5, 0.25, rounded=True)
        exact = 0.5 + 0.25 * x.double() @ x.double().mT
        size = 0.5 + 0.25 * x.double().abs() @ x.double().abs().mT
        sums = (shape[2] + 2) * 2.0**-24
        assert ((total - exact).abs() <= ((1 + factor) ** 2 * (1 + sums) - 1) * size).all()
        values = torch.linalg.eigvalsh(total.double())
        assert (values[:, 0] >= -shape[1] * sums * size.amax((1, 2))).all()


def test_large_matrices_of_float32_are_rounded_where_tiles_multiply_them() -> None:
    shapes = {(1, 384, 384): True, (3, 128, 512): True, (100, 64, 64): False, (1, 8, 12, 9): False}
    for shape, large in shapes.items():
        assert matrices.in_bfloat16("auto", torch.zeros(shape)) == (large and matrices.TILES)
        assert not matrices.in_bfloat16("auto", torch.zeros(shape, dtype=torch.float64))
        assert matrices.in_bfloat16("bfloat16", torch.zeros(shape)) > matrices.in_bfloat16("full", torch.zeros(shape))


def test_shampoos_products_in_bfloat16_err_as_much_as_rounding_may() -> None:
    """Against float64, from one spectral norm to the next.

    Statistics err by at most E = ((1 + u)² − 1) Σ |G| |G|ᵀ, so that both roots of them are of matrices not below λ, and
    a root A = L^−p errs by p λ^(−p−1) |E| (its derivative), by rounding by u |A|_F, and the products by another u each.
    """
    steps, eps, lr, p = gradients((9, 12), 5), 1.0, 0.1, 0.25
    steps = [(g / np.linalg.norm(g)).astype(np.float32).astype(np.float64) for g in steps]
    w = parameter((9, 12), torch.float32)
    h, errors, bound = [eps * np.eye(n) for n in w.shape], [np.zeros((n, n)) for n in w.shape], 0.0
    for g in steps:
        norms, with_errors = [np.linalg.norm(g)], [np.linalg.norm(g) * (1 + HALF)]
        for axis in range(2):
            h[axis] = h[axis] + side(g, axis)
            errors[axis] += ((1 + HALF) ** 2 * (1 + SINGLE) - 1) * side(np.abs(g), axis)
            e, root = np.linalg.norm(errors[axis], 2), power(h[axis], -p)
            least = max(eps, np.linalg.eigvalsh(h[axis])[0] - e)
            change = p * least ** (-p - 1) * e + SINGLE * np.linalg.norm(root, 2)
            norms.append(np.linalg.norm(root, 2))
            with_errors.append(
                (norms[-1] + change + HALF * (np.linalg.norm(root) + len(root) ** 0.5 * change)) * (1 + HALF)
            )
        bound += lr * (math.prod(with_errors) - math.prod(norms))
    options = {"betas": (0.0, 1.0), "graft": "none", "interval": 1, "matrix_eps": eps, "weight_decay": 0.0}
    start = w.detach().double().numpy()
    found = run(Shampoo([w], lr=lr, precision="bfloat16", **options), w, steps)
    expected = oracle_shampoo(start, steps, lr, eps)
    assert 1e-4 < np.linalg.norm(found - expected) <= bound < 0.2 * np.linalg.norm(expected - start)


@pytest.mark.parametrize("setting", ["none", "ieee", "bf16"])
def test_rounding_of_factors_ends_with_its_context(setting: str) -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = setting
        found = matmul.fp32_precision
        with pytest.raises(ZeroDivisionError), processor.rounded_factors():
            assert matmul.fp32_precision == "bf16"
            raise ZeroDivisionError
        assert matmul.fp32_precision == found
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adam_by_the_kernel_is_adam_by_its_formulas(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    ours, theirs = ([torch.zeros(3, 40, 50, dtype=dtype) for _ in range(2)] for _ in range(2))
    for t in range(1, 6):
        g = torch.randn(3, 40, 50, generator=generator, dtype=dtype)
        found = quick_adam_update(g, *ours, t, 0.9, 0.95, 1e-8)
        (expected,) = adam_update([g], [theirs[0]], [theirs[1]], t, 0.9, 0.95, 1e-8)
        torch.testing.assert_close([found, *ours], [expected, *theirs], rtol=64 * torch.finfo(dtype).eps, atol=0)


# Eigenbases and roots -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("scale", [1e-12, 1e-4, 1e4])
def test_eigenbases_of_matrices_of_low_rank_with_empty_rows(seed: int, scale: float) -> None:
    """As of the gradient of a layer that sees dark pixels: most of LAPACK's float32 eigenvectors may be NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 40, generator=generator) * torch.logspace(0, -18, 300)[:, None]
    x[::3] = 0
    p = scale * (x @ x.mT)[None]
    q = matrices.eigenbasis(p)[0].double()
    torch.testing.assert_close(q.mT @ q, torch.eye(300).double(), rtol=0, atol=1e-4)
    turned = q.mT @ p[0].double() @ q
    off = turned - torch.diag(torch.diag(turned))
    assert off.abs().max() <= 1e-4 * turned.abs().max()
    assert (torch.diag(turned).diff() <= 1e-4 * turned.abs().max()).all()


def test_what_is_not_finite_gives_nan_and_no_error() -> None:
    p = torch.full((1, 3, 3), math.inf)
    assert matrices.eigenbasis(p).isnan().all()
    assert matrices.matrix_power(p, -0.25, 0.0).isnan().all()


# Orthogonalisation --------------------------------------------------------------------------------------------


def image(polynomials: Any, x: Array) -> Array:
    for a, b, c in polynomials:
        x = a * x + b * x**3 + c * x**5
    return x


@pytest.mark.parametrize(("floor", "iterations"), [(5e-3, 4), (1e-3, 5), (1.3e-2, 3)])
def test_polar_express_is_the_best_polynomial_each_time(floor: float, iterations: int) -> None:
    """Each quintic against the minimax problem solved as a linear program on a grid."""
    low, high = floor, 1.0
    for a, b, c in matrices.polar_express(floor, iterations):
        x = np.concatenate([np.linspace(low, high, 3000), np.geomspace(low, high, 3000)])
        powers = np.stack([x, x**3, x**5], 1)
        ones = np.ones((len(x), 1))
        constraints = np.block([[powers, -ones], [-powers, -ones]])
        best = linprog([0, 0, 0, 1], constraints, np.concatenate([ones, -ones]), bounds=[(None, None)] * 4)
        found = np.abs(image([(a, b, c)], x) - 1).max()
        assert found == pytest.approx(best.fun, rel=1e-3, abs=1e-6)
        low, high = image([(a, b, c)], np.array([low]))[0], 1 + found
    assert low == pytest.approx(2 - high, abs=1e-9)


def test_four_best_iterations_are_nearer_to_one_than_five_of_jordans() -> None:
    """Over all singular values that either promises anything for, as parts of the norm that it divides by."""
    x = np.geomspace(5e-3, 1, 100_001)
    ours = np.abs(image(matrices.coefficients(4, 5e-3), x) - 1)
    theirs = np.abs(image([matrices.JORDAN] * 5, x) - 1)
    assert ours.max() < 0.13 < 0.31 < theirs.max()
    assert np.sqrt((ours**2).mean()) < 0.5 * np.sqrt((theirs**2).mean())


@pytest.mark.parametrize("shape", [(6, 6), (6, 9), (5, 12), (12, 5), (3, 800)])
@pytest.mark.parametrize("iterations", [1, 3, 4])
def test_iterations_are_polynomials_of_the_singular_values(shape: tuple[int, int], iterations: int) -> None:
    """Whether composed in pairs or not, and whichever side they work on."""
    x = np.random.default_rng(2).normal(size=shape)
    u, values, vt = np.linalg.svd(x, full_matrices=False)
    for method, norm in (("polar-express", (values**8).sum() ** 0.125), ("newton-schulz", np.linalg.norm(values))):
        jordans = method == "newton-schulz"
        polynomials = [matrices.JORDAN] * iterations if jordans else matrices.coefficients(iterations, 5e-3)
        expected = u * image(polynomials, values / norm) @ vt
        found = matrices.orthogonalized(torch.from_numpy(x)[None], method, iterations, 5e-3, 1e-7)[0].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_large_symmetric_products_from_one_triangle() -> None:
    x = torch.randn(2, 800, 70, dtype=torch.float64)
    a = matrices.gram(x)
    torch.testing.assert_close(a, x @ x.mT)
    b = 0.3 * a @ a - a  # commutes with a
    found = matrices.commuting_product_plus(a, b, a, alpha=0.5, beta=2.0)
    torch.testing.assert_close(found, 0.5 * a @ b + 2 * a)
    single = x[:1].float()
    torch.testing.assert_close(
        matrices.gram(single).double(), single.double() @ single.double().mT, rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize(
    ("shape", "spectrum"),
    [
        *itertools.product([(40, 40), (40, 100), (100, 40)], ["gaussian", "geometric", "outlier"]),
        ((800, 800), "geometric"),
    ],
)
def test_orthogonalised_matrices_are_near_the_polar_factor(shape: tuple[int, int], spectrum: str) -> None:
    """In bfloat16, at least as near as the five iterations of torch.optim.Muon; singular values in [0.7, 1.2]."""
    rng = np.random.default_rng(0)
    k = min(shape)
    x = rng.normal(size=shape)
    if spectrum != "gaussian":
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        x = (
            u * (np.geomspace(1, 0.03, k) if spectrum == "geometric" else np.r_[10.0, rng.uniform(0.2, 1, k - 1)])
        ) @ vt
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    cosine, values = {}, {}
    for method, iterations in (("polar-express", 4), ("newton-schulz", 5)):
        half = torch.from_numpy(x)[None].to(torch.bfloat16)
        o = matrices.orthogonalized(half, method, iterations, 5e-3, 1e-7)[0].double().numpy()
        cosine[method] = (o * (u @ vt)).sum() / np.linalg.norm(o) / math.sqrt(k)
        values[method] = np.diag(u.T @ o @ vt.T)
    assert cosine["polar-express"] > cosine["newton-schulz"] - 1e-3
    inner = values["polar-express"][np.linalg.svd(x, compute_uv=False) > 0.02 * np.linalg.norm(x, 2)]
    assert inner.min() >= 0.7
    assert inner.max() <= 1.2


# What the mathematics promises --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["muon", "muon, iterated", "shampoo", "soap"])
def test_turning_a_weights_sides_turns_its_path(name: str) -> None:
    """W → U W Vᵀ with gradients U G Vᵀ gives U W_t Vᵀ; Adam, whose axes are the elements', fails this."""
    rng = np.random.default_rng(3)
    u, v = (np.linalg.qr(rng.normal(size=(6, 6)))[0] for _ in range(2))
    steps, w = gradients((6, 6), 60), np.random.default_rng(9).normal(size=(6, 6))

    def path(make: Callable[..., torch.optim.Optimizer], u: Array, v: Array) -> Array:
        p = nn.Parameter(torch.from_numpy(u @ w @ v.T))
        return run(make([p], lr=0.02), p, [u @ g @ v.T for g in steps])

    options = {"method": "polar-express"} if name == "muon, iterated" else {"graft": "sgd"} if name == "shampoo" else {}

    def make(params: Any, lr: float) -> torch.optim.Optimizer:
        return EXACT[name.split(",")[0]](params, lr=lr, **options)

    np.testing.assert_allclose(path(make, u, v), u @ path(make, np.eye(6), np.eye(6)) @ v.T, rtol=1e-6, atol=1e-7)
    assert np.abs(path(AdamW, u, v) - u @ path(AdamW, np.eye(6), np.eye(6)) @ v.T).max() > 1e-2


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("name", list(EXACT))
def test_steps_are_bounded_whatever_the_gradients_scale(name: str, scale: float) -> None:
    """The root mean square of a step is at most about α, and does not depend on the gradient's scale."""
    p, lr = parameter((8, 12)), 0.01
    optimizer = EXACT[name]([p], lr=lr, weight_decay=0.0, **({"eps": 0.0} if name != "muon" else {}))
    sizes = []
    for g in gradients((8, 12), 40):
        before = p.detach().clone()
        p.grad = torch.from_numpy(scale * g)
        optimizer.step()
        sizes.append((p.detach() - before).square().mean().sqrt().item())
    assert max(sizes) <= 2 * lr
    assert sizes[-1] >= 0.05 * lr


def test_shampoo_twice_is_full_matrix_adagrad_where_the_gradients_are_a_kronecker_product() -> None:
    """The gradients A E_ij B over all i, j have the second moment H = (A Aᵀ) ⊗ (Bᵀ B).

    Their L = tr(Bᵀ B) A Aᵀ and R = tr(A Aᵀ) Bᵀ B, so that L^−¼ ⊗ R^−¼ is H^−¼ up to the traces, and twice that is the
    root H^−½ of full-matrix Adagrad.
    """
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(3, 3)), rng.normal(size=(4, 4))
    units = [np.outer(np.eye(3)[i], np.eye(4)[j]) for i, j in itertools.product(range(3), range(4))]
    steps = [a @ e @ b for e in units]
    full = sum(np.outer(g.ravel(), g.ravel()) for g in steps)
    scale = (np.trace(a @ a.T) * np.trace(b.T @ b)) ** 0.25

    def preconditioned(last: Array) -> Array:
        w = nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
        options = {"betas": (0.0, 1.0), "graft": "none", "interval": 1, "matrix_eps": 1e-14, "weight_decay": 0.0}
        optimizer = Shampoo([w], lr=1.0, **options)
        run(optimizer, w, steps)
        for i, outer in enumerate((a @ a.T * np.trace(b.T @ b), b.T @ b * np.trace(a @ a.T))):
            np.testing.assert_allclose(optimizer.state[w][f"statistics.{i}"].numpy(), outer, rtol=1e-9, atol=1e-9)
            optimizer.state[w][f"statistics.{i}"].sub_(torch.from_numpy(side(last, i)))  # which the step will add
        before = w.detach().numpy().copy()
        return (before - run(optimizer, w, [last])) * scale

    g = rng.normal(size=(3, 4))
    expected = (power(full, -0.5) @ g.ravel()).reshape(3, 4)
    np.testing.assert_allclose(preconditioned(preconditioned(g)), expected, rtol=1e-6, atol=1e-8)


def test_soap_in_a_fixed_basis_is_adam_in_turned_coordinates() -> None:
    steps, w = gradients((5, 6), 50), parameter((5, 6))
    optimizer = SOAP([w], lr=0.01, weight_decay=0.0, interval=1000)
    optimizer.turns_of(0).sides = [0, 0]  # the bases of the first step stay
    run(optimizer, w, steps[:1])
    left, right = (optimizer.state[w][f"basis.{i}"].numpy().copy() for i in range(2))
    turned = nn.Parameter(torch.from_numpy(left.T @ w.detach().numpy() @ right))
    found = run(optimizer, w, steps[1:])
    adam = AdamW([turned], lr=0.01, betas=(0.95, 0.95), weight_decay=0.0)
    expected = run(adam, turned, [left.T @ g @ right for g in steps[1:]])
    np.testing.assert_allclose(found, left @ expected @ right.T, rtol=1e-9, atol=1e-11)


# Blocks, turns, groups ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Shampoo, SOAP])
def test_blocks_are_parameters_of_their_own(kind: Any) -> None:
    steps, whole = gradients((6, 10), 40), parameter((6, 10))
    pieces = [nn.Parameter(part.clone()) for part in whole.detach().split(5, dim=1)]
    run(optimizer := kind([whole], lr=0.01, interval=1, block=6), whole, steps)
    assert sum(name.startswith("statistics") for name in optimizer.state[whole]) == 4
    separate = kind(pieces, lr=0.01, interval=1)
    for g in steps:
        for piece, part in zip(pieces, np.split(g, 2, axis=1)):
            piece.grad = torch.from_numpy(part)
        separate.step()
    torch.testing.assert_close(whole.detach(), torch.cat([p.detach() for p in pieces], 1), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [Shampoo, SOAP])
def test_a_side_that_is_too_long_keeps_its_own_axes(kind: Any) -> None:
    w = parameter((6, 10))
    run(optimizer := kind([w], lr=0.01, max_side=8), w, gradients((6, 10), 3))
    assert optimizer.state[w]["statistics.0"].shape == (6, 6)
    assert "statistics.1" not in optimizer.state[w]


@pytest.mark.parametrize("kind", [Muon, Shampoo, SOAP])
def test_parameters_do_not_see_their_batch(kind: Any) -> None:
    """Many of equal shape move as each alone would, at the turn it has."""
    steps = [gradients((4, 5), 30, seed) for seed in range(6)]
    options = {"precision": "full"} if kind is Muon else {"interval": 1}
    together = [parameter((4, 5)) for _ in steps]
    optimizer = kind(together, lr=0.01, **options)
    for row in zip(*steps):
        for p, g in zip(together, row):
            p.grad = torch.from_numpy(g)
        optimizer.step()
    for p, mine in zip(together, steps):
        alone = parameter((4, 5))
        expected = run(kind([alone], lr=0.01, **options), alone, mine)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", [Muon, Shampoo, SOAP])
def test_a_batch_shares_memory_and_its_saved_state_does_not(kind: Any) -> None:
    """Also when one of its parameters has no gradient for a while, so that the others do not fill the memory."""
    options = {"precision": "full"} if kind is Muon else {"interval": 1}
    together, alone = ([parameter((4, 5)) for _ in range(3)] for _ in range(2))
    optimizer, separate = kind(together, lr=0.01, **options), [kind([p], lr=0.01, **options) for p in alone]
    for number, row in enumerate(zip(*(gradients((4, 5), 9, seed) for seed in range(3)))):
        for i, g in enumerate(row):
            together[i].grad = alone[i].grad = None if i == 1 and number in (3, 4) else torch.from_numpy(g)
            separate[i].step()
        optimizer.step()
    for p, q in zip(together, alone):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    name = "momentum" if kind is Muon else "basis.0"
    assert len({optimizer.state[p][name].untyped_storage().data_ptr() for p in together}) == 1
    saved = [state[name] for state in optimizer.state_dict()["state"].values()]
    assert len({tensor.untyped_storage().data_ptr() for tensor in saved}) == 3


@pytest.mark.parametrize("interval", [1, 4, 30])
def test_turns_share_out_the_renewals(interval: int) -> None:
    shapes = [(30, 30), (30, 20), (10, 10), (20,), (10, 10), (10, 10), (16, 16)]
    params = [parameter(shape, torch.float32) for shape in shapes]
    optimizer = SOAP(params, interval=interval)
    when: dict[tuple[int, int], list[int]] = {}
    for t in range(1, 2 * interval + START + 1):
        before = {}
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape)
            state = optimizer.state[p]
            before |= {(i, k): state.get(f"basis.{k}", torch.eye(n)).clone() for k, n in enumerate(p.shape)}
        optimizer.step()
        for (i, k), old in before.items():
            if f"basis.{k}" in optimizer.state[params[i]]:
                renewed = not torch.equal(old, optimizer.state[params[i]][f"basis.{k}"])
                when.setdefault((i, k), []).extend([t] if renewed else [])
    assert len(when) == 12
    for steps in when.values():
        assert steps[0] <= START
        assert all(later - earlier == interval for earlier, later in itertools.pairwise(steps[1:]))
        assert 0 < steps[1] - steps[0] <= interval
    if interval > 1:
        assert len({steps[1] % interval for steps in when.values()}) == min(interval, len(when))


def test_what_is_no_matrix_moves_by_adamw() -> None:
    for make in (Muon, Shampoo, SOAP):
        model, other = small_network(), small_network()
        groups = [{"params": [p], "matrices": False} for p in model.parameters()]
        descend(model, [make(groups, lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))], 5)
        descend(other, [AdamW(other.parameters(), lr=0.01, weight_decay=0.1, betas=(0.9, 0.95))], 5)
        for a, b in zip(model.parameters(), other.parameters()):
            assert torch.equal(a, b)


def test_groups_of_a_model() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Conv1d(4, 3, 2), nn.Linear(3, 5))
    inside, rest = matrix_groups(model, but=["2"])
    assert [tuple(p.shape) for p in inside["params"]] == [(3, 4, 2)]
    assert len(rest["params"]) == 4
    with pytest.raises(ValueError, match="but: expected the beginning of a parameter's name, got 'head'"):
        matrix_groups(model, but=["head"])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (Muon, {"momentum": 1.0}, "momentum: expected a number from 0 to below 1, got 1.0"),
        (Muon, {"method": "cubic"}, "method: expected one of polar-express, newton-schulz, svd, got 'cubic'"),
        (Muon, {"floor": 0.0}, "floor: expected a number between 0 and 1, got 0.0"),
        (Shampoo, {"interval": 0}, "interval: expected a whole number above zero, got 0"),
        (Shampoo, {"graft": "rms"}, "graft: expected one of adam, sgd, none, got 'rms'"),
        (Shampoo, {"betas": (0.9, 1.0)}, "betas: expected β₂ below 1 where Adam is used"),
        (SOAP, {"block": 0}, "block: expected a whole number above zero or None, got 0"),
        (SOAP, {"precision": "half"}, "precision: expected one of auto, bfloat16, full, got 'half'"),
        (SOAP, {"statistics_beta": 1.0}, "statistics_beta: expected a number from 0 to below 1, got 1.0"),
    ],
)
def test_options_are_checked(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        kind([parameter((2, 2))], **options)


def test_sparse_gradients_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="expected dense gradients, got a sparse one"):
        Muon(embedding.parameters()).step()
    Muon([{"params": list(embedding.parameters()), "matrices": False}]).step()


# Resumption ---------------------------------------------------------------------------------------------------


def round_trip(state: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    torch.save(state, tmp_path / "state.pt")
    return torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Muon, Shampoo, SOAP])
@pytest.mark.parametrize("precision", ["full", "bfloat16"])
@pytest.mark.parametrize("stop", [2, 7, 13])
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    kind: Any, dtype: torch.dtype, precision: str, stop: int, tmp_path: Path
) -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = small_network(dtype)
        rounding = {"rounding": "stochastic"} if dtype == torch.bfloat16 else {}
        options = {"precision": precision} if kind is Muon else {"precision": precision, "interval": 4}
        return model, kind(model.parameters(), lr=0.01, **rounding, **options)

    model, optimizer = make()
    for seed in range(20):
        descend(model, [optimizer], 1, seed)
    first, saved = make()
    for seed in range(stop):
        descend(first, [saved], 1, seed)
    again, resumed = make()
    again.load_state_dict(first.state_dict())
    resumed.load_state_dict(round_trip(saved.state_dict(), tmp_path))
    for seed in range(stop, 20):
        descend(again, [resumed], 1, seed)
    for a, b in zip(again.parameters(), model.parameters()):
        assert torch.equal(a, b)
    for p, q in zip(again.parameters(), model.parameters()):
        for name, value in optimizer.state[q].items():
            assert torch.equal(resumed.state[p][name], value), name
            assert value.dtype == torch.float32


PROCESSES = """
import os
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from likely.optim.muon import Muon
from likely.optim.shampoo import Shampoo
from likely.optim.soap import SOAP

torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))

def data(step):
    return torch.randn(16, 12, generator=torch.Generator().manual_seed(step)).double()

def train(wrap, kind, options, steps, state=None, weights=None):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12)).double()
    if weights is not None:
        model.load_state_dict(weights)
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    elif wrap == "fsdp":
        fully_shard(model, mesh=mesh)
    optimizer = kind(model.parameters(), lr=0.02, **options)
    if state is not None:
        optimizer.load_state_dict(state)
    for step in steps:
        x = data(step) if wrap == "one" else data(step)[8 * rank : 8 * rank + 8]
        optimizer.zero_grad()
        (model(x) - torch.sin(2 * x)).square().mean().backward()
        optimizer.step()
    inner = model.module if wrap == "ddp" else model
    full = {n: p.detach().clone() for n, p in inner.named_parameters()}
    full = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in full.items()}
    return full, optimizer.state_dict()

exact = {"precision": "full"}
often = {"interval": 3}
for kind, options in ((Muon, exact), (Shampoo, {"matrix_eps": 1e-8, **often}), (SOAP, often)):
    one, _ = train("one", kind, options, range(10))
    for wrap in ("ddp", "fsdp"):
        two, _ = train(wrap, kind, options, range(10))
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-8, msg=f"{kind.__name__} {wrap} {name}")
    half, state = train("ddp", kind, options, range(5))
    resumed, _ = train("ddp", kind, options, range(5, 10), state, half)
    straight, _ = train("ddp", kind, options, range(10))
    assert all(torch.equal(resumed[name], straight[name]) for name in one), kind
dist.barrier()
dist.destroy_process_group()
print("equal", flush=True)
os._exit(0)  # at the interpreter's end a thread of PyTorch's is at times torn down while it runs, which aborts
"""


def test_two_processes_make_the_steps_of_one(tmp_path: Path) -> None:
    """With replicated weights (DDP) and with weights shared out (FSDP2); and a resumed run equals a straight one."""
    script, meeting = tmp_path / "processes.py", tmp_path / "meeting"
    script.write_text(PROCESSES)
    commands = [[sys.executable, str(script), str(rank), str(meeting)] for rank in range(2)]
    running = [
        subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=tmp_path) for c in commands
    ]
    for process in running:
        told, _ = process.communicate(timeout=300)
        assert process.returncode == 0, told
        assert "equal" in told
