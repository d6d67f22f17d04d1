"""Rivals that take turns: each is a process that does one piece of work when it is told to.

So whatever else the machine does falls on all rivals alike, and every round gives a ratio.  The referee starts
:class:`Player` s; in its own process each uses a :class:`Turns`.  They speak in lines of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


class Turns:
    """The player's side: ``ready``, then ``wait`` and ``done`` around every piece of work, then ``end``."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        sys.stdout = sys.stderr  # what a library prints is no answer
        self._start = (0.0, 0.0)

    def ready(self) -> None:
        self._answer({})

    def wait(self) -> None:
        """Until it is this player's turn."""
        sys.stdin.readline()
        self._start = (time.process_time(), time.perf_counter())

    def done(self, **values: Any) -> None:
        """The turn is over; its processor time (of all threads) and elapsed time are told."""
        cpu, wall = time.process_time() - self._start[0], time.perf_counter() - self._start[1]
        self._answer({"cpu": cpu, "wall": wall, **values})

    def end(self, **values: Any) -> None:
        self._answer({**memory(), **values})

    def _answer(self, values: dict[str, Any]) -> None:
        self._answers.write(json.dumps(values) + "\n")


class Player:
    """A player's process, seen by the referee."""

    def __init__(self, name: str, command: list[str], threads: int, log: Path) -> None:
        self.name = name
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("w+")
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment
        )
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            self._log.seek(0)
            raise RuntimeError(f"{self.name} ended early:\n{self._log.read()[-3000:]}")
        return json.loads(answer)

    def turn(self) -> dict[str, Any]:
        """Let it do one piece of work."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._read()

    def end(self) -> dict[str, Any]:
        """What it says at its end."""
        answer = self._read()
        self.process.wait()
        self._log.close()
        return answer


@contextlib.contextmanager
def playing(commands: Mapping[str, list[str]], threads: int, logs: Path) -> Iterator[dict[str, Player]]:
    """Players by name; none outlives the context."""
    players: dict[str, Player] = {}
    try:
        for name, command in commands.items():
            players[name] = Player(name, command, threads, logs / f"{name}.log")
        yield players
    finally:
        for player in players.values():
            if player.process.poll() is None:
                player.process.kill()
                player.process.wait()


def play(players: Mapping[str, Player], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Answers of every player in every round; each round begins with another player."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in players}
    names = list(players)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            turns[name].append(players[name].turn())
    return turns


def memory() -> dict[str, int]:
    """Peak resident memory of this process, and what of its memory now is not backed by a file, in bytes."""
    with contextlib.suppress(OSError):
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {"peak_bytes": _kib(fields["VmHWM"]), "anonymous_bytes": _kib(fields["RssAnon"])}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"peak_bytes": peak}


def _kib(field: str) -> int:
    return 1024 * int(field.split()[0])


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load": round(os.getloadavg()[0], 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def write_record(out: Path, record: dict[str, Any], table: str) -> None:
    """Write what was measured to ``OUT.json``, and the table to ``OUT.md``; the folder is made."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_name(out.name + ".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    out.with_name(out.name + ".md").write_text(table, encoding="utf-8")


def versions() -> dict[str, str]:
    import numpy as np
    import torch

    return {"torch": str(torch.__version__), "numpy": np.__version__, "python": platform.python_version()}
