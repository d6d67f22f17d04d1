"""Neural spline flow (Durkan, Bekasov, Murray & Papamakarios 2019, arXiv 1906.04032).

    z = f_T ∘ … ∘ f_1 (y),    each f_t a monotone rational-quadratic spline of every cell

whose knots a network makes of the cells before it (``autoregressive``, their RQ-NSF (AR): the order is turned round
from one transform to the next), or of the other half of the cells (``coupling``, RQ-NSF (C)), which is as fast in both
directions.

Tails.  A spline acts inside a box and is the identity outside, where the density is the base's: −y²/2 nats make a row
of 30 deviations impossible.  So the first map bends every cell by an arcsinh with a learned rate (``tails="heavy"``):
far outside y becomes its logarithm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from likely.bijections import LU, Arcsinh, Autoregressive, Bijection, Chain, Coupling, Spline, Unconditional
from likely.contract import Model, Space
from likely.models._flow import Flow, check_flow_options


class NSF(Flow, Model):
    """Neural spline flow over vectors and tables: exact densities (a bound for columns on a grid).

    >>> import torch
    >>> from likely.contract import Reals
    >>> model = NSF(Reals((3,)), transforms=2, hidden=(16,))
    >>> x = torch.randn(5, 3)
    >>> model.bound(x).kind, torch.allclose(model.decode(model.encode(x)), x, atol=1e-4)
    ('exact', True)

    Args:
        space: space of the examples, without missing cells.
        condition: space of what the model is conditioned on, or None.
        transforms: T.
        hidden: widths of the hidden layers of each transform's network.
        bins: of each spline.
        box: half the width of the box in which the splines act, in deviations.
        conditioner: ``autoregressive`` (better, slower to sample) or ``coupling``.
        tails: ``heavy``, or ``normal`` without the first map.
        mixing: whether a linear map (by its LU factors, started as a random permutation) stands before each transform:
            often a better fit, but a cell then has no share of the bound of its own (``column_nats``).
        activation: of the networks.
        residual: whether the networks are residual; by default autoregressive ones are, if all hidden layers, two or
            more, are of one width.
        code_options: of model ``made``, which has the coded columns, such as ``{"hidden": (64, 64)}``.
    """

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        *,
        transforms: int = 3,
        hidden: Sequence[int] = (128, 128),
        bins: int = 8,
        box: float = 4.0,
        conditioner: str = "autoregressive",
        tails: str = "heavy",
        mixing: bool = False,
        activation: str = "relu",
        residual: bool | None = None,
        code_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(space, condition, code_options)
        check_flow_options(transforms, tails)
        if conditioner not in ("autoregressive", "coupling"):
            raise ValueError(f"conditioner: expected 'autoregressive' or 'coupling', got {conditioner!r}")
        steps: list[Bijection] = [Unconditional(Arcsinh(), (self.dims,))] if tails == "heavy" else []
        shared: dict[str, Any] = {
            "context": self.context_width,
            "hidden": hidden,
            "activation": activation,
            "residual": residual,
        }
        places = list(range(self.dims))
        for t in range(transforms):
            if mixing:
                steps.append(LU(self.dims, start="permutation"))
            spline = Spline(bins, box)
            if conditioner == "autoregressive":
                order = places if t % 2 == 0 else places[::-1]
                steps.append(Autoregressive(spline, self.dims, order=order, **shared))
            else:
                steps.append(Coupling(spline, [self.dims > 1 and j % 2 == t % 2 for j in places], **shared))
        self.bijection = Chain(*steps)
        if mixing:
            object.__setattr__(self, "column_nats", None)
