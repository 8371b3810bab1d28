"""Solvers of the probability-flow ODE and its stochastic relatives, as pure functions.

On continuous noise levels ``heun``, ``euler``, ``dpm_solver_pp``, ``dpm_solver_pp_sde`` and ``unipc`` are
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
    order: int = 2,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    after_step: AfterStep = keep,
) -> Tensor:
    """DPM-Solver++(2M) (arXiv 2211.01095, Algorithm 2) or, with ``order`` 3, (3M). One evaluation a step, no noise.

    Order 3 integrates the parabola through three images exactly. diffusers gives its second difference half that
    weight, and is of second order.
    """
    return _multistep(denoise, noise, sigmas, order, callback, after_step)


def unipc(
    denoise: Denoiser,
    noise: Tensor,
    sigmas: Tensor,
    *,
    order: int = 3,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    after_step: AfterStep = keep,
) -> Tensor:
    """UniPC with B₂ on denoised images (arXiv 2302.04867): order p predicts, p + 1 corrects. One evaluation a step.

    The image that a predicted state is denoised to also corrects that state, before the next one is predicted. Adds
    no noise.
    """
    return _multistep(denoise, noise, sigmas, order, callback, after_step, correct=True)


def _multistep(
    denoise: Denoiser,
    noise: Tensor,
    sigmas: Tensor,
    order: int,
    callback: Callback | None,
    after_step: AfterStep,
    *,
    correct: bool = False,
) -> Tensor:
    """x ← (σ'/σ)·x + ∫ e^(λ − λ')·D dλ over the step, with λ = −ln σ and D the polynomial through past images.

    The first steps have fewer images. Onto σ = 0 the last step uses one, and the one before it at most two.
    """
    if not 1 <= order <= 3:
        raise ValueError(f"order {order}: multistep solvers are of order 1 to 3")
    sigmas = sigmas.cpu().double()
    lambdas, steps, to_zero = -sigmas.log(), len(sigmas) - 1, bool(sigmas[-1] == 0)
    x, images = noise * sigmas[0], list[Tensor]()  # newest first
    change, used = torch.zeros_like(x), 0
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(i, sigma, x, denoised)
        images = [denoised, *images[:order]]
        if correct and i > 0:  # the step that led here again, now with the image at its end
            places = torch.tensor([*range(i - 1, i - 1 - used, -1), i])
            x = x - change + _integral(lambdas[i - 1], lambdas[i], lambdas[places], [*images[1 : used + 1], denoised])
        used = min(order, i + 1, steps - i if to_zero else order)
        places = torch.arange(i, i - used, -1)
        change = _integral(lambdas[i], lambdas[i + 1], lambdas[places], images[:used])
        x = after_step(i, sigma, x * (sigma_next / sigma) + change)
    return x


def _integral(start: Tensor, end: Tensor, places: Tensor, images: list[Tensor]) -> Tensor:
    """∫ e^(λ − end)·D(λ) dλ from ``start`` to ``end``, D the polynomial through ``images`` at λ = ``places``.

    The first place is ``start``. Of two images the integral is that of DPM-Solver++(2M) and of UniPC's B₂: the images
    extra- or interpolated to the middle of the step.
    """
    h = end - start
    moments = [-torch.expm1(-h)]  # ∫ e^(u − h)·(u/h)^k du, u from 0 to h
    if len(images) == 2:
        moments.append(moments[0] / 2)
    while len(moments) < len(images):
        moments.append(1 - len(moments) * moments[-1] / h)
    powers = torch.stack([((places - start) / h) ** k for k in range(len(images))])
    weights = torch.linalg.solve(powers, torch.stack(moments))
    return sum((weight * image for weight, image in zip(weights, images, strict=True)), torch.zeros_like(images[0]))


def dpm_solver_pp_sde(
    denoise: Denoiser,
    noise: Tensor,
    sigmas: Tensor,
    *,
    eta: float = 1.0,
    noise_source: NoiseSource | None = None,
    callback: Callback | None = None,
    after_step: AfterStep = keep,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095), of second order but for the noise. One evaluation a step.

    ``eta`` 0 is DPM-Solver++(2M), 1 the reverse-time SDE. The last step onto σ = 0 adds no noise.
    """
    if eta > 0 and noise_source is None:
        raise ValueError("eta > 0 adds noise in every step: pass noise_source, for example torch.randn_like")
    sigmas = sigmas.cpu().double()
    x, before, h_before = noise * sigmas[0], noise, torch.tensor(torch.inf, dtype=torch.float64)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        if callback is not None:
            callback(i, sigma, x, denoised)
        h = (sigma / sigma_next).log()
        target = denoised if i == 0 or sigma_next == 0 else torch.lerp(before, denoised, float(1 + h / (2 * h_before)))
        kept = (-(1 + eta) * h).exp()
        x = target + (x - target) * kept
        if eta > 0 and sigma_next > 0 and noise_source is not None:
            x = x + noise_source(x) * (sigma_next * (-torch.expm1(-2 * eta * h)).sqrt())
        x = after_step(i, sigma, x)
        before, h_before = denoised, h
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
