"""A model as few bytes: for files that hold the model that coded them.

The weights of linear layers, convolutions and embeddings are rounded to whole numbers of a few bits times a scale for
each row, and coded under their own frequencies; other parameters keep 20 significant bits, and everything else (means,
scales, tables) all of theirs.  What comes out is another model, near the first: it is this one that codes the data.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from likely.coding import fallback
from likely.coding.described import DescribedCells
from likely.coding.errors import Damaged, TooLarge
from likely.coding.stack import Stack
from likely.contract import Model

#: Significant bits of the parameters that are not rounded to whole numbers.
_KEPT = 20
#: Weights in fewer than this many elements are not worth a table of frequencies.
_FEW = 256
_LENGTHS = struct.Struct("<II")
_ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.Embedding)
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


def unpack(packed: bytes, build: Build, most: int = 1 << 28) -> Model:
    """The model that :func:`pack` wrote.

    Args:
        build: :func:`likely.models.build`.
        most: numbers the model may have.

    Raises:
        Damaged: the bytes are not as they were written.
        TooLarge: they declare a larger model.
    """
    rest = _Bytes(packed)
    size, stored = _LENGTHS.unpack(rest.take(_LENGTHS.size))
    if size > 1 << 22:
        raise TooLarge("bytes of the model's description", size, 1 << 22)
    try:
        description, bits, entries = json.loads(fallback.decompress(rest.take(stored), size))
        declared = [(str(n), _TYPES[k], tuple(int(i) for i in shape), bool(whole)) for n, k, shape, whole in entries]
    except (ValueError, TypeError, KeyError, RecursionError) as fault:
        raise Damaged(f"expected the description of a model ({fault})") from None
    numbers = sum(math.prod(shape) for _, _, shape, _ in declared)
    if numbers > most or any(i < 0 for _, _, shape, _ in declared for i in shape):
        raise TooLarge("numbers in the model", numbers, most, "max_model")
    if not isinstance(bits, int) or not 2 <= bits <= 9:
        raise Damaged(f"expected 2 to 9 bits a weight, got {bits}")
    state: dict[str, Tensor] = {}
    for name, kind, shape, whole in declared:
        if whole:
            state[name] = _unrounded(rest, shape, bits).to(kind)
        else:
            numpy = _NUMPY[str(kind).removeprefix("torch.")]
            octets = _unplain(rest, math.prod(shape) * np.dtype(numpy).itemsize, np.dtype(numpy).itemsize)
            state[name] = torch.from_numpy(np.frombuffer(octets, numpy).reshape(shape).copy()).to(kind)
    rest.finish()
    _check_size(description, state, most)
    try:
        model = build(description)
        model.load_state_dict(state)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError) as fault:
        raise Damaged(f"expected a model and its weights ({fault})") from None
    return model.eval()


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


def _check_size(description: Any, state: Mapping[str, Tensor], most: int) -> None:
    """Refuse a description whose numbers do not fit the weights that came with it, before a model is made of it."""
    largest = max([1 << 16, *(size for tensor in state.values() for size in tensor.shape)])
    left = [description]
    while left:
        node = left.pop()
        if isinstance(node, dict):
            left += node.values()
        elif isinstance(node, list):
            left += node
        elif isinstance(node, int | float) and abs(node) > 4 * largest and abs(node) > most:
            raise TooLarge("a number in the model's description", int(min(abs(node), 1 << 62)), most)


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
