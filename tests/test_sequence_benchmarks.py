"""Benchmarks and recipes of sequences on a little text: they run, and their numbers are those of the parts."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
WORDS = b"First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n\n"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of data as the scripts expect it, and their own folders among the modules."""
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tiny_shakespeare.txt.gz").write_bytes(gzip.compress(WORDS * 90))
    (tmp_path / "zinc_smiles").mkdir()
    for name in ("valid", "test"):
        (tmp_path / "zinc_smiles" / f"{name}.txt.gz").write_bytes(gzip.compress(b"CCO\nc1ccccc1\nCC(=O)O\n" * 20))
    monkeypatch.setenv("LIKELY_DATA", str(tmp_path))
    for folder in ("benchmarks", "papers"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    return tmp_path


def test_text_beside_its_rivals(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import text

    monkeypatch.setattr(text, "MODEL", {"width": 16, "layers": 1, "ngrams": (2,), "ngram_bits": 8})
    out = data / "found"
    monkeypatch.setattr(sys, "argv", ["text.py", "--cpu-seconds", "0.2", "--run", str(data / "run"), "--out", str(out)])
    text.main()
    rows = {row["name"]: row for row in json.loads(out.with_suffix(".json").read_text())["rows"]}
    ours = rows["transformer"]
    assert ours["running"] > 0 and ours["alone"] < ours["file"] < ours["alone"] + 0.5  # the lanes of two chunks
    assert rows["5-gram, Kneser–Ney"]["after"] < rows["3-gram, Kneser–Ney"]["after"] < 8
    assert all(row["after"] < row["alone"] for name, row in rows.items() if name.startswith(("xz", "zstd")))
    assert "| transformer |" in out.with_suffix(".md").read_text()
    for rivals in ("compressors", "ngrams"):
        monkeypatch.setattr(text, rivals, lambda train_text, test: [])
    text.main()  # a finished run is evaluated again
    again = json.loads(out.with_suffix(".json").read_text())["rows"][-1]
    assert again["running"] == ours["running"] and again["steps"] == ours["steps"]


def test_molecules(data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import molecules

    monkeypatch.setattr(molecules, "MODEL", {"width": 16, "layers": 1})
    monkeypatch.setattr(sys, "argv", ["molecules.py", "--cpu-seconds", "0.1", "--draws", "5"])
    molecules.main()
    assert "60 to learn from, 60 to test" in capsys.readouterr().out


def test_masked_diffusion_beside_autoregression(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import md4_text

    for name in ("NETWORK", "TRAINING"):
        monkeypatch.setattr(md4_text, name, dict(getattr(md4_text, name)))
    monkeypatch.setattr(sys, "argv", ["md4_text.py", "--dry-run"])
    md4_text.main()
    said = capsys.readouterr().out
    assert "| transformer | exact |" in said and "| masked_diffusion | lower bound |" in said


def test_the_cache_draws_what_is_drawn_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import torch

    import sampling_cache

    model = sampling_cache.Transformer(sampling_cache.Tokens(9, 5), width=16, layers=2).double().eval()
    torch.nn.init.normal_(model.layers.blocks[1].attention.output.weight)
    with_it, without = (draw(model, 20) for draw in (sampling_cache.with_cache, sampling_cache.without_cache))
    assert torch.equal(with_it, without) and len(with_it.unique(dim=0)) > 10
