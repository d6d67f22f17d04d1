"""Scores of single examples: nats, which cells they come from, and how rare so low a value is."""

from __future__ import annotations

import torch
from torch import Tensor

from likely.contract import Model, Unsupported
from likely.data.dataset import Dataset
from likely.evaluation.heldout import (
    ExampleNoise,
    Progress,
    check_spaces,
    default_batch_size,
    device_batches,
    evaluating,
    held_out,
)

#: Relative difference up to which two log-likelihoods are equal.
_TIE = 1e-9


def example_nats(
    model: Model,
    dataset: Dataset,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """log p(x) of every example, or the model's bound on it, in nats: float64, shape ``(n,)``.

    The value of an example does not depend on the others, on their order, or on ``batch_size``.
    """
    return held_out(model, dataset, seed=seed, batch_size=batch_size, progress=progress).example_nats


def column_nats(
    model: Model,
    dataset: Dataset,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """What every cell adds to the model's bound, in nats: float64, shape ``(n, dims)``; a missing cell adds 0.

    Raises:
        Unsupported: the model does not say where its nats come from.
        FloatingPointError: a value is not finite; the message names the row and the cell.
    """
    if not model.can("column_nats"):
        raise Unsupported(f"model {model.title()!r} cannot tell what each column adds to the likelihood")
    check_spaces(model, dataset)
    columns = getattr(dataset.space, "columns", None)
    rows: list[Tensor] = []
    with evaluating(model) as device:
        for start, x, condition in device_batches(dataset, batch_size or default_batch_size(dataset.space), device):
            cells = model.column_nats(x, condition, ExampleNoise(seed, x, condition))  # type: ignore[operator]
            cells = cells.detach().cpu().double().reshape(len(x), -1)
            wrong = ~torch.isfinite(cells)
            if wrong.any():
                row, cell = (int(i) for i in wrong.nonzero()[0])
                where = f"column {columns[cell].name!r}" if columns is not None else f"cell {cell}"
                raise FloatingPointError(f"{where} adds {cells[row, cell].item()} nats to row {start + row}")
            rows.append(cells)
            if progress is not None:
                progress(start + len(x), len(dataset))
    return torch.cat(rows)


def tail_probability(reference_nats: Tensor, nats: Tensor) -> Tensor:
    """How rare so low a likelihood is: (1 + number of reference values ≤ nats) / (1 + number of reference values).

    A conformal p-value: if an example comes from the source of the reference examples, and the model was not fitted to
    these, then P(value ≤ a) ≤ a for every a.  Small values are outliers.  With the *training* examples as reference a
    model that has overfitted gives values that are too small.  Values that differ by no more than rounding, as those of
    one example in batches of different sizes, count as equal.

    >>> tail_probability(torch.tensor([-3.0, -2.0, -1.0]), torch.tensor([-9.0, -2.0, 0.0])).tolist()
    [0.25, 0.75, 1.0]

    Args:
        reference_nats: nats of the reference examples, shape ``(m,)``.
        nats: nats of the examples in question, any shape.

    Returns:
        float64, the shape of ``nats``; between 1 / (1 + m) and 1.

    Source: Bates, Candès, Lei, Romano & Sesia 2021, arXiv:2104.08279.
    """
    if reference_nats.dim() != 1 or len(reference_nats) == 0:
        raise ValueError(f"reference_nats: expected shape (m,) with m > 0, got {tuple(reference_nats.shape)}")
    for name, values in (("reference_nats", reference_nats), ("nats", nats)):
        if torch.isnan(values).any():
            raise ValueError(
                f"{name}: expected numbers, got NaN at position {int(torch.isnan(values).nonzero()[0][0])}"
            )
    ordered = reference_nats.double().cpu().sort().values
    values = nats.double().cpu()
    values = values + _TIE * values.abs().clamp(min=1.0)
    below = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (1.0 + below.double()) / (1.0 + len(ordered))
