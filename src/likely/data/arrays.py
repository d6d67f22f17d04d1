"""Arrays: NumPy, torch, .npy, .npz, idx, scipy sparse, scikit-learn's embedded sets and folders of images."""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from likely.contract import Binary, Counts, Integers, Reals, Space, Table
from likely.data import images
from likely.data.columns import Cells, Encoder, KeyCells, NumberCells, Summary, TableColumn, Where
from likely.data.csvfile import MISSING
from likely.data.dataset import Dataset
from likely.data.errors import DataError, at, check_names, needs, some
from likely.data.sources import Source, compression, creating, open_bytes
from likely.data.store import Store, as_tensor, map_npy, reuse

Values = Literal["binary", "integers", "counts", "reals"]
Layout = Literal["as is", "HW", "HWC", "CHW"]
_CHANNELS = (1, 2, 3, 4)
_CELLS = 1 << 22  # cells looked at or converted at a time
#: An array of labels with at most so many distinct whole numbers is categorical.
MOST_LABELS = 1000
_HELD = ("uint8", "int8", "int16", "int32", "int64", "float32", "float64", "bool")  # dtypes that torch maps

READ_OPTIONS = ("key", "labels", "size", "channels")
INFER_OPTIONS = (
    *READ_OPTIONS,
    *("given", "space", "levels", "offset", "step", "layout", "binarise", "threshold", "missing", "allow_missing"),
)


@dataclass(frozen=True)
class ArrayForm:
    """An array as the user has it.

    The value of a cell is ``offset + step * code``; the model sees the code.

    Args:
        shape: shape of one example as the user has it.
        dtype: NumPy dtype of the user's array.
        values: what a cell is: ``binary``, ``integers``, ``counts`` or ``reals``.
        levels: number of values of an ``integers`` cell.
        offset: value of code 0.
        step: value of one step of the code.
        missing: whether a cell may be NaN.
        layout: place of the channels: ``HW`` (none), ``HWC``, ``CHW``, or ``as is`` for what is no image.  The model
            sees ``(C, H, W)``.
        container: what it was read from.
        key: name of the array among several.
        binarise: None; ``dynamic``: a fresh binary draw in each batch, of probability ``code / (levels − 1)``;
            ``threshold``: 1 where the value is greater than ``threshold``.
        threshold: see ``binarise``.
        channels: ``grey`` or ``rgb``, for a folder of images.
        size: height and width to which images are resized (shorter side) and cropped (centre); None: kept.
        given: the labels that are the condition.
    """

    shape: tuple[int, ...]
    dtype: str
    values: Values
    levels: int | None = None
    offset: float = 0
    step: float = 1
    missing: bool = False
    layout: Layout = "as is"
    container: str = "array"
    key: str | None = None
    binarise: Literal["dynamic", "threshold"] | None = None
    threshold: float | None = None
    channels: Literal["grey", "rgb"] | None = None
    size: tuple[int, int] | None = None
    given: tuple[TableColumn, ...] = ()

    #: Name of the form in a saved schema.
    form = "array"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(s) for s in self.shape))
        if self.size is not None:
            object.__setattr__(self, "size", tuple(int(s) for s in self.size))
        _one_of("space", self.values, get_args(Values))
        _one_of("layout", self.layout, get_args(Layout))
        if self.binarise is not None:
            _one_of("binarise", self.binarise, ("dynamic", "threshold"))
        if self.layout != "as is" and len(self.shape) != len(self.layout):
            raise DataError(
                f"layout: {self.layout!r} needs examples of {len(self.layout)} axes, got shape {self.shape}"
            )
        if self.values == "integers" and (self.levels is None or self.levels < 2):
            raise DataError(f"levels: expected at least 2, got {self.levels}")
        if self.binarise is not None and self.missing:
            raise DataError("binarise: expected an array without missing cells")
        if self.binarise == "dynamic" and self.scale is None:
            raise DataError(f"binarise: expected integers, or numbers from 0 to 1, got {self.values}")

    @property
    def model_shape(self) -> tuple[int, ...]:
        """Shape of one example as the model sees it."""
        match self.layout:
            case "HW":
                return (1, *self.shape)
            case "HWC":
                return (self.shape[2], *self.shape[:2])
        return self.shape or (1,)

    @property
    def scale(self) -> float | None:
        """The stored value that stands for probability 1 under dynamic binarisation."""
        if self.values == "integers":
            return float(cast(int, self.levels) - 1)
        return 1.0 if self.values in ("binary", "reals") else None

    @property
    def space(self) -> Space:
        """The space of an example."""
        shape = self.model_shape
        if self.binarise is not None or self.values == "binary":
            return Binary(shape, missing=self.missing)
        if self.values == "integers":
            return Integers(shape, cast(int, self.levels), missing=self.missing)
        return (Counts if self.values == "counts" else Reals)(shape, missing=self.missing)

    @property
    def condition_space(self) -> Table | None:
        """The space of the labels, or None."""
        return Table(columns=tuple(c.model_column() for c in self.given)) if self.given else None

    # Reading ------------------------------------------------------------------------------------------------------

    def read(self, source: Source, cache: Path | None = None, limit: int | None = None, **options: Any) -> Dataset:
        """Hold a source against the form; see :meth:`likely.data.schema.Schema.read`."""
        loaded = self.load(source, limit, **options)
        array = loaded.array
        if not len(array):
            raise DataError(f"{loaded.name}: expected examples, got none")
        x = self._hold(array, loaded.name, source, cache, limit)
        condition = None
        if self.given:
            condition = self._labels(loaded, len(array))
        scale = self.scale if self.binarise == "dynamic" else None
        return Dataset(self.space, self.arrange(x), self.condition_space, condition, bernoulli_scale=scale)

    def load(self, source: Source, limit: int | None = None, **options: Any) -> Loaded:
        """The array of a source, of the shape of this form, and the labels beside it."""
        check_names(options, READ_OPTIONS, "reading an array")
        said = {name: value for name, value in options.items() if value is not None}
        key = said.get("key", self.key if source.kind in ("npz", "arrays") else None)
        names = list(dict.fromkeys(str(column.user_label) for column in self.given))
        if isinstance(said.get("labels"), str):
            names = [said["labels"]]
        own: dict[str, Any] = {"size": self.size, "channels": self.channels} if source.kind == "images" else {}
        picture: dict[str, Any] = {**own, **{name: said[name] for name in ("size", "channels") if name in said}}
        loaded = load(source, key, names, picture.get("size"), picture.get("channels"), limit)
        if loaded.array.shape[1:] != self.shape:
            raise DataError(
                f"{loaded.name}: expected examples of shape {self.shape}, got {loaded.array.shape[1:]} "
                f"(the whole array has shape {loaded.array.shape})"
            )
        return loaded

    def _hold(self, array: np.ndarray, name: str, source: Source, cache: Path | None, limit: int | None) -> Tensor:
        """The codes: over the array's own memory where it holds them already, otherwise converted chunk by chunk."""
        as_stored = self.offset == 0 and self.step == 1 and self.binarise != "threshold"
        if as_stored and array.dtype.isnative and array.dtype.name in _HELD:
            for start, chunk in _chunks(array):
                self._check(chunk, name, start)
            return as_tensor(array)
        held: type = np.float64 if self.values == "reals" or self.missing else np.int64
        if self.binarise == "threshold" or self.values == "binary":
            held = np.uint8 if not self.missing else np.float32
        elif self.values == "integers" and not self.missing:
            held = np.uint8 if cast(int, self.levels) <= 256 else np.int32
        elif self.values == "reals" and array.dtype.itemsize <= 4:
            held = np.float32
        stamp = {"source": source.stamp(), "form": _plain(self.to_dict()), "dtype": array.dtype.str}
        digest = hashlib.sha256(json.dumps(stamp, sort_keys=True).encode()).hexdigest()[:24]
        path = None if cache is None or stamp["source"] is None else cache / f"{digest}.npy"
        found = reuse(path, stamp)
        if found is not None:
            return found
        store = Store(self.shape, held, path, limit, stamp)
        try:
            for start, chunk in _chunks(array):
                self._check(chunk, name, start)
                store.append(self._codes(chunk))
        except BaseException:
            store.abandon()
            raise
        return store.finish()

    def _codes(self, chunk: np.ndarray) -> np.ndarray:
        if self.binarise == "threshold":
            return chunk > self.threshold
        if self.values == "reals" or (self.offset == 0 and self.step == 1):
            return chunk
        return np.rint((chunk.astype(np.float64) - self.offset) / self.step)

    def _check(self, chunk: np.ndarray, name: str, start: int) -> None:
        """Refuse the first cell that does not belong."""
        kind = chunk.dtype.kind
        if kind not in "biuf":
            raise DataError(f"{name}: expected numbers, got dtype {chunk.dtype}")
        if kind == "b":
            return
        bad: np.ndarray | None = None
        expected, advice = "", ""
        values = chunk
        if kind == "f":
            absent = np.isnan(chunk)
            if absent.any():
                if not self.missing:
                    self._refuse(
                        absent, chunk, name, start, "a number", "fill it, or fit again with allow_missing=True"
                    )
                values = np.where(absent, self.offset, chunk)
            infinite = np.isinf(chunk)
            if infinite.any():
                self._refuse(infinite, chunk, name, start, "a finite number", "mend it, or make it NaN (missing)")
        if self.values == "reals":
            if self.binarise == "dynamic":
                bad, expected = (values < 0) | (values > 1), "a probability from 0 to 1"
            if bad is not None and bad.any():
                self._refuse(bad, chunk, name, start, expected, "scale the array")
            return
        if self.offset != 0 or self.step != 1:
            values = (values.astype(np.float64) - self.offset) / self.step
            bad = np.abs(values - np.rint(values)) > 2e-3
            values = np.rint(values)
        elif kind == "f":
            bad = values != np.rint(values)
        if bad is not None and bad.any():
            what = "a whole number" if self.step == 1 else f"a multiple of {self.step:g}"
            self._refuse(bad, chunk, name, start, what, "round it, or fit with space='reals'")
        most = {"binary": 1, "integers": cast(int, self.levels or 0) - 1, "counts": None}[self.values]
        bad = values < 0
        if most is not None:
            bad = bad | (values > most)
            low, high = self.offset, self.offset + self.step * most
            expected, advice = f"a value from {low:g} to {high:g}", "fit with a greater levels="
        else:
            expected, advice = "a whole number from 0 up", "mend it, or fit with space='reals'"
        if bad.any():
            self._refuse(bad, chunk, name, start, expected, advice)

    @staticmethod
    def _refuse(bad: np.ndarray, chunk: np.ndarray, name: str, start: int, expected: str, advice: str) -> None:
        index = np.unravel_index(int(np.flatnonzero(bad)[0]), bad.shape)
        place = ", ".join(str(int(i) + (start if axis == 0 else 0)) for axis, i in enumerate(index))
        raise DataError(f"{name}[{place}]: expected {expected}, got {chunk[index]}; {advice}")

    def _labels(self, loaded: Loaded, rows: int) -> Tensor:
        encoded = []
        where = Where(loaded.name)
        cells = loaded.label_cells()
        if len(cells) != len(self.given):
            raise DataError(
                f"{loaded.name}: expected the label{'s' * (len(self.given) > 1)} "
                f"{some(c.name for c in self.given)}, got {some(cells) or 'none'}"
            )
        for column, (name, column_cells) in zip(self.given, cells.items()):
            if len(column_cells) != rows:
                raise DataError(f"{loaded.name}, {name!r}: expected {rows} labels, got {len(column_cells)}")
            encoded.append(Encoder(column, MISSING).encode(column_cells, where))
        return torch.from_numpy(np.stack(encoded, axis=1))

    def arrange(self, x: Tensor) -> Tensor:
        """The model's axes: a view of examples of the user's shape."""
        match self.layout:
            case "HW":
                return x.unsqueeze(1)
            case "HWC":
                return x.permute(0, 3, 1, 2)
        return x.unsqueeze(1) if not self.shape else x

    # Back to the user ---------------------------------------------------------------------------------------------

    def disarrange(self, x: Tensor) -> Tensor:
        """The user's axes: the inverse of :meth:`arrange`."""
        match self.layout:
            case "HW":
                return x.squeeze(1)
            case "HWC":
                return x.permute(0, 2, 3, 1)
        return x if self.shape else x.squeeze(1)

    def to_array(self, x: Tensor) -> np.ndarray:
        """The user's array, of the user's shape, values and dtype."""
        x = x.detach().cpu()
        if self.space.discrete:
            x = x.double()
        self.space.validate(x, "x")
        values = self.disarrange(x).numpy()
        if self.binarise is not None:
            values = values * cast(float, self.scale if self.scale is not None else 1.0)
        if self.values != "reals":
            values = self.offset + self.step * values
        dtype = np.dtype(self.dtype)
        if dtype.kind in "biu" and np.isnan(values).any():
            return values
        return np.ascontiguousarray(values.astype(dtype))

    def to_user(self, x: Tensor, condition: Tensor | None = None) -> Any:
        """The user's array or tensor; with a condition a dict of it and the labels."""
        array = self.to_array(x)
        out = torch.from_numpy(array) if self.container == "tensor" else array
        if condition is None:
            return out
        return {self.key or "x": out, **self._user_labels(condition)}

    def _user_labels(self, condition: Tensor) -> dict[str, np.ndarray]:
        space = self.condition_space
        if space is None:
            raise DataError("condition: the schema has no given labels")
        space.validate(condition.detach().cpu(), "condition")
        held = condition.detach().cpu().double().numpy()
        out: dict[str, np.ndarray] = {}
        for j, column in enumerate(self.given):
            values = _user_label(column, held[:, j])
            if column.label is None:
                out[column.name] = values
            else:
                before = [out[str(column.label)]] if str(column.label) in out else []
                out[str(column.label)] = np.column_stack([*before, values])
        return out

    def write(self, x: Tensor, path: Path | None, condition: Tensor | None = None) -> None:
        """Write .npy, .npz, a folder of PNG files, or one .png sheet; None is standard output, as .npy."""
        array = self.to_array(x)
        labels = {} if condition is None else self._user_labels(condition)
        suffix = "" if path is None else path.suffix.lower()
        if suffix == ".npz" and self.container == "sparse":
            sparse = scipy_sparse(str(path))
            sparse.save_npz(path, sparse.csr_matrix(array))
        elif suffix == ".npz":
            np.savez_compressed(path, **{self.key or "x": array, **labels})  # type: ignore[arg-type]
        elif path is None or suffix == ".npy" or ".npy." in path.name:
            with creating(path) as file:
                np.save(cast(Any, file), array, allow_pickle=False)
        elif suffix == ".png" and self.layout != "as is":
            images.write_sheet(self._pictures(array), path)
        elif not suffix and self.layout != "as is":
            images.write_folder(self._pictures(array), path, (labels and list(next(iter(labels.values())))) or None)
        else:
            also = ", .png (one sheet) or no suffix (a folder of PNG files)" if self.layout != "as is" else ""
            raise DataError(f"{path}: expected a name that ends in .npy or .npz{also}")

    def _pictures(self, array: np.ndarray) -> np.ndarray:
        """8-bit pictures, ``(n, H, W)`` or ``(n, H, W, 3)``; values are stretched so that the greatest is 255."""
        if self.layout == "CHW":
            array = np.moveaxis(array, 1, -1)
        if array.ndim == 4 and array.shape[-1] == 1:
            array = array[..., 0]
        if array.ndim == 4 and array.shape[-1] != 3:
            raise DataError(f"pictures have 1 or 3 channels, got {array.shape[-1]}; write .npy or .npz")
        values = array.astype(np.float64)
        if self.values == "integers":
            low, high = self.offset, self.offset + self.step * (cast(int, self.levels) - 1)
        elif self.values == "binary":
            low, high = 0.0, 1.0
        else:
            low, high = float(np.nanmin(values)), float(np.nanmax(values))
        stretched = (values - low) / (high - low if high > low else 1.0)
        return np.rint(np.nan_to_num(np.clip(stretched, 0, 1)) * 255).astype(np.uint8)

    def complete(self, source: Source, x: Tensor, path: Path | None, to_file: bool, **options: Any) -> Any:
        """The source with its NaN cells filled from ``x``; see :meth:`likely.data.schema.Schema.complete`."""
        check_names(options, READ_OPTIONS, "reading an array")
        key = options.get("key") or (self.key if source.kind in ("npz", "arrays") else None)
        array = load(source, key, (), None, None, None).array
        filled = self.to_array(x)
        if array.shape != filled.shape:
            raise DataError(f"{source.name}: expected shape {filled.shape} as x has, got {array.shape}")
        whole = np.where(np.isnan(array), filled, array) if array.dtype.kind == "f" else array
        if not to_file:
            return torch.from_numpy(whole) if source.name == "tensor" else whole
        if path is None or path.suffix.lower() != ".npz":
            with creating(path) as file:
                np.save(cast(Any, file), whole, allow_pickle=False)
        else:
            np.savez_compressed(path, **{self.key or "x": whole})  # type: ignore[arg-type]
        return None

    # Description --------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values; what is at its default is left out."""
        out: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "given":
                out["given"] = [column.to_dict() for column in value]
            elif f.name in ("shape", "dtype", "values") or value != f.default:
                out["space" if f.name == "values" else f.name] = list(value) if isinstance(value, tuple) else value
        return out

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ArrayForm:
        """The inverse of :meth:`to_dict`."""
        rest = dict(values)
        rest["values"] = rest.pop("space")
        rest["given"] = tuple(TableColumn(**column) for column in rest.pop("given", ()))
        return cls(**rest)

    def describe(self) -> list[str]:
        """Lines for people."""
        what = {
            "binary": "0 or 1",
            "integers": f"whole numbers 0 to {cast(int, self.levels or 1) - 1}",
            "counts": "counts, from 0 up",
            "reals": "real numbers: a density, no bits",
        }[self.values]
        if self.offset != 0 or self.step != 1:
            what += f" (value = {self.offset:g} + {self.step:g} × code)"
        lines = [
            f"{self.container}{f' (key {self.key!r})' if self.key else ''}: examples of shape {self.shape}, "
            f"dtype {self.dtype}",
            f"values: {what}" + (", missing cells" if self.missing else ""),
        ]
        if self.layout != "as is":
            lines.append(f"images in layout {self.layout}; the model sees (C, H, W) = {self.model_shape}")
        if self.size is not None:
            lines.append(f"resized and cropped to {self.size[0]} × {self.size[1]}")
        if self.binarise == "dynamic":
            lines.append(f"binarised anew in every batch, with probability value / {self.scale:g}")
        if self.binarise == "threshold":
            lines.append(f"binarised: 1 where the value is greater than {self.threshold:g}")
        for column in self.given:
            shown = some(column.categories, 6) if column.categories else f"resolution {column.resolution}"
            lines.append(f"given {column.name!r}: {column.kind} ({shown})")
        return lines


def infer_array(source: Source, limit: int | None = None, **options: Any) -> tuple[ArrayForm, list[str]]:
    """The form of an array, from one pass over its cells.

    Args:
        source: anything that holds an array.
        options: see ``INFER_OPTIONS`` and docs/data.md.
    """
    found = {name: options.pop(name) for name in ("shape", "dtype", "container") if name in options}
    check_names(options, INFER_OPTIONS, f"an array ({source.name})")
    said = {name: value for name, value in options.items() if value is not None}
    given = said.get("given", ())
    entries = [{"name": g} if isinstance(g, str) else dict(g) for g in ((given,) if isinstance(given, str) else given)]
    stated = {str(entry.pop("name")): entry for entry in entries}
    names = list(stated)
    size = _size(said.get("size"))
    loaded = load(source, said.get("key"), names, size, said.get("channels"), limit)
    array, notes = loaded.array, list(loaded.notes)
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        kind = "a single number" if array.ndim == 0 else f"dtype {array.dtype}"
        raise DataError(f"{loaded.name}: expected an array of numbers whose first axis is the example, got {kind}")
    if len(array) < 2:
        raise DataError(f"{loaded.name}: expected at least 2 examples to learn from, got {len(array)}")
    if array[:1].size == 0:
        raise DataError(f"{loaded.name}: expected examples with cells, got shape {array.shape}")
    if list(found.get("shape", array.shape[1:])) != list(array.shape[1:]):
        raise DataError(f"{loaded.name}: expected examples of shape {found['shape']} (schema), got {array.shape[1:]}")
    facts = scan(array, loaded.name)
    values: dict[str, Any] = _kind(array, facts, said, loaded.whole_pictures, notes)
    layout = said.get("layout")
    if layout is None:
        pictures = loaded.pictures or values["values"] in ("binary", "integers")
        layout = _guess_layout(array.shape[1:]) if pictures else "as is"
    binarise, threshold = said.get("binarise"), said.get("threshold")
    if binarise == "threshold" and threshold is None:
        high = values["levels"] - 1 if values["values"] == "integers" else 1.0
        threshold = values.get("offset", 0) + values.get("step", 1) * high / 2
    columns = []
    for name, cells in loaded.label_cells().items():
        summary = Summary(name)
        summary.add(cells, Where(loaded.name))
        whole = isinstance(cells, NumberCells) and cells.dtype.startswith(("int", "uint"))
        few = isinstance(cells, NumberCells) and len(np.unique(cells.values)) <= MOST_LABELS
        override: dict[str, Any] = {**stated.get(name, {}), "role": "given"}
        if whole and few and "kind" not in override:
            override["kind"] = "categorical"
        column = summary.conclude(override)
        columns.append(column if name in loaded.labels else replace(column, label=name.rpartition("[")[0]))
    form = ArrayForm(
        shape=array.shape[1:],
        dtype=array.dtype.newbyteorder("=").name,
        layout=layout,
        container=loaded.container,
        key=loaded.key,
        binarise=binarise,
        threshold=threshold,
        channels=loaded.channels,
        size=size,
        missing=facts.absent or bool(said.get("allow_missing") or said.get("missing")),
        given=tuple(columns),
        **values,
    )
    return form, notes


@dataclass
class Facts:
    """What one pass over an array tells.

    Args:
        low: least value.
        high: greatest value.
        whole: whether all are whole numbers.
        bytes_: whether all are multiples of 1/255 from 0 to 1.
        ends: whether all are 0 or 255.
        absent: whether some are NaN.
        at_high: share of the cells that equal the greatest value.
    """

    low: float
    high: float
    whole: bool
    bytes_: bool
    ends: bool
    absent: bool
    at_high: float


def scan(array: np.ndarray, name: str) -> Facts:
    """Look at every cell once, a bounded number at a time."""
    low, high, whole, bytes_, absent = math.inf, -math.inf, True, array.dtype.kind == "f", False
    count = total = 0
    ends = array.dtype.kind in "iuf"
    for start, chunk in _chunks(array):
        if chunk.dtype.kind == "f":
            infinite = np.isinf(chunk)
            if infinite.any():
                ArrayForm._refuse(infinite, chunk, name, start, "a finite number", "mend it, or make it NaN (missing)")
            gone = np.isnan(chunk)
            if gone.any():
                absent = True
                chunk = chunk[~gone]
            if not chunk.size:
                continue
            whole = whole and bool((chunk == np.rint(chunk)).all())
            if bytes_:
                scaled = chunk.astype(np.float64) * 255
                bytes_ = bool(((scaled >= 0) & (scaled <= 255.001) & (np.abs(scaled - np.rint(scaled)) < 1e-3)).all())
        ends = ends and bool(((chunk == 0) | (chunk == 255)).all())
        top = float(chunk.max())
        if top > high:
            high, count = top, 0
        if top == high:
            count += int((chunk == chunk.max()).sum())
        low = min(low, float(chunk.min()))
        total += chunk.size
    if not total:
        raise DataError(f"{name}: expected some cells that are not missing, got none")
    return Facts(low, high, whole, bytes_, ends, absent, count / total)


def _kind(
    array: np.ndarray, facts: Facts, said: Mapping[str, Any], whole_pictures: int | None, notes: list[str]
) -> dict[str, Any]:
    """Which values the cells have, by the rules of docs/data.md."""
    space, levels = said.get("space"), said.get("levels")
    if space is not None:
        space = str(space).lower()
        _one_of("space", space, get_args(Values))
    whole = facts.whole or array.dtype.kind in "biu"
    is_float, many_axes = array.dtype.kind == "f", array.ndim > 2
    if space == "reals":
        if whole:
            notes.append("whole numbers modelled by a density, as asked: their likelihood is no probability")
        return {"values": "reals"}
    if not whole:
        if space is None and levels is None and not (facts.bytes_ and many_axes):
            return {"values": "reals"}
        if "step" in said and levels is not None:
            return {"values": "integers", "levels": int(levels), "offset": said.get("offset", 0), "step": said["step"]}
        if facts.bytes_ and space in (None, "integers") and levels in (None, 256):
            notes.append("multiples of 1/255: taken as 8-bit images; space='reals' models them by a density instead")
            return {"values": "integers", "levels": 256, "step": 1 / 255}
        raise DataError(f"space: expected 'reals' for an array with fractions, got {space!r}")
    if facts.ends and facts.high == 255 and many_axes and levels is None and space in (None, "binary"):
        notes.append("only 0 and 255: taken as binary; space='integers' keeps 256 levels")
        return {"values": "binary", "step": 255}
    if whole_pictures is not None and space is None and levels is None:
        return {"values": "integers", "levels": whole_pictures} if whole_pictures > 2 else {"values": "binary"}
    spread = facts.high - facts.low
    offset = facts.low if facts.low < 0 else 0.0
    if space == "counts":
        if facts.low < 0:
            raise DataError(f"space: expected no negative number for 'counts', got {facts.low:g}")
        return {"values": "counts"}
    if space == "binary" or (space is None and levels is None and facts.low >= 0 and facts.high <= 1):
        if facts.low < 0 or facts.high > 1:
            raise DataError(f"space: expected 0 and 1 for 'binary', got {facts.low:g} to {facts.high:g}; or binarise=")
        return {"values": "binary"}
    if levels is not None:
        return {"values": "integers", "levels": int(levels), "offset": said.get("offset", offset)}
    if facts.low < 0:
        if spread <= 65535 and (not is_float or spread <= 255):
            notes.append(f"whole numbers from {facts.low:g}: code 0 stands for {facts.low:g}")
            return {"values": "integers", "levels": int(spread) + 1, "offset": offset}
        raise DataError(
            f"space: whole numbers from {facts.low:g} to {facts.high:g} need a choice: space='reals' (a density), or a "
            f"DataFrame (columns of integers)"
        )
    if array.dtype == np.uint8 and many_axes:
        return {"values": "integers", "levels": 256 if facts.high >= 128 else int(facts.high) + 1}
    if array.dtype == np.uint16 and many_axes and facts.high > 255:
        return {"values": "integers", "levels": 65536}
    bounded = facts.high <= 255 and facts.at_high >= 1e-3
    if bounded or space == "integers":
        if is_float:
            notes.append("whole numbers held as floats: taken as integers; space='reals' models them by a density")
        return {"values": "integers", "levels": int(facts.high) + 1}
    if is_float:
        notes.append("whole numbers held as floats: taken as counts; space='reals' models them by a density")
    return {"values": "counts"}


def _guess_layout(shape: Sequence[int]) -> Layout:
    if len(shape) == 2:
        return "HW"
    if len(shape) == 3 and shape[2] in _CHANNELS and min(shape[:2]) > 1:
        return "HWC"
    if len(shape) == 3 and shape[0] in _CHANNELS:
        return "CHW"
    return "as is"


def _size(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, (int, str)) else tuple(size)
    try:
        height, width = (int(s) for s in pair)
    except (ValueError, TypeError):
        raise DataError(f"size: expected one whole number or two (height, width), got {size!r}") from None
    if min(height, width) < 1:
        raise DataError(f"size: expected positive numbers, got {size!r}")
    return height, width


def _one_of(option: str, value: Any, accepted: Sequence[str]) -> None:
    if value not in accepted:
        raise DataError(f"{option}: expected one of {', '.join(map(repr, accepted))}, got {value!r}")


def _chunks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    rows = max(1, _CELLS // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), rows):
        yield start, np.asarray(array[start : start + rows])


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _user_label(column: TableColumn, values: np.ndarray) -> np.ndarray:
    if not column.coded:
        whole = column.dtype.startswith(("int", "uint")) and not np.isnan(values).any()
        return values.astype(column.dtype) if whole else values
    categories: np.ndarray = np.array(column.categories)
    if column.dtype.startswith(("int", "uint", "float")):
        categories = np.array([float(c) for c in column.categories or ()]).astype(column.dtype)
    return categories[np.rint(values).astype(np.int64)]


# --------------------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------------------


@dataclass
class Loaded:
    """An array and the labels beside it.

    Args:
        array: first axis is the example; may be a memory map.
        name: how messages call it.
        labels: arrays by name.
        container: kind of source.
        key: its name among several arrays.
        pictures: whether the source says that it holds images.
        whole_pictures: number of levels that the source itself states.
        channels: how a folder of images was read.
        notes: what is worth saying.
    """

    array: np.ndarray
    name: str
    container: str
    labels: Mapping[str, np.ndarray]
    key: str | None = None
    pictures: bool = False
    whole_pictures: int | None = None
    channels: Literal["grey", "rgb"] | None = None
    notes: Sequence[str] = ()

    def label_cells(self) -> dict[str, Cells]:
        """The labels as columns."""
        out: dict[str, Cells] = {}
        for name, labels in self.labels.items():
            if labels.ndim == 2 and labels.shape[1] == 1:
                labels = labels[:, 0]
            parts = {name: labels} if labels.ndim == 1 else {f"{name}[{j}]": c for j, c in enumerate(labels.T)}
            for part, column in parts.items():
                if column.ndim != 1:
                    raise DataError(f"{self.name}, {name!r}: expected labels of 1 or 2 axes, got {labels.shape}")
                if column.dtype.kind in "iuf":
                    out[part] = NumberCells(column.astype(np.float64), column.dtype.name, column.dtype.itemsize <= 4)
                else:
                    out[part] = KeyCells([str(c) for c in column.tolist()], "bool" if column.dtype == bool else "str")
        return out


def load(
    source: Source,
    key: str | None,
    given: Sequence[str],
    size: Any,
    channels: str | None,
    limit: int | None,
) -> Loaded:
    """The array of a source, and the labels named in ``given``."""
    match source.kind:
        case "array":
            _only_images(size, channels, source)
            _no_labels(given, source, "pass a dict of arrays")
            return Loaded(source.value, source.name, source.name, {})
        case "arrays" | "npz":
            _only_images(size, channels, source)
            return _load_named(source, key, given, limit)
        case "npy":
            _no_labels(given, source, "put both arrays in one .npz")
            return Loaded(_load_npy(source, limit), source.name, "npy", {})
        case "idx":
            array, labels = _load_idx(source, given, limit)
            return Loaded(array, source.name, "idx", labels, pictures=array.ndim > 2)
        case "sparse":
            _no_labels(given, source, "pass a dict of arrays")
            return Loaded(_dense(source.value, limit), source.name, "sparse", {})
        case "embedded":
            return _load_embedded(source, given)
        case "images":
            return _load_images(source, given, _size(size), channels, limit)
    raise DataError(f"{source.name}: expected an array, got {source.kind}")


def _only_images(size: Any, channels: Any, source: Source) -> None:
    if size is not None or channels is not None:
        option = "size" if size is not None else "channels"
        raise DataError(f"{option}: an option for folders of images, got {source.kind} ({source.name})")


def _no_labels(given: Sequence[str], source: Source, advice: str) -> None:
    if given:
        raise DataError(f"given: {source.name} has no labels {some(given)}; {advice}")


def _load_named(source: Source, key: str | None, given: Sequence[str], limit: int | None) -> Loaded:
    arrays: Mapping[str, Any]
    if source.kind == "npz":
        members = npz_members(source.path, source.name)
        if {"indices", "indptr", "format", "shape", "data"} <= set(members):
            sparse = scipy_sparse(source.name)
            return Loaded(_dense(sparse.load_npz(source.path).tocsr(), limit), source.name, "sparse", {})
        names = list(members)
    else:
        names = list(source.value)
    for name in given:
        if name not in names:
            raise DataError(
                f"given: expected the name of an array in {source.name}, got {name!r} (it has {some(names)})"
            )
    if key is None:
        candidates = [name for name in names if name not in given]
        if source.kind == "npz":
            shapes = {name: members[name] for name in candidates}
        else:
            shapes = {name: np.shape(source.value[name]) for name in candidates}
        big = [name for name, shape in shapes.items() if len(shape) >= 2]
        if len(candidates) == 1:
            key = candidates[0]
        elif len(big) == 1:
            key = big[0]
        else:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise DataError(f"{source.name}: holds several arrays ({listed}); name one with key=")
    if key not in names:
        raise DataError(f"key: expected the name of an array in {source.name}, got {key!r} (it has {some(names)})")
    if source.kind == "npz":
        arrays = {name: read_member(source, name, limit) for name in {key, *given}}
    else:
        arrays = source.value
    labels = {name: np.asarray(arrays[name]) for name in given}
    for name, values in labels.items():
        if len(values) != len(arrays[key]):
            raise DataError(
                f"{source.name}, {name!r}: expected {len(arrays[key])} labels as there are examples in {key!r}, "
                f"got {len(values)}"
            )
    return Loaded(np.asarray(arrays[key]), f"{source.name}[{key!r}]", source.kind, labels, key)


def npz_members(path: Path, name: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays in an .npz, from their headers."""
    out = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                if member.endswith(".npy"):
                    with archive.open(member) as file:
                        out[member[:-4]] = npy_header(cast(BinaryIO, file), name)[0]
    except zipfile.BadZipFile as fault:
        raise DataError(f"{name}: not an .npz file ({fault})") from None
    if not out:
        raise DataError(f"{name}: expected arrays, got none")
    return out


def npy_header(file: BinaryIO, name: str) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype of an .npy file, read up to its data."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except ValueError as fault:
        raise DataError(f"{name}: not a NumPy array ({fault})") from None
    if dtype.hasobject:
        raise DataError(f"{name}: holds Python objects, which are not read (they could run code); save numbers or text")
    return shape, fortran, dtype


def _read_npy(file: BinaryIO, name: str, limit: int | None) -> np.ndarray:
    """An array from a stream, kept in a file if it is larger than ``limit``."""
    shape, fortran, dtype = npy_header(file, name)
    return _read_raw(file, name, shape, dtype, limit, fortran)


def _read_raw(
    file: BinaryIO, name: str, shape: tuple[int, ...], dtype: np.dtype, limit: int | None, fortran: bool = False
) -> np.ndarray:
    if fortran or not shape or dtype.kind not in "biuf":
        content = file.read()
        if len(content) != math.prod(shape) * dtype.itemsize:
            raise DataError(f"{name}: expected {math.prod(shape) * dtype.itemsize} bytes of data, got {len(content)}")
        return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran else "C").copy()
    store = Store(shape[1:], dtype.newbyteorder("="), None, limit)
    row = math.prod(shape[1:])
    per_chunk = max(1, _CELLS // max(1, row))
    try:
        for start in range(0, shape[0], per_chunk):
            rows = min(per_chunk, shape[0] - start)
            content = file.read(rows * row * dtype.itemsize)
            if len(content) != rows * row * dtype.itemsize:
                raise DataError(
                    f"{name}: ends early, in example {start + len(content) // max(1, row * dtype.itemsize)}"
                )
            store.append(np.frombuffer(content, dtype).reshape(rows, *shape[1:]))
    except BaseException:
        store.abandon()
        raise
    return store.array()


def read_member(source: Source, key: str, limit: int | None) -> np.ndarray:
    """One array of an .npz file."""
    with zipfile.ZipFile(source.path) as archive, archive.open(f"{key}.npy") as file:
        return _read_npy(cast(BinaryIO, file), f"{source.name}[{key!r}]", limit)


def _load_npy(source: Source, limit: int | None) -> np.ndarray:
    """An .npy file: memory-mapped as it lies, or decompressed."""
    if compression(source.path) is None:
        with source.path.open("rb") as file:
            shape = npy_header(file, source.name)[0]
        if not shape or not math.prod(shape):
            raise DataError(f"{source.name}: expected an array with examples, got shape {shape}")
        try:
            return map_npy(source.path)
        except ValueError as fault:
            raise DataError(f"{source.name}: not a whole NumPy array ({fault})") from None
    with open_bytes(source.path) as file:
        return _read_npy(file, source.name, limit)


#: Dtypes of the idx format.
IDX = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}


def _load_idx(source: Source, given: Sequence[str], limit: int | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The format of MNIST; the labels lie in a file beside it whose name has ``labels-idx1`` for ``images-idx3``."""
    array = _read_idx(source.path, source.name, limit)
    if not given:
        return array, {}
    if tuple(given) != ("label",):
        raise DataError(f"given: expected 'label' for an idx file, got {some(given)}")
    beside = source.path.with_name(source.path.name.replace("images", "labels").replace("idx3", "idx1"))
    if beside == source.path or not beside.exists():
        raise DataError(f"given: expected the labels in {beside.name} beside {source.name}, got no such file")
    labels = _read_idx(beside, str(beside), limit)
    if len(labels) != len(array):
        raise DataError(f"{beside}: expected {len(array)} labels, got {len(labels)}")
    return array, {"label": labels}


def _read_idx(path: Path, name: str, limit: int | None) -> np.ndarray:
    with open_bytes(path) as file:
        head = file.read(4)
        if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in IDX or not head[3]:
            raise DataError(f"{name}: not an idx file (first bytes {head!r})")
        shape = tuple(int.from_bytes(file.read(4), "big") for _ in range(head[3]))
        return _read_raw(file, name, shape, np.dtype(IDX[head[2]]), limit)


def scipy_sparse(name: str) -> Any:
    """The module of sparse matrices."""
    try:
        return importlib.import_module("scipy.sparse")
    except ImportError:
        raise needs("tables", f"{name}: a sparse matrix") from None


def _dense(matrix: Any, limit: int | None) -> np.ndarray:
    """The rows of a sparse matrix, in the smallest integer dtype that holds them."""
    dtype = matrix.dtype
    values = matrix.data
    if dtype.kind in "iuf" and values.size and (values == np.rint(values)).all() and values.min() >= 0:
        dtype = np.dtype(np.uint8 if values.max() <= 255 else np.int16 if values.max() <= 32767 else np.int32)
    store = Store((matrix.shape[1],), dtype, None, limit)
    per_chunk = max(1, _CELLS // max(1, matrix.shape[1]))
    for start in range(0, matrix.shape[0], per_chunk):
        store.append(matrix[start : start + per_chunk].toarray())
    return store.array()


def _load_embedded(source: Source, given: Sequence[str]) -> Loaded:
    try:
        datasets: Any = importlib.import_module("sklearn.datasets")
    except ImportError:
        raise needs("sklearn", f"the embedded set {source.name!r}") from None
    if given and tuple(given) != ("label",):
        raise DataError(f"given: expected 'label' for an embedded set of images, got {some(given)}")
    bunch = getattr(datasets, f"load_{source.value}")()
    pictures = bunch.images.astype(np.uint8)
    labels = {"label": np.asarray(bunch.target)} if given else {}
    return Loaded(pictures, source.name, "embedded", labels, pictures=True, whole_pictures=17)


def _load_images(
    source: Source, given: Sequence[str], size: tuple[int, int] | None, channels: str | None, limit: int | None
) -> Loaded:
    if given and tuple(given) != ("label",):
        raise DataError(
            f"given: expected 'label' (the name of the sub-folder) for a folder of images, got {some(given)}"
        )
    folder = images.read_folder(source.path, source.name, size, channels, limit)
    labels = {}
    if given:
        bare = next((path for path, label in zip(folder.paths, folder.labels) if label == ""), None)
        if bare is not None:
            raise DataError(f"{at(source.name)}: given='label' needs one sub-folder a class; {bare} lies in none")
        labels = {"label": np.asarray(folder.labels)}
    return Loaded(
        folder.array,
        source.name,
        "images",
        labels,
        pictures=True,
        whole_pictures=folder.levels,
        channels=folder.channels,
        notes=folder.notes,
    )
