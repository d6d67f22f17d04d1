"""Distance to the truth on tables drawn from published Bayesian networks, in nats a row, and what the fit costs.

10,000 training rows, 5,000 test rows, default options, the same for every network.  The gap is the mean over test rows
of truth − model: a Kullback-Leibler divergence, of which ± is the standard error.

Then 30 % of all cells are removed.  The gap is now that of the observed cells to the mean of the truth's own marginal
likelihood of such cells, and imputations are compared with those of the exact posterior (both were measured once, by
enumeration of the networks' tables).

    LIKELY_DATA=… python benchmarks/known_truth.py [--networks asia,child] [--options '{"orders": 3}']
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import likely
from turns import write_record

RESULTS = Path(__file__).parent / "results" / "known_truth"
NETWORKS = ("asia", "sachs", "child", "ecoli70")
#: What the gap should be at most.
AIM = {"asia": 0.004, "sachs": 0.030, "child": 0.050, "ecoli70": 0.060}
#: Mean log-likelihood of the observed cells under the truth, and accuracy of its posterior, with 30 % removed.
HOLES = {"asia": (-1.721, 0.891), "sachs": (-5.361, 0.744)}
REMOVED = 0.3


def table(folder: Path, network: str, part: str) -> pd.DataFrame:
    """One file; words such as "None" are words."""
    return pd.read_csv(folder / f"{network}_{part}.csv.gz", keep_default_na=False)


def gap(folder: Path, network: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """Fit to the training rows, held against the test rows."""
    train, test = table(folder, network, "train"), table(folder, network, "test")
    truth = np.load(folder / f"{network}_test_log_prob.npy")
    cpu = time.process_time()
    fitted = likely.fit(train, "made", seed=seed, progress=False, **options)
    found = truth - fitted.score_samples(test)
    seconds = time.process_time() - cpu
    return {
        "network": network,
        "truth": float(truth.mean()),
        "gap": float(found.mean()),
        "standard_error": float(found.std() / len(found) ** 0.5),
        "aim": AIM[network],
        "cpu_seconds": round(seconds, 1),
        "best_step": fitted.result.valid["step"] if fitted.result and fitted.result.valid else None,
    }


def holes(folder: Path, network: str, seed: int, options: dict[str, Any]) -> dict[str, Any]:
    """The same with cells removed from both files at random; the aims are those of the exact posterior."""
    train, test = table(folder, network, "train"), table(folder, network, "test")
    rng = np.random.default_rng(seed)
    holed = {name: frame.mask(rng.random(frame.shape) < REMOVED) for name, frame in (("a", train), ("b", test))}
    cpu = time.process_time()
    fitted = likely.fit(holed["a"], "made", seed=seed, progress=False, **options)
    nats = fitted.score_samples(holed["b"])
    filled = fitted.impute(holed["b"])
    seconds = time.process_time() - cpu
    lost = holed["b"].isna().to_numpy()
    truth, exact = HOLES[network]
    said = float((filled.astype(str) == test.astype(str)).to_numpy()[lost].mean())
    return {
        "network": network,
        "observed_gap": truth - float(nats.mean()),
        "standard_error": float(nats.std() / len(nats) ** 0.5),
        "imputation": said,
        "exact_posterior": exact,
        "cpu_seconds": round(seconds, 1),
    }


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# Distance to a known truth",
        "",
        "Nats a row on 5,000 test rows, after a fit to 10,000; default options.",
        "",
        "| network | truth | gap | aim | CPU s |",
        "|---|---|---|---|---|",
    ]
    for row in result["gaps"]:
        lines.append(
            f"| {row['network']} | {row['truth']:.2f} | {row['gap']:.4f} ± {row['standard_error']:.4f} | "
            f"{row['aim']:.3f} | {row['cpu_seconds']:g} |"
        )
    lines += [
        "",
        f"{REMOVED:.0%} of the cells removed from both files.  The gap is to the mean of the truth over other holes,",
        "so that its error is that of a mean of nats.  Imputation: share of right codes.",
        "",
        "| network | options | gap of the observed cells | imputation | exact posterior | CPU s |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["holes"]:
        lines.append(
            f"| {row['network']} | {row['options']} | {row['observed_gap']:.3f} ± {row['standard_error']:.3f} | "
            f"{row['imputation']:.3f} | {row['exact_posterior']:.3f} | {row['cpu_seconds']:g} |"
        )
    about = f"Options {result['options'] or 'default'}, seed {result['seed']}; {result['machine']}"
    return "\n".join([*lines, "", f"{about}; {result['versions']}; {result['date']}.", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--options", type=json.loads, default={}, help="of the model and its training, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="asia alone, few steps; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ["LIKELY_DATA"]) / "bayesnets"
    names, options = arguments.networks.split(","), dict(arguments.options)
    if arguments.dry_run:
        names, options = ["asia"], {"steps": 5, **options}
    gaps, with_holes = [], []
    for name in names:
        gaps.append(gap(folder, name, arguments.seed, options))
        print(gaps[-1], flush=True)
    for name in names:
        for order in ("learned", "any"):
            if name not in HOLES:
                continue
            own = {"order": order, **({} if order == "learned" else {"steps": 2000}), **options}
            with_holes.append({"options": f"order={order}", **holes(folder, name, arguments.seed, own)})
            print(with_holes[-1], flush=True)
    if arguments.dry_run or names != list(NETWORKS):
        return
    result = {
        "gaps": gaps,
        "holes": with_holes,
        "options": options,
        "seed": arguments.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared, one thread",
        "versions": {"likely": likely.__version__, "torch": torch.__version__},
    }
    write_record(arguments.out, result, report(result))


if __name__ == "__main__":
    main()
