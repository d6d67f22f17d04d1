"""Softmax and attention in whole numbers, token by token: no token's value depends on one that it may not see."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from likely.exact import functions
from likely.exact.layers import affine, whole_activations
from likely.exact.products import BatchedProduct
from likely.exact.profiles import LARGEST, Profile, Rule, Uncovered

#: Whole numbers into which the weights of one row of attention are shared out, by profile.
_SHARES = {torch.float32: 2.0**15, torch.float64: 2.0**31}


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """e⁻ᵗ for t on a grid of 2⁻¹⁶ up to 32, as a product of two entries: of t in steps of 2⁻⁸, and of the rest."""
    coarse = torch.arange(32 * 256 + 1, dtype=torch.float64) * -(2.0**-8)
    fine = torch.arange(256, dtype=torch.float64) * -(2.0**-16)
    return functions.exp(coarse).float().to(device), functions.exp(fine).float().to(device)


def exponentials(x: Tensor, dim: int = -1) -> tuple[Tensor, Tensor, Tensor]:
    """(whole, sum, largest): exp(x − largest) as whole numbers of 2²⁰ (2³⁰ in float64), and their exact sum, float64.

    −∞ gives 0; where all is −∞ the sum is 0.
    """
    largest = x.amax(dim, True)
    if not bool((largest <= LARGEST).all()):
        raise ValueError("softmax: expected numbers, got NaN, infinity or a number beyond 2⁶⁰")
    largest = largest.clamp(min=-LARGEST)
    below = (largest - x).clamp_(max=32.0)
    if x.dtype == torch.float64:
        values = torch.round(functions.exp(-below) * 2.0**30)
        values = torch.where(below >= 32.0, 0.0, values)
    else:
        steps = below.mul_(65536.0).round_().to(torch.int64)
        coarse, fine = _tables(x.device)
        values = (coarse[steps >> 8] * fine[steps & 255]).mul_(2.0**20).round_()
    return values, values.sum(dim, True, dtype=torch.float64), largest


def softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Weights that sum to one along ``dim``."""
    values, total, _ = exponentials(x, dim)
    return (values.double() / total.clamp(min=1.0)).to(x.dtype)


def log_softmax(x: Tensor, dim: int = -1) -> Tensor:
    """Their logarithms."""
    _, total, largest = exponentials(x, dim)
    unit = 2.0**-30 if x.dtype == torch.float64 else 2.0**-20
    return (x.double() - largest.double() - functions.log(total * unit)).to(x.dtype)


class Attention(Rule):
    """softmax(q kᵀ / √d + mask) v for tensors ``(…, tokens, d)``, with scales for every token of every head.

    The weights of a row are shared out in 2¹⁵ whole parts, so that the sum over values of 8 bits is exact, and the
    parts depend on no key that is masked: one step with cached keys gives what the whole sequence gives.
    """

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        self.profile = profile
        self.product = BatchedProduct(profile)
        self.shares = _SHARES[profile.dtype]

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """Args:
        mask: True where a query may see a key, or numbers added to the scores; broadcast to ``(…, queries, keys)``.
        causal: query i sees keys 0 … i.
        """
        weights, _ = self.weights(q, k, mask, causal, scale)
        return self.values(weights, v)

    def weights(
        self, q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, scale: float | None
    ) -> tuple[Tensor, Tensor]:
        """Unnormalised weights, whole numbers, and their sums over the keys."""
        dtype, width = self.profile.dtype, q.shape[-1]
        limit = min(self.profile.largest_activation, math.isqrt(self.profile.largest_sum // width))
        bound = torch.full((), float(limit), dtype=dtype, device=q.device)
        (q, of_q), (k, of_k) = (whole_activations(x.to(dtype), bound, (x.dim() - 1,)) for x in (q, k))
        factor = float(functions.sqrt(torch.tensor([1.0 / width], dtype=torch.float64))) if scale is None else scale
        scores = self.product(q, k.transpose(-1, -2)).mul_(of_q * factor).mul_(of_k.transpose(-1, -2))
        if mask is not None and mask.dtype != torch.bool:
            scores = scores + mask.to(dtype)
            mask = None
        if causal:
            see = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            mask = see if mask is None else mask & see
        if mask is not None:
            scores = torch.where(mask, scores, -torch.inf)
        values, total, _ = exponentials(scores)
        return values, total

    def values(self, weights: Tensor, v: Tensor) -> Tensor:
        """Σⱼ wⱼ vⱼ / Σⱼ wⱼ."""
        dtype = self.profile.dtype
        if v.shape[-2] > 2**16:
            raise Uncovered(f"attention over {v.shape[-2]} tokens; exact sums are certified for 65536")
        limit = 255.0 if dtype == torch.float32 else 2.0**20
        v, of_v = whole_activations(v.to(dtype), torch.full((), limit, dtype=dtype, device=v.device), (v.dim() - 1,))
        total = weights.sum(-1, True, dtype=torch.float64).clamp_(min=1.0)
        scaled = weights.double() * of_v.double().transpose(-1, -2)
        peak = scaled.amax(-1, True).clamp_(min=2.0**-60)
        parts = torch.round(scaled * (torch.full_like(peak, 2.0**20) / peak))
        whole = parts.sum(-1, True).clamp_(min=1.0)
        parts = torch.round(parts * (torch.full_like(whole, self.shares) / whole)).to(dtype)
        factor = (whole * peak) / (total * (self.shares * 2.0**20))
        return self.product(parts, v).mul_(factor.to(dtype))


class MultiheadAttention(Rule):
    """``nn.MultiheadAttention``: its projections by :class:`Affine`, its attention by :class:`Attention`."""

    def __init__(self, layer: nn.MultiheadAttention, profile: Profile) -> None:
        super().__init__()
        if layer.bias_k is not None or layer.add_zero_attn:
            raise Uncovered("multi-head attention with add_bias_kv or add_zero_attn")
        self.heads, self.batch_first, self.profile = layer.num_heads, layer.batch_first, profile
        if layer.in_proj_weight is not None:
            weights = layer.in_proj_weight.chunk(3)
        else:
            weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
        biases = (None, None, None) if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
        self.projections = nn.ModuleList(affine(w, b, profile) for w, b in zip(weights, biases))
        self.attention = Attention(profile)
        self.output = affine(layer.out_proj.weight, layer.out_proj.bias, profile)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if query.dim() != 3:
            raise ValueError(f"attention: expected a batch of three axes, got shape {tuple(query.shape)}")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (
            projection(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection, x in zip(self.projections, (query, key, value))
        )
        mask = None
        for given in (
            _mask_of(attn_mask, self.heads),
            None if key_padding_mask is None else key_padding_mask[:, None, None],
        ):
            if given is not None:
                added = torch.where(given, -torch.inf, 0.0) if given.dtype == torch.bool else given
                mask = added if mask is None else mask + added
        weights, total = self.attention.weights(q, k, mask, False, None)
        y = self.output(self.attention.values(weights, v).transpose(1, 2).flatten(2))
        shown = None
        if need_weights:
            shown = torch.round(weights.double() / total.clamp(min=1.0) * 2.0**24) * 2.0**-24
            shown = (
                shown.sum(1) / torch.full((), float(self.heads), dtype=torch.float64, device=shown.device)
                if average_attn_weights
                else shown
            )
            shown = shown.to(self.profile.dtype)
        return (y if self.batch_first else y.transpose(0, 1)), shown


def _mask_of(mask: Tensor | None, heads: int) -> Tensor | None:
    """A mask ``(queries, keys)`` or ``(batch · heads, queries, keys)``, broadcastable to the scores."""
    return mask.unflatten(0, (-1, heads)) if mask is not None and mask.dim() == 3 else mask
