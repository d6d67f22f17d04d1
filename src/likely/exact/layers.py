"""Layers with weights, and normalisations, in whole numbers: what takes the place of PyTorch's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.exact.activations import STEPS, Activation
from likely.exact.functions import sqrt
from likely.exact.products import Geometry, Kind, Product
from likely.exact.profiles import SMALLEST, Profile, Rule, Uncovered, parts, peaks


def whole_weights(weight: Tensor, profile: Profile, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Weights as whole numbers (int64), and the scale of each row: weight ≈ whole · scale.

    The room below the largest sum is shared evenly between weights and activations, as far as the profile's limits
    allow: rows of few inputs get finer weights, up to eight times.

    Args:
        axes: the axes of one row, over which it is summed; kept in the scale with size 1.
    """
    weight = weight.detach().cpu().double()
    peak = peaks(weight, axes)

    def rounded(largest: int) -> tuple[Tensor, Tensor]:
        scale = (peak / torch.tensor(float(largest), dtype=torch.float64)).clamp_(min=SMALLEST).to(profile.dtype)
        return torch.round(weight / scale.double()).long(), scale

    largest = profile.largest_weight
    whole, scale = rounded(largest)
    heaviest = int(whole.abs().sum(axes).max()) if whole.numel() else 0  # a sum of whole numbers, so that all agree
    finer = largest
    while finer < profile.finest_weight and (2 * finer + 1) ** 2 * heaviest <= profile.largest_sum * largest:
        finer = 2 * finer + 1
    return (whole, scale) if finer == largest else rounded(finer)


def whole_activations(
    x: Tensor,
    limit: Tensor,
    dims: tuple[int, ...],
    out: Tensor | None = None,
    least: float = -math.inf,
    peak: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Activations as whole numbers of at most ``limit``, and their scale over ``dims``: x ≈ whole · scale.

    Args:
        limit: of no axes.
        least: no activation is less.
        peak: max |x| over ``dims``, if it is known; overwritten.
    """
    peak = (peaks(x, dims, least) if peak is None else peak).clamp_min_(limit.item() * SMALLEST)
    return torch.mul(x, limit / peak, out=out).round_(), peak.div_(limit)


class Certified(nn.Module):
    """A product with whole weights, and what leads back from its sums to real numbers.

    ``axes`` are those of an activation that share one scale; ``scale`` and ``bias`` are broadcast to a sum.
    """

    limit: Tensor
    scale: Tensor
    bias: Tensor | None
    axes: tuple[int, ...]

    def __init__(self, product: Product, scale: Tensor, bias: Tensor | None, profile: Profile) -> None:
        super().__init__()
        self.product, self.profile = product, profile
        self.register_buffer("limit", torch.tensor(float(product.limit), dtype=profile.dtype), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        if bias is not None:
            bias = bias.detach().cpu().to(profile.dtype)
            bias = torch.where(bias.abs() < SMALLEST, 0.0, bias)
        self.register_buffer("bias", bias, persistent=False)

    def follows(self, other: Certified) -> bool:
        """Whether the layer takes what the product of ``other`` gives, as it is."""
        raise NotImplementedError

    def whole(self, x: Tensor, out: Tensor, least: float = -math.inf, peak: Tensor | None = None) -> Tensor:
        """Put x, no element being less than ``least``, into ``out`` as whole numbers up to the limit: their scales.

        Args:
            peak: max |x| over ``axes``, if it is known.
        """
        return whole_activations(x, self.limit, self.axes, out, least, peak)[1]

    def probe_input(self) -> Tensor:
        """The whole numbers on which the product is probed, as an input of the layer."""
        return self.product.probe_input().to(self.scale)

    def enter(self, x: Tensor) -> Tensor:
        """x in the profile's dtype and in the shape that the product takes."""
        raise NotImplementedError

    def leave(self, y: Tensor, x: Tensor) -> Tensor:
        """What came of ``enter(x)``, in the shape that the caller of the layer expects."""
        return y

    def real_(self, sums: Tensor, of_x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """Replace sums by sums · of_x · scale + bias."""
        raise NotImplementedError


class Affine(Certified):
    """x Wᵀ + b with a scale for each vector on the last axis."""

    axes = (1,)

    def __init__(self, weight: Tensor, bias: Tensor | None, profile: Profile) -> None:
        whole, scale = whole_weights(weight, profile, (1,))
        super().__init__(Product(whole, "linear", profile), scale.flatten(), bias, profile)

    def follows(self, other: Certified) -> bool:
        return isinstance(other, Affine)

    def enter(self, x: Tensor) -> Tensor:
        x = x if x.dtype == self.profile.dtype else x.to(self.profile.dtype)
        return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])

    def leave(self, y: Tensor, x: Tensor) -> Tensor:
        return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])

    def real_(self, sums: Tensor, of_x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        y = sums.mul_(of_x).mul_(scale)
        return y if bias is None else y.add_(bias)


class Chain(Rule):
    """Certified layers, one after the other, and the activations before, between and after them.

    What stands between two products is done to a few examples at a time, in place.

    Args:
        layers: of one kind, affine or convolutions.
        activations: one more than layers; None where there is none.
    """

    def __init__(self, layers: Sequence[Certified], activations: Sequence[Activation | None]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activations = nn.ModuleList(a or nn.Identity() for a in activations)
        self._before = (activations[0],)
        names = [(f"scale{i}", f"bias{i}") for i in range(len(layers))]
        self._steps = list(zip(layers, activations[1:], [*layers[1:], None], names))
        for layer, activation, _, (of_rows, biases) in self._steps:
            scale, bias = layer.scale, layer.bias
            if activation is not None and activation.by_table:  # the layer computes the place in the table
                shift = torch.full_like(scale, activation.zero, dtype=torch.float64)
                bias = shift if bias is None else bias.double() * STEPS + shift
                scale, bias = scale * STEPS, bias.to(scale.dtype)
            self.register_buffer(of_rows, scale, persistent=False)
            self.register_buffer(biases, bias, persistent=False)

    def forward(self, x: Tensor, least: float = -math.inf) -> Tensor:
        """Args:
        least: no element of x is less.
        """
        first = self._steps[0][0]
        whole, scale = self._begin(first.enter(x), first, least)
        for layer, activation, following, (of_rows, biases) in self._steps:
            sums = layer.product.forward(whole)
            found = []
            for some, of_x in parts(sums, scale):
                values = layer.real_(some, of_x, getattr(self, of_rows), getattr(self, biases))
                axes = () if following is None else following.axes
                peak = None if activation is None else activation.replace_(values, axes)
                if following is not None:
                    least = -math.inf if activation is None else activation.least
                    found.append(following.whole(values, values, least, peak))
            whole, scale = sums, _joined(found, scale)
        return first.leave(whole, x)

    def probe_input(self) -> Tensor:
        """Whole numbers for the first layer, on which the probe looks at all of the chain."""
        return self._steps[0][0].probe_input()

    def _begin(self, x: Tensor, first: Certified, least: float) -> tuple[Tensor, Tensor]:
        """Whole numbers for the first product, and their scales."""
        (activation,) = self._before
        whole, found = torch.empty_like(x), []
        for some, out in parts(x, whole):
            if activation is None:
                found.append(first.whole(some, out, least))
            else:
                peak = activation.values(some, out, first.axes)
                found.append(first.whole(out, out, activation.least, peak))
        return whole, _joined(found, x)


def _joined(found: list[Tensor], otherwise: Tensor) -> Tensor:
    return found[0] if len(found) == 1 else torch.cat(found) if found else otherwise


def affine(weight: Tensor, bias: Tensor | None, profile: Profile) -> Chain:
    """The rule of x Wᵀ + b."""
    return Chain([Affine(weight, bias, profile)], [None, None])


Convolutional = nn.Conv1d | nn.Conv2d | nn.ConvTranspose1d | nn.ConvTranspose2d


class _Border:
    """What is put around an image before a convolution, beyond the zeros that the convolution itself supplies."""

    def __init__(self, layer: Convolutional) -> None:
        self.mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.sizes: list[int] = []
        padding = layer.padding
        if isinstance(padding, str) or self.mode != "constant":
            self.sizes = list(layer._reversed_padding_repeated_twice) if padding != "valid" else []
            padding = (0,) * len(layer.kernel_size)
        self.left_to_layer: tuple[int, ...] = tuple(padding)

    def __call__(self, x: Tensor) -> Tensor:
        return F.pad(x, self.sizes, self.mode) if any(self.sizes) else x


def _geometry(layer: Convolutional, padding: tuple[int, ...]) -> Geometry:
    """A one-dimensional convolution is one over images of height 1."""

    def pair(values: tuple[int, ...], before: int) -> tuple[int, int]:
        return (before, values[0]) if len(values) == 1 else (values[0], values[1])

    return Geometry(
        kernel=pair(layer.kernel_size, 1),
        stride=pair(layer.stride, 1),
        padding=pair(padding, 0),
        dilation=pair(layer.dilation, 1),
        output_padding=pair(layer.output_padding, 0),
        groups=layer.groups,
    )


def _image(x: Tensor, profile: Profile, dims: int) -> Tensor:
    if x.dim() != dims + 2:
        raise ValueError(f"convolution: expected a batch of {dims + 2} axes, got shape {tuple(x.shape)}")
    return x if x.dtype == profile.dtype else x.to(profile.dtype)


class Convolution(Certified):
    """A convolution or its transpose in one or two dimensions, with a scale for each example."""

    axes = (1, 2, 3)

    def __init__(self, layer: Convolutional, profile: Profile) -> None:
        kind: Kind = "transposed" if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d) else "conv"
        border = _Border(layer)
        geometry = _geometry(layer, border.left_to_layer)
        weight = layer.weight.unsqueeze(2) if layer.weight.dim() == 3 else layer.weight
        if kind == "transposed":
            shape = weight.shape
            weight, scale = whole_weights(weight.reshape(layer.groups, -1, *shape[1:]), profile, (1, 3, 4))
            weight = weight.reshape(shape)
        else:
            weight, scale = whole_weights(weight, profile, (1, 2, 3))
        bias = None if layer.bias is None else layer.bias.reshape(-1, 1, 1)
        super().__init__(Product(weight, kind, profile, geometry), scale.reshape(-1, 1, 1), bias, profile)
        self.dims, self.border = len(layer.kernel_size), border

    def probe_input(self) -> Tensor:
        x = super().probe_input()
        return x[:, :, 0] if self.dims == 1 else x

    def follows(self, other: Certified) -> bool:
        return isinstance(other, Convolution) and other.dims == self.dims and not any(self.border.sizes)

    def enter(self, x: Tensor) -> Tensor:
        x = self.border(_image(x, self.profile, self.dims))
        return x.unsqueeze(2) if self.dims == 1 else x

    def leave(self, y: Tensor, x: Tensor) -> Tensor:
        return y.squeeze(2) if self.dims == 1 else y

    def real_(self, sums: Tensor, of_x: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        y = sums.mul_(of_x * scale)
        return y if bias is None else y.add_(bias)


class CausalConvolution(Rule):
    """A convolution whose every output has scales of its own, from the inputs that it sees and no others.

    With one scale for the whole example an output would depend on inputs that a masked kernel hides from it, and a
    decoder does not have these yet.  Outputs are grouped by what they see (the ``mask`` of a masked layer, or else the
    zeros of its weights); each group is a matrix product on patches.
    """

    def __init__(self, layer: Convolutional, profile: Profile) -> None:
        super().__init__()
        if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):
            raise Uncovered("a transposed convolution cannot be causal")
        self.profile, self.dims, self.border = profile, len(layer.kernel_size), _Border(layer)
        self.geometry = _geometry(layer, self.border.left_to_layer)
        weight = layer.weight.detach().cpu()
        mask = getattr(layer, "mask", None)
        sees = (weight != 0 if mask is None else (mask.cpu() != 0).expand_as(weight)).flatten(1)
        rows = _dense(weight.flatten(1) * sees, layer.groups)
        patterns, group = torch.unique(_dense(sees, layer.groups), dim=0, return_inverse=True)
        self.affine = nn.ModuleList()
        order = []
        for number, pattern in enumerate(patterns):
            members = (group == number).nonzero().flatten()
            columns = pattern.nonzero().flatten()
            columns = columns if len(columns) else torch.zeros(1, dtype=torch.int64)
            bias = None if layer.bias is None else layer.bias.detach().cpu()[members]
            self.affine.append(affine(rows[members][:, columns], bias, profile))
            self.register_buffer(f"columns{number}", columns, persistent=False)
            order.append(members)
        self.register_buffer("order", torch.cat(order).argsort(), persistent=False)

    order: Tensor

    def forward(self, x: Tensor) -> Tensor:
        x = self.border(_image(x, self.profile, self.dims))
        x = x.unsqueeze(2) if self.dims == 1 else x
        g = self.geometry
        height, width = (
            (size + 2 * p - d * (k - 1) - 1) // s + 1
            for size, p, d, k, s in zip(x.shape[2:], g.padding, g.dilation, g.kernel, g.stride)
        )
        patches = F.unfold(x, g.kernel, g.dilation, g.padding, g.stride).transpose(1, 2)
        groups = [affine(patches[..., getattr(self, f"columns{i}")]) for i, affine in enumerate(self.affine)]
        y = torch.cat(groups, -1)[..., self.order].transpose(1, 2).unflatten(2, (height, width))
        return y.squeeze(2) if self.dims == 1 else y


def _dense(rows: Tensor, groups: int) -> Tensor:
    """Rows of a grouped convolution among the inputs of all groups."""
    if groups == 1:
        return rows
    whole = rows.new_zeros(len(rows), groups, rows.shape[1])
    for g, part in enumerate(rows.chunk(groups)):
        whole[g * len(part) : (g + 1) * len(part), g] = part
    return whole.flatten(1)


# Normalisation ----------------------------------------------------------------------------------------------------


def standardised(x: Tensor, axes: tuple[int, ...], eps: float, centred: bool = True) -> Tensor:
    """(x − mean) / √(variance + eps) over ``axes``; with ``centred=False``, x / √(mean square + eps).

    The two moments are those of x rounded to 4096 steps of its largest value (in float64 2²⁰), sums of whole numbers.
    """
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    bits = 12 if x.dtype == torch.float32 else min(20, (53 - count.bit_length()) // 2)
    limit = torch.full((), 2.0**bits, dtype=x.dtype, device=x.device)
    ints, unit = whole_activations(x, limit, axes)
    n, unit = torch.full((), float(count), dtype=torch.float64, device=x.device), unit.double()
    square = (ints * ints).sum(axes, True, dtype=torch.float64) / n
    if centred:
        mean = ints.sum(axes, True, dtype=torch.float64) / n
        square = (square - mean * mean).clamp_(min=0.0)
        x = x - (mean * unit).to(x.dtype)
    deviation = sqrt(square * unit * unit + eps).clamp_(min=SMALLEST)
    return x * (torch.ones_like(deviation) / deviation).to(x.dtype)


class Normalisation(Rule):
    """Layer, group or root-mean-square normalisation, with its learned scale and shift.

    Args:
        groups: of channels, each normalised with all its places; None normalises the last axes instead.
        last: number of these axes.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        layer: nn.LayerNorm | nn.GroupNorm | nn.RMSNorm,
        profile: Profile,
        groups: int | None = None,
    ) -> None:
        super().__init__()
        self.profile, self.groups = profile, groups
        self.centred = not isinstance(layer, nn.RMSNorm)
        self.eps = float(torch.finfo(torch.float32).eps if layer.eps is None else layer.eps)
        self.last = 0 if isinstance(layer, nn.GroupNorm) else len(layer.normalized_shape)
        for name in ("weight", "bias"):
            value = getattr(layer, name, None)
            self.register_buffer(name, None if value is None else value.detach().to(profile.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype == self.profile.dtype else x.to(self.profile.dtype)
        if self.groups:
            grouped = x.reshape(len(x), self.groups, -1)
            y = standardised(grouped, (2,), self.eps).reshape(x.shape)
            shape: tuple[int, ...] = (-1, *[1] * (x.dim() - 2))
        else:
            y = standardised(x, tuple(range(x.dim() - self.last, x.dim())), self.eps, self.centred)
            shape = tuple(x.shape[x.dim() - self.last :])
        y = y if self.weight is None else y * self.weight.reshape(shape)
        return y if self.bias is None else y + self.bias.reshape(shape)


class FixedNormalisation(Rule):
    """Batch normalisation with the statistics of training: a product and a sum for each channel."""

    factor: Tensor
    mean: Tensor
    shift: Tensor

    def __init__(self, layer: nn.BatchNorm1d | nn.BatchNorm2d, profile: Profile) -> None:
        super().__init__()
        if layer.running_mean is None or layer.running_var is None:
            raise Uncovered("batch normalisation without running statistics depends on the batch")
        self.profile = profile
        factor = torch.ones_like(layer.running_var.double()) / sqrt(layer.running_var.double() + layer.eps)
        if layer.weight is not None:
            factor = factor * layer.weight.detach().double()
        shift = torch.zeros_like(factor) if layer.bias is None else layer.bias.detach()
        for name, value in (("factor", factor), ("mean", layer.running_mean), ("shift", shift)):
            self.register_buffer(name, value.to(profile.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, *[1] * (x.dim() - 2))
        y = (x.to(self.profile.dtype) - self.mean.reshape(shape)) * self.factor.reshape(shape)
        return y + self.shift.reshape(shape)
