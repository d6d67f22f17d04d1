"""A model as few bytes: for files that hold the model that coded them.

The weights of linear layers, convolutions and embeddings are rounded to whole numbers of a few bits times a scale for
each row, and coded under their own frequencies; other parameters keep 20 significant bits, and everything else (means,
scales, tables) all of theirs.  What comes out is another model, near the first: it is this one that codes the data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from likely.coding import fallback
from likely.coding.described import DescribedCells
from likely.coding.errors import Damaged, TooLarge, intact
from likely.coding.stack import Stack
from likely.contract import Model

#: Significant bits of the parameters that are not rounded to whole numbers.
_KEPT = 20
#: Weights in fewer than this many elements are not worth a table of frequencies.
_FEW = 256
_LENGTHS = struct.Struct("<II")
_ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Embedding)
#: Bytes that the description of a model may have.
_DESCRIPTION = 1 << 22
#: Functions that make tensors of a size that they are told, and what each tensor counts at least.
_MAKERS = {"arange", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "randperm", "zeros"}
_MAKERS |= {"new_empty", "new_full", "new_ones", "new_zeros"}
_LEAST = 1 << 10
_TYPES = {str(t).removeprefix("torch."): t for t in (torch.float64, torch.float32, torch.int64, torch.bool)}
_NUMPY = {"float64": "<f8", "float32": "<f4", "int64": "<i8", "bool": "u1"}

Describe = Callable[[Model], Mapping[str, Any]]
Build = Callable[[Mapping[str, Any]], Model]


def pack(model: Model, describe: Describe, bits: int = 7) -> bytes:
    """The model in few bytes; :func:`unpack` makes the model from them that codes the data.

    Args:
        model: on any device.
        describe: :func:`likely.models.describe`.
        bits: of a weight, 2 … 9; its sign included.
    """
    if not 2 <= bits <= 9:
        raise ValueError(f"bits: expected 2 to 9, got {bits}")
    rounded = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, _ROUNDED) and module.weight.numel() >= _FEW
    }
    learned = {id(parameter) for parameter in model.parameters()}
    tensors = dict(model.named_parameters())
    tensors |= {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tensors}
    entries, streams = [], []
    for name, tensor in tensors.items():
        values = tensor.detach().cpu()
        kind = str(values.dtype).removeprefix("torch.")
        if kind not in _TYPES:
            raise ValueError(f"{name}: expected one of {', '.join(_TYPES)}, got {kind}")
        whole = id(tensor) in rounded
        entries.append([name, kind, list(values.shape), int(whole)])
        if whole:
            streams.append(_round(values, bits))
        else:
            kept = values if id(tensor) not in learned else _shortened(values)
            streams.append(_plain(kept.contiguous().numpy().astype(_NUMPY[kind], copy=False)))
    text = json.dumps([dict(describe(model)), bits, entries], separators=(",", ":")).encode()
    about = fallback.compress(text)
    return b"".join([_LENGTHS.pack(len(text), len(about)), about, *streams])


def unpack(packed: bytes, build: Build) -> Model:
    """The model that :func:`pack` wrote.

    Nothing is allocated that is out of proportion to the bytes that are there: 256 numbers a byte, and 2^22.

    Args:
        build: :func:`likely.models.build`.

    Raises:
        Damaged: the bytes are not as they were written.
        TooLarge: they declare a larger model.
    """
    most = (1 << 22) + 256 * len(packed)
    with intact("a model and its weights"):
        rest = _Bytes(packed)
        size, stored = _LENGTHS.unpack(rest.take(_LENGTHS.size))
        if size > _DESCRIPTION:
            raise TooLarge("bytes of the model's description", size, _DESCRIPTION)
        description, bits, entries = json.loads(fallback.decompress(rest.take(stored), size))
        if not isinstance(bits, int) or not 2 <= bits <= 9:
            raise Damaged(f"expected 2 to 9 bits a weight, got {bits}")
        declared = [(str(n), _TYPES[k], tuple(int(i) for i in shape), bool(whole)) for n, k, shape, whole in entries]
        numbers = sum(math.prod(shape) for _, _, shape, _ in declared)
        if min((i for _, _, shape, _ in declared for i in shape), default=0) < 0 or numbers > most:
            raise TooLarge("numbers in the model", numbers, most)
        _check_numbers(description, max(4 * numbers, 1 << 24))
        state = {name: _tensor(rest, kind, shape, whole, bits) for name, kind, shape, whole in declared}
        rest.finish()
        with torch.random.fork_rng(devices=[]):
            with _Allowance(8 * numbers + (1 << 22)):
                model = build(description)
            model.load_state_dict(state)
    return model.eval()


def _tensor(rest: _Bytes, kind: torch.dtype, shape: tuple[int, ...], whole: bool, bits: int) -> Tensor:
    """The next tensor."""
    if whole:
        return _unrounded(rest, shape, bits).to(kind)
    numpy = np.dtype(_NUMPY[str(kind).removeprefix("torch.")])
    octets = _unplain(rest, math.prod(shape) * numpy.itemsize, numpy.itemsize)
    return torch.from_numpy(np.frombuffer(octets, numpy).reshape(shape).copy()).to(kind)


class _Bytes:
    """Takes bytes apart from the front."""

    def __init__(self, octets: bytes) -> None:
        self._octets, self._at = octets, 0

    def take(self, count: int) -> bytes:
        if not 0 <= count <= len(self._octets) - self._at:
            raise Damaged(f"expected {count} more bytes of the model, got {len(self._octets) - self._at}")
        self._at += count
        return self._octets[self._at - count : self._at]

    def finish(self) -> None:
        if self._at != len(self._octets):
            raise Damaged(f"expected the end of the model, got {len(self._octets) - self._at} more bytes")


def _check_numbers(description: Any, most: int) -> None:
    """Refuse a description with a number, or a shape of so many cells, that no model of this size has."""
    left = [description]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            left += [value for key, value in node.items() if key != "seed"]
            shape = node.get("shape")
            if isinstance(shape, list) and all(isinstance(size, int) for size in shape):
                left.append(math.prod(shape))
        elif isinstance(node, list):
            left += node
        elif isinstance(node, int) and abs(node) > most:
            raise TooLarge("a number in the model's description", min(abs(node), 1 << 62), most)


class _Allowance(TorchFunctionMode):
    """Within the context tensors are made with so many elements in all, and not one more.

    Each counts as a thousand elements at least, so that their number is limited too.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most, self._used = most, 0

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        name = getattr(function, "__name__", "")
        if name in _MAKERS:
            self._used += max(_LEAST, _elements(name, [a for a in args if not isinstance(a, Tensor)], named))
            if self._used > self._most:
                raise TooLarge("numbers in the model", self._used, self._most)
        return function(*args, **named)


def _elements(name: str, given: Sequence[Any], named: Mapping[str, Any]) -> int:
    """Elements of the tensor that a factory makes of these arguments, or more."""
    if name in ("linspace", "logspace"):
        return int(named.get("steps", given[2] if len(given) > 2 else 0))
    if name == "arange":
        ends = [*given[:2], *(named[key] for key in ("start", "end") if key in named)]
        step = named.get("step", given[2] if len(given) > 2 else 1)
        return math.ceil(abs(max(ends) - min([0, *ends])) / abs(step))
    size = named.get("size", given[0] if given and isinstance(given[0], list | tuple) else given)
    count = math.prod(int(i) for i in size if isinstance(i, int))
    return count**2 if name == "eye" and len(given) == 1 else count


def _shortened(values: Tensor) -> Tensor:
    """Floats with their significand rounded to so many bits that the rest are zeros."""
    if not values.is_floating_point():
        return values
    fraction, exponent = torch.frexp(values.double())
    shorter = torch.ldexp(torch.round(fraction * 2.0**_KEPT), exponent - _KEPT)
    return torch.where(torch.isfinite(values), shorter, values.double()).to(values.dtype)


def _round(values: Tensor, bits: int) -> bytes:
    """Rows of whole numbers under their own frequencies, after their scales."""
    top = (1 << (bits - 1)) - 1
    rows = values.double().reshape(len(values), -1).numpy()
    scale = np.maximum(np.abs(rows).max(1), 2.0**-60).astype(np.float32).astype(np.float64) / top
    scale = scale.astype(np.float32)
    whole = np.clip(np.rint(rows / scale[:, None].astype(np.float64)), -top, top).astype(np.int64) + top
    stack = Stack(_lanes(whole.size))
    DescribedCells(whole.shape, 2 * top + 1).push(stack, whole)
    words = stack.to_words().astype("<u4").tobytes()
    return _plain(scale.astype("<f4")) + struct.pack("<I", len(words)) + words


def _unrounded(rest: _Bytes, shape: tuple[int, ...], bits: int) -> Tensor:
    top = (1 << (bits - 1)) - 1
    if not shape or not math.prod(shape):
        raise Damaged(f"expected weights, got shape {shape}")
    rows = shape[0], math.prod(shape[1:])
    scale = np.frombuffer(_unplain(rest, 4 * rows[0], 4), "<f4")
    (length,) = struct.unpack("<I", rest.take(4))
    if length % 4:
        raise Damaged(f"expected whole words of weights, got {length} bytes")
    stack = Stack.from_words(np.frombuffer(rest.take(length), "<u4"), _lanes(math.prod(shape)))
    whole = DescribedCells(rows, 2 * top + 1).pop(stack)
    stack.finish()
    values = (whole - top) * scale[:, None].astype(np.float64)
    return torch.from_numpy(values.reshape(shape))


def _lanes(count: int) -> int:
    return max(1, min(256, count // 512))


def _plain(array: NDArray[Any]) -> bytes:
    """All bytes of an array, those of equal weight side by side, under generic compression."""
    planes = array.reshape(-1).view(np.uint8).reshape(-1, array.dtype.itemsize).T.tobytes()
    packed = fallback.compress(planes)
    return struct.pack("<I", len(packed)) + packed


def _unplain(rest: _Bytes, size: int, width: int) -> bytes:
    (length,) = struct.unpack("<I", rest.take(4))
    planes = fallback.decompress(rest.take(length), size)
    return np.frombuffer(planes, np.uint8).reshape(width, -1).T.tobytes()
