"""From noise to an example: steps from a level γ_t to a lower one, γ_s, of a diffusion model.

A sampler is given a denoiser ``(z, γ, context) -> (x̂, ε̂)`` and a falling grid of levels.  With
h = (γ_t − γ_s)/2, half the rise of log SNR, and c = 1 − exp(−2h):

    ancestral   z_s = (α_s/α_t) (z − σ_t c ε̂) + σ_s √c ξ                            p(z_s | z_t) of the bound in T steps
    ddim        z_s = α_s x̂ + σ_s ε̂                                                  order 1
    heun        slopes (y − x̂)/s of y = z/α against s = σ/α, averaged over both ends   order 2, two evaluations a step
    dpm         z_s = (σ_s/σ_t) z − α_s (e^(−h) − 1) D,  D = x̂ + (x̂ − x̂_before)/2r     order 2, r = h_before/h
    sde         z_s = (σ_s/σ_t) e^(−h) z + α_s c D + σ_s √c ξ                          with noise

(Kingma et al. 2021, 2107.00630; Song et al. 2020, 2010.02502; Karras et al. 2022, 2206.00364, algorithms 1,
2; Lu et al. 2022, 2211.01095, algorithm 2.)  Only ``ancestral`` on the chain's own grid draws from the law that the
bound speaks of.  Guidance and clipping of x̂ are kept here: neither has a likelihood.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from likely.contract import check_options
from likely.diffusion.bound import Denoise
from likely.diffusion.parameterisation import Pair, alpha_sigma
from likely.noise import Noise

#: ``sampler(denoise, z, grid, noise, context) -> z`` at the last level of the grid.
Sampler = Callable[..., Tensor]


def ancestral(
    denoise: Denoise,
    z: Tensor,
    grid: Tensor,
    noise: Noise,
    context: Tensor | None = None,
    *,
    large: float = 0.0,
) -> Tensor:
    """Draws from p(z_s | z_t) = q(z_s | z_t, x = x̂), step after step.

    Args:
        z: at the first level, shape ``(batch, *shape)``.
        grid: levels, falling, shape ``(T + 1,)``.
        large: 0 for the variance σ_s² c of the bound, 1 for σ_t² c; between them the logarithms are mixed.
    """
    for gamma_t, gamma_s in _steps(grid, z):
        alpha_t, sigma_t = alpha_sigma(gamma_t, z)
        alpha_s, sigma_s = alpha_sigma(gamma_s, z)
        c = -torch.expm1(gamma_s - gamma_t).reshape(sigma_s.shape)
        eps_hat = denoise(z, gamma_t, context).eps
        deviation = sigma_s ** (1.0 - large) * sigma_t**large * c.sqrt()
        z = (alpha_s / alpha_t) * (z - sigma_t * c * eps_hat) + deviation * noise.normal(z.shape).to(z)
    return z


def ddim(denoise: Denoise, z: Tensor, grid: Tensor, noise: Noise, context: Tensor | None = None) -> Tensor:
    """The probability flow by Euler's rule in the coordinates in which a constant (x̂, ε̂) is solved exactly."""
    for gamma_t, gamma_s in _steps(grid, z):
        alpha_s, sigma_s = alpha_sigma(gamma_s, z)
        x_hat, eps_hat = denoise(z, gamma_t, context)
        z = alpha_s * x_hat + sigma_s * eps_hat
    return z


def heun(
    denoise: Denoise,
    z: Tensor,
    grid: Tensor,
    noise: Noise,
    context: Tensor | None = None,
    *,
    churn: float = 0.0,
    churn_from: float = -math.inf,
    churn_to: float = math.inf,
) -> Tensor:
    """The probability flow by Heun's rule for y = z/α against s = σ/α: two evaluations a step.

    Args:
        churn: EDM's S_churn: before each step s is raised by the share min(churn/T, √2 − 1), with fresh noise.
        churn_from, churn_to: levels γ between which that is done.
    """
    share = min(churn / (len(grid) - 1), math.sqrt(2.0) - 1.0)
    for gamma_t, gamma_s in _steps(grid, z):
        if share and churn_from <= float(gamma_t[0]) <= churn_to:
            raised = gamma_t + 2.0 * math.log1p(share)
            z = _with_more_noise(z, gamma_t, raised, noise)
            gamma_t = raised
        alpha_t, sigma_t = alpha_sigma(gamma_t, z)
        alpha_s, sigma_s = alpha_sigma(gamma_s, z)
        y, s_t, s_s = z / alpha_t, sigma_t / alpha_t, sigma_s / alpha_s
        slope = denoise(z, gamma_t, context).eps  # (y − x̂)/s = ε̂
        euler = y + (s_s - s_t) * slope
        slope_there = denoise(alpha_s * euler, gamma_s, context).eps
        z = alpha_s * (y + (s_s - s_t) * 0.5 * (slope + slope_there))
    return z


def _with_more_noise(z: Tensor, gamma: Tensor, raised: Tensor, noise: Noise) -> Tensor:
    """z moved from one level to a noisier one, as q does it: z/α gains the variance s'² − s²."""
    alpha, _ = alpha_sigma(gamma, z)
    alpha_raised, _ = alpha_sigma(raised, z)
    extra = (torch.exp(raised) - torch.exp(gamma)).sqrt().reshape(alpha.shape)
    return alpha_raised * (z / alpha + extra * noise.normal(z.shape).to(z))


def dpm(denoise: Denoise, z: Tensor, grid: Tensor, noise: Noise, context: Tensor | None = None) -> Tensor:
    """DPM-Solver++(2M): the flow with x̂ extrapolated linearly in log SNR from the step before; the first is DDIM's."""
    return _multistep(denoise, z, grid, noise, context, stochastic=False)


def sde(denoise: Denoise, z: Tensor, grid: Tensor, noise: Noise, context: Tensor | None = None) -> Tensor:
    """The reverse stochastic equation with x̂ extrapolated as in :func:`dpm`; its first step is an ancestral one."""
    return _multistep(denoise, z, grid, noise, context, stochastic=True)


def _multistep(
    denoise: Denoise, z: Tensor, grid: Tensor, noise: Noise, context: Tensor | None, stochastic: bool
) -> Tensor:
    before: Tensor | None = None
    h_before = torch.zeros(())
    for gamma_t, gamma_s in _steps(grid, z):
        _, sigma_t = alpha_sigma(gamma_t, z)
        alpha_s, sigma_s = alpha_sigma(gamma_s, z)
        h = (0.5 * (gamma_t - gamma_s)).reshape(sigma_s.shape)
        x_hat = denoise(z, gamma_t, context).x
        ahead = x_hat if before is None else x_hat + (x_hat - before) * (0.5 * h / h_before)
        if stochastic:
            c = -torch.expm1(-2.0 * h)
            z = (sigma_s / sigma_t) * torch.exp(-h) * z + alpha_s * c * ahead
            z = z + sigma_s * c.sqrt() * noise.normal(z.shape).to(z)
        else:
            z = (sigma_s / sigma_t) * z - alpha_s * torch.expm1(-h) * ahead
        before, h_before = x_hat, h
    return z


def _steps(grid: Tensor, z: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs (γ_t, γ_s) of neighbours, each of shape ``(batch,)``."""
    levels = [gamma.expand(len(z)) for gamma in grid.to(z)]
    return itertools.pairwise(levels)


_SAMPLERS: dict[str, Sampler] = {"ancestral": ancestral, "ddim": ddim, "heun": heun, "dpm": dpm, "sde": sde}
SAMPLERS = tuple(_SAMPLERS)


def find_sampler(name: str) -> Sampler:
    """A sampler by name: ``ancestral``, ``ddim``, ``heun``, ``dpm`` or ``sde``."""
    if name not in _SAMPLERS:
        raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)}, got {name!r}")
    return _SAMPLERS[name]


def make_sampler(name: str, **options: Any) -> Sampler:
    """A sampler by name with its own options, such as ``churn`` of ``heun``."""
    sampler = find_sampler(name)
    check_options(sampler, options)
    return lambda *arguments: sampler(*arguments, **options)


def evaluations(name: str, steps: int) -> int:
    """How often a sampler calls the network in so many steps.

    >>> evaluations("heun", 10), evaluations("dpm", 10)
    (20, 10)
    """
    find_sampler(name)
    return 2 * steps if name == "heun" else steps


# What changes a denoiser -------------------------------------------------------------------------------------


def guided(
    denoise: Denoise,
    unconditional: Tensor,
    weight: float,
    low: float = -math.inf,
    high: float = math.inf,
) -> Denoise:
    """Classifier-free guidance, x̂ = x̂_u + w (x̂_c − x̂_u) (Ho & Salimans 2022, arXiv 2207.12598, with w = 1 + their w).

    Args:
        unconditional: the context that stands for no condition, shape ``(batch, width)``.
        weight: w; 1 is the conditional model itself, and saves the second evaluation.
        low, high: levels γ between which it guides (Kynkäänniemi et al. 2024, arXiv 2404.07724); 1 elsewhere.
    """

    def both(z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
        with_condition = denoise(z, gamma, context)
        if weight == 1.0 or not low <= float(gamma[0]) <= high:
            return with_condition
        without = denoise(z, gamma, unconditional)
        return Pair(
            without.x + weight * (with_condition.x - without.x),
            without.eps + weight * (with_condition.eps - without.eps),
        )

    return both


def clipped(denoise: Denoise, low: float, high: float, quantile: float | None = None) -> Denoise:
    """x̂ held between ``low`` and ``high``, and ε̂ made to agree with it.

    Args:
        quantile: dynamic thresholding (Saharia et al. 2022, arXiv 2205.11487, section 2.3): x̂ is held within the
            quantile of |x̂| over the example's cells, where that is above ``high``, and scaled back; needs low = −high.
    """
    if not low < high or (quantile is not None and low != -high):
        raise ValueError(f"clip: expected low < high, and low = -high with a quantile; got {low:g}, {high:g}")

    def inside(z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
        alpha, sigma = alpha_sigma(gamma, z)
        x = denoise(z, gamma, context).x
        if quantile is None:
            x = x.clamp(low, high)
        else:
            limit = x.abs().flatten(1).quantile(quantile, 1).clamp(min=high).reshape(alpha.shape)
            x = torch.maximum(torch.minimum(x, limit), -limit) * (high / limit)
        return Pair(x, (z - alpha * x) / sigma)

    return inside
