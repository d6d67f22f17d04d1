"""Networks of a diffusion model: from a noisy example, its noise level and a context to a tensor of the same shape.

    network(z_t, level, context)      z_t (batch, *shape), level (batch,) in [0, 1], context (batch, width) or None

What the output means (the noise, the example, a velocity) is the diffusion's affair.  Every network starts at zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from likely.contract import check_options
from likely.networks.conditioning import FineFeatures, LevelEmbedding, without_autocast, zero
from likely.networks.dit import DiT
from likely.networks.linear import Linear
from likely.networks.mlp import full_precision, glorot
from likely.networks.unet import UNet

#: ``"mlp"`` (any shape), ``"unet"`` and ``"dit"`` (images: shapes (C, H, W)).
NAMES = ("mlp", "unet", "dit")


def denoiser(name: str, shape: Sequence[int], context_width: int = 0, **options: Any) -> nn.Module:
    """A denoising network by name: ``forward(z_t, level, context) -> (batch, *shape)``.

    Args:
        name: ``mlp``, ``unet`` or ``dit``.
        shape: shape of one example.
        context_width: width of the context vector, 0 if there is none.
        options: of :class:`VectorDenoiser`, :class:`likely.networks.unet.UNet` or :class:`likely.networks.dit.DiT`.

    Raises:
        ValueError: the name or an option is unknown, or the network does not suit the shape.

    >>> import torch
    >>> network = denoiser("mlp", (3,), width=16, depth=1)
    >>> network(torch.ones(2, 3), torch.full((2,), 0.5), None)
    tensor([[0., 0., 0.],
            [0., 0., 0.]], grad_fn=<ViewBackward0>)
    """
    network = _network(name)
    check_options(network, options)
    return network(tuple(shape), context_width, **options)


def _network(name: str) -> Callable[..., nn.Module]:
    if name == "mlp":
        return VectorDenoiser
    if name == "unet":
        return UNet
    if name == "dit":
        return DiT
    raise ValueError(f"network: expected one of {', '.join(NAMES)}, got {name!r}")


class VectorDenoiser(nn.Module):
    """Residual blocks on the flattened example; the level and the context scale and shift every block's input.

    Block: h + W₂ silu(W₁ (norm(h) (1 + scale) + shift)), with W₂ started at zero.  The scales and shifts of all blocks
    are one product of the embedding (Peebles & Xie 2022, arXiv 2212.09748, section 3.2).

    Args:
        shape: shape of one example.
        context_width: width of the context vector, 0 if there is none.
        width: width of the blocks.
        depth: number of blocks.
        dropout: share of hidden units dropped in training.
        fourier: (first, last) powers of :class:`~likely.networks.conditioning.FineFeatures`, or None.
        waves: sinusoids that tell the level.
    """

    def __init__(
        self,
        shape: Sequence[int],
        context_width: int = 0,
        *,
        width: int = 256,
        depth: int = 3,
        dropout: float = 0.0,
        fourier: tuple[int, int] | None = None,
        waves: int = 64,
    ) -> None:
        super().__init__()
        if width < 1 or depth < 1:
            raise ValueError(f"width, depth: expected at least 1, got {width}, {depth}")
        self.shape = tuple(shape)
        size = math.prod(self.shape)
        self.fine = FineFeatures(fourier)
        self.embedding = LevelEmbedding(width, context_width, waves)
        self.modulation = Linear(width, 2 * width * depth)
        self.input = glorot(Linear(self.fine.channels(size), width))
        self.blocks = nn.ModuleList([_VectorBlock(width, dropout) for _ in range(depth)])
        self.norm = nn.LayerNorm(width)
        self.output = zero(Linear(width, size))

    def forward(self, z_t: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """Shapes ``(batch, *shape)``, ``(batch,)`` and ``(batch, context_width)`` to ``(batch, *shape)``."""
        e = self.embedding(level, context)
        modulations = self.modulation(e).chunk(2 * len(self.blocks), 1)
        with without_autocast(z_t):
            h = self.input(self.fine(z_t.flatten(1)))
        for number, block in enumerate(self.blocks):
            h = block(h, *modulations[2 * number : 2 * number + 2])
        with without_autocast(z_t):
            return self.output(self.norm(full_precision(h))).view(-1, *self.shape)


class _VectorBlock(nn.Module):
    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.first = glorot(Linear(width, width))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.second = zero(Linear(width, width))

    def forward(self, h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        modulated = self.norm(h) * (1.0 + scale) + shift
        return h + self.second(self.dropout(nn.functional.silu(self.first(modulated))))
