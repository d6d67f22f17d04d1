"""Checks of a model's codec: it gives back every bit, in another process too, at the length that the bound promises."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from likely.checks.cases import Case, Stage
from likely.checks.elsewhere import decode_elsewhere
from likely.checks.estimates import SIGMAS, repeat, row_noise
from likely.checks.outcome import Skipped, require
from likely.checks.probability import hold_alike, hold_frequencies
from likely.checks.source import cells_of
from likely.coding.bits_back import Schedule, decode_rows, encode_rows
from likely.coding.codec import ModelCodec
from likely.coding.rows import Rows
from likely.coding.stack import Stack
from likely.contract import Model, NoCodec, Reals, Table
from likely.units import bits

#: The grid on which reals are coded.
GRID = {"spacing": 2.0**-8, "bound": 16.0}
#: Few steps, for few rows.
SCHEDULE = Schedule(lanes=4, opening=8, batch_log2=6, growth=255)
#: Rows that are coded to be decoded, and rows whose length is held against the bound.
ROWS, MEASURED = 64, 2048
#: What a code may exceed the bound by: a share of it, and bits a row.
SHARE, BITS_A_ROW = 0.003, 0.002


@dataclass(frozen=True)
class _Coder:
    """A codec with the arguments that it was made with, and what its cells' values are."""

    model: Model
    codec: ModelCodec
    arguments: dict[str, Any]
    rows: Rows

    @classmethod
    def of(cls, model: Model) -> _Coder:
        """The codec of a model; on a grid where it is over reals."""
        arguments: dict[str, Any] = dict(GRID) if isinstance(model.space, Reals) else {}
        try:
            codec = model.codec(**arguments)
        except NoCodec as reason:
            raise Skipped(f"no codec: {reason}") from None
        return cls(model, codec, arguments, Rows(model.space, arguments.get("spacing")))

    def brought(self, x: Tensor) -> Tensor:
        """The values of a batch as the codec gives them back."""
        if self.arguments:
            x = x.clamp(-self.arguments["bound"], self.arguments["bound"])
        return self.rows.values(*self.rows.symbols(x))

    def log_spacing(self, x: Tensor) -> Tensor:
        """Σ log of the spacing of each observed number that has a density, nats, shape ``(batch,)``."""
        space, cells = self.model.space, x.flatten(1)
        total = torch.zeros(len(x), dtype=torch.float64)
        if self.arguments:
            return total + (~torch.isnan(cells)).sum(1) * math.log(self.arguments["spacing"])
        for j, column in enumerate(space.columns if isinstance(space, Table) else ()):
            if not column.has_probability:
                size = torch.exp2(torch.frexp(cells[:, j].double())[1].double() - 53.0)
                total += torch.where(torch.isnan(cells[:, j]), 0.0, size.log())
        return total


@torch.no_grad()
def codec_round_trip(case: Case) -> str:
    """Rows of the source, rows far from it and none at all come back to the bit, also in another process."""
    coder = _Coder.of(case.trained)
    x, condition = case.draw(ROWS, salt=15)
    x = coder.brought(torch.cat([x[: ROWS // 2].double(), _unlikely(case, ROWS // 2)]))
    legal = coder.codec.legal(x)
    require(bool(legal[: ROWS // 2].all()), "legal: expected all cells of the source's rows to be so")
    kept = legal.flatten(1).all(1)
    x, condition = x[kept], None if condition is None else condition[kept]
    holes = torch.isnan(x) if x.is_floating_point() else torch.zeros(x.shape, dtype=torch.bool)
    present = None if not holes.any() else (~holes)
    payload = encode_rows(coder.codec, x, condition, schedule=SCHEDULE)
    here = decode_rows(coder.codec, payload.data, len(x), condition, None if present is None else present.numpy())
    _hold_same(x, here, "decoded")
    if type(case.trained).__module__.startswith("likely."):
        away = decode_elsewhere(case.trained, payload.data, len(x), condition, present, **coder.arguments)
        _hold_same(x, away, "decoded in another process")
    none = None if condition is None else condition[:0]
    nothing = encode_rows(coder.codec, x[:0], none, schedule=SCHEDULE)
    empty = decode_rows(coder.codec, nothing.data, 0, none)
    require(tuple(empty.shape) == (0, *case.space.shape), f"no rows: expected none back, got {tuple(empty.shape)}")
    training = copy.deepcopy(case.trained).train()
    again = encode_rows(training.codec(**coder.arguments), x, condition, schedule=SCHEDULE)
    require(again.data == payload.data, "a codec made of the model in training mode writes other bytes")
    require(training.training, "making a codec has changed the model's mode")
    return f"{len(x)} rows in {len(payload.data)} bytes"


def _unlikely(case: Case, n: int) -> Tensor:
    """Rows at random among all codes, and numbers up to thousands of times as large as the source's; half of them."""
    x = case.draw(n, salt=16)[0].double()
    flat = x.reshape(n, -1)
    generator = torch.Generator().manual_seed(case.seed)
    for j, cell in enumerate(cells_of(case.space)):
        far = torch.rand(n, generator=generator) < 0.5
        if cell.levels is not None:
            other = torch.randint(cell.levels, (n,), generator=generator).double()
        else:
            other = flat[:, j] * torch.randint(2, 5000, (n,), generator=generator)
        flat[:, j] = torch.where(far & ~torch.isnan(flat[:, j]), other, flat[:, j])
    return x


def _hold_same(x: Tensor, other: Tensor, what: str) -> None:
    require(tuple(other.shape) == tuple(x.shape), f"{what}: expected shape {tuple(x.shape)}, got {tuple(other.shape)}")
    same = (x == other) | (torch.isnan(x.double()) & torch.isnan(other.double()))
    if not same.all():
        index = tuple(int(i) for i in (~same).nonzero()[0])
        require(False, f"{what}: expected {x[index].item()} at {list(index)}, got {other[index].item()}")


@torch.no_grad()
def codec_length(case: Case) -> str:
    """The code is as long as the bound says: no longer, and where the bound is exact no shorter either."""
    coder = _Coder.of(case.trained)
    x, condition = case.draw(MEASURED, salt=17)
    return _hold_length(coder, x, condition)


@torch.no_grad()
def codec_absent_cells(case: Case) -> str:
    """Rows without one of their columns, or without any cell, cost what the bound says of the other cells."""
    cells = cells_of(case.space)
    if not any(cell.missing for cell in cells):
        raise Skipped("no cell may be missing")
    coder = _Coder.of(case.trained)
    x, condition = case.draw(MEASURED, salt=18)
    may = [j for j, cell in enumerate(cells) if cell.missing]
    for dropped in [*([j] for j in may), may]:
        without = x.double().clone()
        without.reshape(len(x), -1)[:, dropped] = math.nan
        said = _hold_length(coder, without, condition, f"without cells {dropped}: ")
    return said


def _hold_length(coder: _Coder, x: Tensor, condition: Tensor | None, label: str = "") -> str:
    x = coder.brought(x)
    stack = Stack(lanes=16)
    before = stack.size_bits - 32.0 * stack.supplied
    coder.codec.push(stack, x, condition)
    length = stack.bits
    written = stack.size_bits - 32.0 * stack.supplied - before
    slack = 0.002 * abs(length) + 64.0
    require(abs(written - length) < slack, f"{label}{written:.1f} bits were written for {length:.1f} of the tables")
    nats, error, both = _promised(coder.model, x, condition)
    promise = float(-bits(nats + coder.log_spacing(x).sum()))
    shown = f"{label}{length / len(x):.4f} bits a row, {promise / len(x):.4f} promised"
    allowed = SHARE * abs(promise) + BITS_A_ROW * len(x) + SIGMAS * float(bits(error))
    require(length < promise + allowed, f"the code is longer than the bound: {shown}")
    require(not both or length > promise - allowed, f"the code is shorter than the probabilities allow: {shown}")
    return shown


def _promised(model: Model, x: Tensor, condition: Tensor | None) -> tuple[Tensor, Tensor, bool]:
    """What all rows together should cost, the standard error that the codec's own draws bring, and whether exactly so.

    A codec of latent variables costs the one-sample bound, E log w, whatever the model's own bound is.
    """
    n = len(x)
    if model.can("log_weights"):
        log_w = model.log_weights(x, condition, 16, row_noise(7, n)).double()  # type: ignore[operator]
        return log_w.mean(1).sum(), (log_w.var(1).sum() * (1.0 + 1.0 / 16)).sqrt(), True
    bound = model.bound(x, condition, row_noise(7, n))
    again = torch.stack([model.bound(x, condition, row_noise(seed, n)).nats.double() for seed in range(8, 12)])
    nats = torch.cat([bound.nats.double()[None], again])
    return nats.mean(0).sum(), (nats.var(0).sum() * (1.0 + 1.0 / 5)).sqrt(), bound.kind == "exact"


def codec_frequencies(case: Case) -> str:
    """Rows popped from random bits come as often as the model says, or, where only samples tell, as its samples."""
    stage = case.stages[0]
    codec = _Coder.of(stage.model).codec
    if stage.points.replicates > 1 and stage.precise.can("log_weights"):  # masses of importance weights are not sharp
        return hold_alike(case, stage, lambda i: _popped(case, stage, i, codec))
    return hold_frequencies(case, [stage], lambda stage, i: _popped(case, stage, i, codec))


@torch.no_grad()
def _popped(case: Case, stage: Stage, i: int, codec: ModelCodec) -> Tensor:
    """As many rows as there are samples, drawn by the codec under a condition."""
    n, condition = len(stage.samples[i]), case.conditions[i]
    return codec.pop(Stack(lanes=64), n, repeat(condition, n))
