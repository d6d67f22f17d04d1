"""The file format .lk: independent reader and writer, every flipped bit, every cut, limits, golden files, fuzzing."""

from __future__ import annotations

import bz2
import hashlib
import io
import json
import lzma
import random
import struct
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fuzz_container
from fuzz_container import Pipe, assemble, decode_frame, decode_stream, fuzz, parse, reader_of_the_page
from golden import make
from likely.coding import errors
from likely.coding.container import Limits, Reader, Writer, canonical_json, content_digest, describe
from likely.coding.errors import Damaged, FormatError, NewerVersion, NotLk, TooLarge, Truncated
from likely.coding.fallback import WORDS, compress, decompress
from likely.coding.fingerprint import fingerprint

read_lk = reader_of_the_page()


def written(header: dict[str, Any], chunks: list[dict[str, Any]], digest: bytes) -> bytes:
    file = io.BytesIO()
    with Writer(file, header) as writer:
        for chunk in chunks:
            writer.add(**chunk)
        writer.finish(digest)
    return file.getvalue()


def random_file(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]], bytes]:
    """A header, chunks as arguments of ``Writer.add``, and a digest."""
    rng = random.Random(seed)
    header: dict[str, Any] = {
        f"key{i}": rng.choice([None, True, -(2**63), 0.1, "tést\n", [1, {"b": "𝒳"}]]) for i in range(seed)
    }
    chunks = []
    for _ in range(rng.choice([0, 1, 3, 200])):
        kind = rng.choice(["rows", "x", "a-kind-of-16-let", "model2"])
        payload = rng.randbytes(rng.choice([0, 1, 127, 128, 5000]))
        raw_size, rows = rng.choice([0, 127, 128, 16383, 16384, 1 << 20]), rng.choice([0, 1, 127, 128, 300])
        chunks.append(
            {"kind": kind, "payload": payload, "rows": rows, "raw_size": raw_size, "digest": rng.randbytes(16)}
        )
        chunks[-1]["critical"] = rng.random() < 0.5
    return header, chunks, rng.randbytes(16)


SMALL = written(
    {"a": 1},
    [{"kind": "plain", "payload": b"one", "rows": 1}, {"kind": "packed", "payload": compress(b"2" * 40), "raw_size": 40,
     "digest": content_digest(b"2" * 40)}, {"kind": "note", "payload": b"!", "critical": False}],
    content_digest(b"one" + b"2" * 40),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------
# Against the page's reader and an independent writer
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_the_reader_of_the_page_reads_what_is_written(seed: int) -> None:
    header, chunks, digest = random_file(seed)
    content = read_lk(data := written(header, chunks, digest))
    assert (content["version"], content["header"], content["digest"]) == ((1, 0), header, digest)
    for number, (found, chunk) in enumerate(zip(content["chunks"], chunks, strict=True)):
        assert found == {**found, "number": number, **{k: v for k, v in chunk.items() if k != "critical"}}
        assert found["flags"] == int(chunk["critical"])
    assert assemble(parse(data)) == data


@pytest.mark.parametrize("seed", range(12))
def test_the_reader_reads_what_an_independent_writer_writes(seed: int, tmp_path: Path) -> None:
    header, chunks, digest = random_file(seed)
    parts = parse(written(header, [], digest))
    for number, chunk in enumerate(chunks):
        parts.chunks.append({**chunk, "number": number, "flags": int(chunk["critical"])})
    data = assemble(parts)
    path = tmp_path / "x.lk"
    path.write_bytes(data)
    keys = ("kind", "payload", "rows", "raw_size", "digest", "critical")
    with path.open("rb") as unbuffered, Reader.open(path) as by_path:
        for reader in (by_path, Reader.open(data), Reader.open(Pipe(data)), Reader.open(unbuffered)):
            assert [{key: getattr(chunk, key) for key in keys} for chunk in reader] == chunks
            assert (reader.header, reader.digest, reader.size) == (header, digest, len(data))
            assert reader.rows == sum(chunk["rows"] for chunk in chunks)
        numbers = list(range(len(chunks))) * 2
        random.Random(seed).shuffle(numbers)
        with ThreadPoolExecutor(4) as pool:
            assert [c.payload for c in pool.map(by_path.read, numbers)] == [chunks[n]["payload"] for n in numbers]


def test_a_file_may_begin_inside_another() -> None:
    file = io.BytesIO(b"before" + SMALL)
    file.seek(6)
    assert next(chunk.payload for chunk in Reader.open(file)) == b"one"


def test_the_header_is_canonical_and_deflated_where_that_is_smaller() -> None:
    assert b'{"a":1}' in SMALL
    long = {"b": "x" * 500, "a": [1, 2]}
    data = written(long, [], bytes(16))
    stored, size = int.from_bytes(data[12:16], "little"), int.from_bytes(data[16:20], "little")
    assert (
        zlib.decompress(data[24 : 24 + stored], -15) == json.dumps(long, sort_keys=True, separators=(",", ":")).encode()
    )
    assert stored < size == len(canonical_json(long))


def test_describe_adds_up() -> None:
    lines = describe(Reader.open(SMALL))
    frame = len(SMALL) - sum(entry.length for entry in Reader.open(SMALL).chunks)
    assert lines[0] == f".lk format 1.0, {len(SMALL)} bytes ({frame} of them frame)"
    assert content_digest(b"one" + b"2" * 40).hex() in lines[1]
    assert [line.split() for line in lines[2:5]] == [
        ["kind", "chunks", "rows", "decoded", "stored"],
        ["plain", "1", "1", "3", str(Reader.open(SMALL).chunks[0].length)],
        ["packed", "1", "0", "40", str(Reader.open(SMALL).chunks[1].length)],
    ]
    assert lines[-1] == "* a reader may ignore it"


# --------------------------------------------------------------------------------------------------------------
# Damage
# --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decode", [decode_frame, decode_stream])
def test_every_flipped_bit_is_found(decode: Any) -> None:
    for bit in range(8 * len(SMALL)):
        damaged = bytearray(SMALL)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises((Damaged, NotLk, TooLarge, Truncated)):
            decode(bytes(damaged))


@pytest.mark.parametrize("decode", [decode_frame, decode_stream])
def test_every_cut_is_found(decode: Any) -> None:
    with pytest.raises(NotLk, match="empty"):
        decode(b"")
    for length in range(1, len(SMALL)):
        with pytest.raises(Truncated, match=r"^(byte|preamble|header|chunk|expected|index|trailer)"):
            decode(SMALL[:length])
    with pytest.raises((Damaged, Truncated), match=r"appended|after its end"):
        decode(SMALL + b"\0")


def test_what_is_no_such_file_is_said_to_be_none() -> None:
    for change in (lambda b: b.replace(b"\r\n", b"\n"), lambda b: b.replace(b"\n", b"\r\n"), lambda b: b"\x09" + b[1:]):
        with pytest.raises(NotLk, match="text mode"):
            Reader.open(change(SMALL))
    with pytest.raises(NotLk, match=r"begins with b'PK\\x03\\x04"):
        Reader.open(b"PK\x03\x04" + bytes(100))


def test_a_damaged_chunk_is_named_and_the_others_are_read() -> None:
    entry = Reader.open(SMALL).chunks[1]
    data = bytearray(SMALL)
    data[entry.offset + entry.length - 1] ^= 1
    reader = Reader.open(bytes(data))
    assert reader.read(0).payload == b"one" and reader.read(2).payload == b"!"
    with pytest.raises(Damaged, match=rf"^chunk 1 \(packed\) at byte {entry.offset}: .*CRC-32.*download it again$"):
        reader.read(1)


def test_content_is_held_against_size_and_digest() -> None:
    chunk = Reader.open(SMALL).read(0)
    chunk.verify(b"one")
    chunk.verify(b"o", memoryview(b"ne"))
    with pytest.raises(Damaged, match=r"chunk 0 .*expected 3 decoded bytes, got 4"):
        chunk.verify(b"one!")
    with pytest.raises(Damaged, match=r"chunk 0 .*not what was compressed"):
        chunk.verify(b"0ne")
    with pytest.raises(Damaged, match="together they are not the original"):
        Reader.open(SMALL).check_total(bytes(16))


def test_chunks_of_another_file_do_not_pass() -> None:
    other = parse(written({"a": 2}, [{"kind": "plain", "payload": b"one", "rows": 1}], content_digest(b"one")))
    entry = Reader.open(SMALL).chunks[0]
    foreign = assemble(other)
    start = Reader.open(foreign).chunks[0].offset
    spliced = foreign[:start] + SMALL[entry.offset : entry.offset + entry.length] + foreign[start + entry.length :]
    assert len(spliced) == len(foreign)
    for decode in (decode_frame, decode_stream):
        with pytest.raises(Damaged, match=r"chunk 0.*head"):
            decode(spliced)


def test_versions_flags_and_kinds_of_the_future() -> None:
    parts = parse(SMALL)
    parts.version = (1, 200)
    assert decode_frame(assemble(parts)) == decode_frame(SMALL)
    parts.version = (2, 0)
    with pytest.raises(NewerVersion, match=r"expected format 1, got 2\.0; upgrade likely"):
        Reader.open(assemble(parts))
    parts = parse(SMALL)
    parts.flags = 1
    with pytest.raises(NewerVersion, match="flags"):
        Reader.open(assemble(parts))
    for kind, critical in (("plain", True), ("packed", True), ("note", False)):
        known = {"plain", "packed", "note"} - {kind}
        for source in (SMALL, Pipe(SMALL)):
            if critical:
                with pytest.raises(NewerVersion, match=f"unknown kind '{kind}'"):
                    list(Reader.open(source, known=known))
            else:
                assert len(list(Reader.open(source, known=known))) == 3


@pytest.mark.parametrize(
    "text",
    [b"", b"[]", b"null", b"{", b'{"a": 1}', b'{"b":1,"a":1}', b'{"a":1,"a":1}', b'{"a":NaN}', b'{"a":1e999}',
     b'{"a":9223372036854775808}', b'{"a":' + b"9" * 5000 + b"}", b'{"a":"\xc3\xa9"}', b'{"a":"\\ud800"}',
     b'{"a":1.50}', b'{"a":' + b"[" * 16 + b"]" * 16 + b"}", b'{"a":' + b"[" * 500_000 + b"]" * 500_000 + b"}"],
    ids=lambda text: text[:12].decode("latin-1"),
)  # fmt: skip
def test_headers_that_are_not_as_they_should_be(text: bytes) -> None:
    parts = parse(SMALL)
    parts.header, parts.stored, parts.size = text, None, None
    with pytest.raises(Damaged, match="header in JSON"):
        Reader.open(assemble(parts))


def test_a_header_has_16_levels_and_a_size() -> None:
    deep: Any = []
    for _ in range(14):
        deep = [deep]
    data = written({"a": deep}, [], bytes(16))
    assert Reader.open(data).header == {"a": deep}
    with pytest.raises(ValueError, match=r"^header: expected at most 16 levels"):
        Writer(io.BytesIO(), {"a": [deep]})
    for wrong in ({"a": 2**63}, {"a": float("nan")}, {1: 2}, {"a": {1}}, {"a": "\ud800"}, [1]):
        with pytest.raises(ValueError, match=r"^header: "):
            Writer(io.BytesIO(), wrong)  # type: ignore[arg-type]
    with pytest.raises(TooLarge, match="header: expected at most 1,048,576"):
        Writer(io.BytesIO(), {"a": "x" * (1 << 20)})
    for length, size in ((1 << 20 | 1, 7), (7, 1 << 20 | 1)):
        start = SMALL[:12] + length.to_bytes(4, "little") + size.to_bytes(4, "little")
        with pytest.raises(TooLarge, match="no valid file exceeds"):
            Reader.open(start + bytes(100))
    parts = parse(SMALL)  # a header that would inflate a thousandfold
    parts.stored = zlib.compress(b"x" * (1 << 30 >> 4), 9, -15)
    parts.size = 1000
    with pytest.raises(Damaged, match="expected 1000 bytes of deflate"):
        Reader.open(assemble(parts))


# --------------------------------------------------------------------------------------------------------------
# Limits
# --------------------------------------------------------------------------------------------------------------


def test_each_limit_is_named_and_can_be_raised() -> None:
    chunks = [{"kind": "plain", "payload": bytes(100), "rows": 10}, {"kind": "plain", "payload": b"", "rows": 50}]
    data = written({}, chunks, bytes(16))
    section = Reader.open(data).chunks[0].length
    exact = {"max_output": 150, "max_chunk": section, "max_chunks": 2}
    assert len(Reader.open(data, Limits(**exact)).chunks) == 2
    assert len(list(Reader.open(Pipe(data), Limits(**exact)))) == 2
    for option, limit in exact.items():
        for source in (data, Pipe(data)):
            with pytest.raises(TooLarge, match=rf"at most {limit - 1:,}, got {limit:,}; .*raise {option}") as caught:
                list(Reader.open(source, Limits(**{**exact, option: limit - 1})))
            assert (caught.value.option, caught.value.limit) == (option, limit - 1)
    with Writer(io.BytesIO(), {}, Limits(max_chunk=10)) as writer:
        with pytest.raises(TooLarge, match="max_chunk"):
            writer.add("plain", bytes(11))
        writer.add("plain", bytes(10))
        writer.finish(bytes(16))


@pytest.mark.parametrize("key", ["raw_size", "rows", "payload length"])
@pytest.mark.parametrize("number", [1 << 29, 1 << 40, (1 << 63) - 1])
def test_a_false_number_allocates_nothing(key: str, number: int) -> None:
    parts = parse(SMALL)
    parts.chunks[1][key] = number
    parts.index = [{}, {"length": number} if key == "payload length" else {}, {}]
    data = assemble(parts)
    for limits in (Limits(), Limits(1 << 63, 1 << 63)):
        for source in (data, Pipe(data)):
            tracemalloc.start()
            with pytest.raises((TooLarge, Damaged, Truncated)):
                for chunk in Reader.open(source, limits):
                    if chunk.kind == "packed":
                        chunk.verify(decompress(chunk.payload, 40))
                raise Damaged("rows are the caller's to check")
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < 4 << 20


# --------------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------------


def test_a_stream_gets_the_same_bytes_as_a_path(tmp_path: Path) -> None:
    class Slow(io.RawIOBase):
        """Takes at most seven bytes at a time and cannot seek."""

        taken = b""

        def writable(self) -> bool:
            return True

        def write(self, data: Any) -> int:
            self.taken += bytes(data[:7])
            return min(len(data), 7)

    header, chunks, digest = random_file(3)
    slow = Slow()
    for target in (slow, tmp_path / "x.lk", str(tmp_path / "y.lk")):
        with Writer(target, header) as writer:  # type: ignore[arg-type]
            for chunk in chunks:
                writer.add(**chunk)
            writer.finish(digest)
        assert writer.size == len(slow.taken)
    assert not slow.closed
    assert slow.taken == (tmp_path / "x.lk").read_bytes() == (tmp_path / "y.lk").read_bytes()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, SystemExit])
def test_nothing_is_left_of_a_file_that_was_not_finished(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "x.lk"
    path.write_bytes(b"before")
    with pytest.raises(error), Writer(path, {}) as writer:
        writer.add("plain", b"one")
        assert sorted(p.name.startswith(".x.lk.") for p in tmp_path.iterdir()) == [False, True]
        raise error
    with pytest.raises(ValueError, match="finish"), Writer(path, {}) as writer:
        writer.add("plain", b"one")
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_finished_file_replaces_and_has_the_rights_of_any_other(tmp_path: Path) -> None:
    path, link, other = tmp_path / "x.lk", tmp_path / "link.lk", tmp_path / "other"
    path.write_bytes(b"before")
    link.symlink_to(path.name)
    other.write_bytes(b"")
    with Writer(link, {}) as writer:
        writer.finish(bytes(16))
        with Reader.open(path) as reader:
            assert reader.header == {}
    assert link.is_symlink() and path.stat().st_mode == other.stat().st_mode
    assert sorted(tmp_path.iterdir()) == sorted([path, link, other])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_is_an_os_error() -> None:
    with pytest.raises(OSError, match="No space left"), Writer("/dev/full", {}) as writer:
        writer.add("plain", bytes(1 << 20))
        writer.finish(bytes(16))


def test_wrong_arguments_are_named() -> None:
    good: dict[str, Any] = {"kind": "rows", "payload": b"x", "rows": 0, "raw_size": 1, "digest": bytes(16)}
    with Writer(io.BytesIO(), {}) as writer:
        for change, match in [
            ({"kind": "Rows"}, "^kind: expected .* got 'Rows'"),
            ({"kind": ""}, "^kind"),
            ({"kind": "a" * 17}, "^kind"),
            ({"digest": b"short"}, "^digest: expected 16 bytes, got 5"),
            ({"digest": None}, "^raw_size and digest: expected both or neither"),
            ({"rows": -1}, "^rows and raw_size"),
        ]:
            with pytest.raises(ValueError, match=match):
                writer.add(**{**good, **change})
        with pytest.raises(ValueError, match=r"^digest: expected 16 bytes, got 0"):
            writer.finish(b"")
        writer.finish(bytes(16))


def test_a_stream_has_no_index_before_its_end() -> None:
    reader = Reader.open(Pipe(SMALL))
    with pytest.raises(ValueError, match="iterate over its chunks first"):
        _ = reader.chunks
    assert len(list(reader)) == len(reader.chunks) == 3


# --------------------------------------------------------------------------------------------------------------
# Generic compression
# --------------------------------------------------------------------------------------------------------------

CONTENTS = {
    **make.contents(),
    "nothing": b"",
    "one": b"1",
    "numbers": b"".join(i.to_bytes(4, "little") for i in range(5000)),
    "facts": b'{"media":"csv","n":150,"size":4000,"columns":[{"is":0},{"is":1}]}',
}


@pytest.mark.parametrize("name", CONTENTS)
def test_generic_compression_is_the_smallest_and_exact(name: str) -> None:
    data = CONTENTS[name]
    packed = compress(data)
    assert decompress(packed, len(data)) == data
    window = 1 << max(12, (max(len(data), 1) - 1).bit_length())
    lzma2 = [{"id": lzma.FILTER_LZMA2, "dict_size": window}]
    known = {
        0: lambda body: body,
        1: lambda body: zlib.decompress(body, -15),
        2: lambda body: lzma.decompress(body, lzma.FORMAT_RAW, filters=lzma2),
        3: bz2.decompress,
        4: lambda body: zlib.decompressobj(-15, WORDS).decompress(body),
    }
    assert known[packed[0]](packed[1:]) == data
    rivals = [len(data), len(zlib.compress(data, 9)), len(bz2.compress(data)), len(lzma.compress(data, preset=9))]
    assert len(packed) <= 1 + min(rivals)
    for size in {max(len(data) - 1, 0), len(data) + 1, 2 * len(data) + 1} - {len(data)}:
        with pytest.raises(Damaged):
            decompress(packed, size)
    for wrong in (packed + b"\0", packed[:-1], b""):
        with pytest.raises(Damaged):
            decompress(wrong, len(data))


def test_the_five_methods_are_all_tested() -> None:
    assert [compress(data)[0] for data in [*make.contents().values(), CONTENTS["facts"]]] == [0, 1, 2, 3, 4]
    with pytest.raises(NewerVersion, match="method from 0 to 4, got 5"):
        decompress(b"\x05abc", 3)


def test_the_dictionary_is_the_one_of_the_page() -> None:
    page = Path(__file__).parent.parent / "docs" / "format.md"
    assert content_digest(WORDS).hex() in page.read_text(encoding="utf-8")


def test_a_bomb_does_not_go_off() -> None:
    zeros = bytes(64 << 20)
    lzma2 = [{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 12}]
    bodies = {
        1: zlib.compress(zeros, 9, -15),
        2: lzma.compress(zeros, lzma.FORMAT_RAW, filters=lzma2),
        3: bz2.compress(zeros, 9),
    }
    del zeros
    for method, body in bodies.items():
        tracemalloc.start()
        with pytest.raises(Damaged, match="exactly 1000"):
            decompress(bytes([method]) + body, 1000)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20  # bzip2 works on blocks of 0.9 MB, whatever it is asked
        tracemalloc.stop()


# --------------------------------------------------------------------------------------------------------------
# Fingerprint
# --------------------------------------------------------------------------------------------------------------


def hashed(fields: list[bytes]) -> str:
    return hashlib.sha256(b"".join(struct.pack("<Q", len(field)) + field for field in fields)).hexdigest()


def test_a_fingerprint_is_the_hash_of_what_the_page_of_the_function_says() -> None:
    weight, bias = np.arange(6, dtype=np.float32).reshape(3, 2) / 7, np.array([-0.0, np.nan])
    tensors = {"weight": torch.from_numpy(weight.T.copy()).T, "a.bias": torch.from_numpy(bias), "n": torch.tensor(-3)}
    expected = [b"exact32-1", b'{"hidden":[4,5],"name":"vae"}']
    expected += [b"a.bias", b"float64", b"2", bias.astype("<f8").tobytes()]
    expected += [b"n", b"int64", b"", struct.pack("<q", -3)]
    expected += [b"weight", b"float32", b"3,2", weight.astype("<f4").tobytes()]
    config = {"name": "vae", "hidden": [4, 5]}
    assert fingerprint(tensors, config, "exact32-1") == hashed(expected)
    half = {"b": torch.tensor([1.0, -2.0], dtype=torch.bfloat16), "m": torch.tensor([True, False])}
    expected = [b"p", b"{}", b"b", b"bfloat16", b"2", bytes.fromhex("803f00c0"), b"m", b"bool", b"2", b"\1\0"]
    assert fingerprint(half, {}, "p") == hashed(expected)


def test_a_fingerprint_sees_every_change() -> None:
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2)}
    base = fingerprint(tensors, {"k": 1}, "p")
    assert base == fingerprint(dict(reversed(tensors.items())), {"k": 1}, "p")
    assert base == fingerprint({"a": nn.Parameter(torch.arange(4.0)), "b": torch.zeros(2)}, {"k": 1}, "p")
    others = [
        fingerprint({**tensors, "b": torch.tensor([0.0, -0.0])}, {"k": 1}, "p"),
        fingerprint({**tensors, "a": torch.arange(4.0).reshape(2, 2)}, {"k": 1}, "p"),
        fingerprint({**tensors, "b": torch.zeros(2, dtype=torch.int32)}, {"k": 1}, "p"),
        fingerprint({"a": tensors["a"], "c": tensors["b"]}, {"k": 1}, "p"),
        fingerprint({"a": tensors["a"]}, {"k": 1}, "p"),
        fingerprint(tensors, {"k": 1.0}, "p"),
        fingerprint(tensors, {"k": 1}, "q"),
    ]
    assert len({base, *others}) == 1 + len(others)
    with pytest.raises(ValueError, match="JSON"):
        fingerprint(tensors, {"k": float("inf")}, "p")


# --------------------------------------------------------------------------------------------------------------
# Errors, golden files, fuzzing
# --------------------------------------------------------------------------------------------------------------


def test_errors_cross_processes_unchanged() -> None:
    from multiprocessing.reduction import ForkingPickler

    for error in (
        Damaged("what", "where"),
        TooLarge("rows", 2, 1, "max_output"),
        errors.WrongModel("ab", "cd"),
        errors.ForeignArithmetic("decoder", ("exact32", "exact64")),
        NotLk("what", advice="advice"),
    ):
        error.add_note("note")
        again = ForkingPickler.loads(ForkingPickler.dumps(error))
        assert (type(again), str(again), again.__dict__) == (type(error), str(error), error.__dict__)
        assert isinstance(again, FormatError) and isinstance(again, ValueError)
    with pytest.raises(Damaged, match=r"^inner: what;"), errors.located("outer"), errors.located("inner"):
        raise Damaged("what")


MANIFEST = json.loads(make.MANIFEST.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", sorted(MANIFEST))
def test_golden_files_decode_for_ever(name: str) -> None:
    path = make.FOLDER / f"{name}.lk"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == MANIFEST[name]["file"], "a golden file is never changed"
    assert hashlib.sha256(make.CASES[name].decode(path)).hexdigest() == MANIFEST[name]["content"]


def test_golden_files_are_all_in_the_manifest() -> None:
    assert {path.stem for path in make.FOLDER.glob("*.lk")} == set(MANIFEST) == set(make.CASES)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux to limit memory")
@pytest.mark.parametrize("decode", [decode_frame, decode_stream])
@pytest.mark.parametrize("name", ["frame", "small"])
def test_mutants_end_in_a_named_error_or_the_original(name: str, decode: Any) -> None:
    data = SMALL if name == "small" else (make.FOLDER / "frame-1.0.lk").read_bytes()
    outcomes, faults = fuzz(data, decode, 2000, seed=1)
    assert not faults
    found = {outcome for _, outcome in outcomes}
    assert found >= {"Damaged", "NewerVersion", "TooLarge", "Truncated", "exact original"}


def test_the_fuzzer_sees_what_it_looks_for() -> None:
    def forgetful(data: bytes) -> Any:
        """Decodes without the digests, too slowly or with too much memory now and then, or fails without a name."""
        chunks = list(Reader.open(data))
        if len(chunks) == 2:
            time.sleep(60)
        if len(chunks) == 4:
            bytearray(1 << 30)
        if data[8:10] != SMALL[8:10]:
            raise IndexError("list index out of range")
        return b"".join(chunk.payload for chunk in chunks)

    outcomes, faults = fuzz(SMALL, forgetful, 600, seed=2, seconds=0.1)
    found = {outcome for _, outcome in outcomes}
    assert found >= {"WRONG OUTPUT", "TOO SLOW", "TOO MUCH MEMORY", "UNNAMED IndexError: list index out of range"}
    assert len(faults) == sum(n for (_, outcome), n in outcomes.items() if outcome.split()[0].isupper())
    assert "TOO SLOW" in fuzz_container.table(outcomes)
