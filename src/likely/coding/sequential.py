"""The codec of a model that gives one cell after another: p(x) = ∏ p(x_t | x_<t), all examples side by side."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from likely.coding.cells import CellCodec, Mask
from likely.coding.distributions import codec_of
from likely.coding.rows import Rows, spare_at_most
from likely.coding.stack import Integers, Stack
from likely.coding.tables import inverse_scale, logistic
from likely.contract import Space, Table
from likely.distributions import Distribution
from likely.exact import Network, network
from likely.exact.functions import log

#: ``walk(n, condition)`` yields the distribution of the next cell of n examples, shape ``(n,)`` or ``(n, 1)``, and is
#: sent what the cell is: its values, shape ``(n,)``, NaN where it is absent.
Walk: TypeAlias = Callable[[int, "Tensor | None"], Generator[Distribution, Tensor, None]]

#: ``backwards(x, condition)`` gives the distributions that a walk over x would yield, the last one first.
Backwards: TypeAlias = Callable[[Tensor, "Tensor | None"], Iterable[Distribution]]


class SequentialCodec:
    """Codes cells in a fixed order, each under its distribution given those before it.

    There are no initial bits; it costs −log2 p(x).  Decoding is a walk; the encoder knows all cells, so that it may
    compute the distributions in another way, as long as they are the same to the bit.

    Args:
        space: of the examples; where it has missing cells, the walk knows laws that do without them.
        network: holds everything that is computed.
        order: the cells of a flattened example, in the order of the walk.
        walk: gives the distributions in order.
        backwards: gives them in reverse, for encoding; by default a walk is remembered.
        spare_bits: see :meth:`likely.contract.Model.codec`.
    """

    initial = False

    def __init__(
        self,
        space: Space,
        network: Network,
        order: Sequence[int],
        walk: Walk,
        backwards: Backwards | None = None,
        spare_bits: Sequence[int] | None = None,
    ) -> None:
        self._rows, self._network, self._order = Rows(space), network, list(order)
        self._walk, self._backwards = walk, backwards
        self._columns = [Rows(Table(columns=(c,))) for c in space.columns] if isinstance(space, Table) else []
        spare = iter(spare_at_most(spare_bits, space) or ())
        self._spare = [[next(spare)] if spare_at_most(None, rows.space) else None for rows in self._columns]

    @property
    def networks(self) -> Mapping[str, Network]:
        """The reproducible networks by name."""
        return {"model": self._network}

    def push(self, stack: Stack, x: Tensor, condition: Tensor | None = None) -> None:
        """Code a batch ``(n, *shape)``; NaN marks absent cells."""
        symbols, present = self._rows.symbols(x)
        mask = self._mask(len(symbols), present)
        cells = symbols.reshape(len(symbols), -1)
        given = self._rows.values(symbols, present).to(self._network.device)
        backwards = self._remembered if self._backwards is None else self._backwards
        for t, distribution in zip(reversed(self._order), backwards(given, self._moved(condition)), strict=True):
            codec = self._codec(distribution, t, mask)
            codec.push(stack, cells[:, t].reshape(codec.shape))

    def pop(self, stack: Stack, n: int, condition: Tensor | None = None, present: Mask | None = None) -> Tensor:
        """Decode a batch of ``n`` examples."""
        mask = self._mask(n, present)
        cells = np.zeros((n, len(self._order)), np.int64)
        walk = self._walk(n, self._moved(condition))
        last: Any = None
        for t in self._order:
            cells[:, t] = self._codec(walk.send(last), t, mask).pop(stack).reshape(n)
            last = self._values(cells[:, t], t, mask).to(self._network.device)
        return self._rows.values(cells.reshape(n, *self._rows.space.shape), present)

    def legal(self, x: Tensor) -> Tensor:
        """Which cells can be coded: all that are within the space."""
        return torch.ones(x.shape, dtype=torch.bool)

    def _codec(self, distribution: Distribution, t: int, mask: Mask | None) -> CellCodec:
        """The codec of cell t of all examples."""
        spare = self._spare[t] if self._columns else None
        codec = codec_of(distribution, spare_bits=spare)
        if mask is None or mask[:, t].all():
            return codec
        return codec_of(distribution, mask[:, t].reshape(codec.shape), spare_bits=spare)

    def _values(self, symbols: Integers, t: int, mask: Mask | None) -> Tensor:
        """The values of cell t, shape ``(n,)``, as a walk is sent them."""
        present = None if mask is None else mask[:, t : t + 1]
        rows = self._columns[t] if self._columns else self._rows
        return rows.values(symbols[:, None], present)[:, 0]

    def _mask(self, n: int, present: Mask | None) -> Mask | None:
        """Which cells are there, shape ``(n, cells)``; None if all are."""
        if present is None or present.all():
            return None
        if not self._rows.space.missing:
            raise ValueError("x: expected examples without missing cells, which this codec has no distributions for")
        return np.ascontiguousarray(present).reshape(n, -1)

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
