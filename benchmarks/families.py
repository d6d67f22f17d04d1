"""All families on the same images for the same processor time: held-out bits/dim, one table.

Every family may train for the same number of CPU seconds on one thread: the cost of a step is measured on steps that are
then thrown away, and the run has as many steps as fit, with a cosine decay to zero.  The weights kept are those of the
best evaluation on held-out training images; on digits a run ends when none has been better for a while.  The number is the bound of the contract on the test images, in
bits/dim, with what kind of number it is; nothing is weighted.  The VAE's importance-weighted bound and the diffusion
model's bound in 16 levels cost evaluation time only.  A picture shows the first samples of every family.

    python benchmarks/families.py --minutes 10 --out benchmarks/results/families_digits
    LIKELY_DATA=… python benchmarks/families.py --data mnist --minutes 10 --out benchmarks/results/families_mnist
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import platform
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import likely
from likely import api, models
from likely.contract import Integers, Model
from likely.data import Dataset, infer_schema
from likely.data.images import write_sheet
from likely.evaluation import held_out, importance_weighted
from likely.evaluation.heldout import evaluating
from likely.noise import StreamNoise
from likely.training import train
from likely.units import bits_per_dim
from turns import write_record

#: Model and training options by data set and family.
CASES: dict[str, dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "digits": {
        "vae": (
            "vae",
            {"latent_dim": 16, "hidden": (256, 256), "prior": "mixture", "prior_options": {"components": 50}},
            {"learning_rate": 2e-3},
        ),
        "nsf": ("nsf", {}, {"learning_rate": 1e-3}),
        "glow": ("glow", {}, {"learning_rate": 1e-3}),
        "vdm": (
            "vdm",
            {"network": "unet", "network_options": {"width": 32, "depth": 2, "dropout": 0.1}},
            {"learning_rate": 2e-3},
        ),
        "vdm, mlp": (
            "vdm",
            {"network": "mlp", "network_options": {"width": 256, "depth": 3, "dropout": 0.1}},
            {"learning_rate": 2e-3},
        ),
        "pixelcnn": ("pixelcnn", {"width": 64, "layers": 3, "dropout": 0.1}, {"learning_rate": 2e-3}),
    },
    "mnist": {
        "vae": (
            "vae",
            {
                "latent_dim": 32,
                "network": "conv",
                "hidden": (16, 32, 256),
                "prior": "mixture",
                "prior_options": {"components": 100},
            },
            {"learning_rate": 2e-3},
        ),
        "glow": ("glow", {}, {"learning_rate": 1e-3}),
        "vdm": (
            "vdm",
            {"network": "unet", "network_options": {"width": 32, "depth": 2, "scales": (1, 2), "fourier": (6, 7)}},
            {"learning_rate": 2e-3},
        ),
        "pixelcnn": ("pixelcnn", {"width": 96, "positions": 64}, {"learning_rate": 2e-3}),
    },
}
TRAINING = {"batch_size": 128, "progress": False, "evaluate_examples": 200}
#: Steps from one evaluation on held-out training images to the next, and evaluations without a better one after which
#: a family stops: the few digits are soon learned by heart.
EVALUATE: dict[str, dict[str, Any]] = {"digits": {"evaluate_every": 200, "patience": 15}, "mnist": {"patience": None}}
#: Levels in which the bound of a diffusion model is evaluated.
LEVELS = 16
#: Samples of each family in the picture: rows and columns.
SAMPLES = (2, 20)


def read(data: str) -> tuple[Dataset, Dataset, Dataset]:
    """Training, validation and test images as integers of shape (1, H, W)."""
    if data == "digits":
        from sklearn.datasets import load_digits

        x = torch.tensor(load_digits().images).float().unsqueeze(1)
        x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
        space = Integers((1, 8, 8), 17)
        return Dataset(space, x[:1300]), Dataset(space, x[1300:1437]), Dataset(space, x[1437:])
    folder = Path(os.environ["LIKELY_DATA"]) / "mnist"
    schema = infer_schema(folder / "train-images-idx3-ubyte.gz")
    every = schema.read(folder / "train-images-idx3-ubyte.gz")
    test = schema.read(folder / "t10k-images-idx3-ubyte.gz")
    return every.subset(slice(0, 59_000)), every.subset(slice(59_000, 60_000)), test


def step_seconds(model: Model, data: Dataset, options: dict[str, Any]) -> float:
    """CPU seconds of a training step, on a copy of the model."""
    for steps in (4, 24):  # the first run warms up
        start = time.process_time()
        train(copy.deepcopy(model), data, None, steps=steps, **TRAINING, **options)
    return (time.process_time() - start) / steps


def measure(name: str, data: str, minutes: float, seed: int, most: int | None) -> tuple[dict[str, Any], Tensor]:
    """Train a family and evaluate it on the test images; with its first samples, uint8 of shape ``(n, height, width)``."""
    family, options, training = CASES[data][name]
    train_set, valid_set, test_set = read(data)
    if most is not None:
        test_set = test_set.subset(slice(0, most))
    model = api.build_model(family, train_set.space, seed=seed, options=options)
    steps = max(10, int(60 * minutes / step_seconds(model, train_set, training)))
    start = time.process_time()
    often = {"evaluate_every": max(1, steps // 6)} | EVALUATE[data]
    run = train(model, train_set, valid_set, steps=steps, seed=seed, **often, **TRAINING, **training)
    cpu = time.process_time() - start  # with the evaluations on held-out images, which the budget leaves out
    if hasattr(model, "bound_levels"):
        model.bound_levels = LEVELS
    found = held_out(model, test_set)
    dims = test_set.space.dims
    row = {
        "name": name,
        "kind": found.kind,
        "bits_per_dim": bits_per_dim(found.nats, dims),
        "standard_error": -bits_per_dim(found.standard_error, dims),
        "parts_nats": found.parts,
        "test_images": len(test_set),
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": run.steps,
        "steps_planned": steps,
        "best_step": run.valid["step"] if run.valid else None,
        "cpu_seconds": round(cpu),
        "options": options,
    }
    if family == "vae":
        tight = importance_weighted(model, test_set, samples=200)
        row["importance_weighted_bits_per_dim"] = bits_per_dim(tight.nats, dims)
    with evaluating(model) as device:
        samples = model.sample(math.prod(SAMPLES), noise=StreamNoise(torch.Generator().manual_seed(seed), device))
    top = test_set.space.levels - 1
    return row, (samples.squeeze(1).double() * (255 / top)).round().to(torch.uint8)


def table(result: dict[str, Any], picture: str = "") -> str:
    """The result as Markdown, with the name of the picture."""
    lines = [
        f"# {result['data']}: held-out bits/dim after {result['minutes']:g} CPU minutes of training, one thread",
        "",
        "Bounds are those of the contract on the test images; ± is the standard error over images.  The steps were set",
        "before the training, from their measured cost; what was spent, evaluations on held-out images included, is in the",
        "table.",
        "",
        "| family | bits/dim | kind | parameters | steps, best | CPU s with evaluations |",
        "|---|---|---|---|---|---|",
    ]
    for row in sorted(result["rows"], key=lambda row: row["bits_per_dim"]):
        value = f"{row['bits_per_dim']:.3f} ± {abs(row['standard_error']):.3f}"
        if "importance_weighted_bits_per_dim" in row:
            value += f" ({row['importance_weighted_bits_per_dim']:.3f} with 200 importance weights)"
        lines.append(
            f"| {row['name']} | {value} | {row['kind']} | {row['parameters']:,} | {row['steps']:,}, {row['best_step']:,} | {row['cpu_seconds']} |"
        )
    images, names = result["rows"][0]["test_images"], ", ".join(row["name"] for row in result["rows"])
    lines += ["", f"Samples, {SAMPLES[0]} rows each, from above: {names}."]
    if picture:
        lines += ["", f"![samples]({picture})"]
    lines += ["", f"{images:,} test images.  `{result['command']}`, {result['machine']}, {result['date']}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=CASES, default="digits")
    parser.add_argument("--minutes", type=float, default=2.0, help="CPU minutes of training for each family")
    parser.add_argument("--families", nargs="+", default=None)
    parser.add_argument("--test-images", type=int, default=None, help="fewer test images, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = {name for name, (family, _, _) in CASES[arguments.data].items() if family in models.names()}
    wanted = arguments.families or [name for name in CASES[arguments.data] if name in known]
    for name in wanted:
        if name not in known:
            parser.error(f"--families: expected some of {', '.join(sorted(known))}, got {name!r}")
    rows, pictures = [], []
    for name in wanted:
        row, samples = measure(name, arguments.data, arguments.minutes, arguments.seed, arguments.test_images)
        rows.append(row)
        pictures.append(samples)
        print(f"{name}: {rows[-1]['bits_per_dim']:.4f} bits/dim", file=sys.stderr, flush=True)
    if not all(math.isfinite(row["bits_per_dim"]) for row in rows):
        raise SystemExit("a family has no finite number of bits")
    result = {
        "data": arguments.data,
        "minutes": arguments.minutes,
        "rows": rows,
        "command": shlex.join(["python", "benchmarks/families.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared, 1 thread",
        "versions": {"likely": likely.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    print(table(result))
    if arguments.out is not None:
        picture = arguments.out.with_suffix(".png")
        write_record(arguments.out, result, table(result, picture.name))
        write_sheet(torch.cat(pictures).numpy(), picture, across=SAMPLES[1])


if __name__ == "__main__":
    main()
