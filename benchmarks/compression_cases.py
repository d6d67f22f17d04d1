"""The data and models of the compression benchmarks: what is fitted to which rows, and which rows are coded.

    LIKELY_DATA=… python benchmarks/compression_cases.py RUNS [CASE …]

fits the models and keeps them under RUNS, where ``compression.py`` and ``codec.py`` find them.  No model sees a row
that is coded later.
"""

from __future__ import annotations

import argparse
import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import likely


def data() -> Path:
    """The folder of the data sets."""
    return Path(os.environ["LIKELY_DATA"])


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """Training and test images, uint8, shape (n, 28, 28)."""
    parts = []
    for part in ("train", "t10k"):
        with gzip.open(data() / "mnist" / f"{part}-images-idx3-ubyte.gz") as file:
            parts.append(np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28))
    return parts[0], parts[1]


def mnist_binary() -> tuple[np.ndarray, np.ndarray]:
    """MNIST with a threshold at 127, as vectors of 0 and 1."""
    train, test = mnist()
    return (train > 127).astype(np.uint8).reshape(-1, 784), (test > 127).astype(np.uint8).reshape(-1, 784)


def cifar() -> tuple[np.ndarray, np.ndarray]:
    """CIFAR-10, uint8, shape (n, 3, 32, 32); the test images, which lie class by class, in a random order."""
    from PIL import Image

    index = np.load(data() / "cifar10" / "index.npz")
    parts = []
    for part in ("train", "test"):
        sheets = [
            np.asarray(Image.open(name).convert("RGB")) for name in sorted((data() / "cifar10").glob(f"{part}_*.webp"))
        ]
        images = [s.reshape(-1, 32, 32, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3) for s in sheets]
        parts.append(np.concatenate(images)[: len(index[f"{part}_label"])].transpose(0, 3, 1, 2))
    return parts[0], parts[1][np.random.default_rng(0).permutation(len(parts[1]))]


def adult() -> tuple[Path, Path]:
    """UCI's own files."""
    return data() / "tables" / "adult-train.csv.gz", data() / "tables" / "adult-test.csv.gz"


def thirds(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two random thirds to fit to, and one to code, each in the order of the file."""
    coded = np.random.default_rng(0).random(len(frame)) < 1.0 / 3.0
    return frame[~coded].reset_index(drop=True), frame[coded].reset_index(drop=True)


def cover() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Covertype as ADBench has it: ten integer columns."""
    values = np.load(data() / "adbench" / "10_cover.npz")["X"]
    return thirds(pd.DataFrame(values.astype(np.int64), columns=[f"c{j}" for j in range(values.shape[1])]))


def diamonds() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Diamonds: seven numbers and three categories."""
    return thirds(pd.read_csv(data() / "tables" / "diamonds.csv.gz"))


@dataclass(frozen=True)
class Case:
    """A data set and the model fitted to its training part.

    Args:
        load: gives the training part and the part to code.
        options: of the model and of its training.
        model: name of the model.
        read: how the part to code is read.
        rows: how many of its rows are coded, the first ones; None for all.
    """

    load: Callable[[], tuple[Any, Any]]
    options: dict[str, Any]
    model: str = "vae"
    read: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None


TABLE = {
    "latent_dim": 16,
    "hidden": [256, 256],
    "prior": "mixture",
    "prior_options": {"components": 50},
    "gradient": "path",
    "batch_size": 500,
    "learning_rate": 2e-3,
    "patience": None,
}
IMAGE = {
    "network": "conv",
    "gradient": "path",
    "precision": "bfloat16",
    "learning_rate": 3e-3,
    "warmup": 300,
    "decay": "cosine",
    "optimizer": "adamw",
    "batch_size": 100,
    "patience": None,
}
#: A small network on causal patches, taught on a few pixels of many images.
PIXELS = {
    "layers": 3,
    "components": 5,
    "positions": 32,
    "batch_size": 128,
    "precision": "bfloat16",
    "learning_rate": 6e-3,
    "optimizer_options": {"betas": [0.9, 0.99]},
    "warmup": 300,
    "evaluate_examples": 300,
    "evaluate_every": 2000,
    "patience": None,
    "valid_fraction": 0.05,
}
CASES = {
    "mnist-binary": Case(
        mnist_binary,
        {
            "latent_dim": 40,
            "hidden": [512, 512],
            "gradient": "path",
            "batch_size": 250,
            "learning_rate": 2e-3,
            "decay": "cosine",
            "steps": 30_000,
            "precision": "bfloat16",
            "patience": None,
        },
    ),
    "adult": Case(adult, {**TABLE, "steps": 6000}, read={"strip_suffix": "."}),
    "cover": Case(cover, {**TABLE, "steps": 12_000, "hide": 0.0}),
    "diamonds": Case(diamonds, {**TABLE, "steps": 8000}),
    "cifar": Case(
        cifar,
        {
            **IMAGE,
            "latent_dim": 16 * 16 * 8,
            "hidden": [64, 0],
            "blocks": [1],
            "likelihood_options": {"components": 1},
            "learning_rate": 2e-3,
            "gradient": "total",
            "steps": 800,
            "evaluate_examples": 500,
            "evaluate_every": 2000,
        },
    ),
    "mnist": Case(
        lambda: tuple(part[:, None] for part in mnist()),  # type: ignore[arg-type,return-value]
        {**IMAGE, "latent_dim": 40, "hidden": [24, 48, 256], "blocks": [0, 1], "steps": 8000},
    ),
    "pixelcnn-cifar": Case(
        cifar,
        {**PIXELS, "field": [3, 3], "width": 192, "steps": 20_000, "evaluate_examples": 200},
        "pixelcnn",
    ),
    "pixelcnn-mnist": Case(
        lambda: tuple(part[:, None] for part in mnist()),  # type: ignore[arg-type,return-value]
        {**PIXELS, "field": [5, 5], "width": 128, "steps": 12_000},
        "pixelcnn",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], help="all by default")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.cases or CASES:
        case = CASES[name]
        if not (arguments.runs / name / "model.safetensors").exists():
            train, _ = case.load()
            likely.fit(train, case.model, out=arguments.runs / name, overwrite=True, seed=0, **case.options)


if __name__ == "__main__":
    main()
