"""Matrices in optimisers: products, roots, eigenbases, orthogonalisation, and how a tensor becomes matrices.

Everything here works on batches: the first axis counts matrices (or tensors) of equal shape, which one call then
serves.  Nothing here knows an optimiser.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# --------------------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------------------

#: Multiply-adds from which one product of float32 goes to oneDNN where that is the faster library.
LARGE = 1 << 20
#: Rows from which only one triangle of a symmetric product is computed, and the strips it is computed in.
TALL, STRIPS = 768, 4


def _prefers_onednn() -> bool:
    """Whether this is an AMD processor with AVX-512, where MKL uses half of the vector unit and oneDNN all of it."""
    processor: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        "AMD" in str(processor.get("cpu_name"))
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


#: Whether oneDNN multiplies large float32 matrices faster than what ``torch.matmul`` calls.
ONEDNN = _prefers_onednn()


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bfloat16 natively, faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, of shapes ``(batch, m, k)`` and ``(batch, k, n)``, with the faster of PyTorch's libraries for it.

    Which library serves depends on the processor, the type and the shape alone, so that a run repeats to the bit.
    """
    one = a.shape[1] * a.shape[2] * b.shape[2]
    if (
        ONEDNN
        and one >= LARGE
        and a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and not torch.compiler.is_compiling()
    ):
        multiply = torch.ops.mkldnn._linear_pointwise  # x wᵀ
        each = [multiply(x, y.mT, None, "none", [], "") for x, y in zip(a, b)]
        return each[0][None] if len(each) == 1 else torch.stack(each)
    if len(a) == 1:
        return (a[0] @ b[0])[None]
    return a @ b


def gram(x: Tensor) -> Tensor:
    """x xᵀ, of shape ``(batch, m, m)`` for ``(batch, m, n)``; from one triangle where that saves time."""
    m = x.shape[1]
    if m < TALL:
        return product(x, x.mT)
    return _symmetric(m, x, lambda low, high: product(x[:, low:high], x[:, :high].mT))


def _symmetric(m: int, like: Tensor, strip: "Strip") -> Tensor:
    """The symmetric matrix of which ``strip(low, high)`` gives rows ``low:high`` and columns ``:high``."""
    out = like.new_empty(len(like), m, m)
    step = -(-m // STRIPS)
    for low in range(0, m, step):
        high = min(m, low + step)
        rows = strip(low, high)
        out[:, low:high, :high] = rows
        out[:, :low, low:high] = rows[:, :, :low].mT
    return out
