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
With any order the sketch is the joint normal law of the features about the neighbours of the row, among the training
rows (:mod:`likely.inference.neighbours`), whose conditionals are known for every set of cells.

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

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from likely.contract import (
    Batches,
    Binary,
    Bound,
    Counts,
    Integers,
    Loss,
    Model,
    NoCodec,
    Reals,
    Space,
    Table,
    Tokens,
    noise_or_global,
)
from likely.data.spelling import Spelling
from likely.data.streaming import Reservoir, Seen
from likely.distributions import likelihoods
from likely.distributions.categorical import sample_categories
from likely.distributions.heads import TableDistribution, TableHead
from likely.models._member import Member
from likely.networks import Features
from likely.noise import Noise

if TYPE_CHECKING:
    from likely.coding.cellwise import CellwiseCodec, Law

#: Most cells of an example whose order and sketch are learned.
MOST_SKETCHED = 100
#: Rows from which they are learned, and numbers in these rows.
SKETCH_ROWS, SKETCH_CELLS = 100_000, 10_000_000


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
                Member(
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
        law = member.law(x.masked_fill(asked, torch.nan), context, own=x)
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
        if self._member(0).neighbours is not None:
            raise NoCodec(
                "neighbours and normal law of order='any' are solved in floating point; use sketch=False, or an order"
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
        if any(member.sketch is not None or member.neighbours is not None for member in self._each()):
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

    def _each(self) -> Iterator[Member]:
        for member in self.members:
            assert isinstance(member, Member)
            yield member

    def _member(self, k: int) -> Member:
        member = self.members[0 if self.any_order else k]
        assert isinstance(member, Member)
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
