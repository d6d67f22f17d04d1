"""Data as real numbers that can be diffused: f(x), the reconstruction log p(x | z_0), and draws from it.

The chain ends in z_0 = α_0 f(x) + σ_0 ε, so that y = z_0/α_0 = f(x) + exp(γ_0/2) ε is the example with a little noise.
For every kind of cell there is one home for what belongs to it:

    levels (Binary, Integers)    f(k) = 2(k + ½)/L − 1;   p(k | y) ∝ exp(−(y − f(k))² / 2 exp(γ_0))   (arXiv 2107.00630)
    symbols, categories          f(k) = e_k, learned;     p(k | y) ∝ π_k exp(−|y − e_k|² / 2 exp(γ_0)), π learned: the
                                 best of all decoders that see the cell's own y
    numbers with a density       f(x) = T(x);             p(x | y) = N(T(x); y, exp(γ_0)) T'(x)
    numbers on a grid            f(x) = middle of T(x ± r/2);  p(x | y) = ∫ N(t; y, exp(γ_0)) dt over that interval

T standardises; in a table it is asinh of the standardised value, which tames heavy tails.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from likely.contract import Batches, Binary, Integers, Reals, Space, Table, Tokens, Unsupported
from likely.data.streaming import Seen
from likely.distributions.categorical import sample_categories
from likely.distributions.grid_normal import log_cell_mass
from likely.networks import Features
from likely.networks.conditioning import without_autocast
from likely.noise import Noise

#: Half a cell of the grid is so many deviations of the noise at γ_0: the rest of the reconstruction is 0.01 bits a
#: cell.
HALF_CELL = 3.02
#: γ_0 of cells with a density, and the least that is chosen for a grid.
CONTINUUM, LEAST = -10.0, -13.3


def gamma_of_spacing(spacing: float) -> float:
    """γ_0 at which half the spacing of f is 3.02 deviations of the noise: −13.3 for 8-bit data in [−1, 1].

    >>> round(gamma_of_spacing(2 / 256), 1)
    -13.3
    """
    return 2.0 * math.log(0.5 * spacing / HALF_CELL)


class Data(Protocol):
    """One kind of space.  ``shape`` is that of f, ``gamma`` the γ_0 that suits it."""

    shape: tuple[int, ...]
    gamma: float

    def embed(self, x: Tensor) -> Tensor:
        """f(x) of complete examples: shape ``(batch, *shape)``."""
        ...

    def log_likelihood(self, x: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        """log p(x | y) of every cell of complete examples at γ_0 (a scalar), nats: shape ``(batch, *space.shape)``."""
        ...

    def draw(self, y: Tensor, gamma: Tensor, noise: Noise | None) -> Tensor:
        """A draw of p(x | y), or its most probable value without noise: ``(batch, *space.shape)``."""
        ...

    def to_cells(self, values: Tensor) -> Tensor:
        """Sums over the coordinates of each cell: ``(batch, *shape)`` to ``(batch, *space.shape)``."""
        ...

    def to_coordinates(self, cells: Tensor) -> Tensor:
        """Each cell's value at all its coordinates: ``(batch, *space.shape)`` to ``(batch, *shape)``."""
        ...

    def initialise(self, batches: Batches) -> None:
        """Set what depends on the data, in a pass over it."""
        ...


def make_data(space: Space, embedding_dim: int = 8) -> LevelData | RealData | SymbolData | TableData:
    """The kind of data of a space.

    >>> make_data(Integers((3, 8, 8), 256)).shape
    (3, 8, 8)
    """
    if isinstance(space, (Binary, Integers)):
        return LevelData(space)
    if isinstance(space, Reals):
        return RealData(space)
    if isinstance(space, Tokens):
        return SymbolData(space, embedding_dim)
    if isinstance(space, Table):
        return TableData(space, embedding_dim)
    raise Unsupported(f"diffusion is defined on Binary, Integers, Reals, Tokens, Table; got {type(space).__name__}")


class _OneCoordinate(nn.Module):
    """Cells of one coordinate each."""

    def to_cells(self, values: Tensor) -> Tensor:
        """Shape and values as they are."""
        return values

    def to_coordinates(self, cells: Tensor) -> Tensor:
        """Shape and values as they are."""
        return cells


class LevelData(_OneCoordinate):
    """Levels 0 … L − 1 as the middles of L equal parts of [−1, 1].

    The sum over levels in p(k | y) is taken over those near y alone, for the others add less than 10⁻¹⁷ of it.
    """

    def __init__(self, space: Binary | Integers) -> None:
        super().__init__()
        self.shape = space.shape
        self.levels = space.levels if isinstance(space, Integers) else 2
        self.gamma = gamma_of_spacing(2.0 / self.levels)
        self.window: int | None = None

    def _place(self, k: Tensor) -> Tensor:
        return (2.0 * k + 1.0) / self.levels - 1.0

    def embed(self, x: Tensor) -> Tensor:
        """f(x), in the floating type of x (float32 for whole numbers)."""
        return self._place(x if x.is_floating_point() else x.to(torch.get_default_dtype()))

    def _near(self, y: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Levels near y, and −(y − f)²/2 exp(γ_0) of each (−∞ outside the range): shape ``(*y.shape, window)``."""
        middle = ((y + 1.0) * (0.5 * self.levels) - 0.5).round().clamp(0, self.levels - 1)
        half = self.half_window(float(gamma.detach())) if self.window is None else self.window
        k = middle.detach().unsqueeze(-1) + torch.arange(-half, half + 1).to(y)
        logits = -0.5 * torch.exp(-gamma) * (y.unsqueeze(-1) - self._place(k)).square()
        return k, logits.masked_fill((k < 0) | (k > self.levels - 1), -math.inf)

    def settle(self, gamma: float) -> None:
        """Let γ_0 be fixed, so that how many levels are near is known."""
        self.window = self.half_window(gamma)

    def half_window(self, gamma: float) -> int:
        """Beyond so many levels from the nearest one, each adds less than exp(−40) of its term."""
        deviation = math.exp(0.5 * gamma) * 0.5 * self.levels  # of the noise, in levels
        return min(self.levels - 1, math.ceil(math.sqrt(0.25 + 80.0 * deviation**2) + 0.5))

    def log_likelihood(self, x: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        """log softmax over the levels, at level x."""
        _, logits = self._near(y, gamma)
        own = -0.5 * torch.exp(-gamma) * (y - self.embed(x).to(y)).square()
        return own - torch.logsumexp(logits, -1)

    def draw(self, y: Tensor, gamma: Tensor, noise: Noise | None) -> Tensor:
        """A level."""
        k, logits = self._near(y, gamma)
        if noise is None:
            chosen = logits.argmax(-1)
        else:
            chosen = sample_categories(logits.log_softmax(-1), noise.uniform(y.shape).to(y))
        return k.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)

    def initialise(self, batches: Batches) -> None:
        """Nothing to set."""


def _log_normal_mean(gamma: Tensor) -> Tensor:
    """E log N(f; y, exp(γ_0)) over y = f + exp(γ_0/2) ε, in closed form."""
    return -0.5 * (1.0 + math.log(2.0 * math.pi) + gamma)


class RealData(_OneCoordinate):
    """Real cells, standardised; the noise is integrated out of the reconstruction."""

    gamma = CONTINUUM

    def __init__(self, space: Reals) -> None:
        super().__init__()
        self.shape = space.shape
        self.features = Features(Reals(space.shape, missing=True))

    def embed(self, x: Tensor) -> Tensor:
        """(x − m)/s, in float64 where the buffers are."""
        return (x.to(self.features.mean) - self.features.mean) / self.features.scale

    def log_likelihood(self, x: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        """Its expectation over y: −½ (1 + log 2π + γ_0) − log s."""
        return (_log_normal_mean(gamma) - self.features.scale.log()).to(y).expand(y.shape)

    def draw(self, y: Tensor, gamma: Tensor, noise: Noise | None) -> Tensor:
        """m + s (y + exp(γ_0/2) ξ)."""
        standard = y if noise is None else y + torch.exp(0.5 * gamma) * noise.normal(y.shape).to(y)
        return (self.features.mean + self.features.scale * standard).to(y)

    def initialise(self, batches: Batches) -> None:
        """Mean and deviation of every cell."""
        self.features.initialise(batches)


class Codes(nn.Module):
    """Categories as learned points e_k, and their posterior given a noisy point.

    The points start at the corners of a cube, code k at the signs of its binary digits (Chen, Zhang & Hinton 2022,
    arXiv 2208.04202), which are 2 apart.

    Args:
        levels: number of categories.
        most: largest dimension of the points; as many as the digits need otherwise.
    """

    def __init__(self, levels: int, most: int) -> None:
        super().__init__()
        digits = max(1, (levels - 1).bit_length())
        k = torch.arange(levels).unsqueeze(1)
        bits = (k >> torch.arange(digits)) & 1
        points = 2.0 * bits - 1.0
        if digits > most:  # corners of a smaller cube would coincide
            points = points @ torch.linalg.qr(torch.randn(digits, digits))[0][:, :most]
        self.points = nn.Parameter(points)
        self.log_shares = nn.Parameter(torch.zeros(levels))

    @property
    def width(self) -> int:
        """Dimension of the points."""
        return self.points.shape[1]

    def log_probs(self, y: Tensor, gamma: Tensor) -> Tensor:
        """log p(k | y), shape ``(*lead, levels)`` for y of shape ``(*lead, width)``."""
        points = self.points.to(y)
        with without_autocast(y):
            scores = y @ points.t() - 0.5 * points.square().sum(1)  # −|y − e|²/2 up to a term without k
        return torch.log_softmax(self.log_shares.to(y) + torch.exp(-gamma) * scores, -1)

    def log_prob(self, codes: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        """log p(k | y) at the codes (int64, shape ``lead``)."""
        return self.log_probs(y, gamma).gather(-1, codes.unsqueeze(-1)).squeeze(-1)

    def draw(self, y: Tensor, gamma: Tensor, noise: Noise | None) -> Tensor:
        """A code, or the most probable one without noise (int64)."""
        log_probs = self.log_probs(y, gamma)
        if noise is None:
            return log_probs.argmax(-1)
        return sample_categories(log_probs, noise.uniform(log_probs.shape[:-1]).to(y))

    @torch.no_grad()
    def count(self, counts: Tensor) -> None:
        """Set π from the counts of the categories."""
        self.log_shares.copy_(torch.log((counts + 0.5) / (counts + 0.5).sum()))


def _counts(codes: Tensor, levels: int) -> Tensor:
    """How often each category occurs, missing cells apart; float64."""
    codes = codes.double()
    return torch.bincount(codes[~torch.isnan(codes)].long(), minlength=levels).double().cpu()


class SymbolData(nn.Module):
    """A sequence of symbols: each has the coordinates of its point, which is the same at every place."""

    gamma = gamma_of_spacing(2.0)

    def __init__(self, space: Tokens, embedding_dim: int) -> None:
        super().__init__()
        self.codes = Codes(space.vocab, embedding_dim)
        self.length = space.length
        self.shape = (space.length * self.codes.width,)

    def embed(self, x: Tensor) -> Tensor:
        """The points of the symbols, one after another."""
        return self.codes.points[x.long()].flatten(1)

    def log_likelihood(self, x: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        """log p(k | y) of every symbol."""
        return self.codes.log_prob(x.long(), y.unflatten(1, (self.length, -1)), gamma)

    def draw(self, y: Tensor, gamma: Tensor, noise: Noise | None) -> Tensor:
        """Symbols."""
        return self.codes.draw(y.unflatten(1, (self.length, -1)), gamma, noise).to(y.dtype)

    def to_cells(self, values: Tensor) -> Tensor:
        """Sums over the coordinates of each symbol."""
        return values.unflatten(1, (self.length, -1)).sum(-1)

    def to_coordinates(self, cells: Tensor) -> Tensor:
        """Each symbol's value at its coordinates."""
        return cells.repeat_interleave(self.codes.width, 1)

    def initialise(self, batches: Batches) -> None:
        """π from the symbols' counts."""
        levels = len(self.codes.points)
        total = torch.zeros(levels, dtype=torch.float64)
        for x, _ in batches:
            total += _counts(x.flatten(), levels)
        self.codes.count(total)


class TableData(nn.Module):
    """A row: first the numeric columns, one coordinate each, then the points of the coded ones.

    Arithmetic on numbers is float64, for a value and the edges of its cell differ in their last digits.
    """

    resolution: Tensor
    owner: Tensor

    def __init__(self, space: Table, embedding_dim: int) -> None:
        super().__init__()
        self.columns = space.columns
        self.numeric = [j for j, column in enumerate(space.columns) if column.numeric]
        self.coded = [j for j, column in enumerate(space.columns) if column.coded]
        resolution = [space.columns[j].resolution or 0.0 for j in self.numeric]
        self.register_buffer("resolution", torch.tensor(resolution, dtype=torch.float64), persistent=False)
        self.codes = nn.ModuleList(Codes(space.columns[j].levels or 1, embedding_dim) for j in self.coded)
        self.numbers = Features(Reals((len(self.numeric),), missing=True)) if self.numeric else None
        owner = list(self.numeric)
        for j, codes in zip(self.coded, self._codes()):
            owner += [j] * codes.width
        self.register_buffer("owner", torch.tensor(owner), persistent=False)
        self.shape = (len(owner),)
        self.gamma = CONTINUUM  # until the data are seen

    def _codes(self) -> list[Codes]:
        return list(self.codes)  # type: ignore[arg-type]

    def _map(self, values: Tensor) -> Tensor:
        assert self.numbers is not None
        return torch.asinh((values - self.numbers.mean) / self.numbers.scale)

    def _interval(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Middle and width of T(x ± r/2) of the numeric columns, float64; the width is 0 on a continuum."""
        assert self.numbers is not None
        values = x[:, self.numeric].to(self.numbers.mean)
        upper, lower = self._map(values + 0.5 * self.resolution), self._map(values - 0.5 * self.resolution)
        return 0.5 * (upper + lower), upper - lower

    def embed(self, x: Tensor) -> Tensor:
        """T of the numbers and the points of the codes, float64."""
        pieces = []
        if self.numeric:
            pieces.append(self._interval(x)[0])
        pieces += [codes.points[x[:, j].long()].double() for j, codes in zip(self.coded, self._codes())]
        return torch.cat(pieces, 1)

    def log_likelihood(self, x: Tensor, y: Tensor, gamma: Tensor) -> Tensor:
        """Density, mass of the cell, or log p(k | y)."""
        columns: dict[int, Tensor] = {}
        if self.numeric:
            assert self.numbers is not None
            middle, width = self._interval(x)
            gamma_0 = gamma.to(middle)
            on_grid = self.resolution > 0
            scale = torch.exp(0.5 * gamma_0)
            mass = log_cell_mass(middle, y[:, : len(self.numeric)].to(middle), scale, torch.where(on_grid, width, 1.0))
            standard = (x[:, self.numeric].to(middle) - self.numbers.mean) / self.numbers.scale
            log_slope = -torch.log(self.numbers.scale) - 0.5 * torch.log1p(standard.square())
            values = torch.where(on_grid, mass, _log_normal_mean(gamma_0) + log_slope).to(y)
            columns.update(zip(self.numeric, values.unbind(1)))
        for j, codes, point in zip(self.coded, self._codes(), self._points(y)):
            columns[j] = codes.log_prob(x[:, j].long(), point, gamma)
        return torch.stack([columns[j] for j in range(len(self.columns))], 1)

    def _points(self, y: Tensor) -> Sequence[Tensor]:
        return y[:, len(self.numeric) :].split([codes.width for codes in self._codes()], 1) if self.coded else []

    def draw(self, y: Tensor, gamma: Tensor, noise: Noise | None) -> Tensor:
        """A row, float64; numbers on their grid."""
        columns: dict[int, Tensor] = {}
        if self.numeric:
            assert self.numbers is not None
            mapped = y[:, : len(self.numeric)].double()
            if noise is not None:
                mapped = mapped + torch.exp(0.5 * gamma.double()) * noise.normal(mapped.shape).double()
            # Far out of the data's range sinh would overflow; 30 is 10¹³ deviations.
            values = self.numbers.mean + self.numbers.scale * torch.sinh(mapped.clamp(-30.0, 30.0))
            for j, value in zip(self.numeric, values.unbind(1)):
                column = self.columns[j]
                columns[j] = value if column.resolution is None else column.from_index(column.to_index(value))
        for j, codes, point in zip(self.coded, self._codes(), self._points(y)):
            columns[j] = codes.draw(point, gamma, noise).double()
        return torch.stack([columns[j] for j in range(len(self.columns))], 1)

    def to_cells(self, values: Tensor) -> Tensor:
        """Sums over the coordinates of each column."""
        return values.new_zeros(len(values), len(self.columns)).index_add(1, self.owner, values)

    def to_coordinates(self, cells: Tensor) -> Tensor:
        """Each column's value at its coordinates."""
        return cells[:, self.owner]

    def initialise(self, batches: Batches) -> None:
        """Location and scale of the numbers, π of the codes, and the γ_0 that the finest column asks for."""
        gammas = [gamma_of_spacing(2.0)]
        if self.numbers is not None:
            self.numbers.initialise(Seen(batches, lambda x: x[:, self.numeric]))
            for resolution, unit in zip(self.resolution.tolist(), self.numbers.scale.tolist()):
                gammas.append(max(gamma_of_spacing(resolution / unit), LEAST) if resolution else CONTINUUM)
        self.gamma = min(gammas)
        if self.coded:
            totals = [torch.zeros(len(codes.points), dtype=torch.float64) for codes in self._codes()]
            for x, _ in batches:
                for j, total in zip(self.coded, totals):
                    total += _counts(x[:, j], len(total))
            for codes, total in zip(self._codes(), totals):
                codes.count(total)
