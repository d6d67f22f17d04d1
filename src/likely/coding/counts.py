"""Codecs of counts without a limit: negative binomial and binomial cells, and multinomial rows.

Both laws have p(k + 1)/p(k) = b (A ± k)/(k + 1), with + for the negative binomial (b = μ/(r + μ), A = r) and − for the
binomial (b its odds, A its N).  Counts below 32 are coded under the sums of this recurrence, step by step.  What
is larger is coded under the same law with its mass function made linear between about forty counts, which lie evenly on
the scale that gives the law a constant variance, y = 2√r asinh √(x/r): first the stretch between two of them, then
the place within it.  The excess over the law is below 0.1 % of its length, whatever the mean and the dispersion.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from likely.coding.cells import (
    Ahead,
    Cells,
    Floats,
    Integers,
    Interval,
    Mask,
    Some,
    Step,
    Unsigned,
    blocks,
    elias_pop,
    elias_steps,
    floor_log2,
    share_pop,
    share_steps,
)
from likely.coding.stack import Stack
from likely.coding.tables import refuse_non_finite
from likely.exact.functions import exp, log, log1p, sqrt

#: Counts from here on are coded by stretches.
_FEW = 32
_STRETCHES = 40
_PRECISION = 28
#: Bits of a place within a stretch that follow its slope; further bits are uniform.
_PLACE_BITS, _PLACE_PRECISION = 12, 24
_TAIL_BLOCK = 1 << 10
_HIGHEST = 1 << 50


@dataclass(frozen=True)
class Recurrence:
    """p(0), and p(k + 1) = p(k) · b (A + sign · k)/(k + 1), for some cells; ``most`` is the largest count, or None."""

    zero: Floats
    b: Floats
    a: Floats
    sign: float
    most: Integers | None = None


@dataclass(frozen=True)
class Tail:
    """Stretches of counts from 32 up, for some cells: shapes ``(stretches + 1, cells)`` and ``(stretches, cells)``.

    Args:
        begin: first count of each stretch, and the end of the last.
        mass: mass function there, up to a factor.
        shift: bits of a place that are uniform.
        start: where stretches start in 2^28; one row more than ``begin``, the last stretch being all that follows.
    """

    begin: Integers
    mass: Floats
    shift: Integers
    start: Integers

    def __getitem__(self, some: Some) -> Tail:
        return Tail(*(getattr(self, field.name)[:, some] for field in fields(self)))


class CountCells(Cells):
    """Counts under laws given by a recurrence."""

    @abstractmethod
    def _recurrence(self, some: Some) -> Recurrence:
        """The law of some cells."""

    @abstractmethod
    def _scale(self, some: Some) -> tuple[Floats, Floats, Floats]:
        """(r, mean, a count that hardly any exceeds) of some cells, for the choice of the stretches."""

    @abstractmethod
    def _log_mass(self, x: Floats, some: Some) -> Floats:
        """log p(x) of some cells up to a constant, for x ≥ 32: shape ``(k, cells)``."""

    def _most(self, some: Some) -> Integers | None:
        """Largest count of some cells; None where there is no limit."""
        return None

    def _starts(self, part: slice, rows: int = _FEW + 1) -> NDArray[np.uint32]:
        """Starts of the counts 0 … ``rows`` in 2^28, 32 being all that is larger: shape ``(rows + 1, cells)``."""
        law = self._recurrence(part)
        size: Floats | float = _FEW + 1.0
        if law.most is not None:
            size = np.minimum(law.most, _FEW) + 1.0
        room = (1 << _PRECISION) - size
        starts = np.empty((rows + 1, len(law.zero)), np.uint32)
        starts[0] = 0
        p, total = law.zero.copy(), np.zeros(len(law.zero))
        for k in range(rows):
            total += p
            share = np.minimum(total, 1.0)
            if law.most is not None or k == _FEW:
                share = np.where(k + 1.0 >= size, 1.0, share)
            starts[k + 1] = np.floor(share * room) + np.minimum(k + 1.0, size)
            factor = law.a + law.sign * k
            if law.sign < 0:
                np.maximum(factor, 0.0, out=factor)
            factor *= law.b
            factor /= k + 1.0
            p *= factor
        return starts

    def _steps(self, symbols: Integers) -> Iterable[Step]:
        start, freq = np.empty(self.count, np.uint64), np.empty(self.count, np.uint64)
        first = np.minimum(symbols, _FEW)
        for part in blocks(self.count, 1 << 12):
            x = first[part]
            starts, cell = self._starts(part, int(x.max()) + 1), np.arange(len(x))
            start[part] = starts[x, cell]
            freq[part] = starts[x + 1, cell] - start[part]
        yield Interval(start, freq, _PRECISION)
        large = np.flatnonzero(symbols >= _FEW)
        if len(large):
            yield from self._tail_steps(symbols[large], large)

    def _pop(self, stack: Stack) -> Integers:
        starts = Ahead(self.count, lambda part: self._starts(part).T)

        def find(part: slice, residues: Unsigned) -> tuple[Integers, Unsigned, Unsigned]:
            return search(starts[part].T, residues)

        symbols = stack.pop(self.count, _PRECISION, find)
        large = np.flatnonzero(symbols >= _FEW)
        if len(large):
            symbols[large] = self._tail_pop(stack, large)
        return symbols

    # --------------------------------------------------------------------------------------------------- large counts

    def _tail(self, cells: Integers) -> Tail:
        r, mean, highest = self._scale(cells)
        most = self._most(cells)
        root = sqrt(r)

        def y(x: Floats) -> Floats:  # in units of √r
            t = sqrt(x / r)
            return 2.0 * log(t + sqrt(t * t + 1.0))

        lowest = np.full(len(r), float(_FEW))
        first = np.maximum(y(lowest), y(mean) - 9.0 / root)
        last = y(np.maximum(highest, 4.0 * _FEW))
        factor = exp((last - first) * (1.0 / (_STRETCHES - 1)))
        e = exp(first)
        begin = np.empty((_STRETCHES + 1, len(r)), np.int64)
        shift = np.empty((_STRETCHES, len(r)), np.int64)
        begin[0] = _FEW
        for j in range(_STRETCHES):  # counts at even distances on the scale: r sinh²(y/2)
            x = (e + 1.0 / e - 2.0) * (0.25 * r)
            width = np.rint(np.clip(x, 1.0, 4.0 * _HIGHEST)).astype(np.int64) - begin[j]
            np.maximum(width, 1, out=width)
            if most is not None:
                width = np.minimum(width, most - begin[j])
            shift[j] = np.maximum(floor_log2(np.maximum(width, 1)) - (_PLACE_BITS - 1), 0)
            begin[j + 1] = begin[j] + (width >> shift[j] << shift[j])
            e = e * factor
        log_mass = self._log_mass(begin.astype(np.float64), cells)
        mass = exp(log_mass - log_mass.max(0))
        widths = np.diff(begin, axis=0)
        total = np.zeros((_STRETCHES + 2, len(r)))
        for j in range(_STRETCHES):
            area = mass[j] * ((widths[j] + 1.0) * 0.5) + mass[j + 1] * (np.maximum(widths[j] - 1.0, 0.0) * 0.5)
            total[j + 1] = total[j] + np.where(widths[j] > 0, area, 0.0)
        total[-1] = total[-2] + mass[-1]
        before = np.zeros((_STRETCHES + 2, len(r)), np.int64)  # stretches that are not empty
        np.cumsum(widths > 0, axis=0, out=before[1:-1])
        before[-1] = before[-2] + 1
        start = np.floor(total / total[-1] * ((1 << _PRECISION) - before[-1])).astype(np.int64) + before
        return Tail(begin, mass, shift, start)

    def _tail_steps(self, x: Integers, cells: Integers) -> Iterable[Step]:
        n = len(x)
        start, freq = np.empty(n, np.int64), np.empty(n, np.int64)
        place_start, place_freq = np.zeros(n, np.int64), np.ones(n, np.int64)
        beyond, excess, shift, last = (
            np.empty(n, bool),
            np.empty(n, np.int64),
            np.zeros(n, np.int64),
            np.empty(n, np.int64),
        )
        for part in blocks(n, _TAIL_BLOCK):
            tail, v = self._tail(cells[part]), x[part]
            cell = np.arange(len(v))
            stretch = (tail.begin <= v).sum(0) - 1
            # Of stretches that begin at one count, all but the last are empty.
            start[part] = tail.start[stretch, cell]
            freq[part] = tail.start[stretch + 1, cell] - start[part]
            excess[part] = v - tail.begin[stretch, cell]
            last[part] = tail.begin[-1]
            beyond[part] = stretch == _STRETCHES
            inner = np.flatnonzero(~beyond[part])
            place = _Place(tail[inner], stretch[inner])
            shift[part][inner] = place.shift
            digit = excess[part][inner] >> place.shift
            place_start[part][inner] = place.start(digit)
            place_freq[part][inner] = place.start(digit + 1) - place_start[part][inner]
        yield Interval(_u(start), _u(freq), _PRECISION, cells)
        inner, outer = np.flatnonzero(~beyond), np.flatnonzero(beyond)
        yield Interval(_u(place_start[inner]), _u(place_freq[inner]), _PLACE_PRECISION, cells[inner])
        size = np.int64(1) << shift[inner]
        yield from share_steps(excess[inner] & (size - 1), size, cells[inner])
        most = self._most(cells[outer])
        if most is None:
            yield from elias_steps(excess[outer], cells[outer])
        else:
            yield from share_steps(excess[outer], most - last[outer] + 1, cells[outer])

    def _tail_pop(self, stack: Stack, cells: Integers) -> Integers:
        n = len(cells)
        tails = _Tails(self, cells)
        stretch = stack.pop(n, _PRECISION, lambda part, r: search(tails[part].start, r))
        inner, outer = np.flatnonzero(stretch < _STRETCHES), np.flatnonzero(stretch == _STRETCHES)
        x = np.empty(n, np.int64)
        shift = np.empty(n, np.int64)
        for part in blocks(n, _TAIL_BLOCK):
            tail, cell = tails[part], np.arange(part.stop - part.start)
            x[part] = tail.begin[stretch[part], cell]
            shift[part] = tail.shift[np.minimum(stretch[part], _STRETCHES - 1), cell]
        places = Ahead(len(inner), lambda part: tails.places(inner[part], stretch[inner[part]]))
        digit = stack.pop(len(inner), _PLACE_PRECISION, lambda part, r: places[part].find(r.view(np.int64)))
        x[inner] += digit << shift[inner]
        x[inner] += share_pop(stack, np.int64(1) << shift[inner])
        most = self._most(cells[outer])
        x[outer] += elias_pop(stack, len(outer)) if most is None else share_pop(stack, most - x[outer] + 1)
        return x


class _Tails:
    """Tails of cells, computed a block at a time and kept."""

    def __init__(self, owner: CountCells, cells: Integers) -> None:
        self._kept = [owner._tail(cells[part]) for part in blocks(len(cells), _TAIL_BLOCK)]

    def __getitem__(self, part: slice) -> Tail:
        first, last = part.start // _TAIL_BLOCK, (part.stop - 1) // _TAIL_BLOCK
        joined = _joined(self._kept[first : last + 1])
        return joined[slice(part.start - first * _TAIL_BLOCK, part.stop - first * _TAIL_BLOCK)]

    def places(self, index: Integers, stretch: Integers) -> _Place:
        """The stretches in which cells (ascending) lie."""
        first = int(index[0]) // _TAIL_BLOCK
        joined = _joined(self._kept[first : int(index[-1]) // _TAIL_BLOCK + 1])
        return _Place(joined[index - first * _TAIL_BLOCK], stretch)


def _joined(tails: list[Tail]) -> Tail:
    if len(tails) == 1:
        return tails[0]
    return Tail(*(np.concatenate([getattr(tail, field.name) for tail in tails], 1) for field in fields(Tail)))


class _Place:
    """Where in its stretch a count lies: the law of the high bits of the place, whose mass is linear.

    With u the share of the stretch that is passed, and the mass going from α to 2 − α, the cumulative law is
    u (α + (1 − α) u) where the mass rises, and 1 minus the same from the other end where it falls.
    """

    def __init__(self, tail: Tail, stretch: Integers) -> None:
        cell = np.arange(len(stretch))
        self.shift = tail.shift[stretch, cell]
        self.size = (tail.begin[stretch + 1, cell] - tail.begin[stretch, cell]) >> self.shift
        left, right = tail.mass[stretch, cell], tail.mass[stretch + 1, cell]
        both = left + right
        self.rising = right >= left
        self.alpha = np.where(both > 0, 2.0 * np.minimum(left, right) / np.where(both > 0, both, 1.0), 1.0)

    def __getitem__(self, some: Some) -> _Place:
        place = object.__new__(_Place)
        place.shift, place.size = self.shift[some], self.size[some]
        place.rising, place.alpha = self.rising[some], self.alpha[some]
        return place

    def start(self, digit: Integers) -> Integers:
        """Where place ``digit`` = 0 … size starts in 2^24."""
        u = np.where(self.rising, digit, self.size - digit) / self.size
        share = u * (self.alpha + (1.0 - self.alpha) * u)
        share = np.where(self.rising, share, 1.0 - share)
        return np.floor(share * ((1 << _PLACE_PRECISION) - self.size)).astype(np.int64) + digit

    def find(self, residues: Integers) -> tuple[Integers, Integers, Integers]:
        low = np.zeros(len(residues), np.int64)
        for step in reversed(range(_PLACE_BITS)):
            digit = low + (1 << step)
            inside = digit < self.size
            inside &= self.start(np.minimum(digit, self.size)) <= residues
            low = np.where(inside, digit, low)
        start = self.start(low)
        return low, start, self.start(low + 1) - start


def search(starts: NDArray[Any], residues: Unsigned) -> tuple[Integers, Unsigned, Unsigned]:
    """The last symbol of each column that starts at or below the residue: (symbol, start, freq).

    Args:
        starts: ascending, shape ``(n + 1, cells)``; the last row is 2^P.
    """
    n, cell = len(starts) - 1, np.arange(starts.shape[1])
    r = residues.astype(starts.dtype)
    low = np.zeros(len(cell), np.int64)
    for step in reversed(range((n - 1).bit_length())):
        next_ = np.minimum(low + (1 << step), n)
        low = np.where(starts[next_, cell] <= r, next_, low)
    start = starts[low, cell].astype(np.uint64)
    return low, start, starts[low + 1, cell].astype(np.uint64) - start


def _u(values: Integers) -> Unsigned:
    return values.view(np.uint64)


def _log_gamma(z: Floats) -> Floats:
    """log Γ(z) for z ≥ 1 but for a constant, by Stirling's series: within 6e-4 at 1, 1e-9 from 16 on."""
    inverse = np.full_like(z, 1.0) / z
    square = inverse * inverse
    return (z - 0.5) * log(z) - z + inverse * (1.0 / 12.0 - square * (1.0 / 360.0 - square * (1.0 / 1260.0)))


class NegativeBinomialCells(CountCells):
    """Counts with mean μ and variance μ + μ²/r.

    Args:
        log_mean, log_dispersion: log μ, cut at ± 40, and log r, cut at ± 20; float32 or float64.

    >>> stack = Stack()
    >>> cells = NegativeBinomialCells(np.float32([0.0, 3.0, 12.0]), np.float32([0.0, 1.0, 9.0]))
    >>> cells.push(stack, [0, 55, 161_234])
    >>> cells.pop(stack)
    array([     0,     55, 161234])
    """

    def __init__(self, log_mean: NDArray[Any], log_dispersion: NDArray[Any], present: ArrayLike | None = None) -> None:
        super().__init__(log_mean.shape, present)
        refuse_non_finite("log_mean", log_mean)
        refuse_non_finite("log_dispersion", log_dispersion)
        self._log_mean = self._select(log_mean)
        self._log_r = self._select(np.broadcast_to(log_dispersion, log_mean.shape))

    def _numbers(self, some: Some) -> tuple[Floats, Floats]:
        mean = exp(np.clip(self._log_mean[some].astype(np.float64), -40.0, 40.0))
        return mean, exp(np.clip(self._log_r[some].astype(np.float64), -20.0, 20.0))

    def _recurrence(self, some: Some) -> Recurrence:
        mean, r = self._numbers(some)
        return Recurrence(exp(-r * log1p(mean / r)), mean / (r + mean), r, 1.0)

    def _scale(self, some: Some) -> tuple[Floats, Floats, Floats]:
        mean, r = self._numbers(some)
        deviation, decay = sqrt(mean + mean * mean / r), log1p(r / mean)
        return r, mean, mean + 10.0 * deviation + 30.0 / np.maximum(decay, 1e-12)

    def _log_mass(self, x: Floats, some: Some) -> Floats:
        mean, r = self._numbers(some)
        return _log_gamma(x + r) - _log_gamma(x + 1.0) - x * log1p(r / mean)

    def _legal(self, symbols: Integers) -> Mask:
        return (symbols >= 0) & (symbols <= _HIGHEST)

    def _domain(self) -> str:
        return f"a count from 0 to {_HIGHEST}"


class BinomialCells(CountCells):
    """Successes among N trials, with odds given as a ratio of whole numbers that is at most 1.

    Args:
        trials: N ≥ 1, shape ``(cells,)``.
        odds: p/(1 − p) ≤ 1, float64.
    """

    def __init__(self, trials: Integers, odds: Floats) -> None:
        super().__init__(trials.shape)
        self._trials, self._odds = trials, odds

    def _recurrence(self, some: Some) -> Recurrence:
        trials = self._trials[some].astype(np.float64)
        return Recurrence(exp(-trials * log1p(self._odds[some])), self._odds[some], trials, -1.0, self._trials[some])

    def _scale(self, some: Some) -> tuple[Floats, Floats, Floats]:
        # The scale of a Poisson law of this mean, which is the negative binomial's for large r.
        trials, odds = self._trials[some].astype(np.float64), self._odds[some]
        mean = trials * odds / (1.0 + odds)
        highest = np.minimum(mean + 10.0 * sqrt(mean) + 30.0, trials)
        return np.full_like(mean, 2.0**30) + mean * 2.0**10, mean, highest

    def _log_mass(self, x: Floats, some: Some) -> Floats:
        trials, odds = self._trials[some].astype(np.float64), self._odds[some]
        log_odds = log(np.maximum(odds, 1e-300))
        return x * log_odds - _log_gamma(x + 1.0) - _log_gamma(np.maximum(trials - x, 0.0) + 1.0)

    def _most(self, some: Some) -> Integers:
        return self._trials[some]

    def _legal(self, symbols: Integers) -> Mask:
        return (symbols >= 0) & (symbols <= self._trials)

    def _domain(self) -> str:
        return "a count from 0 to the number of trials"


class MultinomialRows:
    """Rows of counts: the total under a negative binomial law, then how it divides, by halves of halves of the cells.

    Each division of a count n at a node is a binomial of the weights left and right of it, and costs nothing where n
    is 0: a row takes time for its weights, and for the cells that are not 0 times log2 of the number of cells.

    Args:
        logits: shape ``(n, *cells)``.
        log_mean, log_dispersion: of the total, shape ``(n,)``.
        present: must be None or all true: a total needs every cell.
    """

    def __init__(
        self,
        logits: NDArray[Any],
        log_mean: NDArray[Any],
        log_dispersion: NDArray[Any],
        present: ArrayLike | None = None,
    ) -> None:
        self.shape = logits.shape
        if present is not None and not np.asarray(present).all():
            raise ValueError("present: expected every cell of a multinomial row, got absent ones")
        self._logits = logits.reshape(len(logits), math.prod(logits.shape[1:]))
        refuse_non_finite("logits", self._logits, lowest_may_be_infinite=True)
        self._total = NegativeBinomialCells(log_mean, log_dispersion)
        self._rows = max(1, (1 << 18) // self._logits.shape[1])

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        """Code rows of counts."""
        for codec, counts in reversed(list(self._parts(symbols))):
            codec.push(stack, counts)

    def lengths(self, symbols: ArrayLike) -> Floats:
        """Bits of every cell: those of a division are shared by the cells of a row alike.  For reports."""
        bits = np.zeros(len(self._logits))
        for codec, counts in self._parts(symbols):
            if codec is self._total:
                bits += codec.lengths(counts)
            else:
                assert isinstance(codec, _Division)
                np.add.at(bits, codec.row, codec.lengths(counts))
        cells = np.repeat(bits[:, None] / self._logits.shape[1], self._logits.shape[1], 1)
        return cells.reshape(self.shape)

    def legal(self, symbols: ArrayLike) -> Mask:
        """Which cells can be coded: counts from 0, in rows whose total is at most 2^50."""
        x = np.asarray(symbols).reshape(self._logits.shape)
        good = (x >= 0) & (x <= _HIGHEST)
        good &= (np.where(good, x, 0).astype(np.float64).sum(1) <= _HIGHEST)[:, None]
        return good.reshape(self.shape)

    def pop(self, stack: Stack) -> Integers:
        """Decode rows of counts."""
        totals = self._total.pop(stack)
        x = np.empty(self._logits.shape, np.int64)
        for rows in blocks(len(x), self._rows):
            counts = totals[rows][:, None]
            for weight in reversed(self._levels(rows)[:-1]):
                division, shape = _Division.of(weight, counts, rows.start), weight.shape
                counts = division.spread(division.pop(stack), counts, shape)
            x[rows] = counts
        return x.reshape(self.shape)

    def _levels(self, rows: slice) -> list[Integers]:
        """Weights of the cells, of pairs of cells, of pairs of pairs …, up to the whole row: whole numbers.

        exp(l − max l) in units of 2^−40; a grid of logits would cost too much where totals are large.
        """
        logits = self._logits[rows].astype(np.float64)
        logits -= logits.max(1, keepdims=True)
        levels = [np.rint(exp(logits) * 2.0**40).astype(np.int64)]
        while levels[-1].shape[1] > 1:
            levels.append(_pair_sums(levels[-1]))
        return levels

    def _parts(self, symbols: ArrayLike) -> Iterable[tuple[Any, Integers]]:
        """Codecs and their symbols, in the order of ``pop``."""
        x = np.asarray(symbols)
        if x.shape != self.shape:
            raise ValueError(f"symbols: expected shape {self.shape}, got {x.shape}")
        good = self.legal(x)
        if not good.all():
            index = tuple(int(i) for i in np.argwhere(~good)[0])
            raise ValueError(f"symbols[{', '.join(map(str, index))}]: expected a count from 0, got {int(x[index])}")
        x = x.reshape(self._logits.shape).astype(np.int64)
        yield self._total, x.sum(1)
        for rows in blocks(len(x), self._rows):
            counts = [x[rows]]
            while counts[-1].shape[1] > 1:
                counts.append(_pair_sums(counts[-1]))
            for weight, below, above in reversed(list(zip(self._levels(rows), counts, counts[1:]))):
                division = _Division.of(weight, above, rows.start)
                yield division, below.reshape(-1)[division.chosen]


def _pair_sums(values: Integers) -> Integers:
    even, odd = values[:, 0::2].copy(), values[:, 1::2]
    even[:, : odd.shape[1]] += odd
    return even


class _Division(BinomialCells):
    """How the counts of one level divide between left and right: the side of less weight, where there is any count.

    Args:
        node, row: which nodes (flat), and the row of each.
        chosen, other: flat index of the coded side and of the other one in the level below.
    """

    def __init__(self, trials: Integers, odds: Floats, row: Integers, chosen: Integers, other: Integers) -> None:
        super().__init__(trials, odds)
        self.row, self.chosen, self.other = row, chosen, other

    @classmethod
    def of(cls, weight: Integers, counts: Integers, first_row: int) -> _Division:
        """Of the weights of a level and the counts of the nodes above it."""
        pairs, width = weight.shape[1] // 2, weight.shape[1]
        row, pair = np.nonzero(counts[:, :pairs])
        left = row * width + 2 * pair
        w = weight.reshape(-1)
        swap = w[left] > w[left + 1]
        chosen, other = left + swap, left + ~swap
        odds = np.where(w[other] > 0, w[chosen] / np.maximum(w[other], 1), 1.0)
        return cls(counts[row, pair], odds, row + first_row, chosen, other)

    def spread(self, coded: Integers, counts: Integers, shape: tuple[int, ...]) -> Integers:
        """Counts of the level below."""
        below = np.zeros(shape, np.int64)
        flat = below.reshape(-1)
        flat[self.chosen] = coded
        flat[self.other] = self._trials - coded
        if shape[1] % 2:
            below[:, -1] = counts[:, -1]
        return below
