"""Averages of weights, schedule-free descent and schedules, against their closed forms."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from likely.optim.adam import Adam
from likely.optim.averaging import Average, ScheduleFree, exponential, polyak, power
from likely.optim.schedules import learning_rate_factor, trapezoid

# Schedule -----------------------------------------------------------------------------------------------------


def test_learning_rate_factor_against_formula():
    total, warmup = 200, 10
    for step in range(total):
        rise = min(1, (step + 1) / warmup)
        cosine = rise * (1 + math.cos(math.pi * step / total)) / 2
        assert learning_rate_factor(step, total, warmup, "cosine") == pytest.approx(cosine, abs=1e-15)
        assert learning_rate_factor(step, total, warmup, "linear") == pytest.approx(
            rise * (1 - step / total), abs=1e-15
        )
        assert learning_rate_factor(step, total, warmup, "constant") == rise
        root = rise * min(1, math.sqrt(warmup / (step + 1)))
        assert learning_rate_factor(step, total, warmup, "inverse_sqrt") == pytest.approx(root, abs=1e-15)
        assert trapezoid(step, total, warmup, 0.25) == pytest.approx(rise * min(1, (200 - step) / 50), abs=1e-12)
        late = 1.0 if step < 150 else (200 - step) / 50
        assert learning_rate_factor(step, total, 0, "linear", 0.25) == pytest.approx(late, abs=1e-12)
    assert learning_rate_factor(7, total, 0, "cosine", 0.0) == 1.0


# Averages -----------------------------------------------------------------------------------------------------


def test_average_is_the_power_function_profile():
    """Of the values θ_t = t the average is Σ w_t t / Σ w_t, with w_t − the weight − from t^a − (t − 1)^a."""
    weight = torch.zeros((), dtype=torch.float64)
    averages = Average([weight], power(0.1))
    exponent = math.log(0.5) / math.log(0.9)
    for t in range(1, 301):
        weight.fill_(t)
        averages.update(t)
    t = np.arange(1, 301, dtype=np.float64)
    profile = t**exponent - (t - 1) ** exponent
    assert float(averages.values[0]) == pytest.approx(float((profile * t).sum() / profile.sum()), rel=1e-12)


def test_half_life_caps_the_memory():
    """In a long run an impulse has decayed to a half after the half-life, and to a quarter after two."""
    weight = torch.ones((), dtype=torch.float64)
    averages = Average([weight], power(0.5, half_life=100.0), every=4)
    for t in range(1, 100_001):
        averages.update(t)
    weight.zero_()
    for t in range(100_001, 100_201):
        averages.update(t)
        if t == 100_100:
            assert float(averages.values[0]) == pytest.approx(0.5, rel=1e-12)
    assert float(averages.values[0]) == pytest.approx(0.25, rel=1e-12)


def test_average_forgets_the_start_of_a_short_run():
    weight = torch.tensor(1e6)
    averages = Average([weight], power(0.05))
    for t in range(1, 11):
        weight.fill_(1.0)
        averages.update(t)
    assert float(averages.values[0]) == 1.0


def test_applied_averages_are_put_back():
    weight = torch.tensor([1.0, 2.0])
    averages = Average([weight], power(0.5))
    weight += 1
    with averages.applied():
        assert weight.tolist() == [1.0, 2.0]
    assert weight.tolist() == [2.0, 3.0]


def walk(steps: int, seed: int = 0) -> torch.Tensor:
    """Values of a weight after 1, 2, … steps, float64."""
    return torch.randn(steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).cumsum(0) + 5.0


def averaged(weight_function, values, every=1):
    weight = torch.full((), 1e6, dtype=torch.float64)  # the first value must not matter
    average = Average([weight], weight_function, every)
    for value in values:
        weight.copy_(value)
        average.update()
    return float(average.values[0])


def test_polyak_average_is_the_mean():
    values = walk(101)
    assert averaged(polyak(), values) == pytest.approx(float(values.mean()), rel=1e-13)
    assert averaged(polyak(after=40), values) == pytest.approx(float(values[40:].mean()), rel=1e-13)
    assert averaged(polyak(), values[:100], every=4) == pytest.approx(float(values[3:100:4].mean()), rel=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 7, 400])
def test_exponential_average_is_that_of_section_7_2(steps):
    """θ̂_t = θ̄_t / (1 − β^t), θ̄_t = β θ̄_{t−1} + (1 − β) θ_t, θ̄_0 = 0, with β = 2^(−1 / half-life)."""
    values, beta = walk(steps), 2 ** (-1 / 12)
    mean = 0.0
    for value in values.tolist():
        mean = beta * mean + (1 - beta) * value
    expected = mean / (1 - beta**steps)
    assert averaged(exponential(12.0), values) == pytest.approx(expected, rel=1e-12)
    assert averaged(exponential(12.0 * 50, batch_size=50), values) == pytest.approx(expected, rel=1e-12)


def test_exponential_average_every_few_steps_is_the_one_of_those_steps():
    """The values at steps 5, 10, …, weighted by 2^(−age / half-life)."""
    values = walk(60)
    seen = values[4::5]
    kept = 2.0 ** (-torch.arange(55, -1, -5, dtype=torch.float64) / 12)
    expected = float((kept * seen).sum() / kept.sum())
    assert averaged(exponential(12.0), values, every=5) == pytest.approx(expected, rel=1e-12)


def test_averages_of_bfloat16_are_float32():
    """Small changes that bfloat16 would lose add up; the mean of 1 and 1 + 2⁻⁷ lies between two of its values."""
    weight = torch.ones(1, dtype=torch.bfloat16)
    average = Average([weight], polyak())
    for value in (1.0, 1.0 + 2**-7):
        weight.fill_(value)
        average.update()
    assert average.values[0].dtype == torch.float32 and average.values[0].item() == 1.0 + 2**-8
    with average.applied():
        assert weight.dtype == torch.bfloat16
    assert weight.item() == 1.0 + 2**-7


def test_average_is_resumed_to_the_bit():
    values = walk(40).float()
    weight = torch.zeros(())
    whole, first = Average([weight], exponential(7.0)), Average([weight], exponential(7.0))
    for t, value in enumerate(values):
        weight.copy_(value)
        whole.update()
        if t == 20:
            second = Average([weight], exponential(7.0))
            second.load_state_dict(copy.deepcopy(first.state_dict()))
            first = second
        first.update()
    assert torch.equal(whole.values[0], first.values[0]) and whole.steps == first.steps == 40
    with pytest.raises(ValueError, match="expected averages of 1 tensors, got 0"):
        first.load_state_dict({"steps": 0, "values": []})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: exponential(0.0), "half_life: expected a positive number, got 0.0"),
        (lambda: power(1.0), "fraction: expected a number between 0 and 1, got 1.0"),
        (lambda: Average([], polyak(), every=0), "every: expected a positive number, got 0"),
        (lambda: ScheduleFree(torch.optim.SGD([torch.zeros(1)], lr=1.0), beta=1.0), "beta: expected a number from 0"),
    ],
)
def test_options_of_averages_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Schedule-free ------------------------------------------------------------------------------------------------


def quadratic(dtype=torch.float64, dims=6, seed=0):
    """Hessian and optimum of ½ (w − w*)ᵀ H (w − w*)."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dims, dims, generator=generator, dtype=dtype)
    return root @ root.T / dims + 0.1 * torch.eye(dims, dtype=dtype), torch.randn(
        dims, generator=generator, dtype=dtype
    )


def test_schedule_free_against_the_equations():
    """The three sequences of eqs 3–5 in NumPy, with a rate that rises at first and the weights α²."""
    hessian, optimum = quadratic()
    w = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    descent = ScheduleFree(torch.optim.SGD([w], lr=0.0), beta=0.8)
    h, best = hessian.numpy(), optimum.numpy()
    z, x, total = np.zeros(6), np.zeros(6), 0.0
    for t in range(50):
        rate = 0.3 * min(1, (t + 1) / 10)
        descent.optimizer.param_groups[0]["lr"] = rate
        w.grad = hessian @ (w.detach() - optimum)
        descent.step()
        y = 0.2 * z + 0.8 * x
        z = z - rate * (h @ (y - best))
        total += rate**2
        c = rate**2 / total
        x = (1 - c) * x + c * z
        np.testing.assert_allclose(w.detach().numpy(), 0.2 * z + 0.8 * x, rtol=1e-10, atol=1e-13)
    with descent.averaged():
        np.testing.assert_allclose(w.detach().numpy(), x, rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(w.detach().numpy(), 0.2 * z + 0.8 * x, rtol=1e-10, atol=1e-13)


def test_schedule_free_is_resumed_to_the_bit():
    hessian, optimum = quadratic(torch.float32)

    def start():
        w = nn.Parameter(torch.zeros(6))
        return w, ScheduleFree(Adam([w], lr=0.01, betas=(0.0, 0.99)))

    def go(w, descent, steps):
        for _ in range(steps):
            w.grad = hessian @ (w.detach() - optimum)
            descent.step()

    w, descent = start()
    go(w, descent, 30)
    state, parameters = copy.deepcopy(descent.state_dict()), w.detach().clone()
    go(w, descent, 20)
    other, resumed = start()
    resumed.load_state_dict(state)
    other.data.copy_(parameters)
    go(other, resumed, 20)
    assert torch.equal(w, other)
    with descent.averaged(), resumed.averaged():
        assert torch.equal(w, other)


def test_schedule_free_outlives_the_noise():
    """With noisy gradients x comes far nearer to the optimum than the z that it averages."""
    hessian, optimum = quadratic()
    generator = torch.Generator().manual_seed(3)
    w = nn.Parameter(torch.zeros(6, dtype=torch.float64))
    descent = ScheduleFree(torch.optim.SGD([w], lr=0.2), beta=0.9)
    for _ in range(4000):
        noise = torch.randn(6, generator=generator, dtype=torch.float64)
        w.grad = hessian @ (w.detach() - optimum) + noise
        descent.step()

    def excess(value):
        return float((value - optimum) @ hessian @ (value - optimum))

    with descent.averaged():
        assert excess(w.detach()) < 0.05 * excess(descent._z[0][0])
