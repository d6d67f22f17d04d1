"""Codecs of models with a law in closed form: rows of cells under it, and mixtures by bits-back over the component."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from likely.coding.bits_back import BitsBack
from likely.coding.categories import CategoricalCells
from likely.coding.cells import MOST_PRECISION, CellCodec, Floats, Integers, Mask
from likely.coding.codec import Codec, Mapped
from likely.coding.rows import Rows
from likely.coding.stack import Stack
from likely.coding.staircase import Staircases, codes


class Laws(Protocol):
    """K laws of a row of cells, given by parameters that have the same bits on every machine."""

    @property
    def components(self) -> int: ...

    def cells(self, n: int, component: Integers | None = None, present: Mask | None = None) -> CellCodec:
        """The codec of ``n`` rows, symbols of shape ``(n, cells)``, each under the law of its component."""
        ...

    def log_joint(self, symbols: Integers, present: Mask | None = None) -> Floats:
        """log p(row | component) but for a constant of the row, nats, shape ``(n, K)``; the same on every machine."""
        ...


class RowsCodec(ABC):
    """The codec of batches of a space from that of their symbols, shape ``(n, cells)``.

    Args:
        rows: of the space.
    """

    networks: Mapping[str, Any] = {}
    initial = False

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def push(self, stack: Stack, x: Tensor, condition: Tensor | None = None) -> None:
        """Code a batch ``(n, *shape)``; NaN marks absent cells."""
        symbols, present = self._rows.symbols(x)
        n = len(symbols)
        self._codec(n, self._flat(present), condition).push(stack, symbols.reshape(n, self._rows.space.dims))

    def pop(self, stack: Stack, n: int, condition: Tensor | None = None, present: Mask | None = None) -> Tensor:
        """Decode a batch of ``n`` examples."""
        symbols = self._codec(n, self._flat(present), condition).pop(stack)
        return self._rows.values(symbols.reshape(n, *self._rows.space.shape), present)

    def legal(self, x: Tensor) -> Tensor:
        """Which cells can be coded; absent ones always."""
        symbols, present = self._rows.symbols(x)
        n = len(symbols)
        return torch.from_numpy(
            self._legal(symbols.reshape(n, self._rows.space.dims), self._flat(present)).reshape(symbols.shape)
        )

    def _flat(self, present: Mask | None) -> Mask | None:
        return None if present is None else np.ascontiguousarray(present).reshape(len(present), self._rows.space.dims)

    @abstractmethod
    def _codec(self, n: int, present: Mask | None, condition: Tensor | None) -> Codec:
        """The codec of the symbols of ``n`` rows."""

    @abstractmethod
    def _legal(self, symbols: Integers, present: Mask | None) -> Mask:
        """Which symbols can be coded."""


class DirectCodec(RowsCodec):
    """Codes rows by a law of their cells.

    Args:
        rows: of the space.
        cells: ``(n, present, condition) -> codec`` of n rows of symbols.
        legal: ``(symbols, present) -> mask`` of those that can be coded under whatever condition.
    """

    def __init__(
        self,
        rows: Rows,
        cells: Callable[[int, Mask | None, Tensor | None], CellCodec],
        legal: Callable[[Integers, Mask | None], Mask],
    ) -> None:
        super().__init__(rows)
        self._cells, self._legal_cells = cells, legal

    def _codec(self, n: int, present: Mask | None, condition: Tensor | None) -> CellCodec:
        return self._cells(n, present, condition)

    def _legal(self, symbols: Integers, present: Mask | None) -> Mask:
        return self._legal_cells(symbols, present)


class ComponentsCodec(RowsCodec):
    """Codes rows x at −log2 Σ_k π_k p_k(x) bits: pops k by its responsibility, pushes x by p_k and k by π.

    Args:
        rows: of the space.
        laws: p_k.
        log_weights: log π_k but for a constant, shape ``(K,)``; float64 with the same bits on every machine.
    """

    def __init__(self, rows: Rows, laws: Laws, log_weights: Floats) -> None:
        super().__init__(rows)
        self._laws, self._log_weights = laws, log_weights
        self.initial = len(log_weights) > 1
        self._prior = Staircases([codes(log_weights[None])])

    def _codec(self, n: int, present: Mask | None, condition: Tensor | None) -> Codec:
        laws = self._laws

        def posterior(symbols: Integers) -> Codec:
            # 28 bits, so that hardly any draw is of a component that has nothing to do with the row.
            return CategoricalCells(laws.log_joint(symbols, present) + self._log_weights, precision=MOST_PRECISION)

        prior = Mapped(self._prior.cells(n), lambda k: k[:, None], lambda symbols: symbols[:, 0])
        return BitsBack(prior, lambda k: laws.cells(n, k, present), posterior)

    def _legal(self, symbols: Integers, present: Mask | None) -> Mask:
        n = len(symbols)
        return self._laws.cells(n, np.zeros(n, np.int64), present).legal(symbols)


class ColumnParts:
    """Rows of symbols whose columns belong to several codecs, coded one after another.

    Args:
        shape: of the symbols, ``(n, columns)``.
        parts: the columns of each codec, and the codec.
    """

    def __init__(self, shape: tuple[int, int], parts: Sequence[tuple[Sequence[int], CellCodec]]) -> None:
        self.shape: tuple[int, ...] = shape
        self._parts = [(np.asarray(columns), codec) for columns, codec in parts]

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        """Code rows of symbols."""
        array = np.asarray(symbols)
        for columns, codec in reversed(self._parts):
            codec.push(stack, array[:, columns])

    def pop(self, stack: Stack) -> Integers:
        """Decode rows of symbols."""
        array = np.zeros(self.shape, np.int64)
        for columns, codec in self._parts:
            array[:, columns] = codec.pop(stack)
        return array

    def lengths(self, symbols: ArrayLike) -> Floats:
        """Bits of every cell.  For reports."""
        array, bits = np.asarray(symbols), np.zeros(self.shape)
        for columns, codec in self._parts:
            bits[:, columns] = codec.lengths(array[:, columns])
        return bits

    def legal(self, symbols: ArrayLike) -> Mask:
        """Which symbols can be coded."""
        array, good = np.asarray(symbols), np.ones(self.shape, bool)
        for columns, codec in self._parts:
            good[:, columns] = codec.legal(array[:, columns])
        return good
