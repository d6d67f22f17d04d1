"""Lossless: a source taken apart into what a model codes and what it does not, and put together again."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from likely.data.errors import DataError
from likely.data.arrays import ArrayForm
from likely.data.originals.arrays import ArrayOriginal, restore_array
from likely.data.originals.delimited import CsvOriginal, restore_csv
from likely.data.originals.frames import FrameOriginal, RestoredFrame
from likely.data.originals.original import Legal, Original, Part, Restored, Rows, intact
from likely.data.schema import Schema, reading
from likely.data.tables import TableForm

__all__ = ["Legal", "Original", "Part", "Restored", "Rows", "restore", "take_apart"]


def take_apart(schema: Schema, source: Any, *, format: str | None = None, **options: Any) -> Original:
    """Split a source into what a model codes and all the rest."""
    with reading(source, format) as found:
        if isinstance(schema.form, TableForm) and found.kind == "csv":
            return CsvOriginal(schema.form, found, options)
        if isinstance(schema.form, TableForm):
            return FrameOriginal(schema.form, found, options)
        if isinstance(schema.form, ArrayForm):
            return ArrayOriginal(schema.form, found, options)
    raise DataError("no")


def restore(schema: Schema, head: bytes, parts: Iterable[Part], *, first: int = 0) -> Restored:
    with intact("head"):
        facts = json.loads(head)
        if facts["media"] in ("parquet", "dataframe"):
            return RestoredFrame(schema.form, facts, parts, first)
        if isinstance(schema.form, ArrayForm):
            return restore_array(schema.form, facts, parts, first)
    return restore_csv(schema.form, facts, parts, first)
