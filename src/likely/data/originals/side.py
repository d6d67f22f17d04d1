"""The small change beside the model: numbers, places, texts and raw cells as bytes, read back with every count bounded.

Nothing here is compressed; the layout (one sort of thing after the other, differences of row numbers, each repeated
text once, raw numbers plane by plane) is chosen so that a general compressor finds what there is to find.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from likely.data.errors import DataError

_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}", re.ASCII)
_LONGEST_VARINT = 10
_PLAIN, _DICTIONARY, _WHOLE_NUMBERS = range(3)
_NONE, _ALL, _STEPS, _BITS = range(4)
_VARINTS, _CONSTANT = range(2)


def damaged(what: str) -> DataError:
    """The error for side information that does not say what it should."""
    return DataError(f"side information is damaged: {what}")


def varints(values: np.ndarray) -> bytes:
    """Whole numbers of 64 bits, seven bits a byte, the lowest first; the last byte of each is below 128.

    >>> varints(np.array([1, 300])).hex()
    '01ac02'
    """
    rest = values.astype(np.uint64)
    sizes = np.ones(len(rest), np.int64)
    for size in range(1, _LONGEST_VARINT):
        sizes += rest >= np.uint64(1 << (7 * size))
    out = np.zeros(int(sizes.sum()), np.uint8)
    place = np.cumsum(sizes) - sizes
    for size in range(_LONGEST_VARINT):
        here = sizes > size
        if not here.any():
            break
        more = (sizes[here] > size + 1).astype(np.uint8) << 7
        out[place[here] + size] = (rest[here] & np.uint64(127)).astype(np.uint8) | more
        rest >>= np.uint64(7)
    return out.tobytes()


class Writer:
    """Gathers fields of side information."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def content(self) -> bytes:
        """All fields so far."""
        return b"".join(self._parts)

    def number(self, value: int) -> None:
        """One whole number from 0 up."""
        self._parts.append(varints(np.array([value], np.uint64)))

    def numbers(self, values: np.ndarray) -> None:
        """Whole numbers from 0 up, as many as the reader knows; one that is always the same is written once."""
        values = values.astype(np.uint64)
        if len(values) > 1 and (values == values[0]).all():
            self.number(_CONSTANT)
            values = values[:1]
        else:
            self.number(_VARINTS)
        self._parts.append(varints(values))

    def signed(self, values: np.ndarray) -> None:
        """Whole numbers of 64 bits with their sign in the lowest bit."""
        values = values.astype(np.int64)
        self.numbers(((values << 1) ^ (values >> 63)).view(np.uint64))

    def places(self, places: np.ndarray, n: int) -> None:
        """Ascending row numbers below ``n``: none, all, their differences, or a bit a row, whichever is shortest."""
        count = len(places)
        if count in (0, n):
            self.number(_ALL if count else _NONE)
            return
        steps = varints(np.diff(places, prepend=-1) - 1)
        if len(steps) + 2 < n // 8:
            self.number(_STEPS)
            self.number(count)
            self._parts.append(steps)
            return
        self.number(_BITS)
        bits = np.zeros(n, np.uint8)
        bits[places] = 1
        self._parts.append(np.packbits(bits).tobytes())

    def raw(self, content: bytes) -> None:
        """Bytes, as many as the reader knows."""
        self._parts.append(content)

    def items(self, values: np.ndarray) -> None:
        """Cells of any fixed size, bit by bit as they are: all first bytes, then all second ones, and so on."""
        held = np.ascontiguousarray(values.reshape(-1))
        planes = np.frombuffer(held.tobytes(), np.uint8).reshape(len(held), -1)
        self._parts.append(np.ascontiguousarray(planes.T).tobytes())

    def texts(self, texts: Sequence[str]) -> None:
        """Texts, as many as the reader knows."""
        if not texts:
            return
        if all(map(_WHOLE.fullmatch, texts)):
            self.number(_WHOLE_NUMBERS)
            self.signed(np.diff(np.array(list(map(int, texts)), np.int64), prepend=np.int64(0)))
            return
        distinct = list(dict.fromkeys(texts))
        if 2 * len(distinct) <= len(texts):
            self.number(_DICTIONARY)
            self.number(len(distinct))
            codes = {text: code for code, text in enumerate(distinct)}
            self._plain(distinct)
            self.numbers(np.array(list(map(codes.__getitem__, texts)), np.uint64))
            return
        self.number(_PLAIN)
        self._plain(texts)

    def _plain(self, texts: Sequence[str]) -> None:
        content = "".join(texts).encode("utf-8", "surrogatepass")
        self.numbers(np.array(list(map(len, texts)), np.uint64))
        self.number(len(content))
        self._parts.append(content)


class Reader:
    """Reads what a :class:`Writer` wrote; whatever the bytes say, no field is larger than its caller allows.

    Args:
        content: the side information.
        limit: most characters in the texts of one field, repetitions counted.
    """

    def __init__(self, content: bytes, limit: int) -> None:
        self._content = memoryview(content)
        self._at, self._limit = 0, limit

    @property
    def done(self) -> bool:
        """Whether all was read."""
        return self._at == len(self._content)

    @property
    def left(self) -> int:
        """Bytes that are still to be read."""
        return len(self._content) - self._at

    def raw(self, size: int) -> bytes:
        """The next ``size`` bytes."""
        if size > len(self._content) - self._at:
            raise damaged("it ends early")
        self._at += size
        return bytes(self._content[self._at - size : self._at])

    def number(self, most: int = (1 << 64) - 1) -> int:
        """One whole number from 0 to ``most``."""
        value = int(self._varints(1)[0])
        if value > most:
            raise damaged(f"expected a number up to {most}, got {value}")
        return value

    def _varints(self, count: int) -> np.ndarray:
        window = self._content[self._at : self._at + _LONGEST_VARINT * count]
        content = np.frombuffer(window, np.uint8)
        ends = np.flatnonzero(content < 128)[:count] if count else np.empty(0, np.int64)
        if len(ends) < count:
            raise damaged("it ends early, or holds a number beyond 64 bits")
        if not count:
            return np.empty(0, np.uint64)
        starts = np.concatenate([[0], ends[:-1] + 1])
        sizes = ends - starts + 1
        if sizes.max() > _LONGEST_VARINT or (content[ends[sizes == _LONGEST_VARINT]] > 1).any():
            raise damaged("it holds a number beyond 64 bits")
        content = content[: ends[-1] + 1]
        shifts = (np.arange(len(content)) - np.repeat(starts, sizes)).astype(np.uint64) * np.uint64(7)
        self._at += len(content)
        return np.add.reduceat((content & 127).astype(np.uint64) << shifts, starts)

    def numbers(self, count: int, most: int = (1 << 64) - 1) -> np.ndarray:
        """``count`` whole numbers from 0 to ``most``, uint64."""
        if count == 0:
            self.number(_VARINTS)
            return np.empty(0, np.uint64)
        if self.number(_CONSTANT) == _CONSTANT:
            values = np.broadcast_to(self._varints(1), (count,))
        else:
            values = self._varints(count)
        if (values > np.uint64(most)).any():
            raise damaged(f"expected numbers up to {most}, got {values.max()}")
        return values

    def signed(self, count: int) -> np.ndarray:
        """``count`` whole numbers with a sign, int64."""
        values = self.numbers(count)
        return (values >> np.uint64(1)).astype(np.int64) ^ -(values & np.uint64(1)).astype(np.int64)

    def places(self, n: int) -> np.ndarray:
        """Ascending row numbers below ``n``, int64."""
        match self.number(_BITS):
            case 0:
                return np.empty(0, np.int64)
            case 1:
                return np.arange(n)
            case 2:
                steps = self._varints(self.number(n))
                if (steps >= np.uint64(max(n, 1))).any():
                    raise damaged("a row number lies beyond the rows")
                places = np.cumsum(steps.astype(np.int64) + 1) - 1
                if len(places) and places[-1] >= n:
                    raise damaged("a row number lies beyond the rows")
                return places
        return np.flatnonzero(np.unpackbits(np.frombuffer(self.raw(-(-n // 8)), np.uint8), count=n))

    def items(self, count: int, dtype: np.dtype) -> np.ndarray:
        """``count`` cells of a dtype, shape ``(count,)``."""
        content = self.raw(count * dtype.itemsize)
        planes = np.frombuffer(content, np.uint8).reshape(dtype.itemsize, count)
        return np.frombuffer(np.ascontiguousarray(planes.T).tobytes(), dtype, count)

    def texts(self, count: int) -> list[str]:
        """``count`` texts."""
        if not count:
            return []
        sort = self.number(_WHOLE_NUMBERS)
        if sort == _WHOLE_NUMBERS:
            return list(map(str, np.cumsum(self.signed(count)).tolist()))
        if sort == _PLAIN:
            return self._plain(count)
        distinct = self._plain(self.number(count))
        if not distinct:
            raise damaged("expected texts, got none")
        codes = self.numbers(count, len(distinct) - 1)
        sizes = np.array(list(map(len, distinct)), np.int64)
        if int(sizes[codes.astype(np.int64)].sum()) > self._limit:
            raise damaged(f"expected texts of at most {self._limit} characters in all")
        return list(map(distinct.__getitem__, codes.tolist()))

    def _plain(self, count: int) -> list[str]:
        sizes = self.numbers(count, self._limit)
        size = self.number()
        try:
            content = self.raw(size).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise damaged("expected text") from None
        ends = np.cumsum(sizes.astype(np.int64)) if count * self._limit < 1 << 62 else _careful(sizes)
        if (int(ends[-1]) if count else 0) != len(content):
            raise damaged("the lengths of texts do not go with their characters")
        stops = ends.tolist()
        return [content[start:stop] for start, stop in zip([0, *stops], stops)]


def _careful(sizes: np.ndarray) -> np.ndarray:
    """Running sums where they might pass 64 bits."""
    if float(sizes.astype(np.float64).sum()) >= 2.0**62:
        raise damaged("the lengths of texts do not go with their characters")
    return np.cumsum(sizes.astype(np.int64))
