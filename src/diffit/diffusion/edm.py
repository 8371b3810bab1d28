"""EDM: preconditioning, training loss and noise schedule (Karras et al., arXiv 2206.00364, Table 1)."""

import math
from collections.abc import Callable
from statistics import NormalDist

import torch
from torch import Tensor

from diffit.diffusion.guidance import Denoiser, like

Network = Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]
"""``net(x, c_noise, class_labels, augment_labels) -> F``, shaped like x."""


def denoiser(
    net: Network,
    class_labels: Tensor | None = None,
    augment_labels: Tensor | None = None,
    *,
    sigma_data: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Denoiser:
    """D(x; σ) = c_skip·x + c_out·F(c_in·x; c_noise) (Eq. 7).

    The network sees ``dtype``; everything else stays in the dtype of ``x``, so that a sampler may work in float64.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = like(torch.as_tensor(sigma), x)
        total = sigma**2 + sigma_data**2
        c_skip = sigma_data**2 / total
        c_out = sigma * sigma_data / total.sqrt()
        c_in = 1 / total.sqrt()
        c_noise = sigma.log().flatten().expand(x.shape[0]) / 4
        F = net((c_in * x).to(dtype), c_noise.to(dtype), class_labels, augment_labels)
        return c_skip * x + c_out * F.to(x.dtype)

    return denoise


class EDMLoss:
    """λ(σ)·‖D(y + n; σ) − y‖² with ln σ ~ N(P_mean, P_std²) and λ = (σ² + σ_data²)/(σ·σ_data)²."""

    level_name = "sigma"

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5) -> None:
        self.P_mean = P_mean
        self.P_std = P_std
        self.sigma_data = sigma_data

    def draw_level(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One noise level an image, ``(B,)``."""
        normal = torch.randn(images.shape[0], device=images.device, generator=generator)
        return (self.P_mean + self.P_std * normal).exp()

    def bin_edges(self, bins: int) -> Tensor:
        """Noise levels between bins that training visits equally often."""
        normal = NormalDist(self.P_mean, self.P_std)
        return torch.tensor([normal.inv_cdf(i / bins) for i in range(1, bins)]).exp()

    def __call__(
        self,
        net: Network,
        images: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """``images`` ``(B, C, H, W)`` in [−1, 1] -> weighted squared error, a mean over pixels, ``(B,)``.

        ``generator`` lives on the images' device. ``level`` ``(B,)`` replaces the sampled sigmas.
        """
        sigma = self.draw_level(images, generator) if level is None else level
        noise = torch.randn(images.shape, device=images.device, dtype=images.dtype, generator=generator)
        noisy = images + noise * like(sigma, images)
        denoise = denoiser(net, labels, augment_labels, sigma_data=self.sigma_data)
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        return weight * (denoise(noisy, sigma) - images).square().flatten(1).mean(dim=1)


def edm_sigmas(
    steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0, trailing: bool = False
) -> Tensor:
    """Noise levels from ``sigma_max`` down to ``sigma_min``, then 0: float64 ``(steps + 1,)`` on the CPU (Eq. 5).

    ``trailing`` goes to 0 in place of ``sigma_min``: every second level is then that of half as many steps.
    """
    ramp = torch.arange(steps, dtype=torch.float64) / max(steps - (not trailing), 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def lambda_sigmas(steps: int, sigma_min: float, sigma_max: float) -> Tensor:
    """The same with equal steps in λ = −ln σ, half the logarithm of the signal-to-noise ratio (arXiv 2206.00927)."""
    sigmas = torch.linspace(math.log(sigma_max), math.log(sigma_min), steps, dtype=torch.float64).exp()
    return torch.cat([sigmas, sigmas.new_zeros(1)])
