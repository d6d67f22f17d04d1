"""The U-Net of diffusion models (Ho et al. 2020, 2006.11239), by default as Kingma et al. (2021, 2107.00630) have it.

Residual blocks, of which those on the way up see what those on the way down made; self-attention in the middle; a level
embedding that shifts what every block normalises.  Without down-sampling all bits of the input stay in reach of the
output, which is what a likelihood needs: most of it lies where the noise is small and denoising is local.  Maps are
channels last inside.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.networks.conditioning import FineFeatures, LevelEmbedding, without_autocast, zero
from likely.networks.linear import Linear, affine, is_plain
from likely.networks.mlp import full_precision
from likely.networks.normconv import NormConv, divisor, group_norm
from likely.networks.written import in_forward_mode


class UNet(nn.Module):
    """A U-Net for images of any size.

    >>> network = UNet((1, 5, 7), width=4, depth=1, scales=(1, 2))
    >>> network(torch.zeros(2, 1, 5, 7), torch.zeros(2)).shape
    torch.Size([2, 1, 5, 7])

    Args:
        shape: (channels, height, width) of one example.
        context_width: width of the context vector, 0 if there is none.
        width: channels at the finest resolution.
        scales: channels at each resolution in units of ``width``; each entry after the first halves the resolution, so
            that (1,) has no down-sampling at all.
        depth: residual blocks at each resolution on the way down; there is one more on the way up.
        attention: resolutions, counted from 0, whose blocks are followed by self-attention; the middle always is.
        heads: heads of the self-attention.
        groups: most groups of a norm; each has at least four channels.
        dropout: share of the hidden numbers of a block dropped in training.
        fourier: (first, last) powers of :class:`~likely.networks.conditioning.FineFeatures`, or None.
    """

    def __init__(
        self,
        shape: Sequence[int],
        context_width: int = 0,
        *,
        width: int = 64,
        scales: Sequence[int] = (1,),
        depth: int = 4,
        attention: Sequence[int] = (),
        heads: int = 1,
        groups: int = 32,
        dropout: float = 0.0,
        fourier: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        if len(shape) != 3:
            raise ValueError(f"network 'unet' needs examples of shape (channels, height, width), got {tuple(shape)}")
        if width < 1 or depth < 1 or not scales or min(scales) < 1:
            raise ValueError(f"width, depth, scales: expected at least 1, got {width}, {depth}, {tuple(scales)}")
        if not set(attention) <= set(range(len(scales))):
            raise ValueError(f"attention: expected numbers from 0 to {len(scales) - 1}, got {tuple(attention)}")
        smallest = min(shape[1:])
        if smallest < 2 ** (len(scales) - 1):
            raise ValueError(f"scales: images of {shape[1]} x {shape[2]} cannot be halved {len(scales) - 1} times")
        self.shape = tuple(shape)
        channels = [width * scale for scale in scales]
        self.fine = FineFeatures(fourier)
        self.embedding = LevelEmbedding(4 * width, context_width, waves=max(4, width + width % 2))
        self.input = nn.Conv2d(self.fine.channels(shape[0]), width, 3, padding=1)

        def block(wide: int, narrow: int) -> ResidualBlock:
            return ResidualBlock(wide, narrow, groups, dropout)

        def attend(size: int, here: bool) -> nn.Module | None:
            return SelfAttention(size, heads, groups) if here else None

        present, skips = width, [width]
        self.down = nn.ModuleList()
        for resolution, size in enumerate(channels):
            if resolution:
                self.down.append(Halve(present))
                skips.append(present)
            for _ in range(depth):
                self.down.append(Stage(block(present, size), attend(size, resolution in attention)))
                present = size
                skips.append(size)
        self.middle = nn.ModuleList(
            [Stage(block(present, present), attend(present, True)), Stage(block(present, present), None)]
        )
        self.up = nn.ModuleList()
        for resolution, size in reversed(list(enumerate(channels))):
            for _ in range(depth + 1):
                self.up.append(Stage(block(present + skips.pop(), size), attend(size, resolution in attention)))
                present = size
            if resolution:
                self.up.append(Double(present))
        self.output = NormConv(width, shape[0], groups)
        nn.init.zeros_(self.output.weight)
        self.stages = [stage for part in (self.down, self.middle, self.up) for stage in part]
        self.widths = [stage.block.shift_width for stage in self.stages if isinstance(stage, Stage)]
        self.shift = Linear(4 * width, sum(self.widths))

    def forward(self, z_t: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
        """Shapes ``(batch, *shape)``, ``(batch,)`` and ``(batch, context_width)`` to ``(batch, *shape)``."""
        shifts = iter(self.shift(self.embedding(level, context)).split(self.widths, 1))
        with without_autocast(z_t):
            z = self.fine(z_t).permute(0, 2, 3, 1).contiguous()
            h = self.input(z.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        skips = [h]
        for stage in self.down:
            h = stage(h, None, next(shifts)) if isinstance(stage, Stage) else stage(h)
            skips.append(h)
        for stage in self.middle:
            h = stage(h, None, next(shifts))
        for stage in self.up:
            if isinstance(stage, Stage):
                h = stage(h, skips.pop(), next(shifts))
            else:  # what comes next has the size of the skip that it meets
                h = stage(h)[:, : skips[-1].shape[1], : skips[-1].shape[2]]
        with without_autocast(z_t):
            return self.output(full_precision(h)).permute(0, 3, 1, 2).contiguous()


class Stage(nn.Module):
    """A residual block, and self-attention where there is some."""

    def __init__(self, block: ResidualBlock, attention: nn.Module | None) -> None:
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, skip: Tensor | None, shift: Tensor) -> Tensor:
        h = self.block(x, skip, shift)
        return h if self.attention is None else self.attention(h)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + shift))), the second convolution started at zero.

    Where the channels change, x goes through a 1 × 1 convolution.  The first convolution's bias is part of the shift.
    """

    def __init__(self, in_channels: int, out_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.shift_width = out_channels
        self.first = NormConv(in_channels, out_channels, groups, bias=False)
        self.second = NormConv(out_channels, out_channels, groups, dropout=dropout)
        nn.init.zeros_(self.second.weight)
        self.shortcut = Linear(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x: Tensor, skip: Tensor | None, shift: Tensor) -> Tensor:
        """Maps ``(batch, height, width, …)`` and the shift ``(batch, out_channels)``."""
        h = self.first(x, skip)
        return self.second(h, shift=shift, residual=self._straight(x, skip))

    def _straight(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if self.shortcut is None:
            return x if skip is None else torch.cat([x, skip], 3)
        if skip is None:
            return self.shortcut(x)
        of_x, of_skip = self.shortcut.weight.split([x.shape[3], skip.shape[3]], 1)
        return affine(x, of_x.contiguous(), self.shortcut.bias) + affine(skip, of_skip.contiguous(), None)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) v for shapes ``(batch, heads, tokens, d)``.

    PyTorch's fused form has no derivative of a derivative on the CPU, so that few tokens do without it.
    """
    if q.shape[2] > 256 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v)
    return torch.softmax((q * q.shape[3] ** -0.5) @ k.transpose(2, 3), 3) @ v


class SelfAttention(nn.Module):
    """x + W attention(norm(x)) among the positions of a map, W started at zero."""

    def __init__(self, channels: int, heads: int, groups: int) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"heads: expected a divisor of {channels} channels, got {heads}")
        self.heads = heads
        self.groups = divisor(channels, groups)
        self.gain = nn.Parameter(torch.ones(channels))
        self.offset = nn.Parameter(torch.zeros(channels))
        self.qkv = Linear(channels, 3 * channels)
        self.output = Linear(channels, channels)
        zero(self.output)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``(batch, height, width, channels)`` to the same."""
        n, height, width, channels = x.shape
        h = group_norm(x, self.gain, self.offset, self.groups).view(n, height * width, channels)
        q, k, v = self.qkv(h).view(n, -1, 3, self.heads, channels // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        h = attend(q, k, v).transpose(1, 2).reshape(n, height, width, channels)
        return x + self.output(h)


class Halve(nn.Module):
    """A convolution with stride 2: a map of half the size, rounded up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.convolution.weight.contiguous(memory_format=torch.channels_last)
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, self.convolution.bias, stride=2, padding=1)
        return y.permute(0, 2, 3, 1)


class Double(nn.Module):
    """A 3 × 3 convolution of the map with every position repeated twice along both axes.

    Two neighbouring taps that meet the same value are one, so that each of the four kinds of positions sees 2 × 2
    values: 16 products where the repeated map takes 36.
    """

    #: For rows (or columns) of even and odd number: which of the two values each of the three taps meets.
    MEETS = (((1.0, 0.0, 0.0), (0.0, 1.0, 1.0)), ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0)))

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        weight, bias = self.convolution.weight, self.convolution.bias
        assert bias is not None
        meets = weight.new_tensor(self.MEETS)
        four = torch.einsum("pak,qbl,oikl->pqoiab", meets, meets, weight).flatten(0, 2)
        y = F.conv2d(
            x.permute(0, 3, 1, 2), four.contiguous(memory_format=torch.channels_last), bias.repeat(4), padding=1
        )
        y = y.permute(0, 2, 3, 1).unflatten(3, (2, 2, channels))
        if is_plain(x, weight) and not in_forward_mode():
            return _Interleave.apply(y)
        rows = [torch.stack([y[:, p : p + height, q : q + width, p, q] for q in range(2)], 3) for p in range(2)]
        return torch.stack(rows, 2).view(n, 2 * height, 2 * width, channels)


class _Interleave(torch.autograd.Function):
    """From ``(batch, H + 1, W + 1, 2, 2, channels)`` to ``(batch, 2 H, 2 W, channels)``: y[2i + p, 2j + q] is at
    [i + p, j + q, p, q]."""

    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        n, height, width, _, _, channels = y.shape
        out = y.new_empty(n, height - 1, 2, width - 1, 2, channels)
        for p, q in _PHASES:
            out[:, :, p, :, q] = y[:, p : p + height - 1, q : q + width - 1, p, q]
        return out.view(n, 2 * height - 2, 2 * width - 2, channels)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return _Separate.apply(gradient)


class _Separate(torch.autograd.Function):
    """The adjoint of :class:`_Interleave`."""

    @staticmethod
    def forward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        n, height, width, channels = gradient.shape
        parts = gradient.reshape(n, height // 2, 2, width // 2, 2, channels)
        out = gradient.new_zeros(n, height // 2 + 1, width // 2 + 1, 2, 2, channels)
        for p, q in _PHASES:
            out[:, p : p + height // 2, q : q + width // 2, p, q] = parts[:, :, p, :, q]
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return _Interleave.apply(gradient)


_PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))
