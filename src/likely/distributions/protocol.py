"""What a likelihood can do."""

from __future__ import annotations

from typing import Protocol

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


def mix(values: Tensor, weights: Tensor | None, trailing: int) -> Tensor:
    """Weighted sum of ``values`` over the last leading axis; ``trailing`` axes belong to the example."""
    if weights is None:
        return values
    weights = weights.reshape(*weights.shape, *[1] * trailing)
    return (values * weights).sum(-1 - trailing)
