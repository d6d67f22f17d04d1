"""Residual maps z = x + g(x) of low rank, made for posteriors: a volume that is cheap, an inverse found numerically.

Planar and radial flows (Rezende & Mohamed 2015, arXiv 1505.05770) and Sylvester flows (van den Berg, Hasenclever,
Tomczak & Welling 2018, arXiv 1803.05649).  Their parameters may come from a context, one set an example.  Each is kept
invertible by what its parameters can be, and comes back by the roots of increasing functions of one number.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.bijections.bijection import Bijection
from likely.bijections.roots import increasing_root
from likely.networks.linear import Linear

#: How far from −1 what must stay above −1 is kept.
_MARGIN = 1e-3


class _FromContext(nn.Module):
    """Numbers that a linear layer makes of the context, or free ones without a context: shape ``(batch, count)``."""

    def __init__(self, count: int, context: int, spread: float = 0.1) -> None:
        super().__init__()
        self.free = nn.Parameter(spread * torch.randn(count))
        self.layer = Linear(context, count, bias=False) if context else None
        if self.layer is not None:
            nn.init.normal_(self.layer.weight, std=spread / math.sqrt(context))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        if self.layer is None:
            return self.free.expand(len(x), -1)
        if context is None:
            raise ValueError("context: this bijection was built with one, got None")
        return self.free + self.layer(context)


def _above_minus_one(raw: Tensor) -> Tensor:
    """A number above −1, 0 at 0, which grows as its argument does."""
    return F.softplus(raw + math.log(math.expm1(1.0 - _MARGIN))) - (1.0 - _MARGIN)


class Planar(Bijection):
    """z = x + û tanh(wᵀx + b), log |det| = log(1 + wᵀû tanh′) (Rezende & Mohamed, eqs. 10–12).

    û is u with its part along w changed so that wᵀû > −1 (their appendix A.1).

    Args:
        features: number of cells.
        context: width of the context, 0 if there is none.
    """

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__()
        self.features = features
        self.numbers = _FromContext(2 * features + 1, context)
        nn.init.normal_(self.numbers.free[features : 2 * features], std=1.0 / math.sqrt(features))

    def _pieces(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """û, w, b, and wᵀû."""
        u, w, b = self.numbers(x, context).split([self.features, self.features, 1], 1)
        along = (w * u).sum(1, keepdim=True)
        kept = _above_minus_one(along)
        size = w.square().sum(1, keepdim=True).clamp(min=1e-12)
        return u + (kept - along) * w / size, w, b, kept

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w, b, along = self._pieces(x, context)
        h = torch.tanh((w * x).sum(1, keepdim=True) + b)
        return x + u * h, torch.log1p(along * (1.0 - h * h)).squeeze(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        u, w, b, along = self._pieces(z, context)
        a = _residual_root((w * z).sum(1, keepdim=True) + b, along, torch.ones_like(b), torch.zeros_like(b))
        h = torch.tanh(a)
        return z - u * h, -torch.log1p(along * (1.0 - h * h)).squeeze(1)


class Radial(Bijection):
    """z = x + β (x − m) / (α + r), r = ‖x − m‖ (Rezende & Mohamed, eq. 14), with α > 0 and β > −α.

    log |det| = (D − 1) log(1 + β / (α + r)) + log(1 + α β / (α + r)²).

    Args:
        features: D.
        context: width of the context, 0 if there is none.
    """

    def __init__(self, features: int, context: int = 0) -> None:
        super().__init__()
        self.features = features
        self.numbers = _FromContext(features + 2, context)

    def _pieces(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        centre, raw_alpha, raw_beta = self.numbers(x, context).split([self.features, 1, 1], 1)
        alpha = F.softplus(raw_alpha) + _MARGIN
        return centre, alpha, alpha * _above_minus_one(raw_beta)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, alpha, beta = self._pieces(x, context)
        away = x - centre
        reach = alpha + away.norm(dim=1, keepdim=True)
        return x + beta * away / reach, self._log_det(reach, alpha, beta)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        centre, alpha, beta = self._pieces(z, context)
        away = z - centre
        far = away.norm(dim=1, keepdim=True)
        # far = r (1 + β / (α + r)), a quadratic in r; of its two forms the one without a difference of equals
        b = alpha + beta - far
        root = (b * b + 4.0 * alpha * far).sqrt()
        r = torch.where(b > 0, 2.0 * alpha * far / (b.abs() + root), 0.5 * (root - b))
        reach = alpha + r
        return centre + away / (1.0 + beta / reach), -self._log_det(reach, alpha, beta)

    def _log_det(self, reach: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
        across = (self.features - 1) * torch.log1p(beta / reach)
        return (across + torch.log1p(alpha * beta / reach.square())).squeeze(1)


class Sylvester(Bijection):
    """z = x + Q R tanh(R̃ Qᵀx + b), Q orthogonal by reflections, R and R̃ upper triangular (van den Berg et al., eq. 13).

    log |det| = Σ log(1 + rᵢᵢ r̃ᵢᵢ tanh′ᵢ), with the diagonals between −1 and 1.

    Args:
        features: number of cells.
        rank: columns of Q; by default as many as features.
        reflections: of which Q is the product.
        context: width of the context, 0 if there is none.
    """

    def __init__(self, features: int, rank: int | None = None, reflections: int = 4, context: int = 0) -> None:
        super().__init__()
        rank = features if rank is None else rank
        if not 1 <= rank <= features:
            raise ValueError(f"rank: expected 1 to {features}, got {rank}")
        self.features, self.rank, self.reflections = features, rank, reflections
        self.sizes = [reflections * features, rank * rank, rank * rank, rank]
        self.numbers = _FromContext(sum(self.sizes), context)
        nn.init.normal_(self.numbers.free[: self.sizes[0]])

    def _pieces(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Q, R, R̃, b, and the products of the diagonals."""
        vectors, first, second, b = self.numbers(x, context).split(self.sizes, 1)
        q = torch.eye(self.features, self.rank, dtype=x.dtype, device=x.device).expand(len(x), -1, -1)
        for v in F.normalize(vectors.unflatten(1, (self.reflections, self.features)), dim=2).unbind(1):
            q = q - 2.0 * v.unsqueeze(2) * (v.unsqueeze(1) @ q)
        triangles = []
        for raw in (first, second):
            square = raw.unflatten(1, (self.rank, self.rank))
            diagonal = (1.0 - _MARGIN) * square.diagonal(dim1=1, dim2=2).tanh()
            triangles.append(square.triu(1) + torch.diag_embed(diagonal))
        r, r_tilde = triangles
        return q, r, r_tilde, b, r.diagonal(dim1=1, dim2=2) * r_tilde.diagonal(dim1=1, dim2=2)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, r, r_tilde, b, diagonal = self._pieces(x, context)
        y = (x.unsqueeze(1) @ q).squeeze(1)
        h = torch.tanh((r_tilde @ y.unsqueeze(2)).squeeze(2) + b)
        z = x + (q @ (r @ h.unsqueeze(2))).squeeze(2)
        return z, torch.log1p(diagonal * (1.0 - h * h)).sum(1)

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, r, r_tilde, b, diagonal = self._pieces(z, context)
        v = (z.unsqueeze(1) @ q).squeeze(1)  # = y + R tanh(R̃ y + b), to be solved from the last coordinate upwards
        y: list[Tensor] = []
        h: list[Tensor] = []
        for i in reversed(range(self.rank)):
            known, bent = b[:, i], v[:, i]
            if y:
                known = known + (r_tilde[:, i, i + 1 :] * torch.stack(y, 1)).sum(1)
                bent = bent - (r[:, i, i + 1 :] * torch.stack(h, 1)).sum(1)
            y.insert(0, _residual_root(bent, r[:, i, i], r_tilde[:, i, i], known))
            h.insert(0, torch.tanh(r_tilde[:, i, i] * y[0] + known))
        bent = torch.stack(h, 1)
        x = z - (q @ (r @ bent.unsqueeze(2))).squeeze(2)
        return x, -torch.log1p(diagonal * (1.0 - bent * bent)).sum(1)


def _residual_root(target: Tensor, size: Tensor, rate: Tensor, shift: Tensor) -> Tensor:
    """a with a + size · tanh(rate · a + shift) = target, where size · rate > −1."""

    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(rate * a + shift)
        return a + size * h, 1.0 + size * rate * (1.0 - h * h)

    return increasing_root(function, target, target - size.abs(), target + size.abs())
