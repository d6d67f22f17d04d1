"""What can be wrong with a compressed file: one small hierarchy, shared by the entropy coder and the file format.

Every message says what was wrong, where (chunk and byte offset, once known), and what to do.  All cross a process
boundary unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from likely.data.errors import SupplyError


class FormatError(SupplyError):
    """A compressed file cannot be decoded.

    Args:
        what: what was wrong, "expected … got …" where there is something to compare.
        where: chunk and byte offset; empty until a layer that knows them adds it with :func:`located`.
        advice: what the user can do about it.

    >>> print(Truncated("expected 12 more bytes, got 3", "chunk 2, byte 640"))
    chunk 2, byte 640: expected 12 more bytes, got 3; the file is cut short: copy or download it again
    """

    default_advice = ""

    def __init__(self, what: str, where: str = "", advice: str | None = None) -> None:
        super().__init__(what, where, advice)
        self.what = what
        self.where = where
        self.advice = self.default_advice if advice is None else advice

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.what}{'; ' if self.advice else ''}{self.advice}"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


def _rebuild(cls: type[FormatError], args: tuple[Any, ...], state: dict[str, Any]) -> FormatError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class NotLk(FormatError):
    """The bytes are not a ``.lk`` file, or a transfer in text mode changed its line ends."""

    default_advice = "expected a file written by likely compress"


class Truncated(FormatError):
    """The file ends too early."""

    default_advice = "the file is cut short: copy or download it again"


class Damaged(FormatError):
    """Bytes of the file, or the stream that an entropy coder reads, are not as they were written."""

    default_advice = "the file is damaged: copy or download it again"


class TooLarge(FormatError):
    """The file declares more than a limit allows; nothing was allocated.

    Args:
        quantity: what is too large, such as ``"decoded size"``.
        value: what the file declares.
        limit: what is allowed.
        option: how to raise the limit, such as ``"max_output"``; None where the format itself sets it.
    """

    def __init__(self, quantity: str, value: int, limit: int, option: str | None = None, where: str = "") -> None:
        advice = f"if you trust the file, raise {option}" if option else "no valid file exceeds this limit"
        super().__init__(f"{quantity}: expected at most {limit:,}, got {value:,}", where, advice)
        self.limit = limit
        self.option = option


class NewerVersion(FormatError):
    """The file needs a later version of this package."""

    default_advice = "upgrade likely"


class WrongModel(FormatError):
    """The file was written with another model.

    Args:
        expected: fingerprint that the file names.
        got: fingerprint of the model at hand.
    """

    def __init__(self, expected: str, got: str, where: str = "") -> None:
        super().__init__(
            f"expected the model with fingerprint {expected}, got {got}",
            where,
            "decompress with the run that compressed the file",
        )
        self.expected = expected
        self.got = got


class ForeignArithmetic(FormatError):
    """This machine evaluates a network to other bits than the file needs, by every route that was tried.

    Args:
        network: name of the network whose probe differs.
        routes: names of the arithmetic routes that were tried.
    """

    def __init__(self, network: str, routes: tuple[str, ...] = (), where: str = "") -> None:
        tried = f" (tried: {', '.join(routes)})" if routes else ""
        super().__init__(
            f"network {network!r} gives other values on this machine than where the file was written{tried}",
            where,
            "decode on another machine or with another version of torch, and please report this one",
        )
        self.network = network


@contextmanager
def located(where: str) -> Iterator[None]:
    """Add the place to a :class:`FormatError` that does not know its own.

    >>> with located("chunk 7"):
    ...     raise Damaged("the stack ran dry")
    Traceback (most recent call last):
        ...
    likely.coding.errors.Damaged: chunk 7: the stack ran dry; the file is damaged: copy or download it again
    """
    try:
        yield
    except FormatError as error:
        error.where = error.where or where
        raise


@contextmanager
def intact(what: str, where: str = "") -> Iterator[None]:
    """Within the context whatever fails does so because the file is damaged, and becomes :class:`Damaged`.

    >>> try:
    ...     with intact("whole numbers", "chunk 7"):
    ...         [3, 4][2]
    ... except Damaged as error:
    ...     print(error.where, "-", error.what)
    chunk 7 - expected whole numbers (IndexError: list index out of range)
    """
    try:
        yield
    except (FormatError, MemoryError):
        raise
    except Exception as fault:
        raise Damaged(f"expected {what} ({type(fault).__name__}: {fault})", where) from fault
