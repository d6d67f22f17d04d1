"""The one training loop, for every model.

A run is a function of its options, its data and its model alone: step t is a function of the state before it and of
(seed, t), and schedules depend on t.  So a run that was killed goes on from its last checkpoint to the bits it would
have reached, and a step that went wrong can be repeated to see why.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from likely.contract import Model
from likely.data.dataset import Dataset, Passes
from likely.evaluation.heldout import HeldOut, held_out, standard_error
from likely.memory import keep_memory
from likely.training.checkpoints import Checkpoint, Checkpoints, Log, save_tensors, save_weights
from likely.training.diagnosis import Diverged
from likely.training.feeding import DevicePasses, check_data, fingerprint, thinned
from likely.training.optimizers import MakeOptimizer
from likely.training.options import DEFAULT_STEPS, TrainOptions
from likely.training.processes import Processes, join
from likely.training.progress import Clock, Display, Events, Silent, Status, describe_nats, describe_seconds, display
from likely.training.stepper import Stepper

#: Evaluations in a run whose ``evaluate_every`` is not given.
EVALUATIONS = 50
#: Steps between updates of the averaged weights in all but short runs.
AVERAGE_EVERY = 8
#: A loss ran away when it is above its first value by ``RUNAWAY`` times its size, for so many lines of the log.
RUNAWAY, RUNAWAY_LINES = 10.0, 5


@dataclass
class TrainResult:
    """What a run came to.

    Args:
        model: the trained model, in eval mode: the averaged weights of the best evaluation, or of the end of the run
            without a held-out set.
        steps: optimiser steps made.
        stopped: why it ended: ``steps``, ``early stopping``, ``callback`` or ``closed form``.
        valid: the kept weights' held-out record, or None: ``step``, ``kind``, ``n``, ``nats`` (mean per example),
            ``standard_error`` (nats), ``parts`` (nats).
        history: the records of all evaluations.
        seconds: time of the run, interruptions not counted.
        examples_per_second: training examples a second, evaluation and checkpoints included.
        device: where it was trained.
        options: the options.
        total_steps: length of the run as settled; less were made if it stopped early.
        evaluate_every: steps between evaluations as settled.
    """

    model: Model
    steps: int
    stopped: str
    valid: dict[str, Any] | None
    history: list[dict[str, Any]]
    seconds: float
    examples_per_second: float
    device: str
    options: TrainOptions
    total_steps: int
    evaluate_every: int

    def to_json(self) -> dict[str, Any]:
        """Everything but the model, as JSON values."""
        return {
            "steps": self.steps,
            "total_steps": self.total_steps,
            "evaluate_every": self.evaluate_every,
            "stopped": self.stopped,
            "valid": self.valid,
            "seconds": round(self.seconds, 3),
            "examples_per_second": round(self.examples_per_second, 1),
            "device": self.device,
            "options": self.options.to_json(),
        }


class Callback:
    """What may look on while a run goes on; give ``train`` any object with some of these methods.

    They are called in the first process only, with the :class:`Run`, whose ``stop()`` ends it after the current step.
    """

    def on_start(self, run: Run) -> None:
        """Before the first step."""

    def on_step(self, run: Run) -> None:
        """After every step."""

    def on_evaluate(self, run: Run) -> None:
        """After every evaluation; ``run.history[-1]`` is its record."""

    def on_end(self, run: Run) -> None:
        """After the last step, when the model has its final weights."""


def train(
    model: Model,
    train_set: Dataset,
    valid_set: Dataset | None = None,
    options: TrainOptions | None = None,
    *,
    run: Path | str | None = None,
    resume: bool = False,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
    make_optimizer: MakeOptimizer | None = None,
    **changes: Any,
) -> TrainResult:
    """Fit a model to data.

    A model in closed form is estimated; any other is initialised from the data and trained by gradient steps on its
    ``loss``.  Under ``torchrun`` the batch is shared among the processes.  The caller's random state is left alone.

    A ``budget`` in seconds is turned into a number of steps before the first step: the speed is measured on steps that
    are then taken back.  So the run is the same as one with that number of ``steps``, whose time depends on the
    machine staying as fast as it was.

    Args:
        model: trained in place.
        train_set: may be memory-mapped; it is never copied as a whole to the CPU's memory.
        valid_set: held-out examples for early stopping and for choosing the weights to keep.
        options: how to train.
        run: folder of the run, for ``model.safetensors``, ``state/`` and ``log.jsonl``; None keeps nothing.
        resume: go on from the checkpoint in ``run``, to the bits of a run that was never stopped (same machine and
            number of threads); without a checkpoint start anew.  A finished run is returned as it is.
        callbacks: objects with some of the methods of :class:`Callback`.
        progress: whether to show how it goes on standard error.
        make_optimizer: makes the optimiser of parameter groups, in place of ``options.optimizer``.
        **changes: options by name, which take precedence over ``options``.

    Raises:
        ValueError: an option or a space does not fit, or ``run`` holds a run and ``resume`` is false.
        Diverged: a number was not finite, or the loss ran away; the message says where, and the last checkpoint
            before it is intact.
        KeyboardInterrupt: on SIGINT or SIGTERM, after the step and with a checkpoint.

    >>> from likely.contract import Binary, Bound
    >>> class Coin(Model):
    ...     spaces = (Binary,)
    ...     def __init__(self, space):
    ...         super().__init__(space)
    ...         self.logit = torch.nn.Parameter(torch.zeros(()))
    ...     def bound(self, x, condition=None, noise=None):
    ...         p = torch.distributions.Bernoulli(logits=self.logit)
    ...         return Bound("exact", {"coin": p.log_prob(x).sum(1)})
    >>> data = Dataset(Binary((4,)), torch.tensor([[1.0, 1, 1, 0]]).repeat(50, 1))
    >>> result = train(Coin(data.space), data, data, steps=300, patience=None, learning_rate=0.05, progress=False)
    >>> round(torch.sigmoid(result.model.logit).item(), 2), result.stopped
    (0.75, 'steps')
    """
    keep_memory()
    options = (options or TrainOptions()).with_changes(**changes)
    check_data(model, train_set, "train_set")
    if valid_set is not None:
        check_data(model, valid_set, "valid_set")
    processes = join(options.device)
    with _random_state_kept(processes.device):
        folder = Path(run) if run is not None else None
        work = Run(model, train_set, valid_set, options, processes, folder, callbacks, progress)
        work.prepare_folder(resume)
        return work.estimate() if model.closed_form else work.optimize(resume, make_optimizer)


class Run:
    """One run of :func:`train`; callbacks see it.

    Attributes:
        model: with the weights of the last step (not the averaged ones).
        step: steps made.
        total_steps: steps to make.
        history: records of the evaluations so far.
        best: the best of them, or None.
    """

    def __init__(
        self,
        model: Model,
        train_set: Dataset,
        valid_set: Dataset | None,
        options: TrainOptions,
        processes: Processes,
        folder: Path | None,
        callbacks: Sequence[Any],
        progress: bool,
    ) -> None:
        self.model, self.options, self.processes = model.to(processes.device), options, processes
        self.callbacks = callbacks if processes.first else ()
        self.step = self.total_steps = self.evaluate_every = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self._train_set, self._valid_set, self._valid_every = train_set, valid_set, 1
        if valid_set is not None:
            self._valid_set, self._valid_every = thinned(valid_set, options.evaluate_examples)

        self._folder = folder
        self._checkpoints = Checkpoints(folder / "state") if folder is not None else None
        self._kept: Checkpoint | None = None
        self._saved_step: int | None = None
        self._weights_step = -1
        self._log = Log(folder / "log.jsonl" if folder is not None and processes.first else None)
        self._events: Events | None = None
        self._display: Display = display(progress, model.space) if processes.first else Silent()

        self._best_weights: dict[str, Tensor] | None = None
        self._since_best = 0
        self._stop = ""
        self._first_loss: float | None = None
        self._high_lines = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._next_show = self._next_save = 0.0
        self._next_agreement = 0
        self._clock = Clock(0)

    # The run ------------------------------------------------------------------------------------------------

    def optimize(self, resume: bool, make_optimizer: MakeOptimizer | None) -> TrainResult:
        """Train by gradient steps."""
        self.model.train()
        self._stepper = Stepper(self.model, self._train_set, self.options, self.processes, make_optimizer)
        with self._closing(), _Interrupts() as interrupts:
            self._begin(resume)
            while self.step < self.total_steps and not self._stop:
                self._stepper.advance(self.step, self.total_steps)
                self.step += 1
                if self.step % self.options.log_every == 0:
                    self._write_losses()
                if self.step % self.evaluate_every == 0 or self.step == self.total_steps:
                    self._evaluate()
                self._call("on_step")
                self._agree(interrupts)
                self._by_the_clock()
            return self._finish()

    def estimate(self) -> TrainResult:
        """Fit a model in closed form."""
        with self._closing():
            self._initialise()
            self._log.start()
            self._call("on_start")
            self._display.message(f"estimating {self.model.title()} from {len(self._train_set):,} examples")

            def report(number: int, nats: float | None = None) -> bool:
                record: dict[str, Any] = {"pass": number}
                if nats is not None and math.isfinite(nats):
                    record["nats"] = nats
                    self._display.message(f"pass {number}: {describe_nats(nats, self.model.space)} on the training set")
                self._write(record)
                late = self.options.budget is not None and self._seconds() > self.options.budget
                return bool(self.processes.from_first(late))

            self.model.estimate(self._passes(), report)
            self._stop = "closed form"
            self._evaluate()
            return self._finish()

    # Beginning ----------------------------------------------------------------------------------------------

    def prepare_folder(self, resume: bool) -> None:
        """Make the run folder; refuse one that holds a run, unless it is to be resumed."""
        if self._folder is None or self._checkpoints is None:
            return
        holds_run = self._checkpoints.exist() or (self._folder / "model.safetensors").exists()
        if self.processes.from_first(holds_run) and not resume:
            raise ValueError(
                f"run: expected a folder without a run, got {self._folder}; resume it (resume=True) or choose another"
            )
        self._folder.mkdir(parents=True, exist_ok=True)

    def _begin(self, resume: bool) -> None:
        """Start, or resume from the last checkpoint."""
        stepper = self._stepper
        checkpoint = self._read_checkpoint() if resume else None
        if checkpoint is None:
            stepper.check_memory()
            stepper.seed_initialisation()
            self._initialise()
            stepper.start()
            self._settle_length()
            self._log.start()
        else:
            stepper.start()
            self._restore(checkpoint)
        if stepper.averages is not None:
            stepper.averages.every = AVERAGE_EVERY if self.total_steps >= 100 * AVERAGE_EVERY else 1
        if self.options.tensorboard and self.processes.first:
            self._events = Events(self._folder, purge_step=self.step + 1)
        self._clock = Clock(self.step)
        self._next_agreement = self.step
        place = str(self.processes.device)
        if self.processes.count > 1:
            place += f", {self.processes.count} processes"
        if checkpoint is None:
            number = sum(p.numel() for p in stepper.parameters)
            self._display.message(
                f"training {self.model.title()} ({number:,} parameters) on {len(self._train_set):,} examples: "
                f"{self.total_steps:,} steps of {stepper.batch_size} on {place}"
            )
            self._evaluate()
            self._save()
        elif self._stop or self.step == self.total_steps:
            self._display.message(f"the run is finished, after {self.step:,} steps")
        else:
            self._display.message(f"going on from step {self.step:,} of {self.total_steps:,} on {place}")
        self._next_save = time.monotonic() + self.options.checkpoint_seconds
        self._call("on_start")

    def _passes(self) -> DevicePasses:
        return DevicePasses(Passes(self._train_set, seed=self.options.seed), self.processes.device)

    def _initialise(self) -> None:
        """The model's data-dependent initialisation, the same in every process."""
        self.model.initialise(self._passes())

    def _settle_length(self) -> None:
        """Fix the number of steps and when to evaluate; from here on the run is a function of steps only."""
        options, size = self.options, self._stepper.batch_size
        if options.budget is not None:
            self.total_steps, self.evaluate_every = self.processes.from_first(self._measured_length(options.budget))
            return
        if options.epochs is not None:
            self.total_steps = max(1, math.ceil(options.epochs * len(self._train_set) / size))
        else:
            self.total_steps = options.steps or DEFAULT_STEPS
        evaluation = 4 * len(self._valid_set) // size if self._valid_set is not None else 0  # a tenth of the time
        self.evaluate_every = options.evaluate_every or max(1, self.total_steps // EVALUATIONS, evaluation)

    def _measured_length(self, budget: float) -> tuple[int, int]:
        """Steps that fit in what is left of the budget, and steps between evaluations."""
        start = _copied(self._snapshot())
        self._time_steps(3)  # the first steps are slower
        pace = self._time_steps(3)
        pace = self._time_steps(max(3, min(2000, round(min(3.0, 0.03 * budget) / pace))))
        began = time.monotonic()
        if self._valid_set is not None:
            self._held_out()
        evaluation = time.monotonic() - began
        self._restore(start)
        left = 0.98 * (budget - self._seconds())
        every = self.options.evaluate_every
        if every is not None:
            return max(1, int(left / (pace + evaluation / every))), every
        evaluations = max(1, min(EVALUATIONS, int(0.1 * left / max(evaluation, 1e-9))))
        steps = max(1, int((left - (evaluations + 1) * evaluation) / pace))
        return steps, max(1, steps // evaluations)

    def _time_steps(self, number: int) -> float:
        """Seconds that a step takes."""
        number = self.processes.from_first(number)
        start = time.monotonic()
        for step in range(number):
            self._stepper.advance(step, 1 << 40)
        self._stepper.means()  # waits for the device
        return self.processes.from_first((time.monotonic() - start) / number)

    # Looking on ---------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End the run after the current step; the best weights so far are kept."""
        self._stop = "callback"

    def _call(self, method: str) -> None:
        for callback in self.callbacks:
            function = getattr(callback, method, None)
            if function is not None:
                function(self)

    def _write_losses(self) -> None:
        """One line of the log: the mean loss since the last, and the means of what the model logs."""
        means = self._stepper.means()
        if not all(map(math.isfinite, means.values())):
            self._diagnose()
        loss = means.pop("loss")
        self._write({"step": self.step, "loss": loss, "parts": means})
        self._stepper.forget()
        if self._first_loss is None:
            self._first_loss = loss
        high = loss > self._first_loss + RUNAWAY * max(1.0, abs(self._first_loss))
        self._high_lines = self._high_lines + 1 if high else 0
        if self._high_lines >= RUNAWAY_LINES:
            raise Diverged(
                f"training stopped at step {self.step}: the loss ran away, from {self._first_loss:.4g} at first to "
                f"{loss:.4g} (nats per dimension); try a smaller learning_rate, a longer warmup or clip_norm=1. "
                f"{self._last_good()}",
                self.step,
            )

    def _write(self, record: dict[str, Any]) -> None:
        record = {**record, "seconds": round(self._seconds(), 3)}
        self._log.write(record)
        if self._events is not None:
            self._events.write(record)

    def _evaluate(self) -> None:
        """Held-out bound of the averaged weights; keeps the best ones and decides on early stopping."""
        if self._valid_set is None:
            return
        record = {"step": self.step, **self._held_out()}
        self.history.append(record)
        if self.best is None or record["nats"] > self.best["nats"]:
            self.best, self._since_best = record, 0
            self._best_weights = None if self.model.closed_form else self._stepper.averaged_weights()
        else:
            self._since_best += 1
            if self.options.patience is not None and self._since_best >= self.options.patience:
                self._stop = "early stopping"
        self._write({"step": self.step, "valid": {k: v for k, v in record.items() if k != "step"}})
        self._call("on_evaluate")

    def _held_out(self) -> dict[str, Any]:
        """The held-out record of the averaged weights, worked out by all processes together."""
        assert self._valid_set is not None
        if not self.model.closed_form and not self._stepper.finite_everywhere():
            self._diagnose()
        start, stop = self.processes.share(0, len(self._valid_set))
        own: HeldOut | str | None = None
        if stop > start:
            weights = contextlib.nullcontext() if self.model.closed_form else self._stepper.averaged()
            try:
                with weights:
                    share = self._valid_set.subset(slice(start, stop))
                    own = held_out(self.model, share, batch_size=self.options.evaluate_batch_size)
            except FloatingPointError as error:
                own = f"{error} (row 0 is row {start * self._valid_every} of the held-out set, row 1 is " + (
                    f"{self._valid_every} further)"
                )
        shares = self.processes.gather(own)
        for share in shares:
            if isinstance(share, str):
                raise Diverged(
                    f"training stopped at step {self.step}: on the held-out examples, {share}. {self._last_good()}",
                    self.step,
                )
        parts = [share for share in shares if share is not None]
        nats = torch.cat([share.example_nats for share in parts])
        return {
            "kind": parts[0].kind,
            "n": len(nats),
            "nats": float(nats.mean()),
            "standard_error": standard_error(nats) if len(nats) > 1 else None,
            "parts": {name: math.fsum(s.parts[name] * s.n for s in parts) / len(nats) for name in parts[0].parts},
        }

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _status(self) -> Status:
        rate = self._clock.rate(self.step)
        return Status(
            step=self.step,
            total=self.total_steps,
            examples_per_second=rate * self._stepper.batch_size,
            seconds_left=(self.total_steps - self.step) / rate if rate > 0 else 0.0,
            loss=self._stepper.own_loss() if self.processes.count == 1 else None,
            valid=self.history[-1]["nats"] if self.history else None,
            best=self.best["nats"] if self.best else None,
        )

    def _by_the_clock(self) -> None:
        """Show how it goes and write a checkpoint, when it is time to."""
        now = time.monotonic()
        if now >= self._next_show:
            self._next_show = now + self._display.seconds
            self._display.update(self._status())
        if now >= self._next_save:
            together = self.processes.count == 1
            if together or (self.processes.first and self._stepper.summed == 0):
                self._save(together)

    # Interruptions and checkpoints --------------------------------------------------------------------------

    def _agree(self, interrupts: _Interrupts) -> None:
        """Act on a signal or on ``stop()``; several processes do so after the same step.

        They ask each other about twice a second, and after every evaluation, where they have met anyhow.
        """
        interrupted = interrupts.received
        if self.processes.count > 1:
            if self.step < self._next_agreement and self.step % self.evaluate_every:
                return
            pace = (time.monotonic() - self._started) / max(1, self.step)
            wait = min(1000.0, max(1.0, 0.5 / pace)) if self.processes.first else 0.0
            own = 2.0 if interrupted else float(self._stop == "callback")
            flag, wait = self.processes.largest(own, wait)
            self._next_agreement = self.step + int(wait)
            interrupted = flag == 2.0
            if flag == 1.0 and not self._stop:
                self._stop = "callback"
        if interrupted:
            self._save()
            where = f"; resume it from {self._folder}" if self._folder is not None else "; nothing was kept"
            raise KeyboardInterrupt(f"training interrupted after step {self.step:,} of {self.total_steps:,}{where}")

    def _snapshot(self, together: bool = True) -> Checkpoint:
        """The state of the run; its tensors share memory with the run."""
        tensors: dict[str, Tensor] = {}
        if self._best_weights is not None:
            tensors |= {f"best.{name}": value for name, value in self._best_weights.items()}
        values = {
            "identity": self._identity(),
            "machine": self._machine(),
            "total_steps": self.total_steps,
            "evaluate_every": self.evaluate_every,
            "stepper": self._stepper.state(tensors, together),
            "history": self.history,
            "best": self.best,
            "since_best": self._since_best,
            "stopped": self._stop,
            "first_loss": self._first_loss,
            "high_lines": self._high_lines,
            "seconds": self._seconds(),
            "log_bytes": self._log.sync(),
        }
        return Checkpoint(self.step, values, tensors)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Go to the state of a checkpoint."""
        values, tensors = checkpoint.values, checkpoint.tensors
        self._stepper.restore(values["stepper"], tensors)
        self.step, self.total_steps = checkpoint.step, values["total_steps"]
        self.evaluate_every = values["evaluate_every"]
        self.history, self.best = list(values["history"]), values["best"]
        self._since_best, self._stop = values["since_best"], values["stopped"]
        self._first_loss, self._high_lines = values["first_loss"], values["high_lines"]
        best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
        self._best_weights = {name: value.to(self.processes.device) for name, value in best.items()} or None

    def _save(self, together: bool = True) -> None:
        """Write a checkpoint and the best weights so far; a full disk leaves the last ones intact."""
        start = time.monotonic()
        if not self._stepper.finite():
            if self.processes.count == 1:
                self._diagnose()
            return  # the next line of the log will tell all processes
        checkpoint = self._snapshot(together)
        if self._checkpoints is None:
            self._kept = _copied(checkpoint)
        elif self.processes.first:
            try:
                self._checkpoints.write(checkpoint)
                self._saved_step = checkpoint.step
                self._write_best()
            except OSError as error:
                self._display.warning(
                    f"no checkpoint could be written at step {self.step:,} ({error}); {self._last_good()} "
                    "Training goes on."
                )
        now, wait = time.monotonic(), self.options.checkpoint_seconds
        self._next_save = now + (max(wait, 20.0 * (now - start)) if wait else 0.0)

    def _write_best(self) -> None:
        """Write the best weights so far to ``model.safetensors``, unless they are in it."""
        assert self._folder is not None
        if self._best_weights is None:
            save_tensors(self._stepper.averaged_weights(), self._folder / "model.safetensors")
        elif self.best is not None and self.best["step"] != self._weights_step:
            save_tensors(self._best_weights, self._folder / "model.safetensors")
            self._weights_step = self.best["step"]

    def _last_good(self) -> str:
        """Where the last good checkpoint is, as a sentence."""
        if self._checkpoints is None or self._saved_step is None:
            return "No checkpoint was written."
        return f"The last good checkpoint, of step {self._saved_step:,}, is intact in {self._checkpoints.folder}."

    def _read_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to resume from, if there is one and it is of this very run."""
        checkpoint = self._checkpoints.read(self._display.warning) if self._checkpoints is not None else None
        if checkpoint is None:
            return None
        identity = self._identity()
        for name, expected in checkpoint.values["identity"].items():
            if identity[name] != expected:
                raise ValueError(
                    f"{name}: expected {expected!r} as in the run to resume in {self._folder}, got {identity[name]!r}"
                )
        before, now = checkpoint.values["machine"], self._machine()
        changed = [f"{name} was {before[name]}, is {now[name]}" for name in now if before.get(name) != now[name]]
        if changed:
            self._display.warning(f"the run goes on, but not to the same bits: {'; '.join(changed)}")
        self._saved_step = checkpoint.step
        self._seconds_before = checkpoint.values["seconds"]
        self._log.start(checkpoint.values["log_bytes"])
        return checkpoint

    def _identity(self) -> dict[str, Any]:
        """What must be the same in a run that is resumed."""
        neutral = ("device", "checkpoint_seconds", "tensorboard")
        identity: dict[str, Any] = {"model": self.model.name(), "train_set": fingerprint(self._train_set)}
        if self._valid_set is not None:
            identity["valid_set"] = fingerprint(self._valid_set)
        identity["model_options"] = json.loads(
            json.dumps(self.model.config, default=lambda value: type(value).__name__)
        )
        identity["parameters"] = {name: list(p.shape) for name, p in self.model.named_parameters()}
        identity["optimizer_class"] = type(self._stepper.optimizer).__name__
        identity |= {name: value for name, value in self.options.to_json().items() if name not in neutral}
        return json.loads(json.dumps(identity))

    def _machine(self) -> dict[str, Any]:
        """What must be the same for a resumed run to reach the same bits."""
        return {
            "device": self.processes.device.type,
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": self.processes.count,
            "torch": str(torch.__version__),
        }

    def _diagnose(self) -> NoReturn:
        """Repeat the steps since the last checkpoint, one at a time, to find the first that went wrong."""
        seen, checkpoint = self.step, self._kept
        if self._checkpoints is not None and self._checkpoints.exist():
            checkpoint = self._checkpoints.read(self._display.warning)
        if checkpoint is None:
            raise Diverged(f"training stopped at step {seen}: a number is not finite. {self._last_good()}", seen)
        self._display.message(f"a number is not finite; repeating steps {checkpoint.step:,} to {seen:,} to find it")
        self._restore(checkpoint)
        for step in range(checkpoint.step, seen):
            reports = self.processes.gather(self._stepper.examined(step, self.total_steps))
            faults = [(sentences, rows) for sentences, rows in reports if sentences]
            if faults:
                sentences, rows = faults[0][0], sorted({row for _, rows in faults for row in rows})
                raise Diverged(
                    f"training stopped at step {step}: {'; '.join(sentences)}. {self._last_good()}", step, rows
                )
        raise Diverged(
            f"training stopped at step {seen}: a number was not finite, but not again when the steps were repeated, "
            f"so the device does not compute the same twice. {self._last_good()}",
            seen,
        )

    # Ending -------------------------------------------------------------------------------------------------

    def _finish(self) -> TrainResult:
        """Give the model the weights to keep, and write them."""
        if not self.model.closed_form:
            if not self._stepper.finite_everywhere():
                self._diagnose()
            self._display.update(self._status())
            if self._saved_step != self.step:
                self._save()
            self._stop = self._stop or "steps"
            self.model.load_state_dict(self._best_weights or self._stepper.averaged_weights())
        self.model.eval()
        if self._folder is not None and self.processes.first:
            save_weights(self.model, self._folder / "model.safetensors")
        seconds = self._seconds()
        seen = self.step * self._stepper.batch_size if not self.model.closed_form else len(self._train_set)
        result = TrainResult(
            model=self.model,
            steps=self.step,
            stopped=self._stop,
            valid=self.best,
            history=self.history,
            seconds=seconds,
            examples_per_second=seen / max(seconds, 1e-9),
            device=str(self.processes.device),
            options=self.options,
            total_steps=self.total_steps,
            evaluate_every=self.evaluate_every,
        )
        if self.best is not None:
            nats, error = describe_nats(self.best["nats"], self.model.space), self.best["standard_error"]
            margin = f" ± {error:.2f} nats" if error is not None else ""
            self._display.message(f"held-out {nats}{margin} (step {self.best['step']:,})")
        self._display.message(f"{self._stop}: {self.step:,} steps in {describe_seconds(seconds)}")
        self._call("on_end")
        return result

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        """Close the display, the logs and the threads at the end, however it comes."""
        try:
            yield
        finally:
            self._log.flush()
            self._display.close()
            if self._events is not None:
                self._events.close()
            if not self.model.closed_form:
                self._stepper.close()


class _Interrupts:
    """Within the context SIGINT and SIGTERM are noted; a second one interrupts at once."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Interrupts:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.received:
            raise KeyboardInterrupt("training interrupted at once; the last checkpoint stands")
        self.received = True

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Put the global generators back at the end."""
    apple = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    if apple is not None:
        torch.mps.set_rng_state(apple)


def _copied(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint in memory of its own."""
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in checkpoint.tensors.items()}
    return Checkpoint(checkpoint.step, json.loads(json.dumps(checkpoint.values)), tensors)
