"""Generic compression of a string of bytes: the smallest of stored, deflate (with or without a dictionary), LZMA and
bzip2, one byte says which.

Decompression makes never more than the size that its caller declares, which was held against the limits before.
"""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Any, Protocol

from likely.coding.errors import Damaged, NewerVersion

STORED, DEFLATE, LZMA, BZIP2, DICTIONARY = range(5)

#: What method 4 may copy from as if it stood before the data: words of the facts about tables, arrays and images.  Part
#: of the format.
WORDS = (
    b'"mode":"RGB","mode":"L","by columns":false,"before":"","behind":"","arrow":null}"words":[null,null,'
    b'{"string":["pyarrow","NaN"]},{"fixed":"<i8"},{"fixed":"<f4"},{"fixed":"<f8"},"cells":[{"fixed":"<f8"},'
    b'"names":"010000","axis":"010000","range":[0,"of":"str","absent":null,"index":[],"is":[0,1,2,3,4,5,6,7,8,9,10,11,12],'
    b'{"media":"npy","n":{"media":"npz","n":{"media":"images","n":{"media":"text","n":{"media":"parquet","n":'
    b'{"media":"dataframe","n":{"media":"array","n":10000,"size":,"names":[null],"columns first":[],"dtype":"|u1",'
    b'"way":"times","key":null,"labels":[],"extras":[],"fixed":[]}"kind":"categorical","strip_suffix":"",'
    b'{"media":"csv","n":,"size":,"mark":"","rest":"","dialect":{"delimiter":",","encoding":"utf-8","decimal":".",'
    b'"newline":"\\r\\n"},"newline":"\\n"},"absent":null,"open":false,"start":"","end":"\\n","columns":[{"is":0,"missing":""},'
    b'{"is":1,"lead":1,"missing":"?"},{"is":2,"lead":1,"missing":"?"},{"is":3},{"is":4},{"is":5},{"is":6},{"is":7},{"is":8},'
    b'{"is":9},{"is":10},{"is":11},{"is":12},{"is":null,"words":{"0":"","1":""}}]}'
)


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
        if data.startswith(b"{"):
            deflate = zlib.compressobj(9, wbits=-15, zdict=WORDS)
            packed.append(bytes([DICTIONARY]) + deflate.compress(data) + deflate.flush())
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
        DICTIONARY: lambda: zlib.decompressobj(wbits=-15, zdict=WORDS),
    }
    if method not in openers:
        raise NewerVersion(f"expected a compression method from 0 to {DICTIONARY}, got {method}")
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
