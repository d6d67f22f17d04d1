"""Activation functions: from a table in float32, computed by IEEE-only functions, or by these functions in float64.

A table holds f(i / 256) for |i / 256| ≤ its reach, and beyond it the function's asymptote takes over.  It is built
from :mod:`likely.exact.functions`, so every machine has the same table; it is looked up by an integer, so there is no
rounding left to differ.  The step of 1/256 is finer than what the next layer's integers resolve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from likely.exact import functions
from likely.exact.profiles import Profile, Rule, check, parts

#: Entries per unit.
STEPS = 256
#: Numbers that are looked up together.
_TOGETHER = 1 << 17


@dataclass(frozen=True)
class Curve:
    """An activation function: its values, and what it is far out.

    Args:
        function: on float64 tensors.
        reach: |x| from which the asymptotes hold.
        right, left: (slope, constant) of the asymptotes, of which one is zero.
    """

    function: Callable[[Tensor], Tensor]
    reach: int
    right: tuple[float, float]
    left: tuple[float, float]


_LINE, _ZERO, _ONE = (1.0, 0.0), (0.0, 0.0), (0.0, 1.0)
_GELU_TANH = float.fromhex("0x1.9884533d43651p-1")  # √(2/π)
_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. 2017, arXiv 1706.02515


def _gelu(approximate: str) -> Curve:
    if approximate == "tanh":
        return Curve(
            lambda x: x * ((functions.tanh((x + x * x * x * 0.044715) * _GELU_TANH) + 1.0) * 0.5), 16, _LINE, _ZERO
        )
    return Curve(lambda x: x * functions.normal_cdf(x), 16, _LINE, _ZERO)


def _softplus(beta: float, threshold: float) -> Curve:
    def function(x: Tensor) -> Tensor:
        scaled = x * beta
        return torch.where(scaled > threshold, x, functions.softplus(scaled) * (1.0 / beta))

    return Curve(function, _reach(16.0 / beta), _LINE, _ZERO)


def _elu(alpha: float, scale: float = 1.0, width: float = 1.0) -> Curve:
    """scale · x above 0, scale · α (exp(x / width) − 1) below."""

    def function(x: Tensor) -> Tensor:
        below = functions.expm1(torch.where(x < 0, x, 0.0 * x) * (1.0 / width)) * alpha
        return torch.where(x > 0, x, below) * scale

    return Curve(function, _reach(16.0 * width), (scale, 0.0), (0.0, -alpha * scale))


def _reach(x: float) -> int:
    if not 0.0 < x <= 4096.0:
        raise ValueError(f"activation: expected parameters between 1/256 and 256, got a reach of {x:g}")
    return max(1, math.ceil(x))


#: The curve of each type of activation, made from the module's options.
CURVES: dict[type[nn.Module], Callable[..., Curve]] = {
    nn.SiLU: lambda m: Curve(lambda x: x * functions.sigmoid(x), 16, _LINE, _ZERO),
    nn.GELU: lambda m: _gelu(m.approximate),
    nn.Tanh: lambda m: Curve(functions.tanh, 16, _ONE, (0.0, -1.0)),
    nn.Sigmoid: lambda m: Curve(functions.sigmoid, 16, _ONE, _ZERO),
    nn.Softplus: lambda m: _softplus(float(m.beta), float(m.threshold)),
    nn.ELU: lambda m: _elu(float(m.alpha)),
    nn.CELU: lambda m: _elu(float(m.alpha), width=float(m.alpha)),
    nn.SELU: lambda m: _elu(_SELU_ALPHA, _SELU_SCALE),
    nn.Mish: lambda m: Curve(lambda x: x * functions.tanh(functions.softplus(x)), 16, _LINE, _ZERO),
    nn.LogSigmoid: lambda m: Curve(lambda x: -functions.softplus(-x), 16, _ZERO, _LINE),
}


class Rectifier(Rule):
    """max(x, 0)."""

    def forward(self, x: Tensor, in_place: bool = False) -> Tensor:
        return x.clamp_min_(0) if in_place else x.clamp_min(0)


class Activation(Rule):
    """An activation function by its table (exact32) or by its float64 function (exact64)."""

    table: Tensor
    summit: Tensor

    def __init__(self, curve: Curve, profile: Profile) -> None:
        super().__init__()
        self.curve, self.profile = curve, profile
        #: Whether the values come from the table.
        self.by_table = profile.dtype == torch.float32
        middle = curve.reach * STEPS
        #: The place of 0: half a step is added before the fraction is cut off, so entry i serves [i − ½, i + ½) / 256.
        self.zero = middle + 0.5
        self._end = 2.0 * middle
        grid = torch.arange(-middle, middle + 1, dtype=torch.float64) * (1.0 / STEPS)
        values = curve.function(grid)
        values[0], values[-1] = (
            line[1] if not line[0] else end for line, end in zip((curve.left, curve.right), values[[0, -1]])
        )
        table = values.float()
        self.register_buffer("table", table, persistent=False)
        size = table.abs()
        #: Where the value is the largest in size of all up to there.
        self.register_buffer("summit", size >= size.cummax(0).values, persistent=False)
        #: No value is less.
        self.least = table.min().item() if self.by_table and not curve.left[0] else -math.inf

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype == self.profile.dtype else x.to(self.profile.dtype)
        y = torch.empty_like(x)
        for some, out in parts(x, y):
            self.values(some, out)
        return y

    def values(self, x: Tensor, out: Tensor, axes: tuple[int, ...] = ()) -> Tensor | None:
        """Put the values for x into ``out``; their peaks over ``axes``, as :meth:`replace_` says."""
        if not self.by_table:
            check(x)
            return self.replace_(out.copy_(x))
        torch.mul(x, float(STEPS), out=out).add_(self.zero)
        top, inside = out.amax(axes, True), bool(out.numel())
        inside = inside and out.amin().item() >= 0.0 and top.amax().item() <= self._end
        if not inside:
            check(x)
        return self._look_up_(out, top, inside)

    def replace_(self, x: Tensor, axes: tuple[int, ...] = ()) -> Tensor | None:
        """Replace numbers by the values; with a table, replace places in it, x · 256 + ``zero``.

        Returns:
            max |value| over ``axes``, which are kept with size 1, where the largest places tell; else None.
        """
        if self.by_table:
            return self._look_up_(x, x.amax(axes, True))
        x.copy_(self.curve.function(x))
        return None

    def _look_up_(self, place: Tensor, top: Tensor, inside: bool = False) -> Tensor | None:
        """Args:
        top: the largest place, or the largest over some axes.
        inside: whether all places are known to be within the table.
        """
        right, left = self.curve.right[0], self.curve.left[0]
        over = not inside and top.numel() and not top.amax().item() <= self._end
        beyond = bool(right and over) or bool(left and not inside and place.amin().item() < 0.0)
        x = (place - self.zero) * (1.0 / STEPS) if beyond else place
        last = place.dim() == 4 and place.is_contiguous(memory_format=torch.channels_last)
        dense = place.permute(0, 2, 3, 1) if last else place
        for some in dense.view(-1).split(_TOGETHER):
            # in 32 bits, half the memory of int64, hence quicker
            index = (some if inside else some.clamp_(0.0, self._end)).to(torch.int32)
            torch.index_select(self.table, 0, index, out=some)
        if beyond:  # the asymptotes that are constant are the ends of the table
            place.copy_(torch.where(x > self.curve.reach, x * right, place) if right else place)
            place.copy_(torch.where(x < -self.curve.reach, x * left, place) if left else place)
        if over or left or not self.summit[(highest := top.clamp_(min=0.0).long().flatten())].all():
            return None
        return self.table[highest].abs_().view_as(top)

    def probe_input(self) -> Tensor:
        """Where the probe looks: beyond both ends, and between."""
        return torch.arange(-700, 701, device=self.table.device, dtype=self.profile.dtype) * (self.curve.reach / 512.0)
