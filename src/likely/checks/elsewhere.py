"""Another process that decodes: with other threads and other instructions of the processor.

It reads names of folders, one a line, and writes ``decoded.safetensors`` there.  A folder holds ``job.json`` (the
model's description and the arguments of its codec), ``model.safetensors``, ``coded.bin`` and ``given.safetensors`` (the
condition and which cells are present, where there are any).
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from likely import models
from likely.checks.outcome import require
from likely.coding.bits_back import decode_rows
from likely.contract import Model

#: Environment of the other process: two threads, and kernels for any processor of the kind.
OTHER = {"OMP_NUM_THREADS": "2", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}


def decode_elsewhere(
    model: Model, data: bytes, n: int, condition: Tensor | None, present: Tensor | None, **arguments: Any
) -> Tensor:
    """The rows that another process decodes from ``data`` with a copy of the model built from its saved form.

    Args:
        n: number of rows.
        arguments: of :meth:`likely.contract.Model.codec`.

    Raises:
        CheckFailed: it could not; the message is its error.
    """
    given = {name: value for name, value in (("condition", condition), ("present", present)) if value is not None}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        job = {"model": models.describe(model), "codec": arguments, "n": n}
        (path / "job.json").write_text(json.dumps(job), encoding="utf-8")
        (path / "coded.bin").write_bytes(data)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path / "model.safetensors")
        save_file({name: value.contiguous() for name, value in given.items()}, path / "given.safetensors")
        process = _other_process()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(f"{folder}\n")
        process.stdin.flush()
        said = process.stdout.readline().strip()
        require(said == "decoded", f"another process could not decode: {said or 'it died'}")
        return load_file(path / "decoded.safetensors")["x"]


@functools.cache
def _other_process() -> subprocess.Popen[str]:
    """One for all checks: it takes seconds to start."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from likely.checks.elsewhere import main; main()"],
        env={**os.environ, **OTHER},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)  # closes its input, at which it ends
    return process


def _decode(path: Path) -> None:
    job = json.loads((path / "job.json").read_text(encoding="utf-8"))
    model = models.build(job["model"]).eval()
    model.load_state_dict(load_file(path / "model.safetensors"))
    given = load_file(path / "given.safetensors")
    present = given["present"].numpy() if "present" in given else None
    data = (path / "coded.bin").read_bytes()
    x = decode_rows(model.codec(**job["codec"]), data, job["n"], given.get("condition"), present)
    save_file({"x": x.contiguous()}, path / "decoded.safetensors")


def main() -> None:
    """Decode one folder after another until the input ends."""
    torch.manual_seed(1)
    for line in sys.stdin:
        try:
            _decode(Path(line.strip()))
            print("decoded", flush=True)
        except Exception as error:
            print(f"{type(error).__name__}: {error}".replace("\n", " "), flush=True)
