"""Layers with weights, and normalisations, in whole numbers: what takes the place of PyTorch's own."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.exact.functions import sqrt
from likely.exact.products import Geometry, Kind, Product
from likely.exact.profiles import SMALLEST, Profile, Rule, Uncovered, peaks


def whole_weights(weight: Tensor, profile: Profile, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Weights as whole numbers (int64), and the scale of each row: weight ≈ whole · scale.

    Args:
        axes: the axes of one row, over which it is summed; kept in the scale with size 1.
    """
    weight = weight.detach().cpu().double()
    scale = (peaks(weight, axes) / torch.tensor(float(profile.largest_weight), dtype=torch.float64)).clamp_(
        min=SMALLEST
    )
    scale = scale.to(profile.dtype)
    return torch.round(weight / scale.double()).long(), scale


def whole_activations(x: Tensor, limit: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Activations as whole numbers of at most ``limit``, and their scale: x ≈ whole · scale.  One scale over ``dims``."""
    peak = peaks(x, dims).clamp_(min=SMALLEST)
    return torch.mul(x, limit / peak).round_(), (peak / limit).clamp_(min=SMALLEST)


class _Certified(Rule):
    """A product with whole weights, and what leads back from its sums to real numbers."""

    limit: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, product: Product, scale: Tensor, bias: Tensor | None, profile: Profile) -> None:
        super().__init__()
        self.product, self.profile = product, profile
        self.register_buffer("limit", torch.tensor(float(product.limit), dtype=profile.dtype), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        if bias is not None:
            bias = bias.detach().cpu().to(profile.dtype)
            bias = torch.where(bias.abs() < SMALLEST, 0.0, bias)
        self.register_buffer("bias", bias, persistent=False)

    def probe_input(self) -> Tensor:
        """Whole numbers on which the probe looks at the layer as a whole."""
        return self.product.probe_input().to(self.scale)


class Affine(_Certified):
    """x Wᵀ + b with a scale for each vector on the last axis."""

    def __init__(self, layer: nn.Linear, profile: Profile) -> None:
        weight, scale = whole_weights(layer.weight, profile, (1,))
        super().__init__(Product(weight, "linear", profile), scale.flatten(), layer.bias, profile)

    def forward(self, x: Tensor) -> Tensor:
        x = x if x.dtype == self.profile.dtype else x.to(self.profile.dtype)
        ints, scale = whole_activations(x, self.limit, (x.dim() - 1,))
        y = self.product(ints).mul_(scale).mul_(self.scale)
        return y if self.bias is None else y.add_(self.bias)


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


class Convolution(_Certified):
    """A convolution or its transpose in one or two dimensions, with a scale for each example."""

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

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        if output_size is not None:
            raise Uncovered("transposed convolution: output_size; give output_padding to the layer instead")
        x = self.border(_image(x, self.profile, self.dims))
        x = x.unsqueeze(2) if self.dims == 1 else x
        ints, scale = whole_activations(x, self.limit, (1, 2, 3))
        y = self.product(ints).mul_(scale * self.scale)
        y = y if self.bias is None else y.add_(self.bias)
        return y.squeeze(2) if self.dims == 1 else y

    def probe_input(self) -> Tensor:
        x = super().probe_input()
        return x.squeeze(2) if self.dims == 1 and x.shape[2] == 1 else x[:, :, 0] if self.dims == 1 else x


class CausalConvolution(Rule):
    """A convolution whose every output has scales of its own, from the inputs that it sees and no others.

    With one scale for the whole example an output would depend on inputs that a masked kernel hides from it, and a
    decoder does not have these yet.  Outputs are grouped by what they see (the mask of a masked layer, or else the zeros
    of its weights); each group is a matrix product on patches.
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
        self.columns: list[Tensor] = []
        order = []
        for number, pattern in enumerate(patterns):
            members = (group == number).nonzero().flatten()
            columns = pattern.nonzero().flatten()
            columns = columns if len(columns) else torch.zeros(1, dtype=torch.int64)
            linear = nn.Linear(len(columns), len(members), bias=layer.bias is not None, dtype=weight.dtype)
            linear.weight = nn.Parameter(rows[members][:, columns], requires_grad=False)
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.detach().cpu()[members], requires_grad=False)
            self.affine.append(Affine(linear, profile))
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
        self.last = 0 if groups else len(layer.normalized_shape)  # type: ignore[union-attr]
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
