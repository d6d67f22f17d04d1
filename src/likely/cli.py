"""The command line: ``likely VERB``, a thin skin over :mod:`likely.api`.

Nothing heavy is imported before a verb runs, so that ``likely --help`` and completion answer at once.  What a user can
mend is said in one message and never with a traceback; ``--debug`` shows the traceback.
"""

from __future__ import annotations

import collections.abc
import difflib
import inspect
import json
import os
import sys
import textwrap
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import likely
from likely.memory import keep_memory

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from likely.api import Fitted
    from likely.contract import Model

#: Exit codes.
OK, FAULT, USAGE, DIVERGED, INTERRUPTED = 0, 1, 2, 3, 130

Command = TypeVar("Command", bound=Callable[..., Any])


# --------------------------------------------------------------------------------------------------------------
# Manners: one message, an exit code, no traceback
# --------------------------------------------------------------------------------------------------------------


def main() -> None:
    """The command ``likely``."""
    keep_memory()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code.

    >>> run(["completion", "tcsh"])
    2
    """
    try:
        with _spoken_warnings():
            code = cli.main(list(arguments), prog_name="likely", standalone_mode=False)
            sys.stdout.flush()
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return INTERRUPTED
    except BrokenPipeError:
        return _closed_pipe()
    except SystemExit as stop:
        code = stop.code
    return code if isinstance(code, int) else OK


class _Verbs(click.Group):
    """The group of all verbs: lists them in the order of use and turns errors into messages."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        command = super().get_command(ctx, name)
        if command is None and not ctx.resilient_parsing:
            near = difflib.get_close_matches(name, self.commands, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"no verb {name!r}{hint} (verbs: {', '.join(self.commands)})")
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, SystemExit):
            raise
        except BrokenPipeError:
            raise SystemExit(_closed_pipe()) from None
        except KeyboardInterrupt as interrupt:
            _complain(str(interrupt) or "interrupted")
            raise SystemExit(INTERRUPTED) from None
        except Exception as error:
            if ctx.meta.get("likely.debug"):
                traceback.print_exc()
            raise SystemExit(_explain(error)) from None


def _explain(error: Exception) -> int:
    """Say on standard error what went wrong, and return the exit code."""
    if isinstance(error, FloatingPointError):
        _complain(f"error: {error}")
        return DIVERGED
    if isinstance(error, (ValueError, OSError, ImportError)) or type(error).__name__ == "NoCodec":
        _complain(f"error: {error}")
        return FAULT
    out_of_memory = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)  # PyTorch's
    if isinstance(error, MemoryError) or out_of_memory:
        _complain(f"error: out of memory; use a smaller --batch-size ({error})")
        return FAULT
    traceback.print_exception(error)
    _complain("error: this is a fault of likely and not of your data; please report it with the lines above")
    return FAULT


def _complain(text: str) -> None:
    click.echo(f"likely: {text}", err=True)


def _closed_pipe() -> int:
    """Whoever read our output has had enough: end quietly, and keep Python from complaining at its exit."""
    with suppress(OSError, ValueError):  # standard output may be no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return FAULT


@contextmanager
def _spoken_warnings() -> Iterator[None]:
    """Within the context warnings are one line on standard error."""
    before = warnings.showwarning

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        _complain(f"warning: {message}")

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = before


# --------------------------------------------------------------------------------------------------------------
# Kinds of arguments
# --------------------------------------------------------------------------------------------------------------


def parse_value(text: str) -> Any:
    """The value of ``key=value``: JSON where it is JSON (or Python's True, False, None), numbers between commas as a
    list, else the text itself.

    >>> [parse_value(text) for text in ("64", "1e-3", "[256,256]", "256,256", "true", "None", "mixture")]
    [64, 0.001, [256, 256], [256, 256], True, None, 'mixture']
    """
    words = {"True": True, "False": False, "None": None}
    if text in words:
        return words[text]
    for candidate in (text, f"[{text}]" if "," in text else text):
        try:
            return json.loads(candidate)
        except json.JSONDecodeError:
            continue
    return text


def parse_options(pairs: Iterable[str]) -> dict[str, Any]:
    """``key=value`` pairs as a dictionary; a dotted key reaches into an option that is itself a mapping.

    >>> parse_options(["latent_dim=8", "prior_options.components=50"])
    {'latent_dim': 8, 'prior_options': {'components': 50}}
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        names = key.split(".")
        if not equals or not all(name.isidentifier() for name in names):
            raise click.UsageError(f"expected an option as key=value (such as latent_dim=64), got {pair!r}")
        place = options
        for name in names[:-1]:
            place = place.setdefault(name, {})
            if not isinstance(place, dict):
                raise click.UsageError(f"{pair!r}: {name} was given a value before")
        if names[-1] in place:
            raise click.UsageError(f"{key} is given twice")
        place[names[-1]] = parse_value(value)
    return options


def suit_options(options: dict[str, Any], constructors: Iterable[Any]) -> dict[str, Any]:
    """Options with values of the types that the constructors declare: one number where a list is due becomes a list.

    >>> class Tower:
    ...     def __init__(self, hidden: Sequence[int] | None = None, rate: float = 0.0): ...
    >>> suit_options({"hidden": 256, "rate": 1}, [Tower])
    {'hidden': [256], 'rate': 1}
    >>> suit_options({"rate": "fast"}, [Tower])
    Traceback (most recent call last):
        ...
    click.exceptions.UsageError: rate: expected a number, got 'fast'
    """
    declared: dict[str, Any] = {}
    for constructor in constructors:
        declared |= typing.get_type_hints(constructor.__init__)
    return {name: _suited(name, value, declared.get(name, Any)) for name, value in options.items()}


def _suited(name: str, value: Any, declared: Any) -> Any:
    kinds = _kinds(declared)
    if Any in kinds or any(_is_a(value, kind) for kind in kinds):
        return value
    if list in kinds and any(_is_a(value, kind) for kind in (int, float)):
        return [value]
    said = {int: "a whole number", float: "a number", bool: "true or false", str: "text", list: "a list",
            dict: f"{name}.KEY=VALUE", type(None): "null"}  # fmt: skip
    expected = " or ".join(said[kind] for kind in kinds if kind in said)
    raise click.UsageError(f"{name}: expected {expected}, got {json.dumps(value) if value is None else repr(value)}")


def _is_a(value: Any, kind: Any) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, int):
        return kind in (int, float)
    return kind in (float, str, list, dict, type(None)) and isinstance(value, kind)


def _kinds(declared: Any) -> list[Any]:
    """The JSON types that a type hint admits; ``Any`` for what is none of them."""
    if declared is Any:
        return [Any]
    origin = typing.get_origin(declared)
    if origin in (typing.Union, types.UnionType):
        return [kind for part in typing.get_args(declared) for kind in _kinds(part)]
    if origin is typing.Literal:
        return [str]
    kind = origin or declared
    if kind in (bool, int, float, str, type(None)):
        return [kind]
    if isinstance(kind, type) and issubclass(kind, collections.abc.Mapping):
        return [dict]
    if isinstance(kind, type) and issubclass(kind, collections.abc.Sequence):
        return [list]
    return [] if isinstance(kind, type) else [Any]


def parse_seconds(text: str) -> float:
    """A duration in seconds: ``90``, ``90s``, ``5m``, ``1.5h``, ``1h30m``.

    >>> parse_seconds("90"), parse_seconds("5m"), parse_seconds("1h30m")
    (90.0, 300.0, 5400.0)
    """
    import re

    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s?)?", text.strip())
    try:
        if match is None or not any(match.groups()):
            raise ValueError
        hours, minutes, seconds = (float(part or 0) for part in match.groups())
    except ValueError:
        raise click.BadParameter(f"expected a duration such as 90s, 5m or 1h30m, got {text!r}") from None
    return 3600 * hours + 60 * minutes + seconds


def parse_bytes(text: str) -> int:
    """A size in bytes: ``500``, ``64K``, ``300M``, ``8G`` (powers of 1024).

    >>> parse_bytes("64K"), parse_bytes("8G")
    (65536, 8589934592)
    """
    units = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
    number, unit = text.strip().upper().removesuffix("B").removesuffix("I"), ""
    if number and number[-1] in units:
        number, unit = number[:-1], number[-1]
    if not number.isascii() or not number.isdigit():
        raise click.BadParameter(f"expected a size such as 300M or 8G, got {text!r}")
    return int(number) << units[unit]


def parse_rows(text: str) -> tuple[int, int]:
    """A range of rows, from … to before …: ``1000:2000``.

    >>> parse_rows("10:20")
    (10, 20)
    """
    start, colon, stop = text.partition(":")
    if not colon or not start.strip().isdigit() or not stop.strip().isdigit():
        raise click.BadParameter(f"expected rows as A:B (such as 1000:2000), got {text!r}")
    return int(start), int(stop)


def _pairs(values: Sequence[str], name: str) -> dict[str, str]:
    """``column=value`` pairs with the value as it was typed."""
    found: dict[str, str] = {}
    for pair in values:
        column, equals, value = pair.partition("=")
        if not equals or not column:
            raise click.UsageError(f"{name}: expected column=value, got {pair!r}")
        if column in found:
            raise click.UsageError(f"{name}: column {column!r} is given twice")
        found[column] = value
    return found


def _listed(values: Sequence[str]) -> list[str] | None:
    """Names that were given one by one or between commas; None if there are none."""
    return [name.strip() for value in values for name in value.split(",") if name.strip()] or None


def _model_names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    """For completion: the files of the models, without importing one."""
    files = (Path(__file__).parent / "models").glob("*.py")
    return sorted(file.stem for file in files if file.stem.startswith(incomplete) and not file.stem.startswith("_"))


# --------------------------------------------------------------------------------------------------------------
# Options that several verbs share
# --------------------------------------------------------------------------------------------------------------


def _debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta["likely.debug"] = True


def _threads(ctx: click.Context, param: click.Parameter, value: int | None) -> None:
    if value is not None and not ctx.resilient_parsing:
        import torch

        torch.set_num_threads(value)


def _into(group: str, convert: Callable[[Any], Any] | None = None) -> Callable[..., None]:
    """A callback that puts an option, where it is given, into a group of options; :func:`_group` takes them out."""

    def store(ctx: click.Context, param: click.Parameter, value: Any) -> None:
        if value is not None and value != ():
            assert param.name is not None
            ctx.meta.setdefault(f"likely.{group}", {})[param.name] = convert(value) if convert else value

    return store


def _group(group: str) -> dict[str, Any]:
    """The options of a group that the user gave."""
    return dict(click.get_current_context().meta.get(f"likely.{group}", {}))


def _together(*parts: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(function: Any) -> Any:
        for part in reversed(parts):
            function = part(function)
        return function

    return apply


class _Grouped(click.Option):
    """An option that help shows under the title of its group."""

    title = ""


def _option(group: str, flag: str, help: str, convert: Callable[[Any], Any] | None = None, **more: Any) -> Any:
    """An option that goes into a group; see :func:`_into`."""
    cls = {"read": _ReadOption, "training": _TrainingOption}[group]
    names = (flag, more.pop("dest")) if "dest" in more else (flag,)
    return click.option(*names, cls=cls, expose_value=False, callback=_into(group, convert), help=help, **more)


class _ReadOption(_Grouped):
    title = "How the data are read"


class _TrainingOption(_Grouped):
    title = "How the model is trained"


DEBUG = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_debug, help="Show the traceback of an error."
)
THREADS = click.option(
    "--threads", type=click.IntRange(min=1), expose_value=False, callback=_threads, help="CPU threads to use."
)
SEED = click.option("--seed", type=int, default=0, show_default=True, help="Seed of everything random.")
JSON = click.option("--json", "as_json", is_flag=True, help="Write JSON on standard output.")
QUIET = click.option("--quiet", is_flag=True, help="Show no progress.")
BATCH = click.option("--batch-size", type=click.IntRange(min=1), help="Examples at a time; changes no value.")
RUN = click.argument("run", metavar="RUN")
DATA = click.argument("data", metavar="DATA")
OPTIONAL_DATA = click.argument("data", metavar="[DATA]", required=False)

_TAB = {r"\t": "\t", "tab": "\t"}


def _size(text: str) -> list[int]:
    """Height and width of images: ``32`` or ``32x48``."""
    try:
        numbers = [int(part) for part in text.lower().split("x")]
        if len(numbers) > 2:
            raise ValueError
    except ValueError:
        raise click.BadParameter(f"expected a size such as 32 or 32x48 (height x width), got {text!r}") from None
    return numbers * 2 if len(numbers) == 1 else numbers


_FORMAT = _option("read", "--format", "What the file is: csv, parquet, npy, npz, idx, images, text, lines, fasta.")
_DELIMITER = _option("read", "--delimiter", "What stands between cells; tab for a tab.", lambda v: _TAB.get(v, v))
_ENCODING = _option("read", "--encoding", "Encoding of a text file, such as latin-1.")
_HEADER = _option("read", "--header/--no-header", "Whether the first line has the column names.", default=None)
_MISSING = _option("read", "--missing", "Spelling of a missing cell; repeatable.", list, multiple=True)
_SUFFIX = _option("read", "--strip-suffix", "Text to remove from the end of every cell that ends with it.")
_KEY = _option("read", "--key", "Which array of an .npz file.")
_MORE = _option(
    "read", "--read", "Any other option of the reader, as KEY=VALUE; see docs/data.md.", parse_options,
    multiple=True, dest="more", metavar="KEY=VALUE",
)  # fmt: skip

#: How a file is read: options of the readers by the same name.
READER = _together(
    _FORMAT,
    _DELIMITER,
    _ENCODING,
    _HEADER,
    _option("read", "--names", "Column names of a file without a header: a,b,c.", lambda v: _listed([v])),
    _MISSING,
    _SUFFIX,
    _option("read", "--ignore", "Column to set aside; repeatable, or a,b,c.", _listed, multiple=True),
    _option("read", "--keep", "Column to model though it looks like an identifier.", _listed, multiple=True),
    _KEY,
    _option("read", "--size", "Size of images: 32 or 32x48 (height x width).", _size),
    _option("read", "--binarise", "How grey values become binary; see docs/data.md.", parse_value),
    _MORE,
)

#: How a further file differs from the one that was fitted.
READING = _together(_FORMAT, _DELIMITER, _ENCODING, _HEADER, _MISSING, _SUFFIX, _KEY, _MORE)

#: How a model is trained: options of ``likely.fit`` by the same name.
TRAINING = _together(
    _option("training", "--steps", "Length in optimiser steps.", type=int),
    _option("training", "--epochs", "Length in passes over the data.", type=float),
    _option("training", "--budget", "Length in time: 90s, 5m, 1h30m.", type=parse_seconds, metavar="TIME"),
    _option("training", "--batch-size", "Examples in a batch.", type=int),
    _option("training", "--learning-rate", "Highest learning rate.", type=float),
    _option("training", "--optimizer", "adamw, adam, sgd, ...", metavar="NAME"),
    _option("training", "--device", "cpu, cuda, mps, ... [default: the fastest found]", metavar="NAME"),
    _option("training", "--precision", "float32, bfloat16 or auto.", metavar="NAME"),
)


def _reading() -> dict[str, Any]:
    """The options of the reader that the user gave."""
    read = _group("read")
    for key, value in read.pop("more", {}).items():
        if key in read:
            raise click.UsageError(f"--read {key}: --{key} is given as well")
        read[key] = value
    return read


def _output(help: str) -> Callable[[Any], Any]:
    return click.option("-o", "--out", metavar="FILE", default="-", help=f"{help} [default: standard output]")


class _Verb(click.Command):
    """A verb whose examples are shown as they are written."""

    examples = ""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections.setdefault(getattr(parameter, "title", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in self.examples.strip().splitlines():
                formatter.write(f"  {line.strip()}\n")


def _verb(short: str, examples: str, *parts: Callable[[Any], Any]) -> Callable[[Callable[..., Any]], click.Command]:
    """A verb: its line in the list of verbs, its examples, its arguments and options."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        command = cli.command(cls=_Verb, short_help=short)(_together(*parts, DEBUG)(function))
        assert isinstance(command, _Verb)
        command.examples = examples
        return command

    return decorate


# --------------------------------------------------------------------------------------------------------------
# Output
# --------------------------------------------------------------------------------------------------------------


def _say(text: str) -> None:
    """One line on standard error: what a person wants to know and a pipe does not."""
    click.echo(text, err=True)


def _print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2))


def _print(*things: Any) -> None:
    """Text and rich tables on standard output; as wide as the terminal, or 120 columns in a pipe."""
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for thing in things:
        console.print(thing, markup=False)


class _Stages:
    """Progress of an evaluation, one line on a terminal's standard error."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        end = "\n" if done >= total else ""
        sys.stderr.write(f"\r\x1b[K{stage}: {done:,} of {total:,}{end}")
        sys.stderr.flush()


def _counter(quiet: bool) -> _Stages | None:
    return _Stages() if sys.stderr.isatty() and not quiet else None


def _is_compressed(path: str) -> bool:
    """Whether a path is a ``.lk`` file, by its first bytes."""
    if not Path(path).is_file():
        return False
    with Path(path).open("rb") as file:
        return file.read(4) == b"\x89lky"


def _write_frame(frame: pd.DataFrame, out: str, as_json: bool = False) -> None:
    """Write a DataFrame as CSV (compressed by suffix), Parquet or JSON (a list of records)."""
    if as_json:
        text = frame.to_json(orient="records", double_precision=15, indent=2)
        if out == "-":
            click.echo(text)
        else:
            Path(out).write_text(text + "\n", encoding="utf-8")
    elif out == "-":
        frame.to_csv(sys.stdout, index=False, lineterminator="\n")
    elif out.endswith((".parquet", ".pq")):
        frame.to_parquet(out)
    else:
        frame.to_csv(out, index=False, lineterminator="\n")


def _write_array(values: np.ndarray, out: str) -> None:
    """Write an array of shape (n, columns) as .npy, .npz, Parquet or CSV with columns z1, z2, …"""
    import numpy as np

    if out.endswith(".npy"):
        np.save(out, values, allow_pickle=False)
    elif out.endswith(".npz"):
        np.savez_compressed(out, z=values)
    else:
        from likely.data.errors import pandas_for

        pd = pandas_for("a table of codes (unlike .npy and .npz)")
        flat = values.reshape(len(values), -1)
        _write_frame(pd.DataFrame(flat, columns=[f"z{j}" for j in range(1, flat.shape[1] + 1)]), out)


# --------------------------------------------------------------------------------------------------------------
# Parts of the verbs
# --------------------------------------------------------------------------------------------------------------


def _load(run: str) -> Fitted:
    import likely.api as api

    fitted = api.load(run)
    if fitted.record["state"] != "finished":
        _complain(f"warning: {run} was not trained to its end, its best weights so far are used; `likely resume {run}`")
    return fitted


def _check_terminal(fitted: Fitted, out: str) -> None:
    """Keep the bytes of an array file off a terminal."""
    from likely.contract import Table, Tokens

    if out == "-" and sys.stdout.isatty() and not isinstance(fitted.schema.space, (Table, Tokens)):
        raise click.UsageError("expected -o FILE (.npy, .npz, or a folder or sheet of images): arrays are no text")


@contextmanager
def _resumable(run: str) -> Iterator[None]:
    """Within the context an interruption ends with the command that goes on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        text = str(interrupt) or "interrupted"
        if any((Path(run) / "state").glob("step-*.json")):
            text += f"\ngo on with: likely resume {run}"
        raise KeyboardInterrupt(text) from None


def _conclude(fitted: Fitted, run: str, as_json: bool) -> None:
    """What a person wants to know after a fit; of several processes under ``torchrun`` the first one says it."""
    if os.environ.get("RANK", "0") != "0":
        return
    if as_json:
        _print_json(fitted.info())
    else:
        click.echo(f"{fitted.model.title()} in {run}: held out {_held_out(fitted)}")
        _say(f"next: likely evaluate {run}; likely report {run} -o report.html")


def _show_schema(data: str, file: str, given: list[str] | None, schema: str | None, overwrite: bool) -> None:
    from likely.data import infer_schema

    if file != "-" and Path(file).exists() and not overwrite:
        raise ValueError(f"--show: {file} exists; pass --overwrite to replace it")
    found = infer_schema(data, schema=schema, given=given, **_reading())
    if file == "-":
        click.echo(found.to_toml(), nl=False)
        return
    click.echo(found.describe())
    Path(file).write_text(found.to_toml(), encoding="utf-8")
    _say(f"wrote {file}; edit it and pass it on: likely fit {data} --schema {file} --out RUN")


def _held_out(fitted: Fitted) -> str:
    """The held-out bound of a fit as text, or that there is none."""
    from likely.training.progress import describe_nats
    from likely.units import bits

    valid = (fitted.record.get("results") or {}).get("valid")
    if not valid:
        return "none measured"
    space, error = fitted.schema.space, valid["standard_error"]
    text = describe_nats(valid["nats"], space)
    if error is not None:
        text += f" (± {error:.2f} nats, {bits(error):.3f} bits per example)" if "bits" in text else f" (± {error:.2f})"
    return f"{text}, {valid['kind']}, {valid['n']:,} examples"


def _print_info(fitted: Fitted) -> None:
    """What a person wants to know of a run; ``--json`` has all."""
    record = fitted.info()
    options = [f"{name}={json.dumps(value)}" for name, value in record["options"].items() if value is not None]
    examples = dict(record["examples"])
    parts = ", ".join(f"{examples[name]:,} {name}" for name in examples if name != "all" and examples[name])
    results = record["results"] or {}
    steps = f"{results['steps']:,} steps (ended by {results['stopped']}), " if results.get("steps") else ""
    lines = {
        "model": f"{record['model']}, {record['parameters']:,} parameters",
        "options": " ".join(options) or "none",
        "data": f"{record['source'] or 'in memory'}: {examples['all']:,} examples, {parts}",
        "held out": _held_out(fitted),
        "training": f"{steps}{results['seconds']:.0f} s on {results['device']}, seed {record['seed']}"
        if results
        else f"not finished: `likely resume {fitted.folder}` goes on",
        "made": f"{record['created']}, likely {record['likely']}, torch {record['torch']}",
    }
    for name, text in lines.items():
        click.echo(f"{name:<10}{text}")
    click.echo(f"schema\n{textwrap.indent(fitted.schema.describe(), '  ')}")


def _describe_model(model: type[Model]) -> dict[str, Any]:
    lines = (model.__doc__ or "").strip().splitlines()
    return {
        "name": model.name(),
        "summary": lines[0] if lines else "",
        "training": "closed form" if model.closed_form else "gradient steps",
        "conditional": model.conditional,
        "spaces": [space.__name__ for space in model.spaces],
    }


def _describe_options(cls: type, parameters: Mapping[str, inspect.Parameter]) -> list[dict[str, Any]]:
    """Name, default and help of every option, from the signature and the docstring."""
    texts = _documented(inspect.getdoc(cls) or "")
    options = []
    for name, parameter in parameters.items():
        default = parameter.default
        if default is parameter.empty or not isinstance(default, (bool, int, float, str, list, tuple, dict)):
            default = {} if "factory" in type(default).__name__.lower() else None
        options.append({"name": name, "default": default, "help": texts.get(name, "")})
    return options


def _documented(doc: str) -> dict[str, str]:
    """Entries of the ``Args:`` section of a docstring, each in one line.

    >>> _documented("Title.\\n\\nArgs:\\n    a: first,\\n        and more.\\n    b: second.\\n\\nRaises:\\n    c: no.")
    {'a': 'first, and more.', 'b': 'second.'}
    """
    import re

    section = re.search(r"^Args:\n((?:[ \t]+.*\n?|\n)*)", doc, re.MULTILINE)
    texts: dict[str, str] = {}
    name = ""
    for line in section[1].splitlines() if section else ():
        start = re.match(r" {4}(\w+): (.*)", line)
        if start:
            name, texts[start[1]] = start[1], start[2].strip()
        elif name and line.strip():
            texts[name] += " " + line.strip()
    return {name: re.sub(r":\w+:`~?([^`]*)`", r"\1", text).replace("``", "") for name, text in texts.items()}


# --------------------------------------------------------------------------------------------------------------
# Verbs
# --------------------------------------------------------------------------------------------------------------


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(likely.__version__, message="likely %(version)s")
def cli() -> None:
    """Fit a likelihood to your data, then score, sample, impute, embed, compress and evaluate with it.

    \b
      likely fit adult.csv --out runs/adult            # schema inferred, trained, kept in a folder
      likely evaluate runs/adult adult_test.csv        # nats and bits per row, beside baselines and xz
      likely score runs/adult new.csv -o scores.csv    # log-likelihood per row, and which columns made it unlikely
      likely impute runs/adult holes.csv -o filled.csv
      likely sample runs/adult -n 1000 --seed 0 -o synthetic.csv
      likely report runs/adult -o report.html
      likely compress runs/adult adult_test.csv -o adult.lk && likely decompress adult.lk -o same.csv

    DATA is a path (CSV, Parquet, .npy, .npz, IDX, text, FASTA, a folder of images), "-" for standard input, or the
    name of a set that scikit-learn carries (digits, iris, wine, ...).  `likely VERB --help` explains a verb.

    Exit codes: 0 done, 1 a fault in data, files or options, 2 wrong usage, 3 a number is not finite, 130 interrupted.
    """


@_verb(
    "Fit a model to data.",
    """
    likely fit adult.csv --out runs/adult                           # the best model of a short list, in a minute
    likely fit adult.csv --out runs/better --budget 10m             # the same with more time
    likely fit adult.csv --show adult.toml                          # only look at the schema; edit it, then:
    likely fit adult.csv --schema adult.toml --out runs/adult
    likely fit adult.csv --out runs/cond --given age,sex            # p(other columns | age, sex)
    likely fit digits --out runs/digits latent_dim=32 hidden=256,256 prior=mixture prior_options.components=50
    likely fit photos/ --size 32 --out runs/photos --budget 15m network=conv
    likely fit data.csv --model gaussian --out runs/gaussian        # exact, in closed form
    zcat data.csv.gz | likely fit - --out runs/data
    """,
    DATA,
    click.argument("options", metavar="[KEY=VALUE]...", nargs=-1),
    click.option("--model", default="auto", show_default=True, metavar="NAME", shell_complete=_model_names,
                 help="The model; `likely models` lists them.  auto: the best of a short list for tables, else vae."),
    click.option("-o", "--out", metavar="RUN", help="Folder of the run (required, unless --show)."),
    click.option("--given", multiple=True, metavar="COLUMN", help="Column to condition on; repeatable, or a,b,c."),
    click.option("--weights", metavar="COLUMN", help="Column with the weights of the rows; it is not modelled."),
    click.option("--schema", type=click.Path(), metavar="FILE", help="TOML file whose entries override the inferred."),
    click.option("--show", metavar="FILE", help="Show the inferred schema, write it to FILE (TOML), and do no more."),
    click.option("--valid-fraction", type=float, default=0.1, show_default=True,
                 help="Share of the examples held out to choose the weights and to stop early."),
    click.option("--test-fraction", type=float, default=0.0, show_default=True,
                 help="Share of the examples kept aside for `likely evaluate RUN`."),
    SEED,
    TRAINING,
    THREADS,
    READER,
    click.option("--overwrite", is_flag=True, help="Replace a run that is in the folder."),
    QUIET,
    JSON,
)  # fmt: skip
def fit(
    data: str,
    options: tuple[str, ...],
    model: str,
    out: str | None,
    given: tuple[str, ...],
    weights: str | None,
    schema: str | None,
    show: str | None,
    valid_fraction: float,
    test_fraction: float,
    seed: int,
    overwrite: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Fit a model to DATA and keep it in the folder RUN.

    The schema (what each column is, which spellings mean missing, how the file is written) is inferred; --show shows
    it, --schema overrides it.  Options of the model and of the training follow as KEY=VALUE: values are JSON or text,
    lists may be written 256,256, and a dot reaches into an option (prior_options.components=50).

    Without --model, and without options of one, a table gets the model that is best on held-out rows: half of --budget
    (60s where nothing is said) goes into a search over a short list, the other half into the winner.

    Training stops when the held-out bound stops improving, or at --steps, --epochs or --budget.  Ctrl-C keeps what was
    done: `likely resume RUN` goes on to the same bits as a run that was never stopped.
    """
    chosen = parse_options(options)
    for name, value in _group("training").items():
        if name in chosen:
            raise click.UsageError(f"{name} is given twice, as --{name.replace('_', '-')} and as {name}=...")
        chosen[name] = value
    if show is not None:
        _show_schema(data, show, _listed(given), schema, overwrite)
        return
    if out is None:
        raise click.UsageError("expected --out RUN, the folder in which the run is kept (such as --out runs/first)")
    import likely.api as api
    from likely.models import find
    from likely.training import TrainOptions

    chosen = suit_options(chosen, [TrainOptions, find("vae" if model == "auto" else model)])
    with _resumable(out):
        fitted = api.fit(
            data,
            model,
            out=out,
            given=_listed(given),
            weights=weights,
            schema=schema,
            read=_reading(),
            seed=seed,
            valid_fraction=valid_fraction,
            test_fraction=test_fraction,
            overwrite=overwrite,
            progress=not quiet,
            **chosen,
        )
    _conclude(fitted, out, as_json)


@_verb(
    "Go on with an interrupted fit.",
    """
    likely resume runs/adult
    likely resume runs/adult moved/adult.csv         # the data have moved
    """,
    RUN,
    OPTIONAL_DATA,
    THREADS,
    QUIET,
    JSON,
)
def resume(run: str, data: str | None, quiet: bool, as_json: bool) -> None:
    """Go on with a fit that was interrupted or killed, from its last checkpoint.

    On the same machine with the same number of threads the result equals, to the bit, that of a run that was never
    stopped.  DATA is needed only where the file has moved or was standard input.  A finished run is left as it is.
    """
    import likely.api as api

    with _resumable(run):
        fitted = api.resume(run, data, progress=not quiet)
    _conclude(fitted, run, as_json)


@_verb(
    "Measure on held-out data: nats and bits.",
    """
    likely evaluate runs/adult adult_test.csv
    likely evaluate runs/adult                       # the examples that `fit` kept aside
    likely evaluate runs/mnist t10k-images-idx3-ubyte.gz --samples 5000
    likely evaluate runs/adult adult_test.csv --json > evaluation.json
    """,
    RUN,
    OPTIONAL_DATA,
    click.option("--samples", type=click.IntRange(min=1), metavar="K",
                 help="Add the importance-weighted bound of K samples (for models with latent variables)."),
    click.option("--baselines/--no-baselines", default=True, help="Compare with independent columns and a Gaussian."),
    click.option("--weights", metavar="COLUMN", help="Column of DATA with the weights of its rows."),
    click.option("--codecs/--no-codecs", default=True, help="Compare with zlib, xz, zstd (and PNG, WebP for images)."),
    BATCH,
    SEED,
    THREADS,
    READING,
    JSON,
)  # fmt: skip
def evaluate(
    run: str,
    data: str | None,
    samples: int | None,
    baselines: bool,
    weights: str | None,
    codecs: bool,
    batch_size: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Measure a fitted model on held-out DATA: nats and bits with standard errors, and of what kind they are.

    Without DATA the examples are taken that `fit` kept aside (--test-fraction), else those that it held out to stop
    early.  Beside the model stand two simple baselines and what general compressors need for the same examples.
    """
    fitted = _load(run)
    evaluation = fitted.evaluate(
        data,
        samples=samples,
        seed=seed,
        baselines=baselines,
        classic=codecs,
        weights=weights,
        batch_size=batch_size,
        read=_reading(),
        progress=_Stages() if sys.stderr.isatty() else None,
    )
    if as_json:
        _print_json(evaluation.to_json())
    else:
        _print(evaluation.sentence(), "", evaluation.table(), *evaluation.notes())


@_verb(
    "Log-likelihood of every example.",
    """
    likely score runs/adult new.csv -o scores.csv
    likely score runs/adult new.csv | sort -t, -k4 -g | head      # the most unusual rows first
    cat new.csv | likely score runs/adult - --json
    """,
    RUN,
    DATA,
    _output("File to write, CSV or Parquet."),
    click.option("--columns/--no-columns", default=True, help="Say which columns made a row unlikely (tables)."),
    SEED,
    THREADS,
    READING,
    JSON,
)
def score(run: str, data: str, out: str, columns: bool, seed: int, as_json: bool) -> None:
    """Score every example of DATA: its log-likelihood, how rare so low a value is, and what made it unlikely.

    One line an example, in the order of DATA: nats (larger is more usual), bits where the data have bits, the tail
    probability (share of held-out examples that are as unlikely or more so: small means unusual), and for tables the
    columns that cost most.
    """
    from likely.units import code_length_bits

    fitted = _load(run)
    scores = fitted.scores(data, seed=seed, columns=columns, read=_reading())
    frame = scores.to_frame()
    frame.insert(1, "kind", scores.kind)
    if fitted.schema.space.has_probability:
        frame.insert(1, "bits", code_length_bits(scores.nats))
    _write_frame(frame, out, as_json)


@_verb(
    "Draw new examples.",
    """
    likely sample runs/adult -n 1000 --seed 0 -o synthetic.csv
    likely sample runs/adult -n 5                                       # to the terminal
    likely sample runs/cond -n 100 --where age=30 --where sex=Female
    likely sample runs/digits -n 64 -o digits.npz
    likely sample runs/faces -n 64 --temperature 0.7 -o faces.png       # of a flow
    likely sample runs/plays -n 3 --prefix "ROMEO:"                      # of texts
    """,
    RUN,
    click.option("-n", "n", type=click.IntRange(min=1), required=True, metavar="N", help="How many examples."),
    click.option("--where", multiple=True, metavar="COLUMN=VALUE", help="Value of a given column; repeatable."),
    click.option("--temperature", type=click.FloatRange(min=0.0), default=1.0, show_default=True, metavar="T",
                 help="Below 1: more usual examples, less diverse; flows only."),
    click.option("--prefix", metavar="TEXT", help="What every text or sequence begins with."),
    _output("File to write; its suffix says the format."),
    SEED,
    THREADS,
)  # fmt: skip
def sample(
    run: str, n: int, where: tuple[str, ...], temperature: float, prefix: str | None, out: str, seed: int
) -> None:
    """Draw N examples from a fitted model, in the form of the data it was fitted to.

    A table comes back with the same columns, spellings and resolution.  The same seed gives the same examples.
    """
    fitted = _load(run)
    _check_terminal(fitted, out)
    pairs = _pairs(where, "--where")
    broken = fitted.write_samples(out, n, seed=seed, where=pairs, temperature=temperature, prefix=prefix)
    for rule, rows in broken.items():
        shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
        _complain(f"note: {len(rows):,} of {n:,} rows break {rule}, which all fitted rows keep (rows {shown})")


@_verb(
    "Fill missing cells.",
    """
    likely impute runs/adult holes.csv -o filled.csv
    likely impute runs/adult holes.csv --draws 5 --seed 0 -o filled.csv   # filled-1.csv ... filled-5.csv
    """,
    RUN,
    DATA,
    click.option("--draws", type=click.IntRange(min=0), default=0, show_default=True, metavar="M",
                 help="Number of random completions (multiple imputation); 0 fills in the single best guess."),
    _output("File to write."),
    SEED,
    THREADS,
    READING,
)  # fmt: skip
def impute(run: str, data: str, draws: int, out: str, seed: int) -> None:
    """Fill the missing cells of DATA; cells that are known come back as they were.

    The single best guess is the mean or the most probable category given the known cells.  It has too little spread
    for inference: for standard errors draw several completions (--draws 5), analyse each and pool the results.
    """
    fitted = _load(run)
    _check_terminal(fitted, out)
    files = fitted.write_imputed(data, out, draws=draws, seed=seed, read=_reading())
    if len(files) > 1:
        _say("wrote " + ", ".join(map(str, files)))


@_verb(
    "Embed examples.",
    """
    likely transform runs/adult adult.csv -o embedding.csv
    likely transform runs/digits digits -o embedding.npy
    """,
    RUN,
    DATA,
    _output("File to write: CSV, Parquet, .npy or .npz."),
    THREADS,
    READING,
)
def transform(run: str, data: str, out: str) -> None:
    """Embed every example of DATA: the mean of its latent vector, the same on every call."""
    _write_array(_load(run).transform(data, read=_reading()), out)


@_verb(
    "Write an HTML page on a fitted model.",
    """
    likely report runs/adult -o report.html
    likely report runs/adult adult_test.csv -o report.html
    """,
    RUN,
    OPTIONAL_DATA,
    click.option("-o", "--out", metavar="FILE", required=True, help="The HTML file to write."),
    THREADS,
)
def report(run: str, data: str | None, out: str) -> None:
    """Write one self-contained HTML page on a fitted model.

    What was fitted, the learning curve, the parts of the bound, samples beside data, reconstructions, a map of the
    embedding and, for tables, every column real against sampled.
    """
    _load(run).report(out, data)
    _say(f"wrote {out}")


@_verb(
    "List the models and their options.",
    """
    likely models
    likely models vae                    # its options, with defaults
    likely models training               # the options that every trained model shares
    """,
    click.argument("name", metavar="[NAME]", required=False, shell_complete=_model_names),
    JSON,
)
def models(name: str | None, as_json: bool) -> None:
    """List the models, or the options of one model with their defaults."""
    from likely.models import find, names

    if name is None:
        rows = [_describe_model(find(one)) for one in names()]
        if as_json:
            _print_json(rows)
            return
        from rich.table import Table

        table = Table("model", "what it is", "fitted by", "data")
        for row in rows:
            table.add_row(row["name"], row["summary"], row["training"], ", ".join(row["spaces"]))
        _print(table, "`likely models NAME` shows the options of one; `likely models training` those of the training.")
        return
    if name == "training":
        from likely.training import TrainOptions

        taken = dict(inspect.signature(TrainOptions).parameters)
        del taken["seed"]  # --seed of fit
        listed = _describe_options(TrainOptions, taken)
        title = "Options of the training"
        record: dict[str, Any] = {"name": name, "options": listed}
    else:
        cls = find(name)
        record = _describe_model(cls) | {"options": _describe_options(cls, cls.options())}
        listed, title = record["options"], f"{name}: {record['summary']}"
    if as_json:
        _print_json(record)
        return
    from rich.table import Table

    table = Table("option", "default", "what it does", title=title, title_justify="left")
    for option in listed:
        table.add_row(option["name"], json.dumps(option["default"]), option["help"])
    _print(table)


@_verb(
    "Compress data without loss.",
    """
    likely compress runs/adult adult_test.csv -o adult.lk        # the model of a run; decompressing needs the run
    likely compress adult.csv -o adult.lk                        # a small model, fitted to the data, in the file
    likely compress adult.csv -o adult.lk --budget 5m            # more time for that model
    likely compress runs/photos photos/ -o photos.lk --embed     # the run's model goes into the file
    """,
    click.argument("what", metavar="[RUN]"),
    OPTIONAL_DATA,
    click.option("-o", "--out", metavar="FILE", required=True, help="The file to write, by custom .lk; - is stdout."),
    click.option("--embed", is_flag=True, help="Put the run's model into the file."),
    click.option("--budget", default="60s", show_default=True, metavar="TIME",
                 help="Without a run: time to fit small models in."),
    click.option("--verify/--no-verify", default=True, help="Decode every part before it is written."),
    click.option("--workers", type=click.IntRange(min=1), help="Processes at work; by default one a core."),
    SEED,
    READER,
    QUIET,
    JSON,
)  # fmt: skip
def compress(
    what: str,
    data: str | None,
    out: str,
    embed: bool,
    budget: str,
    verify: bool,
    workers: int | None,
    seed: int,
    quiet: bool,
    as_json: bool,
) -> None:
    """Compress DATA into one file, from which `likely decompress` restores it exactly.

    With a RUN its model codes the data; the file is as small as the model's bits, and whoever decompresses needs the
    same run.  Without one small models are fitted to the data itself, the best codes it, and the file carries it.

    A CSV or text file comes back byte for byte; tables and arrays with every value to the bit; image folders with
    pixels, names and order.  Rows that the model never saw (a new category, a value out of range) are kept as well.
    """
    import likely.compression as compression

    run = None if data is None else what
    if run is None and embed:
        raise click.UsageError("--embed: without a run the file carries its model in any case")
    options: dict[str, Any] = {
        "read": _reading(),
        "verify": verify,
        "workers": workers,
        "progress": _counter(quiet),
    }
    if out == "-" and sys.stdout.isatty():
        raise click.UsageError("expected -o FILE (such as data.lk): a compressed file is no text")
    if out == "-" and as_json:
        raise click.UsageError("--json: standard output is the compressed file; give it a name with -o")
    target: Any = sys.stdout.buffer if out == "-" else out
    if run is None:
        sizes = compression.compress(what, target, budget=parse_seconds(budget), seed=seed, **options)
    else:
        sizes = compression.compress(data, target, run=run, embed=embed, **options)
    if as_json:
        _print_json(sizes.to_json())
    else:
        _say(sizes.describe())


@_verb(
    "Restore what was compressed.",
    """
    likely decompress adult.lk -o adult.csv
    likely decompress adult.lk -o adult.csv --run moved/adult
    likely decompress adult.lk --rows 1000:2000 -o some.csv      # only these rows (tables, lines)
    likely decompress adult.lk | head                            # to standard output
    """,
    click.argument("file", metavar="FILE"),
    _output("File or folder to write."),
    click.option("--run", metavar="RUN", help="The run that compressed it, where the file does not carry its model."),
    click.option("--rows", metavar="A:B", help="Only rows A to before B, from 0."),
    click.option("--workers", type=click.IntRange(min=1), help="Processes at work; by default one a core."),
    click.option("--max-output", metavar="BYTES", help="Decoded size up to which a file is trusted (4G)."),
    QUIET,
)
def decompress(
    file: str, out: str, run: str | None, rows: str | None, workers: int | None, max_output: str | None, quiet: bool
) -> None:
    """Restore the data of FILE.

    What was written is held against checksums; a file that is damaged, cut short or made with another model is refused
    with the reason, and nothing is written.
    """
    import likely.compression as compression
    from likely.coding.container import Limits

    limits = None if max_output is None else Limits(max_output=parse_bytes(max_output))
    compression.decompress(
        sys.stdin.buffer.read() if file == "-" else file,
        out,
        run=run,
        rows=None if rows is None else parse_rows(rows),
        workers=workers,
        limits=limits,
        progress=_counter(quiet),
    )


@_verb(
    "Say what a run, a compressed file or a data file is.",
    """
    likely info runs/adult
    likely info adult.lk
    likely info adult.csv --delimiter ';'
    """,
    click.argument("what", metavar="RUN|FILE|DATA"),
    READER,
    JSON,
)
def info(what: str, as_json: bool) -> None:
    """Say what a run is, what a compressed file holds, or what `fit` would read DATA as."""
    if _is_compressed(what):
        import likely.compression as compression

        if as_json:
            _print_json(compression.info(what))
        else:
            click.echo("\n".join(compression.describe_file(what)))
        return
    if (Path(what) / "config.json").exists():
        import likely.api as api

        fitted = api.load(what, weights=False)
        if as_json:
            _print_json(fitted.info())
        else:
            _print_info(fitted)
        return
    from likely.data import infer_schema

    schema = infer_schema(what, **_reading())
    if as_json:
        _print_json(schema.to_json())
    else:
        click.echo(schema.describe())


@_verb(
    "Complete verbs and options in a shell.",
    """
    likely completion bash >> ~/.bashrc
    likely completion zsh >> ~/.zshrc
    likely completion fish > ~/.config/fish/completions/likely.fish
    """,
    click.argument("shell", type=click.Choice(["bash", "zsh", "fish"])),
)
def completion(shell: str) -> None:
    """Print the script that makes a shell complete verbs, options and models."""
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "likely", "_LIKELY_COMPLETE").source())
