"""Compression as a user meets it: the verbs and their twins in Python, every form of data, and every way to fail."""

from __future__ import annotations

import inspect
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

import likely
from documents import adult, run
from likely import archive, models
from likely.archive import Archive
from likely.coding import errors, parallel
from likely.coding.container import Limits
from likely.coding.weights import pack, unpack
from likely.contract import Binary, Column, NoCodec, Reals, Table
from likely.data import infer_schema
from likely.evaluation import held_out
from likely.exact import Irreproducible, Network
from likely.exact.products import Product, Route

OPTIONS = {"latent_dim": 4, "hidden": [16], "steps": 60, "progress": False, "seed": 0}


def table(n: int, seed: int) -> pd.DataFrame:
    """Mixed columns with holes, a spike at zero and a column of floats without a grid."""
    rng = np.random.default_rng(seed)
    frame = adult(n, seed)
    frame["gain"] = np.where(rng.random(n) < 0.8, 0, rng.integers(1, 99999, n))
    frame["measured"] = rng.normal(size=n) * np.exp(rng.normal(size=n))
    frame.loc[rng.random(n) < 0.2, "hours"] = np.nan
    return frame


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> likely.Fitted:
    """A small vae over a mixed table."""
    return likely.fit(table(600, 0), "vae", out=tmp_path_factory.mktemp("run") / "table", **OPTIONS)


def same_frame(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_a_table_comes_back_to_the_bit(fitted: likely.Fitted, tmp_path: Path) -> None:
    frame = table(300, 1)
    frame.loc[3, "measured"], frame.loc[4, "measured"] = -0.0, 5e-324
    sizes = fitted.compress(frame, tmp_path / "a.lk", workers=1)
    assert sizes.file == (tmp_path / "a.lk").stat().st_size
    named = ("coded", "plain", "holes", "condition", "side", "head", "model", "frame")
    assert sum(getattr(sizes, name) for name in named) == sizes.file
    back = likely.decompress(tmp_path / "a.lk", run=fitted)
    same_frame(back, frame)
    assert np.array_equal(back["measured"].to_numpy().view(np.int64), frame["measured"].to_numpy().view(np.int64))


def test_what_the_model_never_saw_comes_back(fitted: likely.Fitted, tmp_path: Path) -> None:
    """A new category, values far out of range, holes where none were, text among numbers, an infinite value."""
    frame = table(80, 2).astype(object)
    frame.loc[0, "education"], frame.loc[1, "age"], frame.loc[2, "age"] = "Doctorate", 10**12, None
    frame.loc[5, "sex"], frame.loc[6, "gain"], frame.loc[7, "measured"] = None, -5, np.inf
    path = tmp_path / "odd.csv"
    frame.to_csv(path, index=False)
    text = path.read_text().replace("\n", "\r\n").replace("Bachelors", ' "Bachelors"')
    path.write_bytes(text.encode())
    fitted.compress(path, tmp_path / "odd.lk", workers=1)
    assert likely.decompress(tmp_path / "odd.lk", run=fitted) == path.read_bytes()


def test_the_file_is_as_small_as_the_bound(fitted: likely.Fitted, tmp_path: Path) -> None:
    """On a column-wise discrete table: net length within 0.5 % of the float model's bound, by four draws of it."""
    frame = table(3000, 3).drop(columns=["measured"])
    model = likely.fit(frame, "vae", **OPTIONS)
    sizes = model.compress(frame, tmp_path / "a.lk", workers=1)
    dataset = model.schema.read(frame)
    draws = torch.stack([held_out(model.model, dataset, seed=seed).example_nats for seed in range(8)])
    bound = -draws.mean(0).sum().item() / np.log(2)
    error = draws.std(0).square().sum().sqrt().item() / np.log(2)  # of one draw, which is what the coder makes
    over = sizes.coded_bits - bound
    assert over < 0.002 * bound + 4 * error
    assert over > -0.008 * bound  # beyond 5.5 deviations a latent value costs 28 bits, and not what the normal law says
    assert 8 * (sizes.coded + sizes.holes + sizes.head + sizes.side + sizes.frame) == 8 * sizes.file


def test_what_one_route_gets_wrong_another_finds(
    fitted: likely.Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product that is wrong for some sizes of a batch, in encoding and in decoding alike."""
    rows, by = table(200, 4), Product.by

    def wrong(product: Product, route: Route, ints: Tensor) -> Tensor:
        probed = len(ints) in (4, 256)
        return by(product, route, ints) + (1.0 if route == "native" and not probed else 0.0)

    monkeypatch.setattr(Product, "by", wrong)
    fitted.compress(rows, tmp_path / "a.lk", workers=1, verify=False)
    pd.testing.assert_frame_equal(likely.decompress(tmp_path / "a.lk", run=fitted, workers=1), rows)
    with pytest.raises(Irreproducible, match="decode otherwise when products are computed in another way"):
        fitted.compress(rows, tmp_path / "b.lk", workers=1)
    assert not (tmp_path / "b.lk").exists()


def test_a_file_outlives_an_option_that_its_model_gets_later(
    fitted: likely.Fitted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An option with its default leaves the fingerprint as it was; another value does not."""
    model, before = fitted.model, archive._fingerprint(fitted.model, fitted.schema)
    described = models.describe(model)
    novel = inspect.Parameter("novel", inspect.Parameter.KEYWORD_ONLY, default=(1, 2))
    later = {**type(model).options(), "novel": novel}
    monkeypatch.setattr(type(model), "options", classmethod(lambda _: later))
    for value, same in (([1, 2], True), ([1, 3], False)):
        told = {**described, "options": {**described["options"], "novel": value}}
        monkeypatch.setattr(models, "describe", lambda _, told=told: told)
        assert (archive._fingerprint(model, fitted.schema) == before) == same


def test_what_bits_back_borrows_is_a_small_part_of_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of a model with many latent dimensions are large; those of one that borrows nothing need not be."""
    monkeypatch.setattr(archive, "CHUNK", 2000)
    monkeypatch.setattr(archive, "LEAST_CHUNK", 2000)
    monkeypatch.setattr(archive, "BORROWED", 100)
    bits = np.random.default_rng(0).integers(0, 2, (1500, 64), np.uint8)
    schema = infer_schema(bits)
    for name, options in (("independent", {}), ("vae", {"latent_dim": 40, "hidden": (4,)})):
        stream = io.BytesIO()
        model = models.find(name)(schema.space, **options).eval()
        sizes = archive.compress(model, schema, bits, stream, workers=1, verify=False)
        with Archive(stream.getvalue()) as file:
            stored = [entry.length for entry in file.reader.chunks if entry.kind == "rows"]
        borrowed = sizes.initial / len(stored)
        assert min(stored) > 90 * borrowed
        assert (len(stored) > 4) == (name == "independent") == (borrowed < 10)


@pytest.mark.parametrize("workers", [1, 2])
def test_chunks_rows_and_workers(
    fitted: likely.Fitted, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some rows come back without the other chunks; the number of workers changes no byte."""
    monkeypatch.setattr(archive, "CHUNK", 4000)
    monkeypatch.setattr(archive, "LEAST_CHUNK", 4000)
    monkeypatch.setattr(archive, "BORROWED", 0)
    frame = table(900, 4)
    frame.to_csv(tmp_path / "a.csv", index=False)
    first = tmp_path / "one.lk"
    monkeypatch.setattr(archive, "usable_cores", lambda: 1)
    fitted.compress(tmp_path / "a.csv", first, verify=False)
    with Archive(first) as file:
        assert sum(entry.kind == "rows" for entry in file.reader.chunks) > 2
        assert file.rows == 900
    lines = (tmp_path / "a.csv").read_bytes().splitlines(keepends=True)
    for start, stop in ((0, 900), (0, 1), (899, 900), (200, 650), (5, 5)):
        some = likely.decompress(first, run=fitted, rows=(start, stop), workers=workers)
        assert some == b"".join([lines[0], *lines[1 + start : 1 + stop]])
    with pytest.raises(ValueError, match="rows: expected 0 <= start <= stop <= 900, got 3 and 901"):
        likely.decompress(first, run=fitted, rows=(3, 901))
    assert likely.decompress(first, run=fitted, workers=workers) == (tmp_path / "a.csv").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forks on Linux alone")
def test_workers_that_have_the_source_and_workers_that_are_sent_its_rows_write_the_same(
    fitted: likely.Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "CHUNK", 4000)
    monkeypatch.setattr(archive, "LEAST_CHUNK", 4000)
    monkeypatch.setattr(archive, "BORROWED", 0)
    table(900, 4).to_csv(tmp_path / "a.csv", index=False)
    files = []
    for forks in (True, False):
        monkeypatch.setattr(parallel, "_forks", lambda forks=forks: forks)
        files.append(io.BytesIO())
        archive.compress(fitted.model, fitted.schema, tmp_path / "a.csv", files[-1], verify=False, workers=2)
    assert files[0].getvalue() == files[1].getvalue()
    with Archive(files[0].getvalue()) as file:
        assert sum(entry.kind == "rows" for entry in file.reader.chunks) > 2


@pytest.mark.parametrize("kind", ["digits", "binary", "counts", "lines", "npy", "constant"])
def test_without_a_run_the_file_carries_its_model(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source: object
    if kind == "digits":
        source = np.clip(rng.poisson(6, (200, 8, 8)) + np.arange(8), 0, 16).astype(np.uint8)
    elif kind == "binary":
        source = (rng.random((300, 12)) < np.linspace(0.05, 0.9, 12)).astype(np.int64)
    elif kind == "counts":
        source = rng.negative_binomial(2, 0.05, (200, 6))
    elif kind == "constant":
        source = pd.DataFrame({"a": [3] * 50, "b": ["x"] * 50, "c": [None] * 50})
    elif kind == "npy":
        np.save(tmp_path / "a.npy", rng.integers(0, 5, (100, 7), dtype=np.int16))
        source = tmp_path / "a.npy"
    else:
        (tmp_path / "a.smi").write_text("".join(f"{s}\n" for s in rng.choice(["CCO", "CCN", "c1ccccc1"], 80)))
        source = tmp_path / "a.smi"
    sizes = likely.compress(source, tmp_path / "a.lk", budget=0, workers=1)
    assert sizes.model > 0
    back = likely.decompress(tmp_path / "a.lk")
    if isinstance(source, Path):
        assert back == source.read_bytes()
    elif isinstance(source, pd.DataFrame):
        same_frame(back, source)
    else:
        assert back.dtype == source.dtype and np.array_equal(back, source)


def test_a_folder_of_images_keeps_pixels_names_and_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    for name in ("b/2.png", "b/1.png", "0.png"):
        Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(folder / name)
    likely.compress(folder, tmp_path / "a.lk", budget=0, workers=1)
    likely.decompress(tmp_path / "a.lk", tmp_path / "again")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    assert sorted(str(path.relative_to(tmp_path / "again")) for path in (tmp_path / "again").rglob("*.png")) == names
    for name in names:
        assert np.array_equal(np.asarray(Image.open(folder / name)), np.asarray(Image.open(tmp_path / "again" / name)))


def test_conditional_models_keep_the_condition(tmp_path: Path) -> None:
    frame = table(200, 5).drop(columns=["measured"])
    model = likely.fit(frame, "vae", given=["sex", "age"], **OPTIONS)
    sizes = model.compress(frame, tmp_path / "a.lk", workers=1)
    assert sizes.condition > 0
    same_frame(likely.decompress(tmp_path / "a.lk", run=model), frame)


def test_models_without_a_codec_say_why(tmp_path: Path) -> None:
    model = likely.fit(np.random.default_rng(0).normal(size=(60, 3)), "gaussian", progress=False)
    with pytest.raises(NoCodec, match="resolution"):
        model.compress(np.zeros((2, 3)), tmp_path / "a.lk")
    assert not list(tmp_path.iterdir())
    with pytest.raises(NoCodec, match="density"):
        models.find("vae").tiny(Reals((2,))).codec()


@pytest.mark.parametrize("bits", [4, 7, 9])
def test_packed_models_are_near_the_first(bits: int) -> None:
    """Every weight within half a step of its row's scale, everything else as it was but for 20 bits of precision."""
    torch.manual_seed(0)
    space = Table(columns=(Column("a", "integer"), Column("b", "categorical", levels=3)))
    model = models.find("vae")(space, latent_dim=3, hidden=(32, 32))
    packed = pack(model, models.describe, bits)
    again = unpack(packed, models.build)
    assert pack(again, models.describe, bits)[:8] == packed[:8]
    state = again.state_dict()
    for name, value in model.state_dict().items():
        if value.dim() == 2 and value.numel() >= 256:
            step = value.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            assert ((state[name] - value).abs() <= 0.501 * step).all(), name
        else:
            torch.testing.assert_close(state[name], value, rtol=2.0**-19, atol=0.0)
    for cut in (0, 5, len(packed) // 2, len(packed) - 1):
        with pytest.raises(errors.FormatError):
            unpack(packed[:cut], models.build)


def test_a_forged_model_is_refused_before_it_is_made() -> None:
    with pytest.raises(errors.TooLarge):
        unpack(pack(models.find("vae")(Binary((4,)), latent_dim=2, hidden=(8,)), lambda m: _forged(m)), models.build)


def _forged(model: object) -> dict[str, object]:
    description = models.describe(model)  # type: ignore[arg-type]
    return {**description, "options": {**description["options"], "hidden": [10**9, 10**9]}}


# ------------------------------------------------------------------------------------------------ the wrong file


def test_wrong_models_and_damage_have_their_errors(fitted: likely.Fitted, tmp_path: Path) -> None:
    path, out = tmp_path / "a.lk", tmp_path / "out.csv"
    fitted.compress(table(60, 6), path, workers=1)
    other = likely.fit(table(600, 0), "vae", **{**OPTIONS, "seed": 1})
    with pytest.raises(errors.WrongModel, match="fingerprint"):
        likely.decompress(path, out, run=other)
    whole = path.read_bytes()
    cases = [(b"PK\3\4" + whole[4:], errors.NotLk), (whole[:-20], errors.Truncated), (b"", errors.NotLk)]
    middle = len(whole) // 2
    cases.append((whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :], errors.Damaged))
    for wrong, expected in cases:
        with pytest.raises(expected):
            likely.decompress(wrong, out, run=fitted)
    with pytest.raises(errors.TooLarge, match="max_output"):
        likely.decompress(whole, out, run=fitted, limits=Limits(max_output=100))
    assert not out.exists()


def test_a_run_that_is_gone_is_named(fitted: likely.Fitted, tmp_path: Path) -> None:
    moved = likely.load(fitted.save(tmp_path / "moved"))
    moved.compress(table(30, 7), tmp_path / "a.lk", workers=1)
    (tmp_path / "moved").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"moved, which is not there: say where it is"):
        likely.decompress(tmp_path / "a.lk")
    same_frame(likely.decompress(tmp_path / "a.lk", run=tmp_path / "elsewhere"), table(30, 7))


def test_another_arithmetic_is_refused_before_a_byte_is_decoded(
    fitted: likely.Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted.compress(table(30, 8), tmp_path / "a.lk", workers=1)
    monkeypatch.setattr(Network, "probe", lambda self: b"otherwise")
    with pytest.raises(errors.ForeignArithmetic, match="gives other values on this machine"):
        likely.decompress(tmp_path / "a.lk", run=fitted)


# -------------------------------------------------------------------------------------------------- the command line


def test_the_verbs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    frame = table(120, 9)
    frame.to_csv("a.csv", index=False)
    done = run("compress", "a.csv", "-o", "a.lk", "--budget", "0", "--workers", "1", "--json")
    assert done.code == 0, done.errors
    sizes = json.loads(done.output)
    assert sizes["file"] == Path("a.lk").stat().st_size and sizes["rows"] == 120
    said = run("info", "a.lk")
    assert said.code == 0 and "120 rows" in said.output and "to the byte" in said.output
    assert json.loads(run("info", "a.lk", "--json").output)["embedded_model"] is True
    back = run("decompress", "a.lk")
    assert back.raw == Path("a.csv").read_bytes()
    some = run("decompress", "a.lk", "--rows", "3:5").raw
    lines = Path("a.csv").read_bytes().splitlines(keepends=True)
    assert some == lines[0] + lines[4] + lines[5]
    assert run("decompress", "-", "-o", "again.csv", stdin=Path("a.lk").read_bytes()).code == 0
    assert Path("again.csv").read_bytes() == Path("a.csv").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["decompress", "a.csv"], 1, "expected a file written by likely compress"),
        (["decompress", "gone.lk"], 1, "gone.lk"),
        (["compress", "a.csv", "-o", "b.lk", "--embed"], 2, "without a run the file carries its model"),
        (["compress", "a.csv", "-o", "-", "--json"], 2, "give it a name with -o"),
        (["compress", "gone.csv", "-o", "b.lk"], 1, "gone.csv"),
        (["decompress", "a.csv", "--rows", "7"], 2, "expected rows as A:B"),
        (["decompress", "a.csv", "--max-output", "lots"], 2, "expected a size"),
    ],
)
def test_mistakes_get_one_message(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table(20, 0).to_csv("a.csv", index=False)
    done = run(*arguments)
    assert done.code == code and message in done.errors and "Traceback" not in done.errors
    assert not Path("b.lk").exists()


def test_an_interrupted_compression_leaves_nothing(tmp_path: Path) -> None:
    """SIGINT while the rows are coded: exit code 130, no file and no temporary one."""
    script = (
        "import signal, sys, time, likely.archive as archive\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a parent may have it ignored
        "from likely.cli import run\n"
        "first = archive.encode_rows\n"
        "def slow(*args, **more):\n"
        "    print('coding', flush=True)\n"
        "    time.sleep(60)\n"
        "archive.encode_rows = slow\n"
        "sys.exit(run(['compress', 'a.csv', '-o', 'a.lk', '--budget', '0', '--workers', '1']))\n"
    )
    table(50, 0).to_csv(tmp_path / "a.csv", index=False)
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "coding\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    process.stdout.close()
    assert process.returncode == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv"]


def test_the_schema_of_the_file_reads_what_it_restores(tmp_path: Path) -> None:
    """The embedded schema is the one that the data would be read with."""
    frame = table(60, 3)
    likely.compress(frame, tmp_path / "a.lk", budget=0, workers=1)
    with Archive(tmp_path / "a.lk") as file:
        model, schema = file.model()
    assert schema.space == model.space == infer_schema(frame).space
