"""What a likelihood can do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar, overload

from torch import Tensor

from likely.noise import Noise


class Distribution(Protocol):
    """A distribution of one example, factorised over its cells; leading axes are those of the context.

    Values have the space's own units.  ``weights`` mix over the last leading axis: several contexts (draws of a
    latent variable) of one example become one distribution.
    """

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) of every cell in nats: shape ``(*lead, *shape)``; NaN cells are not asked for."""
        ...

    def sample(self, noise: Noise) -> Tensor:
        """One draw of every cell: shape ``(*lead, *shape)``.  ``noise`` holds one stream a leading row."""
        ...

    def best(self, weights: Tensor | None = None) -> Tensor:
        """Single best value of every cell: the mean where values are numbers, the mode where they are codes.

        Args:
            weights: shape ``lead``, non-negative, sum 1 over the last leading axis, which is mixed out; None keeps it.
        """
        ...


Value = TypeVar("Value")


class lazy(Generic[Value]):
    """An attribute computed when it is first asked for, and kept.

    As ``functools.cached_property``, whose lock (Python 3.11) ``torch.compile`` cannot trace.

    >>> class Circle:
    ...     radius = 2.0
    ...     @lazy
    ...     def area(self):
    ...         return 3.0 * self.radius**2
    >>> Circle().area
    12.0
    """

    def __init__(self, function: Callable[[Any], Value]) -> None:
        self.function, self.name, self.__doc__ = function, function.__name__, function.__doc__

    @overload
    def __get__(self, owner: None, kind: type) -> lazy[Value]: ...

    @overload
    def __get__(self, owner: object, kind: type | None = None) -> Value: ...

    def __get__(self, owner: object | None, kind: type | None = None) -> Value | lazy[Value]:
        if owner is None:
            return self
        value = self.function(owner)
        setattr(owner, self.name, value)
        return value


def mix(values: Tensor, weights: Tensor | None, trailing: int) -> Tensor:
    """Weighted sum of ``values`` over the last leading axis; ``trailing`` axes belong to the example."""
    if weights is None:
        return values
    weights = weights.reshape(*weights.shape, *[1] * trailing)
    return (values * weights).sum(-1 - trailing)
