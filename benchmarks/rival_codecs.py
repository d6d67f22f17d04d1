"""Sizes that brotli and JPEG XL need; run by ``compression.py`` in an environment that has both.

    python rival_codecs.py brotli FILE                   the file's bytes
    python rival_codecs.py jxl IMAGES.npy EFFORT         one file an image
    python rival_codecs.py jxl SHEETS.npz EFFORT         all sheets of the archive

prints one number of bytes.  Every JPEG XL file is decoded and compared.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np


def main() -> None:
    kind, path = sys.argv[1], Path(sys.argv[2])
    print(brotli_size(path.read_bytes()) if kind == "brotli" else jxl_size(path, int(sys.argv[3])))


def brotli_size(data: bytes) -> int:
    import brotli

    return len(brotli.compress(data, quality=11, lgwin=24))


def jxl_size(path: Path, effort: int) -> int:
    import pillow_jxl  # noqa: F401
    from PIL import Image

    pictures = np.load(path)
    total = 0
    for picture in pictures.values() if path.suffix == ".npz" else pictures:
        sink = io.BytesIO()
        Image.fromarray(picture).save(sink, "JXL", lossless=True, effort=effort)
        total += len(sink.getvalue())
        if not np.array_equal(np.asarray(Image.open(sink)), picture):
            raise SystemExit("JPEG XL gave back other pixels")
    return total


if __name__ == "__main__":
    main()
