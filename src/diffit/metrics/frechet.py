"""Fréchet distance between Gaussians (Dowson & Landau 1982) and the moments that it compares, in float64."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from diffit.metrics.detectors import Detector
from diffit.metrics.features import Array, Need, Output, Part, as_tensor
from diffit.utils.distributed import Processes

SPARSEST = 10  # dimensions an image, above which a covariance says nothing


@dataclass(frozen=True)
class Gaussian:
    """Mean (d,) and covariance (d, d) with N − 1, float64 on the CPU, of ``count`` images where that is known."""

    mean: Tensor
    cov: Tensor
    count: int | None


class Moments:
    """Running sums n, Σx and Σxxᵀ: an accumulator of a :class:`Gaussian`."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # (d + 1, d + 1): the products of (1, x) with itself, all sums in one tensor

    def add(self, positions: Tensor, features: Tensor) -> None:
        x = features.double()
        x = torch.cat([x.new_ones(len(x), 1), x], dim=1)
        self.sums = x.T @ x if self.sums is None else self.sums.addmm_(x.T, x)

    def reduce(self, procs: Processes, dim: int) -> Gaussian:
        if self.sums is None:
            self.sums = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=procs.device)
        if procs.count > 1:
            dist.all_reduce(self.sums)
        n, total, products = self.sums[0, 0], self.sums[0, 1:], self.sums[1:, 1:]
        mean = total / n
        return Gaussian(mean.cpu(), ((products - torch.outer(total, mean)) / (n - 1)).cpu(), int(n))


@dataclass(frozen=True)
class FID(Part[Gaussian]):
    """Fréchet Inception distance (Heusel et al. 2017); of the ``spatial`` features sFID (Nash et al. 2021)."""

    kind = "fid"
    output: Output = "pool"

    @property
    def need(self) -> Need[Gaussian]:
        return Need("moments", self.output, self.samples, Moments)

    def fewest(self, dim: int) -> tuple[int, str]:
        return max(math.ceil(dim / SPARSEST), 2), f"for a {dim}×{dim} covariance"

    def numbers(self, fake: Gaussian, real: Gaussian, detector: Detector) -> dict[str, float]:
        name = ("s" if self.output == "spatial" else "") + ("fid" if detector.official else "fd")
        numbers = {name: frechet_distance(fake.mean, fake.cov, real.mean, real.cov)}
        n1, n2 = self.samples, real.count or math.inf
        if min(n1, n2) >= 2 * len(real.mean):  # below, the first order in 1/n is far off
            numbers[f"{name}_bias"] = finite_sample_bias(real.cov, n1, n2)
        return numbers


def moments(features: Array) -> tuple[Tensor, Tensor]:
    """Mean ``(d,)`` and unbiased covariance ``(d, d)`` of ``(n, d)``, float64. Raises ValueError for one row."""
    x = as_tensor(features, "features", 2).double()
    if len(x) < 2:
        raise ValueError("features has one row; a covariance needs two or more")
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], -1)


def square_root(cov: Tensor) -> Tensor:
    """``R`` (d, r) with R Rᵀ = ``cov``, where r is the numerical rank."""
    tolerance = len(cov) * torch.finfo(cov.dtype).eps
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(cov)
    pivots = factor.diagonal().square()
    if not failed and pivots.min() > tolerance * pivots.max():
        return factor
    values, vectors = torch.linalg.eigh(cov)
    kept = values > tolerance * values[-1]
    factor = vectors[:, kept] * values[kept].sqrt()
    return factor


def frechet_distance(mu1: Array, cov1: Array, mu2: Array, cov2: Array) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of means (d,) and covariances (d, d).

    Raises ValueError where the shapes do not fit or a value is not finite.

    Σ₁Σ₂ has the non-zero eigenvalues of RᵀΣ₂R, where Σ₁ = RRᵀ: symmetric, so that no general matrix root is needed.
    R is that of the covariance of lower rank. A null space would enter with the *root* of its rounding errors, 1e-8
    each, and thousands of them add up.
    """
    mu1, mu2 = as_tensor(mu1, "mu1", 1).double(), as_tensor(mu2, "mu2", 1).double()
    cov1, cov2 = as_tensor(cov1, "cov1", 2).double(), as_tensor(cov2, "cov2", 2).double()
    d = len(mu1)
    if len(mu2) != d or cov1.shape != (d, d) or cov2.shape != (d, d):
        shapes = ", ".join(str(tuple(x.shape)) for x in (mu1, cov1, mu2, cov2))
        raise ValueError(f"mu1, cov1, mu2, cov2 have shapes {shapes}; expected (d,), (d, d), (d,), (d, d)")
    root, other = min((square_root(cov1), cov2), (square_root(cov2), cov1), key=lambda pair: pair[0].shape[1])
    product = root.T @ other @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return float((mu1 - mu2).square().sum() + torch.trace(cov1) + torch.trace(cov2) - 2 * trace)


def finite_sample_bias(cov: Array, n1: float, n2: float = math.inf) -> float:
    """What the distance is on average between samples of ``n1`` and ``n2`` from one Gaussian, to first order in 1/n.

    The means differ by tr Σ (1/n₁ + 1/n₂). The covariances differ by Δ with E Δᵢⱼ² = (λᵢλⱼ + δᵢⱼλᵢ²)(1/n₁ + 1/n₂) in
    the eigenbasis, which costs ½ Σ Δᵢⱼ²/(λᵢ + λⱼ). For Σ = I and n₁ = n₂ = n it is (d² + 5d)/(2n).

    For n₁ and n₂ from about 2d on: with fewer the covariances lose rank, and the next orders count.
    """
    values = torch.linalg.eigvalsh(as_tensor(cov, "cov", 2).double())
    values = values[values > len(values) * torch.finfo(values.dtype).eps * values[-1]]
    pairs = values[:, None] * values / (values[:, None] + values)
    return float(1.25 * values.sum() + 0.5 * pairs.sum()) * (1 / n1 + 1 / n2)
