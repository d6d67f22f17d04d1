"""Text in chunks, one sequence a line, SMILES and FASTA."""

import gzip

import pytest
import torch

from likely.contract import Tokens
from likely.data import DataError, Schema, infer_schema


def test_text_is_bytes_and_comes_back_whole(tmp_path):
    content = ("Grüße, World! \N{SNOWMAN}\n" * 37).encode()
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    schema = infer_schema(path, length=64)
    assert schema.space == Tokens(length=64, vocab=257)
    data = schema.read(path)
    data.space.validate(data.x)
    assert bytes(data.x.flatten()[: len(content)].tolist()) == content
    assert (data.x.flatten()[len(content) :] == 256).all() and len(data) == -(-len(content) // 64)
    schema.write(data.x, tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_bytes() == content
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(content))
    assert torch.equal(schema.read(tmp_path / "c.txt.gz").x, data.x)
    assert Schema.from_toml(schema.to_toml()) == schema
    with pytest.raises(DataError, match=r"expected at least 2 chunks of 2000 bytes .*pass length="):
        infer_schema(path, length=2000)


def test_one_sequence_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("CCO\nc1ccccc1\n\nC#N\n")
    schema = infer_schema(path, lines=True)
    assert schema.form.alphabet == tuple("#1CNOc") and schema.space == Tokens(length=8, vocab=7)
    data = schema.read(path)
    assert data.x[0].tolist() == [2, 2, 4, 6, 6, 6, 6, 6] and (data.x[2] == 6).all()
    assert schema.to_user(data.x) == ["CCO", "c1ccccc1", "", "C#N"]
    schema.write(data.x, tmp_path / "b.txt")
    assert (tmp_path / "b.txt").read_text() == path.read_text()
    assert Schema.from_toml(schema.to_toml()) == schema
    assert torch.equal(schema.read(["CCO", "C#N"]).x, data.x[[0, 3]])
    assert infer_schema(["CCO", "C#N"]).space == Tokens(length=3, vocab=5)
    wider = infer_schema(path, lines=True, length=20, alphabet="#1CNOcF")
    assert wider.space == Tokens(length=20, vocab=8)


@pytest.mark.parametrize(
    "text, message",
    [
        ("CCO\nCCF\n", r"new\.txt, line 2, symbol 3: expected one of '#1CNOc', got 'F'"),
        ("CCO\nCCCCCCCCC\n", r"new\.txt, line 2: expected at most 8 symbols, got 9; fit with length=9"),
    ],
)
def test_sequences_that_do_not_belong(tmp_path, text, message):
    (tmp_path / "a.txt").write_text("CCO\nc1ccccc1\nC#N\n")
    (tmp_path / "new.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        infer_schema(tmp_path / "a.txt", lines=True).read(tmp_path / "new.txt")


def test_smiles_files_may_have_names(tmp_path):
    (tmp_path / "a.smi").write_text("CCO ethanol\nC#N\thydrogen cyanide\n")
    schema = infer_schema(tmp_path / "a.smi")
    assert schema.to_user(schema.read(tmp_path / "a.smi").x) == ["CCO", "C#N"]
    assert "before the first blank" in schema.describe()


def test_fasta(tmp_path):
    (tmp_path / "a.fasta").write_text(">one first\nACDE\nFG\n>two\nAC-\n;comment\n>three\nG\n")
    schema = infer_schema(tmp_path / "a.fasta")
    data = schema.read(tmp_path / "a.fasta")
    assert schema.to_user(data.x) == ["ACDEFG", "AC-", "G"]
    schema.write(data.x, tmp_path / "b.fasta")
    assert torch.equal(schema.read(tmp_path / "b.fasta").x, data.x)
    (tmp_path / "bad.fasta").write_text("ACDE\n>one\nA\n")
    with pytest.raises(DataError, match=r"bad\.fasta, line 1: expected a FASTA title"):
        infer_schema(tmp_path / "bad.fasta")


def test_a_sample_ends_before_its_first_padding():
    schema = infer_schema(["ab", "ba"])
    assert schema.to_user(torch.tensor([[0, 2], [2, 1], [1, 1]])) == ["a", "", "bb"]
    with pytest.raises(DataError, match="expected at least 2 sequences to learn from, got 1"):
        infer_schema(["ab"])
    with pytest.raises(DataError, match="got only empty lines"):
        infer_schema(["", ""])
