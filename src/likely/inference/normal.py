r"""The joint normal law of a table's features, fitted to rows with holes, and its conditionals given any of the cells.

Features are numeric cells in standard units, and an indicator of each code of the columns with few.  With known
cells K and unknown ones U (Dempster, Laird & Rubin 1977, section 4.1; Beale & Little 1975):

    E[y_U | y_K] = Σ_UK Σ_KK⁻¹ y_K,   Cov[y_U | y_K] = Σ_UU − Σ_UK Σ_KK⁻¹ Σ_KU                                 (1)

An indicator is no normal variate, but its conditional mean is the best linear guess of a probability.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

#: Columns with more codes have no indicators.
MOST_CODES = 32
#: Most features; beyond it there is no such law.
MOST_FEATURES = 160
#: Standard units beyond which a number says nothing more.
REACH = 8.0
_RIDGE = 1e-3
_ITERATIONS, _TOLERANCE = 30, 2e-3
_CHUNK = 1 << 22  # numbers in the largest temporary


class JointNormal(nn.Module):
    """Conditional means and deviations of features given those that are known.

    >>> law = JointNormal([0, 0])
    >>> x = torch.randn(1000, 1, dtype=torch.float64).expand(-1, 2)
    >>> law.fit(x, torch.zeros(2), torch.ones(2))
    >>> mean, deviation = law(torch.tensor([[2.0, torch.nan]], dtype=torch.float64))
    >>> bool((mean[0, 1] - 2.0).abs() < 0.05), bool(deviation[0, 1] < 0.1)
    (True, True)

    Args:
        levels: number of codes of each column, 0 for a numeric one.
    """

    mean: Tensor
    covariance: Tensor
    location: Tensor
    unit: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.numeric = [j for j, number in enumerate(levels) if not number]
        self.coded = [(j, number) for j, number in enumerate(levels) if 0 < number <= MOST_CODES]
        #: for every feature its column
        self.cell = [*self.numeric, *(j for j, number in self.coded for _ in range(number))]
        size = len(self.cell)
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("covariance", torch.eye(size, dtype=torch.float64))
        self.register_buffer("location", torch.zeros(len(self.numeric), dtype=torch.float64))
        self.register_buffer("unit", torch.ones(len(self.numeric), dtype=torch.float64))

    def features(self, x: Tensor) -> Tensor:
        """Features of rows, NaN where unknown: shape ``(n, features)``, float64."""
        pieces = [((x[:, self.numeric].double() - self.location.double()) / self.unit.double()).clamp(-REACH, REACH)]
        for j, number in self.coded:
            cell = x[:, j : j + 1].double()
            hot = (cell == torch.arange(number, device=x.device)).double()
            pieces.append(torch.where(torch.isnan(cell), cell, hot))
        return torch.cat(pieces, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Equation (1): mean and standard deviation of every feature, shape ``(n, features)``, float64.

        Of a known feature they are its value and 0.
        """
        y = self.features(x)
        size = max(1, _CHUNK // max(1, y.shape[1] ** 2))
        means, variances = zip(*(self.given(part)[:2] for part in y.split(size)))
        return torch.cat(means), torch.cat(variances).clamp(min=0.0).sqrt()

    def given(self, y: Tensor, centre: Tensor | None = None, full: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Conditional means, variances, and (if ``full``) the sum of the covariances.

        Args:
            y: features, NaN where unknown.
            centre: mean of the law, by default its own; shape of ``y`` for one of each row.
        """
        centre = self.mean.double() if centre is None else centre
        known = ~torch.isnan(y)
        centred = torch.where(known, y - centre, 0.0)
        on = known.double()
        sigma = self.covariance.double()
        # Σ_KK with the unknown features taken for independent ones: its inverse is Σ_KK⁻¹ where both are known.
        matrix = sigma * on.unsqueeze(1) * on.unsqueeze(2) + torch.diag_embed(1.0 - on)
        root = torch.linalg.cholesky(matrix)
        across = sigma * on.unsqueeze(1)  # of all features (rows) with the known ones (columns)
        half = torch.linalg.solve_triangular(root, across.transpose(1, 2), upper=False)
        white = torch.linalg.solve_triangular(root, centred.unsqueeze(2), upper=False)
        mean = (half.transpose(1, 2) @ white).squeeze(2) + centre
        variance = (sigma.diagonal() - half.square().sum(1)) * (1.0 - on)
        spread = sigma[:0, :0]
        if full:
            off = 1.0 - on
            lost = off.t() @ off
            explained = torch.einsum("nki,nkj->ij", half * off.unsqueeze(1), half * off.unsqueeze(1))
            spread = sigma * lost - explained
        return torch.where(known, y, mean), variance, spread

    @torch.no_grad()
    def fit(self, x: Tensor, location: Tensor, unit: Tensor) -> None:
        """EM on rows of cells until no mean or covariance moves much, at most thirty times.

        Args:
            x: shape ``(n, columns)``, NaN where missing.
            location, unit: of the numeric columns.
        """
        self.location.copy_(location)
        self.unit.copy_(unit)
        y = self.features(x.to(self.mean.device))
        known = ~torch.isnan(y)
        count = known.sum(0).clamp(min=1)
        mean = torch.where(known, y, 0.0).sum(0) / count
        variance = torch.where(known, (y - mean).square(), 0.0).sum(0) / count
        self.mean.copy_(mean)
        self.covariance.copy_(torch.diag(variance + _RIDGE))
        size = max(1, _CHUNK // max(1, y.shape[1] ** 2))
        ridge = _RIDGE * torch.eye(y.shape[1], dtype=torch.float64, device=y.device)
        complete = bool(known.all())
        for _ in range(1 if complete else _ITERATIONS):
            filled, spread = [], torch.zeros_like(self.covariance, dtype=torch.float64)
            for part in y.split(size):
                if complete:
                    filled.append(part)
                else:
                    expected, _, lost = self.given(part, full=True)
                    filled.append(expected)
                    spread += lost
            whole = torch.cat(filled)
            mean = whole.mean(0)
            centred = whole - mean
            covariance = (centred.t() @ centred + spread) / len(y) + ridge
            moved = float((covariance - self.covariance.double()).abs().max())
            self.mean.copy_(mean)
            self.covariance.copy_(covariance)
            if moved < _TOLERANCE:
                break
