"""Lossless compression of the user's data: with a trained model, or with a small one that the file carries itself.

:func:`compress` and :func:`decompress` are what ``likely compress`` and ``likely decompress`` do; docs/compress.md
shows them at work.  The bytes are made in :mod:`likely.archive`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from likely import api, archive, models
from likely.api import Fitted
from likely.archive import Archive, Sizes
from likely.coding.container import Limits, describe
from likely.coding.errors import FormatError
from likely.coding.weights import pack, unpack
from likely.contract import Integers, Model, NoCodec, Reals, Space, Table, Unsupported
from likely.data import Schema, infer_schema
from likely.data.originals import Original, Restored, take_apart

#: Rows that a candidate model is judged by.
_JUDGED = 512

Progress = Callable[[str, int, int], None]


def compress(
    data: Any,
    path: str | Path | BinaryIO,
    *,
    run: str | Path | Fitted | None = None,
    embed: bool = False,
    budget: float = 60.0,
    seed: int = 0,
    verify: bool = True,
    workers: int | None = None,
    read: Mapping[str, Any] | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Sizes:
    """Compress data without loss into a ``.lk`` file.

    With a run its model codes the data, and whoever decompresses needs the run.  Without one small models are fitted to
    the data itself, the one that makes the file smallest codes it, and the file carries it.

    Args:
        data: a path, ``"-"``, a DataFrame, an array, texts.
        path: the file to write, or a binary stream; a file appears when it is complete, and not before.
        run: a fitted model or the folder of one.
        embed: whether the file carries the run's model; without a run it carries the small one.
        budget: seconds to spend on fitting models, without a run.
        seed: of these fits.
        verify: decode every chunk before it is written.
        workers: processes at work; by default one a core.
        read: how this data differs from the fitted, or, without a run, how it is read.
        limits: what the file may hold.
        progress: called with stage, done and all.

    Returns:
        What the file costs, and what for.

    Raises:
        NoCodec: the run's model has no codec; the message says why.
        ValueError: the data is not of the run's schema.

    >>> import tempfile, numpy as np
    >>> file = Path(tempfile.mkdtemp()) / "digits.lk"
    >>> from sklearn.datasets import load_digits
    >>> digits = load_digits().data.astype(np.uint8)
    >>> sizes = compress(digits, file, budget=0)
    >>> sizes.file < 0.6 * sizes.original, np.array_equal(decompress(file), digits)
    (True, True)
    """
    data = api._kept(data, read)
    options: dict[str, Any] = {"verify": verify, "workers": workers, "limits": limits, "progress": progress}
    if run is None:
        fitted = _fit_small(data, budget, seed, read, progress)
        return fitted.compress(data, path, embed=True, read=api._file_options(read), **options)
    fitted = run if isinstance(run, Fitted) else api.load(run)
    return fitted.compress(data, path, embed=embed, read=read, **options)


def decompress(
    path: str | Path | bytes | BinaryIO,
    out: str | Path | None = None,
    *,
    run: str | Path | Fitted | None = None,
    rows: tuple[int, int] | None = None,
    workers: int | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> Any:
    """Restore what :func:`compress` was given.

    Args:
        path: the ``.lk`` file, or its bytes.
        out: file or folder to write, ``"-"`` for standard output; None returns the data.
        run: the model that compressed it, where the file carries none; by default the run whose place it names.
        rows: only these rows, from … to before …; other chunks are not decoded.
        workers: processes at work; by default one a core.
        limits: what the file may declare; see :class:`likely.coding.container.Limits`.
        progress: called with stage, done and all.

    Returns:
        The data: bytes for a file that comes back to the byte, else a DataFrame, array, …; with ``out`` the path.

    Raises:
        FormatError: the file is not intact, was written with another model, or by a later version; nothing is
            written then.
        FileNotFoundError: its run is not there.
    """
    with Archive(path, limits) as file:
        model, schema = _model_of(file, run)
        restored = file.restore(model, schema, rows=rows, workers=workers, progress=progress)
        if out is None:
            return _checked(restored, None if rows is not None else file.reader.digest)
        restored.write(out, None if rows is not None else file.reader.digest)
    return Path(out)


def info(path: str | Path) -> dict[str, Any]:
    """What a ``.lk`` file holds, without decoding its rows: JSON values.

    Raises:
        FormatError: the file is not intact.
    """
    with Archive(path) as file:
        head = json.loads(file.head())
        return {
            "format": f"{file.reader.major}.{file.reader.minor}",
            **file.header,
            "media": head.get("media"),
            "rows": file.rows,
            "size": head.get("size"),
            "file": file.reader.size,
            "embedded_model": file.embedded,
            "chunks": [
                {"kind": entry.kind, "rows": entry.rows, "decoded": entry.raw_size, "stored": entry.length}
                for entry in file.reader.chunks
            ],
        }


def describe_file(path: str | Path) -> list[str]:
    """The same for people, as lines."""
    found = info(path)
    model = found.get("model", {})
    exact = {"bytes": "to the byte", "content": "its content, not its bytes"}.get(found.get("exactness", ""), "")
    where = "in the file" if found["embedded_model"] else f"in {found['run']}" if found.get("run") else "apart"
    lines = [
        f"{found['media']}, {found['rows']:,} rows, {found['size']:,} bytes; comes back: {exact}",
        f"model: {model.get('name')} ({where}), fingerprint {model.get('fingerprint')}",
        f"written by likely {found.get('likely')}, coding {found.get('coding')}",
    ]
    with Archive(path) as file:
        return [*lines, *describe(file.reader)]


# --------------------------------------------------------------------------------------------------------------
# Which model
# --------------------------------------------------------------------------------------------------------------


def _model_of(file: Archive, run: str | Path | Fitted | None) -> tuple[Model, Schema]:
    """The model of a file and its schema: given, in the file, or in the run that it names."""
    if isinstance(run, Fitted):
        return run.model.cpu(), run.schema
    if run is None and file.embedded:
        return file.model()
    if run is None:
        run = file.header.get("run")
        if not isinstance(run, str):
            raise FileNotFoundError("the file carries no model and names no run: say which run compressed it (--run)")
        if not (Path(run) / "config.json").exists():
            raise FileNotFoundError(
                f"the file was compressed with the run {run}, which is not there: say where it is (--run), "
                f"its model's fingerprint is {file.header.get('model', {}).get('fingerprint')}"
            )
    fitted = api.load(run)
    return fitted.model, fitted.schema


def _checked(restored: Restored, digest: bytes | None) -> Any:
    value = restored.value
    if digest is not None and restored.digest != digest:
        raise FormatError("the chunks are intact, but together they are not the original", "whole file")
    return value


def _fit_small(
    data: Any, budget: float, seed: int, read: Mapping[str, Any] | None, progress: Progress | None
) -> Fitted:
    """The small model, fitted to the data itself, whose file would be smallest."""
    schema = infer_schema(data, **dict(read or {}))
    original = take_apart(schema, data, **api._file_options(read))
    candidates = _candidates(schema.space, original.n)
    best: tuple[float, Fitted] | None = None
    started = time.monotonic()
    for number, (name, options) in enumerate(candidates):
        if progress is not None:
            progress(f"fitting {name}", number, len(candidates))
        left = budget - (time.monotonic() - started)
        trained = not models.find(name).closed_form
        if trained and left < 5.0:
            continue
        if trained:
            options = {**options, "budget": left / (len(candidates) - number)}
        held_out = 0.05 if trained and original.n >= 100 else 0.0
        try:
            fitted = api.fit(
                data,
                name,
                schema=schema,
                read=api._file_options(read),
                seed=seed,
                valid_fraction=held_out,
                progress=False,
                **options,
            )
            size = _estimate(fitted, original)
        except (NoCodec, Unsupported):
            continue
        if best is None or size < best[0]:
            best = size, fitted
    if best is None:
        raise NoCodec(f"no model codes {type(schema.space).__name__} data; {_advice(schema.space)}")
    return best[1]


def _candidates(space: Space, n: int) -> list[tuple[str, dict[str, Any]]]:
    """Models worth a trial, from the smallest up."""
    found: list[tuple[str, dict[str, Any]]] = [("independent", {})]
    if space.dims <= 4096:
        found.append(("mixture", {"components": 16}))
    image = isinstance(space, Integers) and len(space.shape) == 3
    if n * space.dims >= 100_000:
        if image and n * space.dims >= 1_000_000:
            found.append(("pixelcnn", {}))
        width = 64 if n * space.dims < 2_000_000 else 128
        options: dict[str, Any] = {"latent_dim": 16, "hidden": [width, width], "gradient": "path"}
        if isinstance(space, Table):
            options |= {"prior": "mixture", "prior_options": {"components": 20}}
        found.append(("vae", options))
    return found


def _estimate(fitted: Fitted, original: Original) -> float:
    """Bytes that a file with this model inside would have, judged by some rows."""
    packed = pack(fitted.model, models.describe)
    model = unpack(packed, models.build)
    return len(packed) + archive.estimate_bits(model, original, _JUDGED) / 8


def _advice(space: Space) -> str:
    return "give the numbers a resolution, or compress them as a table" if isinstance(space, Reals) else "see docs"
