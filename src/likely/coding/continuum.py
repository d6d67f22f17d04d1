"""Codec of numbers on a continuum: floats that come back to the bit, at about the cost of their density.

A float64 is a whole number in disguise: its bits, with the sign folded over, count the floats in ascending order.
Symbols are these numbers.  A value is coded as the cell of a fine grid in which it lies, under the law, and then as
one of the floats of that cell, all equally likely.  Edges of cells are multiples of a power of two, so that all floats
of a cell (but for the two at zero) have the same spacing, and −log2(mass of the cell / number of its floats) is
−log2(density · spacing of the floats there).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from likely.coding.cells import Floats, Integers, Mask, Share, Some, Step, share_pop, share_steps
from likely.coding.intervals import Cumulative, IntervalCells, Mixture, standard_logistics
from likely.coding.stack import Stack
from likely.coding.tables import refuse_non_finite, shares, weights

#: Cells of the grid, and how many fall on one standard unit (up to rounding to a power of two).
_CELLS, _PER_UNIT = 1 << 16, 1 << 10
_MIN = np.int64(-(1 << 63))


def ordered(values: ArrayLike) -> Integers:
    """Rank of each float64 among all: monotone, 0 for 0.0, −1 for −0.0, any NaN beyond the infinities.

    >>> ordered([0.0, -0.0, 5e-324, -5e-324]).tolist()
    [0, -1, 1, -2]
    """
    bits = np.ascontiguousarray(values, np.float64).view(np.int64)
    return np.where(bits < 0, _MIN - bits - 1, bits)


def from_ordered(ranks: Integers) -> Floats:
    """The float64 of each rank; inverse of :func:`ordered`.

    >>> from_ordered(ordered([1.5, -0.0])).tolist()
    [1.5, -0.0]
    """
    return np.where(ranks < 0, _MIN - ranks - 1, ranks).view(np.float64)


class FloatCells(IntervalCells):
    """Floats, by the cell of a grid of 2^16 cells around a middle; symbols are :func:`ordered` numbers.

    A float beyond the grid is coded as an outer cell, followed by its bits.  Positions of a law are cells counted from
    the middle one, an integer where that cell begins.

    Args:
        spacing: of the grid, powers of two: shape of the symbols, or one number.
        middle: the middle cell, whole numbers within ± 2^51, of the same shape.
        spare_bits: 0 … 52: every value has so many zeros at the end of its bits (29 where all are float32).
    """

    def __init__(
        self,
        shape: Sequence[int],
        spacing: ArrayLike,
        middle: ArrayLike,
        spare_bits: int = 0,
        present: ArrayLike | None = None,
    ) -> None:
        if not 0 <= spare_bits <= 52:
            raise ValueError(f"spare_bits: expected 0 … 52, got {spare_bits}")
        super().__init__(shape, -_CELLS // 2, _CELLS, present=present)
        self.spare = np.int64(spare_bits)
        self._spacing = self._select(np.broadcast_to(np.asarray(spacing, np.float64), self.shape))
        self._middle = self._select(np.broadcast_to(np.asarray(middle, np.int64), self.shape))

    def _first(self, cell: Integers, some: Some) -> Integers:
        """Rank of the first float of a cell."""
        return ordered((cell + self._middle[some]).astype(np.float64) * self._spacing[some])

    def _cell(self, ranks: Integers) -> Integers:
        """Cell of each float; the outer cells for what lies beyond the grid and for what is no number."""
        values = from_ordered(ranks)
        last = self.low + _CELLS - 1
        with np.errstate(over="ignore", invalid="ignore"):
            cells = np.floor(values / self._spacing) - self._middle
            cell = np.clip(np.nan_to_num(cells, nan=-np.inf), self.low, last).astype(np.int64)
        cell -= (ranks == -1) & (cell == -self._middle)  # −0.0 is the last float below 0.0
        return np.clip(cell, self.low, last)

    def _within(self, cell: Integers) -> tuple[Mask, Integers, Integers]:
        """Which cells are inner ones, the first rank of these, and how many floats they have."""
        inner = (cell > self.low) & (cell < self.low + _CELLS - 1)
        some = np.flatnonzero(inner)
        first = self._first(cell[some], some)
        sizes = (self._first(cell[some] + 1, some) >> self.spare) - (first >> self.spare)
        return inner, first, np.maximum(sizes, 1)

    def _steps(self, symbols: Integers) -> Iterable[Step]:
        cell = self._cell(symbols)
        yield from super()._steps(cell)
        inner, first, sizes = self._within(cell)
        yield from share_steps((symbols[inner] >> self.spare) - (first >> self.spare), sizes, np.flatnonzero(inner))
        outer = np.flatnonzero(~inner)
        bits = symbols[outer].view(np.uint64)
        yield Share((bits >> np.uint64(32)).view(np.int64), 1 << 32, outer)
        yield Share((bits & np.uint64((1 << 32) - 1)).view(np.int64), 1 << 32, outer)

    def _pop(self, stack: Stack) -> Integers:
        cell = super()._pop(stack)
        inner, first, sizes = self._within(cell)
        symbols = np.empty(self.count, np.int64)
        found = (first >> self.spare) + share_pop(stack, sizes)
        symbols[inner] = np.where(found < 0, (found + 1 << self.spare) - 1, found << self.spare)
        outer = np.flatnonzero(~inner)
        high = stack.pop_uniform(1 << 32, len(outer)).view(np.uint64) << np.uint64(32)
        symbols[outer] = (high | stack.pop_uniform(1 << 32, len(outer)).view(np.uint64)).view(np.int64)
        return symbols

    def _legal(self, symbols: Integers) -> Mask:
        if not self.spare:
            return np.ones(len(symbols), bool)
        cell = self._cell(symbols)
        bits = from_ordered(symbols).view(np.int64)
        return (bits & ((np.int64(1) << self.spare) - 1) == 0) | (cell == self.low) | (cell == self.low + _CELLS - 1)

    def _domain(self) -> str:
        return f"the rank of a float64 whose last {self.spare} bits are 0"


class DoubleCells(FloatCells):
    """One numeric column without a grid: mixtures of logistics over float64.

    Args:
        logits, means, log_scales: shape ``(n, K)``; means and scales in standard units.
        location, scale: raw value = location + scale · standard value.
        spare_bits: as for :class:`FloatCells`.
    """

    def __init__(
        self,
        logits: NDArray[Any],
        means: NDArray[Any],
        log_scales: NDArray[Any],
        location: float,
        scale: float,
        spare_bits: int = 0,
        present: ArrayLike | None = None,
    ) -> None:
        spacing, middle = grid_of(np.array(location), np.array(scale))
        super().__init__(means.shape[:1], spacing, middle, spare_bits, present)
        refuse_non_finite("logits", logits, lowest_may_be_infinite=True)
        refuse_non_finite("means", means)
        refuse_non_finite("log_scales", log_scales)
        # A cell starts at its left edge: its middle is half a cell further, where the law's grid has the cell itself.
        self._centre, self._unit = location / float(spacing) - 0.5 - int(middle), scale / float(spacing)
        self._logits, self._means, self._log_scales = (self._select(a, 1) for a in (logits, means, log_scales))

    def _law(self, some: Some) -> Cumulative:
        log_scales = np.maximum(self._log_scales[some], self._log_scales.dtype.type(-7.0))
        logits = np.ascontiguousarray(self._logits[some].T)
        portions = shares(weights(logits, logits.max(0)))
        return Mixture([standard_logistics(self._means[some], log_scales, portions, self._centre, self._unit)])


def grid_of(location: Floats, scale: Floats) -> tuple[Floats, Integers]:
    """Spacing and middle cell of a grid with 512 to 1024 cells in a unit ``scale``, around ``location``."""
    exponent = np.frexp(scale / _PER_UNIT)[1] - 1
    if not ((exponent > -900) & (exponent < 900)).all():
        raise ValueError(f"scale: expected numbers from 1e-250 to 1e250, got {scale}")
    spacing = np.ldexp(1.0, exponent)
    return spacing, np.clip(np.floor(location / spacing), -(2.0**51), 2.0**51).astype(np.int64)
