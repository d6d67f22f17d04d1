"""Adult (UCI): bits a row on the test file, and imputation against scikit-learn's imputers, in one run.

The files are UCI's own: no header, ``?`` for a missing cell, a full stop after every label of the test file.  The model
is fitted to the training file; all bits are of the test file's rows.

Imputation: 30 % of the cells of 2,000 test rows are removed at random.  Every method is fitted to the whole training
file and fills these rows.  Numbers: root mean squared error in standard deviations of the training column, pooled over
the six numeric columns; categories: share that is right, pooled over the nine others.  scikit-learn's imputers see
standardised numbers and one-hot categories, and a category is the largest of its columns.

    LIKELY_DATA=… python benchmarks/adult.py [--steps 6000]
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sklearn
import torch
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer

import likely
from turns import write_record

RESULTS = Path(__file__).parent / "results" / "adult"
#: The test file has a full stop after every label.
TEST = {"strip_suffix": "."}
MODEL = {
    "latent_dim": 16,
    "hidden": [256, 256],
    "prior": "mixture",
    "prior_options": {"components": 50},
    "gradient": "path",
    "hide": 0.3,
}
TRAINING = {"batch_size": 500, "learning_rate": 2e-3, "patience": None}
ROWS, REMOVED = 2000, 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = Path(os.environ["LIKELY_DATA"]) / "tables"
    train, test = folder / "adult-train.csv.gz", folder / "adult-test.csv.gz"

    cpu = time.process_time()
    fitted = likely.fit(train, "vae", seed=arguments.seed, steps=arguments.steps, **MODEL, **TRAINING)
    fit_seconds = time.process_time() - cpu
    evaluation = fitted.evaluate(test, samples=100, read=TEST)
    bits = [
        {"name": row.name, "bits_per_row": row.bits, "standard_error": row.bits_error, "kind": row.says}
        for row in evaluation.rows()
    ]
    filled = imputation(fitted, fitted_frame(fitted, train), fitted_frame(fitted, test, **TEST), arguments.seed)
    result = {
        "bits": bits,
        "rows": evaluation.held_out.n,
        "imputation": filled,
        "fit_cpu_seconds": round(fit_seconds),
        "steps": fitted.result.steps if fitted.result else None,
        "options": {**MODEL, **TRAINING},
        "seed": arguments.seed,
        "command": f"python benchmarks/adult.py --steps {arguments.steps} --threads {arguments.threads}",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared",
        "versions": {"likely": likely.__version__, "torch": torch.__version__, "scikit-learn": sklearn.__version__},
    }
    write_record(arguments.out, result, report(result))
    print(report(result))


def fitted_frame(fitted: likely.Fitted, path: Path, **read: str) -> pd.DataFrame:
    """A file as a DataFrame with the fitted spellings."""
    dataset = fitted.schema.read(path, **read)
    return fitted.schema.to_user(dataset.x)


def imputation(fitted: likely.Fitted, train: pd.DataFrame, test: pd.DataFrame, seed: int) -> list[dict[str, Any]]:
    """Errors of every method on the same removed cells."""
    rng = np.random.default_rng(seed)
    truth = test.iloc[np.sort(rng.choice(len(test), ROWS, replace=False))].reset_index(drop=True)
    removed = (rng.random(truth.shape) < REMOVED) & truth.notna().to_numpy()
    holed = truth.astype(object).mask(removed)
    numbers = [c for c in train.columns if pd.api.types.is_numeric_dtype(train[c])]
    coder = OneHot(train, numbers)
    methods: dict[str, Callable[[], pd.DataFrame]] = {
        "likely vae, single best": lambda: fitted.impute(holed),
        "mean / mode": lambda: mean_or_mode(train, holed, numbers),
        "KNN (5 neighbours)": lambda: coder.fill(KNNImputer(n_neighbors=5), holed),
        "IterativeImputer (BayesianRidge)": lambda: coder.fill(coder.iterative(), holed),
    }
    rows = []
    for name, method in methods.items():
        cpu = time.process_time()
        filled = method()
        seconds = time.process_time() - cpu
        squares, cells, right, codes = 0.0, 0, 0, 0
        for j, column in enumerate(truth.columns):
            gap = removed[:, j]
            said, true = filled[column][gap], truth[column][gap]
            if column in numbers:
                error = (said.astype(float) - true.astype(float)) / train[column].astype(float).std()
                squares, cells = squares + float((error**2).sum()), cells + int(gap.sum())
            else:
                right, codes = right + int((said.astype(str) == true.astype(str)).sum()), codes + int(gap.sum())
        rows.append(
            {
                "method": name,
                "rmse": (squares / cells) ** 0.5,
                "accuracy": right / codes,
                "cpu_seconds": round(seconds, 1),
            }
        )
    return rows


def mean_or_mode(train: pd.DataFrame, holed: pd.DataFrame, numbers: list[str]) -> pd.DataFrame:
    """The column's mean or most frequent value."""
    out = holed.copy()
    for column in holed.columns:
        value = train[column].astype(float).mean() if column in numbers else train[column].mode()[0]
        out[column] = holed[column].where(holed[column].notna(), value)
    return out


class OneHot:
    """Standardised numbers and one-hot categories, missing in all columns of a missing category."""

    def __init__(self, train: pd.DataFrame, numbers: list[str]) -> None:
        self.numbers, self.columns = numbers, list(train.columns)
        values = train[numbers].astype(float)
        self.mean, self.scale = values.mean(), values.std()
        self.levels = {c: sorted(train[c].dropna().astype(str).unique()) for c in self.columns if c not in numbers}
        #: the column that each feature belongs to
        self.column_of = [*range(len(numbers))]
        for j, levels in enumerate(self.levels.values(), start=len(numbers)):
            self.column_of += [j] * len(levels)
        self.train = self.encode(train)

    def encode(self, frame: pd.DataFrame) -> np.ndarray:
        """Shape ``(rows, features)``."""
        pieces = [((frame[self.numbers].astype(float) - self.mean) / self.scale).to_numpy()]
        for column, levels in self.levels.items():
            cells = frame[column].to_numpy()
            hot = (cells[:, None].astype(str) == np.array(levels)[None]).astype(float)
            hot[pd.isna(cells)] = np.nan
            pieces.append(hot)
        return np.concatenate(pieces, 1)

    def iterative(self) -> IterativeImputer:
        """Regressions that were fitted to rows with holes as many as it will meet, and kept in the columns' ranges.

        (Fitted to the rows without their holes it extrapolates without bound: 182 standard deviations.)
        """
        low, high = np.nanmin(self.train, axis=0), np.nanmax(self.train, axis=0)
        return IterativeImputer(max_iter=10, random_state=0, min_value=low, max_value=high)

    def fill(self, imputer: Any, holed: pd.DataFrame) -> pd.DataFrame:
        """The rows as the imputer, fitted to the training rows, fills them."""
        train = self.train
        if isinstance(imputer, IterativeImputer):
            removed = np.random.default_rng(1).random((len(train), len(self.columns))) < REMOVED
            train = np.where(removed[:, self.column_of], np.nan, train)
        imputer.fit(train)
        filled = imputer.transform(self.encode(holed))
        out = holed.copy()
        start = len(self.numbers)
        for i, column in enumerate(self.numbers):
            value = filled[:, i] * self.scale[column] + self.mean[column]
            out[column] = holed[column].where(holed[column].notna(), pd.Series(value))
        for column, levels in self.levels.items():
            best = np.array(levels)[filled[:, start : start + len(levels)].argmax(1)]
            out[column] = holed[column].where(holed[column].notna(), pd.Series(best))
            start += len(levels)
        return out


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# Adult: bits a row on the test file, and imputation",
        "",
        f"{result['rows']:,} rows of UCI's test file; the model never saw them.  ± is the standard error over rows.",
        "",
        "| model or codec | bits/row | kind |",
        "|---|---|---|",
    ]
    for row in result["bits"]:
        error = f" ± {row['standard_error']:.2f}" if row["standard_error"] is not None else ""
        value = "–" if row["bits_per_row"] is None else f"{row['bits_per_row']:.2f}{error}"
        lines.append(f"| {row['name']} | {value} | {row['kind']} |")
    lines += [
        "",
        f"Imputation of {REMOVED:.0%} of the cells of {ROWS:,} test rows; CPU seconds include the fit of",
        f"scikit-learn's methods; the vae's fit took {result['fit_cpu_seconds']:,} CPU s once.",
        "",
        "| method | RMSE (sd) | accuracy | CPU s |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {r['method']} | {r['rmse']:.3f} | {r['accuracy']:.3f} | {r['cpu_seconds']:g} |"
        for r in result["imputation"]
    ]
    lines += ["", f"`{result['command']}`; {result['machine']}; {result['versions']}; {result['date']}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
