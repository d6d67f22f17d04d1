"""PixelCNN (van den Oord et al. 2016, arXiv 1601.06759) with the law of a pixel of PixelCNN++ (Salimans et al. 2017).

    log p(x) = Σ_t log p(x_t | x_1 … x_{t−1})         pixels t in raster order                (PixelCNN, eq. 1)
    p(x_t | ·) = Σ_i π_i Π_c P(x_tc | m_ci, s_ci)     colours c share a component i         (arXiv 1701.05517, eqs. 1–3)
    m_ci = μ_ci + Σ_{e<c} a_cei (u_e − r_e)           means depend linearly on earlier colours

Symbols: x levels 0 … L − 1, u = 2x/(L − 1) − 1, t pixel, c and e colours, i component of the mixture.

The network sees the causal patch of a pixel: the ``field`` above it and to its left.  By default all that follows the
first layer is pointwise, so the law of a pixel is a small network on its patch.  That makes the model local, which is
what lossless compression wants: small, fast to train on patches of random positions, drawn and decoded pixel by pixel
for a whole batch without computing anything twice.  ``stages`` > 1 stacks causal convolutions and widens the field.

A pixel is predicted relative to its western neighbour w: the patch enters as δ = (u − u_w) / d, with d the deviation
of such differences in the training data, and u_w itself in the neighbour's own place.  What leaves it is in units
of d: μ_ci = r_c + d_c μ̂_ci and log s_ci = log d_c + output, with the reference r = u_w + d W δ that the means share.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from likely.contract import (
    Batches,
    Binary,
    Bound,
    Integers,
    Loss,
    Model,
    Space,
    Unsupported,
    noise_or_global,
)
from likely.distributions import Distribution
from likely.distributions.logistic import log_level
from likely.distributions.pixel import LogMass, PixelBernoulli, PixelLaw, PixelMixture
from likely.networks import Features, Linear, full_precision
from likely.networks.causal import CausalPatch, ResidualRows
from likely.noise import Noise, SharedNoise

if TYPE_CHECKING:
    from likely.coding.sequential import SequentialCodec

#: ``step(maps, i, j, context)``: see ``PixelCNN._step``.
Step: TypeAlias = Callable[[Sequence[Tensor], int, int, "Tensor | None"], tuple[Tensor, Tensor, Tensor]]
#: ``choose(c, i, j, distribution) -> levels``, shape ``(n,)``, of colour c of pixel (i, j).
Choose: TypeAlias = Callable[[int, int, int, Distribution], Tensor]

#: Rows of patches that are worked off together where no gradient is needed: what fits a processor's cache.
_ROWS = 16_384


class PixelCNN(Model):
    """Autoregressive model of images, pixel by pixel, with an exact likelihood.

    Args:
        space: images of shape (C, H, W), C from 1 to 4; binary images have Bernoulli cells.
        condition: space of what the model is conditioned on, or None.
        field: rows above and columns to either side that the first layer sees.
        width: features of the hidden layers.
        layers: residual pointwise layers of each stage.
        stages: causal convolutions; the first sees the image, each further one the features of the stage before in
            a field of its own, ``stage_field``.
        stage_field: rows above and columns to either side in the further stages.
        components: K, logistics of the mixture.
        activation: ``relu``, ``elu``, ``gelu``, ``silu``, ``softplus`` or ``tanh``.
        dropout: share of hidden units dropped in training.
        positions: pixels of each image that a training step looks at, chosen anew each time; None for all.  Few
            pixels of many images teach more than all pixels of few.  Only with one stage.

    Raises:
        Unsupported: the space is not one of images, has missing cells or more than four colours.

    >>> model = PixelCNN(Integers((3, 8, 8), 256), width=16, layers=1)
    >>> model.bound(torch.zeros(2, 3, 8, 8)).kind
    'exact'
    """

    spaces = (Binary, Integers)
    conditional = True
    fill: Tensor
    unit: Tensor
    log_unit: Tensor

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        *,
        field: Sequence[int] = (3, 3),
        width: int = 192,
        layers: int = 3,
        stages: int = 1,
        stage_field: Sequence[int] = (1, 1),
        components: int = 5,
        activation: str = "relu",
        dropout: float = 0.0,
        positions: int | None = None,
    ) -> None:
        super().__init__(space, condition)
        if len(space.shape) != 3 or space.shape[0] > 4:
            raise Unsupported(f"model 'pixelcnn' is for images (C, H, W) with C from 1 to 4, got shape {space.shape}")
        if space.missing:
            raise Unsupported("model 'pixelcnn' is for images without missing cells; a trained one can complete them")
        for name, value in (("field", field), ("stage_field", stage_field)):
            if len(value) != 2:
                raise ValueError(f"{name}: expected rows and columns, two numbers, got {tuple(value)}")
        for name, number, least in (("width", width, 1), ("layers", layers, 0), ("stages", stages, 1),
                                    ("components", components, 1), ("positions", positions or 1, 1)):  # fmt: skip
            if number < least:
                raise ValueError(f"{name}: expected {least} or more, got {number}")
        if positions is not None and stages > 1:
            raise Unsupported("positions: with more than one stage the features of all pixels are needed")
        self.levels = space.levels if isinstance(space, Integers) else 2
        self.binary = isinstance(space, Binary)
        self.components, self.positions = components, positions
        colours, height, columns = space.shape
        pairs = colours * (colours - 1) // 2

        self.patches = [CausalPatch(field[0], field[1])]
        self.patches += [CausalPatch(stage_field[0], stage_field[1], centre=True) for _ in range(stages - 1)]
        self.west = self.patches[0].offsets.index((0, -1))
        inputs = len(self.patches[0]) * colours
        sizes = [inputs] + [len(patch) * width for patch in self.patches[1:]]
        self.stages = nn.ModuleList(
            ResidualRows(size, width, layers, activation, dropout, residual=s > 0) for s, size in enumerate(sizes)
        )
        self.row = nn.Parameter(torch.zeros(height, width))
        self.column = nn.Parameter(torch.zeros(columns, width))
        self.condition_features = Features(condition) if condition is not None else None
        self.context: Linear | None = None
        if self.condition_features is not None:
            self.context = Linear(math.prod(self.condition_features.shape), width)
        self.linear = Linear(inputs, colours, bias=False)
        nn.init.zeros_(self.linear.weight)
        self.sizes = [colours, pairs] if self.binary else [components * m for m in (1, colours, colours, pairs)]
        self.output = Linear(width, sum(self.sizes))
        self.register_buffer("fill", torch.zeros(colours))
        self.register_buffer("unit", torch.ones(colours))
        self.register_buffer("log_unit", torch.zeros(colours))

    # The law of a pixel --------------------------------------------------------------------------------------

    def _law(self, numbers: Tensor, linear: Tensor, patch: Tensor, log_mass: LogMass = log_level) -> PixelLaw:
        """The law of pixels, by elementwise operations on what the layers give.

        Args:
            numbers: of the output layer, shape ``(rows, sum(self.sizes))``.
            linear: W δ, shape ``(rows, C)``.
            patch: u, shape ``(rows, taps, C)``.
        """
        colours, k = self.space.shape[0], self.components
        if self.binary:
            logits, slopes = numbers.split(self.sizes, 1)
            return PixelBernoulli(logits + linear, slopes)
        logits, means, log_scales, slopes = numbers.split(self.sizes, 1)
        unit = self.unit.to(numbers.dtype)
        reference = patch[:, self.west] + unit * linear
        means = reference.unsqueeze(-1) + unit.unsqueeze(-1) * means.reshape(-1, colours, k)
        log_scales = log_scales.reshape(-1, colours, k) + self.log_unit.to(numbers.dtype).unsqueeze(-1)
        slopes = slopes.reshape(len(slopes), slopes.shape[1] // k, k)
        return PixelMixture(logits, means, log_scales, slopes, reference, self.levels, log_mass)

    def _relative(self, patch: Tensor) -> Tensor:
        """δ, with u_w itself in its own place: shape ``(rows, taps · C)``."""
        west = patch[:, self.west].unsqueeze(1)
        relative = (patch - west) / self.unit.to(patch.dtype)
        return torch.cat([relative[:, : self.west], west, relative[:, self.west + 1 :]], 1).flatten(1)

    def _to_unit(self, x: Tensor) -> Tensor:
        """u."""
        return x.to(self.fill.dtype) * (2.0 / (self.levels - 1)) - 1.0

    def _place(self, positions: Tensor, context: Tensor | None) -> Tensor:
        """What the first layer adds for the place in the image and the condition: shape ``(rows, width)``."""
        columns = self.space.shape[2]
        place = self.row[positions // columns] + self.column[positions % columns]
        return place if context is None else place + context

    # All pixels at once --------------------------------------------------------------------------------------

    def _log_probs(self, x: Tensor, condition: Tensor | None, positions: Tensor | None = None) -> Tensor:
        """log p(x_tc | x_<t, x_t1 … x_t,c−1) in nats: shape ``(n, pixels, C)``.

        Args:
            positions: the pixels t, int64, shape ``(n, k)``; all by default.
        """
        (colours, height, width), n = self.space.shape, len(x)
        padded = self.patches[0].pad(self._to_unit(x.movedim(1, -1)), self.fill)
        if positions is None:
            patch = self.patches[0].all(padded).flatten(0, 2)
            places = torch.arange(height * width, device=x.device).expand(n, -1)
            values = x.flatten(2)
        else:
            patch, places = self.patches[0].some(padded, positions).flatten(0, 1), positions
            values = x.flatten(2).gather(2, positions.unsqueeze(1).expand(-1, colours, -1))
        context = self._context(condition)
        if context is not None:
            context = context.repeat_interleave(places.shape[1], 0)
        inputs = self._relative(patch)
        h = self.stages[0](inputs, self._place(places.reshape(-1), context))
        for patches, stage in zip(self.patches[1:], self.stages[1:]):
            maps = h.reshape(n, height, width, h.shape[1])
            h = stage(patches.all(patches.pad(maps, maps.new_zeros(maps.shape[-1]))).flatten(0, 2).flatten(1))
        law = self._law(full_precision(self.output(h)), full_precision(self.linear(inputs)), patch)
        return law.log_probs(values.transpose(1, 2).reshape(-1, colours)).reshape(n, places.shape[1], colours)

    def column_nats(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """log p of every cell given those before it, in nats: shape ``(batch, C, H, W)``; they sum to the bound."""
        size = max(1, _ROWS // math.prod(self.space.shape[1:]))
        conditions = [None] * len(x) if condition is None else condition.split(size)
        found = [self._log_probs(part, given) for part, given in zip(x.split(size), conditions)]
        return torch.cat(found).transpose(1, 2).reshape(x.shape)

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """log p(x | c) in nats, exact."""
        return Bound("exact", {"pixels": self.column_nats(x, condition).flatten(1).sum(1)})

    def loss(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None, step: int = 0) -> Loss:
        """−log p(x | c) per dimension; in training with ``positions`` an unbiased estimate from these few pixels."""
        if self.positions is None or not self.training:
            return super().loss(x, condition, noise, step)
        pixels = math.prod(self.space.shape[1:])
        uniform = noise_or_global(noise, x).uniform((len(x), self.positions)).to(x.device)
        positions = (uniform * pixels).long().clamp(max=pixels - 1)
        nats = self._log_probs(x, condition, positions).sum(2).mean() * pixels
        return Loss(-nats / self.space.dims, {"pixels": nats.detach()})

    # Pixel after pixel ---------------------------------------------------------------------------------------

    def _walk(
        self, n: int, context: Tensor | None, step: Step | None = None, log_mass: LogMass = log_level
    ) -> Generator[Distribution, Tensor, None]:
        """The distributions of all cells of n images, in order; each cell's levels ``(n,)`` are sent before the next.

        Nothing is computed twice: every stage keeps the map that the next one looks at.

        Args:
            step, log_mass: what computes a pixel and its law, in reproducible arithmetic; by default in floating point.
        """
        colours, height, width = self.space.shape
        fills = [self.fill] + [self.fill.new_zeros(self.row.shape[1])] * (len(self.patches) - 1)
        maps = [patches.empty(n, height, width, fill) for patches, fill in zip(self.patches, fills)]
        for i, j in itertools.product(range(height), range(width)):
            numbers, linear, patch = (step or self._step)(maps, i, j, context)
            law = self._law(numbers, linear, patch, log_mass)
            levels = [(yield law.first)]
            for _ in range(colours - 1):
                law = law.given(levels[-1])
                levels.append((yield law.first))
            self.patches[0].write(maps[0], i, j, self._to_unit(torch.stack(levels, 1)))

    def _step(self, maps: Sequence[Tensor], i: int, j: int, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers, linear part and patch of pixel (i, j) of every image, for :meth:`_law`; extends the maps."""
        patch = self.patches[0].at(maps[0], i, j)
        inputs = self._relative(patch)
        place = self.row[i] + self.column[j]
        h = self.stages[0](inputs, place if context is None else place + context)
        for patches, stage, seen in zip(self.patches[1:], self.stages[1:], maps[1:]):
            patches.write(seen, i, j, h)
            h = stage(patches.at(seen, i, j).flatten(1))
        return self.output(h), self.linear(inputs), patch

    def _row(self, padded: Tensor, i: int, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What :meth:`_step` gives, for all pixels of a row: those of column 0 first.  For one stage."""
        patches = self.patches[0]
        patch = patches.all(padded[:, i : i + patches.rows + 1]).squeeze(1).transpose(0, 1)
        width, n = patch.shape[:2]
        place = (self.row[i] + self.column).unsqueeze(1).expand(width, n, -1)
        place = place if context is None else place + context
        patch = patch.flatten(0, 1)
        inputs = self._relative(patch)
        return self.output(self.stages[0](inputs, place.flatten(0, 1))), self.linear(inputs), patch

    def codec(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> SequentialCodec:
        """Cell after cell in raster order, all images of a batch side by side, in reproducible arithmetic.

        With one stage the encoder takes a row of pixels at a time, the last one first; with more it walks as the
        decoder does.
        """
        from likely.coding import sequential
        from likely.exact import network

        exact = network(self)
        model = exact.module
        assert isinstance(model, PixelCNN)
        # Sharp laws need their means to a small part of a level: here weights of 9 bits would cost 1 or 2 %.
        layers = ((model.stages[0], self.stages[0], "first"), (model, self, "linear"), (model, self, "output"))
        for owner, original, name in layers:
            setattr(owner, name, sequential.Fine(getattr(original, name)))
        colours, height, width = self.space.shape

        def context_of(condition: Tensor | None) -> Tensor | None:
            return exact.run(model._context, condition)

        def step(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            return exact.run(model._step, *arguments)

        def walk(n: int, condition: Tensor | None) -> Generator[Distribution, Tensor, None]:
            return model._walk(n, context_of(condition), step, sequential.log_level)

        def backwards(x: Tensor, condition: Tensor | None) -> Iterator[Distribution]:
            context, n = context_of(condition), len(x)
            padded = model.patches[0].pad(model._to_unit(x.movedim(1, -1)), model.fill)
            for i in reversed(range(height)):
                numbers, linear, patch = exact.run(model._row, padded, i, context)
                laws = [model._law(numbers, linear, patch, sequential.log_level)]
                for c in range(colours - 1):
                    laws.append(laws[-1].given(x[:, c, i].t().flatten()))
                for j in reversed(range(width)):
                    for law in reversed(laws):
                        yield law[j * n : (j + 1) * n].first

        order = torch.arange(self.space.dims).reshape(self.space.shape).permute(1, 2, 0).flatten().tolist()
        return sequential.SequentialCodec(self.space, exact, order, walk, backwards if len(self.stages) == 1 else None)

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Each colour of each pixel drawn from its law given all before it."""
        noise = noise_or_global(noise, self)
        with torch.no_grad():
            walk = self._walk(n, self._context(condition))
            return self._collected(n, walk, lambda c, i, j, law: law.sample(noise))

    def _collected(self, n: int, walk: Generator[Distribution, Tensor, None], choose: Choose) -> Tensor:
        """The images that come of a walk: levels, shape ``(n, C, H, W)``."""
        colours, height, width = self.space.shape
        x = self.fill.new_zeros(n, colours, height, width)
        law = next(walk)
        for i, j, c in itertools.product(range(height), range(width), range(colours)):
            x[:, c, i, j] = choose(c, i, j, law)
            if (i, j, c) != (height - 1, width - 1, colours - 1):
                law = walk.send(x[:, c, i, j])
        return x

    def impute(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        noise: Noise | None = None,
        draws: int = 0,
        samples: int = 32,
    ) -> Tensor:
        """Images completed: cells missing at the end of the raster order, drawn given those before them.

        Args:
            x: NaN marks the missing cells.
            draws: 0 for the best single values (mean level, or the more frequent bit, of ``samples`` completions),
                shape of ``x``; m for m draws, shape ``(m, *x.shape)``.

        Raises:
            Unsupported: a missing cell comes before an observed one, so that this order has no law for it.
        """
        self._check_order(x)
        noise, n = noise_or_global(noise, x), len(x)
        m = draws or samples
        shared = SharedNoise(noise, n, m)
        known = x.to(self.fill.dtype).repeat_interleave(m, 0)

        def choose(c: int, i: int, j: int, law: Distribution) -> Tensor:
            cells = known[:, c, i, j]
            missing = torch.isnan(cells)
            return torch.where(missing, law.sample(shared), cells) if bool(missing.any()) else cells

        with torch.no_grad():
            context = self._context(condition)
            context = None if context is None else context.repeat_interleave(m, 0)
            filled = self._collected(n * m, self._walk(n * m, context), choose).reshape(n, m, *x.shape[1:]).to(x.dtype)
        return filled.movedim(1, 0) if draws else torch.where(torch.isnan(x), filled.mean(1).round(), x)

    def _check_order(self, x: Tensor) -> None:
        """Refuse an image in which a missing cell comes before an observed one."""
        missing = torch.isnan(x).permute(0, 2, 3, 1).flatten(1)
        wrong = missing[:, :-1] & ~missing[:, 1:]
        if wrong.any():
            example, cell = (int(v) for v in wrong.nonzero()[0])
            pixel, colour = divmod(cell, x.shape[1])
            i, j = divmod(pixel, x.shape[3])
            raise Unsupported(
                f"example {example}: its cell (channel {colour}, row {i}, column {j}) is missing and one after it is "
                "not; model 'pixelcnn' draws cells in raster order and completes images only at their end"
            )

    # Parts ---------------------------------------------------------------------------------------------------

    def initialise(self, batches: Batches) -> None:
        """Mean levels, which stand for what lies outside the image, and the deviation d of western differences."""
        if self.condition_features is not None:
            self.condition_features.initialise(batches, of_condition=True)
        colours = self.space.shape[0]
        count, total, squares = 0, torch.zeros(colours).double(), torch.zeros(colours).double()
        for x, _ in batches:
            u = x.double() * (2.0 / (self.levels - 1)) - 1.0
            count += len(x)
            total += u.mean((2, 3)).sum(0).cpu()
            if u.shape[3] > 1:
                squares += u.diff(dim=3).square().mean((2, 3)).sum(0).cpu()
        d = (squares / max(count, 1)).sqrt()
        d = torch.where(d > 1.0 / self.levels, d, 1.0)
        with torch.no_grad():
            self.fill.copy_(total / max(count, 1))
            self.unit.copy_(d)
            self.log_unit.copy_(d.log())
            if not self.binary:
                self.output.bias[sum(self.sizes[:2]) : sum(self.sizes[:3])] = -1.0

    @classmethod
    def tiny(cls, space: Space, condition: Space | None = None) -> PixelCNN:
        """Two stages of eight features."""
        return cls(space, condition, field=(1, 1), width=8, layers=1, stages=2, components=2, activation="tanh")

    def _context(self, condition: Tensor | None) -> Tensor | None:
        """What the condition adds in the first layer: shape ``(n, width)``, or None."""
        self.check_condition(condition)
        if condition is None or self.condition_features is None or self.context is None:
            return None
        return self.context(self.condition_features(condition, self.fill.dtype).flatten(1))
