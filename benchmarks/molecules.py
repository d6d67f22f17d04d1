"""Strings of molecules: bits a string that was not seen, and the share of drawn strings that are molecules.

A transformer learns ZINC's SMILES for a stated number of CPU seconds with one thread; the test set is ZINC's own.  Bits
a string include its end.  A string is valid if RDKit parses it to a molecule; it is unique among the valid ones, and
novel if the training set does not have it, both in RDKit's canonical spelling.  Beside it, the n-gram model and the
compressors of ``text.py`` on the same strings, one a line.

    LIKELY_DATA=… python benchmarks/molecules.py --cpu-seconds 300 --out benchmarks/results/molecules

RDKit comes with the extra ``molecules``; without it the strings are drawn and not judged.
"""

from __future__ import annotations

import argparse
import gzip
import os
import platform
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import likely
from kneser_ney import KneserNey
from likely.data import infer_schema
from likely.evaluation import held_out
from likely.models.transformer import Transformer
from likely.training import train
from likely.units import bits
from text import TRAINING as OF_TEXT
from text import compressors, seconds_per_step
from turns import write_record

MODEL: dict[str, Any] = {"width": 128, "layers": 4, "ngrams": (2, 3), "ngram_bits": 12}
TRAINING: dict[str, Any] = {**OF_TEXT, "batch_size": 32, "progress": False}


def strings(path: Path) -> list[str]:
    """The strings of a file, one a line."""
    return gzip.decompress(path.read_bytes()).decode().split()


def judge(drawn: list[str], known: list[str]) -> dict[str, float]:
    """Shares of drawn strings that are valid, of these that are unique, and of those that are novel."""
    try:
        from rdkit import Chem, RDLogger
    except ModuleNotFoundError:
        return {}
    RDLogger.DisableLog("rdApp.*")

    def canonical(text: str) -> str | None:
        molecule = Chem.MolFromSmiles(text) if text else None
        return None if molecule is None else Chem.MolToSmiles(molecule)

    valid = [found for text in drawn if (found := canonical(text)) is not None]
    different, seen = set(valid), {canonical(text) for text in known}
    return {
        "valid": len(valid) / len(drawn),
        "unique": len(different) / max(len(valid), 1),
        "novel": len(different - seen) / max(len(different), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-seconds", type=float, default=300.0, help="of training")
    parser.add_argument("--strings", type=int, default=None, help="only so many training and test strings, for a trial")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ["LIKELY_DATA"]) / "zinc_smiles"
    known, test = (strings(folder / f"{name}.txt.gz")[: arguments.strings] for name in ("valid", "test"))
    schema = infer_schema(known + test)  # the alphabet and the longest length are those of the whole set
    train_set, test_set = schema.read(known), schema.read(test)

    torch.manual_seed(0)
    steps = max(1, round(arguments.cpu_seconds / seconds_per_step(MODEL, TRAINING, train_set)))
    torch.manual_seed(0)
    model, started = Transformer(train_set.space, **MODEL), time.process_time()
    train(model, train_set, None, steps=steps, **TRAINING)
    used = time.process_time() - started

    cost = -bits(held_out(model, test_set).example_nats)
    started = time.process_time()
    with torch.no_grad():
        drawn = schema.to_user(model.sample(arguments.draws, noise=None))
    drawing = time.process_time() - started
    lines = ["\n".join(part).encode() + b"\n" for part in (known, test)]
    ngram = -float(bits(KneserNey(lines[0], 5).log_prob(lines[1], lines[0]).sum())) / len(test)
    rivals = [{"name": "5-gram, Kneser–Ney", "bits": ngram}]
    rivals += [{"name": r["name"], "bits": r["after"] * len(lines[1]) / len(test)} for r in compressors(*lines)]
    ours: dict[str, Any] = {
        "name": "transformer",
        "bits": float(cost.mean()),
        "standard_error": float(cost.std()) / len(cost) ** 0.5,
        "steps": steps,
        "train_cpu_seconds": used,
        "draws": arguments.draws,
        "draw_cpu_seconds": drawing,
        "parameters": sum(p.numel() for p in model.parameters()),
        **judge(drawn, known),
    }
    table = [
        f"# ZINC strings: {len(known):,} to learn from, {len(test):,} to test",
        "",
        "| | bits a string, given the training strings |",
        "|---|---|",
        *(f"| {row['name']} | {row['bits']:.1f} |" for row in rivals),
        f"| transformer | {ours['bits']:.1f} ± {ours['standard_error']:.1f} |",
        "",
        f"The transformer was trained for {steps:,} steps, {used:,.0f} CPU s with one thread.  Of {arguments.draws:,} "
        f"strings, drawn in {drawing:.1f} CPU s: "
        + (f"{ours['valid']:.1%} valid, {ours['unique']:.1%} of these unique, {ours['novel']:.1%} of those novel."
           if "valid" in ours else "not judged, RDKit is not installed."),
    ]  # fmt: skip
    print("\n".join(table))
    if arguments.out is not None:
        about = {
            "command": shlex.join(["python", "benchmarks/molecules.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"likely": likely.__version__, "torch": torch.__version__, "python": platform.python_version()},
            "model": MODEL,
            "training": TRAINING,
        }
        content = {**about, "rivals": rivals, "transformer": ours, "examples": drawn[:20]}
        foot = ["", f"`{about['command']}`: {about['machine']}, {about['date']}.  Versions: {about['versions']}.", ""]
        write_record(arguments.out, content, "\n".join(table + foot))


if __name__ == "__main__":
    main()
