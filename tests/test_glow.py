"""Glow and its parts: volumes against autograd, exact inverses, what temperature and paths mean, dequantisation."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch import Tensor

import likely
from likely.bijections import Affine
from likely.bijections.multiscale import ChannelCoupling, GaussianPrior, MultiScale, Squeeze, level_shapes
from likely.contract import Binary, Bound, Column, Counts, Integers, Model, NoCodec, Reals, Space, Table, Unsupported
from likely.data import Dataset, Dequantise, Preprocessed
from likely.evaluation import attribute_direction, interpolate, move_along
from likely.models.dequantised import Dequantised
from likely.models.glow import Glow, GlowStep
from likely.networks.coupling import CouplingNetwork
from likely.noise import KeyedNoise, StreamNoise, TemperedNoise, content_keys

ROOT = Path(__file__).parent.parent


def stream(seed: int) -> StreamNoise:
    return StreamNoise(torch.Generator().manual_seed(seed))


def shaken(module: torch.nn.Module, size: float = 0.2) -> torch.nn.Module:
    """The module in float64 with every weight moved, so that every one matters, and fixed."""
    generator = torch.Generator().manual_seed(3)
    module = module.double().requires_grad_(False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def images(shape: tuple[int, ...], n: int = 3) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def log_det_by_autograd(function, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """log |det| of the Jacobian of ``function`` (one example to one example) at each example."""
    found = []
    for row in x:
        jacobian = torch.autograd.functional.jacobian(lambda v: function(v[None])[0].flatten(), row)
        found.append(torch.linalg.slogdet(jacobian.reshape(row.numel(), row.numel()))[1])
    return torch.stack(found)


# Bijections ------------------------------------------------------------------------------------------------------

BIJECTIONS = {
    "squeeze": (Squeeze, (2, 4, 6), None),
    "coupling": (lambda: ChannelCoupling(3, Affine(), 6), (3, 2, 3), None),
    "coupling given a vector": (lambda: ChannelCoupling(4, Affine(), 6, 2), (4, 2, 2), (2,)),
    "coupling given a map": (lambda: ChannelCoupling(4, Affine(), 6, 2), (4, 2, 2), (2, 2, 2)),
    "step": (lambda: GlowStep(4, 6), (4, 2, 3), None),
    "step, additive, plain": (lambda: GlowStep(3, 6, 2, additive=True, plain=True), (3, 2, 2), (2,)),
    "two scales": (lambda: MultiScale((1, 4, 4), [GlowStep(4, 6), GlowStep(8, 6)]), (1, 4, 4), None),
    "three scales, odd sizes": (
        lambda: MultiScale((3, 2, 3), [GlowStep(3, 6, 2), GlowStep(2, 6, 2)], 2),
        (3, 2, 3),
        (2,),
    ),
}


@pytest.mark.parametrize("name", BIJECTIONS)
def test_volume_is_that_of_autograd_and_the_inverse_is_one(name: str) -> None:
    build, shape, context_shape = BIJECTIONS[name]
    torch.manual_seed(0)
    bijection, x = shaken(build()), images(shape)
    context = None if context_shape is None else images(context_shape)
    z, log_det = bijection(x, context)
    back, inverse_log_det = bijection.inverse(z, context)
    torch.testing.assert_close(back, x, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-9, atol=1e-9)
    for i in range(len(x)):
        given = None if context is None else context[i : i + 1]
        expected = log_det_by_autograd(lambda v, c=given: bijection(v, c), x[i : i + 1])
        torch.testing.assert_close(log_det[i : i + 1], expected, rtol=1e-8, atol=1e-8)


def test_a_step_is_actnorm_then_convolution_then_coupling() -> None:
    torch.manual_seed(0)
    step, x = shaken(GlowStep(4, 6)), images((4, 2, 2))
    y, total = x, torch.zeros(3, dtype=torch.float64)
    for part in (step.norm, step.mixing, step.coupling):
        y, log_det = part(y)
        total = total + log_det
    z, log_det = step(x)
    torch.testing.assert_close(z, y)
    torch.testing.assert_close(log_det, total)


def test_squeeze_keeps_every_block_of_two_by_two_pixels_together() -> None:
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    z, _ = Squeeze()(x)
    assert z.shape == (1, 4, 2, 3)
    assert z[0, :, 1, 2].tolist() == [16.0, 17.0, 22.0, 23.0]
    with pytest.raises(ValueError, match=r"expected an even height and width, got \(3, 4\)"):
        Squeeze()(torch.zeros(1, 1, 3, 4))


def test_the_splits_prior_is_the_normal_law_it_says() -> None:
    prior = shaken(GaussianPrior(2, given=3), 0.5)
    y, given = images((2, 2, 2)), images((3, 2, 2), 4)[1:]
    z, log_det = prior(y, given)
    found = norm.logpdf(z.detach().numpy()).sum((1, 2, 3)) + log_det.detach().numpy()
    mean, raw = prior.given(given).detach().chunk(2, 1)
    scale = torch.exp(7.0 * torch.tanh(raw / 7.0))
    np.testing.assert_allclose(found, norm.logpdf(y, mean, scale).sum((1, 2, 3)), rtol=1e-12)


def test_shapes_of_levels() -> None:
    assert level_shapes((3, 32, 32), 3) == [(12, 16, 16), (24, 8, 8), (48, 4, 4)]
    assert level_shapes((1, 28, 28), 3) == [(4, 14, 14), (8, 7, 7), (4, 7, 7)]
    with pytest.raises(ValueError, match="level 1 of 1 has a single channel of 5 × 5 pixels"):
        level_shapes((1, 5, 5), 1)


# The model -------------------------------------------------------------------------------------------------------


def tiny_glow(shape: tuple[int, ...] = (1, 4, 4), condition: Space | None = None, **options: object) -> Glow:
    torch.manual_seed(0)
    model = Glow(Reals(shape), condition, **{"levels": 2, "depth": 2, "width": 8, **options})  # type: ignore[arg-type]
    return model.requires_grad_(False)


@pytest.mark.parametrize("options", [{}, {"coupling": "additive"}, {"convolution": "plain"}], ids=str)
def test_density_is_the_base_law_times_the_volume(options: dict[str, str]) -> None:
    model, x = shaken(tiny_glow(**options)), images((1, 4, 4))
    z = model.encode(x)
    expected = norm.logpdf(z.detach().numpy()).sum(1) + log_det_by_autograd(model.bijection, x).numpy()
    np.testing.assert_allclose(model.bound(x).nats.detach().numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float64, 1e-12)])
def test_decoding_inverts_encoding(dtype: torch.dtype, tolerance: float) -> None:
    x = (256 * torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))).to(dtype)
    model = tiny_glow((3, 16, 16), levels=3, depth=8, width=16).to(dtype)
    model.initialise([(x, None)])
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator).to(dtype))
    again = model.decode(model.encode(x))
    assert float((again - x).abs().max()) < 256 * tolerance


def test_the_first_batch_comes_out_standard_and_a_linear_glow_is_a_normal_law() -> None:
    """Before training couplings and priors are the identity: only ActNorm and rotations act."""
    x = 5.0 + 3.0 * images((2, 4, 4), 200)
    model = tiny_glow((2, 4, 4)).double()
    model.initialise([(x[:100], None), (x[100:], None)])
    z = model.encode(x)
    assert abs(float(z.mean())) < 0.05
    assert abs(float(z.std()) - 1.0) < 0.05
    origin = torch.zeros(1, 32, dtype=torch.float64)
    mean = model.decode(origin)[0].flatten()
    columns = [model.decode(row[None])[0].flatten() - mean for row in torch.eye(32, dtype=torch.float64)]
    factor = torch.stack(columns, 1).detach()
    law = multivariate_normal(mean.detach().numpy(), (factor @ factor.t()).numpy())
    np.testing.assert_allclose(model.bound(x[:5]).nats.detach(), law.logpdf(x[:5].flatten(1)), rtol=1e-9)


def test_a_coupling_starts_as_the_identity() -> None:
    x = images((4, 4, 4))
    z, log_det = ChannelCoupling(4, Affine(), 16).double().requires_grad_(False)(x)
    assert torch.equal(z, x)
    assert float(log_det.abs().max()) == 0.0


def network_and_maps(context: str) -> tuple[CouplingNetwork, list[Tensor]]:
    """A coupling network in float32, and for 33 examples, too many to be taken at a time, its input and context."""
    torch.manual_seed(0)
    network = CouplingNetwork(2, 4, 64, 0 if context == "none" else 3)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    shapes = {"none": [], "vector": [(33, 3)], "map": [(33, 3, 23, 24)]}[context]
    return network, [torch.randn(shape, requires_grad=True) for shape in ((33, 2, 23, 24), *shapes)]


@pytest.mark.parametrize("context", ["none", "vector", "map"])
def test_a_coupling_network_a_few_examples_at_a_time(context: str) -> None:
    network, maps = network_and_maps(context)
    y = network(*maps)
    assert type(y.grad_fn).__name__ == "_LeanBackward"
    direction = torch.randn(y.shape)
    found = [y.detach(), *torch.autograd.grad((y * direction).sum(), [*maps, *network.parameters()])]
    network.double()
    maps = [part.detach().double().requires_grad_() for part in maps]
    y = network(*maps)
    assert type(y.grad_fn).__name__ == "ConvolutionBackward0"
    expected = [y.detach(), *torch.autograd.grad((y * direction).sum(), [*maps, *network.parameters()])]
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_a_coupling_network_that_is_fixed_gives_the_derivative_by_its_input_alone() -> None:
    network, (x,) = network_and_maps("none")
    expected = torch.autograd.grad(network(x).square().sum(), x)[0]
    network.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(network(x).square().sum(), x)[0], expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # PyTorch's own use of it
def test_derivatives_of_derivatives_and_forward_ones_of_a_coupling_network() -> None:
    network, (x,) = network_and_maps("none")

    def slope_of_slope(x: Tensor, *parameters: Tensor) -> list[Tensor]:
        slope = torch.autograd.grad(network(x).pow(3).sum(), x, create_graph=True)[0]
        return list(torch.autograd.grad(slope.square().sum(), [x, *parameters]))

    found = slope_of_slope(x, *network.first.parameters(), network.last.weight)
    tangent = torch.ones_like(x)
    forward = torch.func.jvp(network, (x,), (tangent,))[1]
    network.double()
    x = x.detach().double().requires_grad_()
    expected = slope_of_slope(x, *network.first.parameters(), network.last.weight)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    torch.testing.assert_close(
        forward.double(), torch.func.jvp(network, (x,), (tangent.double(),))[1], rtol=1e-4, atol=1e-5
    )


def test_reduced_temperature_scales_the_latent_vector() -> None:
    model = shaken(tiny_glow())
    z = 0.7 * stream(5).normal((6, 16))
    drawn = model.sample(6, None, TemperedNoise(stream(5), 0.7))
    torch.testing.assert_close(drawn, model.decode(z.double()))
    frozen = model.sample(6, None, TemperedNoise(stream(5), 0.0))
    assert float((frozen - frozen[:1]).abs().max()) == 0.0
    assert torch.equal(model.sample(6, None, TemperedNoise(stream(5), 1.0)), model.sample(6, None, stream(5)))
    with pytest.raises(ValueError, match="temperature: expected a number from 0 up, got -1"):
        TemperedNoise(stream(0), -1)


def test_a_path_ends_at_the_examples_and_a_direction_adds_the_difference_of_means() -> None:
    model, x = shaken(tiny_glow()), images((1, 4, 4), 8)
    path = interpolate(model, x[:4], x[4:], steps=5)
    assert path.shape == (5, 4, 1, 4, 4)
    torch.testing.assert_close(path[0], x[:4])
    torch.testing.assert_close(path[-1], x[4:])
    middle = model.decode(0.5 * (model.encode(x[:4]) + model.encode(x[4:])))
    torch.testing.assert_close(path[2], middle)
    sets = [Dataset(Reals((1, 4, 4)), half) for half in (x[:4], x[4:])]
    direction = attribute_direction(model, *sets, batch_size=3)
    expected = model.encode(x[:4]).mean(0) - model.encode(x[4:]).mean(0)
    torch.testing.assert_close(direction, expected.detach())
    moved = move_along(model, x[:2], direction, [0.0, 1.0])
    torch.testing.assert_close(moved[0], x[:2])
    torch.testing.assert_close(model.encode(moved[1]), model.encode(x[:2]) + direction)


def test_paths_need_two_points_and_a_latent_space() -> None:
    class Coins(Model):
        """No latent variables."""

        spaces = (Binary,)

        def bound(self, x, condition=None, noise=None):  # type: ignore[no-untyped-def]
            return Bound("exact", {"coins": torch.zeros(len(x))})

    with pytest.raises(ValueError, match="steps: expected at least 2, got 1"):
        interpolate(tiny_glow(), torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), steps=1)
    with pytest.raises(Unsupported, match="no latent variables to encode"):
        interpolate(Coins(Binary((2,))), torch.zeros(1, 2), torch.zeros(1, 2))


def test_the_label_moves_density_and_samples_of_every_level() -> None:
    label = Integers((1,), 3)
    model = shaken(tiny_glow((1, 4, 4), label))
    x = images((1, 4, 4), 2)
    nats = torch.stack([model.bound(x, torch.full((2, 1), k)).nats for k in range(3)])
    assert (nats.std(0) > 1e-3).all()
    drawn = [model.sample(4, torch.full((4, 1), k), stream(0)) for k in range(2)]
    assert float((drawn[0] - drawn[1]).abs().min()) > 0
    with pytest.raises(ValueError, match="this model was built with a condition"):
        model.bound(x)


def test_half_precision_networks_leave_the_linear_maps_alone() -> None:
    """Under bfloat16 autocast the density is that of slightly other networks, not of rounded pixels."""
    x = 256 * torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = tiny_glow((3, 8, 8), depth=4)
    model.initialise([(x, None)])
    with torch.autocast("cpu", torch.bfloat16):
        half = model.bound(x).nats
    torch.testing.assert_close(half, model.bound(x).nats, rtol=1e-6, atol=1e-3)  # couplings are the identity still


def test_what_glow_refuses() -> None:
    with pytest.raises(Unsupported, match=r"expected images of shape .* got \(4,\)"):
        Glow(Reals((4,)))
    with pytest.raises(Unsupported, match="level 2 of 2 has a single channel"):
        Glow(Reals((2, 1, 1)), levels=2)
    with pytest.raises(Unsupported, match="missing cells"):
        Glow(Reals((1, 4, 4), missing=True))
    for option in ({"coupling": "cubic"}, {"convolution": "qr"}, {"depth": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(option))}.*: expected .* got"):
            Glow(Reals((1, 4, 4)), **option)  # type: ignore[arg-type]


# Dequantisation --------------------------------------------------------------------------------------------------


class Standard(Model):
    """N(0, s² I)."""

    spaces = (Reals,)

    def __init__(self, space: Space, *, scale: float = 1.5) -> None:
        super().__init__(space)
        self.scale = scale
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def bound(self, x, condition=None, noise=None):  # type: ignore[no-untyped-def]
        law = torch.distributions.Normal(0.0, self.scale)
        return Bound("exact", {"normal": law.log_prob(x).flatten(1).sum(1) + 0.0 * self.unused})


SPACES = [Binary((2, 3)), Integers((1, 4, 4), 5), Counts((3,)), Integers((3, 3, 3), 4)]


def batch(space: Space, n: int = 5) -> Tensor:
    levels = {Binary: 2, Counts: 9}.get(type(space), getattr(space, "levels", 2))
    return torch.randint(levels, (n, *space.shape), generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_it_starts_as_uniform_dequantisation(space: Space) -> None:
    """With the networks of q at zero, u = Φ(ε): the bound is that of uniform noise, draw by draw."""
    torch.manual_seed(0)
    model, x = Dequantised(space, flow=Standard(Reals(space.shape))).double().requires_grad_(False), batch(space)
    u = torch.special.ndtr(KeyedNoise(0, content_keys(x)).normal((5, space.dims)).double()).reshape(x.shape)
    y, gain = model.dequantise(x, KeyedNoise(0, content_keys(x)))
    if len(space.shape) == 3:  # the cells of an image are in another order in q's base
        assert float(gain.abs().max()) < 1e-9
        assert bool(((y >= x) & (y < x + 1)).all())
        return
    torch.testing.assert_close(y, x + u)
    torch.testing.assert_close(gain, torch.zeros_like(gain), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "space", [*SPACES[:3], Table(columns=(Column("a", "real", resolution=0.5), Column("b", "real")))]
)
def test_the_law_of_the_noise_has_the_density_it_says(space: Space) -> None:
    """−log q(u | x) + D log r against the Jacobian of ε ↦ y by autograd."""
    torch.manual_seed(0)
    model = shaken(Dequantised(space, flow=Standard(Reals(space.shape)), depth=2, width=8), 0.1)
    x = batch(space, 1) * (0.5 if isinstance(space, Table) else 1.0)
    cells = len(model.discrete)

    class Given:
        def __init__(self, eps: Tensor) -> None:
            self.eps = eps

        def normal(self, shape: tuple[int, ...]) -> Tensor:
            return self.eps

    eps = stream(4).normal((1, cells)).double()
    _, gain = model.dequantise(x, Given(eps))
    jacobian = torch.autograd.functional.jacobian(
        lambda e: model.dequantise(x, Given(e[None]))[0].flatten()[model.discrete], eps[0]
    )
    log_q_of_y = norm.logpdf(eps.numpy()).sum() - torch.linalg.slogdet(jacobian)[1]
    assert float(gain) == pytest.approx(-float(log_q_of_y), abs=1e-8), f"{float(gain)}, not {-float(log_q_of_y)}"


def test_it_is_a_bound_and_a_trained_law_of_the_noise_tightens_it() -> None:
    """P(x) of a normal law that is rounded down is a difference of two values of Φ."""
    space, scale = Integers((2,), 4), 0.7
    torch.manual_seed(0)
    model = Dequantised(space, flow=Standard(Reals((2,)), scale=scale), depth=2, width=16)
    states = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))[:4]
    p = torch.tensor(norm.cdf(states + 1, scale=scale) - norm.cdf(states, scale=scale)).log().sum(1)
    x = states.repeat(256, 1)

    def gap() -> float:
        return float((p - model.bound(x, None, stream(9)).nats.detach().reshape(256, 4).mean(0)).mean())

    before = gap()
    optimiser = torch.optim.Adam([q for q in model.parameters() if q is not model.model.unused], lr=2e-2)
    for step in range(80):
        optimiser.zero_grad()
        model.loss(x[:128], None, stream(step)).value.backward()
        optimiser.step()
    after = gap()
    assert before > 0.1
    assert -0.01 < after < 0.25 * before


def test_dequantised_table_leaves_a_continuum_alone() -> None:
    table = Table(columns=(Column("grid", "real", resolution=0.5), Column("free", "real")))
    model = shaken(Dequantised(table, flow=Standard(Reals((2,))), depth=1, width=8))
    x = torch.tensor([[1.5, 0.123], [-2.0, 7.7]], dtype=torch.float64)
    y, _ = model.dequantise(x, stream(0))
    assert torch.equal(y[:, 1], x[:, 1])
    assert bool(((y[:, 0] > x[:, 0]) & (y[:, 0] < x[:, 0] + 0.5)).all())
    assert torch.equal(model.bins.inverse(y), x)


def test_dequantised_glow_is_a_model_of_images() -> None:
    space = Integers((1, 4, 4), 5)
    torch.manual_seed(0)
    model = Dequantised(space, flow="glow", flow_options={"levels": 2, "depth": 1, "width": 8}, depth=1, width=8)
    x = batch(space, 40)
    model.initialise([(x, None)])
    assert model.tempered
    assert model.latent_dim == 16
    bound = model.bound(x, None, stream(0)).check_finite()
    assert (bound.kind, list(bound.parts)) == ("lower bound", ["base", "log_det", "dequantisation"])
    space.validate(model.sample(5, None, stream(1)))
    z = model.encode(x)
    assert torch.equal(model.decode(z), x)  # at the middle of the noise's law, which lies within the bin
    with pytest.raises(NoCodec, match="noise borrows"):
        model.codec()


def test_what_dequantised_refuses() -> None:
    with pytest.raises(Unsupported, match="missing cells"):
        Dequantised(Integers((2,), 3, missing=True))
    with pytest.raises(Unsupported, match="flow: expected a model over Reals"):
        Dequantised(Integers((2,), 3), flow=Standard(Reals((3,))))
    with pytest.raises(ValueError, match="flow_options: expected none beside a model"):
        Dequantised(Integers((2,), 3), flow=Standard(Reals((2,))), flow_options={"a": 1})


def test_uniform_dequantisation_of_glow_counts_every_pixel() -> None:
    """A Glow that is the identity gives N(x + u; 0, I): the bound of a closed form."""
    space = Integers((1, 4, 4), 5)
    torch.manual_seed(0)
    glow = Glow(Reals((1, 4, 4)), levels=1, depth=1, width=4).double()
    model = Preprocessed(glow, Dequantise(space))
    x = batch(space)
    u = KeyedNoise(0, content_keys(x)).uniform(x.shape).double()
    expected = norm.logpdf((x + u).numpy()).sum((1, 2, 3))  # a rotation of the channels keeps the norm
    found = model.bound(x, None, KeyedNoise(0, content_keys(x))).nats.detach()
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert model.tempered


# Recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif("LIKELY_DATA" not in os.environ, reason="LIKELY_DATA is not set")
@pytest.mark.parametrize("recipe", ["iaf_mnist.py", "glow_cifar10.py"])
def test_recipe_runs_dry(recipe: str) -> None:
    command = [sys.executable, str(ROOT / "papers" / recipe), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| paper" in done.stdout


# Faces -----------------------------------------------------------------------------------------------------------


def test_report_and_samples_of_a_fitted_glow(tmp_path: Path) -> None:
    x = torch.randint(0, 5, (160, 1, 4, 4), generator=torch.Generator().manual_seed(0)).numpy()
    fitted = likely.fit(x, model="glow", levels=1, width=4, batch_size=16, epochs=1, progress=False)
    cold = fitted.sample(3, seed=1, temperature=0.0)
    assert np.array_equal(cold[0], cold[1])
    assert not np.array_equal(fitted.sample(3, seed=1)[0], cold[0])
    page = fitted.report(tmp_path / "report.html").read_text(encoding="utf-8")
    for heading in ("Samples at reduced temperature", "Paths in the latent space"):
        assert f"<h2>{heading}</h2>" in page
    other = likely.fit(x, model="independent", progress=False)
    with pytest.raises(ValueError, match=r"draws at temperature 1, got 0\.5"):
        other.sample(3, temperature=0.5)
