"""Averages of the weights over a run: exponential, Polyak, power-function; and schedule-free descent.

Every average here is one recursion, θ̄ ← θ̄ + w_t (θ_t − θ̄), in which w_t is a plain function of the step t = 1, 2, …
with w_1 = 1, so that the first value of θ̄ does not matter and no bias is left:

* :func:`polyak`, w_t = 1 / t: the mean of all steps (Polyak & Juditsky 1992);
* :func:`exponential`, w_t = (1 − β) / (1 − β^t): the bias-corrected exponential average of Kingma & Ba 2014 (arXiv
  1412.6980, section 7.2), θ̂_t = (1 − β) Σ_s β^{t−s} θ_s / (1 − β^t);
* :func:`power`, w_t = 1 − (1 − 1/t)^a: the power-function average of Karras et al. 2024 (arXiv 2312.02696, eq. 1 with
  γ = a − 1), whose half-life is a fraction of the steps so far; a = 1 is Polyak's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from likely.optim.frame import local, precision_of

#: Weight of the newest value, from the number of the step (1 for the first) and the steps since the last update.
Weight = Callable[[int, int], float]


def polyak(after: int = 0) -> Weight:
    """The mean of all steps but the first ``after``.

    >>> weight = polyak()
    >>> [weight(t, 1) for t in (1, 2, 4)]
    [1.0, 0.5, 0.25]
    """

    def weight(t: int, every: int) -> float:
        return min(1.0, every / max(t - after, every))

    return weight


def exponential(half_life: float, batch_size: int = 1) -> Weight:
    """The exponential average with its bias corrected, β = 2^(−1 / half-life).

    Args:
        half_life: in steps, or in examples where ``batch_size`` is given.
        batch_size: examples in a step.

    >>> weight = exponential(half_life=1.0)                         # β = ½: (½ θ₂ + ¼ θ₁) / (½ + ¼) after two steps
    >>> weight(1, 1), round(weight(2, 1), 6)
    (1.0, 0.666667)
    """
    _positive("half_life", half_life)
    _positive("batch_size", batch_size)

    def weight(t: int, every: int) -> float:
        halvings = -math.log(0.5) * batch_size / half_life
        return math.expm1(-halvings * every) / math.expm1(-halvings * max(t, every))

    return weight


def power(fraction: float, half_life: float | None = None) -> Weight:
    """The power-function average: its half-life is the fraction h of the steps so far, (1 − h)^a = ½.

    It forgets the start of a run of any length.  Applied every k steps with the decay of k steps it is the same.

    Args:
        fraction: h, between 0 and 1.
        half_life: longest half-life in steps, or None; once it is shorter the average is the exponential one.

    >>> round(power(fraction=0.5)(4, 1), 6)                         # a = 1
    0.25
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: expected a number between 0 and 1, got {fraction!r}")
    if half_life is not None:
        _positive("half_life", half_life)
    exponent = math.log(0.5) / math.log1p(-fraction)

    def weight(t: int, every: int) -> float:
        decay = max(0.0, 1.0 - every / t) ** exponent
        return 1.0 - (decay if half_life is None else min(decay, 0.5 ** (every / half_life)))

    return weight


class Average:
    """An average of tensors, kept beside them.

    Args:
        weights: the tensors to average; their own storage is left alone.
        weight: weight of the newest value: :func:`polyak`, :func:`exponential`, :func:`power`, or a function of your
            own.
        every: steps from one update to the next; the others cost nothing.

    >>> theta = torch.tensor([0.0])
    >>> average = Average([theta], polyak())
    >>> for t in (1, 2, 3):
    ...     theta += 1
    ...     average.update()
    >>> average.values[0].item()
    2.0
    """

    def __init__(self, weights: Iterable[Tensor], weight: Weight, every: int = 1) -> None:
        _positive("every", every)
        self._weights = list(weights)
        self._weight = weight
        self.every = every
        self.steps = 0
        #: The averages, float32 where the tensors are bfloat16 or float16.
        self.values = [tensor.detach().to(precision_of(tensor.dtype), copy=True) for tensor in self._weights]

    @torch.no_grad()
    def update(self, step: int | None = None) -> None:
        """Take in the tensors as they are after a step.

        Args:
            step: number of steps made so far; by default one more than at the last call.
        """
        self.steps = self.steps + 1 if step is None else step
        if self.steps % self.every == 0:
            values = [local(value) for value in self.values]
            newest = [local(tensor).to(value.dtype) for tensor, value in zip(self._weights, values)]
            torch._foreach_lerp_(values, newest, self._weight(self.steps, self.every))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the tensors are their averages."""
        with torch.no_grad():
            tensors = [local(tensor) for tensor in self._weights]
            own = [tensor.clone() for tensor in tensors]
            torch._foreach_copy_(tensors, [local(value) for value in self.values])
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(tensors, own)

    def state_dict(self) -> dict[str, Any]:
        """The state, which shares memory with the averages."""
        return {"steps": self.steps, "values": list(self.values)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a state that :meth:`state_dict` gave."""
        if len(state["values"]) != len(self.values):
            raise ValueError(f"expected averages of {len(self.values)} tensors, got {len(state['values'])}")
        self.steps = state["steps"]
        for value, saved in zip(self.values, state["values"]):
            value.copy_(saved)


class ScheduleFree:
    """Descent without a schedule of the learning rate (Defazio et al. 2024, arXiv 2405.15682, eqs 3–5).

    Another optimiser moves z by the gradient at y; x, the weights to use, is an average of z, and y lies between:

        y_t = (1 − β) z_t + β x_t,    z_{t+1} = z_t − step of the gradient at y_t,
        x_{t+1} = (1 − c) x_t + c z_{t+1},    c = α_t² / Σ_s α_s²  (1 / (t + 1) at a constant rate).

    The parameters are y while training, and x within :meth:`averaged`.  The optimiser needs no momentum of its own:
    ``Adam(betas=(0.0, 0.999))``, ``SGD(momentum=0)``.  Its learning rate may rise at the start, and then stays.

    Args:
        optimizer: what moves z; decoupled weight decay acts on z.
        beta: β, in [0, 1).

    >>> w = torch.nn.Parameter(torch.tensor([4.0]))
    >>> optimizer = ScheduleFree(torch.optim.SGD([w], lr=0.5))
    >>> for _ in range(200):
    ...     w.grad = w.detach().clone()                             # of ½ w²
    ...     optimizer.step()
    >>> with optimizer.averaged():
    ...     abs(w.item()) < 0.05
    True
    """

    def __init__(self, optimizer: Optimizer, beta: float = 0.9) -> None:
        if not 0 <= beta < 1:
            raise ValueError(f"beta: expected a number from 0 to below 1, got {beta!r}")
        self.optimizer, self.beta = optimizer, beta
        self._total = [0.0] * len(optimizer.param_groups)  # Σ_s α_s² of every group
        self._z = [[p.detach().clone() for p in group["params"]] for group in optimizer.param_groups]
        self._x = [
            [p.detach().to(precision_of(p.dtype), copy=True) for p in group["params"]]
            for group in optimizer.param_groups
        ]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make a step with the gradients that are in the parameters, which were taken at y."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.optimizer.param_groups
        for group, z in zip(groups, self._z):
            torch._foreach_copy_(_local(group["params"]), _local(z))
        self.optimizer.step()  # z ← z − step
        for i, (group, z, x) in enumerate(zip(groups, self._z, self._x)):
            rate = float(group["lr"])
            self._total[i] += rate * rate
            c = rate * rate / self._total[i] if rate else 0.0
            y, z, x = _local(group["params"]), _local(z), _local(x)
            torch._foreach_copy_(z, y)
            newest = [tensor.to(mean.dtype) for tensor, mean in zip(z, x)]
            torch._foreach_lerp_(x, newest, c)  # x ← (1 − c) x + c z
            torch._foreach_copy_(y, torch._foreach_lerp(newest, x, self.beta))  # y ← (1 − β) z + β x
        return loss

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within the context the parameters are x."""
        parameters = _local([p for group in self.optimizer.param_groups for p in group["params"]])
        with torch.no_grad():
            own = [parameter.clone() for parameter in parameters]
            torch._foreach_copy_(parameters, _local([x for group in self._x for x in group]))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, own)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state; the parameters, which are y, are not part of it."""
        return {"optimizer": self.optimizer.state_dict(), "total": list(self._total), "z": self._z, "x": self._x}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a state that :meth:`state_dict` gave."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._total = list(state["total"])
        for name, tensors in (("z", self._z), ("x", self._x)):
            for group, saved in zip(tensors, state[name], strict=True):
                for tensor, value in zip(group, saved, strict=True):
                    tensor.copy_(value)


def _local(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [local(tensor) for tensor in tensors]


def _positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}: expected a positive number, got {value!r}")
