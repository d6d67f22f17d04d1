"""The codec of a model that gives one cell after another: p(x) = ∏ p(x_t | x_<t), all examples side by side."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from likely.coding.cells import Mask
from likely.coding.distributions import codec_of
from likely.coding.rows import Rows
from likely.coding.stack import Stack
from likely.coding.tables import inverse_scale, logistic
from likely.contract import Space
from likely.distributions import Distribution
from likely.exact import Network, network
from likely.exact.functions import log

#: ``walk(n, condition)`` yields the distribution of the next cell of n examples, and is sent what the cell is.
Walk: TypeAlias = Callable[[int, "Tensor | None"], Generator[Distribution, Tensor, None]]

#: ``backwards(x, condition)`` gives the distributions that a walk over x would yield, the last one first.
Backwards: TypeAlias = Callable[[Tensor, "Tensor | None"], Iterable[Distribution]]


class SequentialCodec:
    """Codes cells in a fixed order, each under its distribution given those before it.

    There are no initial bits; it costs −log2 p(x).  Decoding is a walk; the encoder knows all cells, so that it may
    compute the distributions in another way, as long as they are the same to the bit.

    Args:
        space: of the examples; it has no missing cells.
        network: holds everything that is computed.
        order: the cells of a flattened example, in the order of the walk.
        walk: gives the distributions in order.
        backwards: gives them in reverse, for encoding; by default a walk is remembered.
    """

    initial = False

    def __init__(
        self, space: Space, network: Network, order: Sequence[int], walk: Walk, backwards: Backwards | None = None
    ) -> None:
        self._rows, self._network, self._order = Rows(space), network, list(order)
        self._walk, self._backwards = walk, backwards

    @property
    def networks(self) -> Mapping[str, Network]:
        """The reproducible networks by name."""
        return {"model": self._network}

    def push(self, stack: Stack, x: Tensor, condition: Tensor | None = None) -> None:
        """Code a batch ``(n, *shape)``."""
        symbols, present = self._rows.symbols(x)
        _refuse_absent(present)
        cells = symbols.reshape(len(symbols), -1)
        given = torch.from_numpy(symbols).to(self._network.device)
        backwards = self._remembered if self._backwards is None else self._backwards
        for t, distribution in zip(reversed(self._order), backwards(given, self._moved(condition)), strict=True):
            codec_of(distribution).push(stack, cells[:, t])

    def pop(self, stack: Stack, n: int, condition: Tensor | None = None, present: Mask | None = None) -> Tensor:
        """Decode a batch of ``n`` examples."""
        _refuse_absent(present)
        cells = np.zeros((n, len(self._order)), np.int64)
        walk = self._walk(n, self._moved(condition))
        last: Any = None
        for t in self._order:
            cells[:, t] = codec_of(walk.send(last)).pop(stack)
            last = torch.from_numpy(cells[:, t]).to(self._network.device)
        return self._rows.values(cells.reshape(n, *self._rows.space.shape))

    def legal(self, x: Tensor) -> Tensor:
        """Which cells can be coded: all that are within the space."""
        return torch.ones(x.shape, dtype=torch.bool)

    def _moved(self, condition: Tensor | None) -> Tensor | None:
        return None if condition is None else condition.to(self._network.device)

    def _remembered(self, x: Tensor, condition: Tensor | None) -> Iterable[Distribution]:
        """The distributions of a walk over x, the last one first."""
        walk = self._walk(len(x), condition)
        found, last = [], None
        for t in self._order:
            found.append(walk.send(last))  # type: ignore[arg-type]
            last = x.flatten(1)[:, t]
        return reversed(found)


class Fine(nn.Module):
    """The rule of a layer in ``exact64``, with results in float32: for layers whose rounding would show."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.rule = network(layer, "exact64").module

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x).float()


def log_level(x: Tensor, means: Tensor, log_scales: Tensor, levels: int) -> Tensor:
    """:func:`likely.distributions.logistic.log_level` from the tables that codes are made of, float64.

    The mass of a level is a multiple of 2^−50; where that is none it is taken for 2^−50.
    """
    law, half = logistic(), 0.5 * (levels - 1)
    symbols, centre = x.double().cpu().numpy(), means.double().cpu().numpy()
    centre += 1.0
    centre *= half
    rate = inverse_scale(log_scales.cpu().numpy())
    rate *= law.steps / half
    upper, lower = ((symbols + shift - centre) * rate + law.centre for shift in (0.5, -0.5))
    mass = np.where(symbols == levels - 1, 1.0, law.cdf(upper))
    mass -= np.where(symbols == 0, 0.0, law.cdf(lower))
    return torch.from_numpy(log(np.maximum(mass, 2.0**-50, out=mass))).to(means.device)


def _refuse_absent(present: Mask | None) -> None:
    if present is not None and not present.all():
        raise ValueError("x: expected examples without missing cells, which this codec has no distributions for")
