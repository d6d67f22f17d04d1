"""Numeric columns of a table that follow a normal guess: what the guess is for the numbers of the table's head.

The head's logistics begin as the normal law, and its atoms are tilted by it; a network then adds to these numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from likely.distributions.heads import TableHead

#: A numeric column with far outliers and a value of a larger share (beyond those around it) follows no normal guess.
MOST_ATOM = 0.5
#: Standard deviations from which on values are far away.
FAR = 8.0
#: Least deviation of a guess, in standard units.
LEAST_DEVIATION = 0.01
#: Largest change of an atom's logit by a guess.
_MOST_TILT = 6.0
#: Of the mean of atoms: steps of Newton's method, their largest, the largest slope of the logits, and how near to the
#: outermost atoms it may come, as a share of their distance.
_NEWTON_STEPS, _MOST_STEP, _MOST_SLOPE, _EDGE = 6, 8.0, 80.0, 1e-3

#: N(0, 1) as K logistics: spacing of the means, scale, and v of the weights ∝ exp(−m²/2v), for the least divergence
#: (nats: 0.0095, 0.0022, 0.0007, 0.0003, 0.00014, 0.00007 for K = 1 … 6, 0.00002 for K = 10).
_NORMAL = {
    1: (0.343, 0.572, 0.567),
    2: (1.1171, 0.4637, 0.5107),
    3: (0.9769, 0.4078, 0.6232),
    4: (0.8749, 0.3739, 0.6332),
    5: (0.7930, 0.3491, 0.6576),
    6: (0.7246, 0.3299, 0.6821),
    8: (0.6167, 0.3021, 0.7220),
    10: (0.5351, 0.2833, 0.7501),
}


def following(
    head: TableHead,
    follows: Tensor,
    mean: Tensor,
    deviation: Tensor,
    near: tuple[Tensor, ...] | None = None,
    atom_logits: Tensor | None = None,
) -> Tensor:
    """Numbers of the numeric columns that follow a normal guess: shape ``(n, columns · per_column)``.

    The logistics become the normal law, and the logit of an atom v gets log N(v; mean, deviation²) − log N(v; 0, 1)
    in standard units: what the guess makes of v beside what the column's marginal does.

    Args:
        follows: which columns do, shape ``(columns, 1)``; see :func:`follow`.
        mean, deviation: of the guess, in standard units, shape ``(n, columns)``.
        near: numbers of some of the columns, and mean, deviation and share of another normal law that is mixed into
            theirs; the logistics become the normal law with the mixture's mean and variance.
        atom_logits: logits of the atoms before the guess, shape ``(columns, atoms)``; with them the atoms are tilted
            further, until their mean is the guess's.
    """
    z = ((head.atoms - head.location.unsqueeze(1)) / head.unit.unsqueeze(1)).to(mean).clamp(-FAR, FAR)
    tilt = _tilt(z, mean, deviation.clamp(min=LEAST_DEVIATION))
    if near is not None:
        some, nearer, spread, share = near
        other = _tilt(z[some], nearer, spread.clamp(min=LEAST_DEVIATION))
        tilt = tilt.index_copy(1, some, _mixed(tilt[:, some], other, share.unsqueeze(2)))
        moments = _moments(mean[:, some], deviation[:, some], nearer, spread, share)
        mean, deviation = (old.index_copy(1, some, new) for old, new in zip((mean, deviation), moments))
    k, count, atoms = head.components, len(head.numeric), head.atoms.shape[1]
    follows = follows.to(mean).squeeze(1)
    spread = deviation.clamp(min=LEAST_DEVIATION)
    means = (mean.unsqueeze(2) + spread.unsqueeze(2) * normal_means(k).to(mean)) * follows.unsqueeze(1)
    scales = (spread.log() * follows).unsqueeze(2).expand(-1, -1, k)
    blank = mean.new_zeros(len(mean), count, k)
    pieces = [blank, means, scales]
    if atoms:
        tilt = tilt.clamp(-_MOST_TILT, _MOST_TILT)
        tilt = tilt if atom_logits is None else _with_mean(tilt, atom_logits.to(mean), head.has_atom, z, mean)
        pieces.append(tilt * follows.unsqueeze(1))
    if head.recall:
        pieces.append(mean.new_zeros(len(mean), count, 1))
    return torch.cat(pieces, 2).flatten(1)


def follow(head: TableHead, bias: Tensor, i: int, cells: Tensor) -> bool:
    """Let a numeric column follow a normal guess, unless most of it is one value and the rest is far away.

    Its logistics begin as a normal law, its atoms with what they have beyond the values around them.

    Args:
        bias: numbers of the column in the head's output, which are set.
        i: place of the column among the numeric ones.
        cells: its values.

    Returns:
        Whether it follows.
    """
    k, share = head.components, 0.0
    if k not in _NORMAL:
        return False
    if head.atoms.shape[1] and head.has_atom[i].any():
        beyond = _beyond(cells, head.atoms[i][head.has_atom[i]], float(head.resolution[i]), float(head.unit[i]))
        far = (cells[~torch.isnan(cells)] - head.location[i].cpu()).abs().max() / head.unit[i].cpu()
        if beyond.max() > MOST_ATOM and far > FAR:
            return False
        bias[3 * k : 3 * k + head.atoms.shape[1]][head.has_atom[i]] = beyond.log().to(bias)
        share = float(beyond.sum())
    if head.recall and head.recalled_sizes[i] > 0:
        share += float(bias[-1].exp())
    _, scale, v = _NORMAL[k]
    weights = torch.log_softmax(-normal_means(k).square() / (2.0 * v), 0)
    bias[:k] = weights + math.log(max(1.0 - share, 0.05))
    bias[k : 2 * k] = 0.0
    bias[2 * k : 3 * k] = math.log(scale)
    return True


def _tilt(z: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """log N(z; mean, deviation²) − log N(z; 0, 1), shape ``(n, columns, values)`` of z ``(columns, values)``."""
    away = (z - mean.unsqueeze(2)) / deviation.unsqueeze(2)
    return 0.5 * z.square() - 0.5 * away.square() - deviation.log().unsqueeze(2)


def _with_mean(tilt: Tensor, logits: Tensor, some: Tensor, z: Tensor, mean: Tensor) -> Tensor:
    """The tilt + λ z, brought to the same total, for which the mean of ``some`` atoms is ``mean``.

    Of all laws of that mean it has the least divergence from the one that it begins with (Kullback 1959, chapter 3).
    λ is found by Newton's method on the logit of the mean's place between the outermost atoms, which is nearly linear
    in λ; for a guess with a deviation below a tenth a few steps may leave the mean a tenth from its own.
    """
    slots = max(1, int(some.sum(1).max()))  # atoms stand before the empty places
    start, values = (logits + tilt)[:, :, :slots].masked_fill(~some[:, :slots], -torch.inf), z[:, :slots]
    start = start.masked_fill(~some.any(1, keepdim=True), 0.0)
    lowest = torch.where(some[:, :slots], values, FAR).amin(1)
    highest = torch.where(some[:, :slots], values, -FAR).amax(1)
    width = (highest - lowest).clamp(min=1e-6)
    target = torch.logit((mean - lowest) / width, eps=_EDGE)
    slope = torch.zeros_like(mean)
    for _ in range(_NEWTON_STEPS):
        share = (start + slope.unsqueeze(2) * values).softmax(2)
        now = (share * values).sum(2)
        spread = (share * (values - now.unsqueeze(2)).square()).sum(2)
        place = ((now - lowest) / width).clamp(_EDGE / 10.0, 1.0 - _EDGE / 10.0)
        rate = spread / (width * place * (1.0 - place))
        step = (target - torch.logit(place)) / rate.clamp(min=1e-3)
        slope = (slope + step.clamp(-_MOST_STEP, _MOST_STEP)).clamp(-_MOST_SLOPE, _MOST_SLOPE)
    more = slope.unsqueeze(2) * z
    total = (start + more[:, :, :slots]).logsumexp(2, keepdim=True) - start.logsumexp(2, keepdim=True)
    return tilt + more - total


def _mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Logarithm of a mixture of two laws."""
    top = torch.maximum(first, second)
    return top + ((1.0 - share) * (first - top).exp() + share * (second - top).exp()).log()


def _moments(mean: Tensor, deviation: Tensor, nearer: Tensor, spread: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a mixture of two laws."""
    apart = nearer - mean
    within = (1.0 - share) * deviation.square() + share * spread.square()
    return mean + share * apart, (within + (1.0 - share) * share * apart.square()).sqrt()


def _beyond(cells: Tensor, atoms: Tensor, step: float, unit: float) -> Tensor:
    """Share of the cells that each atom has beyond the values around it, within a quarter of a deviation; positive."""
    values = cells[~torch.isnan(cells)].to(atoms)
    reach = max(1, round(0.25 * unit / step))
    excess = []
    for atom in atoms:
        distance = ((values - atom) / step).round().abs()
        around = ((distance <= reach) & (distance > 0)).double().mean() / (2 * reach)
        excess.append((distance == 0).double().mean() - around)
    return torch.stack(excess).clamp(min=1e-4)


def normal_means(k: int) -> Tensor:
    """Means of the K logistics that are nearly N(0, 1)."""
    spacing = _NORMAL[k][0] if k in _NORMAL else 0.0
    return spacing * (torch.arange(k, dtype=torch.float64) - (k - 1) / 2)
