"""Networks that give some numbers for every cell of an example, from features of the other cells.

:class:`MaskedCells` sees the cells before it in an order that may be changed; :class:`KnowingCells` sees all that are
known, and is told which they are.  Both begin at zero, so that they add nothing to what their output is added to.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from likely.networks.linear import Linear
from likely.networks.masked import MaskedLinear
from likely.networks.mlp import ResidualMLP, glorot, make_activation


class MaskedCells(nn.Module):
    """Residual masked layers: numbers of a cell depend on the features of the cells before it, and on the context."""

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        context: int,
        hidden: Sequence[int],
        activation: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = list(inputs), list(outputs)
        cells = max([*inputs, *outputs]) + 1
        # Units of degree 0 see the context alone.
        lowest = 0 if context or cells == 1 else 1
        count = max(cells - lowest, 1)
        degrees = [sorted(cells - 1 - i * count // width for i in range(width)) for width in hidden]
        self.degrees = degrees
        self.first = MaskedLinear([0] * len(inputs), degrees[0])
        self.context = Linear(context, hidden[0], bias=False) if context else None
        self.layers = nn.ModuleList(MaskedLinear(a, b) for a, b in itertools.pairwise(degrees))
        self.output = MaskedLinear(degrees[-1], [0] * len(outputs), bias=False)
        self.skip = MaskedLinear([0] * len(inputs), [0] * len(outputs), bias=False)
        for layer in (self.first, *self.layers):
            glorot(layer)  # type: ignore[arg-type]
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.skip.weight)
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout(dropout)

    def mask(self, order: Sequence[int]) -> None:
        """Let the cells stand in this order."""
        place = {cell: p for p, cell in enumerate(order)}
        entering = [place[j] + 1 for j in self.inputs]
        leaving = [place[j] for j in self.outputs]
        self.first.set_degrees(entering, self.degrees[0])
        self.output.set_degrees(self.degrees[-1], leaving)
        self.skip.set_degrees(entering, leaving)

    def speaking(self) -> list[Tensor]:
        """The weights by which it changes what it is added to."""
        return [self.output.weight, self.skip.weight]

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h = self.first(x)
        if self.context is not None:
            h = h + self.context(context)
        h = self.dropout(self.activation(h))
        for layer in self.layers:
            h = h + self.dropout(self.activation(layer(h)))
        return self.output(h) + self.skip(x)


class KnowingCells(nn.Module):
    """A residual network on the features of the known cells, which say of the others that they are unknown."""

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        context: int,
        hidden: Sequence[int],
        activation: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.body = ResidualMLP(len(inputs) + context, hidden, activation, dropout)
        self.output = Linear(self.body.out_features, len(outputs), bias=False)
        self.skip = Linear(len(inputs), len(outputs), bias=False)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.skip.weight)

    def speaking(self) -> list[Tensor]:
        """The weights by which it changes what it is added to."""
        return [self.output.weight, self.skip.weight]

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.output(self.body(x if context is None else torch.cat([x, context], 1))) + self.skip(x)
