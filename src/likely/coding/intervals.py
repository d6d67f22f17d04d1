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
    MOST_PRECISION,
    Ahead,
    Cells,
    Floats,
    Integers,
    Mask,
    Placed,
    Some,
    Step,
    Unsigned,
    elias_pop,
    elias_steps,
    precision_for,
)
from likely.coding.stack import Stack
from likely.coding.tables import Law, inverse_scale, logistic, normal, refuse_non_finite, shares, weights
from likely.distributions.logistic import LEAST_LOG_SCALE
from likely.exact.functions import exp

#: Largest digit of a number in bits.
_DIGIT = 16
#: Starts that are computed at once for a few cells rather than searched for.
_AT_ONCE = 1 << 12
#: Positions of the outer edges, and the farthest that the centre of a law may be.
_ENDS, _FAR = 1e200, 1e150


class Cumulative(Protocol):
    """The cumulative distributions of some cells."""

    def cdf(self, position: Floats) -> Floats:
        """F at one or more positions of each cell, shape ``(…, cells)``: 0 at or below −10^200, 1 at or above 10^200,
        monotone between them."""
        ...

    def __getitem__(self, some: Some) -> Cumulative:
        """The distributions of some of the cells."""
        ...

    def guess(self, probability: Floats, beyond: Floats, origin: Floats | float, floor: Floats | float) -> Floats:
        """Distance x from ``origin`` where F + ``floor`` · x is about so large, given that no atom lies between it and
        ``beyond``.

        A hint, which may differ from machine to machine.
        """
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
        #: Cells with an atom, ascending: where F may jump.  A hint for the search.
        self.steps_at: Integers = np.zeros(0, np.int64)
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

    def cdf(self, edges: Integers) -> Floats:
        """F of every cell at its edges 0 … n, shape ``(…, cells)``."""
        return self._cdf(self._law(slice(0, self.count)), edges)

    def _cdf(self, law: Cumulative, edges: Integers) -> Floats:
        """F at the edges 0 … n."""
        return law.cdf(self._computed(edges) if self._positions is None else self._positions.take(edges))

    # -------------------------------------------------------------------------------------------------------- push

    def _steps(self, symbols: Integers) -> Iterable[Step]:
        inside = symbols - self.low
        if self.escapes:
            inside = np.clip(inside, 0, self.cells - 1)
        for depth, digit in enumerate(self._digits):
            yield Placed(self.count, digit.precision, functools.partial(self._place, inside, depth))
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
        return _Frame(self.owner, self.law[some], self.digit, *picked)  # type: ignore[arg-type]

    def start(self, digits: Integers) -> Unsigned:
        """Where digits start, 0 … size inclusive: one or more of each cell, shape ``(…, cells)``."""
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

    def find(self, residues: Unsigned) -> tuple[Integers, Integers, Integers]:
        """The digits in whose interval the residues lie, with start and freq."""
        r = residues.view(np.int64)
        whole = 1 << self.digit.precision
        if self.first is not None or not len(self.owner.steps_at):
            return self._find_between(r, 0, self.digit.size if self.sizes is None else self.sizes, 0, whole)
        low, below = np.zeros(len(r), np.int64), np.zeros(len(r), np.int64)
        high, above = np.full(len(r), self.digit.size), np.full(len(r), whole)
        self._between_atoms(r, low, high, below, above)
        rest = (high - low > 1).nonzero()[0]
        if len(rest):
            found = self[rest]._find_between(r[rest], low[rest], high[rest], below[rest], above[rest])
            low[rest], below[rest], freq = found
            above[rest] = below[rest] + freq
        return low, below, above - below

    def _between_atoms(self, r: Integers, low: Integers, high: Integers, below: Integers, above: Integers) -> None:
        """Narrow brackets to a digit with an atom, or to the digits between two of them."""
        atoms = self.owner.steps_at >> self.digit.shift
        passed = np.zeros(len(r), np.int64)
        for step in reversed(range(len(atoms).bit_length())):
            try_ = passed + (1 << step)
            g = atoms.take(np.minimum(try_, len(atoms)) - 1)
            s = self.start(g).view(np.int64)
            over = s > r
            passed = np.where(over | (try_ > len(atoms)), passed, try_)
            self._narrow(g, s, over, low, high, below, above)
        g = np.where(passed > 0, low + 1, high)  # the end of the atom's own digit
        s = self.start(g).view(np.int64)
        self._narrow(g, s, s > r, low, high, below, above)

    @staticmethod
    def _narrow(
        g: Integers, s: Integers, over: Mask, low: Integers, high: Integers, below: Integers, above: Integers
    ) -> None:
        """Use that digit g starts at s in brackets that hold g, ends included."""
        under = ~over
        np.copyto(high, g, where=over)
        np.copyto(above, s, where=over)
        np.copyto(low, g, where=under)
        np.copyto(below, s, where=under)

    def _find_between(
        self, r: Integers, low: Integers | int, high: Integers | int, below: Integers | int, above: Integers | int
    ) -> tuple[Integers, Integers, Integers]:
        """As :meth:`find`, for digits in [low, high), the starts of which are known."""
        digit = self._guess(r, low, high)
        both = np.empty((2, len(r)), np.int64)
        both[0] = digit
        np.add(digit, 1, both[1])
        start, stop = self.start(both).view(np.int64)
        freq = stop - start
        offset = r - start
        missed = (offset.view(np.uint64) >= freq.view(np.uint64)).nonzero()[0]
        if len(missed):
            if self.first is None and len(missed) * self.digit.size <= _AT_ONCE:
                digit[missed], start[missed], freq[missed] = self[missed]._find_among_all(r[missed])
                return digit, start, freq
            offset, size = offset[missed], freq[missed]
            under, g, s = offset < 0, digit[missed], start[missed]
            bracket = [a if isinstance(a, int) else a[missed] for a in (low, below, high, above)]
            lows, belows = np.where(under, bracket[0], g + 1), np.where(under, bracket[1], s + size)
            highs, aboves = np.where(under, g, bracket[2]), np.where(under, s, bracket[3])
            g = g + np.floor(offset / size).astype(np.int64)  # Newton's step
            found = self[missed]._search(r[missed], g, lows, highs, belows, aboves)
            digit[missed], start[missed], freq[missed] = found
        return digit, start, freq

    def _find_among_all(self, r: Integers) -> tuple[Integers, Integers, Integers]:
        """As :meth:`find`, by the starts of all digits."""
        starts = self.start(np.broadcast_to(np.arange(self.digit.size + 1)[:, None], (self.digit.size + 1, len(r))))
        starts = starts.view(np.int64)
        digit = (starts[1:] <= r).sum(0)
        cell = np.arange(len(r))
        start = starts[digit, cell]
        return digit, start, starts[digit + 1, cell] - start

    def _search(
        self, r: Integers, g: Integers, low: Integers, high: Integers, below: Integers, above: Integers
    ) -> tuple[Integers, Integers, Integers]:
        """Narrow brackets [low, high), of known starts, down to one digit: at ``g`` first, then by false position,
        the same from the other side, and bisection in turn; at most about 3 log2(size) turns."""
        frame, left, found = self, None, (low, below, above)
        for turn in range(3 * self.digit.size.bit_length() + 6):
            np.minimum(g, high - 1, out=g)
            np.maximum(g, low + 1, out=g)  # a bracket of one digit is probed at its upper end, which changes nothing
            s = frame.start(g).view(np.int64)
            over = s > r
            self._narrow(g, s, over, low, high, below, above)
            width = high - low
            rest = (width > 1).nonzero()[0]
            if len(rest) < 0.7 * len(r):
                if left is not None:
                    for whole, part in zip(found, (low, below, above)):
                        whole[left] = part
                if not len(rest):
                    break
                left = rest if left is None else left[rest]
                frame, r, width = frame[rest], r[rest], width[rest]
                low, high, below, above = low[rest], high[rest], below[rest], above[rest]
            if turn % 3 == 2:
                g = (low + high) >> 1
            else:
                g = ((r - below) / (above - below) * width).astype(np.int64)
                g += low
                if turn % 3 == 1:
                    g += 1
        low, below, above = found
        return low, below, above - below

    def _guess(self, r: Integers, low: Integers | int, high: Integers | int) -> Integers:
        share = (1.0 if self.mass is None else self.mass) / self.room
        probability: Floats = np.multiply(r, share, dtype=np.float64)
        if self.below is not None:
            probability += self.below
        first = self.owner.low - 0.5
        position = low << self.digit.shift if self.digit.shift else low
        offset: Any = first if self.first is None else self.first + first
        unit = 2.0**-self.digit.shift
        guess = self.law.guess(probability, position + offset, offset, share * unit)
        guess *= unit
        atoms = self.owner.steps_at
        if self.first is not None and len(atoms):  # the first atom of the block is the best guess
            within = atoms.take(np.searchsorted(atoms, self.first), mode="clip") - self.first >> self.digit.shift
            guess = np.where((within >= low) & (within < high), within, guess)
        with np.errstate(invalid="ignore"):
            digit = guess.astype(np.int64)  # of NaN, some number
        np.maximum(digit, low, out=digit)
        np.minimum(digit, high - 1, out=digit)
        return digit


# --------------------------------------------------------------------------------------------------------------- laws


class Family:
    """Location-scale laws of one family, K a cell: F_k(x) = law((x − centre_k) · rate_k / steps).

    Args:
        law: the family.
        centre: in symbols, shape ``(K, cells)``.
        rate: steps of the law's table per symbol, > 0, shape ``(K, cells)``.
        portion: share of each, shape ``(K, cells)``; None where there is one, with share 1.
    """

    def __init__(self, law: Law, centre: Floats, rate: Floats, portion: Floats | None = None) -> None:
        self.law, self.centre, self.rate, self.portion = law, centre, rate, portion

    def cdf(self, position: Floats) -> Floats:
        """Σ_k share_k F_k, summed in the order of k."""
        u = position[..., None, :] - self.centre
        u *= self.rate
        u += self.law.centre
        u = self.law.cdf(u)
        if self.portion is not None:
            u *= self.portion
        total = u[..., 0, :]
        for k in range(1, len(self.centre)):
            total += u[..., k, :]
        return total

    def __getitem__(self, some: Some) -> Family:
        portion = None if self.portion is None else self.portion[:, some]
        return Family(self.law, self.centre[:, some], self.rate[:, some], portion)


class Mixture:
    """Σ_k share_k F_k(x) + Σ_a share_a [atom a < x].

    Args:
        families: the laws of the cells; all shares and those of the atoms sum to 1 exactly.
        atoms: symbols with a share of their own, ascending: shape ``(A,)``.
        spikes: cumulative shares of the atoms, from 0: shape ``(A + 1, columns)``.
        column: which column of ``spikes`` is a cell's; None for its own.
    """

    def __init__(
        self,
        families: Sequence[Family],
        atoms: Floats | None = None,
        spikes: Floats | None = None,
        column: Integers | None = None,
    ) -> None:
        self.families, self.atoms, self.spikes = families, atoms, spikes
        self.column = np.arange(spikes.shape[1]) if column is None and spikes is not None else column

    def cdf(self, position: Floats) -> Floats:
        total = self.families[0].cdf(position)
        for family in self.families[1:]:
            total += family.cdf(position)
        if self.atoms is not None and self.spikes is not None:
            total += self.spikes[np.searchsorted(self.atoms, position), self.column]
        return total

    def __getitem__(self, some: Some) -> Mixture:
        column = None if self.column is None else self.column[some]
        return Mixture([family[some] for family in self.families], self.atoms, self.spikes, column)

    def guess(self, probability: Floats, beyond: Floats, origin: Floats | float, floor: Floats | float) -> Floats:
        first = self.families[0]
        if first.portion is None and first.law is not logistic():
            return first.law.guess(probability) * first.law.steps / first.rate[0] + (first.centre[0] - origin)
        if self.atoms is not None and self.spikes is not None:
            probability = probability - self.spikes[np.searchsorted(self.atoms, beyond), self.column]
        return self._quantile(probability, origin, floor)

    def _quantile(self, probability: Floats, origin: Floats | float, floor: Floats | float) -> Floats:
        """A root of logit (F(x) + floor · x) = logit p, by Newton's method in float32 from the mean of the quantiles.

        Normals are taken for logistics of the same deviation.
        """
        with np.errstate(all="ignore"):
            centre = np.concatenate([family.centre - origin for family in self.families]).astype(np.float32)
            narrow = [family.rate * (family.law.narrowness / family.law.steps) for family in self.families]
            slope = np.concatenate(narrow).astype(np.float32)
            portions = [np.ones_like(f.rate) if f.portion is None else f.portion for f in self.families]
            portion = np.concatenate(portions).astype(np.float32)
            every = np.maximum(portion.sum(0), np.float32(1e-9))
            portion /= every
            floor = np.asarray(floor / every, np.float32)
            p = (probability / every).astype(np.float32)
            np.maximum(p, np.float32(1e-12), out=p)
            np.minimum(p, np.float32(1.0 - 2.0**-23), out=p)
            one = np.float32(1.0)
            target = np.log(p / (one - p))
            x = (portion * (centre + target / slope)).sum(0)
            centre *= slope
            below, density = np.empty_like(centre), np.empty_like(centre)
            for _ in range(_NEWTON):
                np.multiply(x, slope, out=below)
                np.subtract(centre, below, out=below)
                np.exp(below, out=below)
                below += one
                np.divide(one, below, out=below)
                np.subtract(one, below, out=density)
                below *= portion
                density *= below
                density *= slope
                total = below.sum(0)
                total += np.maximum(x, 0) * floor
                above = one - total
                step = np.log(total / above)
                step -= target
                step *= total
                step *= above
                step /= density.sum(0) + floor
                x -= step
            return x.astype(np.float64)


#: Steps of Newton's method for a guess: after three of them one in a thousand pixels is wrong.
_NEWTON = 3


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
        np.clip(means, -_FAR, _FAR, out=means)
        means += 1.0
        means *= self._half
        rates *= logistic().steps / self._half
        portion = None
        if len(means) > 1:
            logits = np.ascontiguousarray(self._logits[some].T)
            portion = shares(weights(logits, logits.max(0)))
        return Mixture([Family(logistic(), means, rates, portion)])


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
        self._digits = _careful_digits(self.cells)
        refuse_non_finite("mean", mean)
        refuse_non_finite("log_scale", log_scale)
        self.spacing = spacing
        self._mean = self._select(mean)
        self._log_scale = self._select(np.broadcast_to(log_scale, mean.shape))

    def _law(self, some: Some) -> Cumulative:
        centre = self._mean[some].astype(np.float64)
        np.clip(centre, -_FAR, _FAR, out=centre)
        centre /= self.spacing
        rate = inverse_scale(self._log_scale[some])
        rate *= self.spacing * normal().steps
        return Mixture([Family(normal(), centre[None], rate[None])])


def _careful_digits(cells: int) -> list[Digit]:
    """Digits for laws that are *popped*, as posteriors are: of about 128 blocks and their cells, at 28 bits.

    With one digit of 8,192 cells every draw had a chance of 8192 / 2²⁸ to be any cell at all, far from the law; in the
    posterior of 40 latent variables that cost 0.6 % of a file.  Here the chance is 64 / 2²⁸ of another block.
    """
    shift = min(7, max(1, (cells - 1).bit_length() - 1))
    return [
        Digit(shift, -(-cells // (1 << shift)), MOST_PRECISION),
        Digit(0, 1 << shift, precision_for(1 << shift)),
    ]


#: Range of a numeric column in standard units to both sides, and the least that spares a digit.
_REACH, _LEAST_REACH = 64.0, 16.0


class GridCells(IntervalCells):
    """One numeric column: mixtures of logistics and atoms on an unbounded grid; symbols are round(x / r).

    The laws reach over 64 standard units to both sides (or over as many as 16 bits hold, if that is 16 or more) and
    over all atoms; a symbol beyond follows by its distance.

    Args:
        logits: shape ``(n, K + A)``, weights of the logistics, then of the atoms; −inf switches one off.
        means, log_scales: shape ``(n, K)``, in standard units.
        location, scale: raw value = location + scale · standard value.
        resolution: r > 0.
        atoms: raw values, shape ``(A,)``.
        recalled, counts: values seen before, ascending, and how often, shape ``(R,)``: a law whose weight is one more
            of the logits; None for none.
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
        recalled: NDArray[Any] | None = None,
        counts: NDArray[Any] | None = None,
    ) -> None:
        components = means.shape[1]
        spikes = np.rint(np.asarray(atoms, np.float64) / resolution)
        self._recall: Floats | None = None
        if recalled is not None and counts is not None:
            if len(recalled):
                self._recall = np.rint(np.asarray(recalled, np.float64) / resolution)
                self._below = np.concatenate([[0.0], np.cumsum(counts) / np.sum(counts)])  # whole numbers: exact sums
            else:
                logits = logits[:, :-1]
        spikes_end = logits.shape[1] - (self._recall is not None)
        of_atoms = logits[:, components:spikes_end]
        used = np.flatnonzero((of_atoms > -np.inf).any(0)) if len(logits) else np.zeros(0, np.int64)
        order = used[np.argsort(spikes[used], kind="stable")]
        self._centre, self._unit = _in_cells(location, scale, resolution)
        jumps = spikes[order] if self._recall is None else np.union1d(spikes[order], self._recall)
        low, cells = grid_range(self._centre, self._unit, jumps)
        super().__init__(means.shape[:1], low, cells, True, present)
        refuse_non_finite("logits", logits, lowest_may_be_infinite=True)
        refuse_non_finite("means", means)
        refuse_non_finite("log_scales", log_scales)
        picked = [*range(components), *(components + order)] + [spikes_end] * (self._recall is not None)
        self._atoms = spikes[order] if len(order) else None
        self.steps_at = jumps.astype(np.int64) - self.low
        self._logits = self._select(logits, 1)[:, picked]
        self._means, self._log_scales = self._select(means, 1), self._select(log_scales, 1)

    def _law(self, some: Some) -> Cumulative:
        logits = np.ascontiguousarray(self._logits[some].T)
        portions = shares(weights(logits, logits.max(0)))
        family = standard_logistics(self._means[some], self._log_scales[some], portions, self._centre, self._unit)
        spikes: Floats | None = None
        if self._atoms is not None:
            spikes = np.zeros((len(self._atoms) + 1, logits.shape[1]))
            for a in range(len(self._atoms)):
                np.add(spikes[a], portions[len(family.centre) + a], out=spikes[a + 1])
        if self._recall is None:
            return Mixture([family], self._atoms, spikes)
        return Recalling([family], self._atoms, spikes, None, (self._recall, self._below, portions[-1]))


class Recalling(Mixture):
    """A mixture with one more part: the empirical law of values seen before.

    Args:
        recall: the values as symbols, ascending, ``(R,)``; the share of the law below each and at the end, from 0 to 1,
            ``(R + 1,)``; the weight of the law in each cell.
    """

    def __init__(
        self,
        families: Sequence[Family],
        atoms: Floats | None,
        spikes: Floats | None,
        column: Integers | None,
        recall: tuple[Floats, Floats, Floats],
    ) -> None:
        super().__init__(families, atoms, spikes, column)
        self.recall = recall

    def cdf(self, position: Floats) -> Floats:
        values, below, weight = self.recall
        total = super().cdf(position)
        total += below[np.searchsorted(values, position)] * weight
        return total

    def __getitem__(self, some: Some) -> Recalling:
        rest = super().__getitem__(some)
        values, below, weight = self.recall
        return Recalling(rest.families, self.atoms, self.spikes, rest.column, (values, below, weight[some]))


def _in_cells(location: float, scale: float, resolution: float) -> tuple[float, float]:
    """Location and scale of a column in cells of its grid."""
    for name, value, fits in (
        ("location", location, abs(location) <= 2.0**52 * resolution),
        ("scale", scale, 2.0**-60 * resolution <= scale <= 2.0**60 * resolution),
    ):
        if not fits:
            raise ValueError(f"{name}: expected a number that suits the resolution {resolution}, got {value}")
    return location / resolution, scale / resolution


#: A logistic narrower than exp(−2.5) half cells is as good as an atom.
_MOST_RATE = 2.0 * float(exp(np.array(-LEAST_LOG_SCALE)))


def standard_logistics(
    means: NDArray[Any], log_scales: NDArray[Any], portions: Floats, centre: float, unit: float
) -> Family:
    """Logistics of a column, shape ``(n, K)`` in standard units, where symbol = centre + unit · standard value."""
    centres = means.T.astype(np.float64, order="C")
    np.clip(centres, -_FAR, _FAR, out=centres)
    centres *= unit
    centres += min(max(centre, -_FAR), _FAR)
    rates = inverse_scale(np.ascontiguousarray(log_scales.T))
    rates /= unit
    np.minimum(rates, _MOST_RATE, out=rates)
    rates *= logistic().steps
    return Family(logistic(), centres, rates, portions[: len(centres)])


def grid_range(centre: float, unit: float, atoms: Floats) -> tuple[int, int]:
    """First symbol and number of the cells that a column's laws cover.

    >>> grid_range(38.5, 13.6, np.array([0.0, 99.0]))
    (-832, 1742)
    """
    fits = ((1 << _DIGIT) - 4) / (2.0 * unit)
    reach = min(_REACH * unit, 2.0**46) if not _LEAST_REACH <= fits < _REACH else fits * unit
    low, high = np.floor(centre - reach), np.ceil(centre + reach)
    if len(atoms):
        low, high = min(low, atoms[0] - 1.0), max(high, atoms[-1] + 1.0)
    return int(low), int(high - low) + 1
