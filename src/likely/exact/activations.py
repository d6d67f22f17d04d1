"""Activation functions: from a table in float32, computed by IEEE-only functions, or by these functions in float64.

A table holds f(i / 256) for |i / 256| ≤ its reach, and beyond it the function's asymptote takes over.  It is built from
:mod:`likely.exact.functions`, so every machine has the same table; it is looked up by an integer, so there is no rounding
left to differ.  The step of 1/256 is finer than what the next layer's integers resolve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from likely.exact import functions
from likely.exact.profiles import Profile, Rule, check

#: Entries per unit.
STEPS = 256


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

    def __init__(self, curve: Curve, profile: Profile) -> None:
        super().__init__()
        self.curve, self.profile = curve, profile
        self.middle = curve.reach * STEPS
        grid = torch.arange(-self.middle, self.middle + 1, dtype=torch.float64) * (1.0 / STEPS)
        values = curve.function(grid)
        values[0], values[-1] = (
            line[1] if not line[0] else end for line, end in zip((curve.left, curve.right), values[[0, -1]])
        )
        self.register_buffer("table", values.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype != self.profile.dtype:
            x = x.to(self.profile.dtype)
        if not x.numel():
            return x
        largest = check(x)
        y = self._computed(x) if x.dtype == torch.float64 else self._looked_up(x)
        return self._beyond(x, y) if largest > self.curve.reach else y

    def probe_input(self) -> Tensor:
        """Where the probe looks: beyond both ends, and between."""
        return torch.arange(-700, 701, device=self.table.device, dtype=self.profile.dtype) * (self.curve.reach / 512.0)

    def _computed(self, x: Tensor) -> Tensor:
        return self.curve.function(x)

    def _looked_up(self, x: Tensor) -> Tensor:
        # Half a step is added before the fraction is cut off: entry i serves [i − ½, i + ½) / 256.
        index = torch.mul(x, float(STEPS)).add_(self.middle + 0.5).clamp_(0.0, 2.0 * self.middle).to(torch.int64)
        last = index.is_contiguous(memory_format=torch.channels_last) if index.dim() == 4 else False
        dense = index.permute(0, 2, 3, 1) if last else index.contiguous()
        y = self.table.index_select(0, dense.view(-1)).view(dense.shape)
        return y.permute(0, 3, 1, 2) if last else y

    def _beyond(self, x: Tensor, y: Tensor) -> Tensor:
        """The asymptotes that are lines; the constant ones are the table's ends."""
        for beyond, (slope, constant) in (
            (x > self.curve.reach, self.curve.right),
            (x < -self.curve.reach, self.curve.left),
        ):
            if slope:
                y = torch.where(beyond, x * slope, y)
            elif x.dtype == torch.float64:
                y = torch.where(beyond, constant, y)
        return y
