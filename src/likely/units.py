"""Nats to bits, in one place: the only ``log(2)`` of the package.

Every model reports nats; every face of the package shows bits.  The conversions live here so that a
unit can be wrong in one place only.  All functions accept numbers, NumPy arrays and tensors.
"""

from __future__ import annotations

import math
from typing import TypeVar

Number = TypeVar("Number")

LN2 = math.log(2.0)


def bits(nats: Number) -> Number:
    """Convert nats to bits (same sign).

    >>> bits(-math.log(2.0))
    -1.0
    """
    return nats / LN2  # type: ignore[operator, return-value]


def nats(bits: Number) -> Number:
    """Convert bits to nats (same sign).

    >>> round(nats(1.0), 4)
    0.6931
    """
    return bits * LN2  # type: ignore[operator, return-value]


def code_length_bits(log_prob_nats: Number) -> Number:
    """Ideal code length, in bits, of an example whose log-probability is ``log_prob_nats`` (nats): −log₂ p.

    >>> code_length_bits(math.log(1 / 256))
    8.0

    What is certain costs 0 bits, not -0:

    >>> code_length_bits(0.0)
    0.0
    """
    return 0.0 - bits(log_prob_nats)  # type: ignore[operator, return-value]


def bits_per_dim(log_prob_nats: Number, dims: int) -> Number:
    """Code length divided by the number of dimensions of one example (bits/dim, to be minimised).

    A uniform model over 256 levels costs 8 bits/dim whatever the shape:

    >>> bits_per_dim(64 * math.log(1 / 256), dims=64)
    8.0
    """
    if dims < 1:
        raise ValueError(f"dims: expected a positive number of dimensions, got {dims}")
    return code_length_bits(log_prob_nats) / dims  # type: ignore[operator, return-value]


def bits_per_byte(log_prob_nats: Number, original_bytes: int) -> Number:
    """Code length of the data divided by the size of its uncompressed form (bits/byte, to be minimised)."""
    if original_bytes < 1:
        raise ValueError(f"original_bytes: expected a positive size, got {original_bytes}")
    return code_length_bits(log_prob_nats) / original_bytes  # type: ignore[operator, return-value]


def perplexity(log_prob_nats: float, tokens: int) -> float:
    """Perplexity of ``tokens`` tokens whose joint log-probability is ``log_prob_nats`` (nats): exp(−log p / tokens).

    >>> round(perplexity(10 * math.log(1 / 27), tokens=10), 6)
    27.0
    """
    if tokens < 1:
        raise ValueError(f"tokens: expected a positive number of tokens, got {tokens}")
    return math.exp(-log_prob_nats / tokens)
