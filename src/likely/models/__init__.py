"""The models, one file a paper: the file's name is the model's name, and nothing needs registering.

A file ``likely/models/NAME.py`` defines exactly one public subclass of :class:`~likely.contract.Model`.  Files are
imported only when their model is asked for.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from likely.contract import Model, Space, space_from_json
from likely.data.preprocessing import Preprocessed

_DESCRIPTION = frozenset({"model", "space", "condition", "options"})
_WRAPPER = "preprocessed"  # a Model that is no family of its own, in likely.data


def names() -> list[str]:
    """Names of all models, sorted.

    >>> "gaussian" in names()
    True
    """
    files = [file for folder in __path__ for file in Path(folder).glob("*.py")]
    return sorted(file.stem for file in files if not file.stem.startswith("_"))


def find(name: str) -> type[Model]:
    """The model class of this name.

    >>> find("gaussian").__name__
    'Gaussian'

    Raises:
        ValueError: no model has this name; the message gives the nearest name and all names.
    """
    if name == _WRAPPER:
        return Preprocessed
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"model: no model {name!r}{hint} (models: {', '.join(names())})")
    module = importlib.import_module(f"{__name__}.{name}")
    found = [
        value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Model) and value.__module__ == module.__name__ and key[0] != "_"
    ]
    assert len(found) == 1, f"likely/models/{name}.py must define one public Model, defines {len(found)}"
    return found[0]


def describe(model: Model) -> dict[str, Any]:
    """All that is needed to build an untrained copy of ``model``, as JSON values; :func:`build` is the inverse.

    Models among the options (a prior, a wrapped model) are described in the same way.

    >>> from likely.contract import Reals
    >>> description = describe(find("gaussian")(Reals((3,)), rank=1))
    >>> description["model"], description["options"]["rank"]
    ('gaussian', 1)
    """
    return {
        "model": model.name(),
        "space": model.space.to_json(),
        "condition": None if model.condition is None else model.condition.to_json(),
        "options": {name: _to_json(value) for name, value in model.config.items()},
    }


def build(description: Mapping[str, Any]) -> Model:
    """An untrained model from :func:`describe`.

    >>> from likely.contract import Reals
    >>> model = find("gaussian")(Reals((3,)), rank=1)
    >>> describe(build(describe(model))) == describe(model)
    True

    Raises:
        ValueError: the description lacks an entry, or names a model or an option that does not exist.
    """
    lacking = sorted(_DESCRIPTION - set(description))
    if lacking:
        raise ValueError(f"description of a model: expected entries {', '.join(sorted(_DESCRIPTION))}; lacks {lacking}")
    options = {name: _from_json(value) for name, value in description["options"].items()}
    space = space_from_json(description["space"])
    condition = None if description["condition"] is None else space_from_json(description["condition"])
    if description["model"] == _WRAPPER:
        return Preprocessed.from_options(space, condition, **options)
    return find(description["model"])(space, condition, **options)


def _to_json(value: Any) -> Any:
    if isinstance(value, Model):
        return describe(value)
    if isinstance(value, Space):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"option of a model: expected a JSON value or a Model, got {type(value).__name__}")


def _from_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        if set(value) == _DESCRIPTION:
            return build(value)
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return value
