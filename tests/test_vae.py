"""What is particular to the VAE: its gradients, its loss options, its imputation, and its priors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from likely.contract import Binary, Bound, Column, Counts, Integers, Model, Reals, Table, Unsupported
from likely.models.vae import VAE
from likely.noise import KeyedNoise, StreamNoise, content_keys

BITS = Binary((6,))


def stream(seed: int) -> StreamNoise:
    return StreamNoise(torch.Generator().manual_seed(seed))


def binary_rows(n: int, seed: int = 0) -> torch.Tensor:
    return (torch.rand(n, 6, generator=torch.Generator().manual_seed(seed)) < 0.5).double()


def gradients(model: VAE, x: torch.Tensor, repeats: int) -> torch.Tensor:
    """Gradients of the loss with fresh noise: shape ``(repeats, parameters)``."""
    rows = []
    for seed in range(repeats):
        model.zero_grad()
        model.loss(x, None, stream(seed)).value.backward()
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return torch.stack(rows)


@pytest.mark.parametrize("samples", [1, 4])
def test_the_path_gradient_has_the_mean_of_the_total_one_and_the_loss_has_its_value(samples: int) -> None:
    x = binary_rows(1).expand(4000, 6)  # one example many times: means over its posterior
    found = {}
    for name in ("total", "path"):
        model = VAE.tiny(BITS).double()
        model.samples, model.gradient = samples, name
        rows = gradients(model, x, 25)
        found[name] = rows.mean(0), rows.var(0) / 25
    # The two estimates share their noise, so that the error of their difference is below the sum of their errors.
    error = (found["total"][1] + found["path"][1]).sqrt()
    assert ((found["total"][0] - found["path"][0]).abs() < 4.5 * error + 1e-6).all()
    values = {name: VAE.tiny(BITS).double() for name in found}
    for name, model in values.items():
        model.samples, model.gradient = samples, name
    losses = {name: model.loss(x, None, stream(0)).value.item() for name, model in values.items()}
    assert losses["path"] == pytest.approx(losses["total"], abs=0.01 if samples == 1 else 1e-9)


def test_the_path_gradient_vanishes_at_a_perfect_posterior_without_noise() -> None:
    """Roeder et al. 2017, §3: at q(z|x) = p(z|x) every draw has gradient zero."""
    model = VAE(Reals((1,)), latent_dim=1, hidden=(1,), activation="relu", likelihood_options={"scale": 1.0})
    # p(x | z) = N(b, 1) whatever z is: then p(z | x) = p(z) = N(0, 1).
    with torch.no_grad():
        for module in (model.posterior_head, model.likelihood_head.output):
            for parameter in module.parameters():
                parameter.zero_()
    x = torch.randn(50, 1, generator=torch.Generator().manual_seed(0))
    spread = {}
    for name in ("total", "path"):
        model.gradient = name
        model.zero_grad()
        model.samples = 1
        model.loss(x, None, stream(0)).value.backward()
        spread[name] = model.posterior_head.weight.grad.abs().max().item()
    assert spread["path"] == 0.0


def test_warm_up_and_free_bits_change_the_loss_and_never_the_bound() -> None:
    x = binary_rows(50).float()
    plain = VAE.tiny(BITS)
    expected = plain.bound(x, None, KeyedNoise(0, content_keys(x)))
    for options in ({"kl_warmup": 10}, {"free_bits": 5.0}):
        model = VAE(BITS, latent_dim=2, hidden=(4,), activation="tanh", **options)
        model.load_state_dict(plain.state_dict())
        got = model.bound(x, None, KeyedNoise(0, content_keys(x)))
        assert torch.equal(got.nats, expected.nats)
        assert model.loss(x, None, stream(0), step=0).value != plain.loss(x, None, stream(0), step=0).value
    warm = VAE(BITS, latent_dim=2, hidden=(4,), activation="tanh", kl_warmup=10)
    warm.load_state_dict(plain.state_dict())
    bound = plain.bound(x, None, stream(0))
    reconstruction, kl = bound.parts["reconstruction"].mean(), -bound.parts["kl"].mean()
    for step, weight in ((0, 0.1), (4, 0.5), (9, 1.0), (500, 1.0)):
        value = warm.loss(x, None, stream(0), step=step).value.item()
        assert value == pytest.approx((weight * kl - reconstruction).item() / 6, rel=1e-5)


def test_importance_weights_average_to_the_bound_of_many_samples() -> None:
    x = binary_rows(8)
    model = VAE.tiny(BITS).double().eval()
    noise = KeyedNoise(3, content_keys(x))
    log_w = model.log_weights(x, None, 64, noise)
    model.samples = 64
    bound = model.bound(x, None, KeyedNoise(3, content_keys(x)))
    torch.testing.assert_close(bound.nats, torch.logsumexp(log_w, 1) - math.log(64))


class FromBelow(Model):
    """A prior that knows its density from below only."""

    spaces = (Reals,)

    def bound(self, x, condition=None, noise=None):  # type: ignore[no-untyped-def]
        return Bound("lower bound", {"normal": -0.5 * (x.square() + math.log(2 * math.pi)).sum(1) - 0.1})


def test_a_prior_known_from_below_adds_up_in_the_elbo_and_is_refused_with_importance_weights() -> None:
    prior = FromBelow(Reals((2,)))
    model = VAE(BITS, latent_dim=2, hidden=(4,), prior=prior)
    plain = VAE(BITS, latent_dim=2, hidden=(4,))
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("prior.")})
    x = binary_rows(4000).float()
    bound, expected = model.bound(x, None, stream(0)), plain.bound(x, None, stream(0))
    assert list(bound.parts) == ["reconstruction", "prior", "entropy"]
    difference = expected.nats - bound.nats - 0.1  # analytic against sampled KL: equal in the mean
    assert abs(difference.mean()) < 4.5 * difference.std() / 4000**0.5
    with pytest.raises(Unsupported, match=r"samples: prior .* known only as a lower bound"):
        VAE(BITS, latent_dim=2, hidden=(4,), prior=prior, samples=5)
    with pytest.raises(Unsupported, match=r"samples: prior .* known only as a lower bound"):
        model.log_weights(x, None, 5, stream(0))
    with pytest.raises(Unsupported, match="kl_warmup, free_bits"):
        VAE(BITS, samples=5, kl_warmup=100)


def test_a_learned_mixture_prior_gets_gradients_and_samples() -> None:
    model = VAE(BITS, latent_dim=2, hidden=(4,), prior="mixture", prior_options={"components": 3}, samples=2)
    model.loss(binary_rows(10).float(), None, stream(0)).value.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.prior.parameters())
    BITS.validate(model.sample(5, None, stream(1)))


def linear_gaussian(dims: int, latent: int, sigma: float) -> tuple[VAE, torch.Tensor, torch.Tensor]:
    """A VAE whose decoder is x = W z + b + σ ε: relu(z + 10) − 10 = z wherever it matters."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(dims, latent, generator=generator, dtype=torch.float64)
    model = VAE(Reals((dims,), missing=True), latent_dim=latent, hidden=(latent,), activation="relu",
                likelihood_options={"scale": sigma}).double()  # fmt: skip
    first, output = model.decoder[0], model.likelihood_head.output
    with torch.no_grad():
        first.weight.copy_(torch.eye(latent))
        first.bias.fill_(10.0)
        output.weight.copy_(weight)
        output.bias.copy_(-10.0 * weight.sum(1))
        model.posterior_head.weight.zero_()
        model.posterior_head.bias.zero_()
    return model.eval(), weight, weight @ weight.T + sigma**2 * torch.eye(dims, dtype=torch.float64)


def test_imputation_tends_to_the_exact_conditional_mean_and_spread() -> None:
    model, _, covariance = linear_gaussian(dims=4, latent=2, sigma=0.5)
    x = torch.distributions.MultivariateNormal(torch.zeros(4).double(), covariance).sample((3,))
    x[:, 2:] = torch.nan
    observed, hidden = slice(0, 2), slice(2, 4)
    gain = covariance[hidden, observed] @ torch.linalg.inv(covariance[observed, observed])
    mean = x[:, observed] @ gain.T
    spread = (covariance[hidden, hidden] - gain @ covariance[observed, hidden]).diagonal().sqrt()
    keys = torch.arange(3)
    filled = model.impute(x, None, KeyedNoise(0, keys), samples=60_000)
    assert torch.equal(filled[:, observed], x[:, observed])
    torch.testing.assert_close(filled[:, hidden], mean, atol=0.08, rtol=0)
    draws = model.impute(x, None, KeyedNoise(1, keys), draws=4000, samples=60_000)[:, :, hidden]
    assert draws.shape == (4000, 3, 2)
    torch.testing.assert_close(draws.mean(0), mean, atol=0.15, rtol=0)
    torch.testing.assert_close(draws.std(0), spread.expand(3, 2), atol=0.12, rtol=0)


def test_the_bound_of_a_row_with_holes_is_of_the_observed_cells() -> None:
    model, _, covariance = linear_gaussian(dims=4, latent=2, sigma=0.7)
    x = torch.tensor([[0.3, -0.8, torch.nan, 0.5]], dtype=torch.float64)
    seen = [0, 1, 3]
    law = torch.distributions.MultivariateNormal(torch.zeros(3).double(), covariance[seen][:, seen])
    log_w = model.log_weights(x, None, 400_000, KeyedNoise(0, torch.arange(1)))
    estimate = torch.logsumexp(log_w, 1) - math.log(400_000)
    assert estimate.item() == pytest.approx(law.log_prob(x[:, seen]).item(), abs=0.02)


def test_cells_sum_to_the_bound() -> None:
    space = Table(
        columns=(Column("a", "integer", missing=True), Column("b", "categorical", levels=3), Column("c", "real"))
    )
    model = VAE.tiny(space).eval()
    x = torch.tensor([[1.0, 2.0, 0.3], [torch.nan, 0.0, -1.0]], dtype=torch.float64)
    cells = model.column_nats(x, None, KeyedNoise(0, content_keys(x)))
    bound = model.bound(x, None, KeyedNoise(0, content_keys(x)))
    torch.testing.assert_close(cells.sum(1), bound.nats)
    assert cells[1, 0] == 0.0


def test_hidden_cells_are_only_hidden_in_training() -> None:
    space = Table(columns=(Column("a", "integer"), Column("b", "categorical", levels=3)))
    torch.manual_seed(0)
    model = VAE(space, latent_dim=2, hidden=(4,), hide=1.0)
    x = torch.tensor([[1.0, 2.0]], dtype=torch.float64).expand(500, 2)
    in_training = model.loss(x, None, stream(0)).value.item()
    model.eval()
    in_evaluation = model.loss(x, None, stream(0)).value.item()
    assert in_training < in_evaluation  # fewer cells to account for
    with pytest.raises(Unsupported, match="hide"):
        VAE(BITS, hide=0.5)


@pytest.mark.parametrize("network", ["mlp", "residual", "conv"])
def test_networks_are_exchangeable(network: str) -> None:
    space = Integers((1, 7, 5), 16)
    hidden = {"mlp": (16, 16), "residual": (16, 16), "conv": (4, 8, 16)}[network]
    model = VAE(space, Binary((2,)), latent_dim=3, hidden=hidden, network=network, samples=3)
    x, c = torch.randint(16, (4, 1, 7, 5)), torch.tensor([[0.0, 1.0]]).expand(4, 2)
    model.loss(x, c, stream(0)).value.backward()
    space.validate(model.sample(4, c, stream(1)))
    assert model.encode(x, c).shape == (4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.bound(x, c, stream(0)).nats.dtype == torch.float32


def test_without_a_dense_layer_the_latent_vector_is_a_map() -> None:
    space = Integers((2, 8, 6), 16)
    options: dict[str, Any] = {"network": "conv", "hidden": (3, 5, 0)}
    model = VAE(space, latent_dim=4 * 2 * 2, **options, blocks=0).double()  # 2 x 2 places: 6 is halved to 3, then to 2
    x = torch.randint(16, (4, 2, 8, 6)).double()
    model.loss(x, None, stream(0)).value.backward()
    space.validate(model.sample(4, None, stream(1)))

    def places(z: Tensor) -> Tensor:
        return z.unflatten(-1, (4, 2, 2))

    with torch.no_grad():  # what lies far from a place says nothing of it
        far = x.clone()
        far[..., 6:, :] = 15 - far[..., 6:, :]
        changed = places(model.encode(x)) != places(model.encode(far))
        assert changed[..., 1, :].any() and not changed[..., 0, :].any()
        here = model.posterior_head(model.encoder(model.features(x, torch.float64))).unflatten(-1, (8, 2, 2))
        kernel, shift = model.posterior_head.weight[:, :, 0, 0], model.posterior_head.bias
        features = model.encoder(model.features(x, torch.float64))
        assert features.shape == (4, 5, 2, 2)
        expected = torch.einsum("oi,nihw->nohw", kernel, features) + shift[:, None, None]
        assert torch.allclose(here, expected)
    with pytest.raises(ValueError, match="multiple of 4, the places"):
        VAE(space, latent_dim=18, **options)
    with pytest.raises(ValueError, match="dense width"):
        VAE(space, Binary((2,)), latent_dim=16, **options)


def test_a_multinomial_has_the_law_of_its_total() -> None:
    model = VAE.tiny(Counts((2,)))
    model = VAE(Counts((2,)), latent_dim=1, hidden=(3,), likelihood="multinomial").eval()
    x = torch.cartesian_prod(torch.arange(60.0), torch.arange(60.0))
    log_w = model.log_weights(x, None, 2000, KeyedNoise(0, content_keys(x)))
    total = (torch.logsumexp(log_w.double(), 1) - math.log(2000)).exp().sum().item()
    assert total == pytest.approx(1.0, abs=0.01)
    with pytest.raises(Unsupported, match="every count"):
        VAE(Counts((2,), missing=True), likelihood="multinomial")


def test_a_condition_is_required_exactly_when_the_model_has_one() -> None:
    x = binary_rows(2).float()
    with pytest.raises(ValueError, match="built with no condition"):
        VAE.tiny(BITS).bound(x, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="built with a condition"):
        VAE.tiny(BITS, Binary((1,))).bound(x)
