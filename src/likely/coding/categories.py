"""Codecs of categories: binary cells, softmax laws, and laws given as a table that many cells share."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from likely.coding.cells import (
    Cells,
    Floats,
    Integers,
    Interval,
    Mask,
    Placed,
    Step,
    Unsigned,
    blocks,
    precision_for,
)
from likely.coding.stack import Stack
from likely.coding.tables import refuse_non_finite, weights
from likely.exact.functions import sigmoid

_BINARY = 24
_BINARY_STEPS = 32
_BINARY_REACH = 17 * _BINARY_STEPS


@functools.cache
def _both() -> Unsigned:
    """Frequencies of the symbols 0 and 1 at every point of the grid of logits, one pair after the other."""
    grid = np.arange(-_BINARY_REACH, _BINARY_REACH + 1) / _BINARY_STEPS
    zero = (1 + np.floor(sigmoid(-grid) * ((1 << _BINARY) - 2))).astype(np.uint64)
    return np.stack([zero, np.uint64(1 << _BINARY) - zero], 1).reshape(-1)


class BernoulliCells(Cells):
    """Binary cells: 24 bits, logits l on a grid of 1/32 within ± 17, P(1) = σ(l).

    Args:
        logits: float32 or float64, any shape.

    >>> stack = Stack()
    >>> cells = BernoulliCells(np.float32([0.0, 3.0, -40.0]))
    >>> cells.push(stack, [1, 1, 0])
    >>> cells.lengths([1, 1, 0]).round(4).tolist()
    [1.0, 0.0701, 0.0]
    >>> cells.pop(stack)
    array([1, 1, 0])
    """

    def __init__(self, logits: NDArray[Any], present: ArrayLike | None = None) -> None:
        super().__init__(logits.shape, present)
        refuse_non_finite("logits", logits)
        self._logits = self._select(logits)

    def _grid(self, part: slice) -> Floats:
        """Logits as places on the grid, from 0."""
        grid = np.minimum(self._logits[part], 17.0)
        np.maximum(grid, -17.0, out=grid)
        grid *= grid.dtype.type(_BINARY_STEPS)
        np.rint(grid, out=grid)
        grid += grid.dtype.type(_BINARY_REACH)
        return grid

    def _steps(self, symbols: Integers) -> Iterable[Step]:
        total = np.uint64(1 << _BINARY)

        def place(part: slice) -> tuple[Unsigned, Unsigned]:
            grid, ones = self._grid(part), symbols[part]
            grid += grid
            freq = _both().take(grid.astype(np.int64) + ones)
            start = total - freq
            start *= ones.view(np.uint64)
            return start, freq

        yield Placed(self.count, _BINARY, place)

    def _pop(self, stack: Stack) -> Integers:
        zeros = _both()[::2].copy()
        found = stack.pop_binary(self.count, _BINARY, lambda part: zeros.take(self._grid(part).astype(np.int64)))
        return found.astype(np.int64)

    def _legal(self, symbols: Integers) -> Mask:
        return symbols.view(np.uint64) < 2

    def _domain(self) -> str:
        return "0 or 1"


class CategoricalCells(Cells):
    """Categories 0 … n − 1 with probabilities softmax(l).

    Logits lie on a grid of 1/64 below the largest; with e_i = ⌊2^30 exp(l_i − max l)⌉ and C_i = e_0 + … + e_{i − 1},
    symbol i starts at i + ⌊(2^P − n) C_i / C_n⌋, so that the frequencies are at least 1 and sum to 2^P.

    Args:
        logits: float32 or float64, shape ``(*shape, n)``; −inf gives a category the frequency 1.
        precision: P; by default 24, or 28 for a large alphabet.

    >>> stack = Stack()
    >>> cells = CategoricalCells(np.float32([[0.0, 2.0, -np.inf], [1.0, 1.0, 1.0]]))
    >>> cells.push(stack, [1, 2])
    >>> cells.pop(stack)
    array([1, 2])
    """

    def __init__(self, logits: NDArray[Any], present: ArrayLike | None = None, *, precision: int | None = None) -> None:
        super().__init__(logits.shape[:-1], present)
        self.levels = logits.shape[-1]
        self.precision = precision_for(self.levels) if precision is None else precision
        refuse_non_finite("logits", logits, lowest_may_be_infinite=True)
        self._logits = self._select(logits, 1)
        self._rows = max(1, (1 << 17) // self.levels)

    def _edges(self, part: slice) -> Unsigned:
        """Starts of the categories 0 … n, of some cells: shape ``(n + 1, cells)``."""
        n = self.levels
        logits = self._logits[part]
        few = n <= 64
        logits = np.ascontiguousarray(logits.T if few else logits)
        axis = 0 if few else 1
        units = weights(logits, logits.max(axis, keepdims=True))
        cumulative = np.empty((n + 1, units.shape[1]) if few else (units.shape[0], n + 1))
        if few:
            running = np.zeros(units.shape[1], np.int64)
            cumulative[0] = 0.0
            for i in range(n):
                running += units[i]
                cumulative[i + 1] = running
            cumulative /= cumulative[n].copy()
        else:
            cumulative[:, 0] = 0.0
            cumulative[:, 1:] = np.cumsum(units, 1)
            cumulative /= cumulative[:, n:].copy()
        cumulative *= float((1 << self.precision) - n)
        starts = cumulative.astype(np.uint64)
        starts += np.arange(n + 1, dtype=np.uint64).reshape((-1, 1) if few else (1, -1))
        return starts if few else starts.T

    def _steps(self, symbols: Integers) -> Iterable[Step]:
        start, freq = np.empty(self.count, np.uint64), np.empty(self.count, np.uint64)
        for part in blocks(self.count, self._rows):
            edges, x = self._edges(part), symbols[part]
            cell = np.arange(len(x))
            start[part] = edges[x, cell]
            freq[part] = edges[x + 1, cell] - start[part]
        yield Interval(start, freq, self.precision)

    def _pop(self, stack: Stack) -> Integers:
        steps = max(1, (self.levels - 1).bit_length())

        def find(part: slice, residues: Unsigned) -> tuple[Integers, Unsigned, Unsigned]:
            size = part.stop - part.start
            x, start, stop = np.empty(size, np.int64), np.empty(size, np.uint64), np.empty(size, np.uint64)
            for some in blocks(size, self._rows):
                edges = self._edges(slice(part.start + some.start, part.start + some.stop))
                r, cell = residues[some], np.arange(edges.shape[1])
                low = np.zeros(len(r), np.int64)
                for step in reversed(range(steps)):
                    next_ = np.minimum(low + (1 << step), self.levels)
                    low = np.where(edges[next_, cell] <= r, next_, low)
                x[some], start[some], stop[some] = low, edges[low, cell], edges[low + 1, cell]
            return x, start, stop - start

        return stack.pop(self.count, self.precision, find)

    def _legal(self, symbols: Integers) -> Mask:
        return symbols.view(np.uint64) < self.levels

    def _domain(self) -> str:
        return f"a code from 0 to {self.levels - 1}"


class Tables:
    """Laws given as tables of equal length, with what finds a symbol in them.

    Args:
        edges: starts of the symbols, and 2^P: integers, strictly ascending from 0, shape ``(tables, n + 1)``.
    """

    def __init__(self, edges: ArrayLike) -> None:
        table = np.asarray(edges)
        self.precision = int(table[0, -1]).bit_length() - 1
        if (table[:, 0] != 0).any() or (table[:, -1] != 1 << self.precision).any() or (np.diff(table) < 1).any():
            raise ValueError("edges: expected rows that ascend strictly from 0 to one power of two")
        self.count, self.levels = len(table), table.shape[1] - 1
        self.edges = table.astype(np.uint64).reshape(-1)
        # Symbol at the low end of every bucket of the range: most buckets hold one symbol only.
        bits = min(self.precision, self.levels.bit_length() + 3, max(4, ((1 << 20) // len(table)).bit_length() - 1))
        self._shift = np.uint64(self.precision - bits)
        buckets = np.arange((1 << bits) + 1) << (self.precision - bits)
        buckets[-1] -= 1
        first = np.stack([np.searchsorted(row, buckets, "right") - 1 for row in table])
        self._first = first.reshape(-1)
        self._row = first.shape[1]
        self._halvings = int(np.diff(first).max()).bit_length()

    def find(self, which: Integers | int, residues: Unsigned) -> tuple[Integers, Unsigned, Unsigned]:
        """Symbols whose ranges hold the residues, with start and freq, by the tables ``which``."""
        bucket = (residues >> self._shift).view(np.int64)
        bucket += which * self._row
        low = self._first.take(bucket)
        bucket += 1
        high = self._first.take(bucket)
        base = which * (self.levels + 1)
        several = (low != high).nonzero()[0]
        if len(several):
            below, above, r = low[several], high[several], residues[several]
            at = base if isinstance(base, int) else base[several]
            for step in reversed(range(self._halvings)):
                next_ = np.minimum(below + (1 << step), above)
                below = np.where(self.edges.take(at + next_) <= r, next_, below)
            low[several] = below
        place = low + base
        start = self.edges.take(place)
        place += 1
        freq = self.edges.take(place)
        freq -= start
        return low, start, freq


class TabulatedCells(Cells):
    """Symbols 0 … n − 1 under laws given as tables; many cells share one.

    Args:
        edges: starts of the symbols, and 2^P: integers, strictly ascending from 0, shape ``(tables, n + 1)``; or
            :class:`Tables`.
        which: the table of every cell, integers, shape of the symbols; or one number and ``shape``.

    >>> stack = Stack()
    >>> cells = TabulatedCells([[0, 1, 4]], 0, (3,))
    >>> cells.push(stack, [1, 1, 0])
    >>> cells.pop(stack)
    array([1, 1, 0])
    """

    def __init__(
        self,
        edges: ArrayLike | Tables,
        which: ArrayLike = 0,
        shape: Sequence[int] | None = None,
        present: ArrayLike | None = None,
    ) -> None:
        chosen = np.asarray(which, np.int64)
        super().__init__(chosen.shape if shape is None else shape, present)
        self._tables = edges if isinstance(edges, Tables) else Tables(edges)
        self._which: Integers | None = None
        if self._tables.count > 1:
            self._which = self._select(np.broadcast_to(chosen, self.shape))

    def _table(self, part: slice) -> Integers | int:
        return 0 if self._which is None else self._which[part]

    def _steps(self, symbols: Integers) -> Iterable[Step]:
        edges, length = self._tables.edges, self._tables.levels + 1

        def place(part: slice) -> tuple[Unsigned, Unsigned]:
            at = symbols[part] + self._table(part) * length
            start = edges.take(at)
            at += 1
            freq = edges.take(at)
            freq -= start
            return start, freq

        yield Placed(self.count, self._tables.precision, place)

    def _pop(self, stack: Stack) -> Integers:
        find = self._tables.find
        return stack.pop(self.count, self._tables.precision, lambda part, r: find(self._table(part), r))

    def _legal(self, symbols: Integers) -> Mask:
        return symbols.view(np.uint64) < self._tables.levels

    def _domain(self) -> str:
        return f"a code from 0 to {self._tables.levels - 1}"


def edges_of(counts: ArrayLike, precision: int | None = None) -> Integers:
    """Starts of symbols in proportion to non-negative integer counts, each at least 1 of 2^P: shape ``(…, n + 1)``.

    Symbol i starts at i + ⌊(2^P − n) C_i / C_n⌋, C_i the sum of the counts before it.

    >>> edges_of([1, 0, 3], 4).tolist()
    [0, 4, 5, 16]
    """
    given = np.asarray(counts)
    n = given.shape[-1]
    bits = precision_for(n) if precision is None else precision
    cumulative = np.zeros((*given.shape[:-1], n + 1))
    cumulative[..., 1:] = np.cumsum(given, -1)
    shares: Floats = cumulative / cumulative[..., -1:]
    return np.floor(shares * float((1 << bits) - n)).astype(np.int64) + np.arange(n + 1)
