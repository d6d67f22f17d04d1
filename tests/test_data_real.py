"""Files as their makers wrote them; needs the folder that LIKELY_DATA names."""

import gzip
import io
import lzma
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from likely.contract import Counts, Integers, Reals, Tokens
from likely.data import DataError, infer_schema

FOLDER = os.environ.get("LIKELY_DATA")
pytestmark = pytest.mark.skipif(FOLDER is None, reason="LIKELY_DATA names no folder of data")
DATA = Path(FOLDER or ".")


def kinds(schema):
    return "".join(
        {"real": "r", "integer": "i", "categorical": "c", "binary": "b"}[c.kind] for c in schema.form.columns
    )


@pytest.mark.parametrize(
    "name, rows, expected",
    [
        ("adult-train", 32561, "iciciccccbiiicb"),
        ("titanic", 891, "bibriircccbccbb"),
        ("penguins", 344, "ccrriib"),
        ("mpg", 398, "ririiricc"),
        ("diamonds", 53940, "rcccrrirrr"),
        ("german", 1000, "cicciccicciciccicbbbb"),
    ],
)
def test_tables_are_written_as_they_were_read(name, rows, expected, tmp_path):
    path = DATA / "tables" / f"{name}.csv.gz"
    schema = infer_schema(path)
    data = schema.read(path)
    data.space.validate(data.x)
    assert len(data) == rows
    assert kinds(schema) == expected
    schema.write(data.x, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_bytes().rstrip() == gzip.decompress(path.read_bytes()).rstrip()


def test_the_test_half_of_adult_has_full_stops_after_its_labels():
    schema = infer_schema(DATA / "tables" / "adult-train.csv.gz")
    assert schema.form.dialect.blanks and not schema.form.dialect.header and schema.form.missing[0] == "?"
    holes = schema.read(DATA / "tables" / "adult-train.csv.gz").x.isnan().sum(0)
    assert holes.nonzero().flatten().tolist() == [1, 6, 13] and holes[[1, 6, 13]].tolist() == [1836, 1843, 583]
    test = DATA / "tables" / "adult-test.csv.gz"
    with pytest.raises(DataError, match=r"line 1, column 'column_15': .*got '<=50K\.'; pass strip_suffix='\.'"):
        schema.read(test)
    assert len(schema.read(test, strip_suffix=".")) == 16281


def test_arrays_and_images():
    mnist = infer_schema(DATA / "mnist" / "t10k-images-idx3-ubyte.gz", given="label", binarise="dynamic")
    data = mnist.read(DATA / "mnist" / "t10k-images-idx3-ubyte.gz")
    assert data.x.shape == (10000, 1, 28, 28) and data.bernoulli_scale == 255
    assert data.condition[:5, 0].tolist() == [7, 2, 1, 0, 4]
    faces = infer_schema(DATA / "freyface" / "freyface.npz")
    assert faces.space == Integers((1, 28, 20), 256)
    thyroid = infer_schema(DATA / "adbench" / "38_thyroid.npz", given="y")
    assert thyroid.space == Reals((6,)) and thyroid.form.given[0].categories == ("0", "1")
    assert infer_schema(DATA / "spikes" / "reach_counts.npz").space == Counts((155,))
    with pytest.raises(DataError, match="expected images of one size, got 512×768"):
        infer_schema(DATA / "kodak")
    assert infer_schema(DATA / "kodak", size=(16, 24)).read(DATA / "kodak").x.shape == (24, 3, 16, 24)


def test_sequences():
    shakespeare = DATA / "text" / "tiny_shakespeare.txt.gz"
    schema = infer_schema(shakespeare)
    assert schema.space == Tokens(length=256, vocab=257)
    x = schema.read(shakespeare).x
    content = gzip.decompress(shakespeare.read_bytes())
    assert np.array_equal(x.flatten().numpy()[: len(content)], np.frombuffer(content, np.uint8))
    smiles = infer_schema(DATA / "zinc_smiles" / "valid.txt.gz", lines=True)
    x = smiles.read(DATA / "zinc_smiles" / "valid.txt.gz").x
    assert len(x) == 24445 and smiles.space.vocab == 33
    assert smiles.to_user(x[:1]) == ["CCN(Cc1ccc(OC)c(OC)c1)C(=O)c1ccsc1"]
    test = DATA / "zinc_smiles" / "test.txt.gz"
    with pytest.raises(DataError, match=r"line 468: expected at most 100 symbols, got 105; fit with length=105"):
        smiles.read(test)
    symbols = "".join(smiles.form.alphabet)
    wider = infer_schema(DATA / "zinc_smiles" / "valid.txt.gz", lines=True, length=110, alphabet=symbols + "7")
    assert len(wider.read(test)) == 5000


def test_counts_of_cells(tmp_path):
    sparse = pytest.importorskip("scipy.sparse")
    path = DATA / "singlecell_mixology" / "sc_celseq2_5cl_p1.counts_genes_by_cells.npy.xz"
    genes_by_cells = np.load(io.BytesIO(lzma.decompress(path.read_bytes())), allow_pickle=False)
    counts = genes_by_cells.T[:, :2000]
    sparse.save_npz(tmp_path / "a.npz", sparse.csr_matrix(counts))
    schema = infer_schema(tmp_path / "a.npz")
    assert schema.space == Counts((2000,))
    assert torch.equal(schema.read(tmp_path / "a.npz").x.double(), torch.from_numpy(counts.astype(float)))
    assert infer_schema(path).space == Counts((genes_by_cells.shape[1],))
