"""Cells one at a time: how a network reads the value of a cell, and the law that it gives to a cell.

A model that works through the cells of an example, such as a transformer, turns each into a *token*, a vector of one
width, and each vector that comes out into the law of one cell.  Where all cells have one alphabet they share both
(:class:`Alphabet`); every column of a table has its own (:class:`Columns`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from likely.contract import Batches, Binary, Integers, Space, Table, Tokens, Unsupported
from likely.data.streaming import Seen
from likely.distributions.heads import CategoricalHead, Head, head
from likely.distributions.protocol import Distribution
from likely.networks.features import Features
from likely.networks.linear import Linear

#: Width of the embedding of a category before it is brought to the width of a token.
_EMBEDDING = 32


class Alphabet(nn.Module):
    """Cells that share one alphabet: binary, integers, tokens.

    >>> cells = Alphabet(Tokens(5, 4), width=8)
    >>> tokens = cells.read(torch.tensor([[0, 3, 1, 2, 0]]))
    >>> tokens.shape, cells.log_probs(torch.zeros_like(tokens), torch.zeros(1, 5)).exp()
    (torch.Size([1, 5, 8]), tensor([[0.2500, 0.2500, 0.2500, 0.2500, 0.2500]], grad_fn=<ExpBackward0>))

    Args:
        space: of the examples.
        width: of a token.
        likelihood: ``auto`` or a name of :func:`likely.distributions.likelihoods`.
        options: of the likelihood.
        extra: symbols beside the alphabet's that :meth:`read` knows, such as that of a masked cell.
        tied: whether a category has one vector for being read and for being predicted (Press & Wolf 2017, arXiv
            1608.05859).
    """

    def __init__(
        self,
        space: Space,
        width: int,
        likelihood: str = "auto",
        options: Mapping[str, Any] | None = None,
        extra: int = 0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        cell: Space
        if isinstance(space, Tokens):
            self.levels, cell = space.vocab, Tokens(1, space.vocab)
        elif isinstance(space, Integers):
            self.levels, cell = space.levels, Integers((1,), space.levels)
        elif isinstance(space, Binary):
            self.levels, cell = 2, Binary((1,))
        else:
            raise Unsupported(f"cells of {type(space).__name__} have no alphabet in common")
        self.embedding = nn.Embedding(self.levels + extra, width)
        nn.init.normal_(self.embedding.weight, std=1.0 / math.sqrt(width))
        self.head = head(likelihood, cell, (width,), **dict(options or {}))
        if tied:
            if extra or not isinstance(self.head, CategoricalHead):
                raise Unsupported("tied: only symbols that are predicted one by one, as tokens are, can share vectors")
            self.head.output.weight = self.embedding.weight

    def read(self, x: Tensor, start: int = 0) -> Tensor:
        """The tokens of cells ``start`` onwards, shape ``(n, cells)``: shape ``(n, cells, width)``."""
        return self.embedding(x.long())

    def law(self, h: Tensor, t: int) -> Distribution:
        """The law of cell t from vectors ``(n, width)``: shape ``(n, 1)``."""
        return self.head(h)

    def log_probs(self, h: Tensor, x: Tensor) -> Tensor:
        """log p of each cell in nats from vectors ``(*lead, width)``, for values ``lead``."""
        return self.head(h).log_prob(x.unsqueeze(-1)).squeeze(-1)

    def initialise(self, batches: Batches) -> None:
        """The head's biases and scales from one pass over the data."""
        self.head.initialise(Seen(batches, lambda x: x.reshape(-1, 1)))


class Columns(nn.Module):
    """Cells of a table, each with its own features and its own head.

    A column that may have holes also has a law of whether its cell is there.  The last column is never read: there is
    none after it.

    >>> from likely.contract import Column
    >>> cells = Columns(Table(columns=(Column("town", "categorical", levels=3), Column("age", "integer"))), width=8)
    >>> cells.read(torch.tensor([[2.0]])).shape, cells.log_probs(torch.zeros(1, 2, 8), torch.tensor([[2.0, 7.0]])).shape
    (torch.Size([1, 1, 8]), torch.Size([1, 2]))

    Args:
        space: the table.
        width: of a token.
        options: of the heads of the columns, such as ``{"components": 5}``.
    """

    _working: Tensor

    def __init__(self, space: Table, width: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        cells = [Table(columns=(column,)) for column in space.columns]
        features = [Features(cell, min(width, _EMBEDDING)) for cell in cells[:-1]]
        self.features = nn.ModuleList(features)
        self.project = nn.ModuleList(Linear(math.prod(one.shape), width) for one in features)
        self.heads = nn.ModuleList(head("table", cell, (width,), **dict(options or {})) for cell in cells)
        self.register_buffer("_working", torch.zeros(()), persistent=False)  # has the dtype of the arithmetic

    def read(self, x: Tensor, start: int = 0) -> Tensor:
        """The tokens of columns ``start`` onwards, shape ``(n, columns)``: shape ``(n, columns, width)``."""
        tokens = [
            self.project[start + j](self.features[start + j](x[:, j : j + 1], self._working.dtype))
            for j in range(x.shape[1])
        ]
        return torch.stack(tokens, 1)

    def law(self, h: Tensor, t: int) -> Distribution:
        """The law of cell t, if it is there, from vectors ``(n, width)``: shape ``(n, 1)``."""
        return self.heads[t](h)

    def log_probs(self, h: Tensor, x: Tensor) -> Tensor:
        """log p in nats of each cell that is there, 0 elsewhere: from ``(n, columns, width)``, for ``(n, columns)``."""
        out = []
        for j, law in enumerate(self.heads):
            cells = x[:, j : j + 1]
            seen = ~torch.isnan(cells)
            nats = law(h[:, j]).log_prob(torch.where(seen, cells, 0.0))
            out.append(torch.where(seen, nats, 0.0))
        return torch.cat(out, 1)

    def initialise(self, batches: Batches) -> None:
        """Scales and biases of features and heads, from passes over the data."""
        for modules in (self.features, self.heads):
            for j, module in enumerate(modules):
                assert isinstance(module, Features | Head)
                module.initialise(Seen(batches, partial(torch.narrow, dim=1, start=j, length=1)))


def best_of_draws(space: Space, drawn: Tensor, weights: Tensor) -> Tensor:
    """The mean of numbers and the most frequent code, over draws ``(n, m, cells)`` with weights ``(n, m)``."""
    mean = (drawn * weights.unsqueeze(-1)).sum(1)
    if isinstance(space, (Binary, Integers)):
        return mean.round()
    columns = space.columns if isinstance(space, Table) else ()
    for t in range(drawn.shape[2]):
        if columns and columns[t].numeric:
            if columns[t].resolution is not None:
                mean[:, t] = columns[t].from_index(columns[t].to_index(mean[:, t])).to(mean)
            continue
        codes = drawn[:, :, t].long()
        share = mean.new_zeros(len(codes), int(codes.max()) + 1).scatter_add_(1, codes, weights)
        mean[:, t] = share.argmax(1).to(mean.dtype)
    return mean
