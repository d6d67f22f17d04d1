"""Tables: CSV files, Parquet files and DataFrames, all held against one list of columns."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
from torch import Tensor

from likely.contract import Table
from likely.data import csvfile
from likely.data.columns import (
    Cells,
    Encoder,
    KeyCells,
    NumberCells,
    Summary,
    TableColumn,
    TextCells,
    Where,
    format_cells,
    holes,
    spell,
)
from likely.data.csvfile import MISSING, CsvFile, CsvWriter, Dialect
from likely.data.dataset import Dataset
from likely.data.errors import DataError, check_names, needs, pandas_for, some
from likely.data.moments import DAY, SECOND
from likely.data.sources import Source, creating
from likely.data.store import Store, reuse

if TYPE_CHECKING:
    import pandas as pd

_DIALECT = tuple(f.name for f in fields(Dialect))
_ROWS = 1 << 16  # rows written or read from Parquet at a time


class Labelled(Protocol):
    """A table that has names for its columns."""

    @property
    def name(self) -> str:
        """How messages call it."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """Distinct names of the columns."""
        ...

    @property
    def named(self) -> bool:
        """Whether the names are the user's."""
        ...


class TableSource(Protocol):
    """A table that can be read any number of times, in chunks."""

    name: str
    names: tuple[str, ...]
    labels: tuple[Any, ...]
    named: bool

    def chunks(self) -> Iterator[tuple[Where, list[Cells]]]:
        """The cells, column by column, a bounded number of rows at a time."""
        ...


@dataclass(frozen=True)
class TableForm:
    """A table as the user has it.

    Args:
        columns: every column, in the user's order.
        container: what it was read from: ``csv``, ``parquet`` or ``dataframe``.
        dialect: how a CSV file is written.
        missing: spellings of a missing cell, the one used in writing first.
        extra: what to do with columns that the schema does not have: ``refuse`` or ``ignore``.
    """

    columns: tuple[TableColumn, ...]
    container: Literal["csv", "parquet", "dataframe"] = "csv"
    dialect: Dialect = field(default_factory=Dialect)
    missing: tuple[str, ...] = MISSING
    extra: Literal["refuse", "ignore"] = "refuse"

    #: Name of the form in a saved schema.
    form = "table"

    def __post_init__(self) -> None:
        twice = [name for name, n in Counter(c.name for c in self.columns).items() if n > 1]
        if twice:
            raise DataError(f"columns: expected distinct names, got {some(twice)} more than once")
        if self.extra not in ("refuse", "ignore"):
            raise DataError(f"extra: expected 'refuse' or 'ignore', got {self.extra!r}")
        if not self.modelled:
            notes = "; ".join(f"{c.name!r}: {c.note}" for c in self.columns if c.note)
            raise DataError(
                f"columns: expected at least one column to model, got none ({notes or 'all are set aside'})"
            )

    @property
    def modelled(self) -> tuple[TableColumn, ...]:
        """The columns of an example."""
        return tuple(c for c in self.columns if c.role == "model")

    @property
    def given(self) -> tuple[TableColumn, ...]:
        """The columns of the condition."""
        return tuple(c for c in self.columns if c.role == "given")

    @property
    def space(self) -> Table:
        """The space of an example."""
        return Table(columns=tuple(c.model_column() for c in self.modelled))

    @property
    def condition_space(self) -> Table | None:
        """The space of the condition, or None."""
        return Table(columns=tuple(c.model_column() for c in self.given)) if self.given else None

    # Reading ------------------------------------------------------------------------------------------------------

    def read(self, source: Source, cache: Path | None = None, limit: int | None = None, **options: Any) -> Dataset:
        """Hold a source against the columns; see :meth:`likely.data.schema.Schema.read`."""
        check_names(options, READ_OPTIONS, "reading a table")
        absent = tuple(options.get("missing") or self.missing)
        table = self._open(source, options)
        places = self.match(table, options.get("extra") or self.extra)
        wanted = [*self.modelled, *self.given]
        shape = (len(wanted),)
        stamp = {"source": source.stamp(), "form": _plain(self.to_dict()), "options": _plain(options)}
        path = None if cache is None or stamp["source"] is None else cache / f"{_digest(stamp)}.npy"
        rows = reuse(path, stamp)
        if rows is None:
            encoders = [Encoder(column, absent) for column in wanted]
            store = Store(shape, np.float64, path, limit, stamp)
            try:
                for where, cells in table.chunks():
                    chunk = [
                        encoder.encode(cells[places[column.name]], where) for encoder, column in zip(encoders, wanted)
                    ]
                    store.append(np.stack(chunk, axis=1))
            except BaseException:
                store.abandon()
                raise
            rows = store.finish()
        if not len(rows):
            raise DataError(f"{source.name}: expected rows, got none")
        split = len(self.modelled)
        if not self.given:
            return Dataset(self.space, rows)
        return Dataset(self.space, rows[:, :split], self.condition_space, rows[:, split:])

    def _open(self, source: Source, options: Mapping[str, Any]) -> TableSource:
        return open_table(source, self.dialect_of(source, options) if source.kind == "csv" else Dialect())

    def dialect_of(self, source: Source, options: Mapping[str, Any]) -> Dialect:
        """How a CSV file is written: as the fitted one but for what ``options`` say, or as it seems to be."""
        said = {name: options[name] for name in _DIALECT if options.get(name) is not None}
        if self.container == "csv":
            return replace(self.dialect, **said)
        return csvfile.detect(source.path, source.name, **said)[0]

    def match(self, table: Labelled, extra: str) -> dict[str, int]:
        """For the name of each column that is needed, its place in the source; :class:`DataError` if one is not there.

        Args:
            table: the source.
            extra: ``refuse`` or ``ignore`` columns that the schema does not have.
        """
        places = {name: place for place, name in enumerate(table.names)}
        absent = [c.name for c in self.columns if c.role != "ignore" and c.name not in places]
        generated = not self.dialect.header if self.container == "csv" else all(_counted(c) for c in self.columns)
        if not table.named or (generated and absent):
            needed = len(self.columns)
            if len(table.names) != needed:
                raise DataError(
                    f"{table.name}: expected {needed} columns, got {len(table.names)}{_delimiter_hint(table)}"
                )
            return {column.name: place for place, column in enumerate(self.columns)}
        if absent:
            near = difflib.get_close_matches(absent[0], table.names, n=1)
            hint = f"; is {near[0]!r} meant?" if near else ""
            raise DataError(
                f"{table.name}: expected a column {absent[0]!r}, got {some(table.names, 12)}{hint} (if its values are "
                f"unknown, add it with empty cells){_delimiter_hint(table)}"
            )
        known = {c.name for c in self.columns}
        surplus = [name for name in table.names if name not in known]
        if surplus and extra != "ignore":
            raise DataError(
                f"{table.name}: got {some(surplus)}, which the fitted table does not have; remove such columns or pass "
                f"extra='ignore'"
            )
        return places

    # Back to the user ---------------------------------------------------------------------------------------------

    def _values(self, x: Tensor, condition: Tensor | None) -> dict[str, np.ndarray]:
        """Codes or values of every column, by name; NaN where nothing is known."""
        self.space.validate(x.detach().cpu(), "x")
        values = x.detach().cpu().double().numpy()
        out = {column.name: values[:, j] for j, column in enumerate(self.modelled)}
        if condition is not None:
            space = self.condition_space
            if space is None:
                raise DataError("condition: the schema has no given columns")
            space.validate(condition.detach().cpu(), "condition")
            held = condition.detach().cpu().double().numpy()
            out.update({column.name: held[:, j] for j, column in enumerate(self.given)})
        nothing = np.full(len(values), math.nan)
        return {column.name: out.get(column.name, nothing) for column in self.columns}

    def to_user(self, x: Tensor, condition: Tensor | None = None) -> pd.DataFrame:
        """A DataFrame with the user's columns, dtypes and categories; columns set aside come back empty."""
        pd = pandas_for("a DataFrame")
        values = self._values(x, condition)
        series = [_series(pd, column, values[column.name]) for column in self.columns]
        frame = pd.concat(series, axis=1) if series else pd.DataFrame()
        frame.columns = pd.Index([column.user_label for column in self.columns])
        return frame

    def write(self, x: Tensor, path: Path | None, condition: Tensor | None = None) -> None:
        """Write CSV (compressed by suffix) or Parquet; None is standard output."""
        if path is not None and path.suffix.lower() in (".parquet", ".pq"):
            self.to_user(x, condition).to_parquet(path)
            return
        dialect = self.dialect
        if path is not None and ".tsv" in path.name.lower():
            dialect = replace(dialect, delimiter="\t", blanks=False)
        absent = self.missing[0] if self.missing else ""
        with creating(path) as file:
            writer = CsvWriter(file, dialect, [column.textual for column in self.columns])
            writer.header([str(column.user_label) for column in self.columns])
            for start in range(0, len(x), _ROWS):
                part = slice(start, start + _ROWS)
                values = self._values(x[part], None if condition is None else condition[part])
                comma = dialect.decimal == ","
                cells = [format_cells(column, values[column.name], absent, comma) for column in self.columns]
                writer.rows(zip(*cells))

    def complete(
        self, source: Source, x: Tensor, path: Path | None, to_file: bool, **options: Any
    ) -> pd.DataFrame | None:
        """The source with its holes filled from ``x``; see :meth:`likely.data.schema.Schema.complete`."""
        check_names(options, READ_OPTIONS, "reading a table")
        absent = tuple(options.get("missing") or self.missing)
        table = self._open(source, options)
        places = self.match(table, options.get("extra") or self.extra)
        self.space.validate(x.detach().cpu(), "x")
        values = x.detach().cpu().double().numpy()
        parquet = path is not None and path.suffix.lower() in (".parquet", ".pq")
        if isinstance(table, CsvTable) and to_file and not parquet:
            self._complete_csv(table, places, values, absent, path)
            return None
        pd = pandas_for("a DataFrame")
        if isinstance(table, FrameTable):
            frame = table.frame.copy()
        elif isinstance(table, ParquetTable):
            frame = pd.read_parquet(source.path)
        else:
            raise DataError(f"{source.name}: expected a DataFrame or an output file for a CSV source")
        start = 0
        gaps: dict[str, list[np.ndarray]] = {column.name: [] for column in self.modelled}
        for _, cells in table.chunks():
            for column in self.modelled:
                gaps[column.name].append(holes(column, cells[places[column.name]], absent))
            start += len(cells[0])
        _same_rows(source.name, start, values)
        for j, column in enumerate(self.modelled):
            gap = np.concatenate(gaps[column.name])
            if gap.any():
                place = places[column.name]
                old = frame.iloc[:, place]
                new = _series(pd, column, np.where(gap, values[:, j], np.nan)).set_axis(frame.index)
                frame.isetitem(place, cast(Any, old.astype(object).where(~gap, new).astype(old.dtype)))
        if not to_file:
            return frame
        if parquet:
            frame.to_parquet(path)
        else:
            frame.to_csv(sys.stdout if path is None else path, index=False)
        return None

    def _complete_csv(
        self, table: CsvTable, places: Mapping[str, int], values: np.ndarray, absent: Sequence[str], path: Path | None
    ) -> None:
        """Write the rows as they were spelled, with the missing cells filled."""
        dialect = table.file.dialect
        comma = dialect.decimal == ","
        textual = [False] * len(table.names)
        for column in self.columns:
            if column.name in places:
                textual[places[column.name]] = column.textual
        start = 0
        with creating(path) as file:
            writer = CsvWriter(file, dialect, textual)
            writer.header([str(label) for label in table.labels])
            for _, cells in table.chunks():
                stop = start + len(cells[0])
                out = [list(c.cells) for c in cells if isinstance(c, TextCells)]
                for j, column in enumerate(self.modelled):
                    place = places[column.name]
                    gap = holes(column, cells[place], absent)
                    here = values[start:stop, j]
                    if len(here) == len(gap):
                        filled = format_cells(column, here, "", comma)
                        out[place] = [new if hole else old for old, new, hole in zip(out[place], filled, gap)]
                writer.rows(zip(*out))
                start = stop
            _same_rows(table.name, start, values)

    # Description --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values, flat, in the order in which a person reads them."""
        out: dict[str, Any] = {"container": self.container}
        if self.container == "csv":
            out.update(asdict(self.dialect))
        out.update(missing=list(self.missing), extra=self.extra, columns=[c.to_dict() for c in self.columns])
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TableForm:
        """The inverse of :meth:`to_dict`."""
        rest = dict(values)
        dialect = Dialect(**{name: rest.pop(name) for name in _DIALECT if name in rest})
        columns = tuple(TableColumn(**column) for column in rest.pop("columns"))
        return cls(columns=columns, dialect=dialect, missing=tuple(rest.pop("missing", MISSING)), **rest)

    def describe(self) -> list[str]:
        """Lines for people."""
        lines = []
        if self.container == "csv":
            d = self.dialect
            header = "a header" if d.header else "no header"
            blanks = ", blanks after it" if d.blanks else ""
            comma = ", decimal comma" if d.decimal == "," else ""
            lines.append(f"CSV, delimiter {d.delimiter!r}{blanks}, {d.encoding}, {header}{comma}")
            lines.append("missing cells are spelled " + ", ".join(repr(s) for s in self.missing))
        else:
            lines.append({"parquet": "Parquet", "dataframe": "DataFrame"}[self.container])
        roles = f"{len(self.modelled)} modelled"
        roles += f", {len(self.given)} given" if self.given else ""
        aside = len(self.columns) - len(self.modelled) - len(self.given)
        roles += f", {aside} set aside" if aside else ""
        lines.append(f"{len(self.columns)} columns: {roles}")
        width = min(32, max(len(c.name) for c in self.columns))
        for column in self.columns:
            lines.append(f"  {column.name:<{width}}  {_describe_column(column)}")
        return lines


READ_OPTIONS = (*_DIALECT, "missing", "extra")
INFER_OPTIONS = (*READ_OPTIONS, "names", "columns", "given", "ignore", "keep", "allow_missing")


def _same_rows(name: str, rows: int, values: np.ndarray) -> None:
    if rows != len(values):
        raise DataError(f"{name}: expected {len(values)} rows as there are in x, got {rows}")


def _describe_column(column: TableColumn) -> str:
    if column.role == "ignore":
        return f"set aside: {column.note or 'as asked'}"
    about: list[str] = [column.kind]
    if column.coded:
        about.append(
            f"{len(column.categories or ())} levels ({', '.join((column.categories or ())[:4])}"
            + (", …)" if len(column.categories or ()) > 4 else ")")
        )
    elif column.dtype.startswith(("datetime", "timedelta")):
        about[0] = "date" if (column.resolution or 1) % DAY == 0 else "time"
        about.append(f"resolution {(column.resolution or 1) / SECOND:g} s")
    elif column.resolution is not None:
        about.append(f"resolution {column.resolution:g}")
    else:
        about.append("continuous: a density, no bits")
    if column.unit:
        about.append(f"in {column.unit}")
    if column.missing:
        about.append("missing cells")
    if column.role == "given":
        about.append("given")
    return ", ".join(about) + (f" [{column.note}]" if column.note else "")


def infer_table(source: Source, **options: Any) -> tuple[TableForm, list[str]]:
    """The form of a table, from one pass over its cells.

    Args:
        source: a CSV or Parquet file, or a DataFrame.
        options: see ``INFER_OPTIONS`` and docs/data.md.
    """
    check_names(options, INFER_OPTIONS, f"a table ({source.name})")
    options = {name: value for name, value in options.items() if value is not None}
    notes: list[str] = []
    dialect = Dialect()
    if source.kind == "csv":
        said = {name: options[name] for name in _DIALECT if name in options}
        dialect, notes = csvfile.detect(source.path, source.name, **said)
    table = open_table(source, dialect)
    labels = list(table.labels)
    names = unique_names(labels)
    if "names" in options:
        names = [str(name) for name in options["names"]]
        if len(names) != len(labels):
            raise DataError(f"names: expected {len(labels)} column names, got {len(names)}")
        labels = list(names)
    overrides = _overrides(names, options)
    absent = _as_list(options.get("missing"))
    summaries = [Summary(name, absent) for name in names]
    rows = 0
    for where, cells in table.chunks():
        for summary, chunk in zip(summaries, cells):
            summary.add(chunk, where)
        rows += len(cells[0])
    if rows < 2:
        raise DataError(f"{source.name}: expected at least 2 rows to learn from, got {rows}")
    allow = bool(options.get("allow_missing", False))
    columns = []
    spellings: Counter[str] = Counter()
    for summary, name, label in zip(summaries, names, labels):
        column = summary.conclude(overrides.get(name), allow)
        if label != name:
            column = replace(column, label=label)
        columns.append(column)
        if column.role != "ignore":
            spellings.update(summary.spelled)
            if not column.coded:
                spellings.update(summary.doubtful)
    found = [spelling for spelling, _ in spellings.most_common()]
    rest = MISSING if absent is None else absent
    missing = tuple(dict.fromkeys([*found, *rest]))
    columns = [replace(c, missing_as=None) if missing and c.missing_as == missing[0] else c for c in columns]
    container: Any = source.kind
    form = TableForm(tuple(columns), container, dialect, missing, options.get("extra", "refuse"))
    return form, notes


def _overrides(names: Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the user said of columns, by name, from ``columns``, ``given``, ``ignore`` and ``keep``."""
    accepted = {f.name for f in fields(TableColumn)} - {"name", "label"}
    out: dict[str, dict[str, Any]] = {}
    stated = options.get("columns") or {}
    if not isinstance(stated, Mapping):
        stated = {entry["name"]: {k: v for k, v in entry.items() if k != "name"} for entry in stated}
    for name, values in stated.items():
        _known(str(name), names, "columns")
        check_names(values, tuple(accepted), f"column {name!r}")
        out[str(name)] = dict(values)
    for option, role in (("keep", "model"), ("ignore", "ignore"), ("given", "given")):
        for name in _as_list(options.get(option)) or ():
            _known(str(name), names, option)
            out.setdefault(str(name), {})["role"] = role
    return out


def _known(name: str, names: Sequence[str], option: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
        hint = f"; is {near[0]!r} meant?" if near else ""
        raise DataError(f"{option}: expected the name of a column, got {name!r}{hint} (columns: {some(names, 20)})")


def _as_list(value: Any) -> list[str] | None:
    if value is None:
        return None
    return [str(value)] if isinstance(value, (str, int)) else [str(entry) for entry in value]


def unique_names(labels: Sequence[Any]) -> list[str]:
    """Names for labels: text, and a number added where one comes twice."""
    names: list[str] = []
    for label in labels:
        base = " ".join(map(str, label)) if isinstance(label, tuple) else str(label)
        base, name, count = base or "unnamed", base or "unnamed", 0
        while name in names:
            count += 1
            name = f"{base}.{count}"
        names.append(name)
    return names


def _counted(column: TableColumn) -> bool:
    return isinstance(column.label, int)


def _delimiter_hint(table: Labelled) -> str:
    if isinstance(table, CsvTable):
        dialect, _ = csvfile.detect(table.file.path, table.name)
        if dialect.delimiter != table.file.dialect.delimiter:
            return f"; the file looks delimited by {dialect.delimiter!r}: pass delimiter={dialect.delimiter!r}"
        if dialect.header != table.file.dialect.header:
            return f"; the file seems to have {'a' if dialect.header else 'no'} header: pass header={dialect.header}"
    return ""


def _plain(value: Any) -> Any:
    """JSON form of nested options."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def _digest(stamp: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:24]


# --------------------------------------------------------------------------------------------------------------
# Sources
# --------------------------------------------------------------------------------------------------------------


def open_table(source: Source, dialect: Dialect) -> TableSource:
    """The reader for a source that is a table."""
    if source.kind == "csv":
        return CsvTable(source, dialect)
    if source.kind == "parquet":
        return ParquetTable(source)
    if source.kind == "dataframe":
        return FrameTable(source)
    raise DataError(f"{source.name}: expected a table (CSV, Parquet or DataFrame), got {source.kind}")


class CsvTable:
    """A CSV file as a table."""

    def __init__(self, source: Source, dialect: Dialect) -> None:
        self.name = source.name
        self.file = CsvFile(source.path, source.name, dialect)
        header = self.file.header
        self.named = header is not None
        width = self.file.width
        self.labels: tuple[Any, ...] = tuple(header) if header else tuple(f"column_{j + 1}" for j in range(width))
        self.names = tuple(unique_names(self.labels))

    def chunks(self) -> Iterator[tuple[Where, list[Cells]]]:
        """Cells as spelled."""
        dialect = self.file.dialect
        number, comma = dialect.number(), dialect.decimal == ","
        for rows in self.file.chunks():
            columns: list[Cells] = [TextCells(cells, number, comma) for cells in zip(*rows.cells)]
            yield Where(self.name, rows.lines), columns


class FrameTable:
    """A DataFrame as a table."""

    def __init__(self, source: Source) -> None:
        self.name = source.name
        self.frame: pd.DataFrame = source.value
        if not len(self.frame.columns) or not len(self.frame):
            raise DataError(f"{source.name}: expected rows and columns, got shape {self.frame.shape}")
        self.labels: tuple[Any, ...] = tuple(_label(label) for label in self.frame.columns)
        self.names = tuple(unique_names(self.labels))
        self.named = self.labels != tuple(range(len(self.labels)))

    def chunks(self) -> Iterator[tuple[Where, list[Cells]]]:
        """All rows: they are in memory already."""
        where = Where(self.name)
        yield where, [series_cells(self.frame.iloc[:, j], name, where) for j, name in enumerate(self.names)]


class ParquetTable:
    """A Parquet file as a table, read a group of rows at a time."""

    def __init__(self, source: Source) -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError:
            raise needs("tables", f"{source.name}: a Parquet file") from None
        self.name = source.name
        self._path = source.path
        with parquet.ParquetFile(self._path) as file:
            schema = file.schema_arrow
            if not file.metadata.num_rows or not schema.names:
                raise DataError(f"{source.name}: expected rows, got none")
        # An index that pandas stored among the columns is not a column of the user's table.
        self._columns = [name for name in schema.names if not name.startswith("__index_level_")]
        self.labels: tuple[Any, ...] = tuple(self._columns)
        self.names = tuple(unique_names(self.labels))
        self.named = True

    def chunks(self) -> Iterator[tuple[Where, list[Cells]]]:
        """Cells by row group, with dtypes that do not depend on which cells are missing."""
        import pandas as pd
        import pyarrow as pa
        import pyarrow.parquet as parquet

        nullable: dict[Any, Any] = {
            pa.bool_(): pd.BooleanDtype(),
            **{
                getattr(pa, n)(): getattr(pd, f"{n[0].upper()}{n[1:]}Dtype")()
                for n in ("int8", "int16", "int32", "int64")
            },
            **{getattr(pa, n)(): getattr(pd, f"UI{n[2:]}Dtype")() for n in ("uint8", "uint16", "uint32", "uint64")},
        }
        start = 0
        with parquet.ParquetFile(self._path) as file:
            for batch in file.iter_batches(batch_size=_ROWS, columns=self._columns):
                frame = batch.to_pandas(types_mapper=nullable.get, ignore_metadata=True)
                where = Where(self.name, start=start)
                yield where, [series_cells(frame.iloc[:, j], n, where, files=True) for j, n in enumerate(self.names)]
                start += len(frame)


def embedded_frame(source: Source) -> Source:
    """One of scikit-learn's embedded sets as a DataFrame; classes by their names."""
    try:
        datasets: Any = importlib.import_module("sklearn.datasets")
    except ImportError:
        raise needs("sklearn", f"the embedded set {source.name!r}") from None
    pd = pandas_for(f"the embedded set {source.name!r}")
    bunch = getattr(datasets, f"load_{source.value}")()
    frame = pd.DataFrame(bunch.data, columns=list(bunch.feature_names))
    if hasattr(bunch, "target_names"):
        frame["class"] = pd.Categorical.from_codes(bunch.target, list(bunch.target_names))
    else:
        frame["target"] = bunch.target
    return Source("dataframe", frame, source.name)


def _label(label: Any) -> Any:
    if isinstance(label, tuple):
        return tuple(_label(part) for part in label)
    if isinstance(label, np.generic):
        label = label.item()
    return label if isinstance(label, (str, int, float)) else str(label)


def series_cells(series: pd.Series, name: str, where: Where, files: bool = False) -> Cells:
    """The cells of a pandas column.

    Args:
        files: name integer and Boolean dtypes as NumPy has them (Parquet keeps missing cells apart).
    """
    import pandas as pd
    from pandas.api import types

    dtype: Any = series.dtype
    if isinstance(dtype, pd.CategoricalDtype):
        keys = [category_key(value) for value in dtype.categories]
        found: list[str | None] = [None if code < 0 else keys[code] for code in series.cat.codes]
        kind = str(dtype.categories.dtype)
        return KeyCells(found, f"category:{kind}", tuple(keys), bool(dtype.ordered))
    title = str(dtype).lower() if files and str(dtype)[:3] in ("Int", "UIn") else str(dtype)
    if types.is_bool_dtype(dtype):
        absent = series.isna().to_numpy()
        truth = series.fillna(False).to_numpy(dtype=bool)
        title = "bool" if files else title
        return KeyCells([None if a else str(bool(t)) for a, t in zip(absent, truth)], title, ("False", "True"))
    if types.is_datetime64_any_dtype(dtype) or types.is_timedelta64_dtype(dtype):
        absent = series.isna().to_numpy()
        moments = series.dt.tz_convert("UTC").dt.tz_localize(None) if getattr(dtype, "tz", None) else series
        numpy_kind = "datetime64[us]" if types.is_datetime64_any_dtype(dtype) else "timedelta64[us]"
        micro = moments.to_numpy().astype(numpy_kind)
        exact = micro == moments.to_numpy()
        if not (exact | absent).all():
            index = int(np.flatnonzero(~(exact | absent))[0])
            raise DataError(f"{where.cell(index, name)}: expected whole microseconds, got {series.iloc[index]}")
        values = np.where(absent, np.nan, micro.astype(np.int64).astype(np.float64))
        return NumberCells(values, title)
    if types.is_complex_dtype(dtype):
        raise DataError(f"{where.name}, column {name!r}: expected real numbers, got dtype {dtype}")
    if types.is_numeric_dtype(dtype):
        values = series.to_numpy(dtype=np.float64, na_value=np.nan)
        return NumberCells(values, title, single=str(dtype).lower() in ("float32", "float16", "float"))
    values = series.to_numpy(dtype=object)
    absent = series.isna().to_numpy()
    return _object_cells(values, absent, title, name, where)


def _object_cells(values: np.ndarray, absent: np.ndarray, dtype: str, name: str, where: Where) -> Cells:
    """Cells of a column that holds Python objects: all text, all truth values, or all numbers."""
    present = values[~absent]
    kinds = {type(value) for value in present}
    if all(issubclass(kind, str) for kind in kinds):
        return KeyCells([None if a else v for a, v in zip(absent, values)], dtype)
    if all(issubclass(kind, (bool, np.bool_)) for kind in kinds):
        keys = [None if a else str(bool(v)) for a, v in zip(absent, values)]
        return KeyCells(keys, "object:bool", ("False", "True"))
    number = (int, float, np.integer, np.floating)
    if all(issubclass(kind, number) and not issubclass(kind, bool) for kind in kinds) or (
        {kind.__name__ for kind in kinds} <= {"Decimal"}
    ):
        whole = all(isinstance(v, (int, np.integer)) for v in present)
        numbers = np.array([math.nan if a else float(v) for a, v in zip(absent, values)])
        return NumberCells(numbers, "object:int" if whole else "object:float")
    usual = Counter(type(v) for v in present).most_common(1)[0][0]
    odd = [i for i, (a, v) in enumerate(zip(absent, values)) if not a and type(v) is not usual]
    index = odd[0] if odd else int(np.flatnonzero(~absent)[0])
    expected = f"values of one type ({usual.__name__})" if odd else "text, numbers or truth values"
    raise DataError(
        f"{where.cell(index, name)}: expected {expected}, got {values[index]!r} of type "
        f"{type(values[index]).__name__}; convert the column, e.g. with .astype(str)"
    )


def category_key(value: Any) -> str:
    """The spelling of a value of a pandas column as one of a column's categories."""
    if isinstance(value, (float, np.floating)):
        return spell(float(value))
    return str(value)


def _series(pd: Any, column: TableColumn, values: np.ndarray) -> Any:
    """A pandas column of the user's dtype."""
    absent = np.isnan(values)
    dtype = column.dtype
    if column.role == "ignore":
        return pd.Series([None] * len(values), dtype=object)
    if column.coded:
        categories = column.categories or ()
        if dtype.startswith("category:"):
            kept = _from_spelling(pd, categories, dtype.partition(":")[2])
            codes = np.where(absent, -1, values).astype(np.int64)
            return pd.Series(pd.Categorical.from_codes(codes, kept, ordered=column.kind == "ordinal"))
        kept = np.array(list(_from_spelling(pd, categories, dtype)), dtype=object)
        cells = np.array([None] * len(values), dtype=object)
        cells[~absent] = kept[values[~absent].astype(np.int64)]
        return _typed(pd, cells, absent, dtype)
    if column.dressed:
        cells = np.array(format_cells(column, values, ""), dtype=object)
        cells[absent] = None
        return _typed(pd, cells, absent, dtype)
    if dtype.startswith(("datetime", "timedelta")):
        kind = "datetime64[us]" if dtype.startswith("datetime") else "timedelta64[us]"
        micro = np.where(absent, np.datetime64("NaT").astype(np.int64), np.rint(np.where(absent, 0, values)))
        series = pd.Series(micro.astype(np.int64).view(kind))
        if "," in dtype:
            zone = dtype.partition(",")[2].strip(" ]")
            return series.dt.tz_localize("UTC").dt.tz_convert(zone).astype(dtype)
        return series.astype(dtype)
    if column.kind == "integer":
        cells = np.array([None if a else round(v) for a, v in zip(absent, values)], dtype=object)
        return _typed(pd, cells, absent, dtype)
    if column.decimals is not None and column.resolution is not None:
        values = np.round(values, column.decimals[1])
    return _typed(pd, values, absent, dtype)


def _from_spelling(pd: Any, categories: Sequence[str], dtype: str) -> Any:
    if dtype in ("bool", "boolean", "object:bool") or dtype.startswith("bool"):
        return [category.lower() == "true" for category in categories]
    kind = dtype.lower()
    if kind.startswith(("interval[int", "interval[uint", "interval[float")):
        number = float if kind.startswith("interval[float") else int
        ends = [tuple(number(end) for end in category[1:-1].split(",")) for category in categories]
        held = pd.api.types.pandas_dtype(dtype)
        return pd.IntervalIndex.from_tuples(ends, closed=held.closed, dtype=held)
    if re.match(r"u?int\d", kind) or kind == "object:int":
        return [int(float(category)) for category in categories]
    if kind.startswith(("float", "double")) or kind == "object:float":
        return [float(category) for category in categories]
    return list(categories)


def _typed(pd: Any, cells: np.ndarray, absent: np.ndarray, dtype: str) -> Any:
    """Cells as a Series of ``dtype``, or of the nearest dtype that can hold missing cells if there are some."""
    if dtype.startswith("object") or (dtype == "str" and int(pd.__version__.partition(".")[0]) < 3):
        return pd.Series(cells, dtype=object)
    if absent.any() and dtype.startswith(("int", "uint")):
        return pd.Series([math.nan if a else float(c) for a, c in zip(absent, cells)], dtype="float64")
    if absent.any() and dtype == "bool":
        return pd.Series(cells, dtype="boolean")
    if dtype.startswith("float"):
        return pd.Series([math.nan if a else float(c) for a, c in zip(absent, cells)], dtype=dtype)
    return pd.Series(cells, dtype=dtype)
