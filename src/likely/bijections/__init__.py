"""Invertible maps with the log-determinants of their Jacobians; usable alone.

Every map leads from data to base: ``forward(x, context=None)`` gives z and log |det ∂z/∂x|, ``inverse`` leads back.
"""

from __future__ import annotations

from likely.bijections.bijection import Bijection, Chain, Inverse, NoInverse
from likely.bijections.permutations import Permutation, Reverse

__all__ = ["Bijection", "Chain", "Inverse", "NoInverse", "Permutation", "Reverse"]
