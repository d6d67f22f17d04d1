"""The file format ``.lk``: a header, chunks of bytes of named kinds, an index; docs/format.md says what every byte is.

This module knows nothing of models: a payload is bytes, and its caller decodes it.  Whatever a file declares is held
against a limit, and against the bytes that are there, before anything is allocated for it.

>>> import io
>>> file = io.BytesIO()
>>> with Writer(file, {"rows": 2}) as writer:
...     writer.add("rows", b"packed", rows=2, raw_size=10, digest=content_digest(b"the 2 rows"))
...     writer.finish(content_digest(b"the 2 rows"))
>>> reader = Reader.open(file.getvalue())
>>> reader.header, [entry.kind for entry in reader.chunks]
({'rows': 2}, ['rows'])
>>> chunk = reader.read(0)
>>> chunk.payload, chunk.verify(b"the 2 rows")
(b'packed', None)
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import secrets
import struct
import threading
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from likely.coding.errors import Damaged, NewerVersion, NotLk, TooLarge, Truncated

MAGIC = b"\x89lky\r\n\x1a\n"
END = b"\x1aykl"
MAJOR, MINOR = 1, 0
DIGEST_SIZE = 16

#: What may be stored and hashed; of an array, ``memoryview(array)``.
Buffer = bytes | bytearray | memoryview

_PREAMBLE = struct.Struct("<8sBBHII")  # magic, major, minor, flags, stored length and size of the header
_CRC = struct.Struct("<I")
_TRAILER = struct.Struct("<II4s")  # length of the index section, CRC-32, END
_CRITICAL = 1  # the one flag of a chunk
_KIND = re.compile(r"[a-z][a-z0-9-]{0,15}")
_LARGEST = (1 << 63) - 1
_HEADER_LIMIT = 1 << 20
_DEPTH_LIMIT = 16
_ENTRY_LIMIT = 1 + 16 + 1 + 3 * 9 + 4  # longest entry of the index
_PIECE = 1 << 20  # a declared length is read in pieces, so that a false one allocates no more than what is there


@dataclass(frozen=True)
class Limits:
    """What a file may declare; a file beyond a limit is refused with :class:`TooLarge` before anything is allocated.

    Args:
        max_output: decoded bytes of all chunks together; a row counts as at least one byte.
        max_chunk: bytes of one chunk, decoded or stored.
        max_chunks: number of chunks.
    """

    max_output: int = 4 << 30
    max_chunk: int = 1 << 30
    max_chunks: int = 1 << 16


@dataclass(frozen=True)
class Entry:
    """What the index says of a chunk.

    Args:
        number: place among the chunks, from 0.
        kind: what it holds, a name given by whoever wrote it.
        critical: whether a reader that does not know the kind must refuse the file.
        rows: rows of data in it, 0 where it holds something else.
        raw_size: bytes of its decoded content.
        offset: byte of the file at which it starts.
        length: bytes it takes in the file, its head included.
        head_crc: CRC-32 of its head.
    """

    number: int
    kind: str
    critical: bool
    rows: int
    raw_size: int
    offset: int
    length: int
    head_crc: int

    @property
    def where(self) -> str:
        """The chunk's place as error messages name it."""
        return f"chunk {self.number} ({self.kind}) at byte {self.offset}"


@dataclass(frozen=True)
class Chunk(Entry):
    """A chunk whose bytes were read and are as they were written.

    Args:
        payload: its stored bytes.
        digest: :func:`content_digest` of its decoded content.
    """

    payload: bytes
    digest: bytes

    def verify(self, *content: Buffer) -> None:
        """Raise :class:`Damaged` unless the parts of ``content``, joined, are what was compressed."""
        size = sum(memoryview(part).nbytes for part in content)
        if size != self.raw_size:
            raise Damaged(f"expected {self.raw_size} decoded bytes, got {size}", self.where)
        if content_digest(*content) != self.digest:
            raise Damaged("the decoded content is not what was compressed", self.where)


def content_digest(*parts: Buffer) -> bytes:
    """BLAKE2b of 16 bytes over the parts, joined: what ``b2sum -l 128`` prints of a file.

    >>> content_digest(b"one ", b"two").hex()
    '7689d1ceb0c156d213d3370ce8c62d22'
    """
    digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
    for part in parts:
        digest.update(part)
    return digest.digest()


def canonical_json(value: Any) -> bytes:
    """The one way to write a JSON value: keys sorted, no spaces, ASCII only, shortest floats.

    >>> canonical_json({"b": [1, None], "a": "é"})
    b'{"a":"\\\\u00e9","b":[1,null]}'

    Raises:
        ValueError: not a JSON value (also NaN and infinity), or keys that are not strings.
    """
    stack = [value]
    while stack:
        node = stack.pop()
        if isinstance(node, Mapping):
            if not all(isinstance(key, str) for key in node):
                raise ValueError(f"JSON: expected keys that are strings, got {list(node)}")
            stack.extend(node.values())
        elif isinstance(node, list | tuple):
            stack.extend(node)
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"JSON: {error}") from None
    return text.encode("ascii")


def _check_header(header: Any) -> None:
    """Raise ``ValueError`` unless ``header`` is an object of Unicode text, 64-bit whole numbers and limited depth."""
    if not isinstance(header, Mapping):
        raise ValueError(f"expected a JSON object, got {type(header).__name__}")
    level: list[Any] = [header]
    for _ in range(_DEPTH_LIMIT):
        inner: list[Any] = []
        for node in level:
            for value in node.values() if isinstance(node, Mapping) else node:
                if isinstance(value, Mapping | list | tuple):
                    inner.append(value)
                elif isinstance(value, str):
                    value.encode("utf-8")  # refuses half a surrogate pair, which nothing could print
                elif isinstance(value, int) and not -_LARGEST - 1 <= value <= _LARGEST:
                    raise ValueError("expected whole numbers of at most 64 bits")
        if not inner:
            return
        level = inner
    raise ValueError(f"expected at most {_DEPTH_LIMIT} levels of nesting")


# --------------------------------------------------------------------------------------------------------------
# Pieces that the writer and the reader share
# --------------------------------------------------------------------------------------------------------------


def _varint(number: int) -> bytes:
    """Whole number below 2⁶³, seven bits a byte, low bits first (LEB128)."""
    assert 0 <= number <= _LARGEST
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


class _Fields:
    """Takes a string of bytes apart; what runs past its end is :class:`Damaged`."""

    def __init__(self, data: bytes, where: str) -> None:
        self.data, self.where, self.position = data, where, 0

    def take(self, count: int) -> bytes:
        self.position += count
        if self.position > len(self.data):
            raise Damaged("its fields run past its end", self.where)
        return self.data[self.position - count : self.position]

    def varint(self) -> int:
        number = 0
        for shift in range(0, 63, 7):
            byte = self.take(1)[0]
            number |= (byte & 127) << shift
            if byte < 128:
                if byte == 0 and shift:
                    break
                return number
        raise Damaged("expected a whole number in its shortest form", self.where)

    def kind(self) -> str:
        name = self.take(self.take(1)[0])
        text = name.decode("latin-1")
        if not _KIND.fullmatch(text):
            raise Damaged(f"expected a kind of 1 to 16 letters, digits and hyphens, got {name!r}", self.where)
        return text

    def critical(self) -> bool:
        flags = self.take(1)[0]
        if flags & ~_CRITICAL:
            raise NewerVersion(f"expected chunk flags {_CRITICAL} or 0, got {flags}", self.where)
        return bool(flags & _CRITICAL)

    def end(self) -> None:
        if self.position != len(self.data):
            raise Damaged(f"{len(self.data) - self.position} bytes too many", self.where)


def _common(entry: Entry) -> bytes:
    """Kind, flags, rows and decoded size, as they stand in a chunk's head and in the index."""
    kind = entry.kind.encode("ascii")
    flags = _CRITICAL if entry.critical else 0
    return bytes([len(kind)]) + kind + bytes([flags]) + _varint(entry.rows) + _varint(entry.raw_size)


def _index_section(entries: Sequence[Entry], digest: bytes) -> bytes:
    body = bytearray(_varint(len(entries)))
    for entry in entries:
        body += _common(entry) + _varint(entry.length) + _CRC.pack(entry.head_crc)
    body += digest
    return b"I" + _CRC.pack(len(body)) + bytes(body)


class _Tally:
    """Holds chunk after chunk against the limits and the kinds that the caller knows."""

    def __init__(self, limits: Limits, known: Collection[str] | None = None) -> None:
        self.limits, self.known, self.count, self.output = limits, known, 0, 0

    def add(self, kind: str, critical: bool, rows: int, raw_size: int, stored: int, where: str) -> None:
        self.count += 1
        self.output += max(rows, raw_size)
        limits = self.limits
        if self.count > limits.max_chunks:
            raise TooLarge("number of chunks", self.count, limits.max_chunks, "max_chunks", where)
        if max(raw_size, stored) > limits.max_chunk:
            raise TooLarge("bytes of a chunk", max(raw_size, stored), limits.max_chunk, "max_chunk", where)
        if self.output > limits.max_output:
            raise TooLarge("decoded bytes", self.output, limits.max_output, "max_output", where)
        if critical and self.known is not None and kind not in self.known:
            raise NewerVersion(f"a chunk of the unknown kind {kind!r} is needed to decode the file", where)


# --------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------


class Writer:
    """Writes a ``.lk`` file, to a path or to a binary stream that need not be seekable.

    A path gets its file when :meth:`finish` has put every byte on the disk, and not before: whatever ends the ``with``
    block earlier leaves the path as it was and no other file behind.

    Args:
        target: path, or binary stream.
        header: JSON object, at most 1 MiB when written and 16 levels deep, whole numbers of at most 64 bits.
        limits: what the file may hold, by default what a reader accepts by default.

    Raises:
        ValueError: the header is not such an object.
    """

    def __init__(self, target: str | Path | BinaryIO, header: Mapping[str, Any], limits: Limits | None = None) -> None:
        try:
            _check_header(header)
            text = canonical_json(header)
        except ValueError as error:
            raise ValueError(f"header: {error}") from None
        if len(text) > _HEADER_LIMIT:
            raise TooLarge("bytes of the header", len(text), _HEADER_LIMIT)
        deflate = zlib.compressobj(9, wbits=-15)
        packed = deflate.compress(text) + deflate.flush()
        stored = packed if len(packed) < len(text) else text
        start = _PREAMBLE.pack(MAGIC, MAJOR, MINOR, 0, len(stored), len(text))
        self._crc = zlib.crc32(start + stored)
        self._tally = _Tally(limits or Limits())
        self._entries: list[Entry] = []
        self._position = 0
        self._finished = False
        self._target: Path | None = None
        self._temporary: Path | None = None
        if isinstance(target, str | Path):
            path = Path(os.path.realpath(target))  # a link stays a link
            if path.exists() and not path.is_file():  # a device, a named pipe
                self._file: BinaryIO = path.open("wb")
            else:
                self._target = path
                self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
                self._file = self._temporary.open("xb")
        else:
            self._file = target
        self._owned = self._file is not target
        try:
            self._write(start + _CRC.pack(self._crc) + stored)
        except BaseException:
            self.abort()
            raise

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._position

    def add(
        self,
        kind: str,
        payload: Buffer,
        *,
        rows: int = 0,
        raw_size: int | None = None,
        digest: bytes | None = None,
        critical: bool = True,
    ) -> None:
        """Append a chunk.

        Args:
            kind: what it holds: 1 to 16 lower-case letters, digits and hyphens, the first a letter.
            payload: the bytes to store.
            rows: rows of data in it.
            raw_size: bytes of its decoded content; with ``digest`` None the payload is the content.
            digest: :func:`content_digest` of its decoded content.
            critical: whether a reader that does not know the kind must refuse the file.

        Raises:
            ValueError: an argument is not as described.
            TooLarge: the chunk would pass a limit.
        """
        if not _KIND.fullmatch(kind):
            raise ValueError(f"kind: expected 1 to 16 lower-case letters, digits and hyphens, got {kind!r}")
        if (raw_size is None) != (digest is None):
            raise ValueError("raw_size and digest: expected both or neither")
        view = memoryview(payload).cast("B")
        digest = content_digest(view) if digest is None else digest
        raw_size = len(view) if raw_size is None else raw_size
        if len(digest) != DIGEST_SIZE:
            raise ValueError(f"digest: expected {DIGEST_SIZE} bytes, got {len(digest)}")
        if rows < 0 or raw_size < 0:
            raise ValueError(f"rows and raw_size: expected whole numbers from 0 up, got {rows} and {raw_size}")
        number = len(self._entries)
        self._tally.add(kind, False, rows, raw_size, len(view), f"chunk {number} ({kind})")
        entry = Entry(number, kind, critical, rows, raw_size, self._position, 0, 0)
        fields = _varint(number) + _common(entry) + _varint(len(view)) + digest + _CRC.pack(zlib.crc32(view))
        head = b"C" + bytes([len(fields)]) + fields
        crc = zlib.crc32(head, self._crc)
        length = len(head) + _CRC.size + len(view)
        self._write(head + _CRC.pack(crc))
        self._write(view)
        self._entries.append(Entry(number, kind, critical, rows, raw_size, entry.offset, length, crc))

    def finish(self, digest: bytes) -> None:
        """Write the index and, for a path, put the file in its place.

        Args:
            digest: :func:`content_digest` of the whole original.
        """
        if len(digest) != DIGEST_SIZE:
            raise ValueError(f"digest: expected {DIGEST_SIZE} bytes, got {len(digest)}")
        index = _index_section(self._entries, digest)
        self._write(index)
        self._write(_TRAILER.pack(len(index), zlib.crc32(index, self._crc), END))
        self._file.flush()
        if self._target is not None and self._temporary is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.replace(self._target)
            self._temporary = None
            _sync_folder(self._target.parent)
        self._finished = True

    def abort(self) -> None:
        """Give the file up: the path stays as it was and nothing is left beside it."""
        if self._owned:
            with contextlib.suppress(OSError):  # closing writes what is buffered, to a disk that may be full
                self._file.close()
        if self._temporary is not None:
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
        if kind is None and not self._finished:
            raise ValueError("expected finish() before the end of the writer's block; nothing was written")

    def _write(self, data: Buffer) -> None:
        view = memoryview(data)
        self._position += len(view)
        while len(view):
            written = self._file.write(view)  # a raw stream may take less than it is given
            if written is None:
                raise BlockingIOError(errno.EAGAIN, "expected a stream that blocks until it is written to")
            view = view[written:]


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system lets a folder be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# --------------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------------


class Reader:
    """Reads a ``.lk`` file: any chunk at any time where the source is seekable, in order where it is not.

    Iterating gives every :class:`Chunk` in order, from either; a stream is held against its index at its end, so that
    nothing which came of it may be trusted before the iteration is over.

    Args:
        file: binary stream, positioned at the start of the file.
        limits: what the file may declare.
        known: kinds that the caller can decode; a critical chunk of another kind refuses the file.  None accepts all.

    Raises:
        FormatError: one of its kinds, see :mod:`likely.coding.errors`.
    """

    def __init__(self, file: BinaryIO, limits: Limits | None = None, known: Collection[str] | None = None) -> None:
        self.limits = limits or Limits()
        self.digest: bytes | None = None  #: digest of the whole original; of a stream, known at its end
        self._known = known
        self._file = file
        self._owned = False
        self._lock = threading.Lock()
        self._position = self._size = 0
        self._base = file.tell() if file.seekable() else 0
        self._entries: list[Entry] | None = None
        self._read_header()
        if file.seekable():
            self._read_index()

    @classmethod
    def open(
        cls, source: str | Path | bytes | BinaryIO, limits: Limits | None = None, known: Collection[str] | None = None
    ) -> Reader:
        """A reader of a path, of bytes or of a binary stream; see the class for the other arguments."""
        if isinstance(source, bytes):
            return cls(io.BytesIO(source), limits, known)
        if not isinstance(source, str | Path):
            return cls(source, limits, known)
        file = Path(source).open("rb")  # noqa: SIM115  closed with the reader
        try:
            reader = cls(file, limits, known)
        except BaseException:
            file.close()
            raise
        reader._owned = True
        return reader

    @property
    def chunks(self) -> Sequence[Entry]:
        """What the index says of every chunk; of a stream, known at its end."""
        if self._entries is None:
            raise ValueError("expected a source that is seekable, got a stream; iterate over its chunks first")
        return self._entries

    @property
    def rows(self) -> int:
        """Rows of data in all chunks."""
        return sum(entry.rows for entry in self.chunks)

    def read(self, number: int) -> Chunk:
        """Chunk ``number``, from 0, whose head and stored bytes were checked against their CRC-32 and the index.

        Raises:
            Damaged, Truncated: they are not as they were written.
        """
        entry = self.chunks[number]
        with self._lock:
            self._file.seek(self._base + entry.offset)
            self._position = entry.offset
            if self._take(1, entry.where) != b"C":
                raise Damaged("expected the start of a chunk", entry.where)
            return self._read_chunk(entry.number, expected=entry)

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self._size

    def check_total(self, digest: bytes) -> None:
        """Raise :class:`Damaged` unless ``digest`` is that of the original, which the index holds."""
        if digest != self.digest:
            raise Damaged("the chunks are intact, but together they are not the original", "whole file")

    def __iter__(self) -> Iterator[Chunk]:
        if self._entries is None:
            return self._stream()
        return map(self.read, range(len(self._entries)))

    def close(self) -> None:
        """Close the file, if the reader opened it."""
        if self._owned:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, count: int, where: str) -> bytes:
        """The next ``count`` bytes, read in pieces so that a false count allocates no more than the file holds."""
        pieces = []
        missing = count
        while missing:
            piece = self._file.read(min(missing, _PIECE))
            if not piece:
                raise Truncated(f"expected {count} bytes from byte {self._position}, got {count - missing}", where)
            pieces.append(piece)
            missing -= len(piece)
        self._position += count
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_header(self) -> None:
        # 1. magic
        magic = self._file.read(len(MAGIC))
        self._position = len(magic)
        if magic != MAGIC:
            raise _not_ours(magic)
        # 2. lengths
        start = magic + self._take(_PREAMBLE.size - len(MAGIC), "preamble")
        _, self.major, self.minor, flags, stored, size = _PREAMBLE.unpack(start)
        if max(stored, size) > _HEADER_LIMIT:
            raise TooLarge("bytes of the header", max(stored, size), _HEADER_LIMIT, where="preamble")
        # 3. CRC-32
        (crc,) = _CRC.unpack(self._take(_CRC.size, "preamble"))
        packed = self._take(stored, "header")
        self._crc = zlib.crc32(start + packed)
        if crc != self._crc:
            raise Damaged("the header is not as it was written (CRC-32)", "byte 0")
        # 4. version
        if self.major != MAJOR:
            if self.major > MAJOR:
                raise NewerVersion(f"expected format {MAJOR}, got {self.major}.{self.minor}", "preamble")
            raise Damaged(f"expected format {MAJOR}, got {self.major}.{self.minor}", "preamble")
        if flags:
            raise NewerVersion(f"expected flags 0, got {flags:#06x}", "preamble")
        # 5. JSON
        try:
            text = packed if stored == size else _inflate(packed, size)
            self.header: dict[str, Any] = json.loads(text.decode("ascii"))
            _check_header(self.header)
            if canonical_json(self.header) != text:
                raise ValueError("expected canonical JSON")
        except (ValueError, RecursionError, zlib.error) as error:
            raise Damaged(f"expected a header in JSON ({error})", "header") from None

    def _read_index(self) -> None:
        first = self._position
        size = self._file.seek(0, io.SEEK_END) - self._base
        end = size - _TRAILER.size
        # 1. trailer
        if end < first:
            raise Truncated(f"expected at least {first + _TRAILER.size} bytes, got {size}", f"byte {size}")
        length, crc, mark = _TRAILER.unpack(self._at(end, _TRAILER.size, "trailer"))
        if mark != END:
            advice = "the file is cut short, or something was appended to it: copy or download it again"
            raise Truncated("expected the end mark", f"byte {size - len(END)}", advice)
        # 2. lengths
        self._check_index_length(length)
        if length > end - first:
            raise Damaged(f"expected at most {end - first} bytes of index, got {length}", "trailer")
        # 3. CRC-32
        section = self._at(end - length, length, "index")
        self._check_index_crc(section, crc)
        # 4. entries
        fields = _Fields(section, "index")
        if fields.take(1) != b"I" or fields.take(_CRC.size) != _CRC.pack(length - 1 - _CRC.size):
            raise Damaged("expected the start of an index of this length", f"byte {end - length}")
        count = fields.varint()
        tally = _Tally(self.limits, self._known)
        entries: list[Entry] = []
        offset = first
        for number in range(count):
            kind, critical = fields.kind(), fields.critical()
            rows, raw_size, taken = fields.varint(), fields.varint(), fields.varint()
            (head_crc,) = _CRC.unpack(fields.take(_CRC.size))
            entry = Entry(number, kind, critical, rows, raw_size, offset, taken, head_crc)
            tally.add(kind, critical, rows, raw_size, taken, entry.where)
            entries.append(entry)
            offset += taken
        self.digest = fields.take(DIGEST_SIZE)
        fields.end()
        # 5. chunks fill the space between header and index
        if offset != end - length:
            raise Damaged(f"expected the chunks to end at byte {end - length}, got {offset}", "index")
        self._entries, self._size = entries, size

    def _stream(self) -> Iterator[Chunk]:
        """The chunks in order, then the index and the trailer, which have to agree with them."""
        tally = _Tally(self.limits, self._known)
        entries: list[Entry] = []
        while (tag := self._take(1, "expected a chunk or the index")) == b"C":
            chunk = self._read_chunk(len(entries), tally=tally)
            yield chunk
            entries.append(Entry(**{name: getattr(chunk, name) for name in Entry.__dataclass_fields__}))
        if tag != b"I":
            raise Damaged(f"expected a chunk or the index, got {tag!r}", f"byte {self._position - 1}")
        start = tag + self._take(_CRC.size, "index")
        (length,) = _CRC.unpack(start[1:])
        self._check_index_length(length + len(start))
        section = start + self._take(length, "index")
        total, crc, mark = _TRAILER.unpack(self._take(_TRAILER.size, "trailer"))
        self._check_index_crc(section, crc)
        if mark != END or total != len(section):
            raise Damaged("expected the end mark and the length of the index", "trailer")
        digest = section[-DIGEST_SIZE:]
        if section != _index_section(entries, digest):
            raise Damaged("the index lists other chunks than the file has", "index")
        if self._file.read(1):
            raise Damaged("the file goes on after its end", f"byte {self._position}")
        self._entries, self.digest, self._size = entries, digest, self._position

    def _read_chunk(self, number: int, *, expected: Entry | None = None, tally: _Tally | None = None) -> Chunk:
        """The chunk whose tag was just read: ``expected`` by the index, or else the next one of a stream."""
        offset = self._position - 1
        where = expected.where if expected else f"chunk {number} at byte {offset}"
        # 1. head
        size = self._take(1, where)
        fields = self._take(size[0], where)
        (crc,) = _CRC.unpack(self._take(_CRC.size, where))
        if crc != zlib.crc32(b"C" + size + fields, self._crc):
            raise Damaged("its head is not as it was written (CRC-32)", where)
        head = _Fields(fields, where)
        found = head.varint()
        if found != number:
            raise Damaged(f"expected chunk {number}, got chunk {found}", where)
        kind, critical, rows, raw_size = head.kind(), head.critical(), head.varint(), head.varint()
        stored, digest = head.varint(), head.take(DIGEST_SIZE)
        (payload_crc,) = _CRC.unpack(head.take(_CRC.size))
        head.end()
        # 2. index, limits
        length = self._position - offset + stored
        entry = Entry(number, kind, critical, rows, raw_size, offset, length, crc)
        if expected is not None and entry != expected:
            raise Damaged("its head says otherwise than the index", where)
        if tally is not None:
            tally.add(kind, critical, rows, raw_size, length, entry.where)
        # 3. payload
        payload = self._take(stored, entry.where)
        if zlib.crc32(payload) != payload_crc:
            raise Damaged("its stored bytes are not as they were written (CRC-32)", entry.where)
        return Chunk(number, kind, critical, rows, raw_size, offset, length, crc, payload, digest)

    def _at(self, offset: int, count: int, where: str) -> bytes:
        self._file.seek(self._base + offset)
        self._position = offset
        return self._take(count, where)

    def _check_index_length(self, length: int) -> None:
        limit = self.limits.max_chunks * _ENTRY_LIMIT + 64
        if length > limit:
            raise TooLarge("bytes of the index", length, limit, "max_chunks", "index")

    def _check_index_crc(self, section: bytes, crc: int) -> None:
        if zlib.crc32(section, self._crc) != crc:
            raise Damaged("the index is not as it was written (CRC-32)", "index")


def _not_ours(start: bytes) -> NotLk | Truncated:
    """The error for a file that does not begin with the magic."""
    if not start:
        return NotLk("the file is empty", "byte 0")
    if MAGIC.startswith(start):
        return Truncated(f"expected {len(MAGIC)} bytes of magic, got {len(start)}", "byte 0")
    changed = {MAGIC.replace(b"\r\n", b"\n"), MAGIC.replace(b"\n", b"\r\n"), bytes([MAGIC[0] & 127]) + MAGIC[1:]}
    if any(start[:7] == other[:7] for other in changed) or start[1:4] == MAGIC[1:4]:
        return NotLk(
            "its first bytes were changed as by a transfer in text mode", "byte 0", "transfer it in binary mode"
        )
    return NotLk(f"not a .lk file, it begins with {start!r}", "byte 0")


def _inflate(data: bytes, size: int) -> bytes:
    """Raw deflate of exactly ``size`` bytes; never makes more than one byte more."""
    stream = zlib.decompressobj(wbits=-15)
    text = stream.decompress(data, size + 1)
    if len(text) != size or not stream.eof or stream.unused_data:
        raise ValueError(f"expected {size} bytes of deflate")
    return text


def describe(reader: Reader) -> list[str]:
    """Lines that show a seekable file: its format, and for each kind chunks, rows, decoded and stored bytes."""
    kinds: dict[str, list[Entry]] = {}
    for entry in reader.chunks:
        kinds.setdefault(entry.kind, []).append(entry)
    raw_size, length = sum(e.raw_size for e in reader.chunks), sum(e.length for e in reader.chunks)
    table: list[tuple[str, ...]] = [("kind", "chunks", "rows", "decoded", "stored")]
    for kind, group in kinds.items():
        numbers = (len(group), sum(e.rows for e in group), sum(e.raw_size for e in group), sum(e.length for e in group))
        table.append((kind + ("" if group[0].critical else " *"), *(f"{number:,}" for number in numbers)))
    table.append(("all", *(f"{number:,}" for number in (len(reader.chunks), reader.rows, raw_size, length))))
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = [
        f".lk format {reader.major}.{reader.minor}, {reader.size:,} bytes ({reader.size - length:,} of them frame)"
    ]
    if reader.digest is not None:
        lines.append(f"BLAKE2b of the original (b2sum -l 128): {reader.digest.hex()}")
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]))
    if any(not group[0].critical for group in kinds.values()):
        lines.append("* a reader may ignore it")
    return lines
