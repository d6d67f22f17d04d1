"""A source of strongly dependent data on any space, whose density is known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from likely.contract import Binary, Counts, Integers, Reals, Space, Table, Tokens


@dataclass(frozen=True)
class Cell:
    """One dimension of a space: a code below ``levels``; else a count, a grid of spacing ``step``, or a continuum."""

    levels: int | None = None
    count: bool = False
    step: float | None = None
    missing: bool = False


def cells_of(space: Space) -> list[Cell]:
    """The cells of one example in the order in which a batch is flattened."""
    if isinstance(space, Table):
        return [Cell(c.levels, False, c.resolution, c.missing) for c in space.columns]
    if isinstance(space, Binary):
        cell = Cell(levels=2)
    elif isinstance(space, Integers):
        cell = Cell(levels=space.levels)
    elif isinstance(space, Tokens):
        cell = Cell(levels=space.vocab)
    elif isinstance(space, Counts):
        cell = Cell(count=True)
    elif isinstance(space, Reals):
        cell = Cell()
    else:
        raise ValueError(f"space: expected one of likely.contract, got {type(space).__name__}")
    return [replace(cell, missing=space.missing)] * space.dims


def batch_of(space: Space, cells: Tensor) -> Tensor:
    """A batch of the space from flattened cells (float64): float32 where that holds every value exactly."""
    dtype = torch.float64 if isinstance(space, (Table, Reals)) else torch.float32
    return cells.reshape(-1, *space.shape).to(dtype)


class Source:
    """A mixture of three prototypes with independent cells, on any space: log p(x | c) = log Σₖ πₖ(c) Πⱼ p(xⱼ | k).

    Its cells depend on one another strongly, and its density is known in closed form, so that the cross-entropy of a
    model can be held against its entropy.  Cells that may be missing are missing at random with probability 0.2.

    >>> source = Source(Binary((2, 3)), seed=0)
    >>> x, _ = source.sample(5, torch.Generator().manual_seed(0))
    >>> x.shape, source.log_prob(x).shape
    (torch.Size([5, 2, 3]), torch.Size([5]))

    Args:
        space: space of the examples.
        condition: space of the condition, or None; it moves the weights of the prototypes.
        seed: of the parameters.
        weights: π, weights of the prototypes.
        spread: 1, or a factor by which every cell strays further from its prototype.
    """

    missing_rate = 0.2

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        seed: int = 0,
        weights: Sequence[float] = (0.4, 0.35, 0.25),
        spread: float = 1.0,
    ) -> None:
        self.space, self.condition = space, condition
        generator = torch.Generator().manual_seed(seed)
        self.cells = [PrototypeCell(cell, j, generator, spread) for j, cell in enumerate(cells_of(space))]
        self._weights = torch.tensor(weights, dtype=torch.float64)
        self._condition_cells = cells_of(condition) if condition is not None else []

    def sample(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        """``n`` examples and the condition of each (None without one)."""
        condition = self.sample_condition(n, generator)
        weights = self._class_log_weights(n, condition).exp()
        classes = torch.multinomial(weights, 1, generator=generator)[:, 0]
        columns = [cell.sample(classes, generator) for cell in self.cells]
        x = self._with_holes(torch.stack(columns, 1), cells_of(self.space), generator)
        return batch_of(self.space, x), condition

    def sample_condition(self, n: int, generator: torch.Generator) -> Tensor | None:
        """``n`` conditions of independent cells: codes are uniform, numbers normal or their nearest grid point."""
        if self.condition is None:
            return None
        columns = []
        for cell in self._condition_cells:
            if cell.levels is not None:
                columns.append(torch.randint(cell.levels, (n,), generator=generator).double())
            else:
                normal = torch.randn(n, dtype=torch.float64, generator=generator)
                values = 2.0 * normal.abs() if cell.count else 1.5 * normal
                spacing = 1.0 if cell.count else cell.step
                columns.append(values if spacing is None else spacing * (values / spacing).round())
        cells = self._with_holes(torch.stack(columns, 1), self._condition_cells, generator)
        return batch_of(self.condition, cells)

    def prototype(self, u: Tensor) -> Tensor:
        """The prototype at uniform ``u``, where there is no condition."""
        return torch.searchsorted(self._weights.cumsum(0)[:-1], u.contiguous())

    def log_marginal(self, values: Tensor, j: int) -> Tensor:
        """log p(xⱼ) of one cell in nats, where there is no condition: shape ``(batch,)``."""
        return (self._weights.log() + self.cells[j].log_prob(values)).logsumexp(1)

    def log_prob(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """log p(x | c) of the observed cells in nats, float64: shape ``(batch,)``."""
        if (self.condition is None) != (condition is None):
            raise ValueError(f"condition: expected a batch of {self.condition}, got {condition}")
        total = self._class_log_weights(len(x), condition)
        for cell, values in zip(self.cells, x.reshape(len(x), -1).double().T):
            observed = ~torch.isnan(values)
            total = total + torch.where(observed[:, None], cell.log_prob(values.nan_to_num(0.0)), 0.0)
        return total.logsumexp(1)

    def _class_log_weights(self, n: int, condition: Tensor | None) -> Tensor:
        logits = self._weights.log().expand(n, -1).clone()
        if condition is not None:
            for j, (cell, values) in enumerate(zip(self._condition_cells, condition.reshape(n, -1).double().T)):
                middle = (cell.levels - 1) / 2 if cell.levels is not None else (2.0 if cell.count else 0.0)
                push = 1.5 * torch.tanh(values.nan_to_num(middle) - middle)
                logits[:, j % 3] += push
                logits[:, (j + 1) % 3] -= push
        return logits.log_softmax(1)

    def _with_holes(self, x: Tensor, cells: Sequence[Cell], generator: torch.Generator) -> Tensor:
        allowed = torch.tensor([cell.missing for cell in cells])
        holes = torch.rand(x.shape, generator=generator) < self.missing_rate
        return torch.where(holes & allowed, math.nan, x)


class PrototypeCell:
    """p(xⱼ | k) of one cell for the three prototypes."""

    def __init__(self, cell: Cell, j: int, generator: torch.Generator, spread: float) -> None:
        self.cell = cell
        if cell.levels is not None:
            offset = int(torch.randint(cell.levels, (), generator=generator))
            code = (torch.tensor([0, cell.levels - 1, j]) + offset) % cell.levels
            rest = 0.25 + torch.rand(3, cell.levels, generator=generator, dtype=torch.float64)
            mass = 0.12 * spread * rest / rest.sum(1, keepdim=True)
            mass[torch.arange(3), code] += 1 - 0.12 * spread
            self.table = mass.log()
        elif cell.count:
            self.rate = torch.tensor([0.7, 3.0, 8.0], dtype=torch.float64).roll(j) * spread
        else:
            unit = max(1.0 + j % 2, 2.0 * (cell.step or 0.0))
            self.mean = (torch.tensor([-1.5, 0.5, 2.5], dtype=torch.float64).roll(j) + 0.5 * (j + 1)) * unit
            self.deviation = torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64) * unit * spread

    def sample(self, k: Tensor, generator: torch.Generator) -> Tensor:
        if self.cell.levels is not None:
            return torch.multinomial(self.table[k].exp(), 1, generator=generator)[:, 0].double()
        if self.cell.count:
            return torch.poisson(self.rate[k], generator=generator)
        noise = torch.randn(k.shape, dtype=torch.float64, generator=generator)
        x = self.mean[k] + self.deviation[k] * noise
        return x if self.cell.step is None else self.cell.step * (x / self.cell.step).round()

    def quantile(self, u: Tensor, k: Tensor) -> Tensor:
        """The value at uniform ``u`` under prototype ``k``."""
        if self.cell.levels is not None:
            return (u[:, None] > self.table.exp().cumsum(1)[k][:, :-1]).sum(1).double()
        if self.cell.count:
            values = torch.arange(64, dtype=torch.float64)
            return (u[:, None] > self.log_prob(values).exp().cumsum(0).T[k][:, :-1]).sum(1).double()
        x = self.mean[k] + self.deviation[k] * torch.special.ndtri(u)
        return x if self.cell.step is None else self.cell.step * (x / self.cell.step).round()

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x | k) in nats for every k: shape ``(batch, 3)``."""
        if self.cell.levels is not None:
            return self.table.T[x.long()]
        x = x[:, None]
        if self.cell.count:
            return x * self.rate.log() - self.rate - torch.lgamma(x + 1)
        z = (x - self.mean) / self.deviation
        if self.cell.step is None:
            return -0.5 * z.square() - self.deviation.log() - 0.5 * math.log(2 * math.pi)
        half = 0.5 * self.cell.step / self.deviation
        low, high = -z.abs() - half, -z.abs() + half  # mirrored to the left tail, where differences keep their digits
        log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
        return log_high + torch.log(-torch.expm1(log_low - log_high))
