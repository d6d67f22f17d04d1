"""Mixtures of logistics: on a bounded range of levels, on an unbounded grid with atoms, and as a density.

The mass of a logistic between b and a (in units of its scale, b < a) is computed without cancellation:

    σ(a) − σ(b) = σ(a) σ(−b) (1 − e^(b − a)).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from likely.distributions.categorical import sample_categories
from likely.distributions.protocol import lazy, mix
from likely.noise import Noise

#: Least log-scale of a logistic on a grid, in half cells.
LEAST_LOG_SCALE = -2.5


def log_interval(upper: Tensor, lower: Tensor, width: Tensor) -> Tensor:
    """log(σ(upper) − σ(lower)) with ``width`` = upper − lower > 0 given apart, so that tiny cells keep their digits."""
    return F.logsigmoid(upper) + F.logsigmoid(-lower) + torch.log(-torch.expm1(-width))


def log_level(x: Tensor, means: Tensor, log_scales: Tensor, levels: int) -> Tensor:
    """log of the mass that a logistic puts on level x of 0 … ``levels`` − 1; the outer levels take the tails.

    With u = 2x/(L − 1) − 1 and h = 1/(L − 1) it is σ((u + h − μ)/s) − σ((u − h − μ)/s).  The arguments are broadcast.
    """
    half = 1.0 / (levels - 1)
    precision = torch.exp(-log_scales)
    centred = 2.0 * half * x - 1.0 - means
    upper, lower = (centred + half) * precision, (centred - half) * precision
    inside = torch.log(-torch.expm1(-2.0 * half * precision))
    first, last = x == 0, x == levels - 1
    cell = torch.where(last, 0.0, F.logsigmoid(upper)) + torch.where(first, 0.0, F.logsigmoid(-lower))
    return cell + torch.where(first | last, 0.0, inside)


def _logit(uniform: Tensor) -> Tensor:
    return torch.log(uniform) - torch.log1p(-uniform)


class DiscretizedLogisticMixture:
    """Mixture of K logistics, discretised to the levels 0 … L − 1; the outer levels take the tails.

    Salimans et al. 2017 (PixelCNN++, arXiv 1701.05517), eq. 2, with u = 2x/(L − 1) − 1 and cells of half-width
    1/(L − 1), without their dependence between colours.

    Args:
        logits, means, log_scales: shape ``(*lead, *shape, K)``; means and scales are in units of u.
        levels: L.
        trailing: number of axes of one example.
    """

    def __init__(self, logits: Tensor, means: Tensor, log_scales: Tensor, levels: int, trailing: int = 1) -> None:
        self.logits, self.means, self.log_scales = logits, means, log_scales.clamp(min=-7.0)
        self.levels, self.trailing = levels, trailing

    @lazy
    def log_weights(self) -> Tensor:
        """Log of the components' shares, shape of the logits."""
        return torch.log_softmax(self.logits, -1)

    def log_prob(self, x: Tensor) -> Tensor:
        cell = log_level(x.to(self.means.dtype).unsqueeze(-1), self.means, self.log_scales, self.levels)
        return torch.logsumexp(self.log_weights + cell, -1)

    def sample(self, noise: Noise) -> Tensor:
        shape = self.means.shape[:-1]
        chosen = sample_categories(self.log_weights, noise.uniform(shape).to(self.means)).unsqueeze(-1)
        mean = self.means.gather(-1, chosen).squeeze(-1)
        scale = self.log_scales.exp().expand_as(self.means).gather(-1, chosen).squeeze(-1)
        u = mean + scale * _logit(noise.uniform(shape).to(self.means))
        return ((u + 1.0) * 0.5 * (self.levels - 1)).round().clamp(0, self.levels - 1)

    def best(self, weights: Tensor | None = None) -> Tensor:
        return mix(self.mean(), weights, self.trailing).round()

    def mean(self) -> Tensor:
        """Approximate mean level: the mixture's mean before discretisation, held inside the range."""
        u = (self.log_weights.exp() * self.means.clamp(-1.0, 1.0)).sum(-1)
        return (u + 1.0) * 0.5 * (self.levels - 1)


class Recalled:
    """For each of some columns on a grid the values seen in training and how often: their empirical law.

    Args:
        values: of each column, ascending, float64 raw values; empty where nothing is recalled.
        counts: how often each was seen, float64.
        leave_out: whether the example at hand is one of those counted, and is left out of the law that it is held
            against.  So training learns how much a value that was seen before is worth to a new example.
    """

    def __init__(self, values: Sequence[Tensor], counts: Sequence[Tensor], leave_out: bool = False) -> None:
        self.values, self.counts, self.leave_out = list(values), list(counts), leave_out

    def __getitem__(self, columns: slice) -> Recalled:
        """The laws of some of the columns."""
        return Recalled(self.values[columns], self.counts[columns], self.leave_out)

    def log_prob(self, x: Tensor) -> Tensor:
        """log of the share of the training values that x is, −inf for none: shape of x, ``(*lead, columns)``."""
        found = []
        for j, (values, counts) in enumerate(zip(self.values, self.counts)):
            cell = x[..., j].to(values).contiguous()
            if not len(values):
                found.append(torch.full_like(cell, -torch.inf))
                continue
            place = torch.searchsorted(values, cell).clamp(max=len(values) - 1)
            times = torch.where(values[place] == cell, counts[place], 0.0)
            total = counts.sum()
            if self.leave_out:
                times, total = (times - 1.0).clamp(min=0.0), total - 1.0
            found.append(torch.log(times) - torch.log(total))
        return torch.stack(found, -1)

    def draw(self, uniform: Tensor) -> Tensor:
        """A value for each uniform variate, shape ``(*lead, columns)``; 0 where nothing is recalled."""
        found = []
        for j, (values, counts) in enumerate(zip(self.values, self.counts)):
            if not len(values):
                found.append(torch.zeros_like(uniform[..., j], dtype=torch.float64))
                continue
            points = uniform[..., j].double().contiguous() * counts.sum()
            found.append(values[torch.searchsorted(counts.cumsum(0), points).clamp(max=len(values) - 1)])
        return torch.stack(found, -1)

    def mean(self) -> Tensor:
        """Mean value of each column, float64; 0 where nothing is recalled."""
        found = [
            (values * counts).sum() / counts.sum() if len(values) else values.new_zeros(())
            for values, counts in zip(self.values, self.counts)
        ]
        return torch.stack(found)


class GridLogisticMixture:
    """Numeric columns: a mixture of K logistics and A atoms, on the grid of each column, or a density without a grid.

    On a grid of spacing r the mass of a cell is the logistics' mass within ± r/2, so that the masses of the whole
    grid sum to one.  An atom puts its weight on one value (a spike such as zero).  Without a grid (r = 0) the
    logistics have a density and there are no atoms.

    Args:
        logits: shape ``(*lead, columns, K + A)``: weights of the logistics, then of the atoms; −inf switches one off.
        means, log_scales: shape ``(*lead, columns, K)``, in standard units.
        location, scale: shape ``(columns,)``, float64: raw value = location + scale · standard value.
        resolution: shape ``(columns,)``, float64: r, or 0.
        atoms: shape ``(columns, A)``, float64 raw values.
        recalled: the empirical law of each column, whose weight is the last of the logits (K + A + 1 of them); None for
            none.
    """

    def __init__(
        self,
        logits: Tensor,
        means: Tensor,
        log_scales: Tensor,
        location: Tensor,
        scale: Tensor,
        resolution: Tensor,
        atoms: Tensor,
        recalled: Recalled | None = None,
    ) -> None:
        self.logits, self.means, self.given_log_scales = logits, means, log_scales
        self.location, self.scale, self.resolution, self.atoms = location, scale, resolution, atoms
        self.recalled = recalled

    @lazy
    def log_weights(self) -> Tensor:
        """Log of the shares of logistics and atoms, shape of the logits."""
        return torch.log_softmax(self.logits, -1)

    @lazy
    def half(self) -> Tensor:
        """Half a cell in standard units, shape ``(columns, 1)``; 0 on a continuum."""
        return (0.5 * self.resolution / self.scale).to(self.means.dtype).unsqueeze(-1)

    @lazy
    def on_grid(self) -> Tensor:
        """Which columns live on a grid, shape ``(columns, 1)``."""
        return self.half > 0

    @lazy
    def log_scales(self) -> Tensor:
        """The scales in use: a logistic far narrower than its cell is an atom already; a continuum's is held off 0."""
        floor = torch.where(self.on_grid, torch.log(self.half.clamp(min=1e-30)) + LEAST_LOG_SCALE, -7.0)
        return torch.maximum(self.given_log_scales, floor)

    def log_prob(self, x: Tensor) -> Tensor:
        standard = ((x.to(self.location) - self.location) / self.scale).to(self.means.dtype).unsqueeze(-1)
        precision = torch.exp(-self.log_scales)
        centred = (standard - self.means) * precision
        width = torch.where(self.on_grid, 2.0 * self.half, 1.0) * precision
        mass = log_interval(centred + 0.5 * width, centred - 0.5 * width, width)
        log_unit = torch.log(self.scale).to(self.means.dtype).unsqueeze(-1)
        density = F.logsigmoid(centred) + F.logsigmoid(-centred) - self.log_scales - log_unit
        cells = torch.where(self.on_grid, mass, density)
        if self.atoms.shape[-1]:
            hit = (x.to(self.atoms).unsqueeze(-1) - self.atoms).abs() < 0.5 * self.resolution.unsqueeze(-1)
            spikes = torch.zeros_like(hit, dtype=cells.dtype).masked_fill(~hit, -torch.inf)
            spikes = spikes.expand(*cells.shape[:-1], -1)
            cells = torch.cat([cells, spikes], -1)
        if self.recalled is not None:
            recalled = self.recalled.log_prob(x).to(cells.dtype).unsqueeze(-1)
            cells = torch.cat([cells, recalled.expand(*cells.shape[:-1], 1)], -1)
        return torch.logsumexp(self.log_weights + cells, -1)

    def sample(self, noise: Noise) -> Tensor:
        shape = self.means.shape[:-1]
        components = self.means.shape[-1]
        chosen = sample_categories(self.log_weights, noise.uniform(shape).to(self.means))
        logistic = chosen.clamp(max=components - 1).unsqueeze(-1)
        mean = self.means.gather(-1, logistic).squeeze(-1)
        spread = self.log_scales.exp().gather(-1, logistic).squeeze(-1)
        standard = mean + spread * _logit(noise.uniform(shape).to(self.means))
        value = self._to_grid(self.location + self.scale * standard.double())
        if self.atoms.shape[-1]:
            atom = (chosen - components).clamp(0, self.atoms.shape[-1] - 1).unsqueeze(-1)
            spike = self.atoms.expand(*shape, -1).gather(-1, atom).squeeze(-1)
            value = torch.where(chosen >= components, spike, value)
        if self.recalled is not None:
            again = self.recalled.draw(noise.uniform(shape).to(self.means.device))
            value = torch.where(chosen == self.log_weights.shape[-1] - 1, again, value)
        return value

    def best(self, weights: Tensor | None = None) -> Tensor:
        return self._to_grid(mix(self.mean(), weights, 1))

    def mean(self) -> Tensor:
        """Mean value, raw units, float64, not on the grid: shape ``(*lead, columns)``."""
        values = self.location.unsqueeze(-1) + self.scale.unsqueeze(-1) * self.means.double()
        values = torch.cat([values, self.atoms.expand(*values.shape[:-1], -1)], -1)
        if self.recalled is not None:
            values = torch.cat([values, self.recalled.mean().expand(values.shape[:-1]).unsqueeze(-1)], -1)
        return (self.log_weights.double().exp() * values).sum(-1)

    def _to_grid(self, value: Tensor) -> Tensor:
        grid = torch.where(self.resolution > 0, self.resolution, 1.0)
        return torch.where(self.resolution > 0, (value / grid).round() * grid, value)
