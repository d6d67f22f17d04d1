"""Passes over a stream of batches: seen through a function, and statistics of them in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from likely.contract import Batches


class Seen:
    """Batches whose examples are seen through a function, in every pass anew; conditions stay.

    >>> [x.tolist() for x, _ in Seen([(torch.tensor([[1.0, 2.0]]), None)], lambda x: x[:, 1:])]
    [[[2.0]]]

    Args:
        batches: examples with their conditions, as often as they are asked for.
        see: takes examples, a batch of them, and gives what is to be seen of them.
    """

    def __init__(self, batches: Batches, see: Callable[[Tensor], Tensor]) -> None:
        self._batches, self._see = batches, see

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for x, condition in self._batches:
            yield self._see(x), condition


def first(batches: Batches, examples: int) -> tuple[Tensor, Tensor | None]:
    """The first batches together, up to the one that brings the number of ``examples``; with their conditions."""
    found, count = [], 0
    for x, condition in batches:
        found.append((x, condition))
        count += len(x)
        if count >= examples:
            break
    conditions = [condition for _, condition in found if condition is not None]
    return torch.cat([x for x, _ in found]), torch.cat(conditions) if conditions else None


class Moments:
    """Count, mean and variance of every cell over a stream of batches, missing cells left out.

    Batches are merged by the update of Chan, Golub & LeVeque (1983, The American Statistician 37, 242-247), which does
    not cancel for data far from zero.

    >>> moments = Moments(1)
    >>> moments.add(torch.tensor([[1.0], [2.0]])), moments.add(torch.tensor([[6.0], [float("nan")]]))
    (None, None)
    >>> moments.count.item(), moments.mean.item(), round(moments.variance().item(), 4)
    (3.0, 3.0, 4.6667)

    Args:
        cells: number of cells of an example.
        device: device of the batches.
    """

    def __init__(self, cells: int, device: torch.device | str = "cpu") -> None:
        self.count = torch.zeros(cells, dtype=torch.float64, device=device)
        self.mean, self._squares = torch.zeros_like(self.count), torch.zeros_like(self.count)

    def add(self, x: Tensor) -> None:
        """Add a batch of shape ``(batch, cells)``; NaN is a missing cell."""
        x = x.to(self.mean)
        present = ~torch.isnan(x)
        n = present.sum(0).to(self.count)
        mean = torch.where(present, x, 0.0).sum(0) / n.clamp(min=1.0)
        squares = torch.where(present, x - mean, 0.0).square().sum(0)
        total = self.count + n
        shift, share = mean - self.mean, n / total.clamp(min=1.0)
        self._squares += squares + shift.square() * self.count * share
        self.mean += shift * share
        self.count = total

    def variance(self) -> Tensor:
        """Mean squared deviation from the mean; 0 where nothing was seen."""
        return self._squares / self.count.clamp(min=1.0)


class Reservoir:
    """A uniform sample of at most ``size`` rows of a stream (Vitter 1985, ACM TOMS 11, 37-57, algorithm R).

    The sample depends on the order of the rows, not on how they are cut into batches.

    >>> reservoir = Reservoir(2, 1)
    >>> reservoir.add(torch.arange(100.0).unsqueeze(1))
    >>> reservoir.rows().shape
    torch.Size([2, 1])

    Args:
        size: largest number of rows.
        cells: number of cells of a row.
        seed: seed of the draw.
    """

    def __init__(self, size: int, cells: int, seed: int = 0) -> None:
        self._rows = np.full((size, cells), np.nan)
        self._random = np.random.default_rng(seed)
        self._seen = 0

    def add(self, x: Tensor) -> None:
        """Offer a batch of shape ``(batch, cells)``."""
        rows, size = x.detach().cpu().numpy(), len(self._rows)
        free = min(len(rows), max(0, size - self._seen))
        self._rows[self._seen : self._seen + free] = rows[:free]
        places = self._random.integers(0, np.arange(self._seen + free, self._seen + len(rows)) + 1)
        for row in np.flatnonzero(places < size):
            self._rows[places[row]] = rows[free + row]
        self._seen += len(rows)

    def rows(self) -> Tensor:
        """The sample, float64."""
        return torch.from_numpy(self._rows[: min(self._seen, len(self._rows))])


class Histogram:
    """Counts of the distinct values of a stream, at least the ``limit`` most frequent ones.

    Beyond four times ``limit`` values the rarer ones are dropped (lossy counting, Manku & Motwani 2002): a kept count
    is never too large, and the values kept at the end lack only what came before they were last dropped.

    >>> histogram = Histogram(limit=10)
    >>> histogram.add(torch.tensor([2.0, 1.0, 2.0]))
    >>> histogram.most_frequent(1)
    (tensor([2.], dtype=torch.float64), tensor([2]))

    Args:
        limit: number of values that are wanted.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._values = torch.empty(0, dtype=torch.float64)
        self._counts = torch.empty(0, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count values, shape ``(n,)``; none may be NaN."""
        new, new_counts = torch.unique(values.to("cpu", torch.float64), return_counts=True)
        merged, place = torch.unique(torch.cat([self._values, new]), return_inverse=True)
        counts = torch.zeros(len(merged), dtype=torch.int64)
        counts.index_add_(0, place, torch.cat([self._counts, new_counts]))
        self._values, self._counts = merged, counts
        if len(merged) > 4 * self._limit:
            self._values, self._counts = self.most_frequent(2 * self._limit)

    def most_frequent(self, number: int) -> tuple[Tensor, Tensor]:
        """At most ``number`` values in ascending order (float64), and their counts (int64)."""
        if len(self._values) <= number:
            return self._values, self._counts
        kept = self._counts.argsort(descending=True, stable=True)[:number].sort().values
        return self._values[kept], self._counts[kept]
