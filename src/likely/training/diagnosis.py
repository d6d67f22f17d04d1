"""What went wrong when a number is not finite: which example, part of the bound, column, layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from likely.contract import Model, Table
from likely.noise import Noise


class Diverged(FloatingPointError):
    """Training stopped because a number was not finite, or because the loss ran away.

    Attributes:
        step: number of the step, from 0.
        rows: row numbers of the batch in the training set, or of its examples that are at fault where that is known.
    """

    def __init__(self, message: str, step: int, rows: list[int] | None = None) -> None:
        super().__init__(message)
        self.step, self.rows = step, rows or []


def explain_loss(
    model: Model, x: Tensor, condition: Tensor | None, noise: Callable[[], Noise], rows: list[int]
) -> tuple[list[str], list[int]]:
    """Sentences on why the loss of a batch is not finite, and the row numbers that are at fault.

    Args:
        noise: makes the noise of the step anew.
        rows: row number of every example of the batch in the training set.
    """
    sentences: list[str] = []
    guilty = rows
    with torch.no_grad(), _first_layer(model) as layer:
        bound = model.bound(x, condition, noise())
    wrong_parts = [name for name, part in bound.parts.items() if not torch.isfinite(part).all()]
    if wrong_parts:
        wrong = torch.stack([~torch.isfinite(bound.parts[name]) for name in wrong_parts])
        examples = wrong.any(0).nonzero().flatten().tolist()
        guilty = [rows[i] for i in examples]
        name = wrong_parts[0]
        i = int(wrong[0].nonzero()[0])
        sentences.append(f"part {name!r} of the bound is {bound.parts[name][i].item()} for {_name_rows(guilty)}")
        sentences += _explain_columns(model, x, condition, noise, examples)
    else:
        sentences.append("the bound itself is finite, so the fault lies in what the loss adds to it")
    if not torch.isfinite(x).all() and not model.space.missing:
        sentences.append("the batch itself holds values that are not finite")
    if layer:
        sentences.append(f"the first layer whose output is not finite is {layer[0]}")
    elif wrong_parts:
        sentences.append("the outputs of all layers are finite, so it arises in the likelihood or the prior")
    return sentences, guilty


def explain_gradient(model: nn.Module) -> list[str]:
    """Sentences on which parameters have a gradient that is not finite; none if all are finite."""
    wrong = [n for n, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    return [f"the gradient is not finite in {_name_some(wrong)}"] if wrong else []


def explain_weights(model: nn.Module) -> list[str]:
    """Sentences on which parameters are not finite; none if all are finite."""
    wrong = [name for name, p in model.named_parameters() if not torch.isfinite(p).all()]
    return [f"the weights are not finite in {_name_some(wrong)}"] if wrong else []


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether every value is finite; one transfer from the device."""
    largest = torch._foreach_norm([t for t in tensors if t.numel()], float("inf"))
    return not largest or bool(torch.isfinite(torch.stack([v.float() for v in largest])).all())


@contextmanager
def _first_layer(model: nn.Module) -> Iterator[list[str]]:
    """Within the context: notes the first submodule whose output is not finite though its input is."""
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _finite(output):
                where = "" if _finite(inputs) else ", whose input is not finite either"
                found.append(f"{name!r} ({type(module).__name__}){where}")

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return bool(torch.isfinite(value).all())
    if isinstance(value, tuple | list):
        return all(_finite(item) for item in value)
    return True


def _explain_columns(
    model: Model, x: Tensor, condition: Tensor | None, noise: Callable[[], Noise], examples: list[int]
) -> list[str]:
    """Which columns of a table are at fault: by the model's own account, else the most unusual cells."""
    if not isinstance(model.space, Table):
        return []
    names = [column.name for column in model.space.columns]
    if model.can("column_nats"):
        with torch.no_grad():
            wrong = ~torch.isfinite(model.column_nats(x, condition, noise()))  # type: ignore[operator]
        if wrong.any():
            return [f"columns at fault: {_name_some([names[j] for j in wrong.any(0).nonzero().flatten().tolist()])}"]
    values = x.double()
    observed = torch.where(torch.isnan(values), 0.0, values)
    scale = observed.std(0, correction=0) if len(x) > 1 else torch.ones_like(observed[0])
    unusual = ((observed - observed.mean(0)).abs() / scale.clamp(min=1e-12))[examples]
    i, j = divmod(int(unusual.argmax()), len(names))
    return [f"the most unusual cell of these rows is {values[examples[i], j].item():g} in column {names[j]!r}"]


def _name_rows(rows: list[int], shown: int = 10) -> str:
    text = ", ".join(map(str, rows[:shown])) + (f", … ({len(rows)} rows)" if len(rows) > shown else "")
    return f"row {text}" if len(rows) == 1 else f"rows {text}"


def _name_some(names: list[str], shown: int = 4) -> str:
    return ", ".join(map(repr, names[:shown])) + (f" and {len(names) - shown} more" if len(names) > shown else "")
