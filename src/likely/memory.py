"""Memory that a process keeps."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys

#: Numbers of glibc's ``mallopt``: memory at the heap's end that is kept when freed, and the size of a block from which
#: on it is mapped by itself and so never kept; and what they are set to, the latter to the most there is.
_TRIM, _MAP = (-1, 256 << 20), (-3, 32 << 20)


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
