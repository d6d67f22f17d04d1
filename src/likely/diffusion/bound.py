"""The variational bound of a diffusion model, cell by cell, in nats (Kingma et al. 2021, arXiv 2107.00630).

    −log p(x) ≤ −E log p(x | z_0)  +  KL(q(z_1 | x) ‖ N(0, I))  +  L_diff                          (eq. 11)

    T steps:           L_diff = ½ T E_{i ~ U{1…T}} [(exp(γ_t − γ_s) − 1) |ε − ε̂(z_t; γ_t)|²],  t = i/T, s = t − 1/T
    continuous time:   L_diff = ½ ∫_{γ_0}^{γ_1} E |ε − ε̂(z_γ; γ)|² dγ,  its limit

with z_γ = α f + σ ε, where f is the example as real numbers.  The first term belongs to the kind of data
(:mod:`likely.diffusion.data`); the other two are here.  Nothing is weighted, clipped or dropped.
"""

from __future__ import annotations

import itertools
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.diffusion.levels import Drawn, Ends, Levels, draw, spread_within
from likely.diffusion.parameterisation import Pair, Parameterisation, alpha_sigma
from likely.networks import full_precision
from likely.noise import Noise


class Denoise(Protocol):
    """Anything that says what x and ε are, of z at levels γ: a :class:`Denoiser`, or a function."""

    def __call__(self, z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair: ...


class Denoiser(nn.Module):
    """A network, what its output means, and the range of levels that it is told: the only place that calls the network.

    Args:
        network: ``network(z, level, context) -> out``, shapes ``(batch, *shape)``, ``(batch,)``, ``(batch, width)``.
        parameterisation: from its output to (x̂, ε̂).
        ends: of the levels.
    """

    def __init__(self, network: nn.Module, parameterisation: Parameterisation, ends: Ends) -> None:
        super().__init__()
        self.network, self.parameterisation, self.ends = network, parameterisation, ends

    def forward(self, z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
        """(x̂, ε̂) of z, shape ``(batch, *shape)``, at levels ``gamma``, shape ``(batch,)``."""
        shown = self.parameterisation.precondition(z, gamma)
        out = full_precision(self.network(shown, self.ends.level(gamma), context))
        return self.parameterisation.to_pair(out, z, gamma)


def prior_nats(f: Tensor, gamma: Tensor) -> Tensor:
    """−KL(N(α f, σ²) ‖ N(0, 1)) of every cell at the level γ (a scalar): shape of ``f``, nats.

    ½ (α² f² + σ² − 1 − log σ²), with σ² − 1 = −α² and log σ² = log sigmoid(γ), which keep their digits as σ → 1.

    >>> prior_nats(torch.tensor([[1.0]]), torch.tensor(0.0)).item()
    -0.3465...
    """
    alpha_squared = torch.sigmoid(-gamma)
    return -0.5 * (alpha_squared * (f.square() - 1.0) - F.logsigmoid(gamma))


#: Cells that a network sees at a time where no gradient is wanted: the levels of a bound need no more memory than that.
CELLS = 1 << 19


def predicted_noise(denoise: Denoise, z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Tensor:
    """ε̂ of each row, shape of z ``(n, *shape)``; without a gradient a few rows at a time."""
    size = max(1, CELLS // math.prod(z.shape[1:]))
    if torch.is_grad_enabled() or len(z) <= size:
        return denoise(z, gamma, context).eps
    contexts = itertools.repeat(None) if context is None else context.split(size)
    return torch.cat([denoise(*rows).eps for rows in zip(z.split(size), gamma.split(size), contexts)])


def squared_errors(
    denoise: Denoise,
    f: Tensor,
    gamma: Tensor,
    eps: Tensor,
    context: Tensor | None = None,
    observed: Tensor | None = None,
) -> Tensor:
    """(ε − ε̂)² of every cell at several levels of each example: shape ``(batch, count, *shape)``.

    Args:
        f: the examples, shape ``(batch, *shape)``.
        gamma: shape ``(batch, count)``.
        eps: the noise, shape ``(batch, count, *shape)``.
        context: shape ``(batch, width)`` or None.
        observed: 1 where a cell exists, 0 where it is missing (its z and its error are 0): shape of ``f``, or None.
    """
    batch, count = gamma.shape
    flat_gamma = gamma.flatten()
    noisy = eps.flatten(0, 1)
    alpha, sigma = alpha_sigma(flat_gamma, noisy)
    z = alpha * f.unsqueeze(1).expand_as(eps).flatten(0, 1) + sigma * noisy
    if context is not None:
        context = context.unsqueeze(1).expand(-1, count, -1).flatten(0, 1)
    if observed is None:
        return (noisy - predicted_noise(denoise, z, flat_gamma, context)).square().unflatten(0, (batch, count))
    there = observed.unsqueeze(1).expand_as(eps).flatten(0, 1)
    errors = there * (noisy - predicted_noise(denoise, z * there, flat_gamma, context)).square()
    return errors.unflatten(0, (batch, count))


def diffusion_nats(
    denoise: Denoise,
    f: Tensor,
    levels: Levels,
    ends: Ends,
    noise: Noise,
    count: int,
    steps: int | None = None,
    context: Tensor | None = None,
    observed: Tensor | None = None,
) -> Tensor:
    """−L_diff, an unbiased estimate of every cell's share from ``count`` stratified levels: shape of ``f``, nats.

    Args:
        steps: T, or None for continuous time.
        other arguments: as for :func:`squared_errors` and :func:`likely.diffusion.levels.draw`.
    """
    drawn = draw(levels, ends, spread_within(noise, len(f), count).to(f), steps)
    eps = noise.normal((len(f), count, *f.shape[1:])).to(f)
    errors = squared_errors(denoise, f, drawn.gamma, eps, context, observed)
    return -0.5 * (_over(drawn, errors) * errors).mean(1)


def _over(drawn: Drawn, errors: Tensor) -> Tensor:
    """The weights, shaped to be broadcast over the errors."""
    return drawn.weight.reshape(*drawn.weight.shape, *[1] * (errors.dim() - 2))


def weighted_error(drawn: Drawn, errors: Tensor) -> Tensor:
    """½ weight · Σ (ε − ε̂)² over the cells of each example at each level: shape ``(batch, count)``, nats."""
    return 0.5 * drawn.weight * errors.flatten(2).sum(2)


def chain_nats(
    denoise: Denoise, f: Tensor, grid: Tensor, noise: Noise, context: Tensor | None = None, draws: int = 1
) -> Tensor:
    """−L_diff of a chain with the given levels, every step of it evaluated: shape of ``f``, nats.

    What :func:`diffusion_nats` estimates from a few steps; for short chains, such as those of a distilled model.

    Args:
        grid: levels, γ_1 first, shape ``(T + 1,)``.
        draws: draws of the noise at each step.
    """
    total = torch.zeros_like(f)
    for gamma_t, gamma_s in itertools.pairwise(grid):
        eps = noise.normal((len(f), draws, *f.shape[1:])).to(f)
        errors = squared_errors(denoise, f, gamma_t.to(f).expand(len(f), draws), eps, context)
        total = total - 0.5 * torch.expm1(gamma_t - gamma_s).to(f) * errors.mean(1)
    return total
