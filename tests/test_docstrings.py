"""Every example in a docstring of the package runs and prints what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import likely

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(likely.__path__, "likely.")
    if not module.name.endswith("__main__")  # it is the command itself
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", ["likely", *MODULES])
def test_examples(name: str) -> None:
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=FLAGS, verbose=False)
    for example in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name), name):
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_public_functions_and_classes_have_a_docstring() -> None:
    bare = []
    for name in MODULES:
        module = importlib.import_module(name)
        for key, value in vars(module).items():
            ours = getattr(value, "__module__", None) == name and getattr(value, "__qualname__", None) == key
            if ours and not key.startswith("_") and not (value.__doc__ or "").strip():
                bare.append(f"{name}.{key}")
    assert not bare
