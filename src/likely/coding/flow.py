"""Flows as codecs: bijections of integers that cost what the Jacobian says.

A value y lives on a grid of 2^−16.  A shift adds an integer.  A scale s = R / 2^14 is the modular scale transform
(iVPF and iFlow: Zhang et al. 2021, arXiv:2103.16211 and arXiv:2111.00965): on the way from data to base,

    pop r ∈ [0, R);    w = y · R + r;    y' = ⌊w / 2^14⌋;    push w mod 2^14,

which is a bijection of (y, message), and leaves the message 14 − log2 R = −log2 s bits longer.  Linear maps are lifting
steps (LU factors) around a scale; whole numbers become grid values by bits-back dequantisation.  All is integer
arithmetic, so a flow whose shifts and scales are the same integers everywhere decodes everywhere.

Directions: :meth:`Layer.forward` is data to base, what the encoder does, as in ``likely.bijections``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from decimal import Context, Decimal
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from likely.coding.codec import Codec, Uniform
from likely.coding.errors import Damaged
from likely.coding.stack import Integers, Stack

#: Grid values are multiples of 2^−FRACTION.
FRACTION = 16
#: Scales are multiples of 2^−SCALE_BITS.
SCALE_BITS = 14
#: Log-scales that a network gives are rounded to multiples of 1 / LOG_SCALE_GRID: on 1/64 a flow was 0.74 % longer, on
#: 1/512 0.01 %.
LOG_SCALE_GRID = 512
#: Largest |log-scale|.
MAX_LOG_SCALE = 6
#: Values on the way stay below LIMIT in size (2^15 in units of the model), so that no product leaves 63 bits.
LIMIT = 1 << (FRACTION + 15)
#: Scales stay below 2^MAX_SCALE_BITS.
MAX_SCALE_BITS = 24


class Layer(Protocol):
    """A bijection of (grid values, message)."""

    def forward(self, stack: Stack, y: Integers) -> Integers:
        """From data to base."""
        ...

    def inverse(self, stack: Stack, y: Integers) -> Integers:
        """From base to data: undoes :meth:`forward` to the bit, for whatever values and message."""
        ...


class Flow:
    """The codec of data that layers carry to a base law.

    >>> stack = Stack()
    >>> flow = Flow([Dequantise(10), Shift(-(4 << 10)), Scale(5000)], Uniform((3,), 1 << 20))
    >>> flow.push(stack, [200, 4, 70])
    >>> flow.pop(stack)
    array([200,   4,  70])

    Args:
        layers: in the order from data to base.
        base: codec of the last layer's values.
    """

    def __init__(self, layers: Sequence[Layer], base: Codec) -> None:
        self.layers, self.base = tuple(layers), base

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        y = np.asarray(symbols, dtype=np.int64)
        for layer in self.layers:
            y = layer.forward(stack, y)
        self.base.push(stack, y)

    def pop(self, stack: Stack) -> Integers:
        y = self.base.pop(stack)
        for layer in reversed(self.layers):
            y = layer.inverse(stack, y)
        return y


class Dequantise:
    """Whole numbers to grid values by bits-back: y = x · 2^bits + u with u popped from [0, 2^bits).

    One unit of x is 2^(bits − 16) units of the model.  ``forward`` borrows what the law of u costs.

    Args:
        bits: 0 … 16.
        noise: ``x -> codec of u`` for variational dequantisation; by default u is uniform.
        levels: x is in [0, levels); None for any whole numbers.
    """

    def __init__(self, bits: int, noise: Callable[[Integers], Codec] | None = None, levels: int | None = None) -> None:
        if not 0 <= bits <= FRACTION:
            raise ValueError(f"bits: expected 0 … {FRACTION}, got {bits}")
        self.bits, self.levels = bits, levels
        self.noise = noise or (lambda x: Uniform(x.shape, 1 << bits))

    def forward(self, stack: Stack, y: Integers) -> Integers:
        if self._illegal(y):
            raise ValueError(f"symbols: expected 0 … {(self.levels or 0) - 1}, got {y.min()} … {y.max()}")
        _within(y, LIMIT >> self.bits)
        return (y << self.bits) + self.noise(y).pop(stack)

    def inverse(self, stack: Stack, y: Integers) -> Integers:
        _within_or_damaged(y)
        x = y >> self.bits
        if self._illegal(x):
            raise Damaged("a value leaves the levels of the data")
        self.noise(x).push(stack, y - (x << self.bits))
        return x

    def _illegal(self, x: Integers) -> bool:
        return self.levels is not None and bool(x.size) and not (x.min() >= 0 and x.max() < self.levels)


class Shift:
    """y' = y + t, at no cost.

    Args:
        t: integers in units of the grid, broadcast to the values.
    """

    def __init__(self, t: ArrayLike) -> None:
        self.t = _integers(t, "t")
        _within(self.t)

    def forward(self, stack: Stack, y: Integers) -> Integers:
        return y + self.t

    def inverse(self, stack: Stack, y: Integers) -> Integers:
        return y - self.t


class Scale:
    """y' ≈ y · R / 2^14, at −log2(R / 2^14) bits a value.

    Args:
        numbers: R, integers in [1, 2^24), broadcast to the values.
        bits: 14, or other fractional bits of the scale, 1 … 24.
    """

    def __init__(self, numbers: ArrayLike, bits: int = SCALE_BITS) -> None:
        self.numbers = _integers(numbers, "numbers")
        if not 1 <= bits <= MAX_SCALE_BITS:
            raise ValueError(f"bits: expected 1 … {MAX_SCALE_BITS}, got {bits}")
        if self.numbers.size and not (self.numbers.min() >= 1 and self.numbers.max() < 1 << MAX_SCALE_BITS):
            low, high = self.numbers.min(), self.numbers.max()
            raise ValueError(f"numbers: expected 1 … 2^{MAX_SCALE_BITS} - 1, got {low} … {high}")
        self.bits = bits

    def forward(self, stack: Stack, y: Integers) -> Integers:
        _within(y)
        numbers = self._for(y)
        w = y.reshape(-1) * numbers + stack.pop_uniform(numbers, y.size)
        scaled = w >> self.bits
        _within(scaled)
        stack.push_uniform(w - (scaled << self.bits), 1 << self.bits)
        return scaled.reshape(y.shape)

    def inverse(self, stack: Stack, y: Integers) -> Integers:
        _within_or_damaged(y)
        numbers = self._for(y)
        w = (y.reshape(-1) << self.bits) + stack.pop_uniform(1 << self.bits, y.size)
        unscaled = w // numbers
        stack.push_uniform(w - unscaled * numbers, numbers)
        return unscaled.reshape(y.shape)

    def _for(self, y: Integers) -> Integers:
        return self.numbers if self.numbers.ndim == 0 else np.broadcast_to(self.numbers, y.shape).reshape(-1)


class Coupling:
    """One part of the last axis is shifted and scaled by functions of the other: b' = (b + t(a)) · s(a).

    The shift comes first: in b · s + t an error of the rounded s is multiplied by b, however large t made it.

    Args:
        moved: indices of b on the last axis.
        parameters: ``a -> (t, R)``: shift on the grid and scale times 2^14 for each value of b; exact integers.
    """

    def __init__(self, moved: ArrayLike, parameters: Callable[[Integers], tuple[Integers, Integers]]) -> None:
        self.moved, self.parameters = np.asarray(moved, dtype=np.int64), parameters

    def forward(self, stack: Stack, y: Integers) -> Integers:
        _within(y)
        shift, scale = self._parts(y)
        z = y.copy()
        z[..., self.moved] = scale.forward(stack, shift.forward(stack, y[..., self.moved]))
        return z

    def inverse(self, stack: Stack, y: Integers) -> Integers:
        _within_or_damaged(y)
        shift, scale = self._parts(y)
        z = y.copy()
        z[..., self.moved] = shift.inverse(stack, scale.inverse(stack, y[..., self.moved]))
        return z

    def _parts(self, y: Integers) -> tuple[Shift, Scale]:
        t, numbers = self.parameters(np.delete(y, self.moved, axis=-1))
        return Shift(t), Scale(numbers)


class Rearrange:
    """A reordering of the values: permutation, squeeze, reshape; at no cost.

    Args:
        there: from data to base.
        back: its inverse.
    """

    def __init__(self, there: Callable[[Integers], Integers], back: Callable[[Integers], Integers]) -> None:
        self.there, self.back = there, back

    def forward(self, stack: Stack, y: Integers) -> Integers:
        return self.there(y)

    def inverse(self, stack: Stack, y: Integers) -> Integers:
        return self.back(y)


class Linear:
    """y' ≈ W y on the last axis, by W = P L D U: two triangles of lifting steps around a scale (for 1×1 convolutions).

    A row of a unit triangle adds to one value a rounded combination of values that it leaves alone, and so is undone
    exactly.  The diagonal is a :class:`Scale` with 16 fractional bits and signs; the cost is −log2 |det| of it.
    The factors are made from W by elementwise arithmetic alone, so that they are the same integers on every machine.

    Args:
        weight: float64, shape ``(c, c)``, the same on every machine.

    Raises:
        ValueError: W is singular, or too near to it for the grid.
    """

    _BITS = 16

    def __init__(self, weight: ArrayLike) -> None:
        w = np.array(weight, dtype=np.float64)
        if w.ndim != 2 or w.shape[0] != w.shape[1] or not np.isfinite(w).all():
            raise ValueError(f"weight: expected a finite square matrix, got shape {w.shape}")
        order, lower, diagonal, upper = _factors(w)
        self.lower, self.upper = self._lift(lower), self._lift(upper)
        numbers = np.rint(np.abs(diagonal) * (1 << self._BITS)).astype(np.int64)
        if not (numbers.min() >= 1 and numbers.max() < 1 << MAX_SCALE_BITS):
            got = f"{np.abs(diagonal).min():.3g} … {np.abs(diagonal).max():.3g}"
            raise ValueError(f"weight: expected pivots of 2^-16 … 2^8 in size, got {got}")
        self.scale = Scale(numbers, self._BITS)
        self.signs = np.where(diagonal < 0, -1, 1)
        self.order, self.back = np.argsort(order), order

    def forward(self, stack: Stack, y: Integers) -> Integers:
        _within(y)
        y = y + self._combine(y, self.upper)
        y = self.scale.forward(stack, y) * self.signs
        y = y + self._combine(y, self.lower)
        _within(y)
        return y[..., self.order]

    def inverse(self, stack: Stack, y: Integers) -> Integers:
        y = y[..., self.back]
        _within_or_damaged(y)
        for row in range(len(self.signs)):
            y[..., row] -= self._combine(y[..., :row], self.lower[row : row + 1, :row])[..., 0]
            _within_or_damaged(y[..., row])
        y = self.scale.inverse(stack, y * self.signs)
        for row in reversed(range(len(self.signs))):
            y[..., row] -= self._combine(y[..., row + 1 :], self.upper[row : row + 1, row + 1 :])[..., 0]
            _within_or_damaged(y[..., row])
        return y

    def _lift(self, triangle: NDArray[np.float64]) -> Integers:
        """Coefficients of the lifting steps, in units of 2^−16."""
        sums = np.abs(triangle).sum(1)
        if sums.max() >= 1 << 14:
            raise ValueError(
                f"weight: expected rows of the LU factors that sum to less than 2^14, got {sums.max():.3g}"
            )
        return np.rint(triangle * (1 << self._BITS)).astype(np.int64)

    def _combine(self, y: Integers, rows: Integers) -> Integers:
        """Rounded combinations of the last axis, exact: in float64 where all sums stay below 2^53, else in int64."""
        most = int(np.abs(y).max(initial=0)) * int(np.abs(rows).sum(1).max(initial=0))
        if most < 1 << 53:
            sums = (y.astype(np.float64) @ rows.T.astype(np.float64)).astype(np.int64)
        else:
            sums = y @ rows.T
        return (sums + (1 << (self._BITS - 1))) >> self._BITS


def log_scales(index: ArrayLike) -> Integers:
    """R = round(2^14 · exp(index / 512)), correctly rounded on every machine; |index| is cut at 3072.

    >>> log_scales([0, 512, -99999])
    array([16384, 44536,    41])
    """
    most = MAX_LOG_SCALE * LOG_SCALE_GRID
    return _scale_table()[np.clip(_integers(index, "index"), -most, most) + most]


@functools.cache
def _scale_table() -> Integers:
    exact = Context(prec=30)
    most = MAX_LOG_SCALE * LOG_SCALE_GRID
    exponents = (exact.divide(Decimal(k), Decimal(LOG_SCALE_GRID)) for k in range(-most, most + 1))
    numbers = (exact.multiply(exact.exp(e), Decimal(1 << SCALE_BITS)) for e in exponents)
    return np.array([int(number.to_integral_value(context=exact)) for number in numbers], dtype=np.int64)


def _factors(
    w: NDArray[np.float64],
) -> tuple[Integers, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """W[order] = (I + lower) · diag · (I + upper), with partial pivoting; elementwise IEEE operations only."""
    w, n = w.copy(), len(w)
    order = np.arange(n)
    for k in range(n):
        pivot = k + int(np.argmax(np.abs(w[k:, k])))
        if w[pivot, k] == 0:
            raise ValueError("weight: expected an invertible matrix, got a singular one")
        w[[k, pivot]], order[[k, pivot]] = w[[pivot, k]], order[[pivot, k]]
        w[k + 1 :, k] /= w[k, k]
        update = w[k + 1 :, k, None] * w[k, k + 1 :]
        w[k + 1 :, k + 1 :] -= update
    diagonal = np.diag(w).copy()
    return order, np.tril(w, -1), diagonal, np.triu(w, 1) / diagonal[:, None]


def _integers(values: ArrayLike, name: str) -> Integers:
    array = np.asarray(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name}: expected integers, got {array.dtype}")
    return array.astype(np.int64)


def _outside(y: Integers, limit: int = LIMIT) -> bool:
    return bool(y.size) and not (-limit < int(y.min()) and int(y.max()) < limit)


def _within(y: Integers, limit: int = LIMIT) -> None:
    if _outside(y, limit):
        units = math.ldexp(limit, -FRACTION)
        raise ValueError(
            f"a value leaves the range of the flow's grid, ±{units:g}: {y.min()} … {y.max()} / 2^{FRACTION}"
        )


def _within_or_damaged(y: Integers) -> None:
    if _outside(y):
        raise Damaged("a value leaves the range of the flow's grid")
