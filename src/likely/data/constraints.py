"""What holds between columns in every row: found in the data, and held against samples.

Three simple kinds, each found by looking at pairs or triples of columns:

* order: ``a <= b`` (start and end, least and most), equality ``a = b``;
* sums: ``a = b + c``, to half a step of the coarsest grid;
* functional dependency: the category of ``b`` follows from that of ``a`` (town and country).

A rule is kept if it holds in every row where its cells are there, and would not hold by chance: if the columns had
nothing to do with each other, all rows would keep it with a probability below 10⁻⁶.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations, permutations
from typing import Any, Literal

import numpy as np
from torch import Tensor

from likely.contract import Table

#: Log-probability below which a rule does not hold by chance.
_CHANCE = math.log(1e-6)
#: Rows that rules are found on, columns that are looked at in pairs and in triples: at most.
ROWS, PAIRS, TRIPLES = 20_000, 100, 24

Rule = Literal["<=", "=", "+", "->"]


@dataclass(frozen=True)
class Constraint:
    """A rule between columns.

    Args:
        rule: ``<=`` and ``=`` (of two columns), ``+`` (the first is the sum of the others), ``->`` (the second follows
            from the first).
        columns: names of the columns.
        follows: for ``->`` the code of the second column for each code of the first; −1 where it never occurred.
        tolerance: for ``=`` and ``+``: deviation up to which it holds.
    """

    rule: Rule
    columns: tuple[str, ...]
    follows: tuple[int, ...] = field(default=(), repr=False)
    tolerance: float = 0.0

    def __str__(self) -> str:
        first, *others = self.columns
        return f"{first} = {' + '.join(others)}" if self.rule == "+" else f"{first} {self.rule} {others[0]}"

    def broken(self, x: Tensor, space: Table) -> np.ndarray:
        """Rows that break the rule: int64, sorted.

        Args:
            x: rows of the table, shape ``(n, columns)``; a row in which a cell is missing breaks nothing.
        """
        names = [column.name for column in space.columns]
        cells = [x[:, names.index(name)].double().numpy() for name in self.columns]
        present = ~np.isnan(np.stack(cells)).any(0)
        with np.errstate(invalid="ignore"):
            wrong = self._wrong([np.where(present, cell, 0.0) for cell in cells])
        return np.flatnonzero(wrong & present)

    def _wrong(self, cells: Sequence[np.ndarray]) -> np.ndarray:
        first, *others = cells
        if self.rule == "<=":
            return first > others[0]
        if self.rule == "->":
            due = np.array(self.follows)[first.astype(np.int64)]
            return (due >= 0) & (others[0] != due)
        return np.abs(first - np.sum(others, axis=0)) > self.tolerance

    def to_json(self) -> dict[str, Any]:
        """JSON values; :meth:`from_json` is the inverse."""
        return {**asdict(self), "columns": list(self.columns), "follows": list(self.follows)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Constraint:
        """Rebuild from :meth:`to_json`."""
        return cls(values["rule"], tuple(values["columns"]), tuple(values["follows"]), values["tolerance"])


def find_constraints(x: Tensor, space: Table) -> list[Constraint]:
    """The rules that all rows keep.

    >>> import torch
    >>> from likely.contract import Column
    >>> space = Table(columns=tuple(Column(name, "integer") for name in ("start", "end", "length")))
    >>> start = torch.arange(100) % 17
    >>> length = torch.arange(100) * 7 % 13
    >>> [str(c) for c in find_constraints(torch.stack([start, start + length, length], 1).double(), space)]
    ['start <= end', 'length <= end', 'end = start + length']

    Args:
        x: rows of the table, shape ``(n, columns)``, NaN where missing; at most ``ROWS`` of them are looked at.
    """
    values = x[:ROWS].double().numpy()
    numbers = [j for j, c in enumerate(space.columns) if c.numeric and np.nanstd(values[:, j]) > 0][:PAIRS]
    codes = [j for j, c in enumerate(space.columns) if c.coded and (c.levels or 0) > 1][:PAIRS]
    found = [*_orders(values, numbers, space), *_sums(values, numbers[:TRIPLES], space)]
    return found + list(_dependencies(values, codes, space))


def _orders(values: np.ndarray, numbers: Sequence[int], space: Table) -> Iterator[Constraint]:
    for i, j in permutations(numbers, 2):
        a, b = _together(values, i, j)
        if len(a) < 2 or (a > b).any():
            continue
        names = (space.columns[i].name, space.columns[j].name)
        if (a == b).all():
            if i < j and not _by_chance(np.mean([np.mean(a == value) for value in b[:100]]), len(a)):
                yield Constraint("=", names)
            continue
        ranks = np.searchsorted(np.sort(a), b, side="right") / len(a)  # P(a <= b) if b were any other row's
        if not _by_chance(float(ranks.mean()), len(a)):
            yield Constraint("<=", names)


def _sums(values: np.ndarray, numbers: Sequence[int], space: Table) -> Iterator[Constraint]:
    for i in numbers:
        others = [j for j in numbers if j != i]
        for j, k in combinations(others, 2):
            some = values[:, [i, j, k]]
            some = some[~np.isnan(some).any(1)]
            steps = [space.columns[c].resolution or 0.0 for c in (i, j, k)]
            tolerance = max(steps) / 2 or 1e-9 * float(np.abs(some).max(initial=0.0))
            head = some[:50]
            if len(some) < 20 or (np.abs(head[:, 0] - head[:, 1] - head[:, 2]) > tolerance).any():
                continue
            if (np.abs(some[:, 0] - some[:, 1] - some[:, 2]) > tolerance).any() or (some[:, 1:].std(0) == 0).any():
                continue
            yield Constraint("+", tuple(space.columns[c].name for c in (i, j, k)), tolerance=tolerance)


def _dependencies(values: np.ndarray, codes: Sequence[int], space: Table) -> Iterator[Constraint]:
    for i, j in permutations(codes, 2):
        a, b = (cells.astype(np.int64) for cells in _together(values, i, j))
        if len(a) < 2:
            continue
        follows = np.full(space.columns[i].levels or 0, -1)
        follows[a] = b
        if (follows[a] != b).any():
            continue
        shares = np.bincount(b) / len(b)
        if not _by_chance(float((shares**2).sum()), len(a) - len(np.unique(a))):
            names = (space.columns[i].name, space.columns[j].name)
            yield Constraint("->", names, tuple(int(code) for code in follows))


def _together(values: np.ndarray, i: int, j: int) -> tuple[np.ndarray, np.ndarray]:
    """Cells of two columns in the rows that have both."""
    both = values[:, [i, j]]
    both = both[~np.isnan(both).any(1)]
    return both[:, 0], both[:, 1]


def _by_chance(probability: float, times: int) -> bool:
    """Whether something of this probability may well happen every time."""
    return times * math.log(max(probability, 1e-300)) > _CHANCE
