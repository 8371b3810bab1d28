"""Noise levels that weigh alike: each one's loss divided by its own running mean."""

import torch
import torch.distributed as dist
from torch import Tensor

from diffit.training.losses import Loss
from diffit.training.meter import sums_by_level
from diffit.utils.distributed import Processes

LEVELS = 32
MEMORY = 0.97  # of a level's mean that is left after one image more: about the last thousand images count
SMALLEST = 1e-6


class UncertaintyWeighting:
    """The weights 1/E[loss at σ] that EDM2 learns as e^−u(σ) (arXiv 2312.02696, App. B; before it arXiv 1705.07115).

    Its ``loss/e^u + u`` is least at ``e^u = E[loss]``, which is kept here for each of 32 parts of the noise
    distribution that training visits equally often. It stays on the device, and is the same in all processes.
    """

    def __init__(self, loss: Loss, device: torch.device) -> None:
        self.edges = loss.bin_edges(LEVELS).to(device)
        self.means = torch.ones(LEVELS, device=device)  # what a network that says 0 has
        self.sums = torch.zeros(2, LEVELS, device=device)  # of this step's losses; of ones

    def __call__(self, level: Tensor, loss: Tensor) -> Tensor:
        """Per-sample ``loss`` ``(B,)`` at noise ``level`` ``(B,)``, weighted."""
        self.sums += sums_by_level(level, loss.detach().float(), self.edges)
        return loss / self.means[torch.bucketize(level, self.edges)]

    def gather(self, procs: Processes) -> None:
        """At the end of a step's backward passes: what all processes have seen."""
        if procs.count > 1:
            dist.all_reduce(self.sums, group=procs.steps)

    def update(self, skip: Tensor) -> None:
        """By what was gathered, if the step is taken."""
        losses, counts = self.sums
        means = (losses / counts.clamp(min=1)).lerp(self.means, MEMORY**counts).clamp(min=SMALLEST)
        self.means = torch.where(means.isfinite() & ~skip, means, self.means)
        self.sums.zero_()
