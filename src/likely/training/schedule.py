"""The learning rate as a plain function of the step."""

from __future__ import annotations

import math
from typing import Literal

Decay = Literal["constant", "linear", "cosine"]


def learning_rate_factor(step: int, total: int, warmup: int, decay: Decay, decay_fraction: float = 1.0) -> float:
    """Factor, between 0 and 1, of the learning rate at step ``step`` = 0 … ``total`` − 1.

    It rises linearly over the first ``warmup`` steps.  Over the last ``decay_fraction`` of the run it falls from 1
    towards 0, which step ``total`` would have: with u from 0 to 1 over that time it is 1 − u (``linear``) or
    (1 + cos πu) / 2 (``cosine``).  The two factors are multiplied.

    >>> [learning_rate_factor(step, 4, 2, "linear") for step in range(4)]
    [0.5, 0.75, 0.5, 0.25]
    >>> learning_rate_factor(5, 10, 0, "cosine")
    0.5
    """
    factor = min(1.0, (step + 1) / warmup) if warmup > 0 else 1.0
    if decay == "constant" or decay_fraction == 0:
        return factor
    u = min(1.0, max(0.0, (step / total - (1.0 - decay_fraction)) / decay_fraction))
    return factor * (1.0 - u if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * u)))
