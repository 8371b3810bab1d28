"""From a network and seeds to images. The image of a seed depends on nothing else."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from diffit.configs.schema import Config, Sampling
from diffit.diffusion import edm
from diffit.diffusion.guidance import Denoiser, guided
from diffit.diffusion.samplers import Callback, euler, heun
from diffit.models.image import ImageDiffiT
from diffit.randomness import PerSampleNoise, random_labels


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """The context that evaluates networks in ``precision``: fp32 (nothing), bf16 or fp16."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return torch.autocast(device.type, dtypes[precision]) if precision in dtypes else nullcontext()


def channels_last(net: ImageDiffiT) -> ImageDiffiT:
    """Convolutions that hand over tokens without a copy: a fifth faster in fp32 on a CPU, twice in bf16."""
    return net.to(memory_format=torch.channels_last)


def resolve_precision(precision: str, device: torch.device) -> str:
    """What ``auto`` means on this device."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"


def make_denoiser(net: Callable[..., Tensor], config: Config, labels: Tensor | None, cfg_scale: float) -> Denoiser:
    """The guided denoiser of a network for the classes in ``labels`` ``(B,)``, None for an unconditional one."""
    sigma_data = config.diffusion.sigma_data
    denoise = edm.denoiser(net, labels, sigma_data=sigma_data)
    if labels is None or cfg_scale == 1:
        return denoise
    null = torch.full_like(labels, config.model.num_classes)
    return guided(denoise, edm.denoiser(net, null, sigma_data=sigma_data), cfg_scale)


def run_sampler(
    denoise: Denoiser, noise: Tensor, sampling: Sampling, noise_source: PerSampleNoise, callback: Callback | None = None
) -> Tensor:
    sigmas = edm.edm_sigmas(
        sampling.steps, sigma_min=sampling.sigma_min, sigma_max=sampling.sigma_max, rho=sampling.rho
    )
    if sampling.sampler == "euler":
        return euler(denoise, noise, sigmas, noise_source=noise_source, callback=callback)
    churn = {name: getattr(sampling, name) for name in ("S_churn", "S_min", "S_max", "S_noise")}
    return heun(denoise, noise, sigmas, noise_source=noise_source, callback=callback, **churn)


@torch.no_grad()
def sample(
    net: ImageDiffiT,
    config: Config,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    *,
    sampling: Sampling | None = None,
    precision: str = "fp32",
    callback: Callback | None = None,
) -> Tensor:
    """One image a seed, ``(len(seeds), C, H, W)`` float32, nominally in [−1, 1], on the network's device.

    ``labels`` ``(len(seeds),)`` are classes; a class-conditional model without them draws one a seed. ``sampling``
    defaults to that of ``config``. All seeds go through the network together: split them to bound the memory.
    """
    sampling = sampling or config.sampling
    device = next(net.parameters()).device
    shape = (len(seeds), config.model.channels, *config.model.image_size)
    if not seeds:
        return torch.empty(shape, device=device)
    if config.model.num_classes:
        labels = (random_labels(seeds, config.model.num_classes) if labels is None else labels).to(device)
    noise_source = PerSampleNoise(seeds)
    # The solver's own arithmetic in float64 costs nothing beside the network and keeps its rounding out of the images.
    noise = noise_source(torch.empty(shape, dtype=torch.float64, device=device))
    with autocast(device, precision):
        denoise = make_denoiser(net, config, labels, sampling.cfg_scale)
        return run_sampler(denoise, noise, sampling, noise_source, callback).float()


def to_uint8(images: Tensor) -> Tensor:
    """[−1, 1] to the nearest of the levels 0…255."""
    return (images.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_float(images: Tensor) -> Tensor:
    """Levels 0…255 to float32 in [−1, 1]."""
    return images.float() / 127.5 - 1
