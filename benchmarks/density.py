"""Held-out density of flows on standardised tables, against other libraries' flows, a Gaussian mixture and a kernel.

    LIKELY_DATA=… python benchmarks/density.py --rivals PYTHON --out benchmarks/results/density

PYTHON has zuko, nflows and normflows; without it only our models and scikit-learn's run.  All flows are fitted by one
loop (Adam 1e-3, batches of 256, a tenth of the training rows to stop by, at most ``--budget`` seconds of processor time,
one thread) to the same rows; the number is nats per held-out row, higher is better, with its standard error, and the
least of all rows.  Only sets whose columns are a continuum: elsewhere a density has no limit.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

SETS = ("pendulum", "digits", "protein")
BATCH, RATE, PATIENCE = 256, 1e-3, 12
#: The architecture of every spline flow: transforms, widths of the hidden layers, bins, half the width of the box.
TRANSFORMS, HIDDEN, BINS, BOX = 3, (64, 64), 8, 4.0


def rows_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Training and test rows, float64, standardised by the training rows."""
    if name == "digits":
        from sklearn.datasets import load_digits

        random = np.random.default_rng(0)
        x = load_digits().data
        x = x + random.uniform(size=x.shape)
        order = random.permutation(len(x))
        train, test = x[order[341:]], x[order[:341]]
    else:
        folder = Path(os.environ["LIKELY_DATA"]) / "uci_tables"
        with gzip.open(folder / f"{name}.data.csv.gz", "rt") as file:
            x = np.loadtxt(file, delimiter=",")
        with gzip.open(folder / f"{name}.test_mask.csv.gz", "rt") as file:
            held = np.loadtxt(file, delimiter=",")[:, 0] > 0.5
        train, test = x[~held], x[held]
    mean, scale = train.mean(0), train.std(0)
    return (train - mean) / scale, (test - mean) / scale


# Flows -------------------------------------------------------------------------------------------------------------


def likely_flow(kind: str, dims: int) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor], Any]:
    """A model of ours, used as a model: its own standardisation and defaults beside the shared architecture."""
    from likely.contract import Reals
    from likely.models import find

    options: dict[str, Any] = {"transforms": TRANSFORMS, "hidden": HIDDEN}
    name = kind.removeprefix("likely ").split()[0]
    if name == "nsf":
        options |= {"bins": BINS, "conditioner": "coupling" if "coupling" in kind else "autoregressive"}
    if "mixing" in kind:
        options["mixing"] = True
    if "defaults" in kind:
        options = {}
    model = find(name)(Reals((dims,)), **options)
    return model, lambda x: model.bound(x).nats, lambda x: model.initialise([(x, None)])


def zuko_flow(kind: str, dims: int) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor], Any]:
    import zuko

    if "NSF" in kind:
        flow = zuko.flows.NSF(dims, 0, bins=BINS, transforms=TRANSFORMS, hidden_features=HIDDEN)
    else:
        flow = zuko.flows.MAF(dims, 0, transforms=TRANSFORMS, hidden_features=HIDDEN)
    return flow, lambda x: flow().log_prob(x), None


def nflows_flow(kind: str, dims: int) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor], Any]:
    from nflows import transforms
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet

    steps = []
    for i in range(TRANSFORMS * (2 if "coupling" in kind else 1)):
        if "coupling" in kind:
            mask = torch.arange(dims) % 2 == i % 2
            steps += [
                transforms.PiecewiseRationalQuadraticCouplingTransform(
                    mask,
                    lambda a, b: ResidualNet(a, b, HIDDEN[0], num_blocks=1),
                    num_bins=BINS,
                    tails="linear",
                    tail_bound=BOX,
                )
            ]
        else:
            steps += [
                transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                    dims,
                    HIDDEN[0],
                    num_bins=BINS,
                    tails="linear",
                    tail_bound=BOX,
                    num_blocks=len(HIDDEN),
                    use_residual_blocks=False,
                ),
                transforms.ReversePermutation(dims),
            ]
    flow = Flow(transforms.CompositeTransform(steps), StandardNormal([dims]))
    return flow, flow.log_prob, None


def normflows_flow(kind: str, dims: int) -> tuple[torch.nn.Module, Callable[[torch.Tensor], torch.Tensor], Any]:
    import normflows as nf

    steps = []
    for _ in range(TRANSFORMS):
        steps.append(
            nf.flows.AutoregressiveRationalQuadraticSpline(dims, len(HIDDEN), HIDDEN[0], num_bins=BINS, tail_bound=BOX)
        )
        steps.append(nf.flows.LULinearPermute(dims))
    flow = nf.NormalizingFlow(nf.distributions.DiagGaussian(dims, trainable=False), steps)
    return flow, flow.log_prob, None


FLOWS = {"likely": likely_flow, "zuko": zuko_flow, "nflows": nflows_flow, "normflows": normflows_flow}


def fit(
    kind: str, train: torch.Tensor, budget: float, seed: int
) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict]:
    """The shared loop: log-likelihood of rows, and how it went."""
    torch.manual_seed(seed)
    model, log_prob, initialise = FLOWS[kind.split()[0]](kind, train.shape[1])
    order = torch.randperm(len(train))
    held, rows = train[order[: len(train) // 10]], train[order[len(train) // 10 :]]
    started = time.process_time()
    if initialise is not None:
        initialise(rows)
    optimiser = torch.optim.Adam(model.parameters(), RATE)
    best, kept, waited, steps = math.inf, copy.deepcopy(model.state_dict()), 0, 0
    every = max(20, min(200, len(rows) // BATCH))
    while waited < PATIENCE and time.process_time() - started < budget:
        model.train()
        for batch in torch.randperm(len(rows)).split(BATCH):
            loss = -log_prob(rows[batch]).mean()
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimiser.step()
            steps += 1
            if steps % every == 0:
                model.eval()
                with torch.no_grad():
                    value = -float(log_prob(held).mean())
                model.train()
                if value < best - 1e-3:
                    best, kept, waited = value, copy.deepcopy(model.state_dict()), 0
                else:
                    waited += 1
                if waited >= PATIENCE or time.process_time() - started > budget:
                    break
    model.load_state_dict(kept)
    model.eval()
    size = sum(p.numel() for p in model.parameters())
    return log_prob, {"cpu": time.process_time() - started, "steps": steps, "parameters": size}


def classic(kind: str, train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, dict]:
    """scikit-learn's densities, their one number chosen on a tenth of the training rows."""
    from sklearn.mixture import GaussianMixture
    from sklearn.neighbors import KernelDensity

    started = time.process_time()
    random = np.random.default_rng(0)
    order = random.permutation(len(train))
    held, rows = train[order[: len(train) // 10]], train[order[len(train) // 10 :]]
    makers: dict[str, Callable[[float], Any]] = {
        "GaussianMixture": lambda k: GaussianMixture(int(k), reg_covar=1e-4, random_state=0, max_iter=60),
        "KDE": lambda width: KernelDensity(bandwidth=width),
    }
    values = (1, 3, 10, 30, 100) if kind == "GaussianMixture" else (0.1, 0.2, 0.35, 0.5, 0.8)
    if kind == "KDE":
        held, rows, test = held[:1000], rows[:20_000], test
    values = tuple(v for v in values if kind != "GaussianMixture" or v * train.shape[1] < len(rows))
    score = {v: makers[kind](v).fit(rows).score_samples(held).mean() for v in values}
    chosen = max(score, key=lambda v: score[v])
    nats = makers[kind](chosen).fit(train if kind != "KDE" else rows).score_samples(test)
    return nats, {"cpu": time.process_time() - started, "chosen": chosen}


def one(kind: str, name: str, budget: float, seed: int) -> dict[str, Any]:
    """One fit, and what it says of the test rows."""
    torch.set_num_threads(1)
    train, test = rows_of(name)
    if kind in ("GaussianMixture", "KDE"):
        nats, how = classic(kind, train, test)
    else:
        log_prob, how = fit(kind, torch.tensor(train, dtype=torch.float32), budget, seed)
        with torch.no_grad():
            nats = log_prob(torch.tensor(test, dtype=torch.float32)).double().numpy()
    error = float(nats.std() / math.sqrt(len(nats)))
    return {"nats": float(nats.mean()), "error": error, "worst": float(nats.min()), "dims": train.shape[1], **how}


KINDS = (
    "likely nsf",
    "likely nsf mixing",
    "likely nsf coupling",
    "likely maf",
    "zuko NSF",
    "nflows NSF",
    "nflows NSF coupling",
    "normflows NSF",
    "GaussianMixture",
    "KDE",
)


def report(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The table in Markdown."""
    lines = ["| model | " + " | ".join(results) + " |", "|---|" + "---|" * len(results)]
    for kind in KINDS:
        cells = []
        for found in results.values():
            if kind not in found:
                cells.append("–")
                continue
            r = found[kind]
            cells.append(f"{r['nats']:.2f} ± {r['error']:.2f} (worst {r['worst']:.0f}; {r['cpu']:.0f} s)")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", help="a Python with zuko, nflows and normflows")
    parser.add_argument("--out", type=Path, help="where to write .json and .md")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of processor time for each fit")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one, arguments.budget, arguments.seed)))
        return
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name in arguments.sets:
        for kind in arguments.kinds:
            ours = kind.startswith("likely") or kind in ("GaussianMixture", "KDE")
            python = sys.executable if ours else arguments.rivals
            if python is None:
                continue
            command = [python, "-W", "ignore", __file__, "--one", kind, name, "--budget", str(arguments.budget)]
            command += ["--seed", str(arguments.seed)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"{kind} on {name}:\n{done.stderr[-3000:]}")
            results.setdefault(name, {})[kind] = json.loads(done.stdout.strip().splitlines()[-1])
            print(name, kind, results[name][kind], flush=True)
    if arguments.out:
        arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(report(results))


if __name__ == "__main__":
    main()
