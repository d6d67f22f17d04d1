"""Diffusion held against Gaussian data, where bound, flow and samplers are known, and against enumeration."""

from __future__ import annotations

import itertools
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats
from torch import Tensor

from likely.checks import check_model
from likely.contract import Binary, Column, Integers, Reals, Table, Tokens, Unsupported
from likely.diffusion import bound
from likely.diffusion.bound import Denoiser, chain_nats, diffusion_nats, prior_nats, squared_errors
from likely.diffusion.data import Codes, LevelData, TableData, make_data
from likely.diffusion.levels import (
    LEVELS,
    Adaptive,
    Ends,
    Learned,
    Linear,
    draw,
    grid,
    karras_grid,
    make_levels,
    spread_over_batch,
    spread_within,
)
from likely.diffusion.likelihood import flow, log_density
from likely.diffusion.parameterisation import (
    PARAMETERISATIONS,
    OnLevels,
    Pair,
    alpha_sigma,
    make_parameterisation,
    to_output,
)
from likely.diffusion.samplers import SAMPLERS, ancestral, clipped, evaluations, find_sampler, guided, make_sampler
from likely.diffusion.score import denoising_score_matching, score_matching, sliced_score_matching
from likely.diffusion.weighting import WEIGHTINGS, is_monotone, make_weighting, mixture_over_levels
from likely.models.vdm import VDM
from likely.noise import KeyedNoise, StreamNoise
from likely.units import bits_per_dim

LOW, HIGH = -6.0, 6.0
SPREAD = torch.tensor([0.4, 0.7, 2.0], dtype=torch.float64)  # d of three cells


def stream(seed: int = 0) -> StreamNoise:
    return StreamNoise(torch.Generator().manual_seed(seed))


def gaussian(d: Tensor = SPREAD):
    """The best denoiser of N(0, d²) cells: z ~ N(0, n²) with n² = σ² + α² d²."""

    def denoise(z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
        alpha, sigma = alpha_sigma(gamma, z)
        n2 = sigma.square() + (alpha * d).square()
        return Pair(alpha * d.square() * z / n2, sigma * z / n2)

    return denoise


def bent(z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
    """A denoiser that is right for nothing, and smooth."""
    alpha, sigma = alpha_sigma(gamma, z)
    eps = 0.8 * torch.tanh(1.3 * z + 0.2 * gamma.reshape(sigma.shape)) + 0.1 * z.roll(1, 1)
    return Pair((z - sigma * eps) / alpha, eps)


def ends(low: float = LOW, high: float = HIGH) -> Ends:
    return Ends(low, high).double()


def fitted_levels(name: str, low: float = LOW, high: float = HIGH):
    """Levels of a name that have learned something, if they can."""
    levels = make_levels(name, low, high).double()
    if isinstance(levels, Adaptive):
        v = torch.rand(500, dtype=torch.float64)
        levels.observe(v, 1.0 + 20.0 * v**3)
    if isinstance(levels, Learned):
        with torch.no_grad():
            for parameter in levels.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return levels


# The bound on Gaussian data --------------------------------------------------------------------------------------


def optimal(d: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """½ ∫ d²/(exp γ + d²) dγ of every cell: the least diffusion term in continuous time, nats."""
    primitive = [g - torch.log(math.exp(g) + d.square()) for g in (low, high)]
    return 0.5 * (primitive[1] - primitive[0])


def optimal_in_steps(d: Tensor, levels: Tensor) -> Tensor:
    """½ Σ (exp(γ_t − γ_s) − 1) d²/(exp γ_t + d²): the same of a chain."""
    total = torch.zeros_like(d)
    for t, s in itertools.pairwise(levels.tolist()):
        total += 0.5 * math.expm1(t - s) * d.square() / (math.exp(t) + d.square())
    return total


def test_the_bound_on_gaussian_data_is_the_entropy() -> None:
    low, high = -12.0, 12.0
    reconstruction = -0.5 * (1 + math.log(2 * math.pi) + low)
    x = SPREAD * torch.randn(100_000, 3, dtype=torch.float64)
    total = reconstruction + prior_nats(x, torch.tensor(high).double()).mean(0) - optimal(SPREAD, low, high)
    entropy = torch.tensor([stats.norm(scale=float(d)).entropy() for d in SPREAD])
    assert torch.allclose(-total, entropy, atol=1e-4)


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("steps", [None, 7])
def test_every_schedule_has_the_bound_of_the_closed_form(name: str, steps: int | None) -> None:
    levels, span, n = fitted_levels(name, -4.0, 3.0), ends(-4.0, 3.0), 6000
    x = SPREAD * torch.randn(n, 3, dtype=torch.float64)
    nats = -diffusion_nats(gaussian(), x, levels, span, stream(), 8, steps)
    expected = optimal(SPREAD, -4.0, 3.0) if steps is None else optimal_in_steps(SPREAD, grid(levels, span, steps))
    error = nats.std(0) / math.sqrt(n)
    assert ((nats.mean(0) - expected).abs() < 4.5 * error).all()
    assert (error < 0.1 * expected).all()


def test_every_step_of_a_chain_adds_up_to_the_estimate_from_some() -> None:
    x, levels = SPREAD * torch.randn(4000, 3, dtype=torch.float64), grid(Linear(), ends(), 6)
    every = chain_nats(gaussian(), x, levels, stream(), draws=2)
    assert torch.allclose(-every.mean(0), optimal_in_steps(SPREAD, levels), rtol=0.05)
    some = diffusion_nats(gaussian(), x, Linear(), ends(), stream(1), 2, 6)
    error = (every.var(0) / len(x) + some.var(0) / len(x)).sqrt()
    assert ((every.mean(0) - some.mean(0)).abs() < 4.5 * error).all()


def test_the_bound_in_steps_falls_to_the_continuous_one() -> None:
    losses = [float(optimal_in_steps(SPREAD, grid(Linear(), ends(), t)).sum()) for t in (4, 16, 64, 256, 1024)]
    assert losses == sorted(losses, reverse=True)
    limit = float(optimal(SPREAD).sum())
    gaps = [loss - limit for loss in losses[-2:]]
    assert gaps[0] / gaps[1] == pytest.approx(4.0, rel=0.02)  # the gap falls as 1/T


@pytest.mark.parametrize("gamma", [-20.0, -3.0, 0.0, 4.0, 16.0])
def test_prior_is_a_divergence_of_normals(gamma: float) -> None:
    f = torch.linspace(-2, 2, 5, dtype=torch.float64)
    variance = special.expit(gamma)
    mean2 = special.expit(-gamma) * f.numpy() ** 2
    log_variance = -np.logaddexp(0.0, -gamma)
    expected = 0.5 * (mean2 - special.expit(-gamma) - log_variance)
    assert np.allclose(-prior_nats(f, torch.tensor(gamma).double()).numpy(), expected, rtol=1e-10, atol=1e-15)
    if abs(gamma) < 5:
        ratio = torch.distributions.kl_divergence(
            torch.distributions.Normal(math.sqrt(special.expit(-gamma)) * f, math.sqrt(variance)),
            torch.distributions.Normal(0.0 * f, 1.0),
        )
        assert torch.allclose(-prior_nats(f, torch.tensor(gamma).double()), ratio)


def test_prior_keeps_its_digits_in_single_precision() -> None:
    assert float(-prior_nats(torch.tensor([2.0]), torch.tensor(12.0))) == pytest.approx(
        float(-prior_nats(torch.tensor([2.0]).double(), torch.tensor(12.0).double())), rel=1e-3
    )


def test_a_missing_cell_is_no_part_of_the_error_and_not_seen() -> None:
    f = torch.randn(4, 3, dtype=torch.float64)
    there = torch.tensor([1.0, 0.0, 1.0]).double().expand(4, 3)
    eps, gamma = torch.randn(4, 2, 3, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
    errors = squared_errors(bent, f, gamma, eps, None, there)
    assert (errors[:, :, 1] == 0).all()
    other = squared_errors(bent, f + 5.0 * (1 - there), gamma, eps + 3.0 * (1 - there).unsqueeze(1), None, there)
    assert torch.equal(errors, other)


@pytest.mark.parametrize("observed", [False, True])
@pytest.mark.parametrize("with_context", [False, True])
def test_levels_of_a_bound_are_worked_off_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, observed: bool, with_context: bool
) -> None:
    """The bound at many levels needs no more memory than at few, and is the same."""
    f, eps, gamma = torch.randn(4, 3).double(), torch.randn(4, 6, 3).double(), torch.randn(4, 6).double()
    there = (torch.rand(4, 3) < 0.7).double() if observed else None
    context = torch.randn(4, 2).double() if with_context else None
    rows: list[int] = []

    def denoise(z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
        rows.append(len(z))
        return bent(z if context is None else z + context.sum(1, keepdim=True), gamma)

    whole = squared_errors(denoise, f, gamma, eps, context, there)
    monkeypatch.setattr(bound, "CELLS", 15)
    with torch.no_grad():
        parts = squared_errors(denoise, f, gamma, eps, context, there)
    assert rows == [24, 5, 5, 5, 5, 4]
    torch.testing.assert_close(parts, whole)


# Parameterisations -----------------------------------------------------------------------------------------------


def as_denoiser(name: str) -> Denoiser:
    """The bent denoiser as the output of a network in a parameterisation."""
    parameterisation = make_parameterisation(name)
    if isinstance(parameterisation, torch.nn.Module):
        parameterisation = parameterisation.double()

    class Network(torch.nn.Module):
        z: Tensor

        def forward(self, shown: Tensor, level: Tensor, context: Tensor | None) -> Tensor:
            gamma = LOW + (HIGH - LOW) * level
            z = shown / parameterisation.precondition(torch.ones_like(shown), gamma)
            return to_output(parameterisation, bent(z, gamma), z, gamma)

    return Denoiser(Network(), parameterisation, ends())


def test_the_bound_is_the_same_in_every_parameterisation() -> None:
    x = SPREAD * torch.randn(50, 3, dtype=torch.float64)
    expected = diffusion_nats(bent, x, Linear(), ends(), stream(), 8)
    for name in PARAMETERISATIONS:
        found = diffusion_nats(as_denoiser(name), x, Linear(), ends(), stream(), 8)
        assert torch.allclose(found, expected, rtol=1e-8), name


@pytest.mark.parametrize("name", PARAMETERISATIONS)
def test_a_pair_agrees_with_z_and_with_the_definition(name: str) -> None:
    parameterisation = make_parameterisation(name)
    gamma = torch.linspace(-8, 6, 7, dtype=torch.float64)
    z, out = torch.randn(2, 7, 4, dtype=torch.float64)
    pair = parameterisation.to_pair(out, z, gamma)
    alpha, sigma = alpha_sigma(gamma, z)
    assert torch.allclose(alpha * pair.x + sigma * pair.eps, z)
    if name == "f":
        parameterisation = make_parameterisation(name, data_scale=0.5).double()
        pair = parameterisation.to_pair(out, z, gamma)
        s, y, d = sigma / alpha, z / alpha, 0.5  # Karras et al. 2022, table 1
        c_skip, c_out = d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt()
        assert torch.allclose(pair.x, c_skip * y + c_out * out)
        assert torch.allclose(alpha * pair.x + sigma * pair.eps, z)
        assert torch.allclose(parameterisation.precondition(z, gamma), d * y / (s**2 + d**2).sqrt())
    defined = {"eps": pair.eps - z, "x": pair.x, "v": alpha * pair.eps - sigma * pair.x, "score": -pair.eps / sigma}
    if name in defined:
        assert torch.allclose(defined[name], out)
    assert torch.allclose(to_output(parameterisation, pair, z, gamma), out)


def test_an_output_on_levels_is_the_posterior_mean_under_its_tilt() -> None:
    torch.manual_seed(0)
    places = torch.tensor([-0.75, -0.25, 0.25, 0.75], dtype=torch.float64)
    levels = OnLevels(places, (3,)).double()
    counts = torch.tensor([[5.0, 0.0, 1.0, 2.0], [0.0, 9.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    levels.fit(counts)
    shares = counts + (counts.sum(0) + 1) / (counts.sum() + 4)
    shares = (shares / shares.sum(1, keepdim=True)).numpy()
    z, out = torch.randn(2, 5, 3, dtype=torch.float64)
    gamma = torch.linspace(-4, 3, 5, dtype=torch.float64)
    pair = levels.to_pair(out, z, gamma)
    scale = float((((counts.sum(0) + 1) * places.square()).sum() / (counts.sum() + 4)).sqrt())
    for i, g in enumerate(gamma.tolist()):
        alpha, sigma = math.sqrt(special.expit(-g)), math.sqrt(special.expit(g))
        for j in range(3):
            p = shares[j] * np.exp(float(out[i, j]) * places.numpy() / scale)
            p = p * stats.norm(alpha * places.numpy(), sigma).pdf(float(z[i, j]))
            assert float(pair.x[i, j]) == pytest.approx(float((p * places.numpy()).sum() / p.sum()))
    alpha, sigma = alpha_sigma(gamma, z)
    assert torch.allclose(alpha * pair.x + sigma * pair.eps, z)
    assert (levels.to_pair(out + 0.5, z, gamma).x >= pair.x).all()


def test_before_training_the_bound_is_that_of_independent_cells() -> None:
    """The best denoiser of each cell by itself: −bound is the sum of the cells' entropies, but for the two ends."""
    x = torch.distributions.Categorical(torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]])).sample((6000,))
    model = VDM(Integers((2,), 4), network="mlp", network_options={"width": 8}, gamma_max=8.0, bound_levels=32).double()
    model.initialise([(x.double(), None)])
    with torch.no_grad():
        nats = model.bound(x.double(), None, stream()).nats
    entropy = sum(float(stats.entropy(np.bincount(cell.numpy()))) for cell in x.T)
    assert -float(nats.mean()) == pytest.approx(entropy, abs=4.5 * float(nats.std()) / math.sqrt(6000) + 0.02)


def test_f_is_minus_v_for_data_of_unit_scale() -> None:
    gamma, (z, out) = torch.tensor([-3.0, 2.0]).double(), torch.randn(2, 2, 3, dtype=torch.float64)
    f = make_parameterisation("f").to_pair(out, z, gamma)
    v = make_parameterisation("v").to_pair(-out, z, gamma)
    assert torch.allclose(f.x, v.x)


# Levels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LEVELS)
def test_density_is_the_slope_of_the_inverse_quantile(name: str) -> None:
    levels = fitted_levels(name)
    u = torch.linspace(0.003, 0.997, 331, dtype=torch.float64)
    h = 1e-6
    slope = (levels.quantile(u + h) - levels.quantile(u - h)) / (2 * h)
    product = slope * levels.density(levels.quantile(u))
    inside = (product - 1).abs() < 1e-4
    assert inside.double().mean() > (0.97 if name == "adaptive" else 0.999)  # but where a bin ends
    assert float(levels.quantile(torch.tensor([1e-9]).double())) == pytest.approx(0.0, abs=1e-3)
    assert float(levels.quantile(torch.tensor([1 - 1e-9]).double())) == pytest.approx(1.0, abs=1e-3)
    v = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    assert float(levels.density(v).detach().mean()) == pytest.approx(1.0, abs=1e-4)


def test_cosine_is_the_cosine_schedule() -> None:
    levels = make_levels("cosine", -20.0, 20.0, shift=1.0)
    u = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    t = levels.start + (levels.stop - levels.start) * u
    log_snr = -2 * torch.log(torch.tan(math.pi * t / 2)) + 1.0
    assert torch.allclose(-(-20.0 + 40.0 * levels.quantile(u)), log_snr)


def test_lognormal_is_normal_in_the_logarithm_of_the_deviation() -> None:
    levels = make_levels("lognormal", -14.0, 9.0)
    u = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    log_s = 0.5 * (-14.0 + 23.0 * levels.quantile(u))
    assert np.allclose(log_s.numpy(), stats.norm(-1.2, 1.2).ppf(u.numpy()), atol=1e-3)


def test_adaptive_finds_the_density_of_least_variance() -> None:
    def h(v: Tensor) -> Tensor:
        return 0.2 + torch.exp(-0.5 * ((v - 0.7) / 0.05).square())

    levels, noise = Adaptive(floor=0.1).double(), stream()
    for _ in range(400):
        v = levels.quantile(spread_over_batch(noise, 64).double())
        levels.observe(v, h(v))
    v = levels.quantile(torch.rand(20_000, dtype=torch.float64))
    terms = h(v) / levels.density(v)
    even = h(torch.rand(20_000, dtype=torch.float64))
    assert float(terms.mean()) == pytest.approx(float(even.mean()), rel=0.02)
    assert terms.std() < 0.25 * even.std()


def test_learned_levels_find_the_density_of_least_variance_without_moving_the_mean() -> None:
    def h(v: Tensor) -> Tensor:
        return 0.2 + torch.exp(-0.5 * ((v - 0.7) / 0.1).square())

    levels, noise = Learned().double(), stream()
    optimiser = torch.optim.Adam(levels.parameters(), lr=0.02)
    for _ in range(150):
        v = levels.quantile(spread_over_batch(noise, 128).double())
        optimiser.zero_grad()
        levels.variance(v, h(v)).backward()
        optimiser.step()
    v = levels.quantile(torch.rand(20_000, dtype=torch.float64))
    terms = (h(v) / levels.density(v)).detach()
    even = h(torch.rand(20_000, dtype=torch.float64))
    assert float(terms.mean()) == pytest.approx(float(even.mean()), rel=0.02)
    assert terms.std() < 0.3 * even.std()


def test_the_gradient_of_the_variance_is_that_of_the_second_moment() -> None:
    levels = fitted_levels("learned")
    v = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    h = 1.0 + torch.sin(5 * v)
    exact = torch.autograd.grad((h.square() / levels.density(v)).mean(), levels.shares)[0]
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    drawn = levels.quantile(u)
    terms = (h_of := 1.0 + torch.sin(5 * drawn)).square() / levels.density(drawn).square()
    scale = terms.mean().detach()
    estimate = torch.autograd.grad(levels.variance(drawn, h_of), levels.shares)[0] * scale
    assert torch.allclose(estimate, exact, atol=1e-3 * exact.abs().max())


def test_levels_over_a_batch_are_a_random_grid_also_across_processes() -> None:
    u = spread_over_batch(stream(3), 64).sort().values
    assert torch.allclose(u.diff(), torch.full((63,), 1 / 64), atol=1e-6)
    parts = []
    for start, stop in ((0, 24), (24, 64)):
        noise = StreamNoise(torch.Generator().manual_seed(3), rows=(start, stop, 64))
        parts.append(spread_over_batch(noise, stop - start))
    assert torch.equal(torch.cat(parts), spread_over_batch(stream(3), 64))
    first = torch.stack([spread_over_batch(stream(seed), 5)[0] for seed in range(400)])
    assert stats.kstest(first.numpy(), "uniform").pvalue > 1e-3


def test_levels_within_an_example_are_a_grid_of_its_own() -> None:
    noise = KeyedNoise(0, torch.arange(3))
    u = spread_within(noise, 3, 8)
    assert torch.allclose(u.diff(dim=1), torch.full((3, 7), 0.125), atol=1e-6)
    alone = spread_within(KeyedNoise(0, torch.tensor([1])), 1, 8)
    assert torch.equal(u[1:2], alone)


def test_steps_run_from_one_to_t() -> None:
    u = torch.tensor([[1e-7, 0.2499, 0.25, 0.999999]], dtype=torch.float64)
    drawn = draw(Linear(), ends(-4.0, 4.0), u, 4)
    assert drawn.gamma.tolist() == [[-2.0, -2.0, 0.0, 4.0]]
    assert torch.allclose(drawn.weight, torch.full((1, 4), 4 * math.expm1(2.0), dtype=torch.float64))


def test_grids_fall_from_end_to_end() -> None:
    for levels in (grid(Linear(), ends(), 5), karras_grid(LOW, HIGH, 5)):
        assert levels[0].item() == pytest.approx(HIGH)
        assert levels[-1].item() == pytest.approx(LOW)
        assert (levels.diff() < 0).all()
    s = np.linspace(math.exp(HIGH / 14), math.exp(LOW / 14), 6) ** 7  # Karras et al. 2022, eq. 5
    assert np.allclose(karras_grid(LOW, HIGH, 5).numpy(), 2 * np.log(s))


def test_a_network_is_told_levels_in_units_of_the_first_range() -> None:
    span = Ends(-4.0, 4.0, learned=True)
    with torch.no_grad():
        span.low.fill_(-6.0)
        span.high.fill_(5.0)
    gamma = span.gamma(torch.tensor([0.0, 1.0]))
    assert gamma.tolist() == [-6.0, 5.0]
    assert span.level(gamma).tolist() == [-0.25, 1.125]


def test_learned_ends_have_the_gradient_of_the_bound() -> None:
    x = SPREAD * torch.randn(200, 3, dtype=torch.float64)

    def total(low: float, high: float, learned: bool) -> tuple[Tensor, Ends]:
        span = Ends(low, high, learned).double()
        network = torch.nn.Module()
        network.forward = lambda z, level, context: torch.tanh(z)  # type: ignore[method-assign]
        return diffusion_nats(
            Denoiser(network, make_parameterisation("v"), span), x, Linear(), span, stream(), 4
        ).sum(), span

    value, span = total(-3.0, 2.0, True)
    value.backward()
    h = 2.0**-9  # which single precision adds exactly
    for name, moved in (("low", (h, 0.0)), ("high", (0.0, h))):
        up, down = (total(-3.0 + s * moved[0], 2.0 + s * moved[1], False)[0] for s in (1, -1))
        assert getattr(span, name).grad.item() == pytest.approx(float(up - down) / (2 * h), rel=1e-4)


# Weightings ------------------------------------------------------------------------------------------------------


def test_which_weightings_are_likelihoods() -> None:
    found = {name: is_monotone(make_weighting(name), -13.3, 9.0) for name in WEIGHTINGS}
    assert found == {
        "elbo": True,
        "sigmoid": True,
        "edm": False,
        "edm_monotone": True,
        "min_snr": False,
        "simple": False,
        "velocity": True,
    }


@pytest.mark.parametrize("name", WEIGHTINGS)
def test_a_weighted_loss_is_a_mixture_of_divergences(name: str) -> None:
    """The integration by parts, for Gaussian data, by independent quadrature."""
    weighting, d2 = make_weighting(name), 0.7
    log_snr = torch.linspace(-6, 10, 40_001, dtype=torch.float64)
    error = d2 / (torch.exp(-log_snr) + d2)
    step = float(log_snr[1] - log_snr[0])
    left = 0.5 * float(integrate.simpson((weighting(log_snr) * error).numpy(), dx=step))
    divergence = torch.from_numpy(0.5 * integrate.cumulative_simpson(error.numpy(), dx=step, initial=0.0))
    assert float(mixture_over_levels(weighting, log_snr, divergence)) == pytest.approx(left, rel=1e-6)


def test_edm_weighs_as_edm_does() -> None:
    """Its loss is E over log s ~ N(−1.2, 1.2²) of (s² + d²)/(s d)² |x − x̂|², and |ε − ε̂|² = |x − x̂|²/s²."""
    s = np.exp(np.linspace(-4, 1.5, 50))
    density = stats.norm(-1.2, 1.2).pdf(np.log(s)) / 2  # of λ = −2 log s
    expected = density * (s**2 + 0.25) / (0.5 * s) ** 2 * s**2
    found = make_weighting("edm")(torch.from_numpy(-2 * np.log(s))).numpy()
    assert np.allclose(found / found.max(), expected / expected.max(), rtol=1e-3)
    assert float(make_weighting("edm")(torch.linspace(-9, 9, 9001, dtype=torch.float64)).max()) == pytest.approx(1.0)


def test_min_snr_and_simple_are_those_of_the_cosine_schedule() -> None:
    """|ε − ε̂|² with levels t ~ U: w is the density of λ, that is 1/|dλ/dt| up to a constant."""
    t = np.linspace(0.05, 0.95, 19)
    log_snr = -2 * np.log(np.tan(math.pi * t / 2))
    slope = 2 * math.pi / np.sin(math.pi * t)
    found = make_weighting("simple")(torch.from_numpy(log_snr)).numpy()
    assert np.allclose(found * slope, (found * slope)[0])
    capped = make_weighting("min_snr")(torch.from_numpy(log_snr)).numpy()
    assert np.allclose(capped / found, np.minimum(1.0, 5 * np.exp(-log_snr)))


# Samplers --------------------------------------------------------------------------------------------------------

ONE = torch.tensor([0.6], dtype=torch.float64)


def true_scale(low: float = LOW, high: float = HIGH, d: float = 0.6) -> float:
    """The flow of N(0, d²) multiplies z by n(γ_0)/n(γ_1)."""
    n2 = [special.expit(g) + special.expit(-g) * d**2 for g in (low, high)]
    return math.sqrt(n2[0] / n2[1])


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpm", 2)])
def test_order_of_a_sampler_of_the_flow(name: str, order: int) -> None:
    errors = []
    for steps in (40, 80, 160):
        z = find_sampler(name)(
            gaussian(ONE), torch.ones(1, 1, dtype=torch.float64), grid(Linear(), ends(), steps), stream()
        )
        errors.append(abs(float(z) - true_scale()))
    rates = [math.log(a / b) / math.log(2) for a, b in itertools.pairwise(errors)]
    assert rates[-1] == pytest.approx(order, abs=0.15)
    assert errors[-1] < 0.01


class Impulses:
    """Noise of which example i has its only 1 in the i-th draw: what a linear sampler makes of it is a coefficient."""

    def __init__(self) -> None:
        self.drawn = 0

    def normal(self, shape) -> Tensor:
        self.drawn += 1
        return (torch.arange(shape[0]) == self.drawn).double().reshape(-1, *[1] * (len(shape) - 1)).expand(shape)

    def uniform(self, shape) -> Tensor:
        raise NotImplementedError


def variance_of(name: str, steps: int, **options: float) -> float:
    """Variance of a stochastic sampler's outcome on Gaussian data, from its coefficients; z_1 has the true variance."""
    z = torch.zeros(steps + 1, 1, dtype=torch.float64)
    z[0] = math.sqrt(special.expit(HIGH) + special.expit(-HIGH) * 0.36)
    out = make_sampler(name, **options)(gaussian(ONE), z, grid(Linear(), ends(), steps), Impulses())
    return float(out.square().sum())


def test_stochastic_samplers_converge_to_the_true_variance() -> None:
    truth = special.expit(LOW) + special.expit(-LOW) * 0.36
    for name, options, order in (("ancestral", {}, 1), ("ancestral", {"large": 1.0}, 1), ("sde", {}, 1)):
        errors = [abs(variance_of(name, steps, **options) - truth) for steps in (40, 80, 160)]
        assert math.log(errors[1] / errors[2]) / math.log(2) > order - 0.1, (name, errors)
        assert errors[2] < 0.02
    assert abs(variance_of("sde", 40) - truth) < 0.3 * abs(variance_of("ancestral", 40) - truth)
    churned = [abs(variance_of("heun", steps, churn=8.0) - truth) for steps in (40, 80, 160)]
    assert churned[0] > churned[1] > churned[2]
    assert churned[2] < 1e-3


def test_the_ancestral_step_is_the_posterior_of_the_chain() -> None:
    """q(z_s | z_t, x) by Bayes' rule, with x̂ for x."""
    t, s, z_t, x = 0.7, -0.9, 1.3, 0.4
    alpha2 = {g: special.expit(-g) for g in (t, s)}
    forward = math.sqrt(alpha2[t] / alpha2[s])
    spread = (1 - alpha2[t]) - forward**2 * (1 - alpha2[s])
    precision = 1 / (1 - alpha2[s]) + forward**2 / spread
    mean = (math.sqrt(alpha2[s]) * x / (1 - alpha2[s]) + forward * z_t / spread) / precision

    def fixed(z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
        alpha, sigma = alpha_sigma(gamma, z)
        return Pair(torch.full_like(z, x), (z - alpha * x) / sigma)

    levels = torch.tensor([t, s], dtype=torch.float64)
    z = torch.full((2, 1), z_t, dtype=torch.float64)
    out = ancestral(fixed, z, levels, Impulses())
    assert out[0].item() == pytest.approx(mean)
    assert (out[1] - out[0]).item() == pytest.approx(1 / math.sqrt(precision))


def test_every_parameterisation_level_and_sampler_goes_with_every_other() -> None:
    x = torch.randint(4, (6, 3)).float()
    for parameterisation, levels in itertools.product(PARAMETERISATIONS, LEVELS):
        torch.manual_seed(0)
        model = VDM(
            Integers((3,), 4),
            network="mlp",
            network_options={"width": 8, "depth": 1, "waves": 4},
            parameterisation=parameterisation,
            levels=levels,
            gamma_min=-4.0,
        )
        for parameter in model.denoise.network.parameters():
            parameter.data.add_(0.1 * torch.randn(parameter.shape))
        loss = model.train().loss(x, None, stream())
        loss.value.backward()
        assert torch.isfinite(loss.value)
        assert torch.isfinite(model.eval().bound(x, None, stream()).nats).all()
        for sampler in SAMPLERS:
            drawn = model.sample(4, None, stream(), sampler=sampler, steps=3)
            model.space.validate(drawn)


def test_guidance_is_linear_and_can_be_kept_to_some_levels() -> None:
    def denoise(z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
        assert context is not None
        return Pair(context.expand_as(z), z - context)

    none, some = torch.zeros(2, 1), torch.ones(2, 1)
    z, gamma = torch.randn(2, 3), torch.zeros(2)
    pair = guided(denoise, none, 3.0)(z, gamma, some)
    assert torch.allclose(pair.x, torch.full((2, 3), 3.0))
    assert torch.allclose(pair.eps, z - 3.0)
    assert torch.equal(guided(denoise, none, 1.0)(z, gamma, some).x, denoise(z, gamma, some).x)
    assert torch.equal(guided(denoise, none, 3.0, low=1.0)(z, gamma, some).x, denoise(z, gamma, some).x)


def test_clipping_keeps_the_pair_together() -> None:
    z, gamma = 4.0 * torch.randn(3, 50), torch.full((3,), 0.5)
    alpha, sigma = alpha_sigma(gamma, z)
    for quantile in (None, 0.9):
        pair = clipped(gaussian(torch.tensor(3.0)), -1.0, 1.0, quantile)(z, gamma)
        assert pair.x.abs().max() <= 1.0 + 1e-6
        assert torch.allclose(alpha * pair.x + sigma * pair.eps, z, atol=1e-5)


def test_evaluations_are_counted_as_they_are_made() -> None:
    for name in SAMPLERS:
        made = 0

        def counting(z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
            nonlocal made
            made += 1
            return gaussian(ONE)(z, gamma)

        find_sampler(name)(counting, torch.ones(2, 1, dtype=torch.float64), grid(Linear(), ends(), 5), stream())
        assert made == evaluations(name, 5)


# The flow --------------------------------------------------------------------------------------------------------


def test_density_of_the_flow_on_gaussian_data_and_its_order() -> None:
    z = torch.randn(5, 3, dtype=torch.float64)
    scale = torch.tensor([true_scale(d=float(d)) for d in SPREAD])
    expected = stats.norm(scale=scale.numpy()).logpdf(z.numpy()).sum(1)
    errors = []
    for steps in (10, 20):
        found = log_density(gaussian(), z, torch.linspace(LOW, HIGH, steps + 1, dtype=torch.float64))
        errors.append(np.abs(found.numpy() - expected).max())
    assert errors[1] < 1e-3
    assert math.log(errors[0] / errors[1]) / math.log(2) == pytest.approx(4.0, abs=0.7)
    levels = torch.linspace(HIGH, LOW, 41, dtype=torch.float64)
    assert torch.allclose(flow(gaussian(), z, levels), z * scale, rtol=1e-4)
    assert torch.allclose(flow(gaussian(), flow(gaussian(), z, levels), levels.flip(0)), z, rtol=1e-4)


def test_hutchinson_estimates_the_exact_divergence() -> None:
    z, levels = torch.randn(4, 3, dtype=torch.float64), torch.linspace(-1, 1, 4, dtype=torch.float64)
    exact = log_density(bent, z, levels)
    many = log_density(bent, z, levels, noise=stream(), probes=600)
    one = torch.stack([log_density(bent, z, levels, noise=stream(seed)) for seed in range(60)])
    assert torch.allclose(many, exact, atol=0.05)
    assert ((one.mean(0) - exact).abs() < 4.5 * one.std(0) / math.sqrt(60) + 1e-9).all()


def test_a_fresh_model_is_the_gaussian_with_the_data_s_scale() -> None:
    """With EDM's parameterisation a network that says 0 is the best denoiser of N(m, s² I)."""
    model = VDM(Reals((2,)), network="mlp", network_options={"width": 8, "depth": 1}, bound_levels=16).double()
    x = torch.tensor([3.0, -1.0]) + torch.tensor([2.0, 0.1]) * torch.randn(4000, 2, dtype=torch.float64)
    model.initialise([(x, None)])
    mean, scale = x.mean(0), x.std(0, correction=0)
    some = x[:6]
    ode = model.ode_log_likelihood(some, steps=40)
    stretch = true_scale(-10.0, 5.0, d=1.0) / math.sqrt(special.expit(10.0))
    expected = stats.norm(mean.numpy(), stretch * scale.numpy()).logpdf(some.numpy()).sum(1)
    assert ode.kind == "estimate"
    assert np.allclose(ode.nats.detach().numpy(), expected, atol=1e-5)
    nats = model.bound(x, None, stream()).nats.detach()
    entropy = 2 * 0.5 * (1 + math.log(2 * math.pi)) + float(scale.log().sum())
    assert float(nats.mean()) == pytest.approx(-entropy, abs=5 * float(nats.std()) / math.sqrt(len(x)) + 2e-3)
    drawn = model.sample(4000, None, stream(), sampler="dpm", steps=20)
    assert torch.allclose(drawn.std(0), scale, rtol=0.08)
    z = model.encode(some)
    assert torch.allclose(model.decode(z), some, rtol=1e-3)


def test_the_flow_refuses_what_has_no_density() -> None:
    with pytest.raises(Unsupported, match="for Binary, Integers and Reals, got Tokens"):
        VDM.tiny(Tokens(3, 3)).ode_log_likelihood(torch.zeros(1, 3))
    with pytest.raises(Unsupported, match="without missing cells"):
        VDM.tiny(Reals((2,), missing=True)).ode_log_likelihood(torch.tensor([[0.0, math.nan]]))


# Data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "gamma"), [(2, -3.6), (4, 1.0), (17, -6.0), (256, -13.3), (256, -6.0)])
def test_reconstruction_of_levels_is_the_softmax_over_all(levels: int, gamma: float) -> None:
    data, gamma_0 = LevelData(Integers((5,), levels)), torch.tensor(gamma, dtype=torch.float64)
    x = torch.randint(levels, (200, 5)).double()
    x[0] = torch.tensor([0, 0, levels - 1, levels - 1, levels // 2])
    y = data.embed(x) + math.exp(gamma / 2) * torch.randn(200, 5, dtype=torch.float64)
    y[0] += torch.tensor([-1.0, 1e-3, 1.0, 0.0, 0.0])  # outside the range too
    places = 2 * (np.arange(levels) + 0.5) / levels - 1
    logits = -0.5 * (y.numpy()[..., None] - places) ** 2 / math.exp(gamma)
    expected = special.log_softmax(logits, -1)
    own = np.take_along_axis(expected, x.long().numpy()[..., None], -1)[..., 0]
    for _ in range(2):  # before and after γ_0 is settled
        assert np.allclose(data.log_likelihood(x, y, gamma_0).numpy(), own, rtol=1e-9, atol=1e-12)
        data.settle(gamma)


@pytest.mark.parametrize("gamma", [-14.0, -13.3, -12.5, -11.0, -9.0])
def test_what_the_end_costs_8_bit_data(gamma: float) -> None:
    """By the trapezoidal rule over the noise, held against adaptive quadrature of the formula."""
    data, s = LevelData(Integers((1,), 256)), math.exp(gamma / 2)
    eps = torch.linspace(-8, 8, 8001, dtype=torch.float64).unsqueeze(1)
    x = torch.full_like(eps, 99.0)
    found = data.log_likelihood(x, data.embed(x) + s * eps, torch.tensor(gamma, dtype=torch.float64))
    nats = np.trapezoid((stats.norm.pdf(eps) * found.numpy())[:, 0], dx=16 / 8000)
    offsets = np.arange(-60, 61) * 2 / 256

    def lost(e: float) -> float:
        return stats.norm.pdf(e) * special.logsumexp(-0.5 * ((e - offsets / s) ** 2 - e**2))

    expected = sum(integrate.quad(lost, a, a + 1)[0] for a in range(-8, 8))
    assert -float(nats) == pytest.approx(expected, rel=1e-4, abs=1e-9)
    if gamma == -13.3:
        assert bits_per_dim(float(nats), 1) == pytest.approx(0.01045, abs=2e-5)


def test_gamma_of_the_data_suits_its_spacing() -> None:
    assert make_data(Integers((1,), 256)).gamma == pytest.approx(-13.3, abs=0.01)
    table = TableData(
        Table(columns=(Column("a", "real", resolution=0.01), Column("b", "categorical", levels=3))), embedding_dim=4
    )
    table.initialise([(torch.tensor([[0.0, 0.0], [2.0, 1.0]], dtype=torch.float64), None)])
    assert table.gamma == pytest.approx(2 * math.log(0.005 / 3.02))  # unit 1, resolution 0.01


MIXED = Table(
    columns=(
        Column("colour", "categorical", levels=5),
        Column("size", "real", resolution=0.5),
        Column("weight", "real"),
        Column("member", "binary"),
    )
)


def table_data() -> tuple[TableData, Tensor]:
    torch.manual_seed(2)
    x = torch.stack(
        [
            torch.randint(5, (300,)).double(),
            (4 * torch.randn(300)).round().double() * 0.5,
            torch.randn(300).double().exp(),
            torch.randint(2, (300,)).double(),
        ],
        1,
    )
    data = TableData(MIXED, embedding_dim=2).double()
    data.initialise([(x, None)])
    return data, x


def test_probabilities_of_cells_sum_to_one() -> None:
    data, x = table_data()
    gamma = torch.tensor(-1.5).double()
    y = (data.embed(x[:3]) + 0.4 * torch.randn(3, *data.shape)).detach()
    for j, values in ((0, torch.arange(5.0)), (1, 0.5 * torch.arange(-4000.0, 4001.0)), (3, torch.arange(2.0))):
        rows = x[:1].expand(len(values), -1).clone()
        rows[:, j] = values
        for point in y:
            mass = data.log_likelihood(rows, point.expand(len(rows), -1), gamma)[:, j].detach().exp().sum()
            assert float(mass) == pytest.approx(1.0, abs=2e-6)


def test_density_of_a_column_is_that_of_its_map() -> None:
    data, x = table_data()
    assert data.numbers is not None
    gamma = -2.0
    mean, scale = float(data.numbers.mean[1]), float(data.numbers.scale[1])
    values = x[:50, 2].numpy()
    mapped = np.arcsinh((values - mean) / scale)
    slope = 1 / np.sqrt(1 + ((values - mean) / scale) ** 2) / scale
    expected = -0.5 * (1 + math.log(2 * math.pi) + gamma) + np.log(slope)  # E log N(T; T + s ε, s²) + log T'
    found = data.log_likelihood(x[:50], data.embed(x[:50]), torch.tensor(gamma).double())[:, 2]
    assert np.allclose(found.detach().numpy(), expected)
    assert np.allclose(data.embed(x[:50])[:, 1].detach().numpy(), mapped)


def test_draws_from_almost_no_noise_are_the_example() -> None:
    data, x = table_data()
    gamma = torch.tensor(-30.0).double()
    for noise in (None, stream()):
        drawn = data.draw(data.embed(x), gamma, noise).detach()
        assert torch.allclose(drawn, x, atol=1e-4)
        assert torch.equal(drawn[:, [0, 1, 3]], x[:, [0, 1, 3]])


def test_coordinates_belong_to_their_cells() -> None:
    data, _ = table_data()
    owners = data.to_cells(torch.eye(data.shape[0], dtype=torch.float64)).argmax(1)
    assert owners.tolist() == data.owner.tolist() == [1, 2, 0, 0, 3]
    cells = torch.randn(3, 4)
    assert torch.equal(data.to_coordinates(cells), cells[:, [1, 2, 0, 0, 3]])
    symbols = make_data(Tokens(3, 5), embedding_dim=8)
    assert symbols.to_cells(torch.ones(2, 9)).tolist() == [[3.0] * 3] * 2
    assert symbols.to_coordinates(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [[1.0] * 3 + [2.0] * 3 + [3.0] * 3]


@pytest.mark.parametrize(("levels", "most"), [(1, 8), (2, 8), (7, 8), (100, 3)])
def test_codes_are_apart_and_their_posterior_is_bayes(levels: int, most: int) -> None:
    codes = Codes(levels, most).double()
    distance = torch.cdist(codes.points, codes.points).detach() + 1e9 * torch.eye(levels)
    assert distance.min() > (1.99 if levels <= 2**most else 1e-4)
    codes.count(torch.arange(1.0, levels + 1.0))
    gamma, y = 0.3, torch.randn(4, codes.width, dtype=torch.float64)
    shares = (np.arange(1, levels + 1) + 0.5) / (np.arange(1, levels + 1) + 0.5).sum()
    log_p = np.log(shares) + stats.norm(scale=math.exp(gamma / 2)).logpdf(
        y.numpy()[:, None] - codes.points.detach().numpy()
    ).sum(-1)
    found = codes.log_probs(y, torch.tensor(gamma).double()).detach().numpy()
    assert np.allclose(found, special.log_softmax(log_p, -1))


# The model -------------------------------------------------------------------------------------------------------


#: p(x) of two dependent pixels of four levels, row by row.
TWO_PIXELS = torch.tensor(
    [[0.20, 0.05, 0.0, 0.0], [0.02, 0.18, 0.05, 0.0], [0.0, 0.02, 0.18, 0.05], [0.05, 0.0, 0.02, 0.18]],
    dtype=torch.float64,
).flatten()


class Perfect(torch.nn.Module):
    """The best denoiser of the two pixels: x̂ = E[f(x) | z]."""

    def __init__(self, model: VDM) -> None:
        super().__init__()
        self.ends = model.ends
        self.places = model.data.embed(torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0)).double())

    def forward(self, z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
        alpha, sigma = alpha_sigma(gamma, z)
        distance = (z.unsqueeze(1) - alpha.unsqueeze(1) * self.places).square().sum(2)
        x = (TWO_PIXELS.log() - 0.5 * distance / sigma.square()).softmax(1) @ self.places
        return Pair(x, (z - alpha * x) / sigma)


def perfect(steps: int | None, gamma_min: float | None = None, gamma_max: float = 8.0) -> VDM:
    model = VDM(
        Integers((2,), 4),
        network="mlp",
        network_options={"width": 8},
        timesteps=steps,
        gamma_min=gamma_min,
        gamma_max=gamma_max,
        bound_levels=32,
    ).double()
    model.denoise = Perfect(model)  # type: ignore[assignment]
    return model.eval()


def expected_bounds(model: VDM, draws: int = 400) -> tuple[Tensor, Tensor]:
    """E bound of all 16 states and its standard error, nats."""
    states = torch.cartesian_prod(torch.arange(4.0), torch.arange(4.0))
    with torch.no_grad():
        nats = model.bound(states.repeat(draws, 1), None, KeyedNoise(0, torch.arange(16 * draws))).nats
    nats = nats.reshape(draws, 16)
    return nats.mean(0), nats.std(0) / math.sqrt(draws)


def test_with_the_best_denoiser_the_bound_is_the_log_probability() -> None:
    """In continuous time the chain is the exact reversal, so that nothing is lost but at the two ends."""
    nats, error = expected_bounds(perfect(None))
    there = TWO_PIXELS > 0
    assert ((nats - TWO_PIXELS.log())[there].abs() < 4.5 * error[there] + 0.01).all()
    assert 0.96 < float(nats.exp().sum()) <= 1.0 + 3 * float((nats.exp() * error).square().sum().sqrt())


def test_exponentials_of_the_bound_sum_to_at_most_one_and_more_steps_are_tighter() -> None:
    masses, means = [], []
    for steps in (4, 16, 64, 256):
        nats, _ = expected_bounds(perfect(steps), 150)
        masses.append(float(nats.exp().sum()))
        means.append(float((TWO_PIXELS * nats)[TWO_PIXELS > 0].sum()))
    assert masses == sorted(masses)
    assert masses[-1] < 1.0
    assert means == sorted(means)
    entropy = -float((TWO_PIXELS * TWO_PIXELS.clamp(min=1e-9).log()).sum())
    assert entropy < -means[-1] < entropy + 0.1


@pytest.mark.parametrize(("gamma_min", "gamma_max"), [(-1.0, 8.0), (-5.0, 0.5), (-1.0, 0.5)])
def test_exponentials_of_the_bound_sum_to_at_most_one_whatever_the_ends(gamma_min: float, gamma_max: float) -> None:
    """What a noisy first level or a clean last one costs is in the bound."""
    nats, error = expected_bounds(perfect(None, gamma_min, gamma_max))
    mass = float(nats.exp().sum())
    assert mass <= 1.0 + 4.5 * float((nats.exp() * error).square().sum().sqrt())
    assert mass > 0.3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_with_the_best_denoiser_have_the_frequencies_of_the_data(sampler: str) -> None:
    drawn = perfect(None).sample(6000, None, stream(), sampler=sampler, steps=64)
    frequency = torch.bincount((4 * drawn[:, 0] + drawn[:, 1]).long(), minlength=16).double() / 6000
    assert float((frequency - TWO_PIXELS).abs().sum()) < 0.08


def test_the_flow_s_density_of_levels_is_near_their_log_probability() -> None:
    """Dequantised, hence a little below it where the flow is not flat over a cell."""
    model = perfect(None)
    states = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, 0.0]]).repeat(30, 1)
    found = model.ode_log_likelihood(states, None, stream(), steps=32).nats.reshape(30, 3).mean(0)
    truth = TWO_PIXELS[[0, 5, 12]].log()
    assert (found < truth).all()


def test_the_loss_is_the_bound_in_expectation() -> None:
    x = torch.randint(4, (4000, 2)).double()
    torch.manual_seed(0)
    model = VDM(Integers((2,), 4), network="mlp", network_options={"width": 8}).double().eval()
    with torch.no_grad():
        losses = torch.stack([model.loss(x, None, stream(seed)).value for seed in range(12)])
        nats = model.bound(x, None, stream(50)).nats / 2
    error = math.hypot(float(losses.std()) / math.sqrt(12), float(nats.std()) / math.sqrt(4000))
    assert float(losses.mean() + nats.mean()) == pytest.approx(0.0, abs=4.5 * error)


def test_levels_weights_and_dropout_are_for_the_loss_alone() -> None:
    x = torch.randint(4, (20, 2)).float()
    options = {"network": "mlp", "network_options": {"width": 8, "depth": 1, "dropout": 0.5}, "gamma_min": -4.0}
    found = []
    for more in ({"levels": "linear"}, {"weighting": "sigmoid"}, {"weighting": "edm", "levels": "lognormal"}):
        torch.manual_seed(0)
        model = VDM(Integers((2,), 4), **options, **more).eval()
        found.append((model.bound(x, None, stream()).nats, float(model.loss(x, None, stream()).value.detach())))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][0], found[2][0])
    assert len({loss for _, loss in found}) == 3


def test_a_weighted_loss_has_no_part_called_a_bound() -> None:
    model = VDM(Integers((2,), 4), network="mlp", network_options={"width": 8, "depth": 1}, weighting="sigmoid")
    assert set(model.loss(torch.zeros(3, 2)).log) == {"reconstruction", "prior", "weighted diffusion"}


@pytest.mark.parametrize(
    ("options", "checks"),
    [
        ({"levels": "adaptive"}, ["resume", "save_load", "gradients", "learning"]),
        ({"levels": "learned"}, ["resume", "save_load", "learning"]),
        ({"learn_ends": True}, ["resume", "save_load", "gradients"]),
        ({"weighting": "sigmoid", "levels": "cosine"}, ["resume", "gradients"]),
        ({"parameterisation": "eps"}, ["gradients", "learning"]),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_options_keep_the_contract(options: dict, checks: list[str]) -> None:
    model = VDM(
        Binary((2,)), network="mlp", network_options={"width": 8, "depth": 1, "waves": 4}, gamma_max=2.0, **options
    )
    check_model(model, only=checks)


def test_a_model_with_hidden_conditions_has_two_bounds() -> None:
    torch.manual_seed(0)
    model = VDM(
        Integers((2,), 4),
        Integers((1,), 3),
        network="mlp",
        network_options={"width": 16, "depth": 1, "waves": 4},
        condition_dropout=0.5,
        gamma_max=3.0,
        bound_levels=16,
    )
    c = torch.randint(3, (2048, 1)).float()
    x = torch.cat([c, c + (torch.rand(2048, 1) < 0.2)], 1)
    model.initialise([(x, c)])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(250):
        optimiser.zero_grad()
        model.loss(x[:512], c[:512], stream(step)).value.backward()
        optimiser.step()
    model.eval()
    with torch.no_grad():
        given, alone = model.bound(x, c, stream()).nats.mean(), model.bound(x, None, stream()).nats.mean()
        other = model.bound(x, c.roll(1, 0), stream()).nats.mean()
    assert given > alone + 0.4 > other + 0.4  # the condition is worth log 3 = 1.1 nats
    plain = model.sample(300, c[:300], stream(), steps=16)
    strong = model.sample(300, c[:300], stream(), steps=16, guidance=3.0)
    right = [float((drawn[:, :1] == c[:300]).float().mean()) for drawn in (plain, strong)]
    assert right[1] >= right[0] > 0.6


def test_networks_see_the_last_bits_of_fine_levels() -> None:
    for levels, powers in ((256, [6, 7]), (32, [3, 4]), (17, []), (16, [])):
        model = VDM(Integers((2,), levels), network="mlp", network_options={"width": 8, "depth": 1})
        assert model.denoise.network.fine.powers == powers
    given = VDM(Integers((2,), 256), network="mlp", network_options={"width": 8, "depth": 1, "fourier": None})
    assert given.denoise.network.fine.powers == []


def test_refusals_say_what_is_wrong() -> None:
    vector, given = Integers((2,), 4), Integers((1,), 3)
    for options, message in (
        ({"timesteps": 0}, "timesteps: expected at least 1, got 0"),
        ({"weighting": "edm", "learn_ends": True}, "weighting: learned ends and a chain"),
        ({"condition_dropout": 0.1}, "no condition to hide"),
        ({"sampler": "euler"}, "sampler: expected one of ancestral, ddim, heun, dpm, sde, got 'euler'"),
        ({"levels": "log"}, "levels: expected one of linear, cosine, lognormal, adaptive, learned, got 'log'"),
        ({"weighting": "snr"}, "weighting: expected one of elbo"),
        ({"parameterisation": "w"}, "parameterisation: expected one of eps, x, v, f, score, got 'w'"),
        ({"levels_options": {"shift": 1.0}}, "has no option 'shift'"),
        ({"gamma_min": 6.0}, "expected gamma_min < gamma_max, got 6 and 5"),
    ):
        with pytest.raises(ValueError, match=message):
            VDM(vector, network="mlp", **options)  # type: ignore[arg-type]
    with pytest.raises(Unsupported, match="guidance: needs"):
        VDM(vector, given, network="mlp", guidance=2.0)
    with pytest.raises(Unsupported, match="give gamma_min"):
        VDM(MIXED, network="mlp", levels="cosine")
    with pytest.raises(ValueError, match="condition: this model was built with a condition"):
        VDM.tiny(vector, given).bound(torch.zeros(1, 2))


# Scores alone ----------------------------------------------------------------------------------------------------


def test_score_matching_has_its_minimum_at_the_score() -> None:
    """For s(x) = −a x on N(0, d²): implicit −a + ½ a² d² per cell, least at 1/d²; denoising, least at 1/(d² + σ²)."""
    d, sigma = 0.8, 0.5
    x = d * torch.randn(20_000, 2, dtype=torch.float64)
    second = float(x.square().mean())
    for a in (0.5, 1.5):
        exact = score_matching(lambda v, a=a: -a * v, x).detach().mean()
        assert float(exact) == pytest.approx(2 * (-a + 0.5 * a**2 * second))
        denoising = denoising_score_matching(lambda v, a=a: -a * v, x, sigma, stream()).mean()
        expected = 0.5 * 2 * ((1 - a * sigma**2) ** 2 + (a * sigma * d) ** 2)
        assert float(denoising) == pytest.approx(expected, rel=0.03)
    a = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    losses = {
        1 / second: lambda: sliced_score_matching(lambda v: -a * v, x, stream()).mean(),
        1 / (second + sigma**2): lambda: denoising_score_matching(lambda v: -a * v, x, sigma, stream()).mean(),
    }
    for best, loss in losses.items():
        with torch.no_grad():
            a.fill_(best)
        (slope,) = torch.autograd.grad(loss(), a)
        assert abs(float(slope)) < 0.02


def test_slices_average_to_the_exact_trace() -> None:
    matrix = torch.randn(3, 3, dtype=torch.float64)

    def score(x: Tensor) -> Tensor:
        return torch.tanh(x @ matrix.T)

    x = torch.randn(5, 3, dtype=torch.float64)
    exact = score_matching(score, x)
    sliced = sliced_score_matching(score, x, stream(), directions=4000)
    assert torch.allclose(sliced, exact, atol=0.15)


# The trainer and the recipes -------------------------------------------------------------------------------------


def test_a_compiled_loss_draws_the_same_levels() -> None:
    """The trainer draws the noise of a compiled loss beforehand: the same values, levels over the batch among them."""
    from likely.training.stepper import _Drawn, _Noting

    model, x = VDM.tiny(Binary((2, 3))), torch.ones(16, 2, 3)
    noting = _Noting(stream(4))
    with torch.no_grad():
        noted = model.loss(x, None, noting).value
        assert ("stratified", (16,)) in noting.wanted
        noise = stream(4)
        drawn = _Drawn([getattr(noise, kind)(shape) for kind, shape in noting.wanted])
        assert torch.equal(model.loss(x, None, drawn).value, noted)
        assert torch.equal(model.loss(x, None, stream(4)).value, noted)


@pytest.mark.parametrize("recipe", ["vdm_toy", "weighted_elbo"])
def test_recipes_run(recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    papers = Path(__file__).parent.parent / "papers"
    monkeypatch.syspath_prepend(str(papers))
    monkeypatch.setattr("sys.argv", [f"{recipe}.py", "--dry-run"])
    runpy.run_path(str(papers / f"{recipe}.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("# ")
