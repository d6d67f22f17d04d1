"""Normal and Student-t cells with a location and a scale in the units of the data."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from likely.distributions.protocol import lazy, mix
from likely.noise import Noise, torch_generator

_LOG_2PI = math.log(2.0 * math.pi)


class Normal:
    """N(x; μ, σ²), elementwise.

    Args:
        mean: μ, shape ``(*lead, *shape)``.
        log_scale: log σ, same shape or broadcastable to it.
        trailing: number of axes of one example.
    """

    def __init__(self, mean: Tensor, log_scale: Tensor, trailing: int = 1) -> None:
        self.mean, self.log_scale, self.trailing = mean, log_scale, trailing

    def log_prob(self, x: Tensor) -> Tensor:
        standard = (x.to(self.mean.dtype) - self.mean) * torch.exp(-self.log_scale)
        return -0.5 * (standard.square() + _LOG_2PI) - self.log_scale

    def sample(self, noise: Noise) -> Tensor:
        return self.mean + self.log_scale.exp() * noise.normal(self.mean.shape).to(self.mean)

    def best(self, weights: Tensor | None = None) -> Tensor:
        return mix(self.mean, weights, self.trailing)

    def entropy(self) -> Tensor:
        """½ log(2πe σ²) of every cell, nats."""
        return (0.5 * (1.0 + _LOG_2PI) + self.log_scale).expand(self.mean.shape)

    def kl_to_standard(self) -> Tensor:
        """KL(N(μ, σ²) ‖ N(0, 1)) of every cell in nats (Kingma & Welling 2013, arXiv 1312.6114, appendix B)."""
        return 0.5 * (self.mean.square() + torch.exp(2.0 * self.log_scale) - 1.0) - self.log_scale


class StudentT:
    """Student's t with location μ, scale σ and ν degrees of freedom, elementwise.

    Args:
        mean: μ, shape ``(*lead, *shape)``.
        log_scale: log σ, same shape or broadcastable.
        log_df: log ν, same shape or broadcastable.
        trailing: number of axes of one example.
    """

    def __init__(self, mean: Tensor, log_scale: Tensor, log_df: Tensor, trailing: int = 1) -> None:
        self.mean, self.log_scale, self.log_df, self.trailing = mean, log_scale, log_df, trailing

    @lazy
    def df(self) -> Tensor:
        """ν, shape of ``log_df``."""
        return self.log_df.exp()

    def log_prob(self, x: Tensor) -> Tensor:
        standard = (x.to(self.mean.dtype) - self.mean) * torch.exp(-self.log_scale)
        half = 0.5 * (self.df + 1.0)
        normaliser = torch.lgamma(half) - torch.lgamma(0.5 * self.df) - 0.5 * torch.log(math.pi * self.df)
        return normaliser - self.log_scale - half * torch.log1p(standard.square() / self.df)

    def sample(self, noise: Noise) -> Tensor:
        normal = noise.normal(self.mean.shape).to(self.mean)
        half_df = (0.5 * self.df).expand(self.mean.shape).contiguous()
        gamma = torch._standard_gamma(half_df, generator=torch_generator(noise, len(self.mean)))
        return self.mean + self.log_scale.exp() * normal * torch.sqrt(half_df / gamma.clamp(min=1e-30))

    def best(self, weights: Tensor | None = None) -> Tensor:
        return mix(self.mean, weights, self.trailing)
