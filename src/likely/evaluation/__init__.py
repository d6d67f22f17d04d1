"""Held-out nats and bits with standard errors, importance-weighted bounds, baselines and classic codecs beside them."""

from likely.evaluation.baselines import Baseline, fit_baselines
from likely.evaluation.classic import CodecSize, classic_codecs
from likely.evaluation.evaluation import Evaluation, evaluate
from likely.evaluation.heldout import HeldOut, held_out
from likely.evaluation.importance import ImportanceWeighted, importance_weighted
from likely.evaluation.latents import ActiveUnits, active_units, attribute_direction, interpolate, move_along
from likely.evaluation.scores import column_nats, example_nats, tail_probability

__all__ = [
    "ActiveUnits",
    "Baseline",
    "CodecSize",
    "Evaluation",
    "HeldOut",
    "ImportanceWeighted",
    "active_units",
    "attribute_direction",
    "classic_codecs",
    "column_nats",
    "evaluate",
    "example_nats",
    "fit_baselines",
    "held_out",
    "importance_weighted",
    "interpolate",
    "move_along",
    "tail_probability",
]
