"""Codecs: pairs of push and pop that compose as models do.

A codec knows its parameters when it is made.  ``push(stack, symbols)`` costs −log2 p(symbols) bits, ``pop(stack)``
gives the symbols back, and popping from random bits draws a sample.  Every push must undo the pop of the same codec
to the bit, and the other way round: a composed codec therefore pushes its parts in the reverse of the order in which it
pops them (Townsend, Bird, Kunze & Barber 2020, arXiv:1912.09953).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from likely.coding.stack import Integers, Stack

#: What codecs carry: an int64 array, or a tuple of such things.
Symbols: TypeAlias = Any


@runtime_checkable
class Codec(Protocol):
    """A law with its parameters, as a pair of push and pop.

    ``symbols`` are int64 codes in the codec's own shape.  ``push`` raises ``ValueError`` for symbols that the law
    cannot have; ``pop`` accepts any bits.
    """

    def push(self, stack: Stack, symbols: Symbols) -> None:
        """Code ``symbols``, at −log2 p(symbols) bits."""
        ...

    def pop(self, stack: Stack) -> Symbols:
        """Decode what was pushed last; from random bits, draw it."""
        ...


class ModelCodec(Protocol):
    """What ``Model.codec()`` returns: the codec of batches of examples of a trained model.

    Attributes:
        initial: whether it pops before it pushes (bits-back), so that the first examples need borrowed bits.
        networks: the reproducible networks by name, for the probes of the file.
    """

    @property
    def initial(self) -> bool: ...

    @property
    def networks(self) -> Mapping[str, Any]: ...

    def push(self, stack: Stack, x: Any, condition: Any | None = None) -> None:
        """Code a batch ``(n, *shape)`` of the space; NaN marks absent cells, which cost nothing."""
        ...

    def pop(self, stack: Stack, n: int, condition: Any | None = None, present: Any | None = None) -> Any:
        """Decode a batch of ``n`` examples; ``present``, a bool mask ``(n, *shape)``, says which cells are there."""
        ...

    def legal(self, x: Any) -> Any:
        """Which cells of a batch the model can code: a bool mask ``(n, *shape)``."""
        ...


class Uniform:
    """Numbers in ``[0, size)``, all equally likely: log2 size bits each, to the last fraction.

    >>> stack = Stack()
    >>> Uniform((2, 2), 1000).push(stack, [[1, 2], [999, 0]])
    >>> Uniform((2, 2), 1000).pop(stack)
    array([[  1,   2],
           [999,   0]])

    Args:
        shape: shape of the symbols.
        sizes: one number, or an array of that shape; 1 … 2^32.
    """

    def __init__(self, shape: Sequence[int], sizes: ArrayLike) -> None:
        self.shape = tuple(shape)
        given = np.asarray(sizes)
        self._sizes = given if given.ndim == 0 else np.broadcast_to(given, self.shape).reshape(-1)

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        stack.push_uniform(flat(symbols, self.shape), self._sizes)

    def pop(self, stack: Stack) -> Integers:
        return stack.pop_uniform(self._sizes, math.prod(self.shape)).reshape(self.shape)


class Product:
    """Independent parts, coded one after another; the symbols are a tuple with one entry a part.

    >>> stack = Stack()
    >>> pair = Product([Uniform((1,), 3), Uniform((2,), 5)])
    >>> pair.push(stack, ([2], [4, 0]))
    >>> pair.pop(stack)
    (array([2]), array([4, 0]))
    """

    def __init__(self, codecs: Sequence[Codec]) -> None:
        self.codecs = tuple(codecs)

    def push(self, stack: Stack, symbols: Sequence[Symbols]) -> None:
        for codec, part in reversed(list(zip(self.codecs, symbols, strict=True))):
            codec.push(stack, part)

    def pop(self, stack: Stack) -> tuple[Symbols, ...]:
        return tuple([codec.pop(stack) for codec in self.codecs])


class Chain:
    """A part, and a part that depends on it: p(a) p(b | a); the symbols are the pair ``(a, b)``.

    >>> pair = Chain(Uniform((1,), 6), lambda a: Uniform((1,), a + 1))     # a die, then a number up to it
    >>> stack = Stack()
    >>> pair.push(stack, (np.array([4]), np.array([3])))
    >>> pair.pop(stack)
    (array([4]), array([3]))
    """

    def __init__(self, first: Codec, then: Callable[[Symbols], Codec]) -> None:
        self.first, self.then = first, then

    def push(self, stack: Stack, symbols: tuple[Symbols, Symbols]) -> None:
        a, b = symbols
        self.then(a).push(stack, b)
        self.first.push(stack, a)

    def pop(self, stack: Stack) -> tuple[Symbols, Symbols]:
        a = self.first.pop(stack)
        return a, self.then(a).pop(stack)


class Mapped:
    """A codec in other words: symbols are translated on the way in and back on the way out.

    Args:
        codec: codes ``to_codec(symbols)``.
        to_codec: a one-to-one map.
        from_codec: its inverse.

    >>> even = Mapped(Uniform((2,), 4), lambda x: np.asarray(x) // 2, lambda y: 2 * y)
    >>> stack = Stack()
    >>> even.push(stack, [6, 2])
    >>> even.pop(stack)
    array([6, 2])
    """

    def __init__(
        self, codec: Codec, to_codec: Callable[[Symbols], Symbols], from_codec: Callable[[Symbols], Symbols]
    ) -> None:
        self.codec, self.to_codec, self.from_codec = codec, to_codec, from_codec

    def push(self, stack: Stack, symbols: Symbols) -> None:
        self.codec.push(stack, self.to_codec(symbols))

    def pop(self, stack: Stack) -> Symbols:
        return self.from_codec(self.codec.pop(stack))


class Columns:
    """Independent parts side by side in one array: part j takes the next ``widths[j]`` entries of the last axis.

    >>> row = Columns([Uniform((2, 1), 10), Uniform((2, 2), 3)], [1, 2])
    >>> stack = Stack()
    >>> row.push(stack, [[9, 0, 2], [4, 1, 1]])
    >>> row.pop(stack)
    array([[9, 0, 2],
           [4, 1, 1]])
    """

    def __init__(self, codecs: Sequence[Codec], widths: Sequence[int]) -> None:
        if len(codecs) != len(widths):
            raise ValueError(f"widths: expected one for each of {len(codecs)} codecs, got {len(widths)}")
        self._parts = Product(codecs)
        self._cuts = [sum(widths[: j + 1]) for j in range(len(widths) - 1)]
        self._width = sum(widths)

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        array = np.asarray(symbols)
        if array.shape[-1] != self._width:
            raise ValueError(f"symbols: expected {self._width} entries on the last axis, got {array.shape[-1]}")
        self._parts.push(stack, np.split(array, self._cuts, axis=-1))

    def pop(self, stack: Stack) -> Integers:
        return np.concatenate(self._parts.pop(stack), axis=-1)


def flat(symbols: ArrayLike, shape: Sequence[int]) -> NDArray[Any]:
    """The symbols as one row, after a check of their shape."""
    array = np.asarray(symbols)
    if array.shape != tuple(shape):
        raise ValueError(f"symbols: expected shape {tuple(shape)}, got {array.shape}")
    return array.reshape(-1)
