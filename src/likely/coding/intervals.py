"""Codecs of numbers on a grid: cells of an interval under a cumulative distribution that is cheap to evaluate.

Cell i = 0 … n − 1 lies between the edges i and i + 1; F, with F(0) = 0 and F(n) = 1, is monotone to the last bit (see
:mod:`likely.coding.tables`).  A small alphabet takes one step: with P bits, symbol i starts at ⌊F(i) (2^P − n)⌋ + i.
A large one is coded in digits, high digits first: within the block of cells [a, b) that the higher digits leave,
digit d = 0 … m − 1 of cells worth w each starts at

    ⌊(F(a + d w) − F(a)) / (F(b) − F(a)) · (2^P − m)⌋ + d,        and at ⌊d/m (2^P − m)⌋ + d where F(a) = F(b),

so that every cell can be coded whatever F says.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from likely.coding.cells import (
    Ahead,
    Cells,
    Floats,
    Integers,
    Mask,
    Some,
    Step,
    Unsigned,
    elias_pop,
    elias_steps,
    intervals,
    precision_for,
)
from likely.coding.stack import Stack
from likely.coding.tables import Law, inverse_scale, logistic, normal, refuse_non_finite, shares, weights
from likely.distributions.logistic import LEAST_LOG_SCALE
from likely.exact.functions import exp

#: Largest digit of a number in bits.
_DIGIT = 16
_ENDS = 1e300


class Cumulative(Protocol):
    """The cumulative distributions of some cells."""

    def cdf(self, position: Floats) -> Floats:
        """F at one position of each cell: 0 at or below −10^300, 1 at or above 10^300, monotone between them."""
        ...

    def take(self, some: Some) -> Cumulative:
        """The distributions of some of the cells."""
        ...

    def guess(self, probability: Floats) -> Floats | None:
        """Position where F is about so large, a hint; None where there is no cheap one."""
        ...


@dataclass(frozen=True)
class Digit:
    """One digit: worth ``1 << shift`` cells, at most ``size`` of them, coded with ``precision`` bits."""

    shift: int
    size: int
    precision: int


def digits(cells: int) -> list[Digit]:
    """How a number of that many cells is cut into digits of up to 16 bits, the highest first.

    >>> digits(256)
    [Digit(shift=0, size=256, precision=24)]
    >>> digits(1_000_000)
    [Digit(shift=10, size=977, precision=24), Digit(shift=0, size=1024, precision=24)]
    """
    bits = max(1, (cells - 1).bit_length())
    count = -(-bits // _DIGIT)
    width = -(-bits // count)
    cut = []
    for i in reversed(range(count)):
        size = -(-cells // (1 << width * i)) if i == count - 1 else 1 << width
        cut.append(Digit(width * i, size, precision_for(size)))
    return cut


class IntervalCells(Cells):
    """Numbers on a grid under laws given by their cumulative distributions.

    Args:
        shape: shape of the symbols.
        low, cells: the symbols of the range are ``low … low + cells − 1``; the outer cells take the tails.
        escapes: whether a symbol beyond the range is coded as an outer cell, followed by its distance (Elias code).
        present: which cells are there; None for all.
    """

    def __init__(
        self, shape: Sequence[int], low: int, cells: int, escapes: bool = False, present: ArrayLike | None = None
    ) -> None:
        super().__init__(shape, present)
        self.low, self.cells, self.escapes = int(low), int(cells), escapes
        self._digits = digits(self.cells)
        self._positions: Floats | None = None
        if self.cells <= 1 << _DIGIT:
            self._positions = self._computed(np.arange(self.cells + 1))

    @abstractmethod
    def _law(self, some: Some) -> Cumulative:
        """The laws of some cells; positions are symbols, a cell reaching half a unit to both sides."""

    def _computed(self, edges: Integers) -> Floats:
        position = (edges + self.low).astype(np.float64)
        position -= 0.5
        position[edges <= 0] = -_ENDS
        position[edges >= self.cells] = _ENDS
        return position

    def _cdf(self, law: Cumulative, edges: Integers) -> Floats:
        """F at the edges 0 … n."""
        return law.cdf(self._computed(edges) if self._positions is None else self._positions.take(edges))

    # -------------------------------------------------------------------------------------------------------- push

    def _steps(self, symbols: Integers) -> Iterable[Step]:
        inside = symbols - self.low
        if self.escapes:
            inside = np.clip(inside, 0, self.cells - 1)
        for depth, digit in enumerate(self._digits):
            yield intervals(self.count, digit.precision, functools.partial(self._place, inside, depth))
        if self.escapes:
            outer = np.flatnonzero((inside == 0) | (inside == self.cells - 1))
            if len(outer):
                yield from elias_steps(np.abs(symbols[outer] - self.low - inside[outer]), outer)

    def _place(self, inside: Integers, depth: int, part: slice) -> tuple[Unsigned, Unsigned]:
        """(start, freq) of a digit of some numbers ``inside`` the range."""
        frame = self._frame(inside, depth, part)
        digits = inside[part] if frame.first is None else inside[part] - frame.first
        return frame.interval(digits >> frame.digit.shift)

    def _frame(self, inside: Integers, depth: int, part: slice) -> _Frame:
        """Where a digit is coded, given the digits before it."""
        law, digit = self._law(part), self._digits[depth]
        if depth == 0:
            return _Frame(self, law, digit)
        before = self._digits[depth - 1].shift
        first = inside[part] >> before << before
        last = np.minimum(first + (1 << before), self.cells)
        below = self._cdf(law, first)
        return _Frame(self, law, digit, first, -(-(last - first) >> digit.shift), below, self._cdf(law, last) - below)

    # --------------------------------------------------------------------------------------------------------- pop

    def _pop(self, stack: Stack) -> Integers:
        inside = np.zeros(self.count, np.int64)
        for depth, digit in enumerate(self._digits):
            frames = Ahead(self.count, functools.partial(self._frame, inside.copy(), depth))
            found = stack.pop(self.count, digit.precision, lambda part, r: frames[part].find(r))  # noqa: B023
            inside += found << digit.shift
        symbols = inside + self.low
        if self.escapes:
            outer = np.flatnonzero((inside == 0) | (inside == self.cells - 1))
            if len(outer):
                symbols[outer] += np.where(inside[outer] == 0, -1, 1) * elias_pop(stack, len(outer))
        return symbols

    def _legal(self, symbols: Integers) -> Mask:
        if self.escapes:
            return (symbols >= -(1 << 61)) & (symbols <= 1 << 61)
        return (symbols - self.low).view(np.uint64) < self.cells

    def _domain(self) -> str:
        if self.escapes:
            return "a whole number within ± 2^61"
        return f"a whole number from {self.low} to {self.low + self.cells - 1}"


class _Frame:
    """A digit of some cells: the block of cells it divides, and the probability below and in that block.

    Args:
        first: first cell of the block; None for 0.
        sizes: number of digits in the block; None for all.
        below, mass: F at the start of the block, and what the block has.
    """

    def __init__(
        self,
        owner: IntervalCells,
        law: Cumulative,
        digit: Digit,
        first: Integers | None = None,
        sizes: Integers | None = None,
        below: Floats | None = None,
        mass: Floats | None = None,
    ) -> None:
        self.owner, self.law, self.digit = owner, law, digit
        self.first, self.sizes, self.below, self.mass = first, sizes, below, mass
        self.room = float(1 << digit.precision) - (digit.size if sizes is None else sizes.astype(np.float64))

    def __getitem__(self, some: Some) -> _Frame:
        """The same for some of the cells."""
        picked = [None if a is None else a[some] for a in (self.first, self.sizes, self.below, self.mass)]
        return _Frame(self.owner, self.law.take(some), self.digit, *picked)  # type: ignore[arg-type]

    def start(self, digits: Integers) -> Unsigned:
        """Where digits start, 0 … size inclusive."""
        edges = digits << self.digit.shift if self.digit.shift else digits
        if self.first is None:
            if self.digit.shift:
                edges = np.minimum(edges, self.owner.cells)
            share = self.owner._cdf(self.law, edges)
        else:
            assert self.sizes is not None and self.mass is not None and self.below is not None
            share = self.owner._cdf(self.law, np.minimum(edges + self.first, self.owner.cells))
            share -= self.below
            flat = self.mass <= 0
            share = np.where(flat, digits / self.sizes, share / np.where(flat, 1.0, self.mass))
        share *= self.room
        start = share.astype(np.int64)
        start += digits
        return start.view(np.uint64)

    def interval(self, digits: Integers) -> tuple[Unsigned, Unsigned]:
        """(start, freq) of digits."""
        start = self.start(digits)
        return start, self.start(digits + 1) - start

    def find(self, residues: Unsigned) -> tuple[Integers, Unsigned, Unsigned]:
        """The digits in whose interval the residues lie, with start and freq.

        A guess is mended by steps of the secant and bisection in turn, among the cells not yet found.
        """
        n = len(residues)
        low = np.zeros(n, np.int64)
        high = np.full(n, self.digit.size, np.int64) if self.sizes is None else self.sizes.copy()
        digit, start, freq = self._guess(residues, high), np.empty(n, np.uint64), np.empty(n, np.uint64)
        frame, index, r, g = self, None, residues, digit
        for turn in range(2 * self.digit.size.bit_length() + 2):
            s, f = frame.interval(g)
            offset = (r - s).view(np.int64)
            size = f.view(np.int64)
            missed = np.flatnonzero((offset < 0) | (offset >= size))
            if index is None:
                digit, start, freq = g, s, f
                if not len(missed):
                    break
                digit = digit.copy()
            else:
                digit[index], start[index], freq[index] = g, s, f
            if not len(missed):
                break
            index = missed if index is None else index[missed]
            frame, r, g, offset, size = frame[missed], r[missed], g[missed], offset[missed], size[missed]
            low, high = low[missed], high[missed]
            under = offset < 0
            high = np.where(under, g, high)
            low = np.where(under, low, g + 1)
            if turn % 2:
                g = (low + high) >> 1
            else:
                g = np.clip(g + np.floor(offset / size).astype(np.int64), low, high - 1)
        return digit, start, freq

    def _guess(self, residues: Unsigned, high: Integers) -> Integers:
        probability = residues / float(1 << self.digit.precision)
        if self.below is not None and self.mass is not None:
            probability = self.below + self.mass * probability
        position = self.law.guess(probability)
        if position is None:
            return high >> 1
        position -= self.owner.low - 0.5
        if self.first is not None:
            position -= self.first
        position *= 2.0**-self.digit.shift
        return np.clip(position, 0.0, (high - 1).astype(np.float64)).astype(np.int64)


# --------------------------------------------------------------------------------------------------------------- laws


class Scaled:
    """One location-scale law a cell, F(x) = law((x − centre) · rate / steps).

    Args:
        centre: in symbols.
        rate: steps of the law's table per symbol, > 0.
    """

    def __init__(self, law: Law, centre: Floats, rate: Floats) -> None:
        self.law, self.centre, self.rate = law, centre, rate

    def cdf(self, position: Floats) -> Floats:
        u = position - self.centre
        u *= self.rate
        u += self.law.centre
        return self.law.cdf(u)

    def take(self, some: Some) -> Scaled:
        return Scaled(self.law, self.centre[some], self.rate[some])

    def guess(self, probability: Floats) -> Floats:
        bucket = (probability * float(1 << self.law.bits)).astype(np.int64)
        position = self.law.quantile.take(np.minimum(bucket, (1 << self.law.bits) - 1))
        position *= self.law.steps
        position /= self.rate
        position += self.centre
        return position


class Mixture:
    """Σ_k share_k F_k(x) + Σ_a share_a [atom a < x].

    Args:
        parts: the laws F_k of the cells.
        portions: their shares, which with those of the atoms sum to 1 exactly.
        atoms: symbols with a share of their own, ascending: shape ``(A,)``.
        spikes: cumulative shares of the atoms, from 0: shape ``(A + 1, columns)``.
        column: which column of ``spikes`` is a cell's; None for its own.
    """

    def __init__(
        self,
        parts: Sequence[Scaled],
        portions: Sequence[Floats],
        atoms: Floats | None = None,
        spikes: Floats | None = None,
        column: Integers | None = None,
    ) -> None:
        self.parts, self.portions, self.atoms, self.spikes = parts, portions, atoms, spikes
        self.column = np.arange(spikes.shape[1]) if column is None and spikes is not None else column

    def cdf(self, position: Floats) -> Floats:
        total: Floats | None = None
        for part, portion in zip(self.parts, self.portions):
            value = part.cdf(position)
            value *= portion
            total = value if total is None else np.add(total, value, out=total)
        assert total is not None
        if self.atoms is not None and self.spikes is not None:
            total += self.spikes[np.searchsorted(self.atoms, position), self.column]
        return total

    def take(self, some: Some) -> Mixture:
        column = None if self.column is None else self.column[some]
        parts = [part.take(some) for part in self.parts]
        return Mixture(parts, [portion[some] for portion in self.portions], self.atoms, self.spikes, column)

    def guess(self, probability: Floats) -> Floats | None:
        return None


class LogisticCells(IntervalCells):
    """Levels 0 … L − 1 under mixtures of discretised logistics, the outer levels taking the tails.

    Args:
        logits, means, log_scales: shape ``(*shape, K)``, float32 or float64; means and scales in units of
            u = 2x/(L − 1) − 1.
        levels: L ≥ 2.
    """

    def __init__(
        self,
        logits: NDArray[Any],
        means: NDArray[Any],
        log_scales: NDArray[Any],
        levels: int,
        present: ArrayLike | None = None,
    ) -> None:
        super().__init__(means.shape[:-1], 0, levels, present=present)
        refuse_non_finite("logits", logits, lowest_may_be_infinite=True)
        refuse_non_finite("means", means)
        refuse_non_finite("log_scales", log_scales)
        self._logits, self._means, self._log_scales = (self._select(a, 1) for a in (logits, means, log_scales))
        self._half = 0.5 * (levels - 1)

    def _law(self, some: Some) -> Cumulative:
        means = self._means[some].T.astype(np.float64, order="C")
        rates = inverse_scale(np.ascontiguousarray(self._log_scales[some].T))
        means += 1.0
        means *= self._half
        rates *= logistic().steps / self._half
        parts = [Scaled(logistic(), centre, rate) for centre, rate in zip(means, rates)]
        if len(parts) == 1:
            return parts[0]
        logits = np.ascontiguousarray(self._logits[some].T)
        return Mixture(parts, shares(list(weights(logits, logits.max(0)))))


class NormalCells(IntervalCells):
    """Normal laws on a uniform grid: symbol i stands for z = i · spacing, |i| ≤ n, the outer cells taking the tails.

    Args:
        mean, log_scale: float32 or float64, in units of z.
        spacing: of the grid, > 0.
        bound: the grid reaches over ± bound.

    >>> stack = Stack()
    >>> cells = NormalCells(np.float32([0.3, -1.0]), np.float32([0.0, -2.0]), 2.0**-8, 8.0)
    >>> cells.push(stack, [77, -250])
    >>> cells.pop(stack)
    array([  77, -250])
    """

    def __init__(
        self,
        mean: NDArray[Any],
        log_scale: NDArray[Any],
        spacing: float = 2.0**-8,
        bound: float = 16.0,
        present: ArrayLike | None = None,
    ) -> None:
        if not (0 < spacing < bound):
            raise ValueError(f"spacing: expected a positive number below bound = {bound}, got {spacing}")
        n = int(bound / spacing)
        super().__init__(mean.shape, -n, 2 * n + 1, present=present)
        refuse_non_finite("mean", mean)
        refuse_non_finite("log_scale", log_scale)
        self.spacing = spacing
        self._mean = self._select(mean)
        self._log_scale = self._select(np.broadcast_to(log_scale, mean.shape))

    def _law(self, some: Some) -> Cumulative:
        centre = self._mean[some].astype(np.float64)
        centre /= self.spacing
        rate = inverse_scale(self._log_scale[some])
        rate *= self.spacing * normal().steps
        return Scaled(normal(), centre, rate)


#: Range of a numeric column in standard units to both sides, and the least that spares a digit.
_REACH, _LEAST_REACH = 64.0, 16.0


class GridCells(IntervalCells):
    """One numeric column: mixtures of logistics and atoms on an unbounded grid; symbols are round(x / r).

    The laws reach over 64 standard units to both sides (or over as many as 16 bits hold, if that is 16 or more) and over
    all atoms; a symbol beyond follows by its distance.

    Args:
        logits: shape ``(n, K + A)``, weights of the logistics, then of the atoms; −inf switches one off.
        means, log_scales: shape ``(n, K)``, in standard units.
        location, scale: raw value = location + scale · standard value.
        resolution: r > 0.
        atoms: raw values, shape ``(A,)``.
    """

    def __init__(
        self,
        logits: NDArray[Any],
        means: NDArray[Any],
        log_scales: NDArray[Any],
        location: float,
        scale: float,
        resolution: float,
        atoms: NDArray[Any],
        present: ArrayLike | None = None,
    ) -> None:
        components = means.shape[1]
        spikes = np.rint(np.asarray(atoms, np.float64) / resolution)
        used = np.flatnonzero((logits[:, components:] > -np.inf).any(0)) if len(logits) else np.zeros(0, np.int64)
        order = used[np.argsort(spikes[used], kind="stable")]
        self._centre, self._unit = location / resolution, scale / resolution
        low, cells = grid_range(self._centre, self._unit, spikes[order])
        super().__init__(means.shape[:1], low, cells, True, present)
        refuse_non_finite("logits", logits, lowest_may_be_infinite=True)
        refuse_non_finite("means", means)
        refuse_non_finite("log_scales", log_scales)
        picked = [*range(components), *(components + order)]
        self._atoms = spikes[order] if len(order) else None
        self._logits = self._select(logits, 1)[:, picked]
        self._means, self._log_scales = self._select(means, 1), self._select(log_scales, 1)

    def _law(self, some: Some) -> Cumulative:
        parts = standard_logistics(self._means[some], self._log_scales[some], self._centre, self._unit)
        logits = np.ascontiguousarray(self._logits[some].T)
        portions = shares(list(weights(logits, logits.max(0))))
        if self._atoms is None:
            return Mixture(parts, portions)
        spikes = np.zeros((len(self._atoms) + 1, logits.shape[1]))
        for a, portion in enumerate(portions[len(parts) :]):
            np.add(spikes[a], portion, out=spikes[a + 1])
        return Mixture(parts, portions[: len(parts)], self._atoms, spikes)


#: A logistic narrower than exp(−2.5) half cells is as good as an atom.
_MOST_RATE = 2.0 * float(exp(np.array(-LEAST_LOG_SCALE)))


def standard_logistics(means: NDArray[Any], log_scales: NDArray[Any], centre: float, unit: float) -> list[Scaled]:
    """Logistics of a column, shape ``(n, K)`` in standard units, where symbol = centre + unit · standard value."""
    centres = means.T.astype(np.float64, order="C")
    centres *= unit
    centres += centre
    rates = inverse_scale(np.ascontiguousarray(log_scales.T))
    rates /= unit
    np.minimum(rates, _MOST_RATE, out=rates)
    rates *= logistic().steps
    return [Scaled(logistic(), c, r) for c, r in zip(centres, rates)]


def grid_range(centre: float, unit: float, atoms: Floats) -> tuple[int, int]:
    """First symbol and number of the cells that a column's laws cover.

    >>> grid_range(38.5, 13.6, np.array([0.0, 99.0]))
    (-832, 1742)
    """
    fits = ((1 << _DIGIT) - 4) / (2.0 * unit)
    reach = min(_REACH * unit, 2.0**46) if not _LEAST_REACH <= fits < _REACH else fits * unit
    centre = min(max(centre, -(2.0**50)), 2.0**50)
    low, high = np.floor(centre - reach), np.ceil(centre + reach)
    if len(atoms):
        low, high = min(low, atoms[0] - 1.0), max(high, atoms[-1] + 1.0)
    return int(low), int(high - low) + 1
