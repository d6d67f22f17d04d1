"""Generative models with a likelihood: one trained model gives densities, scores, samples, imputations,
embeddings and lossless files.

>>> import likely
>>> fitted = likely.fit("iris", model="gaussian", progress=False)
>>> fitted.sample(3, seed=0).shape
(3, 5)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from likely.api import Fitted, Scores, fit, load, resume
    from likely.compression import compress, decompress

__all__ = ["Fitted", "Scores", "__version__", "compress", "decompress", "fit", "load", "resume"]


def __getattr__(name: str) -> Any:
    """Import the interface on first use, so that ``import likely`` and the command line start at once."""
    if name in ("compress", "decompress"):
        from likely import compression

        return getattr(compression, name)
    if name in __all__:
        from likely import api

        return getattr(api, name)
    raise AttributeError(f"module 'likely' has no attribute {name!r}")
