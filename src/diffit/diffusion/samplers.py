"""Solvers of the probability-flow ODE and its stochastic relatives, as pure functions.

Each is ``sampler(denoise, noise, sigmas, *, noise_source, callback) -> x``:

- ``noise`` is standard normal, ``(B, …)``; the state keeps its dtype and device (float64 costs nothing here);
- ``sigmas`` falls, and ends in 0 for a clean image; it is read on the CPU;
- ``noise_source(x)`` returns standard normal noise like ``x``: ``torch.randn_like``, or a
  :class:`~diffit.randomness.PerSampleNoise` for samples that do not depend on the batch that they are drawn in;
- ``callback(i, sigma, x, denoised)`` is called once a step, before the state is advanced.
"""

from collections.abc import Callable
from itertools import pairwise
from math import sqrt

from torch import Tensor

from diffit.diffusion.guidance import Denoiser

NoiseSource = Callable[[Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor, Tensor], None]


def euler(
    denoise: Denoiser,
    noise: Tensor,
    sigmas: Tensor,
    *,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """First order, one evaluation a step; the same steps as DDIM at η = 0. Draws no noise."""
    sigmas = sigmas.cpu().double()
    x = noise * sigmas[0]
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(i, sigma, x, denoised)
        x = denoised + (x - denoised) * (sigma_next / sigma)
    return x


def heun(
    denoise: Denoiser,
    noise: Tensor,
    sigmas: Tensor,
    *,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = float("inf"),
    S_noise: float = 1.0,
) -> Tensor:
    """Second order, two evaluations a step but one in the last (EDM, Algorithm 2; without churn, Algorithm 1)."""
    if S_churn > 0 and noise_source is None:
        raise ValueError("S_churn > 0 adds noise in every step: pass noise_source, for example torch.randn_like")
    sigmas = sigmas.cpu().double()
    steps = len(sigmas) - 1
    x = noise * sigmas[0]
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        gamma = min(S_churn / steps, sqrt(2) - 1) if S_min <= sigma <= S_max else 0.0
        if gamma > 0 and noise_source is not None:
            sigma, lower = sigma * (1 + gamma), sigma
            x = x + noise_source(x) * ((sigma**2 - lower**2).sqrt() * S_noise)
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(i, sigma, x, denoised)
        slope = (x - denoised) / sigma
        x_next = x + slope * (sigma_next - sigma)
        if sigma_next > 0:
            slope_next = (x_next - denoise(x_next, sigma_next)) / sigma_next
            x_next = x + (slope + slope_next) * ((sigma_next - sigma) / 2)
        x = x_next
    return x
