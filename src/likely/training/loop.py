"""The one training loop, for every model.

A run is a function of its options, its data and its model alone.  The examples of step t are positions t·B … (t+1)·B
of an endless seeded order, the noise of step t comes from a generator seeded with (seed, t), and schedules depend on t.
So a run that was killed goes on from its last checkpoint to the bits it would have reached, and a step that went wrong
can be repeated to see why.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from likely.contract import Model
from likely.data.dataset import Dataset, Passes
from likely.evaluation.heldout import HeldOut, held_out, standard_error
from likely.noise import StreamNoise, content_keys
from likely.training import diagnosis
from likely.training.averaging import Averages
from likely.training.checkpoints import (
    Checkpoint,
    Checkpoints,
    Log,
    flatten,
    save_tensors,
    save_weights,
    unflatten,
)
from likely.training.diagnosis import Diverged
from likely.training.optimizers import MakeOptimizer, make_optimizer, parameter_groups
from likely.training.options import DEFAULT_STEPS, TrainOptions
from likely.training.order import Order
from likely.training.processes import LossModule, Processes, joined
from likely.training.progress import Clock, Display, Events, Silent, Status, describe_nats, describe_seconds, display
from likely.training.schedule import learning_rate_factor
from likely.training.seeds import DROPOUT, INITIALISE, NOISE, Seeds

#: Evaluations in a run whose ``evaluate_every`` is not given.
EVALUATIONS = 50
#: Steps between updates of the averaged weights in all but short runs.
AVERAGE_EVERY = 8
#: A loss ran away when it is above its first value by ``RUNAWAY`` times its size, for so many lines of the log.
RUNAWAY, RUNAWAY_LINES = 10.0, 5
#: Bytes of training data that are moved to an accelerator as a whole.
RESIDENT_BYTES = 1 << 31


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
        options: the options, with the length of the run and ``evaluate_every`` as they were settled.
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

    def to_json(self) -> dict[str, Any]:
        """Everything but the model, as JSON values."""
        return {
            "steps": self.steps,
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
    options = (options or TrainOptions()).with_changes(**changes)
    _check_data(model, train_set, "train_set")
    if valid_set is not None:
        _check_data(model, valid_set, "valid_set")
    with joined(options.device) as processes, _random_state_kept(processes.device):
        folder = Path(run) if run is not None else None
        work = Run(model, train_set, valid_set, options, processes, folder, callbacks, progress, make_optimizer)
        return work.estimate(resume) if model.closed_form else work.optimize(resume)


class Run:
    """One run of :func:`train`; callbacks see it.

    Attributes:
        model, options, step, total_steps, history, best, processes: as they are now.
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
        make_custom_optimizer: MakeOptimizer | None,
    ) -> None:
        self.model, self.options, self.processes = model, options, processes
        self.device = processes.device
        self.callbacks = callbacks if processes.first else ()
        self.step = self.total_steps = 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.batch_size = min(options.batch_size, len(train_set))
        self.evaluate_every = options.evaluate_every or 0

        model.to(self.device)
        self._train_set, self._valid_set = _resident(train_set, self.device), _strided(valid_set, options)
        self._folder = folder
        self._checkpoints = Checkpoints(folder / "state") if folder is not None else None
        self._kept: Checkpoint | None = None
        self._log = Log(folder / "log.jsonl" if folder is not None and processes.first else None)
        self._events: Events | None = None
        self._display: Display = display(progress, model.space) if processes.first else Silent()
        self._make_optimizer = make_custom_optimizer

        self._best_weights: dict[str, Tensor] | None = None
        self._since_best = 0
        self._stop = ""
        self._sums: dict[str, Tensor] = {}
        self._summed = 0
        self._first_loss: float | None = None
        self._high_lines = 0
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._saved_step: int | None = None
        self._weights_step = -1
        self._next_show = self._next_save = 0.0
        self._clock = Clock(0)

    # The run ------------------------------------------------------------------------------------------------

    def optimize(self, resume: bool) -> TrainResult:
        """Train by gradient steps."""
        with self._closing(), _Interrupts() as interrupts:
            self._prepare()
            finished = self._begin(resume)
            self._call("on_start")
            due = self.step
            while not finished and self.step < self.total_steps and not self._stop:
                self._advance()
                if self.step % self.options.log_every == 0:
                    self._write_losses()
                if self.step % self.evaluate_every == 0 or self.step == self.total_steps:
                    self._evaluate()
                self._call("on_step")
                if self.step >= due or self.processes.count == 1:
                    due = self._agree(interrupts, due)
                self._by_the_clock()
            return self._finish()

    def _advance(self) -> None:
        """One step: gradient, update, average."""
        self._gradient()
        self._update()

    def _gradient(self) -> None:
        """Put the gradient of the batch of the current step in the parameters, and add its loss to the sums."""
        step, size, count = self.step, self.batch_size, self.processes.count
        self._optimizer.zero_grad(set_to_none=True)
        self._seed_dropout(self._dropout_seeds(step))
        low, high = self.processes.share(0, size)
        pieces = self.options.accumulate
        for piece in range(pieces):
            start = low + (high - low) * piece // pieces
            stop = low + (high - low) * (piece + 1) // pieces
            x, condition, noise = self._batch(step, start, stop)
            share = (stop - start) / size
            with contextlib.ExitStack() as stack:
                if isinstance(self._loss, DistributedDataParallel) and piece < pieces - 1:
                    stack.enter_context(self._loss.no_sync())
                if self._autocast:
                    with torch.autocast(self.device.type, torch.bfloat16):
                        value, log = self._loss(x, condition, noise, step)
                else:
                    value, log = self._loss(x, condition, noise, step)
                (value if share * count == 1.0 else value * (share * count)).backward()
            self._add("loss", value.detach(), share)
            for name, number in log.items():
                self._add(name, number, share)
        self._summed += 1

    def _batch(self, step: int, start: int, stop: int) -> tuple[Tensor, Tensor | None, StreamNoise]:
        """Examples ``start:stop`` of the batch of a step, and their noise."""
        rows = self._order.rows(step * self.batch_size + start, step * self.batch_size + stop)
        own = None if stop - start == self.batch_size else (start, stop, self.batch_size)
        noise = StreamNoise(self._generator.manual_seed(self._noise_seeds(step)), self.device, own)
        data = self._train_set
        if data.x.device == self.device:
            return *data.batch(rows.to(self.device, non_blocking=True), noise), noise
        part = _moved(data.subset(rows), self.device)
        return *part.batch(slice(None), noise), noise

    def _update(self) -> None:
        """Move the weights along the gradient that is in the parameters."""
        options = self.options
        factor = learning_rate_factor(
            self.step, self.total_steps, options.warmup, options.decay, options.decay_fraction
        )
        for group, rate in zip(self._optimizer.param_groups, self._rates):
            group["lr"] = rate * factor
        if options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters, options.clip_norm)
        self._optimizer.step()
        self.step += 1
        if self._averages is not None:
            self._averages.update(self.step)

    def _add(self, name: str, value: Tensor, share: float) -> None:
        total = self._sums.get(name)
        if total is None:
            dtype = torch.float32 if self.device.type == "mps" else torch.float64
            total = self._sums[name] = torch.zeros((), dtype=dtype, device=self.device)
        total.add_(value, alpha=share)

    # Beginning ----------------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        """Make what a step needs."""
        options, model = self.options, self.model
        pieces = self.processes.count * options.accumulate
        if self.batch_size < pieces:
            raise ValueError(
                f"batch_size: expected at least one example for each of {self.processes.count} processes × "
                f"{options.accumulate} pieces, got {self.batch_size}"
            )
        model.train()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        if not self._parameters:
            raise ValueError(f"model {model.name()!r} has no parameters to train")
        self._autocast = options.precision == "bfloat16" or (
            options.precision == "auto" and multiplies_bfloat16(self.device)
        )
        row_bytes = math.prod(self._train_set.x.shape[1:]) * self._train_set.x.element_size()
        self._order = Order(len(self._train_set), options.seed, row_bytes)
        self._noise_seeds = Seeds(options.seed, NOISE)
        self._dropout_seeds = Seeds(options.seed, DROPOUT + 16 * self.processes.rank)
        self._generator = torch.Generator(self.device)
        if self._make_optimizer is not None:
            self._optimizer = self._make_optimizer(parameter_groups(model, options.weight_decay))
        else:
            self._optimizer = make_optimizer(
                options.optimizer, model, options.learning_rate, options.weight_decay, **options.optimizer_options
            )
        self._rates = [float(group["lr"]) for group in self._optimizer.param_groups]

    def _begin(self, resume: bool) -> bool:
        """Resume or start; return whether the run was finished before."""
        resumed = self._read_checkpoint() if resume and self._checkpoints is not None else None
        if not resume and self._checkpoints is not None:
            self._clear()
        if resumed is None:
            self._initialise()
        self._loss: Callable[..., tuple[Tensor, dict[str, Tensor]]] = LossModule(self.model)
        if self.processes.count > 1:
            self._loss = DistributedDataParallel(self._loss, find_unused_parameters=True)  # type: ignore[arg-type]
        if self.options.compile:
            self._loss = torch.compile(self._loss)  # type: ignore[assignment]
        self._averages = None
        if self.options.average:
            fraction, half_life = self.options.average_fraction, self.options.average_half_life
            self._averages = Averages(self._parameters, fraction, half_life)
        if resumed is not None:
            self._restore(resumed)
        else:
            self._settle_length()
        if self._averages is not None:
            self._averages.every = AVERAGE_EVERY if self.total_steps >= 1000 else 1
        if self.options.tensorboard and self.processes.first:
            self._events = Events(self._folder, purge_step=self.step + 1)
        finished = self._stop != "" or (resumed is not None and self.step == self.total_steps)
        place = f"on {self.device}" + (f", {self.processes.count} processes" if self.processes.count > 1 else "")
        if finished:
            self._display.message(f"the run is finished, after {self.step:,} steps")
        elif resumed is not None:
            self._display.message(f"going on from step {self.step:,} of {self.total_steps:,} {place}")
        else:
            number = sum(p.numel() for p in self._parameters)
            self._display.message(
                f"training {self.model.name()} ({number:,} parameters) on {len(self._train_set):,} examples: "
                f"{self.total_steps:,} steps of {self.batch_size} {place}"
            )
            self._log.start()
            self._evaluate()
            self._save()
        self._clock = Clock(self.step)
        return finished

    def _clear(self) -> None:
        """Make the run folder; refuse one that holds a run."""
        assert self._folder is not None and self._checkpoints is not None
        holds_run = self._checkpoints.exist() or (self._folder / "model.safetensors").exists()
        if self.processes.from_first(holds_run):
            raise ValueError(
                f"run: expected a folder without a run, got {self._folder}; resume it (resume=True) or choose another"
            )
        self._folder.mkdir(parents=True, exist_ok=True)

    def _initialise(self) -> None:
        """The model's data-dependent initialisation, the same in every process."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._seed_dropout(Seeds(self.options.seed, INITIALISE)(0))
        self.model.initialise(_OnDevice(Passes(self._train_set, seed=self.options.seed), self.device))

    def _settle_length(self) -> None:
        """Fix the number of steps and when to evaluate; from here on the run is a function of steps only."""
        options, n = self.options, len(self._train_set)
        evaluation_steps = 4 * len(self._valid_set) // self.batch_size if self._valid_set is not None else 0
        if options.budget is not None:
            self.total_steps, self.evaluate_every = self.processes.from_first(self._measured_length(options.budget))
            return
        if options.epochs is not None:
            self.total_steps = max(1, math.ceil(options.epochs * n / self.batch_size))
        else:
            self.total_steps = options.steps or DEFAULT_STEPS
        self.evaluate_every = options.evaluate_every or max(1, self.total_steps // EVALUATIONS, evaluation_steps)

    def _measured_length(self, budget: float) -> tuple[int, int]:
        """Steps that fit in what is left of the budget, and steps between evaluations."""
        before = _copied(self._snapshot())
        self.total_steps = 1 << 40
        for _ in range(3):
            self._advance()
        pace = self._time_steps(3)
        pace = self._time_steps(max(3, min(2000, round(min(3.0, 0.03 * budget) / pace))))
        evaluation = 0.0
        if self._valid_set is not None:
            start = time.monotonic()
            self._measure_valid()
            evaluation = time.monotonic() - start
        self._restore(before)
        left = 0.98 * (budget - self._seconds())
        every = self.options.evaluate_every
        if every is None:
            evaluations = EVALUATIONS if evaluation == 0 else min(EVALUATIONS, max(1, int(0.1 * left / evaluation)))
            steps = max(1, int((left - (evaluations + 1) * evaluation) / pace))
            return steps, max(1, steps // evaluations)
        return max(1, int(left / (pace + evaluation / every))), every

    def _time_steps(self, number: int) -> float:
        """Seconds a step takes."""
        number = self.processes.from_first(number)
        start = time.monotonic()
        for _ in range(number):
            self._advance()
        bool(self._sums["loss"] > 0)  # waits for the device
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

    def _means(self) -> dict[str, float]:
        """Means of the loss and of what the model logs since the last line of the log.

        Raises:
            Diverged: one is not finite.
        """
        names = list(self._sums)
        numbers = torch.stack(self.processes.sum(list(self._sums.values()))).tolist() if names else []
        if not all(map(math.isfinite, numbers)):
            self._diagnose()
        return {name: number / self._summed for name, number in zip(names, numbers)}

    def _write_losses(self) -> None:
        """One line of the log: the loss since the last."""
        means = self._means()
        loss = means.pop("loss")
        self._write({"step": self.step, "loss": loss, "parts": means})
        self._sums, self._summed = {}, 0
        if self._first_loss is None:
            self._first_loss = loss
        limit = self._first_loss + RUNAWAY * max(1.0, abs(self._first_loss))
        self._high_lines = self._high_lines + 1 if loss > limit else 0
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
        if self._sums:
            self._means()
        if not diagnosis.all_finite(self._parameters):
            self._diagnose()
        record = {"step": self.step, **self._measure_valid()}
        self.history.append(record)
        if self.best is None or record["nats"] > self.best["nats"]:
            self.best, self._since_best = record, 0
            with self._averaged():
                self._best_weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        else:
            self._since_best += 1
            if self.options.patience is not None and self._since_best >= self.options.patience:
                self._stop = "early stopping"
        self._write({"step": self.step, "valid": {k: v for k, v in record.items() if k != "step"}})
        self._call("on_evaluate")

    def _measure_valid(self) -> dict[str, Any]:
        """The held-out record of the averaged weights, worked out by all processes together."""
        assert self._valid_set is not None
        processes, data = self.processes, self._valid_set
        start, stop = processes.share(0, len(data))
        own, message = None, ""
        if stop > start:
            try:
                with self._averaged():
                    size = self.options.evaluate_batch_size
                    own = held_out(self.model, data.subset(slice(start, stop)), batch_size=size)
            except FloatingPointError as error:
                message = str(error)
        shares: list[tuple[HeldOut | None, str]] = processes.gather((own, message))
        messages = [text for _, text in shares if text]
        if messages:
            raise Diverged(
                f"training stopped at step {self.step}: on the held-out examples, {messages[0]} "
                f"(counted from row {start} of those used). {self._last_good()}",
                self.step,
            )
        parts = [share for share, _ in shares if share is not None]
        nats = torch.cat([share.example_nats for share in parts])
        n = len(nats)
        return {
            "kind": parts[0].kind,
            "n": n,
            "nats": float(nats.mean()),
            "standard_error": standard_error(nats),
            "parts": {name: math.fsum(s.parts[name] * s.n for s in parts) / n for name in parts[0].parts},
        }

    def _averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within the context the model has its averaged weights."""
        return self._averages.applied() if self._averages is not None else contextlib.nullcontext()

    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def status(self, rate: float) -> Status:
        """What to show, at ``rate`` steps a second."""
        loss = None
        if self._sums and self._summed and self.processes.count == 1:
            loss = float(self._sums["loss"]) / self._summed
        return Status(
            step=self.step,
            total=self.total_steps,
            examples_per_second=rate * self.batch_size,
            seconds_left=(self.total_steps - self.step) / rate if rate > 0 else 0.0,
            loss=loss,
            valid=self.history[-1]["nats"] if self.history else None,
            best=self.best["nats"] if self.best else None,
        )

    # Interruptions and checkpoints --------------------------------------------------------------------------

    def _agree(self, interrupts: _Interrupts, due: int) -> int:
        """Act on a signal or on ``stop()``, in all processes after the same step; return when to ask again."""
        if self.processes.count > 1:
            pace = self._seconds() / max(1, self.step)
            own = 2.0 if interrupts.received else float(self._stop == "callback")
            wait = max(1.0, min(1000.0, 0.5 / max(pace, 1e-9))) if self.processes.first else 0.0
            flag, wait = self.processes.largest(own, wait)
            due += int(wait)
            interrupted = flag == 2.0
            if flag == 1.0:
                self._stop = self._stop or "callback"
        else:
            interrupted = interrupts.received
        if interrupted:
            self._save()
            where = f"; resume it from {self._folder}" if self._folder is not None else " (nothing was kept)"
            raise KeyboardInterrupt(f"training interrupted after step {self.step:,} of {self.total_steps:,}{where}")
        return due

    def _snapshot(self, together: bool = True) -> Checkpoint:
        """The state of the run, sharing memory with it where possible.

        Args:
            together: whether all processes are here; if not, there are no sums to collect.
        """
        own = {name: float(total) for name, total in self._sums.items()}
        sums = self.processes.gather(own) if together else [{}] * self.processes.count
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self._averages is not None:
            tensors |= {f"average.{i}": value for i, value in enumerate(self._averages.values)}
        if self._best_weights is not None:
            tensors |= {f"best.{name}": value for name, value in self._best_weights.items()}
        optimizer = flatten(self._optimizer.state_dict(), tensors, "optimizer")
        values = {
            "identity": self._identity(),
            "total_steps": self.total_steps,
            "evaluate_every": self.evaluate_every,
            "optimizer": optimizer,
            "sums": sums,
            "summed": self._summed,
            "first_loss": self._first_loss,
            "high_lines": self._high_lines,
            "history": self.history,
            "best": self.best,
            "since_best": self._since_best,
            "stopped": self._stop,
            "seconds": self._seconds(),
            "log_bytes": self._log.sync(),
            "machine": self._machine(),
        }
        return Checkpoint(self.step, values, tensors)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Go back (or on) to a checkpoint."""
        values, tensors = checkpoint.values, checkpoint.tensors
        self.step, self.total_steps = checkpoint.step, values["total_steps"]
        self.evaluate_every = values["evaluate_every"]
        self.model.load_state_dict(_named(tensors, "model."))
        if self._averages is not None:
            torch._foreach_copy_(self._averages.values, [
                tensors[f"average.{i}"].to(self.device) for i in range(len(self._averages.values))
            ])  # fmt: skip
        best = _named(tensors, "best.")
        self._best_weights = {name: value.to(self.device).clone() for name, value in best.items()} or None
        _restore_optimizer(self._optimizer, unflatten(values["optimizer"], tensors))
        self._sums = {}
        sums = values["sums"]
        for name, total in (sums[self.processes.rank] if len(sums) == self.processes.count else {}).items():
            self._add(name, torch.tensor(total, dtype=torch.float64), 1.0)
        self._summed = values["summed"]
        self._first_loss, self._high_lines = values["first_loss"], values["high_lines"]
        self.history, self.best = list(values["history"]), values["best"]
        self._since_best, self._stop = values["since_best"], values["stopped"]

    def _by_the_clock(self) -> None:
        """Show how it goes and write a checkpoint, when it is time to."""
        now = time.monotonic()
        if now >= self._next_show:
            self._next_show = now + self._display.seconds
            self._display.update(self.status(self._clock.rate(self.step)))
        together = self.processes.count == 1
        if now >= self._next_save and (together or (self.processes.first and not self._sums)):
            self._save(together)

    def _save(self, together: bool = True) -> None:
        """Write a checkpoint and the best weights so far; a full disk leaves the last ones intact."""
        start = time.monotonic()
        if not diagnosis.all_finite([*self._parameters, *self._sums.values()]):
            if self.processes.count == 1:
                self._diagnose()
            return  # the next line of the log will find out, in all processes
        checkpoint = self._snapshot(together)
        if self._checkpoints is None:
            self._kept = _copied(checkpoint)
        elif self.processes.first:
            try:
                if checkpoint.step != self._saved_step:
                    self._checkpoints.write(checkpoint)
                    self._saved_step = checkpoint.step
                self._save_weights()
            except OSError as error:
                self._display.warning(
                    f"no checkpoint could be written at step {self.step:,} ({error}); {self._last_good()} "
                    "Training goes on."
                )
        took = time.monotonic() - start
        self._next_save = start + max(self.options.checkpoint_seconds, 20.0 * took)

    def _save_weights(self) -> None:
        """Write ``model.safetensors``, if the weights to keep are others than those in it."""
        assert self._folder is not None
        if self._best_weights is None:
            with self._averaged():
                save_weights(self.model, self._folder / "model.safetensors")
        elif self.best is not None and self.best["step"] != self._weights_step:
            save_tensors(self._best_weights, self._folder / "model.safetensors")
            self._weights_step = self.best["step"]

    def _last_good(self) -> str:
        """Where the last good checkpoint is, as a sentence."""
        if self._checkpoints is None or self._saved_step is None:
            return "No checkpoint was written."
        return f"The last good checkpoint, of step {self._saved_step:,}, is intact in {self._checkpoints.folder}."

    def _read_checkpoint(self) -> Checkpoint | None:
        """The checkpoint to resume from, if it is one of this very run."""
        assert self._checkpoints is not None
        checkpoint = self._checkpoints.read(self._display.warning)
        if checkpoint is None:
            return None
        for name, expected in checkpoint.values["identity"].items():
            got = self._identity()[name]
            if got != expected:
                raise ValueError(
                    f"{name}: expected {expected!r} as in the run to resume in {self._folder}, got {got!r}"
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
        neutral = ("device", "log_every", "checkpoint_seconds", "tensorboard")
        options = {name: value for name, value in self.options.to_json().items() if name not in neutral}
        data = {"train_set": _fingerprint(self._train_set)}
        if self._valid_set is not None:
            data["valid_set"] = _fingerprint(self._valid_set)
        shapes = {name: list(p.shape) for name, p in self.model.named_parameters()}
        custom = getattr(self._make_optimizer, "__qualname__", None)
        named = {"model": self.model.name(), "parameters": shapes, **data, "make_optimizer": custom, **options}
        return json.loads(json.dumps(named))

    def _machine(self) -> dict[str, Any]:
        """What must be the same for a resumed run to reach the same bits."""
        return {
            "device": self.device.type,
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
            "processes": self.processes.count,
            "torch": str(torch.__version__),
        }

    def _diagnose(self) -> NoReturn:
        """Repeat the steps since the last checkpoint, one at a time, to find the first one that went wrong."""
        seen = self.step
        checkpoint = self._kept
        if self._checkpoints is not None:
            checkpoint = self._checkpoints.read(self._display.warning)
        if checkpoint is None:
            raise Diverged(f"training stopped at step {seen}: the loss is not finite. {self._last_good()}", seen)
        self._display.message(f"a number is not finite; repeating steps {checkpoint.step:,} to {seen:,} to find it")
        self._restore(checkpoint)
        while self.step < seen:
            step = self.step
            self._sums = {}
            self._gradient()
            sentences, rows = self._examine()
            if not sentences:
                self._update()
                sentences = diagnosis.explain_weights(self.model)
            reports = self.processes.gather((sentences, rows))
            if any(found for found, _ in reports):
                found = next(found for found, _ in reports if found)
                guilty = sorted({row for sentences, rows in reports if sentences for row in rows})
                raise Diverged(
                    f"training stopped at step {step}: {'; '.join(found)}. {self._last_good()}", step, guilty
                )
        raise Diverged(
            f"training stopped at step {seen}: a number was not finite, but not again when the steps were repeated, "
            f"so the device does not compute the same twice. {self._last_good()}",
            seen,
        )

    def _examine(self) -> tuple[list[str], list[int]]:
        """Sentences on what is wrong with the loss and gradient of the current step, and the rows at fault."""
        step, size = self.step, self.batch_size
        start, stop = self.processes.share(0, size)
        rows = self._order.rows(step * size + start, step * size + stop).tolist()
        if not all(bool(torch.isfinite(total)) for total in self._sums.values()):
            self._seed_dropout(self._dropout_seeds(step))
            x, condition, _ = self._batch(step, start, stop)

            def noise() -> StreamNoise:
                again = self._batch(step, start, stop)[2]
                self._seed_dropout(self._dropout_seeds(step))
                return again

            return diagnosis.explain_loss(self.model, x, condition, noise, step, rows)
        return diagnosis.explain_gradient(self.model), rows

    # Ending -------------------------------------------------------------------------------------------------

    def _finish(self) -> TrainResult:
        """Give the model the weights to keep, and write them."""
        if not self._stop:
            self._stop = "steps"
        if self._sums:
            self._means()
        self._save()
        if self._best_weights is not None:
            self.model.load_state_dict(self._best_weights)
        elif self._averages is not None:
            with torch.no_grad():
                torch._foreach_copy_(list[Tensor](self._parameters), self._averages.values)
        self.model.eval()
        if self._folder is not None and self.processes.first:
            save_weights(self.model, self._folder / "model.safetensors")
        result = self._result()
        self._display.update(self.status(self._clock.rate(self.step)))
        if self.best is not None:
            self._display.message(
                f"held-out {describe_nats(self.best['nats'], self.model.space)} "
                f"(± {self.best['standard_error']:.2f} nats) at step {self.best['step']:,}; "
                f"stopped after {self.step:,} steps, {describe_seconds(result.seconds)} ({self._stop})"
            )
        self._call("on_end")
        return result

    def _result(self) -> TrainResult:
        seconds = self._seconds()
        settled = {"steps": self.total_steps, "epochs": None, "budget": None, "evaluate_every": self.evaluate_every}
        return TrainResult(
            model=self.model,
            steps=self.step,
            stopped=self._stop,
            valid=self.best,
            history=self.history,
            seconds=seconds,
            examples_per_second=self.step * self.batch_size / seconds,
            device=str(self.device),
            options=self.options if self.model.closed_form else replace(self.options, **settled),  # type: ignore[arg-type]
        )

    def estimate(self, resume: bool) -> TrainResult:
        """Fit a model in closed form."""
        with self._closing():
            if self._checkpoints is not None and not resume:
                self._clear()
            self._initialise()
            self._log.start()
            self._call("on_start")
            self._display.message(f"estimating {self.model.name()} from {len(self._train_set):,} examples")
            self.model.train()

            def report(number: int, nats: float | None = None) -> None:
                known = nats is not None and math.isfinite(nats)
                text = f", {describe_nats(nats, self.model.space)} on the training set" if known else ""  # type: ignore[arg-type]
                self._display.message(f"pass {number}{text}")
                self._write({"pass": number} | ({"nats": nats} if known else {}))

            self.model.estimate(_OnDevice(Passes(self._train_set, seed=self.options.seed), self.device), report)
            self.model.eval()
            if self._valid_set is not None:
                self.best = {"step": 0, **self._measure_valid()}
                self.history.append(self.best)
                self._write({"valid": self.best})
                self._display.message(f"held-out {describe_nats(self.best['nats'], self.model.space)}")
                self._call("on_evaluate")
            if self._folder is not None and self.processes.first:
                save_weights(self.model, self._folder / "model.safetensors")
            self._stop = "closed form"
            self._call("on_end")
            return replace(self._result(), examples_per_second=len(self._train_set) / max(self._seconds(), 1e-9))

    @contextlib.contextmanager
    def _closing(self) -> Iterator[None]:
        """Close the display and the logs at the end, however it comes."""
        try:
            yield
        finally:
            self._log.flush()
            self._display.close()
            if self._events is not None:
                self._events.close()

    def _seed_dropout(self, seed: int) -> None:
        """Seed the global generators, from which layers like dropout draw."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)


# --------------------------------------------------------------------------------------------------------------
# Helpers
# --------------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class _OnDevice:
    """Batches moved to a device."""

    batches: Passes
    device: torch.device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for x, condition in self.batches:
            yield x.to(self.device), None if condition is None else condition.to(self.device)

    def __len__(self) -> int:
        return len(self.batches)


@contextlib.contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Put the global generators back at the end."""
    apple = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    if apple is not None:
        torch.mps.set_rng_state(apple)


def _check_data(model: Model, data: Dataset, name: str) -> None:
    if len(data) == 0:
        raise ValueError(f"{name}: expected at least one example, got none")
    if data.space != model.space:
        raise ValueError(f"{name}: expected examples of the model's space {model.space}, got {data.space}")
    if data.condition_space != model.condition:
        raise ValueError(f"{name}: expected a condition in {model.condition}, got {data.condition_space}")


def _moved(data: Dataset, device: torch.device) -> Dataset:
    condition = None if data.condition is None else data.condition.to(device, non_blocking=True)
    return replace(data, x=data.x.to(device, non_blocking=True), condition=condition)


def _resident(data: Dataset, device: torch.device) -> Dataset:
    """The data on the accelerator if they are small; where they are, otherwise."""
    small = data.x.numel() * data.x.element_size() <= RESIDENT_BYTES
    return _moved(data, device) if device.type != "cpu" and small else data


def _strided(data: Dataset | None, options: TrainOptions) -> Dataset | None:
    """At most ``evaluate_examples`` examples, evenly from the whole (a view)."""
    if data is None or options.evaluate_examples is None or len(data) <= options.evaluate_examples:
        return data
    return data.subset(slice(None, None, -(-len(data) // options.evaluate_examples)))


def _fingerprint(data: Dataset) -> dict[str, Any]:
    """What tells one dataset from another at little cost: size, space, and a hash of a few examples."""
    step = max(1, len(data) // 64)
    some = data.subset(slice(None, None, step))
    keys = content_keys(some.x, some.condition)
    return {"n": len(data), "space": data.space.to_json(), "hash": int(keys.sum())}


def _copied(checkpoint: Checkpoint) -> Checkpoint:
    tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in checkpoint.tensors.items()}
    return Checkpoint(checkpoint.step, json.loads(json.dumps(checkpoint.values)), tensors)


def _named(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state; ``load_state_dict`` casts it to the parameters' type, this does not."""
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        own = optimizer.state[parameters[number]]
        for name, value in values.items():
            if isinstance(value, Tensor):
                own[name] = value.to(own[name].device, copy=True)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bfloat16 natively, faster than float32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
