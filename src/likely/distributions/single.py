"""The law of one cell of an example, cut out of the law of all of them."""

from __future__ import annotations

from typing import Any

from likely.distributions.bernoulli import Bernoulli
from likely.distributions.categorical import Categorical
from likely.distributions.counts import NegativeBinomial
from likely.distributions.heads import TableDistribution
from likely.distributions.logistic import DiscretizedLogisticMixture, GridLogisticMixture
from likely.distributions.protocol import Distribution


def one_cell(distribution: Distribution, j: int) -> Distribution:
    """The law of cell j alone, of shape ``(*lead, 1)``, of a distribution over cells ``(*lead, cells)``.

    >>> import torch
    >>> from likely.noise import StreamNoise
    >>> one_cell(Bernoulli(torch.tensor([[0.0, 100.0]])), 1).sample(StreamNoise(torch.Generator()))
    tensor([[1.]])

    Raises:
        TypeError: the cells of the distribution are not independent.
    """
    at = slice(j, j + 1)
    d: Any = distribution
    if isinstance(d, TableDistribution):
        if j in d.coded:
            return TableDistribution({0: d.coded[j]}, [], None)
        i = d.numeric.index(j)
        assert d.mixture is not None
        return TableDistribution({}, [0], _one_number(d.mixture, slice(i, i + 1)))
    if isinstance(d, Bernoulli):
        return Bernoulli(d.logits[..., at])
    if isinstance(d, Categorical):
        return Categorical(d.logits[..., at, :])
    if isinstance(d, DiscretizedLogisticMixture):
        return DiscretizedLogisticMixture(d.logits[..., at, :], d.means[..., at, :], d.log_scales[..., at, :], d.levels)
    if isinstance(d, NegativeBinomial):
        return NegativeBinomial(d.log_mean[..., at], d.log_dispersion.expand_as(d.log_mean)[..., at])
    raise TypeError(f"distribution: the cells of a {type(d).__name__} are not independent")


def _one_number(mixture: GridLogisticMixture, at: slice) -> GridLogisticMixture:
    return GridLogisticMixture(
        mixture.logits[..., at, :],
        mixture.means[..., at, :],
        mixture.given_log_scales[..., at, :],
        mixture.location[at],
        mixture.scale[at],
        mixture.resolution[at],
        mixture.atoms[at],
        None if mixture.recalled is None else mixture.recalled[at],
    )
