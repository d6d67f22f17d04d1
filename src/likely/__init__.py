"""Generative models with a likelihood: densities, scores, samples, imputations and embeddings from one trained model."""

from __future__ import annotations

__version__ = "0.1.0"
