r"""Transforms of the data, each with its log-determinant, so that a bound stays one on the raw data.

A model p_Y over y = T(x) is a model over x by the change of variables

    log p_X(x) = log p_Y(T(x)) + Σ_j log |∂T_j/∂x_j|                                                            (1)

(all transforms here act on each cell by itself).  Discrete cells are first spread over their bins by uniform
dequantisation: with bins of width r,

    log P(x) = log ∫_{[0, r)^D} p_Y(x + v) dv  ≥  E_{v ~ U[0, r)^D} log p_Y(x + v) + D log r                     (2)

(Uria, Murray & Larochelle 2013, arXiv 1306.0186; Theis, van den Oord & Bethge 2016, arXiv 1511.01844, section 3.1).
Missing cells stay missing and add nothing.  The arithmetic is float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from likely.contract import (
    Batches,
    Binary,
    Bound,
    Counts,
    Integers,
    Loss,
    Model,
    Reals,
    Report,
    Space,
    Table,
    Unsupported,
    check_options,
    noise_or_global,
    space_from_json,
    weakest,
)
from likely.noise import KeyedNoise, Noise, content_keys


class Transform(nn.Module):
    """An invertible map of every cell by itself, with its log-determinant.

    A subclass declares its constructor's arguments in :meth:`options`.
    """

    #: Whether the map draws noise; a model behind it is known by a lower bound.
    stochastic: ClassVar[bool] = False

    @classmethod
    def name(cls) -> str:
        """Name of the transform in a configuration and in the parts of a bound."""
        return cls.__name__.lower()

    def options(self) -> dict[str, Any]:
        """Arguments of the constructor, as JSON values."""
        return {}

    def describe(self) -> dict[str, Any]:
        """JSON description; :func:`build_transform` is its inverse."""
        return {"transform": self.name(), **self.options()}

    def domain(self, codomain: Space) -> Space:
        """The space of x, given that of T(x).

        Raises:
            Unsupported: the transform does not end in such a space.
        """
        if not isinstance(codomain, Reals):
            raise Unsupported(f"transform {self.name()!r} ends in Reals, got {type(codomain).__name__}")
        return codomain

    def attach(self, space: Space) -> None:
        """Allocate what depends on the shape of ``space``, the space of x."""

    def fit(self, batches: Iterable[Tensor]) -> None:
        """Set what depends on the data, in one pass."""

    def forward(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        """T(x) and log |∂T_j/∂x_j| of every cell: both float64, of the shape of ``x``."""
        raise NotImplementedError

    def inverse(self, y: Tensor) -> Tensor:
        """x with T(x) = y, float64."""
        raise NotImplementedError


def _cellwise(log_det: Tensor, y: Tensor) -> Tensor:
    return torch.where(torch.isnan(y), torch.zeros((), dtype=torch.float64, device=y.device), log_det.expand_as(y))


class Dequantise(Transform):
    """Adds uniform noise over the bin of every discrete cell: v ~ U[0, r), log |·| = log r by (2).

    r is 1 for binary cells, integers, counts and codes of categories, and the resolution of a numeric column of a
    table; a column on a continuum is left alone.  The inverse goes to the lower end of the bin; codes outside the
    space (a density may have mass there, which the bound counts as lost) go to the nearest code.

    >>> step = Dequantise(Integers((2,), levels=4))
    >>> step.output
    Reals(shape=(2,), missing=False)
    >>> step.inverse(torch.tensor([[0.3, 4.2]]))
    tensor([[0., 3.]], dtype=torch.float64)

    Args:
        space: the space of the data (or its JSON description).
    """

    stochastic = True

    def __init__(self, space: Space | Mapping[str, Any]) -> None:
        super().__init__()
        self.space = space if isinstance(space, Space) else space_from_json(space)
        if not isinstance(self.space, (Binary, Integers, Counts, Table)):
            raise Unsupported(
                f"dequantise: expected Binary, Integers, Counts or Table, got {type(self.space).__name__}"
            )
        low, high, width = -math.inf, math.inf, 1.0
        cells: list[tuple[float, float, float]]
        if isinstance(self.space, Table):
            cells = []
            for column in self.space.columns:
                if column.coded:
                    cells.append((0.0, float((column.levels or 1) - 1), 1.0))
                else:
                    cells.append((low, high, column.resolution or 0.0))
        else:
            most = {Binary: 1.0, Integers: getattr(self.space, "levels", 1) - 1.0}.get(type(self.space), high)
            cells = [(0.0, most, width)]
        values = torch.tensor(cells, dtype=torch.float64)
        self.register_buffer("low", values[:, 0], persistent=False)
        self.register_buffer("high", values[:, 1], persistent=False)
        self.register_buffer("width", values[:, 2], persistent=False)
        self.low: Tensor
        self.high: Tensor
        self.width: Tensor

    @property
    def output(self) -> Reals:
        """The space after the transform."""
        return Reals(self.space.shape, missing=self.space.missing)

    def options(self) -> dict[str, Any]:
        return {"space": self.space.to_json()}

    def domain(self, codomain: Space) -> Space:
        if codomain != self.output:
            raise Unsupported(f"dequantise: expected a model over {self.output}, got one over {codomain}")
        return self.space

    def forward(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        u = noise.uniform(x.shape).to(x.device, torch.float64)
        y = x.double() + self.width * u
        log_width = torch.where(self.width > 0, self.width, torch.ones_like(self.width)).log()
        return y, _cellwise(log_width, y)

    def inverse(self, y: Tensor) -> Tensor:
        y = y.double()
        grid = torch.where(self.width > 0, self.width, torch.ones_like(self.width))
        lower = torch.minimum(torch.maximum(torch.floor(y / grid) * grid, self.low), self.high)
        return torch.where(self.width > 0, lower, y)


class Standardise(Transform):
    """y = (x − m) / s with the mean and the standard deviation of the training data; log |·| = −log s.

    A cell that does not vary keeps s = 1.

    Args:
        per_cell: a mean and a deviation for every cell, or one of each for all.
    """

    def __init__(self, per_cell: bool = True) -> None:
        super().__init__()
        self.per_cell = per_cell
        self.register_buffer("mean", torch.zeros((), dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.mean: Tensor
        self.scale: Tensor

    def options(self) -> dict[str, Any]:
        return {"per_cell": self.per_cell}

    def attach(self, space: Space) -> None:
        if self.per_cell:
            self.mean = self.mean.expand(space.shape).clone()
            self.scale = self.scale.expand(space.shape).clone()

    def fit(self, batches: Iterable[Tensor]) -> None:
        count = torch.zeros_like(self.mean)
        mean, squares = torch.zeros_like(self.mean), torch.zeros_like(self.mean)
        for x in batches:  # pairwise merging: Chan, Golub & LeVeque 1983
            rows = x.double() if self.per_cell else x.double().reshape(-1)
            seen = ~torch.isnan(rows)
            n = seen.double().sum(0)
            here = torch.where(seen, rows, 0.0).sum(0) / n.clamp(min=1)
            around = torch.where(seen, rows - here, 0.0).square().sum(0)
            total = count + n
            delta = torch.where(n > 0, here - mean, 0.0)
            mean = mean + delta * n / total.clamp(min=1)
            squares = squares + around + delta.square() * count * n / total.clamp(min=1)
            count = total
        scale = (squares / count.clamp(min=1)).sqrt()
        flat = scale <= 1e-12 * mean.abs()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(flat | (scale == 0), torch.ones_like(scale), scale))

    def forward(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        y = (x.double() - self.mean) / self.scale
        return y, _cellwise(-self.scale.log(), y)

    def inverse(self, y: Tensor) -> Tensor:
        return y.double() * self.scale + self.mean


class Log(Transform):
    """y = log x of positive cells; log |·| = −log x."""

    def forward(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        _refuse(x <= 0, x, "log", "a positive number")
        y = x.double().log()
        return y, _cellwise(-y, y)

    def inverse(self, y: Tensor) -> Tensor:
        return y.double().exp()


class Log1p(Transform):
    """y = log(1 + x) of cells above −1; log |·| = −log(1 + x)."""

    def forward(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        _refuse(x <= -1, x, "log1p", "a number above -1")
        y = x.double().log1p()
        return y, _cellwise(-y, y)

    def inverse(self, y: Tensor) -> Tensor:
        return y.double().expm1()


class Logit(Transform):
    """y = logit s with s = α + (1 − 2α) (x − low) / (high − low), for cells from low to high (Dinh et al. 2017, 4.1).

    log |·| = log((1 − 2α) / (high − low)) − log s − log(1 − s).  The inverse of a value that no x reaches is the
    nearer end of the interval.

    Args:
        low: least value of a cell.
        high: greatest value of a cell; after dequantisation of L levels it is L.
        alpha: α, which keeps the ends of the interval finite; 0 < α < ½.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, alpha: float = 1e-6) -> None:
        super().__init__()
        if not low < high:
            raise ValueError(f"logit: expected low < high, got {low} and {high}")
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha: expected a number between 0 and 0.5, got {alpha}")
        self.low, self.high, self.alpha = float(low), float(high), float(alpha)

    def options(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "alpha": self.alpha}

    def forward(self, x: Tensor, noise: Noise) -> tuple[Tensor, Tensor]:
        _refuse((x < self.low) | (x > self.high), x, "logit", f"a number from {self.low:g} to {self.high:g}")
        slope = (1.0 - 2.0 * self.alpha) / (self.high - self.low)
        s = self.alpha + slope * (x.double() - self.low)
        log_s, log_rest = s.log(), torch.log1p(-s)
        y = log_s - log_rest
        return y, _cellwise(math.log(slope) - log_s - log_rest, y)

    def inverse(self, y: Tensor) -> Tensor:
        slope = (1.0 - 2.0 * self.alpha) / (self.high - self.low)
        return (self.low + (torch.sigmoid(y.double()) - self.alpha) / slope).clamp(self.low, self.high)


def _refuse(wrong: Tensor, x: Tensor, name: str, expected: str) -> None:
    if wrong.any():
        index = tuple(int(i) for i in wrong.nonzero()[0])
        place = ", ".join(map(str, index))
        raise ValueError(f"{name}: x[{place}]: expected {expected}, got {x[index].item():g}")


_TRANSFORMS: dict[str, type[Transform]] = {c.name(): c for c in (Dequantise, Standardise, Log, Log1p, Logit)}


def build_transform(description: Mapping[str, Any] | str) -> Transform:
    """A transform from its JSON description (or its name alone).

    >>> build_transform({"transform": "logit", "high": 256}).options()
    {'low': 0.0, 'high': 256.0, 'alpha': 1e-06}
    """
    values = {"transform": description} if isinstance(description, str) else dict(description)
    name = values.pop("transform", None)
    if name not in _TRANSFORMS:
        raise ValueError(f"transform: expected one of {', '.join(map(repr, _TRANSFORMS))}, got {name!r}")
    check_options(_TRANSFORMS[name], values)
    return _TRANSFORMS[name](**values)


class _Centre:
    """The noise that a deterministic embedding sees: the middle of every bin."""

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return torch.full(tuple(shape), 0.5)

    def normal(self, shape: Sequence[int]) -> Tensor:
        return torch.zeros(tuple(shape))


class Preprocessed(Model):
    """A model behind transforms, itself a model of the raw data: its bound has every log-determinant in it.

    >>> class Uniform(Model):  # on [0, 4)
    ...     spaces = (Reals,)
    ...     def bound(self, x, condition=None, noise=None):
    ...         return Bound("exact", {"density": torch.full((len(x),), -math.log(4.0))})
    >>> model = Preprocessed(Uniform(Reals((1,))), Dequantise(Integers((1,), levels=4)))
    >>> bound = model.bound(torch.tensor([[3]]))
    >>> bound.kind, round(bound.nats.exp().item(), 3)
    ('lower bound', 0.25)

    Args:
        model: over the space in which the transforms end.
        transforms: applied to the data in this order.
    """

    spaces = (Binary, Integers, Counts, Table, Reals)
    conditional = True

    _ABILITIES: ClassVar[tuple[str, ...]] = ("encode", "decode", "impute", "column_nats", "log_weights")

    def __init__(self, model: Model, *transforms: Transform) -> None:
        space = model.space
        for transform in reversed(transforms):
            space = transform.domain(space)
        super().__init__(space, model.condition)
        self.config = {"model": model, "transforms": [transform.describe() for transform in transforms]}
        self.model = model
        self.transforms = nn.ModuleList(transforms)
        spaces = [model.space]
        for transform in reversed(transforms):
            spaces.append(transform.domain(spaces[-1]))
        for transform, before in zip(transforms, reversed(spaces)):
            transform.attach(before)
        object.__setattr__(self, "closed_form", model.closed_form)
        object.__setattr__(self, "tempered", model.tempered)
        self.stochastic = any(transform.stochastic for transform in transforms)
        for ability in self._ABILITIES:
            if not model.can(ability) and not (ability == "log_weights" and self.stochastic):
                object.__setattr__(self, ability, None)
        if hasattr(model, "latent_dim"):
            self.latent_dim = model.latent_dim

    @classmethod
    def from_options(
        cls, space: Space, condition: Space | None, *, model: Model, transforms: Sequence[Mapping[str, Any]]
    ) -> Preprocessed:
        """Rebuild from a saved configuration: the inverse of ``config``."""
        rebuilt = cls(model, *(build_transform(description) for description in transforms))
        if (rebuilt.space, rebuilt.condition) != (space, condition):
            raise ValueError(f"preprocessed: expected a model over {space}, got one over {rebuilt.space}")
        return rebuilt

    @classmethod
    def name(cls) -> str:
        return "preprocessed"

    # The map --------------------------------------------------------------------------------------------------------

    def _steps(self) -> list[Transform]:
        return cast(list[Transform], list(self.transforms))

    def transform(self, x: Tensor, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """T(x), float64, and for each transform log |·| of every cell."""
        y = x.double()
        log_dets: dict[str, Tensor] = {}
        for transform in self._steps():
            y, log_det = transform(y, noise)
            name = transform.name()
            while name in log_dets:
                name += "'"
            log_dets[name] = log_det
        return y, log_dets

    def inverse(self, y: Tensor) -> Tensor:
        """The example of the space whose transform is ``y``."""
        for transform in reversed(self._steps()):
            y = transform.inverse(y)
        return y

    def _bound_parts(self, log_dets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The log-determinants in nats per example; those that are always zero are no part."""
        unit = {
            transform.name()
            for transform in self._steps()
            if isinstance(transform, Dequantise) and bool(((transform.width == 1) | (transform.width == 0)).all())
        }
        return {name: cells.flatten(1).sum(1) for name, cells in log_dets.items() if name not in unit}

    # The contract ---------------------------------------------------------------------------------------------------

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        noise = noise_or_global(noise, x)
        y, log_dets = self.transform(x, noise)
        inner = self.model.bound(y, condition, noise)
        kind = weakest(inner.kind, "lower bound") if self.stochastic else inner.kind
        return Bound(kind, {**inner.parts, **self._bound_parts(log_dets)})

    def loss(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None, step: int = 0) -> Loss:
        noise = noise_or_global(noise, x)
        y, log_dets = self.transform(x, noise)
        inner = self.model.loss(y, condition, noise, step)
        parts = self._bound_parts(log_dets)
        value = inner.value
        for part in parts.values():
            value = value - (part.mean() / self.space.dims).to(value.dtype)
        return Loss(value, {**inner.log, **{name: part.detach().mean() for name, part in parts.items()}})

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        return self.inverse(self.model.sample(n, condition, noise))

    def title(self) -> str:
        return self.model.title()

    def initialise(self, batches: Batches) -> None:
        self._fit(batches)
        self.model.initialise(_Transformed(self, batches))

    def estimate(self, batches: Batches, report: Report | None = None) -> None:
        self._fit(batches)
        transformed = _Transformed(self, batches)

        def shifted(number: int, nats: float) -> bool | None:
            assert report is not None
            return report(number, nats + transformed.mean_log_det)

        self.model.estimate(transformed, None if report is None else shifted)

    def _fit(self, batches: Batches) -> None:
        for place, transform in enumerate(self._steps()):
            if type(transform).fit is not Transform.fit:
                transform.fit(self._until(place, batches))

    def _until(self, place: int, batches: Batches) -> Iterator[Tensor]:
        """The data as the transform at ``place`` gets them."""
        for x, _ in batches:
            noise = KeyedNoise(0, content_keys(x))
            y = x.double()
            for transform in self._steps()[:place]:
                y, _ = transform(y, noise)
            yield y

    # Abilities of the model within ------------------------------------------------------------------------------------

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """The embedding of the model within, deterministic: discrete cells stand at the middle of their bins."""
        y, _ = self.transform(x, _Centre())
        return self.model.encode(y, condition)  # type: ignore[operator]

    def decode(self, z: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """A draw of p(x | z), or with ``noise=None`` the image of the mean of p(y | z)."""
        return self.inverse(self.model.decode(z, condition, noise))  # type: ignore[operator]

    def impute(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None, draws: int = 0) -> Tensor:
        """Missing cells filled, observed ones untouched: shape of ``x`` for ``draws=0``, else ``(draws, *x.shape)``."""
        noise = noise_or_global(noise, x)
        y, _ = self.transform(x, noise)
        filled = self.inverse(self.model.impute(y, condition, noise, draws))  # type: ignore[operator]
        return torch.where(torch.isnan(x), filled, x.to(filled.dtype))

    def column_nats(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Contribution of every cell to the bound, nats: shape ``(batch, *space.shape)``."""
        noise = noise_or_global(noise, x)
        y, log_dets = self.transform(x, noise)
        cells = self.model.column_nats(y, condition, noise)  # type: ignore[operator]
        for log_det in log_dets.values():
            cells = cells + log_det
        return cells

    def log_weights(
        self, x: Tensor, condition: Tensor | None = None, samples: int = 1, noise: Noise | None = None
    ) -> Tensor:
        """Log importance weights, nats, shape ``(batch, samples)``: each has its own draw from the bins.

        Raises:
            Unsupported: the model within is known by a bound only, whose value is no importance weight.
        """
        noise = noise_or_global(noise, x)
        weights = []
        for _ in range(samples):
            y, log_dets = self.transform(x, noise)
            if self.model.can("log_weights"):
                inner = self.model.log_weights(y, condition, 1, noise)[:, 0]  # type: ignore[operator]
            else:
                bound = self.model.bound(y, condition, noise)
                if bound.kind != "exact":
                    raise Unsupported(f"model {self.model.name()!r} within has no importance weights")
                inner = bound.nats
            for part in self._bound_parts(log_dets).values():
                inner = inner + part
            weights.append(inner)
        return torch.stack(weights, 1)


class _Transformed:
    """Batches as the model within gets them; the noise belongs to the example, the same in every pass."""

    def __init__(self, outer: Preprocessed, batches: Batches) -> None:
        self._outer, self._batches = outer, batches
        self.mean_log_det = 0.0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        total, count = 0.0, 0
        for x, condition in self._batches:
            y, log_dets = self._outer.transform(x, KeyedNoise(0, content_keys(x)))
            total += sum(float(part.sum()) for part in log_dets.values())
            count += len(x)
            self.mean_log_det = total / count
            yield y, condition
