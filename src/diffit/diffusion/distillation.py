"""Students that sample in few steps: progressive distillation and consistency tuning, as losses like any other.

References: Salimans & Ho, arXiv 2202.00512 (progressive); Meng et al., arXiv 2210.03142 (of a guided teacher);
Geng et al., arXiv 2406.14548 (easy consistency tuning, ECT). After the change of variables x/√ᾱ = x₀ + σε a discrete
schedule is one more list of noise levels and DDIM is Euler's method, so one loss serves both families.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffit.diffusion import edm
from diffit.diffusion.edm import EDMLoss
from diffit.diffusion.guidance import Denoiser, like

Step = Callable[[Denoiser, Tensor, Tensor, Tensor], Tensor]
"""``step(denoise, x, sigma, sigma_next) -> x``: one deterministic step, each sample ``(B, …)`` with levels ``(B,)``."""


def euler_step(denoise: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """D + (σ'/σ)·(x − D): DDIM's step."""
    denoised = denoise(x, sigma)
    return denoised + (x - denoised) * like(sigma_next / sigma, x)


def heun_step(denoise: Denoiser, x: Tensor, sigma: Tensor, sigma_next: Tensor) -> Tensor:
    """Second order (EDM, Algorithm 1), but Euler's step where it ends in 0."""
    slope = (x - denoise(x, sigma)) / like(sigma, x)
    x_next = x + slope * like(sigma_next - sigma, x)
    level = torch.where(sigma_next > 0, sigma_next, sigma)  # any above 0 for those that do not use it
    slope_next = (x_next - denoise(x_next, level)) / like(level, x)
    corrected = x + (slope + slope_next) * like((sigma_next - sigma) / 2, x)
    return torch.where(like(sigma_next, x) > 0, corrected, x_next)


def one_step_target(x: Tensor, x_end: Tensor, sigma: Tensor, sigma_end: Tensor) -> Tensor:
    """The denoised image whose single DDIM step leads from ``x`` to ``x_end`` (arXiv 2202.00512, Algorithm 2)."""
    ratio = like(sigma_end / sigma, x)
    return (x_end - ratio * x) / (1 - ratio)


def truncated_snr(sigma: Tensor) -> Tensor:
    """max(SNR, 1) with SNR = 1/σ²: the weight of an error in x₀ (arXiv 2202.00512, Section 4)."""
    return sigma.pow(-2).clamp(min=1)


class ProgressiveLoss:
    """Weighted ‖D(x; σ) − x̃‖², where one step of the student from x to x̃ does what two of its teacher's do.

    A network that learns its variance keeps the rows of its last layer that give it: no gradient reaches them, and
    DDIM, the one sampler that the student is for, does not read them.
    """

    level_name = "step"

    def __init__(
        self,
        teacher: Callable[[Tensor | None], Denoiser],
        student: Callable[[Any, Tensor | None], Denoiser],
        sigmas: Tensor,
        step: Step = euler_step,
    ) -> None:
        """``teacher(labels)`` and ``student(net, labels)`` are denoisers.

        ``sigmas`` ``(2n + 1,)`` float64 are the teacher's levels, falling to 0, on the images' device; a student of n
        steps has every second.
        """
        assert len(sigmas) % 2 == 1
        self.teacher, self.student, self.step = teacher, student, step
        self.sigmas = sigmas
        self.steps = len(sigmas) // 2

    def draw_level(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One of the student's steps per image, counted from the clean end: ``(B,)`` int64."""
        return torch.randint(self.steps, (images.shape[0],), device=images.device, generator=generator)

    def bin_edges(self, bins: int) -> Tensor:
        """Steps between bins that training visits equally often."""
        return torch.arange(1, bins) * self.steps / bins

    def __call__(
        self,
        net: Any,
        images: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """``images`` ``(B, C, H, W)``, clean -> loss, a mean over pixels, ``(B,)``.

        ``generator`` lives on the images' device. ``level`` ``(B,)`` replaces the sampled steps.
        """
        assert augment_labels is None
        i = self.draw_level(images, generator) if level is None else level
        start, middle, end = (self.sigmas[2 * (self.steps - 1 - i) + k] for k in range(3))
        noise = torch.randn(images.shape, device=images.device, dtype=images.dtype, generator=generator)
        # In float64, as while sampling: at σ = 80 a float32 keeps five digits of the image.
        x = images.double() + like(start, images.double()) * noise
        with torch.no_grad():
            teacher = self.teacher(labels)
            x_end = self.step(teacher, self.step(teacher, x, start, middle), middle, end)
            target = one_step_target(x, x_end, start, end)
        error = self.student(net, labels)(x, start) - target
        return (truncated_snr(start) * error.square().flatten(1).mean(1)).to(images.dtype)


class ConsistencyLoss(EDMLoss):
    """(√(d² + c²) − c)/(t − r) with d the root mean square of D(y + tε; t) − sg D(y + rε; r), the same ε in both.

    The ratio r/t tends to 1 in stages: 1 − n(t)/qᵃ, at least 0, with n(t) = 1 + 8/(1 + eᵗ) and a = 1 … ``stages`` (ECT,
    Section 3). The root is the adaptive weight 1/√(d² + c²) of the squared error.
    """

    def __init__(
        self,
        P_mean: float = -1.1,
        P_std: float = 2.0,
        sigma_data: float = 0.5,
        *,
        stages: int = 8,
        q: float = 2.0,
        c: float = 0.00054,
        progress: Callable[[], float] = lambda: 0.0,
    ) -> None:
        """``progress()`` is the share of the training that is done, which decides the stage."""
        super().__init__(P_mean, P_std, sigma_data)
        self.stages, self.q, self.c, self.progress = stages, q, c, progress

    def earlier(self, t: Tensor) -> Tensor:
        """The noise level r < t of the target, like ``t``."""
        stage = min(int(self.progress() * self.stages), self.stages - 1) + 1
        return t * (1 - (1 + 8 * torch.sigmoid(-t)) / self.q**stage).clamp(min=0)

    def __call__(
        self,
        net: Any,
        images: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """``images`` ``(B, C, H, W)`` in [−1, 1] -> loss ``(B,)``; ``level`` ``(B,)`` replaces the sampled t."""
        t = self.draw_level(images, generator) if level is None else level
        r = self.earlier(t)
        noise = torch.randn(images.shape, device=images.device, dtype=images.dtype, generator=generator)
        denoise = edm.denoiser(net, labels, augment_labels, sigma_data=self.sigma_data)
        devices, kind = [images.device] if images.is_cuda else [], images.device.type
        # Weights that autocast casts here and keeps would have no gradient in the other pass.
        casts = torch.autocast(
            kind, torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
        )
        with torch.no_grad(), casts, torch.random.fork_rng(devices=devices):  # both passes with the same dropout mask
            known = denoise(images + like(r, images) * noise, torch.where(r > 0, r, t))
            target = torch.where(like(r, images) > 0, known, images)  # D(y; 0) = y
        error = denoise(images + like(t, images) * noise, t) - target
        distance = (error.square().flatten(1).mean(1) + self.c**2).sqrt() - self.c
        return distance / (t - r)
