"""MADE: what each cell sees, mixtures of orders, any order, the sketch, missing cells, columns of many codes."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from likely.checks import check_model
from likely.coding.stack import Stack
from likely.contract import Binary, Column, Integers, NoCodec, Reals, Table, Unsupported
from likely.distributions.guess import _NORMAL, following, normal_means
from likely.distributions.heads import TableHead
from likely.distributions.logistic import Recalled
from likely.inference.memory import Memory
from likely.inference.neighbours import Neighbours
from likely.inference.normal import JointNormal
from likely.inference.structure import Rows, Search, Sketch, smoothed
from likely.models.made import Made
from likely.networks.features import PiecewiseLinear
from likely.noise import StreamNoise, content_keys

MIXED = Table(
    columns=(
        Column("colour", "categorical", levels=3, missing=True),
        Column("size", "real", resolution=0.1, missing=True),
        Column("visits", "integer", missing=True),
        Column("member", "binary", missing=True),
    )
)


def _noise(seed: int = 0) -> StreamNoise:
    return StreamNoise(torch.Generator().manual_seed(seed))


def _mixed_rows(n: int, seed: int = 0) -> Tensor:
    """Rows of MIXED in which every column depends on the ones before it."""
    rng = np.random.default_rng(seed)
    colour = rng.integers(0, 3, n)
    size = np.rint(10 * (2.0 * colour + rng.normal(size=n))) / 10
    visits = np.rint(10 + 3 * size + rng.normal(size=n))
    member = (rng.random(n) < 1 / (1 + np.exp(-(visits - 16) / 2))).astype(float)
    return torch.tensor(np.stack([colour, size, visits, member], 1))


def _trained(model: Made, x: Tensor, steps: int, rate: float = 1e-2) -> Made:
    model.initialise([(x, None)])
    optimiser = torch.optim.Adam(model.parameters(), rate)
    model.train()
    for step in range(steps):
        optimiser.zero_grad()
        batch = x[torch.randint(len(x), (256,), generator=torch.Generator().manual_seed(step))]
        model.loss(batch, None, _noise(step)).value.backward()
        optimiser.step()
    return model.eval()


@pytest.mark.parametrize("order", ["learned", "given", [3, 1, 0, 2]])
def test_a_cell_sees_the_cells_before_it_and_no_other(order: str | list[int]) -> None:
    x = _mixed_rows(64)
    model = Made(MIXED, hidden=(16, 16), dropout=0.0, order=order, sketch=order == "learned")
    model.initialise([(x, None)])
    model._spread()
    places = model._order(0)
    if not isinstance(order, str):
        assert places == order
    before = model.column_nats(x)
    for place, t in enumerate(places):
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % 2 if t in (0, 3) else x[:, t] + 3.0
        for other in (changed, x.clone().index_fill_(1, torch.tensor([t]), math.nan)):
            moved = (model.column_nats(other) - before).abs().amax(0)
            own = [model._member(0).cell(rows, t, None).log_prob(x[:, t : t + 1]) for rows in (x, other)]
            assert torch.equal(*own), "a cell sees itself"
            assert all(moved[s] == 0 for s in places[:place]), "a cell sees one that comes later"
            assert all(moved[s] > 1e-6 for s in places[place + 1 :]), "a cell does not see one that comes before"


def test_members_are_mixed_as_probabilities() -> None:
    x = _mixed_rows(20)
    model = Made(MIXED, hidden=(8,), orders=3).eval()
    model._spread()
    each = torch.stack([model._member(k).law(x, None).log_prob(x).sum(1) for k in range(3)]).double()
    expected = torch.log(each.exp().mean(0))
    assert torch.allclose(model.bound(x).nats.double(), expected, atol=1e-5)
    assert torch.allclose(model.column_nats(x).sum(1).double(), expected, atol=1e-5)
    assert len({tuple(model._order(k)) for k in range(3)}) == 3


@pytest.mark.parametrize("order", ["learned", "any"])
def test_several_orders_are_coded_at_the_length_of_their_mixture(order: str) -> None:
    x = _mixed_rows(300)
    x[::5, 2] = math.nan
    options = {"components": 2, "atoms": 4}
    model = Made(MIXED, hidden=(8,), order=order, orders=2, sketch=order == "learned", likelihood_options=options)
    model.initialise([(x, None)])
    model.eval()
    coded, stack = model.codec(), Stack(lanes=16)
    expected = -float(model.bound(x).nats.detach().sum()) / math.log(2.0)
    before = stack.size_bits - 32.0 * stack.supplied
    coded.push(stack, x)
    written = stack.size_bits - 32.0 * stack.supplied - before
    back = coded.pop(stack, len(x), present=~torch.isnan(x).numpy())
    assert torch.equal(back.nan_to_num(-1.0), x.nan_to_num(-1.0))
    assert abs(written - expected) < 0.01 * expected + 64.0


def test_any_order_learns_the_conditionals_of_every_subset() -> None:
    rng = np.random.default_rng(0)
    joint = rng.dirichlet(np.full(8, 0.5)).reshape(2, 2, 2)
    flat = rng.choice(8, 6000, p=joint.reshape(-1))
    x = torch.tensor(np.stack(np.unravel_index(flat, (2, 2, 2)), 1).astype(float))
    space = Table(columns=tuple(Column(c, "binary") for c in "abc"))
    model = Made(space, hidden=(16, 16), dropout=0.0, order="any", sketch=False, prior_scale=0.0)
    _trained(model, x, 300)
    empirical = np.bincount(flat, minlength=8).reshape(2, 2, 2) / len(flat)
    worst = 0.0
    with torch.no_grad():
        for j in range(3):
            others = [i for i in range(3) if i != j]
            for known in itertools.product((0.0, 1.0, math.nan), repeat=2):
                row = torch.full((1, 3), math.nan, dtype=torch.float64)
                row[0, others] = torch.tensor(known, dtype=torch.float64)
                law = model._member(0).cell(row, j, None)
                said = float(law.log_prob(torch.ones(1, 1, dtype=torch.float64)).exp())
                picked = empirical
                for i, value in zip(others, known):
                    if not math.isnan(value):
                        picked = np.take(picked, [int(value)], axis=i)
                picked = np.moveaxis(picked, j, 0).reshape(2, -1).sum(1)
                if picked.sum() > 0.05:
                    worst = max(worst, abs(said - picked[1] / picked.sum()))
    assert worst < 0.08
    hidden = torch.tensor([[math.nan, 1.0, 0.0]], dtype=torch.float64)
    drawn = model.impute(hidden, noise=_noise(), draws=2000)[:, 0, 0].mean()
    column = empirical[:, 1, 0] / empirical[:, 1, 0].sum()
    assert abs(float(drawn) - column[1]) < 0.08


def test_a_fixed_order_imputes_by_weighted_walks() -> None:
    """The hidden first cell is known by the last one, which a walk sees only through its weight."""
    rng = np.random.default_rng(1)
    a = rng.integers(0, 2, 4000)
    b = np.where(rng.random(4000) < 0.05, 1 - a, a)
    x = torch.tensor(np.stack([a, b], 1).astype(float))
    space = Table(columns=(Column("a", "binary", missing=True), Column("b", "binary", missing=True)))
    model = Made(space, hidden=(8,), order="given")
    model.initialise([(x, None)])
    model.eval()
    hidden = torch.tensor([[math.nan, 0.0], [math.nan, 1.0]], dtype=torch.float64)
    assert model.impute(hidden, noise=_noise())[:, 0].tolist() == [0.0, 1.0]
    drawn = model.impute(hidden, noise=_noise(), draws=200)[:, :, 0].mean(0)
    assert drawn[0] < 0.15 and drawn[1] > 0.85


# The sketch ----------------------------------------------------------------------------------------------------------


def _chain(n: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    a = rng.integers(0, 3, n)
    b = np.where(rng.random(n) < 0.2, rng.integers(0, 3, n), a)
    c = np.where(rng.random(n) < 0.2, rng.integers(0, 2, n), b % 2)
    return np.stack([a, b, c, rng.integers(0, 2, n)], 1).astype(float)


def test_search_finds_the_chain_and_scores_by_likelihood_less_parameters() -> None:
    rows = Rows(_chain(3000), [3, 3, 2, 2])
    search = Search(rows)
    graph = search.graph()
    edges = {frozenset((j, p)) for j, of in enumerate(graph.parents) for p in of}
    assert edges == {frozenset((0, 1)), frozenset((1, 2))}
    assert all(graph.order.index(p) < graph.order.index(j) for j, of in enumerate(graph.parents) for p in of)
    nats = 0.0
    for state in range(3):
        counts = np.bincount(rows.codes[rows.codes[:, 1] == state, 2], minlength=2)
        nats += (counts * np.log(counts / counts.sum())).sum()
    assert search.score(2, frozenset({1})) == pytest.approx(nats - search.penalty * 3)
    within = search.graph([3, 2, 1, 0])
    assert within.order == [3, 2, 1, 0] and within.parents[0] == [1] and within.parents[1] == [2]


def test_a_table_is_smoothed_by_what_predicts_left_out_rows() -> None:
    rows = Rows(np.array([[0, 0]] * 4 + [[0, 1]] * 2 + [[1, 1]] * 5, float), [2, 2])
    marginal = np.array([4.5, 7.5]) / 12
    table = np.array([[4, 2], [0, 5], [0, 0]])

    def left_out(a: float) -> float:
        total = 0.0
        for state, counts in enumerate(table):
            for v, times in enumerate(counts):
                if times:
                    total += times * math.log((times - 1 + a * marginal[v]) / (table[state].sum() - 1 + a))
        return total

    best = max((0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0), key=left_out)
    expected = (table + best * marginal) / (table.sum(1, keepdims=True) + best)
    assert smoothed(rows, 1, [0]) == pytest.approx(expected)


def test_sketch_looks_up_tables_and_regressions() -> None:
    rng = np.random.default_rng(0)
    code = rng.integers(0, 3, 500).astype(float)
    number = np.array([-1.0, 0.5, 2.0])[code.astype(int)] + 0.3 * rng.normal(size=500)
    last = 0.7 * number + 0.2 * rng.normal(size=500)
    answer = (number > 0.4).astype(float)
    x = np.stack([code, number, last, answer], 1)
    rows = Rows(x, [3, 0, 0, 2])
    search = Search(rows)
    graph = search.graph([0, 1, 2, 3])
    assert graph.parents[1] == [0] and 1 in graph.parents[2] and 1 in graph.parents[3]
    sketch = Sketch([3, 0, 0, 2])
    left = sketch.fit(rows, graph, search, np.zeros(2), np.ones(2))
    batch = torch.tensor(x[:50])
    log_probs, means = sketch(batch)
    hot = np.stack([np.ones(500), code == 1, code == 2], 1)
    coefficients, *_ = np.linalg.lstsq(hot, number, rcond=None)
    assert means[:, 0].numpy() == pytest.approx(hot[:50] @ coefficients, abs=1e-4)
    assert left[0] == pytest.approx((number - hot @ coefficients).std(), rel=1e-3)
    table = smoothed(rows, 3, graph.parents[3])
    state = np.zeros(50, int)
    for p in graph.parents[3]:
        state = state * rows.states[p] + rows.codes[:50, p]
    assert log_probs[:, 3:].numpy() == pytest.approx(np.log(table)[state])
    unknown = batch.clone()
    unknown[:, graph.parents[3]] = math.nan
    share = (np.bincount(answer.astype(int)) + 0.5) / 501.0
    assert sketch(unknown)[0][0, 3:].exp().numpy() == pytest.approx(share)


def test_training_begins_at_the_sketch() -> None:
    x = torch.tensor(_chain(2000))
    space = Table(columns=tuple(Column(c, "categorical", levels=k) for c, k in zip("abcd", (3, 3, 2, 2))))
    model = Made(space, hidden=(16,))
    model.initialise([(x, None)])
    rows = Rows(x.numpy(), [3, 3, 2, 2])
    graph = Search(rows).graph()
    expected = sum(
        np.log(smoothed(rows, j, of))[_state(rows, of), rows.codes[:, j]] for j, of in enumerate(graph.parents)
    )
    assert model.eval().bound(x).nats.detach().numpy() == pytest.approx(expected, abs=1e-5)


def _state(rows: Rows, parents: list[int]) -> np.ndarray:
    state = np.zeros(len(rows.x), int)
    for p in parents:
        state = state * rows.states[p] + rows.codes[:, p]
    return state


def test_numbers_begin_as_a_normal_regression() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=4000)
    x = torch.tensor(np.stack([a, 2.0 * a + 0.5 * rng.normal(size=4000)], 1))
    model = Made(Reals((2,)), hidden=(8,))
    model.initialise([(x, None)])
    entropy = 0.5 * math.log(2 * math.pi * math.e) * 2 + math.log(0.5)
    assert -float(model.eval().bound(x).nats.detach().mean()) == pytest.approx(entropy, abs=0.05)


@pytest.mark.parametrize(("k", "divergence"), [(1, 0.0095), (2, 0.0022), (3, 0.00073), (5, 0.000144), (10, 0.000017)])
def test_logistics_stand_for_a_normal_law(k: int, divergence: float) -> None:
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    _, scale, v = _NORMAL[k]
    means = normal_means(k)
    z = (x[:, None] - means) / scale
    log_weights = torch.log_softmax(-means.square() / (2 * v), 0)
    logistic = torch.nn.functional.logsigmoid(z) + torch.nn.functional.logsigmoid(-z) - math.log(scale)
    normal = -0.5 * x.square() - 0.5 * math.log(2 * math.pi)
    gap = normal.exp() * (normal - torch.logsumexp(log_weights + logistic, 1))
    assert float(gap.sum() * (x[1] - x[0])) == pytest.approx(divergence, rel=0.03)


def test_atoms_get_the_mean_of_the_guess() -> None:
    """Where a column is atoms alone the mean of its law is that of the guess, be it sharp or vague."""
    rng = np.random.default_rng(0)
    space = Table(columns=(Column("a", "integer", missing=True), Column("b", "integer", missing=True)))
    a = rng.integers(0, 6, 500).astype(float)
    x = torch.tensor(np.stack([a, np.clip(a + rng.integers(-1, 2, 500), 0, 5)], 1))
    member = Made(space, order="any", hidden=(8,), likelihood_options={"recall": False})._member(0)
    member.initialise([(x, None)], x, whole=True)
    head = member.head
    assert isinstance(head, TableHead) and head.has_atom.sum() == 12
    mean = torch.tensor([[-0.9, 0.3], [1.2, -1.4], [0.0, 0.01]], dtype=torch.float64)
    for deviation in (0.2, 0.5, 2.0):
        spread = torch.full_like(mean, deviation)
        numbers = following(head, member.follows, mean, spread, atom_logits=member.atom_logits)
        logits = numbers.unflatten(1, (2, -1))[:, :, 3 * head.components :][:, :, : head.atoms.shape[1]]
        share = (logits + member.atom_logits).masked_fill(~head.has_atom, -torch.inf).softmax(2)
        z = (head.atoms - head.location.unsqueeze(1)) / head.unit.unsqueeze(1)
        assert torch.allclose((share * z).sum(2), mean, atol=1e-3)


def test_joint_normal_is_the_conditional_law_and_em_finds_it_through_holes() -> None:
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    sigma, mean = root @ root.T, rng.normal(size=4)
    law = JointNormal([0, 0, 0, 0])
    law.covariance.copy_(torch.tensor(sigma))
    law.mean.copy_(torch.tensor(mean))
    x = torch.tensor(rng.normal(size=(1, 4)))
    x[0, [1, 3]] = math.nan
    said, deviation = law(x)
    k, u = [0, 2], [1, 3]
    gain = sigma[np.ix_(u, k)] @ np.linalg.inv(sigma[np.ix_(k, k)])
    assert said[0, u].numpy() == pytest.approx(mean[u] + gain @ (x[0, k].numpy() - mean[k]))
    covariance = sigma[np.ix_(u, u)] - gain @ sigma[np.ix_(k, u)]
    assert deviation[0, u].numpy() == pytest.approx(np.sqrt(np.diag(covariance)))
    sigma /= np.sqrt(np.outer(np.diag(sigma), np.diag(sigma)))
    rows = rng.multivariate_normal(np.zeros(4), sigma, 4000)
    rows[rng.random(rows.shape) < 0.3] = math.nan
    law.fit(torch.tensor(rows), torch.zeros(4), torch.ones(4))
    assert law.covariance.numpy() == pytest.approx(sigma, abs=0.06)


# Neighbours ---------------------------------------------------------------------------------------------------------


def _wavy_rows(n: int, seed: int = 0) -> Tensor:
    """A number, its sine, and a code that says whether the number is positive; a tenth of the cells is missing."""
    rng = np.random.default_rng(seed)
    a = rng.uniform(-3, 3, n)
    x = np.stack([a, np.sin(2.0 * a), (a > 0).astype(float)], 1)
    x[rng.random(x.shape) < 0.1] = math.nan
    return torch.tensor(x)


def _wavy() -> Neighbours:
    law = Neighbours([0, 0, 2])
    law.fit(_wavy_rows(300), torch.zeros(2), torch.ones(2))
    return law


def _by_hand(law: Neighbours, y: np.ndarray, without: int | None = None) -> np.ndarray:
    """Equations (1) and (2) for one row of features, by scipy's densities and numpy's solver."""
    assert law.rows is not None and law.variances is not None
    rows, spread = law.rows.numpy(), np.sqrt(np.exp(2 * law.log_width.numpy()) + law.variances.numpy())
    k, u = np.flatnonzero(~np.isnan(y)), np.flatnonzero(np.isnan(y))
    log_w = scipy.stats.norm.logpdf(y[k], rows[:, k], spread[:, k]).sum(1)
    if without is not None:
        log_w[without] = -np.inf
    weights = np.exp(log_w - log_w.max())
    centre = weights @ rows / weights.sum()
    sigma = law.normal.covariance.numpy()
    out = y.copy()
    out[u] = centre[u] + sigma[np.ix_(u, k)] @ np.linalg.solve(sigma[np.ix_(k, k)], y[k] - centre[k])
    return out


def test_neighbours_are_a_kernel_mean_and_a_step_of_the_normal_law() -> None:
    wavy = _wavy()
    rows = _wavy_rows(40, seed=1)
    rows = rows[torch.isnan(rows).any(1) & ~torch.isnan(rows).all(1)]
    y = wavy.normal.features(rows)
    said, _ = wavy(rows)
    for i in range(len(rows)):
        assert said[i].numpy() == pytest.approx(_by_hand(wavy, y[i].numpy()), abs=1e-9)


def test_a_row_is_no_neighbour_of_itself() -> None:
    wavy = _wavy()
    x = _wavy_rows(300)
    whole = (~torch.isnan(x)).all(1)
    place = [int((wavy.keys == key).nonzero()) for key in content_keys(x[whole][:20])]  # type: ignore[attr-defined]
    hidden = x[whole][:20].clone()
    hidden[:, 1] = math.nan
    y = wavy.normal.features(hidden)
    said, _ = wavy(hidden, x[whole][:20])
    for i in range(20):
        assert said[i].numpy() == pytest.approx(_by_hand(wavy, y[i].numpy(), without=place[i]), abs=1e-9)


def test_neighbours_see_what_no_line_does_and_know_how_well() -> None:
    wavy = _wavy()
    rows = _wavy_rows(2000, seed=2)
    rows = rows[~torch.isnan(rows[:, 1])]
    hidden = rows.clone()
    hidden[:, 1] = math.nan
    mean, deviation = wavy(hidden)
    line, _ = wavy.normal(hidden)
    number = ~torch.isnan(rows[:, 0])
    error, of_line = ((said[:, 1] - rows[:, 1]).square() for said in (mean, line))
    assert error[number].mean() < 0.1 * of_line[number].mean()
    assert 0.7 < float((error / deviation[:, 1].square()).mean()) < 1.4


def test_with_large_widths_neighbours_are_the_joint_normal_law() -> None:
    law = Neighbours([0, 0, 0])
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.normal(size=(200, 3)) @ rng.normal(size=(3, 3)))
    law.fit(x, torch.zeros(3), torch.ones(3))
    law.log_width.fill_(12.0)
    query = torch.tensor([[0.3, math.nan, -0.5], [math.nan, 1.0, math.nan]], dtype=torch.float64)
    assert torch.allclose(law(query)[0], law.normal(query)[0], atol=1e-6)


def test_training_hides_a_row_from_itself() -> None:
    """The loss of rows that are neighbours is that of the same rows when they are taken from among the neighbours."""
    x = torch.unique(_mixed_rows(200), dim=0)
    model = Made(MIXED, order="any", hidden=(8,), dropout=0.0)
    model.initialise([(x, None)])
    law = model._member(0).neighbours
    assert law is not None and law.rows is not None and law.variances is not None and law.keys is not None
    some = x[:8]
    with torch.no_grad():
        among = [model.loss(row.unsqueeze(0), None, _noise(i)).value for i, row in enumerate(some)]
        kept = law.rows, law.variances, law.keys
        for i, row in enumerate(some):
            others = torch.arange(len(x)) != int((kept[2] == content_keys(row.unsqueeze(0))).nonzero()[0])
            law.rows, law.variances, law.keys = (tensor[others] for tensor in kept)
            assert torch.allclose(model.loss(row.unsqueeze(0), None, _noise(i)).value, among[i], atol=1e-6)


# Columns of many codes, numbers that come again ---------------------------------------------------------------------


def test_a_column_of_many_codes_is_two_and_its_masses_sum_to_one() -> None:
    levels = 1500
    space = Table(columns=(Column("name", "categorical", levels=levels), Column("flag", "binary", missing=True)))
    rng = np.random.default_rng(0)
    name = np.minimum(rng.geometric(0.01, 3000), levels) - 1
    x = torch.tensor(np.stack([name, name % 2], 1).astype(float))
    model = Made(space, hidden=(16,), dropout=0.0)
    model.initialise([(x, None)])
    model.eval()
    every = torch.stack([torch.arange(levels).repeat(2), torch.arange(2).repeat_interleave(levels)], 1).double()
    assert float(model.bound(every).nats.detach().double().exp().sum()) == pytest.approx(1.0, abs=1e-5)
    space.validate(model.sample(500, noise=_noise()))
    stack = Stack(lanes=4)
    codec = model.codec()
    codec.push(stack, x[:200])
    assert stack.bits == pytest.approx(-float(model.bound(x[:200]).nats.detach().sum()) / math.log(2), rel=0.01)
    assert torch.equal(codec.pop(stack, 200), x[:200])
    wide = Made(Table(columns=(Column("name", "categorical", levels=100_000),)), hidden=(16,))
    assert sum(p.numel() for p in wide.parameters()) < 100_000, "memory is at most linear in the levels"


def test_recalled_values_are_left_out_of_their_own_law() -> None:
    values = torch.tensor([2.0, 5.0, 7.0], dtype=torch.float64)
    counts = torch.tensor([1.0, 3.0, 6.0], dtype=torch.float64)
    x = torch.tensor([[2.0], [5.0], [7.0], [6.0]], dtype=torch.float64)
    assert Recalled([values], [counts]).log_prob(x).exp().flatten().tolist() == pytest.approx([0.1, 0.3, 0.6, 0.0])
    left_out = Recalled([values], [counts], leave_out=True).log_prob(x).exp().flatten()
    assert left_out.tolist() == pytest.approx([0.0, 2 / 9, 5 / 9, 0.0])


def test_numbers_that_come_again_are_recalled_and_coded() -> None:
    rng = np.random.default_rng(0)
    pool = rng.integers(0, 20_000, 200)
    cells = np.where(rng.random(3000) < 0.7, rng.choice(pool, 3000), rng.integers(0, 20_000, 3000))
    x = torch.tensor(cells.astype(float)).unsqueeze(1)
    space = Table(columns=(Column("weight", "integer"),))
    options = {"atoms": 4, "components": 2}
    model = _trained(Made(space, hidden=(4,), likelihood_options=options), x[:2500], 60, 0.05)
    plain = _trained(Made(space, hidden=(4,), likelihood_options={**options, "recall": False}), x[:2500], 60, 0.05)
    gain = float((model.bound(x[2500:]).nats - plain.bound(x[2500:]).nats).detach().mean())
    assert gain > 1.0
    grid = torch.arange(-16_000.0, 36_000.0, dtype=torch.float64).unsqueeze(1)
    assert float(model.bound(grid).nats.detach().double().exp().sum()) == pytest.approx(1.0, abs=2e-3)
    stack = Stack(lanes=4)
    codec = model.codec()
    codec.push(stack, x[2500:])
    assert stack.bits == pytest.approx(-float(model.bound(x[2500:]).nats.detach().sum()) / math.log(2), rel=0.01)
    assert torch.equal(codec.pop(stack, 500), x[2500:])
    again = Made(space, hidden=(4,), likelihood_options=options)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval().bound(x).nats, model.bound(x).nats)


def _households(n: int, seed: int) -> Tensor:
    """Rows of a weight on a fine grid, a colour and an age: nine in ten rows of a weight that comes again are alike."""
    pool = np.random.default_rng(0)
    values, kinds, ages = pool.integers(0, 50_000, 300), pool.integers(0, 3, 300), pool.integers(20, 80, 300)
    rng = np.random.default_rng(seed)
    which, again, alike = rng.integers(0, 300, n), rng.random(n) < 0.8, rng.random(n) < 0.9
    alike &= again
    weight = np.where(again, values[which], rng.integers(0, 50_000, n))
    colour = np.where(alike, kinds[which], rng.integers(0, 3, n))
    age = np.where(alike, ages[which] + np.rint(rng.normal(size=n)), rng.integers(20, 80, n))
    return torch.tensor(np.stack([weight, colour, age], 1).astype(float))


HOUSEHOLDS = Table(
    columns=(Column("weight", "integer"), Column("colour", "categorical", levels=3), Column("age", "integer"))
)


def test_a_memory_is_the_rows_of_the_same_value_but_the_row_itself() -> None:
    x = _households(900, seed=1)
    x[::7, 1], x[::11, 2] = torch.nan, torch.nan
    z = (x[:, [0, 2]] - 50.0) / 20.0
    share = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    log_probs, means = share.log().expand(900, -1), torch.full((900, 2), 0.25, dtype=torch.float64)
    memory = Memory([0, 3, 0])
    assert memory.empty and not memory.state_dict()
    memory.fit(0, [1, 2], x, z, log_probs, means, left=torch.full((2,), 0.9, dtype=torch.float64))
    assert memory.of_codes[0] > 0 and memory.of_numbers[1] > 0 and memory.of_numbers[0] == 0
    a, b = float(memory.of_codes[0]), float(memory.of_numbers[1])

    def said(i: int, rows: list[int]) -> tuple[list[float], float, float]:
        codes = [int(x[k, 1]) for k in rows if not torch.isnan(x[k, 1])]
        ages = [float(z[k, 1]) for k in rows if not torch.isnan(x[k, 2])]
        law = [(codes.count(v) + a * float(share[v])) / (len(codes) + a) for v in range(3)]
        return law, (sum(ages) + b * 0.25) / (len(ages) + b), float(memory.weight[1]) if ages else 0.0

    for training in (True, False):
        log_law = memory.train(training).codes(x, log_probs)
        nearer, _, weight = memory.numbers_near(x, z, means)
        for i in range(0, 900, 13):
            rows = [k for k in range(900) if x[k, 0] == x[i, 0] and not (training and k == i)]
            law, mean, near = said(i, rows)
            assert log_law[i].exp().tolist() == pytest.approx(law)
            assert (float(nearer[i, 1]), float(weight[i, 1])) == pytest.approx((mean, near))
    other = torch.tensor([[-5.0, torch.nan, torch.nan]], dtype=torch.float64)
    log_law = memory.codes(other, log_probs[:1])
    _, _, weight = memory.numbers_near(other, (other[:, [0, 2]] - 50.0) / 20.0, means[:1])
    assert torch.allclose(log_law.exp(), share) and not weight.any(), "of a value never seen nothing is remembered"


def test_rows_of_the_same_value_are_alike_and_coded_as_such() -> None:
    x, fresh = _households(2000, seed=2), _households(400, seed=3)
    options = {"atoms": 64, "components": 2}
    torch.manual_seed(0)
    model = _trained(Made(HOUSEHOLDS, hidden=(16,), likelihood_options=options), x, 60)
    member = model._member(0)
    assert member.cells_in_order[0] == 0 and member.memory is not None and not member.memory.empty
    torch.manual_seed(0)
    plain = Made(HOUSEHOLDS, hidden=(16,), likelihood_options=options)
    plain._member(0)._remember = lambda *_: False  # type: ignore[method-assign]
    plain = _trained(plain, x, 60)
    nats = model.bound(fresh).nats.detach()
    assert float((nats - plain.bound(fresh).nats.detach()).mean()) > 0.7
    # Given the weight, known or not, the masses of all colours and ages sum to one.
    ages = torch.arange(-200.0, 300.0, dtype=torch.float64)
    for weight in (float(x[0, 0]), -3.0):
        pairs = torch.cartesian_prod(torch.tensor([weight], dtype=torch.float64), torch.arange(3.0).double(), ages)
        cells = model.column_nats(pairs).detach().double()
        assert float(cells[:, 1:].sum(1).exp().sum()) == pytest.approx(1.0, abs=1e-3)
    stack = Stack(lanes=4)
    codec = model.codec()
    codec.push(stack, fresh)
    assert stack.bits == pytest.approx(-float(nats.sum()) / math.log(2), rel=0.01)
    assert torch.equal(codec.pop(stack, 400), fresh)
    again = Made(HOUSEHOLDS, hidden=(16,), likelihood_options=options)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval().bound(fresh).nats, model.bound(fresh).nats)


def test_piecewise_linear_features_are_those_of_interpolation() -> None:
    x = torch.tensor(np.random.default_rng(0).gamma(1.0, size=(400, 1)))
    encoding = PiecewiseLinear(1, 4)
    encoding.initialise([x])
    edges = np.quantile(x.numpy(), np.linspace(0, 1, 5))
    said = encoding(x, torch.float64).sum(1).numpy()
    assert said == pytest.approx(np.interp(x[:, 0].numpy(), edges, np.arange(5)))


# Errors, and the contract --------------------------------------------------------------------------------------------


def test_options_that_do_not_suit_are_refused() -> None:
    with pytest.raises(ValueError, match="order: expected learned"):
        Made(Binary((3,)), order="sorted")
    with pytest.raises(ValueError, match="each once"):
        Made(Binary((3,)), order=[0, 0, 1])
    with pytest.raises(ValueError, match="one width"):
        Made(Binary((3,)), hidden=(4, 8))
    with pytest.raises(Unsupported, match="one of auto"):
        Made(Binary((3,)), likelihood="multinomial")
    with pytest.raises(NoCodec, match="floating point"):
        Made(MIXED, order="any").codec()


@pytest.mark.parametrize("space", [Binary((1, 3), missing=True), Integers((2,), 3)], ids=["binary", "integers"])
def test_any_order_keeps_the_contract(space: Binary | Integers) -> None:
    named = [
        "parts",
        "batch_invariance",
        "total_mass",
        "missing_cells",
        "sample_frequencies",
        "imputation",
        "column_nats",
    ]
    check_model(Made(space, order="any", hidden=(4,), dropout=0.0, orders=2), only=named)
