"""The transformer's stack of layers: attention among tokens, then a network on each token."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from likely.networks.attention import Attention, Cache, Walk, rotations, step_turn, turns
from likely.networks.linear import Linear, addmm
from likely.networks.mlp import make_activation


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm: Xiong et al. 2020, arXiv 2002.04745).

    Both branches start at zero, so that the stack starts as the identity.
    """

    def __init__(self, width: int, heads: int, hidden: int, activation: str, dropout: float, causal: bool) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal)
        self.before_mlp = nn.LayerNorm(width)
        last = Linear(hidden, width)
        self.mlp = nn.Sequential(Linear(width, hidden), make_activation(activation), last)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        for layer in (self.attention.output, last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shape ``(n, tokens, width)`` to the same; see :meth:`Attention.forward`."""
        x = x + self.dropout(self.attention(self.before_attention(x), rotation, mask))
        return x + self.dropout(self.mlp(self.before_mlp(x)))

    def step(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
        """The next token alone, shape ``(n, width)`` to the same; see :meth:`Attention.step`."""
        x = x + self.attention.step(self.before_attention(x), turn, cache)
        return x + self.mlp(self.before_mlp(x))


class TransformerLayers(nn.Module):
    """``layers`` blocks and a last normalisation: shape ``(n, tokens, width)`` to the same.

    >>> layers = TransformerLayers(6, width=8, heads=2, layers=2)
    >>> x = torch.randn(3, 6, 8)
    >>> caches = layers.caches(3, x)
    >>> steps = [layers.step(x[:, t], caches) for t in range(6)]
    >>> torch.allclose(torch.stack(steps, 1), layers(x), atol=1e-5)
    True
    >>> with torch.no_grad():
    ...     walk = layers.walk(3, x)
    ...     torch.allclose(walk(x[:, 0]), steps[0], atol=1e-5)
    True

    Args:
        length: the most tokens.
        width: features of a token.
        heads: of each attention.
        layers: blocks.
        hidden: width of the networks on tokens; by default four times ``width``.
        causal: whether a token sees none that comes after it.
    """

    rotation: Tensor

    def __init__(
        self,
        length: int,
        width: int,
        heads: int,
        layers: int,
        hidden: int | None = None,
        activation: str = "gelu",
        dropout: float = 0.0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.length, self.heads = length, heads
        self.blocks = nn.ModuleList(
            Block(width, heads, hidden or 4 * width, activation, dropout, causal) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        table = turns(rotations(length, width // heads)).to(torch.get_default_dtype())
        self.register_buffer("rotation", table, persistent=False)

    def caches(self, n: int, like: Tensor) -> list[Cache]:
        """Empty caches for ``n`` sequences, with the dtype and device of ``like``."""
        width = self.rotation.shape[-1]
        return [Cache(n, self.heads, self.length, width, like) for _ in self.blocks]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """All tokens at once.

        Args:
            mask: True where a token may see another, shape broadcast to ``(n, heads, tokens, tokens)``.
        """
        rotation = self.rotation[:, : x.shape[1]]
        for block in self.blocks:
            x = block(x, rotation, mask)
        return self.norm(x)

    def step(self, x: Tensor, caches: list[Cache]) -> Tensor:
        """The next token alone, shape ``(n, width)`` to the same; dropout, which is for training, is left out."""
        turn = step_turn(self.rotation[:, caches[0].size])
        for block, cache in zip(self.blocks, caches):
            assert isinstance(block, Block)
            x = block.step(x, turn, cache)
        return self.norm(x)

    def walk(self, n: int, like: Tensor) -> Callable[[Tensor], Tensor]:
        """:meth:`step` of n sequences from their beginning on, without gradients, and in few calls.

        Args:
            like: has the dtype and device.

        Returns:
            A function from the next token of each sequence to what comes out there, shape ``(n, width)`` to the same.
        """
        if like.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(like.device.type):
            return partial(self.step, caches=self.caches(n, like))  # there are no complex numbers of half precision
        walk = self._walk(n, like)
        next(walk)
        return walk.send

    def _walk(self, n: int, like: Tensor) -> Generator[Tensor, Tensor, None]:
        # one token is so little arithmetic that the call of a module takes as long
        attention = Walk(self.rotation, len(self.blocks), n, self.heads, like)
        blocks, last = [*enumerate(map(_weights, self.blocks))], _normalising(self.norm)
        qkv, layer_norm = attention.qkv, torch.layer_norm
        x = yield like
        for _ in range(self.length):
            x = x.clone()
            attention.advance()
            for layer, (norm1, w_qkv, b_qkv, w_out, b_out, norm2, w_in, b_in, activate, w_last, b_last) in blocks:
                addmm(b_qkv, layer_norm(x, *norm1), w_qkv, out=qkv)
                addmm(x, attention(layer), w_out, out=x).add_(b_out)
                hidden = activate(addmm(b_in, layer_norm(x, *norm2), w_in))
                addmm(x, hidden, w_last, out=x).add_(b_last)
            x = yield layer_norm(x, *last)


def _normalising(norm: nn.LayerNorm) -> tuple[Any, ...]:
    return norm.normalized_shape, norm.weight, norm.bias, norm.eps


def _weights(block: Any) -> tuple[Any, ...]:
    """What is multiplied and added in a block, in order, and its activation.

    x Φ(x) = (u + u erf u) / √2 with u = x / √2: both factors are left to the weights.
    """
    attention, (first, activation, last) = block.attention, block.mlp
    gelu = isinstance(activation, nn.GELU)
    factor = math.sqrt(0.5) if gelu else 1.0
    return (
        *(_normalising(block.before_attention), attention.qkv.weight.t(), attention.qkv.bias),
        *(attention.output.weight.t(), attention.output.bias),
        *(_normalising(block.before_mlp), factor * first.weight.t(), factor * first.bias),
        *(_erf_gelu if gelu else activation.forward, factor * last.weight.t(), last.bias),
    )


def _erf_gelu(u: Tensor) -> Tensor:
    return torch.addcmul(u, u, torch.erf(u))
