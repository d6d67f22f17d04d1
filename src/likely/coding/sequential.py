"""The codec of a model that gives one cell after another: p(x) = ∏ p(x_t | x_<t), all examples side by side."""

from __future__ import annotations

import functools
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

#: ``orders(n)``: the cells of n flattened examples in the order of a walk, each example's own: int64, ``(n, cells)``.
Orders: TypeAlias = Callable[[int], Integers]

#: ``backwards(x, condition)`` gives the distributions that a walk over x would yield, the last one first.
Backwards: TypeAlias = Callable[[Tensor, "Tensor | None"], Iterable[Distribution]]


class SequentialCodec:
    """Codes cells in a fixed order, each under its distribution given those before it.

    There are no initial bits; it costs −log2 p(x).  Decoding is a walk; the encoder knows all cells, so that it may
    compute the distributions in another way, as long as they are the same to the bit.

    Args:
        space: of the examples; where it has missing cells, the walk knows laws that do without them.
        network: holds everything that is computed.
        order: the cells of a flattened example, in the order of the walk; or each example's own order, where all cells
            are of one kind.
        walk: gives the distributions in order.
        backwards: gives them in reverse, for encoding; by default a walk is remembered.
        spare_bits: see :meth:`likely.contract.Model.codec`.
    """

    initial = False

    def __init__(
        self,
        space: Space,
        network: Network,
        order: Sequence[int] | Orders,
        walk: Walk,
        backwards: Backwards | None = None,
        spare_bits: Sequence[int] | None = None,
    ) -> None:
        self._rows, self._network, self._walk, self._backwards = Rows(space), network, walk, backwards
        self._orders = order if callable(order) else functools.partial(_same_order, np.asarray(order, np.int64))
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
        order = self._orders(len(symbols))
        cells = np.take_along_axis(symbols.reshape(order.shape), order, 1)
        given = self._rows.values(symbols, present).to(self._network.device)
        backwards = self._remembered if self._backwards is None else self._backwards
        places = reversed(range(order.shape[1]))
        for i, distribution in zip(places, backwards(given, self._moved(condition)), strict=True):
            codec = self._codec(distribution, order[:, i], mask)
            codec.push(stack, cells[:, i].reshape(codec.shape))

    def pop(self, stack: Stack, n: int, condition: Tensor | None = None, present: Mask | None = None) -> Tensor:
        """Decode a batch of ``n`` examples."""
        mask = self._mask(n, present)
        order = self._orders(n)
        cells = np.zeros(order.shape, np.int64)
        walk = self._walk(n, self._moved(condition))
        last: Any = None
        for t in order.T:
            symbols = self._codec(walk.send(last), t, mask).pop(stack).reshape(n)
            np.put_along_axis(cells, t[:, None], symbols[:, None], 1)
            last = self._values(symbols, t, mask).to(self._network.device)
        return self._rows.values(cells.reshape(n, *self._rows.space.shape), present)

    def legal(self, x: Tensor) -> Tensor:
        """Which cells can be coded: all that are within the space."""
        return torch.ones(x.shape, dtype=torch.bool)

    def _codec(self, distribution: Distribution, t: Integers, mask: Mask | None) -> CellCodec:
        """The codec of the cells ``t`` of all examples, one of each."""
        spare = self._spare[t[0]] if self._columns and len(t) else None
        codec = codec_of(distribution, spare_bits=spare)
        if mask is None:
            return codec
        return codec_of(distribution, _picked(mask, t).reshape(codec.shape), spare_bits=spare)

    def _values(self, symbols: Integers, t: Integers, mask: Mask | None) -> Tensor:
        """The values of these cells, shape ``(n,)``, as a walk is sent them."""
        if not len(t):
            return torch.zeros(0, dtype=torch.float64)
        rows = self._columns[t[0]] if self._columns else self._rows
        return rows.values(symbols[:, None], None if mask is None else _picked(mask, t)[:, None])[:, 0]

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
        for t in torch.from_numpy(self._orders(len(x)).T).to(x.device):
            found.append(walk.send(last))  # type: ignore[arg-type]
            last = x.flatten(1).gather(1, t.unsqueeze(1)).squeeze(1)
        return reversed(found)


def _same_order(order: Integers, n: int) -> Integers:
    return np.tile(order, (n, 1))


def _picked(mask: Mask, t: Integers) -> Mask:
    """The entry t of each row."""
    picked: Mask = np.take_along_axis(mask, t[:, None], 1)[:, 0]
    return picked


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
