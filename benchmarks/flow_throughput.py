"""Speed of flows against zuko, nflows and normflows: training steps, and samples from the autoregressive direction.

    python benchmarks/flow_throughput.py --rivals PYTHON --out benchmarks/results/flow_throughput

PYTHON is that of an environment with zuko 1.6.0, nflows 0.14 and normflows 1.7.3.  All fit the same architecture (that of
density.py: three transforms, two hidden layers of 64, eight bins; ours without its first map, which bends the tails and
which the others lack, and without residual layers, as zuko's and nflows') with the same optimiser (PyTorch's Adam,
fused, the fastest that all can have) to the same batches of 256 standard normal rows, in float32 on one thread.  Each
is a process of its own, and they take turns (turns.py); a turn is ten training steps and one draw of samples.  The clock
is processor time, the figures are medians over rounds, ratios those of the same round.  Memory is how much the process
grew from before its first turn to its peak.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from turns import Turns, machine, memory, play, playing, versions, write_record

#: case: (kind of flow in density.py for each player, cells, samples drawn in a turn)
CASES: dict[str, tuple[dict[str, str], int, int]] = {
    f"{title}, {dims} cells": (players, dims, samples)
    for dims, samples in ((10, 500), (64, 200))
    for title, players in (
        ("NSF, autoregressive", {name: f"{name} {'nsf bare' if name == 'likely' else 'NSF'}" for name in
                                 ("likely", "zuko", "nflows", "normflows")}),
        ("MAF", {"likely": "likely maf bare", "zuko": "zuko MAF"}),
        ("NSF, coupling", {"likely": "likely nsf coupling bare", "nflows": "nflows NSF coupling"}),
    )
}  # fmt: skip
BATCH, STEPS, RATE = 256, 10, 1e-3


def take_part(kind: str, dims: int, samples: int, rounds: int) -> None:
    """A player: its turns."""
    import torch

    from density import FLOWS

    torch.set_num_threads(1)
    turns = Turns()
    torch.manual_seed(0)
    model, log_prob, initialise = FLOWS[kind.split()[0]](kind, dims)
    x = torch.randn(BATCH, dims)
    if initialise is not None:
        initialise(x)
    optimiser = torch.optim.Adam(model.parameters(), RATE, fused=True)

    def step() -> None:
        loss = -log_prob(x).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def draw() -> None:
        with torch.no_grad():
            if kind.startswith("zuko"):
                model().sample((samples,))
            else:
                model.sample(samples)

    before = memory()
    step(), draw()
    turns.ready()
    for _ in range(rounds):
        turns.wait()
        start = time.process_time()
        for _ in range(STEPS):
            step()
        middle = time.process_time()
        draw()
        turns.done(step_ms=1e3 * (middle - start) / STEPS, sample_ms=1e3 * (time.process_time() - middle))
    turns.end(grown_bytes=memory()["peak_bytes"] - before["peak_bytes"])


def compare(case: str, rivals: str | None, rounds: int) -> dict[str, Any]:
    """Medians of each player, and of the ratios to ours in each round."""
    players, dims, samples = CASES[case]
    commands = {}
    for name, kind in players.items():
        python = sys.executable if name == "likely" else rivals
        if python is not None:
            play_as = json.dumps([kind, dims, samples, rounds])
            commands[name] = [python, "-W", "ignore", __file__, "--play", play_as]
    with tempfile.TemporaryDirectory() as logs, playing(commands, 1, Path(logs)) as found:
        turns = play(found, rounds)
        ends = {name: player.end() for name, player in found.items()}
    result: dict[str, Any] = {}
    for name, own in turns.items():
        result[name] = {"grown_mib": ends[name]["grown_bytes"] / 2**20}
        for clock in ("step_ms", "sample_ms"):
            ours = [turn[clock] for turn in turns["likely"]]
            ratios = [turn[clock] / mine for turn, mine in zip(own, ours, strict=True)]
            result[name][clock] = statistics.median(turn[clock] for turn in own)
            result[name][f"{clock}_of_ours"] = statistics.median(ratios)
    return result


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    where, versions = record["machine"], ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        "# Flows beside zuko, nflows and normflows",
        "",
        f"Command: `{record['command']}`.  {record['date']}, float32, one thread, processor time; batch "
        f"{record['settings']['batch']}, {record['settings']['rounds']} rounds in turns: medians, and medians of the ratios "
        "within a round.",
        f"Machine: {where['processor']}, {where['cores']} cores, load {where['load']}; {versions}.",
        "",
    ]
    for case, result in record["cases"].items():
        samples = CASES[case][2]
        lines += [
            f"**{case}**",
            "",
            f"| | training step, ms | of ours | {samples} samples, ms | of ours | grown by, MiB |",
            "|---|---|---|---|---|---|",
        ]
        for name, row in result.items():
            lines.append(
                f"| {name} | {row['step_ms']:.2f} | {row['step_ms_of_ours']:.2f} | {row['sample_ms']:.1f} "
                f"| {row['sample_ms_of_ours']:.1f} | {row['grown_mib']:.0f} |"
            )
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", help="a Python with zuko, nflows and normflows")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--case", choices=CASES, help="one of them only")
    parser.add_argument("--out", type=Path, help="write the record to OUT.json and the table to OUT.md")
    parser.add_argument("--play", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.play:
        take_part(*json.loads(arguments.play))
        return
    record: dict[str, Any] = {
        "command": "python benchmarks/flow_throughput.py --rivals PYTHON --out benchmarks/results/flow_throughput",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": {**versions(), "zuko": "1.6.0", "nflows": "0.14", "normflows": "1.7.3"},
        "settings": {"batch": BATCH, "rounds": arguments.rounds},
        "cases": {},
    }
    for case in [arguments.case] if arguments.case else CASES:
        record["cases"][case] = compare(case, arguments.rivals, arguments.rounds)
        print(case, json.dumps(record["cases"][case]), flush=True)
    print(table(record))
    if arguments.out:
        write_record(arguments.out, record, table(record))


if __name__ == "__main__":
    main()
