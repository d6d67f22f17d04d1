"""One file, decoded anywhere: other threads, batches, instruction sets, libraries, versions, processors.

    python benchmarks/anywhere.py --out benchmarks/results/anywhere \\
        --python "torch 2.11.0, numpy 1.26.4=/path/to/bin/python" \\
        --python "aarch64=env PYTHONPATH=/packages qemu-aarch64-static -L /root /root/usr/bin/python3.11"

The golden files of every model with a codec, written once and for ever with the model in the file (``tests/golden``),
and a larger one that is written here are decoded in a process of its own for every setting
(``tests/decode_elsewhere.py``).  *Back* means that the bytes of the original came back.  Also compared, for the vaes,
are all numbers that posterior and decoder give for 1000 fixed inputs, with those that they give here.  The control are
files of the models that have a network, written and read with it in plain float32, all else being equal.
``--python NAME=COMMAND`` adds an interpreter with torch, numpy and safetensors.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import archive_cases
import decode_elsewhere
from likely.exact import Irreproducible
from turns import machine, versions, write_record

ROOT = Path(__file__).parent.parent
WRITTEN = "as written"
GOLDEN = ROOT / "tests" / "golden"
WITHOUT_NETWORK = ("independent", "gaussian", "mixture")


def digits() -> bytes:
    """The 1797 digits of scikit-learn, 8 x 8 pixels of 17 levels."""
    from sklearn.datasets import load_digits

    return archive_cases.npy(load_digits().data.astype(np.uint8))


#: Layers of a usual width, and more rows than any batch that is tried.
DIGITS = archive_cases.Case(
    "digits.npy", digits, "vae", {"latent_dim": 16, "hidden": (256, 256)}, {"levels": 17}, steps=30
)
AVX512 = [f"AVX512_CORE{more}" for more in ("", "_VNNI", "_BF16", "_FP16", "_AMX")]
#: Settings that a process gets from its environment.
ENVIRONMENTS: dict[str, dict[str, list[str]]] = {
    "ONEDNN_MAX_CPU_ISA": {"x86_64": ["SSE41", "AVX", "AVX2", "AVX2_VNNI", *AVX512]},
    "ATEN_CPU_CAPABILITY": {"x86_64": ["default", "avx2", "avx512"]},
    "MKL_CBWR": {"x86_64": ["COMPATIBLE", "SSE4_2", "AVX2", "AVX512"]},
    "MKL_ENABLE_INSTRUCTIONS": {"x86_64": ["SSE4_2", "AVX2"]},
    "OPENBLAS_CORETYPE": {"x86_64": ["Nehalem", "Haswell", "SkylakeX"]},
    "NPY_DISABLE_CPU_FEATURES": {
        "x86_64": ["AVX512F AVX512CD AVX512_SKX AVX512_CLX AVX512_CNL AVX512_ICL AVX512_SPR", "AVX2 FMA3"]
    },
}


def settings(pythons: list[str]) -> Iterator[tuple[str, list[str], dict[str, str], list[str]]]:
    """Name, interpreter, environment and settings inside the process, of every process."""
    yield "", [sys.executable], {}, list(decode_elsewhere.SETTINGS)
    for variable, values in ENVIRONMENTS.items():
        for value in values.get(os.uname().machine, []):
            said = f"{variable}={value.split()[0]}" + (" and later" if value.startswith("AVX512F") else "")
            yield said, [sys.executable], {variable: value}, ["plain"]
    for given in pythons:
        name, _, command = given.partition("=")
        yield name, shlex.split(command), {}, ["plain"]


def write(folder: Path) -> dict[str, str]:
    """All files, and what the networks give; digests of the originals by name, or why a control was not written."""
    manifest = json.loads((GOLDEN / "manifest.json").read_text())
    digests = {}
    for name, case in {**archive_cases.CASES, "vae-digits": DIGITS}.items():
        for native in (False, True):
            if native and case.model in WITHOUT_NETWORK:
                continue
            file = f"{name}.float" if native else name
            golden = GOLDEN / f"{name}-1.0.lk"
            with tempfile.TemporaryDirectory() as data, decode_elsewhere.setting("plain", native):
                if golden.exists() and not native:
                    content, digests[file] = golden.read_bytes(), manifest[golden.stem]["content"]
                else:
                    try:
                        made = archive_cases.make(case, Path(data))
                    except Irreproducible:  # decoding it for a check, with other batches, gave something else
                        digests[file] = "not written"
                        continue
                    content, digests[file] = made.embedded, archive_cases.digest(made.original)
                (folder / f"{file}.lk").write_bytes(content)
                numbers = decode_elsewhere.outputs(content, 1000)
                if numbers is not None:
                    np.savez(folder / f"{file}.npz", outputs=numbers)
    return digests


def run(folder: Path, pythons: list[str], known: Collection[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Setting and findings, one after another, of those that are not known."""
    for name, command, environment, inside in settings(pythons):
        if (name or WRITTEN) in known:
            continue
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        own = [part.partition("=")[2] for part in command if part.startswith("PYTHONPATH=")]
        command = [part if not part.startswith("PYTHONPATH=") else f"{part}{os.pathsep}{path}" for part in command]
        start = time.perf_counter()
        done = subprocess.run(
            [*command, str(ROOT / "tests" / "decode_elsewhere.py"), str(folder), *inside],
            capture_output=True,
            text=True,
            env={**os.environ, **environment, **({} if own else {"PYTHONPATH": path}), "OMP_NUM_THREADS": "2"},
        )
        seconds = time.perf_counter() - start
        try:
            found = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            print(f"{name}: {done.stderr[-500:]}", file=sys.stderr)
            yield name, {"failed": done.stderr.splitlines()[-1:]}
            continue
        versions = {key: found.pop(key) for key in ("machine", "torch", "numpy", "python")}
        for setting, findings in found.items():
            both = ", ".join(part for part in (name, setting) if part not in ("", "plain"))
            yield both or WRITTEN, {**versions, "seconds": seconds, "findings": findings}
            print(both or WRITTEN, f"{seconds:.0f} s", file=sys.stderr)


def summary(findings: dict[str, Any], digests: dict[str, str], native: bool) -> tuple[str, str, str]:
    """How many files came back, which did not, and the share of outputs that are other numbers."""
    names = [name for name, said in digests.items() if name.endswith(".float") == native and said != "not written"]
    lost = [f"{name.removesuffix('.float')} ({findings[name]})" for name in names if findings[name] != digests[name]]
    lost = [line if len(line) < 60 else f"{line.split()[0]} (OTHER BYTES)" for line in lost]
    shares = [findings[f"{name} outputs"] for name in names if f"{name} outputs" in findings]
    return (
        f"{len(names) - len(lost)} of {len(names)}",
        ", ".join(lost),
        f"{100 * max(shares):.1f} %" if any(shares) else "0",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], help="NAME=COMMAND of a further interpreter")
    parser.add_argument("--out", type=Path, help="path of the results, without suffix")
    parser.add_argument("--extend", action="store_true", help="keep the settings of the record that is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[str, Any] = {}
    if options.extend:
        rows = json.loads(options.out.with_suffix(".json").read_text(encoding="utf-8"))["settings"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        digests = write(folder)
        sizes = {file.stem: file.stat().st_size for file in sorted(folder.glob("*.lk"))}
        for setting, found in run(folder, options.python, tuple(rows)):
            rows[setting] = found
            report(options, rows, digests, sizes)


def report(options: argparse.Namespace, rows: dict[str, Any], digests: dict[str, str], sizes: dict[str, int]) -> None:
    """Write the record and the table."""
    lines = [
        "| setting | exact: files back | other outputs | float32: files back | other outputs | lost in float32 |",
        "|---|---|---|---|---|---|",
    ]
    for setting, row in rows.items():
        if "findings" not in row:
            lines.append(f"| {setting} | did not run | | | | |")
            continue
        back, lost, other = summary(row["findings"], digests, False)
        back_float, lost_float, other_float = summary(row["findings"], digests, True)
        back = back + (f": {lost}" if lost else "")
        lines.append(f"| {setting} | {back} | {other} | {back_float} | {other_float} | {lost_float} |")
    interpreters = " ".join(f'--python "{given.partition("=")[0]}=…"' for given in options.python)
    command = f"python benchmarks/anywhere.py {interpreters}".strip()
    missing = [name.removesuffix(".float") for name, said in digests.items() if said == "not written"]
    record = {
        "command": command,
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "files": {name: {"bytes": sizes.get(name), "original": digests[name]} for name in digests},
        "settings": rows,
    }
    text = [
        "# Decoded anywhere",
        "",
        "*Files back*: how many decode to the bytes of the original.  *Other outputs*: the largest share, over the "
        "vaes, of the numbers of posterior and decoder that are not, to the bit, those of the writing process.",
        "",
        *lines,
        "",
        f"Files: {', '.join(f'{name} {size:,} B' for name, size in sizes.items() if not name.endswith('.float'))}."
        + (
            f"  In float32 not even written, for it did not decode in other batches: {', '.join(missing)}."
            if missing
            else ""
        ),
        "",
        f"`{command}`; {record['machine']}; {record['versions']}; {record['date']}.",
        "",
    ]
    if options.out is None:
        print("\n".join(lines))
        return
    write_record(options.out, record, "\n".join(text))


if __name__ == "__main__":
    main()
