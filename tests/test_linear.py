"""The linear layer by oneDNN against float64, with derivatives of first and second order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from likely.networks import linear
from likely.networks.linear import LARGE, Linear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")

LEAD, IN, OUT = (5, 20), 160, 96
assert LEAD[0] * LEAD[1] * IN * OUT >= LARGE


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the products that went to oneDNN, on any processor."""
    made: list[tuple[int, ...]] = []
    apply = linear._Affine.apply

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made.append((*x.shape, len(weight)))
        return apply(x, weight, bias)

    monkeypatch.setattr(linear, "ONEDNN", True)
    monkeypatch.setattr(linear._Affine, "apply", noted)
    return made


def make(bias: bool = True) -> tuple[Linear, nn.Linear, Tensor]:
    torch.manual_seed(0)
    layer = Linear(IN, OUT, bias=bias)
    oracle = nn.Linear(IN, OUT, bias=bias).double()
    oracle.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
    return layer, oracle, torch.randn(*LEAD, IN)


def close(got: Tensor, expected: Tensor) -> None:
    got, expected = got.detach().double(), expected.detach()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("bias", [True, False])
def test_value_and_derivatives(products: list[tuple[int, ...]], bias: bool) -> None:
    layer, oracle, x = make(bias)
    results = []
    for module, inputs in ((layer, x), (oracle, x.double())):
        inputs = inputs.clone().requires_grad_()
        y = module(inputs)
        (slope,) = torch.autograd.grad(y.tanh().square().sum(), inputs, create_graph=True)
        slope.square().sum().backward()
        results.append([y, slope, inputs.grad, *(parameter.grad for parameter in module.parameters())])
    for got, expected in zip(*results):
        close(got, expected)
    assert len(products) > 3  # the value, its derivatives, and theirs


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # PyTorch's own use of it
def test_directional_derivative(products: list[tuple[int, ...]]) -> None:
    layer, oracle, x = make()
    direction = torch.randn(x.shape)
    with torch.autograd.forward_ad.dual_level():
        pair = torch.autograd.forward_ad.unpack_dual(layer(torch.autograd.forward_ad.make_dual(x, direction)))
    assert products
    close(pair.primal, oracle(x.double()))
    close(pair.tangent, direction.double() @ oracle.weight.T)


def test_where_torch_has_rules_for_its_own_layer_only(products: list[tuple[int, ...]]) -> None:
    layer, oracle, x = make()
    close(torch.func.vmap(layer)(x), oracle(x.double()))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.double()(x.double())
    layer.float()(x[0, :1])
    assert not products


def test_value_of_a_view(products: list[tuple[int, ...]]) -> None:
    layer, oracle, x = make()
    turned = x.transpose(0, 1)
    close(layer(turned), oracle(turned.double()))
    assert products
