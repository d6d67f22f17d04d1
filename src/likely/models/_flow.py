r"""What all normalising flows over vectors and tables share: everything but the bijection.

    log p(x) = log N(f(y); 0, I) + log |det ∂f/∂y| − Σ_j log σ_j,    y = (x − μ) / σ                              (1)

μ, σ: means and deviations of the training data (float64), f: the model's bijection, c: the condition.

A table is p(codes | c) p(numbers | codes, c): the coded columns by :class:`~likely.models.made.Made`, exactly, and the
numeric ones by a flow that sees the codes in its context, so that codes cost what their own law says and no more.  A
numeric column on a grid of spacing s has a probability: x stands for x + s u, u ~ U(−½, ½), and

    log P(x) = log E_u s p(x + s u) ≥ E_u log p(x + s u) + log s                                                  (2)

(Uria, Murray & Larochelle 2013, arXiv 1306.0186; Theis et al. 2016, 1511.01844): with such columns the number is a
lower bound, from one draw of u.  It costs the divergence of u's law given x from the uniform one: little where the
density hardly changes within a grid cell, more on coarse grids.  Importance weights (:meth:`Flow.log_weights`) measure
it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from likely.bijections import Bijection
from likely.contract import (
    Batches,
    Bound,
    Kind,
    Model,
    NoCodec,
    Reals,
    Space,
    Table,
    Unsupported,
    noise_or_global,
)
from likely.data.streaming import Moments, Seen, first
from likely.models.made import Made
from likely.networks import Features
from likely.noise import Noise

#: Examples that what depends on the data is set from.
STARTING_EXAMPLES = 2048
#: Features of a code in the context.
_EMBEDDING = 8


class Flow(Model):
    """A base normal law behind a bijection; a model's constructor sets :attr:`bijection`.

    ``dims`` is the number of numeric cells, on which the bijection acts, ``context_width`` that of its context.
    """

    spaces = (Reals, Table)
    conditional = True
    tempered = True

    #: Further options of the smallest instance.
    _tiny: ClassVar[dict[str, Any]] = {}

    bijection: Bijection
    location: Tensor
    unit: Tensor
    spacing: Tensor
    _log_spacing: Tensor
    _working: Tensor

    def __init__(
        self, space: Space, condition: Space | None = None, code_options: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(space, condition)
        if space.missing:
            raise Unsupported(
                f"model {self.name()!r} needs complete examples, for a flow has no law of some cells alone; fill the "
                "holes first (`likely impute` with model 'gaussian', 'vae' or 'made'), or use one of these models"
            )
        columns = space.columns if isinstance(space, Table) else ()
        self._coded = [j for j, column in enumerate(columns) if column.coded]
        self._numeric = [j for j, c in enumerate(columns) if c.numeric] if columns else list(range(space.dims))
        if not self._numeric:
            raise Unsupported(f"model {self.name()!r} needs a numeric column, got none; use model 'made'")
        self.dims, self.latent_dim = len(self._numeric), space.dims
        coded = Table(columns=tuple(columns[j] for j in self._coded)) if self._coded else None
        self.codes = (
            Made(coded, condition, **{"hidden": (128, 128), **(code_options or {})}) if coded is not None else None
        )
        self.code_features = Features(coded, _EMBEDDING) if coded is not None else None
        self.condition_features = Features(condition, _EMBEDDING) if condition is not None else None
        widths = [math.prod(f.shape) for f in (self.code_features, self.condition_features) if f is not None]
        self.context_width = sum(widths)
        spacing = [(columns[j].resolution or 0.0) if columns else 0.0 for j in self._numeric]
        for name, values in (("location", [0.0] * self.dims), ("unit", [1.0] * self.dims)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float64))
        self.register_buffer("spacing", torch.tensor(spacing, dtype=torch.float64), persistent=False)
        log_spacing = torch.where(self.spacing > 0, self.spacing, 1.0).log()
        self.register_buffer("_log_spacing", log_spacing, persistent=False)
        self.register_buffer("_working", torch.zeros(()), persistent=False)  # has the dtype of the arithmetic
        self.kind: Kind = "lower bound" if any(spacing) else "exact"
        if self.kind == "exact":
            object.__setattr__(self, "log_weights", None)

    # The bound -----------------------------------------------------------------------------------------------

    def bound(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Bound:
        """log p(x | c) in nats: exact, or a lower bound with columns on a grid.

        Parts: ``base``, log N(z; 0, I); ``log_det``, of everything between x and z; and ``codes``, log p of the codes.
        """
        z, log_det = self.bijection(self._standard(x, noise_or_global(noise, x)), self._context(x, condition))
        # 1. the base law, 2. the volume
        base = -0.5 * (z.square().sum(1) + self.dims * math.log(2.0 * math.pi))
        parts = {"base": base, "log_det": log_det + self._log_units().sum().to(log_det)}
        if self.codes is not None:
            # 3. the coded columns
            parts["codes"] = self.codes.bound(x[:, self._coded], condition).nats
        return Bound(self.kind, parts)

    def log_weights(self, x: Tensor, condition: Tensor | None, samples: int, noise: Noise) -> Tensor:
        """log s p(x + s u) with u ~ U(−½, ½): log importance weights, shape ``(batch, samples)``."""
        return torch.stack([self.bound(x, condition, noise).nats for _ in range(samples)], 1)

    def column_nats(self, x: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Each cell's share of the bound in nats, shape ``(batch, *space.shape)``; they sum to it.

        log N(z_j; 0, 1) and the log-slopes of the j-th cell on its way; with one autoregressive transform this is
        log p(x_j | the cells before it).  A coded column has its law's own share.
        """
        z, context = self._standard(x, noise_or_global(noise, x)), self._context(x, condition)
        log_slopes = torch.zeros_like(z)
        for step in self.bijection:  # type: ignore[attr-defined]
            z, log_slope = step.cells(z, context)
            log_slopes = log_slopes + log_slope
        numbers = -0.5 * (z * z + math.log(2.0 * math.pi)) + log_slopes + self._log_units().to(z)
        if self.codes is None:
            return numbers.reshape(x.shape)
        nats = numbers.new_empty(x.shape)
        nats[:, self._numeric] = numbers
        nats[:, self._coded] = self.codes.column_nats(x[:, self._coded], condition).to(nats)
        return nats

    # What a user asks of it ----------------------------------------------------------------------------------

    def sample(self, n: int, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """Codes from their law, z ~ N(0, I), and x = f⁻¹(z) given both; on a grid the nearest place."""
        noise = noise_or_global(noise, self)
        codes = None if self.codes is None else self.codes.sample(n, condition, noise)
        return self._cells(noise.normal((n, self.dims)).to(self._working), codes, condition)

    def encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """z = f(x), followed by the codes as they are: shape ``(batch, space.dims)``."""
        z, _ = self.bijection(self._standard(x, None), self._context(x, condition))
        return torch.cat([z, x[:, self._coded].to(z)], 1) if self._coded else z

    def decode(self, z: Tensor, condition: Tensor | None = None, noise: Noise | None = None) -> Tensor:
        """x = f⁻¹(z): the inverse of :meth:`encode`; nothing is drawn."""
        codes = None
        if self._coded:
            assert isinstance(self.space, Table)
            most = torch.tensor([(self.space.columns[j].levels or 1) - 1.0 for j in self._coded]).to(z)
            codes = torch.minimum(z[:, self.dims :].round().clamp(min=0.0), most)
        return self._cells(z[:, : self.dims].to(self._working), codes, condition)

    def codec(
        self, spacing: float | None = None, bound: float | None = None, spare_bits: Sequence[int] | None = None
    ) -> None:
        raise NoCodec(
            f"model {self.name()!r} is a density, whose inverse in floating point returns no value to the last bit; "
            "models with a codec for such data are 'gaussian', 'mixture', 'made' and 'vae'"
        )

    @classmethod
    def tiny(cls, space: Space, condition: Space | None = None) -> Flow:
        """Two transforms of a few hidden units, with weights large enough that all of it matters."""
        codes = {"hidden": (6,), "activation": "tanh", "dropout": 0.0, "embedding_dim": 2, "sketch": False}
        options: dict[str, Any] = {"transforms": 2, "hidden": (6, 6), "activation": "tanh", "code_options": codes}
        model = cls(space, condition, **options, **cls._tiny)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            for parameter in model.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape))
        return model

    # Parts ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, batches: Batches) -> None:
        """Means and deviations, from one pass over the data; the codes' law, the features and the bijection."""
        moments = Moments(self.dims, self.location.device)
        for x, _ in batches:
            moments.add(self._numbers(x))
        variance = moments.variance() + self.spacing.square() / 12.0
        size = moments.mean.abs().clamp(min=1e-300)
        # A constant column on a continuum is lent a deviation of 1e-3 of its size: its density has no limit
        constant = variance <= 1e-24 * size.square()
        lent = torch.where(moments.mean == 0, 1.0, 1e-3 * size)
        self.location.copy_(moments.mean)
        self.unit.copy_(torch.where(constant, lent, variance.sqrt()))
        if self.codes is not None and self.code_features is not None:
            of_codes = Seen(batches, lambda x: x[:, self._coded])
            self.codes.initialise(of_codes)
            self.code_features.initialise(of_codes)
        if self.condition_features is not None:
            self.condition_features.initialise(batches, of_condition=True)
        x, condition = first(batches, STARTING_EXAMPLES)
        self.bijection.initialise(self._standard(x, None), self._context(x, condition))

    def _numbers(self, x: Tensor) -> Tensor:
        flat = x.flatten(1).to(self.location)
        return flat[:, self._numeric] if self._coded else flat

    def _standard(self, x: Tensor, noise: Noise | None) -> Tensor:
        """y of the numeric cells; on a grid with u drawn, or without noise in the middle of its cell."""
        cells = self._numbers(x)
        if noise is not None and self.kind != "exact":
            cells = cells + (noise.uniform(cells.shape).to(cells) - 0.5) * self.spacing
        return ((cells - self.location) / self.unit).to(self._working)

    def _cells(self, z: Tensor, codes: Tensor | None, condition: Tensor | None) -> Tensor:
        """x of a base point and codes."""
        y, _ = self.bijection.inverse(z, self._context_of(codes, condition))
        numbers = y.to(self.unit) * self.unit + self.location
        if not isinstance(self.space, Table):
            return numbers.to(z).reshape(-1, *self.space.shape)
        for i, j in enumerate(self._numeric):
            column = self.space.columns[j]
            if column.resolution is not None:
                numbers[:, i] = column.from_index((numbers[:, i] / column.resolution).round())
        x = numbers.new_empty((len(z), self.space.dims))
        x[:, self._numeric] = numbers
        if codes is not None:
            x[:, self._coded] = codes.to(x)
        return x

    def _log_units(self) -> Tensor:
        """What each numeric cell's units contribute: log s on a grid, and −log σ."""
        return self._log_spacing - self.unit.log()

    def _context(self, x: Tensor, condition: Tensor | None) -> Tensor | None:
        return self._context_of(x[:, self._coded] if self._coded else None, condition)

    def _context_of(self, codes: Tensor | None, condition: Tensor | None) -> Tensor | None:
        """Features of the codes and of the condition, or None where there are neither."""
        self.check_condition(condition)
        found = []
        for features, values in ((self.code_features, codes), (self.condition_features, condition)):
            if features is not None and values is not None:
                found.append(features(values, self._working.dtype).flatten(1))
        return torch.cat(found, 1) if found else None


def check_flow_options(transforms: int, tails: str) -> None:
    """Refuse what no flow can be made of."""
    if transforms < 1:
        raise ValueError(f"transforms: expected at least 1, got {transforms}")
    if tails not in ("heavy", "normal"):
        raise ValueError(f"tails: expected 'heavy' or 'normal', got {tails!r}")
