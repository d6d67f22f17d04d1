"""What a model's latent variables carry: the active units of Burda, Grosse & Salakhutdinov 2015."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from likely.contract import Model, Unsupported
from likely.data.dataset import Dataset
from likely.evaluation.heldout import check_spaces, default_batch_size, device_batches, evaluating

#: A unit is active if the variance of its mean embedding over the data exceeds this.
THRESHOLD = 0.01


@dataclass(frozen=True)
class ActiveUnits:
    """How many latent units change with the data.

    Args:
        active: number of units whose variance exceeds ``threshold``.
        latent: number of all units.
        threshold: variance above which a unit counts.
        variances: Var_x(E_q[u]) of every unit, float64, shape ``(latent,)``.
    """

    active: int
    latent: int
    threshold: float
    variances: Tensor = field(repr=False)


def active_units(
    model: Model, dataset: Dataset, *, threshold: float = THRESHOLD, batch_size: int | None = None
) -> ActiveUnits:
    """Number of latent units u with Var_x(E_{q(u|x)}[u]) above the threshold.

    Args:
        threshold: 0.01, as in the paper, for latent variables whose prior has unit variance.
        batch_size: examples at a time; the value does not depend on it.

    Raises:
        Unsupported: the model has no ``encode``.

    Source: Burda, Grosse & Salakhutdinov 2015, arXiv:1509.00519, section 5 (A_u > 10⁻²).
    """
    if not model.can("encode"):
        raise Unsupported(f"model {model.name()!r} has no latent variables to encode")
    check_spaces(model, dataset)
    count, mean, squares = 0, torch.zeros(()), torch.zeros(())
    with evaluating(model) as device:
        for _, x, condition in device_batches(dataset, batch_size or default_batch_size(dataset.space), device):
            code = model.encode(x, condition)  # type: ignore[operator]
            code = code.detach().cpu().double().reshape(len(x), -1)
            # Chan, Golub & LeVeque 1983: join the sums of squared deviations of two sets
            total, batch_mean = count + len(code), code.mean(0)
            delta = batch_mean - mean
            squares = squares + (code - batch_mean).square().sum(0) + delta.square() * (count * len(code) / total)
            mean = mean + delta * (len(code) / total)
            count = total
    variances = squares / count
    return ActiveUnits(int((variances > threshold).sum()), len(variances), threshold, variances)
