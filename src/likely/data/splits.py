"""Seeded splits into training, held-out and test examples, recorded so that they can be checked later."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from likely.data.errors import DataError
from likely.noise import content_keys

_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Split:
    """Which examples belong to which part.

    Args:
        seed: the seed it was drawn with.
        fractions: the share of each part, as asked for; ``train`` is what is left.
        indices: for each part the row numbers, increasing.
    """

    seed: int
    fractions: Mapping[str, float]
    indices: Mapping[str, Tensor]

    @property
    def train(self) -> Tensor:
        """Row numbers of the training examples."""
        return self.indices["train"]

    @property
    def valid(self) -> Tensor:
        """Row numbers of the examples held out for early stopping."""
        return self.indices["valid"]

    @property
    def test(self) -> Tensor:
        """Row numbers of the examples kept aside."""
        return self.indices["test"]

    def to_json(self) -> dict[str, Any]:
        """What a run records: seed, fractions, sizes, and a digest of the row numbers."""
        return {
            "seed": self.seed,
            "fractions": dict(self.fractions),
            "sizes": {name: len(index) for name, index in self.indices.items()},
            "digest": self.digest(),
        }

    def digest(self) -> str:
        """SHA-256 of the parts' names and row numbers (little-endian int64)."""
        sha = hashlib.sha256()
        for name, index in self.indices.items():
            sha.update(name.encode() + b"\0" + len(index).to_bytes(8, "little"))
            sha.update(index.numpy().astype("<i8").tobytes())
        return sha.hexdigest()

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Split:
        """The split that :meth:`to_json` recorded; raises ``DataError`` if it does not come out the same."""
        again = split(sum(record["sizes"].values()), record["fractions"], seed=record["seed"])
        if again.digest() != record["digest"]:
            raise DataError("split: the recorded split does not come out again; it was drawn by another version")
        return again


def split(n: int, fractions: Mapping[str, float] | None = None, seed: int = 0) -> Split:
    """Draw a split of ``n`` examples.

    Example ``i`` has the key ``hash(seed, i)``, and the parts take the examples in the order of their keys: the split
    depends on ``n``, ``fractions`` and ``seed`` alone, on every machine.  Sizes are the fractions of ``n`` rounded to
    the nearest whole number, at least 1 where the fraction is positive; ``train`` has the rest.

    >>> parts = split(10, {"valid": 0.2, "test": 0.1}, seed=0)
    >>> {name: len(index) for name, index in parts.indices.items()}
    {'train': 7, 'valid': 2, 'test': 1}

    Args:
        n: number of examples.
        fractions: share of ``valid`` and of ``test``; 0.1 and 0 by default.
        seed: of the draw.
    """
    asked = {"valid": 0.1, "test": 0.0} if fractions is None else {k: v for k, v in fractions.items() if k != "train"}
    for name in ("valid", "test"):
        asked.setdefault(name, 0.0)
    for name, fraction in asked.items():
        if not 0.0 <= fraction < 1.0:
            raise DataError(f"{name}: expected a fraction from 0 to below 1, got {fraction}")
    sizes = {name: max(1, math.floor(n * share + 0.5)) if share > 0 else 0 for name, share in asked.items()}
    if n - sum(sizes.values()) < 1:
        raise DataError(
            f"expected examples left to train on, got {n} examples and {sum(sizes.values())} held out "
            f"({', '.join(f'{k} {v}' for k, v in sizes.items())}); hold out less"
        )
    keys = torch.cat(
        [
            content_keys(torch.stack([torch.full((stop - start,), float(seed)), torch.arange(start, stop)], 1).double())
            for start, stop in ((s, min(n, s + _AT_ONCE)) for s in range(0, n, _AT_ONCE))
        ]
    )
    order = torch.argsort(keys, stable=True)
    part = torch.zeros(n, dtype=torch.int8)
    start = 0
    for code, size in enumerate(sizes.values(), start=1):
        part[order[start : start + size]] = code
        start += size
    names = ["train", *sizes]
    indices = {name: (part == code).nonzero().squeeze(1) for code, name in enumerate(names)}
    return Split(seed, asked, indices)
