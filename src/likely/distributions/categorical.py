"""Categorical cells."""

from __future__ import annotations

import torch
from torch import Tensor

from likely.distributions.protocol import lazy, mix
from likely.noise import Noise


class Categorical:
    """p(x = i) = softmax(l)_i for codes i = 0 … levels − 1.

    Args:
        logits: l, shape ``(*lead, *shape, levels)``.
        trailing: number of axes of one example.
    """

    def __init__(self, logits: Tensor, trailing: int = 1) -> None:
        self.logits, self.trailing = logits, trailing

    @lazy
    def log_probs(self) -> Tensor:
        """log softmax(l), shape of the logits."""
        return torch.log_softmax(self.logits, -1)

    def log_prob(self, x: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(x.shape, self.log_probs.shape[:-1])
        codes = x.long().expand(shape).unsqueeze(-1)
        return self.log_probs.expand(*shape, -1).gather(-1, codes).squeeze(-1)

    def sample(self, noise: Noise) -> Tensor:
        return sample_categories(self.logits, noise.uniform(self.logits.shape[:-1])).to(self.logits.dtype)

    def best(self, weights: Tensor | None = None) -> Tensor:
        return mix(self.log_probs.exp(), weights, self.trailing + 1).argmax(-1).to(self.log_probs.dtype)


def sample_categories(logits: Tensor, uniform: Tensor) -> Tensor:
    """Codes by inversion of the cumulative distribution, one for each uniform variate (int64).

    Args:
        logits: log-probabilities up to a constant, shape ``(*lead, levels)``.
        uniform: shape ``(*lead,)``, or ``(*lead, draws)`` for several codes of one distribution.
    """
    several = uniform.dim() == logits.dim()
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    points = (uniform if several else uniform.unsqueeze(-1)).to(cumulative).contiguous()
    codes = torch.searchsorted(cumulative, points).clamp_(max=logits.shape[-1] - 1)
    return codes if several else codes.squeeze(-1)
