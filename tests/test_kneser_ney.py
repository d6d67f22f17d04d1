"""The n-gram rival of the language models: its laws sum to one, and small cases worked by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from kneser_ney import KneserNey

TEXT = (b"the cat sat on the mat; the dog sat on the log. " * 3 + b"a cat and a dog ran to the mat and sat. ") * 4


@pytest.mark.parametrize("order", [1, 2, 3, 5, 7])
def test_the_law_of_the_next_byte_sums_to_one(order: int) -> None:
    model = KneserNey(TEXT, order)
    for context in (b"", b"t", b"the", b"on the m", b"zq\x00\xff", b"never seen before"):
        assert np.exp(model.log_probs(context)).sum() == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("order", [2, 4])
def test_a_text_costs_what_its_bytes_cost_one_by_one(order: int) -> None:
    model, text, before = KneserNey(TEXT, order), b"the frog sat on a\x07log", b"and "
    found = model.log_prob(text, before)
    whole = before + text
    for i, nats in enumerate(found):
        place = len(before) + i
        assert nats == pytest.approx(model.log_probs(whole[:place])[whole[place]], abs=1e-12)
    first = model.log_prob(text)[0]
    assert first == pytest.approx(model.log_probs(b"")[text[0]], abs=1e-12)


def test_bigrams_by_hand() -> None:
    # "abac": bigrams ab, ba, ac once each; bytes before: of a: b, of b: a, of c: a, so each of the three counts 1.
    # Counts of counts n1 = 3, n2 = 0 give Y = 1, D1 = min(1 − 2 · 1 · 0 / 3, 1) = 1: all of every count is taken.
    model = KneserNey(b"abac", 2)
    uniform = 1 / 256
    assert np.exp(model.log_probs(b"x"))[ord("a")] == pytest.approx(uniform)
    # "aab" · 2 = "aabaab": aa 2, ab 2, ba 1; n1 = 1, n2 = 2: Y = 1/5, D1 = 1 − 2/5 · 2 < 1 → 0.2, D2 = 2 − 0 = 2.
    model = KneserNey(b"aabaab", 2)
    # bytes before: of a: {a, b} = 2, of b: {a} = 1; n1 = 1, n2 = 1: Y = 1/3, D1 = 1 − 2/3 = 1/3, D2 = 2.
    a = (2 - 2) / 3 + (2 + 1 / 3) / 3 * uniform
    b = (1 - 1 / 3) / 3 + (2 + 1 / 3) / 3 * uniform
    assert np.exp(model.log_probs(b"")[[97, 98]]) == pytest.approx([a, b])
    after_a = [(2 - 2) / 4 + (2 + 2) / 4 * a, (2 - 2) / 4 + (2 + 2) / 4 * b]
    assert np.exp(model.log_probs(b"a")[[97, 98]]) == pytest.approx(after_a)
    after_b = [(1 - 0.2) / 1 + 0.2 * a, 0.2 * b]
    assert np.exp(model.log_probs(b"b")[[97, 98]]) == pytest.approx(after_b)


def test_more_context_helps_on_text_that_has_it() -> None:
    costs = [
        -KneserNey(TEXT, order).log_prob(b"the dog sat on the mat and ran to the log. ").mean() for order in (1, 2, 3)
    ]
    assert costs[0] > costs[1] > costs[2]


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 5 bytes, got 3"):
        KneserNey(b"abc", 5)
    with pytest.raises(ValueError, match="order: expected 1 to 7, got 9"):
        KneserNey(TEXT, 9)
