"""What a denoising network is told beside its input: the noise level, a context vector, and the input's finest bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from likely.networks.linear import Linear
from likely.networks.mlp import full_precision

TAU = 2.0 * math.pi


class LevelEmbedding(nn.Module):
    """A vector made of the noise level in [0, 1] and of the context vector.

    ``waves`` sinusoids of 1000 · level, whose frequencies fall geometrically from 1 to 1/10,000 (Vaswani et al. 2017,
    arXiv 1706.03762, section 3.5; Kingma et al. 2021, arXiv 2107.00630, appendix B), then two dense layers with SiLU.

    >>> LevelEmbedding(width=8, context_width=3)(torch.rand(5), torch.zeros(5, 3)).shape
    torch.Size([5, 8])

    Args:
        width: width of the vector.
        context_width: width of the context vector, 0 if there is none.
        waves: number of sinusoids, even.
    """

    frequencies: Tensor

    def __init__(self, width: int, context_width: int = 0, waves: int = 64) -> None:
        super().__init__()
        if waves < 4 or waves % 2:
            raise ValueError(f"waves: expected an even number of at least 4, got {waves}")
        half = waves // 2
        frequencies = torch.exp(torch.arange(half) * (-math.log(1e4) / (half - 1)))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.context_width = context_width
        self.first = Linear(waves + context_width, width)
        self.second = Linear(width, width)

    def forward(self, level: Tensor, context: Tensor | None = None) -> Tensor:
        """Shapes ``(batch,)`` and ``(batch, context_width)`` to ``(batch, width)``.

        Raises:
            ValueError: a context is given to a network built without one, or the reverse, or has another width.
        """
        angle = 1000.0 * full_precision(level).to(self.frequencies).unsqueeze(1) * self.frequencies
        pieces = [angle.sin(), angle.cos()]
        width = 0 if context is None else context.shape[1]
        if width != self.context_width:
            raise ValueError(f"context: expected width {self.context_width}, got {width}")
        if context is not None:
            pieces.append(context.to(angle))
        h = nn.functional.silu(self.first(torch.cat(pieces, 1)))
        return nn.functional.silu(self.second(h))


class FineFeatures(nn.Module):
    """The input and, on the channel axis, sin and cos of 2π 2ⁿ z for n from ``first`` to ``last``.

    They set apart values that differ by less than the network would notice (Kingma et al. 2021, arXiv 2107.00630,
    section 4.3).  On 8-bit data that spans [−1, 1] the wave n has a period of 2^(7 − n) levels: n = 6 and 7 show the
    last two bits.  Computed in at least float32, for bfloat16 would destroy them.

    >>> FineFeatures((6, 7)).channels(3)
    15

    Args:
        powers: (first, last), or None for the input alone.
    """

    def __init__(self, powers: tuple[int, int] | None) -> None:
        super().__init__()
        if powers is not None and (len(powers) != 2 or powers[0] > powers[1]):
            raise ValueError(f"fourier: expected (first, last) with first <= last, got {tuple(powers)}")
        self.powers = [] if powers is None else list(range(powers[0], powers[1] + 1))

    def channels(self, channels: int) -> int:
        """Channels of the output for that many of the input."""
        return channels * (1 + 2 * len(self.powers))

    def forward(self, z: Tensor) -> Tensor:
        """Shape ``(batch, channels, *rest)`` to ``(batch, self.channels(channels), *rest)``."""
        z = full_precision(z)
        if not self.powers:
            return z
        angles = [z * (TAU * 2.0**n) for n in self.powers]
        return torch.cat([z, *(angle.sin() for angle in angles), *(angle.cos() for angle in angles)], 1)


def without_autocast(z: Tensor) -> torch.autocast:
    """A context in which half precision is off: a network's ends see the finest bits of its input and output."""
    return torch.autocast(z.device.type, enabled=False)


def zero(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters at zero: what it adds is nothing until training says otherwise."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
