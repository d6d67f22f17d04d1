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

**Precision** (``precision``).  In ``bfloat16`` G is rounded for L and R, the products of which are summed in float32,
and L̂^{−p}, R̂^{−p}, M are rounded for U.  Moments, statistics and roots stay in the precision of the state, and so does
all linear algebra with them.  ``auto`` is that for large matrices of float32 where the processor has tiles (AMX), which
multiply bfloat16 several times as fast; else ``full``.

**Turns.**  Roots are renewed every ``interval`` steps, each side of a block at its own turn, so that no step is much
longer than the others; the turns are shared out by cost, once for all.  The first roots are computed at a side's turn
within the first :data:`START` steps.  Until those of all parameters of its shape are there, a parameter moves by the
step it is grafted to; with ``graft="none"`` it waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from likely.optim.adam import quick_adam_update
from likely.optim.frame import Bucket, Decay, Rounding, expect, one_minus_power
from likely.optim.matrices import (
    Layout,
    Precision,
    accumulate_gram,
    batched,
    in_bfloat16,
    layout,
    matrix_power,
    multiply_axes,
    put_back,
    stacked,
    turns,
    unfolded,
)
from likely.optim.matrixrule import MatrixRule

Graft = Literal["adam", "sgd", "none"]
#: Steps within which every parameter has its first roots (or its first basis, in SOAP).
START = 10


def update_statistics(g: Tensor, statistics: list[Tensor | None], beta2: float, precision: Precision = "full") -> None:
    """Take gradients into the statistics: L ← β₂ L + (1 − β₂) G Gᵀ for every side, or L ← L + G Gᵀ where β₂ = 1.

    Args:
        g: shape ``(batch, n_1, …, n_k)``.
        statistics: for each axis ``(batch, n_i, n_i)``, or None.
        precision: whether G is rounded to bfloat16 for it.

    >>> left, right = torch.zeros(1, 1, 1), torch.zeros(1, 2, 2)
    >>> update_statistics(torch.tensor([[[1.0, 2.0]]]), [left, right], 0.5)
    >>> left.tolist(), right.tolist()
    ([[[2.5]]], [[[0.5, 1.0], [1.0, 2.0]]])
    """
    for axis, matrices in enumerate(statistics):
        if matrices is not None:
            alpha = 1 - beta2 if beta2 < 1 else 1.0
            accumulate_gram(matrices, unfolded(g, axis), beta2, alpha, in_bfloat16(precision, g))


def shampoo_root(statistics: Tensor, sides: int, t: float, beta2: float, eps: float) -> Tensor:
    """(L̂ + ε)^{−1/2k} for statistics L of shape ``(batch, n, n)``, k the number of sides that have any."""
    scale = one_minus_power(beta2, t) if beta2 < 1 else 1.0
    return matrix_power(statistics / scale, -0.5 / sides, eps)


@dataclass
class Blocks:
    """Blocks of equal shape, of one or more parameters; every tensor counts them in its first axis.

    Args:
        g: gradients.
        update: what the parameters lose, to be filled in; zero so far.
        m, v: moments; v is None where there is none.
        age: number of steps since the one in which the last of the first bases were made: 0 in that one.
        statistics: for each axis a symmetric matrix a block, or None.
        basis: for each axis what is made of each block's statistics, or None.
        due: for each axis, which of the blocks have their basis renewed in this step.
    """

    g: Tensor
    update: Tensor
    m: Tensor
    v: Tensor | None
    age: int
    statistics: list[Tensor | None]
    basis: list[Tensor | None]
    due: list[list[int]]

    def renewals(self) -> Iterator[tuple[int, list[int] | slice, Tensor, Tensor]]:
        """For every axis with a renewal its number, which blocks are due, their statistics, and the bases of all."""
        for axis, (due, statistics, basis) in enumerate(zip(self.due, self.statistics, self.basis)):
            if due and statistics is not None and basis is not None:
                chosen = slice(None) if len(due) == len(basis) else due  # all of them, without a copy
                yield axis, chosen, statistics[chosen], basis


@dataclass
class Turns:
    """When the bases of a parameter are made.

    Args:
        sides: the turn of each side, counted through all blocks.
        start: the step in which the last of the first bases is made, of all parameters of that shape.
    """

    sides: list[int]
    start: int = 0


class Preconditioned(MatrixRule):
    """What Shampoo and SOAP share: blocks, the statistics of their sides with a second matrix for each, and turns.

    The state of a matrix holds ``m`` and perhaps ``v``, and ``statistics.i`` with ``basis.i`` for the i-th side,
    counted through all blocks.  The basis is what is made of the statistics: a root, or eigenvectors.  A side of turn c
    has it renewed in steps t with t − 1 ≡ c modulo the interval, for the first time within the first START steps.
    """

    _turns: list[Turns] | None = None

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        positive = "a whole number above zero"
        expect(group, "interval", lambda value: value >= 1 and value == int(value), positive)
        expect(
            group, "block", lambda value: value is None or (value >= 1 and value == int(value)), positive + " or None"
        )
        expect(group, "precision", get_args(Precision).__contains__, f"one of {', '.join(get_args(Precision))}")
        expect(group, "max_side", lambda value: value >= 1, positive)
        expect(group, "merge", lambda value: isinstance(value, bool), "True or False")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self._turns = None
        super().add_param_group(param_group)

    def keeps_v(self, group: dict[str, Any]) -> bool:
        """Whether second moments are kept for matrices."""
        return True

    def update_blocks(self, b: Blocks, t: int, group: dict[str, Any]) -> None:
        """One step of blocks of equal shape: their update, their moments, statistics and bases become the new ones."""
        raise NotImplementedError

    def is_matrix(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        return super().is_matrix(parameter, group) and len(_layout(parameter.shape, group).sides) > 0

    def begin_matrix(self, shape: torch.Size, like: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
        sides = _layout(shape, group).side_lengths()
        state = {name: torch.zeros(shape, **like) for name in (("m", "v") if self.keeps_v(group) else ("m",))}
        state |= {f"statistics.{i}": torch.zeros(n, n, **like) for i, n in enumerate(sides)}
        return state | {f"basis.{i}": torch.eye(n, **like) for i, n in enumerate(sides)}

    def update_matrices(self, bucket: Bucket, group: dict[str, Any]) -> list[Tensor]:
        gradients = [g.contiguous() for g in bucket.gradients]
        updates = list(gradients[0].new_zeros(len(gradients), *gradients[0].shape).unbind())
        for blocks in self._blocks(gradients, updates, bucket, group):
            self.update_blocks(blocks, int(bucket.t), group)
        return updates

    def _blocks(
        self, gradients: list[Tensor], updates: list[Tensor], bucket: Bucket, group: dict[str, Any]
    ) -> Iterator[Blocks]:
        """The blocks of parameters of one shape, those of equal shape together; what is done to them is done to all."""
        cut, state, t = _layout(updates[0].shape, group), bucket.state, int(bucket.t)
        views = [
            [cut.views(tensor) for tensor in each] for each in (gradients, updates, state["m"], state.get("v", []))
        ]
        turns = [self.turns_of(number) for number in bucket.numbers]
        now = {turn for turn in range(int(group["interval"])) if is_due(turn, t, group["interval"])}
        every = [(place, i) for place in range(len(cut.blocks)) for i in range(len(updates))]
        shapes = [tuple(side.stop - side.start for side in place) for place in cut.blocks]
        for batch in batched(range(len(every)), [(shapes[place],) for place, _ in every]):
            chosen = [every[j] for j in batch]
            parts = [[each[i][place] for place, i in chosen if each] for each in views]
            due = []
            for axis in range(len(cut.shape)):
                sides = [place * len(cut.sides) + cut.sides.index(axis) for place, _ in chosen if axis in cut.sides]
                for name in ("statistics", "basis"):
                    parts.append([state[f"{name}.{side}"][i] for side, (_, i) in zip(sides, chosen)])
                due.append([j for j, (side, (_, i)) in enumerate(zip(sides, chosen)) if turns[i].sides[side] in now])
            stacks = [stacked(tensors) if tensors else None for tensors in parts]
            g, update, m, v, *of_sides = stacks
            assert g is not None and update is not None and m is not None
            yield Blocks(g, update, m, v, t - turns[0].start, of_sides[::2], of_sides[1::2], due)
            for stack, tensors in zip(stacks[1:], parts[1:]):
                if stack is not None:
                    put_back(stack, tensors)

    def turns_of(self, number: int) -> Turns:
        """The turns of a parameter, by its number."""
        if self._turns is None:
            self._turns = []
            loads: dict[int, list[float]] = {}
            for group in self.param_groups:
                interval = int(group["interval"])
                lengths = [
                    _layout(p.shape, group).side_lengths() if self.is_matrix(p, group) else [] for p in group["params"]
                ]
                costs = [float(n**3) for sides in lengths for n in sides]
                given = iter(turns(costs, interval, loads.setdefault(interval, [0.0] * interval)))
                found = [Turns([next(given) for _ in sides]) for sides in lengths]
                starts: dict[torch.Size, int] = {}
                for p, each in zip(group["params"], found):
                    first = max((first_step(turn, interval) for turn in each.sides), default=0)
                    starts[p.shape] = max(first, starts.get(p.shape, 0))
                for p, each in zip(group["params"], found):
                    each.start = starts[p.shape]
                self._turns += found
        return self._turns[number]


def first_step(turn: int, interval: int) -> int:
    """The step in which a side gets its first basis."""
    return 1 + turn * min(START, interval) // interval


def is_due(turn: int, t: int, interval: int) -> bool:
    """Whether the basis of a side is to be made or renewed in step t.

    >>> [t for t in range(1, 100) if is_due(20, t, 30)]
    [7, 21, 51, 81]
    """
    first = first_step(turn, interval)
    return t == first or (t > first and (t - 1) % interval == turn)


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
        precision: of the products with gradients and moments, see the module.
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
        precision: Precision = "auto",
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
        beta1, beta2 = group["betas"]
        super().check({**group, "betas": (beta1, 0.0 if beta2 == 1 else beta2)})
        expect(group, "graft", lambda value: value in get_args(Graft), f"one of {', '.join(get_args(Graft))}")
        expect(group, "matrix_eps", lambda value: value >= 0, "a number, zero or more")
        if beta2 == 1 and (group["graft"] == "adam" or not all(self.is_matrix(p, group) for p in group["params"])):
            raise ValueError("betas: expected β₂ below 1 where Adam is used, for grafting or for the rest, got 1")

    def keeps_v(self, group: dict[str, Any]) -> bool:
        return group["graft"] == "adam"

    def update_blocks(self, b: Blocks, t: int, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        update_statistics(b.g, b.statistics, beta2, group["precision"])
        sides = sum(matrices is not None for matrices in b.statistics)
        for _, due, statistics, roots in b.renewals():
            roots[due] = shampoo_root(statistics, sides, t, beta2, group["matrix_eps"])
        if b.v is not None:
            step = quick_adam_update(b.g, b.m, b.v, t, beta1, beta2, group["eps"])
        else:
            step = b.m.lerp_(b.g, 1 - beta1) / one_minus_power(beta1, t)
        if b.age >= 0:
            dtype = torch.bfloat16 if in_bfloat16(group["precision"], b.m) else b.m.dtype
            factors = [root if root is None else root.to(dtype) for root in b.basis]
            u = multiply_axes(b.m.to(dtype), factors, transposed=True).to(b.m.dtype)  # L̂^{−p} M R̂^{−p}
            if group["graft"] == "none":
                u = u / one_minus_power(beta1, t)
            else:
                axes = tuple(range(1, u.dim()))
                length = torch.linalg.vector_norm(u, dim=axes, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
                u = u.mul_(torch.linalg.vector_norm(step, dim=axes, keepdim=True) / length)
            b.update.copy_(u)
        elif group["graft"] != "none":
            b.update.copy_(step)
