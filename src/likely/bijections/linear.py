"""Linear maps along the first axis of an example: of features, or of channels at every place (1 × 1 convolutions).

On a map (channels, height, width) these are the invertible 1 × 1 convolutions of Glow (Kingma & Dhariwal 2018, arXiv
1807.03039, section 3.2): the log-determinant counts once for every place.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from likely.bijections.bijection import Bijection


class _Mixing(Bijection):
    """z = W x at every place."""

    def __init__(self, features: int) -> None:
        super().__init__()
        if features < 1:
            raise ValueError(f"features: expected at least 1, got {features}")
        self.features = features

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        matrix = self.matrix()
        z = x @ matrix.t() if x.dim() == 2 else (matrix @ x.flatten(2)).reshape(x.shape)
        return z, _everywhere(self.log_det(), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows = z.movedim(1, 0).flatten(1)
        x = self.solve(rows).unflatten(1, (len(z), *z.shape[2:])).movedim(0, 1)
        return x, _everywhere(-self.log_det(), z)

    def matrix(self) -> Tensor:
        """W, shape ``(features, features)``."""
        raise NotImplementedError

    def log_det(self) -> Tensor:
        """log |det W|."""
        raise NotImplementedError

    def solve(self, z: Tensor) -> Tensor:
        """W⁻¹ z for columns z, shape ``(features, columns)``."""
        raise NotImplementedError


class Mixing(_Mixing):
    """z = W x with a plain matrix, started as a random rotation; its determinant costs features³ operations.

    >>> layer = Mixing(3)
    >>> x = torch.randn(2, 3, 4, 4)
    >>> z, log_det = layer(x)
    >>> torch.allclose(layer.inverse(z)[0], x, atol=1e-5), log_det.abs().max().item() < 1e-3
    (True, True)
    """

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.weight = nn.Parameter(_rotation(features))

    def matrix(self) -> Tensor:
        return self.weight

    def log_det(self) -> Tensor:
        return torch.linalg.slogdet(self.weight)[1]

    def solve(self, z: Tensor) -> Tensor:
        return torch.linalg.solve(self.weight, z)


class LU(_Mixing):
    """z = P L U x with a fixed permutation P, L unit lower and U upper triangular (Glow, their eq. 10).

    log |det| is a sum over U's diagonal, sign · e^s; inversion solves two triangular systems.

    Args:
        start: what it starts as: a random ``rotation``, a random ``permutation``, or the ``identity``.
    """

    order: Tensor
    sign: Tensor

    def __init__(self, features: int, start: str = "rotation") -> None:
        super().__init__(features)
        if start not in ("rotation", "permutation", "identity"):
            raise ValueError(f"start: expected 'rotation', 'permutation' or 'identity', got {start!r}")
        order = torch.randperm(features) if start == "permutation" else torch.arange(features)
        matrix = _rotation(features) if start == "rotation" else torch.eye(features)[order]
        permutation, lower, upper = torch.linalg.lu(matrix)
        self.register_buffer("order", permutation.argmax(1))  # row i of P L is row order[i] of L
        self.register_buffer("sign", torch.where(upper.diagonal() < 0, -1.0, 1.0))
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))
        self.log_scale = nn.Parameter(upper.diagonal().abs().clamp(min=1e-3).log())

    def _factors(self) -> tuple[Tensor, Tensor]:
        unit = torch.eye(self.features, dtype=self.lower.dtype, device=self.lower.device)
        return self.lower.tril(-1) + unit, self.upper.triu(1) + torch.diag(self.sign * self.log_scale.exp())

    def matrix(self) -> Tensor:
        lower, upper = self._factors()
        return (lower @ upper).index_select(0, self.order)

    def log_det(self) -> Tensor:
        return self.log_scale.sum()

    def solve(self, z: Tensor) -> Tensor:
        lower, upper = self._factors()
        z = z.index_select(0, self.order.argsort())
        z = torch.linalg.solve_triangular(lower, z, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, z, upper=True)


class Householder(_Mixing):
    """z = H₁ … Hₘ x with reflections Hᵢ = I − 2 vᵢ vᵢᵀ / vᵢᵀvᵢ (Tomczak & Welling 2016, arXiv 1611.09630).

    Every rotation or reflection is a product of as many as there are features; volume is kept.

    Args:
        reflections: m; by default as many as features.
    """

    def __init__(self, features: int, reflections: int | None = None) -> None:
        super().__init__(features)
        count = features if reflections is None else reflections
        if count < 1:
            raise ValueError(f"reflections: expected at least 1, got {count}")
        self.vectors = nn.Parameter(torch.randn(count, features))

    def matrix(self) -> Tensor:
        """The product in its compact form I − Vᵀ T⁻¹ V, T = ½ diag(VVᵀ) + the triangle of VVᵀ above it."""
        v = self.vectors / self.vectors.norm(dim=1, keepdim=True)
        gram = v @ v.t()
        triangle = gram.triu(1) + 0.5 * torch.eye(len(v), dtype=v.dtype, device=v.device)
        unit = torch.eye(self.features, dtype=v.dtype, device=v.device)
        return unit - v.t() @ torch.linalg.solve_triangular(triangle, v, upper=True)

    def log_det(self) -> Tensor:
        return self.vectors.new_zeros(())

    def solve(self, z: Tensor) -> Tensor:
        return self.matrix().t() @ z


class InvertibleConvolution(_Mixing):
    """Glow's invertible 1 × 1 convolution over the channels of a map, by :class:`LU` or as a plain matrix.

    Args:
        decomposed: whether W is kept as its LU factors, whose log-det costs nothing.
    """

    def __init__(self, channels: int, decomposed: bool = True) -> None:
        super().__init__(channels)
        self.form: _Mixing = LU(channels) if decomposed else Mixing(channels)

    def matrix(self) -> Tensor:
        return self.form.matrix()

    def log_det(self) -> Tensor:
        return self.form.log_det()

    def solve(self, z: Tensor) -> Tensor:
        return self.form.solve(z)


class ActNorm(Bijection):
    """z = e^s x + b for every feature or channel; started so that the first batch comes to mean 0 and deviation 1.

    Kingma & Dhariwal 2018 (1807.03039), section 3.1.  A feature that does not vary in the batch keeps s = 0.

    Args:
        features: size of the first axis of an example.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._shaped(x)
        return x * log_scale.exp() + shift, _everywhere(self.log_scale.sum(), x)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._shaped(z)
        return (z - shift) * (-log_scale).exp(), _everywhere(-self.log_scale.sum(), z)

    def cells(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z, and the log-slope of every cell: of the shape of x."""
        log_scale, shift = self._shaped(x)
        return x * log_scale.exp() + shift, log_scale.expand_as(x)

    def _shaped(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1, *[1] * (x.dim() - 2))
        return self.log_scale.reshape(shape), self.shift.reshape(shape)

    @torch.no_grad()
    def initialise(self, x: Tensor, context: Tensor | None = None) -> None:
        """Mean and deviation of each feature over the batch and all places."""
        rows = x.movedim(1, 0).flatten(1).double()
        mean, deviation = rows.mean(1), rows.std(1, correction=0)
        scale = torch.where(deviation > 1e-6 * (1.0 + mean.abs()), deviation, 1.0)
        self.log_scale.copy_(-scale.log())
        self.shift.copy_(-mean / scale)


def _everywhere(log_det: Tensor, x: Tensor) -> Tensor:
    """The log-det of one place, for each example the sum over all its places."""
    return (log_det * math.prod(x.shape[2:])).expand(len(x))


def _rotation(features: int) -> Tensor:
    return nn.init.orthogonal_(torch.empty(features, features))
