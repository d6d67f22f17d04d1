"""Codecs whose law travels with the data: their own counts are coded first, and paid for.

For what no model describes: bytes, names, the pattern of the holes of a table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from likely.coding.categories import TabulatedCells, edges_of
from likely.coding.cells import CellCodec, Integers, elias_pop, elias_steps
from likely.coding.codec import Uniform, flat
from likely.coding.counts import NegativeBinomialCells
from likely.coding.stack import Stack
from likely.units import bits, nats

#: More distinct patterns than this are never kept in a table.
MOST_PATTERNS = 1 << 12


class DescribedCells:
    """Symbols 0 … levels − 1 under their own frequencies, which are coded before them.

    The counts n_i go under a negative binomial law of their mean with r = ½; then each symbol costs about
    −log2(n_i / n) bits.

    Args:
        shape: shape of the symbols, known to the decoder.
        levels: at least 1, at most 2^22.

    >>> stack = Stack()
    >>> text = DescribedCells((11,), 256)
    >>> text.push(stack, np.frombuffer(b"abracadabra", np.uint8))
    >>> bytes(text.pop(stack).astype(np.uint8))
    b'abracadabra'
    """

    def __init__(self, shape: Sequence[int], levels: int) -> None:
        self.shape, self.levels = tuple(int(size) for size in shape), int(levels)
        self._size = math.prod(self.shape)

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        """Code the symbols, then the counts of all but the last level."""
        array = flat(symbols, self.shape).astype(np.int64)
        if len(array) and not (array.min() >= 0 and array.max() < self.levels):
            wrong = array[(array < 0) | (array >= self.levels)][0]
            raise ValueError(f"symbols: expected codes from 0 to {self.levels - 1}, got {wrong}")
        counts = np.bincount(array, minlength=self.levels)
        if self._size:
            self._under(counts).push(stack, array)
            self._counts_law().push(stack, counts[:-1])

    def pop(self, stack: Stack) -> Integers:
        """Decode counts and symbols."""
        if not self._size:
            return np.zeros(self.shape, np.int64)
        counts = self._counts_law().pop(stack)
        rest = max(self._size - int(min(counts.astype(np.float64).sum(), self._size)), 0)
        return self._under(np.append(counts, rest)).pop(stack).reshape(self.shape)

    def bits(self, symbols: ArrayLike) -> float:
        """Length of symbols and counts together."""
        array = flat(symbols, self.shape).astype(np.int64)
        counts = np.bincount(array, minlength=self.levels)
        if not self._size:
            return 0.0
        return float(self._under(counts).lengths(array).sum() + self._counts_law().lengths(counts[:-1]).sum())

    def _under(self, counts: Integers) -> CellCodec:
        limited = np.minimum(counts, self._size)
        return TabulatedCells(edges_of(limited if limited.any() else limited + 1)[None], 0, (self._size,))

    def _counts_law(self) -> CellCodec:
        log_mean = np.full(self.levels - 1, nats(math.frexp(self._size / self.levels)[1]))
        return NegativeBinomialCells(log_mean, np.full(self.levels - 1, nats(-1.0)))


class PatternCells:
    """Which cells of a table are there: rows of a bool mask, by what is shorter.

    Either a table of the distinct patterns of rows (one bit a cell), and for every row which of them it has
    (:class:`DescribedCells`); or column by column, under each column's own share.

    Args:
        shape: ``(n, columns)``, known to the decoder.

    >>> mask = np.array([[True, False, True], [True, True, True]])
    >>> stack = Stack()
    >>> PatternCells((2, 3)).push(stack, mask)
    >>> PatternCells((2, 3)).pop(stack)
    array([[ True, False,  True],
           [ True,  True,  True]])
    """

    def __init__(self, shape: Sequence[int]) -> None:
        rows, columns = shape
        self.shape = int(rows), int(columns)

    def push(self, stack: Stack, mask: ArrayLike) -> None:
        """Code the mask."""
        array = self._checked(mask)
        patterns, which = self._patterns(array)
        by_rows = self._row_bits(patterns, which) <= self._column_bits(array)
        if by_rows:
            self._rows(len(patterns)).push(stack, which)
            Uniform(patterns.shape, 2).push(stack, patterns.astype(np.int64))
            for step in reversed(elias_steps(np.array([len(patterns)]))):
                step.push(stack)
        else:
            ones = array.sum(0)
            self._columns(ones).push(stack, array.astype(np.int64))
            Uniform(ones.shape, self.shape[0] + 1).push(stack, ones)
        stack.push_uniform(np.array([int(by_rows)]), 2)

    def pop(self, stack: Stack) -> NDArray[np.bool_]:
        """Decode the mask."""
        if stack.pop_uniform(2, 1)[0]:
            count = min(int(elias_pop(stack, 1)[0]), MOST_PATTERNS, max(self.shape[0], 1))
            patterns = Uniform((count, self.shape[1]), 2).pop(stack)
            return patterns[self._rows(count).pop(stack)] == 1 if count else np.zeros(self.shape, bool)
        ones = Uniform((self.shape[1],), self.shape[0] + 1).pop(stack)
        return self._columns(ones).pop(stack) == 1

    def bits(self, mask: ArrayLike) -> float:
        """Length of the mask, tables included."""
        array = self._checked(mask)
        return 1.0 + min(self._row_bits(*self._patterns(array)), self._column_bits(array))

    def _checked(self, mask: ArrayLike) -> NDArray[np.bool_]:
        array = np.asarray(mask)
        if array.shape != self.shape or array.dtype != np.bool_:
            raise ValueError(f"mask: expected a bool array of shape {self.shape}, got {array.dtype} {array.shape}")
        return array

    def _patterns(self, mask: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], Integers]:
        packed = np.packbits(mask, axis=1)
        distinct, which = np.unique(packed, axis=0, return_inverse=True)
        patterns = np.unpackbits(distinct, axis=1, count=self.shape[1]).astype(bool)
        return patterns.reshape(-1, self.shape[1]), which.reshape(-1).astype(np.int64)

    def _row_bits(self, patterns: NDArray[np.bool_], which: Integers) -> float:
        if len(patterns) > MOST_PATTERNS:
            return math.inf
        table = patterns.size + sum(float(step.bits().sum()) for step in elias_steps(np.array([len(patterns)])))
        return table + (self._rows(len(patterns)).bits(which) if len(patterns) else 0.0)

    def _rows(self, patterns: int) -> DescribedCells:
        return DescribedCells((self.shape[0],), max(patterns, 1))

    def _column_bits(self, mask: NDArray[np.bool_]) -> float:
        law = self._columns(mask.sum(0)).lengths(mask.astype(np.int64))
        return float(law.sum()) + self.shape[1] * bits(math.log(self.shape[0] + 1))

    def _columns(self, ones: Integers) -> CellCodec:
        zeros = self.shape[0] - ones
        counts = np.stack([zeros, ones], 1) if self.shape[0] else np.ones((self.shape[1], 2), np.int64)
        which = np.broadcast_to(np.arange(self.shape[1]), self.shape)
        return TabulatedCells(edges_of(counts), which)
