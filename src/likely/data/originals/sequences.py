"""Text, lines, SMILES and FASTA: every byte comes back; a list of strings comes back as it was."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from likely.data.errors import DataError, check_names
from likely.data.originals.encoded import decode, encode, known_encoding
from likely.data.originals.original import (
    Legal,
    Original,
    Part,
    Restored,
    RestoredFile,
    Rows,
    blake2b,
    intact,
    settle,
    whole,
)
from likely.data.originals.side import Reader, Writer, damaged
from likely.data.originals.typed import get_fixed, put_fixed
from likely.data.sequences import READ_OPTIONS, SequenceForm
from likely.data.sources import Source, compression, creating, open_bytes

_WORDS, _BEHIND, _ENDS, _TITLES, _RECORDS = range(5)
_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_FIRST_WORD = re.compile(r"\s*(\S+)")
_RECORD_START = re.compile(r"^>", re.MULTILINE)


class Symbols:
    """Between texts and rows of symbols filled up with padding."""

    def __init__(self, form: SequenceForm) -> None:
        self._form = form
        points = np.array([ord(character) for character in form.alphabet or ()], dtype=np.int64)
        self._order = np.argsort(points)
        self._sorted, self._points = points[self._order], np.append(points, 0)

    def take(self, texts: Sequence[str]) -> Tensor:
        """Each text up to its first unknown symbol, and no longer than a row."""
        form = self._form
        lengths = np.array(list(map(len, texts)), dtype=np.int64)
        points = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), "<u4").astype(np.int64)
        place = np.minimum(np.searchsorted(self._sorted, points), len(self._sorted) - 1)
        codes = np.where(self._sorted[place] == points, self._order[place], form.padding)
        starts = np.cumsum(lengths) - lengths
        row = np.repeat(np.arange(len(texts)), lengths)
        column = np.arange(len(points)) - starts[row]
        kept = column < form.length
        x = np.full((len(texts), form.length), form.padding, np.int32)
        x[row[kept], column[kept]] = codes[kept]
        x[self._behind(x)] = form.padding
        return torch.from_numpy(x)

    def _behind(self, x: np.ndarray) -> np.ndarray:
        """Which symbols stand at the first padding of their row or behind it."""
        return cast(np.ndarray, np.logical_or.accumulate(x == self._form.padding, axis=1))

    def make(self, x: Tensor) -> list[str]:
        """The text of each row."""
        codes = _checked(self._form, x)
        behind = self._behind(codes)
        lengths = (~behind).sum(axis=1)
        text = self._points[codes[~behind]].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")
        stops = np.cumsum(lengths).tolist()
        return [text[start:stop] for start, stop in zip([0, *stops], stops)]


def _checked(form: SequenceForm, x: Tensor) -> np.ndarray:
    if x.dim() != 2 or x.shape[1] != form.length:
        raise DataError(f"x: expected shape (rows, {form.length}), got {tuple(x.shape)}")
    codes = x.detach().cpu().numpy().astype(np.int64)
    if codes.size and (codes.min() < 0 or codes.max() > form.padding):
        raise DataError(f"x: expected symbols 0 to {form.padding}, got {codes.min()} to {codes.max()}")
    return codes


# Text in chunks of bytes ------------------------------------------------------------------------------------------


class TextOriginal(Original):
    """A file as a run of bytes."""

    def __init__(self, form: SequenceForm, source: Source, options: Mapping[str, Any]) -> None:
        check_names(options, READ_OPTIONS, "reading sequences")
        if source.kind == "strings":
            raise DataError(f"{source.name}: expected a file of text, got a list")
        self._form = form
        with open_bytes(source.path) as file:
            self._content = file.read()
        size = len(self._content)
        n = -(-size // form.length)
        super().__init__("text", "bytes", n, size, blake2b(self._content), {}, compression(source.path))

    def _rows(self, start: int, stop: int, legal: Legal | None) -> Rows:
        length = self._form.length
        content = np.frombuffer(self._content[start * length : stop * length], np.uint8)
        x = torch.full(((stop - start) * length,), self._form.padding, dtype=torch.int16)
        x[: len(content)] = torch.from_numpy(content.astype(np.int16))
        x = x.reshape(-1, length)
        out = Writer()
        if legal is not None:
            settle(x, legal, [np.array(0), np.array(32), np.array(self._form.padding)])
            expected = x.reshape(-1)[: len(content)].numpy().astype(np.uint8)
            if (expected != content).any():
                put_fixed(out, content, expected)
        return Rows(x, None, out.content())


def _text_pieces(form: SequenceForm, facts: Mapping[str, Any], parts: Iterable[Part], first: int) -> Iterator[bytes]:
    with intact("head"):
        left = whole(facts["size"]) - first * form.length
    for x, _, side in parts:
        codes = _checked(form, x).reshape(-1)[: max(left, 0)]
        left -= len(codes)
        content = codes.astype(np.uint8)
        if side:
            with intact("side information"):
                reader = Reader(side, 0)
                content = get_fixed(reader, len(content), np.dtype(np.uint8), content)
                if not reader.done:
                    raise damaged("it goes on behind its end")
        yield content.tobytes()


# A sequence a line, or a record -----------------------------------------------------------------------------------


class LinesOriginal(Original):
    """A file with one sequence a line (SMILES too), a FASTA file, or a list of strings.

    What stands behind the first word of a line, titles of records, and ends of lines that are not the usual ones are
    kept as they are; so is a sequence that is too long or has an unknown symbol.
    """

    def __init__(self, form: SequenceForm, source: Source, options: Mapping[str, Any]) -> None:
        check_names(options, READ_OPTIONS, "reading sequences")
        self._form, self._symbols = form, Symbols(form)
        if source.kind == "strings":
            self._texts: list[str] = list(source.value)
            digest, size = _digest_texts(self._texts)
            super().__init__("strings", "content", len(self._texts), size, digest, {})
            return
        with open_bytes(source.path) as file:
            content = file.read()
        mark, encoding, text, rest = decode(content, options.get("encoding") or form.encoding)
        if not mark and encoding == "utf-8" and text.startswith("\ufeff"):
            mark, text = content[:3], text[1:]
        fasta = source.kind == "fasta"
        facts: dict[str, Any] = {"mark": mark.hex(), "rest": rest.hex(), "encoding": encoding}
        if fasta:
            starts = [match.start() for match in _RECORD_START.finditer(text)]
            self._records = [text[start:stop] for start, stop in zip(starts, [*starts[1:], len(text)])]
            facts["start"] = text[: starts[0]] if starts else text
        else:
            self._records = _LINE.findall(text)
        usual = Counter(_end(record.partition("\n")[0] + "\n") for record in self._records[:1000])
        facts["newline"] = newline = usual.most_common(1)[0][0] if usual else "\n"
        facts["open"] = bool(self._records) and not self._records[-1].endswith("\n")
        if fasta:
            facts["wrap"] = _wrap_width(self._records, newline)
        self._facts = {"media": "fasta" if fasta else "lines", **facts}
        self._texts = []
        media = str(self._facts["media"])
        super().__init__(
            media, "bytes", len(self._records), len(content), blake2b(content), facts, compression(source.path)
        )

    def _rows(self, start: int, stop: int, legal: Legal | None) -> Rows:
        if self.media == "strings":
            texts = self._texts[start:stop]
            return self._rows_of(texts, legal, Writer())
        records = self._records[start:stop]
        last = self._facts["open"] and stop == self.n
        out = Writer()
        if self.media == "fasta":
            read = list(map(_read_record, records))
            titles, texts = [title for title, _ in read], [text for _, text in read]
            rows = self._rows_of(texts, legal, out)
            shown = _records_of(titles, texts, self._facts["wrap"], self._facts["newline"], last)
            if any(titles):
                out.number(_TITLES)
                out.texts(titles)
            _put_odd(out, _RECORDS, records, shown)
            return Rows(rows.x, None, out.content())
        lines = [record.rstrip("\r\n") for record in records]
        words = [_first_word(line) for line in lines] if self._form.first_word else [("", line, "") for line in lines]
        rows = self._rows_of([word for _, word, _ in words], legal, out)
        _put_odd(out, _BEHIND, [f"{before}\n{behind}" for before, _, behind in words], ["\n"] * len(words))
        ends = [self._facts["newline"]] * len(records)
        if last:
            ends[-1] = ""
        _put_odd(out, _ENDS, [record[len(line) :] for record, line in zip(records, lines)], ends)
        return Rows(rows.x, None, out.content())

    def _rows_of(self, texts: Sequence[str], legal: Legal | None, out: Writer) -> Rows:
        x = self._symbols.take(texts)
        if legal is not None:
            settle(x, legal, [np.array(self._form.padding), np.array(0)])
        _put_odd(out, _WORDS, texts, self._symbols.make(x))
        return Rows(x, None, out.content())


def _put_odd(out: Writer, tag: int, texts: Sequence[str], expected: Sequence[str]) -> None:
    places = [place for place, (a, b) in enumerate(zip(texts, expected)) if a != b]
    if places:
        out.number(tag)
        out.places(np.array(places), len(texts))
        out.texts([texts[place] for place in places])


def _end(line: str) -> str:
    return line[len(line.rstrip("\r\n")) :]


def _first_word(line: str) -> tuple[str, str, str]:
    """What stands before the first word, the word, and what follows; a line of blanks is all word."""
    match = _FIRST_WORD.match(line)
    if match is None:
        return "", line, ""
    return line[: match.start(1)], match.group(1), line[match.end(1) :]


def _read_record(record: str) -> tuple[str, str]:
    """The title of a FASTA record and its sequence."""
    title, _, body = record.partition("\n")
    parts = ["".join(line.split()) for line in body.split("\n") if not line.startswith(";")]
    return title[1:].rstrip("\r"), "".join(parts)


def _wrap_width(records: Sequence[str], newline: str) -> int:
    """Symbols in a line of a sequence; 0 where sequences have one line each."""
    widths: Counter[int] = Counter()
    for record in records[:1000]:
        body = record.split(newline)[1:]
        if len(body) > 1 and body[1]:
            widths[len(body[0])] += 1
    return widths.most_common(1)[0][0] if widths else 0


def _records_of(titles: Sequence[str], texts: Sequence[str], wrap: int, newline: str, last: bool) -> list[str]:
    """FASTA records as they are usually written."""
    out = []
    for title, text in zip(titles, texts):
        width = wrap or max(1, len(text))
        lines = [text[at : at + width] for at in range(0, len(text), width)]
        out.append(newline.join([">" + title, *lines, ""]))
    if last and out:
        out[-1] = out[-1].removesuffix(newline)
    return out


def _digest_texts(texts: Sequence[str]) -> tuple[bytes, int]:
    out = Writer()
    out.number(len(texts))
    out.numbers(np.array(list(map(len, texts)), np.uint64))
    content = "".join(texts).encode("utf-8", "surrogatepass")
    return blake2b(out.content() + content), len(content)


def _line_parts(form: SequenceForm, facts: Mapping[str, Any], parts: Iterable[Part], first: int) -> Iterator[list[str]]:
    """The lines, records or strings of each part."""
    symbols, media, row = Symbols(form), facts["media"], first
    with intact("head"):
        n, size = whole(facts["n"]), whole(facts["size"])
    for x, _, side in parts:
        texts = symbols.make(x)
        row += len(texts)
        if row > n:
            raise damaged(f"more than the {n} rows of the original")
        with intact("side information"):
            yield _lines(facts, media, texts, side, size, bool(facts.get("open")) and row == n)


def _lines(facts: Mapping[str, Any], media: str, texts: list[str], side: bytes, size: int, last: bool) -> list[str]:
    n = len(texts)
    reader = Reader(side, size)
    sections: dict[int, tuple[list[int], list[str]]] = {}
    allowed = {"strings": (_WORDS,), "lines": (_WORDS, _BEHIND, _ENDS), "fasta": (_WORDS, _TITLES, _RECORDS)}[media]
    before = -1
    while not reader.done:
        tag = reader.number(_RECORDS)
        if tag <= before or tag not in allowed:
            raise damaged("its sections are out of order")
        before = tag
        places = np.arange(n) if tag == _TITLES else reader.places(n)
        sections[tag] = (places.tolist(), reader.texts(len(places)))
    for place, text in zip(*sections.get(_WORDS, ([], []))):
        texts[place] = text
    if media == "strings":
        return texts
    newline = str(facts["newline"])
    if media == "fasta":
        titles = sections[_TITLES][1] if _TITLES in sections else [""] * n
        out = _records_of(titles, texts, whole(facts["wrap"]), newline, last)
        for place, text in zip(*sections.get(_RECORDS, ([], []))):
            out[place] = text
        return out
    ends = [newline] * n
    if last and n:
        ends[-1] = ""
    for place, text in zip(*sections.get(_ENDS, ([], []))):
        ends[place] = text
    for place, text in zip(*sections.get(_BEHIND, ([], []))):
        ahead, _, behind = text.partition("\n")
        texts[place] = ahead + texts[place] + behind
    return [text + end for text, end in zip(texts, ends)]


def restore_sequences(
    form: SequenceForm,
    facts: Mapping[str, Any],
    parts: Iterable[Part],
    first: int = 0,
    keep: tuple[int, int] | None = None,
) -> Restored:
    """Put text or sequences together again.

    Args:
        form: what the schema says of them.
        facts: of the whole.
        parts: consecutive rows.
        first: number of the first row of the first part.
        keep: numbers of the rows to give, from … to before …; None for all.
    """
    media = facts["media"]
    if media == "text":
        if keep is not None:
            raise DataError("rows: one long text has no rows; decompress all of it")
        return RestoredFile("text", _text_pieces(form, facts, parts, first))
    if media == "strings":
        return RestoredStrings(_kept(_line_parts(form, facts, parts, first), first, keep))
    if not known_encoding(facts["encoding"]):
        raise DataError(f"head is damaged: expected an encoding, got {facts['encoding']!r}")
    return RestoredFile(media, _line_pieces(form, facts, parts, first, keep))


def _kept(parts: Iterable[list[str]], row: int, keep: tuple[int, int] | None) -> Iterator[list[str]]:
    """Of the texts of rows those that are wanted."""
    for texts in parts:
        yield texts if keep is None else texts[max(keep[0] - row, 0) : max(keep[1] - row, 0)]
        row += len(texts)


def _line_pieces(
    form: SequenceForm,
    facts: Mapping[str, Any],
    parts: Iterable[Part],
    first: int,
    keep: tuple[int, int] | None = None,
) -> Iterator[bytes]:
    with intact("head"):
        left, mark, rest = whole(facts["size"]), bytes.fromhex(facts["mark"]), bytes.fromhex(facts["rest"])
    yield mark
    yield encode(str(facts.get("start", "")), facts["encoding"])
    for lines in _kept(_line_parts(form, facts, parts, first), first, keep):
        piece = encode("".join(lines), facts["encoding"])
        left -= len(piece)
        if left < 0:
            raise damaged("more than the bytes of the original")
        yield piece
    yield rest


class RestoredStrings(Restored):
    """A list of strings."""

    def __init__(self, parts: Iterable[list[str]]) -> None:
        super().__init__("strings")
        self._parts: Iterable[list[str]] | None = parts
        self._value: list[str] = []

    @property
    def value(self) -> list[str]:
        if self._parts is not None:
            self._value = [text for part in self._parts for text in part]
            self._parts = None
            self.digest = _digest_texts(self._value)[0]
        return self._value

    def write(self, path: Path | str, digest: bytes | None = None) -> None:
        """Write one string a line."""
        texts = self.value
        self._check(digest)
        with creating(None if str(path) == "-" else Path(path)) as file:
            file.write("".join(text + "\n" for text in texts).encode("utf-8"))
