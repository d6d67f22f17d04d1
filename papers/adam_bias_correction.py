"""What the correction of bias is for: the grid of Kingma & Ba 2014 (arXiv 1412.6980), section 6.4 and Figure 4.

Paper: a variational autoencoder with one hidden layer of 500 softplus units and 50 latent variables, trained by Adam
with and without the correction of bias, β₁ ∈ {0, 0.9}, β₂ ∈ {0.99, 0.999, 0.9999}, log₁₀ α from −5 to −1; the loss
after 10 and after 100 epochs.  Its finding: with β₂ near 1, which sparse gradients need, training without the
correction is unstable, above all early in training; with it the results are as good or better whatever the options.

Here: 200 units and 20 latent variables, on the first 1,000 of scikit-learn's digits of 8 × 8 pixels, binarised once by
a draw of their grey values, in batches of 100, so that 10 and 100 epochs are 100 and 1,000 steps.  The loss is the mean
of −ELBO over the last epoch, in nats per example.

    python papers/adam_bias_correction.py
    python papers/adam_bias_correction.py --epochs 2 4 --step-sizes -3 --seeds 1      # a trial; writes nothing
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from likely.contract import Binary
from likely.models.vae import VAE
from likely.noise import StreamNoise
from likely.optim import Adam
from records import RESULTS, provenance, write

BETA1, BETA2 = (0.0, 0.9), (0.99, 0.999, 0.9999)
EPOCHS, STEP_SIZES, SEEDS, BATCH = (10, 100), (-5.0, -4.0, -3.0, -2.0, -1.0), 1, 100
DIVERGED = 1000.0  # nats; an independent uniform guess costs 44


def binary_digits() -> Tensor:
    """The first 1,000 digits, shape (1000, 64), 0 or 1."""
    grey = torch.tensor(load_digits().data[:1000] / 16.0)
    uniform = torch.rand(grey.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (uniform < grey).float()


def train(x: Tensor, epochs: list[int], seed: int, **options: Any) -> list[float]:
    """Mean −ELBO in nats per example over the epochs asked for; infinite where the loss is no longer finite."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = VAE(Binary((64,)), latent_dim=20, hidden=(200,), activation="softplus")
    generator = torch.Generator().manual_seed(seed)
    noise, optimizer = StreamNoise(generator), Adam(model.parameters(), **options)
    found: list[float] = []
    for epoch in range(1, max(epochs) + 1):
        total = 0.0
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            loss = model.loss(x[rows], None, noise, 0).value
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += float(loss.detach()) * 64 * len(rows)
        if not math.isfinite(total):
            return found + [math.inf] * (len(epochs) - len(found))
        if epoch in epochs:
            found.append(total / len(x))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, nargs="+", default=list(EPOCHS))
    parser.add_argument("--step-sizes", type=float, nargs="+", default=list(STEP_SIZES), help="their logarithms")
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x, start, rows = binary_digits(), time.process_time(), []
    for beta1, beta2, corrected, size, seed in itertools.product(
        BETA1, BETA2, (True, False), arguments.step_sizes, range(arguments.seeds)
    ):
        options = {"lr": 10.0**size, "betas": (beta1, beta2), "bias_correction": corrected}
        losses = train(x, arguments.epochs, seed, **options)
        rows.append({
            "beta1": beta1,
            "beta2": beta2,
            "bias_correction": corrected,
            "log10_step_size": size,
            "seed": seed,
            "loss_nats": dict(zip(map(str, arguments.epochs), (v if math.isfinite(v) else None for v in losses))),
        })  # fmt: skip
        print(rows[-1], flush=True)
    content = {"run": provenance(time.process_time() - start), "rows": rows}
    if (tuple(arguments.epochs), tuple(arguments.step_sizes)) == (EPOCHS, STEP_SIZES):
        draw(rows)
        write("adam_bias_correction", content, table(rows))


def loss_of(rows: list[dict[str, Any]], epochs: int, **which: Any) -> float:
    """Mean loss over seeds of the runs that agree with ``which``; infinite if one of them diverged."""
    losses = [row["loss_nats"][str(epochs)] for row in rows if all(row[k] == v for k, v in which.items())]
    finite = [loss for loss in losses if loss is not None and loss < DIVERGED]
    return sum(finite) / len(finite) if len(finite) == len(losses) else math.inf


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The grid as Markdown."""
    lines = [
        "# Adam with and without the correction of bias",
        "",
        "−ELBO in nats per example of a 64-200-20-200-64 variational autoencoder on 8 × 8 binary digits, by log₁₀ α;",
        "∞: above 1,000.  Kingma & Ba 2014, Figure 4, in small.  Written by `papers/adam_bias_correction.py`.",
        "",
        "![the grid](adam_bias_correction.png)",
        "",
        "| epochs | β₁ | β₂ | correction | " + " | ".join(f"{size:g}" for size in STEP_SIZES) + " | best |",
        "|---|---|---|---|" + "---|" * (len(STEP_SIZES) + 1),
    ]
    for epochs, beta1, beta2, corrected in itertools.product(EPOCHS, BETA1, BETA2, (True, False)):
        losses = [
            loss_of(rows, epochs, beta1=beta1, beta2=beta2, bias_correction=corrected, log10_step_size=size)
            for size in STEP_SIZES
        ]
        cells = " | ".join(f"{loss:.2f}" if math.isfinite(loss) else "∞" for loss in [*losses, min(losses)])
        lines.append(f"| {epochs} | {beta1:g} | {beta2:g} | {'with' if corrected else 'without'} | {cells} |")
    return lines


def draw(rows: list[dict[str, Any]]) -> None:
    """Figure 4 of the paper, as a PNG beside the table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(BETA1) * len(EPOCHS), len(BETA2), figsize=(8, 9), sharex=True, sharey=True)
    for line, (epochs, beta1) in zip(axes, itertools.product(EPOCHS, BETA1)):
        for axis, beta2 in zip(line, BETA2):
            for corrected, colour in ((True, "tab:red"), (False, "tab:green")):
                losses = [
                    loss_of(rows, epochs, beta1=beta1, beta2=beta2, bias_correction=corrected, log10_step_size=size)
                    for size in STEP_SIZES
                ]
                label = "with" if corrected else "without"
                axis.plot(STEP_SIZES, losses, "o-", color=colour, label=f"{label} correction", markersize=3)
            axis.set_title(f"{epochs} epochs, β₁ = {beta1:g}, β₂ = {beta2:g}", fontsize=8)
            axis.set_ylim(10, 70)
    for axis in axes[-1]:
        axis.set_xlabel("log₁₀ α")
    for line in axes:
        line[0].set_ylabel("−ELBO, nats")
    axes[0, 0].legend(fontsize=7)
    figure.tight_layout()
    RESULTS.mkdir(exist_ok=True)
    figure.savefig(RESULTS / "adam_bias_correction.png", dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
