"""Training: the one loop, its options, and the files of a run."""

from likely.training.checkpoints import load_weights, save_weights
from likely.training.diagnosis import Diverged
from likely.training.loop import Callback, Run, TrainResult, train
from likely.training.options import TrainOptions

__all__ = ["Callback", "Diverged", "Run", "TrainOptions", "TrainResult", "load_weights", "save_weights", "train"]
