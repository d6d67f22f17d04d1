"""Documents as the tests see them: their blocks of code, and a folder of small files for the commands in them."""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import shlex
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd

from likely import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, what follows the language, its text, and the line it starts on."""

    page: Path
    language: str
    about: str
    text: str
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if line.startswith("```") and start is None:
            start = number
        elif line.startswith("```") and start is not None:
            language, _, about = lines[start][3:].partition(" ")
            yield Block(page, language, about, "\n".join(lines[start + 1 : number]) + "\n", start + 2)
            start = None
    assert start is None, f"{page.name}: a block is not closed"


def commands(block: Block) -> list[str]:
    """The command lines of a ``bash`` or ``console`` block that run ``likely``."""
    text = re.sub(r"\\\n\s*", " ", block.text)
    found = []
    for line in text.splitlines():
        line = line.strip().removeprefix("$ ")
        if re.match(r"(likely|cat \S+ \| likely|zcat \S+ \| likely) ", line):
            found.append(line)
    return found


@dataclass(frozen=True)
class Outcome:
    """What a command did: exit code, standard output (bytes and text) and standard error."""

    code: int
    raw: bytes
    errors: str

    @property
    def output(self) -> str:
        return self.raw.decode()


class _Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def run(*arguments: str | Path, stdin: bytes = b"", terminal: bool = False) -> Outcome:
    """Run the command line in this process, with standard output to a pipe or to a terminal."""
    out, err = io.BytesIO(), io.BytesIO()
    streams = {
        "stdin": io.TextIOWrapper(io.BytesIO(stdin)),
        "stdout": (_Terminal if terminal else io.TextIOWrapper)(out, encoding="utf-8", write_through=True),
        "stderr": io.TextIOWrapper(err, encoding="utf-8", write_through=True),
    }
    with contextlib.ExitStack() as stack:
        for name, stream in streams.items():
            stack.enter_context(mock.patch.object(sys, name, stream))
        code = cli.run([str(argument) for argument in arguments])
        for name in ("stdout", "stderr"):
            streams[name].flush()
    return Outcome(code, out.getvalue(), err.getvalue().decode())


def run_line(line: str) -> Outcome:
    """Run a line of a shell: ``[cat FILE |] likely … [| …] [> FILE]``, several joined by ``&&``."""
    last: Outcome | None = None
    for command in re.split(r"\s&&\s", line):
        stages = [shlex.split(stage, comments=True) for stage in re.split(r"\s\|\s", command)]
        stdin = b""
        if stages[0][0] in ("cat", "zcat"):
            content = Path(stages.pop(0)[1]).read_bytes()
            stdin = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
        words = stages[0]
        for redirect, mode in ((">", "wb"), (">>", "ab")):
            if redirect in words:
                place = words.index(redirect)
                target = Path(words[place + 1]).expanduser()
                words = words[:place]
                last = run(*words[1:], stdin=stdin)
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open(mode) as file:
                    file.write(last.raw)
                break
        else:
            last = run(*words[1:], stdin=stdin)
        if last.code:
            break
    assert last is not None
    return last


@contextlib.contextmanager
def short_training(steps: int = 20) -> Iterator[None]:
    """Within the context training by gradient steps takes a few steps, whatever its options say."""
    from likely import api

    whole = api.train

    def short(model, train_set, valid_set, options, **more):  # type: ignore[no-untyped-def]
        least = min(steps, options.steps or steps)
        options = options.with_changes(steps=least, epochs=None, budget=None, evaluate_every=least, batch_size=32)
        return whole(model, train_set, valid_set, options, **more)

    with mock.patch.object(api, "train", short):
        yield


def adult(n: int, seed: int) -> pd.DataFrame:
    """A small table like UCI's Adult: mixed columns that depend on each other."""
    rng = np.random.default_rng(seed)
    age = rng.integers(17, 75, n)
    education = rng.choice(["HS-grad", "Some-college", "Bachelors", "Masters"], n, p=[0.4, 0.3, 0.2, 0.1])
    sex = rng.choice(["Female", "Male"], n)
    hours = np.clip(np.round(40 + rng.normal(0, 8, n) + 4 * (sex == "Male")), 5, 90).astype(int)
    rich = rng.random(n) < 0.1 + 0.3 * np.isin(education, ["Bachelors", "Masters"]) + 0.2 * (age > 40)
    return pd.DataFrame(
        {
            "age": age,
            "workclass": rng.choice(["Private", "State-gov", "Self-emp", "?"], n, p=[0.7, 0.1, 0.1, 0.1]),
            "fnlwgt": rng.integers(20_000, 500_000, n),
            "education": education,
            "sex": sex,
            "hours-per-week": hours,
            "income": np.where(rich, ">50K", "<=50K"),
        }
    )


def write_files(folder: Path) -> None:
    """The files that the documents speak of, small."""
    from PIL import Image
    from scipy import sparse

    rng = np.random.default_rng(0)
    for name, n, seed in (("adult", 200, 0), ("adult_test", 60, 1), ("new", 40, 2), ("data", 120, 3)):
        adult(n, seed).to_csv(folder / f"{name}.csv", index=False)
    holes = adult(40, 4).astype(object)
    holes.iloc[::3, 0] = "?"
    holes.iloc[1::4, 3] = "?"
    holes.to_csv(folder / "holes.csv", index=False)
    (folder / "photos").mkdir()
    for i in range(30):
        colours = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8)
        Image.fromarray(colours).save(folder / "photos" / f"{i:03d}.png")
    smiles = ["CCO", "c1ccccc1", "CC(=O)O", "CCN(CC)CC", "C1CCCCC1", "CC(C)O", "O=C=O", "CNC"]
    (folder / "molecules.smi").write_text("\n".join(rng.choice(smiles, 60)) + "\n", encoding="utf-8")
    sparse.save_npz(folder / "counts.npz", sparse.csr_matrix(rng.poisson(0.5, (80, 12))))
    images = rng.integers(0, 2, (40, 8, 8), dtype=np.uint8) * 255
    for name in ("train", "t10k"):
        header = struct.pack(">HBB3I", 0, 8, 3, *images.shape)
        (folder / f"{name}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + images.tobytes()))
    np.savez(folder / "arrays.npz", x=rng.normal(size=(60, 3)))
