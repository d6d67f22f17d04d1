"""The linear layer by oneDNN against float64, with derivatives of first and second order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from likely.networks import linear
from likely.networks.linear import LARGE, Linear, affine_columns

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")

LEAD, IN, OUT = (5, 30), 160, 96
assert LEAD[0] * LEAD[1] * IN * OUT >= LARGE


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the products that went to oneDNN, on any processor."""
    made: list[tuple[int, ...]] = []
    multiply = linear._by_onednn

    def noted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made.append((*x.shape, len(weight)))
        return multiply(x, weight, bias)

    monkeypatch.setattr(linear, "ONEDNN", True)
    monkeypatch.setattr(linear, "_by_onednn", noted)
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


def columns_and_oracle() -> list[tuple[Tensor, Tensor, Tensor]]:
    """x, W and b for :func:`affine_columns`, in float32 and float64."""
    torch.manual_seed(0)
    arguments = torch.randn(IN, 600), torch.randn(OUT, IN), torch.randn(OUT)
    assert 600 * IN * OUT >= linear._LARGE_COLUMNS
    return [tuple(a.to(dtype).requires_grad_() for a in arguments) for dtype in (torch.float32, torch.float64)]


def test_columns_and_their_derivatives(products: list[tuple[int, ...]]) -> None:
    results = []
    for (x, weight, bias), map_ in zip(
        columns_and_oracle(), (affine_columns, lambda x, weight, bias: weight @ x + bias.unsqueeze(1))
    ):
        y = map_(x, weight, bias)
        slopes = torch.autograd.grad(y.div(IN).tanh().square().sum(), (x, weight, bias), create_graph=True)
        second = torch.autograd.grad(sum(slope.square().sum() for slope in slopes), (x, weight, bias))
        results.append([y, *slopes, *second])
    for got, expected in zip(*results):
        close(got, expected)
    assert len(products) > 3


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_columns_directional_derivative(products: list[tuple[int, ...]]) -> None:
    ours, (x, weight, bias) = columns_and_oracle()
    directions = [torch.randn(a.shape) for a in ours]
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(a, direction) for a, direction in zip(ours, directions)]
        pair = torch.autograd.forward_ad.unpack_dual(affine_columns(*duals))
    assert products
    of_x, of_weight, of_bias = (direction.double() for direction in directions)
    close(pair.primal, weight @ x + bias.unsqueeze(1))
    close(pair.tangent, weight @ of_x + of_weight @ x + of_bias.unsqueeze(1))
