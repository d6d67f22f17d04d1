"""Learning rates as plain functions of the step.

Each returns the factor, between 0 and 1, by which the highest learning rate is multiplied at step = 0, 1, …, total − 1.
They are multiplied where a schedule has several parts.  With ``torch.optim.lr_scheduler``:
``LambdaLR(optimizer, lambda step: trapezoid(step, total, warmup=100))``.
"""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["constant", "linear", "cosine", "inverse_sqrt"]


def warm_up(step: int, steps: int) -> float:
    """Linear rise over the first ``steps`` steps: (step + 1) / steps, then 1.

    >>> [warm_up(step, 2) for step in range(3)]
    [0.5, 1.0, 1.0]
    """
    return min(1.0, (step + 1) / steps) if steps > 0 else 1.0


def linear(step: int, total: int, fraction: float = 1.0) -> float:
    """1, and over the last ``fraction`` of the run linearly towards the 0 that step ``total`` would have.

    >>> [linear(step, 4) for step in range(4)]
    [1.0, 0.75, 0.5, 0.25]
    """
    return 1.0 - _progress(step, total, fraction)


def cosine(step: int, total: int, fraction: float = 1.0) -> float:
    """1, and over the last ``fraction`` of the run (1 + cos πu) / 2, u from 0 to 1 (Loshchilov & Hutter 2016).

    >>> cosine(5, 10)
    0.5
    """
    return 0.5 * (1.0 + math.cos(math.pi * _progress(step, total, fraction)))


def inverse_sqrt(step: int, flat: int = 1) -> float:
    """1 for ``flat`` steps, then √(flat / (step + 1)): α / √t, as the regret bounds of the Adam paper assume.

    >>> [inverse_sqrt(step, flat=4) for step in (0, 3, 15)]
    [1.0, 1.0, 0.5]
    """
    return min(1.0, math.sqrt(max(flat, 1) / (step + 1)))


def trapezoid(step: int, total: int, warmup: int = 0, fraction: float = 0.2) -> float:
    """Warm-up, a plateau, and a linear decay over the last ``fraction`` of the run ("warm-up, stable, decay").

    >>> [trapezoid(step, 8, warmup=2, fraction=0.25) for step in (0, 1, 5, 6, 7)]
    [0.5, 1.0, 1.0, 1.0, 0.5]
    """
    return warm_up(step, warmup) * linear(step, total, fraction)


def learning_rate_factor(step: int, total: int, warmup: int, decay: Decay, decay_fraction: float = 1.0) -> float:
    """A warm-up over the first ``warmup`` steps, times the decay of the name.

    Args:
        decay: ``constant``; ``linear`` or ``cosine`` over the last ``decay_fraction`` of the run (0 for none);
            ``inverse_sqrt`` from the end of the warm-up on.

    >>> [learning_rate_factor(step, 4, 2, "linear") for step in range(4)]
    [0.5, 0.75, 0.5, 0.25]
    """
    rise = warm_up(step, warmup)
    if decay == "inverse_sqrt":
        return rise * inverse_sqrt(step, warmup)
    if decay == "constant" or decay_fraction == 0:
        return rise
    return rise * (linear if decay == "linear" else cosine)(step, total, decay_fraction)


def _progress(step: int, total: int, fraction: float) -> float:
    """From 0 to 1 over the last ``fraction`` of the run."""
    if fraction == 0:
        return 0.0
    return min(1.0, max(0.0, (step / total - (1.0 - fraction)) / fraction))
