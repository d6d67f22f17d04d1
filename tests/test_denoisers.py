"""Denoising networks against slow forms of themselves in float64, and what a diffusion model relies on."""

from __future__ import annotations

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from likely.networks import normconv, winograd
from likely.networks.conditioning import FineFeatures, LevelEmbedding
from likely.networks.denoisers import denoiser
from likely.networks.dit import DiT, TransformerBlock
from likely.networks.normconv import NormConv
from likely.networks.unet import Double, Halve, ResidualBlock, SelfAttention, Stage, UNet, attend

SMALL = {
    "mlp": {"width": 16, "depth": 2, "fourier": (0, 1)},
    "unet": {"width": 8, "depth": 1, "scales": (1, 2), "attention": (1,), "heads": 2, "fourier": (0, 1)},
    "dit": {"width": 16, "depth": 2, "heads": 2, "stem": 8, "fourier": (0, 1)},
}
SHAPES = {"mlp": (3,), "unet": (1, 6, 7), "dit": (1, 6, 7)}


def perturbed(network: nn.Module, scale: float = 0.2) -> nn.Module:
    """The network away from its start, where much of it is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return network


def small(name: str, context: int = 4) -> nn.Module:
    return perturbed(denoiser(name, SHAPES[name], context, **SMALL[name]))


def close(got: Tensor, expected: Tensor, error: float = 2e-5) -> None:
    got, expected = got.detach().double(), expected.detach().double()
    torch.testing.assert_close(got, expected, rtol=0.0, atol=error * float(expected.abs().max()) + 1e-12)


# Every network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape"),
    [("mlp", (2,)), ("mlp", (1, 8, 8)), *((name, s) for name in ("unet", "dit") for s in ((1, 8, 8), (3, 9, 6)))],
)
def test_it_keeps_the_shape_and_starts_at_zero(name: str, shape: tuple[int, ...]) -> None:
    network = denoiser(name, shape, 3, **SMALL[name])
    out = network(torch.randn(5, *shape), torch.rand(5), torch.randn(5, 3))
    assert out.shape == (5, *shape)
    assert torch.equal(out, torch.zeros_like(out))


@pytest.mark.parametrize("name", SMALL)
def test_input_level_and_context_all_count_and_every_parameter_learns(name: str) -> None:
    network = small(name)
    z, level, context = torch.randn(4, *SHAPES[name]), torch.rand(4), torch.randn(4, 4)
    out = network(z, level, context)
    for other in (network(z + 0.1, level, context), network(z, level + 0.01, context), network(z, level, context + 1)):
        assert (other - out).flatten(1).abs().amax(1).min() > 1e-4
    out.square().sum().backward()
    still = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not still


@pytest.mark.parametrize("name", SMALL)
def test_an_example_does_not_see_its_neighbours(name: str) -> None:
    network = small(name).double()
    z, level, context = torch.randn(3, *SHAPES[name]).double(), torch.rand(3).double(), torch.randn(3, 4).double()
    out = network(z, level, context)
    for i in range(3):
        close(out[i], network(z[i : i + 1], level[i : i + 1], context[i : i + 1])[0], 1e-12)


@pytest.mark.parametrize("name", SMALL)
def test_derivatives_of_both_orders(name: str) -> None:
    """Score matching differentiates the divergence of the output."""
    network = small(name, 0).double()
    z = torch.randn(1, *SHAPES[name], dtype=torch.float64, requires_grad=True)
    direction = torch.randn(z.shape, dtype=torch.float64)
    level = torch.tensor([0.4], dtype=torch.float64)

    def rate(at: Tensor) -> Tensor:
        """vᵀ J v by reverse mode."""
        (gradient,) = torch.autograd.grad((network(at, level) * direction).sum(), at, create_graph=True)
        return (gradient * direction).sum()

    h = 1e-5
    with torch.no_grad():
        ends = [network(z + sign * h * direction, level) for sign in (1, -1)]
    assert rate(z).item() == pytest.approx(float(((ends[0] - ends[1]) * direction).sum() / (2 * h)), rel=1e-5)
    (second,) = torch.autograd.grad(rate(z), z)
    ahead, behind = (rate(z + sign * h * direction).item() for sign in (1, -1))
    assert float((second * direction).sum()) == pytest.approx((ahead - behind) / (2 * h), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", SMALL)
def test_half_precision_inside_full_precision_outside(name: str) -> None:
    network = small(name)
    z, level, context = torch.randn(2, *SHAPES[name]), torch.rand(2), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(z, level, context)
    assert out.dtype == torch.float32
    close(out, network(z, level, context), 0.05)


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_compilation_sees_one_graph(monkeypatch, name: str) -> None:
    monkeypatch.setattr(normconv, "LARGE", 0)
    network = small(name, 0)
    z, level = torch.randn(2, *SHAPES[name]), torch.rand(2)
    close(torch.compile(network, backend="eager", fullgraph=True)(z, level), network(z, level))


def test_dropout_only_in_training() -> None:
    for name in SMALL:
        network = perturbed(denoiser(name, SHAPES[name], 0, **SMALL[name], dropout=0.5))
        z, level = torch.randn(2, *SHAPES[name]), torch.rand(2)
        assert not torch.equal(network(z, level), network(z, level))
        network.eval()
        assert torch.equal(network(z, level), network(z, level))


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("unett", (1, 8, 8)), {}, "expected one of mlp, unet, dit, got 'unett'"),
        (("unet", (3,)), {}, r"examples of shape \(channels, height, width\), got \(3,\)"),
        (("dit", (3,)), {}, r"examples of shape \(channels, height, width\), got \(3,\)"),
        (("unet", (1, 8, 8)), {"widht": 3}, "no option 'widht'; did you mean 'width'"),
        (("unet", (1, 3, 8)), {"scales": (1, 1, 1)}, "images of 3 x 8 cannot be halved 2 times"),
        (("unet", (1, 8, 8)), {"attention": (1,)}, r"attention: expected numbers from 0 to 0, got \(1,\)"),
        (("dit", (1, 8, 8)), {"width": 10, "heads": 4}, "heads: expected a divisor of the width 10, got 4"),
        (("mlp", (3,)), {"fourier": (3, 1)}, r"fourier: expected \(first, last\)"),
    ],
)
def test_what_it_refuses(arguments, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        denoiser(*arguments, **options)


def test_a_context_of_another_width_is_refused() -> None:
    network = small("mlp")
    with pytest.raises(ValueError, match="context: expected width 4, got 0"):
        network(torch.zeros(1, 3), torch.zeros(1))


# Conditioning ----------------------------------------------------------------------------------------------------


def test_level_embedding_against_its_formula() -> None:
    module = LevelEmbedding(width=6, context_width=2, waves=8).double()
    level, context = torch.rand(5, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)
    angle = 1000 * level.numpy()[:, None] * 10000.0 ** (-np.arange(4) / 3)
    x = np.concatenate([np.sin(angle), np.cos(angle), context.numpy()], 1)
    for layer in (module.first, module.second):
        y = x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()
        x = y / (1 + np.exp(-y))
    close(module(level, context), torch.from_numpy(x), 1e-5)  # the frequencies are rounded to float32


def test_fine_features_tell_neighbouring_levels_apart() -> None:
    values = (2 * (torch.arange(256) + 0.5) / 256 - 1).reshape(-1, 1)
    last, before = FineFeatures((6, 7))(values)[:, [2, 1]].unbind(1)  # sines of n = 7 and n = 6
    assert torch.allclose(last.abs(), torch.zeros(256), atol=1e-3) or (last[:-1] * last[1:] < 0).all()
    pairs = torch.stack([before, FineFeatures((6, 7))(values)[:, 3]], 1)
    assert (pairs[:-1] - pairs[1:]).norm(dim=1).min() > 1.0  # n = 6 turns by a quarter or more from level to level
    expected = np.concatenate(
        [values.numpy(), *(f(2 * np.pi * 2.0**n * values.double().numpy()) for f in (np.sin, np.cos) for n in (6, 7))],
        1,
    )
    close(FineFeatures((6, 7))(values), torch.from_numpy(expected), 1e-4)


# Convolution -----------------------------------------------------------------------------------------------------


def test_fewer_multiplications_are_exact_in_rational_arithmetic() -> None:
    """Aᵀ[(G g) ⊙ (B d)] is the correlation of six values with three taps, for all of them: it is bilinear."""
    third = [[Fraction(value).limit_denominator(24) for value in row] for row in winograd.G]
    for tap in range(3):
        for place in range(6):
            products = [third[j][tap] * winograd.B[j][place] for j in range(6)]
            y = [sum(winograd.A[i][j] * products[j] for j in range(6)) for i in range(4)]
            assert y == [int(place == i + tap) for i in range(4)], (tap, place)


def test_convolution_with_fewer_multiplications() -> None:
    x = torch.randn(2, 12, 5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1)
    padded = F.pad(x.detach(), (0, 0, 0, 0, 1, 1))
    got, v, u = winograd.convolve(padded, weight.detach())
    close(got, y, 1e-13)
    gradient = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, weight), gradient)
    for got, wanted in zip(winograd.convolve_backward(gradient.contiguous(), v, u), expected):
        close(got, wanted, 1e-13)


def slow_norm_conv(layer: NormConv, x: Tensor, skip, shift, residual) -> Tensor:
    """Of PyTorch's own functions, channels first, for a layer in float64."""
    joined = (x if skip is None else torch.cat([x, skip], 3)).double().permute(0, 3, 1, 2)
    if shift is not None:
        joined = joined + shift.double()[:, :, None, None]
    hidden = F.group_norm(joined, layer.groups, layer.gain, layer.offset, eps=1e-5)
    y = F.conv2d(hidden * torch.sigmoid(hidden), layer.weight, layer.bias, padding=1).permute(0, 2, 3, 1)
    return y if residual is None else y + residual.double()


@pytest.mark.parametrize(
    ("height", "channels", "skipped", "out", "shifted", "residual"),
    [
        (8, 64, 0, 32, True, True),
        (8, 48, 24, 40, False, True),
        (7, 36, 0, 34, True, False),
        (4, 12, 0, 3, False, False),
    ],
    ids=["fewer multiplications", "two maps, groups across them", "odd height", "few channels"],
)
@pytest.mark.parametrize("lean", [True, False])
def test_norm_and_convolution_against_plain_layers(
    monkeypatch, lean, height, channels, skipped, out, shifted, residual
) -> None:
    monkeypatch.setattr(normconv, "LARGE", 0 if lean else 1 << 60)
    layer = perturbed(NormConv(channels + skipped, out, groups=8))
    x = (torch.randn(3, height, 5, channels) + 0.5).requires_grad_()
    skip = torch.randn(3, height, 5, skipped, requires_grad=True) if skipped else None
    shift = torch.randn(3, channels + skipped, requires_grad=True) if shifted else None
    added = torch.randn(3, height, 5, out, requires_grad=True) if residual else None
    inputs = [part for part in (x, skip, shift, added) if part is not None]
    y = layer(x, skip, shift, added)
    assert (type(y.grad_fn).__name__ == "_LeanBackward") == lean
    slow = copy.deepcopy(layer).double()
    expected = slow_norm_conv(slow, x, skip, shift, added)
    close(y, expected)
    direction = torch.randn_like(y)
    got = torch.autograd.grad(y, [*inputs, *layer.parameters()], direction)
    wanted = torch.autograd.grad(expected, [*inputs, *slow.parameters()], direction.double())
    for a, b in zip(got, wanted):
        close(a, b)


def test_derivative_of_the_derivative_of_the_lean_form(monkeypatch) -> None:
    layer = perturbed(NormConv(32, 32, groups=8))
    x = torch.randn(2, 4, 3, 32)
    found = []
    for large in (0, 1 << 60):
        monkeypatch.setattr(normconv, "LARGE", large)
        at = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(layer(at).tanh().sum(), at, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [at, layer.weight, layer.gain]))
    for a, b in zip(*found):
        close(a, b, 1e-4)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # PyTorch's own use of it
def test_where_the_lean_form_has_no_rules(monkeypatch) -> None:
    monkeypatch.setattr(normconv, "LARGE", 0)
    layer = perturbed(NormConv(8, 8))
    x = torch.randn(3, 4, 4, 8)
    expected = layer(x)
    close(torch.func.vmap(lambda one: layer(one.unsqueeze(0)).squeeze(0))(x), expected)
    h, direction = 1e-2, torch.randn_like(x)
    slope = (layer(x + h * direction) - layer(x - h * direction)) / (2 * h)
    close(torch.func.jvp(layer, (x,), (direction,))[1], slope, 1e-2)


def test_doubling_is_repetition_and_convolution() -> None:
    layer, x = perturbed(Double(4)).double(), torch.randn(2, 3, 5, 4, dtype=torch.float64)
    repeated = F.interpolate(x.permute(0, 3, 1, 2), scale_factor=2, mode="nearest")
    expected = F.conv2d(repeated, layer.convolution.weight, layer.convolution.bias, padding=1)
    close(layer(x), expected.permute(0, 2, 3, 1), 1e-13)


# The U-Net -------------------------------------------------------------------------------------------------------


def slow_unet(network: UNet, z: Tensor, level: Tensor, context: Tensor | None = None) -> Tensor:
    """The U-Net as its paper draws it: every block shifts its own input, skips are joined, channels are first."""
    shifts = list(network.shift(network.embedding(level, context)).split(network.widths, 1))

    def first(h: Tensor) -> Tensor:
        return h.permute(0, 3, 1, 2)

    def last(h: Tensor) -> Tensor:
        return h.permute(0, 2, 3, 1)

    def convolved(layer: NormConv, h: Tensor) -> Tensor:
        hidden = F.silu(F.group_norm(h, layer.groups, layer.gain, layer.offset))
        return F.conv2d(hidden, layer.weight, layer.bias, padding=1)

    def stage(module: Stage, h: Tensor) -> Tensor:
        block = module.block
        y = convolved(block.first, h) + shifts.pop(0)[:, :, None, None]
        straight = h if block.shortcut is None else first(block.shortcut(last(h)))
        h = straight + convolved(block.second, y)
        if module.attention is None:
            return h
        tokens = F.group_norm(h, module.attention.groups, module.attention.gain, module.attention.offset)
        heads = module.attention.heads
        q, k, v = module.attention.qkv(last(tokens).flatten(1, 2)).chunk(3, 2)
        mixed = []
        for a, b, c in zip(q.chunk(heads, 2), k.chunk(heads, 2), v.chunk(heads, 2)):
            mixed.append(torch.softmax(a @ b.transpose(1, 2) / a.shape[2] ** 0.5, 2) @ c)
        y = module.attention.output(torch.cat(mixed, 2))
        return h + first(y.unflatten(1, h.shape[2:]))

    h = network.input(network.fine(z))
    skips = [h]
    for module in network.down:
        h = stage(module, h) if isinstance(module, Stage) else module.convolution(h)
        skips.append(h)
    for module in network.middle:
        h = stage(module, h)
    for module in network.up:
        if isinstance(module, Stage):
            h = stage(module, torch.cat([h, skips.pop()], 1))
        else:
            h = module.convolution(F.interpolate(h, scale_factor=2))[:, :, : skips[-1].shape[2], : skips[-1].shape[3]]
    return convolved(network.output, h)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 7)])
def test_unet_against_a_slow_one(shape) -> None:
    network = perturbed(denoiser("unet", shape, 2, **SMALL["unet"])).double()
    z, level, context = torch.randn(2, *shape).double(), torch.rand(2).double(), torch.randn(2, 2).double()
    close(network(z, level, context), slow_unet(network, z, level, context), 1e-11)


def test_attention_does_not_know_places() -> None:
    layer = perturbed(SelfAttention(8, heads=2, groups=4)).double()
    x, order = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randperm(12)
    shuffled = x.flatten(1, 2)[:, order].view(x.shape)
    close(layer(shuffled), layer(x).flatten(1, 2)[:, order].view(x.shape), 1e-12)


def test_both_forms_of_attention_agree() -> None:
    q, k, v = torch.randn(3, 2, 2, 300, 4, dtype=torch.float64).unbind(0)
    for tokens in (200, 300):
        few = [part[:, :, :tokens] for part in (q, k, v)]
        close(attend(*few), torch.softmax(few[0] @ few[1].transpose(2, 3) / 2.0, 3) @ few[2], 1e-12)


def test_resolutions_of_a_unet() -> None:
    """Without down-sampling every block works at full resolution; with it, each scale halves that of the last."""
    for scales, heights in (((1,), [8]), ((1, 2), [4, 8]), ((1, 1, 1), [2, 4, 8])):
        network = denoiser("unet", (1, 8, 8), width=4, depth=2, scales=scales)
        seen: set[int] = set()
        for module in network.modules():
            if isinstance(module, ResidualBlock):
                module.register_forward_hook(lambda module, given, y, seen=seen: seen.add(y.shape[1]))
        network(torch.zeros(1, 1, 8, 8), torch.zeros(1))
        assert sorted(seen) == heights
        assert sum(isinstance(m, Halve) for m in network.modules()) == len(scales) - 1
        assert sum(isinstance(m, ResidualBlock) for m in network.modules()) == len(scales) * 5 + 2


# The transformer -------------------------------------------------------------------------------------------------


def test_tokens_are_squares_of_pixels() -> None:
    network = DiT((1, 6, 4), width=8, depth=1, heads=2, stem=3, patch=2)
    maps = torch.arange(2 * 6 * 4 * 3.0).view(2, 6, 4, 3)
    tokens = network._to_tokens(maps)
    assert torch.equal(tokens[1, 3].view(2, 2, 3), maps[1, 2:4, 2:4])
    assert torch.equal(network._from_tokens(tokens), maps)


def test_transformer_block_against_its_formula() -> None:
    block = perturbed(TransformerBlock(8, heads=2, dropout=0.0)).double()
    h, modulation = torch.randn(2, 5, 8, dtype=torch.float64), torch.randn(6, 2, 1, 8, dtype=torch.float64)
    scale1, shift1, gate1, scale2, shift2, gate2 = modulation

    def norm(x: Tensor) -> Tensor:
        centred = x - x.mean(2, keepdim=True)
        return centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()

    q, k, v = block.qkv(norm(h) * (1 + scale1) + shift1).chunk(3, 2)
    heads = [
        torch.softmax(q[..., s] @ k[..., s].transpose(1, 2) / 2.0, 2) @ v[..., s] for s in (slice(0, 4), slice(4, 8))
    ]
    expected = h + gate1 * block.mix(torch.cat(heads, 2))
    hidden = F.gelu(block.first(norm(expected) * (1 + scale2) + shift2), approximate="tanh")
    expected = expected + gate2 * block.second(hidden)
    close(block(h, *modulation), expected, 1e-12)


def test_blocks_of_the_transformer_are_the_identity_at_first() -> None:
    network = DiT((1, 4, 4), width=8, depth=2, heads=2, stem=4)
    h = torch.randn(2, 4, 8)
    modulations = network.modulation(torch.randn(2, 8)).unsqueeze(1).chunk(14, 2)
    for number, block in enumerate(network.blocks):
        assert torch.equal(block(h, *modulations[6 * number : 6 * number + 6]), h)
