r"""An anomaly score that holds for clean and for contaminated training rows.

A density alone fails on contaminated data: it learns the anomalies too, the more so the more flexible it is, and a
tight cluster of them gets a high density.  The columns taken one by one cannot be fooled by a cluster, but see no
anomaly of combination.  So the score is the sum of two surprises, each on the scale of what is usual:

    s(x) = z(−log p(x)) + z(−Σ_j log p_j(x_j)),   z(u) = min((u − median) / MAD, LIMIT)                         (1)

p: the model of the rows;  p_j: the law of column j alone (:class:`~likely.models.independent.Independent`);  median and
MAD (median absolute deviation): of reference rows, which a share of anomalies below one half cannot move far.  High is
anomalous.  A score is *calibrated* by its tail probability among reference rows that no fit has seen
(:func:`~likely.evaluation.scores.tail_probability`).

The sum of standardised log-likelihoods is an old idea; with columns alone it is that of HBOS (Goldstein & Dengel 2012)
and ECOD (Li et al. 2022, arXiv:2201.00382).  What it is worth: benchmarks/anomaly.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

#: A surprise beyond this many deviations adds no more: one absurd cell must not drown the other law.
LIMIT = 50.0


@dataclass(frozen=True)
class Usual:
    """What is usual among reference rows: centre and scale of a surprise, in nats.

    >>> import torch
    >>> usual = Usual.of(torch.tensor([1.0, 2.0, 3.0, 4.0, 100.0]))
    >>> usual.centre, usual.scale
    (3.0, 1.0)
    >>> usual.standardise(torch.tensor([3.0, 5.0])).tolist()
    [0.0, 2.0]

    Args:
        centre: median.
        scale: median absolute deviation.
    """

    centre: float
    scale: float

    @classmethod
    def of(cls, surprise: Tensor) -> Usual:
        """From the surprises of reference rows, −log p in nats, shape ``(m,)``."""
        if surprise.dim() != 1 or len(surprise) == 0:
            raise ValueError(f"surprise: expected shape (m,) with m > 0, got {tuple(surprise.shape)}")
        values = surprise.double()
        centre = values.median()
        scale = (values - centre).abs().median()
        least = 1e-9 * float(centre.abs()) + 1e-12  # all reference rows are equally likely
        return cls(float(centre), max(float(scale), least))

    def standardise(self, surprise: Tensor) -> Tensor:
        """z of (1): float64, the shape of ``surprise``."""
        return ((surprise.double() - self.centre) / self.scale).clamp(max=LIMIT)


@dataclass(frozen=True)
class AnomalyScale:
    """The scale of the score (1).

    Args:
        joint: of −log p(x).
        columns: of −Σ_j log p_j(x_j).
    """

    joint: Usual
    columns: Usual

    @classmethod
    def of(cls, joint_nats: Tensor, columns_nats: Tensor) -> AnomalyScale:
        """From the log-likelihoods of reference rows under the two laws, in nats, shape ``(m,)`` each."""
        return cls(Usual.of(-joint_nats), Usual.of(-columns_nats))

    def score(self, joint_nats: Tensor, columns_nats: Tensor) -> Tensor:
        """The score (1) of rows from their log-likelihoods under the two laws: shape ``(n,)``; high is anomalous."""
        return self.joint.standardise(-joint_nats) + self.columns.standardise(-columns_nats)

    def explain(self, joint_cells: Tensor, columns_cells: Tensor) -> Tensor:
        """What each cell adds to the score, up to the limit and the centres: shape ``(n, cells)``.

        Args:
            joint_cells: for each cell how many nats less likely it is than usual, under the model of the rows.
            columns_cells: the same under the law of its column.
        """
        return joint_cells.double() / self.joint.scale + columns_cells.double() / self.columns.scale
