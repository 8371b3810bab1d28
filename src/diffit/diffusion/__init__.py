"""Pure functions and losses: preconditioning, schedules, guidance, samplers."""

from diffit.diffusion import adm, edm
from diffit.diffusion.adm import ADMLoss, Schedule, predictor
from diffit.diffusion.distillation import ConsistencyLoss, ProgressiveLoss
from diffit.diffusion.edm import EDMLoss, edm_sigmas, lambda_sigmas
from diffit.diffusion.guidance import guided, power_cosine, within
from diffit.diffusion.samplers import consistency, ddim, ddpm, dpm_solver_pp, dpm_solver_pp_sde, euler, heun, unipc

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
    "dpm_solver_pp_sde",
    "edm",
    "edm_sigmas",
    "euler",
    "guided",
    "heun",
    "lambda_sigmas",
    "power_cosine",
    "predictor",
    "unipc",
    "within",
]
