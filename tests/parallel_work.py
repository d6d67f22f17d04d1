"""What the tests of the parallel map let their workers do."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any

from likely.coding.errors import Damaged, TooLarge


def in_a_worker() -> bool:
    return multiprocessing.parent_process() is not None


def square(number: int) -> int:
    return number * number


class Told:
    """A number that says how often it was sent to another process."""

    sent = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> tuple[Any, ...]:
        Told.sent += 1
        return Told, (self.number,)


def number_of(told: Told) -> tuple[int, bool]:
    """The number, and whether another process looked it up; after a while, so that others have their turn."""
    time.sleep(0.02)
    return told.number, in_a_worker()


def build(state: bytes) -> dict[str, Any]:
    import torch

    return {"text": state.decode(), "threads": torch.get_num_threads(), "process": os.getpid(), "built": time.time_ns()}


def place(built: dict[str, Any], argument: int) -> tuple[int, dict[str, Any]]:
    """The argument and what was built, later arguments sooner."""
    time.sleep(0.01 * (5 - argument % 6))
    return argument, built


def misbehave(argument: str) -> Any:
    """In a worker: raise, die or return what cannot be sent; elsewhere do nothing for a while."""
    if not in_a_worker():
        time.sleep(0.05)
    elif argument == "raise":
        raise TooLarge("rows", 2, 1, "max_output")
    elif argument == "die":
        os._exit(3)
    elif argument == "lambda":
        return lambda: None
    return argument


def damaged_source() -> Iterator[int]:
    yield 3
    raise Damaged("cut short")


def products(seed: int) -> tuple[float, float, float]:
    """A matrix product and a convolution by PyTorch and a matrix product by NumPy, of whole numbers: exact anywhere."""
    import numpy as np
    import torch

    whole = np.random.default_rng(seed).integers(-9, 10, (300, 300)).astype(np.float32)
    a = torch.from_numpy(whole)
    image = a[:288, :288].reshape(8, 9, 32, 36)
    kernels = a[:12, :81].reshape(12, 9, 3, 3)
    convolved = torch.nn.functional.conv2d(image, kernels)
    return float((a @ a).double().sum()), float(convolved.double().sum()), float((whole @ whole).sum(dtype=np.float64))


def sleep(seconds: float) -> None:
    if in_a_worker():
        print(os.getpid(), flush=True)
    time.sleep(seconds)
