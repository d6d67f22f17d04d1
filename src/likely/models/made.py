r"""MADE: every column given those before it, by a masked network (Germain et al. 2015, arXiv 1502.03509).

    log p(x) = Σ_t log p(x_{o(t)} | x_{o(1)} … x_{o(t−1)})                    in an order o of the cells        (1)
    p(x) = (1/K) Σ_k p_k(x)                                                   K members, each with its order    (2)

Symbols: x example, c condition, o order, t place, D cells, k member, pa(j) the few parents of column j.

Each member is trained on its own likelihood; the mixture (2) of normalised laws is a normalised law.

**Order and sketch.**  The law of a column given those before it is a *sketch*, counted and not trained, times what a
network adds: logits = log p(x_j | x_pa(j)) + network(x_<j).  The sketch is a sparse graph of the columns with smoothed
tables and linear regressions (:mod:`likely.inference.structure`), which gives the first member its order too; the
network's output starts at zero, so that training begins at a Bayesian network and keeps what the held-out rows confirm.
A column whose values come again though its grid is fine comes first in an order that is free, if rows of the same value
are alike in other columns: the sketch of these is mixed with what is remembered of such rows
(:mod:`likely.inference.memory`).
With any order the sketch is the joint normal law of the features (:mod:`likely.inference.normal`), whose conditionals
are known for every set of cells.

**Any order** (``order="any"``).  The network is not masked but told which cells are known: one for all D! orders
(Uria, Murray & Larochelle 2014, arXiv 1310.1757; Hoogeboom et al. 2022, arXiv 2110.02037).  With d known cells drawn at
random, the mean over the others of −D log p(x_j | known) is, in expectation, minus the mean of (1) over all orders:

    loss = E_d E_{known} D/(D − d) Σ_{j unknown} −log p(x_j | x_known)                       (ARDM, eq. 5)      (3)

That mean is no likelihood of one model.  ``bound`` is: it evaluates (1) in ``orders`` fixed orders and mixes them by
(2).  What the network is for are conditionals: any cells given any others, for imputation and conditional draws.

**Missing cells** are information: a conditional sees that a cell before it is missing, and the missing cell is no
factor of (1).  The bound is log p(observed cells | which are observed), so that values may depend on what is missing.
With ``order="any"`` a missing cell is one that is not known, and rows with holes are rows of which less is known.

A column of very many categories is spelled as two, cluster and member of the cluster, p(v) = p(c) p(m | c) (Goodman
2001, arXiv cs/0108006), so that memory is linear in its levels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from likely.contract import (
    Batches,
    Binary,
    Bound,
    Column,
    Counts,
    Integers,
    Loss,
    Model,
    NoCodec,
    Reals,
    Space,
    Table,
    Tokens,
    Unsupported,
    noise_or_global,
)
from likely.data.streaming import Reservoir, Seen
from likely.distributions import Distribution, head, likelihoods
from likely.distributions.categorical import sample_categories
from likely.distributions.heads import BernoulliHead, CategoricalHead, Head, TableDistribution, TableHead
from likely.distributions.single import one_cell
from likely.inference.memory import Memory
from likely.inference.normal import MOST_FEATURES, REACH, JointNormal
from likely.inference.structure import Floats, Graph, Rows, Search, Sketch
from likely.networks import Features, Linear, ResidualMLP, full_precision, make_activation
from likely.networks.features import PiecewiseLinear
from likely.networks.masked import MaskedLinear
from likely.networks.mlp import glorot
from likely.noise import Noise

if TYPE_CHECKING:
    from likely.coding.cellwise import CellwiseCodec, Law

#: Most cells of an example whose order and sketch are learned.
MOST_SKETCHED = 100
#: Rows from which they are learned, and numbers in these rows.
SKETCH_ROWS, SKETCH_CELLS = 100_000, 10_000_000
#: A column with more levels is spelled as two.
MOST_LEVELS = 1024
#: A numeric column with far outliers and a value of a larger share (beyond those around it) follows no normal guess.
MOST_ATOM = 0.5
#: Largest change of an atom's logit by a normal guess.
_MOST_TILT = 6.0
#: Rows to which the joint normal law is fitted.
NORMAL_ROWS = 5000
#: Least probability of a code, and least deviation of a number in standard units, that the joint normal law may guess.
_LEAST_SHARE, _LEAST_DEVIATION = 0.005, 0.01
#: Logit of a code that cannot be.
_NEVER = -1e4

#: N(0, 1) as K logistics: spacing of the means, scale, and v of the weights ∝ exp(−m²/2v), for the least divergence
#: (nats: 0.0095, 0.0022, 0.0007, 0.0003, 0.00014, 0.00007 for K = 1 … 6, 0.00002 for K = 10).
_NORMAL = {
    1: (0.343, 0.572, 0.567),
    2: (1.1171, 0.4637, 0.5107),
    3: (0.9769, 0.4078, 0.6232),
    4: (0.8749, 0.3739, 0.6332),
    5: (0.7930, 0.3491, 0.6576),
    6: (0.7246, 0.3299, 0.6821),
    8: (0.6167, 0.3021, 0.7220),
    10: (0.5351, 0.2833, 0.7501),
}


class Made(Model):
    """Autoregressive model of any space: each cell given those before it, in one order, several, or any.

    Args:
        space: space of the examples.
        condition: space of what the model is conditioned on, or None.
        hidden: widths of the hidden layers, all equal: each adds to the one before it.
        activation: ``relu``, ``elu``, ``gelu``, ``silu``, ``softplus`` or ``tanh``.
        dropout: share of hidden units dropped in training.
        order: ``learned`` (by the sketch, for at most 100 cells), ``given`` (as the cells stand), ``random``, a list of
            the cells, or ``any``: a network for all orders.
        orders: K, members of the mixture; those after the first have random orders.  With ``any`` the members share
            one network.
        sketch: whether a counted graph of at most 100 columns is what the network adds to.
        embedding_dim: features of a code.
        parts: further features of a numeric cell: how far it has come through each of so many parts of its values.
        likelihood: ``auto`` or a name of :func:`likely.distributions.likelihoods`.
        likelihood_options: options of the likelihood's head, such as ``{"components": 5}``.
        prior_scale: standard deviation, before any data, of the weights by which the network changes the sketch; the
            loss has their log-density, spread over the training rows.  0 for none; by default 0.03, and none with
            ``any``, where it was measured to cost more than it saves.
        order_seed: of the random orders.

    Raises:
        Unsupported: an option does not suit the space.

    >>> model = Made(Binary((6,)), hidden=(16,))
    >>> model.bound(torch.ones(3, 6)).kind
    'exact'
    """

    spaces = (Binary, Integers, Reals, Counts, Tokens, Table)
    conditional = True
    #: A missing cell says something, so that rows with and without it have laws of their own.
    reads_holes = True
    rows: Tensor

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        *,
        hidden: Sequence[int] = (256, 256),
        activation: str = "silu",
        dropout: float = 0.1,
        order: str | Sequence[int] = "learned",
        orders: int = 1,
        sketch: bool = True,
        embedding_dim: int = 16,
        parts: int = 8,
        likelihood: str = "auto",
        likelihood_options: Mapping[str, Any] | None = None,
        prior_scale: float | None = None,
        order_seed: int = 0,
    ) -> None:
        super().__init__(space, condition)
        if orders < 1:
            raise ValueError(f"orders: expected at least 1, got {orders}")
        if isinstance(order, str) and order not in ("learned", "given", "random", "any"):
            raise ValueError(f"order: expected learned, given, random, any or a list of the cells, got {order!r}")
        if not hidden or len(set(hidden)) != 1:
            raise ValueError(f"hidden: expected layers of one width, got {tuple(hidden)}")
        self.any_order = order == "any"
        self.spelling = Spelling(space, self.any_order)
        if not isinstance(order, str) and sorted(order) != list(range(space.dims)):
            raise ValueError(f"order: expected the cells 0 to {space.dims - 1}, each once, got {list(order)}")
        self.condition_features = Features(condition) if condition is not None else None
        width = math.prod(self.condition_features.shape) if self.condition_features is not None else 0
        self.register_buffer("_working", torch.zeros(()), persistent=False)  # has the dtype of the arithmetic
        self._working: Tensor

        learned = sketch and space.dims <= MOST_SKETCHED
        generator = np.random.default_rng(order_seed)
        starts = []
        for k in range(orders):
            start = [int(t) for t in generator.permutation(space.dims)]
            if k == 0 and not self.any_order and order != "random":
                start = list(range(space.dims)) if isinstance(order, str) else [int(t) for t in order]
            starts.append(self.spelling.order(start))
        options = dict(likelihood_options or {})
        if isinstance(self.spelling.inner, Table):
            options = {"recall": True, "atoms": 128, "atom_share": 0.001, **options}
        self.members = nn.ModuleList()
        for k, start in enumerate(starts[:1] if self.any_order else starts):
            self.members.append(
                _Member(
                    self.spelling,
                    start,
                    learns_order=learned and order == "learned" and k == 0,
                    free=k > 0 or order in ("learned", "random"),
                    any_order=self.any_order,
                    sketched=learned,
                    context=width,
                    hidden=hidden,
                    activation=activation,
                    dropout=dropout,
                    embedding_dim=embedding_dim,
                    parts=parts,
                    likelihood=likelihood,
                    options=options,
                )
            )
        if prior_scale is None:
            prior_scale = 0.0 if self.any_order else 0.03
        if not prior_scale >= 0.0:
            raise ValueError(f"prior_scale: expected a number from 0 up, got {prior_scale}")
        self.orders, self.prior_scale = orders, prior_scale
        self._any_orders = starts
        self.register_buffer("rows", torch.zeros(()))

    # The bound -----------------------------------------------------------------------------------------------

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """log p(x | c) of the observed cells in nats, exact: equations (1) and (2)."""
        cells = self._cells(self.spelling(x), self._context(condition))
        nats = torch.logsumexp(cells.sum(2), 0) - math.log(self.orders) if self.orders > 1 else cells[0].sum(1)
        return Bound("exact", {"cells": nats})

    def column_nats(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Each cell's share of the bound in nats, 0 where missing: shape ``(batch, *space.shape)``; they sum to it.

        log p of the cell given those before it; of several members the mean by responsibility, and of what the mixture
        costs more than that mean an equal share.
        """
        spelled = self.spelling(x)
        cells = self._cells(spelled, self._context(condition))
        total = cells.sum(2)
        share = torch.softmax(total, 0)
        mean = (share.unsqueeze(2) * cells).sum(0)
        rest = torch.logsumexp(total, 0) - math.log(self.orders) - (share * total).sum(0)
        seen = (~torch.isnan(spelled)).to(mean)
        mean = mean + seen * (rest / seen.sum(1).clamp(min=1.0)).unsqueeze(1)
        out = mean.new_zeros(len(x), self.space.dims)
        out.index_add_(1, torch.tensor(self.spelling.source, device=x.device), mean)
        return out.reshape(x.shape)

    def loss(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None, step: int = 0) -> Loss:
        """−log p per dimension, the mean over the members; for any order equation (3), an estimate with one draw."""
        context, spelled = self._context(condition), self.spelling(x)
        if self.any_order:
            nats = self._any_order_nats(spelled, context, noise_or_global(noise, x)).mean()
        else:
            nats = self._cells(spelled, context).sum(2).mean()
        log = {"cells": nats.detach()}
        if self.prior_scale and self.training and self.rows > 0:
            nats = nats - self._squares() / (2.0 * self.prior_scale**2 * self.rows * len(self.members))
        return Loss(nats / -self.space.dims, log)

    def _squares(self) -> Tensor:
        """Sum of the squares of the weights by which the networks change the sketches."""
        weights = [weight for member in self._each() for weight in member.network.speaking()]
        return torch.stack([weight.square().sum() for weight in weights]).sum()

    def _any_order_nats(self, x: Tensor, context: Tensor | None, noise: Noise) -> Tensor:
        """Minus equation (3) for one draw of d and of the known cells, of the observed ones: shape ``(batch,)``."""
        member, seen = self._member(0), ~torch.isnan(x)
        # A random order of the observed cells: the missing ones come last and are never asked for.
        keys = noise.uniform(x.shape).to(x.device).masked_fill(~seen, 2.0)
        place = keys.argsort(1).argsort(1)
        count = seen.sum(1, keepdim=True)
        first = (noise.uniform((len(x), 1)).to(x.device) * count).long().clamp(max=(count - 1).clamp(min=0))
        asked = seen & (place >= first)
        law = member.law(x.masked_fill(asked, torch.nan), context)
        nats = torch.where(asked, law.log_prob(torch.where(seen, x, 0.0)), 0.0)
        return nats.sum(1) * (count / (count - first).clamp(min=1)).squeeze(1)

    def _cells(self, x: Tensor, context: Tensor | None) -> Tensor:
        """log p_k of every cell given those before it, 0 where missing: shape ``(members, batch, cells)``."""
        seen = ~torch.isnan(x)
        filled = torch.where(seen, x, 0.0)
        found = []
        if not self.any_order:
            for k in range(self.orders):
                nats = self._member(k).law(x, context).log_prob(filled)
                found.append(torch.where(seen, nats, 0.0))
            return torch.stack(found)
        for order in self._any_orders:
            columns: list[Tensor] = [filled.new_zeros(())] * len(order)
            for place, t in enumerate(order):
                law = self._member(0).cell(_unknown(x, order[place:]), t, context)
                nats = law.log_prob(filled[:, t : t + 1])
                columns[t] = torch.where(seen[:, t : t + 1], nats, 0.0)
            found.append(torch.cat(columns, 1))
        return torch.stack(found)

    # What a user asks of it ----------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """``n`` complete examples, cell after cell, each of a member drawn by lot."""
        noise, context = noise_or_global(noise, self), self._context(condition)
        empty = torch.full((n, len(self.spelling.source)), torch.nan, dtype=torch.float64, device=self._working.device)
        chosen = (noise.uniform((n, 1)).to(empty) * self.orders).long() if self.orders > 1 else None
        x = self._walk(0, empty, context, noise)
        for k in range(1, self.orders):
            assert chosen is not None
            x = torch.where(chosen == k, self._walk(k, empty, context, noise), x)
        return self.spelling.read(x)

    def _walk(self, k: int, x: Tensor, context: Tensor | None, noise: Noise) -> Tensor:
        """The rows with their unknown cells drawn by member k, in its order."""
        member, order, given = self._member(k), self._order(k), x
        x = x.clone() if self.any_order else torch.full_like(x, torch.nan)
        for t in order:
            known = ~torch.isnan(given[:, t])
            if not known.all():
                drawn = member.cell(x, t, context).sample(noise)[:, 0].to(x)
                x[:, t] = torch.where(known, given[:, t], drawn)
            else:
                x[:, t] = given[:, t]
        return x

    @torch.no_grad()
    def impute(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        noise: Noise | None = None,
        draws: int = 0,
        samples: int = 50,
        on_grid: bool = True,
    ) -> Tensor:
        """Missing cells filled from p(missing | observed, c); observed cells stay.

        With ``order="any"`` a best value is read off the cell's conditional given all observed ones, in one pass, and a
        draw is a walk through the missing cells in one of the orders.  In a fixed order both come from ``samples``
        walks a row, each weighted by what it makes of the observed cells after its missing ones (self-normalised).

        Args:
            draws: 0 for the single best values (mean of numbers, mode of codes), shape of ``x``; m for m multiple
                imputations, shape ``(m, *x.shape)``.
            samples: walks of a row, for a fixed order.
            on_grid: whether best values are brought to what their columns can hold; False leaves them the means.
        """
        noise, context = noise_or_global(noise, x), self._context(condition)
        spelled = self.spelling(x)
        if self.any_order:
            if not draws:
                filled = [self._best(spelled, context, on_grid)]
            else:
                filled = [self._walk(i % self.orders, spelled, context, noise) for i in range(draws)]
        else:
            walks, log_w = self._weighted(spelled, context, noise, max(samples, 2 * draws))
            if draws:
                chosen = sample_categories(torch.log_softmax(log_w, 1), noise.uniform((len(x), draws)).to(log_w))
                rows = torch.arange(len(x), device=x.device)
                filled = [walks[chosen[:, i], rows] for i in range(draws)]
            else:
                filled = [self._central(walks, torch.softmax(log_w, 1), spelled, on_grid)]
        out = torch.stack([self.spelling.read(f).to(x.dtype) for f in filled])
        out = torch.where(torch.isnan(x), out, x)
        return out if draws else out[0]

    def _best(self, x: Tensor, context: Tensor | None, on_grid: bool) -> Tensor:
        """Best value of every unknown cell given the known ones; the parts of a split column one after the other."""
        filled = x
        for cells in self.spelling.rounds:
            law = self._member(0).law(filled, context)
            best = law.best().to(x)
            if not on_grid and isinstance(law, TableDistribution) and law.mixture is not None:
                best[:, law.numeric] = law.mixture.mean().to(x)
            missing = torch.isnan(filled)
            missing[:, [j for j in range(x.shape[1]) if j not in cells]] = False
            filled = torch.where(missing, best, filled)
        return torch.where(torch.isnan(filled), best, filled)

    def _weighted(self, x: Tensor, context: Tensor | None, noise: Noise, samples: int) -> tuple[Tensor, Tensor]:
        """Walks that keep the known cells, shape ``(samples, batch, cells)``, and log-weights ``(batch, samples)``.

        The weight of a walk is the probability of the known cells given those before them.
        """
        seen = ~torch.isnan(x)
        walks, log_w = [], []
        for i in range(samples):
            k = i % self.orders
            walk = self._walk(k, x, context, noise)
            nats = self._member(k).law(walk, context).log_prob(walk)
            walks.append(walk)
            log_w.append(torch.where(seen, nats, 0.0).sum(1))
        return torch.stack(walks), torch.stack(log_w, 1)

    def _central(self, walks: Tensor, weights: Tensor, x: Tensor, on_grid: bool) -> Tensor:
        """Weighted mean of numbers and mode of codes over the walks, where x is unknown."""
        weights = weights.t()
        out = (weights.unsqueeze(2) * walks.nan_to_num(0.0)).sum(0)
        for j, levels in enumerate(self.spelling.levels):
            if levels:
                votes = torch.zeros(len(x), levels, dtype=weights.dtype, device=x.device)
                votes.scatter_add_(1, walks[:, :, j].t().long(), weights.t().contiguous())
                out[:, j] = votes.argmax(1).to(out)
        out = self.spelling.on_grid(out) if on_grid else out
        return torch.where(torch.isnan(x), out, x)

    def codec(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> CellwiseCodec:
        """Codes cell after cell at −log2 of (1) bits, or (2) by bits-back, in reproducible arithmetic.

        Raises:
            NoCodec: real numbers without a grid.
        """
        from likely.coding import rows
        from likely.coding.cellwise import CellwiseCodec
        from likely.exact import network

        rows.Rows(self.space)  # refuses spaces without a probability
        if self._member(0).normal is not None:
            raise NoCodec(
                "the joint normal law of order='any' is solved in floating point; use sketch=False, or an order"
            )
        exact = network(self)
        model = exact.module
        assert isinstance(model, Made)
        spare = rows.spare_at_most(spare_bits, self.spelling.inner)
        without = [j for j, c in enumerate(self.spelling.columns) if c.numeric and c.resolution is None]

        def law(k: int) -> Law:
            return lambda x, t, condition: model._member(k).cell(x, t, model._context(condition))

        return CellwiseCodec(
            self.spelling.inner,
            self.spelling,
            self.spelling.read,
            self.spelling.source,
            exact,
            [law(k) for k in range(self.orders)],
            [self._order(k) for k in range(self.orders)],
            dict(zip(without, spare or ())),
        )

    # Beginning -----------------------------------------------------------------------------------------------

    def initialise(self, batches: Batches) -> None:
        """Scales, output biases, orders and sketches, from a few passes over the data."""
        if self.condition_features is not None:
            self.condition_features.initialise(batches, of_condition=True)
        spelled = Seen(batches, self.spelling)
        rows: Tensor | None = None
        if any(member.sketch is not None or member.normal is not None for member in self._each()):
            reservoir = Reservoir(
                min(SKETCH_ROWS, SKETCH_CELLS // len(self.spelling.source)), len(self.spelling.source)
            )
            for x, _ in spelled:
                reservoir.add(x)
            rows = reservoir.rows()
        self.rows.fill_(sum(len(x) for x, _ in batches))
        for member in self._each():
            member.initialise(spelled, rows, whole=rows is not None and len(rows) == self.rows)

    @classmethod
    def tiny(cls, space: Space, condition: Space | None = None) -> Made:
        """A few hidden units, over levels two members, with weights large enough that all of it matters."""
        options: dict[str, Any] = {"components": 2} if likelihoods(space)[0] == "logistic" else {}
        options = {"components": 2, "atoms": 4} if isinstance(space, Reals | Table) else options
        orders = 2 if isinstance(space, Integers) else 1
        model = cls(
            space, condition, hidden=(4,), activation="tanh", dropout=0.0, orders=orders, embedding_dim=2, parts=2,
            likelihood_options=options,
        )  # fmt: skip
        model._spread()
        return model

    def _spread(self) -> None:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for parameter in self.parameters():
                nn.init.normal_(parameter, std=0.5)
            for member in self._each():
                if isinstance(member.head, TableHead):
                    member.head.set_atoms(torch.tensor([0.0, 2.0]))

    # Parts ---------------------------------------------------------------------------------------------------

    def _each(self) -> Iterator[_Member]:
        for member in self.members:
            assert isinstance(member, _Member)
            yield member

    def _member(self, k: int) -> _Member:
        member = self.members[0 if self.any_order else k]
        assert isinstance(member, _Member)
        return member

    def _order(self, k: int) -> list[int]:
        return self._any_orders[k] if self.any_order else self._member(k).cells_in_order

    def _context(self, condition: Tensor | None) -> Tensor | None:
        """Features of the condition as a vector, or None."""
        self.check_condition(condition)
        if condition is None or self.condition_features is None:
            return None
        return self.condition_features(condition, self._working.dtype).flatten(1)


def _unknown(x: Tensor, cells: Sequence[int]) -> Tensor:
    """The rows without some cells."""
    known = x.clone()
    known[:, list(cells)] = torch.nan
    return known


class Spelling:
    """Examples as rows of cells: flattened, and a column of very many categories as two.

    Args:
        space: of the examples.
        holes: whether any cell may be unknown to a network that is told so.
    """

    def __init__(self, space: Space, holes: bool) -> None:
        self.space = space
        #: for each cell the flattened cell of the space that it belongs to
        self.source: list[int] = []
        #: for the second cell of a split column: the number of members of a cluster, and of codes
        self.split: dict[int, tuple[int, int]] = {}
        self.columns: tuple[Column, ...] = ()
        if isinstance(space, Table):
            columns: list[Column] = []
            for j, column in enumerate(space.columns):
                levels = column.levels or 0
                if levels > MOST_LEVELS:
                    size = math.isqrt(levels - 1) + 1
                    columns.append(replace(column, kind="categorical", levels=-(-levels // size)))
                    columns.append(replace(column, kind="categorical", levels=size))
                    self.split[len(columns) - 1] = (size, levels)
                    self.source += [j, j]
                else:
                    columns.append(column)
                    self.source.append(j)
            self.inner: Space = Table(columns=tuple(columns))
        else:
            self.source = list(range(space.dims))
            if isinstance(space, Reals):
                self.inner = Table(
                    columns=tuple(Column(str(j), "real", missing=space.missing) for j in range(space.dims))
                )
            elif isinstance(space, Tokens):
                self.inner = Tokens(space.length, space.vocab, missing=holes or space.missing)
            else:
                self.inner = replace(space, shape=(space.dims,), missing=holes or space.missing)
        if isinstance(self.inner, Table):
            self.columns = self.inner.columns
            self.levels = [column.levels or 0 for column in self.columns]
        else:
            self.levels = [_levels(space)] * space.dims
        firsts = set(range(len(self.source))) - set(self.split)
        #: cells that are filled together
        self.rounds = [firsts] if not self.split else [firsts, set(self.split)]

    def __call__(self, x: Tensor) -> Tensor:
        """Rows of cells, float64 (or the dtype of real examples that want a gradient), of a batch."""
        flat = x.reshape(len(x), -1)
        flat = flat if flat.requires_grad else flat.double()
        if not self.split:
            return flat
        pieces = []
        for i, j in enumerate(self.source):
            cell = flat[:, j]
            if i in self.split:
                cell = cell % self.split[i][0]
            elif i + 1 in self.split:
                cell = (cell / self.split[i + 1][0]).floor()
            pieces.append(cell)
        return torch.stack(pieces, 1)

    def read(self, cells: Tensor) -> Tensor:
        """The batch of rows of cells."""
        if self.split:
            pieces: list[Tensor] = []
            for i in range(len(self.source)):
                if i in self.split:
                    pieces[-1] = pieces[-1] * self.split[i][0] + cells[:, i]
                else:
                    pieces.append(cells[:, i])
            cells = torch.stack(pieces, 1)
        return cells.reshape(len(cells), *self.space.shape)

    def order(self, cells: Sequence[int]) -> list[int]:
        """An order of the flattened cells of the space as one of the rows: parts of a column follow each other."""
        return [i for j in cells for i in range(len(self.source)) if self.source[i] == j] if self.split else list(cells)

    def on_grid(self, cells: Tensor) -> Tensor:
        """Numbers brought to what their columns can hold."""
        if not self.columns:
            return cells.round()
        out = cells.clone()
        for j, column in enumerate(self.columns):
            if column.numeric and column.resolution is not None:
                out[:, j] = column.from_index(column.to_index(cells[:, j]))
        return out


def _levels(space: Space) -> int:
    if isinstance(space, Integers):
        return space.levels
    if isinstance(space, Tokens):
        return space.vocab
    return 2 if isinstance(space, Binary) else 0


class _Bias(nn.Module):
    """The output layer of a head whose other numbers come from elsewhere: it adds a bias to them."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(numbers))

    def forward(self, numbers: Tensor) -> Tensor:
        return numbers + self.bias


class _Member(nn.Module):
    """One order, its sketch, its network and its head.

    Args:
        order: the cells in their order, unless ``learns_order``.
        free: whether cells may be put before the others.
        sketched: whether it has a sketch.
        context: width of the context vector, 0 if there is none.
    """

    order: Tensor
    follows: Tensor
    left: Tensor
    offsets: Tensor

    def __init__(
        self,
        spelling: Spelling,
        order: Sequence[int],
        *,
        learns_order: bool,
        free: bool,
        any_order: bool,
        sketched: bool,
        context: int,
        hidden: Sequence[int],
        activation: str,
        dropout: float,
        embedding_dim: int,
        parts: int,
        likelihood: str,
        options: dict[str, Any],
    ) -> None:
        super().__init__()
        self.spelling, self.learns_order, self.free, self.any_order = spelling, learns_order, free, any_order
        space = spelling.inner
        self.features = Features(space, embedding_dim)
        numeric = [j for j, column in enumerate(spelling.columns) if column.numeric]
        self.numeric = numeric
        self.parts = PiecewiseLinear(len(numeric), parts) if numeric and parts else None
        inputs = self.features.cell_of_feature() + [j for j in numeric for _ in range(parts)]
        self.head = _head(likelihood, space, options)
        self.normal: JointNormal | None = None
        if sketched and any_order and isinstance(self.head, TableHead):
            normal = JointNormal(spelling.levels)
            if 0 < len(normal.cell) <= MOST_FEATURES:
                self.normal = normal
                inputs = inputs + normal.cell + normal.cell
        outputs = self.head.cell_of_number()
        self.register_buffer("order", torch.tensor(list(order)))
        network: type[_MaskedNetwork | _KnowingNetwork] = _KnowingNetwork if any_order else _MaskedNetwork
        self.network: _MaskedNetwork | _KnowingNetwork = network(inputs, outputs, context, hidden, activation, dropout)
        self.sketch: Sketch | None = None
        if sketched and not any_order and isinstance(self.head, TableHead | CategoricalHead | BernoulliHead):
            self.sketch = Sketch(spelling.levels, isinstance(self.head, BernoulliHead))
        self.memory = Memory(spelling.levels) if self.sketch is not None and isinstance(self.head, TableHead) else None
        if isinstance(self.head, TableHead):
            #: which numeric columns follow a normal guess (shape (columns, 1)), what deviation the sketch leaves them,
            #: and the means of the logistics that are nearly N(0, 1)
            self.register_buffer("follows", torch.zeros(len(numeric), 1))
            self.register_buffer("left", torch.ones(len(numeric)))
            self.register_buffer("offsets", _normal_means(self.head.components), persistent=False)
        self._mask()
        self.register_load_state_dict_post_hook(lambda module, _: module._mask())

    @property
    def cells_in_order(self) -> list[int]:
        """The cells in their order."""
        return [int(t) for t in self.order.tolist()]

    def _mask(self) -> None:
        """Set the masks of the network from the order."""
        if isinstance(self.network, _MaskedNetwork):
            self.network.mask(self.cells_in_order)

    # From cells to their law ---------------------------------------------------------------------------------

    def law(self, x: Tensor, context: Tensor | None, only: int | None = None) -> Distribution:
        """The law of every cell given the known ones that come before it (with any order: all known ones).

        Args:
            x: shape ``(n, cells)``, NaN where unknown or missing.
            only: the cell that is asked for, if the laws of the others do not matter.
        """
        dtype: torch.dtype = self.head.output.bias.dtype  # type: ignore[assignment,union-attr]
        shown = x if self.spelling.columns or self.spelling.inner.missing else x.nan_to_num(0.0)
        h = self.features(shown, dtype)  # type: ignore[arg-type]
        if self.parts is not None:
            h = torch.cat([h, self.parts(x[:, self.numeric], dtype)], 1)
        guess: Tensor | None = None
        if self.normal is not None:
            mean, deviation = self.normal(x.detach())
            h = torch.cat([h, mean.to(dtype), deviation.to(dtype)], 1)
            guess = self._guessed(self.normal, mean, deviation).to(dtype)
        numbers = full_precision(self.network(h, context))
        if self.sketch is not None:
            numbers = numbers + self._sketched(x, only).to(numbers.dtype)
        if guess is not None:
            numbers = numbers + guess
        return self.head(self._possible(x, numbers))

    def cell(self, x: Tensor, t: int, context: Tensor | None) -> Distribution:
        """The law of one cell, shape ``(n, 1)``."""
        return one_cell(self.law(x, context, t), t)

    def _sketched(self, x: Tensor, only: int | None) -> Tensor:
        assert self.sketch is not None
        log_probs, means = self.sketch(x.detach())
        if not isinstance(self.head, TableHead) or not self.numeric:
            return log_probs
        deviations, near = self.left.to(means).expand_as(means), None
        if self.memory is not None and not self.memory.empty:
            log_probs = self.memory.codes(x, log_probs, only)
            some = [i for i, a in enumerate(self.memory.of_numbers.tolist()) if a and only in (None, self.numeric[i])]
            if some:
                found = self.memory.numbers_near(x, self._standard(self.head, x), means)
                near = torch.tensor(some, device=x.device), *(piece[:, some] for piece in found)
        return torch.cat([log_probs, self._following(self.head, means, deviations, near)], 1)

    def _standard(self, head: TableHead, x: Tensor) -> Tensor:
        """The numeric cells in standard units."""
        return (x[:, self.numeric].to(head.unit) - head.location) / head.unit

    def _following(
        self, head: TableHead, mean: Tensor, deviation: Tensor, near: tuple[Tensor, ...] | None = None
    ) -> Tensor:
        """Numbers of the numeric columns that follow a normal guess: shape ``(n, columns · per_column)``.

        The logistics become the normal law, and the logit of an atom v gets log N(v; mean, deviation²) − log N(v; 0, 1)
        in standard units: what the guess makes of v beside what the column's marginal does.

        Args:
            near: numbers of some of the columns, and mean, deviation and share of another normal law that is mixed into
                theirs; the logistics become the normal law with the mixture's mean and variance.
        """
        z = ((head.atoms - head.location.unsqueeze(1)) / head.unit.unsqueeze(1)).to(mean).clamp(-REACH, REACH)
        tilt = _tilt(z, mean, deviation.clamp(min=_LEAST_DEVIATION))
        if near is not None:
            some, nearer, spread, share = near
            other = _tilt(z[some], nearer, spread.clamp(min=_LEAST_DEVIATION))
            tilt = tilt.index_copy(1, some, _mixed(tilt[:, some], other, share.unsqueeze(2)))
            moments = _moments(mean[:, some], deviation[:, some], nearer, spread, share)
            mean, deviation = (old.index_copy(1, some, new) for old, new in zip((mean, deviation), moments))
        k, count, atoms = head.components, len(self.numeric), head.atoms.shape[1]
        follows = self.follows.to(mean).squeeze(1)
        spread = deviation.clamp(min=_LEAST_DEVIATION)
        means = (mean.unsqueeze(2) + spread.unsqueeze(2) * self.offsets.to(mean)) * follows.unsqueeze(1)
        scales = (spread.log() * follows).unsqueeze(2).expand(-1, -1, k)
        blank = mean.new_zeros(len(mean), count, k)
        pieces = [blank, means, scales]
        if atoms:
            pieces.append(tilt.clamp(-_MOST_TILT, _MOST_TILT) * follows.unsqueeze(1))
        if head.recall:
            pieces.append(mean.new_zeros(len(mean), count, 1))
        return torch.cat(pieces, 2).flatten(1)

    def _guessed(self, normal: JointNormal, mean: Tensor, deviation: Tensor) -> Tensor:
        """The normal law's guesses as numbers for the head: logits of codes, means and scales of numeric columns."""
        head, count = self.head, len(normal.numeric)
        assert isinstance(head, TableHead)
        places = [count + i for i in range(len(normal.cell) - count)]
        pieces, at = [], 0
        for j, levels in zip(head.coded, head.levels):
            if any(j == column for column, _ in normal.coded):
                pieces.append(mean[:, places[at : at + levels]].clamp(_LEAST_SHARE, 1.0).log())
                at += levels
            else:
                pieces.append(mean.new_zeros(len(mean), levels))
        if count:
            pieces.append(self._following(head, mean[:, :count], deviation[:, :count]))
        return torch.cat(pieces, 1)

    def _possible(self, x: Tensor, numbers: Tensor) -> Tensor:
        """The numbers without the codes that cannot be: members that the last cluster does not have."""
        for j, (size, levels) in self.spelling.split.items():
            assert isinstance(self.head, TableHead)
            start = sum(self.head.levels[: self.head.coded.index(j)])
            last = (x[:, j - 1] == self.spelling.levels[j - 1] - 1).unsqueeze(1)
            rest = levels - (self.spelling.levels[j - 1] - 1) * size
            place = torch.arange(numbers.shape[1], device=x.device)
            never = last & (place >= start + rest) & (place < start + size)
            numbers = torch.where(never, torch.full_like(numbers, _NEVER), numbers)
        return numbers

    # Beginning -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Batches, rows: Tensor | None, whole: bool) -> None:
        """Scales and biases from the batches; order and sketch from a sample of their rows, or from the ``whole``."""
        self.features.initialise(batches)
        if self.parts is not None:
            self.parts.initialise(x[:, self.numeric] for x, _ in batches)
        self.head.initialise(batches)
        if self.sketch is not None and rows is not None and len(rows):
            self._sketch(self.sketch, rows, self._recalled() if whole else [])
        if self.normal is not None and rows is not None and len(rows):
            self._begin_joint(self.normal, rows)

    def _begin_joint(self, normal: JointNormal, rows: Tensor) -> None:
        """Fit the joint normal law, and let the head begin at its guesses."""
        head = self.head
        assert isinstance(head, TableHead)
        normal.fit(rows[:NORMAL_ROWS], head.location, head.unit)
        bias = head.output.bias
        assert isinstance(bias, Tensor)
        guessed = {j for j, _ in normal.coded}
        at = 0
        for j, levels in zip(head.coded, head.levels):
            if j in guessed:
                bias[at : at + levels] = 0.0
            at += levels
        for i, row in enumerate(bias[at:].reshape(-1, head.per_column)):
            self._follow(head, row, i, rows[:, self.numeric[i]])

    def _recalled(self) -> list[int]:
        """Columns whose values come again, though their grid is fine."""
        if not isinstance(self.head, TableHead) or not self.head.recall:
            return []
        return [j for j, size in zip(self.numeric, self.head.recalled_sizes.tolist()) if size]

    def _sketch(self, sketch: Sketch, cells: Tensor, recalled: Sequence[int]) -> None:
        """Learn graph and order; the first of the recalled columns that says something of others is remembered."""
        location, unit = np.zeros(0), np.ones(0)
        if isinstance(self.head, TableHead):
            location, unit = self.head.location.cpu().numpy(), self.head.unit.cpu().numpy()
        x = cells.numpy().copy()
        x[:, self.numeric] = (x[:, self.numeric] - location) / unit
        rows = Rows(x, self.spelling.levels)
        left = np.ones(0)
        for column in [*recalled, None]:
            first = [column] if column is not None and self.free else []
            search = Search(rows, required={j: j - 1 for j in self.spelling.split}, roots=first)
            rest = [j for j in self.cells_in_order if j not in first]
            graph: Graph = search.graph(None if self.learns_order else first + rest)
            left = sketch.fit(rows, graph, search, location, unit)
            if column is not None and self._remember(sketch, column, graph.order, cells, left):
                break
        self.order.copy_(torch.tensor(graph.order))
        self._mask()
        bias = self.head.output.bias
        assert isinstance(bias, Tensor)
        coded = sum(levels if not sketch.binary else 1 for levels in self.spelling.levels if levels)
        bias[:coded] = 0.0
        if isinstance(self.head, TableHead) and self.numeric:
            self.left.copy_(torch.from_numpy(left))
            for i, row in enumerate(bias[coded:].reshape(len(self.numeric), -1)):
                self._follow(self.head, row, i, cells[:, self.numeric[i]])

    def _remember(self, sketch: Sketch, column: int, order: Sequence[int], cells: Tensor, left: Floats) -> bool:
        """Remember the values of a column, if they say something of those after it in the order."""
        assert self.memory is not None and isinstance(self.head, TableHead)
        log_probs, means = map(torch.cat, zip(*(sketch(x) for x in cells.split(4096))))
        after = order[list(order).index(column) + 1 :]
        z = self._standard(self.head, cells)
        self.memory.fit(column, after, cells, z, log_probs, means, torch.from_numpy(left))
        return not self.memory.empty

    def _follow(self, head: TableHead, bias: Tensor, i: int, cells: Tensor) -> None:
        """Let a numeric column follow a normal guess, unless most of it is one value and the rest is far away.

        Its logistics begin as a normal law, its atoms with what they have beyond the values around them.
        """
        k, share = head.components, 0.0
        self.follows[i] = 0.0
        if k not in _NORMAL:
            return
        if head.atoms.shape[1] and head.has_atom[i].any():
            beyond = _beyond(cells, head.atoms[i][head.has_atom[i]], float(head.resolution[i]), float(head.unit[i]))
            far = (cells[~torch.isnan(cells)] - head.location[i].cpu()).abs().max() / head.unit[i].cpu()
            if beyond.max() > MOST_ATOM and far > REACH:
                return
            bias[3 * k : 3 * k + head.atoms.shape[1]][head.has_atom[i]] = beyond.log().to(bias)
            share = float(beyond.sum())
        if head.recall and head.recalled_sizes[i] > 0:
            share += float(bias[-1].exp())
        _, scale, v = _NORMAL[k]
        weights = torch.log_softmax(-_normal_means(k).square() / (2.0 * v), 0)
        bias[:k] = weights + math.log(max(1.0 - share, 0.05))
        bias[k : 2 * k] = 0.0
        bias[2 * k : 3 * k] = math.log(scale)
        self.follows[i] = 1.0


def _tilt(z: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """log N(z; mean, deviation²) − log N(z; 0, 1), shape ``(n, columns, values)`` of z ``(columns, values)``."""
    away = (z - mean.unsqueeze(2)) / deviation.unsqueeze(2)
    return 0.5 * z.square() - 0.5 * away.square() - deviation.log().unsqueeze(2)


def _mixed(first: Tensor, second: Tensor, share: Tensor) -> Tensor:
    """Logarithm of a mixture of two laws."""
    top = torch.maximum(first, second)
    return top + ((1.0 - share) * (first - top).exp() + share * (second - top).exp()).log()


def _moments(mean: Tensor, deviation: Tensor, nearer: Tensor, spread: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of a mixture of two laws."""
    apart = nearer - mean
    within = (1.0 - share) * deviation.square() + share * spread.square()
    return mean + share * apart, (within + (1.0 - share) * share * apart.square()).sqrt()


def _beyond(cells: Tensor, atoms: Tensor, step: float, unit: float) -> Tensor:
    """Share of the cells that each atom has beyond the values around it, within a quarter of a deviation; positive."""
    values = cells[~torch.isnan(cells)].to(atoms)
    reach = max(1, round(0.25 * unit / step))
    excess = []
    for atom in atoms:
        distance = ((values - atom) / step).round().abs()
        around = ((distance <= reach) & (distance > 0)).double().mean() / (2 * reach)
        excess.append((distance == 0).double().mean() - around)
    return torch.stack(excess).clamp(min=1e-4)


def _normal_means(k: int) -> Tensor:
    """Means of the K logistics that are nearly N(0, 1)."""
    spacing = _NORMAL[k][0] if k in _NORMAL else 0.0
    return spacing * (torch.arange(k, dtype=torch.float64) - (k - 1) / 2)


def _head(likelihood: str, space: Space, options: dict[str, Any]) -> Head:
    """The head of that name, whose output layer is a bias: its numbers are made before it."""
    made = head(likelihood, space, (1,), **options)
    if not isinstance(made, TableHead) and made.__class__.__name__ == "MultinomialHead":
        raise Unsupported("likelihood: 'multinomial' makes a total of the cells, which this model gives one by one")
    made.output = _Bias(len(made.cell_of_number()))
    return made


class _MaskedNetwork(nn.Module):
    """Residual masked layers: numbers of a cell depend on the features of the cells before it, and on the context."""

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        context: int,
        hidden: Sequence[int],
        activation: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.inputs, self.outputs = list(inputs), list(outputs)
        cells = max([*inputs, *outputs]) + 1
        # Units of degree 0 see the context alone.
        lowest = 0 if context or cells == 1 else 1
        count = max(cells - lowest, 1)
        degrees = [sorted(cells - 1 - i * count // width for i in range(width)) for width in hidden]
        self.degrees = degrees
        self.first = MaskedLinear([0] * len(inputs), degrees[0])
        self.context = Linear(context, hidden[0], bias=False) if context else None
        self.layers = nn.ModuleList(MaskedLinear(a, b) for a, b in itertools.pairwise(degrees))
        self.output = MaskedLinear(degrees[-1], [0] * len(outputs), bias=False)
        self.skip = MaskedLinear([0] * len(inputs), [0] * len(outputs), bias=False)
        for layer in (self.first, *self.layers):
            glorot(layer)  # type: ignore[arg-type]
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.skip.weight)
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout(dropout)

    def mask(self, order: Sequence[int]) -> None:
        """Let the cells stand in this order."""
        place = {cell: p for p, cell in enumerate(order)}
        entering = [place[j] + 1 for j in self.inputs]
        leaving = [place[j] for j in self.outputs]
        self.first.set_degrees(entering, self.degrees[0])
        self.output.set_degrees(self.degrees[-1], leaving)
        self.skip.set_degrees(entering, leaving)

    def speaking(self) -> list[Tensor]:
        """The weights by which it changes what it is added to."""
        return [self.output.weight, self.skip.weight]

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        h = self.first(x)
        if self.context is not None:
            h = h + self.context(context)
        h = self.dropout(self.activation(h))
        for layer in self.layers:
            h = h + self.dropout(self.activation(layer(h)))
        return self.output(h) + self.skip(x)


class _KnowingNetwork(nn.Module):
    """A residual network on the features of the known cells, which say of the others that they are unknown."""

    def __init__(
        self,
        inputs: Sequence[int],
        outputs: Sequence[int],
        context: int,
        hidden: Sequence[int],
        activation: str,
        dropout: float,
    ) -> None:
        super().__init__()
        self.body = ResidualMLP(len(inputs) + context, hidden, activation, dropout)
        self.output = Linear(self.body.out_features, len(outputs), bias=False)
        self.skip = Linear(len(inputs), len(outputs), bias=False)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.skip.weight)

    def speaking(self) -> list[Tensor]:
        """The weights by which it changes what it is added to."""
        return [self.output.weight, self.skip.weight]

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.output(self.body(x if context is None else torch.cat([x, context], 1))) + self.skip(x)
