"""The interface of all bijections, and the two ways to make one of others."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn


class NoInverse(ValueError):
    """The map is invertible, but this module has no way to compute its inverse; the message says what does."""


class Bijection(nn.Module):
    """An invertible map from data x to base z = f(x), with the logarithm of its Jacobian's determinant.

    Examples lie on the first axis: x has shape ``(batch, *shape)``, a context ``(batch, width)``.  With p the density
    of the base, that of the data is log p(x) = log p(f(x)) + log |det ∂f/∂x|.
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z = f(x), and log |det ∂z/∂x| in nats, shape ``(batch,)``."""
        raise NotImplementedError

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x = f⁻¹(z), and log |det ∂x/∂z| in nats, shape ``(batch,)``: minus what :meth:`forward` gives at x.

        Raises:
            NoInverse: there is no way to compute it.
        """
        raise NotImplementedError

    @classmethod
    def through(cls, steps: Sequence[Bijection], x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`forward` of bijections of this class one after the other, for those that are faster together."""
        return _through(steps, x, context)

    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Set what depends on the data, from one batch of it.  Default: nothing."""


class Chain(Bijection):
    """Bijections one after the other: z = fₙ(… f₂(f₁(x)) …).

    >>> from likely.bijections import Reverse
    >>> twice = Chain(Reverse(3), Reverse(3))
    >>> twice(torch.tensor([[1.0, 2.0, 3.0]]))[0]
    tensor([[1., 2., 3.]])
    """

    def __init__(self, *bijections: Bijection) -> None:
        super().__init__()
        self.bijections = nn.ModuleList(bijections)

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.bijections)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.bijections)

    def _runs(self) -> Iterator[list[Bijection]]:
        """Neighbours of one class."""
        return (list(run) for _, run in itertools.groupby(self, type))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        runs = (functools.partial(type(run[0]).through, run) for run in self._runs())
        return _through(runs, x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _through((bijection.inverse for bijection in reversed(list(self))), z, context)

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Each bijection from what those before it make of the batch."""
        for bijection in self:
            bijection.initialise(x, context)
            x, _ = bijection(x, context)


def _through(maps: Iterable, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[type-arg]
    """x through maps one after the other, and the sum of their log-dets."""
    total: Tensor | None = None
    for step in maps:
        x, log_det = step(x, context)
        total = log_det if total is None else total + log_det
    return x, x.new_zeros(len(x)) if total is None else total


class Inverse(Bijection):
    """The inverse of a bijection: what was computed fast in one direction now is in the other.

    The inverse of a masked autoregressive flow is the inverse autoregressive flow (Kingma et al. 2016, 1606.04934).
    """

    def __init__(self, bijection: Bijection) -> None:
        super().__init__()
        self.bijection = bijection

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection.inverse(x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.bijection(z, context)
