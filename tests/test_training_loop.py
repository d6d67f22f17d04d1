"""The loop: what it computes, what it keeps, how it stops, how it goes on, what it says when a number is not finite."""

import functools
import json
import os
import signal
import time
import warnings

import numpy as np
import pytest
import torch

import likely.training.checkpoints as files
import likely.training.feeding as feeding
import likely.training.loop as loop
from likely.contract import Binary
from likely.data.dataset import Dataset
from likely.evaluation import held_out
from likely.noise import StreamNoise
from likely.optim import AdamW, ScheduleFree
from likely.optim.schedules import learning_rate_factor
from likely.training import Diverged, TrainOptions, train
from likely.training.checkpoints import Checkpoints, load_tensors
from likely.training.optimizers import OPTIMIZERS
from likely.training.seeds import NOISE, ORDER, Seeds
from training_toy import (
    Bernoulli,
    ClosedBernoulli,
    LinearVAE,
    equal,
    gaussian_data,
    linear_vae,
    table_data,
    weights,
)

TRAIN, VALID = gaussian_data(300), gaussian_data(100, seed=1)
SHORT = TrainOptions(
    steps=60, batch_size=32, learning_rate=1e-2, warmup=5, log_every=10, evaluate_every=15, patience=None, clip_norm=5.0
)


def quiet(model, train_set=TRAIN, valid_set=VALID, options=SHORT, **changes):
    return train(model, train_set, valid_set, options, progress=False, **changes)


def log_of(folder):
    """The lines of the log without their times."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


class At:
    """Does something after one step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, run):
        if run.step == self.step:
            self.action()


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """These tests write a checkpoint after every step."""
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: None)


class Crash(Exception):
    pass


def crash():
    raise Crash


# What it computes ---------------------------------------------------------------------------------------------


def test_same_as_a_loop_by_hand():
    """Every piece by its definition: order, noise, schedule, clipping, Adam, average."""
    options = SHORT.with_changes(steps=25, optimizer="adam", average_fraction=0.2)
    trained = quiet(linear_vae(TRAIN), valid_set=None, options=options).model

    model = linear_vae(TRAIN)
    model.initialise(TRAIN.batches(1024))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    average = [p.detach().clone() for p in model.parameters()]
    n, size, order = len(TRAIN), 32, Seeds(0, ORDER)
    rows = torch.cat([
        torch.randperm(n, generator=torch.Generator().manual_seed(order(2 * epoch + 1))) for epoch in range(3)
    ])  # fmt: skip
    for step in range(25):
        noise = StreamNoise(torch.Generator().manual_seed(Seeds(0, NOISE)(step)))
        optimizer.param_groups[0]["lr"] = 1e-2 * learning_rate_factor(step, 25, 5, "cosine")
        optimizer.zero_grad()
        (-model.bound(TRAIN.x[rows[step * size : (step + 1) * size]], None, noise).nats.mean() / 5).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        kept = (step / (step + 1)) ** (np.log(0.5) / np.log(0.8))
        for mean, p in zip(average, model.parameters()):
            mean.lerp_(p.detach(), 1 - kept)
    for mean, p in zip(average, trained.parameters()):
        torch.testing.assert_close(mean, p.detach(), rtol=1e-5, atol=1e-6)


def test_bound_reaches_the_likelihood_of_a_linear_model():
    """The best linear VAE has a tight bound on N(b, W Wᵀ + s² I) (Lucas et al. 2019), near the truth's entropy."""
    result = quiet(linear_vae(TRAIN), gaussian_data(4000), steps=1500, learning_rate=2e-2, evaluate_every=300)
    model = result.model
    with torch.no_grad():
        w, s2 = model.decoder.weight.double(), (2 * model.log_scale).double().exp()
        law = torch.distributions.MultivariateNormal(
            model.decoder.bias.double() + model.centre.double(), w @ w.T + s2 * torch.eye(5).double()
        )
        exact = float(law.log_prob(VALID.x.double()).mean())
    assert result.valid["nats"] <= exact + 0.1  # its own noise
    assert result.valid["nats"] > exact - 0.15
    assert result.valid["nats"] > result.history[0]["nats"] + 3


def test_a_run_is_a_function_of_its_seed_and_leaves_the_random_state():
    before = torch.random.get_rng_state()
    first = quiet(linear_vae(TRAIN, dropout=0.3))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(123)
    second = quiet(linear_vae(TRAIN, dropout=0.3))
    other = quiet(linear_vae(TRAIN, dropout=0.3), seed=1)
    assert equal(weights(first.model), weights(second.model)) and first.history == second.history
    assert not equal(weights(first.model), weights(other.model))


def test_accumulation_changes_nothing_but_rounding():
    data = gaussian_data(300, dtype=torch.float64)
    whole = quiet(linear_vae(data, dtype="float64"), data, gaussian_data(50, 5, 1, torch.float64))
    pieces = quiet(linear_vae(data, dtype="float64"), data, gaussian_data(50, 5, 1, torch.float64), accumulate=5)
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(value, pieces.model.state_dict()[name], rtol=1e-9, atol=1e-10)


def test_binarised_data_and_a_fetching_thread(monkeypatch):
    """Fetching a batch ahead gives the same run; the data are never copied as a whole."""
    grey = torch.randint(256, (200, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = Dataset(Binary((12,)), grey, bernoulli_scale=255.0)
    plain = quiet(Bernoulli(data.space), data, data, accumulate=2)
    monkeypatch.setattr(feeding, "FETCHED_BYTES", 0)
    fetched = quiet(Bernoulli(data.space), data, data, accumulate=2)
    assert equal(weights(plain.model), weights(fetched.model))
    feeder = feeding.Feeder(data, 0, torch.device("cpu"))
    assert feeder.data.x.data_ptr() == grey.data_ptr()
    feeder.close()
    frequencies = grey.double().mean(0) / 255
    long = quiet(Bernoulli(data.space), data, None, steps=2000, batch_size=100, learning_rate=0.02)
    torch.testing.assert_close(torch.sigmoid(long.model.logits).detach().double(), frequencies, atol=0.02, rtol=0)


def test_memory_mapped_data_train_to_the_same_bits(tmp_path):
    mapped = np.memmap(tmp_path / "x.bin", np.float32, "w+", shape=(300, 5))
    mapped[:] = TRAIN.x.numpy()
    data = Dataset(TRAIN.space, torch.from_numpy(mapped))
    assert equal(weights(quiet(linear_vae(data), data).model), weights(quiet(linear_vae(TRAIN)).model))


def test_bfloat16_is_for_the_loss_only():
    class Watched(LinearVAE):
        seen: set = set()  # noqa: RUF012

        def bound(self, x, condition=None, noise=None):
            self.seen.add((self.training, torch.is_autocast_enabled("cpu"), self.encoder(x - self.centre).dtype))
            return super().bound(x, condition, noise)

    low = quiet(linear_vae(TRAIN, kind=Watched), precision="bfloat16", steps=300)
    assert Watched.seen == {(True, True, torch.bfloat16), (False, False, torch.float32)}
    assert all(p.dtype == torch.float32 for p in low.model.parameters())
    high = quiet(linear_vae(TRAIN), steps=300)
    assert abs(low.valid["nats"] - high.valid["nats"]) < 0.1


def test_compiled_loss_draws_the_same_noise(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own
        compiled = quiet(linear_vae(TRAIN), steps=20, compile=True)
    plain = quiet(linear_vae(TRAIN), steps=20)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, compiled.model.state_dict()[name], rtol=1e-5, atol=1e-6)


# Length, evaluation, early stopping -----------------------------------------------------------------------------


def test_lengths():
    assert quiet(linear_vae(TRAIN), steps=None, epochs=2).steps == 19  # ceil(600 / 32)
    assert quiet(linear_vae(TRAIN), steps=7).total_steps == 7
    assert TrainOptions().steps is None and loop.DEFAULT_STEPS == 20_000


def test_budget_is_turned_into_steps_before_the_first_one():
    began = time.monotonic()
    limited = quiet(linear_vae(TRAIN), steps=None, budget=2.0, evaluate_every=None)
    assert limited.steps == limited.total_steps >= 1
    same = quiet(linear_vae(TRAIN), steps=limited.steps, evaluate_every=limited.evaluate_every)
    assert equal(weights(limited.model), weights(same.model)) and limited.history == same.history
    assert time.monotonic() - began < 120


def test_held_out_record_is_that_of_the_kept_weights():
    result = quiet(linear_vae(TRAIN))
    again = held_out(result.model, VALID)
    assert not result.model.training
    assert result.valid["nats"] == pytest.approx(again.nats, abs=1e-6)
    assert result.valid["standard_error"] == pytest.approx(again.standard_error, abs=1e-6)
    assert sum(result.valid["parts"].values()) == pytest.approx(again.nats, abs=1e-5)
    assert result.valid["kind"] == "lower bound" and result.valid["n"] == 100
    assert [record["step"] for record in result.history] == [0, 15, 30, 45, 60]
    assert result.valid == max(result.history, key=lambda record: record["nats"])


def test_early_stopping_keeps_the_best_weights():
    """Twelve examples are soon learnt by heart."""
    few = gaussian_data(12)
    result = quiet(linear_vae(few), few, steps=5000, learning_rate=0.05, decay="constant", patience=4)
    nats = [record["nats"] for record in result.history]
    best = nats.index(max(nats))
    assert result.stopped == "early stopping" and result.steps < 5000
    assert len(nats) == best + 1 + 4 and result.valid == result.history[best]
    assert held_out(result.model, VALID).nats == pytest.approx(nats[best], abs=1e-6)
    assert nats[best] > nats[-1]


def test_some_of_the_held_out_examples():
    result = quiet(linear_vae(TRAIN), evaluate_examples=30)
    assert result.valid["n"] == 25  # every fourth of 100
    assert result.valid["nats"] == pytest.approx(
        held_out(result.model, VALID.subset(slice(None, None, 4))).nats, abs=1e-6
    )


def test_without_held_out_examples_the_last_average_is_kept(tmp_path):
    result = quiet(linear_vae(TRAIN), valid_set=None, run=tmp_path / "run")
    assert result.valid is None and result.history == []
    saved = load_tensors(tmp_path / "run" / "model.safetensors")
    assert equal(saved, weights(result.model))


def test_callbacks_look_on_and_stop(tmp_path):
    class Watcher:
        def __init__(self):
            self.calls = []

        def on_start(self, run):
            self.calls.append(("start", run.step, run.total_steps))

        def on_evaluate(self, run):
            self.calls.append(("evaluate", run.step))

        def on_step(self, run):
            if run.step == 40:
                run.stop()

        def on_end(self, run):
            self.calls.append(("end", run.step))

    watcher = Watcher()
    result = quiet(linear_vae(TRAIN), callbacks=[watcher, object()], run=tmp_path / "run")
    assert result.stopped == "callback" and result.steps == 40
    assert watcher.calls == [("evaluate", 0), ("start", 0, 60), ("evaluate", 15), ("evaluate", 30), ("end", 40)]


def test_model_in_closed_form(tmp_path):
    x = (torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    data = Dataset(Binary((3,)), x)
    model = ClosedBernoulli(data.space)
    result = train(model, data, data, run=tmp_path / "run", progress=False)
    torch.testing.assert_close(torch.sigmoid(model.logits).detach(), (x.sum(0) + 0.5) / 51)
    assert result.stopped == "closed form" and result.steps == 0
    assert result.valid["nats"] == pytest.approx(held_out(model, data).nats)
    assert [line.get("pass") for line in log_of(tmp_path / "run")] == [1, 2, None]
    assert equal(load_tensors(tmp_path / "run" / "model.safetensors"), weights(model))
    with pytest.raises(ValueError, match="expected a folder without a run"):
        train(ClosedBernoulli(data.space), data, run=tmp_path / "run", progress=False)


def test_wrong_data_are_refused():
    with pytest.raises(
        ValueError, match=r"valid_set: expected examples of the model's space .* got Reals\(shape=\(2,\)"
    ):
        quiet(linear_vae(TRAIN), valid_set=gaussian_data(5, dims=2))
    with pytest.raises(ValueError, match="train_set: expected at least one example, got none"):
        quiet(linear_vae(TRAIN), TRAIN.subset(slice(0, 0)))
    with pytest.raises(ValueError, match="device: expected"):
        quiet(linear_vae(TRAIN), device="gpu")
    with pytest.raises(
        ValueError, match="batch_size: expected at least one example for each of 1 processes × 40 pieces"
    ):
        quiet(linear_vae(TRAIN), accumulate=40)


def test_schedule_free_run_is_that_of_the_optimiser():
    """Without momentum of its own, at a constant rate after the warm-up; what is returned is its average x."""
    options = SHORT.with_changes(steps=20, schedule_free=True, decay="constant", clip_norm=None)
    trained = quiet(linear_vae(TRAIN), valid_set=None, options=options).model

    model = linear_vae(TRAIN)
    model.initialise(TRAIN.batches(1024))
    optimizer = ScheduleFree(AdamW(model.parameters(), 1e-2, (0.0, 0.999), weight_decay=0.0))
    rows = torch.cat([
        torch.randperm(len(TRAIN), generator=torch.Generator().manual_seed(Seeds(0, ORDER)(2 * epoch + 1)))
        for epoch in range(3)
    ])  # fmt: skip
    for step in range(20):
        noise = StreamNoise(torch.Generator().manual_seed(Seeds(0, NOISE)(step)))
        optimizer.optimizer.param_groups[0]["lr"] = 1e-2 * min(1.0, (step + 1) / 5)
        optimizer.zero_grad()
        model.loss(TRAIN.x[rows[step * 32 : (step + 1) * 32]], None, noise, step).value.backward()
        optimizer.step()
    with optimizer.averaged():
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), trained.parameters(), strict=True))
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), trained.parameters(), strict=True))


def test_schedule_free_takes_no_schedule():
    with pytest.raises(ValueError, match="schedule_free: expected decay='constant' with it, got 'cosine'"):
        SHORT.with_changes(schedule_free=True)


def test_one_example():
    one = gaussian_data(1)
    result = quiet(linear_vae(one), one, one)
    assert result.valid["standard_error"] is None and result.valid["nats"] > result.history[0]["nats"]


# Stopping and going on ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "step"), [(name, 7 + 4 * i) for i, name in enumerate([*OPTIMIZERS, "schedule-free"])]
)
def test_resumed_run_is_equal_to_the_bit(tmp_path, optimizer, step):
    """Crashes at two instants, one before and one after an evaluation; checkpoints lie before the crash."""
    free = {"schedule_free": True, "decay": "constant"} if optimizer == "schedule-free" else {"optimizer": optimizer}
    options = SHORT.with_changes(weight_decay=0.01, learning_rate=1e-3, checkpoint_seconds=0.0, **free)

    def go(folder, *callbacks):
        model = linear_vae(
            TRAIN, seed=int(not callbacks), dropout=0.2
        )  # other weights when resuming: it must not matter
        return quiet(model, options=options, run=folder, resume=True, callbacks=callbacks)

    whole = quiet(linear_vae(TRAIN, seed=1, dropout=0.2), options=options, run=tmp_path / "whole")
    first = linear_vae(TRAIN, seed=1, dropout=0.2)
    with pytest.raises(Crash):
        quiet(first, options=options, run=tmp_path / "run", callbacks=[At(step, crash)])
    with pytest.raises(Crash):
        go(tmp_path / "run", At(step + 9, crash))
    resumed = go(tmp_path / "run")
    assert equal(weights(whole.model), weights(resumed.model))
    assert whole.history == resumed.history and whole.valid == resumed.valid
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "run")
    states = [Checkpoints(tmp_path / name / "state").read(pytest.fail) for name in ("whole", "run")]
    assert states[0].step == states[1].step == 60 and equal(states[0].tensors, states[1].tensors)


def test_optimizer_state_keeps_its_type(tmp_path):
    """PyTorch's own loading casts a float64 state to the float32 of its parameter; ours must not."""

    class Double(torch.optim.Optimizer):
        def __init__(self, groups):
            super().__init__(groups, {"lr": 0.1})

        @torch.no_grad()
        def step(self):
            for p in self.param_groups[0]["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p, dtype=torch.float64))
                mean.mul_(0.9).add_(p.grad.double(), alpha=0.1)
                self.state[p]["trail"] = [float(mean.sum()), {"count": len(mean.shape)}]
                p.sub_(self.param_groups[0]["lr"] * mean.float())

    options = {"make_optimizer": Double, "checkpoint_seconds": 0.0}
    whole = quiet(linear_vae(TRAIN), run=tmp_path / "whole", **options)
    with pytest.raises(Crash):
        quiet(linear_vae(TRAIN), run=tmp_path / "run", callbacks=[At(33, crash)], **options)
    resumed = quiet(linear_vae(TRAIN), run=tmp_path / "run", resume=True, **options)
    assert equal(weights(whole.model), weights(resumed.model))


def test_early_stopping_is_resumed(tmp_path):
    few = gaussian_data(12)
    options = {"steps": 2000, "learning_rate": 0.05, "decay": "constant", "patience": 4, "checkpoint_seconds": 0.002}
    whole = quiet(linear_vae(few), few, run=tmp_path / "whole", **options)
    with pytest.raises(Crash):
        quiet(linear_vae(few), few, run=tmp_path / "run", callbacks=[At(whole.steps - 20, crash)], **options)
    resumed = quiet(linear_vae(few), few, run=tmp_path / "run", resume=True, **options)
    assert whole.stopped == resumed.stopped == "early stopping" and whole.steps == resumed.steps
    assert whole.history == resumed.history and equal(weights(whole.model), weights(resumed.model))
    finished = quiet(linear_vae(few, seed=5), few, run=tmp_path / "run", resume=True, **options)
    assert finished.steps == whole.steps and finished.stopped == "early stopping"
    assert equal(weights(whole.model), weights(finished.model)) and log_of(tmp_path / "run") == log_of(
        tmp_path / "whole"
    )


def test_run_folder_is_not_overwritten_and_must_be_the_same_run(tmp_path):
    quiet(linear_vae(TRAIN), run=tmp_path)
    with pytest.raises(ValueError, match=r"run: expected a folder without a run, got .*resume=True"):
        quiet(linear_vae(TRAIN), run=tmp_path)
    with pytest.raises(ValueError, match=r"learning_rate: expected 0.01 as in the run to resume .* got 0.1"):
        quiet(linear_vae(TRAIN), run=tmp_path, resume=True, learning_rate=0.1)
    with pytest.raises(ValueError, match="train_set: expected"):
        quiet(linear_vae(TRAIN), gaussian_data(300, seed=4), run=tmp_path, resume=True)
    with pytest.raises(ValueError, match="model_options: expected"):
        quiet(linear_vae(TRAIN, latent=3), run=tmp_path, resume=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_a_checkpoint_of_the_very_step(tmp_path, number):
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match=f"after step 33 of 60; resume it from {tmp_path}"):
        quiet(linear_vae(TRAIN), run=tmp_path, callbacks=[At(33, lambda: os.kill(os.getpid(), number))])
    assert signal.getsignal(number) is before
    assert Checkpoints(tmp_path / "state").read(pytest.fail).step == 33
    resumed = quiet(linear_vae(TRAIN), run=tmp_path, resume=True)
    assert equal(weights(resumed.model), weights(quiet(linear_vae(TRAIN)).model))


def test_damaged_checkpoint_is_replaced_by_the_one_before(tmp_path):
    with pytest.raises(Crash):
        quiet(linear_vae(TRAIN), run=tmp_path, checkpoint_seconds=0.0, callbacks=[At(40, crash)])
    newest = max((tmp_path / "state").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-100])
    with pytest.warns(RuntimeWarning, match="is damaged .*truncated or altered.* trying the one before"):
        resumed = quiet(linear_vae(TRAIN), run=tmp_path, resume=True)
    assert equal(weights(resumed.model), weights(quiet(linear_vae(TRAIN)).model))


def test_full_disk_is_told_and_training_goes_on(tmp_path, monkeypatch):
    write, count = files.save_file, [0]

    def full(*args, **kwargs):
        count[0] += 1
        if 6 <= count[0] <= 9:
            raise files.SafetensorError("I/O error: No space left on device (os error 28)")
        write(*args, **kwargs)

    monkeypatch.setattr(files, "save_file", full)
    with pytest.warns(RuntimeWarning, match=r"no checkpoint could be written at step .*No space left .*goes on"):
        result = quiet(linear_vae(TRAIN), run=tmp_path, checkpoint_seconds=0.0)
    assert equal(weights(result.model), weights(quiet(linear_vae(TRAIN)).model))
    assert Checkpoints(tmp_path / "state").read(pytest.fail).step == 60


def test_folder_that_cannot_hold_the_weights_is_an_error(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise files.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.warns(RuntimeWarning, match="No checkpoint was written"), pytest.raises(OSError, match="No space left"):
        quiet(linear_vae(TRAIN), run=tmp_path)


# When a number is not finite ------------------------------------------------------------------------------------


class Uninitialised(LinearVAE):
    def initialise(self, batches):
        pass


def test_bad_example_is_named(tmp_path):
    x = TRAIN.x.clone()
    x[123, 2] = 1e30  # its square overflows
    data = Dataset(TRAIN.space, x)
    with pytest.raises(Diverged, match=r"part 'reconstruction' of the bound is -inf for row 123") as caught:
        quiet(linear_vae(data, kind=Uninitialised), data, run=tmp_path, clip_norm=None)
    message = str(caught.value)
    assert caught.value.rows == [123] and f"step {caught.value.step}:" in message
    assert "of step 0, is intact" in message
    assert Checkpoints(tmp_path / "state").read(pytest.fail).step == 0


def test_layer_and_column_are_named():
    data = table_data(200)
    data.x[77, 1] = 1e38
    model = linear_vae(data, kind=Uninitialised)
    with torch.no_grad():
        model.encoder.weight.fill_(10.0)  # 10 × 1e38 is too large for float32
    with pytest.raises(Diverged, match=r"row 77.*'encoder' \(Linear\)") as caught:
        quiet(model, data, None)
    assert "1e+38 in column 'weight'" in str(caught.value)


def test_gradient_that_is_not_finite_is_named(tmp_path):
    with pytest.raises(Diverged, match=r"step 37: the gradient is not finite in 'decoder.bias'") as caught:
        quiet(linear_vae(TRAIN, trap=37), run=tmp_path, clip_norm=None, checkpoint_seconds=0.0)
    assert caught.value.step == 37 and 16 < len(caught.value.rows) <= 32
    checkpoint = Checkpoints(tmp_path / "state").read(pytest.fail)
    assert 0 < checkpoint.step <= 37 and "is intact" in str(caught.value)
    assert all(torch.isfinite(value).all() for value in checkpoint.tensors.values())


def test_diagnosis_works_without_a_run_folder():
    with pytest.raises(Diverged, match=r"step 5: the gradient is not finite in 'decoder.bias'\. No checkpoint"):
        quiet(linear_vae(TRAIN, trap=5), clip_norm=None)


def test_held_out_example_that_is_not_finite_is_named():
    valid = gaussian_data(100, seed=1)
    valid.x[60, 0] = 1e30
    with pytest.raises(Diverged, match=r"on the held-out examples, part 'reconstruction' .* row 60 "):
        quiet(linear_vae(TRAIN), valid_set=valid)


def test_runaway_loss_stops():
    class Growing(LinearVAE):
        def loss(self, x, condition=None, noise=None, step=0):
            loss = super().loss(x, condition, noise, step)
            loss.value = loss.value + step
            return loss

    with pytest.raises(Diverged, match=r"step 120: the loss ran away, from .* try a smaller learning_rate") as caught:
        quiet(linear_vae(TRAIN, kind=Growing), valid_set=None, steps=200)
    assert caught.value.step == 120  # the lines of steps 80 to 120 are above 11 times the first line's loss, 6.9


# What it shows --------------------------------------------------------------------------------------------------


def test_plain_progress(capsys):
    train(linear_vae(TRAIN), TRAIN, VALID, SHORT)
    shown = capsys.readouterr().err
    assert "(30 parameters) on 300 examples: 60 steps of 32 on cpu" in shown
    assert "step 60/60 ·" in shown and "held-out -" in shown and "± " in shown
    assert "bits" not in shown  # real numbers have none


def test_progress_in_bits(capsys):
    data = Dataset(Binary((4,)), torch.ones(20, 4))
    train(Bernoulli(data.space), data, data, steps=1)
    shown = capsys.readouterr().err
    assert "bits/dim" in shown


def test_silence(capsys):
    quiet(linear_vae(TRAIN))
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TensorBoard's own dependencies
        quiet(linear_vae(TRAIN), run=tmp_path, tensorboard=True)
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

        (path,) = (tmp_path / "tensorboard").iterdir()
        events = [
            (event.step, value.tag) for event in EventFileLoader(str(path)).Load() for value in event.summary.value
        ]
    assert [step for step, tag in events if tag == "loss"] == [10, 20, 30, 40, 50, 60]
    assert [step for step, tag in events if tag == "valid/nats"] == [0, 15, 30, 45, 60]
    with pytest.raises(ValueError, match="tensorboard: expected a run folder"):
        quiet(linear_vae(TRAIN), tensorboard=True)
