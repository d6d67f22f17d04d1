"""Continuous flows: a differential equation leads from data to base.

Chen, Rubanova, Bettencourt & Duvenaud 2018 (arXiv 1806.07366); FFJORD: Grathwohl et al. 2019 (arXiv 1810.01367).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from likely.bijections.bijection import Bijection
from likely.contract import noise_or_global
from likely.networks.linear import Linear
from likely.networks.mlp import MLP
from likely.noise import Noise


class Continuous(Bijection):
    """z = x(1) where ẋ = v(x, t; context) from x(0) = x, and log |det| = ∫ tr ∂v/∂x dt.

    The solver is that of ``torchdiffeq`` (extra ``ode``).  With an adaptive one, values are right to its tolerance, and
    to that degree depend on the batch, whose examples share their steps; with ``rk4`` they do not, but the inverse is
    only as near as the steps are small.

    Args:
        features: number of cells.
        hidden: widths of the hidden layers of v.
        context: width of the context, 0 if there is none.
        trace: ``exact``, at the cost of one derivative a cell, or ``hutchinson``: εᵀ ∂v/∂x ε with one ε ~ N(0, I) for
            the whole path, an unbiased estimate (Grathwohl et al., eq. 8).  ε is drawn from :attr:`noise`, by default
            the global generator; with another ε the inverse gives another estimate.
        solver: a method of ``torchdiffeq``, such as ``dopri5`` or ``rk4``.
        tolerance: relative and absolute; by default 1e-5 in float32, 1e-9 in float64.
        steps: of a solver without adaptive steps.

    Raises:
        ModuleNotFoundError: torchdiffeq is not installed; the message says what to install.
    """

    #: Where ε is drawn from.
    noise: Noise | None = None

    def __init__(
        self,
        features: int,
        hidden: Sequence[int] = (64, 64),
        context: int = 0,
        trace: str = "exact",
        solver: str = "dopri5",
        tolerance: float | None = None,
        steps: int = 20,
    ) -> None:
        super().__init__()
        if trace not in ("exact", "hutchinson"):
            raise ValueError(f"trace: expected 'exact' or 'hutchinson', got {trace!r}")
        self.trace, self.solver, self.tolerance, self.steps = trace, solver, tolerance, steps
        self._odeint = _solver()
        self.network = MLP(features + 1 + context, hidden, "tanh")
        self.output = Linear(self.network.out_features, features)
        with torch.no_grad():
            self.output.weight.mul_(0.1)
            self.output.bias.zero_()

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._integrate(x, context, (0.0, 1.0))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._integrate(z, context, (1.0, 0.0))

    def velocity(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """v(x, t; context)."""
        given = [x, t.to(x).expand(len(x), 1)] + ([] if context is None else [context])
        return self.output(self.network(torch.cat(given, 1)))

    def _integrate(self, x: Tensor, context: Tensor | None, span: tuple[float, float]) -> tuple[Tensor, Tensor]:
        wanted = torch.is_grad_enabled()
        eps = noise_or_global(self.noise, x).normal(x.shape).to(x) if self.trace == "hutchinson" else None

        def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                at = state[0] if state[0].requires_grad else state[0].detach().requires_grad_()
                v = self.velocity(t, at, context)
                if eps is not None:
                    (row,) = torch.autograd.grad(v, at, eps, create_graph=wanted)
                    trace = (row * eps).sum(1)
                else:
                    trace = torch.zeros_like(v[:, 0])
                    for i in range(v.shape[1]):
                        (row,) = torch.autograd.grad(v[:, i].sum(), at, create_graph=wanted, retain_graph=True)
                        trace = trace + row[:, i]
            return (v, trace) if wanted else (v.detach(), trace.detach())

        adaptive = self.solver in ("dopri8", "dopri5", "bosh3", "fehlberg2", "adaptive_heun")
        tolerance = self.tolerance or (1e-9 if x.dtype == torch.float64 else 1e-5)
        options: dict[str, Any] = {} if adaptive else {"options": {"step_size": 1.0 / self.steps}}
        times = torch.tensor(span, dtype=x.dtype, device=x.device)
        found, log_det = self._odeint(
            slope, (x, x.new_zeros(len(x))), times, rtol=tolerance, atol=tolerance, method=self.solver, **options
        )
        return found[-1], log_det[-1]


def _solver() -> Any:
    try:
        return importlib.import_module("torchdiffeq").odeint
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("continuous flows need torchdiffeq: pip install 'likely[ode]'") from error
