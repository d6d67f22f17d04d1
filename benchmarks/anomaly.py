"""Ten sets of ADBench: anomalies among the training rows, and training rows that are clean; one method, one default.

Protocol (Han et al. 2022, arXiv:2206.09426): numbers brought to [0, 1] on the training part; sets of more than 10,000
rows are drawn down to 10,000; labels are used for the area under the ROC curve alone.

* contaminated: 70 % of the rows, stratified, with their anomalies, are trained on; 30 % are scored;
* one-class: half of the normal rows are trained on; all others are scored.

No option differs between sets or settings.  pyod's VAE and isolation forest run in an environment of their own, named
by --pyod; without it their columns are left out.  CPU seconds are of one thread, fit and scores together; imports and
what else is done once a process are not counted: every method first works on a few rows of noise.

    LIKELY_DATA=… python benchmarks/anomaly.py [--pyod /path/to/python] [--sets cardio,thyroid] [--seeds 1,2,3]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from turns import machine, versions, write_record

SETS = {
    "cardio": "6_cardio",
    "thyroid": "38_thyroid",
    "pendigits": "28_pendigits",
    "satellite": "30_satellite",
    "mammography": "23_mammography",
    "shuttle": "32_shuttle",
    "annthyroid": "2_annthyroid",
    "optdigits": "26_optdigits",
    "breastw": "4_breastw",
    "ionosphere": "18_Ionosphere",
}
SETTINGS = ("contaminated", "one-class")
MOST_ROWS = 10_000
RESULTS = Path(__file__).parent / "results" / "anomaly"
Split = tuple[np.ndarray, np.ndarray, np.ndarray]
Scorer = Callable[[np.ndarray, np.ndarray, int], np.ndarray]


def divided(x: np.ndarray, y: np.ndarray, setting: str, seed: int) -> Split:
    """Training rows, rows to be scored, and whether these are anomalies."""
    from sklearn.model_selection import train_test_split

    random = np.random.default_rng(seed)
    x, y = x.astype(np.float64), y.astype(np.int64)
    if len(x) > MOST_ROWS:
        some = random.choice(len(x), MOST_ROWS, replace=False)
        x, y = x[some], y[some]
    if setting == "contaminated":
        train, test, _, labels = train_test_split(x, y, test_size=0.3, stratify=y, random_state=seed)
    else:
        normal = random.permutation(np.flatnonzero(y == 0))
        chosen = normal[: len(normal) // 2]
        rest = np.setdiff1d(np.arange(len(x)), chosen)
        train, test, labels = x[chosen], x[rest], y[rest]
    low, width = train.min(0), np.ptp(train, axis=0)
    width = np.where(width > 0, width, 1.0)
    return (train - low) / width, (test - low) / width, labels


def likely_scores(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    from likely.sklearn import OutlierDetector

    return OutlierDetector(random_state=seed).fit(train).anomaly_score(test)


def kernel_scores(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.neighbors import KernelDensity

    return -KernelDensity(bandwidth="scott").fit(train).score_samples(test)


def forest_scores(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    from sklearn.ensemble import IsolationForest

    return -IsolationForest(random_state=seed).fit(train).score_samples(test)


def pyod_vae_scores(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
    import torch
    from pyod.models.vae import VAE

    torch.manual_seed(seed)
    return VAE(random_state=seed, verbose=0).fit(train).decision_function(test)


OURS: dict[str, Scorer] = {
    "likely OutlierDetector": likely_scores,
    "KernelDensity": kernel_scores,
    "IsolationForest": forest_scores,
}
PYOD: dict[str, Scorer] = {"pyod VAE": pyod_vae_scores}
METHODS = [*OURS, *PYOD]


def measure(scorers: dict[str, Scorer], folder: Path, names: list[str], seeds: list[int]) -> list[dict]:
    """AUC and CPU seconds of every scorer on every set, in both settings, for every seed."""
    import torch
    from sklearn.metrics import roc_auc_score

    torch.set_num_threads(1)
    noise = np.random.default_rng(0).random((200, 5))
    for scorer in scorers.values():
        scorer(noise, noise, 0)
    found = []
    for name in names:
        with np.load(folder / f"{SETS[name]}.npz") as arrays:
            x, y = arrays["X"], arrays["y"]
        for setting in SETTINGS:
            for seed in seeds:
                train, test, labels = divided(x, y, setting, seed)
                for method, scorer in scorers.items():
                    began = time.process_time()
                    scores = scorer(train, test, seed)
                    cpu = time.process_time() - began
                    auc = 100 * float(roc_auc_score(labels, np.nan_to_num(scores, posinf=1e300)))
                    found.append(
                        {"set": name, "setting": setting, "seed": seed, "method": method, "auc": auc, "cpu": cpu}
                    )
        print(f"{name}: done, {time.process_time():.0f} CPU s so far", file=sys.stderr, flush=True)
    return found


def table(records: list[dict], names: list[str]) -> str:
    """Mean AUC over the seeds, a row a set and setting."""
    methods = list(dict.fromkeys(record["method"] for record in records))
    lines = ["| setting | set | " + " | ".join(methods) + " |", "|---|---|" + "---|" * len(methods)]
    for setting in SETTINGS:
        means: dict[str, list[float]] = {method: [] for method in methods}
        for name in names:
            cells = []
            for method in methods:
                values = [r["auc"] for r in records if (r["set"], r["setting"], r["method"]) == (name, setting, method)]
                means[method].append(float(np.mean(values)) if values else float("nan"))
                cells.append(f"{means[method][-1]:.1f}")
            lines.append(f"| {setting} | {name} | " + " | ".join(cells) + " |")
        cells = [f"**{np.mean(values):.2f}**" for values in means.values()]
        lines.append(f"| {setting} | **mean** | " + " | ".join(cells) + " |")
        cpu = [sum(r["cpu"] for r in records if (r["setting"], r["method"]) == (setting, m)) for m in methods]
        runs = len({r["seed"] for r in records})
        lines.append(f"| {setting} | CPU s, all sets | " + " | ".join(f"{value / runs:.1f}" for value in cpu) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--pyod", help="a Python that has pyod")
    parser.add_argument("--pyod-seeds", default="1", help="seeds of pyod's VAE, which is slow")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--player", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names, seeds = arguments.sets.split(","), [int(seed) for seed in arguments.seeds.split(",")]
    folder = Path(os.environ["LIKELY_DATA"]) / "adbench"
    if arguments.player:
        Path(arguments.player).write_text(json.dumps(measure(PYOD, folder, names, seeds)), encoding="utf-8")
        return
    records = measure(OURS, folder, names, seeds)
    keep(records, names, arguments.out)
    if arguments.pyod:
        with tempfile.TemporaryDirectory() as place:
            answer = Path(place) / "answer.json"
            command = [arguments.pyod, __file__, "--player", str(answer), "--sets", arguments.sets]
            subprocess.run([*command, "--seeds", arguments.pyod_seeds], check=True, stdout=subprocess.DEVNULL)
            records += json.loads(answer.read_text(encoding="utf-8"))
        keep(records, names, arguments.out)
    print(table(records, names))


def keep(records: list[dict], names: list[str], out: Path) -> None:
    """Write the table and all values."""
    import sklearn

    where = machine()
    used = {"scikit-learn": sklearn.__version__, **versions()}
    day = str(datetime.now(UTC).date())
    seeds = {method: sorted({r["seed"] for r in records if r["method"] == method}) for method in METHODS}
    lines = [
        "# Anomalies",
        "",
        "Area under the ROC curve x 100; CPU seconds of one run over all sets; protocol: benchmarks/anomaly.py.",
        "",
        "    LIKELY_DATA=… python benchmarks/anomaly.py --pyod /path/to/python",
        "",
        table(records, names),
        "",
        f"Seeds {', '.join(f'{method}: {found}' for method, found in seeds.items() if found)}.",
        f"{where['system']}, {where['cores']} cores, shared, one thread; "
        f"{', '.join(f'{name} {version}' for name, version in used.items())}; {day}.",
        "",
    ]
    write_record(out, {"records": records, "date": day, "machine": where, "versions": used}, "\n".join(lines))


if __name__ == "__main__":
    main()
