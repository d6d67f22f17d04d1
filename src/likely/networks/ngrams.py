"""Vectors for runs of symbols, looked up by a hash of the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed 64-bit integer


class NGrams(nn.Module):
    """A vector for each place of a sequence: the sum of those of the runs of symbols that end there.

    A run of length n has one of 2^``bits`` vectors, by a multiplicative hash; runs that begin before the sequence are
    filled with a symbol of their own.  Vectors start at zero.

    >>> ngrams = NGrams((2, 3), 10, vocab=4, width=8)
    >>> ngrams(torch.zeros(5, 6)).shape
    torch.Size([5, 6, 8])

    Args:
        lengths: of the runs, 2 or more each.
        bits: log2 of the number of vectors of each length.
        vocab: symbols 0 … ``vocab`` − 1.
        width: of a vector.
        dropout: share of the runs that are taken for unknown in training, as many will be later.
    """

    def __init__(self, lengths: Sequence[int], bits: int, vocab: int, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        if any(n < 2 for n in lengths) or not 1 <= bits <= 24:
            raise ValueError(f"ngrams, ngram_bits: expected lengths from 2 up and 1 to 24, got {lengths} and {bits}")
        self.lengths, self.bits, self.base = tuple(lengths), bits, vocab + 1
        self.embedding = nn.Embedding(len(lengths) << bits, width)
        nn.init.zeros_(self.embedding.weight)
        self.dropout = nn.Dropout1d(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Shape ``(n, places)`` to ``(n, places − start, width)``: for the places from ``start`` on."""
        places, codes = x.shape[1], x.long() + 1
        total: Tensor | None = None
        for number, length in enumerate(self.lengths):
            key = codes[:, start:] * 0 + length
            for lag in range(length):
                first = max(start - lag, 0)
                shifted = torch.zeros_like(key)
                shifted[:, first + lag - start :] = codes[:, first : max(places - lag, 0)]
                key = key * self.base + shifted
            index = ((key * _GOLDEN) >> 20) & ((1 << self.bits) - 1)
            vectors = self.dropout(self.embedding(index + (number << self.bits)))
            total = vectors if total is None else total + vectors
        assert total is not None
        return total
