"""Time of a step and memory of the state, of our optimisers beside torch.optim's and pytorch_optimizer's, in one run.

    python benchmarks/optimizer_step.py --workdir DIR --out benchmarks/results/optimizer_step

Three networks: a small one of 200 tensors (0.4 M weights), six transformer layers of width 384 (10.6 M), and an MLP
784-2048-2048-2048-784 (11.6 M in few large tensors).  Every optimiser is a process of its own with weights and random
gradients of these shapes; they take turns, one step each (turns.py), so that every round gives ratios.  With one thread
the clock is processor time.  Preconditioners are renewed every ten steps, by ours and by the rivals; the table has the
median and the mean step, and the slowest (the first included) in medians.

pytorch_optimizer is installed in an environment of its own under --workdir, with the torch of this one.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from turns import Turns, machine, play, playing, versions, write_record

INTERVAL = 10
#: Elements of a tensor that every optimiser's process makes and frees first, as a training step does its activations:
#: from then on the C library keeps freed memory, instead of giving it back to the system after every operation.
TAKEN_AND_FREED = 1 << 22
PYTORCH_OPTIMIZER = "4.1.0"


def networks() -> dict[str, list[tuple[int, ...]]]:
    """Shapes of the weights."""
    mlp: list[tuple[int, ...]] = []
    for into, out in ((784, 2048), (2048, 2048), (2048, 2048), (2048, 784)):
        mlp += [(out, into), (out,)]
    layer: list[tuple[int, ...]] = [(1152, 384), (1152,), (384, 384), (384,), (1536, 384), (1536,), (384, 1536), (384,)]
    return {
        "200 tensors": [(64, 64), (64,)] * 100,
        "transformer": (layer + [(384,)] * 4) * 6,
        "MLP": mlp,
    }


# --------------------------------------------------------------------------------------------------------------
# The optimisers
# --------------------------------------------------------------------------------------------------------------


class Several:
    """Optimisers that share out the parameters."""

    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = optimizers

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


def torch_muon(parameters: list[Any]) -> Several:
    import torch

    matrices = [p for p in parameters if p.dim() == 2]
    rest = [p for p in parameters if p.dim() != 2]
    muon = torch.optim.Muon(matrices, 1e-3, adjust_lr_fn="match_rms_adamw")
    return Several(muon, torch.optim.AdamW(rest, 1e-3, fused=True))


def of_torch(name: str, **options: Any) -> Callable[[list[Any]], Any]:
    def make(parameters: list[Any]) -> Any:
        import torch

        return getattr(torch.optim, name)(parameters, lr=1e-3, **options)

    return make


def of_likely(file: str, name: str, **options: Any) -> Callable[[list[Any]], Any]:
    def make(parameters: list[Any]) -> Any:
        import importlib

        return getattr(importlib.import_module(f"likely.optim.{file}"), name)(parameters, lr=1e-3, **options)

    return make


def of_pytorch_optimizer(name: str, **options: Any) -> Callable[[list[Any]], Any]:
    def make(parameters: list[Any]) -> Any:
        import pytorch_optimizer

        return getattr(pytorch_optimizer, name)(parameters, lr=1e-3, **options)

    return make


#: name: how it is made, and the name of the rival that its time is divided by.
OPTIMIZERS: dict[str, tuple[Callable[[list[Any]], Any], str | None]] = {
    "torch AdamW, fused": (of_torch("AdamW", fused=True), None),
    "torch AdamW, foreach": (of_torch("AdamW", foreach=True), "torch AdamW, fused"),
    "likely AdamW": (of_likely("adam", "AdamW"), "torch AdamW, fused"),
    "likely Adam": (of_likely("adam", "Adam"), "torch AdamW, fused"),
    "torch Muon + AdamW": (torch_muon, None),
    "likely Muon": (of_likely("muon", "Muon"), "torch Muon + AdamW"),
    "likely Muon, 4 iterations": (of_likely("muon", "Muon", iterations=4), "torch Muon + AdamW"),
    "pytorch_optimizer SOAP": (of_pytorch_optimizer("SOAP", precondition_frequency=INTERVAL), None),
    "likely SOAP": (of_likely("soap", "SOAP", interval=INTERVAL), "pytorch_optimizer SOAP"),
    "pytorch_optimizer Shampoo": (of_pytorch_optimizer("Shampoo", preconditioning_compute_steps=INTERVAL), None),
    "likely Shampoo, one block": (
        of_likely("shampoo", "Shampoo", interval=INTERVAL, block=None),
        "pytorch_optimizer Shampoo",
    ),
    "pytorch_optimizer ScalableShampoo, blocks of 512": (
        of_pytorch_optimizer("ScalableShampoo", preconditioning_compute_steps=INTERVAL, block_size=512),
        None,
    ),
    "likely Shampoo, blocks of 512": (
        of_likely("shampoo", "Shampoo", interval=INTERVAL, block=512),
        "pytorch_optimizer ScalableShampoo, blocks of 512",
    ),
}


def take_part(optimizer: str, network: str, rounds: int, threads: int) -> None:
    """Be an optimiser: a step a turn."""
    turns = Turns()
    import torch

    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(0.02 * torch.randn(s, generator=generator)) for s in networks()[network]]
    gradients = [[0.01 * torch.randn(p.shape, generator=generator) for p in parameters] for _ in range(3)]
    made = OPTIMIZERS[optimizer][0](parameters)
    repeats = 1 if any(word in optimizer for word in ("Muon", "SOAP", "Shampoo")) else 5  # the others are quick
    torch.ones(TAKEN_AND_FREED).sum()
    turns.ready()
    for number in range(rounds):
        turns.wait()
        cpu, wall = [], []
        for repeat in range(repeats):
            for parameter, gradient in zip(parameters, gradients[(number + repeat) % 3]):
                parameter.grad = gradient.clone()
            start = time.process_time(), time.perf_counter()
            made.step()
            cpu.append(time.process_time() - start[0])
            wall.append(time.perf_counter() - start[1])
        turns.done(steps_cpu=cpu, steps_wall=wall)
    several = made.optimizers if isinstance(made, Several) else [made]
    seen = {id(p) for p in parameters}
    held = sum(_bytes(state, seen) for each in several for state in each.state.values())
    turns.end(state_bytes=held, weights=sum(p.numel() for p in parameters))


def _bytes(value: Any, seen: set[int]) -> int:
    """Memory of all tensors in a state, each once: in containers, and in the objects that some rivals keep there."""
    import torch

    if id(value) in seen:
        return 0
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        if not value.dim() or storage.data_ptr() in seen:
            return 0
        seen.add(storage.data_ptr())
        return storage.nbytes()
    if isinstance(value, dict):
        return sum(_bytes(item, seen) for item in value.values())
    if isinstance(value, list | tuple):
        return sum(_bytes(item, seen) for item in value)
    return _bytes(vars(value), seen) if hasattr(value, "__dict__") else 0


# --------------------------------------------------------------------------------------------------------------
# The referee
# --------------------------------------------------------------------------------------------------------------


def measure(network: str, names: Iterable[str], rounds: int, threads: int, pythons: dict[str, str], logs: Path) -> Any:
    """Rows of the table, from one run."""
    commands = {
        name: [
            pythons["pytorch_optimizer" if name.startswith("pytorch_optimizer") else "own"],
            *(str(Path(__file__).resolve()), "--player", name, "--network", network),
            *("--rounds", str(rounds), "--threads", str(threads)),
        ]
        for name in names
    }
    clock = "steps_cpu" if threads == 1 else "steps_wall"
    with playing(commands, threads, logs / network.replace(" ", "-")) as players:
        turns = play(players, rounds)
        ends = {name: player.end() for name, player in players.items()}
    rows = []
    for name in commands:
        per_turn = [turn[clock] for turn in turns[name]]
        steps = [step for turn in per_turn for step in turn]
        rival = OPTIMIZERS[name][1]
        row = {
            "optimizer": name,
            "median_seconds": statistics.median(steps),
            "mean_seconds": statistics.fmean(steps),
            "slowest_in_medians": max(steps) / statistics.median(steps),
            "bytes_per_weight": ends[name]["state_bytes"] / ends[name]["weights"],
            "steps": steps,
        }
        if rival in commands:
            theirs = [turn[clock] for turn in turns[str(rival)]]
            ratios = [statistics.median(a) / statistics.median(b) for a, b in zip(per_turn[1:], theirs[1:])]
            row["rival"] = rival
            row["ratio_median"] = statistics.median(ratios)
            row["ratio_mean"] = statistics.fmean(steps) / statistics.fmean([step for turn in theirs for step in turn])
        rows.append(row)
    return rows


def environment(workdir: Path) -> str:
    """The Python of an environment with pytorch_optimizer and this torch."""
    import torch

    folder = workdir / "venv"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        version = str(torch.__version__).split("+")[0]
        wanted = [f"torch=={version}", "numpy", f"pytorch_optimizer=={PYTORCH_OPTIMIZER}"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
    return str(python)


def measured(out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The networks that OUT has from the same day, machine and versions, measured one at a time like this one."""
    if not out.with_suffix(".json").exists():
        return {}
    before = json.loads(out.with_suffix(".json").read_text())
    before["processor"], now = before["machine"]["processor"], {**record, "processor": record["machine"]["processor"]}
    if any(before[key] != now[key] for key in ("date", "rounds", "threads", "versions", "processor")):
        raise SystemExit(f"--out: expected no results, or those of this day, machine and versions, got {out}")
    return dict(before["networks"])


def report(record: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = ["# Optimisers: time of a step and memory of the state", ""]
    lines += [
        f"{record['machine']['processor']}, {record['threads']} thread(s), {record['clock']}; torch "
        f"{record['versions']['torch']}, pytorch_optimizer {PYTORCH_OPTIMIZER}; {record['date']}.  Medians over "
        f"{record['rounds']} rounds in which all took turns.  Ratios are medians of the rounds' ratios to the rival of "
        f"the same kind (and ratios of the means).  Roots and bases are renewed every {INTERVAL} steps.",
    ]
    for network, rows in record["networks"].items():
        lines += ["", f"## {network}", ""]
        lines += [
            "| optimiser | ms, median | mean | ratio of medians (means) | slowest / median | state bytes a weight |"
        ]
        lines += ["|---|---|---|---|---|---|"]
        for row in rows:
            ratio = f"{row['ratio_median']:.2f} ({row['ratio_mean']:.2f})" if "ratio_median" in row else "1"
            lines.append(
                f"| {row['optimizer']} | {1000 * row['median_seconds']:.2f} | {1000 * row['mean_seconds']:.2f} "
                f"| {ratio} | {row['slowest_in_medians']:.1f} | {row['bytes_per_weight']:.1f} |"
            )
    return "\n".join([*lines, "", f"`{record['command']}`", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, default=Path("build/optimizer_step"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=2 * INTERVAL + 2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--network", choices=list(networks()))
    parser.add_argument("--only", nargs="+", choices=list(OPTIMIZERS), help="some of the optimisers")
    parser.add_argument("--player", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.player:
        take_part(arguments.player, arguments.network, arguments.rounds, arguments.threads)
        return
    names = arguments.only or list(OPTIMIZERS)
    pythons = {"own": sys.executable}
    if any(name.startswith("pytorch_optimizer") for name in names):
        pythons["pytorch_optimizer"] = environment(arguments.workdir)
    record: dict[str, Any] = {
        "networks": {},
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "clock": "processor time" if arguments.threads == 1 else "elapsed time",
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(UTC).date().isoformat(),
        "command": "python benchmarks/optimizer_step.py --workdir DIR --out benchmarks/results/optimizer_step",
    }
    logs = arguments.workdir / "logs"
    if arguments.network and arguments.out:
        record["networks"] = measured(arguments.out, record)
    for network, shapes in networks().items():
        if arguments.network in (None, network):
            print(network, f"{sum(math.prod(shape) for shape in shapes):,} weights", flush=True)
            rows = measure(network, names, arguments.rounds, arguments.threads, pythons, logs)
            record["networks"][network] = rows
            if arguments.out:
                write_record(arguments.out, record, report(record))
    print(report(record))


if __name__ == "__main__":
    main()
