"""The probability flow of a diffusion model: an exact density of its own, and an embedding.

The ordinary differential equation with the diffusion's marginals (Song et al. 2021, arXiv 2011.13456, section 4.3) is,
with the level γ as its clock,

    dz/dγ = ½ σ (ε̂ − σ z),                 d log p(z)/dγ = −div(dz/dγ),

so that log p(z_0) = log N(z_1; 0, I) + ∫_{γ_0}^{γ_1} div dγ.  The flow is *another model* than the chain whose bound
:mod:`likely.diffusion.bound` computes: its density may be higher or lower, and the two do not belong in one column.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from likely.diffusion.bound import Denoise
from likely.diffusion.parameterisation import alpha_sigma
from likely.noise import Noise

#: Cells up to which the divergence is computed exactly when the caller does not say.
EXACT_CELLS = 64


def velocity(denoise: Denoise, z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Tensor:
    """dz/dγ at levels ``gamma``, shape ``(batch,)``: shape of ``z``."""
    _, sigma = alpha_sigma(gamma, z)
    return 0.5 * sigma * (denoise(z, gamma, context).eps - sigma * z)


def flow(denoise: Denoise, z: Tensor, grid: Tensor, context: Tensor | None = None) -> Tensor:
    """z carried along the flow from the first level of the grid to the last, either way (classical Runge-Kutta rule).

    Args:
        z: shape ``(batch, *shape)``.
        grid: levels, rising or falling, shape ``(steps + 1,)``; four evaluations a step, error of order 4.
    """

    def slope(gamma: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (velocity(denoise, state[0], gamma.expand(len(z)), context),)

    return _runge_kutta(slope, (z,), grid)[0]


def log_density(
    denoise: Denoise,
    z: Tensor,
    grid: Tensor,
    context: Tensor | None = None,
    noise: Noise | None = None,
    probes: int = 1,
) -> Tensor:
    """log p(z) of the flow at the first level of a rising grid, in nats: shape ``(batch,)``.

    The error of the integral falls with the fourth power of the number of steps: compare two grids.

    Args:
        noise: where the probes of Hutchinson's estimate of the divergence come from, which is unbiased; None for the
            exact divergence, at the cost of one derivative for each cell.
        probes: random signs for each example, the same at every step (Grathwohl et al. 2019, arXiv 1810.01367).
    """
    n, cells = len(z), math.prod(z.shape[1:])
    if noise is None:
        directions = torch.eye(cells, dtype=z.dtype, device=z.device).reshape(cells, 1, *z.shape[1:])
        directions, share = directions.expand(cells, *z.shape), 1.0
    else:
        signs = noise.uniform((n, probes, *z.shape[1:])).to(z)
        directions, share = torch.where(signs < 0.5, -1.0, 1.0).to(z).movedim(1, 0), 1.0 / probes

    def slope(gamma: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            at = state[0].detach().requires_grad_()
            dz = velocity(denoise, at, gamma.expand(n), context)
            divergence = torch.zeros(n, dtype=z.dtype, device=z.device)
            for direction in directions:
                (pulled,) = torch.autograd.grad(dz, at, direction, retain_graph=True)
                divergence = divergence + share * (pulled * direction).flatten(1).sum(1)
        return dz.detach(), divergence.detach()

    end, gained = _runge_kutta(slope, (z, torch.zeros(n, dtype=z.dtype, device=z.device)), grid)
    base = -0.5 * (end.square() + math.log(2.0 * math.pi)).flatten(1).sum(1)
    return base + gained


def _runge_kutta(
    slope: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]], state: tuple[Tensor, ...], grid: Tensor
) -> tuple[Tensor, ...]:
    """The state at the end of the grid by the classical rule of order 4."""

    def moved(by: Tensor, along: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(value + by * direction for value, direction in zip(state, along))

    levels = grid.to(state[0])
    for start, stop in itertools.pairwise(levels):
        h = stop - start
        k1 = slope(start, state)
        k2 = slope(start + 0.5 * h, moved(0.5 * h, k1))
        k3 = slope(start + 0.5 * h, moved(0.5 * h, k2))
        k4 = slope(stop, moved(h, k3))
        state = moved(h / 6.0, tuple(a + 2.0 * b + 2.0 * c + d for a, b, c, d in zip(k1, k2, k3, k4)))
    return state
