"""Decodes ``.lk`` files in a process of its own, on whatever machine, and evaluates their networks.

    python tests/decode_elsewhere.py FOLDER [SETTING …]

In the folder lie ``NAME.lk``, with the model in the file; for some names ``NAME.float.lk``, the control, written with
networks in plain float32; and ``NAME.npz``, what the networks gave where the files were written.  A setting is what can
be changed inside a process: a number of threads, of rows that a network gets at once, less precision.  Printed is a
JSON object: ``{setting: {file: digest of what came back, or the error, "file outputs": share of other numbers}}``.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import archive_cases
import likely.coding.sequential
import likely.exact
from likely.archive import Archive
from likely.contract import Model
from likely.exact.products import BatchedProduct, Product
from likely.models.vae import VAE

#: Names of the settings.
SETTINGS = ("plain", "2 threads", "batch 1", "batch 64", "batch 1000", "reduced precision", "subnormals flushed")


_LAYERS = (Product, BatchedProduct, nn.Linear, nn.Conv2d, nn.ConvTranspose2d)


class Native:
    """Stands in for an exact network: the module itself, in float32."""

    def __init__(self, module: nn.Module, *_: Any, **__: Any) -> None:
        self.module, self.device = copy.deepcopy(module).eval(), torch.device("cpu")
        self.routes: dict[str, str] = {}

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)

    def probe(self) -> bytes:
        return bytes(8)

    def reroute(self) -> None:
        """There is one route."""


def split(network: nn.Module, batch: int) -> None:
    """Let every layer of a network get some rows at a time from now on."""
    for layer in network.modules():
        if isinstance(layer, _LAYERS):
            layer.forward = functools.partial(_by_rows, layer.forward, batch)  # type: ignore[method-assign]


def _by_rows(forward: Callable[..., Tensor], batch: int, *factors: Tensor) -> Tensor:
    return torch.cat([forward(*part) for part in zip(*(factor.split(batch) for factor in factors))])


@contextlib.contextmanager
def setting(name: str, native: bool) -> Iterator[None]:
    """Within the context networks are made and run as the setting says."""
    make = Native if native else likely.exact.network
    batch = int(name.split()[1]) if name.startswith("batch") else None

    def network(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        made = make(module, *args, **kwargs)
        if batch is not None:
            split(made.module, batch)
        return made

    threads = torch.get_num_threads()
    with contextlib.ExitStack() as stack:
        for module in (likely.exact, likely.coding.sequential):
            stack.enter_context(mock.patch.object(module, "network", network))
        if name == "2 threads":
            torch.set_num_threads(2)
        if name == "reduced precision":
            stack.enter_context(reduced_precision())
        if name == "subnormals flushed":
            torch.set_flush_denormal(True)
            stack.callback(torch.set_flush_denormal, False)
        stack.callback(torch.set_num_threads, threads)
        yield


@contextlib.contextmanager
def reduced_precision() -> Iterator[None]:
    """Matrix products and convolutions may use bfloat16."""
    backends: Any = torch.backends
    torch.set_float32_matmul_precision("medium")
    backends.mkldnn.conv.fp32_precision = "bf16"
    try:
        yield
    finally:
        backends.mkldnn.conv.fp32_precision = "none"
        torch.set_float32_matmul_precision("highest")


def outputs(data: bytes, rows: int) -> np.ndarray | None:
    """The posterior's and the likelihood's numbers of a file's vae for so many inputs; None for other models."""
    with Archive(data, archive_cases.SMALL) as archive:
        model, _ = archive.model()
    if not isinstance(model, VAE) or model.condition is not None:
        return None
    exact: Any = likely.exact.network(model)
    vae: VAE = exact.module
    noise = archive_cases.uniform((rows, model.space.dims + model.latent_dim), 9)
    z = torch.from_numpy(4.0 * noise[:, : model.latent_dim] - 2.0).float()
    x = _inputs(model, torch.from_numpy(noise[:, model.latent_dim :]))
    q = exact.run(vae.posterior, x)
    h = exact.run(lambda: vae.decoder(z))
    return np.concatenate([t.reshape(rows, -1).numpy() for t in (q.mean, q.log_scale, h)], 1)


def _inputs(model: Model, noise: Tensor) -> Tensor:
    """Examples of a space, made of numbers from 0 to 1."""
    space: Any = model.space
    if hasattr(space, "columns"):
        columns = [
            torch.floor(u * c.levels) if c.coded else torch.round(u * 100.0) for u, c in zip(noise.T, space.columns)
        ]
        return torch.stack(columns, 1).double()
    levels = getattr(space, "levels", getattr(space, "vocab", 2))
    return torch.floor(noise * levels).reshape(-1, *space.shape).float()


def attempt(data: bytes) -> str:
    """Digest of what a file decodes to, or the name of the error."""
    try:
        return archive_cases.digest(archive_cases.decode(data))
    except Exception as error:
        return type(error).__name__


def main() -> None:
    torch.set_num_threads(1)
    folder, names = Path(sys.argv[1]), sys.argv[2:] or ["plain"]
    found: dict[str, Any] = {"machine": platform.machine(), "torch": torch.__version__, "numpy": np.__version__}
    found["python"] = platform.python_version()
    for name in names:
        here: dict[str, Any] = {}
        for path in sorted(folder.glob("*.lk")):
            with setting(name, native=path.stem.endswith(".float")):
                here[path.stem] = attempt(path.read_bytes())
                reference = path.with_suffix(".npz")
                if reference.exists():
                    expected = np.load(reference)["outputs"]
                    numbers = outputs(path.read_bytes(), len(expected))
                    here[f"{path.stem} outputs"] = float((numbers != expected).mean())
        found[name] = here
    print(json.dumps(found))


if __name__ == "__main__":
    main()
