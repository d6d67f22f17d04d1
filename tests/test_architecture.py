"""The shape of the package, read from its source: imports go down, units have one home, nothing is unpickled."""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "likely"

#: DESIGN section 3, from the faces down to the ground; a layer may import those on later lines, and itself.
LAYERS = [
    {"__main__"},
    {"cli", "sklearn"},
    {"compression"},
    {"api"},
    {"archive"},
    {"report"},
    {"training"},
    {"evaluation"},
    {"checks"},
    {"models"},
    {"coding"},
    {"inference"},
    {"diffusion"},
    {"bijections"},
    {"distributions"},
    {"networks"},
    {"optim"},
    {"data"},
    {"exact"},
    {"contract"},
    {"noise"},
    {"processor", "memory"},
    {"units"},
]
#: A face may use another face.
FACES = {"__main__", "cli", "sklearn"}

RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
FILES = sorted(SOURCE.rglob("*.py"))
RANDOM = {
    "bernoulli",
    "multinomial",
    "normal",
    "poisson",
    "rand",
    "rand_like",
    "randint",
    "randn",
    "randn_like",
    "randperm",
}


def layer_of(path: Path) -> str:
    """Name of the layer that a file belongs to; the package's own ``__init__`` has none."""
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Full names of all imported modules, wherever they stand, and their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: expected an absolute import"
            names = [alias.name for alias in node.names] if node.module == "likely" else [None]
            for name in names:
                yield (f"{node.module}.{name}" if name else str(node.module)), node.lineno


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def called(call: ast.Call) -> str:
    """Dotted name of what is called, such as ``torch.load``."""
    return ast.unparse(call.func)


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    own = layer_of(path)
    if own == "__init__":
        return  # the package offers its faces, lazily
    assert own in RANK, f"{own} is no layer of DESIGN section 3"
    for name, line in imports(parsed(path)):
        package, _, rest = name.partition(".")
        if package != "likely" or rest == "__version__" or (not rest and own in FACES):
            continue
        target = rest.split(".")[0]
        assert target in RANK, f"line {line}: {name} is no layer of DESIGN section 3"
        allowed = RANK[target] >= RANK[own] or {own, target} <= FACES
        assert allowed, f"line {line}: {own} may not import {target}, which stands above it"


def test_layers_are_real() -> None:
    found = {layer_of(path) for path in FILES} - {"__init__"}
    assert {"contract", "noise", "units", "models", "checks", "evaluation", "training", "data", "api"} <= found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_bits_are_made_in_one_place(path: Path) -> None:
    if path == SOURCE / "units.py":
        return
    ln2 = (math.log(2.0), 1.0 / math.log(2.0))
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, float):
            near = any(abs(node.value - constant) < 1e-3 for constant in ln2)
            assert not near, f"line {node.lineno}: {node.value} looks like ln 2 or its inverse: use likely.units"
        if isinstance(node, ast.Call):
            function = called(node).rpartition(".")[2]
            argument = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            wrong = function == "log2" or (function == "log" and argument == 2)
            assert not wrong, f"line {node.lineno}: {ast.unparse(node)}: use likely.units"
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            assert name.upper() != "LN2", f"line {node.lineno}: {name}: use the functions of likely.units"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_is_unpickled(path: Path) -> None:
    tree = parsed(path)
    for name, line in imports(tree):
        unsafe = name.split(".")[0] in {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
        assert not unsafe, f"line {line}: {name}"
    for call in calls(tree):
        function = called(call)
        if function in ("torch.load", "torch.serialization.load"):
            assert keyword(call, "weights_only") == "True", f"line {call.lineno}: torch.load without weights_only=True"
        if function in ("np.load", "numpy.load", "np.save", "np.savez", "np.savez_compressed"):
            allowed = function != "np.load" and not function.endswith("save")
            refused = keyword(call, "allow_pickle") == "False"
            assert refused or allowed, f"line {call.lineno}: {function} without allow_pickle=False"
        assert keyword(call, "allow_pickle") != "True", f"line {call.lineno}: allow_pickle=True"
        assert not function.endswith("read_pickle"), f"line {call.lineno}: {function}"


def test_every_file_says_what_it_holds() -> None:
    vague = {"utils", "util", "helpers", "helper", "base", "common", "misc", "tools", "registry", "factory"}
    named = [path for path in FILES if path.stem in vague or path.parent.name in vague]
    assert not named, f"names that say nothing: {named}"
    undocumented = [path for path in FILES if not ast.get_docstring(parsed(path))]
    assert not undocumented, f"files without a docstring: {undocumented}"


@pytest.mark.parametrize("path", sorted((SOURCE / "models").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_model_is_one_class_below_model(path: Path) -> None:
    classes = [node for node in parsed(path).body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    models = [node for node in classes if "Model" in [ast.unparse(b) for b in node.bases]]
    assert len(models) == 1, f"expected one public subclass of Model, got {[node.name for node in models]}"
    heirs = [node.name for node in classes if models[0].name in [ast.unparse(b) for b in node.bases]]
    assert not heirs, f"expected nothing to inherit from {models[0].name}, got {heirs}"


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if layer_of(path) in {"models", "distributions", "bijections", "diffusion", "networks"}],
    ids=lambda path: str(path.relative_to(SOURCE)),
)
def test_models_draw_only_from_the_noise_they_are_given(path: Path) -> None:
    tree = parsed(path)
    for node in ast.walk(tree):  # ``tiny`` and ``__init__`` make initial weights, which belong to the global state
        if isinstance(node, ast.FunctionDef) and node.name in ("tiny", "__init__", "reset_parameters"):
            node.body = [ast.Pass()]
    for call in calls(tree):
        module, _, function = called(call).rpartition(".")
        if module in ("torch", "np.random", "random") and (function in RANDOM or module != "torch"):
            assert keyword(call, "generator"), f"line {call.lineno}: {ast.unparse(call)} draws from a global generator"
