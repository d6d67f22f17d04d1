"""What Shampoo, SOAP and Muon share: a rule for matrices, and AdamW for the rest.

**The split.**  A parameter is treated as a matrix if at least two of its axes are longer than one, and if its group
says ``matrices=True``, which is the default.  All others (biases, gains, scalars) move by AdamW, through PyTorch's
fused kernel where there is one.  Put parameters in a group with ``matrices=False`` to have AdamW move them too;
:func:`matrix_groups` does that for embeddings, and for the layers that you name.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from likely.optim.adam import Adam
from likely.optim.frame import Bucket, Decay, Rounding, UpdateRule, expect, local, precision_of
from likely.optim.matrices import batched, laid_together, owns_its_memory


def matrix_groups(model: nn.Module, but: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Two parameter groups of a model: matrices inside it, and the rest, for AdamW, with ``matrices=False``.

    The rest is vectors, embeddings (``nn.Embedding``, ``nn.EmbeddingBag``), and parameters whose name begins with one
    of ``but``, such as the layer that gives the logits: the split of Jordan et al. 2024.

    Raises:
        ValueError: no parameter has such a name.

    >>> model = nn.ModuleDict({"in": nn.Embedding(9, 4), "mid": nn.Linear(4, 4), "out": nn.Linear(4, 9)})
    >>> [[tuple(p.shape) for p in group["params"]] for group in matrix_groups(model, but=["out"])]
    [[(4, 4)], [(9, 4), (4,), (9, 4), (9,)]]
    """
    names = [name for name, _ in model.named_parameters()]
    for beginning in but:
        if not any(name.startswith(beginning) for name in names):
            raise ValueError(f"but: expected the beginning of a parameter's name, got {beginning!r}")
    looked_up = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for p in module.parameters(recurse=False)
    }
    inside: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hidden = has_two_sides(parameter) and id(parameter) not in looked_up and not name.startswith(tuple(but))
            (inside if hidden else rest).append(parameter)
    groups = [{"params": inside, "matrices": True}, {"params": rest, "matrices": False}]
    return [group for group in groups if group["params"]]


def has_two_sides(parameter: Tensor) -> bool:
    """Whether at least two axes are longer than one."""
    return sum(n > 1 for n in parameter.shape) >= 2


class MatrixRule(Adam):
    """A rule for matrices (``begin_matrix``, ``update_matrices``); everything else moves by AdamW.

    Args:
        params: parameters or groups of them; a group may say ``matrices=False``.
        own: options of the rule.
        lr, betas, eps, weight_decay, decay: as in :class:`likely.optim.adam.AdamW`, of which ``betas`` and ``eps``
            hold for what is no matrix.
        maximize, rounding, seed: see :class:`likely.optim.frame.UpdateRule`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        own: dict[str, Any],
        *,
        lr: float | Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        decay: Decay,
        maximize: bool,
        rounding: Rounding,
        seed: int,
    ) -> None:
        of_adam = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "epsilon": "outside",
            "bias_correction": True,
            "amsgrad": False,
            "v_init": 0.0,
            "fused": None,
        }
        UpdateRule.__init__(
            self,
            params,
            {**of_adam, "matrices": True, **own},
            weight_decay=weight_decay,
            decay=decay,
            maximize=maximize,
            rounding=rounding,
            seed=seed,
        )

    def check(self, group: dict[str, Any]) -> None:
        super().check(group)
        expect(group, "matrices", lambda value: isinstance(value, bool), "True or False")
        expect(group, "capturable", lambda value: value is False, "False")

    def state_dict(self) -> dict[str, Any]:
        """The state; no two of its tensors share memory, as those that a batch has laid together do."""
        whole = super().state_dict()
        own = {
            key: {
                name: value.clone() if isinstance(value, Tensor) and not owns_its_memory(local(value)) else value
                for name, value in state.items()
            }
            for key, state in whole["state"].items()
        }
        return {**whole, "state": own}

    def is_matrix(self, parameter: Tensor, group: dict[str, Any]) -> bool:
        """Whether a parameter is moved by the rule for matrices."""
        return group["matrices"] and has_two_sides(parameter)

    def is_elementwise(self, bucket: Bucket, group: dict[str, Any]) -> bool:
        return not self.is_matrix(bucket.handles[0], group)

    def begin_matrix(self, shape: torch.Size, like: dict[str, Any], group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a matrix of the given shape; ``like`` has its device and type."""
        raise NotImplementedError

    def update_matrices(self, bucket: Bucket, group: dict[str, Any]) -> list[Tensor]:
        """What matrices of one shape lose, in units of the learning rate; their state becomes the new one."""
        raise NotImplementedError

    def begin(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        if self.is_matrix(parameter, group):  # whole on every process, where parameters are shared out
            like = {"device": parameter.device, "dtype": precision_of(parameter.dtype)}
            return self.begin_matrix(parameter.shape, like, group)
        return super().begin(parameter, group)

    def advance(self, bucket: Bucket, group: dict[str, Any]) -> None:
        if self.is_elementwise(bucket, group):
            super().advance(bucket, group)
            return
        shapes = [(tuple(handle.shape),) for handle in bucket.handles]
        for indices in batched(range(len(shapes)), shapes):  # what is made for one batch is gone before the next
            handles = [bucket.handles[i] for i in indices]
            state = {name: [tensors[i] for i in indices] for name, tensors in bucket.state.items()}
            together = Bucket(
                handles,
                [bucket.parameters[i] for i in indices],
                [bucket.gradients[i] for i in indices],
                {name: self._laid_together(name, tensors, handles) for name, tensors in state.items()},
                bucket.clock,
                [bucket.numbers[i] for i in indices],
                bucket.t,
            )
            UpdateRule.advance(self, together, group)

    def _laid_together(self, name: str, tensors: list[Tensor], handles: list[Tensor]) -> list[Tensor]:
        """A batch's tensors of the state, in one piece of memory if each still has its own: so they stack for free."""
        moved = laid_together(tensors)
        for handle, tensor in zip(handles, moved or []):
            self.state[handle][name] = tensor
        return moved or tensors

    def update(self, bucket: Bucket, group: dict[str, Any]) -> list[Tensor]:
        if self.is_elementwise(bucket, group):
            return super().update(bucket, group)
        return self.update_matrices(bucket, group)
