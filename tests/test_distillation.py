"""Progressive distillation where the student is known, and diffusion as the prior of a VAE."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from likely.checks import check_model
from likely.contract import Binary, Column, Integers, Reals, Table, Unsupported
from likely.diffusion import Pair
from likely.diffusion.bound import chain_nats
from likely.diffusion.distillation import WEIGHTS, distillation_error, step, target
from likely.diffusion.parameterisation import alpha_sigma
from likely.models import build, describe
from likely.models.vae import VAE
from likely.models.vdm import VDM
from likely.noise import StreamNoise

MEAN, DEVIATION = 0.4, 0.7


def stream(seed: int = 0) -> StreamNoise:
    return StreamNoise(torch.Generator().manual_seed(seed))


def of_x(x_hat: Tensor, z: Tensor, gamma: Tensor) -> Pair:
    alpha, sigma = alpha_sigma(gamma, z)
    return Pair(x_hat, (z - alpha * x_hat) / sigma)


def gaussian(z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
    """The exact denoiser of N(MEAN, DEVIATION²)."""
    alpha, sigma = alpha_sigma(gamma, z)
    gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    return of_x(MEAN + gain * (z - alpha * MEAN), z, gamma)


def step_of(gamma_t: float, gamma_s: float) -> tuple[float, float]:
    """z_s = slope z_t + level of one DDIM step of the exact denoiser, in NumPy."""

    def both(gamma: float) -> tuple[float, float]:
        return 1 / math.sqrt(1 + math.exp(gamma)), 1 / math.sqrt(1 + math.exp(-gamma))

    (alpha_t, sigma_t), (alpha_s, sigma_s) = both(gamma_t), both(gamma_s)
    gain = alpha_t * DEVIATION**2 / (alpha_t**2 * DEVIATION**2 + sigma_t**2)
    slope_x, level_x = gain, MEAN * (1 - gain * alpha_t)
    ratio = sigma_s / sigma_t
    return ratio + (alpha_s - ratio * alpha_t) * slope_x, (alpha_s - ratio * alpha_t) * level_x


def exact_student(levels: list[float]):
    """x̂ = slope z + level at each of the student's levels, from the composition of two steps."""
    table = {}
    for t, m, s in zip(levels[:-2:2], levels[1:-1:2], levels[2::2]):
        (a1, b1), (a2, b2) = step_of(t, m), step_of(m, s)
        alpha = {g: 1 / math.sqrt(1 + math.exp(g)) for g in (t, s)}
        ratio = math.sqrt((1 + math.exp(-t)) / (1 + math.exp(-s)))
        width = alpha[s] - ratio * alpha[t]
        table[round(t, 6)] = ((a1 * a2 - ratio) / width, (a2 * b1 + b2) / width)

    def student(z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
        rows = torch.tensor([table[round(g, 6)] for g in gamma.tolist()], dtype=z.dtype)
        return of_x(rows[:, :1] * z + rows[:, 1:], z, gamma)

    return student, table


LEVELS = np.linspace(5.0, -6.0, 17)


def test_the_exact_student_of_a_gaussian_has_no_error() -> None:
    levels = torch.from_numpy(LEVELS)
    student, _ = exact_student(LEVELS.tolist())
    f = MEAN + DEVIATION * torch.randn(200, 1, dtype=torch.float64)
    assert distillation_error(student, gaussian, f, levels, stream()).max() < 1e-20
    assert distillation_error(gaussian, gaussian, f, levels, stream()).mean() > 1e-4  # the teacher is not its student


def test_least_squares_finds_the_exact_student() -> None:
    """What training converges to: regression of x* on z at one level gives the student's slope and level."""
    t, m, s = LEVELS[4:7]
    z = torch.randn(50, 1, dtype=torch.float64)
    gammas = [torch.full((50,), float(g), dtype=torch.float64) for g in (t, m, s)]
    x_star = target(gaussian, z, *gammas)
    slope, level = np.polyfit(z[:, 0].numpy(), x_star[:, 0].numpy(), 1)
    assert (slope, level) == pytest.approx(exact_student(LEVELS.tolist())[1][round(float(t), 6)], abs=1e-10)


def test_a_students_step_ends_where_two_of_its_teacher_do() -> None:
    network = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()

    def teacher(z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
        return of_x(network(torch.cat([z, gamma[:, None]], 1)), z, gamma)

    z = torch.randn(6, 2, dtype=torch.float64)
    t = torch.linspace(-4, 5, 6, dtype=torch.float64)
    m, s = t - 0.7, t - 1.1
    x_star = target(teacher, z, t, m, s)
    ends = step(lambda z, gamma, context=None: of_x(x_star, z, gamma), z, t, s)
    torch.testing.assert_close(ends, step(teacher, step(teacher, z, t, m), m, s))


def test_weights_are_those_of_the_errors_they_stand_for() -> None:
    gamma = torch.linspace(-6, 6, 7, dtype=torch.float64)
    z, x = torch.randn(2, 7, 1, dtype=torch.float64).unbind(0)
    alpha, sigma = alpha_sigma(gamma, z)
    truth = of_x(torch.randn(7, 1, dtype=torch.float64), z, gamma)
    guess = of_x(x, z, gamma)
    of_x_hat, of_eps = (guess.x - truth.x).square(), (guess.eps - truth.eps).square()
    of_v = ((alpha * guess.eps - sigma * guess.x) - (alpha * truth.eps - sigma * truth.x)).square()
    torch.testing.assert_close(WEIGHTS["truncated"](-gamma)[:, None] * of_x_hat, torch.maximum(of_x_hat, of_eps))
    torch.testing.assert_close(WEIGHTS["velocity"](-gamma)[:, None] * of_x_hat, of_v)


def test_missing_cells_take_no_part() -> None:
    def mixing(z: Tensor, gamma: Tensor, context: Tensor | None = None) -> Pair:
        return of_x(z.sum(1, keepdim=True) + 0.3 * z, z, gamma)

    observed = torch.tensor([[1.0, 1.0, 0.0]]).expand(8, 3)
    f, levels = torch.randn(8, 3), torch.linspace(4.0, -4.0, 5)
    error = distillation_error(mixing, mixing, f, levels, stream(), observed=observed)
    elsewhere = distillation_error(mixing, mixing, f + 5 * (1 - observed), levels, stream(), observed=observed)
    torch.testing.assert_close(error, elsewhere)
    assert error.min() > 0


def test_the_students_own_bound_is_that_of_its_chain_and_says_what_haste_costs() -> None:
    """−½ Σ expm1(γ_t − γ_s) E(ε − ε̂)² in closed form, for the exact denoiser and for the student on the same grid."""
    student, table = exact_student(LEVELS.tolist())
    grid = torch.from_numpy(LEVELS[::2].copy())

    def closed(affine) -> float:
        total = 0.0
        for t, s in zip(grid[:-1].tolist(), grid[1:].tolist()):
            alpha, sigma = 1 / math.sqrt(1 + math.exp(t)), 1 / math.sqrt(1 + math.exp(-t))
            slope, level = affine(t)
            # x̂ − x with z = α x + σ ε, and ε̂ − ε = −(α/σ)(x̂ − x)
            bias = (slope * alpha - 1) * MEAN + level
            error = (bias**2 + (slope * alpha - 1) ** 2 * DEVIATION**2 + (slope * sigma) ** 2) * (alpha / sigma) ** 2
            total -= 0.5 * math.expm1(t - s) * error
        return total

    def optimal(t: float) -> tuple[float, float]:
        alpha, sigma = 1 / math.sqrt(1 + math.exp(t)), 1 / math.sqrt(1 + math.exp(-t))
        gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
        return gain, MEAN * (1 - gain * alpha)

    f = MEAN + DEVIATION * torch.randn(4000, 1, dtype=torch.float64)
    expected = {}
    for name, denoise, affine in (
        ("exact", gaussian, optimal),
        ("student", student, lambda t: table[round(t, 6)]),
    ):
        nats = chain_nats(denoise, f, grid, stream(1), draws=4)[:, 0]
        expected[name] = closed(affine)
        assert float(nats.mean()) == pytest.approx(expected[name], abs=4.5 * float(nats.std()) / len(nats) ** 0.5)
    assert expected["student"] < expected["exact"] - 0.01  # nothing beats the exact denoiser on its grid


@pytest.mark.parametrize(
    ("levels", "weight", "message"),
    [(4, "truncated", "an even number of steps of the teacher, got 3"), (5, "snr", "expected one of truncated")],
)
def test_what_it_refuses(levels: int, weight: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distillation_error(
            gaussian, gaussian, torch.zeros(2, 1), torch.linspace(3, -3, levels), stream(), weight=weight
        )


@pytest.mark.parametrize("recipe", ["distillation", "vdm_cifar10"])
def test_recipes_run(recipe: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    papers = Path(__file__).parent.parent / "papers"
    monkeypatch.delenv("LIKELY_DATA", raising=False)
    monkeypatch.syspath_prepend(str(papers))
    monkeypatch.setattr("sys.argv", [f"{recipe}.py", "--dry-run"])
    runpy.run_path(str(papers / f"{recipe}.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("# ")


# Students of a model ---------------------------------------------------------------------------------------------


def vdm(space=None, **options) -> VDM:
    torch.manual_seed(0)
    mlp = {"width": 16, "depth": 1, "waves": 4}
    model = VDM(space or Integers((1, 2, 2), 4), network="mlp", network_options=mlp, parameterisation="f", **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


def test_a_student_is_a_copy_with_half_the_steps_and_an_ordinary_model() -> None:
    teacher = vdm(timesteps=8)
    student = teacher.student()
    assert (student.timesteps, student.sample_steps, student.sampler) == (4, 4, "ddim")
    assert set(student.state_dict()) == set(teacher.state_dict())
    x = torch.randint(0, 4, (5, 1, 2, 2)).float()
    student.initialise([(x, None)])  # which would set its scales anew
    for name, value in teacher.state_dict().items():
        assert torch.equal(student.state_dict()[name], value)
    copied = build(describe(student))
    copied.load_state_dict(student.state_dict())
    assert copied.teacher is None
    assert torch.equal(copied.bound(x, noise=stream()).nats, student.bound(x, noise=stream()).nats)
    assert vdm(sample_steps=6).student().timesteps == 3  # a model in continuous time has its sampler's steps
    assert student.student().student().timesteps == 1


def test_a_student_learns_what_its_teacher_does_in_two_steps() -> None:
    teacher = vdm(timesteps=8, gamma_min=-4.0, gamma_max=3.0)
    student = teacher.student()
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    x = torch.randint(0, 4, (64, 1, 2, 2), generator=torch.Generator().manual_seed(1)).float()
    z = torch.randn(64, 1, 2, 2, generator=torch.Generator().manual_seed(2))

    def loss() -> float:
        return float(student.loss(x, noise=stream(3)).value.detach())

    def distance() -> float:
        """Between where a step of the student and two of the teacher end."""
        t, m, s = (torch.full((64,), g) for g in (0.5 * (3 - 4), -0.5 - 0.875, -0.5 - 1.75))
        two = step(teacher.denoise, step(teacher.denoise, z, t, m), m, s)
        return float((step(student.denoise, z, t, s) - two).detach().square().mean())

    first, apart = loss(), distance()
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)
    for i in range(150):
        optimizer.zero_grad()
        student.loss(x, noise=stream(i)).value.backward()
        optimizer.step()
    assert loss() < 0.3 * first
    assert distance() < 0.3 * apart
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_students_of_conditions_and_tables() -> None:
    table = Table(columns=(Column("a", "real", missing=True), Column("b", "categorical", levels=3)))
    model = VDM(table, Reals((2,)), network="mlp", network_options={"width": 8, "depth": 1}, sample_steps=4)
    student = model.student()
    x = torch.tensor([[0.5, 1.0], [torch.nan, 2.0]], dtype=torch.float64)
    loss = student.loss(x, torch.randn(2, 2), stream())
    loss.value.backward()
    assert torch.isfinite(loss.value)
    assert set(loss.log) == {"distillation"}


# Latent diffusion ------------------------------------------------------------------------------------------------

CHAIN = {"network": "mlp", "network_options": {"width": 8, "depth": 1, "waves": 4}, "timesteps": 3,
         "gamma_min": -2.0, "gamma_max": 1.5, "bound_levels": 3}  # fmt: skip


def latent_diffusion(**options) -> VAE:
    torch.manual_seed(0)
    model = VAE(
        Binary((2, 2)), latent_dim=1, hidden=(4,), activation="tanh", prior="vdm", prior_options=CHAIN, **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return model


def test_latent_diffusion_keeps_the_contract() -> None:
    """Among the checks: Σ exp(bound) ≤ 1 over all images, and its samples have its own frequencies."""
    results = check_model(latent_diffusion())
    assert {r.check: r.status for r in results}["total_mass"] == "passed"


def test_two_stages_keep_the_contract() -> None:
    check_model(latent_diffusion(two_stage=True), skip=["gradients"])  # it has those of two losses, see below


def test_its_number_is_a_lower_bound_and_no_weight() -> None:
    model = latent_diffusion()
    x = torch.ones(3, 2, 2)
    bound = model.bound(x, noise=stream())
    assert (bound.kind, list(bound.parts)) == ("lower bound", ["reconstruction", "prior", "entropy"])
    assert not model.can("log_weights")
    assert not model.can("impute")
    for call in (lambda: model.log_weights(x, None, 5, stream()), lambda: model.impute(x, noise=stream())):
        with pytest.raises(Unsupported, match="'vdm' is known only as a lower bound"):
            call()
    with pytest.raises(Unsupported, match="use samples=1"):
        latent_diffusion(samples=2)
    assert set(model.sample(50, noise=stream()).unique().tolist()) <= {0.0, 1.0}


def test_two_stages_have_the_value_of_one_and_separate_gradients() -> None:
    x = (torch.rand(16, 2, 2, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    joint, staged = (latent_diffusion(two_stage=flag).double() for flag in (False, True))
    plain = VAE(Binary((2, 2)), latent_dim=1, hidden=(4,), activation="tanh").double()
    plain.load_state_dict({k: v for k, v in staged.state_dict().items() if not k.startswith("prior")})
    losses = {m: m.loss(x, noise=stream(5)).value for m in (joint, staged, plain)}
    assert float(losses[staged].detach()) == pytest.approx(float(losses[joint].detach()), rel=1e-12)
    for loss in losses.values():
        loss.backward()
    gradients = {m: {k: p.grad for k, p in m.named_parameters()} for m in losses}
    for name, gradient in gradients[staged].items():
        expected = gradients[joint if name.startswith("prior") else plain][name]
        torch.testing.assert_close(gradient, expected)
    encoder = next(name for name in gradients[plain] if name.startswith("encoder"))
    assert not torch.allclose(gradients[joint][encoder], gradients[plain][encoder])


@pytest.mark.parametrize("options", [{"prior": "normal"}, {"samples": 2, "prior": "gaussian"}, {"kl_warmup": 5}])
def test_two_stages_refuse_what_they_are_not_made_for(options) -> None:
    with pytest.raises(Unsupported, match="two_stage: needs a learned prior"):
        VAE(Binary((4,)), latent_dim=1, hidden=(4,), two_stage=True, **{"prior": "gaussian", **options})
