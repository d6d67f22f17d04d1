"""The documents keep their word: their code runs, their links lead somewhere, their lists are complete."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

import likely.models
from documents import PAGES, ROOT, blocks, commands, run_line, short_training, write_files
from likely.cli import cli

VERBS = sorted(cli.commands)


def _page_of(verb: str) -> Path:
    name = "models-and-info" if verb in ("models", "info", "completion") else verb
    return ROOT / "docs" / f"{name}.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks marked ``python`` run in one namespace; lines of ``bash`` blocks that begin with ``likely`` run as well.

    ``python file=PATH`` is a file for the package's folder of models.  Training is cut to a few steps.
    """
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    files = tmp_path / "new_models"
    files.mkdir()
    monkeypatch.setattr(likely.models, "__path__", [*likely.models.__path__, str(files)])
    namespace: dict[str, object] = {"__name__": f"document_{page.stem}"}
    with short_training():
        if page.parent.name == "docs" and page.stem not in ("install", "fit", "index"):
            _fit_what_pages_speak_of(page)
        for block in blocks(page):
            where = f"{page.name}:{block.line}"
            if block.language == "python" and block.about.startswith("file=src/likely/models/"):
                (files / Path(block.about.removeprefix("file=")).name).write_text(block.text, encoding="utf-8")
            elif block.language == "python":
                with torch.random.fork_rng(devices=[]):
                    exec(compile("\n" * (block.line - 1) + block.text, str(page), "exec"), namespace)
            elif block.language in ("bash", "console"):
                for line in commands(block):
                    outcome = run_line(line)
                    assert outcome.code == 0, f"{where}: {line}\n{outcome.errors}"


def _fit_what_pages_speak_of(page: Path) -> None:
    """The runs that the page uses, as the page on ``fit`` makes them."""
    text = page.read_text(encoding="utf-8")
    for name, line in {
        "adult": "likely fit adult.csv --out runs/adult --test-fraction 0.2",
        "cond": "likely fit adult.csv --out runs/cond --given age,sex",
        "digits": "likely fit digits --out runs/digits --test-fraction 0.2 hidden=32",
        "mnist": "likely fit train-images-idx3-ubyte.gz --out runs/mnist hidden=32",
    }.items():
        if f"runs/{name}" in text:
            outcome = run_line(line)
            assert outcome.code == 0, outcome.errors


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in anchors, f"{page.name}: {target}"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_with_all_its_options(verb: str) -> None:
    page = _page_of(verb)
    text = page.read_text(encoding="utf-8")
    assert re.search(rf"^#+ .*\blikely\b.*\b{verb}\b", text, re.MULTILINE | re.IGNORECASE), f"{page.name}: {verb}"
    for parameter in cli.commands[verb].params:
        if parameter.param_type_name == "option":
            for flag in [*parameter.opts, *parameter.secondary_opts]:
                assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), f"{page.name}: {flag} of {verb}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_of_commands_exist(page: Path) -> None:
    """Also in blocks that do not run: a command of the documents names no flag that its verb does not have."""
    text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
    for verb, rest in re.findall(r"\blikely (\w+)((?: [^\n`#|>]+)?)", text):
        if verb in cli.commands:
            known = {flag for p in cli.commands[verb].params for flag in [*p.opts, *p.secondary_opts]} | {"--help"}
            used = set(re.findall(r"(?<=\s)(--[a-z-]+|-[a-z])(?=[\s=\]]|$)", rest))
            assert used <= known, f"{page.name}: likely {verb} {used - known}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem == "index" or f"({page.name})" in index, page.name


def test_table_of_models_is_complete() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("## Models", 1)[1].split("\n## ", 1)[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == likely.models.names()


def test_tree_shows_the_folder() -> None:
    """The tree of the README names every tracked entry of the root, of the package and of its models, and no other."""
    (tree,) = [block.text for block in blocks(ROOT / "README.md") if block.about == "tree"]
    shown, stack = set(), []
    for line in tree.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        stack = [*stack[:depth], name.rstrip("/")]
        shown.add("/".join(stack))
        assert line.split(maxsplit=1)[1:], f"{name}: nothing is said of it"
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    there: set[str] = set()
    for file in listed.stdout.splitlines():
        parts = Path(file).parts
        if not (ROOT / file).exists():
            continue
        there.add(parts[0])
        if parts[:2] == ("src", "likely"):
            there |= {"src/likely", "/".join(parts[:3])}
            if parts[2] == "models" and not parts[3].startswith("_"):
                there.add("/".join(parts[:4]))
    there -= {"src/likely/__init__.py", "src/likely/__main__.py", "src/likely/py.typed", ".gitignore", "src"}
    assert shown - {"src"} == there
