"""Reproducible arithmetic: accuracy, certificates, coverage, and the same bits in every environment."""

from __future__ import annotations

import copy
import json
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely import exact
from likely.contract import Binary, Column, Counts, Integers, Reals, Space, Table, Tokens
from likely.distributions import head, likelihoods
from likely.exact import functions, products
from likely.exact.activations import CURVES, Activation
from likely.exact.attention import exponentials
from likely.exact.layers import Affine, Chain, Convolution, standardised
from likely.exact.products import ROUTES, Geometry, Product
from likely.exact.profiles import PROFILES, peaks
from likely.networks import Features, decoder, encoder
from likely.networks.mlp import _ACTIVATIONS

PROFILE = PROFILES["exact32"]


def randomised(module: nn.Module, scale: float = 1.0) -> nn.Module:
    """The module in evaluation, without the zeros that some layers start from."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=scale * 0.1)
    return module.eval()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.detach().numpy().tobytes() == b.detach().numpy().tobytes()


# Elementary functions -----------------------------------------------------------------------------------------------

mpmath.mp.prec = 140
ORACLES: dict[str, tuple[Callable[[mpmath.mpf], mpmath.mpf], float, float]] = {
    "exp": (mpmath.exp, -700.0, 700.0),
    "expm1": (mpmath.expm1, -40.0, 40.0),
    "log": (mpmath.log, 1e-300, 1e300),
    "log1p": (mpmath.log1p, -0.999999, 1e12),
    "sqrt": (mpmath.sqrt, 0.0, 1e300),
    "asinh": (mpmath.asinh, -1e200, 1e200),
    "sigmoid": (lambda x: 1 / (1 + mpmath.exp(-x)), -700.0, 700.0),
    "softplus": (lambda x: mpmath.log1p(mpmath.exp(x)), -700.0, 700.0),
    "tanh": (mpmath.tanh, -50.0, 50.0),
    "normal_cdf": (mpmath.ncdf, -37.0, 9.0),
    "normal_density": (mpmath.npdf, -37.0, 37.0),
}


@pytest.mark.parametrize("name", ORACLES)
def test_elementary_functions_are_accurate_to_the_last_bits(name: str) -> None:
    oracle, low, high = ORACLES[name]
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(size=60) * size for size in (1e-9, 1e-3, 0.3, 1.0, 4.0, 30.0, 1e3, 1e150)])
    x = np.concatenate([x, [-2.2500001, -2.25, -2.2499999, 0.3499999, 0.35, 1.0]])
    x = np.clip(abs(x) if low >= 0 else x, low, high)
    values = getattr(functions, name)(x)
    for argument, value in zip(x, values):
        right = oracle(mpmath.mpf(float(argument)))
        assert abs(value - right) <= 1e-14 * abs(right) + 2.0**-1022, (argument, value, right)
    assert np.isfinite(values).all()


@pytest.mark.parametrize("name", ORACLES)
def test_elementary_functions_have_the_same_bits_for_arrays_and_tensors(name: str) -> None:
    x = np.concatenate([np.random.default_rng(1).normal(size=4000) * size for size in (1e-5, 1.0, 100.0)])
    x = np.concatenate([x, [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-310, 1e308, -745.0]])
    function = getattr(functions, name)
    whole = function(torch.from_numpy(x))
    assert function(x).tobytes() == whole.numpy().tobytes()
    one_by_one = torch.stack([function(torch.tensor(value)) for value in x[:200]])
    assert same_bits(one_by_one, whole[:200])


def test_elementary_functions_at_the_edges() -> None:
    edge = np.array([np.nan, np.inf, -np.inf, 0.0])
    expected = {
        "exp": [np.nan, np.inf, 0.0, 1.0],
        "log": [np.nan, np.inf, np.nan, -np.inf],
        "log1p": [np.nan, np.inf, np.nan, 0.0],
        "sqrt": [np.nan, np.inf, np.nan, 0.0],
        "sigmoid": [np.nan, 1.0, 0.0, 0.5],
        "tanh": [np.nan, 1.0, -1.0, 0.0],
        "asinh": [np.nan, np.inf, -np.inf, 0.0],
        "normal_cdf": [np.nan, 1.0, 0.0, 0.5],
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(getattr(functions, name)(edge), values, err_msg=name)
    assert np.signbit(functions.tanh(np.array([-0.0])))[0]
    with pytest.raises(ValueError, match=r"expected float64, got torch\.float32"):
        functions.exp(torch.zeros(1))


# Certified products -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (30, 784), (9, 3000), (3, 9000)])
@pytest.mark.parametrize("heavy", [False, True])
def test_no_sum_can_reach_two_to_the_24(shape: tuple[int, int], heavy: bool) -> None:
    weight = torch.randint(-255, 256, shape)
    if heavy:
        weight = weight.sign() * 255
    product = Product(weight, "linear", PROFILE)
    sums = [int(part.abs().sum(1).max()) for part in product.blocks]
    assert max(sums) * product.limit < 2**24
    assert sum(product.cuts) == shape[1] and product.limit >= 64
    if len(product.cuts) == 1 and product.limit < PROFILE.largest_activation:
        assert max(sums) * (product.limit + 1) >= 2**24  # and no room is left
    x = torch.randint(-product.limit, product.limit + 1, (6, shape[1]))
    x[0] = torch.where(weight[0] < 0, -product.limit, product.limit)
    right = x @ weight.t()
    for route in product.routes:
        assert torch.equal(product.by(route, x.float()), right.double().float()), route


def _of_tiles(x: Tensor, w: Tensor, plain: Any = F.linear) -> Tensor:
    """What a processor with tiles computes while the switch is thrown."""
    thrown = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
    return plain(x.bfloat16().float(), w.bfloat16().float()) if thrown else plain(x, w)


@pytest.mark.parametrize(
    ("shape", "heaviest"), [((512, 784), 255), ((512, 784), 100), ((512, 60), 255), ((80, 3000), 255)]
)
def test_tiles_give_the_sums(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], heaviest: int) -> None:
    """Activations of one bfloat16, of two (little or much above 256), and in blocks; whatever processor this is."""
    monkeypatch.setattr(F, "linear", _of_tiles)
    monkeypatch.setattr(products, "TILES", True)
    monkeypatch.setattr(products, "_TILED", 0)
    monkeypatch.setattr(products, "_WIDE", 1)
    weight = torch.randint(-heaviest, heaviest + 1, shape)
    product = Product(weight, "linear", PROFILE)
    assert product.routes[0] == "tiles"
    assert (product.limit <= 256) == (heaviest == 255 and shape[1] > 60) and (product.limit > 512) == (shape[1] == 60)
    x = torch.randint(-product.limit, product.limit + 1, (3, 40, shape[1]))
    x[0, 0] = torch.where(weight[1] < 0, -product.limit, product.limit)
    thrown = []
    rounded_factors = products.rounded_factors
    monkeypatch.setattr(products, "rounded_factors", lambda: (thrown.append(1), rounded_factors())[1])
    right = (x.double() @ weight.t().double()).float()
    assert torch.equal(product.by("tiles", x.float()), right) and len(thrown) == len(product.cuts)
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16"  # type: ignore[attr-defined]
    assert product.passes("tiles", torch.device("cpu"))
    # Another thread might multiply meanwhile: the switch, which is the whole process's, is left alone.
    thrown.clear()
    other = threading.Timer(60.0, print)
    other.start()
    try:
        assert torch.equal(product.by("tiles", x.float()), right) and not thrown
        assert not product.passes("tiles", torch.device("cpu"))
        product.choose(torch.device("cpu"), "tiles")
        assert product.route == "native"
    finally:
        other.cancel()
        other.join()


def test_tiles_that_lose_bits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "TILES", True)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(600, 520), nn.SiLU(), nn.Linear(520, 3))
    digest = exact.network(net).probe()
    assert list(exact.network(net).routes.values()) == ["tiles", "native"]
    plain = F.linear

    def linear(x: Tensor, w: Tensor) -> Tensor:
        reduced = torch.backends.mkldnn.matmul.fp32_precision == "bf16"  # type: ignore[attr-defined]
        return _in_halves(x, w) if reduced else plain(x, w)

    monkeypatch.setattr(F, "linear", linear)
    assert list(exact.network(net).routes.values()) == ["native", "native"]
    assert exact.network(net).probe() == digest


def test_blocks_are_cut_only_where_needed() -> None:
    assert len(Product(torch.full((2, 600), 255), "linear", PROFILE).cuts) == 1
    assert len(Product(torch.full((2, 2000), 255), "linear", PROFILE).cuts) > 1
    conv = Product(torch.full((2, 300, 3, 3), 255), "conv", PROFILE, Geometry((3, 3), padding=(1, 1)))
    assert len(conv.cuts) > 1 and conv.limit >= 128
    assert all(conv.passes(route, torch.device("cpu")) for route in ROUTES)


def test_activations_stay_within_the_certificate() -> None:
    layer = Affine(torch.randn(20, 50), None, PROFILE)
    x = torch.randn(2000, 50) * torch.logspace(-30, 15, 2000).unsqueeze(1)
    x[5] = 0.0
    whole = torch.empty_like(x)
    scale = layer.whole(x, whole)
    assert whole.abs().max() <= layer.limit and torch.equal(whole, whole.round())
    near = scale > 2.0**-59
    assert ((whole * scale - x).abs() <= 0.5001 * scale)[near.flatten()].all()


CONVOLUTIONS = {
    "plain": nn.Conv2d(5, 7, 3, padding=1),
    "strided": nn.Conv2d(3, 6, 4, stride=2, padding=1),
    "dilated": nn.Conv2d(3, 6, 3, dilation=2, padding=2, bias=False),
    "grouped": nn.Conv2d(6, 9, (3, 2), groups=3),
    "same": nn.Conv2d(3, 4, (4, 3), padding="same"),
    "circular": nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
    "reflect": nn.Conv2d(3, 4, 3, stride=2, padding=2, padding_mode="reflect"),
    "one": nn.Conv1d(4, 6, 5, stride=2, padding=2),
    "one, dilated": nn.Conv1d(4, 6, 3, dilation=3, padding="same", groups=2),
    "transposed": nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
    "transposed, uneven": nn.ConvTranspose2d(4, 6, (3, 2), stride=(2, 3), output_padding=(1, 0), groups=2),
    "transposed, dilated": nn.ConvTranspose2d(4, 6, 3, stride=2, dilation=2),
    "transposed, one": nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, bias=False),
}


def _error_bound(layer: nn.Module, x: Tensor) -> Tensor:
    """How far rounding of weights and activations can move each output: Σ |δx w| + |x δw| + |δx δw|."""
    (chain,) = (exact.network(layer).module,)
    rule = chain.layers[0]
    dims = tuple(range(1, x.dim())) if isinstance(rule, Convolution) else (-1,)
    delta_x = (x.abs().amax(dims, True) / rule.limit * 0.5001).expand_as(x)
    plain = copy.deepcopy(layer).double()
    plain.bias = None
    weight = plain.weight.data
    transposed = isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d)
    scale = rule.scale.flatten().double()
    if transposed:
        scale = scale.reshape(layer.groups, 1, -1).expand(-1, weight.shape[0] // layer.groups, -1).flatten(0, 1)
        scale = scale.reshape(*weight.shape[:2], *[1] * (weight.dim() - 2))
    else:
        scale = scale.reshape(-1, *[1] * (weight.dim() - 1))
    delta_w = (scale * 0.5001).expand_as(weight)
    plain.weight.data = weight.abs() + delta_w
    moved = plain(delta_x.double())
    plain.weight.data = delta_w.clone()
    return moved + plain(x.abs().double())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_agree_with_pytorch_within_their_rounding(name: str) -> None:
    layer = CONVOLUTIONS[name].eval()
    x = torch.randn(6, layer.in_channels, *(11, 9)[: len(layer.kernel_size)]) * torch.logspace(-2, 2, 6).reshape(
        6, *[1] * (1 + len(layer.kernel_size))
    )
    native = copy.deepcopy(layer).double()(x.double()).detach()
    net = exact.network(layer)
    y = net(x)
    assert y.shape == native.shape
    assert ((y - native).abs() <= _error_bound(layer, x) + 1e-6 * native.abs()).all()
    precise = exact.network(layer, "exact64")(x)
    assert precise.dtype == torch.float64
    torch.testing.assert_close(precise, native, rtol=1e-4, atol=2e-6 * float(native.abs().max()))
    for route in ROUTES:
        assert same_bits(exact.network(layer, route=route)(x), y), route
    assert same_bits(torch.cat([net(row) for row in x.split(1)]), y)
    assert not torch.equal(y, layer(x))


@pytest.mark.parametrize("shape", [(4, 30), (2, 3, 30), (0, 30)])
def test_linear_layers_agree_with_pytorch_within_their_rounding(shape: tuple[int, ...]) -> None:
    layer = nn.Linear(30, 9)
    x = torch.randn(shape) * 3.0
    y = exact.network(layer)(x)
    native = copy.deepcopy(layer).double()(x.double())
    assert y.shape == native.shape
    assert ((y - native).abs() <= _error_bound(layer, x) + 1e-6 * native.abs()).all()


@pytest.mark.parametrize("kind", CURVES)
def test_no_value_of_a_table_is_less_than_its_least_which_spares_a_look_for_the_peak(kind: type[nn.Module]) -> None:
    rule = Activation(CURVES[kind](kind()), PROFILE)
    x = torch.randn(300, 40) * torch.logspace(-3, 2, 300).unsqueeze(1)
    x[::3] = -x[::3].abs()
    values = rule(x)
    assert (values >= rule.least).all()
    assert (rule.least == -math.inf) == (kind is nn.LogSigmoid)
    for row in values.split(1):
        assert same_bits(peaks(row, (1,), rule.least), row.abs().amax(1, True))


def test_a_rectifier_between_layers_changes_no_bit_and_not_its_input() -> None:
    one, two = nn.Linear(20, 30), nn.Linear(30, 5)
    x = torch.randn(40, 20)
    joined, apart = exact.network(nn.Sequential(one, nn.ReLU(), two)), [exact.network(layer) for layer in (one, two)]
    assert same_bits(joined(x), apart[1](apart[0](x).clamp(min=0.0)))
    leading, before = exact.network(nn.Sequential(nn.ReLU(), one)), x.clone()
    assert same_bits(leading(x), apart[0](x.clamp(min=0.0))) and torch.equal(x, before)
    with pytest.raises(ValueError, match="expected finite numbers"):
        joined(torch.full((1, 20), torch.nan))


def test_exact32_is_what_numpy_makes_of_the_rules() -> None:
    """A second implementation: integers in NumPy, the look-up, and single float32 operations in the stated order."""
    one, two = nn.Linear(40, 30), nn.Linear(30, 5, bias=False)
    x = torch.randn(50, 40) * 3.0
    y = exact.network(nn.Sequential(one, nn.SiLU(), two))(x).numpy()

    def layer(weight: Tensor, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        w = weight.detach().numpy().astype(np.float64)

        def rounded(largest: int) -> tuple[np.ndarray, np.ndarray]:
            of_w = (abs(w).max(1, keepdims=True) / largest).astype(np.float32)
            return np.rint(w / of_w).astype(np.int64), of_w

        heaviest = abs(rounded(255)[0]).sum(1).max()
        sizes = [2047, 1023, 511]  # the finest whose square leaves room for activations of the same size, or else 255
        fits = [largest for largest in sizes if largest**2 * int(heaviest) <= (2**24 - 1) * 255]
        whole_w, of_w = rounded(fits[0] if fits else 255)
        limit = np.float32(min((2**24 - 1) // abs(whole_w).sum(1).max(), 2047))
        peak = abs(values).max(1, keepdims=True)
        whole = np.rint(values * (limit / peak)).astype(np.int64)
        return (whole @ whole_w.T).astype(np.float32), peak / limit, of_w.T

    sums, of_x, of_w = layer(one.weight, x.numpy())
    bias = (one.bias.detach().numpy().astype(np.float64) * 256.0 + 4096.5).astype(np.float32)
    place = sums * of_x * (of_w * np.float32(256.0)) + bias
    index = np.clip(place, 0.0, 8192.0).astype(np.int64)
    grid = (np.arange(8193) - 4096) / 256.0
    table = grid * functions.sigmoid(grid)
    table[0] = 0.0
    hidden = table.astype(np.float32)[index]
    sums, of_x, of_w = layer(two.weight, hidden)
    assert (sums * of_x * of_w).tobytes() == y.tobytes()


def test_numbers_that_no_bits_can_be_promised_for_are_refused() -> None:
    net = exact.network(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
    for wrong in (math.nan, math.inf, -math.inf, 1e30):
        x = torch.zeros(5, 3)
        x[2, 1] = wrong
        with pytest.raises(ValueError, match=r"expected finite numbers up to .*, got .* at \[2, 1\]"):
            net(x)
        with pytest.raises(ValueError, match="expected finite numbers"):
            exact.network(nn.SiLU())(x)
    with pytest.raises(ValueError, match="expected finite numbers"):
        layer = nn.Linear(2, 2)
        layer.weight.data[0, 0] = math.nan
        exact.network(layer)
    with pytest.raises(ValueError, match="softmax: expected numbers"):
        exact.network(nn.Softmax(-1))(torch.tensor([[math.nan, 1.0]]))


def test_zeros_and_tiny_numbers() -> None:
    net = exact.network(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)))
    assert same_bits(net(torch.zeros(2, 6)), net(torch.full((2, 6), 1e-42)))
    zero = nn.Linear(6, 5)
    nn.init.zeros_(zero.weight)
    assert torch.equal(exact.network(zero)(torch.randn(3, 6)), zero.bias.detach().expand(3, 5))
    x = torch.randn(40, 6) * torch.logspace(-44, -20, 40).unsqueeze(1)
    outputs = net(x)
    if torch.set_flush_denormal(True):
        try:
            assert same_bits(net(x), outputs)
        finally:
            torch.set_flush_denormal(False)


# Activations, normalisation, attention ------------------------------------------------------------------------------

ACTIVATIONS = [
    *(nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Tanh(), nn.Sigmoid(), nn.Mish(), nn.SELU(), nn.LogSigmoid()),
    *(nn.ELU(), nn.ELU(0.5), nn.CELU(2.0), nn.Softplus(), nn.Softplus(3.0), nn.Softplus(0.5, 10.0)),
    *(nn.ReLU(), nn.LeakyReLU(0.1), nn.ReLU6(), nn.Hardtanh(-2.0, 1.5), nn.PReLU()),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations(activation: nn.Module) -> None:
    x = torch.cat([torch.linspace(-40, 40, 30_001), torch.randn(5000), torch.tensor([-1e9, 1e9, 0.0])])
    right = activation(x.double()) if not isinstance(activation, nn.PReLU) else activation(x).double()
    y = exact.network(activation)(x)
    tolerance = 1.8 / 512 if type(activation) in CURVES else 0.0  # half a step, times the largest slope
    assert ((y - right).abs() <= tolerance + 1e-6 * right.abs()).all()
    precise = exact.network(activation, "exact64")(x)
    torch.testing.assert_close(precise.double(), right.detach(), rtol=1e-12 if tolerance else 1e-7, atol=1e-15)
    image = x[-5000:-8].reshape(8, 4, 12, 13).contiguous(memory_format=torch.channels_last)
    assert same_bits(exact.network(activation)(image).contiguous(), y[-5000:-8].reshape(8, 4, 12, 13))


@pytest.mark.parametrize("curve", CURVES)
def test_a_layer_and_its_activation_joined_differ_by_one_entry_of_the_table_at_most(curve: type[nn.Module]) -> None:
    layer, activation = nn.Linear(20, 50), curve()
    x = torch.randn(200, 20) * 20.0
    joined = exact.network(nn.Sequential(layer, nn.Dropout(), activation))
    assert sum(isinstance(m, Chain) for m in joined.module.runs) == len(joined.module.runs) == 1
    apart = exact.network(activation)(exact.network(layer)(x))
    assert ((joined(x) - apart).abs() <= 1.2 / 256 + 1e-5 * apart.abs()).all()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.LayerNorm(40), (7, 40)),
        (nn.LayerNorm((3, 40), elementwise_affine=False), (7, 3, 40)),
        (nn.RMSNorm(40), (2, 5, 40)),
        (nn.GroupNorm(3, 6), (4, 6, 5, 7)),
        (nn.GroupNorm(6, 6, eps=1e-2), (4, 6, 11)),
        (nn.BatchNorm1d(6), (4, 6)),
        (nn.BatchNorm2d(6, affine=False), (4, 6, 5, 7)),
        (nn.Softmax(-1), (5, 30)),
        (nn.LogSoftmax(1), (5, 30, 2)),
    ],
    ids=str,
)
def test_normalisations(layer: nn.Module, shape: tuple[int, ...]) -> None:
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
        layer.running_mean.copy_(torch.randn(6))
        layer.running_var.copy_(torch.rand(6) + 0.1)
    x = torch.randn(shape) * 3.0 + 2.0
    right = copy.deepcopy(layer).eval().double()(x.double())
    net = exact.network(layer)
    torch.testing.assert_close(net(x).double(), right, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(exact.network(layer, "exact64")(x).double(), right, rtol=1e-5, atol=1e-6)
    assert same_bits(net(x)[2:3], net(x[2:3]))


def test_moments_are_exact_sums() -> None:
    x = torch.randn(3, 5000)
    y = standardised(x, (1,), 0.0).double()
    assert y.mean(1).abs().max() < 1e-4 and (y.square().mean(1) - 1.0).abs().max() < 1e-3
    constant = standardised(torch.full((2, 30), 7.0), (1,), 1e-5)
    assert constant.abs().max() < 1e-3


def test_softmax_of_masked_rows() -> None:
    x = torch.randn(4, 20)
    x[0, 3:] = -math.inf
    x[1] = -math.inf
    values, total, _ = exponentials(x)
    assert torch.equal(values, values.round()) and torch.equal(total.flatten(), values.double().sum(1))
    assert not values[0, 3:].any() and not total[1].any()


@pytest.mark.parametrize("profile", PROFILES)
def test_attention(profile: str) -> None:
    q, k, v = (torch.randn(2, 3, 8, 16) for _ in range(3))

    class Attends(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]

    net = exact.network(Attends(), profile)
    close = {"rtol": 1e-5, "atol": 1e-5} if profile == "exact64" else {"rtol": 0.02, "atol": 0.02}
    for options in ({}, {"is_causal": True}, {"scale": 0.1}, {"attn_mask": torch.rand(8, 8) < 0.7}):
        if "attn_mask" in options:
            options["attn_mask"] |= torch.eye(8, dtype=torch.bool)
        y = net(q, k, v, **options)
        torch.testing.assert_close(y.float(), F.scaled_dot_product_attention(q, k, v, **options), **close)
    added = {"attn_mask": torch.randn(8, 8)}
    torch.testing.assert_close(net(q, k, v, **added).float(), F.scaled_dot_product_attention(q, k, v, **added), **close)
    # one query at a time, with the keys that there are so far, gives the same bits as all at once
    whole = net(q, k, v, is_causal=True)
    for t in range(8):
        step = net(q[..., t : t + 1, :], k[..., : t + 1, :], v[..., : t + 1, :])
        assert same_bits(step.contiguous(), whole[..., t : t + 1, :].contiguous())


@pytest.mark.parametrize("separate", [False, True])
def test_multihead_attention(separate: bool) -> None:
    layer = nn.MultiheadAttention(24, 4, batch_first=separate, kdim=10 if separate else None).eval()
    q = torch.randn(3, 7, 24)
    k = torch.randn(3, 7, 10) if separate else torch.randn(3, 7, 24)
    padding = torch.zeros(7 if not separate else 3, 7, dtype=torch.bool)
    padding[1, 5:] = True
    options = {"attn_mask": torch.triu(torch.ones(7, 7, dtype=torch.bool), 1)} if separate else {}
    if not separate:
        padding = padding[:7, :3]
    v = torch.randn(3, 7, 24)
    y, weights = exact.network(layer)(q, k, v, key_padding_mask=padding, **options)
    right, right_weights = layer(q, k, v, key_padding_mask=padding, **options)
    torch.testing.assert_close(y, right, rtol=0.03, atol=0.02)
    torch.testing.assert_close(weights, right_weights, rtol=0.03, atol=0.01)


def test_a_causal_network_sees_nothing_of_the_future() -> None:
    class Masked(nn.Conv2d):
        """A convolution whose kernel sees the pixels before (and, of its own pixel, earlier channels)."""

        mask: Tensor

        def __init__(self) -> None:
            super().__init__(3, 6, 3, padding=1)
            self.register_buffer("mask", torch.ones_like(self.weight))
            self.mask[:, :, 1, 2:] = 0
            self.mask[:, :, 2] = 0
            for out in range(6):
                self.mask[out, out % 3 :, 1, 1] = 0
            self.weight.data *= self.mask

    layer = Masked().eval()
    x = torch.randn(2, 3, 5, 6)
    net = exact.network(layer, causal=True)
    torch.testing.assert_close(net(x), layer(x), rtol=0.02, atol=0.02)
    later = x.clone()
    later[:, :, 3:] *= 1e4
    later[:, 1:, 2, 4] *= 1e4
    later[:, :, 2, 5] *= 1e4
    assert same_bits(net(later)[:, :, :2].contiguous(), net(x)[:, :, :2].contiguous())
    assert same_bits(net(later)[:, :, 2, :4].contiguous(), net(x)[:, :, 2, :4].contiguous())
    assert same_bits(net(later)[:, [0, 3, 1, 4], 2, 4].contiguous(), net(x)[:, [0, 3, 1, 4], 2, 4].contiguous())
    assert not torch.equal(exact.network(layer)(later)[:, :, :2], exact.network(layer)(x)[:, :, :2])
    grouped = nn.Conv1d(4, 6, 3, groups=2, dilation=2)
    y = torch.randn(3, 4, 20)
    torch.testing.assert_close(exact.network(grouped, causal=True)(y), grouped(y), rtol=0.02, atol=0.02)
    with pytest.raises(exact.Uncovered, match="group normalisation looks at the whole example"):
        exact.network(nn.GroupNorm(1, 4), causal=True)


# Networks -----------------------------------------------------------------------------------------------------------

SPACES: dict[str, tuple[Space, Callable[[], Tensor]]] = {
    "binary": (Binary((12,)), lambda: torch.randint(0, 2, (9, 12)).float()),
    "image": (Integers((3, 7, 8), 256), lambda: torch.randint(0, 256, (9, 3, 7, 8)).float()),
    "reals": (Reals((6,), missing=True), lambda: torch.randn(9, 6).masked_fill(torch.rand(9, 6) < 0.2, math.nan)),
    "counts": (Counts((7,)), lambda: torch.randint(0, 900, (9, 7)).float()),
    "tokens": (Tokens(5, 11), lambda: torch.randint(0, 11, (9, 5)).float()),
    "table": (
        Table(columns=(Column("a", "real", resolution=0.5), Column("b", "categorical", 4), Column("c", "binary"))),
        lambda: torch.stack(
            [torch.randint(-90, 90, (9,)) * 0.5, torch.randint(0, 4, (9,)), torch.randint(0, 2, (9,))], 1
        ).double(),
    ),
}


class Whole(nn.Module):
    """Features, an encoder, and a decoder with its head, as the codec of a vae uses them."""

    def __init__(self, space: Space, network: str, hidden: tuple[int, ...], activation: str) -> None:
        super().__init__()
        self.features = Features(space)
        self.context = Features(Reals((2,)))
        self.encoder = encoder(network, self.features.shape, 2, hidden, activation, dropout=0.1)
        self.middle = nn.Linear(self.encoder.out_features, 3)  # type: ignore[arg-type]
        self.decoder = decoder(network, 5, space.shape, hidden, activation, dropout=0.1)
        self.heads = nn.ModuleList(head(name, space, self.decoder.out_shape) for name in likelihoods(space))  # type: ignore[arg-type]

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, list[object]]:
        context = self.context(c).flatten(1)
        z = self.middle(self.encoder(self.features(x), context))
        y = self.decoder(torch.cat([z, context], 1))
        return z, y, [likelihood(y) for likelihood in self.heads]


def _numbers(distribution: object) -> list[Tensor]:
    """All tensors that a distribution holds, and those of its parts."""
    found: list[Tensor] = []
    for value in vars(distribution).values():
        inner = list(value.values()) if isinstance(value, dict) else [value]
        for item in inner:
            if isinstance(item, Tensor):
                found.append(item)
            elif hasattr(item, "__dict__"):
                found += _numbers(item)
    return found


CASES = [
    *[("binary", "mlp", (16, 8), activation) for activation in _ACTIVATIONS],
    *[("image", "conv", (4, 6, 10), activation) for activation in ("relu", "silu", "gelu")],
    *[(space, "residual", (8, 8), "silu") for space in SPACES if space != "image"],
    ("image", "mlp", (8, 8), "silu"),
]


@pytest.mark.parametrize(("space", "network", "hidden", "activation"), CASES)
def test_every_network_and_head_is_covered_to_the_last_kernel(
    space: str, network: str, hidden: tuple[int, ...], activation: str
) -> None:
    described, make = SPACES[space]
    module = randomised(Whole(described, network, hidden, activation))
    x, c = make(), torch.randn(9, 2)
    with torch.no_grad():
        z, y, distributions = module(x, c)
    net = exact.network(module)
    with exact.guard():
        ours = net(x, c)
    assert (ours[0] - z).abs().max() <= 0.1 * (1.0 + z.abs().max())
    assert (ours[1] - y).abs().max() <= 0.1 * (1.0 + y.abs().max())
    for one, two in zip(ours[2], distributions):
        for number, right in zip(_numbers(one), _numbers(two)):
            assert number.shape == right.shape and not torch.isnan(number).any()
    for batch in (1, 4):
        parts = [net(a, b) for a, b in zip(x.split(batch), c.split(batch))]
        assert same_bits(torch.cat([part[0] for part in parts]), ours[0])
        assert same_bits(torch.cat([part[1] for part in parts]), ours[1])
    net64 = exact.network(module, "exact64")
    with exact.guard():
        precise = net64(x, c)
    torch.testing.assert_close(precise[0].float(), z, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(precise[1].float(), y, rtol=1e-3, atol=1e-4)


def test_the_guard_refuses_what_it_should() -> None:
    x = torch.randn(3, 4)
    refused = [
        (lambda: x.exp(), "exp"),
        (lambda: x.sum(), "sums floats in less than float64"),
        (lambda: x.double().sum(), "not whole"),
        (lambda: x @ x.t(), "outside a certified one"),
        (lambda: torch.add(x, x, alpha=2), "in one step"),
        (lambda: torch.addcmul(x, x, x), "addcmul"),
        (lambda: x / 3.0, "by a Python number"),
        (lambda: x.sqrt(), "sqrt"),
        (lambda: torch.lerp(x, x, 0.5), "lerp"),
    ]
    for operation, reason in refused:
        with exact.guard(), pytest.raises(exact.Uncovered, match=reason):
            operation()
    with exact.guard() as seen:
        assert torch.equal((x * 2).round().double().sum(), (x * 2).round().double().sum())
        (x + x).clamp(0, 1) / x
    assert {"mul", "round", "sum", "add", "clamp", "div"} <= seen.seen


class Uses(nn.Module):
    """A composite with one operation of its own."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(self.inner(x))


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda x: x.cos(), "Tensor.cos: has no rule"),
        (lambda x: x.sum(1), "sums floats"),
        (lambda x: x.mean(1), "mean: has no rule"),
        (lambda x: x @ x.t(), "sums floats"),
        (lambda x: F.linear(x, x), "linear: has no rule"),
        (lambda x: x / 3.0, "by a Python number"),
        (lambda x: 1.0 / x, "a reciprocal and a product"),
        (lambda x: torch.add(x, x, alpha=0.3), "in one step"),
        (lambda x: torch.lerp(x, x, 0.5), "lerp: has no rule"),
        (lambda x: x**3, "power of 3"),
        (lambda x: F.dropout(x, 0.5, True), "dropout: has no rule"),
    ],
)
def test_an_operation_without_a_rule_is_named(operation: Callable[[Tensor], Tensor], message: str) -> None:
    net = exact.network(Uses(operation))
    with pytest.raises(exact.Uncovered, match=message):
        net(torch.randn(3, 4))


@pytest.mark.parametrize(
    "operation",
    [
        *(F.silu, F.relu, F.elu, F.softplus, torch.sigmoid, torch.tanh, Tensor.exp, torch.log1p, torch.asinh),
        *(lambda x: F.gelu(x, approximate="tanh"), lambda x: F.layer_norm(x, (4,)), lambda x: x / 4.0),
        *(lambda x: x.softmax(-1), lambda x: F.log_softmax(x, dim=1), lambda x: (x**2 + 1.0).sqrt()),
        lambda x: torch.where(x > 0, x.clamp(max=0.5), -x) / (x * x + 1.0),
    ],
)
def test_functions_of_a_composite_get_their_rules(operation: Callable[[Tensor], Tensor]) -> None:
    module = Uses(operation)
    x = torch.randn(5, 4).abs()
    nn.init.uniform_(module.inner.weight)
    net = exact.network(module)
    with exact.guard():
        y = net(x)
    torch.testing.assert_close(y, module(x), rtol=0.03, atol=0.03)


def test_a_layer_without_a_rule_is_named() -> None:
    for layer, name in (
        (nn.Sequential(nn.Identity(), nn.Bilinear(2, 2, 2)), r"Sequential\.1: no rule for Bilinear"),
        (nn.LSTM(3, 4), "LSTM: no rule for LSTM"),
        (nn.BatchNorm1d(3, track_running_stats=False), "depends on the batch"),
        (nn.Embedding(3, 4, max_norm=1.0), "max_norm"),
        (nn.Upsample(scale_factor=2, mode="bilinear"), "'bilinear'"),
    ):
        with pytest.raises(exact.Uncovered, match=name):
            exact.network(layer)

    class Other(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1.0

    with pytest.raises(exact.Uncovered, match="Other has a forward of its own"):
        exact.network(Other(2, 2))

    class Declared(Other):
        exact_as = nn.Linear

    exact.network(Declared(2, 2))

    class Replaced(Other):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.part = nn.Linear(2, 3)

        def exact_forward(self, x: Tensor) -> Tensor:
            return self.part(x)

    assert exact.network(Replaced())(torch.ones(1, 2)).shape == (1, 3)
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(exact.Uncovered, match="hooks"):
        exact.network(hooked)
    with pytest.raises(ValueError, match="profile: expected exact32 or exact64, got 'exact16'"):
        exact.network(nn.Linear(2, 2), "exact16")


def test_the_original_and_the_caller_stay_as_they_were() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 2)).train()
    before = copy.deepcopy(module.state_dict())
    state = torch.get_rng_state()
    torch.set_float32_matmul_precision("medium")
    try:
        net = exact.network(module)
        y = net(torch.ones(2, 3, requires_grad=True))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert module.training and not y.requires_grad and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    with torch.autocast("cpu", torch.bfloat16):
        assert same_bits(net(torch.ones(2, 3)), y)
    assert same_bits(net.to("cpu")(torch.ones(2, 3)), y) and net.to("cpu").probe() == net.probe()
    assert module[0].weight.requires_grad


def test_shared_layers_stay_shared_and_sequences_can_be_indexed() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.SiLU(), nn.Linear(4, 4))
            self.again = self.body[0]

        def forward(self, x: Tensor) -> Tensor:
            h = self.body[0](x)
            for layer in self.body:
                x = layer(x)
            return torch.cat([h, x, self.again(h)], 1)

    module = Twice()
    x = torch.randn(5, 4)
    torch.testing.assert_close(exact.network(module)(x), module(x), rtol=0.05, atol=0.05)


# The probe and the routes -------------------------------------------------------------------------------------------


def _network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(8, 12, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(12 * 36, 20))


def test_the_probe_tells_networks_apart_and_routes_not() -> None:
    net = exact.network(_network())
    assert len(net.probe()) == 8
    assert {exact.network(_network(), route=route).probe() for route in ROUTES} == {net.probe()}
    before, probe = net.routes, net.probe()
    net.reroute()
    assert all(route != before[name] for name, route in net.routes.items()) and net.probe() == probe
    other = _network()
    other[0].weight.data[0, 0, 0, 0] += 0.05
    assert exact.network(other).probe() != net.probe()
    assert exact.network(_network(), "exact64").probe() != net.probe()


def _reduced(y: Tensor) -> Tensor:
    return y.bfloat16().to(y.dtype) if y.dtype == torch.float32 else y


def _in_halves(x: Tensor, weight: Tensor) -> Tensor:
    """Partial sums that lose their last bits: an accumulator of 22 bits."""
    half = x.shape[-1] // 2
    a, b = (x[..., part] @ weight[:, part].t() for part in (slice(half), slice(half, None)))
    return ((a * 0.25).round() + (b * 0.25).round()) * 4.0


def test_a_machine_that_breaks_the_rules_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    net = exact.network(_network())
    x = torch.randn(3, 8, 6, 6)
    right, digest = net(x), net.probe()
    monkeypatch.setattr(products, "ONEDNN", False)
    plain_conv, plain_linear = F.conv2d, F.linear
    monkeypatch.setattr(F, "conv2d", lambda *args: _reduced(plain_conv(*args)))
    net = exact.network(_network())
    assert list(net.routes.values()) == ["shifted", "native"]
    assert same_bits(net(x), right) and net.probe() == digest
    monkeypatch.setattr(F, "linear", lambda x, w: _in_halves(x, w) if x.dtype == torch.float32 else plain_linear(x, w))
    net = exact.network(_network())
    assert list(net.routes.values()) == ["shifted", "float64"]
    assert same_bits(net(x), right) and net.probe() == digest
    monkeypatch.setattr(F, "linear", lambda x, w: plain_linear(x.bfloat16(), w.bfloat16()).to(x.dtype))
    with pytest.raises(exact.Irreproducible, match="wrong by route native and by float64"):
        exact.network(_network())


# Everywhere ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environments() -> dict[str, dict[str, dict[str, str]]]:
    """What :mod:`exact_environments` prints under different libraries' settings, by name."""
    script = Path(__file__).with_name("exact_environments.py")
    changes: dict[str, dict[str, str]] = {
        "as it is": {},
        "oldest": {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"},
        "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2"},
    }
    running = {
        name: subprocess.Popen(
            [sys.executable, str(script)],
            env={**os.environ, "OMP_NUM_THREADS": "1", **change},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name, change in changes.items()
    }
    found = {}
    for name, process in running.items():
        output, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        found[name] = json.loads(output)
    return found


@pytest.mark.parametrize("kind", ["exact32", "exact64", "exact32 probe", "exact64 probe"])
def test_the_bits_are_the_same_everywhere(kind: str, environments: dict[str, dict[str, dict[str, str]]]) -> None:
    of_network: dict[str, set[str]] = {}
    for results in environments.values():
        for setting, digest in results[kind].items():
            of_network.setdefault(setting.split(",")[0], set()).add(digest)
    assert len(of_network) == 6
    assert {name: len(digests) for name, digests in of_network.items()} == dict.fromkeys(of_network, 1)


def test_plain_float32_is_not_the_same_everywhere(environments: dict[str, dict[str, dict[str, str]]]) -> None:
    """The control: what the comparison would show if it could not tell."""
    digests: dict[str, set[str]] = {}
    for results in environments.values():
        for setting, digest in results["float32"].items():
            digests.setdefault(setting.split(",")[0], set()).add(digest)
    assert sum(len(found) > 1 for found in digests.values()) >= 3, digests
