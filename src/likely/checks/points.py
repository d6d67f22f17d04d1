"""Sums over a whole space: exact where it can be enumerated, else integrals by importance sampling.

The points are randomised Sobol points (Owen 1997, *Monte Carlo variance of scrambled net quadrature*) pushed through
the quantiles of four proposals; independent scramblings give the standard error.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from likely.checks.outcome import Skipped
from likely.checks.source import Cell, Source, batch_of, cells_of
from likely.contract import Space

#: A space with at most so many states is enumerated.
STATES = 4096
#: Independent replicates of the points of a space that cannot, and proposals that they come from.
REPLICATES, PROPOSALS = 16, 4


@dataclass(frozen=True)
class Points:
    """Points and weights with Σᵢ wᵢ f(xᵢ) ≈ the sum (integral) of f over the space.

    Args:
        x: shape ``(n, *space.shape)``.
        weights: float64, shape ``(n,)``.
        replicates: how many independent estimates follow one another in ``x``; 1 where the sum is exact.
    """

    x: Tensor
    weights: Tensor
    replicates: int

    def integrate(self, values: Tensor) -> tuple[float, float]:
        """Σᵢ wᵢ valuesᵢ and the standard error of it that the choice of points brings."""
        terms = (self.weights * values).reshape(self.replicates, -1).sum(1)
        if self.replicates == 1:
            return float(terms), 0.0
        return float(terms.mean()) * self.replicates, float(terms.std()) * math.sqrt(self.replicates)


def points_of(space: Space, data: Tensor, seed: int, observed: Sequence[bool] | None = None, n: int = 4096) -> Points:
    """Points of a whole space, or of the marginal space of its observed cells (the others are NaN).

    Where the space cannot be enumerated they come in equal shares from four proposals: the source, which a trained
    model resembles; the product of its marginals, and that of the source spread three times as far, which a poor model
    resembles; and a product of Cauchy distributions around the data, which covers every tail.  The weight of a point
    is the inverse of the average density (Veach & Guibas 1995, the balance heuristic).

    Args:
        seed: of the points, and of the source.
        data: examples that say where numeric cells live; they move the standard error, not the value.
        observed: which cells are observed; by default all.
        n: number of points where the space cannot be enumerated; 64 times a power of 2.
    """
    cells = cells_of(space)
    observed = list(observed) if observed is not None else [True] * len(cells)
    visible = [j for j, seen in enumerate(observed) if seen]
    levels = [cells[j].levels for j in visible]
    states = math.prod(level if level is not None else STATES + 1 for level in levels)
    if states <= STATES:
        x = torch.full((states, len(cells)), math.nan, dtype=torch.float64)
        grids = torch.meshgrid(*[torch.arange(level or 0) for level in levels], indexing="ij") if visible else []
        for j, grid in zip(visible, grids):
            x[:, j] = grid.reshape(-1).double()
        return Points(batch_of(space, x), torch.ones(states, dtype=torch.float64), 1)
    if len(visible) > 12:
        raise Skipped(f"{len(visible)} cells are too many to sum over")
    rows = data.reshape(len(data), -1).double()
    wide = {j: _Wide(cells[j], rows[:, j]) for j in visible}
    source, far = Source(space, seed=seed), Source(space, seed=seed, spread=3.0)
    pieces, weights = [], []
    for r in range(REPLICATES * PROPOSALS):
        engine = torch.quasirandom.SobolEngine(2 * len(visible) + 1, scramble=True, seed=seed * 1000 + r)
        uniform = engine.draw(n // REPLICATES // PROPOSALS, dtype=torch.float64).clamp(2.0**-40, 1 - 2.0**-40)
        x = torch.full((len(uniform), len(cells)), math.nan, dtype=torch.float64)
        log_q = torch.zeros(PROPOSALS, len(uniform), dtype=torch.float64)
        for u, v, j in zip(uniform.T[1::2], uniform.T[2::2], visible):
            if r % PROPOSALS == 0:
                x[:, j] = source.cells[j].quantile(u, source.prototype(uniform[:, 0]))
            elif r % PROPOSALS == 3:
                x[:, j] = wide[j].quantile(u)
            else:
                x[:, j] = (source, far)[r % PROPOSALS - 1].cells[j].quantile(u, source.prototype(v))
            log_q[1] += source.log_marginal(x[:, j], j)
            log_q[2] += far.log_marginal(x[:, j], j)
            log_q[3] += wide[j].log_prob(x[:, j])
        pieces.append(batch_of(space, x))
        log_q[0] = source.log_prob(pieces[-1])
        weights.append(torch.exp(math.log(PROPOSALS) - log_q.logsumexp(0)) / n)
    return Points(torch.cat(pieces), torch.cat(weights), REPLICATES)


class _Wide:
    """A heavy-tailed distribution of one cell around the data, by inversion.

    Codes are uniform; numbers follow a Cauchy distribution, rounded where they live on a grid, whose tails are cut off
    beyond 318 scales.
    """

    _cut = 1e-3

    def __init__(self, cell: Cell, data: Tensor) -> None:
        self.cell = cell
        self.spacing = 1.0 if cell.count else (cell.step or 0.0)
        if cell.levels is None:
            known = data[~torch.isnan(data)]
            low, self.middle, high = known.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
            self.scale = 0.5 * max(high - low, self.spacing, 1e-3)
            self.start = 0.5 + math.atan((-0.5 - self.middle) / self.scale) / math.pi if cell.count else self._cut
            self.width = 1.0 - self._cut - self.start

    def quantile(self, u: Tensor) -> Tensor:
        if self.cell.levels is not None:
            return (u * self.cell.levels).floor()
        x = self.middle + self.scale * torch.tan(math.pi * (self.start + self.width * u - 0.5))
        return self.spacing * (x / self.spacing).round() if self.spacing else x

    def log_prob(self, x: Tensor) -> Tensor:
        if self.cell.levels is not None:
            return torch.full_like(x, -math.log(self.cell.levels))
        if self.spacing:
            return torch.log(self._cdf(x + self.spacing / 2) - self._cdf(x - self.spacing / 2))
        z = (x - self.middle) / self.scale
        inside = (0.5 + torch.atan(z) / math.pi - self.start - self.width / 2).abs() <= self.width / 2
        log_density = -torch.log(math.pi * self.scale * self.width * (1 + z.square()))
        return torch.where(inside, log_density, -math.inf)

    def _cdf(self, x: Tensor) -> Tensor:
        share = 0.5 + torch.atan((x - self.middle) / self.scale) / math.pi
        return ((share - self.start) / self.width).clamp(0.0, 1.0)
