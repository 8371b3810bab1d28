"""A training run: the loop, the step, checkpoints, and what a run writes."""

from diffit.training.loop import Outcome, train

__all__ = ["Outcome", "train"]
