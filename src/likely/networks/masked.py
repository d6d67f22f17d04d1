"""Masked networks: outputs that see only some of the inputs, and a walk that computes every unit once.

MADE (Germain et al. 2015, arXiv 1502.03509): every unit has a degree, and sees the units before it whose degree is not
above its own.  An input has its place in the order, counted from 1; an output the number of inputs that it may see.
Here the hidden units stand in the order of their degrees, so that what becomes known as the inputs arrive one after the
other is a slice of every layer: drawing all features costs as much arithmetic as one evaluation.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Generator, Sequence

import torch
from torch import Tensor, nn

from likely.networks.linear import Linear, affine, affine_columns
from likely.networks.mlp import make_activation


class MaskedLinear(Linear):
    """x (W ∘ M)ᵀ + b, in which an output sees the inputs whose degree is at most its own.

    >>> layer = MaskedLinear([1, 2, 3], [0, 1, 2])
    >>> layer.mask.int().tolist()
    [[0, 0, 0], [1, 0, 0], [1, 1, 0]]

    Args:
        in_degrees: degree of each input.
        out_degrees: degree of each output.
    """

    mask: Tensor

    def __init__(self, in_degrees: Sequence[int], out_degrees: Sequence[int], bias: bool = True) -> None:
        super().__init__(len(in_degrees), len(out_degrees), bias)
        self.register_buffer("mask", torch.ones_like(self.weight), persistent=False)
        self.set_degrees(in_degrees, out_degrees)

    def set_degrees(self, in_degrees: Sequence[int], out_degrees: Sequence[int]) -> None:
        """Give the inputs and outputs other degrees."""
        rows, columns = torch.tensor(list(out_degrees)).unsqueeze(1), torch.tensor(list(in_degrees)).unsqueeze(0)
        self.mask.copy_(columns <= rows)

    def masked_weight(self) -> Tensor:
        """W ∘ M, shape ``(out, in)``."""
        return self.weight * self.mask

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.masked_weight(), self.bias)

    def of_columns(self, x: Tensor) -> Tensor:
        """:meth:`forward` of examples that stand as columns, shape ``(in, examples)``."""
        return affine_columns(x, self.masked_weight(), self.bias)


class MaskedMLP(nn.Module):
    """An autoregressive network on vectors: the numbers for a feature depend on the features before it, and a context.

    h₁ = act(W₀ x + C c);  hₗ₊₁ = act(Wₗ hₗ), or with ``residual`` hₗ + act(Wₗ hₗ);  output = W hₗ.

    >>> network = MaskedMLP(3, 2, (16, 16), order=[2, 0, 1])
    >>> x = torch.randn(4, 3)
    >>> network(x).shape
    torch.Size([2, 4, 3])
    >>> walk = network.walk(4)
    >>> steps = [next(walk), walk.send(x[:, 2]), walk.send(x[:, 0])]
    >>> torch.allclose(torch.stack(steps, 2), network(x)[:, :, [2, 0, 1]], atol=1e-6)
    True

    Args:
        features: number of inputs.
        out_per_feature: numbers that come out for each of them.
        hidden: widths of the hidden layers; at least as wide as there are features, or some dependences are lost.
        context: width of the context vector, 0 if there is none.
        order: the features in the order in which they are drawn; by default as they stand.
        residual: whether a hidden layer adds to the one before it (all are then of one width).
    """

    def __init__(
        self,
        features: int,
        out_per_feature: int,
        hidden: Sequence[int],
        context: int = 0,
        order: Sequence[int] | None = None,
        activation: str = "relu",
        residual: bool = False,
    ) -> None:
        super().__init__()
        self.order = list(range(features)) if order is None else [int(i) for i in order]
        if sorted(self.order) != list(range(features)):
            raise ValueError(f"order: expected a permutation of 0 to {features - 1}, got {self.order}")
        if not hidden:
            raise ValueError("hidden: expected at least one layer width, got none")
        if residual and len(set(hidden)) != 1:
            raise ValueError(f"hidden: a residual network has layers of one width, got {tuple(hidden)}")
        self.features, self.out_per_feature, self.residual = features, out_per_feature, residual
        place = [self.order.index(i) for i in range(features)]
        # Units of degree 0 see the context alone; without one they would be constants.
        lowest = 0 if context or features == 1 else 1
        self.degrees = [_degrees(lowest, features - 1, width) for width in hidden]
        steps = [[p + 1 for p in place], *self.degrees]
        self.layers = nn.ModuleList([MaskedLinear(a, b) for a, b in itertools.pairwise(steps)])
        self.context = Linear(context, hidden[0], bias=False) if context else None
        self.output = MaskedLinear(steps[-1], place * out_per_feature)
        self.activation = make_activation(activation)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Numbers for every feature: shape ``(out_per_feature, batch, features)``, in memory the examples last."""
        return self.of_columns(x.t(), context).transpose(1, 2)

    def of_columns(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """:meth:`forward` of examples that stand as columns, ``(features, batch)``: ``(numbers, features, batch)``."""
        first, *others = self.layers
        h = first.of_columns(x)  # type: ignore[operator]
        if self.context is not None:
            assert context is not None
            h = h + self.context(context).t()
        h = self.activation(h)
        for layer in others:
            new = self.activation(layer.of_columns(h))  # type: ignore[operator]
            h = h + new if self.residual else new
        return self.output.of_columns(h).view(self.out_per_feature, self.features, -1)

    def walk(self, n: int, context: Tensor | None = None) -> Generator[Tensor, Tensor, None]:
        """Numbers for the features in their order, ``(out_per_feature, n)`` each; no unit is computed twice.

        The value of the feature, shape ``(n,)``, is sent before the numbers for the next one are given.
        """
        weights = [layer.masked_weight() for layer in self.layers]  # type: ignore[operator]
        weights[0] = weights[0][:, self.order]  # the inputs in the order of their arrival
        biases = [layer.bias.unsqueeze(1) for layer in self.layers]  # type: ignore[operator, union-attr]
        shift = self.context(context).t() if self.context is not None else None
        output = self.output.masked_weight().unflatten(0, (self.out_per_feature, self.features))
        output_bias = self.output.bias.unflatten(0, (self.out_per_feature, self.features))
        rows = [_Rows(self.features, n, output)] + [_Rows(len(w), n, output) for w in weights]  # units × examples
        for place, feature in enumerate(self.order):
            for i, degrees in enumerate(self.degrees):
                start, stop = bisect_left(degrees, place), bisect_right(degrees, place)
                if start == stop:
                    continue
                new = biases[i][start:stop]
                below = rows[i].known
                if len(below):
                    new = torch.addmm(new, weights[i][start:stop, : len(below)], below)
                if i == 0 and shift is not None:
                    new = new + shift[start:stop]
                new = self.activation(new)
                if self.residual and i:
                    new = new + below[start:stop]
                rows[i + 1].append(new.expand(-1, n))
            known = rows[-1].known
            numbers = output_bias[:, feature].unsqueeze(1)
            if len(known):
                numbers = torch.addmm(numbers, output[:, feature, : len(known)], known)
            rows[0].append((yield numbers.expand(-1, n)).unsqueeze(0))


def examples_last(h: Tensor, weight: Tensor, bias: Tensor, numbers: int) -> Tensor:
    """An output layer h Wᵀ + b of shape ``(numbers, batch, cells)``, which lies in memory as (numbers, cells, batch).

    What is done to one number of all cells, or to all examples of one cell, then runs along contiguous memory.
    """
    return affine_columns(h.t(), weight, bias).unflatten(0, (numbers, -1)).transpose(1, 2)


class _Rows:
    """A matrix that grows by rows: in place where no gradient is wanted."""

    def __init__(self, rows: int, columns: int, like: Tensor) -> None:
        self._space = None if torch.is_grad_enabled() else like.new_empty(rows, columns)
        self.known = like.new_empty(0, columns)

    def append(self, new: Tensor) -> None:
        if self._space is None:
            self.known = torch.cat([self.known, new])
        else:
            start, stop = len(self.known), len(self.known) + len(new)
            self._space[start:stop] = new
            self.known = self._space[:stop]


def _degrees(lowest: int, highest: int, width: int) -> list[int]:
    """Degrees of hidden units, in their order, spread evenly; the highest always has a unit."""
    count = highest - lowest + 1
    return sorted(highest - i * count // width for i in range(width))
