"""What the machine at hand multiplies fast."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch


def _prefers_onednn() -> bool:
    processor: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return (
        "AMD" in str(processor.get("cpu_name"))
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch._C, "_are_functorch_transforms_active")
    )


#: Whether oneDNN multiplies large float32 matrices faster than MKL, PyTorch's own choice: on an AMD processor with
#: AVX-512 MKL uses half of the vector unit.
ONEDNN = _prefers_onednn()
#: Multiply-adds of one product from which it does, its call being dearer by 10 µs.
LARGE = 1 << 21
#: Whether it multiplies bfloat16 by tiles (AMX), an order of magnitude faster than float32.
TILES = bool(torch.cpu._is_amx_tile_supported())


#: Packages whose threads redraw a progress bar and multiply nothing.
_IDLE = frozenset({"rich", "tqdm"})


def alone() -> bool:
    """Whether no other thread of this process may multiply: only then may a switch of the whole process be thrown.

    >>> alone()
    True
    >>> other = threading.Timer(10.0, print)
    >>> other.start()
    >>> alone()
    False
    >>> other.cancel()
    """
    if threading.active_count() == 1:
        return True
    here = threading.current_thread()
    return all(thread is here or _idle(thread) for thread in threading.enumerate())


def _idle(thread: threading.Thread) -> bool:
    return getattr(thread, "multiplies", True) is False or type(thread).__module__.partition(".")[0] in _IDLE


@contextlib.contextmanager
def rounded_factors() -> Iterator[None]:
    """Products of float32 matrices of factors rounded to bfloat16, added up in float32, where the processor has that.

    PyTorch's switch is the whole process's: only for a thread that is :func:`alone`.
    """
    backends: Any = torch.backends
    switch = backends.mkldnn.matmul
    before = switch.fp32_precision
    switch.fp32_precision = "bf16"
    try:
        yield
    finally:
        switch.fp32_precision = "none"  # as the wider settings say, by default
        if switch.fp32_precision != before:
            switch.fp32_precision = before


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bfloat16 natively, faster than float32.

    >>> multiplies_bfloat16(torch.device("meta"))
    False
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (TILES or bool(torch.cpu._is_avx512_bf16_supported()))
