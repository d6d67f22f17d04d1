"""Real-valued non-volume-preserving flow (Dinh, Sohl-Dickstein & Bengio 2017, arXiv 1605.08803), over vectors.

    z_B = (y_B − m(y_A)) e^{−s(y_A)},    z_A = y_A                                                     (their eqs. 7–8)

T couplings, of which each changes the half of the cells that the one before it kept, with an ActNorm (Kingma & Dhariwal
2018, arXiv 1807.03039) before each in the place of batch normalisation.  Fast in both directions.  Images are better
served by :class:`~likely.models.glow.Glow`, which adds scales and convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from likely.bijections import ActNorm, Affine, Arcsinh, Bijection, Chain, Coupling, Unconditional
from likely.contract import Model, Space
from likely.models._flow import Flow, check_flow_options


class RealNVP(Flow, Model):
    """RealNVP over vectors and tables: exact densities (a bound for columns on a grid), fast in both directions.

    >>> import torch
    >>> from likely.contract import Reals
    >>> model = RealNVP(Reals((3,)), transforms=2, hidden=(16,))
    >>> x = torch.randn(5, 3)
    >>> model.bound(x).kind, torch.allclose(model.decode(model.encode(x)), x, atol=1e-4)
    ('exact', True)

    Args:
        space: space of the examples, without missing cells.
        condition: space of what the model is conditioned on, or None.
        transforms: T.
        hidden: widths of the hidden layers of each transform's network.
        tails: ``heavy`` for an arcsinh with a learned rate before the first transform, or ``normal``.
        activation: of the networks.
        residual: whether the networks are residual.
        code_options: of model ``made``, which has the coded columns, such as ``{"hidden": (64, 64)}``.
    """

    def __init__(
        self,
        space: Space,
        condition: Space | None = None,
        *,
        transforms: int = 8,
        hidden: Sequence[int] = (128, 128),
        tails: str = "heavy",
        activation: str = "relu",
        residual: bool = False,
        code_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(space, condition, code_options)
        check_flow_options(transforms, tails)
        steps: list[Bijection] = [Unconditional(Arcsinh(), (self.dims,))] if tails == "heavy" else []
        for t in range(transforms):
            step = Coupling(
                Affine(),
                [self.dims > 1 and j % 2 == t % 2 for j in range(self.dims)],
                context=self.context_width,
                hidden=hidden,
                activation=activation,
                residual=residual,
            )
            steps += [ActNorm(self.dims), step]
        self.bijection = Chain(*steps)
