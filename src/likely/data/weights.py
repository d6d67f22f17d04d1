"""Row weights: a row of weight 2 counts as two rows, in training, in early stopping and in evaluation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from likely.data.columns import TableColumn
from likely.data.errors import DataError
from likely.data.schema import Schema
from likely.data.tables import TableForm

#: A weighted set has at most so many times as many rows as the plain one.
MOST = 10


def read_weights(schema: Schema, data: Any, name: str, **options: Any) -> Tensor:
    """The weights of all rows, from a column of the table that is not modelled: float64, shape ``(n,)``.

    Args:
        schema: of the table; ``name`` is one of its columns, set aside.
        options: as for :meth:`~likely.data.schema.Schema.read`.

    Raises:
        DataError: there is no such column, or a weight is missing, negative or not finite.
    """
    form = schema.form
    if not isinstance(form, TableForm):
        raise DataError(f"weights: expected a table with a column {name!r}, got {form.form} data")
    names = [column.name for column in form.columns]
    if name not in names:
        raise DataError(f"weights: expected the name of a column, got {name!r} (columns: {', '.join(names)})")
    columns = tuple(
        TableColumn(c.name, kind="real", label=c.label) if c.name == name else replace(c, role="ignore")
        for c in form.columns
    )
    weights = Schema(replace(form, columns=columns)).read(data, **options).x[:, 0].double()
    if (weights < 0).any() or not weights.sum() > 0:
        row = int(weights.argmin())
        raise DataError(f"weights: expected numbers from 0 up, not all 0, got {weights[row].item():g} in row {row}")
    return weights


def weighted_rows(weights: Tensor) -> Tensor:
    """Row numbers, each as often as its weight says: int64, sorted.

    Whole weights are kept exactly while the rows become no more than ten times as many; else a row comes within one of
    its due number of times (systematic resampling: equally spaced points on the sum of the weights).

    >>> weighted_rows(torch.tensor([1.0, 0.0, 3.0])).tolist()
    [0, 2, 2, 2]
    >>> weighted_rows(torch.tensor([0.5, 0.25])).tolist()
    [0, 0, 1]
    """
    total = weights.sum()
    least = weights[weights > 0].min()
    count = min(round(float(total / least)), MOST * len(weights))
    points = (torch.arange(count, dtype=torch.float64) + 0.5) * (total / count)
    return torch.searchsorted(weights.double().cumsum(0), points, right=True).clamp(max=len(weights) - 1)
