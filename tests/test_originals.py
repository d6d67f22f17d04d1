"""What is taken apart comes back: every byte of a file, every bit and label of an object, whatever is wrong with it."""

import contextlib
import datetime
import decimal
import gzip
import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from PIL import Image

from likely.data import DataError, infer_schema
from likely.data.originals import restore, take_apart
from likely.data.originals.side import Reader, Writer, varints
from likely.data.originals.spelling import snap

CLEAN = "age,town,income,when\n" + "".join(
    f"{20 + i % 37},{('Ulm', 'Bonn', 'Jena')[i % 3]},{(i * 7 % 400) / 100:.2f},2024-02-{1 + i % 28:02d}\n"
    for i in range(90)
)


def there_and_back(schema, source, step=None, legal=None, **options):
    """Take apart in steps of rows, check that ``x`` is legal, put together; the original and what came back."""
    original = take_apart(schema, source, **options)
    step = step or max(1, original.n)
    parts = []
    for start in range(0, original.n, step):
        rows = original.rows(start, min(start + step, original.n), legal)
        schema.space.validate(rows.x, "x")
        if schema.condition_space is not None:
            schema.condition_space.validate(rows.condition, "condition")
        parts.append((rows.x, rows.condition, rows.side))
    restored = restore(schema, original.head, parts)
    return original, restored, parts


def put_together(schema, head, parts):
    return restore(schema, head, parts).value


def assert_bytes(schema, path, step=None, **options):
    original, restored, parts = there_and_back(schema, path, step, **options)
    content = path.read_bytes()
    assert restored.value == content
    assert original.exactness == "bytes" and original.size == len(content)
    assert original.digest == restored.digest == hashlib.blake2b(content, digest_size=16).digest()
    return original, parts


@pytest.fixture
def clean(tmp_path):
    path = tmp_path / "clean.csv"
    path.write_text(CLEAN)
    return infer_schema(path), path


# --------------------------------------------------------------------------------------------------------------
# CSV
# --------------------------------------------------------------------------------------------------------------


def test_a_regular_csv_file_needs_nothing_beside_the_model(clean):
    schema, path = clean
    for step in (None, 7, 1):
        original, parts = assert_bytes(schema, path, step)
        assert all(side == b"" for _, _, side in parts)
        assert torch.equal(torch.cat([x for x, _, _ in parts]), schema.read(path).x)
    assert len(original.head) < 400


#: How a table may be written otherwise: each must come back, and what is systematic must cost nothing a row.
DIALECTS = {
    "as is": lambda t: t,
    "CRLF": lambda t: t.replace("\n", "\r\n"),
    "CR": lambda t: t.replace("\n", "\r"),
    "no newline at the end": lambda t: t[:-1],
    "blanks after commas": lambda t: t.replace(",", ", "),
    "blank lines at the end": lambda t: t + "\n\n",
    "blank lines at the start": lambda t: "\n\r\n" + t,
    "signs": lambda t: "\n".join(
        ",".join("+" + c if c[:1].isdigit() and "-" not in c else c for c in line.split(",")) for line in t.split("\n")
    ),
    "one more decimal": lambda t: t.replace(",2024", "0,2024"),
    "all quoted": lambda t: "".join(",".join(f'"{c}"' for c in line.split(",")) + "\n" for line in t.splitlines()),
    "upper case": lambda t: t[: t.index("\n")] + t[t.index("\n") :].upper(),
    "full stops after towns": lambda t: (
        t.replace("Ulm,", "Ulm.,").replace("Bonn,", "Bonn.,").replace("Jena,", "Jena.,")
    ),
    "aligned": lambda t: "".join(",".join(f"{c:>12}" for c in line.split(",")) + "\n" for line in t.splitlines()),
    "aligned left": lambda t: (
        t[: t.index("\n") + 1]
        + "".join(",".join(f"{c:<12}" for c in line.split(",")) + "\n" for line in t.splitlines()[1:])
    ),
    "exponents": lambda t: "\n".join(
        ",".join([c[0], c[1], f"{float(c[2]):.3e}", c[3]]) if i and len(c) > 1 else ",".join(c)
        for i, c in enumerate(line.split(",") for line in t.split("\n"))
    ),
    "columns in another order": lambda t: "".join(
        ",".join(line.split(",")[j] for j in (2, 0, 3, 1)) + "\n" for line in t.splitlines()
    ),
}


@pytest.mark.parametrize("name", DIALECTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_systematic_differences_cost_nothing_a_row(clean, tmp_path, name, encoding):
    schema, _ = clean
    path = tmp_path / "other.csv"
    path.write_bytes(DIALECTS[name](CLEAN).encode(encoding))
    _, parts = assert_bytes(schema, path, 40, encoding=encoding, blanks=name in ("blanks after commas", "aligned"))
    assert [side for _, _, side in parts] == [b""] * 3
    assert torch.equal(torch.cat([x for x, _, _ in parts]), schema.read(clean[1]).x)


FAULTS = [
    "", "?", "NA", "nan", "-", "inf", "-inf", "1e400", "x", "Ulm.", "ULM", " Ulm", "Ulm ", '"Ulm"', '"Ulm', 'U"lm',
    '"U""lm"', '"a,b"', '"a\nb"', '"a\r\nb"', "1.5", "1.50", "01.5", "+1.5", ".5", "5.", "1e5", "1E+05", "1_000",
    "-0", "-0.0", "1.005",
    "123456789012345678901234567890", "0.1234567890123456789", "2024-02-30", "2024-02-29", "2024/02/29", "é", "日本",
    "\x00", "\t7", "７", "\u2028", "\x1c3", "\x85", "  ", "7 ", "a,b", "a,b,c", "#comment",
]  # fmt: skip


def messy(rng, text):
    """A text with some cells, rows and ends of lines spoilt."""
    lines = text.split("\n")
    for _ in range(rng.randrange(1, 12)):
        row = rng.randrange(1, len(lines))
        match rng.randrange(8):
            case 0:
                lines.insert(row, rng.choice(["", " ", "\r", "\n", ",", ",,,", '"', "# note"]))
            case 1:
                lines[row] = lines[row].replace(",", rng.choice([";", ", ", " ,", ",,"]), rng.randrange(1, 4))
            case 2:
                lines[row] += rng.choice(["\r", ",", " ", "\r\r", "\t", '"'])
            case 3:
                lines[row] = lines[row][: rng.randrange(len(lines[row]) + 1)]
            case _:
                cells = lines[row].split(",")
                cells[rng.randrange(len(cells))] = rng.choice(FAULTS)
                lines[row] = ",".join(cells)
    out = "\n".join(lines)
    return out if rng.random() < 0.7 else out.replace("\n", "\r\n")


@pytest.mark.parametrize("seed", range(8))
def test_faulty_csv_files_come_back_too(clean, tmp_path, seed):
    schema, _ = clean
    rng = random.Random(seed)
    for trial in range(16):
        path = tmp_path / f"{trial}.csv"
        text = messy(rng, CLEAN)
        encoding = rng.choice(["utf-8", "utf-8", "utf-16-le", "cp1252"])
        content = text.encode(encoding, "replace")
        if rng.random() < 0.2:
            place = rng.randrange(60, len(content))
            content = content[:place] + bytes(rng.randrange(256) for _ in range(3)) + content[place:]
        path.write_bytes(content)
        assert_bytes(schema, path, rng.choice([None, 1, 13, 50]), encoding=encoding)


@pytest.mark.parametrize("seed", range(4))
def test_any_csv_file_of_its_own_schema_comes_back(tmp_path, seed):
    rng = random.Random(seed)
    for trial in range(25):
        columns = rng.randrange(1, 6)
        delimiter = rng.choice([",", ";", "\t", "|", " "])
        kinds = [rng.choice(["int", "fixed", "short", "g", "word", "both", "key", "date"]) for _ in range(columns)]

        def cell(kind, row, rng=rng, delimiter=delimiter):
            value = rng.gauss(0, 100)
            return {
                "int": str(round(value)),
                "fixed": f"{value:.3f}",
                "short": repr(round(value, 3)),
                "g": f"{value * 10 ** rng.randrange(-9, 9):.5g}",
                "word": rng.choice("abc"),
                "both": rng.choice(["NA", "x", "y z"]) if delimiter != " " else "y",
                "key": f'"name {row}"',
                "date": f"{1990 + row % 40}-01-{1 + row % 28:02d}",
            }[kind]

        lines = [delimiter.join(cell(kind, row) for kind in kinds) for row in range(40)]
        if rng.random() < 0.5:
            lines.insert(0, delimiter.join(f"name{j}" for j in range(columns)))
        path = tmp_path / f"{trial}.csv"
        path.write_text(rng.choice(["\n", "\r\n"]).join(lines) + rng.choice(["", "\n"]), newline="")
        try:
            schema = infer_schema(path)
        except DataError:
            continue  # nothing to model
        _, parts = assert_bytes(schema, path, 17)
        x = torch.cat([x for x, _, _ in parts])
        assert torch.equal(x.nan_to_num(-1e9), (schema.read(path).x + 0.0).nan_to_num(-1e9))


def test_a_compressed_file_comes_back_decompressed(clean, tmp_path):
    schema, _ = clean
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(CLEAN.encode()))
    original, restored, _ = there_and_back(schema, tmp_path / "a.csv.gz")
    assert (original.compressed, original.size) == ("gzip", len(CLEAN))
    restored.write(tmp_path / "b.csv.gz", original.digest)
    assert gzip.decompress((tmp_path / "b.csv.gz").read_bytes()) == CLEAN.encode()


def test_columns_set_aside_and_conditions(tmp_path):
    lines = [f'{i + 1},"Name, {i}",{i % 7},{i % 2}' for i in range(60)]
    path = tmp_path / "a.csv"
    path.write_text("id,name,x,given\n" + "\n".join(lines) + "\n")
    schema = infer_schema(path, given=["given"])
    assert [c.role for c in schema.form.columns] == ["ignore", "ignore", "model", "given"]
    _, parts = assert_bytes(schema, path, 25)
    assert parts[0][1].shape == (25, 1)
    assert sum(len(side) for _, _, side in parts) < 60 * 10 + 100
    path.write_text("surplus,given,x\n" + "\n".join(f"s{i % 3},{i % 2},{i % 7}" for i in range(60)))
    assert_bytes(schema, path, 25, extra="ignore")
    with pytest.raises(DataError, match="'surplus'"):
        take_apart(schema, path)
    path.write_text("x,other\n1,2\n")
    with pytest.raises(DataError, match="expected a column 'given'"):
        take_apart(schema, path)


def test_cells_that_a_codec_cannot_code_are_kept_beside(clean):
    schema, path = clean

    def legal(x):
        out = torch.ones_like(x, dtype=torch.bool)
        out[:, 0] = x[:, 0] < 40
        return out

    _, restored, parts = there_and_back(schema, path, 20, legal=legal)
    assert restored.value == path.read_bytes()
    assert all(bool(legal(x).all()) for x, _, _ in parts)
    assert any((x[:, 0] >= 40).any() for x in schema.read(path).x.split(20))
    with pytest.raises(DataError, match=r"x\[0, 1\]: expected that the codec takes"):
        take_apart(schema, path).rows(legal=lambda x: torch.arange(4) != torch.ones_like(x))


def test_some_rows_alone(clean):
    schema, path = clean
    original = take_apart(schema, path)
    rows = original.rows(30, 40)
    restored = restore(schema, original.head, [(rows.x, rows.condition, rows.side)], first=30)
    lines = CLEAN.splitlines(keepends=True)
    assert restored.value.decode() == lines[0] + "".join(lines[31:41])
    with pytest.raises(DataError, match="0 <= start <= stop <= 90, got 80 and 91"):
        original.rows(80, 91)


def test_a_value_may_come_back_as_another_float_of_the_same_step(clean):
    schema, path = clean
    original = take_apart(schema, path)
    rows = original.rows()
    x = rows.x.clone()
    x[:, 2] = torch.round(x[:, 2] / 0.01) * 0.01
    assert (x != rows.x).any()
    assert restore(schema, original.head, [(x, None, rows.side)]).value == path.read_bytes()


def test_snapping_gives_the_float_of_the_decimal_number():
    columns = {c.name: c for c in infer_schema(pd.DataFrame({"c": [i / 100 for i in range(50)]})).form.columns}
    steps = np.arange(-3000, 3000)
    assert snap(columns["c"], steps * 0.01).tolist() == [float(f"{i / 100:.2f}") + 0.0 for i in steps]


def test_nothing_is_written_where_the_digest_differs(clean, tmp_path):
    schema, path = clean
    _, restored, _ = there_and_back(schema, path)
    with pytest.raises(DataError, match="digest"):
        restored.write(tmp_path / "out.csv", b"\0" * 16)
    assert not (tmp_path / "out.csv").exists()


# --------------------------------------------------------------------------------------------------------------
# DataFrames and Parquet
# --------------------------------------------------------------------------------------------------------------


def frame(n=120):
    rng = np.random.default_rng(0)
    out = pd.DataFrame(
        {
            "whole": rng.integers(0, 50, n),
            "huge": rng.integers(0, 2**63, n).astype(np.uint64) * 2 + 1,
            "real": rng.normal(size=n),
            "single": np.round(rng.normal(size=n), 2).astype(np.float32),
            "truth": rng.random(n) < 0.5,
            "text": rng.choice(["x", "y", "z"], n),
            "object": pd.Series(rng.choice(["p", "q"], n), dtype=object),
            "ordered": pd.Categorical(rng.choice(["lo", "hi"], n), categories=["lo", "hi", "never"], ordered=True),
            "numbered": pd.Categorical(rng.choice([3, 1, 7], n)),
            "when": pd.date_range("2020-01-01", periods=n, freq="h"),
            "zone": pd.date_range("2020-01-01", periods=n, freq="D", tz="Europe/Berlin"),
            "nullable": pd.array(rng.integers(0, 9, n), dtype="Int64"),
            "maybe": pd.array(rng.random(n) < 0.5, dtype="boolean"),
            "string": pd.array(rng.choice(["k", "l"], n), dtype="string"),
            "span": pd.to_timedelta(rng.integers(0, 99, n), unit="s"),
        }
    )
    out.loc[3, "real"], out.loc[10, "real"] = np.nan, -0.0
    out.loc[[4, 9], "nullable"] = pd.NA
    out.loc[5, "text"] = out.loc[7, "ordered"] = np.nan
    out.loc[6, "object"], out.loc[8, "when"] = None, pd.NaT
    return out


def assert_frame(schema, source, expected=None, legal=None):
    original, restored, parts = there_and_back(schema, source, 50, legal)
    pd.testing.assert_frame_equal(restored.value, source if expected is None else expected, check_exact=True)
    assert original.exactness == "content" and original.digest == restored.digest
    return original, restored, parts


def test_a_dataframe_comes_back_and_costs_what_is_not_modelled():
    table = frame()
    schema = infer_schema(table)
    _, _, parts = assert_frame(schema, table)
    x = torch.cat([x for x, _, _ in parts])
    # Cells of single precision are seen as the grid has them.
    torch.testing.assert_close(x, schema.read(table).x, rtol=1e-6, atol=0, equal_nan=True)
    # Only the column beyond 2^53 (8 bytes a cell), and one negative zero.
    assert sum(len(side) for _, _, side in parts) < 8 * len(table) + 40


def test_a_dataframe_of_other_dtypes_than_the_fitted_one_comes_back():
    table = frame()
    schema = infer_schema(table)
    other = table.copy()
    other["whole"] = other["whole"].astype("int16")
    other["single"] = other["single"].astype("float64") + 1e-9
    other["ordered"] = other["ordered"].astype(object).astype("category")
    other["numbered"] = other["numbered"].astype(int) + 1
    other["text"] = other["text"].astype(object)
    other.loc[11, "text"] = "new"
    other.index = pd.date_range("2021-01-01", periods=len(other), freq="D", name="day")
    assert_frame(schema, other[list(reversed(other.columns))])


def test_values_of_any_sort_in_a_column_of_objects_come_back():
    table = frame()[["whole", "text"]]
    schema = infer_schema(table)
    odd = table.astype(object)
    values = [
        "word", decimal.Decimal("1.50"), None, float("nan"), pd.NA, pd.NaT, True, b"bytes", 10**40, 2.5, np.int8(-3),
        np.float32("nan"), datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 1, 2, 3), 10**400,
        pd.Timestamp(1, unit="ns"), pd.Timedelta(5, unit="s"), (1, ("a", None)), pd.Interval(0, 1.5, closed="left"),
        np.datetime64("2020-01-01"),
    ]  # fmt: skip
    odd["whole"] = pd.Series([*odd["whole"][:20], *values, *odd["whole"][20 + len(values) :]], dtype=object)
    odd.index = pd.MultiIndex.from_arrays([list("ab") * 60, range(120)], names=["k", None])
    _, restored, _ = assert_frame(schema, odd)
    assert list(map(type, restored.value["whole"])) == list(map(type, odd["whole"]))
    odd["whole"] = [{"a": 1}] * 120
    with pytest.raises(DataError, match=r"column 'whole': cannot keep values of type builtins\.dict"):
        take_apart(schema, odd)


def test_labels_of_columns_come_back():
    table = pd.DataFrame(np.arange(60.0).reshape(20, 3) % 7)
    assert_frame(infer_schema(table), table)
    table.columns = ["a", "a", 3]
    assert_frame(infer_schema(table), table)
    table.columns = pd.MultiIndex.from_tuples([("a", 1), ("a", 2), ("b", 1)], names=["k", "l"])
    assert_frame(infer_schema(table), table)
    assert_frame(infer_schema(table), table.iloc[5:15])


def test_cells_of_a_dataframe_that_a_codec_cannot_code_are_kept_beside():
    table = frame()
    schema = infer_schema(table, ignore=["huge"])
    _, _, parts = assert_frame(schema, table, legal=lambda x: ~(x > 1e9) & ~(x.abs() > 1.5))
    assert not any(((x > 1e9) | (x.abs() > 1.5)).any() for x, _, _ in parts)


def test_parquet_comes_back_as_the_same_typed_table(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path, again = tmp_path / "a.parquet", tmp_path / "b.parquet"
    table = frame()
    table.to_parquet(path)
    schema = infer_schema(path)
    original, restored, _ = assert_frame(schema, path, pd.read_parquet(path))
    restored.write(again, original.digest)
    assert parquet.read_table(path).equals(parquet.read_table(again), check_metadata=True)
    plain = parquet.read_table(path).replace_schema_metadata(None)
    parquet.write_table(plain.drop_columns(["zone"]).append_column("big", [[None, 2**62 + 1] * 60]), path)
    original, restored, _ = there_and_back(infer_schema(path), path)
    restored.write(again, original.digest)
    assert parquet.read_table(path).equals(parquet.read_table(again))


# --------------------------------------------------------------------------------------------------------------
# Arrays
# --------------------------------------------------------------------------------------------------------------

_RNG = np.random.default_rng(0)
_COUNTS = _RNG.poisson(300, (60, 20))


def same(a, b):
    return (
        type(a) is type(b)
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.tobytes() == b.tobytes()
        and a.flags.f_contiguous == b.flags.f_contiguous
    )


ARRAYS = {
    "pictures": _RNG.integers(0, 256, (60, 8, 8, 3)).astype(np.uint8),
    "channels first": _RNG.integers(0, 256, (60, 3, 8, 8)).astype(np.uint8),
    "single 255ths": _RNG.integers(0, 256, (60, 8, 8)).astype(np.float32) / 255,
    "single 255ths, times": _RNG.integers(0, 256, (60, 8, 8)).astype(np.float32) * np.float32(1 / 255),
    "double 255ths": _RNG.integers(0, 256, (60, 8, 8)) / 255,
    "reals": _RNG.normal(size=(60, 5)),
    "reals by columns": np.asfortranarray(_RNG.normal(size=(60, 5))),
    "half": _RNG.normal(size=(60, 5)).astype(np.float16),
    "truth": _RNG.random((60, 6)) < 0.3,
    "big endian": _COUNTS.astype(">i4"),
    "short rows": _COUNTS[:, 0].copy(),
    "offset": _COUNTS.astype(np.int16) - 290,
}


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_comes_back_to_the_bit_for_nothing(name, tmp_path):
    array = ARRAYS[name]
    schema = infer_schema(array)
    original, restored, parts = there_and_back(schema, array, 25)
    assert same(restored.value, array) and restored.digest == original.digest
    assert [side for _, _, side in parts] == [b""] * 3
    np.save(tmp_path / "a.npy", array)
    _, parts = assert_bytes(infer_schema(tmp_path / "a.npy"), tmp_path / "a.npy", 25)
    assert [side for _, _, side in parts] == [b""] * 3


def test_bits_that_no_model_codes_come_back():
    reals = _RNG.normal(size=(60, 5))
    schema = infer_schema(reals)
    odd = reals.copy()
    odd[3, 2], odd[4, 1], odd[7, 0], odd[8, 0] = np.nan, -0.0, np.inf, 5e-324
    odd.view(np.uint64)[9, 3] = 0x7FF8000000000123
    assert same(there_and_back(schema, odd, 25)[1].value, odd)
    counts = infer_schema(_COUNTS)
    odd = _COUNTS.copy()
    odd[5, 5], odd[6, 6] = 2**62 + 1, -4
    for array in (odd, odd.astype(np.uint64), odd + 0.5):
        assert same(there_and_back(counts, array, 25)[1].value, array)
    if np.dtype(np.longdouble).itemsize > 8:
        with pytest.raises(DataError, match="expected floats of at most 8 bytes"):
            take_apart(counts, odd.astype(np.longdouble))
    _, restored, parts = there_and_back(counts, _COUNTS, 25, legal=lambda x: x < 310)
    assert same(restored.value, _COUNTS) and max(int(x.max()) for x, _, _ in parts) < 310
    grey = ARRAYS["pictures"][..., 0]
    for way in ("dynamic", "threshold"):
        assert same(there_and_back(infer_schema(grey, binarise=way), grey, 25)[1].value, grey)
    tensor = torch.tensor(_COUNTS)
    assert torch.equal(there_and_back(infer_schema(tensor), tensor)[1].value, tensor)


def test_several_arrays_come_back_by_name_and_in_order(tmp_path):
    arrays = {
        "w": np.arange(5.0),
        "x": _COUNTS,
        "y": _RNG.integers(0, 3, (60, 2)),
        "label": _RNG.choice(["k", "lll"], 60),
        "z": np.asfortranarray(_RNG.normal(size=(60, 2))),
    }
    np.savez(tmp_path / "a.npz", **arrays)
    for source in (arrays, tmp_path / "a.npz"):
        schema = infer_schema(source, key="x", given=["y", "label"])
        original, restored, parts = there_and_back(schema, source, 25)
        assert list(restored.value) == list(arrays) and restored.digest == original.digest
        assert all(same(restored.value[name], array) for name, array in arrays.items())
        assert sum(len(side) for _, _, side in parts) == arrays["z"].nbytes
    restored.write(tmp_path / "b.npz", original.digest)
    with np.load(tmp_path / "b.npz") as again:
        assert again.files == list(arrays) and all(same(again[name], array) for name, array in arrays.items())


def test_sparse_matrices_come_back(tmp_path):
    held = scipy.sparse.csr_matrix(np.where(_RNG.random((60, 40)) < 0.1, _RNG.integers(1, 99, (60, 40)), 0.0))
    scipy.sparse.save_npz(tmp_path / "a.npz", held.tocsc())
    for source in (held.astype(np.int64), held, tmp_path / "a.npz"):
        original, restored, parts = there_and_back(infer_schema(source), source, 25)
        expected = held if isinstance(source, Path) else source
        assert (restored.value != expected).nnz == 0 and restored.value.dtype == expected.dtype
        assert original.digest == restored.digest and {side for _, _, side in parts} == {b""}


def test_the_embedded_digits_and_idx_files(tmp_path):
    digits = there_and_back(infer_schema("digits"), "digits")[1].value
    assert digits.shape == (1797, 8, 8)
    path = tmp_path / "t-images-idx3-ubyte"
    path.write_bytes(b"\0\0\x08\x03" + b"".join(size.to_bytes(4, "big") for size in (60, 8, 8)) + digits[:60].tobytes())
    _, parts = assert_bytes(infer_schema(path), path, 25)
    assert [side for _, _, side in parts] == [b""] * 3


def test_some_rows_of_arrays(tmp_path):
    np.save(tmp_path / "a.npy", _COUNTS)
    arrays = {"w": np.arange(5.0), "x": _COUNTS, "y": _RNG.integers(0, 3, 60), "z": _RNG.normal(size=(60, 2))}
    sparse = scipy.sparse.csr_matrix(_COUNTS.reshape(60, -1))
    sources = {"file": tmp_path / "a.npy", "array": _COUNTS, "arrays": arrays, "sparse": sparse}
    for source in sources.values():
        schema = infer_schema(source, **({"key": "x", "given": ["y"]} if isinstance(source, dict) else {}))
        original, _, parts = there_and_back(schema, source, 25)
        restored = restore(schema, original.head, parts[1:], first=25, keep=(30, 58))
        if isinstance(source, dict):
            assert all(same(restored.value[name], source[name][30:58]) for name in "xyz")
            assert same(restored.value["w"], source["w"])
        elif scipy.sparse.issparse(source):
            assert (restored.value != source[30:58]).nnz == 0
        else:
            restored.write(tmp_path / "b.npy")
            assert same(np.load(tmp_path / "b.npy"), _COUNTS[30:58])
        assert restore(schema, original.head, parts[:1], keep=(3, 3)).value is not None


def test_bytes_of_every_kind_of_pixel_are_translated_as_other_numbers_are_computed():
    """Cells of one byte go by a table; the same values as int16 go by arithmetic."""
    levels = np.arange(120, dtype=np.uint8).reshape(20, 2, 3) * 2
    for values in (levels, (levels > 100).astype(np.uint8) * 255, (levels % 60).view(np.int8), levels > 100):
        schema = infer_schema(values)
        narrow, wide = (take_apart(schema, values.astype(t)).rows(0, 20) for t in (values.dtype, np.int16))
        assert torch.equal(narrow.x, wide.x) and narrow.x.dtype == wide.x.dtype
        _, restored, parts = there_and_back(schema, values, 7)
        assert same(restored.value, values) and {side for _, _, side in parts} == {b""}


# --------------------------------------------------------------------------------------------------------------
# Folders of images
# --------------------------------------------------------------------------------------------------------------


def pixels(path):
    with Image.open(path) as picture:
        return picture.size, np.asarray(picture if picture.mode.startswith("I") else picture.convert("RGBA"))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "I;16"])
@pytest.mark.parametrize("given", [(), ("label",)])
def test_a_folder_of_images_comes_back_with_its_names(tmp_path, mode, given):
    folder, again = tmp_path / "in", tmp_path / "out"
    for i in range(20):
        (folder / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        held = {
            "RGB": _RNG.integers(0, 256, (8, 6, 3)).astype(np.uint8),
            "L": _RNG.integers(0, 256, (8, 6)).astype(np.uint8),
            "1": _RNG.random((8, 6)) < 0.5,
            "I;16": _RNG.integers(0, 65536, (8, 6)).astype(np.uint16),
        }[mode]
        Image.fromarray(held).save(folder / "ab"[i % 2] / f"img{i:04d}.png")
    schema = infer_schema(folder, given=list(given))
    original, restored, parts = there_and_back(schema, folder, 7)
    restored.write(again, original.digest)
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.png"))
    assert names == sorted(path.relative_to(again) for path in again.rglob("*.*"))
    for name in names:
        with Image.open(folder / name) as a, Image.open(again / name) as b:
            assert a.mode == b.mode and (np.asarray(a) == np.asarray(b)).all()
    assert sum(len(side) for _, _, side in parts) < 150
    some = restore(schema, original.head, parts[1:], first=7, keep=(9, 15)).value
    every = restore(schema, original.head, parts).value
    assert list(some) == list(every)[9:15] and all(np.array_equal(some[name], every[name]) for name in some)
    with pytest.raises(DataError, match="expected a new or empty folder"):
        restore(schema, original.head, parts).write(again)
    assert survives(schema, original.head, parts[0], 0, 400) > 100


def test_images_that_were_converted_come_back_as_their_own_files(tmp_path):
    folder, again = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(_RNG.integers(0, 256, (8, 6, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    with Image.open(folder / "0.png") as first:
        first.save(folder / "photo.jpg")
        first.quantize(9).save(folder / "palette.png")
        first.convert("RGBA").save(folder / "alpha.png")
        first.resize((20, 20)).save(folder / "big.png")
    schema = infer_schema(folder, size=8, channels="rgb")
    original, restored, _ = there_and_back(schema, folder, 4)
    restored.write(again, original.digest)
    for path in folder.iterdir():
        came = again / (path.name if path.suffix == ".png" else f"{path.name}.png")
        kept = again / path.name
        a, b = pixels(path), pixels(kept if kept.exists() else came)
        assert a[0] == b[0] and (a[1] == b[1]).all()
        if path.name in ("alpha.png", "big.png"):
            assert path.read_bytes() == kept.read_bytes()


@pytest.mark.parametrize("name", ["../out.png", "/out.png", "a/../../b.png", "", "a//b.png", "a\0.png"])
def test_names_that_lead_out_of_the_folder_are_refused(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(2):
        Image.fromarray(_RNG.integers(0, 256, (8, 6)).astype(np.uint8)).save(folder / f"{i}.png")
    schema = infer_schema(folder)
    original, _, [(x, condition, _)] = there_and_back(schema, folder)
    out = Writer()
    out.texts([name, "b.png"])
    out.texts(["", ""])
    out.numbers(np.zeros(2, np.uint64))
    out.signed(np.zeros(2, np.int64))
    with pytest.raises(DataError, match="names: expected the path of a file within a folder"):
        restore(schema, original.head, [(x, condition, out.content())]).write(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


# --------------------------------------------------------------------------------------------------------------
# Text and sequences
# --------------------------------------------------------------------------------------------------------------


def test_text_comes_back_for_nothing(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(_RNG.integers(0, 256, 1000).astype(np.uint8)))
    schema = infer_schema(path, length=64)
    original, parts = assert_bytes(schema, path, 5)
    assert original.n == 16 and {side for _, _, side in parts} == {b""}
    _, restored, parts = there_and_back(schema, path, 5, legal=lambda x: (x < 200) | (x == 256))
    assert restored.value == path.read_bytes()


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_and_smiles(tmp_path, end):
    path, train = tmp_path / "a.smi", tmp_path / "train.smi"
    train.write_text("CCO a\nCN b\n")
    schema = infer_schema(train)
    path.write_bytes(end.join(["CCO", "CN", "CC", "", "CO"]).encode() + end.encode())
    _, parts = assert_bytes(schema, path, 2)
    assert {side for _, _, side in parts} == {b""}
    lines = [
        "CCO ethanol",
        "CCC\t propane ",
        "",
        "  CN x",
        "\ufeffC",
        "ZZ",
        "C" * 20 + " q",
        " ",
        "C\rN",
        "C\x0cN",
        "é",
    ]
    path.write_bytes(end.join(lines).encode() + b"\xff")
    assert_bytes(schema, path, 3)
    _, restored, _ = there_and_back(schema, path, 3, legal=lambda x: x != 0)
    assert restored.value == path.read_bytes()


def test_fasta(tmp_path):
    path, train = tmp_path / "a.fasta", tmp_path / "train.fasta"
    train.write_text(">a\nACGT\nAC\n>b\nAC\n")
    schema = infer_schema(train)
    _, parts = assert_bytes(schema, train)
    assert len(parts[0][2]) < 12
    path.write_bytes(b";junk\n>a b c\nACGT\nACGT\nAC\n>second\r\nAC\r\n>\n>x\nAC GT\n;c\nXX\n\n>y\nACGTACGTACGT\nAC")
    for step in (None, 1, 2):
        assert_bytes(schema, path, step)
    original, _, parts = there_and_back(schema, path)
    assert survives(schema, original.head, parts[0], 1, 500) > 200


def test_a_list_of_strings():
    schema = infer_schema(["ab", "ba"])
    texts = ["a", "bb", "", "zz", "a\nb", "\udc80", "abab"]
    original, restored, _ = there_and_back(schema, texts, 2)
    assert restored.value == texts and restored.digest == original.digest


# --------------------------------------------------------------------------------------------------------------
# Real data
# --------------------------------------------------------------------------------------------------------------

DATA = Path(os.environ.get("LIKELY_DATA", "nowhere"))


@pytest.mark.skipif(not DATA.exists(), reason="needs LIKELY_DATA")
@pytest.mark.parametrize(
    "train, test, most",
    [
        ("tables/adult-train.csv.gz", "tables/adult-test.csv.gz", 0),
        ("tables/diamonds.csv.gz", "tables/diamonds.csv.gz", 0),
        ("tables/titanic.csv.gz", "tables/titanic.csv.gz", 0),
        ("tables/winequality-red.csv.gz", "tables/winequality-red.csv.gz", 16),
        ("uci_tables/protein.data.csv.gz", "uci_tables/protein.data.csv.gz", 1000),
        ("text/tiny_shakespeare.txt.gz", "text/tiny_shakespeare.txt.gz", 0),
    ],
)
def test_regular_files_cost_nothing_a_row(train, test, most):
    schema = infer_schema(DATA / train)
    original, restored, parts = there_and_back(schema, DATA / test, 1 << 14)
    assert restored.value == gzip.decompress((DATA / test).read_bytes())
    assert len(original.head) < 1000 and sum(len(side) for _, _, side in parts) <= most


# --------------------------------------------------------------------------------------------------------------
# Side information
# --------------------------------------------------------------------------------------------------------------


def test_numbers_of_seven_bits_a_byte():
    values = np.array([0, 1, 127, 128, 300, 2**32, 2**63, 2**64 - 1], np.uint64)

    def one(value):
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    assert varints(values) == b"".join(one(int(v)) for v in values)
    writer = Writer()
    writer.numbers(values)
    assert Reader(writer.content(), 0).numbers(len(values)).tolist() == values.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_fields_come_back(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 3000))
    places = np.flatnonzero(rng.random(n) < rng.choice([0, 0.001, 0.1, 0.9, 1]))
    signed = rng.integers(-(2**62), 2**62, 50) >> int(rng.integers(0, 62))
    words = ["", "a", "é", "日\n", "0", "-5", "007", "\udc80"]
    texts = [words[i] for i in rng.integers(0, int(rng.integers(1, 9)), n)]
    counted = list(map(str, range(-5, n)))
    items = rng.standard_normal(7).astype(np.float32)
    writer = Writer()
    writer.places(places, n)
    writer.signed(signed)
    writer.texts(texts)
    writer.texts(counted)
    writer.items(items)
    reader = Reader(writer.content(), 10**6)
    assert reader.places(n).tolist() == places.tolist()
    assert reader.signed(50).tolist() == signed.tolist()
    assert reader.texts(n) == texts
    assert reader.texts(n + 5) == counted
    assert reader.items(7, np.dtype(np.float32)).tolist() == items.tolist()
    assert reader.done


def hostile(rng, side):
    """Side information that someone has altered."""
    out = bytearray(side)
    for _ in range(rng.randrange(1, 5)):
        place = rng.randrange(len(out) + 1)
        match rng.randrange(5):
            case 0 if out:
                out[place % len(out)] ^= 1 << rng.randrange(8)
            case 1:
                out[place:place] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
            case 2:
                del out[place : place + rng.randrange(1, 9)]
            case 3:
                out[place:place] = b"\xff" * rng.randrange(1, 12)
            case _ if out:
                out[place % len(out)] = rng.choice([0, 1, 2, 3, 127, 128, 255])
    return bytes(out)


def survives(schema, head, part, seed, trials):
    """Altered side information gives some value or a :class:`DataError`, and nothing else."""
    rng = random.Random(seed)
    x, condition, side = part
    refused = 0
    for _ in range(trials):
        try:
            put_together(schema, head, [(x, condition, hostile(rng, side))])
        except DataError:
            refused += 1
    return refused


def test_hostile_side_information_of_other_forms_is_refused():
    table = frame().astype({"whole": object})
    odd = ["a", (1, "b"), 10**20, decimal.Decimal(1), pd.Interval(0, 1), b"x", np.int8(1)]
    table["whole"] = pd.Series([*odd, *table["whole"][len(odd) :]], dtype=object)
    arrays = {"x": np.where(_RNG.random((60, 4)) < 0.1, np.inf, 1.5), "y": _RNG.choice(["a", "b"], 60)}
    clean = {**arrays, "x": _RNG.normal(size=(60, 4))}
    sources = [(frame(), table, {}), (clean, arrays, {"key": "x", "given": ["y"]}), (["ab"] * 9, ["ab", "c"] * 9, {})]
    for seed, (train, source, options) in enumerate(sources):
        schema = infer_schema(train, **options)
        original, _, parts = there_and_back(schema, source)
        assert survives(schema, original.head, parts[0], seed, 400) > 100


@pytest.mark.parametrize("seed", range(4))
def test_hostile_side_information_of_a_csv_file_is_refused(clean, tmp_path, seed):
    schema, _ = clean
    path = tmp_path / "a.csv"
    path.write_text(messy(random.Random(seed), CLEAN), newline="")
    original, _, parts = there_and_back(schema, path)
    assert survives(schema, original.head, parts[0], seed, 600) > 300


def test_more_text_than_the_original_had_is_refused(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("name,x\n" + "".join(f"n{i % 40} {'y' * 50},{i % 3}\n" for i in range(200)))
    schema = infer_schema(path, ignore=["name"])
    original, _, [(x, condition, side)] = there_and_back(schema, path)
    bomb = Writer()
    bomb.number(3)
    bomb.number(1)
    bomb.number(1)
    bomb._plain(["z" * (original.size - 1)])
    bomb.numbers(np.zeros(200, np.uint64))
    with pytest.raises(DataError, match="expected texts of at most"):
        put_together(schema, original.head, [(x, condition, bomb.content())])
    with pytest.raises(DataError, match="more than the 200 rows"):
        put_together(schema, original.head, [(x, condition, side)] * 2)


@pytest.mark.parametrize("format", ["lines", "fasta", "text"])
def test_a_damaged_head_of_sequences_is_named(tmp_path, format):
    path = tmp_path / "a.txt"
    path.write_bytes(b">one\nACGT\n>two\nAC\n" if format == "fasta" else b"etna\nita\nto\n" * 40)
    schema = infer_schema(path, format=format)
    original = take_apart(schema, path)
    rows = original.rows()
    part = (rows.x, rows.condition, rows.side)
    facts = json.loads(original.head)
    named = 0
    for name in facts:
        for value in (None, -1, [], "x", {}, [{}], 10**30):
            head = json.dumps({**facts, name: value}).encode()
            with contextlib.suppress(DataError):
                put_together(schema, head, [part])
        head = json.dumps({key: value for key, value in facts.items() if key != name}).encode()
        try:
            put_together(schema, head, [part])
        except DataError as error:
            named += "head is damaged" in str(error)
    assert named >= 2


def test_a_damaged_head_is_named(clean):
    schema, path = clean
    original = take_apart(schema, path)
    rows = original.rows()
    part = (rows.x, rows.condition, rows.side)
    facts = json.loads(original.head)
    for name in facts:
        for value in (None, -1, [], "x", {}, [{}], 10**30):
            head = json.dumps({**facts, name: value}).encode()
            with contextlib.suppress(DataError):
                put_together(schema, head, [part])
    for head in (b"", b"{", b"[]", b"\xff", original.head[:-5], b"[" * 10**5):
        with pytest.raises(DataError):
            restore(schema, head, [part])
