"""Adam on logistic regression: Kingma & Ba 2014 (arXiv 1412.6980), section 6.1 and Figure 1.

Paper: L2-regularised multi-class logistic regression on the 784 pixels of MNIST, and logistic regression on bags of
10,000 words of IMDB reviews with half of the words dropped out; batches of 128, a step size α / √t.  Its finding: on
MNIST Adam converges as fast as SGD with Nesterov's momentum, and faster than AdaGrad; on sparse features AdaGrad is far
better than SGD, and Adam as good as AdaGrad.

Here: the first 20,000 images of MNIST; and, for the words, 10,000 synthetic documents of 5,000 words whose frequencies
fall as 1 / rank, with labels drawn from a known logistic law.  The options are the best of a grid of five step sizes
for every rule, by the last value of what is plotted: the mean training loss of an epoch, in nats per example.  AdaGrad
has a constant α, since its own steps fall as 1 / √t.

    LIKELY_DATA=… python papers/adam_logistic_regression.py
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from likely.data import infer_schema
from likely.optim import Adam
from likely.optim.schedules import inverse_sqrt
from records import RESULTS, provenance, write

EPOCHS, BATCH, SEED = 10, 128, 0
RULES: dict[str, tuple[Callable[..., torch.optim.Optimizer], tuple[float, ...]]] = {
    "Adam": (lambda p, lr: Adam(p, lr=lr), (1e-2, 3e-2, 1e-1, 3e-1, 1.0)),
    "AdaGrad": (lambda p, lr: torch.optim.Adagrad(p, lr=lr), (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "SGD, Nesterov": (
        lambda p, lr: torch.optim.SGD(p, lr=lr, momentum=0.9, nesterov=True),
        (1e-1, 3e-1, 1.0, 3.0, 10.0),
    ),
}


def images() -> tuple[Tensor, Tensor]:
    """20,000 digits of MNIST, shape (20000, 784), from 0 to 1, and their labels."""
    folder = Path(os.environ["LIKELY_DATA"]) / "mnist"
    data = infer_schema(folder / "train-images-idx3-ubyte.gz").read(folder / "train-images-idx3-ubyte.gz")
    labels = infer_schema(folder / "train-labels-idx1-ubyte.gz").read(folder / "train-labels-idx1-ubyte.gz")
    x = next(data.subset(slice(0, 20_000)).batches(20_000))[0]
    y = next(labels.subset(slice(0, 20_000)).batches(20_000))[0]
    return x.reshape(20_000, -1).float() / 255, y.reshape(-1).long()


def words() -> tuple[Tensor, Tensor]:
    """10,000 documents as which of 5,000 words they hold, shape (10000, 5000), 0 or 1, and their labels, 0 or 1."""
    generator = torch.Generator().manual_seed(SEED)
    frequency = (20 / torch.arange(1, 5001)).clamp(max=0.5)
    x = torch.bernoulli(frequency.expand(10_000, -1), generator=generator)
    logit = (x - frequency) @ (torch.randn(5000, generator=generator) * 0.4)
    return x, torch.bernoulli(torch.sigmoid(logit), generator=generator).long()


def train(
    x: Tensor, y: Tensor, dropout: float, make: Callable[..., torch.optim.Optimizer], alpha: float
) -> list[float]:
    """Mean training loss of every epoch, in nats per example."""
    generator = torch.Generator().manual_seed(SEED)
    model = nn.Linear(x.shape[1], int(y.max()) + 1)
    nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
    optimizer, losses, step = make(model.parameters(), alpha), [], 0
    for _ in range(EPOCHS):
        total = torch.zeros((), dtype=torch.float64)
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            inputs = x[rows]
            if dropout:
                inputs = inputs * (torch.rand(inputs.shape, generator=generator) >= dropout) / (1 - dropout)
            loss = nn.functional.cross_entropy(model(inputs), y[rows])
            if not isinstance(optimizer, torch.optim.Adagrad):  # whose own steps fall as 1 / √t
                optimizer.param_groups[0]["lr"] = alpha * inverse_sqrt(step)
            optimizer.zero_grad()
            (loss + 1e-4 * 0.5 * model.weight.square().sum()).backward()
            optimizer.step()
            total += loss.detach().double() * len(rows)
            step += 1
        losses.append(float(total) / len(x))
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    torch.set_num_threads(1)
    start, rows = time.process_time(), []
    for name, (x, y), dropout in (("MNIST", images(), 0.0), ("words, half dropped out", words(), 0.5)):
        for rule, (make, grid) in RULES.items():
            runs = {alpha: train(x, y, dropout, make, alpha) for alpha in grid}
            best = min(grid, key=lambda alpha: runs[alpha][-1] if math.isfinite(runs[alpha][-1]) else math.inf)
            rows.append({
                "data": name,
                "rule": rule,
                "step_size": best,
                "loss_nats": [round(loss, 5) for loss in runs[best]],
                "grid": {f"{alpha:g}": round(run[-1], 5) for alpha, run in runs.items()},
            })  # fmt: skip
            print(name, rule, best, rows[-1]["grid"], flush=True)
    draw(rows)
    write("adam_logistic_regression", {"run": provenance(time.process_time() - start), "rows": rows}, table(rows))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The losses as Markdown."""
    seen = [1, 2, 3, 5, EPOCHS]
    lines = [
        "# Adam on logistic regression",
        "",
        "Mean training loss of an epoch in nats per example, step size α / √t (AdaGrad: α, its own steps fall so) "
        "with the",
        "best α of five for each rule.",
        "Kingma & Ba 2014, Figure 1, in small.  Written by `papers/adam_logistic_regression.py`.",
        "",
        "![losses](adam_logistic_regression.png)",
        "",
        "| data | rule | α | " + " | ".join(f"epoch {epoch}" for epoch in seen) + " |",
        "|---|---|---|" + "---|" * len(seen),
    ]
    for row in rows:
        losses = " | ".join(f"{row['loss_nats'][epoch - 1]:.4f}" for epoch in seen)
        lines.append(f"| {row['data']} | {row['rule']} | {row['step_size']:g} | {losses} |")
    return lines


def draw(rows: list[dict[str, Any]]) -> None:
    """Loss by epoch, as a PNG beside the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(8, 3.2))
    for axis, name in zip(axes, names):
        for row in (row for row in rows if row["data"] == name):
            axis.plot(range(1, EPOCHS + 1), row["loss_nats"], label=f"{row['rule']}, α = {row['step_size']:g}")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("epoch")
        axis.set_ylabel("training loss, nats")
        axis.legend(fontsize=7)
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "adam_logistic_regression.png", dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
