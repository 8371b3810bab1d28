"""Fréchet distance between Gaussians (Dowson & Landau 1982) and the moments that it compares, in float64."""

import torch
import torch.distributed as dist
from torch import Tensor

from diffit.utils.distributed import Processes


class Moments:
    """Running sums n, Σx and Σxxᵀ of features that arrive in batches, in any order, on any number of processes."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.sums: Tensor | None = None  # (d + 1, d + 1): the products of (1, x) with itself, all sums in one tensor

    def add(self, features: Tensor) -> None:
        """``features`` (b, d)."""
        x = features.to(self.device, torch.float64)
        x = torch.cat([x.new_ones(len(x), 1), x], dim=1)
        self.sums = x.T @ x if self.sums is None else self.sums.addmm_(x.T, x)

    def reduce(self, procs: Processes, dim: int) -> None:
        """Add up the sums of all processes, of which some may have seen no features of the ``dim``."""
        if self.sums is None:
            self.sums = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=self.device)
        if procs.count > 1:
            dist.all_reduce(self.sums)

    @property
    def count(self) -> int:
        return 0 if self.sums is None else int(self.sums[0, 0])

    def mean_and_cov(self) -> tuple[Tensor, Tensor]:
        """Mean ``(d,)`` and covariance ``(d, d)`` with N − 1, on the CPU."""
        assert self.sums is not None
        n, total, products = self.count, self.sums[0, 1:], self.sums[1:, 1:]
        mean = total / n
        return mean.cpu(), ((products - torch.outer(total, mean)) / (n - 1)).cpu()


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(d,)`` and unbiased covariance ``(d, d)`` of ``(n, d)``, float64."""
    sums = Moments(features.device)
    sums.add(features)
    return sums.mean_and_cov()


def square_root(cov: Tensor) -> Tensor:
    """``R`` (d, r) with R Rᵀ = ``cov``, where r is the numerical rank."""
    tolerance = len(cov) * torch.finfo(cov.dtype).eps
    factor, failed = torch.linalg.cholesky_ex(cov)
    pivots = factor.diagonal().square()
    if not failed and pivots.min() > tolerance * pivots.max():
        return factor
    values, vectors = torch.linalg.eigh(cov)
    kept = values > tolerance * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½).

    Σ₁Σ₂ has the non-zero eigenvalues of RᵀΣ₂R, where Σ₁ = RRᵀ: symmetric, so that no general matrix root is needed.
    R is that of the covariance of lower rank. A null space would enter with the *root* of its rounding errors, 1e-8
    each, and thousands of them add up.
    """
    mu1, cov1, mu2, cov2 = (x.double() for x in (mu1, cov1, mu2, cov2))
    root, other = min((square_root(cov1), cov2), (square_root(cov2), cov1), key=lambda pair: pair[0].shape[1])
    product = root.T @ other @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + torch.trace(cov1) + torch.trace(cov2) - 2 * trace)


def finite_sample_bias(cov: Tensor, n1: int, n2: float = float("inf")) -> float:
    """What the distance is on average between samples of ``n1`` and ``n2`` from one Gaussian, to first order in 1/n.

    The means differ by tr Σ (1/n₁ + 1/n₂). The covariances differ by Δ with E Δᵢⱼ² = (λᵢλⱼ + δᵢⱼλᵢ²)(1/n₁ + 1/n₂) in
    the eigenbasis, which costs ½ Σ Δᵢⱼ²/(λᵢ + λⱼ). For Σ = I and n₁ = n₂ = n it is (d² + 5d)/(2n).

    For n₁ and n₂ from about 2d on: with fewer the covariances lose rank, and the next orders count.
    """
    values = torch.linalg.eigvalsh(cov.double())
    values = values[values > len(cov) * torch.finfo(values.dtype).eps * values[-1]]
    pairs = values[:, None] * values / (values[:, None] + values)
    return float(1.25 * values.sum() + 0.5 * pairs.sum()) * (1 / n1 + 1 / n2)
