"""Memory that a process keeps: that it stays out of the way of settings, and that it does what it says."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

_SCRIPT = """
import resource, sys, torch
from likely.memory import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(50):
        torch.ones(3_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def _faults(how: str, **environment: str) -> int:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, how],
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="speaks to glibc")
def test_freed_memory_is_used_again() -> None:
    """Fifty tensors of 12 MB, one after another: their pages are found once."""
    assert _faults("keep") < 200
    assert _faults("keep", MALLOC_TOP_PAD_="0", MALLOC_TRIM_THRESHOLD_="131072") > 20_000  # the user's word counts
