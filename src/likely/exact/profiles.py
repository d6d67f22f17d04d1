"""The two profiles of reproducible arithmetic, and what every rule builds on."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from likely.contract import Unsupported


class Uncovered(Unsupported):
    """The network does something that has no reproducible rule; the message names it and where it stands."""


class Irreproducible(RuntimeError):
    """This machine's arithmetic failed the probe on every route."""


@dataclass(frozen=True)
class Profile:
    """How integers are held in floats.

    Args:
        name: ``exact32`` or ``exact64``.
        dtype: the float type that holds the integers, and that values between the layers have.
        largest_weight: weights are rounded to whole numbers up to this, a scale a row,
        finest_weight: or up to this, in layers whose rows are short enough.
        largest_activation: activations are rounded to at most this, a scale an example.
        largest_sum: all sums of products up to this are exact in ``dtype``.
        least_activation: a layer whose certificate allows less is cut into blocks of its inputs.
    """

    name: str
    dtype: torch.dtype
    largest_weight: int
    finest_weight: int
    largest_activation: int
    largest_sum: int
    least_activation: int


#: By name.  Weights of 9 to 12 bits; sums below 2²⁴ in float32.  Weights of 21 bits; sums below 2⁵³ in float64.
PROFILES = {
    profile.name: profile
    for profile in (
        Profile("exact32", torch.float32, 255, 2047, 2047, 2**24 - 1, 64),
        Profile("exact64", torch.float64, 2**20 - 1, 2**20 - 1, 2**20, 2**53 - 1, 2**12),
    )
}

#: Numbers beyond this are refused, so that no product of scales overflows; 2⁶⁰.
LARGEST = 2.0**60
#: No scale is smaller than this, so that nothing becomes subnormal (which some machines flush to zero); 2⁻⁶⁰.
SMALLEST = 2.0**-60


class Rule(nn.Module):
    """What takes the place of a layer.  It is called outside the watch over composites: it knows what it does."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return self.forward(*args, **kwargs)


def peaks(x: Tensor, dims: tuple[int, ...], least: float = -math.inf) -> Tensor:
    """max |x| over ``dims``, which are kept with size 1.

    Args:
        least: no element is less: where the largest of them are at least −``least``, these are the peaks.

    Raises:
        ValueError: an element is NaN, infinite or beyond 2⁶⁰.
    """
    peak = x.amax(dims, True)
    if least < 0.0 and not (least > -math.inf and peak.numel() and peak.amin().item() >= -least):
        peak = torch.maximum(peak, x.amin(dims, True).neg_())
    if peak.numel() and not peak.amax().item() <= LARGEST:
        wrong = ~(x.abs() <= LARGEST)
        index = tuple(wrong.nonzero()[0].tolist())
        raise ValueError(
            f"exact network: expected finite numbers up to {LARGEST:.2g}, got {x[index].item()} at {list(index)}"
        )
    return peak


def check(x: Tensor) -> float:
    """max |x|, with the errors of :func:`peaks`."""
    return peaks(x, tuple(range(x.dim()))).item() if x.numel() else 0.0


def parts(x: Tensor, *others: Tensor, most: int = 1 << 19) -> Iterator[tuple[Tensor, ...]]:
    """Parts of tensors along the first axis, of about ``most`` numbers of x: what is done to one stays in the cache."""
    if not x.numel():
        return
    if x.numel() <= most or not x.dim():
        yield x, *others
    else:
        step = max(1, most * len(x) // x.numel())
        yield from zip(*(tensor.split(step) for tensor in (x, *others)))
