"""The likelihood of a long text under a model of short ones, each symbol given what comes before it."""

from __future__ import annotations

import torch
from torch import Tensor

from likely.contract import Model, Tokens

#: Symbols that are evaluated at a time.
_AT_ONCE = 1 << 16


def running_nats(model: Model, text: Tensor, stride: int, condition: Tensor | None = None) -> Tensor:
    """log p of each symbol of a text in nats, given symbols before it, float64: shape ``(symbols,)``.

    Windows of the model's length L begin ``stride`` apart; of each only the symbols that no earlier one holds are
    counted.  So every symbol is predicted once and from earlier ones alone: all that the window before it holds, at
    least L − ``stride`` of them from the second window on.  Their sum is the log-likelihood of the text.

    Args:
        model: over tokens, autoregressive from left to right, with ``column_nats``.
        text: symbols, shape ``(symbols,)``, at least L of them.
        stride: from 1 (the most context) to L (chunks that know nothing of each other).
        condition: of the text, shape ``(1, *shape)``.

    Raises:
        ValueError: the model does not predict symbols from left to right, or the text is too short.

    >>> from likely.models.transformer import Transformer
    >>> model = Transformer(Tokens(4, 3), width=16, layers=1).eval()
    >>> running_nats(model, torch.tensor([0, 1, 2, 0, 1, 1]), stride=2).shape
    torch.Size([6])
    """
    space = model.space
    if not isinstance(space, Tokens) or not getattr(model, "causal", False):
        raise ValueError(f"model: expected one that predicts tokens from left to right, got {model.title()!r}")
    length = space.length
    if not 1 <= stride <= length:
        raise ValueError(f"stride: expected 1 to {length}, got {stride}")
    if text.dim() != 1 or len(text) < length:
        raise ValueError(f"text: expected at least {length} symbols in one row, got shape {tuple(text.shape)}")
    starts = [*range(0, len(text) - length, stride), len(text) - length]
    nats = torch.empty(len(text), dtype=torch.float64)
    done = 0
    size = max(1, _AT_ONCE // length)
    with torch.no_grad():
        for first in range(0, len(starts), size):
            some = starts[first : first + size]
            x = torch.stack([text[start : start + length] for start in some])
            own = None if condition is None else condition.expand(len(x), *condition.shape[1:])
            found = model.column_nats(x, own).double().cpu()  # type: ignore[operator]
            for start, row in zip(some, found):
                nats[done : start + length] = row[done - start :]
                done = start + length
    return nats
