"""Examples of any space as rows of cells, of which none has very many codes.

A column of very many categories is spelled as two, cluster and member of the cluster, p(v) = p(c) p(m | c) (Goodman
2001, arXiv cs/0108006), so that memory is linear in its levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from likely.contract import Binary, Column, Integers, Reals, Space, Table, Tokens

#: A column with more levels is spelled as two.
MOST_LEVELS = 1024


class Spelling:
    """Examples as rows of cells: flattened, and a column of very many categories as two.

    Args:
        space: of the examples.
        holes: whether any cell may be unknown to a network that is told so.
    """

    def __init__(self, space: Space, holes: bool) -> None:
        self.space = space
        #: for each cell the flattened cell of the space that it belongs to
        self.source: list[int] = []
        #: for the second cell of a split column: the number of members of a cluster, and of codes
        self.split: dict[int, tuple[int, int]] = {}
        self.columns: tuple[Column, ...] = ()
        if isinstance(space, Table):
            columns: list[Column] = []
            for j, column in enumerate(space.columns):
                levels = column.levels or 0
                if levels > MOST_LEVELS:
                    size = math.isqrt(levels - 1) + 1
                    columns.append(replace(column, kind="categorical", levels=-(-levels // size)))
                    columns.append(replace(column, kind="categorical", levels=size))
                    self.split[len(columns) - 1] = (size, levels)
                    self.source += [j, j]
                else:
                    columns.append(column)
                    self.source.append(j)
            self.inner: Space = Table(columns=tuple(columns))
        else:
            self.source = list(range(space.dims))
            if isinstance(space, Reals):
                self.inner = Table(
                    columns=tuple(Column(str(j), "real", missing=space.missing) for j in range(space.dims))
                )
            elif isinstance(space, Tokens):
                self.inner = Tokens(space.length, space.vocab, missing=holes or space.missing)
            else:
                self.inner = replace(space, shape=(space.dims,), missing=holes or space.missing)
        if isinstance(self.inner, Table):
            self.columns = self.inner.columns
            self.levels = [column.levels or 0 for column in self.columns]
        else:
            self.levels = [_levels(space)] * space.dims
        firsts = set(range(len(self.source))) - set(self.split)
        #: cells that are filled together
        self.rounds = [firsts] if not self.split else [firsts, set(self.split)]

    def __call__(self, x: Tensor) -> Tensor:
        """Rows of cells, float64 (or the dtype of real examples that want a gradient), of a batch."""
        flat = x.reshape(len(x), -1)
        flat = flat if flat.requires_grad else flat.double()
        if not self.split:
            return flat
        pieces = []
        for i, j in enumerate(self.source):
            cell = flat[:, j]
            if i in self.split:
                cell = cell % self.split[i][0]
            elif i + 1 in self.split:
                cell = (cell / self.split[i + 1][0]).floor()
            pieces.append(cell)
        return torch.stack(pieces, 1)

    def read(self, cells: Tensor) -> Tensor:
        """The batch of rows of cells."""
        if self.split:
            pieces: list[Tensor] = []
            for i in range(len(self.source)):
                if i in self.split:
                    pieces[-1] = pieces[-1] * self.split[i][0] + cells[:, i]
                else:
                    pieces.append(cells[:, i])
            cells = torch.stack(pieces, 1)
        return cells.reshape(len(cells), *self.space.shape)

    def order(self, cells: Sequence[int]) -> list[int]:
        """An order of the flattened cells of the space as one of the rows: parts of a column follow each other."""
        return [i for j in cells for i in range(len(self.source)) if self.source[i] == j] if self.split else list(cells)

    def on_grid(self, cells: Tensor) -> Tensor:
        """Numbers brought to what their columns can hold."""
        if not self.columns:
            return cells.round()
        out = cells.clone()
        for j, column in enumerate(self.columns):
            if column.numeric and column.resolution is not None:
                out[:, j] = column.from_index(column.to_index(cells[:, j]))
        return out


def _levels(space: Space) -> int:
    if isinstance(space, Integers):
        return space.levels
    if isinstance(space, Tokens):
        return space.vocab
    return 2 if isinstance(space, Binary) else 0
