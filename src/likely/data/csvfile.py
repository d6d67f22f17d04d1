"""CSV as it comes: how a file is written is found out from the file, kept, and used again to write."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from likely.data.errors import DataError, at
from likely.data.sources import open_bytes

#: Spellings of a missing cell in any column, unless the column has the spelling among its declared categories.
MISSING = ("", "?", "NA", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NAN", "null", "NULL", "Null")
#: Further spellings that mean a missing cell only where every other cell of the column is a number.
MISSING_AMONG_NUMBERS = ("-", "--", ".", "..", "*", "na", "Na", "None", "none", "nil", "missing", "Missing", "unknown")

NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
COMMA_NUMBER = re.compile(r"[+-]?(?:\d+,?\d*|,\d+)(?:[eE][+-]?\d+)?", re.ASCII)
INFINITE = re.compile(r"[+-]?inf(?:inity)?", re.IGNORECASE)

_DELIMITERS = (",", ";", "\t", "|", " ")
_SAMPLE_BYTES = 1 << 18
_SAMPLE_ROWS = 200
_CELLS = 1 << 17  # cells in a chunk
_NEWLINE = re.compile(r"\r\n|\r|\n")
LONGEST_CELL = 1 << 24


@dataclass(frozen=True)
class Dialect:
    """How a CSV file is written.

    Args:
        delimiter: what stands between cells.
        encoding: a Python codec name.
        header: whether the first line has the column names.
        decimal: ``.`` or ``,``.
        blanks: whether a blank follows every delimiter.
        quote: which cells are quoted when writing: ``minimal`` (where needed), ``text`` or ``all``.
        newline: end of a line.
        strip_suffix: text removed from the end of every cell that ends with it.
    """

    delimiter: str = ","
    encoding: str = "utf-8"
    header: bool = True
    decimal: str = "."
    blanks: bool = False
    quote: str = "minimal"
    newline: str = "\n"
    strip_suffix: str = ""

    def __post_init__(self) -> None:
        if len(self.delimiter) != 1:
            raise DataError(f"delimiter: expected one character, got {self.delimiter!r}")
        if self.decimal not in (".", ","):
            raise DataError(f"decimal: expected '.' or ',', got {self.decimal!r}")
        if self.decimal == self.delimiter:
            raise DataError(f"decimal: expected a character other than the delimiter, got {self.decimal!r} for both")
        if self.quote not in ("minimal", "text", "all"):
            raise DataError(f"quote: expected 'minimal', 'text' or 'all', got {self.quote!r}")
        try:
            "".encode(self.encoding)
        except LookupError:
            raise DataError(f"encoding: expected a codec that Python knows, got {self.encoding!r}") from None

    def number(self) -> re.Pattern[str]:
        """The pattern of a number in this file."""
        return NUMBER if self.decimal == "." else COMMA_NUMBER


@dataclass
class Rows:
    """Some consecutive rows: the line in the file on which each ends, and the cells."""

    lines: Sequence[int]
    cells: list[list[str]]


class CsvFile:
    """A CSV file with its dialect: column names, and rows in chunks of bounded size.

    Args:
        path: the file, possibly compressed.
        name: how messages call it.
        dialect: how it is written.
    """

    def __init__(self, path: Path, name: str, dialect: Dialect) -> None:
        self.path, self.name, self.dialect = path, name, dialect
        first = next(self._blocks(1), None)
        if first is None:
            raise DataError(f"{name}: expected rows, got an empty file")
        self.width = len(first.cells[0])
        self.header = first.cells[0] if dialect.header else None

    def chunks(self) -> Iterator[Rows]:
        """The rows below the header, each of the width of the first line; empty lines are passed over.

        In a file of one column an empty line between two others is an empty cell.
        """
        suffix = self.dialect.strip_suffix
        skip = self.dialect.header
        before: int | None = None
        for rows in self._blocks(max(1, _CELLS // self.width)):
            if skip:
                before = rows.lines[0]
                rows, skip = Rows(rows.lines[1:], rows.cells[1:]), False
                if not rows.cells:
                    continue
            if set(map(len, rows.cells)) != {self.width}:
                place = next(i for i, cells in enumerate(rows.cells) if len(cells) != self.width)
                raise DataError(
                    f"{at(self.name, line=rows.lines[place])}: expected {self.width} cells as in the first line, got "
                    f"{len(rows.cells[place])} (delimiter {self.dialect.delimiter!r}); mend it, or pass delimiter="
                )
            if self.width == 1:
                rows = _with_empty_cells(rows, before)
            if suffix:
                rows = Rows(rows.lines, [[cell.removesuffix(suffix) for cell in cells] for cells in rows.cells])
            yield rows
            before = rows.lines[-1]

    def _blocks(self, size: int) -> Iterator[Rows]:
        """The records that are no empty lines, at most ``size`` at a time."""
        csv.field_size_limit(LONGEST_CELL)
        dialect = self.dialect
        # A byte order mark is no part of the first cell, whether or not the dialect announces one.
        plain = dialect.encoding.lower().replace("_", "-") in ("utf-8", "utf8")
        encoding = "utf-8-sig" if plain else dialect.encoding
        by_blanks = dialect.delimiter == " "
        with open_bytes(self.path) as raw, io.TextIOWrapper(raw, encoding=encoding, newline="") as text:
            reader = csv.reader(text, delimiter=dialect.delimiter, skipinitialspace=dialect.blanks or by_blanks)
            line = 0
            try:
                while cells := list(itertools.islice(reader, size)):
                    if reader.line_num == line + len(cells):
                        lines: Sequence[int] = range(line + 1, reader.line_num + 1)
                    else:  # some cells hold ends of lines
                        heights = (1 + sum(len(_NEWLINE.findall(cell)) for cell in record) for record in cells)
                        lines = list(itertools.accumulate(heights, initial=line))[1:]
                    line = reader.line_num
                    if by_blanks:
                        cells = [record[:-1] if len(record) > 1 and record[-1] == "" else record for record in cells]
                    if not all(cells):
                        kept = [place for place, record in enumerate(cells) if record]
                        lines, cells = [lines[place] for place in kept], [cells[place] for place in kept]
                    if cells:
                        yield Rows(lines, cells)
            except UnicodeDecodeError as fault:
                found = _first_undecodable(self.path, encoding)
                where = self.name if found is None else at(self.name, line=found)
                raise DataError(
                    f"{where}: expected text in {dialect.encoding}, got the byte {fault.object[fault.start]:#04x}; "
                    f"pass encoding= (e.g. 'cp1252')"
                ) from None
            except csv.Error as fault:
                raise DataError(f"{at(self.name, line=reader.line_num)}: not a CSV record: {fault}") from None


def _first_undecodable(path: Path, encoding: str) -> int | None:
    """The line with the first byte that is not of the encoding; None where lines are no lines of bytes."""
    if "16" in encoding or "32" in encoding:
        return None
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode(encoding)
            except UnicodeDecodeError:
                return number
    return None


def _with_empty_cells(rows: Rows, before: int | None) -> Rows:
    """In a file of one column, a cell for each empty line between the rows."""
    lines: list[int] = []
    cells: list[list[str]] = []
    for line, record in zip(rows.lines, rows.cells):
        top = line - len(_NEWLINE.findall(record[0]))
        if before is not None:
            lines.extend(range(before + 1, top))
            cells.extend([""] for _ in range(before + 1, top))
        lines.append(line)
        cells.append(record)
        before = line
    return Rows(lines, cells)


def detect(path: Path, name: str, **given: object) -> tuple[Dialect, list[str]]:
    """Find out how a CSV file is written; what is ``given`` is not guessed.

    Returns:
        the dialect, and notes on what is not certain.
    """
    notes: list[str] = []
    with open_bytes(path) as file:
        head = file.read(_SAMPLE_BYTES)
    if not head.strip():
        raise DataError(f"{name}: expected rows, got an empty file")
    whole = len(head) < _SAMPLE_BYTES
    stated = {name: value for name, value in given.items() if value is not None}
    decimal: Any = stated.pop("decimal", None)
    dialect = Dialect(**stated)  # type: ignore[arg-type]
    if given.get("encoding") is None:
        dialect = replace(dialect, encoding=_encoding(head, path))
        if dialect.encoding in ("cp1252", "latin-1"):
            notes.append(f"not UTF-8: read as {dialect.encoding}; pass encoding= if letters look wrong")
    text = head.decode(dialect.encoding, errors="replace")
    newline = re.search(r"\r\n|\n|\r", text)
    dialect = replace(dialect, newline=newline.group() if newline else "\n")
    if given.get("delimiter") is None:
        dialect = replace(dialect, delimiter=_delimiter(text, path, whole))
    if given.get("blanks") is None:
        dialect = replace(dialect, blanks=_blanks(_sample(text, dialect, whole)))
    rows = _sample(text, dialect, whole)
    if not rows:
        raise DataError(f"{name}: expected rows, got an empty file")
    if decimal is not None:
        dialect = replace(dialect, decimal=decimal)
    elif dialect.delimiter != ",":
        found, doubtful = _decimal(rows)
        dialect = replace(dialect, decimal=found)
        if doubtful:
            notes.append("numbers such as 1,234 may have a decimal comma or a thousands separator; pass decimal=")
    if given.get("header") is None:
        dialect = replace(dialect, header=_has_header(rows, dialect.number()))
    if given.get("quote") is None:
        dialect = replace(dialect, quote=_quoting(text, dialect, whole))
    return dialect, notes


def _encoding(head: bytes, path: Path) -> str:
    if head.startswith(b"\xef\xbb\xbf"):
        return "utf-8-sig"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    zeros = head[:4096].count(0)
    if zeros > len(head[:4096]) // 4:
        return "utf-16-le" if head[1:4096:2].count(0) > zeros // 2 else "utf-16-be"
    for encoding in ("utf-8", "cp1252"):
        if _decodes(path, encoding):
            return encoding
    return "latin-1"


def _decodes(path: Path, encoding: str) -> bool:
    with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding=encoding, errors="strict") as text:
        try:
            while text.read(1 << 20):
                pass
        except UnicodeDecodeError:
            return False
    return True


def _sample(text: str, dialect: Dialect, whole: bool) -> list[list[str]]:
    """The first rows, parsed; a last row that the sample may cut is left out."""
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=dialect.delimiter,
        skipinitialspace=dialect.blanks or dialect.delimiter == " ",
    )
    rows: list[list[str]] = []
    try:
        for cells in reader:
            if dialect.delimiter == " " and len(cells) > 1 and cells[-1] == "":
                cells.pop()
            if cells:
                rows.append(cells)
            if len(rows) > _SAMPLE_ROWS:
                return rows[:-1]
    except csv.Error:
        return rows
    return rows if whole or len(rows) < 2 else rows[:-1]


def _delimiter(text: str, path: Path, whole: bool) -> str:
    """The candidate that cuts every sampled row into the same number of cells, the most cells first."""
    best, score = ",", (0.0, 0)
    for candidate in _DELIMITERS:
        rows = _sample(text, Dialect(delimiter=candidate, decimal="."), whole)
        if not rows:
            continue
        widths = Counter(map(len, rows))
        width, often = widths.most_common(1)[0]
        share = often / len(rows)
        if width > 1 and share >= 0.9 and (candidate != " " or share == 1.0) and (share, width) > score:
            # Blanks inside the cells of a comma-separated file also cut evenly now and then: they come last.
            if candidate == " " and score[0] >= 0.99:
                continue
            best, score = candidate, (share, width)
    if score[1] == 0 and ".tsv" in path.name.lower():
        return "\t"
    return best


def _blanks(rows: Sequence[Sequence[str]]) -> bool:
    cells = [cell for row in rows[1:] or rows for cell in row[1:]]
    return bool(cells) and all(cell.startswith(" ") for cell in cells)


def _decimal(rows: Sequence[Sequence[str]]) -> tuple[str, bool]:
    """``,`` where some number can only have a decimal comma and none has a point; whether it stays in doubt."""
    cells = [cell.strip() for row in rows for cell in row]
    commas = [cell for cell in cells if "," in cell and COMMA_NUMBER.fullmatch(cell)]
    points = any("." in cell and NUMBER.fullmatch(cell) for cell in cells)
    if not commas or points:
        return ".", bool(commas)
    certain = [cell for cell in commas if not re.fullmatch(r"[+-]?[1-9]\d{0,2},\d{3}", cell)]
    return (",", False) if certain else (".", True)


def _has_header(rows: Sequence[Sequence[str]], number: re.Pattern[str]) -> bool:
    """Whether the first row is of another nature than the rows below it."""
    first, rest = rows[0], rows[1:]
    names = [cell.strip() for cell in first]
    numbers = sum(number.fullmatch(name) is not None for name in names)
    if numbers and (2 * numbers >= len(names) or len(set(names)) < len(names)):  # some columns may be called 2019
        return False
    if not rest:
        return not numbers
    absent = {*MISSING, *MISSING_AMONG_NUMBERS}
    new = 0
    for j, name in enumerate(names):
        below = [row[j].strip() for row in rest if j < len(row)]
        present = [cell for cell in below if cell not in absent]
        word = name and name not in absent and not number.fullmatch(name)
        if word and present and all(number.fullmatch(cell) for cell in present):
            return True
        new += name not in below
    return not numbers and len(set(names)) == len(names) and "" not in names and new == len(names)


def _quoting(text: str, dialect: Dialect, whole: bool) -> str:
    """``all`` or ``text`` where cells that need no quotes have them."""
    d = re.escape(dialect.delimiter)
    lines = text.splitlines()[1 if dialect.header else 0 : _SAMPLE_ROWS]
    quoted = plain = numbers = 0
    for line in lines if whole else lines[:-1]:
        for cell in re.findall(rf'(?:^|{d})[ ]?("(?:[^"]|"")*"|[^{d}"]*)', line):
            if cell.startswith('"'):
                quoted += 1
                numbers += bool(dialect.number().fullmatch(cell.strip('"')))
            elif cell and not dialect.number().fullmatch(cell.strip()):
                plain += cell.strip() not in MISSING
    if not quoted or plain > 0:
        return "minimal"
    return "all" if numbers else "text"


class CsvWriter:
    """Writes rows of cells as a dialect has them.

    Args:
        file: where to write, binary; not closed.
        dialect: how to write.
        textual: for each column, whether its cells are text (quoted under ``quote="text"``).
    """

    def __init__(self, file: BinaryIO, dialect: Dialect, textual: Sequence[bool]) -> None:
        self._file, self._dialect, self._textual = file, dialect, textual
        self._between = dialect.delimiter + (" " if dialect.blanks else "")
        self._needs = re.compile(rf'[{re.escape(dialect.delimiter)}"\r\n]|^[ ]|[ ]$')
        # The marks at the start of a file belong to its first write only.
        self._encoding = dialect.encoding

    def header(self, names: Sequence[str]) -> None:
        """Write the column names, if the dialect has a header."""
        if self._dialect.header:
            quote_all = self._dialect.quote in ("all", "text")
            self._write([self._cell(name, quote_all) for name in names])

    def rows(self, rows: Iterable[Sequence[str]]) -> None:
        """Write rows of cells."""
        quote = self._dialect.quote
        forced = [quote == "all" or (quote == "text" and text) for text in self._textual]
        for row in rows:
            cells = [self._cell(cell, force and cell != "") for cell, force in zip(row, forced)]
            self._write(['""'] if cells == [""] else cells)

    def _cell(self, cell: str, force: bool) -> str:
        if force or self._needs.search(cell):
            return '"' + cell.replace('"', '""') + '"'
        return cell

    def _write(self, cells: Sequence[str]) -> None:
        text = self._between.join(cells) + self._dialect.newline
        try:
            self._file.write(text.encode(self._encoding))
        except UnicodeEncodeError as fault:
            raise DataError(
                f"encoding: {fault.object[fault.start]!r} cannot be written in {self._dialect.encoding}"
            ) from None
        self._encoding = {"utf-8-sig": "utf-8", "utf-16": _native_utf16()}.get(self._encoding, self._encoding)


def _native_utf16() -> str:
    return "utf-16-le" if "".encode("utf-16") == b"\xff\xfe" else "utf-16-be"
