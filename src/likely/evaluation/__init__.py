"""Held-out nats and bits with standard errors, importance-weighted bounds, baselines and classic codecs beside them."""

from likely.evaluation.heldout import HeldOut, held_out

__all__ = ["HeldOut", "held_out"]
