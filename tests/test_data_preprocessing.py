"""Transforms: log-determinants against autograd, inverses, mass and integrals, and the model that wears them."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from likely import models
from likely.contract import (
    Binary,
    Bound,
    Column,
    Counts,
    Integers,
    Loss,
    Model,
    Reals,
    Table,
    Unsupported,
)
from likely.data import (
    Dequantise,
    Log,
    Log1p,
    Logit,
    Preprocessed,
    Standardise,
    build_transform,
)
from likely.noise import KeyedNoise, StreamNoise, content_keys


class Normal(Model):
    """A dependent Gaussian with every ability, exact."""

    spaces = (Reals,)
    conditional = True
    latent_dim = 2

    def __init__(self, space, condition=None, *, mean=0.5, deviation=1.5, correlation=0.6):
        super().__init__(space, condition)
        self.mean = nn.Parameter(torch.full((space.dims,), float(mean), dtype=torch.float64))
        covariance = deviation**2 * ((1 - correlation) * torch.eye(space.dims) + correlation)
        self.register_buffer("covariance", covariance.double())

    def law(self):
        return torch.distributions.MultivariateNormal(self.mean, self.covariance)

    def bound(self, x, condition=None, noise=None):
        rows = x.double().flatten(1)
        seen = ~torch.isnan(rows)
        rows = torch.where(seen, rows, self.mean)
        cells = torch.distributions.Normal(self.mean, self.covariance.diagonal().sqrt()).log_prob(rows)
        return Bound("exact", {"density": self.law().log_prob(rows) if seen.all() else (cells * seen).sum(1)})

    def sample(self, n, condition=None, noise=None):
        draw = noise.normal((n, self.space.dims)).double()
        return (self.mean + draw @ torch.linalg.cholesky(self.covariance).T).reshape(n, *self.space.shape)

    def encode(self, x, condition=None):
        return x.flatten(1)[:, :2]

    def decode(self, z, condition=None, noise=None):
        return z.repeat(1, self.space.dims)[:, : self.space.dims].reshape(-1, *self.space.shape)

    def impute(self, x, condition=None, noise=None, draws=1):
        return torch.where(torch.isnan(x), torch.full_like(x, 1.25), x).expand(draws, *x.shape)

    def column_nats(self, x, condition=None, noise=None):
        cells = torch.distributions.Normal(self.mean, self.covariance.diagonal().sqrt()).log_prob(x.flatten(1))
        return cells.reshape(x.shape)


def keyed(x, seed=0):
    return KeyedNoise(seed, content_keys(x))


def gaussian_integral(model, low, high):
    """Mass that the model's normal law has in a box, by scipy."""
    law = model.law()
    return stats.multivariate_normal(law.mean.detach().numpy(), law.covariance_matrix.numpy()).cdf(
        np.full(model.space.dims, high), lower_limit=np.full(model.space.dims, low)
    )


def fitted(transform, x):
    transform.attach(Reals(tuple(x.shape[1:])))
    transform.fit([x[:7], x[7:]])
    return transform


POSITIVE = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)).double() * 5 + 0.01
CONTINUOUS = {
    "standardise": lambda: fitted(Standardise(), POSITIVE),
    "standardise all": lambda: fitted(Standardise(per_cell=False), POSITIVE),
    "log": Log,
    "log1p": Log1p,
    "logit": lambda: Logit(0.0, 6.0, alpha=0.01),
    "logit tight": lambda: Logit(-1.0, 5.02, alpha=1e-6),
    "dequantise": lambda: Dequantise(Integers((3,), levels=9)),
}


@pytest.mark.parametrize("name", CONTINUOUS)
def test_log_determinants_are_those_of_autograd(name):
    transform = CONTINUOUS[name]()
    y, log_det = transform(POSITIVE, keyed(POSITIVE))
    assert y.dtype == log_det.dtype == torch.float64
    for row in range(5):
        x = POSITIVE[row : row + 1]
        jacobian = torch.autograd.functional.jacobian(lambda v, x=x: transform(v, keyed(x))[0], x)[0, :, 0]
        assert torch.equal(jacobian, torch.diag(jacobian.diagonal()))
        assert torch.allclose(jacobian.diagonal().log(), log_det[row], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in CONTINUOUS if name != "dequantise"])
def test_inverses(name):
    transform = CONTINUOUS[name]()
    y, _ = transform(POSITIVE, keyed(POSITIVE))
    assert torch.allclose(transform.inverse(y), POSITIVE, rtol=1e-9, atol=1e-10)


def test_missing_cells_stay_missing_and_add_nothing():
    x = POSITIVE.clone()
    x[::3, 1] = math.nan
    for name, make in CONTINUOUS.items():
        transform = make()
        y, log_det = transform(x, keyed(x))
        assert torch.equal(y.isnan(), x.isnan()), name
        assert (log_det[x.isnan()] == 0).all() and torch.isfinite(log_det).all(), name
        assert torch.equal(transform.inverse(y).isnan(), x.isnan()), name


def test_standardise_has_the_moments_of_all_batches():
    x = POSITIVE.clone()
    x[4, 0] = math.nan
    x[:, 2] = 3.0
    transform = fitted(Standardise(), x)
    observed = x.numpy()
    assert np.allclose(transform.mean.numpy(), np.nanmean(observed, 0), rtol=1e-12)
    assert np.allclose(transform.scale.numpy()[:2], np.nanstd(observed, 0)[:2], rtol=1e-12)
    assert transform.scale[2] == 1, "a cell that does not vary"
    together = fitted(Standardise(per_cell=False), x)
    assert together.mean.item() == pytest.approx(np.nanmean(observed)) and together.mean.shape == ()
    assert together.scale.item() == pytest.approx(np.nanstd(observed))


def test_dequantised_values_stay_in_their_bin_and_fill_it():
    space = Table(columns=(Column("r", "real", resolution=0.1), Column("i", "integer", resolution=5.0),
                           Column("c", "categorical", levels=3), Column("x", "real")))  # fmt: skip
    transform = Dequantise(space)
    x = torch.tensor([[0.3, -10.0, 2.0, 0.123]]).double().repeat(5000, 1)
    y, log_det = transform(x, StreamNoise(torch.Generator().manual_seed(0)))
    fraction = ((y - x) / torch.tensor([0.1, 5.0, 1.0, 1.0])).numpy()
    for column in range(3):
        assert stats.kstest(fraction[:, column], "uniform").pvalue > 1e-3
    assert (fraction[:, 3] == 0).all()
    assert torch.allclose(log_det[0], torch.tensor([math.log(0.1), math.log(5.0), 0.0, 0.0]).double())
    assert torch.allclose(transform.inverse(y), x, atol=1e-12)
    space.validate(transform.inverse(y))
    outside = transform.inverse(torch.tensor([[0.3, 0.0, 7.7, 0.0], [0.3, 0.0, -0.1, 0.0]]))
    assert outside[:, 2].tolist() == [2, 0], "codes outside the space go to the nearest"


GRIDS = {
    "binary": (Binary((2,)), 0, 2),
    "integers": (Integers((2,), levels=4), 0, 4),
    "counts": (Counts((2,)), 0, 15),
}


@pytest.mark.parametrize("name", GRIDS)
def test_the_exact_mass_is_that_of_the_bins(name):
    """Averaged over the noise, exp of the bound of a cell is ∫ over its bin: the masses sum to that of the box."""
    space, low, high = GRIDS[name]
    inner = Normal(Reals((2,)), mean=1.5 if high > 2 else 0.5)
    model = Preprocessed(inner, Dequantise(space))
    points = torch.tensor(list(itertools.product(range(low, high), repeat=2))).double()
    nodes = torch.tensor(list(itertools.product((np.arange(24) + 0.5) / 24, repeat=2)))
    densities = inner.bound((points[:, None] + nodes).reshape(-1, 2)).nats.exp().reshape(len(points), -1)
    total = densities.mean(1).sum().item()
    assert total == pytest.approx(gaussian_integral(inner, low, high), abs=2e-3)
    bound = model.bound(points, noise=keyed(points))
    assert bound.kind == "lower bound" and list(bound.parts) == ["density"]
    # Importance weights, averaged over many draws from the bin, are the mass of the bin.
    noise = StreamNoise(torch.Generator().manual_seed(1))
    weights = model.log_weights(points.repeat(100, 1), samples=40, noise=noise)
    weights = weights.reshape(100, len(points), 40).transpose(0, 1).flatten(1)
    assert torch.allclose(weights.exp().mean(1), densities.mean(1), rtol=0.1, atol=2e-4)
    # Jensen: the mean bound lies below, for every example.
    assert (weights.mean(1) <= densities.mean(1).log() + 0.02).all()


def test_a_grid_of_another_width_has_the_mass_of_its_bins():
    space = Table(columns=(Column("a", "real", resolution=0.5), Column("b", "real", resolution=0.25)))
    inner = Normal(Reals((2,)), mean=0.0, deviation=0.7)
    model = Preprocessed(inner, Dequantise(space))
    points = torch.tensor(list(itertools.product(np.arange(-4, 4, 0.5), np.arange(-4, 4, 0.25))))
    noise = StreamNoise(torch.Generator().manual_seed(0))
    masses = model.log_weights(points, samples=200, noise=noise).exp().mean(1)
    assert masses.sum().item() == pytest.approx(1.0, abs=0.02)
    bound = model.bound(points, noise=noise)
    assert torch.allclose(bound.parts["dequantise"], torch.tensor(math.log(0.5 * 0.25)).double())
    assert bound.nats.exp().sum().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize(
    "transforms, low, high",
    [
        (lambda: [Logit(-1.0, 3.0, alpha=0.05)], -1.0, 3.0),
        (lambda: [Log()], 0.0, 400.0),
        (lambda: [Log1p()], -1.0, 400.0),
        (lambda: [fitted(Standardise(), POSITIVE[:, :1])], -30.0, 30.0),
        (lambda: [Log1p(), Log1p(), fitted(Standardise(), POSITIVE[:, :1])], -0.6, 4000.0),
    ],
    ids=["logit", "log", "log1p", "standardise", "chain"],
)
def test_densities_integrate_to_one(transforms, low, high):
    """Simpson's rule over the whole domain; the logit's ends cut off the mass that lies beyond them."""
    inner = Normal(Reals((1,)), mean=0.2, deviation=0.6)
    model = Preprocessed(inner, *transforms())
    edge = 1e-9
    if high > 100:
        grid = low + torch.logspace(-9, math.log10(high - low), 200_001, dtype=torch.float64)
    else:
        grid = torch.linspace(low + edge, high - edge, 200_001, dtype=torch.float64)
    density = model.bound(grid[:, None]).nats.exp().detach()
    integral = torch.trapezoid(density, grid).item()
    ends = model.transform(grid[[0, -1], None], keyed(grid[:2, None]))[0].flatten()
    expected = stats.norm(0.2, 0.6).cdf(ends[1].item()) - stats.norm(0.2, 0.6).cdf(ends[0].item())
    assert integral == pytest.approx(expected, abs=1e-6)
    assert model.bound(grid[1:2, None]).kind == "exact"


def test_eight_bit_images_behind_logit_and_standardise_keep_their_units():
    """A hand-computed value: uniform dequantisation, s = α + (1 − 2α)(x + u)/256, logit, (y − m)/s, normal law."""
    torch.manual_seed(0)
    x = torch.randint(0, 256, (6, 1, 2, 2)).double()
    alpha = 0.05
    inner = Normal(Reals((1, 2, 2)), mean=0.1, deviation=0.9, correlation=0.3)
    model = Preprocessed(inner, Dequantise(Integers((1, 2, 2), 256)), Logit(0, 256, alpha=alpha), Standardise())
    model.initialise([(x[:2], None), (x[2:], None)])
    bound = model.bound(x, noise=keyed(x, 3))
    u = keyed(x, 3).uniform(x.shape).double().numpy()
    s = alpha + (1 - 2 * alpha) * (x.numpy() + u) / 256
    y = np.log(s) - np.log1p(-s)
    standard = model.transforms[2]
    z = (y - standard.mean.numpy()) / standard.scale.numpy()
    law = stats.multivariate_normal(np.full(4, 0.1), inner.covariance.numpy())
    expected = law.logpdf(z.reshape(6, 4))
    expected = expected + (math.log(0.9 / 256) - np.log(s) - np.log1p(-s) - np.log(standard.scale.numpy())).sum(
        (1, 2, 3)
    )
    assert np.allclose(bound.nats.detach().numpy(), expected, rtol=1e-12)
    assert set(bound.parts) == {"density", "logit", "standardise"}
    cells = model.column_nats(x, noise=keyed(x, 3))
    single = stats.norm(0.1, 0.9).logpdf(z.reshape(6, 4)).sum(1)
    assert np.allclose(cells.flatten(1).sum(1).detach(), expected - law.logpdf(z.reshape(6, 4)) + single)


def test_samples_lie_in_the_space_and_have_the_frequencies_of_the_bins():
    space = Integers((1,), levels=6)
    inner = Normal(Reals((1,)), mean=0.0, deviation=1.0)
    model = Preprocessed(inner, Dequantise(space), Logit(0, 6, alpha=0.02))
    x = model.sample(20_000, noise=StreamNoise(torch.Generator().manual_seed(0)))
    space.validate(x)
    edges, _ = model.transforms[1](torch.arange(7).double()[:, None], keyed(torch.arange(7.0)[:, None]))
    cumulative = stats.norm.cdf(edges.flatten().numpy())
    cumulative[0], cumulative[-1] = 0, 1  # what lies beyond the ends goes to the nearest code
    expected = np.diff(cumulative)
    observed = np.bincount(x.flatten().long().numpy(), minlength=6)
    assert stats.chisquare(observed, expected * 20_000).pvalue > 1e-3


def test_the_abilities_of_the_model_within_shine_through():
    space = Table(columns=(Column("a", "integer", missing=True), Column("b", "binary", missing=True)))
    model = Preprocessed(Normal(Reals((2,), missing=True)), Dequantise(space), Standardise())
    x = torch.tensor([[3.0, 1.0], [5.0, math.nan], [math.nan, 0.0], [9.0, 1.0]]).double()
    model.initialise([(x, None)])
    imputed = model.impute(x, draws=3, noise=keyed(x))
    assert imputed.shape == (3, 4, 2) and not imputed.isnan().any()
    assert (imputed[:, ~x.isnan()] == x[~x.isnan()]).all()
    for draw in imputed:
        space.validate(draw)
    full = x.nan_to_num(0.0)
    code = model.encode(full)
    centred = (full + 0.5 - model.transforms[1].mean) / model.transforms[1].scale
    assert torch.equal(code, centred)
    space.validate(model.decode(code))
    assert model.latent_dim == 2
    bound = model.bound(x, noise=keyed(x))
    alone = model.bound(x[1:2], noise=keyed(x[1:2]))
    assert torch.equal(bound.nats[1:2], alone.nats)

    class Plain(Model):
        spaces = (Reals,)

        def bound(self, x, condition=None, noise=None):
            return Bound("lower bound", {"a": x.sum(1)})

    plain = Preprocessed(Plain(Reals((2,))), Standardise())
    assert not any(plain.can(a) for a in ("encode", "decode", "impute", "column_nats", "log_weights"))
    shy = Preprocessed(Plain(Reals((2,))), Dequantise(Integers((2,), 3)))
    with pytest.raises(Unsupported, match="has no importance weights"):
        shy.log_weights(torch.zeros(1, 2), samples=2)


def test_the_loss_is_that_of_the_model_within_less_the_log_determinants():
    class Weighted(Normal):
        def loss(self, x, condition=None, noise=None, step=0):
            return Loss(step * x.double().square().mean(), {"step": torch.tensor(float(step))})

    x = POSITIVE
    model = Preprocessed(Weighted(Reals((3,))), Log())
    loss = model.loss(x, step=4)
    y = x.log()
    assert loss.value.item() == pytest.approx((4 * y.square().mean() + y.mean()).item(), rel=1e-12)
    assert loss.log["step"] == 4 and loss.log["log"].item() == pytest.approx(-y.sum(1).mean().item())
    plain = Preprocessed(Normal(Reals((3,))), Log())
    value = plain.loss(x).value
    assert value.item() == pytest.approx(-plain.bound(x).nats.mean().item() / 3)
    value.backward()
    assert torch.isfinite(plain.model.mean.grad).all() and plain.model.mean.grad.abs().sum() > 0


def test_a_closed_form_model_is_estimated_on_the_transformed_data():
    x = torch.exp(torch.randn(4000, 2, generator=torch.Generator().manual_seed(0)).double() @ torch.tensor(
        [[0.5, 0.2], [0.0, 0.3]]
    ).double() + 1)  # fmt: skip
    gaussian = models.find("gaussian")
    model = Preprocessed(gaussian(Reals((2,)), shrinkage=0.0), Log())
    assert model.closed_form
    seen = []
    batches = [(x[:1000], None), (x[1000:], None)]
    model.estimate(batches, lambda number, nats: seen.append(nats))
    law = stats.multivariate_normal(np.log(x.numpy()).mean(0), np.cov(np.log(x.numpy()).T, bias=True))
    expected = law.logpdf(np.log(x.numpy())) - np.log(x.numpy()).sum(1)
    bound = model.bound(x)
    assert bound.kind == "exact" and np.allclose(bound.nats.numpy(), expected, atol=1e-6)
    if seen and np.isfinite(seen[-1]):
        assert seen[-1] == pytest.approx(expected.mean(), abs=1e-3)


def test_saved_and_rebuilt_to_the_bit():
    space = Integers((1, 2, 2), 8)
    gaussian = models.find("gaussian")
    x = torch.randint(0, 8, (200, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    model = Preprocessed(gaussian(Reals((1, 2, 2))), Dequantise(space), Logit(0, 8, alpha=0.05), Standardise(False))
    model.estimate([(x, None)])
    description = json.loads(json.dumps(models.describe(model)))
    again = models.build(description)
    assert models.describe(again) == description and again.space == space
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.bound(x, noise=keyed(x)).nats, model.bound(x, noise=keyed(x)).nats)
    with pytest.raises(ValueError, match="preprocessed: expected a model over"):
        models.build({**description, "space": Integers((1, 2, 2), 9).to_json()})


def test_what_cannot_be_composed_says_so():
    with pytest.raises(Unsupported, match="dequantise: expected a model over Reals"):
        Preprocessed(Normal(Reals((3,))), Dequantise(Integers((2,), 4)))
    with pytest.raises(Unsupported, match="transform 'log' ends in Reals, got Integers"):
        Preprocessed(Normal(Reals((2,))), Log(), Dequantise(Integers((2,), 4)))
    with pytest.raises(Unsupported, match="dequantise: expected Binary, Integers, Counts or Table, got Reals"):
        Dequantise(Reals((2,)))
    with pytest.raises(ValueError, match=r"log: x\[1, 0\]: expected a positive number, got 0"):
        Log()(torch.tensor([[1.0], [0.0]]), keyed(torch.zeros(2, 1)))
    with pytest.raises(ValueError, match=r"logit: x\[0, 0\]: expected a number from 0 to 1, got 1\.5"):
        Logit()(torch.tensor([[1.5]]), keyed(torch.zeros(1, 1)))
    with pytest.raises(ValueError, match=r"transform: expected one of 'dequantise', .*, got 'logits'"):
        build_transform("logits")
    with pytest.raises(ValueError, match="has no option 'alfa'; did you mean 'alpha'"):
        build_transform({"transform": "logit", "alfa": 0.1})
    with pytest.raises(ValueError, match=r"alpha: expected a number between 0 and 0\.5"):
        Logit(alpha=0.5)
