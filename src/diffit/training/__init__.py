"""A training run: the loop, the step, checkpoints, and what a run writes."""

from diffit.training.loop import train
from diffit.training.run import Outcome

__all__ = ["Outcome", "train"]
