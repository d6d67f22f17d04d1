"""Reproducible arithmetic: what it costs in time, and in bits.

    LIKELY_DATA=… python benchmarks/exact.py --out benchmarks/results/exact

1. *Time.*  The encoder and the decoder (with the likelihood's numbers) of the package's vae, at batch 256: an MLP
   784-512-512-40 and the convolutional network at 32 × 32 × 3.  The same module in float32 and in exact32 take turns,
   round after round; the table has medians of processor time an example and of the ratio within a round, and the ratio
   of the best times, which is what other work on the machine disturbs least.
2. *Bits.*  Two vaes are trained for a few minutes, and their bound on held-out examples is computed, with the same
   noise, by float32 and by exact networks whose weights have 6 to 10 bits, or whose activations have another limit.

``LIKELY_DATA`` is a folder with ``mnist/`` (the four idx files); without it the digits of scikit-learn are used.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import os
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from likely import exact
from likely.contract import Binary, Integers, Space
from likely.data.dataset import Dataset
from likely.exact.profiles import PROFILES
from likely.models.vae import VAE
from likely.noise import KeyedNoise, content_keys
from likely.training import train
from turns import machine, versions, write_record

BATCH = 256


class Encodes(nn.Module):
    """From an example to the numbers of its posterior."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.parts = nn.Sequential(vae.features, vae.encoder, vae.posterior_head)

    def forward(self, x: Tensor) -> Tensor:
        return self.parts(x)


class Decodes(nn.Module):
    """From a latent vector to the numbers of the likelihood."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.decoder, self.head = vae.decoder, vae.likelihood_head

    def forward(self, z: Tensor) -> Tensor:
        return self.head.parameters_of(self.decoder(z))


# --------------------------------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------------------------------


def cases() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks as they are trained (no layer of zeros), and their inputs."""
    torch.manual_seed(0)
    found: dict[str, tuple[nn.Module, Tensor]] = {}
    spaces: dict[str, tuple[Space, dict[str, Any], Tensor]] = {
        "MLP, SiLU": (Binary((784,)), {"latent_dim": 40}, torch.randint(0, 2, (BATCH, 784)).float()),
        "MLP, ReLU": (
            Binary((784,)),
            {"latent_dim": 40, "activation": "relu"},
            torch.randint(0, 2, (BATCH, 784)).float(),
        ),
        "convolutions": (
            Integers((3, 32, 32), 256),
            {"network": "conv", "latent_dim": 64},
            torch.randint(0, 256, (BATCH, 3, 32, 32)).float(),
        ),
    }
    for name, (space, options, x) in spaces.items():
        vae = VAE(space, **options).eval()
        for parameter in vae.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.05)
        found[f"{name}: encoder"] = (Encodes(vae), x)
        found[f"{name}: decoder"] = (Decodes(vae), torch.randn(BATCH, vae.latent_dim))
    return found


def times(rounds: int) -> list[dict[str, Any]]:
    """µs of processor time an example: medians over the rounds, and the best, which other work disturbs least."""
    rows = []
    for name, (module, x) in cases().items():
        rivals = {"float32": module, "exact32": exact.network(module)}
        took: dict[str, list[float]] = {rival: [] for rival in rivals}
        precise = exact.network(module, "exact64")
        with torch.no_grad():
            for number in range(-2, rounds):
                for rival in sorted(rivals, reverse=number % 2 > 0):
                    took[rival].append(_microseconds(rivals[rival], x))
            slow = min(_microseconds(precise, x) for _ in range(4))
        took = {rival: values[2:] for rival, values in took.items()}
        ratios = [a / b for a, b in zip(took["exact32"], took["float32"])]
        best = {rival: min(values) for rival, values in took.items()}
        rows.append(
            {
                "network": name,
                **{f"{rival}_microseconds": statistics.median(values) for rival, values in took.items()},
                **{f"{rival}_best": value for rival, value in best.items()},
                "ratio": statistics.median(ratios),
                "ratio_quartiles": statistics.quantiles(ratios, n=4),
                "best_ratio": best["exact32"] / best["float32"],
                "exact64_best_ratio": slow / best["float32"],
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _microseconds(function: Callable[[Tensor], Any], x: Tensor) -> float:
    start = time.process_time()
    function(x)
    return 1e6 * (time.process_time() - start) / BATCH


# --------------------------------------------------------------------------------------------------------------
# Bits
# --------------------------------------------------------------------------------------------------------------


def digits() -> tuple[str, np.ndarray, np.ndarray]:
    """What they are, and grey images (n, size, size) to train on and to hold out."""
    if os.environ.get("LIKELY_DATA"):
        folder = Path(os.environ["LIKELY_DATA"]) / "mnist"
        parts = []
        for name in ("train", "t10k"):
            with gzip.open(folder / f"{name}-images-idx3-ubyte.gz") as file:
                parts.append(np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28))
        return "MNIST", parts[0], parts[1][:2000]
    from sklearn.datasets import load_digits

    images = (load_digits().images * (255.0 / 16.0)).astype(np.uint8)
    return "scikit-learn's digits", images[:1400], images[1400:]


def bound(vae: VAE, x: Tensor, net: exact.Network | None) -> float:
    """Mean one-sample bound in nats, with posterior and likelihood by the exact network if one is given."""
    total = 0.0
    with torch.no_grad():
        for part in x.split(200):
            noise = KeyedNoise(0, content_keys(part))
            if net is None:
                q = vae.posterior(part)
                z = q.sample(noise)
                p = vae.likelihood(z)
            else:
                q = net.run(net.module.posterior, part)
                z = q.sample(noise).float()
                p = net.run(net.module.likelihood, z)
            total += float(p.log_prob(part).flatten(1).double().sum() - q.kl_to_standard().double().sum())
    return total / len(x)


def losses(steps: int) -> tuple[str, list[dict[str, Any]]]:
    """How much lower the bound is by exact networks, in per cent of it."""
    what, known, held_out = digits()
    size = known.shape[1]
    base = PROFILES["exact32"]
    profiles = {"exact64": PROFILES["exact64"], "exact32": base}
    for bits in (6, 7, 8, 9, 10):
        largest = 2 ** (bits - 1) - 1
        name = f"weights of {bits} bits in all layers"
        profiles[name] = dataclasses.replace(base, largest_weight=largest, finest_weight=largest)
    for limit in (127, 255, 1023, 4095):
        profiles[f"activations up to {limit}"] = dataclasses.replace(base, largest_activation=limit)
    flat = Binary((size * size,))
    trials: dict[str, tuple[Space, dict[str, Any], Callable[[np.ndarray], Tensor]]] = {
        "MLP, binary": (
            flat,
            {"latent_dim": 40},
            lambda images: torch.from_numpy((images > 127).reshape(len(images), -1).astype(np.float32)),
        ),
        "convolutions, 16 levels": (
            Integers((1, size, size), 16),
            {"latent_dim": 32, "network": "conv", "hidden": (16, 32, 128)},
            lambda images: torch.from_numpy((images // 16).astype(np.float32)).unsqueeze(1),
        ),
    }
    rows = []
    for name, (space, options, prepare) in trials.items():
        torch.manual_seed(0)
        vae = VAE(space, **options)
        train(vae, Dataset(space, prepare(known)), steps=steps, batch_size=128, progress=False)
        vae.eval()
        x = prepare(held_out)
        row: dict[str, Any] = {
            "model": name,
            "examples": len(x),
            "float32_nats": bound(vae, x, None),
            "loss_percent": {},
        }
        for profile, changed in profiles.items():
            PROFILES["trial"] = changed
            ours = bound(vae, x, exact.network(vae, "trial"))
            row["loss_percent"][profile] = 100.0 * (ours / row["float32_nats"] - 1.0)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return what, rows


# --------------------------------------------------------------------------------------------------------------
# Report
# --------------------------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = ["# Cost of reproducible arithmetic", "", f"Command: `{record['command']}`."]
    if "times" in record:
        lines += [
            "",
            f"## Time: batch {BATCH}, medians over {record['rounds']} rounds",
            "",
            f"{_where(record['where_times'])}; one thread, processor time.",
            "",
            "| network | float32, µs/example | exact32 | exact32 ÷ float32 (quartiles) | best ÷ best | exact64 ÷ float32 |",
            "|---|---|---|---|---|---|",
        ]
        for row in record["times"]:
            low, _, high = row["ratio_quartiles"]
            lines.append(
                f"| {row['network']} | {row['float32_microseconds']:.1f} | {row['exact32_microseconds']:.1f} "
                f"| {row['ratio']:.2f} ({low:.2f} – {high:.2f}) | {row['best_ratio']:.2f} "
                f"| {row['exact64_best_ratio']:.1f} |"
            )
    if "losses" in record:
        lines += [
            "",
            f"## Bits: bound of a vae on {record['data']}, trained for {record['steps']:,} steps",
            "",
            f"{_where(record.get('where_losses', record))}.",  # older records say it of both parts
            "",
            "How much longer the code is, in per cent of the float32 bound; exact32 has weights of 9 bits, up to 12 in",
            "rows of few inputs, and activations up to 2047 where the certificate leaves room.",
            "",
            "| arithmetic | " + " | ".join(row["model"] for row in record["losses"]) + " |",
            "|---|" + "---|" * len(record["losses"]),
            "| float32, nats | " + " | ".join(f"{row['float32_nats']:.3f}" for row in record["losses"]) + " |",
        ]
        for name in record["losses"][0]["loss_percent"]:
            lines.append(
                f"| {name} | " + " | ".join(f"{row['loss_percent'][name]:+.3f} %" for row in record["losses"]) + " |"
            )
    return "\n".join(lines) + "\n"


def _where(about: dict[str, Any]) -> str:
    """Date, machine and version of a part."""
    computer = about["machine"]
    return (
        f"{about['date']}.  Machine: {computer['processor']}, {computer['cores']} cores, load {computer['load']}, "
        f"{computer['system']}; PyTorch {about['versions']['torch']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", default=["time", "bits"], help="others are kept from --out")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--out", type=Path, help="path of the results, without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = arguments.out.with_suffix(".json") if arguments.out else None
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    record["command"] = f"python benchmarks/exact.py --rounds {arguments.rounds} --steps {arguments.steps}"
    here = {"date": datetime.now(UTC).date().isoformat(), "machine": machine(), "versions": versions()}
    if "time" in arguments.parts:
        record |= {"where_times": here, "rounds": arguments.rounds, "times": times(arguments.rounds)}
    if "bits" in arguments.parts:
        record["data"], record["losses"] = losses(arguments.steps)
        record |= {"where_losses": here, "steps": arguments.steps}
    print(table(record))
    if path:
        write_record(arguments.out, record, table(record))


if __name__ == "__main__":
    main()
