r"""The joint normal law about the neighbours of a row: what rows like it had, and a step of regression from them to it.

Row i of those that were seen has features of means m_i and variances v_i: its value and 0 where a cell is known.  A row
y with known features K and unknown ones U has

    w_i ∝ Π_{d∈K} N(y_d; m_id, h_d² + v_id),   m(y) = Σ_i w_i m_i      (Nadaraya 1964, Watson 1964)              (1)
    E[y_U | y_K] = m_U(y) + Σ_UK Σ_KK⁻¹ (y_K − m_K(y))                                                          (2)

(1) is the mean of a kernel density, (2) the step from it to y by the joint normal law with covariance Σ
(:mod:`likely.inference.normal`), which it is itself where every width h is large.  The widths are those of the least
squared error of a hidden cell, each row left out of its own neighbours.  Then (2) fills the missing cells of the rows
in place of the joint normal law, and the widths are fitted again; this is done twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from likely.inference.normal import JointNormal
from likely.noise import content_keys

#: Most rows that are kept, evenly spread over those that were seen.
MOST_ROWS = 2000
#: Steps of gradient for the widths and their rate, at first and after each filling; hidden cells a step.
_STEPS, _RATE, _BATCH = (150, 50), (0.05, 0.03), 128
#: How often the rows are filled by their neighbours.
_ROUNDS = 2
#: Rows that are worked on at a time.
_CHUNK = 256
#: Cells that the mean gain over all features is worth in that of one.
_PSEUDOCOUNT = 10.0
#: Logarithm of the weight of a row that is left out.
_NEVER = -1e30


class Neighbours(nn.Module):
    """Means and deviations of unknown features by equation (2).  Until :meth:`fit` it is the joint normal law.

    >>> law = Neighbours([0, 0])
    >>> a = torch.linspace(-2, 2, 400, dtype=torch.float64)
    >>> law.fit(torch.stack([a, a.square() - 1.3], 1), torch.zeros(2), torch.ones(2))
    >>> mean, deviation = law(torch.tensor([[1.5, torch.nan]], dtype=torch.float64))
    >>> bool((mean[0, 1] - 0.95).abs() < 0.05), bool(deviation[0, 1] < 0.25)  # the joint normal law: 0.04 and 1.2
    (True, True)

    Args:
        levels: number of codes of each column, 0 for a numeric one.
    """

    #: Tensors of sizes that the data give: m, v, and what the rows are told apart by, ascending.
    _names = ("rows", "variances", "keys")

    rows: Tensor | None
    variances: Tensor | None
    keys: Tensor | None
    log_width: Tensor
    gain: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.normal = JointNormal(levels)
        size = len(self.normal.cell)
        self.register_buffer("log_width", torch.zeros(size, dtype=torch.float64))
        #: share of the joint normal law's variance that the neighbours leave
        self.register_buffer("gain", torch.ones(size, dtype=torch.float64))
        for name in self._names:
            self.register_buffer(name, None)

    def forward(self, x: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every feature, shape ``(n, features)``, float64.

        Args:
            x: cells in the units of the data, shape ``(n, columns)``, NaN where unknown.
            own: the same rows with all that is known of them, which leave themselves out; by default ``x``.
        """
        if self.keys is None:
            return self.normal(x)
        keys = content_keys(x if own is None else own)
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        place = torch.where(self.keys[place] == keys, place, -1)
        mean, variance = self._in_chunks(self.normal.features(x), place)
        return mean, (self.gain.double() * variance).clamp(min=0.0).sqrt()

    def _in_chunks(self, y: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`_given` of any number of rows."""
        pairs = [self._given(*part) for part in zip(y.split(_CHUNK), place.split(_CHUNK))]
        mean, variance = (torch.cat(part) for part in zip(*pairs))
        return mean, variance

    def _given(self, y: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Equation (2) and the joint normal law's variances; ``place``: the row to leave out, −1 for none."""
        assert self.rows is not None and self.variances is not None
        known = ~torch.isnan(y)
        on, filled, rows = known.double(), torch.where(known, y, 0.0), self.rows.double()
        # 1. weights: −2 log w = Σ_d (y_d − m_id)² p_id − log p_id over the known features
        precision = 1.0 / ((2.0 * self.log_width.double()).exp() + self.variances.double())
        factors = torch.cat([precision, -2.0 * precision * rows, precision * rows.square() - precision.log()], 1)
        away = torch.cat([filled.square(), filled, on], 1) @ factors.t()
        everyone = torch.arange(len(rows), device=y.device)
        weights = (-0.5 * away).masked_fill(place.unsqueeze(1) == everyone, _NEVER).softmax(1)
        # 2. the step from the neighbours to the row
        mean, variance, _ = self.normal.given(y, weights @ rows)
        return mean, variance

    # Fitting -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fit(self, x: Tensor, location: Tensor, unit: Tensor) -> None:
        """The joint normal law, the rows with their missing cells filled, and the widths.

        Args:
            x: shape ``(n, columns)``, NaN where missing.
            location, unit: of the numeric columns.
        """
        self.normal.fit(x, location, unit)
        x = x[:: -(-len(x) // MOST_ROWS)].to(self.log_width.device)
        self.keys, order = content_keys(x).sort()
        y = self.normal.features(x[order])
        parts = [self.normal.given(part) for part in y.split(_CHUNK)]
        self.rows, unknown = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        self.variances = unknown
        generator = torch.Generator().manual_seed(0)
        for r in range(_ROUNDS + 1):
            self._fit_widths(y, _STEPS[r > 0], _RATE[r > 0], generator)
            hidden = self._one_hidden(y, torch.arange(len(y)), generator)
            left, expected = self._errors(y, hidden)
            share = left.sum() / expected.sum().clamp(min=1e-12)
            self.gain.copy_((left + share * _PSEUDOCOUNT) / (expected + _PSEUDOCOUNT))
            if r < _ROUNDS:
                self.rows, self.variances = self._each(y)[0], share * unknown

    def _fit_widths(self, y: Tensor, steps: int, rate: float, generator: torch.Generator) -> None:
        """Least squared error of one hidden cell a row, in units of the joint normal law's variance, by Adam."""
        with torch.enable_grad():
            width = self.log_width.clone().requires_grad_()
            self.log_width = width
            adam = torch.optim.Adam([width], rate)
            scale = self.normal.covariance.double().diagonal()
            for step in range(steps):
                adam.param_groups[0]["lr"] = rate * (1.0 - step / steps)
                place = torch.randint(len(y), (_BATCH,), generator=generator)
                hidden = self._one_hidden(y[place], place, generator)
                mean, _ = self._given(y[place].masked_fill(hidden, torch.nan), place.to(y.device))
                errors = torch.where(hidden, (mean - y[place].nan_to_num(0.0)).square() / scale, 0.0)
                adam.zero_grad()
                (errors.sum() / hidden.sum().clamp(min=1)).backward()
                adam.step()
        self.log_width = width.detach()

    def _one_hidden(self, y: Tensor, place: Tensor, generator: torch.Generator) -> Tensor:
        """Which features are hidden: those of one known cell of every row, drawn by lot."""
        column = torch.tensor(self.normal.cell, device=y.device)
        keys = torch.rand((len(y), int(column.max()) + 1), generator=generator).to(y)[:, column]
        keys = torch.where(torch.isnan(y), -1.0, keys)
        return (keys == keys.amax(1, keepdim=True)) & (keys >= 0)

    def _each(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Equation (2) for the rows themselves, each left out of its own neighbours, and the variances."""
        return self._in_chunks(y, torch.arange(len(y), device=y.device))

    def _errors(self, y: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of the hidden features, squared error over variance: sums of it and of what the normal law expects (1)."""
        mean, variance = self._each(y.masked_fill(hidden, torch.nan))
        squares = (mean - y.nan_to_num(0.0)).square() / variance.clamp(min=1e-12)
        return torch.where(hidden, squares, 0.0).sum(0), hidden.double().sum(0)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Its rows are those that were stored."""
        for name in self._names:
            found = state_dict.get(prefix + name)
            setattr(self, name, None if found is None else torch.zeros_like(found))
        super()._load_from_state_dict(state_dict, prefix, *arguments)
