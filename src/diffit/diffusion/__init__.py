"""Pure functions and losses: preconditioning, schedules, guidance, samplers."""

from diffit.diffusion import adm, edm
from diffit.diffusion.adm import ADMLoss, Schedule, predictor
from diffit.diffusion.distillation import ConsistencyLoss, ProgressiveLoss
from diffit.diffusion.edm import EDMLoss, edm_sigmas
from diffit.diffusion.guidance import guided, power_cosine, within
from diffit.diffusion.samplers import consistency, ddim, ddpm, dpm_solver_pp, euler, heun

__all__ = [
    "ADMLoss",
    "ConsistencyLoss",
    "EDMLoss",
    "ProgressiveLoss",
    "Schedule",
    "adm",
    "consistency",
    "ddim",
    "ddpm",
    "dpm_solver_pp",
    "edm",
    "edm_sigmas",
    "euler",
    "guided",
    "heun",
    "power_cosine",
    "predictor",
    "within",
]
