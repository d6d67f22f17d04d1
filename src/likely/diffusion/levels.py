"""Noise levels γ = −log SNR: the two ends, and the density with which levels between them are drawn.

A level has one number, γ = −log(α²/σ²), which grows with the noise; v = (γ − γ_0)/(γ_1 − γ_0) is its place between the
ends.  The continuous-time bound is an integral over γ from γ_0 to γ_1 (Kingma et al. 2021, arXiv 2107.00630):
a schedule is no more than the density p(v) of an importance sample from it, and every schedule with the same ends has
the same bound,

    ½ ∫ E|ε − ε̂|² dγ = E_{v ~ p} [ ½ (γ_1 − γ_0) E|ε − ε̂|² / p(v) ].

What depends on the density is the variance, the bound in T steps, whose grid has equal mass of p between neighbours,
and a loss that is weighted.  A density is an object with ``quantile(u) -> v`` and ``density(v) -> p``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.contract import check_options
from likely.noise import Noise

TAU = 2.0 * math.pi


class Ends(nn.Module):
    """The ends γ_0 and γ_1 of the noise levels; a network is told γ in units of the range they started with.

    >>> ends = Ends(-10.0, 6.0)
    >>> ends.gamma(torch.tensor([0.0, 0.5, 1.0])).tolist(), ends.level(torch.tensor([-2.0])).tolist()
    ([-10.0, -2.0, 6.0], [0.5])

    Args:
        low: γ_0, the least noise.
        high: γ_1, the most.
        learned: whether the ends are parameters; their gradient is that of the bound.
    """

    low: Tensor
    high: Tensor
    first: Tensor

    def __init__(self, low: float, high: float, learned: bool = False) -> None:
        super().__init__()
        if not low < high:
            raise ValueError(f"gamma_min, gamma_max: expected gamma_min < gamma_max, got {low:g} and {high:g}")
        for name, value in (("low", low), ("high", high)):
            tensor = torch.tensor(float(value))
            if learned:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor)
        self.register_buffer("first", torch.tensor([float(low), float(high)]))

    @torch.no_grad()
    def start_at(self, low: float, high: float) -> None:
        """Set the ends, and the range that levels are told in."""
        self.low.fill_(low)
        self.high.fill_(high)
        self.first.copy_(torch.tensor([low, high]))

    def gamma(self, v: Tensor) -> Tensor:
        """γ at places v between the ends."""
        return self.low + (self.high - self.low) * v

    def level(self, gamma: Tensor) -> Tensor:
        """γ in units of the first range: 0 at the first γ_0, 1 at the first γ_1."""
        low, high = self.first.to(gamma).unbind()
        return (gamma - low) / (high - low)


class Levels(Protocol):
    """A density of places v in [0, 1] between the ends."""

    def quantile(self, u: Tensor) -> Tensor:
        """v with a share u of the mass below it: shape of ``u``."""
        ...

    def density(self, v: Tensor) -> Tensor:
        """p(v): shape of ``v``; it integrates to 1."""
        ...


class Linear(nn.Module):
    """γ linear in time: p(v) = 1 (Kingma et al. 2021; the released CIFAR-10 models).

    >>> Linear().quantile(torch.tensor([0.25])).tolist()
    [0.25]
    """

    def quantile(self, u: Tensor) -> Tensor:
        """v = u."""
        return u

    def density(self, v: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(v)


class Cosine(nn.Module):
    """The cosine schedule −γ = −2 log tan(πt/2) + ``shift``, cut off at the ends; p(γ) ∝ sech((γ + shift)/2).

    Nichol & Dhariwal 2021 (arXiv 2102.09672, eq. 17, without its offset); the shift, 2 log(64/d) for images of d × d,
    is that of Hoogeboom, Heek & Salimans 2023 (arXiv 2301.11093, section 3.1).

    Args:
        low, high: γ_0 and γ_1.
        shift: added to log SNR.
    """

    def __init__(self, low: float, high: float, shift: float = 0.0) -> None:
        super().__init__()
        self.low, self.high, self.shift = low, high, shift
        self.start, self.stop = (2.0 / math.pi * math.atan(math.exp(0.5 * (end + shift))) for end in (low, high))

    def quantile(self, u: Tensor) -> Tensor:
        """v at t = start + (stop − start) u."""
        t = self.start + (self.stop - self.start) * u
        gamma = 2.0 * torch.log(torch.tan(0.5 * math.pi * t)) - self.shift
        return ((gamma - self.low) / (self.high - self.low)).clamp(0.0, 1.0)

    def density(self, v: Tensor) -> Tensor:
        """dt/dγ = sech((γ + shift)/2) / 2π, normalised."""
        gamma = self.low + (self.high - self.low) * v + self.shift
        return (self.high - self.low) / (self.stop - self.start) / (TAU * torch.cosh(0.5 * gamma))


class LogNormal(nn.Module):
    """log(σ/α) ~ N(``mean``, ``std``²), cut off at the ends (Karras et al. 2022, arXiv 2206.00364, table 1).

    A density for training: it leaves so little mass near the ends that the bound would be a noisy sum there.

    Args:
        low, high: γ_0 and γ_1.
        mean, std: of log(σ/α) = γ/2.
    """

    def __init__(self, low: float, high: float, mean: float = -1.2, std: float = 1.2) -> None:
        super().__init__()
        if std <= 0:
            raise ValueError(f"std: expected a positive number, got {std}")
        self.low, self.high, self.mean, self.std = low, high, 2.0 * mean, 2.0 * std
        self.below, self.above = (0.5 * math.erfc(-(g - self.mean) / self.std / math.sqrt(2.0)) for g in (low, high))

    def quantile(self, u: Tensor) -> Tensor:
        """v from the normal quantile, in float64."""
        p = self.below + (self.above - self.below) * u.double()
        gamma = self.mean + self.std * torch.special.ndtri(p)
        return ((gamma - self.low) / (self.high - self.low)).clamp(0.0, 1.0).to(u.dtype)

    def density(self, v: Tensor) -> Tensor:
        """The normal density of γ over the mass between the ends, times γ_1 − γ_0."""
        z = (self.low + (self.high - self.low) * v - self.mean) / self.std
        scale = (self.high - self.low) / self.std / (self.above - self.below) / math.sqrt(TAU)
        return scale * torch.exp(-0.5 * z.square())


class Adaptive(nn.Module):
    """Importance density from what was seen: p(v) ∝ root mean square of the loss's integrand, in ``bins`` steps.

    That p has the least variance.  Kingma & Gao 2023 (arXiv 2303.00848) keep a running mean in 100 bins in
    the same way; the square is what the variance asks for.  A uniform share ``floor`` bounds the weights 1/p.  The
    record is a buffer, so that a run resumes to the bit; with several processes it is the first one's.

    Args:
        bins: steps of the density.
        memory: share of the record that an update keeps.
        floor: share of uniform density.
    """

    squares: Tensor
    seen: Tensor

    def __init__(self, bins: int = 64, memory: float = 0.995, floor: float = 0.2) -> None:
        super().__init__()
        if bins < 1 or not 0 <= memory < 1 or not 0 < floor <= 1:
            raise ValueError(
                f"bins, memory, floor: expected bins >= 1, 0 <= memory < 1 and 0 < floor <= 1, "
                f"got {bins}, {memory}, {floor}"
            )
        self.bins, self.memory, self.floor = bins, memory, floor
        self.register_buffer("squares", torch.zeros(bins))
        self.register_buffer("seen", torch.zeros(bins))

    def _mass(self) -> Tensor:
        """Mass of each bin."""
        total = self.seen.sum()
        mean = self.squares.sum() / total.clamp(min=1e-12)
        # A bin that was never seen counts one observation of the overall mean.
        rms = torch.sqrt((self.squares + mean) / (self.seen + 1.0))
        known = (total > 0) & (mean > 0)
        share = torch.where(known, rms / rms.sum().clamp(min=1e-30), torch.full_like(rms, 1.0 / self.bins))
        return self.floor / self.bins + (1.0 - self.floor) * share

    def quantile(self, u: Tensor) -> Tensor:
        """v by linear interpolation of the cumulative mass."""
        mass = self._mass().to(u)
        ends = mass.cumsum(0)
        ends = ends / ends[-1]
        index = torch.searchsorted(ends, u.contiguous()).clamp(max=self.bins - 1)
        starts = F.pad(ends, (1, 0))[:-1]
        inside = ((u - starts[index]) / (ends - starts)[index]).clamp(0.0, 1.0)
        return (index + inside) / self.bins

    def density(self, v: Tensor) -> Tensor:
        """Mass of the bin of v times the number of bins."""
        index = (v * self.bins).long().clamp(0, self.bins - 1)
        return self._mass().to(v)[index] * self.bins

    @torch.no_grad()
    def observe(self, v: Tensor, integrand: Tensor) -> None:
        """Take note of integrands (w |ε − ε̂|², any unit) at places v: shapes ``(n,)``."""
        index = (v.flatten() * self.bins).long().clamp(0, self.bins - 1)
        values = integrand.flatten().to(self.squares).square()
        self.squares.mul_(self.memory).index_add_(0, index, values)
        self.seen.mul_(self.memory).index_add_(0, index, torch.ones_like(values))


class Learned(nn.Module):
    """A monotone network with one hidden layer for the time t = F(v) of a level, trained for the least variance.

    F is a share of v plus rising sigmoids, F(v) = c_0 v + Σ_k c_k (s_k(v) − s_k(0)) / (s_k(1) − s_k(0)) with
    s_k(v) = sigmoid((v − m_k)/b_k), so that p = F' has a closed form.  The bound does not depend on it; its variance is

        E_{v ~ p}[(h(v)/p(v))²] − const = ∫ h²/p dv − const,   of gradient   E_{v ~ p}[½ h² ∇ p(v)⁻²],

    which :meth:`variance` gives for integrands h held fixed: no derivative of the denoiser with respect to the level is
    needed.  Kingma et al. 2021 learn γ(t) for the same end through such derivatives.

    Args:
        units: K, hidden units.
    """

    def __init__(self, units: int = 16) -> None:
        super().__init__()
        if units < 1:
            raise ValueError(f"units: expected at least 1, got {units}")
        self.shares = nn.Parameter(torch.zeros(units + 1))
        self.places = nn.Parameter((torch.arange(units) + 0.5) / units)
        self.log_widths = nn.Parameter(torch.full((units,), -math.log(units)))

    def _pieces(self, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shares c, and s and s' of every unit at v: shapes ``(K + 1,)`` and ``(*v.shape, K)`` normalised."""
        shares, width = self.shares.softmax(0).to(v), self.log_widths.exp().to(v)
        places = self.places.to(v)
        start, stop = torch.sigmoid(-places / width), torch.sigmoid((1.0 - places) / width)
        s = torch.sigmoid((v.unsqueeze(-1) - places) / width)
        span = stop - start
        return shares, (s - start) / span, s * (1.0 - s) / width / span

    def _cumulative(self, v: Tensor) -> Tensor:
        shares, s, _ = self._pieces(v)
        return shares[0] * v + (shares[1:] * s).sum(-1)

    def density(self, v: Tensor) -> Tensor:
        """F'(v)."""
        shares, _, slopes = self._pieces(v)
        return shares[0] + (shares[1:] * slopes).sum(-1)

    @torch.no_grad()
    def quantile(self, u: Tensor) -> Tensor:
        """F⁻¹(u) by bisection."""
        low, high = torch.zeros_like(u), torch.ones_like(u)
        for _ in range(40):
            middle = 0.5 * (low + high)
            below = self._cumulative(middle) < u
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return 0.5 * (low + high)

    def variance(self, v: Tensor, integrand: Tensor) -> Tensor:
        """A scalar whose gradient is that of the relative variance; ``integrand`` (h) is held fixed."""
        v, h = v.detach(), integrand.detach().to(v)
        terms = h.square() / self.density(v).square()
        return 0.5 * terms.mean() / terms.mean().detach().clamp(min=1e-30)


_LEVELS: dict[str, Callable[..., nn.Module]] = {
    "linear": Linear,
    "cosine": Cosine,
    "lognormal": LogNormal,
    "adaptive": Adaptive,
    "learned": Learned,
}
LEVELS = tuple(_LEVELS)


def make_levels(name: str, low: float, high: float, **options: Any) -> nn.Module:
    """A density of levels by name: ``linear``, ``cosine``, ``lognormal``, ``adaptive`` or ``learned``.

    >>> make_levels("cosine", -10.0, 6.0, shift=1.0).shift
    1.0
    """
    if name not in _LEVELS:
        raise ValueError(f"levels: expected one of {', '.join(LEVELS)}, got {name!r}")
    check_options(_LEVELS[name], options)
    ends = {"low": low, "high": high} if name in ("cosine", "lognormal") else {}
    return _LEVELS[name](**ends, **options)


# Drawing -----------------------------------------------------------------------------------------------------


def spread_over_batch(noise: Noise, n: int) -> Tensor:
    """A uniform variate for each of ``n`` examples, evenly spread over the whole batch where the noise can do that.

    u_i = (U + i/B) mod 1 with one U for the batch of B (Kingma et al. 2021), also where several processes
    hold its parts; noise that belongs to the example (:class:`likely.noise.KeyedNoise`) knows no batch, and gives
    independent variates.
    """
    stratified = getattr(noise, "stratified", None)
    return noise.uniform((n,)) if stratified is None else stratified((n,))


def spread_within(noise: Noise, n: int, count: int) -> Tensor:
    """``count`` uniform variates for each example, one in each of as many equal parts of (0, 1): ``(n, count)``.

    They are one random grid per example, u_k = (U + k)/count, so that an example's value is its own.
    """
    places = torch.arange(count)
    u = noise.uniform((n, 1))
    return (u + places.to(u)) / count


@dataclass(frozen=True)
class Drawn:
    """Levels, and weights with which the mean of ½ weight · |ε − ε̂|² is the diffusion term; shapes ``(n, count)``."""

    v: Tensor
    gamma: Tensor
    weight: Tensor


def draw(levels: Levels, ends: Ends, u: Tensor, steps: int | None = None) -> Drawn:
    """Levels at uniform variates ``u``: continuous, or among the T ``steps`` of a chain.

    Continuous time: weight = (γ_1 − γ_0)/p(v).  In T steps (Kingma et al. 2021) the noisier level of step
    i is t = i/T, i = 1 … T, the other s = t − 1/T, and weight = T (exp(γ_t − γ_s) − 1).
    """
    if steps is None:
        v = levels.quantile(u)
        # The mean does not depend on p, whose gradient through the weight alone would be wrong.
        return Drawn(v, ends.gamma(v), (ends.high - ends.low) / levels.density(v).detach())
    i = (u * steps).floor().clamp(max=steps - 1) + 1.0
    v_t, v_s = levels.quantile(i / steps), levels.quantile((i - 1.0) / steps)
    return Drawn(v_t, ends.gamma(v_t), steps * torch.expm1((ends.high - ends.low) * (v_t - v_s)))


def grid(levels: Levels, ends: Ends, steps: int) -> Tensor:
    """The ``steps`` + 1 levels of a chain, γ_1 first: shape ``(steps + 1,)``."""
    u = torch.arange(steps, -1, -1, device=ends.high.device, dtype=ends.high.dtype) / steps
    return ends.gamma(levels.quantile(u)).detach()


def karras_grid(low: float, high: float, steps: int, rho: float = 7.0) -> Tensor:
    """The ``steps`` + 1 levels whose (σ/α)^(1/ρ) are equally spaced, γ_1 first (Karras et al. 2022, eq. 5).

    >>> karras_grid(-12.4, 8.8, 4).tolist()
    [8.8..., ..., -12.4...]
    """
    s = torch.linspace(math.exp(0.5 * high / rho), math.exp(0.5 * low / rho), steps + 1, dtype=torch.float64)
    return 2.0 * rho * s.log()
