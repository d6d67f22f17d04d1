"""Clipping of gradients by their global norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from likely.optim.frame import local, precision_of


@torch.no_grad()
def clip_by_global_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients by min(1, max_norm / |g|), |g| the norm of all of them together (Pascanu et al. 2013).

    The norm is taken in float32 at least, over the rows present where a gradient is sparse, and over all parts where it
    is shared out (DTensor).  If it is not finite, neither are the gradients afterwards: nothing is hidden.

    Args:
        parameters: those without a gradient are passed over.
        max_norm: positive.

    Returns:
        |g| before, without dimensions.

    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> w.grad = torch.tensor([3.0, 4.0])
    >>> clip_by_global_norm([w], 1.0).item(), [round(x, 6) for x in w.grad.tolist()]
    (5.0, [0.6, 0.8])
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm: expected a positive number, got {max_norm!r}")
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None:
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
            gradients.append(parameter.grad)
    if not gradients:
        return torch.zeros(())
    norms = []
    for key in {(g.device, g.dtype, hasattr(g, "to_local")): None for g in gradients}:
        device, dtype, shared = key
        alike = [g for g in gradients if (g.device, g.dtype, hasattr(g, "to_local")) == key]
        if shared:
            several = torch.stack([torch.linalg.vector_norm(g, dtype=precision_of(dtype)).full_tensor() for g in alike])  # type: ignore[attr-defined]
        else:
            several = torch.stack(torch._foreach_norm(_values(alike), 2, dtype=precision_of(dtype)))
        norms.append(torch.linalg.vector_norm(several).to(gradients[0].device))
    norm = torch.linalg.vector_norm(
        torch.stack([n.to(max(norms, key=lambda n: n.element_size()).dtype) for n in norms])
    )
    factor = (max_norm / norm).clamp(max=1.0)
    for device, dtype in {(g.device, g.dtype) for g in gradients}:
        alike = _values([local(g) for g in gradients if (g.device, g.dtype) == (device, dtype)])
        torch._foreach_mul_(alike, factor.to(device))
    return norm


def _values(gradients: list[Tensor]) -> list[Tensor]:
    """The stored values of gradients, in their own memory."""
    return [g._values() if g.is_sparse else g for g in gradients]
