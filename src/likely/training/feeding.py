"""How examples reach a step: where they lie, in which order they come, and what tells a data set from another."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from likely.contract import Model
from likely.data.dataset import Dataset, Passes
from likely.noise import content_keys
from likely.training.order import Order

#: Bytes of training data that are moved to an accelerator as a whole.
RESIDENT_BYTES = 1 << 31
#: Bytes of training data from which a thread fetches the next batch during a step (they may have to come from a disk).
FETCHED_BYTES = 1 << 31


class Feeder:
    """Examples at positions of the endless order, on the device.

    Small data are moved to an accelerator as a whole.  Of large data each batch is gathered by itself, by a thread
    that runs one batch ahead; the whole is never copied.

    Args:
        data: may be memory-mapped.
        seed: seed of the order.
        device: where the examples are to be.
    """

    def __init__(self, data: Dataset, seed: int, device: torch.device) -> None:
        size = len(data) * data.example_bytes
        resident = data.device == device or size <= RESIDENT_BYTES
        self.data = moved(data, device) if resident else data
        self._device = device
        self._order = Order(len(data), seed, data.example_bytes, device if resident else "cpu")
        self._thread = ThreadPoolExecutor(1) if not resident or size > FETCHED_BYTES else None
        self._next: tuple[tuple[int, int], Future[Dataset]] | None = None

    def rows(self, start: int, stop: int) -> list[int]:
        """Row numbers of the data set at positions ``start:stop``."""
        if self._thread is not None:
            return self._thread.submit(self._order.rows, start, stop).result().tolist()
        return self._order.rows(start, stop).tolist()

    def take(self, span: tuple[int, int], following: tuple[int, int]) -> tuple[Dataset, Tensor | slice]:
        """A data set and the index in it of the examples at positions ``span``.

        Args:
            following: the positions that are wanted next.
        """
        if self._thread is None:
            return self.data, self._order.rows(*span)
        if self._next is not None and self._next[0] == span:
            fetched = self._next[1].result()
        else:
            fetched = self._thread.submit(self._fetch, *span).result()
        self._next = following, self._thread.submit(self._fetch, *following)
        return moved(fetched, self._device), slice(None)

    def _fetch(self, start: int, stop: int) -> Dataset:
        part = self.data.subset(self._order.rows(start, stop))
        if self._device.type != "cuda":
            return part
        condition = None if part.condition is None else part.condition.pin_memory()
        return replace(part, x=part.x.pin_memory(), condition=condition)

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)


@dataclass(frozen=True)
class DevicePasses:
    """Passes whose batches are moved to a device."""

    passes: Passes
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for x, condition in self.passes:
            yield x.to(self.device), None if condition is None else condition.to(self.device)

    def __len__(self) -> int:
        return len(self.passes)


def moved(data: Dataset, device: torch.device) -> Dataset:
    """The data on a device."""
    if data.device == device:
        return data
    condition = None if data.condition is None else data.condition.to(device, non_blocking=True)
    x = data.x.to(device, non_blocking=True)
    return Dataset(data.space, x, data.condition_space, condition, data.bernoulli_scale)


def thinned(data: Dataset, limit: int | None) -> tuple[Dataset, int]:
    """At most ``limit`` examples, every k-th of the whole (a view), and k."""
    every = 1 if limit is None else -(-len(data) // limit)
    return (data if every == 1 else data.subset(slice(None, None, every))), every


def fingerprint(data: Dataset) -> dict[str, Any]:
    """What tells one data set from another at little cost: size, space, and a hash of up to 128 examples."""
    some = data.subset(slice(None, None, max(1, len(data) // 64)))
    return {"n": len(data), "space": data.space.to_json(), "hash": int(content_keys(some.x, some.condition).sum())}


def check_data(model: Model, data: Dataset, name: str) -> None:
    """Raise ``ValueError`` if the data are empty or not of the model's spaces."""
    if len(data) == 0:
        raise ValueError(f"{name}: expected at least one example, got none")
    if data.space != model.space:
        raise ValueError(f"{name}: expected examples of the model's space {model.space}, got {data.space}")
    if data.condition_space != model.condition:
        raise ValueError(f"{name}: expected a condition in {model.condition}, got {data.condition_space}")
