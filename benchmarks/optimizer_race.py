"""Steps and time that every optimiser needs to a fixed held-out bound, each tuned over the same grid.

    LIKELY_DATA=… python benchmarks/optimizer_race.py run --log DIR [--task mnist adult text]
    python benchmarks/optimizer_race.py table --log DIR --out benchmarks/results/optimizer_race

Three tasks: ``mnist`` (a VAE 784-256-32 on binary digits), ``adult`` (a VAE of a table of 15 columns) and ``text`` (a
byte-level transformer of 0.9 M weights on Shakespeare, context 128).  Every optimiser gets the same budget of steps,
the same batches and initial weights, a warm-up over the first twentieth, then a constant learning rate; what is
evaluated is the average of the weights over the last steps (half-life: a tenth of the steps so far), the same for all,
or the optimiser's own where it has one (schedule-free).  So the curve of a run tells at every step what a run of that
length would have reached, and no schedule favours anyone.

Tuning, with seed 0: the learning rates of GRID at decay DECAYS[0], going on outwards while the best is at the edge;
then the other decays at the best learning rate.  The best setting is run with the seeds of SEEDS.  The target is what
AdamW's best setting reaches at the end of its budget, the median of its seeds; steps and processor seconds to it are
those at which the curve falls to it, linearly interpolated.  Seconds are those of training steps alone, one thread; a
time is told for a machine on which AdamW's best setting has run too.

``run`` writes a line of JSON for every run to DIR/runs.jsonl, leaves out what is there already, and may be killed at
any time.  ``table`` reads that file, whole or not.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.optim.adam import Adam, AdaMax, AdamW, NAdam
from likely.optim.averaging import Average, ScheduleFree, power
from likely.optim.matrixrule import matrix_groups
from likely.optim.muon import Muon
from likely.optim.shampoo import Shampoo
from likely.optim.soap import SOAP
from turns import machine, versions

GRID = [1e-3, 3e-3, 1e-2]
#: From a rate at the edge to the next beyond it (1, 3, 10, …), and how far that goes.
FACTOR, LEAST, MOST = math.sqrt(10), 1e-5, 0.3
DECAYS = [0.0, 0.1]
SEEDS = [0, 1, 2]
#: name: makes the optimiser of a model, from a learning rate and a decoupled weight decay.
OPTIMIZERS: dict[str, Callable[[nn.Module, float, float], Any]] = {
    "adamw": lambda model, lr, decay: AdamW(model.parameters(), lr, weight_decay=decay),
    "adamw 0.9 0.95": lambda model, lr, decay: AdamW(model.parameters(), lr, (0.9, 0.95), weight_decay=decay),
    "soap": lambda model, lr, decay: SOAP(model.parameters(), lr, weight_decay=decay, precision="full"),
    "soap, bfloat16": lambda model, lr, decay: SOAP(model.parameters(), lr, weight_decay=decay, precision="bfloat16"),
    "shampoo": lambda model, lr, decay: Shampoo(model.parameters(), lr, weight_decay=decay, precision="full"),
    "shampoo, bfloat16": lambda model, lr, decay: Shampoo(
        model.parameters(), lr, weight_decay=decay, precision="bfloat16"
    ),
    "muon": lambda model, lr, decay: Muon(matrix_groups(model), lr, weight_decay=decay),
    "muon, 4 iterations": lambda model, lr, decay: Muon(matrix_groups(model), lr, weight_decay=decay, iterations=4),
    "nadam": lambda model, lr, decay: NAdam(model.parameters(), lr, weight_decay=decay, decay="lr"),
    "amsgrad": lambda model, lr, decay: AdamW(model.parameters(), lr, weight_decay=decay, amsgrad=True),
    "adamax": lambda model, lr, decay: AdaMax(model.parameters(), lr, weight_decay=decay, decay="lr"),
    "adam (decay in the loss)": lambda model, lr, decay: Adam(model.parameters(), lr, weight_decay=decay),
    "schedule-free adamw": lambda model, lr, decay: ScheduleFree(
        AdamW(model.parameters(), lr, (0.0, 0.999), weight_decay=decay)
    ),
}


# --------------------------------------------------------------------------------------------------------------
# Tasks
# --------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    """A model to train.

    Args:
        model: initialised.
        loss: of the batch of a step.
        held_out: the bound on held-out data, to be made small.
        steps: budget.
        every: steps from one evaluation to the next.
        unit: of the bound.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    held_out: Callable[[], float]
    steps: int
    every: int
    unit: str


def _vae(data: Any, held: Any, batch: int, seed: int, **options: Any) -> tuple[nn.Module, Any, Any]:
    from likely.models.vae import VAE
    from likely.noise import KeyedNoise, StreamNoise, content_keys

    torch.manual_seed(seed)
    model = VAE(data.space, **options)
    model.initialise([(data.x[:2000], None)])
    noise, order = torch.Generator(), torch.Generator()

    def loss(step: int) -> Tensor:
        rows = torch.randint(len(data.x), (batch,), generator=order.manual_seed(seed * 1_000_003 + step))
        drawn = StreamNoise(noise.manual_seed(seed * 1_000_003 + step))
        return model.loss(data.x[rows], None, drawn, step).value

    def held_out() -> float:
        bound = model.bound(held.x, None, KeyedNoise(0, content_keys(held.x)))
        return -bound.nats.mean().item()

    return model, loss, held_out


def mnist(seed: int) -> Task:
    """A VAE 784-256-32 on digits binarised once, batch 100; nats per image on 2,000 training images held out."""
    import numpy as np

    from likely.contract import Binary
    from likely.data import Dataset

    with gzip.open(Path(os.environ["LIKELY_DATA"]) / "mnist" / "train-images-idx3-ubyte.gz") as file:
        grey = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
    uniform = torch.rand(grey.shape, generator=torch.Generator().manual_seed(0))
    x = (uniform < torch.from_numpy(grey.copy()).float() / 255).float()
    data, held = Dataset(Binary((784,)), x[:58_000]), Dataset(Binary((784,)), x[58_000:])
    model, loss, held_out = _vae(data, held, 100, seed, latent_dim=32, hidden=(256,))
    return Task(model, loss, held_out, steps=800, every=40, unit="nats per image")


def adult(seed: int) -> Task:
    """A VAE of the 15 columns of Adult, batch 256; nats per row on 2,000 training rows held out."""
    from likely.data import Dataset, infer_schema

    path = Path(os.environ["LIKELY_DATA"]) / "tables" / "adult-train.csv.gz"
    table = infer_schema(path).read(path)
    order = torch.randperm(len(table.x), generator=torch.Generator().manual_seed(0))
    data, held = Dataset(table.space, table.x[order[2000:]]), Dataset(table.space, table.x[order[:2000]])
    model, loss, held_out = _vae(data, held, 256, seed, latent_dim=8, hidden=(128, 128))
    return Task(model, loss, held_out, steps=800, every=40, unit="nats per row")


CONTEXT, WIDTH, LAYERS, HEADS = 128, 128, 4, 4


class Transformer(nn.Module):
    """A causal transformer over bytes, as plain as can be: pre-norm, GELU, learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                last = name.endswith(("out.weight", "down.weight"))  # into the residual stream
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * LAYERS) if last else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position.weight[: x.shape[1]]
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from likely.networks.linear import Linear  # nn.Linear, multiplied faster on some processors

        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = Linear(WIDTH, 4 * WIDTH), Linear(4 * WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        n = self.norm1(h)
        q, k, v = (part(n).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + self.out(mixed)
        return h + self.down(F.gelu(self.up(self.norm2(h))))


def text(seed: int) -> Task:
    """Next byte of Shakespeare, 16 windows of 128; bits per byte on 64 windows of the last tenth."""
    with gzip.open(Path(os.environ["LIKELY_DATA"]) / "text" / "tiny_shakespeare.txt.gz") as file:
        data = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).long()
    data, rest = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    torch.manual_seed(seed)
    model, order = Transformer(), torch.Generator()

    def nats(windows: Tensor) -> Tensor:
        return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())

    def loss(step: int) -> Tensor:
        starts = torch.randint(len(data) - CONTEXT - 1, (16,), generator=order.manual_seed(seed * 1_000_003 + step))
        return nats(data[starts[:, None] + torch.arange(CONTEXT + 1)])

    held = rest[torch.linspace(0, len(rest) - CONTEXT - 1, 64).long()[:, None] + torch.arange(CONTEXT + 1)]

    def held_out() -> float:
        return nats(held).item() / math.log(2)

    return Task(model, loss, held_out, steps=300, every=15, unit="bits per byte")


TASKS: dict[str, Callable[[int], Task]] = {"mnist": mnist, "adult": adult, "text": text}
#: Left out where a run is dear: what the others show to be near AdamW.
LEFT_OUT = {"text": {"nadam", "amsgrad", "adamax", "adam (decay in the loss)"}}


def entrants(task: str) -> list[str]:
    """The optimisers that run a task."""
    return [name for name in OPTIMIZERS if name not in LEFT_OUT.get(task, ())]


# --------------------------------------------------------------------------------------------------------------
# A run
# --------------------------------------------------------------------------------------------------------------


def train(task: Task, make: Callable[[nn.Module, float, float], Any], lr: float, decay: float) -> dict[str, Any]:
    """The curve of a run: lists of steps, processor seconds of training, and held-out bound."""
    optimizer = make(task.model, lr, decay)
    schedule_free = isinstance(optimizer, ScheduleFree)
    groups = (optimizer.optimizer if schedule_free else optimizer).param_groups
    average = Average([] if schedule_free else task.model.parameters(), power(0.1))
    warmup = task.steps // 20
    curve: dict[str, list[float]] = {"steps": [], "seconds": [], "bound": []}
    seconds, slowest = 0.0, 0.0
    for step in range(task.steps):
        start = time.process_time()
        for group in groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup)
        optimizer.zero_grad()
        loss = task.loss(step)
        loss.backward()
        nn.utils.clip_grad_norm_(task.model.parameters(), 1.0)
        optimizer.step()
        if not schedule_free:
            average.update()
        took = time.process_time() - start
        seconds, slowest = seconds + took, max(slowest, took)
        if (step + 1) % task.every == 0:
            with torch.no_grad(), optimizer.averaged() if schedule_free else average.applied():
                task.model.eval()
                bound = task.held_out()
                task.model.train()
            curve["steps"].append(step + 1)
            curve["seconds"].append(round(seconds, 3))
            curve["bound"].append(bound if math.isfinite(bound) else math.inf)
            if not math.isfinite(bound) or bound > 20 * curve["bound"][0]:
                break
    return {**curve, "budget": task.steps, "unit": task.unit, "slowest": round(slowest, 4)}


class Log:
    """The runs made so far, in a file of JSON lines."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "runs.jsonl"
        self.runs: dict[tuple[str, str, float, float, int], dict[str, Any]] = {}
        self.again: list[dict[str, Any]] = []  # runs of the same on other machines
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                self._add(json.loads(line))

    @staticmethod
    def key(record: dict[str, Any]) -> tuple[str, str, float, float, int]:
        return record["task"], record["optimizer"], record["lr"], record["decay"], record["seed"]

    def run(self, task: str, optimizer: str, lr: float, decay: float, seed: int, here: bool = False) -> dict[str, Any]:
        """The record of a run, which is made if it was not yet, on this kind of processor or on any."""
        key, processor = (task, optimizer, lr, decay, seed), machine()["processor"]
        known = [run for run in [*self.runs.values(), *self.again] if self.key(run) == key]
        if here:
            known = [run for run in known if run["processor"] == processor]
        if known:
            return known[0]
        names = dict(zip(("task", "optimizer", "lr", "decay", "seed"), key))
        record = {**names, "processor": processor, **train(TASKS[task](seed), OPTIMIZERS[optimizer], lr, decay)}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self._add(record)
        print(task, optimizer, lr, decay, seed, reached(record), record["seconds"][-1], flush=True)
        return record

    def _add(self, record: dict[str, Any]) -> None:
        if self.key(record) in self.runs:
            self.again.append(record)
        else:
            self.runs[self.key(record)] = record


def reached(record: dict[str, Any]) -> float:
    """The bound at the end of the budget; infinity where a run broke off."""
    return float(record["bound"][-1]) if record["steps"][-1] == record["budget"] else math.inf


def tuned(log: Log, task: str, optimizer: str) -> tuple[float, float]:
    """The best learning rate and decay; the runs that this takes are made where they are not yet."""
    rates = list(GRID)

    def score(lr: float, decay: float) -> float:
        return reached(log.run(task, optimizer, lr, decay, SEEDS[0]))

    while True:
        best = min(rates, key=lambda lr: score(lr, DECAYS[0]))
        if best not in (min(rates), max(rates)):
            break
        further = float(f"{best / FACTOR if best == min(rates) else best * FACTOR:.1g}")
        if not LEAST <= further <= MOST:
            break
        rates.append(further)
    return best, min(DECAYS, key=lambda decay: score(best, decay))


def race(log: Log, tasks: list[str]) -> None:
    """All runs, those of a task together."""
    for task in tasks:
        for optimizer in entrants(task):
            lr, decay = tuned(log, task, optimizer)
            for seed in SEEDS:
                log.run(task, optimizer, lr, decay, seed, here=optimizer == "adamw")  # times are divided by its


# --------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------


def to_target(record: dict[str, Any], target: float) -> tuple[float, float] | None:
    """Steps and seconds at which a run's curve falls to the target, linearly interpolated; None if it does not."""
    before = None
    for point in zip(record["steps"], record["seconds"], record["bound"]):
        if point[2] <= target:
            if before is None or before[2] == math.inf:
                return point[0], point[1]
            share = (before[2] - target) / (before[2] - point[2])
            return before[0] + share * (point[0] - before[0]), before[1] + share * (point[1] - before[1])
        before = point
    return None


def table(log: Log) -> dict[str, Any]:
    """What the runs say so far: for every task and optimiser that is done, medians and ranges over the seeds."""
    found: dict[str, Any] = {}
    for task in TASKS:
        done = {}
        for optimizer in entrants(task):
            best = _best(log, task, optimizer)
            runs = [log.runs.get((task, optimizer, *best, seed)) for seed in SEEDS] if best else []
            if best and all(runs):
                done[optimizer] = (best, [run for run in runs if run])
        if "adamw" not in done:
            continue
        base = done["adamw"][1]
        target = statistics.median(reached(run) for run in base)
        budget, unit = base[0]["budget"], base[0]["unit"]
        others = [run for run in log.again if log.key(run) in map(log.key, base)]
        by_machine: dict[str, list[float]] = {}
        for run in [*base, *others]:
            by_machine.setdefault(run["processor"], []).append(run["seconds"][-1])
        base_seconds = {processor: statistics.median(seconds) for processor, seconds in by_machine.items()}
        rows = []
        for optimizer, ((lr, decay), runs) in done.items():
            points = [to_target(run, target) for run in runs]
            rows.append(
                {
                    "optimizer": optimizer,
                    "lr": lr,
                    "decay": decay,
                    "bound": _spread([reached(run) for run in runs]),
                    "steps": _spread([point[0] / budget if point else math.inf for point in points]),
                    "time": _spread(
                        [
                            point[1] / base_seconds[run["processor"]] if point else math.inf
                            for run, point in zip(runs, points)
                        ]
                    ),
                    "milliseconds": statistics.median(1000 * run["seconds"][-1] / run["steps"][-1] for run in runs),
                    "runs_tuning": sum(key[:2] == (task, optimizer) for key in log.runs) - len(SEEDS) + 1,
                }
            )
        rows.sort(key=lambda row: row["steps"][0])
        found[task] = {"about": TASKS[task].__doc__, "target": target, "unit": unit, "budget": budget, "rows": rows}
    return found


def _best(log: Log, task: str, optimizer: str) -> tuple[float, float] | None:
    """The setting that was run with the last seed."""
    for key, record in log.runs.items():
        if key[:2] == (task, optimizer) and record["seed"] == SEEDS[-1]:
            return record["lr"], record["decay"]
    return None


def _spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def report(found: dict[str, Any], where: dict[str, list[str]], command: str) -> str:
    """The table as Markdown; ``where`` names the optimisers measured on every kind of processor."""
    lines = [
        "# Optimisers: steps and time to a fixed held-out bound",
        "",
        "Each tuned over the same grid (learning rates a factor of √10 apart, decay 0 or 0.1), best setting with three",
        "seeds: median (range).  The target is AdamW's median at the end of its budget; steps and time to it are",
        "fractions of AdamW's budget, ∞ where it was not reached.  Time is processor time of training, one thread.",
        "AdamW's own number is not 1 because a seed that ends below the median passed it earlier.",
    ]

    def told(spread: tuple[float, float, float], digits: int) -> str:
        median, low, high = (f"{x:.{digits}f}" if math.isfinite(x) else "∞" for x in spread)
        return f"{median} ({low}–{high})"

    for task, of in found.items():
        lines += [
            "",
            f"## {task}",
            "",
            f"{of['about']} Target {of['target']:.4g} {of['unit']}, budget {of['budget']} steps.",
            "",
            "| optimiser | learning rate, decay | bound at the end | steps | time | ms a step |",
            "|---|---|---|---|---|---|",
        ]
        for row in of["rows"]:
            digits = 3 if of["unit"] == "bits per byte" else 2
            lines.append(
                f"| {row['optimizer']} | {row['lr']:g}, {row['decay']:g} | {told(row['bound'], digits)} "
                f"| {told(row['steps'], 2)} | {told(row['time'], 2)} | {row['milliseconds']:.1f} |"
            )
    lines += ["", "Measured on:", "", *(f"* {name}: {', '.join(entered)}" for name, entered in where.items())]
    return "\n".join([*lines, "", f"`{command}`", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--task", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    log = Log(arguments.log)
    if arguments.what == "run":
        race(log, arguments.task)
    found = table(log)
    runs = [*log.runs.values(), *log.again]
    where = {
        processor: sorted({run["optimizer"] for run in runs if run["processor"] == processor})
        for processor in sorted({run["processor"] for run in runs})
    }
    text_of = report(found, where, "LIKELY_DATA=… python benchmarks/optimizer_race.py run --log DIR")
    print(text_of)
    if arguments.out:
        record = {"tasks": found, "runs": runs, "machine": machine(), "versions": versions()}
        arguments.out.with_suffix(".json").write_text(json.dumps(record) + "\n")
        arguments.out.with_suffix(".md").write_text(text_of)


if __name__ == "__main__":
    main()
