"""What evaluation and sampling of a diffusion model cost in evaluations of its network, on scikit-learn's digits.

1. Levels.  The bound of an image is a mean over K noise levels.  For K = 1 … 64 the standard deviation that the choice of
   levels and noise leaves in one image's bound, in bits/dim: levels drawn independently, one in each of K equal parts,
   and one in each of K parts of an importance density that was learned from the training images (``adaptive``).  From it
   the K at which that noise adds a standard error of 0.001 bits/dim to the mean over 10,000 images.
2. Samples.  The sliced Wasserstein distance (mean over 256 fixed directions of the distance in one dimension, W1) between
   1,000 samples and the 360 held-out images, for every sampler and number of evaluations; the floor is that between
   1,000 training images and the held-out ones.  A sampler's cost is the fewest evaluations with which it comes within
   5 % of the distance of 256 ancestral steps.

    python benchmarks/diffusion_evaluation.py [--minutes 2] [--out benchmarks/results/diffusion_evaluation]
"""

from __future__ import annotations

import argparse
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
from families import read, step_seconds
from likely.data import Dataset
from likely.diffusion.bound import squared_errors, weighted_error
from likely.diffusion.levels import Adaptive, Levels, Linear, draw, spread_over_batch, spread_within
from likely.diffusion.samplers import SAMPLERS, evaluations
from likely.models.vdm import VDM
from likely.noise import StreamNoise
from likely.training import train
from likely.units import bits_per_dim
from turns import write_record

COUNTS = (1, 2, 4, 8, 16, 32, 64)
EVALUATIONS = (4, 8, 16, 32, 64, 128)
SAMPLES, DIRECTIONS, LONG = 1000, 256, 256
IMAGES, TARGET = 10_000, 0.001
TRAINING = {"batch_size": 128, "patience": None, "progress": False}


def stream(seed: int) -> StreamNoise:
    return StreamNoise(torch.Generator().manual_seed(seed))


def trained(minutes: float, steps: int | None) -> tuple[VDM, Dataset, Dataset]:
    """The model, the training images and the test images."""
    train_set, valid_set, test_set = read("digits")
    torch.manual_seed(0)
    network_options = {"width": 256, "depth": 3, "dropout": 0.1}
    model = VDM(train_set.space, network="mlp", network_options=network_options, parameterisation="f", levels="linear")
    options = {"learning_rate": 2e-3}
    steps = steps or int(60 * minutes / step_seconds(model, train_set, options))
    train(model, train_set, valid_set, steps=steps, evaluate_every=max(1, steps // 6), **TRAINING, **options)
    return model.eval(), train_set, test_set


# 1. Levels -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def learned_density(model: VDM, x: Tensor, rounds: int) -> Adaptive:
    """An importance density from errors on the training images."""
    levels, f = Adaptive(memory=0.999, floor=0.1), model.data.embed(x)
    for seed in range(rounds):
        noise = stream(seed)
        drawn = draw(levels, model.ends, spread_over_batch(noise, len(f)).unsqueeze(1))
        errors = squared_errors(model.denoise, f, drawn.gamma, noise.normal((len(f), 1, *f.shape[1:])))
        levels.observe(drawn.v, errors.flatten(2).sum(2))
    return levels


@torch.no_grad()
def deviation(model: VDM, x: Tensor, levels: Levels, count: int, stratified: bool, repeats: int) -> float:
    """Root mean square over images of the standard deviation of the diffusion term, bits/dim."""
    f, found = model.data.embed(x), []
    for seed in range(repeats):
        noise = stream(1000 + seed)
        u = spread_within(noise, len(f), count) if stratified else noise.uniform((len(f), count))
        drawn = draw(levels, model.ends, u)
        errors = squared_errors(model.denoise, f, drawn.gamma, noise.normal((len(f), count, *f.shape[1:])))
        found.append(weighted_error(drawn, errors).mean(1).double())
    rms = float(torch.stack(found).var(0).mean().sqrt())
    return abs(bits_per_dim(rms, math.prod(f.shape[1:])))


def of_levels(model: VDM, train_set: Dataset, test_set: Dataset, repeats: int) -> list[dict[str, Any]]:
    """Deviations for every number of levels and way of drawing them."""
    adaptive = learned_density(model, train_set.x[:512], 8 * repeats)
    ways: dict[str, tuple[Levels, bool]] = {
        "independent": (Linear(), False),
        "stratified": (Linear(), True),
        "stratified, adaptive": (adaptive, True),
    }
    rows = []
    for name, (levels, stratified) in ways.items():
        found = [deviation(model, test_set.x[:128], levels, count, stratified, repeats) for count in COUNTS]
        enough = [count for count, value in zip(COUNTS, found) if value / math.sqrt(IMAGES) <= TARGET]
        rows.append({"levels": name, "deviations": found, "needed": enough[0] if enough else None})
    return rows


# 2. Samples ------------------------------------------------------------------------------------------------------


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """Mean W1 over fixed random directions, in grey levels."""
    directions = torch.randn(DIRECTIONS, a[0].numel(), generator=torch.Generator().manual_seed(0))
    directions = directions / directions.norm(dim=1, keepdim=True)
    grid = (torch.arange(2048) + 0.5) / 2048
    quantiles = [torch.quantile(x.flatten(1) @ directions.T, grid, 0) for x in (a, b)]
    return float((quantiles[0] - quantiles[1]).abs().mean())


def of_samplers(model: VDM, train_set: Dataset, test_set: Dataset, n: int) -> dict[str, Any]:
    """Distances of every sampler at every number of evaluations."""
    floor = sliced_wasserstein(train_set.x[:n], test_set.x)
    reference = sliced_wasserstein(model.sample(n, None, stream(0), sampler="ancestral", steps=LONG), test_set.x)
    rows = []
    for name in SAMPLERS:
        found: dict[int, float] = {}
        for calls in EVALUATIONS:
            steps = calls // evaluations(name, 1)
            found[calls] = sliced_wasserstein(model.sample(n, None, stream(1), sampler=name, steps=steps), test_set.x)
        enough = [calls for calls, value in found.items() if value <= 1.05 * reference]
        rows.append({"sampler": name, "distances": found, "needed": enough[0] if enough else None})
    return {"floor": floor, "reference": reference, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# What a diffusion model's numbers cost, in evaluations of its network",
        "",
        f"Digits, an mlp trained for {result['minutes']:g} CPU minutes.  Deviation that K levels leave in the bound of one",
        f"image, bits/dim, and the K at which that adds {TARGET} to the standard error of {IMAGES:,} images.",
        "",
        "| levels drawn | " + " | ".join(f"K = {count}" for count in COUNTS) + " | K needed |",
        "|---" * (len(COUNTS) + 2) + "|",
    ]
    for row in result["levels"]:
        shown = " | ".join(f"{value:.3f}" for value in row["deviations"])
        lines.append(f"| {row['levels']} | {shown} | {row['needed'] or f'above {COUNTS[-1]}'} |")
    samples = result["samples"]
    lines += [
        "",
        f"Sliced Wasserstein distance of {SAMPLES:,} samples to the held-out images, grey levels.  Training images: "
        f"{samples['floor']:.4f};",
        f"{LONG} ancestral steps: {samples['reference']:.4f}; needed: within 5 % of the latter.",
        "",
        "| sampler | " + " | ".join(f"{calls} evaluations" for calls in EVALUATIONS) + " | needed |",
        "|---" * (len(EVALUATIONS) + 2) + "|",
    ]
    for row in samples["rows"]:
        shown = " | ".join(f"{value:.4f}" for value in row["distances"].values())
        lines.append(f"| {row['sampler']} | {shown} | {row['needed'] or f'above {EVALUATIONS[-1]}'} |")
    lines += ["", f"`{result['command']}`, {result['machine']}, {result['date']}.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=2.0, help="CPU minutes of training")
    parser.add_argument("--dry-run", action="store_true", help="a few steps and samples, for a trial")
    parser.add_argument("--out", type=Path, default=None, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dry = arguments.dry_run
    model, train_set, test_set = trained(arguments.minutes, 4 if dry else None)
    result = {
        "minutes": arguments.minutes,
        "levels": of_levels(model, train_set, test_set, 2 if dry else 16),
        "samples": of_samplers(model, train_set, test_set, 40 if dry else SAMPLES),
        "command": shlex.join(["python", "benchmarks/diffusion_evaluation.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared, 1 thread",
        "cpu_seconds": round(time.process_time()),
        "versions": {"likely": likely.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    print(table(result))
    if arguments.out is not None and not dry:
        write_record(arguments.out, result, table(result))


if __name__ == "__main__":
    main()
