"""Cost of training against the number of rows, and a file larger than the memory that a process may have.

    python benchmarks/scale.py --out benchmarks/results/scale

1. *Cost per example.*  A VAE on 16 real columns is trained from a memory-mapped .npy file of 10³ to 10⁷ rows, the same
   steps for every number of rows.  Each number has a process of its own, and the processes take turns (turns.py): the
   table has medians over rounds of processor time an example, and of the ratio to the smallest number in the same
   round.  Beside it the pass over the data that sets the scales before the first step, per row, and memory: the peak of
   resident memory counts pages of the map that the system may drop at any time, anonymous memory does not.
2. *Limit.*  `likely fit` on a file of 3 GiB in a process that may have less memory than that (`ulimit -d`: memory that
   is not backed by a file).  Under the same limit the file cannot be loaded.

Linux only.  The files (up to 3.7 GiB) lie in a temporary folder that is removed.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from turns import Turns, machine, play, playing, versions, write_record

COLUMNS, BATCH, STEPS = 16, 500, 100
ROWS = (10**3, 10**4, 10**5, 10**6, 10**7)
WIDE_COLUMNS, FILE_BYTES, LIMIT_BYTES = 256, 3 << 30, 2 << 30


def write_reals(path: Path, rows: int, columns: int) -> None:
    """A float32 .npy file of dependent real columns, written piece by piece."""
    import numpy as np

    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(4, columns)).astype(np.float32)
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, columns)}
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, rows, 1 << 16):
            size = min(1 << 16, rows - start)
            z, noise = rng.standard_normal((size, 4), np.float32), rng.standard_normal((size, columns), np.float32)
            (np.tanh(z) @ mixing + 0.1 * noise).tofile(file)


# --------------------------------------------------------------------------------------------------------------
# Cost per example
# --------------------------------------------------------------------------------------------------------------


def take_part(path: Path, rounds: int, threads: int) -> None:
    """Train from one file, STEPS steps a turn."""
    turns = Turns()
    import torch

    from likely.contract import Reals
    from likely.data import Dataset
    from likely.data.store import as_tensor, map_npy
    from likely.models.vae import VAE
    from likely.training import train

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    data = Dataset(Reals((COLUMNS,)), as_tensor(map_npy(path)))
    model = VAE(data.space, latent_dim=4, hidden=(64, 64))
    seconds = {"initialise": 0.0}
    initialise = model.initialise

    def timed(batches: Any) -> None:
        start = time.process_time()
        initialise(batches)
        seconds["initialise"] = time.process_time() - start

    model.initialise = timed  # type: ignore[method-assign]

    class Pieces:
        def on_start(self, run: Any) -> None:
            turns.ready()
            turns.wait()

        def on_step(self, run: Any) -> None:
            if run.step % STEPS == 0:
                turns.done()
                if run.step < rounds * STEPS:
                    turns.wait()

    train(model, data, steps=rounds * STEPS, batch_size=BATCH, progress=False, callbacks=[Pieces()])
    turns.end(initialise=seconds["initialise"])


def cost_per_example(folder: Path, arguments: Any) -> list[dict[str, Any]]:
    commands = {}
    for rows in arguments.rows:
        path = folder / f"{rows}.npy"
        write_reals(path, rows, COLUMNS)
        options = ["--file", str(path), "--rounds", str(arguments.rounds), "--threads", str(arguments.threads)]
        commands[str(rows)] = [sys.executable, str(Path(__file__).resolve()), *options]
    with playing(commands, arguments.threads, folder / "logs") as players:
        turns = play(players, arguments.rounds)
        ends = {name: player.end() for name, player in players.items()}
    later = slice(arguments.warm_up, None)
    times = {name: [turn["cpu"] / (STEPS * BATCH) for turn in turns[name][later]] for name in commands}
    first = times[str(arguments.rows[0])]
    return [
        {
            "rows": int(name),
            "microseconds_per_example": 1e6 * statistics.median(values),
            "of_smallest": statistics.median(a / b for a, b in zip(values, first)),
            "initialise_microseconds_per_row": 1e6 * ends[name]["initialise"] / int(name),
            "file_mib": Path(folder / f"{name}.npy").stat().st_size / 2**20,
            "peak_mib": ends[name]["peak_bytes"] / 2**20,
            "anonymous_mib": ends[name]["anonymous_bytes"] / 2**20,
        }
        for name, values in times.items()
    ]


# --------------------------------------------------------------------------------------------------------------
# A limit
# --------------------------------------------------------------------------------------------------------------


def under_limit(folder: Path, threads: int) -> dict[str, Any]:
    """`likely fit` on a file larger than the limit, and the attempt to load it."""
    path = folder / "large.npy"
    write_reals(path, FILE_BYTES // (4 * WIDE_COLUMNS), WIDE_COLUMNS)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}

    def limited(command: list[str]) -> tuple[subprocess.CompletedProcess[str], float]:
        start = time.perf_counter()
        done = subprocess.run(
            command,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_BYTES, LIMIT_BYTES)),
            capture_output=True,
            text=True,
            env=environment,
        )
        return done, time.perf_counter() - start

    loading = f"import numpy; numpy.load({str(path)!r})"
    loaded, _ = limited([sys.executable, "-c", loading])
    options = ["--steps", "200", "--batch-size", str(BATCH), "--threads", str(threads), "--json", "--quiet"]
    arguments = [str(path), "-o", str(folder / "run"), *options, "latent_dim=4", "hidden=[64]"]
    fitted, seconds = limited([sys.executable, "-m", "likely", "fit", *arguments])
    return {
        "file_gib": path.stat().st_size / 2**30,
        "limit_gib": LIMIT_BYTES / 2**30,
        "loading": "succeeded" if loaded.returncode == 0 else loaded.stderr.strip().splitlines()[-1],
        "fit_exit_code": fitted.returncode,
        "fit_seconds": seconds,
        "fit_message": "" if fitted.returncode == 0 else fitted.stderr.strip()[-500:],
    }


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    cost, limit = record["cost"], record["limit"]
    times = [row["microseconds_per_example"] for row in cost]
    lines = [
        "# Training cost against the number of rows",
        "",
        f"Command: `{record['command']}`. {record['date']}. Machine: {record['machine']['processor']}, "
        f"{record['machine']['cores']} cores, {record['machine']['system']}; PyTorch {record['versions']['torch']}; "
        f"{record['threads']} thread(s), processor time.",
        "",
        f"VAE on {COLUMNS} real columns, batch {BATCH}, from a memory-mapped .npy file; medians over "
        f"{record['rounds']} rounds of {STEPS} steps. Largest cost over smallest: {max(times) / min(times):.2f}.",
        "",
        "| rows | file, MiB | µs/example | ÷ smallest, same round | first pass, µs/row | peak resident, MiB "
        "| anonymous, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in cost:
        lines.append(
            f"| {row['rows']:,} | {row['file_mib']:,.1f} | {row['microseconds_per_example']:.2f} "
            f"| {row['of_smallest']:.2f} | {row['initialise_microseconds_per_row']:.2f} | {row['peak_mib']:.0f} "
            f"| {row['anonymous_mib']:.0f} |"
        )
    lines.append("")
    if limit:
        outcome = "trains" if limit["fit_exit_code"] == 0 else f"fails ({limit['fit_message']})"
        lines += [
            f"With `ulimit -d` at {limit['limit_gib']:.1f} GiB, `likely fit` on a .npy file of "
            f"{limit['file_gib']:.1f} GiB {outcome}: {limit['fit_seconds']:.0f} s for inferring the schema, splitting, "
            f"the first pass and 200 steps. Loading the file under the same limit: `{limit['loading']}`.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=3, help="first rounds that are left out of the medians")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--without-limit", action="store_true", help="leave out the second part")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    parser.add_argument("--out", type=Path, help="write the record to OUT.json and the table to OUT.md")
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.file:
        take_part(arguments.file, arguments.rounds, arguments.threads)
        return
    if arguments.rounds <= arguments.warm_up:
        parser.error("--rounds: expected more than --warm-up")
    record: dict[str, Any] = {
        "command": " ".join(["python benchmarks/scale.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "threads": arguments.threads,
        "rounds": arguments.rounds - arguments.warm_up,
        "limit": None,
    }
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        record["cost"] = cost_per_example(Path(folder), arguments)
    if not arguments.without_limit:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            record["limit"] = under_limit(Path(folder), arguments.threads)
    print(table(record))
    if arguments.out:
        write_record(arguments.out, record, table(record))


if __name__ == "__main__":
    main()
