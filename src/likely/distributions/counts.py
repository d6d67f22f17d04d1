"""Counts without a limit: negative binomial cells, and a multinomial whose total is negative binomial."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from likely.distributions.protocol import lazy, mix
from likely.noise import Noise, torch_generator


class NegativeBinomial:
    """p(x) = Γ(x + r) / (Γ(r) x!) · (r/(r + μ))^r (μ/(r + μ))^x with mean μ and dispersion r; variance μ + μ²/r.

    Args:
        log_mean: log μ, shape ``(*lead, *shape)``.
        log_dispersion: log r, same shape or broadcastable.
        trailing: number of axes of one example.
    """

    def __init__(self, log_mean: Tensor, log_dispersion: Tensor, trailing: int = 1) -> None:
        self.log_mean, self.log_dispersion, self.trailing = log_mean, log_dispersion, trailing

    def log_prob(self, x: Tensor) -> Tensor:
        x = x.to(self.log_mean.dtype)
        r = self.log_dispersion.exp()
        log_total = torch.logaddexp(self.log_mean, self.log_dispersion)
        choices = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1.0)
        return choices + r * (self.log_dispersion - log_total) + x * (self.log_mean - log_total)

    def sample(self, noise: Noise) -> Tensor:
        generator = torch_generator(noise, len(self.log_mean))
        r = self.log_dispersion.exp().expand(self.log_mean.shape).contiguous()
        rate = torch._standard_gamma(r, generator=generator) / r * self.log_mean.exp()
        return torch.poisson(rate.double(), generator=generator).to(self.log_mean.dtype)

    def best(self, weights: Tensor | None = None) -> Tensor:
        return mix(self.log_mean.exp(), weights, self.trailing).round()


class Multinomial:
    """Total N ~ negative binomial, then x | N ~ multinomial(N, softmax(l)).

    log p(x) = log p(N) + log N! − Σ log x_i! + Σ x_i log softmax(l)_i.  ``log_prob`` gives a value a cell: the
    cell's own terms, and an equal share of the two terms of the total.

    Args:
        logits: l, shape ``(*lead, *shape)``, softmax over all cells of an example.
        total: distribution of N, shape ``lead``.
        trailing: number of axes of one example.
    """

    def __init__(self, logits: Tensor, total: NegativeBinomial, trailing: int = 1) -> None:
        self.logits, self.total, self.trailing = logits, total, trailing

    @lazy
    def log_probs(self) -> Tensor:
        """log softmax(l) over the cells of each example, shape of the logits."""
        flat = torch.log_softmax(self.logits.flatten(-self.trailing), -1)
        return flat.reshape(self.logits.shape)

    def log_prob(self, x: Tensor) -> Tensor:
        x = x.to(self.log_probs.dtype)
        count = x.flatten(-self.trailing).sum(-1)
        shared = (self.total.log_prob(count) + torch.lgamma(count + 1.0)) / math.prod(x.shape[-self.trailing :])
        cells = x * self.log_probs - torch.lgamma(x + 1.0)
        return cells + shared.reshape(*shared.shape, *[1] * self.trailing)

    def sample(self, noise: Noise) -> Tensor:
        totals = self.total.sample(noise).long().reshape(-1)
        generator = torch_generator(noise, len(self.log_probs))
        flat = self.log_probs.flatten(-self.trailing).exp()
        rows = flat.reshape(-1, flat.shape[-1])
        counts = torch.zeros_like(rows)
        for row, (probabilities, count) in enumerate(zip(rows, totals.tolist())):
            if count:
                drawn = torch.multinomial(probabilities, count, replacement=True, generator=generator)
                counts[row] = torch.bincount(drawn, minlength=rows.shape[1]).to(counts)
        return counts.reshape(self.log_probs.shape)

    def best(self, weights: Tensor | None = None) -> Tensor:
        total = self.total.log_mean.exp()
        expected = self.log_probs.exp() * total.reshape(*total.shape, *[1] * self.trailing)
        return mix(expected, weights, self.trailing).round()
