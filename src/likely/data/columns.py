"""What a column of a table is: gathered in one pass over its cells, in memory that does not grow with the rows."""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from decimal import Decimal
from typing import Any, Literal, cast, get_args

import numpy as np

from likely.contract import Column, ColumnKind
from likely.data import moments as dates
from likely.data.csvfile import INFINITE, MISSING, MISSING_AMONG_NUMBERS, NUMBER
from likely.data.errors import DataError, at, some

Role = Literal["model", "given", "ignore"]

#: Distinct values that inference keeps of a column; a column of text with more is not modelled.
MOST_CATEGORIES = 1 << 18
#: A real column with more grid steps than this between its least and greatest value is a continuum.
MOST_STEPS = 1 << 24
#: Distinct values up to which a column without a grid is ordinal if each comes often.
_FEW = 64
_EXACT = 2.0**53
_NOTHING = "\0"  # a missing cell among texts
_LEADING_ZERO = re.compile(r"[+-]?0\d")
_KEY_NAME = re.compile(r"(.*[_ -])?(id|uuid|guid|key|index)|unnamed: 0|.*Id|.*ID|rowid|row", re.ASCII)
_DRESSED = re.compile(r"([+-]?)([$€£¥] ?)?(\d[\d.,]*)( ?[%€$£¥])?", re.ASCII)
_TRUTH = ({"False", "True"}, {"false", "true"}, {"FALSE", "TRUE"})


@dataclass(frozen=True)
class TableColumn:
    """A column as the user has it, and what the model sees of it.

    Args:
        name: its name, unique in the table.
        role: ``model``, ``given`` (part of the condition) or ``ignore``.
        kind: ``real``, ``integer``, ``ordinal``, ``categorical`` or ``binary``.
        dtype: how it is held in a DataFrame; ``category:int64`` is a pandas categorical of int64.
        categories: spellings, in the order of their codes, of a coded column.
        resolution: spacing of the grid of a numeric column; None is a continuum.
        decimals: least and most decimals when written; None writes the shortest form.
        missing: whether a cell may be missing.
        aliases: other spellings that are read as one of the categories.
        missing_as: spelling of a missing cell when written; None takes the table's first.
        format: how a date is spelled, as in ``strftime``; the cell's value is microseconds since 1970.
        unit: unit of measurement, for people and reports.
        prefix, suffix: what stands before and after every number, such as ``$`` or ``%``; the sign stands before both.
        thousands: what stands between the thousands of a number with prefix or suffix.
        label: the user's own name where it is no text (pandas) or occurs twice.
        note: what inference has to say of it.
    """

    name: str
    role: Role = "model"
    kind: ColumnKind = "real"
    dtype: str = "float64"
    categories: tuple[str, ...] | None = None
    resolution: float | None = None
    decimals: tuple[int, int] | None = None
    missing: bool = False
    aliases: Mapping[str, str] = field(default_factory=dict)
    missing_as: str | None = None
    format: str | None = None
    unit: str | None = None
    prefix: str = ""
    suffix: str = ""
    thousands: str = ""
    label: str | int | float | tuple[Any, ...] | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        if self.role not in get_args(Role):
            raise DataError(f"column {self.name!r}: expected role 'model', 'given' or 'ignore', got {self.role!r}")
        if self.categories is not None:
            object.__setattr__(self, "categories", tuple(str(c) for c in self.categories))
        if self.decimals is not None:
            object.__setattr__(self, "decimals", tuple(int(d) for d in self.decimals))
        if isinstance(self.label, list):
            object.__setattr__(self, "label", tuple(self.label))
        if self.kind == "integer" and self.resolution is None:
            object.__setattr__(self, "resolution", 1.0)
        if self.role == "ignore":
            return
        if self.coded:
            if not self.categories:
                raise DataError(f"column {self.name!r}: kind {self.kind!r} needs categories = [...]")
            if len(set(self.categories)) != len(self.categories):
                twice = [c for c, n in Counter(self.categories).items() if n > 1]
                raise DataError(f"column {self.name!r}: expected distinct categories, got {some(twice)} more than once")
            if self.kind == "binary" and len(self.categories) != 2:
                raise DataError(
                    f"column {self.name!r}: expected 2 categories for kind 'binary', got {len(self.categories)}"
                )
            for alias, category in self.aliases.items():
                if category not in self.categories:
                    raise DataError(f"column {self.name!r}: alias {alias!r} stands for {category!r}, not a category")
        self.model_column()  # raises where kind and resolution do not go together

    @property
    def coded(self) -> bool:
        """Whether a cell is a category."""
        return self.kind in ("ordinal", "categorical", "binary")

    @property
    def textual(self) -> bool:
        """Whether a cell is text in the user's file."""
        return (
            self.format is not None
            or self.dressed
            or (self.coded and not _numeric_dtype(self.dtype) and self.dtype not in ("bool", "boolean"))
        )

    @property
    def dressed(self) -> bool:
        """Whether numbers are written with something before or after them, and are text in a DataFrame."""
        return bool(self.prefix or self.suffix)

    @property
    def user_label(self) -> Any:
        """The column's name as the user has it."""
        return self.name if self.label is None else self.label

    def model_column(self) -> Column:
        """The column as the contract has it."""
        levels = len(self.categories) if self.coded and self.categories is not None else None
        return Column(self.name, self.kind, levels, None if self.coded else self.resolution, self.missing)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is at its default is left out."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            default = {} if f.name == "aliases" else f.default
            if f.name in ("name", "role", "kind", "dtype") or value != default:
                out[f.name] = list(value) if isinstance(value, tuple) else dict(value) if f.name == "aliases" else value
        return out


# --------------------------------------------------------------------------------------------------------------
# Cells
# --------------------------------------------------------------------------------------------------------------


@dataclass
class TextCells:
    """Cells as spelled in a file."""

    cells: Sequence[str]
    number: re.Pattern[str] = NUMBER
    comma: bool = False

    def __len__(self) -> int:
        return len(self.cells)


@dataclass
class NumberCells:
    """Cells that are numbers already; NaN is missing."""

    values: np.ndarray
    dtype: str
    single: bool = False

    def __len__(self) -> int:
        return len(self.values)


@dataclass
class KeyCells:
    """Cells that are categories already, by their spelling; None is missing."""

    keys: Sequence[str | None]
    dtype: str
    categories: tuple[str, ...] | None = None
    ordered: bool = False

    def __len__(self) -> int:
        return len(self.keys)


Cells = TextCells | NumberCells | KeyCells


@dataclass
class Where:
    """Names the place of a cell in messages: lines of a file, or positions in an object."""

    name: str
    lines: Sequence[int] | None = None
    start: int = 0

    def cell(self, index: int, column: str) -> str:
        """The place of cell ``index`` of the chunk."""
        if self.lines is not None:
            return at(self.name, line=int(self.lines[index]), column=column)
        return at(self.name, row=self.start + index, column=column)


def spell(value: float) -> str:
    """The shortest spelling of a number; whole ones without a point.

    >>> spell(3.0), spell(0.1)
    ('3', '0.1')
    """
    return str(int(value)) if value == int(value) and abs(value) < _EXACT else repr(float(value))


@dataclass(frozen=True)
class Dress:
    """What numbers wear: ``$1,234.50`` and ``12 %``.

    >>> dress, plain = Dress.of("-$1,234.50")
    >>> plain, dress.put_on(plain), dress.put_on("7")
    ('-1234.50', '-$1,234.50', '$7')

    Args:
        prefix, suffix: before and after the number.
        thousands: between thousands; None where no number had as many digits.
    """

    prefix: str
    suffix: str
    thousands: str | None = None

    @classmethod
    def of(cls, cell: str, comma: bool = False) -> tuple[Dress, str] | None:
        """The dress of a cell and the plain number in it, with a decimal point; None where it wears none.

        Args:
            comma: the file has decimal commas.
        """
        match = _DRESSED.fullmatch(cell)
        if match is None or not (match[2] or match[4]):
            return None
        mark, point = (".", ",") if comma else (",", ".")
        whole, _, fraction = match[3].partition(point)
        groups = whole.split(mark)
        grouped = len(groups) > 1 and len(groups[0]) <= 3 and all(len(group) == 3 for group in groups[1:])
        if (len(groups) > 1 and not grouped) or mark in fraction or point in fraction:
            return None
        digits = "".join(groups)
        if _LEADING_ZERO.match(digits):
            return None
        thousands = mark if len(groups) > 1 else "" if len(digits) > 3 else None
        tail = f".{fraction}" if point in match[3] else ""
        return cls(match[2] or "", match[4] or "", thousands), f"{match[1]}{digits}{tail}"

    def joined(self, other: Dress) -> Dress | None:
        """The dress of a column in which both occur; None where they do not go together."""
        if (self.prefix, self.suffix) != (other.prefix, other.suffix):
            return None
        if self.thousands is not None and other.thousands is not None and self.thousands != other.thousands:
            return None
        return self if other.thousands is None else other

    def put_on(self, number: str) -> str:
        """The number, plain and with a decimal point, as the user writes it."""
        sign = number[:1] if number[:1] in "+-" else ""
        whole, point, fraction = number[len(sign) :].partition(".")
        if self.thousands:
            whole = f"{int(whole):,}".replace(",", self.thousands)
        mark = "," if self.thousands == "." else "."
        return f"{sign}{self.prefix}{whole}{point and mark}{fraction}{self.suffix}"


# --------------------------------------------------------------------------------------------------------------
# Inference
# --------------------------------------------------------------------------------------------------------------


class Summary:
    """What is known of a column after the cells seen so far.

    Args:
        name: the column's name, for messages.
        absent: spellings that mean a missing cell; None takes the usual ones.
    """

    def __init__(self, name: str, absent: Sequence[str] | None = None) -> None:
        self.name = name
        self._always = frozenset(MISSING if absent is None else absent)
        self._among_numbers = frozenset(MISSING_AMONG_NUMBERS if absent is None else ())
        self.rows = 0
        self.blank = 0  # missing cells that have no spelling
        self.spelled: Counter[str] = Counter()  # missing cells by spelling
        self.doubtful: Counter[str] = Counter()  # spellings that are missing only among numbers
        self.numbers = 0
        self.texts = 0
        self.first_text: tuple[str, str] | None = None
        self.first_infinite: tuple[str, str] | None = None
        self.distinct: dict[str, None] = {}
        self.overflow = False
        self.low, self.high = math.inf, -math.inf
        self.whole = True
        self.decimals: tuple[int, int] | None = None
        self.shortest = False  # some numbers have no bounded number of decimals
        self.divisor = 0
        self.leading_zero = False
        self.exponent = False
        self.counter = True
        self._last: float | None = None
        self.moments: str | None = ""  # format of the dates so far; None once some text is none of that format
        self.dtype: str | None = None
        self.categories: tuple[str, ...] | None = None
        self.ordered = False
        self.dress: Dress | None = None  # of the text so far
        self.undressed: Summary | None = None  # of the numbers in it; None once some text wears another dress, or none

    # Adding cells -------------------------------------------------------------------------------------------------

    def add(self, cells: Cells, where: Where) -> None:
        """Take in a chunk of cells."""
        self.rows += len(cells)
        if isinstance(cells, TextCells):
            self._add_text(cells, where)
        elif isinstance(cells, NumberCells):
            self._add_numbers(cells, where)
        else:
            self._add_keys(cells, where)

    def _remember(self, keys: Sequence[str]) -> None:
        if not self.overflow:
            self.distinct.update(dict.fromkeys(keys))
            if len(self.distinct) > MOST_CATEGORIES:
                self.overflow, self.distinct = True, {}

    def _add_text(self, chunk: TextCells, where: Where) -> None:
        counts = Counter(chunk.cells)
        values: list[float] = []
        moments: list[int] = []
        present: list[str] = []
        dressed: Counter[str] = Counter()
        for cell, count in counts.items():
            bare = cell.strip()
            if bare in self._always:
                self.spelled[bare] += count
                continue
            if bare in self._among_numbers:
                self.doubtful[cell] += count
                continue
            present.append(cell)
            plain = bare.replace(",", ".") if chunk.comma else bare
            if chunk.number.fullmatch(bare) and math.isfinite(float(plain)):
                self.numbers += count
                values.append(float(plain))
                self._add_spelling(plain)
            elif INFINITE.fullmatch(bare) or chunk.number.fullmatch(bare):
                self.numbers += count
                if self.first_infinite is None:
                    self.first_infinite = (where.cell(chunk.cells.index(cell), self.name), cell)
            else:
                self.texts += count
                if self.first_text is None:
                    self.first_text = (where.cell(chunk.cells.index(cell), self.name), cell)
                self._add_moment(bare, moments)
                dressed[bare] += count
        self._remember(present)
        self._add_dressed(dressed, chunk.comma, where)
        if self.moments and moments and not self.numbers:
            self._measure(np.array(moments, dtype=np.float64))
        if values:
            self._measure(np.array(values))
            if self.counter:
                plain_cells = [c.replace(",", ".") if chunk.comma else c for c in chunk.cells]
                self._follow(plain_cells)

    def _add_moment(self, bare: str, found: list[int]) -> None:
        if self.moments is None:
            return
        format_ = dates.recognise(bare)
        if format_ is None or (self.moments and format_ != self.moments):
            self.moments = None
            return
        try:
            found.append(dates.parse(bare))
            self.moments = format_
        except ValueError:
            self.moments = None

    def _add_dressed(self, cells: Counter[str], comma: bool, where: Where) -> None:
        """Take in text that may be numbers with a currency or a percent sign."""
        if not cells or (self.dress is not None and self.undressed is None):
            return
        plain: list[str] = []
        for cell, count in cells.items():
            found = Dress.of(cell, comma)
            joined = found and (found[0] if self.dress is None else self.dress.joined(found[0]))
            if not found or joined is None:
                self.dress, self.undressed = Dress("", ""), None
                return
            self.dress = joined
            plain += [found[1]] * count
        if self.undressed is None:
            self.undressed = Summary(self.name, sorted(self._always))
            self.undressed.counter = False
        self.undressed.add(TextCells(plain), where)

    def _add_spelling(self, bare: str) -> None:
        self.leading_zero |= bool(_LEADING_ZERO.match(bare))
        if "e" in bare or "E" in bare:
            self.exponent = True
            count = max(0, -cast(int, Decimal(bare).as_tuple().exponent))
            self.whole &= float(bare).is_integer()
        else:
            fraction = bare.partition(".")[2]
            count = len(fraction)
            self.whole &= not fraction.strip("0")
        low, high = self.decimals or (count, count)
        self.decimals = (min(low, count), max(high, count))

    def _follow(self, cells: Sequence[str]) -> None:
        """Whether the cells so far count up by one, row by row: a row number."""
        try:
            values = np.array([int(cell) for cell in cells], dtype=np.float64)
        except (ValueError, OverflowError):
            self.counter = False
            return
        self._follow_values(values)

    def _follow_values(self, values: np.ndarray) -> None:
        if not self.counter or not len(values):
            return
        steps = np.diff(values) if self._last is None else np.diff(values, prepend=self._last)
        self.counter = bool((steps == 1).all())
        self._last = float(values[-1])

    def _measure(self, values: np.ndarray) -> None:
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        if self.whole and max(abs(self.low), abs(self.high)) < _EXACT:
            self.divisor = math.gcd(self.divisor, int(np.gcd.reduce(values.astype(np.int64))))

    def _add_numbers(self, chunk: NumberCells, where: Where) -> None:
        self._same_dtype(chunk.dtype, where)
        values = chunk.values
        absent = np.isnan(values)
        self.blank += int(absent.sum())
        if absent.any():
            self.counter = False
            values = values[~absent]
        self.numbers += len(values)
        infinite = np.isinf(values)
        if infinite.any():
            if self.first_infinite is None:
                index = int(np.flatnonzero(np.isinf(chunk.values))[0])
                self.first_infinite = (where.cell(index, self.name), str(chunk.values[index]))
            return
        if not len(values):
            return
        unique = np.unique(values)
        self.whole = self.whole and bool((unique == np.round(unique)).all())
        if not self.shortest:
            found = count_decimals(unique, chunk.single)
            if found is None:
                self.shortest = True
            else:
                low = 0 if _whole_dtype(chunk.dtype) else min(1, found)
                self.decimals = (low, max(found, self.decimals[1] if self.decimals else found, low))
        self._measure(unique)
        self._follow_values(values)
        if not self.overflow:
            if self.whole or len(unique) <= _FEW:
                self._remember([spell(float(v)) for v in unique])
            else:
                self.overflow, self.distinct = True, {}

    def _add_keys(self, chunk: KeyCells, where: Where) -> None:
        self._same_dtype(chunk.dtype, where)
        self.categories, self.ordered = chunk.categories, chunk.ordered
        counts = Counter(chunk.keys)
        self.blank += counts.pop(None, 0)
        present = []
        for key, count in cast(Counter[str], counts).items():
            if chunk.categories is None and key.strip() in self._always:
                self.spelled[key.strip()] += count
                continue
            if self.first_text is None:
                self.first_text = (where.cell(chunk.keys.index(key), self.name), key)
            self.texts += count
            present.append(key)
        self._remember(present)
        if chunk.categories is None:
            self._add_dressed(Counter({key.strip(): counts[key] for key in present}), False, where)

    def _same_dtype(self, dtype: str, where: Where) -> None:
        if self.dtype is not None and self.dtype != dtype:
            raise DataError(f"{where.cell(0, self.name)}: expected dtype {self.dtype}, got {dtype}")
        self.dtype = dtype

    # Conclusions --------------------------------------------------------------------------------------------------

    @property
    def absent(self) -> int:
        """Number of missing cells, those spelled in a doubtful way not counted."""
        return self.blank + sum(self.spelled.values())

    @property
    def present(self) -> int:
        """Number of cells that are not missing."""
        return self.numbers + self.texts

    def conclude(self, override: Mapping[str, Any] | None = None, allow_missing: bool = False) -> TableColumn:
        """The column, as inferred and with the user's word where there is one."""
        said = dict(override or {})
        notes: list[str] = []
        if said.get("role") == "ignore":
            return TableColumn(**{"name": self.name, "kind": "categorical", "dtype": self.dtype or "str", **said})
        moments = self.dtype is None and bool(self.moments) and self.texts > 0 and not self.numbers
        if moments and said.get("kind", "integer") == "integer" and "categories" not in said:
            self.dtype = "datetime64[us]"
            said.setdefault("format", self.moments)
            self.texts, self.numbers, self.counter = 0, self.texts, False
        if self.undressed is not None and not self.numbers and self._may_undress(said):
            return self._conclude_dressed(said, allow_missing)
        if self.dtype is not None:
            numeric = self.numbers > 0
        elif said.get("kind") in ("categorical", "ordinal", "binary"):
            numeric = self.numbers > 0 and self.texts == 0 and not self.leading_zero
        else:
            numeric = self.numbers > 0 and not self._is_text()
        absent = self.absent + (sum(self.doubtful.values()) if numeric or not self.texts else 0)
        if self.texts and self.doubtful:
            self._remember(list(self.doubtful))
            self.texts += sum(self.doubtful.values())
            notes.append(f"{some(self.doubtful)} kept as a category; missing = [...] makes it a missing cell")
        if self.spelled and self.dtype is not None:
            notes.append(f"{some(self.spelled)} read as missing ({sum(self.spelled.values())} cells)")
        base: dict[str, Any] = {"name": self.name, "missing": absent > 0 or allow_missing}
        spellings = self.spelled + self.doubtful if numeric else self.spelled
        if spellings:
            base["missing_as"] = spellings.most_common(1)[0][0]
        if self.first_infinite is not None and (numeric or self.dtype is not None):
            place, value = self.first_infinite
            raise DataError(
                f"{place}: expected a finite number, got {value!r}; mend the cell, or make it missing "
                f"(missing = [{value!r}])"
            )
        if not self.present and not self.texts:
            said.setdefault("role", "ignore")
            notes.append("every cell is missing: not modelled")
            base.update(kind="categorical", dtype=self.dtype or "float64")
        elif numeric and said.get("kind") not in ("categorical", "ordinal", "binary"):
            self._conclude_number(base, said, notes)
        else:
            self._conclude_category(base, said, notes, numeric)
        base.update(said)
        if notes:
            base["note"] = "; ".join([*([base["note"]] if base.get("note") else []), *notes])
        return TableColumn(**base)

    def _may_undress(self, said: Mapping[str, Any]) -> bool:
        return said.get("kind") in (None, "real", "integer", "ordinal") and "categories" not in said

    def _conclude_dressed(self, said: dict[str, Any], allow_missing: bool) -> TableColumn:
        """A column of numbers with a currency or a percent sign."""
        assert self.dress is not None and self.undressed is not None
        inner = self.undressed
        inner.rows, inner.blank, inner.spelled, inner.doubtful = self.rows, self.blank, self.spelled, self.doubtful
        override = {name: value for name, value in said.items() if name != "dtype"}
        column = inner.conclude({"role": "model", **override}, allow_missing)
        if column.coded:  # few values: they stay the user's spellings
            self.undressed = None
            return self.conclude(said, allow_missing)
        worn: dict[str, Any] = {"prefix": self.dress.prefix, "suffix": self.dress.suffix, "dtype": self.dtype or "str"}
        worn["thousands"] = self.dress.thousands or ""
        if "unit" not in said:
            worn["unit"] = (self.dress.prefix + self.dress.suffix).strip()
        return replace(column, **worn)

    def _is_text(self) -> bool:
        """Whether spelled cells are text: some cell is no number, or numbers have leading zeros."""
        if self.texts == 0:
            return self.leading_zero
        if self.numbers >= 0.9 * self.present and self.numbers > 20:
            assert self.first_text is not None
            place, value = self.first_text
            raise DataError(
                f"{place}: expected a number as in {self.numbers} other cells, got {value!r}; mend the cell, make it "
                f'missing (missing = [{value!r}]), or declare the column kind = "categorical"'
            )
        return True

    def _conclude_number(self, base: dict[str, Any], said: dict[str, Any], notes: list[str]) -> None:
        kind = said.get("kind")
        least, most = self.decimals or (0, 0)
        if self.exponent or self.shortest:
            base["decimals"] = None
        else:
            base["decimals"] = (least, most)
        huge = max(abs(self.low), abs(self.high)) >= _EXACT
        if self.dtype is not None and self.dtype.startswith(("datetime", "timedelta")):
            base["resolution"] = float(self.divisor or 1)
            base["decimals"] = None
        if self.dtype is None:
            base["dtype"] = "int64" if self.whole and most == 0 and not base["missing"] and not huge else "float64"
        else:
            base["dtype"] = self.dtype
        few = 0
        if kind is None:
            dated = self.dtype is not None and self.dtype.startswith(("datetime", "timedelta"))
            few = 0 if self.overflow or dated else len({_number(key) for key in self.distinct})
            if few == 1 and self.low == self.high:
                said_levels = {"kind": "categorical", "categories": (self._plain(next(iter(self.distinct))),)}
                base.update(said_levels)
                notes.append("constant")
                return
            if few == 2 and not huge and self.present >= (5 if self.whole else 20):
                as_spelled = tuple(sorted({self._plain(key) for key in self.distinct}, key=lambda k: _number(k)))
                both = as_spelled if len(as_spelled) == 2 else (spell(self.low), spell(self.high))
                base.update(kind="binary", categories=both)
                return
        if kind == "integer" and not self.whole:
            raise DataError(f'column {self.name!r}: declared kind = "integer", but it has cells with decimals')
        if self.whole and kind != "real":
            base["kind"] = "integer"
            if huge:
                said.setdefault("role", "ignore")
                notes.append("whole numbers beyond 2^53, which float64 does not hold exactly: not modelled")
            if self._is_key(keyed_only=not self.counter or self.present < 20):
                said.setdefault("role", "ignore")
                notes.append('looks like an identifier: not modelled; role = "model" includes it')
            if self.divisor > 1 and "resolution" not in base and "resolution" not in said:
                notes.append(f"all are multiples of {self.divisor}; resolution = {self.divisor} if that is the grid")
            return
        base["kind"] = "real"
        if "resolution" in said:
            return
        if not self.shortest and most <= 15 and (self.high - self.low) * 10.0**most <= MOST_STEPS:
            base["resolution"] = float(f"1e-{most}")
        else:
            if most + len(str(int(max(abs(self.low), abs(self.high))))) > 15:
                base["decimals"] = None  # more digits than float64 keeps: the shortest form
            if kind is None and 0 < few <= _FEW and self.present >= 20 * few:
                values = tuple(sorted({spell(_number(key)) for key in self.distinct}, key=float))
                base.update(kind="ordinal", categories=values)
                notes.append(f"only {few} distinct values: a density would be infinite on them")
            elif not self.shortest:
                notes.append(
                    f"{most} decimals make more than 2^24 steps: taken as a continuum; resolution = 1e-{most} if they "
                    f"are meant"
                )

    def _plain(self, key: str) -> str:
        return key if self.dtype is not None else key.strip()

    def _is_key(self, keyed_only: bool) -> bool:
        """Whether no value comes twice and the column counts rows, or is named as a key."""
        if self.absent:
            return False
        if self.counter and not keyed_only:
            return True
        unique = not self.overflow and len(self.distinct) == self.rows
        return unique and self.rows >= 20 and bool(_KEY_NAME.fullmatch(self.name))

    def _conclude_category(self, base: dict[str, Any], said: dict[str, Any], notes: list[str], numeric: bool) -> None:
        kind = said.get("kind")
        if kind in ("real", "integer"):
            assert self.first_text is not None or self.leading_zero
            place, value = self.first_text or (f"column {self.name!r}", "a number with a leading zero")
            raise DataError(f"{place}: declared kind = {kind!r}, but the cell is {value!r}")
        base["dtype"] = self.dtype or ("int64" if numeric and self.whole else "float64" if numeric else "str")
        base["kind"] = "categorical"
        if self.categories is not None:
            base.update(categories=self.categories, kind="ordinal" if self.ordered else "categorical")
        elif "categories" not in said:
            if self.overflow:
                said.setdefault("role", "ignore")
                notes.append(f"more than {MOST_CATEGORIES} distinct values: not modelled")
                base["note"] = None
                return
            keys = {self._plain(key) for key in self.distinct}
            if numeric:
                keys = {spell(_number(key)) for key in keys}
            base["categories"] = tuple(sorted(keys, key=float) if numeric else sorted(keys))
        categories = tuple(said.get("categories", base.get("categories", ())))
        if self.dtype is None and not numeric and set(categories) in _TRUTH:
            base["dtype"] = "boolean" if base["missing"] else "bool"
        if len(categories) == 2 and base["kind"] == "categorical":
            base["kind"] = "binary"
        if len(categories) == 1:
            notes.append("constant")
        free = not numeric and self.categories is None and self.present >= 20
        if free and "role" not in said and len(self.distinct) >= 0.95 * self.present:
            base.update(role="ignore", categories=None)
            notes.append(
                'looks like an identifier (hardly any value comes twice): not modelled; role = "model" includes it'
            )
        if kind == "ordinal" and "categories" not in said and not self.ordered:
            notes.append("order of the categories is that of sorting; categories = [...] gives another")


def count_decimals(values: np.ndarray, single: bool = False, most: int = 12) -> int | None:
    """Decimals needed to write all values exactly as their shortest decimal form has them; None if more than ``most``.

    A value has d decimals if round(v 10^d) / 10^d is v itself: the division is correctly rounded, so it gives the
    float that the decimal form stands for.

    >>> count_decimals(np.array([0.25, 3.1, 7.0]))
    2

    Args:
        single: the values were float32, and are compared in that precision.
    """
    rest = values.astype(np.float64)
    for decimals in range(most + 1):
        scaled = rest * 10.0**decimals
        if (np.abs(scaled) >= _EXACT).any():
            return None
        nearest = np.rint(scaled) / 10.0**decimals
        agrees = nearest.astype(np.float32) == rest.astype(np.float32) if single else nearest == rest
        rest = rest[~agrees]
        if not len(rest):
            return decimals if not single or decimals <= 5 else None
    return None


def _number(spelling: str) -> float:
    return float(spelling.strip().replace(",", "."))


def _whole_dtype(dtype: str) -> bool:
    return dtype.lower().startswith(("int", "uint", "datetime", "timedelta"))


def _numeric_dtype(dtype: str) -> bool:
    return dtype.lower().startswith(("int", "uint", "float", "datetime", "timedelta", "double"))


# --------------------------------------------------------------------------------------------------------------
# To codes and back
# --------------------------------------------------------------------------------------------------------------


class Encoder:
    """Turns the cells of one column into float64: the value itself, or the code of the category; NaN is missing.

    Args:
        column: what the column is.
        absent: the table's spellings of a missing cell.
    """

    def __init__(self, column: TableColumn, absent: Sequence[str]) -> None:
        self._column = column
        self._absent = frozenset(absent)
        self._codes: dict[str | None, float] = {}
        if column.coded:
            self._codes = {category: float(code) for code, category in enumerate(column.categories or ())}
            for alias, category in column.aliases.items():
                self._codes.setdefault(alias, self._codes[category])
            for spelling in absent:
                self._codes.setdefault(spelling, math.nan)
            self._codes.setdefault(None, math.nan)
        self._by_value: dict[float, float] | None = None

    def encode(self, cells: Cells, where: Where) -> np.ndarray:
        """Codes or values, shape ``(rows,)``; raises :class:`DataError` at the first cell that does not belong."""
        if self._column.coded:
            values = self._encode_category(cells, where)
        elif self._column.dressed and not isinstance(cells, NumberCells):
            values = self._parse(self._undressed(cells), where)
        elif isinstance(cells, KeyCells):
            index = next((i for i, key in enumerate(cells.keys) if key is not None), None)
            if index is not None:
                raise DataError(
                    f"{where.cell(index, self._column.name)}: expected a number, got {cells.keys[index]!r} "
                    f"(dtype {cells.dtype}); convert the column, e.g. with pandas.to_numeric"
                )
            values = np.full(len(cells), math.nan)
        elif isinstance(cells, NumberCells):
            values = np.asarray(cells.values, dtype=np.float64)
        else:
            values = self._parse(cells, where)
        self._check(values, cells, where)
        return values

    def _undressed(self, cells: TextCells | KeyCells) -> TextCells:
        """The cells without currency or percent sign; what wears another dress stays as it is, to be refused."""
        comma = isinstance(cells, TextCells) and cells.comma
        column, plain = self._column, dict[str, str]()
        spelled = cells.cells if isinstance(cells, TextCells) else [_NOTHING if k is None else k for k in cells.keys]
        for cell in set(spelled):
            found = Dress.of(cell.strip(), comma)
            fits = found is not None and (found[0].prefix, found[0].suffix) == (column.prefix, column.suffix)
            plain[cell] = found[1] if found is not None and fits else cell
        return TextCells([plain[cell] for cell in spelled])

    def _parse(self, cells: TextCells, where: Where) -> np.ndarray:
        known: dict[str, float] = {}
        for cell in dict.fromkeys(cells.cells):
            bare = cell.strip()
            if self._column.format is not None:
                known[cell] = self._parse_moment(cell, cells, where)
            elif cells.number.fullmatch(bare):
                known[cell] = float(bare.replace(",", ".") if cells.comma else bare)
            elif bare in self._absent or cell == _NOTHING:
                known[cell] = math.nan
            elif INFINITE.fullmatch(bare):
                known[cell] = math.copysign(math.inf, -1 if bare.startswith("-") else 1)
            else:
                place = where.cell(list(cells.cells).index(cell), self._column.name)
                raise DataError(
                    f"{place}: expected a number, got {cell!r}; mend the cell, or if it means missing pass "
                    f"missing=[{cell!r}, ...]"
                )
        return np.array(list(map(known.__getitem__, cells.cells)), dtype=np.float64)

    def _parse_moment(self, cell: str, cells: TextCells, where: Where) -> float:
        bare = cell.strip()
        if bare in self._absent:
            return math.nan
        try:
            if dates.recognise(bare) is None:
                raise ValueError("not a date")
            return float(dates.parse(bare))
        except ValueError as fault:
            example = dates.spell(0, cast(str, self._column.format))
            place = where.cell(list(cells.cells).index(cell), self._column.name)
            raise DataError(
                f"{place}: expected a date such as {example!r}, got {cell!r} ({fault}); mend the cell, or if it means "
                f"missing pass missing=[{cell!r}, ...]"
            ) from None

    def _encode_category(self, cells: Cells, where: Where) -> np.ndarray:
        if isinstance(cells, NumberCells):
            unique, inverse = np.unique(cells.values, return_inverse=True)
            keys: list[str | None] = [None if math.isnan(v) else _spell_any(float(v)) for v in unique]
            table = [self.code(key) for key in keys]
            found = [math.nan if code is None else code for code in table]
            codes = np.array(found, dtype=np.float64)[inverse]
            unknown = np.array([code is None for code in table], dtype=bool)[inverse]
            if unknown.any():
                index = int(np.flatnonzero(unknown)[0])
                self._refuse(_spell_any(float(cells.values[index])), index, where)
            return codes
        given: Sequence[str | None] = cells.cells if isinstance(cells, TextCells) else cells.keys
        codes_of = self._codes
        codes_list = list(map(codes_of.get, given))
        if None in codes_list:
            for cell in dict.fromkeys(cell for cell, code in zip(given, codes_list) if code is None):
                code = self.code(cell)
                if code is None:
                    index = list(given).index(cell)
                    self._refuse(str(cell), index, where)
                else:
                    codes_of[cell] = code
            codes_list = list(map(codes_of.get, given))
        return np.array(codes_list, dtype=np.float64)

    def code(self, key: str | None) -> float | None:
        """The code of a spelling; of a number in any spelling where the categories are numbers; None if unknown."""
        code = self._codes.get(key)
        if code is None and key is not None:
            code = self._codes.get(key.strip())
        if code is None and key is not None and _numeric_dtype(self._column.dtype) and NUMBER.fullmatch(key.strip()):
            if self._by_value is None:
                numbers = [(c, code) for c, code in self._codes.items() if c is not None and NUMBER.fullmatch(c)]
                self._by_value = {float(c): code for c, code in numbers}
            return self._by_value.get(float(key))
        return code

    def _refuse(self, value: str, index: int, where: Where) -> None:
        column = self._column
        categories = column.categories or ()
        ways = ["add it to the column's categories in the schema and fit again"]
        near = _nearest(value, categories)
        if near is not None:
            ways.insert(0, f"if it means {near!r}, say aliases = {{{value!r} = {near!r}}} in the schema")
            if value.startswith(near) and len(value) > len(near):
                ways.insert(0, f"pass strip_suffix={value[len(near) :]!r}")
        ways.append(f"or, if it means missing, pass missing=[{value!r}, ...]")
        raise DataError(
            f"{where.cell(index, column.name)}: expected one of the {len(categories)} known categories "
            f"({some(categories, 5)}), got {value!r}; " + "; ".join(ways)
        )

    def _check(self, values: np.ndarray, cells: Cells, where: Where) -> None:
        column = self._column
        if not column.missing:
            absent = np.isnan(values)
            if absent.any():
                place = where.cell(int(np.flatnonzero(absent)[0]), column.name)
                raise DataError(
                    f"{place}: expected a value, got a missing cell, and the model was fitted without missing cells "
                    f"in this column; fill it, or fit again with missing = true for the column (allow_missing=True "
                    f"for all)"
                )
        if column.coded:
            return
        infinite = np.isinf(values)
        if infinite.any():
            index = int(np.flatnonzero(infinite)[0])
            raise DataError(
                f"{where.cell(index, column.name)}: expected a finite number, got {values[index]}; mend the cell or "
                f"leave it empty"
            )
        if column.resolution is not None:
            steps = values / column.resolution
            off = np.abs(steps - np.rint(steps)) > 1e-3 + 1e-9 * np.abs(steps)
            if off.any():
                index = int(np.flatnonzero(off)[0])
                raise DataError(
                    f"{where.cell(index, column.name)}: expected a multiple of {column.resolution:g} as in the data "
                    f"the model was fitted to, got {_show(cells, values, index)}; round it, or fit again with a finer "
                    f"resolution in the schema"
                )


def holes(column: TableColumn, cells: Cells, absent: Sequence[str]) -> np.ndarray:
    """Which cells are missing, shape ``(rows,)``: a category of the column is not, however it is spelled."""
    if isinstance(cells, NumberCells):
        return np.isnan(cells.values)
    known = {*(column.categories or ()), *column.aliases} if column.coded else set()
    spellings = frozenset(absent)
    given: Sequence[str | None] = cells.cells if isinstance(cells, TextCells) else cells.keys
    return np.array([c is None or (c not in known and c.strip() in spellings) for c in given], dtype=bool)


def _show(cells: Cells, values: np.ndarray, index: int) -> str:
    return repr(cells.cells[index]) if isinstance(cells, TextCells) else repr(float(values[index]))


def _spell_any(value: float) -> str:
    return spell(value) if math.isfinite(value) else str(value)


def _nearest(value: str, categories: Sequence[str]) -> str | None:
    """A category that the value probably stands for."""
    bare = value.strip().rstrip(".").strip()
    for category in categories:
        if category.casefold() == bare.casefold():
            return category
    near = difflib.get_close_matches(value, categories[:5000], n=1, cutoff=0.8)
    return near[0] if near else None


def format_cells(column: TableColumn, values: np.ndarray, absent: str, comma: bool = False) -> list[str]:
    """Cells as the user's file spells them.

    Args:
        values: codes or values, shape ``(rows,)``.
        absent: spelling of a missing cell.
        comma: write a decimal comma.
    """
    missing = absent if column.missing_as is None else column.missing_as
    if column.role == "ignore":
        return [missing] * len(values)
    if column.coded:
        categories = column.categories or ()
        return [missing if math.isnan(v) else categories[round(v)] for v in values]
    shown = [missing if math.isnan(v) else _format(v, column) for v in values]
    if column.dressed:
        dress = Dress(column.prefix, column.suffix, column.thousands)
        worn = [cell if math.isnan(v) else dress.put_on(cell) for cell, v in zip(shown, values)]
        return [cell.replace(".", ",") for cell in worn] if comma and not column.thousands else worn
    return [cell.replace(".", ",") if not math.isnan(v) else cell for cell, v in zip(shown, values)] if comma else shown


def _format(value: float, column: TableColumn) -> str:
    if column.dtype.startswith("datetime"):
        return dates.spell(round(value), column.format or dates.default_format(column.resolution or 1.0))
    if column.dtype.startswith("timedelta"):
        return dates.spell_span(round(value))
    if column.decimals is None and column.dtype.lower() == "float32":
        return str(np.float32(value))
    if column.decimals is None:
        return spell(value) if column.kind == "integer" else repr(float(value))
    least, most = column.decimals
    if column.resolution is None or column.kind == "integer":
        most = max(most, 0)
    text = f"{value:.{most}f}"
    if float(text) == 0.0:
        text = text.removeprefix("-")
    if most > least:
        whole, _, fraction = text.partition(".")
        fraction = fraction[:least] + fraction[least:].rstrip("0")
        text = f"{whole}.{fraction}" if fraction else whole
    return text
