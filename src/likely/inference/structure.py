r"""Which columns speak of which: a sparse directed graph found greedily, and the laws that it stands for.

    log p(x) = Σ_j log p(x_j | x_{pa(j)})                                a Bayesian network (Pearl 1988)        (1)
    S = Σ_j [max log-likelihood of column j given its parents − c k_j]   k_j free parameters                    (2)

The graph maximises (2) by adding, removing and turning round one edge at a time (Heckerman, Geiger & Chickering 1995,
Machine Learning 20, 197-243, section 5), or, for a given order, by adding parents among the columns before
(K2, Cooper & Herskovits 1992).  c = 1 is Akaike's price of a parameter, c = ½ log N Schwarz's; the default is between.

A column of categories has a table of its codes for every state of its parents.  Numeric parents enter by the eighth of
their values that they fall into, and a missing parent has a state of its own.  A table is smoothed towards the one
without the last parent, the first towards the column's marginal:

    p_k(v | s) = (n(v, s) + a p_{k−1}(v | s′)) / (n(s) + a)              a: highest leave-one-out likelihood    (3)

A numeric column is normal, with a mean linear in its numeric parents and in indicators of the states of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

#: c of equation (2).
PENALTY = 3.0
MOST_PARENTS = 5
#: Parts into which the values of a numeric parent are cut.
BINS = 8
#: Standard deviations beyond which a numeric parent says nothing more.
REACH = 8.0
#: Columns with more levels are parents of no one, and have only a table given their cluster (see ``required``).
MOST_LEVELS = 512
_PSEUDOCOUNTS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_RIDGE = 1e-6


@dataclass
class Graph:
    """A directed graph without cycles.

    Args:
        order: the columns, every one after its parents.
        parents: of each column, the one that says most about it first.
        score: equation (2), in nats over the rows it was learned from.
    """

    order: list[int]
    parents: list[list[int]]
    score: float


@dataclass
class Rows:
    """Rows as the search sees them.

    Args:
        x: cells, shape ``(n, columns)``, NaN where missing; codes, or numbers in standard units.
        levels: number of codes of each column, 0 for a numeric one.
    """

    x: Floats
    levels: Sequence[int]
    cuts: Floats = field(init=False)
    codes: Codes = field(init=False)
    states: list[int] = field(init=False)

    def __post_init__(self) -> None:
        n, columns = self.x.shape
        self.cuts = np.full((columns, BINS - 1), np.inf)
        self.codes = np.empty((n, columns), np.int64)
        self.states = []
        for j, levels in enumerate(self.levels):
            cells = self.x[:, j]
            absent = np.isnan(cells)
            known = cells[~absent]
            if levels:
                codes = np.where(absent, levels, np.nan_to_num(cells)).astype(np.int64)
            else:
                if len(known):
                    self.cuts[j] = np.quantile(known, np.arange(1, BINS) / BINS)
                codes = np.where(absent, BINS, (cells[:, None] >= self.cuts[j]).sum(1))
            self.codes[:, j] = codes
            self.states.append((levels or BINS) + 1)


class Search:
    """Greedy search of the graph that maximises equation (2).

    >>> rng = np.random.default_rng(0)
    >>> a = rng.integers(0, 2, 500)
    >>> b = np.where(rng.random(500) < 0.1, 1 - a, a)
    >>> rows = Rows(np.stack([a, b, rng.integers(0, 2, 500)], 1).astype(float), [2, 2, 2])
    >>> sorted(map(len, Search(rows).graph().parents))
    [0, 0, 1]

    Args:
        rows: what to learn from.
        penalty: c.
        most_parents: of one column.
        required: for a column its only parent, if that is not to be learned.
        roots: columns without parents, which come first.
    """

    def __init__(
        self,
        rows: Rows,
        penalty: float = PENALTY,
        most_parents: int = MOST_PARENTS,
        required: dict[int, int] | None = None,
        roots: Sequence[int] = (),
    ) -> None:
        self.rows, self.penalty, self.most_parents, self.required = rows, penalty, most_parents, required or {}
        self.roots = list(roots)
        self.n, self.columns = rows.x.shape
        self._scores: dict[tuple[int, frozenset[int]], float] = {}
        self._moments: dict[int, tuple[Floats, Floats, float, int]] = {}
        self._blocks, self._features = _features(rows) if 0 in rows.levels else ([], np.zeros((0, 0)))

    # The score -----------------------------------------------------------------------------------------------

    def score(self, j: int, parents: frozenset[int]) -> float:
        """What column j adds to equation (2) with these parents; −inf where they are not allowed."""
        key = (j, parents)
        if key not in self._scores:
            self._scores[key] = self._score(j, parents)
        return self._scores[key]

    def _score(self, j: int, parents: frozenset[int]) -> float:
        if len(parents) > (0 if j in self.roots else self.most_parents):
            return -math.inf
        if j in self.required:
            return 0.0 if parents == {self.required[j]} else -math.inf
        if any(p in self.required or self.rows.states[p] > MOST_LEVELS for p in parents):
            return -math.inf
        return self._of_codes(j, parents) if self.rows.levels[j] else self._of_number(j, parents)

    def _of_codes(self, j: int, parents: frozenset[int]) -> float:
        levels = self.rows.levels[j]
        state, size = _states(self.rows, sorted(parents))
        if parents and size * levels > 4 * self.n + 4096:
            return -math.inf
        code = self.rows.codes[:, j]
        known = code < levels
        table = np.bincount(state[known] * levels + code[known], minlength=size * levels).reshape(size, levels)
        totals = table.sum(1)
        nats = _entropy_sum(table) - _entropy_sum(totals)
        free = max(0, int((table.sum(0) > 0).sum()) - 1) * int((totals > 0).sum())
        return nats - self.penalty * free

    def _of_number(self, j: int, parents: frozenset[int]) -> float:
        picked = self._picked(sorted(parents))
        _, squares, n = self.regression(j, picked)
        return -0.5 * n * math.log(squares / max(n, 1)) - self.penalty * len(picked)

    def _picked(self, parents: Sequence[int]) -> list[int]:
        return [0, *(i for p in parents for i in self._blocks[p])]

    def regression(self, j: int, picked: Sequence[int]) -> tuple[Floats, float, int]:
        """Coefficients of column j on some features, the squares that are left, and on how many rows."""
        if j not in self._moments:
            y = self.rows.x[:, j]
            known = ~np.isnan(y)
            f, y = self._features[known], y[known]
            self._moments[j] = f.T @ f, f.T @ y, float(y @ y), len(y)
        gram, along, squares, n = self._moments[j]
        chosen = gram[np.ix_(picked, picked)] + _RIDGE * (n + 1) * np.eye(len(picked))
        coefficients: Floats = np.linalg.solve(chosen, along[picked]).astype(np.float64, copy=False)
        return coefficients, max(squares - float(coefficients @ along[picked]), 1e-6 * n + 1e-12), n

    # The search ----------------------------------------------------------------------------------------------

    def graph(self, order: Sequence[int] | None = None) -> Graph:
        """The best graph found: any, or one whose columns stand in this order."""
        parents = self._climb() if order is None else self._within(list(order))
        found = list(order) if order is not None else _sorted(parents, self.roots)
        return Graph(found, [self._ranked(j, parents[j]) for j in range(self.columns)], self._total(parents))

    def _start(self) -> list[frozenset[int]]:
        return [frozenset({self.required[j]} if j in self.required else ()) for j in range(self.columns)]

    def _total(self, parents: Sequence[frozenset[int]]) -> float:
        return sum(self.score(j, p) for j, p in enumerate(parents))

    def _within(self, order: list[int]) -> list[frozenset[int]]:
        """For every column the parents before it in the order, added and removed one at a time."""
        parents = self._start()
        for place, j in enumerate(order):
            while True:
                changes = [parents[j] ^ {i} for i in order[:place]]
                best = max(changes, key=lambda p: self.score(j, p), default=parents[j])
                if not self.score(j, best) > self.score(j, parents[j]) + 1e-9:
                    break
                parents[j] = best
        return parents

    def _climb(self) -> list[frozenset[int]]:
        parents = self._start()
        gain = np.full((self.columns, self.columns), -math.inf)

        def refresh(j: int) -> None:
            now = self.score(j, parents[j])
            for i in range(self.columns):
                if i != j:
                    gain[i, j] = self.score(j, parents[j] ^ {i}) - now

        for j in range(self.columns):
            refresh(j)
        while True:
            best, moves = 1e-9, []
            paths = _paths(parents)
            for i in range(self.columns):
                for j in range(self.columns):
                    if i not in parents[j]:
                        if gain[i, j] > best and not paths[j, i]:
                            best, moves = gain[i, j], [(i, j)]
                        continue
                    if gain[i, j] > best:
                        best, moves = gain[i, j], [(i, j)]
                    turned = gain[i, j] + gain[j, i]
                    if turned > best and not any(paths[i, p] for p in parents[j] if p != i):
                        best, moves = turned, [(i, j), (j, i)]
            if not moves:
                return parents
            for i, j in moves:
                parents[j] = parents[j] ^ {i}
            for _, j in moves:
                refresh(j)

    def _ranked(self, j: int, parents: frozenset[int]) -> list[int]:
        """The parents, each the one that adds most to those before it."""
        ranked: list[int] = []
        while len(ranked) < len(parents):
            rest = sorted(parents - set(ranked))
            ranked.append(max(rest, key=lambda p: self.score(j, frozenset([*ranked, p]))))
        return ranked


def _states(rows: Rows, parents: Sequence[int]) -> tuple[Codes, int]:
    """The joint state of the parents in each row, and how many states there are."""
    state, size = np.zeros(len(rows.x), np.int64), 1
    for p in parents:
        state, size = state * rows.states[p] + rows.codes[:, p], size * rows.states[p]
    return state, size


def _entropy_sum(counts: Any) -> float:
    positive = counts[counts > 0].astype(np.float64)
    return float((positive * np.log(positive)).sum())


def _features(rows: Rows) -> tuple[list[list[int]], Floats]:
    """What a numeric column is regressed on: 1, then for each column its features, of which the places are given."""
    pieces, blocks, at = [np.ones((len(rows.x), 1))], [], 1
    for j, levels in enumerate(rows.levels):
        if not levels:
            values = np.clip(np.nan_to_num(rows.x[:, j]), -REACH, REACH)[:, None]
            absent = np.isnan(rows.x[:, j : j + 1]).astype(np.float64)
            piece = np.concatenate([values, absent], 1) if absent.any() else values
        elif rows.states[j] <= 32:
            seen = rows.states[j] - (not np.isnan(rows.x[:, j]).any())
            piece = (rows.codes[:, j : j + 1] == np.arange(1, seen)).astype(np.float64)
        else:
            piece = np.zeros((len(rows.x), 0))
        pieces.append(piece)
        blocks.append(list(range(at, at + piece.shape[1])))
        at += piece.shape[1]
    return blocks, np.concatenate(pieces, 1)


def _paths(parents: Sequence[frozenset[int]]) -> NDArray[np.bool_]:
    """Whether there is a path from one column to another."""
    reach = np.zeros((len(parents), len(parents)), bool)
    for j, of in enumerate(parents):
        reach[list(of), j] = True
    for k in range(len(parents)):
        reach |= np.outer(reach[:, k], reach[k])
    return reach


def _sorted(parents: Sequence[frozenset[int]], roots: Sequence[int]) -> list[int]:
    """The columns, every one after its parents, the roots first; the first that can come, comes."""
    order = list(roots)
    while len(order) < len(parents):
        order.append(next(j for j in range(len(parents)) if j not in order and parents[j] <= set(order)))
    return order


class Sketch(nn.Module):
    """A fitted graph as numbers for a likelihood's head: log-probabilities of codes, means of numeric columns.

    Until :meth:`fit` it says nothing: all numbers are 0.  It has no parameters; what is learned from counts stays so.

    Args:
        levels: number of codes of each column, 0 for a numeric one.
        binary: whether a column of two codes has one number, log p(1) − log p(0), and not two.
    """

    starts: Tensor
    strides: Tensor
    cuts: Tensor
    table: Tensor
    slopes: Tensor
    effects: Tensor
    absent_effects: Tensor
    constants: Tensor
    location: Tensor
    unit: Tensor

    def __init__(self, levels: Sequence[int], binary: bool = False) -> None:
        super().__init__()
        self.levels, self.binary = list(levels), binary
        columns = len(levels)
        self.coded = [j for j, number in enumerate(levels) if number]
        self.numeric = [j for j, number in enumerate(levels) if not number]
        states = [number + 1 for number in levels if number]
        of_output = [(i, v) for i, j in enumerate(self.coded) for v in range(levels[j])]
        self.register_buffer("_output_column", torch.tensor([i for i, _ in of_output]).long(), persistent=False)
        self.register_buffer("_output_code", torch.tensor([v for _, v in of_output]).long(), persistent=False)
        widths = torch.tensor([levels[j] for j in self.coded]).long()
        self.register_buffer("_width", widths, persistent=False)
        first = torch.tensor([0, *states[:-1]] if states else []).long().cumsum(0)
        self.register_buffer("_first_state", first, persistent=False)
        self._output_code: Tensor
        self._width: Tensor
        self._first_state: Tensor
        #: place of the first number of each column of codes in the table, −1 where there is none
        self.register_buffer("starts", torch.full((len(self.coded),), -1))
        #: what the state of a column counts in the joint state of the parents of another
        self.register_buffer("strides", torch.zeros(len(self.coded), columns, dtype=torch.int64))
        self.register_buffer("cuts", torch.full((len(self.numeric), BINS - 1), torch.inf, dtype=torch.float64))
        self.register_buffer("table", torch.zeros(1, dtype=torch.float64))
        numbers = len(self.numeric)
        self.register_buffer("slopes", torch.zeros(numbers, numbers, dtype=torch.float64))
        self.register_buffer("absent_effects", torch.zeros(numbers, numbers, dtype=torch.float64))
        rows = sum(states) if numbers else 0
        self.register_buffer("effects", torch.zeros(rows, numbers, dtype=torch.float64))
        self.register_buffer("constants", torch.zeros(numbers, dtype=torch.float64))
        self.register_buffer("location", torch.zeros(numbers, dtype=torch.float64))
        self.register_buffer("unit", torch.ones(numbers, dtype=torch.float64))

    @torch.no_grad()
    def fit(self, rows: Rows, graph: Graph, search: Search, location: Floats, unit: Floats) -> Floats:
        """Tables and regressions of a graph; returns the deviation left of each numeric column, in standard units.

        Args:
            rows: in standard units: (value − location) / unit.
            location, unit: of the numeric columns.
        """
        self.location.copy_(torch.from_numpy(location))
        self.unit.copy_(torch.from_numpy(unit))
        self.cuts.copy_(torch.from_numpy(rows.cuts[self.numeric]))
        tables: list[Floats] = []
        at = 0
        self.strides.zero_()
        for i, j in enumerate(self.coded):
            parents = graph.parents[j]
            stride = 1
            for p in reversed(parents):
                self.strides[i, p] = stride
                stride *= rows.states[p]
            table = np.log(smoothed(rows, j, parents))
            self.starts[i] = at
            tables.append(table.reshape(-1))
            at += table.size
        self.table = torch.from_numpy(np.concatenate([*tables, np.zeros(1)])).to(self.table)
        for buffer in (self.slopes, self.effects, self.absent_effects, self.constants):
            buffer.zero_()
        left = np.ones(len(self.numeric))
        for i, j in enumerate(self.numeric):
            left[i] = self._fit_number(i, j, rows, graph.parents[j], search)
        return left

    def _fit_number(self, i: int, j: int, rows: Rows, parents: Sequence[int], search: Search) -> float:
        picked = search._picked(parents)
        coefficients, squares, n = search.regression(j, picked)
        of = dict(zip(picked, coefficients))
        self.constants[i] = of[0]
        for p in parents:
            values = [of[k] for k in search._blocks[p]]
            if not rows.levels[p]:
                place = self.numeric.index(p)
                self.slopes[place, i] = values[0]
                self.absent_effects[place, i] = values[1] if len(values) > 1 else 0.0
            elif values:
                start = int(self._first_state[self.coded.index(p)])
                self.effects[start + 1 : start + 1 + len(values), i] = torch.tensor(values, dtype=torch.float64)
        return math.sqrt(squares / max(n, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers for the head, float64: log-probabilities ``(n, codes)`` and means ``(n, numeric columns)``.

        Args:
            x: cells in the units of the data, shape ``(n, columns)``, NaN where unknown.  Operations are chosen such
                that the results are the same on every machine.
        """
        absent = torch.isnan(x)
        # The state of every column: its code, or the part of its values; one more where it is unknown.
        known = torch.where(absent, torch.zeros_like(x), x)
        state = known.long()
        z = (known[:, self.numeric].to(self.unit) - self.location) / self.unit
        if self.numeric:
            part = (z.unsqueeze(-1) >= self.cuts).long().sum(-1)
            state[:, self.numeric] = torch.where(absent[:, self.numeric], torch.full_like(part, BINS), part)
        if self.coded:
            levels = self._width.expand(len(x), -1)
            state[:, self.coded] = torch.where(absent[:, self.coded], levels, state[:, self.coded])
        return self._log_probs(state), self._means(z, state, absent)

    def _log_probs(self, state: Tensor) -> Tensor:
        joint = (state.unsqueeze(1) * self.strides).sum(-1)  # (n, coded)
        start = self.starts + joint * self._width
        column: Tensor = self._output_column  # type: ignore[assignment]
        place = start[:, column] + self._output_code
        place = torch.where(self.starts[column] < 0, torch.full_like(place, len(self.table) - 1), place)
        numbers = self.table[place]
        return numbers[:, 1::2] - numbers[:, ::2] if self.binary else numbers

    def _means(self, z: Tensor, state: Tensor, absent: Tensor) -> Tensor:
        total = self.constants.expand(len(z), -1)
        for i, j in enumerate(self.numeric):
            gone = absent[:, j : j + 1]
            value = z[:, i : i + 1].clamp(-REACH, REACH)
            total = total + torch.where(gone, self.absent_effects[i].expand_as(total), value * self.slopes[i])
        if self.numeric:
            for i, j in enumerate(self.coded):
                total = total + self.effects[self._first_state[i] + state[:, j]]
        return total

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """The table has the size that the data gave it."""
        found = state_dict.get(f"{prefix}table")
        if found is not None:
            self.table = self.table.new_zeros(found.shape)
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def smoothed(rows: Rows, j: int, parents: Sequence[int]) -> Floats:
    """Equation (3): the probabilities of the codes of column j, shape ``(states of its parents, codes)``.

    >>> rows = Rows(np.array([[0.0, 0.0]] * 9 + [[1.0, 1.0]] * 9), [2, 2])
    >>> smoothed(rows, 1, [0]).round(2).tolist()                # of codes 0 and 1, and of an unknown one
    [[0.99, 0.01], [0.01, 0.99], [0.5, 0.5]]
    """
    levels, code = rows.levels[j], rows.codes[:, j]
    known = code < levels
    p: Floats = (np.bincount(code[known], minlength=levels)[None] + 0.5).astype(np.float64, copy=False)
    p /= p.sum()
    for k in range(1, len(parents) + 1):
        state, size = _states(rows, parents[:k])
        table = np.bincount(state[known] * levels + code[known], minlength=size * levels).reshape(size, levels)
        prior = np.repeat(p, rows.states[parents[k - 1]], 0)
        p = max((_shrunk(table, prior, a) for a in _PSEUDOCOUNTS), key=lambda found: found[0])[1]
    return p


def _shrunk(table: Codes, prior: Floats, a: float) -> tuple[float, Floats]:
    """The leave-one-out log-likelihood, nats, and the probabilities, with a pseudo-counts from the prior."""
    totals = table.sum(1, keepdims=True)
    left_out = (np.maximum(table - 1, 0) + a * prior) / (np.maximum(totals - 1, 0) + a)
    return float((table * np.log(left_out)).sum()), (table + a * prior) / (totals + a)
