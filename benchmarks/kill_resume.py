"""Kill a training run at random instants, resume it, and compare it to the bit with one that was never stopped.

    python benchmarks/kill_resume.py --kills 50

A VAE with dropout is trained on a table with missing cells, with averaged weights, evaluation and early stopping, in
a child process.  The child is killed (SIGKILL) after a random time and started again with ``resume=True``, until the
run is finished; then another run begins, until the number of kills is reached.  Every second run writes a checkpoint
after every step, so that many kills fall in the middle of one.  Every finished run is compared with the uninterrupted
one: the weights kept, the last state (weights, optimiser, averages, best weights, history) and the log, without times.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which optimisers import at their first step: here once, and not in every child

import likely
from likely.contract import Column, Table
from likely.data.dataset import Dataset
from likely.models.vae import VAE
from likely.training import train
from likely.training.checkpoints import Checkpoints
from turns import write_record

RESULTS = Path(__file__).parent / "results" / "kill_resume"
#: Kills of one run; then it may finish.
KILLS = 5

SPACE = Table(
    columns=(
        Column("colour", "categorical", levels=4),
        Column("size", "real", resolution=0.5, missing=True),
        Column("count", "integer"),
        Column("sold", "binary", missing=True),
    )
)


def data(n: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    colour = torch.randint(4, (n,), generator=generator).double()
    size = (2 * colour + torch.randn(n, generator=generator).double()).mul(2).round() / 2
    count = (size.abs() + 3 * torch.rand(n, generator=generator)).floor()
    sold = (torch.rand(n, generator=generator) < torch.sigmoid(size - 3)).double()
    for column in (size, sold):
        column[torch.rand(n, generator=generator) < 0.1] = torch.nan
    return Dataset(SPACE, torch.stack([colour, size, count, sold], 1))


def run(folder: Path, steps: int, every_step: bool) -> None:
    """The run, from the beginning or from its last checkpoint."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = VAE(SPACE, latent_dim=2, hidden=(16, 16), dropout=0.1)
    train(
        model,
        data(2000, seed=1),
        data(300, seed=2),
        steps=steps,
        batch_size=64,
        log_every=20,
        evaluate_every=50,
        patience=1000,
        checkpoint_seconds=0.0 if every_step else 0.01,
        clip_norm=5.0,
        run=folder,
        resume=True,
        progress=False,
    )


def start(folder: Path, steps: int, every_step: bool) -> int:
    """Start the run in a child process, and return its number."""
    child = os.fork()
    if child:
        return child
    try:
        run(folder, steps, every_step)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def outcome(folder: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Everything that must be equal: tensors as bytes, values as JSON."""
    checkpoint = Checkpoints(folder / "state").read(print)
    assert checkpoint is not None
    tensors = {name: value.numpy().tobytes() for name, value in checkpoint.tensors.items()}
    tensors["model.safetensors"] = (folder / "model.safetensors").read_bytes()
    values = {k: v for k, v in checkpoint.values.items() if k not in ("seconds", "log_bytes")}
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    values["log"] = [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    return tensors, {"step": checkpoint.step, **values}


def last_step(folder: Path) -> int:
    files = sorted((folder / "state").glob("step-*.json"))
    return int(files[-1].stem.split("-")[1]) if files else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    kills = runs = differing = torn = 0
    with tempfile.TemporaryDirectory() as temporary:
        reference = Path(temporary) / "reference"
        began = time.monotonic()
        if os.waitpid(start(reference, arguments.steps, False), 0)[1] != 0:
            return 1
        longest = time.monotonic() - began
        expected = outcome(reference)
        print(f"uninterrupted: {arguments.steps} steps in {longest:.1f} s, {len(expected[0])} tensors")
        print(f"{'run':>4} {'kill':>5} {'after s':>8} {'checkpoint at step':>19}  in state/ at that instant")
        while kills < arguments.kills:
            runs += 1
            folder, killed = Path(temporary) / f"run{runs}", 0
            while True:
                child = start(folder, arguments.steps, runs % 2 == 0)
                delay = chance.uniform(0.0, 0.4 * longest) if killed < KILLS and kills < arguments.kills else math.inf
                until = time.monotonic() + delay
                ended = (0, 0)
                while time.monotonic() < until and not ended[0]:
                    ended = os.waitpid(child, os.WNOHANG)
                    time.sleep(0.001)
                if ended[0]:
                    if ended[1] != 0:
                        print(f"run {runs} failed")
                        return 1
                    break
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                kills, killed = kills + 1, killed + 1
                files = [path.name for path in (folder / "state").glob("*")] if (folder / "state").exists() else []
                complete = sum(name.endswith(".json") and not name.startswith(".") for name in files)
                half = any(name.endswith(".tmp") for name in files) or len(files) != 2 * complete
                torn += half
                what = "half-written checkpoint" if half else f"{complete} checkpoints"
                print(f"{runs:4d} {kills:5d} {delay:8.2f} {last_step(folder):19,d}  {what}")
            tensors, values = outcome(folder)
            wrong = [name for name in expected[0] if tensors.get(name) != expected[0][name]]
            wrong += [name for name in expected[1] if values.get(name) != expected[1][name]]
            differing += bool(wrong)
            print(f"run {runs} finished: " + (f"differs in {', '.join(wrong)}" if wrong else "equal to the bit"))
    said = f"{kills} kills ({torn} in the middle of a checkpoint), {runs} finished runs, {differing} differ"
    print(said)
    record(
        arguments, {"kills": kills, "in_a_checkpoint": torn, "finished_runs": runs, "runs_that_differ": differing}, said
    )
    return 1 if differing else 0


def record(arguments: argparse.Namespace, result: dict[str, int], said: str) -> None:
    """Keep the result as JSON and as a page, with what it was measured on."""
    command = f"python benchmarks/kill_resume.py --kills {arguments.kills} --steps {arguments.steps}"
    about = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
        "versions": {"likely": likely.__version__, "torch": torch.__version__},
    }
    page = (
        f"# Killed and resumed\n\n{said}.\n\n`{command}`; {about['machine']}; {about['versions']}; {about['date']}.\n"
    )
    write_record(arguments.out, {**result, **about}, page)


if __name__ == "__main__":
    sys.exit(main())
