"""How the cells of one column of a CSV file are spelled: learnt from some of them, applied to the values of all.

A cell as it stands between two delimiters is undressed (blanks around it, quotes), read as a value, and spelled again
as the column usually is.  Where that gives the cell again nothing needs to be kept of it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from functools import cached_property
from typing import Any

import numpy as np

from likely.data import moments
from likely.data.columns import Encoder, TableColumn
from likely.data.csvfile import Dialect
from likely.data.errors import DataError

_EXACT = 2.0**53
_KNOWN = 1 << 17  # spellings or values remembered at a time
_STYLES = 8
_SAMPLED = 1000  # numbers that styles are chosen by
_WIDEST = 1000  # characters that a cell may be filled up to
_EMPTY, _ABSENT, _NUMBER, _WORD = 1, 2, 4, 8  # classes of text that may be quoted without need


def snap(column: TableColumn, values: np.ndarray) -> np.ndarray:
    """Values as their place on the column's grid stands for them; no negative zero.

    A codec keeps the place and not the last bit of ``place * resolution``: the value is the float64 nearest to the
    decimal number that the place is.
    """
    if column.coded or column.resolution is None:
        return values + 0.0
    steps = np.rint(values / column.resolution)
    scale = Decimal(repr(column.resolution)).normalize()
    digits = -int(scale.as_tuple().exponent)
    multiple = int(scale.scaleb(digits)) if digits > 0 else int(scale) if scale == int(scale) else 0
    if not 0 < multiple < 1 << 31 or digits > 22:
        exact = steps * column.resolution
    else:
        exact = steps * multiple / 10.0 ** max(digits, 0)
    return np.where(np.abs(steps) * max(multiple, 1) < _EXACT, exact, values) + 0.0


def on_grid(column: TableColumn, values: np.ndarray) -> np.ndarray:
    """Which values the column allows: codes of its categories, or finite numbers on its grid."""
    with np.errstate(invalid="ignore"):
        if column.coded:
            return (values >= 0) & (values < len(column.categories or ())) & (values == np.rint(values))
        fits = np.isfinite(values)
        if column.resolution is not None:
            steps = np.where(fits, values, 0.0) / column.resolution
            fits = fits & (np.abs(steps - np.rint(steps)) <= 1e-3 + 1e-9 * np.abs(steps)) & np.isfinite(steps)
    return fits


# Numbers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Style:
    """How a number is spelled.

    Args:
        form: ``plain`` (no exponent), ``repr`` (as Python), ``g`` or ``e`` (as ``%g`` and ``%e``), or ``date``.
        digits: least decimals of ``plain``, precision of ``g`` and ``e``.
        plus: whether numbers from 0 up have a sign.
        bare: whether ``.5`` stands for ``0.5``.
        upper: whether the exponent is announced by ``E``.
        tight: whether the exponent has neither ``+`` nor leading zeros.
    """

    form: str = "plain"
    digits: int = 0
    plus: bool = False
    bare: bool = False
    upper: bool = False
    tight: bool = False

    def __post_init__(self) -> None:
        if self.form not in ("plain", "repr", "g", "e", "date") or not 0 <= self.digits <= 100:
            raise DataError(f"style: expected a way to spell numbers, got {self.form!r} with {self.digits} digits")

    def spell(self, values: Sequence[float]) -> list[str]:
        """The numbers as text, with a decimal point; all are finite."""
        match self.form:
            case "plain":
                out = _plain(values, self.digits)
            case "repr":
                out = list(map(repr, values))
            case _:
                pattern = f".{self.digits}{self.form}"
                out = [format(value, pattern) for value in values]
        if self.tight:
            out = [_tight(text) for text in out]
        if self.upper:
            out = [text.upper() for text in out]
        if self.bare:
            out = [text.replace("0.", ".", 1) if text.lstrip("-")[:2] == "0." else text for text in out]
        if self.plus:
            out = [text if text.startswith("-") else "+" + text for text in out]
        return out


def _plain(values: Sequence[float], least: int) -> list[str]:
    """The shortest digits that stand for each value, without an exponent, with at least so many decimals."""
    out = list(map(repr, values))
    if "e" in "".join(out):
        out = [_positional(text) if "e" in text else text for text in out]
    if least == 0:
        return [text[:-2] if text.endswith(".0") else text for text in out]
    if least == 1:
        return out
    return [text + "0" * (least - (len(text) - text.index(".") - 1)) for text in out]


def _positional(text: str) -> str:
    shown = format(Decimal(text), "f")
    return shown if "." in shown else shown + ".0"


def _tight(text: str) -> str:
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}e{int(exponent)}" if e else text


def _candidates(texts: Sequence[str]) -> list[Style]:
    """Styles that may have written such numbers, the simplest first."""
    plus = any(text.startswith("+") for text in texts)
    bare = any(text.lstrip("+-").startswith(".") for text in texts)
    powers = [text for text in texts if "e" in text or "E" in text]
    upper = any("E" in text for text in powers)
    tight = any(re.search(r"[eE](?:[1-9]|-[1-9](?!\d))", text) for text in powers)
    decimals = Counter(len(text.partition(".")[2]) for text in texts if text not in powers)
    least = sorted({0, 1, *(count for count, _ in decimals.most_common(6))})
    flags = [{"plus": p, "bare": b} for p in {False, plus} for b in {False, bare}]
    out = [Style("plain", digits, **flag) for digits in least if digits <= 100 for flag in flags]
    if powers:
        mantissas = Counter(len(re.split("[eE]", text)[0].partition(".")[2]) for text in powers)
        exponents = [{"upper": u, "tight": t} for u in {False, upper} for t in {False, tight}]
        out += [Style("repr", **flag, **e) for flag in flags for e in exponents]
        for form, precisions in (("g", range(1, 18)), ("e", [count for count, _ in mantissas.most_common(4)])):
            out += [Style(form, d, **flag, **e) for d in precisions if d <= 100 for flag in flags for e in exponents]
    return out


# Cells ------------------------------------------------------------------------------------------------------------


def undress(cell: str) -> tuple[str, bool]:
    """The text of a cell without blanks around it and quotes, and whether it had quotes.

    >>> undress(' "a ""b"" c" ')
    ('a "b" c', True)
    """
    core = cell.strip(" ")
    if len(core) > 1 and core[0] == core[-1] == '"':
        return core[1:-1].replace('""', '"'), True
    return core, False


# Columns ----------------------------------------------------------------------------------------------------------


@dataclass
class Spelling:
    """What is usual in one column of one file.

    Args:
        lead: blanks before a cell; with ``width`` as many as fill it up.
        width: 0, or characters of a cell with its blanks; they stand before it, or after it where ``lead`` is −1.
        trail: text behind every cell.
        quoted: classes of text that are quoted without need, a sum of bits.
        missing: spelling of a missing cell.
        suffix: text behind every number.
        styles: ways to spell a number, the usual one first.
        words: spelling of a category where it is not the schema's.
    """

    lead: int = 0
    width: int = 0
    trail: int = 0
    quoted: int = 0
    missing: str = ""
    suffix: str = ""
    styles: list[Style] = field(default_factory=lambda: [Style()])
    words: dict[int, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is at its default is left out."""
        default = asdict(Spelling())
        out = {name: value for name, value in asdict(self).items() if value != default[name]}
        if "styles" in out:
            plain = asdict(Style())
            out["styles"] = [{n: v for n, v in style.items() if v != plain[n]} for style in out["styles"]]
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Spelling:
        """The inverse of :meth:`to_dict`; raises :class:`DataError` for what is out of bounds."""
        rest = dict(values)
        styles = [Style(**style) for style in rest.pop("styles", [{}])]
        words = {int(code): str(text) for code, text in rest.pop("words", {}).items()}
        out = cls(styles=styles, words=words, **rest)
        whole = (out.lead, out.width, out.trail, out.quoted)
        if not all(isinstance(v, int) and -1 <= v <= _WIDEST for v in whole) or not 0 < len(styles) <= _STYLES:
            raise DataError("spelling: expected widths within bounds")
        if not (isinstance(out.missing, str) and isinstance(out.suffix, str)):
            raise DataError("spelling: expected texts")
        return out


class Speller:
    """Cells of one column of a CSV file as values, and values as cells.

    Args:
        column: what the schema says of the column; None for one that no model sees: its texts are kept.
        dialect: how the file is written.
        absent: spellings of a missing cell.
        spelling: what is usual in the column.
    """

    def __init__(
        self, column: TableColumn | None, dialect: Dialect, absent: Sequence[str], spelling: Spelling | None = None
    ) -> None:
        self.column = column
        self.coded = column is not None and column.coded
        usual = column.missing_as if column is not None else None
        self.spelling = spelling or Spelling(missing=next(iter(absent), "") if usual is None else usual)
        self.usual, self.placeholder = 0.0, math.nan
        self._absent = frozenset(absent)
        self._comma = dialect.decimal == ","
        self._pattern = dialect.number()
        self._strip = dialect.strip_suffix
        self._needs = re.compile(rf'[{re.escape(dialect.delimiter)}"\r\n]|^[ ]|[ ]$')
        self._encoder = None if self.column is None else Encoder(self.column, absent)
        self._values: dict[str, float] = {}  # cells that are spelled as usual
        self._odd: dict[str, tuple[float, int]] = {}  # others: value, and style or −1
        self._spelled: dict[float, str] = {}
        self._folded: dict[str, float] | None = None

    # Dress --------------------------------------------------------------------------------------------------------

    def dress(self, texts: Iterable[str]) -> list[str]:
        """Texts as cells: quoted and with blanks around them as usual in the column."""
        spelling = self.spelling
        quoted, search = spelling.quoted, self._needs.search
        if quoted == 0:
            out = ['"' + text.replace('"', '""') + '"' if search(text) else text for text in texts]
        else:
            out = [
                '"' + text.replace('"', '""') + '"' if self._class(text) & quoted or search(text) else text
                for text in texts
            ]
        if spelling.width:
            pad = str.ljust if spelling.lead < 0 else str.rjust
            out = [pad(text, spelling.width) for text in out]
        elif spelling.lead:
            before = " " * spelling.lead
            out = [before + text for text in out]
        if spelling.trail:
            behind = " " * spelling.trail
            out = [text + behind for text in out]
        return out

    def _class(self, text: str) -> int:
        if text == "":
            return _EMPTY
        if text in self._absent:
            return _ABSENT
        return _NUMBER if self._pattern.fullmatch(text) else _WORD

    # Reading ------------------------------------------------------------------------------------------------------

    def values(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """What the model sees of some texts, and which of them the schema allows; the others are 0."""
        column = self.column
        assert column is not None
        found = [self._value(text.removesuffix(self._strip)) for text in texts]
        allowed = np.array([value is not None for value in found], dtype=bool)
        values = np.array([0.0 if value is None else value for value in found], dtype=np.float64)
        absent = np.isnan(values)
        allowed &= np.where(absent, column.missing, on_grid(column, values))
        return snap(column, np.where(allowed, values, 0.0)), allowed

    def _value(self, text: str) -> float | None:
        """The value of a text, on the grid or not; NaN is missing, None is nothing that the column knows."""
        column, encoder = self.column, self._encoder
        assert column is not None and encoder is not None
        bare = text.strip()
        if column.coded:
            code = encoder.code(text)
            return self._fold(bare) if code is None else code
        if column.format is not None:
            return math.nan if bare in self._absent else _moment(bare)
        if self._pattern.fullmatch(bare):
            return float(bare.replace(",", ".") if self._comma else bare)
        return math.nan if bare in self._absent else None

    def _fold(self, bare: str) -> float | None:
        """The category that an unknown spelling stands for but for its case and full stops at its end."""
        assert self.column is not None
        if self._folded is None:
            categories = self.column.categories or ()
            self._folded = {c.casefold(): float(code) for code, c in reversed(list(enumerate(categories)))}
        code = self._folded.get(bare.casefold())
        return self._folded.get(bare.rstrip(".").strip().casefold()) if code is None else code

    def read(self, cells: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Values, shape ``(rows,)``; the places of cells that are not spelled as usual, and their style or −1.

        A cell of style −1 holds its true value where the schema allows it and a placeholder otherwise.
        """
        if len(self._values) > _KNOWN or len(self._odd) > _KNOWN:
            self._values, self._odd = {}, {}
        known, odd = self._values, self._odd
        values = list(map(known.get, cells))
        unknown = [row for row, value in enumerate(values) if value is None] if None in values else []
        new = [cell for cell in dict.fromkeys(map(cells.__getitem__, unknown)) if cell not in odd]
        if new:
            self._learn(new)
        places, styles = [], []
        for row in unknown:
            values[row] = value = known.get(cells[row])
            if value is None:
                values[row], style = odd[cells[row]]
                places.append(row)
                styles.append(style)
        return np.array(values, dtype=np.float64), np.array(places, dtype=np.int64), np.array(styles, dtype=np.int64)

    def _learn(self, cells: list[str]) -> None:
        cells = self._learn_numbers(cells)
        values, allowed = self.values([undress(cell)[0] for cell in cells])
        left = []
        for cell, value, allow, usual in zip(cells, values.tolist(), allowed.tolist(), self.write(values)):
            if not allow:
                self._odd[cell] = (self.placeholder, -1)
            elif cell == usual:
                self._values[cell] = value
            else:
                self._odd[cell] = (value, -1)
                left.append((cell, value))
        if self.coded or not left:
            return
        for style in range(len(self.spelling.styles) - 1, 0, -1):
            shown = self.write_styled(np.array([value for _, value in left]), np.full(len(left), style))
            self._odd.update((cell, (value, style)) for (cell, value), text in zip(left, shown) if cell == text)

    def _learn_numbers(self, cells: list[str]) -> list[str]:
        """Take in many plain numbers at once; the cells that are left."""
        column = self.column
        assert column is not None
        if column.coded or column.format is not None or self._comma or self.spelling.suffix or len(cells) < 8:
            return cells
        try:
            values = np.array(list(map(float, cells)))
        except ValueError:
            return cells
        fits = on_grid(column, values)
        values = snap(column, np.where(fits, values, 0.0))
        shown = self.write(values)
        rest = []
        for cell, value, text, fit in zip(cells, values.tolist(), shown, fits.tolist()):
            if fit and cell == text:
                self._values[cell] = value
            else:
                rest.append(cell)
        return rest

    # Writing ------------------------------------------------------------------------------------------------------

    def write(self, values: np.ndarray) -> list[str]:
        """Values as cells, spelled as usual; NaN is missing."""
        column = self.column
        assert column is not None
        absent = np.isnan(values)
        if column.coded:
            codes = np.where(absent, len(self._words) - 1, values).astype(np.int64)
            if len(codes) and (codes.min() < 0 or codes.max() >= len(self._words)):
                raise DataError(f"column {column.name!r}: expected codes of its categories")
            return self._words[codes].tolist()
        snapped = snap(column, np.where(absent, 0.0, values)).tolist()
        spelled = self._spelled
        new = [value for value in dict.fromkeys(snapped) if value not in spelled]
        if new:
            if len(spelled) > _KNOWN:
                spelled.clear()
                new = list(dict.fromkeys(snapped))
            spelled.update(zip(new, self._number(new, 0)))
        out = list(map(spelled.__getitem__, snapped))
        if absent.any():
            missing = self.dress([self.spelling.missing])[0]
            for row in np.flatnonzero(absent).tolist():
                out[row] = missing
        return out

    def write_styled(self, values: np.ndarray, styles: np.ndarray) -> list[str]:
        """Numbers as cells, each in a style of its own."""
        assert self.column is not None
        out = self.write(values)
        values = snap(self.column, values)
        for style in np.unique(styles).tolist():
            rows = np.flatnonzero((styles == style) & ~np.isnan(values)).tolist()
            for row, text in zip(rows, self._number(values[rows].tolist(), style)):
                out[row] = text
        return out

    def _number(self, values: Sequence[float], style: int) -> list[str]:
        column = self.column
        assert column is not None
        if not all(map(math.isfinite, values)):
            raise DataError(f"column {column.name!r}: expected finite numbers")
        way = self.spelling.styles[style]
        if way.form == "date":
            return self.dress([_spell_moment(value, column.format or "") for value in values])
        out = way.spell(values)
        if self._comma:
            out = [text.replace(".", ",") for text in out]
        if self.spelling.suffix:
            out = [text + self.spelling.suffix for text in out]
        return self.dress(out)

    @cached_property
    def _words(self) -> np.ndarray:
        """The cell of each category, and at the end that of a missing one."""
        assert self.column is not None
        categories = self.column.categories or ()
        texts = [self.spelling.words.get(code, category) for code, category in enumerate(categories)]
        words = np.empty(len(texts) + 1, dtype=object)
        words[:] = self.dress([*texts, self.spelling.missing])
        return words

    # Learning -----------------------------------------------------------------------------------------------------

    def study(self, sample: Counter[str]) -> None:
        """Find out what is usual from some cells and how often each came, and choose the placeholder."""
        undressed = {cell: undress(cell) for cell in sample}
        self._study_dress(sample, undressed)
        if self.column is None:
            return
        often: Counter[str] = Counter()
        for cell, count in sample.items():
            often[undressed[cell][0]] += count
        texts = list(often)
        if not self.coded:
            texts = texts[:: 1 + len(texts) // _SAMPLED]
        values, allowed = self.values(texts)
        by_value: dict[float, Counter[str]] = {}
        absent: Counter[str] = Counter()
        for text, value, allow in zip(texts, values.tolist(), allowed.tolist()):
            if math.isnan(value) or (not allow and text.removesuffix(self._strip).strip() in self._absent):
                absent[text] += often[text]
            elif allow:
                by_value.setdefault(value, Counter())[text] += often[text]
        if absent:
            self.spelling.missing = absent.most_common(1)[0][0]
        if self.coded:
            categories = self.column.categories or ()
            usual = {int(code): spelled.most_common(1)[0][0] for code, spelled in by_value.items()}
            self.spelling.words = {code: text for code, text in sorted(usual.items()) if text != categories[code]}
        else:
            self._study_numbers([(text, value) for value, spelled in by_value.items() for text in spelled], often)
        totals = {value: spelled.total() for value, spelled in by_value.items()}
        self.usual = max(totals, key=totals.__getitem__) if totals else 0.0
        self.placeholder = math.nan if self.column.missing else self.usual

    def _study_dress(self, sample: Counter[str], undressed: Mapping[str, tuple[str, bool]]) -> None:
        margins: Counter[tuple[int, int]] = Counter()
        right: Counter[int] = Counter()
        left: Counter[int] = Counter()
        forced = dict.fromkeys((_EMPTY, _ABSENT, _NUMBER, _WORD), 0)
        for cell, count in sample.items():
            text, quoted = undressed[cell]
            core = cell.strip(" ")
            before = len(cell) - len(cell.lstrip(" ")) if core else len(cell)
            behind = len(cell) - before - len(core)
            margins[before, behind] += count
            right[len(cell)] += count * (behind == 0)
            left[len(cell)] += count * (before == 0)
            if not self._needs.search(text):
                forced[self._class(text)] += count if quoted else -count
        spelling = self.spelling
        spelling.quoted = sum(bit for bit, balance in forced.items() if balance > 0)
        if not margins:
            return
        (before, behind), often = margins.most_common(1)[0]
        for widths, lead in ((right, 0), (left, -1)):
            # A cell longer than the width has no blanks before it: the width is not the most usual length alone.
            width = widths.most_common(1)[0][0]
            fits = sum(count for cell, count in sample.items() if self._filled(cell, width, lead))
            if fits > often and width <= _WIDEST:
                spelling.width, spelling.lead, often = width, lead, fits
        if not spelling.width and max(before, behind) <= _WIDEST:
            spelling.lead, spelling.trail = before, behind

    @staticmethod
    def _filled(cell: str, width: int, lead: int) -> bool:
        core = cell.strip(" ")
        return cell == (core.ljust(width) if lead < 0 else core.rjust(width))

    def _study_numbers(self, found: list[tuple[str, float]], often: Counter[str]) -> None:
        """The styles that give most of the sampled numbers, the best first, then what it leaves over."""
        column, spelling = self.column, self.spelling
        assert column is not None
        if column.format is not None:
            spelling.styles = [Style("date")]
            return
        if self._strip and 2 * sum(text.endswith(self._strip) for text, _ in found) > len(found):
            spelling.suffix = self._strip
        rest = []
        for text, value in found:
            bare = text.removesuffix(spelling.suffix)
            rest.append((bare.replace(",", ".") if self._comma else bare, value, often[text]))
        styles: list[Style] = []
        while rest and len(styles) < _STYLES:
            best, most = None, 0
            values = [value for _, value, _ in rest]
            for style in _candidates([text for text, _, _ in rest]):
                shown = style.spell(values)
                score = sum(count for (text, _, count), other in zip(rest, shown) if text == other)
                if score > most:
                    best, most = style, score
            if best is None or (styles and most < 3):
                break
            styles.append(best)
            rest = [entry for entry, text in zip(rest, best.spell(values)) if entry[0] != text]
        spelling.styles = styles or [Style()]


def _moment(bare: str) -> float | None:
    try:
        return None if moments.recognise(bare) is None else float(moments.parse(bare))
    except ValueError:
        return None


def _spell_moment(value: float, format: str) -> str:
    try:
        return moments.spell(round(value), format)
    except (OverflowError, ValueError):
        raise DataError(f"expected a date, got {value:g} microseconds since 1970") from None
