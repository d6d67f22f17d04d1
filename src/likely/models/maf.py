"""Masked autoregressive flow (Papamakarios, Pavlakou & Murray 2017, arXiv 1705.07057).

    z_j = (y_j − m_j(y_<j)) e^{−s_j(y_<j)}                                                             (their eqs. 3–5)

T such maps, each in the order opposite to that of the one before it.  The paper's normalisation between them is left
out: a map has a shift and a scale of its own, and held-out rows were no less likely.  Densities take one evaluation of
each network; samples go cell by cell, and compute every unit once.  With ``components`` the distribution function of a
mixture of logistics (Ho et al. 2019, arXiv 1902.00275) takes the place of the affine map: a conditional may have
several modes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from likely.bijections import Affine, Arcsinh, Autoregressive, Bijection, Chain, Logistics, Unconditional
from likely.contract import Model, Space
from likely.models._flow import Flow, check_flow_options


class MAF(Flow, Model):
    """Masked autoregressive flow over vectors and tables: exact densities (a bound for columns on a grid).

    >>> import torch
    >>> from likely.contract import Reals
    >>> model = MAF(Reals((3,)), transforms=2, hidden=(16,))
    >>> x = torch.randn(5, 3)
    >>> model.bound(x).kind, torch.allclose(model.decode(model.encode(x)), x, atol=1e-4)
    ('exact', True)

    Args:
        space: space of the examples, without missing cells.
        condition: space of what the model is conditioned on, or None.
        transforms: T.
        hidden: widths of the hidden layers of each transform's network.
        components: logistics of each conditional's mixture; 0 for the affine map of the paper.
        tails: ``heavy`` for an arcsinh with a learned rate before the first transform, or ``normal``.
        activation: of the networks.
        residual: whether the networks are residual: linear, but for what their layers add.  Better near the data, but
            far outside the slope of an affine map then goes its own way.
        code_options: of model ``made``, which has the coded columns, such as ``{"hidden": (64, 64)}``.
    """

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        *,
        transforms: int = 5,
        hidden: Sequence[int] = (128, 128),
        components: int = 0,
        tails: str = "heavy",
        activation: str = "relu",
        residual: bool = False,
        code_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(space, condition, code_options)
        check_flow_options(transforms, tails)
        steps: list[Bijection] = [Unconditional(Arcsinh(), (self.dims,))] if tails == "heavy" else []
        places = list(range(self.dims))
        for t in range(transforms):
            transform = Logistics(components) if components else Affine()
            steps.append(
                Autoregressive(
                    transform,
                    self.dims,
                    order=places if t % 2 == 0 else places[::-1],
                    context=self.context_width,
                    hidden=hidden,
                    activation=activation,
                    residual=residual,
                )
            )
        self.bijection = Chain(*steps)
