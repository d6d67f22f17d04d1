"""What the codecs of distributions have in common: a shape, absent cells, and steps on the stack.

A codec of cells translates every symbol into one or more *steps*: an interval ``[start, start + freq)`` of
``[0, 2^P)``, or a number of a range of equally likely ones.  :meth:`Cells.push`, :meth:`Cells.lengths` and the checks
follow from the steps; only ``pop`` is written apart.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from likely.coding.codec import flat
from likely.coding.stack import Integers, Stack, Unsigned
from likely.units import bits

Mask: TypeAlias = NDArray[np.bool_]
Floats: TypeAlias = NDArray[np.float64]
#: Some of the cells: a slice, or their indices.
Some: TypeAlias = "slice | Integers"

#: Cells worked on at once, so that temporaries stay in the cache.
BLOCK = 1 << 13
#: The most bits that the frequencies of a symbol sum to.
MOST_PRECISION = 28


@dataclass(frozen=True)
class Interval:
    """A step: symbols that occupy ``[start, start + freq)`` of ``[0, 2^precision)``.

    Args:
        cells: indices of the cells that take this step; None for all.
    """

    start: Unsigned
    freq: Unsigned
    precision: int
    cells: Integers | None = None

    def push(self, stack: Stack) -> None:
        stack.push(self.start, self.freq, self.precision)

    def bits(self) -> Floats:
        return self.precision - bits(np.log(self.freq.astype(np.float64)))


@dataclass(frozen=True)
class Placed:
    """A step of ``count`` cells, all of them, as an :class:`Interval` that is computed where it is needed.

    Args:
        place: start and freq of part of the cells (a slice).
    """

    count: int
    precision: int
    place: Callable[[slice], tuple[Unsigned, Unsigned]]
    cells: None = None

    def push(self, stack: Stack) -> None:
        stack.push_by(self.count, self.precision, self.place)

    def all(self) -> Interval:
        """The same, computed."""
        start, freq = np.empty(self.count, np.uint64), np.empty(self.count, np.uint64)
        for part in blocks(self.count):
            start[part], freq[part] = self.place(part)
        return Interval(start, freq, self.precision)

    def bits(self) -> Floats:
        return self.all().bits()


@dataclass(frozen=True)
class Share:
    """A step: numbers in ``[0, size)``, all equally likely."""

    values: Integers
    sizes: Integers | int
    cells: Integers | None = None

    def push(self, stack: Stack) -> None:
        stack.push_uniform(self.values, self.sizes)

    def bits(self) -> Floats:
        return np.broadcast_to(bits(np.log(np.asarray(self.sizes, np.float64))), self.values.shape)


Step: TypeAlias = Interval | Placed | Share


class CellCodec(Protocol):
    """A codec of an array of cells that also says what it can code, and at what length."""

    shape: tuple[int, ...]

    def push(self, stack: Stack, symbols: ArrayLike) -> None: ...

    def pop(self, stack: Stack) -> Integers: ...

    def lengths(self, symbols: ArrayLike) -> Floats:
        """Length of every symbol in bits, from its integer frequencies.  For reports."""
        ...

    def legal(self, symbols: ArrayLike) -> Mask:
        """Which symbols the codec can code."""
        ...


class Cells(ABC):
    """Codec of an array of independent cells.

    Args:
        shape: shape of the symbols.
        present: which cells are there, a mask of that shape; None for all.  Absent cells cost nothing, and ``pop``
            gives 0 for them.
    """

    def __init__(self, shape: Sequence[int], present: ArrayLike | None = None) -> None:
        self.shape = tuple(int(size) for size in shape)
        self.kept: Integers | None = None
        self.count = math.prod(self.shape)
        if present is not None:
            mask = np.asarray(present)
            if mask.shape != self.shape or mask.dtype != np.bool_:
                raise ValueError(f"present: expected a bool mask of shape {self.shape}, got {mask.dtype} {mask.shape}")
            if not mask.all():
                self.kept = np.flatnonzero(mask)
                self.count = len(self.kept)

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        """Code the symbols of the cells that are there.

        Raises:
            ValueError: a symbol is not :meth:`legal`; the message names its index.
        """
        for step in reversed(list(self._steps(self._checked(symbols)))):
            step.push(stack)

    def pop(self, stack: Stack) -> Integers:
        """Decode all cells, int64, 0 where absent; from random bits, draw them."""
        symbols = self._pop(stack)
        if self.kept is not None:
            everywhere = np.zeros(math.prod(self.shape), np.int64)
            everywhere[self.kept] = symbols
            symbols = everywhere
        return symbols.reshape(self.shape)

    def lengths(self, symbols: ArrayLike) -> Floats:
        """Length of every symbol in bits, from its integer frequencies; 0 where absent.  For reports."""
        bits = np.zeros(self.count)
        for step in self._steps(self._checked(symbols)):
            if step.cells is None:
                bits += step.bits()
            else:
                np.add.at(bits, step.cells, step.bits())
        if self.kept is not None:
            everywhere = np.zeros(math.prod(self.shape))
            everywhere[self.kept] = bits
            bits = everywhere
        return bits.reshape(self.shape)

    def legal(self, symbols: ArrayLike) -> Mask:
        """Which symbols the codec can code, shape of the symbols; absent cells always are."""
        array = flat(symbols, self.shape)
        good = np.ones(len(array), bool)
        good[slice(None) if self.kept is None else self.kept] = self._legal(self._picked(array))
        return good.reshape(self.shape)

    @abstractmethod
    def _steps(self, symbols: Integers) -> Iterable[Step]:
        """The steps of the present symbols, in the order of ``pop``."""

    @abstractmethod
    def _pop(self, stack: Stack) -> Integers:
        """The symbols of the present cells."""

    @abstractmethod
    def _legal(self, symbols: Integers) -> Mask:
        """Which of the present symbols can be coded."""

    def _select(self, array: NDArray[Any], trailing: int = 0) -> NDArray[Any]:
        """A parameter of the present cells: shape ``(count, *trailing axes)``."""
        flattened = array.reshape(-1, *array.shape[array.ndim - trailing :])
        return flattened if self.kept is None else flattened[self.kept]

    def _picked(self, array: NDArray[Any]) -> Integers:
        picked = array if self.kept is None else array[self.kept]
        if picked.dtype != np.int64:
            if not (np.issubdtype(picked.dtype, np.integer) or picked.dtype == np.bool_):
                raise ValueError(f"symbols: expected integers, got {picked.dtype}")
            picked = picked.astype(np.int64)
        return picked

    def _checked(self, symbols: ArrayLike) -> Integers:
        picked = self._picked(flat(symbols, self.shape))
        good = self._legal(picked)
        if not good.all():
            at = int(np.flatnonzero(~good)[0])
            where = at if self.kept is None else int(self.kept[at])
            index = ", ".join(str(int(i)) for i in np.unravel_index(where, self.shape))
            raise ValueError(f"symbols[{index}]: expected {self._domain()}, got {int(picked[at])}")
        return picked

    def _domain(self) -> str:
        return "a symbol of the codec's range"


def blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    """Slices that cover ``range(count)``."""
    for first in range(0, count, size):
        yield slice(first, min(first + size, count))


class Ahead:
    """What ``of(part)`` gives for the cells, computed a block at a time and read in ascending slices."""

    def __init__(self, count: int, of: Callable[[slice], Any]) -> None:
        self._count, self._of = count, of
        self._block, self._held = slice(0, 0), None  # type: ignore[var-annotated]

    def __getitem__(self, part: slice) -> Any:
        if part.stop > self._block.stop or part.start < self._block.start:
            self._block = slice(part.start, min(max(part.start + BLOCK, part.stop), self._count))
            self._held = self._of(self._block)
        assert self._held is not None
        return self._held[part.start - self._block.start : part.stop - self._block.start]


def precision_for(symbols: int) -> int:
    """Bits of the frequencies of an alphabet: 24, or 28 when it is large, so that one unit each costs < 0.0004 bits.

    >>> precision_for(2), precision_for(4096), precision_for(100_000)
    (24, 24, 28)
    """
    if symbols > 1 << 22:
        raise ValueError(f"symbols: expected at most {1 << 22} in one alphabet, got {symbols}")
    return 24 if symbols <= 1 << 12 else MOST_PRECISION


# ------------------------------------------------------------------------------------------- numbers of any size


def share_steps(values: Integers, sizes: Integers, cells: Integers | None = None) -> list[Step]:
    """Steps of numbers in ``[0, size)``, all equally likely, for sizes 1 … 2^63 − 1.

    A size above 2^32 takes two digits, at an excess below 2^−31 bits.
    """
    shift, high_sizes = _high_digit(sizes)
    high = values >> shift
    if not shift.any():
        return [Share(high, high_sizes, cells)]
    low = values & ((np.int64(1) << shift) - 1)
    return [Share(high, high_sizes, cells), Share(low, _low_sizes(sizes, shift, high), cells)]


def share_pop(stack: Stack, sizes: Integers) -> Integers:
    """Decode what :func:`share_steps` describes."""
    shift, high_sizes = _high_digit(sizes)
    high = stack.pop_uniform(high_sizes)
    if not shift.any():
        return high
    return (high << shift) + stack.pop_uniform(_low_sizes(sizes, shift, high))


def _high_digit(sizes: Integers) -> tuple[Integers, Integers]:
    shift = np.maximum(floor_log2(np.maximum(sizes - 1, 1)) - 31, 0)
    return shift, ((sizes - 1) >> shift) + 1


def _low_sizes(sizes: Integers, shift: Integers, high: Integers) -> Integers:
    """The last high digit may have fewer low digits."""
    top, full = sizes - 1, np.int64(1) << shift
    return np.where(high == top >> shift, (top & (full - 1)) + 1, full)


def elias_steps(numbers: Integers, cells: Integers | None = None) -> list[Step]:
    """Steps of whole numbers 0 … 2^63 − 2 of any size: ⌊log2(n + 1)⌋ at equal chances (6 bits), then the rest.

    After P. Elias (1975, IEEE Trans. Inf. Theory 21, 194), his γ code with another code of the length.
    """
    bits = floor_log2(numbers + 1)
    size = np.int64(1) << bits
    return [Share(bits, 63, cells), *share_steps(numbers + 1 - size, size, cells)]


def elias_pop(stack: Stack, count: int) -> Integers:
    """Decode what :func:`elias_steps` describes."""
    size = np.int64(1) << stack.pop_uniform(63, count)
    return size - 1 + share_pop(stack, size)


def floor_log2(numbers: Integers) -> Integers:
    """⌊log2 n⌋ for n ≥ 1.

    >>> floor_log2(np.array([1, 2, 3, 2**62, 2**63 - 1]))
    array([ 0,  1,  1, 62, 62])
    """
    bits = np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - 1
    bits -= numbers >> bits == 0  # where rounding to a float has reached the next power of two
    return bits
