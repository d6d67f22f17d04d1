"""Arrays in every container: which space they get, what is refused, and that they come back as they were."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from likely.contract import Binary, Counts, Integers, Reals
from likely.data import DataError, Schema, infer_schema

RNG = np.random.default_rng(0)


def counts(shape, mean=20.0):
    return np.random.default_rng(1).poisson(mean, shape)


CASES = {
    "truth": (RNG.random((20, 5)) > 0.5, {}, Binary((5,))),
    "zero and one": (RNG.integers(0, 2, (20, 5)), {}, Binary((5,))),
    "zero and one as floats": (RNG.integers(0, 2, (20, 5)).astype(float), {}, Binary((5,))),
    "binary images": (RNG.integers(0, 2, (20, 4, 3)).astype(np.uint8), {}, Binary((1, 4, 3))),
    "black and white": (RNG.integers(0, 2, (20, 6, 5)).astype(np.uint8) * 255, {}, Binary((1, 6, 5))),
    "8-bit images": (RNG.integers(0, 256, (20, 6, 5)).astype(np.uint8), {}, Integers((1, 6, 5), 256)),
    "5-bit images": (RNG.integers(0, 32, (20, 6, 5)).astype(np.uint8), {}, Integers((1, 6, 5), 32)),
    "16-bit images": (RNG.integers(0, 60000, (20, 6, 5)).astype(np.uint16), {}, Integers((1, 6, 5), 65536)),
    "colour images, channels last": (RNG.integers(0, 256, (9, 8, 7, 3)).astype(np.uint8), {}, Integers((3, 8, 7), 256)),
    "colour images, channels first": (
        RNG.integers(0, 256, (9, 3, 8, 7)).astype(np.uint8), {}, Integers((3, 8, 7), 256)
    ),
    "floats that are bytes": (
        RNG.integers(0, 256, (20, 6, 5)).astype(np.float32) / np.float32(255), {}, Integers((1, 6, 5), 256)
    ),
    "bounded integers": (RNG.integers(0, 17, (50, 64)), {}, Integers((64,), 17)),
    "counts": (counts((200, 50)), {}, Counts((50,))),
    "large counts": (counts((20, 5), 500.0), {}, Counts((5,))),
    "integers below zero": (RNG.integers(-3, 4, (50, 5)), {}, Integers((5,), 7)),
    "reals": (RNG.normal(size=(20, 5)), {}, Reals((5,))),
    "float32": (RNG.normal(size=(20, 5)).astype(np.float32), {}, Reals((5,))),
    "reals in a vector": (RNG.normal(size=20), {}, Reals((1,))),
    "reals of three axes": (RNG.normal(size=(20, 5, 3)), {}, Reals((5, 3))),
    "big-endian": (RNG.normal(size=(20, 5)).astype(">f8"), {}, Reals((5,))),
    "Fortran order": (np.asfortranarray(RNG.normal(size=(20, 5))), {}, Reals((5,))),
    "said to be counts": (RNG.integers(0, 5, (50, 5)), {"space": "counts"}, Counts((5,))),
    "said to be reals": (RNG.integers(0, 5, (50, 5)), {"space": "reals"}, Reals((5,))),
    "said levels": (RNG.integers(0, 5, (50, 5)), {"levels": 16}, Integers((5,), 16)),
    "said layout": (RNG.normal(size=(20, 5, 4, 3)), {"layout": "HWC"}, Reals((3, 5, 4))),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_space_of_an_array_and_the_way_back(case):
    array, options, space = CASES[case]
    schema = infer_schema(array, **options)
    assert schema.space == space
    data = schema.read(array)
    data.space.validate(data.x)
    back = schema.to_user(data.x)
    assert back.dtype == array.dtype.newbyteorder("=") and back.shape == array.shape
    assert np.array_equal(back, array)
    # What a model samples is floating point, whatever the user's dtype.
    assert np.array_equal(schema.to_user(data.x.double()), array)
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    assert Schema.from_toml(schema.to_toml()) == schema
    assert infer_schema(array, schema=schema.to_toml()).space == space


def test_nothing_is_copied_where_torch_has_the_dtype():
    array = RNG.integers(0, 256, (9, 8, 7, 3)).astype(np.uint8)
    data = infer_schema(array).read(array)
    assert data.x.data_ptr() == array.ctypes.data and data.x.dtype == torch.uint8
    assert np.array_equal(data.x.numpy(), np.moveaxis(array, -1, 1))


def test_missing_cells():
    array = RNG.normal(size=(20, 5))
    array[3, 2] = np.nan
    schema = infer_schema(array)
    assert schema.space == Reals((5,), missing=True)
    assert np.array_equal(schema.to_user(schema.read(array).x), array, equal_nan=True)
    whole = infer_schema(np.nan_to_num(array))
    with pytest.raises(DataError, match=r"array\[3, 2\]: expected a number, got nan; fill it, or fit again"):
        whole.read(array)
    assert infer_schema(np.nan_to_num(array), allow_missing=True).read(array).x.isnan().sum() == 1
    filled = schema.complete(array, torch.zeros(20, 5).double())
    assert filled[3, 2] == 0 and np.array_equal(np.isnan(array), filled != array)


def test_tensors_come_back_as_tensors():
    tensor = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    schema = infer_schema(tensor)
    back = schema.to_user(schema.read(tensor).x)
    assert isinstance(back, torch.Tensor) and torch.equal(back, tensor)


@pytest.mark.parametrize("case", ["8-bit images", "reals", "Fortran order", "truth", "16-bit images", "big-endian"])
@pytest.mark.parametrize("suffix", ["npy", "npy.gz", "npz"])
def test_files(tmp_path, case, suffix):
    array, options, space = CASES[case]
    path = tmp_path / f"a.{suffix}"
    if suffix == "npz":
        np.savez_compressed(path, X=array, y=np.arange(len(array)) % 3)
    elif suffix == "npy":
        np.save(path, array)
    else:
        import gzip

        with gzip.open(path, "wb") as file:
            np.save(file, array)
    schema = infer_schema(path, **options)
    assert schema.space == space
    data = schema.read(path)
    assert np.array_equal(schema.to_user(data.x), array)
    schema.write(data.x, tmp_path / f"b.{suffix}")
    assert torch.equal(schema.read(tmp_path / f"b.{suffix}").x, data.x)


def test_keys_and_labels_of_several_arrays(tmp_path):
    x, y = RNG.normal(size=(30, 4)), np.array(["b", "a", "c"] * 10)
    path = tmp_path / "a.npz"
    np.savez(path, X=x, other=x[:, :2], label=y, number=np.arange(30) % 5, z=x[:, :2])
    with pytest.raises(DataError, match=r"holds several arrays \(X \(30, 4\), other \(30, 2\)"):
        infer_schema(path)
    with pytest.raises(DataError, match=r"key: expected the name of an array .*, got 'x'"):
        infer_schema(path, key="x")
    schema = infer_schema(path, key="X", given=["label", "number", "z"])
    data = schema.read(path)
    kinds = [(c.name, c.kind) for c in data.condition_space.columns]
    assert kinds == [("label", "categorical"), ("number", "categorical"), ("z[0]", "real"), ("z[1]", "real")]
    assert data.condition[:3, 0].tolist() == [1, 0, 2] and np.array_equal(data.condition[:, 2:].numpy(), x[:, :2])
    back = schema.to_user(data.x, data.condition)
    assert np.array_equal(back["z"], x[:, :2])
    schema.write(data.x, tmp_path / "b.npz", data.condition)
    assert torch.equal(schema.read(tmp_path / "b.npz").condition, data.condition)
    assert back["label"].tolist() == y.tolist() and back["number"].dtype == np.int64
    assert Schema.from_toml(schema.to_toml()) == schema
    same = infer_schema({"X": x, "label": y}, key="X", given="label")
    assert torch.equal(same.read({"X": x, "label": y}).condition[:, 0], data.condition[:, 0])
    with pytest.raises(DataError, match=r"arrays\['X'\], row 0, column 'label': expected one of the 3 known"):
        same.read({"X": x, "label": np.full(30, "d")})
    with pytest.raises(DataError, match="expected 30 labels as there are examples in 'X', got 29"):
        same.read({"X": x, "label": y[1:]})


def test_python_objects_are_not_read(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "a.npz", a=np.array([{}, None], dtype=object), allow_pickle=True)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(DataError, match="holds Python objects, which are not read"):
            infer_schema(tmp_path / name)


def idx(array):
    code = {"uint8": 8, "int16": 11, "float32": 13}[array.dtype.name]
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, code, array.ndim]) + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def test_idx_files_and_the_labels_beside_them(tmp_path):
    import gzip

    array = RNG.integers(0, 256, (30, 6, 5)).astype(np.uint8)
    labels = (np.arange(30) % 10).astype(np.uint8)
    images = tmp_path / "train-images-idx3-ubyte.gz"
    images.write_bytes(gzip.compress(idx(array)))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
    schema = infer_schema(images, given="label")
    data = schema.read(images)
    assert schema.space == Integers((1, 6, 5), 256)
    assert np.array_equal(data.x[:, 0].numpy(), array) and np.array_equal(data.condition[:, 0].numpy(), labels)
    (tmp_path / "x.idx").write_bytes(idx(RNG.normal(size=(5, 3)).astype(np.float32)))
    assert infer_schema(tmp_path / "x.idx").space == Reals((3,))
    (tmp_path / "cut.idx").write_bytes(idx(array)[:-7])
    with pytest.raises(DataError, match=r"cut\.idx: ends early, in example 29"):
        infer_schema(tmp_path / "cut.idx")
    (tmp_path / "bad.idx").write_bytes(b"hello world")
    with pytest.raises(DataError, match="not an idx file"):
        infer_schema(tmp_path / "bad.idx")


def test_sparse_matrices(tmp_path):
    sparse = pytest.importorskip("scipy.sparse")
    dense = counts((60, 40), 0.3)
    matrix = sparse.csr_matrix(dense)
    sparse.save_npz(tmp_path / "a.npz", matrix)
    for source in (matrix, tmp_path / "a.npz"):
        schema = infer_schema(source, space="counts")
        assert schema.space == Counts((40,))
        data = schema.read(source)
        assert np.array_equal(data.x.numpy(), dense)
    assert infer_schema(matrix).space in (Counts((40,)), Integers((40,), int(dense.max()) + 1))
    schema.write(data.x, tmp_path / "b.npz")
    assert (sparse.load_npz(tmp_path / "b.npz") != matrix).nnz == 0


def test_embedded_sets():
    datasets = pytest.importorskip("sklearn.datasets")
    schema = infer_schema("digits", given="label")
    data = schema.read("digits")
    assert schema.space == Integers((1, 8, 8), 17)
    assert np.array_equal(data.x[:, 0].numpy(), datasets.load_digits().images)
    assert np.array_equal(data.condition[:, 0].numpy(), datasets.load_digits().target)
    iris = infer_schema("iris")
    assert [c.kind for c in iris.space.columns] == ["real"] * 4 + ["categorical"]
    assert iris.space.columns[0].resolution == 0.1
    for name, rows in (("wine", 178), ("breast_cancer", 569), ("diabetes", 442)):
        assert len(infer_schema(name).read(name)) == rows


def test_binarisation():
    array = RNG.integers(0, 256, (40, 6, 5)).astype(np.uint8)
    dynamic = infer_schema(array, binarise="dynamic")
    data = dynamic.read(array)
    assert dynamic.space == Binary((1, 6, 5)) and data.bernoulli_scale == 255
    draws = torch.stack([data.batch(slice(None), noise)[0] for noise in map(stream, range(400))])
    expected = torch.from_numpy(array / 255.0)[:, None]
    error = (draws.double().mean(0) - expected) / (expected * (1 - expected) / 400).sqrt().clamp(min=1e-9)
    assert error[(expected > 0) & (expected < 1)].square().mean() == pytest.approx(1.0, abs=0.15)
    assert draws.double().mean(0)[expected == 0].sum() == 0 and (draws.mean(0)[expected == 1] == 1).all()
    assert set(np.unique(dynamic.to_user(draws[0]))) == {0, 255}
    threshold = infer_schema(array, binarise="threshold")
    assert np.array_equal(threshold.read(array).x[:, 0].numpy(), array > 127.5)
    assert np.array_equal(infer_schema(array, binarise="threshold", threshold=9).read(array).x[:, 0].numpy(), array > 9)
    grey = infer_schema(RNG.random((20, 5)), binarise="dynamic")
    assert grey.space == Binary((5,)) and grey.read(RNG.random((20, 5))).bernoulli_scale == 1.0
    with pytest.raises(DataError, match=r"expected a probability from 0 to 1, got 1\.5"):
        grey.read(np.full((1, 5), 1.5))
    with pytest.raises(DataError, match="binarise: expected integers, or numbers from 0 to 1, got counts"):
        infer_schema(counts((20, 5), 500.0), binarise="dynamic")


def stream(seed):
    from likely.noise import StreamNoise

    return StreamNoise(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "fitted, new, message",
    [
        ("8-bit images", np.zeros((3, 6, 4), np.uint8), r"expected examples of shape \(6, 5\), got \(6, 4\)"),
        (
            "5-bit images",
            np.full((3, 6, 5), 32, np.uint8),
            r"array\[0, 0, 0\]: expected a value from 0 to 31, got 32",
        ),
        ("bounded integers", np.full((3, 64), 0.5), r"array\[0, 0\]: expected a whole number, got 0\.5"),
        ("counts", np.full((3, 50), -1), r"array\[0, 0\]: expected a whole number from 0 up, got -1"),
        ("reals", np.array([[0, 1, np.inf, 0, 0.0]]), r"array\[0, 2\]: expected a finite number, got inf"),
        ("reals", np.array([["a"] * 5]), "expected numbers, got dtype <U1"),
        ("truth", np.full((2, 5), 2), r"array\[0, 0\]: expected a value from 0 to 1, got 2"),
        ("integers below zero", np.full((2, 5), -4), r"expected a value from -3 to 3, got -4"),
        ("reals", np.zeros((0, 5)), "expected examples, got none"),
    ],
)
def test_new_arrays_that_do_not_belong(fitted, new, message):
    schema = infer_schema(CASES[fitted][0])
    with pytest.raises(DataError, match=message):
        schema.read(new)


@pytest.mark.parametrize(
    "array, options, message",
    [
        (np.zeros((1, 3)), {}, "expected at least 2 examples to learn from, got 1"),
        (np.array(3.0), {}, "expected an array of numbers whose first axis is the example"),
        (np.array(["a", "b"]), {}, "got dtype <U1"),
        (np.full((3, 2), np.nan), {}, "expected some cells that are not missing, got none"),
        (np.array([[1.0], [np.inf]]), {}, r"array\[1, 0\]: expected a finite number, got inf"),
        (np.array([[-(10**6)], [10**6]]), {}, "whole numbers from -1e.06 to 1e.06 need a choice"),
        (np.array([[-1], [1]]), {"space": "counts"}, "space: expected no negative number for 'counts', got -1"),
        (np.array([[0], [3]]), {"space": "binary"}, "space: expected 0 and 1 for 'binary', got 0 to 3"),
        (np.array([[0.5], [3]]), {"space": "counts"}, "space: expected 'reals' for an array with fractions"),
        (np.array([[0], [3]]), {"space": "real"}, "space: expected one of 'binary', 'integers', 'counts', 'reals'"),
        (np.zeros((4, 3)), {"layout": "HW"}, r"layout: 'HW' needs examples of 2 axes, got shape \(3,\)"),
        (np.zeros((4, 3)), {"levles": 3}, "has no option 'levles'; did you mean 'levels'"),
        (np.zeros((4, 3)), {"size": 3}, "size: an option for folders of images"),
        (np.zeros((4, 3)), {"given": "label"}, "given: array has no labels 'label'; pass a dict of arrays"),
        ({"a", "b"}, {}, "data: expected a path, .* got builtins.set"),
    ],
)
def test_arrays_that_cannot_be_fitted(array, options, message):
    with pytest.raises(DataError, match=message):
        infer_schema(array, **options)


def test_the_level_rule_does_not_take_rare_maxima_for_a_bound():
    rare = np.zeros((1000, 10), int)
    rare[0, 0] = 5
    rare[:, 1] = 2
    assert infer_schema(rare).space == Counts((10,))
    often = rare.copy()
    often[:20, 0] = 5
    assert infer_schema(often).space == Integers((10,), 6)


def test_importing_the_readers_imports_no_library_that_only_some_need():
    code = (
        "import sys, likely.data; print(*(m for m in sys.modules if m in "
        + repr(("pandas", "pyarrow", "PIL", "scipy", "sklearn", "zstandard", "matplotlib"))
        + "))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
