"""What is checked: a model on a tiny space, with data, before and after a moment of training."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor

from likely import models
from likely.checks.estimates import Estimate, evaluate_bound, repeat, row_noise, weigh
from likely.checks.outcome import CheckResult
from likely.checks.points import Points, points_of
from likely.checks.source import Source, batch_of
from likely.contract import (
    Binary,
    Column,
    Counts,
    Integers,
    Model,
    Reals,
    Space,
    Table,
    Tokens,
    Unsupported,
    space_from_json,
)
from likely.noise import StreamNoise

#: Examples of the source that a tiny model is trained on, gradient steps that it is given, and their rate (Adam).
TRAINING_EXAMPLES, TRAINING_STEPS, LEARNING_RATE = 2048, 240, 2e-2
#: Fresh examples on which averages are taken, and samples whose frequencies are counted.
FRESH_EXAMPLES, SAMPLES = 4096, 20_000

_TINY: dict[type[Space], tuple[Space, ...]] = {
    Binary: (Binary((2, 3)), Binary((1, 2, 4))),
    Integers: (Integers((2,), 3), Integers((1, 2, 2), 3)),
    Reals: (Reals((2,)), Reals((3, 1, 1))),  # three dimensions: more cannot be summed where a density is sharp
    Counts: (Counts((2,)),),
    Tokens: (Tokens(3, 3),),
    Table: (
        Table(
            columns=(
                Column("colour", "categorical", levels=3),
                Column("size", "real", resolution=0.5),
                Column("visits", "integer"),
                Column("member", "binary"),
            )
        ),
        Table(columns=(Column("colour", "categorical", levels=3), Column("grade", "ordinal", levels=4))),
    ),
}
_TINY_WITH_HOLES: dict[type[Space], Space] = {
    Binary: Binary((2, 3), missing=True),
    Integers: Integers((2,), 3, missing=True),
    Reals: Reals((2,), missing=True),
    Counts: Counts((2,), missing=True),
    Tokens: Tokens(3, 3, missing=True),
    Table: Table(
        columns=(
            Column("colour", "categorical", levels=3, missing=True),
            Column("weight", "real", missing=True),
            Column("visits", "integer", missing=True),
        )
    ),
}
_CONDITIONS: tuple[Space, ...] = (Integers((1,), 3), Reals((2,)))
_TABLE_CONDITIONS: tuple[Space, ...] = (
    Integers((1,), 3),
    Table(columns=(Column("group", "categorical", levels=3), Column("age", "real", missing=True))),
)


class Case:
    """A tiny instance with its space and condition, data for it, and the instance after a moment of training.

    Args:
        cls: class of the model.
        build: makes the tiny instance.
        seed: of the data, the training and the noise.
    """

    def __init__(self, cls: type[Model], build: Callable[[], Model], seed: int) -> None:
        self.cls, self.seed, self.build = cls, seed, build
        with torch.random.fork_rng(devices=[]):
            self._untouched = self.fresh()
        self.space, self.condition = self._untouched.space, self._untouched.condition
        self.model_name = self._untouched.name()
        self.title = f"{title_of(self.space)}" + (f" given {title_of(self.condition)}" if self.condition else "")
        self.source = Source(self.space, self.condition, seed)
        #: Whether gradients train it: it has parameters, and no closed form.
        self.by_gradients = not cls.closed_form and any(p.requires_grad for p in self._untouched.parameters())

    def fresh(self) -> Model:
        """A new tiny instance: the same initial values every time."""
        torch.manual_seed(self.seed)
        return self.build()

    def draw(self, n: int, salt: int, source: Source | None = None) -> tuple[Tensor, Tensor | None]:
        """``n`` examples of the source; another salt gives other examples."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + salt)
        return (source or self.source).sample(n, generator)

    @cached_property
    def training_data(self) -> tuple[Tensor, Tensor | None]:
        return self.draw(TRAINING_EXAMPLES, salt=1)

    def initialised(self, model: Model) -> Model:
        """The model after its pass over the data: estimated if it has a closed form, initialised otherwise."""
        batches = ListOfBatches(*self.training_data, size=256)
        if model.closed_form:
            model.estimate(batches)
        else:
            model.initialise(batches)
        return model

    @cached_property
    def trained(self) -> Model:
        """The tiny instance after a moment of training, in eval mode and its own precision; not to be changed."""
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            model = self.initialised(self.fresh())
            if self.by_gradients:
                optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
                for step in range(TRAINING_STEPS):
                    self.train_step(model, optimiser, step)
        return model.eval()

    def train_step(self, model: Model, optimiser: torch.optim.Optimizer, step: int, size: int = 128) -> float:
        """One step of gradient descent on the ``step``-th batch, with noise of its own.

        The global generator, which dropout draws from, starts from the step too: a trainer restores it.
        """
        torch.manual_seed(7919 * self.seed + step)
        model.train()
        generator = torch.Generator().manual_seed(7919 * self.seed + step)
        x, condition = self.training_data
        rows = torch.randint(len(x), (size,), generator=generator)
        optimiser.zero_grad()
        loss = model.loss(x[rows], None if condition is None else condition[rows], StreamNoise(generator), step)
        loss.value.backward()
        optimiser.step()
        return float(loss.value.detach())

    @cached_property
    def precise(self) -> Model:
        """The trained instance in float64."""
        return copy.deepcopy(self.trained).double().eval()

    @cached_property
    def stages(self) -> list[Stage]:
        """The trained instance and, if gradients train it, the one before.

        Training may put a part to sleep, and an instance before training may have one asleep still: what concerns the
        whole space is asked of both.
        """
        stages = [Stage(self, "trained", self.trained)]
        if self.by_gradients:
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                stages.append(Stage(self, "untrained", self.initialised(self.fresh()).eval()))
        return stages

    @property
    def summed(self) -> list[Stage]:
        """The stages whose sums over the whole space are taken: only the trained one where there is a condition."""
        return self.stages if self.condition is None else self.stages[:1]

    @cached_property
    def conditions(self) -> list[Tensor | None]:
        """Two different conditions, each of one row; ``[None]`` without a condition."""
        rows = self.draw(64, salt=2)[1]
        if rows is None:
            return [None]
        flat = torch.unique(rows.reshape(len(rows), -1).nan_to_num(1e9), dim=0)
        picked = flat[[0, -1]]
        picked = torch.where(picked == 1e9, math.nan, picked.double())
        assert self.condition is not None
        return [batch_of(self.condition, row[None]) for row in picked]


class Stage:
    """The model in one state of training, with its samples and what it says of the whole space.

    Args:
        case: where the space, the conditions and the seed come from.
        name: of the state.
        model: in eval mode; not to be changed.
    """

    def __init__(self, case: Case, name: str, model: Model) -> None:
        self.name, self.model, self._case = name, model, case

    def label(self, i: int) -> str:
        """Which stage, and which of the conditions."""
        return f"{self.name}, condition {i}: " if self._case.condition else f"{self.name}: "

    @cached_property
    def precise(self) -> Model:
        """The model in float64."""
        return copy.deepcopy(self.model).double().eval()

    @cached_property
    def samples(self) -> list[Tensor]:
        """``SAMPLES`` samples for each of the conditions."""
        drawn = []
        for i, condition in enumerate(self._case.conditions):
            with torch.no_grad():
                noise = StreamNoise(torch.Generator().manual_seed(self._case.seed + i))
                drawn.append(self.model.sample(SAMPLES, repeat(condition, SAMPLES), noise))
        return drawn

    @cached_property
    def points(self) -> Points:
        """The points of the whole space; more of them where a value is exact and has no noise of its own."""
        return points_of(self._case.space, self._case.training_data[0], self._case.seed, n=self.points_needed)

    @cached_property
    def points_needed(self) -> int:
        x, condition = self._case.draw(1, salt=0)
        with torch.no_grad():
            return 2**15 if self.model.bound(x, condition, row_noise(0, 1)).kind == "exact" else 2**12

    @cached_property
    def bounds(self) -> list[Estimate]:
        """The expected bound at every point, for each of the conditions."""
        seed = self._case.seed
        return [evaluate_bound(self.precise, self.points.x, condition, seed) for condition in self._case.conditions]

    @cached_property
    def weights(self) -> list[Estimate]:
        """log p at every point by importance weights, for each of the conditions."""
        seed = self._case.seed
        return [weigh(self.precise, self.points.x, condition, seed) for condition in self._case.conditions]


def title_of(space: Space | None) -> str:
    """The space in one line."""
    if isinstance(space, Table):
        columns = ", ".join(f"{c.name}: {c.kind}{' with holes' if c.missing else ''}" for c in space.columns)
        return f"Table({columns})"
    return str(space).replace(", missing=False", "")


def cases_of(
    model: type[Model] | Model, space: Space | None, condition: Space | None, seed: int
) -> Iterator[Case | CheckResult]:
    """The cases to check, and a failed result for each that cannot be built."""
    if isinstance(model, Model):
        if space is not None or condition is not None:
            raise ValueError("space, condition: expected none beside an instance, which has its own")
        yield Case(type(model), lambda: rebuilt(model), seed)
    elif space is not None:
        yield Case(model, lambda: model.tiny(space, condition), seed)
    elif condition is not None:
        raise ValueError("condition: expected a space beside it")
    elif not model.spaces:
        yield _failed(model, "no space", "expected the class to declare its spaces")
    else:
        for kind in model.spaces:
            yield from _tiny_cases(model, kind, seed)


def rebuilt(model: Model) -> Model:
    """An untrained model from the description of another, which has been JSON in between."""
    description = json.loads(json.dumps(models.describe(model), allow_nan=False))
    if type(model).__module__.startswith("likely."):
        return models.build(description)
    condition = description["condition"]
    given = () if condition is None else (space_from_json(condition),)
    return type(model)(space_from_json(description["space"]), *given, **description["options"])


def _tiny_cases(cls: type[Model], kind: type[Space], seed: int) -> Iterator[Case | CheckResult]:
    accepted: Space | None = None
    for space in _TINY[kind]:
        for case in _case(cls, space, None, seed):
            yield case
            accepted = accepted or space
        if accepted is not None and kind is not Table:
            break
    if accepted is None:
        yield _failed(cls, kind.__name__, f"declared, but tiny() refuses {', '.join(map(title_of, _TINY[kind]))}")
        return
    yield from _case(cls, _TINY_WITH_HOLES[kind], None, seed)
    if cls.conditional:
        conditions = _TABLE_CONDITIONS if kind is Table else _CONDITIONS
        cases = [case for condition in conditions for case in _case(cls, accepted, condition, seed)]
        if not cases:
            refused = f"conditional, but tiny() refuses {', '.join(map(title_of, conditions))}"
            cases = [_failed(cls, kind.__name__, refused)]
        yield from cases


def _case(cls: type[Model], space: Space, condition: Space | None, seed: int) -> Iterator[Case | CheckResult]:
    """The case; nothing if the model is not defined there; a failed result if building it fails otherwise."""
    title = f"{title_of(space)}" + (f" given {title_of(condition)}" if condition is not None else "")
    try:
        yield Case(cls, lambda: cls.tiny(space, condition), seed)
    except Unsupported:
        return
    except Exception as error:
        yield _failed(cls, title, f"tiny: {type(error).__name__}: {error}")


def _failed(cls: type[Model], case: str, detail: str) -> CheckResult:
    return CheckResult("construction", cls.name(), case, "failed", detail, 0.0)


class ListOfBatches:
    """A re-iterable of batches of a given size."""

    def __init__(self, x: Tensor, condition: Tensor | None, size: int) -> None:
        self._x, self._condition, self._size = x, condition, size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for start in range(0, len(self._x), self._size):
            rows = slice(start, start + self._size)
            yield self._x[rows], None if self._condition is None else self._condition[rows]

    def __len__(self) -> int:
        return -(-len(self._x) // self._size)
