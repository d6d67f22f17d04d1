"""Held-out density of flows on standardised tables, against other libraries' flows, a Gaussian mixture and a kernel.

    LIKELY_DATA=… python benchmarks/density.py --rivals PYTHON --out benchmarks/results/density

PYTHON has zuko, nflows and normflows; without it only our models and scikit-learn's run.  All flows are fitted by one
loop (Adam 1e-3, batches of 256, a tenth of the training rows to stop by, at most ``--budget`` seconds of processor time,
one thread) to the same rows; the number is nats per test row, higher is better, with its standard error, and the least
of all rows.  The same tenth chooses the number of components of a mixture, the strength of the prior of ours, the width
of a kernel, and at last one of our models and one of the others, as a user would: these two are compared row by row.

Only columns that are a continuum, for elsewhere a density has no limit.  pendulum and protein are taken whole.  Of the
other tables in the folder those are taken in which five columns or more have at least half as many values as rows, and
of these tables those columns: parkinsons and sml.  Not gas: its 128 columns have correlations whose least eigenvalue is
1e-8.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from turns import machine, versions, write_record

SETS = ("pendulum", "digits", "protein", "parkinsons", "sml")
#: Sets of which only columns with so many values, as a share of the rows, are a continuum.
LEAST_VALUES = {"parkinsons": 0.5, "sml": 0.5}
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
        values = np.array([len(np.unique(column)) for column in x.T])
        x = x[:, values >= LEAST_VALUES.get(name, 0.0) * len(x)]
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
    if "bare" in kind:
        options |= {"tails": "normal", "residual": False}
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


def parted(train: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A tenth of the training rows to stop and choose by, and the others: the same for all."""
    order = np.random.default_rng(seed).permutation(len(train))
    return train[order[: len(train) // 10]], train[order[len(train) // 10 :]]


def fit(
    kind: str, train: np.ndarray, budget: float, seed: int
) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, Any]]:
    """The shared loop: log-likelihood of rows, and how it went."""
    torch.manual_seed(seed)
    model, log_prob, initialise = FLOWS[kind.split()[0]](kind, train.shape[1])
    held, rows = (torch.tensor(part, dtype=torch.float32) for part in parted(train, seed))
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
    return log_prob, {"held": -best, "cpu": time.process_time() - started, "steps": steps, "parameters": size}


class Mixture:
    """Our mixture of normal laws with full covariances, in scikit-learn's words."""

    def __init__(self, components: int, smoothing: float) -> None:
        self.options = {"components": components, "smoothing": smoothing, "covariance": "full"}

    def fit(self, rows: np.ndarray) -> Mixture:
        from likely.contract import Reals
        from likely.models import find

        self.model = find("mixture")(Reals((rows.shape[1],)), **self.options)
        self.model.estimate([(torch.tensor(rows), None)])
        return self

    def score_samples(self, rows: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model.bound(torch.tensor(rows)).nats.numpy()


def classic(kind: str, train: np.ndarray, test: np.ndarray, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Densities of one number, or of two, chosen by a tenth of the training rows; a kernel gets 20,000 rows at most."""
    from sklearn.mixture import GaussianMixture
    from sklearn.neighbors import KernelDensity

    started = time.process_time()
    held, rows = parted(train, seed)
    makers: dict[str, Callable[[Any], Any]] = {
        "likely mixture": lambda chosen: Mixture(*chosen),
        "GaussianMixture": lambda k: GaussianMixture(int(k), reg_covar=1e-4, random_state=0, max_iter=60),
        "KDE": lambda width: KernelDensity(bandwidth=width),
    }
    if kind == "KDE":
        values, held, rows = [0.1, 0.2, 0.35, 0.5, 0.8], held[:1000], rows[:20_000]
    else:
        values = [k for k in (1, 3, 10, 30, 100) if k * train.shape[1] < len(rows)]
        if kind == "likely mixture":
            values = list(itertools.product(values, SMOOTHING))
    made: dict[Any, Any] = {value: makers[kind](value).fit(rows) for value in values}
    score = {value: float(model.score_samples(held).mean()) for value, model in made.items()}
    chosen = max(score, key=lambda value: score[value])
    nats = made[chosen].score_samples(test)
    return nats, {"held": score[chosen], "cpu": time.process_time() - started, "chosen": chosen}


def one(kind: str, name: str, budget: float, seed: int) -> dict[str, Any]:
    """One fit, and what it says of the test rows."""
    torch.set_num_threads(1)
    train, test = rows_of(name)
    if kind in CLASSIC:
        nats, how = classic(kind, train, test, seed)
    else:
        log_prob, how = fit(kind, train, budget, seed)
        with torch.no_grad():
            nats = log_prob(torch.tensor(test, dtype=torch.float32)).double().numpy()
    return {**summary(nats), "dims": train.shape[1], **how, "rows": nats.tolist()}


def summary(nats: np.ndarray) -> dict[str, float]:
    """Mean, its standard error, and the least."""
    return {"nats": float(nats.mean()), "error": float(nats.std() / math.sqrt(len(nats))), "worst": float(nats.min())}


#: Examples that the prior of a component of ours is worth; the default first.
SMOOTHING = (10.0, 1.0, 0.1)
#: Those that are fitted in closed form or by EM.
CLASSIC = ("likely mixture", "GaussianMixture", "KDE")
KINDS = (
    "likely nsf",
    "likely nsf mixing",
    "likely nsf coupling",
    "likely maf",
    "likely mixture",
    "zuko NSF",
    "nflows NSF",
    "nflows NSF coupling",
    "normflows NSF",
    "GaussianMixture",
    "KDE",
)


def compare(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Our model and the other that the held-out tenth chooses, and the mean of the difference, row by row."""
    ours = {kind: r for kind, r in found.items() if kind.startswith("likely")}
    others = {kind: r for kind, r in found.items() if kind not in ours}
    if not ours or not others:
        return {}
    mine, theirs = (max(group, key=lambda kind: group[kind]["held"]) for group in (ours, others))
    difference = np.array(found[mine]["rows"]) - np.array(found[theirs]["rows"])
    return {"ours": mine, "other": theirs, **summary(difference)}


def table(record: dict[str, Any]) -> str:
    """The record in Markdown."""
    where, versions = record["machine"], ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    sets = record["sets"]
    lines = [
        "# Held-out density of tables",
        "",
        f"Command: `{record['command']}`.  {record['date']}, float32, one thread, one seed.  Nats per test row of",
        "standardised columns ± one standard error; the least row and the processor seconds of the fit, of which a flow",
        f"may take {record['settings']['budget']:g}.  All spline flows: {TRANSFORMS} transforms (six couplings of nflows), two hidden layers of",
        f"{HIDDEN[0]}, {BINS} bins; normflows has an LU map before each.",
        f"Machine: {where['processor']}, {where['cores']} cores, load {where['load']}; {versions}.",
        "",
        "| model | "
        + " | ".join(f"{name}, {next(iter(found.values()))['dims']} columns" for name, found in sets.items())
        + " |",
        "|---|" + "---|" * len(sets),
    ]
    for kind in KINDS:
        cells = []
        for found in sets.values():
            r = found.get(kind)
            cells.append(
                "–" if r is None else f"{r['nats']:.2f} ± {r['error']:.2f} ({r['worst']:.0f}; {r['cpu']:.0f} s)"
            )
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    chosen = record["chosen"].values()
    if all(chosen):
        lines += [
            "| chosen of ours | " + " | ".join(c["ours"].removeprefix("likely ") for c in chosen) + " |",
            "| chosen of the others | " + " | ".join(c["other"] for c in chosen) + " |",
            "| **difference, row by row** | "
            + " | ".join(f"{c['nats']:+.2f} ± {c['error']:.2f}" for c in chosen)
            + " |",
            "",
            "The tenth of the training rows that stops a fit also chooses among ours and among the others.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", help="a Python with zuko, nflows and normflows")
    parser.add_argument("--out", type=Path, help="write the record to OUT.json and the table to OUT.md")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds of processor time for each fit")
    parser.add_argument("--sets", nargs="+", default=list(SETS), choices=SETS)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one", nargs=2, metavar=("KIND", "SET"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(*arguments.one, arguments.budget, arguments.seed)))
        return
    typed = "python benchmarks/density.py --rivals PYTHON --out benchmarks/results/density"
    record: dict[str, Any] = {
        "command": f"{typed} --budget {arguments.budget:g}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": {**versions(), "zuko": "1.6.0", "nflows": "0.14", "normflows": "1.7.3"},
        "settings": {"budget": arguments.budget, "seed": arguments.seed},
        "sets": {},
        "chosen": {},
    }
    for name in arguments.sets:
        found: dict[str, dict[str, Any]] = {}
        for kind in arguments.kinds:
            ours = kind.startswith("likely") or kind in CLASSIC
            python = sys.executable if ours else arguments.rivals
            if python is None:
                continue
            command = [python, "-W", "ignore", __file__, "--one", kind, name, "--budget", str(arguments.budget)]
            command += ["--seed", str(arguments.seed)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                raise RuntimeError(f"{kind} on {name}:\n{done.stderr[-3000:]}")
            found[kind] = json.loads(done.stdout.strip().splitlines()[-1])
            print(name, kind, {key: value for key, value in found[kind].items() if key != "rows"}, flush=True)
        record["chosen"][name] = compare(found)
        record["sets"][name] = {
            kind: {key: value for key, value in r.items() if key != "rows"} for kind, r in found.items()
        }
        print(name, record["chosen"][name], flush=True)
        if arguments.out:
            write_record(arguments.out, record, table(record))
    print(table(record))


if __name__ == "__main__":
    main()
