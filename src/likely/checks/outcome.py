"""What a check says: passed, skipped with a reason, or failed with a message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "skipped"]


class CheckFailed(AssertionError):
    """A model breaks the contract; the message names model, space and check, and says what was found."""


class Skipped(Exception):
    """The check does not apply; the message says why."""


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check on one tiny instance.

    Args:
        check: name of the check.
        model: name of the model.
        case: the space, and the condition's space if there is one.
        status: ``passed``, ``failed`` or ``skipped`` (does not apply).
        detail: what was measured, what went wrong, or why the check does not apply.
        seconds: how long it took.
    """

    check: str
    model: str
    case: str
    status: Status
    detail: str
    seconds: float


def require(holds: bool, otherwise: str) -> None:
    """Raise :class:`CheckFailed` with the message unless the condition holds."""
    if not holds:
        raise CheckFailed(otherwise)
