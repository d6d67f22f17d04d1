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


class Activation(Rule):
    """An activation function by its table (exact32) or by its float64 function (exact64)."""

    table: Tensor
    peak_at: Tensor

    def __init__(self, curve: Curve, profile: Profile) -> None:
        super().__init__()
        self.curve, self.profile = curve, profile
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
        # By the largest place: max |value| if that is the value there, else −1.  The last entry is for places beyond.
        there = (table >= table.cummax(0).values) & (table >= -table.min())
        peaks = torch.where(there, table, -1.0)
        beyond = peaks.new_tensor([-1.0]) if self.curve.right[0] else peaks[-1:]
        self.register_buffer("peak_at", torch.cat([peaks, beyond]), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype == self.profile.dtype else x.to(self.profile.dtype)
        y = torch.empty_like(x)
        for part in parts(x):
            self.values(x[part], y[part])
        return y

    def values(self, x: Tensor, out: Tensor) -> Tensor:
        """Put the values for x into ``out``."""
        self.values_and_peaks(x, out)
        return out

    def values_and_peaks(self, x: Tensor, out: Tensor, axes: tuple[int, ...] = ()) -> Tensor | None:
        """Put the values for x into ``out``; see :meth:`replace_`."""
        check(x)
        if self.by_table:
            return self.replace_(torch.mul(x, float(STEPS), out=out).add_(self.zero), axes)
        return self.replace_(out.copy_(x), axes)

    @property
    def by_table(self) -> bool:
        """Whether the values come from the table."""
        return self.profile.dtype == torch.float32

    def replace_(self, x: Tensor, axes: tuple[int, ...] = ()) -> Tensor | None:
        """Replace numbers by the values; with a table, replace places in it, x · 256 + ``zero``.

        Returns:
            max |value| over ``axes``, if it is known from the largest place alone.
        """
        if self.by_table:
            return self._look_up_(x, axes)
        x.copy_(self.curve.function(x))
        return None

    def _look_up_(self, place: Tensor, axes: tuple[int, ...]) -> Tensor | None:
        right, left = self.curve.right[0], self.curve.left[0]
        largest = place.amax(axes, True)
        at = largest.clamp(0.0, self._end + 1.0).to(torch.int32)
        peak = self.peak_at.index_select(0, at.view(-1)).view(at.shape)
        known = not left and bool(peak.amin() >= 0.0)
        beyond = not known and bool((right and largest.amax() > self._end) or (left and place.amin() < 0.0))
        x = (place - self.zero) * (1.0 / STEPS) if beyond else place
        last = place.dim() == 4 and place.is_contiguous(memory_format=torch.channels_last)
        dense = place.permute(0, 2, 3, 1) if last else place
        for some in dense.view(-1).split(_TOGETHER):
            index = some.clamp_(0.0, self._end).to(torch.int32)  # half the memory of int64, hence quicker
            torch.index_select(self.table, 0, index, out=some)
        if beyond:  # the asymptotes that are constant are the ends of the table
            place.copy_(torch.where(x > self.curve.reach, x * right, place) if right else place)
            place.copy_(torch.where(x < -self.curve.reach, x * left, place) if left else place)
        return peak if known and axes else None

    def probe_input(self) -> Tensor:
        """Where the probe looks: beyond both ends, and between."""
        return torch.arange(-700, 701, device=self.table.device, dtype=self.profile.dtype) * (self.curve.reach / 512.0)
