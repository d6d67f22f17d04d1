"""Matrices in optimisers: products, roots, eigenbases, orthogonalisation, and how a tensor becomes matrices.

Everything here works on batches: the first axis counts matrices (or tensors) of equal shape, which one call then
serves.  Nothing here knows an optimiser.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from likely.processor import LARGE, ONEDNN, TILES, alone, rounded_factors

# --------------------------------------------------------------------------------------------------------------
# Products
# --------------------------------------------------------------------------------------------------------------

#: Multiplications from which only one triangle of a symmetric product is computed, in strips of about so many rows.
WORTH_A_TRIANGLE, STRIP = 1 << 27, 192
#: In what an optimiser multiplies matrices: bfloat16, the ``full`` precision of its state, or bfloat16 where that is
#: faster.
Precision = Literal["auto", "bfloat16", "full"]
#: Multiply-adds of a matrix and its longer side's square from which rounding it to bfloat16 pays for itself.
WORTH_ROUNDING = 1 << 25


def in_bfloat16(precision: Precision, x: Tensor) -> bool:
    """Whether an optimiser that rounds float32 anew in every step multiplies ``(batch, n_1, …, n_k)`` in bfloat16.

    By itself only where tiles (AMX) do, and where matrices are large.  AVX-512 alone multiplies bfloat16 no faster:
    with oneDNN kept from the tiles of an Intel processor, products took 1.0 to 1.9 times as long as in float32.

    >>> in_bfloat16("bfloat16", torch.zeros(1, 2, 2)), in_bfloat16("auto", torch.zeros(1, 2, 2))
    (True, False)
    """
    by_tiles = TILES and x.device.type == "cpu" and x.dtype == torch.float32
    large = math.prod(x.shape[1:]) * max(x.shape[1:]) >= WORTH_ROUNDING
    return precision == "bfloat16" or (precision == "auto" and by_tiles and large)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, for shapes ``(batch, m, k)`` and ``(batch, k, n)``, by the faster of PyTorch's libraries.

    Which one serves depends on the processor, the type and the shape alone, so that a run repeats to the bit.
    """
    if a.dtype == torch.bfloat16 and TILES and b.numel() >= a.numel():
        a = a.contiguous()  # oneDNN turns the left factor over once for every few columns of the right one
    if _by_onednn(a, b):
        multiply = torch.ops.mkldnn._linear_pointwise  # x wᵀ
        each = [multiply(_dense(x), _dense(y).mT, None, "none", [], "") for x, y in zip(a, b)]
        return each[0][None] if len(each) == 1 else torch.stack(each)
    return (a[0] @ b[0])[None] if len(a) == 1 else a @ b


def product_plus(a: Tensor, b: Tensor, c: Tensor, alpha: float, beta: float) -> Tensor:
    """α a b + β c, for shapes ``(batch, m, k)``, ``(batch, k, n)`` and ``(batch, m, n)``."""
    if _by_onednn(a, b):
        return product(a, b).mul_(alpha).add_(c, alpha=beta)
    if len(a) == 1:
        return torch.addmm(c[0], a[0], b[0], alpha=alpha, beta=beta)[None]
    return torch.baddbmm(c, a, b, alpha=alpha, beta=beta)


def _by_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        ONEDNN
        and a.shape[1] * a.shape[2] * b.shape[2] >= LARGE
        and a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
        and not torch.compiler.is_compiling()
    )


def _dense(x: Tensor) -> Tensor:
    """The matrix, or a copy if neither its rows nor its columns are contiguous: for such oneDNN has slow code only."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def gram(x: Tensor) -> Tensor:
    """x xᵀ, of shape ``(batch, m, m)`` for ``(batch, m, n)``; large ones from one triangle."""
    if _worth_a_triangle(x) and _by_onednn(x, x.mT):
        x = x.contiguous()  # so that its strips are dense
    return _symmetric(x, lambda low, high: product(x[:, low:high], x[:, :high].mT))


def accumulate_gram(total: Tensor, x: Tensor, beta: float, alpha: float, rounded: bool = False) -> None:
    """total ← β total + α x xᵀ, for shapes ``(batch, m, m)`` and ``(batch, m, n)``.

    Args:
        rounded: whether x may be rounded to bfloat16.  Products are added up in float32 then, and added to the total
            there: it stays the Gram matrix of something, positive semidefinite up to the rounding of float32.  It is
            not while another thread is alive, for which the switch would be thrown too.
    """
    rounded = rounded and x.dtype == torch.float32 and x.device.type == "cpu"
    if rounded and not torch.compiler.is_compiling() and alone():
        with rounded_factors():
            total.baddbmm_(x, x.mT, beta=beta, alpha=alpha)
    elif _worth_a_triangle(x) or _by_onednn(x, x.mT):
        total.mul_(beta).add_(gram(x), alpha=alpha)
    else:
        total.baddbmm_(x, x.mT, beta=beta, alpha=alpha)


def commuting_product(a: Tensor, b: Tensor) -> Tensor:
    """a b, for symmetric matrices ``(batch, m, m)`` that commute; large ones from one triangle."""
    return _symmetric(a, lambda low, high: product(a[:, low:high], b[:, :high].mT))


def commuting_product_plus(a: Tensor, b: Tensor, c: Tensor, alpha: float, beta: float) -> Tensor:
    """α a b + β c, for symmetric matrices ``(batch, m, m)`` of which a and b commute; large ones from one triangle."""
    return _symmetric(
        a, lambda low, high: product_plus(a[:, low:high], b[:, :high].mT, c[:, low:high, :high], alpha, beta)
    )


def _worth_a_triangle(x: Tensor) -> bool:
    """Whether a symmetric product that sums over the columns of x is computed from one triangle.

    Tiles multiply bfloat16 in less time than it takes to put the other triangle in its place.
    """
    rows, columns = x.shape[1:]
    by_tiles = TILES and x.dtype == torch.bfloat16
    return x.device.type == "cpu" and not by_tiles and rows * rows * columns >= WORTH_A_TRIANGLE


def _symmetric(x: Tensor, strip: Callable[[int, int], Tensor]) -> Tensor:
    """The symmetric matrices of which ``strip(low, high)`` gives the rows ``low:high`` up to column ``high``.

    Args:
        x: the left factor.
    """
    batch, m = x.shape[:2]
    if not _worth_a_triangle(x):
        return strip(0, m)
    out = x.new_empty(batch, m, m)
    strips = max(2, round(m / STRIP))
    edges = [m * i // strips for i in range(strips + 1)]
    for low, high in itertools.pairwise(edges):
        rows = strip(low, high)
        out[:, low:high, :high] = rows
        out[:, :low, low:high] = transposed(rows)[:, :low]
    return out


def transposed(x: Tensor) -> Tensor:
    """The transposes of ``(batch, m, n)``, contiguous; of a single large matrix PyTorch makes it block by block."""
    return x[0].T.contiguous()[None] if len(x) == 1 else x.mT.contiguous()


def multiplied(x: Tensor, factors: Tensor) -> Tensor:
    """Every matrix of ``(batch, m, n)`` times a number of its own, ``(batch, 1, 1)`` in higher precision than x."""
    if len(x) == 1 and x.device.type == "cpu":  # multiplies element by element in the number's precision
        return x * factors.reshape(())
    return (x * factors).to(x.dtype)


# --------------------------------------------------------------------------------------------------------------
# One matrix for each axis of a tensor
# --------------------------------------------------------------------------------------------------------------


def unfolded(x: Tensor, axis: int) -> Tensor:
    """The matrices whose rows run along one axis: ``(batch, n_axis, product of the others)``; axis 0 is the first."""
    return x.movedim(axis + 1, 1).flatten(2) if x.dim() > 2 else x[:, :, None]


def multiply_axes(x: Tensor, matrices: Sequence[Tensor | None], transposed: bool = False) -> Tensor:
    """x multiplied along each axis with a matrix: for matrices x, M₁ᵀ x M₂, or M₁ x M₂ᵀ if ``transposed``.

    Args:
        x: shape ``(batch, n_1, …, n_k)``.
        matrices: for each axis ``(batch, n_i, n_i)``, or None for the identity.
    """
    shape = x.shape
    for axis, matrix in enumerate(matrices):
        if matrix is None:
            continue
        if axis == 1 and len(shape) == 3:  # a matrix from the right
            x = product(x, matrix.mT if transposed else matrix)
            continue
        y = product(matrix if transposed else matrix.mT, unfolded(x, axis))
        rest = [n for i, n in enumerate(shape[1:]) if i != axis]
        x = y.reshape(shape[0], shape[axis + 1], *rest).movedim(1, axis + 1)
    return x


@dataclass(frozen=True)
class Layout:
    """How a tensor is cut into blocks, and which of their axes have a matrix.

    Args:
        shape: the tensor's axes, those of length one left out and the later ones perhaps taken as one.
        blocks: for each block its place, a slice of every axis.
        sides: the axes that have a matrix.
    """

    shape: tuple[int, ...]
    blocks: tuple[tuple[slice, ...], ...]
    sides: tuple[int, ...]

    def views(self, tensor: Tensor) -> list[Tensor]:
        """The blocks of a contiguous tensor: they share its memory."""
        if len(self.blocks) == 1:
            return [tensor if tensor.shape == self.shape else tensor.view(self.shape)]
        whole = tensor.view(self.shape)
        return [whole[block] for block in self.blocks]

    def side_lengths(self) -> list[int]:
        """The lengths of the sides of all blocks, block after block."""
        return [block[axis].stop - block[axis].start for block in self.blocks for axis in self.sides]


@functools.cache
def layout(shape: tuple[int, ...], merge: bool, block: int | None, longest: int) -> Layout:
    """The blocks of a tensor.

    Args:
        merge: whether the axes after the first are taken as one, so that a convolution's weight is a matrix with a row
            for each output channel.
        block: longest side of a block (None: one block); a longer axis is cut in equal parts, or nearly so.
        longest: axes longer than that (before they are cut) have no matrix, and are not cut.

    >>> layout((6, 4, 3, 3), True, 24, 1000).shape
    (6, 36)
    >>> layout((6, 4, 3, 3), True, 24, 1000).blocks
    ((slice(0, 6, None), slice(0, 18, None)), (slice(0, 6, None), slice(18, 36, None)))
    """
    axes = tuple(n for n in shape if n != 1) or (1,)
    if merge and len(axes) > 2:
        axes = (axes[0], math.prod(axes[1:]))
    sides = tuple(axis for axis, n in enumerate(axes) if n <= longest)
    cuts = []
    for axis, n in enumerate(axes):
        parts = -(-n // block) if block is not None and axis in sides else 1
        cuts.append([slice(n * i // parts, n * (i + 1) // parts) for i in range(parts)])
    return Layout(axes, tuple(itertools.product(*cuts)), sides)


# --------------------------------------------------------------------------------------------------------------
# Roots and eigenbases
# --------------------------------------------------------------------------------------------------------------


def matrix_power(p: Tensor, exponent: float, eps: float) -> Tensor:
    """(p + ε)^exponent for symmetric p ⪰ 0, ``(batch, n, n)``; negative eigenvalues are rounding and count as 0.

    >>> matrix_power(torch.diag(torch.tensor([16.0, 256.0]))[None], -0.5, 0.0)[0].diagonal().tolist()
    [0.25, 0.0625]
    """
    values, vectors = _eigh(p)
    return gram(vectors * ((values.clamp_min(0) + eps) ** (exponent / 2))[:, None, :])


def eigenbasis(p: Tensor) -> Tensor:
    """Eigenvectors of symmetric p of shape ``(batch, n, n)`` as columns, those of large eigenvalues first."""
    return _eigh(p)[1].flip(2)


def power_qr(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """A better eigenbasis of symmetric p than q is: the orthogonal factor of p q, one step of power iteration.

    As in Vyas et al. 2024 (arXiv 2409.11321, Algorithm 4), with the columns of q first put in falling order of their
    Rayleigh quotients.

    Returns:
        The new basis, ``(batch, n, n)``, and the order, ``(batch, n)``: new column j goes back to old column order[j].
    """
    pq = product(p, q)
    order = (q * pq).sum(1).argsort(dim=1, descending=True, stable=True)
    pq = pq.gather(2, order[:, None, :].expand_as(pq))
    return torch.linalg.householder_product(*torch.geqrf(pq)), order  # linalg.qr would also make R


def _eigh(p: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, in double precision where the solver fails in single; NaN for what is not finite.

    On matrices of low rank with small entries LAPACK's float32 solver may give NaN without an error: p is scaled, and
    what comes out is looked at.
    """
    scale = p.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    if not scale.isfinite().all():  # whoever trains will look for the cause in the weights
        return torch.full_like(p[:, 0], math.nan), torch.full_like(p, math.nan)
    try:
        values, vectors = torch.linalg.eigh(p / scale)
        fine = bool(vectors.sum().isfinite())
    except torch.linalg.LinAlgError:
        fine = False
    if not fine:
        values, vectors = (x.to(p.dtype) for x in torch.linalg.eigh((p / scale).double()))
    return values * scale[:, :, 0], vectors


# --------------------------------------------------------------------------------------------------------------
# Orthogonalisation
# --------------------------------------------------------------------------------------------------------------

#: ``newton-schulz`` is the quintic of Jordan et al. 2024, ``polar-express`` that of Amsel et al. 2025, ``svd`` exact.
Method = Literal["polar-express", "newton-schulz", "svd"]
#: a, b, c of a x + b x³ + c x⁵ in https://kellerjordan.github.io/posts/muon.
JORDAN = (3.4445, -4.7750, 2.0315)
#: Ratio of a matrix's sides from which two iterations are cheaper as one, composed on the smaller side.
PAIRED = 2
#: How much larger than its bound a singular value may be by rounding, in every iteration but the last.
SAFETY = 1.01


def polar_express(floor: float, iterations: int) -> tuple[tuple[float, float, float], ...]:
    """Coefficients a, b, c of the odd quintics whose composition is nearest to 1 on [floor, 1], in the maximum norm.

    The Polar Express (Amsel, Persson, Musco & Gower 2025, arXiv 2505.16932, Theorem 3.1): greedy is optimal, so each
    is the best one on the interval that those before it leave, [l, u] with u = 2 − l after the first; it touches its
    largest error at l < q < r < u with alternating signs, and q and r are its extrema.

    >>> [round(x, 4) for x in polar_express(1e-3, 5)[0]]
    [8.4703, -25.1081, 18.6293]
    """
    low, high, found = floor, 1.0, []
    for _ in range(iterations):
        a, b, c = _best_quintic(low, high)
        found.append((a, b, c))
        low = a * low + b * low**3 + c * low**5
        high = 2 - low
    return tuple(found)


def _best_quintic(low: float, high: float) -> tuple[float, float, float]:
    """The odd quintic nearest to 1 on [low, high], by Remez' exchange."""
    if low / high > 1 - 5e-6:  # the limit low → high, where the exchange becomes singular
        return 15 / 8 / high, -10 / 8 / high**3, 3 / 8 / high**5
    q, r = (3 * low + high) / 4, (low + 3 * high) / 4
    for _ in range(100):
        x = torch.tensor([low, q, r, high], dtype=torch.float64)
        system = torch.stack([x, x**3, x**5, torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)], 1)
        a, b, c, _ = torch.linalg.solve(system, torch.ones(4, dtype=torch.float64)).tolist()
        root = math.sqrt(9 * b * b - 20 * a * c)  # of the derivative a + 3 b x² + 5 c x⁴
        before, (q, r) = (q, r), (math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c)))
        if abs(q - before[0]) + abs(r - before[1]) < 1e-15:
            break
    return a, b, c


@functools.cache
def coefficients(iterations: int, floor: float) -> tuple[tuple[float, float, float], ...]:
    """The polynomials of the Polar Express, all but the last with room for rounding."""
    *first, last = polar_express(floor, iterations)
    return (*((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in first), last)


def orthogonalized(x: Tensor, method: Method, iterations: int, floor: float, eps: float) -> Tensor:
    """U Vᵀ or nearly so for x = U Σ Vᵀ, of shape ``(batch, m, n)``, in the precision of x.

    All but ``svd`` apply odd polynomials to the singular values σ, by products on the smaller side: x ← P x with
    P = a + b A + c A² and A = x xᵀ, or x ← x P with A = xᵀ x for tall x.  They want σ of at most 1.
    ``newton-schulz`` divides x by its Frobenius norm |x|, as its authors do.  ``polar-express`` divides by |A²|^¼ =
    (Σ σ⁸)^⅛, which is much nearer to the largest σ (for a square Gaussian matrix of 400 rows it is 1.5 times that, |x|
    10 times; of 2,500 rows 1.8 and 25 times) and costs nothing, A² being needed in any case.  For matrices with sides
    of ratio 2 or more it composes the last two iterations as polynomials of A, which saves products with the long side
    (the "Gram Newton-Schulz" of Zhang, Amsel, Chen & Dao 2026); composed in bfloat16, earlier ones, which magnify
    more, could leave the interval that the later ones are made for.

    Args:
        floor: least singular value, relative to that norm, for which ``polar-express`` guarantees its error.
        eps: least norm to divide by.
    """
    if method == "svd":
        u, _, vt = torch.linalg.svd(x, full_matrices=False)
        return product(u, vt)
    if method == "polar-express":
        return _polar_express(x, coefficients(iterations, floor), eps)
    if x.shape[1] > x.shape[2]:
        return transposed(_newton_schulz(transposed(x), iterations, eps))
    return _newton_schulz(x, iterations, eps)


def _newton_schulz(x: Tensor, iterations: int, eps: float) -> Tensor:
    """In the order of its authors, so that it also rounds as theirs."""
    a, b, c = JORDAN
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp_min(eps)
    for _ in range(iterations):
        square = gram(x)
        step = commuting_product_plus(square, square, square, alpha=c, beta=b)  # b A + c A²
        x = product_plus(step, x, x, alpha=1.0, beta=a)
    return x


def _polar_express(x: Tensor, polynomials: Sequence[tuple[float, float, float]], eps: float) -> Tensor:
    """Every iteration is one factor, a polynomial of A; x divided by its norm is never made."""
    tall = x.shape[1] > x.shape[2]
    short, long = sorted(x.shape[1:])
    for number, (a, b, c) in enumerate(polynomials):
        square = gram(x.mT if tall else x)
        factor = _polynomial(square, a, b, c) if number else _first(square, a, b, c, eps)
        paired = 0 < number == len(polynomials) - 2 and long >= PAIRED * short
        if paired:
            factor = _composed(square, factor, *polynomials[-1])
        x = product(x, factor) if tall else product(factor, x)
        if paired:
            break
    return x


def _polynomial(square: Tensor, a: float, b: float, c: float) -> Tensor:
    """a + b A + c A²: what an iteration multiplies x with."""
    return _plus(commuting_product_plus(square, square, square, alpha=c, beta=b), a)


def _first(square: Tensor, a: float, b: float, c: float, eps: float) -> Tensor:
    """a / ν + b A / ν³ + c A² / ν⁵ with ν = (Σ σ⁸)^⅛ = |A²|^¼: the iteration for x divided by ν."""
    tiny = torch.finfo(torch.float32).tiny
    size = torch.linalg.matrix_norm(square, keepdim=True).clamp_min(tiny)
    square = square / size  # of which the square can be neither too large nor too small
    fourth = commuting_product(square, square)
    size = size.to(torch.promote_types(size.dtype, torch.float32))
    norm = (size * torch.linalg.matrix_norm(fourth, keepdim=True).to(size.dtype).sqrt()).sqrt().clamp_min(eps)
    ratio = size / norm**2  # of A / ν² to ``square``
    factor = multiplied(square, b * ratio / norm).add_(multiplied(fourth, c * ratio**2 / norm))
    return _plus(factor, (a / norm)[:, 0])


def _composed(square: Tensor, factor: Tensor, a: float, b: float, c: float) -> Tensor:
    """The factor of two iterations in one, of which the first multiplies x with ``factor`` and the second has a, b, c.

    With P = ``factor`` the first makes P x, whose square is B = P A P; the second multiplies it with a + b B + c B².
    Everything here commutes, and is as small as A.
    """
    square = commuting_product(commuting_product(square, factor), factor)
    return commuting_product(_polynomial(square, a, b, c), factor)


def _plus(x: Tensor, a: float | Tensor) -> Tensor:
    """x plus a times the identity, in place."""
    x.diagonal(dim1=1, dim2=2).add_(a)
    return x


# --------------------------------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------------------------------

#: Elements of a batch from which it gains no more from being larger.
ENOUGH = 1 << 20


def batched(indices: Sequence[int], shapes: Sequence[tuple[Any, ...]]) -> list[list[int]]:
    """Indices of equal shape together, in batches of at most :data:`ENOUGH` elements or one tensor.

    Args:
        indices: which of the shapes to take.
        shapes: by index, the shape first and whatever else must be equal in a batch behind it.

    >>> batched([0, 1, 3], [((2, 2),), ((3, 3),), ((2, 2),), ((2, 2),)])
    [[0, 3], [1]]
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index in indices:
        groups.setdefault(shapes[index], []).append(index)
    batches = []
    for key, group in groups.items():
        size = max(1, ENOUGH // math.prod(key[0]))
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return batches


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """A batch of tensors: a view of one tensor, or of those that fill some memory one after another; else a copy."""
    first, count = tensors[0], len(tensors)
    if count == 1:
        return first[None]
    if _fill_their_memory(tensors):
        return first.as_strided((count, *first.shape), (first.numel(), *first.stride()))
    return torch.stack(list(tensors))


def put_back(stack: Tensor, tensors: Sequence[Tensor]) -> None:
    """Copy a changed batch, which :func:`stacked` made of tensors, to where they are, unless it shares their memory."""
    if stack.data_ptr() != tensors[0].data_ptr():
        torch._foreach_copy_(list(tensors), stack.unbind())


def laid_together(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """The tensors moved so that they fill some memory one after another, if each had memory of its own; else None."""
    if len(tensors) == 1 or not all(map(owns_its_memory, tensors)):
        return None
    return list(torch.stack(list(tensors)).unbind())


def owns_its_memory(tensor: Tensor) -> bool:
    """Whether a tensor shares its memory with no other, as far as its size tells."""
    return tensor.untyped_storage().nbytes() == tensor.nbytes


def _fill_their_memory(tensors: Sequence[Tensor]) -> bool:
    first, memory = tensors[0], tensors[0].untyped_storage()
    if memory.nbytes() != first.nbytes * len(tensors) or not all(map(Tensor.is_contiguous, tensors)):
        return False
    start = memory.data_ptr()
    return list(map(Tensor.data_ptr, tensors)) == list(range(start, start + memory.nbytes(), first.nbytes))


def turns(costs: Sequence[float], count: int, loads: list[float]) -> list[int]:
    """A turn from 0 to ``count`` − 1 for each piece of work so that the turns' loads are nearly equal.

    The dearest first, each to the turn with the least load (Graham 1969).

    Args:
        loads: load of every turn so far, which becomes the new one.

    >>> turns([1.0, 4.0, 2.0, 2.0], 2, [0.0, 0.0])
    [0, 0, 1, 1]
    """
    given = [0] * len(costs)
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        turn = loads.index(min(loads))
        loads[turn] += costs[i]
        given[i] = turn
    return given
