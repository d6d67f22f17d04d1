"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv 2409.11321, Algorithm 3).

Symbols as in :mod:`likely.optim.shampoo`; Q_L and Q_R are the eigenvectors of its statistics L and R.

    G'_t = Q_Lᵀ G_t Q_R
    M'_t = β₁ M'_{t−1} + (1 − β₁) G'_t
    V_t = β₂ V_{t−1} + (1 − β₂) G'_t²
    N'_t = M̂'_t / (√V̂_t + ε)                           (Adam)
    θ_t = (1 − α λ) θ_{t−1} − α Q_L N'_t Q_Rᵀ
    L_t, R_t as in Shampoo, after the step
    every ``interval`` steps: Q_L ← orthogonal factor of L Q_L (one step of power iteration), Q_R likewise

In that eigenbasis Shampoo's preconditioner is diagonal, and (with p = 1/2) the factored second moment of Adafactor
(section 4 of the paper).  SOAP keeps Adam's full second moment there instead, so that the scales stay fresh while the
basis ages.

``precision`` is that of the products with G and N', as in Shampoo: in ``bfloat16`` G, N', Q_L and Q_R are rounded for
them.  The renewal of a basis and the turning of M' with it, once every ``interval`` steps, stay in float32: rounded
statistics would lose the vectors of small eigenvalues.

The first basis is that of the statistics at a side's first turn (``START`` in :mod:`likely.optim.shampoo`), by a full
decomposition.  Up to and including the step in which the last of them is made the parameter waits, as in the authors'
code, so that no gradient is turned into a basis that was made of it.  The first moment is kept in the eigenbasis and
turned when the basis is; the authors turn it back and forth in every step, which is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from likely.optim.adam import Epsilon, quick_adam_update
from likely.optim.frame import Decay, Rounding, expect
from likely.optim.matrices import Precision, eigenbasis, in_bfloat16, multiply_axes, power_qr
from likely.optim.shampoo import Blocks, Preconditioned, update_statistics


def soap_update(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    basis: Sequence[Tensor | None],
    t: float,
    beta1: float,
    beta2: float,
    eps: float,
    epsilon: Epsilon = "outside",
    precision: Precision = "full",
) -> Tensor:
    """Adam in another basis, in units of the learning rate; m and v, which are in that basis, become the new ones.

    Args:
        g: gradients, shape ``(batch, n_1, …, n_k)``; m and v have the same.
        basis: for each axis ``(batch, n_i, n_i)``, the basis vectors as columns, or None for the identity.
        t: number of steps in a basis, 1 for the first.
        precision: of the products, and in bfloat16 also of the update.

    >>> g, m, v = torch.tensor([[[3.0], [4.0]]]), torch.zeros(1, 2, 1), torch.zeros(1, 2, 1)
    >>> turned = torch.tensor([[[0.6, -0.8], [0.8, 0.6]]])                  # g is five times its first column
    >>> [round(x, 4) for x in soap_update(g, m, v, [turned, None], 1, 0.9, 0.9, 1e-3).flatten().tolist()]
    [0.5999, 0.7998]
    """
    dtype = torch.bfloat16 if in_bfloat16(precision, m) else m.dtype
    basis = [q if q is None else q.to(dtype) for q in basis]
    turned = multiply_axes(g.to(dtype), basis).to(m.dtype)
    step = quick_adam_update(turned, m, v, t, beta1, beta2, eps, epsilon)
    return multiply_axes(step.to(dtype), basis, transposed=True)


def renew_basis(m: Tensor, v: Tensor, axis: int, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A basis of one axis nearer to the eigenvectors of its statistics, and the moments in it.

    The first moment is turned exactly.  The second is not known in another basis; it follows the order of the vectors.

    Args:
        m, v: moments in the old basis, shape ``(batch, n_1, …, n_k)``.
        p, q: statistics and old basis of the axis, ``(batch, n_axis, n_axis)``.

    Returns:
        m, v and the basis, as new tensors.
    """
    new, order = power_qr(p, q)
    index = order.reshape([len(order), *(-1 if i == axis else 1 for i in range(m.dim() - 1))])
    old_basis, new_basis = ([basis if i == axis else None for i in range(m.dim() - 1)] for basis in (q, new))
    m = multiply_axes(multiply_axes(m, old_basis, transposed=True), new_basis)
    return m, torch.gather(v, axis + 1, index.expand_as(v)), new


class SOAP(Preconditioned):
    """SOAP for matrices, AdamW for the rest (see :mod:`likely.optim.matrixrule` for the split).

    Args:
        params: parameters or groups of them; a group may say ``matrices=False``.
        lr: α.
        betas: β₁ and β₂ of Adam; β₂ is also that of the statistics.
        eps: ε of Adam.
        weight_decay: λ; ``decay`` as in :class:`likely.optim.adam.AdamW`.
        statistics_beta: the statistics' own β₂.
        interval: steps from one renewal of a basis to the next.
        epsilon: where ε stands, see :mod:`likely.optim.adam`; the authors' code has it ``folded``.
        precision: of the products with gradients and steps, see the module.
        block: longest side of a block; None for one block.
        max_side: longest axis that has statistics; longer ones keep their own basis.
        merge: whether the axes after the first are taken as one.
        maximize, rounding, seed: see :class:`likely.optim.frame.UpdateRule`.

    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = SOAP([w], lr=0.1, weight_decay=0.0, interval=1, eps=1e-4)  # rounding errors are much smaller
    >>> w.grad = torch.ones(2, 2)
    >>> optimizer.step()                                          # finds a basis: the gradient has rank one,
    >>> optimizer.step()                                          # so one element moves, by the learning rate
    >>> [[round(x, 3) for x in row] for row in w.tolist()]
    [[-0.05, -0.05], [-0.05, -0.05]]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        statistics_beta: float | None = None,
        interval: int = 10,
        epsilon: Epsilon = "outside",
        precision: Precision = "auto",
        block: int | None = None,
        max_side: int = 8192,
        merge: bool = True,
        decay: Decay = "lr",
        maximize: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
    ) -> None:
        own = {
            "epsilon": epsilon,
            "statistics_beta": statistics_beta,
            "interval": interval,
            "precision": precision,
            "block": block,
            "max_side": max_side,
            "merge": merge,
        }
        super().__init__(
            params,
            own,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decay=decay,
            maximize=maximize,
            rounding=rounding,
            seed=seed,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        expect(group, "epsilon", lambda value: value in get_args(Epsilon), f"one of {', '.join(get_args(Epsilon))}")
        expect(group, "statistics_beta", lambda value: value is None or 0 <= value < 1, "a number from 0 to below 1")

    def update_blocks(self, b: Blocks, t: int, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        assert b.v is not None
        if b.age > 0:
            how = (group["eps"], group["epsilon"], group["precision"])
            b.update.copy_(soap_update(b.g, b.m, b.v, b.basis, b.age, beta1, beta2, *how))
        own = group["statistics_beta"]
        update_statistics(b.g, b.statistics, beta2 if own is None else own, group["precision"])
        for axis, due, statistics, basis in b.renewals():
            if b.age <= 0:  # the first one; the moments are still zero
                basis[due] = eigenbasis(statistics)
            else:
                b.m[due], b.v[due], basis[due] = renew_basis(b.m[due], b.v[due], axis, statistics, basis[due])
