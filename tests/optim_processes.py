"""Steps of every optimiser in two processes, for ``torchrun`` to start: python optim_processes.py FOLDER.

Each process writes its parameters after every experiment; the test compares them with those of one process.
"""

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from likely.optim import SOAP, Adam, AdaMax, AdamW, Muon, NAdam, Shampoo, clip_by_global_norm

STEPS, BATCH = 12, 8
RULES = {
    "adam": lambda p: Adam(p, lr=1e-2),
    "adam formula": lambda p: Adam(p, lr=1e-2, fused=False, amsgrad=True),
    "adamw stochastic": lambda p: AdamW(p, lr=1e-2, rounding="stochastic", seed=3),
    "adamax": lambda p: AdaMax(p, lr=1e-2),
    "nadam": lambda p: NAdam(p, lr=1e-2),
    "shampoo": lambda p: Shampoo(p, lr=1e-2),
    "soap": lambda p: SOAP(p, lr=1e-2),
    "muon": lambda p: Muon(p, lr=1e-2),
}


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Square layers of odd length: two processes cannot share them evenly, and their gradients have full rank."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5)).to(dtype)


def batch(step: int, dtype: torch.dtype = torch.float32, rank: int = 0, ranks: int = 1) -> torch.Tensor:
    """The part of a process of the examples of a step."""
    whole = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step)).to(dtype)
    return whole[rank * BATCH // ranks : (rank + 1) * BATCH // ranks]


def advance(model: nn.Module, optimizer, steps: range, rank: int = 0, ranks: int = 1) -> None:
    """Steps on the loss of ½ |f(x) − sin x|², clipped."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        optimizer.zero_grad()
        x = batch(step, dtype, rank, ranks)
        (0.5 * (model(x) - x.sin()).square().sum(1).mean()).backward()
        clip_by_global_norm(model.parameters(), 0.5)
        optimizer.step()


def values(model: nn.Module) -> list[torch.Tensor]:
    """The parameters, whole."""
    return [p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def interrupted(model: nn.Module, make, rank: int, ranks: int) -> None:
    """The same steps with another optimiser after the fifth, which goes on from the state of the first."""
    first, second = make(model.parameters()), make(model.parameters())
    advance(model, first, range(5), rank, ranks)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    advance(model, second, range(5, STEPS), rank, ranks)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    found = {}
    for name, make in RULES.items():
        for dtype in (torch.float32, torch.bfloat16):
            straight, resumed = (DistributedDataParallel(network(dtype)) for _ in range(2))
            advance(straight, make(straight.parameters()), range(STEPS), rank, ranks)
            found[f"{name} {dtype} straight"] = values(straight)
            interrupted(resumed, make, rank, ranks)
            found[f"{name} {dtype} resumed"] = values(resumed)

        shared = network(torch.float64)
        fully_shard(shared, mesh=init_device_mesh("cpu", (ranks,)))
        interrupted(shared, make, rank, ranks)
        found[f"{name} shared out"] = values(shared)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main(Path(sys.argv[1]))
