"""Memory of a table with a column of 100,000 different names, beside the same table with seven.

    python benchmarks/many_names.py --out benchmarks/results/many_names

`likely fit` of each model, some steps, on 200,000 rows of one column of names, one of numbers and one of few categories;
the peak of resident memory of the whole process, reading of the file included.  The names follow a power law; each
occurs.  The goal: no more than 300 MB above the table with seven names.  Linux only (units of ``ru_maxrss``).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from turns import machine, versions, write_record

ROWS, NAMES, FEW, GOAL = 200_000, 100_000, 7, 300.0
MODELS = ("independent", "mixture", "made", "vae", "transformer")


def write_table(path: Path, names: int) -> None:
    """A CSV file in which every one of the names occurs."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(0)
    name = np.minimum(rng.pareto(1.1, ROWS) * 50, NAMES - 1).astype(int)
    name[:NAMES] = np.arange(NAMES)
    columns = {
        "name": [f"k{number % names:05d}" for number in name],
        "number": rng.normal(size=ROWS).round(3),
        "category": rng.integers(0, 5, ROWS).astype(str),
    }
    pd.DataFrame(columns).to_csv(path, index=False)


def peak(file: Path, model: str, steps: int) -> float:
    """Peak resident memory of ``likely fit`` in MB."""
    fit = [sys.executable, "-m", "likely", "fit", str(file), "--model", model, "--out", str(file.parent / "run")]
    length = [] if model in ("independent", "mixture") else ["--steps", str(steps)]
    process = subprocess.Popen([*fit, "--overwrite", *length], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{model}: likely fit ended with status {os.waitstatus_to_exitcode(status)}")
    return usage.ru_maxrss * 1024 / 1e6


def table(record: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        f"# A column of {NAMES:,} names: peak memory of `likely fit`, MB",
        "",
        f"Command: `{record['command']}`.  {record['date']}.  Machine: {record['machine']['processor']}, "
        f"{record['machine']['memory_gib']} GiB; torch {record['versions']['torch']}.",
        "",
        f"| model | {FEW} names | {NAMES:,} names | more | goal |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        more = row["many"] - row["few"]
        met = "yes" if more <= GOAL else "**no**"
        lines.append(f"| {row['model']} | {row['few']:.0f} | {row['many']:.0f} | {more:.0f} | ≤ {GOAL:.0f}: {met} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        files = {names: Path(folder) / f"{names}.csv" for names in (FEW, NAMES)}
        for names, file in files.items():
            write_table(file, names)
        for model in arguments.models:
            few, many = (peak(file, model, arguments.steps) for file in files.values())
            rows.append({"model": model, "few": few, "many": many})
            print(rows[-1], file=sys.stderr, flush=True)
    record = {
        "command": " ".join(["python benchmarks/many_names.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "rows": rows,
    }
    print(table(record))
    if arguments.out:
        write_record(arguments.out, record, table(record))


if __name__ == "__main__":
    main()
