"""Masked autoregressive flows against coupling and spline flows on tables (Papamakarios et al. 2017, arXiv 1705.07057).

Paper: Table 1, nats per test row of standardised POWER, GAS, HEPMASS and MINIBOONE: MAF above RealNVP, both far above
one normal law; Durkan et al. 2019 (1906.04032), Table 1: neural splines above both.  These four sets are not in the
folder of data; the recipe takes tables of the same kind from the UCI repository whose columns are a continuum, so that
the *order* can be compared and the numbers cannot.

    LIKELY_DATA=… python papers/maf_uci.py --steps 3000
    python papers/maf_uci.py --dry-run
"""

from __future__ import annotations

import argparse
import gzip
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from likely.contract import Reals
from likely.data import Dataset
from likely.evaluation import held_out
from likely.models import find
from likely.training import train
from records import provenance, write

#: Model and options of every row of the table.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Gaussian": ("gaussian", {}),
    "RealNVP (8)": ("realnvp", {"transforms": 8, "hidden": (64, 64)}),
    "MAF (5)": ("maf", {"transforms": 5, "hidden": (64, 64)}),
    "NSF, coupling (6)": ("nsf", {"transforms": 6, "hidden": (64, 64), "conditioner": "coupling"}),
    "NSF, autoregressive (3)": ("nsf", {"transforms": 3, "hidden": (64, 64)}),
}


def tables(names: list[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Training and test rows of each set, standardised by the training rows."""
    found = {}
    for name in names:
        folder = Path(os.environ["LIKELY_DATA"]) / "uci_tables"
        with gzip.open(folder / f"{name}.data.csv.gz", "rt") as file:
            x = np.loadtxt(file, delimiter=",")
        with gzip.open(folder / f"{name}.test_mask.csv.gz", "rt") as file:
            held = np.loadtxt(file, delimiter=",")[:, 0] > 0.5
        mean, scale = x[~held].mean(0), x[~held].std(0)
        x = (x - mean) / scale
        found[name] = torch.tensor(x[~held]).float(), torch.tensor(x[held]).float()
    return found


def rings(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rings, for a dry run."""
    random = torch.Generator().manual_seed(0)
    angle, radius = 2 * math.pi * torch.rand(n, generator=random), 1.0 + (torch.rand(n, generator=random) > 0.5)
    x = radius.unsqueeze(1) * torch.stack([angle.cos(), angle.sin()], 1)
    x = x + 0.1 * torch.randn(n, 2, generator=random)
    return x[n // 4 :], x[: n // 4]


def nats_of(name: str, options: dict[str, Any], rows: torch.Tensor, test: torch.Tensor, steps: int) -> dict[str, float]:
    """One fit: mean nats of the test rows, its standard error, and the least of them."""
    space = Reals((rows.shape[1],))
    torch.manual_seed(0)
    model = find(name)(space, **options)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    tenth = len(rows) // 10
    valid, kept = (Dataset(space, rows[part]) for part in (order[:tenth], order[tenth:]))
    started = time.process_time()
    train(model, kept, valid, steps=steps, batch_size=256, clip_norm=5.0, progress=False)
    nats = held_out(model, Dataset(space, test)).example_nats
    error = float(nats.std()) / math.sqrt(len(nats))
    cpu = time.process_time() - started
    return {"nats": float(nats.mean()), "error": error, "worst": float(nats.min()), "cpu_seconds": cpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--sets", nargs="+", default=["pendulum", "protein"])
    parser.add_argument("--dry-run", action="store_true", help="two rings and ten steps, nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    data = {"rings": rings(400)} if arguments.dry_run else tables(arguments.sets)
    steps = 10 if arguments.dry_run else arguments.steps
    found = {
        title: {name: nats_of(kind, options, *rows, steps) for name, rows in data.items()}
        for title, (kind, options) in MODELS.items()
    }
    lines = ["# Autoregressive, coupling and spline flows on tables", ""]
    lines += ["Nats per test row of standardised columns, higher is better; ± is one standard error.", ""]
    lines += ["| model (transforms) | " + " | ".join(data) + " |", "|---|" + "---|" * len(data)]
    for title, results in found.items():
        cells = [f"{r['nats']:.2f} ± {r['error']:.2f} (least {r['worst']:.0f})" for r in results.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    if arguments.dry_run:
        print("\n".join(lines))
        return
    write("maf_uci", {"steps": steps, "results": found, "run": provenance(time.process_time() - started)}, lines)


if __name__ == "__main__":
    main()
