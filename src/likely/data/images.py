"""Folders of images, read into one array and written back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from likely.data.errors import DataError, needs, some
from likely.data.store import Store

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
_GREY, _RGB = ("1", "L", "I;16", "I;16B", "I"), ("RGB", "P")


@dataclass
class Folder:
    """The images of a folder.

    Args:
        array: ``(n, H, W)`` grey or ``(n, H, W, 3)`` colour.
        paths: the files, in the order of the array.
        labels: name of the sub-folder of each file, empty at the top.
        channels: ``grey`` or ``rgb``.
        levels: number of values that a cell can have.
        notes: what is worth saying.
    """

    array: np.ndarray
    paths: list[Path]
    labels: list[str]
    channels: Literal["grey", "rgb"]
    levels: int
    notes: list[str]


def _pillow(name: str) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise needs("images", f"{name}: images") from None
    return Image


def image_files(path: Path) -> list[Path]:
    """Every PNG, JPEG and WebP file below a folder, in the order of their paths."""
    return sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())


def read_folder(
    path: Path, name: str, size: tuple[int, int] | None, channels: str | None, limit: int | None = None
) -> Folder:
    """Read every PNG, JPEG and WebP file below a folder, in the order of their paths.

    Args:
        path: the folder; a file's class is the name of the sub-folder that it lies in.
        size: height and width: every image is resized (antialiased, bicubic) until it just covers them and cropped
            at its centre.  None: all images must have one size.
        channels: ``grey`` or ``rgb``; None: all images must be of one sort, which is kept.
        limit: bytes held in memory before the array goes to a file.
    """
    image = _pillow(name)
    files = image_files(path)
    if not files:
        raise DataError(f"{name}: expected images ({', '.join(SUFFIXES)}), found none in this folder or below")
    if channels is not None and channels not in ("grey", "rgb"):
        raise DataError(f"channels: expected 'grey' or 'rgb', got {channels!r}")
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    first: dict[Any, Path] = {}
    for file in files:
        with _open(image, file) as picture:
            sizes[picture.height, picture.width] += 1
            modes[picture.mode] += 1
            first.setdefault((picture.height, picture.width), file)
            first.setdefault(picture.mode, file)
    if size is None and len(sizes) > 1:
        listed = ", ".join(f"{h}×{w} ({n} files, e.g. {first[h, w].name})" for (h, w), n in sizes.most_common(6))
        more = f" and {len(sizes) - 6} more sizes" if len(sizes) > 6 else ""
        raise DataError(
            f"{name}: expected images of one size, got {listed}{more}; pass size= (height and width) to resize and "
            f"crop them at the centre"
        )
    sort, levels = _sort(modes, first, channels, name)
    height, width = size if size is not None else next(iter(sizes))
    shape = (height, width) if sort == "grey" else (height, width, 3)
    store = Store(shape, np.uint8 if levels <= 256 else np.int32, None, limit)
    for file in files:
        with _open(image, file) as picture:
            store.append(_pixels(image, picture, sort, size, file)[None])
    notes = []
    if size is not None and (len(sizes) > 1 or (height, width) not in sizes):
        notes.append(f"images of {len(sizes)} size{'s' * (len(sizes) > 1)} resized and cropped to {height} × {width}")
    if len(modes) > 1:
        notes.append("images of modes " + ", ".join(f"{m} ({n})" for m, n in modes.most_common()) + f" read as {sort}")
    labels = [file.parent.name if file.parent != path else "" for file in files]
    return Folder(store.finish().numpy(), files, labels, sort, levels, notes)


def _open(image: Any, file: Path) -> Any:
    picture = None
    try:
        picture = image.open(file)
        picture.load()
    except (OSError, ValueError, SyntaxError) as fault:
        if picture is not None:
            picture.close()
        raise DataError(f"{file}: not a whole image ({fault}); mend or remove it") from None
    if getattr(picture, "n_frames", 1) > 1:
        raise DataError(f"{file}: expected one image, got {picture.n_frames} frames")
    return picture


def _sort(
    modes: Counter[str], first: dict[Any, Path], channels: str | None, name: str
) -> tuple[Literal["grey", "rgb"], int]:
    """Whether the images are read as grey or as colour, and the number of levels."""
    grey, rgb = sum(modes[m] for m in _GREY), sum(modes[m] for m in _RGB)
    others = [mode for mode in modes if mode not in (*_GREY, *_RGB)]
    if channels is None:
        if others:
            raise DataError(
                f"{first[others[0]]}: expected a grey or RGB image, got mode {others[0]}; pass channels='rgb' or "
                f"channels='grey' to convert (transparency is laid over white)"
            )
        if grey and rgb:
            raise DataError(
                f"{name}: expected images of one sort, got {grey} grey and {rgb} in colour; pass channels='grey' or "
                f"channels='rgb'"
            )
        channels = "grey" if grey else "rgb"
    deep = any(mode.startswith("I") for mode in modes)
    if channels == "rgb":
        if deep:
            raise DataError(f"{name}: 16-bit grey images cannot be read as 'rgb' without loss")
        return "rgb", 256
    if set(modes) == {"1"}:
        return "grey", 2
    if deep and any(not mode.startswith("I") for mode in modes):
        raise DataError(f"{name}: expected images of one depth, got 8-bit and 16-bit ones")
    return "grey", 65536 if deep else 256


def _pixels(image: Any, picture: Any, sort: str, size: tuple[int, int] | None, file: Path) -> np.ndarray:
    deep = picture.mode.startswith("I")
    if not deep and not (sort == "grey" and picture.mode == "1"):
        if picture.mode in ("RGBA", "LA", "PA") or (picture.mode == "P" and "transparency" in picture.info):
            white = image.new("RGBA", picture.size, "white")
            white.alpha_composite(picture.convert("RGBA"))
            picture = white
        picture = picture.convert("L" if sort == "grey" else "RGB")
    if size is not None and (picture.height, picture.width) != size:
        height, width = size
        scale = max(height / picture.height, width / picture.width)
        fit = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        way = image.Resampling.NEAREST if picture.mode == "1" else image.Resampling.BICUBIC
        picture = picture.resize(fit, way)
        left, top = (fit[0] - width) // 2, (fit[1] - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    pixels = np.asarray(picture)
    if deep and (pixels.min() < 0 or pixels.max() > 65535):
        raise DataError(f"{file}: expected 16-bit values, got {pixels.min()} to {pixels.max()}")
    return pixels.astype(np.uint8) if pixels.dtype == bool else pixels


def write_folder(pictures: np.ndarray, path: Path, labels: Sequence[Any] | None = None) -> None:
    """Write pictures as PNG files ``000000.png`` …, in a sub-folder a label."""
    image = _pillow(str(path))
    taken = list(path.iterdir()) if path.exists() else []
    if taken:
        raise DataError(f"{path}: expected a new or empty folder, got one with {some(f.name for f in taken[:100])}")
    for index, picture in enumerate(pictures):
        folder = path if labels is None else path / str(labels[index]).replace("/", "_")
        folder.mkdir(parents=True, exist_ok=True)
        image.fromarray(picture).save(folder / f"{index:06d}.png")


def write_sheet(pictures: np.ndarray, path: Path, gap: int = 1, across: int | None = None) -> None:
    """Write pictures side by side in one PNG file, ``across`` in a row or about as many as there are rows.

    ``pictures`` are uint8 of shape ``(n, height, width)`` or ``(n, height, width, channels)``; small ones are enlarged.
    """
    image = _pillow(str(path))
    enlarge = max(1, 56 // max(pictures.shape[1:3]))
    pictures = pictures.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    n, height, width = pictures.shape[:3]
    across = across or int(np.ceil(np.sqrt(n * height / width)))
    down = -(-n // across)
    sheet = np.full((down * (height + gap) - gap, across * (width + gap) - gap, *pictures.shape[3:]), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // across * (height + gap), index % across * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    image.fromarray(sheet).save(path)
