"""Which model: successive halving over a short list, judged by the held-out bound.

Every candidate is fitted for a short time, the better half goes on for twice as long, and so on until one is left
(Jamieson & Talwalkar 2016, arXiv:1502.07943, algorithm 1).  Models in closed form take part once, with all they need.
Half of the budget is spent so, and a quarter for models that train even where those in closed form took longer; the
rest is left to whoever fits the winner.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from likely.contract import Model, Reals, Space, Table, Unsupported
from likely.data.dataset import Dataset
from likely.memory import TooLittleMemory
from likely.models import find, names
from likely.training.loop import train
from likely.training.options import DEFAULT_STEPS, TrainOptions

#: Budget of a search for which neither a budget nor a number of steps is given, in seconds.
DEFAULT_BUDGET = 60.0
#: A trained candidate that would get fewer seconds or steps than these does not start.
LEAST_SECONDS, LEAST_STEPS = 1.0, 20

Train = Callable[..., Any]
Build = Callable[[str, Mapping[str, Any]], Model]


@dataclass(frozen=True)
class Candidate:
    """A model that may be chosen.

    Args:
        name: of the model.
        options: of the model.
        training: options of the training that the model wants.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)

    @property
    def closed_form(self) -> bool:
        """Whether it is fitted without gradient steps."""
        return find(self.name).closed_form

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items() if value is not None)])


@dataclass(frozen=True)
class Trial:
    """How a candidate did.

    Args:
        model: its name.
        options: its options.
        nats: held-out nats per example, or None where the model is not defined on the data, or too large for memory.
        length: seconds (or steps) that it was trained for; None in closed form.
        seconds: how long it took.
    """

    model: str
    options: dict[str, Any]
    nats: float | None
    length: float | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The trial as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """The winner of a search.

    Args:
        candidate: the winner.
        trials: all trials, in their order.
        seconds: how long the search took.
    """

    candidate: Candidate
    trials: list[Trial]
    seconds: float


def shortlist(space: Space, examples: int, conditional: bool = False, closed_form: bool = False) -> list[Candidate]:
    """Models worth a trial on this data, those in closed form first, in the order of their size.

    >>> [str(c) for c in shortlist(Reals((3,)), 500, closed_form=True)]
    ['gaussian', 'mixture components=2 covariance=full', 'mixture components=5 covariance=full', ...]

    Args:
        examples: number of training examples.
        conditional: whether the model has to take a condition.
        closed_form: whether only models without gradient steps are wanted: the same choice on any machine.
    """
    found: list[Candidate] = []
    sizes = [k for k in (2, 5, 10, 20, 50, 100) if k == 2 or k * 20 <= examples]
    small = space.dims <= 256
    if isinstance(space, Reals):
        found.append(Candidate("gaussian"))
        if small:
            found += [Candidate("mixture", {"components": k, "covariance": "full"}) for k in sizes]
        found += [Candidate("nsf", {}), Candidate("maf", {})]
    elif isinstance(space, Table):
        found += [Candidate("gaussian"), *(Candidate("mixture", {"components": k}) for k in sizes[1::2] or sizes)]
        found.append(Candidate("made"))
        found.append(_VAE_OF_TABLES)
    else:
        found += [Candidate("mixture", {"components": k}) for k in sizes[1::2] or sizes] if small else []
        found.append(Candidate("vae"))
    able = names()
    there = [candidate for candidate in found if candidate.name in able]
    fit = [c for c in there if isinstance(space, find(c.name).spaces)]
    return [
        c
        for c in fit
        if (find(c.name).conditional or not conditional) and (find(c.name).closed_form or not closed_form)
    ]


#: Measured on Adult: benchmarks/adult.py.
_VAE_OF_TABLES = Candidate(
    "vae",
    {
        "latent_dim": 16,
        "hidden": [256, 256],
        "prior": "mixture",
        "prior_options": {"components": 50},
        "gradient": "path",
    },
    {"batch_size": 500, "learning_rate": 2e-3},
)


def choose(
    candidates: Sequence[Candidate],
    build: Build,
    train_set: Dataset,
    valid_set: Dataset,
    options: TrainOptions,
    *,
    trainer: Train = train,
    report: Callable[[str], None] | None = None,
) -> Choice:
    """The candidate with the highest held-out bound.

    Args:
        candidates: see :func:`shortlist`.
        build: makes an untrained model of a name and options.
        train_set, valid_set: what the candidates are fitted to and judged on.
        options: of the training; its ``budget`` (seconds, half of which the search takes) or ``steps`` (of the final
            fit, half as many in all for the search, and the same choice on any machine) says how long.
        trainer: fits a model, as :func:`~likely.training.train`.
        report: called with a line on every trial.

    Raises:
        ValueError: no candidate is defined on the data.
    """
    started = time.monotonic()
    by_steps = options.steps is not None or options.epochs is not None
    whole = float(_steps(options, len(train_set))) if by_steps else options.budget or DEFAULT_BUDGET
    trials: list[Trial] = []
    standing: list[tuple[float, Candidate]] = []

    def attempt(candidate: Candidate, length: float | None) -> None:
        begun = time.monotonic()
        changes: dict[str, Any] = {**candidate.training, "steps": None, "epochs": None, "budget": None}
        if length is not None:
            changes["steps" if by_steps else "budget"] = int(length) if by_steps else length
        nats: float | None = None
        try:
            model = build(candidate.name, candidate.options)
            result = trainer(model, train_set, valid_set, options.with_changes(**changes), progress=False)
            nats = result.valid["nats"]
        except (Unsupported, FloatingPointError, TooLittleMemory):
            pass
        seconds = time.monotonic() - begun
        trained = None if candidate.closed_form else length
        trials.append(Trial(candidate.name, dict(candidate.options), nats, trained, round(seconds, 3)))
        if nats is not None:
            standing.append((nats, candidate))
        if report is not None:
            said = "not possible here" if nats is None else f"{nats:.3f} nats held out"
            report(f"{candidate}: {said} ({seconds:.1f} s)")

    # 1. closed forms, until they have taken a quarter of the time; a larger one that is worse ends its family.  EM ends
    #    with that time too, but not where there is nothing else: then the choice is the same on any machine
    previous: dict[str, float] = {}
    hurried = not by_steps and not all(candidate.closed_form for candidate in candidates)
    for candidate in (c for c in candidates if c.closed_form):
        left = whole / 4 - (time.monotonic() - started)
        late = not by_steps and left < 0
        if candidate.name in previous and (late or previous[candidate.name] < _best(standing)):
            continue
        attempt(candidate, max(left, LEAST_SECONDS) if hurried else None)
        previous[candidate.name] = trials[-1].nats if trials[-1].nats is not None else -float("inf")
    closed = list(standing)

    # 2. rungs of trained models
    running = [c for c in candidates if not c.closed_form]
    rungs = max(1, len(running).bit_length())
    left = whole / 2 if by_steps else max(whole / 2 - (time.monotonic() - started), whole / 4)
    for rung in range(rungs):
        length = left / rungs / max(len(running), 1)
        if not running or length < (LEAST_STEPS if by_steps else LEAST_SECONDS):
            break
        if rung and len(running) == 1 and running[0] is max(standing, key=_nats)[1]:
            break  # it leads already: the time is better spent on the final fit
        standing = list(closed)
        for candidate in running:
            attempt(candidate, length)
        tried = sorted((entry for entry in standing if not entry[1].closed_form), key=_nats, reverse=True)
        running = [candidate for _, candidate in tried[: max(1, len(running) // 2)]]
    if not standing:
        raise ValueError("model: no candidate is defined on the data; choose one with --model (`likely models`)")
    return Choice(max(standing, key=_nats)[1], trials, time.monotonic() - started)


def _nats(entry: tuple[float, Candidate]) -> float:
    return entry[0]


def _best(standing: Sequence[tuple[float, Candidate]]) -> float:
    return max((nats for nats, _ in standing), default=-float("inf"))


def _steps(options: TrainOptions, examples: int) -> int:
    """Length of the final fit in steps."""
    if options.steps is not None:
        return options.steps
    if options.epochs is not None:
        return max(1, round(options.epochs * examples / options.batch_size))
    return DEFAULT_STEPS
