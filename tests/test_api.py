"""From the user's data to a fitted model and back, as a user would call it."""

from __future__ import annotations

import dataclasses
import inspect
import json

import numpy as np
import pandas as pd
import pytest
import torch

import likely
from likely.contract import Table, Unsupported
from likely.models import find, names
from likely.training import TrainOptions

QUICK = {"steps": 60, "hidden": (16,), "latent_dim": 2, "progress": False}


def people(n: int = 300, seed: int = 0) -> pd.DataFrame:
    """A table with dependent columns of every kind, an identifier and holes."""
    rng = np.random.default_rng(seed)
    town = rng.choice(["Bonn", "Köln", "Ulm"], n)
    age = rng.integers(18, 80, n)
    income = np.round(20_000 + 500.0 * age + 5000 * (town == "Bonn") + rng.normal(0, 3000, n), 2)
    frame = pd.DataFrame({
        "id": [f"p{i:05d}" for i in range(n)],
        "zip": np.where(town == "Bonn", "05311", np.where(town == "Ulm", "89073", "50667")),
        "town": town,
        "age": age,
        "income": income,
        "member": rng.random(n) < 0.3,
    })  # fmt: skip
    frame.loc[rng.random(n) < 0.1, "income"] = np.nan
    frame.loc[rng.random(n) < 0.1, "town"] = None
    return frame


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> likely.Fitted:
    folder = tmp_path_factory.mktemp("runs") / "people"
    return likely.fit(people(), "vae", out=folder, test_fraction=0.2, seed=1, **QUICK)


def test_a_loaded_run_says_the_same_to_the_bit(fitted: likely.Fitted) -> None:
    again = likely.load(fitted.folder)
    fresh = people(50, seed=1)
    assert np.array_equal(again.score_samples(fresh), fitted.score_samples(fresh))
    pd.testing.assert_frame_equal(again.sample(20, seed=3), fitted.sample(20, seed=3))
    assert again.record == fitted.record


def test_scores_do_not_depend_on_the_other_rows(fitted: likely.Fitted) -> None:
    fresh = people(40, seed=1)
    whole = fitted.score_samples(fresh)
    alone = np.concatenate([fitted.score_samples(fresh.iloc[[i]]) for i in (3, 17)])
    np.testing.assert_allclose(whole[[3, 17]], alone, rtol=1e-5)
    np.testing.assert_allclose(fitted.score_samples(fresh.iloc[::-1])[::-1], whole, rtol=1e-5)


def test_samples_have_the_columns_dtypes_and_spellings_of_the_data(fitted: likely.Fitted) -> None:
    sample = fitted.sample(200, seed=0)
    data = people()
    assert list(sample.columns) == list(data.columns)
    modelled = [c for c in data.columns if c != "id"]
    assert {c: str(sample[c].dtype) for c in modelled} == {c: str(data[c].dtype) for c in modelled}
    assert set(sample["zip"]) <= {"05311", "89073", "50667"}
    assert (np.round(sample["income"], 2) == sample["income"]).all()
    pd.testing.assert_frame_equal(sample, fitted.sample(200, seed=0))
    assert not sample.equals(fitted.sample(200, seed=1))


def test_fixed_cells_stay_fixed_and_the_rest_follows() -> None:
    data = people(2000)
    model = likely.fit(data, "vae", seed=0, steps=1500, hidden=(32,), latent_dim=4, hide=0.5, learning_rate=3e-3,
                       progress=False)  # fmt: skip
    drawn = model.sample(300, seed=0, where={"zip": "89073"})
    assert (drawn["zip"] == "89073").all()
    assert (drawn["town"] == "Ulm").mean() > 0.6  # a third of the rows without the condition
    with pytest.raises(ValueError, match="no column 'Zip'; did you mean 'zip'"):
        model.sample(3, where={"Zip": "89073"})
    with pytest.raises(ValueError, match="zip"):
        model.sample(3, where={"zip": "00000"})


def test_imputation_fills_holes_and_nothing_else(fitted: likely.Fitted) -> None:
    holed = people(30, seed=2)
    holed.loc[3, "age"] = np.nan  # a column that had no holes in training
    filled = fitted.impute(holed)
    assert not filled.drop(columns="id").isna().any().any()
    assert (filled["id"] == holed["id"]).all()
    known = holed.notna()
    for column in holed.columns:
        rows = known[column]
        assert (filled.loc[rows, column] == holed.loc[rows, column]).all()
    draws = fitted.impute(holed, draws=3, seed=5)
    assert len(draws) == 3
    holes = holed["income"].isna()
    assert not np.array_equal(draws[0].loc[holes, "income"], draws[1].loc[holes, "income"])


@pytest.mark.parametrize("model", [name for name in names() if Table in find(name).spaces])
def test_every_model_that_imputes_gives_best_values_and_draws(model: str) -> None:
    if not hasattr(find(model), "impute"):
        pytest.skip("it does not impute")
    steps = {} if find(model).closed_form else {"steps": 30}
    fitted = likely.fit(people(), model, **(QUICK if model == "vae" else {"progress": False, **steps}))
    holed = people(30, seed=2)
    best, draws = fitted.impute(holed), fitted.impute(holed, draws=2)
    assert len(draws) == 2
    for filled in (best, *draws):
        assert filled.shape == holed.shape
        assert not filled.isna().any().any()


def test_imputed_files_keep_what_was_there_to_the_letter(fitted: likely.Fitted, tmp_path) -> None:  # type: ignore[no-untyped-def]
    source = tmp_path / "holes.csv"
    people(30, seed=2).to_csv(source, index=False)
    files = fitted.write_imputed(source, tmp_path / "filled.csv", draws=2)
    assert [f.name for f in files] == ["filled-1.csv", "filled-2.csv"]
    before, after = (p.read_text().splitlines() for p in (source, files[0]))
    assert before[0] == after[0]
    for old, new in zip(before, after):
        for a, b in zip(old.split(","), new.split(",")):
            assert a == b if a else b


def test_the_columns_that_made_a_row_unlikely_are_named(fitted: likely.Fitted) -> None:
    odd = people(20, seed=1).dropna().iloc[:5].copy()
    odd.iloc[0, odd.columns.get_loc("income")] = 900_000.0
    scores = fitted.scores(odd)
    assert scores.nats.argmin() == 0
    assert scores.tail[0] == scores.tail.min()
    assert scores.reasons()[0].startswith("income (+")
    np.testing.assert_allclose(scores.column_nats.sum(1), scores.nats, rtol=1e-4)
    frame = scores.to_frame()
    first = ["nats", "tail_probability", "training_rank", "anomaly", "anomaly_probability", "unlikely_because"]
    assert list(frame.columns[: len(first)]) == first


def test_embeddings_are_deterministic(fitted: likely.Fitted) -> None:
    fresh = people(10, seed=4)
    first = fitted.transform(fresh)
    torch.manual_seed(123)
    assert first.shape == (10, 2)
    assert np.array_equal(first, fitted.transform(fresh))


def test_the_caller_keeps_their_random_state() -> None:
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002 - the generator under test
    expected = torch.rand(1), np.random.rand()  # noqa: NPY002
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    model = likely.fit(people(), "vae", **QUICK)
    model.sample(3)
    model.score_samples(people(5))
    assert (torch.rand(1), np.random.rand()) == expected  # noqa: NPY002


def test_the_same_seed_gives_the_same_model() -> None:
    runs = [likely.fit(people(), "vae", seed=seed, **QUICK) for seed in (0, 0, 1)]
    values = [run.score_samples(people(20, seed=3)) for run in runs]
    assert np.array_equal(values[0], values[1])
    assert not np.array_equal(values[0], values[2])


def test_a_conditional_model_needs_its_condition_and_follows_it() -> None:
    model = likely.fit(people(1500), "vae", given="town", steps=800, hidden=(32,), latent_dim=2, learning_rate=3e-3,
                       progress=False)  # fmt: skip
    drawn = {town: model.sample(300, seed=0, where={"town": town}) for town in ("Ulm", "Bonn")}
    assert (drawn["Ulm"]["town"] == "Ulm").all()
    assert (drawn["Ulm"]["zip"] == "89073").mean() > 0.8
    assert (drawn["Bonn"]["zip"] == "05311").mean() > 0.8
    with pytest.raises(ValueError, match="conditional on town; give a value to each"):
        model.sample(3)
    with pytest.raises(Unsupported, match="takes no condition; models that do"):
        likely.fit(people(), "independent", given="town", progress=False)


def test_evaluation_uses_what_the_fit_kept_aside(fitted: likely.Fitted) -> None:
    evaluation = fitted.evaluate(samples=20)
    assert evaluation.held_out.n == 60
    kept = people().iloc[fitted._data[1]["test"].numpy()]
    again = fitted.evaluate(kept, baselines=False, classic=False)
    assert again.held_out.nats == pytest.approx(evaluation.held_out.nats, rel=1e-9)
    assert evaluation.unit.name == "bits/row"
    assert {b.name for b in evaluation.baselines} == {"independent", "gaussian"}
    loaded = likely.load(fitted.folder)
    with pytest.raises(ValueError, match="data in memory"):
        loaded.evaluate()


def test_the_source_is_found_from_another_folder(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "data").mkdir()
    (tmp_path / "elsewhere").mkdir()
    people().to_csv(tmp_path / "data" / "people.csv", index=False)
    monkeypatch.chdir(tmp_path / "data")
    likely.fit("people.csv", "independent", out="../run", progress=False)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert likely.load("../run").evaluate(classic=False).held_out.n == 30
    (tmp_path / "data" / "people.csv").unlink()
    with pytest.raises(ValueError, match=r"people\.csv is not there any more"):
        likely.load("../run").evaluate()


def test_data_without_a_resolution_get_no_bits() -> None:
    x = np.random.default_rng(0).normal(size=(200, 3))
    evaluation = likely.fit(x, "gaussian", progress=False).evaluate()
    assert evaluation.unit is None
    assert "no bits" in evaluation.sentence()


def test_options_are_checked_by_name() -> None:
    with pytest.raises(ValueError, match="no option 'latent_dmi'; did you mean 'latent_dim'"):
        likely.fit("iris", "vae", latent_dmi=3)
    with pytest.raises(ValueError, match="no option 'learning_rat'; did you mean 'learning_rate'"):
        likely.fit("iris", "vae", learning_rat=3)
    with pytest.raises(ValueError, match="no model 'vea'; did you mean 'vae'"):
        likely.fit("iris", "vea")


def test_runs_are_not_overwritten_by_accident(tmp_path) -> None:  # type: ignore[no-untyped-def]
    likely.fit("iris", "gaussian", out=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="holds a run already"):
        likely.fit("iris", "gaussian", out=tmp_path / "run", progress=False)
    likely.fit("iris", "independent", out=tmp_path / "run", overwrite=True, progress=False)
    assert likely.load(tmp_path / "run").model.name() == "independent"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("do not lose me")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        likely.fit("iris", "gaussian", out=tmp_path / "other", overwrite=True, progress=False)


def test_damaged_and_foreign_runs_are_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        likely.load(tmp_path)
    folder = tmp_path / "run"
    likely.fit("iris", "gaussian", out=folder, progress=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        likely.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        likely.load(folder)


@pytest.mark.parametrize("model", names())
def test_options_of_models_and_of_training_have_names_of_their_own(model: str) -> None:
    """``likely fit`` takes both in one list."""
    own = set(inspect.signature(find(model)).parameters)
    assert not own & {field.name for field in dataclasses.fields(TrainOptions)} - {"seed"}


#: Options with which a model is quick on digits.
SMALL = {
    "glow": {"width": 8, "depth": 1},
    "masked_diffusion": {"width": 32, "layers": 1},
    "transformer": {"width": 32, "layers": 1},
    "vdm": {"network": "mlp", "network_options": {"width": 32, "depth": 1}},
}


@pytest.mark.parametrize("model", names())
def test_every_model_saves_and_loads(model: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    length = {} if find(model).closed_form else {"steps": 10}
    fitted = likely.fit("digits", model, test_fraction=0.1, progress=False, **length, **SMALL.get(model, {}))
    fitted.save(tmp_path / "run")
    again = likely.load(tmp_path / "run")
    digits = fitted.sample(10, seed=0)
    assert np.array_equal(again.score_samples(digits), fitted.score_samples(digits))
    assert not list(tmp_path.rglob("*.pkl"))
    assert not list(tmp_path.rglob("*.pt"))


def test_messages_name_the_model_behind_its_transforms(capsys: pytest.CaptureFixture[str]) -> None:
    images = torch.randint(0, 8, (60, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    fitted = likely.fit(images, "glow", steps=1, batch_size=16, progress=True)
    assert "training glow (" in capsys.readouterr().err and repr(fitted).startswith("<Fitted glow over")
