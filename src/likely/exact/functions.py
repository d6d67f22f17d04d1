"""Elementary functions in float64 that have the same bits on every machine, for NumPy arrays and torch tensors alike.

A math library rounds ``exp`` its own way; IEEE 754 fixes + − × ÷, rounding to an integer and comparison.  These
functions use nothing else, one operation a kernel, so no compiler can fuse a product and a sum.  (It fixes the square
root too, but PyTorch leaves that to a library whose last bit is wrong now and then: ours is Newton's.)  They are
accurate to a few units in the last place, relative 10⁻¹⁴ also in the tails.  Subnormal numbers, which some machines
flush to zero, are taken for 0 where that matters, and never returned.

    >>> import numpy as np, torch
    >>> x = np.array([-1.0, 0.0, 2.0])
    >>> exp(x).tobytes() == exp(torch.from_numpy(x)).numpy().tobytes()
    True
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

Values = TypeVar("Values", np.ndarray, Tensor)

_ONE_LOG = float.fromhex("0x1.71547652b82fep+0")  # 1 / log 2
_LOG_HIGH = float.fromhex("0x1.62e42fee00000p-1")  # log 2 to 32 bits, so that n · _LOG_HIGH is exact for |n| < 2^21 …
_LOG_LOW = float.fromhex("0x1.a39ef35793c76p-33")  # … and the rest
_LOG = float.fromhex("0x1.62e42fefa39efp-1")
_ROOT_HALF = float.fromhex("0x1.6a09e667f3bcdp-1")
_HALF_LOG_2PI = float.fromhex("0x1.d67f1c864beb5p-1")
_DENSITY_AT_0 = float.fromhex("0x1.9884533d43651p-2")  # 1 / √(2π)
_SMALLEST = float.fromhex("0x1p-1022")  # normal number
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -708.39, 709.78
_MANTISSA = (1 << 52) - 1


class _Function(Protocol):
    """A function of every element of a float64 array or tensor."""

    def __call__(self, x: Values, /) -> Values: ...


def _elementwise(function: Callable[[Any, Any], Any]) -> _Function:
    """Take float64 arrays and tensors, and keep NumPy from warning of what the function handles."""

    def applied(x: Any, /) -> Any:
        if x.dtype not in (torch.float64, np.float64):
            raise ValueError(f"x: expected float64, got {x.dtype}")
        if isinstance(x, Tensor):
            return function(x, torch)
        with np.errstate(all="ignore"):
            return np.asarray(function(x, np))

    return applied


def _round(x: Any, xp: Any) -> Any:
    return torch.round(x) if xp is torch else np.rint(x)


def _filled(x: Any, value: float, xp: Any) -> Any:
    """``value`` in the shape of x, for a numerator: a number over a tensor would be a reciprocal and a product."""
    return xp.full_like(x, value)


def _power_of_two(n: Any, xp: Any) -> Any:
    """2ⁿ for whole n from −1022 to 1023, from its bits."""
    whole = n.to(torch.int64) if xp is torch else n.astype(np.int64)
    return ((whole + 1023) << 52).view(xp.float64)


def _parts(x: Any, xp: Any) -> tuple[Any, Any]:
    """(m, e) with x = m · 2ᵉ and √½ ≤ m < √2, for positive normal x, from its bits."""
    bits = (x if xp is torch else np.ascontiguousarray(x)).view(xp.int64)
    exponent = (bits >> 52) - 1023
    mantissa = (bits & _MANTISSA) | (1023 << 52)
    m = mantissa.view(xp.float64)
    e = exponent.to(torch.float64) if xp is torch else exponent.astype(np.float64)
    large = m >= 2.0 * _ROOT_HALF
    return xp.where(large, m * 0.5, m), xp.where(large, e + 1.0, e)


def _horner(x: Any, coefficients: list[float]) -> Any:
    """Σ cₖ xᵏ."""
    total = x * coefficients[-1] + coefficients[-2]
    for c in reversed(coefficients[:-2]):
        total = total * x + c
    return total


_EXP_SERIES = [1.0 / math.factorial(k) for k in range(15)]
_ATANH_SERIES = [2.0 / (2 * k + 1) for k in range(13)]


def _exp(x: Any, xp: Any) -> Any:
    """exp(n log 2 + r) = 2ⁿ Σ rᵏ/k! with |r| ≤ ½ log 2."""
    y = xp.clip(x, _LOWEST_EXPONENT, _HIGHEST_EXPONENT)
    n = xp.where(y == y, _round(y * _ONE_LOG, xp), 0.0)
    r = (y - n * _LOG_HIGH) - n * _LOG_LOW
    half = _round(n * 0.5, xp)
    value = (_horner(r, _EXP_SERIES) * _power_of_two(half, xp)) * _power_of_two(n - half, xp)
    value = xp.where(x > _HIGHEST_EXPONENT, math.inf, value)
    return xp.where(x < _LOWEST_EXPONENT, 0.0, value)


def _expm1(x: Any, xp: Any) -> Any:
    """The series without its first term near 0, exp(x) − 1 elsewhere."""
    near = xp.where((x < 0.35) & (x > -0.35), x, 0.0)
    return xp.where((x < 0.35) & (x > -0.35), near * _horner(near, _EXP_SERIES[1:]), _exp(x, xp) - 1.0)


def _log(x: Any, xp: Any) -> Any:
    """log(m 2ᵉ) = e log 2 + 2 atanh((m − 1)/(m + 1))."""
    tiny = x < _SMALLEST
    y = xp.where(tiny, x * 2.0**54, x)
    usable = (y > 0) & (y < math.inf)
    m, e = _parts(xp.where(usable, y, 1.0), xp)
    e = xp.where(tiny, e - 54.0, e)
    f = (m - 1.0) / (m + 1.0)
    value = e * _LOG_HIGH + (e * _LOG_LOW + f * _horner(f * f, _ATANH_SERIES))
    value = xp.where(usable, value, math.nan)
    value = xp.where(y == 0, -math.inf, value)
    return xp.where(y == math.inf, math.inf, value)


def _log1p(x: Any, xp: Any) -> Any:
    """log(u) + (x − (u − 1))/u with u = 1 + x rounded."""
    u = 1.0 + x
    usable = (u > 0) & (u < math.inf)
    v = xp.where(usable, u, 1.0)
    value = _log(v, xp) + (xp.where(usable, x, 0.0) - (v - 1.0)) / v
    return xp.where(usable, value, _log(u, xp))


def _sqrt(x: Any, xp: Any) -> Any:
    """Newton's y ← ½ (y + x/y) from a line within 4 % of √m, after the exponent is halved."""
    usable = (x >= _SMALLEST) & (x < math.inf)
    m, e = _parts(xp.where(usable, x, 1.0), xp)
    half = _round(e * 0.5 - 0.25, xp)
    m = xp.where(e - 2.0 * half > 0, m * 2.0, m)  # from √½ to 2√2
    y = 0.48 + 0.45 * m
    for _ in range(5):
        y = 0.5 * (y + m / y)
    value = xp.where(usable, y * _power_of_two(half, xp), xp.where(x == x, math.nan, x))
    return xp.where(x == math.inf, math.inf, xp.where((x < _SMALLEST) & (x >= 0), 0.0, value))


def _asinh(x: Any, xp: Any) -> Any:
    """sign(x) log1p(a + a²/(1 + √(a² + 1))) with a = |x|; log(2a) where a² would drown the one."""
    a = abs(x)
    large = a > 2.0**28
    b = xp.where(large, 1.0, a)
    square = b * b
    value = _log1p(b + square / (1.0 + _sqrt(square + 1.0, xp)), xp)
    value = xp.where(large, _log(a, xp) + _LOG, value)
    return xp.where(x < 0, -value, xp.where(x == 0, x, value))


def _sigmoid(x: Any, xp: Any) -> Any:
    e = _exp(-abs(x), xp)
    return xp.where(x < 0, e, _filled(e, 1.0, xp)) / (1.0 + e)


def _softplus(x: Any, xp: Any) -> Any:
    return xp.where(x > 0, x, 0.0 * x) + _log1p(_exp(-abs(x), xp), xp)


def _tanh(x: Any, xp: Any) -> Any:
    """−t/(t + 2) with t = expm1(−2|x|), and the sign of x."""
    t = _expm1(-2.0 * abs(x), xp)
    value = -t / (t + 2.0)
    return xp.where(x < 0, -value, xp.where(x == 0, x, value))


def _normal_tail(a: Any, xp: Any) -> Any:
    """1 − Φ(a) for a ≥ 2.25: φ(a) over Laplace's continued fraction a + 1/(a + 2/(a + 3/…))."""
    fraction = a
    for k in range(100, 0, -1):
        fraction = a + _filled(a, float(k), xp) / fraction
    return _normal_density(a, xp) / fraction


def _normal_density(x: Any, xp: Any) -> Any:
    """φ(x) = exp(−x²/2)/√(2π); x² in two parts, of which the first is exact."""
    y = xp.clip(x, -40.0, 40.0)
    high = _round(y * 1024.0, xp) * 2.0**-10
    return (_exp(high * high * -0.5, xp) * _exp((y - high) * (y + high) * -0.5, xp)) * _DENSITY_AT_0


def _normal_cdf(x: Any, xp: Any) -> Any:
    """½ + φ(x) Σ x²ᵏ⁺¹/(2k + 1)!! for |x| < 2.25 (all terms of one sign), else by the tail."""
    a = abs(x)
    near = xp.where(a < 2.25, x, 0.0)
    square = near * near
    odd = [1.0]
    for k in range(1, 33):
        odd.append(odd[-1] / (2 * k + 1))
    middle = 0.5 + _normal_density(near, xp) * (near * _horner(square, odd))
    tail = _normal_tail(xp.where(a >= 2.25, xp.clip(a, 2.25, 40.0), 2.25), xp)
    value = xp.where(a < 2.25, middle, xp.where(x < 0, tail, 1.0 - tail))
    return xp.where(x == x, value, x)


#: eˣ.
exp = _elementwise(_exp)
#: eˣ − 1, accurate near 0.
expm1 = _elementwise(_expm1)
#: Natural logarithm; −∞ at 0, NaN below.
log = _elementwise(_log)
#: log(1 + x), accurate near 0.
log1p = _elementwise(_log1p)
#: Square root.
sqrt = _elementwise(_sqrt)
#: Inverse hyperbolic sine.
asinh = _elementwise(_asinh)
#: 1 / (1 + e⁻ˣ).
sigmoid = _elementwise(_sigmoid)
#: log(1 + eˣ).
softplus = _elementwise(_softplus)
#: Hyperbolic tangent.
tanh = _elementwise(_tanh)
#: Density φ of the standard normal law.
normal_density = _elementwise(_normal_density)
#: Distribution function Φ of the standard normal law, accurate in the lower tail.
normal_cdf = _elementwise(_normal_cdf)
