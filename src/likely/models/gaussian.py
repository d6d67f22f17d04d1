r"""Gaussian: one multivariate normal law, with full or low-rank covariance, in closed form.

Full covariance:

    y | c ~ N(B f(c), Σ)                                                                                        (1)

Probabilistic principal component analysis (Tipping & Bishop 1999, J. R. Statist. Soc. B 61, 611-622), ``rank=k``:

    y = W z + B f(c) + ε,   z ~ N(0, I_k),   ε ~ N(0, σ² I)                                                     (2)
    Σ = W Wᵀ + σ² I,   M = WᵀW + σ² I                                                                           (3)
    log N(r; 0, Σ) = −½ [D log 2π + (D − k) log σ² + log |M| + (rᵀr − rᵀW M⁻¹Wᵀr) / σ²]                         (4)
    W = U_k (Λ_k − σ² I)^½,   σ² = Σ_{j>k} λ_j / (D − k)          (maximum likelihood, their eqs 7 and 8)       (5)

y: the numeric cells, each brought to mean 0 and deviation 1 (in PPCA of arrays: one common scale, so that W is that of
the raw data);  f(c): the features of the condition with a leading 1, so that B holds the mean;  r = y − B f(c);
λ_j, U: eigenvalues and eigenvectors of the covariance of r;  D: number of numeric cells;  z: the latent variable.

Cells on a grid of spacing s (integers, counts, binary cells, table columns with a resolution) have probabilities:
x stands for x + s u, u ~ U(−½, ½), and (Theis et al. 2016, arXiv 1511.01844, section 3.1)

    log P(x) ≥ log s + E_u log p(x + s u) = log s + log N(y; B f, Σ) − ½ Σ_j (Σ⁻¹)_jj v_j,   v = s²/12           (6)

(v and s in the units of y): the expectation over u is in closed form, so nothing is drawn, and adding v to the
variances *is* its maximum.  With such cells the number is a lower bound, without them exact.

Missing cells are integrated out: (1) to (6) hold for the observed cells with the rows and columns of Σ that belong
to them.  The fit then is EM (at most ``passes`` passes); complete data need two passes, three with a condition.

Coded columns of a table are independent beside y (:class:`~likely.models.independent.Independent`) and do not depend
on the condition.  Regularisation: the full covariance is shrunk towards its diagonal by the intensity of Ledoit &
Wolf 2004 (J. Multivariate Analysis 88, 365-411, on the standardised cells), at least 1e-8; B carries a ridge of one
pseudo-observation on each feature; a constant column on a continuum gets a deviation of 1e-3 of its size.
Parameters are float64 buffers and so is the arithmetic; the numbers belong to the raw data.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from likely.contract import (
    Batches,
    Binary,
    Bound,
    Counts,
    Integers,
    Kind,
    Model,
    Reals,
    Report,
    Space,
    Table,
    Tokens,
    Unsupported,
    noise_or_global,
)
from likely.data.streaming import Moments
from likely.models.independent import Independent
from likely.noise import Noise

if TYPE_CHECKING:
    from likely.coding.cells import CellCodec, Mask
    from likely.coding.components import DirectCodec
    from likely.coding.normals import Covariance, NormalColumn

_LOG_2PI = math.log(2.0 * math.pi)
_LEAST_SHRINKAGE = 1e-8
_LARGEST_FULL = 4096  # beyond it the default is PPCA
_DEFAULT_RANK = 128
_MOST_FEATURES = 4096
_CHUNK = 1 << 22  # numbers in the largest temporary of the arithmetic by pattern of missing cells


class Gaussian(Model):
    """A multivariate normal law, full or PPCA: exact on continua, a lower bound on grids; closed form.

    >>> model = Gaussian(Reals((2,)), shrinkage=0.0)
    >>> model.estimate([(torch.tensor([[0.0, 0.0], [2.0, 2.0], [0.0, 2.0], [2.0, 0.0]]), None)])
    >>> round(model.bound(torch.tensor([[1.0, 1.0]])).nats.item(), 4)  # −log 2π
    -1.8379

    Args:
        rank: None for a full covariance (for more than 4,096 numeric cells: PPCA with rank 128), or k of PPCA.
        shrinkage: None for Ledoit and Wolf's intensity, or a number from 0 to 1; full covariance only.
        standardise: whether PPCA sees cells of unit variance; by default true for tables, false for arrays.
        passes: most passes over the data of EM (missing cells) and of the subspace iteration (PPCA, D > 4,096).
    """

    spaces = (Binary, Integers, Reals, Counts, Table)
    closed_form = True
    conditional = True

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        *,
        rank: int | None = None,
        shrinkage: float | None = None,
        standardise: bool | None = None,
        passes: int = 30,
    ):
        super().__init__(space, condition)
        columns = space.columns if isinstance(space, Table) else ()
        self._numeric = [j for j, c in enumerate(columns) if c.numeric] if columns else list(range(space.dims))
        self._coded = [j for j, column in enumerate(columns) if column.coded]
        dims = self.dims = len(self._numeric)
        if dims == 0:
            raise Unsupported("model 'gaussian' needs a numeric column, got none; use model 'independent' or 'mixture'")
        if rank is None and dims > _LARGEST_FULL:
            rank = _DEFAULT_RANK
        if rank is not None and not 1 <= rank < max(dims, 2):
            raise ValueError(f"rank: expected 1 to {max(dims - 1, 1)} for {dims} numeric cells, got {rank}")
        if shrinkage is not None and rank is not None:
            raise ValueError("shrinkage: expected no value together with rank (PPCA needs none)")
        if shrinkage is not None and not 0.0 <= shrinkage <= 1.0:
            raise ValueError(f"shrinkage: expected a number from 0 to 1, got {shrinkage}")
        if passes < 1:
            raise ValueError(f"passes: expected at least 1, got {passes}")
        self.shrinkage, self.passes = shrinkage, passes
        self.standardise = bool(columns) or rank is None if standardise is None else standardise
        self.latent_dim = dims if rank is None else rank

        if columns:
            spacing = [columns[j].resolution or 0.0 for j in self._numeric]
        else:
            spacing = [0.0 if isinstance(space, Reals) else 1.0] * dims
        self.features = _Features(condition)
        self.register_buffer("spacing", torch.tensor(spacing, dtype=torch.float64), persistent=False)
        self.register_buffer("shift", torch.zeros(dims, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(dims, dtype=torch.float64))
        self.register_buffer("coefficients", torch.zeros(dims, self.features.count, dtype=torch.float64))
        self.spacing: Tensor
        self.shift: Tensor
        self.scale: Tensor
        self.coefficients: Tensor
        self.law: _Full | _Factor = _Full(dims) if rank is None else _Factor(dims, rank)
        self.beside = Independent(Table(columns=tuple(columns[j] for j in self._coded))) if self._coded else None

    # ---------------------------------------------------------------------------------------------- the bound

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        r, present = self._residual(x, condition)
        per_cell = self._log_jacobian()
        nats = self.law.log_density(r, present, self._variance())
        nats = nats + (present.double() @ per_cell if not present.all() else per_cell.sum())
        kind: Kind = "lower bound" if (self.spacing > 0).any() else "exact"
        if not isinstance(self.space, Table):
            return Bound(kind, {"likelihood": nats})
        parts = {"numeric": nats}
        if self.beside is not None:
            parts["coded"] = self.beside.bound(x[:, self._coded]).nats
        return Bound(kind, parts)

    def column_nats(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Contribution of each cell in nats, 0 where missing: shape ``(batch, *space.shape)``; they sum to the bound.

        What the cell adds to the bound of the other observed cells, log p(x_j | the others), and an equal share of the
        rest (:func:`share_rest`): which cells made the row unlikely, whatever the order of the columns.
        """
        r, present = self._residual(x, condition)
        v, jacobian = self._variance(), self._log_jacobian()
        alone = torch.where(present, self.law.cell_nats(r, present, v) + jacobian, 0.0)
        total = self.law.log_density(r, present, v) + present.double() @ jacobian
        nats = r.new_zeros((len(x), self.space.dims))
        nats[:, self._numeric] = share_rest(total, alone, present)
        if self.beside is not None:
            nats[:, self._coded] = self.beside.column_nats(x[:, self._coded])
        return nats.reshape(x.shape)

    def _residual(self, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor]:
        """r = y − B f(c) with 0 for missing cells, and which cells are present: both ``(batch, dims)``."""
        y = (self._cells(x) - self.shift) / self.scale - self.features(condition, len(x)) @ self.coefficients.T
        present = ~torch.isnan(y)
        return torch.where(present, y, 0.0), present

    def _cells(self, x: Tensor) -> Tensor:
        cells = x.reshape(len(x), -1).to(self.shift)
        return cells[:, self._numeric] if self._coded else cells

    def _variance(self) -> Tensor:
        """v of equation (6)."""
        return (self.spacing / self.scale).square() / 12.0

    def _log_jacobian(self) -> Tensor:
        """What a cell's units contribute: log s on a grid, and −log of the scale."""
        return torch.where(self.spacing > 0, self.spacing, 1.0).log() - self.scale.log()

    # ------------------------------------------------------------------------- samples, embeddings, imputations

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """``n`` draws, float64; on a grid the draw's cell, brought into the space where the law oversteps it."""
        noise = noise_or_global(noise, self.shift)
        y = self.law.draw(n, noise) + self.features(condition, n) @ self.coefficients.T
        return self._assemble(y, None if self.beside is None else self.beside.sample(n, noise=noise))

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """PPCA: E[z | x] = M⁻¹Wᵀr, shape ``(batch, rank)``.  Full: the whitened L⁻¹r with Σ = LLᵀ, ``(batch, D)``."""
        return self.law.encode(*self._residual(x, condition))

    def impute(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None, draws: int = 0) -> Tensor:
        """Missing cells filled given the observed ones.

        Args:
            draws: 0 for the conditional mean (brought to the grid; the mode for coded columns), shape of ``x``; m for m
                draws from the joint conditional law, shape ``(m, *x.shape)``.
        """
        noise = noise_or_global(noise, x)
        r, present = self._residual(x, condition)
        mean = self.features(condition, len(x)) @ self.coefficients.T
        expected = self.law.expected(r, present)
        filled = []
        for _ in range(max(draws, 1)):
            y = expected
            if draws:
                free = self.law.draw(len(x), noise)
                y = expected + free - self.law.expected(torch.where(present, free, 0.0), present)
            coded = None
            if self.beside is not None:
                coded = self.beside.impute(x[:, self._coded], noise=noise, draws=min(draws, 1)).reshape(len(x), -1)
            filled.append(torch.where(torch.isnan(x), self._assemble(y + mean, coded), x.to(self.shift)))
        return torch.stack(filled) if draws else filled[0]

    def _assemble(self, y: Tensor, coded: Tensor | None) -> Tensor:
        cells = y * self.scale + self.shift
        step = torch.where(self.spacing > 0, self.spacing, 1.0)
        cells = torch.where(self.spacing > 0, (cells / step).round() * step, cells)
        if isinstance(self.space, Binary | Integers | Counts):
            top = {Binary: 1, Integers: getattr(self.space, "levels", 1) - 1}.get(type(self.space))
            cells = cells.clamp(0, top)
        if coded is None:
            return cells.reshape(-1, *self.space.shape)
        x = cells.new_empty((len(cells), self.space.dims))
        x[:, self._numeric] = cells
        x[:, self._coded] = coded.to(x)
        return x

    # ----------------------------------------------------------------------------------------------- the codec

    def codec(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> DirectCodec:
        """The numeric cells one after another, each under its law given those before it; coded columns beside them.

        On a grid a cell has its mass under that law, so the code is shorter than the bound (6).

        Raises:
            NoCodec: real numbers without a grid.
        """
        from likely.coding.components import ColumnParts, DirectCodec
        from likely.coding.normals import chain_rows
        from likely.coding.rows import Rows
        from likely.coding.staircase import parameters

        rows, columns = Rows(self.space, spacing), self._columns(spacing, bound, spare_bits)
        covariance, features = self.law.exact_covariance(), copy.deepcopy(self.features).cpu()
        coefficients = parameters(self.coefficients)
        beside = None if self.beside is None else self.beside.staircases()

        def cells(n: int, present: Mask | None, condition: Tensor | None) -> CellCodec:
            f = parameters(features(condition, n))
            base = np.zeros((self.dims, n))
            for i in range(f.shape[1]):  # B f(c), summed in this order everywhere
                base += coefficients[:, i, None] * f[:, i]
            numeric, coded = (None if present is None else present[:, some] for some in (self._numeric, self._coded))
            chain = chain_rows(columns, covariance, base, numeric)
            if beside is None:
                return chain
            coded_cells = beside.cells(n, None, coded)
            return ColumnParts((n, self.space.dims), [(self._numeric, chain), (self._coded, coded_cells)])

        def legal(symbols: NDArray[np.int64], present: Mask | None) -> Mask:
            good = np.empty(symbols.shape, bool)
            for j, column in zip(self._numeric, columns):
                good[:, j] = column.legal(symbols[:, j])
            if beside is not None:
                good[:, self._coded] = beside.cells(len(symbols)).legal(symbols[:, self._coded])
            return good if present is None else good | ~present

        return DirectCodec(rows, cells, legal)

    def _columns(
        self, spacing: float | None, bound: float | None, spare_bits: Sequence[int] | None
    ) -> list[NormalColumn]:
        """The numeric cells, as their codec sees them."""
        from likely.coding.normals import NormalColumn
        from likely.coding.rows import spare_at_most
        from likely.coding.staircase import Lattice

        lattice = Lattice(spacing, bound, spare_at_most(spare_bits, self.space))
        levels = {Binary: 2, Integers: getattr(self.space, "levels", 0)}.get(type(self.space))
        columns = []
        for j in range(self.dims):
            line, low, high = lattice.column(float(self.spacing[j])), None, None
            if line.most is not None:
                low, high = -line.most, line.most
            elif levels is not None:
                low, high = 0, levels - 1
            columns.append(NormalColumn(float(self.shift[j]), float(self.scale[j]), line, low, high))
        return columns

    # ------------------------------------------------------------------------------------------------- the fit

    @torch.no_grad()
    def estimate(self, batches: Batches, report: Report | None = None) -> None:
        """Closed form for complete data, EM where cells are missing; memory does not grow with the examples."""
        if self.beside is not None:
            self.beside.estimate((x[:, self._coded], None) for x, _ in batches)
        missing, floor = self._standardise(batches)
        if report is not None:
            report(1, math.nan)
        if missing:
            self._estimate_with_holes(batches, floor, report)
            return
        n, rescale = self._regress(batches)
        floor = floor * rescale.square()
        if isinstance(self.law, _Factor) and self.dims > _LARGEST_FULL:
            self.law.fit_subspace(lambda: self._residuals(batches), self._variance() + floor, n, self.passes, report)
            return
        moments = _Moments(self.dims, self.shift.device)
        for r, _ in self._residuals(batches):
            moments.add(r, self._variance())
        self.law.fit_covariance(moments, floor, self.shrinkage)
        if report is not None:
            report(3 if self.condition is not None else 2, math.nan)

    def _residuals(self, batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
        for x, condition in batches:
            yield self._residual(x, condition)

    def _standardise(self, batches: Batches) -> tuple[bool, Tensor]:
        """First pass: shift and scale of the cells, moments of the condition.

        Returns whether cells are missing, and the variance (in the units of y) that constant columns are lent.
        """
        cells = Moments(self.dims, self.shift.device)
        self.features.start()
        missing = False
        for x, condition in batches:
            values = self._cells(x)
            missing = missing or bool(torch.isnan(values).any())
            cells.add(values)
            self.features.add(condition)
        self.features.finish()
        variance = cells.variance() + self.spacing.square() / 12.0
        size = torch.where(cells.mean == 0, 1.0, cells.mean.abs())
        least = torch.where(self.spacing > 0, 0.0, (1e-3 * size).square())
        constant = variance <= 1e-24 * size.square()
        lent = torch.where(constant, least, 0.0)
        variance = torch.where(cells.count > 0, variance + lent, 1.0)
        if not self.standardise:
            variance = variance.mean().expand_as(variance)
        self.shift.copy_(cells.mean)
        self.scale.copy_(variance.sqrt())
        self.coefficients.zero_()
        return missing, lent / variance

    def _regress(self, batches: Batches) -> tuple[int, Tensor]:
        """B by least squares with a ridge; then the scale becomes that of the residuals.

        Returns the number of examples, and the factor by which the units of y have shrunk.
        """
        rescale = torch.ones_like(self.scale)
        if self.condition is None:
            return sum(len(x) for x, _ in batches), rescale
        count = self.features.count
        gram = self.shift.new_zeros((count, count))
        cross = self.shift.new_zeros((self.dims, count))
        squares = self.shift.new_zeros(self.dims)
        n = 0
        for x, condition in batches:
            f = self.features(condition, len(x))
            y = (self._cells(x) - self.shift) / self.scale
            gram += f.T @ f
            cross += y.T @ f
            squares += y.square().sum(0)
            n += len(x)
        b = _solve_ridge(gram, cross)
        residual = (squares - 2.0 * (b * cross).sum(1) + (b @ gram * b).sum(1)) / n + self._variance()
        if self.standardise:
            rescale = residual.clamp(min=1e-6).rsqrt()
            self.scale.div_(rescale)
            b = b * rescale.unsqueeze(1)
        self.coefficients.copy_(b)
        return n, rescale

    def _estimate_with_holes(self, batches: Batches, floor: Tensor, report: Report | None) -> None:
        """EM over the missing cells (and z), from the available cells' means and variances."""
        self.law.reset()
        previous = -math.inf
        for step in range(self.passes):
            nats = self._expectation_maximisation(batches, floor, first=step == 0)
            if report is not None and report(step + 2, nats):
                break
            if abs(nats - previous) < 1e-6 * max(1.0, self.dims):
                break
            previous = nats

    def _expectation_maximisation(self, batches: Batches, floor: Tensor, first: bool) -> float:
        """One iteration of EM; returns the mean nats per example before it (numeric cells)."""
        v, jacobian = self._variance(), self._log_jacobian()
        statistics = self.law.statistics(self.features.count, first)
        total, n = 0.0, 0
        for x, condition in batches:
            r, present = self._residual(x, condition)
            f = self.features(condition, len(x))
            nats = statistics.add(r, present, f, f @ self.coefficients.T, v) + present.double() @ jacobian
            total, n = total + float(nats.sum()), n + len(x)
        self.coefficients.copy_(statistics.maximise(floor, self.shrinkage))
        return total / n

    @classmethod
    def tiny(cls, space: Space, condition: Space | None = None) -> Gaussian:
        """Strongly correlated cells; a condition that moves every mean."""
        model = cls(space, condition)
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).double()

        d = model.dims
        with torch.no_grad():
            root = normal(d, d) * 0.5 / math.sqrt(d) + 0.6
            model.shift.copy_(0.5 + 0.3 * normal(d))
            model.coefficients.copy_(0.5 * normal(*model.coefficients.shape))
            step = torch.where(model.spacing > 0, model.spacing, 1.0)
            model.shift.mul_(step)
            model.scale.copy_(step * torch.linspace(0.8, 1.2, d, dtype=torch.float64))
            model.law.set_covariance(root @ root.T + 0.2 * torch.eye(d, dtype=torch.float64))
            if model.beside is not None:
                model.beside = Independent.tiny(model.beside.space)
        return model


# --------------------------------------------------------------------------------------------------------------
# Zero-mean normal laws of r, with the noise of the grid (variances v) in expectation
# --------------------------------------------------------------------------------------------------------------


class _Full(nn.Module):
    """N(0, Σ), Σ = LLᵀ."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.register_buffer("cholesky", torch.eye(dims, dtype=torch.float64))
        self.register_buffer("precision_diagonal", torch.ones(dims, dtype=torch.float64))
        self.cholesky: Tensor
        self.precision_diagonal: Tensor

    def log_density(self, r: Tensor, present: Tensor, v: Tensor) -> Tensor:
        """E log N(r + noise; 0, Σ) of the cells that are present: shape ``(batch,)``."""
        if present.all():
            white = torch.linalg.solve_triangular(self.cholesky, r.T, upper=False)
            log_det = 2.0 * self.cholesky.diagonal().log().sum()
            penalty = self.precision_diagonal @ v
            return -0.5 * (r.shape[1] * _LOG_2PI + log_det + white.square().sum(0) + penalty)
        nats, sigma = r.new_empty(len(r)), self.covariance()
        for rows, precision, log_det, mask in patterns(sigma, present):
            inner = torch.einsum("bi,bij,bj->b", r[rows], precision, r[rows])
            penalty = precision.diagonal(dim1=1, dim2=2) @ v
            nats[rows] = -0.5 * (mask.sum(1) * _LOG_2PI + log_det + inner + penalty)
        return nats

    def exact_covariance(self) -> Covariance:
        """Σ as the codec computes with it."""
        from likely.coding.normals import FullCovariance
        from likely.coding.staircase import parameters

        return FullCovariance(parameters(self.cholesky))

    def covariance(self) -> Tensor:
        """Σ, shape ``(dims, dims)``."""
        return self.cholesky @ self.cholesky.T

    def cell_nats(self, r: Tensor, present: Tensor, v: Tensor) -> Tensor:
        """Bound of all present cells minus the bound without cell j: shape ``(batch, dims)``.

        With P = Σ_oo⁻¹: −½ [log 2π − log P_jj + ((P r)_j² + Σ_i P_ij² v_i) / P_jj].
        """
        nats, sigma = torch.zeros_like(r), self.covariance()
        for rows, precision, _, _ in patterns(sigma, present):
            diagonal = precision.diagonal(dim1=1, dim2=2)
            pulled = torch.einsum("bij,bj->bi", precision.expand(len(rows), -1, -1), r[rows])
            noise = precision.square() @ v
            nats[rows] = leave_one_out(diagonal, pulled, noise)
        return torch.where(present, nats, 0.0)

    def expected(self, r: Tensor, present: Tensor) -> Tensor:
        """E[r | present cells], which are themselves: shape ``(batch, dims)``."""
        if present.all():
            return r
        filled = torch.empty_like(r)
        sigma = self.covariance()
        for rows, precision, _, _ in patterns(sigma, present):
            filled[rows] = torch.einsum("bij,bj->bi", precision.expand(len(rows), -1, -1), r[rows]) @ sigma
        return torch.where(present, r, filled)

    def draw(self, n: int, noise: Noise) -> Tensor:
        return noise.normal((n, len(self.cholesky))).to(self.cholesky) @ self.cholesky.T

    def encode(self, r: Tensor, present: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.cholesky, self.expected(r, present).T, upper=False).T

    def set_covariance(self, sigma: Tensor) -> None:
        self.cholesky.copy_(torch.linalg.cholesky(sigma))
        self.precision_diagonal.copy_(torch.cholesky_inverse(self.cholesky).diagonal())

    def reset(self) -> None:
        self.set_covariance(torch.eye(len(self.cholesky)).to(self.cholesky))

    def fit_covariance(self, moments: _Moments, floor: Tensor, shrinkage: float | None) -> None:
        """The shrunk covariance of complete residuals."""
        sigma = moments.covariance() + torch.diag(floor)
        self.set_covariance(_shrink(sigma, moments.fourth, moments.n, shrinkage))

    def statistics(self, features: int, first: bool) -> _FullStatistics:
        return _FullStatistics(self, features)


class _Factor(nn.Module):
    """N(0, WWᵀ + σ² I), all in k dimensions."""

    def __init__(self, dims: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("weights", torch.zeros(dims, rank, dtype=torch.float64))
        self.register_buffer("variance", torch.ones((), dtype=torch.float64))
        self.weights: Tensor
        self.variance: Tensor

    def exact_covariance(self) -> Covariance:
        """Σ as the codec computes with it."""
        from likely.coding.normals import LowRankCovariance
        from likely.coding.staircase import parameters

        return LowRankCovariance(parameters(self.weights), float(self.variance))

    def covariance(self) -> Tensor:
        """Equation (3), shape ``(dims, dims)``."""
        return self.weights @ self.weights.T + self.variance * torch.eye(len(self.weights)).to(self.weights)

    def _posterior(self, present: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """``(rows, mask, M)`` with M = WᵀW + σ² I over the present cells; a leading axis broadcasts over the rows."""
        w, k = self.weights, self.weights.shape[1]
        eye = self.variance * torch.eye(k).to(w)
        if present.all():
            yield slice(0, len(present)), present[:1].double(), (w.T @ w + eye).unsqueeze(0)
            return
        chunk = max(1, _CHUNK // (k * max(k, len(w))))
        for first in range(0, len(present), chunk):
            rows = slice(first, first + chunk)
            mask = present[rows].double()
            yield rows, mask, self._gram(mask) + eye

    def _gram(self, weight: Tensor) -> Tensor:
        """Wᵀ diag(weight) W for every row of ``weight``: shape ``(batch, k, k)``."""
        w = self.weights
        return torch.einsum("dk,bdl->bkl", w, weight.unsqueeze(2) * w)

    def log_density(self, r: Tensor, present: Tensor, v: Tensor) -> Tensor:
        """Equation (4) minus the penalty of (6), over the cells that are present."""
        nats = r.new_empty(len(r))
        k = self.weights.shape[1]
        noisy = bool((v > 0).any())
        for rows, mask, m in self._posterior(present):
            factor = torch.linalg.cholesky(m)
            projected = r[rows] @ self.weights
            white = torch.linalg.solve_triangular(factor, projected.unsqueeze(2), upper=False).squeeze(2)
            inner = (r[rows].square().sum(1) - white.square().sum(1)) / self.variance
            count = mask.sum(1)
            log_det = (count - k) * self.variance.log() + 2.0 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
            penalty = r.new_zeros(1)
            if noisy:
                shared = torch.cholesky_solve(self._gram(mask * v), factor)
                penalty = (mask @ v - shared.diagonal(dim1=1, dim2=2).sum(1)) / self.variance
            nats[rows] = -0.5 * (count * _LOG_2PI + log_det + inner + penalty)
        return nats

    def cell_nats(self, r: Tensor, present: Tensor, v: Tensor) -> Tensor:
        """As for the full covariance, with P = (I − W M⁻¹Wᵀ) / σ² over the present cells."""
        nats = torch.zeros_like(r)
        w = self.weights
        for rows, mask, m in self._posterior(present):
            factor = torch.linalg.cholesky(m)
            half = torch.cholesky_solve(w.T.expand(len(m), -1, -1), factor)  # M⁻¹Wᵀ, (batch, k, d)
            reach = torch.einsum("dk,bkd->bd", w, half)  # (W M⁻¹Wᵀ)_jj
            diagonal = (1.0 - reach) / self.variance
            z = torch.einsum("bkd,bd->bk", half.expand(len(r[rows]), -1, -1), r[rows])
            pulled = (r[rows] - z @ w.T) / self.variance
            crossed = torch.einsum("bkd,bkl,bld->bd", half, self._gram(mask * v), half)
            noise = (v * (1.0 - 2.0 * reach) + crossed) / self.variance.square()
            nats[rows] = leave_one_out(diagonal, pulled, noise)
        return torch.where(present, nats, 0.0)

    def encode(self, r: Tensor, present: Tensor) -> Tensor:
        """E[z | present cells] = M⁻¹Wᵀr (their section 3.2)."""
        z = r.new_empty((len(r), self.weights.shape[1]))
        for rows, _, m in self._posterior(present):
            projected = (r[rows] @ self.weights).unsqueeze(2)
            z[rows] = torch.cholesky_solve(projected, torch.linalg.cholesky(m)).squeeze(2)
        return z

    def expected(self, r: Tensor, present: Tensor) -> Tensor:
        return r if present.all() else torch.where(present, r, self.encode(r, present) @ self.weights.T)

    def draw(self, n: int, noise: Noise) -> Tensor:
        dims, rank = self.weights.shape
        z, eps = noise.normal((n, rank)).to(self.weights), noise.normal((n, dims)).to(self.weights)
        return z @ self.weights.T + self.variance.sqrt() * eps

    def set_covariance(self, sigma: Tensor) -> None:
        """Equation (5)."""
        values, vectors = torch.linalg.eigh(sigma)
        self._set(values.flip(0), vectors.flip(1), values.sum())

    def _set(self, values: Tensor, vectors: Tensor, trace: Tensor) -> None:
        """Equation (5) from the leading eigenvalues, descending, and the sum of all."""
        dims, k = self.weights.shape
        rest = (trace - values[:k].sum()) / max(dims - k, 1)
        self.variance.copy_(rest.clamp(min=_LEAST_SHRINKAGE * trace / dims).clamp(min=1e-300))
        self.weights.copy_(vectors[:, :k] * (values[:k] - self.variance).clamp(min=0.0).sqrt())

    def reset(self) -> None:
        self.weights.zero_()
        self.variance.fill_(1.0)

    def fit_covariance(self, moments: _Moments, floor: Tensor, shrinkage: float | None) -> None:
        self.set_covariance(moments.covariance() + torch.diag(floor))

    def fit_subspace(
        self,
        residuals: Callable[[], Iterator[tuple[Tensor, Tensor]]],
        added: Tensor,
        n: int,
        passes: int,
        report: Report | None,
    ) -> None:
        """Leading eigenvectors without the covariance: subspace iteration with Rayleigh-Ritz steps, one pass each.

        Halko, Martinsson & Tropp 2011 (SIAM Review 53, 217-288, algorithm 4.4), 10 vectors more than asked for.
        ``added``: variances that the covariance gets on its diagonal.
        """
        dims, k = self.weights.shape
        width = min(dims, k + 10)
        generator = torch.Generator().manual_seed(0)
        q = torch.randn((dims, width), generator=generator, dtype=torch.float64).to(self.weights)
        q = torch.linalg.qr(q).Q
        captured = -math.inf
        for step in range(passes):
            image, squares = q * added.unsqueeze(1), added.sum()
            for r, _ in residuals():
                image = image + r.T @ (r @ q) / n
                squares = squares + r.square().sum() / n
            ritz, vectors = torch.linalg.eigh(q.T @ image)
            self._set(ritz.flip(0), q @ vectors.flip(1), squares)
            if report is not None and report(step + 3, math.nan):
                break
            gained = float(ritz.flip(0)[:k].sum())
            if gained - captured < 1e-5 * gained:
                break
            captured = gained
            q = torch.linalg.qr(image).Q

    def statistics(self, features: int, first: bool) -> _FullStatistics | _FactorStatistics:
        """EM statistics; the first iteration, where W = 0, takes W from the covariance of the filled data."""
        if first and len(self.weights) <= _LARGEST_FULL:
            return _FullStatistics(self, features)
        if first:
            generator = torch.Generator().manual_seed(0)
            self.weights.copy_(0.1 * torch.randn(self.weights.shape, generator=generator))
        return _FactorStatistics(self, features)


def patterns(sigma: Tensor, present: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """For every pattern of present cells: ``(rows, precision, log det, mask)``, with a leading axis that
    broadcasts over the rows.

    ``precision`` is (Σ_oo)⁻¹ in the rows and columns o of the present cells and 0 elsewhere.
    """
    d = sigma.shape[0]
    kinds, member = torch.unique(present, dim=0, return_inverse=True)
    order = member.argsort(stable=True)
    counts = torch.bincount(member, minlength=len(kinds))
    ends = counts.cumsum(0)
    chunk = max(1, _CHUNK // d**2)
    for first in range(0, len(kinds), chunk):
        some = kinds[first : first + chunk].to(sigma)
        last = first + len(some)
        rows = order[int(ends[first] - counts[first]) : int(ends[last - 1])]
        both = some.unsqueeze(1) * some.unsqueeze(2)
        padded = sigma * both + torch.diag_embed(1.0 - some)
        factor = torch.linalg.cholesky(padded)
        precision = torch.cholesky_inverse(factor) * both
        log_det = 2.0 * factor.diagonal(dim1=1, dim2=2).log().sum(1)
        of_row = member[rows] - first
        if len(some) == 1:  # one pattern: nothing to copy for each row
            yield rows, precision, log_det, some
            continue
        limit = max(1, _CHUNK // d**2)
        for start in range(0, len(rows), limit):
            part = of_row[start : start + limit]
            yield rows[start : start + limit], precision[part], log_det[part], some[part]


def share_rest(total: Tensor, alone: Tensor, present: Tensor) -> Tensor:
    """Contributions that sum to ``total``: what each present cell adds to the others, and an equal share of the rest.

    Moulin's egalitarian non-separable contribution value (1985, J. Economic Theory 36, 120-148); for two cells it is
    Shapley's: ½ [log p(x_1) + log p(x_1 | x_2)] for the first.

    Args:
        total: log p(x) or its bound, nats, shape ``(batch,)``.
        alone: log p(x) − log p(x without x_j), 0 for missing cells, shape ``(batch, cells)``.
        present: which cells are not missing.
    """
    rest = (total - alone.sum(1)) / present.sum(1).clamp(min=1)
    return torch.where(present, alone + rest.unsqueeze(1), 0.0)


def leave_one_out(diagonal: Tensor, pulled: Tensor, noise: Tensor) -> Tensor:
    """log N of a cell given all others, from P_jj, (P r)_j and Σ_i P_ij² v_i of the precision P (nats)."""
    safe = torch.where(diagonal > 0, diagonal, 1.0)
    return -0.5 * (_LOG_2PI - safe.log() + (pulled.square() + noise) / safe)


def _solve_ridge(gram: Tensor, cross: Tensor) -> Tensor:
    """B of least squares with one pseudo-observation of 0 for each feature but the constant first one."""
    ridge = torch.ones(len(gram)).to(gram)
    ridge[0] = 0.0
    return torch.linalg.solve(gram + torch.diag(ridge), cross.T).T


def _shrink(sigma: Tensor, fourth: Tensor, n: int, shrinkage: float | None) -> Tensor:
    """(1 − δ) Σ + δ diag Σ; δ of Ledoit & Wolf (2004, section 3.2) from Σ_n E‖y_n‖⁴ when it is not given."""
    if shrinkage is None:
        dims = len(sigma)
        spread = (sigma - torch.eye(dims).to(sigma) * sigma.trace() / dims).square().sum()
        wobble = ((fourth / n - sigma.square().sum()) / n).clamp(min=0.0)
        shrinkage = float(torch.minimum(wobble / spread.clamp(min=1e-300), torch.ones_like(spread)))
    delta = min(1.0, max(shrinkage, _LEAST_SHRINKAGE))
    return (1.0 - delta) * sigma + delta * torch.diag(sigma.diagonal())


class _Moments:
    """Second moments of complete residuals about 0, and Σ E‖y‖⁴, with the noise of the grid in expectation."""

    def __init__(self, dims: int, device: torch.device) -> None:
        self.n = 0
        self.second = torch.zeros((dims, dims), dtype=torch.float64, device=device)
        self.fourth = torch.zeros((), dtype=torch.float64, device=device)
        self.v = torch.zeros(dims, dtype=torch.float64, device=device)

    def add(self, r: Tensor, v: Tensor) -> None:
        self.n += len(r)
        self.v = v
        self.second += r.T @ r
        norms = r.square().sum(1) + v.sum()
        self.fourth += (norms.square() + 4.0 * r.square() @ v + 2.0 * v.square().sum()).sum()

    def covariance(self) -> Tensor:
        return self.second / self.n + torch.diag(self.v)


class _FullStatistics:
    """Expected moments of complete rows under the current law, for EM of the full covariance."""

    def __init__(self, law: _Full | _Factor, features: int) -> None:
        self.law = law
        like = law.cholesky if isinstance(law, _Full) else law.weights
        dims = len(like)
        self.sigma = law.covariance() if isinstance(law, _Full) else torch.eye(dims).to(like)
        self.n = 0
        self.second = torch.zeros_like(self.sigma)
        self.cross = like.new_zeros((dims, features))
        self.gram = like.new_zeros((features, features))
        self.fourth = like.new_zeros(())

    def add(self, r: Tensor, present: Tensor, f: Tensor, mean: Tensor, v: Tensor) -> Tensor:
        """One batch: residuals, which cells are present, features, current means B f(c), variances of the noise.

        Returns E log N(r + noise; 0, Σ) of the cells that are present, under the law before: shape ``(batch,)``.
        """
        filled, nats, spread = torch.empty_like(r), r.new_empty(len(r)), r.new_zeros(len(r))
        noisy = bool((v > 0).any())
        for rows, precision, log_det, mask in patterns(self.sigma, present):
            pulled = torch.einsum("bij,bj->bi", precision.expand(len(rows), -1, -1), r[rows])
            penalty = precision.diagonal(dim1=1, dim2=2) @ v
            nats[rows] = -0.5 * (mask.sum(1) * _LOG_2PI + log_det + (r[rows] * pulled).sum(1) + penalty)
            pull = precision @ self.sigma  # transposed regression of all cells on the present ones
            hidden = (1.0 - mask).unsqueeze(1) * (1.0 - mask).unsqueeze(2)
            covariance = (self.sigma - self.sigma @ pull) * hidden
            if noisy:
                covariance = covariance + pull.transpose(1, 2) @ (v.unsqueeze(1) * pull)
            weight = len(rows) if len(covariance) == 1 else 1
            self.second += covariance.sum(0) * weight
            filled[rows] = row = torch.where(present[rows], r[rows], pulled @ self.sigma)
            trace = covariance.diagonal(dim1=1, dim2=2).sum(1)
            bend = torch.einsum("bi,bij,bj->b", row, covariance.expand(len(row), -1, -1), row)
            spread[rows] = (row.square().sum(1) + trace).square() + 4.0 * bend + 2.0 * covariance.square().sum((1, 2))
        y = filled + mean
        self.n += len(r)
        self.second += y.T @ y
        self.cross += y.T @ f
        self.gram += f.T @ f
        self.fourth += spread.sum()
        return nats

    def maximise(self, floor: Tensor, shrinkage: float | None) -> Tensor:
        """Set the law; return B."""
        b = _solve_ridge(self.gram, self.cross)
        crossed = self.cross @ b.T
        sigma = (self.second - crossed - crossed.T + b @ self.gram @ b.T) / self.n + torch.diag(floor)
        if isinstance(self.law, _Full):
            sigma = _shrink(sigma, self.fourth, self.n, shrinkage)
        self.law.set_covariance(sigma)
        return b


class _FactorStatistics:
    """Expected moments of h = (z, f) with every cell, for EM of PPCA with missing cells (Ilin & Raiko 2010).

    Cell j regresses on h over the rows where it is present: (W_j, B_j) = (Σ E[y_j h])ᵀ (Σ E[h hᵀ])⁻¹.
    """

    def __init__(self, law: _Factor, features: int) -> None:
        self.law = law
        dims, k = law.weights.shape
        self.k, size = k, k + features
        self.second = law.weights.new_zeros((dims, size, size))
        self.cross = law.weights.new_zeros((dims, size))
        self.squares = law.weights.new_zeros(dims)
        self.count = law.weights.new_zeros(dims)

    def add(self, r: Tensor, present: Tensor, f: Tensor, mean: Tensor, v: Tensor) -> Tensor:
        """One batch, as :meth:`_FullStatistics.add`."""
        law, k, size = self.law, self.k, self.second.shape[1]
        holes = not bool(present.all())
        for rows, mask, m in law._posterior(present):
            r_part, y, f_part = r[rows], (r + mean)[rows], f[rows]
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(m))
            pull = torch.einsum("bkl,dl,bd->bkd", inverse, law.weights, mask)  # z's mean is pull @ r
            z = torch.einsum("bkd,bd->bk", pull.expand(len(r_part), -1, -1), r_part)
            h = torch.cat([z, f_part], 1)
            covariance = law.variance * inverse + torch.einsum("bkd,d,bld->bkl", pull, v, pull)
            padded = nn.functional.pad(covariance, (0, size - k, 0, size - k))
            shown = present[rows].double()
            outer = h.unsqueeze(2) * h.unsqueeze(1) + padded
            self.second += (shown.T @ outer.reshape(len(h), -1)).reshape(self.second.shape)
            shown_y = shown * y
            self.cross += shown_y.T @ h
            noisy = (mask.unsqueeze(1) * pull * v).sum(0).T * (1 if holes else len(h))
            self.cross[:, :k] += noisy
            self.squares += (shown * (y.square() + v)).sum(0)
            self.count += shown.sum(0)
        return law.log_density(r, present, v)

    def maximise(self, floor: Tensor, shrinkage: float | None) -> Tensor:
        """Set W and σ²; return B."""
        ridge = torch.full((self.second.shape[1],), 1.0).to(self.second)
        ridge[: self.k + 1] = 1e-6
        solution = torch.linalg.solve(self.second + torch.diag(ridge), self.cross.unsqueeze(2)).squeeze(2)
        fitted = torch.einsum("di,dij,dj->d", solution, self.second, solution)
        residual = self.squares - 2.0 * (solution * self.cross).sum(1) + fitted
        total = (residual + floor * self.count).sum() / self.count.sum().clamp(min=1.0)
        self.law.variance.copy_(total.clamp(min=_LEAST_SHRINKAGE))
        self.law.weights.copy_(solution[:, : self.k])
        return solution[:, self.k :]


class _Features(nn.Module):
    """f(c): a leading 1, numbers standardised, codes as one-hot vectors; a missing cell gives zeros and a 1 of its own.

    A single cell of ``Integers`` with at most 256 levels is a label and taken as a code.
    """

    def __init__(self, condition: Space | None) -> None:
        super().__init__()
        #: position, number of levels (0: a number), and whether it may be missing
        self.cells: list[tuple[int, int, bool]] = []
        if isinstance(condition, Table):
            self.cells = [(j, c.levels or 0, c.missing) for j, c in enumerate(condition.columns)]
        elif condition is not None:
            levels = condition.vocab if isinstance(condition, Tokens) else 0
            if isinstance(condition, Integers) and condition.dims == 1 and condition.levels <= 256:
                levels = condition.levels
            self.cells = [(j, levels, condition.missing) for j in range(condition.dims)]
        self.count = 1 + sum(max(levels, 1) + missing for _, levels, missing in self.cells)
        if self.count > _MOST_FEATURES:
            raise Unsupported(
                f"condition: expected at most {_MOST_FEATURES} features for model 'gaussian', got {self.count} "
                "(each category is one)"
            )
        numbers = len(self.cells)
        self.register_buffer("shift", torch.zeros(numbers, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(numbers, dtype=torch.float64))
        self.shift: Tensor
        self.scale: Tensor

    def forward(self, condition: Tensor | None, n: int) -> Tensor:
        """Shape ``(n, count)``, float64."""
        one = self.shift.new_ones((n, 1))
        if not self.cells:
            return one
        if condition is None:
            raise ValueError("condition: expected one row an example (the model was built with a condition), got None")
        if len(condition) != n:
            raise ValueError(f"condition: expected {n} rows, got {len(condition)}")
        flat = condition.flatten(1).to(self.shift)
        pieces = [one]
        for place, (j, levels, missing) in enumerate(self.cells):
            absent = torch.isnan(flat[:, j])
            value = torch.where(absent, 0.0, flat[:, j])
            if levels:
                hot = nn.functional.one_hot(value.long(), levels).to(one)
            else:
                hot = ((value - self.shift[place]) / self.scale[place]).unsqueeze(1)
            pieces.append(torch.where(absent.unsqueeze(1), 0.0, hot))
            if missing:
                pieces.append(absent.unsqueeze(1).to(one))
        return torch.cat(pieces, 1)

    def start(self) -> None:
        self._moments = Moments(len(self.cells), self.shift.device)

    def add(self, condition: Tensor | None) -> None:
        if self.cells:
            if condition is None:
                raise ValueError("condition: expected one row an example (the model was built with one), got None")
            self._moments.add(condition.reshape(len(condition), -1).to(self.shift))

    def finish(self) -> None:
        deviation = self._moments.variance().sqrt()
        self.shift.copy_(self._moments.mean)
        self.scale.copy_(torch.where(deviation > 0, deviation, 1.0))
        del self._moments
