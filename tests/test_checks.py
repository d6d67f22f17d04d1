"""Every model keeps the contract, and the checks that say so are themselves right."""

from __future__ import annotations

import math

import pytest
import torch

from likely import models
from likely.checks import CheckFailed, Source, check_model, check_names
from likely.checks.cases import _TINY, _TINY_WITH_HOLES
from likely.checks.points import points_of
from likely.contract import (
    Binary,
    Bound,
    Column,
    Counts,
    Integers,
    Model,
    Reals,
    Space,
    Table,
    Tokens,
    Unsupported,
    noise_or_global,
)
from likely.data.preprocessing import Dequantise, Log1p, Logit, Preprocessed, Standardise
from likely.models.gaussian import Gaussian
from likely.models.glow import Glow
from likely.models.mixture import Mixture
from likely.models.vae import VAE
from toy_models import Autoregressive, Diffusion, Flow

SPACES = [space for spaces in _TINY.values() for space in spaces] + list(_TINY_WITH_HOLES.values())


# Every model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.names())
def test_model_keeps_the_contract(name: str) -> None:
    results = check_model(models.find(name))
    assert {result.check for result in results} == set(check_names())
    assert all(result.status != "failed" for result in results)


@pytest.mark.parametrize(
    ("model", "space", "condition"),
    [
        (Autoregressive, Tokens(3, 3), Integers((1,), 3)),
        (Flow, Reals((2,)), Reals((2,))),
        (Diffusion, Reals((2,)), None),
    ],
)
def test_toy_model_keeps_the_contract(model: type[Model], space: Space, condition: Space | None) -> None:
    check_model(model, space, condition)


def tiny_vae(space: Space, condition: Space | None = None, **options: object) -> VAE:
    return VAE(space, condition, latent_dim=2, hidden=(4,), activation="tanh", **options)  # type: ignore[arg-type]


TINY_FLOW = {"transforms": 1, "hidden": (8,), "tails": "normal"}
OPTIONS = {
    "VAE with importance weights": lambda: tiny_vae(Binary((2, 3)), samples=4),
    "VAE with a Gaussian prior": lambda: tiny_vae(Integers((2,), 3), prior="gaussian"),
    "VAE with a mixture prior": lambda: tiny_vae(Binary((2, 3)), prior="mixture", prior_options={"components": 3}),
    "VAE with Student's t": lambda: tiny_vae(Reals((2,)), likelihood="student"),
    "VAE with one scale a cell": lambda: tiny_vae(Reals((2,)), likelihood_options={"scale": "cell"}),
    "VAE with logistics": lambda: tiny_vae(Integers((2,), 4), likelihood="logistic"),
    "VAE with a multinomial": lambda: tiny_vae(Counts((3,)), likelihood="multinomial"),
    "VAE with a flow as the prior": lambda: tiny_vae(Binary((2, 3)), prior="maf", prior_options=TINY_FLOW),
    "VAE with a flow as the posterior": lambda: tiny_vae(Binary((2, 3)), posterior="iaf", posterior_options=TINY_FLOW),
    "VAE with flows all round": lambda: tiny_vae(
        Reals((2,)),
        Integers((1,), 3),
        prior="realnvp",
        prior_options=TINY_FLOW,
        posterior="nsf",
        posterior_options={**TINY_FLOW, "conditioner": "coupling"},
        samples=2,
    ),
    "Glow, additive, plain convolutions": lambda: Glow(
        Reals((3, 1, 1)), levels=2, depth=1, width=4, coupling="additive", convolution="plain"
    ),
    "VAE with warm-up, free bits, dropout": lambda: tiny_vae(Binary((2, 3)), kl_warmup=50, free_bits=0.05, dropout=0.1),
    "mixture with full covariance": lambda: Mixture(Reals((2,), missing=True), components=3, covariance="full"),
    "mixture of Poissons": lambda: Mixture(Counts((2,)), components=3, counts="poisson"),
    "PPCA": lambda: Gaussian(Reals((3,)), rank=1),
    "standardised": lambda: Preprocessed(Gaussian(Reals((2,))), Standardise()),
}


@pytest.mark.parametrize("build", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_keep_the_contract(build) -> None:
    model = build()
    check_model(model, skip=["construction"] if isinstance(model, Preprocessed) else [])


BEHIND_TRANSFORMS = {
    "dequantised": lambda: Preprocessed(Gaussian(Reals((2,))), Dequantise(Integers((2,), 3))),
    "logit": lambda: Preprocessed(Gaussian(Reals((2,))), Dequantise(Integers((2,), 3)), Logit(0, 3, alpha=0.05)),
    "counts": lambda: Preprocessed(Gaussian(Reals((2,))), Dequantise(Counts((2,))), Log1p()),
}


@pytest.mark.parametrize("build", BEHIND_TRANSFORMS.values(), ids=BEHIND_TRANSFORMS.keys())
def test_dequantised_model_is_a_bound(build) -> None:
    # A normal law reaches beyond the space: that mass is lost to the bound and added to the outer values by the
    # sampler, so the importance weights sum to less than one.
    check_model(build(), skip=["construction", "importance_weights", "sample_frequencies"])


# The checks themselves -------------------------------------------------------------------------------------------


class Coins(Model):
    """Independent biased coins, with every ability to be wrong."""

    spaces = (Binary,)

    def __init__(self, space: Space, condition: Space | None = None, *, shown: float = 0.3, drawn: float = 0.3):
        super().__init__(space, condition)
        if space.missing:
            raise Unsupported("coins do not hide")
        self.shown, self.drawn = shown, drawn

    def bound(self, x, condition=None, noise=None):
        heads = x.flatten(1).sum(1).double()
        tails = self.space.dims - heads
        return Bound("exact", {"coins": heads * math.log(self.shown) + tails * math.log(1 - self.shown)})

    def sample(self, n, condition=None, noise=None):
        return (noise_or_global(noise, torch.empty(0)).uniform((n, *self.space.shape)) < self.drawn).float()


def status(model: type[Model] | Model, check: str, space: Space | None = None) -> str:
    (result,) = check_model(model, space, only=[check], on_fail="record")
    return result.status


def test_right_coins_pass_and_wrong_ones_fail() -> None:
    right, wrong = Coins(Binary((2, 3))), Coins(Binary((2, 3)), drawn=0.33)
    for check in ("total_mass", "cross_entropy", "samples", "sample_frequencies", "determinism", "save_load"):
        assert status(right, check) == "passed"
    assert status(wrong, "sample_frequencies") == "failed"


def test_failure_names_model_space_check_and_value() -> None:
    class Doubled(Coins):
        """Twice the probability everywhere."""

        def bound(self, x, condition=None, noise=None):
            return super().bound(x).map(lambda part: part + math.log(2.0))

    with pytest.raises(CheckFailed, match=r"Binary\(shape=\(2, 3\)\): total_mass: .* got trained: 2\.00000"):
        check_model(Doubled(Binary((2, 3))), only=["total_mass"])


def test_names_of_checks_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected names of checks .*total_mass.* got 'mass'"):
        check_model(Coins, Binary((2, 3)), only=["mass"])
    with pytest.raises(ValueError, match="'raise' or 'record', got 'warn'"):
        check_model(Coins, Binary((2, 3)), on_fail="warn")  # type: ignore[arg-type]


def test_record_reports_every_failure_and_skip_leaves_out() -> None:
    wrong = Coins(Binary((2, 3)), drawn=0.9)
    results = check_model(wrong, on_fail="record", skip=["samples"])
    assert [result.check for result in results] == [name for name in check_names() if name != "samples"]
    failed = {result.check for result in results if result.status == "failed"}
    assert "sample_frequencies" in failed
    assert "total_mass" not in failed


def test_global_random_state_and_instance_are_left_alone() -> None:
    model = tiny_vae(Binary((2, 3)))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check_model(model, only=["parts", "samples", "determinism"])
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_seed_gives_the_same_results_again() -> None:
    first, second = (check_model(Coins(Binary((2, 3))), only=["sample_frequencies"], seed=3)[0] for _ in range(2))
    assert first.detail == second.detail


def test_verbose_prints_every_result(capsys) -> None:
    check_model(Coins(Binary((2, 3))), only=["total_mass"], verbose=True)
    assert "passed" in capsys.readouterr().out


def test_declared_space_that_tiny_refuses_is_a_failure() -> None:
    class Shy(Coins):
        """Declares more than it takes."""

        spaces = (Binary, Counts)

        def __init__(self, space, condition=None):
            super().__init__(space, condition)
            if isinstance(space, Counts):
                raise Unsupported("not really")

    results = check_model(Shy, only=["total_mass"], on_fail="record")
    assert [(result.case, result.status) for result in results][1] == ("Counts", "failed")


def test_tiny_that_raises_is_a_failure_with_its_message() -> None:
    class Broken(Coins):
        """Cannot be built."""

        @classmethod
        def tiny(cls, space, condition=None):
            raise RuntimeError("out of luck")

    with pytest.raises(CheckFailed, match="construction: tiny: RuntimeError: out of luck"):
        check_model(Broken)


def test_an_instance_has_its_own_space() -> None:
    with pytest.raises(ValueError, match="expected none beside an instance"):
        check_model(Coins(Binary((2, 3))), Binary((2, 3)))


# Its source and its sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_density_of_the_source_sums_to_one(space: Space) -> None:
    source = Source(space, seed=1)
    data, _ = source.sample(2048, torch.Generator().manual_seed(0))
    points = points_of(space, data, seed=1, n=2**14)
    mass, error = points.integrate(source.log_prob(points.x).exp())
    assert abs(mass - 1) <= 5 * error + 1e-9
    assert error < 0.02


@pytest.mark.parametrize("space", [Binary((2, 3)), Integers((2,), 3), Tokens(3, 3)], ids=str)
def test_source_has_its_own_frequencies_and_is_dependent(space: Space) -> None:
    source = Source(space, seed=2)
    states = points_of(space, torch.zeros(1, *space.shape), seed=0).x
    p = source.log_prob(states).exp()
    x, _ = source.sample(50_000, torch.Generator().manual_seed(0))
    counts = (x.flatten(1)[:, None] == states.flatten(1)[None]).all(2).double().sum(0)
    assert float(((counts - 50_000 * p).square() / (50_000 * p)).sum()) < len(p) + 5 * math.sqrt(2 * len(p))
    entropy = -float((p * p.log()).sum())
    marginals = 0.0
    for cell in states.flatten(1).T:
        q = torch.stack([p[cell == value].sum() for value in cell.unique()])
        marginals -= float((q * q.log()).sum())
    assert marginals - entropy > 0.2  # nats of mutual information: independent models cannot come close


def test_source_moves_with_its_condition_and_leaves_cells_out() -> None:
    space = Table(columns=(Column("a", "categorical", levels=3, missing=True), Column("b", "real", missing=True)))
    source = Source(space, Integers((1,), 3), seed=0)
    x, condition = source.sample(4000, torch.Generator().manual_seed(0))
    assert condition is not None
    own, other = source.log_prob(x, condition), source.log_prob(x, condition.roll(1, 0))
    assert float((own - other).mean()) > 0.1
    assert 0.15 < float(torch.isnan(x).double().mean()) < 0.25
    hidden = torch.full((1, 2), math.nan, dtype=torch.float64)
    assert float(source.log_prob(hidden, condition[:1])) == pytest.approx(0.0, abs=1e-12)
    with pytest.raises(ValueError, match="condition: expected a batch"):
        source.log_prob(x)


@pytest.mark.parametrize("space", [Reals((2,)), Counts((2,))], ids=str)
def test_sums_over_unbounded_spaces_have_honest_errors(space: Space) -> None:
    data, _ = Source(space, seed=0).sample(2048, torch.Generator().manual_seed(1))
    other = Source(space, seed=5, weights=(0.1, 0.1, 0.8), spread=1.5)
    misses = []
    for seed in range(12):
        points = points_of(space, data, seed)
        mass, error = points.integrate(other.log_prob(points.x).exp())
        misses.append((mass - 1) / error)
    assert max(abs(miss) for miss in misses) < 5
    assert 0.2 < torch.tensor(misses).square().mean() < 4
