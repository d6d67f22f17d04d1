"""Variational autoencoders on dynamically binarised MNIST: the architecture of IWAE's Table 1, and the best we can do.

Paper: Burda, Grosse & Salakhutdinov 2015 (arXiv 1509.00519), Table 1, one stochastic layer, k = 1: a test negative
log-likelihood of 86.76 nats (L_5000) after 3,280 epochs.  Protocol: every pixel is a fresh Bernoulli draw of its grey
value at each visit; 59,600 training and 400 held-out images; the figure is L_5000 on the 10,000 test images.

    LIKELY_DATA=… python papers/vae_mnist.py iwae --minutes 15
    LIKELY_DATA=… python papers/vae_mnist.py best --steps 50000 --samples 1000

A length in minutes is that of an idle machine; on a shared one give the steps, and compare CPU seconds.  With --run the
training can be resumed, and a finished one evaluated again.  The result is added to papers/results/vae_mnist.json, and
the table beside it is written again.
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
from likely.training import train

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


def read_mnist(folder: Path, digits: int | None) -> tuple[Dataset, Dataset, Dataset]:
    """Training, held-out and test images as binary draws of their grey values, shape (1, 28, 28)."""
    schema = infer_schema(folder / "train-images-idx3-ubyte.gz", binarise="dynamic")
    every = schema.read(folder / "train-images-idx3-ubyte.gz")
    test = schema.read(folder / "t10k-images-idx3-ubyte.gz")
    return every.subset(slice(0, 59_600)), every.subset(slice(59_600, 60_000)), test.subset(slice(0, digits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES)
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="length of the training in minutes")
    length.add_argument("--steps", type=int, help="length of the training in steps")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--test-images", type=int, default=None, help="fewer test images, for a trial")
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--run", type=Path, default=None, help="folder of the run, to resume it")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = Path(os.environ["LIKELY_DATA"]) / "mnist"
    train_set, valid_set, test_set = read_mnist(folder, arguments.test_images)

    recipe = RECIPES[arguments.recipe]
    torch.manual_seed(arguments.seed)
    model = find("vae")(train_set.space, **recipe["model"])
    length_options = {"steps": arguments.steps} if arguments.steps else {"budget": 60 * arguments.minutes}
    cpu, wall = time.process_time(), time.monotonic()
    result = train(
        model,
        train_set,
        valid_set,
        seed=arguments.seed,
        run=arguments.run,
        resume=arguments.run is not None,
        **length_options,
        **COMMON,
        **recipe["training"],
    )
    cpu, wall = used_before(arguments.run, time.process_time() - cpu, time.monotonic() - wall)
    bound = held_out(model, test_set)
    tight = importance_weighted(model, test_set, samples=arguments.samples)
    said = f"--steps {arguments.steps}" if arguments.steps else f"--minutes {arguments.minutes:g}"
    record({
        "recipe": arguments.recipe,
        "steps": result.steps,
        "epochs": round(result.steps * recipe["training"]["batch_size"] / len(train_set), 1),
        "cpu_seconds": round(cpu),
        "wall_seconds": round(wall),
        "threads": arguments.threads,
        "test_nll": -tight.nats,
        "standard_error": tight.standard_error,
        "samples": arguments.samples,
        "test_images": len(test_set),
        "test_elbo": bound.nats,
        "parts": bound.parts,
        "active_units": active_units(model, test_set).active,
        "parameters": sum(p.numel() for p in model.parameters()),
        "options": {**recipe["model"], **COMMON, **recipe["training"]},
        "seed": arguments.seed,
        "command": f"python papers/vae_mnist.py {arguments.recipe} {said} --threads {arguments.threads} "
        f"--samples {arguments.samples}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": {"likely": likely.__version__, "torch": torch.__version__, "python": platform.python_version()},
    })  # fmt: skip


def used_before(run: Path | None, cpu: float, wall: float) -> tuple[float, float]:
    """CPU and wall seconds of the training, kept with the run so that it can be evaluated again."""
    path = None if run is None else run / "seconds.json"
    if path is not None and path.exists():
        cpu, wall = json.loads(path.read_text())
    elif path is not None:
        path.write_text(json.dumps([cpu, wall]))
    return cpu, wall


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
        "L_k on the 10,000 test images: in expectation an upper bound on the negative log-likelihood, the tighter the",
        "larger k; ± is the standard error over images.  Written by `papers/vae_mnist.py`.",
        "",
        "| model | parameters | epochs | CPU s | wall s, threads | k | L_k | −ELBO | active units |",
        "|---|---|---|---|---|---|---|---|---|",
        "| IWAE paper, 1 layer, k = 1 | | 3,280 | | | 5,000 | 86.76 | | 19 |",
    ]
    for row in rows:
        lines.append(
            f"| {row['recipe']} | {row['parameters']:,} | {row['epochs']:g} | {row['cpu_seconds']:,} | "
            f"{row['wall_seconds']:,}, {row['threads']} | {row['samples']:,} | "
            f"{row['test_nll']:.2f} ± {row['standard_error']:.2f} | {-row['test_elbo']:.2f} | {row['active_units']} |"
        )
    lines += ["", "Commands:", "", *(f"    {row['command']}" for row in rows)]
    lines += ["", f"Machine: {rows[-1]['machine']}.  Versions: {rows[-1]['versions']}.  Date: {rows[-1]['date']}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
