"""The record of an evaluation: units, baselines, and classic codecs of the same data."""

from __future__ import annotations

import bz2
import importlib
import io
import json
import lzma
import math
import zlib

import numpy as np
import pytest
import torch
from rich.console import Console

from likely.contract import Binary, Bound, Column, Counts, Integers, Model, Reals, Space, Table, Tokens
from likely.data.dataset import Dataset, Passes
from likely.evaluation import classic, classic_codecs, evaluate, fit_baselines, held_out
from likely.evaluation.evaluation import with_error
from likely.models import find


class Uniform(Model):
    """Every value of a finite space with the same probability; a standard normal of everything else."""

    spaces = (Space,)
    conditional = True

    def bound(self, x, condition=None, noise=None):
        space = self.space
        if isinstance(space, Reals | Counts):
            return Bound("exact", {"normal": -(x.double() ** 2 / 2 + math.log(2 * math.pi) / 2).flatten(1).sum(1)})
        if isinstance(space, Table):
            nats = -sum(math.log(c.levels or 100) for c in space.columns)
        else:
            nats = -space.dims * math.log(
                {"Binary": 2}.get(type(space).__name__) or vars(space).get("levels") or space.vocab
            )
        return Bound("exact", {"cells": torch.full((len(x),), nats / 2), "more": torch.full((len(x),), nats / 2)})


class Latent(Uniform):
    """The same, claimed as a bound, with weights that are worth one nat more."""

    def bound(self, x, condition=None, noise=None):
        return Bound("lower bound", super().bound(x, condition, noise).parts)

    def log_weights(self, x, condition, samples, noise):
        return self.bound(x).nats[:, None].expand(-1, samples) + 1.0

    def encode(self, x, condition=None):
        return x.flatten(1)[:, :1]


def integers(shape, levels, n=50, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return Dataset(Integers(shape, levels), torch.randint(0, levels, (n, *shape), generator=generator))


TABLE = Table(
    columns=(Column("job", "categorical", 8), Column("age", "integer"), Column("pay", "real", resolution=0.01))
)


def text(evaluation):
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(evaluation.table())
    return console.export_text()


# --- units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (3, 5, 5), (1, 8, 8)])
@pytest.mark.parametrize("levels", [2, 17, 256, 65536])
def test_a_uniform_model_costs_log2_of_the_levels(shape, levels):
    data = integers(shape, levels)
    record = evaluate(Uniform(data.space), data, classic=False).to_json()
    assert record["unit"] == "bits/dim"
    assert math.isclose(record["bits"], math.log2(levels), rel_tol=1e-6)
    assert record["bits_standard_error"] == 0.0


def test_tables_are_counted_by_the_row_and_texts_by_the_token():
    x = torch.zeros(5, 3, dtype=torch.float64)
    rows = evaluate(Uniform(TABLE), Dataset(TABLE, x), classic=False).to_json()
    assert rows["unit"] == "bits/row" and math.isclose(rows["bits"], 3 + 2 * math.log2(100), rel_tol=1e-6)
    space = Tokens(length=12, vocab=16)
    tokens = evaluate(Uniform(space), Dataset(space, torch.zeros(5, 12)), raw=bytes(40)).to_json()
    assert tokens["unit"] == "bits/token" and math.isclose(tokens["bits"], 4.0, rel_tol=1e-6)
    assert math.isclose(tokens["bits_per_byte"], 5 * 12 * 4 / 40, rel_tol=1e-6)


def test_standard_error_keeps_its_ratio_in_every_unit():
    space = Counts((3,))
    data = Dataset(space, torch.randint(0, 5, (40, 3), generator=torch.Generator().manual_seed(0)))
    record = evaluate(Uniform(space), data, classic=False).to_json()
    nats = data.x.double().square().sum(1) / 2 + 1.5 * math.log(2 * math.pi)
    assert math.isclose(record["bits"], float(nats.mean()) / math.log(2) / 3)
    assert math.isclose(record["bits_standard_error"], float(nats.std()) / math.sqrt(40) / math.log(2) / 3)


def test_bits_of_continuous_data_are_refused():
    data = Dataset(Reals((3,)), torch.randn(20, 3, generator=torch.Generator().manual_seed(0)))
    result = evaluate(Uniform(data.space), data, raw=b"text")
    record = result.to_json()
    assert "bits" not in record and record["unit"] is None and record["codecs"] == []
    assert "density and no probability" in record["why_no_bits"] and "density" in record["sentence"]
    assert "bits/" not in text(result) and all(row["bits"] is None for row in record["rows"])


def test_continuous_columns_are_named():
    columns = (Column("job", "categorical", 3), Column("height", "real"), Column("weight", "real"))
    space = Table(columns=columns)
    result = evaluate(Uniform(space), Dataset(space, torch.zeros(3, 3, dtype=torch.float64)))
    assert "columns 'height', 'weight' are continuous" in result.why_no_bits
    assert result.unit is None and result.codecs == []


# --- the record -----------------------------------------------------------------------------------------------------


def test_record_is_json_and_holds_every_number():
    data, train = integers((1, 6, 6), 16), integers((1, 6, 6), 16, seed=1)
    result = evaluate(Latent(data.space), data, train_set=train, samples=7)
    record = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert record["kind"] == "lower bound" and record["n"] == 50 and record["dims"] == 36
    assert math.isclose(sum(record["parts"].values()), record["nats"])
    weighted = record["importance_weighted"]
    assert weighted["samples"] == 7 and weighted["effective_samples"] == pytest.approx(7)
    assert math.isclose(weighted["nats"], record["nats"] + 1.0, rel_tol=1e-6)
    assert math.isclose(weighted["bits"], 4 - 1 / math.log(2) / 36, rel_tol=1e-6)
    assert record["active_units"]["latent"] == 1 and record["active_units"]["active"] == 1
    assert [b["name"] for b in record["baselines"]] == ["independent", "gaussian"]
    sizes = {c["name"]: c for c in record["codecs"]}
    assert math.isclose(sizes["xz -9e"]["bits"], sizes["xz -9e"]["bytes"] * 8 / (50 * 36))
    shown = text(result)
    for name in (
        "importance-weighted",
        "independent",
        "gaussian",
        "zlib -9",
        "PNG, tiled sheet",
        "bits/dim",
        "file size",
    ):
        assert name in shown
    assert "lower bound on log p(x) with 7 importance samples" in result.sentence()
    assert f"{weighted['bits']:#.4g} bits/dim" in result.sentence()


def test_single_example_gives_null_and_not_nan():
    data = integers((4,), 16, n=1)
    record = evaluate(Uniform(data.space), data).to_json()
    assert record["nats_standard_error"] is None and record["bits_standard_error"] is None
    json.dumps(record, allow_nan=False)


def test_exact_models_need_no_importance_samples():
    data = integers((4,), 16)
    result = evaluate(Uniform(data.space), data, samples=10, classic=False)
    assert result.importance is None and "is exact" in result.importance_note
    assert "the exact log p(x)" in result.sentence()


def test_progress_names_the_stages():
    stages = []
    data = integers((4,), 16)
    evaluate(
        Latent(data.space), data, train_set=data, samples=3, progress=lambda name, done, total: stages.append(name)
    )
    assert list(dict.fromkeys(stages)) == ["held-out bound", "importance samples", "baselines", "classic codecs"]


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (-88.951, 0.2345, "-88.95 ± 0.23"),
        (0.1, 0.00042, "0.10000 ± 0.00042"),
        (12345.6, 78.9, "12,346 ± 79"),
        (2.0, 0.0, "2.000"),
    ],
)
def test_numbers_show_two_digits_of_their_error(value, error, expected):
    assert with_error(value, error) == expected


# --- baselines ------------------------------------------------------------------------------------------------------


def test_baselines_are_fitted_to_the_training_set():
    train, data = integers((5,), 4, n=400), integers((5,), 4, n=60, seed=1)
    independent = fit_baselines(train, data, names=["independent"])[0]
    by_hand = find("independent")(data.space)
    by_hand.initialise(Passes(train))
    by_hand.estimate(Passes(train))
    assert independent.result.nats == held_out(by_hand, data).nats
    frequencies = np.stack([(train.x.numpy() == v).mean(0) for v in range(4)])
    plain = np.log(frequencies[data.x.numpy(), np.arange(5)]).sum(1).mean()
    assert abs(independent.result.nats - plain) < 0.02  # smoothing moves 400 examples by little


def test_gain_over_a_baseline_is_paired():
    train, data = integers((5,), 4, n=400), integers((5,), 4, n=60, seed=1)
    result = evaluate(Uniform(data.space), data, train_set=train, classic=False)
    record = result.to_json()["baselines"][0]
    difference = (result.held_out.example_nats - result.baselines[0].result.example_nats).numpy()
    assert math.isclose(record["gain_nats"], difference.mean(), rel_tol=1e-9)
    assert math.isclose(record["gain_nats_standard_error"], difference.std(ddof=1) / math.sqrt(60), rel_tol=1e-9)


def test_a_baseline_that_is_not_defined_says_why():
    space = Tokens(length=6, vocab=5)
    data = Dataset(space, torch.zeros(10, 6))
    gaussian = fit_baselines(data, data, names=["gaussian"])[0]
    assert gaussian.result is None and "gaussian" in gaussian.note and "Tokens" in gaussian.note


def test_a_baseline_without_a_condition_says_so():
    condition = Integers((1,), 3)
    data = integers((5,), 4)
    data = Dataset(data.space, data.x, condition, torch.zeros(50, 1))
    baseline = fit_baselines(data, data, names=["independent"])[0]
    assert baseline.note == "does not see the condition" and baseline.result is not None
    result = evaluate(Uniform(data.space, condition), data, train_set=data)
    assert "log p(x | condition)" in result.sentence()
    assert any("without their condition" in note for note in result.notes())


# --- classic codecs -------------------------------------------------------------------------------------------------


def sizes(data, **options):
    return {codec.name: codec for codec in classic_codecs(data, **options)}


def test_streams_are_those_of_the_standard_library():
    data = integers((3, 5, 7), 200)
    data.x[:, :, :, 3:] = 9
    raw = data.x.numpy().astype(np.uint8).transpose(0, 2, 3, 1).tobytes()  # channels interleaved
    got = sizes(data)
    assert got["zlib -9"].bytes == len(zlib.compress(raw, 9))
    assert got["bz2 -9"].bytes == len(bz2.compress(raw, 9))
    assert got["xz -9e"].bytes == len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    whole = pytest.importorskip("zstandard").ZstdCompressor(level=22).compress(raw)
    assert abs(got["zstd -22"].bytes - len(whole)) <= 8  # a stream's header does not hold the size


@pytest.mark.parametrize(
    ("space", "low", "high", "dtype"),
    [
        (Integers((6,), 256), 0, 256, "<u1"),
        (Integers((6,), 300), 0, 300, "<u2"),
        (Integers((6,), 2**20), 0, 2**20, "<u4"),
        (Counts((6,)), 0, 200, "<u1"),
        (Counts((6,)), 0, 70000, "<u4"),
        (Tokens(length=6, vocab=256), 0, 256, "<u1"),
    ],
)
def test_raw_form_is_the_smallest_type_that_holds_the_values(space, low, high, dtype):
    x = torch.randint(low, high, (30, 6), generator=torch.Generator().manual_seed(0))
    x[0, 0] = high - 1
    (form, _), *rest = classic.raw_forms(x.numpy(), space)
    assert not rest and form == x.numpy().astype(dtype).tobytes()
    assert sizes(Dataset(space, x.double()))["zlib -9"].bytes == len(zlib.compress(form, 9))


def test_binary_data_are_also_packed_and_the_smaller_counts():
    noise = Dataset(Binary((8, 9)), torch.randint(0, 2, (100, 8, 9), generator=torch.Generator().manual_seed(0)))
    got = sizes(noise)["zlib -9"]
    assert got.note == "one bit a pixel" and got.bytes == len(zlib.compress(np.packbits(noise.x.numpy()).tobytes(), 9))
    column = Dataset(Binary((9, 9)), (torch.arange(81) % 9 == 0).float().reshape(1, 9, 9).repeat(300, 1, 1))
    plain = len(zlib.compress(column.x.numpy().astype(np.uint8).tobytes(), 9))
    packed = len(zlib.compress(np.packbits(column.x.numpy().astype(np.uint8)).tobytes(), 9))
    assert sizes(column)["zlib -9"].bytes == min(plain, packed)


def test_dynamic_binarisation_compresses_the_binary_images_that_were_drawn():
    grey = torch.randint(0, 256, (40, 6, 6), generator=torch.Generator().manual_seed(0))
    data = Dataset(Binary((6, 6)), grey, bernoulli_scale=255.0)
    drawn = data.batch(slice(0, 40))[0].numpy().astype(np.uint8)
    assert sizes(data)["zlib -9"].bytes == len(zlib.compress(np.packbits(drawn).tobytes(), 9))


def test_missing_cells_are_stored_as_a_value_of_their_own():
    x = torch.randint(0, 2, (50, 5), generator=torch.Generator().manual_seed(0)).float()
    x[3, 2] = math.nan
    got = sizes(Dataset(Binary((5,), missing=True), x))
    raw = np.where(np.isnan(x.numpy()), 2, x.numpy()).astype(np.uint8).tobytes()
    assert got["zlib -9"].bytes == len(zlib.compress(raw, 9))
    x = torch.zeros(3, 4, 4)
    x[0, 0, 0] = math.nan
    pictures = sizes(Dataset(Integers((4, 4), 7, missing=True), x))
    assert pictures["PNG, tiled sheet"].bytes is None and "missing" in pictures["PNG, tiled sheet"].note


@pytest.mark.parametrize(("shape", "channels"), [((7, 5), 1), ((1, 7, 5), 1), ((3, 7, 5), 3)])
@pytest.mark.parametrize("n", [1, 2, 6, 7, 50])
def test_sheets_hold_every_image_once(shape, channels, n, monkeypatch):
    monkeypatch.setattr(classic, "SHEET", 21)  # 3 images down, 4 across
    images = np.random.default_rng(0).integers(1, 256, (n, 7, 5) if channels == 1 else (n, 7, 5, 3), dtype=np.uint8)
    found = []
    for sheet in classic.sheets(images):
        assert sheet.shape[0] <= 21 and sheet.shape[1] <= 21
        tiles = [sheet[i : i + 7, j : j + 5] for i in range(0, sheet.shape[0], 7) for j in range(0, sheet.shape[1], 5)]
        found += [tile for tile in tiles if tile.any()]
    np.testing.assert_array_equal(np.stack(found), images)


@pytest.mark.parametrize("kind", ["PNG", "WebP"])
@pytest.mark.parametrize("space", [Binary((7, 5)), Integers((1, 7, 5), 17), Integers((3, 7, 5), 256)])
def test_image_files_are_lossless(space, kind, monkeypatch):
    image_module = pytest.importorskip("PIL.Image")
    files = []

    class Recorder(io.BytesIO):
        def getvalue(self):
            files.append(super().getvalue())
            return files[-1]

    levels = getattr(space, "levels", 2)
    x = torch.randint(0, levels, (4, *space.shape), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(classic.io, "BytesIO", Recorder)
    got = {codec.name: codec for codec in classic_codecs(Dataset(space, x))}[f"{kind}, one file an image"]
    monkeypatch.undo()
    mine = [f for f in files if f[1:4] == (b"PNG" if kind == "PNG" else b"IFF")][:4]
    assert got.bytes == sum(map(len, mine)) and got.note.startswith("4 files")
    for file, example in zip(mine, x.numpy()):
        image = np.asarray(
            image_module.open(io.BytesIO(file)).convert("RGB" if kind == "WebP" or space.dims > 35 else "L")
        )
        pixels = example.reshape(-1, 7, 5).transpose(1, 2, 0).astype(np.uint8) * (
            255 if isinstance(space, Binary) else 1
        )
        np.testing.assert_array_equal(image.reshape(7, 5, -1)[..., : pixels.shape[-1]], pixels)


def test_arrays_that_are_no_images_have_no_image_files():
    assert all("PNG" not in name for name in sizes(integers((64,), 256)))
    assert all("PNG" not in name for name in sizes(integers((2, 8, 8), 256)))
    assert all("PNG" not in name for name in sizes(integers((8, 8), 1000)))


def test_tables_are_compressed_as_their_text_and_as_parquet():
    pandas, parquet = pytest.importorskip("pandas"), pytest.importorskip("pyarrow.parquet")
    frame = pandas.DataFrame({"job": ["baker", "smith"] * 40, "age": range(80), "pay": np.arange(80) / 100})
    data = Dataset(TABLE, torch.zeros(80, 3, dtype=torch.float64))
    raw = frame.to_csv(index=False).encode()
    got = sizes(data, raw=raw, frame=lambda: frame)
    assert got["zlib -9"].bytes == len(zlib.compress(raw, 9)) and got["zlib -9"].note == "the text of the table"
    sink = io.BytesIO()
    frame.to_parquet(sink, index=False, compression="zstd")
    assert 0 < got["Parquet + zstd"].bytes < len(sink.getvalue())  # without statistics and pandas' own description
    assert parquet.read_table(io.BytesIO(sink.getvalue())).num_rows == 80
    without = sizes(data)
    assert without["zlib -9"].bytes is None and "needs the text" in without["zlib -9"].note
    assert without["Parquet + zstd"].bytes is None


def test_names_that_come_twice_and_sparse_columns_are_sized_as_parquet():
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow.parquet")
    values = np.arange(80) % 3
    plain = pandas.DataFrame({"a": values, "b": values / 4})
    data = Dataset(TABLE, torch.zeros(80, 3, dtype=torch.float64))
    expected = sizes(data, frame=lambda: plain)["Parquet + zstd"].bytes
    twice = plain.set_axis(["a", "a"], axis=1)
    sparse = plain.assign(a=pandas.arrays.SparseArray(values))
    assert abs(sizes(data, frame=lambda: twice)["Parquet + zstd"].bytes - expected) < 16
    assert sizes(data, frame=lambda: sparse)["Parquet + zstd"].bytes == expected


def test_a_codec_that_is_not_installed_says_so(monkeypatch):
    real = importlib.import_module

    def absent(name, *arguments):
        if name in ("compression.zstd", "zstandard", "PIL.Image", "pyarrow"):
            raise ImportError(name)
        return real(name, *arguments)

    monkeypatch.setattr(classic.importlib, "import_module", absent)
    got = sizes(integers((4, 4), 256))
    assert got["zstd -22"].bytes is None and "not installed" in got["zstd -22"].note
    assert got["PNG, tiled sheet"].bytes is None and "not installed" in got["PNG, tiled sheet"].note
    assert got["xz -9e"].bytes is not None


def test_table_data_with_missing_cells_are_compared_with_a_caveat():
    space = Table(columns=(Column("job", "categorical", 8, missing=True),))
    result = evaluate(
        Uniform(space), Dataset(space, torch.full((4, 1), math.nan, dtype=torch.float64)), raw=b"job\n\n\n\n\n"
    )
    assert any("observed cells" in note for note in result.notes()) and any(
        "order of the rows" in n for n in result.notes()
    )
