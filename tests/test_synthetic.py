"""Measures of sampled rows, against scipy, pandas and rows of which the answer is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ks_2samp

import likely
from documents import adult
from likely.contract import Column, Table
from likely.evaluation import synthetic

SPACE = Table(
    columns=(
        Column("number", "real", resolution=0.01),
        Column("other", "integer"),
        Column("kind", "categorical", levels=4),
        Column("label", "binary"),
    )
)


def _rows(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 4, n)
    number = np.round(rng.normal(2.0 * kind, 1.0), 2)
    label = rng.random(n) < 1 / (1 + np.exp(3 - number))
    return np.stack([number, rng.integers(0, 50, n), kind, label], 1).astype(float)


@pytest.fixture(scope="module")
def parts() -> dict[str, np.ndarray]:
    real = _rows(1500, 0)
    rng = np.random.default_rng(1)
    shuffled = np.stack([rng.permutation(real[:, j]) for j in range(4)], 1)
    return {"real": real, "fresh": _rows(900, 2), "same law": _rows(900, 3), "shuffled": shuffled, "copy": real[:900]}


def test_shapes_and_pairs_are_those_of_scipy_and_pandas(parts: dict[str, np.ndarray]) -> None:
    real, other = parts["real"].copy(), parts["fresh"].copy()
    real[::7, 0] = np.nan
    ks = [1 - ks_2samp(real[:, j][~np.isnan(real[:, j])], other[:, j]).statistic for j in (0, 1)]
    shares = [
        1
        - (pd.Series(real[:, j]).value_counts(normalize=True) - pd.Series(other[:, j]).value_counts(normalize=True))
        .abs()
        .sum()
        / 2
        for j in (2, 3)
    ]
    assert synthetic.column_shapes(real, other, SPACE) == pytest.approx(np.mean([*ks, *shares]))
    real = parts["real"]
    edges = np.histogram_bin_edges(real[:, 0], bins=10)
    edges[[0, -1]] = -np.inf, np.inf
    tables = [
        pd.crosstab(np.digitize(part[:, 0], edges), part[:, 2], normalize="all").stack() for part in (real, other)
    ]
    mixed = 1 - tables[0].sub(tables[1], fill_value=0).abs().sum() / 2
    correlations = [np.corrcoef(part[:, 0], part[:, 1])[0, 1] for part in (real, other)]
    scores = {(i, j): score for i, j, score in synthetic.pair_scores(real, other, SPACE)}
    assert scores[2, 0] == pytest.approx(mixed)
    assert scores[1, 0] == pytest.approx(1 - abs(correlations[0] - correlations[1]) / 2)
    assert synthetic.column_pairs(real, other, SPACE) == pytest.approx(np.mean(list(scores.values())))


def _measures(parts: dict[str, np.ndarray], name: str) -> dict[str, synthetic.Measure]:
    tensors = [torch.from_numpy(parts[key]) for key in ("real", "fresh", name)]
    return {m.name: m for m in synthetic.compare_samples(*tensors, SPACE)}


def test_each_kind_of_bad_sample_is_seen_by_some_measure(parts: dict[str, np.ndarray]) -> None:
    same, shuffled, copy = (_measures(parts, name) for name in ("same law", "shuffled", "copy"))
    for name in ("column shapes", "pairs of columns", "nearer to training rows", "detection", "efficacy"):
        assert abs(same[name].value - same[name].reference) < 0.08, name
    assert synthetic.column_shapes(parts["real"], parts["shuffled"], SPACE) == 1.0
    assert shuffled["column shapes"].value > shuffled["column shapes"].reference
    assert shuffled["pairs of columns"].value < same["pairs of columns"].value - 0.1
    assert shuffled["detection"].value < 0.5 < 0.85 < same["detection"].value
    assert shuffled["efficacy"].value < 0.6 < 0.85 < same["efficacy"].value
    # 450 of the 1,500 training rows are there to be near to: 0.3 of the copies meet their original, of the others half
    assert copy["nearer to training rows"].value == pytest.approx(0.3 + 0.7 / 2, abs=0.06)
    assert copy["exact copies"].value == 1.0
    assert same["exact copies"].value < 0.05
    far = _rows(900, 4)
    far[:, 0] += 5.0
    assert _measures({**parts, "far": far}, "far")["detection"].value < 0.3


def test_efficacy_does_not_depend_on_how_many_rows_are_held_out(parts: dict[str, np.ndarray]) -> None:
    few = {**parts, "fresh": parts["fresh"][:36]}
    found = _measures(few, "same law")["efficacy"]
    assert abs(found.value - found.reference) < 0.1
    # 36 rows are too few for a tree to split them
    starved = _measures({**few, "few": parts["same law"][:36]}, "few")["efficacy"]
    assert starved.value == 0.5


def test_target_is_a_category(parts: dict[str, np.ndarray]) -> None:
    with pytest.raises(ValueError, match=r"target: expected a column .*\(kind, label\), got 'number'"):
        x = torch.from_numpy(parts["fresh"])
        synthetic.compare_samples(x, x, x, SPACE, target="number")


def test_report_of_a_table_has_measures_and_pairs(tmp_path) -> None:  # type: ignore[no-untyped-def]
    adult(300, 0).to_csv(tmp_path / "adult.csv", index=False)
    fitted = likely.fit(tmp_path / "adult.csv", "mixture", components=3, test_fraction=0.2, progress=False)
    page = fitted.report(tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("column shapes", "nearer to training rows", "detection", "efficacy", "Pairs of columns"):
        assert name in page
    assert "farthest below held-out rows is" in page
