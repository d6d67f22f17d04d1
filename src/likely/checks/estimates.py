"""Expectations of noisy log-probabilities, example by example, with the errors of their exponentials."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from likely.checks.outcome import require
from likely.checks.points import Points
from likely.contract import Model
from likely.noise import KeyedNoise, Noise, content_keys

#: Standard errors beyond which a difference counts: a two-sided probability below 10⁻⁶ for a normal error.
SIGMAS = 5.0
#: Evaluations of the model that one sum over a space costs, draws of an example at the least, and rows of one batch.
EVALUATIONS, DRAWS, ROWS = 2**16, 16, 2**13


@dataclass(frozen=True)
class Estimate:
    """A log-probability, or a bound on one, of every example of a batch.

    Args:
        kind: that of the bound.
        mean: mean over the noise, nats, float64, shape ``(batch,)``.
        variance: of that mean; zero where the value has no noise.
        log_p: log of the exponential that is to be summed over a space, nats.
        relative: standard error of that exponential, divided by it.
    """

    kind: str
    mean: Tensor
    variance: Tensor
    log_p: Tensor
    relative: Tensor


def own_noise(seed: int, x: Tensor, condition: Tensor | None) -> Noise:
    """Noise that belongs to the example's content."""
    return KeyedNoise(seed, content_keys(x, condition))


def row_noise(seed: int, n: int) -> Noise:
    """Independent noise for every row, also where rows are equal: what a standard error supposes."""
    return KeyedNoise(seed, torch.arange(n))


def repeat(condition: Tensor | None, n: int) -> Tensor | None:
    """The one row of a condition for ``n`` examples."""
    return None if condition is None else condition.expand(n, *condition.shape[1:])


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of independent values and its standard error."""
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


@torch.no_grad()
def evaluate_bound(model: Model, x: Tensor, condition: Tensor | None, seed: int) -> Estimate:
    """Expectation of the bound over its own noise for every example, under one row of a condition.

    The exponential of a mean b̄ of noisy values overestimates exp(E b) by half its variance (to first order), which
    ``log_p`` takes off.
    """
    n = len(x)
    bound = model.bound(x, repeat(condition, n), row_noise(seed, n))
    again = model.bound(x, repeat(condition, n), row_noise(seed + 1, n))
    if bound.kind == "exact" or torch.equal(bound.nats, again.nats):
        nats, zero = bound.nats.double(), torch.zeros(n, dtype=torch.float64)
        return Estimate(bound.kind, nats, zero, nats, zero)
    together = max(1, ROWS // n)
    rounds = -(-max(DRAWS, EVALUATIONS // n) // together)
    many, conditions = x.repeat(together, *[1] * (x.dim() - 1)), repeat(condition, n * together)
    values = torch.cat(
        [
            model.bound(many, conditions, row_noise(seed + r, n * together)).nats.double().reshape(together, n)
            for r in range(rounds)
        ]
    )
    mean, variance = values.mean(0), values.var(0) / len(values)
    hopeless = mean == -math.inf  # where the bound is −∞ its exponential is 0, without an error
    variance = torch.where(hopeless, 0.0, variance)
    return Estimate(bound.kind, mean, variance, mean - variance / 2, variance.sqrt())


@torch.no_grad()
def weigh(model: Model, x: Tensor, condition: Tensor | None, seed: int) -> Estimate:
    """Importance weights: their mean log (a one-sample bound) and the log of their mean, an unbiased p(x)."""
    n = len(x)
    draws = max(2 * DRAWS, EVALUATIONS // n)
    log_w = model.log_weights(x, repeat(condition, n), draws, row_noise(seed + 99, n)).double()  # type: ignore[operator]
    require(tuple(log_w.shape) == (n, draws), f"log_weights: expected shape {(n, draws)}, got {tuple(log_w.shape)}")
    log_p = log_w.logsumexp(1) - math.log(draws)
    relative = (log_w - log_p[:, None]).exp().std(1) / math.sqrt(draws)
    return Estimate("exact", log_w.mean(1), log_w.var(1) / draws, log_p, relative)


def mass_of(points: Points, estimate: Estimate) -> tuple[float, float]:
    """Σ exp over the space, and its standard error from points and noise together.

    Raises:
        CheckFailed: a value is NaN or +∞.
    """
    wrong = torch.isnan(estimate.log_p) | (estimate.log_p == math.inf)
    if wrong.any():
        index = int(wrong.nonzero()[0])
        cells = points.x[index].flatten().tolist()
        require(False, f"expected a finite number of nats for {cells}, got {float(estimate.log_p[index])}")
    p = estimate.log_p.exp()
    mass, error = points.integrate(p)
    if points.replicates == 1:
        error = float((points.weights * p * estimate.relative).square().sum().sqrt())
    return mass, error  # replicates differ by their noise too


def tells(points: Points, estimate: Estimate) -> bool:
    """Whether the values are known well enough, where the mass is, to be summed.

    Before training a posterior may lie far from the truth, and the mean of a few hundred importance weights far below
    p(x) without showing it; before training a density may lie far from the points.
    """
    if points.replicates > 1:
        return mass_of(points, estimate)[1] < 0.03
    p = estimate.log_p.exp()
    return float(p[estimate.relative > 0.1].sum()) < 0.02 * float(p.sum())


def tolerance(points: Points, error: float) -> float:
    """What a mass may differ from one: 10⁻⁵ where everything is enumerated, and the cut tails where it is not."""
    return SIGMAS * error + (1e-5 if points.replicates == 1 else 2e-3)
