"""Inverse autoregressive flow (Kingma, Salimans, Jozefowicz, Chen, Sutskever & Welling 2016, arXiv 1606.04934).

    y_j = (z_j − m_j(z_<j)) e^{−s_j(z_<j)}                                                             (their eq. 10)

T such maps from base to data: a sample takes one evaluation of each network, and the density of a given y goes cell by
cell.  It is what one wants of a posterior, whose samples are all that is ever scored; as a density of data it is the
slow way round, and fits less well than :class:`~likely.models.maf.MAF` of its size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from likely.bijections import Affine, Arcsinh, Autoregressive, Bijection, Chain, Inverse, Unconditional
from likely.contract import Model, Space
from likely.models._flow import Flow, check_flow_options


class IAF(Flow, Model):
    """Inverse autoregressive flow over vectors and tables: fast samples, exact densities (a bound on a grid).

    >>> import torch
    >>> from likely.contract import Reals
    >>> model = IAF(Reals((3,)), transforms=2, hidden=(16,))
    >>> x = torch.randn(5, 3)
    >>> model.bound(x).kind, torch.allclose(model.decode(model.encode(x)), x, atol=1e-4)
    ('exact', True)

    Args:
        space: space of the examples, without missing cells.
        condition: space of what the model is conditioned on, or None.
        transforms: T.
        hidden: widths of the hidden layers of each transform's network.
        tails: ``heavy`` for an arcsinh with a learned rate next to the data, or ``normal``.
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
        transforms: int = 2,
        hidden: Sequence[int] = (128, 128),
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
            step = Autoregressive(
                Affine(),
                self.dims,
                order=places if t % 2 == 0 else places[::-1],
                context=self.context_width,
                hidden=hidden,
                activation=activation,
                residual=residual,
            )
            steps.append(Inverse(step))
        self.bijection = Chain(*steps)
        object.__setattr__(self, "column_nats", None)  # a cell's way back goes through all before it
