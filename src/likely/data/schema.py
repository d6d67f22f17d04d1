"""The schema: what the user's data is, found out once, kept with the model, and open to correction.

A :class:`Schema` has two faces.  Towards the model it has a ``space`` and a ``condition_space``, and turns new data
into a :class:`~likely.data.dataset.Dataset`; towards the user it turns tensors back into their own form: the same
columns, dtypes and spellings, the same array layout.
"""

from __future__ import annotations

import gzip
import lzma
import tomllib
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from likely.contract import Space
from likely.data import arrays, sequences, tables, toml
from likely.data.arrays import ArrayForm
from likely.data.dataset import Dataset
from likely.data.errors import DataError
from likely.data.sequences import SequenceForm
from likely.data.sources import Source, recognise
from likely.data.tables import TableForm

Form = TableForm | ArrayForm | SequenceForm

_FORMS: dict[str, type[Form]] = {form.form: form for form in (TableForm, ArrayForm, SequenceForm)}
_VERSION = 1
_TABLES = ("csv", "parquet", "dataframe")
_SEQUENCES = ("text", "lines", "fasta", "strings")


@dataclass(frozen=True)
class Schema:
    """What the user's data is, JSON-serialisable and editable as TOML.

    >>> import numpy as np
    >>> schema = infer_schema(np.array([[0, 1], [1, 1], [1, 0]]))
    >>> schema.space
    Binary(shape=(2,), missing=False)
    >>> data = schema.read(np.array([[1, 1]]))
    >>> schema.to_user(data.x)
    array([[1, 1]])

    Args:
        form: the user's form: a table, an array or sequences.
        notes: what inference has to say of the whole.
    """

    form: Form
    notes: tuple[str, ...] = ()

    @property
    def space(self) -> Space:
        """The space of an example."""
        return self.form.space

    @property
    def condition_space(self) -> Space | None:
        """The space of the condition, or None."""
        return self.form.condition_space

    def read(
        self,
        source: Any,
        *,
        format: str | None = None,
        cache: Path | str | None = None,
        memory_limit: int | None = None,
        **options: Any,
    ) -> Dataset:
        """Hold new data against the schema.

        Args:
            source: a path, ``"-"``, the name of an embedded set, or an object.
            format: kind of a file whose name does not say.
            cache: folder for the converted rows of data that passes ``memory_limit``, used again while the file and
                the schema stay the same; by default a temporary file that vanishes.
            memory_limit: bytes of examples held in memory; 1 GiB by default.
            options: how this file differs from the one that was fitted: see docs/data.md.

        Raises:
            DataError: naming file, line, column and value of the first cell that does not belong.
        """
        folder = None if cache is None else Path(cache)
        with reading(source, format) as found:
            return self.form.read(found, folder, memory_limit, **options)

    def to_user(self, x: Tensor, condition: Tensor | None = None) -> Any:
        """A batch as the user has it: a DataFrame, an array, a tensor or texts."""
        return self.form.to_user(x, condition)

    def write(self, x: Tensor, path: Path | str, condition: Tensor | None = None) -> None:
        """Write a batch as the user's own kind of file; ``"-"`` is standard output."""
        self.form.write(x, None if str(path) == "-" else Path(path), condition)

    def complete(
        self, source: Any, x: Tensor, path: Path | str | None = None, *, format: str | None = None, **options: Any
    ) -> Any:
        """The source itself with its missing cells filled from ``x``; all else stays as it is, to the letter.

        Columns that are not modelled (identifiers, surplus ones) stay too.

        Args:
            source: the data that ``x`` was read from.
            x: the batch with every cell filled, in the order of the source.
            path: where to write; ``"-"`` is standard output; None gives the object back (a CSV needs a path).
            options: as for :meth:`read`.
        """
        target = None if path is None or str(path) == "-" else Path(path)
        with reading(source, format) as found:
            return self.form.complete(found, x, target, path is not None, **options)

    def describe(self) -> str:
        """Some lines that say what was found, for people."""
        return "\n".join([*self.form.describe(), *(f"note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """A JSON-serialisable description; :meth:`from_json` is its inverse."""
        return {"version": _VERSION, "form": self.form.form, "notes": list(self.notes), **self.form.to_dict()}

    @classmethod
    def from_json(cls, description: Mapping[str, Any]) -> Schema:
        """Rebuild a schema from :meth:`to_json`."""
        values = dict(description)
        version = values.pop("version", _VERSION)
        if version != _VERSION:
            raise DataError(f"schema: expected version {_VERSION}, got {version}")
        name = values.pop("form", None)
        if name not in _FORMS:
            raise DataError(f"schema: expected form {' or '.join(map(repr, _FORMS))}, got {name!r}")
        notes = tuple(values.pop("notes", ()))
        try:
            return cls(_FORMS[name].from_dict(values), notes)
        except (TypeError, KeyError) as fault:
            raise DataError(f"schema: {fault}") from None

    def to_toml(self) -> str:
        """The schema as TOML, to be read and edited."""
        return toml.dumps(self.to_json())

    @classmethod
    def from_toml(cls, toml: str | Path) -> Schema:
        """Rebuild a schema from :meth:`to_toml`: TOML text, or the path of a file that holds it."""
        return cls.from_json(_corrections(toml))


def infer_schema(
    source: Any,
    *,
    schema: Mapping[str, Any] | Path | str | None = None,
    format: str | None = None,
    memory_limit: int | None = None,
    **options: Any,
) -> Schema:
    """Find out what the data is, in one pass over it.

    >>> import pandas as pd
    >>> frame = pd.DataFrame({"age": [31, 44, 27, 58], "town": ["Ulm", "Bonn", "Ulm", None]})
    >>> print(infer_schema(frame).describe())
    DataFrame
    2 columns: 2 modelled
      age   integer, resolution 1
      town  binary, 2 levels (Bonn, Ulm), missing cells

    Args:
        source: a path, ``"-"`` for standard input, the name of an embedded set of scikit-learn, or an object.
        schema: corrections, merged onto what is inferred: a TOML file, TOML text, or the same as nested dicts.
        format: kind of a file whose name does not say.
        memory_limit: bytes of examples held in memory; 1 GiB by default.
        options: see docs/data.md, for tables: ``given``, ``ignore``, ``keep``, ``columns``, ``missing``,
            ``delimiter``, ``header``, …; for arrays: ``space``, ``levels``, ``layout``, ``binarise``, ``given``, …
    """
    said = _corrections(schema)
    stated_form = said.pop("form", None)
    for name in ("notes", "version"):
        said.pop(name, None)
    merged = {**said, **{name: value for name, value in options.items() if value is not None and value != []}}
    if "columns" in said and "columns" in options:
        merged["columns"] = _merge_columns(said["columns"], options["columns"])
    form: Form
    with reading(source, format) as found:
        if found.kind in _TABLES:
            merged.pop("container", None)
            form, remarks = tables.infer_table(found, **merged)
        elif found.kind in _SEQUENCES:
            form, remarks = sequences.infer_sequences(found, **merged)
        else:
            form, remarks = arrays.infer_array(found, limit=memory_limit, **merged)
    if stated_form is not None and stated_form != form.form:
        raise DataError(f"schema: is for a {stated_form}, but {found.name} is a {form.form}")
    return Schema(form, tuple(remarks))


def _source(source: Any, format: str | None) -> Source:
    found = recognise(source, format)
    if found.kind == "embedded" and found.value != "digits":
        return tables.embedded_frame(found)
    return found


@contextmanager
def reading(data: Any, format: str | None) -> Iterator[Source]:
    """The source, recognised; within the context a file that is cut off or altered is a fault of the data."""
    source = _source(data, format)
    try:
        yield source
    except DataError:
        raise
    except Exception as fault:
        known = isinstance(fault, (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, zipfile.BadZipFile))
        library = type(fault).__module__.partition(".")[0] in ("zstandard", "pyarrow")
        if known or library or str(fault) == "Invalid data stream":  # the last is bz2's
            raise DataError(f"{source.name}: damaged or cut off ({fault}); fetch the file again") from None
        raise


def _corrections(schema: Mapping[str, Any] | Path | str | None) -> dict[str, Any]:
    if schema is None:
        return {}
    if isinstance(schema, Mapping):
        return dict(schema)
    if isinstance(schema, str) and ("\n" in schema or "=" in schema):
        return _parse(schema, "schema")
    path = Path(schema)
    try:
        return _parse(path.read_text(encoding="utf-8"), str(schema))
    except OSError as fault:
        raise DataError(f"schema: {schema}: {fault.strerror}") from None


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as fault:
        raise DataError(f"{name}: not TOML: {fault}") from None


def _merge_columns(first: Any, second: Any) -> dict[str, dict[str, Any]]:
    out: dict[str, dict[str, Any]] = {}
    for columns in (first, second):
        entries = columns.items() if isinstance(columns, Mapping) else ((c["name"], c) for c in columns)
        for name, values in entries:
            out.setdefault(name, {}).update({k: v for k, v in values.items() if k != "name"})
    return out
