"""From an image to others: variations of it, and what could be in a part of it.

Both start from noisy states of the image, and use the model as a denoiser at continuous noise levels. A model that is
sampled by ``ddim`` or ``ddpm`` takes the same steps there: Euler's are those of DDIM at η = 0, :func:`ancestral_step`
is that of DDPM with the variance β̃.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffit.configs.sampling import Sampling
from diffit.diffusion.guidance import Denoiser
from diffit.diffusion.samplers import Callback, NoiseSource, euler
from diffit.errors import UserError
from diffit.sampling import levels
from diffit.sampling.labels import Labels, choose_labels
from diffit.sampling.model import Model
from diffit.utils.randomness import PerSampleNoise


def noise_levels(model: Model) -> Tensor:
    """The noise levels sigma of the model's steps, falling, then 0: float64 ``(steps + 1,)``.

    UserError for a student of few steps, which denoises from its own levels only.
    """
    if model.config.distillation is not None:
        raise UserError("a student of few steps knows only its own noise levels; edit with its teacher")
    return levels.noise_levels(model.config)


def ancestral_step(x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: NoiseSource) -> Tensor:
    """A sample of q(x' | x, x₀ = denoised): DDPM's Eq. 7 after the change of variables x/√ᾱ = x₀ + σε."""
    keep = float(sigma_next / sigma) ** 2
    mean = torch.lerp(denoised, x, keep)
    return mean if sigma_next == 0 else mean + noise(x) * (float(sigma_next) * math.sqrt(1 - keep))


@torch.no_grad()
def vary(
    model: Model,
    images: Tensor,
    level: float,
    seeds: Sequence[int] | None = None,
    labels: Labels = None,
    *,
    callback: Callback | None = None,
    **settings: Any,
) -> Tensor:
    """Noise images to ``level`` and denoise them (SDEdit, arXiv 2108.01073): ``(B, C, H, W)`` float32.

    Args:
        images: ``(B, C, H, W)`` in [−1, 1] of the model's own size; one image for all ``seeds`` or one for each.
        level: sigma. Layout and colours of what is larger than the noise stay; at 0.5 an image is about half noise.
        seeds: of the noise; 0 to B − 1 where they are left out.
        labels: classes as in :meth:`Model.sample`.
    """
    if settings:
        model = model.with_sampling(**settings)
    own = noise_levels(model)
    if not 0 < level <= own[0]:
        raise UserError(f"level {level:g}: use a noise level sigma above 0 and up to {own[0]:g}, such as 1")
    seeds = range(len(images)) if seeds is None else seeds
    x, drawn = _as_state(model, images, seeds), PerSampleNoise(seeds)
    sigmas = torch.cat([own.new_tensor([level]), own[own < level]])
    solve = _solver(model.config.sampling)
    denoise = denoiser_for(model, seeds, labels)
    x = solve(denoise, x / level + drawn(x), sigmas, noise_source=drawn, callback=callback)
    return _decode(model, x)


@torch.no_grad()
def inpaint(
    model: Model,
    images: Tensor,
    mask: Tensor,
    seeds: Sequence[int] | None = None,
    labels: Labels = None,
    *,
    resamples: int = 10,
    callback: Callback | None = None,
    **settings: Any,
) -> Tensor:
    """What could be where ``mask`` is true (RePaint, arXiv 2201.09865, Algorithm 1): ``(B, C, H, W)`` float32.

    Every step is taken ``resamples`` times, with its noise put back in between, so that both parts agree. The pixels
    where the mask is false are those of ``images``, to the bit; of a latent model the seam is where the mask is.

    Args:
        images: ``(B, C, H, W)`` in [−1, 1] of the model's own size; one image for all ``seeds`` or one for each.
        mask: bool ``(H, W)``, or ``(B, 1, H, W)``; true where the image is to be painted.
        resamples: 1 is without resampling.
    """
    if resamples < 1:
        raise UserError(f"resamples {resamples}: every step is taken at least once; use 10")
    if settings:
        model = model.with_sampling(**settings)
    seeds = range(len(images)) if seeds is None else seeds
    known, drawn = _as_state(model, images, seeds), PerSampleNoise(seeds)
    mask = mask.to(model.device).expand(len(seeds), 1, *model.config.image_shape[1:])
    factor = 1 if model.autoencoder is None else model.autoencoder.factor
    hole = F.max_pool2d(mask.double(), factor) > 0  # a latent is free where one of its pixels is
    sigmas = noise_levels(model)
    x = drawn(known) * sigmas[0]
    denoise = denoiser_for(model, seeds, labels)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        for again in reversed(range(resamples if sigma_next > 0 else 1)):
            denoised = denoise(x, sigma)
            if callback is not None:
                callback(i, sigma, x, torch.where(hole, denoised, known))
            x_next = ancestral_step(x, denoised, sigma, sigma_next, drawn)
            x_next = torch.where(hole, x_next, known + drawn(x) * sigma_next if sigma_next > 0 else known)
            x = x_next + drawn(x) * (sigma**2 - sigma_next**2).sqrt() if again else x_next
    return torch.where(mask, _decode(model, x), images.to(model.device).float())


def denoiser_for(model: Model, seeds: Sequence[int], labels: Labels) -> Denoiser:
    """The model's denoiser for the classes of these seeds, as :meth:`Model.sample` would choose them."""
    classes = choose_labels(model.config, seeds, labels)
    return model.denoiser(None if classes is None else classes.to(model.device))


def _solver(sampling: Sampling) -> Callable[..., Tensor]:
    named: dict[str, Callable[..., Tensor]] = {"ddim": euler, "ddpm": _ancestral}
    return named.get(sampling.sampler) or levels.solver_of(sampling)


def _ancestral(
    denoise: Denoiser, noise: Tensor, sigmas: Tensor, *, noise_source: NoiseSource, callback: Callback | None
) -> Tensor:
    """:func:`ancestral_step` after the other, as the samplers of :mod:`diffit.diffusion.samplers` are called."""
    x = noise * sigmas[0]
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(i, sigma, x, denoised)
        x = ancestral_step(x, denoised, sigma, sigma_next, noise_source)
    return x


def _as_state(model: Model, images: Tensor, seeds: Sequence[int]) -> Tensor:
    """Images as the model's clean states, ``(len(seeds), C, h, w)`` float64: pixels, or the means of scaled latents."""
    shape = model.config.image_shape
    if images.ndim != 4 or tuple(images.shape[1:]) != shape:
        raise UserError(
            f"images {tuple(images.shape)}: this model takes (B, C, H, W) with {shape[0]} channels of "
            f"{shape[1]}×{shape[2]}; resize or convert them first"
        )
    if len(images) not in (1, len(seeds)):
        raise UserError(f"{len(images)} images for {len(seeds)} seeds: pass one image, or one for each seed")
    if model.autoencoder is not None:
        mean, _ = model.autoencoder.encode(images.float())
        images = mean * model.autoencoder.scale
    elif model.config.model.family == "latent":
        raise UserError("editing images with a latent model needs its autoencoder; pass vae=… when it is loaded")
    return images.to(model.device, torch.float64).expand(len(seeds), *images.shape[1:])


def _decode(model: Model, x: Tensor) -> Tensor:
    return x.float() if model.autoencoder is None else model.autoencoder.decode(x.float())
