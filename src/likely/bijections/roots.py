"""Roots of increasing functions, all at once: Newton's method inside a bracket that bisection keeps shrinking."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Steps after which a bracket of any two floats has shrunk to neighbours; most roots need five.
_MOST_STEPS = 128


def increasing_root(
    function: Callable[[Tensor], tuple[Tensor, Tensor]], target: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """x with f(x) = target between ``low`` and ``high``, elementwise, to the last bits.

    The root carries the gradients of ``target`` and of whatever f is made of, to first order: by the implicit function
    theorem dx = (d target − df) / f′.

    Args:
        function: x to (f(x), f′(x)), f strictly increasing.
        low, high: f(low) ≤ target ≤ f(high).

    >>> increasing_root(lambda x: (x**3, 3 * x**2), torch.tensor([8.0]), torch.tensor([0.0]), torch.tensor([9.0]))
    tensor([2.])
    """
    with torch.no_grad():
        goal, low, high = target.detach(), low.detach().clone(), high.detach().clone()
        x = 0.5 * (low + high)
        last = torch.full_like(x, torch.inf)
        for _ in range(_MOST_STEPS):
            value, slope = function(x)
            gap = value - goal
            low, high = torch.where(gap < 0, x, low), torch.where(gap > 0, x, high)
            step = gap / slope
            new = x - step
            # Newton's step counts if it stays inside and is at most half of the one before it
            good = (new > low) & (new < high) & (step.abs() <= 0.5 * last)
            new = torch.where(good, new, 0.5 * (low + high))
            new = torch.where(gap == 0, x, new)
            last = (new - x).abs()
            if bool((last <= 0.5 * torch.finfo(x.dtype).eps * (x.abs() + torch.finfo(x.dtype).tiny)).all()):
                break
            x = new
    if not torch.is_grad_enabled():
        return x
    value, slope = function(x)
    return x - ((value - target) - (value - target).detach()) / slope.detach()
