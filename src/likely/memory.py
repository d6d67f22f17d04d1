"""Memory: what a process keeps, and what the machine has left."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

#: Numbers of glibc's ``mallopt``: memory at the heap's end that is kept when freed, and the size of a block from which
#: on it is mapped by itself and so never kept; and what they are set to, the latter to the most there is.
_TRIM, _MAP = (-1, 256 << 20), (-3, 32 << 20)
#: Numbers that training holds for each weight beside it: gradient, two moments, and the best so far.
TRAINED_COPIES = 4


@functools.cache
def keep_memory() -> None:
    """Let this process keep up to 256 MiB of the memory that it frees, for good; where the C library is glibc.

    By default a large tensor's memory goes back to the system when the tensor is freed, and the next tensor starts with
    pages that have to be found and cleared: a fifth of the time of a convolutional network in batches of some MB.
    Does nothing where the environment has settings of its own (``MALLOC_…``).
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for parameter, value in (_TRIM, _MAP):
            library.mallopt(parameter, value)


class TooLittleMemory(MemoryError, ValueError):
    """What was asked for needs more memory than is free; the message says how much, and what to do."""


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be taken on a device, before the system ends this process; None where that is not known."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu" or sys.platform != "linux":
        return None
    try:
        words = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        free = next(1024 * int(word[1]) for word in words if word[0] == "MemAvailable:")
    except (OSError, StopIteration):
        return None
    with contextlib.suppress(OSError, ValueError):  # a container's own limit, if it has one
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        free = min(free, limit - int((group / "memory.current").read_text()))
    return free


def check_training_memory(
    model: str, parameters: Sequence[torch.Tensor], copies: int, free: int, kept: int = 0, batch: int = 0
) -> None:
    """Refuse a training that cannot fit into memory.

    Args:
        model: its name.
        parameters: its weights.
        copies: how many numbers are still to be held for each of them.
        free: bytes that are free.
        kept: bytes that a batch of ``batch`` examples keeps for its gradients.

    Raises:
        TooLittleMemory: more is needed than is free.
    """
    need = copies * sum(p.numel() * p.element_size() for p in parameters)
    if need + kept <= free:
        return
    number = sum(p.numel() for p in parameters)
    of_batch = f", a batch of {batch} {spoken(kept)}" if kept else ""
    raise TooLittleMemory(
        f"model {model!r} is too large to be trained here: {number:,} weights with gradients, moments and the best so "
        f"far take {spoken(need)}{of_batch}, and {spoken(free)} of memory are free; take smaller examples (images: "
        f"--size), a smaller network, or smaller batches (batch_size, or accumulate, which leaves the result as it is)"
    )


def spoken(size: float) -> str:
    """A number of bytes in words.

    >>> spoken(5 * 2**30), spoken(3 * 2**20)
    ('5.0 GiB', '3 MiB')
    """
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
