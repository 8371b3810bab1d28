"""Inception score (Salimans et al. 2016): exp of the mean KL(p(y|x) ‖ p(y)), over splits."""

import torch
import torch.distributed as dist
from torch import Tensor

from diffit.utils.distributed import Processes

SPLITS = 10


class ScoreSums:
    """Running sums a split: n, Σ_x Σ_y p log p and Σ_x p. Position i of N belongs to split ⌊10 i / N⌋.

    The mean KL is the mean of Σ_y p log p less Σ_y q log q, with q the mean of p: no probabilities are kept.
    """

    def __init__(self, count: int, splits: int = SPLITS, device: torch.device | str = "cpu") -> None:
        self.count, self.splits, self.device = count, splits, device
        self.sums: Tensor | None = None  # (splits, 2 + classes)

    def add(self, positions: Tensor, probabilities: Tensor) -> None:
        """``positions`` (b,) int64 in [0, count), ``probabilities`` (b, classes)."""
        p = probabilities.to(self.device, torch.float64)
        rows = torch.cat([p.new_ones(len(p), 1), torch.xlogy(p, p).sum(1, keepdim=True), p], dim=1)
        if self.sums is None:
            self.sums = p.new_zeros(self.splits, rows.shape[1])
        self.sums.index_add_(0, (positions * self.splits // self.count).to(self.device), rows)

    def reduce(self, procs: Processes, classes: int) -> None:
        if self.sums is None:
            self.sums = torch.zeros(self.splits, 2 + classes, dtype=torch.float64, device=self.device)
        if procs.count > 1:
            dist.all_reduce(self.sums)

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits."""
        assert self.sums is not None
        n, own, q = self.sums[:, 0], self.sums[:, 1], self.sums[:, 2:]
        q = q / n[:, None]
        scores = (own / n - torch.xlogy(q, q).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))
