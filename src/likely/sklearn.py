"""scikit-learn's face: estimators that go into pipelines, grid searches and ``clone``.

* :class:`DensityEstimator`: ``score_samples`` in nats, ``sample``;
* :class:`OutlierDetector`: calibrated anomaly scores, with scikit-learn's signs and, by pyod's names, with pyod's;
* :class:`Imputer`: missing cells filled by best values or draws;
* :class:`Embedder`: mean latent vectors;
* :class:`Classifier`, :class:`Regressor`: p(y | x) and E[y | x], read off a joint law.

A matrix of numbers, or a DataFrame with numeric columns alone, is taken as real numbers: its likelihood is a density.
A DataFrame with other columns, or any data with ``schema`` given, goes through a :class:`~likely.data.Schema`, and
comes out with the columns, dtypes and spellings that it came in with.

Nothing here reads or changes a global random state.  Scoring is done in float64, with noise that belongs to the row: a
row's value depends on the row alone.  With ``budget=None`` equal data give equal models on one machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassifierMixin,
    ClassNamePrefixFeaturesOutMixin,
    OneToOneFeatureMixin,
    OutlierMixin,
    RegressorMixin,
    TransformerMixin,
)
from sklearn.utils import Tags
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import (
    check_array,
    check_consistent_length,
    check_is_fitted,
    column_or_1d,
    validate_data,
)

from likely import api, models
from likely.contract import Model, Reals, Table, Unsupported
from likely.data import Schema, Split, infer_schema
from likely.data.arrays import ArrayForm
from likely.evaluation import column_nats, tail_probability
from likely.evaluation.anomaly import AnomalyScale
from likely.noise import KeyedNoise, content_keys


class _Estimator(BaseEstimator):
    """What the estimators share: one model, fitted to rows."""

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "model": [str, Model],
        "options": [dict, None],
        "budget": [Interval(Real, 0, None, closed="neither"), None],
        "valid_fraction": [Interval(Real, 0, 1, closed="left")],
        "schema": "no_validation",
        "random_state": ["random_state"],
        "verbose": ["boolean"],
    }

    def __init__(
        self,
        model: str | Model = "auto",
        *,
        options: Mapping[str, Any] | None = None,
        budget: float | None = None,
        valid_fraction: float = 0.1,
        schema: Any = None,
        random_state: Any = 0,
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.options = options
        self.budget = budget
        self.valid_fraction = valid_fraction
        self.schema = schema
        self.random_state = random_state
        self.verbose = verbose

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    # Rows in ---------------------------------------------------------------------------------------------------------

    def _rows(self, X: Any, *, fitting: bool = False) -> Any:
        """The rows as the model's schema reads them: a float64 matrix, or a DataFrame."""
        if not fitting:
            check_is_fitted(self)
        if fitting:
            self._mixed = self.schema is not None or _has_other_columns(X)
        if self._mixed:
            validate_data(self, X, reset=fitting, skip_check_array=True)
            return X
        least = 2 if fitting else 1
        return validate_data(
            self, X, reset=fitting, dtype=np.float64, ensure_all_finite="allow-nan", ensure_min_samples=least
        )

    def _rows_and_target(self, X: Any, y: Any, *, numeric: bool = False) -> tuple[Any, np.ndarray]:
        """The rows and their target, held against each other."""
        self._mixed = self.schema is not None or _has_other_columns(X)
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        if self._mixed:
            validate_data(self, X, reset=True, skip_check_array=True)
            y = check_array(y, ensure_2d=False, dtype=np.float64 if numeric else None)
            check_consistent_length(X, y)
            return X, y if numeric else column_or_1d(y, warn=True)
        rows, y = validate_data(
            self,
            X,
            y,
            dtype=np.float64,
            ensure_all_finite="allow-nan",
            multi_output=numeric,
            y_numeric=numeric,
            ensure_min_samples=2,
        )
        return rows, y.astype(np.float64) if numeric else y

    def _begin(self) -> int:
        """Hold the parameters against what they may be; the seed of the fit."""
        self._validate_params()
        self._seed = _seed(self.random_state)
        return self._seed

    def _schema_of(self, rows: Any) -> Schema:
        if self._mixed:
            return self.schema if isinstance(self.schema, Schema) else infer_schema(rows, schema=self.schema)
        return Schema(ArrayForm(rows.shape[1:], "float64", "reals", missing=self._takes_holes(rows)))

    def _takes_holes(self, rows: np.ndarray) -> bool:
        """Whether cells may be missing: where the model leaves such cells out, or where some are."""
        if isinstance(self.model, Model):
            return self.model.space.missing
        if self.model == "auto":
            return True
        own, _ = api._split_options(self.model, dict(self.options or {}), 0)
        try:
            api.build_model(self.model, Reals(rows.shape[1:], missing=True), None, 0, own)
        except Unsupported:
            return bool(np.isnan(rows).any())
        return True

    def _fit_model(self, rows: Any, schema: Schema, model: Any = None, **changes: Any) -> api.Fitted:
        model = self.model if model is None else model
        options = {**(self.options or {}), **changes}
        if self.budget is not None:
            options["budget"] = self.budget
        elif model == "auto":
            options["search"] = "closed form"
        fitted = api.fit(
            rows,
            model,
            schema=schema,
            seed=self._seed,
            valid_fraction=self.valid_fraction,
            progress=bool(self.verbose),
            **options,
        )
        fitted.model.double()
        fitted._data = None  # the estimator is no place for a copy of the training data
        return fitted


class DensityEstimator(_Estimator):
    """The law of the rows: log-likelihoods and samples.

    >>> from sklearn.datasets import load_iris
    >>> X = load_iris().data
    >>> density = DensityEstimator("gaussian").fit(X)
    >>> density.score_samples(X[:2]).shape, density.sample(3).shape
    ((2,), (3, 4))

    Args:
        model: name of a model (``likely models`` lists them), a model, or ``auto``: the best of a Gaussian and mixtures
            of growing size on held-out rows; with a ``budget`` trained models take part as well.
        options: of the model and of its training, by name.
        budget: seconds for training; None trains by steps, or chooses among models in closed form.
        valid_fraction: share of the rows held out for choosing and stopping.
        schema: None, a :class:`~likely.data.Schema`, or corrections of the inferred one.
        random_state: an int, a ``RandomState``, or None for a fresh seed.
        verbose: whether to show how the fit goes, on standard error.

    Attributes:
        fitted_: the :class:`likely.Fitted`, with ``save``, ``compress``, ``report`` and all else.
        n_features_in_, feature_names_in_: as everywhere in scikit-learn.
    """

    fitted_: api.Fitted

    def fit(self, X: Any, y: Any = None) -> DensityEstimator:
        """Fit the law of the rows of ``X``."""
        self._begin()
        rows = self._rows(X, fitting=True)
        self.fitted_ = self._fit_model(rows, self._schema_of(rows))
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Log-likelihood of every row, or the model's bound on it, in nats: shape ``(n,)``; high is normal."""
        rows = self._rows(X)
        return self.fitted_.score_samples(rows, seed=self._seed)

    def score(self, X: Any, y: Any = None) -> float:
        """Mean of :meth:`score_samples`, in nats per row."""
        return float(self.score_samples(X).mean())

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Any:
        """New rows: a matrix, or a DataFrame where the model was fitted to one.

        Args:
            random_state: by default the estimator's own: equal calls give equal rows.
        """
        check_is_fitted(self)
        seed = self._seed if random_state is None else _seed(random_state)
        rows = self.fitted_.sample(n_samples, seed=seed)
        if self._mixed or not hasattr(self, "feature_names_in_"):
            return rows
        import pandas as pd

        return pd.DataFrame(rows, columns=self.feature_names_in_)


class OutlierDetector(OutlierMixin, _Estimator):
    """Anomalies: rows that are unlikely, by a score that holds for clean and for contaminated training rows.

    >>> from sklearn.datasets import load_iris
    >>> X = load_iris().data
    >>> detector = OutlierDetector().fit(X)
    >>> bool(detector.score_samples([[9.0, 9.0, 9.0, 9.0]])[0] < detector.score_samples(X).min())
    True

    The score is that of :mod:`likely.evaluation.anomaly`; docs/anomalies.md says what it is good for.  Signs:

    ==================================  =====================================  ===========================
    scikit-learn                        pyod                                   meaning
    ==================================  =====================================  ===========================
    ``score_samples`` (high: normal)    ``anomaly_score`` (high: anomalous)    the score
    ``decision_function`` (< 0)         ``decision_scores_`` (training rows)   against ``offset_``
    ``predict`` (+1, −1)                ``labels_`` (0, 1; training rows)      normal, anomalous
    ==================================  =====================================  ===========================

    Args:
        model: of the rows; ``auto`` is, for numbers, a mixture of twenty normal laws with a strong prior, for other
            tables the best model in closed form.
        contamination: share of the training rows that are anomalies; it sets the threshold alone.  ``auto`` puts the
            threshold where 5 % of the training rows are called anomalies.
        options, budget, valid_fraction, schema, random_state, verbose: see :class:`DensityEstimator`; the rows held out
            are those that :meth:`p_values` refers to.

    Attributes:
        fitted_: the :class:`likely.Fitted` of the rows.
        columns_: the :class:`likely.Fitted` of the columns, each on its own.
        offset_: ``decision_function`` is ``score_samples`` minus this.
        decision_scores_: anomaly scores of the training rows, high is anomalous (pyod).
        labels_: 1 for training rows that are called anomalies, else 0 (pyod).
        threshold_: ``-offset_`` (pyod).
    """

    fitted_: api.Fitted
    columns_: api.Fitted
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **_Estimator._parameter_constraints,
        "contamination": [StrOptions({"auto"}), Interval(Real, 0, 0.5, closed="right")],
    }
    #: Measured once for all sets, labels unused: benchmarks/anomaly.py.
    _MIXTURE: ClassVar[dict[str, Any]] = {
        "components": 20,
        "smoothing": 30.0,
        "passes": 20,
        "restarts": 1,
        "tolerance": 1e-3,
    }
    #: Noise that the rows get before the fits of rows and columns, in standard deviations: smoothed densities, which
    #: spikes cannot drive up.
    _BLUR, _COLUMN_BLUR = 0.2, 0.1
    _AUTO = 0.05

    def __init__(
        self,
        model: str | Model = "auto",
        *,
        contamination: float | str = "auto",
        options: Mapping[str, Any] | None = None,
        budget: float | None = None,
        valid_fraction: float = 0.1,
        schema: Any = None,
        random_state: Any = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            model,
            options=options,
            budget=budget,
            valid_fraction=valid_fraction,
            schema=schema,
            random_state=random_state,
            verbose=verbose,
        )
        self.contamination = contamination

    def fit(self, X: Any, y: Any = None) -> OutlierDetector:
        """Fit the laws of the rows of ``X``, and set the threshold."""
        self._begin()
        rows = self._rows(X, fitting=True)
        schema = self._schema_of(rows)
        self.fitted_ = self._fit_model(self._blurred(rows, self._BLUR), schema)
        self.columns_ = api.fit(
            self._blurred(rows, self._COLUMN_BLUR),
            "independent",
            schema=schema,
            seed=self._seed,
            valid_fraction=self.valid_fraction,
            progress=False,
        )
        self.columns_._data = None
        self._scale = AnomalyScale.of(*self._two_nats(rows))
        self._usual_cells = [np.nanmedian(cells, 0) for cells in self._two_cells(rows)]
        normal = self.score_samples(X)
        self._held_out = normal[Split.from_json(self.fitted_.record["split"]).indices["valid"].numpy()]
        share = self._AUTO if self.contamination == "auto" else float(self.contamination)
        self.offset_ = float(np.percentile(normal, 100.0 * share))
        self.threshold_, self.decision_scores_ = -self.offset_, -normal
        self.labels_ = (self.decision_scores_ > self.threshold_).astype(np.int64)
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """The score, with scikit-learn's sign: shape ``(n,)``; high is normal."""
        joint, columns = self._two_nats(self._rows(X))
        return -self._scale.score(joint, columns).numpy()

    def decision_function(self, X: Any) -> np.ndarray:
        """``score_samples`` minus ``offset_``: below 0 for anomalies."""
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> np.ndarray:
        """+1 for normal rows, −1 for anomalies."""
        return np.where(self.decision_function(X) >= 0, 1, -1)

    def anomaly_score(self, X: Any) -> np.ndarray:
        """The score with pyod's sign (there ``decision_function``): shape ``(n,)``; high is anomalous."""
        return -self.score_samples(X)

    def p_values(self, X: Any) -> np.ndarray:
        """Share of held-out training rows that are as anomalous or more so: shape ``(n,)``; small is anomalous.

        If a row is of the law of the training rows, it gets a value up to a with probability at most a.
        """
        normal = torch.from_numpy(self.score_samples(X))
        reference = self._held_out if len(self._held_out) else -self.decision_scores_
        return tail_probability(torch.from_numpy(reference), normal).numpy()

    def predict_proba(self, X: Any) -> np.ndarray:
        """Shares of held-out training rows that are more anomalous, and less so: shape ``(n, 2)``, as pyod's columns.

        The second column is 1 − :meth:`p_values`: no posterior probability, but on a scale that has a meaning.
        """
        p = self.p_values(X)
        return np.stack([p, 1.0 - p], 1)

    def explain(self, X: Any) -> Any:
        """What each cell adds to the anomaly score, against what is usual in its column: shape ``(n, columns)``."""
        rows = self._rows(X)
        excess = [torch.from_numpy(usual - cells) for usual, cells in zip(self._usual_cells, self._two_cells(rows))]
        shares = self._scale.explain(*excess).nan_to_num(0.0).numpy()
        if not hasattr(self, "feature_names_in_"):
            return shares
        import pandas as pd

        space = self.fitted_.schema.space
        names = [c.name for c in space.columns] if isinstance(space, Table) else self.feature_names_in_
        return pd.DataFrame(shares, columns=names)

    def _fit_model(self, rows: Any, schema: Schema, model: Any = None, **changes: Any) -> api.Fitted:
        if self.model != "auto" or self._mixed or self.budget is not None:
            return super()._fit_model(rows, schema, model, **changes)
        own = {**self._MIXTURE, "covariance": "full" if rows.shape[1] <= 256 else "diagonal", **changes}
        return super()._fit_model(rows, schema, "mixture", **{**own, **(self.options or {})})

    def _blurred(self, rows: Any, blur: float) -> Any:
        if self._mixed:
            return rows
        noise = KeyedNoise(self._seed, content_keys(torch.tensor(rows)))
        with np.errstate(invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a column without any cell
            scale = np.nan_to_num(np.nanstd(rows, axis=0))
        return rows + blur * scale * noise.normal(rows.shape).double().numpy()

    def _two_nats(self, rows: Any) -> tuple[torch.Tensor, torch.Tensor]:
        both = (fitted.score_samples(rows, seed=self._seed) for fitted in (self.fitted_, self.columns_))
        joint, columns = map(torch.from_numpy, both)
        return joint, columns

    def _two_cells(self, rows: Any) -> list[np.ndarray]:
        """Nats of each cell under the two laws, NaN where it is missing."""
        found = []
        for fitted in (self.fitted_, self.columns_):
            dataset = fitted.schema.read(rows)
            if fitted.model.can("column_nats"):
                cells = column_nats(fitted.model, dataset, seed=self._seed)
                found.append(torch.where(torch.isnan(dataset.x), torch.nan, cells).numpy())
            else:
                found.append(np.zeros(tuple(dataset.x.shape)))
        return found


class Imputer(OneToOneFeatureMixin, TransformerMixin, _Estimator):
    """Missing cells (NaN), filled from the law of the rows given the cells that are there.

    >>> X = np.array([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0], [4.0, 8.0], [np.nan, 5.0]])
    >>> imputer = Imputer("gaussian", options={"shrinkage": 0.0}, valid_fraction=0)
    >>> imputer.fit_transform(X)[4].round(2).tolist()
    [2.5, 5.0]

    Args:
        model: one that can impute; ``auto`` is the best of a Gaussian and mixtures of growing size on held-out rows.
        sample_posterior: fill with one draw instead of the best value (the mean of numbers, the mode of categories), as
            multiple imputation asks for; see :meth:`draw`.
        options, budget, valid_fraction, schema, random_state, verbose: see :class:`DensityEstimator`.

    Attributes:
        fitted_: the :class:`likely.Fitted`.
    """

    fitted_: api.Fitted
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **_Estimator._parameter_constraints,
        "sample_posterior": ["boolean"],
    }

    def __init__(
        self,
        model: str | Model = "auto",
        *,
        sample_posterior: bool = False,
        options: Mapping[str, Any] | None = None,
        budget: float | None = None,
        valid_fraction: float = 0.1,
        schema: Any = None,
        random_state: Any = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            model,
            options=options,
            budget=budget,
            valid_fraction=valid_fraction,
            schema=schema,
            random_state=random_state,
            verbose=verbose,
        )
        self.sample_posterior = sample_posterior

    def fit(self, X: Any, y: Any = None) -> Imputer:
        """Fit the law of the rows of ``X``, from all cells that are there."""
        self._begin()
        rows = self._rows(X, fitting=True)
        self.fitted_ = self._fit_model(rows, self._schema_of(rows))
        return self

    def transform(self, X: Any) -> Any:
        """``X`` with its missing cells filled; all other cells as they were."""
        rows = self._rows(X)
        if self.sample_posterior:
            return self.fitted_.impute(rows, draws=1, seed=self._seed)[0]
        return self.fitted_.impute(rows, seed=self._seed)

    def draw(self, X: Any, draws: int = 5, random_state: Any = None) -> list[Any]:
        """``draws`` completions of ``X``, for multiple imputation: analyse each and pool the results."""
        rows = self._rows(X)
        seed = self._seed if random_state is None else _seed(random_state)
        return self.fitted_.impute(rows, draws=draws, seed=seed)


class Embedder(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _Estimator):
    """Rows as the mean of their latent vector.

    >>> from sklearn.datasets import load_iris
    >>> Embedder("gaussian", options={"rank": 2}).fit_transform(load_iris().data).shape
    (150, 2)

    Args:
        model: one with latent variables; ``auto`` is ``vae``.
        n_components: size of the latent vector; None takes the model's own.
        options, budget, valid_fraction, schema, random_state, verbose: see :class:`DensityEstimator`.

    Attributes:
        fitted_: the :class:`likely.Fitted`.
    """

    fitted_: api.Fitted
    #: Option by which a model names the size of its latent vector.
    _SIZES = ("latent_dim", "rank", "components")
    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **_Estimator._parameter_constraints,
        "n_components": [Interval(Integral, 1, None, closed="left"), None],
    }

    def __init__(
        self,
        model: str | Model = "auto",
        *,
        n_components: int | None = None,
        options: Mapping[str, Any] | None = None,
        budget: float | None = None,
        valid_fraction: float = 0.1,
        schema: Any = None,
        random_state: Any = 0,
        verbose: bool = False,
    ) -> None:
        super().__init__(
            model,
            options=options,
            budget=budget,
            valid_fraction=valid_fraction,
            schema=schema,
            random_state=random_state,
            verbose=verbose,
        )
        self.n_components = n_components

    def fit(self, X: Any, y: Any = None) -> Embedder:
        """Fit the model to the rows of ``X``."""
        self._begin()
        rows = self._rows(X, fitting=True)
        changes: dict[str, Any] = {}
        if self.n_components is not None:
            changes[self._size_option()] = int(self.n_components)
        model = "vae" if self.model == "auto" else None
        self.fitted_ = self._fit_model(rows, self._schema_of(rows), model, **changes)
        self._n_features_out = int(self.fitted_.model.latent_dim)  # type: ignore[arg-type]
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The mean of the latent vector of every row: shape ``(n, n_components)``; equal rows, equal vectors."""
        return self.fitted_.transform(self._rows(X)).astype(np.float64)

    def _size_option(self) -> str:
        if isinstance(self.model, Model):
            raise ValueError("n_components: expected None together with a model that is built already")
        taken = models.find("vae" if self.model == "auto" else self.model).options()
        return next((name for name in self._SIZES if name in taken), self._SIZES[0])


class Classifier(ClassifierMixin, _Estimator):
    """p(y | x) by Bayes' rule from the joint law p(y) p(x | y).

        p(y | x) = p(y) p(x | y) / Σ_y' p(y') p(x | y')

    Each class has a model of its own, mixed with the model of all rows as if that had given one row to the class: so a
    row far from all classes is told by the prior, and a class of one row has a law.  With a model that is known by a
    lower bound the result is an approximation.

    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> round(Classifier().fit(X, y).score(X, y), 1)
    1.0

    Args:
        model: of p(x | y); ``auto`` is, for each class, the best of a Gaussian and mixtures on held-out rows.
        options, budget, valid_fraction, schema, random_state, verbose: see :class:`DensityEstimator`.

    Attributes:
        classes_: the classes, sorted.
        class_prior_: their shares among the training rows.
        fitted_: a :class:`likely.Fitted` for each class, and last that of all rows.
    """

    classes_: np.ndarray
    fitted_: list[api.Fitted]

    def fit(self, X: Any, y: Any) -> Classifier:
        """Fit the joint law of rows and classes."""
        self._begin()
        rows, y = self._rows_and_target(X, y)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        counts = np.bincount(codes)
        self.class_prior_ = counts / counts.sum()
        schema = self._schema_of(rows)
        parts = [_take(rows, np.flatnonzero(codes == code)) for code in range(len(self.classes_))]
        pooled = self._fit_model(rows, schema)
        self.fitted_ = [*(self._fit_model(p, schema) if len(p) > 1 else pooled for p in parts), pooled]
        self._weights = counts / (counts + 1.0)
        return self

    def joint_log_likelihood(self, X: Any) -> np.ndarray:
        """log p(x, y) of every row with every class, in nats: shape ``(n, classes)``."""
        rows = self._rows(X)
        *classes, pooled = (fitted.score_samples(rows, seed=self._seed) for fitted in self.fitted_)
        own = np.stack(classes, 1) + np.log(self._weights)
        return np.logaddexp(own, pooled[:, None] + np.log1p(-self._weights)) + np.log(self.class_prior_)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """log p(y | x): shape ``(n, classes)``."""
        joint = self.joint_log_likelihood(X)
        return joint - np.logaddexp.reduce(joint, axis=1, keepdims=True)

    def predict_proba(self, X: Any) -> np.ndarray:
        """p(y | x): shape ``(n, classes)``."""
        return np.exp(self.predict_log_proba(X))

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of every row."""
        best = self.joint_log_likelihood(X).argmax(1)
        return self.classes_[best]

    def score_samples(self, X: Any) -> np.ndarray:
        """log p(x) of every row, in nats: shape ``(n,)``."""
        return np.logaddexp.reduce(self.joint_log_likelihood(X), axis=1)


class Regressor(RegressorMixin, _Estimator):
    """E[y | x] from the joint law of x and y; cells of x may be missing.

    >>> X = np.linspace(-1, 1, 50)[:, None]
    >>> regressor = Regressor("gaussian", options={"shrinkage": 0.0}).fit(X, 3 * X[:, 0] + 1)
    >>> regressor.predict([[0.5]]).round(2).tolist()
    [2.5]

    Args:
        model: one that can impute; ``auto`` is the best of a Gaussian and mixtures of growing size on held-out rows.
        options, budget, valid_fraction, schema, random_state, verbose: see :class:`DensityEstimator`.

    Attributes:
        fitted_: the :class:`likely.Fitted` of x and y, side by side.
    """

    fitted_: api.Fitted

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any) -> Regressor:
        """Fit the joint law of rows and targets (one, or several in columns)."""
        self._begin()
        rows, y = self._rows_and_target(X, y, numeric=True)
        self._one = y.ndim == 1
        self._targets = 1 if self._one else y.shape[1]
        joined = self._join(rows, y.reshape(len(y), -1))
        self.fitted_ = self._fit_model(joined, self._schema_of(joined))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The conditional mean: shape ``(n,)``, or ``(n, targets)`` where ``y`` had columns."""
        return self._filled(X, 0)[0]

    def draw(self, X: Any, draws: int = 100, random_state: Any = None) -> np.ndarray:
        """Draws of p(y | x): shape ``(draws, n)`` or ``(draws, n, targets)``."""
        return np.stack(self._filled(X, draws, random_state))

    def _filled(self, X: Any, draws: int, random_state: Any = None) -> list[np.ndarray]:
        rows = self._rows(X)
        joined = self._join(rows, np.full((len(rows), self._targets), np.nan))
        seed = self._seed if random_state is None else _seed(random_state)
        filled = self.fitted_.impute(joined, draws=draws, seed=seed)
        out = []
        for one in filled if draws else [filled]:
            y = (one.iloc[:, -self._targets :].to_numpy(np.float64) if self._mixed else one[:, -self._targets :]).copy()
            out.append(y[:, 0] if self._one else y)
        return out

    def _join(self, rows: Any, y: np.ndarray) -> Any:
        if not self._mixed:
            return np.concatenate([rows, y], 1)
        return rows.assign(**{f"target {j}": y[:, j] for j in range(y.shape[1])})


# --------------------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------------------


def _has_other_columns(X: Any) -> bool:
    """Whether it is a DataFrame in which some column holds no numbers."""
    dtypes = getattr(X, "dtypes", None)
    if dtypes is None or not hasattr(X, "columns") or not hasattr(X, "iloc"):
        return False
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    return any(not is_numeric_dtype(dtype) or is_bool_dtype(dtype) for dtype in dtypes)


def _seed(random_state: Any) -> int:
    """A seed from what scikit-learn calls a random state; None draws a fresh one and touches no global generator."""
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1)[0])
    if isinstance(random_state, Integral):
        return int(random_state)
    return int(random_state.randint(np.iinfo(np.int32).max))


def _take(rows: Any, index: np.ndarray) -> Any:
    return rows.iloc[index] if hasattr(rows, "iloc") else rows[index]
