"""Codec of numbers on a continuum: floats that come back to the bit, at about the cost of their density.

A float64 is a whole number in disguise: its bits, with the sign folded over, count the floats in ascending order.
Symbols are these numbers.  A value is coded as the cell of a fine grid in which it lies, under the law, and then as
one of the floats of that cell, all equally likely.  Edges of cells are multiples of a power of two, so that all floats
of a cell (but for the two at zero) have the same spacing, and −log2(mass of the cell / number of its floats) is
−log2(density · spacing of the floats there).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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


class DoubleCells(IntervalCells):
    """One numeric column without a grid: mixtures of logistics over float64; symbols are :func:`ordered` numbers.

    Args:
        logits, means, log_scales: shape ``(n, K)``; means and scales in standard units.
        location, scale: raw value = location + scale · standard value.
        spare_bits: 0 … 52: every value has so many zeros at the end of its bits (29 where all are float32).
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
        if not 0 <= spare_bits <= 52:
            raise ValueError(f"spare_bits: expected 0 … 52, got {spare_bits}")
        spacing = math.ldexp(1.0, math.frexp(scale / _PER_UNIT)[1] - 1)
        if not 2.0**-900 < spacing < 2.0**900:
            raise ValueError(f"scale: expected a number from 1e-250 to 1e250, got {scale}")
        middle = min(max(math.floor(location / spacing), -(1 << 51)), 1 << 51)
        super().__init__(means.shape[:1], middle - _CELLS // 2, _CELLS, present=present)
        refuse_non_finite("logits", logits, lowest_may_be_infinite=True)
        refuse_non_finite("means", means)
        refuse_non_finite("log_scales", log_scales)
        self.spacing, self.spare = spacing, np.int64(spare_bits)
        # A cell starts at its left edge: its middle is half a cell further, where the law's grid has the cell itself.
        self._centre, self._unit = location / spacing - 0.5, scale / spacing
        self._logits, self._means, self._log_scales = (self._select(a, 1) for a in (logits, means, log_scales))

    def _law(self, some: Some) -> Cumulative:
        log_scales = np.maximum(self._log_scales[some], self._log_scales.dtype.type(-7.0))
        logits = np.ascontiguousarray(self._logits[some].T)
        portions = shares(weights(logits, logits.max(0)))
        return Mixture([standard_logistics(self._means[some], log_scales, portions, self._centre, self._unit)])

    def _first(self, cell: Integers) -> Integers:
        """Rank of the first float of a cell."""
        return ordered(cell.astype(np.float64) * self.spacing)

    def _cell(self, ranks: Integers) -> Integers:
        """Cell of each float; the outer cells for what lies beyond the range and for what is no number."""
        values = from_ordered(ranks)
        last = self.low + _CELLS - 1
        with np.errstate(over="ignore", invalid="ignore"):
            cell = np.floor(np.clip(np.nan_to_num(values / self.spacing, nan=-np.inf), self.low, last)).astype(np.int64)
        cell -= (ranks == -1) & (cell == 0)  # −0.0 is the last float below 0.0
        return np.clip(cell, self.low, last)

    def _within(self, cell: Integers) -> tuple[Mask, Integers, Integers]:
        """Which cells are inner ones, the first rank of these, and how many floats they have."""
        inner = (cell > self.low) & (cell < self.low + _CELLS - 1)
        first = self._first(cell[inner])
        sizes = (self._first(cell[inner] + 1) >> self.spare) - (first >> self.spare)
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
