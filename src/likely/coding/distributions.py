"""The codec of a distribution: its raw parameters, bit-identical on every machine, become integer frequencies.

>>> import torch
>>> from likely.coding import Stack
>>> from likely.distributions import Bernoulli
>>> codec = codec_of(Bernoulli(torch.tensor([[0.0, 2.0], [-1.0, 5.0]])))
>>> stack = Stack()
>>> codec.push(stack, [[1, 1], [0, 1]])
>>> codec.pop(stack)
array([[1, 1],
       [0, 1]])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from likely.coding.categories import BernoulliCells, CategoricalCells, TabulatedCells
from likely.coding.cells import CellCodec, Cells, Integers, Mask
from likely.coding.continuum import DoubleCells
from likely.coding.counts import MultinomialRows, NegativeBinomialCells
from likely.coding.intervals import GridCells, LogisticCells, NormalCells
from likely.coding.stack import Stack
from likely.distributions.bernoulli import Bernoulli
from likely.distributions.categorical import Categorical
from likely.distributions.clustered import Clustered
from likely.distributions.counts import Multinomial, NegativeBinomial
from likely.distributions.heads import TableDistribution
from likely.distributions.logistic import DiscretizedLogisticMixture, GridLogisticMixture
from likely.distributions.normal import Normal


def codec_of(
    distribution: Any,
    present: ArrayLike | None = None,
    *,
    spacing: float = 2.0**-8,
    bound: float = 16.0,
    spare_bits: Sequence[int] | None = None,
) -> CellCodec:
    """Codec of a batch of cells with this distribution.

    Args:
        distribution: one of :mod:`likely.distributions`, with parameters of shape ``(*shape, …)``.
        present: which cells are there, a bool mask ``shape``; absent ones cost nothing.
        spacing, bound: grid of a :class:`Normal`: symbol i is z = i · spacing, within ± bound.
        spare_bits: for each numeric column without a grid, how many zeros end the bits of all its values.

    Raises:
        ValueError: a parameter is NaN or infinite; the message names it and its index.
        TypeError: the distribution has no codec.
    """
    if isinstance(distribution, Bernoulli):
        return BernoulliCells(_array(distribution.logits), present)
    if isinstance(distribution, Categorical):
        return _categories(_array(distribution.logits), present)
    if isinstance(distribution, DiscretizedLogisticMixture):
        logits, means, scales = _broadcast(distribution.logits, distribution.means, distribution.log_scales)
        return LogisticCells(logits, means, scales, distribution.levels, present)
    if isinstance(distribution, Normal):
        mean, log_scale = _broadcast(distribution.mean, distribution.log_scale)
        return NormalCells(mean, log_scale, spacing, bound, present)
    if isinstance(distribution, NegativeBinomial):
        log_mean, log_dispersion = _broadcast(distribution.log_mean, distribution.log_dispersion)
        return NegativeBinomialCells(log_mean, log_dispersion, present)
    if isinstance(distribution, Multinomial):
        log_mean, log_dispersion = _broadcast(distribution.total.log_mean, distribution.total.log_dispersion)
        return MultinomialRows(_array(distribution.logits), log_mean, log_dispersion, present)
    if isinstance(distribution, GridLogisticMixture):
        numeric = list(range(distribution.means.shape[-2]))
        return RowCells(TableDistribution({}, numeric, distribution), present, spare_bits)
    if isinstance(distribution, TableDistribution):
        return RowCells(distribution, present, spare_bits)
    raise TypeError(f"distribution: {type(distribution).__name__} has no codec")


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()


def _broadcast(*tensors: Tensor) -> list[NDArray[Any]]:
    return list(np.broadcast_arrays(*(_array(tensor) for tensor in tensors)))


def _categories(logits: NDArray[Any], present: ArrayLike | None) -> CellCodec:
    """Softmax cells; where all rows are one row in memory, its frequencies are computed once (they are the same)."""
    if logits.ndim < 2 or len(logits) < 2 or logits.strides[0] or logits[0].size > _SHARED:
        return CategoricalCells(logits, present)
    one = CategoricalCells(logits[0])
    edges = one._edges(slice(0, one.count)).T
    which = np.arange(one.count).reshape(one.shape)
    return TabulatedCells(edges, np.broadcast_to(which, logits.shape[:-1]), present=present)


#: The most frequencies that a table shared by all rows may have.
_SHARED = 1 << 22


class RowCells:
    """Rows of a table, column after column: symbols ``(n, columns)`` are codes, grid indices or ranks of floats.

    Args:
        rows: the distribution of n rows.
        present: which cells are there, shape ``(n, columns)``.
        spare_bits: for each numeric column without a grid, as in :class:`DoubleCells`.
    """

    def __init__(
        self, rows: TableDistribution, present: ArrayLike | None = None, spare_bits: Sequence[int] | None = None
    ) -> None:
        mixture = rows.mixture
        lead = next(iter(rows.coded.values())).logits if mixture is None else mixture.means
        self.shape: tuple[int, ...] = lead.shape[0], len(rows.coded) + len(rows.numeric)
        mask = np.ones(self.shape, bool) if present is None else np.asarray(present)
        if mask.shape != self.shape or mask.dtype != np.bool_:
            raise ValueError(f"present: expected a bool mask of shape {self.shape}, got {mask.dtype} {mask.shape}")
        self.columns: list[CellCodec] = []
        spare = iter(spare_bits or ())
        for j in range(self.shape[1]):
            try:
                law = rows.coded.get(j)
                if isinstance(law, Clustered):
                    column: CellCodec = ClusteredCells(law, mask[:, j])
                elif law is not None:
                    column = _categories(_array(law.logits)[:, 0], mask[:, j])
                else:
                    assert mixture is not None
                    column = _numeric_column(mixture, rows.numeric.index(j), mask[:, j], spare)
            except ValueError as error:
                raise ValueError(f"column {j}: {error}") from None
            self.columns.append(column)

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        """Code the cells that are there."""
        array = self._rows(symbols)
        for j in reversed(range(self.shape[1])):
            try:
                self.columns[j].push(stack, array[:, j])
            except ValueError as error:
                raise ValueError(f"column {j}: {error}") from None

    def pop(self, stack: Stack) -> Integers:
        """Decode all cells, 0 where absent."""
        return np.stack([column.pop(stack) for column in self.columns], 1)

    def lengths(self, symbols: ArrayLike) -> NDArray[np.float64]:
        """Bits of every cell."""
        array = self._rows(symbols)
        return np.stack([column.lengths(array[:, j]) for j, column in enumerate(self.columns)], 1)

    def legal(self, symbols: ArrayLike) -> Mask:
        """Which cells can be coded."""
        array = self._rows(symbols)
        return np.stack([column.legal(array[:, j]) for j, column in enumerate(self.columns)], 1)

    def _rows(self, symbols: ArrayLike) -> NDArray[Any]:
        array = np.asarray(symbols)
        if array.shape != self.shape:
            raise ValueError(f"symbols: expected shape {self.shape}, got {array.shape}")
        return array


class ClusteredCells:
    """Categories out of very many: the codec of their clusters, then that of the members, given the clusters.

    Args:
        law: of n cells, logits of shape ``(n, 1, clusters)``.
        present: which cells are there, shape ``(n,)``.
    """

    def __init__(self, law: Clustered, present: Mask) -> None:
        self._logits, self._table = (_array(t) for t in (law.member_logits[:, 0], law.table))
        self._clusters, self._present = CategoricalCells(_array(law.logits)[:, 0], present), present
        self.shape: tuple[int, ...] = self._clusters.shape
        self._size = self._table.shape[1]

    def _members(self, clusters: Integers) -> CategoricalCells:
        logits = self._logits + self._table[np.where(self._present, clusters, 0)]
        return CategoricalCells(logits, self._present)

    def _split(self, symbols: ArrayLike) -> tuple[Integers, Integers]:
        array = np.asarray(symbols)
        if not self.legal(array).all():
            raise ValueError(f"symbols: expected codes of the column, got {array[~self.legal(array)][0]}")
        array = np.where(self._present, array, 0).astype(np.int64)
        return array // self._size, array % self._size

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        """Code the cells that are there."""
        clusters, members = self._split(symbols)
        self._members(clusters).push(stack, members)
        self._clusters.push(stack, clusters)

    def pop(self, stack: Stack) -> Integers:
        """Decode all cells, 0 where absent."""
        clusters = self._clusters.pop(stack)
        return clusters * self._size + self._members(clusters).pop(stack)

    def lengths(self, symbols: ArrayLike) -> NDArray[np.float64]:
        """Bits of every cell."""
        clusters, members = self._split(symbols)
        return self._clusters.lengths(clusters) + self._members(clusters).lengths(members)

    def legal(self, symbols: ArrayLike) -> Mask:
        """Which cells can be coded: those of a level."""
        array = np.asarray(symbols)
        good = (array >= 0) & (array < np.isfinite(self._table).sum())
        return good | ~self._present


def _numeric_column(mixture: GridLogisticMixture, i: int, present: Mask, spare_bits: Any) -> Cells:
    columns = mixture.means.shape[-2]
    location, scale, resolution = (
        float(_array(tensor.expand(columns))[i]) for tensor in (mixture.location, mixture.scale, mixture.resolution)
    )
    logits, means = _array(mixture.logits)[:, i], _array(mixture.means)[:, i]
    log_scales = _array(mixture.given_log_scales)[:, i]
    if resolution > 0:
        atoms = _array(mixture.atoms.expand(columns, -1))[i]
        values = counts = None
        if mixture.recalled is not None:
            values, counts = _array(mixture.recalled.values[i]), _array(mixture.recalled.counts[i])
        return GridCells(logits, means, log_scales, location, scale, resolution, atoms, present, values, counts)
    logits = logits[:, : means.shape[1]]  # a continuum has no atoms and recalls nothing
    return DoubleCells(logits, means, log_scales, location, scale, next(spare_bits, 0), present)
