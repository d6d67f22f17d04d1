"""The closed-form models against independent oracles: scipy, scikit-learn, enumeration and plain linear algebra."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.covariance import ledoit_wolf
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from torch import Tensor

from likely.contract import (
    Binary,
    Column,
    Counts,
    Integers,
    Model,
    Reals,
    Space,
    Table,
    Tokens,
    Unsupported,
)
from likely.data import Dataset, Preprocessed, Standardise
from likely.distributions.grid_normal import cell_moments, log_cell_mass
from likely.models import build, describe, find, mixture, names
from likely.models.gaussian import Gaussian
from likely.models.independent import Independent, concentration, smooth
from likely.models.mixture import Mixture
from likely.noise import StreamNoise
from likely.training import TrainOptions, train

MIXED = Table(
    columns=(
        Column("height", "real", resolution=0.5, missing=True),
        Column("age", "integer", missing=True),
        Column("colour", "categorical", levels=3, missing=True),
        Column("smoker", "binary"),
        Column("weight", "real", missing=True),
    )
)


def stream(seed: int = 0) -> StreamNoise:
    return StreamNoise(torch.Generator().manual_seed(seed))


def fed(x: Tensor | np.ndarray, condition: Tensor | None = None, size: int = 100) -> list[tuple[Tensor, Tensor | None]]:
    """The data in batches, the last one smaller."""
    x = torch.as_tensor(x)
    return [(x[i : i + size], None if condition is None else condition[i : i + size]) for i in range(0, len(x), size)]


def every(space: Space) -> Tensor:
    """All examples of a small space of codes."""
    levels = space.vocab if isinstance(space, Tokens) else getattr(space, "levels", 2)
    return torch.tensor(list(itertools.product(range(levels), repeat=space.dims))).reshape(-1, *space.shape)


def holed(x: Tensor, share: float = 0.3, seed: int = 0) -> Tensor:
    holes = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed)) < share
    return torch.where(holes, math.nan, x.double())


# ------------------------------------------------------------------------------------------------ discovery


def test_names_and_find() -> None:
    assert {"independent", "gaussian", "mixture"} <= set(names())
    assert find("gaussian") is Gaussian and Gaussian.name() == "gaussian"
    with pytest.raises(ValueError, match="no model 'gausian'; did you mean 'gaussian'"):
        find("gausian")


def test_build_is_the_inverse_of_describe() -> None:
    model = Gaussian(MIXED, Integers((1,), 3), passes=7)
    twin = build(describe(model))
    assert twin.space == MIXED and twin.condition == Integers((1,), 3) and twin.config == model.config
    with pytest.raises(ValueError, match="lacks"):
        build({"model": "gaussian"})


# --------------------------------------------------------------------------------------------- normal cells


def test_cell_mass_and_moments_against_quadrature() -> None:
    for centre, width in [(0.3, 2.0), (-3.0, 0.1), (7.0, 1.0), (-12.0, 0.01), (20.0, 3.0), (1.0, 4e-3), (30.0, 1e-5)]:
        nodes, weights = np.polynomial.legendre.leggauss(200)
        t = centre + 0.5 * width * nodes
        shape = np.exp(0.5 * min(abs(centre - width / 2), abs(centre + width / 2)) ** 2 * (abs(centre) > width / 2))
        density = shape * np.exp(-0.5 * t**2) * weights * 0.5 * width
        offset = math.log(shape) + 0.5 * math.log(2 * math.pi)
        arguments = [torch.tensor(v, dtype=torch.float64) for v in (5 + 2 * centre, 5.0, 2.0, 2 * width)]
        assert log_cell_mass(*arguments).item() == pytest.approx(math.log(density.sum()) - offset, rel=1e-9)
        first, second = cell_moments(*arguments)
        assert first.item() == pytest.approx((density * t).sum() / density.sum(), rel=1e-9)
        assert second.item() == pytest.approx((density * t**2).sum() / density.sum(), rel=1e-8)
        variance = (density * (t - first.item()) ** 2).sum() / density.sum()
        assert second.item() - first.item() ** 2 == pytest.approx(variance, rel=1e-3, abs=1e-12)


def test_cell_mass_has_finite_gradients() -> None:
    x = torch.tensor([0.0, 1e-3, 50.0, -900.0], dtype=torch.float64)
    mean = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for width in (1e-9, 1.0):
        log_cell_mass(x, mean, torch.ones(4).double(), torch.tensor(width).double()).sum().backward()
        assert mean.grad is not None and torch.isfinite(mean.grad).all()


# ---------------------------------------------------------------------------------------------- independent


@pytest.mark.parametrize("space", [Binary((3,)), Integers((2, 2), 3), Tokens(3, 4)], ids=str)
def test_independent_codes_have_mass_one_and_the_right_entropy(space: Space) -> None:
    generator = np.random.default_rng(1)
    levels = getattr(space, "levels", getattr(space, "vocab", 2))
    law = generator.dirichlet(np.ones(levels), size=space.dims)
    x = np.stack([generator.choice(levels, size=20_000, p=p) for p in law], 1).reshape(-1, *space.shape)
    model = Independent(space)
    model.estimate(fed(x))
    assert model.bound(every(space)).nats.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    entropy = sum(scipy.stats.entropy(p) for p in law)
    fresh = np.stack([generator.choice(levels, size=20_000, p=p) for p in law], 1).reshape(-1, *space.shape)
    nats = model.bound(torch.as_tensor(fresh)).nats
    error = nats.std().item() / math.sqrt(len(nats))
    assert -nats.mean().item() == pytest.approx(entropy, abs=4 * error + 1e-3)


def test_smoothing_by_hand_and_by_leaving_one_out() -> None:
    # One cell, two levels, all training cells equal: alpha has its least value 1, which is Krichevsky-Trofimov.
    assert smooth(torch.tensor([[9.0, 0.0]]).double())[0].tolist() == pytest.approx([9.5 / 10, 0.5 / 10])
    counts = np.array([7, 3, 1, 1, 0, 0, 2, 1])
    base = np.full(8, 1 / 8)

    def left_out(alpha: float) -> float:
        cells = np.repeat(np.arange(8), counts)
        return sum(
            math.log((np.delete(cells, i) == v).sum() + alpha * base[v]) - math.log(len(cells) - 1 + alpha)
            for i, v in enumerate(cells)
        )

    grid = 2.0 ** (0.5 * np.arange(61))
    expected = grid[np.argmax([left_out(a) for a in grid])]
    assert concentration(torch.tensor(counts).double(), torch.tensor(base), 0.0).item() == pytest.approx(expected)


def test_pooling_borrows_strength_between_cells() -> None:
    """30 examples of 8-bit cells: smoothing towards the pool beats adding one count a level."""
    generator = np.random.default_rng(2)
    x = np.minimum(generator.poisson(20, size=(1030, 50)), 255)
    model = Independent(Integers((50,), 256))
    model.estimate(fed(x[:30]))
    ours = model.bound(torch.as_tensor(x[30:])).nats.mean().item()
    counts = np.stack([np.bincount(column, minlength=256) for column in x[:30].T])
    laplace = np.log((counts + 1) / (30 + 256))[np.arange(50), x[30:]].sum(1).mean()
    truth = scipy.stats.poisson(20).logpmf(x[30:]).sum(1).mean()
    assert laplace < ours < truth
    assert truth - ours < 0.2 * (truth - laplace)


@pytest.mark.parametrize("cap", [4096, 70])
def test_independent_grid_columns_have_mass_one(cap: int) -> None:
    """The sum over the whole grid is 1, also when there are more distinct values than the histogram keeps."""
    generator = np.random.default_rng(3)
    columns = (Column("price", "real", resolution=0.25), Column("count", "integer"))
    price = np.round(generator.normal(10, 8, 3000) * 4) / 4
    count = np.where(generator.random(3000) < 0.7, 0, generator.geometric(0.01, 3000))
    model = Independent(Table(columns=columns), values=cap)
    model.estimate(fed(np.stack([price, count], 1)))
    k = torch.arange(-20_000, 20_000, dtype=torch.float64)
    mass = model.column_nats(torch.stack([k * 0.25, k], 1)).exp().sum(0)
    assert mass.tolist() == pytest.approx([1.0, 1.0], abs=1e-9)


def test_independent_numbers_reach_the_entropy_of_known_sources() -> None:
    generator = np.random.default_rng(4)
    n = 12_000
    columns = (
        Column("normal", "real"),
        Column("rounded", "real", resolution=0.1),
        Column("die", "integer"),
        Column("two", "real"),
    )

    def draw() -> np.ndarray:
        sign = np.where(generator.random(n) < 0.5, -1, 1)
        return np.stack(
            [
                generator.normal(1000, 3, n),
                np.round(generator.normal(0, 2, n) * 10) / 10,
                generator.choice([1.0, 2, 3, 40, 500], n),
                sign * 100 + generator.normal(0, 1, n),
            ],
            1,
        )

    model = Independent(Table(columns=columns))
    model.estimate(fed(draw(), size=1000))
    nats = model.column_nats(torch.as_tensor(draw()))
    half = 0.5 * math.log(2 * math.pi * math.e)
    entropy = np.array([half + math.log(3), half + math.log(2) - math.log(0.1), math.log(5), half + math.log(2)])
    error = nats.std(0).numpy() / math.sqrt(n)
    assert np.all(np.abs(-nats.mean(0).numpy() - entropy) < 4 * error + 0.01)


def test_independent_counts_have_mass_one_and_no_count_is_impossible() -> None:
    generator = np.random.default_rng(5)
    x = np.stack([generator.poisson(4, 4000), generator.negative_binomial(0.5, 0.02, 4000), np.zeros(4000)], 1)
    model = Independent(Counts((3,)))
    model.estimate(fed(x))
    k = torch.arange(50_000).unsqueeze(1).expand(-1, 3)
    mass = model.column_nats(k).exp().sum(0)
    assert mass.tolist() == pytest.approx([1.0] * 3, abs=1e-9)
    fresh = torch.as_tensor(np.stack([generator.poisson(4, 4000), generator.negative_binomial(0.5, 0.02, 4000)], 1))
    nats = model.column_nats(torch.cat([fresh, torch.zeros(4000, 1)], 1))
    truth = np.stack([scipy.stats.poisson(4).logpmf(fresh[:, 0]), scipy.stats.nbinom(0.5, 0.02).logpmf(fresh[:, 1])], 1)
    assert (truth - nats[:, :2].numpy()).mean(0) == pytest.approx([0.0, 0.0], abs=0.02)
    assert torch.isfinite(model.bound(torch.tensor([[10**6, 10**6, 10**6]])).nats).all()


def test_independent_does_not_depend_on_the_batches() -> None:
    x = holed(Independent.tiny(MIXED).sample(700, noise=stream()))
    x[:, 3] = x[:, 3].nan_to_num(0.0)
    one, other = Independent(MIXED), Independent(MIXED)
    one.estimate(fed(x, size=700))
    other.estimate(fed(x, size=64))
    assert torch.allclose(one.bound(x).nats, other.bound(x).nats, rtol=1e-9)


def test_independent_outlier_costs_a_length_linear_in_its_distance() -> None:
    generator = np.random.default_rng(6)
    model = Independent(Reals((1,)))
    model.estimate(fed(generator.normal(size=(5000, 1))))
    near, far = model.bound(torch.tensor([[1e3], [2e3]])).nats.tolist()
    assert near - far == pytest.approx(1000 * math.pi / math.sqrt(3), rel=0.05)


# ------------------------------------------------------------------------------------------------- gaussian


def linear_data(n: int, d: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return generator.normal(size=(n, d)) @ generator.normal(size=(d, d)) * np.linspace(1, 20, d) + 100.0


def test_gaussian_is_scipy_s_multivariate_normal() -> None:
    x = linear_data(500, 4)
    model = Gaussian(Reals((2, 2)), shrinkage=0.0)
    model.estimate(fed(x.reshape(-1, 2, 2)))
    law = scipy.stats.multivariate_normal(x.mean(0), np.cov(x.T, bias=True))
    bound = model.bound(torch.as_tensor(x).reshape(-1, 2, 2))
    assert bound.kind == "exact"
    assert bound.nats.numpy() == pytest.approx(law.logpdf(x), rel=1e-6)
    white = model.encode(torch.as_tensor(x).reshape(-1, 2, 2))
    assert (white.T @ white / len(x)).numpy() == pytest.approx(np.eye(4), abs=1e-6)


def test_gaussian_shrinks_as_ledoit_and_wolf() -> None:
    x = linear_data(40, 30, seed=1)
    standard = (x - x.mean(0)) / x.std(0)
    expected, _ = ledoit_wolf(standard, assume_centered=True)
    model = Gaussian(Reals((30,)))
    model.estimate(fed(x))
    assert model.law.covariance().numpy() == pytest.approx(expected, abs=1e-7)


def test_ppca_is_tipping_and_bishop_s_closed_form() -> None:
    x = linear_data(400, 6, seed=2)
    model = Gaussian(Reals((6,)), rank=2)
    model.estimate(fed(x))
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    noise = values[:4].mean()
    weights = vectors[:, 4:] * np.sqrt(values[4:] - noise)
    law = scipy.stats.multivariate_normal(x.mean(0), weights @ weights.T + noise * np.eye(6))
    t = torch.as_tensor(x)
    assert model.bound(t).nats.numpy() == pytest.approx(law.logpdf(x), rel=1e-9)
    # scikit-learn divides by n - 1
    pca = PCA(2).fit(x)
    assert pca.score(x) == pytest.approx(model.bound(t).nats.mean().item(), abs=1e-3)
    posterior = np.linalg.solve(weights.T @ weights + noise * np.eye(2), weights.T @ (x - x.mean(0)).T).T
    z = model.encode(t).numpy()
    assert z @ z.T == pytest.approx(posterior @ posterior.T, abs=1e-8)  # unique up to a rotation


def test_subspace_iteration_finds_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    x = generator.normal(size=(300, 4)) @ generator.normal(size=(4, 40)) + 0.3 * generator.normal(size=(300, 40))
    direct = Gaussian(Reals((40,)), rank=4)
    direct.estimate(fed(x))
    monkeypatch.setattr("likely.models.gaussian._LARGEST_FULL", 10)
    streamed = Gaussian(Reals((40,)), rank=4)
    streamed.estimate(fed(x))
    assert streamed.bound(torch.as_tensor(x)).nats.numpy() == pytest.approx(
        direct.bound(torch.as_tensor(x)).nats.numpy(), rel=1e-4
    )


@pytest.mark.parametrize("rank", [None, 2])
def test_gaussian_missing_cells_are_integrated_out(rank: int | None) -> None:
    x = linear_data(300, 5, seed=4)
    space = Reals((5,), missing=True)
    model = Gaussian(space, rank=rank)
    model.estimate(fed(x))
    sigma = dense(model)
    mean = model.shift.numpy() + model.coefficients[:, 0].numpy() * model.scale.numpy()
    holes = holed(torch.as_tensor(x[:60]), 0.5)
    nats, filled, cells = model.bound(holes).nats, model.impute(holes), model.column_nats(holes)
    assert model.impute(holes, draws=3).shape == (3, 60, 5)
    for i, row in enumerate(holes.numpy()):
        o, m = ~np.isnan(row), np.isnan(row)
        law = scipy.stats.multivariate_normal(mean[o], sigma[np.ix_(o, o)]) if o.any() else None
        assert nats[i].item() == pytest.approx(law.logpdf(row[o]) if law else 0.0, abs=1e-8)
        gain = sigma[np.ix_(m, o)] @ np.linalg.inv(sigma[np.ix_(o, o)]) if o.any() else np.zeros((m.sum(), 0))
        assert filled[i].numpy()[m] == pytest.approx(mean[m] + gain @ (row[o] - mean[o]), rel=1e-9)
        assert cells[i].sum().item() == pytest.approx(nats[i].item(), abs=1e-9)
        for j, other in itertools.pairwise(np.flatnonzero(o)):  # what a cell adds, up to the common share of the rest
            without = []
            for left_out in (j, other):
                rest = o.copy()
                rest[left_out] = False
                less = scipy.stats.multivariate_normal(mean[rest], sigma[np.ix_(rest, rest)])
                without.append(less.logpdf(row[rest]))
            assert (cells[i, j] - cells[i, other]).item() == pytest.approx(without[1] - without[0], abs=1e-7)


def dense(model: Gaussian) -> np.ndarray:
    """The covariance in raw units."""
    sigma = model.law.covariance()
    return (sigma * model.scale.unsqueeze(0) * model.scale.unsqueeze(1)).numpy()


def test_gaussian_imputations_have_the_conditional_law() -> None:
    x = linear_data(500, 3, seed=5)
    for rank in (None, 1):
        model = Gaussian(Reals((3,), missing=True), rank=rank)
        model.estimate(fed(x))
        row = torch.tensor([[math.nan, 110.0, math.nan]]).double()
        drawn = model.impute(row.expand(4000, 3), noise=stream(), draws=1)[0].numpy()
        sigma, mean = dense(model), x.mean(0)
        gain = sigma[[0, 2], 1] / sigma[1, 1]
        covariance = sigma[np.ix_([0, 2], [0, 2])] - np.outer(gain, gain) * sigma[1, 1]
        error = np.sqrt(np.diag(covariance) / 4000)
        assert np.all(np.abs(drawn[:, [0, 2]].mean(0) - mean[[0, 2]] - gain * (110 - mean[1])) < 4 * error)
        assert np.cov(drawn[:, [0, 2]].T) == pytest.approx(covariance, rel=0.15, abs=0.05 * covariance.max())


@pytest.mark.parametrize("build", [Gaussian, Mixture, lambda space: Preprocessed(Gaussian(space), Standardise())])
def test_em_ends_where_the_report_says_so(build: Any) -> None:
    """With what it has, which is a model like any other; `train` says so when the budget is used up."""
    x = holed(torch.as_tensor(np.random.default_rng(9).normal(size=(300, 3))), 0.2)
    space = Reals((3,), missing=True)
    heard: list[int] = []

    def report(step: int, nats: float) -> bool:
        heard.append(step)
        return math.isfinite(nats)

    model = build(space)
    model.estimate(fed(x), report)
    assert heard[-1] == 2 and model.bound(x).nats.isfinite().all()
    data = Dataset(space, x)
    result = train(build(space), data, data, TrainOptions(budget=1e-9), progress=False)
    assert math.isfinite(result.valid["nats"]) and result.stopped == "closed form"


@pytest.mark.parametrize("rank", [None, 2])
def test_em_with_missing_cells_climbs_and_finds_the_maximum(rank: int | None) -> None:
    """The likelihood never falls; at the end its gradient with respect to all parameters is zero."""
    generator = np.random.default_rng(6)
    mixing = np.eye(4) + 0.5 * generator.normal(size=(4, 4))
    x = holed(torch.as_tensor(generator.normal(size=(200, 4)) @ mixing), 0.25)
    model = Gaussian(Reals((4,), missing=True), rank=rank, shrinkage=0.0 if rank is None else None, passes=400)
    seen: list[float] = []
    model.estimate(fed(x), lambda step, nats: seen.append(nats))
    climbed = np.diff(np.array(seen[2:]))
    assert np.all(climbed > -1e-7)

    mean = (model.shift + model.coefficients[:, 0] * model.scale).clone().requires_grad_()
    law = model.law
    parameters = [law.cholesky] if hasattr(law, "cholesky") else [law.weights, law.variance]
    free = [p.clone().requires_grad_() for p in parameters]
    sigma = free[0].tril() @ free[0].tril().T if rank is None else free[0] @ free[0].T + free[1] * torch.eye(4).double()
    sigma = sigma * model.scale.unsqueeze(0) * model.scale.unsqueeze(1)
    total = torch.zeros(())
    for row in x:
        o = ~torch.isnan(row)
        if o.any():
            total = total + torch.distributions.MultivariateNormal(mean[o], sigma[o][:, o]).log_prob(row[o])
    gradients = torch.autograd.grad(total / len(x), [mean, *free])
    assert abs(float((total / len(x)).detach()) - seen[-1]) < 1e-2
    for gradient, size in zip(gradients, [model.scale, torch.ones(()), torch.ones(())]):
        assert (gradient.detach() * size).abs().max() < 2e-2


@pytest.mark.parametrize("rank", [None, 1])
@pytest.mark.parametrize("space", [Binary((3,)), Integers((3,), 4), Counts((3,))], ids=str)
def test_gaussian_on_a_grid_is_the_expected_density_and_a_bound(space: Space, rank: int | None) -> None:
    generator = np.random.default_rng(7)
    base = generator.integers(0, 2, size=(300, 1))
    x = np.where(generator.random((300, 3)) < 0.8, base, generator.integers(0, 2, size=(300, 3)))
    model = Gaussian(space, rank=rank)
    model.estimate(fed(x))
    everything = torch.tensor(list(itertools.product(range(2 if isinstance(space, Binary) else 4), repeat=3)))
    bound = model.bound(everything)
    assert bound.kind == "lower bound" and bound.nats.exp().sum() <= 1.0
    # E over uniform noise, by quadrature over each cube
    nodes, weights = np.polynomial.legendre.leggauss(3)
    law = scipy.stats.multivariate_normal(
        model.shift.numpy() + model.coefficients[:, 0].numpy() * model.scale.numpy(), dense(model)
    )
    for i, row in enumerate(everything.numpy()[:8]):
        expected = 0.0
        for place in itertools.product(range(3), repeat=3):
            point = row + 0.5 * nodes[list(place)]
            expected += np.prod(0.5 * weights[list(place)]) * law.logpdf(point)
        assert bound.nats[i].item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("rank", [None, 1])
def test_gaussian_on_a_grid_maximises_the_bound(rank: int | None) -> None:
    """Moments plus s²/12 are where the bound's gradient vanishes."""
    generator = np.random.default_rng(8)
    x = generator.poisson(3, size=(200, 1)) + generator.poisson(2, size=(200, 3))
    model = Gaussian(Integers((3,), 64), rank=rank, shrinkage=0.0 if rank is None else None)
    model.estimate(fed(x))
    best = model.bound(torch.as_tensor(x)).nats.mean().item()
    law = model.law
    names = ["cholesky"] if rank is None else ["weights", "variance"]
    for name in names:
        kept = getattr(law, name).clone()
        for factor in (0.97, 1.03):
            getattr(law, name).mul_(factor)
            if rank is None:
                law.set_covariance(law.cholesky @ law.cholesky.T)
            assert model.bound(torch.as_tensor(x)).nats.mean().item() < best
            getattr(law, name).copy_(kept)


@pytest.mark.parametrize("rank", [None, 1])
def test_conditional_gaussian_is_least_squares(rank: int | None) -> None:
    generator = np.random.default_rng(9)
    label = generator.integers(0, 3, 30_000)
    dose = generator.normal(5, 2, 30_000)
    centres = np.array([[0.0, 0.0], [5.0, -5.0], [9.0, 3.0]])
    noise = generator.normal(size=(30_000, 2)) @ np.array([[1.0, 0.7], [0.0, 0.5]])
    x = centres[label] + np.outer(dose, [2.0, -1.0]) + noise
    space = Table(columns=(Column("label", "categorical", levels=3), Column("dose", "real")))
    c = torch.as_tensor(np.stack([label, dose], 1))
    model = Gaussian(Reals((2,)), space, rank=rank, standardise=False)
    model.estimate(fed(x, c, size=5000))
    design = np.concatenate([np.eye(3)[label], dose[:, None]], 1)
    fitted = design @ np.linalg.lstsq(design, x, rcond=None)[0]
    sigma = np.cov((x - fitted).T, bias=True)
    if rank == 1:
        values, vectors = np.linalg.eigh(sigma)
        sigma = values[0] * np.eye(2) + (values[1] - values[0]) * np.outer(vectors[:, 1], vectors[:, 1])
    law = scipy.stats.multivariate_normal(np.zeros(2), sigma)
    nats = model.bound(torch.as_tensor(x), c).nats.numpy()
    assert nats == pytest.approx(law.logpdf(x - fitted), abs=0.02)
    drawn = model.sample(3, c[:3], stream()).numpy()
    assert np.all(np.abs(drawn - fitted[:3]) < 6)
    with pytest.raises(ValueError, match="condition: expected"):
        model.bound(torch.as_tensor(x))


def test_conditional_gaussian_with_missing_cells_agrees_with_complete_data() -> None:
    """EM with a condition converges to the same regression when the holes carry no information."""
    generator = np.random.default_rng(10)
    c = torch.as_tensor(generator.integers(0, 2, (4000, 1)))
    x = torch.as_tensor(generator.normal(size=(4000, 3)) @ np.triu(np.ones((3, 3)))) + 4.0 * c
    for rank in (None, 1):
        complete = Gaussian(Reals((3,)), Integers((1,), 2), rank=rank, standardise=True)
        complete.estimate(fed(x, c, size=1000))
        model = Gaussian(Reals((3,), missing=True), Integers((1,), 2), rank=rank, standardise=True, passes=100)
        model.estimate(fed(holed(x, 0.1), c, size=1000))
        gap = complete.bound(x, c).nats.mean() - model.bound(x, c).nats.mean()
        assert abs(gap.item()) < (0.01 if rank is None else 0.05)


def test_gaussian_degenerate_columns() -> None:
    """A constant, a repeated and an all-missing column, and fewer examples than columns."""
    generator = np.random.default_rng(11)
    x = torch.as_tensor(generator.normal(size=(4, 6)))
    x[:, 1], x[:, 2], x[:, 3] = 7.0, x[:, 0], math.nan
    for rank in (None, 2):
        model = Gaussian(Reals((6,), missing=True), rank=rank)
        model.estimate(fed(x))
        assert torch.isfinite(model.bound(x).nats).all()
        assert torch.isfinite(model.sample(5, noise=stream())).all()
        assert torch.isfinite(model.impute(x)).all()


def test_gaussian_refuses_what_it_cannot_do() -> None:
    with pytest.raises(Unsupported, match="needs a numeric column"):
        Gaussian(Table(columns=(Column("a", "binary"),)))
    with pytest.raises(ValueError, match="rank: expected 1 to 2 for 3"):
        Gaussian(Reals((3,)), rank=3)
    with pytest.raises(ValueError, match="shrinkage"):
        Gaussian(Reals((3,)), shrinkage=1.5)
    with pytest.raises(Unsupported, match="at most 4096 features"):
        Gaussian(Reals((3,)), Table(columns=(Column("id", "categorical", levels=100_000),)))
    with pytest.raises(Unsupported, match="takes no condition"):
        Independent(Reals((3,)), Reals((1,)))


# -------------------------------------------------------------------------------------------------- mixture

SPACES = [
    Binary((3,), missing=True),
    Integers((2, 2), 3, missing=True),
    Tokens(2, 3),
    Reals((2,), missing=True),
    Counts((2,), missing=True),
    MIXED,
]


def dependent(space: Space, n: int, seed: int = 0) -> Tensor:
    """Examples of three latent classes, with holes where the space allows them."""
    generator = torch.Generator().manual_seed(seed)
    model = Mixture(space, components=3, seed=7)
    with torch.no_grad():
        for law in model.laws:
            law.spread(generator, 2.5)
    x = model.sample(n, noise=StreamNoise(generator))
    if isinstance(space, Table):
        holes = holed(x, 0.2)
        return torch.stack([holes[:, j] if c.missing else x[:, j] for j, c in enumerate(space.columns)], 1)
    return holed(x, 0.2) if space.missing else x


def contributions(model: Model, x: Tensor) -> Tensor:
    """log p(x) − log p(x without a cell), and an equal share of what these leave of log p(x), by many bounds."""
    flat, nats = x.reshape(len(x), -1), model.bound(x).nats.detach()
    alone = torch.zeros_like(flat)
    for j in range(flat.shape[1]):
        less = flat.clone()
        less[:, j] = math.nan
        alone[:, j] = nats - model.bound(less.reshape(x.shape)).nats.detach()
    present = ~torch.isnan(flat)
    rest = (nats - alone.sum(1)) / present.sum(1).clamp(min=1)
    return torch.where(present, alone + rest.unsqueeze(1), 0.0)


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_mixture_finds_what_scikit_learn_finds(covariance: str) -> None:
    generator = np.random.default_rng(20)
    centres = np.array([[0.0, 0, 0], [6, 0, 3], [0, 7, -4]])
    label = generator.choice(3, size=900, p=[0.5, 0.3, 0.2])
    x = centres[label] + generator.normal(size=(900, 3)) @ np.triu(np.full((3, 3), 0.6))
    model = Mixture(Reals((3,)), components=3, covariance=covariance, smoothing=0.0, tolerance=1e-9)
    model.estimate(fed(x))
    theirs = GaussianMixture(3, covariance_type=covariance[:4], tol=1e-10, max_iter=500, reg_covar=0, random_state=0)
    theirs.fit(x)
    assert model.bound(torch.as_tensor(x)).nats.detach().numpy() == pytest.approx(theirs.score_samples(x), abs=1e-3)
    assert sorted(model.logits.softmax(0).tolist()) == pytest.approx(sorted(theirs.weights_), abs=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
def test_em_never_lowers_the_objective_and_ends_where_it_is_stationary(space: Space, smoothing: float) -> None:
    x = dependent(space, 200)
    model = Mixture(space, components=2, smoothing=smoothing, restarts=1, passes=1, seed=1)
    model.estimate(fed(x))
    batches = [batch for batch, _ in fed(x)]
    values = [model.iterate(batches)[0]]
    while len(values) < 2 or (values[-1] - values[-2] > 1e-9 and len(values) < 1500):
        values.append(model.iterate(batches)[0])
    trace = np.array(values)
    assert np.all(np.diff(trace) > -1e-10 * np.abs(trace[1:]))
    at = trace[-1]
    for seed in range(3):  # no small step in any direction is better
        generator = torch.Generator().manual_seed(seed)
        for sign in (1, -1):
            moved = copy_of(model)
            with torch.no_grad():
                for parameter in moved.parameters():
                    step = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                    parameter.add_(sign * 3e-3 * step)
            assert moved.iterate(batches)[0] < at + 1e-7


@pytest.mark.parametrize(
    ("space", "options"),
    [
        (Reals((2,), missing=True), {"covariance": "full"}),
        (Reals((2,), missing=True), {"covariance": "diagonal"}),
        (Counts((2,), missing=True), {"counts": "negative binomial"}),
        (Counts((2,), missing=True), {"counts": "poisson"}),
    ],
    ids=["full", "diagonal", "negative binomial", "poisson"],
)
def test_em_ends_where_the_gradient_of_the_likelihood_vanishes(space: Space, options: dict[str, str]) -> None:
    x = dependent(space, 250, seed=3)
    model = Mixture(space, components=2, smoothing=0.0, tolerance=1e-8, passes=300, restarts=1, **options)  # type: ignore[arg-type]
    model.estimate(fed(x, size=250))
    model.bound(x).nats.mean().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() < 1e-3


def copy_of(model: Mixture) -> Mixture:
    """A second model with the same parameters and the same prior."""
    twin = build(describe(model))
    assert isinstance(twin, Mixture)
    twin.load_state_dict(model.state_dict())
    for law, original in zip(twin.laws, model.laws):
        for name in ("_chances", "_marginal", "_prior", "_variance", "_centre", "_curvature", "_dispersion"):
            if hasattr(original, name):
                setattr(law, name, getattr(original, name))
    return twin


@pytest.mark.parametrize("space", [Binary((3,), missing=True), Integers((2,), 3, missing=True), Tokens(2, 3)], ids=str)
def test_mixture_has_mass_one_for_every_pattern_of_missing_cells(space: Space) -> None:
    model = Mixture.tiny(space)
    everything = every(space).double()
    nats = model.bound(everything).nats
    assert nats.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    for pattern in itertools.product([False, True], repeat=space.dims) if space.missing else ():
        holes = torch.where(torch.tensor(pattern), math.nan, everything)
        observed, member = torch.unique(holes.nan_to_num(-1.0), dim=0, return_inverse=True)
        summed = torch.zeros(len(observed)).double().index_add(0, member, nats.exp().detach())
        observed = torch.where(observed < 0, math.nan, observed)
        assert torch.allclose(model.bound(observed).nats.exp(), summed, atol=1e-12)


def test_mixture_of_a_mixed_table_by_hand() -> None:
    """The sum over classes of products of scipy's laws, holes left out."""
    model = Mixture.tiny(MIXED)
    x = holed(model.sample(40, noise=stream()), 0.3)
    x[:, 3] = x[:, 3].nan_to_num(1.0)
    numbers, codes = model.laws
    mean, scale = numbers.mean.detach().numpy(), numbers.log_scale.exp().detach().numpy()
    tables = [p.softmax(1).detach().numpy() for p in codes.logits.split([3, 2], 1)]
    weight = model.logits.softmax(0).detach().numpy()
    peak = numbers.logits[:, :, [0, -1]].softmax(2)[:, :, 0].detach().numpy()
    assert peak[:, :2].min() > 0.01 and (x[:, 0] == 0).any() and (x[:, 1] == 0).any()
    expected = np.zeros(40)
    for i, (height, age, colour, smoker, heavy) in enumerate(x.numpy()):
        for k in range(2):
            p = weight[k] * tables[1][k, int(smoker)]
            for j, (value, step) in enumerate([(height, 0.5), (age, 1.0)]):
                if not np.isnan(value):  # one atom at 0, beside the normal law
                    law, atom = scipy.stats.norm(mean[k, j], scale[k, j]), peak[k, j]
                    mass = law.cdf(value + step / 2) - law.cdf(value - step / 2)
                    p *= (1 - atom) * mass + atom * (value == 0)
            p *= 1.0 if np.isnan(colour) else tables[0][k, int(colour)]
            p *= 1.0 if np.isnan(heavy) else scipy.stats.norm(mean[k, 2], scale[k, 2]).pdf(heavy)
            expected[i] += p
    assert model.bound(x).nats.exp().detach().numpy() == pytest.approx(expected, rel=1e-8)
    assert model.bound(x).kind == "exact"


@pytest.mark.parametrize("counts", ["poisson", "negative binomial"])
def test_mixture_of_counts_by_hand(counts: str) -> None:
    model = Mixture(Counts((1,)), components=3, counts=counts, seed=5)
    k = np.arange(300)
    m = model.laws[0].log_mean.exp().detach().numpy()[:, 0]
    if counts == "poisson":
        laws = [scipy.stats.poisson(v).pmf(k) for v in m]
    else:
        r = model.laws[0].log_dispersion.exp().detach().numpy()[:, 0]
        laws = [scipy.stats.nbinom(a, a / (a + v)).pmf(k) for a, v in zip(r, m)]
    nats = model.bound(torch.as_tensor(k).unsqueeze(1)).nats.detach().numpy()
    assert np.exp(nats) == pytest.approx(np.mean(laws, 0), rel=1e-9)
    assert np.exp(nats).sum() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("space", SPACES, ids=lambda space: type(space).__name__)
def test_mixture_samples_imputations_and_contributions(space: Space) -> None:
    """Samples have the model's own frequencies; column_nats is the difference of two bounds; draws fill every hole."""
    model = Mixture.tiny(space)
    x = model.sample(6000, noise=stream())
    space.validate(x)
    responsibility = model.encode(x)
    error = responsibility.std(0) / math.sqrt(len(x))
    assert torch.all((responsibility.mean(0) - model.logits.softmax(0)).abs() < 5 * error)
    if space.missing:
        holes = dependent(space, 60)
        for filled in (model.impute(holes)[None], model.impute(holes, noise=stream(), draws=2)):
            assert not torch.isnan(filled).any()
            assert torch.equal(filled[0][~torch.isnan(holes)], holes[~torch.isnan(holes)])
            space.validate(filled[0])
        assert torch.allclose(model.column_nats(holes).reshape(60, -1), contributions(model, holes), atol=1e-9)


def test_full_mixture_by_products_of_cells_is_the_mixture_by_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    """EM on complete rows in its two ways, far from 0, on correlated columns of unlike scales."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    centres = torch.randn(4, 3, generator=generator, dtype=torch.float64) * 2.0
    x = centres[torch.arange(800) % 4] + torch.randn(800, 3, generator=generator, dtype=torch.float64) @ mixing
    x = x * torch.tensor([1.0, 1e3, 1e-4]) + torch.tensor([50.0, -1e4, 0.0])
    found = {}
    for steepest in (mixture._STEEPEST, 0.0):
        monkeypatch.setattr(mixture, "_STEEPEST", steepest)
        found[steepest] = Mixture(Reals((3,)), components=4, covariance="full", smoothing=0.5)
        found[steepest].estimate([(part, None) for part in x.split(300)])
        details = [law.joint_in_detail(cells, present)[1] for _, law, cells, present in found[steepest]._cells(x)]
        assert all((detail is None) == (steepest == 0.0) for detail in details)
    one, other = found.values()
    assert torch.allclose(one.bound(x).nats, other.bound(x).nats, rtol=0, atol=1e-10)


@torch.no_grad()
def test_full_mixture_keeps_its_digits_where_a_component_is_very_narrow() -> None:
    """A law of one point in ten thousand of the range: its density, seen from EM, is as exact as the model's own."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(600, 2, generator=generator, dtype=torch.float64)
    x[:300] = x[:300] * 1e-6 + 3.0
    model = Mixture(Reals((2,)), components=2, covariance="full", smoothing=0.0)
    model.estimate([(x, None)])
    assert model.bound(x[:300]).nats.mean() > 20.0
    for _, law, cells, present in model._cells(x):
        law.zero()
        nats, detail = law.joint_in_detail(cells, present)
        assert detail is None and torch.equal(nats, law.joint(cells, present))


def test_full_mixture_contributions_imputations_and_missing_cells() -> None:
    model = Mixture(Reals((3,), missing=True), components=2, covariance="full", seed=3)
    model.laws[0].spread(torch.Generator().manual_seed(0), 3.0)
    x = holed(model.sample(40, noise=stream()), 0.3)
    mean = model.laws[0].mean.detach().numpy()
    root = model.laws[0]._cholesky().detach().numpy()
    sigma = root @ root.transpose(0, 2, 1)
    filled, cells, nats = model.impute(x).numpy(), model.column_nats(x), model.bound(x).nats
    for i, row in enumerate(x.numpy()):
        o = ~np.isnan(row)
        p = np.array([0.5, 0.5])
        guess = np.zeros((2, 3))
        for k in range(2):
            if o.any():
                p[k] *= scipy.stats.multivariate_normal(mean[k][o], sigma[k][np.ix_(o, o)]).pdf(row[o])
                gain = sigma[k][:, o] @ np.linalg.inv(sigma[k][np.ix_(o, o)])
                guess[k] = mean[k] + gain @ (row[o] - mean[k][o])
            else:
                guess[k] = mean[k]
        assert nats[i].item() == pytest.approx(math.log(p.sum()), abs=1e-9)
        assert filled[i] == pytest.approx(p @ guess / p.sum(), abs=1e-9)
    assert torch.allclose(cells, contributions(model, x), atol=1e-9)


def test_mixture_imputes_the_conditional_law() -> None:
    model = Mixture.tiny(Binary((3,), missing=True))
    everything = every(Binary((3,))).double()
    p = model.bound(everything).nats.exp().detach()
    row = torch.tensor([[math.nan, 1.0, math.nan]]).double()
    seen = everything[:, 1] == 1
    expected = p[seen] / p[seen].sum()
    drawn = model.impute(row.expand(8000, 3), noise=stream(), draws=1)[0]
    code = (2 * drawn[:, 0] + drawn[:, 2]).long()
    frequency = torch.bincount(code, minlength=4) / 8000
    assert torch.all((frequency - expected).abs() < 4 * (expected * (1 - expected) / 8000).sqrt())
    marginal = torch.stack([expected[2:].sum(), torch.tensor(0.0), expected[[1, 3]].sum()])
    assert model.impute(row)[0, [0, 2]].tolist() == (marginal > 0.5).double()[[0, 2]].tolist()


def test_mixture_on_a_grid_recovers_a_normal_law_coarser_than_its_scale() -> None:
    """EM with truncated moments is the maximum of the grouped likelihood, not that of the rounded values."""
    generator = np.random.default_rng(21)
    x = np.round(generator.normal(0.3, 0.5, size=(5000, 1)))
    space = Table(columns=(Column("a", "integer"),))
    model = Mixture(space, components=1, smoothing=0.0, tolerance=1e-12, passes=500, atoms=0)
    model.estimate(fed(x, size=5000))
    mean, scale = model.laws[0].mean.item(), model.laws[0].log_scale.exp().item()
    assert mean == pytest.approx(0.3, abs=0.03) and scale == pytest.approx(0.5, abs=0.03)
    model.bound(torch.as_tensor(x)).nats.mean().backward()
    assert model.laws[0].mean.grad.abs().max() < 1e-5 and model.laws[0].log_scale.grad.abs().max() < 1e-5


@pytest.mark.parametrize("covariance", ["full", "diagonal"])
def test_mixture_as_a_trainable_prior(covariance: str) -> None:
    prior = Mixture(Reals((3,)), components=4, covariance=covariance)
    z = prior.sample(20_000, noise=stream())
    assert torch.all(z.mean(0).abs() < 1.0) and torch.all((z.var(0) - 1.0).abs() < 0.6)
    point = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    parameters = list(prior.parameters())

    def function(point: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip([name for name, _ in prior.named_parameters()], values))
        return torch.func.functional_call(prior, named, (point,))

    prior.forward = lambda z: prior.bound(z).nats  # type: ignore[method-assign]
    assert torch.autograd.gradcheck(function, (point, *parameters))
    prior.float().bound(point.float()).nats.sum().backward()


def test_mixture_beats_independent_cells_and_reaches_a_known_entropy() -> None:
    """Two classes of binary cells: held-out nats are the entropy of the source up to the noise of estimation."""
    generator = np.random.default_rng(22)
    law = generator.beta(0.4, 0.4, size=(2, 8))
    everything = np.array(list(itertools.product([0, 1], repeat=8)))
    p = 0.5 * np.prod(np.where(everything[:, None], law, 1 - law), 2).sum(1)
    entropy = scipy.stats.entropy(p)
    x = torch.as_tensor((generator.random((6000, 8)) < law[generator.integers(0, 2, 6000)]).astype(float))
    model, floor = Mixture(Binary((8,)), components=2), Independent(Binary((8,)))
    model.estimate(fed(x[:3000]))
    floor.estimate(fed(x[:3000]))
    nats = model.bound(x[3000:]).nats.detach()
    error = nats.std().item() / math.sqrt(3000)
    assert abs(-nats.mean().item() - entropy) < 3 * error + 17 / 3000
    assert floor.bound(x[3000:]).nats.mean() < nats.mean() - 0.1


def test_mixture_refuses_what_it_cannot_do() -> None:
    with pytest.raises(Unsupported, match="'full' is for spaces of reals"):
        Mixture(Binary((3,)), covariance="full")
    with pytest.raises(ValueError, match="no option 'component'; did you mean 'components'"):
        Mixture(Binary((3,)), component=3)
    with pytest.raises(ValueError, match="counts: expected"):
        Mixture(Counts((3,)), counts="geometric")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["independent", "gaussian", "mixture"])
def test_a_built_model_with_the_saved_state_is_the_same_model(name: str) -> None:
    model = find(name).tiny(MIXED)
    twin = build(describe(model))
    twin.load_state_dict(model.state_dict())
    x = holed(model.sample(50, noise=stream()), 0.2)
    assert torch.equal(model.bound(x).nats, twin.bound(x).nats)
    assert torch.equal(model.sample(5, noise=stream()), twin.sample(5, noise=stream()))
