"""Bits a byte of a text that was not seen: the transformer beside general compressors and an n-gram model.

The last tenth of tiny-shakespeare is held out.  All rivals have the rest: the transformer and the n-gram model are
fitted to it; a compressor is given it before the held-out part (what the whole takes more than the rest alone), and is
also shown without it.  The transformer is trained for a stated number of CPU seconds with one thread, on windows that
begin anywhere in the last 95 % of its part; the first 5 %, which are farthest from the held-out text (the play that it
begins with is in the last 5 %), choose the weights to keep.  The numbers:

    chunks     every 256 bytes alone, as `likely compress` codes them
    running    every byte given at least 192 bytes before it (evaluation.sequences.running_nats, stride 64)
    file       bytes that the codec writes for the chunks, the model not included

    LIKELY_DATA=… python benchmarks/text.py --cpu-seconds 900 --run DIR --out benchmarks/results/text

A run that was stopped goes on where it was; a finished one is evaluated again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
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
from likely.coding.bits_back import Schedule, encode_rows
from likely.contract import Tokens
from likely.data import Dataset
from likely.evaluation.sequences import running_nats
from likely.models.transformer import Transformer
from likely.training import load_weights, train
from likely.units import bits
from turns import write_record

LENGTH, STRIDE = 256, 64
MODEL: dict[str, Any] = {"width": 128, "layers": 4, "dropout": 0.1, "ngrams": (2, 3, 4), "ngram_bits": 15}
TRAINING: dict[str, Any] = {
    "batch_size": 16,
    "learning_rate": 1e-2,
    "warmup": 50,
    "decay": "cosine",
    "clip_norm": 1.0,
    "precision": "bfloat16",
    "optimizer": "muon",
    "optimizer_options": {"betas": (0.9, 0.98)},
    "weight_decay": 0.01,
    "average_fraction": 0.02,
    "patience": None,
}


def windows(text: bytes, step: int) -> Dataset:
    """Windows of a text that begin ``step`` bytes apart, without a copy of it for each."""
    codes = torch.tensor(list(text), dtype=torch.int16)
    return Dataset(Tokens(LENGTH, 257), codes.unfold(0, LENGTH, step))


def seconds_per_step(model: dict[str, Any], training: dict[str, Any], data: Dataset) -> float:
    """CPU seconds of a training step, from two short runs after one that warms up."""
    used = []
    for steps in (2, 4, 20):
        started = time.process_time()
        train(Transformer(data.space, **model), data, None, **{**training, "steps": steps, "progress": False})
        used.append(time.process_time() - started)
    return (used[2] - used[1]) / 16


def compressors(train_text: bytes, test: bytes) -> list[dict[str, Any]]:
    """Bytes that general compressors need for the held-out text, alone and after the rest."""
    import zstandard

    def xz(data: bytes) -> int:
        return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))

    rows = [{"name": "xz -9e", "alone": xz(test), "after": xz(train_text + test) - xz(train_text)}]
    for level, name in ((19, "zstd -19"), (22, "zstd --ultra -22")):
        wide = zstandard.ZstdCompressionParameters.from_level(level, window_log=24)

        def zstd(data: bytes, wide: Any = wide) -> int:
            return len(zstandard.ZstdCompressor(compression_params=wide).compress(data))

        rows.append({"name": name, "alone": zstd(test), "after": zstd(train_text + test) - zstd(train_text)})
    return [{"name": row["name"], **{key: 8 * row[key] / len(test) for key in ("alone", "after")}} for row in rows]


def ngrams(train_text: bytes, test: bytes) -> list[dict[str, Any]]:
    """Bits a byte of n-gram models with Kneser–Ney smoothing."""
    rows = []
    for order in (3, 5, 7):
        started = time.process_time()
        nats = KneserNey(train_text, order).log_prob(test, train_text)
        cost = -float(bits(nats.sum())) / len(test)
        rows.append({"name": f"{order}-gram, Kneser–Ney", "after": cost, "cpu_seconds": time.process_time() - started})
    return rows


def transformer(train_text: bytes, test: bytes, seconds: float, run: Path | None) -> dict[str, Any]:
    """Train, or load what was trained, and measure."""
    cut = round(0.05 * len(train_text))
    train_set, valid_set = windows(train_text[cut:], 16), windows(train_text[:cut], LENGTH)
    torch.manual_seed(0)
    model = Transformer(train_set.space, **MODEL)
    facts = None if run is None else run / "facts.json"
    if run is not None and facts is not None and facts.exists():
        found = json.loads(facts.read_text())
        load_weights(model, run / "model.safetensors")
    else:
        plan = None if run is None else run.with_suffix(".steps")
        if plan is not None and plan.exists():
            steps = int(plan.read_text())
        else:
            pace = seconds_per_step(MODEL, TRAINING, train_set)
            steps = max(1, round(0.93 * seconds / pace))  # the rest is for evaluations on the way
            if plan is not None:
                plan.parent.mkdir(parents=True, exist_ok=True)
                plan.write_text(str(steps))
        started = time.process_time()
        result = train(
            model, train_set, valid_set, steps=steps, evaluate_every=max(1, steps // 8), run=run,
            resume=run is not None and run.exists(), log_every=50, **TRAINING,
        )  # fmt: skip
        found = {
            "steps": steps,
            "best_step": (result.valid or {}).get("step"),
            "cpu_seconds": time.process_time() - started,
        }
        if facts is not None:
            facts.write_text(json.dumps(found))
    model.eval()
    codes = torch.tensor(list(test), dtype=torch.int64)
    chunks = codes[: len(codes) // LENGTH * LENGTH].reshape(-1, LENGTH)
    with torch.no_grad():
        alone = -float(bits(model.bound(chunks).nats.double().sum())) / chunks.numel()
    running = -float(bits(running_nats(model, codes, STRIDE).sum())) / len(codes)
    started = time.process_time()
    payload = encode_rows(model.codec(), chunks, schedule=Schedule(lanes=8, opening=64, batch_log2=9, growth=255))
    return {
        "name": "transformer",
        "parameters": sum(p.numel() for p in model.parameters()),
        **found,
        "alone": alone,
        "running": running,
        "file": 8 * len(payload.data) / chunks.numel(),
        "encode_cpu_seconds": time.process_time() - started,
        "model": MODEL,
        "training": TRAINING,
    }


def table(rows: list[dict[str, Any]]) -> list[str]:
    """The table of results."""

    def shown(row: dict[str, Any], key: str) -> str:
        return f"{row[key]:.3f}" if key in row else ""

    lines = [
        "# Tiny Shakespeare, held-out last tenth: bits a byte",
        "",
        "| | given the training text | held-out text alone, or in chunks of 256 bytes | real file of the chunks | CPU s |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        given = shown(row, "running") or shown(row, "after")
        seconds = f"{row['cpu_seconds']:,.1f}" if "cpu_seconds" in row else ""
        lines.append(f"| {row['name']} | {given} | {shown(row, 'alone')} | {shown(row, 'file')} | {seconds} |")
    ours = rows[-1]
    lines += [
        "",
        f"The transformer has {ours['parameters']:,} parameters and was trained for {ours['steps']:,} steps with one thread.",
        "With training text each of its bytes is given at least 192 bytes before it, of the held-out text alone.",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-seconds", type=float, default=900.0, help="of training")
    parser.add_argument("--bytes", type=int, default=None, help="only so many bytes of the text, for a trial")
    parser.add_argument("--run", type=Path, default=None, help="folder of the run, to resume it")
    parser.add_argument("--out", type=Path, default=None, help="where to write the table and its record")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = Path(os.environ["LIKELY_DATA"]) / "text" / "tiny_shakespeare.txt.gz"
    text = gzip.decompress(path.read_bytes())[: arguments.bytes]
    cut = len(text) * 9 // 10
    train_text, test = text[:cut], text[cut:]
    rows = [*compressors(train_text, test), *ngrams(train_text, test)]
    rows.append(transformer(train_text, test, arguments.cpu_seconds, arguments.run))
    lines = table(rows)
    print("\n".join(lines))
    if arguments.out is not None:
        about = {
            "command": shlex.join(["python", "benchmarks/text.py", *sys.argv[1:]]),
            "date": datetime.now(UTC).date().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "versions": {"likely": likely.__version__, "torch": torch.__version__, "python": platform.python_version()},
        }
        foot = ["", f"`{about['command']}`: {about['machine']}, {about['date']}.  Versions: {about['versions']}.", ""]
        write_record(arguments.out, {**about, "rows": rows}, "\n".join(lines + foot))


if __name__ == "__main__":
    main()
