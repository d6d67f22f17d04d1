"""Tables and elementwise rules from which codecs make frequencies: the same bits on every machine.

Frequencies follow from float64 numbers by additions, multiplications, divisions and floors, each an operation of its
own that IEEE 754 defines to the bit, elementwise or in a fixed order; what is not of that kind (σ, Φ, exp) is looked up
in tables made by :mod:`likely.exact.functions`.  Rounding to nearest is monotone, so a cumulative law made of monotone
operations stays monotone to the last bit, and each symbol keeps its place in the range.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from likely.coding.cells import Floats, Integers
from likely.exact.functions import exp, normal_cdf, sigmoid

#: Grid of logits of categories and of shares: their rounding costs ≤ 1e-5 nats a cell.
LOGIT_STEPS = 64
#: Grid of log-scales: rounding costs ≤ 2e-5 nats a cell.
SCALE_STEPS = 64
_MOST_LOG_SCALE = 64
#: A weight of 1 is this many units; exp(−21) is the last that is not 0.
UNITS = 1 << 30
_LAST_LOGIT = 22 * LOGIT_STEPS
#: Steps of probability at which quantiles are kept, as hints.
_GUESSES = 1 << 13


class Law:
    """A standard law whose cumulative distribution is linear between ``cells`` equal steps over ± ``reach``.

    It is 0 below and 1 above.  Values are multiples of 2^−50, so that differences are exact.
    """

    def __init__(self, cdf: Callable[[Floats], Floats], reach: int, steps: int, narrowness: float = 1.0) -> None:
        self.steps, self.centre = float(steps), float(reach * steps)
        #: Scale of a logistic of the same deviation, inverted; for guesses.
        self.narrowness = narrowness
        edges = np.arange(-reach * steps, reach * steps + 1) / steps
        lower = np.rint(np.ldexp(cdf(-np.abs(edges)), 50))
        whole = np.where(edges > 0, 2.0**50 - lower, lower)
        whole[0], whole[-1] = 0.0, 2.0**50
        self.value = np.ldexp(whole, -50)
        self.slope = np.append(np.diff(self.value), 0.0)
        self._guesses = np.interp(np.arange(_GUESSES + 1) / _GUESSES, self.value, edges)
        self._guess_slopes = np.append(np.diff(self._guesses), 0.0)

    def cdf(self, u: Floats) -> Floats:
        """Cumulative probability at standard position u / steps − reach, any floats but NaN; overwrites ``u``."""
        np.maximum(u, 0.0, out=u)
        np.minimum(u, 2.0 * self.centre, out=u)
        whole = np.floor(u)
        cell = whole.astype(np.int64)
        u -= whole
        u *= self.slope.take(cell)
        u += self.value.take(cell)
        return u

    def guess(self, probability: Floats) -> Floats:
        """About the standard position with this cumulative probability, the same on this machine only."""
        u = probability * float(_GUESSES)
        cell = u.astype(np.int64)
        u -= cell
        u *= self._guess_slopes.take(cell, mode="clip")
        u += self._guesses.take(cell, mode="clip")
        return u


@functools.cache
def logistic() -> Law:
    """σ over ± 32."""
    return Law(sigmoid, 32, 64)


@functools.cache
def normal() -> Law:
    """Φ over ± 9."""
    return Law(normal_cdf, 9, 128, 1.8138)


@functools.cache
def _inverse_scales() -> Floats:
    grid = np.arange(-_MOST_LOG_SCALE * SCALE_STEPS, _MOST_LOG_SCALE * SCALE_STEPS + 1)
    return exp(-(grid / SCALE_STEPS))


def inverse_scale(log_scales: NDArray[Any]) -> Floats:
    """exp(−s) for s on the grid of log-scales, within ± 64.

    >>> inverse_scale(np.float32([0.0, -700.0])).tolist() == [1.0, 6.235149080811617e+27]
    True
    """
    last = _MOST_LOG_SCALE * SCALE_STEPS
    grid = np.rint(np.clip(log_scales, -_MOST_LOG_SCALE, _MOST_LOG_SCALE) * log_scales.dtype.type(SCALE_STEPS))
    return _inverse_scales().take(grid.astype(np.int64) + last)


@functools.cache
def _exponentials() -> Integers:
    values = np.rint(exp(-(np.arange(_LAST_LOGIT + 1) / LOGIT_STEPS)) * UNITS).astype(np.int64)
    values[-1] = 0
    return values


def weights(logits: NDArray[Any], most: NDArray[Any]) -> Integers:
    """exp(l − most) in units of 2^−30, on the grid of logits; ``most`` is the largest logit, which is finite."""
    with np.errstate(over="ignore"):
        grid = (most - logits) * logits.dtype.type(LOGIT_STEPS)
    np.minimum(grid, logits.dtype.type(_LAST_LOGIT), out=grid)
    return _exponentials().take(np.rint(grid, out=grid).astype(np.int64))


def shares(units: Integers) -> Floats:
    """Weights as shares, multiples of 2^−30 that sum to 1 exactly along the first axis.

    >>> shares(np.array([[1, 3], [2, 1]])).tolist()
    [[0.3333333330228925, 0.75], [0.6666666669771075, 0.25]]
    """
    edges = np.empty((len(units) + 1, *units.shape[1:]))
    edges[0] = 0.0
    for k in range(len(units)):
        np.add(edges[k], units[k], out=edges[k + 1])  # whole numbers below 2^53
    edges /= edges[-1].copy()
    edges *= float(UNITS)
    np.floor(edges, out=edges)
    portions = edges[1:] - edges[:-1]
    portions *= 1.0 / UNITS
    return portions


def refuse_non_finite(name: str, values: NDArray[Any], lowest_may_be_infinite: bool = False) -> None:
    """Raise ``ValueError`` naming the first index at which a parameter is NaN or infinite.

    Args:
        lowest_may_be_infinite: allow −∞, which switches a component off, but not along the whole last axis.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        if not values.size or np.isfinite(values.max() - values.min()):
            return
    wrong = ~np.isfinite(values)
    expected = "a finite number"
    if lowest_may_be_infinite:
        wrong &= values != -np.inf
        wrong |= (values == -np.inf).all(-1, keepdims=True)
        expected = "a finite number somewhere on the last axis, and no NaN or +inf"
    if wrong.any():
        index = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(f"{name}[{', '.join(map(str, index))}]: expected {expected}, got {values[index]}")
