"""Permutations of the cells along the first axis of an example (features, or channels): volume is kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from likely.bijections.bijection import Bijection


class Permutation(Bijection):
    """z[:, i] = x[:, order[i]].

    >>> Permutation([2, 0, 1])(torch.tensor([[10.0, 20.0, 30.0]]))[0]
    tensor([[30., 10., 20.]])
    """

    order: Tensor
    back: Tensor

    def __init__(self, order: Sequence[int]) -> None:
        super().__init__()
        places = torch.tensor([int(i) for i in order])
        if sorted(places.tolist()) != list(range(len(places))):
            raise ValueError(f"order: expected a permutation of 0 to {len(places) - 1}, got {places.tolist()}")
        self.register_buffer("order", places, persistent=False)
        self.register_buffer("back", places.argsort(), persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x.index_select(1, self.order), x.new_zeros(len(x))

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return z.index_select(1, self.back), z.new_zeros(len(z))


class Reverse(Permutation):
    """The first axis of an example turned round."""

    def __init__(self, features: int) -> None:
        super().__init__(range(features - 1, -1, -1))
