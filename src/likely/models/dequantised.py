"""Variational dequantisation (Ho, Chen, Srinivas, Duan & Abbeel 2019, Flow++, arXiv 1902.00275): densities for codes.

A density p_Y over the reals becomes a probability of discrete cells by the mass of their bins, of width r. With a law
q(u | x) of the place u ∈ (0, 1) within the bins,

    log P(x) = log ∫ p_Y(x + r u) r^D du  ≥  E_q [log p_Y(x + r u) + D log r − log q(u | x)]                  (eq. 11)

q is a flow of its own that sees the example, u = Φ(a), a = g⁻¹(ε; h(x)), ε ~ N(0, I): it starts as the uniform law, for
which (11) is the bound of uniform dequantisation, and is trained with p_Y.  Any model over the reals may be p_Y.
Symbols: x example, u place in the bin, y = x + r u, h what a network makes of x, Φ the normal distribution function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from likely.bijections import Affine, Autoregressive, Bijection, Chain, Inverse, Reverse
from likely.bijections.multiscale import ChannelCoupling, MultiScale, level_shapes
from likely.contract import (
    Batches,
    Binary,
    Bound,
    Counts,
    Integers,
    Loss,
    Model,
    NoCodec,
    Reals,
    Space,
    Table,
    Unsupported,
    noise_or_global,
    weakest,
)
from likely.data.preprocessing import Dequantise, _Centre
from likely.data.streaming import Seen
from likely.networks import MLP, Features, full_precision
from likely.noise import KeyedNoise, Noise, content_keys

#: Bound on the log-scales of q's steps, and on how near u comes to the ends of its bin.
LIMIT, LEAST = 2.0, 1e-12


class Dequantised(Model):
    """A model over the reals behind variational dequantisation: a model of binary cells, integers, counts or tables.

    Args:
        space: space of the examples; a column of a table that lives on a continuum is left as it is.
        condition: space of what the model is conditioned on, or None.
        flow: name of the model over the reals, a flow as a rule, or such a model over ``Reals(space.shape)``.
        flow_options: options of a model given by name.
        depth: steps of the flow q; 0 for uniform dequantisation.
        width: hidden units, or channels, of the networks of q.

    Raises:
        Unsupported: cells may be missing, or the model is not over the right space.
    """

    spaces = (Binary, Integers, Counts, Table)
    conditional = True

    _ABILITIES: ClassVar[tuple[str, ...]] = ("encode", "decode", "column_nats")

    features: Features
    network: nn.Module
    noise_flow: Bijection
    discrete: Tensor

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        *,
        flow: str | Model = "nsf",
        flow_options: Mapping[str, Any] | None = None,
        depth: int = 2,
        width: int = 64,
    ) -> None:
        super().__init__(space, condition)
        if space.missing:
            raise Unsupported("dequantised: expected complete examples; this space has missing cells")
        if depth < 0 or width < 1:
            raise ValueError(f"depth, width: expected at least 0 and 1, got {depth}, {width}")
        self.bins = Dequantise(space)
        self.model = _over_reals(flow, self.bins.output, condition, flow_options)
        discrete = (self.bins.width > 0).expand(space.shape).flatten().nonzero().flatten()
        self.register_buffer("discrete", discrete, persistent=False)  # places of the cells that have a bin
        self.depth = depth
        if depth:
            self.features = Features(space)
            self.network, self.noise_flow = _noise_flow(self.features, len(discrete), space.shape, depth, width)
        object.__setattr__(self, "tempered", self.model.tempered)
        for ability in self._ABILITIES:
            if not self.model.can(ability):
                object.__setattr__(self, ability, None)
        if hasattr(self.model, "latent_dim"):
            self.latent_dim = self.model.latent_dim

    # The law of the noise ------------------------------------------------------------------------------------

    def dequantise(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """y = x + r u with u ~ q(u | x), float64, and D log r − log q(u | x) in nats, shape ``(batch,)``."""
        if not self.depth:
            y, log_width = self.bins(x, noise)
            return y, log_width.flatten(1).sum(1)
        n, cells = len(x), len(self.discrete)
        eps = noise.normal((n, cells)).to(self.bins.width.device)
        shown = self.features(x, self._dtype)
        a, log_det = self.noise_flow.inverse(eps.to(self._dtype), full_precision(self.network(shown)))
        a = full_precision(a.flatten(1)).double()
        # log q(u | x) = log N(eps) − log |∂a/∂eps| − Σ log φ(a), of which the constants of the two normal laws cancel
        log_q = 0.5 * (a.square() - eps.double().square()).sum(1) - log_det.double()
        u = torch.special.ndtr(a).clamp(LEAST, 1.0 - LEAST)
        width = self.bins.width.expand(x.shape[1:]).flatten()[self.discrete]
        y = x.double().flatten(1).index_add(1, self.discrete, width * u).reshape(x.shape)
        return y, width.log().sum() - log_q

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.noise_flow.parameters()).dtype

    # The contract --------------------------------------------------------------------------------------------

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """(11) with one draw: the parts of log p_Y(y), and ``dequantisation``, in nats."""
        noise = noise_or_global(noise, x)
        y, gain = self.dequantise(x, noise)
        inner = self.model.bound(y, condition, noise)
        parts = {"dequantisation": gain} if self._has_part else {}
        return Bound(weakest(inner.kind, "lower bound"), {**inner.parts, **parts})

    def loss(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None, step: int = 0) -> Loss:
        """The loss of the model within at y, less the dequantisation's part of the bound, in nats per dimension."""
        noise = noise_or_global(noise, x)
        y, gain = self.dequantise(x, noise)
        inner = self.model.loss(y, condition, noise, step)
        mean = gain.mean().to(inner.value.dtype)
        log = {"dequantisation": mean.detach()} if self._has_part else {}
        return Loss(inner.value - mean / self.space.dims, {**inner.log, **log})

    @property
    def _has_part(self) -> bool:
        """Whether the dequantisation adds anything: uniform noise on bins of width 1 does not."""
        return self.depth > 0 or not bool(((self.bins.width == 1) | (self.bins.width == 0)).all())

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """The bin of y ~ p_Y; what falls outside the space goes to the nearest code."""
        return self.bins.inverse(self.model.sample(n, condition, noise))

    def initialise(self, batches: Batches) -> None:
        """Scales of the features, and what the model within sets from y."""
        if self.depth:
            self.features.initialise(batches)
        # The noise belongs to the example, the same in every pass.
        within = Seen(batches, lambda x: self.dequantise(x, KeyedNoise(0, content_keys(x)))[0].detach())
        self.model.initialise(within)

    def codec(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> Any:
        """None.

        Raises:
            NoCodec: always.
        """
        raise NoCodec(
            "model 'dequantised' has no codec: the bits that its noise borrows would have to come back through the "
            "inverse of a flow in floating point; a model over the data itself compresses (likely models lists them)"
        )

    @classmethod
    def tiny(cls, space: Space, condition: Space | None = None) -> Dequantised:
        """A small flow behind noise whose law moves with the example."""
        flow = {"transforms": 2, "hidden": (8,), "tails": "normal"}
        return cls(space, condition, flow="maf", flow_options=flow, depth=1, width=8)

    # Abilities of the model within ---------------------------------------------------------------------------

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The embedding of the model within at the middle of q's law, deterministic."""
        y, _ = self.dequantise(x, _Centre())
        return self.model.encode(y, condition)  # type: ignore[operator]

    def decode(self, z: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """The bin of what the model within decodes."""
        return self.bins.inverse(self.model.decode(z, condition, noise))  # type: ignore[operator]

    def column_nats(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Each cell's share of the bound in nats; the dequantisation's part, a joint one, in equal shares."""
        noise = noise_or_global(noise, x)
        y, gain = self.dequantise(x, noise)
        cells = self.model.column_nats(y, condition, noise)  # type: ignore[operator]
        return cells + (gain / self.space.dims).reshape(-1, *[1] * (cells.dim() - 1))


def _over_reals(flow: str | Model, space: Reals, condition: Space | None, options: Mapping[str, Any] | None) -> Model:
    if isinstance(flow, str):
        from likely.models import find

        given = (space,) if condition is None else (space, condition)
        return find(flow)(*given, **dict(options or {})).to(torch.get_default_dtype())
    if options:
        raise ValueError(f"flow_options: expected none beside a model, got {sorted(options)}")
    if (flow.space, flow.condition) != (space, condition):
        raise Unsupported(f"flow: expected a model over {space} given {condition}, got {flow.space}, {flow.condition}")
    return flow


def _noise_flow(
    features: Features, cells: int, shape: Sequence[int], depth: int, width: int
) -> tuple[nn.Module, Bijection]:
    """The network that makes h of the features, and the flow from a to ε that sees h.

    Images get couplings of channels at half the resolution, all else inverse autoregressive steps.
    """
    if len(shape) == 3 and cells == math.prod(shape) and _can_couple(shape):
        channels, height, _ = level_shapes(shape, 1)[0]
        squeezed = height != shape[1]
        start = nn.PixelUnshuffle(2) if squeezed else nn.Identity()
        convolution = nn.Conv2d(features.shape[0] * (4 if squeezed else 1), width, 3, padding=1)
        level = []
        for _ in range(depth):
            level += [ChannelCoupling(channels, Affine(LIMIT), width, width), Reverse(channels)]
        return nn.Sequential(start, convolution, nn.ReLU()), MultiScale(shape, [Chain(*level)], width)
    flow = []
    for step in range(depth):
        order = range(cells) if step % 2 == 0 else range(cells - 1, -1, -1)
        step_of_q = Autoregressive(Affine(LIMIT), cells, hidden=(width,), context=width, order=order)
        nn.init.zeros_(step_of_q.network.output.weight)
        flow.append(Inverse(step_of_q))
    network = nn.Sequential(nn.Flatten(), MLP(math.prod(features.shape), (width,), "relu"))
    return network, Chain(*flow)


def _can_couple(shape: Sequence[int]) -> bool:
    try:
        return bool(level_shapes(shape, 1))
    except ValueError:
        return False
