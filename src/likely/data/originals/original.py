"""What taking a source apart and putting it together again have in common, whatever the source is."""

from __future__ import annotations

import abc
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from likely.data.errors import DataError, SupplyError
from likely.data.sources import creating

Exactness = Literal["bytes", "content"]
#: Says of every cell of ``x`` whether a codec can code it.
Legal = Callable[[Tensor], Tensor]
#: What is put together: ``x``, the condition, and the side information of some consecutive rows.
Part = tuple[Tensor, Tensor | None, bytes]
#: Most bytes of an original that is restored unless its caller allows more.
MOST_BYTES = 1 << 40


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows, taken apart.

    Args:
        x: what a model codes, a batch of the schema's space.
        condition: a batch of the schema's condition space, or None; it is needed to put the rows together again.
        side: all that ``x`` and the condition do not say; empty where they say everything.
    """

    x: Tensor
    condition: Tensor | None
    side: bytes


class Original(abc.ABC):
    """A source, ready to be taken apart row by row.

    Args:
        media: what it is: ``csv``, ``parquet``, ``dataframe``, ``npy``, …
        exactness: whether its ``bytes`` come back, or its ``content``.
        n: number of rows.
        size: bytes of what comes back: of the decompressed file, of the cells of an object.
        digest: BLAKE2b of 16 bytes of what comes back; of an object, of its content in a canonical form.
        facts: JSON values about the whole.
        compressed: how the file itself is compressed (``gzip``, …), which is not restored; or None.
    """

    def __init__(
        self,
        media: str,
        exactness: Exactness,
        n: int,
        size: int,
        digest: bytes,
        facts: Mapping[str, Any],
        compressed: str | None = None,
    ) -> None:
        self.media, self.exactness, self.n, self.size, self.digest = media, exactness, n, size, digest
        self.compressed = compressed
        self.head = json.dumps({"media": media, "n": n, "size": size, **facts}, separators=(",", ":")).encode("ascii")

    def rows(self, start: int = 0, stop: int | None = None, legal: Legal | None = None) -> Rows:
        """The rows from ``start`` to before ``stop``.

        Args:
            legal: says which cells of ``x`` can be coded; the others are replaced by a placeholder and kept aside.
        """
        stop = self.n if stop is None else stop
        if not 0 <= start <= stop <= self.n:
            raise DataError(f"rows: expected 0 <= start <= stop <= {self.n}, got {start} and {stop}")
        return self._rows(start, stop, legal)

    @abc.abstractmethod
    def _rows(self, start: int, stop: int, legal: Legal | None) -> Rows: ...


class Restored(abc.ABC):
    """An original that is put together while it is written or asked for; once.

    Args:
        media: as in :class:`Original`.
        digest: of what came back, to be compared with that of the original; None until it is all there.
    """

    def __init__(self, media: str) -> None:
        self.media = media
        self.digest: bytes | None = None

    @property
    @abc.abstractmethod
    def value(self) -> Any:
        """The object, or the bytes of a file."""

    @abc.abstractmethod
    def write(self, path: Path | str, digest: bytes | None = None) -> None:
        """Write the original; nothing appears before it is complete.

        Args:
            path: a file or folder; ``"-"`` is standard output.
            digest: what came back must have this digest, otherwise :class:`DataError` and nothing appears.
        """

    def _check(self, digest: bytes | None) -> None:
        if digest is not None and digest != self.digest:
            raise DataError("the restored data is not the original: its digest differs")


class RestoredFile(Restored):
    """A file that comes back byte for byte.

    Args:
        pieces: its bytes, in order.
    """

    def __init__(self, media: str, pieces: Iterable[bytes]) -> None:
        super().__init__(media)
        self._pieces = pieces

    def _hashed(self) -> Iterator[bytes]:
        digest = hashlib.blake2b(digest_size=16)
        for piece in self._pieces:
            digest.update(piece)
            yield piece
        self.digest = digest.digest()

    @property
    def value(self) -> bytes:
        return b"".join(self._hashed())

    def write(self, path: Path | str, digest: bytes | None = None) -> None:
        with creating(None if str(path) == "-" else Path(path)) as file:
            for piece in self._hashed():
                file.write(piece)
            self._check(digest)


def blake2b(content: bytes | memoryview) -> bytes:
    """Digest of 16 bytes."""
    return hashlib.blake2b(content, digest_size=16).digest()


def settle(x: Tensor, legal: Legal, fallbacks: Iterable[np.ndarray]) -> np.ndarray:
    """Replace cells that cannot be coded, in place, by the first fallback that can; which they were, ``x``'s shape.

    Args:
        fallbacks: placeholders, each broadcast over the rows.
    """
    wrong = ~legal(x).cpu().numpy().astype(bool)
    if wrong.shape != tuple(x.shape):
        raise DataError(f"legal: expected a mask of shape {tuple(x.shape)}, got {wrong.shape}")
    replaced = wrong
    for fallback in fallbacks:
        if not wrong.any():
            return replaced
        x[torch.from_numpy(wrong)] = torch.from_numpy(np.broadcast_to(fallback, x.shape)[wrong]).to(x.dtype)
        wrong = ~legal(x).cpu().numpy().astype(bool)
        replaced = replaced | wrong
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise DataError(f"x{list(index)}: expected that the codec takes a missing, usual or zero cell; it takes none")
    return replaced


@contextmanager
def intact(what: str) -> Iterator[None]:
    """Within the context facts that are not what they should be are damage, and named so."""
    try:
        yield
    except (DataError, SupplyError):
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as fault:
        raise DataError(f"{what} is damaged: {type(fault).__name__}: {fault}") from None


def whole(value: Any, most: int = MOST_BYTES) -> int:
    """A whole number from 0 to ``most`` out of the facts."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
        raise DataError(f"head is damaged: expected a number up to {most}, got {value!r}")
    return value


def matrix(x: Tensor | None, columns: int, what: str) -> np.ndarray:
    """A batch of a table as float64, shape ``(rows, columns)``."""
    if x is None or x.dim() != 2 or x.shape[1] != columns:
        raise DataError(f"{what}: expected shape (rows, {columns}), got {None if x is None else tuple(x.shape)}")
    return x.detach().cpu().double().numpy()


def bits_differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which cells of two arrays of one dtype differ in at least a bit (NaN and negative zero included)."""
    size = a.dtype.itemsize
    if size not in (1, 2, 4, 8):
        return (_planes(a) != _planes(b)).any(axis=-1)
    kind = f"u{size}"
    return np.ascontiguousarray(a).view(kind) != np.ascontiguousarray(b).view(kind)


def _planes(a: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(a).view(np.uint8).reshape(*a.shape, -1) if math.prod(a.shape) else a[..., None] != a
