"""Solvers of the probability-flow ODE and its stochastic relatives, as pure functions.

On continuous noise levels ``heun``, ``euler`` and ``dpm_solver_pp`` are
``sampler(denoise, noise, sigmas, *, noise_source, callback, after_step) -> x``:

- ``noise`` is standard normal, ``(B, …)``; the state keeps its dtype and device (float64 costs nothing here);
- ``sigmas`` falls, and ends in 0 for a clean image; it is read on the CPU;
- ``noise_source(x)`` returns standard normal noise like ``x``: ``torch.randn_like``, or a
  :class:`~diffit.utils.randomness.PerSampleNoise` for samples that do not depend on their batch;
- ``callback(i, sigma, x, denoised)`` is called once a step, before the state is advanced;
- ``after_step(i, sigma, x)`` is called afterwards, and returns the state to go on with.

``consistency`` takes the same; its denoiser must be that of a consistency model.

On a discrete schedule ``ddpm`` and ``ddim`` are called with ``(predict, noise, schedule, …)``: a network's output in
place of the denoised image; their callbacks see the timestep in place of sigma.
"""

from collections.abc import Callable
from itertools import pairwise
from math import sqrt

import torch
from torch import Tensor

from diffit.diffusion.adm import Predictor, Schedule, at, split_output
from diffit.diffusion.guidance import Denoiser

NoiseSource = Callable[[Tensor], Tensor]
Callback = Callable[[int, Tensor, Tensor, Tensor], None]
AfterStep = Callable[[int, Tensor, Tensor], Tensor]


def keep(i: int, level: Tensor, x: Tensor) -> Tensor:
    """The ``after_step`` that leaves the state as it is."""
    return x


def euler(
    denoise: Denoiser,
    noise: Tensor,
    sigmas: Tensor,
    *,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    after_step: AfterStep = keep,
) -> Tensor:
    """First order, one evaluation a step; the same steps as DDIM at η = 0. Adds no noise."""
    sigmas = sigmas.cpu().double()
    x = noise * sigmas[0]
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(i, sigma, x, denoised)
        x = after_step(i, sigma, denoised + (x - denoised) * (sigma_next / sigma))
    return x


def heun(
    denoise: Denoiser,
    noise: Tensor,
    sigmas: Tensor,
    *,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    after_step: AfterStep = keep,
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
        x = after_step(i, sigma, x_next)
    return x


def dpm_solver_pp(
    denoise: Denoiser,
    noise: Tensor,
    sigmas: Tensor,
    *,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    after_step: AfterStep = keep,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2): second order, one evaluation a step. Adds no noise.

    With λ = −ln σ and h the step in λ: x ← (σ'/σ)·x + (1 − e^−h)·D, D extrapolated from the last two denoised images.
    The first step, and the last onto σ = 0, are of first order.
    """
    sigmas = sigmas.cpu().double()
    x = noise * sigmas[0]
    previous: tuple[Tensor, float] | None = None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(i, sigma, x, denoised)
        h = float((sigma / sigma_next).log())  # inf onto σ = 0
        target = denoised
        if previous is not None and sigma_next > 0:
            before, h_before = previous
            target = torch.lerp(before, denoised, 1 + h / (2 * h_before))
        x = after_step(i, sigma, target + (x - target) * (sigma_next / sigma))
        previous = denoised, h
    return x


def ddpm(
    predict: Predictor,
    noise: Tensor,
    schedule: Schedule,
    *,
    noise_source: NoiseSource,
    clip: bool = False,
    callback: Callback | None = None,
    after_step: AfterStep = keep,
) -> Tensor:
    """Ancestral sampling (DDPM, Algorithm 2) with the network's variance where it learns one, else β̃.

    The last step adds no noise.
    """
    x = noise
    for i in reversed(range(len(schedule))):
        step, t = torch.tensor(i), schedule.timesteps[i]
        mean, log_variance, x0 = schedule.p_step(predict(x, t.reshape(1)), x, step, clip=clip)
        if callback is not None:
            callback(len(schedule) - 1 - i, t, x, x0)
        x = mean if i == 0 else mean + (log_variance / 2).exp() * noise_source(x)
        x = after_step(len(schedule) - 1 - i, t, x)
    return x


def ddim(
    predict: Predictor,
    noise: Tensor,
    schedule: Schedule,
    *,
    eta: float = 0.0,
    noise_source: NoiseSource | None = None,
    clip: bool = False,
    callback: Callback | None = None,
    after_step: AfterStep = keep,
) -> Tensor:
    """DDIM (arXiv 2010.02502, Eq. 12); ``eta`` 0 is deterministic, 1 has the noise of DDPM with β̃."""
    if eta > 0 and noise_source is None:
        raise ValueError("eta > 0 adds noise in every step: pass noise_source, for example torch.randn_like")
    x = noise
    spread = eta * schedule.posterior_variance.sqrt()
    for i in reversed(range(len(schedule))):
        step, t = torch.tensor(i), schedule.timesteps[i]
        eps, _ = split_output(predict(x, t.reshape(1)), x.shape[1])
        x0 = schedule.predict_x0(eps, x, step)
        if clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - at(schedule.alpha_bar.sqrt(), step, x) * x0) / at((1 - schedule.alpha_bar).sqrt(), step, x)
        if callback is not None:
            callback(len(schedule) - 1 - i, t, x, x0)
        before = schedule.alpha_bar_before
        x = at(before.sqrt(), step, x) * x0 + at((1 - before - spread**2).clamp(min=0).sqrt(), step, x) * eps
        if eta > 0 and i > 0 and noise_source is not None:
            x = x + at(spread, step, x) * noise_source(x)
        x = after_step(len(schedule) - 1 - i, t, x)
    return x


def consistency(
    denoise: Denoiser,
    noise: Tensor,
    sigmas: Tensor,
    *,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    after_step: AfterStep = keep,
) -> Tensor:
    """Multistep consistency sampling (arXiv 2303.01469, Algorithm 1): each step denoises, and adds new noise."""
    if len(sigmas) > 2 and noise_source is None:
        raise ValueError("every step but the last adds noise: pass noise_source, for example torch.randn_like")
    sigmas = sigmas.cpu().double()
    x = noise * sigmas[0]
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(i, sigma, x, denoised)
        x = denoised
        if sigma_next > 0 and noise_source is not None:
            x = x + noise_source(x) * sigma_next
        x = after_step(i, sigma, x)
    return x
