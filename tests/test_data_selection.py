"""A part of a dataset too large to copy behaves as the copy; a map too large to be writable is read-only."""

from __future__ import annotations

import errno

import numpy as np
import pytest
import torch

from likely.contract import Binary, Integers, Reals
from likely.data import dataset as datasets
from likely.data.dataset import Dataset, Passes, Selection
from likely.data.store import as_tensor, map_npy
from likely.models.vae import VAE
from likely.noise import StreamNoise
from likely.training import train

ROWS = torch.tensor([7, 2, 2, 31, 0, 18, 5, 39])


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> tuple[Dataset, Dataset]:
    """A copied part and a selected one."""
    x = torch.randint(0, 256, (40, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = Dataset(Binary((6,)), x, Integers((1,), 40), torch.arange(40).unsqueeze(1), bernoulli_scale=255.0)
    copied = whole.subset(ROWS)
    monkeypatch.setattr(datasets, "COPIED_BYTES", 0)
    selected = whole.subset(ROWS)
    assert isinstance(selected, Selection) and not isinstance(copied, Selection)
    return copied, selected


def same(a: Dataset, b: Dataset) -> None:
    assert len(a) == len(b) and a.space == b.space and a.condition_space == b.condition_space
    assert torch.equal(a.x, b.x) and a.condition is not None and torch.equal(a.condition, b.condition)


def test_a_selection_is_the_copy(pair: tuple[Dataset, Dataset]) -> None:
    copied, selected = pair
    same(copied, selected)
    same(copied.subset(slice(1, 6, 2)), selected.subset(slice(1, 6, 2)))
    same(copied.subset(torch.tensor([3, 0])), selected.subset(torch.tensor([3, 0])))
    assert selected.example_bytes == copied.example_bytes == 6 and selected.device == copied.device
    assert "8 of 40" in repr(selected)
    for index in (slice(2, 7), torch.tensor([5, 5, 1])):
        for (x, c), (y, d) in [
            (copied.batch(index), selected.batch(index)),
            (copied.batch(index, noise()), selected.batch(index, noise())),
        ]:
            assert torch.equal(x, y) and torch.equal(c, d)  # type: ignore[arg-type]
    for (x, c), (y, d) in zip(Passes(copied, 3), Passes(selected, 3), strict=True):
        assert torch.equal(x, y) and torch.equal(c, d)  # type: ignore[arg-type]


def noise() -> StreamNoise:
    return StreamNoise(torch.Generator().manual_seed(1))


def test_training_on_a_selection_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
    whole = Dataset(Reals((3,)), x)
    weights = []
    for limit in (1 << 30, 0):
        monkeypatch.setattr(datasets, "COPIED_BYTES", limit)
        torch.manual_seed(0)
        model = VAE(Reals((3,)), latent_dim=2, hidden=(8,))
        part = whole.subset(torch.arange(0, 60, 2))
        assert isinstance(part, Selection) == (limit == 0)
        train(model, part, whole.subset(torch.arange(1, 60, 2)), steps=20, batch_size=7, progress=False)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_a_map_that_must_not_be_writable_is_read_only_and_not_copied(tmp_path, monkeypatch) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(12.0).reshape(4, 3))
    load = np.load

    def refusing(path, mmap_mode=None, **options):
        if mmap_mode == "c":
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return load(path, mmap_mode=mmap_mode, **options)

    assert map_npy(path).flags.writeable
    monkeypatch.setattr(np, "load", refusing)
    array = map_npy(path)
    tensor = as_tensor(array)
    assert not array.flags.writeable
    assert tensor.data_ptr() == array.ctypes.data
    assert torch.equal(tensor, torch.arange(12.0, dtype=torch.float64).reshape(4, 3))
    with pytest.raises(FileNotFoundError):
        map_npy(tmp_path / "b.npy")
