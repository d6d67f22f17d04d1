"""One optimiser step, as a function of its number: batch, noise, gradient, update, average."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from likely.contract import Model
from likely.data.dataset import Dataset
from likely.memory import TRAINED_COPIES, check_training_memory, free_memory
from likely.noise import Noise, StreamNoise
from likely.optim.averaging import Average, ScheduleFree, power
from likely.optim.clipping import clip_by_global_norm
from likely.optim.frame import UpdateRule
from likely.optim.schedules import learning_rate_factor
from likely.processor import multiplies_bfloat16
from likely.training import diagnosis
from likely.training.checkpoints import flatten, unflatten
from likely.training.feeding import Feeder
from likely.training.optimizers import MakeOptimizer, make_optimizer, parameter_groups, without_momentum
from likely.training.options import TrainOptions
from likely.training.processes import LossModule, Processes
from likely.training.seeds import DROPOUT, INITIALISE, NOISE, Seeds

#: Bytes that a model keeps for gradients for each cell of a batch, from which on it is suspected of taking all memory.
_SUSPECT = 2000
LossFunction = Callable[[Tensor, Tensor | None, Noise, int], tuple[Tensor, dict[str, Tensor]]]


class Stepper:
    """Weights, optimiser and averages of a run, and the step that moves them.

    The batch of step t is positions t·B … (t+1)·B of the endless seeded order; its noise and dropout are seeded with
    (seed, t).  With several processes each takes its part of the batch and of the noise, and the gradient is the mean
    over the whole batch.

    Args:
        make_custom_optimizer: makes the optimiser of parameter groups, in place of ``options.optimizer``.
    """

    def __init__(
        self,
        model: Model,
        data: Dataset,
        options: TrainOptions,
        processes: Processes,
        make_custom_optimizer: MakeOptimizer | None = None,
    ) -> None:
        self.model, self.options, self.processes, self.device = model, options, processes, processes.device
        self.batch_size = min(options.batch_size, len(data))
        pieces = processes.count * options.accumulate
        if self.batch_size < pieces:
            raise ValueError(
                f"batch_size: expected at least one example for each of {processes.count} processes × "
                f"{options.accumulate} pieces, got {self.batch_size}"
            )
        low, high = processes.share(0, self.batch_size)
        cuts = [low + (high - low) * piece // options.accumulate for piece in range(options.accumulate + 1)]
        self._pieces = list(itertools.pairwise(cuts))
        self.parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(f"model {model.title()!r} has no parameters to train")
        if make_custom_optimizer is not None:
            self.optimizer = make_custom_optimizer(parameter_groups(model, options.weight_decay))
        else:
            own = options.optimizer_options
            if options.schedule_free:
                own = without_momentum(options.optimizer, own)
            self.optimizer = make_optimizer(
                options.optimizer, model, options.learning_rate, options.weight_decay, **own
            )
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.feeder = Feeder(data, options.seed, self.device)
        self._cells = data.space.dims
        self._autocast = options.precision == "bfloat16" or (
            options.precision == "auto" and multiplies_bfloat16(self.device)
        )
        self._noise_seeds = Seeds(options.seed, NOISE)
        self._dropout_seeds = Seeds(options.seed, DROPOUT + 16 * processes.rank)
        self._generator = torch.Generator(self.device)
        self._sums: dict[str, Tensor] = {}
        self._summed = 0
        self.averages: Average | None = None
        self.schedule_free: ScheduleFree | None = None

    def start(self) -> None:
        """Make ready for steps, once the weights have been initialised (or will be restored)."""
        options = self.options
        self.loss: LossFunction = _bare_loss(self.model)
        if self.processes.count > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            unused = self._unused_parameters()
            self.loss = DistributedDataParallel(LossModule(self.model), device_ids=ids, find_unused_parameters=unused)
        if options.compile:
            self.loss = CompiledLoss(self.loss, self.model)
        if options.schedule_free:
            self.schedule_free = ScheduleFree(self.optimizer)
        elif options.average:
            self.averages = Average(self.parameters, power(options.average_fraction, options.average_half_life))

    def check_memory(self) -> None:
        """Refuse a model or a batch that cannot fit into memory, before the system would end the process for it.

        What a batch keeps for its gradients is judged by two examples, if these are large.

        Raises:
            TooLittleMemory: more is needed than is free.
        """
        free = free_memory(self.device)
        if free is None:
            return
        check = functools.partial(check_training_memory, self.model.title(), self.parameters, TRAINED_COPIES, free)
        check()
        batch = max(stop - start for start, stop in self._pieces)
        if self._cells * batch * _SUSPECT > free:
            some = min(2, batch)
            check(self._kept_for_gradients(some) * batch // some, batch)

    def _kept_for_gradients(self, examples: int) -> int:
        """Bytes that the loss of some examples keeps for its gradients."""
        kept = {p.untyped_storage().data_ptr(): 0 for p in self.parameters}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept.setdefault(storage.data_ptr(), storage.nbytes())
            return tensor

        self._seed_dropout(self._dropout_seeds(0))
        x, condition, noise = self._batch(0, 0, examples)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with buffers_kept(self.model), hooks, self._precision():
            loss = self.model.loss(x, condition, noise, 0)  # alive until all is counted
        del loss
        return sum(kept.values())

    def _unused_parameters(self) -> bool:
        """Whether the loss of the first batch leaves some parameters without a gradient."""
        x, condition, noise = self._batch(0, *self._pieces[0])
        with buffers_kept(self.model):
            self.loss(x, condition, noise, 0)[0].backward()
        unused = any(parameter.grad is None for parameter in self.parameters)
        for parameter in self.parameters:
            parameter.grad = None
        return any(self.processes.gather(unused))

    # The step -----------------------------------------------------------------------------------------------

    def advance(self, step: int, total: int) -> None:
        """Make step ``step`` of ``total``."""
        self.gradient(step)
        self.update(step, total)

    def gradient(self, step: int) -> None:
        """Put the gradient of the batch of a step in the parameters, and add its loss to the sums."""
        for parameter in self.parameters:
            parameter.grad = None
        self._seed_dropout(self._dropout_seeds(step))
        for number in range(len(self._pieces)):
            if number < len(self._pieces) - 1 and isinstance(self.loss, DistributedDataParallel):
                with self.loss.no_sync():
                    self._piece(step, number)
            else:
                self._piece(step, number)
        self._summed += 1

    def _piece(self, step: int, number: int) -> None:
        """Add the gradient of one piece of the batch of a step."""
        start, stop = self._pieces[number]
        x, condition, noise = self._batch(step, start, stop, number)
        with self._precision():
            value, log = self.loss(x, condition, noise, step)
        share = (stop - start) / self.batch_size
        weight = share * self.processes.count  # the processes' gradients are averaged
        (value if weight == 1.0 else value * weight).backward()
        self._add("loss", value.detach(), share)
        for name, scalar in log.items():
            self._add(name, scalar, share)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16) if self._autocast else contextlib.nullcontext()

    def _batch(self, step: int, start: int, stop: int, piece: int = 0) -> tuple[Tensor, Tensor | None, StreamNoise]:
        """Examples ``start:stop`` of the batch of a step, and their noise."""
        size = self.batch_size
        own = None if stop - start == size else (start, stop, size)
        noise = StreamNoise(self._generator.manual_seed(self._noise_seeds(step)), self.device, own)
        later, following = divmod(piece + 1, len(self._pieces))
        first, last = self._pieces[following]
        here, there = step * size, (step + later) * size
        data, index = self.feeder.take((here + start, here + stop), (there + first, there + last))
        return *data.batch(index, noise), noise

    def update(self, step: int, total: int) -> None:
        """Move the weights along the gradient that is in the parameters, and the averages after them."""
        options = self.options
        factor = learning_rate_factor(step, total, options.warmup, options.decay, options.decay_fraction)
        for group, rate in zip(self.optimizer.param_groups, self._rates):
            group["lr"] = rate * factor
        if options.clip_norm is not None:
            clip_by_global_norm(self.parameters, options.clip_norm)
        (self.schedule_free or self.optimizer).step()
        if self.averages is not None:
            self.averages.update(step + 1)

    def seed_initialisation(self) -> None:
        """Seed the global generators for the model's initialisation."""
        self._seed_dropout(Seeds(self.options.seed, INITIALISE)(0))

    def _seed_dropout(self, seed: int) -> None:
        """Seed the global generators, from which layers like dropout draw."""
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index or 0].manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    # Sums of the loss ---------------------------------------------------------------------------------------

    def _add(self, name: str, value: Tensor, share: float) -> None:
        total = self._sums.get(name)
        if total is None:
            dtype = torch.float32 if self.device.type == "mps" else torch.float64
            total = self._sums[name] = torch.zeros((), dtype=dtype, device=self.device)
        total.add_(value, alpha=share)

    def means(self) -> dict[str, float]:
        """Means over steps, since the last :meth:`forget`, of the loss and of what the model logs, over all processes.

        This is the only place where training waits for the device.
        """
        totals = self.processes.sum(list(self._sums.values()))
        numbers = torch.stack(totals).tolist() if totals else []
        return {name: number / self._summed for name, number in zip(self._sums, numbers)}

    def own_loss(self) -> float | None:
        """This process's share of the mean loss since the last :meth:`forget`."""
        return float(self._sums["loss"]) / self._summed if self._summed else None

    def forget(self) -> None:
        """Start new sums."""
        self._sums, self._summed = {}, 0

    @property
    def summed(self) -> int:
        """Steps since the last :meth:`forget`."""
        return self._summed

    # State --------------------------------------------------------------------------------------------------

    def finite(self) -> bool:
        """Whether the weights, and the sums of this process, are finite."""
        return diagnosis.all_finite([*self.parameters, *self._sums.values()])

    def finite_everywhere(self) -> bool:
        """Whether the weights, and the sums of all processes, are finite."""
        return all(self.processes.gather(self.finite()))

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within the context the model has its averaged weights."""
        if self.schedule_free is not None:
            return self.schedule_free.averaged()
        return self.averages.applied() if self.averages is not None else contextlib.nullcontext()

    def averaged_weights(self) -> dict[str, Tensor]:
        """A copy of the model's state with its averaged weights."""
        with self.averaged():
            return {name: value.detach().clone() for name, value in self.model.state_dict().items()}

    def state(self, tensors: dict[str, Tensor], together: bool = True) -> dict[str, Any]:
        """The state as JSON values; tensors are put into ``tensors``, and share memory with the run.

        Args:
            together: whether all processes are here; if not, there must be no sums.
        """
        tensors |= {f"model.{name}": value for name, value in self.model.state_dict().items()}
        if self.averages is not None:
            tensors |= {f"average.{i}": value for i, value in enumerate(self.averages.values)}
        own = {name: float(total) for name, total in self._sums.items()}
        return {
            "optimizer": flatten((self.schedule_free or self.optimizer).state_dict(), tensors, "optimizer"),
            "sums": self.processes.gather(own) if together else [{}] * self.processes.count,
            "summed": self._summed,
        }

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go to a state that :meth:`state` gave."""
        self.model.load_state_dict(
            {name.removeprefix("model."): value for name, value in tensors.items() if name.startswith("model.")}
        )
        if self.averages is not None:
            for i, average in enumerate(self.averages.values):
                average.copy_(tensors[f"average.{i}"])
        state = unflatten(values["optimizer"], tensors)
        if self.schedule_free is not None:
            self.schedule_free.load_state_dict(state)
        else:
            _restore_optimizer(self.optimizer, state)
        self._sums, self._summed = {}, values["summed"]
        sums: Sequence[dict[str, float]] = values["sums"]
        if len(sums) == self.processes.count:
            for name, total in sums[self.processes.rank].items():
                self._add(name, torch.tensor(total, dtype=torch.float64), 1.0)

    def close(self) -> None:
        """Let go of threads."""
        self.feeder.close()

    # Diagnosis ----------------------------------------------------------------------------------------------

    def examined(self, step: int, total: int) -> tuple[list[str], list[int]]:
        """Make a step and look for numbers that are not finite: sentences on them, and the rows at fault."""
        self.forget()
        self.gradient(step)
        size = self.batch_size
        start, stop = self.processes.share(0, size)
        rows = self.feeder.rows(step * size + start, step * size + stop)
        if not all(math.isfinite(total) for total in self._sums.values()):

            def noise() -> StreamNoise:
                self._seed_dropout(self._dropout_seeds(step))
                return self._batch(step, start, stop)[2]

            x, condition, _ = self._batch(step, start, stop)
            return diagnosis.explain_loss(self.model, x, condition, noise, rows)
        sentences = diagnosis.explain_gradient(self.model)
        if not sentences:
            self.update(step, total)
            sentences = diagnosis.explain_weights(self.model)
        return sentences, rows


def _bare_loss(model: Model) -> LossFunction:
    def loss(x: Tensor, condition: Tensor | None, noise: Noise, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        result = model.loss(x, condition, noise, step)
        return result.value, result.log

    return loss


def _restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state; PyTorch's ``load_state_dict`` casts it to the parameters' type, this does not."""
    optimizer.load_state_dict(state)
    if isinstance(optimizer, UpdateRule):  # it loads to the bit
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        own = optimizer.state[parameters[number]]
        for name, value in values.items():
            if isinstance(value, Tensor):
                own[name] = value.to(own[name].device, copy=True)


@contextlib.contextmanager
def buffers_kept(model: torch.nn.Module) -> Iterator[None]:
    """Put a model's buffers (running statistics) back at the end."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    yield
    with torch.no_grad():
        for buffer, value in before:
            buffer.copy_(value)


class CompiledLoss:
    """A loss that ``torch.compile`` can take as a whole: its noise is drawn before it is called.

    A generator cannot be part of a compiled graph.  A trial of every batch size notes which variates are asked for;
    these are then drawn, in the same order and hence with the same values, and handed to the compiled loss.
    """

    def __init__(self, loss: LossFunction, model: Model) -> None:
        self._loss, self._model = loss, model
        self._wanted: dict[int, list[tuple[str, tuple[int, ...]]]] = {}

        def drawn(x: Tensor, condition: Tensor | None, variates: list[Tensor], step: int) -> Any:
            return loss(x, condition, _Drawn(variates), step)

        self._compiled = torch.compile(drawn)

    def __call__(
        self, x: Tensor, condition: Tensor | None, noise: Noise, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if len(x) not in self._wanted:
            self._wanted[len(x)] = self._trial(x, condition, step)
        variates = [getattr(noise, kind)(shape) for kind, shape in self._wanted[len(x)]]
        return self._compiled(x, condition, variates, step)

    @torch.no_grad()
    def _trial(self, x: Tensor, condition: Tensor | None, step: int) -> list[tuple[str, tuple[int, ...]]]:
        """What the loss asks of its noise; the model's buffers and the random state stay as they are."""
        noting = _Noting(StreamNoise(torch.Generator(x.device), x.device))
        with buffers_kept(self._model), torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            self._loss(x, condition, noting, step)
        return noting.wanted


class _Noting:
    """Noise that notes what is asked for."""

    def __init__(self, noise: StreamNoise) -> None:
        self._noise = noise
        self.wanted: list[tuple[str, tuple[int, ...]]] = []

    def normal(self, shape: Sequence[int]) -> Tensor:
        self.wanted.append(("normal", tuple(shape)))
        return self._noise.normal(shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        self.wanted.append(("uniform", tuple(shape)))
        return self._noise.uniform(shape)

    def stratified(self, shape: Sequence[int]) -> Tensor:
        self.wanted.append(("stratified", tuple(shape)))
        return self._noise.stratified(shape)


class _Drawn:
    """Noise that was drawn beforehand."""

    def __init__(self, variates: list[Tensor]) -> None:
        self._variates = variates
        self._next = 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        variate = self._variates[self._next]
        self._next += 1
        if tuple(variate.shape) != tuple(shape):
            raise ValueError("compile: expected a model that asks for the same noise in every step; use compile=False")
        return variate

    uniform = stratified = normal
