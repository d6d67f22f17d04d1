"""Shampoo: a preconditioner for each side of a matrix (Gupta, Koren & Singer 2018, arXiv 1802.09568).

Symbols: G gradient, L and R the statistics of its left and right side, k the number of sides that have any (2 for a
matrix, one for each axis of a tensor of higher order), p = 1 / 2k, M first moment, α learning rate.

    L_t = β₂ L_{t−1} + (1 − β₂) G_t G_tᵀ        R_t = β₂ R_{t−1} + (1 − β₂) G_tᵀ G_t
    M_t = β₁ M_{t−1} + (1 − β₁) G_t             L̂, R̂, M̂: divided by 1 − β^t
    U_t = (L̂_t + ε)^{−p} M̂_t (R̂_t + ε)^{−p}
    θ_t = (1 − α λ) θ_{t−1} − α s_t U_t

With ``betas=(0, 1)`` the statistics are sums, L_t = L_{t−1} + G_t G_tᵀ; that with ``graft="none"``, ``interval=1`` and
ε = ``matrix_eps`` is the paper's Algorithm 1 (and 2, for tensors, with ``merge=False``).

**Grafting** (``graft``) sets the length of the step: s_t |U_t| is the norm of the step that ``adam`` would take with
the same moments, or of M̂ (``sgd``), block by block; ``none`` has s_t = 1.  As in Anil et al. 2020 (arXiv 2002.09018)
and Shi et al. 2023 (arXiv 2309.06497).

**Blocks** (``block``).  An axis longer than that is cut in equal parts, each block of the tensor having its own
statistics.  An axis longer than ``max_side`` has none: its preconditioner is the identity.

**Turns.**  Roots are renewed every ``interval`` steps, every parameter at its own turn, so that no step is much longer
than the others; the turns are shared out by cost, once for all.  The first roots are computed at a parameter's turn
within the first :data:`START` steps.  Until then it moves by the step it is grafted to; with ``graft="none"`` it waits.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from likely.optim.adam import adam_update
from likely.optim.frame import Bucket, Decay, Rounding, expect, one_minus_power
from likely.optim.matrices import (
    Layout,
    batched,
    gram,
    layout,
    matrix_power,
    multiply_axes,
    stacked,
    turns,
    unfolded,
    unstack_into,
)
from likely.optim.matrixrule import MatrixRule

Graft = Literal["adam", "sgd", "none"]
#: Steps within which every parameter has its first roots (or its first basis, in SOAP).
START = 10


def update_statistics(g: Tensor, statistics: list[Tensor | None], beta2: float) -> None:
    """Take a gradient into the statistics: L ← β₂ L + (1 − β₂) G Gᵀ for every side, or L ← L + G Gᵀ where β₂ = 1.

    Args:
        g: shape ``(batch, n_1, …, n_k)``.
        statistics: for each axis ``(batch, n_i, n_i)``, or None.

    >>> left, right = torch.zeros(1, 1, 1), torch.zeros(1, 2, 2)
    >>> update_statistics(torch.tensor([[[1.0, 2.0]]]), [left, right], 0.5)
    >>> left.tolist(), right.tolist()
    ([[[2.5]]], [[[0.5, 1.0], [1.0, 2.0]]])
    """
    for axis, matrix in enumerate(statistics):
        if matrix is not None:
            outer = gram(unfolded(g, axis))
            if beta2 == 1:
                matrix.add_(outer)
            else:
                matrix.lerp_(outer, 1 - beta2)


def shampoo_roots(statistics: list[Tensor | None], t: float, beta2: float, eps: float) -> list[Tensor | None]:
    """(L̂ + ε)^{−1/2k} for every side, L̂ = L / (1 − β₂^t), k the number of sides that have statistics."""
    scale = one_minus_power(beta2, t) if beta2 < 1 else 1.0
    exponent = -0.5 / sum(matrix is not None for matrix in statistics)
    return [None if matrix is None else matrix_power(matrix / scale, exponent, eps) for matrix in statistics]


@dataclass
class Block:
    """A block of a parameter, or a batch of such blocks along a new first axis.

    Args:
        g: gradient.
        m, v: moments; v may be missing.
        update: what the parameter loses.
        statistics: for each axis a symmetric matrix, or None.
        basis: for each axis what is made of its statistics.
        turn, start: see :class:`Preconditioned`.
    """

    g: Tensor
    m: Tensor
    v: Tensor | None
    update: Tensor
    statistics: list[Tensor | None]
    basis: list[Tensor | None]
    turn: int
    start: int

    def key(self) -> tuple[object, ...]:
        """Equal for blocks that can be worked off together."""
        return tuple(self.g.shape), tuple(matrix is None for matrix in self.basis)

    def tensors(self) -> list[Tensor | None]:
        return [self.g, self.m, self.v, self.update, *self.statistics, *self.basis]


def batch_of(blocks: list[Block]) -> Block:
    """The batch; of a single block it shares the memory."""
    columns = zip(*(block.tensors() for block in blocks))
    g, m, v, update, *matrices = (None if column[0] is None else stacked(column) for column in columns)
    axes = len(matrices) // 2
    return Block(g, m, v, update, matrices[:axes], matrices[axes:], blocks[0].turn, blocks[0].start)  # type: ignore[arg-type]


class Preconditioned(MatrixRule):
    """What Shampoo and SOAP share: blocks, the statistics of their sides with a second matrix for each, and turns.

    The state of a matrix holds ``m`` and perhaps ``v``, and ``statistics.i`` with ``basis.i`` for the i-th side,
    counted through all blocks.  The basis is what is made of the statistics: a root, or eigenvectors.  A block of turn
    c has it renewed in steps t with t − 1 ≡ c modulo the interval, for the first time in step ``start`` ≤ START.
    """

    _turns: list[int] | None = None

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        positive = "a whole number above zero"
        expect(group, "interval", lambda value: value >= 1 and value == int(value), positive)
        expect(
            group, "block", lambda value: value is None or (value >= 1 and value == int(value)), positive + " or None"
        )
        expect(group, "max_side", lambda value: value >= 1, positive)
        expect(group, "merge", lambda value: isinstance(value, bool), "True or False")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._turns = None
        super().add_param_group(param_group)

    def keeps_v(self, group: dict[str, Any]) -> bool:
        """Whether second moments are kept for matrices."""
        return True

    def update_blocks(self, b: Block, t: int, group: dict[str, Any]) -> bool:
        """One step of a batch of blocks; says whether the bases are new ones."""
        raise NotImplementedError

    def is_matrix(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        return super().is_matrix(parameter, group) and len(_layout(parameter.shape, group).sides) > 0

    def begin_matrix(self, shape: torch.Size, like: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
        sides = _layout(shape, group).side_lengths()
        state = {name: torch.zeros(shape, **like) for name in (("m", "v") if self.keeps_v(group) else ("m",))}
        state |= {f"statistics.{i}": torch.zeros(n, n, **like) for i, n in enumerate(sides)}
        return state | {f"basis.{i}": torch.eye(n, **like) for i, n in enumerate(sides)}

    def update_matrices(self, bucket: Bucket, group: dict[str, Any]) -> list[Tensor]:
        updates = [torch.zeros_like(g, memory_format=torch.contiguous_format) for g in bucket.gradients]
        blocks = self._blocks(bucket, updates, group)
        for indices in batched(range(len(blocks)), [block.key() for block in blocks]):
            together = [blocks[i] for i in indices]
            batch = batch_of(together)
            renewed = self.update_blocks(batch, int(bucket.t), group)
            written = len(batch.tensors()) - (0 if renewed else len(batch.basis))
            for i in range(1, written):  # all but the gradient
                whole = batch.tensors()[i]
                if whole is not None:
                    unstack_into([block.tensors()[i] for block in together], whole)  # type: ignore[misc]
        return updates

    def _blocks(self, bucket: Bucket, updates: list[Tensor], group: dict[str, Any]) -> list[Block]:
        """The blocks of all parameters of a bucket; they share the memory of the state and of the updates."""
        found = []
        for i, update in enumerate(updates):
            cut = _layout(update.shape, group)
            g, m, u = (cut.views(x) for x in (bucket.gradients[i].contiguous(), bucket.state["m"][i], update))
            v: list[Any] = cut.views(bucket.state["v"][i]) if self.keeps_v(group) else [None] * len(m)
            sides = itertools.count()
            turn, start = self.turn(bucket.numbers[i]), self.start(bucket.numbers[i], group)
            for block in zip(g, m, v, u):
                numbers = [next(sides) if axis in cut.sides else None for axis in range(len(cut.shape))]
                statistics, basis = (
                    [None if side is None else bucket.state[f"{name}.{side}"][i] for side in numbers]
                    for name in ("statistics", "basis")
                )
                found.append(Block(*block, statistics, basis, turn, start))
        return found

    def kind(self, number: int, parameter: Tensor, group: dict[str, Any]) -> tuple[Any, ...]:
        return *super().kind(number, parameter, group), self.turn(number)

    def turn(self, number: int) -> int:
        """The turn of a parameter, by its number."""
        if self._turns is None:
            self._turns = []
            loads: dict[int, list[float]] = {}
            for group in self.param_groups:
                interval = int(group["interval"])
                costs = [
                    float(sum(n**3 for n in _layout(p.shape, group).side_lengths()))
                    if self.is_matrix(p, group)
                    else 0.0
                    for p in group["params"]
                ]
                self._turns += turns(costs, interval, loads.setdefault(interval, [0.0] * interval))
        return self._turns[number]

    def start(self, number: int, group: dict[str, Any]) -> int:
        """The step in which a parameter gets its first bases, by its number."""
        return 1 + self.turn(number) * min(START, group["interval"]) // group["interval"]

    def is_due(self, b: Block, t: int, group: dict[str, Any]) -> bool:
        """Whether the bases are to be renewed in step t."""
        return t == b.start or (t > b.start and (t - 1) % group["interval"] == b.turn)


def _layout(shape: Iterable[int], group: dict[str, Any]) -> Layout:
    return layout(tuple(shape), group["merge"], group["block"], group["max_side"])


class Shampoo(Preconditioned):
    """Shampoo for matrices, AdamW for the rest (see :mod:`likely.optim.matrixrule` for the split).

    Args:
        params: parameters or groups of them; a group may say ``matrices=False``.
        lr: α.
        betas: β₁ of the gradient, β₂ of the statistics and of Adam's second moment.
        eps: ε of Adam, for grafting and for the rest.
        weight_decay: λ; ``decay`` as in :class:`likely.optim.adam.AdamW`.
        interval: steps from one renewal of a root to the next.
        graft: what gives the length of the step, ``adam``, ``sgd`` or ``none``.
        matrix_eps: ε of the roots.
        block: longest side of a block; None for one block.
        max_side: longest axis that has statistics.
        merge: whether the axes after the first are taken as one.
        maximize, rounding, seed: see :class:`likely.optim.frame.UpdateRule`.

    >>> w = torch.nn.Parameter(torch.zeros(2, 2))
    >>> w.grad = torch.tensor([[3.0, 0.0], [0.0, -0.1]])
    >>> Shampoo([w], lr=0.1, betas=(0.0, 1.0), graft="none", interval=1, weight_decay=0.0).step()
    >>> [[round(x, 3) + 0.0 for x in row] for row in w.tolist()]  # the first step is Muon's
    [[-0.1, 0.0], [0.0, 0.1]]
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        interval: int = 10,
        graft: Graft = "adam",
        matrix_eps: float = 1e-12,
        block: int | None = 1024,
        max_side: int = 8192,
        merge: bool = True,
        decay: Decay = "lr",
        maximize: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
    ) -> None:
        own = {
            "interval": interval,
            "graft": graft,
            "matrix_eps": matrix_eps,
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
        beta1, beta2 = group["betas"]
        super().check({**group, "betas": (beta1, 0.0 if beta2 == 1 else beta2)})
        expect(group, "graft", lambda value: value in get_args(Graft), f"one of {', '.join(get_args(Graft))}")
        expect(group, "matrix_eps", lambda value: value >= 0, "a number, zero or more")
        if beta2 == 1 and (group["graft"] == "adam" or not all(self.is_matrix(p, group) for p in group["params"])):
            raise ValueError("betas: expected β₂ below 1 where Adam is used, for grafting or for the rest, got 1")

    def keeps_v(self, group: dict[str, Any]) -> bool:
        return group["graft"] == "adam"

    def update_blocks(self, b: Block, t: int, group: dict[str, Any]) -> bool:
        beta1, beta2 = group["betas"]
        update_statistics(b.g, b.statistics, beta2)
        due = self.is_due(b, t, group)
        if due:
            roots = shampoo_roots(b.statistics, t, beta2, group["matrix_eps"])
            for old, new in zip(b.basis, roots):
                if old is not None and new is not None:
                    old.copy_(new)
        if b.v is not None:
            (step,) = adam_update([b.g], [b.m], [b.v], t, beta1, beta2, group["eps"])
        else:
            b.m.lerp_(b.g, 1 - beta1)
            step = b.m / one_minus_power(beta1, t)
        if t >= b.start:
            u = multiply_axes(b.m, b.basis)  # L̂^{−p} M R̂^{−p}
            if group["graft"] == "none":
                b.update.copy_(u).div_(one_minus_power(beta1, t))
            else:
                axes = tuple(range(1, u.dim()))
                length = torch.linalg.vector_norm(u, dim=axes, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
                b.update.copy_(u).mul_(torch.linalg.vector_norm(step, dim=axes, keepdim=True) / length)
        elif group["graft"] != "none":
            b.update.copy_(step)
        return due
