"""The distribution function of a mixture of logistics as a transform (Flow++: Ho et al. 2019, arXiv 1902.00275)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from likely.bijections.elementwise import Elementwise
from likely.bijections.roots import increasing_root


class Logistics(Elementwise):
    """z = logit Σᵢ πᵢ σ((x − mᵢ) / e^{sᵢ}), logistic where x is the mixture; zero numbers give the identity.

    Far outside z grows linearly, with a slope between the least and the largest e^{−sᵢ}.  The inverse lies between the
    least and the largest mᵢ + e^{sᵢ} z, where Newton's method and bisection find it.

    Args:
        components: number of logistics.
        limit: bound on |s|.
    """

    def __init__(self, components: int = 8, limit: float = 7.0) -> None:
        if components < 1:
            raise ValueError(f"components: expected at least 1, got {components}")
        self.components, self.limit = components, limit
        self.numbers = 3 * components

    def forward(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return self._map(x, *self._parameters(numbers))

    def inverse(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        log_share, mean, log_scale = self._parameters(numbers)
        ends = mean + log_scale.exp() * z

        def function(x: Tensor) -> tuple[Tensor, Tensor]:
            value, log_slope = self._map(x, log_share, mean, log_scale)
            return value, log_slope.exp()

        x = increasing_root(function, z, ends.amin(0), ends.amax(0))
        return x, -self._map(x, log_share, mean, log_scale)[1]

    def _parameters(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log π, m, s: each ``(components, …)``."""
        logits, mean, raw = numbers.unflatten(0, (3, self.components))
        return torch.log_softmax(logits, 0), mean, (raw / self.limit).tanh() * self.limit

    @staticmethod
    def _map(x: Tensor, log_share: Tensor, mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        u = (x - mean) * (-log_scale).exp()
        below, above = log_share + F.logsigmoid(u), log_share + F.logsigmoid(-u)
        z = torch.logsumexp(below, 0) - torch.logsumexp(above, 0)
        # Far outside everything is a difference of large numbers but for one form: with the far side's terms as shares
        upper = z >= 0
        near, far = torch.where(upper, below, above), torch.where(upper, above, below)
        terms = torch.log_softmax(far, 0) + (near - log_share - log_scale)
        return z, torch.logsumexp(terms, 0) - torch.logsumexp(near, 0)
