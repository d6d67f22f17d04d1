"""Bits-back coding: latent-variable models as codecs, and the ramp that makes it pay for small data.

A model p(z) p(x | z) with posterior q(z | x) codes x in three moves (Hinton & van Camp 1993; Frey 1997; as a stack:
Townsend, Bird & Barber 2019, arXiv:1901.04866):

    pop  z ~ q(z | x)      gives back  −log2 q(z | x)  bits
    push x   by p(x | z)   costs       −log2 p(x | z)
    push z   by p(z)       costs       −log2 p(z)

so that x costs the negative evidence lower bound.  The decoder runs the moves backwards.  The bound holds if z is a
fair draw, but bits on the stack are not fair where the model errs (earlier z were coded by a prior that is not quite
their law): posteriors pop *stirred* bits.

The first pop needs bits that nobody has earned yet.  With batches of fixed size that is a batch's worth of posterior;
:class:`Schedule` lets the batch grow with the rows already coded, so that it is one row's worth, and opens the coder's
lanes as the message grows.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch

from likely.coding.codec import Codec, ModelCodec, Symbols
from likely.coding.errors import Damaged
from likely.coding.stack import Stack

# --------------------------------------------------------------------------------------------------------------
# The combinator
# --------------------------------------------------------------------------------------------------------------


class BitsBack:
    """The codec of x under a latent-variable model; its cost is the negative ELBO of its integer tables.

    The prior may itself be bits-back: then z2 is drawn after x was coded, and a chain of any depth borrows the bits of
    its first layer alone (Bit-Swap; Kingma, Abbeel & Ho 2019, arXiv:1905.06845).  See :func:`bit_swap`.

    The sum x of two dice (0 … 5), where z is the first; the posterior is exact, so x costs −log2 p(x):

    >>> from likely.coding.codec import Mapped, Uniform
    >>> def likelihood(z):
    ...     return Mapped(Uniform(z.shape, 6), lambda x: x - z, lambda second: second + z)
    >>> def posterior(x):
    ...     least = np.maximum(0, x - 5)
    ...     return Mapped(Uniform(x.shape, 6 - abs(x - 5)), lambda z: z - least, lambda above: above + least)
    >>> stack = Stack()
    >>> BitsBack(Uniform((3,), 6), likelihood, posterior).push(stack, np.array([5, 0, 7]))
    >>> print(f"{2 ** stack.bits:.3f}", 36 / 6 * 36 / 1 * 36 / 4)
    1944.000 1944.0
    >>> BitsBack(Uniform((3,), 6), likelihood, posterior).pop(stack)
    array([5, 0, 7])

    Args:
        prior: codec of z.
        likelihood: ``z -> codec of x``.
        posterior: ``x -> codec of z``; must be able to code whatever the prior can.
    """

    def __init__(
        self, prior: Codec, likelihood: Callable[[Symbols], Codec], posterior: Callable[[Symbols], Codec]
    ) -> None:
        self.prior, self.likelihood, self.posterior = prior, likelihood, posterior

    def push(self, stack: Stack, symbols: Symbols) -> None:
        posterior = self.posterior(symbols)
        with stack.stirred():
            z = posterior.pop(stack)
        self.likelihood(z).push(stack, symbols)
        self.prior.push(stack, z)

    def pop(self, stack: Stack) -> Symbols:
        z = self.prior.pop(stack)
        x = self.likelihood(z).pop(stack)
        posterior = self.posterior(x)
        with stack.stirred():
            posterior.push(stack, z)
        return x


def bit_swap(
    prior: Codec,
    likelihoods: Sequence[Callable[[Symbols], Codec]],
    posteriors: Sequence[Callable[[Symbols], Codec]],
) -> Codec:
    """The codec of a Markov chain of latent layers x ← z1 ← … ← zL with a posterior x → z1 → … → zL.

    Args:
        prior: codec of zL.
        likelihoods: ``z1 -> codec of x``, ``z2 -> codec of z1``, …
        posteriors: ``x -> codec of z1``, ``z1 -> codec of z2``, …
    """
    codec = prior
    for likelihood, posterior in reversed(list(zip(likelihoods, posteriors, strict=True))):
        codec = BitsBack(codec, likelihood, posterior)
    return codec


# --------------------------------------------------------------------------------------------------------------
# The ramp
# --------------------------------------------------------------------------------------------------------------

_HEADER = struct.Struct("<HHBB")
#: Limits of a schedule; they bound the number of steps of the ramp by about 70,000.
_LIMITS = {"lanes": (1, 65535), "opening": (1, 65535), "batch_log2": (4, 16), "growth": (1, 255)}
#: Rows of the trial that the schedule is chosen by, and cells for each of its lanes.
TRIAL_ROWS, _TRIAL_CELLS = 16, 1024
#: Bytes of code from which on more lanes are worth their price.
_MUCH = 200_000


@dataclass(frozen=True)
class Step:
    """Rows ``first`` … ``stop − 1`` are coded together, on so many lanes."""

    first: int
    stop: int
    lanes: int


@dataclass(frozen=True)
class Schedule:
    """How many rows are coded at once, and on how many lanes: a function of the number of rows alone.

    After ``done`` rows the next batch has done · growth / 64 rows, at least 1, and the coder lanes / 32 (or 1) and
    done · opening / 16 more, both at most what is given; so every step spends what the rows before it earned, but for
    the first lanes, without which the first row would take as long as a batch.

    Args:
        lanes: most lanes, 1 … 65535.
        opening: sixteenths of a lane opened for each row, 1 … 65535.
        batch_log2: log2 of the most rows in a batch, 4 … 16.
        growth: sixty-fourths of a row in the next batch for each row done, 1 … 255.

    >>> [(step.stop - step.first, step.lanes) for step in Schedule(8, 16, 4, 32).steps(40)]
    [(1, 1), (1, 2), (1, 3), (1, 4), (2, 5), (3, 7), (4, 8), (6, 8), (9, 8), (12, 8)]
    """

    lanes: int
    opening: int = 16
    batch_log2: int = 8
    growth: int = 13

    def __post_init__(self) -> None:
        for name, (low, high) in _LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: expected {low} … {high}, got {getattr(self, name)}")

    def _ramp(self, n: int) -> list[Step]:
        """The steps until batch and lanes have their full size: bounded, however many rows there are."""
        steps: list[Step] = []
        done, most, first = 0, 1 << self.batch_log2, max(1, self.lanes // 32)
        while done < n:
            rows = max(1, min(most, done * self.growth // 64))
            lanes = min(self.lanes, first + done * self.opening // 16)
            if rows == most and lanes == self.lanes:
                break
            steps.append(Step(done, min(done + rows, n), lanes))
            done += rows
        return steps

    def _tail(self, ramp: list[Step], n: int) -> range:
        return range(ramp[-1].stop if ramp else 0, n, 1 << self.batch_log2)

    def _full(self, first: int, n: int) -> Step:
        return Step(first, min(first + (1 << self.batch_log2), n), self.lanes)

    def steps(self, n: int) -> Iterator[Step]:
        """The steps for ``n`` rows, as the encoder takes them."""
        ramp = self._ramp(n)
        return chain(ramp, (self._full(first, n) for first in self._tail(ramp, n)))

    def backwards(self, n: int) -> Iterator[Step]:
        """The same steps, as the decoder takes them."""
        ramp = self._ramp(n)
        return chain((self._full(first, n) for first in reversed(self._tail(ramp, n))), reversed(ramp))


# --------------------------------------------------------------------------------------------------------------
# All rows of a chunk
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Payload:
    """The coded rows of a chunk, with what they cost.

    Args:
        data: the bytes: lanes, opening (16 bits each), batch_log2, growth (8 bits each), then the words of the stack,
            all with the least significant byte first.
        rows: number of rows.
        ideal_bits: what the integer tables promise: the sum of −log2 p over all rows, net of bits-back.
        initial_bits: what was borrowed at the start; it stays in the data.
        schedule: batches and lanes.
    """

    data: bytes
    rows: int
    ideal_bits: float
    initial_bits: int
    schedule: Schedule


def encode_rows(
    codec: ModelCodec,
    x: Any,
    condition: Any | None = None,
    lanes: int | None = None,
    *,
    schedule: Schedule | None = None,
    progress: Callable[[int], None] | None = None,
) -> Payload:
    """Code a batch of rows, all that a chunk holds.

    Args:
        codec: of the model.
        x: the rows, ``(n, *shape)``, a tensor or an array.
        condition: one row for each, or None.
        lanes: most lanes of the coder; by default as many as cost about 0.1 % of the data.
        schedule: batches and lanes; by default chosen by coding a few rows on trial.
        progress: called after each step with the number of rows done.
    """
    n = len(x)
    if schedule is None:
        schedule = choose_schedule(x.shape, trial(codec, x, condition), lanes)
    stack = Stack()
    for step in schedule.steps(n):
        stack.resize(step.lanes)
        codec.push(stack, x[step.first : step.stop], _rows(condition, step))
        if progress is not None:
            progress(step.stop)
    header = _HEADER.pack(schedule.lanes, schedule.opening, schedule.batch_log2, schedule.growth)
    data = header + stack.to_words().astype("<u4").tobytes()
    return Payload(data, n, stack.bits, 32 * stack.supplied, schedule)


def decode_rows(
    codec: ModelCodec,
    data: bytes,
    n: int,
    condition: Any | None = None,
    present: Any | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Decode what :func:`encode_rows` coded.

    Args:
        codec: of the same model.
        data: of the payload.
        n: number of rows.
        condition: as it was given to the encoder.
        present: bool mask ``(n, *shape)`` of the cells that are there, or None if all are.
        progress: called after each step with the number of rows done.

    Returns:
        the rows, of the type that the codec pops.

    Raises:
        Damaged: the bytes are not as they were written, as far as the coder can tell: every message must end in the
            words that it began with.
    """
    if len(data) < _HEADER.size or (len(data) - _HEADER.size) % 4:
        raise Damaged(f"coded rows: expected {_HEADER.size} bytes and a whole number of words, got {len(data)} bytes")
    try:
        schedule = Schedule(*_HEADER.unpack_from(data))
    except ValueError as error:
        raise Damaged(f"coded rows: {error}") from None
    words = np.frombuffer(data, "<u4", offset=_HEADER.size)
    stack: Stack | None = None
    batches: list[Any] = []
    done = 0
    for step in schedule.backwards(n):
        if stack is None:
            stack = Stack.from_words(words, step.lanes)
        else:
            stack.resize(step.lanes)
        size = step.stop - step.first
        batches.append(codec.pop(stack, size, _rows(condition, step), _rows(present, step)))
        done += size
        if progress is not None:
            progress(done)
    if stack is None:  # no rows
        stack = Stack.from_words(words, 1)
        batches.append(codec.pop(stack, 0, _rows(condition, Step(0, 0, 1)), _rows(present, Step(0, 0, 1))))
    stack.resize(1)  # as it was before the first step
    stack.finish()
    batches.reverse()
    return torch.cat(batches) if isinstance(batches[0], torch.Tensor) else np.concatenate(batches)


@dataclass(frozen=True)
class Trial:
    """What rows cost on trial, in bits a row: what a row earns, and what it borrows from the bits below."""

    earned: float
    borrowed: float


def trial(codec: ModelCodec, x: Any, condition: Any | None = None) -> Trial:
    """Code a few of the rows, from all over them."""
    n, cells = len(x), max(1, math.prod(x.shape[1:]))
    if not n:
        return Trial(1.0, 0.0)
    rows = min(n, TRIAL_ROWS)
    chosen = slice(0, n // rows * rows, n // rows)
    stack = Stack(min(max(rows * cells // _TRIAL_CELLS, 1), 64))
    codec.push(stack, x[chosen], None if condition is None else condition[chosen])
    return Trial(max(stack.bits, 1.0) / rows, 32 * (stack.supplied - stack.lanes) / rows)


def choose_schedule(shape: Sequence[int], tried: Trial, lanes: int | None = None) -> Schedule:
    """Batches and lanes that suit rows of such an array, by what a few of them earned and borrowed.

    * opening: a quarter of the bits earned goes into lanes;
    * growth: a step borrows less than half of what was earned; a codec that borrows nothing doubles;
    * batch: about 2^19 cells;
    * lanes: one for 750 bytes of code, or where there are 200 kB for 500 bytes; 0.09 or 0.14 % of it; at most 4096.
    """
    n, cells = shape[0], max(1, math.prod(shape[1:]))
    batch_log2 = min(max(19 - (cells - 1).bit_length(), 6), 12)
    if n == 0:
        return Schedule(lanes or 1, batch_log2=batch_log2)
    if lanes is None:
        size = tried.earned * n / 8
        lanes = int(min(max(size / (750 if size < _MUCH else 500), 1), 4096))
    opening = int(min(max(16 * tried.earned / 128, 1), 65535))
    growth = int(min(max(64 * 0.45 * tried.earned / tried.borrowed, 1), 64)) if tried.borrowed > 0 else 64
    return Schedule(lanes, opening, batch_log2, growth)


def _rows(values: Any | None, step: Step) -> Any | None:
    return None if values is None else values[step.first : step.stop]
