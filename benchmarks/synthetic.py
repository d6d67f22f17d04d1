"""Synthetic tables: Adult and German credit, our samples beside columns drawn independently and held-out real rows.

Rows with a missing cell are left out; 7,411 rows of Adult's training file (drawn with the seed) are trained on and as
many of its test file held out, of German credit 800 and 200.  The measures are those of likely.evaluation.synthetic;
"efficacy" is of income and of the credit rating.  CPU seconds are of one thread, fit and sampling together.

    LIKELY_DATA=… python benchmarks/synthetic.py [--budget 50] [--seed 0]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import likely
from likely.data import Schema, infer_schema
from likely.evaluation.synthetic import compare_samples

RESULTS = Path(__file__).parent / "results" / "synthetic"
ADULT_ROWS, GERMAN_ROWS = 7_411, 800


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
    frame = pd.read_csv(file, header=None, sep=None, engine="python")
    frame.columns = [f"a{j}" for j in range(1, frame.shape[1])] + ["rating"]
    frame["rating"] = frame["rating"].astype(str)
    schema = infer_schema(frame)
    x = schema.read(frame).x
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(x)))
    return schema, x[order[:GERMAN_ROWS]], x[order[GERMAN_ROWS:]], "rating"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=50.0, help="seconds for the choice of a model and its fit")
    parser.add_argument("--model", default="auto")
    parser.add_argument("--sets", default="adult,german")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ["LIKELY_DATA"]) / "tables"
    records, lines = [], ["| table | rows | measure | value | held-out real |", "|---|---|---|---|---|"]
    for name in arguments.sets.split(","):
        schema, train, held, target = {"adult": adult, "german": german}[name](folder, arguments.seed)
        frame = schema.to_user(train)
        for title, model, options in (
            ("likely", arguments.model, {"budget": arguments.budget}),
            ("independent columns", "independent", {}),
        ):
            began = time.process_time()
            fitted = likely.fit(frame, model, schema=schema, seed=arguments.seed, progress=False, **options)
            drawn = fitted._draw(len(train), None, arguments.seed)
            cpu = time.process_time() - began
            label = f"{title} ({fitted.record['name']})"
            for measure in compare_samples(train, held, drawn, schema.space, target=target, seed=arguments.seed):  # type: ignore[arg-type]
                records.append({"table": name, "rows": label, "cpu": cpu, **measure.to_json()})
                lines.append(f"| {name} | {label} | {measure.name} | {measure.value:.3f} | {measure.reference:.3f} |")
            lines.append(f"| {name} | {label} | CPU s | {cpu:.0f} | |")
    text = "\n".join(lines)
    print(text)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    about = f"Protocol and command: benchmarks/synthetic.py; {datetime.now(UTC).date()}."
    arguments.out.with_suffix(".md").write_text(f"# Synthetic tables\n\n{about}\n\n{text}\n", encoding="utf-8")
    arguments.out.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
