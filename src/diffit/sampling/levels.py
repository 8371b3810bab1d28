"""The samplers on continuous noise levels by name, and the levels that they step through."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from diffit.configs.sampling import MULTISTEP, Sampling
from diffit.configs.schema import ADMDiffusion, Config
from diffit.diffusion.adm import schedule_of
from diffit.diffusion.edm import edm_sigmas, lambda_sigmas
from diffit.diffusion.samplers import consistency, dpm_solver_pp, dpm_solver_pp_sde, euler, heun, unipc

SOLVERS: dict[str, Callable[..., Tensor]] = {
    "heun": heun,
    "euler": euler,
    "dpm++": dpm_solver_pp,
    "dpm++3m": partial(dpm_solver_pp, order=3),
    "dpm++2m-sde": dpm_solver_pp_sde,
    "unipc2": partial(unipc, order=2),
    "unipc": unipc,
    "consistency": consistency,
}


def solver_of(sampling: Sampling) -> Callable[..., Tensor]:
    """The sampler of the settings as ``solver(denoise, noise, sigmas, …)``."""
    own = {"heun": ("S_churn", "S_min", "S_max", "S_noise"), "dpm++2m-sde": ("eta",)}.get(sampling.sampler, ())
    return partial(SOLVERS[sampling.sampler], **{name: getattr(sampling, name) for name in own})


def noise_levels(config: Config) -> Tensor:
    """Falling noise levels sigma of a continuous-time sampler's steps, then 0: float64 ``(steps + 1,)`` on the CPU."""
    diffusion, sampling = config.diffusion, config.sampling
    if (fitted := sampling.fitted_sigmas) is not None:
        return torch.tensor([*fitted, 0.0], dtype=torch.float64)
    if not isinstance(diffusion, ADMDiffusion):
        low, high = sampling.sigma_min, sampling.sigma_max
        if sampling.sampler == "consistency":
            levels = [high, sampling.sigma_mid or 0.0][: sampling.steps]
            return torch.tensor([*levels, 0.0], dtype=torch.float64)
        if sampling.levels == "lambda":
            return lambda_sigmas(sampling.steps, low, high)
        trailing = sampling.spacing == "trailing"
        return edm_sigmas(sampling.steps, sigma_min=low, sigma_max=high, rho=sampling.rho, trailing=trailing)
    schedule = schedule_of(diffusion)
    if sampling.levels == "lambda":
        return lambda_sigmas(sampling.steps, float(schedule.sigma[0]), float(schedule.sigma[-1]))
    if sampling.sampler in MULTISTEP:
        return schedule.multistep_sigmas(sampling.steps, sampling.spacing)
    return schedule.respace(sampling.steps, sampling.spacing).sigmas()
