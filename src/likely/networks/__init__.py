"""Function approximators.  They know shapes and nothing of probability.

Encoders map the features of an example, and an optional context vector, to a vector; decoders map a vector to a
*context*: a vector, or for the convolutional one a map ``(channels, height, width)`` that keeps the image's layout.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from likely.networks.convolution import ConvDecoder, ConvEncoder, PlaceLinear
from likely.networks.features import Features
from likely.networks.linear import Linear
from likely.networks.masked import MaskedLinear, MaskedMLP
from likely.networks.mlp import MLP, ResidualMLP, full_precision, make_activation

__all__ = [
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "Features",
    "Linear",
    "MaskedLinear",
    "MaskedMLP",
    "PlaceLinear",
    "ResidualMLP",
    "after",
    "decoder",
    "encoder",
    "full_precision",
    "make_activation",
]

#: ``"mlp"``, ``"residual"`` (both on vectors) or ``"conv"`` (images: shapes (C, H, W)).
NAMES = ("mlp", "residual", "conv")


class VectorEncoder(nn.Module):
    """Flattens the features, appends the context vector and applies a network on vectors."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.out_features: int = network.out_features  # type: ignore[assignment]

    def forward(self, features: Tensor, context: Tensor | None = None) -> Tensor:
        features = features.flatten(1)
        return self.network(features if context is None else torch.cat([features, context], 1))


def encoder(
    name: str,
    in_shape: Sequence[int],
    context_features: int,
    hidden: Sequence[int],
    activation: str,
    dropout: float = 0.0,
    blocks: int | Sequence[int] = 1,
) -> nn.Module:
    """An encoder by name: ``forward(features, context) -> (batch, out_features)``, or ``(batch, *out_shape)`` of a map.

    Args:
        name: ``mlp``, ``residual`` or ``conv``.
        in_shape: shape of the features of one example.
        context_features: width of the context vector, 0 if there is none.
        hidden: widths of the hidden layers; for ``conv`` the channels at each scale and, last, the dense width, or 0.
        blocks: residual blocks at each scale of ``conv``.
    """
    if name == "conv":
        return ConvEncoder(in_shape, context_features, hidden, activation, dropout, blocks)
    in_features = math.prod(in_shape) + context_features
    return VectorEncoder(_vector_network(name)(in_features, hidden, activation, dropout))


def after(encoder: nn.Module, out_features: int) -> Linear | PlaceLinear:
    """A linear map of what an encoder gives to so many features; where that is a map, the same at all its places."""
    shape: Any = getattr(encoder, "out_shape", None)
    if shape is None or len(shape) == 1:
        return Linear(encoder.out_features, out_features)  # type: ignore[arg-type]
    return PlaceLinear(shape, out_features)


def decoder(
    name: str,
    in_features: int,
    out_shape: Sequence[int],
    hidden: Sequence[int],
    activation: str,
    dropout: float = 0.0,
    blocks: int | Sequence[int] = 1,
) -> nn.Module:
    """A decoder by name: ``forward(vector) -> context``, with the shape of one context in ``out_shape``.

    Args:
        name: ``mlp``, ``residual`` or ``conv``.
        in_features: width of the input vector.
        out_shape: shape of one example (used by ``conv`` for the layout of its map).
        hidden: as for :func:`encoder`, in the encoder's order; the decoder reverses it.
    """
    if name == "conv":
        return ConvDecoder(in_features, out_shape, hidden, activation, dropout, blocks)
    return _vector_network(name)(in_features, tuple(reversed(hidden)), activation, dropout)


def _vector_network(name: str) -> Callable[..., nn.Module]:
    if name == "mlp":
        return MLP
    if name == "residual":
        return ResidualMLP
    raise ValueError(f"network: expected one of {', '.join(NAMES)}, got {name!r}")
