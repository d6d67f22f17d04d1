"""Glow on scikit-learn's digits: samples at several temperatures, and paths between digits, as two pictures.

python examples/glow_digits.py --out docs/images
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import likely
from likely.evaluation import interpolate

TEMPERATURES = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)


def sheet(rows: np.ndarray, path: Path, scale: int = 4) -> None:
    """Images of shape ``(rows, columns, 8, 8)``, values 0 to 16, as one PNG with a line between them."""
    framed = np.pad(rows * (255.0 / 16.0), ((0, 0), (0, 0), (0, 1), (0, 1)), constant_values=90.0)
    pixels = framed.transpose(0, 2, 1, 3).reshape(rows.shape[0] * 9, rows.shape[1] * 9)
    Image.fromarray(pixels.astype(np.uint8)).resize(
        (scale * pixels.shape[1], scale * pixels.shape[0]), Image.Resampling.NEAREST
    ).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    fitted = likely.fit(
        "digits", model="glow", steps=arguments.steps, levels=2, depth=4, width=64, batch_size=64, patience=None
    )
    drawn = [np.asarray(fitted.sample(16, seed=1, temperature=t)).reshape(16, 8, 8) for t in TEMPERATURES]
    sheet(np.stack(drawn), arguments.out / "glow-temperatures.png")
    x = fitted.schema.read("digits").x
    path = interpolate(fitted.model, x[:6], x[12:18], steps=16)
    sheet(path.transpose(0, 1).reshape(6, 16, 8, 8).numpy(), arguments.out / "glow-interpolations.png")


if __name__ == "__main__":
    main()
