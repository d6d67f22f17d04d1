"""What the output of a denoising network means: five ways to say the same thing.

A noisy example is z = α x + σ ε with α² = sigmoid(−γ) and σ² = sigmoid(γ), so that any two of z, x and ε give the
third. Each class turns an output into the pair (x̂, ε̂); losses, bounds and samplers see that pair alone.  The bound
does not depend on the choice, its optimisation does: as γ → −∞ almost any x̂ will do, and as γ → ∞ almost any ε̂.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from likely.contract import check_options


class Pair(NamedTuple):
    """What a denoiser says of z: z = α ``x`` + σ ``eps``; both of the shape of z."""

    x: Tensor
    eps: Tensor


def alpha_sigma(gamma: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ at levels ``(batch,)``, shaped to be broadcast over ``like`` of shape ``(batch, …)``.

    >>> alpha, sigma = alpha_sigma(torch.zeros(2), torch.zeros(2, 3, 4))
    >>> alpha.shape, round(float(alpha[0, 0, 0] ** 2 + sigma[0, 0, 0] ** 2), 4)
    (torch.Size([2, 1, 1]), 1.0)
    """
    gamma = gamma.reshape(-1, *[1] * (like.dim() - 1))
    return torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()


class Parameterisation(Protocol):
    """From a network's output to the pair."""

    def precondition(self, z: Tensor, gamma: Tensor) -> Tensor:
        """What the network is shown in place of z."""
        ...

    def to_pair(self, out: Tensor, z: Tensor, gamma: Tensor) -> Pair:
        """(x̂, ε̂) from the output."""
        ...


@dataclass
class Eps:
    """The noise: ε̂ = out, or with ``residual`` ε̂ = out + z, which is right as SNR → 0; x̂ = (z − σ ε̂)/α.

    The residual form is that of Kingma et al. 2021 (arXiv 2107.00630), released code.
    """

    residual: bool = True

    def precondition(self, z: Tensor, gamma: Tensor) -> Tensor:
        return z

    def to_pair(self, out: Tensor, z: Tensor, gamma: Tensor) -> Pair:
        alpha, sigma = alpha_sigma(gamma, z)
        eps = out + z if self.residual else out
        return Pair((z - sigma * eps) / alpha, eps)


@dataclass
class X:
    """The example: x̂ = out, ε̂ = (z − α x̂)/σ."""

    def precondition(self, z: Tensor, gamma: Tensor) -> Tensor:
        return z

    def to_pair(self, out: Tensor, z: Tensor, gamma: Tensor) -> Pair:
        alpha, sigma = alpha_sigma(gamma, z)
        return Pair(out, (z - alpha * out) / sigma)


@dataclass
class V:
    """The velocity v = α ε − σ x (Salimans & Ho 2022, arXiv 2202.00512, appendix D): x̂ = α z − σ v̂, ε̂ = σ z + α v̂."""

    def precondition(self, z: Tensor, gamma: Tensor) -> Tensor:
        return z

    def to_pair(self, out: Tensor, z: Tensor, gamma: Tensor) -> Pair:
        alpha, sigma = alpha_sigma(gamma, z)
        return Pair(alpha * z - sigma * out, sigma * z + alpha * out)


class F(nn.Module):
    """The correction to the best linear denoiser, in units of its error (Karras et al. 2022, arXiv 2206.00364, eq. 7).

    With y = z/α, s = σ/α and data of deviation d, x̂ = d²/(s² + d²) y + s d/√(s² + d²) out.  With n² = σ² + α² d² that
    is

        x̂ = (α d²/n²) z + (σ d/n) out,      ε̂ = (σ/n²) z − (α d/n) out.

    The input is z d/n: EDM's y/√(s² + d²) times d, so that it has the data's own deviation at all levels, and is the
    data itself where the noise is small (a network's Fourier features then meet the data's own grid).  For d = 1, out =
    −v.

    Args:
        data_scale: d, root mean square of the data; a buffer.
    """

    data_scale: Tensor

    def __init__(self, data_scale: float = 1.0) -> None:
        super().__init__()
        if data_scale <= 0:
            raise ValueError(f"data_scale: expected a positive number, got {data_scale}")
        self.register_buffer("data_scale", torch.tensor(float(data_scale)))

    def _norm(self, z: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, sigma = alpha_sigma(gamma, z)
        d = self.data_scale.to(alpha)
        return alpha, sigma, d, torch.sqrt(sigma.square() + (alpha * d).square())

    def precondition(self, z: Tensor, gamma: Tensor) -> Tensor:
        _, _, d, n = self._norm(z, gamma)
        return z * (d / n)

    def to_pair(self, out: Tensor, z: Tensor, gamma: Tensor) -> Pair:
        alpha, sigma, d, n = self._norm(z, gamma)
        x = (alpha * (d / n).square()) * z + (sigma * d / n) * out
        return Pair(x, (sigma / n.square()) * z - (alpha * d / n) * out)


@dataclass
class Score:
    """The score of z's density, ∇ log p(z) = −ε̂/σ."""

    def precondition(self, z: Tensor, gamma: Tensor) -> Tensor:
        return z

    def to_pair(self, out: Tensor, z: Tensor, gamma: Tensor) -> Pair:
        alpha, sigma = alpha_sigma(gamma, z)
        return Pair((z + sigma.square() * out) / alpha, -sigma * out)


class OnLevels(nn.Module):
    """The posterior mean of values that lie on levels f_1 … f_L, from a tilt of each cell's own distribution.

        x̂ = Σ_k f_k p(k | z),   p(k | z) ∝ π_k exp(out · f_k / d) N(z; α f_k, σ²),   ε̂ = (z − α x̂)/σ

    with the shares π of the cell in the data and their root mean square d.  Any x̂ between the levels has an output,
    and 0 is the best denoiser of independent cells; where the noise is small x̂ is the nearest level, which no network
    has to learn.  Like the output of Bayesian flow networks (Graves et al. 2023, arXiv 2308.07037), with one number a
    cell.

    Args:
        places: f, shape ``(L,)``.
        shape: of an example.
    """

    places: Tensor
    log_shares: Tensor
    data_scale: Tensor

    def __init__(self, places: Tensor, shape: Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("log_shares", torch.full((*shape, len(places)), -math.log(len(places))))
        self.register_buffer("data_scale", places.square().mean().sqrt())

    @torch.no_grad()
    def fit(self, counts: Tensor) -> None:
        """Set π from counts of the levels in every cell, shape ``(*shape, L)``; each cell shares a little with all."""
        overall = counts.flatten(0, -2).sum(0) + 1.0
        smooth = counts + overall / overall.sum()
        self.log_shares.copy_(torch.log(smooth / smooth.sum(-1, keepdim=True)))
        self.data_scale.copy_(torch.sqrt((overall * self.places.double().square().cpu()).sum() / overall.sum()))

    def precondition(self, z: Tensor, gamma: Tensor) -> Tensor:
        alpha, sigma = alpha_sigma(gamma, z)
        d = self.data_scale.to(alpha)
        return z * (d / torch.sqrt(sigma.square() + (alpha * d).square()))

    def to_pair(self, out: Tensor, z: Tensor, gamma: Tensor) -> Pair:
        alpha, sigma = alpha_sigma(gamma, z)
        f = self.places.to(z)
        distance = (z.unsqueeze(-1) - alpha.unsqueeze(-1) * f) / sigma.unsqueeze(-1)
        tilt = (out / self.data_scale.to(z)).unsqueeze(-1) * f
        x = ((self.log_shares.to(z) + tilt - 0.5 * distance.square()).softmax(-1) * f).sum(-1)
        return Pair(x, (z - alpha * x) / sigma)


def to_output(parameterisation: Parameterisation, pair: Pair, z: Tensor, gamma: Tensor) -> Tensor:
    """The output that stands for a pair: the inverse of ``to_pair``, which is affine in the output cell by cell."""
    zero = torch.zeros_like(z)
    eps_0 = parameterisation.to_pair(zero, z, gamma).eps
    x_0 = parameterisation.to_pair(zero, z, gamma).x
    eps_1 = parameterisation.to_pair(zero + 1.0, z, gamma).eps
    x_1 = parameterisation.to_pair(zero + 1.0, z, gamma).x
    slope_eps, slope_x = eps_1 - eps_0, x_1 - x_0
    better = slope_eps.abs() > slope_x.abs()
    of_eps = (pair.eps - eps_0) / torch.where(better, slope_eps, 1.0)
    of_x = (pair.x - x_0) / torch.where(better, 1.0, slope_x)
    return torch.where(better, of_eps, of_x)


_PARAMETERISATIONS: dict[str, Callable[..., Parameterisation]] = {"eps": Eps, "x": X, "v": V, "f": F, "score": Score}
PARAMETERISATIONS = tuple(_PARAMETERISATIONS)


def make_parameterisation(name: str, **options: Any) -> Parameterisation:
    """A parameterisation by name: ``eps``, ``x``, ``v``, ``f`` or ``score``.

    >>> make_parameterisation("eps", residual=False)
    Eps(residual=False)
    """
    if name not in _PARAMETERISATIONS:
        raise ValueError(f"parameterisation: expected one of {', '.join(PARAMETERISATIONS)}, got {name!r}")
    check_options(_PARAMETERISATIONS[name], options)
    return _PARAMETERISATIONS[name](**options)
