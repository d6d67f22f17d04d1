"""Errors in the user's data: where it stands, what was expected, what was found and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class DataError(ValueError):
    """Something in the user's data is at fault; the message names the file, the row, the column and the value."""


class SupplyError(ValueError):
    """A fault of whoever hands rows to be put together; it passes through this package as it is."""


def at(name: str, *, line: int | None = None, row: int | None = None, column: str | None = None) -> str:
    """The place of a fault as a user would look for it.

    >>> at("adult.csv", line=17, column="age")
    "adult.csv, line 17, column 'age'"

    Args:
        name: file, or name of the object handed over.
        line: line in the file, counted from 1.
        row: position of the row in an object, counted from 0.
        column: name of the column.
    """
    parts = [name]
    if line is not None:
        parts.append(f"line {line}")
    if row is not None:
        parts.append(f"row {row}")
    if column is not None:
        parts.append(f"column {column!r}")
    return ", ".join(parts)


def some(values: Iterable[object], limit: int = 8) -> str:
    """The first values, quoted, and how many more there are.

    >>> some(["a", "b", "c"], limit=2)
    "'a', 'b' and 1 more"
    """
    listed: Sequence[object] = list(values)
    shown = ", ".join(repr(str(value)) for value in listed[:limit])
    return shown + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def needs(extra: str, what: str) -> DataError:
    """The error for a reader whose library is not installed."""
    return DataError(f"{what} needs an optional part: pip install 'likely[{extra}]'")


def pandas_for(what: str) -> Any:
    """The library pandas.

    Raises:
        DataError: it is not installed, so ``what`` cannot be had.
    """
    try:
        import pandas
    except ImportError:
        raise needs("tables", what) from None
    return pandas


def check_names(given: Mapping[str, Any], accepted: Sequence[str], what: str) -> None:
    """Refuse an option that ``what`` does not have, with the nearest one that it has."""
    for name, value in given.items():
        if name not in accepted and value is not None:
            near = difflib.get_close_matches(name, accepted, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{what} has no option {name!r}{hint} (options: {', '.join(accepted)})")
