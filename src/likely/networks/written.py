"""Derivatives that are written out by hand: when they serve, and how they are differentiated in their turn.

A lean form is an ``autograd.Function`` with the numbers of some plain operations and fewer passes over memory.  It has
a rule for reverse mode alone: compilation, forward mode and ``torch.func`` take the plain form, and so does whoever
wants the derivative of the derivative.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def serves(*arguments: Tensor | None) -> bool:
    """Whether a gradient may be wanted of one of the arguments, and by reverse mode alone."""
    return (
        torch.is_grad_enabled()
        and any(argument is not None and argument.requires_grad for argument in arguments)
        and not _transformed()
    )


def untracked() -> bool:
    """Whether no derivative of any kind may be wanted."""
    return not torch.is_grad_enabled() and not _transformed()


def _transformed() -> bool:
    """Whether there is compilation, forward mode or ``torch.func``."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or in_forward_mode()


def in_forward_mode() -> bool:
    """Whether derivatives are taken in forward mode, for which the lean forms have no rules."""
    return torch.autograd.forward_ad._current_level >= 0


def differentiable_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    arguments: Sequence[Tensor | None],
    needed: Sequence[bool],
    *gradients: Tensor,
) -> list[Tensor | None]:
    """Gradients with respect to the arguments that need one, by the plain form of a lean function: differentiable."""
    wanted = [part for part, is_needed in zip(arguments, needed) if part is not None and is_needed]
    found = iter(torch.autograd.grad(function(*arguments), wanted, gradients, create_graph=True))
    return [next(found) if is_needed else None for _, is_needed in zip(arguments, needed)]
