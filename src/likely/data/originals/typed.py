"""Typed cells of one column: what a model sees of them, what its values stand for, and the bits that remain.

A column is held in one of two ways: an array of cells of fixed size (numbers, truth values, moments, fixed-length
text), or a list of Python objects.  Nothing is unpickled: objects are of the sorts listed in :func:`put_objects`.
"""

from __future__ import annotations

import datetime
import importlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import numpy as np

from likely.data.columns import Cells, Encoder, KeyCells, NumberCells, TableColumn, TextCells
from likely.data.columns import spell as spell_number
from likely.data.errors import DataError
from likely.data.originals.original import bits_differ
from likely.data.originals.side import Reader, Writer, damaged
from likely.data.originals.spelling import on_grid, snap

_DEEPEST = 8


def read_cells(column: TableColumn, cells: Cells, absent: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Values (NaN is missing) and which of them the schema allows; the others are 0."""
    encoder = Encoder(column, absent)
    n = len(cells)
    if isinstance(cells, NumberCells) and not column.coded:
        values = np.asarray(cells.values, dtype=np.float64)
    elif isinstance(cells, NumberCells):
        unique, inverse = np.unique(cells.values, return_inverse=True)
        codes = [encoder.code(None if math.isnan(v) else _spelling(float(v))) for v in unique]
        values = np.array([math.inf if code is None else code for code in codes], dtype=np.float64)[inverse]
    else:
        keys: Sequence[str | None] = cells.cells if isinstance(cells, TextCells) else cells.keys
        found = {key: encoder.code(key) if column.coded else math.nan if key is None else None for key in set(keys)}
        known = {key: math.inf if code is None else code for key, code in found.items()}
        values = np.fromiter(map(known.__getitem__, keys), np.float64, n)
    missing = np.isnan(values)
    allowed = np.where(missing, column.missing, on_grid(column, values))
    return snap(column, np.where(allowed, values, 0.0)), allowed


def usual(column: TableColumn, values: np.ndarray, allowed: np.ndarray) -> tuple[float, float]:
    """The placeholder of a cell that cannot be coded, and the most usual value."""
    present = values[allowed & ~np.isnan(values)][: 1 << 16]
    most = 0.0
    if len(present):
        unique, counts = np.unique(present, return_counts=True)
        most = float(unique[counts.argmax()])
    return (math.nan if column.missing else most), most


def _spelling(value: float) -> str:
    return spell_number(value) if math.isfinite(value) else str(value)


# Fixed size -------------------------------------------------------------------------------------------------------


def fixed_from(column: TableColumn, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The cells that values stand for, of a dtype of fixed size; missing ones as that dtype has them, else 0."""
    absent = np.isnan(values)
    if column.coded:
        table = _category_cells(column, dtype)
        codes = np.where(absent, 0, values).astype(np.int64)
        if len(codes) and (codes.min() < 0 or codes.max() >= len(table)):
            raise DataError(f"column {column.name!r}: expected codes of its categories")
        out = table[codes]
    else:
        numbers = np.where(absent, 0.0, snap(column, values))
        if dtype.kind in "mM":
            per_second = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}.get(np.datetime_data(dtype)[0], 0)
            whole = _whole(numbers, np.dtype(np.int64))
            ticks = whole * (per_second // 10**6) if per_second >= 10**6 else whole // (10**6 // max(per_second, 1))
            out = ticks.astype(np.int64).view(dtype)
        elif dtype.kind in "iu":
            out = _whole(numbers, dtype)
        elif dtype.kind == "b":
            out = numbers != 0
        elif dtype.kind in "fc":
            with np.errstate(over="ignore"):
                out = numbers.astype(dtype)
        else:
            out = np.zeros(len(values), dtype)
    if absent.any():
        out = out.copy()
        if dtype.kind in "mM":
            out[absent] = np.array("NaT", dtype)
        else:
            out[absent] = np.nan if dtype.kind in "fc" else np.zeros(1, dtype)[0]
    return out


def _whole(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    limits = np.iinfo(dtype)
    fits = (values >= float(limits.min)) & (values < float(limits.max))
    return np.where(fits, np.rint(values), 0.0).astype(dtype)


def _category_cells(column: TableColumn, dtype: np.dtype) -> np.ndarray:
    """Each category as a cell; 0 or empty where it is none of that dtype."""
    cells = np.zeros(len(column.categories or ()), dtype)
    for code, category in enumerate(column.categories or ()):
        try:
            if dtype.kind == "b":
                cells[code] = category.lower() in ("true", "1", "1.0")
            elif dtype.kind in "iu":
                cells[code] = int(float(category))
            elif dtype.kind == "f":
                cells[code] = float(category)
            elif dtype.kind in "US":
                cells[code] = category
        except (ValueError, OverflowError):
            continue
    return cells


def put_fixed(out: Writer, cells: np.ndarray, expected: np.ndarray | None, also: np.ndarray | None = None) -> None:
    """The cells where they differ from those expected in at least a bit, and those in ``also``; all if None is."""
    if expected is None:
        out.items(cells)
        return
    wrong = bits_differ(cells.reshape(-1), expected.reshape(-1))
    if also is not None:
        wrong |= also.reshape(-1)
    places = np.flatnonzero(wrong)
    out.places(places, wrong.size)
    out.items(cells.reshape(-1)[places])


def get_fixed(reader: Reader, n: int, dtype: np.dtype, expected: np.ndarray | None) -> np.ndarray:
    """The inverse of :func:`put_fixed`, of shape ``(n,)`` or that of ``expected``."""
    if expected is None:
        return reader.items(n, dtype)
    out = np.ascontiguousarray(expected).reshape(-1).copy()
    places = reader.places(out.size)
    out[places] = reader.items(len(places), dtype)
    return out.reshape(expected.shape)


# Objects ----------------------------------------------------------------------------------------------------------

_NONE, _TRUE, _FALSE, _NAN, _NA, _NAT, _INT, _FLOAT, _STR, _BYTES = range(10)
_DECIMAL, _DATE, _DATETIME, _TIMESTAMP, _TIMEDELTA, _TUPLE, _INTERVAL, _NUMPY = range(10, 18)
_CLOSED = ("left", "right", "both", "neither")


def _sort(value: Any, what: str) -> int:
    """Which sort of object a value is."""
    kind, name = type(value), type(value).__name__
    if value is None:
        return _NONE
    if kind is str:
        return _STR
    if kind is bool:
        return _TRUE if value else _FALSE
    if kind is float:
        return _FLOAT
    sorts: dict[type, int] = {int: _INT, bytes: _BYTES, Decimal: _DECIMAL, datetime.date: _DATE, tuple: _TUPLE}
    if kind in sorts:
        return sorts[kind]
    if kind is datetime.datetime and value.tzinfo is None and value.fold == 0:
        return _DATETIME
    library = kind.__module__.partition(".")[0]
    if library == "pandas":
        if name == "NAType":
            return _NA
        if name == "NaTType":
            return _NAT
        if name == "Interval":
            return _INTERVAL
        if name in ("Timestamp", "Timedelta") and getattr(value, "tzinfo", None) is None:
            return _TIMESTAMP if name == "Timestamp" else _TIMEDELTA
    if isinstance(value, np.generic) and value.dtype.kind in "biufcmMUS":
        return _NUMPY
    raise DataError(f"{what}: cannot keep values of type {kind.__module__}.{name}, got {value!r}; leave the column out")


def put_objects(out: Writer, values: Sequence[Any], what: str) -> None:
    """Python objects of these sorts: None, bool, int, float, str, bytes, Decimal, date, datetime, tuples of such,
    NumPy scalars, and pandas' NA, NaT, Timestamp, Timedelta (without a zone) and Interval.

    Args:
        what: the column, for the message that names another sort.
    """
    sorts = np.array([_sort(value, what) for value in values], dtype=np.uint8)
    out.numbers(sorts)
    for sort in np.unique(sorts).tolist():
        chosen = [values[place] for place in np.flatnonzero(sorts == sort).tolist()]
        if sort == _STR:
            out.texts(chosen)
        elif sort in (_INT, _DECIMAL):
            out.texts(list(map(str, chosen)))
        elif sort in (_DATE, _DATETIME):
            out.texts([value.isoformat() for value in chosen])
        elif sort == _FLOAT:
            out.items(np.array(chosen, dtype="<f8"))
        elif sort == _BYTES:
            out.numbers(np.array(list(map(len, chosen)), np.uint64))
            out.raw(b"".join(chosen))
        elif sort in (_TIMESTAMP, _TIMEDELTA):
            out.texts([value.unit for value in chosen])
            out.signed(np.array([_ticks(value) for value in chosen], np.int64))
        elif sort == _TUPLE:
            out.numbers(np.array(list(map(len, chosen)), np.uint64))
            put_objects(out, [part for value in chosen for part in value], what)
        elif sort == _INTERVAL:
            out.texts([value.closed for value in chosen])
            put_objects(out, [side for value in chosen for side in (value.left, value.right)], what)
        elif sort == _NUMPY:
            out.texts([value.dtype.str for value in chosen])
            for value in chosen:
                out.raw(value.tobytes())


def _ticks(value: Any) -> int:
    return int(value.asm8.astype(np.int64))


def get_objects(reader: Reader, n: int, depth: int = 0) -> list[Any]:
    """The inverse of :func:`put_objects`."""
    if depth > _DEEPEST:
        raise damaged("objects within objects, too deep")
    sorts = reader.numbers(n, _NUMPY).astype(np.uint8)
    out: list[Any] = [None] * n
    for sort in np.unique(sorts).tolist():
        places = np.flatnonzero(sorts == sort).tolist()
        for place, value in zip(places, _get_sort(reader, sort, len(places), depth)):
            out[place] = value
    return out


def _get_sort(reader: Reader, sort: int, n: int, depth: int) -> Sequence[Any]:
    makers: dict[int, Callable[[str], Any]] = {
        _STR: str,
        _INT: int,
        _DECIMAL: Decimal,
        _DATE: datetime.date.fromisoformat,
        _DATETIME: datetime.datetime.fromisoformat,
    }
    try:
        if sort in makers:
            return list(map(makers[sort], reader.texts(n)))
        if sort in (_NONE, _TRUE, _FALSE):
            return [{_NONE: None, _TRUE: True, _FALSE: False}[sort]] * n
        if sort == _FLOAT:
            return reader.items(n, np.dtype("<f8")).tolist()
        if sort == _BYTES:
            return [reader.raw(size) for size in reader.numbers(n).tolist()]
        if sort == _TUPLE:
            sizes = reader.numbers(n, 1 << 16).tolist()
            total = sum(sizes)
            if total > max(reader.left, 1 << 16):
                raise damaged("it ends early")
            parts = iter(get_objects(reader, total, depth + 1))
            return [tuple(next(parts) for _ in range(size)) for size in sizes]
        if sort == _NUMPY:
            kinds = [np.dtype(text) for text in reader.texts(n)]
            if any(kind.kind not in "biufcmMUS" for kind in kinds):
                raise damaged("expected NumPy scalars")
            return [np.frombuffer(reader.raw(kind.itemsize), kind)[0] for kind in kinds]
        pd: Any = importlib.import_module("pandas")
        if sort in (_NA, _NAT):
            return [pd.NA if sort == _NA else pd.NaT] * n
        if sort in (_TIMESTAMP, _TIMEDELTA):
            units, make = reader.texts(n), pd.Timestamp if sort == _TIMESTAMP else pd.Timedelta
            return [make(int(t), unit=u).as_unit(u) for t, u in zip(reader.signed(n).tolist(), units)]
        if sort == _INTERVAL:
            closed = reader.texts(n)
            if not set(closed) <= set(_CLOSED):
                raise damaged("expected intervals")
            ends = get_objects(reader, 2 * n, depth + 1)
            return [pd.Interval(ends[2 * i], ends[2 * i + 1], closed=c) for i, c in enumerate(closed)]
    except (ValueError, TypeError, ArithmeticError) as fault:
        if isinstance(fault, DataError):
            raise
        raise damaged(f"not an object: {fault}") from None
    raise damaged("expected a sort of object")


def same_object(a: Any, b: Any) -> bool:
    """Whether two objects are of one type and equal, NaN being equal to itself."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, (float, np.generic)):
        return np.asarray(a).tobytes() == np.asarray(b).tobytes()
    if isinstance(a, Decimal):
        return str(a) == str(b)
    return bool(a == b)


def put_objects_beside(out: Writer, values: Sequence[Any], expected: Sequence[Any] | None, what: str) -> None:
    """The objects where they are not those expected; all if None is."""
    if expected is None:
        put_objects(out, values, what)
        return
    places = [place for place, (a, b) in enumerate(zip(values, expected)) if not same_object(a, b)]
    out.places(np.array(places, dtype=np.int64), len(values))
    put_objects(out, [values[place] for place in places], what)


def get_objects_beside(reader: Reader, n: int, expected: Sequence[Any] | None) -> list[Any]:
    """The inverse of :func:`put_objects_beside`."""
    if expected is None:
        return get_objects(reader, n)
    out = list(expected)
    places = reader.places(n).tolist()
    for place, value in zip(places, get_objects(reader, len(places))):
        out[place] = value
    return out


def words_of(column: TableColumn, objects: Sequence[Any], values: np.ndarray) -> list[Any]:
    """The usual object of each category, and at the end that of a missing cell."""
    often: dict[int, Counter[Any]] = {}
    levels = len(column.categories or ()) if column.coded else 0
    codes = np.where(np.isnan(values), levels, values if column.coded else -1).astype(np.int64)
    examples: dict[tuple[int, str], Any] = {}
    for value, code in zip(objects, codes.tolist()):
        if code >= 0:
            key = f"{type(value).__name__} {value!r}"
            often.setdefault(code, Counter())[key] += 1
            examples.setdefault((code, key), value)
    words: list[Any] = [*(column.categories or ())[:levels], None]
    for code, counts in often.items():
        words[code] = examples[code, counts.most_common(1)[0][0]]
    return words


def cells_of_keys(values: np.ndarray) -> Cells:
    """An array of labels as the cells of a column."""
    if values.dtype.kind in "iuf":
        return NumberCells(values.astype(np.float64), values.dtype.name, values.dtype.itemsize <= 4)
    return KeyCells([str(value) for value in values.tolist()], "bool" if values.dtype == bool else "str")
