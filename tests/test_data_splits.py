"""Splits: exact sizes, disjoint parts, the same draw everywhere, and the record of it."""

import json

import pytest
import torch

from likely.data import DataError, Split, split


@pytest.mark.parametrize("n", [2, 7, 10, 999, 1797])
def test_parts_are_disjoint_and_of_the_stated_sizes(n):
    parts = split(n, {"valid": 0.2, "test": 0.1 if n > 2 else 0.0}, seed=3)
    everything = torch.cat(list(parts.indices.values()))
    assert torch.equal(everything.sort().values, torch.arange(n))
    assert len(parts.valid) == max(1, int(n * 0.2 + 0.5))
    assert all((index.diff() > 0).all() for index in parts.indices.values())


def test_a_split_depends_on_its_seed_and_on_nothing_else():
    state = torch.get_rng_state()
    one = split(1000, {"valid": 0.1, "test": 0.2}, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert one.digest() == split(1000, {"valid": 0.1, "test": 0.2}, seed=1).digest()
    other = split(1000, {"valid": 0.1, "test": 0.2}, seed=2)
    shared = len(set(one.test.tolist()) & set(other.test.tolist()))
    assert 20 <= shared <= 65, "two independent fifths share 40 of 200 rows, with a standard deviation of 5"
    # Golden: a change of this value would silently move every earlier run's held-out rows.
    assert one.digest()[:16] == "10303ec2316b1b67"


def test_the_draw_is_uniform_over_rows():
    held = torch.zeros(20)
    for seed in range(2000):
        held[split(20, {"valid": 0.25}, seed=seed).valid] += 1
    expected, variance = 2000 * 0.25, 2000 * 0.25 * 0.75
    assert ((held - expected).square() / variance).sum() < 45.3, "chi-square of 20 rows, p = 0.001"


def test_the_record_brings_the_split_back():
    parts = split(500, {"valid": 0.1, "test": 0.2}, seed=5)
    record = json.loads(json.dumps(parts.to_json()))
    assert record["sizes"] == {"train": 350, "valid": 50, "test": 100}
    again = Split.from_json(record)
    assert all(torch.equal(again.indices[name], index) for name, index in parts.indices.items())
    with pytest.raises(DataError, match="does not come out again"):
        Split.from_json({**record, "seed": 6})


@pytest.mark.parametrize(
    "n, fractions, message",
    [
        (10, {"valid": 1.0}, "valid: expected a fraction from 0 to below 1, got 1.0"),
        (10, {"test": -0.1}, "test: expected a fraction"),
        (10, {"valid": 0.5, "test": 0.5}, "expected examples left to train on, got 10 examples and 10 held out"),
        (1, {"valid": 0.1}, "got 1 examples and 1 held out"),
    ],
)
def test_impossible_splits(n, fractions, message):
    with pytest.raises(DataError, match=message):
        split(n, fractions)


def test_a_training_set_alone():
    parts = split(5, {"valid": 0.0})
    assert len(parts.train) == 5 and len(parts.valid) == len(parts.test) == 0
