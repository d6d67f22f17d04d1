"""Compressed files: the user's data as a trained model codes it, in the format ``.lk`` (docs/format.md).

    source ──take apart──▶ rows x, condition c      ──the model's codec──▶ chunks "rows"
                           head and side (all else) ──generic──▶           chunk "head", and with the rows

What is decoded is held against digests of every chunk and of the original; a file that was written is one that decodes.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from likely import __version__, models
from likely.coding import fallback
from likely.coding.bits_back import TRIAL_ROWS, Trial, choose_schedule, decode_rows, encode_rows, trial
from likely.coding.codec import ModelCodec
from likely.coding.container import Chunk, Limits, Reader, Writer, canonical_json, content_digest
from likely.coding.described import PatternCells
from likely.coding.errors import (
    Damaged,
    ForeignArithmetic,
    FormatError,
    NewerVersion,
    TooLarge,
    WrongModel,
    intact,
    located,
)
from likely.coding.fingerprint import fingerprint
from likely.coding.parallel import map_chunks, usable_cores
from likely.coding.rows import Rows, spare_bits
from likely.coding.stack import Stack
from likely.contract import Binary, Integers, Model, Reals, Space, Table, Tokens
from likely.data import Schema
from likely.data.originals import Legal, Original, Restored, restore, take_apart
from likely.exact import Irreproducible

#: What a "rows" payload means; a change that gives other bytes gets a new name.
CODING = "rows-2"
#: Compressed bytes of a chunk: enough that lanes, initial bits and checksums cost some 0.1 %.
CHUNK, LEAST_CHUNK = 1_000_000, 500_000
#: A chunk is at least so many times what bits-back borrows at its start: 0.05 % of it.
BORROWED = 2000
#: Bytes of a chunk's cells as they lie in memory; bytes of what is said once of the whole.
MOST_CHUNK, MOST_SAID = 64 << 20, 64 << 20
#: Kinds of chunks.
HEAD, SCHEMA, MODEL, ROWS, PLAIN = KINDS = ("head", "schema", "model", "rows", "rows-plain")

Progress = Callable[[str, int, int], None]

_LENGTH = struct.Struct("<I")
#: Bytes of cells that generic compression is tried on at full strength.
_SAMPLE = 1 << 18
#: Bytes of the places that it is first tried on at its fastest, and about how many places.
_PLACE, _PLACES = 1 << 16, 16
#: Rows that the size of a file is judged by, how many of them side by side, and on how many lanes.
_TRIAL, _TOGETHER, _LANES = 64, 16, 1024
#: Cells for each lane that a single row is coded on.
_CELLS_OF_LANE = 512


@dataclass(frozen=True)
class Sizes:
    """What a file costs, and what for; in bytes but for the bits.

    Args:
        original: the data as it came, decompressed.
        file: the whole ``.lk`` file.
        rows: number of rows.
        coded_bits: what the model's integer tables promise for all rows, net of bits-back.
        coded: bytes of the coded rows, borrowed bits and lanes included.
        initial: of these, what bits-back borrowed at the start of the chunks.
        holes: which cells are missing.
        condition: the columns that the model is conditioned on.
        side: all that neither model nor schema says.
        head: what is said once of the whole: dialect, names, types.
        model: schema and model, if they are in the file.
        plain: bytes of rows that generic compression codes in fewer than the model.
        plain_rows: how many rows these are.
        frame: header, checksums, index.
    """

    original: int = 0
    file: int = 0
    rows: int = 0
    coded_bits: float = 0.0
    coded: int = 0
    initial: int = 0
    holes: int = 0
    condition: int = 0
    side: int = 0
    head: int = 0
    model: int = 0
    plain: int = 0
    plain_rows: int = 0
    frame: int = 0

    def to_json(self) -> dict[str, Any]:
        """All numbers by name."""
        return asdict(self)

    def describe(self) -> str:
        """Some lines for people."""
        share = 100.0 * self.file / max(self.original, 1)
        bits = f", {8 * self.file / self.rows:.3f} bits a row" if self.rows else ""
        names = ("coded", "plain", "holes", "condition", "side", "head", "model", "frame")
        parts = ", ".join(f"{name} {getattr(self, name):,}" for name in names if getattr(self, name))
        return (
            f"{self.file:,} bytes for {self.rows:,} rows ({share:.2f} % of {self.original:,} bytes{bits})\n"
            f"{parts}; the model's tables promise {self.coded_bits / 8:,.0f}, {self.initial:,} were borrowed"
        )


# --------------------------------------------------------------------------------------------------------------
# Cells as bytes
# --------------------------------------------------------------------------------------------------------------


class _Layout:
    """The cells of a batch of a space as bytes: what digests are of, and what generic compression gets.

    Values come first, columns of tables one after another, in the smallest whole-number type that the space needs;
    then, if a cell may be missing, one bit a cell, 1 where it is there, in the same order.
    """

    def __init__(self, space: Space) -> None:
        self.space = space
        self._rows = None if isinstance(space, Reals) else Rows(space)
        self._type = np.dtype(_natural_type(space))
        self.may_miss = space.missing
        #: Whether a cell is a byte, in memory as well; bytes of a row there.
        self._octets = isinstance(space, Binary | Integers) and self._type.itemsize == 1 and not space.missing
        self.row = space.dims if self._octets else 8 * space.dims

    def sizes(self, n: int) -> tuple[int, int]:
        """Bytes of the values and of the pattern of holes of n rows."""
        cells = n * self.space.dims
        return cells * self._type.itemsize, math.ceil(cells / 8) if self.may_miss else 0

    def to_bytes(self, x: Tensor) -> tuple[bytes, bytes]:
        """Values, and the pattern of holes as one bit a cell (empty where the space has none)."""
        present: np.ndarray | None = None
        if self._rows is None:
            values = torch.nan_to_num(x.double(), 0.0).numpy()
            present = ~torch.isnan(x).numpy()
        elif self._octets and x.dtype == torch.uint8:
            values = x.numpy()
        else:
            values, present = self._rows.symbols(x)
        octets = self._ordered(values).astype(self._type.newbyteorder("<"), copy=False).tobytes()
        if not self.may_miss:
            return octets, b""
        here = np.ones(values.shape, bool) if present is None else present
        return octets, np.packbits(self._ordered(here)).tobytes()

    def present(self, holes: bytes, n: int) -> np.ndarray | None:
        """The pattern of n rows as a mask ``(n, *shape)`` of the cells that are there."""
        if not self.may_miss:
            return None
        bits = np.unpackbits(np.frombuffer(holes, np.uint8), count=n * self.space.dims).astype(bool)
        return self._unordered(bits, n)

    def pack_holes(self, holes: bytes, n: int) -> bytes:
        """The pattern in few bytes, by the patterns of rows or the shares of columns."""
        if not holes:
            return b""
        mask = self.present(holes, n)
        assert mask is not None
        stack = Stack(_hole_lanes(n))
        PatternCells((n, self.space.dims)).push(stack, mask.reshape(n, -1))
        words = stack.to_words().astype("<u4").tobytes()
        return _LENGTH.pack(len(words)) + words

    def unpack_holes(self, packed: bytes, n: int) -> bytes:
        """The pattern again."""
        if len(packed) % 4:
            raise Damaged(f"pattern of holes: expected whole words, got {len(packed)} bytes")
        stack = Stack.from_words(np.frombuffer(packed, "<u4"), _hole_lanes(n))
        mask = PatternCells((n, self.space.dims)).pop(stack)
        stack.finish()
        return np.packbits(self._ordered(mask.reshape(n, *self.space.shape))).tobytes()

    def from_bytes(self, values: bytes, holes: bytes, n: int) -> Tensor:
        """The batch again."""
        cells = self._unordered(np.frombuffer(values, self._type.newbyteorder("<")), n)
        if self._octets:
            return torch.from_numpy(cells.copy())
        present = self.present(holes, n)
        if self._rows is None:
            x = torch.from_numpy(cells.astype(np.float64))
            return x if present is None else x.masked_fill(torch.from_numpy(~present), torch.nan)
        return self._rows.values(cells.astype(np.int64), present)

    def _ordered(self, cells: np.ndarray) -> np.ndarray:
        return cells.T if isinstance(self.space, Table) else cells

    def _unordered(self, cells: np.ndarray, n: int) -> np.ndarray:
        if isinstance(self.space, Table):
            return np.ascontiguousarray(cells.reshape(self.space.dims, n).T)
        return cells.reshape(n, *self.space.shape)


def _hole_lanes(n: int) -> int:
    return max(1, min(64, n // 1024))


def _natural_type(space: Space) -> str:
    if isinstance(space, Reals):
        return "f8"
    levels = {Binary: 2, Integers: getattr(space, "levels", 0), Tokens: getattr(space, "vocab", 0)}.get(type(space), 0)
    if not levels:
        return "i8"
    return "u1" if levels <= 1 << 8 else "u2" if levels <= 1 << 16 else "u4"


def _fastest(content: bytes) -> bytes:
    """Content under generic compression at its fastest, which looks back over 32 KiB."""
    return zlib.compress(content, 1)


def _section(content: bytes) -> bytes:
    """Content under generic compression, after its length; nothing for no content."""
    if not content:
        return b""
    packed = fallback.compress(content)
    return _LENGTH.pack(len(packed)) + packed


class _Sections:
    """Takes a payload of sections apart."""

    def __init__(self, payload: bytes) -> None:
        self.rest = memoryview(payload)

    def take(self, size: int, what: str) -> bytes:
        """The next section, which has ``size`` bytes when decompressed."""
        return fallback.decompress(self.raw(what), size) if size else b""

    def raw(self, what: str) -> bytes:
        """The next section as it is stored."""
        if len(self.rest) < _LENGTH.size:
            raise Damaged(f"{what}: expected a section, got the payload's end")
        (stored,) = _LENGTH.unpack_from(self.rest)
        if stored > len(self.rest) - _LENGTH.size:
            raise Damaged(f"{what}: expected at most {len(self.rest) - _LENGTH.size} bytes, got {stored}")
        octets = bytes(self.rest[_LENGTH.size : _LENGTH.size + stored])
        self.rest = self.rest[_LENGTH.size + stored :]
        return octets

    def finish(self) -> None:
        """Nothing may follow."""
        if len(self.rest):
            raise Damaged(f"expected the payload's end, got {len(self.rest)} more bytes")


# --------------------------------------------------------------------------------------------------------------
# One chunk
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    """Consecutive rows, taken apart."""

    x: Tensor
    condition: Tensor | None
    side: bytes

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes as arrays, for tensors would go through shared memory, which may be scarce."""
        condition = None if self.condition is None else self.condition.numpy()
        return _part_of, (self.x.numpy(), condition, self.side)


@dataclass(frozen=True)
class _Span:
    """Consecutive rows of an original, taken apart where they are coded; for a process without it, before that."""

    original: Original
    first: int
    stop: int
    legal: Legal

    def part(self) -> _Part:
        rows = self.original.rows(self.first, self.stop, self.legal)
        return _Part(rows.x, rows.condition, rows.side)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.part().__reduce__()


def _part_of(x: np.ndarray, condition: np.ndarray | None, side: bytes) -> _Part:
    return _Part(torch.from_numpy(x), None if condition is None else torch.from_numpy(condition), side)


@dataclass(frozen=True)
class _Coded:
    """A chunk as it is written, and what it costs."""

    kind: str
    payload: bytes
    rows: int
    raw_size: int
    digest: bytes
    costs: dict[str, float]


class _Job:
    """A model ready to code chunks, in this process or in another.

    Args:
        model: the trained model.
        spare: see :meth:`likely.contract.Model.codec`.
        verify: whether to decode what was encoded.
    """

    def __init__(self, model: Model, spare: list[int], verify: bool = False) -> None:
        self.model, self.spare, self.verify = model.eval(), spare, verify
        self.codec: ModelCodec = model.codec(spare_bits=spare or None)
        self.cells = _Layout(model.space)
        self._condition = None if model.condition is None else _Layout(model.condition)
        self._other: ModelCodec | None = None
        #: What a few rows of the original cost, if there are several chunks; else each chunk is tried by itself.
        self.tried: Trial | None = None

    def everywhere(self) -> dict[str, Any]:
        """What :func:`map_chunks` is told, that its workers have this job."""
        return {"build": _Job.from_bytes, "state": self.to_bytes(), "built": self}

    def to_bytes(self) -> bytes:
        """What another process needs."""
        about = {**models.describe(self.model), "spare": self.spare, "verify": self.verify}
        about["tried"] = self.tried and asdict(self.tried)
        octets = json.dumps(about).encode()
        return struct.pack("<I", len(octets)) + octets + safetensors.torch.save(_tensors(self.model))

    @classmethod
    def from_bytes(cls, state: bytes) -> _Job:
        (length,) = struct.unpack_from("<I", state)
        about = json.loads(state[4 : 4 + length])
        spare, verify, tried = (about.pop(name) for name in ("spare", "verify", "tried"))
        model = models.build(about)
        model.load_state_dict(safetensors.torch.load(state[4 + length :]))
        job = cls(model, spare, verify)
        job.tried = tried and Trial(**tried)
        return job

    def encode(self, rows: _Part | _Span) -> _Coded:
        """Code the rows by the model, or by generic compression where that takes less."""
        part = rows if isinstance(rows, _Part) else rows.part()
        n = len(part.x)
        values, holes = self.cells.to_bytes(part.x)
        given: tuple[bytes, ...] = ()
        condition = None  # as the decoder will have it, to the last bit
        if self._condition is not None and part.condition is not None:
            given = self._condition.to_bytes(part.condition)
            condition = self._condition.from_bytes(given[0], given[1], n)
        content = [part.side, values, holes, *given]
        sections = [_section(part.side), self.cells.pack_holes(holes, n), *map(_section, given)]
        schedule = None if self.tried is None else choose_schedule(part.x.shape, self.tried)
        coding = encode_rows(self.codec, part.x, condition, schedule=schedule)
        near = self._near(part.x, values, len(coding.data))
        plain = _section(values) if near else b""
        costs: dict[str, float] = {
            "side": len(sections[0]),
            "holes": len(sections[1]),
            "condition": sum(map(len, sections[2:])),
            "coded_bits": coding.ideal_bits,
        }
        if near and len(plain) < len(coding.data):
            kind, body = PLAIN, plain
            costs |= {"plain": len(plain), "plain_rows": n}
        else:
            kind, body = ROWS, coding.data
            costs |= {"coded": len(body), "initial": coding.initial_bits / 8}
        payload = b"".join([*sections, body])
        coded = _Coded(kind, payload, n, sum(map(len, content)), content_digest(*content), costs)
        if self.verify:
            self._verify(coded)
        return coded

    def _near(self, x: Tensor, values: bytes, coded: int) -> bool:
        """Whether generic compression may code the values in fewer bytes than the model.

        At full strength it is slow, so it is first tried at its fastest on some places, then at full strength on some
        of the rows.
        """
        apart = max(_PLACE, len(values) // _PLACES)
        places = [values[first : first + _PLACE] for first in range(0, len(values), apart)]
        found, seen = (sum(map(len, parts)) for parts in (map(_fastest, places), places))
        if found * len(values) >= 1.5 * coded * seen:
            return False
        some = x[: max(1, len(x) * _SAMPLE // max(len(values), 1))]
        if len(some) >= len(x):
            return True
        sample, _ = self.cells.to_bytes(some)
        return len(_section(sample)) * len(x) < 1.2 * coded * len(some)

    def _verify(self, coded: _Coded) -> None:
        """Decode, every product of the networks being computed another way than it was for encoding."""
        if self._other is None:
            self._other = self.model.codec(spare_bits=self.spare or None)
            for network in self._other.networks.values():
                network.reroute()
        try:
            self._decode(self._other, coded.kind, coded.payload, coded.rows, coded.raw_size, coded.digest)
        except Damaged as error:
            raise Irreproducible(
                "the coded rows decode otherwise when products are computed in another way: this machine's arithmetic "
                "is not what it should be, and nothing was written"
            ) from error

    def decode(self, chunk: Chunk) -> _Part:
        """The rows of a chunk.

        Raises:
            Damaged: it is not as it was written.
        """
        with intact("rows", chunk.where), located(chunk.where):
            return self._decode(self.codec, chunk.kind, chunk.payload, chunk.rows, chunk.raw_size, chunk.digest)

    def _decode(self, codec: ModelCodec, kind: str, payload: bytes, n: int, raw_size: int, digest: bytes) -> _Part:
        cells = n * self.cells.row
        if n > 1 and cells > MOST_CHUNK:
            raise TooLarge("bytes of a chunk's cells", cells, MOST_CHUNK)
        sizes = self.cells.sizes(n)
        given_sizes = () if self._condition is None else self._condition.sizes(n)
        side_size = raw_size - sum(sizes) - sum(given_sizes)
        if side_size < 0:
            raise Damaged(f"expected {raw_size - side_size} bytes or more for {n} rows, got {raw_size}")
        sections = _Sections(payload)
        side = sections.take(side_size, "side information")
        holes = self.cells.unpack_holes(sections.raw("pattern of holes"), n) if sizes[1] else b""
        given = [sections.take(size, "condition") for size in given_sizes]
        condition = None if self._condition is None else self._condition.from_bytes(given[0], given[1], n)
        if kind == PLAIN:
            x = self.cells.from_bytes(sections.take(sizes[0], "cells"), holes, n)
            sections.finish()
        else:
            present = self.cells.present(holes, n)
            x = decode_rows(codec, bytes(sections.rest), n, condition, present)
        content = [side, *self.cells.to_bytes(x), *given]
        if content_digest(*content) != digest:
            raise Damaged("the decoded content is not what was compressed")
        return _Part(x, condition, side)


# --------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------


def compress(
    model: Model,
    schema: Schema,
    source: Any,
    target: str | Path | BinaryIO,
    *,
    embed: bytes | None = None,
    run: str | None = None,
    verify: bool = True,
    workers: int | None = None,
    read: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Sizes:
    """Write a source as a ``.lk`` file.

    Args:
        model: trained, over the schema's space; with ``embed`` the model that these bytes unpack to.
        schema: what the data is.
        source: a path, ``"-"``, or an object.
        target: path, or binary stream.
        embed: the packed model (:func:`likely.coding.weights.pack`) to put into the file; None for a file that needs
            its run.
        run: where the run lies, as a hint for whoever decompresses.
        verify: decode every chunk before it is written, its networks' products computed in another way.
        workers: processes at work; by default one for each core, if there is enough to do.
        read: how this source differs from the one that was fitted.
        limits: what the file may hold.
        progress: called with ``"rows"``, rows done and all rows.

    Raises:
        NoCodec: the model has no codec; the message says why.
        ValueError: the source is not of the schema.
        Irreproducible: verification found that this machine's arithmetic errs.
    """
    original = take_apart(schema, source, **dict(read or {}))
    spare = _spare_bits(schema.space, original)
    job = _Job(model, spare, verify)
    step, workers = _plan(original, job, workers)
    if step < original.n:
        job.tried = _tried(job.codec, original)
    header = {
        "coding": CODING,
        "exactness": original.exactness,
        "likely": __version__,
        "model": {"fingerprint": _fingerprint(model, schema), "name": model.name()},
        "probes": {name: network.probe().hex() for name, network in job.codec.networks.items()},
        "run": run,
        "spare": spare,
    }
    costs: dict[str, float] = {"original": original.size, "rows": original.n}
    with Writer(target, {key: value for key, value in header.items() if value not in (None, [], {})}, limits) as writer:
        if embed is not None:
            costs["model"] = _add(writer, SCHEMA, _json(schema)) + len(embed)
            writer.add(MODEL, embed)
        costs["head"] = _add(writer, HEAD, original.head)
        done = 0
        spans = [
            _Span(original, first, min(first + step, original.n), job.codec.legal)
            for first in range(0, original.n, step)
        ]
        for coded in map_chunks(_Job.encode, spans, workers, **job.everywhere()):
            writer.add(coded.kind, coded.payload, rows=coded.rows, raw_size=coded.raw_size, digest=coded.digest)
            for name, value in coded.costs.items():
                costs[name] = costs.get(name, 0) + value
            done += coded.rows
            if progress is not None:
                progress("rows", done, original.n)
        writer.finish(original.digest)
        costs["file"] = writer.size
    named = sum(costs.get(name, 0) for name in ("coded", "holes", "condition", "side", "head", "model", "plain"))
    costs["frame"] = costs["file"] - named
    return Sizes(**{name: value if name == "coded_bits" else int(value) for name, value in costs.items()})  # type: ignore[arg-type]


class Archive:
    """A ``.lk`` file, open for reading.

    Args:
        source: path, bytes, or binary stream that can be read at any place.
        limits: what the file may declare.

    Raises:
        FormatError: the file is not intact, or not one that this version reads.
    """

    def __init__(self, source: str | Path | bytes | BinaryIO, limits: Limits | None = None) -> None:
        self.reader = Reader.open(source, limits, known=KINDS)
        self.header = self.reader.header
        coding = self.header.get("coding")
        if coding != CODING:
            raise NewerVersion(f"expected rows coded as {CODING!r}, got {coding!r}", "header")

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.reader.rows

    @property
    def embedded(self) -> bool:
        """Whether the file holds its model."""
        return any(entry.kind == MODEL for entry in self.reader.chunks)

    def model(self) -> tuple[Model, Schema]:
        """The model and the schema that the file holds.

        Raises:
            FormatError: it holds none, or none that can be built.
        """
        from likely.coding.weights import unpack

        if not self.embedded:
            raise FormatError("the file holds no model", advice="decompress with the run that compressed the file")
        with intact("a schema and a model", "embedded model"):
            schema = Schema.from_json(json.loads(self._only(SCHEMA)))
            model = unpack(self._chunk(MODEL).payload, models.build)
        return model, schema

    def head(self) -> bytes:
        """What is said of the whole original: the JSON that :func:`likely.data.originals.restore` takes."""
        return self._only(HEAD)

    def restore(
        self,
        model: Model,
        schema: Schema,
        *,
        rows: tuple[int, int] | None = None,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> Restored:
        """The original, decoded while it is written or asked for.

        Args:
            model: the model that coded it.
            schema: its schema.
            rows: only these, from … to before …; chunks without any of them are not decoded.
            workers: processes at work.
            progress: called with ``"rows"``, rows done and all rows.

        Raises:
            WrongModel: it was another model or schema.
            ForeignArithmetic: this machine evaluates the model's networks otherwise.
            Damaged: the file is not as it was written.
        """
        job = self._job(model, schema)
        first, chunks = self._chunks_of(rows)
        wanted = sum(self.reader.chunks[number].rows for number in chunks)
        workers = _workers(len(chunks), workers)

        def parts() -> Iterator[tuple[Tensor, Tensor | None, bytes]]:
            stored = map(self.reader.read, chunks)
            done = 0
            for part in map_chunks(_Job.decode, stored, workers, **job.everywhere()):
                yield part.x, part.condition, part.side
                done += len(part.x)
                if progress is not None:
                    progress("rows", done, wanted)

        return restore(schema, self.head(), parts(), first=first, keep=rows)

    def _chunks_of(self, rows: tuple[int, int] | None) -> tuple[int, list[int]]:
        """Number of the first row, and the chunks, that hold these rows."""
        if rows is not None and not 0 <= rows[0] <= rows[1] <= self.rows:
            raise ValueError(f"rows: expected 0 <= start <= stop <= {self.rows}, got {rows[0]} and {rows[1]}")
        start, found, first = 0, [], None
        for entry in self.reader.chunks:
            if entry.kind not in (ROWS, PLAIN):
                continue
            stop = start + entry.rows
            if rows is None or (start < rows[1] and rows[0] < stop):
                found.append(entry.number)
                first = start if first is None else first
            start = stop
        return first or 0, found

    def _job(self, model: Model, schema: Schema) -> _Job:
        """Check that model, schema and machine are those of the file, before anything is decoded."""
        expected, got = self._said("model", "fingerprint"), _fingerprint(model, schema)
        if expected != got:
            raise WrongModel(str(expected), got, "header")
        with intact("a model with a codec, and its spare bits", "header"):
            try:
                job = _Job(model, [int(bits) for bits in self.header.get("spare", [])])
            except Irreproducible:
                raise ForeignArithmetic("model") from None
        for name, network in job.codec.networks.items():
            if self._said("probes", name) != network.probe().hex():
                raise ForeignArithmetic(name, tuple(sorted(set(network.routes.values()))), "header")
        return job

    def _said(self, group: str, name: str) -> Any:
        values = self.header.get(group)
        return values.get(name) if isinstance(values, dict) else None

    def _chunk(self, kind: str) -> Chunk:
        found = [entry.number for entry in self.reader.chunks if entry.kind == kind]
        if len(found) != 1:
            raise Damaged(f"expected one chunk of the kind {kind!r}, got {len(found)}", "index")
        return self.reader.read(found[0])

    def _only(self, kind: str) -> bytes:
        """Content of the one chunk of a kind."""
        chunk = self._chunk(kind)
        if chunk.raw_size > MOST_SAID:
            raise TooLarge("decoded bytes", chunk.raw_size, MOST_SAID, where=chunk.where)
        with located(chunk.where):
            content = fallback.decompress(chunk.payload, chunk.raw_size)
            chunk.verify(content)
        return content


def _plan(original: Original, job: _Job, workers: int | None) -> tuple[int, int]:
    """Rows of a chunk, and how many processes are worth starting."""
    n = original.n
    if not n:
        return 1, 1
    size = max(float(n), _estimate_bits(job.codec, original, _TRIAL) / 8)
    cores = usable_cores() if workers is None else workers
    chunk = max(LEAST_CHUNK, min(CHUNK, size / cores), BORROWED * _borrowed(job.codec, original))
    count = max(1, round(size / chunk))
    if count > 1 and cores > 1:
        count = -(-count // cores) * cores  # so that all processes end together
    step = min(-(-n // count), max(1, MOST_CHUNK // job.cells.row))
    return step, _workers(-(-n // step), workers)


def estimate_bits(model: Model, original: Original, rows: int) -> float:
    """Bits that a model needs for all rows of an original, judged by about so many of them.

    Raises:
        NoCodec: the model has none.
    """
    return _estimate_bits(model.eval().codec(spare_bits=_spare_bits(model.space, original) or None), original, rows)


def _estimate_bits(codec: ModelCodec, original: Original, rows: int) -> float:
    n = original.n
    stack = Stack(_LANES)
    seen, places = 0, max(1, min(n, rows) // _TOGETHER)
    for place in range(places):
        first = place * n // places
        some = original.rows(first, min(first + _TOGETHER, n), codec.legal)
        codec.push(stack, some.x, some.condition)
        seen += len(some.x)
    return stack.bits * n / max(seen, 1)


def _tried(codec: ModelCodec, original: Original) -> Trial:
    """What rows from all over the original cost."""
    rows = min(original.n, TRIAL_ROWS)
    apart = [
        original.rows(first, first + 1, codec.legal)
        for first in range(0, original.n // rows * rows, original.n // rows)
    ]
    given = [row.condition for row in apart if row.condition is not None]
    return trial(codec, torch.cat([row.x for row in apart]), torch.cat(given) if given else None)


def _borrowed(codec: ModelCodec, original: Original) -> int:
    """Bytes that bits-back borrows for the first row, to within a word a lane."""
    first = original.rows(0, 1, codec.legal)
    stack = Stack(1 + first.x.numel() // _CELLS_OF_LANE)
    codec.push(stack, first.x, first.condition)
    return 4 * (stack.supplied - stack.lanes + 1)


def _workers(chunks: int, workers: int | None) -> int:
    return max(1, min(chunks, usable_cores() if workers is None else workers))


def _spare_bits(space: Space, original: Original) -> list[int]:
    """What holds for all rows of the original."""
    if not isinstance(space, Table) or all(column.has_probability for column in space.columns):
        return []
    found: list[int] = []
    for first in range(0, original.n, 1 << 16):
        here = spare_bits(space, original.rows(first, min(first + (1 << 16), original.n)).x)
        found = [min(pair) for pair in zip(found, here)] if found else here
    return found


def _tensors(model: Model) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def _fingerprint(model: Model, schema: Schema) -> str:
    """Of weights, options and schema, and of what this version makes of them: 128 bits in hexadecimal.

    Options that have their default are left out, so that a file outlives the options that its model gets later.
    """
    config = {"model": _chosen(models.describe(model)), "schema": schema.to_json()}
    return fingerprint(_tensors(model), config, CODING)[:32]


def _chosen(described: Mapping[str, Any]) -> dict[str, Any]:
    """The description of a model without the options that are as its class has them; of models among them too."""
    defaults = models.find(described["model"]).options()
    chosen = {}
    for name, value in described["options"].items():
        if isinstance(value, dict) and {"model", "space", "options"} <= value.keys():
            chosen[name] = _chosen(value)
        elif value != json.loads(json.dumps(defaults[name].default, default=repr)):
            chosen[name] = value
    return {**described, "options": chosen}


def _json(schema: Schema) -> bytes:
    return canonical_json(schema.to_json())


def _add(writer: Writer, kind: str, content: bytes) -> int:
    """Add a chunk under generic compression; its bytes."""
    if len(content) > MOST_SAID:
        raise TooLarge(f"bytes of the {kind}", len(content), MOST_SAID)
    packed = fallback.compress(content)
    writer.add(kind, packed, raw_size=len(content), digest=content_digest(content))
    return len(packed)
