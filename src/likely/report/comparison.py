"""How far sampled columns lie from real ones, and how far chance alone would put them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from likely.contract import Space, Table

#: Random halvings of the real column over which a distance and its reference are averaged.
SPLITS = 20
#: Rows that are compared, at most: more would not move a distance that is worth showing.
ROWS = 10_000
#: Categories that are named, at most; the others are added up.
NAMED = 8


def ks_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Kolmogorov-Smirnov distance sup |F₁ − F₂| of two samples of numbers, between 0 and 1.

    >>> ks_distance(np.array([1.0, 2.0]), np.array([2.0, 3.0]))
    0.5
    """
    first, second = np.sort(first), np.sort(second)
    points = np.concatenate([first, second])
    below = [np.searchsorted(values, points, side="right") / len(values) for values in (first, second)]
    return float(np.abs(below[0] - below[1]).max())


def total_variation(first: np.ndarray, second: np.ndarray) -> float:
    """Total variation distance ½ Σ |p₁ − p₂| of the categories' shares in two samples, between 0 and 1.

    >>> total_variation(np.array(["a", "b"]), np.array(["a", "a"]))
    0.5
    """
    codes = np.unique(np.concatenate([first, second]), return_inverse=True)[1]
    shares = [np.bincount(part, minlength=codes.max() + 1) / len(part) for part in np.split(codes, [len(first)])]
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def distance_and_reference(
    real: np.ndarray, sampled: np.ndarray, distance: Callable[[np.ndarray, np.ndarray], float], seed: int = 0
) -> tuple[float, float]:
    """Distance of the sampled values from the real ones, and of the real ones from each other.

    The real column is halved at random; the first half is held against as many sampled values as the second half has,
    and against the second half.  All three have one size, so that chance moves both distances alike.  Means over
    :data:`SPLITS` halvings; NaN if there are too few values.
    """
    size = min(len(real) // 2, len(sampled))
    if size == 0:
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    distances = []
    for _ in range(SPLITS):
        order = random.permutation(len(real))
        half, other = real[order[:size]], real[order[size : 2 * size]]
        drawn = sampled[random.permutation(len(sampled))[:size]]
        distances.append((distance(half, drawn), distance(half, other)))
    value, reference = np.mean(distances, axis=0)
    return float(value), float(reference)


@dataclass(frozen=True)
class ColumnComparison:
    """One column, real beside sampled.

    Args:
        name: of the column.
        numeric: whether it holds numbers; otherwise categories.
        statistic: what ``value`` and ``reference`` are.
        value: distance of the sampled from the real values.
        reference: distance of two halves of the real values from each other.
        real, sampled: the values, without missing cells.
        missing: share of missing cells among the real and the sampled values.
    """

    name: str
    numeric: bool
    statistic: str
    value: float
    reference: float
    missing: tuple[float, float]
    real: np.ndarray = field(repr=False)
    sampled: np.ndarray = field(repr=False)

    @property
    def excess(self) -> float:
        """How much farther the sampled values lie than chance alone would put them."""
        return self.value - self.reference if self.value == self.value else 0.0

    def shares(self) -> list[tuple[str, float, float]]:
        """The most frequent categories with their share among the real and the sampled values."""
        names, codes = np.unique(np.concatenate([self.real, self.sampled]), return_inverse=True)
        parts = np.split(codes, [len(self.real)])
        real, sampled = (np.bincount(part, minlength=len(names)) / max(1, len(part)) for part in parts)
        order = np.argsort(-np.maximum(real, sampled), kind="stable")
        keep = order if len(names) <= NAMED + 1 else order[:NAMED]
        rows = [(str(names[i]), float(real[i]), float(sampled[i])) for i in keep]
        if len(keep) < len(names):
            rest = order[NAMED:]
            rows.append((f"{len(rest):,} others", float(real[rest].sum()), float(sampled[rest].sum())))
        return rows


def compare_columns(real: Any, sampled: Any, space: Space | None = None) -> list[ColumnComparison]:
    """Every column of two tables of the same columns, in their order.

    Args:
        real, sampled: pandas DataFrames, or arrays of shape ``(n, columns)``.
        space: where it is a table, its columns say which are categories.
    """
    coded = {c.name for c in space.columns if c.coded} if isinstance(space, Table) else set()
    comparisons = []
    for name, first, second in _columns(real, sampled):
        values, absent, numeric = zip(*(_values(part, name in coded) for part in (first, second)))
        if not all(numeric):
            values = tuple(part.astype(str) for part in values)
        function = ks_distance if all(numeric) else total_variation
        value, reference = distance_and_reference(values[0], values[1], function)
        comparisons.append(
            ColumnComparison(
                name=name,
                numeric=all(numeric),
                statistic="Kolmogorov-Smirnov distance" if all(numeric) else "total variation distance",
                value=value,
                reference=reference,
                missing=(float(absent[0].mean()), float(absent[1].mean())),
                real=values[0],
                sampled=values[1],
            )
        )
    return comparisons


def _columns(real: Any, sampled: Any) -> list[tuple[str, Any, Any]]:
    """Pairs of columns with their names, cut to the first :data:`ROWS` rows."""
    if hasattr(real, "columns"):
        absent = [name for name in real.columns if name not in sampled.columns]
        if absent:
            raise ValueError(f"columns_sampled: expected the columns of columns_real, lacks {absent}")
        return [(str(name), real[name].iloc[:ROWS], sampled[name].iloc[:ROWS]) for name in real.columns]
    first, second = (np.asarray(part)[:ROWS].reshape(min(len(part), ROWS), -1) for part in (real, sampled))
    if first.shape[1] != second.shape[1]:
        raise ValueError(f"columns_sampled: expected {first.shape[1]} columns, got {second.shape[1]}")
    return [(f"dimension {j}", first[:, j], second[:, j]) for j in range(first.shape[1])]


def _values(column: Any, coded: bool) -> tuple[np.ndarray, np.ndarray, bool]:
    """Observed values (float64 or str), which cells are missing, and whether the values are numbers."""
    kind = getattr(getattr(column, "dtype", None), "kind", "O")
    if hasattr(column, "isna"):
        absent = np.asarray(column.isna())
        observed = column[~absent]
        if kind == "M" and not coded:  # dates, as years
            days = observed.dt.day_of_year + (observed.dt.hour + observed.dt.minute / 60) / 24
            return np.asarray(observed.dt.year + (days - 1) / 365.25, dtype=np.float64), absent, True
    else:
        values = np.asarray(column)
        absent = np.isnan(values) if values.dtype.kind == "f" else np.zeros(len(values), dtype=bool)
        observed = values[~absent]
    if kind in "iuf" and not coded:
        return np.asarray(observed, dtype=np.float64), absent, True
    return np.asarray([str(value) for value in observed], dtype=object).astype(str), absent, False
