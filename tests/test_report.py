"""The report: its statistics, and that the page is whole, safe and alone."""

from __future__ import annotations

import base64
import functools
import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from scipy import stats

from likely.contract import Binary, Bound, Column, Integers, Model, Reals, Table, Tokens
from likely.data.dataset import Dataset
from likely.evaluation import evaluate
from likely.report import ReportInput, write_report
from likely.report.comparison import compare_columns, distance_and_reference, ks_distance, total_variation
from likely.report.document import principal_components, render
from likely.report.figures import Tiles

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")
image_module = pytest.importorskip("PIL.Image")

RANDOM = np.random.default_rng(0)


class Uniform(Model):
    """Every value with the same probability, in two parts."""

    spaces = (Binary, Integers, Reals)

    def bound(self, x, condition=None, noise=None):
        each = torch.full((len(x),), -self.space.dims * np.log(getattr(self.space, "levels", 2)))
        return Bound("exact", {"most_of_it": each * 1.25, "the_rest": each * -0.25})


class Page(HTMLParser):
    """Collects what the tests ask about; fails on tags that do not match."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.tags, self.ids, self.links, self.words = [], [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        if tag == "img":
            self.images.append(values)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "a":
            self.links.append(values["href"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


SPACE = Integers((1, 8, 8), 17)


def digits(n=40):
    return RANDOM.integers(0, 17, (n, 1, 8, 8))


def minimal(space=SPACE, **content):
    return ReportInput(title="t", space=space, model="m", **content)


@functools.cache
def evaluation():
    return evaluate(Uniform(SPACE), Dataset(SPACE, torch.from_numpy(digits())))


def image_input(**changes):
    x = digits()
    content = {
        "title": "Digits <1797>",
        "space": SPACE,
        "model": "vae",
        "options": {"latent_dim": 16, "hidden": (64, 64), "rate": 0.001, "prior": None},
        "parameters": 12345,
        "facts": {"seed": 7},
        "schema": "pixels <0 … 16>",
        "evaluations": [evaluation()],
        "history": [{"step": s, "loss": 2 - s / 100} for s in range(10, 100, 10)]
        + [{"step": s, "valid": {"nats": -64 * (2 - s / 200)}} for s in (20, 40, 60)],
        "data": x,
        "samples": digits(),
        "reconstructions": (x[:8], x[:8] / 2),
        "embedding": RANDOM.normal(size=(40, 5)),
        "labels": np.arange(40) % 10,
        "label_name": "digit",
    }
    return ReportInput(**{**content, **changes})


# --- statistics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_distances_of_samples_are_those_of_the_textbooks(seed):
    random = np.random.default_rng(seed)
    first, second = random.normal(size=53).round(1), random.normal(0.3, 1.2, 71).round(1)  # with ties
    assert ks_distance(first, second) == pytest.approx(stats.ks_2samp(first, second).statistic, abs=1e-12)
    first, second = random.choice(list("abc"), 40), random.choice(list("bcde"), 55)
    by_hand = sum(abs(np.mean(first == c) - np.mean(second == c)) for c in "abcde") / 2
    assert total_variation(first, second) == pytest.approx(by_hand, abs=1e-12)


def test_reference_is_what_chance_gives():
    random = np.random.default_rng(0)
    values = [distance_and_reference(random.normal(size=400), random.normal(size=400), ks_distance) for _ in range(60)]
    distances, references = np.array(values).T
    assert abs((distances - references).mean()) < 3 * stats.sem(distances - references)
    # mean of the two-sample statistic of 200 against 200 values: sqrt(pi / 2) ln 2 sqrt(1 / 100)
    assert references.mean() == pytest.approx(np.sqrt(np.pi / 2) * np.log(2) * np.sqrt(1 / 100), rel=0.12)
    apart, chance = distance_and_reference(random.normal(size=400), random.normal(2.0, 1.0, 400), ks_distance)
    assert apart > 0.6 > 0.15 > chance


def test_columns_are_compared_by_their_kind():
    pandas = pytest.importorskip("pandas")
    real = pandas.DataFrame(
        {
            "age": [20.0, 30.0, None, 50.0] * 50,
            "job": ["a", "b", None, "a"] * 50,
            "code": [0, 1, 2, 1] * 50,
            "day": pandas.to_datetime(["2020-01-01", "2020-07-01"] * 100),
        }
    )
    space = Table(columns=(Column("age", "integer", missing=True), Column("code", "categorical", 3)))
    sampled = real.assign(job="a", code=2)
    age, job, code, day = compare_columns(real, sampled, space)
    assert [c.numeric for c in (age, job, code, day)] == [True, False, False, True]
    assert age.missing == (0.25, 0.25) and job.missing == (0.25, 0.0)
    assert age.value == pytest.approx(age.reference, abs=0.05)
    assert job.value == pytest.approx(1 / 3, abs=0.05) and code.value == pytest.approx(3 / 4, abs=0.05)
    assert job.shares() == [("a", pytest.approx(2 / 3), 1.0), ("b", pytest.approx(1 / 3), 0.0)]
    assert day.real[0] == pytest.approx(2020.0) and day.real[1] == pytest.approx(2020.5, abs=0.01)
    with pytest.raises(ValueError, match=r"lacks \['job'\]"):
        compare_columns(real, real.drop(columns="job"))


def test_rare_categories_are_added_up():
    real = np.repeat([f"c{i:02d}" for i in range(30)], np.arange(30, 0, -1))
    (column,) = compare_columns(real[:, None], real[:, None])
    shares = column.shares()
    assert [name for name, _, _ in shares] == [*(f"c{i:02d}" for i in range(8)), "22 others"]
    assert sum(real for _, real, _ in shares) == pytest.approx(1) and shares[0][1] == pytest.approx(30 / 465)


def test_principal_components_are_those_of_the_singular_values():
    codes = RANDOM.normal(size=(200, 6)) @ RANDOM.normal(size=(6, 6)) + 3
    points, shares = principal_components(codes)
    left, values, _ = np.linalg.svd(codes - codes.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(points), np.abs(left[:, :2] * values[:2]), atol=1e-9)
    np.testing.assert_allclose(shares, values[:2] ** 2 / (values**2).sum(), rtol=1e-9)


# --- images ---------------------------------------------------------------------------------------------------------


def pixels(address):
    return np.asarray(image_module.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


def test_grid_shows_every_image_in_order_at_its_brightness():
    images = RANDOM.integers(0, 17, (7, 1, 40, 60))
    grid = Tiles((1, 40, 60), 0, 16).grid(images, columns=3)
    shown = pixels(grid["src"])
    assert shown.shape == (3 * 40 + 2 * 2, 3 * 60 + 2 * 2) == (grid["height"], grid["width"])
    for i, image in enumerate(images):
        top, left = (i // 3) * 42, (i % 3) * 62
        np.testing.assert_array_equal(shown[top : top + 40, left : left + 60], np.round(image[0] / 16 * 255))
    assert (shown[40:42] == 255).all()


def test_large_images_are_shrunk_by_their_means_and_small_ones_enlarged():
    image = RANDOM.integers(0, 256, (1, 3, 256, 512))
    shown = pixels(Tiles((3, 256, 512), 0, 255).grid(image, columns=1)["src"])
    means = image.reshape(3, 64, 4, 128, 4).mean((2, 4)).transpose(1, 2, 0)
    np.testing.assert_allclose(shown, means, atol=0.51)
    small = pixels(Tiles((1, 8, 8), 0, 1).grid(np.eye(8)[None, None], columns=1)["src"])
    np.testing.assert_array_equal(small, np.kron(np.eye(8), np.ones((5, 5))) * 255)


def test_colour_images_of_pure_noise_stay_small():
    space = Integers((3, 256, 256), 256)
    noise = RANDOM.integers(0, 256, (20, 3, 256, 256), dtype=np.uint8)
    page = render(minimal(space, data=noise, samples=noise, reconstructions=(noise, noise)))
    assert len(page) < 3_000_000


# --- the page -------------------------------------------------------------------------------------------------------


def test_page_is_whole_and_needs_nothing_else(tmp_path):
    path = write_report(tmp_path / "report.html", image_input())
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert set(page.links) == {f"#{i}" for i in page.ids}
    assert page.ids == ["fitted", "numbers", "curve", "parts", "samples", "reconstructions", "embedding"]
    assert all(image["src"].startswith("data:image/") and image["alt"] for image in page.images)
    assert len(page.images) == 5
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\(|@import|<script", text)
    assert len(text) < 3_000_000 and list(tmp_path.iterdir()) == [path]


def test_page_says_the_number_its_unit_kind_and_error():
    content = image_input()
    record = content.evaluations[0].to_json()
    page = Page(render(content)).text
    assert f"{record['bits']:#.4g} bits/dim" in page and "the exact log p(x)" in page and "40 held-out examples" in page
    for row in record["rows"]:
        assert row["name"] in page
    assert "most of it" in page and f"−{-record['parts']['most_of_it']:#.4g}" in page
    most, rest = (share * 64 * np.log2(17) / 64 for share in (1.25, 0.25))
    assert f"{most:#.4g}" in page and f"−{rest:#.4g}" in page  # a part that raises log p(x) saves bits
    assert "12,345" in page and "latent_dim" in page and "64, 64" in page and "0.001" in page


def test_a_stored_record_gives_the_same_page_as_the_live_one():
    stored = json.loads(json.dumps(evaluation().to_json()))
    assert render(minimal(evaluations=[stored])) == render(minimal(evaluations=[evaluation()]))


def test_learning_curve_marks_the_best_held_out_value():
    page = Page(render(minimal(history=image_input().history)))
    alt = next(image["alt"] for image in page.images if "Learning" in image["alt"])
    assert "1.9 nats per dimension at step 20" in alt and "best, 1.7, at step 60" in alt


def test_text_of_the_user_is_escaped_and_never_read_as_mathematics():
    pandas = pytest.importorskip("pandas")
    nasty = "<img src=x onerror=alert(1)> $\\frac{a}$ 表"
    frame = pandas.DataFrame({nasty: [1.5, 2.5, None] * 9, "name": [nasty, "b", "c"] * 9})
    space = Table(columns=(Column(nasty, "real", missing=True), Column("name", "categorical", 3)))
    content = ReportInput(
        title=nasty,
        space=space,
        model=nasty,
        facts={nasty: nasty},
        options={nasty: nasty},
        schema=nasty,
        data=frame,
        samples=frame,
        reconstructions=(frame, frame),
        embedding=RANDOM.normal(size=(27, 2)),
        labels=frame["name"],
        label_name=nasty,
        columns_real=frame,
        columns_sampled=frame,
    )
    text = render(content)
    assert "<img src=x" not in text and "&lt;img src=x" in text
    page = Page(text)
    assert "missing" in page.text and page.ids == ["fitted", "samples", "reconstructions", "embedding", "columns"]


@pytest.mark.parametrize(
    ("space", "part"),
    [
        (Reals((2,)), RANDOM.normal(size=(50, 2))),
        (Reals((30,)), RANDOM.normal(size=(50, 30))),
        (Binary((5, 6)), RANDOM.integers(0, 2, (50, 5, 6))),
        (Reals((1, 9, 9)), RANDOM.normal(size=(50, 1, 9, 9))),
    ],
)
def test_every_kind_of_array_has_its_picture(space, part):
    page = Page(render(minimal(space, data=part, samples=part, reconstructions=(part, part))))
    assert {"samples", "reconstructions"} <= set(page.ids)
    assert ("columns" in page.ids) == (len(space.shape) == 1)


def test_texts_are_shown_as_texts():
    texts = [f"line {i} <b>" for i in range(20)]
    content = minimal(Tokens(length=9, vocab=30), data=texts, samples=texts[::-1])
    page = Page(render(content))
    assert "line 19 <b>" in page.text and "b" not in page.tags and "columns" not in page.ids


def test_continuous_data_are_shown_in_nats_only():
    space = Reals((3,))
    data = Dataset(space, torch.randn(30, 3, generator=torch.Generator().manual_seed(0)))
    result = evaluate(Uniform(space), data, train_set=data)
    page = Page(render(minimal(space, evaluations=[result]))).text
    assert "nats per example" in page and "bits/" not in page and "density" in page


@pytest.mark.parametrize(
    "labels", [None, RANDOM.normal(size=40), np.arange(40), np.array([f"class {i % 14}" for i in range(40)])]
)
@pytest.mark.parametrize("latent", [1, 2, 7])
def test_embedding_says_what_its_axes_are(labels, latent):
    content = minimal(embedding=RANDOM.normal(size=(40, latent)), labels=labels, label_name="digit")
    page = Page(render(content))
    expected = {1: "The single latent variable", 2: "The two latent variables", 7: "principal components of the 7-dim"}
    assert expected[latent] in page.text
    assert ("Coloured by digit" in page.text) == (labels is not None)
    assert ("others" in page.text) == (labels is not None and labels.dtype.kind == "U")


def test_one_value_and_empty_columns_do_not_break_the_page():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"same": [4.0] * 8, "none": [None] * 8, "huge": np.logspace(0, 300, 8)})
    space = Table(columns=(Column("same", "real"),))
    page = Page(render(minimal(space, columns_real=frame, columns_sampled=frame)))
    assert "huge" in page.text


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="reconstructions: expected two arrays of one shape"):
        render(minimal(reconstructions=(digits(4), digits(5))))
    with pytest.raises(ValueError, match="embedding: expected finite numbers"):
        render(minimal(embedding=np.full((3, 2), np.nan)))
    with pytest.raises(ValueError, match="labels: expected one of each of 40"):
        render(minimal(embedding=np.zeros((40, 2)), labels=np.arange(3)))


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ValueError, match=r"likely\[report\]"):
        render(minimal())
