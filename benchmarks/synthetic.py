"""Synthetic tables: Adult and German credit; ours, CTGAN and TVAE, columns drawn independently, held-out real rows.

Rows with a missing cell are left out; 7,411 rows of Adult's training file (drawn with the seed) are trained on and as
many of its test file held out, of German credit 800 and 200.  The measures are those of likely.evaluation.synthetic;
"efficacy" is of income and of the credit rating.  CPU seconds are of one thread.

``likely`` without a model has a budget of seconds for the choice of a model and its fit; ``made`` is also fitted for a
few steps, to see when it is as good as TVAE at the end of its training.  TVAE and CTGAN run with their defaults (300
epochs) in an environment of their own, named by --rivals; without it they are left out.

    LIKELY_DATA=… python benchmarks/synthetic.py [--rivals /path/to/python] [--budget 50] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import likely
from likely.data import Schema, infer_schema
from likely.evaluation.synthetic import Measure, compare_samples

sys.path.insert(0, str(Path(__file__).parent))
from turns import write_record

RESULTS = Path(__file__).parent / "results" / "synthetic"
ADULT_ROWS, GERMAN_ROWS = 7_411, 800
#: Name, model and options of what is fitted here.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "likely": ("auto", {}),
    "likely made, 100 steps": ("made", {"steps": 100}),
    "likely made, 300 steps": ("made", {"steps": 300}),
    "independent columns": ("independent", {}),
}
RIVALS = {"TVAE": "tvae", "CTGAN": "ctgan"}
COLUMNS = {
    "column shapes": "shapes",
    "pairs of columns": "pairs",
    "efficacy": "efficacy",
    "detection": "detection",
    "nearer to training rows": "nearer to train",
    "exact copies": "copies",
}


def adult(folder: Path, seed: int) -> tuple[Schema, torch.Tensor, torch.Tensor, str]:
    """Schema, training rows, held-out rows and target."""
    schema = infer_schema(folder / "adult-train.csv.gz")
    train = schema.read(folder / "adult-train.csv.gz").x
    test = schema.read(folder / "adult-test.csv.gz", strip_suffix=".").x
    train, test = (part[~part.isnan().any(1)] for part in (train, test))
    random = np.random.default_rng(seed)
    chosen, held = (torch.from_numpy(random.permutation(len(part))[:ADULT_ROWS]) for part in (train, test))
    return schema, train[chosen], test[held], schema.space.columns[-1].name  # type: ignore[attr-defined]


def german(folder: Path, seed: int) -> tuple[Schema, torch.Tensor, torch.Tensor, str]:
    """The same of German credit."""
    file = next(path for path in sorted(folder.iterdir()) if path.name.startswith("german"))
    frame = pd.read_csv(file, header=None, sep=None, engine="python", keep_default_na=False)
    frame.columns = [f"a{j}" for j in range(1, frame.shape[1])] + ["rating"]
    frame["rating"] = frame["rating"].astype(str)
    schema = infer_schema(frame)
    x = schema.read(frame).x
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    return schema, x[order[:GERMAN_ROWS]], x[order[GERMAN_ROWS:]], "rating"


def ours(
    title: str, schema: Schema, train: torch.Tensor, seed: int, budget: float
) -> tuple[torch.Tensor, dict[str, Any]]:
    """As many sampled rows as there are training rows, and how long that took."""
    model, options = OURS[title]
    options = {"budget": budget} if model == "auto" else options
    clock = [time.process_time()]
    fitted = likely.fit(schema.to_user(train), model, schema=schema, seed=seed, progress=False, **options)
    clock.append(time.process_time())
    drawn = fitted._draw(len(train), None, seed)
    clock.append(time.process_time())
    return drawn, {"fit": clock[1] - clock[0], "sample": clock[2] - clock[1], "model": fitted.record["name"]}


def rival(
    title: str, python: str, schema: Schema, train: torch.Tensor, seed: int
) -> tuple[torch.Tensor, dict[str, Any]]:
    """The same of a model in another environment."""
    columns = schema.space.columns  # type: ignore[attr-defined]
    numeric = [column.name for column in columns if column.numeric]
    script = Path(__file__).with_name("synthetic_rivals.py")
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("train.csv", "sampled.csv")]
        schema.to_user(train).to_csv(files[0], index=False)
        command = [python, str(script), RIVALS[title], *files, json.dumps(numeric)]
        command += ["--rows", str(len(train)), "--seed", str(seed)]
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        sampled = pd.read_csv(files[1], dtype={c.name: str for c in columns if c.coded})
        return schema.read(sampled).x, json.loads(done.stdout.splitlines()[-1])


def row(table: str, title: str, values: dict[str, float], seconds: dict[str, Any]) -> dict[str, Any]:
    """A line of the result; printed too."""
    made = {"table": table, "rows": title, **values, **seconds}
    print(made, flush=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rivals", help="a Python with ctgan")
    parser.add_argument("--budget", type=float, default=50.0, help="seconds for the choice of a model and its fit")
    parser.add_argument("--sets", default="adult,german")
    parser.add_argument("--only", default="", help="titles, separated by semicolons")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ["LIKELY_DATA"]) / "tables"
    titles = [*OURS, *(RIVALS if arguments.rivals else ())]
    titles = [title for title in titles if not arguments.only or title in arguments.only.split(";")]
    rows = []
    for name in arguments.sets.split(","):
        schema, train, held, target = {"adult": adult, "german": german}[name](folder, arguments.seed)
        found: list[Measure] = []
        for title in titles:
            if title in OURS:
                drawn, seconds = ours(title, schema, train, arguments.seed, arguments.budget)
            else:
                drawn, seconds = rival(title, arguments.rivals, schema, train, arguments.seed)
            found = compare_samples(train, held, drawn, schema.space, target=target, seed=arguments.seed)  # type: ignore[arg-type]
            rows.append(row(name, title, {measure.name: measure.value for measure in found}, seconds))
        rows.append(row(name, "held-out real rows", {measure.name: measure.reference for measure in found}, {}))
    result = {
        "rows": rows,
        "budget": arguments.budget,
        "seed": arguments.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared, one thread",
        "versions": {
            "likely": likely.__version__,
            "torch": torch.__version__,
            "ctgan": next((one["version"] for one in rows if "version" in one), None),
        },
    }
    write_record(arguments.out, result, report(result))


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    heads = ["table", "rows", *COLUMNS.values(), "fit, CPU s", "sample, CPU s"]
    lines = [
        "# Synthetic tables",
        "",
        "Efficacy: area under the ROC curve on held-out real rows of a classifier trained on these rows; of the held-out",
        "rows' line, of one trained on the real training rows.  Detection: 1 if they cannot be told from training rows.",
        "",
        "    LIKELY_DATA=… python benchmarks/synthetic.py --rivals /path/to/python",
        "",
        f"| {' | '.join(heads)} |",
        f"|{'---|' * len(heads)}",
    ]
    for one in result["rows"]:
        title = f"{one['rows']} ({one['model']})" if one.get("model", one["rows"]) not in one["rows"] else one["rows"]
        cells = [one["table"], title, *(f"{one[name]:.3f}" for name in COLUMNS)]
        cells += [f"{one[name]:.1f}" if name in one else "" for name in ("fit", "sample")]
        lines.append(f"| {' | '.join(cells)} |")
    about = f"Budget {result['budget']:g} s, seed {result['seed']}; {result['machine']}; {result['versions']}"
    return "\n".join([*lines, "", f"{about}; {result['date']}.", ""])


if __name__ == "__main__":
    main()
