"""Variational diffusion models: the schedule changes the variance of the bound, and not the bound.

Paper: Kingma, Salimans, Poole & Ho 2021 (arXiv 2107.00630).  In continuous time the diffusion term depends on the
schedule through its ends alone; the variance of its Monte Carlo estimate depends on all of it.

Here a denoiser that is known to be the best, of a mixture in the plane, takes the place of a trained network, so that
the value is known too: the entropy of the mixture, but for what the two ends cost.  For each schedule: the bound, its
standard error, and the variance of one level of one example, of the mean of a batch of 64 whose levels are independent,
and of one whose levels are spread over the batch.

    python papers/vdm_toy.py [--examples 128000]
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch import Tensor

import records
from likely.diffusion.bound import prior_nats, squared_errors, weighted_error
from likely.diffusion.levels import Adaptive, Ends, Learned, draw, make_levels, spread_over_batch
from likely.diffusion.parameterisation import Pair, alpha_sigma
from likely.noise import StreamNoise

LOW, HIGH = -12.0, 8.0
SCHEDULES = ("linear", "cosine", "lognormal", "adaptive", "learned")
#: Means and weights of the mixture; the deviation of every component, chosen so that the loss has a narrow peak.
MEANS = torch.tensor([[-1.4, -0.9], [-0.2, 1.3], [1.1, -0.4], [1.5, 1.2]], dtype=torch.float64)
WEIGHTS = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
DEVIATION = 0.03


def best(z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
    """E[x | z] of the mixture, and the noise that goes with it."""
    alpha, sigma = alpha_sigma(gamma, z)
    variance = sigma.square() + (alpha * DEVIATION).square()
    gap = z.unsqueeze(1) - alpha.unsqueeze(1) * MEANS
    share = (WEIGHTS.log() - 0.5 * gap.square().sum(2) / variance).softmax(1)
    shrink = alpha * DEVIATION**2 / variance
    x = (share.unsqueeze(2) * (MEANS + shrink.unsqueeze(1) * gap)).sum(1)
    return Pair(x, (z - alpha * x) / sigma)


def examples(n: int, seed: int) -> Tensor:
    """Draws of the mixture."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(WEIGHTS, n, replacement=True, generator=generator)
    return MEANS[chosen] + DEVIATION * torch.randn(n, 2, generator=generator, dtype=torch.float64)


def entropy_nats(n: int) -> tuple[float, float]:
    """−E log p(x) and its standard error."""
    x = examples(n, 99)
    gap = (x.unsqueeze(1) - MEANS).square().sum(2)
    log_p = (WEIGHTS.log() - 0.5 * gap / DEVIATION**2).logsumexp(1) - math.log(2 * math.pi * DEVIATION**2)
    return -float(log_p.mean()), float(log_p.std()) / math.sqrt(n)


def learn(name: str, ends: Ends, steps: int) -> torch.nn.Module:
    """A schedule, trained on the loss of the best denoiser where it can be."""
    levels = make_levels(name, LOW, HIGH).double()
    if isinstance(levels, Learned):
        optimiser = torch.optim.Adam(levels.parameters(), lr=0.01)
    for step in range(steps if isinstance(levels, Adaptive | Learned) else 0):
        noise = StreamNoise(torch.Generator().manual_seed(step))
        drawn = draw(levels, ends, spread_over_batch(noise, 256).double().unsqueeze(1))
        errors = squared_errors(best, examples(256, step), drawn.gamma, noise.normal((256, 1, 2)).double())
        integrand = errors.sum((1, 2)).unsqueeze(1)
        if isinstance(levels, Adaptive):
            levels.observe(drawn.v, integrand)
        else:
            optimiser.zero_grad()
            levels.variance(drawn.v, integrand).backward()
            optimiser.step()
    return levels


def measure(name: str, n: int, steps: int) -> dict[str, Any]:
    """The diffusion term under a schedule, nats, and variances of its estimates."""
    ends = Ends(LOW, HIGH).double()
    levels = learn(name, ends, steps)
    noise = StreamNoise(torch.Generator().manual_seed(1))
    x, batch = examples(n, 0), 64

    def terms(u: Tensor) -> Tensor:
        with torch.no_grad():
            drawn = draw(levels, ends, u.double().unsqueeze(1))  # type: ignore[arg-type]
            errors = squared_errors(best, x, drawn.gamma, noise.normal((n, 1, 2)).double())
            return weighted_error(drawn, errors).squeeze(1)

    alone = terms(noise.uniform((n,)))
    spread = terms(torch.cat([spread_over_batch(noise, batch) for _ in range(n // batch)]))
    means = alone.reshape(-1, batch).mean(1), spread.reshape(-1, batch).mean(1)
    reconstruction = -(1 + math.log(2 * math.pi) + LOW)  # of two cells
    prior = float(prior_nats(x, ends.high).sum(1).mean())
    return {
        "schedule": name,
        "diffusion_nats": float(spread.mean()),
        "standard_error": float(means[1].std()) / math.sqrt(len(means[1])),
        "bound_nats": reconstruction + prior - float(spread.mean()),
        "variance_of_a_level": float(alone.var()),
        "variance_of_a_batch": float(means[0].var()),
        "variance_of_a_spread_batch": float(means[1].var()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=128_000)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of a schedule that learns")
    parser.add_argument("--dry-run", action="store_true", help="few examples and steps; nothing is written")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.dry_run:
        arguments.examples, arguments.steps = 2560, 20
    start = time.process_time()
    rows = []
    for name in SCHEDULES:
        torch.manual_seed(0)
        rows.append(measure(name, arguments.examples, arguments.steps))
    entropy, error = entropy_nats(10 * arguments.examples)
    content = {"rows": rows, "entropy_nats": entropy, "entropy_error": error, "ends": [LOW, HIGH]}
    table = [
        "# One bound, five schedules",
        "",
        "The best denoiser of a mixture of four normals in the plane; −log SNR from "
        f"{LOW:g} to {HIGH:g}; {arguments.examples:,} examples.",
        f"± is the standard error.  The entropy of the mixture, which −bound exceeds by what the two ends cost: "
        f"{entropy:.4f} ± {error:.4f} nats.",
        "",
        "| schedule | diffusion term, nats | −bound, nats | variance: a level | batch of 64 | batch of 64, spread |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        table.append(
            f"| {row['schedule']} | {row['diffusion_nats']:.4f} ± {row['standard_error']:.4f} | "
            f"{-row['bound_nats']:.4f} | "
            f"{row['variance_of_a_level']:.2f} | {row['variance_of_a_batch']:.4f} | "
            f"{row['variance_of_a_spread_batch']:.5f} |"
        )
    table += [
        "",
        "`lognormal` is EDM's density, made for a weighted loss: it hardly visits the ends, where this sum has weight.",
        "The paper's own table is of CIFAR-10 and of trained networks; its numbers do not compare with these.",
    ]
    if arguments.dry_run:
        print("\n".join(table))
        return
    records.write("vdm_toy", {**content, "run": records.provenance(time.process_time() - start)}, table)


if __name__ == "__main__":
    main()
