"""What every test starts from: one thread, so that sums have one order, and a random state of its own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same global random state for every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  the global state is what code under test might wrongly use
    torch.manual_seed(0)
