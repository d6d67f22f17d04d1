"""Folders of images: pixels, names, order and sub-folders come back, as PNG files.

A file ``a/b.png`` comes back under its name; ``a/b.jpg`` comes back as ``a/b.jpg.png``.  A file whose pixels are not
what the model sees (resized, converted between grey and colour, with transparency or a palette that has it) comes back
with its own bytes, under its own name.  What else lies in the folder, and remarks within the files, are left out.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from likely.data.arrays import ArrayForm
from likely.data.columns import KeyCells
from likely.data.csvfile import MISSING
from likely.data.errors import DataError, needs
from likely.data.images import image_files
from likely.data.originals.arrays import Cells
from likely.data.originals.original import Legal, Original, Part, Restored, Rows, bits_differ, intact, whole
from likely.data.originals.side import Reader, Writer, damaged
from likely.data.originals.typed import get_fixed, put_fixed, read_cells, usual
from likely.data.sources import Source

_PIXELS, _FILES = 1, 2
_BLACK_AND_WHITE, _GREY, _DEEP, _COLOUR = "1", "L", "I;16", "RGB"
_COUNTED = re.compile(r"(.*?)(\d{0,18})(\D*)", re.DOTALL)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise needs("images", "a folder of images") from None
    return Image


class FolderOriginal(Original):
    """A folder of images.

    Args:
        form: what the schema says of the images.
        source: the folder.
        options: how it differs from the one that was fitted.
    """

    def __init__(self, form: ArrayForm, source: Source, options: Mapping[str, Any]) -> None:
        image = _pillow()
        self._form = form
        loaded = form.load(source, **options)
        self._array = loaded.array
        files = image_files(source.path)
        self._names = [file.relative_to(source.path).as_posix() for file in files]
        for name in self._names:
            _safe(name)
        modes: list[str | None] = []
        for file in files:
            with image.open(file) as picture:
                modes.append(_mode(picture, self._array.shape))
        known = [mode for mode in modes if mode is not None]
        self._mode = max(set(known), key=known.count) if known else _GREY
        self._kept = {row: file for row, (file, mode) in enumerate(zip(files, modes)) if mode != self._mode}
        self._cells = Cells(form, self._array.dtype)
        self._cells.study(np.asarray(self._array[:1000]))
        self._condition = None
        if form.given:
            cells = KeyCells([str(label) for label in loaded.labels["label"]], "str")
            values, allowed = read_cells(form.given[0], cells, MISSING)
            self._condition = np.where(allowed, values, usual(form.given[0], values, allowed)[0])[:, None]
        digest, size = hashlib.blake2b(digest_size=16), 0
        for row, name in enumerate(self._names):
            content = self._kept[row].read_bytes() if row in self._kept else None
            size += _add(digest, name, self._mode, np.asarray(self._array[row]), content)
        facts = {"mode": self._mode, "dtype": self._array.dtype.str}
        super().__init__("images", "content", len(files), size, digest.digest(), facts)

    def _rows(self, start: int, stop: int, legal: Legal | None) -> Rows:
        chunk = np.asarray(self._array[start:stop])
        x = self._cells.take(chunk, legal)
        out = Writer()
        _put_names(out, self._names[start:stop])
        expected = self._cells.make(x)
        kept = [row - start for row in self._kept if start <= row < stop]
        expected[kept] = chunk[kept]
        if bits_differ(chunk, expected).any():
            out.number(_PIXELS)
            put_fixed(out, np.ascontiguousarray(chunk), expected)
        if kept:
            out.number(_FILES)
            out.places(np.array(sorted(kept)), stop - start)
            contents = [self._kept[start + row].read_bytes() for row in sorted(kept)]
            out.numbers(np.array(list(map(len, contents)), np.uint64))
            out.raw(b"".join(contents))
        condition = None if self._condition is None else torch.from_numpy(self._condition[start:stop].copy())
        return Rows(x, condition, out.content())


def _mode(picture: Any, shape: Sequence[int]) -> str | None:
    """The mode in which the pixels that were read stand for the picture; None if they do not."""
    if (picture.height, picture.width) != tuple(shape[1:3]):
        return None
    if len(shape) == 4:
        plain = picture.mode == "RGB" or (picture.mode == "P" and "transparency" not in picture.info)
        return _COLOUR if plain and "transparency" not in picture.info else None
    if picture.mode.startswith("I"):
        return _DEEP
    return picture.mode if picture.mode in (_BLACK_AND_WHITE, _GREY) and "transparency" not in picture.info else None


def _add(digest: Any, name: str, mode: str, pixels: np.ndarray, content: bytes | None) -> int:
    """Take a file into the digest; its bytes."""
    held = np.ascontiguousarray(pixels).tobytes() if content is None else content
    digest.update(repr((name, mode if content is None else "file", pixels.shape, pixels.dtype.str, len(held))).encode())
    digest.update(held)
    return len(held)


def _safe(name: str) -> None:
    """Refuse a name that would lead out of a folder."""
    path = PurePosixPath(name)
    odd = any(part in ("", ".", "..") for part in name.split("/")) or "\0" in name
    if path.is_absolute() or odd or (os.name == "nt" and re.search(r'[\\:*?"<>|]', name)) or len(name) > 4096:
        raise DataError(f"names: expected the path of a file within a folder, got {name!r}")


def _put_names(out: Writer, names: Sequence[str]) -> None:
    """Names, their last number apart: what counts up costs nothing."""
    parts = [_parts(name) for name in names]
    out.texts([before for before, _, _ in parts])
    out.texts([behind for _, _, behind in parts])
    out.numbers(np.array([len(number) for _, number, _ in parts], np.uint64))
    out.signed(np.diff(np.array([int(number or 0) for _, number, _ in parts], np.int64), prepend=np.int64(0)))


def _parts(name: str) -> tuple[str, str, str]:
    match = _COUNTED.fullmatch(name)
    return (name, "", "") if match is None else (match.group(1), match.group(2), match.group(3))


def _get_names(reader: Reader, n: int) -> list[str]:
    before, behind = reader.texts(n), reader.texts(n)
    sizes, numbers = reader.numbers(n, 18).tolist(), np.cumsum(reader.signed(n)).tolist()
    names = [
        a + (str(number).zfill(size) if size else "") + b for a, b, size, number in zip(before, behind, sizes, numbers)
    ]
    for name in names:
        _safe(name)
    return names


class RestoredFolder(Restored):
    """A folder of images; its value is a dict of pixels, or of the bytes of a kept file, by name.

    Args:
        form: what the schema says of the images.
        facts: of the whole.
        parts: consecutive rows.
        first: number of the first of them.
        keep: numbers of the rows to give; None for all.
    """

    def __init__(
        self,
        form: ArrayForm,
        facts: Mapping[str, Any],
        parts: Iterable[Part],
        first: int = 0,
        keep: tuple[int, int] | None = None,
    ) -> None:
        super().__init__("images")
        dtype = np.dtype(str(facts["dtype"]))
        if dtype.kind not in "biu" or facts["mode"] not in (_BLACK_AND_WHITE, _GREY, _DEEP, _COLOUR):
            raise DataError(f"head is damaged: expected pixels, got {facts['dtype']!r} in mode {facts['mode']!r}")
        self._cells, self._mode, self._parts = Cells(form, dtype, "times"), str(facts["mode"]), parts
        self._size, self._n = whole(facts["size"]), whole(facts["n"])
        self._first, self._keep = first, keep

    def _files(self) -> Iterator[tuple[str, np.ndarray | bytes]]:
        digest, rows = hashlib.blake2b(digest_size=16), self._first
        seen: set[str] = set()
        for x, _, side in self._parts:
            with intact("side information"):
                pixels, names, kept = self._part(x, side)
            rows += len(names)
            if rows > self._n:
                raise damaged(f"more than the {self._n} rows of the original")
            for row, name in enumerate(names):
                if name in seen:
                    raise damaged(f"the name {name!r} comes twice")
                seen.add(name)
                if self._keep is not None and not self._keep[0] <= rows - len(names) + row < self._keep[1]:
                    continue
                _add(digest, name, self._mode, pixels[row], kept.get(row))
                yield name, kept.get(row, pixels[row])
        self.digest = digest.digest()

    def _part(self, x: torch.Tensor, side: bytes) -> tuple[np.ndarray, list[str], dict[int, bytes]]:
        pixels = self._cells.make(x)
        n, reader = len(pixels), Reader(side, 4 * self._size + (1 << 20))
        names = _get_names(reader, n) if n else []
        kept: dict[int, bytes] = {}
        before = 0
        while not reader.done:
            tag = reader.number(_FILES)
            if tag <= before:
                raise damaged("its sections are out of order")
            before = tag
            if tag == _PIXELS:
                pixels = get_fixed(reader, n, pixels.dtype, pixels)
            else:
                places = reader.places(n).tolist()
                kept = {place: reader.raw(size) for place, size in zip(places, reader.numbers(len(places)).tolist())}
        return pixels, names, kept

    @property
    def value(self) -> dict[str, np.ndarray | bytes]:
        return dict(self._files())

    def write(self, path: Path | str, digest: bytes | None = None) -> None:
        """Write the images into a new or empty folder."""
        if str(path) == "-":
            raise DataError("a folder of images cannot go to standard output; name a folder")
        image, target = _pillow(), Path(path)
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise DataError(f"{target}: expected a new or empty folder")
        part = target.with_name(f".{os.getpid()}.{target.name}")
        try:
            part.mkdir(parents=True)
            for name, held in self._files():
                file = part / (name if isinstance(held, bytes) or name.lower().endswith(".png") else f"{name}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                if file.exists():
                    raise DataError(f"{name}: two images would come back as {file.name}")
                file.write_bytes(held if isinstance(held, bytes) else self._png(image, held))
            self._check(digest)
            if target.exists():
                target.rmdir()
            part.replace(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def _png(self, image: Any, pixels: np.ndarray) -> bytes:
        if self._mode == _BLACK_AND_WHITE:
            pixels = pixels != 0
        out = io.BytesIO()
        image.fromarray(pixels.astype(np.uint16) if self._mode == _DEEP else pixels).save(out, "PNG")
        return out.getvalue()
