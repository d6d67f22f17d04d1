"""Convolutional residual networks for images: an encoder to a vector and a decoder to a map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from likely.networks.linear import Linear
from likely.networks.mlp import glorot, make_activation

Layers = TypeVar("Layers", bound=nn.Module)


class ConvBlock(nn.Module):
    """Pre-activation residual block of two 3 × 3 convolutions; the second starts at zero."""

    def __init__(self, channels: int, activation: str, dropout: float = 0.0) -> None:
        super().__init__()
        last = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        self.body = nn.Sequential(
            make_activation(activation),
            nn.Conv2d(channels, channels, 3, padding=1),
            make_activation(activation),
            nn.Dropout(dropout) if dropout else nn.Identity(),
            last,
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)

    def exact_forward(self, x: Tensor) -> Tensor:
        """The same in less memory, for the body's own type is that of x."""
        return self.body(x).add_(x)


def _halved(size: int, times: int) -> int:
    for _ in range(times):
        size = -(-size // 2)
    return size


def _image_shape(shape: Sequence[int]) -> tuple[int, int, int]:
    if len(shape) != 3:
        raise ValueError(f"network 'conv' needs examples of shape (channels, height, width), got {tuple(shape)}")
    return shape[0], shape[1], shape[2]


class PlaceLinear(nn.Module):
    """One linear map at all places of a map: ``(batch, in, h, w)``, or this flattened, to ``(batch, out · h · w)``.

    Args:
        shape: (in, height, width).
        out_features: out · height · width.
    """

    def __init__(self, shape: Sequence[int], out_features: int) -> None:
        super().__init__()
        self.shape = _image_shape(shape)
        self.convolution = nn.Conv2d(shape[0], out_features // (shape[1] * shape[2]), 1)

    @property
    def weight(self) -> Tensor:
        return self.convolution.weight

    @property
    def bias(self) -> Tensor:
        assert self.convolution.bias is not None
        return self.convolution.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x.reshape(-1, *self.shape)).flatten(1)


class ConvEncoder(nn.Module):
    """Strided convolutions with residual blocks at every scale, then a dense layer that also sees the context.

    Without the dense layer what comes out is the map at the coarsest scale: ``out_shape`` says which.

    Args:
        in_shape: (channels, height, width) of the features.
        context_features: width of the context vector, 0 if there is none.
        hidden: channels at each halving of the resolution, and last the width of the dense layer, or 0 for none.
        blocks: residual blocks at each scale: one number for all, or one a scale, finest first.
    """

    def __init__(
        self,
        in_shape: Sequence[int],
        context_features: int,
        hidden: Sequence[int],
        activation: str = "silu",
        dropout: float = 0.0,
        blocks: int | Sequence[int] = 1,
    ) -> None:
        super().__init__()
        channels, height, width = _image_shape(in_shape)
        scales, dense, counts = _plan(hidden, blocks)
        layers: list[nn.Module] = []
        for size, count in zip(scales, counts):
            if layers:
                layers.append(make_activation(activation))
            layers.append(nn.Conv2d(channels, size, 3, stride=2, padding=1))
            layers += [ConvBlock(size, activation, dropout) for _ in range(count)]
            channels = size
        self.convolutions = _channels_last(nn.Sequential(*layers, make_activation(activation)))
        self.out_shape: tuple[int, ...] = (channels, _halved(height, len(scales)), _halved(width, len(scales)))
        self.dense: nn.Module = nn.Identity()
        if dense:
            flat = math.prod(self.out_shape) + context_features
            self.dense = nn.Sequential(glorot(Linear(flat, dense)), make_activation(activation))
            self.out_shape = (dense,)
        elif context_features:
            raise ValueError("hidden: network 'conv' needs a dense width, not 0, to see a condition")
        self.out_features = math.prod(self.out_shape)

    def forward(self, features: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.convolutions(features.contiguous(memory_format=torch.channels_last))
        if len(self.out_shape) == 3:
            return h
        h = h.flatten(1)
        return self.dense(h if context is None else torch.cat([h, context], 1))


class ConvDecoder(nn.Module):
    """A dense layer, then residual blocks with pixel-shuffle up-sampling; its context is a map over the image.

    Without the dense layer the input is a flattened map at the coarsest scale.

    Pixel shuffle (Shi et al. 2016, arXiv 1609.05158) doubles the resolution; odd sizes are cut to fit.  The map at
    full resolution has a quarter of the channels of the finest scale, for it is by far the largest.

    Args:
        in_features: width of the input vector.
        out_shape: (channels, height, width) of one example.
        hidden: as for :class:`ConvEncoder`, in the encoder's order.
        blocks: as for :class:`ConvEncoder`.
    """

    def __init__(
        self,
        in_features: int,
        out_shape: Sequence[int],
        hidden: Sequence[int],
        activation: str = "silu",
        dropout: float = 0.0,
        blocks: int | Sequence[int] = 1,
    ) -> None:
        super().__init__()
        _, height, width = _image_shape(out_shape)
        scales, dense, counts = _plan(hidden, blocks)
        self.sizes = [(_halved(height, t), _halved(width, t)) for t in range(len(scales), -1, -1)]
        self.start = (scales[-1], *self.sizes[0])
        self.of_map = not dense
        self.dense: nn.Module
        if dense:
            self.dense = nn.Sequential(
                glorot(Linear(in_features, dense)),
                make_activation(activation),
                glorot(Linear(dense, math.prod(self.start))),
            )
        else:
            places = math.prod(self.sizes[0])
            if in_features % places:
                raise ValueError(f"latent_dim: expected a multiple of {places}, the places of a map, got {in_features}")
            self.start = (in_features // places, *self.sizes[0])
            self.dense = _channels_last(nn.Conv2d(self.start[0], scales[-1], 3, padding=1))
        finest = max(scales[0] // 4, out_shape[0])
        stages = []
        for t in reversed(range(len(scales))):
            finer = scales[t - 1] if t else finest
            body = [ConvBlock(scales[t], activation, dropout) for _ in range(counts[t])]
            up = nn.Conv2d(scales[t], 4 * finer, 3, padding=1)
            stages.append(nn.Sequential(*body, make_activation(activation), up, nn.PixelShuffle(2)))
        self.stages = _channels_last(nn.ModuleList(stages))
        self.final = make_activation(activation)
        self.out_shape = (finest, height, width)

    def forward(self, z: Tensor) -> Tensor:
        lead = z.shape[:-1]
        channels, height, width = self.start
        if self.of_map:
            h = self.dense(z.reshape(-1, *self.start).contiguous(memory_format=torch.channels_last))
        else:
            h = self.dense(z.reshape(-1, z.shape[-1])).reshape(-1, height, width, channels).movedim(-1, 1)
        for stage, (height, width) in zip(self.stages, self.sizes[1:]):
            h = stage(h.contiguous(memory_format=torch.channels_last))[:, :, :height, :width]
        return self.final(h).reshape(*lead, *self.out_shape)


def _channels_last(layers: Layers) -> Layers:
    """The layers with their weights stored channels last, the faster layout for convolutions on CPU and GPU."""
    return layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _plan(hidden: Sequence[int], blocks: int | Sequence[int]) -> tuple[list[int], int, list[int]]:
    """Channels of each scale, width of the dense layer, residual blocks of each scale."""
    if len(hidden) < 2:
        raise ValueError(
            f"hidden: network 'conv' needs the channels of each scale and a dense width, got {tuple(hidden)}"
        )
    *scales, dense = hidden
    counts = [blocks] * len(scales) if isinstance(blocks, int) else list(blocks)
    if len(counts) != len(scales) or min(counts) < 0:
        raise ValueError(f"blocks: expected one number, or one for each of {len(scales)} scales, got {blocks}")
    return scales, dense, counts
