"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512): a student that does in one step what takes its
teacher two.

The teacher's two steps are DDIM's, from γ_t over γ_m to γ_s, and have no chance in them.  The student's single step

    z_s = α_s x̂ + σ_s ε̂ = (σ_s/σ_t) z_t + (α_s − (σ_s/σ_t) α_t) x̂

ends where they do if and only if its x̂ is (eq. 42)

    x* = (z_s'' − (σ_s/σ_t) z_t) / (α_s − (σ_s/σ_t) α_t).

It starts as a copy of its teacher, is trained on x*, and becomes the teacher of the next student, with half its steps.
As a chain of T steps the student has a bound on log p(x) of its own, which says what the haste has cost.  Its last step
ends at γ_0 and not in a point, so that x* needs no exception there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from likely.diffusion.bound import Denoise
from likely.diffusion.levels import spread_over_batch
from likely.diffusion.parameterisation import Pair, alpha_sigma
from likely.noise import Noise

#: Weights of |x* − x̂|² as functions of log SNR: ``truncated`` is max(SNR, 1), the larger of the errors of x and of ε
#: (eq. 8 of the paper); ``velocity`` is 1 + SNR, the error of v (eq. 9).
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "truncated": lambda log_snr: torch.exp(log_snr).clamp(min=1.0),
    "velocity": lambda log_snr: 1.0 + torch.exp(log_snr),
}


def step(denoise: Denoise, z: Tensor, gamma_t: Tensor, gamma_s: Tensor, context: Tensor | None = None) -> Tensor:
    """One DDIM step of every example from its own level to its own next: levels of shape ``(batch,)``."""
    alpha, sigma = alpha_sigma(gamma_s, z)
    x_hat, eps_hat = denoise(z, gamma_t, context)
    return alpha * x_hat + sigma * eps_hat


def target(
    teacher: Denoise, z: Tensor, gamma_t: Tensor, gamma_m: Tensor, gamma_s: Tensor, context: Tensor | None = None
) -> Tensor:
    """x*, with which a single step from γ_t to γ_s ends where the teacher's two do: shape of ``z``.

    >>> from likely.diffusion import Pair
    >>> teacher = lambda z, gamma, context=None: Pair(0.5 * z, 0.5 * z)
    >>> z, (t, m, s) = torch.ones(1, 2), torch.tensor([[2.0], [1.0], [0.0]])
    >>> x = target(teacher, z, t, m, s)
    >>> student = lambda z, gamma, context=None: Pair(x, (z - alpha_sigma(t, z)[0] * x) / alpha_sigma(t, z)[1])
    >>> torch.allclose(step(student, z, t, s), step(teacher, step(teacher, z, t, m), m, s))
    True
    """
    z_s = step(teacher, step(teacher, z, gamma_t, gamma_m, context), gamma_m, gamma_s, context)
    alpha_t, sigma_t = alpha_sigma(gamma_t, z)
    alpha_s, sigma_s = alpha_sigma(gamma_s, z)
    ratio = sigma_s / sigma_t
    return (z_s - ratio * z) / (alpha_s - ratio * alpha_t)


def distillation_error(
    student: Denoise,
    teacher: Denoise,
    f: Tensor,
    levels: Tensor,
    noise: Noise,
    context: Tensor | None = None,
    observed: Tensor | None = None,
    weight: str = "truncated",
) -> Tensor:
    """w |x* − x̂|², summed over the cells of each example, at one step of the student: shape ``(batch,)``, not nats.

    Args:
        f: the examples as real numbers, shape ``(batch, *shape)``.
        levels: the teacher's, γ_1 first, shape ``(2 T + 1,)``; the student's are every second of them.
        observed: 1 where a cell exists, 0 where it is missing: shape of ``f``, or None.
        weight: a name in :data:`WEIGHTS`.

    Raises:
        ValueError: the weight is unknown, or the teacher has an odd number of steps.
    """
    if weight not in WEIGHTS:
        raise ValueError(f"weight: expected one of {', '.join(WEIGHTS)}, got {weight!r}")
    steps, odd = divmod(len(levels) - 1, 2)
    if odd or not steps:
        raise ValueError(f"levels: expected an even number of steps of the teacher, got {len(levels) - 1}")
    first = 2 * (spread_over_batch(noise, len(f)).to(f.device) * steps).long().clamp(max=steps - 1)
    gamma_t, gamma_m, gamma_s = (levels.to(f)[first + k] for k in range(3))
    alpha, sigma = alpha_sigma(gamma_t, f)
    z = alpha * f + sigma * noise.normal(f.shape).to(f)
    if observed is not None:
        z, teacher, student = z * observed, _only(teacher, observed), _only(student, observed)
    with torch.no_grad():
        x_star = target(teacher, z, gamma_t, gamma_m, gamma_s, context)
    difference = x_star - student(z, gamma_t, context).x
    return WEIGHTS[weight](-gamma_t) * difference.square().flatten(1).sum(1)


def _only(denoise: Denoise, observed: Tensor) -> Denoise:
    """The denoiser, for which a missing cell stays at 0."""
    return lambda z, gamma, context=None: Pair(*(observed * part for part in denoise(z, gamma, context)))
