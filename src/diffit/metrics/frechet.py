"""Fréchet distance between Gaussians (Dowson & Landau 1982), in float64."""

import torch
from torch import Tensor


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``(d,)`` and unbiased covariance ``(d, d)`` of ``(n, d)``, float64."""
    features = features.double()
    return features.mean(dim=0), torch.cov(features.T)


def frechet_distance(mu1: Tensor, cov1: Tensor, mu2: Tensor, cov2: Tensor) -> float:
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½).

    The trace of the root is the sum of the roots of the eigenvalues of Σ₁^½ Σ₂ Σ₁^½, which is symmetric: no general
    matrix root, and rank-deficient covariances need no jitter.
    """
    values, vectors = torch.linalg.eigh(cov1.double())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ cov2.double() @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return float((mu1.double() - mu2.double()).square().sum() + torch.trace(cov1) + torch.trace(cov2) - 2 * trace)
