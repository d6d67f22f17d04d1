"""The fingerprint of a model: equal for the same weights, configuration and arithmetic, on every machine."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from likely.coding.container import canonical_json


def fingerprint(tensors: Mapping[str, Tensor], config: Mapping[str, Any], profile: str) -> str:
    """SHA-256, in hexadecimal, over a model's tensors, its configuration and the profile of its arithmetic.

    Hashed are, each preceded by its length in bytes as 8 bytes: the profile, the canonical JSON of the configuration,
    and for each tensor, in the order of the names' code points, name, dtype (``float32``), shape (``3,2``) and elements
    (row by row, little-endian).  Strings are UTF-8.

    >>> fingerprint({"weight": torch.ones(2)}, {"latent_dim": 2}, "exact32-1")[:16]
    '0fb662e07092f13c'

    Args:
        tensors: weights and buffers, such as ``model.state_dict()``.
        config: JSON object, such as the model's options.
        profile: name of the arithmetic.

    Raises:
        ValueError: the configuration is not JSON.
    """
    digest = hashlib.sha256()

    def add(field: bytes | memoryview) -> None:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)

    add(profile.encode())
    add(canonical_json(config))
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        add(name.encode())
        add(str(tensor.dtype).removeprefix("torch.").encode())
        add(",".join(map(str, tensor.shape)).encode())
        add(_little_endian(tensor))
    return digest.hexdigest()


def _little_endian(tensor: Tensor) -> memoryview:
    octets = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    if sys.byteorder == "big":
        width = (tensor.real if tensor.is_complex() else tensor).element_size()
        octets = octets.reshape(-1, width)[:, ::-1].copy().reshape(-1)
    return octets.data
