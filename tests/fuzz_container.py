"""Mutates a .lk file and decodes every mutant: each must end in a named error or in exactly the original.

    python tests/fuzz_container.py FILE --count 100000 [--decode module:function] [--stream]

Half of the mutants are made of the bytes (flips, cuts, copies), half of the structure, with every checksum of the frame
made anew, so that the deeper checks are reached.  Runs under a limit of memory and, for each mutant, of time; prints a
table of outcomes.  ``decode`` takes the file's bytes and returns what it decodes to; it must not trust the frame's
numbers of rows more than any other number.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import importlib
import io
import json
import random
import re
import resource
import signal
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from likely.coding.container import Limits, Reader, content_digest
from likely.coding.errors import FormatError
from likely.coding.fallback import compress, decompress
from likely.data import DataError

PAGE = Path(__file__).parent.parent / "docs" / "format.md"
Forged = int | bytes  # a number, or the very bytes to write in its place


def reader_of_the_page() -> Callable[[bytes], dict[str, Any]]:
    """The reader that docs/format.md shows."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace["read_lk"]


# --------------------------------------------------------------------------------------------------------------
# A file as its parts, written anew from docs/format.md
# --------------------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """Everything a file says, where any of it may be false."""

    header: bytes
    chunks: list[dict[str, Any]]
    digest: bytes
    version: tuple[int, int] = (1, 0)
    flags: int = 0
    stored: bytes | None = None
    size: int | None = None
    index: list[dict[str, Any]] | None = None
    forged: dict[str, Forged] = field(default_factory=dict)


def parse(data: bytes) -> Parts:
    """The parts of an intact file."""
    content = reader_of_the_page()(data)
    stored, size = struct.unpack("<II", data[12:20])
    header = data[24 : 24 + stored]
    text = header if stored == size else zlib.decompress(header, -15)
    return Parts(text, content["chunks"], content["digest"], content["version"], stored=header, size=size)


def varint(number: Forged) -> bytes:
    if isinstance(number, bytes):
        return number
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def name(kind: Forged | str) -> bytes:
    return kind if isinstance(kind, bytes) else bytes([len(str(kind))]) + str(kind).encode()


def assemble(parts: Parts) -> bytes:
    """The file of these parts, with every checksum of the frame as it has to be."""
    stored = parts.header if parts.stored is None else parts.stored
    size = len(parts.header) if parts.size is None else parts.size
    length = parts.forged.get("header length", len(stored))
    start = struct.pack("<8sBBHII", b"\x89lky\r\n\x1a\n", *parts.version, parts.flags, length, size)
    crc = zlib.crc32(start + stored)
    out = start + struct.pack("<I", crc) + stored
    entries = []
    for chunk in parts.chunks:
        fields = varint(chunk["number"]) + name(chunk["kind"]) + bytes([chunk["flags"]])
        fields += varint(chunk["rows"]) + varint(chunk["raw_size"])
        fields += varint(chunk.get("payload length", len(chunk["payload"]))) + chunk["digest"]
        fields += struct.pack("<I", zlib.crc32(chunk["payload"]))
        head = b"C" + bytes([len(fields) & 255]) + fields
        head_crc = zlib.crc32(head, crc)
        section = head + struct.pack("<I", head_crc) + chunk["payload"]
        out += section
        entries.append({**chunk, "length": len(section), "crc": head_crc})
    for entry, forged in zip(entries, parts.index or []):
        entry.update(forged)
    body = varint(parts.forged.get("count", len(entries)))
    for entry in entries:
        body += name(entry["kind"]) + bytes([entry["flags"]]) + varint(entry["rows"]) + varint(entry["raw_size"])
        body += varint(entry["length"]) + struct.pack("<I", entry["crc"])
    body += parts.digest
    index = b"I" + struct.pack("<I", parts.forged.get("index length", len(body))) + body
    total = parts.forged.get("trailer length", len(index))
    return out + index + struct.pack("<II4s", total, zlib.crc32(index, crc), b"\x1aykl")


# --------------------------------------------------------------------------------------------------------------
# Mutations
# --------------------------------------------------------------------------------------------------------------


def forge(rng: random.Random, number: int, bits: int = 63) -> int:
    """Another number, near the true one or near a power of two."""
    near = [0, 1, number - 1, number + 1, 2 * number, number ^ 1 << rng.randrange(bits)]
    powers = [(1 << k) + d for k in (7, 8, 16, 30, 31, 32, 40, 62, 63) for d in (-1, 0)]
    return rng.choice([n for n in near + powers if 0 <= n < 1 << bits and n != number])


def flip_bits(rng: random.Random, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def truncate(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def extend(rng: random.Random, data: bytes) -> bytes:
    return data + rng.randbytes(rng.randint(1, 64))


def delete_slice(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randint(1, 64) :]


def copy_slice(rng: random.Random, data: bytes) -> bytes:
    start, target, length = rng.randrange(len(data)), rng.randrange(len(data)), rng.randint(1, 256)
    keep = rng.choice((0, length))  # insert or overwrite
    return data[:target] + data[start : start + length] + data[target + keep :]


def overwrite(rng: random.Random, data: bytes) -> bytes:
    start, length = rng.randrange(len(data)), rng.randint(1, 16)
    new = rng.choice((bytes(length), b"\xff" * length, rng.randbytes(length)))
    return data[:start] + new + data[start + length :]


def forge_chunk(rng: random.Random, parts: Parts) -> None:
    """A false number in a chunk's head, in its place in the index, or in both alike."""
    chunk = rng.choice(parts.chunks)
    key = rng.choice(["rows", "raw_size", "number", "payload length", "flags", "kind", "digest"])
    if key == "flags":
        value: Any = forge(rng, chunk["flags"], 8)
    elif key == "kind":
        value = rng.choice([b"\x00", b"\x11" + b"a" * 17, b"\x02A?", b"\x01x", b"\xff", b"\x04\xff\xfe\x00a"])
        value = rng.choice([value, name(rng.choice(parts.chunks)["kind"])])
    elif key == "digest":
        value = flip_bits(rng, chunk["digest"])
    else:
        number = forge(rng, chunk.get(key, len(chunk["payload"])))
        overlong = varint(number)[:-1] + bytes([varint(number)[-1] | 128, 0])
        value = rng.choice([number, number, number, overlong, b"\xff" * 9, b"\xff" * 10 + b"\x01"])
    _forge_where(rng, parts, chunk, key, value)


def _forge_where(rng: random.Random, parts: Parts, chunk: dict[str, Any], key: str, value: Any) -> None:
    where = rng.choice(["head", "index", "both"])
    if where == "index":
        index: list[dict[str, Any]] = [{} for _ in parts.chunks]
        index[parts.chunks.index(chunk)] = {"length" if key == "payload length" else key: value}
        parts.index = index
    else:
        old = dict(chunk)
        chunk[key] = value
        if where == "head":
            parts.index = [{key: old[key]} if other is chunk and key in old else {} for other in parts.chunks]


def damage_payload(rng: random.Random, parts: Parts) -> None:
    chunk = rng.choice(parts.chunks)
    if chunk["payload"]:
        mutate = rng.choice([flip_bits, truncate, extend, delete_slice, copy_slice, overwrite])
        chunk["payload"] = mutate(rng, chunk["payload"])


def shuffle_chunks(rng: random.Random, parts: Parts) -> None:
    """Chunks that are gone, doubled or elsewhere, with their old numbers or numbered anew."""
    chunks, i, j = parts.chunks, rng.randrange(len(parts.chunks)), rng.randrange(len(parts.chunks))
    how = rng.choice(["drop", "double", "swap", "swap payloads", "splice"])
    if how == "drop":
        del chunks[i]
    elif how == "double":
        chunks.insert(j, copy.copy(chunks[i]))
    elif how == "swap":
        chunks[i], chunks[j] = chunks[j], chunks[i]
    elif how == "swap payloads":
        chunks[i]["payload"], chunks[j]["payload"] = chunks[j]["payload"], chunks[i]["payload"]
    else:
        cut = rng.randint(0, len(chunks[i]["payload"]))
        chunks[i]["payload"] = chunks[i]["payload"][:cut] + chunks[j]["payload"][cut:]
    if rng.random() < 0.7:
        for number, chunk in enumerate(chunks):
            chunk["number"] = number


def forge_frame(rng: random.Random, parts: Parts) -> None:
    """False lengths and counts outside the chunks, other versions and flags, another digest of the whole."""
    key = rng.choice(["count", "index length", "trailer length", "header length", "size", "version", "flags", "digest"])
    if key == "size":
        parts.size = forge(rng, parts.size or 0, 32)
    elif key == "version":
        parts.version = (rng.choice([0, 1, 2, 255]), rng.choice([0, 1, 255]))
    elif key == "flags":
        parts.flags = forge(rng, 0, 16)
    elif key == "digest":
        parts.digest = flip_bits(rng, parts.digest)
    elif key == "count":
        parts.forged[key] = forge(rng, len(parts.chunks))
    else:
        parts.forged[key] = forge(rng, 100, 32)


STRANGE = [None, True, -1, 0, 1 << 62, 1 << 64, 10**400, 0.5, 1e308, "", "x" * 1000, [], {}, [[[]]], "\ud800"]


def edit_header(rng: random.Random, parts: Parts) -> None:
    """Another header in JSON, or something like it."""
    header = json.loads(parts.header)
    how = rng.choice(["change", "change", "remove", "add", "text", "deep", "junk"])
    path: Any = header
    while how == "change" and isinstance(path, dict) and path:
        key = rng.choice(sorted(path))
        if isinstance(path[key], dict) and rng.random() < 0.7:
            path = path[key]
            continue
        old = path[key]
        path[key] = forge(rng, abs(old), 62) if type(old) is int and rng.random() < 0.5 else rng.choice(STRANGE)
        break
    if how == "remove" and header:
        del header[rng.choice(sorted(header))]
    if how == "add":
        header["added"] = rng.choice(STRANGE)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    if how == "text":
        mutate = rng.choice([flip_bits, truncate, extend, delete_slice, copy_slice, overwrite])
        text = mutate(rng, text)
    if how == "deep":
        deep = rng.choice([17, 500, 100_000])
        text = rng.choice([b'{"a":' + b"[" * deep + b"]" * deep + b"}", b'{"a":' * deep + b"1" + b"}" * deep])
    if how == "junk":
        text = rng.choice([b"", b"null", b"[1]", b"NaN", b'{"a":NaN}', b'{"a":1,"a":2}', b'{"a": 1}', b"\xff\xfe{}"])
    parts.header, parts.stored, parts.size = text, None, None
    if rng.random() < 0.5:
        deflate = zlib.compressobj(9, wbits=-15)
        parts.stored = deflate.compress(text) + deflate.flush()
        parts.size = len(text)


def edit_content(rng: random.Random, parts: Parts) -> None:
    """Other JSON in a chunk that holds some, under generic compression, with sizes and digests as they have to be."""
    chunk = rng.choice([chunk for chunk in parts.chunks if chunk["kind"] in OF_CONTENT])
    if chunk["kind"] != "model":
        content = edit_json(rng, decompress(chunk["payload"], chunk["raw_size"]))
        chunk["payload"] = compress(content)
    else:  # a model begins with its description, after the description's size and its packed size
        size, stored = struct.unpack_from("<II", chunk["payload"])
        text = edit_json(rng, decompress(chunk["payload"][8 : 8 + stored], size))
        packed = compress(text)
        content = struct.pack("<II", len(text), len(packed)) + packed + chunk["payload"][8 + stored :]
        chunk["payload"] = content
    chunk["raw_size"], chunk["digest"] = len(content), content_digest(content)


def edit_json(rng: random.Random, text: bytes) -> bytes:
    """The text with one value in it replaced, removed or doubled, or with damage to its letters."""
    if rng.random() < 0.2:
        return rng.choice([flip_bits, truncate, extend, delete_slice, copy_slice, overwrite])(rng, text)
    value = json.loads(text)
    places: list[tuple[Any, Any]] = []
    left = [value]
    while left:
        node = left.pop()
        if isinstance(node, dict | list):
            places += [(node, key) for key in (node if isinstance(node, dict) else range(len(node)))]
            left += node.values() if isinstance(node, dict) else node
    node, key = rng.choice(places)
    old = node[key]
    how = rng.choice(["strange", "strange", "other", "number", "number", "remove", "double"])
    if how == "remove":
        del node[key]
    elif how == "double":
        node[key] = [old, old] if isinstance(node, dict) else old
        if isinstance(node, list):
            node.insert(key, old)
    elif how == "number" and isinstance(old, int | float):
        node[key] = rng.choice([forge(rng, abs(int(old)), 62), -old, old + 0.5, old + 1, 1e300])
    elif how == "other":
        node[key] = copy.deepcopy(rng.choice(places)[0])
    else:
        node[key] = rng.choice(STRANGE)
    return json.dumps(value, separators=(",", ":")).encode()


#: Kinds of chunks that hold JSON.
OF_CONTENT = ("schema", "head", "model")
OF_BYTES = [flip_bits, flip_bits, truncate, extend, delete_slice, copy_slice, overwrite]
OF_STRUCTURE = [forge_chunk, forge_chunk, damage_payload, shuffle_chunks, forge_frame, edit_header]


def mutants(data: bytes, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Mutants of an intact file without end, and what was done to each."""
    rng = random.Random(seed)
    parts = parse(data)
    says = any(chunk["kind"] in OF_CONTENT for chunk in parts.chunks)
    kinds_of_structure = OF_STRUCTURE + [edit_content] * 2 * says
    while True:
        if rng.random() < 0.5:
            of_bytes = rng.choice(OF_BYTES)
            mutant, done = of_bytes(rng, data), of_bytes.__name__
        else:
            of_structure = rng.choice(kinds_of_structure)
            changed = copy.deepcopy(parts)
            of_structure(rng, changed)
            mutant, done = assemble(changed), of_structure.__name__
        if mutant != data:
            yield done, mutant


# --------------------------------------------------------------------------------------------------------------
# Running
# --------------------------------------------------------------------------------------------------------------


class _TooSlow(BaseException):
    """Passes through every ``except Exception``."""


@contextlib.contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Within the context this process may map ``more`` bytes beyond what it has now."""
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def fuzz(
    data: bytes,
    decode: Callable[[bytes], Any],
    count: int,
    *,
    seed: int = 0,
    memory: int = 256 << 20,
    seconds: float = 10.0,
    progress: Callable[[int], None] | None = None,
) -> tuple[Counter[tuple[str, str]], list[str]]:
    """Decode ``count`` mutants of ``data``: outcomes by (mutation, outcome), and a line for every forbidden one."""

    armed = False

    def ring(*_: object) -> None:
        if armed:
            raise _TooSlow

    def attempt(mutant: bytes) -> str:
        nonlocal armed
        try:
            gc.disable()  # what an alarm raises in a callback of the collector is lost
            try:
                armed = True
                signal.setitimer(signal.ITIMER_REAL, seconds)
                return "exact original" if decode(mutant) == original else "WRONG OUTPUT"
            finally:
                armed = False
                signal.setitimer(signal.ITIMER_REAL, 0)
                gc.enable()
        except (FormatError, DataError) as error:
            return type(error).__name__
        except _TooSlow:
            return "TOO SLOW"
        except MemoryError:
            return "TOO MUCH MEMORY"
        except Exception as error:
            return f"UNNAMED {type(error).__name__}: {error}"

    original = decode(data)
    outcomes: Counter[tuple[str, str]] = Counter()
    faults = []
    before = signal.signal(signal.SIGALRM, ring)
    try:
        with memory_limit(memory):
            for number, (done, mutant) in zip(range(count), mutants(data, seed)):
                outcome = attempt(mutant)
                outcomes[done, outcome] += 1
                if outcome.split()[0].isupper():
                    faults.append(f"seed {seed}, mutant {number} ({done}): {outcome}")
                if progress is not None and number % 10_000 == 0:
                    progress(number)
    finally:
        signal.signal(signal.SIGALRM, before)
    return outcomes, faults


def table(outcomes: Counter[tuple[str, str]]) -> str:
    """Outcomes as a table: a row for each mutation, a column for each outcome."""
    rows, columns = sorted({row for row, _ in outcomes}), sorted({column for _, column in outcomes})
    lines = [["", *columns, "all"]]
    for row in rows:
        numbers = [outcomes[row, column] for column in columns]
        lines.append([row, *map(str, numbers), str(sum(numbers))])
    sums = [sum(outcomes[row, column] for row in rows) for column in columns]
    lines.append(["all", *map(str, sums), str(sum(sums))])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)


class Pipe(io.BytesIO):
    """Bytes that come in order and only once, as from a pipe."""

    def seekable(self) -> bool:
        return False


def decode_frame(data: bytes, stream: bool = False) -> bytes:
    """The contents of all chunks, joined; chunks of the kind ``packed`` are generic compression, others plain."""
    reader = Reader.open(Pipe(data) if stream else data, Limits(1 << 24, 1 << 24, 1 << 10), ("packed", "plain"))
    contents = []
    for chunk in reader:
        if chunk.kind in ("packed", "plain"):
            packed = chunk.kind == "packed"
            contents.append(decompress(chunk.payload, chunk.raw_size) if packed else chunk.payload)
            chunk.verify(contents[-1])
    reader.check_total(content_digest(*contents))
    return b"".join(contents)


def decode_stream(data: bytes) -> bytes:
    """As :func:`decode_frame`, from a stream."""
    return decode_frame(data, stream=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decode", default="fuzz_container:decode_frame", help="module:function of the file's bytes")
    parser.add_argument("--memory", type=int, default=256, help="MiB beyond what the process has at the start")
    parser.add_argument("--seconds", type=float, default=10.0, help="for one mutant")
    options = parser.parse_args()
    module, _, function = options.decode.partition(":")
    outcomes, faults = fuzz(
        options.file.read_bytes(),
        getattr(importlib.import_module(module), function),
        options.count,
        seed=options.seed,
        memory=options.memory << 20,
        seconds=options.seconds,
        progress=lambda number: print(f"{number:,} …", file=sys.stderr),
    )
    print(table(outcomes))
    print("\n".join(faults[:20]))
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
