"""What coding tests stand on: codecs of tables of frequencies, and a second rANS in Python's own integers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from likely.coding.stack import Stack, initial_words


def frequencies(probabilities: ArrayLike, precision: int) -> NDArray[np.int64]:
    """Integers ≥ 1 that sum to 2^precision along the last axis, near the probabilities."""
    p = np.asarray(probabilities, float)
    cells = p.shape[-1]
    freq = 1 + np.floor(p * ((1 << precision) - cells)).astype(np.int64)
    rest = (1 << precision) - freq.sum(-1, keepdims=True)
    return freq + rest * (np.arange(cells) == p.argmax(-1)[..., None])


class Table:
    """Symbols of one shared table, or of a table of their own each (then ``rows`` names it for every symbol)."""

    def __init__(self, freq: ArrayLike, precision: int, rows: ArrayLike) -> None:
        self.freq = np.atleast_2d(np.asarray(freq, np.int64))
        self.precision = precision
        self.rows = np.asarray(rows, np.int64)
        self.edges = np.concatenate([np.zeros((len(self.freq), 1), np.int64), self.freq.cumsum(1)], 1)
        assert (self.edges[:, -1] == 1 << precision).all()
        assert self.freq.min() >= 1

    def push(self, stack: Stack, symbols: ArrayLike) -> None:
        x, rows = np.asarray(symbols).reshape(-1), self.rows.reshape(-1)
        stack.push(self.edges[rows, x], self.freq[rows, x], self.precision)

    def pop(self, stack: Stack) -> NDArray[np.int64]:
        flat = self.rows.reshape(-1)

        def find(part: slice, residues: NDArray[np.uint64]) -> tuple[Any, Any, Any]:
            rows = flat[part]
            x = (self.edges[rows, 1:] <= residues.astype(np.int64)[:, None]).sum(1)
            return x, self.edges[rows, x], self.freq[rows, x]

        return stack.pop(len(flat), self.precision, find).reshape(self.rows.shape)

    def bits(self, symbols: ArrayLike) -> NDArray[np.float64]:
        """−log2 p of each symbol under the integers."""
        return self.precision - np.log2(self.freq[self.rows, np.asarray(symbols)])


def random_edges(rng: np.random.Generator, precision: int, cells: int) -> NDArray[np.int64]:
    """Cuts of [0, 2^precision), with cells of size 1 at both ends where there is room."""
    total = 1 << precision
    cells = min(cells, total)
    cuts = {1, total - 1} if cells >= 3 else set()
    while len(cuts) < cells - 1:
        cuts.add(int(rng.integers(1, total)))
    return np.array([0, *sorted(cuts), total], np.int64)


def reference_words(
    lanes: int, pushes: Sequence[tuple[str, Sequence[int], Sequence[int], int]], stack_words: Sequence[int] = ()
) -> list[int]:
    """What ``Stack.to_words`` must give, symbol by symbol in Python's integers, from the description of the format.

    ``pushes``: ("table", starts, freqs, precision) or ("uniform", values, sizes, 0).
    """
    words = list(stack_words)
    fresh = iter(initial_words(0, 10**5).tolist())
    below = [words.pop() if words else next(fresh) for _ in range(lanes)]
    heads = [(1 << 32) + word for word in reversed(below)]
    for kind, first, second, precision in pushes:
        for block in reversed(range(0, len(first), lanes)):
            size = min(lanes, len(first) - block)
            if kind == "table":
                for lane in range(size):
                    if heads[lane] >= second[block + lane] << (64 - precision):
                        words.append(heads[lane] & 0xFFFFFFFF)
                        heads[lane] >>= 32
                for lane in range(size):
                    quotient, rest = divmod(heads[lane], second[block + lane])
                    heads[lane] = (quotient << precision) + rest + first[block + lane]
            else:
                for lane in range(size):
                    if heads[lane] >= (2**32 // second[block + lane]) << 32:
                        words.append(heads[lane] & 0xFFFFFFFF)
                        heads[lane] >>= 32
                for lane in range(size):
                    heads[lane] = heads[lane] * second[block + lane] + first[block + lane]
                low = [lane for lane in range(size) if heads[lane] < 1 << 32]
                missing = [words.pop() if words else next(fresh) for _ in low]
                for lane, word in zip(low, reversed(missing), strict=True):
                    heads[lane] = heads[lane] << 32 | word
            assert all(1 << 32 <= head < 1 << 64 for head in heads)
    lengths = [(head >> 32).bit_length() - 1 for head in heads]
    mantissas = "".join(format((head >> 32) - (1 << n), "b").zfill(n) if n else "" for head, n in zip(heads, lengths))
    fives = "".join(format(n, "05b") for n in lengths)
    for bits in (mantissas, fives):
        if bits is mantissas:
            words += [head & 0xFFFFFFFF for head in heads]
        bits += "0" * (-len(bits) % 32)
        packed = bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8))
        words += [int.from_bytes(packed[i : i + 4], "little") for i in range(0, len(packed), 4)]
    return words
