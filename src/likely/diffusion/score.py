"""Losses for a score alone, s(x) ≈ ∇ log p(x), without a chain and without a likelihood.

    denoising   ½ E |σ s(x + σ ε) + ε|²           Vincent 2011, Neural Computation 23, 1661-1674
    implicit    E [ tr ∇s(x) + ½ |s(x)|² ]        Hyvärinen 2005, Journal of Machine Learning Research 6, 695-709
    sliced      E_v [ vᵀ ∇s(x) v + ½ |s(x)|² ]    Song et al. 2019, arXiv 1905.07088; its mean is the implicit one

The first finds the score of the data with noise of deviation σ added (it is σ² times the squared error of that score,
and a constant); the others that of the data.  Neither value is a number of nats of an example.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from likely.noise import Noise

#: From points ``(batch, *shape)`` to scores of that shape; each row depends on its own point alone.
Score = Callable[[Tensor], Tensor]


def denoising_score_matching(score: Score, x: Tensor, sigma: float | Tensor, noise: Noise) -> Tensor:
    """½ |σ s(x + σ ε) + ε|² of every example: shape ``(batch,)``.

    Args:
        sigma: σ > 0, a number, or one for each example, shape ``(batch,)``.
    """
    width = torch.as_tensor(sigma).to(x).reshape(-1, *[1] * (x.dim() - 1))
    eps = noise.normal(x.shape).to(x)
    return 0.5 * (width * score(x + width * eps) + eps).square().flatten(1).sum(1)


def sliced_score_matching(score: Score, x: Tensor, noise: Noise, directions: int = 1) -> Tensor:
    """vᵀ ∇s(x) v + ½ |s(x)|² of every example, mean over directions v of random signs: shape ``(batch,)``.

    >>> from likely.noise import StreamNoise
    >>> x = torch.tensor([[2.0, 0.0]])  # s(x) = −x: trace −2, half square 2
    >>> sliced_score_matching(lambda x: -x, x, StreamNoise(torch.Generator().manual_seed(0))).item()
    0.0

    Args:
        directions: v for each example.
    """
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        s = score(at)
        traces = []
        for _ in range(directions):
            v = torch.where(noise.uniform(x.shape).to(x) < 0.5, -1.0, 1.0).to(x)
            (slope,) = torch.autograd.grad(s, at, v, create_graph=True)
            traces.append((slope * v).flatten(1).sum(1))
        return torch.stack(traces).mean(0) + 0.5 * s.square().flatten(1).sum(1)


def score_matching(score: Score, x: Tensor) -> Tensor:
    """tr ∇s(x) + ½ |s(x)|² of every example, the trace exact (one derivative for each cell): shape ``(batch,)``."""
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        s = score(at)
        flat = s.flatten(1)
        trace = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        for j in range(flat.shape[1]):
            (slope,) = torch.autograd.grad(flat[:, j].sum(), at, create_graph=True)
            trace = trace + slope.flatten(1)[:, j]
        return trace + 0.5 * flat.square().sum(1)
