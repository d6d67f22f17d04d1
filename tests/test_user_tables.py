"""Tables as users have them: every kind of column in, the same schema out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import likely
from documents import run
from likely.contract import Column, Table
from likely.data import infer_schema
from likely.data.columns import Dress
from likely.data.constraints import find_constraints
from likely.data.weights import weighted_rows

N = 240


@pytest.fixture
def table() -> pd.DataFrame:
    """One column of each kind."""
    rng = np.random.default_rng(0)
    day = pd.Timestamp("2024-01-01")
    spiked = np.where(rng.random(N) < 0.4, 0.0, np.round(rng.lognormal(3, 2, N), 2))
    frame = pd.DataFrame(
        {
            "code": rng.choice(["0311", "0042", "1200"], N),
            "age": rng.integers(0, 90, N),
            "born": [f"{day + pd.Timedelta(days=int(d)):%Y-%m-%d}" for d in rng.integers(0, 300, N)],
            "at": [f"{day + pd.Timedelta(minutes=int(m)):%Y-%m-%d %H:%M}" for m in rng.integers(0, 9999, N)],
            "price": [f"{v:.2f}" for v in rng.uniform(0, 50, N)],
            "pay": [f"${v:,.2f}" for v in rng.lognormal(8, 1, N)],
            "share": [f"{v:.1f}%" for v in rng.uniform(0, 100, N)],
            "smoker": rng.choice(["yes", "no"], N),
            "flag": rng.choice(["TRUE", "FALSE"], N),
            "spend": [f"{v:.2f}" for v in spiked],
            "constant": "same",
            "odd name, with commas": rng.choice(["a", 'b "quoted"', "c;d"], N),
        }
    )
    frame.insert(3, "7", rng.choice(["x", "y"], N))
    return frame


def test_csv_comes_back_as_it_was_spelled(table: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    table.to_csv(file, index=False, lineterminator="\n")
    schema = infer_schema(file)
    kinds = {column.name: column.kind for column in schema.form.columns}
    assert kinds["code"] == "categorical"
    assert kinds["pay"] == kinds["share"] == kinds["price"] == kinds["spend"] == "real"
    assert kinds["smoker"] == kinds["flag"] == "binary"
    schema.write(schema.read(file).x, tmp_path / "again.csv")
    assert (tmp_path / "again.csv").read_bytes() == file.read_bytes()
    x = schema.read(file).x
    names = [column.name for column in schema.space.columns]
    expected = table["pay"].str.replace("[$,]", "", regex=True).astype(float)
    np.testing.assert_array_equal(x[:, names.index("pay")].numpy(), expected)


def test_samples_have_the_schema_of_the_table(table: pd.DataFrame, tmp_path: Path) -> None:
    file = tmp_path / "table.csv"
    table.to_csv(file, index=False, lineterminator="\n")
    fitted = likely.fit(file, "mixture", components=2, progress=False)
    fitted.write_samples(tmp_path / "drawn.csv", 200, seed=1)
    drawn = pd.read_csv(tmp_path / "drawn.csv", dtype=str)
    assert list(drawn.columns) == list(table.columns)
    for name in ("code", "7", "smoker", "flag", "constant", "odd name, with commas"):
        assert set(drawn[name]) <= set(table[name]), name
    assert drawn["pay"].str.fullmatch(r"-?\$\d{1,3}(,\d{3})*\.\d\d").all()
    assert drawn["share"].str.fullmatch(r"-?\d+\.\d%").all()
    assert drawn["price"].str.fullmatch(r"-?\d+\.\d\d").all()
    assert drawn["born"].str.fullmatch(r"\d{4}-\d\d-\d\d").all()
    assert drawn["at"].str.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d").all()
    assert abs((drawn["spend"].astype(float) == 0).mean() - 0.4) < 0.15


def test_frames_keep_dtypes_labels_and_order() -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            3: rng.integers(0, 9, N).astype("int16"),
            "size": pd.Categorical(rng.choice(["S", "M", "L"], N), ["S", "M", "L"], ordered=True),
            0: rng.choice([True, False], N),
            "when": pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 99, N), "D"),
            "single": np.round(rng.normal(size=N), 1).astype("float32"),
            "fee": [f"{v:.2f} €" for v in rng.uniform(1, 9, N)],
        }
    )
    frame.columns = [3, "size", 0, "when", "size", "fee"]
    fitted = likely.fit(frame, "independent", progress=False)
    drawn = fitted.sample(50)
    assert list(drawn.columns) == list(frame.columns)
    assert list(drawn.dtypes) == list(frame.dtypes)
    assert drawn["fee"].str.fullmatch(r"-?\d+\.\d\d €").all()
    holes = frame.copy()
    holes.isetitem(5, holes["fee"].mask(np.arange(N) < 5))
    filled = fitted.impute(holes)
    assert list(filled.dtypes) == list(frame.dtypes)
    assert filled["fee"].str.fullmatch(r"-?\d+\.\d\d €").all()
    pd.testing.assert_frame_equal(filled.iloc[5:], frame.iloc[5:])


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("bins", [[-5.0, -0.25, 0.5, 5.0], [-5, 0, 5]])
def test_intervals_come_back_as_intervals(bins: list[float], right: bool) -> None:
    x = np.round(np.random.default_rng(0).normal(size=N), 2)
    frame = pd.DataFrame({"bin": pd.cut(x, bins, right=right), "x": x})
    drawn = infer_schema(frame).to_user(infer_schema(frame).read(frame).x)
    pd.testing.assert_series_equal(drawn["bin"], frame["bin"])


@pytest.mark.parametrize(
    ("cell", "comma", "plain"),
    [
        ("$5", False, "5"),
        ("-$1,234.50", False, "-1234.50"),
        ("12.5%", False, "12.5"),
        ("12,5 %", True, "12.5"),
        ("1.234,50 €", True, "1234.50"),
        ("£0.99", False, "0.99"),
    ],
)
def test_dressed_numbers(cell: str, comma: bool, plain: str) -> None:
    found = Dress.of(cell, comma)
    assert found is not None
    assert found[1] == plain
    again = found[0].put_on(plain)
    assert (again.replace(".", ",") if comma and not found[0].thousands else again) == cell


@pytest.mark.parametrize("cell", ["5", "$", "$1,23", "5 kg", "$007", "1,2,3%", "$1.2.3", "50%%", "$1234,567"])
def test_what_is_no_dressed_number(cell: str) -> None:
    assert Dress.of(cell) is None


def test_a_column_that_mixes_dresses_is_text(tmp_path: Path) -> None:
    file = tmp_path / "mixed.csv"
    file.write_text("a,b\n" + "".join(f"{'$' if i % 2 else '€'}{i % 7}.50,{i % 3}\n" for i in range(60)))
    assert infer_schema(file).form.columns[0].kind == "categorical"


def test_another_dress_later_is_refused(table: pd.DataFrame, tmp_path: Path) -> None:
    schema = infer_schema(table[["pay", "age"]])
    wrong = table[["pay", "age"]].head(3).copy()
    wrong.loc[1, "pay"] = "€5.00"
    with pytest.raises(ValueError, match=r"row 1.*'pay'.*expected a number, got '€5.00'"):
        schema.read(wrong)


def test_column_of_many_levels_takes_memory_in_proportion() -> None:
    """Most of the levels are seen once; nothing of size levels × levels, or levels × rows, is made."""
    rng = np.random.default_rng(0)
    user = np.concatenate([np.arange(30_000), rng.integers(0, 30_000, 2_000)])
    frame = pd.DataFrame({"user": [f"u{i:06d}" for i in user], "n": rng.integers(0, 5, len(user))})
    schema = infer_schema(frame, keep=["user"])
    assert schema.space.columns[0].levels == 30_000
    fitted = likely.fit(frame, "mixture", schema=schema, components=2, passes=1, restarts=1, progress=False)
    assert sum(tensor.numel() for tensor in fitted.model.state_dict().values()) < 4 * 30_000
    drawn = fitted.sample(20)
    assert drawn["user"].str.fullmatch(r"u\d{6}").all()


# Constraints ----------------------------------------------------------------------------------------------------------


def _rules(frame: pd.DataFrame) -> set[str]:
    schema = infer_schema(frame)
    return {str(rule) for rule in find_constraints(schema.read(frame).x, schema.space)}


def test_constraints_are_found_and_chance_is_not() -> None:
    rng = np.random.default_rng(0)
    start, length = rng.integers(0, 50, N), rng.integers(0, 30, N)
    town = rng.choice(["Ulm", "Bonn", "Lyon", "Nice"], N)
    frame = pd.DataFrame(
        {
            "start": start,
            "end": start + length,
            "length": length,
            "net": np.round(rng.uniform(0, 9, N), 2),
            "tax": np.round(rng.uniform(0, 2, N), 2),
            "town": town,
            "country": np.where(np.isin(town, ["Ulm", "Bonn"]), "DE", "FR"),
            "other": rng.integers(0, 60, N),
        }
    )
    frame["gross"] = np.round(frame["net"] + frame["tax"], 2)
    rules = _rules(frame)
    assert {"start <= end", "end = start + length", "gross = net + tax", "town -> country", "net <= gross"} <= rules
    assert not any("other" in rule for rule in rules)
    assert "country -> town" not in rules
    assert _rules(frame.drop(columns=["gross", "end", "country"])) == set()


def test_rows_that_break_a_rule_are_named(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    start = rng.integers(0, 50, N)
    frame = pd.DataFrame({"start": start, "end": start + rng.integers(0, 30, N), "x": rng.integers(0, 9, N)})
    fitted = likely.fit(frame, "independent", out=tmp_path / "run", progress=False)
    odd = frame.head(20).copy()
    odd.loc[[3, 7], "start"] = odd["end"] + 1
    assert fitted.broken_constraints(odd) == {"start <= end": [3, 7]}
    assert likely.load(tmp_path / "run").broken_constraints(frame) == {}
    outcome = run("sample", str(tmp_path / "run"), "-n", "100", "-o", str(tmp_path / "drawn.csv"))
    drawn = pd.read_csv(tmp_path / "drawn.csv")
    wrong = (drawn["start"] > drawn["end"]).sum()
    assert wrong > 0
    assert f"{wrong} of 100 rows break start <= end" in outcome.errors


def test_missing_cells_break_nothing() -> None:
    space = Table(columns=(Column("a", "integer", missing=True), Column("b", "integer")))
    a = torch.arange(100.0).double() % 23
    x = torch.stack([a, a + 1], 1)
    x[::5, 0] = torch.nan
    (rule,) = find_constraints(x, space)
    assert str(rule) == "a <= b"
    assert rule.broken(x, space).tolist() == []


# Weights --------------------------------------------------------------------------------------------------------------


def test_whole_weights_are_repetitions() -> None:
    weights = torch.tensor([2.0, 1.0, 0.0, 4.0])
    expected = np.repeat(np.arange(4), [2, 1, 0, 4])
    assert np.array_equal(weighted_rows(weights).numpy(), expected)
    assert np.array_equal(weighted_rows(weights * 0.1).numpy(), expected)


def test_any_weights_within_one_of_what_is_due() -> None:
    weights = torch.from_numpy(np.random.default_rng(0).lognormal(0, 2, 500))
    rows = weighted_rows(weights)
    due = weights * (len(rows) / weights.sum())
    assert len(rows) == 5000
    assert (torch.bincount(rows, minlength=500) - due).abs().max() < 1


def test_weighted_fit_is_the_fit_of_repeated_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.choice(["a", "b", "c"], N, p=[0.6, 0.3, 0.1]), "y": rng.integers(0, 9, N)})
    frame["w"] = np.where(frame["x"] == "c", 5, 1)
    weighted = likely.fit(frame, "independent", weights="w", valid_fraction=0, progress=False)
    repeated = frame.loc[frame.index.repeat(frame["w"])].drop(columns="w").reset_index(drop=True)
    plain = likely.fit(repeated, "independent", valid_fraction=0, progress=False)
    new = frame.drop(columns="w").head(20)
    np.testing.assert_allclose(weighted.score_samples(new), plain.score_samples(new), rtol=1e-6)
    by_hand = np.average(weighted.score_samples(frame), weights=frame["w"])
    evaluation = weighted.evaluate(frame, weights="w", baselines=False, classic=False)
    assert evaluation.held_out.nats == pytest.approx(by_hand)
    assert "w" not in [column.name for column in weighted.schema.space.columns]


@pytest.mark.parametrize(("bad", "message"), [(-1.0, "from 0 up"), (np.nan, "expected a value")])
def test_bad_weights_are_refused(bad: float, message: str) -> None:
    frame = pd.DataFrame({"x": np.arange(30) % 4, "w": np.linspace(0.5, 1, 30)})
    frame.loc[4, "w"] = bad
    with pytest.raises(ValueError, match=message):
        likely.fit(frame, "independent", weights="w", progress=False)
    with pytest.raises(ValueError, match="is 'w' meant"):
        likely.fit(frame, "independent", weights="ww", progress=False)
