"""What the simplest models make of the same data: the floor that every other model must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from likely.contract import Unsupported
from likely.data.dataset import Dataset, Passes
from likely.evaluation.heldout import HeldOut, Progress, held_out
from likely.models import find

#: Per-dimension marginals, and a full-covariance Gaussian, each in closed form.
BASELINES = ("independent", "gaussian")


@dataclass(frozen=True)
class Baseline:
    """A simple model fitted to the training set and evaluated on the held-out set.

    Args:
        name: name of the model.
        result: its held-out number, or None if it is not defined on these data.
        note: why it has no number, or what to know about it.
    """

    name: str
    result: HeldOut | None
    note: str = ""


def fit_baselines(
    train_set: Dataset,
    dataset: Dataset,
    *,
    names: Sequence[str] = BASELINES,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> list[Baseline]:
    """Fit simple models to the training set and evaluate them on the held-out set.

    A model that takes no condition is fitted without it, which its note says; a model that is not defined on the space
    has a note that says why, and no number.

    Args:
        names: closed-form models of ``likely.models``.
        seed: of dynamic binarisation in training, and of whatever a baseline draws in evaluation.
        batch_size: examples at a time in the evaluation.
        progress: called with the number of baselines done and of all.
    """
    fitted = []
    for done, name in enumerate(names):
        if progress is not None:
            progress(done, len(names))
        fitted.append(_fit(name, train_set, dataset, seed, batch_size))
    if progress is not None:
        progress(len(names), len(names))
    return fitted


def _fit(name: str, train_set: Dataset, dataset: Dataset, seed: int, batch_size: int | None) -> Baseline:
    cls, note = find(name), ""
    if dataset.condition_space is not None and not cls.conditional:
        train_set = replace(train_set, condition=None, condition_space=None)
        dataset = replace(dataset, condition=None, condition_space=None)
        note = "does not see the condition"
    try:
        if dataset.condition_space is None:
            model = cls(dataset.space)
        else:
            model = cls(dataset.space, dataset.condition_space)
        passes = Passes(train_set, seed=seed)
        model.initialise(passes)
        model.estimate(passes)
        result = held_out(model, dataset, seed=seed, batch_size=batch_size)
    except (Unsupported, FloatingPointError, torch.linalg.LinAlgError) as reason:
        return Baseline(name, None, str(reason))
    return Baseline(name, result, note)
