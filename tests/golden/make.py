"""Golden files: ``python tests/golden/make.py`` writes those that are missing, and never touches one that is there.

A golden file must decode for ever.  A case is a name, a function that wrote the file when its format was new, and one
that decodes it to bytes with today's code; manifest.json keeps the digests of the file and of what it decodes to.
To add one, add it to ``CASES`` and run this script; the tests find it through the manifest.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))

import archive_cases
from likely.coding.container import Reader, Writer, content_digest
from likely.coding.fallback import compress, decompress

FOLDER = Path(__file__).parent
MANIFEST = FOLDER / "manifest.json"


@dataclass(frozen=True)
class Case:
    """How a golden file was written, and how it is decoded."""

    write: Callable[[Path], None]
    decode: Callable[[Path], bytes]


def contents() -> dict[str, bytes]:
    """Contents that are best stored, deflated, coded by LZMA and by bzip2, made without a random generator."""
    noise = b"".join(hashlib.sha256(bytes([i])).digest() for i in range(8))
    words = b" ".join(str(i * i % 977).encode() for i in range(600))
    return {"stored": noise, "deflate": b"likely " * 12, "lzma": words + noise + words, "bzip2": bytes(100_000)}


def write_frame(path: Path) -> None:
    """Every feature of the frame: a long header, critical and ancillary chunks, rows, an empty payload."""
    header = {"name": "främe", "numbers": [0, -1, 2**62], "nested": {"empty": {}, "null": None}, "text": "ab" * 40}
    with Writer(path, header) as writer:
        for rows, (name, data) in enumerate(contents().items()):
            packed = compress(data)
            writer.add("packed", packed, rows=rows, raw_size=len(data), digest=content_digest(data))
            writer.add("note", name.encode(), critical=False)
        writer.add("plain", b"")
        writer.finish(content_digest(*contents().values()))


def write_empty(path: Path) -> None:
    """The smallest file: no header to speak of and no chunk."""
    with Writer(path, {}) as writer:
        writer.finish(content_digest())


def decode_frame(path: Path) -> bytes:
    """The header and the contents of all chunks, joined; from the path and from a stream alike."""
    found = []
    for reader in (Reader.open(path), Reader.open(_Pipe(path.read_bytes()))):
        with reader:
            parts = [json.dumps(reader.header, sort_keys=True).encode()]
            for chunk in reader:
                packed = chunk.kind == "packed"
                parts.append(decompress(chunk.payload, chunk.raw_size) if packed else chunk.payload)
                chunk.verify(parts[-1])
            found.append(b"\n".join(parts))
    assert found[0] == found[1]
    return found[0]


class _Pipe(io.BytesIO):
    def seekable(self) -> bool:
        return False


def write_archive(name: str, path: Path) -> None:
    """A file with its model in it."""
    with tempfile.TemporaryDirectory() as folder:
        path.write_bytes(archive_cases.make(name, Path(folder)).embedded)


def decode_archive(path: Path) -> bytes:
    """The original, by the model in the file."""
    return archive_cases.decode(path.read_bytes())


CASES: dict[str, Case] = {
    "frame-1.0": Case(write_frame, decode_frame),
    "empty-1.0": Case(write_empty, decode_frame),
    **{f"{name}-1.0": Case(functools.partial(write_archive, name), decode_archive) for name in archive_cases.CASES},
}


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def main() -> None:
    """Write the missing files and enter them in the manifest."""
    manifest = json.loads(MANIFEST.read_text(encoding="utf-8")) if MANIFEST.exists() else {}
    for name, case in CASES.items():
        path = FOLDER / f"{name}.lk"
        if path.exists() or name in manifest:
            continue
        case.write(path)
        manifest[name] = {"file": digest(path.read_bytes()), "content": digest(case.decode(path))}
        print(f"{path.name}: {path.stat().st_size} bytes", file=sys.stderr)
    MANIFEST.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
