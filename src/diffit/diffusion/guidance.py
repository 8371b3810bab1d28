"""Classifier-free guidance (arXiv 2207.12598) as a wrapper round two denoisers, and schedules of its scale."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
"""``denoise(x, sigma) -> x0``: x ``(B, …)``, sigma a tensor of no dimension or ``(B,)``."""

Scale = Callable[[Tensor], float]
"""The guidance scale at a noise level: sigma, or the timestep on a discrete schedule."""


def like(levels: Tensor, x: Tensor) -> Tensor:
    """Levels ``(B,)`` or ``()`` to multiply with ``x`` ``(B, …)``: in its dtype, on its device."""
    return levels.to(x.device, x.dtype, non_blocking=True).reshape(-1, *[1] * (x.ndim - 1))


def guided(
    denoise_cond: Denoiser,
    denoise_uncond: Denoiser,
    scale: float | Scale,
    channels: int | None = None,
    *,
    tolerance: float = 0.0,
) -> Denoiser:
    """u + s·(c − u), with s the constant ``scale`` or ``scale(sigma)``.

    ``channels`` guides only the first so many channels; the others stay conditional. Where s is within ``tolerance``
    of 1 the unconditional denoiser is not evaluated; samplers pass sigma on the CPU, so that this check needs no
    host–device synchronisation. Of several levels, ``(B,)``, each sample has the scale of its own. A network's raw
    output may stand in for the denoised image: guidance is linear, and ``channels`` keeps its variances conditional.
    """

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        cond = denoise_cond(x, sigma)
        s: float | Tensor
        if callable(scale) and sigma.numel() > 1:
            values = torch.tensor([float(scale(level)) for level in sigma.detach().flatten().cpu()])
            values = torch.where((values - 1).abs() <= tolerance, 1.0, values)
            s = like(values, x)
        else:
            s = float(scale(sigma.detach())) if callable(scale) else scale
            if abs(s - 1) <= tolerance:
                return cond
        part = slice(None, channels)
        mixed = torch.lerp(denoise_uncond(x, sigma)[:, part], cond[:, part], s)
        return mixed if channels is None else torch.cat([mixed, cond[:, channels:]], dim=1)

    return denoise


def power_cosine(scale: float, power: float = 4.0, *, timesteps: int = 1000) -> Scale:
    """1 + (S − 1)·½(1 − cos(π(1 − t/T)^power)): from 1 at the noisiest timestep t = T to S at t = 0."""

    def at(t: Tensor) -> float:
        return 1 + (scale - 1) * 0.5 * (1 - math.cos(math.pi * (1 - float(t) / timesteps) ** power))

    return at


def within(scale: float | Scale, low: float, high: float, sigma_of: Callable[[Tensor], Tensor] | None = None) -> Scale:
    """``scale`` at noise levels sigma in (low, high], no guidance elsewhere (arXiv 2404.07724).

    On a discrete schedule ``sigma_of`` is the sigma of a timestep.
    """

    def at(level: Tensor) -> float:
        sigma = level if sigma_of is None else sigma_of(level)
        if not low < float(sigma) <= high:
            return 1.0
        return float(scale(level)) if callable(scale) else scale

    return at
