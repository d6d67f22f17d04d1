"""Images at several scales: squeeze, coupling of channels, the split with a Gaussian prior, and their composition.

RealNVP (Dinh, Sohl-Dickstein & Bengio 2017, arXiv 1605.08803, section 3.6) and Glow (Kingma & Dhariwal 2018, arXiv
1807.03039, section 3).  Maps have shape ``(batch, channels, height, width)``, in whichever memory format they come.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.bijections.bijection import Bijection
from likely.bijections.elementwise import Affine, Elementwise
from likely.networks.coupling import CouplingNetwork
from likely.networks.linear import Linear
from likely.networks.mlp import full_precision


class Squeeze(Bijection):
    """Blocks of 2 × 2 pixels become four channels: shape (C, H, W) to (4 C, H / 2, W / 2); volume is kept.

    >>> z, log_det = Squeeze()(torch.arange(4.0).reshape(1, 1, 2, 2))
    >>> z.flatten().tolist(), log_det.tolist()
    ([0.0, 1.0, 2.0, 3.0], [0.0])
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"squeeze: expected an even height and width, got {tuple(x.shape[2:])}")
        return F.pixel_unshuffle(x, 2), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return F.pixel_shuffle(z, 2), z.new_zeros(len(z))


class ChannelCoupling(Bijection):
    """The second half of the channels is transformed as a convolutional network says that sees the first half.

        z₁ = x₁,    z₂ = f(x₂; network(x₁, context))    cell by cell

    (Kingma & Dhariwal 2018, table 1; with f a shift, NICE: Dinh, Krueger & Bengio 2015, arXiv 1410.8516).  The network
    starts at zero: the identity.

    Args:
        channels: of the map, at least 2; an odd one stays with the first half.
        elementwise: f.
        width: channels of the network's hidden layers.
        context: width of a context vector, or channels of a context map of the same size; 0 if there is none.
    """

    def __init__(self, channels: int, elementwise: Elementwise, width: int, context: int = 0) -> None:
        super().__init__()
        if channels < 2:
            raise ValueError(f"channels: expected at least 2 to couple, got {channels}")
        self.moved, self.elementwise = channels // 2, elementwise
        self.kept = channels - self.moved
        self.network = CouplingNetwork(self.kept, elementwise.numbers * self.moved, width, context)

    def _numbers(self, kept: Tensor, context: Tensor | None) -> Tensor:
        h = full_precision(self.network(kept, context))
        return h.unflatten(1, (self.elementwise.numbers, self.moved)).movedim(1, 0)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = x.split([self.kept, self.moved], 1)
        moved, log_slope = self.elementwise.forward(moved, self._numbers(kept, context))
        return torch.cat([kept, moved], 1), log_slope.sum((1, 2, 3))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = z.split([self.kept, self.moved], 1)
        moved, log_slope = self.elementwise.inverse(moved, self._numbers(kept, context))
        return torch.cat([kept, moved], 1), log_slope.sum((1, 2, 3))


class GaussianPrior(nn.Module):
    """The law of channels y that leave a multi-scale flow, normal with means and scales from what stays behind.

    It is given as the map of y to standard normal variates, z = (y − m) e^{−s}.  The split's prior of Kingma & Dhariwal
    2018, as their code has it: (m, s) = conv(channels that stay), started at zero; for those left at the end, with
    nothing behind them, one mean and scale a channel, and what the context adds.

    Args:
        channels: of y.
        given: channels of the map that stays behind, 0 at the end.
        context: width of a context vector, or channels of a context map of the same size; 0 if there is none.
    """

    def __init__(self, channels: int, given: int = 0, context: int = 0) -> None:
        super().__init__()
        self.elementwise, self.channels = Affine(), channels
        self.given = nn.Conv2d(given, 2 * channels, 3, padding=1) if given else None
        self.bias = None if given else nn.Parameter(torch.zeros(2 * channels, 1, 1))
        self.context = Linear(context, 2 * channels, bias=False) if context else None
        for layer in (self.given, self.context):
            for parameter in layer.parameters() if layer is not None else ():
                nn.init.zeros_(parameter)

    def _numbers(self, y: Tensor, given: Tensor, context: Tensor | None) -> Tensor:
        h = self.bias if self.given is None else full_precision(self.given(given))
        assert h is not None
        if self.context is not None:
            assert context is not None
            rows = context.movedim(1, -1) if context.dim() == 4 else context[:, None, None]
            h = h + full_precision(self.context(rows)).movedim(-1, 1)
        return h.expand(len(y), -1, *y.shape[2:]).unflatten(1, (2, self.channels)).movedim(1, 0)

    def forward(self, y: Tensor, given: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z, and log |det ∂z/∂y| in nats, shape ``(batch,)``."""
        z, log_slope = self.elementwise.forward(y, self._numbers(y, given, context))
        return z, log_slope.sum((1, 2, 3))

    def inverse(self, z: Tensor, given: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y, and log |det ∂y/∂z| in nats, shape ``(batch,)``."""
        y, log_slope = self.elementwise.inverse(z, self._numbers(z, given, context))
        return y, log_slope.sum((1, 2, 3))


class MultiScale(Bijection):
    """Levels of bijections; after each but the last, the second half of the channels leaves, standardised by its prior.

    From maps ``(batch, C, H, W)`` to vectors ``(batch, C · H · W)``: what leaves first comes first.  A level begins
    with a :class:`Squeeze` where its map can be halved.

    Args:
        shape: (channels, height, width) of x.
        levels: the bijections of each level, which keep the shape of the level's map; :func:`level_shapes` gives those.
        context: width of the context vector (or, for a single level, channels of a context map of the level's size); 0
            if there is none.
    """

    def __init__(self, shape: Sequence[int], levels: Sequence[Bijection], context: int = 0) -> None:
        super().__init__()
        shapes = level_shapes(shape, len(levels))
        last = len(shapes) - 1
        heights = [shape[1], *(height for _, height, _ in shapes)]
        self.squeezed = [before != after for before, after in itertools.pairwise(heights)]
        self.leaving = [(c // 2 if i < last else c, h, w) for i, (c, h, w) in enumerate(shapes)]
        self.squeeze, self.levels = Squeeze(), nn.ModuleList(levels)
        self.priors = nn.ModuleList(
            GaussianPrior(leaving, channels - leaving, context)
            for (channels, _, _), (leaving, _, _) in zip(shapes, self.leaving)
        )

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pieces, total = [], x.new_zeros(len(x))
        for level, prior, squeezed, leaving in zip(self.levels, self.priors, self.squeezed, self.leaving):
            x = self.squeeze(x)[0] if squeezed else x
            x, log_det = level(x.contiguous(memory_format=torch.channels_last), context)
            x, y = x.split([x.shape[1] - leaving[0], leaving[0]], 1)
            z, log_slope = prior(y, x, context)
            pieces.append(z.flatten(1))
            total = total + log_det + log_slope
        return torch.cat(pieces, 1), total

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        pieces = z.split([math.prod(leaving) for leaving in self.leaving], 1)
        x, total = z.new_zeros(len(z), 0, *self.leaving[-1][1:]), z.new_zeros(len(z))
        for place in reversed(range(len(pieces))):
            y, log_slope = self.priors[place].inverse(pieces[place].unflatten(1, self.leaving[place]), x, context)  # type: ignore[operator]
            x = torch.cat([x, y], 1).contiguous(memory_format=torch.channels_last)
            x, log_det = self.levels[place].inverse(x, context)  # type: ignore[operator]
            x = self.squeeze.inverse(x)[0] if self.squeezed[place] else x
            total = total + log_det + log_slope
        return x.contiguous(), total

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Each level from what those before it make of the batch."""
        for level, squeezed, leaving in zip(self.levels, self.squeezed, self.leaving):
            x = self.squeeze(x)[0] if squeezed else x
            level.initialise(x, context)  # type: ignore[operator]
            x = level(x, context)[0][:, : x.shape[1] - leaving[0]]


def level_shapes(shape: Sequence[int], levels: int) -> list[tuple[int, int, int]]:
    """Shapes of the maps of each level: halved in height and width where both are even, then split.

    >>> level_shapes((3, 32, 32), 3)
    [(12, 16, 16), (24, 8, 8), (48, 4, 4)]
    >>> level_shapes((1, 28, 28), 3)
    [(4, 14, 14), (8, 7, 7), (4, 7, 7)]

    Raises:
        ValueError: the map is no image, or a level has a single channel.
    """
    if len(shape) != 3:
        raise ValueError(f"shape: expected (channels, height, width), got {tuple(shape)}")
    channels, height, width = (int(size) for size in shape)
    shapes = []
    for level in range(levels):
        if level:
            channels = channels - channels // 2
        if height % 2 == 0 and width % 2 == 0:
            channels, height, width = 4 * channels, height // 2, width // 2
        if channels < 2:
            raise ValueError(
                f"levels: level {level + 1} of {levels} has a single channel of {height} × {width} pixels, and "
                "nothing to couple; expected fewer levels, or an even height and width"
            )
        shapes.append((channels, height, width))
    return shapes
