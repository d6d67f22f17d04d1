"""Shampoo, SOAP and Muon: against slow float64 programs written from the papers, and what their mathematics promises."""

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

from likely.optim import matrices
from likely.optim.adam import AdamW
from likely.optim.matrixrule import matrix_groups
from likely.optim.muon import Muon
from likely.optim.shampoo import START, Shampoo
from likely.optim.soap import SOAP

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
    w: Array, steps: list[Array], lr: float, b1: float, b2: float, eps: float, matrix_eps: float, decay: float, every: int
) -> Array:
    """Shi et al. 2023 (arXiv 2309.06497), Algorithm 1, with Adam grafting and decoupled decay."""
    w = w.copy()
    left, right = np.zeros((w.shape[0],) * 2), np.zeros((w.shape[1],) * 2)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, g in enumerate(steps, 1):
        left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
        if (t - 1) % every == 0:
            roots = [power(p / (1 - b2**t) + matrix_eps * np.eye(len(p)), -0.25) for p in (left, right)]
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m_hat = m / (1 - b1**t)
        graft = m_hat / (np.sqrt(v / (1 - b2**t)) + eps)
        update = roots[0] @ m_hat @ roots[1]
        w = (1 - lr * decay) * w - lr * update * np.linalg.norm(graft) / np.linalg.norm(update)
    return w


def oracle_soap(
    w: Array, steps: list[Array], lr: float, b1: float, b2: float, eps: float, decay: float, every: int
) -> Array:
    """Vyas et al. 2024, Algorithms 3 and 4; the first moment is kept unrotated, as there.

    The first step gives the bases and does not move, and the columns are sorted, as in the authors' program.
    """
    w = w.copy()
    m, v, steps = np.zeros_like(w), np.zeros_like(w), list(steps)
    first = steps.pop(0)
    p = [(1 - b2) * side(first, i) for i in range(w.ndim)]
    q = [np.linalg.eigh(x)[1][:, ::-1] for x in p]
    w *= 1 - lr * decay
    for t, g in enumerate(steps, 1):
        turned, m = g, b1 * m + (1 - b1) * g
        m_turned = m
        for i, basis in enumerate(q):
            turned, m_turned = along(turned, basis.T, i), along(m_turned, basis.T, i)
        v = b2 * v + (1 - b2) * turned**2
        step = m_turned / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)
        for i, basis in enumerate(q):
            step = along(step, basis, i)
        w = (1 - lr * decay) * w - lr * step
        p = [b2 * x + (1 - b2) * side(g, i) for i, x in enumerate(p)]
        if t % every == 0:
            for i, (x, basis) in enumerate(zip(p, q)):
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
