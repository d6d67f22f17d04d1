"""The command line: what it says, what it writes, and how it ends."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest

import likely
from documents import Outcome, adult, run, short_training, write_files
from likely import cli
from likely.data.arrays import INFER_OPTIONS as ARRAY_OPTIONS
from likely.data.tables import INFER_OPTIONS as TABLE_OPTIONS
from likely.training import TrainOptions

SMALL = ["latent_dim=2", "hidden=16", "--quiet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small files and three runs: of a table, of a table given two columns, of arrays."""
    folder = tmp_path_factory.mktemp("cli")
    write_files(folder)
    with pytest.MonkeyPatch.context() as patch, short_training(60):
        patch.chdir(folder)
        for line in (
            ["fit", "adult.csv", "--out", "table", "--test-fraction", "0.2", *SMALL],
            ["fit", "adult.csv", "--out", "given", "--given", "age,sex", *SMALL],
            ["fit", "digits", "--out", "digits", "--test-fraction", "0.1", *SMALL],
        ):
            outcome = run(*line)
            assert outcome.code == 0, outcome.errors
    return folder


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    return folder


def fails(code: int, *arguments: str, says: str) -> Outcome:
    """Run a command that must end with ``code`` and a message, and without a traceback."""
    outcome = run(*arguments)
    assert outcome.code == code, outcome.errors
    assert says in outcome.errors
    assert "Traceback" not in outcome.errors
    assert outcome.raw == b""
    return outcome


# Starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"], ["--version"], ["completion", "zsh"], ["fot"]])
def test_answers_without_importing_anything_heavy(arguments: list[str]) -> None:
    program = (
        "import sys; from likely import cli; cli.run(sys.argv[1:]); "
        "heavy = {'torch', 'numpy', 'pandas', 'scipy', 'rich', 'likely.api'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_dash_m() -> None:
    done = subprocess.run([sys.executable, "-m", "likely", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"likely {likely.__version__}\n"


def test_help_lists_the_verbs_and_every_verb_shows_examples() -> None:
    listing = run("--help").output
    for verb in cli.cli.commands:
        assert f"\n  {verb} " in listing
        text = run(verb, "--help").output
        examples = text.split("Examples:\n", 1)[1]
        assert f"likely {verb}" in examples


@pytest.mark.parametrize(("line", "expected"), [("likely ev", "evaluate"), ("likely fit x --model ga", "gaussian")])
def test_completion_of_verbs_and_models(line: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_LIKELY_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    assert run().output.splitlines() == [f"plain,{expected}"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    outcome = run("completion", shell)
    assert outcome.code == 0
    assert f"_LIKELY_COMPLETE={shell}_complete" in outcome.output


def test_flags_are_options_of_the_layers_below() -> None:
    """A flag that is passed on by its name names something that exists."""
    fit = cli.cli.commands["fit"]
    training = {p.name for p in fit.params if getattr(p, "title", "") == "How the model is trained"}
    assert training and training <= set(TrainOptions.__dataclass_fields__)
    reading = {p.name for p in fit.params if getattr(p, "title", "") == "How the data are read"} - {"more"}
    assert reading and reading <= {*TABLE_OPTIONS, *ARRAY_OPTIONS, "format"}


# Wrong usage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["evalute"], "did you mean 'evaluate'?"),
        (["fit", "iris"], "expected --out RUN"),
        (["fit", "iris", "more.csv", "--out", "x"], "expected an option as key=value"),
        (["fit", "iris", "--out", "x", "--steps", "5", "steps=6"], "steps is given twice"),
        (["fit", "iris", "--out", "x", "hidden=4", "hidden=5"], "hidden is given twice"),
        (["fit", "iris", "--out", "x", "latent_dim=many"], "latent_dim: expected a whole number, got 'many'"),
        (["fit", "iris", "--out", "x", "prior=2"], "prior: expected text"),
        (["fit", "iris", "--out", "x", "--budget", "soon"], "expected a duration such as 90s, 5m or 1h30m"),
        (["fit", "photos", "--out", "x", "--size", "axb"], "expected a size such as 32 or 32x48"),
        (["fit", "iris", "--out", "x", "--delimiter", ";", "--read", "delimiter=,"], "--delimiter is given as well"),
        (["fit", "iris", "--out", "x", "--stps", "5"], "--stps"),
        (["sample", "table"], "-n"),
        (["sample", "table", "-n", "0"], "-n"),
        (["sample", "table", "-n", "2", "--where", "age"], "--where: expected column=value, got 'age'"),
        (["completion", "tcsh"], "tcsh"),
    ],
)
def test_wrong_usage_ends_with_2(here: Path, arguments: list[str], says: str) -> None:
    fails(2, *arguments, says=says)
    assert not (here / "x").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fit", "nowhere.csv", "--out", "x"], "nowhere.csv: no such file or folder"),
        (["fit", "iris", "--out", "x", "latent_dims=4"], "did you mean 'latent_dim'?"),
        (["fit", "iris", "--out", "x", "--learning-rate", "-1"], "learning_rate: expected a positive number"),
        (["fit", "iris", "--out", "x", "--model", "gausian"], "did you mean 'gaussian'?"),
        (["fit", "adult.csv", "--out", "x", "--given", "agee"], "is 'age' meant?"),
        (["fit", "adult.csv", "--out", "x", "--read", "delimeter=,"], "delimiter"),
        (["fit", "iris", "--out", "table"], "--overwrite"),
        (["fit", "iris", "--out", "photos"], "is not empty and holds no run"),
        (["evaluate", "nowhere"], "nowhere: expected the folder of a run"),
        (["score", "table", "photos"], "photos: expected a table"),
        (["sample", "table", "-n", "2", "--where", "agee=3"], "did you mean 'age'?"),
        (["sample", "given", "-n", "2", "--where", "age=30"], "sex"),
        (["models", "gaussain"], "did you mean 'gaussian'?"),
        (["info", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_a_users_mistake_ends_with_1_and_one_message(here: Path, arguments: list[str], says: str) -> None:
    outcome = fails(1, *arguments, says=says)
    assert outcome.errors.startswith("likely: error: ") and outcome.errors.count("\n") == 1
    assert not (here / "x").exists()


def test_debug_shows_the_traceback(here: Path) -> None:
    outcome = run("evaluate", "nowhere", "--debug")
    assert outcome.code == 1
    assert "Traceback" in outcome.errors


def test_a_fault_of_ours_shows_the_traceback_and_says_so(here: Path) -> None:
    with mock.patch("likely.api.load", side_effect=KeyError("x")):
        outcome = run("evaluate", "table")
    assert outcome.code == 1
    assert "Traceback" in outcome.errors and "a fault of likely" in outcome.errors


def test_a_full_disk_is_one_message(here: Path) -> None:
    with mock.patch("likely.api.Fitted.write_samples", side_effect=OSError(28, "No space left on device", "s.csv")):
        fails(1, "sample", "table", "-n", "3", "-o", "s.csv", says="No space left on device: 's.csv'")


def test_a_closed_pipe_ends_quietly(here: Path) -> None:
    with mock.patch("likely.api.Fitted.write_samples", side_effect=BrokenPipeError()):
        outcome = run("sample", "table", "-n", "3")
    assert outcome.code == 1
    assert outcome.errors == ""


def test_arrays_are_kept_off_a_terminal(here: Path) -> None:
    outcome = run("sample", "digits", "-n", "3", terminal=True)
    assert outcome.code == 2 and "expected -o FILE" in outcome.errors and outcome.raw == b""
    assert run("sample", "digits", "-n", "3").raw.startswith(b"\x93NUMPY")
    assert run("sample", "table", "-n", "3", terminal=True).code == 0


# Verbs ------------------------------------------------------------------------------------------------------------


def test_fit_keeps_what_was_asked_for(here: Path) -> None:
    fitted = likely.load("table")
    assert fitted.info()["options"]["hidden"] == [16]
    assert fitted.info()["examples"] == {"all": 200, "train": 140, "valid": 20, "test": 40}
    assert [c.name for c in likely.load("given").schema.condition_space.columns] == ["age", "sex"]  # type: ignore[union-attr]


def test_fit_reports_on_standard_error_and_concludes_on_standard_output(here: Path, tmp_path: Path) -> None:
    outcome = run("fit", "adult.csv", "--out", tmp_path / "g", "--model", "gaussian")
    assert outcome.output.count("\n") == 1
    assert "bits/row" in outcome.output and "lower bound" in outcome.output
    assert "next: likely evaluate" in outcome.errors
    quiet = run("fit", "adult.csv", "--out", tmp_path / "g", "--model", "gaussian", "--overwrite", "--json", "--quiet")
    assert json.loads(quiet.output)["model"] == "gaussian"


def test_show_writes_a_schema_that_can_be_edited(here: Path, tmp_path: Path) -> None:
    file = tmp_path / "adult.toml"
    outcome = run("fit", "adult.csv", "--show", file)
    assert outcome.code == 0 and "hours-per-week" in outcome.output
    fails(1, "fit", "adult.csv", "--show", str(file), says="--overwrite")
    text = file.read_text(encoding="utf-8")
    assert run("fit", "adult.csv", "--show", "-").output == text
    edited = text.replace('name = "fnlwgt"', 'name = "fnlwgt"\nrole = "ignore"').replace(
        'role = "ignore"\nrole = "model"', 'role = "ignore"'
    )
    file.write_text(edited, encoding="utf-8")
    outcome = run("fit", "adult.csv", "--schema", file, "--out", tmp_path / "run", "--model", "independent", "--quiet")
    assert outcome.code == 0, outcome.errors
    names = [c.name for c in likely.load(tmp_path / "run").schema.space.columns]  # type: ignore[attr-defined]
    assert names == [name for name in adult(2, 0).columns if name != "fnlwgt"]


def test_fit_from_standard_input_equals_fit_from_the_file(here: Path, tmp_path: Path) -> None:
    for name, source, stdin in (("file", "data.csv", b""), ("pipe", "-", Path("data.csv").read_bytes())):
        outcome = run("fit", source, "--out", tmp_path / name, "--model", "gaussian", "--quiet", stdin=stdin)
        assert outcome.code == 0, outcome.errors
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("file", "pipe")]
    assert weights[0] == weights[1]


def test_evaluate(here: Path) -> None:
    expected = likely.load("table").evaluate("adult_test.csv", samples=5, seed=3).to_json()
    outcome = run("evaluate", "table", "adult_test.csv", "--samples", "5", "--seed", "3", "--json")
    assert json.loads(outcome.output) == expected
    text = run("evaluate", "table", "adult_test.csv", "--no-baselines", "--no-codecs", "--batch-size", "7").output
    assert "60 held-out rows" in text and "independent" not in text and "xz" not in text


def test_score(here: Path) -> None:
    outcome = run("score", "table", "new.csv")
    frame = pd.read_csv(io.StringIO(outcome.output))
    fitted = likely.load("table")
    np.testing.assert_allclose(frame["nats"], fitted.score_samples("new.csv"), rtol=1e-12)
    np.testing.assert_allclose(frame["bits"], -frame["nats"] / np.log(2), rtol=1e-12)
    cells = [f"nats:{name}" for name in adult(2, 0).columns]
    assert list(frame.columns) == [
        "nats",
        "bits",
        "kind",
        "tail_probability",
        "training_rank",
        "anomaly",
        "anomaly_probability",
        "unlikely_because",
        *cells,
    ]
    assert (frame["kind"] == "lower bound").all() and frame["tail_probability"].between(0, 1).all()
    piped = run("score", "table", "-", stdin=Path("new.csv").read_bytes())
    assert piped.output == outcome.output
    records = json.loads(run("score", "table", "new.csv", "--no-columns", "--json").output)
    assert list(records[0]) == list(frame.columns[:7])
    np.testing.assert_allclose([record["nats"] for record in records], frame["nats"], rtol=1e-12)


def test_score_reads_a_file_that_is_written_otherwise(here: Path, tmp_path: Path) -> None:
    adult(40, 2).to_csv(tmp_path / "other.csv", index=False, sep=";", encoding="utf-16")
    same = run("score", "table", tmp_path / "other.csv", "--delimiter", ";", "--encoding", "utf-16")
    assert same.output == run("score", "table", "new.csv").output, same.errors


def test_outputs_by_suffix(here: Path, tmp_path: Path) -> None:
    text = run("score", "table", "new.csv").output
    for name in ("s.csv", "s.csv.gz"):
        assert run("score", "table", "new.csv", "-o", tmp_path / name).code == 0
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / name), pd.read_csv(io.StringIO(text)))
    run("score", "table", "new.csv", "-o", tmp_path / "s.parquet")
    frame = pd.read_parquet(tmp_path / "s.parquet")
    np.testing.assert_array_equal(frame["nats"], likely.load("table").score_samples("new.csv"))


def test_sample_is_seeded_and_has_the_form_of_the_data(here: Path, tmp_path: Path) -> None:
    first = run("sample", "table", "-n", "20", "--seed", "4")
    assert first.raw == run("sample", "table", "-n", "20", "--seed", "4").raw
    assert first.raw != run("sample", "table", "-n", "20", "--seed", "5").raw
    run("sample", "table", "-n", "20", "--seed", "4", "-o", tmp_path / "s.csv")
    assert (tmp_path / "s.csv").read_bytes() == first.raw
    assert first.output.splitlines()[0] == Path("adult.csv").read_text().splitlines()[0]
    assert run("score", "table", "-", stdin=first.raw).code == 0
    run("sample", "digits", "-n", "4", "-o", tmp_path / "d.npy")
    digits = np.load(tmp_path / "d.npy")
    assert digits.shape == (4, 8, 8) and digits.min() >= 0 and digits.max() <= 16


def test_sample_where(here: Path) -> None:
    conditional = run("sample", "given", "-n", "8", "--where", "age=30", "--where", "sex=Female")
    frame = pd.read_csv(io.StringIO(conditional.output))
    assert len(frame) == 8 and (frame["age"] == 30).all() and (frame["sex"] == "Female").all()
    fixed = pd.read_csv(io.StringIO(run("sample", "table", "-n", "8", "--where", "education=Masters").output))
    assert len(fixed) == 8 and (fixed["education"] == "Masters").all()


def test_impute_fills_holes_and_leaves_the_rest(here: Path, tmp_path: Path) -> None:
    holes = pd.read_csv("holes.csv", dtype=str)
    outcome = run("impute", "table", "holes.csv")
    filled = pd.read_csv(io.StringIO(outcome.output), dtype=str)
    known = holes != "?"
    assert (filled.where(known, "") == holes.where(known, "")).all().all()
    assert not (filled == "?").any().any() and not filled.isna().any().any()
    assert run("impute", "table", "-", stdin=Path("holes.csv").read_bytes()).raw == outcome.raw
    several = run("impute", "table", "holes.csv", "--draws", "3", "-o", tmp_path / "filled.csv")
    files = [tmp_path / f"filled-{k}.csv" for k in (1, 2, 3)]
    assert several.code == 0 and all(file.exists() for file in files)
    assert len({file.read_text() for file in files}) > 1
    fails(1, "impute", "table", "holes.csv", "--draws", "3", says="file")


def test_transform(here: Path, tmp_path: Path) -> None:
    expected = likely.load("table").transform("new.csv")
    frame = pd.read_csv(io.StringIO(run("transform", "table", "new.csv").output))
    assert list(frame.columns) == ["z1", "z2"]
    np.testing.assert_allclose(frame.to_numpy(), expected, rtol=1e-6)
    run("transform", "table", "new.csv", "-o", tmp_path / "z.npy")
    np.testing.assert_array_equal(np.load(tmp_path / "z.npy"), expected)
    run("transform", "table", "new.csv", "-o", tmp_path / "z.npz")
    np.testing.assert_array_equal(np.load(tmp_path / "z.npz")["z"], expected)


def test_report(here: Path, tmp_path: Path) -> None:
    outcome = run("report", "table", "-o", tmp_path / "report.html")
    assert outcome.code == 0, outcome.errors
    assert (tmp_path / "report.html").read_text(encoding="utf-8").lstrip().lower().startswith("<!doctype html>")


def test_models(here: Path) -> None:
    text = run("models").output
    assert all(name in text for name in likely.models.names())
    record = json.loads(run("models", "vae", "--json").output)
    options = {option["name"]: option for option in record["options"]}
    default = likely.models.find("vae")(likely.load("digits").schema.space).config
    assert {name: option["default"] for name, option in options.items()} == default
    assert all(option["help"] for option in record["options"])
    training = json.loads(run("models", "training", "--json").output)["options"]
    assert {option["name"] for option in training} == set(TrainOptions.__dataclass_fields__) - {"seed"}
    assert all(option["help"] for option in training)
    assert {option["name"]: option["default"] for option in training}["optimizer_options"] == {}


def test_info_of_a_run_and_of_data(here: Path) -> None:
    assert json.loads(run("info", "table", "--json").output) == json.loads(json.dumps(likely.load("table").info()))
    assert "140 train, 20 valid, 40 test" in run("info", "table").output
    described = run("info", "adult.csv", "--ignore", "fnlwgt,age").output
    assert "5 modelled, 2 set aside" in described
    assert json.loads(run("info", "adult.csv", "--json").output)["form"] == "table"


# Interruptions ----------------------------------------------------------------------------------------------------


def test_an_interrupted_fit_is_resumed_to_the_same_bits(here: Path, tmp_path: Path) -> None:
    from likely import api

    whole_train = api.train

    class Interrupt:
        def on_step(self, run: object) -> None:
            if run.step == 7:  # type: ignore[attr-defined]
                signal.raise_signal(signal.SIGINT)

    def interrupted(*arguments: object, **more: object) -> object:
        return whole_train(*arguments, **{**more, "callbacks": [Interrupt()]})  # type: ignore[arg-type]

    line = ["fit", "adult.csv", "--steps", "20", "evaluate_every=10", *SMALL, "--out"]
    assert run(*line, tmp_path / "whole").code == 0
    with mock.patch.object(api, "train", interrupted):
        outcome = run(*line, tmp_path / "parts")
    assert outcome.code == 130
    assert f"likely resume {tmp_path / 'parts'}" in outcome.errors and "Traceback" not in outcome.errors
    assert "not trained to its end" in run("evaluate", tmp_path / "parts", "adult_test.csv").errors
    assert "not finished" in run("info", tmp_path / "parts").output
    resumed = run("resume", tmp_path / "parts", "--quiet")
    assert resumed.code == 0, resumed.errors
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]


def test_a_diverged_fit_ends_with_3(here: Path, tmp_path: Path) -> None:
    outcome = run("fit", "adult.csv", "--out", tmp_path / "x", "--steps", "30", "--learning-rate", "1e30", *SMALL)
    assert outcome.code == 3
    assert "training stopped at step" in outcome.errors and "Traceback" not in outcome.errors


WITHOUT_PANDAS = """
import sys
sys.modules.update(dict.fromkeys(["pandas", "pyarrow"]))  # as if they were not installed
from likely.cli import main
main()
"""


def test_a_csv_file_needs_no_pandas_but_to_become_a_dataframe(tmp_path: Path) -> None:
    table = "\n".join(["a,b", *(f"{i % 7},{'xyz'[i % 3]}" for i in range(60))]) + "\n"
    (tmp_path / "t.csv").write_text(table, encoding="utf-8")

    def ends(words: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_PANDAS, *words.split()], cwd=tmp_path, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    assert ends("fit t.csv --model independent --out run")[0] == 0
    code, said = ends("evaluate run")
    assert code == 0 and "Parquet + zstd" in said, said
    assert ends("sample run -n 3 -o drawn.csv")[0] == 0
    assert ends("compress run t.csv -o t.lk")[0] == 0 and ends("decompress t.lk -o again.csv --run run")[0] == 0
    assert (tmp_path / "again.csv").read_text(encoding="utf-8") == table
    code, said = ends("score run t.csv")
    assert code == 1 and "a table of scores needs an optional part: pip install 'likely[tables]'" in said
