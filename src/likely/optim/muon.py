"""Muon: momentum, orthogonalised (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon).

Symbols: G gradient, B momentum, μ ``momentum``, O ≈ U Vᵀ where U Σ Vᵀ is the singular value decomposition of what is
orthogonalised, α learning rate, λ weight decay, m × n the shape.

    B_t = μ B_{t−1} + (1 − μ) G_t
    M_t = μ B_t + (1 − μ) G_t   (Nesterov; else M_t = B_t)
    θ_t = (1 − α λ) θ_{t−1} − α s(m, n) O(M_t)

The post has B_t = μ B_{t−1} + G_t; O does not see the factor.

**Scale** (``adjust``).  O moves every element by 1 / √max(m, n) in the root mean square.

===================  =====================  =================================================================
``match_rms_adamw``  s = 0.2 √max(m, n)     every element moves by 0.2 α, about as AdamW moves it, so that α
                                            and λ are those of AdamW (Liu et al. 2025, arXiv 2502.16982)
``original``         s = √max(1, m / n)     Jordan et al.
``none``             s = 1
===================  =====================  =================================================================

**Orthogonalisation** (``method``).  ``newton-schulz`` with ``iterations=5`` is what the post and ``torch.optim.Muon``
do: it sends singular values between 0.002 |M| and |M| (the Frobenius norm) into [0.68, 1.21].  ``polar-express`` takes
the best polynomial in each iteration and a tighter norm (see :func:`likely.optim.matrices.orthogonalized`).  With
``iterations=3`` and ``floor=0.005`` it sends those between 0.005 and 1 times (Σ σ⁸)^⅛ into [0.50, 1.50], rounding
aside, at three fifths of the cost; with ``iterations=4`` into [0.91, 1.09].  On a transformer a step is worth the same
with both: it depends on how small a singular value is still raised, not on how near to 1; on small VAEs the fourth
iteration saves one step in twenty (benchmarks/results/optimizer_race.md).  ``svd`` is exact and slow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from likely.optim.frame import Bucket, Decay, Rounding, expect
from likely.optim.matrices import Method, Precision, layout, orthogonalized, put_back, stacked
from likely.optim.matrixrule import MatrixRule
from likely.processor import multiplies_bfloat16

Adjust = Literal["match_rms_adamw", "original", "none"]


def muon_momentum(g: list[Tensor], momentum: list[Tensor], mu: float, nesterov: bool) -> list[Tensor]:
    """What Muon orthogonalises; ``momentum`` becomes the new one.

    >>> g, b = [torch.tensor([[4.0]])], [torch.tensor([[0.0]])]
    >>> muon_momentum(g, b, 0.75, nesterov=True)[0].item(), b[0].item()
    (1.75, 1.0)
    """
    torch._foreach_lerp_(momentum, g, 1 - mu)  # B_t = μ B_{t−1} + (1 − μ) G_t
    return list(torch._foreach_lerp(g, momentum, mu)) if nesterov else momentum  # M_t = μ B_t + (1 − μ) G_t


def muon_scale(rows: int, columns: int, adjust: Adjust) -> float:
    """s(m, n), see the module."""
    if adjust == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns)) if adjust == "original" else 1.0


class Muon(MatrixRule):
    """Muon for matrices, AdamW for the rest (see :mod:`likely.optim.matrixrule` for the split).

    Axes after the first are taken as one, so that the weight of a convolution is a matrix with a row for each output
    channel.  Matrices of equal shape are orthogonalised together.

    Args:
        params: parameters or groups of them; a group may say ``matrices=False``.
        lr: α, of matrices and of the rest.
        momentum: μ.
        nesterov: whether the momentum looks ahead.
        betas, eps: of AdamW for the rest.
        weight_decay: λ, of both; ``decay`` as in :class:`likely.optim.adam.AdamW`.
        adjust: how far a matrix is moved, see the module.
        method, iterations, floor: how M is orthogonalised, see the module.
        precision: of the products in it, see :data:`likely.optim.matrices.Precision`.
        norm_eps: least norm that M is divided by.
        maximize, rounding, seed: see :class:`likely.optim.frame.UpdateRule`.

    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -0.1]])
    >>> Muon([w], lr=0.1, adjust="none", method="svd", weight_decay=0.0, precision="full").step()
    >>> [[round(x, 4) + 0.0 for x in row] for row in w.tolist()]
    [[-0.1, 0.0], [0.0, 0.1]]
    """

    names_in_torch = {"momentum_buffer": "momentum", "exp_avg": "m", "exp_avg_sq": "v"}  # noqa: RUF012

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        *,
        nesterov: bool = True,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        decay: Decay = "lr",
        adjust: Adjust = "match_rms_adamw",
        method: Method = "polar-express",
        iterations: int = 3,
        floor: float = 5e-3,
        precision: Precision = "auto",
        norm_eps: float = 1e-7,
        maximize: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
    ) -> None:
        own = {
            "momentum": momentum,
            "nesterov": nesterov,
            "adjust": adjust,
            "method": method,
            "iterations": iterations,
            "floor": floor,
            "precision": precision,
            "norm_eps": norm_eps,
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
        expect(group, "momentum", lambda value: 0 <= value < 1, "a number from 0 to below 1")
        expect(group, "iterations", lambda value: 1 <= int(value) <= 100, "a whole number from 1 to 100")
        expect(group, "floor", lambda value: 0 < value < 1, "a number between 0 and 1")
        expect(group, "norm_eps", lambda value: value > 0, "a number above zero")
        for option, kind in (("adjust", Adjust), ("method", Method), ("precision", Precision)):
            expect(group, option, get_args(kind).__contains__, f"one of {', '.join(get_args(kind))}")

    def begin_matrix(self, shape: torch.Size, like: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
        return {"momentum": torch.zeros(shape, **like)}

    def update_matrices(self, bucket: Bucket, group: dict[str, Any]) -> list[Tensor]:
        native = multiplies_bfloat16(bucket.gradients[0].device)
        half = group["precision"] == "bfloat16" or (group["precision"] == "auto" and native)
        how = (group["method"], group["iterations"], group["floor"], group["norm_eps"])
        momentum = stacked(bucket.state["momentum"])
        (ahead,) = muon_momentum([stacked(bucket.gradients)], [momentum], group["momentum"], group["nesterov"])
        put_back(momentum, bucket.state["momentum"])
        rows, columns = layout(tuple(ahead.shape[1:]), True, None, 0).shape
        x = ahead.to(torch.bfloat16 if half and how[0] != "svd" else ahead.dtype)
        o = orthogonalized(x.reshape(-1, rows, columns), *how)
        updates = torch.empty_like(ahead) if ahead is momentum else ahead  # the momentum is state
        return list(updates.copy_(o.view_as(ahead)).mul_(muon_scale(rows, columns, group["adjust"])).unbind())
