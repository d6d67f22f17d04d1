"""What is particular to masked diffusion: its bound against enumeration, its schedules, its orders, its sampler."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor

from likely.coding import Stack
from likely.contract import Binary, Integers, NoCodec, Space, Tokens
from likely.models.masked_diffusion import MaskedDiffusion
from likely.noise import KeyedNoise, StreamNoise

SPACE = Tokens(3, 3)
STATES = torch.tensor(list(itertools.product(range(3), repeat=3)), dtype=torch.float64)
SUBSETS = [m for size in (1, 2, 3) for m in itertools.combinations(range(3), size)]


def stream(seed: int) -> StreamNoise:
    return StreamNoise(torch.Generator().manual_seed(seed))


def scrambled(space: Space, condition: Space | None = None, **options: object) -> MaskedDiffusion:
    """An instance in float64 whose every weight matters."""
    model = MaskedDiffusion(space, condition, **{"width": 16, "layers": 2, "heads": 2, "hidden": 16, **options})
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model.double().eval()


def log_mu(model: MaskedDiffusion, x: Tensor, masked: Sequence[int]) -> Tensor:
    """log μ(x_n | x without M) of the masked cells, 0 elsewhere, shape of x: the denoiser, fixed in these tests."""
    mask = torch.zeros(x.shape, dtype=torch.bool)
    mask[:, list(masked)] = True
    with torch.no_grad():
        return model._log_mu(x, mask, mask, None)


def by_orders(model: MaskedDiffusion, x: Tensor) -> tuple[Tensor, Tensor]:
    """E_σ Σ log p(x_σi | ·), and log E_σ Π p(x_σi | ·), from all orders."""
    found = []
    for order in itertools.permutations(range(x.shape[1])):
        found.append(sum(log_mu(model, x, order[i:])[:, order[i]] for i in range(len(order))))
    nats = torch.stack(found)
    return nats.mean(0), nats.logsumexp(0) - math.log(len(nats))


class Prescribed:
    """Noise that was written down: what each call gives."""

    def __init__(self, *values: Tensor) -> None:
        self._values = list(values)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        value = self._values.pop(0)
        assert value.shape == tuple(shape)
        return value

    normal = uniform


# The bound -------------------------------------------------------------------------------------------------------


def test_the_bound_is_the_mean_over_all_orders() -> None:
    model = scrambled(SPACE)
    expected, log_p = by_orders(model, STATES)
    orders = torch.tensor(list(itertools.permutations([0.2, 0.5, 0.8])))
    times = (torch.arange(3) + 0.5) / 3
    for x, mean in zip(STATES[::5], expected[::5]):
        tau, time = orders.repeat_interleave(3, 0), times.repeat(6).unsqueeze(1)
        found = model.bound(x.expand(18, -1), None, Prescribed(tau, time))
        assert found.nats.mean().item() == pytest.approx(mean.item(), abs=1e-12)
    assert (expected < log_p).all()
    assert log_p.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert expected.exp().sum() < 1.0 - 1e-4


def test_the_integral_over_time_is_the_same_under_every_schedule() -> None:
    model, x = scrambled(SPACE), STATES[7:8]
    expected = by_orders(model, x)[0].item()
    gains = {m: log_mu(model, x, m).sum().item() for m in SUBSETS}
    schedules = {
        "linear": (lambda t: t, lambda t: 1.0),
        "cosine": (lambda t: math.sin(math.pi * t / 2), lambda t: math.pi / 2 * math.cos(math.pi * t / 2)),
        "cubic": (lambda t: t**3, lambda t: 3 * t**2),
    }
    for rate, slope in schedules.values():

        def integrand(t: float, rate=rate, slope=slope) -> float:  # type: ignore[no-untyped-def]
            u = rate(t)
            return slope(t) / u * sum(u ** len(m) * (1 - u) ** (3 - len(m)) * gain for m, gain in gains.items())

        assert quad(integrand, 0.0, 1.0, epsabs=1e-12)[0] == pytest.approx(expected, abs=1e-9)


def chain_bound(model: MaskedDiffusion, x: Tensor, rates: Sequence[float]) -> float:
    """Σ_i (u_i − u_{i−1}) / u_i E_M [ Σ log μ ], from all masks."""
    total, gains = 0.0, {m: log_mu(model, x, m).sum().item() for m in SUBSETS}
    for before, u in itertools.pairwise(rates):
        for m in SUBSETS:
            total += (u - before) / u * u ** len(m) * (1 - u) ** (3 - len(m)) * gains[m]
    return total


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_bound_of_a_chain_of_steps(schedule: str) -> None:
    x, steps = STATES[11:12], 4
    model = scrambled(SPACE, timesteps=steps, schedule=schedule)
    rates = [i / steps if schedule == "linear" else math.sin(math.pi * i / steps / 2) for i in range(steps + 1)]
    expected = chain_bound(model, x, rates)
    inside = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(rates)])  # a τ between all rates
    chance = torch.tensor(rates, dtype=torch.float64).diff()
    groups = torch.tensor(list(itertools.product(range(steps), repeat=3)))
    weights = chance[groups].prod(1)
    tau = inside[groups].repeat_interleave(steps, 0)
    time = ((torch.arange(steps) + 0.5) / steps).repeat(len(groups)).unsqueeze(1)
    nats = model.bound(x.expand(len(tau), -1), None, Prescribed(tau, time)).nats.reshape(-1, steps).mean(1)
    assert (weights * nats).sum().item() == pytest.approx(expected, abs=1e-6)  # rates are float32 beside float32 noise
    assert expected < by_orders(model, x)[0].item()


def test_many_steps_come_near_continuous_time() -> None:
    model, x = scrambled(SPACE), STATES[3:4]
    expected = by_orders(model, x)[0].item()
    for rate in (lambda t: t, lambda t: math.sin(math.pi * t / 2)):
        gaps = [expected - chain_bound(model, x, [rate(i / n) for i in range(n + 1)]) for n in (5, 50, 500)]
        assert gaps[0] > gaps[1] > gaps[2] > 0 and gaps[2] < 2e-3


def test_more_masks_are_less_noisy_and_no_less_right() -> None:
    x, deviations = STATES[5].expand(4000, -1), []
    expected = by_orders(scrambled(SPACE), STATES[5:6])[0].item()
    for masks in (1, 3):
        nats = scrambled(SPACE, masks=masks).bound(x, None, stream(0)).nats.detach()
        deviations.append(nats.std().item())
        assert abs(nats.mean().item() - expected) < 4.5 * deviations[-1] / math.sqrt(4000)
    assert deviations[1] < deviations[0] / math.sqrt(3)  # spread evenly, they are better than independent


def test_a_missing_cell_costs_nothing_and_stays_masked() -> None:
    space = Tokens(4, 3, missing=True)
    model = scrambled(space)
    x = torch.tensor([[1.0, math.nan, 2.0, 0.0]], dtype=torch.float64)
    nats = model.column_nats(x.expand(500, -1), None, stream(0))
    assert (nats[:, 1] == 0).all() and (nats[:, [0, 2, 3]].mean(0) < 0).all()
    mask = torch.tensor([[True, True, True, True]])
    seen = torch.tensor([[True, False, True, True]])
    known = torch.tensor([[1.0, 0.0, 2.0, 0.0]], dtype=torch.float64)
    all_masked = model._log_mu(known, mask, seen, None)
    found = model.column_nats(x, None, Prescribed(torch.rand(1, 4), torch.tensor([[0.99]])))  # k = 3: all that is there
    torch.testing.assert_close(found, all_masked)
    empty = model.bound(torch.full((2, 4), math.nan, dtype=torch.float64), None, stream(0)).nats
    assert (empty == 0).all()


# Samples ---------------------------------------------------------------------------------------------------------


def agree(drawn: Tensor, states: Tensor, p: Tensor) -> None:
    """The frequencies of draws are those of the states."""
    frequency = torch.stack([(drawn == state).flatten(1).all(1).double().mean() for state in states])
    assert ((frequency - p).abs() < 4.5 * (p * (1 - p) / len(drawn)).sqrt() + 1e-3).all()


def test_samples_have_the_frequencies_of_all_orders() -> None:
    model = scrambled(SPACE)
    agree(model.sample(20_000, None, stream(0)).double(), STATES, by_orders(model, STATES)[1].exp())


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_samples_of_a_chain_reveal_cells_together(schedule: str) -> None:
    model = scrambled(SPACE, timesteps=2, schedule=schedule)
    middle = 0.5 if schedule == "linear" else math.sin(math.pi / 4)
    p = torch.zeros(len(STATES), dtype=torch.float64)
    for late in itertools.product([False, True], repeat=3):  # which cells the second step reveals
        first = [n for n in range(3) if not late[n]]
        second = [n for n in range(3) if late[n]]
        chance = middle ** len(second) * (1 - middle) ** len(first)
        nats = log_mu(model, STATES, range(3))[:, first].sum(1)
        if second:
            nats = nats + log_mu(model, STATES, second)[:, second].sum(1)
        p += chance * nats.exp()
    assert p.sum().item() == pytest.approx(1.0, abs=1e-12)
    agree(model.sample(20_000, None, stream(1)).double(), STATES, p)


def test_completions_are_drawn_in_a_random_order_given_all_others() -> None:
    model = scrambled(SPACE)
    x = torch.tensor([[2.0, math.nan, math.nan]], dtype=torch.float64)
    states = STATES[18:]
    both = [log_mu(model, states, (1, 2))[:, a] + log_mu(model, states, (b,))[:, b] for a, b in ((1, 2), (2, 1))]
    p = torch.stack(both).exp().mean(0)
    assert p.sum().item() == pytest.approx(1.0, abs=1e-12)
    drawn = model.impute(x, None, stream(0), draws=8000)[:, 0]
    agree(drawn, states, p)
    best = model.impute(x, None, stream(0), samples=4000)[0]
    assert best.tolist() == [2.0, *(float(_mode(states[:, t], p)) for t in (1, 2))]


def _mode(codes: Tensor, p: Tensor) -> int:
    return int(torch.stack([p[codes == code].sum() for code in range(3)]).argmax())


def test_a_draw_is_that_of_its_own_noise_and_condition() -> None:
    model = scrambled(SPACE, Integers((1,), 2))
    condition = torch.tensor([[0], [1]])
    alone = model.sample(1, condition[1:], KeyedNoise(0, torch.tensor([7])))
    beside = model.sample(2, condition, KeyedNoise(0, torch.tensor([3, 7])))
    assert torch.equal(alone[0], beside[1])


# The codec -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [Tokens(5, 4), Binary((1, 2, 3))], ids=str)
def test_the_codec_reveals_cells_in_orders_that_both_sides_know(space: Space) -> None:
    model = scrambled(space, Integers((1,), 2)).float()
    c = torch.randint(2, (200, 1))
    x = model.sample(200, c, stream(9)).long()
    codec, stack = model.codec(), Stack(lanes=16)
    codec.push(stack, x, c)
    nats = torch.stack([model.bound(x, c, stream(seed)).nats.detach() for seed in range(60)]).double()
    bits, error = -nats.mean().item() * 200 / math.log(2), nats.std(1).mean().item() * math.sqrt(200) / math.log(2)
    assert abs(stack.bits - bits) < 4.5 * error
    copy = Stack.from_words(stack.to_words(), lanes=16)
    assert torch.equal(codec.pop(copy, 200, c), x)
    copy.finish()


def test_a_chain_of_steps_has_no_codec() -> None:
    with pytest.raises(NoCodec, match="steps"):
        scrambled(SPACE, timesteps=4).codec()
    with pytest.raises(NoCodec, match="missing"):
        scrambled(Tokens(3, 3, missing=True)).codec()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "quadratic"}, "schedule: expected 'linear' or 'cosine', got 'quadratic'"),
        ({"timesteps": 0, "masks": 0}, "masks: expected 1 or more, got 0"),
        ({"layers": 0}, "layers: expected 1 or more, got 0"),
    ],
)
def test_what_it_cannot_do_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskedDiffusion(SPACE, **{"width": 16, **options})
