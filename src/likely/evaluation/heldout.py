"""The held-out number: what a model says, on average, of examples that it has not seen.

Every example weighs the same, sums are kept in float64, and the noise that a model draws belongs to the example
(:class:`~likely.noise.KeyedNoise`): neither batch size nor order nor the other examples move a value, and the errors
of different examples are independent, as a standard error supposes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from likely.contract import Kind, Model, Space, weakest
from likely.data.dataset import Dataset
from likely.noise import KeyedNoise, content_keys

#: Cells of a batch when the caller names no batch size: about 16 MB of float32.
CELLS = 2**22
#: Examples of a batch when the caller names no batch size: more no longer makes matrix products faster.
EXAMPLES = 1024

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class HeldOut:
    """Mean of a bound over the examples of a dataset.

    Args:
        kind: what the number is: ``exact``, ``lower bound`` or ``estimate``.
        n: number of examples.
        nats: mean nats per example.
        standard_error: standard error of ``nats`` over the examples (nats); NaN for a single example.
        parts: mean of every part of the bound (nats); they sum to ``nats``.
        example_nats: nats of every example in the dataset's order, float64, shape ``(n,)``.
    """

    kind: Kind
    n: int
    nats: float
    standard_error: float
    parts: dict[str, float]
    example_nats: Tensor = field(repr=False)


def held_out(
    model: Model,
    dataset: Dataset,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> HeldOut:
    """Mean of the model's bound over a dataset, in nats per example, with its standard error.

    >>> from likely.contract import Binary, Bound
    >>> class Coins(Model):
    ...     spaces = (Binary,)
    ...     def bound(self, x, condition=None, noise=None):
    ...         return Bound("exact", {"coins": torch.full((len(x),), -4 * math.log(2))})
    >>> result = held_out(Coins(Binary((4,))), Dataset(Binary((4,)), torch.zeros(10, 4)))
    >>> result.kind, round(result.nats, 4), result.standard_error
    ('exact', -2.7726, 0.0)

    Args:
        model: evaluated in eval mode and without gradients; its modes are put back afterwards.
        seed: of the noise that the model draws; the global random state is neither read nor changed.
        batch_size: examples at a time; it changes speed and memory, not the value.
        progress: called with the number of examples done and of all.

    Raises:
        ValueError: the dataset is empty or not of the model's space.
        FloatingPointError: a part of the bound is not finite; the message names the part and the row.
    """
    check_spaces(model, dataset)
    n, batch_size = len(dataset), batch_size or default_batch_size(dataset.space)
    kinds: list[Kind] = []
    names: list[str] = []
    columns: list[Tensor] = []  # parts side by side, float64, (batch, parts)
    with evaluating(model) as device:
        for start, x, condition in device_batches(dataset, batch_size, device):
            bound = model.bound(x, condition, ExampleNoise(seed, x, condition))
            if columns and list(bound.parts) != names:
                raise ValueError(f"{model.title()}: expected the parts {names} in every batch, got {list(bound.parts)}")
            names = list(bound.parts)
            values = torch.stack([part.detach().cpu().double() for part in bound.parts.values()], 1)
            check_finite(values, names, start)
            kinds.append(bound.kind)
            columns.append(values)
            if progress is not None:
                progress(start + len(x), n)
    values = torch.cat(columns)
    example_nats = values.sum(1)
    return HeldOut(
        kind=weakest(*kinds),
        n=n,
        nats=float(example_nats.mean()),
        standard_error=standard_error(example_nats),
        parts=dict(zip(names, values.mean(0).tolist())),
        example_nats=example_nats,
    )


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of independent values, s / √n with s² the unbiased variance; NaN for one value.

    >>> standard_error(torch.tensor([1.0, 3.0]))
    1.0
    """
    return float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def default_batch_size(space: Space) -> int:
    """Examples that are evaluated at a time when the caller does not say."""
    return max(1, min(EXAMPLES, CELLS // space.dims))


def check_spaces(model: Model, dataset: Dataset) -> None:
    """Raise ``ValueError`` if the dataset is empty or is not of the model's spaces."""
    if len(dataset) == 0:
        raise ValueError("dataset: expected at least one example, got none")
    if dataset.space != model.space:
        raise ValueError(f"dataset: expected examples of the model's space {model.space}, got {dataset.space}")
    if dataset.condition_space != model.condition:
        raise ValueError(f"dataset: expected a condition in {model.condition}, got {dataset.condition_space}")


def check_finite(values: Tensor, names: Sequence[str], start: int) -> None:
    """Raise ``FloatingPointError`` if a value is not finite.

    Args:
        values: shape ``(batch, parts)``.
        names: name of every part.
        start: row of the dataset on which the batch starts.
    """
    wrong = ~torch.isfinite(values)
    if wrong.any():
        row, part = (int(i) for i in wrong.nonzero()[0])
        raise FloatingPointError(
            f"part {names[part]!r} of the bound is {values[row, part].item()} for row {start + row} of the dataset"
        )


@contextmanager
def evaluating(model: Model) -> Iterator[torch.device]:
    """The model in eval mode and without gradients, giving its device; every module's mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    tensor = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))
    try:
        model.eval()
        with torch.no_grad():
            yield tensor.device
    finally:
        for module, training in modes:
            module.training = training


def device_batches(
    dataset: Dataset, batch_size: int, device: torch.device
) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """All batches in the stored order, on the device: ``(first row, x, condition)``."""
    start = 0
    for x, condition in dataset.batches(batch_size):
        yield start, x.to(device), None if condition is None else condition.to(device)
        start += len(x)


class ExampleNoise:
    """Keyed noise of a batch, whose keys are hashed from the examples at the first draw.

    A model that draws nothing pays nothing.

    Args:
        seed: seed of the evaluation.
        x: the batch.
        condition: the condition of each example, or None.
    """

    def __init__(self, seed: int, x: Tensor, condition: Tensor | None = None) -> None:
        self._seed, self._batch = seed, (x, condition)
        self._noise: KeyedNoise | None = None

    def _keyed(self) -> KeyedNoise:
        if self._noise is None:
            self._noise = KeyedNoise(self._seed, content_keys(*self._batch))
        return self._noise

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._keyed().normal(shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return self._keyed().uniform(shape)
