"""Checks of how a model behaves: what it refuses, its parts, determinism, gradients, saving, resuming, embedding."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from likely.checks.cases import FRESH_EXAMPLES, LEARNING_RATE, TRAINING_EXAMPLES, Case, rebuilt
from likely.checks.estimates import SIGMAS, mean_and_error, own_noise, row_noise
from likely.checks.outcome import Skipped, require
from likely.checks.source import Source, cells_of
from likely.contract import Integers, Model, NoCodec, Space
from likely.noise import StreamNoise

#: The smallest mean or deviation (nats) with which a part of the bound takes part.
WEIGHT = 0.05


def construction(case: Case) -> str:
    """Options, spaces and conditions that the model does not know are refused by name; it has a codec or says why."""
    cls, model = case.cls, case.fresh()
    require(bool((cls.__doc__ or "").strip()), "expected a docstring on the class")
    options = [name for name in model.config if name not in ("space", "condition")]
    wrong = f"{options[0]}_" if options else "no_such_option"
    unknown: dict[str, Any] = {wrong: 1}
    message = _refusal(lambda: cls(case.space, **unknown))
    require(repr(wrong) in message, f"an unknown option: expected a ValueError that names {wrong!r}, got {message!r}")
    if options:
        named = options[0] in message.replace(wrong, "")
        require(named, f"an unknown option: expected {options[0]!r} to be proposed for {wrong!r}, got {message!r}")
    message = _refusal(lambda: cls(Space((2,))))
    accepted = all(kind.__name__ in message for kind in cls.spaces)
    require(accepted, f"an unknown space: expected a ValueError naming the spaces it is defined on, got {message!r}")
    if not cls.conditional:
        message = _refusal(lambda: cls(case.space, Integers((1,), 3)))
        require("condition" in message, f"a condition it cannot use: expected a ValueError, got {message!r}")
    try:
        codec = model.codec()
    except NoCodec as reason:
        require(len(str(reason)) > 10, f"expected NoCodec with a reason, got {str(reason)!r}")
        return "refuses what it does not know; has no codec and says why"
    require(callable(getattr(codec, "push", None)) and callable(getattr(codec, "pop", None)), "codec: no push or pop")
    return "refuses what it does not know; has a codec"


def _refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def validation(case: Case) -> str:
    """What is not a batch of the space is refused with index, value and expectation."""
    refused = 0
    for space, x in zip((case.space, case.condition), case.draw(6, salt=3)):
        if space is None or x is None:
            continue
        space.validate(x)
        for what, broken in _broken_batches(space, x):
            message = _refusal(partial(space.validate, broken, "data"))
            require("data" in message and "expected" in message, f"{what}: expected a ValueError, got {message!r}")
            refused += 1
    return f"{refused} broken batches refused"


def _broken_batches(space: Space, x: Tensor) -> Iterator[tuple[str, Any]]:
    yield "no tensor", x.tolist()
    yield "an axis too few", x[0]
    yield "an example too wide", torch.cat([x, x], -1)
    flat, cells = x.reshape(len(x), -1), cells_of(space)
    for j, cell in enumerate(cells):
        whole = 0.5 if cell.levels is not None or cell.count else None
        off_grid = 0.3 * cell.step if cell.step is not None else whole
        below = -1.0 if cell.levels is not None or cell.count else None
        above = float(cell.levels) if cell.levels is not None else None
        hole = None if cell.missing else math.nan
        for what, value in {
            "infinite": math.inf,
            "between values": off_grid,
            "too small": below,
            "too large": above,
            "a hole": hole,
        }.items():
            if value is not None:
                broken = flat.clone()
                broken[2, j] = value
                yield f"cell {j} {what}", broken.reshape(x.shape)


@torch.no_grad()
def parts(case: Case) -> str:
    """Kind and names of the parts are the same everywhere, shapes are (batch,), and every part carries weight."""
    x, condition = case.draw(FRESH_EXAMPLES, salt=4)
    bound = case.trained.bound(x, condition, row_noise(0, len(x))).check_finite()
    single = case.trained.bound(x[:1], None if condition is None else condition[:1], row_noise(0, 1))
    others = {"a batch of one": single}
    weights = dict.fromkeys(bound.parts, 0.0)
    for stage in case.stages:
        found = stage.model.bound(x, condition, row_noise(0, len(x)))
        others[f"the {stage.name} model"] = found
        for name, part in found.parts.items():
            weights[name] = max(weights.get(name, 0.0), abs(float(part.mean())), float(part.std()))
    for where, other in others.items():
        same = list(other.parts) == list(bound.parts)
        require(same, f"{where}: expected {list(bound.parts)}, got {list(other.parts)}")
        require(other.kind == bound.kind, f"{where}: expected kind {bound.kind!r}, got {other.kind!r}")
    for name, part in bound.parts.items():
        require(tuple(part.shape) == (len(x),), f"{name}: expected shape ({len(x)},), got {tuple(part.shape)}")
        weight = weights[name]
        require(weight >= WEIGHT, f"{name}: expected a part that matters ({WEIGHT} nats), got {weight:.4f} nats")
    means = ", ".join(f"{name} {float(part.mean()):.3f}" for name, part in bound.parts.items())
    return f"{bound.kind}: {means}"


def determinism(case: Case) -> str:
    """Evaluation depends on the example and the given noise alone, and changes nothing."""
    x, condition = case.draw(64, salt=5)
    model, kept = case.trained, (x.clone(), None if condition is None else condition.clone())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        torch.manual_seed(1)
        with untouched_random_state("bound"):
            bound = model.bound(x, condition, own_noise(0, x, condition))
        torch.manual_seed(2)
        again = model.bound(x, condition, own_noise(0, x, condition))
        other = model.bound(x, condition, own_noise(1, x, condition))
        default = model.bound(x, condition)
    for name, part in bound.parts.items():
        require(torch.equal(part, again.parts[name]), f"{name}: differs between two evaluations with the same noise")
    if bound.kind == "exact":
        require(torch.equal(bound.nats, other.nats), "the kind is exact, but the value depends on the noise")
    require(default.kind == bound.kind, "without noise: another kind")
    default.check_finite()
    require(_same(x, kept[0]) and _same(condition, kept[1]), "the batch was changed by its evaluation")
    for name, value in model.state_dict().items():
        require(_same(value, before[name]), f"{name} was changed by an evaluation")
    require(not any(module.training for module in model.modules()), "an evaluation left the model in training mode")
    return "the same bits twice, nothing changed"


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a.nan_to_num(1e30), b.nan_to_num(1e30)) if a.is_floating_point() else torch.equal(a, b)


@contextmanager
def untouched_random_state(what: str) -> Iterator[None]:
    """Require that the block leaves torch's global generator as it was."""
    state = torch.get_rng_state()
    yield
    require(torch.equal(state, torch.get_rng_state()), f"{what} drew from the global generator beside the given noise")


@torch.no_grad()
def batch_invariance(case: Case) -> str:
    """An example's value does not depend on the examples beside it, nor on their order."""
    x, condition = case.draw(48, salt=6)
    whole = case.stages[0].precise.bound(x, condition, own_noise(0, x, condition))
    orders = [torch.tensor([i]) for i in range(8)]
    orders += [torch.randperm(len(x), generator=torch.Generator().manual_seed(0)), torch.arange(len(x) // 2)]
    worst = 0.0
    for rows in orders:
        own = None if condition is None else condition[rows]
        bound = case.stages[0].precise.bound(x[rows], own, own_noise(0, x[rows], own))
        for name, part in bound.parts.items():
            expected = whole.parts[name][rows]
            gap = float(((part - expected).abs() / (1 + expected.abs())).max())
            worst = max(worst, gap)
            require(gap < 1e-9, f"{name}: an example differs by {gap:.1e} (relative) in a batch of {len(rows)}")
    return f"largest relative difference {worst:.0e}"


@torch.no_grad()
def learning(case: Case) -> str:
    """Training moves the parameters and raises the bound on fresh examples of the source.

    A closed form is compared with the same model estimated on a source of other proportions and prototypes.
    """
    x, condition = case.draw(FRESH_EXAMPLES, salt=8)
    if case.cls.closed_form:
        other = Case(case.cls, case.build, case.seed)
        other.training_data = case.draw(
            TRAINING_EXAMPLES, salt=1, source=Source(case.space, case.condition, case.seed + 17, (0.05, 0.05, 0.9))
        )
        worse, title = other.trained, "the same model estimated on other data"
    elif not case.by_gradients:
        raise Skipped("nothing to train")
    else:
        worse, title = case.stages[-1].model, "the model before training"
        pairs = list(zip(worse.parameters(), case.trained.parameters()))
        require(any(not torch.equal(p, q) for p, q in pairs), "no parameter moved in training")
    after = case.trained.bound(x, condition, row_noise(5, len(x))).nats.double()
    before = worse.bound(x, condition, row_noise(5, len(x))).nats.double()
    gain, error = mean_and_error(after - before)
    require(gain > SIGMAS * error, f"expected a higher bound than {title}, got {gain:.4f} ± {error:.4f} nats")
    return f"{gain:.4f} ± {error:.4f} nats above {title}"


def gradients(case: Case) -> str:
    """Gradients of the loss are finite, reach every parameter, and equal finite differences in float64."""
    if not case.by_gradients:
        raise Skipped("not trained by gradients")
    x, condition = case.draw(32, salt=10)

    def loss(model: Model) -> Tensor:
        return model.loss(x, condition, own_noise(0, x, condition), 10**9).value

    for stage in case.stages:
        model = copy.deepcopy(stage.model).train()
        model.zero_grad()
        value = loss(model)
        require(value.dim() == 0 and bool(torch.isfinite(value)), f"expected a finite scalar loss, got {value}")
        value.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                require(parameter.grad is not None, f"{name} takes no part in the loss")
                finite = parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
                require(finite, f"{name}: the gradient is not finite")
    model = copy.deepcopy(case.stages[0].precise)
    model.zero_grad()
    loss(model).backward()
    slopes = [_hold_slope(model, name, loss) for name, p in model.named_parameters() if p.grad is not None]
    require(any(slope != 0 for slope, _ in slopes), "every gradient is zero")
    return f"largest difference from finite differences {max(gap for _, gap in slopes):.0e}"


def _hold_slope(model: Model, name: str, loss: Callable[[Model], Tensor]) -> tuple[float, float]:
    """Hold the gradient of one parameter along a random direction against central differences."""
    parameter = model.get_parameter(name)
    assert parameter.grad is not None
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=parameter.dtype)
    direction /= direction.norm()
    slope, gap = float((parameter.grad * direction).sum()), math.inf
    with torch.no_grad():
        start = parameter.clone()
        for width in (1e-5, 1e-6, 1e-4):  # a kink of the network within one width need not be within another
            values = []
            for sign in (1.0, -1.0):
                parameter.copy_(start + sign * width * direction)
                values.append(float(loss(model)))
            gap = min(gap, abs((values[0] - values[1]) / (2 * width) - slope))
        parameter.copy_(start)
    require(
        gap < 1e-6 + 1e-4 * abs(slope),
        f"{name}: along a random direction the gradient is {slope:.3e}, finite differences differ by {gap:.1e}",
    )
    return slope, gap


@torch.no_grad()
def save_load(case: Case) -> str:
    """A model rebuilt from its description as JSON and its weights as safetensors is the same to the bit."""
    x, condition = case.draw(64, salt=12)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({name: value.contiguous() for name, value in case.trained.state_dict().items()}, path)
        torch.manual_seed(case.seed + 1)
        model = rebuilt(case.trained).eval()
        model.load_state_dict(load_file(path))
    require(type(model) is case.cls, f"expected {case.cls.__name__}, got {type(model).__name__}")
    require(model.space == case.space and model.condition == case.condition, "the spaces differ")
    before = case.trained.bound(x, condition, own_noise(0, x, condition))
    after = model.bound(x, condition, own_noise(0, x, condition))
    for name, part in before.parts.items():
        require(torch.equal(part, after.parts[name]), f"{name} differs after saving and loading")
    noise = [StreamNoise(torch.Generator().manual_seed(0)) for _ in range(2)]
    same = torch.equal(case.trained.sample(64, condition, noise[0]), model.sample(64, condition, noise[1]))
    require(same, "samples differ after saving and loading")
    return "bound and samples are the same to the bit"


def resume(case: Case) -> str:
    """k steps, saved and loaded, and n − k steps give the very parameters of n steps."""
    if not case.by_gradients:
        raise Skipped("not trained by gradients")
    straight = case.initialised(case.fresh())
    optimiser = torch.optim.Adam(straight.parameters(), lr=LEARNING_RATE)
    for step in range(6):
        if step == 3:
            weights, state = copy.deepcopy((straight.state_dict(), optimiser.state_dict()))
        case.train_step(straight, optimiser, step)
    torch.manual_seed(case.seed + 1)
    resumed = case.build()
    resumed.load_state_dict(weights)
    optimiser = torch.optim.Adam(resumed.parameters(), lr=LEARNING_RATE)
    optimiser.load_state_dict(state)
    for step in range(3, 6):
        case.train_step(resumed, optimiser, step)
    other = resumed.state_dict()
    for name, value in straight.state_dict().items():
        require(_same(value, other[name]), f"{name} differs after 3 + 3 steps from what it is after 6")
    return "3 + 3 steps equal 6 to the bit"


@torch.no_grad()
def encoding(case: Case) -> str:
    """Embeddings are deterministic, one finite vector for each example; decoding gives examples of the space."""
    model = case.stages[0].precise
    if not model.can("encode"):
        raise Skipped("no encode")
    x, condition = case.draw(32, salt=13)
    torch.manual_seed(1)
    with untouched_random_state("encode"):
        z = model.encode(x, condition)  # type: ignore[operator]
    require(z.dim() == 2 and len(z) == len(x), f"expected shape ({len(x)}, latent), got {tuple(z.shape)}")
    require(bool(torch.isfinite(z).all()), "an embedding is not finite")
    require(torch.equal(z, model.encode(x, condition)), "two embeddings of the same example differ")  # type: ignore[operator]
    alone = model.encode(x[:1], None if condition is None else condition[:1])  # type: ignore[operator]
    require(torch.allclose(alone, z[:1], rtol=1e-9, atol=1e-9), "an embedding depends on its batch")
    require(bool((z.std(0) > 0).any()), "all embeddings are equal")
    latent = getattr(model, "latent_dim", z.shape[1])
    require(latent == z.shape[1], f"latent_dim is {latent}, embeddings have {z.shape[1]} dimensions")
    if model.can("decode"):
        drawn = model.decode(z, condition, StreamNoise(torch.Generator().manual_seed(0)))  # type: ignore[operator]
        case.space.validate(drawn, "decode")
        best = model.decode(z, condition)  # type: ignore[operator]
        require(
            tuple(best.shape) == tuple(x.shape), f"decode: expected shape {tuple(x.shape)}, got {tuple(best.shape)}"
        )
        require(bool(torch.isfinite(best).all()), "decode: a best guess is not finite")
    return f"{z.shape[1]} dimensions"


@torch.no_grad()
def column_nats(case: Case) -> str:
    """Every cell has its contribution, finite, its own example's only; a missing cell contributes nothing."""
    model = case.stages[0].precise
    if not model.can("column_nats"):
        raise Skipped("no column_nats")
    x, condition = case.draw(32, salt=15)
    nats = model.column_nats(x, condition, own_noise(0, x, condition))  # type: ignore[operator]
    require(tuple(nats.shape) == tuple(x.shape), f"expected shape {tuple(x.shape)}, got {tuple(nats.shape)}")
    require(bool(torch.isfinite(nats).all()), "a contribution is not finite")
    own = None if condition is None else condition[:1]
    alone = model.column_nats(x[:1], own, own_noise(0, x[:1], own))  # type: ignore[operator]
    require(torch.allclose(alone, nats[:1], rtol=1e-9, atol=1e-9), "a contribution depends on its batch")
    require(bool((nats[torch.isnan(x)] == 0).all()), "a missing cell contributes")
    if int(getattr(model, "samples", 1)) > 1:
        return "not held against the bound, which is one of several samples"
    total = model.bound(x, condition, own_noise(0, x, condition)).nats
    seen = (~torch.isnan(x)).flatten(1).any(1)  # what a bound says of an example without a cell belongs to none
    gap = float((nats.flatten(1).sum(1) - total)[seen].abs().max())
    require(gap < 1e-6 * (1 + float(total.abs().max())), f"the contributions differ from the bound by {gap:.1e} nats")
    return f"means {', '.join(f'{value:.3f}' for value in nats.mean(0).flatten().tolist())}"
