"""Data larger than memory: chunks, memory maps and their reuse; memory does not grow with the rows."""

import gzip
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from likely.data import DataError, csvfile, infer_schema
from likely.data.store import Store

ROWS = 12_000


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A file with 12,000 rows of five columns."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("large") / "a.csv"
    columns = zip(rng.integers(0, 99, ROWS), rng.normal(size=ROWS).round(3), rng.choice(["a", "b", ""], ROWS),
                  rng.integers(0, 2, ROWS), rng.random(ROWS))  # fmt: skip
    path.write_text("i,r,c,b,f\n" + "".join(",".join(map(str, row)) + "\n" for row in columns))
    return path


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Chunks of 2,000 rows, so that there are many."""
    monkeypatch.setattr(csvfile, "_CELLS", 10_000)


def mapped(tensor):
    """Whether a tensor lies in a memory-mapped .npy file (asked of the operating system)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("needs /proc")
    for line in maps.read_text().splitlines():
        low, high = (int(address, 16) for address in line.split(None, 1)[0].split("-"))
        if low <= tensor.data_ptr() < high:
            return ".npy" in line
    return False


def same(a, b):
    return torch.equal(a.nan_to_num(-7e77), b.nan_to_num(-7e77))


def test_a_file_past_the_limit_is_memory_mapped_and_equal(table):
    schema = infer_schema(table)
    small, large = schema.read(table), schema.read(table, memory_limit=1000)
    assert len(small) == ROWS and same(small.x, large.x)
    assert not mapped(small.x) and mapped(large.x)


def test_the_cache_is_used_again_only_for_the_same_file_schema_and_options(table, tmp_path):
    copy = tmp_path / "b.csv"
    copy.write_bytes(table.read_bytes())
    schema = infer_schema(copy)
    cache = tmp_path / "cache"
    first = schema.read(copy, cache=cache, memory_limit=1000)
    (file,) = cache.glob("*.npy")
    written = file.stat().st_mtime_ns
    again = schema.read(copy, cache=cache, memory_limit=1000)
    assert same(first.x, again.x) and file.stat().st_mtime_ns == written and len(list(cache.iterdir())) == 2
    plain = np.load(file, mmap_mode="r", allow_pickle=False)
    assert plain.shape == (ROWS, 5), "the cache is an ordinary .npy file"
    first.x[0, 0] = 1e9
    assert plain[0, 0] != 1e9, "writing to a batch leaves the file alone"
    copy.write_text(table.read_text() + "5,0.5,a,1,0.5\n")
    assert len(schema.read(copy, cache=cache, memory_limit=1000)) == ROWS + 1
    infer_schema(copy, given=["b"]).read(copy, cache=cache, memory_limit=1000)
    assert len(list(cache.glob("*.npy"))) == 3


def test_an_error_in_the_middle_leaves_no_file(table, tmp_path):
    schema = infer_schema(table)
    bad = tmp_path / "bad.csv"
    bad.write_text(table.read_text() + "5,0.5,a,7,0.5\n")
    with pytest.raises(DataError, match=rf"bad\.csv, line {ROWS + 2}, column 'b'"):
        schema.read(bad, cache=tmp_path / "cache", memory_limit=1000)
    assert not list((tmp_path / "cache").iterdir())


def test_memory_is_bounded_whatever_the_number_of_rows(table, tmp_path, monkeypatch):
    monkeypatch.setattr(csvfile, "_CELLS", 2_000)
    header, *rows = table.read_text().splitlines(keepends=True)[:1001]

    def peak(times):
        path = tmp_path / "a.csv.gz"
        path.write_bytes(gzip.compress((header + "".join(rows) * times).encode(), 1))
        tracemalloc.start()
        data = infer_schema(path).read(path, memory_limit=10_000)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(data) == 1000 * times and mapped(data.x)
        return most

    # The shorter file is longer than the sample from which the dialect is detected.
    assert peak(18) < 1.1 * peak(9)


def test_conditions_share_the_file(table):
    schema = infer_schema(table, given=["c", "b"])
    data = schema.read(table, memory_limit=1000)
    whole = infer_schema(table).read(table)
    assert same(data.x, whole.x[:, [0, 1, 4]]) and same(data.condition, whole.x[:, [2, 3]])


def test_parquet_is_streamed(table, tmp_path):
    pd = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    pd.read_csv(table).to_parquet(tmp_path / "a.parquet", row_group_size=1000)
    schema = infer_schema(tmp_path / "a.parquet")
    data = schema.read(tmp_path / "a.parquet", memory_limit=1000)
    assert mapped(data.x) and same(data.x, infer_schema(table).read(table).x)


def test_an_npy_file_is_mapped_as_it_lies(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (500, 9, 8, 3)).astype(np.uint8)
    np.save(tmp_path / "a.npy", array)
    schema = infer_schema(tmp_path / "a.npy")
    data = schema.read(tmp_path / "a.npy")
    assert mapped(data.x) and data.x.dtype == torch.uint8
    assert np.array_equal(data.x[17].permute(1, 2, 0).numpy(), array[17])


@pytest.mark.parametrize("dtype", ["uint16", "int64", "float32", ">f8"])
def test_arrays_that_are_converted_pass_through_a_file(tmp_path, dtype):
    array = np.random.default_rng(0).integers(0, 999, (300, 7)).astype(dtype) - (500 if dtype == "int64" else 0)
    np.savez_compressed(tmp_path / "a.npz", a=array)
    schema = infer_schema(tmp_path / "a.npz", memory_limit=100)
    data = schema.read(tmp_path / "a.npz", memory_limit=100, cache=tmp_path / "cache")
    assert mapped(data.x)
    assert np.array_equal(schema.to_user(data.x), array)


def test_a_store_takes_chunks_of_any_size():
    rng = np.random.default_rng(0)
    for limit in (0, 10_000, 10**9):
        store, chunks = Store((3, 2), np.float32, limit=limit), []
        for rows in (1, 0, 700, 13):
            chunks.append(rng.normal(size=(rows, 3, 2)).astype(np.float32))
            store.append(chunks[-1])
        assert np.array_equal(store.finish().numpy(), np.concatenate(chunks))
    assert Store((3,), np.int16).finish().shape == (0, 3)
