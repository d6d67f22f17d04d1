"""What the training loop costs over a bare one: the same network, batch, optimiser and number of steps.

    python benchmarks/training_overhead.py --rounds 5 --steps 1000

A VAE 784-200-200-50 is trained at batch 100 by a loop of ten lines with fused Adam, and by ``likely.training.train``,
in turn, on the same synthetic binary data.  Evaluation is left out of both.  Two rows of likely: the loss of the bare
loop inside a model (what the loop costs), and the package's own ``vae`` of that architecture (what a user gets).
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.contract import Binary, Bound, Loss, Model
from likely.data.dataset import Dataset
from likely.training import train

#: Processor time: with one thread it is what the loop takes, and other work on the machine disturbs it less.
CLOCK = time.process_time
DIMS, LATENT, HIDDEN, BATCH, ROWS = 784, 50, 200, 100, 20_000


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(DIMS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENT)
        )
        self.decoder = nn.Sequential(
            nn.Linear(LATENT, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, DIMS)
        )

    def loss(self, x: Tensor, noise: Tensor) -> Tensor:
        mean, log_scale = self.encoder(x).chunk(2, -1)
        logits = self.decoder(mean + log_scale.exp() * noise)
        kl = 0.5 * (mean.square() + (2 * log_scale).exp() - 1) - log_scale
        return (F.binary_cross_entropy_with_logits(logits, x, reduction="sum") + kl.sum()) / len(x)


class Wrapped(Model):
    """The bare network's loss, in a model."""

    spaces = (Binary,)

    def __init__(self, space: Binary) -> None:
        super().__init__(space)
        self.network = Network()

    def bound(self, x: Tensor, condition: Tensor | None = None, noise=None) -> Bound:  # type: ignore[no-untyped-def]
        raise NotImplementedError

    def loss(self, x: Tensor, condition=None, noise=None, step: int = 0) -> Loss:  # type: ignore[no-untyped-def]
        return Loss(self.network.loss(x, noise.normal((len(x), LATENT))))


def bare(x: Tensor, steps: int) -> float:
    torch.manual_seed(0)
    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    start, step = CLOCK(), 0
    while step < steps:
        for index in torch.randperm(len(x)).split(BATCH):
            batch = x[index]
            optimizer.zero_grad()
            loss = network.loss(batch, torch.randn(len(batch), LATENT))
            loss.backward()
            optimizer.step()
            step += 1
            if step == steps:
                break
    return (CLOCK() - start) / steps


def likely(model: Model, x: Tensor, steps: int, **options: object) -> float:
    class Timer:
        def on_start(self, run: object) -> None:
            self.start = CLOCK()

        def on_end(self, run: object) -> None:
            self.took = CLOCK() - self.start

    timer = Timer()
    data = Dataset(Binary((DIMS,)), x)
    train(model, data, steps=steps, batch_size=BATCH, optimizer="adam", callbacks=[timer], progress=False, **options)
    return timer.took / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    x = (torch.rand(ROWS, DIMS, generator=torch.Generator().manual_seed(0)) < 0.2).float()

    def vae() -> Model:
        from likely.models.vae import VAE

        return VAE(Binary((DIMS,)), latent_dim=LATENT, hidden=(HIDDEN, HIDDEN), activation="tanh")

    rivals = {
        "bare loop": lambda: bare(x, arguments.steps),
        "train(), same loss": lambda: likely(Wrapped(Binary((DIMS,))), x, arguments.steps),
        "train(), same loss, no average": lambda: likely(
            Wrapped(Binary((DIMS,))), x, arguments.steps, average=False, decay="constant", warmup=0
        ),
        "train(), vae": lambda: likely(vae(), x, arguments.steps),
    }
    times: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(arguments.rounds):
        for name, rival in rivals.items():
            times[name].append(rival())
    base = statistics.median(times["bare loop"])
    print(f"{'':32}{'ms/step':>9}{'ratio':>8}   median over {arguments.rounds} rounds of {arguments.steps} steps")
    for name, values in times.items():
        ratios = [value / reference for value, reference in zip(values, times["bare loop"])]
        print(f"{name:32}{1000 * statistics.median(values):9.3f}{statistics.median(ratios):8.3f}")
    assert base > 0


if __name__ == "__main__":
    main()
