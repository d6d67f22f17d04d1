"""Size of compressed files: beside the model's bound, and beside what other compressors need for the same rows.

    LIKELY_DATA=… python benchmarks/compression.py RUNS --out benchmarks/results/compression [--rivals PYTHON]

RUNS are what ``compression_cases.py`` fitted; no model has seen a row that is coded here.

1. *Bound and file.*  The bound is the float32 model's, in bits for all coded rows, a mean over seeds of the noise, with
   its standard error.  ``tables`` is what the integer frequencies promise, ``net`` the coded rows without the bits that
   bits-back borrowed, ``file`` all bytes on the disk: borrowed bits, lanes, pattern of holes, names, checksums, index.
   A model of cells with holes has a bound on the cells that are there; to it comes the pattern of the holes, at
   its empirical entropy (rows drawn independently from the frequencies of the patterns in these very rows), which is
   less than any code needs.  Rows that generic compression codes in less than the model, which the file then does,
   are coded by the model for this table (the file in brackets is the real one).
2. *Others.*  The same rows, losslessly, at the strongest setting of each: the text of a table (CSV); pixels as bytes,
   and packed bits where they are binary, whichever is smaller.  Parquet with zstd -19, with dictionaries or delta
   encoding, whichever is smaller.  PNG, WebP and JPEG XL with one file an image and with all images on a sheet.
   ``bare columns`` are a table's cells, column after column, as numbers of steps of the column's grid and of its
   categories, in the smallest whole-number type: not a file that anyone has, as neither names nor steps nor
   categories are in it, but what a compressor of bytes makes of the same cells when it is spared the writing.  The
   goal is held against the files.  ``--rivals`` names a Python that has ``brotli`` and ``pillow-jxl-plugin``; its sizes
   are left out otherwise.
3. *With the model in the file.*  The first n coded rows, compressed by the model rounded to 6, 7 or 8 bits a weight,
   which the file holds; and the smallest of the others for the same n rows, of those that come near the smallest for
   all rows.  More rows are tried until the file is the smaller one.
4. *Without a run.*  ``likely compress DATA`` for the same rows: small models are fitted to these very rows, and the file
   carries the one that makes it smallest.

The files of 1 and 4 are decoded while they are written, and compared with the original.  The record is extended: what is asked for
again (``--cases``, ``--parts``) replaces what it says.
"""

from __future__ import annotations

import argparse
import bz2
import functools
import gzip
import io
import itertools
import json
import lzma
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import zstandard
from PIL import Image

import likely
from compression_cases import CASES, Case
from likely import archive, models
from likely.coding.bits_back import encode_rows
from likely.coding.rows import Rows
from likely.coding.weights import pack, unpack
from likely.contract import Binary, Model, Table
from likely.data import infer_schema
from likely.data.originals import take_apart
from likely.evaluation.classic import sheets
from likely.noise import KeyedNoise
from likely.units import bits
from turns import machine, versions, write_record

PARTS = ("bound", "others", "embedded", "alone")
SEEDS, BATCH = 8, 500
#: A file of at least so many bytes should exceed its bound by at most so many per cent.
GOALS = ((1_000_000, 0.3), (100_000, 0.5), (20_000, 2.0))
#: What a table's file should take at most, as a share of the smallest of the others.
GOAL_TABLE = 0.75
#: With the model in the file only those of the others are tried that need at most so much more than the smallest.
NEAR = 1.15
#: Said of a compressor that is given a table's cells without the table.
BARE = ", of bare columns"


# --------------------------------------------------------------------------------------------------------------
# The rows that are coded
# --------------------------------------------------------------------------------------------------------------


class Coded:
    """The rows of a case that its model has not seen, or the first n of them; without a run there is no model."""

    def __init__(self, case: Case, run: Path) -> None:
        self.case = case
        self.fitted = likely.load(run) if (run / "model.safetensors").exists() else None
        train, self.whole = case.load()
        self.schema = infer_schema(train) if self.fitted is None else self.fitted.schema
        self._lines: list[bytes] = []
        if isinstance(self.whole, Path):
            self._lines = gzip.decompress(self.whole.read_bytes()).splitlines(keepends=True)
        n = take_apart(self.schema, self.whole, **case.read).n
        self.n = n if case.rows is None else min(n, case.rows)
        self.all = self.n == n

    @property
    def model(self) -> Model:
        assert self.fitted is not None
        return self.fitted.model

    def source(self, n: int, folder: Path) -> Any:
        """The first n rows as the user has them."""
        if not self._lines:
            return self.whole[:n]
        path = folder / f"{n}.csv"
        path.write_bytes(self.text(n))
        return path

    def text(self, n: int) -> bytes:
        """Of a table."""
        if self._lines:  # an empty one may follow the last row
            return b"".join(self._lines[: None if self.all and n == self.n else n])
        return self.whole[:n].to_csv(index=False).encode()

    def cells(self, n: int, folder: Path) -> torch.Tensor:
        """What the model codes."""
        original = take_apart(self.schema, self.source(n, folder), **self.case.read)
        return original.rows(0, n).x


# --------------------------------------------------------------------------------------------------------------
# 1. Bound and file
# --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bound(coded: Coded, folder: Path, seeds: int) -> dict[str, Any]:
    """The model's bound on all rows in bits, and the entropy of their patterns of holes."""
    model = coded.model
    x = coded.cells(coded.n, folder)
    totals: list[float] = []
    kind = ""
    for seed in range(seeds):
        nats = 0.0
        for first in range(0, len(x), BATCH):
            part = x[first : first + BATCH]
            found = model.bound(part, noise=KeyedNoise(seed, torch.arange(first, first + len(part))))
            nats -= float(found.nats.double().sum())
            kind = found.kind
        totals.append(bits(nats))
        if kind == "exact":
            break
    error = statistics.stdev(totals) / math.sqrt(len(totals)) if len(totals) > 1 else 0.0
    absent = torch.isnan(x).reshape(len(x), -1).numpy() if x.is_floating_point() else np.zeros((len(x), 1), bool)
    counts = np.unique(absent, axis=0, return_counts=True)[1] / len(x)
    holes = max(0.0, float(-(counts * np.log2(counts)).sum() * len(x)))
    return {
        "kind": kind,
        "bound_bits": statistics.fmean(totals),
        "bound_error_bits": error,
        "seeds": len(totals),
        "holes_entropy_bits": holes,
        "cells": math.prod(x.shape),
    }


def compress(coded: Coded, n: int, folder: Path, embed: bytes | None = None, workers: int = 1) -> archive.Sizes:
    """The file's sizes; without a model in it, it is decoded and compared while it is written."""
    model = coded.model if embed is None else unpack(embed, models.build)
    source = coded.source(n, folder)
    return archive.compress(
        model,
        coded.schema,
        source,
        io.BytesIO(),
        embed=embed,
        verify=embed is None,
        read=coded.case.read,
        workers=workers,
    )


def bound_and_file(coded: Coded, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    sizes = compress(coded, coded.n, folder, workers=arguments.workers).to_json()
    space = coded.schema.space
    smallest = sizes["file"]
    if sizes["plain_rows"]:  # generic compression coded some rows in less; the bound is not of these
        sizes |= {"file": smallest - sizes["plain"] - sizes["coded"], "coded": 0, "initial": 0, "plain": 0}
        x = coded.cells(coded.n, folder)
        for part in x.split(-(-len(x) // max(1, round(sizes["coded_bits"] / 8 / archive.CHUNK)))):
            payload = encode_rows(coded.model.codec(), part)
            sizes["coded"] += len(payload.data)
            sizes["file"] += len(payload.data)
            sizes["initial"] += payload.initial_bits // 8
    return {
        **bound(coded, folder, arguments.seeds),
        "name": coded.model.name(),
        "unit": "row" if isinstance(space, Table) else "dim",
        **sizes,
        "smallest": smallest,
    }


# --------------------------------------------------------------------------------------------------------------
# 2. Others
# --------------------------------------------------------------------------------------------------------------

STREAMS: dict[str, Callable[[bytes], bytes]] = {
    "gzip -9": lambda data: gzip.compress(data, 9),
    "bzip2 -9": lambda data: bz2.compress(data, 9),
    "xz -9e": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
    "zstd -19": lambda data: zstandard.ZstdCompressor(level=19).compress(data),
    "zstd --ultra -22": lambda data: zstandard.ZstdCompressor(level=22).compress(data),
}


def others(
    coded: Coded, n: int, folder: Path, arguments: argparse.Namespace, only: Collection[str] | None = None
) -> dict[str, int]:
    """Bytes that each of the others, or some of them, needs for the first n rows: of the forms it is given the best."""
    found: dict[str, int] = {}
    for name, size in _others(coded, n, folder, arguments):
        if only is None or name in only:
            found[name] = min(size(), found.get(name, sys.maxsize))
    return found


def _others(
    coded: Coded, n: int, folder: Path, arguments: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], int]]]:
    """Name of a compressor, and what finds its size."""
    rivals, space = arguments.rivals, coded.schema.space
    forms = _table_forms(coded, n, folder) if isinstance(space, Table) else _pixel_forms(coded, n)
    for suffix, form in forms:
        for name, compressed in STREAMS.items():
            yield name + suffix, lambda: len(compressed(form))  # noqa: B023
        if rivals:
            yield "brotli -q 11" + suffix, lambda: _rival(rivals, folder, "brotli", form)  # noqa: B023
    if isinstance(space, Table):
        yield "Parquet + zstd -19", lambda: _parquet(coded, n, folder)
    else:
        yield from _pictures(coded, n, folder, arguments)


def best_other(sizes: dict[str, int]) -> tuple[str, int]:
    """The smallest of the files that users have."""
    return min(((name, size) for name, size in sizes.items() if not name.endswith(BARE)), key=lambda item: item[1])


def _table_forms(coded: Coded, n: int, folder: Path) -> Iterator[tuple[str, bytes]]:
    yield "", coded.text(n)
    symbols, present = Rows(coded.schema.space).symbols(coded.cells(n, folder))
    columns = []
    for j in range(symbols.shape[1]):
        column = symbols[:, j] - symbols[:, j].min()
        if present is not None:
            column = np.where(present[:, j], column + 1, 0)
        columns.append(column.astype(np.min_scalar_type(int(column.max()))).tobytes())
    yield BARE, b"".join(columns)


def _pixel_forms(coded: Coded, n: int) -> Iterator[tuple[str, bytes]]:
    yield "", _images(coded, n).tobytes()
    if isinstance(coded.schema.space, Binary):
        yield "", np.packbits(coded.whole[:n]).tobytes()


def _images(coded: Coded, n: int) -> np.ndarray:
    """Pixels as image formats take them: (n, height, width) or (n, height, width, 3), uint8."""
    images = np.asarray(coded.whole[:n])
    if images.ndim == 2:
        side = math.isqrt(images.shape[1])
        return images.reshape(n, side, side)
    return images[:, 0] if images.shape[1] == 1 else np.ascontiguousarray(np.moveaxis(images, 1, -1))


def _parquet(coded: Coded, n: int, folder: Path) -> int:
    import pyarrow as pa
    from pyarrow import parquet

    frame = coded.whole
    if isinstance(frame, pd.DataFrame):
        frame = frame[:n]
    else:
        frame = coded.schema.to_user(coded.cells(n, folder))
    table = pa.Table.from_pandas(frame, preserve_index=False).replace_schema_metadata(None)
    whole = [name for name, kind in zip(table.schema.names, table.schema.types) if pa.types.is_integer(kind)]
    options: dict[str, Any] = {"compression": "zstd", "compression_level": 19, "row_group_size": n}
    delta = dict.fromkeys(whole, "DELTA_BINARY_PACKED")
    sizes = []
    for more in (
        {"use_dictionary": True},
        {"use_dictionary": [name for name in table.schema.names if name not in whole], "column_encoding": delta},
    ):
        sink = io.BytesIO()
        parquet.write_table(table, sink, write_statistics=False, **options, **more)
        sizes.append(len(sink.getvalue()))
    return min(sizes)


def _pictures(
    coded: Coded, n: int, folder: Path, arguments: argparse.Namespace
) -> Iterator[tuple[str, Callable[[], int]]]:
    images = _images(coded, n)
    if isinstance(coded.schema.space, Binary):
        images = images * np.uint8(255)
    webp = {"lossless": True, "quality": 100, "method": 4, "exact": True}
    for name, pictures in (("one file an image", images), ("sheet", list(sheets(images)))):
        each: Callable[..., int] = functools.partial(_pictures_size, pictures)
        yield f"PNG, {name}", functools.partial(each, "PNG", optimize=True)
        yield f"WebP, {name}", functools.partial(each, "WEBP", **webp)
        for effort in arguments.effort if arguments.rivals else ():
            size = functools.partial(_rival, arguments.rivals, folder, "jxl", pictures, effort)
            yield f"JPEG XL -e {effort}, {name}", size


def _pictures_size(pictures: Iterable[np.ndarray], kind: str, **options: Any) -> int:
    return sum(_picture_size(pixels, kind, **options) for pixels in pictures)


def _picture_size(pixels: np.ndarray, kind: str, **options: Any) -> int:
    image = Image.fromarray(pixels)
    if kind == "PNG" and not (pixels % 255).any():
        image = image.convert("1")
    sink = io.BytesIO()
    (image.convert("RGB") if kind == "WEBP" else image).save(sink, kind, **options)
    return len(sink.getvalue())


def _rival(python: str, folder: Path, kind: str, content: Any, effort: int = 0) -> int:
    """What ``rival_codecs.py`` says."""
    if isinstance(content, bytes):
        path = folder / "content"
        path.write_bytes(content)
    elif isinstance(content, list):
        path = folder / "sheets.npz"
        np.savez(path, *content)
    else:
        path = folder / "images.npy"
        np.save(path, content)
    script = Path(__file__).with_name("rival_codecs.py")
    command = [python, str(script), kind, str(path), *([str(effort)] if effort else [])]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


# --------------------------------------------------------------------------------------------------------------
# 3. With the model in the file
# --------------------------------------------------------------------------------------------------------------


def embedded(coded: Coded, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Sizes of the first n rows with the model in the file, and the smallest of the others for them."""
    packed = {width: pack(coded.model, models.describe, width) for width in (6, 7, 8)}
    trial = min(coded.n, 1000 if isinstance(coded.schema.space, Table) else 100)
    row_bytes = {w: compress(coded, trial, folder, octets).coded / trial for w, octets in packed.items()}
    of_all = arguments.of_all or others(coded, coded.n, folder, arguments)
    near = {name for name, size in of_all.items() if size <= NEAR * best_other(of_all)[1]}
    points: list[dict[str, Any]] = []
    for n in sorted({*(10**k for k in range(2, 9) if 10**k < coded.n), *_thirds(coded.n), coded.n}):
        width = min(packed, key=lambda w: len(packed[w]) + n * row_bytes[w])
        sizes = compress(coded, n, folder, packed[width])
        rival = best_other(others(coded, n, folder, arguments, near))
        points.append({"n": n, "width": width, "model": sizes.model, "file": sizes.file, "other": rival})
        print(json.dumps(points[-1]), flush=True)
        if sizes.file < rival[1]:
            break
    return {"packed": {w: len(octets) for w, octets in packed.items()}, "row_bytes": row_bytes, "points": points}


def _thirds(n: int) -> list[int]:
    return [3 * 10**k for k in range(2, 9) if 3 * 10**k < n]


def break_even(points: list[dict[str, Any]]) -> tuple[float, bool]:
    """Rows from which on the file with its model is smaller, and whether that lies within the rows at hand.

    Between two points, and beyond the last two, both sizes are taken to be linear in the rows.
    """
    for before, after in itertools.pairwise(points):
        gap = [p["file"] - p["other"][1] for p in (before, after)]
        if gap[1] <= 0:
            if gap[0] <= 0:
                return before["n"], True
            return before["n"] + (after["n"] - before["n"]) * gap[0] / (gap[0] - gap[1]), True
    if gap[0] <= gap[1]:
        return math.inf, False
    return after["n"] + (after["n"] - before["n"]) * gap[1] / (gap[0] - gap[1]), False


# --------------------------------------------------------------------------------------------------------------
# 4. Without a run
# --------------------------------------------------------------------------------------------------------------


def alone(coded: Coded, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """What ``likely compress DATA`` makes of all rows within the budget."""
    file, start = folder / "alone.lk", (time.process_time(), time.perf_counter())
    source = coded.source(coded.n, folder)
    sizes = likely.compress(source, file, budget=arguments.budget, workers=1, read=coded.case.read)
    cpu, wall = time.process_time() - start[0], time.perf_counter() - start[1]
    name = likely.compression.info(file)["model"]["name"]
    return {"name": name, "budget": arguments.budget, "cpu_seconds": cpu, "seconds": wall, **sizes.to_json()}


# --------------------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    cases: dict[str, dict[str, Any]] = {name: record["cases"][name] for name in CASES if name in record["cases"]}
    lines = [
        "# Compressed size",
        "",
        f"Command: `{record['command']}`. {record['date']}. Machine: {record['machine']['processor']}, "
        f"{record['machine']['cores']} cores, {record['machine']['system']}; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + ".",
        "",
        "No model but that of `likely, no run` has seen a row that is coded here.  Files were decoded and compared, but",
        "for those of the last table.",
        "",
        *bound_lines({name: case for name, case in cases.items() if "bound" in case}),
        *other_lines(cases),
        *embedded_lines({name: case["embedded"] for name, case in cases.items() if "embedded" in case}),
        "",
        *when_lines(cases),
    ]
    return "\n".join(lines) + "\n"


def bound_lines(cases: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "## Bound and file"
    yield ""
    yield "Bound: of the float32 model, with the standard error over seeds of its noise; with holes, the entropy of"
    yield "their pattern is named apart.  Tables: what the integer frequencies promise.  Net: the coded rows, without"
    yield "the bits that bits-back borrowed.  File: every byte of it.  Per cent are over bound and holes."
    yield ""
    yield "| case | model | rows | bound, bits | holes, bits | tables | net | file, bytes | file over bound | goal |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, case in cases.items():
        row = case["bound"]
        whole = row["bound_bits"] + row["holes_entropy_bits"]
        net = 8 * (row["coded"] - row["initial"] + row["holes"] + row["condition"] + row["side"])
        over = {key: 100 * (value / whole - 1) for key, value in (("net", net), ("file", 8 * row["file"]))}
        own = 100 * (row["coded_bits"] / row["bound_bits"] - 1)
        goal = next((percent for least, percent in GOALS if row["file"] >= least), None)
        real = "" if row["smallest"] == row["file"] else f" ({row['smallest']:,})"
        met = "" if goal is None else f"≤ {goal} %: {'yes' if over['file'] <= goal else '**no**'}"
        yield (
            f"| {name} | {row['name']}{_unfinished(case)} | {row['rows']:,} | {row['bound_bits']:,.0f} ± {row['bound_error_bits']:,.0f} "
            f"({row['bound_bits'] / _units(row):.4f} a {row['unit']}) | {row['holes_entropy_bits']:,.0f} "
            f"| {own:+.2f} % | {over['net']:+.2f} % | {row['file']:,}{real} | {over['file']:+.2f} % | {met} |"
        )
    yield ""


def _unfinished(case: dict[str, Any]) -> str:
    fit = case.get("fit", {"step": 0, "planned": 0})
    return f" ({fit['step']:,} of {fit['planned']:,} steps)" if fit["step"] < fit["planned"] else ""


def _units(row: dict[str, Any]) -> int:
    return row["rows"] if row["unit"] == "row" else row["cells"]


def other_lines(cases: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "## Others, for the same rows"
    for name, case in cases.items():
        if "others" not in case:
            continue
        ours = {key: other["bound"] for key, other in cases.items() if data_of(key) == name and "bound" in other}
        row = next(iter(ours.values()), None)
        if row is None:
            continue
        sizes = {f"**likely {other['name']}**": other["smallest"] for other in ours.values()} | case["others"]
        if "alone" in case:
            found = case["alone"]
            sizes[f"**likely, no run** ({found['name']} in the file, {found['cpu_seconds']:.0f} CPU s)"] = found["file"]
        best_name, best = best_other(case["others"])
        yield ""
        yield f"### {name}: {row['rows']:,} rows, {row['original']:,} bytes"
        yield ""
        yield f"| | bytes | bits a {row['unit']} | ÷ best other |"
        yield "|---|---|---|---|"
        for codec, size in sorted(sizes.items(), key=lambda item: item[1]):
            yield f"| {codec} | {size:,} | {8 * size / _units(row):.3f} | {size / best:.3f} |"
        least = min(other["smallest"] for other in ours.values())
        if row["unit"] == "row":
            goal, met = "at least 25 % smaller than the best other", least <= GOAL_TABLE * best
        else:
            goal, met = "smaller than the best other", least < best
        yield ""
        said = "yes" if met else "**no**"
        yield f"Best other: {best_name}.  Goal, {goal}: {said} ({100 * (1 - least / best):.1f} % smaller)."
    yield ""


def embedded_lines(cases: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "## With the model in the file"
    yield ""
    yield "File of the first n rows ÷ the smallest of the others for them; the model, rounded to so many bits a"
    yield "weight, is in the file.  Break-even: from how many rows on the file is the smaller one; with ~ where it lies"
    yield "beyond the rows at hand, both sizes being continued as straight lines.  No more rows are tried from there on."
    yield ""
    counts = sorted({point["n"] for case in cases.values() for point in case["points"]})
    shown = [n for n in counts if str(n).lstrip("13").strip("0") == ""]
    yield "| case | model, bytes | " + " | ".join(f"{n:,}" for n in shown) + " | last | break-even, rows |"
    yield "|---|---|" + "---|" * (len(shown) + 2)
    for name, case in cases.items():
        ratios = {point["n"]: point["file"] / point["other"][1] for point in case["points"]}
        last = case["points"][-1]
        rows, within = break_even(case["points"])
        yield (
            f"| {name} | {last['model']:,} ({last['width']} bits) | "
            + " | ".join(f"{ratios[n]:.2f}" if n in ratios else "" for n in shown)
            + f" | {ratios[last['n']]:.3f} ({last['n']:,}) "
            + (f"| {'' if within else '~ '}{rows:,.0f} |" if math.isfinite(rows) else "| never |")
        )


def when_lines(cases: dict[str, dict[str, Any]]) -> Iterator[str]:
    """When, by which coding and where each part was measured: a record is extended."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name, case in cases.items():
        for part in PARTS:
            if part in case:
                found.setdefault(tuple(case.get("when", {}).get(part, ())), []).append(f"{name} ({part})")
    for when, parts in sorted(found.items(), reverse=True):
        yield f"* {', '.join(when) or 'Before the record said when, rows-1 or rows-2'}: {', '.join(parts)}."


def data_of(name: str) -> str:
    """The case whose rows a case codes."""
    return name.removeprefix("pixelcnn-")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rivals", help="a Python with brotli and pillow-jxl-plugin")
    parser.add_argument("--effort", type=int, nargs="*", default=[7], help="of JPEG XL")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of fitting without a run")
    parser.add_argument("--out", type=Path, required=True, help="path of the results, without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    work: dict[str, Callable[..., Any]] = {
        "bound": bound_and_file,
        "others": lambda coded, *more: others(coded, coded.n, *more),
        "embedded": embedded,
        "alone": alone,
    }
    for name in arguments.cases:
        coded = Coded(CASES[name], arguments.runs / name)
        if coded.fitted is not None:
            note(arguments.out, name, "fit", steps_of(arguments.runs / name))
        for part in arguments.parts:
            if part in ("others", "alone") and data_of(name) != name:
                continue
            if part in ("bound", "embedded") and coded.fitted is None:
                print(f"{name}: not fitted")
                continue
            arguments.of_all = recorded(arguments.out)["cases"].get(data_of(name), {}).get("others")
            with tempfile.TemporaryDirectory() as folder:
                found = work[part](coded, Path(folder), arguments)
            print(name, part, json.dumps(found), flush=True)
            note(arguments.out, name, part, found)
    print(table(recorded(arguments.out)))


def steps_of(run: Path) -> dict[str, int]:
    """Step of the weights of a run, the last at which it was held against held-out data, and how many were planned."""
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    planned = json.loads((run / "config.json").read_text(encoding="utf-8"))["training"]["steps"]
    return {"step": max(line["step"] for line in steps if "valid" in line), "planned": planned}


def note(out: Path, name: str, part: str, found: Any) -> None:
    """Add to the record as it is now, for other parts may be at work elsewhere, and write the table."""
    record = recorded(out)
    case = record["cases"].setdefault(name, {})
    case[part] = found
    case.setdefault("when", {})[part] = [record["date"], archive.CODING, record["machine"]["processor"]]
    write_record(out, record, table(record))


def recorded(out: Path) -> dict[str, Any]:
    """The record so far, with the conditions of now."""
    path = out.with_suffix(".json")
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"cases": {}}
    return record | {
        "command": "python benchmarks/compression.py RUNS --rivals PYTHON --out benchmarks/results/compression",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": {"likely": likely.__version__, **versions(), "zstd": ".".join(map(str, zstandard.ZSTD_VERSION))},
    }


if __name__ == "__main__":
    main()
