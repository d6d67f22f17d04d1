"""Monotone rational-quadratic splines (Durkan, Bekasov, Murray & Papamakarios 2019, arXiv 1906.04032).

On a box [lo, hi]² the curve runs through K + 1 knots; in the bin from (x₀, y₀), of width w and height h, with slopes d₀
and d₁ at its ends, s = h / w and θ = (x − x₀) / w,

    z = y₀ + h [s θ² + d₀ θ(1−θ)] / [s + (d₀ + d₁ − 2s) θ(1−θ)]                                            (their eq. 4)
    ∂z/∂x = s² [d₁ θ² + 2s θ(1−θ) + d₀ (1−θ)²] / [s + (d₀ + d₁ − 2s) θ(1−θ)]²                              (their eq. 5)

Outside the box the curve goes on as a straight line with the slope that it has at the edge: 1 (``identity`` tails), or
a slope of its own (``linear``).  So the slope is continuous everywhere, and no x, however far outside, gives a gradient
that is not finite: the bins only ever see x held inside the box.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from likely.bijections.elementwise import Elementwise

#: Least width and height of a bin as a share of the box, and least slope at a knot.
LEAST_SIZE, LEAST_SLOPE = 1e-3, 1e-3
#: A raw slope of 0 means a slope of 1.
_UNIT = math.log(math.expm1(1.0 - LEAST_SLOPE))


class Spline(Elementwise):
    """A rational-quadratic spline of K bins inside a box, straight lines outside; zero numbers give the identity.

    >>> spline = Spline(bins=4, bounds=(-2.0, 2.0))
    >>> x = torch.tensor([-30.0, -1.0, 0.5, 30.0])
    >>> z, log_slope = spline.forward(x, torch.zeros(spline.numbers, 4))
    >>> z
    tensor([-30.0000,  -1.0000,   0.5000,  30.0000])

    Args:
        bins: K.
        bounds: the box, (lo, hi), or one number b for (−b, b).
        tails: ``identity``, or ``linear`` for a slope of their own on either side.
    """

    def __init__(self, bins: int = 8, bounds: float | tuple[float, float] = 4.0, tails: str = "identity") -> None:
        low, high = (-bounds, bounds) if isinstance(bounds, int | float) else bounds
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"bounds: expected finite lo < hi, got {low} and {high}")
        if not 1 <= bins < 0.5 / LEAST_SIZE:
            raise ValueError(f"bins: expected 1 to {int(0.5 / LEAST_SIZE) - 1}, got {bins}")
        if tails not in ("identity", "linear"):
            raise ValueError(f"tails: expected 'identity' or 'linear', got {tails!r}")
        self.bins, self.low, self.high, self.tails = bins, float(low), float(high), tails
        self.numbers = 3 * bins + (1 if tails == "linear" else -1)
        self._least = LEAST_SIZE * (self.high - self.low)  # of a bin's sizes, in units of x
        self._free = (self.high - self.low) - bins * self._least  # what the softmax shares out

    def forward(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return _Curve.apply(x, numbers, self) if _plain(x, numbers) else self._curve(x, numbers)

    def inverse(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        inside = z.clamp(self.low, self.high)
        sizes, knots, edges = self._bins(numbers)
        at = _place(inside, knots[1])
        (w, h), (x0, y0), (d0, d1) = self._bin(at, sizes, knots, edges)
        s = h / w
        rise = ((inside - y0) / h).clamp(0.0, 1.0)
        bend = (d0 + d1 - 2.0 * s) * rise
        a, b, c = s - d0 + bend, d0 - bend, -s * rise  # a θ² + b θ + c = 0
        root, bent = b.abs() + (b * b - 4.0 * a * c).clamp(min=0.0).sqrt(), b < 0  # of two ways, the one without
        theta = torch.where(bent, root, -2.0 * c) / torch.where(bent, 2.0 * a, root)  # a difference of equals
        _, log_slope = _rational(theta, s, h, d0, d1)
        outside = z != inside
        if self.tails == "identity":
            return torch.where(outside, z, x0 + theta * w), torch.where(outside, 0.0, -log_slope)
        edge = torch.where(z < self.low, d0, d1)
        x = torch.where(outside, inside + (z - inside) / edge, x0 + theta * w)
        return x, torch.where(outside, -edge.log(), -log_slope)

    def _curve(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`forward`, in plain operations."""
        inside = x.clamp(self.low, self.high)
        sizes, knots, edges = self._bins(numbers)
        at = _place(inside, knots[0])
        (w, h), (x0, y0), (d0, d1) = self._bin(at, sizes, knots, edges)
        rise, log_slope = _rational((inside - x0) / w, h / w, h, d0, d1)
        outside = x != inside
        if self.tails == "identity":
            return torch.where(outside, x, y0 + rise), torch.where(outside, 0.0, log_slope)
        edge = torch.where(x < self.low, d0, d1)
        z = torch.where(outside, inside + (x - inside) * edge, y0 + rise)
        return z, torch.where(outside, edge.log(), log_slope)

    def _bins(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sizes and lower ends of the bins along x and y, both ``(2, K, …)``, and raw slopes ``(K + 1, …)``."""
        k = self.bins
        sizes = torch.softmax(numbers[: 2 * k].unflatten(0, (2, k)), 1) * self._free + self._least
        ends = [torch.full_like(sizes[:, 0], self.low)]
        for i in range(k - 1):
            ends.append(ends[-1] + sizes[:, i])
        return sizes, torch.stack(ends, 1), self._edges(numbers)

    def _edges(self, numbers: Tensor) -> Tensor:
        """Raw slopes at the K + 1 knots, of which 0 stands for a slope of 1."""
        raw = numbers[2 * self.bins :]
        if self.tails == "linear":
            return raw
        end = torch.zeros_like(numbers[:1])
        return torch.cat([end, raw, end])

    def _bin(
        self, at: Tensor, sizes: Tensor, knots: Tensor, edges: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Sizes (w, h), lower ends (x₀, y₀) and slopes (d₀, d₁) of the bin of every cell."""
        pair = at.expand(2, 1, *at.shape[1:])
        slopes = F.softplus(edges.gather(0, torch.cat([at, at + 1])) + _UNIT) + LEAST_SLOPE
        return sizes.gather(1, pair).squeeze(1), knots.gather(1, pair).squeeze(1), (slopes[0], slopes[1])


def _place(x: Tensor, lower: Tensor) -> Tensor:
    """Number of the bin of every cell, ``(1, …)``, given the lower ends ``(K, …)``."""
    return (x >= lower[1:]).sum(0, keepdim=True)


def _rational(theta: Tensor, s: Tensor, h: Tensor, d0: Tensor, d1: Tensor) -> tuple[Tensor, Tensor]:
    """Rise above the lower end of the bin, and log-slope."""
    rest = 1.0 - theta
    u = theta * rest
    below = s + (d0 + d1 - 2.0 * s) * u
    rise = h * (s * theta * theta + d0 * u) / below
    above = d1 * theta * theta + 2.0 * s * u + d0 * rest * rest
    return rise, (above * (s / below).square()).log()


def _plain(x: Tensor, numbers: Tensor) -> bool:
    """Whether a gradient may be wanted, by reverse mode alone, so that the derivative written by hand serves."""
    return (
        torch.is_grad_enabled()
        and (x.requires_grad or numbers.requires_grad)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
    )


class _Curve(torch.autograd.Function):
    """:meth:`Spline._curve` with its derivative written out: a fraction of the passes over memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, numbers: Tensor, spline: Spline) -> tuple[Tensor, Tensor]:
        k = spline.bins
        inside = x.clamp(spline.low, spline.high)
        sizes = torch.softmax(numbers[: 2 * k].unflatten(0, (2, k)), 1).mul_(spline._free).add_(spline._least)
        knots = torch.empty_like(sizes)
        knots[:, 0] = spline.low
        for i in range(k - 1):
            torch.add(knots[:, i], sizes[:, i], out=knots[:, i + 1])
        passed = knots[0, 1:] <= inside
        at = passed.sum(0, keepdim=True)
        pair = at.expand(2, 1, *x.shape)
        w, h = sizes.gather(1, pair).squeeze(1)
        x0, y0 = knots.gather(1, pair).squeeze(1)
        raw = spline._edges(numbers).gather(0, torch.cat([at, at + 1])).add_(_UNIT)
        d0, d1 = F.softplus(raw).add_(LEAST_SLOPE)
        theta, s = (inside - x0).div_(w), h / w
        rest = 1.0 - theta
        u, square = theta * rest, theta * theta
        below = torch.add(d0 + d1, s, alpha=-2.0).mul_(u).add_(s)
        share = (d0 * u).addcmul_(s, square).div_(below)  # of the bin's height
        above = (d1 * square).addcmul_(d0, rest.square_()).addcmul_(s, u, value=2.0)
        slope = (s / below).square_().mul_(above)
        z, outside = torch.addcmul(y0, h, share), x != inside
        if spline.tails == "identity":
            z, slope = torch.where(outside, x, z), slope.masked_fill_(outside, 1.0)
        else:
            edge = torch.where(x < spline.low, d0, d1)
            z = torch.where(outside, (x - inside).mul_(edge).add_(inside), z)
            slope = torch.where(outside, edge, slope)
        ctx.spline = spline
        found = (passed, at, theta, s, u, square, rest, below, share, above, w, h, x0, y0, raw, d0, d1, slope)
        ctx.save_for_backward(x, numbers, sizes, *found)
        return z, slope.log()

    @staticmethod
    def backward(ctx: Any, of_z: Tensor, of_log_slope: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, numbers, sizes, *found = ctx.saved_tensors
        passed, at, theta, s, u, square, rest_square, below, share, above, w, h, x0, y0, raw, d0, d1, slope = found
        spline: Spline = ctx.spline
        if torch.is_grad_enabled():  # somebody wants derivatives of the derivative
            wanted = [value for value, needed in zip((x, numbers), ctx.needs_input_grad) if needed]
            found = iter(
                torch.autograd.grad(spline._curve(x, numbers), wanted, (of_z, of_log_slope), create_graph=True)
            )
            of_x, of_numbers = (next(found) if needed else None for needed in ctx.needs_input_grad[:2])
            return of_x, of_numbers, None

        # 1. What lies outside sees the slope at the edge alone
        inside = x.clamp(spline.low, spline.high)
        within = (x == inside).to(x.dtype)
        without = 1.0 - within
        of_x = of_z * slope * without
        of_edge = (of_z * (x - inside) + of_log_slope / slope) * without if spline.tails == "linear" else None
        of_z, of_log_slope = of_z * within, of_log_slope * within

        # 2. By θ, s = h / w, and the two slopes, at fixed h
        turn, curve = torch.rsub(theta, 1.0, alpha=2.0), torch.add(d0 + d1, s, alpha=-2.0)
        by_above, by_below, by_share = of_log_slope / above, of_log_slope / below, of_z * h / below
        bent = torch.addcmul(d1 * theta, s, turn).sub_(d0 - d0 * theta)
        of_theta = (of_z * slope).mul_(w).addcmul_(by_above, bent, value=2.0)
        of_theta.addcmul_(by_below * curve, turn, value=-2.0)
        of_s = torch.addcmul(of_log_slope / s, by_above, u).mul_(2.0).addcmul_(by_share, square)
        of_s.sub_((by_share * share).add_(by_below, alpha=2.0).mul_(torch.rsub(u, 1.0, alpha=2.0)))
        fall = torch.addcmul(by_below * 2.0, by_share, share).mul_(u)
        of_slopes = torch.stack(
            [
                (by_share * u).addcmul_(by_above, rest_square).sub_(fall),
                (by_above * square).sub_(fall),
            ]
        )
        if of_edge is not None:
            lower = (x < spline.low).to(x.dtype)
            of_slopes += torch.stack([of_edge * lower, of_edge * (1.0 - lower)])
        of_inside = of_theta / w
        of_x += of_inside
        if not ctx.needs_input_grad[1]:
            return of_x, None, None

        # 3. By the sizes of the cell's bin, and of those before it, which move its lower end; then through the softmax
        own = torch.stack([-(theta * of_theta + s * of_s) / w, of_z * share + of_s / w])
        before = torch.stack([-of_inside, of_z])
        k, bins = spline.bins, at.to(x.dtype)
        shared = torch.stack([x0, y0]) - spline.low - bins * spline._least  # out by the softmax, before the bin
        mean = (before * shared + own * (torch.stack([w, h]) - spline._least)) / spline._free
        of_numbers = torch.empty_like(numbers)
        of_sizes = of_numbers[: 2 * k].unflatten(0, (2, k))
        reached = x.new_ones(k + 1, *x.shape)  # [bin j is mine or before it]; what comes before mine reaches j + 1
        reached[1:k] = passed
        reached[k] = 0.0
        torch.mul(reached[:k], own.unsqueeze(1), out=of_sizes)
        of_sizes.addcmul_(reached[1:], (before - own).unsqueeze(1)).sub_(mean.unsqueeze(1)).mul_(sizes - spline._least)
        of_edges = x.new_zeros(k + 1, *x.shape)
        of_edges.scatter_(0, torch.cat([at, at + 1]), of_slopes.mul_(raw.sigmoid()))
        of_numbers[2 * k :] = of_edges if spline.tails == "linear" else of_edges[1:-1]
        return of_x, of_numbers, None
