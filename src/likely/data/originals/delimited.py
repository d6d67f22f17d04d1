"""CSV files: every byte comes back.

A record is cut at its delimiters.  Cells that the columns' usual spelling gives back from the value need nothing; the
others are kept as they stand, column by column, as are the columns that no model sees.  A record with another number of
cells is kept as a line.
"""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from likely.data.csvfile import LONGEST_CELL, Dialect
from likely.data.errors import DataError, check_names
from likely.data.originals.encoded import decode, encode, known_encoding
from likely.data.originals.original import (
    Legal,
    Original,
    Part,
    RestoredFile,
    Rows,
    blake2b,
    intact,
    matrix,
    settle,
    whole,
)
from likely.data.originals.side import Reader, Writer, damaged
from likely.data.originals.spelling import Speller, Spelling, undress
from likely.data.sources import Source, compression, open_bytes
from likely.data.tables import READ_OPTIONS, CsvTable, Labelled, TableForm, unique_names

_LINE_END = re.compile(r"\r\n|\r|\n")
_SAMPLE = ((16, 512), (32, 2048))  # stretches and rows in each: for numbers and dress; for categories
_LINES, _ENDS, _BETWEEN, _FIRST = range(4)  # sections of side information; from _FIRST on three for each column
_TEXTS, _CELLS, _STYLED = range(3)


class CsvOriginal(Original):
    """A CSV file.

    Args:
        form: what the schema says of the table.
        source: the file.
        options: how it differs from the one that was fitted.
    """

    def __init__(self, form: TableForm, source: Source, options: Mapping[str, Any]) -> None:
        check_names(options, READ_OPTIONS, "reading a table")
        self._form = form
        asked = form.dialect_of(source, options)
        with open_bytes(source.path) as file:
            content = file.read()
        mark, encoding, self._text, rest = decode(content, asked.encoding)
        self._dialect = dialect = replace(asked, encoding=encoding)
        self._begin, self._stop, self._next = _find_records(self._text, dialect)
        digest, size = blake2b(content), len(content)
        del content
        if not len(self._stop):
            raise DataError(f"{source.name}: expected rows, got an empty file")
        first = _cut(self._text[self._begin[0] : self._stop[0]], dialect)
        self._width = width = len(first)
        header = dialect.header
        table = _names(source, asked, first)
        places = form.match(table, options.get("extra") or form.extra)
        start = int(self._next[0]) if header else int(self._begin[0])
        if header:
            self._begin, self._stop, self._next = self._begin[1:], self._stop[1:], self._next[1:]
        n = len(self._stop)
        last = int(self._next[-1]) if n else start
        self._start = start
        ends = Counter(self._end(row) for row in range(min(n, 1000)))
        self._newline = ends.most_common(1)[0][0] if n > 1 else dialect.newline
        self._open = n > 0 and self._end(n - 1) == ""
        absent = tuple(options.get("missing") or form.missing)
        wanted = {places[column.name]: i for i, column in enumerate([*form.modelled, *form.given])}
        columns = [*form.modelled, *form.given]
        self._wanted = [wanted.get(place) for place in range(width)]
        self._spellers = [Speller(None if i is None else columns[i], dialect, absent) for i in self._wanted]
        self._study()
        facts = {
            "mark": mark.hex(),
            "rest": rest.hex(),
            "dialect": {
                "delimiter": dialect.delimiter,
                "encoding": encoding,
                "decimal": dialect.decimal,
                "strip_suffix": dialect.strip_suffix,
                "newline": self._newline,
            },
            "absent": None if absent == form.missing else list(absent),
            "open": self._open,
            "start": self._text[:start],
            "end": self._text[last:],
            "columns": [{"is": i, **speller.spelling.to_dict()} for i, speller in zip(self._wanted, self._spellers)],
        }
        super().__init__("csv", "bytes", n, size, digest, facts, compression(source.path))

    # Records ------------------------------------------------------------------------------------------------------

    def _end(self, row: int) -> str:
        return self._text[self._stop[row] : self._next[row]]

    def _records(self, start: int, stop: int) -> list[str]:
        slices = map(slice, self._begin[start:stop].tolist(), self._stop[start:stop].tolist())
        return list(map(self._text.__getitem__, slices))

    def _cut(self, records: Sequence[str]) -> tuple[np.ndarray, list[list[str]]]:
        """The places of the records that have as many cells as the file has columns, and their cells by column."""
        delimiter, width = self._dialect.delimiter, self._width
        if delimiter != " " and set(map(str.count, records, itertools.repeat(delimiter))) == {width - 1}:
            cells = delimiter.join(records).split(delimiter)
            return np.arange(len(records)), [cells[place::width] for place in range(width)]
        rows = [_cut(record, self._dialect, width) for record in records]
        regular = np.array([row for row, cells in enumerate(rows) if len(cells) == width], dtype=np.int64)
        chosen = [rows[row] for row in regular.tolist()]
        return regular, [list(cells) for cells in zip(*chosen)] if chosen else [[]] * width

    def _study(self) -> None:
        """Learn the usual spelling of each column from stretches of rows all over the file."""
        for (stretches, size), coded in zip(_SAMPLE, (False, True)):
            counts: list[Counter[str]] = [Counter() for _ in self._spellers]
            chosen = [place for place, speller in enumerate(self._spellers) if speller.coded == coded]
            for start in _starts(len(self._stop), stretches, size) if chosen else ():
                columns = self._cut(self._records(start, start + size))[1]
                for place in chosen:
                    counts[place].update(columns[place])
            for place in chosen:
                self._spellers[place].study(counts[place])

    # Rows ---------------------------------------------------------------------------------------------------------

    def _rows(self, start: int, stop: int, legal: Legal | None) -> Rows:
        n, wide = stop - start, len(self._form.modelled)
        records = self._records(start, stop)
        regular, columns = self._cut(records)
        values = np.empty((n, wide + len(self._form.given)))
        kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for place, (speller, i) in enumerate(zip(self._spellers, self._wanted)):
            if i is None:
                continue
            values[:, i] = speller.placeholder
            values[regular, i], rows, styles = speller.read(columns[place])
            kept[place] = rows, styles
        x = torch.from_numpy(values[:, :wide].copy())
        condition = torch.from_numpy(values[:, wide:].copy()) if self._form.given else None
        if legal is not None:
            by_place = {i: speller for speller, i in zip(self._spellers, self._wanted) if i is not None}
            chosen = [by_place[i] for i in range(wide)]
            fallbacks = [[s.placeholder for s in chosen], [s.usual for s in chosen], [0.0] * wide]
            refused = settle(x, legal, map(np.array, fallbacks))[regular]
            for place, i in enumerate(self._wanted):
                if i is not None and i < wide and refused[:, i].any():
                    rows, styles = kept[place]
                    also = np.flatnonzero(refused[:, i])
                    all_ = np.concatenate([also, rows[~refused[rows, i]]])
                    order = np.argsort(all_)
                    with_style = np.concatenate([np.full(len(also), -1), styles[~refused[rows, i]]])
                    kept[place] = all_[order], with_style[order]
        return Rows(x, condition, self._side(start, stop, records, regular, columns, kept))

    def _side(
        self,
        start: int,
        stop: int,
        records: Sequence[str],
        regular: np.ndarray,
        columns: Sequence[Sequence[str]],
        kept: Mapping[int, tuple[np.ndarray, np.ndarray]],
    ) -> bytes:
        n = stop - start
        out = Writer()
        if len(regular) < n:
            lines = np.setdiff1d(np.arange(n), regular)
            _texts_at(out, _LINES, lines, n, [records[row] for row in lines.tolist()])
        follow = self._next[start:stop]
        ends = list(map(self._text.__getitem__, map(slice, self._stop[start:stop].tolist(), follow.tolist())))
        odd = [row for row, end in enumerate(ends) if end != self._newline]
        if odd and self._open and stop == self.n:
            odd = [row for row in odd if row < n - 1]  # the last row has no end, as the facts say
        if odd:
            _texts_at(out, _ENDS, np.array(odd), n, [ends[row] for row in odd])
        before = np.concatenate([[self._start if start == 0 else self._next[start - 1]], follow[:-1]])[:n]
        between = np.flatnonzero(before != self._begin[start:stop])
        if len(between):
            texts = [self._text[before[row] : self._begin[start + row]] for row in between.tolist()]
            _texts_at(out, _BETWEEN, between, n, texts)
        for place, (speller, cells) in enumerate(zip(self._spellers, columns)):
            tag = _FIRST + 3 * place
            if place not in kept:
                if not cells:
                    continue
                texts = [undress(cell)[0] for cell in cells]
                out.number(tag + _TEXTS)
                out.texts(texts)
                shown = speller.dress(texts)
                rows = np.array([row for row, cell in enumerate(cells) if cell != shown[row]], dtype=np.int64)
                styles = np.full(len(rows), -1)
            else:
                rows, styles = kept[place]
            raw = rows[styles < 0]
            if len(raw):
                _texts_at(out, tag + _CELLS, raw, len(regular), [cells[row] for row in raw.tolist()])
            if len(raw) < len(rows):
                out.number(tag + _STYLED)
                out.places(rows[styles >= 0], len(regular))
                out.numbers(styles[styles >= 0])
        return out.content()


def _texts_at(out: Writer, tag: int, places: np.ndarray, n: int, texts: Sequence[str]) -> None:
    out.number(tag)
    out.places(places, n)
    out.texts(texts)


def restore_csv(
    form: TableForm,
    facts: Mapping[str, Any],
    parts: Iterable[Part],
    first: int = 0,
    keep: tuple[int, int] | None = None,
) -> RestoredFile:
    """Put a CSV file together again.

    Args:
        form: what the schema says of the table.
        facts: of the whole file.
        parts: consecutive rows.
        first: number of the first row of the first part.
        keep: numbers of the rows to give, from … to before …; None for all.
    """
    with intact("head"):
        return RestoredFile("csv", _pieces(_Recipe.of(form, facts), parts, first, keep))


@dataclass(frozen=True)
class _Recipe:
    """The facts of a file, checked."""

    form: TableForm
    n: int
    size: int
    mark: bytes
    rest: bytes
    dialect: Dialect
    open: bool
    start: str
    end: str
    wanted: list[int | None]
    spellers: list[Speller]

    @classmethod
    def of(cls, form: TableForm, facts: Mapping[str, Any]) -> _Recipe:
        said: Any = {str(name): str(value) for name, value in facts["dialect"].items()}
        dialect = replace(form.dialect, **said)
        if not known_encoding(dialect.encoding):
            raise DataError(f"head is damaged: expected an encoding, got {dialect.encoding!r}")
        if not _LINE_END.fullmatch(dialect.newline):
            raise DataError(f"head is damaged: expected the end of a line, got {dialect.newline!r}")
        columns = [*form.modelled, *form.given]
        entries = [dict(entry) for entry in facts["columns"]]
        wanted = [entry.pop("is") for entry in entries]
        if sorted(i for i in wanted if i is not None) != list(range(len(columns))):
            raise DataError("head is damaged: expected every column of the schema once")
        absent = form.missing if facts["absent"] is None else tuple(map(str, facts["absent"]))
        spellings = [Spelling.from_dict(entry) for entry in entries]
        spellers = [Speller(None if i is None else columns[i], dialect, absent, s) for i, s in zip(wanted, spellings)]
        mark, rest = bytes.fromhex(facts["mark"]), bytes.fromhex(facts["rest"])
        start, end = str(facts["start"]), str(facts["end"])
        n, size = whole(facts["n"]), whole(facts["size"])
        return cls(form, n, size, mark, rest, dialect, bool(facts["open"]), start, end, wanted, spellers)


def _pieces(recipe: _Recipe, parts: Iterable[Part], first: int, keep: tuple[int, int] | None = None) -> Iterator[bytes]:
    """The bytes of the file, no more than it had."""
    left = recipe.size
    encoded = (encode(text, recipe.dialect.encoding) for text in _texts(recipe, parts, first, keep))
    for piece in itertools.chain([recipe.mark], encoded, [recipe.rest]):
        left -= len(piece)
        if left < 0:
            raise damaged(f"more than the {recipe.size} bytes of the original")
        yield piece


def _texts(recipe: _Recipe, parts: Iterable[Part], row: int, keep: tuple[int, int] | None = None) -> Iterator[str]:
    """The text of the header, of each part, and of what follows the last row."""
    wide, given = len(recipe.form.modelled), len(recipe.form.given)
    yield recipe.start
    for x, condition, side in parts:
        values = matrix(x, wide, "x")
        if given:
            values = np.concatenate([values, matrix(condition, given, "condition")], axis=1)
        row += len(values)
        if row > recipe.n:
            raise damaged(f"more than the {recipe.n} rows of the original")
        with intact("side information"):
            lines = _join(recipe, values, side, recipe.open and row == recipe.n)
        start = row - len(values)
        yield "".join(lines if keep is None else lines[max(keep[0] - start, 0) : max(keep[1] - start, 0)])
    if row == recipe.n:
        yield recipe.end


def _join(recipe: _Recipe, values: np.ndarray, side: bytes, last: bool) -> list[str]:
    """The text of each of some rows, ends of lines included."""
    n, width = len(values), len(recipe.spellers)
    reader = Reader(side, recipe.size)
    found, pending = -1, False

    def section(wanted: int) -> bool:
        """Whether the section comes next; they come in the order of their numbers."""
        nonlocal found, pending
        if not pending and not reader.done:
            before, found = found, reader.number(_FIRST + 3 * width - 1)
            pending = True
            if found <= before:
                raise damaged("its sections are out of order")
        if pending and found < wanted:
            raise damaged("it has a section that has no place here")
        here = pending and found == wanted
        pending = pending and not here
        return here

    def texts_at(wanted: int, most: int) -> tuple[list[int], list[str]]:
        if not section(wanted):
            return [], []
        places = reader.places(most)
        return places.tolist(), reader.texts(len(places))

    odd, lines = texts_at(_LINES, n)
    ended, ends = texts_at(_ENDS, n)
    parted, between = texts_at(_BETWEEN, n)
    regular = np.setdiff1d(np.arange(n), np.array(odd, dtype=np.int64)) if odd else slice(None)
    columns: list[list[str]] = []
    for place, (speller, i) in enumerate(zip(recipe.spellers, recipe.wanted)):
        base = _FIRST + 3 * place
        if i is None:
            if n > len(odd) and not section(base + _TEXTS):
                raise damaged(f"the cells of column {place + 1} are not there")
            here, cells = np.empty(0), speller.dress(reader.texts(n - len(odd)))
        else:
            here = values[regular, i]
            cells = speller.write(here)
        raw, texts = texts_at(base + _CELLS, len(cells))
        for row, text in zip(raw, texts):
            cells[row] = text
        if i is not None and section(base + _STYLED):
            rows = reader.places(len(cells))
            styles = reader.numbers(len(rows), len(speller.spelling.styles) - 1).astype(np.int64)
            for row, text in zip(rows.tolist(), speller.write_styled(here[rows], styles)):
                cells[row] = text
        columns.append(cells)
    if pending or not reader.done:
        raise damaged("it goes on behind its end")
    records = list(map(recipe.dialect.delimiter.join, zip(*columns)))
    if odd:
        by_row = dict(zip(odd, lines))
        rest = iter(records)
        records = [by_row[row] if row in by_row else next(rest) for row in range(n)]
    newline = recipe.dialect.newline
    after = [newline] * n
    if last and n:
        after[-1] = ""
    for row, end in zip(ended, ends):
        after[row] = end
    ahead = dict(zip(parted, between))
    return [ahead.get(row, "") + records[row] + after[row] for row in range(n)]


# Text and cells ---------------------------------------------------------------------------------------------------


def _find_records(text: str, dialect: Dialect) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each record begins and stops, and where its end of line does: offsets into the text."""
    spans = [match.span() for match in _LINE_END.finditer(text)]
    if not spans or spans[-1][1] < len(text):
        spans.append((len(text), len(text)))
    stop, follow = np.array(spans, dtype=np.int64).T
    begin = np.concatenate([[0], follow[:-1]])
    if '"' in text:
        lasts = _records(text, begin, follow, dialect)
        firsts = np.concatenate([[0], lasts[:-1] + 1])
        begin, stop, follow = begin[firsts], stop[lasts], follow[lasts]
    filled = stop > begin
    if not filled.all():
        rows = np.flatnonzero(filled)
        kept = filled.copy()
        if len(rows) and len(_cut(text[begin[rows[0]] : stop[rows[0]]], dialect)) == 1:
            # In a file of one column an empty line between two others is an empty cell.
            kept[rows[0] : rows[-1] + 1] = True
        begin, stop, follow = begin[kept], stop[kept], follow[kept]
    return begin, stop, follow


def _records(text: str, begin: np.ndarray, follow: np.ndarray, dialect: Dialect) -> np.ndarray:
    """The last line of each record; every line is one where the file cannot be read as CSV."""
    csv.field_size_limit(LONGEST_CELL)
    lines = map(text.__getitem__, map(slice, begin.tolist(), follow.tolist()))
    reader = csv.reader(lines, delimiter=dialect.delimiter, skipinitialspace=_skips(dialect))
    lasts = []
    try:
        for _ in reader:
            lasts.append(reader.line_num - 1)
    except csv.Error:
        return np.arange(len(begin))
    return np.array(lasts, dtype=np.int64)


def _skips(dialect: Dialect) -> bool:
    return dialect.blanks or dialect.delimiter == " "


def _cut(record: str, dialect: Dialect, width: int | None = None) -> list[str]:
    """The cells of a record with the blanks and quotes around them: joined by the delimiter they are the record.

    Args:
        width: number of cells that is expected; quotes are looked at only where it is not met.
    """
    delimiter = dialect.delimiter
    d = re.escape(delimiter)
    if delimiter == " ":
        cells = re.findall(r' *(?:"(?:[^"]|"")*"[^ ]*|[^ "][^ ]*)', record)
        cells = [cell[1:] if place else cell for place, cell in enumerate(cells)]
        behind = record[len(delimiter.join(cells)) :]
        if cells and not behind.strip(" "):
            cells[-1] += behind
        return cells if delimiter.join(cells) == record else []
    cells = record.split(delimiter)
    if len(cells) == width or '"' not in record:
        return cells
    pattern = re.compile(rf'{" *" if _skips(dialect) else ""}"(?:[^"]|"")*"[^{d}]*|[^{d}]*')
    cells, place = [], 0
    while place <= len(record):
        match = pattern.match(record, place)
        assert match is not None
        cells.append(match.group())
        place = match.end() + 1
    return cells


@dataclass(frozen=True)
class _Names:
    """The names of a table's columns alone."""

    name: str
    names: tuple[str, ...]
    named: bool


def _names(source: Source, dialect: Dialect, first: Sequence[str]) -> Labelled:
    """The table in which the schema's columns are sought, also where a fault in the file keeps it from being read."""
    try:
        return CsvTable(source, dialect)
    except DataError:
        labels = [undress(cell)[0] if dialect.header else f"column_{j + 1}" for j, cell in enumerate(first)]
        return _Names(source.name, tuple(unique_names(labels)), dialect.header)


def _starts(n: int, stretches: int, size: int) -> Iterator[int]:
    """Where stretches of rows start that lie evenly over the file."""
    if n <= stretches * size:
        yield from range(0, n, size)
    else:
        yield from (round(i * (n - size) / (stretches - 1)) for i in range(stretches))
