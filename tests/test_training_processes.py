"""Training over two processes is training over one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from likely.training.checkpoints import Checkpoints, load_tensors
from training_processes import OPTIONS, OVERFITTING, job


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes, started by torchrun, left."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(__file__).with_name("training_processes.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*command, str(folder)], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_run(first, second, tolerance):
    """The logs and the kept weights are equal but for rounding."""
    logs = [[json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in (first, second)]
    assert len(logs[0]) == len(logs[1])
    for a, b in zip(*logs):
        assert_same_numbers(a, b, tolerance)
    weights = [load_tensors(run / "model.safetensors") for run in (first, second)]
    for name, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][name], rtol=tolerance, atol=tolerance)


def assert_same_numbers(first, second, tolerance):
    if isinstance(first, dict):
        assert list(first) == list(second)
        for name in first:
            if name != "seconds":
                assert_same_numbers(first[name], second[name], tolerance)
    elif isinstance(first, float):
        assert first == pytest.approx(second, abs=tolerance, rel=tolerance)
    else:
        assert first == second


def test_two_processes_equal_one(tmp_path, two):
    """Batches of 33 are shared as 16 and 17, in pieces of 8 and 9; 101 held-out examples as 50 and 51."""
    job(tmp_path / "one", OPTIONS)
    assert_same_run(tmp_path / "one", two / "equal", 1e-9)


def test_two_processes_are_interrupted_together_resume_and_stop_early(tmp_path, two):
    """One gets the signal, both stop after the same step; all steps and the early stop are those of one process."""
    job(tmp_path / "one", OVERFITTING, 13)
    messages = [(two / f"interrupted-{rank}").read_text() for rank in (0, 1)]
    assert messages[0] == messages[1] and "training interrupted after step" in messages[0]
    last = Checkpoints(two / "stopped" / "state").read(pytest.fail)
    assert last is not None and last.values["stopped"] == "early stopping" and last.step < 3000
    assert_same_run(tmp_path / "one", two / "stopped", 1e-6)


def test_both_processes_tell_of_a_fault(two):
    messages = [(two / f"fault-{rank}").read_text() for rank in (0, 1)]
    assert messages[0].partition(". ")[0] == messages[1].partition(". ")[0]
    assert messages[0].startswith("training stopped at step 25: the gradient is not finite in 'decoder.bias'.")
