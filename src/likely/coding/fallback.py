"""Generic compression of a string of bytes: the smallest of stored, deflate, LZMA and bzip2, one byte says which.

Decompression makes never more than the size that its caller declares, which was held against the limits before.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from likely.coding.errors import Damaged, NewerVersion

STORED, DEFLATE, LZMA, BZIP2 = range(4)


class _Decompressor(Protocol):
    """What zlib's, lzma's and bz2's objects have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def compress(data: bytes) -> bytes:
    """One byte for the method and the data in the method that makes them smallest; at most one byte more than ``data``.

    >>> packed = compress(b"abc" * 1000)
    >>> len(packed) < 30, decompress(packed, 3000) == b"abc" * 1000
    (True, True)
    """
    data = bytes(data)
    packed = [bytes([STORED]) + data]
    if len(data) > 4:  # nothing gets smaller below
        deflate = zlib.compressobj(9, wbits=-15)
        packed.append(bytes([DEFLATE]) + deflate.compress(data) + deflate.flush())
        packed.append(bytes([BZIP2]) + bz2.compress(data))
        for lc, pb in ((3, 2), (4, 0), (0, 2)):  # mixed, text, and tables of fixed-width binary numbers
            filters = _lzma_filters(len(data), lc=lc, lp=2 if lc == 0 else 0, pb=pb)
            packed.append(bytes([LZMA]) + lzma.compress(data, lzma.FORMAT_RAW, filters=filters))
    return min(packed, key=len)


def decompress(packed: bytes, size: int) -> bytes:
    """The ``size`` bytes that :func:`compress` was given.

    Args:
        packed: what it returned.
        size: number of bytes to expect; the caller has held it against its limits.

    Raises:
        Damaged: ``packed`` does not hold exactly ``size`` bytes.
        NewerVersion: a method that this version does not know.
    """
    if not packed:
        raise Damaged("expected a compressed string of bytes, got nothing")
    method, body = packed[0], packed[1:]
    if method == STORED:
        if len(body) != size:
            raise Damaged(f"expected {size} stored bytes, got {len(body)}")
        return body
    openers: dict[int, Callable[[], _Decompressor]] = {
        DEFLATE: lambda: zlib.decompressobj(wbits=-15),
        LZMA: lambda: lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=_lzma_filters(size)),
        BZIP2: bz2.BZ2Decompressor,
    }
    if method not in openers:
        raise NewerVersion(f"expected a compression method from 0 to {BZIP2}, got {method}")
    try:
        stream = openers[method]()
        data = stream.decompress(body, size + 1)
    except (zlib.error, lzma.LZMAError, OSError, ValueError, EOFError) as error:
        raise Damaged(f"the compressed bytes make no sense ({error})") from None
    if len(data) != size or not stream.eof or stream.unused_data:
        raise Damaged(f"expected exactly {size} decompressed bytes")
    return data


def _lzma_filters(size: int, **options: int) -> list[dict[str, Any]]:
    """One LZMA2 filter whose window is the smallest power of two, from 4 KiB to 64 MiB, that holds the data."""
    window = 1 << min(max((size - 1).bit_length(), 12), 26)
    return [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window, **options}]
