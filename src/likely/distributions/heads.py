"""Heads: small modules that turn a decoder's context into a distribution of one example.

A head owns what belongs to the likelihood alone: the output layer, the scale and the location of each numeric
column, its atoms.  ``initialise`` sets these from one pass over the data, and the output biases so that the
untrained model already has the data's marginals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from likely.contract import (
    Batches,
    Binary,
    Column,
    Counts,
    Integers,
    Reals,
    Space,
    Table,
    Tokens,
    Unsupported,
    check_options,
)
from likely.distributions.bernoulli import Bernoulli
from likely.distributions.categorical import Categorical
from likely.distributions.clustered import Clustered
from likely.distributions.counts import Multinomial, NegativeBinomial
from likely.distributions.logistic import DiscretizedLogisticMixture, GridLogisticMixture, Recalled
from likely.distributions.normal import Normal, StudentT
from likely.distributions.protocol import Distribution
from likely.networks.linear import Linear
from likely.networks.mlp import full_precision, glorot
from likely.noise import Noise


class Head(nn.Module):
    """``forward(context) -> Distribution`` over one example of ``space``.

    Args:
        space: the space of the examples.
        context_shape: shape of one context: ``(features,)``, or ``(features, height, width)`` to keep a layout.
        per_cell: numbers the likelihood needs for one cell.
    """

    def __init__(self, space: Space, context_shape: Sequence[int], per_cell: int) -> None:
        super().__init__()
        self.space, self.per_cell = space, per_cell
        self.trailing = len(space.shape)
        self.as_map = len(context_shape) == 3
        if self.as_map:
            if self.trailing != 3 or tuple(context_shape[1:]) != space.shape[1:]:
                raise Unsupported(f"a context of shape {tuple(context_shape)} does not fit examples of {space.shape}")
            self.output: nn.Module = nn.Conv2d(context_shape[0], space.shape[0] * per_cell, 1, bias=False)
            self.bias = nn.Parameter(torch.zeros(*space.shape, per_cell))
        else:
            self.output = glorot(Linear(context_shape[0], space.dims * per_cell))

    def parameters_of(self, context: Tensor) -> Tensor:
        """Numbers of the likelihood: shape ``(*lead, *space.shape, per_cell)``, or without the last axis if it is 1."""
        if self.as_map:
            lead = context.shape[:-3]
            flat = full_precision(self.output(context.reshape(-1, *context.shape[-3:])))
            channels, height, width = self.space.shape
            flat = flat + self.bias.movedim(-1, 1).reshape(-1, height, width)
            flat = flat.reshape(-1, channels, self.per_cell, height, width).movedim(2, -1)
            flat = flat.reshape(*lead, channels, height, width, self.per_cell)
        else:
            flat = full_precision(self.output(context))
            flat = flat.reshape(*context.shape[:-1], *self.space.shape, self.per_cell)
        return flat.squeeze(-1) if self.per_cell == 1 else flat

    def cell_of_number(self) -> list[int]:
        """For every number of the output layer the flattened cell that it belongs to."""
        return [cell for cell in range(self.space.dims) for _ in range(self.per_cell)]

    def forward(self, context: Tensor) -> Distribution:
        raise NotImplementedError

    def initialise(self, batches: Batches) -> None:
        """Set scales and output biases from one pass over the data.  Default: nothing."""

    def _add_to_bias(self, values: Tensor) -> None:
        """Add ``values`` to the output bias, of which every cell has its own: ``(*space.shape, per_cell)`` of them."""
        bias = self.bias if self.as_map else self.output.bias
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias.add_(values.reshape(bias.shape).to(bias))


def _cell_means(batches: Batches, shape: Sequence[int]) -> Tensor:
    """Mean of every cell over its observed values, float64; 0 where nothing was observed."""
    total = torch.zeros(tuple(shape), dtype=torch.float64)
    count = torch.zeros_like(total)
    for x, _ in batches:
        values = x.to(total)
        total += values.nan_to_num(0.0).sum(0)
        count += (~torch.isnan(values)).sum(0)
    return total / count.clamp(min=1.0)


class BernoulliHead(Head):
    """Binary cells."""

    def __init__(self, space: Space, context_shape: Sequence[int]) -> None:
        super().__init__(space, context_shape, per_cell=1)

    def initialise(self, batches: Batches) -> None:
        mean = _cell_means(batches, self.space.shape).clamp(1e-3, 1.0 - 1e-3)
        self._add_to_bias(torch.logit(mean))

    def forward(self, context: Tensor) -> Bernoulli:
        return Bernoulli(self.parameters_of(context), self.trailing)


class CategoricalHead(Head):
    """A category a cell: integers with few levels, tokens."""

    def __init__(self, space: Space, context_shape: Sequence[int]) -> None:
        self.levels = space.levels if isinstance(space, Integers) else space.vocab  # type: ignore[attr-defined]
        super().__init__(space, context_shape, per_cell=self.levels)

    def initialise(self, batches: Batches) -> None:
        counts = torch.zeros(self.space.dims, self.levels, dtype=torch.float64)
        offsets = torch.arange(self.space.dims) * self.levels
        for x, _ in batches:
            codes = x.flatten(1)
            seen = ~torch.isnan(codes) if codes.is_floating_point() else torch.ones_like(codes, dtype=torch.bool)
            index = (codes.nan_to_num(0.0) if codes.is_floating_point() else codes).long() + offsets
            counts += torch.bincount(index[seen], minlength=counts.numel()).reshape(counts.shape)
        self._add_to_bias(torch.log((counts + 0.5) / (counts + 0.5).sum(1, keepdim=True)))

    def forward(self, context: Tensor) -> Categorical:
        return Categorical(self.parameters_of(context), self.trailing)


class LogisticMixtureHead(Head):
    """Levels of an ordered range (8-bit images): a mixture of discretised logistics a cell."""

    def __init__(self, space: Space, context_shape: Sequence[int], components: int = 3) -> None:
        if not isinstance(space, Integers):
            raise Unsupported(f"likelihood 'logistic' is for Integers, got {type(space).__name__}")
        super().__init__(space, context_shape, per_cell=3 * components)
        self.levels, self.components = space.levels, components

    def initialise(self, batches: Batches) -> None:
        mean = 2.0 * _cell_means(batches, self.space.shape) / (self.levels - 1) - 1.0
        spread = torch.linspace(-0.5, 0.5, self.components) if self.components > 1 else torch.zeros(1)
        values = torch.zeros(*self.space.shape, 3 * self.components, dtype=torch.float64)
        values[..., self.components : 2 * self.components] = mean.unsqueeze(-1) + spread
        values[..., 2 * self.components :] = -2.0
        self._add_to_bias(values)

    def forward(self, context: Tensor) -> DiscretizedLogisticMixture:
        logits, means, log_scales = self.parameters_of(context).chunk(3, -1)
        return DiscretizedLogisticMixture(logits, means, log_scales, self.levels, self.trailing)


class _ScaledHead(Head):
    """A head over real cells whose numbers are in standard units; location and scale come from the data."""

    location: Tensor
    unit: Tensor

    def __init__(self, space: Space, context_shape: Sequence[int], per_cell: int) -> None:
        super().__init__(space, context_shape, per_cell)
        self.register_buffer("location", torch.zeros(space.shape, dtype=torch.float64))
        self.register_buffer("unit", torch.ones(space.shape, dtype=torch.float64))

    @torch.no_grad()
    def initialise(self, batches: Batches) -> None:
        location, unit = _location_and_scale(batches, self.space.shape)
        self.location.copy_(location)
        self.unit.copy_(unit)

    def _raw(self, mean: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-scale in raw units.  A scale below 10⁻⁴ of the data's is refused: densities must not blow up."""
        unit = self.unit.to(mean.dtype)
        return self.location.to(mean.dtype) + unit * mean, log_scale.clamp(min=-9.2) + torch.log(unit)


def _location_and_scale(batches: Batches, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every cell over its observed values (float64); 1 for a constant cell."""
    mean = _cell_means(batches, shape)
    total, count = torch.zeros_like(mean), torch.zeros_like(mean)
    for x, _ in batches:
        centred = x.to(mean) - mean
        total += centred.nan_to_num(0.0).square().sum(0)
        count += (~torch.isnan(centred)).sum(0)
    deviation = (total / count.clamp(min=1.0)).sqrt()
    return mean, torch.where(deviation > 1e-12 * (1.0 + mean.abs()), deviation, 1.0)


class NormalHead(_ScaledHead):
    """Real cells: a normal with a learned mean and scale.

    Args:
        scale: ``cell`` (one learned scale a cell), ``context`` (predicted from the context too), or a number: σ in
            raw units, fixed.
    """

    def __init__(self, space: Space, context_shape: Sequence[int], scale: str | float = "context") -> None:
        if scale not in ("cell", "context") and isinstance(scale, str):
            raise ValueError(f"scale: expected 'cell', 'context' or a number, got {scale!r}")
        super().__init__(space, context_shape, per_cell=2 if scale == "context" else 1)
        self.scale = scale
        if scale == "cell":
            self.log_scale = nn.Parameter(torch.zeros(space.shape))

    def forward(self, context: Tensor) -> Normal:
        values = self.parameters_of(context)
        if self.scale == "context":
            return Normal(*self._raw(values[..., 0], values[..., 1]), self.trailing)
        if self.scale == "cell":
            return Normal(*self._raw(values, self.log_scale.to(values.dtype)), self.trailing)
        mean, _ = self._raw(values, torch.zeros((), dtype=values.dtype))
        return Normal(mean, torch.tensor(float(self.scale), dtype=values.dtype).log(), self.trailing)


class StudentHead(_ScaledHead):
    """Real cells with heavy tails: Student's t, mean and scale from the context, one learned ν a cell (from ν = 8)."""

    def __init__(self, space: Space, context_shape: Sequence[int]) -> None:
        super().__init__(space, context_shape, per_cell=2)
        self.log_df = nn.Parameter(torch.full(space.shape, 2.0794))

    def forward(self, context: Tensor) -> StudentT:
        values = self.parameters_of(context)
        mean, log_scale = self._raw(values[..., 0], values[..., 1])
        return StudentT(mean, log_scale, self.log_df.to(values.dtype).clamp(-0.7, 7.0), self.trailing)


class NegativeBinomialHead(Head):
    """Counts: a mean from the context and a learned dispersion a cell (Lopez et al. 2018, scVI)."""

    def __init__(self, space: Space, context_shape: Sequence[int]) -> None:
        super().__init__(space, context_shape, per_cell=1)
        self.log_dispersion = nn.Parameter(torch.zeros(space.shape))

    def initialise(self, batches: Batches) -> None:
        self._add_to_bias(torch.log(_cell_means(batches, self.space.shape).clamp(min=1e-3)))

    def forward(self, context: Tensor) -> NegativeBinomial:
        log_mean = self.parameters_of(context).clamp(-20.0, 20.0)
        return NegativeBinomial(log_mean, self.log_dispersion.to(log_mean.dtype).clamp(-7.0, 9.0), self.trailing)


class MultinomialHead(Head):
    """Counts as shares of a total: x | N ~ multinomial (Liang et al. 2018, arXiv 1802.05814), N ~ negative binomial.

    The total is part of the example and so part of the bound; its law is learned and does not depend on the context.
    """

    def __init__(self, space: Space, context_shape: Sequence[int]) -> None:
        if space.missing:
            raise Unsupported("likelihood 'multinomial' needs every count of an example; this data has missing cells")
        super().__init__(space, context_shape, per_cell=1)
        self.log_total_mean = nn.Parameter(torch.zeros(()))
        self.log_total_dispersion = nn.Parameter(torch.zeros(()))

    def initialise(self, batches: Batches) -> None:
        mean = _cell_means(batches, self.space.shape)
        self._add_to_bias(torch.log(mean.clamp(min=1e-6)))
        with torch.no_grad():
            self.log_total_mean.copy_(torch.log(mean.sum().clamp(min=1e-3)))

    def forward(self, context: Tensor) -> Multinomial:
        logits = self.parameters_of(context)
        lead = logits.shape[: logits.dim() - self.trailing]
        mean = self.log_total_mean.to(logits.dtype).expand(lead)
        total = NegativeBinomial(mean, self.log_total_dispersion.to(logits.dtype).clamp(-7.0, 9.0), trailing=0)
        return Multinomial(logits, total, self.trailing)


class TableDistribution:
    """The distribution of a row: one categorical a coded column, one grid mixture over all numeric columns."""

    def __init__(
        self, coded: dict[int, Categorical | Clustered], numeric: list[int], mixture: GridLogisticMixture | None
    ) -> None:
        self.coded, self.numeric, self.mixture = coded, numeric, mixture

    def log_prob(self, x: Tensor) -> Tensor:
        return self._assemble(
            lambda columns, distribution: distribution.log_prob(x[..., columns]),
        )

    def sample(self, noise: Noise) -> Tensor:
        return self._assemble(lambda columns, distribution: distribution.sample(noise), torch.float64)

    def best(self, weights: Tensor | None = None) -> Tensor:
        return self._assemble(lambda columns, distribution: distribution.best(weights), torch.float64)

    def _assemble(self, function: Any, dtype: torch.dtype | None = None) -> Tensor:
        """Cells of the groups put side by side, in the table's order."""
        groups: list[tuple[list[int], Any]] = [([j], distribution) for j, distribution in self.coded.items()]
        if self.mixture is not None:
            groups.append((self.numeric, self.mixture))
        order = [j for columns, _ in groups for j in columns]
        cells = torch.cat([function(columns, distribution) for columns, distribution in groups], -1)
        back = torch.tensor(order, device=cells.device).argsort()
        cells = cells[..., back]
        return cells if dtype is None else cells.to(dtype)


#: A column with more levels has clusters of them.
_MOST_LEVELS = 4096


class TableHead(Head):
    """A mixed row: a head a column.

    A coded column has a categorical; one of very many levels has a cluster and a member of it, so that memory does not
    grow as levels times context (:class:`~likely.distributions.clustered.Clustered`).  A numeric column has a mixture
    of logistics on its grid (or a density, without one) and, on a grid, an atom for each value that at least
    ``atom_share`` of the training cells have.

    Args:
        components: K, logistics a numeric column.
        atoms: the most atoms a column may have.
        atom_share: share of the observed cells that makes a value an atom.
        recall: whether a column on a grid may fall back on the values seen in training, as often as they were seen,
            where enough of its values come again that are no atoms, though the grid is fine.
    """

    location: Tensor
    unit: Tensor
    resolution: Tensor
    atoms: Tensor
    has_atom: Tensor
    recalled_values: Tensor
    recalled_counts: Tensor
    recalled_sizes: Tensor

    def __init__(
        self,
        space: Space,
        context_shape: Sequence[int],
        components: int = 5,
        atoms: int = 32,
        atom_share: float = 0.005,
        recall: bool = False,
    ) -> None:
        if not isinstance(space, Table):
            raise Unsupported(f"likelihood 'table' is for tables, got {type(space).__name__}")
        if len(context_shape) != 1:
            raise Unsupported("likelihood 'table' needs a vector context: use network 'mlp' or 'residual'")
        nn.Module.__init__(self)
        self.space, self.trailing = space, 1
        self.components, self.most_atoms, self.atom_share = components, atoms, atom_share
        self.coded = [j for j, column in enumerate(space.columns) if column.coded]
        self.numeric = [j for j, column in enumerate(space.columns) if column.numeric]
        self.levels = [space.columns[j].levels or 1 for j in self.coded]
        columns: list[Column] = [space.columns[j] for j in self.numeric]
        resolution = torch.tensor([column.resolution or 0.0 for column in columns], dtype=torch.float64)
        self.register_buffer("resolution", resolution)
        self.register_buffer("location", torch.zeros(len(columns), dtype=torch.float64))
        self.register_buffer("unit", torch.ones(len(columns), dtype=torch.float64))
        slots = atoms if any(column.resolution for column in columns) else 0
        self.register_buffer("atoms", torch.zeros(len(columns), slots, dtype=torch.float64))
        self.register_buffer("has_atom", torch.zeros(len(columns), slots, dtype=torch.bool))
        self.recall = recall and bool(slots)
        if self.recall:
            self.register_buffer("recalled_values", torch.zeros(0, dtype=torch.float64))
            self.register_buffer("recalled_counts", torch.zeros(0, dtype=torch.float64))
            self.register_buffer("recalled_sizes", torch.zeros(len(columns), dtype=torch.int64))
        self.per_column = 3 * components + slots + self.recall
        self.tables = nn.ParameterDict(
            {str(j): nn.Parameter(torch.zeros(n)) for j, n in zip(self.coded, self.levels) if n > _MOST_LEVELS}
        )
        outputs = sum(map(self._numbers, self.levels)) + len(columns) * self.per_column
        self.output = glorot(Linear(context_shape[0], outputs))

    @staticmethod
    def _numbers(levels: int) -> int:
        """How many numbers the law of a coded column takes from the output layer."""
        return levels if levels <= _MOST_LEVELS else sum(_clusters(levels))

    def cell_of_number(self) -> list[int]:
        coded = [j for j, levels in zip(self.coded, self.levels) for _ in range(self._numbers(levels))]
        return coded + [j for j in self.numeric for _ in range(self.per_column)]

    @torch.no_grad()
    def set_atoms(self, values: Tensor) -> None:
        """Give every column on a grid the same atoms, in steps of its grid: shape ``(at most atoms,)``."""
        if not self.atoms.shape[1]:  # no column lives on a grid
            return
        self.atoms[:, : len(values)] = values * self.resolution.unsqueeze(-1)
        self.has_atom[:, : len(values)] = self.resolution.unsqueeze(-1) > 0

    @torch.no_grad()
    def initialise(self, batches: Batches) -> None:
        shares = self._initialise_numeric(batches) if self.numeric else torch.zeros(0)
        pieces = [*self._category_logits(batches), shares.reshape(-1)]
        bias = self.output.bias
        assert isinstance(bias, Tensor)
        bias.add_(torch.cat(pieces).to(bias))

    def _category_logits(self, batches: Batches) -> list[Tensor]:
        counts = [torch.zeros(levels, dtype=torch.float64) for levels in self.levels]
        if counts:
            for x, _ in batches:
                for j, count in zip(self.coded, counts):
                    codes = x[:, j]
                    count += torch.bincount(codes[~torch.isnan(codes)].long(), minlength=len(count))
        found = []
        for j, count in zip(self.coded, counts):
            log_share = torch.log((count + 0.5) / (count + 0.5).sum())
            if str(j) in self.tables:  # of the clusters, and of the members within each
                within = _in_clusters(log_share)
                of_cluster = within.logsumexp(1)
                self.tables[str(j)].copy_((within - of_cluster.unsqueeze(1)).flatten()[: len(count)])
                log_share = torch.cat([of_cluster, torch.zeros(within.shape[1], dtype=torch.float64)])
            found.append(log_share)
        return found

    def _initialise_numeric(self, batches: Batches) -> Tensor:
        """Location, unit and atoms of the numeric columns; returns their output biases ``(columns, per_column)``."""
        location, unit = _location_and_scale(batches, self.space.shape)
        self.location.copy_(location[self.numeric])
        self.unit.copy_(unit[self.numeric])
        picked = _thinned(batches, self.numeric) if self.atoms.shape[1] else torch.zeros(0)
        bias = torch.zeros(len(self.numeric), self.per_column, dtype=torch.float64)
        k = self.components
        bias[:, k : 2 * k] = torch.linspace(-1.0, 1.5, k) if k > 1 else 0.0
        bias[:, 2 * k : 3 * k] = -0.5
        for i in range(len(self.numeric)):
            if self.resolution[i] > 0 and self.atoms.shape[1]:
                values, share = _frequent(picked[:, i], self.atom_share, self.most_atoms)
                self.atoms[i, : len(values)] = values
                self.has_atom[i, : len(values)] = True
                rest = max(1.0 - float(share.sum()), 1e-3)
                bias[i, :k] = torch.log(torch.tensor(rest / k))
                bias[i, 3 * k : 3 * k + len(values)] = torch.log(share.clamp(min=1e-4))
        if self.recall:
            self._remember(picked, bias)
        return bias

    def _remember(self, picked: Tensor, bias: Tensor) -> None:
        """Keep the values of the columns of which enough come again; give half the rest of the weight to them."""
        kept: list[tuple[Tensor, Tensor]] = []
        for i in range(len(self.numeric)):
            values, counts = _seen(picked[:, i])
            plain = ~torch.isin(values, self.atoms[i][self.has_atom[i]])
            again = (counts * (counts > 1) * plain).sum() / counts.sum().clamp(min=1)
            if not (self.resolution[i] > 0 and again > _LEAST_RECALLED and _sparse(picked[:, i], self.resolution[i])):
                values, counts = values[:0], counts[:0]
            kept.append((values, counts))
            k = self.components
            bias[i, -1] = torch.logsumexp(bias[i, :k], 0) - 0.7 if len(values) else 0.0
            bias[i, :k] -= 0.7 if len(values) else 0.0
        self.recalled_values = torch.cat([values for values, _ in kept]).to(self.recalled_values)
        self.recalled_counts = torch.cat([counts for _, counts in kept]).to(self.recalled_counts)
        self.recalled_sizes.copy_(torch.tensor([len(values) for values, _ in kept]))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """What is recalled has the size that the data gave it."""
        for name in ("recalled_values", "recalled_counts"):
            found = state_dict.get(prefix + name)
            if self.recall and found is not None:
                setattr(self, name, getattr(self, name).new_zeros(found.shape))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def forward(self, context: Tensor) -> TableDistribution:
        values = full_precision(self.output(context))
        start = 0
        coded: dict[int, Categorical | Clustered] = {}
        for j, levels in zip(self.coded, self.levels):
            logits = values[..., start : start + self._numbers(levels)].unsqueeze(-2)
            start += logits.shape[-1]
            if str(j) in self.tables:
                clusters, members = logits.split(_clusters(levels), -1)
                coded[j] = Clustered(clusters, members, _in_clusters(self.tables[str(j)]))
            else:
                coded[j] = Categorical(logits, 1)
        mixture = None
        if self.numeric:
            block = values[..., start:].reshape(*values.shape[:-1], len(self.numeric), self.per_column)
            k = self.components
            weights, means, log_scales, atoms = block.split([k, k, k, self.per_column - 3 * k], -1)
            has = self.has_atom
            recalled = None
            if self.recall:
                has = torch.cat([has, self.recalled_sizes.unsqueeze(-1) > 0], -1)
                sizes = self.recalled_sizes.tolist()
                recalled = Recalled(
                    self.recalled_values.split(sizes), self.recalled_counts.split(sizes), leave_out=self.training
                )
            atoms = atoms.masked_fill(~has, -torch.inf)
            mixture = GridLogisticMixture(
                torch.cat([weights, atoms], -1),
                means,
                log_scales,
                self.location,
                self.unit,
                self.resolution,
                self.atoms,
                recalled,
            )
        return TableDistribution(coded, self.numeric, mixture)


def _clusters(levels: int) -> tuple[int, int]:
    """Numbers of clusters and of members of each, as near to each other as whole numbers allow."""
    members = math.isqrt(levels - 1) + 1
    return -(-levels // members), members


def _in_clusters(values: Tensor) -> Tensor:
    """A value for each level as ``(clusters, members)``, −∞ where there is no level."""
    clusters, members = _clusters(len(values))
    return torch.cat([values, values.new_full((clusters * members - len(values),), -torch.inf)]).reshape(clusters, -1)


def _thinned(batches: Batches, columns: list[int], most: int = 400_000) -> Tensor:
    """Columns of evenly spread rows, at most ``most`` of them, whatever the number of rows."""
    kept: list[Tensor] = []
    stride, seen, held = 1, 0, 0
    for x, _ in batches:
        first = -seen % stride
        kept.append(x[first::stride, columns].double())
        seen, held = seen + len(x), held + len(kept[-1])
        if held > most:
            together = torch.cat(kept)[::2]
            kept, stride, held = [together], 2 * stride, len(together)
    return torch.cat(kept)


#: Share of the cells with a value that comes again, and is no atom, from which on a column recalls its values.
_LEAST_RECALLED = 0.2
_MOST_RECALLED = 1 << 17
#: Share of the grid between the outer twentieths of the cells that the values may fill, if they are to be recalled.
_MOST_FILLED = 0.25


def _sparse(values: Tensor, resolution: Tensor) -> bool:
    """Whether the values are few for the grid they live on, so that it is no smooth law that makes them come again."""
    values = values[~torch.isnan(values)].sort().values
    low, high = values[len(values) // 20], values[-1 - len(values) // 20]
    between = torch.unique(values[(values >= low) & (values <= high)])
    return len(between) < _MOST_FILLED * (float((high - low) / resolution) + 1.0)


def _seen(values: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct values, ascending, and how often each was seen; those seen most if there are too many."""
    values, counts = torch.unique(values[~torch.isnan(values)], return_counts=True)
    if len(values) > _MOST_RECALLED:
        keep = counts.argsort(descending=True, stable=True)[:_MOST_RECALLED].sort().values
        values, counts = values[keep], counts[keep]
    return values, counts.double()


def _frequent(values: Tensor, share: float, most: int) -> tuple[Tensor, Tensor]:
    """Values held by at least ``share`` of the observed cells, at most ``most`` of them, with their shares."""
    values = values[~torch.isnan(values)]
    if not len(values):
        return values, values
    distinct, counts = torch.unique(values, return_counts=True)
    shares = counts.double() / len(values)
    keep = shares.argsort(descending=True, stable=True)[:most]
    keep = keep[(shares[keep] >= share) & (counts[keep] > 1)]
    return distinct[keep], shares[keep]


_LIKELIHOODS: dict[str, tuple[type[Head], tuple[type[Space], ...]]] = {
    "bernoulli": (BernoulliHead, (Binary,)),
    "categorical": (CategoricalHead, (Integers, Tokens)),
    "logistic": (LogisticMixtureHead, (Integers,)),
    "normal": (NormalHead, (Reals,)),
    "student": (StudentHead, (Reals,)),
    "negative-binomial": (NegativeBinomialHead, (Counts,)),
    "multinomial": (MultinomialHead, (Counts,)),
    "table": (TableHead, (Table,)),
}


def likelihoods(space: Space) -> list[str]:
    """Names of the likelihoods that suit a space, the default first.

    >>> likelihoods(Integers((3, 32, 32), levels=256))
    ['logistic', 'categorical']
    >>> likelihoods(Reals((4,)))
    ['normal', 'student']
    """
    names = [name for name, (_, spaces) in _LIKELIHOODS.items() if isinstance(space, spaces)]
    if isinstance(space, Integers) and space.levels > 8:
        names.reverse()
    return names


def head(name: str, space: Space, context_shape: Sequence[int], **options: Any) -> Head:
    """The head of that name; ``auto`` is the first of :func:`likelihoods`.

    Raises:
        Unsupported: the likelihood does not suit the space.
    """
    suited = likelihoods(space)
    if name == "auto":
        name = suited[0]
    if name not in suited:
        raise Unsupported(
            f"likelihood: expected one of auto, {', '.join(suited)} for {type(space).__name__}, got {name!r}"
        )
    cls = _LIKELIHOODS[name][0]
    check_options(cls, options)
    return cls(space, context_shape, **options)
