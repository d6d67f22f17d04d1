"""Weights w(λ) of a training objective, λ = log SNR = −γ, and when the objective is still a likelihood.

    L_w = ½ ∫ w(λ) E|ε − ε̂|² dλ

With w = 1 it is the diffusion term of the bound.  Integrated by parts, with L(λ) = ½ ∫_{λ_min}^λ E|ε − ε̂|² the
divergence of the chain that starts at λ (Kingma & Gao 2023, arXiv 2303.00848),

    L_w = w(λ_max) L(λ_max) + ∫ (−dw/dλ) L(λ) dλ :

if w falls with λ everywhere, a mixture of bounds on data to which noise was added.  Where w rises, a part is negative
and L_w bounds nothing.  Only w = 1 gives nats of the data: a weighted loss is never shown as bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from likely.contract import check_options

#: From λ (any shape) to w(λ).
Weighting: TypeAlias = Callable[[Tensor], Tensor]


def elbo() -> Weighting:
    """w = 1: the bound itself.

    >>> elbo()(torch.tensor([-3.0, 5.0])).tolist()
    [1.0, 1.0]
    """
    return torch.ones_like


def sigmoid(bias: float = 2.0) -> Weighting:
    """w = sigmoid(b − λ) (Kingma & Gao 2023)."""
    return lambda log_snr: torch.sigmoid(bias - log_snr)


def edm(mean: float = 2.4, std: float = 2.4, data_scale: float = 0.5) -> Weighting:
    """w = N(λ; mean, std²) (exp(−λ) + d²), scaled to be 1 at its peak: what EDM's loss weighs (Kingma & Gao 2023).

    EDM draws log(σ/α) ~ N(−1.2, 1.2²), so λ ~ N(2.4, 2.4²), and weighs |x − x̂|² by (s² + d²)/(s d)².
    """
    return lambda log_snr: _edm(log_snr, mean, std, data_scale) / _edm_peak(mean, std, data_scale)[1]


def edm_monotone(mean: float = 2.4, std: float = 2.4, data_scale: float = 0.5) -> Weighting:
    """As :func:`edm`, and 1 for all λ below its peak: the nearest weight that falls everywhere (Kingma & Gao 2023)."""
    peak, _ = _edm_peak(mean, std, data_scale)
    own = edm(mean, std, data_scale)
    return lambda log_snr: torch.where(log_snr < peak, 1.0, own(log_snr))


def _edm(log_snr: Tensor, mean: float, std: float, data_scale: float) -> Tensor:
    return torch.exp(-0.5 * ((log_snr - mean) / std).square()) * (torch.exp(-log_snr) + data_scale**2)


def _edm_peak(mean: float, std: float, data_scale: float) -> tuple[float, float]:
    """Where EDM's weight is greatest, and how much it is there: the best of a grid, then a search by thirds."""

    def weight(at: Tensor) -> Tensor:
        return _edm(at, mean, std, data_scale)

    at = torch.linspace(mean - 3.0 * std - std**2, mean + 3.0 * std, 2001, dtype=torch.float64)
    best = int(weight(at).argmax().clamp(1, len(at) - 2))
    low, high = at[best - 1], at[best + 1]
    for _ in range(80):
        third = (high - low) / 3.0
        rises = weight(low + third) < weight(high - third)
        low, high = torch.where(rises, low + third, low), torch.where(rises, high, high - third)
    peak = 0.5 * (low + high)
    return float(peak), float(weight(peak))


def min_snr(limit: float = 5.0) -> Weighting:
    """w = sech(λ/2) min(1, limit · exp(−λ)): min-SNR on the cosine schedule (Hang et al. 2023, arXiv 2303.09556)."""
    return lambda log_snr: (1.0 / torch.cosh(0.5 * log_snr)) * (limit * torch.exp(-log_snr)).clamp(max=1.0)


def simple() -> Weighting:
    """w = sech(λ/2): the unweighted |ε − ε̂|² on the cosine schedule (Ho et al. 2020, arXiv 2006.11239, eq. 14)."""
    return lambda log_snr: 1.0 / torch.cosh(0.5 * log_snr)


def velocity() -> Weighting:
    """w = exp(−λ/2): |v − v̂|² on the cosine schedule, flow matching on straight paths (Kingma & Gao 2023)."""
    return lambda log_snr: torch.exp(-0.5 * log_snr)


def is_monotone(weighting: Weighting, low: float, high: float) -> bool:
    """Whether w does not rise with λ anywhere between the ends γ_0 = ``low`` and γ_1 = ``high``.

    >>> is_monotone(sigmoid(2.0), -13.3, 5.0), is_monotone(edm(), -13.3, 5.0)
    (True, False)
    """
    w = weighting(torch.linspace(-high, -low, 4097, dtype=torch.float64))
    return bool((w.diff() <= 1e-12 * w.max()).all())


def mixture_over_levels(weighting: Weighting, log_snr: Tensor, divergence: Tensor) -> Tensor:
    """The right-hand side above by the trapezoidal rule: a scalar in the unit of ``divergence``.

    Args:
        log_snr: λ, rising, shape ``(points,)``.
        divergence: L(λ) at these points, L = 0 at the first.
    """
    w = weighting(log_snr)
    middle = 0.5 * (divergence[1:] + divergence[:-1])
    return w[-1] * divergence[-1] - (w.diff() * middle).sum()


_WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "elbo": elbo,
    "sigmoid": sigmoid,
    "edm": edm,
    "edm_monotone": edm_monotone,
    "min_snr": min_snr,
    "simple": simple,
    "velocity": velocity,
}
WEIGHTINGS = tuple(_WEIGHTINGS)


def make_weighting(name: str, **options: Any) -> Weighting:
    """A weighting by name.

    >>> round(float(make_weighting("sigmoid", bias=0.0)(torch.zeros(()))), 3)
    0.5
    """
    if name not in _WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {name!r}")
    check_options(_WEIGHTINGS[name], options)
    return _WEIGHTINGS[name](**options)
