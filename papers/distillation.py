"""Progressive distillation (Salimans & Ho 2022, arXiv 2202.00512) on 8 x 8 digits: what haste costs, in bits.

A teacher in continuous time is distilled into chains of 32, 16, 8 and 4 steps, each trained on what two steps of the
one before it do.  The paper reports sample quality alone (an FID of 3.0 on CIFAR-10 in 4 steps); a student is a
likelihood model too, so that here its own T-step bound stands beside it, and beside the bound of the undistilled
network in the same number of steps.  Sample quality is the sliced Wasserstein distance to the test digits, of samples
by DDIM.

    python papers/distillation.py                # about three minutes on one core
    python papers/distillation.py --dry-run      # seconds, writes nothing

The digits are scikit-learn's: 1,397 for training, 400 for testing, 17 grey levels.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits

import records
from likely import units
from likely.contract import Integers
from likely.data import Dataset
from likely.evaluation import held_out
from likely.models import find
from likely.noise import StreamNoise
from likely.training import train

FIRST = 64
MODEL: dict[str, Any] = {
    "network": "mlp",
    "network_options": {"width": 384, "depth": 4},
    "sample_steps": FIRST,
    "bound_levels": 16,
}
TRAINING: dict[str, Any] = {"batch_size": 128, "learning_rate": 1e-3, "patience": None, "progress": False}


def digits() -> tuple[Dataset, Dataset]:
    """Training and test digits, shape (1, 8, 8)."""
    images = torch.from_numpy(load_digits().images).float().unsqueeze(1)
    images = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))]
    space = Integers((1, 8, 8), 17)
    return Dataset(space, images[:1397]), Dataset(space, images[1397:])


def sliced_wasserstein(a: torch.Tensor, b: torch.Tensor, directions: int = 500) -> float:
    """Root mean square over random directions of the Wasserstein-2 distance of the projections, in grey levels."""
    generator = np.random.default_rng(0)
    along = generator.standard_normal((a[0].numel(), directions))
    along /= np.linalg.norm(along, axis=0)
    shares = (np.arange(200) + 0.5) / 200
    ends = [np.quantile(x.flatten(1).double().numpy() @ along, shares, axis=0) for x in (a, b)]
    return float(np.sqrt(np.mean((ends[0] - ends[1]) ** 2)))


def row(model: Any, test_set: Dataset, samples: int, steps: int, of: str) -> dict[str, Any]:
    """Bound and sample quality of a model as a chain of ``steps``."""
    model.eval()
    bound = held_out(model, test_set)
    drawn = model.sample(samples, noise=StreamNoise(torch.Generator().manual_seed(1)), sampler="ddim", steps=steps)
    return {
        "model": of,
        "steps": steps,
        "bits_per_dim": units.bits_per_dim(bound.nats, test_set.space.dims),
        "standard_error": -units.bits_per_dim(bound.standard_error, test_set.space.dims),
        "sliced_wasserstein": sliced_wasserstein(drawn, test_set.x),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher-steps", type=int, default=2500, help="training steps of the teacher")
    parser.add_argument("--student-steps", type=int, default=500, help="training steps of each student")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--dry-run", action="store_true")
    arguments = parser.parse_args()
    if arguments.dry_run:
        arguments.teacher_steps, arguments.student_steps, arguments.samples = 20, 5, 20
    torch.set_num_threads(1)
    start = time.process_time()
    train_set, test_set = digits()
    torch.manual_seed(0)
    teacher = find("vdm")(train_set.space, **MODEL)
    train(teacher, train_set, steps=arguments.teacher_steps, **TRAINING)
    bound = held_out(teacher.eval(), test_set)
    rows = []
    student, steps = teacher, FIRST
    while steps > 4:
        undistilled = teacher.student(steps)
        undistilled.teacher = None
        rows.append(row(undistilled, test_set, arguments.samples, steps, "undistilled"))
        steps //= 2
        student = student.student(steps)
        train(student, train_set, steps=arguments.student_steps, **TRAINING)
        student.teacher = None
        rows.append(row(student, test_set, arguments.samples, steps, "student"))
    undistilled = teacher.student(steps)
    undistilled.teacher = None
    rows.append(row(undistilled, test_set, arguments.samples, steps, "undistilled"))
    content = {
        "continuous_bits_per_dim": units.bits_per_dim(bound.nats, test_set.space.dims),
        "floor": sliced_wasserstein(train_set.x, test_set.x),
        "rows": rows,
        "options": {"model": MODEL, "training": TRAINING, **vars(arguments)},
        "run": records.provenance(time.process_time() - start),
    }
    if arguments.dry_run:
        print("\n".join(table(content)))
    else:
        records.write(Path(__file__).stem, content, table(content))


def table(content: dict[str, Any]) -> list[str]:
    """The results as Markdown."""
    found = {(row["model"], row["steps"]): row for row in content["rows"]}
    lines = [
        "# Progressive distillation on 8 x 8 digits",
        "",
        "Bound: bits/dim of the T-step chain on the 400 test digits, ± standard error.  Distance: sliced Wasserstein",
        "distance, in grey levels, of DDIM samples in T steps to the test digits; that of the training digits is",
        f"{content['floor']:.3f}.  The teacher has {content['continuous_bits_per_dim']:.3f} bits/dim in the limit;",
        "undistilled is its network as a chain of T steps.  Written by `papers/distillation.py`.",
        "",
        "| T | bound, undistilled | bound, student | distance, undistilled | distance, student |",
        "|---|---|---|---|---|",
    ]
    for steps in sorted({row["steps"] for row in content["rows"]}, reverse=True):
        cells = []
        for key, form in (("bits_per_dim", "{:.3f} ± {:.3f}"), ("sliced_wasserstein", "{:.3f}")):
            for model in ("undistilled", "student"):
                row = found.get((model, steps))
                cells.append("" if row is None else form.format(row[key], row["standard_error"]))
        lines.append(f"| {steps} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
