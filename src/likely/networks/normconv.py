"""Group norm, SiLU and a 3 × 3 convolution as one operation: the unit of which residual networks on images are made.

    y = w ∗ silu(norm(x + shift) · gain + offset) + bias + residual

``norm`` is the group norm of Wu & He (2018, arXiv 1803.08494).  Maps are channels last, ``(batch, height, width,
channels)``.  Two implementations give the same numbers:

* :func:`plain`, of PyTorch's operations, for any device and type, for compilation and derivatives of any order;
* :class:`_Lean`, for large float32 maps on the CPU.  It makes norm, shift and gain one multiplication and one addition,
  joins maps without a copy, multiplies half as often (:mod:`likely.networks.winograd`), and keeps for the derivative x
  and what it multiplied, nothing between.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.networks import winograd
from likely.networks.linear import is_plain
from likely.networks.written import differentiable_backward, in_forward_mode

EPSILON = 1e-5
#: Numbers in one example's map from which the lean implementation pays for its calls; the batch has no say, so that an
#: example's numbers do not depend on it.
LARGE = 1 << 11
#: Channels from which fewer multiplications pay for the passes that they cost.
WIDE = 32


class NormConv(nn.Module):
    """The operation with its parameters.

    >>> layer = NormConv(8, 4)
    >>> layer(torch.randn(2, 5, 6, 8)).shape
    torch.Size([2, 5, 6, 4])

    Args:
        in_channels: channels of x, or of x and ``skip`` together.
        out_channels: channels of y.
        groups: most groups of the norm, see :func:`divisor`.
        bias: whether y has a bias of its own; without one, the next norm's shift has it.
        dropout: share of the numbers that the convolution sees which are dropped in training.
    """

    def __init__(
        self, in_channels: int, out_channels: int, groups: int = 32, bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.groups = divisor(in_channels, groups)
        self.dropout = dropout
        self.gain = nn.Parameter(torch.ones(in_channels))
        self.offset = nn.Parameter(torch.zeros(in_channels))
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, math.sqrt(5))

    def forward(
        self, x: Tensor, skip: Tensor | None = None, shift: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Shape ``(batch, height, width, in_channels)`` to ``(batch, height, width, out_channels)``.

        Args:
            skip: a second map, whose channels follow those of x.
            shift: added to all positions before the norm, shape ``(batch, in_channels)``.
            residual: added to y.
        """
        arguments = (x, skip, shift, residual, self.gain, self.offset, self.weight, self.bias, self.groups)
        dropping = self.dropout and self.training
        if x[0].numel() >= LARGE and not dropping and is_plain(x, self.weight) and not in_forward_mode():
            return _Lean.apply(*arguments)
        return plain(*arguments, dropout=self.dropout if dropping else 0.0)


def divisor(channels: int, groups: int) -> int:
    """The largest number of groups up to ``groups`` that divides the channels and leaves each group four or more.

    A group of one channel would lose what the shift adds to it.

    >>> divisor(64, 32), divisor(48, 32), divisor(6, 32)
    (16, 12, 1)
    """
    return next(g for g in range(max(1, min(groups, channels // 4)), 0, -1) if channels % g == 0)


def plain(
    x: Tensor,
    skip: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    gain: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    dropout: float = 0.0,
) -> Tensor:
    """The operation in its plain form; arguments as those of :class:`NormConv`."""
    joined = x if skip is None else torch.cat([x, skip], 3)
    if shift is not None:
        joined = joined + shift.unsqueeze(1).unsqueeze(1).to(joined.dtype)
    hidden = F.silu(group_norm(joined, gain, offset, groups))
    if dropout:
        hidden = F.dropout(hidden, dropout)
    y = F.conv2d(hidden.permute(0, 3, 1, 2), weight, bias, padding=1).permute(0, 2, 3, 1)
    return y if residual is None else y + residual


def group_norm(x: Tensor, gain: Tensor, offset: Tensor, groups: int) -> Tensor:
    """Each example's groups of channels, over all positions, at mean 0 and variance 1; then gain and offset.

    Moments and their use are in float32 at least; the result has the type of x.
    """
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    grouped = wide.reshape(len(x), -1, groups, x.shape[3] // groups)
    variance, mean = torch.var_mean(grouped, (1, 3), correction=0, keepdim=True)
    scale = torch.rsqrt(variance + EPSILON) * gain.view(groups, -1)
    return torch.addcmul(offset.view(groups, -1) - mean * scale, grouped, scale).view(x.shape).to(x.dtype)


class _Lean(torch.autograd.Function):
    """The operation in few passes over the maps.

    With m and r the mean and the reciprocal deviation of x + shift in each group, silu's argument is u = a x + b, where
    a = gain r and b = offset + (shift − m) a differ by example and channel alone.
    """

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        skip: Tensor | None,
        shift: Tensor | None,
        residual: Tensor | None,
        gain: Tensor,
        offset: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: int,
    ) -> Tensor:
        maps = [part.contiguous() for part in (x, skip) if part is not None]
        positions = x.shape[1] * x.shape[2]
        # Moments in one pass, as PyTorch's own group norm for channels last has them: exact enough while means are not
        # hundreds of deviations from zero
        mean = torch.cat([part.sum((1, 2)) for part in maps], 1) / positions
        square = torch.cat([part.square().sum((1, 2)) for part in maps], 1) / positions
        moved = mean if shift is None else mean + shift
        square = square + moved.square() - mean.square()  # of x + shift
        group_mean = moved.view(len(x), groups, -1).mean(2, keepdim=True)
        variance = square.view(len(x), groups, -1).mean(2, keepdim=True) - group_mean.square()
        reciprocal = torch.rsqrt(variance.clamp_(min=0.0) + EPSILON)
        shape = mean.shape
        r = reciprocal.expand(-1, -1, shape[1] // groups).reshape(shape)
        moving = (group_mean.neg().expand(-1, -1, shape[1] // groups)).reshape(shape)  # (shift − m) of every channel
        if shift is not None:
            moving = moving + shift
        hidden, inner = _frame(maps, weight)
        u = _argument(maps, r * gain, offset + moving * (r * gain))
        torch.ops.aten.silu.out(u, out=inner)
        y, seen, kernel = _convolve(hidden, inner, weight)
        if bias is not None:
            y += bias if residual is None else residual + bias
        elif residual is not None:
            y += residual
        ctx.save_for_backward(x, skip, shift, residual, gain, offset, weight, bias, mean, r, moving, seen, kernel)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, skip, shift, _, gain, offset, _, bias, mean, r, moving, seen, kernel = ctx.saved_tensors
        if torch.is_grad_enabled():  # for the derivative of the derivative
            function = functools.partial(plain, groups=ctx.groups)
            return *differentiable_backward(function, ctx.saved_tensors[:8], ctx.needs_input_grad, gradient), None
        gradient = gradient.contiguous()
        maps = [part.contiguous() for part in (x, skip) if part is not None]
        positions = x.shape[1] * x.shape[2]
        a = r * gain
        of_hidden, of_weight = _convolve_backward(gradient, seen, kernel)
        u = _argument(maps, a, offset + moving * a)
        of_u = torch.ops.aten.silu_backward(of_hidden, u, grad_input=of_hidden)

        # Sums over positions of ∂u and of ∂u · normalised x, by example and channel; and their means by group
        parts = [part.shape[3] for part in maps]
        sums = of_u.sum((1, 2))
        products = [(of * part).sum((1, 2)) for of, part in zip(of_u.split(parts, 3), maps)]
        normalised = r * (torch.cat(products, 1) + moving * sums)
        share = 1.0 / (positions * (gain.numel() // ctx.groups))

        def by_group(values: Tensor) -> Tensor:
            means = (values * gain).view(len(x), ctx.groups, -1).sum(2, keepdim=True) * share
            return means.expand(-1, -1, gain.numel() // ctx.groups).reshape(values.shape)

        # ∂x = a ∂u + slope x + level
        slope = -r.square() * by_group(normalised)
        level = slope * moving - r * by_group(sums)
        of_maps = []
        for of, part, at in zip(of_u.split(parts, 3), maps, _slices(parts)):
            of_map = torch.addcmul(_wide(level[:, at]), part, _wide(slope[:, at]))
            of_maps.append(of_map.addcmul_(of, _wide(a[:, at])))
        of_shift = None
        if shift is not None:
            of_shift = a * sums + positions * (slope * mean + level)
        of_bias = None if bias is None else gradient.sum((0, 1, 2))
        return (
            of_maps[0],
            None if skip is None else of_maps[1],
            of_shift,
            gradient if ctx.needs_input_grad[3] else None,
            normalised.sum(0),
            sums.sum(0),
            of_weight,
            of_bias,
            None,
        )


def _slices(widths: list[int]) -> list[slice]:
    ends = torch.tensor([0, *widths]).cumsum(0).tolist()
    return [slice(start, end) for start, end in itertools.pairwise(ends)]


def _wide(values: Tensor) -> Tensor:
    """Values by example and channel, for all positions."""
    return values.unsqueeze(1).unsqueeze(1)


def _frame(maps: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Memory for the map that is convolved, and the part of it that is not padding."""
    n, height, width, _ = maps[0].shape
    if height % 4 == 0 and min(weight.shape[:2]) >= WIDE:
        hidden = maps[0].new_empty(n, height + 2, width, weight.shape[1])
        hidden[:, 0] = hidden[:, -1] = 0.0
        return hidden, hidden[:, 1:-1]
    hidden = maps[0].new_empty(n, height, width, weight.shape[1])
    return hidden, hidden


def _argument(maps: list[Tensor], a: Tensor, b: Tensor) -> Tensor:
    """u = a x + b of the maps side by side."""
    widths = [part.shape[3] for part in maps]
    u = maps[0].new_empty(*maps[0].shape[:3], sum(widths))
    for part, target, at in zip(maps, u.split(widths, 3), _slices(widths)):
        torch.addcmul(_wide(b[:, at]), part, _wide(a[:, at]), out=target)
    return u


def _convolve(hidden: Tensor, inner: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, and what its derivative needs: what was multiplied by what."""
    if inner is not hidden:
        return winograd.convolve(hidden, weight)
    kernel = weight.contiguous(memory_format=torch.channels_last)
    y = F.conv2d(hidden.permute(0, 3, 1, 2), kernel, padding=1)
    return y.permute(0, 2, 3, 1).contiguous(), hidden, kernel


def _convolve_backward(gradient: Tensor, seen: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    if seen.dim() == 5:
        return winograd.convolve_backward(gradient, seen, kernel)
    ends = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    of_hidden, of_weight, _ = torch.ops.aten.convolution_backward(
        gradient.permute(0, 3, 1, 2), seen.permute(0, 3, 1, 2), kernel, None, *ends
    )
    return of_hidden.permute(0, 2, 3, 1).contiguous(), of_weight
