"""Attention among the tokens of a sequence, with rotary positions and a cache of keys and values.

    y_i = Σ_j softmax_j(q_i · k_j / √d) v_j               (Vaswani et al. 2017, arXiv 1706.03762, eq. 1)
    q_i ← R_i q_i,  k_j ← R_j k_j,  R_t = diag of turns by t θ_f,  θ_f = 10000^(−2f/d)
                                                          (Su et al. 2021, RoFormer, arXiv 2104.09864, eqs. 14–16)

In causal attention j ≤ i, so that keys and values of earlier tokens never change: a :class:`Cache` keeps them, and the
next token costs one row.  All operations have a rule in :mod:`likely.exact`, where a step with the cache gives what the
whole sequence gives, to the bit.  :class:`Walk` does the same in ordinary arithmetic, in as few calls as it can.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.exact import functions
from likely.networks.linear import Linear


def rotations(length: int, width: int) -> Tensor:
    """cos t θ_f and sin t θ_f for t < ``length`` and f < ``width`` / 2, float64: shape ``(2, length, width / 2)``.

    A machine's own cosine rounds its own way; this is made of sums and products alone, and has the same bits on every
    machine.

    >>> [round(v, 4) for v in rotations(3, 4)[:, 2].flatten().tolist()]  # cos 2, cos 0.02, sin 2, sin 0.02
    [-0.4161, 0.9998, 0.9093, 0.02]
    """

    def number(value: float) -> Tensor:  # a tensor, so that every division is one
        return torch.full((width // 2,), value, dtype=torch.float64)

    exponent = torch.arange(0, width, 2, dtype=torch.float64) / number(width)
    theta = functions.exp(-exponent * functions.log(number(1e4)))
    square, cos, sin = theta * theta, number(1.0), number(1.0)
    for k in range(20, 0, -2):  # Taylor's series from its end; θ ≤ 1
        cos = number(1.0) - square * cos / number(k * (k - 1))
        sin = number(1.0) - square * sin / number(k * (k + 1))
    turn = torch.stack([cos, sin * theta])
    table = torch.stack([number(1.0), number(0.0)])[:, None]
    while table.shape[1] < length:  # twice as many: the same turns after the turn that comes next
        table = torch.cat([table, _turned(table, turn[:, None])], 1)
        turn = _turned(turn, turn)
    return table[:, :length]


def _turned(a: Tensor, b: Tensor) -> Tensor:
    """Products of complex numbers, real and imaginary parts along the first axis."""
    return torch.stack([a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]])


class Cache:
    """Keys and values of the tokens so far, of one attention layer: shape ``(2, n, heads, length, d)``."""

    def __init__(self, n: int, heads: int, length: int, width: int, like: Tensor) -> None:
        self.kept = like.new_zeros(2, n, heads, length, width)
        self.size = 0

    def extend(self, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """Add those of the next token, shape ``(2, n, heads, d)``; keys and values of all tokens so far."""
        self.kept[:, :, :, self.size] = keys_values
        self.size += 1
        keys, values = self.kept[:, :, :, : self.size].unbind()
        return keys, values


class Walk:
    """Causal attention of the next token of n sequences in several layers: :meth:`advance`, then a call for each layer.

    A token costs so little arithmetic that the number of calls is what it takes.  So all layers have their keys and
    values together; a pair of features is a complex number, which one product turns, and a query's also divides by √d;
    and keys have their tokens last, as the product with a query reads them.

    Args:
        rotation: of all tokens, from :func:`turns`: shape ``(2, length, d)``.
        layers: number of layers.
        n: number of sequences.
        heads: of each layer.
        like: has the dtype and device.

    Attributes:
        qkv: where query, key and value of the next token of each sequence are put, shape ``(n, 3 width)``.
    """

    def __init__(self, rotation: Tensor, layers: int, n: int, heads: int, like: Tensor) -> None:
        length, d = rotation.shape[1:]
        turn = torch.complex(rotation[0, :, : d // 2], rotation[1, :, d // 2 :])
        self._turns = torch.stack([turn / math.sqrt(d), turn], 1)[:, :, None, None].unbind()  # of query and key
        keys, values = like.new_zeros(layers, n, heads, d, length), like.new_zeros(layers, n, heads, length, d)
        self._keys, self._values = keys.flatten(1, 2), values.flatten(1, 2)
        self._places = [*zip(*(zip(k.unbind(-1), v.unbind(-2)) for k, v in zip(keys, values)))]  # by token and layer
        self._size, self._shape = 0, (n, heads * d)
        # what comes in, the same as complex numbers, and these when they are turned, as real ones again
        self.qkv = like.new_zeros(n, 3 * heads * d)
        qkv = self.qkv.view(n, 3, heads, d)
        self._real, self._imaginary = qkv[:, :2].transpose(0, 1).chunk(2, -1)
        self._turned = turn.new_zeros(2, n, heads, d // 2)
        query, self._key = torch.view_as_real(self._turned).flatten(-2)
        self._query, self._value = query.view(n * heads, 1, d), qkv[:, 2]

    def advance(self) -> None:
        """On to the next token."""
        self._turn, self._place = self._turns[self._size], self._places[self._size]
        self._size += 1
        self._seen = [*zip(self._keys[..., : self._size].unbind(), self._values[:, :, : self._size].unbind())]

    def __call__(self, layer: int) -> Tensor:
        """What the heads of a layer find by the queries, keys and values in :attr:`qkv`: shape ``(n, width)``."""
        torch.complex(self._real, self._imaginary, out=self._turned).mul_(self._turn)
        new_key, new_value = self._place[layer]
        new_key.copy_(self._key)
        new_value.copy_(self._value)
        keys, values = self._seen[layer]
        return torch.bmm(torch.bmm(self._query, keys).softmax(-1), values).view(self._shape)


class Attention(nn.Module):
    """Self-attention with several heads.

    Args:
        width: features of a token.
        heads: of ``width`` / ``heads`` features each, an even number.
        causal: whether a token sees none that comes after it.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        if heads < 1 or width % (2 * heads):
            raise ValueError(f"heads: expected a number that divides half the width, {width} / 2, got {heads}")
        self.heads, self.causal = heads, causal
        self.qkv = Linear(width, 3 * width)
        self.output = Linear(width, width)
        nn.init.normal_(self.qkv.weight, std=1.0 / math.sqrt(width))
        nn.init.zeros_(self.qkv.bias)

    def forward(self, x: Tensor, rotation: Tensor, mask: Tensor | None = None) -> Tensor:
        """Shape ``(n, tokens, width)`` to the same.

        Args:
            rotation: of these tokens, from :func:`turns`: shape ``(2, tokens, d)``.
            mask: True where a query may see a key, shape broadcast to ``(n, heads, queries, keys)``.
        """
        n, tokens, width = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k = _rotated(qkv[:2], *rotation).unbind()
        causal = self.causal and mask is None
        with torch.autocast("cpu", enabled=False):  # its derivative there takes two to five times as long in bfloat16
            y = F.scaled_dot_product_attention(q, k, qkv[2].to(q.dtype), mask, is_causal=causal)
        return self.output(y.transpose(1, 2).reshape(n, tokens, width))

    def step(self, x: Tensor, turn: tuple[Tensor, Tensor], cache: Cache) -> Tensor:
        """The next token of each sequence alone, shape ``(n, width)`` to the same; keys and values join the cache.

        Args:
            turn: of this token, from :func:`step_turn`.
        """
        qkv = self.qkv(x).reshape(len(x), 3, self.heads, x.shape[1] // self.heads).transpose(0, 1)
        turned = _rotated(qkv, *turn)
        k, v = cache.extend(turned[1:])
        y = F.scaled_dot_product_attention(turned[0].unsqueeze(2), k, v)
        return self.output(y.reshape(x.shape))


def turns(rotation: Tensor) -> Tensor:
    """cos and ∓ sin from :func:`rotations`, a number for every feature of a head: shape ``(2, length, d)``."""
    cos, sin = rotation.unbind()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])


def step_turn(turn: Tensor) -> tuple[Tensor, Tensor]:
    """cos and ∓ sin for query, key and value of one token, from ``(2, d)`` of :func:`turns`: shape ``(3, 1, 1, d)``.

    A value is not turned: its cosines are 1 and its sines 0.
    """
    still = turn.new_tensor([[1.0], [0.0]]).expand_as(turn)
    cos, sin = torch.stack([turn, turn, still], 1)[:, :, None, None].unbind()
    return cos, sin


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair of features (f, f + d/2) turned by its token's angle."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
