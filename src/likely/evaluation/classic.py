"""What general-purpose compressors and image formats need for the same examples, losslessly.

Each is given the whole dataset in its natural raw form — one stream, so that it may learn from one example about the
next — at its strongest setting (WebP: method 4, as method 6 takes 15 times as long for 0.001 % on a sheet):

* images: the pixels row by row, channels interleaved, in the smallest whole-number type that holds them; images and
  arrays of zeros and ones also as packed bits, whichever comes out smaller;
* counts and tokens: the smallest whole-number type that holds them;
* tables: the CSV text, and a Parquet file compressed with zstd.

PNG and WebP are measured for one file an image, where the headers of small images outweigh the pixels, and for all
images tiled on large sheets, where they do not.
"""

from __future__ import annotations

import bz2
import functools
import importlib
import io
import lzma
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from likely.contract import Binary, Counts, Integers, Space, Table, Tokens
from likely.data.dataset import Dataset

#: Longest side of a sheet of tiled images, in pixels (WebP ends at 16,383).
SHEET = 8192

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CodecSize:
    """What one codec needs for a dataset.

    Args:
        name: the codec and what it was given.
        bytes: size of its output for the whole dataset, or None if it could not be used.
        note: the form of its input, or why it could not be used.
    """

    name: str
    bytes: int | None
    note: str


def classic_codecs(
    dataset: Dataset,
    *,
    raw: bytes | None = None,
    frame: Callable[[], Any] | None = None,
    progress: Progress | None = None,
) -> list[CodecSize]:
    """Sizes that zlib, xz, bz2 and zstd, and for images PNG and WebP, need for the examples of a dataset.

    Only the examples are compressed, not their condition; with dynamic binarisation the binary images that were drawn.

    >>> import torch
    >>> from likely.contract import Integers
    >>> sizes = classic_codecs(Dataset(Integers((8, 8), 17), torch.zeros(100, 8, 8)))
    >>> [size.name for size in sizes][:3]
    ['zlib -9', 'xz -9e', 'bz2 -9']

    Args:
        raw: the same examples as the user keeps them (for a table the text of its CSV file), instead of the raw form.
        frame: gives the same rows as a pandas DataFrame, for Parquet.
        progress: called with the number of codecs done and of all.
    """
    jobs = list(_jobs(dataset, raw, frame))
    sizes: list[CodecSize] = []
    for done, (name, job) in enumerate(jobs):
        if progress is not None:
            progress(done, len(jobs))
        try:
            size, note = job()
            sizes.append(CodecSize(name, size, note))
        except _Unusable as reason:
            sizes.append(CodecSize(name, None, str(reason)))
    if progress is not None:
        progress(len(jobs), len(jobs))
    return sizes


class _Unusable(Exception):
    """A codec cannot be used here; the message says why."""


Job = Callable[[], tuple[int, str]]


def _jobs(dataset: Dataset, raw: bytes | None, frame: Callable[[], Any] | None) -> Iterator[tuple[str, Job]]:
    forms = [(raw, "the text of the table" if isinstance(dataset.space, Table) else "the text")] if raw else []
    values = functools.cache(lambda: _whole_numbers(dataset))
    if not forms and not isinstance(dataset.space, Table):
        forms = list(raw_forms(values(), dataset.space))
    for name, compressor in _STREAMS.items():
        yield name, lambda compressor=compressor: _smallest(compressor, forms)  # type: ignore[misc]
    if isinstance(dataset.space, Table):
        yield "Parquet + zstd", lambda: (_parquet(frame), "columns stored apart, one row group")
    if image_channels(dataset.space) is not None:
        for kind in ("PNG", "WebP"):
            yield f"{kind}, one file an image", lambda kind=kind: _pictures(kind, values(), dataset.space, tiled=False)  # type: ignore[misc]
            yield f"{kind}, tiled sheet", lambda kind=kind: _pictures(kind, values(), dataset.space, tiled=True)  # type: ignore[misc]


# --- streams of bytes -----------------------------------------------------------------------------------------------


def raw_forms(values: np.ndarray, space: Space) -> Iterator[tuple[bytes, str]]:
    """The natural raw forms of examples of a discrete space: ``(bytes, what they are)``.

    Args:
        values: whole numbers, shape ``(n, *space.shape)``; −1 is a missing cell.
    """
    values = _natural_order(values, space)
    unit = {"Tokens": "token", "Counts": "count"}.get(type(space).__name__, "cell")
    if image_channels(space) is not None:
        unit = "pixel" if image_channels(space) == 1 else "channel of a pixel"
    missing = bool((values < 0).any())
    if missing:
        values = np.where(values < 0, values.max() + 1, values)  # a missing cell has a symbol of its own
    size = next(size for size in (1, 2, 4, 8) if values.max(initial=0) < 2 ** (8 * size))
    width = "one byte" if size == 1 else f"{size} bytes"
    yield values.astype(f"<u{size}").tobytes(), f"{width} a {unit}"
    if isinstance(space, Binary) and not missing:
        yield np.packbits(values.astype(np.uint8)).tobytes(), f"one bit a {unit}"


def _whole_numbers(dataset: Dataset) -> np.ndarray:
    """The examples as whole numbers of shape ``(n, *shape)``; a missing cell is −1."""
    space = dataset.space
    levels = space.levels if isinstance(space, Integers) else space.vocab if isinstance(space, Tokens) else 2
    dtype = torch.int64 if isinstance(space, Counts) or levels > 2**15 else torch.int16
    return np.concatenate([torch.nan_to_num(x, nan=-1.0).to(dtype).numpy() for x, _ in dataset.batches(4096)])


def _natural_order(values: np.ndarray, space: Space) -> np.ndarray:
    """Images with their channels last, as files hold them."""
    return np.moveaxis(values, 1, -1) if len(space.shape) == 3 and image_channels(space) is not None else values


def _smallest(compressor: Callable[[], Any], forms: list[tuple[bytes, str]]) -> tuple[int, str]:
    if not forms:
        raise _Unusable("needs the text of the table")
    sizes = [(_stream_size(compressor(), data), note) for data, note in forms]
    return min(sizes)


def _stream_size(compressor: Any, data: bytes) -> int:
    total = 0
    for start in range(0, len(data), 2**20):
        total += len(compressor.compress(data[start : start + 2**20]))
    return total + len(compressor.flush())


def _zstd() -> Any:
    try:  # Python 3.14 has it in its library
        module = importlib.import_module("compression.zstd")
        return module.ZstdCompressor(level=22)
    except ImportError:
        pass
    try:
        module = importlib.import_module("zstandard")
    except ImportError:
        raise _Unusable("not installed: pip install 'likely[codecs]'") from None
    return module.ZstdCompressor(level=22).compressobj()


_STREAMS: dict[str, Callable[[], Any]] = {
    "zlib -9": lambda: zlib.compressobj(9),
    "xz -9e": lambda: lzma.LZMACompressor(preset=9 | lzma.PRESET_EXTREME),
    "bz2 -9": lambda: bz2.BZ2Compressor(9),
    "zstd -22": _zstd,
}


def _parquet(frame: Callable[[], Any] | None) -> int:
    if frame is None:
        raise _Unusable("needs the rows as a DataFrame")
    try:
        pyarrow, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
        importlib.import_module("pandas")
    except ImportError:
        raise _Unusable("not installed: pip install 'likely[tables]'") from None
    sink = io.BytesIO()
    rows = frame()
    names = [str(name) for name in rows.columns]  # the same name twice is good Parquet, but from_pandas refuses it
    places = rows.set_axis([str(place) for place in range(len(names))], axis=1)
    for place, dtype in places.dtypes.items():
        if hasattr(dtype, "fill_value"):  # a sparse column, of which Parquet knows nothing
            places[place] = places[place].sparse.to_dense()
    table = pyarrow.Table.from_pandas(places, preserve_index=False).replace_schema_metadata(None).rename_columns(names)
    parquet.write_table(
        table,
        sink,
        compression="zstd",
        compression_level=19,
        row_group_size=max(1, table.num_rows),
        write_statistics=False,
    )
    return len(sink.getvalue())


# --- image formats --------------------------------------------------------------------------------------------------


def image_channels(space: Space) -> int | None:
    """Channels of a space whose examples are images of at most 8 bits a channel, or None.

    Shapes ``(height, width)`` and ``(1 or 3, height, width)`` are images.
    """
    if not isinstance(space, Binary | Integers) or (isinstance(space, Integers) and space.levels > 256):
        return None
    if len(space.shape) == 2:
        return 1
    if len(space.shape) == 3 and space.shape[0] in (1, 3):
        return space.shape[0]
    return None


def _pictures(kind: str, values: np.ndarray, space: Space, *, tiled: bool) -> tuple[int, str]:
    try:
        pillow = importlib.import_module("PIL.Image")
        features = importlib.import_module("PIL.features")
    except ImportError:
        raise _Unusable("not installed: pip install 'likely[codecs]'") from None
    if kind == "WebP" and not features.check("webp"):
        raise _Unusable("the installed Pillow has no WebP")
    if values.min(initial=0) < 0:
        raise _Unusable("has no missing pixels")
    images = _natural_order(values.astype(np.uint8), space)
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    binary = isinstance(space, Binary)
    if max(images.shape[1:3]) > 16383 and kind == "WebP":
        raise _Unusable("has at most 16,383 pixels a side")
    count, total = 0, 0
    for picture in sheets(images) if tiled else iter(images):
        sink = io.BytesIO()
        if kind == "PNG":
            image = pillow.fromarray(picture * 255).convert("1") if binary else pillow.fromarray(picture)
            image.save(sink, "PNG", optimize=True)
        else:  # zeros and ones become black and white, which WebP indexes
            image = pillow.fromarray(picture * 255 if binary else picture)
            image.convert("RGB").save(sink, "WEBP", lossless=True, quality=100, method=4, exact=True)
        count, total = count + 1, total + len(sink.getvalue())
    if not tiled:
        return total, f"{count:,} files; includes a header a file"
    return total, "one sheet" if count == 1 else f"{count:,} sheets"


def sheets(images: np.ndarray) -> Iterator[np.ndarray]:
    """Images of shape ``(n, height, width)`` or ``(n, height, width, 3)`` side by side on sheets, near-square.

    A sheet's side is at most 8,192 pixels, or one image; cells of the grid that are left over are 0.
    """
    height, width = images.shape[1:3]
    across, down = max(1, SHEET // width), max(1, SHEET // height)
    for start in range(0, len(images), across * down):
        part = images[start : start + across * down]
        columns = min(across, max(1, round(math.sqrt(len(part) * height / width))))
        columns = max(columns, -(-len(part) // down))
        rows = -(-len(part) // columns)
        grid = np.zeros((rows * columns, *part.shape[1:]), part.dtype)
        grid[: len(part)] = part
        grid = grid.reshape(rows, columns, *part.shape[1:])
        yield np.ascontiguousarray(np.moveaxis(grid, 1, 2).reshape(rows * height, columns * width, *part.shape[3:]))
