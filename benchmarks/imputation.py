"""Imputation of six tables against Gaussian EM and a missForest loop, on the same removed cells, in one run.

30 % of the cells are removed at random; every method is fitted to the table with holes and fills it.  Numbers: root
mean squared error in standard deviations of the column, pooled; categories: share that is right, pooled.

* Gaussian EM: a normal law of standardised numbers and one-hot categories, fitted by EM (Dempster, Laird & Rubin 1977),
  a category being the largest of its columns.
* missForest (Stekhoven & Bühlmann 2012): random forests of 100 trees, column after column, until the fill changes more
  than before.

    LIKELY_DATA=… python benchmarks/imputation.py [--tables concrete,wine] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import sklearn
import torch
from sklearn.ensemble import RandomForestClassifier, RandomForestRegressor

import likely
from likely.data import infer_schema

sys.path.insert(0, str(Path(__file__).parent))
from turns import machine, versions, write_record

RESULTS = Path(__file__).parent / "results" / "imputation"
REMOVED = 0.3
#: The same for every table.
OPTIONS: dict[str, Any] = {"order": "any", "steps": 2000}


def tables(folder: Path) -> dict[str, Callable[[], pd.DataFrame]]:
    """The six tables."""

    def uci(name: str) -> pd.DataFrame:
        values = np.loadtxt(folder / "uci_tables" / f"{name}.data.csv.gz", delimiter=",")
        return pd.DataFrame(values, columns=[f"x{j}" for j in range(values.shape[1])])

    def breastw() -> pd.DataFrame:
        archive = np.load(folder / "adbench" / "4_breastw.npz")
        frame = pd.DataFrame(archive["X"], columns=[f"x{j}" for j in range(archive["X"].shape[1])])
        return frame.assign(label=np.where(archive["y"] > 0, "yes", "no"))

    def adult() -> pd.DataFrame:
        frame = pd.read_csv(folder / "tables" / "adult-train.csv.gz", header=None, skipinitialspace=True, na_values="?")
        return frame.dropna().sample(2000, random_state=0).reset_index(drop=True).rename(columns="c{}".format)

    def german() -> pd.DataFrame:
        return pd.read_csv(folder / "tables" / "german.csv.gz", header=None, keep_default_na=False).rename(
            columns="c{}".format
        )

    return {
        "concrete": lambda: uci("concrete"),
        "parkinsons": lambda: uci("parkinsons").sample(2000, random_state=0).reset_index(drop=True),
        "wine": lambda: uci("wine"),
        "breastw": breastw,
        "german": german,
        "adult": adult,
    }


class Coded:
    """A table as standardised numbers and one-hot categories, NaN where a cell is missing."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame
        self.numeric = [c for c in frame if pd.api.types.is_numeric_dtype(frame[c])]
        values = frame[self.numeric].astype(float)
        self.mean, self.scale = values.mean(), values.std().replace(0.0, 1.0)
        self.levels = {c: sorted(frame[c].dropna().unique()) for c in frame if c not in self.numeric}

    def one_hot(self) -> np.ndarray:
        """Shape ``(rows, features)``."""
        pieces = [((self.frame[self.numeric].astype(float) - self.mean) / self.scale).to_numpy()]
        for column, levels in self.levels.items():
            cells = self.frame[column].to_numpy()[:, None]
            hot = (cells == np.array(levels, dtype=object)[None]).astype(float)
            hot[pd.isna(cells[:, 0])] = np.nan
            pieces.append(hot)
        return np.concatenate(pieces, 1)

    def back(self, features: np.ndarray) -> pd.DataFrame:
        """The table of features, its own cells kept."""
        out = self.frame.copy()
        for i, column in enumerate(self.numeric):
            values = pd.Series(features[:, i] * self.scale[column] + self.mean[column], index=out.index)
            out[column] = out[column].astype(float).where(out[column].notna(), values)
        at = len(self.numeric)
        for column, levels in self.levels.items():
            best = np.array(levels, dtype=object)[features[:, at : at + len(levels)].argmax(1)]
            out[column] = out[column].where(out[column].notna(), pd.Series(best, index=out.index))
            at += len(levels)
        return out


def gaussian_em(frame: pd.DataFrame, iterations: int = 50, ridge: float = 1e-3) -> pd.DataFrame:
    """Fill by the conditional means of a normal law fitted by EM."""
    coded = Coded(frame)
    x = coded.one_hot()
    seen = ~np.isnan(x)
    mean = np.nanmean(x, 0)
    filled = np.where(seen, x, mean)
    sigma = np.cov(filled.T, bias=True) + ridge * np.eye(x.shape[1])
    patterns, of_row = np.unique(seen, axis=0, return_inverse=True)
    for _ in range(iterations):
        spread = np.zeros_like(sigma)
        for p, pattern in enumerate(patterns):
            rows = np.flatnonzero(of_row.reshape(-1) == p)
            lost = ~pattern
            if not lost.any():
                continue
            if not pattern.any():
                filled[rows] = mean
                spread += len(rows) * sigma
                continue
            gain = np.linalg.solve(sigma[np.ix_(pattern, pattern)], sigma[np.ix_(pattern, lost)])
            filled[np.ix_(rows, lost)] = mean[lost] + (x[np.ix_(rows, pattern)] - mean[pattern]) @ gain
            spread[np.ix_(lost, lost)] += len(rows) * (sigma[np.ix_(lost, lost)] - sigma[np.ix_(lost, pattern)] @ gain)
        mean = filled.mean(0)
        sigma = (np.cov(filled.T, bias=True) * len(x) + spread) / len(x) + ridge * np.eye(x.shape[1])
    return coded.back(filled)


def miss_forest(frame: pd.DataFrame, trees: int = 100, rounds: int = 10, seed: int = 0) -> pd.DataFrame:
    """Fill by forests, column after column, the column with the fewest holes first, until the fill changes more."""
    coded = Coded(frame)
    codes = pd.DataFrame(index=frame.index)
    for column in frame:
        if column in coded.numeric:
            codes[column] = frame[column].astype(float).fillna(coded.mean[column])
        else:
            code = pd.Categorical(frame[column], categories=coded.levels[column]).codes
            codes[column] = np.where(code < 0, pd.Series(code[code >= 0]).mode()[0], code)
    holes = frame.isna()
    order = [c for c in holes.sum().sort_values().index if holes[c].any()]
    change, best = np.inf, codes
    for _ in range(rounds):
        new = best.copy()
        for column in order:
            lost = holes[column].to_numpy()
            others = new.drop(columns=column).to_numpy()
            kind = RandomForestRegressor if column in coded.numeric else RandomForestClassifier
            forest = kind(trees, max_features="sqrt", random_state=seed).fit(others[~lost], new[column][~lost])
            new.loc[lost, column] = forest.predict(others[lost])
        numbers, words = coded.numeric, list(coded.levels)
        moved = ((new[numbers] - best[numbers]) ** 2).sum().sum() / max((new[numbers] ** 2).sum().sum(), 1e-12)
        moved += (new[words] != best[words]).sum().sum() / max(int(holes[words].sum().sum()), 1) if words else 0.0
        if moved >= change:
            break
        change, best = moved, new
    out = frame.copy()
    for column in frame:
        values = best[column] if column in coded.numeric else np.array(coded.levels[column])[best[column].astype(int)]
        out[column] = out[column].where(out[column].notna(), pd.Series(values, index=out.index))
    return out


def likely_made(frame: pd.DataFrame, seed: int, options: dict[str, Any]) -> pd.DataFrame:
    """Fill by conditionals of an order-agnostic model; numbers by conditional means, as the others do.

    A number of two values, which a schema takes for a category, is told to be a number, as the others take it.
    """
    coded = [c.name for c in infer_schema(frame).space.columns if c.coded]  # type: ignore[attr-defined]
    numbers = [c for c in coded if pd.api.types.is_numeric_dtype(frame[c])]
    kinds = {c: "integer" if (frame[c].dropna() % 1 == 0).all() else "real" for c in numbers}
    schema = {"columns": {c: {"kind": kind} for c, kind in kinds.items()}} if kinds else None
    fitted = likely.fit(frame, "made", schema=schema, seed=seed, progress=False, **options)
    out, model = fitted.impute(frame), fitted.model
    means = model.impute(fitted.schema.read(frame).x, on_grid=False)  # type: ignore[operator]
    for j, column in enumerate(model.space.columns):  # type: ignore[attr-defined]
        if column.numeric:
            out[column.name] = frame[column.name].where(frame[column.name].notna(), pd.Series(means[:, j].numpy()))
    return out


def errors(truth: pd.DataFrame, filled: pd.DataFrame, removed: np.ndarray) -> dict[str, float]:
    """Pooled error of the numbers and share of right categories."""
    squares, cells, right, codes = 0.0, 0, 0, 0
    for j, column in enumerate(truth):
        gap = removed[:, j]
        if pd.api.types.is_numeric_dtype(truth[column]):
            error = (filled[column].astype(float) - truth[column])[gap] / truth[column].std()
            squares, cells = squares + float((error**2).sum()), cells + int(gap.sum())
        else:
            right += int((filled[column].astype(str) == truth[column].astype(str))[gap].sum())
            codes += int(gap.sum())
    out = {"rmse": (squares / cells) ** 0.5}
    return {**out, "accuracy": right / codes} if codes else out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default="")
    parser.add_argument("--methods", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--options", type=json.loads, default=OPTIONS, help="of the model and its training, as JSON")
    parser.add_argument("--dry-run", action="store_true", help="one small table, few steps; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = tables(Path(os.environ["LIKELY_DATA"]))
    names = arguments.tables.split(",") if arguments.tables else list(found)
    if arguments.dry_run:
        names, arguments.options = ["breastw"], {**arguments.options, "steps": 20}
    methods: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
        "likely made, any order": lambda frame: likely_made(frame, arguments.seed, arguments.options),
        "Gaussian EM": gaussian_em,
        "missForest": lambda frame: miss_forest(frame, trees=5 if arguments.dry_run else 100),
    }
    if arguments.methods:
        methods = {
            name: method for name, method in methods.items() if any(m in name for m in arguments.methods.split(","))
        }
    rows = []
    for name in names:
        truth = found[name]()
        removed = np.random.default_rng(arguments.seed).random(truth.shape) < REMOVED
        holed = truth.astype({c: float for c in truth if pd.api.types.is_numeric_dtype(truth[c])}).mask(removed)
        for title, method in methods.items():
            cpu = time.process_time()
            filled = method(holed.copy())
            row = {"table": name, "method": title, **errors(truth, filled, removed)}
            rows.append({**row, "cpu_seconds": round(time.process_time() - cpu, 1)})
            print(rows[-1], flush=True)
    if arguments.dry_run or arguments.methods or arguments.tables:
        return
    result = {
        "rows": rows,
        "options": arguments.options,
        "seed": arguments.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": {"likely": likely.__version__, "scikit-learn": sklearn.__version__, **versions()},
    }
    write_record(arguments.out, result, report(result))


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        f"# Imputation of {REMOVED:.0%} of the cells",
        "",
        "RMSE in standard deviations of the column; share of categories that is right; CPU seconds of fit and fill.",
        "",
        "    LIKELY_DATA=… python benchmarks/imputation.py",
        "",
        "| table | method | RMSE | accuracy | CPU s |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        right = f"{row['accuracy']:.3f}" if "accuracy" in row else "–"
        lines.append(f"| {row['table']} | {row['method']} | {row['rmse']:.3f} | {right} | {row['cpu_seconds']:g} |")
    where = f"{result['machine']['system']}, {result['machine']['cores']} cores, shared, one thread"
    used = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    about = f"Options of made: {result['options']}; seed {result['seed']}; {where}; {used}; {result['date']}."
    return "\n".join([*lines, "", about, ""])


if __name__ == "__main__":
    main()
