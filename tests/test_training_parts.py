"""The parts of training: seeds, order, schedule, averages, optimisers, options, files."""

import errno
import json
import math
import sys

import pytest
import torch
from torch import nn

import likely
import likely.training.checkpoints as files
import likely.training.order as order_module
from likely import api
from likely.memory import free_memory
from likely.training import TrainOptions, load_weights, save_weights, stepper
from likely.training.checkpoints import Checkpoint, Checkpoints, Log, flatten, load_tensors, save_tensors, unflatten
from likely.training.optimizers import OPTIMIZERS, make_optimizer
from likely.training.order import Order
from likely.training.seeds import DROPOUT, NOISE, Seeds

# Seeds and order ----------------------------------------------------------------------------------------------


def test_seeds_differ_by_count_purpose_and_seed():
    noise, dropout, other = Seeds(0, NOISE), Seeds(0, DROPOUT), Seeds(1, NOISE)
    low = {noise(t) & 0xFFFFFFFF for t in range(100_000)}
    assert len(low) == 100_000  # what a CPU generator sees of a seed
    assert noise(5) != dropout(5) and noise(5) != other(5)
    assert 0 <= noise(2**40) < 2**64 and noise(2**40) != noise(0)


def test_small_data_are_permuted_uniformly():
    """Every row is as often in every place, by a chi-squared test at 6 sigma."""
    n, epochs = 6, 6000
    counts = torch.zeros(n, n)
    order = Order(n, seed=3)
    for epoch in range(epochs):
        counts[torch.arange(n), order.rows(epoch * n, (epoch + 1) * n)] += 1
    expected = epochs / n
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    freedom = (n - 1) ** 2
    assert abs(chi2 - freedom) < 6 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("n", [1000, 1024, 1031])
def test_pools_are_permutations_and_pure_functions_of_position(monkeypatch, n):
    monkeypatch.setattr(order_module, "PERMUTED_ROWS", 100)
    monkeypatch.setattr(order_module, "BLOCK_BYTES", 8 * 4)
    monkeypatch.setattr(order_module, "POOL_ROWS", 128)
    order = Order(n, seed=0, row_bytes=4)
    epochs = [order.rows(epoch * n, (epoch + 1) * n) for epoch in range(3)]
    for epoch in epochs:
        assert sorted(epoch.tolist()) == list(range(n))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], Order(n, seed=1, row_bytes=4).rows(0, n))
    whole = torch.cat(epochs)
    for start in (0, 7, n - 5, 2 * n - 1, n + 300):  # a fresh order, entered anywhere, across pools and epochs
        assert torch.equal(Order(n, seed=0, row_bytes=4).rows(start, start + 200), whole[start : start + 200])


def test_pools_mix_sorted_data(monkeypatch):
    """Batches of sorted data have the mean of the whole, with about the variance of independent draws."""
    monkeypatch.setattr(order_module, "PERMUTED_ROWS", 100)
    monkeypatch.setattr(order_module, "BLOCK_BYTES", 16)
    monkeypatch.setattr(order_module, "POOL_ROWS", 2048)
    n = 16_384
    means = Order(n, seed=0, row_bytes=1).rows(0, n).reshape(-1, 64).double().mean(1) / n
    assert abs(float(means.mean()) - 0.5) < 1e-3
    independent = math.sqrt(1 / 12 / 64)
    assert 0.8 * independent < float(means.std()) < 1.35 * independent


def test_order_of_ten_million_rows_holds_one_pool():
    order = Order(10**7, seed=0, row_bytes=100)
    rows = order.rows(3 * 10**7 - 50, 3 * 10**7 + 50)
    assert len(rows) == 100 and int(rows.max()) < 10**7
    assert len(order._rows) <= order_module.POOL_ROWS and len(order._blocks) < 10**5


# Optimisers and options ---------------------------------------------------------------------------------------


def test_optimizers_by_name():
    for name in OPTIMIZERS:
        model = nn.Linear(3, 2)
        optimizer = make_optimizer(name, model, 1e-3, weight_decay=0.1)
        decays = {p.dim(): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decays == {2: 0.1, 1: 0.0}
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    assert make_optimizer("adagrad", nn.Linear(2, 2), 1e-3).defaults["fused"] is True
    with pytest.raises(ValueError, match=r"optimizer: expected one of .*, got 'adamm'; did you mean 'adam'"):
        make_optimizer("adamm", nn.Linear(2, 2), 1e-3)
    with pytest.raises(ValueError, match="optimizer 'adam' has no option 'momentum'"):
        make_optimizer("adam", nn.Linear(2, 2), 1e-3, momentum=0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 1, "epochs": 1}, "steps, epochs, budget: expected at most one"),
        ({"steps": 0}, "steps: expected a positive whole number, got 0"),
        ({"batch_size": 2.5}, "batch_size: expected a positive whole number, got 2.5"),
        ({"learning_rate": -1.0}, "learning_rate: expected a positive number, got -1.0"),
        ({"budget": math.inf}, "budget: expected a positive number, got inf"),
        ({"warmup": -1}, "warmup: expected zero or more, got -1"),
        ({"decay": "step"}, "decay: expected one of constant, linear, cosine, inverse_sqrt, got 'step'"),
        ({"precision": "half"}, "precision: expected one of float32, bfloat16, auto, got 'half'"),
        ({"decay_fraction": 2}, "decay_fraction: expected a number from 0 to 1, got 2"),
        ({"average_fraction": 1.0}, "average_fraction: expected a number between 0 and 1, got 1.0"),
        ({"bacth_size": 5}, "has no option 'bacth_size'; did you mean 'batch_size'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions().with_changes(**options)


def test_options_are_json():
    options = TrainOptions(steps=3, optimizer_options={"betas": (0.9, 0.99)})
    assert TrainOptions(**json.loads(json.dumps(options.to_json()))).steps == 3


# Files --------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3, bias=False)
        self.second = nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        base = torch.arange(12.0).reshape(3, 4)
        self.register_buffer("crossed", base.t())  # not contiguous, and it shares memory with the next two
        self.register_buffer("corner", base[:2, :2])
        self.register_buffer("whole", base)
        self.register_buffer("scalar", torch.tensor(3, dtype=torch.int64))
        self.register_buffer("none", torch.empty(0))


def test_weights_round_trip_with_tied_and_strided_tensors(tmp_path):
    model, other = Tied(), Tied()
    save_weights(model, tmp_path / "model.safetensors")
    load_weights(other, tmp_path / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)
    with files.safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert ("first.weight" in file.keys()) and ("second.weight" not in file.keys())  # noqa: SIM118
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(ValueError, match="expected the weights of this model"):
        load_weights(nn.Linear(2, 2), tmp_path / "model.safetensors")


def test_views_of_one_size_are_not_taken_for_each_other(tmp_path):
    base = torch.arange(8.0)
    tensors = {"a": base[:4], "b": base[4:], "c": base[:4], "d": base.reshape(2, 4)[:, :2].reshape(-1)}
    save_tensors(tensors, tmp_path / "t.safetensors")
    again = load_tensors(tmp_path / "t.safetensors")
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_weights(nn.Linear(2, 2), path)
    before = path.read_bytes()

    def full(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise files.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        save_weights(nn.Linear(2, 2), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_trees_round_trip_through_json():
    tree = {0: {"step": torch.tensor(3.0), "betas": (0.9, 0.999), "rows": [torch.ones(2), None, "x", True]}, "e": {}}
    tensors: dict[str, torch.Tensor] = {}
    description = json.loads(json.dumps(flatten(tree, tensors, "o")))
    again = unflatten(description, tensors)
    assert list(again) == [0, "e"] and again[0]["betas"] == (0.9, 0.999) and again[0]["rows"][1:] == [None, "x", True]
    assert torch.equal(again[0]["rows"][0], torch.ones(2)) and again["e"] == {}
    with pytest.raises(TypeError, match=r"o\.a: expected a tensor"):
        flatten({"a": object()}, {}, "o")


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint(step, {"history": [0.1, step]}, {"w": torch.full((1000,), float(step))})


def written(folder, steps=(1, 2, 3)) -> Checkpoints:
    checkpoints = Checkpoints(folder / "state")
    for step in steps:
        checkpoints.write(checkpoint(step))
    return checkpoints


def test_two_checkpoints_are_kept(tmp_path):
    checkpoints = written(tmp_path)
    names = sorted(path.name for path in (tmp_path / "state").iterdir())
    assert names == [f"step-{step:012d}.{ending}" for step in (2, 3) for ending in ("json", "safetensors")]
    found = checkpoints.read(pytest.fail)
    assert found is not None and found.step == 3 and found.values == {"history": [0.1, 3]}
    assert torch.equal(found.tensors["w"], torch.full((1000,), 3.0))
    assert Checkpoints(tmp_path / "nothing").read(pytest.fail) is None


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def remove(path):
    path.unlink()


@pytest.mark.parametrize("damage", [truncate, flip, remove])
def test_damaged_tensors_are_noticed_and_the_previous_checkpoint_is_used(tmp_path, damage):
    checkpoints, messages = written(tmp_path), []
    damage(tmp_path / "state" / "step-000000000003.safetensors")
    found = checkpoints.read(messages.append)
    assert found is not None and found.step == 2
    assert len(messages) == 1 and "step-000000000003" in messages[0] and "trying the one before" in messages[0]


@pytest.mark.parametrize("where", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_altered_values_are_noticed(tmp_path, where):
    checkpoints, messages = written(tmp_path), []
    path = tmp_path / "state" / "step-000000000003.json"
    content = bytearray(path.read_bytes())
    content[int(where * len(content))] ^= 2
    path.write_bytes(bytes(content))
    found = checkpoints.read(messages.append)
    assert found is not None and found.step == 2 and len(messages) == 1


def test_all_checkpoints_damaged_is_an_error(tmp_path):
    checkpoints = written(tmp_path)
    for path in (tmp_path / "state").glob("*.json"):
        truncate(path)
    with pytest.raises(ValueError, match="every checkpoint is damaged"):
        checkpoints.read(lambda text: None)


def test_checkpoint_cut_short_by_a_kill_is_ignored_and_swept(tmp_path):
    """The tensors were renamed, but their JSON file was not written yet; another file was still being written."""
    checkpoints = written(tmp_path)
    state = tmp_path / "state"
    (state / "step-000000000004.safetensors").write_bytes(b"whole, or not")
    (state / ".step-000000000005.safetensors.77.tmp").write_bytes(b"half")
    found = checkpoints.read(pytest.fail)
    assert found is not None and found.step == 3
    checkpoints.write(checkpoint(6))
    assert sorted(path.stem for path in state.glob("*")) == [f"step-{s:012d}" for s in (3, 3, 6, 6)]


@pytest.mark.parametrize("failing", ["tensors", "json", "sync"])
def test_full_disk_leaves_the_last_checkpoints(tmp_path, monkeypatch, failing):
    checkpoints = written(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "sync":
        monkeypatch.setattr(files.os, "fsync", full)
    else:
        monkeypatch.setattr(files, {"tensors": "save_file", "json": "_write_text"}[failing], full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write(checkpoint(4))
    assert {path.name: path.read_bytes() for path in (tmp_path / "state").iterdir()} == before


def test_log_is_cut_back_and_keeps_lines_it_could_not_write(tmp_path):
    path = tmp_path / "log.jsonl"
    log = Log(path)
    log.start()
    log.write({"step": 1})
    length = log.sync()
    log.write({"step": 2})
    path.chmod(0o400)
    again = Log(path)
    path.chmod(0o600)
    again.start(length)
    assert path.read_text() == '{"step": 1}\n'
    path.rename(tmp_path / "away")
    again.write({"step": 3})
    (tmp_path / "away").rename(path)
    again.write({"step": 4})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3, 4]


def test_what_cannot_fit_into_memory_is_refused_before_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the number of weights before a model is made, and by what two examples keep for the gradients of a batch."""
    images = torch.zeros(40, 4, 4, dtype=torch.uint8)
    asked: list[int] = []
    foreseen = api._foresee_memory
    monkeypatch.setattr(api, "_foresee_memory", lambda name, construct: (asked.append(1), foreseen(name, construct)))
    monkeypatch.setattr(api, "_LARGE_EXAMPLE", 16)
    options = {"hidden": (64,), "latent_dim": 2, "steps": 2, "batch_size": 32, "progress": False}
    fitted = likely.fit(images, "vae", **options)
    assert asked and fitted.record["state"] == "finished"
    size = sum(4 * p.numel() for p in fitted.model.parameters())
    for module, free, words in ((api, 5 * size - 1, "weights with gradients"), (stepper, 4 * size, "a batch of 32")):
        with monkeypatch.context() as patch:
            patch.setattr(module, "free_memory", lambda device, free=free: free)
            with pytest.raises(MemoryError, match=words):
                likely.fit(images, "vae", **options)
    assert free_memory(torch.device("meta")) is None
    if sys.platform == "linux":
        assert 1 << 20 < (free_memory(torch.device("cpu")) or 0) < 1 << 50
