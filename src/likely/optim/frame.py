"""What all optimisers share, so that each of them is little more than its paper's update.

An optimiser is a subclass of :class:`UpdateRule` that says

* ``moments(group)``: which tensors it keeps for a parameter and the values they begin with (or ``begin`` where they
  are not shaped as the parameter);
* ``update(bucket, group)``: the paper's formula, from gradients and state to what is subtracted from the parameters,
  before it is multiplied by the learning rate.  It calls a function of gradients, state and hyperparameters alone,
  which writes the new state over the old and reads nothing else.

The frame does the rest: it collects the parameters that have a gradient in buckets of one device, type, age and kind of
state, counts their steps, decays the weights, and moves the parameters.

* **Precision.** State and update are float32 where the parameter is bfloat16 or float16.  The new parameter is rounded
  to the nearest, or stochastically (:func:`stochastic_rounding`).
* **Sparse gradients** (of ``nn.Embedding(sparse=True)``) are worked off lazily: a step touches the rows present in the
  gradient, in parameters and in state, and nothing else; other rows neither move nor decay, and the step counts for
  the whole tensor, as in ``torch.optim.SparseAdam``.
* **Processes.** Under DistributedDataParallel every process makes the same step.  With FSDP2 a parameter is a DTensor;
  an elementwise rule works on this process's part of it, any other on the whole gradient, gathered for the purpose.
* **Counting.** Parameters that have taken the same steps share the tensors that count them (``clock``).

Example, gradient descent in three lines:

>>> class Descent(UpdateRule):
...     def update(self, bucket, group):
...         return bucket.gradients
>>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
>>> w.grad = torch.tensor([1.0, -1.0])
>>> Descent([w], {"lr": 0.5}).step()
>>> w.tolist()
[0.5, 2.5]
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

#: How ``weight_decay`` λ acts: ``l2`` adds λ θ to the gradient (the penalty ½ λ |θ|²); ``lr`` takes α_t λ θ from the
#: parameter in every step, α_t the learning rate (PyTorch's AdamW); ``schedule`` takes η_t λ θ, η_t = α_t / α the
#: schedule alone, α the learning rate the optimiser was made with (Loshchilov & Hutter 2017, Algorithm 2).
Decay = Literal["l2", "lr", "schedule"]
#: How a bfloat16 parameter is rounded after a step.
Rounding = Literal["nearest", "stochastic"]


#: Elements that a thread works on at a time on a CPU, so that they stay in its cache from operation to operation.
CACHED = 2**17


@dataclass
class Bucket:
    """Parameters of one device, type, age and kind of state, to be moved together.

    Args:
        handles: the parameters as the user knows them.
        parameters: their values; this process's part of them where they are shared out.
        gradients: their gradients, in the precision of the state; whole where the rule is not elementwise.
        state: the state by name; each entry is as long as ``parameters``.
        clock: the tensors that count their steps, by name.
        numbers: the positions of the parameters among all parameters of the optimiser.
        t: number of this step, 1 for the first; a tensor without dimensions where the step is captured or compiled.
        offsets: where in the parameters these values begin; None for at their beginning.
    """

    handles: list[Tensor]
    parameters: list[Tensor]
    gradients: list[Tensor]
    state: dict[str, list[Tensor]]
    clock: dict[str, Tensor]
    numbers: list[int]
    t: Any = 0
    offsets: list[int] | None = None

    def runs(self, size: int) -> Iterator[Bucket]:
        """The same elements in buckets of about ``size`` of them, whose tensors share memory with those here."""
        run = self._run()
        held = 0
        for i, parameter in enumerate(self.parameters):
            tensors = [parameter, self.gradients[i], *(entries[i] for entries in self.state.values())]
            n = parameter.numel()
            divisible = n > size and all(tensor.is_contiguous() for tensor in tensors)
            for start in range(0, n, size if divisible else max(n, 1)):
                stop = min(start + size, n) if divisible else n
                if held and held + stop - start > size:
                    yield run
                    run, held = self._run(), 0
                mine = [tensor.view(-1)[start:stop] for tensor in tensors] if divisible else tensors
                run.handles.append(self.handles[i])
                run.parameters.append(mine[0])
                run.gradients.append(mine[1])
                for entries, tensor in zip(run.state.values(), mine[2:]):
                    entries.append(tensor)
                run.numbers.append(self.numbers[i])
                run.offsets.append(start)  # type: ignore[union-attr]
                held += stop - start
        if held:
            yield run

    def _run(self) -> Bucket:
        return Bucket([], [], [], {name: [] for name in self.state}, self.clock, [], self.t, [])


class UpdateRule(Optimizer):
    """The frame of all optimisers: from a rule for the update to a ``torch.optim.Optimizer``.

    Args:
        params: parameters, named parameters, or groups of them as dicts with options of their own.
        defaults: options of the rule, ``lr`` among them; every group may have its own.
        weight_decay: λ, see ``decay``.
        decay: ``l2``, ``lr`` or ``schedule``, see :data:`Decay`.
        maximize: whether the objective is maximised.
        rounding: ``nearest`` or ``stochastic`` rounding of bfloat16 parameters.
        seed: seed of the stochastic rounding.
        capturable: whether steps are counted on the parameters' device, as CUDA graphs need it; ``lr`` is then best a
            tensor on that device, so that it can be changed between replays.

    Raises:
        ValueError: an option has no such value, or a gradient is of a kind that the rule cannot use.
    """

    #: Names and first values of the scalars that count steps.
    clock: ClassVar[dict[str, float]] = {"step": 0.0}
    #: Names that torch.optim has for the tensors of the state: its state dicts can be loaded.
    names_in_torch: ClassVar[dict[str, str]] = {}

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        weight_decay: float = 0.0,
        decay: Decay = "l2",
        maximize: bool = False,
        rounding: Rounding = "nearest",
        seed: int = 0,
        capturable: bool = False,
    ) -> None:
        common = {
            "weight_decay": weight_decay,
            "decay": decay,
            "maximize": maximize,
            "rounding": rounding,
            "seed": seed,
            "capturable": capturable,
        }
        super().__init__(params, {**defaults, **common})

    # What a rule says ---------------------------------------------------------------------------------------

    def moments(self, group: dict[str, Any]) -> dict[str, float]:
        """Names and first values of the tensors kept for a parameter, each shaped as the parameter."""
        return {}

    def begin(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        dtype = precision_of(parameter.dtype)
        return {name: torch.full_like(parameter, value, dtype=dtype) for name, value in self.moments(group).items()}

    def update(self, bucket: Bucket, group: dict[str, Any]) -> Sequence[Tensor] | Sequence[Sequence[Tensor]]:
        """What the parameters lose, in units of the learning rate; the state in ``bucket`` becomes the new one.

        It may be given in terms, each a sequence of tensors, which the parameters lose one after another.
        """
        raise NotImplementedError

    def tick(self, clock: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Count a step, in the tensors of a clock."""
        clock["step"].add_(1)

    def is_elementwise(self, bucket: Bucket, group: dict[str, Any]) -> bool:
        """Whether the update of an element depends on that element alone."""
        return True

    def check(self, group: dict[str, Any]) -> None:
        """Raise ``ValueError`` if an option of a group has no sensible value."""

    # Groups and state ---------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with options of its own."""
        for option in set(param_group) - {*self.defaults, "params", "param_names", "initial_lr", "name"}:
            near = difflib.get_close_matches(option, self.defaults, n=1, cutoff=0.7)
            if near:  # other names are the user's own notes
                raise ValueError(f"params: expected groups with options such as {near[0]!r}, got {option!r}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("initial_lr", float(group["lr"]))
        expect(group, "lr", lambda value: 0 <= float(value) < math.inf, "a number, zero or more")
        expect(group, "weight_decay", lambda value: 0 <= value < math.inf, "a number, zero or more")
        expect(group, "decay", lambda value: value in get_args(Decay), f"one of {', '.join(get_args(Decay))}")
        expect(group, "rounding", lambda value: value in get_args(Rounding), f"one of {', '.join(get_args(Rounding))}")
        for parameter in group["params"]:
            if not parameter.is_floating_point():
                raise ValueError(f"params: expected parameters of real floating point, got {parameter.dtype}")
            if group["rounding"] == "stochastic" and parameter.dtype == torch.float16:
                raise ValueError("rounding: expected 'nearest' for parameters of float16, got 'stochastic'")
        self.check(group)

    def state_dict(self) -> dict[str, Any]:
        """The state; no two of its tensors share memory."""
        whole = super().state_dict()
        clones = {
            key: {name: value.clone() if name in self.clock else value for name, value in state.items()}
            for key, state in whole["state"].items()
        }
        return {**whole, "state": clones}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a state of this class, or of the class of the same name in torch.optim, to the bit.

        Tensors keep the type that they were saved in (PyTorch would cast them to the parameter's).  They are copied
        to memory of their own, aligned as that of a run that never stopped: the last bit of a product may depend on it.
        """
        saved = state_dict["state"]
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, parameter in zip(keys, parameters):
            state = self.state.get(parameter, {})
            for name, value in saved.get(key, {}).items():
                if isinstance(value, Tensor):
                    same = state[name].dtype == value.dtype
                    state[name] = state[name].clone() if same else value.to(state[name].device, copy=True)
            for theirs, ours in self.names_in_torch.items():
                if theirs in state:
                    state[ours] = state.pop(theirs)
        for group, theirs in zip(self.param_groups, state_dict["param_groups"]):
            for option, value in self.defaults.items():
                group.setdefault(option, value)
            group.setdefault("initial_lr", float(theirs["lr"]))
            self._share_clocks(group)

    def _share_clocks(self, group: dict[str, Any]) -> None:
        """Let parameters that have taken the same steps share their counters."""
        clocks: dict[tuple[Any, ...], dict[str, Tensor]] = {}
        for parameter in group["params"]:
            state = self.state.get(parameter)
            if state:
                device = parameter.device if group["capturable"] else torch.device("cpu")
                values = tuple(float(state[name]) for name in self.clock)
                if (device, values) not in clocks:
                    clock = clocks[device, values] = self._new_clock(device)
                    for tensor, value in zip(clock.values(), values):
                        tensor.fill_(value)
                state.update(clocks[device, values])

    # The step -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Move all parameters that have a gradient.

        Args:
            closure: computes the loss and its gradients anew; its value is returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        first = 0
        for group in self.param_groups:
            for bucket in self._buckets(group, first):
                if bucket.gradients[0].is_sparse:
                    self._advance_rows(bucket, group)
                else:
                    self.advance(bucket, group)
            first += len(group["params"])
        return loss

    def advance(self, bucket: Bucket, group: dict[str, Any]) -> None:
        """Move the parameters of a bucket; on a CPU in runs that stay in its cache, if the rule is elementwise."""
        if (
            self.is_elementwise(bucket, group)
            and bucket.parameters[0].device.type == "cpu"
            and not torch.compiler.is_compiling()
        ):
            for run in bucket.runs(CACHED * torch.get_num_threads()):
                self._advance(run, group)
        else:
            self._advance(bucket, group)

    def _advance(self, bucket: Bucket, group: dict[str, Any]) -> None:
        dtype = precision_of(bucket.parameters[0].dtype)
        bucket.gradients = [g if g.dtype == dtype else g.to(dtype) for g in bucket.gradients]
        if group["maximize"]:
            bucket.gradients = list(torch._foreach_neg(bucket.gradients))
        values = [p if p.dtype == dtype else p.to(dtype) for p in bucket.parameters]
        rate, weight_decay = group["lr"], group["weight_decay"]
        if not group["capturable"] and not torch.compiler.is_compiling():
            rate = float(rate)
        if weight_decay and group["decay"] == "l2":  # g ← g + λ θ
            bucket.gradients = list(torch._foreach_add(bucket.gradients, values, alpha=weight_decay))
        elementwise = self.is_elementwise(bucket, group)
        if not elementwise:
            bucket.gradients = [whole(g, handle) for g, handle in zip(bucket.gradients, bucket.handles)]
        update = self.update(bucket, group)
        terms = [list(u) for u in ([update] if isinstance(update[0], Tensor) else update)]  # type: ignore[arg-type]
        if not elementwise:
            terms = [[part(u, handle) for u, handle in zip(term, bucket.handles)] for term in terms]
        if weight_decay and group["decay"] != "l2":  # θ ← θ − (α_t or η_t) λ θ
            factor = 1 - rate * (weight_decay if group["decay"] == "lr" else weight_decay / group["initial_lr"])
            torch._foreach_mul_(values, factor)
        for term in terms:  # θ ← θ − α_t u
            if isinstance(rate, Tensor):
                torch._foreach_sub_(values, torch._foreach_mul(term, rate))
            else:
                torch._foreach_add_(values, term, alpha=-rate)
        if dtype != bucket.parameters[0].dtype:
            if group["rounding"] == "stochastic":
                for i, (value, handle) in enumerate(zip(values, bucket.handles)):
                    offset = bucket.offsets[i] if bucket.offsets else 0
                    key = (group["seed"], bucket.t, bucket.numbers[i], place(handle))
                    values[i] = stochastic_rounding(value, *key, offset=offset)
            torch._foreach_copy_(bucket.parameters, values)

    def _advance_rows(self, bucket: Bucket, group: dict[str, Any]) -> None:
        """Move the rows of one parameter that its sparse gradient holds, as if they were all there is."""
        if not self.is_elementwise(bucket, group):
            raise ValueError(f"{type(self).__name__}: expected dense gradients, got a sparse one")
        ((parameter,), (gradient,)) = bucket.parameters, bucket.gradients
        gradient = gradient.coalesce()
        if gradient.sparse_dim() != 1:
            raise ValueError(f"expected gradients sparse in their first axis, got {gradient.sparse_dim()} sparse axes")
        index = gradient.indices()[0]
        rows = Bucket(
            bucket.handles,
            [parameter[index]],
            [gradient.values()],
            {name: [tensor[index]] for name, (tensor,) in bucket.state.items()},
            bucket.clock,
            bucket.numbers,
            bucket.t,
        )
        self.advance(rows, group)
        parameter[index] = rows.parameters[0]
        for name, (tensor,) in bucket.state.items():
            tensor[index] = rows.state[name][0]

    def _buckets(self, group: dict[str, Any], first: int) -> Iterator[Bucket]:
        """The parameters of a group that have a gradient, their steps counted.

        Args:
            first: number of parameters in the groups before.
        """
        buckets: dict[Any, Bucket] = {}
        fresh: dict[torch.device, dict[str, Tensor]] = {}
        idle = {id(self.state[p]["step"]) for p in group["params"] if p.grad is None and p in self.state}
        parted: dict[int, dict[str, Tensor]] = {}
        for number, handle in enumerate(group["params"], first):
            gradient = handle.grad
            if gradient is None:
                continue
            state = self.state[handle]
            if not state:
                device = handle.device if group["capturable"] else torch.device("cpu")
                if device not in fresh:
                    fresh[device] = self._new_clock(device)
                state.update(fresh[device])
                state.update(self.begin(handle, group))
            elif idle and id(state["step"]) in idle:  # some that took the same steps so far do not take this one
                old = id(state["step"])
                if old not in parted:
                    parted[old] = {name: state[name].clone() for name in self.clock}
                state.update(parted[old])
            key = (id(state["step"]), handle.device, handle.dtype, *state, number if gradient.is_sparse else None)
            bucket = buckets.get(key)
            if bucket is None:
                clock = {name: state[name] for name in self.clock}
                bucket = Bucket([], [], [], {name: [] for name in state if name not in self.clock}, clock, [])
                buckets[key] = bucket
            bucket.handles.append(handle)
            bucket.parameters.append(local(handle))
            bucket.gradients.append(aligned(gradient, handle))
            bucket.numbers.append(number)
            for name, tensors in bucket.state.items():
                tensors.append(local(state[name]))
        for clock in {id(bucket.clock["step"]): bucket.clock for bucket in buckets.values()}.values():
            self.tick(clock, group)
        counted_there = group["capturable"] or torch.compiler.is_compiling()
        for bucket in buckets.values():
            step = bucket.clock["step"]
            bucket.t = step if counted_there else step.item()
            yield bucket

    def _new_clock(self, device: torch.device) -> dict[str, Tensor]:
        exact = torch.float32 if device.type == "mps" else torch.float64
        return {  # torch.compile takes float64 without dimensions for constants: the others have one
            name: torch.tensor(value, dtype=torch.float32, device=device)
            if name == "step"
            else torch.tensor([value], dtype=exact, device=device)
            for name, value in self.clock.items()
        }


# --------------------------------------------------------------------------------------------------------------
# Parts of shared-out parameters (DTensor), without importing torch.distributed for those who have none
# --------------------------------------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """This process's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def aligned(gradient: Tensor, handle: Tensor) -> Tensor:
    """This process's part of a gradient, shared out as its parameter is."""
    if not hasattr(gradient, "to_local"):
        return gradient
    if gradient.placements != handle.placements:  # type: ignore[attr-defined]
        gradient = gradient.redistribute(placements=handle.placements)  # type: ignore[attr-defined]
    return local(gradient)


def whole(mine: Tensor, handle: Tensor) -> Tensor:
    """The tensor of which every process has the part ``mine``, shared out as ``handle`` is; gathered from all."""
    if not hasattr(handle, "to_local"):
        return mine
    from torch.distributed.tensor import DTensor

    shared = DTensor.from_local(
        mine,
        handle.device_mesh,  # type: ignore[attr-defined]
        handle.placements,  # type: ignore[attr-defined]
        run_check=False,
        shape=handle.shape,
        stride=handle.stride(),
    )
    return shared.full_tensor()


def part(tensor: Tensor, handle: Tensor) -> Tensor:
    """This process's part of a tensor that all processes have, shared out as ``handle`` is."""
    if not hasattr(handle, "to_local"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = handle.device_mesh, handle.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()


def place(handle: Tensor) -> int:
    """Number of the part of a parameter that this process has; 0 where it is not shared out."""
    if not hasattr(handle, "to_local"):
        return 0
    mesh = handle.device_mesh  # type: ignore[attr-defined]
    number = 0
    for size, mine, how in zip(mesh.shape, mesh.get_coordinate(), handle.placements):  # type: ignore[attr-defined]
        if how.is_shard():
            number = number * size + mine
    return number


# --------------------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------------------


def precision_of(dtype: torch.dtype) -> torch.dtype:
    """The type that state and update have for a parameter of type ``dtype``: at least float32.

    >>> precision_of(torch.bfloat16), precision_of(torch.float64)
    (torch.float32, torch.float64)
    """
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def one_minus_power(beta: float, t: float | Tensor) -> Any:
    """1 − β^t, for a tensor t without the loss of digits that the difference would have in float32.

    >>> one_minus_power(0.9, 2.0)
    0.18999999999999995
    """
    if isinstance(t, Tensor):
        return -torch.expm1(t * math.log(beta)) if beta > 0 else torch.ones_like(t)
    return 1.0 - beta**t


def stochastic_rounding(
    x: Tensor, seed: int, t: float | Tensor, number: int = 0, part: int = 0, offset: int = 0
) -> Tensor:
    """float32 rounded to one of the two neighbours in bfloat16, each the more likely the nearer: E[result] = x.

    The 16 bits that bfloat16 lacks are carried over with a probability equal to their value, by adding a uniform
    16-bit integer to the bits of x.  The integer is a hash of (seed, t, number, part, index of the element): nothing
    is drawn, so that a resumed run rounds as the run that was never stopped.  What is not finite stays as it is.

    Args:
        x: float32, any shape.
        seed: seed of the optimiser.
        t: number of the step.
        number: number of the parameter.
        part: number of the part of the parameter, where it is shared out.
        offset: index of the first element.

    >>> x = torch.full((10_000,), 1.0 + 2**-9)                    # a quarter of the way from 1 to 1 + 2⁻⁷
    >>> rounded = stochastic_rounding(x, seed=0, t=1)
    >>> rounded.dtype, bool(((rounded > 1).float().mean() - 0.25).abs() < 0.015)
    (torch.bfloat16, True)
    """
    stream = 0
    for key in (seed, number, part, seed >> 32, offset >> 32):
        stream = _mix(stream ^ (key & 0xFFFFFFFF))
    word = _mix(t.to(torch.int64) + stream if isinstance(t, Tensor) else int(t) + stream) + offset
    index = torch.arange(x.numel(), dtype=torch.int32 if x.numel() < 2**31 else torch.int64, device=x.device)
    noise = _mix_(index.to(torch.int32).add_(_signed(word))).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    carried = noise.view(x.shape).add_(x.contiguous().view(torch.int32)).bitwise_and_(-0x10000)
    return torch.where(x.isfinite(), carried.view(torch.float32), x).to(torch.bfloat16)


def _mix(x: Any) -> Any:
    """A bijection of the integers below 2³² without visible structure (the finaliser "lowbias32" of Wellons 2018)."""
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _mix_(x: Tensor) -> Tensor:
    """:func:`_mix` in place, of int32 that stands for the integers below 2³²."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(0x7FEB352D))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def _signed(word: Any) -> Any:
    """The signed 32-bit integer with the low 32 bits of an integer."""
    word = ((word + 0x80000000) & 0xFFFFFFFF) - 0x80000000
    return word.to(torch.int32) if isinstance(word, Tensor) else word


def expect(group: dict[str, Any], option: str, holds: Callable[[Any], bool], expected: str) -> None:
    """Raise ``ValueError`` that names an option of a group whose value does not hold what is expected of it."""
    try:
        fine = holds(group[option])
    except (TypeError, ValueError):
        fine = False
    if not fine:
        raise ValueError(f"{option}: expected {expected}, got {group[option]!r}")
