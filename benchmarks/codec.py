"""Speed of compression and decompression, in MB of raw data a second, on one core and on two.

    LIKELY_DATA=… python benchmarks/codec.py RUNS --out benchmarks/results/codec [--craystack PATH]

RUNS are what ``compression_cases.py`` fitted.  Raw data is one byte a pixel, also where pixels are binary, and the text
of a table.

1. *Coder.*  Symbols a second of one thread, 4096 lanes, frequencies given: binary symbols with a probability each, and
   256 symbols that share a law.
2. *Models.*  ``archive.compress`` and ``restore`` from an object or a file in memory to the same again: taking apart,
   networks, coder, container, checksums and start of the processes included; no verification.  With one worker also how
   much of the processor time is the networks' (``Network.run``).  Elapsed time is what a user waits for; processor time
   is of all processes.  Medians over the rounds, in which one worker and two take turns.  Rows are coded by the model
   also where ``compress`` would see that generic compression takes less, so that it is the model that is measured.
   Files are of some MB, so that the start of a process and the share of a single chunk count little.
3. *craystack.*  The same model and images as BB-ANS by craystack (research code; J. Townsend), in turns with this
   package, one thread each, processor time: ``codec_craystack.py`` says how it is set up.  Its batch of 10 images needs 8,240
   lanes, which it stores whole; with a batch of 1 image it has 824 lanes, near what this package has.  PATH holds
   craystack and autograd (``git clone``, ``pip install --target``).
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import likely
from compression_cases import CASES
from likely import archive, exact
from likely.coding.bits_back import decode_rows, encode_rows
from likely.coding.categories import TabulatedCells, edges_of
from likely.coding.stack import Stack
from turns import Player, machine, play, playing, versions, write_record

LANES, SYMBOLS = 4096, 1 << 22
CRAYSTACK_IMAGES = 1000
#: Goals: million symbols a second of a core; MB a second (rows for the table) on two cores; two cores over one.
GOALS_CODER = {"binary": 60.0, "256-ary": 30.0}
GOALS = {"mnist-binary": 25e6, "cifar": 4e6, "adult": 50_000.0}
GOAL_TWO, GOAL_CRAYSTACK = 1.8, 20.0


# --------------------------------------------------------------------------------------------------------------
# 1. The coder
# --------------------------------------------------------------------------------------------------------------


def coder(rounds: int) -> dict[str, dict[str, float]]:
    """Million symbols a second, push and pop: medians of processor time."""
    rng = np.random.default_rng(0)
    zero = rng.integers(1, 1 << 24, SYMBOLS).astype(np.uint64)
    bit = rng.integers(0, 1 << 24, SYMBOLS) >= zero.astype(np.int64)
    start = zero * bit
    freq = np.where(bit, np.uint64(1 << 24) - zero, zero)

    def find(part: slice, residues: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        z = zero[part]
        one = residues >= z
        return one, z * one, np.where(one, np.uint64(1 << 24) - z, z)

    counts = rng.integers(1, 1000, 256)
    byte = rng.choice(256, SYMBOLS, p=counts / counts.sum())
    cells = TabulatedCells(edges_of(counts)[None], 0, (SYMBOLS,))
    work: dict[str, tuple[Callable[[Stack], Any], Callable[[Stack], Any], np.ndarray]] = {
        "binary": (lambda s: s.push(start, freq, 24), lambda s: s.pop(SYMBOLS, 24, find), bit),
        "256-ary": (lambda s: cells.push(s, byte), cells.pop, byte),
    }
    found: dict[str, dict[str, float]] = {}
    for name, (push, pop, symbols) in work.items():
        took: dict[str, list[float]] = {"push": [], "pop": []}
        for _ in range(rounds):
            stack = Stack(LANES)
            with timed(took["push"]):
                push(stack)
            with timed(took["pop"]):
                back = pop(stack)
            if not np.array_equal(back, symbols):
                raise SystemExit(f"{name}: other symbols came back")
        found[name] = {side: SYMBOLS / statistics.median(values) / 1e6 for side, values in took.items()}
    return found


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    before = time.process_time()
    yield
    into.append(time.process_time() - before)


# --------------------------------------------------------------------------------------------------------------
# 2. Models
# --------------------------------------------------------------------------------------------------------------


def source(name: str, rows: int) -> tuple[Any, int, int]:
    """Data of so many rows, how many these are, and raw bytes."""
    train, test = CASES[name].load()
    if isinstance(test, Path):
        import gzip

        lines = gzip.decompress(test.read_bytes()).splitlines(keepends=True)
        lines = [line for line in lines if line.strip()]
        text = b"".join(lines[i % len(lines)] for i in range(rows))
        return text, rows, len(text)
    images = np.concatenate([test, train])
    images = images[np.arange(rows) % len(images)]
    return images, rows, images.size


def cpu_seconds() -> float:
    """Of this process and of those that it has ended."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


class Clock:
    """Processor and elapsed seconds, and the part of them within ``Network.run``."""

    def __init__(self) -> None:
        self.networks = 0.0

    def time(self, work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
        self.networks, cpu, wall = 0.0, cpu_seconds(), time.perf_counter()
        result = work()
        return result, {
            "cpu": cpu_seconds() - cpu,
            "wall": time.perf_counter() - wall,
            "networks": self.networks,
        }

    @contextmanager
    def watching(self) -> Iterator[None]:
        run = exact.Network.run

        def watched(network: Any, *args: Any, **options: Any) -> Any:
            before = time.process_time()
            try:
                return run(network, *args, **options)
            finally:
                self.networks += time.process_time() - before

        exact.Network.run = watched  # type: ignore[method-assign]
        try:
            yield
        finally:
            exact.Network.run = run  # type: ignore[method-assign]


def model(name: str, runs: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Speeds of a case."""
    fitted = likely.load(runs / name)
    data, n, raw = source(name, rows)
    clock = Clock()
    archive._Job._near = lambda *_: False  # type: ignore[method-assign]  # which forks of this process inherit
    steps = json.loads((runs / name / "config.json").read_text(encoding="utf-8"))["training"]["steps"]
    took: dict[tuple[int, str], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, clock.watching():
        if isinstance(data, bytes):
            path = Path(folder) / "table.csv"
            path.write_bytes(data)
            given: Any = path
        else:
            given = data
        for number in range(rounds):
            for workers in (1, 2) if number % 2 == 0 else (2, 1):
                sink = io.BytesIO()
                _, seconds = clock.time(
                    lambda: archive.compress(
                        fitted.model,
                        fitted.schema,
                        given,
                        sink,  # noqa: B023
                        verify=False,
                        workers=workers,  # noqa: B023
                        read=CASES[name].read,
                    )
                )
                took.setdefault((workers, "encode"), []).append(seconds)
                with archive.Archive(sink.getvalue()) as file:
                    chunks = sum(entry.kind == "rows" for entry in file.reader.chunks)
                    value, seconds = clock.time(
                        lambda: file.restore(fitted.model, fitted.schema, workers=workers).value  # noqa: B023
                    )
                took.setdefault((workers, "decode"), []).append(seconds)
                if not (value == data if isinstance(data, bytes) else np.array_equal(value, data)):
                    raise SystemExit(f"{name}: other data came back")
                print(name, workers, took[workers, "encode"][-1], took[workers, "decode"][-1], flush=True)
    medians = {
        f"{side}_{workers}": {key: statistics.median(row[key] for row in rows_) for key in rows_[0]}
        for (workers, side), rows_ in took.items()
    }
    return {
        "steps": steps,
        "rows": n,
        "raw_bytes": raw,
        "chunks": chunks,
        "file_bytes": len(sink.getvalue()),
        **medians,
    }


# --------------------------------------------------------------------------------------------------------------
# 3. craystack
# --------------------------------------------------------------------------------------------------------------


def ours(runs: Path, images: Path, rounds: int) -> None:
    """The player of this package."""
    from turns import Turns

    torch.set_num_threads(1)
    turns = Turns()
    codec = likely.load(runs / "mnist-binary").model.codec()
    x = torch.from_numpy(np.load(images))
    turns.ready()
    for _ in range(rounds):
        turns.wait()
        times = [(time.process_time(), time.perf_counter())]
        payload = encode_rows(codec, x)
        times.append((time.process_time(), time.perf_counter()))
        back = decode_rows(codec, payload.data, len(x))
        times.append((time.process_time(), time.perf_counter()))
        if not torch.equal(back.to(x), x):
            raise SystemExit("other images came back")
        encode, decode = ([b - a for a, b in zip(*pair)] for pair in itertools.pairwise(times))
        turns.done(encode=encode, decode=decode, bytes=len(payload.data))
    turns.end()


def craystack(path: Path, runs: Path, rounds: int) -> dict[str, Any]:
    """Images a second of both, and their ratios within each round."""
    train, test = CASES["mnist-binary"].load()
    images = np.concatenate([test, train])
    own = Path(__file__)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder) / "few.npy", Path(folder) / "many.npy"
        np.save(few, images[:CRAYSTACK_IMAGES])
        np.save(many, images[: 40 * CRAYSTACK_IMAGES])
        os.environ["PYTHONPATH"] = os.pathsep.join([str(path), str(path / "deps"), os.environ.get("PYTHONPATH", "")])
        rival = [sys.executable, str(own.with_name("codec_craystack.py")), str(runs / "mnist-binary"), str(few)]
        commands = {
            "likely": [sys.executable, str(own), str(runs), "--ours", str(many), "--rounds", str(rounds)],
            "craystack, batch 10": [*rival, "10", str(rounds)],
            "craystack, batch 1": [*rival, "1", str(rounds)],
        }
        counts = {name: 40 * CRAYSTACK_IMAGES if name == "likely" else CRAYSTACK_IMAGES for name in commands}
        with playing(commands, 1, Path(folder)) as players:
            turns = play(players, rounds)
            for player in players.values():
                _ended(player)
    for name, answers in turns.items():
        found[name] = {"images": counts[name], "bytes_per_image": answers[0]["bytes"] / counts[name]}
        for side in ("encode", "decode"):
            rates = [counts[name] / answer[side][0] for answer in answers]
            mine = [counts["likely"] / answer[side][0] for answer in turns["likely"]]
            found[name][side] = statistics.median(rates)
            found[name][f"likely_over_it_{side}"] = statistics.median(a / b for a, b in zip(mine, rates))
    return found


def _ended(player: Player) -> None:
    player.end()


# --------------------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "# Speed of compression",
        "",
        f"Command: `{record['command']}`. {record['date']}. Machine: {record['machine']['processor']}, "
        f"{record['machine']['cores']} cores, load {record['machine']['load']}, {record['machine']['system']}; "
        + ", ".join(f"{name} {version}" for name, version in record["versions"].items())
        + ".",
        "",
        "A load above the number of cores means that others were at work: then elapsed times say little, and processor",
        "times are too long, as cores, caches and memory were shared.",
        "",
    ]
    if "coder" in record:
        lines += [
            f"## Coder: {LANES} lanes, one thread, million symbols a second",
            "",
            "| symbols | push | pop | goal |",
            "|---|---|---|---|",
        ]
        for name, row in record["coder"].items():
            met = "yes" if min(row.values()) >= GOALS_CODER[name] else "**no**"
            lines.append(f"| {name} | {row['push']:.0f} | {row['pop']:.0f} | ≥ {GOALS_CODER[name]:.0f}: {met} |")
    if "models" in record:
        lines += ["", "## Models", "", *model_lines(record["models"])]
    if "craystack" in record:
        lines += ["", "## craystack", "", *craystack_lines(record["craystack"])]
    return "\n".join(lines) + "\n"


def model_lines(models: dict[str, dict[str, Any]]) -> Iterator[str]:
    yield "MB of raw data a second (for the table also rows).  Networks: their share of one worker's processor time."
    yield ""
    fits = ", ".join(f"{name} {row['steps']:,}" for name, row in models.items() if "steps" in row)
    yield f"Steps that the models were fitted in: {fits}."
    yield ""
    yield "Two free cores: what they give if the processor time of the two workers together is spread evenly."
    yield ""
    yield "| case | rows, chunks | | one, processor | networks | two free cores | one, elapsed | two, elapsed | ÷ one | goal |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for name, row in models.items():
        for side in ("encode", "decode"):
            one, two = row[f"{side}_1"], row[f"{side}_2"]
            goal = GOALS.get(name)
            counted = row["rows"] if name == "adult" else row["raw_bytes"]
            said = ""
            if goal is not None:
                unit = f"{goal:,.0f} rows/s" if name == "adult" else f"{goal / 1e6:.0f} MB/s"
                said = f"≥ {unit} on two: {_met(counted, two['cpu'] / 2, two['wall'], goal)}"
            rates = [_rate(name, row, s) for s in (one["cpu"], two["cpu"] / 2, one["wall"], two["wall"])]
            yield (
                f"| {name} | {row['rows']:,}, {row['chunks']} | {side} | {rates[0]} "
                f"| {one['networks'] / one['cpu']:.0%} | {rates[1]} | {rates[2]} | {rates[3]} "
                f"| {one['wall'] / two['wall']:.2f} | {said} |"
            )


def _met(counted: float, free: float, elapsed: float, goal: float) -> str:
    if counted / elapsed >= goal:
        return "yes"
    return "by processor time" if counted / free >= goal else "**no**"


def _rate(name: str, row: dict[str, Any], seconds: float) -> str:
    rate = f"{row['raw_bytes'] / seconds / 1e6:.1f}"
    return f"{rate} ({row['rows'] / seconds:,.0f} rows)" if name == "adult" else rate


def craystack_lines(rivals: dict[str, Any]) -> Iterator[str]:
    yield "Images a second of one thread, processor time, the same model and images; medians over rounds.  Bytes an image"
    yield "include all that is stored; craystack's initial bits and lanes are spread over fewer images."
    yield ""
    yield "| | images | encode | decode | bytes an image | likely ÷ it, encode, decode | goal |"
    yield "|---|---|---|---|---|---|---|"
    for name, row in rivals.items():
        over = [row[f"likely_over_it_{side}"] for side in ("encode", "decode")]
        said = (
            "" if name == "likely" else f"≥ {GOAL_CRAYSTACK:.0f}: {'yes' if min(over) >= GOAL_CRAYSTACK else '**no**'}"
        )
        yield (
            f"| {name} | {row['images']:,} | {row['encode']:,.0f} | {row['decode']:,.0f} | {row['bytes_per_image']:.1f} "
            f"| {over[0]:.1f}, {over[1]:.1f} | {said} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--parts", nargs="*", default=["coder", "models", "craystack"])
    parser.add_argument("--cases", nargs="*", default=list(GOALS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="times the rows of every case")
    parser.add_argument("--craystack", type=Path)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="path of the results, without suffix")
    arguments = parser.parse_args()
    if arguments.ours:
        ours(arguments.runs, arguments.ours, arguments.rounds)
        return
    torch.set_num_threads(1)
    path = arguments.out.with_suffix(".json") if arguments.out else None
    record: dict[str, Any] = json.loads(path.read_text()) if path and path.exists() else {}
    record |= {
        "command": "python benchmarks/codec.py RUNS --craystack PATH --out benchmarks/results/codec",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": {"likely": likely.__version__, **versions()},
        "rounds": arguments.rounds,
    }

    def keep() -> None:
        if path:
            write_record(arguments.out, record, table(record))

    if "coder" in arguments.parts:
        record["coder"] = coder(max(5, arguments.rounds))
        keep()
    if "craystack" in arguments.parts and arguments.craystack:
        record["craystack"] = craystack(arguments.craystack, arguments.runs, arguments.rounds)
        keep()
    if "models" in arguments.parts:
        rows = {"mnist-binary": 340_000, "cifar": 12_000, "adult": 800_000}
        for name in arguments.cases:
            found = model(name, arguments.runs, int(rows[name] * arguments.scale), arguments.rounds)
            record.setdefault("models", {})[name] = found
            keep()
    print(table(record))


if __name__ == "__main__":
    main()
