"""3 × 3 convolutions with half the multiplications: Winograd's F(4, 3) along the rows (Lavin & Gray 2015, 1509.09308).

Four rows of the output are made of six combinations of rows, and each is convolved along the width alone:

    y[4t + i] = Σ_j A[i, j] (U_j ∗ V_j[t]),    V_j[t] = Σ_k B[j, k] x[4t + k − 1],    U_j = Σ_k G[j, k] w[k]

with i < 4 and j, k < 6 (taps k < 3 in G).  That is 6 products where the direct form has 12.  The combinations are a few
passes over the data, cheap beside the products once there are some tens of channels.  In float32 the rounding error is
about twice that of the direct form.

Maps are channels last, ``(batch, height, width, channels)``, heights a multiple of 4; ``padded`` ones have a row of
zeros above and one below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

#: B, A and G for the points 0, 1, −1, 2, −2, ∞; kept here for the tests, the functions below have them written out.
B = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
A = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
G = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)


def kernels(weight: Tensor) -> Tensor:
    """U: from ``(out, in, 3, 3)`` six kernels along the width, ``(6, out, 3, in)``."""
    out, channels = weight.shape[:2]
    rows = weight.permute(2, 0, 3, 1).reshape(3, -1)
    return (weight.new_tensor(G) @ rows).view(6, out, 3, channels)


def kernels_adjoint(gradients: Tensor) -> Tensor:
    """From gradients with respect to U to the one with respect to the weight."""
    _, out, _, channels = gradients.shape
    rows = gradients.new_tensor(G).t() @ gradients.reshape(6, -1)
    return rows.view(3, out, 3, channels).permute(1, 3, 0, 2)


def combine(padded: Tensor) -> Tensor:
    """V of a padded map: from ``(batch, 4 T + 2, width, channels)`` to ``(6, batch, T, width, channels)``."""
    n, height, width, channels = padded.shape
    x = [padded[:, k : k + height - 5 : 4] for k in range(6)]
    v = padded.new_empty(6, n, (height - 2) // 4, width, channels)
    even, odd = torch.sub(x[4], x[2], alpha=4), torch.sub(x[3], x[1], alpha=4)
    torch.add(even, odd, out=v[1])
    torch.sub(even, odd, out=v[2])
    torch.sub(x[4], x[2], out=even)
    torch.sub(x[3], x[1], out=odd)
    torch.add(even, odd, alpha=2, out=v[3])
    torch.sub(even, odd, alpha=2, out=v[4])
    torch.add(even, torch.sub(x[0], x[2]), alpha=4, out=v[0])
    torch.sub(torch.sub(x[5], x[3]), odd, alpha=4, out=v[5])
    return v


def combine_adjoint(v: Sequence[Tensor]) -> Tensor:
    """From gradients with respect to V to those with respect to the rows of the map, its padding left out."""
    n, tiles, width, channels = v[0].shape
    rows = v[0].new_empty(n, tiles, 4, width, channels)
    sum1, difference1, sum2, difference2 = v[1] + v[2], v[1] - v[2], v[3] + v[4], v[3] - v[4]
    # k = 1, and k = 5 of the tile above
    first = torch.sub(v[5], difference1).sub_(difference2, alpha=0.5)
    torch.mul(first, 4.0, out=rows[:, :, 0])
    rows[:, 1:, 0].add_(v[5][:, :-1])
    # k = 2, 3
    torch.add(sum1, v[0], out=rows[:, :, 3]).add_(sum2)
    torch.mul(v[0], -5.0, out=rows[:, :, 1]).sub_(sum1, alpha=4).sub_(sum2)
    torch.add(difference1, difference2, alpha=2, out=rows[:, :, 2]).sub_(v[5], alpha=5)
    # k = 4, and k = 0 of the tile below
    rows[:, :-1, 3].add_(v[0][:, 1:], alpha=4)
    return rows.view(n, 4 * tiles, width, channels)


def collect(m: Sequence[Tensor]) -> Tensor:
    """y of the six products M, each ``(batch, T, width, channels)``: shape ``(batch, 4 T, width, channels)``."""
    n, tiles, width, channels = m[0].shape
    y = m[0].new_empty(n, tiles, 4, width, channels)
    sum1, difference1, sum2, difference2 = m[1] + m[2], m[1] - m[2], m[3] + m[4], m[3] - m[4]
    torch.add(sum1, sum2, out=y[:, :, 0]).add_(m[0])
    torch.add(difference1, difference2, alpha=2, out=y[:, :, 1])
    torch.add(sum1, sum2, alpha=4, out=y[:, :, 2])
    torch.add(difference1, difference2, alpha=8, out=y[:, :, 3]).add_(m[5])
    return y.view(n, 4 * tiles, width, channels)


def collect_adjoint(y: Tensor) -> list[Tensor]:
    """From the gradient with respect to y to those with respect to the six products."""
    n, height, width, channels = y.shape
    y0, y1, y2, y3 = y.view(n, height // 4, 4, width, channels).unbind(2)
    even, odd = y0 + y2, y1 + y3
    plus, minus = even + odd, even - odd
    torch.add(y0, y2, alpha=4, out=even)
    torch.add(y1, y3, alpha=4, out=odd)
    return [
        y0.contiguous(),
        plus,
        minus,
        torch.add(even, odd, alpha=2),
        torch.sub(even, odd, alpha=2),
        y3.contiguous(),
    ]


def convolve(padded: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A 3 × 3 convolution of a padded map: ``(batch, H + 2, W, in)`` to ``(batch, H, W, out)``, H a multiple of 4.

    >>> x, weight = torch.randn(2, 10, 5, 3), torch.randn(4, 3, 3, 3)
    >>> x[:, 0] = x[:, -1] = 0.0
    >>> direct = F.conv2d(x[:, 1:-1].permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1)
    >>> bool((convolve(x, weight)[0] - direct).abs().max() < 1e-4)
    True

    Returns:
        y, and V and U for :func:`convolve_backward`.
    """
    v, u = combine(padded), kernels(weight)
    return collect([_first(F.conv2d(_channels(a), _taps(b), padding=(0, 1))) for a, b in zip(v, u)]), v, u


def convolve_backward(gradient: Tensor, v: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients with respect to the map, without its padding, and to the weight."""
    of_v, of_u = [], torch.empty_like(u)
    ends = [1, 1], [0, 1], [1, 1], False, [0, 0], 1, [True, True, False]
    for a, b, product, of_b in zip(v, u, collect_adjoint(gradient), of_u):
        pair = torch.ops.aten.convolution_backward(_channels(product), _channels(a), _taps(b), None, *ends)
        of_v.append(_first(pair[0]))
        of_b.unsqueeze(1).copy_(pair[1].permute(0, 2, 3, 1))
    return combine_adjoint(of_v), kernels_adjoint(of_u)


def _channels(rows: Tensor) -> Tensor:
    """A view of a map as PyTorch has it, channels on the second axis."""
    return rows.permute(0, 3, 1, 2)


def _first(rows: Tensor) -> Tensor:
    return rows.permute(0, 2, 3, 1)


def _taps(kernel: Tensor) -> Tensor:
    """A kernel ``(out, 3, in)`` as PyTorch has it, ``(out, in, 1, 3)``."""
    return kernel.unsqueeze(1).permute(0, 3, 1, 2)
