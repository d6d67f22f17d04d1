"""Hostile files: mutants of the golden ``.lk`` files of every family, decoded under limits of memory and time.

    python benchmarks/fuzz.py --count 100000 --out benchmarks/results/fuzz

Half of the mutants are made of the bytes, half of the structure with all checksums made anew (see
``tests/fuzz_container.py``).  Each is decoded in this process, by the model in it or by a given one.  Every outcome
must be an error with a name or the exact original: never another output, another exception, more memory than the limit
or more than a minute.  The table is written anew after every part, so that what was done is on record if the run ends
early.
"""

from __future__ import annotations

import argparse
import functools
import sys
import tempfile
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import archive_cases
import fuzz_container
from turns import machine, versions, write_record

MEMORY, SECONDS, PART = 256 << 20, 60.0, 100
#: Of each hundred mutants; files that decode quickly get more.
SHARES = {
    "independent-table": 22,
    "gaussian-table": 22,
    "mixture-table": 22,
    "vae-counts": 5,
    "vae-tokens": 4,
    "independent-counts": 4,
    "mixture-binary": 3,
    "vae-table": 3,
    "made-table": 3,
    "vae-binary": 2,
    "made-any": 2,
    "transformer-tokens": 2,
    "transformer-table": 2,
    "masked-tokens": 2,
    "vae-image": 1,
    "pixelcnn-image": 1,
}
#: Steps from part to part through the hundred, so that a run that ends early has had something of every file.
STRIDE = 61


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="mutants in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="path of the results, without suffix")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        made = {name: archive_cases.golden(name, Path(folder)) for name in SHARES}
    outcomes: Counter[tuple[str, str]] = Counter()
    by_file: Counter[str] = Counter()
    faults: list[str] = []
    turns = [name for name, share in SHARES.items() for _ in range(share)]
    for number in range(-(-options.count // PART)):
        name = turns[number * STRIDE % len(turns)]
        case = made[name]
        embedded = number % 3 != 2
        data = case.embedded if embedded else case.bare
        decode = archive_cases.decode
        if not embedded:
            decode = functools.partial(decode, model=case.model, schema=case.schema)
        seed = options.seed + number
        count = min(PART, options.count - number * PART)
        found, wrong = fuzz_container.fuzz(data, decode, count, seed=seed, memory=MEMORY, seconds=SECONDS)
        outcomes += found
        by_file[name] += count
        faults += [f"{name}, {'its own' if embedded else 'a given'} model, {line}" for line in wrong]
        report(options, outcomes, by_file, faults)
    print(fuzz_container.table(outcomes))
    print("\n".join(faults))


def report(
    options: argparse.Namespace, outcomes: Counter[tuple[str, str]], by_file: Counter[str], faults: list[str]
) -> None:
    """Write the record and the table."""
    if options.out is None:
        return
    total = sum(outcomes.values())
    command = f"python benchmarks/fuzz.py --count {options.count} --seed {options.seed}"
    record = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "mutants": total,
        "files": dict(sorted(by_file.items())),
        "outcomes": {f"{done}: {outcome}": n for (done, outcome), n in sorted(outcomes.items())},
        "faults": faults,
    }
    files = ", ".join(f"{name} {count:,}" for name, count in sorted(by_file.items()))
    text = [
        "# Hostile files",
        "",
        f"{total:,} mutants, {len(faults)} that ended in anything but a named error or the exact original.",
        "",
        f"Files: {files}.  Two thirds were decoded by the model in them, one third by a model that was given.  At most "
        f"{MEMORY >> 20} MiB beyond what the process had, and {SECONDS:.0f} s, for one mutant.",
        "",
        "```text",
        fuzz_container.table(outcomes),
        "```",
        "",
        *[f"* {line}" for line in faults[:50]],
        f"`{command}`; {record['machine']}; {record['versions']}; {record['date']}.",
        "",
    ]
    write_record(options.out, record, "\n".join(text))


if __name__ == "__main__":
    main()
