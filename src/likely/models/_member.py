"""The laws of all cells in one order, or given any others: a counted sketch, a network that changes it, and a head.

See :mod:`likely.models.made`, whose members these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from likely.contract import Batches, Space, Unsupported
from likely.data.spelling import Spelling
from likely.distributions import Distribution, head
from likely.distributions.guess import follow, following
from likely.distributions.heads import BernoulliHead, CategoricalHead, Head, TableHead
from likely.distributions.single import one_cell
from likely.inference.memory import Memory
from likely.inference.neighbours import Neighbours
from likely.inference.normal import MOST_FEATURES, JointNormal
from likely.inference.structure import Floats, Graph, Rows, Search, Sketch
from likely.networks import Features, full_precision
from likely.networks.cells import KnowingCells, MaskedCells
from likely.networks.features import PiecewiseLinear

#: Rows to which the joint normal law is fitted.
NORMAL_ROWS = 5000
#: Least probability of a code that the joint normal law may guess.
_LEAST_SHARE = 0.005
#: Logit of a code that cannot be.
_NEVER = -1e4


class _Bias(nn.Module):
    """The output layer of a head whose other numbers come from elsewhere: it adds a bias to them."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(numbers))

    def forward(self, numbers: Tensor) -> Tensor:
        return numbers + self.bias


class Member(nn.Module):
    """One order, its sketch, its network and its head.

    Args:
        order: the cells in their order, unless ``learns_order``.
        free: whether cells may be put before the others.
        sketched: whether it has a sketch.
        context: width of the context vector, 0 if there is none.
    """

    order: Tensor
    follows: Tensor
    left: Tensor
    atom_logits: Tensor

    def __init__(
        self,
        spelling: Spelling,
        order: Sequence[int],
        *,
        learns_order: bool,
        free: bool,
        any_order: bool,
        sketched: bool,
        context: int,
        hidden: Sequence[int],
        activation: str,
        dropout: float,
        embedding_dim: int,
        parts: int,
        likelihood: str,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.spelling, self.learns_order, self.free, self.any_order = spelling, learns_order, free, any_order
        space = spelling.inner
        self.features = Features(space, embedding_dim)
        numeric = [j for j, column in enumerate(spelling.columns) if column.numeric]
        self.numeric = numeric
        self.parts = PiecewiseLinear(len(numeric), parts) if numeric and parts else None
        inputs = self.features.cell_of_feature() + [j for j in numeric for _ in range(parts)]
        self.head = _head(likelihood, space, options)
        self.neighbours: Neighbours | None = None
        if sketched and any_order and isinstance(self.head, TableHead):
            neighbours = Neighbours(spelling.levels)
            cell = neighbours.normal.cell
            if 0 < len(cell) <= MOST_FEATURES:
                self.neighbours = neighbours
                inputs = inputs + cell + cell
                #: logits of the atoms before any guess
                self.register_buffer("atom_logits", torch.zeros(self.head.atoms.shape))
        outputs = self.head.cell_of_number()
        self.register_buffer("order", torch.tensor(list(order)))
        network: type[MaskedCells | KnowingCells] = KnowingCells if any_order else MaskedCells
        self.network: MaskedCells | KnowingCells = network(inputs, outputs, context, hidden, activation, dropout)
        self.sketch: Sketch | None = None
        if sketched and not any_order and isinstance(self.head, TableHead | CategoricalHead | BernoulliHead):
            self.sketch = Sketch(spelling.levels, isinstance(self.head, BernoulliHead))
        self.memory = Memory(spelling.levels) if self.sketch is not None and isinstance(self.head, TableHead) else None
        if isinstance(self.head, TableHead):
            #: which numeric columns follow a normal guess (shape (columns, 1)), what deviation the sketch leaves them
            self.register_buffer("follows", torch.zeros(len(numeric), 1))
            self.register_buffer("left", torch.ones(len(numeric)))
        self._mask()
        self.register_load_state_dict_post_hook(lambda module, _: module._mask())

    @property
    def cells_in_order(self) -> list[int]:
        """The cells in their order."""
        return [int(t) for t in self.order.tolist()]

    def _mask(self) -> None:
        """Set the masks of the network from the order."""
        if isinstance(self.network, MaskedCells):
            self.network.mask(self.cells_in_order)

    # From cells to their law ---------------------------------------------------------------------------------

    def law(
        self, x: Tensor, context: Tensor | None, only: int | None = None, own: Tensor | None = None
    ) -> Distribution:
        """The law of every cell given the known ones that come before it (with any order: all known ones).

        Args:
            x: shape ``(n, cells)``, NaN where unknown or missing.
            only: the cell that is asked for, if the laws of the others do not matter.
            own: the same rows with all their cells, where some are hidden: they are no neighbours of themselves.
        """
        dtype: torch.dtype = self.head.output.bias.dtype  # type: ignore[assignment,union-attr]
        shown = x if self.spelling.columns or self.spelling.inner.missing else x.nan_to_num(0.0)
        h = self.features(shown, dtype)  # type: ignore[arg-type]
        if self.parts is not None:
            h = torch.cat([h, self.parts(x[:, self.numeric], dtype)], 1)
        guess: Tensor | None = None
        if self.neighbours is not None:
            mean, deviation = self.neighbours(x.detach(), own)
            h = torch.cat([h, mean.to(dtype), deviation.to(dtype)], 1)
            guess = self._guessed(self.neighbours.normal, mean, deviation).to(dtype)
        numbers = full_precision(self.network(h, context))
        if self.sketch is not None:
            numbers = numbers + self._sketched(x, only).to(numbers.dtype)
        if guess is not None:
            numbers = numbers + guess
        return self.head(self._possible(x, numbers))

    def cell(self, x: Tensor, t: int, context: Tensor | None) -> Distribution:
        """The law of one cell, shape ``(n, 1)``."""
        return one_cell(self.law(x, context, t), t)

    def _sketched(self, x: Tensor, only: int | None) -> Tensor:
        assert self.sketch is not None
        log_probs, means = self.sketch(x.detach())
        if not isinstance(self.head, TableHead) or not self.numeric:
            return log_probs
        deviations, near = self.left.to(means).expand_as(means), None
        if self.memory is not None and not self.memory.empty:
            log_probs = self.memory.codes(x, log_probs, only)
            some = [i for i, a in enumerate(self.memory.of_numbers.tolist()) if a and only in (None, self.numeric[i])]
            if some:
                found = self.memory.numbers_near(x, self._standard(self.head, x), means)
                near = torch.tensor(some, device=x.device), *(piece[:, some] for piece in found)
        return torch.cat([log_probs, following(self.head, self.follows, means, deviations, near)], 1)

    def _standard(self, head: TableHead, x: Tensor) -> Tensor:
        """The numeric cells in standard units."""
        return (x[:, self.numeric].to(head.unit) - head.location) / head.unit

    def _guessed(self, normal: JointNormal, mean: Tensor, deviation: Tensor) -> Tensor:
        """The guesses as numbers for the head: logits of codes, means and scales of numeric columns."""
        head, count = self.head, len(normal.numeric)
        assert isinstance(head, TableHead)
        places = [count + i for i in range(len(normal.cell) - count)]
        pieces, at = [], 0
        for j, levels in zip(head.coded, head.levels):
            if any(j == column for column, _ in normal.coded):
                pieces.append(mean[:, places[at : at + levels]].clamp(_LEAST_SHARE, 1.0).log())
                at += levels
            else:
                pieces.append(mean.new_zeros(len(mean), levels))
        if count:
            here = mean[:, :count], deviation[:, :count]
            pieces.append(following(head, self.follows, *here, atom_logits=self.atom_logits))
        return torch.cat(pieces, 1)

    def _possible(self, x: Tensor, numbers: Tensor) -> Tensor:
        """The numbers without the codes that cannot be: members that the last cluster does not have."""
        for j, (size, levels) in self.spelling.split.items():
            assert isinstance(self.head, TableHead)
            start = sum(self.head.levels[: self.head.coded.index(j)])
            last = (x[:, j - 1] == self.spelling.levels[j - 1] - 1).unsqueeze(1)
            rest = levels - (self.spelling.levels[j - 1] - 1) * size
            place = torch.arange(numbers.shape[1], device=x.device)
            never = last & (place >= start + rest) & (place < start + size)
            numbers = torch.where(never, torch.full_like(numbers, _NEVER), numbers)
        return numbers

    # Beginning -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Batches, rows: Tensor | None, whole: bool) -> None:
        """Scales and biases from the batches; order and sketch from a sample of their rows, or from the ``whole``."""
        self.features.initialise(batches)
        if self.parts is not None:
            self.parts.initialise(x[:, self.numeric] for x, _ in batches)
        self.head.initialise(batches)
        if self.sketch is not None and rows is not None and len(rows):
            self._sketch(self.sketch, rows, self._recalled() if whole else [])
        if self.neighbours is not None and rows is not None and len(rows):
            self._begin_joint(self.neighbours, rows)

    def _begin_joint(self, neighbours: Neighbours, rows: Tensor) -> None:
        """Fit the joint normal law and its neighbours, and let the head begin at their guesses."""
        head, normal = self.head, neighbours.normal
        assert isinstance(head, TableHead)
        neighbours.fit(rows[:NORMAL_ROWS], head.location, head.unit)
        bias = head.output.bias
        assert isinstance(bias, Tensor)
        guessed = {j for j, _ in normal.coded}
        at = 0
        for j, levels in zip(head.coded, head.levels):
            if j in guessed:
                bias[at : at + levels] = 0.0
            at += levels
        for i, row in enumerate(bias[at:].reshape(-1, head.per_column)):
            self.follows[i] = float(follow(head, row, i, rows[:, self.numeric[i]]))
            self.atom_logits[i] = row[3 * head.components :][: head.atoms.shape[1]]

    def _recalled(self) -> list[int]:
        """Columns whose values come again, though their grid is fine."""
        if not isinstance(self.head, TableHead) or not self.head.recall:
            return []
        return [j for j, size in zip(self.numeric, self.head.recalled_sizes.tolist()) if size]

    def _sketch(self, sketch: Sketch, cells: Tensor, recalled: Sequence[int]) -> None:
        """Learn graph and order; the first of the recalled columns that says something of others is remembered."""
        location, unit = np.zeros(0), np.ones(0)
        if isinstance(self.head, TableHead):
            location, unit = self.head.location.cpu().numpy(), self.head.unit.cpu().numpy()
        x = cells.numpy().copy()
        x[:, self.numeric] = (x[:, self.numeric] - location) / unit
        rows = Rows(x, self.spelling.levels)
        left = np.ones(0)
        for column in [*recalled, None]:
            first = [column] if column is not None and self.free else []
            search = Search(rows, required={j: j - 1 for j in self.spelling.split}, roots=first)
            rest = [j for j in self.cells_in_order if j not in first]
            graph: Graph = search.graph(None if self.learns_order else first + rest)
            left = sketch.fit(rows, graph, search, location, unit)
            if column is not None and self._remember(sketch, column, graph.order, cells, left):
                break
        self.order.copy_(torch.tensor(graph.order))
        self._mask()
        bias = self.head.output.bias
        assert isinstance(bias, Tensor)
        coded = sum(levels if not sketch.binary else 1 for levels in self.spelling.levels if levels)
        bias[:coded] = 0.0
        if isinstance(self.head, TableHead) and self.numeric:
            self.left.copy_(torch.from_numpy(left))
            for i, row in enumerate(bias[coded:].reshape(len(self.numeric), -1)):
                self.follows[i] = float(follow(self.head, row, i, cells[:, self.numeric[i]]))

    def _remember(self, sketch: Sketch, column: int, order: Sequence[int], cells: Tensor, left: Floats) -> bool:
        """Remember the values of a column, if they say something of those after it in the order."""
        assert self.memory is not None and isinstance(self.head, TableHead)
        log_probs, means = map(torch.cat, zip(*(sketch(x) for x in cells.split(4096))))
        after = order[list(order).index(column) + 1 :]
        z = self._standard(self.head, cells)
        self.memory.fit(column, after, cells, z, log_probs, means, torch.from_numpy(left))
        return not self.memory.empty


def _head(likelihood: str, space: Space, options: dict[str, Any]) -> Head:
    """The head of that name, whose output layer is a bias: its numbers are made before it."""
    made = head(likelihood, space, (1,), **options)
    if not isinstance(made, TableHead) and made.__class__.__name__ == "MultinomialHead":
        raise Unsupported("likelihood: 'multinomial' makes a total of the cells, which this model gives one by one")
    made.output = _Bias(len(made.cell_of_number()))
    return made
