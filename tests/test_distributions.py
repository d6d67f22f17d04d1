"""Every likelihood against an independent oracle: scipy, a sum over the support, or a numerical integral."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats as st
import torch

from likely.contract import Binary, Column, Counts, Integers, Reals, Table, Tokens, Unsupported
from likely.distributions import (
    Bernoulli,
    Categorical,
    DiscretizedLogisticMixture,
    GridLogisticMixture,
    Multinomial,
    NegativeBinomial,
    Normal,
    StudentT,
    head,
    likelihoods,
)
from likely.distributions.heads import TableHead
from likely.noise import KeyedNoise

DRAWS = 40_000


def keyed(n: int, seed: int = 0) -> KeyedNoise:
    return KeyedNoise(seed, torch.arange(n))


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_bernoulli_against_scipy() -> None:
    logits = double(-3.0, 0.2, 40.0)
    for x in (0.0, 1.0):
        expected = st.bernoulli.logpmf(x, 1 / (1 + np.exp(-logits.numpy())))
        got = Bernoulli(logits[None]).log_prob(torch.full((1, 3), x))[0]
        np.testing.assert_allclose(got[:2], expected[:2], rtol=1e-12)
    assert Bernoulli(logits[None]).log_prob(torch.zeros(1, 3))[0, 2] == -40.0  # where scipy has log 0


def test_bernoulli_broadcasts_over_draws_of_the_context() -> None:
    logits = torch.randn(4, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (logits[:, :1] > 0).double()
    expected = torch.stack([Bernoulli(logits[:, k]).log_prob(x[:, 0]) for k in range(7)], 1)
    torch.testing.assert_close(Bernoulli(logits).log_prob(x), expected)


def test_normal_against_scipy() -> None:
    mean, log_scale, x = double(0.0, 3.0), double(-2.0, 1.5), double(0.4, -8.0)
    normal = Normal(mean, log_scale)
    np.testing.assert_allclose(normal.log_prob(x), st.norm.logpdf(x, mean, log_scale.exp()), rtol=1e-12)
    np.testing.assert_allclose(normal.entropy(), st.norm.entropy(mean, log_scale.exp()), rtol=1e-12)


def test_kl_to_the_standard_normal_is_the_mean_log_ratio() -> None:
    q = Normal(double(0.3), double(-0.4))
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    integrand = q.log_prob(grid).exp() * (q.log_prob(grid) - torch.tensor(st.norm.logpdf(grid.numpy())))
    assert torch.trapezoid(integrand, grid).item() == pytest.approx(q.kl_to_standard().item(), abs=1e-9)


def test_student_against_scipy() -> None:
    mean, log_scale, log_df, x = double(1.0), double(0.7), double(1.2), double(-4.0)
    expected = st.t.logpdf(x, np.exp(1.2), 1.0, np.exp(0.7))
    np.testing.assert_allclose(StudentT(mean, log_scale, log_df).log_prob(x), expected, rtol=1e-12)


def test_negative_binomial_against_scipy() -> None:
    log_mean, log_r = double(2.0, -1.0, 5.0), double(0.5, 3.0, -2.0)
    r, mean = log_r.exp().numpy(), log_mean.exp().numpy()
    for x in (0.0, 1.0, 17.0, 900.0):
        got = NegativeBinomial(log_mean, log_r).log_prob(torch.full((3,), x, dtype=torch.float64))
        np.testing.assert_allclose(got, st.nbinom.logpmf(x, r, r / (r + mean)), rtol=1e-9, atol=1e-9)


def test_multinomial_times_its_total_against_scipy() -> None:
    logits, log_mean, log_r = double(0.1, 1.0, -2.0), double(1.5)[0], double(0.5)[0]
    total = NegativeBinomial(log_mean[None], log_r[None], trailing=0)
    x = double(3.0, 5.0, 1.0)
    r, mean = float(log_r.exp()), float(log_mean.exp())
    p = torch.softmax(logits, 0).numpy()
    expected = st.multinomial.logpmf(x.numpy(), 9, p / p.sum()) + st.nbinom.logpmf(9, r, r / (r + mean))
    assert Multinomial(logits[None], total).log_prob(x[None]).sum().item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("levels", [2, 5, 256])
def test_discretised_logistics_sum_to_one_over_their_levels(levels: int) -> None:
    generator = torch.Generator().manual_seed(levels)
    numbers = 3.0 * torch.randn(3, 50, 1, 4, generator=generator, dtype=torch.float64)
    mixture = DiscretizedLogisticMixture(numbers[0], numbers[1], 2.0 * numbers[2], levels)
    x = torch.arange(levels).reshape(-1, 1, 1).expand(-1, 50, 1)
    torch.testing.assert_close(mixture.log_prob(x).exp().sum(0), torch.ones(50, 1, dtype=torch.float64))


def test_discretised_logistic_against_scipy() -> None:
    mixture = DiscretizedLogisticMixture(double(0.0)[None], double(0.1)[None], double(-2.0)[None], 256)
    x = np.arange(1, 255)
    u = 2 * x / 255 - 1
    expected = np.log(np.diff(st.logistic.cdf(np.stack([u - 1 / 255, u + 1 / 255]), 0.1, np.exp(-2.0)), axis=0)[0])
    np.testing.assert_allclose(mixture.log_prob(torch.tensor(x)[:, None])[:, 0], expected, rtol=1e-9)


def test_discretised_logistic_keeps_its_digits_far_in_the_tail() -> None:
    mixture = DiscretizedLogisticMixture(torch.zeros(1, 1), torch.full((1, 1), -1.0), torch.full((1, 1), -5.0), 256)
    value = mixture.log_prob(torch.tensor([[250]]))
    u, scale = 2 * 250 / 255 - 1 + 1, np.exp(-5.0)  # log of the mass, expanded where the cdf rounds to 1
    expected = -(u - 1 / 255) / scale + np.log1p(-np.exp(-2 / 255 / scale))
    assert value.item() == pytest.approx(expected, rel=1e-5)


def grid_mixture(resolution: float, atoms: list[float]) -> GridLogisticMixture:
    logits = double(0.3, -0.2, *np.linspace(0.5, -0.5, len(atoms)))[None, None]
    return GridLogisticMixture(
        logits, double(-0.5, 1.0)[None, None], double(-1.0, 0.2)[None, None],
        double(40.0), double(12.0), double(resolution), double(*atoms)[None],
    )  # fmt: skip


def test_a_column_on_a_grid_sums_to_one_with_its_atoms() -> None:
    mixture = grid_mixture(0.5, [0.0, 40.0])
    x = torch.arange(-2000, 2000, dtype=torch.float64)[:, None, None] * 0.5
    probabilities = mixture.log_prob(x.squeeze(1)[:, None]).exp()
    assert probabilities.sum().item() == pytest.approx(1.0, abs=1e-12)
    weights = torch.softmax(double(0.3, -0.2, 0.5, -0.5), 0)
    at_zero = sum(
        w * np.diff(st.logistic.cdf([(-0.25 - 40) / 12, (0.25 - 40) / 12], m, np.exp(s)))[0]
        for w, m, s in zip(weights, (-0.5, 1.0), (-1.0, 0.2))
    )
    assert mixture.log_prob(double(0.0)[None, None]).exp().item() == pytest.approx(
        float(at_zero + weights[2]), rel=1e-9
    )


def test_a_column_without_a_grid_has_a_density_in_raw_units() -> None:
    mixture = GridLogisticMixture(
        double(0.3, -0.2)[None, None], double(-0.5, 1.0)[None, None], double(-1.0, 0.2)[None, None],
        double(40.0), double(12.0), double(0.0), torch.zeros(1, 0, dtype=torch.float64),
    )  # fmt: skip
    weights = torch.softmax(double(0.3, -0.2), 0)
    expected = sum(
        w * st.logistic.pdf(33.3, 40 + 12 * m, 12 * np.exp(s)) for w, m, s in zip(weights, (-0.5, 1.0), (-1.0, 0.2))
    )
    assert mixture.log_prob(double(33.3)[None, None]).exp().item() == pytest.approx(float(expected), rel=1e-10)


def test_a_fine_grid_tends_to_density_times_spacing() -> None:
    fine, continuous = grid_mixture(1e-6, []), grid_mixture(0.0, [])
    x = double(33.3)[None, None]
    torch.testing.assert_close(fine.log_prob(x) - np.log(1e-6), continuous.log_prob(x), rtol=0, atol=1e-6)


def rows(distribution_of, n: int = DRAWS) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """n draws: a distribution of n equal rows, sampled once."""
    return distribution_of(n).sample(keyed(n)).double()


@pytest.mark.parametrize(
    ("distribution_of", "mean", "variance"),
    [
        (lambda n: Bernoulli(torch.full((n, 1), 0.8)), 1 / (1 + np.exp(-0.8)), None),
        (lambda n: Normal(torch.full((n, 1), 2.0), torch.full((n, 1), 0.5)), 2.0, np.exp(1.0)),
        (lambda n: StudentT(torch.full((n, 1), 2.0), torch.zeros(n, 1), torch.full((n, 1), 2.3)), 2.0, None),
        (lambda n: NegativeBinomial(torch.full((n, 1), 2.0), torch.full((n, 1), 0.7)), np.exp(2.0), None),
    ],
)
def test_samples_have_the_mean_and_variance_of_the_law(distribution_of, mean, variance) -> None:  # type: ignore[no-untyped-def]
    drawn = rows(distribution_of)
    error = drawn.std() / DRAWS**0.5
    assert abs(drawn.mean() - mean) < 4.5 * error
    if variance is not None:
        assert drawn.var().item() == pytest.approx(variance, rel=0.05)


@pytest.mark.parametrize(
    ("distribution_of", "support"),
    [
        (lambda n: Categorical(torch.tensor([0.1, 1.0, -2.0]).expand(n, 1, 3)), range(3)),
        (
            lambda n: DiscretizedLogisticMixture(
                torch.tensor([0.5, 0.0]).expand(n, 1, 2), torch.tensor([-0.8, 0.6]).expand(n, 1, 2),
                torch.tensor([-1.0, -2.0]).expand(n, 1, 2), 7,
            ),
            range(7),
        ),
        (lambda n: NegativeBinomial(torch.full((n, 1), 0.5), torch.full((n, 1), 0.2)), range(40)),
    ],
)  # fmt: skip
def test_samples_have_the_frequencies_of_the_law(distribution_of, support) -> None:  # type: ignore[no-untyped-def]
    drawn = rows(distribution_of).squeeze(-1)
    law = distribution_of(1)
    expected = np.array([law.log_prob(torch.tensor([[float(v)]])).exp().item() for v in support])
    observed = np.array([(drawn == v).sum().item() for v in support])
    keep = expected * DRAWS > 5
    observed = np.append(observed[keep], DRAWS - observed[keep].sum())
    expected = np.append(expected[keep], 1 - expected[keep].sum()) * DRAWS
    observed, expected = observed[expected > 1e-3], expected[expected > 1e-3]
    assert st.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-4


def test_draws_of_a_grid_column_stay_on_the_grid_and_hit_its_atoms() -> None:
    n = DRAWS
    mixture = grid_mixture(0.5, [0.0, 40.0])
    many = GridLogisticMixture(
        mixture.log_weights.expand(n, 1, -1), mixture.means.expand(n, 1, -1), mixture.log_scales.expand(n, 1, -1),
        mixture.location, mixture.scale, mixture.resolution, mixture.atoms,
    )  # fmt: skip
    drawn = many.sample(keyed(n))
    assert torch.equal((drawn / 0.5).round() * 0.5, drawn)
    for value in (0.0, 40.0, 27.5):
        p = mixture.log_prob(double(value)[None, None]).exp().item()
        assert abs((drawn == value).double().mean().item() - p) < 4.5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize(
    "space",
    [Binary((2, 3)), Integers((3,), 4), Integers((1, 4, 4), 20), Reals((3,)), Counts((3,)), Tokens(4, 5)],
    ids=lambda space: f"{type(space).__name__}{space.shape}",
)
def test_every_head_gives_a_value_a_cell_and_samples_of_its_space(space) -> None:  # type: ignore[no-untyped-def]
    for name in likelihoods(space):
        torch.manual_seed(0)
        distribution = head(name, space, (6,))(torch.randn(5, 6))
        drawn = distribution.sample(keyed(5))
        space.validate(drawn)
        assert distribution.log_prob(drawn).shape == drawn.shape
        assert distribution.best().shape == drawn.shape


def test_output_biases_start_at_the_marginals() -> None:
    data = torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    bernoulli = head("bernoulli", Binary((2,)), (3,))
    bernoulli.initialise([(data, None)])
    probability = torch.sigmoid(bernoulli.output.bias)
    torch.testing.assert_close(probability, torch.tensor([0.25, 0.75]))


def test_spikes_of_a_column_become_atoms() -> None:
    space = Table(columns=(Column("gain", "integer"), Column("noise", "real")))
    values = torch.randint(1, 10_000, (1000, 2), generator=torch.Generator().manual_seed(0)).double()
    values[:900, 0] = 0.0
    table = head("table", space, (3,))
    assert isinstance(table, TableHead)
    table.initialise([(values[:500], None), (values[500:], None)])
    assert table.atoms[0, table.has_atom[0]].tolist() == [0.0]
    assert not table.has_atom[1].any()
    cells = table(torch.zeros(1, 3)).log_prob(torch.tensor([[0.0, 5.0]], dtype=torch.float64))
    assert cells[0, 0].exp().item() == pytest.approx(0.9, abs=0.01)


def test_an_unsuited_likelihood_is_refused_with_those_that_suit() -> None:
    with pytest.raises(
        Unsupported, match=r"expected one of auto, negative-binomial, multinomial for Counts, got 'normal'"
    ):
        head("normal", Counts((2,)), (3,))
    with pytest.raises(ValueError, match=r"no option 'component'; did you mean 'components'"):
        head("logistic", Integers((2,), 256), (3,), component=3)
