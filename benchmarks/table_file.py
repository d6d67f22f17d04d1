"""Adult (UCI): the size of the test rows as a real file, by a model of the training rows, decoded as it is written.

LIKELY_DATA=… python benchmarks/table_file.py [--options '{"orders": 1}']
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import likely
from turns import write_record

RESULTS = Path(__file__).parent / "results" / "table_file"
#: The test file has a full stop after every label.
TEST = {"strip_suffix": "."}
OPTIONS: dict[str, Any] = {
    "orders": 2,
    "dropout": 0.2,
    "steps": 2000,
    "batch_size": 256,
    "learning_rate": 2e-3,
    "evaluate_every": 500,
}
#: What the bytes of a file are for.
PARTS = ("coded", "plain", "holes", "side", "head", "model", "frame")
#: Bits a row of all 48,842 rows, measured before: what users have.
OTHERS = {"gzip": 97.0, "xz": 70.0, "Parquet + zstd-19": 65.9, "bz2": 57.0, "sum of the columns' entropies": 43.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", type=json.loads, default=OPTIONS, help="of the model and its training, as JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry-run", action="store_true", help="few steps; nothing is written")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ["LIKELY_DATA"]) / "tables"
    train, test = folder / "adult-train.csv.gz", folder / "adult-test.csv.gz"
    options = {**arguments.options, **({"steps": 2} if arguments.dry_run else {})}
    cpu = time.process_time()
    fitted = likely.fit(train, "made", seed=arguments.seed, progress=False, **options)
    fit_seconds = time.process_time() - cpu
    evaluation = fitted.evaluate(test, read=TEST)
    print(evaluation, f"{fit_seconds:.0f} CPU s", flush=True)
    rows = evaluation.held_out.n
    sizes = {}
    with tempfile.TemporaryDirectory() as place:
        for name, embed in (("beside the model", False), ("with the model in it", True)):
            path, cpu = Path(place) / "adult.lk", time.process_time()
            account = fitted.compress(test, path, embed=embed, verify=not embed, workers=1, read=TEST).to_json()
            sizes[name] = {
                "account": {part: value for part, value in account.items() if part in PARTS},
                "promised_bits_per_row": account["coded_bits"] / rows,
                "bytes": path.stat().st_size,
                "bits_per_row": 8.0 * path.stat().st_size / rows,
                "cpu_seconds": round(time.process_time() - cpu, 1),
            }
            print(name, sizes[name], flush=True)
            path.unlink()
    if arguments.dry_run:
        return
    result = {
        "rows": rows,
        "code_length": [{"name": r.name, "bits_per_row": r.bits, "kind": r.says} for r in evaluation.rows()],
        "files": sizes,
        "others": OTHERS,
        "fit_cpu_seconds": round(fit_seconds),
        "options": options,
        "seed": arguments.seed,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, shared, one thread",
        "versions": {"likely": likely.__version__, "torch": torch.__version__},
    }
    write_record(arguments.out, result, report(result))


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# Adult as a file",
        "",
        f"{result['rows']:,} rows of the test file; the model of the training file took {result['fit_cpu_seconds']} CPU s.",
        "",
        "| | bits/row | bytes | CPU s |",
        "|---|---|---|---|",
    ]
    for name, size in result["files"].items():
        lines.append(f"| file {name} | {size['bits_per_row']:.2f} | {size['bytes']:,} | {size['cpu_seconds']:g} |")
    lines += [f"| {name} (all rows) | {bits} | | |" for name, bits in result["others"].items()]
    lines += ["", f"| of the file | promised, bits/row | {' | '.join(f'{part}, bytes' for part in PARTS)} |"]
    lines += [f"|{'---|' * (len(PARTS) + 2)}"]
    for name, size in result["files"].items():
        bytes_of = " | ".join(f"{size['account'][part]:,}" for part in PARTS)
        lines.append(f"| {name} | {size['promised_bits_per_row']:.2f} | {bytes_of} |")
    about = f"Options {result['options']}, seed {result['seed']}; {result['machine']}; {result['versions']}"
    return "\n".join([*lines, "", f"{about}; {result['date']}.", ""])


if __name__ == "__main__":
    main()
