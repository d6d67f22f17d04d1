"""What gives an elementwise transform its numbers: nothing, a context, half of the cells, or the cells before."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from likely.bijections.bijection import Bijection
from likely.bijections.elementwise import Elementwise, Written
from likely.networks.conditioning import without_autocast
from likely.networks.linear import Linear
from likely.networks.masked import MaskedMLP, examples_last
from likely.networks.mlp import MLP, ResidualMLP, full_precision
from likely.networks.written import differentiable_backward, serves, untracked

#: Factor on the initial weights of the layer that gives the numbers: the map starts near that of zero numbers.
_START = 0.1


class Unconditional(Bijection):
    """A transform with numbers of its own for every cell, whatever the others are.

    >>> from likely.bijections import Sigmoid
    >>> Unconditional(Sigmoid(), (2,))(torch.zeros(1, 2))
    (tensor([[0.5000, 0.5000]]), tensor([-2.7726]))

    Args:
        shape: shape of an example.
    """

    def __init__(self, transform: Elementwise, shape: Sequence[int]) -> None:
        super().__init__()
        self.transform = transform
        self.numbers = nn.Parameter(torch.zeros(transform.numbers, 1, *shape)) if transform.numbers else None

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _summed(self.transform.forward(x, self._numbers(x)))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _summed(self.transform.inverse(z, self._numbers(z)))

    def cells(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z, and the log-slope of every cell: of the shape of x."""
        return self.transform.forward(x, self._numbers(x))

    def _numbers(self, x: Tensor) -> Tensor:
        if self.numbers is None:
            return x.new_empty(0, *x.shape)
        return self.numbers if self.transform.shares else self.numbers.expand(-1, *x.shape)


class Conditioned(Bijection):
    """A transform whose numbers a network makes of the context.

    Args:
        shape: shape of an example.
        context: width of the context.
        hidden: widths of the network's hidden layers.
    """

    def __init__(
        self,
        transform: Elementwise,
        shape: Sequence[int],
        context: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.transform, self.shape = transform, tuple(shape)
        self.network = VectorNetwork(0, math.prod(shape), transform.numbers, hidden, context, activation)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_to(self.transform.forward, x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_to(self.transform.inverse, z, context)

    def _apply_to(self, function: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        flat = x.flatten(1)
        z, log_slope = function(flat.t(), self.network(flat[:, :0], context).transpose(1, 2))
        return z.t().reshape(x.shape), log_slope.sum(0)


class VectorNetwork(nn.Module):
    """Numbers for some cells of a vector, made of others and a context: shape ``(numbers, batch, cells)``.

    Args:
        known: cells that it sees.
        cells: cells that it makes numbers for.
        numbers: how many for each.
        hidden: widths of its layers.
        context: width of the context, 0 if there is none.
        residual: whether it is a residual network.
    """

    def __init__(
        self,
        known: int,
        cells: int,
        numbers: int,
        hidden: Sequence[int],
        context: int = 0,
        activation: str = "relu",
        residual: bool | None = False,
    ) -> None:
        super().__init__()
        self.numbers, self.has_context = numbers, context > 0
        body = ResidualMLP if residual else MLP
        self.body = body(max(known + context, 1), hidden, activation)  # of nothing it makes constants
        self.output = Linear(self.body.out_features, numbers * cells)
        start_small(self.output)

    def forward(self, known: Tensor, context: Tensor | None = None) -> Tensor:
        if self.has_context:
            if context is None:
                raise ValueError("context: this bijection was built with one, got None")
            known = torch.cat([known, context], 1)
        h = self.body(known if known.shape[1] else known.new_zeros(len(known), 1))
        return full_precision(examples_last(h, self.output.weight, self.output.bias, self.numbers))


class Coupling(Bijection):
    """Some cells as they are, the others through a transform whose numbers a network makes of the former.

    Dinh, Sohl-Dickstein & Bengio 2017 (RealNVP, arXiv 1605.08803).

    >>> from likely.bijections import Affine
    >>> coupling = Coupling(Affine(), [True, False, False])
    >>> x = torch.randn(5, 3)
    >>> z, log_det = coupling(x)
    >>> torch.equal(z[:, 0], x[:, 0]), torch.allclose(coupling.inverse(z)[0], x, atol=1e-6)
    (True, True)

    Args:
        mask: true for what stays.  Over the first axis of an example (features of a vector, channels of a map), or of
            the whole shape of an example (a checkerboard).
        network: a module ``(known, context) -> numbers``; by default a :class:`VectorNetwork`, for vectors.  For a mask
            over the first axis it is shown the kept channels, and gives ``(batch, numbers · changed channels, …)``,
            the first number of all channels first.  For a mask over the whole shape it is shown x with 0 for what is
            changed, and gives numbers for all channels.
        options: of the default network: ``hidden``, ``context``, ``activation``, ``residual``.
    """

    mask: Tensor
    kept: Tensor
    changed: Tensor
    back: Tensor

    def __init__(
        self, transform: Elementwise, mask: Sequence[bool] | Tensor, network: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__()
        mask = torch.as_tensor(mask).bool()
        if mask.all():
            raise ValueError("mask: expected cells to change, got a mask that is true everywhere")
        if network is not None and options:
            raise ValueError(f"options: expected none beside a network, got {sorted(options)}")
        self.transform, self.whole = transform, mask.dim() > 1
        kept, changed = mask.flatten().nonzero().flatten(), (~mask).flatten().nonzero().flatten()
        self.register_buffer("mask", mask, persistent=False)
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("changed", changed, persistent=False)
        self.register_buffer("back", torch.cat([kept, changed]).argsort(), persistent=False)
        self.on_vectors = network is None
        if network is None:
            if self.whole:
                raise ValueError("network: expected one for a mask over several axes")
            network = VectorNetwork(len(kept), len(changed), transform.numbers, **{"hidden": (64, 64), **options})
        self.network = network

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_to(self.transform.forward, x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_to(self.transform.inverse, z, context)

    def cells(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z, and the log-slope of every cell, 0 where it stays: of the shape of x; with the default network."""
        assert self.on_vectors
        known, z, log_slope = self._columns(self.transform.forward, x, context)
        log_slope = torch.cat([torch.zeros_like(known), log_slope]).index_select(0, self.back).t()
        return torch.cat([known, z]).index_select(0, self.back).t(), log_slope

    def _columns(self, function: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What stays, what the others become, and their log-slopes: ``(cells, batch)`` each."""
        columns = x.t()
        known, free = columns.index_select(0, self.kept), columns.index_select(0, self.changed)
        return known, *function(free, self.network(known.t(), context).transpose(1, 2))

    def _apply_to(self, function: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.whole:
            numbers = self.network(x.masked_fill(~self.mask, 0.0), context)
            z, log_slope = function(x, numbers.unflatten(1, (self.transform.numbers, -1)).transpose(0, 1))
            return torch.where(self.mask, x, z), log_slope.masked_fill(self.mask, 0.0).flatten(1).sum(1)
        if self.on_vectors:
            known, z, log_slope = self._columns(function, x, context)
            return torch.cat([known, z]).index_select(0, self.back).t(), log_slope.sum(0)
        known, free = x.index_select(1, self.kept), x.index_select(1, self.changed)
        numbers = self.network(known, context).unflatten(1, (self.transform.numbers, -1)).transpose(0, 1)
        z, log_slope = function(free, numbers)
        return torch.cat([known, z], 1).index_select(1, self.back), log_slope.flatten(1).sum(1)


class Autoregressive(Bijection):
    """A transform of every cell with numbers that a masked network makes of the cells before it (and the context).

    Papamakarios, Pavlakou & Murray 2017 (MAF, arXiv 1705.07057).  Data to base takes one evaluation of the network;
    the way back goes cell by cell, and computes every unit of the network once.  Its
    :class:`~likely.bijections.Inverse` is the inverse autoregressive flow (Kingma et al. 2016, arXiv 1606.04934).

    Args:
        features: number of cells; examples of another shape are flattened.
        options: of the :class:`~likely.networks.MaskedMLP`: ``hidden``, ``context``, ``order``, ``activation``,
            ``residual``.
    """

    def __init__(self, transform: Elementwise, features: int, **options: Any) -> None:
        super().__init__()
        self.transform = transform
        self.network = MaskedMLP(features, transform.numbers, **{"hidden": (64, 64), **options})
        start_small(self.network.output)
        self.many = 1 + len(self.network.weights_and_biases())  #: how many :meth:`arguments` there are

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.through([self], x, context)

    @classmethod
    def through(cls, steps: Sequence[Any], x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if torch.is_autocast_enabled(x.device.type):  # the two directions agree in full precision alone
            with without_autocast(x):
                return cls.through(steps, full_precision(x), None if context is None else full_precision(context))
        flat = x if x.dim() == 2 else x.flatten(1)
        arguments = [argument for step in steps for argument in step.arguments(context)]
        if all(isinstance(step.transform, Written) for step in steps) and serves(flat, *arguments):
            z, log_det = _LeanSteps.apply(steps, flat, *arguments)
        elif len(steps) > 1:
            return super().through(steps, x, context)
        else:
            z, log_det = _plain_steps(steps, flat, *arguments)
        return z if x.dim() == 2 else z.reshape(x.shape), log_det

    def arguments(self, context: Tensor | None) -> list[Any]:
        """What the network computes with: its shift, and the weights and biases."""
        return [self.network.shift(context), *self.network.weights_and_biases()]

    def cells(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z, and the log-slope of every cell: of the shape of x."""
        z, log_slope = self.columns(x.flatten(1), *self.arguments(context))
        return z.t().reshape(x.shape), log_slope.t().reshape(x.shape)

    def columns(self, x: Tensor, shift: Tensor | None, *weights_and_biases: Tensor) -> tuple[Tensor, Tensor]:
        """z and its log-slopes: ``(features, batch)``."""
        columns = x.t().contiguous()
        return self.transform.forward(columns, self.network.plain(columns, shift, *weights_and_biases))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if torch.is_autocast_enabled(z.device.type):
            with without_autocast(z):
                return self.inverse(full_precision(z), None if context is None else full_precision(context))
        if not untracked():
            return self._cell_by_cell(z, context)
        with torch.inference_mode():  # many small operations, which autograd would look at one by one
            x, log_det = self._cell_by_cell(z, context)
        return x.clone(), log_det.clone()

    def _cell_by_cell(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """The way back."""
        columns, log_slopes = list(z.flatten(1).t().contiguous().unbind()), []
        walk = self.network.walk(len(z), context)
        x: Any = None  # there is no cell before the first
        for feature in self.network.order:
            x, log_slope = self.transform.inverse(columns[feature], walk.send(x))
            columns[feature] = x
            log_slopes.append(log_slope)
        return torch.stack(columns).t().reshape(z.shape), torch.stack(log_slopes).sum(0)


def _plain_steps(steps: Sequence[Autoregressive], x: Tensor, *arguments: Tensor | None) -> tuple[Tensor, Tensor]:
    """z of shape ``(batch, features)``, and the log-det, in plain operations."""
    log_det = x.new_zeros(len(x))
    for step, own in _with_arguments(steps, arguments):
        z, log_slope = step.columns(x, *own)
        x, log_det = z.t(), log_det + log_slope.sum(0)
    return x, log_det


def _with_arguments(steps: Sequence[Autoregressive], arguments: Iterable[Any]) -> Iterator[tuple[Any, list[Any]]]:
    """Each step, and its own part of the arguments of all."""
    rest = iter(arguments)
    return ((step, list(itertools.islice(rest, step.many))) for step in steps)


class _LeanSteps(torch.autograd.Function):
    """Autoregressive networks and their transforms, one after the other, as one node of the graph."""

    @staticmethod
    def forward(
        ctx: Any, steps: Sequence[Autoregressive], x: Tensor, *arguments: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        columns, log_slopes, saved = x.t().contiguous(), x.new_zeros(()), [x, *arguments]
        ctx.steps, ctx.ends = steps, [len(saved)]  # of what is saved: where each part ends
        for step, own in _with_arguments(steps, arguments):
            numbers, of_network = step.network.lean(columns, *own)
            columns, log_slope, of_transform = step.transform.lean(columns, numbers)
            log_slopes = log_slopes + log_slope
            for part in (of_network, of_transform):
                saved += part
                ctx.ends.append(len(saved))
        ctx.save_for_backward(*saved)
        return columns.t(), log_slopes.sum(0)

    @staticmethod
    def backward(ctx: Any, of_z: Tensor, of_log_det: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_autocast_enabled(of_z.device.type):
            with without_autocast(of_z):
                return _LeanSteps.backward(ctx, of_z, of_log_det)
        steps, ends, saved, needed = ctx.steps, ctx.ends, ctx.saved_tensors, ctx.needs_input_grad
        if torch.is_grad_enabled():  # for the derivative of the derivative
            plain = functools.partial(_plain_steps, steps)
            return None, *differentiable_backward(plain, saved[: ends[0]], needed[1:], of_z, of_log_det)
        of_columns: Any = of_z.t().contiguous()
        gradients: list[Tensor | None] = []
        for i in range(len(steps) - 1, -1, -1):
            network, transform = steps[i].network, steps[i].transform
            start, middle, end = ends[2 * i : 2 * i + 3]
            of_numbers = of_columns.new_empty(transform.numbers, *of_columns.shape)
            of_x = transform.lean_backward(saved[middle:end], of_columns, of_log_det, of_numbers)
            of_columns, *of_arguments = network.lean_backward(
                saved[start:middle], of_numbers, of_x if i or needed[1] else None
            )
            gradients = of_arguments + gradients
        gradients.insert(0, None if of_columns is None else of_columns.t())
        return None, *[gradient if is_needed else None for gradient, is_needed in zip(gradients, needed[1:])]


def start_small(layer: nn.Linear) -> None:
    """Bring a layer that gives numbers near zero, where transforms are mild."""
    with torch.no_grad():
        layer.weight.mul_(_START)
        layer.bias.zero_()


def _summed(found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return found[0], found[1].flatten(1).sum(1)
