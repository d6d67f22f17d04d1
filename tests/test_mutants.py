"""Every classical bug of ``mutants.py`` is caught by the check that is named for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from likely.checks import check_names
from mutants import MUTANTS, Mutant, injected, verdict


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_caught(mutant: Mutant) -> None:
    caught, said = verdict(mutant)
    assert caught, said


def test_mutants_have_names_of_their_own() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 20


def test_the_real_function_comes_back() -> None:
    mutant = MUTANTS[0]
    before = getattr(mutant.owner, mutant.function)
    with injected(mutant):
        assert getattr(mutant.owner, mutant.function) is not before
    assert getattr(mutant.owner, mutant.function) is before


def test_a_mutant_whose_text_is_gone_is_an_error() -> None:
    gone = Mutant("gone", MUTANTS[0].judge, MUTANTS[0].owner, MUTANTS[0].function, "no such text", "")
    with pytest.raises(LookupError, match="found it 0 times"), injected(gone):
        pass


def test_the_documentation_lists_every_mutant_and_check() -> None:
    page = (Path(__file__).parent.parent / "docs" / "checks.md").read_text(encoding="utf-8")
    for mutant in MUTANTS:
        assert f"| {mutant.name} | `{mutant.judge.check}` |" in page
    for name in check_names():
        assert f"\n| `{name}` | " in page
