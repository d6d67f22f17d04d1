"""A small TOML writer (the standard library only reads): the subset that a schema needs, laid out to be edited."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dumps(document: Mapping[str, Any]) -> str:
    """TOML text of nested mappings; keys whose value is None are left out.

    >>> print(dumps({"version": 1, "columns": [{"name": "age", "resolution": 0.5}]}))
    version = 1
    <BLANKLINE>
    [[columns]]
    name = "age"
    resolution = 0.5
    <BLANKLINE>
    """
    lines: list[str] = []
    _write(document, (), lines)
    return "\n".join(lines) + "\n"


def _write(table: Mapping[str, Any], path: tuple[str, ...], lines: list[str]) -> None:
    later: list[tuple[str, Any]] = []
    for key, value in table.items():
        if value is None:
            continue
        if path == () and (isinstance(value, Mapping) or _is_table_list(value)):
            later.append((key, value))
        else:
            lines.append(f"{_key(key)} = {_value(value)}")
    for key, value in later:
        for entry in value if isinstance(value, (list, tuple)) else [value]:
            title = ".".join(map(_key, (*path, key)))
            lines.extend(["", f"[[{title}]]" if isinstance(value, (list, tuple)) else f"[{title}]"])
            _write(entry, (*path, key), lines)


def _is_table_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _string(key)


def _string(text: str) -> str:
    # A JSON string is a TOML basic string, except that TOML asks for DEL to be escaped as well.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            return str(value)
        text = repr(value)
        return text if any(mark in text for mark in ".e") else text + ".0"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(entry) for entry in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items() if v is not None) + "}"
    raise TypeError(f"TOML has no form for {type(value).__name__}")
