"""Lossless coding: entropy coder, codecs, bits-back, the file format ``.lk``."""

from likely.coding.autoregressive import Autoregressive
from likely.coding.bits_back import BitsBack, Payload, Schedule, bit_swap, decode_rows, encode_rows
from likely.coding.codec import Chain, Codec, Columns, Mapped, ModelCodec, Product, Uniform
from likely.coding.errors import Damaged, FormatError
from likely.coding.flow import Coupling, Dequantise, Flow, Linear, Rearrange, Scale, Shift, log_scales
from likely.coding.stack import Stack, initial_words
from likely.coding.torch_stack import TorchStack

__all__ = [
    "Autoregressive",
    "BitsBack",
    "Chain",
    "Codec",
    "Columns",
    "Coupling",
    "Damaged",
    "Dequantise",
    "Flow",
    "FormatError",
    "Linear",
    "Mapped",
    "ModelCodec",
    "Payload",
    "Product",
    "Rearrange",
    "Scale",
    "Schedule",
    "Shift",
    "Stack",
    "TorchStack",
    "Uniform",
    "bit_swap",
    "decode_rows",
    "encode_rows",
    "initial_words",
    "log_scales",
]
