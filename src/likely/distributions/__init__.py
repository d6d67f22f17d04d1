"""Likelihoods: distributions with ``log_prob``, ``sample`` and a best guess, and the heads that make them of a context.

A distribution holds tensors whose leading axes are those of the context and whose trailing axes are the shape of one
example.  ``log_prob`` is elementwise (a value a cell, in nats) and in the units of the data as given.
"""

from __future__ import annotations

from likely.distributions.bernoulli import Bernoulli
from likely.distributions.categorical import Categorical
from likely.distributions.counts import Multinomial, NegativeBinomial
from likely.distributions.heads import Head, head, likelihoods
from likely.distributions.logistic import DiscretizedLogisticMixture, GridLogisticMixture
from likely.distributions.normal import Normal, StudentT
from likely.distributions.protocol import Distribution

__all__ = [
    "Bernoulli",
    "Categorical",
    "DiscretizedLogisticMixture",
    "Distribution",
    "GridLogisticMixture",
    "Head",
    "Multinomial",
    "NegativeBinomial",
    "Normal",
    "StudentT",
    "head",
    "likelihoods",
]
