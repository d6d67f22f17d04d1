"""Networks on vectors: the multi-layer perceptron and its residual form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from likely.networks.linear import Linear

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
}


def make_activation(name: str) -> nn.Module:
    """The activation of that name."""
    if name not in _ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(_ACTIVATIONS)}, got {name!r}")
    return _ACTIVATIONS[name]()


class MLP(nn.Sequential):
    """Linear layers, each followed by the activation; there is no output layer (heads bring their own).

    Weights start as Glorot & Bengio (2010) propose, biases at zero.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], activation: str = "silu", dropout: float = 0.0) -> None:
        if not hidden:
            raise ValueError("hidden: expected at least one layer width, got none")
        layers: list[nn.Module] = []
        width = in_features
        for size in hidden:
            layers += [glorot(Linear(width, size)), make_activation(activation)]
            if dropout:
                layers.append(nn.Dropout(dropout))
            width = size
        super().__init__(*layers)
        self.out_features = width
        self.out_shape: tuple[int, ...] = (width,)


class ResidualMLP(nn.Module):
    """A linear layer followed by pre-activation residual blocks of one width (He et al. 2016, arXiv 1603.05027).

    Block: x + W₂ act(W₁ norm(x)), with W₂ started at zero, so that the network starts linear.
    """

    def __init__(self, in_features: int, hidden: Sequence[int], activation: str = "silu", dropout: float = 0.0) -> None:
        super().__init__()
        if len(set(hidden)) != 1:
            raise ValueError(f"hidden: a residual network has blocks of one width, got {tuple(hidden)}")
        width = hidden[0]
        self.first = glorot(Linear(in_features, width))
        self.blocks = nn.ModuleList()
        for _ in hidden:
            last = glorot(Linear(width, width))
            nn.init.zeros_(last.weight)
            drop = nn.Dropout(dropout) if dropout else nn.Identity()
            hidden_layer = glorot(Linear(width, width))
            self.blocks.append(
                nn.Sequential(nn.LayerNorm(width), hidden_layer, make_activation(activation), drop, last)
            )
        self.final = make_activation(activation)
        self.out_features = width
        self.out_shape = (width,)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return self.final(h)


def glorot(layer: nn.Linear) -> nn.Linear:
    """The layer with Glorot-uniform weights and zero bias."""
    nn.init.xavier_uniform_(layer.weight)
    with torch.no_grad():
        layer.bias.zero_()
    return layer


def full_precision(x: Tensor) -> Tensor:
    """Out of half precision: likelihoods and latent variables live in float32 or float64."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
