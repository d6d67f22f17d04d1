r"""Mixture: K simple laws, fitted by EM (Dempster, Laird & Rubin 1977, J. R. Statist. Soc. B 39, 1-38).

    log p(x) = log Σ_k π_k Π_d p_kd(x_d)                                                                        (1)
    r_k(x) = π_k p_k(x) / p(x)                                                         (responsibilities)       (2)

Given its component the cells of an example are independent (a latent class model), so a missing cell is left out of
the product, exactly.  The laws p_kd:

* binary cells, levels, tokens, coded columns: a categorical law;
* real cells and numeric columns: N(μ_kd, σ²_kd).  On a grid of spacing s its mass within x ± s/2, and up to ``atoms``
  frequent values v with a mass of their own: w_k0 mass_k(x) + Σ_v w_kv [x = v] (ages, hours and prices have peaks that
  no smooth law has; EM shares the cell between atom and normal law, as in (2)).  With
  ``covariance="full"`` (spaces of reals) the cells of a component are N(μ_k, Σ_k) jointly, and missing cells are
  integrated out;
* counts: negative binomial with mean m_kd and dispersion ρ_kd (variance m + m²/ρ), or Poisson.

EM maximises Σ_n log p(x_n) + log p(θ), where the prior p(θ) is worth ``smoothing`` = a examples a component, drawn from
the dimension's own marginal (variances: from σ²/K^(2/D), Fraley & Raftery 2007, J. Classification 24, 155-181); a = 0
is maximum likelihood.  The E-step sums sufficient statistics over the batches, so one iteration is one exact pass over
the data whatever their number; the M-step is in closed form:

    π_k = (R_k + a/K) / (N + a),   R_k = Σ_n r_k(x_n)                                                           (3)
    categorical   p_k(v) = (Σ_n r_k [x_n = v] + a g(v)) / (R_k + a)                                             (4)
    normal        μ_k = Σ_n r_k E[y_n] / R_k,   σ²_k = (Σ_n r_k E[(y_n − μ_k)²] + a v_0) / (R_k + a)            (5)
    atoms         w_k as in (4) with the expected counts, of which σ² and μ get those of the normal law
    neg. binomial m_k = (Σ_n r_k x_n + a m_0) / (Σ_n r_k E[λ_n] + a),
                  log ρ_k − ψ(ρ_k) = (Σ_n r_k E[λ_n − log λ_n] + a (1 + c_0)) / (R_k + a) − 1                   (6)

y_n: the value itself, or on a grid a truncated normal variate in the cell of x_n;  λ_n ~ Gamma(ρ + x_n, ρ + m): the
negative binomial is a Poisson law of mean mλ.  No iteration can lower the objective.  It starts from k-means++ centres
(Arthur & Vassilvitskii 2007) on a bounded sample of the data, the best of ``restarts`` after EM on that sample.

The parameters are ``nn.Parameter`` s and (1) is differentiable in them and in x, so that a mixture can be trained by
gradients as the prior of a latent-variable model.  Untrained it is K spread components, near N(0, I) on reals.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.contract import (
    Batches,
    Binary,
    Bound,
    Counts,
    Integers,
    Model,
    Reals,
    Report,
    Space,
    Table,
    Tokens,
    Unsupported,
    noise_or_global,
)
from likely.data.streaming import Histogram, Moments, Reservoir
from likely.distributions.counts import NegativeBinomial
from likely.distributions.grid_normal import cell_moments, log_cell_mass
from likely.models.gaussian import leave_one_out, patterns, share_rest
from likely.models.independent import invert, space_levels
from likely.noise import Noise, torch_generator

if TYPE_CHECKING:
    from likely.coding.components import ComponentsCodec
    from likely.coding.normals import DiagonalNormals, JointNormals
    from likely.coding.staircase import Lattice, Staircase

_LOG_2PI = math.log(2.0 * math.pi)
_SAMPLE_ROWS, _SAMPLE_CELLS = 4096, 1 << 22
_SAMPLE_PASSES = 30
_CHUNK = 1 << 22  # numbers in the largest temporary of the E-step
_STEEPEST = 1e8  # largest term of a quadratic form that is added up term by term, which loses as many digits
_LEAST_SCALE = 1e-6  # of the dimension's own deviation; only smoothing = 0 comes near it

Covariance = Literal["diagonal", "full"]
CountLaw = Literal["negative binomial", "poisson"]


class Mixture(Model):
    """A mixture of products of simple laws, fitted by EM; every space, exact, missing cells left out exactly.

    >>> model = Mixture(Reals((1,)), components=2)
    >>> x = torch.tensor([-5.1, -5.0, -4.9, 4.9, 5.0, 5.1]).unsqueeze(1)
    >>> model.estimate([(x, None)])
    >>> model.encode(x).argmax(1).unique_consecutive().numel()
    2

    Args:
        components: K.
        covariance: ``diagonal`` or ``full``; full for spaces of reals only.
        counts: law of a count, ``negative binomial`` or ``poisson``.
        smoothing: a, the examples that the prior is worth; 0 for maximum likelihood.
        passes: most iterations of EM over the data.
        tolerance: EM ends when an iteration gains fewer nats per dimension.
        restarts: k-means++ starts, of which the best on a sample is taken.
        seed: seed of the starts and of the untrained parameters.
        atoms: most values of a numeric grid column that have a mass of their own in every component.
    """

    spaces = (Binary, Integers, Reals, Counts, Tokens, Table)
    closed_form = True

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        *,
        components: int = 10,
        covariance: Covariance = "diagonal",
        counts: CountLaw = "negative binomial",
        smoothing: float = 10.0,
        passes: int = 100,
        tolerance: float = 1e-5,
        restarts: int = 3,
        seed: int = 0,
        atoms: int = 64,
    ):
        super().__init__(space, condition)
        for option, number in (("components", components), ("passes", passes), ("restarts", restarts)):
            if number < 1:
                raise ValueError(f"{option}: expected at least 1, got {number}")
        if atoms < 0:
            raise ValueError(f"atoms: expected a number from 0 up, got {atoms}")
        if covariance not in get_args(Covariance):
            raise ValueError(f"covariance: expected 'diagonal' or 'full', got {covariance!r}")
        if counts not in get_args(CountLaw):
            raise ValueError(f"counts: expected 'negative binomial' or 'poisson', got {counts!r}")
        if covariance == "full" and not isinstance(space, Reals):
            raise Unsupported(f"covariance: 'full' is for spaces of reals, got {type(space).__name__}; use 'diagonal'")
        if not smoothing >= 0.0:
            raise ValueError(f"smoothing: expected a number from 0 up, got {smoothing}")
        self.components, self.smoothing, self.passes, self.tolerance = components, smoothing, passes, tolerance
        self.restarts, self.seed = restarts, seed
        self.latent_dim = components
        self._groups: list[list[int]] = []
        laws: list[_Law] = []
        if isinstance(space, Table):
            numeric = [j for j, column in enumerate(space.columns) if column.numeric]
            coded = [j for j, column in enumerate(space.columns) if column.coded]
            if numeric:
                laws.append(_Normals(components, [space.columns[j].resolution or 0.0 for j in numeric], atoms))
                self._groups.append(numeric)
            if coded:
                laws.append(_Codes(components, [space.columns[j].levels or 0 for j in coded], ordered=False))
                self._groups.append(coded)
        else:
            self._groups.append(list(range(space.dims)))
            if isinstance(space, Reals):
                diagonal = _Normals(components, [0.0] * space.dims, atoms=0)
                laws.append(_FullNormals(components, space.dims) if covariance == "full" else diagonal)
            elif isinstance(space, Counts):
                laws.append(_Amounts(components, space.dims, counts))
            else:
                laws.append(_Codes(components, [space_levels(space)] * space.dims, isinstance(space, Integers)))
        self.laws = nn.ModuleList(laws)
        self.logits = nn.Parameter(torch.zeros(components, dtype=torch.float64))
        generator = torch.Generator().manual_seed(seed)
        for law in laws:
            law.spread(generator, 1.0)

    # ---------------------------------------------------------------------------------------------- the bound

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        return Bound("exact", {"likelihood": torch.logsumexp(self._log_joint(x), 1)})

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Responsibilities, equation (2), given the observed cells: shape ``(batch, components)``."""
        return torch.softmax(self._log_joint(x), 1)

    def column_nats(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Contribution of each cell in nats, 0 where missing: shape ``(batch, *space.shape)``; they sum to the bound.

        What the cell adds to the other observed cells, log p(x_d | the others) = log p(x) − log p(x without x_d), and
        an equal share of the rest (:func:`~likely.models.gaussian.share_rest`).
        """
        log_joint = self._log_joint(x)
        total = torch.logsumexp(log_joint, 1, keepdim=True)
        alone = total.new_zeros((len(x), self.space.dims))
        seen = torch.zeros_like(alone, dtype=torch.bool)
        for columns, law, cells, present in self._cells(x):
            without = torch.logsumexp(log_joint.unsqueeze(2) - law.cells(cells, present), 1)
            alone[:, columns] = torch.where(present, total - without, 0.0)
            seen[:, columns] = present
        return share_rest(total.squeeze(1), alone, seen).reshape(x.shape)

    def _log_joint(self, x: Tensor) -> Tensor:
        """log π_k p_k(x): shape ``(batch, components)``."""
        log_joint = torch.log_softmax(self.logits, 0).expand(len(x), -1)
        for _, law, cells, present in self._cells(x):
            log_joint = log_joint + law.joint(cells, present)
        return log_joint

    def _cells(self, x: Tensor) -> Iterator[tuple[list[int], _Law, Tensor, Tensor]]:
        """For each law its columns, their cells with 0 for missing ones, and which cells are present."""
        flat = x.reshape(len(x), -1)
        for columns, law in self._laws():
            cells = (flat if len(columns) == flat.shape[1] else flat[:, columns]).to(self.logits.dtype)
            present = ~torch.isnan(cells)
            yield columns, law, torch.where(present, cells, 0.0), present

    def _laws(self) -> Iterator[tuple[list[int], _Law]]:
        for columns, law in zip(self._groups, self.laws):
            assert isinstance(law, _Law)
            yield columns, law

    # --------------------------------------------------------------------------------- samples and imputations

    @torch.no_grad()
    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """``n`` draws, no cell missing: shape ``(n, *space.shape)``."""
        noise = noise_or_global(noise, self.logits)
        chances = torch.softmax(self.logits, 0).unsqueeze(0)
        component = invert(chances, noise.uniform((n, 1))).squeeze(1)
        x = self.logits.new_empty((n, self.space.dims))
        for columns, law in self._laws():
            x[:, columns] = law.draw(component, noise)
        return x.reshape(n, *self.space.shape)

    @torch.no_grad()
    def impute(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None, draws: int = 0) -> Tensor:
        """Missing cells filled given the observed ones.

        Args:
            draws: 0 for the conditional mean (brought to the grid; the most probable code for categories), shape of
                ``x``; m for m draws from the joint conditional law, shape ``(m, *x.shape)``.
        """
        noise = noise_or_global(noise, x)
        responsibility = self.encode(x)
        filled = []
        for _ in range(max(draws, 1)):
            new = self.logits.new_empty((len(x), self.space.dims))
            if draws:
                cumulative = responsibility.cumsum(1)
                uniform = noise.uniform((len(x), 1)).to(cumulative) * cumulative[:, -1:]
                component = torch.searchsorted(cumulative, uniform, right=True).squeeze(1)
                component = component.clamp(max=self.components - 1)
            for columns, law, cells, present in self._cells(x):
                if not draws:
                    new[:, columns] = law.best(responsibility, cells, present)
                else:
                    new[:, columns] = law.draw_missing(component, cells, present, noise)
            filled.append(torch.where(torch.isnan(x), new.reshape(x.shape), x.to(new)))
        return torch.stack(filled) if draws else filled[0]

    # ----------------------------------------------------------------------------------------------- the codec

    def codec(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> ComponentsCodec:
        """Bits-back over the component, by its responsibility (2): it costs −log2 of (1).

        Raises:
            NoCodec: real numbers without a grid.
        """
        from likely.coding.components import ComponentsCodec, Laws
        from likely.coding.rows import Rows, spare_at_most
        from likely.coding.staircase import Lattice, Staircases, parameters

        rows, log_weights = Rows(self.space, spacing), parameters(self.logits)
        lattice = Lattice(spacing, bound, spare_at_most(spare_bits, self.space))
        if spacing is not None and bound is not None:
            law = self.laws[0]
            assert isinstance(law, _Normals | _FullNormals)
            return ComponentsCodec(rows, law.on_grid(spacing, bound), log_weights)
        tables: dict[int, Staircase] = {}
        for columns, law in self._laws():
            tables.update(zip(columns, law.staircases(lattice)))
        laws: Laws = Staircases([tables[j] for j in range(self.space.dims)])
        return ComponentsCodec(rows, laws, log_weights)

    # ------------------------------------------------------------------------------------------------- the fit

    @torch.no_grad()
    def estimate(self, batches: Batches, report: Report | None = None) -> None:
        """EM until an iteration gains less than ``tolerance``; memory does not grow with the examples."""
        sample = self._look(batches)
        pieces = [sample[i : i + 1024] for i in range(0, len(sample), 1024)]
        generator = torch.Generator().manual_seed(self.seed)
        best, kept = -math.inf, self.state_dict()
        for _ in range(self.restarts if self.components > 1 else 1):
            self._start(sample, generator)
            value = -math.inf
            for _ in range(_SAMPLE_PASSES):
                before, value = value, self.iterate(pieces)[0]
                if value - before < self.tolerance * self.space.dims:
                    break
            if value > best:
                best, kept = value, {name: tensor.clone() for name, tensor in self.state_dict().items()}
        self.load_state_dict(kept)
        before = -math.inf
        for step in range(self.passes):
            value, nats = self.iterate(x for x, _ in batches)
            if report is not None and report(step + 2, nats):
                break
            if value - before < self.tolerance * self.space.dims:
                break
            before = value

    @torch.no_grad()
    def iterate(self, batches: Iterable[Tensor]) -> tuple[float, float]:
        """One iteration of EM: one pass over ``batches``, then the M-step.

        Returns, both before the M-step and per example: the objective (log-likelihood plus log prior, nats, up to a
        constant), and the mean of the bound (nats).
        """
        size = torch.zeros_like(self.logits)
        for _, law in self._laws():
            law.zero()
        widest = max(len(columns) for columns in self._groups)
        rows = max(1, _CHUNK // (self.components * widest))
        total, n = 0.0, 0
        for batch in batches:
            for x in batch.split(rows):
                log_joint, seen = torch.log_softmax(self.logits, 0).expand(len(x), -1), []
                for _, law, cells, present in self._cells(x):
                    of_law, detail = law.joint_in_detail(cells, present)
                    log_joint = log_joint + of_law
                    seen.append((law, cells, present, detail))
                top = log_joint.amax(1, True)
                responsibility = (log_joint - top).exp_()
                evidence = responsibility.sum(1, True)
                total, n = total + float((top + evidence.log()).sum()), n + len(x)
                responsibility /= evidence
                size += responsibility.sum(0)
                for law, cells, present, detail in seen:
                    law.add(cells, present, responsibility, detail)
        a, log_weight = self.smoothing, torch.log_softmax(self.logits, 0)
        objective = total + (float(log_weight.sum()) * a / self.components if a > 0 else 0.0)
        for _, law in self._laws():
            objective += law.log_prior(a) if a > 0 else 0.0
            law.maximise(a)
        weight = (size + a / self.components) / (n + a)
        self.logits.copy_(weight.clamp(min=1e-300).log())
        return objective / n, total / n

    def _look(self, batches: Batches) -> Tensor:
        """The first pass: the marginals that the prior and the starts need, and a sample of the examples."""
        dims = self.space.dims
        reservoir = Reservoir(min(_SAMPLE_ROWS, max(64, _SAMPLE_CELLS // dims)), dims, self.seed)
        for _, law in self._laws():
            law.look_start()
        for x, _ in batches:
            reservoir.add(x.reshape(len(x), -1).double())
            for _, law, cells, present in self._cells(x):
                law.look(cells, present)
        for _, law in self._laws():
            law.look_end()
        return reservoir.rows().to(self.logits).reshape(-1, *self.space.shape)

    def _start(self, sample: Tensor, generator: torch.Generator) -> None:
        """k-means++: every further centre is an example drawn in proportion to its distance from the nearest one."""
        device = sample.device
        chances = torch.ones(len(sample), dtype=torch.float64)
        nearest = torch.full((len(sample),), math.inf, dtype=torch.float64)
        chosen: list[int] = []
        for _ in range(self.components):
            if not chances.sum() > 0:
                chances = torch.ones_like(chances)
            place = int(torch.multinomial(chances, 1, generator=generator))
            chosen.append(place)
            distance = torch.zeros(len(sample), dtype=torch.float64, device=device)
            for _, law, cells, present in self._cells(sample):
                distance += law.distance(cells, present, place)
            nearest = torch.minimum(nearest, distance.cpu())
            chances = nearest
        centres = sample[torch.tensor(chosen, device=device)]
        for _, law, cells, present in self._cells(centres):
            law.start(cells, present)
        self.logits.zero_()

    @classmethod
    def tiny(cls, space: Space, condition: Space | None = None) -> Mixture:
        """Two components, far apart and of different weight."""
        model = cls(space, condition, components=2)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            model.logits.copy_(torch.tensor([0.4, -0.4]))
        for _, law in model._laws():
            law.spread(generator, 3.0)
        return model


class _Law(nn.Module):
    """Laws of several cells of one kind, in each of K components.

    ``x`` has shape ``(batch, cells)`` with 0 in missing cells, ``present`` says which are not, ``r`` are
    responsibilities of shape ``(batch, K)``.
    """

    def cells(self, x: Tensor, present: Tensor) -> Tensor:
        """Log-probability of every cell, 0 where missing: shape ``(batch, K, cells)``."""
        raise NotImplementedError

    def joint(self, x: Tensor, present: Tensor) -> Tensor:
        """Log-probability of all cells together: shape ``(batch, K)``."""
        return self.cells(x, present).sum(2)

    def joint_in_detail(self, x: Tensor, present: Tensor) -> tuple[Tensor, Any]:
        """:meth:`joint`, and what :meth:`add` needs to know of the same cells."""
        return self.joint(x, present), None

    def draw(self, component: Tensor, noise: Noise) -> Tensor:
        """A draw of all cells for each entry of ``component``: shape ``(n, cells)``."""
        raise NotImplementedError

    def draw_missing(self, component: Tensor, x: Tensor, present: Tensor, noise: Noise) -> Tensor:
        """A draw of the missing cells given the others and the component; the values of the others do not matter."""
        return self.draw(component, noise)

    def best(self, r: Tensor, x: Tensor, present: Tensor) -> Tensor:
        """Best value of the missing cells given the others: shape ``(batch, cells)``."""
        raise NotImplementedError

    def spread(self, generator: torch.Generator, strength: float) -> None:
        """Untrained parameters, different in every component."""
        raise NotImplementedError

    def look_start(self) -> None:
        """Begin the pass that learns the marginals."""
        raise NotImplementedError

    def look(self, x: Tensor, present: Tensor) -> None:
        """A batch of that pass."""
        raise NotImplementedError

    def look_end(self) -> None:
        """End of that pass: set the prior."""
        raise NotImplementedError

    def distance(self, x: Tensor, present: Tensor, centre: int) -> Tensor:
        """Squared distance of every example from one of them, about 1 to 2 a cell: shape ``(batch,)``."""
        raise NotImplementedError

    def start(self, centres: Tensor, present: Tensor) -> None:
        """Parameters around K centres, shape ``(K, cells)``."""
        raise NotImplementedError

    def zero(self) -> None:
        """Empty the sufficient statistics."""
        raise NotImplementedError

    def add(self, x: Tensor, present: Tensor, r: Tensor, detail: Any) -> None:
        """Add a batch to the sufficient statistics."""
        raise NotImplementedError

    def maximise(self, a: float) -> None:
        """The M-step, with a prior worth ``a`` examples."""
        raise NotImplementedError

    def log_prior(self, a: float) -> float:
        """log p(θ) in nats, up to a constant."""
        raise NotImplementedError

    def staircases(self, lattice: Lattice) -> list[Staircase]:
        """The laws of every cell as tables of integers."""
        raise NotImplementedError


class _Codes(_Law):
    """Categorical cells; cell j owns the codes ``offset[j]`` … ``offset[j + 1]`` − 1 of one long table."""

    def __init__(self, components: int, levels: list[int], ordered: bool) -> None:
        super().__init__()
        self.levels, self.ordered, self.total = levels, ordered, sum(levels)
        starts = torch.tensor([0, *levels[:-1]]).cumsum(0)
        self.register_buffer("offset", starts, persistent=False)
        owner = torch.arange(len(levels)).repeat_interleave(torch.tensor(levels))
        self.register_buffer("owner", owner, persistent=False)
        self.logits = nn.Parameter(torch.zeros(components, self.total, dtype=torch.float64))
        self.offset: Tensor
        self.owner: Tensor

    def _log_table(self) -> Tensor:
        """Log-probabilities, shape ``(K, codes)``, normalised within each cell."""
        if len(set(self.levels)) == 1:
            shaped = self.logits.reshape(len(self.logits), -1, self.levels[0])
            return torch.log_softmax(shaped, 2).reshape(self.logits.shape)
        owner = self.owner.expand_as(self.logits)
        empty = self.logits.new_full((len(self.logits), len(self.levels)), -math.inf)
        top = empty.scatter_reduce(1, owner, self.logits.detach(), "amax")
        shifted = self.logits - top.gather(1, owner)
        sums = torch.zeros_like(top).scatter_add(1, owner, shifted.exp())
        return shifted - sums.log().gather(1, owner)

    def cells(self, x: Tensor, present: Tensor) -> Tensor:
        picked = self._log_table()[:, self.offset + x.long()]
        return torch.where(present, picked, 0.0).transpose(0, 1)

    def joint(self, x: Tensor, present: Tensor) -> Tensor:
        codes = self.offset + x.long()
        table = self._log_table().T.contiguous()
        return F.embedding_bag(codes, table, mode="sum", per_sample_weights=present.to(table))

    def draw(self, component: Tensor, noise: Noise) -> Tensor:
        uniform = noise.uniform((len(component), len(self.levels))).to(self.logits)
        codes = torch.zeros_like(uniform)
        top = torch.tensor(self.levels, device=codes.device) - 1
        place = torch.arange(len(self.levels), device=codes.device)
        for k in component.unique().tolist():
            rows = component == k
            # The masses of cell j fill the interval from j to j + 1 of one long cumulative table.
            cumulative = self._log_table()[k].double().exp().cumsum(0)
            found = torch.searchsorted(cumulative, (place + uniform[rows].double()).contiguous(), right=True)
            codes[rows] = torch.minimum((found - self.offset).clamp(min=0), top).to(codes)
        return codes

    def best(self, r: Tensor, x: Tensor, present: Tensor) -> Tensor:
        table = self._log_table().exp()
        code = torch.arange(self.total, device=x.device) - self.offset[self.owner]
        if self.ordered:
            mean = table.new_zeros((len(table), len(self.levels))).index_add_(1, self.owner, table * code)
            return (r @ mean).round()
        best = torch.empty_like(x)
        for j, (first, count) in enumerate(zip(self.offset.tolist(), self.levels)):
            best[:, j] = (r @ table[:, first : first + count]).argmax(1).to(x)
        return best

    def spread(self, generator: torch.Generator, strength: float) -> None:
        noise = torch.randn(self.logits.shape, generator=generator, dtype=torch.float64)
        self.logits.data.copy_(0.5 * strength * noise)

    def look_start(self) -> None:
        self._marginal = torch.zeros(self.total, dtype=torch.float64, device=self.logits.device)

    def look(self, x: Tensor, present: Tensor) -> None:
        self._marginal += torch.bincount((self.offset + x.long())[present], minlength=self.total)

    def look_end(self) -> None:
        count = self._marginal.new_zeros(len(self.levels)).index_add_(0, self.owner, self._marginal)
        levels = torch.tensor(self.levels, device=count.device)
        self._marginal = (self._marginal + 0.5) / (count + 0.5 * levels)[self.owner]
        code = (torch.arange(self.total, device=count.device) - self.offset[self.owner]).double()
        mean = torch.zeros_like(count).index_add_(0, self.owner, self._marginal * code)
        deviation = (code - mean[self.owner]).square() * self._marginal
        self._variance = torch.zeros_like(count).index_add_(0, self.owner, deviation)

    def distance(self, x: Tensor, present: Tensor, centre: int) -> Tensor:
        both = present & present[centre]
        if self.ordered:
            gap = (x - x[centre]).square().double() / self._variance
        else:
            gap = (x != x[centre]).double()
        return torch.where(both, gap, 0.0).sum(1)

    def start(self, centres: Tensor, present: Tensor) -> None:
        chances = self._marginal.expand(len(centres), -1).clone()
        chances.scatter_add_(1, self.offset + centres.long(), present.double())
        self.logits.copy_(chances.log())

    def zero(self) -> None:
        self._counts = torch.zeros((self.total, len(self.logits)), dtype=torch.float64, device=self.logits.device)

    def add(self, x: Tensor, present: Tensor, r: Tensor, detail: Any) -> None:
        codes = (self.offset + x.long()).T.reshape(-1)
        share = (present.T.unsqueeze(2) * r.double()).reshape(-1, r.shape[1])
        self._counts.index_add_(0, codes, share)

    def maximise(self, a: float) -> None:
        chances = self._counts.T + a * self._marginal
        self.logits.copy_(chances.clamp(min=1e-300).log())
        self.logits.copy_(self._log_table())

    def log_prior(self, a: float) -> float:
        return a * float((self._marginal * self._log_table()).sum())

    def staircases(self, lattice: Lattice) -> list[Staircase]:
        from likely.coding.staircase import codes, parameters

        table = parameters(self.logits)
        return [codes(table[:, first : first + count]) for first, count in zip(self.offset.tolist(), self.levels)]


class _Normals(_Law):
    """Normal cells with their own variances, on grids of given widths or on a continuum (width 0).

    On a grid up to ``atoms`` values have a mass of their own beside the normal law.
    """

    def __init__(self, components: int, widths: list[float], atoms: int) -> None:
        super().__init__()
        cells = len(widths)
        self._grid = any(width > 0 for width in widths)
        self.atoms = atoms if self._grid else 0
        self.register_buffer("width", torch.tensor(widths, dtype=torch.float64), persistent=False)
        self.mean = nn.Parameter(torch.zeros(components, cells, dtype=torch.float64))
        self.log_scale = nn.Parameter(torch.zeros(components, cells, dtype=torch.float64))
        self.width: Tensor
        if self.atoms:
            #: the atoms of each cell in units of its grid, ascending, then +inf where there are fewer
            self.register_buffer("step", torch.full((cells, self.atoms), math.inf, dtype=torch.float64))
            self.step: Tensor
            #: weights of the atoms and, last, of the normal law
            self.logits = nn.Parameter(torch.zeros(components, cells, self.atoms + 1, dtype=torch.float64))

    def _unit(self) -> Tensor:
        return torch.where(self.width > 0, self.width, 1.0).to(self.mean.dtype)

    def _log_normal(self, x: Tensor) -> Tensor:
        """Density, or mass on a grid, of the normal law: shape ``(batch, K, cells)``."""
        x = x.unsqueeze(1)
        standard = (x - self.mean) * torch.exp(-self.log_scale)
        nats = -0.5 * (standard.square() + _LOG_2PI) - self.log_scale
        if self._grid:
            mass = log_cell_mass(x, self.mean, self.log_scale.exp(), self._unit())
            nats = torch.where(self.width > 0, mass, nats)
        return nats

    def _log_weights(self) -> Tensor:
        """Log-weights of the atoms and, last, of the normal law: shape ``(K, cells, atoms + 1)``."""
        unused = F.pad(torch.isinf(self.step), (0, 1), value=False)
        return torch.log_softmax(self.logits.masked_fill(unused, -math.inf), 2)

    def _find(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Place of each value among the atoms of its cell, and whether it is one: both ``(batch, cells)``."""
        steps = (x.double() / torch.where(self.width > 0, self.width, math.inf)).round()
        place = torch.searchsorted(self.step, steps.T.contiguous()).clamp(max=self.atoms - 1)
        return place.T, (steps == self.step.gather(1, place).T) & (self.width > 0)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probability of every cell; that of its normal law; and log-probability of its atom.

        All have shape ``(batch, K, cells)``, −inf where there is no atom.
        """
        log_normal = self._log_normal(x)
        if not self.atoms:
            return log_normal, log_normal, None
        log_weights = self._log_weights()
        place, found = self._find(x)
        atom = log_weights[:, torch.arange(x.shape[1], device=x.device), place].transpose(0, 1)
        atom = torch.where(found.unsqueeze(1), atom, -math.inf)
        return torch.logaddexp(log_weights[:, :, -1] + log_normal, atom), log_normal, atom

    def cells(self, x: Tensor, present: Tensor) -> Tensor:
        return torch.where(present.unsqueeze(1), self._split(x)[0], 0.0)

    def joint(self, x: Tensor, present: Tensor) -> Tensor:
        if self._grid:
            return super().joint(x, present)
        # On a continuum three matrix products: Σ_d log N(x_d; μ_kd, σ²_kd) is linear in (x², x, 1).  The common centre
        # changes nothing but the rounding.
        centre = self.mean.detach().mean(0)
        precision, mean = torch.exp(-2.0 * self.log_scale), self.mean - centre
        constant = -0.5 * (mean.square() * precision + _LOG_2PI) - self.log_scale
        seen = present.to(x.dtype)
        x = (x - centre) * seen
        return (-0.5 * x.square()) @ precision.T + x @ (mean * precision).T + seen @ constant.T

    def joint_in_detail(self, x: Tensor, present: Tensor) -> tuple[Tensor, Any]:
        split = self._split(x)
        return torch.where(present.unsqueeze(1), split[0], 0.0).sum(2), split

    def draw(self, component: Tensor, noise: Noise) -> Tensor:
        shape = (len(component), self.mean.shape[1])
        normal = noise.normal(shape).to(self.mean)
        x = self._to_grid(self.mean[component] + self.log_scale[component].exp() * normal)
        if self.atoms:
            uniform, chances = noise.uniform(shape), self._log_weights().exp()
            for k in component.unique().tolist():
                rows = component == k
                place = invert(chances[k], uniform[rows])
                atom = self.step.gather(1, place.T.clamp(max=self.atoms - 1)).T * self._unit()
                x[rows] = torch.where(place < self.atoms, atom.to(x), x[rows])
        return x

    def _to_grid(self, y: Tensor) -> Tensor:
        return torch.where(self.width > 0, (y / self._unit()).round() * self._unit(), y)

    def best(self, r: Tensor, x: Tensor, present: Tensor) -> Tensor:
        mean: Tensor = self.mean
        if self.atoms:
            weights = self._log_weights().exp()
            atoms = torch.where(torch.isinf(self.step), 0.0, self.step).to(mean) * self._unit().unsqueeze(1)
            mean = weights[:, :, -1] * mean + (weights[:, :, :-1] * atoms).sum(2)
        return self._to_grid(r @ mean)

    def spread(self, generator: torch.Generator, strength: float) -> None:
        noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float64)
        share = 0.6 * strength  # for strength 1 the components add up to unit variance
        self.mean.data.copy_(share * noise * self._unit())
        # Far apart, the scales differ too, and a grid has atoms.
        wiggle = 0.2 * (strength - 1.0) * torch.tanh(noise.flip(0))
        self.log_scale.data.copy_(math.log(0.8) + wiggle + self._unit().log())
        if self.atoms and strength > 1.0:
            atoms = torch.where(self.width > 0, 0.0, math.inf)
            self.step[:, 0] = atoms
            self.logits.data[:, :, 0] = noise - 1.0

    def look_start(self) -> None:
        self._looked = Moments(self.mean.shape[1], self.mean.device)
        self._histograms = [Histogram(self.atoms) for _ in range(self.mean.shape[1] if self.atoms else 0)]

    def look(self, x: Tensor, present: Tensor) -> None:
        self._looked.add(torch.where(present, x, math.nan))
        for j, (histogram, width) in enumerate(zip(self._histograms, self.width.tolist())):
            if width > 0:
                histogram.add((x[present[:, j], j].double() / width).round())

    def look_end(self) -> None:
        self._centre = self._looked.mean
        variance = self._looked.variance() + self.width.square() / 12.0
        size = torch.where(self._centre == 0, 1.0, self._centre.abs())
        self._variance = torch.where(variance > 1e-24 * size.square(), variance, (1e-3 * size).square())
        self._prior = self._variance / len(self.mean) ** (2.0 / self.mean.shape[1])
        if self.atoms:
            self.step.fill_(math.inf)
            chances = torch.zeros_like(self.logits[0])
            for j, histogram in enumerate(self._histograms):
                values, counts = histogram.most_frequent(self.atoms)
                values, counts = values[counts > 1], counts[counts > 1]
                self.step[j, : len(values)] = values.to(self.step)
                chances[j, : len(values)] = 0.5 * counts.to(chances) / self._looked.count[j].clamp(min=1.0)
            chances[:, -1] = 1.0 - chances.sum(1)
            self._chances = chances
        del self._histograms

    def distance(self, x: Tensor, present: Tensor, centre: int) -> Tensor:
        gap = (x - x[centre]).square().double() / self._variance
        return torch.where(present & present[centre], gap, 0.0).sum(1)

    def start(self, centres: Tensor, present: Tensor) -> None:
        self.mean.copy_(torch.where(present, centres, self._centre.to(centres)))
        self.log_scale.copy_(0.5 * self._prior.log().expand_as(self.log_scale))
        if self.atoms:
            self.logits.copy_(self._chances.clamp(min=1e-300).log().expand_as(self.logits))

    def zero(self) -> None:
        self._size = torch.zeros_like(self.mean, dtype=torch.float64)
        self._first, self._second = torch.zeros_like(self._size), torch.zeros_like(self._size)
        if self.atoms:
            self._counts = torch.zeros_like(self.logits, dtype=torch.float64)

    def add(self, x: Tensor, present: Tensor, r: Tensor, detail: Any) -> None:
        """Moments of E[y] about the current means in units of the current scales, of what is no atom."""
        total, log_normal, atom = detail
        weight = r.double().unsqueeze(2) * present.unsqueeze(1)
        if atom is not None:
            of_atom = weight * torch.exp(atom - total).double()
            place, _ = self._find(x)
            index = place.unsqueeze(0).expand(r.shape[1], -1, -1)  # (K, batch, cells)
            counts = self._counts.transpose(1, 2)  # a view, (K, atoms + 1, cells)
            counts.scatter_add_(1, index, of_atom.transpose(0, 1))
            weight = weight - of_atom
        x, scale = x.unsqueeze(1), self.log_scale.exp()
        t = ((x - self.mean) / scale).double()
        first, second = t, t.square()
        if self._grid:
            moments = cell_moments(x, self.mean, scale, self._unit(), log_normal)
            first = torch.where(self.width > 0, moments[0].double(), first)
            second = torch.where(self.width > 0, moments[1].double(), second)
        self._size += weight.sum(0)
        self._first += (weight * first).sum(0)
        self._second += (weight * second).sum(0)

    def maximise(self, a: float) -> None:
        used = self._size > 1e-9
        size = torch.where(used, self._size, 1.0)
        scale = self.log_scale.double().exp()
        step = torch.where(used, self._first / size, 0.0)
        squares = (self._second - size * step.square()).clamp(min=0.0) * scale.square()
        variance = (torch.where(used, squares, 0.0) + a * self._prior) / (self._size + a).clamp(min=1e-300)
        variance = torch.where(used | (a > 0), variance, scale.square())
        self.mean.copy_(self.mean + step * scale)
        floor = _LEAST_SCALE**2 * self._variance
        self.log_scale.copy_(0.5 * torch.maximum(variance, floor).log())
        if self.atoms:
            self._counts[:, :, -1] = self._size
            self.logits.copy_((self._counts + a * self._chances).clamp(min=1e-300).log())

    def log_prior(self, a: float) -> float:
        variance = (2.0 * self.log_scale.double()).exp()
        value = -0.5 * (variance.log() + self._prior / variance).sum()
        if self.atoms:
            log_weights = self._log_weights().double()
            value = value + torch.where(self._chances > 0, self._chances * log_weights, 0.0).sum()
        return a * float(value)

    def on_grid(self, spacing: float, bound: float) -> DiagonalNormals:
        """The laws of reals that live on a grid."""
        from likely.coding.normals import DiagonalNormals
        from likely.coding.staircase import parameters

        return DiagonalNormals(parameters(self.mean), parameters(self.log_scale), spacing, bound)

    def staircases(self, lattice: Lattice) -> list[Staircase]:
        from likely.coding.staircase import Part, numbers, parameters, shares_of
        from likely.exact.functions import exp

        mean, scale = parameters(self.mean), exp(parameters(self.log_scale))
        laws = []
        for j, width in enumerate(self.width.tolist()):
            of, shares, atoms = slice(j, j + 1), np.ones((len(mean), 1)), None
            if width > 0 and self.atoms:
                used = [*self.step[j].isfinite().nonzero().squeeze(1).tolist(), self.atoms]
                shares = shares_of(parameters(self.logits[:, j, used]))
                atoms = self.step[j, used[:-1]].long().cpu().numpy(), shares[:, :-1]
            laws.append(numbers([Part(shares[:, -1:], mean[:, of], scale[:, of])], lattice.column(width), atoms))
        return laws


class _FullNormals(_Law):
    """Real cells that are jointly normal in each component: Σ_k = L_k L_kᵀ."""

    def __init__(self, components: int, dims: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(components, dims, dtype=torch.float64))
        #: L below the diagonal, and the logarithm of its diagonal
        self.root = nn.Parameter(torch.zeros(components, dims, dims, dtype=torch.float64))

    def _cholesky(self) -> Tensor:
        return self.root.tril(-1) + torch.diag_embed(self.root.diagonal(dim1=1, dim2=2).exp())

    def joint(self, x: Tensor, present: Tensor) -> Tensor:
        r, cholesky = x - self.mean.unsqueeze(1), self._cholesky()  # (K, batch, dims)
        if present.all():
            white = torch.linalg.solve_triangular(cholesky, r.transpose(1, 2), upper=False)
            log_det = 2.0 * self.root.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
            return (-0.5 * (x.shape[1] * _LOG_2PI + log_det + white.square().sum(1))).T
        nats = []
        for k, factor in enumerate(cholesky):
            pieces, order = [], []
            for rows, precision, log_det, mask in patterns(factor @ factor.T, present):
                part = r[k, rows]
                inner = torch.einsum("bi,bij,bj->b", part, precision.expand(len(rows), -1, -1), part)
                pieces.append(-0.5 * (mask.sum(1) * _LOG_2PI + log_det + inner))
                order.append(rows)
            nats.append(torch.cat(pieces)[torch.cat(order).argsort()])
        return torch.stack(nats, 1)

    def cells(self, x: Tensor, present: Tensor) -> Tensor:
        """log p_k(x_j | the other cells): what the component's joint density loses without cell j."""
        nats = x.new_zeros((len(x), *self.mean.shape))
        for k, factor in enumerate(self._cholesky()):
            r = torch.where(present, x - self.mean[k], 0.0)
            for rows, precision, _, _ in patterns(factor @ factor.T, present):
                pulled = torch.einsum("bij,bj->bi", precision.expand(len(rows), -1, -1), r[rows])
                diagonal = precision.diagonal(dim1=1, dim2=2)
                nats[rows, k] = leave_one_out(diagonal, pulled, torch.zeros_like(diagonal))
        return torch.where(present.unsqueeze(1), nats, 0.0)

    def on_grid(self, spacing: float, bound: float) -> JointNormals:
        """The laws of reals that live on a grid."""
        from likely.coding.normals import JointNormals
        from likely.coding.staircase import parameters
        from likely.exact.functions import exp

        root, place = parameters(self.root), np.arange(self.root.shape[1])
        factors = np.tril(root, -1)
        factors[:, place, place] = exp(np.ascontiguousarray(root[:, place, place]))
        return JointNormals(parameters(self.mean), factors, spacing, bound)

    def _expected(self, k: int, x: Tensor, present: Tensor) -> Tensor:
        """E[x | the cells that are present] in component k."""
        factor = self._cholesky()[k]
        sigma = factor @ factor.T
        r, filled = torch.where(present, x - self.mean[k], 0.0), torch.empty_like(x)
        for rows, precision, _, _ in patterns(sigma, present):
            filled[rows] = torch.einsum("bij,bj->bi", precision.expand(len(rows), -1, -1), r[rows]) @ sigma
        return torch.where(present, x, filled + self.mean[k])

    def draw(self, component: Tensor, noise: Noise) -> Tensor:
        normal = noise.normal((len(component), self.mean.shape[1])).to(self.mean)
        drawn = torch.empty_like(normal)
        for k, factor in enumerate(self._cholesky()):
            rows = component == k
            drawn[rows] = self.mean[k] + normal[rows] @ factor.T
        return drawn

    def draw_missing(self, component: Tensor, x: Tensor, present: Tensor, noise: Noise) -> Tensor:
        free = self.draw(component, noise)
        drawn = torch.empty_like(x)
        for k in component.unique().tolist():
            rows = component == k
            seen, shown = x[rows], present[rows]
            drawn[rows] = self._expected(k, seen, shown) + free[rows] - self._expected(k, free[rows], shown)
        return drawn

    def best(self, r: Tensor, x: Tensor, present: Tensor) -> Tensor:
        best = torch.zeros_like(x)
        for k in range(len(self.mean)):
            best += r[:, k : k + 1] * self._expected(k, x, present)
        return best

    def spread(self, generator: torch.Generator, strength: float) -> None:
        noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float64)
        self.mean.data.copy_(0.6 * strength * noise)
        slant = torch.randn(self.root.shape, generator=generator, dtype=torch.float64).tril(-1)
        slant = 0.2 * (strength - 1.0) * slant / math.sqrt(self.mean.shape[1])
        self.root.data.copy_(slant + math.log(0.8) * torch.eye(self.mean.shape[1]))

    def look_start(self) -> None:
        self._looked = Moments(self.mean.shape[1], self.mean.device)

    def look(self, x: Tensor, present: Tensor) -> None:
        self._looked.add(torch.where(present, x, math.nan))

    def look_end(self) -> None:
        self._centre = self._looked.mean
        variance = self._looked.variance()
        size = torch.where(self._centre == 0, 1.0, self._centre.abs())
        self._variance = torch.where(variance > 1e-24 * size.square(), variance, (1e-3 * size).square())
        self._prior = self._variance / len(self.mean) ** (2.0 / self.mean.shape[1])

    def distance(self, x: Tensor, present: Tensor, centre: int) -> Tensor:
        gap = (x - x[centre]).square().double() / self._variance
        return torch.where(present & present[centre], gap, 0.0).sum(1)

    def start(self, centres: Tensor, present: Tensor) -> None:
        self.mean.copy_(torch.where(present, centres, self._centre.to(centres)))
        self.root.copy_(torch.diag(0.5 * self._prior.log()).expand_as(self.root))

    def zero(self) -> None:
        self._size = torch.zeros(len(self.mean), dtype=torch.float64, device=self.mean.device)
        self._first = torch.zeros_like(self.mean, dtype=torch.float64)
        self._second = torch.zeros_like(self.root, dtype=torch.float64)
        self._sums: Tensor | None = None
        if self.mean.shape[1] <= len(self.mean):  # else products of cells would take more memory than differences
            self._expand()

    # EM on complete rows: densities and moments are products of matrices with [1, z, z_i z_j], i ≤ j, z standardised.

    def _expand(self) -> None:
        """The coefficients of these products in the densities, and room for their sums."""
        dims = self.mean.shape[1]
        self._pairs = torch.triu_indices(dims, dims, device=self.mean.device)
        self._unit = self._variance.sqrt()
        self._place = (self.mean.double() - self._centre) / self._unit
        cholesky = self._cholesky().double()
        precision = torch.cholesky_inverse(cholesky) * torch.outer(self._unit, self._unit)
        pulled = torch.einsum("kij,kj->ki", precision, self._place)
        log_det = 2.0 * cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        constant = -0.5 * (dims * _LOG_2PI + log_det + (pulled * self._place).sum(1))
        i, j = self._pairs
        of_pairs = precision[:, i, j] * torch.where(i == j, -0.5, -1.0)
        self._density = torch.cat([constant.unsqueeze(1), pulled, of_pairs], 1)
        self._sums = torch.zeros_like(self._density)

    def joint_in_detail(self, x: Tensor, present: Tensor) -> tuple[Tensor, Any]:
        """The logarithms of the densities, and the products of cells that they were made of; None where there are none,
        or where they would lose digits, in components that are very narrow."""
        if self._sums is not None and len(x) and present.all():
            z = (x.double() - self._centre) / self._unit
            if float(self._density.abs().max() * z.square().max().clamp(min=1.0)) < _STEEPEST:
                i, j = self._pairs
                features = torch.cat([torch.ones_like(z[:, :1]), z, z[:, i] * z[:, j]], 1)
                return (features @ self._density.T).to(x.dtype), features
        return self.joint(x, present), None

    def add(self, x: Tensor, present: Tensor, r: Tensor, detail: Any) -> None:
        """Moments of E[y] about the current means, with the conditional covariance of the missing cells."""
        self._size += r.double().sum(0)
        if detail is not None:
            assert self._sums is not None
            self._sums += r.double().T @ detail
            return
        complete = bool(present.all())
        for k, factor in enumerate(self._cholesky()):
            weight = r[:, k : k + 1].double()
            y = (x if complete else self._expected(k, x, present)).double() - self.mean[k].double()
            self._first[k] += (weight * y).sum(0)
            self._second[k] += (weight * y).T @ y
            if complete:
                continue
            sigma = (factor @ factor.T).double()
            for rows, precision, _, mask in patterns(sigma, present):
                hidden = (1.0 - mask).unsqueeze(1) * (1.0 - mask).unsqueeze(2)
                covariance = (sigma - sigma @ precision @ sigma) * hidden
                share = weight[rows] if len(covariance) > 1 else weight[rows].sum(0, keepdim=True)
                self._second[k] += (share.unsqueeze(2) * covariance).sum(0)

    def maximise(self, a: float) -> None:
        if self._sums is not None:
            self._centre_sums(self._sums)
        used = (self._size > 1e-9) | (a > 0)
        if not used.any():
            return
        size = self._size[used, None]
        step = torch.where(size > 1e-9, self._first[used] / size.clamp(min=1e-9), 0.0)
        sigma = self._second[used] - size.unsqueeze(2) * step.unsqueeze(2) * step.unsqueeze(1)
        sigma = (sigma + a * torch.diag(self._prior)) / (size + a).unsqueeze(2)
        factor = torch.linalg.cholesky(sigma + torch.diag(_LEAST_SCALE**2 * self._variance))
        self.mean[used] += step.to(self.mean)
        log_diagonal = torch.diag_embed(factor.diagonal(dim1=1, dim2=2).log())
        self.root[used] = (factor.tril(-1) + log_diagonal).to(self.root)

    def _centre_sums(self, sums: Tensor) -> None:
        """Add the moments that were gathered as products of cells to those about the means."""
        dims = self.mean.shape[1]
        count, first = sums[:, :1], sums[:, 1 : 1 + dims]
        i, j = self._pairs
        second = torch.zeros_like(self._second)
        second[:, i, j] = second[:, j, i] = sums[:, 1 + dims :]
        place = self._place
        cross = first.unsqueeze(2) * place.unsqueeze(1)
        second = second - cross - cross.transpose(1, 2) + count.unsqueeze(2) * place.unsqueeze(2) * place.unsqueeze(1)
        self._first += (first - count * place) * self._unit
        self._second += second * torch.outer(self._unit, self._unit)

    def log_prior(self, a: float) -> float:
        cholesky = self._cholesky().double()
        precision = torch.cholesky_inverse(cholesky).diagonal(dim1=1, dim2=2)
        log_det = 2.0 * cholesky.diagonal(dim1=1, dim2=2).log().sum()
        return -0.5 * a * float(log_det + (precision * self._prior).sum())


class _Amounts(_Law):
    """Counts: negative binomial cells with mean m and dispersion ρ, or Poisson cells with mean m."""

    def __init__(self, components: int, cells: int, law: CountLaw) -> None:
        super().__init__()
        self.log_mean = nn.Parameter(torch.zeros(components, cells, dtype=torch.float64))
        self.log_dispersion: nn.Parameter | None = None
        if law == "negative binomial":
            self.log_dispersion = nn.Parameter(torch.zeros(components, cells, dtype=torch.float64))

    def cells(self, x: Tensor, present: Tensor) -> Tensor:
        x = x.unsqueeze(1)
        if self.log_dispersion is None:
            nats = x * self.log_mean - self.log_mean.exp() - torch.lgamma(x + 1.0)
        else:
            nats = NegativeBinomial(self.log_mean, self.log_dispersion).log_prob(x)
        return torch.where(present.unsqueeze(1), nats, 0.0)

    def draw(self, component: Tensor, noise: Noise) -> Tensor:
        log_mean = self.log_mean[component]
        if self.log_dispersion is not None:
            return NegativeBinomial(log_mean, self.log_dispersion[component]).sample(noise)
        return torch.poisson(log_mean.exp(), generator=torch_generator(noise, len(component)))

    def best(self, r: Tensor, x: Tensor, present: Tensor) -> Tensor:
        return (r @ self.log_mean.exp()).round()

    def spread(self, generator: torch.Generator, strength: float) -> None:
        noise = torch.randn(self.log_mean.shape, generator=generator, dtype=torch.float64)
        self.log_mean.data.copy_(0.4 * strength * noise)
        if self.log_dispersion is not None:
            self.log_dispersion.data.copy_(0.3 * strength * torch.tanh(noise.flip(0)))

    def look_start(self) -> None:
        self._looked = Moments(self.log_mean.shape[1], self.log_mean.device)
        self._logs = Moments(self.log_mean.shape[1], self.log_mean.device)

    def look(self, x: Tensor, present: Tensor) -> None:
        self._looked.add(torch.where(present, x, math.nan))
        self._logs.add(torch.where(present, torch.log1p(x), math.nan))

    def look_end(self) -> None:
        # Half a count in one more example: a dimension that was always zero keeps a positive mean.
        n = self._looked.count
        self._prior = (self._looked.mean * n + 0.5) / (n + 1.0)
        variance = self._looked.variance()
        self._dispersion = self._prior.square() / torch.maximum(variance - self._prior, 0.01 * self._prior)
        self._variance = self._logs.variance() + 1e-3
        self._curvature = self._dispersion.log() - torch.digamma(self._dispersion)

    def distance(self, x: Tensor, present: Tensor, centre: int) -> Tensor:
        logs = torch.log1p(x).double()
        gap = (logs - logs[centre]).square() / self._variance
        return torch.where(present & present[centre], gap, 0.0).sum(1)

    def start(self, centres: Tensor, present: Tensor) -> None:
        mean = self._prior.expand(centres.shape)
        self.log_mean.copy_(torch.where(present, 0.5 * (centres + mean), mean).log())
        if self.log_dispersion is not None:
            self.log_dispersion.copy_(self._dispersion.log().expand_as(self.log_dispersion))

    def zero(self) -> None:
        self._size = torch.zeros_like(self.log_mean, dtype=torch.float64)
        self._sum, self._rate, self._log_rate = (torch.zeros_like(self._size) for _ in range(3))

    def add(self, x: Tensor, present: Tensor, r: Tensor, detail: Any) -> None:
        weight = r.double().T.contiguous()
        shown = present.double()
        self._size += weight @ shown
        self._sum += weight @ (shown * x.double())
        if self.log_dispersion is None:
            return
        dispersion = self.log_dispersion.double().exp()
        log_total = torch.logaddexp(self.log_mean, self.log_dispersion).double()
        shape = x.unsqueeze(1).double() + dispersion
        each = r.double().unsqueeze(2) * shown.unsqueeze(1)
        self._rate += (each * shape * torch.exp(-log_total)).sum(0)
        self._log_rate += (each * (torch.digamma(shape) - log_total)).sum(0)

    def maximise(self, a: float) -> None:
        exposure = self._size if self.log_dispersion is None else self._rate
        used = self._size + a > 1e-9
        mean = (self._sum + a * self._prior) / (exposure + a).clamp(min=1e-300)
        self.log_mean.copy_(torch.where(used, mean.clamp(min=1e-12).log(), self.log_mean))
        if self.log_dispersion is None:
            return
        excess = self._rate - self._log_rate + a * (1.0 + self._curvature)
        target = excess / (self._size + a).clamp(min=1e-300) - 1.0
        self.log_dispersion.copy_(torch.where(used, _solve_dispersion(target), self.log_dispersion))

    def log_prior(self, a: float) -> float:
        mean = self.log_mean.double().exp()
        value = (self._prior * self.log_mean - mean).sum()
        if self.log_dispersion is not None:
            rho = self.log_dispersion.double().exp()
            value = value + (rho * rho.log() - torch.lgamma(rho) - (rho - 1.0) * self._curvature - rho).sum()
        return a * float(value)

    def staircases(self, lattice: Lattice) -> list[Staircase]:
        from likely.coding.staircase import CountLaws, counts, parameters

        log_mean = parameters(self.log_mean)
        log_r = None if self.log_dispersion is None else parameters(self.log_dispersion)
        nothing = np.zeros(len(log_mean))
        return [
            counts([CountLaws(log_mean[:, j], None if log_r is None else log_r[:, j], nothing)])
            for j in range(log_mean.shape[1])
        ]


def _solve_dispersion(target: Tensor) -> Tensor:
    """log ρ such that log ρ − ψ(ρ) = ``target``, by bisection between e^−10 and e^12 (the left side falls in ρ)."""
    low, high = torch.full_like(target, -10.0), torch.full_like(target, 12.0)
    for _ in range(60):
        middle = 0.5 * (low + high)
        beyond = middle - torch.digamma(middle.exp()) > target
        low, high = torch.where(beyond, middle, low), torch.where(beyond, high, middle)
    return 0.5 * (low + high)
