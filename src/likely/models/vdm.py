"""Variational diffusion model (Kingma et al. 2021, arXiv 2107.00630), of any data that can be written as real numbers.

    q(z_γ | x) = N(α f(x), σ²),   α² = sigmoid(−γ),  σ² = sigmoid(γ),   γ from γ_0 (little noise) to γ_1 (little data)
    p(z_1) = N(0, I),   p(z_s | z_t) = q(z_s | z_t, x = x̂(z_t; γ_t)),   p(x | z_0) cell by cell

    log p(x) ≥ E log p(x | z_0)  −  KL(q(z_1 | x) ‖ p(z_1))  −  L_diff                          (eq. 11)

    T steps:           L_diff = ½ T E_{i ~ U{1…T}} [(exp(γ_t − γ_s) − 1) |ε − ε̂(z_t; γ_t)|²],  t = i/T, s = t − 1/T
    continuous time:   L_diff = ½ ∫_{γ_0}^{γ_1} E |ε − ε̂(z_γ; γ)|² dγ,   the limit T → ∞

Symbols: x example, f(x) its real numbers, z noisy example, ε its noise, γ = −log SNR, c condition, x̂ and ε̂ what the
network makes of z.  The two bounds speak of two models, the chain of T steps and its limit; ``timesteps`` says which.

The bound is never weighted, clipped or dropped out of; the loss may be (``weighting``, ``levels``,
``condition_dropout``).  A missing cell takes no part: the network is told which cells there are, and the bound is one
on the log-probability of the observed cells, given which they are.  For each pattern of holes that is a law of its
own, learned with all the others.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from likely.contract import (
    Batches,
    Binary,
    Bound,
    Integers,
    Loss,
    Model,
    NoCodec,
    Reals,
    Space,
    Table,
    Tokens,
    Unsupported,
    noise_or_global,
)
from likely.diffusion.bound import (
    Denoise,
    Denoiser,
    diffusion_nats,
    prior_nats,
    squared_errors,
    weighted_error,
)
from likely.diffusion.data import LevelData, RealData, SymbolData, TableData, make_data
from likely.diffusion.distillation import distillation_error
from likely.diffusion.levels import Adaptive, Ends, Learned, Levels, Linear, draw, grid, make_levels, spread_over_batch
from likely.diffusion.likelihood import EXACT_CELLS, flow, log_density
from likely.diffusion.parameterisation import F, OnLevels, Pair, Parameterisation, make_parameterisation
from likely.diffusion.samplers import clipped, find_sampler, guided
from likely.diffusion.weighting import make_weighting
from likely.networks import Features
from likely.networks.denoisers import denoiser
from likely.noise import Noise

#: Up to so many levels the network's output tilts a distribution over them.
FEW_LEVELS = 32


class VDM(Model):
    """Variational diffusion model: a lower bound in continuous time or in T steps, and samples in any number of steps.

    Args:
        space: space of the examples.
        condition: space of what the model is conditioned on, or None.
        network: ``mlp`` for any shape, ``unet`` or ``dit`` for images (C, H, W); ``auto``: ``unet`` for images of at
            least 8 × 8, else ``mlp``.
        network_options: options of the network, such as ``{"width": 256}``; see :mod:`likely.networks.denoisers`.  For
            2ᵇ levels, b ≥ 5, ``fourier`` is (b − 2, b − 1) unless it is given.
        parameterisation: what the network's output means: ``levels`` (a tilt of each cell's distribution, for up to
            some hundred levels), ``f`` (EDM's), ``v``, ``eps`` (VDM's), ``x`` or ``score``; ``auto``: ``levels`` for up
            to 32 levels, else ``f``.
        timesteps: T, number of steps of the chain that the bound speaks of; None for continuous time.
        gamma_min, gamma_max: γ_0 and γ_1.  By default γ_0 suits the spacing of the data (−13.3 for 256 levels).
        learn_ends: whether γ_0 and γ_1 are trained, on the bound.
        levels: density of the levels in training, and grid of the steps: ``linear``, ``cosine``, ``lognormal``,
            ``adaptive`` or ``learned``; see :mod:`likely.diffusion.levels`.  ``auto``: ``linear`` for a chain of T
            steps, else ``adaptive``, which the bound then draws its levels from too.
        levels_options: its options, such as ``{"shift": 1.0}``.
        weighting: of the loss, never of the bound: ``elbo``, ``sigmoid``, ``edm``, ``edm_monotone``, ``min_snr``,
            ``simple`` or ``velocity``; see :mod:`likely.diffusion.weighting`.
        weighting_options: its options, such as ``{"bias": 2.0}``.
        bound_levels: levels at which the bound of an example is evaluated, stratified; more make it less noisy.
        embedding_dim: largest number of coordinates of a symbol or category.
        condition_dropout: share of the training examples whose condition is hidden from the loss, so that the model is
            one without a condition too, as classifier-free guidance wants it: ``bound(x)`` is then the unconditional
            one.
        sampler: ``ancestral``, ``ddim``, ``heun``, ``dpm`` or ``sde``.
        sample_steps: steps of the sampler; by default T, or 128 in continuous time.
        guidance: w of classifier-free guidance in sampling; 1 is the model itself, more has no likelihood.

    Raises:
        Unsupported: options that exclude each other, or do not suit the space.

    >>> model = VDM(Integers((1, 4, 4), 16), network="mlp", network_options={"width": 16, "depth": 1})
    >>> bound = model.bound(torch.zeros(2, 1, 4, 4))
    >>> bound.kind, list(bound.parts)
    ('lower bound', ['reconstruction', 'prior', 'diffusion'])
    """

    spaces = (Binary, Integers, Reals, Tokens, Table)
    conditional = True

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        *,
        network: str = "auto",
        network_options: Mapping[str, Any] | None = None,
        parameterisation: str = "auto",
        timesteps: int | None = None,
        gamma_min: float | None = None,
        gamma_max: float = 5.0,
        learn_ends: bool = False,
        levels: str = "auto",
        levels_options: Mapping[str, Any] | None = None,
        weighting: str = "elbo",
        weighting_options: Mapping[str, Any] | None = None,
        bound_levels: int = 8,
        embedding_dim: int = 8,
        condition_dropout: float = 0.0,
        sampler: str = "ancestral",
        sample_steps: int | None = None,
        guidance: float = 1.0,
    ) -> None:
        super().__init__(space, condition)
        for name, value in (("timesteps", timesteps), ("bound_levels", bound_levels), ("embedding_dim", embedding_dim),
                            ("sample_steps", sample_steps)):  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not 0.0 <= condition_dropout < 1.0:
            raise ValueError(f"condition_dropout: expected a share from 0 to below 1, got {condition_dropout}")
        if condition is None and condition_dropout:
            raise Unsupported("condition_dropout: this model has no condition to hide")
        if guidance != 1.0 and not condition_dropout:
            raise Unsupported("guidance: needs a model trained without its condition too: condition_dropout above 0")
        if weighting != "elbo" and (learn_ends or timesteps is not None):
            raise Unsupported("weighting: learned ends and a chain of T steps are trained on the bound; use 'elbo'")
        if isinstance(space, Table) and gamma_min is None and levels in ("cosine", "lognormal"):
            raise Unsupported(
                f"levels: {levels!r} needs a fixed γ_0, which a table takes from its data; give gamma_min"
            )
        find_sampler(sampler)
        if levels == "auto":
            levels = "adaptive" if timesteps is None else "linear"
        self.timesteps, self.bound_levels, self.condition_dropout = timesteps, bound_levels, condition_dropout
        self.sampler, self.sample_steps, self.guidance = sampler, sample_steps or timesteps or 128, guidance

        self.data = make_data(space, embedding_dim)
        self._gamma_of_data = gamma_min is None
        low = self.data.gamma if gamma_min is None else gamma_min
        ends = Ends(low, gamma_max, learn_ends)
        if isinstance(self.data, LevelData) and not learn_ends:
            self.data.settle(low)
        self.levels = make_levels(levels, low, gamma_max, **dict(levels_options or {}))
        self.weighting = make_weighting(weighting, **dict(weighting_options or {}))
        #: Whether the loss, in expectation, is −bound.
        self.unweighted = weighting == "elbo"

        self.condition_features = Features(condition) if condition is not None else None
        self._may_miss = space.missing or isinstance(space, Table)
        width = self._told(torch.ones(1, *space.shape)).shape[1]
        if self.condition_features is not None:
            width += math.prod(self.condition_features.shape) + (condition_dropout > 0)
        image = len(self.data.shape) == 3 and min(self.data.shape[1:]) >= 8
        name = ("unet" if image else "mlp") if network == "auto" else network
        self._teacher: list[VDM | None] = [None]  # in a list, so that it is no part of this module
        built = denoiser(name, self.data.shape, width, **{**_fine(self.data), **dict(network_options or {})})
        self.denoise = Denoiser(built, self._make_parameterisation(parameterisation), ends)

    def _make_parameterisation(self, name: str) -> Parameterisation:
        """By name; ``levels`` and what ``auto`` stands for depend on the data."""
        few = isinstance(self.data, LevelData) and self.data.levels <= FEW_LEVELS
        if name == "auto":
            name = "levels" if few else "f"
        if name != "levels":
            return make_parameterisation(name)
        if not isinstance(self.data, LevelData):
            raise Unsupported(f"parameterisation: 'levels' is for Binary and Integers, got {type(self.space).__name__}")
        return OnLevels(self.data.embed(torch.arange(self.data.levels)), self.data.shape)

    # The bound -----------------------------------------------------------------------------------------------

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """A lower bound on log p(x | c) in nats, of the chain in ``timesteps`` or of its limit.

        Without a condition, where ``condition_dropout`` trained the model for that: on log p(x).
        """
        parts = self._cell_parts(x, condition, noise_or_global(noise, x))
        return Bound("lower bound", {name: cells.flatten(1).sum(1) for name, cells in parts.items()})

    def _cell_parts(self, x: Tensor, condition: Tensor | None, noise: Noise) -> dict[str, Tensor]:
        """The parts of the bound, cell by cell, in nats: shapes ``(batch, *space.shape)``."""
        seen = self._see(x, self._context(len(x), condition))
        # 1. reconstruction: E log p(x | z_0)
        reconstruction = self._reconstruction(seen, noise)
        # 2. prior: −KL(q(z_1 | x) || p(z_1))
        prior = self._prior(seen)
        # 3. diffusion: −L_diff
        diffusion = self.data.to_cells(
            diffusion_nats(
                self.denoise,
                seen.f,
                self._bound_density,
                self.ends,
                noise,
                self.bound_levels,
                self.timesteps,
                seen.context,
                seen.coordinates,
            )
        )
        return {"reconstruction": reconstruction, "prior": prior, "diffusion": diffusion}

    def _reconstruction(self, seen: _Seen, noise: Noise) -> Tensor:
        """log p(x | z_0) of every cell, nats, for a z_0 ~ q(z_0 | x) of its own."""
        gamma_0 = self.ends.low
        y = seen.f + torch.exp(0.5 * gamma_0) * noise.normal(seen.f.shape).to(seen.f)  # z_0 / α_0
        nats = self.data.log_likelihood(seen.x, y, gamma_0)
        return nats if seen.cells is None else torch.where(seen.cells, nats, 0.0)

    def _prior(self, seen: _Seen) -> Tensor:
        """−KL(q(z_1 | x) || N(0, I)) of every cell, nats."""
        nats = prior_nats(seen.f, self.ends.high)
        return self.data.to_cells(nats if seen.coordinates is None else seen.coordinates * nats)

    @property
    def _bound_density(self) -> Levels:
        """Where the bound draws its levels: the schedule of a chain; else what was learned to that end, or evenly."""
        learned = self.unweighted and isinstance(self.levels, Adaptive | Learned)
        return cast(Levels, self.levels) if learned or self.timesteps is not None else Linear()

    # The loss ------------------------------------------------------------------------------------------------

    def loss(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None, step: int = 0) -> Loss:
        """−bound per dimension, one level an example, spread over the batch; with a ``weighting`` the weighted sum."""
        noise = noise_or_global(noise, x)
        if self.teacher is not None:
            return self._distillation_loss(x, condition, noise)
        kept = None
        if self.condition_dropout:
            kept = (noise.uniform((len(x), 1)) >= self.condition_dropout).to(x.device)
        seen = self._see(x, self._context(len(x), condition, kept))
        reconstruction = self._reconstruction(seen, noise).flatten(1).sum(1)
        prior = self._prior(seen).flatten(1).sum(1)

        u = spread_over_batch(noise, len(x)).unsqueeze(1).to(seen.f)
        drawn = draw(cast(Levels, self.levels), self.ends, u, self.timesteps)
        eps = noise.normal((len(x), 1, *self.data.shape)).to(seen.f)
        errors = squared_errors(self.denoise, seen.f, drawn.gamma, eps, seen.context, seen.coordinates)
        w = self.weighting(-drawn.gamma)
        diffusion = (w * weighted_error(drawn, errors)).squeeze(1)

        value = (diffusion - reconstruction - prior).mean() / self.space.dims
        integrand = (w * errors.flatten(2).sum(2)).detach()
        if isinstance(self.levels, Adaptive) and self.training:
            self.levels.observe(drawn.v, integrand)
        if isinstance(self.levels, Learned):
            variance = self.levels.variance(drawn.v, integrand)
            value = value + (variance - variance.detach())  # its gradient alone
        log = {
            "reconstruction": reconstruction.mean().detach(),
            "prior": prior.mean().detach(),
            "diffusion" if self.unweighted else "weighted diffusion": -diffusion.mean().detach(),
        }
        return Loss(value, log)

    def student(self, steps: int | None = None) -> VDM:
        """A copy that is a chain of half as many steps, to be trained on what two steps of this model do to the data.

        Its ``loss`` is that of progressive distillation (:mod:`likely.diffusion.distillation`) for as long as it has a
        ``teacher``, which is no part of its state; its bound is that of its own chain, its sampler DDIM.  Training it
        does not initialise it again.

        Args:
            steps: T of the student; by default half of this model's steps (of its sampler's, in continuous time).
        """
        steps = (self.timesteps or self.sample_steps) // 2 if steps is None else steps
        options = {"timesteps": steps, "sampler": "ddim", "sample_steps": None, "weighting": "elbo"}
        student = VDM(self.space, self.condition, **{**self.config, **options, "weighting_options": None})
        student.to(self.ends.high)
        state = self.state_dict()
        if type(student.levels) is not type(self.levels):  # ``auto``, which a chain understands in its own way
            state = {name: value for name, value in state.items() if not name.startswith("levels.")}
        student.load_state_dict(state)
        teacher = copy.deepcopy(self).eval().requires_grad_(False)
        teacher.teacher = None
        student._teacher = [teacher]
        return student

    @property
    def teacher(self) -> VDM | None:
        """The model that this one is distilled from, or None."""
        return self._teacher[0]

    @teacher.setter
    def teacher(self, teacher: VDM | None) -> None:
        self._teacher = [teacher]

    def _distillation_loss(self, x: Tensor, condition: Tensor | None, noise: Noise) -> Loss:
        """w |x* − x̂|² per dimension, which is not nats."""
        assert self.teacher is not None and self.timesteps is not None
        teacher = self.teacher.to(self.ends.high)
        seen = teacher._see(x, teacher._context(len(x), condition))
        levels = grid(cast(Levels, self.levels), teacher.ends, 2 * self.timesteps)
        error = distillation_error(self.denoise, teacher.denoise, seen.f, levels, noise, seen.context, seen.coordinates)
        return Loss(error.mean() / self.space.dims, {"distillation": error.mean().detach()})

    # What a user asks of it ----------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        n: int,
        condition: Tensor | None = None,
        noise: Noise | None = None,
        *,
        sampler: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        clip: tuple[float, float] | None = None,
    ) -> Tensor:
        """z_1 ~ N(0, I), then down the levels, then x ~ p(x | z_0).

        The ancestral sampler in ``steps`` steps of a model of so many draws from the very law that its bound speaks of.

        Args:
            sampler, steps, guidance: by default those that the model was built with.
            clip: ends between which x̂ is held, in units of f; its samples are no longer the model's.
        """
        noise = noise_or_global(noise, self)
        guidance = self.guidance if guidance is None else guidance
        context = self._with_holes(n, self._context(n, condition), None)
        denoise: Denoise = self.denoise
        if clip is not None:
            denoise = clipped(denoise, *clip)
        if guidance != 1.0:
            if not self.condition_dropout:
                raise Unsupported("guidance: needs a model trained with condition_dropout above 0")
            without = self._with_holes(n, self._context(n, None), None)
            assert without is not None
            denoise = guided(denoise, without, guidance)
        z = noise.normal((n, *self.data.shape)).to(self.ends.high)
        # What has the least variance in the bound is no grid for a sampler.
        even = self.timesteps is None and isinstance(self.levels, Adaptive | Learned)
        levels = grid(Linear() if even else cast(Levels, self.levels), self.ends, steps or self.sample_steps)
        z = find_sampler(sampler or self.sampler)(denoise, z, levels, noise, context)
        return self.data.draw(z / self._alpha_0, self.ends.low, noise)

    @torch.no_grad()
    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """z_1 of the probability flow that starts at α_0 f(x): shape ``(batch, coordinates)``, deterministic."""
        seen = self._see(x, self._context(len(x), condition))
        return flow(self._flowing(seen), self._alpha_0 * seen.f, self._flow_grid(), seen.context).flatten(1)

    @torch.no_grad()
    def decode(self, z: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """A draw of p(x | z_0) where z_0 is what the flow makes of z_1, or with ``noise=None`` its best guess."""
        context = self._with_holes(len(z), self._context(len(z), condition), None)
        z_1 = z.unflatten(1, self.data.shape).to(self.ends.high)
        z_0 = flow(self.denoise, z_1, self._flow_grid().flip(0), context)
        return self.data.draw(z_0 / self._alpha_0, self.ends.low, noise)

    def ode_log_likelihood(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        noise: Noise | None = None,
        *,
        steps: int = 64,
        probes: int | None = None,
    ) -> Bound:
        """log-likelihood of *another* model, the probability flow with the same network: part ``flow``, an estimate.

        Levels are dequantised uniformly, so that theirs is in expectation a lower bound.  The integral's error falls
        with the fourth power of ``steps``.

        Args:
            steps: of the Runge-Kutta rule, four evaluations each.
            probes: random directions for the divergence of each example; 0 computes it exactly, which is the default
                for up to 64 cells, above which it is one direction.

        Raises:
            Unsupported: the data have no flow of one density (tables, symbols), or cells are missing.
        """
        if not isinstance(self.space, Binary | Integers | Reals):
            raise Unsupported(f"ode_log_likelihood: for Binary, Integers and Reals, got {type(self.space).__name__}")
        if x.is_floating_point() and bool(torch.isnan(x).any()):
            raise Unsupported("ode_log_likelihood: for examples without missing cells")
        noise = noise_or_global(noise, x)
        seen = self._see(x, self._context(len(x), condition))
        y = seen.f
        if isinstance(self.data, LevelData):
            width = 2.0 / self.data.levels
            y = y + width * (noise.uniform(y.shape).to(y) - 0.5)
            log_unit = self.space.dims * math.log(width)
        else:
            assert isinstance(self.data, RealData)
            log_unit = -float(self.data.features.scale.log().sum())
        cells = self.space.dims
        probes = (0 if cells <= EXACT_CELLS else 1) if probes is None else probes
        levels = torch.linspace(float(self.ends.low), float(self.ends.high), steps + 1)
        nats = log_density(
            self.denoise, self._alpha_0 * y, levels, seen.context, noise if probes else None, max(probes, 1)
        )
        return Bound("estimate", {"flow": nats + cells * self._alpha_0.log() + log_unit})

    def column_nats(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Each cell's share of the bound, nats, ``(batch, *space.shape)``; they sum to it, and a missing cell has 0."""
        parts = self._cell_parts(x, condition, noise_or_global(noise, x))
        return sum(parts.values(), torch.zeros((), dtype=self.ends.high.dtype, device=x.device))

    def codec(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> Any:
        """None: raises ``NoCodec`` with the reason."""
        raise NoCodec(
            "model 'vdm' has no codec: bits-back through its chain would need hundreds of evaluations of the network "
            "in reproducible arithmetic for each example"
        )

    @property
    def latent_dim(self) -> int:
        """Number of coordinates of z."""
        return math.prod(self.data.shape)

    def initialise(self, batches: Batches) -> None:
        """Scales, shares of categories, γ_0 of a table, and the root mean square of f, from passes over the data."""
        if self.teacher is not None:
            return
        self.data.initialise(batches)
        if self.condition_features is not None:
            self.condition_features.initialise(batches, of_condition=True)
        if self._gamma_of_data and isinstance(self.data, TableData):
            self.ends.start_at(self.data.gamma, float(self.ends.first[1]))
        if isinstance(self.denoise.parameterisation, OnLevels):
            self.denoise.parameterisation.fit(self._counts(batches))
        if isinstance(self.denoise.parameterisation, F):
            self.denoise.parameterisation.data_scale.fill_(self._root_mean_square(batches))

    def _counts(self, batches: Batches) -> Tensor:
        """How often each cell has each level: shape ``(*space.shape, L)``, float64."""
        assert isinstance(self.data, LevelData)
        levels = torch.arange(self.data.levels)
        counts = torch.zeros(*self.space.shape, len(levels), dtype=torch.float64)
        for x, _ in batches:
            counts += (x.cpu().unsqueeze(-1) == levels).double().sum(0)
        return counts

    @torch.no_grad()
    def _root_mean_square(self, batches: Batches) -> float:
        total = count = 0.0
        for x, _ in batches:
            seen = self._see(x, None)
            total += float(seen.f.double().square().sum())
            count += float(seen.f.numel() if seen.coordinates is None else seen.coordinates.sum())
        return math.sqrt(total / count) if total > 0 else 1.0

    @classmethod
    def tiny(cls, space: Space, condition: Space | None = None) -> VDM:
        """A chain of three steps, all of them evaluated, with ends so noisy that every part of the bound matters.

        A condition of real numbers is the same to the network whatever the space: only two kinds of space try one.
        """
        if isinstance(condition, Reals) and not isinstance(space, Binary | Reals):
            raise Unsupported("tiny: a condition of Reals is tried with Binary and Reals")
        return cls(
            space,
            condition,
            network="mlp",
            network_options={"width": 8, "depth": 1, "waves": 4},
            timesteps=3,
            gamma_min=-2.0,
            gamma_max=1.5,
            bound_levels=3,
            embedding_dim=2,
        )

    # Parts ---------------------------------------------------------------------------------------------------

    @property
    def ends(self) -> Ends:
        """γ_0 and γ_1."""
        return self.denoise.ends

    @property
    def _alpha_0(self) -> Tensor:
        return torch.sigmoid(-self.ends.low).sqrt()

    def _flow_grid(self) -> Tensor:
        """Rising levels for the flow, with as many evaluations as the sampler has steps."""
        low, high = float(self.ends.low), float(self.ends.high)
        return torch.linspace(low, high, max(1, self.sample_steps // 4) + 1)

    def _flowing(self, seen: _Seen) -> Denoise:
        """The denoiser, for which a missing cell stays at 0."""
        if seen.coordinates is None:
            return self.denoise
        there = seen.coordinates
        return lambda z, gamma, context=None: Pair(*(there * part for part in self.denoise(z, gamma, context)))

    def _see(self, x: Tensor, context: Tensor | None) -> _Seen:
        """An example as the chain sees it; a missing cell is 0 there."""
        dtype = self.ends.high.dtype
        if not self._may_miss:
            return _Seen(x, self.data.embed(x).to(dtype), None, None, context)
        cells = ~torch.isnan(x)
        x = torch.where(cells, x, 0.0)
        coordinates = self.data.to_coordinates(cells).to(dtype)
        f = coordinates * self.data.embed(x).to(dtype)
        return _Seen(x, f, cells, coordinates, self._with_holes(len(x), context, cells))

    def _context(self, n: int, condition: Tensor | None, kept: Tensor | None = None) -> Tensor | None:
        """Features of the condition and, with ``condition_dropout``, whether it is known: ``(n, width)`` or None."""
        if self.condition_features is None or (condition is None and not self.condition_dropout):
            self.check_condition(condition)
            return None
        dtype, device = self.ends.high.dtype, self.ends.high.device
        if condition is None:
            return torch.zeros(n, math.prod(self.condition_features.shape) + 1, dtype=dtype, device=device)
        features = self.condition_features(condition, dtype).flatten(1)
        if not self.condition_dropout:
            return features
        known = torch.ones(n, 1, dtype=dtype, device=device) if kept is None else kept.to(features)
        return torch.cat([known * features, known], 1)

    def _with_holes(self, n: int, context: Tensor | None, cells: Tensor | None) -> Tensor | None:
        """The context, followed by which cells there are where that may vary."""
        if cells is None:
            cells = torch.ones(n, *self.space.shape, device=self.ends.high.device)
        told = self._told(cells).to(self.ends.high)
        pieces = [piece for piece in (context, told) if piece is not None and piece.shape[1]]
        return torch.cat(pieces, 1) if pieces else None

    def _told(self, cells: Tensor) -> Tensor:
        """Of 0 or 1 for every cell those that are not always 1: shape ``(batch, width)``."""
        if isinstance(self.space, Table):
            return cells[:, [j for j, column in enumerate(self.space.columns) if column.missing]]
        return cells.flatten(1) if self.space.missing else cells.flatten(1)[:, :0]


def _fine(data: LevelData | RealData | SymbolData | TableData) -> dict[str, Any]:
    """Fourier features that show the last two bits of 2ᵇ levels, and how far off its level a value is."""
    levels = data.levels if isinstance(data, LevelData) else 0
    bits = levels.bit_length() - 1
    return {"fourier": (bits - 2, bits - 1)} if bits >= 5 and levels == 1 << bits else {}


class _Seen(NamedTuple):
    """A batch as the chain sees it."""

    x: Tensor  # without holes
    f: Tensor  # real numbers, 0 where a cell is missing
    cells: Tensor | None  # which cells there are; None: all
    coordinates: Tensor | None  # the same for the coordinates of f, 0 or 1
    context: Tensor | None  # condition and holes, as the network is told them
