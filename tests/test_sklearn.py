"""The estimators: scikit-learn's own checks, and values against closed forms."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.linear_model import LinearRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

from documents import adult
from likely.sklearn import Classifier, DensityEstimator, Embedder, Imputer, OutlierDetector, Regressor

ML = {"shrinkage": 0.0}  # a Gaussian by maximum likelihood
EXACT = {"options": ML, "valid_fraction": 0}
ESTIMATORS = [
    DensityEstimator(),
    OutlierDetector(options={"components": 3, "passes": 5}),
    Imputer("gaussian"),
    Embedder(n_components=2, options={"steps": 10, "hidden": [4]}),
    Classifier("gaussian"),
    Regressor("gaussian"),
]
#: Checks that scikit-learn runs on its own estimators and check_estimator does not run on others.
FURTHER = [
    "check_transformer_get_feature_names_out",
    "check_transformer_get_feature_names_out_pandas",
    "check_get_feature_names_out_error",
    "check_set_output_transform_pandas",
    "check_global_output_transform_pandas",
]


@parametrize_with_checks(ESTIMATORS)  # type: ignore[untyped-decorator]
def test_scikit_learns_checks(estimator: object, check: object) -> None:
    check(estimator)  # type: ignore[operator]


@pytest.mark.parametrize("name", ["check_dataframe_column_names_consistency", "check_param_validation"])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: type(e).__name__)
def test_further_checks_of_every_estimator(name: str, estimator: object) -> None:
    getattr(estimator_checks, name)(type(estimator).__name__, clone(estimator))


@pytest.mark.filterwarnings("ignore:X (has|does not have valid) feature names")
@pytest.mark.parametrize("name", FURTHER)
@pytest.mark.parametrize("estimator", [ESTIMATORS[2], ESTIMATORS[3]], ids=lambda e: type(e).__name__)
def test_further_checks_of_transformers(name: str, estimator: object) -> None:
    getattr(estimator_checks, name)(type(estimator).__name__, clone(estimator))


@pytest.fixture
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(300, 3)) @ np.array([[1.0, 0.5, 0.0], [0.0, 1.0, -0.7], [0.0, 0.0, 0.4]]) + [
        1.0,
        -2.0,
        30.0,
    ]


def test_density_is_that_of_scipy(rows: np.ndarray) -> None:
    density = DensityEstimator("gaussian", **EXACT).fit(rows)
    law = multivariate_normal(rows.mean(0), np.cov(rows.T, bias=True))
    np.testing.assert_allclose(density.score_samples(rows), law.logpdf(rows), rtol=1e-6)
    assert density.score(rows) == pytest.approx(law.logpdf(rows).mean())
    drawn = density.sample(20_000, random_state=1)
    np.testing.assert_allclose(drawn.mean(0), rows.mean(0), atol=5 * rows.std(0).max() / np.sqrt(20_000))
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(rows.T), atol=0.06)


def test_automatic_choice_sees_that_one_normal_law_is_not_enough() -> None:
    rng = np.random.default_rng(0)
    two = np.concatenate([rng.normal(-4, 1, (300, 2)), rng.normal(4, 1, (300, 2))])
    record = DensityEstimator().fit(two).fitted_.record
    assert record["name"] == "mixture"
    held_out = {(t["model"], t["options"].get("components")): t["nats"] for t in record["search"]}
    chosen = max(held_out, key=lambda key: held_out[key])
    assert chosen == ("mixture", record["options"]["components"])
    assert held_out[chosen] > held_out["gaussian", None] + 0.3


@pytest.mark.parametrize("random_state", [None, 0, np.random.RandomState(0)], ids=str)
def test_global_generators_stay_as_they_were(random_state: object) -> None:
    X = load_iris().data
    before = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    OutlierDetector(random_state=random_state, options={"components": 2}).fit(X).predict(X)
    DensityEstimator("gaussian", random_state=random_state).fit(X).sample(3, random_state=random_state)
    Embedder(options={"steps": 2, "hidden": [4]}, random_state=random_state).fit_transform(X)
    assert np.array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before[1], torch.get_rng_state())


def test_random_state_says_what_is_drawn(rows: np.ndarray) -> None:
    density = DensityEstimator("gaussian").fit(rows)
    assert np.array_equal(density.sample(5), density.sample(5))
    assert np.array_equal(density.sample(5, random_state=3), clone(density).fit(rows).sample(5, random_state=3))
    assert not np.array_equal(density.sample(5, random_state=3), density.sample(5, random_state=4))
    fresh = [DensityEstimator("gaussian", random_state=None).fit(rows).sample(5) for _ in range(2)]
    assert not np.array_equal(*fresh)


def test_a_row_scores_the_same_in_any_company() -> None:
    X = load_iris().data
    embedder = Embedder(options={"steps": 5, "hidden": [8]}).fit(X)
    fitted = embedder.fitted_
    alone = np.array([fitted.score_samples(X[i : i + 1])[0] for i in range(5)])
    np.testing.assert_allclose(fitted.score_samples(X)[:5], alone, rtol=1e-10)


def test_pickle_does_not_carry_the_data() -> None:
    rows = np.random.default_rng(0).normal(size=(20_000, 3))
    density = DensityEstimator("gaussian", valid_fraction=0).fit(rows)
    again = pickle.loads(pickle.dumps(density))
    assert np.array_equal(again.score_samples(rows), density.score_samples(rows))
    assert len(pickle.dumps(density)) < rows.nbytes / 2


def test_pipeline_and_grid_search() -> None:
    rng = np.random.default_rng(0)
    ring = rng.normal(size=(300, 2))
    ring = 10 * ring / np.linalg.norm(ring, axis=1, keepdims=True) + rng.normal(0, 0.2, (300, 2))
    search = GridSearchCV(
        make_pipeline(StandardScaler(), DensityEstimator("mixture")),
        {"densityestimator__options": [{"components": 1}, {"components": 15}]},
        cv=2,
    ).fit(ring)
    assert search.best_params_["densityestimator__options"] == {"components": 15}


# Outliers -----------------------------------------------------------------------------------------------------------


def test_outliers_have_both_signs_and_the_p_value_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(2000, 2)) @ np.array([[1.0, 0.95], [0.0, 0.3]])
    detector = OutlierDetector(contamination=0.1, options={"components": 3}, valid_fraction=0.5).fit(normal[:1000])
    fresh = normal[1000:]
    assert np.array_equal(detector.decision_scores_, -detector.score_samples(normal[:1000]))
    assert detector.labels_.sum() == 100
    assert np.array_equal(detector.labels_ == 1, detector.predict(normal[:1000]) == -1)
    assert np.array_equal(detector.anomaly_score(fresh), -detector.score_samples(fresh))
    assert detector.threshold_ == -detector.offset_
    p = detector.p_values(fresh)
    for a in (0.05, 0.2, 0.5):  # P(p ≤ a) ≤ a, with the error of 500 reference and 1000 fresh rows
        assert abs((p <= a).mean() - a) < 4 * np.sqrt(a * (1 - a) * (1 / 500 + 1 / 1000))
    np.testing.assert_allclose(detector.predict_proba(fresh), np.stack([p, 1 - p], 1))
    broken = detector.p_values([[1.5, -1.5]])  # each coordinate is usual, together they are not
    assert broken[0] <= 2 / 501
    assert detector.predict([[1.5, -1.5]])[0] == -1


def test_explanation_adds_up_to_the_score() -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 4))
    detector = OutlierDetector(options={"components": 2}).fit(pd.DataFrame(X, columns=list("abcd")))
    odd = pd.DataFrame(X[:50], columns=list("abcd"))
    odd.loc[0, "c"] = 8.0
    shares = detector.explain(odd)
    rest = detector.anomaly_score(odd) - shares.sum(axis=1).to_numpy()
    np.testing.assert_allclose(rest, rest[0], atol=1e-6)
    assert list(shares.columns) == list("abcd")
    assert shares.iloc[0].idxmax() == "c"


def test_cluster_of_anomalies_among_the_training_rows_is_found() -> None:
    """A density that follows the rows closely takes a tight cluster for the most normal of all."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(950, 6)) * [1, 2, 1, 3, 1, 1]
    cluster = np.array([3, -6, 3, 9, 3, -3]) + rng.normal(0, 0.1, (50, 6))
    X, y = np.concatenate([normal, cluster]), np.repeat([0, 1], [950, 50])
    assert roc_auc_score(y, -KernelDensity(bandwidth="scott").fit(X).score_samples(X)) < 0.5
    assert roc_auc_score(y, OutlierDetector().fit(X).decision_scores_) > 0.8


# Imputer, classifier, regressor ---------------------------------------------------------------------------------------


def test_imputed_cell_is_the_conditional_mean(rows: np.ndarray) -> None:
    holes = rows.copy()
    imputer = Imputer("gaussian", **EXACT).fit(rows)
    holes[:40, 1] = np.nan
    mean, cov = rows.mean(0), np.cov(rows.T, bias=True)
    others = [0, 2]
    slope = np.linalg.solve(cov[np.ix_(others, others)], cov[others, 1])
    expected = mean[1] + (rows[:40][:, others] - mean[others]) @ slope
    filled = imputer.transform(holes)
    np.testing.assert_allclose(filled[:40, 1], expected, rtol=1e-6)
    assert np.array_equal(filled[40:], rows[40:])
    spread = np.sqrt(cov[1, 1] - slope @ cov[others, 1])
    drawn = np.stack([part[:40, 1] for part in imputer.draw(holes, 400)])
    np.testing.assert_allclose(drawn.std(0), spread, rtol=0.2)
    np.testing.assert_allclose(drawn.mean(0), expected, atol=5 * spread / 20)


def test_classifier_is_bayes_rule() -> None:
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(-1, 1, (150, 1)), rng.normal(2, 0.5, (50, 1))])
    y = np.repeat(["b", "a"], [150, 50])
    classifier = Classifier("gaussian", **EXACT).fit(X, y)
    laws = {name: norm(X[y == name].mean(), X[y == name].std()) for name in "ab"}
    pooled = norm(X.mean(), X.std())
    x = np.linspace(-3, 4, 30)
    joint = np.stack(
        [
            n / 200 * (n / (n + 1) * laws[name].pdf(x) + 1 / (n + 1) * pooled.pdf(x))
            for name, n in (("a", 50), ("b", 150))
        ],
        1,
    )
    np.testing.assert_allclose(classifier.predict_proba(x[:, None]), joint / joint.sum(1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(classifier.score_samples(x[:, None]), np.log(joint.sum(1)), rtol=1e-5)
    far = classifier.predict_proba([[1e3]])[0]
    np.testing.assert_allclose(far[0] / far[1], (50 / 51) / (150 / 151), rtol=1e-3)  # p(y) / (n_y + 1)


def test_regressor_is_least_squares_where_all_is_normal(rows: np.ndarray) -> None:
    X, y = rows[:, :2], rows[:, 2]
    regressor = Regressor("gaussian", **EXACT).fit(X, y)
    np.testing.assert_allclose(regressor.predict(X), LinearRegression().fit(X, y).predict(X), rtol=1e-6)
    absent = regressor.predict([[np.nan, np.nan], [1.0, np.nan]])
    assert absent[0] == pytest.approx(y.mean())
    alone = LinearRegression().fit(X[:, :1], y).predict([[1.0]])
    assert absent[1] == pytest.approx(alone[0])
    residual = y - regressor.predict(X)
    np.testing.assert_allclose(regressor.draw(X[:20], 300).std(0), residual.std(), rtol=0.25)


# Tables ---------------------------------------------------------------------------------------------------------------


def test_tables_of_mixed_columns_come_back_as_they_went_in() -> None:
    frame = adult(300, 0).replace("?", "unknown")
    density = DensityEstimator("mixture", options={"components": 3}).fit(frame)
    drawn = density.sample(40)
    assert list(drawn.columns) == list(frame.columns)
    assert list(drawn.dtypes) == list(frame.dtypes)
    assert density.score_samples(frame).shape == (300,)
    holes = frame.copy()
    holes.loc[:10, "education"] = None
    imputer = Imputer("mixture", options={"components": 3}).fit(frame)
    filled = imputer.transform(holes)
    assert filled["education"].isin(frame["education"].unique()).all()
    pd.testing.assert_frame_equal(filled.iloc[11:], frame.iloc[11:])
    classifier = Classifier("mixture", options={"components": 2}).fit(frame.drop(columns="income"), frame["income"])
    assert classifier.score(frame.drop(columns="income"), frame["income"]) > (frame["income"] == "<=50K").mean()
    detector = OutlierDetector("mixture", options={"components": 2}).fit(frame)
    assert list(detector.explain(frame.head(3)).columns) == list(frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        density.score_samples(frame.rename(columns={"age": "years"}))
