"""Bytes as text so that exactly these bytes come back, also where some of them are no text of their encoding."""

from __future__ import annotations

import codecs
import re

from likely.data.errors import DataError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
#: Encodings in which the bytes of a text are those of its parts, one after the other.
_STATELESS = re.compile(
    r"ascii|utf-8|utf-(16|32)-[lb]e|iso8859-\d+|cp\d+|koi8-\w|mac-?\w+|latin\w*|gbk|gb2312|gb18030|big5|euc_\w+|"
    r"shift_jis\w*"
)


def known_encoding(encoding: str) -> bool:
    """Whether :func:`decode` may name such an encoding."""
    try:
        return bool(_STATELESS.fullmatch(codecs.lookup(encoding).name))
    except LookupError:
        return False


def decode(content: bytes, encoding: str) -> tuple[bytes, str, str, bytes]:
    """The byte order mark, an encoding whose text stands for exactly these bytes, the text, and a last odd byte."""
    name = codecs.lookup(encoding).name
    mark = next((mark for mark, of in _MARKS if content.startswith(mark) and of == name), b"")
    if name in ("utf-8-sig", "utf-16", "utf-32"):
        mark, name = next(((mark, of) for mark, of in _MARKS if content.startswith(mark)), (b"", "utf-8"))
    stop = len(content)
    if name.startswith("utf-16"):
        stop -= (stop - len(mark)) % 2
    body = content[len(mark) : stop]
    if _STATELESS.fullmatch(name):
        try:
            text = body.decode(name, _errors(name))
            if text.encode(name, _errors(name)) == body:
                return mark, name, text, content[stop:]
        except UnicodeError:
            pass
    return mark, "latin-1", content[len(mark) :].decode("latin-1"), b""


def encode(text: str, encoding: str) -> bytes:
    """The bytes of a text that :func:`decode` gave; :class:`DataError` for one that it cannot have given."""
    try:
        return text.encode(encoding, _errors(encoding))
    except UnicodeError:
        raise DataError(f"side information is damaged: its text has no place in {encoding}") from None


def _errors(encoding: str) -> str:
    """How bytes that are no text are held as text, so that they come back."""
    return "surrogatepass" if encoding.startswith(("utf-16", "utf-32")) else "surrogateescape"
