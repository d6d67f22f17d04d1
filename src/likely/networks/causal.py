"""Causal convolutions over images: every position sees only what comes before it in raster order.

A masked convolution (van den Oord, Kalchbrenner & Kavukcuoglu 2016, arXiv 1601.06759) is a linear map of the patch of
positions above and to the left.  Here it is taken literally: the patches are gathered, and the map is an ordinary
linear layer on rows.  No product with a masked zero is computed, the rows may be those of a whole image, of one
position in each image of a batch, or of a random few, and a row's result is a function of that row alone.

Maps are channels last, ``(batch, height, width, channels)``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from likely.networks.linear import Linear
from likely.networks.mlp import make_activation


class CausalPatch:
    """The positions before a position in raster order, at most ``rows`` above and ``columns`` to either side.

    >>> patch = CausalPatch(1, 1)
    >>> patch.offsets
    [(-1, -1), (-1, 0), (-1, 1), (0, -1)]
    >>> image = torch.arange(6.0).reshape(1, 2, 3, 1)
    >>> patch.all(patch.pad(image, torch.tensor([-1.0])))[0, 1, 1, :, 0]
    tensor([0., 1., 2., 3.])

    Args:
        rows: rows above, 0 or more.
        columns: columns to either side, 1 or more.
        centre: whether the position itself belongs to the patch, as it does in all layers but the first.
    """

    def __init__(self, rows: int, columns: int, centre: bool = False) -> None:
        if rows < 0 or columns < 1:
            raise ValueError(f"expected rows >= 0 and columns >= 1 in a causal field, got {rows} and {columns}")
        self.rows, self.columns, self.centre = rows, columns, centre
        block = [(dy, dx) for dy in range(-rows, 1) for dx in range(-columns, columns + 1)]
        self.offsets = block[: block.index((0, 0)) + centre]

    def __len__(self) -> int:
        return len(self.offsets)

    def empty(self, n: int, height: int, width: int, fill: Tensor) -> Tensor:
        """A padded map of which no position is known yet, to be filled by :meth:`write`."""
        return fill.expand(n, height + self.rows, width + 2 * self.columns, -1).clone()

    def pad(self, x: Tensor, fill: Tensor) -> Tensor:
        """The map with a border: ``fill`` above; to the right the row's last value; to the left the first one above.

        What the border of a row holds is known before the row (left) or after it (right), so that patches are causal.

        Args:
            x: shape ``(n, height, width, channels)``.
            fill: shape ``(channels,)``.
        """
        n, height, width, channels = x.shape
        padded = x.new_empty(n, height + self.rows, width + 2 * self.columns, channels)
        padded[:, : self.rows] = fill
        inner = padded[:, self.rows :]
        inner[:, :, self.columns : self.columns + width] = x
        inner[:, 0, : self.columns] = fill
        inner[:, 1:, : self.columns] = x[:, :-1, :1]
        inner[:, :, self.columns + width :] = x[:, :, -1:]
        return padded

    def write(self, padded: Tensor, i: int, j: int, values: Tensor) -> None:
        """Put the values ``(n, channels)`` of position (i, j) in a padded map, and what they settle in its border."""
        width = padded.shape[2] - 2 * self.columns
        padded[:, self.rows + i, self.columns + j] = values
        if j == 0 and self.rows + i + 1 < padded.shape[1]:
            padded[:, self.rows + i + 1, : self.columns] = values.unsqueeze(1)
        if j == width - 1:
            padded[:, self.rows + i, self.columns + width :] = values.unsqueeze(1)

    def all(self, padded: Tensor) -> Tensor:
        """Patches at all positions: shape ``(n, height, width, len(self), channels)``."""
        height, width = padded.shape[1] - self.rows, padded.shape[2] - 2 * self.columns
        taps = [
            padded[:, self.rows + dy : self.rows + dy + height, self.columns + dx : self.columns + dx + width]
            for dy, dx in self.offsets
        ]
        return torch.stack(taps, 3)

    def some(self, padded: Tensor, positions: Tensor) -> Tensor:
        """Patches at some positions of each image: shape ``(n, k, len(self), channels)``.

        Args:
            positions: indices i · width + j, int64, shape ``(n, k)``.
        """
        n, height, full = padded.shape[:3]
        width = full - 2 * self.columns
        start = torch.arange(n, device=padded.device).unsqueeze(1) * (height * full)
        i, j = positions // width, positions % width
        centre = start + (i + self.rows) * full + j + self.columns
        offsets = torch.tensor([dy * full + dx for dy, dx in self.offsets], device=padded.device)
        return padded.reshape(n * height * full, -1)[centre.unsqueeze(-1) + offsets]

    def at(self, padded: Tensor, i: int, j: int) -> Tensor:
        """Patches at one position of every image: shape ``(n, len(self), channels)``."""
        block = padded[:, i : i + self.rows + 1, j : j + 2 * self.columns + 1]
        return block.flatten(1, 2)[:, : len(self)]


class ResidualRows(nn.Module):
    """A linear layer and residual layers on rows: h = act(W₀ x + shift), then h ← h + act(W h), ``layers`` times.

    On rows of patches the first layer is a masked convolution and the others are 1 × 1 convolutions.

    Args:
        in_features: width of a row.
        width: width of the hidden rows.
        layers: number of residual layers.
        residual: whether the last ``width`` features of a row, which are its position's own, are added to the first h.
    """

    def __init__(
        self, in_features: int, width: int, layers: int, activation: str, dropout: float = 0.0, residual: bool = False
    ) -> None:
        super().__init__()
        self.residual, self.width = residual, width
        self.first = Linear(in_features, width)
        self.layers = nn.ModuleList([Linear(width, width) for _ in range(layers)])
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, rows: Tensor, shift: Tensor | None = None) -> Tensor:
        """Shapes ``(rows, in_features)`` and ``(rows, width)`` to ``(rows, width)``."""
        h = self.first(rows)
        h = self.activation(h if shift is None else h + shift)
        if self.residual:
            h = h + rows[:, -self.width :]
        for layer in self.layers:
            h = h + self.dropout(self.activation(layer(h)))
        return h
