"""How good sampled rows of a table are, each measure beside its value for real rows that the model has not seen.

No single number says it: columns shuffled one by one have perfect column shapes, a copy of the training rows has
perfect everything and gives every secret away.  So look at all of them together.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from likely.contract import Table

#: Rows that distances are taken of, columns whose pairs are looked at, bins of a number in a pair: at most.
ROWS, PAIRED, BINS = 2_000, 40, 10
#: Categories of a column that a classifier sees; the rarer ones are one.
SEEN = 30


@dataclass(frozen=True)
class Measure:
    """One measure of sampled rows.

    Args:
        name: what is measured.
        value: for the sampled rows; NaN where it could not be taken, of which ``note`` says why.
        reference: for held-out real rows in their place.
        best: which value the best samples have.
        note: what the number means.
    """

    name: str
    value: float
    reference: float
    best: float
    note: str

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def compare_samples(
    train: Tensor, held_out: Tensor, sampled: Tensor, space: Table, *, target: str | None = None, seed: int = 0
) -> list[Measure]:
    """All measures of sampled rows.

    Args:
        train: rows that the model was fitted to, shape ``(n, columns)``, NaN where missing.
        held_out: real rows that it has not seen.
        sampled: rows that it drew, best as many as ``train`` has: efficacy is of as many rows as there are training
            rows, the rest of as many as are held out, for a small sample differs by chance alone.
        target: coded column that is predicted from the others in "efficacy"; by default the last one with two to twenty
            categories.
        seed: of subsamples and classifiers.
    """
    real, rest, drawn = (part.double().numpy() for part in (train, held_out, sampled))
    random = np.random.default_rng(seed)

    def both(measure: Callable[[np.ndarray, np.ndarray], float]) -> tuple[float, float]:
        return measure(real, drawn[: len(rest)]), measure(real, rest)

    found = [
        Measure("column shapes", *both(lambda a, b: column_shapes(a, b, space)), 1.0,
                "1 − Kolmogorov-Smirnov distance of numbers, 1 − total variation of categories; mean over columns"),
        Measure("pairs of columns", *both(lambda a, b: column_pairs(a, b, space)), 1.0,
                "1 − half the difference of correlations, 1 − total variation of joint categories; mean over pairs"),
        Measure("nearer to training rows", *nearer_to_train(real, rest, drawn, space, random), 0.5,
                "share of rows nearer to a training row than to a held-out row; above one half they leak"),
        Measure("exact copies", copies(drawn, real), copies(rest, real), 0.0,
                "share of rows that are also training rows; duplicates are usual in tables of few categories"),
    ]  # fmt: skip
    try:
        importlib.import_module("sklearn")
    except ImportError:
        return found
    found.append(
        Measure("detection", *both(lambda a, b: detection(a, b, space, seed)), 1.0,
                "1: boosted trees cannot tell the rows from training rows; 0: they always can")
    )  # fmt: skip
    names = [column.name for column in space.columns]
    usable = [c.name for c in space.columns if c.coded and 2 <= (c.levels or 0) <= 20]
    if target is not None and target not in usable:
        raise ValueError(
            f"target: expected a column of 2 to 20 categories ({', '.join(usable) or 'none'}), got {target!r}"
        )
    if usable:
        place = names.index(target or usable[-1])
        own, usual = (efficacy(part, rest, place, space, seed) for part in (drawn[: len(real)], real))
        note = f"area under the ROC curve for {names[place]!r} on held-out rows; boosted trees trained on the rows"
        found.append(Measure("efficacy", own, usual, 1.0, note))
    return found


# Columns and pairs ---------------------------------------------------------------------------------------------------


def column_shapes(real: np.ndarray, other: np.ndarray, space: Table) -> float:
    """Mean over the columns of 1 − distance between the two columns' laws, missing cells left out.

    The distance is Kolmogorov and Smirnov's for numbers, the total variation for categories.
    """
    return float(np.mean([1.0 - _distance(real[:, j], other[:, j], c.numeric) for j, c in enumerate(space.columns)]))


def _distance(first: np.ndarray, second: np.ndarray, numeric: bool) -> float:
    first, second = first[~np.isnan(first)], second[~np.isnan(second)]
    if not len(first) or not len(second):
        return float(len(first) != len(second))
    values, codes = np.unique(np.concatenate([first, second]), return_inverse=True)
    shares = [np.bincount(c, minlength=len(values)) / len(c) for c in np.split(codes, [len(first)])]
    difference = shares[0] - shares[1]
    return float(np.abs(difference.cumsum()).max() if numeric else np.abs(difference).sum() / 2)


def column_pairs(real: Tensor | np.ndarray, other: Tensor | np.ndarray, space: Table) -> float:
    """Mean over the pairs of columns of how alike their dependence is, between 0 and 1.

    For two numbers 1 − |ρ₁ − ρ₂| / 2 with Pearson's correlations ρ; otherwise 1 − total variation of the joint
    categories, numbers being cut into ten bins of equal width on the real column's range, the outer ones open (as
    SDMetrics' CorrelationSimilarity and ContingencySimilarity).
    """
    scores = [score for *_, score in pair_scores(real, other, space)]
    return float(np.mean(scores)) if scores else float("nan")


def pair_scores(
    real: Tensor | np.ndarray, other: Tensor | np.ndarray, space: Table
) -> Iterator[tuple[int, int, float]]:
    """Places and score of every pair of columns, of the first :data:`PAIRED` columns; see :func:`column_pairs`."""
    real, other = np.asarray(real, dtype=np.float64), np.asarray(other, dtype=np.float64)
    columns = space.columns[:PAIRED]
    binned = [
        (_binned(real[:, j], real[:, j]), _binned(real[:, j], other[:, j])) if c.numeric else (real[:, j], other[:, j])
        for j, c in enumerate(columns)
    ]
    for i in range(len(columns)):
        for j in range(i):
            if columns[i].numeric and columns[j].numeric:
                found = [_correlation(part[:, i], part[:, j]) for part in (real, other)]
                score = 1.0 - abs(found[0] - found[1]) / 2.0
            else:
                joint = [
                    np.nan_to_num(a, nan=-1.0) * 1e6 + np.nan_to_num(b, nan=-1.0) for a, b in zip(binned[i], binned[j])
                ]
                score = 1.0 - _distance(joint[0], joint[1], numeric=False)
            if score == score:
                yield i, j, score


def _binned(real: np.ndarray, cells: np.ndarray) -> np.ndarray:
    present = real[~np.isnan(real)]
    edges = np.linspace(present.min(), present.max(), BINS + 1)[1:-1] if len(present) else np.zeros(1)
    return np.where(np.isnan(cells), np.nan, np.searchsorted(edges, cells, side="right"))


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    present = ~(np.isnan(first) | np.isnan(second))
    a, b = first[present], second[present]
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


# Rows ----------------------------------------------------------------------------------------------------------------


def nearer_to_train(
    real: np.ndarray, rest: np.ndarray, drawn: np.ndarray, space: Table, random: np.random.Generator
) -> tuple[float, float]:
    """Share of rows that are nearer to a training row than to a held-out row: of the sampled, and of other real rows.

    There are as many training as held-out rows to be near to; a tie counts as half.  The distance is Gower's: the mean
    over the columns of the difference on the column's range, or of whether categories differ.
    """
    half = len(rest) // 2
    if half < 1:
        return float("nan"), float("nan")
    order = random.permutation(len(rest))
    fresh, other = rest[order[:half]][:ROWS], rest[order[half : 2 * half]][:ROWS]
    near = real[random.permutation(len(real))[: len(other)]]
    lows, highs = np.nanmin(real, axis=0), np.nanmax(real, axis=0)
    width = np.where(highs > lows, highs - lows, 1.0)

    def share(rows: np.ndarray) -> float:
        to_train, to_rest = (_nearest(rows, target, width, space) for target in (near, other[: len(near)]))
        return float(np.mean(to_train < to_rest) + np.mean(to_train == to_rest) / 2)

    return share(drawn[:ROWS]), share(fresh)


def _nearest(rows: np.ndarray, targets: np.ndarray, width: np.ndarray, space: Table) -> np.ndarray:
    """Gower distance from each row to the nearest target; a cell missing in one of two rows differs."""
    best = np.full(len(rows), np.inf)
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        total = np.zeros((len(part), len(targets)))
        for j, column in enumerate(space.columns):
            a, b = part[:, j, None], targets[None, :, j]
            differs = np.minimum(np.abs(a - b) / width[j], 1.0) if column.numeric else (a != b).astype(float)
            absent = np.isnan(a) != np.isnan(b)
            total += np.where(absent, 1.0, np.where(np.isnan(a) & np.isnan(b), 0.0, differs))
        best[start : start + 256] = total.min(1).round(9)
    return best


def copies(rows: np.ndarray, real: np.ndarray) -> float:
    """Share of rows that are equal to a row of ``real``, cell by cell."""
    known = {row.tobytes() for row in np.nan_to_num(real, nan=-1e300)}
    return float(np.mean([row.tobytes() in known for row in np.nan_to_num(rows, nan=-1e300)]))


# Classifiers ---------------------------------------------------------------------------------------------------------


def _features(rows: np.ndarray, real: np.ndarray, space: Table, skip: int | None = None) -> np.ndarray:
    """Numbers in deviations, one-hot categories, and which cells are missing: shape ``(n, features)``."""
    parts = []
    for j, column in enumerate(space.columns):
        if j == skip:
            continue
        cells, known = rows[:, j], real[:, j][~np.isnan(real[:, j])]
        if column.numeric:
            middle, scale = (known.mean(), known.std() or 1.0) if len(known) else (0.0, 1.0)
            parts += [np.nan_to_num((cells - middle) / scale), np.isnan(cells).astype(float)]
        else:
            frequent = np.argsort(-np.bincount(known.astype(np.int64), minlength=1), kind="stable")[:SEEN]
            parts += [(cells == code).astype(float) for code in frequent]
            parts.append(np.isnan(cells).astype(float))
    return np.stack(parts, 1)


def detection(real: np.ndarray, other: np.ndarray, space: Table, seed: int = 0) -> float:
    """1 − (2 max(AUC, ½) − 1) of boosted trees that tell the rows apart, mean over three folds.

    1: they cannot; 0: they always can.  Both sides have the same number of rows.  A linear classifier would see columns
    drawn one by one as real.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold

    size = min(len(real), len(other), 5 * ROWS)
    if size < 6:
        return float("nan")
    random = np.random.default_rng(seed)
    parts = [part[random.permutation(len(part))[:size]] for part in (real, other)]
    x, y = _features(np.concatenate(parts), real, space), np.repeat([1, 0], size)
    scores = []
    for fit, test in StratifiedKFold(3, shuffle=True, random_state=seed).split(x, y):
        model = HistGradientBoostingClassifier(min_samples_leaf=min(20, 1 + size // 10), random_state=seed)
        model.fit(x[fit], y[fit])
        scores.append(max(float(roc_auc_score(y[test], model.predict_proba(x[test])[:, 1])), 0.5))
    return 1.0 - (2.0 * float(np.mean(scores)) - 1.0)


def efficacy(rows: np.ndarray, held_out: np.ndarray, target: int, space: Table, seed: int = 0) -> float:
    """AUC on held-out rows (mean over classes against the rest) of boosted trees that were trained on ``rows``."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.metrics import roc_auc_score

    labels, truth = rows[:, target], held_out[:, target]
    fit, test = ~np.isnan(labels), np.isin(truth, np.unique(labels))
    classes = np.unique(labels[fit])
    if len(classes) < 2 or len(np.unique(truth[test])) < 2:
        return float("nan")
    model = HistGradientBoostingClassifier(random_state=seed)
    model.fit(_features(rows, rows, space, target)[fit], labels[fit])
    chances = model.predict_proba(_features(held_out, rows, space, target)[test])
    areas = [
        roc_auc_score(truth[test] == code, chances[:, k])
        for k, code in enumerate(classes)
        if (truth[test] == code).any()
    ]
    return float(np.mean(areas[1:] if len(classes) == 2 else areas))
