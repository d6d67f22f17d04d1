"""From the user's data to a space and tensors, and back.

A :class:`Schema` is inferred once (:func:`infer_schema`), kept with the model, and every later file is held against
it.  Libraries that only some readers need (pandas, pyarrow, pillow, scipy, scikit-learn) are imported when used.
"""

from likely.data.dataset import Dataset, Passes
from likely.data.errors import DataError
from likely.data.preprocessing import (
    Dequantise,
    Log,
    Log1p,
    Logit,
    Preprocessed,
    Standardise,
    Transform,
    build_transform,
)
from likely.data.schema import Schema, infer_schema
from likely.data.splits import Split, split

__all__ = [
    "DataError",
    "Dataset",
    "Dequantise",
    "Log",
    "Log1p",
    "Logit",
    "Passes",
    "Preprocessed",
    "Schema",
    "Split",
    "Standardise",
    "Transform",
    "build_transform",
    "infer_schema",
    "split",
]
