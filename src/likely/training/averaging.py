"""Averaged weights: the average that a run evaluates, keeps and saves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


class Averages:
    """An exponential moving average of weights whose memory grows with the run.

    After step t a weight of age s steps counts in proportion to the smaller decay of two:

    * the half-life is the fraction h of the steps so far: decay (1 − s/t)^a with (1 − h)^a = ½, the power-function
      average of Karras et al. 2024 (arXiv 2312.02696, eq. 1 with γ = a − 1), which forgets the start of a run of any
      length and hence needs no correction of its bias;
    * the half-life is ``half_life`` steps, once that is shorter.

    It is applied every ``every`` steps with the decay of ``every`` steps, which is exact for the first kind and costs
    little.

    Args:
        weights: the tensors to average (their own storage is left alone).
        fraction: h, in (0, 1).
        half_life: longest half-life in steps, or None.
        every: steps from one update to the next.
    """

    def __init__(
        self, weights: Sequence[Tensor], fraction: float, half_life: float | None = None, every: int = 1
    ) -> None:
        self._weights = list(weights)
        self._power = math.log(0.5) / math.log1p(-fraction)
        self._half_life = half_life
        self.every = every
        self.values = [weight.detach().clone() for weight in weights]

    def decay(self, step: int) -> float:
        """Factor of the old average in the update after ``step`` steps."""
        decay = max(0.0, 1.0 - self.every / step) ** self._power
        return decay if self._half_life is None else min(decay, 0.5 ** (self.every / self._half_life))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after ``step`` steps."""
        if step % self.every == 0:
            torch._foreach_lerp_(self.values, self._weights, 1.0 - self.decay(step))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the weights are the averages."""
        with torch.no_grad():
            own = [weight.clone() for weight in self._weights]
            torch._foreach_copy_(self._weights, self.values)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._weights, own)
