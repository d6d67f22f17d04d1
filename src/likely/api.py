"""From the user's data to a trained model, and from the model back to the user's data.

:func:`fit` reads data, infers a schema, trains a model and gives a :class:`Fitted`; :func:`load` reads one back from
its folder.  Everything that goes into a ``Fitted`` and comes out of it has the user's own form: a path, a DataFrame,
an array.  The command line is a thin skin over this module.

A run is a folder::

    config.json            format, versions, source, split, options, results, and the model's description
    schema.toml            how the data is read; editable
    model.safetensors      the weights
    reference.safetensors  nats of held-out and of training examples, which outlier ranks refer to
    log.jsonl              one line a log entry of the training
    state/                 what is needed to resume
"""

from __future__ import annotations

import difflib
import functools
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from likely import __version__, models
from likely.contract import (
    Binary,
    Counts,
    Integers,
    Kind,
    Model,
    Reals,
    Space,
    Table,
    Tokens,
    Unsupported,
    check_names,
    check_options,
)
from likely.data import Dataset, Dequantise, Passes, Preprocessed, Schema, Split, infer_schema, split
from likely.data.columns import Encoder, TextCells, Where, spell
from likely.data.constraints import ROWS as CONSTRAINT_ROWS
from likely.data.constraints import Constraint, find_constraints
from likely.data.errors import pandas_for
from likely.data.sequences import SequenceForm
from likely.data.sources import EMBEDDED, Source, recognise
from likely.data.tables import TableForm
from likely.data.weights import read_weights, weighted_rows
from likely.evaluation import Evaluation, column_nats, evaluate, held_out, interpolate, tail_probability
from likely.evaluation.anomaly import AnomalyScale
from likely.evaluation.heldout import ExampleNoise, default_batch_size, device_batches, evaluating
from likely.evaluation.synthetic import Measure, compare_samples, pair_scores
from likely.memory import TRAINED_COPIES, check_training_memory, free_memory
from likely.noise import KeyedNoise, Noise, TemperedNoise
from likely.training import TrainOptions, TrainResult, load_weights, save_weights, train
from likely.training.checkpoints import load_tensors, save_tensors, write_atomically
from likely.training.processes import resolve_device
from likely.training.selection import DEFAULT_BUDGET, Candidate, Trial, choose, shortlist

if TYPE_CHECKING:
    import pandas as pd

    from likely.archive import Sizes
    from likely.coding.container import Limits

#: Cells of an example from which on a model is first built without memory, to see whether it fits.
_LARGE_EXAMPLE = 1 << 15
#: Version of a run's folder.
FORMAT = 1
#: Examples of the held-out and of the training set each whose nats are kept with the run.
REFERENCE_EXAMPLES = 10_000
#: What the law of the columns is called among the reference tensors.
_COLUMNS = "columns."
#: Held-out examples that a report draws on.
REPORTED_EXAMPLES = 2_000
#: Temperatures at which a report shows samples of a flow over images.
SHOWN_TEMPERATURES = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)


# --------------------------------------------------------------------------------------------------------------
# Fitting
# --------------------------------------------------------------------------------------------------------------


def fit(
    data: Any,
    model: str | Model = "auto",
    *,
    out: str | Path | None = None,
    given: str | Sequence[str] | None = None,
    schema: Schema | str | Path | Mapping[str, Any] | None = None,
    read: Mapping[str, Any] | None = None,
    seed: int = 0,
    valid_fraction: float = 0.1,
    test_fraction: float = 0.0,
    overwrite: bool = False,
    progress: bool = True,
    callbacks: Sequence[Any] = (),
    search: Literal["all", "closed form"] = "all",
    weights: str | None = None,
    **options: Any,
) -> Fitted:
    """Fit a model to data: infer the schema, split, train, keep the best held-out weights.

    Args:
        data: a path, DataFrame, array, or the name of one of scikit-learn's sets; see :func:`likely.data.infer_schema`.
        model: name of a model (``likely models`` lists them), a model over the data's space, or ``auto``: for tables
            the one of a short list that is best on held-out rows (``budget`` says how long, 60 s by default), for all
            else, or where options of the model are given, ``vae``.
        out: folder of the run; None keeps nothing on disk.
        given: columns, or ``label``, that the model is conditioned on.
        schema: a schema, or a TOML file or mapping whose entries override the inferred ones.
        read: options of the reader, such as ``{"delimiter": ";"}``.
        seed: of the split, the initial weights and the training.
        valid_fraction: share of the examples held out for early stopping.
        test_fraction: share of the examples kept aside for :meth:`Fitted.evaluate`.
        overwrite: whether a run in ``out`` may be replaced.
        progress: whether to show how training goes, on standard error.
        callbacks: see :func:`likely.training.train`.
        search: which models take part where ``model`` is ``auto``; ``closed form`` searches matrices of reals as well,
            and makes the same choice on any machine.
        weights: column of a table with the weights of its rows; it is not modelled.
        **options: the model's options and those of :class:`~likely.training.TrainOptions`, by name.

    Returns:
        The fitted model with its schema.

    Raises:
        ValueError: data, schema or an option is at fault; the message names file, row, column or option.

    >>> from sklearn.datasets import load_iris
    >>> fitted = fit(load_iris().data, "gaussian", progress=False)
    >>> fitted.score_samples(load_iris().data[:2]).shape
    (2,)
    """
    folder = None if out is None else Path(out)
    if folder is not None and _is_first_process():
        _claim(folder, overwrite)
    model_options, train_options = _split_options("vae" if model == "auto" else model, options, seed)
    names = [given] if isinstance(given, str) else list(given or ())
    data = _kept(data, read)
    found = schema if isinstance(schema, Schema) else _infer(data, schema, names, read, weights)
    dataset = found.read(data, cache=None if folder is None else folder / "cache", **_file_options(read))
    parts = split(len(dataset), {"valid": valid_fraction, "test": test_fraction}, seed=seed)
    indices = _weighted(parts.indices, found, data, weights, read)
    trials: list[Trial] = []
    if model == "auto":
        model, options, trials = _choose(dataset, indices, options, seed, search, progress)
        model_options, train_options = _split_options(model, options, seed)
    built = (
        model
        if isinstance(model, Model)
        else build_model(model, found.space, found.condition_space, seed, model_options)
    )
    record = {
        "format": FORMAT,
        "state": "training",
        "likely": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "name": model if isinstance(model, str) else model.name(),
        "source": str(data) if isinstance(data, (str, Path)) else None,
        "source_path": _absolute(data),
        "examples": {"all": len(dataset), **{name: len(index) for name, index in parts.indices.items()}},
        "read": dict(read or {}),
        "split": parts.to_json(),
        "weights": weights,
        "seed": seed,
        "training": train_options.to_json(),
        **({"search": [trial.to_json() for trial in trials]} if trials else {}),
        **models.describe(built),
    }
    fitted = Fitted(found, built, record, folder)
    if folder is not None and _is_first_process():
        fitted._write_record()
    return _train(fitted, dataset, indices, train_options, progress, callbacks, resume=False)


def resume(run: str | Path, data: Any = None, *, progress: bool = True, callbacks: Sequence[Any] = ()) -> Fitted:
    """Go on with a run that was stopped, to the bits of a run that was never stopped.

    Args:
        run: the run's folder.
        data: the data it was fitted to; by default the recorded source.
        progress: whether to show how training goes, on standard error.
        callbacks: see :func:`likely.training.train`.

    Raises:
        ValueError: no run is in the folder, or the data are not those the run began with.
    """
    fitted = load(run, weights=False)
    record = fitted.record
    if record["state"] == "finished":
        return load(run)
    source = data if data is not None else _find_source(record)
    if source is None:
        raise ValueError(f"{run}: the run was fitted to data in memory; pass them as data=")
    dataset = fitted.schema.read(source, cache=Path(run) / "cache", **_file_options(record["read"]))
    parts = _split_as_recorded(dataset, fitted, source)
    options = TrainOptions(**record["training"])
    return _train(fitted, dataset, parts, options, progress, callbacks, resume=True)


def load(run: str | Path, *, weights: bool = True) -> Fitted:
    """Read a run from its folder.

    Args:
        run: the folder given to ``fit(out=...)`` or ``Fitted.save``.
        weights: whether the weights must be there (they are, once a run has finished).

    Raises:
        FileNotFoundError: the folder holds no run.
        ValueError: it was written by a newer version, is damaged, or has no finished model.
    """
    folder = Path(run)
    try:
        record = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: expected the folder of a run, found no config.json in it") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder / 'config.json'}: damaged, not JSON (line {error.lineno})") from None
    if not isinstance(record, dict) or "format" not in record or "model" not in record:
        raise ValueError(f"{folder / 'config.json'}: expected the configuration of a run")
    if record["format"] > FORMAT:
        raise ValueError(
            f"{folder}: written in format {record['format']} by likely {record.get('likely')}; this is "
            f"likely {__version__}, which reads formats up to {FORMAT}: upgrade it"
        )
    schema = Schema.from_toml((folder / "schema.toml").read_text(encoding="utf-8"))
    model = models.build({key: record[key] for key in ("model", "space", "condition", "options")})
    path = folder / "model.safetensors"
    if path.exists():
        load_weights(model, path)
    elif weights:
        raise ValueError(f"{folder}: the run has no finished model yet; go on with `likely resume {folder}`")
    return Fitted(schema, model.eval(), record, folder)


def build_model(
    name: str,
    space: Space,
    condition: Space | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> Model:
    """An untrained model by name, over a space; a model of densities is put behind dequantisation where it must be.

    Args:
        seed: of the initial weights; the global random state is left alone.

    Raises:
        Unsupported: the model is not defined on the space or takes no condition; the message names models that fit.
    """
    cls, own = models.find(name), dict(options or {})
    check_options(cls, own)
    if condition is not None and not cls.conditional:
        able = ", ".join(other for other in models.names() if models.find(other).conditional)
        raise Unsupported(f"given: model {name!r} takes no condition; models that do: {able}")
    given = (condition,) if cls.conditional else ()
    if isinstance(space, cls.spaces):
        construct = functools.partial(cls, space, *given, **own)
    elif Reals in cls.spaces and isinstance(space, (Binary, Integers, Counts)):
        construct = functools.partial(_dequantised, cls, space, *given, **own)
    else:
        able = ", ".join(other for other in models.names() if isinstance(space, models.find(other).spaces))
        raise Unsupported(f"model: {name!r} is not defined on {type(space).__name__} data; models that are: {able}")
    with torch.random.fork_rng(devices=[]):
        if space.dims >= _LARGE_EXAMPLE and not cls.closed_form:
            _foresee_memory(name, construct)
        torch.manual_seed(seed)
        return construct()


def _dequantised(cls: type[Model], space: Any, *given: Any, **options: Any) -> Model:
    """A model of densities behind dequantisation."""
    return Preprocessed(cls(Reals(space.shape), *given, **options), Dequantise(space))


def _foresee_memory(name: str, construct: Callable[[], Model]) -> None:
    """Refuse a model whose weights could be made but not be trained, before memory is taken for them."""
    free = free_memory(torch.device("cpu"))
    if free is None or resolve_device("auto").type != "cpu":  # elsewhere it is asked where the training is
        return
    try:
        with torch.device("meta"):
            parameters = list(construct().parameters())
    except RuntimeError:  # it computes with its weights
        return
    check_training_memory(name, parameters, 1 + TRAINED_COPIES, free)


def _choose(
    dataset: Dataset,
    parts: Mapping[str, Tensor],
    options: Mapping[str, Any],
    seed: int,
    search: str,
    progress: bool,
) -> tuple[str, dict[str, Any], list[Trial]]:
    """The model that ``auto`` stands for, the options of its fit, and what was tried."""
    if search not in ("all", "closed form"):
        raise ValueError(f"search: expected 'all' or 'closed form', got {search!r}")
    training = {field.name for field in fields(TrainOptions)}
    closed = search == "closed form"
    searched = (isinstance(dataset.space, Table) or closed) and set(options) <= training
    candidates = [Candidate("vae")]
    if searched:
        candidates = shortlist(dataset.space, len(parts["train"]), dataset.condition_space is not None, closed)
        if not candidates:
            raise Unsupported(f"model: no model in closed form is defined on {type(dataset.space).__name__} data")
    if len(candidates) == 1 or not len(parts["valid"]):  # nothing to choose, or nothing to choose by
        return candidates[0].name, {**candidates[0].options, **options}, []
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("model: expected the name of a model where several processes train, got 'auto'")
    choice = choose(
        candidates,
        lambda name, own: build_model(name, dataset.space, dataset.condition_space, seed, own),
        dataset.subset(parts["train"]),
        dataset.subset(parts["valid"]),
        TrainOptions(seed=seed, **options),
        trainer=train,
        report=(lambda line: print(line, file=sys.stderr)) if progress and _is_first_process() else None,
    )
    best = choice.candidate
    chosen = {**best.options, **best.training, **options}
    limited = not best.closed_form or options.get("budget") is not None
    if limited and not {"steps", "epochs"} & set(options):
        whole = options.get("budget") or DEFAULT_BUDGET
        chosen["budget"] = max(whole - choice.seconds, whole / 4)
    return best.name, chosen, choice.trials


def _split_options(model: str | Model, options: Mapping[str, Any], seed: int) -> tuple[dict[str, Any], TrainOptions]:
    """Options by name, sorted into the model's and the training's; an unknown one is refused."""
    training = {field.name for field in fields(TrainOptions)} - {"seed"}
    own: set[str] = set()
    if isinstance(model, str):
        own = set(models.find(model).options())
    title = model if isinstance(model, str) else model.name()
    check_names(f"model {title!r}", options, [*sorted(own), *sorted(training)])
    chosen = TrainOptions(seed=seed, **{key: value for key, value in options.items() if key in training})
    return {key: value for key, value in options.items() if key in own}, chosen


# --------------------------------------------------------------------------------------------------------------
# What was fitted
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """What the model says of rows, one value an example.

    Args:
        kind: what ``nats`` is: ``exact``, ``lower bound`` or ``estimate``.
        nats: log-likelihood, nats, shape ``(n,)``; high is normal.
        tail: share of the held-out examples of the fit that are no likelier (a conformal p-value), shape ``(n,)``;
            small is an outlier.
        rank: the same share of the training examples: the rank among the data that the model has seen.
        column_nats: what each cell adds to ``nats``, shape ``(n, cells)``, or None where the model does not say.
        columns: names of the cells.
        excess: how many nats less likely each cell is than the column's cells usually are, as ``column_nats``.
        anomaly: anomaly score of :mod:`likely.evaluation.anomaly`, shape ``(n,)``; high is anomalous.  None for a run
            that keeps no law of the columns.
        anomaly_tail: share of the held-out examples of the fit whose anomaly score is no lower (a conformal p-value).
    """

    kind: Kind
    nats: np.ndarray
    tail: np.ndarray
    rank: np.ndarray
    column_nats: np.ndarray | None = None
    columns: tuple[str, ...] = ()
    excess: np.ndarray | None = None
    anomaly: np.ndarray | None = None
    anomaly_tail: np.ndarray | None = None

    def reasons(self, most: int = 3) -> list[str]:
        """For each example the columns that made it least likely, with their excess in nats."""
        if self.excess is None:
            return [""] * len(self.nats)
        out = []
        for row in self.excess:
            order = [j for j in np.argsort(-row, kind="stable")[:most] if row[j] > 0]
            out.append("; ".join(f"{self.columns[j]} (+{row[j]:.1f})" for j in order))
        return out

    def to_frame(self) -> pd.DataFrame:
        """A DataFrame: nats, tail probability, rank, anomaly score, reasons, and the nats of each cell of a table."""
        pd = pandas_for("a table of scores")
        data: dict[str, Any] = {"nats": self.nats, "tail_probability": self.tail, "training_rank": self.rank}
        if self.anomaly is not None:
            data |= {"anomaly": self.anomaly, "anomaly_probability": self.anomaly_tail}
        if self.column_nats is not None:
            data["unlikely_because"] = self.reasons()
            for j, name in enumerate(self.columns):
                data[f"nats:{name}"] = self.column_nats[:, j]
        return pd.DataFrame(data)


class Fitted:
    """A trained model with the schema of its data.

    Args:
        schema: how the user's data becomes tensors and back.
        model: the trained model, in eval mode.
        record: the content of ``config.json``.
        folder: the run's folder, or None while it is only in memory.
    """

    def __init__(self, schema: Schema, model: Model, record: dict[str, Any], folder: Path | None = None) -> None:
        self.schema, self.model, self.record, self.folder = schema, model, record, folder
        self.result: TrainResult | None = None
        self._reference: dict[str, Tensor] = {}
        self._data: tuple[Dataset, Mapping[str, Tensor]] | None = None

    def __repr__(self) -> str:
        return f"<Fitted {self.model.title()} over {type(self.schema.space).__name__}{self.schema.space.shape}>"

    # Numbers -------------------------------------------------------------------------------------------------

    def score_samples(self, data: Any, *, seed: int = 0, read: Mapping[str, Any] | None = None) -> np.ndarray:
        """Log-likelihood of each example in nats, or the model's bound on it: shape ``(n,)``; high is normal."""
        dataset = self.schema.read(data, **dict(read or {}))
        return held_out(self.model, dataset, seed=seed).example_nats.numpy()

    def score(self, data: Any, *, seed: int = 0, read: Mapping[str, Any] | None = None) -> float:
        """Mean log-likelihood of the examples in nats, or of the bound on it."""
        return float(self.score_samples(data, seed=seed, read=read).mean())

    def scores(
        self,
        data: Any,
        *,
        seed: int = 0,
        columns: bool = True,
        read: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Log-likelihood, outlier rank and, for tables, the columns that made each row unlikely.

        Args:
            data: rows in the form of the fitted data.
            columns: whether to ask for the contribution of each column (tables only).
        """
        dataset = self.schema.read(data, **dict(read or {}))
        found = held_out(self.model, dataset, seed=seed)
        reference = self._references()
        tail, rank = (
            tail_probability(reference[name], found.example_nats).numpy() for name in ("held_out_nats", "train_nats")
        )
        result = Scores(found.kind, found.example_nats.numpy(), tail, rank)
        if "held_out_columns_nats" in reference:
            usual_nats = reference["held_out_nats"], reference["held_out_columns_nats"]
            scale = AnomalyScale.of(*usual_nats)
            columns_nats = held_out(self._columns_law(), _unconditional(dataset)).example_nats
            anomaly = scale.score(found.example_nats, columns_nats)
            anomaly_tail = tail_probability(-scale.score(*usual_nats), -anomaly)
            result = replace(result, anomaly=anomaly.numpy(), anomaly_tail=anomaly_tail.numpy())
        if not columns or not isinstance(dataset.space, Table) or not self.model.can("column_nats"):
            return result
        cells = column_nats(self.model, dataset, seed=seed)
        usual = reference.get("usual_column_nats", cells.nanmean(0))
        names = tuple(column.name for column in dataset.space.columns)
        excess = torch.where(torch.isnan(dataset.x), 0.0, usual - cells)
        return replace(result, column_nats=cells.numpy(), columns=names, excess=excess.numpy())

    def evaluate(
        self,
        data: Any = None,
        *,
        samples: int | None = None,
        seed: int = 0,
        baselines: bool = True,
        classic: bool = True,
        weights: str | None = None,
        batch_size: int | None = None,
        read: Mapping[str, Any] | None = None,
        progress: Any = None,
    ) -> Evaluation:
        """Held-out nats and bits with standard error and kind, beside baselines and classic compressors.

        Args:
            data: held-out data; by default the part that the fit kept aside (``test_fraction``), or else the part
                it used for early stopping.
            samples: number of importance samples of the tighter bound, for models with latent variables.
            seed: of the noise of the evaluation.
            baselines: whether to fit ``independent`` and ``gaussian`` to the training data.
            classic: whether to measure zlib, xz, … on the same examples.
            weights: column of ``data`` with the weights of its rows; without ``data`` the weights are those of the fit.
            batch_size: examples at a time; it changes speed and memory, not the value.
            progress: called with stage, done and all.
        """
        data = _kept(data, read)
        dataset = self.schema.read(data, **dict(read or {})) if data is not None else self._part("test", "valid")
        if weights is not None:
            if data is None:
                raise ValueError("weights: expected data beside it; what the fit kept aside is weighted as the fit was")
            dataset = dataset.subset(weighted_rows(read_weights(self.schema, data, weights, **_file_options(read))))
        return self._evaluate(dataset, samples, seed, baselines, classic, batch_size, progress)

    def _evaluate(
        self,
        dataset: Dataset,
        samples: int | None,
        seed: int,
        baselines: bool,
        classic: bool,
        batch_size: int | None = None,
        progress: Any = None,
    ) -> Evaluation:
        raw, frame = self._as_kept(dataset) if classic else (None, None)
        return evaluate(
            self.model,
            dataset,
            name=self.record["name"],
            train_set=self._part("train", optional=True) if baselines else None,
            samples=samples,
            seed=seed,
            batch_size=batch_size,
            baselines=baselines,
            classic=classic,
            raw=raw,
            frame=frame,
            progress=progress,
        )

    # Data out ------------------------------------------------------------------------------------------------

    def sample(
        self,
        n: int,
        *,
        seed: int = 0,
        where: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        prefix: str | None = None,
    ) -> Any:
        """``n`` examples in the user's own form: a DataFrame, an array, texts.

        Args:
            seed: the same seed gives the same examples.
            where: values of columns: of those the model was conditioned on (all of them are needed then), or of any
                others of a table, which are drawn given these by importance resampling.
            temperature: below 1 for more usual and less diverse examples, of models whose samples are made of normal
                noise (flows); at 1 they have the model's own law.
            prefix: what every example begins with, of texts and sequences; the rest is drawn given it.

        Raises:
            ValueError: a column or value is unknown, or the condition is not complete, or the model draws at
                temperature 1 only, or the prefix is none of this data.
        """
        x, condition = self._sample(n, seed, dict(where or {}), temperature, prefix)
        return self.schema.to_user(x, condition)

    def _sample(
        self, n: int, seed: int, where: dict[str, Any], temperature: float, prefix: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if n < 1:
            raise ValueError(f"n: expected at least one example, got {n}")
        condition = self._condition(where, n)
        if not where and prefix is None:
            return self._draw(n, condition, seed, temperature), condition
        name = "where" if prefix is None else "prefix"
        if temperature != 1.0:
            raise ValueError(f"temperature: cells that are drawn given others ({name}) are drawn at temperature 1")
        if where and not isinstance(self.schema.space, Table):
            raise ValueError(f"where: this data has no columns, got {', '.join(where)}")
        if prefix is not None and not isinstance(self.schema.form, SequenceForm):
            raise ValueError("prefix: expected a model of texts or sequences; this data has columns or pixels")
        if not self.model.can("impute"):
            raise ValueError(f"{name}: model {self.model.name()!r} cannot draw some cells given others")
        row = self._partial_row(where) if prefix is None else self._begun(prefix)
        pieces = []
        with evaluating(self.model) as device:
            for start in range(0, n, 100):
                size = min(100, n - start)
                noise = KeyedNoise(seed, torch.arange(start, start + size, device=device))
                part = None if condition is None else condition[start : start + size].to(device)
                drawn = self.model.impute(row.expand(size, -1).to(device), part, noise, draws=1)[0]  # type: ignore[operator]
                pieces.append(drawn.cpu())
        return torch.cat(pieces), condition

    def _begun(self, prefix: str) -> Tensor:
        """One sequence of which only the beginning is known, NaN elsewhere: shape ``(1, length)``."""
        form = self.schema.form
        assert isinstance(form, SequenceForm)
        codes = form.codes(prefix, "prefix")
        row = torch.full((1, form.length), torch.nan, dtype=torch.float64)
        row[0, : len(codes)] = torch.tensor(codes, dtype=torch.float64)
        return row

    def _draw(self, n: int, condition: Tensor | None, seed: int, temperature: float = 1.0) -> Tensor:
        """``n`` samples, each under its row of the condition where the model has one."""
        if temperature != 1.0 and not self.model.tempered:
            raise ValueError(f"temperature: model {self.record['name']!r} draws at temperature 1, got {temperature}")
        with evaluating(self.model) as device:
            noise: Noise = KeyedNoise(seed, torch.arange(n, device=device))
            noise = noise if temperature == 1.0 else TemperedNoise(noise, temperature)
            return self.model.sample(n, None if condition is None else condition.to(device), noise).cpu()

    def impute(
        self,
        data: Any,
        *,
        draws: int = 0,
        seed: int = 0,
        read: Mapping[str, Any] | None = None,
    ) -> Any:
        """The data with its missing cells filled; observed cells stay as they are.

        Args:
            data: rows in the form of the fitted data, with holes in any column.
            draws: 0 for the single best values (means of numbers, modes of categories), m for a list of m multiple
                imputations, drawn from the model.
            seed: of the draws, and of the samples behind the best values.
        """
        data = _kept(data, read)
        filled, condition = self._impute(data, draws, seed, read)
        if isinstance(data, (str, Path, Source)):  # a file: its cells in the user's form
            results = [self.schema.to_user(x, condition) for x in filled]
        else:  # an object: itself, with its holes filled
            results = [self.schema.complete(data, x, **dict(read or {})) for x in filled]
        return results if draws else results[0]

    def _impute(
        self, data: Any, draws: int, seed: int, read: Mapping[str, Any] | None
    ) -> tuple[list[Tensor], Tensor | None]:
        if draws < 0:
            raise ValueError(f"draws: expected 0 or more, got {draws}")
        if not self.model.can("impute"):
            able = ", ".join(name for name in models.names() if hasattr(models.find(name), "impute"))
            raise ValueError(f"model {self.model.name()!r} cannot impute; models that can: {able}")
        dataset = _with_holes(self.schema).read(data, **dict(read or {}))
        results: list[list[Tensor]] = [[] for _ in range(max(draws, 1))]
        with evaluating(self.model) as device:
            for _, x, condition in device_batches(dataset, 64, device):
                noise = ExampleNoise(seed, x, condition)
                filled = self.model.impute(x, condition, noise, draws=draws)  # type: ignore[operator]
                for result, part in zip(results, filled if draws else [filled]):
                    result.append(part.cpu())
        return [torch.cat(parts) for parts in results], dataset.condition

    def transform(self, data: Any, *, read: Mapping[str, Any] | None = None) -> np.ndarray:
        """Mean embedding of each example, deterministic: shape ``(n, latent_dim)``, float32."""
        if not self.model.can("encode"):
            able = ", ".join(name for name in models.names() if hasattr(models.find(name), "encode"))
            raise ValueError(f"model {self.model.name()!r} has no embedding; models that have: {able}")
        dataset = self.schema.read(data, **dict(read or {}))
        return self._encode(dataset).numpy()

    def _encode(self, dataset: Dataset) -> Tensor:
        with evaluating(self.model) as device:
            parts = [
                self.model.encode(x, condition).float().cpu()  # type: ignore[operator]
                for _, x, condition in device_batches(dataset, default_batch_size(dataset.space), device)
            ]
        return torch.cat(parts)

    def write_samples(
        self,
        path: str | Path,
        n: int,
        *,
        seed: int = 0,
        where: Mapping[str, Any] | None = None,
        temperature: float = 1.0,
        prefix: str | None = None,
    ) -> dict[str, list[int]]:
        """Write :meth:`sample` as a file of the fitted data's own kind (``"-"`` is standard output).

        Returns:
            The rows that break a rule of the fitted table, as :meth:`broken_constraints`.
        """
        x, condition = self._sample(n, seed, dict(where or {}), temperature, prefix)
        self.schema.write(x, path, condition)
        return self._broken(x)

    def constraints(self) -> list[Constraint]:
        """The rules between columns that all rows of the fitted table keep: ``a <= b``, ``a = b + c``, ``a -> b``."""
        return [Constraint.from_json(rule) for rule in self.record.get("constraints", ())]

    def broken_constraints(self, data: Any, *, read: Mapping[str, Any] | None = None) -> dict[str, list[int]]:
        """Rows that break a rule of the fitted table, by rule: positions from 0; rules that all keep are left out."""
        return self._broken(self.schema.read(data, **dict(read or {})).x)

    def _broken(self, x: Tensor) -> dict[str, list[int]]:
        space = self.schema.space
        if not isinstance(space, Table):
            return {}
        found = {str(rule): rule.broken(x, space).tolist() for rule in self.constraints()}
        return {rule: rows for rule, rows in found.items() if rows}

    def write_imputed(
        self, data: Any, path: str | Path, *, draws: int = 0, seed: int = 0, read: Mapping[str, Any] | None = None
    ) -> list[Path]:
        """Write the data with its missing cells filled, all else as it is; m draws go to m numbered files.

        Returns:
            The files written.
        """
        if draws > 1 and str(path) == "-":
            raise ValueError(f"draws: {draws} imputations need a file name, not standard output")
        data = _kept(data, read)
        filled, _ = self._impute(data, draws, seed, read)
        options = dict(read or {})
        target = Path(path)
        if draws < 2:
            self.schema.complete(data, filled[0], path, **options)
            return [target]
        stem, suffixes = target.name.split(".", 1) if "." in target.name else (target.name, "")
        files = [target.with_name(f"{stem}-{k + 1}" + (f".{suffixes}" if suffixes else "")) for k in range(draws)]
        for x, file in zip(filled, files):
            self.schema.complete(data, x, file, **options)
        return files

    def compress(
        self,
        data: Any,
        path: str | Path | BinaryIO,
        *,
        embed: bool = False,
        verify: bool = True,
        workers: int | None = None,
        read: Mapping[str, Any] | None = None,
        limits: Limits | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Sizes:
        """Compress data without loss into a ``.lk`` file; :func:`likely.decompress` restores it.

        Args:
            data: rows in the form of the fitted data; what the schema refuses is kept too, beside the model.
            path: the file to write, or a binary stream; a file appears when it is complete, and not before.
            embed: whether the file carries the model (its weights rounded), so that it needs no run.
            verify: decode every chunk before it is written.
            workers: processes at work; by default one a core.
            read: how this data differs from the fitted.
            limits: what the file may hold.
            progress: called with ``"rows"``, rows done and all rows.

        Returns:
            What the file costs, and what for.

        Raises:
            NoCodec: the model has no codec; the message says why.
        """
        from likely import archive
        from likely.coding.weights import pack, unpack

        model, packed = self.model.cpu(), None
        if embed:
            packed = pack(model, models.describe)
            model = unpack(packed, models.build)
        run = None if embed or self.folder is None else str(self.folder)
        return archive.compress(
            model,
            self.schema,
            _kept(data, read),
            path,
            embed=packed,
            run=run,
            verify=verify,
            workers=workers,
            read=read,
            limits=limits,
            progress=progress,
        )

    def report(
        self,
        path: str | Path,
        data: Any = None,
        *,
        samples: int | None = None,
        seed: int = 0,
        read: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write one self-contained HTML page: what was fitted, how well, and what the model makes.

        Args:
            path: the page.
            data: held-out data; by default those of :meth:`evaluate`.
            samples: importance samples of the tighter bound, for models with latent variables.
            seed: of the samples shown and of the evaluation.
        """
        from likely.report import ReportInput, write_report

        held = self.schema.read(data, **dict(read or {})) if data is not None else self._part("test", "valid")
        evaluation = self._evaluate(held, samples, seed, baselines=True, classic=True)
        shown = held.subset(slice(0, REPORTED_EXAMPLES))
        x, condition = next(shown.batches(len(shown)))
        x = x.cpu()
        known = self._part("train", optional=True) if isinstance(self.schema.space, Table) else None
        known = None if known is None else known.subset(slice(0, 5 * REPORTED_EXAMPLES))
        once = known is not None and condition is None  # one draw is shown and measured
        drawn = self._draw(max(len(shown), len(known)) if known is not None and once else len(shown), condition, seed)
        measures, pairs = self._against_real(known, x, drawn if once else None, seed)
        content = ReportInput(
            title=f"{self.record['name']} on {self.record['source'] or 'data in memory'}",
            space=self.schema.space,
            model=self.record["name"],
            options=self.record["options"],
            parameters=sum(p.numel() for p in self.model.parameters()),
            facts=self._facts(),
            schema=self.schema.describe(),
            evaluations=[evaluation],
            history=self.history(),
            data=self._shown(x, condition),
            samples=self._shown(drawn[: len(shown)], condition),
            measures=measures,
            pairs=pairs,
            reconstructions=self._reconstructions(x, condition),
            embedding=self._encode(shown).numpy() if self.model.can("encode") else None,
            sheets=self._sheets(x, condition, seed),
        )
        return write_report(path, content)

    def _against_real(
        self, known: Dataset | None, held: Tensor, drawn: Tensor | None, seed: int
    ) -> tuple[list[Measure], list[tuple[str, str, float, float]]]:
        """How good drawn rows of a table are beside held-out ones, and the scores of the pairs of columns of both.

        Args:
            known: training rows that both are held against; of none nothing is said.
            drawn: as many or more, or None to draw as many under the condition of the training rows.
        """
        space = self.schema.space
        if known is None or not isinstance(space, Table):
            return [], []
        x, condition = next(known.batches(len(known)))
        x = x.cpu()
        drawn = self._draw(len(x), condition, seed) if drawn is None else drawn[: len(x)]
        names = [column.name for column in space.columns]
        both = [{(i, j): score for i, j, score in pair_scores(x, part, space)} for part in (drawn[: len(held)], held)]
        pairs = [(names[i], names[j], both[0][i, j], both[1][i, j]) for i, j in both[0] if (i, j) in both[1]]
        return compare_samples(x, held, drawn, space), pairs

    def _facts(self) -> dict[str, Any]:
        examples, results = self.record["examples"], self.record.get("results") or {}
        return {
            "data": self.record["source"] or "in memory",
            "examples": ", ".join(f"{count:,} {name}" for name, count in examples.items()),
            "seed": self.record["seed"],
            "steps": results.get("steps"),
            "stopped by": results.get("stopped"),
            "seconds": results.get("seconds"),
            "fitted": self.record["created"],
            "likely": self.record["likely"],
        }

    def _shown(self, x: Tensor, condition: Tensor | None) -> Any:
        """Examples in the form a report shows: as the user has them, but images in the model's layout."""
        if isinstance(self.schema.space, (Table, Tokens)):
            return self.schema.to_user(x, condition)
        return x.numpy()

    def _sheets(self, x: Tensor, condition: Tensor | None, seed: int) -> list[tuple[str, str, np.ndarray]]:
        """Of a flow over images: samples at several temperatures, and paths between examples in the latent space."""
        if not self.model.tempered or len(x) < 8 or len(self.schema.space.shape) not in (2, 3):
            return []
        given = None if condition is None else condition[:12]
        drawn = [self._draw(len(x[:12]), given, seed, temperature).numpy() for temperature in SHOWN_TEMPERATURES]
        shown = ", ".join(f"{temperature:g}" for temperature in SHOWN_TEMPERATURES)
        said = f"Temperatures {shown}, from above; the same noise in each column."
        sheets = [("Samples at reduced temperature", said, np.stack(drawn))]
        if self.model.can("encode") and self.model.can("decode"):
            start = None if condition is None else condition[:4]
            paths = interpolate(self.model, x[:4], x[4:8], 12, start).transpose(0, 1).numpy()
            sheets.append(("Paths in the latent space", "In each row from one example of the data to another.", paths))
        return sheets

    def _reconstructions(self, x: Tensor, condition: Tensor | None) -> tuple[Any, Any] | None:
        """Some examples, and what the model decodes their mean embedding to."""
        if not (self.model.can("encode") and self.model.can("decode")):
            return None
        some, there = x[:16], None if condition is None else condition[:16]
        with evaluating(self.model) as device:
            on_device = None if there is None else there.to(device)
            z = self.model.encode(some.to(device), on_device)  # type: ignore[operator]
            again = self.model.decode(z, on_device).cpu()  # type: ignore[operator]
        return self._shown(some, there), self._shown(again, there)

    # The run -------------------------------------------------------------------------------------------------

    def info(self) -> dict[str, Any]:
        """What was fitted, to what, and how it went, as JSON values."""
        parameters = sum(p.numel() for p in self.model.parameters())
        return {
            "model": self.record["name"],
            "options": self.record["options"],
            "parameters": parameters,
            "space": self.record["space"],
            "condition": self.record["condition"],
            "state": self.record["state"],
            "source": self.record["source"],
            "examples": self.record["examples"],
            "seed": self.record["seed"],
            "results": self.record.get("results"),
            "created": self.record["created"],
            "likely": self.record["likely"],
            "torch": self.record["torch"],
        }

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the run to a folder, which :func:`load` reads back; JSON, TOML and safetensors, no pickle."""
        target = Path(folder)
        _claim(target, overwrite)
        reference = self._references(optional=True)
        previous, self.folder = self.folder, target
        self._write_record()
        save_weights(self.model, target / "model.safetensors")
        if reference:
            save_tensors(reference, target / "reference.safetensors")
        if previous is not None and (previous / "log.jsonl").exists():
            (target / "log.jsonl").write_bytes((previous / "log.jsonl").read_bytes())
        return target

    def history(self) -> list[dict[str, Any]]:
        """The records of the training log, oldest first; empty for a run that was only in memory."""
        path = None if self.folder is None else self.folder / "log.jsonl"
        if path is None or not path.exists():
            return [] if self.result is None else self.result.history
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def _write_record(self) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.record, indent=2, ensure_ascii=False) + "\n"
        for name, content in (("schema.toml", self.schema.to_toml()), ("config.json", text)):
            _write_text(self.folder / name, content)

    def _references(self, optional: bool = False) -> dict[str, Tensor]:
        if not self._reference and self.folder is not None and (self.folder / "reference.safetensors").exists():
            self._reference = load_tensors(self.folder / "reference.safetensors")
        if not self._reference and not optional:
            raise ValueError("the run keeps no reference scores; it was stopped before its end")
        return self._reference

    def _keep_reference(self, dataset: Dataset, parts: Mapping[str, Tensor]) -> None:
        """Score some held-out and training examples, for outlier ranks and for what is usual in a column."""
        valid = "valid" if len(parts["valid"]) else "train"
        for name, part in (("held_out_nats", valid), ("train_nats", "train")):
            some = dataset.subset(parts[part][:REFERENCE_EXAMPLES])
            self._reference[name] = held_out(self.model, some).example_nats
        if isinstance(dataset.space, Table):
            law = models.find("independent")(dataset.space)
            law.estimate(Passes(_unconditional(dataset.subset(parts["train"]))))
            some = _unconditional(dataset.subset(parts[valid][:REFERENCE_EXAMPLES]))
            self._reference["held_out_columns_nats"] = held_out(law, some).example_nats
            self._reference |= {_COLUMNS + name: tensor.cpu() for name, tensor in law.state_dict().items()}
        if isinstance(dataset.space, Table) and self.model.can("column_nats"):
            some = dataset.subset(parts[valid][:REFERENCE_EXAMPLES])
            cells = column_nats(self.model, some)
            cells = torch.where(torch.isnan(some.x), torch.nan, cells)
            self._reference["usual_column_nats"] = torch.nan_to_num(cells.nanmean(0))

    def _columns_law(self) -> Model:
        """The columns, each on its own, as they were fitted beside the model."""
        law = models.find("independent")(self.schema.space)
        kept = {name.removeprefix(_COLUMNS): t for name, t in self._references().items() if name.startswith(_COLUMNS)}
        law.load_state_dict(kept)
        return law.eval()

    def _part(self, *names: str, optional: bool = False) -> Dataset:
        """The first of the named parts of the fitted data that is not empty, read again from its source if need be."""
        if self._data is None:
            source, typed = _find_source(self.record), self.record["source"]
            if source is None or not _readable(source):
                if optional:
                    return None  # type: ignore[return-value]
                gone = f"{typed} is not there any more" if typed else "the run was fitted to data in memory"
                raise ValueError(f"data: pass the data to evaluate; {gone}")
            cache = None if self.folder is None else self.folder / "cache"
            dataset = self.schema.read(source, cache=cache, **_file_options(self.record["read"]))
            self._data = dataset, _split_as_recorded(dataset, self, source)
        dataset, parts = self._data
        for name in names:
            if len(parts[name]):
                return dataset.subset(parts[name])
        raise ValueError("data: the fit held no examples out; pass the data to evaluate")

    def _as_kept(self, dataset: Dataset) -> tuple[bytes | None, Callable[[], Any] | None]:
        """The examples of a table or of texts as the user keeps them: bytes of the file, and what gives a DataFrame."""
        if not isinstance(dataset.space, (Table, Tokens)):
            return None, None
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "held-out"
            self.schema.write(dataset.x, path, dataset.condition)
            raw = path.read_bytes()
        is_table = isinstance(dataset.space, Table)
        return raw, functools.partial(self.schema.to_user, dataset.x, dataset.condition) if is_table else None

    # Values named by a user ------------------------------------------------------------------------------------

    def _condition(self, where: dict[str, Any], n: int) -> Tensor | None:
        """Take the condition's columns out of ``where``: shape ``(n, columns)``, or None."""
        space = self.schema.condition_space
        if not isinstance(space, Table):
            return None
        absent = [column.name for column in space.columns if column.name not in where]
        if absent:
            raise ValueError(f"where: the model is conditional on {', '.join(absent)}; give a value to each")
        values = [self._cell(column.name, where.pop(column.name)) for column in space.columns]
        return torch.tensor(values, dtype=torch.float64).expand(n, -1)

    def _partial_row(self, where: Mapping[str, Any]) -> Tensor:
        """One row with the named cells and holes elsewhere: shape ``(1, columns)``."""
        assert isinstance(self.schema.space, Table)
        names = [column.name for column in self.schema.space.columns]
        row = torch.full((1, len(names)), torch.nan, dtype=torch.float64)
        for name, value in where.items():
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"where: no column {name!r}{hint} (columns: {', '.join(names)})")
            row[0, names.index(name)] = self._cell(name, value)
        return row

    def _cell(self, name: str, value: Any) -> float:
        """Code or value of a cell named by a user."""
        form = self.schema.form
        columns = {column.name: column for column in (*getattr(form, "columns", ()), *getattr(form, "given", ()))}
        text = spell(value) if isinstance(value, float) else str(value)
        encoder = Encoder(replace(columns[name], missing=False), ())
        return float(encoder.encode(TextCells([text]), Where("where"))[0])


# --------------------------------------------------------------------------------------------------------------
# Parts
# --------------------------------------------------------------------------------------------------------------


def _train(
    fitted: Fitted,
    dataset: Dataset,
    parts: Mapping[str, Tensor],
    options: TrainOptions,
    progress: bool,
    callbacks: Sequence[Any],
    resume: bool,
) -> Fitted:
    """Train, keep the reference scores, and close the record."""
    folder = fitted.folder
    valid = dataset.subset(parts["valid"]) if len(parts["valid"]) else None
    result = train(
        fitted.model,
        dataset.subset(parts["train"]),
        valid,
        options,
        run=folder,
        resume=resume,
        callbacks=callbacks,
        progress=progress,
    )
    fitted.result = result
    fitted.model.eval()
    fitted._data = dataset, parts
    fitted._keep_reference(dataset, parts)
    if isinstance(dataset.space, Table):
        rules = find_constraints(dataset.subset(parts["train"][:CONSTRAINT_ROWS]).x, dataset.space)
        fitted.record["constraints"] = [rule.to_json() for rule in rules]
    fitted.record["results"] = result.to_json()
    fitted.record["state"] = "finished"
    if folder is not None and _is_first_process():
        save_tensors(fitted._reference, folder / "reference.safetensors")
        fitted._write_record()
    return fitted


def _unconditional(dataset: Dataset) -> Dataset:
    """The examples without their condition."""
    if dataset.condition is None:
        return dataset
    return Dataset(dataset.space, dataset.x)


def _infer(data: Any, override: Any, given: list[str], read: Mapping[str, Any] | None, weights: str | None) -> Schema:
    options = dict(read or {})
    if given:
        options["given"] = given
    if weights is not None:
        aside = options.get("ignore") or []
        options["ignore"] = [*([aside] if isinstance(aside, str) else aside), weights]
    return infer_schema(data, schema=override, **options)


def _kept(data: Any, read: Mapping[str, Any] | None) -> Any:
    """The data, to be read more than once: standard input is kept in a temporary file."""
    if isinstance(data, str) and data == "-":
        return recognise(data, dict(read or {}).get("format"))
    return data


def _file_options(read: Mapping[str, Any] | None) -> dict[str, Any]:
    """Of the reader's options those that the schema does not keep: how to recognise the file."""
    return {key: value for key, value in dict(read or {}).items() if key in ("format", "memory_limit")}


def _split_as_recorded(dataset: Dataset, fitted: Fitted, source: Any) -> Mapping[str, Tensor]:
    """The split of the run; refuses data that are not those the run began with."""
    record = fitted.record
    expected = record["examples"]["all"]
    if len(dataset) != expected:
        raise ValueError(f"{source}: the run was fitted to {expected} examples, and this has {len(dataset)}")
    indices = Split.from_json(record["split"]).indices
    return _weighted(indices, fitted.schema, source, record.get("weights"), record["read"])


def _weighted(
    parts: Mapping[str, Tensor], schema: Schema, data: Any, weights: str | None, read: Mapping[str, Any] | None
) -> Mapping[str, Tensor]:
    """The rows of every part, each as often as its weight says."""
    if weights is None:
        return parts
    values = read_weights(schema, data, weights, **_file_options(read))
    return {name: index[weighted_rows(values[index])] if len(index) else index for name, index in parts.items()}


def _is_first_process() -> bool:
    """Whether this process is alone or the first of several under ``torchrun``: the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def _claim(folder: Path, overwrite: bool) -> None:
    """Make sure that a run may be written to ``folder``."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: {folder} is a file; expected a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not (folder / "config.json").exists():
        raise ValueError(f"out: {folder} is not empty and holds no run; choose another folder")
    if not overwrite:
        raise ValueError(
            f"out: {folder} holds a run already; choose another folder, `likely resume {folder}` to go on with it, "
            "or overwrite it (overwrite=True, --overwrite)"
        )
    for name in ("config.json", "schema.toml", "model.safetensors", "reference.safetensors", "log.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for name in ("state", "cache", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)


def _with_holes(schema: Schema) -> Schema:
    """The schema with missing cells allowed in every column."""
    form = schema.form
    if isinstance(form, TableForm):
        columns = tuple(c if c.role == "ignore" else replace(c, missing=True) for c in form.columns)
        return replace(schema, form=replace(form, columns=columns))
    return schema


def _absolute(data: Any) -> str | None:
    """Where a file or folder lies, so that it is found from another working folder; None for all else."""
    is_path = isinstance(data, (str, Path)) and str(data) not in ("-", *EMBEDDED)
    return str(Path(data).absolute()) if is_path else None


def _find_source(record: Mapping[str, Any]) -> str | None:
    """The recorded source: as it was typed if it is there, else where it lay."""
    typed = record["source"]
    return record.get("source_path") if typed is not None and not _readable(typed) else typed


def _readable(source: str) -> bool:
    return source in EMBEDDED or Path(source).exists()


def _write_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)
