"""Lossless coding: entropy coder, codecs, bits-back, the file format ``.lk``."""

from likely.coding.codec import Chain, Codec, Columns, Mapped, ModelCodec, Product, Uniform
from likely.coding.errors import Damaged, FormatError
from likely.coding.stack import Stack, initial_words

__all__ = [
    "Chain",
    "Codec",
    "Columns",
    "Damaged",
    "FormatError",
    "Mapped",
    "ModelCodec",
    "Product",
    "Stack",
    "Uniform",
    "initial_words",
]
