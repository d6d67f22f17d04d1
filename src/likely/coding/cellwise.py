"""The codec of models that give each cell given those before it, in one order or in several: p(x) = mean of p_k(x).

Encoder and decoder evaluate the same networks on the same numbers: for every cell the row with all cells unknown that
come at its place or later.  A row costs −log2 of the mean over the orders: with several of them the order is drawn by
bits-back (Townsend, Bird & Barber 2019, arXiv 1901.04866), from its responsibility for the row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from likely.coding.bits_back import BitsBack
from likely.coding.categories import CategoricalCells
from likely.coding.cells import MOST_PRECISION, CellCodec, Floats, Integers, Mask
from likely.coding.codec import Codec, Uniform
from likely.coding.components import RowsCodec
from likely.coding.distributions import codec_of
from likely.coding.rows import Rows
from likely.coding.stack import Stack
from likely.contract import Space
from likely.distributions import Distribution
from likely.exact import Network
from likely.units import nats

#: ``law(x, t, condition)``: the distribution of cell t, shape ``(n, 1)``, given the cells of x that are not NaN.
Law: TypeAlias = Callable[[Tensor, int, "Tensor | None"], Distribution]

#: Parts of a bit to which the length of a cell is rounded before orders are compared.  No logarithm of a whole number
#: below 2^28, but those of powers of two, is nearer to the middle between two parts than any library's rounding error.
_PARTS = 1024.0


class CellwiseCodec(RowsCodec):
    """Codes the cells of a row one after the other.

    Args:
        space: of the rows as they are coded, of shape ``(cells,)``.
        spell: brings rows of the model's space to that form.
        read: brings them back.
        source: for every cell as coded the flattened cell of the model's space that it is a part of.
        network: holds everything that is computed.
        laws: of each member.
        orders: the cells in the order of each member.
        spare_bits: see :func:`likely.coding.distributions.codec_of`.
    """

    def __init__(
        self,
        space: Space,
        spell: Callable[[Tensor], Tensor],
        read: Callable[[Tensor], Tensor],
        source: Sequence[int],
        network: Network,
        laws: Sequence[Law],
        orders: Sequence[Sequence[int]],
        spare_bits: Mapping[int, int],
    ) -> None:
        super().__init__(Rows(space))
        self._spell, self._read, self._source = spell, read, list(source)
        self._network, self.laws, self.orders, self.spare_bits = network, laws, orders, spare_bits
        self.networks = {"model": network}
        self.initial = len(orders) > 1

    def push(self, stack: Stack, x: Tensor, condition: Tensor | None = None) -> None:
        """Code a batch ``(n, *shape)``; NaN marks absent cells."""
        super().push(stack, self._spell(x.detach().cpu()), condition)

    def pop(self, stack: Stack, n: int, condition: Tensor | None = None, present: Mask | None = None) -> Tensor:
        """Decode a batch of ``n`` examples."""
        if present is not None:
            present = np.ascontiguousarray(np.asarray(present).reshape(n, -1)[:, self._source])
        return self._read(super().pop(stack, n, condition, present))

    def legal(self, x: Tensor) -> Tensor:
        """Which cells can be coded: all that are within the space."""
        return torch.ones(x.shape, dtype=torch.bool)

    def _legal(self, symbols: Integers, present: Mask | None) -> Mask:
        return np.ones(symbols.shape, bool)

    def member(self, k: int, n: int, present: Mask | None, condition: Tensor | None) -> Walk:
        """The codec of ``n`` rows of symbols under member k."""
        return Walk(self, self._rows, self._network, k, n, present, condition)

    def _codec(self, n: int, present: Mask | None, condition: Tensor | None) -> Codec:
        condition = None if condition is None else condition.to(self._network.device)
        if len(self.orders) == 1:
            return self.member(0, n, present, condition)

        def given(members: Integers) -> Codec:
            return Chosen(self, members, present, condition)

        def posterior(symbols: Integers) -> Codec:
            lengths = [
                np.rint(self.member(k, n, present, condition).lengths(symbols) * _PARTS).sum(1)
                for k in range(len(self.orders))
            ]
            bits = np.stack(lengths, 1)
            weights = nats((bits.min(1, keepdims=True) - bits) / _PARTS)
            return CategoricalCells(weights, precision=MOST_PRECISION)

        return BitsBack(Uniform((n,), len(self.orders)), given, posterior)


class Walk:
    """The codec of n rows of symbols under one member, cell after cell."""

    def __init__(
        self,
        codec: CellwiseCodec,
        rows: Rows,
        network: Network,
        k: int,
        n: int,
        present: Mask | None,
        condition: Tensor | None,
    ) -> None:
        self._law, self._order, self._spare = codec.laws[k], codec.orders[k], codec.spare_bits
        self._rows, self._network, self._condition = rows, network, condition
        self._present = np.ones((n, len(self._order)), bool) if present is None else present
        self.shape: tuple[int, ...] = (n, len(self._order))

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        """Code rows, the last cell first."""
        array = np.asarray(symbols)
        values = self._values(array)
        for place in reversed(range(len(self._order))):
            t = self._order[place]
            self._cell(values, place).push(stack, array[:, t : t + 1])

    def pop(self, stack: Stack) -> Integers:
        """Decode rows, 0 where absent."""
        array = np.zeros(self.shape, np.int64)
        values = torch.full(self.shape, torch.nan, dtype=torch.float64)
        for place, t in enumerate(self._order):
            array[:, t : t + 1] = self._cell(values, place).pop(stack)
            values[:, t] = self._values(array)[:, t]
        return array

    def lengths(self, symbols: ArrayLike) -> Floats:
        """Bits of every cell, 0 where absent."""
        array, bits = np.asarray(symbols), np.zeros(self.shape)
        values = self._values(array)
        for place, t in enumerate(self._order):
            bits[:, t : t + 1] = self._cell(values, place).lengths(array[:, t : t + 1])
        return bits

    def _values(self, symbols: Integers) -> Tensor:
        return self._rows.values(symbols, self._present).double()

    def _cell(self, values: Tensor, place: int) -> CellCodec:
        """The codec of the cell at a place, given those before it."""
        t = self._order[place]
        known = values.clone()
        known[:, self._order[place:]] = torch.nan
        law = self._network.run(self._law, known.to(self._network.device), t, self._condition)
        spare = [self._spare[t]] if t in self._spare else None
        return codec_of(law, self._present[:, t : t + 1], spare_bits=spare)


class Chosen:
    """The codec of rows of symbols, each under its own member."""

    def __init__(self, codec: CellwiseCodec, members: Integers, present: Mask | None, condition: Tensor | None) -> None:
        self._parts = []
        self.shape = (len(members), len(codec.orders[0]))
        for k in range(len(codec.orders)):
            rows = np.flatnonzero(members == k)
            if len(rows):
                own = None if condition is None else condition[torch.from_numpy(rows)]
                walk = codec.member(k, len(rows), None if present is None else present[rows], own)
                self._parts.append((rows, walk))

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        """Code rows, the last member first."""
        array = np.asarray(symbols)
        for rows, walk in reversed(self._parts):
            walk.push(stack, array[rows])

    def pop(self, stack: Stack) -> Integers:
        """Decode rows."""
        array = np.zeros(self.shape, np.int64)
        for rows, walk in self._parts:
            array[rows] = walk.pop(stack)
        return array
