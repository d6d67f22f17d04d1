"""CSV as it comes: what is detected, what is refused with which message, and that a file is written as it was read."""

import bz2
import gzip
import io
import lzma
import sys
import types

import numpy as np
import pytest
import torch

from likely.contract import Table
from likely.data import DataError, Schema, infer_schema

zstandard = pytest.importorskip("zstandard")

PLAIN = "age,town,income\n31,Ulm,1.50\n44,Bonn,2.25\n27,Ulm,3.00\n58,Jena,0.75\n"


def columns(schema):
    return {c.name: c for c in schema.form.columns}


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


def test_a_plain_file(tmp_path):
    schema = infer_schema(write(tmp_path / "a.csv", PLAIN))
    found = columns(schema)
    assert [c.kind for c in found.values()] == ["integer", "categorical", "real"]
    assert found["income"].resolution == 0.01 and found["income"].decimals == (2, 2)
    assert found["town"].categories == ("Bonn", "Jena", "Ulm")
    data = schema.read(tmp_path / "a.csv")
    expected = [[31, 2, 1.5], [44, 0, 2.25], [27, 2, 3.0], [58, 1, 0.75]]
    assert data.x.dtype == torch.float64 and data.x.tolist() == expected
    data.space.validate(data.x)


@pytest.mark.parametrize(
    "compress",
    [gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress],
    ids=["gzip", "bz2", "lzma", "zstd"],
)
def test_compression_is_known_by_content_whatever_the_name(tmp_path, compress):
    (tmp_path / "a.csv").write_bytes(compress(PLAIN.encode()))
    assert infer_schema(tmp_path / "a.csv").read(tmp_path / "a.csv").x.shape == (4, 3)


def test_a_zstd_file_of_several_frames(tmp_path):
    rows = "".join(f"{i},Ulm,1.50\n" for i in range(50_000))
    frames = [zstandard.ZstdCompressor().compress(text.encode()) for text in (PLAIN, rows)]
    (tmp_path / "a.csv.zst").write_bytes(b"".join(frames))
    assert len(infer_schema(tmp_path / "a.csv.zst").read(tmp_path / "a.csv.zst")) == 50_004


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst"])
def test_output_is_compressed_by_suffix(tmp_path, suffix):
    schema = infer_schema(write(tmp_path / "a.csv", PLAIN))
    target = tmp_path / f"b.csv.{suffix}"
    schema.write(schema.read(tmp_path / "a.csv").x, target)
    assert target.read_bytes()[:3] != b"age"
    assert torch.equal(schema.read(target).x, schema.read(tmp_path / "a.csv").x)


@pytest.mark.parametrize(
    "text, delimiter",
    [
        ("a;b\n1;x\n2;y\n3;x\n", ";"),
        ("a\tb\n1\tx\n2\ty\n3\tx\n", "\t"),
        ("a|b\n1|x\n2|y\n3|x\n", "|"),
        ("  1.5   2 x\n  2.5  13 y\n 12.0   1 x\n", " "),
        ("a\n1\n2\n3\n", ","),
        ("a,b\n1,x y\n2,y z\n3,x y\n", ","),
        ('a;b\n1;"x,y,z"\n2;"y,z,x"\n3;"x,y,z"\n', ";"),
    ],
)
def test_delimiters(tmp_path, text, delimiter):
    assert infer_schema(write(tmp_path / "a.csv", text)).form.dialect.delimiter == delimiter


@pytest.mark.parametrize("encoding, found", [("utf-8", "utf-8"), ("utf-8-sig", "utf-8-sig"), ("utf-16", "utf-16"),
                                             ("utf-16-le", "utf-16-le"), ("cp1252", "cp1252")])  # fmt: skip
def test_encodings(tmp_path, encoding, found):
    text = "größe,stadt\n1,Köln\n2,Zürich\n3,Köln\n"
    schema = infer_schema(write(tmp_path / "a.csv", text, encoding))
    assert schema.form.dialect.encoding == found
    assert columns(schema)["stadt"].categories == ("Köln", "Zürich")
    assert list(columns(schema)) == ["größe", "stadt"]
    schema.write(schema.read(tmp_path / "a.csv").x, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_bytes() == text.encode(encoding)


def test_bytes_that_no_encoding_but_latin_1_has(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,\x81\xe4\n2,y\n3,y\n")
    schema = infer_schema(tmp_path / "a.csv")
    assert schema.form.dialect.encoding == "latin-1"
    assert "not UTF-8" in schema.describe()


def test_a_byte_that_is_not_of_the_encoding_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes("a,b\n1,x\n2,Köln\n".encode("cp1252"))
    with pytest.raises(DataError, match=r"a\.csv, line \d: expected text in utf-8, got the byte 0xf6"):
        infer_schema(tmp_path / "a.csv", encoding="utf-8")


@pytest.mark.parametrize(
    "text, header",
    [
        ("a,b\n1,2\n3,4\n", True),
        ("1,2\n3,4\n5,6\n", False),
        ("x,1\ny,2\nx,3\n", False),
        ("kind,town\nx,Ulm\ny,Bonn\nx,Ulm\n", True),
        ("x,Ulm\ny,Bonn\nx,Ulm\n", False),
        ("2019,2020\n1,2\n3,4\n", False),  # names that are numbers have to be announced
        ("n\n1\n2\n", True),
        ("a,b\n?,1\n1,2\n", True),
    ],
)
def test_headers(tmp_path, text, header):
    schema = infer_schema(write(tmp_path / "a.csv", text))
    assert schema.form.dialect.header is header
    rows = text.count("\n") - header
    assert len(schema.read(tmp_path / "a.csv")) == rows


def test_header_and_names_can_be_said(tmp_path):
    path = write(tmp_path / "a.csv", "2019,2020\n1,2\n3,4\n")
    assert [c.name for c in infer_schema(path, header=True).form.columns] == ["2019", "2020"]
    named = infer_schema(path, names=["p", "q"])
    assert list(columns(named)) == ["p", "q"] and len(named.read(path)) == 3
    with pytest.raises(DataError, match="names: expected 2 column names, got 1"):
        infer_schema(path, names=["p"])


def test_decimal_commas(tmp_path):
    path = write(tmp_path / "a.csv", "x;y\n1,5;-0,25\n2,5;10,75\n3,0;0,00\n")
    schema = infer_schema(path)
    assert schema.form.dialect.decimal == ","
    assert schema.read(path).x.tolist() == [[1.5, -0.25], [2.5, 10.75], [3.0, 0.0]]
    schema.write(schema.read(path).x, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == path.read_text()


def test_a_doubtful_comma_is_left_and_noted(tmp_path):
    path = write(tmp_path / "a.csv", "x;y\n1,500;a\n2,250;b\n3,125;a\n")
    schema = infer_schema(path)
    assert schema.form.dialect.decimal == "." and "decimal comma or a thousands separator" in schema.describe()
    assert columns(infer_schema(path, decimal=","))["x"].kind == "real"


def test_blanks_after_commas(tmp_path):
    text = "a, b, c\n1, x y, 2\n3, z, 4\n5, z, 6\n"
    schema = infer_schema(write(tmp_path / "a.csv", text))
    assert schema.form.dialect.blanks and columns(schema)["b"].categories == ("x y", "z")
    schema.write(schema.read(tmp_path / "a.csv").x, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == text


@pytest.mark.parametrize("spelling", ["", "?", "NA", "N/A", "NaN", "null", "<NA>"])
def test_missing_cells_in_text_and_numbers(tmp_path, spelling):
    path = write(tmp_path / "a.csv", f"a,b\n1,x\n{spelling},y\n3,{spelling}\n4,x\n")
    schema = infer_schema(path)
    assert schema.form.missing[0] == spelling
    assert all(c.missing for c in schema.form.columns)
    assert torch.isnan(schema.read(path).x).tolist() == [[False] * 2, [True, False], [False, True], [False] * 2]
    schema.write(schema.read(path).x, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == path.read_text()


def test_a_dash_is_missing_among_numbers_and_a_category_among_words(tmp_path):
    path = write(tmp_path / "a.csv", "n,strand\n1,+\n-,-\n3,+\n")
    found = columns(infer_schema(path))
    assert found["n"].missing and found["n"].kind == "integer"
    assert found["strand"].categories == ("+", "-") and "kept as a category" in found["strand"].note
    data = infer_schema(path).read(path)
    assert data.x[:, 1].tolist() == [0, 1, 0] and data.x[1, 0].isnan()
    assert columns(infer_schema(path, missing=["-"]))["strand"].missing


def test_two_spellings_of_missing_go_back_to_their_columns(tmp_path):
    text = "a,b,c\n1,x,5\n?,NA,6\n3,NA,7\n4,x,8\n"
    path = write(tmp_path / "a.csv", text)
    schema = infer_schema(path)
    schema.write(schema.read(path).x, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == text


def test_a_suffix_can_be_stripped(tmp_path):
    train = write(tmp_path / "train.csv", "a,y\n1,no\n2,yes\n3,no\n")
    test = write(tmp_path / "test.csv", "a,y\n1,no.\n2,yes.\n")
    schema = infer_schema(train)
    with pytest.raises(DataError, match=r"test\.csv, line 2, column 'y': .*got 'no\.'; pass strip_suffix='\.'"):
        schema.read(test)
    assert schema.read(test, strip_suffix=".").x.tolist() == [[1, 0], [2, 1]]
    aliased = Schema.from_toml(
        schema.to_toml().replace('name = "y"', 'name = "y"\naliases = {"no." = "no", "yes." = "yes"}')
    )
    assert aliased.read(test).x.tolist() == [[1, 0], [2, 1]]


def test_quoting_is_kept(tmp_path):
    for text in (
        '"a","b"\n1,"x, y"\n2,"say ""hi"""\n3,"z"\n',
        '"a","b"\n"1","x"\n"2","y"\n"3","x"\n',
        'a,b\n1,"x, y"\n2,z\n3,z\n',
        'a,b\r\n1,"two\nlines"\r\n2,z\r\n3,z\r\n',
    ):
        path = tmp_path / "a.csv"
        path.write_bytes(text.encode())
        schema = infer_schema(path)
        schema.write(schema.read(path).x, tmp_path / "b.csv")
        assert (tmp_path / "b.csv").read_bytes().decode() == text


def test_number_formats_come_back(tmp_path):
    text = "a,b,c,d\n1.50,3,0.1,1e-3\n2.00,4.5,12,2.5e10\n-0.25,6,7.25,3\n"
    path = write(tmp_path / "a.csv", text)
    schema = infer_schema(path)
    schema.write(schema.read(path).x, tmp_path / "b.csv")
    lines = (tmp_path / "b.csv").read_text().splitlines()
    assert [line.split(",")[:3] for line in lines] == [line.split(",")[:3] for line in text.splitlines()]
    assert [float(line.split(",")[3]) for line in lines[1:]] == [1e-3, 2.5e10, 3]


def test_numbers_near_the_least_of_float64(tmp_path):
    file = tmp_path / "small.csv"
    values = [f"{v}.25e-305" for v in range(1, 31)]
    file.write_text("a\n" + "\n".join(values) + "\n")
    schema = infer_schema(file)
    assert schema.space.columns[0].kind == "real" and schema.space.columns[0].resolution is None
    assert schema.read(file).x[:, 0].tolist() == [float(v) for v in values]


def test_empty_lines_are_no_rows_but_in_one_column_they_are_cells(tmp_path):
    two = write(tmp_path / "a.csv", "a,b\n1,2\n\n3,4\n\n")
    assert len(infer_schema(two).read(two)) == 2
    one = write(tmp_path / "b.csv", "a\n1\n\n3\n4\n\n")
    x = infer_schema(one).read(one).x
    assert torch.isnan(x[:, 0]).tolist() == [False, True, False, False]


def test_standard_input(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(PLAIN.encode())))
    schema = infer_schema("-")
    assert isinstance(schema.space, Table) and len(schema.form.columns) == 3
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(b"")))
    with pytest.raises(DataError, match="standard input: expected data, got nothing"):
        infer_schema("-")


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n3\n4,5\n", r"a\.csv, line 3: expected 2 cells as in the first line, got 1"),
        ("a,b\n", r"a\.csv: expected at least 2 rows to learn from, got 0"),
        ("a,b\n1,2\n", r"a\.csv: expected at least 2 rows to learn from, got 1"),
        ("\n\n", r"a\.csv: expected rows, got an empty file"),
        ("", r"a\.csv: expected data, got an empty file"),
        ("a,b\n1,2\ninf,3\n4,5\n", r"a\.csv, line 3, column 'a': expected a finite number, got 'inf'"),
        ("a,b\n1,2\n1e999,3\n4,5\n", r"a\.csv, line 3, column 'a': expected a finite number, got '1e999'"),
        (
            "a,b\n" + "".join(f"{i},{i}.5\n" for i in range(30)) + "12x,1.5\n",
            r"a\.csv, line 32, column 'a': expected a number as in 30 other cells, got '12x'; .*kind = \"categorical\"",
        ),
        ("a,b\n,\n,\n,\n", r"expected at least one column to model, got none"),
    ],
)
def test_files_that_cannot_be_fitted(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        infer_schema(write(tmp_path / "a.csv", text))


@pytest.mark.parametrize(
    "text, message",
    [
        ("age,town,income\n31,Ulm,1.5\nold,Ulm,1.5\n", r"new\.csv, line 3, column 'age': expected a number, got 'old'"),
        ("age,town,income\n1_0,Ulm,1.5\n", r"column 'age': expected a number, got '1_0'"),
        ("age,town,income\n31,ulm,1.5\n", r"line 2, column 'town': .* got 'ulm'; if it means 'Ulm', say aliases"),
        ("age,town,income\n31,Rome,1.5\n", r"expected one of the 3 known categories \('Bonn', 'Jena', 'Ulm'\)"),
        ("age,town,income\n31,Ulm,inf\n", r"column 'income': expected a finite number, got inf"),
        ("age,town,income\n31,Ulm,1.505\n", r"column 'income': expected a multiple of 0.01 .* got '1.505'; round it"),
        ("age,town,income\n31,,1.5\n", r"column 'town': expected a value, got a missing cell"),
        ("age,town\n31,Ulm\n", r"new\.csv: expected a column 'income', got 'age', 'town'"),
        ("age,twon,income\n31,Ulm,1.5\n", r"expected a column 'town', .*is 'twon' meant"),
        ("age,town,income,more\n31,Ulm,1.5,2\n", r"got 'more', which the fitted table does not have; .*extra='ignore'"),
        ("age;town;income\n31;Ulm;1.5\n", r"looks delimited by ';': pass delimiter=';'"),
        ("age,town,income\n", r"new\.csv: expected rows, got none"),
    ],
)
def test_new_files_that_do_not_belong(tmp_path, text, message):
    schema = infer_schema(write(tmp_path / "a.csv", PLAIN))
    with pytest.raises(DataError, match=message):
        schema.read(write(tmp_path / "new.csv", text))


def test_new_files_may_differ_where_it_is_harmless(tmp_path):
    schema = infer_schema(write(tmp_path / "a.csv", PLAIN))
    other = write(tmp_path / "b.csv", "more,income,town,age\n0,1.5,Ulm,31\n")
    assert schema.read(other, extra="ignore").x.tolist() == [[31, 2, 1.5]]
    assert schema.read(write(tmp_path / "c.csv", "age;town;income\n31;Ulm;1.5\n"), delimiter=";").x.shape == (1, 3)
    marked = write(tmp_path / "d.csv", PLAIN, "utf-8-sig")
    assert torch.equal(schema.read(marked).x, schema.read(tmp_path / "a.csv").x)


def test_unknown_options_name_the_nearest(tmp_path):
    path = write(tmp_path / "a.csv", PLAIN)
    with pytest.raises(DataError, match="has no option 'delimeter'; did you mean 'delimiter'"):
        infer_schema(path, delimeter=";")
    with pytest.raises(DataError, match="reading a table has no option 'strip_sufix'; did you mean 'strip_suffix'"):
        infer_schema(path).read(path, strip_sufix=".")
    with pytest.raises(DataError, match="no such file or folder; did you mean the embedded set 'digits'"):
        infer_schema("digit")
    with pytest.raises(DataError, match="given: expected the name of a column, got 'twon'; is 'town' meant"):
        infer_schema(path, given=["twon"])


def test_dates(tmp_path):
    text = "day,when,y\n2024-02-28,2024-01-01T00:30,1\n2024-02-29,2024-01-01T01:00,2\n1969-12-31,2024-01-01T03:30,3\n"
    path = write(tmp_path / "a.csv", text)
    schema = infer_schema(path)
    day, when, _ = schema.form.columns
    assert (day.kind, day.resolution) == ("integer", 86_400e6) and when.resolution == 1800e6
    x = schema.read(path).x
    assert x[:, 0].tolist() == [np.datetime64(d, "us").astype(int) for d in ("2024-02-28", "2024-02-29", "1969-12-31")]
    schema.write(x, tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text() == text
    with pytest.raises(
        DataError, match=r"line 2, column 'day': expected a date such as '1970-01-01', got '2023-02-29'"
    ):
        schema.read(write(tmp_path / "c.csv", "day,when,y\n2023-02-29,2024-01-01T00:30,1\n"))


def test_filling_holes_leaves_all_else_to_the_letter(tmp_path):
    text = "id,a,b,c\n" + "".join(f"k{i},{i % 7},{'x' if i % 2 else 'y'},{i / 4:.2f}\n" for i in range(40))
    schema = infer_schema(write(tmp_path / "a.csv", text), allow_missing=True)
    assert columns(schema)["id"].role == "ignore"
    holes = write(tmp_path / "b.csv", "c,id,b,a\n1.5,new,?,07\n,k9,x,NA\n")
    x = schema.read(holes).x
    assert torch.isnan(x).tolist() == [[False, True, False], [True, False, True]]
    filled = torch.where(torch.isnan(x), torch.tensor([5.0, 1.0, 0.25]).double(), x)
    schema.complete(holes, filled, tmp_path / "c.csv")
    assert (tmp_path / "c.csv").read_text() == "c,id,b,a\n1.5,new,y,07\n0.25,k9,x,5\n"
    with pytest.raises(DataError, match="expected 3 rows as there are in x, got 2"):
        schema.complete(holes, filled[[0, 1, 1]], tmp_path / "d.csv")


@pytest.mark.parametrize(
    "compress",
    [gzip.compress, bz2.compress, lzma.compress, zstandard.ZstdCompressor().compress],
    ids=["gzip", "bz2", "lzma", "zstd"],
)
def test_damaged_files_are_named(tmp_path, compress):
    whole = compress((PLAIN + "9,Ulm,1.00\n" * 20_000).encode())
    (tmp_path / "cut.csv").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.csv: damaged or cut off"):
        infer_schema(tmp_path / "cut.csv")
    for name in ("a.parquet", "a.npz", "a.npy"):
        (tmp_path / name).write_bytes(b"not what it says" * 10)
        with pytest.raises(DataError, match=rf"{name}: (damaged or cut off|not )"):
            infer_schema(tmp_path / name)
