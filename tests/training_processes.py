"""Runs of the tests for ``torchrun`` to start: python training_processes.py FOLDER."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from likely.training import Diverged, TrainOptions, train
from training_toy import LinearVAE, gaussian_data, linear_vae

OPTIONS = TrainOptions(
    steps=60, batch_size=33, learning_rate=1e-2, warmup=5, log_every=10, evaluate_every=15, clip_norm=1.0
)
OVERFITTING = OPTIONS.with_changes(steps=3000, decay="constant", learning_rate=0.05, patience=3, batch_size=8)


class Signalled(LinearVAE):
    """Its last process gets SIGTERM in step 40, if armed."""

    armed = False

    def loss(self, x, condition=None, noise=None, step=0):
        if step == 40 and self.armed and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(x, condition, noise, step)


def job(folder: Path, options: TrainOptions, examples: int = 301, model: dict | None = None, **keywords) -> None:
    data = gaussian_data(examples, dtype=torch.float64)
    valid = gaussian_data(101, seed=1, dtype=torch.float64)
    train(
        linear_vae(data, dtype="float64", **(model or {})), data, valid, options, run=folder, progress=False, **keywords
    )


def main(folder: Path) -> None:
    """Equal shares, a signal to one process, going on to an early stop, and a fault."""
    rank = os.environ["RANK"]
    job(folder / "equal", OPTIONS, accumulate=2)
    Signalled.armed = True
    try:
        job(folder / "stopped", OVERFITTING, 13, {"kind": Signalled})
    except KeyboardInterrupt as error:
        (folder / f"interrupted-{rank}").write_text(str(error))
    dist.barrier()
    Signalled.armed = False
    job(folder / "stopped", OVERFITTING, 13, {"kind": Signalled}, resume=True)
    try:
        job(folder / "fault", OPTIONS, model={"trap": 25})
    except Diverged as error:
        (folder / f"fault-{rank}").write_text(str(error))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
