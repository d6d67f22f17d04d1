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
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from likely.bijections.elementwise import Written

#: Least width and height of a bin as a share of the box, and least slope at a knot.
LEAST_SIZE, LEAST_SLOPE = 1e-3, 1e-3
#: A raw slope of 0 means a slope of 1.
_UNIT = math.log(math.expm1(1.0 - LEAST_SLOPE))


class Spline(Written):
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

    def plain(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
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

    def inverse(self, z: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        inside = z.clamp(self.low, self.high)
        sizes, knots, edges = self._bins(numbers)
        at = _place(inside, knots[1])
        (w, h), (x0, y0), (d0, d1) = self._bin(at, sizes, knots, edges)
        s = h / w
        outside = z != inside
        rise = ((inside - y0) / h).clamp(0.0, 1.0).masked_fill(outside, 0.5)  # at an end the root may be of nothing
        bend = (d0 + d1 - 2.0 * s) * rise
        a, b, c = s - d0 + bend, d0 - bend, -s * rise  # a θ² + b θ + c = 0
        root, bent = b.abs() + (b * b - 4.0 * a * c).clamp(min=0.0).sqrt(), b < 0  # of two ways, the one without
        theta = torch.where(bent, root, -2.0 * c) / torch.where(bent, 2.0 * a, root)  # a difference of equals
        _, log_slope = _rational(theta, s, h, d0, d1)
        if self.tails == "identity":
            return torch.where(outside, z, x0 + theta * w), torch.where(outside, 0.0, -log_slope)
        edge = torch.where(z < self.low, d0, d1)
        x = torch.where(outside, inside + (z - inside) / edge, x0 + theta * w)
        return x, torch.where(outside, -edge.log(), -log_slope)

    def lean(self, x: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        k, least, free = self.bins, self._least, self._free
        inside = x.clamp(self.low, self.high)
        shares = torch.softmax(numbers[: 2 * k].unflatten(0, (2, k)), 1)
        knots = self._lower_ends(shares)
        passed = knots[0, 1:] <= inside
        at = passed.sum(0, keepdim=True, dtype=torch.int16).long()
        pair = at.expand(2, 1, *x.shape)
        share_of_bin, lower = shares.gather(1, pair).squeeze(1), knots.gather(1, pair).squeeze(1)
        sizes = share_of_bin * free + least
        w, h = sizes.unbind()
        ends = torch.cat([at, at + 1])
        raw = self._edges(numbers).gather(0, ends).add_(_UNIT)
        slopes = F.softplus(raw).add_(LEAST_SLOPE)
        d0, d1 = slopes.unbind()
        theta, s = (inside - lower[0]).div_(w), h / w
        rest = 1.0 - theta
        u, square, rest_square = theta * rest, theta * theta, rest * rest
        curve = torch.add(d0 + d1, s, alpha=-2.0)
        below = torch.addcmul(s, curve, u)
        rise = (d0 * u).addcmul_(s, square).div_(below)  # share of the bin's height
        above = (d1 * square).addcmul_(d0, rest_square).addcmul_(s, u, value=2.0)
        slope = (s / below).square_().mul_(above)
        z, outside = torch.addcmul(lower[1], h, rise), x != inside
        if self.tails == "identity":
            z, slope = torch.where(outside, x, z), slope.masked_fill_(outside, 1.0)
        else:
            edge = torch.where(x < self.low, d0, d1)
            z = torch.where(outside, (x - inside).mul_(edge).add_(inside), z)
            slope = torch.where(outside, edge, slope)
        found = [theta, s, rest, u, square, rest_square, curve, below, rise, above, slope, outside]
        return z, slope.log(), [x, shares, passed, at, share_of_bin, lower, sizes, ends, raw, slopes, *found]

    def lean_backward(
        self, saved: Sequence[Tensor], of_z: Tensor, of_log_slope: Tensor, of_numbers: Tensor | None
    ) -> Tensor:
        x, shares, passed, at, share_of_bin, lower, sizes, ends, raw, slopes, *found = saved
        theta, s, rest, u, square, rest_square, curve, below, rise, above, slope, outside = found
        (w, h), (d0, d1), k = sizes.unbind(), slopes.unbind(), self.bins

        # 1. What lies outside sees the slope at the edge alone
        of_z = of_z.contiguous()  # a view in another order would slow all that follows
        of_all_z, of_outer = of_z, None
        if self.tails == "linear":
            away = x - x.clamp(self.low, self.high)
            of_outer = torch.where(outside, of_z * away + of_log_slope / slope, 0.0)
        of_z, of_log_slope = of_z.masked_fill(outside, 0.0), of_log_slope.masked_fill(outside, 0.0)

        # 2. By θ, s = h / w, and the two slopes, at fixed h
        turn = rest - theta
        by_above, by_below, by_rise = of_log_slope / above, of_log_slope / below, (of_z * h).div_(below)
        bent = (d1 * theta).addcmul_(s, turn).addcmul_(d0, rest, value=-1.0)
        of_theta = bent.mul_(by_above).addcmul_(by_below * curve, turn, value=-1.0)  # half of it, but for that by z
        of_x = torch.addcmul(of_theta.mul_(2.0).div_(w), of_all_z, slope)
        if of_numbers is None:
            return of_x
        of_s = (of_log_slope / s).addcmul_(by_above, u).mul_(2.0).addcmul_(by_rise, square)
        by_below.mul_(2.0)
        by_both = torch.addcmul(by_below, by_rise, rise)
        of_s.addcmul_(by_both, square + rest_square, value=-1.0).div_(w)  # 1 − 2u = θ² + (1−θ)²
        by_both.mul_(u)
        of_slopes = torch.empty_like(slopes)
        torch.mul(by_rise, u, out=of_slopes[0]).addcmul_(by_above, rest_square).sub_(by_both)
        torch.mul(by_above, square, out=of_slopes[1]).sub_(by_both)
        if of_outer is not None:
            low = x < self.low
            of_slopes[0].add_(of_outer.masked_fill(~low, 0.0))
            of_slopes[1].add_(of_outer.masked_fill(low, 0.0))

        # 3. By the sizes of the cell's bin, and of those before it, which move its lower end; then through the softmax
        before, own = torch.empty_like(sizes), torch.empty_like(sizes)
        torch.neg(of_x.masked_fill(outside, 0.0), out=before[0])
        before[1] = of_z
        torch.mul(theta, before[0], out=own[0]).addcmul_(s, of_s, value=-1.0)
        torch.addcmul(of_s, of_z, rise, out=own[1])
        shared = (
            (lower - self.low).sub_(at.to(x.dtype), alpha=self._least).mul_(before)
        )  # out by the softmax before the bin
        mean = shared.addcmul_(own, share_of_bin, value=self._free)
        before.sub_(own).mul_(self._free)
        own.mul_(self._free)
        reached = x.new_ones(k + 1, *x.shape)  # [bin j is mine or before it]; what comes before mine reaches j + 1
        reached[1:k] = passed
        reached[k] = 0.0
        of_sizes = of_numbers[: 2 * k].unflatten(0, (2, k))
        torch.mul(reached[:k], own.unsqueeze(1), out=of_sizes)
        of_sizes.addcmul_(reached[1:], before.unsqueeze(1)).sub_(mean.unsqueeze(1)).mul_(shares)
        of_edges = x.new_zeros(k + 1, *x.shape).scatter_(0, ends, of_slopes.mul_(raw.sigmoid()))
        of_numbers[2 * k :] = of_edges if self.tails == "linear" else of_edges[1:-1]
        return of_x

    def _bins(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sizes and lower ends of the bins along x and y, both ``(2, K, …)``, and raw slopes ``(K + 1, …)``."""
        shares = torch.softmax(numbers[: 2 * self.bins].unflatten(0, (2, self.bins)), 1)
        return shares * self._free + self._least, self._lower_ends(shares), self._edges(numbers)

    def _lower_ends(self, shares: Tensor) -> Tensor:
        """Lower ends of bins that have these shares of what is free: one product with a triangle of ones."""
        k = self.bins
        before = shares.new_ones(k, k).tril_(-1).expand(2, k, k)
        start = torch.arange(k, dtype=shares.dtype, device=shares.device).mul_(self._least).add_(self.low).unsqueeze(1)
        return torch.baddbmm(start, before, shares.flatten(2), alpha=self._free).reshape(shares.shape)

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
