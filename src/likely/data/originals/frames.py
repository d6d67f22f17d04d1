"""DataFrames and Parquet files: the same typed table comes back.

That is: every value to the bit, missing cells as they were missing, dtypes, categories and their order, the index, and
the labels of the columns.  The bytes of a Parquet file are not restored: writing it again gives an equal table.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from likely.data.columns import Encoder, TableColumn, Where
from likely.data.errors import DataError, check_names, needs, pandas_for
from likely.data.originals.original import Legal, Original, Part, Restored, Rows, intact, matrix, settle, whole
from likely.data.originals.side import Reader, Writer, damaged
from likely.data.originals.typed import (
    fixed_from,
    get_fixed,
    get_objects,
    get_objects_beside,
    put_fixed,
    put_objects,
    put_objects_beside,
    read_cells,
    same_object,
    usual,
    words_of,
)
from likely.data.sources import Source, creating
from likely.data.tables import READ_OPTIONS, FrameTable, TableForm, category_key, series_cells

if TYPE_CHECKING:
    import pandas as pd

_MOST_OBJECTS = 1 << 24  # objects in the facts
#: Columns of pandas with a mask for missing cells, and what they hold.
_MASKED = {"boolean": "bool", "Float32": "float32", "Float64": "float64"} | {
    f"{sign}{bits}": f"{sign}{bits}".lower() for sign in ("Int", "UInt") for bits in (8, 16, 32, 64)
}


@dataclass
class _Cells:
    """The cells of one column: an array of fixed size (``mask``: which are missing), or objects.

    Args:
        facts: what is needed to make the column of them.
        fixed: cells of fixed size, or codes of a categorical column (−1 is missing); 0 under the mask.
        mask: which cells of a masked column are missing; None for other columns.
        objects: cells that are Python objects.
        categories: of a categorical column.
    """

    facts: dict[str, Any]
    fixed: np.ndarray | None = None
    mask: np.ndarray | None = None
    objects: list[Any] | None = None
    categories: list[Any] | None = None

    def part(self, start: int, stop: int) -> _Cells:
        """Some rows."""
        rows = slice(start, stop)
        return _Cells(
            self.facts,
            None if self.fixed is None else self.fixed[rows],
            None if self.mask is None else self.mask[rows],
            None if self.objects is None else self.objects[rows],
            self.categories,
        )

    def put(self, out: Writer, expected: _Cells | None, what: str) -> None:
        """Write what differs from the expected cells; everything if None is."""
        if self.mask is not None:
            flips = self.mask if expected is None else self.mask != cast(np.ndarray, expected.mask)
            out.places(np.flatnonzero(flips), len(flips))
        if self.fixed is not None:
            put_fixed(out, self.fixed, None if expected is None else expected.fixed)
        else:
            objects = cast(list[Any], self.objects)
            put_objects_beside(out, objects, None if expected is None else expected.objects, what)

    def equals(self, other: _Cells) -> bool:
        """Whether all cells are the same to the bit."""
        if self.mask is not None and not np.array_equal(self.mask, cast(np.ndarray, other.mask)):
            return False
        if self.fixed is not None:
            return self.fixed.tobytes() == cast(np.ndarray, other.fixed).tobytes()
        return all(map(same_object, cast(list[Any], self.objects), cast(list[Any], other.objects)))


def _get(reader: Reader, n: int, expected: _Cells, beside: bool) -> _Cells:
    """The inverse of :meth:`_Cells.put`; what is not beside is there in full."""
    out = _Cells(expected.facts, categories=expected.categories)
    if expected.mask is not None:
        flips = np.zeros(n, dtype=bool)
        flips[reader.places(n)] = True
        out.mask = expected.mask ^ flips if beside else flips
    if expected.fixed is not None:
        out.fixed = get_fixed(reader, n, expected.fixed.dtype, expected.fixed if beside else None)
    else:
        out.objects = get_objects_beside(reader, n, expected.objects if beside else None)
    return out


# From and to pandas -----------------------------------------------------------------------------------------------


def _pack(values: Sequence[Any], what: str) -> str:
    out = Writer()
    out.number(len(values))
    put_objects(out, values, what)
    return out.content().hex()


def _unpack(packed: str, limit: int) -> list[Any]:
    reader = Reader(bytes.fromhex(packed), limit)
    return get_objects(reader, reader.number(_MOST_OBJECTS))


def _take(series: pd.Series, what: str) -> _Cells:
    """The cells of a pandas column."""
    pd = pandas_for("a DataFrame")
    dtype: Any = series.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        inner = _take(pd.Series(dtype.categories), what)
        categories = list(dtype.categories)
        facts = {"ordered": bool(dtype.ordered), "of": inner.facts, "categories": _pack(_plain(inner), what)}
        return _Cells(facts, fixed=series.cat.codes.to_numpy().astype(np.int32), categories=categories)
    if isinstance(dtype, pd.DatetimeTZDtype):
        bare = series.dt.tz_convert("UTC").dt.tz_localize(None).to_numpy()
        return _Cells({"fixed": bare.dtype.str, "zone": str(dtype.tz)}, fixed=bare)
    if isinstance(dtype, np.dtype) and dtype.kind in "biufcmM":
        return _Cells({"fixed": dtype.str}, fixed=series.to_numpy())
    if str(dtype) in _MASKED:
        mask, kind = series.isna().to_numpy(), np.dtype(_MASKED[str(dtype)])
        held = series.to_numpy(dtype=kind, na_value=kind.type(0))
        return _Cells({"fixed": kind.str, "masked": str(dtype)}, fixed=held, mask=mask)
    if isinstance(dtype, pd.IntervalDtype):
        return _Cells({"objects": "interval"}, objects=list(series.array))
    if isinstance(dtype, pd.StringDtype):
        facts = {"string": [dtype.storage, "NaN" if dtype.na_value is not pd.NA else "NA"]}
        return _Cells(facts, objects=list(series.array))
    if isinstance(dtype, np.dtype) and dtype.kind == "O":
        return _Cells({"objects": "object"}, objects=list(series.to_numpy()))
    raise DataError(f"{what}: cannot keep a column of dtype {dtype}; convert it, e.g. with .astype(str)")


def _plain(cells: _Cells) -> list[Any]:
    """Cells as objects that can be kept among the facts."""
    if cells.objects is not None:
        return cells.objects
    return list(cast(np.ndarray, cells.fixed))


def _make(cells: _Cells) -> pd.Series:
    """The pandas column of some cells."""
    pd = pandas_for("a DataFrame")
    facts = cells.facts
    if "categories" in facts:
        categories = _index_of(facts["of"], cast(list[Any], cells.categories))
        codes = cast(np.ndarray, cells.fixed)
        if len(codes) and (codes.min() < -1 or codes.max() >= len(categories)):
            raise damaged("a code beyond the categories")
        return pd.Series(pd.Categorical.from_codes(codes, categories, ordered=facts["ordered"]))
    if "string" in facts:
        storage, missing = facts["string"]
        dtype = pd.StringDtype(storage, na_value=math.nan if missing == "NaN" else pd.NA)
        return pd.Series(pd.array(cells.objects, dtype=dtype))
    if cells.objects is not None:
        held = np.empty(len(cells.objects), dtype=object)
        held[:] = cells.objects
        if facts["objects"] == "interval":
            return pd.Series(pd.arrays.IntervalArray(held))
        return pd.Series(held, dtype=object)
    series = pd.Series(cast(np.ndarray, cells.fixed))
    if "zone" in facts:
        return series.dt.tz_localize("UTC").dt.tz_convert(facts["zone"])
    if cells.mask is not None:
        series = series.astype(facts["masked"])
        series[cells.mask] = pd.NA
    return series


def _index_of(facts: dict[str, Any], values: list[Any]) -> Any:
    """An index of some values, of the dtype that the facts say."""
    pd = pandas_for("a DataFrame")
    if "fixed" in facts:
        return pd.Index(_make(_Cells(facts, fixed=np.array(values, dtype=np.dtype(facts["fixed"])))))
    return pd.Index(_make(_Cells(facts, objects=values)))


def _empty(facts: dict[str, Any], limit: int) -> _Cells:
    """No cells, of the sort that the facts say."""
    if "categories" in facts:
        return _Cells(facts, fixed=np.empty(0, np.int32), categories=_unpack(facts["categories"], limit))
    if "fixed" in facts:
        dtype = np.dtype(facts["fixed"])
        if dtype.kind not in "biufcmM":
            raise DataError(f"head is damaged: expected numbers, got dtype {dtype}")
        return _Cells(facts, fixed=np.empty(0, dtype), mask=np.empty(0, bool) if "masked" in facts else None)
    return _Cells(facts, objects=[])


def _expect(column: TableColumn, sort: _Cells, words: Sequence[Any], absent: Sequence[str], v: np.ndarray) -> _Cells:
    """The cells that the values of a modelled column usually stand for."""
    missing = np.isnan(v)
    if sort.categories is not None:
        codes = np.full(len(column.categories or ()) + 1, -1, np.int32)
        if column.coded:
            encoder = Encoder(column, absent)
            for place, category in reversed(list(enumerate(sort.categories))):
                code = encoder.code(category_key(category))
                if code is not None and not math.isnan(code):
                    codes[int(code)] = place
            at = np.where(missing, len(codes) - 1, v).astype(np.int64)
            if len(at) and (at.min() < 0 or at.max() >= len(codes)):
                raise DataError(f"column {column.name!r}: expected codes of its categories")
            return _Cells(sort.facts, fixed=codes[at], categories=sort.categories)
        return _Cells(sort.facts, fixed=np.full(len(v), -1, np.int32), categories=sort.categories)
    if sort.fixed is not None:
        fixed = fixed_from(column, v, sort.fixed.dtype)
        if sort.mask is not None:
            fixed = np.where(missing, np.zeros(1, fixed.dtype), fixed)
            return _Cells(sort.facts, fixed=fixed, mask=missing)
        return _Cells(sort.facts, fixed=fixed)
    if column.coded:
        at = np.where(missing, len(column.categories or ()), v).astype(np.int64)
        return _Cells(sort.facts, objects=list(map(words.__getitem__, at.tolist())))
    number = int if column.dtype == "object:int" else float
    objects = [words[-1] if absent_ else number(value) for value, absent_ in zip(v.tolist(), missing.tolist())]
    return _Cells(sort.facts, objects=objects)


def digest_of(frame: pd.DataFrame, name: str = "DataFrame") -> tuple[bytes, int]:
    """Digest of a table's content, whatever wrote it, and its size in bytes."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    digest.update(json.dumps(_labels(frame), sort_keys=True).encode())
    for part in (_index_frame(frame), frame):
        for place in range(part.shape[1]):
            what = f"{name}, column {part.columns[place]!r}"
            cells = _take(part.iloc[:, place], what)
            out = Writer()
            cells.put(out, None, what)
            digest.update(json.dumps(cells.facts, sort_keys=True).encode())
            digest.update(out.content())
            size += len(out.content())
    return digest.digest(), size


def _index_frame(frame: pd.DataFrame) -> pd.DataFrame:
    """The levels of an index that is no mere count of the rows, as columns."""
    pd = pandas_for("a DataFrame")
    index = frame.index
    if type(index) is pd.RangeIndex:
        return pd.DataFrame(index=range(len(frame)))
    levels = [index.get_level_values(level) for level in range(index.nlevels)]
    return pd.concat([pd.Series(level.array, name=place) for place, level in enumerate(levels)], axis=1)


def _labels(frame: pd.DataFrame) -> dict[str, Any]:
    """Facts about the index and the labels of the columns."""
    pd = pandas_for("a DataFrame")
    index: Any = frame.index
    columns: Any = frame.columns
    out: dict[str, Any] = {"names": _pack(list(index.names), "index"), "axis": _pack(list(columns.names), "columns")}
    if type(index) is pd.RangeIndex:
        out["range"] = [index.start, index.stop, index.step]
    else:
        out["levels"] = index.nlevels
        out["freq"] = getattr(index, "freqstr", None)
    if type(columns) is pd.RangeIndex:
        out["columns"] = [columns.start, columns.stop, columns.step]
    else:
        out["columns"] = _pack(list(columns), "columns")
        out["of"] = None if columns.nlevels > 1 else str(columns.dtype)
    return out


# Taking apart -----------------------------------------------------------------------------------------------------


class FrameOriginal(Original):
    """A DataFrame or a Parquet file.

    Args:
        form: what the schema says of the table.
        source: the object or the file.
        options: how it differs from the one that was fitted.
    """

    def __init__(self, form: TableForm, source: Source, options: Mapping[str, Any]) -> None:
        check_names(options, READ_OPTIONS, "reading a table")
        arrow = None
        if source.kind == "parquet":
            frame, arrow = _read_parquet(source)
        else:
            frame = source.value
        table = FrameTable(Source("dataframe", frame, source.name))
        places = form.match(table, options.get("extra") or form.extra)
        absent = tuple(options.get("missing") or form.missing)
        columns = [*form.modelled, *form.given]
        wanted = {places[column.name]: i for i, column in enumerate(columns)}
        self._form, self._absent, self._columns = form, absent, columns
        index = _index_frame(frame)
        self._index = [_take(index.iloc[:, j], f"{source.name}, index") for j in range(index.shape[1])]
        self._cells, self._is = [], [wanted.get(place) for place in range(frame.shape[1])]
        self._values = np.empty((len(frame), len(columns)))
        self._usual = np.zeros((2, len(columns)))
        self._words: list[list[Any]] = []
        for place, name in enumerate(table.names):
            what = f"{source.name}, column {name!r}"
            cells = _take(frame.iloc[:, place], what)
            made = _make(cells.part(0, 0)).dtype
            if made != frame.dtypes.iloc[place]:
                raise DataError(f"{what}: cannot keep a column of dtype {frame.dtypes.iloc[place]}, only {made}")
            i, words = self._is[place], list[Any]()
            if i is not None:
                column = columns[i]
                values, allowed = self._read(column, frame.iloc[:, place], name, Where(source.name))
                self._usual[:, i] = usual(column, values, allowed)
                values = np.where(allowed, values, self._usual[0, i])
                self._values[:, i] = values
                if cells.objects is not None:
                    words = words_of(column, cells.objects, values)
            self._cells.append(cells)
            self._words.append(words)
        digest, size = digest_of(frame, source.name)
        facts = {
            **_labels(frame),
            "absent": None if absent == form.missing else list(absent),
            "index": [cells.facts for cells in self._index],
            "cells": [cells.facts for cells in self._cells],
            "is": self._is,
            "words": [_pack(words, "words") if words else None for words in self._words],
            "arrow": arrow,
        }
        super().__init__(source.kind, "content", len(frame), size, digest, facts)

    def _read(self, column: TableColumn, series: pd.Series, name: str, where: Where) -> tuple[np.ndarray, np.ndarray]:
        try:
            cells = series_cells(series, name, where)
        except (DataError, OverflowError):  # values of several types, or of one that no column of the schema has
            return np.zeros(len(series)), np.zeros(len(series), dtype=bool)
        return read_cells(column, cells, self._absent)

    def _rows(self, start: int, stop: int, legal: Legal | None) -> Rows:
        wide = len(self._form.modelled)
        values = self._values[start:stop].copy()
        x = torch.from_numpy(values[:, :wide].copy())
        if legal is not None:
            settle(x, legal, [*self._usual[:, :wide], np.zeros(wide)])
            values[:, :wide] = x.numpy()
        condition = torch.from_numpy(values[:, wide:].copy()) if self._form.given else None
        out = Writer()
        for cells in self._index:
            cells.part(start, stop).put(out, None, "index")
        for place, (cells, i) in enumerate(zip(self._cells, self._is)):
            here = cells.part(start, stop)
            expected = None
            if i is not None:
                expected = _expect(self._columns[i], cells, self._words[place], self._absent, values[:, i])
                if here.equals(expected):
                    continue
            out.number(place)
            here.put(out, expected, f"column {place + 1}")
        return Rows(x, condition, out.content())


def _read_parquet(source: Source) -> tuple[pd.DataFrame, str]:
    """The table as pandas has it (whole numbers with missing cells exactly), and its Arrow schema."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError:
        raise needs("tables", f"{source.name}: a Parquet file") from None
    pd = pandas_for("a DataFrame")
    table = parquet.read_table(source.path)
    frame = table.to_pandas()
    for place, label in enumerate(frame.columns):
        if label in table.column_names and frame.columns.get_loc(label) == place:
            column = table.column(label)
            if pa.types.is_integer(column.type) and frame.dtypes.iloc[place].kind == "f":
                frame[label] = pd.array(column.to_pylist(), dtype=str(column.type).capitalize().replace("Ui", "UI"))
    return frame, table.schema.serialize().to_pybytes().hex()


# Putting together -------------------------------------------------------------------------------------------------


class RestoredFrame(Restored):
    """A DataFrame or Parquet file that comes back with the same content."""

    def __init__(
        self,
        form: TableForm,
        facts: Mapping[str, Any],
        parts: Iterable[Part],
        first: int,
        keep: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(str(facts["media"]))
        self._form, self._facts, self._parts, self._first, self._keep = form, facts, parts, first, keep
        self._frame: pd.DataFrame | None = None

    @property
    def value(self) -> pd.DataFrame:
        if self._frame is None:
            with intact("side information"):
                frame = self._build()
                if self._keep is not None:
                    start, stop = (max(row - self._first, 0) for row in self._keep)
                    frame = frame.iloc[start:stop]
                self._frame = frame
                self.digest = digest_of(self._frame)[0]
        return self._frame

    def _build(self) -> pd.DataFrame:
        pd = pandas_for("a DataFrame")
        facts, form = self._facts, self._form
        n, limit = whole(facts["n"]), 4 * whole(facts["size"]) + (1 << 16)
        absent = form.missing if facts["absent"] is None else tuple(facts["absent"])
        columns = [*form.modelled, *form.given]
        is_ = facts["is"]
        if sorted(i for i in is_ if i is not None) != list(range(len(columns))):
            raise DataError("head is damaged: expected every column of the schema once")
        index = [_empty(entry, limit) for entry in facts["index"]]
        sorts = [_empty(entry, limit) for entry in facts["cells"]]
        words = [[] if packed is None else _unpack(packed, limit) for packed in facts["words"]]
        found: list[list[_Cells]] = [[] for _ in [*index, *sorts]]
        rows = 0
        for x, condition, side in self._parts:
            values = matrix(x, len(form.modelled), "x")
            if form.given:
                values = np.concatenate([values, matrix(condition, len(form.given), "condition")], axis=1)
            reader = Reader(side, limit)
            rows += len(values)
            if self._first + rows > n:
                raise damaged(f"more than the {n} rows of the original")
            for level, sort in enumerate(index):
                found[level].append(_get(reader, len(values), sort, beside=False))
            tag = -1
            for place, (sort, i) in enumerate(zip(sorts, is_)):
                if tag < place and not reader.done:
                    tag = reader.number(len(sorts) - 1)
                    if tag < place:
                        raise damaged("its sections are out of order")
                expected = sort
                if i is not None:
                    expected = _expect(columns[i], sort, words[place], absent, values[:, i])
                if tag == place:
                    expected = _get(reader, len(values), expected, beside=i is not None)
                elif i is None and len(values):
                    raise damaged(f"the cells of column {place + 1} are not there")
                found[len(index) + place].append(expected)
            if not reader.done:
                raise damaged("it goes on behind its end")
        series = [_make(_joined(sort, cells)) for sort, cells in zip([*index, *sorts], found)]
        frame = pd.concat([s.set_axis(range(rows)) for s in series[len(index) :]], axis=1)
        frame.columns = _column_index(facts, limit)
        frame.index = _row_index(facts, series[: len(index)], self._first, rows, limit)
        return frame

    def write(self, path: Path | str, digest: bytes | None = None) -> None:
        """Write Parquet (``.parquet``, ``.pq``, or any other name where the original was Parquet) or CSV."""
        frame = self.value
        self._check(digest)
        target = None if str(path) == "-" else Path(path)
        parquet = target is not None and target.suffix.lower() in (".parquet", ".pq")
        with creating(target) as file:
            if parquet or self.media == "parquet":
                self._write_parquet(frame, file)
            else:
                file.write(frame.to_csv(index="range" not in self._facts).encode("utf-8"))

    def _write_parquet(self, frame: pd.DataFrame, file: Any) -> None:
        packed = self._facts["arrow"]
        if packed is not None:
            import pyarrow as pa
            import pyarrow.parquet as parquet

            schema = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(packed)))
            try:
                table = pa.Table.from_pandas(frame, schema=schema, safe=True).replace_schema_metadata(schema.metadata)
                parquet.write_table(table, file)
                return
            except (pa.ArrowException, KeyError):
                pass  # a schema that this version of Arrow cannot fill from pandas
        frame.to_parquet(file)


def _joined(sort: _Cells, parts: Sequence[_Cells]) -> _Cells:
    out = _Cells(sort.facts, categories=sort.categories)
    if sort.fixed is not None:
        out.fixed = np.concatenate([sort.fixed, *(cast(np.ndarray, part.fixed) for part in parts)])
    else:
        out.objects = [value for part in parts for value in cast(list[Any], part.objects)]
    if sort.mask is not None:
        out.mask = np.concatenate([sort.mask, *(cast(np.ndarray, part.mask) for part in parts)])
    return out


def _column_index(facts: Mapping[str, Any], limit: int) -> Any:
    pd = pandas_for("a DataFrame")
    names = _unpack(facts["axis"], limit)
    if isinstance(facts["columns"], list):
        return pd.RangeIndex(*facts["columns"], name=names[0])
    labels = _unpack(facts["columns"], limit)
    if facts["of"] is None:
        return pd.MultiIndex.from_tuples(labels, names=names)
    return pd.Index(labels, dtype=facts["of"], name=names[0])


def _row_index(facts: Mapping[str, Any], levels: Sequence[Any], first: int, rows: int, limit: int) -> Any:
    pd = pandas_for("a DataFrame")
    names = _unpack(facts["names"], limit)
    if "range" in facts:
        start, _, step = facts["range"]
        return pd.RangeIndex(start + first * step, start + (first + rows) * step, step, name=names[0])
    if facts["levels"] > 1:
        return pd.MultiIndex.from_arrays([pd.Index(level) for level in levels], names=names)
    index = pd.Index(levels[0], name=names[0])
    if facts["freq"] and rows == facts["n"]:
        index.freq = facts["freq"]
    return index
