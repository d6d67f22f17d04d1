"""The transformer's stack of layers: attention among tokens, then a network on each token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from likely.networks.attention import Attention, Cache, rotations, step_turn, turns
from likely.networks.linear import Linear
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
