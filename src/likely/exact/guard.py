"""For tests: a watch over every kernel that runs, those of the rules included."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from likely.exact.products import inside_product
from likely.exact.profiles import Uncovered

_NAMES = """
    abs add amax amin ceil clamp clamp_min clamp_max floor hardtanh leaky_relu maximum minimum mul neg prelu
    _prelu_kernel relu round rsub sign sub threshold trunc
    eq ge gt isfinite isinf isnan le lt ne logical_and logical_not logical_or logical_xor bitwise_and bitwise_not
    bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__ __rshift__
    all any cummax equal argmax argmin max max_pool2d_with_indices min sort
    _local_scalar_dense _reshape_alias _to_copy _unsafe_view alias
    arange as_strided cat channel_shuffle clone constant_pad_nd copy detach embedding empty empty_like empty_strided
    expand eye fill flip full full_like gather im2col index index_put index_select is_same_size lift_fresh
    masked_fill nan_to_num native_channel_shuffle new_empty new_empty_strided new_full new_ones new_zeros nonzero
    ones ones_like permute pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d repeat replication_pad1d
    replication_pad2d resize scalar_tensor select slice slice_scatter split split_with_sizes squeeze stack t to
    transpose tril triu unbind unfold unsqueeze upsample_nearest1d upsample_nearest2d view where zero zeros
    zeros_like
"""
#: Kernels that move numbers, make them, compare them, or are one IEEE operation (conversions between types included).
KERNELS = frozenset(_NAMES.split())

#: Kernels that sum products, in whatever order: inside a certified product only.
PRODUCTS = frozenset(
    {"mm", "addmm", "bmm", "linear", "convolution", "mkldnn_convolution", "_linear_pointwise", "_reorder_linear_weight"}
)


class Guard(TorchDispatchMode):
    """Refuses every kernel that could differ from one machine to another; ``seen`` collects the names of all.

    >>> with Guard():
    ...     torch.ones(2) + 1
    tensor([2., 2.])
    >>> with Guard():
    ...     torch.ones(2).exp()
    Traceback (most recent call last):
    likely.exact.profiles.Uncovered: kernel aten.exp.default: not the same on every machine
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        name = function._schema.name.rpartition("::")[2]
        plain = name if name.startswith("__") else name.rstrip("_")
        self.seen.add(plain)
        reason = _reason(plain, args, named)
        if reason is not None:
            raise Uncovered(f"kernel {function}: {reason}")
        return function(*args, **named)


def _reason(name: str, args: tuple[Any, ...], named: dict[str, Any]) -> str | None:
    """Why a kernel is refused."""
    if named.get("alpha", 1) != 1 or (name in ("add", "sub", "rsub") and len(args) > 2 and args[2] != 1):
        return "multiplies and adds in one step"
    if name in PRODUCTS:
        return None if inside_product() else "a sum of products outside a certified one"
    if name == "div":
        exact = isinstance(args[1], Tensor) or math.frexp(abs(args[1]))[0] == 0.5  # a power of two
        return None if exact else "divides by a Python number"
    if name == "sum":
        return _reason_of_sum(args[0], named.get("dtype"))
    return None if name in KERNELS else "not the same on every machine"


def _reason_of_sum(x: Tensor, dtype: torch.dtype | None) -> str | None:
    """Sums of whole numbers are exact in any order, in integers or, below 2⁵³, in float64."""
    if not x.is_floating_point():
        return None
    if dtype != torch.float64 and x.dtype != torch.float64:
        return "sums floats in less than float64"
    x = x.detach()
    whole = bool((x == x.round()).all()) and float(x.abs().double().sum()) < 2.0**53
    return None if whole else "sums numbers that are not whole"


def guard() -> Guard:
    """A context in which every kernel is watched; slow, for tests.

    Raises:
        Uncovered: in the context, by a kernel that is not the same on every machine.
    """
    return Guard()
