"""A transformer over patches between residual blocks at full resolution, for images.

The trunk is the diffusion transformer of Peebles & Xie (2022, arXiv 2212.09748) with adaLN-zero: every block is the
identity at first, and the level and the context scale, shift and gate what it does.  A patch embedding alone would have
to carry exact pixel values through the trunk, while most of a likelihood lies where the noise is small and denoising is
local; so a convolutional stem and head work at full resolution, joined by a skip, as in the U-ViT (Hoogeboom et al.
2023, arXiv 2301.11093, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.networks.conditioning import FineFeatures, LevelEmbedding, without_autocast, zero
from likely.networks.linear import Linear
from likely.networks.mlp import full_precision, glorot
from likely.networks.normconv import NormConv
from likely.networks.unet import ResidualBlock, attend


class DiT(nn.Module):
    """A diffusion transformer for images of any size.

    >>> network = DiT((1, 5, 7), width=8, depth=1, heads=2, stem=4, stem_depth=1)
    >>> network(torch.zeros(2, 1, 5, 7), torch.zeros(2)).shape
    torch.Size([2, 1, 5, 7])

    Args:
        shape: (channels, height, width) of one example.
        context_width: width of the context vector, 0 if there is none.
        width: features of a token.
        depth: blocks of the trunk.
        heads: heads of its attention.
        patch: side of the square of pixels that is one token.
        stem: channels at full resolution.
        stem_depth: residual blocks at full resolution, as many before the trunk as after it.
        dropout: share of the hidden numbers of a block dropped in training.
        fourier: (first, last) powers of :class:`~likely.networks.conditioning.FineFeatures`, or None.
    """

    def __init__(
        self,
        shape: Sequence[int],
        context_width: int = 0,
        *,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        patch: int = 2,
        stem: int = 32,
        stem_depth: int = 1,
        dropout: float = 0.0,
        fourier: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"network 'dit' needs examples of shape (channels, height, width), got {tuple(shape)}")
        if min(depth, heads, patch, stem, stem_depth) < 1:
            raise ValueError("depth, heads, patch, stem, stem_depth: expected at least 1")
        if width % heads:
            raise ValueError(f"heads: expected a divisor of the width {width}, got {heads}")
        self.shape, self.patch = tuple(shape), patch
        self.rows, self.columns = -(-shape[1] // patch), -(-shape[2] // patch)
        self.fine = FineFeatures(fourier)
        self.embedding = LevelEmbedding(width, context_width)
        self.input = nn.Conv2d(self.fine.channels(shape[0]), stem, 3, padding=1)
        self.stem = nn.ModuleList([ResidualBlock(stem, stem, 32, dropout) for _ in range(stem_depth)])
        self.head = nn.ModuleList([ResidualBlock(stem, stem, 32, dropout) for _ in range(stem_depth)])
        self.shift = Linear(width, 2 * stem_depth * stem)
        self.enter = glorot(Linear(stem * patch * patch, width))
        self.position = nn.Parameter(0.02 * torch.randn(self.rows * self.columns, width))
        self.blocks = nn.ModuleList([TransformerBlock(width, heads, dropout) for _ in range(depth)])
        self.modulation = zero(Linear(width, (6 * depth + 2) * width))
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.leave = glorot(Linear(width, stem * patch * patch))
        self.output = NormConv(stem, shape[0])
        nn.init.zeros_(self.output.weight)

    def forward(self, z_t: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """Shapes ``(batch, *shape)``, ``(batch,)`` and ``(batch, context_width)`` to ``(batch, *shape)``."""
        _, height, width = self.shape
        e = self.embedding(level, context)
        shifts = iter(self.shift(e).chunk(len(self.stem) + len(self.head), 1))
        with without_autocast(z_t):
            z = F.pad(self.fine(z_t), (0, self.columns * self.patch - width, 0, self.rows * self.patch - height))
            z = z.permute(0, 2, 3, 1).contiguous()
            h = self.input(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        for block in self.stem:
            h = block(h, None, next(shifts))
        h = h + self._from_tokens(self._trunk(self._to_tokens(h), e))
        for block in self.head:
            h = block(h, None, next(shifts))
        with without_autocast(z_t):
            return self.output(full_precision(h)).permute(0, 3, 1, 2)[:, :, :height, :width].contiguous()

    def _trunk(self, h: Tensor, e: Tensor) -> Tensor:
        modulations = self.modulation(e).unsqueeze(1).chunk(6 * len(self.blocks) + 2, 2)
        h = self.enter(h) + self.position
        for number, block in enumerate(self.blocks):
            h = block(h, *modulations[6 * number : 6 * number + 6])
        scale, shift = modulations[-2:]
        return self.leave(self.norm(h) * (1.0 + scale) + shift)

    def _to_tokens(self, h: Tensor) -> Tensor:
        """Maps ``(batch, height, width, stem)`` to tokens ``(batch, rows · columns, patch · patch · stem)``."""
        squares = h.unflatten(1, (self.rows, self.patch)).unflatten(3, (self.columns, self.patch))
        return squares.transpose(2, 3).flatten(3).flatten(1, 2)

    def _from_tokens(self, tokens: Tensor) -> Tensor:
        squares = tokens.unflatten(1, (self.rows, self.columns)).unflatten(3, (self.patch, self.patch, -1))
        return squares.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class TransformerBlock(nn.Module):
    """h + gate attention(norm(h) (1 + scale) + shift), then the same with two dense layers; all gates start at zero."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.qkv = glorot(Linear(width, 3 * width))
        self.mix = glorot(Linear(width, width))
        self.first = glorot(Linear(width, 4 * width))
        self.second = glorot(Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(
        self, h: Tensor, scale1: Tensor, shift1: Tensor, gate1: Tensor, scale2: Tensor, shift2: Tensor, gate2: Tensor
    ) -> Tensor:
        """Tokens ``(batch, tokens, width)`` and modulations ``(batch, 1, width)``."""
        n, tokens, width = h.shape
        x = self.norm(h) * (1.0 + scale1) + shift1
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        h = h + gate1 * self.mix(attend(q, k, v).transpose(1, 2).reshape(n, tokens, width))
        x = self.norm(h) * (1.0 + scale2) + shift2
        return h + gate2 * self.second(self.dropout(F.gelu(self.first(x), approximate="tanh")))
