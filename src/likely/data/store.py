"""Rows gathered chunk by chunk, in memory up to a limit and beyond it in a memory-mapped file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

#: Bytes of examples held in memory before they go to a file.
MEMORY_LIMIT = 1 << 30
_HEADER = 256  # bytes reserved for the .npy header, a multiple of 64 as the format asks


def as_tensor(array: np.ndarray) -> Tensor:
    """A tensor over the same memory where torch has the dtype, and over a widened copy where it has not."""
    if array.dtype == np.bool_:
        array = array.view(np.uint8)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    widened = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64, "float16": np.float32}.get(array.dtype.name)
    if widened is not None:
        array = array.astype(widened)
    elif array.dtype.kind == "f" and array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if any(stride < 0 for stride in array.strides) or not (array.flags.writeable or isinstance(array, np.memmap)):
        array = array.copy()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*NumPy array is not writable")  # a map: nothing writes to examples
        return torch.from_numpy(array)


def map_npy(path: Path) -> np.ndarray:
    """A .npy file as a memory map: copy-on-write, or read-only where the system refuses that.

    Linux counts a private writable map as memory that may be needed: it refuses one of a file that is larger than
    memory and swap together, or than ``ulimit -d``.  A read-only map it grants whatever the size.
    """
    try:
        return np.load(path, mmap_mode="c", allow_pickle=False)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        return np.load(path, mmap_mode="r", allow_pickle=False)


class Store:
    """Gathers chunks of rows and gives them back as one tensor.

    Args:
        shape: shape of one row.
        dtype: dtype of the rows.
        path: file to use once ``limit`` is passed; None uses an unnamed temporary file that vanishes with the tensor.
        limit: bytes held in memory before the rows go to the file.
        stamp: written beside a named file when it is complete, see :func:`reuse`.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype | type,
        path: Path | None = None,
        limit: int | None = None,
        stamp: Mapping[str, Any] | None = None,
    ) -> None:
        self._shape, self._dtype, self._path, self._stamp = shape, np.dtype(dtype), path, stamp
        self._limit = MEMORY_LIMIT if limit is None else limit
        self._chunks: list[np.ndarray] = []
        self._rows = self._bytes = 0
        self._file: BinaryIO | None = None
        self._temporary: Path | None = None

    def append(self, chunk: np.ndarray) -> None:
        """Add rows, shape ``(rows, *shape)``."""
        chunk = np.ascontiguousarray(chunk, dtype=self._dtype)
        self._rows += len(chunk)
        self._bytes += chunk.nbytes
        if self._file is None and self._bytes <= self._limit:
            self._chunks.append(chunk)
            return
        if self._file is None:
            self._file = self._open()
            for earlier in self._chunks:
                earlier.tofile(self._file)
            self._chunks = []
        chunk.tofile(self._file)

    def _open(self) -> BinaryIO:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        folder = None if self._path is None else self._path.parent
        handle, name = tempfile.mkstemp(suffix=".npy.part", dir=folder)
        self._temporary = Path(name)
        file = os.fdopen(handle, "wb")
        file.write(b"\0" * _HEADER)
        return file

    def finish(self) -> Tensor:
        """All rows as one tensor; a memory map if they passed the limit."""
        return as_tensor(self.array())

    def array(self) -> np.ndarray:
        """All rows as one array; a memory map if they passed the limit."""
        if self._file is None:
            rows = np.concatenate(self._chunks) if self._chunks else np.empty((0, *self._shape), self._dtype)
            self._chunks = []
            return rows
        assert self._temporary is not None
        self._file.seek(0)
        self._file.write(_npy_header((self._rows, *self._shape), self._dtype))
        self._file.close()
        if self._path is None:
            array = map_npy(self._temporary)
            with contextlib.suppress(OSError):  # where an open file cannot be removed it stays in the temporary folder
                self._temporary.unlink()
            return array
        self._temporary.replace(self._path)
        _stamp_path(self._path).write_text(json.dumps(self._stamp), encoding="utf-8")
        return map_npy(self._path)

    def abandon(self) -> None:
        """Remove what was written so far."""
        if self._file is not None:
            self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)


def reuse(path: Path | None, stamp: Mapping[str, Any]) -> Tensor | None:
    """The rows that an earlier :class:`Store` left in ``path``, if it was complete and bore the same stamp."""
    if path is None or not path.exists() or not _stamp_path(path).exists():
        return None
    if json.loads(_stamp_path(path).read_text(encoding="utf-8")) != json.loads(json.dumps(stamp)):
        return None
    return as_tensor(map_npy(path))


def _stamp_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _npy_header(shape: tuple[int, ...], dtype: np.dtype) -> bytes:
    """Version 1.0 header of a C-ordered .npy file, padded to the reserved length."""
    text = repr({"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})
    body = text.encode("latin-1").ljust(_HEADER - 11) + b"\n"
    assert len(body) == _HEADER - 10
    return b"\x93NUMPY\x01\x00" + len(body).to_bytes(2, "little") + body
