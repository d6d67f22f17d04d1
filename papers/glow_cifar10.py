"""A small Glow on CIFAR-10: bits per dimension, and pictures at several temperatures.

Paper: Kingma & Dhariwal 2018 (arXiv 1807.03039), Table 2: 3.35 bits/dim on CIFAR-10 with 3 levels of 32 steps and
coupling networks of 512 channels, trained on 8 GPUs; the bound of uniform dequantisation with one draw.

Here: the same architecture, small, for minutes.  The original training images in a seeded random order, the last 500 of
them held out, no augmentation; the figure is the same bound on the test images, one draw each, with the averaged
weights.  LIKELY_DATA has ``cifar10/`` with sheets of 32 × 32 tiles (WebP, lossless) and ``index.npz``.

    LIKELY_DATA=… python papers/glow_cifar10.py --minutes 5                  # one CPU core
    LIKELY_DATA=… python papers/glow_cifar10.py --size gpu --wall-minutes 25 # a GPU
    LIKELY_DATA=… python papers/glow_cifar10.py --dry-run                    # seconds, writes nothing

A length in --minutes is processor time: the seconds a step takes are measured first and give the number of steps; one
in --wall-minutes is a budget of elapsed time.  With --run the training can be resumed.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from likely.contract import Integers
from likely.data import Dataset, Dequantise, Preprocessed
from likely.data.images import write_sheet
from likely.evaluation import held_out, interpolate
from likely.evaluation.heldout import evaluating
from likely.models import find
from likely.noise import StreamNoise, TemperedNoise
from likely.training import train
from likely.units import bits_per_dim
from records import RESULTS, provenance, write

SPACE = Integers((3, 32, 32), 256)
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "model": {"levels": 3, "depth": 4, "width": 96},
        "training": {"batch_size": 32, "learning_rate": 1e-3, "precision": "bfloat16"},
    },
    "gpu": {
        "model": {"levels": 3, "depth": 16, "width": 256},
        "training": {"batch_size": 128, "learning_rate": 1e-3, "precision": "bfloat16", "compile": True},
    },
}
TRAINING = {"warmup": 200, "clip_norm": 50.0, "patience": None, "average_fraction": 0.02, "evaluate_every": 500}
TEMPERATURES = (0.0, 0.5, 0.7, 0.8, 0.9, 1.0)
PAPER = 3.35


def read_cifar(folder: Path, images: int | None) -> tuple[Dataset, Dataset, Dataset]:
    """Training, held-out and test images."""
    from PIL import Image

    index = np.load(folder / "index.npz", allow_pickle=False)
    parts = {}
    for part in ("train", "test"):
        sheets = []
        for name in sorted(folder.glob(f"{part}_*.webp"))[: None if images is None else 1]:
            sheet = np.asarray(Image.open(name).convert("RGB"))
            sheets.append(sheet.reshape(-1, 32, 32, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3))
        pixels = (
            torch.from_numpy(np.concatenate(sheets)[: len(index[f"{part}_label"])]).permute(0, 3, 1, 2).contiguous()
        )
        parts[part] = pixels[:images]
    order = torch.randperm(len(parts["train"]), generator=torch.Generator().manual_seed(0))
    held = min(500, len(order) // 4)
    train_set, valid_set = (Dataset(SPACE, parts["train"][rows]) for rows in (order[:-held], order[-held:]))
    mixed = torch.randperm(len(parts["test"]), generator=torch.Generator().manual_seed(1))  # the file goes by classes
    return train_set, valid_set, Dataset(SPACE, parts["test"][mixed])


def build(options: dict[str, Any], seed: int) -> Preprocessed:
    glow = find("glow")
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return Preprocessed(glow(Dequantise(SPACE).output, **options), Dequantise(SPACE))


def seconds_per_step(options: dict[str, Any], training: dict[str, Any], sets: tuple[Dataset, Dataset]) -> float:
    """Processor seconds of a training step, beyond what ten steps cost."""
    spent = []
    for steps in (10, 40):
        started = time.process_time()
        few = sets[1].subset(slice(0, 2))
        train(
            build(options, 0), sets[0].subset(slice(0, 2000)), few, steps=steps, **{**training, "evaluate_every": steps}
        )
        spent.append(time.process_time() - started)
    return (spent[1] - spent[0]) / 30


@torch.no_grad()
def pictures(model: Preprocessed, test: Dataset, seed: int) -> dict[str, Tensor]:
    """Rows of samples, one row a temperature with the same noise; and paths between test images."""
    rows = []
    with evaluating(model) as device:
        for temperature in TEMPERATURES:
            noise = StreamNoise(torch.Generator(device).manual_seed(seed), device)
            rows.append(model.sample(12, None, TemperedNoise(noise, temperature)).cpu())
    ends = test.x[:12].double()
    paths = interpolate(model, ends[:6], ends[6:], steps=12)
    return {"temperatures": torch.stack(rows), "interpolations": paths.movedim(1, 0)}


def table(row: dict[str, Any]) -> list[str]:
    """The result as Markdown, beside the paper's."""
    model = row["options"]["model"]
    return [
        "# Glow on CIFAR-10, bits per dimension",
        "",
        "The bound of uniform dequantisation, one draw an image; ± standard error over images.  A Glow of a few",
        "minutes beside one of many GPU days: the same protocol, not the same budget.",
        "",
        "| model | levels × steps, width | parameters | steps of training | batch | seconds | test images | bits/dim |",
        "|---|---|---|---|---|---|---|---|",
        "| uniform | | | | | | | 8.00 |",
        f"| {row['size']} | {model['levels']} × {model['depth']}, {model['width']} | {row['parameters']:,} | "
        f"{row['steps']:,} | {row['options']['training']['batch_size']} | {row['seconds']:,} {row['clock']} | "
        f"{row['test_images']:,} | {row['bits_per_dim']:.3f} ± {row['standard_error']:.3f} |",
        f"| paper | 3 × 32, 512 | | | | | 10,000 | {PAPER} |",
        "",
        f"Samples, one row a temperature ({', '.join(f'{t:g}' for t in TEMPERATURES)}), the same noise in each column:",
        "",
        "![samples](glow_cifar10_temperatures.png)",
        "",
        "Paths in the latent space between test images, at the ends of each row:",
        "",
        "![interpolations](glow_cifar10_interpolations.png)",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="cpu")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=5.0, help="processor minutes of training")
    length.add_argument("--wall-minutes", type=float, default=None, help="minutes of training")
    parser.add_argument("--test-images", type=int, default=None, help="fewer test images")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run", type=Path, default=None, help="folder of the run, to resume it")
    parser.add_argument("--dry-run", action="store_true", help="a few steps on a few images; writes nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sets = read_cifar(Path(os.environ["LIKELY_DATA"]) / "cifar10", 64 if arguments.dry_run else None)
    test = sets[2].subset(slice(0, 8 if arguments.dry_run else arguments.test_images))
    size = SIZES[arguments.size]
    options = {**size["model"], **({"depth": 1, "width": 8} if arguments.dry_run else {})}
    training = {**TRAINING, **size["training"]}
    started = time.process_time()
    kept = arguments.run
    if arguments.dry_run:
        duration: dict[str, Any] = {"steps": 3}
    elif arguments.wall_minutes is not None:
        duration = {"budget": 60 * arguments.wall_minutes}
    elif kept is not None and (kept / "steps.json").exists():
        duration = {"steps": json.loads((kept / "steps.json").read_text())}
    else:
        duration = {"steps": round(60 * arguments.minutes / seconds_per_step(options, training, sets[:2]))}
        if kept is not None:
            kept.mkdir(parents=True, exist_ok=True)
            (kept / "steps.json").write_text(json.dumps(duration["steps"]))
    model = build(options, arguments.seed)
    cpu, wall = time.process_time(), time.monotonic()
    folder = None if kept is None else kept / "run"
    result = train(model, *sets[:2], seed=arguments.seed, run=folder, resume=kept is not None, **duration, **training)
    seconds = time.monotonic() - wall if arguments.wall_minutes is not None else time.process_time() - cpu
    bound = held_out(model, test)
    row = {
        "size": arguments.size,
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": result.steps,
        "seconds": round(seconds),
        "clock": "elapsed" if arguments.wall_minutes is not None else "CPU",
        "images_per_second": round(result.steps * training["batch_size"] / seconds),
        "test_images": len(test),
        "bits_per_dim": float(bits_per_dim(bound.nats, SPACE.dims)),
        "standard_error": -float(bits_per_dim(bound.standard_error, SPACE.dims)),
        "nats": bound.nats,
        "parts": bound.parts,
        "options": {"model": options, "training": training},
        "seed": arguments.seed,
    }
    sheets = pictures(model, sets[2], arguments.seed)
    if arguments.dry_run:
        print("\n".join(table(row)))
        return
    for name, images in sheets.items():
        flat = images.flatten(0, 1).permute(0, 2, 3, 1).to(torch.uint8).numpy()
        write_sheet(flat, RESULTS / f"glow_cifar10_{name}.png", across=images.shape[1])
    write("glow_cifar10", {"rows": [row], "run": provenance(time.process_time() - started)}, table(row))


if __name__ == "__main__":
    main()
