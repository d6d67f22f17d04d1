"""Generative models with a likelihood: one trained model gives densities, scores, samples, imputations, embeddings."""

from __future__ import annotations

__version__ = "0.1.0"
