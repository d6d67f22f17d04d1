"""Arrays: the same numbers to the bit, names, dtypes and order; of .npy and idx files the bytes.

What a model codes of a cell stands for a number of the array's dtype; a cell that is another number is kept beside.
"""

from __future__ import annotations

import hashlib
import io
import math
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import torch
from torch import Tensor

from likely.data.arrays import IDX, ArrayForm, Loaded, npy_header, npz_members, read_member, scipy_sparse
from likely.data.columns import TableColumn
from likely.data.csvfile import MISSING
from likely.data.errors import DataError
from likely.data.originals.original import (
    Legal,
    Original,
    Part,
    Restored,
    RestoredFile,
    Rows,
    bits_differ,
    intact,
    matrix,
    settle,
    whole,
)
from likely.data.originals.side import Reader, Writer, damaged
from likely.data.originals.typed import fixed_from, get_fixed, put_fixed, read_cells, usual
from likely.data.sources import Source, compression, creating, open_bytes

_SAMPLE = 1 << 16
_BLOCK = 1 << 24
_WAYS = ("times", "over", "over in dtype", "times in dtype")


class Cells:
    """Between the cells of an array and what a model sees of them.

    Args:
        form: what the schema says of the array.
        dtype: of the cells.
        way: how a fraction is computed from its code: as ``step * code`` or ``code / (1 / step)``, in float64 or in
            the cells' own dtype; writers differ in the last bit.
        placeholder: code of a cell that cannot be coded.
    """

    def __init__(self, form: ArrayForm, dtype: np.dtype, way: str = "times", placeholder: float = 0.0) -> None:
        self.form, self.dtype, self.way, self.placeholder = form, dtype, way, placeholder
        self.usual = 0.0

    def study(self, sample: np.ndarray) -> None:
        """Choose the way and the placeholder by some rows."""
        codes, allowed = self._codes(sample)
        present = codes[allowed & ~np.isnan(codes)][:_SAMPLE]
        if len(present):
            unique, counts = np.unique(present, return_counts=True)
            self.usual = float(unique[counts.argmax()])
        self.placeholder = math.nan if self.form.missing else self.usual
        if self.dtype.kind == "f" and self.form.step != 1 and self.form.values != "reals":
            right = {}
            for self.way in _WAYS:
                right[self.way] = int((~bits_differ(self._from_codes(codes), sample.astype(self.dtype))).sum())
            self.way = max(right, key=right.__getitem__)

    def _codes(self, cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Codes as float64 (values of a continuum), and which of them the schema allows."""
        form = self.form
        values = cells.astype(np.float64)
        absent = np.isnan(values)
        finite = np.isfinite(values)
        with np.errstate(invalid="ignore", over="ignore"):
            if form.binarise == "threshold":
                codes, allowed = (values > cast(float, form.threshold)).astype(np.float64), finite
            elif form.binarise == "dynamic" or form.values != "reals":
                codes = values if form.values == "reals" else np.rint((values - form.offset) / form.step)
                most = {"binary": 1.0, "integers": float((form.levels or 2) - 1), "reals": 1.0, "counts": 2.0**53}
                allowed = finite & (codes >= 0) & (codes <= most[form.values])
                if form.values != "reals":
                    allowed &= np.abs((values - form.offset) / form.step - codes) <= 2e-3
                if form.binarise == "dynamic":
                    codes = (codes >= cast(float, form.scale) / 2).astype(np.float64)
            else:
                codes, allowed = values, finite
                if cells.dtype.kind == "f" and cells.dtype.itemsize <= 4:
                    codes = values.astype(np.float32).astype(np.float64)
        codes = np.where(absent, np.nan, codes)
        return codes, np.where(absent, form.missing, allowed)

    def take(self, cells: np.ndarray, legal: Legal | None) -> Tensor:
        """What a model sees of the cells, shape ``(rows, *space.shape)``: legal in every cell."""
        held = self._held()
        if held == torch.uint8 and cells.dtype.itemsize == 1:  # what a byte becomes is computed once
            codes, allowed = self._codes(_OCTETS.view(cells.dtype))
            codes[~allowed] = self.placeholder
            x = self.form.arrange(torch.from_numpy(_translated(cells, codes))).contiguous()
        else:
            codes, allowed = self._codes(cells)
            codes[~allowed] = self.placeholder
            x = self.form.arrange(torch.from_numpy(codes)).contiguous().to(held)
        if legal is not None:
            settle(x, legal, map(np.array, (self.placeholder, self.usual, 0.0)))
        return x

    def _held(self) -> torch.dtype:
        form = self.form
        if form.values == "reals" and form.binarise is None:
            return torch.float32 if self.dtype.kind == "f" and self.dtype.itemsize <= 4 else torch.float64
        if form.missing:
            return torch.float64
        if form.values == "binary" or form.binarise is not None or (form.levels or 1 << 20) <= 256:
            return torch.uint8
        return torch.int32 if form.values == "integers" else torch.int64

    def make(self, x: Tensor) -> np.ndarray:
        """The cells that ``x`` usually stands for, shape ``(rows, *form.shape)``."""
        if tuple(x.shape[1:]) != self.form.space.shape:
            raise DataError(f"x: expected shape (rows, {self.form.space.shape}), got {tuple(x.shape)}")
        x = x.detach().cpu()
        if x.dtype == torch.uint8 and self.dtype.itemsize == 1:
            octets = self.form.disarrange(x).numpy()
            values = self._from_codes(_OCTETS.astype(np.float64)).view(np.uint8)
            same = np.array_equal(values, _OCTETS)
            return (octets if same else _translated(octets, values)).view(self.dtype)
        return self._from_codes(np.ascontiguousarray(self.form.disarrange(x.double()).numpy()))

    def _from_codes(self, codes: np.ndarray) -> np.ndarray:
        form, dtype = self.form, self.dtype
        if form.binarise is not None:
            codes = codes * (form.scale if form.scale is not None else 1.0)
        if form.values == "reals":
            values = codes
        elif dtype.kind == "f" and self.way != "times" and form.offset == 0:
            parts = np.rint(1 / form.step)
            values = {
                "over": lambda: codes / parts,
                "over in dtype": lambda: codes.astype(dtype) / dtype.type(parts),
                "times in dtype": lambda: codes.astype(dtype) * dtype.type(form.step),
            }[self.way]()
        else:
            values = form.offset + form.step * codes
        if dtype.kind == "b":
            return values > 0
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            values = np.rint(values)
            fits = (values >= float(limits.min)) & (values < float(limits.max) + (dtype.itemsize < 7))
            return np.where(fits, values, 0.0).astype(dtype)
        with np.errstate(over="ignore"):
            return values.astype(dtype)


_OCTETS = np.arange(256, dtype=np.uint8)


def _translated(cells: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The entry of a table of 256 for every cell of one byte, as bytes of the same shape."""
    octets = bytearray(np.ascontiguousarray(cells).data.cast("B")) if cells.size else bytearray()
    return np.frombuffer(octets.translate(table.astype(np.uint8).tobytes()), np.uint8).reshape(cells.shape)


# Taking apart -----------------------------------------------------------------------------------------------------


class ArrayOriginal(Original):
    """An array in whatever container, with what lies beside it.

    Args:
        form: what the schema says of the array.
        source: file or object.
        options: how it differs from the one that was fitted.
    """

    def __init__(self, form: ArrayForm, source: Source, options: Mapping[str, Any]) -> None:
        self._form = form
        sparse = _sparse(source)
        facts: dict[str, Any] = {}
        self._extras: dict[str, np.ndarray] = {}
        loaded = form.load(source, **options)
        if loaded.array.dtype.kind == "f" and loaded.array.dtype.itemsize > 8:  # some of its bytes mean nothing
            raise DataError(f"{source.name}: expected floats of at most 8 bytes, got {loaded.array.dtype}")
        self._array: Any = loaded.array
        self._labels = dict(loaded.labels) if source.kind != "idx" else {}
        dtype, exactness, packed = loaded.array.dtype, "content", None
        media = source.kind
        if sparse is not None:
            self._array = _Sparse(sparse)
            dtype = sparse.dtype
            facts["sparse"] = [type(sparse).__name__, sparse.shape[1]]
            media = "sparse" if source.kind == "sparse" else "npz"
            digest, size = _digest_sparse(sparse)
        elif source.kind in ("npy", "idx"):
            exactness, packed = "bytes", compression(source.path)
            digest, size, dtype, more = _read_ends(source, loaded)
            facts.update(more)
        else:
            if source.kind == "array" and isinstance(loaded.array, np.ndarray):
                media = loaded.container
            names = self._names(source, loaded)
            arrays = {name: self._whole(name, loaded) for name in names}
            if source.kind == "npz":
                arrays = {name: _declared(source, cast(str, name), array) for name, array in arrays.items()}
                self._labels = {name: arrays[name] for name in self._labels}
                self._extras = {name: arrays[name] for name in self._extras}
            self._array = arrays[loaded.key]
            dtype = self._array.dtype
            facts["names"] = names
            facts["columns first"] = [name for name, array in arrays.items() if _columns_first(array)]
            digest, size = _digest_arrays(arrays)
        n = len(self._array) if sparse is None else sparse.shape[0]
        if dtype.kind not in "biuf":
            raise DataError(f"{loaded.name}: expected numbers, got dtype {dtype}")
        self._key = loaded.key
        self._cells = Cells(form, dtype)
        self._cells.study(np.asarray(self._array[: max(1, _SAMPLE // max(1, math.prod(form.shape)))]))
        self._columns = [(name, j) for name, labels in self._labels.items() for j in range(_wide(labels))]
        self._condition = self._read_labels(loaded, n) if form.given else None
        fixed = {name: extra for name, extra in self._extras.items() if not extra.ndim or len(extra) != n}
        self._extras = {name: extra for name, extra in self._extras.items() if name not in fixed}
        facts.update(
            dtype=dtype.str,
            way=self._cells.way,
            key=loaded.key,
            labels=[[name, values.dtype.str, list(values.shape[1:])] for name, values in self._labels.items()],
            extras=[[name, values.dtype.str, list(values.shape[1:])] for name, values in self._extras.items()],
            fixed=[[name, v.dtype.str, list(v.shape), v.tobytes().hex()] for name, v in fixed.items()],
        )
        super().__init__(media, cast(Any, exactness), n, size, digest, facts, packed)

    def _names(self, source: Source, loaded: Loaded) -> list[str | None]:
        """The arrays of the source in their order; those that are no labels and not modelled are taken along."""
        if source.kind == "npz":
            names = list(npz_members(source.path, source.name))
        elif source.kind == "arrays":
            names = list(source.value)
        else:
            return [None]
        for name in names:
            if name != loaded.key and name not in self._labels:
                extra = read_member(source, name, None) if source.kind == "npz" else source.value[name]
                if extra.dtype.hasobject:
                    raise DataError(f"{source.name}[{name!r}]: cannot keep Python objects; convert or leave it out")
                self._extras[name] = extra
        return list(names)

    def _whole(self, name: str | None, loaded: Loaded) -> np.ndarray:
        if name is None or name == loaded.key:
            return loaded.array
        return self._labels[name] if name in self._labels else self._extras[name]

    def _read_labels(self, loaded: Loaded, n: int) -> np.ndarray:
        values = np.empty((n, len(self._form.given)))
        cells = loaded.label_cells()
        if len(cells) != len(self._form.given):
            raise DataError(f"{loaded.name}: expected {len(self._form.given)} labels, got {len(cells)}")
        for i, (column, part) in enumerate(zip(self._form.given, cells.values())):
            found, allowed = read_cells(column, part, MISSING)
            values[:, i] = np.where(allowed, found, usual(column, found, allowed)[0])
        return values

    def _rows(self, start: int, stop: int, legal: Legal | None) -> Rows:
        chunk = np.asarray(self._array[start:stop]).astype(self._cells.dtype, copy=False)
        x = self._cells.take(chunk, legal)
        condition = None if self._condition is None else torch.from_numpy(self._condition[start:stop].copy())
        out = Writer()
        expected = self._cells.make(x)
        if bits_differ(np.ascontiguousarray(chunk), expected).any():
            out.number(0)
            put_fixed(out, np.ascontiguousarray(chunk), expected)
        for i, (name, j) in enumerate(self._columns):
            labels = _column(self._labels[name], j)[start:stop]
            from_condition = fixed_from(
                self._form.given[i], cast(np.ndarray, self._condition)[start:stop, i], labels.dtype
            )
            if bits_differ(labels, from_condition).any():
                out.number(1 + i)
                put_fixed(out, labels, from_condition)
        for extra in self._extras.values():
            out.items(np.ascontiguousarray(extra[start:stop]))
        return Rows(x, condition, out.content())


def _declared(source: Source, name: str, array: np.ndarray) -> np.ndarray:
    """An array of an .npz file in the byte order and the order of axes that it has there."""
    with zipfile.ZipFile(source.path) as archive, archive.open(f"{name}.npy") as file:
        _, by_columns, dtype = npy_header(cast(BinaryIO, file), source.name)
    array = array.astype(dtype, copy=False)
    return np.asfortranarray(array) if by_columns and array.ndim > 1 else array


def _wide(labels: np.ndarray) -> int:
    return 1 if labels.ndim == 1 else labels.shape[1]


def _column(labels: np.ndarray, j: int) -> np.ndarray:
    return np.ascontiguousarray(labels if labels.ndim == 1 else labels[:, j])


def _columns_first(array: np.ndarray) -> bool:
    return array.flags.f_contiguous and not array.flags.c_contiguous


class _Sparse:
    """Rows of a sparse matrix as a dense array."""

    def __init__(self, held: Any) -> None:
        self._held = held
        self.shape, self.dtype = held.shape, held.dtype

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, rows: slice) -> np.ndarray:
        return cast(np.ndarray, self._held[rows].toarray())


def _sparse(source: Source) -> Any:
    """The matrix of a source that holds a sparse one, by rows; otherwise None."""
    if source.kind == "sparse":
        return source.value
    if source.kind == "npz" and {"indices", "indptr", "format", "shape", "data"} <= set(
        npz_members(source.path, source.name)
    ):
        return scipy_sparse(source.name).load_npz(source.path).tocsr()
    return None


def _digest_sparse(held: Any) -> tuple[bytes, int]:
    """Digest of a sparse matrix without its zeros, and bytes of its cells."""
    held = held.copy()
    held.sum_duplicates()
    held.eliminate_zeros()
    held.sort_indices()
    digest = hashlib.blake2b(f"{held.shape} {held.dtype.str}".encode(), digest_size=16)
    for part in (held.indptr.astype(np.int64), held.indices.astype(np.int64), held.data):
        digest.update(np.ascontiguousarray(part).tobytes())
    return digest.digest(), int(held.data.nbytes + held.indices.nbytes)


def _digest_arrays(arrays: Mapping[Any, np.ndarray]) -> tuple[bytes, int]:
    """Digest of arrays by name and in order: dtypes, shapes and every bit; and their bytes."""
    digest = _ArrayDigest()
    for name, array in arrays.items():
        digest.begin(name, array.dtype, array.shape, _columns_first(array))
        digest.add(array)
    return digest.value, sum(array.nbytes for array in arrays.values())


class _ArrayDigest:
    """The digest of arrays, while they come."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def begin(self, name: Any, dtype: np.dtype, shape: tuple[int, ...], columns_first: bool) -> None:
        """The next array."""
        self._hash.update(repr((name, dtype.str, shape, columns_first)).encode())

    def add(self, array: np.ndarray) -> None:
        """The array, or its next rows."""
        if not array.ndim:
            self._hash.update(array.tobytes())
            return
        rows = max(1, _BLOCK // max(1, array[:1].nbytes))
        for start in range(0, len(array), rows):
            self._hash.update(np.ascontiguousarray(array[start : start + rows]).tobytes())

    @property
    def value(self) -> bytes:
        return self._hash.digest()


def _read_ends(source: Source, loaded: Loaded) -> tuple[bytes, int, np.dtype, dict[str, Any]]:
    """Digest and size of an .npy or idx file, its dtype, and the bytes before and behind its cells."""
    digest, size = hashlib.blake2b(digest_size=16), 0
    with open_bytes(source.path) as file:
        for block in iter(lambda: file.read(_BLOCK), b""):
            digest.update(block)
            size += len(block)
    with open_bytes(source.path) as file:
        if source.kind == "npy":
            _, first, dtype = npy_header(file, source.name)
        else:
            head = file.read(4)
            file.read(4 * head[3])
            first, dtype = False, np.dtype(IDX[head[2]])
        start = file.tell()
    with open_bytes(source.path) as file:
        before = file.read(start)
        file.seek(start + loaded.array.size * dtype.itemsize)
        behind = file.read()
    return digest.digest(), size, dtype, {"before": before.hex(), "behind": behind.hex(), "by columns": first}


# Putting together -------------------------------------------------------------------------------------------------


class _Recipe:
    """The facts of an array, checked."""

    def __init__(self, form: ArrayForm, facts: Mapping[str, Any]) -> None:
        self.form, self.facts = form, facts
        self.n = whole(facts["n"])
        self.size = whole(facts["size"])
        dtype = _dtype(facts["dtype"], "biuf")
        if facts["way"] not in _WAYS:
            raise DataError(f"head is damaged: expected a way to compute fractions, got {facts['way']!r}")
        self.cells = Cells(form, dtype, facts["way"])
        self.labels = [(str(name), _dtype(kind, "biufUSmM"), tuple(map(whole, s))) for name, kind, s in facts["labels"]]
        self.extras = [
            (str(name), _dtype(kind, "biufcUSmMV"), tuple(map(whole, s))) for name, kind, s in facts["extras"]
        ]
        wide = sum(shape[0] if shape else 1 for _, _, shape in self.labels)
        if self.labels and wide != len(form.given):
            raise DataError("head is damaged: expected a label for each column of the condition")

    def part(self, part: Part) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
        """Cells, label columns and further arrays of some rows."""
        x, condition, side = part
        with intact("side information"):
            expected = self.cells.make(x)
            n, reader = len(expected), Reader(side, self.size)
            columns: list[tuple[TableColumn, np.dtype]] = []
            for i, kind in enumerate(k for _, k, shape in self.labels for _ in range(shape[0] if shape else 1)):
                columns.append((self.form.given[i], kind))
            rest = sum(n * math.prod(shape) * kind.itemsize for _, kind, shape in self.extras)
            tag = self._tag(reader, rest, -1, len(columns))
            if tag == 0:
                expected = get_fixed(reader, n, self.cells.dtype, expected)
                tag = self._tag(reader, rest, 0, len(columns))
            labels = []
            values = matrix(condition, len(self.form.given), "condition") if columns else np.empty((n, 0))
            for i, (column, kind) in enumerate(columns):
                found = fixed_from(column, values[:, i], kind)
                if tag == 1 + i:
                    found = get_fixed(reader, n, kind, found)
                    tag = self._tag(reader, rest, 1 + i, len(columns))
                labels.append(found)
            extras = [reader.items(n * math.prod(shape), kind).reshape(n, *shape) for _, kind, shape in self.extras]
            if not reader.done:
                raise damaged("it goes on behind its end")
        return expected, labels, extras

    @staticmethod
    def _tag(reader: Reader, rest: int, before: int, most: int) -> int:
        """The number of the next section, or −1 where only the further arrays are left."""
        if reader.left <= rest:
            return -1
        tag = reader.number(most)
        if tag <= before:
            raise damaged("its sections are out of order")
        return tag


def _dtype(text: Any, kinds: str) -> np.dtype:
    dtype = np.dtype(str(text))
    if dtype.kind not in kinds or dtype.hasobject or dtype.itemsize > 1 << 20:
        raise DataError(f"head is damaged: expected a dtype of kind {kinds}, got {text!r}")
    return dtype


def restore_array(
    form: ArrayForm,
    facts: Mapping[str, Any],
    parts: Iterable[Part],
    first: int = 0,
    keep: tuple[int, int] | None = None,
) -> Restored:
    """Put an array together again.

    Args:
        form: what the schema says of the array.
        facts: of the whole.
        parts: consecutive rows.
        first: number of the first of them.
        keep: numbers of the rows to give; None for all.
    """
    recipe = _Recipe(form, facts)
    if facts["media"] in ("npy", "idx"):
        if keep is not None:
            return RestoredArrays(_Recipe(form, {**facts, **_ALONE}), parts, first, keep)
        before, behind = bytes.fromhex(facts["before"]), bytes.fromhex(facts["behind"])
        return RestoredFile(facts["media"], _file_pieces(recipe, parts, before, behind, bool(facts["by columns"])))
    return RestoredArrays(recipe, parts, first, keep)


def _file_pieces(
    recipe: _Recipe, parts: Iterable[Part], before: bytes, behind: bytes, by_columns: bool
) -> Iterator[bytes]:
    yield before
    left = recipe.size
    chunks: Iterator[np.ndarray] = (recipe.part(part)[0] for part in parts)
    if by_columns:
        whole_array = np.concatenate(list(chunks))
        chunks = (row for row in [np.ascontiguousarray(whole_array.T)])
    for chunk in chunks:
        left -= chunk.nbytes
        if left < 0:
            raise damaged(f"more than the {recipe.size} bytes of the original")
        yield chunk.tobytes()
    yield behind


#: What is not said of an .npy or idx file: it holds one array and no more.
_ALONE = {"names": [None], "columns first": [], "key": None}


class RestoredArrays(Restored):
    """Arrays that come back with the same content: one, several by name, or a sparse matrix.

    Args:
        recipe: of the arrays.
        parts: consecutive rows.
        first: number of the first of them.
        keep: numbers of the rows to give; None for all.
    """

    def __init__(
        self, recipe: _Recipe, parts: Iterable[Part], first: int = 0, keep: tuple[int, int] | None = None
    ) -> None:
        super().__init__(str(recipe.facts["media"]))
        self._recipe, self._parts, self._first, self._keep = recipe, parts, first, keep
        self._value: Any = None

    def _kept(self) -> Iterator[tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]]:
        """Cells, label columns and further arrays of the rows to give."""
        start = self._first
        for part in map(self._recipe.part, self._parts):
            cells, labels, extras = part
            stop = start + len(cells)
            if stop > self._recipe.n and "sparse" not in self._recipe.facts:
                raise damaged(f"more than the {self._recipe.n} rows of the original")
            if self._keep is None:
                yield part
            else:
                low, high = (min(max(row, start), stop) - start for row in self._keep)
                yield cells[low:high], [held[low:high] for held in labels], [held[low:high] for held in extras]
            start = stop

    @property
    def value(self) -> Any:
        if self._value is None:
            self._value = self._build_sparse() if "sparse" in self._recipe.facts else self._build()
        if self.media == "tensor":
            return torch.from_numpy(self._value)
        return self._value

    def _build_sparse(self) -> Any:
        sparse = scipy_sparse("a sparse matrix")
        name, wide = self._recipe.facts["sparse"]
        if name not in ("csr_matrix", "csr_array"):
            raise DataError(f"head is damaged: expected a sparse matrix, got {name!r}")
        rows = [sparse.csr_matrix(cells) for cells, _, _ in self._kept()]
        dtype = self._recipe.cells.dtype
        held = sparse.vstack(rows, format="csr") if rows else sparse.csr_matrix((0, whole(wide)), dtype=dtype)
        held = getattr(sparse, name)(held.astype(dtype, copy=False))
        self.digest = _digest_sparse(held)[0]
        return held

    def _build(self) -> Any:
        recipe, facts = self._recipe, self._recipe.facts
        wide = [(kind, shape[0] if shape else 1) for _, kind, shape in recipe.labels]
        cells = _Rows(recipe.cells.dtype, recipe.form.shape, recipe.n)
        labels = [_Rows(kind, (), recipe.n) for kind, columns in wide for _ in range(columns)]
        extras = [_Rows(kind, shape, recipe.n) for _, kind, shape in recipe.extras]
        with intact("head"):
            single = facts["names"] == [facts["key"]] == [None] and not facts["columns first"]
        digest = None  # of a single array it is taken while other processes still decode
        if single and self._keep is None:
            digest = _ArrayDigest()
            digest.begin(None, recipe.cells.dtype, (recipe.n, *recipe.form.shape), columns_first=False)
        for part in self._kept():
            rows = cells.add(part[0])
            if digest is not None:
                digest.add(rows)
            for held, found in zip([*labels, *extras], [*part[1], *part[2]], strict=True):
                held.add(found)
        with intact("head"):
            arrays = self._named(cells.whole(), [held.whole() for held in labels], [held.whole() for held in extras])
        self.digest = _digest_arrays(arrays)[0] if digest is None else digest.value
        return arrays if facts["names"] != [None] else arrays[None]

    def _named(
        self, cells: np.ndarray, labels: Sequence[np.ndarray], extras: Sequence[np.ndarray]
    ) -> dict[Any, np.ndarray]:
        recipe, facts = self._recipe, self._recipe.facts
        found: dict[Any, np.ndarray] = {facts["key"]: cells}
        place = 0
        for name, kind, shape in recipe.labels:
            columns = labels[place : place + (shape[0] if shape else 1)]
            found[name] = np.stack(columns, axis=1).astype(kind, copy=False) if shape else columns[0]
            place += len(columns)
        for (name, _, _), held in zip(recipe.extras, extras):
            found[name] = held
        for name, kind, shape, content in facts["fixed"]:
            held = np.frombuffer(bytes.fromhex(content), _dtype(kind, "biufcUSmMV"))
            found[name] = held.reshape([whole(size) for size in shape]).copy()
        for name in facts["columns first"]:
            found[name] = np.asfortranarray(found[name])
        return {name: found[name] for name in facts["names"]}

    def write(self, path: Path | str, digest: bytes | None = None) -> None:
        """Write .npy, or .npz for several arrays or a sparse matrix."""
        value = self._value if self._value is not None else (self.value, self._value)[1]
        self._check(digest)
        with creating(None if str(path) == "-" else Path(path)) as file:
            if isinstance(value, dict):
                _write_npz(file, value)
            elif isinstance(value, np.ndarray):
                np.save(cast(Any, file), value, allow_pickle=False)
            else:
                scipy_sparse("a sparse matrix").save_npz(file, value)


class _Rows:
    """Rows one after the other, which come in parts that need not be kept.

    Args:
        dtype: of the rows, with its byte order.
        shape: of a row.
        most: how many there may be; memory is taken only for what has come, and half as much again.
    """

    def __init__(self, dtype: np.dtype, shape: tuple[int, ...], most: int) -> None:
        self._held, self._count, self._most = np.empty((0, *shape), dtype), 0, most

    def add(self, part: np.ndarray) -> np.ndarray:
        """Put rows behind those that are there; the rows in their place, until more are added."""
        start, self._count = self._count, self._count + len(part)
        if self._count > len(self._held):
            self._resize(max(self._count, min(3 * self._count // 2, self._most)))
        self._held[start : self._count] = part
        return self._held[start : self._count]

    def whole(self) -> np.ndarray:
        self._resize(self._count)
        return self._held

    def _resize(self, rows: int) -> None:
        self._held.resize((rows, *self._held.shape[1:]), refcheck=False)


def _write_npz(file: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Arrays under any names, also such as ``file`` that ``numpy.savez`` keeps for itself."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, allowZip64=True) as archive:
        for name, array in arrays.items():
            held = io.BytesIO()
            np.save(held, array, allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy"), held.getbuffer(), zipfile.ZIP_DEFLATED)
