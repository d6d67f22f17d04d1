"""Autoregressive coding: p(x) = ∏ p(x_t | x_<t), one conditional after another, all rows side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from likely.coding.codec import Codec
from likely.coding.stack import Integers, Stack

#: ``step(t, prefix)``: the codec of x_t, shape ``(n, *rest)``, given ``prefix`` = x_<t, int64, shape ``(n, t, *rest)``.
#: It is called once for each t in order, so that it may keep a cache; ``prefix`` is overwritten later.
Conditional: TypeAlias = Callable[[int, Integers], Codec]

#: ``parallel(x)``: the codecs of all x_t at once (or a lazy sequence of them).
Parallel: TypeAlias = Callable[[Integers], Sequence[Codec]]


class Autoregressive:
    """The codec of sequences, shape ``(n, length, *rest)``: no initial bits, cost −∑ log2 p(x_t | x_<t).

    Decoding takes one step after another; the encoder knows all prefixes and may take them in one parallel pass.  Both
    must give the same conditionals to the bit: ``likely.exact`` sees to that.

    >>> from likely.coding.codec import Uniform
    >>> at_most_the_last = Autoregressive((2, 3), lambda t, x: Uniform((2,), 9 if t == 0 else x[:, t - 1] + 1))
    >>> stack = Stack()
    >>> at_most_the_last.push(stack, [[8, 5, 5], [3, 1, 0]])
    >>> at_most_the_last.pop(stack)
    array([[8, 5, 5],
           [3, 1, 0]])

    Args:
        shape: of the symbols, ``(n, length, *rest)``.
        step: the conditionals, for decoding.
        parallel: the conditionals, for encoding; by default ``step`` is used.
    """

    def __init__(self, shape: Sequence[int], step: Conditional, parallel: Parallel | None = None) -> None:
        if len(shape) < 2:
            raise ValueError(f"shape: expected (n, length, ...), got {tuple(shape)}")
        self.shape, self.step, self.parallel = tuple(shape), step, parallel

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        x = np.asarray(symbols, dtype=np.int64)
        if x.shape != self.shape:
            raise ValueError(f"symbols: expected shape {self.shape}, got {x.shape}")
        length = self.shape[1]
        codecs = self.parallel(x) if self.parallel else [self.step(t, x[:, :t]) for t in range(length)]
        for t in reversed(range(length)):
            codecs[t].push(stack, x[:, t])

    def pop(self, stack: Stack) -> Integers:
        x = np.zeros(self.shape, np.int64)
        for t in range(self.shape[1]):
            x[:, t] = self.step(t, x[:, :t]).pop(stack)
        return x
