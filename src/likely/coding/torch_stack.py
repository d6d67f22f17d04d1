"""The entropy coder of ``stack.py`` on tensors, for a model that decodes on a GPU: the same symbols, the same bytes.

PyTorch has no unsigned 64-bit arithmetic to speak of, so a head is the int64 with the same bits: sums, products and
left shifts agree modulo 2^64, right shifts are masked, and a division takes half the head first.  No step asks the
device for a number: the top of the stack is itself a tensor, words move to and from places that a running count of the
flagged lanes gives, and the host only keeps bounds of the top, so that it looks at it when the buffer may end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from likely.coding.errors import Damaged
from likely.coding.stack import MAX_PRECISION, STIR, STIRRED, UNSTIR, Stack, Supply, Words, initial_words
from likely.units import bits

#: As ``stack.Find``, on tensors: residues are int64 in [0, 2^P).
TorchFind: TypeAlias = Callable[[slice, Tensor], tuple[Tensor, Tensor, Tensor]]

_LOW = (1 << 32) - 1
#: Words that an encoder puts in reserve, and places that are made, at a time.
_ROOM = 1 << 16


class TorchStack:
    """The same stack as :class:`likely.coding.stack.Stack`, whose words it reads and writes; see there.

    >>> stack = TorchStack(lanes=2)
    >>> stack.push_uniform(torch.tensor([3, 1, 4]), 10)
    >>> Stack.from_words(stack.to_words(), lanes=2).pop_uniform(10, 3)
    array([3, 1, 4])

    Args:
        lanes: how many symbols are coded at once; a GPU wants thousands.
        words: what lies on the stack, the last word on top.
        supply: where words come from when the stack runs dry; None for a decoder.
        device: where heads and words live.
    """

    def __init__(
        self,
        lanes: int = 1,
        words: ArrayLike = (),
        supply: Supply | None = initial_words,
        device: torch.device | str = "cpu",
    ) -> None:
        self.device = torch.device(device)
        self._stirring = False
        self._load(Stack(lanes, words, supply))

    @classmethod
    def from_words(
        cls, words: ArrayLike, lanes: int, supply: Supply | None = None, device: torch.device | str = "cpu"
    ) -> TorchStack:
        """The stack that :meth:`to_words` wrote, here or in NumPy."""
        stack = cls.__new__(cls)
        stack.device = torch.device(device)
        stack._stirring = False
        stack._load(Stack.from_words(words, lanes, supply))
        return stack

    # ---------------------------------------------------------------------------------------------------- symbols

    def push(self, start: Tensor | ArrayLike, freq: Tensor | ArrayLike, precision: int) -> None:
        """Code symbols that occupy ``[start, start + freq)`` of ``[0, 2^precision)``: int64, shape ``(n,)``."""
        s = self._tensor(start, "start")
        f = self._tensor(freq, "freq").expand(s.shape)
        _check_precision(precision)
        total = 1 << precision
        if bool(((f < 1) | (s < 0) | (s > total - f)).any()):
            raise ValueError(f"expected freq >= 1 and 0 <= start <= {total} - freq for every symbol")
        others = total - f
        for part in reversed(self._steps(len(s))):
            h = self._heads[: part.stop - part.start]
            self._emit(h, _shift_right(h, 64 - precision) >= f[part])
            h += _divide(h, f[part]) * others[part] + s[part]
            if self._stirring:
                _stir(h, UNSTIR, precision)
        self._bits += len(s) * precision - bits(f.double().log().sum())

    def pop(self, n: int, precision: int, find: TorchFind) -> Tensor:
        """Decode ``n`` symbols: int64, shape ``(n,)``."""
        _check_precision(precision)
        symbols = torch.empty(n, dtype=torch.int64, device=self.device)
        for part in self._steps(n):
            h = self._heads[: part.stop - part.start]
            if self._stirring:
                _stir(h, STIR, precision)
            residues = h & ((1 << precision) - 1)
            symbols[part], start, freq = find(part, residues)
            h[:] = _shift_right(h, precision) * freq + (residues - start)
            self._refill(h, _shift_right(h, 32) == 0)
            self._bits -= len(h) * precision - bits(freq.double().log().sum())
        self._check_dry()
        return symbols

    # ------------------------------------------------------------------------------------------------ whole numbers

    def push_uniform(self, values: Tensor | ArrayLike, sizes: Tensor | ArrayLike) -> None:
        """Code numbers in ``[0, size)``, all equally likely; sizes from 1 to 2^32, one or one each."""
        v = self._tensor(values, "values")
        r = self._tensor(sizes, "sizes").expand(v.shape)
        if bool(((r < 1) | (r > 1 << 32) | (v < 0) | (v >= r)).any()):
            raise ValueError("expected sizes in 1 … 2^32 and values in 0 … size - 1")
        k = torch.div(1 << 32, r, rounding_mode="trunc")
        for part in reversed(self._steps(len(v))):
            h = self._heads[: part.stop - part.start]
            self._emit(h, _shift_right(h, 32) >= k[part])
            h *= r[part]
            h += v[part]
            self._refill(h, _shift_right(h, 32) == 0)
            if self._stirring:
                _stir(h, UNSTIR)
        self._bits += bits(r.double().log().sum())
        self._check_dry()

    def pop_uniform(self, sizes: Tensor | ArrayLike, n: int | None = None) -> Tensor:
        """Decode what :meth:`push_uniform` coded: int64, shape ``(n,)``."""
        r = self._tensor(sizes, "sizes")
        r = r.expand(len(r) if n is None else n)
        if bool(((r < 1) | (r > 1 << 32)).any()):
            raise ValueError("sizes: expected 1 … 2^32")
        most = torch.div(1 << 32, r, rounding_mode="trunc") * r
        values = torch.empty(r.shape, dtype=torch.int64, device=self.device)
        for part in self._steps(len(r)):
            h = self._heads[: part.stop - part.start]
            if self._stirring:
                _stir(h, STIR)
            self._emit(h, _shift_right(h, 32) >= most[part])
            quotient = _divide(h, r[part])
            values[part] = h - quotient * r[part]
            h[:] = quotient
            self._refill(h, _shift_right(h, 32) == 0)
        self._bits -= bits(r.double().log().sum())
        self._check_dry()
        return values

    # ---------------------------------------------------------------------------------------------- lanes and words

    @property
    def lanes(self) -> int:
        """How many symbols are coded at once."""
        return len(self._heads)

    @property
    def bits(self) -> float:
        """Ideal length in bits of what was pushed and not popped."""
        return float(self._bits)

    @property
    def supplied(self) -> int:
        """Number of words that came from the supply."""
        return self._supplied + self._base - self._bottom()

    def resize(self, lanes: int) -> None:
        """Open lanes with words taken from the stack, or close them and return the words."""
        if lanes != self.lanes:
            stack = self.to_stack()
            stack.resize(lanes)
            self._load(stack)

    @contextmanager
    def stirred(self) -> Iterator[None]:
        """Within this, pops draw from fair bits, and pushes undo such pops."""
        before, self._stirring = self._stirring, True
        try:
            yield
        finally:
            self._stirring = before

    def to_words(self) -> Words:
        """The message as it is stored: the same words as from NumPy."""
        return self.to_stack().to_words()

    def finish(self) -> None:
        """Check that everything was popped; raises :class:`Damaged` if not."""
        self.to_stack().finish()

    def to_stack(self) -> Stack:
        """The same state in NumPy."""
        words = self._words[self._bottom() : int(self._top)].cpu().numpy().astype(np.uint32)
        return Stack.from_state(
            self._heads.cpu().numpy().view(np.uint64), words, self._supply, supplied=self.supplied, bits=self.bits
        )

    def _load(self, stack: Stack) -> None:
        heads, words = stack.state()
        self._supply, self._supplied = stack.supply, stack.supplied
        self._bits = torch.tensor(stack.bits, dtype=torch.float64, device=self.device)
        self._heads = torch.from_numpy(heads.view(np.int64).copy()).to(self.device)
        self._words = torch.from_numpy(words.astype(np.int64)).to(self.device)
        #: index in the buffer where the message began when it was loaded; below it lie words of the supply
        self._base = 0
        self._top = torch.tensor(len(words), device=self.device)
        self._lowest = self._top.clone()
        self._at_least = self._at_most = len(words)

    def _bottom(self) -> int:
        return min(self._base, int(self._lowest))

    def _steps(self, n: int) -> list[slice]:
        return [slice(first, min(first + self.lanes, n)) for first in range(0, n, self.lanes)]

    def _tensor(self, values: Tensor | ArrayLike, name: str) -> Tensor:
        tensor = torch.as_tensor(np.asarray(values) if not isinstance(values, Tensor) else values)
        if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"{name}: expected integers, got {tensor.dtype}")
        return tensor.to(self.device, torch.int64)

    def _emit(self, heads: Tensor, flags: Tensor) -> None:
        """Move the low word of the flagged heads to the stack."""
        if self._at_most + len(heads) >= len(self._words):
            self._look()
            if self._at_most + len(heads) >= len(self._words):
                room = self._words.new_zeros(max(_ROOM, len(self._words)))
                self._words = torch.cat([self._words, room])
        counts = flags.cumsum(0)
        nowhere = len(self._words) - 1  # the last place stays free for the words that do not move
        self._words[torch.where(flags, self._top + counts - 1, nowhere)] = heads & _LOW
        heads[:] = torch.where(flags, _shift_right(heads, 32), heads)
        self._top = self._top + counts[-1]
        self._at_most += len(heads)

    def _refill(self, heads: Tensor, flags: Tensor) -> None:
        """Undo :meth:`_emit`."""
        if self._at_least < len(heads):
            self._look()
            if self._at_least < len(heads) and self._supply is not None:
                self._reserve(max(_ROOM, len(heads)))
        if len(self._words) == 0:
            self._words = self._words.new_zeros(1)
        counts = flags.cumsum(0)
        self._top = self._top - counts[-1]
        words = self._words[torch.where(flags, self._top + counts - 1, 0).clamp(min=0)]
        heads[:] = torch.where(flags, heads << 32 | words, heads)
        self._lowest = torch.minimum(self._lowest, self._top)
        self._at_least -= len(heads)

    def _look(self) -> None:
        """Ask the device for the top."""
        self._check_dry()
        self._at_least = self._at_most = int(self._top)

    def _reserve(self, n: int) -> None:
        """Put words of the supply below the message; they count as supplied once the top was below them."""
        assert self._supply is not None
        first = self._supplied + self._base
        words = self._supply(first, first + n)[::-1].astype(np.int64)
        self._words = torch.cat([torch.from_numpy(words).to(self.device), self._words])
        self._base, self._top, self._lowest = self._base + n, self._top + n, self._lowest + n
        self._at_least, self._at_most = self._at_least + n, self._at_most + n

    def _check_dry(self) -> None:
        if self._supply is None and int(self._lowest) < 0:
            raise Damaged("the message ends early")


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Of int64 as if unsigned, 1 ≤ n ≤ 63."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _divide(x: Tensor, divisor: Tensor) -> Tensor:
    """⌊x / divisor⌋ of int64 x as if unsigned, 1 ≤ divisor ≤ 2^32."""
    quotient = torch.div(_shift_right(x, 1), divisor, rounding_mode="trunc") << 1
    return quotient + (x - quotient * divisor >= divisor)


def _stir(heads: Tensor, multiplier: int, precision: int = 0) -> None:
    """Make the low bits look random, or undo it with the inverse multiplier; in place."""
    mask = (1 << max(precision, STIRRED)) - 1
    low = heads & mask
    heads ^= low
    low = (low ^ (low >> 16)) * multiplier & mask
    heads |= low ^ (low >> 16)


def _check_precision(precision: int) -> None:
    if not 1 <= precision <= MAX_PRECISION:
        raise ValueError(f"precision: expected 1 … {MAX_PRECISION}, got {precision}")
