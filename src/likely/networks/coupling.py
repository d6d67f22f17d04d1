"""The convolutional network of a coupling layer (Kingma & Dhariwal 2018, arXiv 1807.03039, section 4).

    h₁ = relu(w₁ ∗ x + b₁ + shift),    h₂ = relu(w₂ ∗ h₁ + b₂),    y = w₃ ∗ h₂ + b₃

The hidden maps have many times the numbers of x and y, and writing them to memory and reading them again costs as much
as the products.  So there are two implementations with the same numbers:

* :func:`plain`, of PyTorch's operations, for any device and type, for compilation and derivatives of any order;
* :class:`_Lean`, for float32 on the CPU, which takes a few examples at a time through the whole network, so that what
  is between is still in the processor's cache when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.networks.linear import is_plain
from likely.networks.written import differentiable_backward, in_forward_mode

#: Numbers of a hidden map that are made at a time, 2 MiB, and the fewest examples: with fewer than 16, PyTorch may take
#: a small convolution away from oneDNN.
CACHED, FEWEST = 1 << 19, 16


class CouplingNetwork(nn.Module):
    """Three convolutions, 3 × 3, 1 × 1 and 3 × 3, with ReLU between them; the last starts at zero.

    The first two start as PyTorch's do.  Hidden layers standardised by the first batch, as in the paper's code, made
    the first steps of Adam too long: after 58 of them, at 1e-3 and without warm-up, a small Glow was 4,500 nats behind.

    >>> network = CouplingNetwork(6, 12, width=32)
    >>> network(torch.ones(2, 6, 4, 4)).abs().max().item()
    0.0

    Args:
        in_channels: channels of the input map.
        out_channels: channels of the output map.
        width: channels of the hidden layers; 512 in the paper.
        context: width of a context vector, or channels of a context map of the input's size; 0 if there is none.
    """

    def __init__(self, in_channels: int, out_channels: int, width: int, context: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(in_channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 1)
        self.last = nn.Conv2d(width, out_channels, 3, padding=1)
        self.context_map = nn.Conv2d(context, width, 1, bias=False) if context else None
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Shape ``(batch, out_channels, height, width)``; that of the context ``(batch, context[, height, width])``."""
        shift = None
        if self.context_map is not None:
            assert context is not None
            shift = self.context_map(context if context.dim() == 4 else context[:, :, None, None])
        parameters = [p for layer in (self.first, self.second, self.last) for p in layer.parameters()]
        lean = is_plain(x, self.first.weight) and not in_forward_mode()
        return (_Lean.apply if lean else plain)(x.contiguous(memory_format=torch.channels_last), shift, *parameters)


def plain(
    x: Tensor, shift: Tensor | None, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor, b3: Tensor
) -> Tensor:
    """y in plain operations; ``shift`` of shape ``(batch, width, 1, 1)`` or ``(batch, width, height, width)``."""
    return F.conv2d(_second(_first(x, shift, w1, b1), w2, b2), w3, b3, padding=1)


def _first(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
    """h₁."""
    h = F.conv2d(x, weight, bias, padding=1)
    return torch.relu_(h if shift is None else h + shift)


def _second(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """h₂."""
    return torch.relu_(F.conv2d(h, weight, bias))


class _Lean(torch.autograd.Function):
    """The network, and its derivative, a few examples at a time."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        shift: Tensor | None,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
    ) -> Tensor:
        first, second, y = [], [], []
        for x_part, shift_part in _few(x, shift, len(w1)):
            first.append(_first(x_part, shift_part, w1, b1))
            second.append(_second(first[-1], w2, b2))
            y.append(F.conv2d(second[-1], w3, b3, padding=1))
        ctx.save_for_backward(x, shift, w1, b1, w2, b2, w3, b3, *first, *second)
        return torch.cat(y)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        arguments, hidden = ctx.saved_tensors[:8], ctx.saved_tensors[8:]
        if torch.is_grad_enabled():  # for the derivative of the derivative
            return tuple(differentiable_backward(plain, arguments, ctx.needs_input_grad, gradient))
        x, shift, w1, _, w2, _, w3, _ = arguments
        turned1, turned2, turned3 = (_turned(weight) for weight in (w1, w2, w3))
        of_1, of_2, of_3 = ([torch.zeros_like(p) for p in arguments[at : at + 2]] for at in (2, 4, 6))
        of_x, of_shift, parts = [], [], len(hidden) // 2
        gradients = gradient.contiguous(memory_format=torch.channels_last).tensor_split(parts)
        for (x_part, shift_part), h1, h2, of_y in zip(
            _few(x, shift, len(w1)), hidden[:parts], hidden[parts:], gradients
        ):
            # What reads h2 first fetches it from memory, and elementwise operations do that faster than products
            of_h2 = _through_relu(F.conv2d(of_y, turned3, padding=1), h2)
            _add_product(of_3, h2, of_y, w3)
            of_h1 = _through_relu(F.conv2d(of_h2, turned2), h1)
            _add_product(of_2, h1, of_h2, w2)
            _add_product(of_1, x_part, of_h1, w1)
            if shift_part is not None:
                of_shift.append(of_h1.sum_to_size(shift_part.shape))
            if ctx.needs_input_grad[0]:
                of_x.append(F.conv2d(of_h1, turned1, padding=1))
        return torch.cat(of_x) if of_x else None, torch.cat(of_shift) if of_shift else None, *of_1, *of_2, *of_3


def _few(x: Tensor, shift: Tensor | None, width: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Examples, and their shifts, so many that a hidden map of them is small enough for the processor's cache."""
    most = max(FEWEST, CACHED // (width * x.shape[2] * x.shape[3]))
    parts = max(1, len(x) // most)
    return zip(x.tensor_split(parts), [None] * parts if shift is None else shift.tensor_split(parts))


def _turned(weight: Tensor) -> Tensor:
    """The kernel turned by half a turn, inputs for outputs: the convolution's derivative convolves with it."""
    return weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)


def _through_relu(gradient: Tensor, h: Tensor) -> Tensor:
    """The gradient where h = relu(…) is positive, 0 elsewhere; in place."""
    return torch.ops.aten.threshold_backward(gradient, h, 0, grad_input=gradient)


def _add_product(of_parameters: list[Tensor], seen: Tensor, gradient: Tensor, weight: Tensor) -> None:
    """Add to the gradients of a convolution's weight and bias what these examples give."""
    pads = [weight.shape[2] // 2] * 2
    ends = [1, 1], pads, [1, 1], False, [0, 0], 1, [False, True, False]
    of_weight, of_bias = of_parameters
    of_weight += torch.ops.aten.convolution_backward(gradient, seen, weight, None, *ends)[1]
    of_bias += gradient.sum((0, 2, 3))
