"""Models whose answers are known in closed form: ELBO ≤ L_k ≤ log p(x), with the gaps that theory gives."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from likely.contract import Binary, Reals
from likely.data.dataset import Dataset
from likely.distributions.heads import NormalHead
from likely.evaluation import importance_weighted
from likely.models.vae import VAE
from likely.noise import KeyedNoise

DIMS, LATENT, SIGMA = 4, 2, 0.7


class Flat(nn.Module):
    """An encoder that hands the features on."""

    def forward(self, features: Tensor, context: Tensor | None = None) -> Tensor:
        return features.flatten(1)


class Given:
    """Noise that is what one says it is."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def normal(self, shape) -> Tensor:
        return self.values.expand(tuple(shape))

    def uniform(self, shape) -> Tensor:
        raise AssertionError("a linear-Gaussian model draws normal variates only")


class LinearGaussian:
    """p(z) = N(0, I), p(x | z) = N(Wz + b, σ²I), q(z | x) = N(Ax + a, diag s²); and what follows from it by hand.

    The marginal is N(b, C) with C = WWᵀ + σ²I, the posterior N(M⁻¹Wᵀ(x − b), σ²M⁻¹) with M = WᵀW + σ²I
    (Tipping & Bishop 1999, probabilistic PCA).
    """

    def __init__(self, exact_posterior: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(DIMS, LATENT, generator=generator, dtype=torch.float64)
        if exact_posterior:  # orthogonal columns give a diagonal posterior, which q can be
            self.weight = torch.linalg.qr(self.weight)[0] * torch.tensor([1.5, 0.8], dtype=torch.float64)
        self.bias = torch.randn(DIMS, generator=generator, dtype=torch.float64)
        self.m = self.weight.T @ self.weight + SIGMA**2 * torch.eye(LATENT, dtype=torch.float64)
        self.posterior_covariance = SIGMA**2 * torch.linalg.inv(self.m)
        self.a = torch.linalg.inv(self.m) @ self.weight.T
        self.scale = self.posterior_covariance.diagonal().sqrt()
        if not exact_posterior:
            self.a = self.a * 0.9 + 0.02
            self.scale = self.scale * torch.tensor([0.9, 1.15], dtype=torch.float64)
        self.x = self.bias + torch.randn(6, DIMS, generator=generator, dtype=torch.float64) * 1.2

    def model(self, samples: int = 1) -> VAE:
        """The same as a VAE whose networks are linear maps."""
        options = {"scale": SIGMA}
        vae = VAE(Reals((DIMS,)), latent_dim=LATENT, hidden=(2,), samples=samples, likelihood_options=options).double()
        vae.encoder, vae.decoder = Flat(), nn.Identity()
        vae.posterior_head = nn.Linear(DIMS, 2 * LATENT).double()
        vae.likelihood_head = NormalHead(vae.space, (LATENT,), scale=SIGMA).double()
        with torch.no_grad():
            vae.posterior_head.weight.copy_(torch.cat([self.a, torch.zeros_like(self.a)]))
            vae.posterior_head.bias.copy_(torch.cat([-self.a @ self.bias, self.scale.log()]))
            vae.likelihood_head.output.weight.copy_(self.weight)
            vae.likelihood_head.output.bias.copy_(self.bias)
        return vae.eval()

    def log_p(self) -> np.ndarray:
        """Exact log p(x), nats."""
        covariance = self.weight @ self.weight.T + SIGMA**2 * torch.eye(DIMS, dtype=torch.float64)
        return stats.multivariate_normal(self.bias.numpy(), covariance.numpy()).logpdf(self.x.numpy())

    def q_mean(self) -> np.ndarray:
        return ((self.x - self.bias) @ self.a.T).numpy()

    def posterior_mean(self) -> np.ndarray:
        return (torch.linalg.solve(self.m, self.weight.T @ (self.x - self.bias).T).T).numpy()

    def expected_reconstruction(self) -> np.ndarray:
        """E_q log p(x | z) = −D/2 log 2πσ² − (|x − b − Wμ|² + tr W diag(s²) Wᵀ) / 2σ²."""
        weight = self.weight.numpy()
        error = self.x.numpy() - self.bias.numpy() - self.q_mean() @ weight.T
        spread = np.trace(weight @ np.diag(self.scale.numpy() ** 2) @ weight.T)
        return -0.5 * DIMS * np.log(2 * np.pi * SIGMA**2) - (np.sum(error**2, 1) + spread) / (2 * SIGMA**2)

    def kl_to_prior(self) -> np.ndarray:
        return gaussian_kl(self.q_mean(), np.diag(self.scale.numpy() ** 2), np.zeros(LATENT), np.eye(LATENT))

    def kl_to_posterior(self) -> np.ndarray:
        q_covariance = np.diag(self.scale.numpy() ** 2)
        return gaussian_kl(self.q_mean(), q_covariance, self.posterior_mean(), self.posterior_covariance.numpy())

    def weight_variance(self) -> np.ndarray:
        """Var(w / p(x)) = ∫ p(z | x)² / q(z) dz − 1, a Gaussian integral."""
        target, proposal = self.posterior_covariance.inverse().numpy(), np.diag(self.scale.numpy() ** -2)
        precision = 2 * target - proposal
        assert np.linalg.eigvalsh(precision).min() > 0
        variances = []
        for mean, centre in zip(self.posterior_mean(), self.q_mean()):
            linear = 2 * target @ mean - proposal @ centre
            constant = 2 * mean @ target @ mean - centre @ proposal @ centre
            exponent = 0.5 * (linear @ np.linalg.solve(precision, linear) - constant)
            determinants = 2 * np.linalg.slogdet(target)[1] - np.linalg.slogdet(proposal)[1]
            log_second = 0.5 * (determinants - np.linalg.slogdet(precision)[1]) + exponent
            variances.append(np.expm1(log_second))
        return np.array(variances)


def gaussian_kl(mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(N(mean, covariance) ‖ N(other_mean, other)), nats."""
    inverse, gap = np.linalg.inv(other), other_mean - mean
    distance = np.einsum("ni,ij,nj->n", gap, inverse, gap)
    logs = np.linalg.slogdet(other)[1] - np.linalg.slogdet(covariance)[1]
    return 0.5 * (np.trace(inverse @ covariance) + distance - LATENT + logs)


def expected_parts(case: LinearGaussian) -> dict[str, np.ndarray]:
    """E_q of the parts of the bound, without an error: they are quadratic in z, for which 2d points suffice."""
    radius = math.sqrt(LATENT) * torch.eye(LATENT, dtype=torch.float64)
    with torch.no_grad():
        bounds = [case.model().bound(case.x, noise=Given(eps)) for eps in (*radius, *-radius)]
    return {name: np.mean([b.parts[name].numpy() for b in bounds], 0) for name in bounds[0].parts}


# Linear-Gaussian ---------------------------------------------------------------------------------------------------


def test_elbo_term_by_term() -> None:
    case = LinearGaussian()
    parts = expected_parts(case)
    assert list(parts) == ["reconstruction", "kl"]
    np.testing.assert_allclose(parts["reconstruction"], case.expected_reconstruction(), atol=1e-9)
    np.testing.assert_allclose(-parts["kl"], case.kl_to_prior(), atol=1e-9)


def test_elbo_and_kl_to_the_posterior_are_log_p() -> None:
    case = LinearGaussian()
    elbo = sum(expected_parts(case).values())
    np.testing.assert_allclose(elbo + case.kl_to_posterior(), case.log_p(), atol=1e-6)
    assert (case.kl_to_posterior() > 0.01).all()  # or the equality would say nothing of the gap


def test_with_the_exact_posterior_every_weight_is_p() -> None:
    case = LinearGaussian(exact_posterior=True)
    np.testing.assert_allclose(case.kl_to_posterior(), 0.0, atol=1e-12)
    with torch.no_grad():
        log_w = case.model().log_weights(case.x, None, 7, KeyedNoise(0, torch.arange(len(case.x))))
        bound = case.model(samples=3).bound(case.x, noise=KeyedNoise(1, torch.arange(len(case.x))))
    np.testing.assert_allclose(log_w.numpy(), np.repeat(case.log_p()[:, None], 7, 1), atol=1e-9)
    np.testing.assert_allclose(bound.nats.numpy(), case.log_p(), atol=1e-9)


def draws(case: LinearGaussian, n: int) -> np.ndarray:
    with torch.no_grad():
        return case.model().log_weights(case.x, None, n, KeyedNoise(3, torch.arange(len(case.x)))).numpy()


def test_bounds_rise_to_log_p_with_the_gap_that_theory_gives() -> None:
    """log p − E L_k = Var(w/p) / 2k + O(1/k²) (Maddison et al. 2017, arXiv 1705.09279, proposition 1)."""
    case = LinearGaussian()
    log_ratio = draws(case, 2**20) - case.log_p()[:, None]
    variance = case.weight_variance()
    assert (variance > 0.02).all()
    assert (variance < 1.0).all()
    before = None
    for k in (1, 4, 16, 64):
        groups = log_ratio.reshape(len(case.x), -1, k)
        bounds = np.log(np.mean(np.exp(groups), 2))  # L_k − log p, group by group
        gap, error = -bounds.mean(1), bounds.std(1) / math.sqrt(bounds.shape[1])
        assert (gap > -5 * error).all()
        if before is not None:
            assert (gap < before).all()
        before = gap
        if k == 1:
            np.testing.assert_array_less(np.abs(gap - case.kl_to_posterior()), 5 * error)
        if k >= 16:
            second_order = 5 * (variance / k) ** 2  # of the expansion's next term
            np.testing.assert_array_less(np.abs(gap - variance / (2 * k)), 5 * error + second_order)


def test_weights_average_to_p() -> None:
    case = LinearGaussian()
    ratio = np.exp(draws(case, 200_000) - case.log_p()[:, None])
    error = ratio.std(1) / math.sqrt(ratio.shape[1])
    np.testing.assert_array_less(np.abs(ratio.mean(1) - 1), 5 * error)
    np.testing.assert_allclose(ratio.var(1), case.weight_variance(), rtol=0.1)


def test_the_model_with_k_samples_is_the_average_of_k_weights() -> None:
    case = LinearGaussian()
    many = 4000
    x = case.x[:1].expand(many, -1)
    keys = torch.arange(many)
    with torch.no_grad():
        bound = case.model(samples=5).bound(x, noise=KeyedNoise(0, keys)).nats.numpy()
        log_w = case.model().log_weights(x, None, 5, KeyedNoise(0, keys)).numpy()
    np.testing.assert_allclose(bound, np.log(np.mean(np.exp(log_w), 1)), atol=1e-9)


def test_evaluation_gives_the_same_bound() -> None:
    case = LinearGaussian()
    k = 2000
    result = importance_weighted(case.model(), Dataset(Reals((DIMS,)), case.x), samples=k, seed=1)
    variance = case.weight_variance()
    expected = case.log_p() - variance / (2 * k)
    error = np.sqrt(variance / k)
    assert (np.abs(result.example_nats.numpy() - expected) < 5 * error).all()
    assert result.effective_samples == pytest.approx(float(np.mean(k / (1 + variance))), rel=0.05)
    assert result.monte_carlo_error == pytest.approx(math.sqrt(np.sum(variance / k)) / len(variance), rel=0.2)


def test_samples_of_the_linear_gaussian_have_its_moments() -> None:
    case = LinearGaussian()
    n = 200_000
    with torch.no_grad():
        x = case.model().sample(n, noise=KeyedNoise(0, torch.arange(n))).numpy()
    covariance = (case.weight @ case.weight.T).numpy() + SIGMA**2 * np.eye(DIMS)
    np.testing.assert_array_less(np.abs(x.mean(0) - case.bias.numpy()), 5 * np.sqrt(np.diag(covariance) / n))
    spread = np.sqrt((covariance**2 + np.outer(np.diag(covariance), np.diag(covariance))) / n)
    np.testing.assert_array_less(np.abs(np.cov(x.T) - covariance), 5 * spread)


# A space that can be enumerated, a latent that can be integrated ---------------------------------------------------


@pytest.fixture(scope="module")
def enumerated() -> tuple[VAE, Tensor, np.ndarray]:
    """A VAE with one latent dimension over six bits, all 64 states, and log p of each by Gauss-Hermite quadrature."""
    torch.manual_seed(0)
    model = VAE(Binary((2, 3)), latent_dim=1, hidden=(5,), activation="tanh").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.8 * torch.randn(parameter.shape))
        model.posterior_head.weight.mul_(0.3)
        model.posterior_head.bias[1] = 0.2  # wider than the prior, so that no weight is large
    states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6))).reshape(-1, 2, 3)
    nodes, weights = np.polynomial.hermite_e.hermegauss(120)
    with torch.no_grad():
        likelihood = model.likelihood(torch.tensor(nodes)[:, None])
        cells = torch.stack([likelihood.log_prob(state.expand(len(nodes), 2, 3)).sum((1, 2)) for state in states])
    p = (cells.numpy() + np.log(weights / math.sqrt(2 * math.pi))).astype(np.float64)
    return model, states, np.logaddexp.reduce(p, 1)


def test_quadrature_gives_a_distribution(enumerated) -> None:
    assert np.exp(enumerated[2]).sum() == pytest.approx(1.0, abs=1e-9)


def test_weights_of_every_state_average_to_its_probability(enumerated) -> None:
    model, states, log_p = enumerated
    with torch.no_grad():
        log_w = model.log_weights(states, None, 20_000, KeyedNoise(0, torch.arange(64))).numpy()
    ratio = np.exp(log_w - log_p[:, None])
    error = ratio.std(1) / math.sqrt(ratio.shape[1])
    assert np.median(error) < 0.05
    assert (np.abs(ratio.mean(1) - 1) < 6 * error + 1e-9).all()


def test_elbo_of_every_state_is_its_integral_and_below_log_p(enumerated) -> None:
    model, states, log_p = enumerated
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    elbo = np.zeros(64)
    with torch.no_grad():
        for node, weight in zip(nodes, weights / math.sqrt(2 * math.pi)):
            noise = Given(torch.tensor([[node]]))
            elbo += weight * model.bound(states, noise=noise).nats.numpy()
        q = model.posterior(states)
        z = q.mean.numpy() + q.log_scale.exp().numpy() * nodes
        log_q = stats.norm(q.mean.numpy(), q.log_scale.exp().numpy()).logpdf(z)
        cells = [model.likelihood(torch.tensor(row)[:, None]) for row in z]
        log_x = [p.log_prob(x.expand(len(nodes), 2, 3)).sum((1, 2)).numpy() for p, x in zip(cells, states)]
    by_hand = (np.stack(log_x) + stats.norm.logpdf(z) - log_q) @ (weights / math.sqrt(2 * math.pi))
    np.testing.assert_allclose(elbo, by_hand, atol=1e-6)
    assert (elbo < log_p).all()
    assert np.exp(elbo).sum() < 1
