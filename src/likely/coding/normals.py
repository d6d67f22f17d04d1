"""Normal laws of rows of cells: with a diagonal covariance, and jointly by the chain rule.

Everything is made of float64 numbers by operations of their own, in a fixed order, or by exact sums of whole numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike

from likely.coding.cells import CellCodec, Cells, Floats, Integers, Mask, Some, blocks
from likely.coding.continuum import FloatCells, from_ordered, grid_of
from likely.coding.intervals import Cumulative, Family, IntervalCells, Mixture, NormalCells, grid_range
from likely.coding.stack import Stack
from likely.coding.staircase import Line, lengthened
from likely.coding.tables import normal
from likely.exact.functions import exp, log, sqrt


class ExactProduct:
    """Matrix products with fixed coefficients, exact in any order of summation: ``(n, inputs) → (n, outputs)``.

    Coefficients are rounded to a number of two digits, of b bits each, in units of a power of two for each output; b is
    what sums of whole numbers below 2^53 leave room for, given the largest input.

    >>> ExactProduct(np.array([[0.5, -0.1]]), 100)(np.array([[3.0, 100.0]])).round(9).tolist()
    [[-8.5]]

    Args:
        coefficients: shape ``(outputs, inputs)``.
        largest: bound on the size of the inputs, which must be whole numbers.
    """

    def __init__(self, coefficients: Floats, largest: float) -> None:
        inputs = max(1, coefficients.shape[1])
        bits = 52 - math.frexp(inputs * max(1.0, largest))[1]
        if bits < 8:
            raise ValueError(f"coefficients: expected sums of {inputs} numbers up to {largest} to leave 8 bits of 52")
        exponent = np.frexp(np.abs(coefficients).max(1, initial=0.0))[1]
        scaled = np.ldexp(coefficients, (bits - exponent)[:, None])
        high = np.rint(scaled)
        low = np.rint((scaled - high) * 2.0**bits)
        self._both = torch.from_numpy(np.concatenate([low, high]).T)
        self._unit, self._digit = np.ldexp(1.0, exponent - bits), 2.0**-bits

    def __call__(self, inputs: Floats) -> Floats:
        # PyTorch's product, which keeps to the number of threads that PyTorch is given
        low, high = np.split((torch.from_numpy(inputs) @ self._both).numpy(), 2, axis=1)
        return (low * self._digit + high) * self._unit


class DiagonalNormals:
    """K products of normal laws on the grid i · spacing, |i| ≤ bound / spacing.

    Args:
        mean, log_scale: shape ``(K, cells)``, float64 with the same bits on every machine.
    """

    def __init__(self, mean: Floats, log_scale: Floats, spacing: float, bound: float) -> None:
        self.components = len(mean)
        self._mean, self._log_scale, self._spacing, self._bound = mean, log_scale, spacing, bound
        most = int(bound / spacing)
        # log N(z; μ, σ²) is linear in (z², z, 1); z is a whole number of spacings.
        precision = exp(-2.0 * log_scale)
        self._squares = ExactProduct(-0.5 * spacing * spacing * precision, float(most) ** 2)
        self._values = ExactProduct(spacing * mean * precision, float(most))
        self._ones = ExactProduct(-0.5 * mean * mean * precision - log_scale, 1.0)

    def cells(self, n: int, component: Integers | None = None, present: Mask | None = None) -> NormalCells:
        """The codec of ``n`` rows, each under the law of its component."""
        chosen = np.zeros(n, np.int64) if component is None else component
        mean, log_scale = self._mean[chosen], self._log_scale[chosen]
        return NormalCells(mean, log_scale, self._spacing, self._bound, present)

    def log_joint(self, symbols: Integers, present: Mask | None = None) -> Floats:
        """log p(row | component) but for a constant, nats, shape ``(n, K)``."""
        values = symbols.astype(np.float64)
        ones = np.ones_like(values) if present is None else present.astype(np.float64)
        values *= ones
        return self._squares(values * values) + self._values(values) + self._ones(ones)


# --------------------------------------------------------------------------------------------------------------
# Jointly normal cells
# --------------------------------------------------------------------------------------------------------------

#: Numbers in the largest array of factors, one for each pattern of absent cells.
_MOST_NUMBERS = 1 << 22


class Innovations(Protocol):
    """Zero-mean jointly normal cells of some rows, one cell after another: r_j | r_<j ~ N(mean(j), deviation(j)²)."""

    def mean(self, j: int) -> Floats:
        """Conditional mean of cell j, shape ``(n,)``, given the cells told."""
        ...

    def deviation(self, j: int) -> Floats:
        """Conditional standard deviation of cell j, shape ``(n,)``."""
        ...

    def tell(self, j: int, innovation: Floats) -> None:
        """Cell j is mean(j) + deviation(j) · innovation, 0 where the cell is absent."""
        ...


class FactorInnovations:
    """Covariances L Lᵀ, one of several for each row.

    Args:
        factors: lower triangular, shape ``(G, D, D)``.
        of_row: which one, shape ``(n,)``.
    """

    def __init__(self, factors: Floats, of_row: Integers) -> None:
        self._factors, self._of_row = factors, of_row
        self._mean = np.zeros((factors.shape[1], len(of_row)))

    def mean(self, j: int) -> Floats:
        return self._mean[j]

    def deviation(self, j: int) -> Floats:
        return self._factors[:, j, j].take(self._of_row)

    def tell(self, j: int, innovation: Floats) -> None:
        below = self._factors[:, j + 1 :, j]
        self._mean[j + 1 :] += innovation * (below[0][:, None] if len(below) == 1 else below[self._of_row].T)


class LowRankInnovations:
    """Covariance W Wᵀ + σ² I: the mean of z ~ N(0, I) moves by a gain for each unit of innovation.

    Args:
        weights: W, shape ``(D, k)``.
        gains, deviations: for each pattern, as :func:`low_rank_gains` gives them.
        of_row: which pattern, shape ``(n,)``.
    """

    def __init__(self, weights: Floats, gains: Floats, deviations: Floats, of_row: Integers) -> None:
        self._weights, self._gains, self._deviations, self._of_row = weights, gains, deviations, of_row
        self._latent = np.zeros((weights.shape[1], len(of_row)))

    def mean(self, j: int) -> Floats:
        return fixed_sum(self._latent * self._weights[j][:, None])

    def deviation(self, j: int) -> Floats:
        return self._deviations[j].take(self._of_row)

    def tell(self, j: int, innovation: Floats) -> None:
        self._latent += innovation * self._gains[j].take(self._of_row, axis=1)


def low_rank_gains(weights: Floats, variance: float, kinds: Mask) -> tuple[Floats, Floats]:
    """Gains ``(D, k, G)`` and deviations ``(D, G)`` of cells with covariance W Wᵀ + σ² I, by Kalman's filter.

    With V the covariance of z given the cells before j: s = w_jᵀ V w_j + σ², the gain is V w_j / √s, and V becomes
    V − V w_j w_jᵀ V / s.

    Args:
        kinds: patterns of present cells, shape ``(G, D)``.
    """
    dims, rank = weights.shape
    gains, deviations = np.empty((dims, rank, len(kinds))), np.empty((dims, len(kinds)))
    known = np.zeros((rank, rank, len(kinds)))
    known[np.arange(rank), np.arange(rank)] = 1.0
    for j, w in enumerate(weights):
        pull = fixed_sum(known * w[:, None, None])
        deviations[j] = sqrt(fixed_sum(pull * w[:, None]) + variance)
        gains[j] = pull / deviations[j] * kinds[:, j]
        known -= gains[j][:, None] * gains[j][None]
    return gains, deviations


def fixed_sum(terms: Floats) -> Floats:
    """The sum along the first axis, in an order that its length alone decides: halves upon halves.

    >>> fixed_sum(np.array([1.0, 2.0, 4.0]))
    array(7.)
    """
    while len(terms) > 1:
        half = len(terms) // 2
        added = terms[:half] + terms[half : 2 * half]
        terms = added if len(terms) % 2 == 0 else np.concatenate([added, terms[2 * half :]])
    return terms[0] if terms.ndim > 1 else np.asarray(terms[0])


def cholesky(matrices: Floats) -> Floats:
    """Factors L of symmetric positive definite matrices L Lᵀ, shape ``(G, D, D)``, the same on every machine."""
    rest, factors = matrices.copy(), np.zeros_like(matrices)
    for j in range(matrices.shape[1]):
        root = sqrt(np.ascontiguousarray(rest[:, j, j]))
        column = rest[:, j + 1 :, j] / root[:, None]
        factors[:, j, j], factors[:, j + 1 :, j] = root, column
        rest[:, j + 1 :, j + 1 :] -= column[:, :, None] * column[:, None, :]
    return factors


def covariances(factors: Floats) -> Floats:
    """L Lᵀ for each of the factors, shape ``(G, D, D)``, the same on every machine."""
    total = np.zeros_like(factors)
    for j in range(factors.shape[1]):
        total += factors[:, :, j, None] * factors[:, None, :, j]
    return total


def of_present(factors: Floats, kinds: Mask) -> Floats:
    """Factors of the covariances of the present cells, for each pattern and each factor: ``(patterns · G, D, D)``.

    An absent cell is independent of all others, of variance 1.
    """
    if kinds.all():
        return np.broadcast_to(factors, (len(kinds), *factors.shape)).reshape(-1, *factors.shape[1:])
    both = kinds[:, None, :, None] & kinds[:, None, None, :]
    masked = np.where(both, covariances(factors), np.eye(factors.shape[1]))
    return cholesky(masked.reshape(-1, *factors.shape[1:]))


def kinds_of(present: Mask | None, n: int, dims: int) -> tuple[Mask, Integers]:
    """Patterns of present cells, and which one each row has."""
    if present is None or present.all():
        return np.ones((1, dims), bool), np.zeros(n, np.int64)
    kinds, of_row = np.unique(present, axis=0, return_inverse=True)
    return kinds, of_row.reshape(-1)


class ChainCells:
    """Rows of jointly normal cells, coded one column after another under their conditional laws.

    Args:
        columns: how each column is coded.
        base: mean of the cells, in standard units, shape ``(D, n)``.
        innovations: gives their law, new for every pass.
        present: which cells are there, shape ``(n, D)``.
    """

    def __init__(
        self,
        columns: Sequence[NormalColumn],
        base: Floats,
        innovations: Callable[[], Innovations],
        present: Mask | None = None,
    ) -> None:
        self.shape: tuple[int, ...] = (base.shape[1], len(columns))
        self._columns, self._base, self._innovations, self._present = columns, base, innovations, present

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        """Code rows of symbols."""
        array = self._rows(symbols)
        for j, codec in reversed(list(enumerate(self._codecs(array)))):
            try:
                codec.push(stack, array[:, j])
            except ValueError as error:
                raise ValueError(f"column {j}: {error}") from None

    def pop(self, stack: Stack) -> Integers:
        """Decode rows of symbols."""
        array = np.zeros(self.shape, np.int64)
        for j, codec in enumerate(self._codecs(array)):
            array[:, j] = codec.pop(stack)  # before the next codec is made, which depends on it
        return array

    def lengths(self, symbols: ArrayLike) -> Floats:
        """Bits of every cell, given the cells before it.  For reports."""
        array = self._rows(symbols)
        return np.stack([codec.lengths(array[:, j]) for j, codec in enumerate(self._codecs(array))], 1)

    def legal(self, symbols: ArrayLike) -> Mask:
        """Which symbols can be coded."""
        array = self._rows(symbols)
        return np.stack([codec.legal(array[:, j]) for j, codec in enumerate(self._codecs(array))], 1)

    def _rows(self, symbols: ArrayLike) -> Integers:
        array = np.asarray(symbols)
        if array.shape != self.shape:
            raise ValueError(f"symbols: expected shape {self.shape}, got {array.shape}")
        return array

    def _codecs(self, array: Integers) -> Iterator[Cells]:
        """The codec of each column, given the columns of ``array`` before it."""
        innovations = self._innovations()
        for j, column in enumerate(self._columns):
            seen = None if self._present is None else self._present[:, j]
            deviation = innovations.deviation(j)
            mean = innovations.mean(j) + self._base[j]
            yield column.cells(mean, deviation, seen)
            innovation = (column.standard(array[:, j]) - mean) / deviation
            np.clip(innovation, -_FARTHEST_INNOVATION, _FARTHEST_INNOVATION, out=innovation)
            innovations.tell(j, innovation if seen is None else np.where(seen, innovation, 0.0))


#: Beyond it the law errs so grossly that the other cells had better not follow.
_FARTHEST_INNOVATION = 1e6


@dataclass(frozen=True)
class NormalColumn:
    """A column whose value is shift + scale · y, y being normal given other columns.

    Args:
        shift, scale: of the value.
        line: where the values live.
        low, high: the symbols there can be, the outer ones taking the tails; None for all whole numbers.
    """

    shift: float
    scale: float
    line: Line
    low: int | None = None
    high: int | None = None

    def standard(self, symbols: Integers) -> Floats:
        """y of the symbols; 0 for a rank that is no number's."""
        spacing = self.line.spacing
        value = symbols.astype(np.float64) * spacing if spacing > 0 else from_ordered(symbols)
        with np.errstate(invalid="ignore", over="ignore"):
            return np.nan_to_num((value - self.shift) / self.scale, nan=0.0, posinf=1e300, neginf=-1e300)

    def cells(self, mean: Floats, deviation: Floats, present: Mask | None) -> Cells:
        """The codec of the symbols where y ~ N(mean, deviation²)."""
        spacing = self.line.spacing
        if spacing <= 0:
            spare_bits = self.line.spare_bits
            return _FloatNormals(mean * self.scale + self.shift, deviation * self.scale, spare_bits, present)
        unit, place = self.scale / spacing, self.shift / spacing
        if self.low is not None and self.high is not None:
            low, cells, escapes = self.low, self.high - self.low + 1, False
        else:
            (low, cells), escapes = grid_range(place, unit, np.zeros(0)), True
        return _GridNormals(mean * unit + place, deviation * unit, low, cells, escapes, present)

    def legal(self, symbols: Integers) -> Mask:
        """Which symbols can be coded whatever the other columns are."""
        if self.line.spacing <= 0:
            return lengthened(symbols >> self.line.spare_bits, np.int64(self.line.spare_bits)) == symbols
        farthest = 1 << 61
        low, high = (-farthest, farthest) if self.low is None or self.high is None else (self.low, self.high)
        return (symbols >= low) & (symbols <= high)


class _GridNormals(IntervalCells):
    """Normal laws in units of the symbols."""

    def __init__(
        self, centre: Floats, scale: Floats, low: int, cells: int, escapes: bool, present: Mask | None
    ) -> None:
        super().__init__(centre.shape, low, cells, escapes, present)
        self._centre, self._rate = self._select(centre), normal().steps / self._select(scale)

    def _law(self, some: Some) -> Cumulative:
        return Mixture([Family(normal(), self._centre[some][None], self._rate[some][None])])


class _FloatNormals(FloatCells):
    """Normal laws of floats, on a grid of 512 cells and more a deviation."""

    def __init__(self, mean: Floats, scale: Floats, spare_bits: int, present: Mask | None) -> None:
        spacing, middle = grid_of(mean, scale)
        super().__init__(mean.shape, spacing, middle, spare_bits, present)
        # A cell starts at its left edge: its middle is half a cell further, where the law's grid has the cell itself.
        self._centre = self._select((mean / spacing - middle) - 0.5)
        self._rate = normal().steps * self._select(spacing / scale)

    def _law(self, some: Some) -> Cumulative:
        return Mixture([Family(normal(), self._centre[some][None], self._rate[some][None])])


class Covariance(Protocol):
    """A covariance of cells as their innovations."""

    def innovations(self, kinds: Mask, of_row: Integers) -> Callable[[], Innovations]:
        """Makes the innovations of rows with these patterns of present cells, ``(G, D)``; which one, ``(n,)``."""
        ...

    def numbers(self) -> int:
        """How many numbers a pattern of its own needs."""
        ...


class FullCovariance:
    """L Lᵀ, L of shape ``(D, D)``."""

    def __init__(self, factor: Floats) -> None:
        self._factor = factor[None]

    def innovations(self, kinds: Mask, of_row: Integers) -> Callable[[], Innovations]:
        factors = of_present(self._factor, kinds)
        return lambda: FactorInnovations(factors, of_row)

    def numbers(self) -> int:
        return self._factor.size


class LowRankCovariance:
    """W Wᵀ + σ² I, W of shape ``(D, k)``."""

    def __init__(self, weights: Floats, variance: float) -> None:
        self._weights, self._variance = weights, variance
        self._complete = low_rank_gains(weights, variance, np.ones((1, len(weights)), bool))

    def innovations(self, kinds: Mask, of_row: Integers) -> Callable[[], Innovations]:
        gains = self._complete if kinds.all() else low_rank_gains(self._weights, self._variance, kinds)
        return lambda: LowRankInnovations(self._weights, *gains, of_row)

    def numbers(self) -> int:
        return self._weights.size + self._weights.shape[1] ** 2


def chain_rows(
    columns: Sequence[NormalColumn], covariance: Covariance, base: Floats, present: Mask | None = None
) -> RowParts:
    """The codec of rows of jointly normal columns.

    Args:
        base: mean of every cell in standard units, shape ``(D, n)``.
        present: which cells are there, shape ``(n, D)``.
    """

    def of(part: slice) -> ChainCells:
        seen = None if present is None else present[part]
        kinds, of_row = kinds_of(seen, part.stop - part.start, len(columns))
        return ChainCells(columns, base[:, part], covariance.innovations(kinds, of_row), seen)

    return RowParts(base.shape[1], len(columns), rows_at_once(present, covariance.numbers()), of)


class JointNormals:
    """K jointly normal laws of rows of cells on the grid i · spacing, |i| ≤ bound / spacing.

    Args:
        mean: shape ``(K, D)``; float64 with the same bits on every machine, as ``factors``.
        factors: L of the covariances L Lᵀ, shape ``(K, D, D)``.
    """

    def __init__(self, mean: Floats, factors: Floats, spacing: float, bound: float) -> None:
        self.components = len(mean)
        self._mean, self._factors = mean, factors
        most = int(bound / spacing)
        self._columns = [NormalColumn(0.0, 1.0, Line(spacing, most), -most, most)] * mean.shape[1]

    def cells(self, n: int, component: Integers | None = None, present: Mask | None = None) -> RowParts:
        """The codec of ``n`` rows, each under the law of its component."""
        chosen = np.zeros(n, np.int64) if component is None else component

        def of(part: slice) -> ChainCells:
            k, seen = chosen[part], None if present is None else present[part]
            kinds, kind = kinds_of(seen, len(k), self._mean.shape[1])
            factors, of_row = of_present(self._factors, kinds), kind * self.components + k
            base = np.ascontiguousarray(self._mean[k].T)
            return ChainCells(self._columns, base, lambda: FactorInnovations(factors, of_row), seen)

        return RowParts(n, self._mean.shape[1], self._part(present), of)

    def log_joint(self, symbols: Integers, present: Mask | None = None) -> Floats:
        """log p(row | component) but for a constant, nats, shape ``(n, K)``."""
        n, dims = symbols.shape
        nats = np.zeros((n, self.components))
        for part in blocks(n, self._part(present)):
            seen = None if present is None else present[part]
            kinds, kind = kinds_of(seen, part.stop - part.start, dims)
            factors = of_present(self._factors, kinds)
            values = [column.standard(symbols[part, j]) for j, column in enumerate(self._columns)]
            for k in range(self.components):
                law = FactorInnovations(factors, kind * self.components + k)
                for j, value in enumerate(values):
                    deviation = law.deviation(j)
                    innovation = (value - self._mean[k, j] - law.mean(j)) / deviation
                    cost = innovation * innovation * 0.5 + log(deviation)
                    if seen is not None:
                        cost, innovation = cost * seen[:, j], innovation * seen[:, j]
                    nats[part, k] -= cost
                    law.tell(j, innovation)
        return nats

    def _part(self, present: Mask | None) -> int:
        return rows_at_once(present, self.components * self._mean.shape[1] ** 2)


def rows_at_once(present: Mask | None, numbers: int) -> int:
    """Rows of a part, when each may have a pattern of absent cells that needs so many numbers of its own."""
    return 1 << 30 if present is None or present.all() else max(1, _MOST_NUMBERS // numbers)


class RowParts:
    """Rows coded a part at a time, each by a codec of its own.

    Args:
        n, dims: shape of the symbols.
        size: rows of a part.
        of: codec of a slice of rows.
    """

    def __init__(self, n: int, dims: int, size: int, of: Callable[[slice], CellCodec]) -> None:
        self.shape: tuple[int, ...] = (n, dims)
        self._parts = list(blocks(n, min(size, max(n, 1))))
        self._of = of

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        """Code rows of symbols."""
        array = np.asarray(symbols)
        for part in reversed(self._parts):
            self._of(part).push(stack, array[part])

    def pop(self, stack: Stack) -> Integers:
        """Decode rows of symbols."""
        array = np.zeros(self.shape, np.int64)
        for part in self._parts:
            array[part] = self._of(part).pop(stack)
        return array

    def lengths(self, symbols: ArrayLike) -> Floats:
        """Bits of every cell.  For reports."""
        array, bits = np.asarray(symbols), np.zeros(self.shape)
        for part in self._parts:
            bits[part] = self._of(part).lengths(array[part])
        return bits

    def legal(self, symbols: ArrayLike) -> Mask:
        """Which symbols can be coded."""
        array, good = np.asarray(symbols), np.ones(self.shape, bool)
        for part in self._parts:
            good[part] = self._of(part).legal(array[part])
        return good
