"""The order in which training visits the examples: a pure function of the seed and the position, at constant cost."""

from __future__ import annotations

import torch
from torch import Tensor

from likely.training.seeds import ORDER, Seeds

#: Up to this many rows and bytes an epoch is one uniform permutation; above it, blocks are shuffled in pools.
PERMUTED_ROWS, PERMUTED_BYTES = 1 << 20, 1 << 30
BLOCK_BYTES, POOL_BYTES, POOL_ROWS = 1 << 16, 1 << 26, 1 << 18


class Order:
    """An endless sequence of row numbers: epoch after epoch, each a permutation of its own.

    Position ``p`` belongs to epoch ``p // n``.  Batches are cut from the endless sequence, so all have the same size
    (one that straddles two epochs takes rows of both) and every row is visited equally often.

    Small data are permuted uniformly.  Large data (more than 2²⁰ rows, or 1 GiB) are cut, from a random offset, into
    blocks of neighbouring rows; the blocks are shuffled, gathered in pools, and the rows of a pool are shuffled.  Time
    per row is constant, memory is a pool of numbers, and a memory map is read in runs of 64 KiB and not row by row.

    >>> order = Order(n=5, seed=0)
    >>> sorted(order.rows(5, 10).tolist())
    [0, 1, 2, 3, 4]
    >>> torch.equal(order.rows(3, 8), Order(n=5, seed=0).rows(3, 8))
    True

    Args:
        n: number of rows.
        seed: seed of the run.
        row_bytes: size of one example in bytes, which sets the size of blocks and pools.
        device: where the numbers are to be.
    """

    def __init__(self, n: int, seed: int, row_bytes: int = 1, device: torch.device | str = "cpu") -> None:
        self.n, self._device = n, device
        self._seeds = Seeds(seed, ORDER)
        self._generator = torch.Generator()
        if n <= PERMUTED_ROWS and n * row_bytes <= PERMUTED_BYTES:
            self._block, self._pool = 1, n
        else:
            self._block = max(1, BLOCK_BYTES // max(1, row_bytes))
            rows = min(POOL_ROWS, max(POOL_BYTES // max(1, row_bytes), 1024 * self._block))
            self._pool = self._block * max(1, min(rows, n) // self._block)
        self._epoch = -1
        self._blocks = torch.empty(0, dtype=torch.int64)
        self._offset = 0
        self._start = self._stop = 0
        self._rows = torch.empty(0, dtype=torch.int64)

    def rows(self, start: int, stop: int) -> Tensor:
        """Row numbers at positions ``start:stop`` of the endless sequence, int64, shape ``(stop - start,)``."""
        if start >= self._start and stop <= self._stop:
            return self._rows[start - self._start : stop - self._start]
        pieces = []
        while start < stop:
            if not self._start <= start < self._stop:
                self._load(start)
            end = min(stop, self._stop)
            pieces.append(self._rows[start - self._start : end - self._start])
            start = end
        return torch.cat(pieces)

    def _load(self, position: int) -> None:
        """Shuffle the pool that holds ``position``."""
        epoch, within = divmod(position, self.n)
        pool = within // self._pool
        pools = -(-self.n // self._pool)
        if epoch != self._epoch:
            self._epoch = epoch
            self._generator.manual_seed(self._seeds(epoch * (pools + 1)))
            whole = self.n // self._block
            self._offset = int(torch.randint(self.n, (), generator=self._generator)) if pools > 1 else 0
            self._blocks = torch.randperm(whole, generator=self._generator) if pools > 1 else torch.empty(0)
        first, last = pool * self._pool, min((pool + 1) * self._pool, self.n)
        self._generator.manual_seed(self._seeds(epoch * (pools + 1) + 1 + pool))
        shuffled = torch.randperm(last - first, generator=self._generator)
        if pools > 1:
            # Whole blocks in shuffled order; what is left over after the last whole block comes last, and the random
            # offset makes it consist of other rows in every epoch.
            positions = first + shuffled
            block = positions // self._block
            known = block < len(self._blocks)
            moved = self._blocks[block.clamp(max=len(self._blocks) - 1)] * self._block + positions % self._block
            shuffled = (torch.where(known, moved, positions) + self._offset) % self.n
        self._start, self._stop = epoch * self.n + first, epoch * self.n + last
        self._rows = shuffled.to(self._device)
