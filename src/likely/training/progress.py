"""What a run shows while it goes on: one live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from likely.contract import Space
from likely.evaluation.evaluation import unit_of

#: Seconds between updates of the live line, and between plain lines.
LIVE_SECONDS, PLAIN_SECONDS = 0.5, 10.0


def describe_nats(nats: float, space: Space) -> str:
    """Mean log-probability as text: nats per example and, where the space has probabilities, bits.

    >>> from likely.contract import Binary
    >>> describe_nats(-69.3147, Binary((100,)))
    '-69.31 nats, 1.0000 bits/dim'
    """
    text = f"{nats:.2f} nats"
    if space.has_probability:
        unit = unit_of(space)
        text += f", {unit.of(nats):.{3 if unit.per_example == 1 else 4}f} {unit.name}"
    return text


def describe_seconds(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss.

    >>> describe_seconds(3725.2), describe_seconds(61)
    ('1:02:05', '1:01')
    """
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@dataclass
class Status:
    """What is shown: see :class:`Display`."""

    step: int = 0
    total: int = 0
    examples_per_second: float = 0.0
    seconds_left: float = 0.0
    loss: float | None = None
    valid: float | None = None
    best: float | None = None

    def line(self, space: Space) -> str:
        """The status in one line."""
        parts = [f"step {self.step:,}/{self.total:,}"]
        if self.examples_per_second:
            parts.append(f"{self.examples_per_second:,.0f} examples/s")
            parts.append(f"{describe_seconds(self.seconds_left)} left")
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        if self.valid is not None:
            parts.append(f"held-out {describe_nats(self.valid, space)}")
        if self.best is not None and self.best != self.valid:
            parts.append(f"best {self.best:.2f}")
        return " · ".join(parts)


class Display(Protocol):
    """Where a run reports to.  ``seconds`` is how often it wishes to be updated."""

    seconds: float

    def update(self, status: Status) -> None: ...

    def message(self, text: str) -> None: ...

    def warning(self, text: str) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Shows nothing but warnings, which become Python's."""

    seconds = float("inf")

    def update(self, status: Status) -> None:
        """Nothing."""

    def message(self, text: str) -> None:
        """Nothing."""

    def warning(self, text: str) -> None:
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def close(self) -> None:
        """Nothing."""


class Plain:
    """Lines on standard error, for files and pipes."""

    seconds = PLAIN_SECONDS

    def __init__(self, space: Space) -> None:
        self._space = space

    def update(self, status: Status) -> None:
        self.message(status.line(self._space))

    def message(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def warning(self, text: str) -> None:
        self.message(f"warning: {text}")

    def close(self) -> None:
        """Nothing."""


class Live:
    """One line that is drawn anew, on a terminal."""

    seconds = LIVE_SECONDS

    def __init__(self, space: Space) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._space = space
        self._progress = Progress(
            BarColumn(bar_width=16),
            TextColumn("{task.description}", markup=False),
            console=Console(stderr=True),
            auto_refresh=False,
            transient=False,
        )
        self._task = self._progress.add_task("", total=None)
        self._progress.start()

    def update(self, status: Status) -> None:
        self._progress.update(
            self._task, completed=status.step, total=status.total or None, description=status.line(self._space)
        )
        self._progress.refresh()

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)

    def warning(self, text: str) -> None:
        self.message(f"warning: {text}")

    def close(self) -> None:
        self._progress.stop()


def display(progress: bool, space: Space) -> Display:
    """The display for where standard error goes; silent without ``progress``."""
    if not progress:
        return Silent()
    return Live(space) if sys.stderr.isatty() else Plain(space)


class Events:
    """TensorBoard events in the folder ``tensorboard`` of a run.

    Raises:
        ValueError: TensorBoard is not installed, or there is no run folder.
    """

    def __init__(self, run: Path | None, purge_step: int | None = None) -> None:
        if run is None:
            raise ValueError("tensorboard: expected a run folder to write the events to, got none")
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "tensorboard: expected TensorBoard to be installed; pip install 'likely[tensorboard]'"
            ) from error
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=purge_step)

    def write(self, record: dict[str, Any]) -> None:
        """Write the numbers of one line of the log, under the names that they have there."""
        step = record["step"]
        for key, value in record.items():
            if isinstance(value, dict):
                for name, number in value.items():
                    if isinstance(number, int | float):
                        self._writer.add_scalar(f"{key}/{name}", number, step)
            elif key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class Clock:
    """Speed of a run: steps a second over the last half minute or so, with all that is done between the steps."""

    def __init__(self, step: int) -> None:
        self._marks = [(time.monotonic(), step)]

    def rate(self, step: int) -> float:
        """Steps a second, up to ``step`` and now."""
        now = time.monotonic()
        self._marks.append((now, step))
        while len(self._marks) > 2 and now - self._marks[1][0] > 30.0:
            self._marks.pop(0)
        seconds = now - self._marks[0][0]
        return (step - self._marks[0][1]) / seconds if seconds > 0 else 0.0
