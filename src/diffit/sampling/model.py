"""From a network and seeds to images. The image of a seed depends on nothing else."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from diffit.configs.schema import DISCRETE, ADMDiffusion, Config, Sampling, explain
from diffit.diffusion import adm, edm
from diffit.diffusion.adm import schedule_of
from diffit.diffusion.guidance import Denoiser, Scale, guided, power_cosine, within
from diffit.diffusion.samplers import AfterStep, Callback, NoiseSource, ddim, ddpm, dpm_solver_pp, euler, heun, keep
from diffit.errors import UserError
from diffit.models import DiffiT
from diffit.models.latent import LatentDiffiT
from diffit.sampling.labels import random_labels
from diffit.utils.precision import DTYPES, autocast, channels_last
from diffit.utils.randomness import PerSampleNoise


def prepare(net: DiffiT, precision: str = "fp32") -> DiffiT:
    """Arrange a network for sampling in ``precision``, in place; it cannot be trained afterwards.

    Autocast would convert the matrices anew in every evaluation, so they are kept in the dtype that they are used in;
    what is added up between them stays float32.
    """
    net.eval().requires_grad_(False)
    if precision in DTYPES:
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(DTYPES[precision])
    return net if isinstance(net, LatentDiffiT) else channels_last(net)


def with_sampling(config: Config, changes: Mapping[str, Any]) -> Config:
    """``config`` with these fields of its sampling changed; :class:`UserError` for what cannot be with the model."""
    if changes.get("cfg_scale", 1) != 1 and not config.model.num_classes:
        raise UserError(
            f"guidance scale {changes['cfg_scale']:g}: the model has no classes to be guided to; leave it out"
        )
    try:
        return Config.model_validate(config.model_dump() | {"sampling": config.sampling.model_dump() | dict(changes)})
    except ValidationError as error:
        raise UserError(f"sampling options: {explain(error)}") from None


Evaluate = Callable[[Tensor, Tensor], Tensor]


def guide(
    evaluate: Callable[[Tensor | None], Evaluate],
    config: Config,
    labels: Tensor | None,
    sampling: Sampling,
    schedule: adm.Schedule | None = None,
) -> Evaluate:
    """``evaluate(labels)`` guided as ``sampling`` says, for classes ``(B,)`` or None for an unconditional model.

    On a ``schedule`` levels are timesteps and outputs hold ε and perhaps variances, which stay conditional.
    """
    if labels is None or sampling.cfg_scale == 1:
        return evaluate(labels)
    scale: float | Scale = sampling.cfg_scale
    if sampling.cfg_power is not None:
        scale = power_cosine(
            sampling.cfg_scale, sampling.cfg_power, timesteps=1000 if schedule is None else len(schedule)
        )
    if sampling.cfg_interval is not None:
        scale = within(scale, *sampling.cfg_interval, None if schedule is None else schedule.sigma_of)
    null = torch.full_like(labels, config.model.num_classes)
    channels = min(sampling.cfg_channels or config.model.sample_shape[0], config.model.sample_shape[0])
    return guided(evaluate(labels), evaluate(null), scale, channels, tolerance=sampling.cfg_skip)


def make_denoiser(net: Callable[..., Tensor], config: Config, labels: Tensor | None, sampling: Sampling) -> Denoiser:
    """The guided denoiser of a network of either family, for any continuous-time sampler."""
    diffusion = config.diffusion
    if diffusion.kind == "edm":
        return guide(lambda own: edm.denoiser(net, own, sigma_data=diffusion.sigma_data), config, labels, sampling)
    schedule = schedule_of(diffusion)
    predict = guide(lambda own: adm.predictor(net, own), config, labels, sampling, schedule)
    return adm.denoiser(predict, schedule, clip=diffusion.clip)


def run_sampler(
    net: Callable[..., Tensor],
    config: Config,
    labels: Tensor | None,
    noise: Tensor,
    sampling: Sampling,
    noise_source: NoiseSource,
    callback: Callback | None = None,
    after_step: AfterStep = keep,
) -> Tensor:
    """``sampling.sampler`` from ``noise`` to clean samples."""
    diffusion, (steps, spacing) = config.diffusion, spacing_of(sampling)
    hooks = {"noise_source": noise_source, "callback": callback, "after_step": after_step}
    if isinstance(diffusion, ADMDiffusion):
        schedule = schedule_of(diffusion)
        if sampling.sampler in DISCRETE:
            predict = guide(lambda own: adm.predictor(net, own), config, labels, sampling, schedule)
            sampler: Callable[..., Tensor] = ddpm if sampling.sampler == "ddpm" else partial(ddim, eta=sampling.eta)
            return sampler(predict, noise, schedule.respace(steps, spacing), clip=diffusion.clip, **hooks)
        multistep = sampling.sampler == "dpm++"
        sigmas = schedule.multistep_sigmas(steps, spacing) if multistep else schedule.respace(steps, spacing).sigmas()
    else:
        bounds = {name: getattr(sampling, name) for name in ("sigma_min", "sigma_max", "rho")}
        sigmas = edm.edm_sigmas(steps, **bounds)
    churn = {name: getattr(sampling, name) for name in ("S_churn", "S_min", "S_max", "S_noise")}
    solvers: dict[str, Callable[..., Tensor]]
    solvers = {"euler": euler, "dpm++": dpm_solver_pp, "heun": partial(heun, **churn)}
    denoise = make_denoiser(net, config, labels, sampling)
    return solvers[sampling.sampler](denoise, noise, sigmas, **hooks)


@torch.no_grad()
def sample(
    net: DiffiT,
    config: Config,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    *,
    sampling: Sampling | None = None,
    precision: str = "fp32",
    callback: Callback | None = None,
) -> Tensor:
    """One sample a seed, ``(len(seeds), C, H, W)`` float32, on the network's device.

    Images nominally in [−1, 1]; of a latent model latents, for :meth:`diffit.models.autoencoder.Autoencoder.decode`.
    ``labels`` ``(len(seeds),)`` are classes; a class-conditional model without them draws one a seed. ``sampling``
    defaults to that of ``config``. All seeds go through the network together: split them to bound the memory.
    """
    sampling = sampling or config.sampling
    device = next(net.parameters()).device
    shape = (len(seeds), *config.model.sample_shape)
    if not seeds:
        return torch.empty(shape, device=device)
    if config.model.num_classes:
        labels = (random_labels(seeds, config.model.num_classes) if labels is None else labels).to(device)
    noise_source = PerSampleNoise(seeds)
    # The solver's own arithmetic in float64 costs nothing beside the network and keeps its rounding out of the images.
    noise = noise_source(torch.empty(shape, dtype=torch.float64, device=device))
    with autocast(device, precision):
        return run_sampler(net, config, labels, noise, sampling, noise_source, callback).float()


def count_evaluations(config: Config) -> tuple[int, int]:
    """(with, without the class): forward passes an image by the default sampling of ``config``.

    The sampler runs on a network that only counts, so that halves that guidance skips are left out as they will be.
    """
    model = config.model
    calls: list[bool] = []

    def net(x: Tensor, level: Tensor, labels: Tensor | None = None, *rest: object) -> Tensor:
        calls.append(labels is None or int(labels[0]) < model.num_classes)
        return torch.zeros(1, 2 if model.family == "latent" else 1, 1, 1, dtype=x.dtype)

    labels = torch.zeros(1, dtype=torch.int64) if model.num_classes else None
    noise = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    run_sampler(net, config, labels, noise, config.sampling, torch.zeros_like)
    return sum(calls), len(calls) - sum(calls)


def steps_of(config: Config) -> int:
    """Steps of the default sampling."""
    return spacing_of(config.sampling)[0]


def spacing_of(sampling: Sampling) -> tuple[int, adm.Spacing]:
    """Steps, and how they are spaced: ``ddim50`` is 50 by a whole stride."""
    text = str(sampling.steps)
    return int(text.removeprefix("ddim")), "leading" if text.startswith("ddim") else "linspace"
