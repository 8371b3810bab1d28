"""Running sums on the device, read once a tick."""

from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from diffit.training.losses import Loss
from diffit.utils.distributed import Processes

BINS = 5


def sums_by_level(level: Tensor, loss: Tensor, edges: Tensor) -> Tensor:
    """Of ``(B,)`` losses in each part between ``edges`` the sum, and their number: ``(2, parts)``.

    The sums are of parts in the order of the batch: adding by index has none on CUDA.
    """
    inside = torch.bucketize(level, edges)[:, None] == torch.arange(len(edges) + 1, device=edges.device)
    return torch.stack([torch.where(inside, loss[:, None], 0.0), inside.to(loss.dtype)]).sum(dim=1)


class Meter:
    """Mean loss, also by noise level in bins that training visits equally often; gradient norm; skipped steps."""

    def __init__(self, loss: Loss, device: torch.device) -> None:
        edges = loss.bin_edges(BINS)
        self.edges = edges.to(device)
        bounds = ["0", *(f"{edge:.2g}" if edge < 100 else f"{edge:.0f}" for edge in edges.tolist()), "inf"]
        self.names = [f"loss_{loss.level_name}_{low}_{high}" for low, high in pairwise(bounds)]
        self.sums = torch.zeros(2, BINS, device=device, dtype=torch.float64)  # of losses; of ones
        self.gradients = torch.zeros(2, device=device, dtype=torch.float64)  # sum of finite norms; their number
        self.last_loss = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.skipped_in_a_row = torch.zeros((), device=device)

    def add_losses(self, level: Tensor, loss: Tensor) -> None:
        self.sums += sums_by_level(level, loss.double(), self.edges)
        self.last_loss = loss.mean()

    def add_gradients(self, norm: Tensor, skipped: Tensor) -> None:
        """``norm`` of a step's gradient, and whether the step is left out."""
        taken = ~skipped
        self.gradients += torch.stack([torch.where(taken, norm, 0.0), taken]).double()
        self.skipped += skipped
        self.skipped_in_a_row = (self.skipped_in_a_row + 1) * skipped

    def read(self, procs: Processes) -> dict[str, float]:
        """The means since the last reading, over all processes; resets them. ``skipped`` counts the whole run."""
        sums = self.sums.clone()
        if procs.count > 1:
            dist.all_reduce(sums, group=procs.steps)
        losses, counts = sums.cpu()
        norm, steps = self.gradients.tolist()
        scalars = {"loss": float(losses.sum() / counts.sum())}
        scalars |= {
            name: float(total / count)
            for name, total, count in zip(self.names, losses, counts, strict=True)
            if count  # a bin that no image fell into has no mean
        }
        scalars |= {"grad_norm": norm / steps if steps else float("nan"), "skipped_steps": int(self.skipped)}
        self.sums.zero_()
        self.gradients.zero_()
        return scalars
