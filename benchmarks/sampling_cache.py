"""What the cache of keys and values saves in drawing from a transformer: CPU seconds with it and without.

Without a cache every symbol costs a pass over all symbols before it.  Both ways compute the same laws, so they draw the
same sequences from the same noise; that is checked, in float64.  They take turns; the ratio is the median of the rounds.

    python benchmarks/sampling_cache.py --out benchmarks/results/sampling_cache
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

import likely
from likely.contract import Tokens
from likely.models.transformer import Transformer
from likely.noise import KeyedNoise
from turns import machine, versions, write_record


def with_cache(model: Transformer, n: int) -> Tensor:
    """Samples, as the model draws them."""
    return model.sample(n, noise=KeyedNoise(0, torch.arange(n))).long()


def without_cache(model: Transformer, n: int) -> Tensor:
    """The same, each from a pass over all before it."""
    noise, length = KeyedNoise(0, torch.arange(n)), model.space.dims
    x = torch.zeros(n, length, dtype=torch.int64)
    with torch.inference_mode():
        for t in range(length):
            h = model._hidden(x[:, : t + 1], None)[:, t]
            x[:, t] = model.cells.law(h, t).sample(noise)[:, 0].long()
    return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--samples", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    length = arguments.length
    model = Transformer(Tokens(length, 257), width=arguments.width, layers=arguments.layers).eval()
    for block in model.layers.blocks:
        torch.nn.init.normal_(block.attention.output.weight, std=0.1)
    precise = Transformer(Tokens(length, 257), width=32, layers=2).double().eval()
    assert torch.equal(with_cache(precise, 2), without_cache(precise, 2))
    rows = []
    for n in arguments.samples:
        seconds: dict[str, list[float]] = {"with": [], "without": []}
        for _ in range(arguments.rounds):
            for name, draw in (("with", with_cache), ("without", without_cache)):
                started = time.process_time()
                draw(model, n)
                seconds[name].append(time.process_time() - started)
        ratio = statistics.median(b / a for a, b in zip(seconds["with"], seconds["without"]))
        rows.append({"samples": n, "ratio": ratio, **{key: statistics.median(s) for key, s in seconds.items()}})
    lines = [
        f"# Drawing {length} symbols with a cache of keys and values",
        "",
        f"A transformer of width {arguments.width} and {arguments.layers} layers, one thread; medians of "
        f"{arguments.rounds} rounds, CPU seconds.",
        "",
        "| samples side by side | with the cache | without | ratio |",
        "|---|---|---|---|",
        *(f"| {r['samples']} | {r['with']:.2f} | {r['without']:.2f} | {r['ratio']:.1f} |" for r in rows),
    ]
    print("\n".join(lines))
    if arguments.out is not None:
        about = {
            "command": shlex.join(["python", "benchmarks/sampling_cache.py", *sys.argv[1:]]),
            "machine": machine(),
            "versions": {"likely": likely.__version__, **versions()},
            "date": datetime.now(UTC).date().isoformat(),
        }
        where, numbers = about["machine"], ", ".join(f"{name} {version}" for name, version in about["versions"].items())
        said = f"`{about['command']}`: {where['processor']}, {where['cores']} cores, load {where['load']}, {about['date']}; {numbers}."
        foot = ["", said, ""]
        write_record(arguments.out, {**about, "rows": rows}, "\n".join(lines + foot))


if __name__ == "__main__":
    main()
