r"""What is remembered of a value that was seen before: the other cells of the rows that had it.

On a fine grid a value that comes again, such as a weight, a price or an amount, often belongs to rows of one kind.  Of
one column r whose values do so, every value m keeps counts n and sums of the rows that had it; of the other columns
that it says something about, the law given their parents' state s (:mod:`likely.inference.structure`) becomes

    p(x_j = v | s, m) = (n(v, m) + a p(v | s)) / (n(m) + a)                                         codes       (1)
    p(x_j | s, m) = w N((S(m) + a μ(s)) / (n(m) + a), δ²) + (1 − w) N(μ(s), σ²)                     numbers     (2)

with S(m) the sum of x_j over the rows with value m, and a, w and δ those of the highest leave-one-out likelihood.  A
row that is trained on leaves itself out of n and S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

#: Pseudo-counts a that are tried.
_PSEUDOCOUNTS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
#: Nats a row that a column has to gain, its most codes, and the most values that are remembered.
_LEAST_GAIN, _MOST_CODES, MOST_VALUES = 0.01, 64, 1 << 17
#: A numeric column of which one value has a larger share says nothing by a normal law.
_MOST_SAME = 0.5
#: Rounds of EM for w and δ.
_ROUNDS = 20
#: Least w, 1 − w and δ.
_LEAST_WEIGHT, _LEAST_SPREAD = 1e-3, 1e-2


class Memory(nn.Module):
    """Remembers the values of one column.  Until :meth:`fit` it remembers nothing and has no state.

    Args:
        levels: number of codes of each column, 0 for a numeric one.
    """

    #: Tensors of sizes that the data give: the column; its values, ascending; a of each column of codes and of numbers,
    #: 0 where nothing is remembered; w and δ of the numeric ones; counts of codes, of numbers and sums of every value.
    _names = ("column", "values", "of_codes", "of_numbers", "weight", "spread", "counts", "numbers", "sums")

    column: Tensor
    values: Tensor
    of_codes: Tensor
    of_numbers: Tensor
    weight: Tensor
    spread: Tensor
    counts: Tensor
    numbers: Tensor
    sums: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.coded = [j for j, number in enumerate(levels) if number]
        self.numeric = [j for j, number in enumerate(levels) if not number]
        self.levels = [levels[j] for j in self.coded]
        for name in self._names:
            self.register_buffer(name, None)

    @property
    def empty(self) -> bool:
        """Whether it remembers nothing."""
        return self.values is None

    # What it says ----------------------------------------------------------------------------------------------

    def codes(self, x: Tensor, log_probs: Tensor, only: int | None = None) -> Tensor:
        """Log-probabilities by equation (1), shape ``(n, codes)``.

        Args:
            x: cells in the units of the data, shape ``(n, columns)``, NaN where unknown.
            log_probs: log p(v | s), shape ``(n, codes)``.
            only: the column that is asked for; those of others may stay as they are.
        """
        place, known = self._places(x)
        pieces = []
        at = 0
        for j, piece, a in zip(self.coded, log_probs.split(self.levels, 1), self.of_codes.tolist()):
            start, at = at, at + piece.shape[1] * (a > 0)
            if a and only in (None, j):
                counts = torch.where(known.unsqueeze(1), self.counts[place, start:at], 0)
                if self.training:
                    counts = (counts - _one_hot(x[:, j], piece.shape[1])).clamp(min=0)
                total = counts.sum(1, keepdim=True).to(piece)
                piece = ((counts.to(piece) + a * piece.exp()) / (total + a)).log()
            pieces.append(piece)
        return torch.cat(pieces, 1) if pieces else log_probs

    def numbers_near(self, x: Tensor, z: Tensor, means: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of equation (2) the nearer mean, δ and w (0 where nothing is remembered), shape ``(n, numeric columns)``.

        Args:
            x: see :meth:`codes`.
            z: the numeric cells in standard units.
            means: μ(s), in standard units.
        """
        place, known = self._places(x)
        numbers = torch.where(known.unsqueeze(1), self.numbers[place], 0)
        sums = torch.where(known.unsqueeze(1), self.sums[place], 0.0)
        if self.training:
            seen = ~torch.isnan(z)
            numbers = (numbers - seen.long()).clamp(min=0)
            sums = torch.where(numbers > 0, sums - torch.where(seen, z, 0.0), 0.0)
        a = torch.where(self.of_numbers > 0, self.of_numbers, torch.ones_like(self.of_numbers))
        share = torch.where(numbers > 0, self.weight, torch.zeros_like(self.weight))
        return (sums + a * means) / (numbers + a), self.spread.expand_as(means), share

    def _places(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The place of each row's value among those remembered, and whether it is one of them."""
        cells = x[:, int(self.column)]
        place = torch.searchsorted(self.values, cells.to(self.values).contiguous()).clamp(max=len(self.values) - 1)
        return place, self.values[place] == cells

    # Fitting ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(
        self, column: int, after: Sequence[int], x: Tensor, z: Tensor, log_probs: Tensor, means: Tensor, left: Tensor
    ) -> None:
        """Remember the values of a numeric column, if they say enough about any other.

        Args:
            column: whose values are remembered.
            after: the columns that may know of it.
            x, z, log_probs, means: see :meth:`codes` and :meth:`numbers_near`; of all rows that are trained on.
            left: σ of each numeric column, in standard units.
        """
        seen = ~torch.isnan(x[:, column])
        values, which = torch.unique(x[seen, column], return_inverse=True)
        if not len(values) or len(values) > MOST_VALUES:
            return
        x, z, log_probs, means = x[seen], z[seen], log_probs[seen], means[seen]
        least = _LEAST_GAIN * len(seen)
        self.of_codes = torch.zeros(len(self.coded), dtype=torch.float64)
        tables = []
        for i, (j, n, log_p) in enumerate(zip(self.coded, self.levels, log_probs.split(self.levels, 1))):
            if j in after and n <= _MOST_CODES:
                own = _one_hot(x[:, j], n)
                table = own.new_zeros(len(values), n).index_add_(0, which, own)
                gain, a = max((_gain_of_codes(table[which] - own, own, log_p, a), a) for a in _PSEUDOCOUNTS)
                if gain > least:
                    self.of_codes[i] = a
                    tables.append(table)
        self.counts = torch.cat(tables, 1) if tables else torch.zeros(len(values), 0, dtype=torch.int64)
        numeric = len(self.numeric)
        self.of_numbers = torch.zeros(numeric, dtype=torch.float64)
        self.weight, self.spread = torch.zeros_like(self.of_numbers), torch.ones_like(self.of_numbers)
        self.numbers = torch.zeros(len(values), numeric, dtype=torch.int64)
        self.sums = torch.zeros(len(values), numeric, dtype=torch.float64)
        for i, j in enumerate(self.numeric):
            if j in after:
                there = ~torch.isnan(x[:, j])
                at, own, mean = which[there], z[there, i], means[there, i]
                if not len(own) or torch.unique(own, return_counts=True)[1].max() > _MOST_SAME * len(own):
                    continue
                count = torch.bincount(at, minlength=len(values))
                total = torch.zeros(len(values), dtype=torch.float64).index_add_(0, at, own)
                others = count[at] - 1
                fits = [_nearness(others, total[at] - own, own, mean, float(left[i]), a) for a in _PSEUDOCOUNTS]
                gain, a, weight, spread = max(fits)
                if gain > least:
                    self.of_numbers[i], self.weight[i], self.spread[i] = a, weight, spread
                    self.numbers[:, i], self.sums[:, i] = count, total
        if not (self.of_codes.any() or self.of_numbers.any()):
            for name in self._names:
                setattr(self, name, None)
            return
        self.column, self.values = torch.tensor(column), values.double()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """It remembers what was stored, of the size that it has there."""
        for name in self._names:
            found = state_dict.get(prefix + name)
            setattr(self, name, None if found is None else torch.zeros_like(found))
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def _one_hot(codes: Tensor, levels: int) -> Tensor:
    """Counts of one row each; zeros where missing."""
    return (codes.unsqueeze(1) == torch.arange(levels, dtype=codes.dtype, device=codes.device)).long()


def _gain_of_codes(others: Tensor, own: Tensor, log_p: Tensor, a: float) -> float:
    """Nats that equation (1) gains over log p, every row left out of its own law."""
    law = (others + a * log_p.exp()) / (others.sum(1, keepdim=True) + a)
    return float((own * (law.log() - log_p)).sum())


def _nearness(
    others: Tensor, total: Tensor, own: Tensor, mean: Tensor, left: float, a: float
) -> tuple[float, float, float, float]:
    """Nats that the rows of the same value gain in equation (2), a, w and δ; over the rows that have others."""
    has = others > 0
    near, far = (own - (total + a * mean) / (others + a))[has], (own - mean)[has]
    outside = _log_normal(far, left)
    nats, weight, spread = _two_normals(near, outside)
    return nats - _two_normals(far, outside)[0], a, weight, spread


def _two_normals(x: Tensor, outside: Tensor) -> tuple[float, float, float]:
    """Log-likelihood of w N(x; 0, δ²) + (1 − w) exp(outside), w and δ, by EM."""
    weight, spread = 0.5, max(float(x.square().sum() / max(len(x), 1)) ** 0.5 / 2.0, _LEAST_SPREAD)
    for _ in range(_ROUNDS):
        inside = _log_normal(x, spread) + math.log(weight)
        share = torch.sigmoid(inside - outside - math.log1p(-weight))
        weight = min(max(float(share.sum()) / max(len(x), 1), _LEAST_WEIGHT), 1.0 - _LEAST_WEIGHT)
        spread = max(float((share * x.square()).sum() / share.sum().clamp(min=1e-9)) ** 0.5, _LEAST_SPREAD)
    both = torch.logaddexp(_log_normal(x, spread) + math.log(weight), outside + math.log1p(-weight))
    return float(both.sum()), weight, spread


def _log_normal(x: Tensor, deviation: float) -> Tensor:
    return -0.5 * (x / deviation).square() - math.log(deviation) - 0.5 * math.log(2.0 * math.pi)
