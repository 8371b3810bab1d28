"""The loss that a configuration asks for: that of its diffusion, or of a student and its teacher."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffit.configs.schema import ADMDiffusion, Config
from diffit.diffusion.adm import ADMLoss, schedule_of
from diffit.diffusion.distillation import ConsistencyLoss, ProgressiveLoss, euler_step, heun_step
from diffit.diffusion.edm import EDMLoss
from diffit.diffusion.guidance import Denoiser
from diffit.errors import UserError
from diffit.sampling.levels import noise_levels
from diffit.sampling.model import Model, prepare
from diffit.weights.file import load_network, state_hash

Loss = EDMLoss | ADMLoss | ProgressiveLoss
"""``(net, images, labels, augment_labels, *, generator, level) -> per-sample loss (B,)``."""


def build_loss(
    config: Config, device: torch.device, precision: str = "fp32", progress: Callable[[], float] = lambda: 0.0
) -> Loss:
    """The training loss of ``config``, for images on ``device``; ``progress()`` is the share of the run that is done.

    Raises :class:`UserError` where the teacher is not there, or not the one that the configuration names.
    """
    diffusion, student = config.diffusion, config.distillation
    if student is not None and student.method == "progressive":
        return _progressive(config, device, precision)
    if isinstance(diffusion, ADMDiffusion):
        return ADMLoss(schedule_of(diffusion).to(device), diffusion.prediction)
    if student is not None:
        return ConsistencyLoss(sigma_data=diffusion.sigma_data, progress=progress)
    return EDMLoss(diffusion.P_mean, diffusion.P_std, diffusion.sigma_data)


def _progressive(config: Config, device: torch.device, precision: str) -> ProgressiveLoss:
    spec, diffusion = config.distillation, config.diffusion
    assert spec is not None
    assert spec.teacher_sampling is not None
    net, teacher = load_network(spec.teacher, device, dtype=None)
    if (found := state_hash(net.state_dict())) != spec.teacher_sha256:
        raise UserError(
            f"{spec.teacher}: other weights than the run's teacher had ({spec.teacher_sha256[:12]}, now {found[:12]}); "
            "restore them, or begin a new run with --resume none"
        )
    sampling = spec.teacher_sampling
    taught = teacher.model_copy(update={"sampling": sampling})
    if isinstance(diffusion, ADMDiffusion):
        # The student learns without the clamp of pixels, which would let no gradient through.
        config = config.model_copy(update={"diffusion": diffusion.model_copy(update={"clip": False})})

    def student(net: Any, labels: Tensor | None) -> Denoiser:
        return Model(net, config).denoiser(labels)

    taught_by = Model(prepare(net.float(), precision), taught, None, precision)
    step = heun_step if sampling.sampler == "heun" else euler_step
    sigmas = noise_levels(taught).to(device)
    return ProgressiveLoss(taught_by.denoiser, student, sigmas, step)
