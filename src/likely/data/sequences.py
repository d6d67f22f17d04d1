"""Sequences of symbols: plain text in chunks of bytes, and files with one sequence a line (.txt, .smi, .fasta)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from torch import Tensor

from likely.contract import Tokens
from likely.data.dataset import Dataset
from likely.data.errors import DataError, at, check_names
from likely.data.sources import Source, creating, open_bytes
from likely.data.store import Store

#: Bytes in a chunk of plain text unless said otherwise.
LENGTH = 256
_BYTES = 256
_AT_ONCE = 1 << 14  # sequences or chunks converted at a time

READ_OPTIONS = ("lines", "encoding")
INFER_OPTIONS = (*READ_OPTIONS, "length", "alphabet")


@dataclass(frozen=True)
class SequenceForm:
    """Sequences as the user has them.

    Symbol ``len(alphabet)`` (256 for bytes) is the padding: it fills a sequence up to ``length`` and is no character.

    Args:
        container: ``text`` (bytes), ``lines``, ``fasta`` or ``strings`` (a list).
        length: symbols in an example.
        alphabet: the characters, in the order of their codes; None for bytes.
        encoding: of a file of lines.
        first_word: whether only what stands before the first blank of a line is the sequence (.smi files).
    """

    container: Literal["text", "lines", "fasta", "strings"]
    length: int
    alphabet: tuple[str, ...] | None = None
    encoding: str = "utf-8"
    first_word: bool = False

    #: Name of the form in a saved schema.
    form = "sequences"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise DataError(f"length: expected a positive number of symbols, got {self.length}")
        if self.alphabet is not None:
            object.__setattr__(self, "alphabet", tuple(self.alphabet))
            if len(set(self.alphabet)) != len(self.alphabet) or any(len(c) != 1 for c in self.alphabet):
                raise DataError("alphabet: expected distinct single characters")
        elif self.container != "text":
            raise DataError(f"alphabet: expected the characters of {self.container}, got none")

    @property
    def padding(self) -> int:
        """Code of the symbol that fills up a short sequence."""
        return _BYTES if self.alphabet is None else len(self.alphabet)

    @property
    def space(self) -> Tokens:
        """The space of an example."""
        return Tokens(length=self.length, vocab=self.padding + 1)

    @property
    def condition_space(self) -> None:
        """Sequences are read without a condition."""
        return None

    def read(self, source: Source, cache: Path | None = None, limit: int | None = None, **options: Any) -> Dataset:
        """Hold a source against the form; see :meth:`likely.data.schema.Schema.read`."""
        check_names(options, READ_OPTIONS, "reading sequences")
        store = Store((self.length,), np.int16 if self.padding < 2**15 else np.int32, None, limit)
        try:
            if self.container == "text":
                for chunk in _byte_chunks(source, self.length):
                    store.append(chunk)
            else:
                self._read_lines(source, options.get("encoding") or self.encoding, store)
        except BaseException:
            store.abandon()
            raise
        x = store.finish()
        if not len(x):
            raise DataError(f"{source.name}: expected sequences, got none")
        return Dataset(self.space, x)

    def _read_lines(self, source: Source, encoding: str, store: Store) -> None:
        codes = {character: code for code, character in enumerate(cast(Sequence[str], self.alphabet))}
        rows: list[np.ndarray] = []
        for line, text in sequences(source, encoding, self.first_word):
            if len(text) > self.length:
                raise DataError(
                    f"{at(source.name, line=line)}: expected at most {self.length} symbols, got {len(text)}; fit "
                    f"with length={len(text)}, or leave the sequence out"
                )
            row = np.full(self.length, self.padding, np.int32)
            try:
                row[: len(text)] = [codes[character] for character in text]
            except KeyError:
                place = next(i for i, character in enumerate(text) if character not in codes)
                known = "".join(cast(Sequence[str], self.alphabet))[:80]
                raise DataError(
                    f"{at(source.name, line=line)}, symbol {place + 1}: expected one of {known!r}, got "
                    f"{text[place]!r}; leave the sequence out, or fit again with alphabet= that has the symbol"
                ) from None
            rows.append(row)
            if len(rows) == _AT_ONCE:
                store.append(np.stack(rows))
                rows = []
        if rows:
            store.append(np.stack(rows))

    def codes(self, text: str, name: str) -> list[int]:
        """The codes of the beginning of a sequence, which leaves at least one symbol of ``length`` to come.

        Raises:
            DataError: it is too long, or has a character that the alphabet lacks.

        >>> SequenceForm("strings", 4, ("a", "b")).codes("ba", "prefix")
        [1, 0]
        """
        symbols: Sequence[Any] = text.encode() if self.alphabet is None else text
        if len(symbols) >= self.length:
            raise DataError(f"{name}: expected fewer symbols than the {self.length} of an example, got {len(symbols)}")
        if self.alphabet is None:
            return list(symbols)
        codes = {character: code for code, character in enumerate(self.alphabet)}
        for character in symbols:
            if character not in codes:
                raise DataError(f"{name}: expected symbols of {''.join(self.alphabet)[:80]!r}, got {character!r}")
        return [codes[character] for character in symbols]

    def _bytes(self, x: Tensor) -> list[bytes]:
        self.space.validate(x.detach().cpu(), "x")
        out = []
        for row in x.detach().cpu().numpy().astype(np.int64):
            end = np.flatnonzero(row == self.padding)
            row = row[: int(end[0])] if len(end) else row
            if self.alphabet is None:
                out.append(row.astype(np.uint8).tobytes())
            else:
                out.append("".join(self.alphabet[code] for code in row).encode("utf-8"))
        return out

    def to_user(self, x: Tensor, condition: Tensor | None = None) -> list[str]:
        """Texts; each ends before its first padding.  Bytes that are no UTF-8 are shown as U+FFFD."""
        if condition is not None:
            raise DataError("condition: sequences are read without one")
        return [text.decode("utf-8", errors="replace") for text in self._bytes(x)]

    def write(self, x: Tensor, path: Path | None, condition: Tensor | None = None) -> None:
        """Write text as one run of bytes, sequences one a line, or FASTA; None is standard output."""
        if condition is not None:
            raise DataError("condition: sequences are read without one")
        texts = self._bytes(x)
        if self.container == "text":
            content = b"".join(texts)
        elif self.container == "fasta":
            content = b"".join(b">sequence_%d\n%s\n" % (i + 1, text) for i, text in enumerate(texts))
        else:
            content = b"".join(text + b"\n" for text in texts)
        with creating(path) as file:
            file.write(content)

    def complete(self, source: Source, x: Tensor, path: Path | None, to_file: bool, **options: Any) -> None:
        """Sequences have no missing symbols."""
        raise DataError(f"{source.name}: sequences have no missing symbols to fill")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is at its default is left out."""
        out: dict[str, Any] = {"container": self.container, "length": self.length}
        if self.alphabet is not None:
            out["alphabet"] = "".join(self.alphabet)
        return out | {f.name: v for f in fields(self)[3:] if (v := getattr(self, f.name)) != f.default}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SequenceForm:
        """The inverse of :meth:`to_dict`."""
        return cls(**values)

    def describe(self) -> list[str]:
        """Lines for people."""
        if self.alphabet is None:
            return [f"text in chunks of {self.length} bytes; symbol 256 fills up the last one"]
        shown = "".join(self.alphabet)
        return [
            f"{self.container}: sequences of at most {self.length} symbols, filled up with a symbol of its own",
            f"alphabet of {len(self.alphabet)}: {shown[:100]!r}{'…' if len(shown) > 100 else ''}",
        ]


def infer_sequences(source: Source, **options: Any) -> tuple[SequenceForm, list[str]]:
    """The form of text or sequences, from one pass.

    Args:
        source: a file, or a list of strings.
        options: see ``INFER_OPTIONS`` and docs/data.md.
    """
    stated = {name: value for name, value in options.items() if name not in ("container", "first_word")}
    check_names(stated, INFER_OPTIONS, f"sequences ({source.name})")
    said = {name: value for name, value in stated.items() if value is not None}
    length = said.get("length")
    if source.kind == "text" and not said.get("lines"):
        form = SequenceForm("text", LENGTH if length is None else int(length))
        size = sum(len(block) for block in _blocks(source))
        if size <= form.length:
            raise DataError(
                f"{source.name}: expected at least 2 chunks of {form.length} bytes to learn from, got {size} bytes; "
                f"pass length= (less than {max(size, 2)}), or lines=True for one sequence a line"
            )
        return form, []
    suffixes = [] if source.kind == "strings" else [s.lower() for s in source.path.suffixes]
    first_word = bool(options.get("first_word", {".smi", ".smiles"} & set(suffixes)))
    encoding = said.get("encoding", "utf-8")
    seen: set[str] = set()
    longest = count = 0
    for _, text in sequences(source, encoding, first_word):
        seen.update(text)
        longest, count = max(longest, len(text)), count + 1
    if count < 2:
        raise DataError(f"{source.name}: expected at least 2 sequences to learn from, got {count}")
    if not longest:
        raise DataError(f"{source.name}: expected sequences with symbols, got only empty lines")
    container: Any = {"fasta": "fasta", "strings": "strings"}.get(source.kind, "lines")
    alphabet = tuple(dict.fromkeys(said["alphabet"])) if "alphabet" in said else tuple(sorted(seen))
    notes = []
    if first_word:
        notes.append("of each line only what stands before the first blank is read")
    return SequenceForm(container, longest if length is None else int(length), alphabet, encoding, first_word), notes


def _blocks(source: Source) -> Iterator[bytes]:
    with open_bytes(source.path) as file:
        while block := file.read(1 << 20):
            yield block


def _byte_chunks(source: Source, length: int) -> Iterator[np.ndarray]:
    """Rows of byte codes; the last one filled up with the padding symbol."""
    rest = b""
    for block in _blocks(source):
        rest += block
        whole = len(rest) // length * length
        yield np.frombuffer(rest[:whole], np.uint8).reshape(-1, length).astype(np.int16)
        rest = rest[whole:]
    if rest:
        last = np.full((1, length), _BYTES, np.int16)
        last[0, : len(rest)] = np.frombuffer(rest, np.uint8)
        yield last


def sequences(source: Source, encoding: str = "utf-8", first_word: bool = False) -> Iterator[tuple[int, str]]:
    """The sequences of a file or a list, each with the line on which it starts."""
    if source.kind == "strings":
        yield from enumerate(source.value, start=1)
        return
    with open_bytes(source.path) as file:
        start, parts = 0, list[str]()
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8-sig" if number == 1 and encoding == "utf-8" else encoding).rstrip("\r\n")
            except UnicodeDecodeError as fault:
                raise DataError(
                    f"{at(source.name, line=number)}: expected text in {encoding}, got the byte "
                    f"{raw[fault.start]:#04x}; pass encoding="
                ) from None
            if source.kind != "fasta":
                yield number, text.split(None, 1)[0] if first_word and text.strip() else text
            elif text.startswith(">"):
                if start:
                    yield start, "".join(parts)
                start, parts = number, []
            elif text.strip() and not text.startswith(";"):
                if not start:
                    raise DataError(f"{at(source.name, line=number)}: expected a FASTA title ('>…'), got {text[:40]!r}")
                parts.append("".join(text.split()))
        if source.kind == "fasta" and start:
            yield start, "".join(parts)
