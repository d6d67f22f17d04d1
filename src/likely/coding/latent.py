"""The codec of a latent-variable model with a normal posterior: bits-back over a grid of latent values."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from likely.coding.bits_back import BitsBack
from likely.coding.categories import Tables, TabulatedCells
from likely.coding.cells import MOST_PRECISION, Mask
from likely.coding.codec import Codec, Mapped, ModelCodec
from likely.coding.distributions import codec_of
from likely.coding.intervals import NormalCells
from likely.coding.rows import Rows, spare_at_most
from likely.coding.sequential import Fine
from likely.coding.stack import Integers, Stack, initial_words
from likely.contract import Space
from likely.distributions import DiscretizedLogisticMixture, Distribution, Normal
from likely.exact import Network
from likely.exact.functions import log

#: The grid of the latent values: z = i · SPACING within ± BOUND.
SPACING, BOUND = 2.0**-8, 16.0
_MOST = int(BOUND / SPACING)


class LatentCodec:
    """Codes x with p(z), p(x | z, c) and q(z | x, c); it costs the negative one-sample bound.

    Args:
        space: of x.
        network: holds everything that ``posterior`` and ``likelihood`` compute.
        posterior: ``(x, condition) -> q(z | x, c)``, run by the network.
        likelihood: ``(z, condition) -> p(x | z, c)``, run by the network.
        prior: codec of the latent values on the grid, or None for N(0, I).
        latent_dim: dimension of z.
        spare_bits: see :meth:`likely.contract.Model.codec`.
    """

    initial = True

    def __init__(
        self,
        space: Space,
        network: Network,
        posterior: Callable[[Tensor, Tensor | None], Normal],
        likelihood: Callable[[Tensor, Tensor | None], Distribution],
        prior: ModelCodec | None,
        latent_dim: int,
        spare_bits: Sequence[int] | None = None,
    ) -> None:
        self._rows, self._network, self._prior, self._latent_dim = Rows(space), network, prior, latent_dim
        self._posterior, self._likelihood = posterior, likelihood
        self._spare = spare_at_most(spare_bits, space)

    @property
    def networks(self) -> Mapping[str, Network]:
        """The reproducible networks by name."""
        return {"model": self._network, **({} if self._prior is None else self._prior.networks)}

    def push(self, stack: Stack, x: Tensor, condition: Tensor | None = None) -> None:
        """Code a batch ``(n, *shape)``; NaN marks absent cells."""
        symbols, present = self._rows.symbols(x)
        self._codec(len(symbols), condition, present).push(stack, symbols)

    def pop(self, stack: Stack, n: int, condition: Tensor | None = None, present: Mask | None = None) -> Tensor:
        """Decode a batch of ``n`` examples."""
        return self._rows.values(self._codec(n, condition, present).pop(stack), present)

    def legal(self, x: Tensor) -> Tensor:
        """Which cells can be coded: all that are within the space."""
        return torch.ones(x.shape, dtype=torch.bool)

    def _codec(self, n: int, condition: Tensor | None, present: Mask | None) -> Codec:
        """The codec of the symbols of ``n`` examples."""
        device = self._network.device
        condition = None if condition is None else condition.to(device)

        def likelihood(z: Integers) -> Codec:
            values = (torch.from_numpy(z).double() * SPACING).float().to(device)
            return codec_of(self._network.run(self._likelihood, values, condition), present, spare_bits=self._spare)

        def posterior(symbols: Integers) -> Codec:
            x = self._rows.values(symbols, present).to(device)
            return codec_of(self._network.run(self._posterior, x, condition), spacing=SPACING, bound=BOUND)

        return BitsBack(self._prior_codec(n), likelihood, posterior)

    def _prior_codec(self, n: int) -> Codec:
        if self._prior is None:
            cells = TabulatedCells(_standard_normal(), 0, (n, self._latent_dim))
            return Mapped(cells, lambda z: z + _MOST, lambda symbols: symbols - _MOST)
        return _Batch(self._prior, n)


@functools.cache
def _standard_normal() -> Tables:
    """N(0, 1) on the grid as one table: cell i starts at i + ⌊F(i) (2^28 − cells)⌋."""
    zero = np.zeros(1)
    cells = NormalCells(zero, zero, SPACING, BOUND)
    starts = cells.cdf(np.arange(cells.cells + 1)[:, None])[:, 0]
    starts *= float((1 << MOST_PRECISION) - cells.cells)
    return Tables((np.floor(starts).astype(np.int64) + np.arange(cells.cells + 1))[None])


#: Vectors of latent values that are looked at, and one in how many scales may be narrow.
_LOOKS, _FEW = 32, 100


def narrow_levels(network: Network, likelihood: Callable[[Tensor, Tensor | None], Distribution], latent: int) -> bool:
    """Whether many of the logistics over levels are narrower than a level: then exact32 would put them beside it.

    Looks at fixed latent values, each a sum of twelve even numbers, in reproducible arithmetic: so encoder and decoder
    agree.
    """
    words = initial_words(0, 12 * _LOOKS * latent).reshape(12, _LOOKS, latent)
    z = np.rint((words.sum(0, dtype=np.uint64) * 2.0**-32 - 6.0) / SPACING) * SPACING
    law = network.run(likelihood, torch.from_numpy(z).float().to(network.device), None)
    if not isinstance(law, DiscretizedLogisticMixture):
        return False
    width = -float(log(np.array([0.5 * (law.levels - 1)]))[0])
    return int((law.log_scales < width).sum()) * _FEW > law.log_scales.numel()


def refine(rules: nn.Module, original: nn.Module) -> None:
    """Compute head and last stage of the decoder in ``exact64``: the whole decoder, where it has no stages.

    Args:
        rules: the model in ``exact32``, changed in place.
        original: the model.
    """
    head, decoder = ("likelihood_head", "output"), ("decoder",)
    paths: list[tuple[str, ...]] = [head, decoder]
    stages: Any = getattr(original.decoder, "stages", None)
    if stages is not None:
        paths = [head, (*decoder, "stages", str(len(stages) - 1)), (*decoder, "final")]
    for *path, name in paths:
        setattr(rules.get_submodule(".".join(path)), name, Fine(original.get_submodule(".".join((*path, name)))))


class _Batch:
    """A model's codec over latent values as the codec of n rows of grid symbols."""

    def __init__(self, codec: ModelCodec, n: int) -> None:
        self._codec, self._n = codec, n

    def push(self, stack: Stack, symbols: Any) -> None:
        self._codec.push(stack, torch.from_numpy(symbols).double() * SPACING)

    def pop(self, stack: Stack) -> Integers:
        return torch.round(self._codec.pop(stack, self._n) / SPACING).long().numpy()
