"""What is taken apart comes back: every byte of a file, every bit and label of an object, whatever is wrong with it."""

import gzip
import hashlib
import itertools
import json
import math
import random

import numpy as np
import pytest
import torch

from likely.data import DataError, Schema, infer_schema
from likely.data.originals import restore, take_apart
from likely.data.originals.side import Reader, Writer, varints
from likely.data.originals.spelling import snap

CLEAN = "age,town,income,when\n" + "".join(
    f"{20 + i % 37},{('Ulm', 'Bonn', 'Jena')[i % 3]},{(i * 7 % 400) / 100:.2f},2024-02-{1 + i % 28:02d}\n" for i in range(90)
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
    "signs": lambda t: "\n".join(",".join("+" + c if c[:1].isdigit() and "-" not in c else c for c in line.split(","))
                                 for line in t.split("\n")),
    "one more decimal": lambda t: t.replace(",2024", "0,2024"),
    "all quoted": lambda t: "".join(",".join(f'"{c}"' for c in line.split(",")) + "\n" for line in t.splitlines()),
    "upper case": lambda t: t[: t.index("\n")] + t[t.index("\n") :].upper(),
    "full stops after towns": lambda t: t.replace("Ulm,", "Ulm.,").replace("Bonn,", "Bonn.,").replace("Jena,", "Jena.,"),
    "aligned": lambda t: "".join(",".join(f"{c:>12}" for c in line.split(",")) + "\n" for line in t.splitlines()),
    "aligned left": lambda t: t[: t.index("\n") + 1] + "".join(
        ",".join(f"{c:<12}" for c in line.split(",")) + "\n" for line in t.splitlines()[1:]
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
    "", "?", "NA", "nan", "-", "inf", "-inf", "1e400", "x", "Ulm.", "ULM", " Ulm", "Ulm ", '"Ulm"', '"Ulm', 'U"lm', '"U""lm"',
    '"a,b"', '"a\nb"', '"a\r\nb"', "1.5", "1.50", "01.5", "+1.5", ".5", "5.", "1e5", "1E+05", "1_000", "-0", "-0.0", "1.005",
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

        def cell(kind, row, rng=rng):
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
    original, parts = assert_bytes(schema, path, 25)
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

    original, restored, parts = there_and_back(schema, path, 20, legal=legal)
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
    columns = {c.name: c for c in infer_schema(_frame_like()).form.columns}
    steps = np.arange(-3000, 3000)
    assert snap(columns["c"], steps * 0.01).tolist() == [float(f"{i / 100:.2f}") + 0.0 for i in steps]


def _frame_like():
    import pandas as pd

    return pd.DataFrame({"c": [i / 100 for i in range(50)], "d": [0.5 * i for i in range(50)]})


def test_nothing_is_written_where_the_digest_differs(clean, tmp_path):
    schema, path = clean
    original, restored, _ = there_and_back(schema, path)
    with pytest.raises(DataError, match="digest"):
        restored.write(tmp_path / "out.csv", b"\0" * 16)
    assert not (tmp_path / "out.csv").exists()


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
    assert Reader(writer.bytes(), 0).numbers(len(values)).tolist() == values.tolist()


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
    reader = Reader(writer.bytes(), 10**6)
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
            restore(schema, head, [(x, condition, hostile(rng, side))]).value
        except DataError:
            refused += 1
    return refused


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
        restore(schema, original.head, [(x, condition, bomb.bytes())]).value
    with pytest.raises(DataError, match="more than the 200 rows"):
        restore(schema, original.head, [(x, condition, side)] * 2).value


def test_a_damaged_head_is_named(clean):
    schema, path = clean
    original = take_apart(schema, path)
    rows = original.rows()
    part = (rows.x, rows.condition, rows.side)
    facts = json.loads(original.head)
    for name in facts:
        for value in (None, -1, [], "x", {}, [{}], 10**30):
            head = json.dumps({**facts, name: value}).encode()
            try:
                restore(schema, head, [part]).value
            except DataError:
                pass
    for head in (b"", b"{", b"[]", b"\xff", original.head[:-5], b"[" * 10**5):
        with pytest.raises(DataError):
            restore(schema, head, [part])
