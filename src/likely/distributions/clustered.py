"""A category out of very many, as a cluster of categories and a member of it."""

from __future__ import annotations

import torch
from torch import Tensor

from likely.distributions.categorical import Categorical, sample_categories
from likely.distributions.protocol import mix
from likely.noise import Noise


class Clustered:
    """p(x) = p(c) p(m | c) for x = c · members + m, p(c) = softmax(l)_c, p(m | c) = softmax(b_c + k)_m.

    So 2 √levels numbers are computed for a law over all levels (Goodman 2001, arXiv cs/0108006).  What the levels are
    like at any time is in b; k moves the members of all clusters alike.

    >>> law = Clustered(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[0.0, 0.0], [0.0, -torch.inf]]))
    >>> law.log_prob(torch.tensor([[0.0], [1.0], [2.0]])).exp().flatten().tolist()
    [0.25, 0.25, 0.5]

    Args:
        logits: l, shape ``(*lead, 1, clusters)``.
        member_logits: k, shape ``(*lead, 1, members)``.
        table: b, shape ``(clusters, members)``; −∞ where there is no such level.
    """

    def __init__(self, logits: Tensor, member_logits: Tensor, table: Tensor) -> None:
        self.logits, self.member_logits, self.table = logits, member_logits, table

    def members(self, clusters: Tensor) -> Categorical:
        """p(m | c) for clusters c, int64, shape ``(*lead, 1)``."""
        return Categorical(self.member_logits + self.table[clusters])

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Clusters and members of codes, int64."""
        codes, size = x.long(), self.table.shape[1]
        return codes // size, codes % size

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, for codes of shape ``(*lead, 1)``."""
        lead = torch.broadcast_shapes(x.shape, self.logits.shape[:-1])
        clusters, members = self.split(x.expand(lead))
        return Categorical(self.logits).log_prob(clusters) + self.members(clusters).log_prob(members)

    def sample(self, noise: Noise) -> Tensor:
        """A cluster, then a member of it."""
        first = Categorical(self.logits)
        clusters = sample_categories(first.log_probs, noise.uniform(first.log_probs.shape[:-1]).to(self.logits))
        return clusters.to(self.logits.dtype) * self.table.shape[1] + self.members(clusters).sample(noise)

    def best(self, weights: Tensor | None = None) -> Tensor:
        """The likeliest member of the likeliest cluster."""
        p = Categorical(self.logits).log_probs.exp()
        clusters = mix(p, weights, 2).argmax(-1)
        chosen = clusters if weights is None else clusters.unsqueeze(-2).expand(p.shape[:-1])
        joint = p.gather(-1, chosen.unsqueeze(-1)) * self.members(chosen).log_probs.exp()
        members = mix(joint, weights, 2).argmax(-1)
        return (clusters * self.table.shape[1] + members).to(self.logits.dtype)
