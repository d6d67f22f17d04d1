"""Dates and times as whole numbers of microseconds since 1970, so that a column of them is a numeric one."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

_DATE = r"(\d{4})([-/])(\d\d)\2(\d\d)"
_MOMENT = re.compile(_DATE + r"(?:([ T])(\d\d):(\d\d)(?::(\d\d)(?:\.(\d{1,6}))?)?)?", re.ASCII)
_START = datetime(1970, 1, 1)
_MICROSECOND = timedelta(microseconds=1)
DAY = 86_400_000_000
SECOND = 1_000_000


def recognise(text: str) -> str | None:
    """The format of a date or a date and time, year first; None if ``text`` is none.

    >>> recognise("2024-02-29"), recognise("2024-02-29T12:30"), recognise("29.2.2024")
    ('%Y-%m-%d', '%Y-%m-%dT%H:%M', None)
    """
    match = _MOMENT.fullmatch(text)
    if match is None:
        return None
    _, dash, _, _, between, _, _, seconds, fraction = match.groups()
    found = f"%Y{dash}%m{dash}%d"
    if between:
        found += f"{between}%H:%M"
    if seconds:
        found += ":%S"
    if fraction:
        found += ".%f"
    return found


def parse(text: str) -> int:
    """Microseconds since 1970 of a text that :func:`recognise` accepts; ``ValueError`` for a day that does not exist.

    >>> parse("1970-01-02")
    86400000000
    """
    match = _MOMENT.fullmatch(text)
    assert match is not None
    year, _, month, day, _, hour, minute, seconds, fraction = match.groups()
    clock = timedelta(hours=int(hour or 0), minutes=int(minute or 0), seconds=int(seconds or 0))
    if clock >= timedelta(days=1) or int(minute or 0) > 59 or int(seconds or 0) > 59:
        raise ValueError("no such time of day")
    clock += timedelta(microseconds=int((fraction or "").ljust(6, "0")))
    return (datetime(int(year), int(month), int(day)) + clock - _START) // _MICROSECOND


def spell(micro: int, format: str) -> str:
    """A moment as text.

    >>> spell(86_400_000_000, "%Y-%m-%d")
    '1970-01-02'
    """
    moment = _START + timedelta(microseconds=micro)
    # Years before 1000 are not padded by every C library.
    return moment.strftime(format.replace("%Y", f"{moment.year:04d}"))


def default_format(resolution: float) -> str:
    """The shortest usual format that shows every step of ``resolution`` microseconds."""
    if resolution % DAY == 0:
        return "%Y-%m-%d"
    return "%Y-%m-%d %H:%M:%S" if resolution % SECOND == 0 else "%Y-%m-%d %H:%M:%S.%f"


def spell_span(micro: int) -> str:
    """A span of time as pandas spells it.

    >>> spell_span(90_061_000_000)
    '1 days 01:01:01'
    """
    days, rest = divmod(micro, DAY)
    seconds, fraction = divmod(rest, SECOND)
    text = f"{days} days {seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
    return text + (f".{fraction:06d}" if fraction else "")
