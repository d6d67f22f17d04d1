"""What the user handed over: a path, standard input, the name of an embedded set, or an object of a known library."""

from __future__ import annotations

import atexit
import bz2
import contextlib
import difflib
import gzip
import importlib
import io
import lzma
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch

from likely.data.errors import DataError, needs

#: Sets that scikit-learn carries inside its package: no download.
EMBEDDED = ("digits", "wine", "breast_cancer", "iris", "diabetes")
FORMATS = ("csv", "parquet", "npy", "npz", "idx", "images", "text", "lines", "fasta")
_COMPRESSED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".tab": "csv",
    ".data": "csv",
    ".dat": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".npy": "npy",
    ".npz": "npz",
    ".idx": "idx",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".smi": "lines",
    ".smiles": "lines",
    ".fasta": "fasta",
    ".fa": "fasta",
    ".faa": "fasta",
    ".fna": "fasta",
    ".a2m": "fasta",
    ".a3m": "fasta",
}


@dataclass(frozen=True)
class Source:
    """What was handed over, recognised.

    Args:
        kind: one of :data:`FORMATS`, or ``dataframe``, ``array``, ``arrays`` (several, by name), ``sparse``,
            ``strings``, ``embedded``.
        value: the object, or the path.
        name: how messages call it.
    """

    kind: str
    value: Any
    name: str

    @property
    def path(self) -> Path:
        """The path of a source that is a file or a folder."""
        return cast(Path, self.value)

    def stamp(self) -> dict[str, Any] | None:
        """Path, size and time of change of a file, or None for anything else."""
        if not isinstance(self.value, Path) or not self.value.is_file():
            return None
        state = self.value.stat()
        return {"path": str(self.value.resolve()), "size": state.st_size, "mtime_ns": state.st_mtime_ns}


def recognise(source: Any, format: str | None = None) -> Source:
    """Say what ``source`` is.

    Args:
        source: path, ``"-"`` for standard input, name of an embedded set, or an object.
        format: one of :data:`FORMATS`, for a file whose name does not say.
    """
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise DataError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}{hint}")
    if isinstance(source, Source):
        return source
    if isinstance(source, (str, Path)):
        return _recognise_path(source, format)
    if isinstance(source, torch.Tensor):
        return Source("array", source.detach().cpu().numpy(), "tensor")
    if isinstance(source, np.ndarray):
        return Source("array", source, "array")
    if isinstance(source, dict):
        return Source("arrays", {str(key): np.asarray(value) for key, value in source.items()}, "arrays")
    if isinstance(source, (list, tuple)):
        if source and all(isinstance(entry, str) for entry in source):
            return Source("strings", list(source), "list")
        return Source("array", np.asarray(source), "list")
    library = type(source).__module__.partition(".")[0]
    if library == "pandas":
        frame = source.to_frame() if type(source).__name__ == "Series" else source
        if type(frame).__name__ == "DataFrame":
            return Source("dataframe", frame, "DataFrame")
    if library == "scipy" and hasattr(source, "tocsr"):
        return Source("sparse", source.tocsr(), "sparse matrix")
    raise DataError(
        f"data: expected a path, '-', a DataFrame, an array, a tensor, a sparse matrix or a dict of arrays; "
        f"got {type(source).__module__}.{type(source).__name__}"
    )


def _recognise_path(source: str | Path, format: str | None) -> Source:
    if str(source) == "-":
        path, name = _spool_standard_input(), "standard input"
        return Source(format or _by_content(path) or "csv", path, name)
    path = Path(source)
    if not path.exists():
        if str(source) in EMBEDDED:
            return Source("embedded", str(source), str(source))
        near = difflib.get_close_matches(str(source), EMBEDDED, n=1)
        hint = f"; did you mean the embedded set {near[0]!r}?" if near else ""
        raise DataError(f"{source}: no such file or folder{hint} (embedded sets: {', '.join(EMBEDDED)})")
    if path.is_dir():
        return Source("images", path, str(source))
    if path.stat().st_size == 0:
        raise DataError(f"{source}: expected data, got an empty file")
    kind = format or _by_name(path) or _by_content(path)
    if kind is None:
        raise DataError(
            f"{source}: the name does not say what the file is; pass format= (one of {', '.join(FORMATS)}), "
            f"or rename it"
        )
    return Source(kind, path, str(source))


def _by_name(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    stem = path.name.lower()
    if "-ubyte" in stem and "idx" in stem:
        return "idx"
    return _SUFFIXES.get(suffixes[-1]) if suffixes else None


def _by_content(path: Path) -> str | None:
    with open_bytes(path) as file:
        head = file.read(64)
    if head[:6] == b"\x93NUMPY":
        return "npy"
    if head[:4] == b"PK\x03\x04":
        return "npz"
    if head[:4] == b"PAR1":
        return "parquet"
    if head[:2] == b"\0\0" and len(head) > 3 and head[2] in (8, 9, 11, 12, 13, 14):
        return "idx"
    return None


def compression(path: Path) -> str | None:
    """How a file is compressed, by its first bytes: gzip, bzip2, xz, zstd or None."""
    with path.open("rb") as file:
        head = file.read(6)
    for magic, name in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ\0", "xz"), (b"\x28\xb5\x2f\xfd", "zstd")):
        if head.startswith(magic):
            return name
    return None


def open_bytes(path: Path) -> BinaryIO:
    """Open a file for reading, decompressed if it is compressed."""
    match compression(path):
        case "gzip":
            return cast(BinaryIO, gzip.open(path, "rb"))
        case "bzip2":
            return cast(BinaryIO, bz2.open(path, "rb"))
        case "xz":
            return cast(BinaryIO, lzma.open(path, "rb"))
        case "zstd":
            return cast(BinaryIO, io.BufferedReader(_ZstandardReader(path)))
    return path.open("rb")


@contextlib.contextmanager
def creating(path: Path | None) -> Iterator[BinaryIO]:
    """A file to write, compressed as its suffix says; it appears when it is complete.  None is standard output."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    if path.exists() and not path.is_file():  # a pipe or a device: nothing to replace
        with _create(path) as file:
            yield file
        return
    part = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        with _create(part) as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _create(path: Path) -> BinaryIO:
    match _COMPRESSED.get(path.suffix.lower()):
        case "gzip":
            return cast(BinaryIO, gzip.GzipFile(path, "wb", mtime=0))
        case "bzip2":
            return cast(BinaryIO, bz2.open(path, "wb"))
        case "xz":
            return cast(BinaryIO, lzma.open(path, "wb"))
        case "zstd":
            return cast(BinaryIO, _zstandard(path).open(path, "wb"))
    return path.open("wb")


class _ZstandardReader(io.RawIOBase):
    """A zstd file, decompressed; a file that is cut is not taken for a whole one, as the library's reader does."""

    def __init__(self, path: Path) -> None:
        self._new = _zstandard(path).ZstdDecompressor().decompressobj
        self._file = path.open("rb")
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(1 << 17)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends in the middle of a frame")
                return 0
            self._frame = self._frame or self._new()
            self._output = self._frame.decompress(self._input)
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _zstandard(path: Path) -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        raise needs("codecs", f"{path}: a zstd-compressed file") from None


def _spool_standard_input() -> Path:
    """Copy standard input to a temporary file: the data is read more than once."""
    with tempfile.NamedTemporaryFile(prefix="likely-stdin-", delete=False) as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
        path = Path(file.name)
    atexit.register(path.unlink, missing_ok=True)
    if path.stat().st_size == 0:
        raise DataError("standard input: expected data, got nothing")
    return path
