r"""Independent: every dimension on its own — the floor that every other model must beat.

    log p(x) = Σ_d log p_d(x_d),    a missing cell being left out of the sum (its exact marginal).

Each marginal is a histogram resting on a smooth law g_d that covers the whole range (the predictive rule of a
Dirichlet process with base measure g: Blackwell & MacQueen 1973, Annals of Statistics 1, 353-355):

    p_d(v) = (n_d(v) + α g_d(v)) / (N_d + α)                                                                    (1)

n_d(v): training cells of dimension d with value v;  N_d = Σ_v n_d(v).  (1) sums to one because g does.  The
concentration α ≥ 1 maximises the leave-one-out likelihood of the training cells,

    Σ_v n(v) log (n(v) − 1 + α g(v)) − N log (N − 1 + α),                                                       (2)

over a geometric grid: a column that repeats its values keeps its histogram, one that never does gets g.

The smooth law g:

* binary cells, levels, tokens: the histogram pooled over the dimensions, itself resting on the uniform law with half
  a count a level; in (2) the cell is left out of the pool as well.  With one dimension, and for each coded column of a
  table, the uniform law.
* counts: a negative binomial with the dimension's mean and variance, and with weight 1/(N + 2) a geometric law of
  wider tail, so that every count has mass.
* numbers: a mixture of normals, fitted by EM to a bounded sample, their number (1, 2, 4, … ``components``) chosen by
  BIC for each dimension; and with weight 1/(N + 2) a logistic law of the dimension's mean and standard deviation, so
  that an outlier costs a length that grows linearly.  On a grid g is the mass of the cell, in closed form.  Without a
  grid there is no histogram: p_d is the density g.

Memory is bounded whatever the number of examples: a numeric grid column keeps at most ``values`` distinct values (when
there are more, the most frequent; the rest of the cells count as drawn from g, so (1) still sums to one), and the
sample for EM has at most 8,192 rows and 2²¹ cells, drawn uniformly from the whole stream by reservoir sampling.
One pass.  Arithmetic is float64; the numbers belong to the raw data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from likely.contract import (
    Batches,
    Binary,
    Bound,
    Column,
    Counts,
    Integers,
    Model,
    Reals,
    Report,
    Space,
    Table,
    Tokens,
    noise_or_global,
)
from likely.data.streaming import Histogram, Moments, Reservoir
from likely.distributions.counts import NegativeBinomial
from likely.distributions.grid_normal import log_cell_mass
from likely.distributions.logistic import log_interval
from likely.noise import Noise

if TYPE_CHECKING:
    from likely.coding.components import DirectCodec
    from likely.coding.staircase import Lattice, Staircase, Staircases

_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)
_SAMPLE_ROWS, _SAMPLE_CELLS = 1 << 13, 1 << 21
_HISTOGRAM_CELLS = 1 << 22
#: Cells whose mixtures are fitted together, so that their responsibilities stay in a processor's cache.
_CELLS_AT_ONCE = 1 << 14
_EM_STEPS = 60


class Independent(Model):
    """Per-dimension marginals: exact, closed form, one pass, every space.

    >>> model = Independent(Binary((2,)))
    >>> model.estimate([(torch.tensor([[0, 1], [0, 0], [0, 1], [1, 0]]), None)])
    >>> x = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
    >>> round(model.bound(x).nats.exp().sum().item(), 6)
    1.0

    Args:
        components: largest number of normals in the smooth law of a numeric dimension.
        values: largest number of distinct values that a numeric grid column keeps in its histogram.
    """

    spaces = (Binary, Integers, Reals, Counts, Tokens, Table)
    closed_form = True

    def __init__(self, space: Space, condition: Space | None = None, *, components: int = 8, values: int = 4096):
        super().__init__(space, condition)
        for option, number in (("components", components), ("values", values)):
            if number < 1:
                raise ValueError(f"{option}: expected at least 1, got {number}")
        self._groups: list[tuple[str, list[int]]] = []
        marginals: list[_Marginal] = []
        if isinstance(space, Table):
            numeric = [j for j, column in enumerate(space.columns) if column.numeric]
            if numeric:
                widths = [space.columns[j].resolution or 0.0 for j in numeric]
                marginals.append(_Numbers(widths, components, values))
                self._groups.append(("numeric", numeric))
            for j, column in enumerate(space.columns):
                if column.coded:
                    marginals.append(_Categories(1, _levels(column)))
                    self._groups.append(("coded", [j]))
        else:
            self._groups.append(("likelihood", list(range(space.dims))))
            if isinstance(space, Reals):
                marginals.append(_Numbers([0.0] * space.dims, components, values))
            elif isinstance(space, Counts):
                marginals.append(_Amounts(space.dims))
            else:
                marginals.append(_Categories(space.dims, space_levels(space), isinstance(space, Integers)))
        self.marginals = nn.ModuleList(marginals)

    def _laws(self) -> Iterator[tuple[list[int], _Marginal]]:
        """The groups of columns, each with its marginals."""
        for (_, columns), marginal in zip(self._groups, self.marginals):
            assert isinstance(marginal, _Marginal)
            yield columns, marginal

    def column_nats(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """log p_d(x_d) in nats, 0 where missing: shape ``(batch, *space.shape)``; they sum to the bound."""
        return self._cell_nats(x).reshape(x.shape)

    def _cell_nats(self, x: Tensor) -> Tensor:
        cells = x.reshape(len(x), -1).to(torch.float64)
        nats = cells.new_empty(cells.shape)
        for columns, marginal in self._laws():
            part = cells if len(columns) == cells.shape[1] else cells[:, columns]
            absent = torch.isnan(part)
            value = marginal.log_prob(torch.where(absent, marginal.legal(), part))
            nats[:, columns] = torch.where(absent, 0.0, value)
        return nats

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        nats = self._cell_nats(x)
        parts: dict[str, Tensor] = {}
        for name in dict.fromkeys(name for name, _ in self._groups):
            columns = [j for group, members in self._groups if group == name for j in members]
            parts[name] = nats[:, columns].sum(1)
        return Bound("exact", parts)

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """``n`` draws, no cell missing: shape ``(n, *space.shape)``, float64."""
        noise = noise_or_global(noise, next(self.buffers()))
        x = next(self.buffers()).new_empty((n, self.space.dims), dtype=torch.float64)
        for columns, marginal in self._laws():
            x[:, columns] = marginal.draw(n, noise)
        return x.reshape(n, *self.space.shape)

    def impute(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None, draws: int = 0) -> Tensor:
        """Missing cells filled from the marginals.

        Args:
            draws: 0 for the single best values (mean of a number, brought to its grid; mode of a code), shape of ``x``;
                m for m draws, shape ``(m, *x.shape)``.
        """
        x = x.to(torch.float64)
        absent = torch.isnan(x)
        if draws:
            noise = noise_or_global(noise, x)
            return torch.stack([torch.where(absent, self.sample(len(x), noise=noise), x) for _ in range(draws)])
        best = x.new_empty(self.space.dims)
        for columns, marginal in self._laws():
            best[columns] = marginal.best()
        return torch.where(absent, best.reshape(self.space.shape), x)

    def codec(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> DirectCodec:
        """Every cell by a table of its law, (1); it costs −log2 p(x).

        Raises:
            NoCodec: real numbers without a grid.
        """
        from likely.coding.components import DirectCodec
        from likely.coding.rows import Rows

        rows = Rows(self.space, spacing)
        laws = self.staircases(spacing, bound, spare_bits)
        return DirectCodec(
            rows,
            lambda n, present, condition: laws.cells(n, None, present),
            lambda symbols, present: laws.cells(len(symbols), None, present).legal(symbols),
        )

    def staircases(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> Staircases:
        """The laws of all cells as tables of integers; arguments as for :meth:`codec`."""
        from likely.coding.rows import spare_at_most
        from likely.coding.staircase import Lattice, Staircases

        lattice = Lattice(spacing, bound, spare_at_most(spare_bits, self.space))
        laws: dict[int, Staircase] = {}
        for columns, marginal in self._laws():
            laws.update(zip(columns, marginal.staircases(lattice)))
        return Staircases([laws[j] for j in range(self.space.dims)])

    def estimate(self, batches: Batches, report: Report | None = None) -> None:
        """One pass over the data; memory does not grow with the number of examples."""
        for _, marginal in self._laws():
            marginal.start()
        for x, _ in batches:
            cells = x.reshape(len(x), -1).to(torch.float64)
            for columns, marginal in self._laws():
                marginal.add(cells if len(columns) == cells.shape[1] else cells[:, columns])
        for _, marginal in self._laws():
            marginal.finish()
        if report is not None:
            report(1, math.nan)

    @classmethod
    def tiny(cls, space: Space, condition: Space | None = None) -> Independent:
        """Skewed marginals, different in every dimension."""
        model = cls(space, condition, components=2, values=8)
        generator = torch.Generator().manual_seed(0)
        for _, marginal in model._laws():
            marginal.practise(generator)
        return model


class _Marginal(nn.Module):
    """Marginals of several cells of one kind; missing cells are NaN in ``add`` and replaced before ``log_prob``."""

    def log_prob(self, x: Tensor) -> Tensor:
        """log p_d(x_d): shape ``(batch, cells)``."""
        raise NotImplementedError

    def draw(self, n: int, noise: Noise) -> Tensor:
        """``n`` draws of every cell: shape ``(n, cells)``."""
        raise NotImplementedError

    def best(self) -> Tensor:
        """Single best value of every cell: shape ``(cells,)``."""
        raise NotImplementedError

    def legal(self) -> Tensor:
        """A value that stands in for a missing cell."""
        return next(self.buffers()).new_zeros((), dtype=torch.float64)

    def start(self) -> None:
        """Forget the statistics of the data."""
        raise NotImplementedError

    def add(self, x: Tensor) -> None:
        """Count a batch of shape ``(batch, cells)``."""
        raise NotImplementedError

    def finish(self) -> None:
        """Set the marginals from the statistics, and drop these."""
        raise NotImplementedError

    def practise(self, generator: torch.Generator) -> None:
        """Become skewed marginals, for the checks."""
        raise NotImplementedError

    def staircases(self, lattice: Lattice) -> list[Staircase]:
        """The law of every cell as a table of integers."""
        raise NotImplementedError


class _Categories(_Marginal):
    """Codes 0 … levels − 1 in every cell, equation (1) over the pooled or the uniform law."""

    def __init__(self, cells: int, levels: int, ordered: bool = False) -> None:
        super().__init__()
        self.cells, self.levels, self.ordered = cells, levels, ordered
        self.register_buffer("log_p", torch.full((cells, levels), -math.log(levels), dtype=torch.float64))
        self.log_p: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        return self.log_p.reshape(-1)[self._positions(x)]

    def _positions(self, x: Tensor) -> Tensor:
        return x.long() + torch.arange(self.cells, device=x.device) * self.levels

    def draw(self, n: int, noise: Noise) -> Tensor:
        return invert(self.log_p.exp(), noise.uniform((n, self.cells))).double()

    def best(self) -> Tensor:
        if self.ordered:
            return (self.log_p.exp() @ torch.arange(self.levels).to(self.log_p)).round()
        return self.log_p.argmax(1).double()

    def start(self) -> None:
        self._counts = torch.zeros(self.cells * self.levels, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        present = ~torch.isnan(x)
        positions = self._positions(torch.where(present, x, 0.0))[present]
        self._counts += torch.bincount(positions, minlength=len(self._counts)).cpu()

    def finish(self) -> None:
        counts = self._counts.reshape(self.cells, self.levels).double()
        self.log_p.copy_(smooth(counts).log())
        del self._counts

    def practise(self, generator: torch.Generator) -> None:
        self.log_p.copy_(torch.log_softmax(torch.randn(self.log_p.shape, generator=generator), 1))

    def staircases(self, lattice: Lattice) -> list[Staircase]:
        from likely.coding.staircase import codes, parameters

        return [codes(log_p[None]) for log_p in parameters(self.log_p)]


class _Numbers(_Marginal):
    """Numbers on grids of given widths, or on a continuum (width 0)."""

    def __init__(self, widths: list[float], components: int, values: int) -> None:
        super().__init__()
        cells = self.cells = len(widths)
        self._grid = any(width > 0 for width in widths)
        self.values = min(values, max(64, _HISTOGRAM_CELLS // cells)) if self._grid else 0
        self._trials = [k for k in (1 << i for i in range(components.bit_length())) if k < components] + [components]

        def buffer(name: str, value: float, *shape: int) -> None:
            self.register_buffer(name, torch.full(shape, value, dtype=torch.float64))

        self.register_buffer("width", torch.tensor(widths, dtype=torch.float64))
        buffer("step", math.inf, cells, self.values)  # stored values in units of the grid, ascending, then +inf
        buffer("log_stored", -math.inf, cells, self.values)  # log (n(v) / (N + α))
        buffer("log_smooth", 0.0, cells)  # log ((α + unstored) / (N + α))
        buffer("log_weight", -math.inf, cells, components)
        self.get_buffer("log_weight")[:, 0] = 0.0
        buffer("mean", 0.0, cells, components)
        buffer("scale", 1.0, cells, components)
        buffer("log_guard", math.log(0.5), cells)
        buffer("guard_mean", 0.0, cells)
        buffer("guard_scale", 1.0, cells)
        self.width: Tensor
        self.step: Tensor
        self.log_stored: Tensor
        self.log_smooth: Tensor
        self.log_weight: Tensor
        self.mean: Tensor
        self.scale: Tensor
        self.log_guard: Tensor
        self.guard_mean: Tensor
        self.guard_scale: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        grid = self.width > 0
        centre = torch.where(grid, (x / self.width.clamp(min=1e-300)).round() * self.width, x)
        smooth = self._log_smooth_law(centre)
        if not self._grid:
            return smooth
        steps = (x / torch.where(grid, self.width, math.inf)).round()
        place = torch.searchsorted(self.step, steps.T.contiguous()).clamp(max=self.values - 1)
        found = (steps == self.step.gather(1, place).T) & grid
        stored = torch.where(found, self.log_stored.gather(1, place).T, -math.inf)
        return torch.logaddexp(stored, self.log_smooth + smooth)

    def _log_smooth_law(self, x: Tensor, cells: slice = slice(None)) -> Tensor:
        """log g of some cells: mass of the grid's cell, or density.  ``x``: shape ``(batch, cells)``."""
        grid, mean, scale = self.width[cells] > 0, self.mean[cells], self.scale[cells]
        width, guard_scale = torch.where(grid, self.width[cells], 1.0), self.guard_scale[cells]
        m = (x.unsqueeze(-1) - mean) / scale
        log_normal = -0.5 * m.square() - _LOG_SQRT_2PI - scale.log()
        standard = (x - self.guard_mean[cells]) / guard_scale
        log_logistic = -standard.abs() - 2.0 * torch.log1p(torch.exp(-standard.abs())) - guard_scale.log()
        if self._grid:
            mass = log_cell_mass(x.unsqueeze(-1), mean, scale, width.unsqueeze(-1))
            log_normal = torch.where(grid.unsqueeze(-1), mass, log_normal)
            half = 0.5 * width / guard_scale
            log_logistic = torch.where(grid, log_interval(standard + half, standard - half, 2.0 * half), log_logistic)
        log_guard = self.log_guard[cells]
        body = torch.logsumexp(self.log_weight[cells] + log_normal, -1) + torch.log1p(-log_guard.exp())
        return torch.logaddexp(body, log_guard + log_logistic)

    def draw(self, n: int, noise: Noise) -> Tensor:
        shape = (n, self.cells)
        component = invert(self.log_weight.exp(), noise.uniform(shape))
        normal = noise.normal(shape).double()
        x = self.mean.gather(1, component.T).T + self.scale.gather(1, component.T).T * normal
        logistic = self.guard_mean + self.guard_scale * torch.logit(noise.uniform(shape).double())
        x = torch.where(noise.uniform(shape).double() < self.log_guard.exp(), logistic, x)
        if self._grid:
            grid = self.width > 0
            steps = (x / torch.where(grid, self.width, 1.0)).round()
            chances = torch.cat([self.log_stored, self.log_smooth.unsqueeze(1)], 1).exp()
            place = invert(chances, noise.uniform(shape))
            stored = self.step.gather(1, place.T.clamp(max=self.values - 1)).T
            steps = torch.where(place < self.values, stored, steps)
            x = torch.where(grid, steps * self.width, x)
        return x

    def best(self) -> Tensor:
        guard = self.log_guard.exp()
        mean = (1.0 - guard) * (self.log_weight.exp() * self.mean).sum(1) + guard * self.guard_mean
        if not self._grid:
            return mean
        grid = self.width > 0
        width = torch.where(grid, self.width, 1.0)
        stored = torch.where(self.step.isfinite(), self.step, 0.0) * width.unsqueeze(1)
        overall = (self.log_stored.exp() * stored).sum(1) + self.log_smooth.exp() * mean
        return torch.where(grid, (overall / width).round() * width, mean)

    def start(self) -> None:
        self._sample = Reservoir(min(_SAMPLE_ROWS, max(256, _SAMPLE_CELLS // self.cells)), self.cells)
        self._moments = Moments(self.cells)
        self._histograms = [Histogram(self.values) for _ in range(self.cells)]

    def add(self, x: Tensor) -> None:
        x = x.cpu()
        self._sample.add(x)
        self._moments.add(x)
        for j, width in enumerate(self.width.tolist()):
            if width > 0:
                cells = x[:, j]
                self._histograms[j].add((cells[~torch.isnan(cells)] / width).round())

    def finish(self) -> None:
        device = self.width.device
        moments = self._moments
        floor = _least_scale(moments.mean, self.width.cpu())
        self.guard_mean.copy_(moments.mean)
        self.guard_scale.copy_(torch.maximum(moments.variance().sqrt(), floor) * math.sqrt(3.0) / math.pi)
        self.log_guard.copy_(-torch.log(moments.count + 2.0))
        sample = self._sample.rows()
        chunk = max(1, _CELLS_AT_ONCE // max(len(sample), 1))
        for first in range(0, self.cells, chunk):
            some = slice(first, first + chunk)
            weight, mean, scale = _fit_normals(sample[:, some], self.width[some].cpu(), self._trials)
            self.log_weight[some] = weight.log().to(device)
            self.mean[some], self.scale[some] = mean.to(device), scale.to(device)
        for j, histogram in enumerate(self._histograms):
            if self.width[j] > 0:
                steps, counts = histogram.most_frequent(self.values)
                self._set_histogram(j, steps, counts.double())
        del self._sample, self._histograms, self._moments

    def _set_histogram(self, j: int, steps: Tensor, counts: Tensor) -> None:
        total, stored = float(self._moments.count[j]), float(counts.sum())
        if total == 0:
            return
        column = (steps.to(self.width) * self.width[j]).unsqueeze(1)
        base = self._log_smooth_law(column, slice(j, j + 1)).squeeze(1).exp().cpu()
        alpha = concentration(counts, base, total - stored)
        self.step[j] = math.inf
        self.log_stored[j] = -math.inf
        self.step[j, : len(steps)] = steps.to(self.step)
        self.log_stored[j, : len(steps)] = torch.log(counts / (total + alpha)).to(self.step)
        self.log_smooth[j] = math.log((alpha + total - stored) / (total + alpha))

    def practise(self, generator: torch.Generator) -> None:
        unit = torch.where(self.width > 0, self.width, 1.0).unsqueeze(1)
        place = torch.randn((self.cells, 2), generator=generator).double()
        self.log_weight[:, :2] = torch.tensor([0.6, 0.4], dtype=torch.float64).log()
        self.mean[:, :2] = unit * (place + torch.tensor([0.0, 2.0]))
        self.scale[:, :2] = unit * torch.tensor([1.5, 0.8])
        self.guard_scale.copy_(2.0 * unit.squeeze(1))
        self.log_guard.fill_(math.log(0.2))
        for j in (self.width > 0).nonzero().squeeze(1).tolist():
            self.step[j, :2] = torch.tensor([0.0, 2.0])
            self.log_stored[j, :2] = torch.tensor([0.3, 0.1], dtype=torch.float64).log()
            self.log_smooth[j] = math.log(0.6)

    def staircases(self, lattice: Lattice) -> list[Staircase]:
        from likely.coding.staircase import Part, numbers, parameters
        from likely.coding.tables import logistic
        from likely.exact.functions import exp

        laws = []
        for j, width in enumerate(self.width.tolist()):
            of = slice(j, j + 1)
            guard, smooth = exp(parameters(self.log_guard[of])), exp(parameters(self.log_smooth[of]))
            body = exp(parameters(self.log_weight[of])) * (smooth * (1.0 - guard))[:, None]
            parts = [
                Part(body, parameters(self.mean[of]), parameters(self.scale[of])),
                Part(
                    (smooth * guard)[:, None],
                    parameters(self.guard_mean[of, None]),
                    parameters(self.guard_scale[of, None]),
                    logistic,
                ),
            ]
            atoms = None
            if width > 0:
                used = self.step[j].isfinite()
                atoms = self.step[j, used].long().cpu().numpy(), exp(parameters(self.log_stored[of, used]))
            laws.append(numbers(parts, lattice.column(width), atoms))
        return laws


class _Amounts(_Marginal):
    """Counts without a limit: equation (1) below ``values``, over a negative binomial with a geometric guard."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.values = min(1024, max(16, _HISTOGRAM_CELLS // cells))

        def buffer(name: str, value: float, *shape: int) -> None:
            self.register_buffer(name, torch.full(shape, value, dtype=torch.float64))

        buffer("log_stored", -math.inf, cells, self.values)
        buffer("log_smooth", 0.0, cells)
        buffer("log_mean", 0.0, cells)
        buffer("log_dispersion", 0.0, cells)
        buffer("log_guard", math.log(0.5), cells)
        buffer("log_guard_mean", 0.0, cells)
        self.log_stored: Tensor
        self.log_smooth: Tensor
        self.log_mean: Tensor
        self.log_dispersion: Tensor
        self.log_guard: Tensor
        self.log_guard_mean: Tensor

    def log_prob(self, x: Tensor) -> Tensor:
        inside = x < self.values
        place = torch.where(inside, x, 0.0).long()
        stored = torch.where(inside, self.log_stored.gather(1, place.T).T, -math.inf)
        return torch.logaddexp(stored, self.log_smooth + self._log_smooth_law(x))

    def _log_smooth_law(self, x: Tensor, cells: slice = slice(None)) -> Tensor:
        log_guard, log_guard_mean = self.log_guard[cells], self.log_guard_mean[cells]
        body = NegativeBinomial(self.log_mean[cells], self.log_dispersion[cells]).log_prob(x)
        guard = NegativeBinomial(log_guard_mean, torch.zeros_like(log_guard_mean)).log_prob(x)
        return torch.logaddexp(body + torch.log1p(-log_guard.exp()), log_guard + guard)

    def draw(self, n: int, noise: Noise) -> Tensor:
        shape = (n, self.cells)
        zero = torch.zeros_like(self.log_mean)
        body = NegativeBinomial(self.log_mean.expand(shape), self.log_dispersion.expand(shape)).sample(noise)
        guard = NegativeBinomial(self.log_guard_mean.expand(shape), zero.expand(shape)).sample(noise)
        x = torch.where(noise.uniform(shape).double() < self.log_guard.exp(), guard, body)
        place = invert(torch.cat([self.log_stored, self.log_smooth.unsqueeze(1)], 1).exp(), noise.uniform(shape))
        return torch.where(place < self.values, place.double(), x)

    def best(self) -> Tensor:
        guard = self.log_guard.exp()
        mean = (1.0 - guard) * self.log_mean.exp() + guard * self.log_guard_mean.exp()
        levels = torch.arange(self.values, device=mean.device, dtype=torch.float64)
        return (self.log_stored.exp() @ levels + self.log_smooth.exp() * mean).round()

    def start(self) -> None:
        self._counts = torch.zeros(self.cells * self.values, dtype=torch.int64)
        self._moments = Moments(self.cells)

    def add(self, x: Tensor) -> None:
        x = x.cpu()
        present = ~torch.isnan(x)
        filled = torch.where(present, x, 0.0)
        self._moments.add(x)
        positions = filled.long() + torch.arange(self.cells) * self.values
        self._counts += torch.bincount(positions[present & (x < self.values)], minlength=len(self._counts))

    def finish(self) -> None:
        # Half a count in one more example keeps the law of a dimension that was always zero from being degenerate.
        n = self._moments.count
        mean = (self._moments.mean * n + 0.5) / (n + 1.0)
        variance = self._moments.variance()
        dispersion = mean.square() / torch.maximum(variance - mean, 1e-4 * mean)
        self.log_mean.copy_(mean.log())
        self.log_dispersion.copy_(dispersion.log())
        self.log_guard.copy_(-torch.log(n + 2.0))
        self.log_guard_mean.copy_(torch.log1p(mean + variance.sqrt()))
        counts = self._counts.reshape(self.cells, self.values).double()
        unstored = n - counts.sum(1)
        for first in range(0, self.cells, 256):
            some = slice(first, min(first + 256, self.cells))
            used = max(1, int(counts[some].sum(0).nonzero().max()) + 1) if counts[some].any() else 1
            levels = torch.arange(used, dtype=torch.float64, device=self.log_mean.device).unsqueeze(1)
            base = self._log_smooth_law(levels, some).T.exp().cpu()
            alpha = concentration(counts[some, :used], base, unstored[some], shared=False)
            total = n[some] + alpha
            self.log_stored[some] = torch.log(counts[some] / total.unsqueeze(1)).to(self.log_stored)
            self.log_smooth[some] = torch.log((alpha + unstored[some]) / total).to(self.log_stored)
        del self._counts, self._moments

    def practise(self, generator: torch.Generator) -> None:
        self.start()
        scale = torch.linspace(1.0, 2.0, self.cells, dtype=torch.float64)
        self.add((torch.randn((32, self.cells), generator=generator).double().exp() * scale).floor())
        self.finish()

    def staircases(self, lattice: Lattice) -> list[Staircase]:
        from likely.coding.staircase import CountLaws, counts, parameters
        from likely.exact.functions import exp, log1p

        log_guard, log_smooth = parameters(self.log_guard), parameters(self.log_smooth)
        log_body = log_smooth + log1p(-exp(log_guard))
        laws = []
        for j in range(self.cells):
            of = slice(j, j + 1)
            body = CountLaws(parameters(self.log_mean[of]), parameters(self.log_dispersion[of]), log_body[of])
            guard = CountLaws(parameters(self.log_guard_mean[of]), 0.0 * log_guard[of], (log_smooth + log_guard)[of])
            used = (self.log_stored[j] > -math.inf).nonzero().squeeze(1)
            stored = used.cpu().numpy(), exp(parameters(self.log_stored[of, used]))
            laws.append(counts([body, guard], stored))
        return laws


def space_levels(space: Space) -> int:
    """Number of values of a cell of a space of codes: 2, ``levels`` or ``vocab``."""
    if isinstance(space, Integers):
        return space.levels
    return space.vocab if isinstance(space, Tokens) else 2


def _levels(column: Column) -> int:
    assert column.levels is not None
    return column.levels


def invert(chances: Tensor, uniform: Tensor) -> Tensor:
    """Codes by inversion of each row's cumulative chances: ``(cells, levels)`` and ``(n, cells)`` to ``(n, cells)``.

    >>> invert(torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([[0.3, 0.3]]))
    tensor([[1, 0]])
    """
    cumulative = chances.double().cumsum(1)
    cumulative = cumulative / cumulative[:, -1:]
    levels = cumulative.shape[1]
    place = torch.searchsorted(cumulative, uniform.to(cumulative).T.contiguous(), right=True).T
    return place.clamp(max=levels - 1)


def smooth(counts: Tensor) -> Tensor:
    """Equation (1) for codes: counts ``(cells, levels)`` to probabilities, every row of sum 1 and none zero.

    >>> smooth(torch.tensor([[3.0, 1.0], [0.0, 0.0]])).sum(1)
    tensor([1., 1.])
    """
    cells, levels = counts.shape
    totals = counts.sum(1, keepdim=True)
    if cells == 1:
        base = torch.full_like(counts, 1.0 / levels)
        rest = base
    else:
        pooled, half = counts.sum(0, keepdim=True), 0.5
        base = (pooled + half) / (pooled.sum() + half * levels)
        rest = (pooled - 1.0 + half) / (pooled.sum() - 1.0 + half * levels)  # the pool without the cell itself
    alpha = concentration(counts, rest.expand_as(counts), totals.new_zeros(cells))
    return (counts + alpha * base) / (totals + alpha)


def concentration(counts: Tensor, base: Tensor, unstored: Tensor | float, shared: bool = True) -> Tensor:
    """The concentration α ≥ 1 that maximises the leave-one-out likelihood, equation (2).

    Args:
        counts: n(v), shape ``(..., values)``.
        base: g(v), the same shape.
        unstored: number of cells whose value is not among the stored ones, shape ``(...)``; they are drawn from g,
            which then has the weight α + unstored.
        shared: one α for all leading axes, or one for each.
    """
    unstored = torch.as_tensor(unstored, dtype=torch.float64)
    total = counts.sum(-1) + unstored
    where = counts.reshape(-1) > 0
    n, g = counts.reshape(-1)[where], base.reshape(-1)[where].clamp(min=1e-300)
    row = torch.arange(total.numel()).repeat_interleave(counts.shape[-1])[where]
    lost = unstored.reshape(-1)
    best = torch.full((1 if shared else total.numel(),), -math.inf, dtype=torch.float64)
    choice = torch.ones_like(best)
    for exponent in range(61):
        alpha = 2.0 ** (0.5 * exponent)
        gain = torch.zeros(total.numel(), dtype=torch.float64)
        gain.index_add_(0, row, n * torch.log(n - 1.0 + (alpha + lost[row]) * g))
        value = gain + lost * torch.log(alpha + lost) - total.reshape(-1) * torch.log(total.reshape(-1) - 1.0 + alpha)
        value = torch.where(total.reshape(-1) > 0, value, 0.0)
        value = value.sum().reshape(1) if shared else value
        better = value > best
        best, choice = torch.where(better, value, best), torch.where(better, alpha, choice)
    return choice[0] if shared else choice.reshape(total.shape)


def _least_scale(typical: Tensor, width: Tensor) -> Tensor:
    """Smallest standard deviation: half a grid cell; on a continuum 1e-3 of the value's size (of 1 for a zero)."""
    size = torch.where(typical == 0, 1.0, typical.abs())
    return torch.where(width > 0, 0.5 * width, 1e-3 * size)


def _fit_normals(x: Tensor, width: Tensor, trials: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and scales ``(cells, K)`` of one-dimensional normal mixtures, for the columns of ``x``.

    EM from the quantiles, in units of each column's median and spread; the number of components is the one of
    ``trials`` with the best BIC.  Unused components get weight 0.  NaN cells are left out.
    """
    cells, most = x.shape[1], trials[-1]
    present = ~torch.isnan(x)
    n = present.sum(0).double()
    ordered = torch.where(present, x, math.inf).sort(0).values

    def quantile(levels: Tensor) -> Tensor:
        place = (levels.unsqueeze(1) * (n - 1.0).clamp(min=0.0)).round().long()
        return torch.where(n > 0, ordered.gather(0, place), 0.0) if len(x) else torch.zeros(len(levels), cells).double()

    half = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)
    low, median, high = quantile(half)
    centred = torch.where(present, x - median, 0.0)
    deviation = (centred.square().sum(0) / n.clamp(min=1.0)).sqrt()
    spread = torch.where(high > low, torch.minimum((high - low) / 1.349, deviation), deviation)
    spread = torch.where(spread > 0, spread, _least_scale(median, width))
    floor = torch.where(width > 0, torch.maximum(0.5 * width / spread, torch.tensor(1e-3)), 1e-3)
    y = (centred / spread).T.unsqueeze(1)  # rows last, along which memory is read: (cells, K, rows)
    use = present.T.double().unsqueeze(1)

    weight = torch.zeros((cells, most), dtype=torch.float64)
    mean = torch.zeros_like(weight)
    scale = torch.ones_like(weight)
    weight[:, 0] = 1.0
    best = torch.full((cells,), -math.inf, dtype=torch.float64)
    for k in trials:
        levels = (torch.arange(k, dtype=torch.float64) + 0.5) / k
        mu = ((quantile(levels) - median) / spread).T
        gap = torch.maximum(mu[:, -1:] - mu[:, :1], torch.tensor(1.0)) / k
        sd = torch.maximum(gap.expand(-1, k), floor.unsqueeze(1)).clone()
        pi = torch.full((cells, k), 1.0 / k, dtype=torch.float64)
        away = y - mu.unsqueeze(2)
        for _ in range(_EM_STEPS if k > 1 else 2):
            r = _log_joint(away, pi, sd).softmax(1).mul_(use)
            size = r.sum(2)
            safe = size.clamp(min=1e-12)
            mu = torch.where(size > 1e-9, torch.matmul(r, y.transpose(1, 2)).squeeze(2) / safe, mu)
            away = torch.sub(y, mu.unsqueeze(2), out=away)
            sd = torch.where(size > 1e-9, (r.mul_(away).mul_(away).sum(2) / safe).sqrt(), sd)
            sd = torch.maximum(sd, floor.unsqueeze(1))
            pi = (size + 1e-3 / k) / (n.unsqueeze(1) + 1e-3)
        nats = (use.squeeze(1) * torch.logsumexp(_log_joint(away, pi, sd), 1)).sum(1)
        score = nats - 0.5 * (3 * k - 1) * torch.log(n.clamp(min=2.0))
        better = score > best
        best = torch.where(better, score, best)
        row = better.unsqueeze(1)
        weight = torch.where(row, nn.functional.pad(pi, (0, most - k)), weight)
        mean = torch.where(row, nn.functional.pad(mu, (0, most - k)), mean)
        scale = torch.where(row, nn.functional.pad(sd, (0, most - k), value=1.0), scale)
    return weight, mean * spread.unsqueeze(1) + median.unsqueeze(1), scale * spread.unsqueeze(1)


def _log_joint(away: Tensor, pi: Tensor, sd: Tensor) -> Tensor:
    """log π_k N(y; μ_k, σ_k²) of distances y − μ_k ``(cells, K, rows)``, for weights and scales ``(cells, K)``."""
    constant = (pi.log() - sd.log() - _LOG_SQRT_2PI).unsqueeze(2)
    return (away / sd.unsqueeze(2)).square_().mul_(-0.5).add_(constant)
