"""Lossless: a source taken apart into what a model codes and all the rest, and put together again.

The rule is *reconstruct and patch*: what the schema and the coded values would be written as is compared with the
original, and the differences are kept.  So the original comes back whatever the schema says of it, and a regular one
costs nothing beside the model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from likely.data.arrays import ArrayForm
from likely.data.errors import DataError
from likely.data.originals.arrays import ArrayOriginal, restore_array
from likely.data.originals.delimited import CsvOriginal, restore_csv
from likely.data.originals.frames import FrameOriginal, RestoredFrame
from likely.data.originals.original import Legal, Original, Part, Restored, Rows, intact
from likely.data.originals.pictures import FolderOriginal, RestoredFolder
from likely.data.originals.sequences import LinesOriginal, TextOriginal, restore_sequences
from likely.data.schema import Schema, reading
from likely.data.tables import TableForm

__all__ = ["Legal", "Original", "Part", "Restored", "Rows", "restore", "take_apart"]


def take_apart(schema: Schema, source: Any, *, format: str | None = None, **options: Any) -> Original:
    """Split a source into what a model of the schema's space codes and all the rest.

    Cells that the schema refuses do not raise: they get a placeholder in ``x`` and are kept in ``side``.

    >>> from likely.data import infer_schema
    >>> names = ["Ada", "Bea", "Eva", "Ida"]
    >>> schema = infer_schema(names)
    >>> original = take_apart(schema, ["Ida", "Zoe", "Ada"])
    >>> rows = original.rows(0, 3)
    >>> rows.x.shape
    torch.Size([3, 3])
    >>> restore(schema, original.head, [(rows.x, rows.condition, rows.side)]).value
    ['Ida', 'Zoe', 'Ada']

    Args:
        schema: what the data is.
        source: a path, ``"-"``, the name of an embedded set, or an object.
        format: kind of a file whose name does not say.
        options: how this file differs from the one that was fitted: see docs/data.md.

    Raises:
        DataError: where the source as a whole is not of the schema: a column that is not there, another shape.
    """
    form = schema.form
    with reading(source, format) as found:
        if isinstance(form, TableForm):
            if found.kind == "csv":
                return CsvOriginal(form, found, options)
            if found.kind in ("parquet", "dataframe"):
                return FrameOriginal(form, found, options)
            raise DataError(f"{found.name}: expected a table (CSV, Parquet or DataFrame), got {found.kind}")
        if isinstance(form, ArrayForm):
            return (FolderOriginal if found.kind == "images" else ArrayOriginal)(form, found, options)
        if found.kind not in ("text", "lines", "fasta", "strings"):
            raise DataError(f"{found.name}: expected text or sequences, got {found.kind}")
        return (TextOriginal if form.container == "text" else LinesOriginal)(form, found, options)


def restore(
    schema: Schema, head: bytes, parts: Iterable[Part], *, first: int = 0, keep: tuple[int, int] | None = None
) -> Restored:
    """Put a source together again.

    Args:
        schema: as it was given to :func:`take_apart`.
        head: of the original.
        parts: ``(x, condition, side)`` of consecutive rows.  Values of ``x`` on a grid may come back as another float
            next to the same step.
        first: number of the first row of the first part; what stands before the first row (a header) is always put
            in front, what follows the last row only behind it.
        keep: numbers of the rows to give, from … to before …; None for all rows of the parts.  Rows of an array come
            back as an array of their own: those of an .npy or idx file as an .npy file.

    Raises:
        DataError: where head or side are damaged; from ``value`` and ``write`` too, which do the work.
    """
    with intact("head"):
        facts = json.loads(head)
        form, media = schema.form, facts["media"]
        if isinstance(form, TableForm):
            if media == "csv":
                return restore_csv(form, facts, parts, first, keep)
            if media in ("parquet", "dataframe"):
                return RestoredFrame(form, facts, parts, first, keep)
        elif isinstance(form, ArrayForm):
            if media == "images":
                return RestoredFolder(form, facts, parts, first, keep)
            if media in ("npy", "idx", "npz", "arrays", "array", "list", "tensor", "sparse", "embedded"):
                return restore_array(form, facts, parts, first, keep)
        elif media in ("text", "lines", "fasta", "strings"):
            return restore_sequences(form, facts, parts, first, keep)
        raise DataError(f"head is damaged: {media!r} is not of a schema of the form {form.form!r}")
