"""The law of one pixel: its colours one after another, each given those before it.

A law over C colours can be asked two things: the distribution of its ``first`` colour, and, ``given`` that colour's
value, the law of the other C − 1.  This is the order in which a pixel is drawn and in which it is coded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from likely.distributions.bernoulli import Bernoulli
from likely.distributions.logistic import DiscretizedLogisticMixture, log_level
from likely.distributions.protocol import Distribution

#: ``log_mass(x, means, log_scales, levels)``: what :func:`~likely.distributions.logistic.log_level` computes.
LogMass: TypeAlias = Callable[[Tensor, Tensor, Tensor, int], Tensor]


class PixelLaw(Protocol):
    """The law of the colours of one pixel, for rows of pixels."""

    @property
    def first(self) -> Distribution:
        """The distribution of the first colour: of one cell a row."""
        ...

    def given(self, x: Tensor) -> PixelLaw:
        """The law of the other colours when the first is ``x``, shape ``(rows,)``."""
        ...

    def __getitem__(self, rows: slice) -> PixelLaw:
        """The law of some of the pixels."""
        ...

    def log_probs(self, x: Tensor) -> Tensor:
        """log p of each colour given those before it, nats: shape ``(rows, C)`` for levels of shape ``(rows, C)``."""
        ...


class PixelMixture:
    """PixelCNN++'s mixture of K discretised logistics over the colours of a pixel.

    The colours of a pixel share one component, and in each component the mean of a colour depends linearly on the
    colours before it (Salimans et al. 2017, arXiv 1701.05517, eqs. 2 and 3; with u = 2x/(L − 1) − 1 and a reference r):

        p(x) = Σ_i π_i Π_c P(x_c | m_ci, s_ci),      m_ci = μ_ci + Σ_{e<c} a_cei (u_e − r_e)

    so that the law of a colour given those before it is again a mixture, in which each component weighs as much as
    it foresaw them: π_i ∝ π_i P(x_e | m_ei, s_ei).

    Args:
        logits: of π, shape ``(rows, K)``.
        means, log_scales: μ and log s, shape ``(rows, C, K)``, in units of u.
        slopes: a, shape ``(rows, C (C − 1) / 2, K)``: those of the first colour on all later ones, then of the second …
        reference: r, shape ``(rows, C)``.
        levels: L.
        log_mass: what ``given`` takes log P(x | m, s) from; a codec brings one with the same bits on every machine.
    """

    def __init__(
        self,
        logits: Tensor,
        means: Tensor,
        log_scales: Tensor,
        slopes: Tensor,
        reference: Tensor,
        levels: int,
        log_mass: LogMass = log_level,
    ) -> None:
        self.logits, self.means, self.log_scales = logits, means, log_scales
        self.slopes, self.reference, self.levels, self.log_mass = slopes, reference, levels, log_mass

    @property
    def first(self) -> DiscretizedLogisticMixture:
        logits = self.logits.to(self.means.dtype)
        return DiscretizedLogisticMixture(logits, self.means[:, 0], self.log_scales[:, 0], self.levels, trailing=0)

    def given(self, x: Tensor) -> PixelMixture:
        x = x.to(self.means.dtype)
        later = self.means.shape[1] - 1
        u = x * (2.0 / (self.levels - 1)) - 1.0
        moved = self.slopes[:, :later] * (u - self.reference[:, 0]).unsqueeze(-1).unsqueeze(-1)
        first = self.first
        found = self.log_mass(x.unsqueeze(-1), first.means, first.log_scales, self.levels)
        return PixelMixture(
            self.logits + found,
            self.means[:, 1:] + moved,
            self.log_scales[:, 1:],
            self.slopes[:, later:],
            self.reference[:, 1:],
            self.levels,
            self.log_mass,
        )

    def __getitem__(self, rows: slice) -> PixelMixture:
        parts = (self.logits, self.means, self.log_scales, self.slopes, self.reference)
        logits, means, log_scales, slopes, reference = (part[rows] for part in parts)
        return PixelMixture(logits, means, log_scales, slopes, reference, self.levels, self.log_mass)

    def log_probs(self, x: Tensor) -> Tensor:
        law, evidence = self, [torch.logsumexp(self.logits, 1)]
        for colour in x.unbind(1):
            law = law.given(colour)
            evidence.append(torch.logsumexp(law.logits, 1))
        return torch.stack(evidence, 1).diff(dim=1)


class PixelBernoulli:
    """Colours that are 0 or 1: P(x_c = 1) = σ(l_c + Σ_{e<c} a_ce (2 x_e − 1)).

    Args:
        logits: l, shape ``(rows, C)``.
        slopes: a, shape ``(rows, C (C − 1) / 2)``: those of the first colour on all later ones, then of the second …
    """

    def __init__(self, logits: Tensor, slopes: Tensor) -> None:
        self.logits, self.slopes = logits, slopes

    @property
    def first(self) -> Bernoulli:
        return Bernoulli(self.logits[:, 0], trailing=0)

    def given(self, x: Tensor) -> PixelBernoulli:
        later = self.logits.shape[1] - 1
        sign = (x.to(self.logits.dtype) * 2.0 - 1.0).unsqueeze(-1)
        return PixelBernoulli(self.logits[:, 1:] + self.slopes[:, :later] * sign, self.slopes[:, later:])

    def __getitem__(self, rows: slice) -> PixelBernoulli:
        return PixelBernoulli(self.logits[rows], self.slopes[rows])

    def log_probs(self, x: Tensor) -> Tensor:
        law, found = self, []
        for colour in x.unbind(1):
            found.append(law.first.log_prob(colour))
            law = law.given(colour)
        return torch.stack(found, 1)
