"""The entropy coder: interleaved rANS over many lanes, in integer NumPy.

Asymmetric numeral systems (Duda 2013, arXiv:1311.2540) keep a message as one large number.  Coding a symbol that
occupies ``[start, start + freq)`` of the range ``[0, 2^P)`` replaces the number *h* by

    (h // freq) · 2^P + h mod freq + start,

which adds P − log2 freq bits; decoding looks at *h mod 2^P*, finds the symbol and undoes the step.  It is a stack:
the symbol coded last is decoded first, and decoding what was never coded yields samples, which is what bits-back
coding needs (Townsend, Bird & Barber 2019, arXiv:1901.04866).

Here the number is held by L *lanes* (Giesen 2014, arXiv:1402.3392), each with a head in [2^32, 2^64), above one common
stack of 32-bit words.  All lanes move at once, so that NumPy does the work.  Everything is integer arithmetic modulo
2^64: the byte stream is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from likely.coding.errors import Damaged
from likely.units import bits

Words: TypeAlias = NDArray[np.uint32]
Integers: TypeAlias = NDArray[np.int64]
Unsigned: TypeAlias = NDArray[np.uint64]

#: ``find(part, residues)``: part of the symbols at work (a slice), their residues in [0, 2^P) as uint64, in a buffer
#: that is overwritten later; returns the symbols, and the start and the freq of each.
Find: TypeAlias = Callable[[slice, Unsigned], tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]

#: ``place(part)``: start and freq of part of the symbols (a slice), uint64.
Place: TypeAlias = Callable[[slice], tuple[Unsigned, Unsigned]]

#: ``supply(start, stop)``: words number start … stop − 1 of an endless sequence.
Supply: TypeAlias = Callable[[int, int], Words]

#: Largest number of bits that the frequencies of one symbol may sum to.
MAX_PRECISION = 32

#: Symbols that are prepared at once: as many as a small processor's cache holds with their buffers.
_BLOCK = 8192

#: Low bits that pops stir, at least.
STIRRED = 24
#: Odd, hence invertible modulo 2^32, and its inverse.
STIR = 0x85EBCA6B
UNSTIR = pow(STIR, -1, 1 << 32)

_STIR, _UNSTIR, _16 = np.uint64(STIR), np.uint64(UNSTIR), np.uint64(16)
#: So many numbers below 2^64 have a product that a float64 holds.
_GROUP = 15
_ONE = np.uint64(1)
_32 = np.uint64(32)
_OPEN = np.uint64(1 << 32)
_LOW = np.uint64((1 << 32) - 1)


def initial_words(start: int, stop: int) -> Words:
    """Words number ``start`` … ``stop − 1`` of the fixed sequence that lies below every message.

    Word *i* is the upper half of output *i* of splitmix64 with seed 0 (Steele, Lea & Flood 2014).  An encoder that runs
    dry borrows from it, and a decoder that has read everything must be left with it.

    >>> [hex(word) for word in initial_words(0, 2)]
    ['0xe220a839', '0x6e789e6a']
    """
    with np.errstate(over="ignore"):
        x = np.arange(start + 1, stop + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return (x >> _32).astype(np.uint32)


class Stack:
    """A message under construction: push symbols on it, pop them off in reverse.

    >>> stack = Stack(lanes=2)
    >>> stack.push([0, 3, 3], [3, 1, 1], precision=2)          # P(0) = 3/4, P(1) = 1/4; the symbols 0, 1, 1
    >>> round(stack.bits, 3)
    4.415
    >>> def find(part, residues):
    ...     ones = residues >= 3
    ...     return ones, np.where(ones, 3, 0), np.where(ones, 1, 3)
    >>> copy = Stack.from_words(stack.to_words(), lanes=2)     # what a file would hold
    >>> copy.pop(3, 2, find)
    array([0, 1, 1])
    >>> copy.finish()                                          # nothing is left, nothing was damaged

    Args:
        lanes: how many symbols are coded at once.  Each lane is opened with one word.
        words: what lies on the stack, the last word on top (for instance random bits, to sample from).
        supply: where words come from when the stack runs dry.  The default makes an encoder; None makes a decoder,
            which raises :class:`Damaged` instead.

    Attributes:
        supply: as given.
        bits: ideal length in bits of what was pushed and not popped: the sum of P − log2 freq.  For reports only.
        supplied: number of words that came from ``supply``: what bits-back borrowed, one for each first lane included.
    """

    def __init__(self, lanes: int = 1, words: ArrayLike = (), supply: Supply | None = initial_words) -> None:
        self.bits = 0.0
        self.supplied = 0
        self._stirring = False
        self.supply = supply
        self._words: Words = np.array(words, dtype=np.uint32)
        self._top = len(self._words)
        self._heads: Unsigned = np.zeros(0, np.uint64)
        self.resize(lanes)

    # ---------------------------------------------------------------------------------------------------- symbols

    def push(self, start: ArrayLike, freq: ArrayLike, precision: int) -> None:
        """Code symbols that occupy ``[start, start + freq)`` of ``[0, 2^precision)``; :meth:`pop` gives them in order.

        Args:
            start: integers, shape ``(n,)``; symbol j goes to lane j mod L.
            freq: integers ≥ 1, of the same shape or broadcast to it.
            precision: 1 … 32.

        Raises:
            ValueError: a symbol has no room in the range.
        """
        starts = _unsigned(start, "start")
        if starts.ndim != 1:
            raise ValueError(f"start: expected shape (n,), got {starts.shape}")
        freqs = np.broadcast_to(_unsigned(freq, "freq"), starts.shape)
        self.push_by(len(starts), precision, lambda part: (starts[part], freqs[part]))

    def push_by(self, n: int, precision: int, place: Place) -> None:
        """As :meth:`push`, for ``n`` symbols whose ranges are computed where they are needed: see :data:`Place`."""
        _check_precision(precision)
        total, keep = np.uint64(1 << precision), np.uint64(64 - precision)
        for block in reversed(self._blocks(n)):
            s, f = place(block)
            others = total - f
            if f.min() < _ONE or f.max() > total or (s > others).any():
                raise ValueError(_no_room(s, f, precision, block.start))
            self.bits += len(s) * precision - _log2_of_product(f)
            most = f << keep  # the head may be as large without a word to emit; all of 2^64 becomes 2^64 - 1
            most -= _ONE
            for part in reversed(self._steps(len(s))):
                h, spare, flags = self._views(part)
                self._emit(h, np.greater(h, most[part], flags))
                np.floor_divide(h, f[part], spare)
                np.multiply(spare, others[part], spare)
                np.add(h, spare, h)
                np.add(h, s[part], h)
                if self._stirring:
                    self._stir(h, precision, _UNSTIR)

    def pop(self, n: int, precision: int, find: Find) -> Integers:
        """Decode ``n`` symbols; of random bits, draw them.

        Args:
            n: how many.
            precision: that of the push, 1 … 32.
            find: see :data:`Find`; must return, for whatever residues, symbols whose ranges hold them.

        Returns:
            the symbols, int64, shape ``(n,)``.

        Raises:
            Damaged: the message ended early.
        """
        _check_precision(precision)
        symbols, freqs = np.empty(n, np.int64), np.empty(min(n, _BLOCK + self.lanes), np.uint64)
        mask, shift = np.uint64((1 << precision) - 1), np.uint64(precision)
        for block in self._blocks(n):
            for step in self._steps(block.stop - block.start):
                h, residues, flags = self._views(step)
                if self._stirring:
                    self._stir(h, precision)
                np.bitwise_and(h, mask, residues)
                part = slice(block.start + step.start, block.start + step.stop)
                symbols[part], start, freq = find(part, residues)
                freqs[step] = f = _unsigned(freq, "freq")
                np.right_shift(h, shift, h)
                np.multiply(h, f, h)
                np.add(h, residues, h)
                np.subtract(h, _unsigned(start, "start"), h)
                self._refill(h, np.less(h, _OPEN, flags))
            size = block.stop - block.start
            self.bits -= size * precision - _log2_of_product(freqs[:size])
        return symbols

    def pop_binary(self, n: int, precision: int, zeros: Callable[[slice], Unsigned]) -> NDArray[np.bool_]:
        """Decode ``n`` symbols 0 and 1, of which 0 starts at 0: what :meth:`pop` does, in fewer passes.

        Args:
            n: how many.
            precision: that of the push, 1 … 32.
            zeros: the freq of symbol 0 for part of the symbols (a slice), uint64 from 1 to 2^P − 1.

        Returns:
            which symbols are 1, shape ``(n,)``.

        Raises:
            Damaged: the message ended early.
        """
        _check_precision(precision)
        symbols = np.empty(n, bool)
        mask, shift, total = np.uint64((1 << precision) - 1), np.uint64(precision), np.uint64(1 << precision)
        rests = np.empty(self.lanes, np.uint64)
        for block in self._blocks(n):
            freqs, found = zeros(block), symbols[block]
            for step in self._steps(block.stop - block.start):
                h, whole, flags = self._views(step)
                if self._stirring:
                    self._stir(h, precision)
                freq, rest, zero = freqs[step], rests[: len(h)], found[step]
                # h = q 2^P + r becomes q f + r for a 0 (r < f), and q (2^P − f) + r − f = h − q f − f for a 1.
                np.bitwise_and(h, mask, rest)
                np.right_shift(h, shift, whole)
                np.less(rest, freq, zero)
                np.multiply(whole, freq, whole)
                np.add(rest, whole, rest)
                np.subtract(h, whole, h)
                np.subtract(h, freq, h)
                np.copyto(h, rest, where=zero)
                self._refill(h, np.less(h, _OPEN, flags))
            self.bits -= len(found) * precision - _log2_of_product(np.where(found, freqs, total - freqs))
            np.logical_not(found, found)
        return symbols

    # ------------------------------------------------------------------------------------------------ whole numbers

    def push_uniform(self, values: ArrayLike, sizes: ArrayLike) -> None:
        """Code numbers in ``[0, size)``, all equally likely: log2 size bits each, for every size from 1 to 2^32.

        The range need not be a power of two: the number *h* becomes h · size + value, with the head kept in the
        interval [k · size, 2^32 · k · size), k = ⌊2^32 / size⌋, on which that step is reversible to the bit.

        Args:
            values: integers, shape ``(n,)``.
            sizes: integers, of the same shape or broadcast to it.

        Raises:
            ValueError: a size is not in [1, 2^32] or a value not in [0, size).
        """
        numbers = _unsigned(values, "values")
        if numbers.ndim != 1 or np.shape(sizes) not in ((), numbers.shape):
            raise ValueError(f"values and sizes: expected shape (n,) each, got {numbers.shape} and {np.shape(sizes)}")
        for block in reversed(self._blocks(len(numbers))):
            v = numbers[block]
            r, k = _sizes(sizes, block)
            if (v >= r).any():
                at = int(np.flatnonzero(v >= r)[0])
                got = f"got {v[at].astype(np.int64)} at {block.start + at}"
                raise ValueError(f"values: expected 0 … {r[at] - _ONE}, {got}")
            self.bits += _log2_of_product(r)
            for part in reversed(self._steps(len(v))):
                h, spare, flags = self._views(part)
                np.right_shift(h, _32, out=spare)
                self._emit(h, np.greater_equal(spare, k[part], out=flags))
                h *= r[part]
                h += v[part]
                self._refill(h, np.less(h, _OPEN, out=flags))
                if self._stirring:
                    self._stir(h, multiplier=_UNSTIR)

    def pop_uniform(self, sizes: ArrayLike, n: int | None = None) -> Integers:
        """Decode what :meth:`push_uniform` coded.

        Args:
            sizes: integers in [1, 2^32], shape ``(n,)``; or one number.
            n: how many; may be left out where ``sizes`` has a shape.

        Returns:
            int64, shape ``(n,)``.
        """
        shape = np.shape(sizes)
        n = shape[0] if n is None and len(shape) == 1 else n
        if n is None or shape not in ((), (n,)):
            raise ValueError(f"sizes: expected one number and n, or shape (n,), got shape {shape} and n = {n}")
        values = np.empty(n, np.int64)
        for block in self._blocks(n):
            r, k = _sizes(sizes, block)
            most, v = k * r, values[block]
            for part in self._steps(block.stop - block.start):
                h, spare, flags = self._views(part)
                if self._stirring:
                    self._stir(h)
                np.right_shift(h, _32, out=spare)
                self._emit(h, np.greater_equal(spare, most[part], out=flags))
                np.floor_divide(h, r[part], out=spare)
                h -= spare * r[part]
                v[part] = h
                h[:] = spare
                self._refill(h, np.less(h, _OPEN, out=flags))
            self.bits -= _log2_of_product(r)
        return values

    # -------------------------------------------------------------------------------------------------------- lanes

    @property
    def lanes(self) -> int:
        """How many symbols are coded at once."""
        return len(self._heads)

    def _blocks(self, n: int) -> list[slice]:
        """Cut ``n`` symbols into pieces that fit a processor's cache: whole steps, but for the last."""
        size = self.lanes * max(1, _BLOCK // self.lanes)
        return [slice(first, min(first + size, n)) for first in range(0, n, size)]

    def _steps(self, n: int) -> list[slice]:
        """Cut the ``n`` symbols of a block into steps: one symbol a lane."""
        lanes = self.lanes
        return [slice(first, min(first + lanes, n)) for first in range(0, n, lanes)]

    def _views(self, step: slice) -> tuple[Unsigned, Unsigned, NDArray[np.bool_]]:
        """The heads that take part in a step, and two buffers of their size."""
        size = step.stop - step.start
        if size == len(self._heads):
            return self._heads, self._spare, self._flags
        return self._heads[:size], self._spare[:size], self._flags[:size]

    def resize(self, lanes: int) -> None:
        """Open lanes with words taken from the stack, or close them and return the words.

        A word w becomes the head 2^32 + w: opening a lane costs 0.5 bits and not a whole new head.

        Raises:
            Damaged: a lane to be closed is not as it was when opened.
        """
        if lanes < 1:
            raise ValueError(f"lanes: expected at least 1, got {lanes}")
        self._set_lanes(lanes)

    def _set_lanes(self, lanes: int) -> None:
        if lanes > self.lanes:
            opened = self._take(lanes - self.lanes).astype(np.uint64) | _OPEN
            self._heads = np.concatenate([self._heads, opened])
        else:
            closed = self._heads[lanes:]
            if (closed >> _32 != _ONE).any():
                raise Damaged("a lane of the coder does not end as it began")
            self._put(closed)
            self._heads = self._heads[:lanes].copy()
        self._spare = np.empty_like(self._heads)
        self._flags = np.empty(self.lanes, bool)

    # ----------------------------------------------------------------------------------------------------- fair draws

    @contextmanager
    def stirred(self) -> Iterator[None]:
        """Within this, pops draw from fair bits, and pushes undo such pops.

        What was pushed last is fair only if it followed the law that it was coded by: a symbol's place in its range is
        the residue that the next pop looks at.  Where pops are meant to draw (bits-back), the low bits of every head
        first go through a one-to-one function that makes any pattern look random: 24 of them, or P if that is more.
        (Not all 32: a head's law is 1/h, and to spread its upper bits evenly costs 0.0024 bits a symbol.)
        """
        before, self._stirring = self._stirring, True
        try:
            yield
        finally:
            self._stirring = before

    @staticmethod
    def _stir(heads: Unsigned, precision: int = 0, multiplier: np.uint64 = _STIR) -> None:
        mask = np.uint64((1 << max(precision, STIRRED)) - 1)
        low = heads & mask
        heads ^= low
        low ^= low >> _16
        low *= multiplier
        low &= mask
        low ^= low >> _16
        heads |= low

    # -------------------------------------------------------------------------------------------------------- words

    @property
    def size_bits(self) -> float:
        """Information held in all, in bits: 32 for each word and log2 of each head."""
        return 32.0 * self._top + _log2_of_product(self._heads)

    def to_words(self) -> Words:
        """The message as it is stored: words, then heads without their leading zeros (5 bits for each length).

        Layout, last word on top: the stack; the low half of every head; the high halves without leading one, each in
        as many bits as it has, from the most significant; the number of these bits, 5 bits a lane.  Each group is
        filled with zeros to a whole word.
        """
        high = self._heads >> _32
        lengths = np.zeros(self.lanes, np.int64)
        for step in (16, 8, 4, 2, 1):
            lengths += step * (high >> (lengths + step).astype(np.uint64) > 0)
        columns = np.arange(31)
        shifts = lengths[:, None] - 1 - columns
        bits = (high[:, None] >> np.maximum(shifts, 0).astype(np.uint64)) & _ONE
        fives = (lengths[:, None] >> np.arange(4, -1, -1)) & 1
        tail = [self._heads.astype(np.uint32), _pack(bits[shifts >= 0]), _pack(fives.ravel())]
        return np.concatenate([self._words[: self._top], *tail])

    @classmethod
    def from_words(cls, words: ArrayLike, lanes: int, supply: Supply | None = None) -> Stack:
        """The stack that :meth:`to_words` wrote.

        Args:
            words: uint32, shape ``(n,)``.
            lanes: the number of lanes it had.

        Raises:
            Damaged: the words are no such message.
        """
        given = np.asarray(words, dtype=np.uint32)
        if lanes < 1:
            raise Damaged(f"expected at least 1 lane, got {lanes}")
        rest, fives = _split(given, 5 * lanes)
        lengths = fives.reshape(lanes, 5) @ (1 << np.arange(4, -1, -1))
        rest, bits = _split(rest, int(lengths.sum()))
        if len(rest) < lanes:
            raise Damaged(f"expected at least {lanes} words for the heads of the coder, got {len(rest)}")
        shifts = lengths[:, None] - 1 - np.arange(31)
        table = np.zeros(shifts.shape, np.int64)
        table[shifts >= 0] = bits
        high = (1 << lengths) + (table << np.maximum(shifts, 0)).sum(1)
        heads = high.astype(np.uint64) << _32 | rest[-lanes:].astype(np.uint64)
        return cls.from_state(heads, rest[:-lanes], supply)

    def state(self) -> tuple[Unsigned, Words]:
        """Heads and words, as they are; copies."""
        return self._heads.copy(), self._words[: self._top].copy()

    @classmethod
    def from_state(
        cls, heads: Unsigned, words: Words, supply: Supply | None = None, *, supplied: int = 0, bits: float = 0.0
    ) -> Stack:
        """The stack with this :meth:`state`."""
        stack = cls.__new__(cls)
        stack.bits, stack.supplied, stack.supply = bits, supplied, supply
        stack._stirring = False
        stack._words, stack._top = words.copy(), len(words)
        stack._heads = heads.copy()
        stack._spare, stack._flags = np.empty_like(heads), np.empty(len(heads), bool)
        return stack

    def finish(self) -> None:
        """Check that everything was popped: what is left must be what every message starts on.

        Raises:
            Damaged: it is not.
        """
        self._set_lanes(0)
        if not np.array_equal(self._words[: self._top][::-1], initial_words(0, self._top)):
            raise Damaged("the decoded message does not end where it should")

    def _emit(self, heads: Unsigned, flags: NDArray[np.bool_]) -> None:
        """Move the low word of the flagged heads to the stack."""
        index = flags.nonzero()[0]
        if len(index):
            full = heads[index]
            self._put(full)
            heads[index] = full >> _32

    def _refill(self, heads: Unsigned, flags: NDArray[np.bool_]) -> None:
        """Undo :meth:`_emit`."""
        index = flags.nonzero()[0]
        if len(index):
            heads[index] = heads[index] << _32 | self._take(len(index))

    def _put(self, values: Unsigned) -> None:
        """Push the low words of ``values``."""
        end = self._top + len(values)
        if end > len(self._words):
            larger = np.empty(max(1024, 2 * end), np.uint32)
            larger[: self._top] = self._words[: self._top]
            self._words = larger
        self._words[self._top : end] = values  # keeps the low half
        self._top = end

    def _take(self, n: int) -> Words:
        """Pop ``n`` words; they are a view, valid until the next push."""
        short = n - self._top
        if short > 0:
            if self.supply is None:
                raise Damaged(f"the message ends early: expected {n} more words, got {self._top}")
            fresh = self.supply(self.supplied, self.supplied + short)[::-1]
            self._words = np.concatenate([fresh, self._words[: self._top]])
            self._top, self.supplied = n, self.supplied + short
        self._top -= n
        return self._words[self._top : self._top + n]


def _log2_of_product(values: Unsigned) -> float:
    """Σ log2, for reports; products of a few need one logarithm."""
    groups = len(values) // _GROUP
    head = np.multiply.reduce(values[: groups * _GROUP].reshape(_GROUP, groups).astype(np.float64), 0)
    return bits(float(np.log(head).sum() + np.log(values[groups * _GROUP :].astype(np.float64)).sum()))


def _unsigned(values: ArrayLike, name: str) -> Unsigned:
    array = np.asarray(values)
    if array.dtype == np.uint64:
        return array
    if array.dtype == np.int64:
        return array.view(np.uint64)  # negative numbers become huge ones, which every check refuses
    if array.dtype == np.bool_ or np.issubdtype(array.dtype, np.integer):
        return array.astype(np.int64).view(np.uint64)
    if array.size == 0:
        return array.astype(np.uint64)
    raise ValueError(f"{name}: expected integers, got {array.dtype}")


def _sizes(sizes: ArrayLike, part: slice) -> tuple[Unsigned, Unsigned]:
    """A part of the sizes of uniform numbers, and ⌊2^32 / size⌋; one size for all is divided by faster."""
    r = _unsigned(sizes, "sizes")
    one = r.ndim == 0
    r = r.reshape(1) if one else r[part]
    if r.size and (r.min() < _ONE or r.max() > _OPEN):
        wrong = r[int(np.flatnonzero((r < _ONE) | (r > _OPEN))[0])]
        raise ValueError(f"sizes: expected 1 … 2^32, got {wrong.astype(np.int64)}")
    k = _OPEN // r
    shape = (part.stop - part.start,)
    return (np.broadcast_to(r, shape), np.broadcast_to(k, shape)) if one else (r, k)


def _check_precision(precision: int) -> None:
    if not 1 <= precision <= MAX_PRECISION:
        raise ValueError(f"precision: expected 1 … {MAX_PRECISION}, got {precision}")


def _no_room(starts: Unsigned, freqs: Unsigned, precision: int, first: int) -> str:
    total = np.uint64(1 << precision)
    at = int(np.flatnonzero((freqs < _ONE) | (freqs > total) | (starts > total - freqs))[0])
    got = f"start {starts[at].astype(np.int64)} and freq {freqs[at].astype(np.int64)} at {first + at}"
    return f"expected freq >= 1 and 0 <= start <= {total} - freq, got {got}"


def _pack(bits: NDArray[Any]) -> Words:
    packed = np.packbits(np.concatenate([bits, np.zeros(-len(bits) % 32, bits.dtype)]).astype(np.uint8))
    return packed.view("<u4").astype(np.uint32)


def _split(words: Words, n_bits: int) -> tuple[Words, Integers]:
    """Take ``n_bits`` that :func:`_pack` wrote from the end of ``words``."""
    count = math.ceil(n_bits / 32)
    if count > len(words):
        raise Damaged(f"expected at least {count} words for the heads of the coder, got {len(words)}")
    rest, packed = words[: len(words) - count], words[len(words) - count :]
    bits = np.unpackbits(packed.astype("<u4").view(np.uint8)).astype(np.int64)
    if bits[n_bits:].any():
        raise Damaged("the heads of the coder are followed by more than zeros")
    return rest, bits[:n_bits]
