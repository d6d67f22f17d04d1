"""The importance-weighted bound L_k (Burda, Grosse & Salakhutdinov 2015, arXiv:1509.00519, eq. 8), in constant memory.

    L_k = E [ log (1/k) Σ_j w_j ],   w_j = p(x, z_j) / q(z_j | x),   z_j ~ q(z | x)

L_1 is the ELBO, L_k never falls in k, and L_k → log p(x).  The sums Σ w and Σ w² of an example run over chunks of
samples, scaled by the largest weight met so far, so that any k costs the memory of one chunk.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from likely.contract import Kind, Model, Space, Unsupported
from likely.data.dataset import Dataset
from likely.evaluation.heldout import (
    ExampleNoise,
    Progress,
    check_finite,
    check_spaces,
    device_batches,
    evaluating,
    standard_error,
)

#: Cells of data that the decoder writes at a time.  On a CPU they should stay in its caches (measured on 784 cells an
#: example: half the time of 2²⁴); other devices want to be filled.
CELLS = {"cpu": 2**21, "other": 2**25}
#: Latent samples, of all examples of a batch together, that pass through the decoder at a time: no more than these.
ROWS = 2**16
#: Samples of one example at a time, fewer only for examples of more than 2²⁴ / 100 cells.  It does not depend on the
#: device, because the chunk decides which variates a model with several layers of noise gets.
CHUNK, CHUNK_CELLS = 100, 2**24


@dataclass(frozen=True)
class ImportanceWeighted:
    """Mean of the importance-weighted bound over the examples of a dataset.

    Args:
        samples: k, the importance samples of every example.
        n: number of examples.
        nats: mean nats per example, a lower bound on log p(x) in expectation over the samples.
        standard_error: standard error of ``nats`` over the examples (nats); it contains the Monte-Carlo error.
        monte_carlo_error: the share of it that another seed would change (nats), to first order in 1/k.
        effective_samples: mean over the examples of (Σ w)² / Σ w², between 1 and k; where it is a small number the
            bound is still a bound, but loose.
        example_nats: nats of every example in the dataset's order, float64, shape ``(n,)``.
    """

    kind: ClassVar[Kind] = "lower bound"

    samples: int
    n: int
    nats: float
    standard_error: float
    monte_carlo_error: float
    effective_samples: float
    example_nats: Tensor = field(repr=False)


class RunningWeights:
    """log Σ w and Σ w² / (Σ w)² of every example of a batch, over chunks of log weights.

    >>> running = RunningWeights(1)
    >>> running.add(torch.tensor([[0.0, math.log(3.0)]]))
    >>> running.add(torch.tensor([[-math.inf, math.log(4.0)]]))
    >>> round(running.log_mean().exp().item(), 6)
    2.0

    Args:
        batch: number of examples.
    """

    def __init__(self, batch: int) -> None:
        self.samples = 0
        self._top = torch.full((batch,), -math.inf, dtype=torch.float64)
        self._first = torch.zeros(batch, dtype=torch.float64)  # Σ exp(log w − top)
        self._second = torch.zeros(batch, dtype=torch.float64)  # Σ exp(2 (log w − top))

    def add(self, log_weights: Tensor) -> None:
        """Take in log weights of shape ``(batch, chunk)``; −∞ is a weight of zero."""
        log_weights = log_weights.detach().cpu().double()
        top = torch.maximum(self._top, log_weights.amax(1))
        shift = torch.where(torch.isinf(top), 0.0, top)  # every weight so far is zero: nothing to scale by
        scaled = (log_weights - shift[:, None]).exp_()
        shrink = (self._top - shift).exp()
        self._first = self._first * shrink + scaled.sum(1)
        self._second = self._second * shrink.square() + scaled.square_().sum(1)
        self._top = top
        self.samples += log_weights.shape[1]

    def log_mean(self) -> Tensor:
        """log of the mean weight: float64, shape ``(batch,)``."""
        return self._top + self._first.log() - math.log(self.samples)

    def effective_samples(self) -> Tensor:
        """(Σ w)² / Σ w², from 1 to the number of samples: shape ``(batch,)``."""
        return self._first.square() / self._second

    def variance(self) -> Tensor:
        """Variance of :meth:`log_mean` by the delta method, s² / (k w̄²): shape ``(batch,)``, NaN for one sample."""
        k = self.samples
        if k < 2:
            return torch.full_like(self._first, math.nan)
        return ((1 / self.effective_samples() - 1 / k) * k / (k - 1)).clamp_(min=0.0)


def importance_weighted(
    model: Model,
    dataset: Dataset,
    samples: int,
    *,
    chunk: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> ImportanceWeighted:
    """Mean over a dataset of the bound L_k with k importance samples, in nats per example.

    Args:
        samples: k; memory does not depend on it.
        chunk: samples of one example at a time; default 100, fewer for very large examples.
        seed: of the samples; an example's samples depend on it and on the example alone.
        batch_size: examples at a time; the default suits the device.
        progress: called with the number of samples done and of all, over all examples.

    Raises:
        Unsupported: the model has no importance weights.
        FloatingPointError: a weight is NaN or infinite, or all weights of an example are zero.

    Source: Burda, Grosse & Salakhutdinov 2015, arXiv:1509.00519, eq. 8.
    """
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    if not model.can("log_weights"):
        raise Unsupported(f"model {model.title()!r} has no importance weights (it has no latent variables to sample)")
    check_spaces(model, dataset)
    chunk = min(samples, chunk or max(1, min(CHUNK, CHUNK_CELLS // dataset.space.dims)))
    nats: list[Tensor] = []
    effective: list[Tensor] = []
    variances: list[Tensor] = []
    with evaluating(model) as device:
        batch_size = batch_size or max(1, decoder_rows(dataset.space, device) // chunk)
        for start, x, condition in device_batches(dataset, batch_size, device):
            noise = ExampleNoise(seed, x, condition)
            running = RunningWeights(len(x))
            while running.samples < samples:
                size = min(chunk, samples - running.samples)
                log_weights = model.log_weights(x, condition, size, noise)  # type: ignore[operator]
                if tuple(log_weights.shape) != (len(x), size):
                    expected, got = (len(x), size), tuple(log_weights.shape)
                    raise ValueError(f"log_weights: expected shape {expected} of model {model.title()!r}, got {got}")
                _check_weights(log_weights, start)
                running.add(log_weights)
                if progress is not None:
                    progress(start * samples + len(x) * running.samples, len(dataset) * samples)
            check_finite(running.log_mean()[:, None], ["importance weights"], start)
            nats.append(running.log_mean())
            effective.append(running.effective_samples())
            variances.append(running.variance())
    example_nats, n = torch.cat(nats), len(dataset)
    return ImportanceWeighted(
        samples=samples,
        n=n,
        nats=float(example_nats.mean()),
        standard_error=standard_error(example_nats),
        monte_carlo_error=math.sqrt(float(torch.cat(variances).sum())) / n,
        effective_samples=float(torch.cat(effective).mean()),
        example_nats=example_nats,
    )


def decoder_rows(space: Space, device: torch.device) -> int:
    """Latent samples that pass through a decoder at a time: a budget of memory, shared by all examples of a batch."""
    cells = CELLS["cpu" if device.type == "cpu" else "other"]
    return max(1, min(ROWS, cells // space.dims))


def _check_weights(log_weights: Tensor, start: int) -> None:
    wrong = torch.isnan(log_weights) | (log_weights == math.inf)
    if wrong.any():
        row, sample = (int(i) for i in wrong.nonzero()[0])
        value = log_weights[row, sample].item()
        raise FloatingPointError(f"a log importance weight is {value} for row {start + row} of the dataset")
