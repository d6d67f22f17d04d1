"""Elementwise transforms: monotone functions of one number, whose parameters somebody else provides.

A transform is a pure function of cells and *numbers* (its raw parameters, which may be any reals): it has no state, and
says how many numbers it takes for a cell.  Numbers stand on the FIRST axis, ``(numbers, *x.shape)``, so that what is
done for one of them, or summed over all, runs along contiguous memory; on the CPU that is many times faster than with
the numbers last.  Zero numbers give a mild map (mostly the identity), from which training starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from likely.networks.written import differentiable_backward, serves


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


class Written(Elementwise):
    """A transform whose derivative is written out, beside its plain operations: fewer passes over memory."""

    def forward(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return _Lean.apply(self, x, numbers) if serves(x, numbers) else self.plain(x, numbers)

    def plain(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`forward`, in plain operations."""
        raise NotImplementedError

    def lean(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """:meth:`forward` without a graph, and what :meth:`lean_backward` needs."""
        raise NotImplementedError

    def lean_backward(
        self, saved: Sequence[Tensor], of_z: Tensor, of_log_slope: Tensor, of_numbers: Tensor | None
    ) -> Tensor:
        """The gradient of x; that of the numbers is written to ``of_numbers``, if it is wanted."""
        raise NotImplementedError


class _Lean(torch.autograd.Function):
    """A :class:`Written` transform as a node of the graph."""

    @staticmethod
    def forward(ctx: Any, transform: Written, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        z, log_slope, saved = transform.lean(x, numbers)
        ctx.transform = transform
        ctx.save_for_backward(x, numbers, *saved)
        return z, log_slope

    @staticmethod
    def backward(ctx: Any, of_z: Tensor, of_log_slope: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        transform: Written = ctx.transform
        x, numbers, *saved = ctx.saved_tensors
        if torch.is_grad_enabled():  # for the derivative of the derivative
            of_x, of_numbers = differentiable_backward(
                transform.plain, (x, numbers), ctx.needs_input_grad[1:], of_z, of_log_slope
            )
            return None, of_x, of_numbers
        of_numbers = torch.empty_like(numbers) if ctx.needs_input_grad[2] else None
        return None, transform.lean_backward(saved, of_z, of_log_slope, of_numbers), of_numbers


class Affine(Written):
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

    def plain(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = numbers.unbind()
        log_slope = (raw / self.limit).tanh() * -self.limit
        return (x - mean) * log_slope.exp(), log_slope

    def lean(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        mean, raw = numbers.unbind()
        bent = (raw / self.limit).tanh_()
        log_slope = bent * -self.limit
        slope = log_slope.exp()
        z = (x - mean).mul_(slope)
        return z, log_slope, [bent, slope, z]

    def lean_backward(
        self, saved: Sequence[Tensor], of_z: Tensor, of_log_slope: Tensor, of_numbers: Tensor | None
    ) -> Tensor:
        bent, slope, z = saved
        of_x = of_z * slope
        if of_numbers is not None:
            of_mean, of_raw = of_numbers.unbind()
            torch.neg(of_x, out=of_mean)
            of_slope = torch.addcmul(of_log_slope, of_z, z)
            torch.ops.aten.tanh_backward.grad_input(of_slope, bent, grad_input=of_raw).neg_()
        return of_x

    def inverse(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = numbers.unbind()
        log_slope = (raw / self.limit).tanh() * self.limit
        return torch.addcmul(mean, z, log_slope.exp()), log_slope


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
