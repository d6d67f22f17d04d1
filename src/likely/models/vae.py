"""Variational autoencoder (Kingma & Welling 2013, arXiv 1312.6114), with importance weighting and any space.

    p(x, z) = p(z) p(x | z)        prior and likelihood
    q(z | x) = N(μ(x), diag σ²(x))  amortised posterior, or this normal pushed through a flow z = f(ε; h(x))

    L(x)   = E_q[log p(x | z)] − KL(q(z | x) ‖ p(z))           ≤ log p(x)      (eq. 3)
    L_k(x) = E[log (1/k) Σᵢ wᵢ],  wᵢ = p(x | zᵢ) p(zᵢ) / q(zᵢ | x)  ≤ log p(x)   (Burda et al. 2015, 1509.00519, eq. 8)

Symbols: x example, c condition, z latent vector, k ``samples``, ε standard noise, w importance weight, h what the
encoder makes of x.

With a condition every law is conditional on it, p(x | c) = ∫ p(z) p(x | z, c) dz.  A missing cell is left out: the
posterior sees that it is missing, and the bound is one on the log-probability of the observed cells (Mattei &
Frellsen 2019, MIWAE, arXiv 1812.02633).  The prior may be any model over the latent space, and the posterior any flow
on it, which sees h: inverse autoregressive ones are those of Kingma et al. 2016 (arXiv 1606.04934), a flow as the prior
makes the variational lossy autoencoder's (Chen et al. 2017, arXiv 1611.02731).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.bijections import Bijection
from likely.contract import (
    Batches,
    Binary,
    Bound,
    Counts,
    Integers,
    Kind,
    Loss,
    Model,
    NoCodec,
    Reals,
    Space,
    Table,
    Tokens,
    Unsupported,
    noise_or_global,
    weakest,
)
from likely.distributions import Distribution, Normal, head, likelihoods
from likely.distributions.categorical import sample_categories
from likely.distributions.heads import LogisticMixtureHead, TableHead
from likely.networks import Features, after, decoder, encoder, full_precision
from likely.noise import Noise

if TYPE_CHECKING:
    from likely.coding.latent import LatentCodec


class VAE(Model):
    """Variational autoencoder over any space.

    Args:
        space: space of the examples.
        condition: space of what the model is conditioned on, or None.
        latent_dim: dimension of z.
        hidden: widths of the encoder's hidden layers, mirrored in the decoder; for ``network="conv"`` the channels
            at each scale and, last, a dense width, or 0 for none: then z is a map at the coarsest scale, whose places
            divide ``latent_dim``.  Default: (512, 512), or (32, 64, 256) for ``conv``.
        network: ``mlp``, ``residual`` or ``conv`` (images).
        blocks: residual blocks at each scale of ``network="conv"``: one number, or one a scale, finest first.
        activation: ``relu``, ``elu``, ``gelu``, ``silu``, ``softplus`` or ``tanh``.
        dropout: share of hidden units dropped in training.
        likelihood: ``auto`` or a name of :func:`likely.distributions.likelihoods`.
        likelihood_options: options of the likelihood's head, such as ``{"components": 5}``.
        prior: ``normal`` for N(0, I), the name of a model, or a model over ``Reals((latent_dim,))``.
        prior_options: options of a prior given by name, such as ``{"components": 50}``.
        two_stage: whether encoder and decoder are trained as with the prior N(0, I), and the prior on their latent
            vectors, which learn nothing from it (latent diffusion, Rombach et al. 2021, arXiv 2112.10752); otherwise
            all are trained on the bound (Vahdat et al. 2021, arXiv 2106.05931).  The bound is the same.
        posterior: ``normal``, or the name of a flow, such as ``iaf``, through which the normal is pushed.
        posterior_options: options of the flow, such as ``{"transforms": 4}``; by default its tails are normal.
        samples: k of the bound and of the training objective.
        kl_warmup: training steps over which the loss raises the weight of the KL from 0 to 1; the bound never does.
        free_bits: nats that each latent dimension may cost in the loss without a penalty (Kingma et al. 2016,
            arXiv 1606.04934, appendix C); the bound never knows.
        gradient: how the loss differentiates with respect to the posterior.  ``total`` is the plain gradient of the
            bound; ``path`` leaves out the posterior's score, which has mean zero: Roeder et al. 2017 (1703.09194) for
            k = 1, doubly reparameterised for k > 1 (Tucker et al. 2019, 1810.04152, eq. 8).  Less noise near the
            optimum, same optimum.  With a flow as the posterior it computes the flow's other direction too, which for
            ``iaf`` takes ``latent_dim`` times as long.
        hide: share of the training examples of which a random part of the cells is hidden, so that the posterior
            learns to impute; for tables and spaces with missing cells.  The bound never hides anything.

    Raises:
        Unsupported: an option does not suit the space, or ``samples`` > 1 with a prior known only from below.

    >>> model = VAE(Binary((6,)), latent_dim=2, hidden=(8,))
    >>> model.bound(torch.ones(3, 6)).kind
    'lower bound'
    """

    spaces = (Binary, Integers, Reals, Counts, Tokens, Table)
    conditional = True

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        *,
        latent_dim: int = 16,
        hidden: Sequence[int] | None = None,
        network: str = "mlp",
        blocks: int | Sequence[int] = 1,
        activation: str = "silu",
        dropout: float = 0.0,
        likelihood: str = "auto",
        likelihood_options: Mapping[str, Any] | None = None,
        prior: str | Model = "normal",
        prior_options: Mapping[str, Any] | None = None,
        two_stage: bool = False,
        posterior: str = "normal",
        posterior_options: Mapping[str, Any] | None = None,
        samples: int = 1,
        kl_warmup: int = 0,
        free_bits: float = 0.0,
        gradient: Literal["total", "path"] = "total",
        hide: float = 0.0,
    ) -> None:
        super().__init__(space, condition)
        if latent_dim < 1 or samples < 1:
            raise ValueError(f"latent_dim, samples: expected at least 1, got {latent_dim}, {samples}")
        if gradient not in ("total", "path"):
            raise ValueError(f"gradient: expected 'total' or 'path', got {gradient!r}")
        if gradient == "path" and free_bits:
            raise Unsupported("free_bits: needs the KL in closed form, which gradient='path' does not use")
        if samples > 1 and gradient == "total" and (kl_warmup or free_bits):
            raise Unsupported("kl_warmup, free_bits: the k-sample bound has no KL of its own; use samples=1")
        if not 0.0 <= hide <= 1.0:
            raise ValueError(f"hide: expected a share from 0 to 1, got {hide}")
        self._may_miss = space.missing or isinstance(space, Table)
        if hide and not self._may_miss:
            raise Unsupported("hide: this space has no missing cells, so the posterior cannot be shown any")
        self.latent_dim, self.samples = latent_dim, samples
        self.kl_warmup, self.free_bits, self.gradient, self.hide = kl_warmup, free_bits, gradient, hide
        widths = tuple(hidden) if hidden else ((32, 64, 256) if network == "conv" else (512, 512))

        if two_stage and (prior == "normal" or samples > 1 or kl_warmup or free_bits or gradient == "path"):
            raise Unsupported(
                "two_stage: needs a learned prior, samples=1, gradient='total', no kl_warmup or free_bits"
            )
        self.two_stage = two_stage

        self.features = Features(space)
        self.condition_features = Features(condition) if condition is not None else None
        width = math.prod(self.condition_features.shape) if self.condition_features is not None else 0
        self.encoder = encoder(network, self.features.shape, width, widths, activation, dropout, blocks)
        self.posterior_head = after(self.encoder, 2 * latent_dim)
        self.register_buffer("_working", torch.zeros(()), persistent=False)  # has the dtype of the arithmetic
        self._working: Tensor
        nn.init.xavier_uniform_(self.posterior_head.weight)
        nn.init.zeros_(self.posterior_head.bias)
        self.decoder = decoder(network, latent_dim + width, space.shape, widths, activation, dropout, blocks)
        out_shape: Sequence[int] = self.decoder.out_shape  # type: ignore[assignment]
        self.likelihood_head = head(likelihood, space, out_shape, **dict(likelihood_options or {}))
        self.prior = _prior(prior, latent_dim, prior_options)
        self.flow = _flow(posterior, latent_dim, self.encoder.out_features, posterior_options)  # type: ignore[arg-type]
        self._prior_kind: Kind = "exact" if self.prior is None else _kind(self.prior)
        self.kind: Kind = weakest("lower bound", self._prior_kind)
        if samples > 1:
            self._check_weights()

    # The three conditionals of the paper ---------------------------------------------------------------------

    def posterior(self, x: Tensor, context: Tensor | None = None) -> Normal | Pushed:
        """q(z | x, c): a normal with a diagonal covariance, shape ``(batch, latent_dim)``, pushed through the flow."""
        h = self.encoder(self.features(x, self._dtype), context)
        mean, log_scale = full_precision(self.posterior_head(h)).chunk(2, -1)
        normal = Normal(mean, F.hardtanh(log_scale, -7.0, 5.0))  # a clamp whose gradient is a single operation
        return normal if self.flow is None else Pushed(normal, self.flow, full_precision(h).flatten(1))

    def likelihood(self, z: Tensor, context: Tensor | None = None) -> Distribution:
        """p(x | z, c) for z of shape ``(*lead, latent_dim)``; the context is broadcast over the draws."""
        if context is not None:
            if z.dim() == 3:
                context = context.unsqueeze(1).expand(-1, z.shape[1], -1)
            z = torch.cat([z, context], -1)
        return self.likelihood_head(self.decoder(z))

    def log_prior(self, z: Tensor, noise: Noise | None = None) -> Tensor:
        """log p(z) in nats: shape ``z.shape[:-1]``."""
        if self.prior is None:
            return -0.5 * (z.square().sum(-1) + self.latent_dim * math.log(2.0 * math.pi))
        flat = self.prior.bound(z.reshape(-1, self.latent_dim), noise=noise).nats
        return flat.reshape(z.shape[:-1]).to(z.dtype)

    # The bound -----------------------------------------------------------------------------------------------

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """L(x), or L_k(x) with ``samples`` = k > 1: a lower bound on log p(x | c) in nats.

        Parts for k = 1: ``reconstruction`` and ``kl`` (its negative), or with a learned prior or a flow as the
        posterior ``reconstruction``, ``prior`` and ``entropy``.  For k > 1 the same terms under the normalised weights,
        and ``tightening``.
        """
        noise = noise_or_global(noise, x)
        context = self._context(condition)
        q = self.posterior(x, context)
        if self.samples > 1:
            return self._importance_bound(x, context, q, self.samples, noise)
        if self.prior is None and isinstance(q, Normal):
            # 1. reconstruction: log p(x | z), and 2. KL(q(z | x) || p(z)), in closed form
            reconstruction = self._log_likelihood(x, q.sample(noise), context)
            return Bound(self.kind, {"reconstruction": reconstruction, "kl": -q.kl_to_standard().sum(-1)})
        z, entropy = _draw(q, noise)
        # 1. reconstruction: log p(x | z)
        reconstruction = self._log_likelihood(x, z, context)
        # 2. log p(z), and 3. the entropy of q(z | x)
        return Bound(
            self.kind, {"reconstruction": reconstruction, "prior": self.log_prior(z, noise), "entropy": entropy}
        )

    def _importance_bound(
        self, x: Tensor, context: Tensor | None, q: Normal | Pushed, samples: int, noise: Noise
    ) -> Bound:
        """L_k: with normalised weights w̃, log mean w = Σ w̃ log w + (H[w̃] − log k)."""
        z, log_q = _draws(q, samples, noise)
        # 1. reconstruction, 2. prior over posterior, both under the normalised weights
        reconstruction = self._log_likelihood(x, z, context)
        prior = self.log_prior(z, noise) - log_q
        log_w = reconstruction + prior
        weights = torch.softmax(log_w, 1)
        # 3. what the average inside the logarithm gains
        mean_log_w = (weights * log_w).sum(1)
        tightening = torch.logsumexp(log_w, 1) - math.log(samples) - mean_log_w
        parts = {
            "reconstruction": (weights * reconstruction).sum(1),
            "prior": (weights * prior).sum(1),
            "tightening": tightening,
        }
        return Bound("lower bound", parts)

    def log_weights(self, x: Tensor, condition: Tensor | None, samples: int, noise: Noise) -> Tensor:
        """log wᵢ = log p(x | zᵢ) + log p(zᵢ) − log q(zᵢ | x) with zᵢ ~ q: shape ``(batch, samples)``, nats.

        Raises:
            Unsupported: the prior is known only from below, so that its values are no weights.
        """
        self._check_weights()
        context = self._context(condition)
        z, log_q = _draws(self.posterior(x, context), samples, noise)
        return self._log_likelihood(x, z, context) + self.log_prior(z, noise) - log_q

    def loss(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None, step: int = 0) -> Loss:
        """−L_k per dimension; with ``kl_warmup``, ``free_bits`` or ``hide`` the corresponding surrogate."""
        noise = noise_or_global(noise, x)
        if self.hide and self.training:
            x = self._hidden(x, noise)
        weight = min(1.0, (step + 1) / self.kl_warmup) if self.kl_warmup else 1.0
        if self.gradient == "path":
            return self._path_loss(x, self._context(condition), noise, weight)
        if self.two_stage:
            return self._two_stage_loss(x, self._context(condition), noise)
        if self.samples > 1 or (weight == 1.0 and not self.free_bits):
            return super().loss(x, condition, noise, step)
        context = self._context(condition)
        q = self.posterior(x, context)
        if self.prior is None and isinstance(q, Normal):
            z = q.sample(noise)
            kl = torch.clamp(q.kl_to_standard().mean(0), min=self.free_bits).sum()
        else:
            z, entropy = _draw(q, noise)
            kl = (-self.log_prior(z, noise) - entropy).mean().clamp(min=self.free_bits * self.latent_dim)
        reconstruction = self._log_likelihood(x, z, context).mean()
        log = {"reconstruction": reconstruction.detach(), "kl": -kl.detach()}
        return Loss((weight * kl - reconstruction) / self.space.dims, log)

    def _two_stage_loss(self, x: Tensor, context: Tensor | None, noise: Noise) -> Loss:
        """−bound per dimension, with the gradient of −E log p(x | z) + KL(q ‖ N(0, I)) and of −log p(z) for fixed z."""
        q = self.posterior(x, context)
        z, entropy = _draw(q, noise)
        reconstruction = self._log_likelihood(x, z, context).mean()
        prior = self.log_prior(z.detach(), noise).mean()
        if isinstance(q, Normal):
            kl = q.kl_to_standard().sum(-1).mean()
        else:
            kl = (0.5 * (z.square() + math.log(2.0 * math.pi)).sum(-1) - entropy).mean()
        value = (kl - reconstruction - prior) + (prior - kl).detach()  # the gradients, at the value −reconstruction
        entropy = entropy.mean().detach()
        log = {"reconstruction": reconstruction.detach(), "prior": prior.detach(), "entropy": entropy}
        return Loss((value - prior.detach() - entropy) / self.space.dims, log)

    def _path_loss(self, x: Tensor, context: Tensor | None, noise: Noise, weight: float) -> Loss:
        """−L_k per dimension, whose gradient reaches the posterior through z alone.

        ∇_φ L_k = E Σᵢ w̃ᵢ² (∂ log wᵢ / ∂ zᵢ) (∂ zᵢ / ∂ φ);  ∇_θ L_k = E Σᵢ w̃ᵢ ∂ log wᵢ / ∂ θ.
        """
        q = self.posterior(x, context)
        z, _, _ = _reparameterised(q, self.samples, noise)
        reconstruction = self._log_likelihood(x, z, context)
        kl = _frozen_log_q(q, z) - self.log_prior(z, noise)
        log_w = reconstruction - weight * kl
        weights = torch.softmax(log_w.detach(), 1)
        if self.samples > 1 and z.requires_grad:
            z.register_hook(lambda gradient: gradient * weights.unsqueeze(-1))
        surrogate = (weights * log_w).sum(1).mean()
        value = torch.logsumexp(log_w.detach(), 1).mean() - math.log(self.samples)
        log = {
            "reconstruction": (weights * reconstruction.detach()).sum(1).mean(),
            "kl": -(weights * kl.detach()).sum(1).mean(),
        }
        return Loss(-(surrogate + (value - surrogate.detach())) / self.space.dims, log)

    # What a user asks of it ----------------------------------------------------------------------------------

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """z ~ p(z), then x ~ p(x | z, c)."""
        noise = noise_or_global(noise, self)
        if self.prior is None:
            z = noise.normal((n, self.latent_dim)).to(self._dtype)
        else:
            z = self.prior.sample(n, noise=noise).to(self._dtype)
        return self.likelihood(z, self._context(condition)).sample(noise)

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Mean of q(z | x, c), with a flow the image of the normal's: shape ``(batch, latent_dim)``, deterministic."""
        return self.posterior(x, self._context(condition)).mean

    def decode(self, z: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """A draw of p(x | z, c), or with ``noise=None`` its best guess (mean of numbers, mode of codes)."""
        p = self.likelihood(z, self._context(condition))
        return p.best() if noise is None else p.sample(noise)

    def column_nats(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Each cell's share of the one-sample bound in nats, shape ``(batch, *space.shape)``; they sum to it.

        The cell's own log p(x_j | z), and of the KL, which belongs to all observed cells together, an equal share.
        A missing cell has 0.
        """
        noise = noise_or_global(noise, x)
        context = self._context(condition)
        q = self.posterior(x, context)
        z, entropy = _draw(q, noise)
        cells = self._cells(x, self.likelihood(z, context))
        if self.prior is None and isinstance(q, Normal):
            common = -q.kl_to_standard().sum(-1)
        else:
            common = self.log_prior(z, noise) + entropy
        seen = self._observed(x).expand_as(cells).to(cells.dtype)
        count = seen.flatten(1).sum(1).clamp(min=1.0)
        return cells + seen * (common / count).reshape(-1, *[1] * (cells.dim() - 1))

    def impute(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        noise: Noise | None = None,
        draws: int = 0,
        samples: int = 200,
    ) -> Tensor:
        """Missing cells filled from p(missing | observed, c) by importance sampling; observed cells stay.

        Args:
            draws: 0 for the single best values (posterior mean of a number, mode of a code), shape of ``x``; m for m
                multiple imputations, shape ``(m, *x.shape)``.
            samples: draws of z that stand for the posterior (self-normalised, Mattei & Frellsen 2019, §4.2).

        Raises:
            Unsupported: the prior is known only from below, so that its values are no weights.
        """
        self._check_weights()
        noise = noise_or_global(noise, x)
        context = self._context(condition)
        z, log_q = _draws(self.posterior(x, context), samples, noise)
        log_w = self._log_likelihood(x, z, context) + self.log_prior(z, noise) - log_q
        if draws == 0:
            best = self.likelihood(z, context).best(torch.softmax(log_w, 1))
            return torch.where(torch.isnan(x), best.to(x.dtype), x)
        uniform = noise.uniform((len(x), draws)).to(log_w)
        chosen = sample_categories(torch.log_softmax(log_w, 1), uniform)
        picked = z.gather(1, chosen.unsqueeze(-1).expand(-1, -1, self.latent_dim))
        drawn = self.likelihood(picked, context).sample(noise).movedim(1, 0)
        return torch.where(torch.isnan(x), drawn.to(x.dtype), x)

    def can(self, ability: str) -> bool:
        """Whether the model has an optional ability; what weighs draws of z needs a prior whose values are exact."""
        return super().can(ability) and (self._prior_kind == "exact" or ability not in ("log_weights", "impute"))

    def codec(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> LatentCodec:
        """Bits-back coding (Townsend, Bird & Barber 2019, arXiv 1901.04866) in reproducible arithmetic.

        It costs the one-sample bound, whatever ``samples`` is: nothing codes the k-sample one.

        Raises:
            NoCodec: the data or the prior have none, or the posterior is a flow.
        """
        if self.flow is not None:
            raise NoCodec(
                "model 'vae' with a flow as its posterior has no codec: bits-back draws z from q(z | x) cell by cell, "
                "and the flow gives its density along whole vectors only; fit it with posterior=normal to compress"
            )
        from likely.coding.latent import BOUND, SPACING, LatentCodec, narrow_levels, refine
        from likely.coding.rows import Rows
        from likely.exact import network

        Rows(self.space)  # refuses spaces without a probability
        prior = None if self.prior is None else self.prior.codec(SPACING, BOUND)
        exact = network(self)
        vae = exact.module
        assert isinstance(vae, VAE)

        def posterior(x: Tensor, condition: Tensor | None) -> Normal:
            q = vae.posterior(x, vae._context(condition))
            assert isinstance(q, Normal)
            return q

        def likelihood(z: Tensor, condition: Tensor | None) -> Distribution:
            return vae.likelihood(z, vae._context(condition))

        if isinstance(self.likelihood_head, LogisticMixtureHead) and (
            self.condition is not None or narrow_levels(exact, likelihood, self.latent_dim)
        ):
            refine(vae, self)
        return LatentCodec(
            self.space,
            exact,
            posterior,
            likelihood,
            prior,
            self.latent_dim,
            spare_bits,
        )

    def initialise(self, batches: Batches) -> None:
        """Scales of the features and the head, and output biases, from one pass over the data."""
        self.features.initialise(batches)
        if self.condition_features is not None:
            self.condition_features.initialise(batches, of_condition=True)
        self.likelihood_head.initialise(batches)

    @classmethod
    def tiny(cls, space: Space, condition: Space | None = None) -> VAE:
        """Two latent dimensions, four hidden units, and weights large enough that every part of the bound matters."""
        options = {"components": 2} if likelihoods(space)[0] in ("logistic", "table") else {}
        model = cls(space, condition, latent_dim=2, hidden=(4,), activation="tanh", likelihood_options=options)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for parameter in model.parameters():
                parameter.copy_(0.7 * torch.randn(parameter.shape))
            for parameter in model.posterior_head.parameters():
                parameter.mul_(0.4)  # keep q near the prior, so that importance weights tell the truth
            if isinstance(model.likelihood_head, TableHead):
                model.likelihood_head.set_atoms(torch.tensor([0.0, 2.0]))
        return model

    # Parts ---------------------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        return self._working.dtype

    def _check_weights(self) -> None:
        if self.prior is not None and self._prior_kind != "exact":
            raise Unsupported(
                f"samples: prior {self.prior.name()!r} is known only as a {self._prior_kind}; its values are no "
                "importance weights, and with k > 1 samples the result would not be a bound; use samples=1"
            )

    def _context(self, condition: Tensor | None) -> Tensor | None:
        """Features of the condition as a vector, or None."""
        self.check_condition(condition)
        if condition is None or self.condition_features is None:
            return None
        return self.condition_features(condition, self._dtype).flatten(1)

    def _observed(self, x: Tensor) -> Tensor:
        return ~torch.isnan(x) if self._may_miss else torch.ones((), dtype=torch.bool, device=x.device)

    def _cells(self, x: Tensor, p: Distribution) -> Tensor:
        """log p(x_j | z) of every cell, 0 where it is missing."""
        if not self._may_miss:
            return p.log_prob(x)
        seen = ~torch.isnan(x)
        return torch.where(seen, p.log_prob(torch.where(seen, x, 0.0)), 0.0)

    def _log_likelihood(self, x: Tensor, z: Tensor, context: Tensor | None) -> Tensor:
        """log p(x | z, c) in nats, summed over cells: shape ``z.shape[:-1]``."""
        if z.dim() == 3:
            x = x.unsqueeze(1)
        return self._cells(x, self.likelihood(z, context)).flatten(z.dim() - 1).sum(-1)

    def _hidden(self, x: Tensor, noise: Noise) -> Tensor:
        """A copy of x in which a share ``hide`` of the examples lacks a random part of its cells."""
        n = len(x)
        share = noise.uniform((n, 1)).to(x.device)
        chosen = noise.uniform((n, 1)).to(x.device) < self.hide
        cells = noise.uniform((n, self.space.dims)).to(x.device).reshape(x.shape)
        trailing = [1] * (x.dim() - 1)
        lost = (cells < share.reshape(n, *trailing)) & chosen.reshape(n, *trailing)
        return x.masked_fill(lost, torch.nan)


class Pushed:
    """q(z): a normal with a diagonal covariance pushed through a flow that sees h, z = f⁻¹(ε; h) with ε ~ N(μ, σ²).

    log q(z) = log N(ε; μ, σ²) − log |det ∂z/∂ε| (Kingma et al. 2016, arXiv 1606.04934, eqs. 8–11).

    Args:
        normal: the law of ε, shape ``(batch, latent_dim)``.
        flow: from z to ε.
        h: what the flow sees, shape ``(batch, width)``.
    """

    def __init__(self, normal: Normal, flow: Bijection, h: Tensor) -> None:
        self.normal, self.flow, self.h = normal, flow, h

    @property
    def mean(self) -> Tensor:
        """The image of the normal's mean, shape ``(batch, latent_dim)``."""
        return self.flow.inverse(self.normal.mean, self.h)[0]

    def push(self, eps: Tensor) -> tuple[Tensor, Tensor]:
        """z of ε, both of shape ``(batch, samples, latent_dim)``, and log |det ∂z/∂ε|, shape ``(batch, samples)``."""
        batch, samples, _ = eps.shape
        z, log_det = self.flow.inverse(eps.flatten(0, 1), self.h.repeat_interleave(samples, 0))
        return z.unflatten(0, (batch, samples)), log_det.unflatten(0, (batch, samples))


def _draw(q: Normal | Pushed, noise: Noise) -> tuple[Tensor, Tensor]:
    """One draw z of q, shape ``(batch, latent_dim)``, and q's entropy: in closed form, or −log q(z) behind a flow."""
    if isinstance(q, Normal):
        return q.sample(noise), q.entropy().sum(-1)
    z, log_q = _draws(q, 1, noise)
    return z[:, 0], -log_q[:, 0]


def _draws(q: Normal | Pushed, samples: int, noise: Noise) -> tuple[Tensor, Tensor]:
    """``samples`` draws z of q and log q(z): shapes ``(batch, samples, latent_dim)`` and ``(batch, samples)``."""
    z, standard, log_det = _reparameterised(q, samples, noise)
    log_scale = (q if isinstance(q, Normal) else q.normal).log_scale.unsqueeze(1)
    log_q = (-0.5 * (standard.square() + math.log(2.0 * math.pi)) - log_scale).sum(-1)
    return z, log_q if log_det is None else log_q - log_det


def _reparameterised(q: Normal | Pushed, samples: int, noise: Noise) -> tuple[Tensor, Tensor, Tensor | None]:
    """``samples`` draws z of q, the standard noise they are made of, and the log-det of the flow, if there is one."""
    normal = q if isinstance(q, Normal) else q.normal
    batch, latent_dim = normal.mean.shape
    standard = noise.normal((batch, samples, latent_dim)).to(normal.mean)
    eps = normal.mean.unsqueeze(1) + normal.log_scale.exp().unsqueeze(1) * standard
    if isinstance(q, Normal):
        return eps, standard, None
    z, log_det = q.push(eps)
    return z, standard, log_det


def _frozen_log_q(q: Normal | Pushed, z: Tensor) -> Tensor:
    """log q(z) as a function of z alone, shape ``(batch, samples)`` for z of shape ``(batch, samples, latent_dim)``."""
    if isinstance(q, Pushed):
        fixed = {name: value.detach() for name, value in q.flow.state_dict(keep_vars=True).items()}
        h = q.h.detach().repeat_interleave(z.shape[1], 0)
        eps, log_det = torch.func.functional_call(q.flow, fixed, (z.flatten(0, 1), h))
        return _frozen_log_q(q.normal, eps.unflatten(0, z.shape[:2])) + log_det.unflatten(0, z.shape[:2])
    return Normal(q.mean.detach().unsqueeze(1), q.log_scale.detach().unsqueeze(1)).log_prob(z).sum(-1)


def _flow(posterior: str, latent_dim: int, context: int, options: Mapping[str, Any] | None) -> Bijection | None:
    """The flow of the posterior, from z to ε, which sees the encoder's output; None for a plain normal."""
    if posterior == "normal":
        if options:
            raise ValueError(f"posterior_options: the normal posterior has none, got {sorted(options)}")
        return None
    from likely.models import find

    cls = find(posterior)
    chosen = dict(options or {})
    if "tails" in cls.options():
        chosen.setdefault("tails", "normal")  # heavy ones would draw z far from where any decoder has been
    model = cls(Reals((latent_dim,)), Reals((context,)), **chosen)
    bijection = getattr(model, "bijection", None)
    if not isinstance(bijection, Bijection):
        raise Unsupported(f"posterior: expected 'normal' or the name of a flow, such as 'iaf', got {posterior!r}")
    return bijection.to(torch.get_default_dtype())


def _prior(prior: str | Model, latent_dim: int, options: Mapping[str, Any] | None) -> Model | None:
    """The prior as a model over the latent space; None stands for N(0, I)."""
    if prior == "normal":
        if options:
            raise ValueError(f"prior_options: the normal prior has none, got {sorted(options)}")
        return None
    if isinstance(prior, str):
        from likely.models import find

        prior = find(prior)(Reals((latent_dim,)), **dict(options or {})).to(torch.get_default_dtype())
    if prior.space != Reals((latent_dim,)):
        raise Unsupported(f"prior: expected a model over Reals(({latent_dim},)), got one over {prior.space}")
    return prior


def _kind(prior: Model) -> Kind:
    """What kind of number a prior gives for a latent vector."""
    parameter = next(iter(prior.parameters()), torch.zeros(()))
    with torch.no_grad():
        return prior.bound(torch.zeros(1, *prior.space.shape, dtype=parameter.dtype)).kind
