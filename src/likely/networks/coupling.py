"""The convolutional network of a coupling layer (Kingma & Dhariwal 2018, arXiv 1807.03039, section 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CouplingNetwork(nn.Module):
    """Three convolutions, 3 × 3, 1 × 1 and 3 × 3, with ReLU between them; the last starts at zero.

    The first two start with weights that :meth:`initialise` scales so that every channel of the hidden layers has
    mean 0 and variance 1 over a batch (Salimans & Kingma 2016, arXiv 1602.07868, section 3): what the paper's code does
    with an ActNorm, at no cost afterwards.

    >>> network = CouplingNetwork(6, 12, width=32)
    >>> network(torch.ones(2, 6, 4, 4)).abs().max().item()
    0.0

    Args:
        in_channels: channels of the input map.
        out_channels: channels of the output map.
        width: channels of the hidden layers; 512 in the paper.
        context: width of a context vector, or channels of a context map of the input's size; 0 if there is none.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, context: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 1)
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)
        self.context_map = nn.Conv2d(context, width, 1, bias=False) if context else None
        for layer in (self.first, self.second, self.last):
            nn.init.normal_(layer.weight, 0.0, 0.05 if layer is not self.last else 0.0)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Shape ``(batch, out_channels, height, width)``; that of the context ``(batch, context[, height, width])``."""
        h = torch.relu_(self._first(x, context))
        return self.last(torch.relu_(self.second(h)))

    def _first(self, x: Tensor, context: Tensor | None) -> Tensor:
        h = self.first(x.contiguous(memory_format=torch.channels_last))
        if self.context_map is None:
            return h
        assert context is not None
        return h + self.context_map(context if context.dim() == 4 else context[:, :, None, None])

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Scale the hidden layers by what they make of a batch."""
        h = self._first(x, context)
        scale = _standardise(self.first, h)
        if self.context_map is not None:
            self.context_map.weight.mul_(scale)
        _standardise(self.second, self.second(torch.relu(self._first(x, context))))


def _standardise(layer: nn.Conv2d, h: Tensor) -> Tensor:
    """Give the channels of the layer's output, ``h`` at present, mean 0 and variance 1; the scale, one a channel."""
    deviation, mean = torch.std_mean(h, (0, 2, 3))
    scale = torch.where(deviation > 1e-6, 1.0 / deviation, 1.0)  # a constant channel stays as it is
    assert layer.bias is not None
    layer.bias.copy_((layer.bias - mean) * scale)
    scale = scale.reshape(-1, 1, 1, 1)
    layer.weight.mul_(scale)
    return scale
