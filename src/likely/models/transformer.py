"""Autoregressive transformer (Vaswani et al. 2017, arXiv 1706.03762): exact likelihoods, one cell after another.

    log p(x | c) = Σ_t log p(x_t | x_1 … x_{t−1}, c)          cells t in the order in which an example is flattened
    h = transformer(e_0 + a_1, e(x_1) + a_2, …, e(x_{T−1}) + a_T),   p(x_t | ·) = law(h_t)

Symbols: x example, t cell, c condition, e(·) the token of a value, e_0 that of the beginning, a_t a vector for the
place (with the condition's added), h_t what comes out at place t.

Attention is causal, with rotary positions beside the places' own vectors.  In training one pass gives all laws; drawing
and decoding go cell by cell, with keys and values of earlier cells kept.

*Missing cells* of a table are information: a law sees which of the cells before it are missing, and a missing cell is
no factor of the product.  The bound is log p(observed cells | which are observed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from likely.contract import (
    Batches,
    Binary,
    Bound,
    Integers,
    Model,
    Reals,
    Space,
    Table,
    Tokens,
    Unsupported,
    noise_or_global,
)
from likely.distributions import Distribution
from likely.distributions.categorical import sample_categories
from likely.distributions.cells import Alphabet, Columns, best_of_draws
from likely.networks import Features, Linear
from likely.networks.ngrams import NGrams
from likely.networks.transformer import TransformerLayers
from likely.noise import Noise, SharedNoise

if TYPE_CHECKING:
    from likely.coding.sequential import SequentialCodec

#: Tokens that are worked off together where no gradient is needed.
_TOKENS = 16_384


class Transformer(Model):
    """Autoregressive model of sequences, images of few pixels and tables, with an exact likelihood.

    Args:
        space: of the examples; only tables may have missing cells.
        condition: space of what the model is conditioned on, or None.
        width: features of a token.
        layers: blocks of attention and a network on each token.
        heads: of each attention; by default one for every 32 features.
        hidden: width of the networks on tokens; by default four times ``width``.
        activation: ``relu``, ``elu``, ``gelu``, ``silu``, ``softplus`` or ``tanh``.
        dropout: share of each branch's units, and of the runs of ``ngrams``, dropped in training.
        likelihood: ``auto`` or a name of :func:`likely.distributions.likelihoods`.
        likelihood_options: options of the likelihood, such as ``{"components": 5}``.
        tied: whether a symbol has one vector for being read and for being predicted; for tokens.
        ngrams: lengths of the runs of symbols that have vectors of their own, such as (2, 3, 4): what a small network
            would need its first layers for is looked up (hashed, as in Pagnoni et al. 2024, arXiv 2412.09871, section
            3.2.1).  They cost memory and hardly any time; for tokens.
        ngram_bits: log2 of the number of vectors of each length.

    Raises:
        Unsupported: an option does not suit the space.

    >>> model = Transformer(Tokens(5, 4), width=16, layers=1)
    >>> model.bound(torch.zeros(2, 5)).kind
    'exact'
    """

    spaces = (Binary, Integers, Tokens, Table)
    conditional = True
    #: A missing cell says something, so that rows with and without it have laws of their own.
    reads_holes = True
    #: Whether every cell is predicted from the cells before it alone.
    causal = True

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        *,
        width: int = 192,
        layers: int = 4,
        heads: int | None = None,
        hidden: int | None = None,
        activation: str = "gelu",
        dropout: float = 0.0,
        likelihood: str = "auto",
        likelihood_options: Mapping[str, Any] | None = None,
        tied: bool = False,
        ngrams: Sequence[int] = (),
        ngram_bits: int = 15,
    ) -> None:
        super().__init__(space, condition)
        for name, number in (("width", width), ("layers", layers), ("hidden", hidden or 1)):
            if number < 1:
                raise ValueError(f"{name}: expected 1 or more, got {number}")
        if space.missing and not isinstance(space, Table):
            raise Unsupported(
                "model 'transformer' is for data without missing cells, or tables; a trained one can complete examples"
            )
        self.width = width
        if isinstance(space, Table):
            if likelihood not in ("auto", "table") or tied:
                raise Unsupported("likelihood, tied: each column of a table has its own; leave them out")
            self.cells: Alphabet | Columns = Columns(space, width, likelihood_options)
        else:
            self.cells = Alphabet(space, width, likelihood, likelihood_options, tied=tied)
        self.ngrams: NGrams | None = None
        if ngrams:
            if not isinstance(space, Tokens):
                raise Unsupported("ngrams: only tokens have runs of symbols that mean the same in every place")
            self.ngrams = NGrams(ngrams, ngram_bits, space.vocab, width, dropout)
        self.begin = nn.Parameter(torch.zeros(width))
        self.place = nn.Parameter(torch.zeros(space.dims, width))
        self.layers = TransformerLayers(
            space.dims, width, heads or max(1, width // 32), layers, hidden, activation, dropout
        )
        self.condition_features = Features(condition) if condition is not None else None
        self.context: Linear | None = None
        if self.condition_features is not None:
            self.context = Linear(math.prod(self.condition_features.shape), width)

    # All cells at once ---------------------------------------------------------------------------------------

    def _hidden(self, x: Tensor, context: Tensor | None) -> Tensor:
        """h, for cells of shape ``(n, T)``: shape ``(n, T, width)``."""
        begin = self.begin.expand(len(x), 1, -1)
        tokens = torch.cat([begin, self._tokens(x[:, :-1], 0)], 1) if x.shape[1] > 1 else begin
        return self.layers(self._placed(tokens, 0, context))

    def _tokens(self, x: Tensor, start: int) -> Tensor:
        """e(x_t) for the cells from ``start`` on, given all up to the last of them, shape ``(n, cells)``."""
        tokens = self.cells.read(x[:, start:], start)
        return tokens if self.ngrams is None else tokens + self.ngrams(x, start)

    def _placed(self, tokens: Tensor, start: int, context: Tensor | None) -> Tensor:
        """Tokens with the vectors of their places and of the condition."""
        tokens = tokens + self.place[start : start + tokens.shape[1]]
        return tokens if context is None else tokens + context.unsqueeze(1)

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """log p(x | c) in nats, exact; of a row with holes log p(x_observed | which are observed, c)."""
        nats = self.column_nats(x, condition)
        return Bound("exact", {"cells": nats.flatten(1).sum(1)})

    def column_nats(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """log p(x_t | ·) of each cell in nats, shape ``(batch, *shape)``; 0 where it is missing."""
        pieces = self._pieces(x, self._context(condition))
        return torch.cat([self.cells.log_probs(self._hidden(part, c), part) for part, c in pieces]).reshape(x.shape)

    def _pieces(self, x: Tensor, context: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Flattened cells and context of some examples at a time; of all in training."""
        size = len(x) if self.training else max(1, _TOKENS // self.space.dims)
        for start in range(0, max(len(x), 1), max(size, 1)):
            rows = slice(start, start + size)
            yield x[rows].flatten(1), None if context is None else context[rows]

    # Cell after cell -----------------------------------------------------------------------------------------

    def _laws(
        self, x: Tensor, context: Tensor | None, step: Callable[[Tensor], Tensor]
    ) -> Callable[[int], Distribution]:
        """A function to the law of cell t of all examples from those before it in x, ``(n, T)``; takes ``step`` on."""
        begin, places, read, law = self.begin.expand(len(x), -1), self.place.unbind(), self._tokens, self.cells.law

        def following(t: int) -> Distribution:
            token = (read(x[:, :t], t - 1)[:, 0] if t else begin) + places[t]
            return law(step(token if context is None else token + context), t)

        return following

    def _walk(
        self, n: int, context: Tensor | None, run: Callable[..., Any] | None = None
    ) -> Generator[Distribution, Tensor, None]:
        """The laws of all cells of n examples, shape ``(n, 1)``; each cell's values ``(n,)`` are sent before the next.

        Args:
            run: calls a function in reproducible arithmetic, whose layers are modules; by default the layers are walked
                through in few calls.
        """
        dtype = torch.float64 if isinstance(self.space, Table) else torch.int64
        x = torch.zeros(n, self.space.dims, dtype=dtype, device=self.begin.device)
        if run is None:
            following = self._laws(x, context, self.layers.walk(n, self.begin))
        else:
            step = partial(self.layers.step, caches=self.layers.caches(n, self.begin))
            following = partial(run, self._laws(x, context, step))
        for t, column in enumerate(x.unbind(1)):
            column.copy_((yield following(t)))

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Each cell drawn from its law given all before it; every cell is there."""
        noise = noise_or_global(noise, self)
        with torch.inference_mode():  # what it makes has no version counters, and cannot leave it but as a copy
            x, _ = self._completed(self._unknown(n), self._context(condition), noise)
        return x.reshape(n, *self.space.shape).clone()

    def impute(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        noise: Noise | None = None,
        draws: int = 0,
        samples: int = 64,
    ) -> Tensor:
        """Examples completed: missing cells drawn given all others, as if they had been there.

        Cells missing at the end, as those after a prefix, are drawn from the very conditional distribution.  Where
        observed cells follow a hole, ``samples`` completions are drawn in order and chosen among by the probability
        that they give to these (sampling importance resampling, Rubin 1987): the more samples, the nearer.

        Args:
            x: NaN marks the missing cells.
            draws: 0 for the best single values (means of numbers, most frequent codes), shape of ``x``; m for m draws,
                shape ``(m, *x.shape)``.
            samples: completions of each example that are drawn.
        """
        noise, n = noise_or_global(noise, x), len(x)
        flat = x.flatten(1)
        holes = torch.isnan(flat)
        only_end = not bool((holes[:, :-1] & ~holes[:, 1:]).any())  # a hole is followed by holes only
        m = draws if draws and only_end else max(draws, samples)
        with torch.no_grad():
            context = self._context(condition)
            context = None if context is None else context.repeat_interleave(m, 0)
            drawn, log_w = self._completed(flat.repeat_interleave(m, 0), context, SharedNoise(noise, n, m))
        drawn, log_w = drawn.reshape(n, m, -1).to(flat.dtype), torch.log_softmax(log_w.reshape(n, m), 1)
        if not draws:
            best = best_of_draws(self.space, drawn, log_w.exp().to(drawn.dtype))
            return torch.where(holes, best, flat).reshape(x.shape)
        if not only_end:
            chosen = sample_categories(log_w, noise.uniform((n, draws)).to(log_w))
            drawn = drawn.gather(1, chosen.unsqueeze(-1).expand(-1, -1, flat.shape[1]))
        return drawn.movedim(1, 0).reshape(draws, *x.shape)

    def _unknown(self, n: int) -> Tensor:
        return torch.full((n, self.space.dims), torch.nan, dtype=torch.float64, device=self.begin.device)

    def _completed(self, known: Tensor, context: Tensor | None, noise: Noise) -> tuple[Tensor, Tensor]:
        """Cells ``(n, T)`` with those that are NaN drawn in order, and log p of the others given all before, nats."""
        x = known.to(torch.float64 if isinstance(self.space, Table) else self.begin.dtype, copy=True)
        log_p = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        holes = torch.isnan(x)
        some, everywhere = holes.any(0).tolist(), holes.all(0).tolist()
        walk = self._walk(len(x), context)
        law = next(walk)
        for t, column in enumerate(x.unbind(1)):
            cells = law.sample(noise)[:, 0] if some[t] else column
            if not everywhere[t]:
                cells = torch.where(holes[:, t], cells.to(column), column)
                log_p += torch.where(holes[:, t], 0.0, law.log_prob(cells.unsqueeze(1))[:, 0].double())
            column.copy_(cells)
            if t + 1 < x.shape[1]:
                law = walk.send(cells)
        return x, log_p

    def codec(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> SequentialCodec:
        """Cell after cell, all examples of a batch side by side, in reproducible arithmetic.

        The encoder takes all cells in one pass; the decoder walks, with keys and values kept.  Both give the same bits.
        It costs −log2 p(x_observed | m): which cells are there is for the file to say.
        """
        from likely.coding.sequential import SequentialCodec
        from likely.exact import network

        exact = network(self, causal=True)
        model = exact.module
        assert isinstance(model, Transformer)

        def context_of(condition: Tensor | None) -> Tensor | None:
            return exact.run(model._context, condition)

        def walk(n: int, condition: Tensor | None) -> Generator[Distribution, Tensor, None]:
            return model._walk(n, context_of(condition), exact.run)

        def backwards(x: Tensor, condition: Tensor | None) -> Iterator[Distribution]:
            h = torch.cat([exact.run(model._hidden, *piece) for piece in model._pieces(x, context_of(condition))])
            for t in reversed(range(model.space.dims)):
                yield exact.run(model.cells.law, h[:, t], t)

        return SequentialCodec(self.space, exact, range(self.space.dims), walk, backwards, spare_bits)

    def initialise(self, batches: Batches) -> None:
        """Scales and biases of what reads and predicts cells, from passes over the data."""
        self.cells.initialise(batches)
        if self.condition_features is not None:
            self.condition_features.initialise(batches, of_condition=True)

    @classmethod
    def tiny(cls, space: Space, condition: Space | None = None) -> Transformer:
        """One layer of eight features, with weights large enough that every cell depends on all before it.

        Raises:
            Unsupported: for real conditions of binary and integer cells, which would tell the checks nothing that those
                of tokens do not.
        """
        if isinstance(condition, Reals) and not isinstance(space, Tokens):
            raise Unsupported("tiny: the checks look at real conditions with tokens")
        options = {"components": 2} if isinstance(space, Table) else {}
        model = cls(space, condition, width=8, layers=1, heads=2, hidden=8, likelihood_options=options)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for name, parameter in model.named_parameters():
                if "norm" not in name:
                    parameter.copy_(0.4 * torch.randn(parameter.shape))
        return model

    # Parts ---------------------------------------------------------------------------------------------------

    def _context(self, condition: Tensor | None) -> Tensor | None:
        """The condition as a vector: shape ``(n, width)``, or None."""
        self.check_condition(condition)
        if condition is None or self.condition_features is None or self.context is None:
            return None
        return self.context(self.condition_features(condition, self.begin.dtype).flatten(1))
