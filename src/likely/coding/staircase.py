"""Laws that all rows share, as tables: whole numbers under distributions that are constant on *runs* of them.

The law of a column is a staircase: run i covers the numbers ``first[i] … first[i + 1] − 1``; it is coded by an integer
frequency of 2^28, and the place within it, all places being equally likely, after it.  Codes have runs of one number
each.  Numbers on a grid, counts and floats have runs of one number where the law is narrow or has an atom, and runs of
up to a sixteenth of a standard deviation elsewhere, which costs (1/16)²/24 = 1.6e-4 nats a cell at most.  Runs reach as
far as numbers do, so that every one of them can be coded.

A column has K such laws on the same runs: one for each component of a mixture, or one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray

from likely.coding.categories import edges_of
from likely.coding.cells import Cells, Floats, Integers, Interval, Mask, Step, Unsigned, share_pop, share_steps
from likely.coding.continuum import from_ordered, ordered
from likely.coding.stack import Stack
from likely.coding.tables import Law, logistic, normal
from likely.exact.functions import exp, log, log1p, sqrt

_PRECISION = 28
_TOTAL = 1 << _PRECISION
_SHIFT = np.int64(_PRECISION)
_BELOW = np.int64(_TOTAL - 1)
#: Grid of log-masses, from which responsibilities are made.
_LOG_STEPS = 1 << 12
#: Numbers lie within ± 2^61.
_FARTHEST = 61
#: Runs of a unit that a law of its own deviation gets, and how many points all laws of a column may ask for.
_RESOLUTION, _MOST_POINTS = 16, 1 << 15
_ENDS = 1e300


@dataclass(frozen=True)
class Staircase:
    """The laws of one column.

    Args:
        first: first number of every run, and the end of the last: strictly ascending, shape ``(m + 1,)``.
        edges: starts of the runs in 2^28, and 2^28: strictly ascending from 0, shape ``(K, m + 1)``.
        shift: numbers stand for symbols without so many low bits, which are zeros of a float (see :func:`numbers`).
    """

    first: Integers
    edges: Integers
    shift: int = 0


class Staircases:
    """The laws of all columns, with K components each.

    >>> laws = Staircases([codes(np.log([[0.25, 0.75]])), codes(np.log([[0.5, 0.25, 0.25]]))])
    >>> cells = laws.cells(2)
    >>> stack = Stack()
    >>> cells.push(stack, [[0, 2], [1, 0]])
    >>> cells.lengths([[0, 2], [1, 0]]).round(3).tolist()
    [[2.0, 2.0], [0.415, 1.0]]
    >>> cells.pop(stack)
    array([[0, 2],
           [1, 0]])
    """

    def __init__(self, columns: Sequence[Staircase]) -> None:
        self.components = len(columns[0].edges)
        self.columns = len(columns)
        self.runs = np.array([column.edges.shape[1] - 1 for column in columns])
        self.size = self.runs + 1
        self.shift = np.array([column.shift for column in columns])
        self.low = np.array([column.first[0] for column in columns])
        self.stop = np.array([column.first[-1] for column in columns])
        #: Whether the runs of a column are its symbols.
        self.direct = np.array([c.shift == 0 and _counts_from_zero(c.first) for c in columns])
        self._firsts = [column.first for column in columns]
        self.first = np.concatenate([np.zeros(0, np.int64) if self.direct.all() else c.first for c in columns])
        self.first_at = np.cumsum(self.size) - self.size
        #: Edges of law number g = column · K + component, raised by g · 2^28: ascending over all laws.
        self.keys: Integers = np.concatenate(
            [
                (c.edges + (np.arange(self.components)[:, None] + d * self.components << _SHIFT)).ravel()
                for d, c in enumerate(columns)
            ]
        )
        self.key_at = np.cumsum(self.size * self.components) - self.size * self.components

    def cells(self, n: int, component: Integers | None = None, present: Mask | None = None) -> StaircaseCells:
        """The codec of ``n`` rows, shape ``(n, columns)``.

        Args:
            component: which of the laws, for each row; None where there is one.
            present: which cells are there, shape ``(n, columns)``.
        """
        return StaircaseCells(self, n, component, present)

    def log_joint(self, symbols: Integers, present: Mask | None = None) -> Floats:
        """log p(row | component) but for a constant, nats, shape ``(n, K)``: the same on every machine."""
        place = self.run_of(self.numbers_of(symbols)) + (np.cumsum(self.runs) - self.runs)
        weight = None
        if present is not None:
            weight = torch.from_numpy(present).to(self._log_masses.dtype)
        # Sums of whole numbers that are exact in any order.
        sums = F.embedding_bag(torch.from_numpy(place), self._log_masses, mode="sum", per_sample_weights=weight)
        return sums.double().numpy() * (1.0 / _LOG_STEPS)

    @functools.cached_property
    def _log_masses(self) -> torch.Tensor:
        """log(frequency / 2^28) in whole steps, shape ``(runs of all columns, K)``."""
        pieces = []
        for at, size in zip(self.key_at, self.size):
            edges = self.keys[at : at + size * self.components].reshape(self.components, size)
            pieces.append(np.diff(edges, axis=1).T)
        value = np.rint((log(np.concatenate(pieces).astype(np.float64)) - log(np.array(float(_TOTAL)))) * _LOG_STEPS)
        fits = float(np.abs(value).max()) * self.columns < 1 << 24
        return torch.from_numpy(value).to(torch.float32 if fits else torch.float64)

    def numbers_of(self, symbols: Integers) -> Integers:
        """Numbers of the symbols, shape ``(n, columns)``."""
        return symbols >> self.shift if self.shift.any() else symbols

    def run_of(self, numbers: Integers) -> Integers:
        """The run that each number is in, shape ``(n, columns)``; the nearest for numbers out of all."""
        if self.direct.all():
            return numbers
        runs = np.empty_like(numbers)
        for d, (first, direct) in enumerate(zip(self._firsts, self.direct)):
            if direct:
                runs[:, d] = numbers[:, d]
            else:
                runs[:, d] = np.clip(np.searchsorted(first, numbers[:, d], "right") - 1, 0, self.runs[d] - 1)
        return runs


class StaircaseCells(Cells):
    """Rows of symbols under :class:`Staircases`, shape ``(n, columns)``."""

    def __init__(self, laws: Staircases, n: int, component: Integers | None, present: ArrayLike | None) -> None:
        super().__init__((n, laws.columns), present)
        self._laws = laws
        law = np.arange(laws.columns) * laws.components
        key_at: Integers = np.broadcast_to(laws.key_at, self.shape)
        if component is not None:
            key_at = key_at + component[:, None] * laws.size
            law = law + component[:, None]
        self._base = self._select(np.ascontiguousarray(key_at))
        self._law = self._select(np.broadcast_to(law, self.shape).astype(np.int64)) << _SHIFT
        self._uniform = laws.direct.all()
        columns = np.broadcast_to(np.arange(laws.columns), self.shape)
        self._column = None if self._uniform else self._select(np.ascontiguousarray(columns))

    def _steps(self, symbols: Integers) -> Iterable[Step]:
        keys = self._laws.keys
        numbers = symbols if self._column is None else symbols >> self._laws.shift[self._column]
        run = self._runs(numbers)
        place = self._base + run
        start = keys.take(place)
        freq = keys.take(place + 1) - start
        yield Interval((start & _BELOW).view(np.uint64), freq.view(np.uint64), _PRECISION)
        if self._column is not None:
            first, size = self._extent(run)
            wide = np.flatnonzero(size > 1)
            yield from share_steps(numbers[wide] - first[wide], size[wide], wide)

    def _runs(self, numbers: Integers) -> Integers:
        if self.kept is None:
            return self._laws.run_of(numbers.reshape(self.shape)).reshape(-1)
        everywhere = np.zeros(self.shape, np.int64)
        everywhere.reshape(-1)[self.kept] = numbers
        return self._laws.run_of(everywhere).reshape(-1)[self.kept]

    def _extent(self, run: Integers) -> tuple[Integers, Integers]:
        """First number and size of the runs."""
        place = self._laws.first_at[self._column] + run
        first = self._laws.first.take(place)
        return first, self._laws.first.take(place + 1) - first

    def _pop(self, stack: Stack) -> Integers:
        keys = self._laws.keys

        def find(part: slice, residues: Unsigned) -> tuple[Integers, Integers, Integers]:
            place = np.searchsorted(keys, residues.view(np.int64) + self._law[part], "right") - 1
            start = keys.take(place)
            return place - self._base[part], start & _BELOW, keys.take(place + 1) - start

        run = stack.pop(self.count, _PRECISION, find)
        if self._column is None:
            return run
        number, size = self._extent(run)
        wide = np.flatnonzero(size > 1)
        number[wide] += share_pop(stack, size[wide])
        return lengthened(number, self._laws.shift[self._column])

    def _legal(self, symbols: Integers) -> Mask:
        if self._column is None:
            levels = self._select(np.broadcast_to(self._laws.stop, self.shape))
            return (symbols >= 0) & (symbols < levels)
        shift = self._laws.shift[self._column]
        number = symbols >> shift
        inside = (number >= self._laws.low[self._column]) & (number < self._laws.stop[self._column])
        return inside & (lengthened(number, shift) == symbols)

    def _domain(self) -> str:
        return "a symbol that the column's law reaches"


def lengthened(numbers: Integers, shift: Integers | np.int64) -> Integers:
    """The symbols of the numbers: ranks of floats whose lowest ``shift`` bits are 0 (−0.0 has rank −1)."""
    return np.where(numbers < 0, (numbers + 1 << shift) - 1, numbers << shift)


def _counts_from_zero(first: Integers) -> bool:
    return bool(first[0] == 0 and first[-1] == len(first) - 1)


# --------------------------------------------------------------------------------------------------------------
# The laws of columns
# --------------------------------------------------------------------------------------------------------------


def codes(log_p: Floats) -> Staircase:
    """Codes 0 … n − 1 with these log-probabilities, shape ``(K, n)``; −inf gives the frequency 1."""
    units = np.rint(exp(log_p - log_p.max(-1, keepdims=True)) * float(1 << 40)).astype(np.int64)
    return Staircase(np.arange(log_p.shape[-1] + 1), edges_of(units, _PRECISION))


@dataclass(frozen=True)
class Part:
    """C location-scale laws of one family in each of K components: shapes ``(K, C)``, in units of the values.

    Args:
        weight: their shares of the component's mass.
    """

    weight: Floats
    centre: Floats
    scale: Floats
    law: Callable[[], Law] = normal


@dataclass(frozen=True)
class Line:
    """Where the numbers of a column live.

    Args:
        spacing: of the grid of the values, which the symbols count; 0 for floats, which the symbols rank.
        most: the grid's symbols end at ± ``most``, the outer ones taking the tails; None for ± 2^61.
        spare_bits: so many zeros end the bits of every float.
    """

    spacing: float = 0.0
    most: int | None = None
    spare_bits: int = 0


class Lattice:
    """Where the numbers of all columns of a space live.

    Args:
        spacing, bound: for ``Reals``, the grid i · spacing within ± bound.
        spare_bits: for each numeric column of a table without a grid, in order.
    """

    def __init__(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> None:
        if (spacing is None) != (bound is None):
            raise ValueError(f"spacing, bound: expected both or neither, got {spacing} and {bound}")
        self._reals = None if spacing is None or bound is None else Line(spacing, int(bound / spacing))
        self._spare = iter(spare_bits or ())

    def column(self, resolution: float) -> Line:
        """The line of the next numeric column, in order."""
        if self._reals is not None:
            return self._reals
        return Line(resolution) if resolution > 0 else Line(spare_bits=next(self._spare, 0))


def numbers(parts: Sequence[Part], line: Line, atoms: tuple[Integers, Floats] | None = None) -> Staircase:
    """Numbers under mixtures of location-scale laws, and of atoms.

    Args:
        parts: the laws; all shares and those of the atoms sum to about 1.
        line: where the numbers live.
        atoms: symbols with a share of their own, ascending, shape ``(A,)``, and the shares, ``(K, A)``.
    """
    spacing = line.spacing
    if spacing > 0:
        parts = [Part(p.weight, p.centre / spacing, p.scale / spacing, p.law) for p in parts]
        first = _grid_runs(parts, atoms, line.most)
        position = first - 0.5
    else:
        first = _float_runs(parts, line.spare_bits)
        position = np.append(from_ordered(first[:-1] << line.spare_bits), _ENDS)
    position[0], position[-1] = -_ENDS, _ENDS
    cumulative = np.zeros((len(parts[0].weight), len(first)))
    for part in parts:
        law = part.law()
        rate = np.full_like(part.scale, law.steps) / part.scale
        for c in range(part.weight.shape[1]):
            u = (position - part.centre[:, c, None]) * rate[:, c, None] + law.centre
            cumulative += law.cdf(u) * part.weight[:, c, None]
    _add_atoms(cumulative, first, atoms)
    return Staircase(first, _edges(cumulative), line.spare_bits)


def _add_atoms(cumulative: Floats, first: Integers, atoms: tuple[Integers, Floats] | None) -> None:
    if atoms is not None:
        units = np.zeros((len(cumulative), len(atoms[0]) + 1), np.int64)
        np.cumsum(np.rint(atoms[1] * 2.0**50).astype(np.int64), axis=1, out=units[:, 1:])
        cumulative += units[:, np.searchsorted(atoms[0], first)] * 2.0**-50


@dataclass(frozen=True)
class CountLaws:
    """A negative binomial (or, without dispersion, Poisson) law for each of K components, logarithms of shape ``(K,)``.

    Args:
        log_weight: of its share of the component's mass.
    """

    log_mean: Floats
    log_dispersion: Floats | None
    log_weight: Floats

    def log_mass(self, x: Floats) -> Floats:
        """log of share · p(x), nats, shape ``(m,)`` to ``(K, m)``."""
        log_mean = self.log_mean[:, None]
        mean, nats = exp(log_mean), self.log_weight[:, None] - _log_gamma(x + 1.0)
        if self.log_dispersion is None:
            return nats + x * log_mean - mean
        r = exp(self.log_dispersion[:, None])
        return nats + (_log_gamma(x + r) - _log_gamma(r)) - r * log1p(mean / r) - x * log1p(r / mean)

    def moments(self) -> tuple[Floats, Floats]:
        """Mean and deviation."""
        mean = exp(self.log_mean)
        excess = 0.0 * mean if self.log_dispersion is None else mean * mean / exp(self.log_dispersion)
        return mean, sqrt(mean + excess)


def counts(laws: Sequence[CountLaws], stored: tuple[Integers, Floats] | None = None) -> Staircase:
    """Counts under mixtures of laws, and stored ones with a mass of their own beside these.

    Args:
        stored: counts, ascending, shape ``(A,)``, and their masses, ``(K, A)``.
    """
    first = _count_runs(laws, np.zeros(0, np.int64) if stored is None else stored[0])
    size = np.diff(first)
    left: Floats = first[:-1].astype(np.float64)
    right: Floats = (first[1:] - 1).astype(np.float64)
    wide = np.flatnonzero(size > 1)
    middle: Floats = np.floor(0.5 * (left[wide] + right[wide]))
    mass = np.zeros((len(laws[0].log_mean), len(size)))
    for law in laws:
        at_left = exp(law.log_mass(left))
        if len(wide):  # Simpson's rule
            inner = exp(law.log_mass(middle)) * 4.0 + at_left[:, wide] + exp(law.log_mass(right[wide]))
            at_left[:, wide] = inner * (size[wide] / 6.0)
        mass += at_left
    cumulative = np.zeros((len(mass), len(first)))
    for i in range(mass.shape[1]):
        np.add(cumulative[:, i], mass[:, i], out=cumulative[:, i + 1])
    _add_atoms(cumulative, first, stored)
    return Staircase(first, _edges(cumulative))


def _edges(cumulative: Floats) -> Integers:
    """Starts in 2^28 from cumulative masses, shape ``(K, m + 1)``, each at least 1."""
    runs = cumulative.shape[1] - 1
    share = cumulative / cumulative[:, -1:]
    return np.floor(share * float(_TOTAL - runs)).astype(np.int64) + np.arange(runs + 1)


def _steps_of(parts: Sequence[Part]) -> Floats:
    """Positions where runs may begin: even steps of each law, as fine as the number of laws allows."""
    used = [(p, p.weight > 0) for p in parts]
    laws = max(1, sum(int(mask.sum()) for _, mask in used))
    resolution = _RESOLUTION
    while resolution > 4 and laws * 20 * resolution > _MOST_POINTS:
        resolution //= 2
    points = [np.zeros(0)]
    for part, mask in used:
        if part.law is logistic:
            near, far = np.arange(-16 * resolution, 16 * resolution + 1) / resolution, np.arange(65, 257) / 4.0
            units = np.concatenate([-far, near, far])
        else:
            units = np.arange(-9 * resolution, 9 * resolution + 1) / resolution
        points.append((part.centre[mask][:, None] + part.scale[mask][:, None] * units).ravel())
    return np.concatenate(points)


def _grid_runs(parts: Sequence[Part], atoms: tuple[Integers, Floats] | None, most: int | None) -> Integers:
    reach = float(1 << _FARTHEST) if most is None else float(most)
    places = np.rint(np.clip(_steps_of(parts), -reach, reach)).astype(np.int64)
    octaves = np.int64(1) << np.arange(_FARTHEST + 1)
    ends = (-(1 << _FARTHEST), (1 << _FARTHEST) + 1) if most is None else (-most, most + 1)
    spikes = np.zeros(0, np.int64) if atoms is None else atoms[0]
    points = np.concatenate([places, -octaves, octaves, spikes, spikes + 1, ends])
    return np.unique(points[(points >= ends[0]) & (points <= ends[1])])


def _float_runs(parts: Sequence[Part], spare_bits: int) -> Integers:
    """Runs within an octave, whose floats are evenly spaced, where the laws are; of many octaves elsewhere."""
    values = _steps_of(parts)
    scales = np.concatenate([p.scale[p.weight > 0] for p in parts])
    lowest = int(np.frexp(scales.min())[1]) - 30
    highest = int(np.frexp(np.abs(values).max() + 1e-300)[1]) + 2
    fine = np.arange(max(lowest, -1022), min(highest, 1023) + 1)
    octaves = np.ldexp(1.0, np.unique(np.concatenate([fine, np.arange(-1022, 1024, 64)])))
    largest = np.finfo(np.float64).max
    values = np.clip(np.concatenate([values, octaves, -octaves]), -largest, largest)
    end = int(ordered([largest])[0]) >> spare_bits
    points = np.concatenate([ordered(values) >> np.int64(spare_bits), [-1, 0, 1, -end - 1, end + 1]])
    return np.unique(points)


def _count_runs(laws: Sequence[CountLaws], stored: Integers) -> Integers:
    """Runs of one count up to 63, of 1/32 of the count or less beyond, and finer around a large mean."""
    mean, deviation = (np.concatenate(values) for values in zip(*(law.moments() for law in laws)))
    decay = np.maximum(deviation * deviation / np.maximum(mean, 1e-300), 1.0)  # counts in which a tail falls by e
    farthest = 1 << _FARTHEST
    highest = min(float((mean + 12.0 * deviation + 30.0 * decay).max()), float(farthest))
    octaves = np.int64(1) << np.arange(_FARTHEST + 1)
    pieces = ((32 + np.arange(32)) << np.arange(1, _FARTHEST - 5)[:, None]).ravel()
    points = [np.arange(min(64, int(highest) + 2)), octaves, pieces[pieces <= highest], stored, stored + 1]
    large = mean > 32.0
    resolution = _RESOLUTION
    while resolution > 4 and int(large.sum()) * 20 * resolution > _MOST_POINTS:
        resolution //= 2
    units = np.arange(-10 * resolution, 10 * resolution + 1) / resolution
    near = mean[large][:, None] + deviation[large][:, None] * units
    points.append(np.rint(np.clip(near, 0.0, float(farthest))).astype(np.int64).ravel())
    return np.unique(np.concatenate([*points, [0, farthest + 1]]))


def _log_gamma(z: Floats) -> Floats:
    """log Γ(z) for z > 0: Stirling's series, from z + 8 where z < 8."""
    small = z < 8.0
    y = np.where(small, z + 8.0, z)
    inverse = np.full_like(y, 1.0) / y
    square = inverse * inverse
    series = 1.0 / 12.0 - square * (1.0 / 360.0 - square * (1.0 / 1260.0 - square * (1.0 / 1680.0)))
    value = (y - 0.5) * log(y) - y + _HALF_LOG_2PI + inverse * series
    product = np.where(small, z, 1.0)
    for step in range(1, 8):
        product = product * np.where(small, z + step, 1.0)
    return np.where(small, value - log(product), value)


_HALF_LOG_2PI = 0.9189385332046727


def shares_of(logits: Floats) -> Floats:
    """Shares exp(l) / Σ exp(l) along the last axis, the same on every machine.

    >>> shares_of(np.log([[1.0, 3.0], [2.0, 2.0]])).round(6).tolist()
    [[0.25, 0.75], [0.5, 0.5]]
    """
    units = np.rint(exp(logits - logits.max(-1, keepdims=True)) * 2.0**40)  # whole numbers: any order of summation
    return units / units.sum(-1, keepdims=True)


def parameters(tensor: torch.Tensor) -> NDArray[Any]:
    """A parameter as float64, which is what laws are made of."""
    return tensor.detach().double().cpu().numpy()
