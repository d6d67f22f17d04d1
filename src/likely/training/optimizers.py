"""Optimisers by name: those of :mod:`likely.optim`, and PyTorch's own."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from likely.optim import SOAP, Adam, AdaMax, AdamW, Muon, NAdam, Shampoo, UpdateRule

OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adam": Adam,
    "adamw": AdamW,
    "adamax": AdaMax,
    "nadam": NAdam,
    "shampoo": Shampoo,
    "soap": SOAP,
    "muon": Muon,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
    "sgd": torch.optim.SGD,
}

#: Makes an optimiser of the parameter groups it is given.
MakeOptimizer = Callable[[Iterable[dict[str, Any]]], Optimizer]


def make_optimizer(
    name: str, model: nn.Module, learning_rate: float, weight_decay: float = 0.0, **options: Any
) -> Optimizer:
    """The optimiser ``name`` over the trainable parameters of ``model``, in one kernel where PyTorch has one.

    Weight decay is applied to matrices and larger tensors; vectors and scalars (biases, gains) are left alone.

    Raises:
        ValueError: no such optimiser, or it has no such option.

    >>> type(make_optimizer("adamw", nn.Linear(2, 2), 1e-3)).__name__
    'AdamW'
    """
    if name not in OPTIMIZERS:
        near = difflib.get_close_matches(name, OPTIMIZERS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {name!r}{hint}")
    kind = OPTIMIZERS[name]
    accepted = inspect.signature(kind.__init__).parameters
    for option in options:
        if option not in accepted:
            raise ValueError(f"optimizer_options: optimizer {name!r} has no option {option!r}")
    if "fused" in accepted and "fused" not in options and not issubclass(kind, UpdateRule) and _fusible(model):
        options["fused"] = True
    return kind(parameter_groups(model, weight_decay), lr=learning_rate, **options)  # type: ignore[call-arg]


def without_momentum(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of an optimiser that runs schedule-free, which brings a momentum of its own: β₁ = 0 unless one is given.

    >>> without_momentum("adamw", {})
    {'betas': (0.0, 0.999)}
    """
    parameters = inspect.signature(OPTIMIZERS[name].__init__).parameters if name in OPTIMIZERS else {}
    if "betas" not in parameters or "betas" in options:
        return dict(options)
    return {**options, "betas": (0.0, parameters["betas"].default[1])}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters: one group, or two (with and without decay) where there is weight decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not weight_decay:
        return [{"params": parameters, "weight_decay": 0.0}]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _fusible(model: nn.Module) -> bool:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda", "mps") for p in parameters)
