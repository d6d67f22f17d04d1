"""Seeds that are pure functions of the run's seed, of a purpose and of a count, so that a run can restart anywhere."""

from __future__ import annotations

_MASK64 = (1 << 64) - 1
_MASK32 = (1 << 32) - 1

#: What a seed is for.  Different purposes never share a stream.
ORDER, NOISE, DROPOUT, INITIALISE = range(1, 5)


def _mix64(x: int) -> int:
    """Finaliser of splitmix64 (Steele, Lea & Flood 2014)."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK64
    return x ^ (x >> 31)


def _mix32(x: int) -> int:
    """Finaliser of MurmurHash3, a bijection of 32-bit integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK32
    return x ^ (x >> 16)


class Seeds:
    """Seeds ``0, 1, 2, …`` for one purpose.

    PyTorch's generator on the CPU uses the low 32 bits of a seed only; these are a bijection of the count, so that no
    two of the first 2³² seeds are equal.

    >>> noise = Seeds(seed=0, purpose=NOISE)
    >>> noise(7) == Seeds(seed=0, purpose=NOISE)(7)
    True
    >>> len({noise(count) & 0xFFFFFFFF for count in range(10_000)})
    10000
    """

    def __init__(self, seed: int, purpose: int) -> None:
        base = _mix64((_mix64(seed & _MASK64) + purpose * 0x9E3779B97F4A7C15) & _MASK64)
        self._high, self._low = base >> 32, base & _MASK32

    def __call__(self, count: int) -> int:
        high = self._high ^ (count >> 32)
        return (high << 32) | _mix32((count + self._low) & _MASK32)
