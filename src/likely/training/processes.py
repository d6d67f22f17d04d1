"""Training over several processes, started by ``torchrun``."""

from __future__ import annotations

import atexit
import gc
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from likely.contract import Model
from likely.noise import Noise


def resolve_device(name: str) -> torch.device:
    """The device called ``name``; ``auto`` is CUDA, else Apple's GPU, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu, cuda, cuda:N or mps, got {name!r}") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device: expected a device of this machine, got 'cuda' (PyTorch sees no CUDA device)")
        index = device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise ValueError(f"device: expected cuda:0 to cuda:{torch.cuda.device_count() - 1}, got {name!r}")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device: expected a device of this machine, got 'mps'")
    return device


@dataclass(frozen=True)
class Processes:
    """The processes of this run, and which of them this is."""

    rank: int = 0
    count: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and reports."""
        return self.rank == 0

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This process's part of the rows ``start:stop``; the parts differ by one row at most."""
        n = stop - start
        return start + n * self.rank // self.count, start + n * (self.rank + 1) // self.count

    def sum(self, values: Sequence[Tensor]) -> list[Tensor]:
        """Sums of scalars over the processes, float64."""
        if self.count == 1:
            return list(values)
        total = torch.stack([value.double() for value in values])
        dist.all_reduce(total)
        return list(total)

    def largest(self, *values: float) -> list[float]:
        """Largest of each number over the processes."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor.tolist()

    def from_first(self, value: Any) -> Any:
        """The first process's value."""
        if self.count == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values


def join(device: str) -> Processes:
    """Join the other processes, if ``torchrun`` started this one or the caller has made a process group.

    A group that was made here stays for further runs and ends with the program: it cannot be made twice.
    """
    where = resolve_device(device)
    if not (dist.is_available() and dist.is_initialized()):
        if int(os.environ.get("WORLD_SIZE", "1")) < 2:
            return Processes(device=where)
        if where.type == "cuda":
            torch.cuda.set_device(where)
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
        atexit.register(_leave)
    return Processes(dist.get_rank(), dist.get_world_size(), where)


def _leave() -> None:
    """End the group before the interpreter ends.

    A thread of gloo lets go of a finished reduction under Python's lock, and one that asks for the lock while the
    interpreter is ending aborts the process.  So what is left is collected, and the threads get the time to let go.
    """
    gc.collect()
    time.sleep(0.2)
    if dist.is_initialized():
        dist.destroy_process_group()
    time.sleep(0.2)


class LossModule(nn.Module):
    """A module whose forward is the loss of a model, as PyTorch's ``DistributedDataParallel`` wants it."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, condition: Tensor | None, noise: Noise, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and what the model wishes to log."""
        loss = self.model.loss(x, condition, noise, step)
        return loss.value, loss.log
