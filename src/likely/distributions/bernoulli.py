"""Bernoulli cells."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from likely.distributions.protocol import mix
from likely.noise import Noise


class Bernoulli:
    """p(x) = σ(l)^x σ(−l)^(1−x) for x in {0, 1}.

    Args:
        logits: l, shape ``(*lead, *shape)``.
        trailing: number of axes of one example.
    """

    def __init__(self, logits: Tensor, trailing: int = 1) -> None:
        self.logits, self.trailing = logits, trailing

    def log_prob(self, x: Tensor) -> Tensor:
        x = x.to(self.logits.dtype)
        if x.shape == self.logits.shape:
            return -F.binary_cross_entropy_with_logits(self.logits, x, reduction="none")
        return x * self.logits - F.softplus(self.logits)

    def sample(self, noise: Noise) -> Tensor:
        uniform = noise.uniform(self.logits.shape).to(self.logits)
        return (uniform < torch.sigmoid(self.logits)).to(self.logits.dtype)

    def best(self, weights: Tensor | None = None) -> Tensor:
        return (mix(torch.sigmoid(self.logits), weights, self.trailing) > 0.5).to(self.logits.dtype)

    def mean(self) -> Tensor:
        """P(x = 1), shape of the logits."""
        return torch.sigmoid(self.logits)
