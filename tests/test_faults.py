"""The table of faults in ``docs/faults.md``, row by row: each fault is made, and its message is that of the table."""

from __future__ import annotations

import errno
import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest

import likely
from documents import ROOT, Outcome, adult, run, short_training, write_files
from likely import api
from likely.training import checkpoints

SMALL = ("latent_dim=2", "hidden=8")
LONG = ("fit", "adult.csv", *SMALL, "--steps", "40", "evaluate_every=10", "checkpoint_seconds=0", "--out")

Fault = Callable[[Path], Outcome]
FAULTS: dict[str, Fault] = {}


def fault(name: str) -> Callable[[Fault], Fault]:
    """The test of a row of the table: makes the fault in a folder of small files and returns what happened."""

    def keep(function: Fault) -> Fault:
        assert name not in FAULTS
        FAULTS[name] = function
        return function

    return keep


def table() -> dict[str, str]:
    """What the page says of every fault."""
    rows = {}
    for line in (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith("| fault "):
            name, text = re.split(r"(?<!\\)\|", line)[1:3]
            rows[name.strip()] = text.strip()
    return rows


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files, a run of a table, a run of images, and what the long run ends with if nothing happens."""
    folder = tmp_path_factory.mktemp("faults")
    write_files(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in (
            (*LONG, "whole"),
            ("fit", "adult.csv", "--out", "table", "--model", "independent"),
            ("fit", "digits", "--out", "digits", "--model", "independent"),
        ):
            assert run(*line).code == 0
    return folder


@pytest.mark.parametrize("name", table())
def test_fault(name: str, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(prepared)
    outcome = FAULTS[name](prepared)
    assert "Traceback" not in outcome.errors
    for message in re.findall(r"`((?:likely|warning): [^`]*)`", table()[name]):
        pattern = ".*?".join(re.escape(part) for part in message.split("…"))
        assert re.search(rf"^{pattern}", outcome.errors, re.MULTILINE), outcome.errors
    if "error: " in table()[name] and outcome.code != 3:
        assert outcome.code == 1


def test_every_row_has_a_test_and_every_test_a_row() -> None:
    assert list(table()) == list(FAULTS)


# While training ---------------------------------------------------------------------------------------------------


class _At:
    """A callback that does something after a step."""

    def __init__(self, step: int, act: Callable[[], None]) -> None:
        self.step, self.act = step, act

    def on_step(self, run: object) -> None:
        if run.step == self.step:  # type: ignore[attr-defined]
            self.act()


def _fit(out: str, callback: object) -> Outcome:
    """The long run with a callback."""
    whole = api.train
    with mock.patch.object(api, "train", lambda *a, **k: whole(*a, **{**k, "callbacks": [callback]})):
        return run(*LONG, out)


def _same_weights(out: str) -> None:
    names = [Path(folder, "model.safetensors") for folder in ("whole", out)]
    assert names[0].read_bytes() == names[1].read_bytes()


def _stopped(out: str, step: int = 25) -> None:
    """The long run, stopped after a step."""
    assert _fit(out, _At(step, lambda: signal.raise_signal(signal.SIGTERM))).code == 130


def _no_space(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@fault("Ctrl-C or SIGTERM")
def _(folder: Path) -> Outcome:
    outcome = _fit("interrupted", _At(25, lambda: signal.raise_signal(signal.SIGINT)))
    assert outcome.code == 130
    assert run("resume", "interrupted").code == 0
    _same_weights("interrupted")
    return outcome


@fault("kill -9, power failure")
def _(folder: Path) -> Outcome:
    program = (
        "import os, signal, sys, torch; torch.set_num_threads(1)\n"
        "from likely import api, cli\n"
        "class Kill:\n"
        "    def on_step(self, run):\n"
        "        if run.step == 27: os.kill(os.getpid(), signal.SIGKILL)\n"
        "whole = api.train\n"
        "api.train = lambda *a, **k: whole(*a, **{**k, 'callbacks': [Kill()]})\n"
        "cli.run(sys.argv[1:])\n"
    )
    killed = subprocess.run([sys.executable, "-c", program, *LONG, "killed"], capture_output=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    outcome = run("resume", "killed")
    assert outcome.code == 0, outcome.errors
    _same_weights("killed")
    return outcome


class _Full:
    """A callback for which the disk is full from one step up to another; :meth:`empty` makes room."""

    def __init__(self, start: int, stop: int = 1000) -> None:
        self.start, self.stop, self.disk = start, stop, mock.patch.object(checkpoints, "write_atomically", _no_space)

    def on_step(self, run: object) -> None:
        step = run.step  # type: ignore[attr-defined]
        if step == self.start:
            self.disk.start()
        elif step == self.stop:
            self.empty()

    def empty(self) -> None:
        self.disk.stop()


@fault("disk full during a checkpoint")
def _(folder: Path) -> Outcome:
    outcome = _fit("full", _Full(12, 22))
    assert outcome.code == 0, outcome.errors
    _same_weights("full")
    return outcome


@fault("disk full at the end")
def _(folder: Path) -> Outcome:
    full = _Full(35)
    outcome = _fit("late", full)
    full.empty()
    assert run("resume", "late").code == 0
    _same_weights("late")
    return outcome


def _damaged(out: str, damage: Callable[[bytes], bytes], newest: int = 1) -> Outcome:
    _stopped(out)
    files = sorted(Path(out, "state").glob("step-*.safetensors"))
    assert len(files) == 2
    for file in files[-newest:]:
        file.write_bytes(damage(file.read_bytes()))
    return run("resume", out)


@fault("truncated checkpoint")
def _(folder: Path) -> Outcome:
    outcome = _damaged("truncated", lambda content: content[: len(content) // 2])
    assert outcome.code == 0
    _same_weights("truncated")
    return outcome


@fault("altered checkpoint")
def _(folder: Path) -> Outcome:
    outcome = _damaged("altered", lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    assert outcome.code == 0
    _same_weights("altered")
    return outcome


@fault("all checkpoints damaged")
def _(folder: Path) -> Outcome:
    return _damaged("hopeless", lambda content: b"", newest=2)


@fault("number that is not finite")
def _(folder: Path) -> Outcome:
    outcome = run(*LONG, "diverged", "--learning-rate", "1e30")
    assert outcome.code == 3
    assert list(Path("diverged", "state").glob("step-*.json"))
    return outcome


# A run's folder ---------------------------------------------------------------------------------------------------


@fault("folder that holds a run")
def _(folder: Path) -> Outcome:
    return run("fit", "adult.csv", "--out", "table")


@fault("folder with other files")
def _(folder: Path) -> Outcome:
    return run("fit", "adult.csv", "--out", "photos")


def _broken_copy(name: str, file: str) -> str:
    likely.load("table").save(name)
    path = Path(name, file)
    path.write_bytes(path.read_bytes()[:100])
    return name


@fault("truncated model.safetensors")
def _(folder: Path) -> Outcome:
    return run("score", _broken_copy("weightless", "model.safetensors"), "new.csv")


@fault("truncated config.json")
def _(folder: Path) -> Outcome:
    return run("score", _broken_copy("unconfigured", "config.json"), "new.csv")


@fault("run that was not finished")
def _(folder: Path) -> Outcome:
    _stopped("unfinished")
    outcome = run("sample", "unfinished", "-n", "2")
    assert outcome.code == 0 and outcome.output.count("\n") == 3
    return outcome


@fault("run of a newer version")
def _(folder: Path) -> Outcome:
    likely.load("table").save("newer")
    path = Path("newer", "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1000}))
    return run("score", "newer", "new.csv")


# Data to fit ------------------------------------------------------------------------------------------------------


def _fit_data(name: str, content: str | bytes | None = None, *more: str, stdin: bytes = b"") -> Outcome:
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return run("fit", name, "--out", "unused", "--model", "independent", "--overwrite", *more, stdin=stdin)


@fault("no such file")
def _(folder: Path) -> Outcome:
    return _fit_data("nowhere.csv")


@fault("empty file")
def _(folder: Path) -> Outcome:
    return _fit_data("empty.csv", "")


@fault("nothing on standard input")
def _(folder: Path) -> Outcome:
    return _fit_data("-")


@fault("file with one row")
def _(folder: Path) -> Outcome:
    return _fit_data("one.csv", adult(1, 0).to_csv(index=False))


@fault("file with two rows")
def _(folder: Path) -> Outcome:
    outcome = _fit_data("two.csv", "a,b\n1,x\n2,y\n")
    assert outcome.code == 0 and outcome.output.endswith("exact, 1 examples\n") and "±" not in outcome.output
    return outcome


@fault("row with too many cells")
def _(folder: Path) -> Outcome:
    lines = adult(20, 0).to_csv(index=False).splitlines()
    lines[5] += ",more"
    return _fit_data("ragged.csv", "\n".join(lines))


@fault("compressed file cut off")
def _(folder: Path) -> Outcome:
    return _fit_data("cut.csv.gz", gzip.compress(Path("adult.csv").read_bytes())[:500])


def _with_cell(value: str, column: str = "age") -> str:
    frame = adult(30, 5).astype(object)
    frame.loc[3, column] = value
    return frame.to_csv(index=False)


@fault("infinite value")
def _(folder: Path) -> Outcome:
    return _fit_data("infinite.csv", _with_cell("inf"))


@fault("infinite value in an array")
def _(folder: Path) -> Outcome:
    np.save("infinite.npy", np.array([[1.0, np.inf], [2.0, 3.5], [4.0, 5.0]]))
    return _fit_data("infinite.npy")


@fault("pickled objects")
def _(folder: Path) -> Outcome:
    np.save("object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return _fit_data("object.npy")


@fault("column with no value")
def _(folder: Path) -> Outcome:
    frame = adult(60, 6).assign(nothing=None)
    outcome = _fit_data("hollow.csv", frame.to_csv(index=False))
    assert outcome.code == 0 and "nothing" not in likely.load("unused").sample(2).dropna(axis=1).columns
    assert re.search(r"nothing +set aside: every cell is missing", run("info", "hollow.csv").output)
    return outcome


@fault("constant column")
def _(folder: Path) -> Outcome:
    frame = adult(60, 6).assign(always="yes", seven=7)
    outcome = _fit_data("constant.csv", frame.to_csv(index=False))
    fitted = likely.load("unused")
    cells = fitted.scores("constant.csv").to_frame()[["nats:always", "nats:seven"]]
    np.testing.assert_array_equal(cells, 0.0)
    with short_training():
        vae = likely.fit("constant.csv", "vae", hidden=[8], progress=False)
    for drawn in (fitted.sample(5), vae.sample(5)):
        assert (drawn["seven"] == 7).all() and (drawn["always"] == "yes").all()
    return outcome


@fault("column of names, all different")
def _(folder: Path) -> Outcome:
    frame = adult(120, 6).assign(name=[f"person {i}" for i in range(120)])
    outcome = _fit_data("people.csv", frame.to_csv(index=False))
    described = run("info", "people.csv").output
    assert outcome.code == 0 and re.search(r"name +set aside: looks like an identifier", described)
    assert "set aside" not in run("info", "people.csv", "--keep", "name").output
    return outcome


@fault("column with 100,000 categories")
def _(folder: Path) -> Outcome:
    rng = np.random.default_rng(0)
    names = np.concatenate([np.arange(100_000), rng.integers(0, 100_000, 1000)])
    frame = pd.DataFrame({"name": [f"k{i}" for i in rng.permutation(names)], "x": rng.integers(0, 9, len(names))})
    outcome = _fit_data("many.csv", frame.to_csv(index=False), "--keep", "name")
    assert outcome.code == 0 and "k" in likely.load("unused").sample(3)["name"].iloc[0]
    with short_training(3), mock.patch.object(api, "REFERENCE_EXAMPLES", 20):
        more = ("latent_dim=2", "hidden=4", "--valid-fraction", "0.0005", "--model", "vae")
        trained = _fit_data("many.csv", None, "--keep", "name", *more)
    assert trained.code == 0, trained.errors
    return outcome


# Data for a fitted model ------------------------------------------------------------------------------------------


def _score(run_folder: str, name: str, content: str | None = None) -> Outcome:
    if content is not None:
        Path(name).write_text(content, encoding="utf-8")
    return run("score", run_folder, name)


@fault("unknown category")
def _(folder: Path) -> Outcome:
    return _score("table", "new.csv", _with_cell("Doctorate", "education"))


@fault("infinite value to score")
def _(folder: Path) -> Outcome:
    return _score("table", "new.csv", _with_cell("inf"))


@fault("text where a number is due")
def _(folder: Path) -> Outcome:
    return _score("table", "new.csv", _with_cell("old"))


@fault("column missing")
def _(folder: Path) -> Outcome:
    return _score("table", "new.csv", adult(5, 0).drop(columns="age").to_csv(index=False))


@fault("missing cell where none was")
def _(folder: Path) -> Outcome:
    return _score("table", "new.csv", _with_cell(""))


@fault("array of the wrong shape")
def _(folder: Path) -> Outcome:
    np.save("wrong.npy", np.zeros((4, 7, 8), np.uint8))
    return _score("digits", "wrong.npy")


@fault("fractions where whole numbers are due")
def _(folder: Path) -> Outcome:
    np.save("wrong.npy", np.full((4, 8, 8), 0.5))
    return _score("digits", "wrong.npy")


@fault("images for a table")
def _(folder: Path) -> Outcome:
    return _score("table", "photos")


@fault("disk full while writing")
def _(folder: Path) -> Outcome:
    if Path("/dev/full").exists():
        return run("sample", "table", "-n", "10", "-o", "/dev/full")
    with mock.patch("likely.api.Fitted.write_samples", _no_space):
        return run("sample", "table", "-n", "10", "-o", "s.csv")


@fault(r"reader of a pipe gone (`… \| head`)")
def _(folder: Path) -> Outcome:
    with mock.patch("likely.api.Fitted.write_samples", side_effect=BrokenPipeError()):
        outcome = run("sample", "table", "-n", "10")
    assert outcome.errors == ""
    return outcome
