"""Masked diffusion (MD4: Shi et al. 2024, arXiv 2406.04329; MDLM: Sahoo et al. 2024, arXiv 2406.07524).

Forward, each cell is masked by itself: at time t with probability u(t) = 1 − α(t), u(0) = 0, u(1) = 1.  Backward, a
network that sees the cells that are not masked gives the law μ of each that is.  In continuous time

    log p(x) ≥ ∫ (u'(t) / u(t)) E_q(z_t | x) [ Σ_{n masked} log μ(x_n | z_t) ] dt                 (MD4, eqs. 4 and 7)

with no other terms: at t = 1 nothing is left of x and at t = 0 all of it.  Substituting u shows that the schedule drops
out, and integrating over u given the number k of masked cells leaves

    log p(x) ≥ E_{k ~ U{1 … D}} E_{M, |M| = k} [ (D / k) Σ_{n ∈ M} log μ(x_n | x without M) ],

which is the bound of an order-agnostic autoregressive model (Uria, Murray & Larochelle 2014, arXiv 1310.1757, eq. 9;
Hoogeboom et al. 2022, arXiv 2110.02037, eq. 4): revealing one cell at a time in a random order σ,

    p(x) = E_σ Π_i p(x_σi | x_σ1 … x_σ(i−1)),  and the bound is E_σ Σ_i log p(x_σi | ·).

So this is what is evaluated, trained, sampled and coded here.  With ``timesteps`` = T there is a chain of T steps,

    log p_T(x) ≥ Σ_{i=1}^T ((u_i − u_{i−1}) / u_i) E_{M ~ u_i} [ Σ_{n ∈ M} log μ(x_n | x without M) ],    u_i = u(i/T),

which reveals several cells at once as if they were independent: T passes of the network and a looser bound.

Symbols: x example, n cell, D cells, z_t x with cells masked, M the masked cells, k their number, u rate of masking,
α(t) = 1 − u(t), σ order, c condition.  The best μ given z_t does not depend on t, so the network is not told (Ou et al.
2024, arXiv 2406.03736).  A missing cell stays masked for ever and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from likely.contract import (
    Batches,
    Binary,
    Bound,
    Integers,
    Model,
    NoCodec,
    Reals,
    Space,
    Tokens,
    Unsupported,
    noise_or_global,
)
from likely.distributions import Distribution
from likely.distributions.cells import Alphabet, best_of_draws
from likely.networks import Features, Linear
from likely.networks.transformer import TransformerLayers
from likely.noise import KeyedNoise, Noise, SharedNoise

if TYPE_CHECKING:
    from likely.coding.sequential import SequentialCodec


class MaskedDiffusion(Model):
    """Discrete diffusion by masking, or order-agnostic autoregression, with a transformer that sees both sides.

    Args:
        space: of the examples.
        condition: space of what the model is conditioned on, or None.
        width: features of a token.
        layers: blocks of attention and a network on each token.
        heads: of each attention; by default one for every 32 features.
        hidden: width of the networks on tokens; by default four times ``width``.
        activation: ``relu``, ``elu``, ``gelu``, ``silu``, ``softplus`` or ``tanh``.
        dropout: share of each branch's units dropped in training.
        likelihood: ``auto`` or a name of :func:`likely.distributions.likelihoods`.
        likelihood_options: options of the likelihood.
        timesteps: T, of the chain that is bounded and sampled; None for continuous time, which reveals cell by cell.
        schedule: of the chain: u(t) = t (``linear``) or sin(πt/2) (``cosine``); continuous time has the same bound
            under all.
        masks: masks that the bound of an example is averaged over, of evenly spread sizes; more make it less noisy.

    >>> model = MaskedDiffusion(Tokens(5, 4), width=16, layers=1)
    >>> model.bound(torch.zeros(2, 5)).kind
    'lower bound'
    """

    spaces = (Binary, Integers, Tokens)
    conditional = True

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        *,
        width: int = 192,
        layers: int = 4,
        heads: int | None = None,
        hidden: int | None = None,
        activation: str = "gelu",
        dropout: float = 0.0,
        likelihood: str = "auto",
        likelihood_options: Mapping[str, Any] | None = None,
        timesteps: int | None = None,
        schedule: Literal["linear", "cosine"] = "linear",
        masks: int = 1,
    ) -> None:
        super().__init__(space, condition)
        for name, number in (("width", width), ("layers", layers), ("hidden", hidden or 1),
                             ("timesteps", timesteps or 1), ("masks", masks)):  # fmt: skip
            if number < 1:
                raise ValueError(f"{name}: expected 1 or more, got {number}")
        if schedule not in ("linear", "cosine"):
            raise ValueError(f"schedule: expected 'linear' or 'cosine', got {schedule!r}")
        self.width, self.timesteps, self.schedule, self.masks = width, timesteps, schedule, masks
        self.cells = Alphabet(space, width, likelihood, likelihood_options, extra=1)
        self.place = nn.Parameter(torch.zeros(space.dims, width))
        self.layers = TransformerLayers(
            space.dims, width, heads or max(1, width // 32), layers, hidden, activation, dropout, causal=False
        )
        self.condition_features = Features(condition) if condition is not None else None
        self.context: Linear | None = None
        if self.condition_features is not None:
            self.context = Linear(math.prod(self.condition_features.shape), width)

    # The denoiser --------------------------------------------------------------------------------------------

    def _hidden(self, x: Tensor, masked: Tensor, context: Tensor | None) -> Tensor:
        """What the network makes of cells ``(n, D)`` of which some are masked: shape ``(n, D, width)``."""
        z = torch.where(masked, self.cells.levels, x).long()
        tokens = self.cells.read(z) + self.place
        return self.layers(tokens if context is None else tokens + context.unsqueeze(1))

    def _log_mu(self, x: Tensor, masked: Tensor, wanted: Tensor, context: Tensor | None) -> Tensor:
        """log μ(x_n | z) in nats of the wanted cells, 0 elsewhere: shape ``(n, D)``."""
        h = self._hidden(x, masked, context)
        out = h.new_zeros(x.shape)
        out[wanted] = self.cells.log_probs(h[wanted], x[wanted])
        return out

    # The bound -----------------------------------------------------------------------------------------------

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """A lower bound on log p(x_observed | c) in nats, without bias from ``masks`` masks."""
        return Bound("lower bound", {"diffusion": self.column_nats(x, condition, noise).flatten(1).sum(1)})

    def column_nats(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """What each cell adds to the bound, nats, shape ``(batch, *shape)``."""
        noise, n, dims = noise_or_global(noise, x), len(x), self.space.dims
        cells = x.flatten(1).repeat_interleave(self.masks, 0)
        missing = torch.isnan(cells) if cells.is_floating_point() else torch.zeros_like(cells, dtype=torch.bool)
        context = self._context(condition)
        context = None if context is None else context.repeat_interleave(self.masks, 0)
        tau = noise.uniform((n, self.masks * dims)).to(x.device).reshape(-1, dims).masked_fill(missing, 2.0)
        spread = torch.arange(self.masks, device=x.device) / self.masks
        time = ((noise.uniform((n, 1)).to(x.device) + spread) % 1.0).reshape(-1, 1)
        chosen, weight = self._chosen(tau, time, (~missing).sum(1, True))
        nats = weight * self._log_mu(cells, chosen | missing, chosen, context)
        return nats.reshape(n, self.masks, dims).mean(1).reshape(x.shape)

    def _chosen(self, tau: Tensor, time: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """The masked cells M, shape ``(n, D)``, and the weight of their log μ, shape ``(n, 1)``.

        Args:
            tau: uniform, shape ``(n, D)``: a cell is masked at rate u where τ < u; 2 where it is missing.
            time: uniform, shape ``(n, 1)``: which k, or which step.
            present: D, shape ``(n, 1)``.
        """
        if self.timesteps is None:
            k = (time * present).long() + 1
            weight = present / k  # 1 / k is what the integral over u leaves, and the chance of k is 1 / D
            return (tau.argsort(1).argsort(1) < k) & (tau < 1.5), weight.to(self.place.dtype)
        step = (time * self.timesteps).long().clamp(max=self.timesteps - 1) + 1
        rates = self._rates(time)
        u, before = rates[step], rates[step - 1]
        weight = self.timesteps * (u - before) / u  # one step stands for all
        return tau < u, weight.to(self.place.dtype)

    def _rates(self, like: Tensor) -> Tensor:
        """u_0 … u_T, shape ``(T + 1,)``."""
        assert self.timesteps is not None
        t = torch.arange(self.timesteps + 1, dtype=torch.float64) / self.timesteps
        rates = t if self.schedule == "linear" else torch.sin(0.5 * math.pi * t)
        return rates.to(like)

    def _reveals(self, tau: Tensor, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """What is masked, and what of it is revealed next, of the cells that are hidden: backwards in time."""
        if self.timesteps is None:
            place = tau.masked_fill(~hidden, 2.0).argsort(1).argsort(1)
            for i in reversed(range(tau.shape[1])):
                yield hidden & (place <= i), hidden & (place == i)
            return
        rates = self._rates(tau)
        for i in range(self.timesteps, 0, -1):
            masked = hidden & (tau < rates[i])
            yield masked, masked & (tau >= rates[i - 1])

    # What a user asks of it ----------------------------------------------------------------------------------

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """All cells masked at first; one after another revealed in a random order, or in T steps."""
        noise = noise_or_global(noise, self)
        nothing = torch.full((n, self.space.dims), torch.nan, dtype=self.place.dtype, device=self.place.device)
        with torch.no_grad():
            return self._completed(nothing, self._context(condition), noise).reshape(n, *self.space.shape)

    def impute(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        noise: Noise | None = None,
        draws: int = 0,
        samples: int = 32,
    ) -> Tensor:
        """Examples completed, whichever cells are missing: these are revealed in a random order given all others.

        Args:
            x: NaN marks the missing cells.
            draws: 0 for the best single values (means of numbers, most frequent symbols, of ``samples`` completions),
                shape of ``x``; m for m draws, shape ``(m, *x.shape)``.
        """
        noise, n, m = noise_or_global(noise, x), len(x), draws or samples
        flat = x.flatten(1)
        with torch.no_grad():
            context = self._context(condition)
            context = None if context is None else context.repeat_interleave(m, 0)
            known = flat.repeat_interleave(m, 0).to(self.place.dtype)
            drawn = self._completed(known, context, SharedNoise(noise, n, m)).reshape(n, m, -1).to(flat.dtype)
        if draws:
            return drawn.movedim(1, 0).reshape(draws, *x.shape)
        best = best_of_draws(self.space, drawn, drawn.new_full((n, m), 1.0 / m))
        return torch.where(torch.isnan(flat), best, flat).reshape(x.shape)

    def _completed(self, x: Tensor, context: Tensor | None, noise: Noise) -> Tensor:
        """Cells ``(n, D)`` with those that are NaN drawn."""
        tau = noise.uniform(x.shape).to(x.device)
        for masked, revealed in self._reveals(tau, torch.isnan(x)):
            if not bool(revealed.any()):
                continue
            h = self._hidden(x, masked, context)
            if self.timesteps is None:  # at most one cell of each example
                place = revealed.to(torch.int8).argmax(1)
                cells = self.cells.law(h[torch.arange(len(x), device=x.device), place], 0).sample(noise)
            else:
                cells = self.cells.law(h, 0).sample(noise).squeeze(-1)
            x = torch.where(revealed, cells.to(x.dtype), x)
        return x

    def codec(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> SequentialCodec:
        """One cell after another, in an order that is random but known: a function of the place in the batch alone.

        It costs, on average over the orders, the bound; every cell takes a pass of the network.

        Raises:
            NoCodec: with ``timesteps``, whose chain is a looser model than the one that can be coded; or with holes.
        """
        if self.timesteps is not None:
            raise NoCodec("a chain of so many steps costs more than revealing one cell at a time; use timesteps=None")
        if self.space.missing:
            raise NoCodec("the order in which cells are revealed is made for examples without missing cells")
        from likely.coding.sequential import SequentialCodec
        from likely.exact import network

        exact = network(self, causal=True)
        model = exact.module
        assert isinstance(model, MaskedDiffusion)

        def law(x: Tensor, order: Tensor, i: int, context: Tensor | None) -> Distribution:
            """The law of the i-th cell in each example's order."""
            place = order.argsort(1)
            h = model._hidden(x, place >= i, context)
            return model.cells.law(h[torch.arange(len(x), device=h.device), order[:, i]], 0)

        def context_of(condition: Tensor | None) -> Tensor | None:
            return exact.run(model._context, condition)

        def walk(n: int, condition: Tensor | None) -> Generator[Distribution, Tensor, None]:
            order, context = torch.from_numpy(orders(n)).to(model.place.device), context_of(condition)
            x = torch.zeros(order.shape, dtype=torch.int64, device=order.device)
            for i in range(x.shape[1]):
                cells = yield exact.run(law, x, order, i, context)
                x.scatter_(1, order[:, i : i + 1], cells.long().unsqueeze(1))

        def backwards(x: Tensor, condition: Tensor | None) -> Iterator[Distribution]:
            order, context = torch.from_numpy(orders(len(x))).to(x.device), context_of(condition)
            x = x.flatten(1).long()
            for i in reversed(range(order.shape[1])):
                yield exact.run(law, x, order, i, context)

        def orders(n: int) -> NDArray[np.int64]:
            return _orders(n, self.space.dims)

        return SequentialCodec(self.space, exact, orders, walk, backwards)

    def initialise(self, batches: Batches) -> None:
        """Biases of what predicts cells, from one pass over the data."""
        self.cells.initialise(batches)
        if self.condition_features is not None:
            self.condition_features.initialise(batches, of_condition=True)

    @classmethod
    def tiny(cls, space: Space, condition: Space | None = None) -> MaskedDiffusion:
        """One layer of eight features, with weights large enough that every cell depends on the others.

        Raises:
            Unsupported: for real conditions, and for holes, of other than integers, which would tell the checks nothing
                that those do not.
        """
        if not isinstance(space, Integers) and (space.missing or isinstance(condition, Reals)):
            raise Unsupported("tiny: the checks look at real conditions and holes of integers")
        masks = 2 if isinstance(space, Binary) else 1  # with more cells the bound is noisier
        model = cls(space, condition, width=8, layers=1, heads=2, hidden=8, masks=masks)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.copy_(0.4 * torch.randn(parameter.shape))
        return model

    def _context(self, condition: Tensor | None) -> Tensor | None:
        """The condition as a vector: shape ``(n, width)``, or None."""
        self.check_condition(condition)
        if condition is None or self.condition_features is None or self.context is None:
            return None
        return self.context(self.condition_features(condition, self.place.dtype).flatten(1))


def _orders(n: int, dims: int) -> NDArray[np.int64]:
    """An order of the cells for each example of a batch, int64, shape ``(n, dims)``; part of the format."""
    words = KeyedNoise(0, torch.arange(n)).uniform((n, dims))
    return words.argsort(dim=1, stable=True).numpy()
