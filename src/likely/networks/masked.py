"""Masked networks: outputs that see only some of the inputs, and a walk that computes every unit once.

MADE (Germain et al. 2015, arXiv 1502.03509): every unit has a degree, and sees the units before it whose degree is not
above its own.  An input has its place in the order, counted from 1; an output the number of inputs that it may see.
Here the hidden units stand in the order of their degrees, so that what becomes known as the inputs arrive one after the
other is a slice of every layer: drawing all features costs as much arithmetic as one evaluation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from torch import Tensor, nn

from likely.networks.conditioning import zero
from likely.networks.linear import Linear, affine, affine_columns, product
from likely.networks.mlp import make_activation
from likely.networks.written import untracked

_aten = torch.ops.aten
#: Activations, in place where they may be, and their derivatives, in place: ``(gradient, argument, value)``.
_ACTIVATIONS: dict[type[nn.Module], tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    nn.ReLU: (torch.relu_, lambda g, u, y: _aten.threshold_backward.grad_input(g, y, 0, grad_input=g)),
    nn.ELU: (
        _aten.elu_.default,
        lambda g, u, y: _aten.elu_backward.grad_input(g, 1.0, 1.0, 1.0, True, y, grad_input=g),
    ),
    nn.Tanh: (torch.tanh_, lambda g, u, y: _aten.tanh_backward.grad_input(g, y, grad_input=g)),
    nn.GELU: (_aten.gelu.default, lambda g, u, y: _aten.gelu_backward.grad_input(g, u, grad_input=g)),
    nn.SiLU: (_aten.silu.default, lambda g, u, y: _aten.silu_backward.grad_input(g, u, grad_input=g)),
    nn.Softplus: (
        _aten.softplus.default,
        lambda g, u, y: _aten.softplus_backward.grad_input(g, u, 1.0, 20.0, grad_input=g),
    ),
}


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


class MaskedMLP(nn.Module):
    """An autoregressive network on vectors: the numbers for a feature depend on the features before it, and a context.

    h₁ = act(W₀ x + C c);  hₗ₊₁ = act(Wₗ hₗ);  output = W hₗ.

    A residual network is linear but for what its layers add: h₁ = W₀ x + C c;  hₗ₊₁ = hₗ + Wₗ act(hₗ);  output = W hₗ
    (pre-activation: He et al. 2016, arXiv 1603.05027), with Wₗ started at zero.

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
        residual: whether it is residual, which takes two hidden layers or more, all of one width; None: where they are.
    """

    def __init__(
        self,
        features: int,
        out_per_feature: int,
        hidden: Sequence[int],
        context: int = 0,
        order: Sequence[int] | None = None,
        activation: str = "relu",
        residual: bool | None = False,
    ) -> None:
        super().__init__()
        self.order = list(range(features)) if order is None else [int(i) for i in order]
        if sorted(self.order) != list(range(features)):
            raise ValueError(f"order: expected a permutation of 0 to {features - 1}, got {self.order}")
        if not hidden:
            raise ValueError("hidden: expected at least one layer width, got none")
        alike = len(hidden) > 1 and len(set(hidden)) == 1
        if residual and not alike:
            raise ValueError(f"hidden: a residual network has two layers or more, of one width, got {tuple(hidden)}")
        self.features, self.out_per_feature = features, out_per_feature
        self.residual = alike if residual is None else residual
        place = [self.order.index(i) for i in range(features)]
        # Units of degree 0 see the context alone; without one they would be constants.
        lowest = 0 if context or features == 1 else 1
        self.degrees = [_degrees(lowest, features - 1, width) for width in hidden]
        #: of each hidden layer, the units that see a place of the order and none after it
        self._counts = [[degrees.count(p) for p in range(features)] for degrees in self.degrees]
        steps = [[p + 1 for p in place], *self.degrees]
        self.layers = nn.ModuleList([MaskedLinear(a, b) for a, b in itertools.pairwise(steps)])
        self.context = Linear(context, hidden[0], bias=False) if context else None
        self.output = MaskedLinear(steps[-1], place * out_per_feature)
        self.activation = make_activation(activation)
        if self.residual:
            for layer in self.layers[1:]:
                zero(layer)
            #: the state of a network of the former residual form has no such entry, and is refused
            self.register_buffer("_starts_linear", torch.ones(()))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Numbers for every feature: shape ``(out_per_feature, batch, features)``, in memory the examples last."""
        return self.plain(x.t(), self.shift(context), *self.weights_and_biases()).transpose(1, 2)

    def shift(self, context: Tensor | None) -> Tensor | None:
        """C c as columns, ``(width, batch)``."""
        if self.context is None:
            return None
        assert context is not None
        return self.context(context).t()

    @property
    def _every_layer(self) -> list[MaskedLinear]:
        return [*self.layers, self.output]  # type: ignore[list-item]

    def weights_and_biases(self) -> list[Tensor]:
        """Of every layer, and of the output."""
        return [parameter for layer in self._every_layer for parameter in (layer.weight, layer.bias)]

    def plain(self, x: Tensor, shift: Tensor | None, *weights_and_biases: Tensor) -> Tensor:
        """Numbers for examples that stand as columns, ``(features, batch)``: ``(out_per_feature, features, batch)``."""
        last = len(self.layers)
        h = x
        for i, layer in enumerate(self._every_layer):
            weight, bias = weights_and_biases[2 * i : 2 * i + 2]
            adds = self.residual and 0 < i < last
            new = affine_columns(self.activation(h) if adds else h, weight * layer.mask, bias)
            if not i and shift is not None:
                new = new + shift
            h = h + new if adds else new if self.residual or i == last else self.activation(new)
        return h.view(self.out_per_feature, self.features, -1)

    def lean(self, x: Tensor, shift: Tensor | None, *weights_and_biases: Tensor) -> tuple[Tensor, list[Tensor]]:
        """:meth:`plain` without a graph, and what :meth:`lean_backward` needs."""
        activate, _ = _ACTIVATIONS[type(self.activation)]
        weights = self._masked(weights_and_biases[::2])
        last = len(self.layers)
        h, entering, arguments = x, [], []  # what enters a layer, and what its activation was taken of
        for i, (weight, bias) in enumerate(zip(weights, weights_and_biases[1::2])):
            adds = self.residual and 0 < i < last
            if adds:
                arguments.append(h)
            entering.append(self.activation(h) if adds else h)
            u = affine_columns(entering[-1], weight, bias)
            if not i and shift is not None:
                u += shift
            if adds:
                h = u.add_(h)
            elif self.residual or i == last:
                h = u
            else:
                arguments.append(u)
                h = activate(u)
        return h.view(self.out_per_feature, self.features, -1), [*weights, *entering, *arguments]

    def lean_backward(
        self, saved: Sequence[Tensor], of_numbers: Tensor, of_x: Tensor | None = None
    ) -> list[Tensor | None]:
        """Gradients of x, added to ``of_x`` and left out without one, of the shift, and of the weights and biases."""
        _, differentiate = _ACTIVATIONS[type(self.activation)]
        last = len(self.layers)
        weights, entering, arguments = saved[: last + 1], saved[last + 1 : 2 * last + 2], saved[2 * last + 2 :]
        of_u = of_numbers.flatten(0, 1)  # of what leaves a layer
        of_weights, of_biases = [], []
        for i in range(last, -1, -1):
            of_biases.append(of_u.sum(1))
            of_weights.append(product(of_u, entering[i].t()))
            if not i:
                break
            of_h = product(weights[i].t(), of_u)
            if not (self.residual and i == last):
                of_h = differentiate(of_h, arguments[i - 1], entering[i])
            of_u = of_u + of_h if self.residual and i < last else of_h
        if of_x is not None:
            of_x = product(weights[0].t(), of_u, of_x)
        torch._foreach_mul_(of_weights, [layer.mask for layer in self._every_layer][::-1])
        return [of_x, of_u, *itertools.chain(*zip(of_weights[::-1], of_biases[::-1]))]

    def walk(self, n: int, context: Tensor | None = None) -> Generator[Tensor, Tensor, None]:
        """Numbers for the features in their order, ``(out_per_feature, n)`` each; no unit is computed twice.

        The value of the feature, shape ``(n,)``, is sent before the numbers for the next one are given.
        """
        return (self._lean_walk if untracked() else self._plain_walk)(n, context)

    def _plain_walk(self, n: int, context: Tensor | None) -> Generator[Tensor, Tensor, None]:
        """The walk in plain operations: what is known grows by rows, units × examples."""
        weights = [layer.masked_weight() for layer in self._every_layer]
        weights[0] = weights[0][:, self.order]  # the inputs in the order of their arrival
        columns = [layer.bias.unsqueeze(1) for layer in self._every_layer]
        if (shift := self.shift(context)) is not None:
            columns[0] = columns[0] + shift
        of_features, their_biases = self._by_feature(weights[-1]), self._by_feature(columns[-1])
        known = [weights[0].new_empty(0, n) for _ in weights]  # what enters each layer
        h = known[0]
        for feature, blocks, biases in zip(self.order, self._by_place(weights), self._by_place(columns)):
            for i, (weight, bias) in enumerate(zip(blocks, biases)):
                below = known[i]
                new = torch.addmm(bias, weight[:, : len(below)], below)
                if self.residual:
                    new = h = new + h if i else new
                enters = new if self.residual and i + 1 == len(self.layers) else self.activation(new)
                known[i + 1] = torch.cat([known[i + 1], enters])
            value = yield torch.addmm(their_biases[feature], of_features[feature][:, : len(known[-1])], known[-1])
            known[0] = torch.cat([known[0], value.unsqueeze(0)])

    def _lean_walk(self, n: int, context: Tensor | None) -> Generator[Tensor, Tensor, None]:
        """The walk without a graph, in few calls: units start at their biases, and nothing sees what is not known."""
        activate, _ = _ACTIVATIONS[type(self.activation)]
        weights = self._masked([layer.weight for layer in self._every_layer])
        x = weights[0].new_zeros(self.features, n)
        *units, numbers = (
            layer.bias.unsqueeze(1).expand(-1, n).clone(memory_format=torch.contiguous_format)
            for layer in self._every_layer
        )
        if (shift := self.shift(context)) is not None:
            units[0] += shift
        entering, inputs, outputs = [x, *units], x.unbind(), self._by_feature(numbers)
        of_features = self._by_feature(weights[-1])
        for feature, rows, blocks in zip(self.order, self._by_place(units), self._by_place(weights)):
            h: Tensor | None = None  # of a residual network: what the layer before left
            for i, (new, weight) in enumerate(zip(rows, blocks)):
                new.addmm_(weight, entering[i])
                if self.residual:
                    if h is not None:
                        new += h
                    if i + 1 == len(units):
                        continue
                    h = new.clone()
                value = activate(new)
                if value is not new:
                    new.copy_(value)
            inputs[feature].copy_((yield outputs[feature].addmm_(of_features[feature], entering[-1])))

    def _masked(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """W ∘ M of every layer."""
        return list(torch._foreach_mul(list(weights), [layer.mask for layer in self._every_layer]))

    def _by_place(self, tensors: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Rows of the hidden layers that become known at each place of the order; none where no unit has its degree."""
        return zip(*(tensor.split_with_sizes(counts) for tensor, counts in zip(tensors, self._counts)))

    def _by_feature(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Rows of the output layer for each feature."""
        return tensor.unflatten(0, (self.out_per_feature, self.features)).unbind(1)


def examples_last(h: Tensor, weight: Tensor, bias: Tensor, numbers: int) -> Tensor:
    """An output layer h Wᵀ + b of shape ``(numbers, batch, cells)``, which lies in memory as (numbers, cells, batch).

    What is done to one number of all cells, or to all examples of one cell, then runs along contiguous memory.
    """
    return affine_columns(h.t(), weight, bias).unflatten(0, (numbers, -1)).transpose(1, 2)


def _degrees(lowest: int, highest: int, width: int) -> list[int]:
    """Degrees of hidden units, in their order, spread evenly; the highest always has a unit."""
    count = highest - lowest + 1
    return sorted(highest - i * count // width for i in range(width))
