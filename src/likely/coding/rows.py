"""Rows of a space as symbols of a codec, and back: the same floats for the encoder and the decoder.

A symbol is an int64: the level, token, count or category; for a number on a grid its place on the grid; for a number
on a continuum its rank among all floats (:mod:`likely.coding.continuum`).  A model's codec computes with
``values(symbols)`` on both sides, never with what it was given.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from likely.coding.cells import Mask
from likely.coding.continuum import from_ordered, ordered
from likely.coding.stack import Integers
from likely.contract import Binary, NoCodec, Reals, Space, Table
from likely.contract import Integers as Levels

#: The most zeros that may be said to end the bits of a float64's significand.
_MOST_SPARE = 52


class Rows:
    """Batches of a space as symbols.

    >>> from likely.contract import Column
    >>> table = Table(columns=(Column("price", "real", resolution=0.1), Column("size", "real", missing=True)))
    >>> rows = Rows(table)
    >>> symbols, present = rows.symbols(torch.tensor([[0.3, 2.5], [7.0, float("nan")]], dtype=torch.float64))
    >>> symbols[:, 0].tolist(), present.tolist()
    ([3, 70], [[True, True], [True, False]])
    >>> rows.values(symbols, present)
    tensor([[0.3000, 2.5000],
            [7.0000,    nan]], dtype=torch.float64)

    Args:
        space: the space of the rows.
        spacing: for ``Reals``, the grid on which the cells live.

    Raises:
        NoCodec: reals without a grid.
    """

    def __init__(self, space: Space, spacing: float | None = None) -> None:
        if isinstance(space, Reals) and spacing is None:
            raise NoCodec(
                "real numbers have a density and no probability, so that no number of bits codes them exactly: give "
                "the data a resolution, or keep them as the columns of a table, whose floats are coded to the bit"
            )
        self.space, self.spacing = space, spacing
        self._columns = space.columns if isinstance(space, Table) else ()
        self._small = isinstance(space, Binary) or (isinstance(space, Levels) and space.levels <= 256)

    def symbols(self, x: Tensor) -> tuple[Integers, Mask | None]:
        """Symbols of a batch, int64, and which cells are there: shape ``(n, *shape)`` both; None if all are."""
        x = x.detach().cpu()
        absent = torch.isnan(x) if x.is_floating_point() else None
        present = None if absent is None or not absent.any() else ~absent
        filled = x if present is None else torch.where(present, x, 0.0)
        if self._columns:
            out = torch.empty(x.shape, dtype=torch.int64)
            for j, column in enumerate(self._columns):
                if column.coded:
                    out[:, j] = filled[:, j].long()
                elif column.resolution is not None:
                    out[:, j] = column.to_index(filled[:, j])
                else:
                    out[:, j] = torch.from_numpy(ordered(filled[:, j].double().numpy()))
        elif self.spacing is not None:
            out = torch.round(filled.double() / self.spacing).long()
        else:
            out = filled.long()
        return out.numpy(), None if present is None else present.numpy()

    def values(self, symbols: Integers, present: Mask | None = None) -> Tensor:
        """The batch of the symbols; NaN where a cell is absent.

        Float64 for tables, reals and spaces with holes, uint8 for up to 256 levels, else int64.
        """
        given = torch.from_numpy(np.ascontiguousarray(symbols))
        if self._columns:
            out = torch.empty(given.shape, dtype=torch.float64)
            for j, column in enumerate(self._columns):
                if column.coded:
                    out[:, j] = given[:, j].double()
                elif column.resolution is not None:
                    out[:, j] = column.from_index(given[:, j])
                else:
                    out[:, j] = torch.from_numpy(from_ordered(symbols[:, j]))
        elif self.spacing is not None:
            out = given.double() * self.spacing
        else:
            out = given.to(torch.uint8) if self._small else given
        if present is None:
            return out
        return out.double().masked_fill(torch.from_numpy(~np.asarray(present)), torch.nan)


def spare_bits(space: Space, x: Tensor) -> list[int]:
    """How many zeros end the bits of all values of each numeric column without a grid: 29 where all are float32.

    >>> from likely.contract import Column
    >>> spare_bits(Table(columns=(Column("size", "real"),)), torch.tensor([[0.5], [1.5]]))
    [51]
    """
    out: list[int] = []
    for j, column in enumerate(space.columns if isinstance(space, Table) else ()):
        if column.numeric and column.resolution is None:
            cells = x[:, j].double()
            bits: NDArray[np.int64] = cells[~torch.isnan(cells)].numpy().view(np.int64)
            together = int(np.bitwise_or.reduce(bits)) if len(bits) else 0
            out.append(min(_MOST_SPARE, (together & -together).bit_length() - 1) if together else _MOST_SPARE)
    return out


def spare_at_most(given: Sequence[int] | None, space: Space) -> Sequence[int] | None:
    """The spare bits as a codec takes them; None where the space has no column without a grid."""
    without = [c for c in (space.columns if isinstance(space, Table) else ()) if c.numeric and c.resolution is None]
    if not without:
        return None
    found = [0] * len(without) if given is None else list(given)
    if len(found) != len(without):
        raise ValueError(f"spare_bits: expected one number for each of {len(without)} columns, got {len(found)}")
    return found
