"""The contract that every part of the package shares: what an example is, what a model says of it, what a model is.

* A :class:`Space` says what one example is: its shape, its values, which cells may be missing.
* A :class:`Bound` is what a model says of a batch: named parts in nats per example, and of what kind their sum is.
* A :class:`Model` is an ``nn.Module`` over one space, with ``bound``, ``loss``, ``sample`` and ``codec``.
* A :class:`NoCodec` is a model's reason for having no codec.

Everything else is built on these four.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from likely.noise import Noise, StreamNoise

Kind = Literal["exact", "lower bound", "estimate"]

# --------------------------------------------------------------------------------------------------------------
# Spaces
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Space:
    """What one example is.  A batch is one tensor whose first axis is the example, of shape ``(batch, *shape)``.

    Where ``missing`` is true a cell may be NaN: it was not observed.
    """

    shape: tuple[int, ...]
    missing: bool = field(default=False, kw_only=True)

    #: True where an example has a probability (nats and bits), false where it has a density (nats only).
    discrete: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if any(size < 1 for size in self.shape):
            raise ValueError(f"{type(self).__name__}: expected positive sizes in shape, got {self.shape}")

    @property
    def dims(self) -> int:
        """Number of dimensions of one example, the D of bits/dim."""
        return math.prod(self.shape)

    @property
    def has_probability(self) -> bool:
        """Whether an example has a probability, and hence a length in bits."""
        return self.discrete

    def validate(self, x: Tensor, name: str = "x") -> None:
        """Raise ``ValueError`` naming the first offending index and value if ``x`` is not a batch of this space."""
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.dim() != len(self.shape) + 1 or tuple(x.shape[1:]) != self.shape:
            expected = ", ".join(["batch", *map(str, self.shape)])
            raise ValueError(f"{name}: expected shape ({expected}), got {tuple(x.shape)}")
        if x.is_complex() or x.dtype == torch.bool:
            raise ValueError(f"{name}: expected real numbers, got dtype {x.dtype}")
        if x.is_floating_point():
            absent = torch.isnan(x)
            self._refuse(torch.isinf(x), x, name, "a finite value")
            if not self.missing:
                self._refuse(absent, x, name, "a value (this space has no missing cells)")
            x = torch.where(absent, self._filler(), x)
        self._validate_values(x, name)

    def _filler(self) -> Tensor:
        return torch.tensor(0.0)

    def _validate_values(self, x: Tensor, name: str) -> None:
        """Check the values of a batch whose shape is right and whose missing cells were replaced by a legal value."""

    def _refuse(self, wrong: Tensor, x: Tensor, name: str, expected: str) -> None:
        if wrong.any():
            index = tuple(int(i) for i in wrong.nonzero()[0])
            where = f"{name}[{', '.join(map(str, index))}]"
            digits = 15 if x.dtype == torch.float64 else 7
            value = format(x[index].item(), f".{digits}g")
            raise ValueError(f"{where}: expected {expected}, got {value} ({self._name_cell(index)})")

    def _name_cell(self, index: tuple[int, ...]) -> str:
        return f"example {index[0]}"

    def _whole(self, x: Tensor, name: str, low: int, high: int | None) -> None:
        wrong = x < low
        if high is not None:
            wrong = wrong | (x > high)
        if x.is_floating_point():
            wrong = wrong | (x != x.round())
        limits = f"{low} to {high}" if high is not None else f"from {low} up"
        self._refuse(wrong, x, name, f"a whole number, {limits}")

    def to_json(self) -> dict[str, Any]:
        """The space as JSON values; :func:`space_from_json` is its inverse."""
        return json.loads(json.dumps({"space": type(self).__name__, **asdict(self)}))


@dataclass(frozen=True)
class Binary(Space):
    """0 or 1 in every cell."""

    def _validate_values(self, x: Tensor, name: str) -> None:
        self._whole(x, name, 0, 1)


@dataclass(frozen=True)
class Integers(Space):
    """Whole numbers 0 … ``levels`` − 1 in every cell: 8-bit images are ``Integers((3, 32, 32), 256)``."""

    levels: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels < 2:
            raise ValueError(f"Integers: expected at least 2 levels, got {self.levels}")

    def _validate_values(self, x: Tensor, name: str) -> None:
        self._whole(x, name, 0, self.levels - 1)


@dataclass(frozen=True)
class Reals(Space):
    """Real numbers: a density, hence nats but no bits."""

    discrete: ClassVar[bool] = False


@dataclass(frozen=True)
class Counts(Space):
    """Whole numbers from 0 up, without a limit."""

    def _validate_values(self, x: Tensor, name: str) -> None:
        self._whole(x, name, 0, None)


@dataclass(frozen=True)
class Tokens(Space):
    """A sequence of ``length`` symbols 0 … ``vocab`` − 1; shorter texts are padded with a symbol of their own."""

    shape: tuple[int, ...] = field(init=False, default=(1,))
    length: int
    vocab: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", (int(self.length),))
        super().__post_init__()
        if self.vocab < 2:
            raise ValueError(f"Tokens: expected a vocabulary of at least 2, got {self.vocab}")

    def _validate_values(self, x: Tensor, name: str) -> None:
        self._whole(x, name, 0, self.vocab - 1)


ColumnKind = Literal["real", "integer", "ordinal", "categorical", "binary"]


@dataclass(frozen=True)
class Column:
    """One column of a :class:`Table`.

    Args:
        name: the column's name in the user's file.
        kind: ``real`` and ``integer`` cells hold the value itself; ``ordinal``, ``categorical`` and ``binary`` cells
            hold the code 0 … ``levels`` − 1 of a category.
        levels: number of categories of a coded column.
        resolution: spacing of the grid on which a numeric column lives; None means a continuum, which has a density
            but no probability.  An integer column has resolution 1 unless said otherwise.
        missing: whether a cell may be NaN.
    """

    name: str
    kind: ColumnKind
    levels: int | None = None
    resolution: float | None = None
    missing: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(ColumnKind):
            raise ValueError(f"column {self.name!r}: expected kind {_either(get_args(ColumnKind))}, got {self.kind!r}")
        if self.kind == "binary":
            object.__setattr__(self, "levels", 2)
        if self.kind == "integer" and self.resolution is None:
            object.__setattr__(self, "resolution", 1.0)
        if self.coded and (self.levels is None or self.levels < 1):
            raise ValueError(f"column {self.name!r}: expected levels >= 1 for kind {self.kind!r}, got {self.levels}")
        if self.numeric and self.levels is not None:
            raise ValueError(f"column {self.name!r}: a column of kind {self.kind!r} has no levels, got {self.levels}")
        if self.resolution is not None and not (self.numeric and 0 < self.resolution < math.inf):
            raise ValueError(f"column {self.name!r}: expected a positive resolution, got {self.resolution}")

    @property
    def numeric(self) -> bool:
        """Whether a cell holds the value itself."""
        return self.kind in ("real", "integer")

    @property
    def coded(self) -> bool:
        """Whether a cell holds the code of a category."""
        return not self.numeric

    @property
    def has_probability(self) -> bool:
        """Whether a cell has a probability (and not a density)."""
        return self.coded or self.resolution is not None

    def to_index(self, values: Tensor) -> Tensor:
        """Places on the grid of a numeric column, int64, for values that are on it."""
        assert self.resolution is not None
        return torch.round(values.double() / self.resolution).long()

    def from_index(self, index: Tensor) -> Tensor:
        """The values at places on the grid, float64: the floats that their decimal spelling is read as.

        >>> Column("price", "real", resolution=0.1).from_index(torch.tensor([3])).item()
        0.3
        """
        assert self.resolution is not None
        inverse = round(1.0 / self.resolution)  # 3 / 10 is 0.3, but 3 · 0.1 is not
        if inverse > 1 and math.isclose(inverse * self.resolution, 1.0, rel_tol=1e-12):
            return index.double() / torch.tensor(float(inverse), dtype=torch.float64, device=index.device)
        return index.double() * self.resolution


@dataclass(frozen=True)
class Table(Space):
    """A row of columns of different kinds; cells of columns with ``missing`` may be NaN.  Batches are float64."""

    shape: tuple[int, ...] = field(init=False, default=(1,))
    columns: tuple[Column, ...] = ()

    def __post_init__(self) -> None:
        columns = tuple(c if isinstance(c, Column) else Column(**c) for c in self.columns)
        if not columns:
            raise ValueError("Table: expected at least one column, got none")
        object.__setattr__(self, "columns", columns)
        object.__setattr__(self, "shape", (len(columns),))
        object.__setattr__(self, "missing", any(c.missing for c in columns))
        super().__post_init__()

    @property
    def has_probability(self) -> bool:
        return all(column.has_probability for column in self.columns)

    def _validate_values(self, x: Tensor, name: str) -> None:
        for j, column in enumerate(self.columns):
            cells = x[:, j]
            wrong = torch.zeros_like(cells, dtype=torch.bool)
            expected = ""
            if column.coded:
                wrong = (cells < 0) | (cells >= (column.levels or 0)) | (cells != cells.round())
                expected = f"a code from 0 to {(column.levels or 0) - 1}"
            elif column.resolution is not None:
                steps = cells.double() / column.resolution
                wrong = (steps - steps.round()).abs() > 1e-3 + 1e-9 * steps.abs()
                expected = f"a multiple of {column.resolution:g}"
            everywhere = torch.zeros_like(x, dtype=torch.bool)
            everywhere[:, j] = wrong
            self._refuse(everywhere, x, name, expected)

    def validate(self, x: Tensor, name: str = "x") -> None:
        super().validate(x, name)
        absent = torch.isnan(x) & ~torch.tensor([column.missing for column in self.columns], device=x.device)
        self._refuse(absent, x, name, "a value (this column has no missing cells)")

    def _name_cell(self, index: tuple[int, ...]) -> str:
        where = f"row {index[0]}"
        return f"{where}, column {self.columns[index[1]].name!r}" if len(index) > 1 else where


_SPACES: dict[str, type[Space]] = {cls.__name__: cls for cls in (Binary, Integers, Reals, Counts, Tokens, Table)}


def space_from_json(description: Mapping[str, Any]) -> Space:
    """Rebuild a space from :meth:`Space.to_json`."""
    values = dict(description)
    name = values.pop("space", None)
    if name not in _SPACES:
        raise ValueError(f"space: expected {_either(_SPACES)}, got {name!r}")
    cls = _SPACES[name]
    accepted = {f.name for f in fields(cls) if f.init}
    if cls is Table:
        accepted.discard("missing")
    return cls(**{key: value for key, value in values.items() if key in accepted})


# --------------------------------------------------------------------------------------------------------------
# What a model says
# --------------------------------------------------------------------------------------------------------------


@dataclass
class Bound:
    """What a model says of a batch: log p(x), or a bound on it, in nats per example and in the units of the data.

    Args:
        kind: ``exact``, ``lower bound`` or ``estimate`` (neither).
        parts: named terms in nats per example, each of shape ``(batch,)``; they sum to ``nats``.
    """

    kind: Kind
    parts: dict[str, Tensor]

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind: expected {_either(get_args(Kind))}, got {self.kind!r}")
        shapes = {name: tuple(part.shape) for name, part in self.parts.items()}
        if not shapes or len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
            raise ValueError(f"parts: expected tensors of one shape (batch,), got {shapes}")

    @property
    def nats(self) -> Tensor:
        """The sum of the parts: shape ``(batch,)``, nats per example."""
        total: Tensor | None = None
        for part in self.parts.values():
            total = part if total is None else total + part
        assert total is not None
        return total

    def check_finite(self) -> Bound:
        """Return the bound, or raise ``FloatingPointError`` with the part's name and the example's index."""
        for name, part in self.parts.items():
            wrong = ~torch.isfinite(part.detach())
            if wrong.any():
                index = int(wrong.nonzero()[0])
                value = part[index].item()
                raise FloatingPointError(f"part {name!r} of the bound is {value} for example {index} of the batch")
        return self

    def map(self, function: Callable[[Tensor], Tensor]) -> Bound:
        """The same bound with ``function`` applied to every part (indexing, moving, detaching)."""
        return Bound(self.kind, {name: function(part) for name, part in self.parts.items()})


def weakest(*kinds: Kind) -> Kind:
    """Kind of a sum of independent terms: exact only if all are, an estimate as soon as one is."""
    order = get_args(Kind)
    return max(kinds, key=order.index)


@dataclass
class Loss:
    """What training minimises, and what it wishes to log.  Never shown as bits.

    Args:
        value: a scalar tensor, in nats per dimension unless the model says otherwise.
        log: further scalars for the log, detached.
    """

    value: Tensor
    log: dict[str, Tensor] = field(default_factory=dict)


class NoCodec(Exception):
    """The model has no codec; the message says why."""


class Unsupported(ValueError):
    """The model is not defined on the space, or not with these options; the message says what is."""


# --------------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------------

#: A re-iterable of ``(x, condition)`` batches: every ``iter()`` is one pass over the training data.
Batches = Iterable[tuple[Tensor, Tensor | None]]
#: Hears the number of a pass and the mean nats per example; says whether the time is up.
Report = Callable[[int, float], bool | None]


class Model(nn.Module):
    """A generative model with a likelihood, over one space.

    A subclass is one file in ``likely/models``; its constructor takes ``space`` and ``condition`` first and then its
    options by keyword.  These options *are* its configuration (:attr:`config`): JSON values, or other models.

    Args:
        space: the space of the examples.
        condition: the space of what the model is conditioned on, or None.
    """

    #: Spaces the model is defined on.
    spaces: ClassVar[tuple[type[Space], ...]] = ()
    #: True where :meth:`estimate` replaces gradient training.
    closed_form: ClassVar[bool] = False
    #: True where the model accepts a condition.
    conditional: ClassVar[bool] = False
    #: True where a missing cell is information, so that the bound of a row with holes is one on log p(observed cells |
    #: which cells are observed), and not on their marginal under the law of complete rows.
    reads_holes: ClassVar[bool] = False
    #: True where a sample from normal noise scaled by T is one at temperature T (``likely.noise.TemperedNoise``).
    tempered: ClassVar[bool] = False

    space: Space
    condition: Space | None
    config: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Model:
        if not (args or kwargs):  # copy.deepcopy, which brings the attributes itself
            return super().__new__(cls)
        check_options(cls, kwargs)
        bound = inspect.signature(cls.__init__).bind(None, *args, **kwargs)
        bound.apply_defaults()
        self = super().__new__(cls)
        options = {k: v for k, v in bound.arguments.items() if k not in ("self", "space", "condition")}
        object.__setattr__(self, "config", options)
        return self

    def __init__(self, space: Space, condition: Space | None = None) -> None:
        super().__init__()
        if not isinstance(space, self.spaces):
            accepted = ", ".join(s.__name__ for s in self.spaces)
            raise Unsupported(f"model {self.name()!r} is defined on {accepted}; got {type(space).__name__}")
        if condition is not None and not self.conditional:
            raise Unsupported(f"model {self.name()!r} takes no condition")
        self.space = space
        self.condition = condition

    @classmethod
    def name(cls) -> str:
        """The model's name on the command line: the name of its file."""
        return cls.__module__.rpartition(".")[2]

    def title(self) -> str:
        """What messages call this model: its name, behind transforms that of the model there."""
        return self.name()

    @classmethod
    def options(cls) -> dict[str, inspect.Parameter]:
        """The options of the constructor, beside ``space`` and ``condition``: by name, with their defaults."""
        # of a class that inherits its __init__ and has a __new__, Python 3.11.2 knows only the signature of __new__
        taken = _parameters(cls.__init__)
        return {name: parameter for name, parameter in taken.items() if name not in ("self", "space", "condition")}

    def check_condition(self, condition: Tensor | None) -> None:
        """Raise ``ValueError`` unless there is a condition where the model has been built for one, and only there."""
        if (condition is None) != (self.condition is None):
            expected = "no condition" if self.condition is None else "a condition"
            raise ValueError(f"condition: this model was built with {expected}")

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """log p(x) or a bound on it, in nats per example: the honest number.

        Args:
            x: a batch of the space, shape ``(batch, *space.shape)``.
            condition: a batch of the condition's space, or None.
            noise: where to draw latent variables from; by default the global generator.
        """
        raise NotImplementedError

    def loss(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None, step: int = 0) -> Loss:
        """What training minimises: −bound in nats per dimension, unless the model overrides it.

        Args:
            step: global training step, for objectives that follow a schedule.
        """
        means = {name: part.mean() for name, part in self.bound(x, condition, noise).parts.items()}
        log = {name: mean.detach() for name, mean in means.items()}
        return Loss(functools.reduce(torch.add, means.values()) / -self.space.dims, log)

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """``n`` examples of the space; with a condition, one example for each of its ``n`` rows."""
        raise NotImplementedError

    def codec(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> Any:
        """A :class:`likely.coding.ModelCodec`: push and pop of batches, on an entropy coder's stack.

        Args:
            spacing, bound: for ``Reals`` alone: the grid i · spacing within ± bound on which the cells live.
            spare_bits: for each numeric column of a table without a grid, how many zeros end the bits of its values.

        Raises:
            NoCodec: the model has none; the message says why.
        """
        raise NoCodec(f"model {self.name()!r} has no codec")

    def initialise(self, batches: Batches) -> None:
        """Set whatever depends on the data before training starts (scalings, biases).  Default: nothing."""

    def estimate(self, batches: Batches, report: Report | None = None) -> None:
        """Fit a ``closed_form`` model to the data, in as many passes as it needs.

        Args:
            report: called after each pass with its number and the mean nats per example, if known; where it returns
                true, the fit ends with what it has.
        """
        raise NotImplementedError

    @classmethod
    def tiny(cls, space: Space, condition: Space | None = None) -> Model:
        """The smallest instance in which every part of the bound matters, for the contract checks."""
        return cls(space, condition) if cls.conditional else cls(space)

    # Optional abilities, present where the family has them:
    #   encode(x, condition=None) -> (batch, latent)           mean embedding, deterministic
    #   decode(z, condition=None, noise=None) -> x             a draw of p(x | z); mean value with noise=None
    #   impute(x, condition=None, noise=None, draws=0) -> x    holes filled by their best values; m draws: (m, *x.shape)
    #   column_nats(x, condition=None, noise=None) -> (batch, *shape)   what each cell adds to the bound; sums to it
    #   log_weights(x, condition, samples, noise) -> (batch, samples)  importance weights: log mean exp is a bound

    def can(self, ability: str) -> bool:
        """Whether the model has an optional ability: ``encode``, ``decode``, ``impute``, ``log_weights``, …"""
        return callable(getattr(self, ability, None))


def noise_or_global(noise: Noise | None, like: Tensor | nn.Module) -> Noise:
    """The given noise, or the global generator of the device of ``like``."""
    if noise is not None:
        return noise
    device = like.device if isinstance(like, Tensor) else next(iter(like.parameters()), torch.empty(0)).device
    return StreamNoise(device=device)


def check_options(function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` with the nearest valid name if ``function`` does not take one of the options."""
    if isinstance(function, type) and issubclass(function, Model):
        check_names(function.name(), [o for o in options if o not in ("space", "condition")], function.options())
    else:
        check_names(function.__name__, options, _parameters(function))


def check_names(title: str, options: Iterable[str], names: Iterable[str]) -> None:
    """Raise ``ValueError`` with the nearest valid name if one of the options is not among the names."""
    names = list(names)
    for option in options:
        if option not in names:
            near = difflib.get_close_matches(option, names, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{title} has no option {option!r}{hint} (options: {', '.join(names) or 'none'})")


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    signature = inspect.signature(function)
    return {
        name: parameter for name, parameter in signature.parameters.items() if parameter.kind != parameter.VAR_KEYWORD
    }


def _either(names: Iterable[Any]) -> str:
    quoted: Sequence[str] = [repr(str(name)) for name in names]
    return " or ".join([", ".join(quoted[:-1]), quoted[-1]]) if len(quoted) > 1 else quoted[0]
