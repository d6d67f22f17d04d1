"""Small ``.lk`` files of every family of models, with the model in the file: for golden files, fuzzing, other machines.

Data and weights come from keyed noise and from rounding to few bits, so that a case is the same wherever it is made.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from likely import models
from likely.archive import Archive, compress
from likely.coding.container import Limits
from likely.coding.errors import Damaged
from likely.coding.weights import pack, unpack
from likely.contract import Model
from likely.data import Schema, infer_schema
from likely.data.dataset import Passes
from likely.noise import KeyedNoise

#: What a reader of these files is told to expect at most.
SMALL = Limits(max_output=1 << 24, max_chunk=1 << 24, max_chunks=1 << 6)


@dataclass(frozen=True)
class Case:
    """A file's name and bytes, the model that codes it, the options of its schema, and steps of training."""

    file: str
    content: Callable[[], bytes]
    model: str
    options: Mapping[str, Any]
    schema: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 20


def uniform(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers from 0 to 1, a fixed function of shape and seed."""
    return KeyedNoise(seed, torch.arange(shape[0])).uniform(shape).double().numpy()


def images(n: int, size: int) -> np.ndarray:
    """Blurred discs of many places and brightnesses, 8 bits, shape ``(n, size, size)``."""
    y, x, radius, light = (uniform((n, 4), 1) * [size, size, size / 3, 100.0] + [0.0, 0.0, 1.0, 100.0]).T[:, :, None]
    rows, columns = np.divmod(np.arange(size * size), size)
    inside = (rows - y) ** 2 + (columns - x) ** 2 < radius**2
    grey = inside * light + 24.0 * uniform((n, size * size), 2)
    return np.floor(grey).astype(np.uint8).reshape(n, size, size)


def textures(n: int, channels: int, size: int) -> np.ndarray:
    """One texture under as many lights as there are images, 8 bits, shape ``(n, channels, size, size)``."""
    texture = 200.0 * uniform((channels * size * size, 1), 6)[:, 0]
    grey = (0.6 + 0.4 * uniform((n, 1), 7)) * texture + 6.0 * uniform((n, len(texture)), 8)
    return np.floor(grey).astype(np.uint8).reshape(n, channels, size, size)


def npy(array: np.ndarray) -> bytes:
    """The bytes of a ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def counts() -> np.ndarray:
    """Skewed counts, one of them large, shape ``(60, 6)``."""
    skewed = np.floor(12.0 * uniform((60, 6), 3) ** 3).astype(np.int64)
    skewed[17, 2] = 70_001
    return skewed


def table(floats: bool) -> bytes:
    """Numbers on two grids, a category, a flag, floats; holes in three columns; a row that needs an escape."""
    u = uniform((80, 8), 4)
    lines = ["size,rooms,town,old" + ",weight" * floats]
    for row in u:
        size = "" if row[4] < 0.1 else f"{40.0 + 60.0 * row[0]:.1f}"
        rooms = "" if row[5] < 0.1 else str(1 + int(5 * row[0] + 2 * row[1]))
        town = "" if row[6] < 0.1 else ("Ulm", "Bonn", "Kiel", "Jena")[int(4 * row[2] ** 2)]
        weight = f",{(1e-3 + row[7]) ** -1.5!r}" * floats
        lines.append(f"{size},{rooms},{town},{('no', 'yes')[int(row[3] < row[0])]}{weight}")
    return "\n".join([*lines, ""]).encode()


def words() -> bytes:
    """Lines of at most six letters."""
    u = uniform((80, 7), 5)
    return "".join("".join("etaoin"[int(6 * v * v)] for v in row[: 2 + int(5 * row[6])]) + "\n" for row in u).encode()


CASES: dict[str, Case] = {
    "vae-binary": Case(
        "binary.npy",
        lambda: npy((images(160, 8) > 60).astype(np.uint8)),
        "vae",
        {"latent_dim": 3, "hidden": (24,), "activation": "gelu"},
        steps=200,
    ),
    "vae-image": Case(
        "image.npy",
        lambda: npy(textures(80, 2, 8)),
        "vae",
        {
            "latent_dim": 3,
            "network": "conv",
            "hidden": (3, 4, 8),
            "activation": "silu",
            "likelihood_options": {"components": 2},
        },
        {"layout": "CHW", "levels": 256},
        steps=100,
    ),
    "vae-table": Case(
        "table.csv",
        lambda: table(floats=True),
        "vae",
        {
            "latent_dim": 2,
            "hidden": (8,),
            "activation": "tanh",
            "likelihood_options": {"components": 2, "atoms": 4},
            "prior": "mixture",
            "prior_options": {"components": 2},
        },
    ),
    "vae-counts": Case(
        "counts.npy", lambda: npy(counts()), "vae", {"latent_dim": 2, "hidden": (6,)}, {"space": "counts"}
    ),
    "vae-tokens": Case("words.txt", words, "vae", {"latent_dim": 2, "hidden": (6,)}, {"format": "lines"}),
    "mixture-table": Case("table.csv", lambda: table(floats=True), "mixture", {"components": 2, "atoms": 4}),
    "mixture-binary": Case(
        "binary.npy", lambda: npy((images(160, 8) > 60).astype(np.uint8)), "mixture", {"components": 3}
    ),
    "gaussian-table": Case("table.csv", lambda: table(floats=False), "gaussian", {}),
    "independent-table": Case("table.csv", lambda: table(floats=True), "independent", {"components": 2, "values": 8}),
    "independent-counts": Case("counts.npy", lambda: npy(counts()), "independent", {}, {"space": "counts"}),
    "made-table": Case("table.csv", lambda: table(floats=False), "made", {"hidden": (8,), "embedding_dim": 2}),
    "made-any": Case(
        "table.csv",
        lambda: table(floats=True),
        "made",
        {"hidden": (8,), "embedding_dim": 2, "order": "any", "sketch": False},
    ),
    "transformer-tokens": Case("words.txt", words, "transformer", {"width": 8, "layers": 1}, {"format": "lines"}),
    "transformer-table": Case("table.csv", lambda: table(floats=False), "transformer", {"width": 8, "layers": 1}),
    "masked-tokens": Case("words.txt", words, "masked_diffusion", {"width": 8, "layers": 1}, {"format": "lines"}),
    "pixelcnn-image": Case(
        "image.npy",
        lambda: npy(images(60, 8)),
        "pixelcnn",
        {"width": 8, "layers": 1, "stages": 2, "field": (1, 1), "components": 2},
        {"levels": 256},
        steps=100,
    ),
}


def trained(case: Case, schema: Schema, source: Path) -> Model:
    """The case's model, set from the data and trained for some steps."""
    data = schema.read(source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = models.find(case.model)(schema.space, schema.condition_space, **case.options)
        if model.closed_form:
            model.estimate(Passes(data))
            return model.eval()
        model.initialise(Passes(data))
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        x, condition = data.batch(slice(None))
        for _ in range(case.steps):
            optimiser.zero_grad()
            model.loss(x, condition).value.backward()
            optimiser.step()
    return model.eval()


@dataclass(frozen=True)
class Made:
    """A case that was made: the original's bytes, the file with and without its model, and model and schema."""

    original: bytes
    embedded: bytes
    bare: bytes
    model: Model
    schema: Schema


def make(case: str | Case, folder: Path, bits: int = 6) -> Made:
    """Write the data of a case, given itself or by name, into the folder, train its model and compress."""
    case = CASES[case] if isinstance(case, str) else case
    source = folder / case.file
    source.write_bytes(case.content())
    schema = infer_schema(source, **case.schema)
    packed = pack(trained(case, schema, source), models.describe, bits)
    model = unpack(packed, models.build)
    files = []
    for embed in (packed, None):
        file = io.BytesIO()
        compress(model, schema, source, file, embed=embed, workers=1)
        files.append(file.getvalue())
    return Made(source.read_bytes(), files[0], files[1], model, schema)


def golden(name: str, folder: Path) -> Made:
    """A case as its golden file holds it, and coded again by the model in it without that."""
    embedded = (Path(__file__).parent / "golden" / f"{name}-1.0.lk").read_bytes()
    with Archive(embedded, SMALL) as archive:
        model, schema = archive.model()
    source, bare = folder / CASES[name].file, io.BytesIO()
    source.write_bytes(decode(embedded, model, schema))
    compress(model, schema, source, bare, workers=1)
    return Made(source.read_bytes(), embedded, bare.getvalue(), model, schema)


def decode(data: bytes, model: Model | None = None, schema: Schema | None = None) -> bytes:
    """The original of a file of these, decoded in this process; by the model in it, if none is given.

    Raises:
        FormatError: the file is not intact.
    """
    with Archive(data, SMALL) as archive:
        if model is None or schema is None:
            model, schema = archive.model()
        restored = archive.restore(model, schema, workers=1)
        content: bytes = restored.value
        if restored.digest != archive.reader.digest:
            raise Damaged("the restored data is not the original")
        return content


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
