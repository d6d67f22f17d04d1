"""An n-gram model of bytes with interpolated modified Kneser–Ney smoothing: the rival of a language model's likelihood.

    p_k(w | h) = (c(hw) − D(c(hw)))⁺ / c(h) + γ(h) p_{k−1}(w | h'),    γ(h) = Σ_w min(D(c(hw)), c(hw)) / c(h)

(Chen & Goodman 1999, Computer Speech & Language 13, 359, section 3; Kneser & Ney 1995.)  h are the k − 1 bytes before w,
h' is h without its first.  At the highest order c counts occurrences; below it, the different bytes that come before.
The discounts D₁, D₂, D₃₊ of each order are those of Ney, Essen & Kneser from the counts of counts.  Below the unigrams
lies the uniform law, so that every byte has a probability.  Where h was never seen, p_k is p_{k−1}.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.int64]
Floats = NDArray[np.float64]

_BYTES = 256
#: The least discount, so that every context leaves something to bytes that were never seen in it.
_LEAST = 0.05


@dataclass(frozen=True)
class _Order:
    """The grams of one length, as sorted numbers to base 256, with what is left of their count and share it by."""

    grams: Codes
    discounted: Floats
    contexts: Codes
    totals: Floats
    gamma: Floats


class KneserNey:
    """Fitted to a text; ``log_prob`` gives the nats of every byte of another.

    >>> model = KneserNey(b"abracadabra" * 20, order=3)
    >>> bool(abs(np.exp(model.log_probs(b"ab")).sum() - 1.0) < 1e-12)
    True

    Args:
        text: to learn from.
        order: bytes of a gram, the predicted one included; 1 to 7.
    """

    def __init__(self, text: bytes, order: int = 5) -> None:
        if not 1 <= order <= 7:
            raise ValueError(f"order: expected 1 to 7, got {order}")
        if len(text) < order:
            raise ValueError(f"text: expected at least {order} bytes, got {len(text)}")
        codes = np.frombuffer(text, np.uint8).astype(np.int64)
        self.order = order
        self._orders: list[_Order] = []
        longer: Codes | None = None
        for length in range(order, 0, -1):
            if longer is None:
                grams, counts = np.unique(_windows(codes, length), return_counts=True)
            else:  # the different bytes before a gram are the different grams that are longer by one
                grams, counts = np.unique(longer % _BYTES**length, return_counts=True)
            self._orders.insert(0, _discounted(grams, counts))
            longer = grams

    def log_prob(self, text: bytes, before: bytes = b"") -> Floats:
        """log p of each byte in nats, given those before it in the text and in ``before``."""
        codes = np.frombuffer(before[len(before) - self.order + 1 :] + text, np.uint8).astype(np.int64)
        start = len(codes) - len(text)
        p = np.full(len(text), 1.0 / _BYTES)
        for length, order in enumerate(self._orders, start=1):
            first = max(start, length - 1)  # bytes that have so many before them
            grams = _windows(codes, length)[first - length + 1 :]
            p[first - start :] = _interpolated(order, grams, p[first - start :])
        return np.log(p)

    def log_probs(self, context: bytes) -> Floats:
        """log p of every byte after ``context``, nats: shape ``(256,)``."""
        p = np.full(_BYTES, 1.0 / _BYTES)
        every = np.arange(_BYTES, dtype=np.int64)
        for length, order in enumerate(self._orders, start=1):
            if len(context) < length - 1:
                break
            before = int.from_bytes(context[len(context) - length + 1 :], "big") if length > 1 else 0
            p = _interpolated(order, before * _BYTES + every, p)
        return np.log(p)


def _windows(codes: Codes, length: int) -> Codes:
    """All grams of a length as numbers to base 256, in the order of their ends."""
    count = max(len(codes) - length + 1, 0)
    grams = np.zeros(count, np.int64)
    for i in range(length):
        grams = grams * _BYTES + codes[i : i + count]
    return grams


def _discounted(grams: Codes, counts: Codes) -> _Order:
    """Counts less their discounts, and the weight of the shorter grams in each context."""
    n1, n2, n3, n4 = (int((counts == i).sum()) for i in (1, 2, 3, 4))
    y = n1 / (n1 + 2 * n2) if n1 else 0.5
    discounts = np.zeros(4)
    for i, (fewer, more) in enumerate(((n1, n2), (n2, n3), (n3, n4)), start=1):
        discounts[i] = np.clip(i - (i + 1) * y * more / fewer, _LEAST, i) if fewer else y
    taken = np.minimum(discounts[np.minimum(counts, 3)], counts)
    contexts, of = np.unique(grams // _BYTES, return_inverse=True)
    totals = np.bincount(of, counts).astype(np.float64)
    return _Order(grams, counts - taken, contexts, totals, np.bincount(of, taken) / totals)


def _interpolated(order: _Order, grams: Codes, shorter: Floats) -> Floats:
    """p_k of grams, from p_{k−1} of the same."""
    at, seen = _found(order.contexts, grams // _BYTES)
    place, there = _found(order.grams, grams)
    p = np.where(there, order.discounted[place], 0.0) / order.totals[at] + order.gamma[at] * shorter
    return np.where(seen, p, shorter)


def _found(sorted_keys: Codes, keys: Codes) -> tuple[Codes, NDArray[np.bool_]]:
    """Where each key stands among the sorted ones, and whether it does."""
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return place, sorted_keys[place] == keys
