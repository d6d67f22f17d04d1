"""How to train: every option with its default, checked where it enters."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from likely.contract import check_options
from likely.optim.schedules import Decay

Precision = Literal["float32", "bfloat16", "auto"]

#: Length of a run for which neither ``steps`` nor ``epochs`` nor ``budget`` is given.
DEFAULT_STEPS = 20_000


@dataclass(frozen=True)
class TrainOptions:
    """How to train.

    Args:
        seed: seed of everything random in the run.
        steps: length of the run in optimiser steps (default 20,000 where nothing else is said).
        epochs: length of the run in passes over the training set.
        budget: length of the run in seconds; see :func:`likely.training.train`.
        batch_size: examples in a batch, over all processes.
        accumulate: number of pieces in which a batch is worked off, to save memory; the result is the same.
        optimizer: one of :data:`likely.training.optimizers.OPTIMIZERS`: adamw, adam, adamax, nadam, …
        learning_rate: the highest rate.
        weight_decay: of matrices and larger tensors.
        optimizer_options: further options of the optimiser, such as ``betas`` or ``momentum``.
        warmup: steps over which the learning rate rises from zero.
        decay: ``cosine`` or ``linear`` to zero at the end of the run, ``inverse_sqrt`` from the end of the warm-up
            on, or ``constant``.
        decay_fraction: ``cosine`` and ``linear`` take up this last fraction of the run.
        clip_norm: largest global norm of the gradient, or None.
        average: whether averaged weights are evaluated, kept and saved.
        average_fraction: half-life of the average, as a fraction of the steps so far.
        average_half_life: longest half-life of the average in steps, or None.
        schedule_free: whether the optimiser runs inside :class:`likely.optim.ScheduleFree`, whose average takes the
            place of the one above and of a decay of the learning rate: ``decay`` must be ``constant``.  The Adam family
            then has β₁ = 0 unless ``optimizer_options`` say otherwise.
        evaluate_every: steps between evaluations on the held-out set; by default about fifty in a run.
        evaluate_examples: at most so many held-out examples are used during training, or None for all.
        evaluate_batch_size: examples in a batch of an evaluation.
        patience: stop after so many evaluations without a better one, or None for never.
        precision: ``float32``, ``bfloat16`` (matrix products in bfloat16, weights in float32) or ``auto`` (bfloat16
            where the device multiplies it natively).  Evaluation is always done in the weights' own precision.
        compile: whether the loss is compiled by ``torch.compile``.
        device: ``auto`` (CUDA, else Apple's GPU, else CPU) or a name of PyTorch's.
        log_every: steps between lines of the log.
        checkpoint_seconds: seconds between checkpoints, or more where they take more than a twentieth of the time; 0
            for one after every step.
        tensorboard: whether to write TensorBoard events.
    """

    seed: int = 0
    steps: int | None = None
    epochs: float | None = None
    budget: float | None = None
    batch_size: int = 128
    accumulate: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    warmup: int = 100
    decay: Decay = "cosine"
    decay_fraction: float = 1.0
    clip_norm: float | None = None
    average: bool = True
    average_fraction: float = 0.05
    average_half_life: float | None = None
    schedule_free: bool = False
    evaluate_every: int | None = None
    evaluate_examples: int | None = 10_000
    evaluate_batch_size: int = 500
    patience: int | None = 10
    precision: Precision = "float32"
    compile: bool = False
    device: str = "auto"
    log_every: int = 100
    checkpoint_seconds: float = 30.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if sum(length is not None for length in (self.steps, self.epochs, self.budget)) > 1:
            raise ValueError("steps, epochs, budget: expected at most one of them")
        for name in ("steps", "batch_size", "accumulate", "evaluate_every", "evaluate_examples", "log_every",
                     "evaluate_batch_size", "patience"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < 1):
                raise ValueError(f"{name}: expected a positive whole number, got {value!r}")
        for name in ("epochs", "budget", "learning_rate", "clip_norm", "average_half_life"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        for name in ("weight_decay", "warmup", "checkpoint_seconds"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: expected zero or more, got {value!r}")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction: expected a number from 0 to 1, got {self.decay_fraction!r}")
        if not 0 < self.average_fraction < 1:
            raise ValueError(f"average_fraction: expected a number between 0 and 1, got {self.average_fraction!r}")
        if self.decay not in get_args(Decay):
            raise ValueError(f"decay: expected one of {', '.join(get_args(Decay))}, got {self.decay!r}")
        if self.schedule_free and self.decay != "constant":
            raise ValueError(f"schedule_free: expected decay='constant' with it, got {self.decay!r}")
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision: expected one of {', '.join(get_args(Precision))}, got {self.precision!r}")

    def with_changes(self, **changes: Any) -> TrainOptions:
        """These options with some changed; an unknown name is refused with the nearest valid one.

        >>> TrainOptions().with_changes(steps=100).steps
        100
        >>> TrainOptions().with_changes(learning_rat=1.0)
        Traceback (most recent call last):
            ...
        ValueError: ... has no option 'learning_rat'; did you mean 'learning_rate'? ...
        """
        check_options(TrainOptions, changes)
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The options as JSON values."""
        return asdict(self)
