"""What a model's latent variables carry: active units, paths between examples, directions of attributes."""

from __future__ import annotations

from collections.abc import Sequence
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
    _hold_able(model, "encode")
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


def interpolate(model: Model, first: Tensor, second: Tensor, steps: int = 8, condition: Tensor | None = None) -> Tensor:
    """Examples on the straight line between two in the latent space, both ends included.

    Of a flow the ends are the examples themselves, of a model that compresses their reconstructions.

    Args:
        first, second: batches of the space, shape ``(batch, *shape)``.
        steps: number of points, at least 2.
        condition: what both are conditioned on, or None.

    Returns:
        Shape ``(steps, batch, *shape)``.

    Raises:
        Unsupported: the model has no ``encode`` or no ``decode``.

    Source: Kingma & Dhariwal 2018, arXiv 1807.03039, section 5 ("synthesis and interpolation").
    """
    if steps < 2:
        raise ValueError(f"steps: expected at least 2, got {steps}")
    _hold_able(model, "encode", "decode")
    with evaluating(model) as device:
        given = None if condition is None else condition.to(device)
        start, end = (model.encode(x.to(device), given) for x in (first, second))  # type: ignore[operator]
        shares = torch.linspace(0.0, 1.0, steps).tolist()
        return torch.stack([model.decode(torch.lerp(start, end, share), given).cpu() for share in shares])  # type: ignore[operator]


def attribute_direction(model: Model, having: Dataset, lacking: Dataset, batch_size: int | None = None) -> Tensor:
    """Mean embedding of the examples that have an attribute less that of those that lack it: shape ``(latent,)``.

    Raises:
        Unsupported: the model has no ``encode``.

    Source: Kingma & Dhariwal 2018, arXiv 1807.03039, section 5 ("semantic manipulation").
    """
    _hold_able(model, "encode")
    means = []
    for dataset in (having, lacking):
        check_spaces(model, dataset)
        total = torch.zeros(())
        with evaluating(model) as device:
            for _, x, condition in device_batches(dataset, batch_size or default_batch_size(dataset.space), device):
                total = total + model.encode(x, condition).cpu().double().sum(0)  # type: ignore[operator]
        means.append(total / len(dataset))
    return means[0] - means[1]


def move_along(
    model: Model, x: Tensor, direction: Tensor, amounts: Sequence[float], condition: Tensor | None = None
) -> Tensor:
    """Examples moved along a direction of the latent space: shape ``(len(amounts), batch, *shape)``.

    Args:
        direction: from :func:`attribute_direction`, shape ``(latent,)``.
        amounts: how far; 0 leaves the examples (or their reconstructions), 1 adds the whole difference.

    Raises:
        Unsupported: the model has no ``encode`` or no ``decode``.
    """
    _hold_able(model, "encode", "decode")
    with evaluating(model) as device:
        given = None if condition is None else condition.to(device)
        z = model.encode(x.to(device), given)  # type: ignore[operator]
        step = direction.to(z)
        return torch.stack([model.decode(z + amount * step, given).cpu() for amount in amounts])  # type: ignore[operator]


def _hold_able(model: Model, *abilities: str) -> None:
    for ability in abilities:
        if not model.can(ability):
            raise Unsupported(f"model {model.title()!r} has no latent variables to {ability}")
