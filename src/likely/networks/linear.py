"""The linear layer, with the faster of PyTorch's two libraries for float32 matrix products on the CPU.

PyTorch multiplies float32 matrices with MKL, which uses half the width of an AMD processor's vector unit.  PyTorch also
brings oneDNN, which uses all of it: on one core of a Zen 5 it multiplies at 200 GFLOP/s where MKL reaches 100, in the
same float32 arithmetic (see benchmarks/vae_throughput.py).  Which library serves a product depends on the processor
and on the product's size alone, so that a run can be repeated to the bit.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.networks.written import untracked
from likely.processor import LARGE, ONEDNN

#: Multiply-adds from which oneDNN is faster on columns, where PyTorch's own product adds the bias in the same pass.
_LARGE_COLUMNS = 2 * LARGE


class Linear(nn.Linear):
    """x Wᵀ + b, as ``nn.Linear``, whose parameters it has.

    >>> layer = Linear(3, 2)
    >>> layer(torch.ones(5, 4, 3)).shape
    torch.Size([5, 4, 2])
    """

    #: Whose rule :mod:`likely.exact` uses: the numbers are the same, only the library differs.
    exact_as = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return affine(x, self.weight, self.bias)


def affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, by the faster library where the product is large and plain."""
    if ONEDNN and x.numel() * weight.shape[0] >= LARGE and is_plain(x, weight):
        if x.dim() == 2:
            return _Affine.apply(x, weight, bias)
        return _Affine.apply(x.reshape(-1, x.shape[-1]), weight, bias).reshape(*x.shape[:-1], len(weight))
    return F.linear(x, weight, bias)


def affine_columns(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """W x + b for examples that stand as columns, shape ``(in, examples)``: :func:`affine` turned over.

    >>> affine_columns(torch.ones(3, 4), torch.ones(2, 3), torch.zeros(2)).shape
    torch.Size([2, 4])
    """
    if ONEDNN and x.numel() * weight.shape[0] >= _LARGE_COLUMNS and is_plain(x, weight):
        return _AffineColumns.apply(x, weight, bias)
    return torch.addmm(bias.unsqueeze(1), weight, x)


def product(a: Tensor, b: Tensor, added: Tensor | None = None) -> Tensor:
    """a b, plus another matrix, by the faster library.

    >>> product(torch.ones(2, 3), torch.ones(3, 4), torch.ones(2, 4))[0]
    tensor([4., 4., 4., 4.])
    """
    if ONEDNN and a.numel() * b.shape[1] >= LARGE and is_plain(a, b):
        found = _product(a, b.t())
        return found if added is None else found + added
    return torch.mm(a, b) if added is None else torch.addmm(added, a, b)


def _addmm(added: Tensor, a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    found = product(a, b, added)
    return found if out is None else out.copy_(found)


#: ``torch.addmm``, by the faster library.
addmm = _addmm if ONEDNN else torch.addmm


def is_plain(x: Tensor, weight: Tensor) -> bool:
    """Whether x and the weights are float32 on the CPU, and nothing transforms the computation.

    Compilation, autocast and ``torch.func`` have rules for PyTorch's own layer only.
    """
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
    )


class _Affine(torch.autograd.Function):
    """x Wᵀ + b for x of shape ``(batch, in)`` and W of shape ``(out, in)``; its derivatives are such products again."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(gradient, weight.t()) if of_x else None,
            _product(gradient.t(), x.t()) if of_weight else None,
            gradient.sum(0) if of_bias else None,
        )

    @staticmethod
    def jvp(ctx, x_tangent, weight_tangent, bias_tangent):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        terms = [
            _product(x_tangent, weight) if x_tangent is not None else None,
            _product(x, weight_tangent) if weight_tangent is not None else None,
            bias_tangent,
        ]
        return functools.reduce(torch.add, [term for term in terms if term is not None])


class _AffineColumns(torch.autograd.Function):
    """W x + b for x of shape ``(in, examples)``; none of its derivatives turns a matrix over in memory."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        return _product(weight, x.t()).add_(bias.unsqueeze(1))

    @staticmethod
    def backward(ctx, gradient):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            _product(weight.t(), gradient.t()) if of_x else None,
            _product(gradient, x) if of_weight else None,
            gradient.sum(1) if of_bias else None,
        )

    @staticmethod
    def jvp(ctx, x_tangent, weight_tangent, bias_tangent):  # type: ignore[no-untyped-def]
        x, weight = ctx.saved_tensors
        terms = [
            _product(weight, x_tangent.t()) if x_tangent is not None else None,
            _product(weight_tangent, x.t()) if weight_tangent is not None else None,
            bias_tangent.unsqueeze(1).expand(-1, x.shape[1]) if bias_tangent is not None else None,
        ]
        return functools.reduce(torch.add, [term for term in terms if term is not None])


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ."""
    return _by_onednn(a, b, None) if untracked() else _Affine.apply(a, b, None)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + b for x of shape ``(batch, in)``, without a graph."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
