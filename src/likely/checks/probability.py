"""Checks of what a model says: total mass, importance weights, entropy, samples, conditions, missing cells."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from likely.checks.behaviour import untouched_random_state
from likely.checks.cases import FRESH_EXAMPLES, TRAINING_EXAMPLES, Case, Stage
from likely.checks.estimates import (
    SIGMAS,
    Estimate,
    evaluate_bound,
    mass_of,
    mean_and_error,
    row_noise,
    tells,
    tolerance,
    weigh,
)
from likely.checks.outcome import Skipped, require
from likely.checks.points import Points, points_of
from likely.checks.source import batch_of, cells_of
from likely.contract import Reals
from likely.noise import StreamNoise


def total_mass(case: Case) -> str:
    """Σₓ exp(bound) over the whole space is 1 for an exact model and at most 1 for a lower bound."""
    found = []
    for stage in case.summed:
        for i, bounds in enumerate(stage.bounds):
            if bounds.kind == "estimate":
                raise Skipped("an estimate is no bound")
            found.append(_hold_mass(stage.points, bounds, stage.label(i)))
    return _joined(found)


def _hold_mass(points: Points, estimate: Estimate, where: str) -> str | None:
    """Hold the mass against 1; None if it cannot be told."""
    mass, error = mass_of(points, estimate)
    shown = f"{where}{mass:.5f}" + (f" ± {error:.5f}" if error else "")
    if estimate.kind != "exact":
        held = mass <= 1 + tolerance(points, error)
        require(held, f"expected the exponentials of a lower bound to sum to at most 1, got {shown}")
    elif tells(points, estimate):
        held = abs(mass - 1) <= tolerance(points, error)
        require(held, f"expected the exponentials to sum to 1 over the whole space, got {shown}")
    return shown if tells(points, estimate) else None


def _joined(found: Sequence[str | None]) -> str:
    told = [text for text in found if text is not None]
    require(bool(told), "neither before training nor after are the values even enough to be summed over the space")
    return "; ".join(told)


def missing_cells(case: Case) -> str:
    """With cells missing, the bound is one on the marginal of the observed cells: its mass over them is 1 (at most 1).

    An exact model's marginals are also compared with its own joint distribution, summed over the missing cells, unless
    missing cells are information to it (``reads_holes``): then rows with holes have a law of their own.
    """
    cells, stage = cells_of(case.space), case.stages[0]
    holes = [j for j, cell in enumerate(cells) if cell.missing]
    if not holes:
        raise Skipped("no cell may be missing")
    patterns = {tuple(pattern): None for pattern in (holes[:1], holes[1:2], holes[1:], holes) if pattern}
    condition = case.conditions[0]
    found: list[str | None] = []
    for pattern in patterns:
        observed = [j not in pattern for j in range(len(cells))]
        where = f"cells {list(pattern)} missing: "
        points = points_of(case.space, case.training_data[0], case.seed, observed, stage.points_needed)
        bounds = evaluate_bound(stage.precise, points.x, condition, case.seed)
        found.append(_hold_mass(points, bounds, where))
        if stage.precise.can("log_weights"):
            weights = weigh(stage.precise, points.x, condition, case.seed)
            found.append(_hold_mass(points, weights, f"{where}importance weights: "))
        elif bounds.kind == "exact" and stage.points.replicates == 1 and not case.cls.reads_holes:
            _hold_marginal(stage, torch.tensor(observed), points.x, bounds, where)
    return _joined(found)


def _hold_marginal(stage: Stage, observed: Tensor, x: Tensor, bounds: Estimate, where: str) -> None:
    states = stage.points.x.reshape(len(stage.points.x), -1)[:, observed]
    p = stage.bounds[0].log_p.exp()
    for row, log_p in zip(x.reshape(len(x), -1)[:, observed], bounds.log_p):
        gap = abs(float(log_p.exp()) - float(p[(states == row).all(1)].sum()))
        require(gap < 1e-5, f"{where}p({row.tolist()}) differs by {gap:.1e} from the sum over its completions")


@torch.no_grad()
def importance_weights(case: Case) -> str:
    """Importance weights average to p(x), whose mass is 1, and the bound is E log (1/k) Σ w, with the model's own k.

    k is the model's ``samples``, or 1 for a model without such an attribute (Burda et al. 2015, arXiv 1509.00519,
    eq. 8).  The mass is asked of the stages whose weights are even enough to tell; at least one has to be.
    """
    if not case.stages[0].precise.can("log_weights"):
        raise Skipped("no log_weights")
    found = []
    for stage in case.summed:
        _hold_bound_of_weights(case, stage)
        for i, weights in enumerate(stage.weights):
            found.append(_hold_mass(stage.points, weights, f"{stage.label(i)}importance weights: "))
    return _joined(found)


def _hold_bound_of_weights(case: Case, stage: Stage) -> None:
    x, condition = case.draw(FRESH_EXAMPLES, salt=16)
    k = int(getattr(stage.precise, "samples", 1))
    nats = torch.stack([stage.precise.bound(x, condition, row_noise(r, len(x))).nats.double() for r in range(4)], 1)
    log_w = stage.precise.log_weights(x, condition, 8 * k, row_noise(9, len(x))).double()  # type: ignore[operator]
    own = log_w.reshape(len(x), 8, k).logsumexp(2) - math.log(k)
    gap, error = mean_and_error(nats.mean(1) - own.mean(1))
    require(
        abs(gap) <= SIGMAS * error + 1e-6,
        f"{stage.name}: the bound differs by {gap:.4f} ± {error:.4f} nats from that of {k} importance weights",
    )


@torch.no_grad()
def cross_entropy(case: Case) -> str:
    """On fresh examples of a dependent source nobody beats the source's own log-likelihood."""
    x, condition = case.draw(FRESH_EXAMPLES, salt=7)
    bound = case.stages[0].precise.bound(x, condition, row_noise(3, len(x))).check_finite()
    if bound.kind == "estimate":
        raise Skipped("an estimate is no bound")
    mean, error = mean_and_error(bound.nats.double() - case.source.log_prob(x, condition))
    shown = f"{mean:.4f} ± {error:.4f} nats"
    require(mean <= SIGMAS * error, f"expected at most the log-likelihood of the source itself, got {shown} more")
    return f"{-mean:.4f} ± {error:.4f} nats from the entropy of the source"


@torch.no_grad()
def samples(case: Case) -> str:
    """Samples are complete examples of the space, a function of the noise, and different for different noise."""
    model, n = case.trained, 512
    condition = case.draw(n, salt=9)[1]

    def draw(seed: int) -> Tensor:
        return model.sample(n, condition, StreamNoise(torch.Generator().manual_seed(seed)))

    torch.manual_seed(1)
    with untouched_random_state("sample"):
        x = draw(0)
    require(tuple(x.shape) == (n, *case.space.shape), f"expected shape {(n, *case.space.shape)}, got {tuple(x.shape)}")
    case.space.validate(x, "sample")
    require(not torch.isnan(x).any(), "expected complete examples, got missing cells")
    require(torch.equal(x, draw(0)), "the same noise gave other samples")
    require(not torch.equal(x, draw(1)), "other noise gave the same samples")
    keyed = model.sample(n, condition, row_noise(0, n))
    case.space.validate(keyed, "sample with keyed noise")
    single = model.sample(1, None if condition is None else condition[:1], row_noise(0, 1))
    require(tuple(single.shape) == (1, *case.space.shape), f"one sample: got shape {tuple(single.shape)}")
    return f"{n} samples lie in the space"


def sample_frequencies(case: Case) -> str:
    """The model's samples come as often as the model says: a χ² test over the cells of a partition of the space.

    Against exp(bound) where it is exact, against importance weights where the model has them; against a mere lower
    bound a state may come more often than it says, but not less often.
    """
    return hold_frequencies(case, case.summed, lambda stage, i: stage.samples[i])


def hold_frequencies(case: Case, stages: Sequence[Stage], draws: Callable[[Stage, int], Tensor]) -> str:
    """Hold draws of each stage under each of the conditions against what the model says; what was found."""
    found: list[str | None] = []
    edges = _bin_edges(case)
    for stage in stages:
        weighed = stage.precise.can("log_weights")
        for i, reference in enumerate(stage.weights if weighed else stage.bounds):
            if reference.kind == "estimate":
                raise Skipped("an estimate says nothing of frequencies")
            if reference.kind == "exact" and not tells(stage.points, reference):
                continue
            bins, drawn = _bin_numbers(_bin(stage.points.x, edges), _bin(draws(stage, i), edges))
            n = int(torch.cat([bins, drawn]).max()) + 1
            frequency = torch.bincount(drawn, minlength=n).double() / len(drawn)
            mass, variance = _bin_masses(stage.points, reference, bins, n)
            exact = reference.kind == "exact"
            found.append(_compare(stage.label(i), frequency, mass, variance, len(drawn), exact))
    return _joined(found)


def hold_alike(case: Case, stage: Stage, draws: Callable[[int], Tensor]) -> str:
    """Hold draws under each of the conditions against as many samples of the stage: the two-sample χ² over the bins."""
    found, edges = [], _bin_edges(case)
    for i, samples in enumerate(stage.samples):
        numbers = _bin_numbers(_bin(samples, edges), _bin(draws(i), edges))
        bins = int(torch.cat(numbers).max()) + 1
        a, b = (torch.bincount(of, minlength=bins).double() for of in numbers)
        rare = a + b < 20
        a, b = (torch.cat([counts[~rare], counts[rare].sum().reshape(1)]) for counts in (a, b))
        statistic, freedom = float(((a - b).square() / (a + b).clamp(min=1)).sum()), len(a)
        p_value = float(torch.special.gammaincc(torch.tensor(freedom / 2.0), torch.tensor(statistic / 2.0)))
        shown = f"{stage.label(i)}χ² = {statistic:.1f} over {freedom} bins, p = {p_value:.1e}"
        require(p_value > 1e-6, f"draws do not come as often as samples do: {shown}")
        found.append(shown)
    return "; ".join(found)


def _bin_masses(points: Points, estimate: Estimate, bins: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Mass of every bin, and the variance of it that points and noise bring."""
    share = points.weights * estimate.log_p.exp()
    masses = torch.zeros(points.replicates, n, dtype=torch.float64)
    replicate = torch.arange(len(bins)) // (len(bins) // points.replicates)
    masses.index_put_((replicate, bins), share, accumulate=True)
    if points.replicates > 1:
        return masses.sum(0), masses.var(0) * points.replicates
    variance = torch.zeros(n, dtype=torch.float64)
    return masses[0], variance.index_add_(0, bins, (share * estimate.relative).square())


def _compare(label: str, frequency: Tensor, mass: Tensor, noise: Tensor, n: int, exact: bool) -> str:
    """Hold frequencies of ``n`` draws against masses that are known up to a variance ``noise``.

    Bins that expect fewer than ten draws are put together.  Pearson's χ² = Σ (f − p)² / (p / n + noise) has, under the
    hypothesis, the distribution χ² with as many degrees of freedom as there are bins, or one fewer.
    """
    rare = mass * n < 10
    if rare.any():
        frequency, mass, noise = (
            torch.cat([values[~rare], values[rare].sum().reshape(1)]) for values in (frequency, mass, noise)
        )
    z = (frequency - mass) / (mass / n + noise + 1e-300).sqrt()
    if not exact:
        worst = float(z.min())
        # the least of many numbers is given one more standard error than a single one
        require(worst > -SIGMAS - 1, f"{label}a state comes less often than its lower bound by {-worst:.1f} deviations")
        return f"{label}none of {len(mass)} states comes less often than its bound"
    counted = mass * n >= 10
    if not bool(counted[-1]):  # too few draws for a normal error
        most = n * float(mass[-1]) + 2 * SIGMAS * math.sqrt(n * float(mass[-1]) + n * n * float(noise[-1])) + 20
        few = n * float(frequency[-1]) < most
        require(few, f"{label}{n * float(frequency[-1]):.0f} of {n} samples in states that the model calls very rare")
    statistic, freedom = float(z[counted].square().sum()), int(counted.sum())
    p_value = float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(statistic / 2).double()))
    shown = f"χ² = {statistic:.1f} over {freedom} bins, p = {p_value:.1e}"
    require(p_value > 1e-6, f"{label}samples do not come as often as the model says: {shown}")
    return f"{label}{shown}"


def _bin_edges(case: Case) -> list[Tensor | None]:
    """Where to cut each numeric cell: quantiles of the training data; a code is its own bin."""
    cells = cells_of(case.space)
    cuts = torch.linspace(0, 1, 6 if len(cells) <= 2 else 4, dtype=torch.float64)[1:-1]
    rows = case.training_data[0].reshape(TRAINING_EXAMPLES, -1).double()
    edges: list[Tensor | None] = []
    for j, cell in enumerate(cells):
        known = rows[:, j][~torch.isnan(rows[:, j])]
        edges.append(None if cell.levels is not None else known.quantile(cuts).unique() + 1e-9)
    return edges


def _bin(x: Tensor, edges: list[Tensor | None]) -> Tensor:
    columns = []
    for values, edge in zip(x.reshape(len(x), -1).double().T, edges):
        columns.append(values.long() if edge is None else torch.bucketize(values.contiguous(), edge))
    return torch.stack(columns, 1)


def _bin_numbers(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Number the rows that occur in either."""
    numbers = torch.unique(torch.cat([first, second]), dim=0, return_inverse=True)[1]
    return numbers[: len(first)], numbers[len(first) :]


def conditioning(case: Case) -> str:
    """The right condition says more of an example than a wrong one; samples follow it; gradients reach it."""
    if case.condition is None:
        raise Skipped("no condition")
    x, condition = case.draw(FRESH_EXAMPLES, salt=11)
    assert condition is not None
    stage, n = case.stages[0], len(x)
    with torch.no_grad():
        right = stage.precise.bound(x, condition, row_noise(0, n)).nats
        wrong = stage.precise.bound(x, condition.roll(1, 0), row_noise(0, n)).nats
    gain, error = mean_and_error(right - wrong)
    require(gain > SIGMAS * error, f"the right condition gains {gain:.4f} ± {error:.4f} nats over a wrong one")
    _hold_samples_follow(case, stage)
    if isinstance(case.condition, Reals):
        own = condition[:64].double().requires_grad_()
        stage.precise.bound(x[:64], own, row_noise(0, 64)).nats.sum().backward()
        require(own.grad is not None and bool((own.grad != 0).any()), "the gradient with respect to it is zero")
    return f"the right condition gains {gain:.4f} ± {error:.4f} nats over a wrong one"


def _hold_samples_follow(case: Case, stage: Stage) -> None:
    """Samples under the two conditions differ: the two-sample χ² over the bins is far beyond its expectation."""
    edges = _bin_edges(case)
    first, second = _bin_numbers(_bin(stage.samples[0], edges), _bin(stage.samples[1], edges))
    n = int(torch.cat([first, second]).max()) + 1
    a, b = torch.bincount(first, minlength=n).double(), torch.bincount(second, minlength=n).double()
    statistic = float(((a - b).square() / (a + b).clamp(min=1)).sum())
    threshold = n + SIGMAS * math.sqrt(2 * n) + SIGMAS**2
    require(statistic > threshold, f"samples do not follow the condition: χ² = {statistic:.1f} over {n} bins")


@torch.no_grad()
def imputation(case: Case) -> str:
    """Holes are filled with values of the space that fit the observed cells, which are left as they are.

    An exact model's imputations have the frequencies of its own conditional distribution.
    """
    stage, cells = case.stages[0], cells_of(case.space)
    if not stage.model.can("impute"):
        raise Skipped("no impute")
    if not any(cell.missing for cell in cells):
        raise Skipped("no cell may be missing")
    x, condition = case.draw(512, salt=14)
    torch.manual_seed(1)
    with untouched_random_state("impute"):
        noise = StreamNoise(torch.Generator().manual_seed(0))
        filled = stage.model.impute(x, condition, noise, draws=3)  # type: ignore[operator]
    require(tuple(filled.shape) == (3, *x.shape), f"expected shape {(3, *x.shape)}, got {tuple(filled.shape)}")
    best = stage.model.impute(x, condition)  # type: ignore[operator]
    require(
        tuple(best.shape) == tuple(x.shape), f"best values: expected shape {tuple(x.shape)}, got {tuple(best.shape)}"
    )
    observed = ~torch.isnan(x)
    for draw in (best, *filled):
        case.space.validate(draw, "impute")
        require(not torch.isnan(draw).any(), "a hole was left")
        require(torch.equal(draw[observed].to(x), x[observed]), "an observed cell was changed")

    def nats(complete: Tensor) -> Tensor:
        return stage.precise.bound(complete, condition, row_noise(0, len(x))).nats

    seeing = torch.stack([nats(draw.to(x)) for draw in filled]).mean(0)
    gain, error = mean_and_error(seeing - nats(_blindly_filled(x)))
    require(gain > -SIGMAS * error, f"imputations are less likely than blind ones: {gain:.4f} ± {error:.4f} nats")
    detail = f"{gain:.4f} ± {error:.4f} nats above blind imputation"
    if stage.bounds[0].kind == "exact" and stage.points.replicates == 1 and not case.cls.reads_holes:
        detail += "; " + _imputed_frequencies(case, stage)
    return detail


def _blindly_filled(x: Tensor) -> Tensor:
    """Holes filled with observed values of the same cell in other examples."""
    columns = x.clone().reshape(len(x), -1)
    for j, values in enumerate(columns.T):
        holes = torch.isnan(values)
        known = values[~holes]
        picked = torch.randint(len(known), (int(holes.sum()),), generator=torch.Generator().manual_seed(j))
        columns[holes, j] = known[picked]
    return columns.reshape(x.shape)


def _imputed_frequencies(case: Case, stage: Stage) -> str:
    holes = [j for j, cell in enumerate(cells_of(case.space)) if cell.missing]
    states, log_p = stage.points.x.reshape(len(stage.points.x), -1).double(), stage.bounds[0].log_p
    row = states[int(log_p.argmax())].clone()
    row[holes[: (len(holes) + 1) // 2]] = math.nan
    n = 4000
    noise = StreamNoise(torch.Generator().manual_seed(3))
    x = batch_of(case.space, row[None])
    drawn = stage.model.impute(x, case.conditions[0], noise, draws=n)  # type: ignore[operator]
    agrees = (states == row)[:, ~torch.isnan(row)].all(1)
    p = torch.where(agrees, log_p, -math.inf).softmax(0)
    frequency = (drawn.reshape(n, 1, -1).double() == states[None]).all(2).double().mean(0)
    return _compare("imputations: ", frequency[agrees], p[agrees], torch.zeros_like(p[agrees]), n, exact=True)
