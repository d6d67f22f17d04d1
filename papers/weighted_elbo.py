"""Diffusion objectives as bounds with data augmentation: weighted losses, and what each costs in likelihood.

Paper: Kingma & Gao 2023 (arXiv 2303.00848).  A loss ½ ∫ w(λ) E|ε − ε̂|² dλ, λ = log SNR, is w(λ_max) L(λ_max) +
∫ (−dw/dλ) L(λ) dλ with L(λ) the divergence of the chain from λ on: a mixture of bounds on noisy data if w falls with λ.

On scikit-learn's digits the same network is trained under each weighting, for as many steps.  For each: whether the
weight is monotone; both sides of the identity on held-out images (the left from levels drawn for it, the right from a
table of errors over all levels); and the *unweighted* bound in bits/dim, which is what the likelihood of the data is
known by.  The paper's numbers are FIDs on ImageNet and are not comparable.

    python papers/weighted_elbo.py [--steps 1500]
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

import records
from likely.contract import Integers
from likely.data import Dataset
from likely.diffusion.bound import squared_errors
from likely.diffusion.levels import Linear, draw, spread_within
from likely.diffusion.weighting import WEIGHTINGS, is_monotone, mixture_over_levels
from likely.evaluation import held_out
from likely.models.vdm import VDM
from likely.noise import StreamNoise
from likely.training import train
from likely.units import bits_per_dim

SPACE = Integers((1, 8, 8), 17)
#: The mlp, so that a row costs a minute; levels follow the cosine schedule wherever the loss is weighted.
MODEL: dict[str, Any] = {
    "parameterisation": "f",
    "network": "mlp",
    "network_options": {"width": 192, "depth": 3, "dropout": 0.1},
}


def digits() -> tuple[Dataset, Dataset]:
    """Training and test images."""
    x = torch.tensor(load_digits().images).float().unsqueeze(1)
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return Dataset(SPACE, x[:1437]), Dataset(SPACE, x[1437:])


@torch.no_grad()
def errors_by_level(model: VDM, x: Tensor, points: int, seed: int) -> tuple[Tensor, Tensor]:
    """λ rising, and Σ |ε − ε̂|² at each, mean over the images (one draw of the noise each)."""
    gamma = torch.linspace(float(model.ends.high), float(model.ends.low), points)
    noise, f = StreamNoise(torch.Generator().manual_seed(seed)), model.data.embed(x)
    found = []
    for part in gamma.split(16):
        eps = noise.normal((len(x), len(part), *f.shape[1:]))
        errors = squared_errors(model.denoise, f, part.expand(len(x), -1), eps)
        found.append(errors.flatten(2).sum(2).double().mean(0))
    return -gamma.double(), torch.cat(found)


@torch.no_grad()
def weighted_loss(model: VDM, x: Tensor, count: int, seed: int) -> tuple[float, float]:
    """½ ∫ w E|ε − ε̂|² dλ from levels drawn evenly, nats, and its standard error."""
    noise, f = StreamNoise(torch.Generator().manual_seed(seed)), model.data.embed(x)
    drawn = draw(Linear(), model.ends, spread_within(noise, len(x), count))
    errors = squared_errors(model.denoise, f, drawn.gamma, noise.normal((len(x), count, *f.shape[1:])))
    terms = (0.5 * drawn.weight * model.weighting(-drawn.gamma) * errors.flatten(2).sum(2)).mean(1)
    return float(terms.mean()), float(terms.std()) / math.sqrt(len(x))


def measure(name: str, steps: int, points: int) -> dict[str, Any]:
    """Train under a weighting; both sides of the identity and the bound on the test images."""
    train_set, test_set = digits()
    torch.manual_seed(0)
    model = VDM(SPACE, weighting=name, levels="linear" if name == "elbo" else "cosine", bound_levels=32, **MODEL)
    train(model, train_set, None, steps=steps, batch_size=128, learning_rate=2e-3, progress=False)
    model.eval()
    left, error = weighted_loss(model, test_set.x, 32, 1)
    log_snr, errors = errors_by_level(model, test_set.x, points, 2)
    step = (log_snr[1] - log_snr[0]) / 2
    divergence = torch.cat([torch.zeros(1).double(), (0.5 * step * (errors[1:] + errors[:-1])).cumsum(0)])
    found = held_out(model, test_set)
    return {
        "weighting": name,
        "monotone": is_monotone(model.weighting, float(model.ends.low), float(model.ends.high)),
        "weighted_loss_nats": left,
        "standard_error": error,
        "mixture_nats": float(mixture_over_levels(model.weighting, log_snr, divergence)),
        "bits_per_dim": bits_per_dim(found.nats, SPACE.dims),
        "bits_per_dim_error": abs(bits_per_dim(found.standard_error, SPACE.dims)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--dry-run", action="store_true", help="a few steps of two weightings; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    names, steps, points = WEIGHTINGS, arguments.steps, 193
    if arguments.dry_run:
        names, steps, points = ("elbo", "sigmoid"), 3, 17
    rows = [measure(name, steps, points) for name in names]
    table = [
        "# Weighted diffusion losses on digits (8 × 8, 17 levels), held-out images",
        "",
        f"The same network, {steps:,} steps of 128.  Columns three and four are the two sides of the identity, in",
        "nats of the objective (of the data for `elbo` alone); ± is the standard error.  The last column is the",
        "unweighted bound.",
        "",
        "| weighting | monotone | ½ ∫ w E\\|ε − ε̂\\|² dλ | mixture of divergences | bound, bits/dim |",
        "|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: row["bits_per_dim"]):
        table.append(
            f"| {row['weighting']} | {'yes' if row['monotone'] else 'no'} | {row['weighted_loss_nats']:.2f} ± "
            f"{row['standard_error']:.2f} | {row['mixture_nats']:.2f} | "
            f"{row['bits_per_dim']:.3f} ± {row['bits_per_dim_error']:.3f} |"
        )
    if arguments.dry_run:
        print("\n".join(table))
        return
    records.write("weighted_elbo", {"rows": rows, "run": records.provenance(time.process_time() - start)}, table)


if __name__ == "__main__":
    main()
