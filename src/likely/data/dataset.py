"""Examples of one space, in memory or memory-mapped, served by index."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from likely.contract import Binary, Space
from likely.noise import KeyedNoise, Noise, StreamNoise, content_keys

#: A subset of more bytes than this is gathered batch by batch and not copied.
COPIED_BYTES = 1 << 30


@dataclass(frozen=True)
class Dataset:
    """Examples and, if the model is conditional, the condition of each.

    Args:
        space: space of the examples as a model sees them.
        x: shape ``(n, *space.shape)``, any real dtype; may be backed by a memory map (nothing here copies it).
        condition_space: space of ``condition``, or None.
        condition: shape ``(n, *condition_space.shape)``, or None.
        bernoulli_scale: None, or the value that stands for probability 1: ``x / bernoulli_scale`` are probabilities
            and every batch is a fresh binary draw of them (*dynamic binarisation*, Burda et al. 2015).
    """

    space: Space
    x: Tensor
    condition_space: Space | None = None
    condition: Tensor | None = None
    bernoulli_scale: float | None = None

    def __post_init__(self) -> None:
        if tuple(self.x.shape[1:]) != self.space.shape:
            raise ValueError(f"x: expected examples of shape {self.space.shape}, got {tuple(self.x.shape[1:])}")
        if (self.condition is None) != (self.condition_space is None):
            raise ValueError("condition: expected both condition and condition_space, or neither")
        if self.condition is not None and len(self.condition) != len(self.x):
            raise ValueError(f"condition: expected {len(self.x)} rows, got {len(self.condition)}")
        if self.bernoulli_scale is not None and not isinstance(self.space, Binary):
            raise ValueError(f"bernoulli_scale: expected a Binary space, got {type(self.space).__name__}")

    def __len__(self) -> int:
        return len(self.x)

    @property
    def device(self) -> torch.device:
        """Where the examples lie."""
        return self.x.device

    @property
    def example_bytes(self) -> int:
        """Size of one example in bytes."""
        return math.prod(self.x.shape[1:]) * self.x.element_size()

    def subset(self, index: Tensor | slice) -> Dataset:
        """The examples at ``index``; a slice shares memory, an index tensor copies up to 1 GiB."""
        if isinstance(index, Tensor) and index.dtype == torch.int64 and len(index) * self.example_bytes > COPIED_BYTES:
            return Selection(self, index)
        return replace(self, x=self.x[index], condition=None if self.condition is None else self.condition[index])

    def batch(self, index: Tensor | slice, noise: Noise | None = None) -> tuple[Tensor, Tensor | None]:
        """The batch at ``index``: ``(x, condition)``.

        With ``bernoulli_scale`` a binary draw is made from ``noise``; without one, from noise keyed by the example's
        content, so that an evaluation binarises the same example in the same way wherever it stands.
        """
        x = _rows(self.x, index)
        condition = None if self.condition is None else _rows(self.condition, index)
        if self.bernoulli_scale is not None:
            if noise is None:
                noise = KeyedNoise(0, content_keys(x))
            binary = torch.empty(x.shape, device=x.device)  # compared into floats: a bool on the way would cost more
            x = torch.lt(noise.uniform(x.shape) * self.bernoulli_scale, x, out=binary)
        elif not x.is_floating_point():
            x = x.to(torch.float32)
        return x, condition

    def batches(self, batch_size: int, noise: Noise | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """All batches in the stored order; the last one may be smaller."""
        for start in range(0, len(self), batch_size):
            yield self.batch(slice(start, start + batch_size), noise)


class Selection(Dataset):
    """Some rows of a dataset that is too large to copy; what is asked for is gathered from it.

    Args:
        whole: may be memory-mapped.
        rows: row numbers, int64, shape ``(n,)``.
    """

    def __init__(self, whole: Dataset, rows: Tensor) -> None:
        for name, value in {
            "whole": whole,
            "rows": rows,
            "space": whole.space,
            "condition_space": whole.condition_space,
            "bernoulli_scale": whole.bernoulli_scale,
        }.items():
            object.__setattr__(self, name, value)

    whole: Dataset
    rows: Tensor

    @property
    def x(self) -> Tensor:  # type: ignore[override]
        """A copy of all examples, which may not fit in memory."""
        return _rows(self.whole.x, self.rows)

    @property
    def condition(self) -> Tensor | None:  # type: ignore[override]
        """A copy of all conditions."""
        return None if self.whole.condition is None else _rows(self.whole.condition, self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Selection({len(self)} of {len(self.whole)} examples of {self.space})"

    @property
    def device(self) -> torch.device:
        return self.whole.device

    @property
    def example_bytes(self) -> int:
        return self.whole.example_bytes

    def subset(self, index: Tensor | slice) -> Dataset:
        return self.whole.subset(self.rows[index])

    def batch(self, index: Tensor | slice, noise: Noise | None = None) -> tuple[Tensor, Tensor | None]:
        return self.whole.batch(self.rows[index], noise)


def _rows(x: Tensor, index: Tensor | slice) -> Tensor:
    """``x[index]``; gathering whole rows is several times faster with ``index_select`` than by general indexing."""
    if isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32):
        return x.index_select(0, index)
    return x[index]


@dataclass(frozen=True)
class Passes:
    """A re-iterable of ``(x, condition)`` batches over a dataset: every ``iter()`` is one pass.

    The dataset is visited in the stored order; with dynamic binarisation every pass draws the same binary values.
    """

    dataset: Dataset
    batch_size: int = 1024
    seed: int = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        generator = torch.Generator().manual_seed(self.seed)
        yield from self.dataset.batches(self.batch_size, StreamNoise(generator))

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)
