"""Files of a run that survive a crash at any instant: weights, checkpoints, log.

Every file is written under a temporary name, flushed to the disk, and renamed.  A checkpoint is a pair: tensors in a
safetensors file, everything else in a JSON file that holds the digests of both.  The JSON file is written last, so a
checkpoint exists from the instant its JSON file does.  No pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FORMAT = 1
#: Checkpoints kept in ``state/``.
KEPT = 2


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, flush it to the disk and rename it to ``path``.

    At every instant ``path`` is either what it was or complete.

    Raises:
        OSError: the disk is full or not writable; ``path`` is what it was and the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's umask has it; safetensors would make the file private
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --------------------------------------------------------------------------------------------------------------
# Weights
# --------------------------------------------------------------------------------------------------------------


def save_weights(model: nn.Module, path: Path | str) -> None:
    """Write a model's parameters and buffers to a safetensors file, atomically.

    A tensor that the model holds under several names (tied weights) is stored once; the other names are noted in the
    file's metadata under ``tied``.

    Raises:
        OSError: the file cannot be written; a file that was there before is intact.
    """
    save_tensors(model.state_dict(), Path(path))


def load_weights(model: nn.Module, path: Path | str) -> None:
    """Read the weights written by :func:`save_weights` into a model of the same architecture.

    Raises:
        ValueError: the file is damaged, or its names or shapes are not the model's.
    """
    try:
        model.load_state_dict(load_tensors(Path(path)))
    except RuntimeError as error:
        raise ValueError(f"{path}: expected the weights of this model; {error}") from error


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write named tensors to a safetensors file, atomically; equal views of one memory are stored once."""
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    memory: dict[int, str] = {}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor in the state of a model, got {type(tensor).__name__}")
        tensor = tensor.detach()
        identity = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device))
        if tensor.numel() and identity in seen:
            tied[name] = seen[identity]
            continue
        seen[identity] = name
        whole = tensor.is_contiguous() and tensor.untyped_storage().data_ptr() not in memory
        memory[tensor.untyped_storage().data_ptr()] = name
        stored[name] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
    metadata = {"format": "pt"} | ({"tied": json.dumps(tied)} if tied else {})
    write_atomically(path, lambda temporary: save_file(stored, temporary, metadata=metadata))


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """Read the tensors written by :func:`save_tensors`.

    Raises:
        ValueError: the file is not a complete safetensors file.
    """
    try:
        with safe_open(path, framework="pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            tied = json.loads((file.metadata() or {}).get("tied", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path}: expected a safetensors file, but it is damaged ({error})") from error
    return tensors | {name: tensors[other] for name, other in tied.items()}


# --------------------------------------------------------------------------------------------------------------
# Trees of tensors and plain values, such as an optimiser's state
# --------------------------------------------------------------------------------------------------------------


def flatten(tree: Any, tensors: dict[str, Tensor], name: str) -> Any:
    """The JSON description of a tree of dicts, lists, tuples, tensors and plain values.

    Its tensors are put into ``tensors`` under names that begin with ``name``; :func:`unflatten` is the inverse, with
    keys that are not strings, and the difference of lists and tuples, kept.
    """
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return {"tensor": name}
    if isinstance(tree, Mapping):
        return {"dict": [[key, flatten(value, tensors, f"{name}.{key}")] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [flatten(value, tensors, f"{name}.{i}") for i, value in enumerate(tree)]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise TypeError(f"{name}: expected a tensor, a number, text or a collection of them, got {type(tree).__name__}")


def unflatten(description: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that :func:`flatten` described."""
    ((kind, content),) = description.items()
    match kind:
        case "tensor":
            return tensors[content]
        case "dict":
            return {key: unflatten(value, tensors) for key, value in content}
        case "list":
            return [unflatten(value, tensors) for value in content]
        case "tuple":
            return tuple(unflatten(value, tensors) for value in content)
        case _:
            return content


# --------------------------------------------------------------------------------------------------------------
# Checkpoints
# --------------------------------------------------------------------------------------------------------------


@dataclass
class Checkpoint:
    """The state of a run after ``step`` steps: named tensors, and JSON values."""

    step: int
    values: dict[str, Any]
    tensors: dict[str, Tensor]


class Checkpoints:
    """The last two checkpoints of a run, in the folder ``state``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _paths(self) -> list[Path]:
        """JSON files of the checkpoints there are, newest first."""
        return sorted(self.folder.glob("step-*.json"), reverse=True)

    def exist(self) -> bool:
        """Whether there is any checkpoint, sound or not."""
        return bool(self._paths())

    def write(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint and remove the third last.

        Raises:
            OSError: the disk is full or not writable; the checkpoints that were there are intact.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{checkpoint.step:012d}.json"
        tensors = path.with_suffix(".safetensors")
        existed = path.exists()
        try:
            save_tensors(checkpoint.tensors, tensors)
            content = {
                "format": FORMAT,
                "step": checkpoint.step,
                "tensors_sha256": _digest(tensors),
                "values": checkpoint.values,
            }
            sealed = json.dumps({"sha256": _digest_of(content), **content}, indent=1)
            write_atomically(path, lambda temporary: _write_text(temporary, sealed))
        except OSError:
            if not existed:
                tensors.unlink(missing_ok=True)
            raise
        for old in self._paths()[KEPT:]:
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)
        for stray in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            stray.unlink(missing_ok=True)
        for orphan in self.folder.glob("step-*.safetensors"):
            if not orphan.with_suffix(".json").exists():
                orphan.unlink()
        return path

    def read(self, warn: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is sound, or None if there is none at all.

        Args:
            warn: called with a message for every checkpoint that is damaged.

        Raises:
            ValueError: there are checkpoints and every one is damaged.
        """
        paths = self._paths()
        for path in paths:
            try:
                return self._read(path)
            except (OSError, ValueError) as error:
                warn(f"checkpoint {path} is damaged ({error}); trying the one before it")
        if paths:
            raise ValueError(f"{self.folder}: every checkpoint is damaged; start the run again in a new folder")
        return None

    def _read(self, path: Path) -> Checkpoint:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            sealed = content.pop("sha256")
            if sealed != _digest_of(content):
                raise ValueError("its JSON file was altered")
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
            raise ValueError("its JSON file is truncated or altered") from error
        if content["format"] > FORMAT:
            raise ValueError(f"expected format {FORMAT} or older, got {content['format']}")
        tensors = path.with_suffix(".safetensors")
        if not tensors.exists():
            raise ValueError(f"{tensors.name} is gone")
        if _digest(tensors) != content["tensors_sha256"]:
            raise ValueError(f"{tensors.name} is truncated or altered")
        return Checkpoint(content["step"], content["values"], load_tensors(tensors))

    def remove(self) -> None:
        """Remove all checkpoints."""
        for path in [*self.folder.glob("step-*"), *self.folder.glob(".*.tmp")]:
            path.unlink()


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------
# Log
# --------------------------------------------------------------------------------------------------------------


class Log:
    """``log.jsonl``: one JSON object a line.  A line that cannot be written (full disk) is kept and tried again.

    Args:
        path: the file, or None for no file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._pending: list[str] = []
        self._length = 0

    def start(self, length: int = 0) -> None:
        """Cut the file to its first ``length`` bytes: what was logged before the checkpoint to resume from."""
        if self._path is not None:
            with self._path.open("ab") as file:
                file.truncate(length)
            self._length = length

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line."""
        self._pending.append(json.dumps(record) + "\n")
        self.flush()

    def flush(self) -> None:
        """Append the lines that could not be written before; the file never ends in half a line for long."""
        if self._path is None or not self._pending:
            self._pending.clear()
            return
        lines = "".join(self._pending).encode()
        try:
            with self._path.open("r+b") as file:
                file.truncate(self._length)
                file.seek(self._length)
                file.write(lines)
        except OSError:
            return
        self._length += len(lines)
        self._pending.clear()

    def sync(self) -> int:
        """Flush to the disk and return the length in bytes."""
        self.flush()
        if self._path is not None and self._path.exists():  # it does not before the first line, nor the start
            with self._path.open("rb") as file:
                os.fsync(file.fileno())
        return self._length
