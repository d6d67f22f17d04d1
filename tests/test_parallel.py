"""The parallel map: order, errors, state built once, arguments drawn lazily, and nothing left after any end."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import parallel_work as work
from likely.coding import parallel
from likely.coding.errors import Damaged, TooLarge
from likely.coding.parallel import AHEAD, map_chunks

SCRIPT = """
import multiprocessing, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent may have it ignored
from likely.coding import parallel
from likely.coding.parallel import map_chunks
from parallel_work import sleep

parallel._forks = lambda: sys.argv[1] == "fork"
try:  # without a guard against being imported anew by the workers, as many users' scripts are
    list(map_chunks(sleep, [float(sys.argv[2])] * 400, 2))
except KeyboardInterrupt:
    print("interrupted,", len(multiprocessing.active_children()), "left", flush=True)
    sys.exit(130)
"""


STARTS = ["spawn", *(["fork"] if sys.platform == "linux" else [])]


@pytest.fixture(params=STARTS)
def start(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(autouse=True)
def nothing_left(start: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test with workers that are forks, and with workers that are not."""
    monkeypatch.setattr(parallel, "_forks", lambda: start == "fork")
    yield
    assert multiprocessing.active_children() == []


def test_one_worker_is_a_plain_map() -> None:
    assert list(map_chunks(work.square, range(5), 1)) == [0, 1, 4, 9, 16]
    assert list(map_chunks(work.square, [], 2)) == []
    assert list(map_chunks(work.square, [3], 2)) == [9]
    with pytest.raises(ValueError, match="workers: expected at least 1, got 0"):
        map_chunks(work.square, [1], 0)


def test_order_state_threads_and_arguments() -> None:
    drawn = 0

    def source() -> Iterator[int]:
        nonlocal drawn
        for drawn in itertools.count(1):
            yield drawn - 1

    found: dict[int, dict] = {}
    torch.set_num_threads(2)
    try:
        results = map_chunks(work.place, source(), 3, build=work.build, state=b"state")
        for expected, (argument, built) in enumerate(results):
            assert argument == expected
            assert drawn <= expected + 1 + 3 * AHEAD
            assert found.setdefault(built["process"], built) == built  # built once
            if len(found) == 3:
                break
        results.close()  # type: ignore[attr-defined]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert os.getpid() in found
    assert {(built["text"], built["threads"]) for built in found.values()} == {("state", 1)}


def test_a_fork_has_the_elements_of_a_sequence_already(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work.Told, "sent", 0)
    found = list(map_chunks(work.number_of, [work.Told(number) for number in range(150)], 2))
    assert [number for number, _ in found] == list(range(150))
    elsewhere = sum(there for _, there in found)
    assert elsewhere and work.Told.sent == (0 if start == "fork" else elsewhere)


def test_workers_of_a_process_that_has_computed_with_threads() -> None:
    torch.set_num_threads(2)
    try:
        here = [work.products(seed) for seed in range(6)]
        assert list(map_chunks(work.products, range(6), 3)) == here
    finally:
        torch.set_num_threads(1)


def test_an_error_of_a_worker_comes_as_it_is() -> None:
    with pytest.raises(TooLarge, match=r"rows: expected at most 1, got 2; .*max_output") as caught:
        list(map_chunks(work.misbehave, itertools.repeat("raise"), 2))
    assert caught.value.limit == 1
    assert any("in misbehave" in note for note in caught.value.__notes__)


def test_an_error_of_the_arguments_comes_in_its_turn() -> None:
    results = map_chunks(work.square, work.damaged_source(), 2)
    assert next(results) == 9
    with pytest.raises(Damaged, match="cut short"):
        next(results)


@pytest.mark.parametrize(("what", "message"), [("die", "a worker process died"), ("lambda", "cannot send <function")])
def test_a_worker_that_gives_no_result(what: str, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        list(map_chunks(work.misbehave, itertools.repeat(what), 2))


def test_what_is_built_here_is_not_built_again(start: str) -> None:
    here = work.build(b"state")
    results = map_chunks(work.place, itertools.repeat(5), 2, build=work.build, state=b"state", built=here)
    found: dict[int, dict] = {}
    for _, built in results:
        found[built["built"]] = built
        if len(found) == 2 or (start == "fork" and len(found) == 1):
            break
    results.close()  # type: ignore[attr-defined]
    assert here["built"] in found
    only_here = list(map_chunks(work.place, range(3), 2, build=work.build, state=b"state", built=here))
    if start == "fork":
        assert all(built == here for _, built in only_here)


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs groups of processes")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(tmp_path: Path, start: str, number: signal.Signals) -> None:
    """Not when Ctrl-C ends parent and workers, as a terminal does; not when the parent alone is killed,
    though then the workers finish what they are at."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    with subprocess.Popen(
        [sys.executable, str(script), start, "60" if number == signal.SIGINT else "0.1"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # a worker is at work
        (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
        output, complaints = process.communicate(timeout=120)  # until nobody holds the pipe
        if number == signal.SIGINT:
            assert (process.returncode, output, complaints) == (130, "interrupted, 0 left\n", "")
