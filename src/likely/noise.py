"""The randomness that models consume, made explicit.

A model never calls the global generator: it draws from the :class:`Noise` that it was handed.  Two kinds exist.

* :class:`StreamNoise` draws from a ``torch.Generator``: fast, used in training.  With ``rows`` it draws for a
  *global* batch and keeps its own part, so that several processes see the noise that one process would see.
* :class:`KeyedNoise` gives every example its own stream, a pure function of ``(seed, key of the example)``.  An
  evaluation that uses it does not depend on batch size, order or neighbours, and the noise of different
  examples is independent, so that standard errors mean what they say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2^64 / golden ratio, as a signed 64-bit integer
_MIX1 = -4658895280553007687  # splitmix64's first multiplier, 0xBF58476D1CE4E5B9
_MIX2 = -7723592293110705685  # splitmix64's second multiplier, 0x94D049BB133111EB
#: Words an example that are made together, once a noise is asked for a few at a time.
_AHEAD = 64


class Noise(Protocol):
    """Source of standard variates; ``shape[0]`` is always the number of examples."""

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Independent N(0, 1) variates, float32."""
        ...

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Independent variates from the open interval (0, 1), float32."""
        ...


def _logical_shift_right(x: Tensor, n: int) -> Tensor:
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: Tensor) -> Tensor:
    """Finaliser of splitmix64 (Steele, Lea & Flood 2014), elementwise on int64 taken modulo 2^64."""
    x = (x ^ _logical_shift_right(x, 30)) * _MIX1
    x = (x ^ _logical_shift_right(x, 27)) * _MIX2
    return x ^ _logical_shift_right(x, 31)


def content_keys(*batches: Tensor | None) -> Tensor:
    """A 64-bit key for every example, a hash of its values: shape ``(batch,)``, int64.

    Equal examples get equal keys, wherever they stand and whatever stands beside them.
    """
    total: Tensor | None = None
    for salt, batch in enumerate(b for b in batches if b is not None):
        rows = batch.detach().reshape(len(batch), -1)
        words = torch.nan_to_num(rows.to(torch.float64), nan=-1.2345e300).contiguous().view(torch.int64)
        place = _mix(torch.arange(1, words.shape[1] + 1, device=words.device) * _GOLDEN + salt)
        part = _mix(words ^ place).sum(1)
        total = part if total is None else _mix(total) + part
    if total is None:
        raise ValueError("content_keys: expected at least one batch")
    return _mix(total)


class KeyedNoise:
    """Noise that belongs to the example, not to the batch.

    >>> noise = KeyedNoise(0, torch.tensor([7, 8, 9]))
    >>> alone = KeyedNoise(0, torch.tensor([8]))
    >>> torch.equal(noise.normal((3, 2))[1], alone.normal((1, 2))[0])
    True

    Args:
        seed: seed of the whole evaluation.
        keys: int64, shape ``(batch,)``: one key an example (see :func:`content_keys`).
    """

    def __init__(self, seed: int, keys: Tensor) -> None:
        self._streams = _mix(_mix(torch.full_like(keys, seed)) + keys * _GOLDEN)
        self._drawn = self._at = 0
        self._words = self._streams[:, None][:, :0]  # the next are those from ``_at`` on
        self._made: dict[Callable[[Tensor], Tensor], Tensor] = {}  # variates made of all of them

    def _variates(self, shape: Sequence[int], make: Callable[[Tensor], Tensor]) -> Tensor:
        if shape[0] != len(self._streams):
            raise ValueError(f"shape: expected {len(self._streams)} examples on the first axis, got {tuple(shape)}")
        per_example = math.prod(shape[1:])
        if self._at + per_example > self._words.shape[1]:
            count = max(per_example, _AHEAD if self._drawn else 0)
            counters = torch.arange(self._drawn + 1, self._drawn + count + 1, device=self._streams.device)
            self._words, self._made, self._at = _mix(self._streams[:, None] + counters * _GOLDEN), {}, 0
        if make not in self._made:
            self._made[make] = make(self._words)
        variates = self._made[make][:, self._at : self._at + per_example]
        self._at += per_example
        self._drawn += per_example
        return variates.reshape(tuple(shape))

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """Uniform variates on the 2^23 cell centres of (0, 1), which float32 holds exactly."""
        return self._variates(shape, _uniform)

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal variates by inversion of a 53-bit uniform, float32."""
        return self._variates(shape, _normal)


def _uniform(words: Tensor) -> Tensor:
    return (_logical_shift_right(words, 41).float() + 0.5) * 2.0**-23


def _normal(words: Tensor) -> Tensor:
    uniform = (_logical_shift_right(words, 11).to(torch.float64) + 0.5) * 2.0**-53
    return torch.special.ndtri(uniform).float()


class StreamNoise:
    """Noise from a ``torch.Generator`` (the default generator of the device when none is given).

    Args:
        generator: where to draw from.
        device: device of the variates.
        rows: ``(start, stop, total)``: this process holds rows ``start:stop`` of a global batch of ``total``; the
            variates of the whole batch are drawn and the own rows kept.
    """

    def __init__(
        self,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        rows: tuple[int, int, int] | None = None,
    ) -> None:
        self._generator, self._device, self._rows = generator, device, rows

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._draw(torch.randn, shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return self._draw(torch.rand, shape).clamp_(min=2.0**-25)  # torch.rand may return 0, which has no logarithm

    def stratified(self, shape: Sequence[int]) -> Tensor:
        """Uniform variates that cover (0, 1) evenly over the examples of the global batch: (U + i/B) mod 1."""
        start, stop, total = self._rows or (0, shape[0], shape[0])
        shift = torch.rand(1, *shape[1:], generator=self._generator, device=self._device)
        places = torch.arange(start, stop, device=self._device).reshape(-1, *[1] * (len(shape) - 1)) / total
        return ((shift + places) % 1.0).clamp_(min=2.0**-25)

    def _draw(self, function, shape: Sequence[int]) -> Tensor:  # type: ignore[no-untyped-def]
        if self._rows is None:
            return function(*shape, generator=self._generator, device=self._device)
        start, stop, total = self._rows
        if shape[0] != stop - start:
            raise ValueError(f"shape: expected {stop - start} examples on the first axis, got {tuple(shape)}")
        return function(total, *shape[1:], generator=self._generator, device=self._device)[start:stop]


class TemperedNoise:
    """Another noise whose normal variates are multiplied by a temperature; the uniform ones are as they were.

    A flow draws f⁻¹(T ε) from it: less spread for T < 1, and no longer the model's law (Kingma & Dhariwal 2018, arXiv
    1807.03039, section 5).

    >>> noise = TemperedNoise(KeyedNoise(0, torch.tensor([7])), 0.5)
    >>> bool((noise.normal((1, 3)) == 0.5 * KeyedNoise(0, torch.tensor([7])).normal((1, 3))).all())
    True

    Args:
        temperature: T, at least 0.
    """

    def __init__(self, noise: Noise, temperature: float) -> None:
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature: expected a number from 0 up, got {temperature}")
        self._noise, self._temperature = noise, temperature

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._temperature * self._noise.normal(shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return self._noise.uniform(shape)


class SharedNoise:
    """Noise for m rows an example, one after another, taken from noise for one row an example.

    >>> SharedNoise(KeyedNoise(0, torch.tensor([7, 8])), 2, 3).normal((6, 4)).shape
    torch.Size([6, 4])

    Args:
        noise: for ``n`` examples.
        m: rows of each.
    """

    def __init__(self, noise: Noise, n: int, m: int) -> None:
        self._noise, self._n, self._m = noise, n, m

    def normal(self, shape: Sequence[int]) -> Tensor:
        return self._noise.normal((self._n, self._per_example(shape))).reshape(tuple(shape))

    def uniform(self, shape: Sequence[int]) -> Tensor:
        return self._noise.uniform((self._n, self._per_example(shape))).reshape(tuple(shape))

    def _per_example(self, shape: Sequence[int]) -> int:
        per_row = 1
        for size in shape[1:]:
            per_row *= size
        return self._m * per_row


def torch_generator(noise: Noise, n: int) -> torch.Generator:
    """A ``torch.Generator`` seeded from ``noise``, for laws that no fixed number of variates gives (gamma, Poisson).

    Args:
        n: number of examples that ``noise`` serves.
    """
    words = (noise.uniform((n, 2)).double() * 2.0**23).long()
    seed = int(_mix(_mix(words[:, 0] * _GOLDEN) + words[:, 1]).sum())
    return torch.Generator(words.device).manual_seed(seed & ((1 << 63) - 1))
