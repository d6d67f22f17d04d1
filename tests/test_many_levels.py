"""Columns of very many categories: clusters and members, their law, what they start from, and their codec."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from likely.coding.bits_back import decode_rows, encode_rows
from likely.contract import Column, Model, Table
from likely.distributions import heads
from likely.distributions.clustered import Clustered
from likely.models.transformer import Transformer
from likely.models.vae import VAE
from likely.noise import KeyedNoise

LEVELS = 11
SPACE = Table(
    columns=(
        Column("name", "categorical", levels=LEVELS, missing=True),
        Column("size", "real", resolution=0.5),
        Column("colour", "categorical", levels=3),
    )
)


@pytest.fixture(autouse=True)
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven levels are very many: three clusters of four, of which the last lacks one."""
    monkeypatch.setattr(heads, "_MOST_LEVELS", LEVELS - 1)


def rows(n: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    name = torch.randint(LEVELS - 2, (n,), generator=g).double()
    name[::7] = torch.nan
    size = torch.randint(5, (n,), generator=g) * 0.5
    return torch.stack([name, size.double(), torch.randint(3, (n,), generator=g).double()], 1)


def law(seed: int = 0, lead: tuple[int, ...] = (1,)) -> Clustered:
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(3, 4, generator=g, dtype=torch.float64)
    table[2, 3] = -torch.inf
    logits = [torch.randn(*lead, 1, size, generator=g, dtype=torch.float64) for size in (3, 4)]
    return Clustered(*logits, table)


def probabilities(found: Clustered) -> np.ndarray:
    """p(c) p(m | c) of the levels, from the numbers of the law."""
    first = np.exp(found.logits[..., 0, :].numpy())
    second = np.exp(found.member_logits[..., 0, None, :].numpy() + found.table.numpy())
    joint = (first / first.sum(-1, keepdims=True))[..., None] * (second / second.sum(-1, keepdims=True))
    return joint.reshape(*joint.shape[:-2], -1)[..., :LEVELS]


def test_the_law_sums_to_one_and_is_what_is_drawn() -> None:
    found, expected = law(), probabilities(law())[0]
    np.testing.assert_allclose(found.log_prob(torch.arange(LEVELS)[:, None]).exp()[:, 0], expected, rtol=1e-12)
    assert expected.sum() == pytest.approx(1.0, abs=1e-12)
    n = 20_000
    many = Clustered(found.logits.expand(n, -1, -1), found.member_logits.expand(n, -1, -1), found.table)
    drawn = many.sample(KeyedNoise(0, torch.arange(n)))[:, 0].long()
    share = np.bincount(drawn.numpy(), minlength=LEVELS) / n
    assert len(share) == LEVELS
    assert (np.abs(share - expected) < 5 * np.sqrt(expected / n)).all()


def test_the_best_is_the_likeliest_member_of_the_likeliest_cluster() -> None:
    found = law(1, (2, 5))
    weights = torch.rand(2, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    padded = np.pad(probabilities(found), [(0, 0), (0, 0), (0, 1)]).reshape(2, 5, 3, 4)
    for given, p in ((weights, (weights.numpy()[..., None, None] * padded).sum(1)), (None, padded)):
        cluster = p.sum(-1).argmax(-1)
        expected = 4 * cluster + np.take_along_axis(p, cluster[..., None, None], -2)[..., 0, :].argmax(-1)
        assert np.array_equal(found.best(given)[..., 0].numpy(), expected)


def test_an_untrained_head_has_the_frequencies_of_the_training_rows() -> None:
    head = heads.head("table", SPACE, (5,), components=2)
    torch.nn.init.zeros_(head.output.weight)  # type: ignore[arg-type, union-attr]
    x = rows(500)
    head.initialise([(x, None)])
    name = x[:, 0][~torch.isnan(x[:, 0])].long()
    expected = (torch.bincount(name, minlength=LEVELS) + 0.5) / (len(name) + 0.5 * LEVELS)
    found = head(torch.zeros(1, 5)).coded[0]  # type: ignore[attr-defined]
    assert isinstance(found, Clustered)
    torch.testing.assert_close(found.log_prob(torch.arange(LEVELS)[:, None]).exp()[:, 0], expected)


@pytest.mark.parametrize("cls", [VAE, Transformer])
def test_what_is_coded_comes_back_at_the_length_of_the_bound(cls: type[Model]) -> None:
    x = rows(400)
    torch.manual_seed(0)
    model = cls(SPACE, **({"latent_dim": 2, "hidden": (8,)} if cls is VAE else {"width": 8, "layers": 1, "heads": 1}))
    model.initialise([(x, None)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
        if isinstance(model, VAE):
            model.posterior_head.weight.mul_(0.1)  # no latent value beyond the codec's grid
    codec, present = model.codec(), ~torch.isnan(x)
    payload = encode_rows(codec, x)
    back = decode_rows(codec, payload.data, len(x), None, present.numpy())
    torch.testing.assert_close(back, x, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        bits = -float(model.bound(x, None, KeyedNoise(0, torch.arange(len(x)))).nats.double().sum()) / np.log(2)
    assert abs(8 * len(payload.data) / bits - 1) < 0.1  # 400 rows: noise of the posterior, opening of the lanes
