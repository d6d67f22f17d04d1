"""One record of all that is known of a model on held-out data, with unit, kind and error of every number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from likely.contract import Kind, Model, Space, Table, Tokens, Unsupported
from likely.data.dataset import Dataset
from likely.evaluation.baselines import Baseline, fit_baselines
from likely.evaluation.classic import CodecSize, classic_codecs
from likely.evaluation.heldout import HeldOut, Progress, held_out, standard_error
from likely.evaluation.importance import ImportanceWeighted, importance_weighted
from likely.evaluation.latents import ActiveUnits, active_units
from likely.units import bits, bits_per_byte, bits_per_dim, code_length_bits

if TYPE_CHECKING:
    from rich.table import Table as RichTable

#: Version of :meth:`Evaluation.to_json`.
FORMAT = 1

StageProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Unit:
    """The unit in which a space's code lengths are shown.

    Args:
        name: ``bits/dim``, ``bits/row`` or ``bits/token``.
        per_example: how many of it one example has.
    """

    name: str
    per_example: int

    def of(self, nats: float) -> float:
        """Code length of an example of log-likelihood ``nats``, in this unit."""
        return code_length_bits(nats) if self.per_example == 1 else bits_per_dim(nats, self.per_example)

    def error(self, nats: float) -> float:
        """A standard error in nats per example, in this unit."""
        return bits(nats) / self.per_example


def unit_of(space: Space) -> Unit:
    """Bits a row for tables, bits a token for sequences, bits a dimension for all else.

    >>> from likely.contract import Integers
    >>> unit_of(Integers((3, 32, 32), 256))
    Unit(name='bits/dim', per_example=3072)
    """
    if isinstance(space, Table):
        return Unit("bits/row", 1)
    return Unit("bits/token" if isinstance(space, Tokens) else "bits/dim", space.dims)


def no_bits(space: Space) -> str | None:
    """Why examples of this space have no length in bits, or None if they have one.

    >>> from likely.contract import Binary
    >>> no_bits(Binary((2,))) is None
    True
    """
    if space.has_probability:
        return None
    if isinstance(space, Table):
        names = [repr(column.name) for column in space.columns if not column.has_probability]
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        which = f"column {shown} is" if len(names) == 1 else f"columns {shown} are"
        return (
            f"no bits, only nats: {which} continuous and without a resolution, so a row has a density and no "
            "probability; state the resolution of each (the spacing of its values) in the schema to get bits"
        )
    return (
        "no bits, only nats: the data are continuous and without a resolution, so an example has a density and no "
        "probability"
    )


@dataclass(frozen=True)
class Evaluation:
    """What a model says of held-out data, and what others make of the same data.

    Args:
        model: name of the model.
        space: space of the examples.
        conditional: whether the numbers are of log p(x | condition).
        seed: of the noise of the evaluation.
        held_out: the model's own bound.
        importance: the importance-weighted bound, if asked for and defined; ``importance_note`` says why not.
        active: active latent units, if the model has latent variables.
        baselines: simple models, fitted to the training set.
        codecs: sizes of classic compressors for the same examples.
        raw_bytes: size of the examples as the user keeps them, where known: for bits/byte of texts.
    """

    model: str
    space: Space
    conditional: bool
    seed: int
    held_out: HeldOut
    importance: ImportanceWeighted | None = None
    importance_note: str = ""
    active: ActiveUnits | None = None
    baselines: list[Baseline] = field(default_factory=list)
    codecs: list[CodecSize] = field(default_factory=list)
    raw_bytes: int | None = None

    @property
    def unit(self) -> Unit | None:
        """The unit of code lengths, or None where the data have none."""
        return unit_of(self.space) if self.space.has_probability else None

    @property
    def why_no_bits(self) -> str | None:
        """Why there are no bits, or None if there are."""
        return no_bits(self.space)

    @property
    def best(self) -> HeldOut | ImportanceWeighted:
        """The tightest number on log p(x): the importance-weighted bound where there is one."""
        return self.importance if self.importance is not None else self.held_out

    def sentence(self) -> str:
        """The headline: number, unit, kind, standard error, number of examples."""
        best = self.best
        what = _SAYS[best.kind]
        if isinstance(best, ImportanceWeighted):
            what = f"a lower bound on log p({self._given}) with {best.samples:,} importance samples"
        else:
            what = what.format(self._given)
        nats = f"{with_error(best.nats, best.standard_error)} nats per {self._example}"
        head = nats
        if self.unit is not None:
            head = (
                f"{with_error(self.unit.of(best.nats), self.unit.error(best.standard_error))} {self.unit.name} ({nats})"
            )
        tail = f"; {self.why_no_bits}" if self.why_no_bits else ""
        return f"{self.model}: {head}, {what}, mean of {best.n:,} held-out {self._example}s{tail}."

    @property
    def _given(self) -> str:
        return "x | condition" if self.conditional else "x"

    @property
    def _example(self) -> str:
        return "row" if isinstance(self.space, Table) else "example"

    def to_json(self) -> dict[str, Any]:
        """All numbers as JSON values; a number that is not defined is null.

        ``rows`` lists every number that may be compared with the headline, in the order of :meth:`table`.
        """
        held = self.held_out
        return {
            "format": FORMAT,
            "model": self.model,
            "space": self.space.to_json(),
            "conditional": self.conditional,
            "seed": self.seed,
            "n": held.n,
            "dims": self.space.dims,
            "unit": None if self.unit is None else self.unit.name,
            "why_no_bits": self.why_no_bits,
            "sentence": self.sentence(),
            **self._number(held.nats, held.standard_error, held.kind),
            "parts": {name: _finite(value) for name, value in held.parts.items()},
            "importance_weighted": None
            if self.importance is None
            else {
                "samples": self.importance.samples,
                **self._number(self.importance.nats, self.importance.standard_error, self.importance.kind),
                "monte_carlo_error_nats": _finite(self.importance.monte_carlo_error),
                "effective_samples": _finite(self.importance.effective_samples),
            },
            "importance_note": self.importance_note,
            "active_units": None
            if self.active is None
            else {
                "active": self.active.active,
                "latent": self.active.latent,
                "threshold": self.active.threshold,
                "variances": [_finite(v) for v in self.active.variances.tolist()],
            },
            "baselines": [self._baseline(baseline) for baseline in self.baselines],
            "codecs": [self._codec(codec) for codec in self.codecs],
            "rows": [row.to_json() for row in self.rows()],
            "notes": self.notes(),
        }

    def _number(self, nats: float, error: float, kind: Kind) -> dict[str, Any]:
        values: dict[str, Any] = {"kind": kind, "nats": _finite(nats), "nats_standard_error": _finite(error)}
        if self.unit is not None:
            values["bits"] = self.unit.of(nats)
            values["bits_standard_error"] = _finite(self.unit.error(error))
            if isinstance(self.space, Tokens) and self.raw_bytes:
                values["bits_per_byte"] = bits_per_byte(nats * self.held_out.n, self.raw_bytes)
        return values

    def _baseline(self, baseline: Baseline) -> dict[str, Any]:
        if baseline.result is None:
            return {"name": baseline.name, "note": baseline.note}
        result = baseline.result
        gain = self.held_out.example_nats - result.example_nats  # paired: the same examples
        return {
            "name": baseline.name,
            "note": baseline.note,
            **self._number(result.nats, result.standard_error, result.kind),
            "gain_nats": _finite(float(gain.mean())),
            "gain_nats_standard_error": _finite(standard_error(gain)),
        }

    def _codec(self, codec: CodecSize) -> dict[str, Any]:
        value = None if codec.bytes is None or self.unit is None else self._codec_bits(codec.bytes)
        return {"name": codec.name, "bytes": codec.bytes, "bits": value, "note": codec.note}

    def _codec_bits(self, size: int) -> float:
        assert self.unit is not None
        return size * 8 / (self.held_out.n * self.unit.per_example)

    def rows(self) -> list[Row]:
        """Every number on the same data, in the same unit: the model's, the baselines', the codecs'."""
        rows = [self._row(self.model, self.held_out, "the model's own bound")]
        if self.held_out.kind == "exact":
            rows[0] = self._row(self.model, self.held_out, "")
        if self.importance is not None:
            name = f"{self.model}, {self.importance.samples:,} samples"
            effective = f"importance-weighted, {self.importance.effective_samples:.3g} effective samples"
            rows.append(self._row(name, self.importance, effective))
        for baseline in self.baselines:
            if baseline.result is None:
                rows.append(Row(baseline.name, "baseline", None, None, None, None, None, baseline.note))
            else:
                rows.append(self._row(baseline.name, baseline.result, baseline.note, "baseline"))
        for codec in self.codecs if self.unit is not None else ():
            value = None if codec.bytes is None else self._codec_bits(codec.bytes)
            kind: Kind | None = None if value is None else "exact"
            rows.append(Row(codec.name, "codec", None, None, value, None, kind, codec.note))
        return rows

    def _row(self, name: str, result: HeldOut | ImportanceWeighted, note: str, role: str = "model") -> Row:
        nats, error, unit = result.nats, result.standard_error, self.unit
        if unit is None:
            return Row(name, role, nats, error, None, None, result.kind, note)
        return Row(name, role, nats, error, unit.of(nats), unit.error(error), result.kind, note)

    def notes(self) -> list[str]:
        """What a reader must know to compare the numbers."""
        notes = []
        if self.why_no_bits:
            notes.append(self.why_no_bits)
        if self.importance_note:
            notes.append(self.importance_note)
        if self.active is not None:
            notes.append(f"{self.active.active} of {self.active.latent} latent units are active")
        if self.codecs and self.unit is not None:
            if self.conditional:
                notes.append("the codecs compress the examples without their condition, which the model is given")
            if self.space.missing:
                notes.append(
                    "the codecs also store which cells are missing; the model's bits are of observed cells only"
                )
            if isinstance(self.space, Table):
                notes.append("the codecs also keep the spelling of every cell and the order of the rows")
        return notes

    def table(self) -> RichTable:
        """The rows as a ``rich`` table: print it with a ``rich`` console."""
        from rich.table import Table as Grid

        grid = Grid(title=f"{self.held_out.n:,} held-out {self._example}s", title_justify="left")
        grid.add_column("")
        if self.unit is not None:
            grid.add_column(self.unit.name, justify="right", no_wrap=True)
        grid.add_column(f"nats/{self._example}", justify="right", no_wrap=True)
        grid.add_column("kind")
        grid.add_column("note", style="dim")
        for row in self.rows():
            cells = [row.name]
            if self.unit is not None:
                cells.append("–" if row.bits is None else with_error(row.bits, row.bits_error))
            cells += ["–" if row.nats is None else with_error(row.nats, row.nats_error), row.says, row.note]
            grid.add_row(*cells, style="bold" if row.role == "model" else None)
        return grid


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Args:
        name: of the model or codec.
        role: ``model``, ``baseline`` or ``codec``.
        nats: mean nats per example, with ``nats_error`` its standard error.
        bits: the same in the unit of the evaluation, with its standard error; of a codec the size of its file.
        kind: of the bound; ``exact`` for the size of a file, None without a number.
        note: what it was measured on, or why there is no number.
    """

    name: str
    role: str
    nats: float | None
    nats_error: float | None
    bits: float | None
    bits_error: float | None
    kind: Kind | None
    note: str

    @property
    def says(self) -> str:
        """The kind in words that fit code lengths as well as likelihoods."""
        if self.kind is None:
            return "–"
        return "file size" if self.role == "codec" else self.kind

    def to_json(self) -> dict[str, Any]:
        """The line as JSON values."""
        return {
            "name": self.name,
            "role": self.role,
            "nats": _finite(self.nats),
            "nats_standard_error": _finite(self.nats_error),
            "bits": _finite(self.bits),
            "bits_standard_error": _finite(self.bits_error),
            "kind": self.says,
            "note": self.note,
        }


_SAYS: dict[Kind, str] = {
    "exact": "the exact log p({})",
    "lower bound": "a lower bound on log p({})",
    "estimate": "an estimate of log p({}) and no bound",
}


def evaluate(
    model: Model,
    dataset: Dataset,
    *,
    name: str | None = None,
    train_set: Dataset | None = None,
    samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    baselines: bool = True,
    classic: bool = True,
    raw: bytes | None = None,
    frame: Callable[[], Any] | None = None,
    progress: StageProgress | None = None,
) -> Evaluation:
    """Evaluate a model on held-out data, beside simple baselines and classic compressors on the same data.

    Args:
        name: what to call the model; by default the name of its family.
        train_set: what the baselines are fitted to; without it there are none.
        samples: k of the importance-weighted bound; None leaves it out.
        seed: of the noise that the model draws.
        batch_size: examples at a time; it changes speed and memory, not the values.
        baselines: whether to fit and evaluate the baselines.
        classic: whether to run the compressors, which only have a meaning where the data have a probability.
        raw: the held-out examples as the user keeps them (CSV text, text), for the compressors.
        frame: gives the held-out rows as a pandas DataFrame, for Parquet.
        progress: called with the name of the stage, the work done and the work in all.

    Raises:
        ValueError: the dataset is empty or not of the model's space.
        FloatingPointError: a value is not finite; the message names the part of the bound and the row.
    """

    def stage(title: str) -> Progress | None:
        return None if progress is None else lambda done, total: progress(title, done, total)

    held = held_out(model, dataset, seed=seed, batch_size=batch_size, progress=stage("held-out bound"))
    importance, importance_note = None, ""
    if samples is not None and held.kind == "exact":
        importance_note = f"no importance-weighted bound: the likelihood of {model.title()!r} is exact"
    elif samples is not None:
        try:
            importance = importance_weighted(model, dataset, samples, seed=seed, progress=stage("importance samples"))
        except Unsupported as reason:
            importance_note = f"no importance-weighted bound: {reason}"
    active = None
    if model.can("encode"):
        try:
            active = active_units(model, dataset, batch_size=batch_size)
        except Unsupported:  # the family encodes, this composition does not
            active = None
    simple: list[Baseline] = []
    if baselines and train_set is not None:
        simple = fit_baselines(train_set, dataset, seed=seed, batch_size=batch_size, progress=stage("baselines"))
    codecs: list[CodecSize] = []
    if classic and dataset.space.has_probability:
        codecs = classic_codecs(dataset, raw=raw, frame=frame, progress=stage("classic codecs"))
    return Evaluation(
        model=name or model.name(),
        space=dataset.space,
        conditional=dataset.condition_space is not None,
        seed=seed,
        held_out=held,
        importance=importance,
        importance_note=importance_note,
        active=active,
        baselines=simple,
        codecs=codecs,
        raw_bytes=len(raw) if raw is not None else None,
    )


def with_error(value: float, error: float | None) -> str:
    """A number with its standard error, to two significant digits of the error.

    >>> with_error(-88.9512, 0.2345), with_error(1.23456, None)
    ('-88.95 ± 0.23', '1.235')
    """
    if error is None or math.isnan(error) or error <= 0:
        return f"{value:#.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    decimals = max(0, min(6, 1 - math.floor(math.log10(error))))
    return f"{value:,.{decimals}f} ± {error:,.{decimals}f}"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
