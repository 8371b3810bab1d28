"""Classifier-free guidance (arXiv 2207.12598) as a wrapper round two denoisers."""

from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``denoise(x, sigma) -> x0``: x ``(B, …)``, sigma a tensor of no dimension or ``(B,)``."""


def guided(
    denoise_cond: Denoiser,
    denoise_uncond: Denoiser,
    scale: float | Callable[[Tensor], float],
    channels: int | None = None,
) -> Denoiser:
    """u + s·(c − u), with s the constant ``scale`` or ``scale(sigma)``.

    ``channels`` guides only the first so many channels; the others stay conditional. Where the scale is 1 the
    unconditional denoiser is not evaluated, which is why samplers pass sigma on the CPU: asking costs no wait.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        s = float(scale(sigma)) if callable(scale) else scale
        cond = denoise_cond(x, sigma)
        if s == 1:
            return cond
        guided = torch.lerp(denoise_uncond(x, sigma), cond, s)
        return guided if channels is None else torch.cat([guided[:, :channels], cond[:, channels:]], dim=1)

    return denoise
