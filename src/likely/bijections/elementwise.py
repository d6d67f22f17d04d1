"""Elementwise transforms: monotone functions of one number, whose parameters somebody else provides.

A transform is a pure function of cells and *numbers* (its raw parameters, which may be any reals): it has no state, and
says how many numbers it takes for a cell.  Numbers stand on the FIRST axis, ``(numbers, *x.shape)``, so that what is
done for one of them, or summed over all, runs along contiguous memory; on the CPU that is many times faster than with
the numbers last.  Zero numbers give a mild map (mostly the identity), from which training starts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Elementwise:
    """A strictly increasing function z = f(x; numbers) of every cell."""

    #: How many numbers f takes for a cell.
    numbers: int = 0
    #: Whether examples may share their numbers, which then have an axis of length 1 in their place.
    shares: bool = False

    def forward(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """z and log ∂z/∂x of every cell, of the shape of x.

        Args:
            numbers: shape ``(self.numbers, *x.shape)``.
        """
        raise NotImplementedError

    def inverse(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """x and log ∂x/∂z of every cell."""
        raise NotImplementedError


class Affine(Elementwise):
    """z = (x − m) e^{−s}: the cell standardised by a mean m and a log-deviation s.

    Args:
        limit: bound on |s|, which a smooth function, c tanh(raw / c), keeps; e^7 ≈ 1,100.

    >>> z, log_slope = Affine().forward(torch.tensor([3.0]), torch.tensor([[1.0], [math.log(2.0)]]))
    >>> round(z.item(), 3), round(log_slope.item(), 3)
    (1.002, -0.691)
    """

    numbers = 2

    def __init__(self, limit: float = 7.0) -> None:
        if not limit > 0:
            raise ValueError(f"limit: expected a positive number, got {limit}")
        self.limit = limit

    def forward(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = numbers
        log_slope = (raw / self.limit).tanh() * -self.limit
        return (x - mean) * log_slope.exp(), log_slope

    def inverse(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = numbers
        log_slope = (raw / self.limit).tanh() * self.limit
        return z * log_slope.exp() + mean, log_slope


class Additive(Elementwise):
    """z = x − m: volume is kept (NICE: Dinh, Krueger & Bengio 2014, arXiv 1410.8516)."""

    numbers = 1

    def forward(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return x - numbers[0], torch.zeros_like(x)

    def inverse(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return z + numbers[0], torch.zeros_like(z)


class Sigmoid(Elementwise):
    """z = 1 / (1 + e^{−x}), from the line to (0, 1); it takes no numbers.

    In float32 an x above 17 gives exactly 1, from which there is no way back.
    """

    def forward(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return x.sigmoid(), F.logsigmoid(x) + F.logsigmoid(-x)

    def inverse(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        log_z, log_rest = z.log(), torch.log1p(-z)
        return log_z - log_rest, -(log_z + log_rest)


class Logit(Elementwise):
    """z = log x − log(1 − x), from (0, 1) to the line; it takes no numbers.  An x of 0 or 1 gives an infinity."""

    def forward(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return Sigmoid().inverse(x, numbers)

    def inverse(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return Sigmoid().forward(z, numbers)


class Softplus(Elementwise):
    """z = log(1 + e^x), from the line to the positive numbers; it takes no numbers."""

    def forward(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return F.softplus(x), F.logsigmoid(x)

    def inverse(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        log_slope = -torch.log(-torch.expm1(-z))  # x = log(e^z − 1) = z + log(1 − e^{−z})
        return z - log_slope, log_slope


class Arcsinh(Elementwise):
    """z = asinh(λx) / λ with λ = e^r: what lies far outside comes near, as by a logarithm; zero numbers: λ = 1.

    The curve hardly bends where |λx| < 1; far outside it is a logarithm, so that a normal z makes an x with the heavy
    tails of a log-normal law, and no x is so far outside that its density is all but zero.

    Args:
        limit: bound on |r|.
    """

    numbers = 1
    shares = True

    def __init__(self, limit: float = 4.0) -> None:
        self.limit = limit

    def forward(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        rate = self._rate(numbers)
        u = x * rate
        return torch.asinh(u) / rate, -torch.hypot(u, u.new_ones(())).log()  # ∂z/∂x = 1 / √(1 + u²), without overflow

    def inverse(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        rate = self._rate(numbers)
        return torch.sinh(z * rate) / rate, _log_cosh(z * rate)

    def _rate(self, numbers: Tensor) -> Tensor:
        return ((numbers[0] / self.limit).tanh() * self.limit).exp()


def _log_cosh(x: Tensor) -> Tensor:
    """log cosh x, without overflow: cosh x = e^|x| (1 + e^{−2|x|}) / 2."""
    return x.abs() - F.logsigmoid(2.0 * x.abs()) + math.log(0.5)
