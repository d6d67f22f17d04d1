"""From a batch of a space to the real numbers that a network reads."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from likely.contract import Batches, Binary, Column, Counts, Integers, Space, Table, Tokens


class Features(nn.Module):
    """Features of a batch, of shape ``(batch, *shape)``: scaled values, embedded categories, and where holes are.

    * ``Binary``: the values.  ``Integers``: scaled to −1 … 1.  ``Counts``: log(1 + x), standardised.
      ``Reals``: standardised.
    * ``Tokens``: an embedding of each symbol, and one of a missing symbol.
    * ``Table``: a numeric column gives asinh of its standardised value, which tames heavy tails; a coded column an
      embedding, with a code of its own for a missing cell, so memory is linear in the number of levels.
    * A missing cell gives 0, and one more feature a cell says which were observed.  A table has these features for
      every column, so that a row may have holes where the training data had none.

    Means and scales are buffers, set once by :meth:`initialise`.
    """

    mean: Tensor
    scale: Tensor
    starts: Tensor
    absent_codes: Tensor

    def __init__(self, space: Space, embedding_dim: int = 16) -> None:
        super().__init__()
        self.space = space
        self.columns: tuple[Column, ...] = space.columns if isinstance(space, Table) else ()
        self.numeric = [j for j, column in enumerate(self.columns) if column.numeric]
        self.coded = [j for j, column in enumerate(self.columns) if column.coded]
        scaled_shape = (len(self.numeric),) if self.columns else space.shape
        self.register_buffer("mean", torch.zeros(scaled_shape, dtype=torch.float64))
        self.register_buffer("scale", torch.ones(scaled_shape, dtype=torch.float64))
        self.embedding: nn.Embedding | None = None
        if isinstance(space, Tokens):
            self.embedding = nn.Embedding(space.vocab + space.missing, embedding_dim)
            self.shape: tuple[int, ...] = (space.length * embedding_dim,)
        elif isinstance(space, Table):
            sizes = [(self.columns[j].levels or 0) + 1 for j in self.coded]
            starts = torch.tensor([0, *sizes[:-1]] if sizes else [], dtype=torch.int64).cumsum(0)
            self.register_buffer("starts", starts, persistent=False)
            self.register_buffer("absent_codes", torch.tensor(sizes, dtype=torch.float64) - 1, persistent=False)
            if sizes:
                self.embedding = nn.Embedding(sum(sizes), embedding_dim)
            self.shape = (2 * len(self.numeric) + len(self.coded) * embedding_dim,)
        elif space.missing:
            self.shape = (2 * space.shape[0], *space.shape[1:])
        else:
            self.shape = space.shape

    def cell_of_feature(self) -> list[int]:
        """For every flattened feature the flattened cell that it speaks of."""
        if self.columns:
            width = self.embedding.embedding_dim if self.embedding is not None else 0
            return [*self.numeric, *self.numeric, *(j for j in self.coded for _ in range(width))]
        cells = list(range(self.space.dims))
        if self.embedding is not None:
            return [j for j in cells for _ in range(self.embedding.embedding_dim)]
        return cells + cells if self.space.missing else cells

    @torch.no_grad()
    def initialise(self, batches: Batches, of_condition: bool = False) -> None:
        """Set means and scales from one pass over the data (observed cells only)."""
        if isinstance(self.space, (Binary, Integers, Tokens)) or (self.columns and not self.numeric):
            return
        count = torch.zeros_like(self.mean)
        mean = torch.zeros_like(self.mean)
        squares = torch.zeros_like(self.mean)
        for batch in batches:
            x = batch[1] if of_condition else batch[0]
            assert x is not None
            values = self._to_scale(x.to(self.mean))
            seen = ~torch.isnan(values)
            n = seen.sum(0).to(count)
            batch_mean = values.nan_to_num(0.0).sum(0) / n.clamp(min=1)
            batch_squares = torch.where(seen, values - batch_mean, 0.0).square().sum(0)
            delta, total = batch_mean - mean, count + n  # Chan, Golub & LeVeque (1983): merging of moments
            share = n / total.clamp(min=1)
            mean = mean + delta * share
            squares = squares + batch_squares + delta.square() * count * share
            count = total
        deviation = (squares / count.clamp(min=1)).sqrt()
        self.mean.copy_(mean)
        self.scale.copy_(torch.where(deviation > 1e-12 * (1 + mean.abs()), deviation, 1.0))

    def _to_scale(self, x: Tensor) -> Tensor:
        if self.columns:
            return x[:, self.numeric]
        return torch.log1p(x) if isinstance(self.space, Counts) else x

    def forward(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Features in ``dtype``; the scaling itself is done in the precision of the buffers, float64."""
        if self.columns:
            return self._table(x, dtype)
        if isinstance(self.space, Tokens):
            assert self.embedding is not None
            symbols = x.nan_to_num(float(self.space.vocab)) if self.space.missing else x
            return self.embedding(symbols.long()).flatten(1)
        if isinstance(self.space, Binary):
            values = x.to(dtype)
        elif isinstance(self.space, Integers):
            values = x.to(dtype) * (2.0 / (self.space.levels - 1)) - 1.0
        else:
            values = ((self._to_scale(x.to(self.mean)) - self.mean) / self.scale).to(dtype)
        if not self.space.missing:
            return values
        observed = ~torch.isnan(values)
        return torch.cat([values.nan_to_num(0.0), observed.to(dtype)], 1)

    def _table(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        pieces = []
        if self.numeric:
            values = (x[:, self.numeric].to(self.mean) - self.mean) / self.scale
            observed = ~torch.isnan(values)
            pieces += [torch.asinh(values).nan_to_num(0.0).to(dtype), observed.to(dtype)]
        if self.embedding is not None:
            codes = x[:, self.coded]
            codes = torch.where(torch.isnan(codes), self.absent_codes.to(codes), codes).long()
            pieces.append(self.embedding(codes + self.starts).flatten(1))
        return torch.cat(pieces, 1)


class PiecewiseLinear(nn.Module):
    """Numeric cells as how far they have come through each of several parts of their values (Gorishniy et al. 2022).

    Feature k of a cell is 0 below part k, 1 above it and linear within; the parts hold equally many training values
    (arXiv 2203.05556, section 3.2).  A missing cell has zeros.

    >>> encoding = PiecewiseLinear(1, parts=2)
    >>> encoding.initialise([torch.tensor([[0.0], [1.0], [2.0], [3.0], [8.0]])])
    >>> encoding(torch.tensor([[1.0], [8.0]]), torch.float32)
    tensor([[0.5000, 0.0000],
            [1.0000, 1.0000]])

    Args:
        cells: number of cells.
        parts: number of parts.
    """

    edges: Tensor

    def __init__(self, cells: int, parts: int) -> None:
        super().__init__()
        self.cells, self.parts = cells, parts
        edges = torch.linspace(-2.0, 2.0, parts + 1, dtype=torch.float64) if parts else torch.zeros(1)
        self.register_buffer("edges", edges.double().expand(cells, -1).clone())

    @torch.no_grad()
    def initialise(self, batches: Iterable[Tensor], most: int = 100_000) -> None:
        """Set the parts from a pass over batches ``(batch, cells)``, of which at most ``most`` rows are kept."""
        kept, rows = [], 0
        for x in batches:
            kept.append(x.double()[: max(0, most - rows)])
            rows += len(x)
        values = torch.cat(kept).to(self.edges.device)
        for j in range(self.cells):
            known = values[:, j][~torch.isnan(values[:, j])]
            if len(known) and self.parts:
                share = torch.linspace(0.0, 1.0, self.parts + 1, dtype=torch.float64, device=known.device)
                self.edges[j] = torch.quantile(known, share)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Features in ``dtype``, shape ``(batch, cells · parts)``."""
        low, high = self.edges[:, :-1], self.edges[:, 1:]
        width = high - low
        empty = width <= 0
        value = x.to(low).unsqueeze(-1)
        share = ((value - low) / torch.where(empty, torch.ones_like(width), width)).clamp(0.0, 1.0)
        share = torch.where(empty, (value >= high).to(share), share)
        return torch.where(torch.isnan(value), torch.zeros_like(share), share).to(dtype).flatten(1)
