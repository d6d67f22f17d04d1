"""Variational autoencoders on dynamically binarised MNIST: the architecture of IWAE's Table 1, and the best we can do.

Paper: Burda, Grosse & Salakhutdinov 2015 (arXiv 1509.00519), Table 1, one stochastic layer, k = 1: a test negative
log-likelihood of 86.76 nats (L_5000) after 3,280 epochs.  Protocol: every pixel is a fresh Bernoulli draw of its grey
value at each visit; 59,600 training and 400 held-out images; the figure is L_5000 on the 10,000 test images.

    LIKELY_DATA=… python papers/vae_mnist.py iwae --minutes 15
    LIKELY_DATA=… python papers/vae_mnist.py best --minutes 45 --snapshots 15

The result is added to papers/results/vae_mnist.json and the table papers/results/vae_mnist.md is written again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import likely
from likely.data import Dataset, infer_schema
from likely.evaluation import active_units, held_out, importance_weighted
from likely.models import find
from likely.training import Callback, train

RESULTS = Path(__file__).parent / "results" / "vae_mnist"

#: Model and training options of each recipe.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "iwae": {
        "model": {"latent_dim": 50, "hidden": (200, 200), "activation": "tanh", "gradient": "path"},
        "training": {"batch_size": 250, "learning_rate": 4e-3},
    },
    "best": {
        "model": {
            "latent_dim": 40,
            "network": "conv",
            "hidden": (16, 32, 256),
            "blocks": (0, 2),
            "gradient": "path",
            "prior": "mixture",
            "prior_options": {"components": 200},
        },
        "training": {"batch_size": 100, "learning_rate": 4e-3},
    },
}
COMMON = {
    "optimizer": "adamw",
    "optimizer_options": {"betas": (0.9, 0.99)},
    "warmup": 500,
    "decay": "cosine",
    "precision": "bfloat16",
    "compile": True,
    "patience": None,
    "average_fraction": 0.02,
}
LIVE_SAMPLES, FINAL_SAMPLES = 500, 5000


class Snapshots(Callback):
    """Keeps the averaged weights at given times, for figures at several budgets from one run."""

    def __init__(self, minutes: list[float]) -> None:
        self.due = sorted(minutes)
        self.kept: dict[float, dict[str, torch.Tensor]] = {}
        self.start = time.monotonic()

    def on_step(self, run: Any) -> None:
        while self.due and time.monotonic() - self.start >= 60 * self.due[0]:
            with run.averaged():
                self.kept[self.due.pop(0)] = {k: v.detach().clone() for k, v in run.model.state_dict().items()}


def read_mnist(folder: Path, digits: int | None) -> tuple[Dataset, Dataset, Dataset]:
    """Training, held-out and test images as binary draws of their grey values, shape (1, 28, 28)."""
    schema = infer_schema(folder / "train-images-idx3-ubyte.gz", binarise="dynamic")
    every = schema.read(folder / "train-images-idx3-ubyte.gz")
    test = schema.read(folder / "t10k-images-idx3-ubyte.gz")
    return every.subset(slice(0, 59_600)), every.subset(slice(59_600, 60_000)), test.subset(slice(0, digits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--minutes", type=float, default=15.0, help="length of the training")
    parser.add_argument("--snapshots", type=float, nargs="*", default=[], help="minutes at which to evaluate as well")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-images", type=int, default=None, help="fewer test images, for a trial")
    parser.add_argument("--samples", type=int, default=FINAL_SAMPLES)
    parser.add_argument("--run", type=Path, default=None, help="folder of the run, to resume it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = Path(os.environ["LIKELY_DATA"]) / "mnist"
    train_set, valid_set, test_set = read_mnist(folder, arguments.test_images)

    recipe = RECIPES[arguments.recipe]
    torch.manual_seed(arguments.seed)
    model = find("vae")(train_set.space, **recipe["model"])
    snapshots = Snapshots(arguments.snapshots)
    used = time.process_time()
    result = train(
        model,
        train_set,
        valid_set,
        budget=60 * arguments.minutes,
        seed=arguments.seed,
        run=arguments.run,
        callbacks=[snapshots],
        **COMMON,
        **recipe["training"],
    )
    used = time.process_time() - used
    final = {key: value.clone() for key, value in model.state_dict().items()}
    for minutes, weights in [*snapshots.kept.items(), (arguments.minutes, final)]:
        model.load_state_dict(weights)
        bound = held_out(model, test_set)
        tight = importance_weighted(model, test_set, samples=arguments.samples)
        units = active_units(model, test_set)
        record({
            "recipe": arguments.recipe,
            "minutes": minutes,
            "of_a_run_of_minutes": arguments.minutes,
            "test_nll": -tight.nats,
            "standard_error": tight.standard_error,
            "samples": arguments.samples,
            "test_images": len(test_set),
            "elbo": bound.nats,
            "active_units": units.active,
            "epochs": round(result.steps * recipe["training"]["batch_size"] / len(train_set) * minutes / arguments.minutes, 1),
            "cpu_seconds_of_the_run": round(used),
            "options": {**recipe["model"], **COMMON, **recipe["training"]},
            "parameters": sum(p.numel() for p in model.parameters()),
            "seed": arguments.seed,
            "threads": arguments.threads,
            "command": f"python papers/vae_mnist.py {arguments.recipe} --minutes {arguments.minutes:g}",
            "date": datetime.now(UTC).date().isoformat(),
            "machine": machine(),
            "versions": {"likely": likely.__version__, "torch": torch.__version__, "python": platform.python_version()},
        })  # fmt: skip


def machine() -> str:
    """The class of machine: processor architecture, cores, whether it multiplies bfloat16 natively."""
    bf16 = "with" if torch.cpu._is_avx512_bf16_supported() else "without"
    return f"{platform.machine()}, {os.cpu_count()} cores, {bf16} native bfloat16"


def record(row: dict[str, Any]) -> None:
    """Add a row to the JSON and write the table again."""
    path = RESULTS.with_suffix(".json")
    rows = json.loads(path.read_text()) if path.exists() else []
    if row["test_images"] == 10_000:
        rows.append(row)
        path.write_text(json.dumps(rows, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(table(rows))
    print(json.dumps(row, indent=1))


def table(rows: list[dict[str, Any]]) -> str:
    """The results as Markdown, the paper's figures first."""
    lines = [
        "# Dynamically binarised MNIST, test negative log-likelihood in nats",
        "",
        "L_5000 on the 10,000 test images (an upper bound on the negative log-likelihood, in expectation); ± is the",
        "standard error over images.  Written by `papers/vae_mnist.py`.",
        "",
        "| model | training | L_5000 | −ELBO | active units | epochs | CPU s |",
        "|---|---|---|---|---|---|---|",
        "| IWAE paper, 1 layer, k = 1 | 3,280 epochs | 86.76 | | 19 | 3,280 | |",
    ]
    for row in rows:
        note = "" if row["minutes"] == row["of_a_run_of_minutes"] else f" of a run of {row['of_a_run_of_minutes']:g}"
        lines.append(
            f"| {row['recipe']} ({row['parameters']:,} parameters) | {row['minutes']:g} min{note}, {row['threads']} threads, "
            f"seed {row['seed']} | {row['test_nll']:.2f} ± {row['standard_error']:.2f} | {-row['elbo']:.2f} | "
            f"{row['active_units']} | {row['epochs']:g} | {row['cpu_seconds_of_the_run']:,} |"
        )
    lines += ["", f"Machine: {rows[-1]['machine']}.  Versions: {rows[-1]['versions']}.  Date: {rows[-1]['date']}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
