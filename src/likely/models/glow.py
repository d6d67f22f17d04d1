"""Glow (Kingma & Dhariwal 2018, arXiv 1807.03039): a flow for images, exact in density and in both directions.

    log p(x) = log N(z; 0, I) + log |det ∂z/∂x|,    z = f(x)                                             (eqs. 3–6)

f has L levels: squeeze, K steps of flow, split (figure 2).  A step is (table 1)

    ActNorm             y = e^s ∘ x + b          log |det| = h w Σ s           s, b one a channel, from the first data
    1 × 1 convolution   y = W x                  log |det| = h w log |det W|   W = P L U (eq. 10)
    coupling            y₂ = (x₂ − m) e^{−s}     log |det| = −Σ s              (m, s) = network(x₁),  y₁ = x₁

and what a split lets go is normal given what stays.  Symbols: x example, z latent vector of the size of x, c condition,
h w height and width of the map, T temperature.  z is standard normal throughout: the means and scales of the splits'
priors belong to f.  So a sample at temperature T is f⁻¹(T ε) with ε ~ N(0, I) (section 5, "reduced-temperature").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.bijections import ActNorm, Additive, Affine, Bijection, Chain, InvertibleConvolution
from likely.bijections.multiscale import ChannelCoupling, MultiScale, level_shapes
from likely.contract import Batches, Bound, Model, Reals, Space, Unsupported, noise_or_global
from likely.data.streaming import first
from likely.networks import Features, Linear, full_precision
from likely.noise import Noise

#: Width of the vector that the condition becomes, and examples that ActNorm starts from.
CONTEXT, STARTING_EXAMPLES = 64, 512
#: Bound on the log-scale of an affine coupling: a deep chain stays invertible in float32.
LIMIT = 2.0


class GlowStep(Bijection):
    """ActNorm, invertible 1 × 1 convolution and coupling of channels; the first two are one product with a matrix.

    Args:
        channels: of the map.
        width: channels of the coupling network's hidden layers.
        context: width of a context vector, 0 if there is none.
        additive: additive instead of affine coupling.
        plain: W itself instead of its LU factors.
    """

    def __init__(
        self, channels: int, width: int, context: int = 0, additive: bool = False, plain: bool = False
    ) -> None:
        super().__init__()
        self.norm = ActNorm(channels)
        self.mixing = InvertibleConvolution(channels, decomposed=not plain)
        self.coupling = ChannelCoupling(channels, Additive() if additive else Affine(LIMIT), width, context)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mixed, log_det = self._mixed(x)
        z, log_slope = self.coupling(mixed, context)
        return z, log_slope + log_det * (x.shape[2] * x.shape[3])

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mixed, log_slope = self.coupling.inverse(z, context)
        with torch.autocast(z.device.type, enabled=False):
            scale = torch.exp(-self.norm.log_scale)
            unit = torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
            weight = scale[:, None] * self.mixing.solve(unit)
            x = F.conv2d(mixed, weight[:, :, None, None], -scale * self.norm.shift)
            log_det = self.mixing.log_det() + self.norm.log_scale.sum()
        return x, log_slope - log_det * (z.shape[2] * z.shape[3])

    def _mixed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """W (e^s x + b) and the log-det, both of a pixel, in full precision even where networks are not."""
        with torch.autocast(x.device.type, enabled=False):
            matrix = self.mixing.matrix()
            weight = matrix * self.norm.log_scale.exp()
            mixed = F.conv2d(x, weight[:, :, None, None], matrix @ self.norm.shift)
            return mixed, self.mixing.log_det() + self.norm.log_scale.sum()

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Mean and scale of ActNorm."""
        self.norm.initialise(x)


class Glow(Model):
    """Normalising flow for images, multi-scale, with invertible 1 × 1 convolutions.

    Its density is over real images; images of whole numbers go through dequantisation, uniform (``likely fit`` does it)
    or variational (model ``dequantised``).

    Args:
        space: images, ``Reals((channels, height, width))``.
        condition: space of what the model is conditioned on, a label or more, or None; every coupling and every split's
            prior sees it.
        levels: L; by default 3, or fewer where the image cannot be halved so often.
        depth: K, steps of flow of each level; the paper has 32.
        width: channels of the coupling networks' hidden layers; the paper has 512.
        coupling: ``affine``, or ``additive``, which keeps volume.
        convolution: ``lu`` for W by its factors, whose log-det is a sum, or ``plain`` for W itself.

    Raises:
        Unsupported: the examples are no images, or too small for so many levels, or cells may be missing.

    >>> model = Glow(Reals((1, 4, 4)), levels=2, depth=1, width=8)
    >>> x = torch.zeros(2, 1, 4, 4)
    >>> model.bound(x).kind, torch.allclose(model.decode(model.encode(x)), x, atol=1e-6)
    ('exact', True)
    """

    spaces = (Reals,)
    conditional = True
    tempered = True

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        *,
        levels: int | None = None,
        depth: int = 8,
        width: int = 128,
        coupling: Literal["affine", "additive"] = "affine",
        convolution: Literal["lu", "plain"] = "lu",
    ) -> None:
        super().__init__(space, condition)
        if space.missing:
            raise Unsupported("glow: expected complete images; this space has missing cells")
        if coupling not in ("affine", "additive"):
            raise ValueError(f"coupling: expected 'affine' or 'additive', got {coupling!r}")
        if convolution not in ("lu", "plain"):
            raise ValueError(f"convolution: expected 'lu' or 'plain', got {convolution!r}")
        if depth < 1 or width < 1 or (levels is not None and levels < 1):
            raise ValueError(f"levels, depth, width: expected at least 1, got {levels}, {depth}, {width}")
        self.latent_dim = space.dims
        self.features, self.embedding, context = None, None, 0
        if condition is not None:
            context, self.features = CONTEXT, Features(condition)
            self.embedding = nn.Sequential(Linear(math.prod(self.features.shape), CONTEXT), nn.Tanh())
        chains = [
            Chain(
                *(
                    GlowStep(channels, width, context, coupling == "additive", convolution == "plain")
                    for _ in range(depth)
                )
            )
            for channels, _, _ in _shapes(space.shape, levels)
        ]
        self.bijection = MultiScale(space.shape, chains, context)

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """log p(x | c) in nats, exact: ``base``, log N(z; 0, I), and ``log_det``."""
        z, log_det = self.bijection(x.to(self._dtype), self._context(condition))
        base = -0.5 * (z.square().sum(1) + self.latent_dim * math.log(2.0 * math.pi))
        return Bound("exact", {"base": base, "log_det": log_det})

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """f⁻¹(ε), ε ~ N(0, I); noise at temperature T gives f⁻¹(T ε)."""
        eps = noise_or_global(noise, self).normal((n, self.latent_dim))
        return self.decode(eps, condition)

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """z = f(x): shape ``(batch, dims)``, of the split that leaves first, first."""
        return self.bijection(x.to(self._dtype), self._context(condition))[0]

    def decode(self, z: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """x = f⁻¹(z), the inverse of :meth:`encode`; there is no other randomness."""
        return self.bijection.inverse(z.to(self._dtype), self._context(condition))[0]

    def initialise(self, batches: Batches) -> None:
        """ActNorm from the first examples (section 3.1)."""
        if self.features is not None:
            self.features.initialise(batches, of_condition=True)
        x, condition = first(batches, STARTING_EXAMPLES)
        context = self._context(condition)
        self.bijection.initialise(x.to(self._dtype), None if context is None else context.detach())

    @classmethod
    def tiny(cls, space: Space, condition: Space | None = None) -> Glow:
        """Two levels of one step each, with weights that make every part matter."""
        model = cls(space, condition, levels=2, depth=1, width=4)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        return model

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.bijection.parameters()).dtype

    def _context(self, condition: Tensor | None) -> Tensor | None:
        """A vector made of the condition, or None."""
        self.check_condition(condition)
        if condition is None or self.features is None or self.embedding is None:
            return None
        return full_precision(self.embedding(self.features(condition, self._dtype).flatten(1)))


def _shapes(shape: Sequence[int], levels: int | None) -> list[tuple[int, int, int]]:
    """Shapes of the maps of the levels; by default of the most levels, up to three, that each halve the image."""
    if len(shape) != 3:
        raise Unsupported(f"glow: expected images of shape (channels, height, width), got {tuple(shape)}")
    if levels is None:
        halvings = min((size & -size).bit_length() - 1 for size in shape[1:])
        levels = max(1, min(3, halvings))
    try:
        return level_shapes(shape, levels)
    except ValueError as reason:
        raise Unsupported(f"glow: {reason}") from None
