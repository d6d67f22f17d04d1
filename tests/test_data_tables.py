"""Tables from DataFrames and Parquet: kinds of columns, dtypes back, the schema as JSON and TOML."""

import json

import numpy as np
import pytest
import torch

from likely.contract import Table
from likely.data import DataError, Schema, infer_schema
from likely.data.columns import count_decimals

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")

N = 200


def frame():
    rng = np.random.default_rng(0)
    return pd.DataFrame({
        "date": pd.date_range("2020-01-01", periods=N),
        "time": pd.to_datetime("2020-01-01") + pd.to_timedelta(rng.integers(0, 10**6, N), "s"),
        "zoned": pd.date_range("2020-01-01", periods=N, freq="h", tz="Europe/Berlin"),
        "span": pd.to_timedelta(rng.integers(0, 100, N), "min"),
        "truth": rng.random(N) > 0.5,
        "maybe": pd.array([True, False, None, True] * (N // 4), dtype="boolean"),
        "int16": rng.integers(-5, 50, N).astype("int16"),
        "Int64": pd.array([1, 2, None, 4] * (N // 4), dtype="Int64"),
        "normal": rng.normal(size=N),
        "float32": rng.normal(size=N).astype("float32"),
        "grid32": (rng.integers(0, 1000, N) / 100).astype("float32"),
        "category": pd.Categorical(rng.choice(["x", "y", "z"], N), categories=["z", "y", "x", "never"]),
        "ordered": pd.Categorical(rng.choice(["lo", "hi"], N), categories=["lo", "mid", "hi"], ordered=True),
        "numbers": pd.Categorical(rng.choice([3, 5, 9], N)),
        "zeros": rng.choice(["0311", "0412", "9"], N),
        "string": pd.array(rng.choice(["a", "b", None], N), dtype="string"),
        "seven": [7] * N,
        "half": [2.5] * N,
        "object": np.array([True, None, False, True] * (N // 4), dtype=object),
        "whole": np.array([1, 2, None, 5] * (N // 4), dtype=object),
        "Float64": pd.array([1.5, None, 2.25, 3.5] * (N // 4), dtype="Float64"),
    })  # fmt: skip


KINDS = {
    "date": "integer", "time": "integer", "zoned": "integer", "span": "integer", "truth": "binary", "maybe": "binary",
    "int16": "integer", "Int64": "integer", "normal": "real", "float32": "real", "grid32": "real",
    "category": "categorical", "ordered": "ordinal", "numbers": "categorical", "zeros": "categorical",
    "string": "binary", "seven": "categorical", "half": "categorical", "object": "binary", "whole": "integer",
    "Float64": "real",
}  # fmt: skip


def test_every_dtype_is_understood_and_comes_back():
    df = frame()
    schema = infer_schema(df)
    assert {c.name: c.kind for c in schema.form.columns} == KINDS
    data = schema.read(df)
    data.space.validate(data.x)
    pd.testing.assert_frame_equal(schema.to_user(data.x), df)
    resolution = {c.name: c.resolution for c in schema.space.columns}
    assert resolution["date"] == 86_400e6 and resolution["time"] == 1e6 and resolution["span"] == 60e6
    assert resolution["normal"] is None and resolution["float32"] is None and resolution["grid32"] == 0.01
    assert schema.space.columns[11].levels == 4, "a category that does not occur is one all the same"


def test_json_and_toml_keep_everything():
    schema = infer_schema(frame(), given=["ordered"])
    assert Schema.from_json(json.loads(json.dumps(schema.to_json()))) == schema
    assert Schema.from_toml(schema.to_toml()) == schema


def test_parquet_is_read_as_the_frame_that_pandas_reads(tmp_path):
    df = frame()
    path = tmp_path / "a.parquet"
    df.to_parquet(path)
    schema = infer_schema(path)
    data = schema.read(path)
    plain = ["date", "time", "zoned", "span", "truth", "int16", "normal", "float32", "grid32", "category", "zeros"]
    pd.testing.assert_frame_equal(schema.to_user(data.x)[plain], pd.read_parquet(path)[plain])
    schema.write(data.x, tmp_path / "b.parquet")
    again = schema.read(tmp_path / "b.parquet")
    assert torch.equal(again.x.nan_to_num(-1e9), data.x.nan_to_num(-1e9))


def test_a_frame_may_be_held_against_the_schema_of_a_file_and_the_reverse(tmp_path):
    df = pd.DataFrame({"n": [0, 1, 1, 0, 1], "c": ["x", "y", "x", "x", "y"], "f": [0.5, 1.25, 2.0, 3.5, 4.75]})
    df.to_csv(tmp_path / "a.csv", index=False)
    from_file, from_frame = infer_schema(tmp_path / "a.csv"), infer_schema(df)
    assert from_file.space == from_frame.space
    assert torch.equal(from_file.read(df).x, from_frame.read(tmp_path / "a.csv").x)
    pd.testing.assert_frame_equal(from_file.to_user(from_file.read(df).x), df)


def test_column_names_of_any_sort():
    numbers = np.random.default_rng(0).integers(0, 9, (50, 3))
    for names in (pd.Index([0, 1, "a"]), pd.Index(["a", "a", "b"]), pd.RangeIndex(3),
                  pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 1)])):  # fmt: skip
        df = pd.DataFrame(numbers)
        df.columns = names
        schema = infer_schema(df)
        pd.testing.assert_frame_equal(schema.to_user(schema.read(df).x), df, check_column_type=False)
        assert len({c.name for c in schema.space.columns}) == 3
        assert Schema.from_toml(schema.to_toml()) == schema


def test_headerless_files_and_unnamed_frames_are_matched_by_place(tmp_path):
    (tmp_path / "a.csv").write_text("1,x\n2,y\n3,x\n")
    schema = infer_schema(tmp_path / "a.csv")
    df = pd.read_csv(tmp_path / "a.csv", header=None)
    assert torch.equal(schema.read(df).x, schema.read(tmp_path / "a.csv").x)
    with pytest.raises(DataError, match="expected 2 columns, got 1"):
        schema.read(df[[0]])


def test_what_is_set_aside_says_why_and_can_be_kept():
    df = frame()[["int16", "zeros"]]
    df["name"] = [f"k{i}" for i in range(N)]
    df["row"] = np.arange(N)
    df["void"] = np.nan
    df["user_id"] = np.random.default_rng(1).permutation(10 * N)[:N]
    df["huge"] = np.random.default_rng(1).integers(2**60, 2**62, N)
    schema = infer_schema(df)
    notes = {c.name: c.note for c in schema.form.columns if c.role == "ignore"}
    assert set(notes) == {"name", "row", "void", "user_id", "huge"}
    assert "identifier" in notes["name"] and "identifier" in notes["row"] and "identifier" in notes["user_id"]
    assert "every cell is missing" in notes["void"] and "2^53" in notes["huge"]
    assert [c.name for c in schema.space.columns] == ["int16", "zeros"]
    back = schema.to_user(schema.read(df).x)
    assert list(back.columns) == list(df.columns) and back["name"].isna().all()
    kept = infer_schema(df, keep=["name", "row"])
    assert [c.name for c in kept.space.columns] == ["int16", "zeros", "name", "row"]
    assert kept.space.columns[2].levels == N


def test_unique_numbers_that_are_no_key_are_modelled():
    df = pd.DataFrame({"price": np.random.default_rng(0).permutation(10**6)[:300], "x": np.arange(300) % 7})
    assert [c.name for c in infer_schema(df).space.columns] == ["price", "x"]


def test_a_hundred_thousand_categories():
    words = [f"w{i:06d}" for i in range(100_000)]
    df = pd.DataFrame({"w": words + words, "y": np.arange(200_000) % 5})
    schema = infer_schema(df)
    assert schema.space.columns[0].levels == 100_000
    x = schema.read(df).x
    assert x[:100_000, 0].tolist() == list(range(100_000))
    assert schema.to_user(x[99_999:])["w"].iloc[0] == "w099999"
    assert Schema.from_toml(schema.to_toml()) == schema


def test_given_columns_become_the_condition():
    df = frame()[["int16", "ordered", "zeros"]]
    schema = infer_schema(df, given=["zeros", "int16"])
    data = schema.read(df)
    assert [c.name for c in data.space.columns] == ["ordered"]
    assert [c.name for c in data.condition_space.columns] == ["int16", "zeros"], "in the order of the table"
    pd.testing.assert_frame_equal(schema.to_user(data.x, data.condition), df)
    alone = schema.to_user(data.x)
    assert alone["zeros"].isna().all() and alone["ordered"].equals(df["ordered"])


def test_corrections_in_toml_are_merged_onto_inference(tmp_path):
    df = pd.DataFrame({"size": [1, 2, 3] * 20, "w": [25, 50, 75] * 20, "t": ["a", "b", "c"] * 20})
    (tmp_path / "fix.toml").write_text(
        'missing = ["c"]\n[[columns]]\nname = "size"\nkind = "ordinal"\ncategories = ["3", "2", "1"]\n'
        '[[columns]]\nname = "w"\nresolution = 25.0\nunit = "kg"\n'
    )
    schema = infer_schema(df, schema=tmp_path / "fix.toml", given=["t"])
    size, weight, text = schema.form.columns
    assert (size.kind, size.categories) == ("ordinal", ("3", "2", "1"))
    assert (weight.kind, weight.resolution, weight.unit) == ("integer", 25.0, "kg") and "kg" in schema.describe()
    assert text.role == "given" and text.missing and text.categories == ("a", "b")
    assert schema.read(df).x[:3].tolist() == [[2, 25], [1, 50], [0, 75]]
    full = infer_schema(df, schema=schema.to_toml())
    assert full.space == schema.space and full.form.columns[1].unit == "kg"
    with pytest.raises(DataError, match="columns: expected the name of a column, got 'sise'; is 'size' meant"):
        infer_schema(df, columns={"sise": {"kind": "real"}})
    with pytest.raises(DataError, match="column 'size' has no option 'kinds'; did you mean 'kind'"):
        infer_schema(df, columns={"size": {"kinds": "real"}})
    with pytest.raises(DataError, match="schema: not TOML"):
        infer_schema(df, schema="columns = [")


@pytest.mark.parametrize(
    "column, said, message",
    [
        (["a", "b"] * 10, {"kind": "real"}, "declared kind = 'real', but the cell is 'a'"),
        ([1.5, 2.5] * 10, {"kind": "integer"}, 'declared kind = "integer", but it has cells with decimals'),
        ([1, 2, 3] * 10, {"role": "modelled"}, "expected role 'model', 'given' or 'ignore'"),
        ([1, 2, 3] * 10, {"resolution": -1.0}, "expected a positive resolution"),
        ([1, 2, 3] * 10, {"kind": "binary"}, "expected 2 categories for kind 'binary', got 3"),
        (["a", "b"] * 10, {"aliases": {"A": "c"}}, "alias 'A' stands for 'c', not a category"),
        (["a", "b"] * 10, {"categories": ["a", "a"]}, "expected distinct categories"),
        ([1, "b"] * 10, {}, "DataFrame, row 1, column 'v': expected values of one type"),
        ([1j, 2j] * 10, {}, "expected real numbers, got dtype complex128"),
        ([1.0, np.inf] * 10, {}, "DataFrame, row 1, column 'v': expected a finite number, got 'inf'"),
    ],
)
def test_columns_that_cannot_be(column, said, message):
    df = pd.DataFrame({"v": column, "w": np.arange(len(column)) % 3})
    with pytest.raises(ValueError, match=message):
        infer_schema(df, columns={"v": said})


def test_wrong_dtypes_and_values_name_row_and_column():
    df = pd.DataFrame({"n": [1.5, 2.0, 3.25] * 10, "c": ["x", "y", "z"] * 10})
    schema = infer_schema(df)
    bad = df.copy()
    bad["n"] = bad["n"].astype(str)
    with pytest.raises(DataError, match=r"row 0, column 'n': expected a number, got '1.5' .*pandas.to_numeric"):
        schema.read(bad)
    bad = df.copy()
    bad.loc[7, "c"] = "w"
    with pytest.raises(DataError, match=r"DataFrame, row 7, column 'c': expected one of the 3 known categories"):
        schema.read(bad)
    bad = df.copy()
    bad.loc[4, "n"] = np.nan
    with pytest.raises(DataError, match=r"row 4, column 'n': expected a value, got a missing cell"):
        schema.read(bad)
    assert infer_schema(df, allow_missing=True).read(bad).x.isnan().sum() == 1
    with pytest.raises(DataError, match=r"expected rows and columns, got shape \(0, 2\)"):
        schema.read(df[:0])
    with pytest.raises(DataError, match="expected at least 2 rows to learn from, got 1"):
        infer_schema(df[:1])
    assert len(schema.read(df[:1])) == 1


def test_a_lattice_without_a_decimal_grid_gets_probabilities():
    thirds = np.random.default_rng(0).integers(0, 9, 1000) / 3
    schema = infer_schema(pd.DataFrame({"x": thirds, "y": thirds + 0.5 * np.random.default_rng(1).random(1000)}))
    x, y = schema.form.columns
    assert x.kind == "ordinal" and len(x.categories) == 9 and "density would be infinite" in x.note
    assert y.kind == "real" and y.resolution is None
    assert not schema.space.has_probability
    back = schema.to_user(schema.read(pd.DataFrame({"x": thirds, "y": thirds})).x)
    assert np.array_equal(back["x"], thirds)


def test_decimals_are_counted_exactly():
    rng = np.random.default_rng(0)
    for decimals in range(8):
        grid = rng.integers(-(10**9), 10**9, 1000) / 10**decimals
        assert count_decimals(grid) == decimals
    assert count_decimals(rng.normal(size=100)) is None
    assert count_decimals((rng.integers(0, 10**5, 500) / 1000).astype("float32").astype("float64"), single=True) == 3
    assert count_decimals(rng.normal(size=100).astype("float32").astype("float64"), single=True) is None


def test_samples_on_the_grid_are_exact_decimals():
    df = pd.DataFrame({"x": np.arange(100) / 10})
    schema = infer_schema(df)
    assert isinstance(schema.space, Table)
    steps = torch.arange(100).double()[:, None] * 0.1  # 0.30000000000000004 and the like
    assert np.array_equal(schema.to_user(steps)["x"], df["x"])


def test_filling_holes_of_a_frame_keeps_its_dtypes_and_index():
    df = frame()[["Int64", "string", "maybe", "normal", "Float64"]]
    df.index = pd.Index(range(1000, 1000 + N))
    schema = infer_schema(df)
    x = schema.read(df).x
    filled = torch.where(x.isnan(), torch.tensor([2.0, 1.0, 0.0, 9.0, 2.25]).double(), x)
    out = schema.complete(df, filled)
    expected = df.fillna({"Int64": 2, "string": "b", "maybe": False, "Float64": 2.25})
    pd.testing.assert_frame_equal(out, expected)
