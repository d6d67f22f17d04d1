"""Products of integers held in floats: matrix products and convolutions whose every partial sum is exact.

A sum of whole numbers is exact in float32 while its partial sums stay below 2²⁴, in whatever order, by whatever
library, with fused multiply-adds or without.  So a *certificate* is drawn from the weights themselves: with S the
largest sum of absolute values of a row of whole weights, activations may be whole numbers up to ⌊(2²⁴ − 1) / S⌋.

The same product may be had by several *routes*.  They give the same bits; one that does not, on some machine, is found
by :meth:`Product.passes` and left aside.  ``tiles``: processors with a unit for bfloat16 (AMX) multiply such matrices
several times faster than float32; a whole number up to 256 is a bfloat16, a larger one the sum of two.
"""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.exact.profiles import Irreproducible, Profile
from likely.processor import LARGE, ONEDNN, TILES, alone, rounded_factors

Route = Literal["tiles", "native", "shifted", "float64"]
#: In the order in which they are tried.
ROUTES: tuple[Route, ...] = ("tiles", "native", "shifted", "float64")

#: Whole numbers up to this are exact in bfloat16.
_BFLOAT16 = 256
#: The upper half of the 32 bits of a float, which is a bfloat16.
_UPPER = -(1 << 16)
#: Outputs from which a product by tiles is the faster one, and multiply-adds above which it is.
_WIDE, _TILED = 64, 1 << 22

Kind = Literal["linear", "conv", "transposed"]

_state = threading.local()


def inside_product() -> bool:
    """Whether a certified product is under way in this thread: inside, any order of summation is right."""
    return getattr(_state, "depth", 0) > 0


@dataclass(frozen=True)
class Geometry:
    """How a convolution walks: the arguments of PyTorch's own, two numbers an axis."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    output_padding: tuple[int, int] = (0, 0)
    groups: int = 1


class _Routed(nn.Module):
    """A product that can be had by several routes."""

    route: Route = "native"
    #: Routes that differ for this product.
    routes: tuple[Route, ...] = ("native", "shifted", "float64")

    def passes(self, route: Route, device: torch.device) -> bool:
        """Whether the route gives the right sums on the device, for the input of the probe."""
        raise NotImplementedError

    def choose(self, device: torch.device, route: Route | None = None) -> None:
        """Take the given route, or the first that passes the probe: also in place of tiles that may not be used now.

        Raises:
            Irreproducible: none passes.
        """
        if route == "tiles" and not alone():
            route = None
        candidates = self.routes if route not in self.routes else (route,)
        for candidate in candidates:
            if self.passes(candidate, device):
                self.route = candidate
                return
        raise Irreproducible(
            f"{type(self).__name__} on {device}: sums of whole numbers are wrong by route {' and by '.join(candidates)}"
        )


class Product(_Routed):
    """Exact sums of products with whole weights.

    Args:
        weight: whole numbers, int64, in the layout of PyTorch's own layer of that kind.
        kind: ``linear``, ``conv`` or ``transposed``.
        geometry: of the convolution.
        profile: what the sums are held to.

    ``limit`` is the certificate: activations may be whole numbers from −limit to limit.
    """

    block0: Tensor

    def __init__(self, weight: Tensor, kind: Kind, profile: Profile, geometry: Geometry | None = None) -> None:
        super().__init__()
        self.kind, self.profile, self.geometry = kind, profile, geometry or Geometry()
        self.inputs = weight.shape[0] if kind == "transposed" else weight.shape[1] * self.geometry.groups
        cuts = self._cuts(weight)
        self.limit = min(self._certified(part) for part in _cut(weight, cuts, kind))
        self.limit = min(self.limit, profile.largest_activation)
        self.cuts = cuts
        if kind == "linear":
            self.routes = ("tiles", "native", "float64") if self._suits_tiles(weight) else ("native", "float64")
        self._packed: dict[int, Tensor] = {}
        self._doubled: dict[int, Tensor] = {}
        layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
        for number, part in enumerate(_cut(weight, cuts, kind)):
            block = part.to(profile.dtype).contiguous(memory_format=layout)
            self.register_buffer(f"block{number}", block, persistent=False)

    @property
    def blocks(self) -> list[Tensor]:
        """The weights, cut at their inputs."""
        return [getattr(self, f"block{number}") for number in range(len(self.cuts))]

    def _cuts(self, weight: Tensor) -> list[int]:
        """Sizes of the blocks of input channels: one, or as few as give activations enough room."""
        whole = self._certified(weight)
        channels = weight.shape[0] if self.kind == "transposed" else weight.shape[1]
        if whole >= self.profile.least_activation or self.geometry.groups > 1:
            return [channels]
        for blocks in range(2, channels + 1):
            cuts = [channels * (b + 1) // blocks - channels * b // blocks for b in range(blocks)]
            if (
                min(self._certified(part) for part in _cut(weight, cuts, self.kind))
                >= 2 * self.profile.least_activation
            ):
                return cuts
        return [1] * channels

    def _certified(self, weight: Tensor) -> int:
        return self.profile.largest_sum // max(1, int(self._row_sums(weight).max()))

    def _row_sums(self, weight: Tensor) -> Tensor:
        """Σ |w| over all weights that one output sums."""
        size = weight.abs()
        if self.kind != "transposed":
            return size.flatten(1).sum(1)
        # In a transposed convolution an output meets every ``stride``-th tap only.
        groups, g = self.geometry.groups, self.geometry
        size = size.reshape(groups, -1, *size.shape[1:]).sum(1).flatten(0, 1)
        if g.dilation != (1, 1):
            return size.flatten(1).sum(1)
        phases = [
            size[:, i :: g.stride[0], j :: g.stride[1]].sum((1, 2))
            for i in range(g.stride[0])
            for j in range(g.stride[1])
        ]
        return torch.stack(phases).amax(0)

    def forward(self, ints: Tensor) -> Tensor:
        """The sums for whole numbers of at most ``limit``, in the profile's dtype (a sum of blocks rounded to it)."""
        return self.by(self.route, ints)

    def by(self, route: Route, ints: Tensor) -> Tensor:
        """The sums by a given route."""
        _state.depth = getattr(_state, "depth", 0) + 1
        try:
            if len(self.cuts) == 1:
                return _dense(self._part(route, ints, self.block0).to(self.profile.dtype))
            axis = -1 if self.kind == "linear" else 1
            total: Tensor | None = None
            for piece, weight in zip(ints.split(self.cuts, axis), self.blocks):
                sums = self._part(route, piece, weight).double()
                total = sums if total is None else total.add_(sums)
            assert total is not None
            return _dense(total.to(self.profile.dtype))
        finally:
            _state.depth -= 1

    def _part(self, route: Route, x: Tensor, weight: Tensor) -> Tensor:
        if route == "float64":
            x, weight = x.double(), weight.double()
        if self.kind == "linear":
            large = route == "tiles" and x.device.type == "cpu" and x.numel() * len(weight) > self._least_tiled
            return self._tiled(x, weight) if large and alone() else self._matrix_product(x, weight)
        if route == "shifted":
            return _shifted(x, weight, self.kind, self.geometry)
        g = self.geometry
        if self.kind == "conv":
            return F.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups)
        return F.conv_transpose2d(x, weight, None, g.stride, g.padding, g.output_padding, g.groups, g.dilation)

    def _suits_tiles(self, weight: Tensor) -> bool:
        """Whether weights are exact in bfloat16, and activations in two of them, on a processor that has tiles."""
        exact = self.profile.dtype == torch.float32 and int(weight.abs().max()) <= _BFLOAT16
        return TILES and exact and min(self.cuts) >= _WIDE and weight.shape[0] >= _WIDE * self._parts**3

    @property
    def _parts(self) -> int:
        """How many numbers of bfloat16 an activation needs."""
        return 1 if self.limit <= _BFLOAT16 else 2

    @property
    def _least_tiled(self) -> int:
        return _TILED * self._parts**2

    def _tiled(self, x: Tensor, weight: Tensor) -> Tensor:
        """The product by tiles of bfloat16, whose sums are float32: of activations, or of their upper and lower bits.

        The parts of a number have its sign and add up to it, so the partial sums are bounded as they were.
        """
        rows = x.reshape(-1, x.shape[-1])
        if self._parts == 2:
            inputs = x.shape[-1]
            halves = rows.new_empty(len(rows), 2 * inputs)
            upper, lower = halves.split(inputs, 1)
            torch.bitwise_and(rows.view(torch.int32), _UPPER, out=upper.view(torch.int32))
            torch.sub(rows, upper, out=lower)
            rows = halves
            if id(weight) not in self._doubled:
                self._doubled[id(weight)] = weight.repeat(1, 2)
            weight = self._doubled[id(weight)]
        with rounded_factors():
            y = F.linear(rows, weight)
        return y.view(*x.shape[:-1], len(weight))

    def _matrix_product(self, x: Tensor, weight: Tensor) -> Tensor:
        if not (ONEDNN and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() * len(weight) >= LARGE):
            return F.linear(x, weight)
        packed = self._packed.get(id(weight))
        if packed is None:  # oneDNN's own layout, from which it multiplies a little faster
            packed = self._packed[id(weight)] = torch.ops.mkldnn._reorder_linear_weight(weight, 256)
        y = torch.ops.mkldnn._linear_pointwise(x.reshape(-1, x.shape[-1]), packed, None, "none", [], "")
        return y.view(*x.shape[:-1], len(weight))

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_packed": {}, "_doubled": {}}  # the former cannot be copied

    # The probe ------------------------------------------------------------------------------------------------

    def probe_input(self) -> Tensor:
        """Fixed whole numbers: at random, and such that one output's sum is the largest there is, and an odd one."""
        weight = self._weight(torch.int64)
        if self.kind == "linear":
            x = pseudo_random((4, self.inputs), self.limit)
            worst = weight[self._row_sums(weight).argmax()]
            x[0] = self._largest_odd(worst)
            return x
        g = self.geometry
        span = [d * (k - 1) + 6 for k, d in zip(g.kernel, g.dilation)]
        x = pseudo_random((1, self.inputs, *span), self.limit)
        worst, channels = self._worst_kernel(weight)
        if self.kind == "conv":  # where the kernel lies wholly inside, at a place that is computed
            rows, columns = (
                (-p % s) + d * torch.arange(k) for k, s, p, d in zip(g.kernel, g.stride, g.padding, g.dilation)
            )
        else:  # an output sees the taps of its phase, the first at the largest distance
            phases = [(i, j) for i in range(g.stride[0]) for j in range(g.stride[1])]
            i, j = max(phases, key=lambda ij: int(worst[:, ij[0] :: g.stride[0], ij[1] :: g.stride[1]].abs().sum()))
            worst = worst[:, i :: g.stride[0], j :: g.stride[1]]
            rows, columns = (span[a] - 2 - torch.arange(worst.shape[1 + a]) for a in (0, 1))
        if min(*rows, *columns) >= 0 and max(rows) < span[0] and max(columns) < span[1]:
            x[0][channels[:, None, None], rows[:, None], columns] = self._largest_odd(worst)
        return x

    def _largest_odd(self, weight: Tensor) -> Tensor:
        """The inputs whose product with a row is the largest, or if that is even the next smaller odd one."""
        weight = weight.contiguous()
        size = weight.abs()
        x = torch.where(weight < 0, -self.limit, self.limit)
        odd = int((size * (size % 2)).argmax())
        if int(size.sum()) * self.limit % 2 == 0 and size.view(-1)[odd] % 2:
            x.view(-1)[odd] -= x.view(-1)[odd].sign()
        return x

    def _weight(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([part.detach().cpu().to(dtype) for part in self.blocks], 0 if self.kind == "transposed" else 1)

    def _worst_kernel(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel with the largest sum, ``(channels, height, width)``, and its input channels."""
        number = int(self._row_sums(weight).argmax())
        groups = self.geometry.groups
        channels = torch.arange(self.inputs).chunk(groups)
        if self.kind == "conv":
            return weight[number], channels[number // (weight.shape[0] // groups)]
        group, output = divmod(number, weight.shape[1])
        return weight[channels[group], output], channels[group]

    def passes(self, route: Route, device: torch.device) -> bool:
        if route == "tiles" and not alone():
            return False
        x = self.probe_input()
        right = self.reference(x).to(self.profile.dtype)
        times = 64 if self.kind == "linear" else 16
        if route == "tiles":
            times = max(times, self._least_tiled // (x.numel() * len(self.block0)) + 1)
        batches = [x, x.repeat(times, *[1] * (x.dim() - 1))]  # small and large
        sums = [self.by(route, batch.to(device, self.profile.dtype)).cpu() for batch in batches]
        return all(torch.equal(s, right.repeat(len(s) // len(right), *[1] * (s.dim() - 1))) for s in sums)

    def reference(self, x: Tensor) -> Tensor:
        """The sums by another way, on the processor: in float64, or for the profile of float64 in int64."""
        dtype = torch.float64 if self.profile.dtype == torch.float32 else torch.int64
        weight = self._weight(dtype)
        if self.kind == "linear":
            return x.to(dtype) @ weight.t()
        return _shifted(x.to(dtype), weight, self.kind, self.geometry)


class BatchedProduct(_Routed):
    """Exact sums in products of two batches of matrices, both of whole numbers; the caller sees to the limits."""

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.profile = profile
        self.routes = ("native", "float64")

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.by(self.route, a, b)

    def by(self, route: Route, a: Tensor, b: Tensor) -> Tensor:
        """The sums by a given route."""
        _state.depth = getattr(_state, "depth", 0) + 1
        try:
            return (a.double() @ b.double()).to(a.dtype) if route == "float64" else a @ b
        finally:
            _state.depth -= 1

    def probe_input(self) -> tuple[Tensor, Tensor]:
        """Two batches whose products come close to the largest sum."""
        width = 64
        limit = min(self.profile.largest_activation, math.isqrt(self.profile.largest_sum // width))
        a = pseudo_random((2, 33, width), limit)
        a[:, 0] = torch.where(a[:, 0] < 0, -limit, limit)
        b = a.clone()
        b[:, :, 0] -= b[:, :, 0].sign()
        return a, b.transpose(1, 2)

    def passes(self, route: Route, device: torch.device) -> bool:
        a, b = self.probe_input()
        sums = self.by(route, a.to(device, self.profile.dtype), b.to(device, self.profile.dtype))
        return torch.equal(sums.cpu().long(), a @ b)


def pseudo_random(shape: Sequence[int], limit: int) -> Tensor:
    """Whole numbers from −limit to limit, int64, a fixed function of the shape: a generator of our own, splitmix64."""
    mask = (1 << 64) - 1
    count = math.prod(shape)
    z = (torch.arange(1, count + 1, dtype=torch.int64) * (0x9E3779B97F4A7C15 - mask - 1)) + limit
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * (factor - mask - 1)
    z = (z ^ ((z >> 31) & ((1 << 33) - 1))) & ((1 << 62) - 1)
    return (z % (2 * limit + 1) - limit).reshape(tuple(shape))


def _cut(weight: Tensor, cuts: list[int], kind: Kind) -> Sequence[Tensor]:
    return weight.split(cuts, 0 if kind == "transposed" else 1)


def _dense(x: Tensor) -> Tensor:
    """x without gaps in memory, its channels last or its axes in order."""
    dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    return x if dense else x.contiguous()


def _shifted(x: Tensor, weight: Tensor, kind: Kind, g: Geometry) -> Tensor:
    """A convolution as one matrix product for each tap of the kernel, of shifted views of the image."""
    n, _, height, width = x.shape
    (kh, kw), (sh, sw), (ph, pw), (dh, dw) = g.kernel, g.stride, g.padding, g.dilation
    per_group = weight.shape[1] if kind == "transposed" else weight.shape[0] // g.groups
    if kind == "conv":
        x = F.pad(x, (pw, pw, ph, ph))
        rows = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1
        columns = (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
        out = x.new_zeros(n, rows, columns, g.groups * per_group)
    else:
        rows, columns = (height - 1) * sh + dh * (kh - 1) + 1, (width - 1) * sw + dw * (kw - 1) + 1
        out = x.new_zeros(n, rows + g.output_padding[0], columns + g.output_padding[1], g.groups * per_group)
    inputs = x.permute(0, 2, 3, 1).chunk(g.groups, 3)
    outputs = out.chunk(g.groups, 3)
    weights = weight.chunk(g.groups, 0)
    for i in range(kh):
        for j in range(kw):
            down, right = (
                slice(i * dh, i * dh + (rows - 1) * sh + 1, sh),
                slice(j * dw, j * dw + (columns - 1) * sw + 1, sw),
            )
            for source, target, w in zip(inputs, outputs, weights):
                if kind == "conv":
                    target += source[:, down, right] @ w[:, :, i, j].t()
                else:
                    down = slice(i * dh, i * dh + (height - 1) * sh + 1, sh)
                    right = slice(j * dw, j * dw + (width - 1) * sw + 1, sw)
                    target[:, down, right] += source @ w[:, :, i, j]
    if kind == "transposed":
        out = out[:, ph : out.shape[1] - ph, pw : out.shape[2] - pw]
    return out.permute(0, 3, 1, 2)


@contextlib.contextmanager
def full_precision_products(device: torch.device) -> Iterator[None]:
    """Products in the precision of their operands: no TensorFloat-32, no bfloat16, no autocast, no lost subnormals."""
    backends: Any = torch.backends
    switches = (
        (backends.cuda.matmul, backends.cudnn.conv)
        if device.type == "cuda"
        else (backends.mkldnn.matmul, backends.mkldnn.conv)
    )
    before = [switch.fp32_precision for switch in switches]
    reduced = [(switch, old) for switch, old in zip(switches, before) if old not in ("ieee", "none")]
    for switch, _ in reduced:
        switch.fp32_precision = "ieee"
    try:
        with gradual_underflow():
            if torch.is_autocast_enabled(device.type):
                with torch.autocast(device.type, enabled=False):
                    yield
            else:
                yield
    finally:
        for switch, old in reduced:
            switch.fp32_precision = old


@contextlib.contextmanager
def gradual_underflow() -> Iterator[None]:
    """Subnormal numbers as IEEE 754 has them, where this thread is set to flush them to zero."""
    flushed = sys.float_info.min * 0.5 == 0.0
    if flushed:
        torch.set_flush_denormal(False)
    try:
        yield
    finally:
        if flushed:
            torch.set_flush_denormal(True)
