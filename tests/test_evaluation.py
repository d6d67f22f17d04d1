"""The held-out number, importance weights, active units and scores, on models whose values are known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from likely.contract import Binary, Bound, Column, Integers, Model, Reals, Table, Unsupported
from likely.data.dataset import Dataset
from likely.evaluation import active_units, column_nats, example_nats, held_out, importance_weighted, tail_probability
from likely.evaluation.importance import RunningWeights


class Linear(Model):
    """x = a z + s e with z, e ~ N(0, 1), and q(z | x) = N(b x, t²), which is the posterior for the right b and t."""

    spaces = (Reals,)
    a, s = 0.8, 0.5

    def __init__(self, space, condition=None, *, b=0.9, t=0.7):
        super().__init__(space, condition)
        self.b, self.t = b, t
        self.net = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(1, 1))
        self.largest = 0

    @classmethod
    def with_posterior(cls, space):
        total = cls.a**2 + cls.s**2
        return cls(space, b=cls.a / total, t=cls.s / math.sqrt(total))

    def _terms(self, x, z):
        x = x.reshape(len(x), 1)
        q = torch.distributions.Normal(self.b * x, self.t).log_prob(z)
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(z)
        return torch.distributions.Normal(self.a * z, self.s).log_prob(x), prior - q

    def bound(self, x, condition=None, noise=None):
        assert not self.training and not torch.is_grad_enabled()
        reconstruction, kl = self._terms(x, self.b * x + self.t * noise.normal((len(x), 1)))
        return Bound("lower bound", {"reconstruction": reconstruction[:, 0], "kl": kl[:, 0]})

    def log_weights(self, x, condition, samples, noise):
        self.largest = max(self.largest, samples)
        first, second = self._terms(x, self.b * x + self.t * noise.normal((len(x), samples)))
        return first + second

    def encode(self, x, condition=None):
        return torch.cat([self.b * x, 0.05 * x, torch.ones_like(x)], 1)

    def log_prob(self, x):
        return stats.norm(0, math.hypot(self.a, self.s)).logpdf(x.double().numpy())


SPACE = Reals((1,))


@pytest.fixture
def data():
    x = torch.randn(203, 1, generator=torch.Generator().manual_seed(1)) * math.hypot(Linear.a, Linear.s)
    return Dataset(SPACE, x)


class Cells(Model):
    """Every cell is worth its own value in nats, exactly, and half of it is booked on each of two parts."""

    spaces = (Reals, Table)

    def bound(self, x, condition=None, noise=None):
        return Bound("exact", {"left": x[:, 0].clone(), "right": x[:, 1:].sum(1)})

    def column_nats(self, x, condition=None, noise=None):
        return x.clone()


# --- held_out -------------------------------------------------------------------------------------------------------


def test_mean_error_and_parts_are_those_of_the_examples():
    x = torch.randn(11, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1e3
    result = held_out(Cells(Reals((3,))), Dataset(Reals((3,)), x), batch_size=4)  # the last batch holds 3 examples
    values = x.numpy().sum(1)
    assert result.n == 11 and result.kind == "exact"
    np.testing.assert_allclose(result.example_nats, values, rtol=1e-14)
    np.testing.assert_allclose(result.nats, values.mean(), rtol=1e-13)
    np.testing.assert_allclose(result.standard_error, stats.sem(values), rtol=1e-13)
    np.testing.assert_allclose(
        list(result.parts.values()), [values.mean() - x[:, 1:].sum(1).mean(), x[:, 1:].sum(1).mean()]
    )
    assert list(result.parts) == ["left", "right"]


def test_sums_are_kept_in_double_precision():
    x = torch.tensor([[1e8, 0.0]] + [[0.25, 0.0]] * 9, dtype=torch.float32)
    result = held_out(Cells(Reals((2,))), Dataset(Reals((2,)), x), batch_size=3)
    assert result.nats == (1e8 + 9 * 0.25) / 10  # float32 would lose every 0.25


def test_value_does_not_depend_on_batch_or_order(data):
    whole = held_out(Linear(SPACE), data, seed=3)
    for size in (1, 7, 202, 1000):
        part = held_out(Linear(SPACE), data, seed=3, batch_size=size)
        torch.testing.assert_close(part.example_nats, whole.example_nats, rtol=1e-6, atol=1e-6)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(2))
    turned = held_out(Linear(SPACE), data.subset(order), seed=3)
    torch.testing.assert_close(turned.example_nats, whole.example_nats[order], rtol=1e-6, atol=1e-6)
    assert not torch.equal(held_out(Linear(SPACE), data, seed=4).example_nats, whole.example_nats)


def test_one_sample_bound_lies_below_by_the_divergence(data):
    """E[ELBO] = log p(x) − KL(q ‖ p(z | x)), in closed form for two Gaussians."""
    model = Linear(SPACE)
    right = Linear.with_posterior(SPACE)
    x = data.x[:, 0].double().numpy()
    shift = (model.b - right.b) * x
    ratio = model.t / right.t
    divergence = -math.log(ratio) + (ratio**2 + shift**2 / right.t**2 - 1) / 2
    values = np.mean([held_out(model, data, seed=seed).example_nats.numpy() for seed in range(200)], 0)
    gap = model.log_prob(data.x)[:, 0] - values - divergence
    assert abs(gap.mean()) < 3 * stats.sem(gap)
    assert stats.sem(gap) < 0.03 * divergence.mean()


def test_modes_gradients_and_global_random_state_are_left_alone(data):
    model = Linear(SPACE)
    model.train()
    model.net[0].eval()
    before = torch.get_rng_state()
    held_out(model, data)
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match="space"):
        held_out(model, Dataset(Reals((2,)), torch.zeros(3, 2)))
    assert model.training


def test_a_value_that_is_not_finite_is_named():
    x = torch.ones(10, 2)
    x[7, 1] = math.inf
    with pytest.raises(FloatingPointError, match=r"part 'right' of the bound is inf for row 7 of the dataset"):
        held_out(Cells(Reals((2,))), Dataset(Reals((2,)), x), batch_size=4)


def test_empty_and_foreign_datasets_are_refused():
    with pytest.raises(ValueError, match="at least one example"):
        held_out(Cells(Reals((2,))), Dataset(Reals((2,)), torch.zeros(0, 2)))
    with pytest.raises(ValueError, match="dataset: expected a condition in None"):
        held_out(Cells(Reals((2,))), Dataset(Reals((2,)), torch.zeros(1, 2), Binary((1,)), torch.zeros(1, 1)))


def test_one_example_has_no_standard_error():
    result = held_out(Cells(Reals((2,))), Dataset(Reals((2,)), torch.ones(1, 2)))
    assert result.nats == 2.0 and math.isnan(result.standard_error)


# --- importance weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, -5000.0, 800.0])
@pytest.mark.parametrize("sizes", [(60,), (1, 59), (20, 20, 20), (7,) * 8 + (4,)])
def test_running_weights_equal_direct_sums(shift, sizes):
    w = np.random.default_rng(0).normal(size=(5, 60)) * 20 + shift
    w[0, :30] = -np.inf  # weights of zero, a whole chunk of them
    running = RunningWeights(5)
    for part in torch.split(torch.from_numpy(w), sizes, 1):
        running.add(part)
    np.testing.assert_allclose(running.log_mean(), special.logsumexp(w, axis=1) - math.log(60), rtol=1e-12)
    p = special.softmax(w, axis=1)
    np.testing.assert_allclose(running.effective_samples(), 1 / (p**2).sum(1), rtol=1e-10)
    np.testing.assert_allclose(running.variance(), 60 * p.var(1, ddof=1), rtol=1e-8, atol=1e-14)


def test_weights_of_zero_only_are_an_error():
    class Zero(Linear):
        def log_weights(self, x, condition, samples, noise):
            return torch.full((len(x), samples), -math.inf)

    with pytest.raises(FloatingPointError, match="row 0"):
        importance_weighted(Zero(SPACE), Dataset(SPACE, torch.zeros(3, 1)), 5)


def test_any_number_of_samples_passes_in_chunks(data):
    model = Linear(SPACE)
    direct = importance_weighted(model, data, 250, chunk=250)
    assert model.largest == 250
    model.largest = 0
    chunked = importance_weighted(model, data, 250, chunk=16, batch_size=10)
    assert model.largest == 16
    torch.testing.assert_close(chunked.example_nats, direct.example_nats, rtol=1e-6, atol=1e-6)
    assert math.isclose(chunked.effective_samples, direct.effective_samples, rel_tol=1e-5)
    assert math.isclose(chunked.monte_carlo_error, direct.monte_carlo_error, rel_tol=1e-5)


def test_one_importance_sample_is_the_elbo(data):
    model = Linear(SPACE)
    elbo, one = held_out(model, data, seed=5), importance_weighted(model, data, 1, seed=5)
    torch.testing.assert_close(one.example_nats, elbo.example_nats, rtol=1e-6, atol=1e-6)
    assert one.kind == "lower bound" and one.effective_samples == 1 and math.isnan(one.monte_carlo_error)


def test_bounds_rise_to_the_exact_value(data):
    """ELBO < L_5 < L_50 < L_5000 ≈ log p(x), and the distance of L_k is −Var(w) / (2 k E[w]²) to first order."""
    model = Linear(SPACE)
    exact = float(model.log_prob(data.x).mean())
    bounds = [importance_weighted(model, data, k, seed=1) for k in (1, 5, 50, 5000)]
    values = [bound.nats for bound in bounds]
    assert values == sorted(values)
    assert abs(values[-1] - exact) < 4 * bounds[-1].monte_carlo_error + 1e-4
    repeated = [importance_weighted(model, data, 50, seed=seed) for seed in range(2, 22)]
    shortfall = exact - np.mean([r.nats for r in repeated])
    first_order = np.mean([1 / r.effective_samples - 1 / 50 for r in repeated]) / 2
    assert 0 < shortfall < 2 * first_order


def test_monte_carlo_error_is_the_spread_over_seeds(data):
    results = [importance_weighted(Linear(SPACE), data, 300, seed=seed) for seed in range(30)]
    spread = np.std([r.nats for r in results], ddof=1)
    claimed = math.sqrt(np.mean([r.monte_carlo_error**2 for r in results]))
    low, high = np.sqrt(stats.chi2(29).ppf([0.001, 0.999]) / 29)
    assert low < spread / claimed < high


def test_the_true_posterior_makes_every_sample_worth_the_same(data):
    model = Linear.with_posterior(SPACE)
    result = importance_weighted(model, data, 20)
    np.testing.assert_allclose(result.example_nats, model.log_prob(data.x)[:, 0], atol=1e-5)
    assert math.isclose(result.effective_samples, 20, rel_tol=1e-6) and result.monte_carlo_error < 1e-6


def test_importance_weights_need_a_latent_variable(data):
    with pytest.raises(Unsupported, match="no importance weights"):
        importance_weighted(Cells(Reals((2,))), Dataset(Reals((2,)), torch.zeros(1, 2)), 10)
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        importance_weighted(Linear(SPACE), data, 0)


def test_progress_ends_at_the_whole(data):
    seen = []
    importance_weighted(Linear(SPACE), data, 30, chunk=7, batch_size=50, progress=lambda *at: seen.append(at))
    assert seen == sorted(seen) and seen[-1] == (203 * 30, 203 * 30)


# --- active units ---------------------------------------------------------------------------------------------------


def test_active_units_count_variances_of_the_mean_embedding(data):
    result = active_units(Linear(SPACE), data, batch_size=10)
    x = data.x.double().numpy()[:, 0]
    np.testing.assert_allclose(result.variances, [0.81 * x.var(), 0.0025 * x.var(), 0.0], rtol=1e-6, atol=1e-12)
    assert (result.active, result.latent, result.threshold) == (1, 3, 0.01)
    assert active_units(Linear(SPACE), data, threshold=1e-4).active == 2
    with pytest.raises(Unsupported, match="no latent variables"):
        active_units(Cells(Reals((2,))), Dataset(Reals((2,)), torch.zeros(1, 2)))


# --- scores ---------------------------------------------------------------------------------------------------------


def test_scores_of_examples_and_columns_agree():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    data = Dataset(Reals((4,)), x)
    cells = column_nats(Cells(Reals((4,))), data, batch_size=4)
    torch.testing.assert_close(cells, x.double())
    torch.testing.assert_close(example_nats(Cells(Reals((4,))), data), cells.sum(1), rtol=1e-6, atol=1e-6)
    with pytest.raises(Unsupported, match="what each column adds"):
        column_nats(Linear(SPACE), Dataset(SPACE, torch.zeros(1, 1)))


def test_a_column_that_is_not_finite_is_named():
    space = Table(columns=(Column("age", "integer"), Column("pay", "real")))
    x = torch.ones(6, 2, dtype=torch.float64)
    x[5, 1] = -math.inf
    with pytest.raises(FloatingPointError, match="column 'pay' adds -inf nats to row 5"):
        column_nats(Cells(space), Dataset(space, x), batch_size=2)


def test_values_that_differ_by_rounding_are_equal() -> None:
    reference = torch.tensor([-30.0, -20.0, -10.0], dtype=torch.float64)
    rounded = torch.nextafter(reference, torch.full_like(reference, -100.0))
    assert tail_probability(reference, rounded).tolist() == tail_probability(reference, reference).tolist()


def test_tail_probability_is_the_conformal_p_value():
    rng = np.random.default_rng(0)
    reference, new = rng.integers(0, 30, 200) / 7, rng.integers(-3, 33, (5, 20)) / 7  # with ties
    got = tail_probability(torch.from_numpy(reference), torch.from_numpy(new))
    expected = [[(1 + sum(r <= v for r in reference)) / 201 for v in row] for row in new]
    np.testing.assert_allclose(got, expected, rtol=1e-12)
    assert got.dtype == torch.float64 and got.min() == 1 / 201


def test_tail_probability_is_uniform_on_examples_of_the_same_source():
    rng = np.random.default_rng(1)
    pairs = torch.from_numpy(rng.normal(size=(2000, 20)))
    levels = torch.cat([tail_probability(row[1:], row[:1]) for row in pairs])
    counts = np.bincount((levels.numpy() * 20).round().astype(int) - 1, minlength=20)
    assert stats.chisquare(counts).pvalue > 0.001


def test_tail_probability_refuses_what_it_cannot_rank():
    with pytest.raises(ValueError, match="reference_nats: expected shape"):
        tail_probability(torch.zeros(0), torch.zeros(1))
    with pytest.raises(ValueError, match="nats: expected numbers, got NaN at position 1"):
        tail_probability(torch.zeros(3), torch.tensor([0.0, math.nan]))


def test_integer_data_are_converted_once_and_not_rescaled():
    space = Integers((2,), 9)

    class Sum(Model):
        spaces = (Integers,)

        def bound(self, x, condition=None, noise=None):
            return Bound("exact", {"sum": -x.sum(1)})

    x = torch.tensor([[8, 1], [0, 2]], dtype=torch.uint8)
    assert example_nats(Sum(space), Dataset(space, x)).tolist() == [-9.0, -2.0]
