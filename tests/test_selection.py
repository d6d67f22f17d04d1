"""The choice of a model: the best held-out bound wins, by as many trials as successive halving makes."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import likely
from likely.contract import Reals, Table, Unsupported
from likely.data import Dataset
from likely.memory import TooLittleMemory
from likely.training import TrainOptions, selection
from likely.training.selection import Candidate, choose, shortlist

DATA = Dataset(Reals((2,)), torch.zeros(10, 2))
#: Held-out nats of each candidate after so many steps.
CURVES = {
    "vae 1": lambda steps: -10 + 0.01 * steps,
    "vae 2": lambda steps: -9 + 0.001 * steps,
    "vae 3": lambda steps: -30.0,
    "vae 4": lambda steps: -40.0,
}


def _choose(closed: Mapping[str, float], steps: int = 4000) -> tuple[Any, list[tuple[str, float | None]]]:
    """A search among models that are only curves."""
    candidates = [Candidate("gaussian", {"rank": k}) for k in closed]
    candidates += [Candidate("vae", {"latent_dim": int(name[-1])}) for name in CURVES]

    def build(name: str, options: Mapping[str, Any]) -> Any:
        return name, *options.values()

    def trainer(model: Any, train_set: Any, valid_set: Any, options: TrainOptions, progress: bool) -> Any:
        name, number = model
        if name == "gaussian" and closed[number] is None:
            raise Unsupported("no")
        nats = closed[number] if name == "gaussian" else CURVES[f"vae {number}"](options.steps)
        return SimpleNamespace(valid={"nats": nats})

    choice = choose(candidates, build, DATA, DATA, TrainOptions(steps=steps), trainer=trainer)  # type: ignore[arg-type]
    return choice.candidate, [(f"{t.model} {next(iter(t.options.values()))}", t.length) for t in choice.trials]


def test_better_half_goes_on_for_twice_as_long() -> None:
    best, trials = _choose({})
    assert best == Candidate("vae", {"latent_dim": 1})  # behind at first, ahead once both have had more steps
    lengths = {name: [length for other, length in trials if other == name] for name in CURVES}
    assert {name: len(found) for name, found in lengths.items()} == {"vae 1": 2, "vae 2": 2, "vae 3": 1, "vae 4": 1}
    assert lengths["vae 1"][1] == pytest.approx(2 * lengths["vae 1"][0], abs=2)
    assert sum(length or 0 for _, length in trials) <= 2000  # half of the length; the other half is for the winner


def test_closed_form_wins_where_it_is_best_and_larger_ones_that_lose_end_their_family() -> None:
    best, trials = _choose({1: -8.0, 2: -2.0, 3: -3.0, 4: -1.0})
    assert best == Candidate("gaussian", {"rank": 2})
    assert "gaussian 4" not in [name for name, _ in trials]


def test_slow_closed_forms_leave_a_quarter_to_models_that_train(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(selection, "time", SimpleNamespace(monotonic=lambda: clock.now))
    given: dict[str, float | None] = {}

    def trainer(model: str, train_set: Any, valid_set: Any, options: TrainOptions, progress: bool) -> Any:
        clock.now += 55.0 if model == "gaussian" else options.budget or 0.0
        given[model] = options.budget
        return SimpleNamespace(valid={"nats": -9.0 if model == "gaussian" else -8.0})

    candidates = [Candidate("gaussian"), Candidate("made"), Candidate("vae")]
    chosen = choose(
        candidates,
        lambda name, _: name,
        DATA,
        DATA,
        TrainOptions(budget=60.0),
        trainer=trainer,  # type: ignore
    )
    assert chosen.candidate.name != "gaussian"
    assert given["gaussian"] == 15.0  # which EM keeps to, if not this trainer
    assert sum(trial.length or 0.0 for trial in chosen.trials) <= 15.0
    choose(candidates[:1], lambda name, _: name, DATA, DATA, TrainOptions(budget=60.0), trainer=trainer)  # type: ignore
    assert given["gaussian"] is None  # nothing is taken from others


def test_what_is_not_defined_is_passed_over() -> None:
    best, _ = _choose({1: None, 2: -2.0})  # type: ignore[dict-item]
    assert best == Candidate("gaussian", {"rank": 2})


def test_what_does_not_fit_into_memory_is_passed_over() -> None:
    def trainer(model: str, train_set: Any, valid_set: Any, options: TrainOptions, progress: bool) -> Any:
        if model == "made":
            raise TooLittleMemory("too large")
        return SimpleNamespace(valid={"nats": -1.0})

    candidates = [Candidate("made"), Candidate("vae")]
    chosen = choose(candidates, lambda name, _: name, DATA, DATA, TrainOptions(steps=400), trainer=trainer)  # type: ignore
    assert chosen.candidate.name == "vae" and [t.nats for t in chosen.trials if t.model == "made"] == [None]


def test_shortlists_hold_models_that_exist_for_the_space() -> None:
    table = likely.data.infer_schema(pd.DataFrame({"a": ["x", "y"] * 20, "b": np.arange(40) % 7})).space
    assert isinstance(table, Table)
    for space in (table, Reals((3,))):
        for candidate in shortlist(space, 1000):
            assert isinstance(space, likely.models.find(candidate.name).spaces)
        assert all(candidate.closed_form for candidate in shortlist(space, 1000, closed_form=True))
    assert all(likely.models.find(c.name).conditional for c in shortlist(table, 1000, conditional=True))


def test_fit_without_a_model_keeps_its_trials_and_repeats_itself(tmp_path) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    kind = rng.choice(["a", "b"], 200)
    frame = pd.DataFrame({"kind": kind, "copy": kind, "n": rng.integers(0, 5, 200)})
    fits = [likely.fit(frame, search="closed form", progress=False) for _ in range(2)]
    assert fits[0].record["name"] == "mixture"
    assert [t["model"] for t in fits[0].record["search"]][:2] == ["gaussian", "mixture"]
    assert np.array_equal(fits[0].score_samples(frame), fits[1].score_samples(frame))
    with pytest.raises(ValueError, match="did you mean 'latent_dim'"):
        likely.fit(frame, latent_dm=3)
    with pytest.raises(ValueError, match="search: expected 'all' or 'closed form'"):
        likely.fit(frame, search="some")  # type: ignore[arg-type]
