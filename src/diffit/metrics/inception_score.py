"""Inception score (Salimans et al. 2016): exp of the mean KL(p(y|x) ‖ p(y)), over splits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from diffit.metrics.detectors import Detector
from diffit.metrics.features import Need, Part
from diffit.utils.distributed import Processes

SPLITS = 10


class ScoreSums:
    """Running sums for each split: n, Σ_x Σ_y p log p and Σ_x p: an accumulator of the score and its deviation.

    Splits after the first begin at the positions ``starts``. The mean KL is the mean of Σ_y p log p minus Σ_y q log q,
    with q the mean of p: no probabilities are kept.
    """

    def __init__(self, starts: Sequence[int]) -> None:
        self.starts = torch.tensor(starts, dtype=torch.int64)
        self.sums: Tensor | None = None  # (splits, 2 + classes)

    def add(self, positions: Tensor, probabilities: Tensor) -> None:
        p = probabilities.double()
        rows = torch.cat([p.new_ones(len(p), 1), torch.xlogy(p, p).sum(1, keepdim=True), p], dim=1)
        if self.sums is None:
            self.sums = p.new_zeros(len(self.starts) + 1, rows.shape[1])
        self.sums.index_add_(0, torch.bucketize(positions, self.starts, right=True).to(p.device), rows)

    def reduce(self, procs: Processes, dim: int) -> tuple[float, float]:
        if self.sums is None:
            self.sums = torch.zeros(len(self.starts) + 1, 2 + dim, dtype=torch.float64, device=procs.device)
        if procs.count > 1:
            dist.all_reduce(self.sums)
        n, own, q = self.sums[:, 0], self.sums[:, 1], self.sums[:, 2:]
        q = q / n[:, None]
        scores = (own / n - torch.xlogy(q, q).sum(1)).exp()
        return float(scores.mean()), float(scores.std(correction=0))


@dataclass(frozen=True)
class InceptionScore(Part[tuple[float, float]]):
    """Mean and standard deviation over 10 splits, or over splits of ``split_size`` images (the last may be smaller)."""

    kind = "is"
    compares = False
    split_size: int | None = None

    @property
    def protocol(self) -> dict[str, Any]:
        return {"split_size": self.split_size} if self.split_size else {"splits": SPLITS}

    @property
    def starts(self) -> list[int]:
        """Positions at which splits after the first begin."""
        if self.split_size:
            return list(range(self.split_size, self.samples, self.split_size))
        return [-(-i * self.samples // SPLITS) for i in range(1, SPLITS)]

    @property
    def need(self) -> Need[tuple[float, float]]:
        what = f"score, splits of {self.split_size}" if self.split_size else f"score, {SPLITS} splits"
        return Need(what, "probabilities", self.samples, lambda: ScoreSums(self.starts))

    def fewest(self, dim: int) -> tuple[int, str]:
        return 1 if self.split_size else SPLITS, f"for the {SPLITS} splits of the Inception score"

    def numbers(self, fake: tuple[float, float], real: Any, detector: Detector) -> dict[str, float]:
        return dict(zip(("is", "is_std"), fake, strict=True))
