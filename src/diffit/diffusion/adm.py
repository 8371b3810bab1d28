"""Discrete noise schedules, respacing, learned-range variance and the hybrid loss (ADM and improved DDPM).

References: Ho et al., arXiv 2006.11239 (DDPM); Nichol & Dhariwal, arXiv 2102.09672 (iDDPM). All tables are float64.
A network's output holds ε, or v (Salimans & Ho, arXiv 2202.00512, Appendix D), in its first C channels and, where it
has 2C, the variance's place in its range after them.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from diffit.configs.schema import ADMDiffusion, Prediction
from diffit.diffusion.guidance import Denoiser, like

Spacing = Literal["linspace", "leading", "trailing"]

TRAILING_SIGMA = 80.0
"""As EDM's highest level. The cosine schedule goes on to 20,000, where x − σε has no digit of the image left."""

Predictor = Callable[[Tensor, Tensor], Tensor]
"""``predict(x, t) -> output``: x ``(B, C, …)``, t ``(1,)`` or ``(B,)`` original timesteps, output C or 2C channels."""


def linear_betas(steps: int = 1000) -> Tensor:
    """1e-4 to 0.02 at 1000 steps, scaled so that other numbers of steps end in as much noise: float64 ``(steps,)``."""
    scale = 1000 / steps
    return torch.linspace(scale * 1e-4, scale * 0.02, steps, dtype=torch.float64)


def cosine_betas(steps: int = 1000) -> Tensor:
    """From ᾱ(u) = cos²(π/2·(u + 0.008)/1.008), betas at most 0.999 (iDDPM, Eq. 17): float64 ``(steps,)``."""
    u = torch.arange(steps + 1, dtype=torch.float64) / steps
    alpha_bar = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


def space_timesteps(total: int, count: int, spacing: Spacing = "linspace") -> Tensor:
    """``count`` of ``total`` timesteps, ascending int64.

    ``linspace``: stride (total − 1)/(count − 1), the positions rounded, both ends included.
    ``leading``: every k-th timestep from 0 on, for the whole k that gives ``count``. Raises ValueError where none does.
    ``trailing``: ⌊k·total/count⌋ − 1 for k = 1 … count, of which every second is that of half as many.
    """
    if not 1 <= count <= total:
        raise ValueError(f"steps {count}: the schedule has {total} timesteps; use 1 to {total}")
    if spacing == "leading":
        timesteps = torch.arange(0, total, -(-total // count))
        if len(timesteps) != count:
            raise ValueError(
                f"steps {count}: no whole stride leaves {count} of {total} timesteps; use spacing linspace"
            )
        return timesteps
    if spacing == "trailing":
        return torch.arange(1, count + 1) * total // count - 1
    if spacing != "linspace":
        raise ValueError(f"spacing {spacing!r}: use linspace, leading or trailing")
    stride = (total - 1) / (count - 1) if count > 1 else 1.0
    # Added up one by one, as in the official implementation: a product may round the other way.
    return torch.tensor([round(position) for position in accumulate([0.0] + [stride] * (count - 1))])


@dataclass(frozen=True)
class Schedule:
    """A noise schedule: ``betas`` float64 ``(S,)`` and the original ``timesteps`` int64 ``(S,)`` of its steps."""

    betas: Tensor
    timesteps: Tensor

    @classmethod
    def named(cls, name: str, steps: int = 1000) -> "Schedule":
        """``linear`` or ``cosine``."""
        betas = {"linear": linear_betas, "cosine": cosine_betas}[name](steps)
        return cls(betas, torch.arange(steps))

    def to(self, device: torch.device) -> "Schedule":
        """The same with its tables on ``device``: a look-up of timesteps there needs no host–device synchronisation."""
        return Schedule(self.betas.to(device), self.timesteps.to(device))

    def respace(self, steps: int, spacing: Spacing = "linspace") -> "Schedule":
        """The schedule of fewer timesteps whose ᾱ are the same; see :func:`space_timesteps`.

        ``trailing`` begins where σ is at most :data:`TRAILING_SIGMA`.
        """
        total = int((self.sigma <= TRAILING_SIGMA).sum()) if spacing == "trailing" else len(self)
        kept = space_timesteps(total, steps, spacing)
        alpha_bar = self.alpha_bar[kept]
        before = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        return Schedule(1 - alpha_bar / before, self.timesteps[kept])

    def __len__(self) -> int:
        return len(self.betas)

    @cached_property
    def alpha_bar(self) -> Tensor:
        """ᾱ: the share of the clean image's variance that is left, ``(S,)``."""
        return (1 - self.betas).cumprod(0)

    @cached_property
    def alpha_bar_before(self) -> Tensor:
        """ᾱ one step closer to the clean image, ``(S,)``; 1 for the last."""
        return torch.cat([self.alpha_bar.new_ones(1), self.alpha_bar[:-1]])

    @cached_property
    def sigma(self) -> Tensor:
        """Noise levels after the change of variables x/√ᾱ = x₀ + σε: σ = √((1 − ᾱ)/ᾱ), ascending ``(S,)``."""
        return ((1 - self.alpha_bar) / self.alpha_bar).sqrt()

    @cached_property
    def posterior_variance(self) -> Tensor:
        """β̃ = β(1 − ᾱ₋₁)/(1 − ᾱ) (DDPM, Eq. 7), ``(S,)``."""
        return self.betas * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)

    @cached_property
    def posterior_log_variance(self) -> Tensor:
        """ln β̃, the first (ln 0) replaced by the second, ``(S,)``."""
        variance = self.posterior_variance
        return torch.cat([variance[1:2] if len(variance) > 1 else self.betas[:1], variance[1:]]).log()

    def sigmas(self) -> Tensor:
        """The trajectory of continuous-time samplers: falling noise levels, then 0, float64 ``(S + 1,)``."""
        return torch.cat([self.sigma.flip(0), self.sigma.new_zeros(1)])

    def multistep_sigmas(self, steps: int, spacing: Spacing = "linspace") -> Tensor:
        """The same for a multistep solver: with linspace, the levels of one timestep more without timestep 0, then 0.

        The step to timestep 0 is several times as long in ln σ as those before it; a solver that extrapolates from
        them over it is worse off than one of first order, and the level of 0.01 that it ends in gains nothing.
        """
        if spacing != "linspace" or steps >= len(self):
            return self.respace(steps, spacing).sigmas()
        return torch.cat([self.respace(steps + 1, spacing).sigmas()[:-2], self.sigma.new_zeros(1)])

    def timestep_of(self, sigma: Tensor) -> Tensor:
        """The fractional original timestep of a noise level, by linear interpolation in ln σ; like ``sigma``."""
        timesteps, levels = self._tables(sigma.device)
        return interpolate(sigma.double().log().clamp(levels[0], levels[-1]), levels, timesteps)

    def sigma_of(self, t: Tensor) -> Tensor:
        """The inverse of :meth:`timestep_of`, float64 on the device of ``t``."""
        timesteps, levels = self._tables(t.device)
        return interpolate(t.double(), timesteps, levels).exp()

    def _tables(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Timesteps and ln σ, both float64, on ``device``: brought there once, so that no evaluation waits for them."""
        if device not in self._moved:
            self._moved[device] = self.timesteps.double().to(device), self.sigma.log().to(device)
        return self._moved[device]

    @cached_property
    def _moved(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def posterior_mean(self, x0: Tensor, x: Tensor, i: Tensor) -> Tensor:
        """Mean of q(x₋₁ | x, x₀) at step ``i`` (DDPM, Eq. 7)."""
        share_x0 = self.alpha_bar_before.sqrt() * self.betas / (1 - self.alpha_bar)
        share_x = (1 - self.betas).sqrt() * (1 - self.alpha_bar_before) / (1 - self.alpha_bar)
        return at(share_x0, i, x) * x0 + at(share_x, i, x) * x

    def predict_x0(self, eps: Tensor, x: Tensor, i: Tensor) -> Tensor:
        """x₀ = (x − √(1 − ᾱ)·ε)/√ᾱ."""
        return at((1 / self.alpha_bar).sqrt(), i, x) * x - at((1 / self.alpha_bar - 1).sqrt(), i, x) * eps

    def log_variance(self, place: Tensor, i: Tensor) -> Tensor:
        """ln Σ = f·ln β + (1 − f)·ln β̃ with f = (place + 1)/2 (iDDPM, Eq. 15, where f is v)."""
        f = (place + 1) / 2
        return f * at(self.betas.log(), i, place) + (1 - f) * at(self.posterior_log_variance, i, place)

    def p_step(self, output: Tensor, x: Tensor, i: Tensor, *, clip: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, log variance and predicted x₀ of p(x₋₁ | x) for a network's ``output`` at step ``i``.

        Without learned variance it is β̃. ``clip`` clamps x₀ to [−1, 1].
        """
        eps, place = split_output(output, x.shape[1])
        x0 = self.predict_x0(eps, x, i)
        if clip:
            x0 = x0.clamp(-1, 1)
        log_variance = at(self.posterior_log_variance, i, x) if place is None else self.log_variance(place, i)
        return self.posterior_mean(x0, x, i), log_variance, x0


def interpolate(x: Tensor, xs: Tensor, ys: Tensor) -> Tensor:
    """Linear interpolation of the points (xs, ys), xs ascending; beyond them the last segment goes on."""
    high = torch.searchsorted(xs, x).clamp(min=1).clamp(max=len(xs) - 1)
    low = (high - 1).clamp(min=0)
    gap = torch.where(high > low, xs[high] - xs[low], 1.0)
    return torch.lerp(ys[low], ys[high], (x - xs[low]) / gap)


def at(table: Tensor, i: Tensor, x: Tensor) -> Tensor:
    """Entries ``i`` (B,) or () of a float64 table, to multiply with ``x`` ``(B, …)``: in its dtype, on its device.

    A step number on the CPU causes no host–device synchronisation.
    """
    return like(table.to(i.device)[i], x)


def split_output(output: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """ε, and the variance's place in its range where the network gives one."""
    if output.shape[1] == channels:
        return output, None
    if output.shape[1] != 2 * channels:
        raise ValueError(
            f"a network for {channels} channels must give {channels} or {2 * channels}, not {output.shape[1]}"
        )
    eps, place = output.split(channels, dim=1)
    return eps, place


def predictor(
    net: Callable[..., Tensor],
    class_labels: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    v_on: Schedule | None = None,
) -> Predictor:
    """The network for given classes as ``predict(x, t)``, which sees ``dtype`` and answers in the dtype of x.

    ``v_on`` is the schedule of a network that predicts v, whose output is turned into ε; None for one that predicts ε.
    """

    def predict(x: Tensor, t: Tensor) -> Tensor:
        steps = t.to(x.device, torch.float32, non_blocking=True)  # bfloat16 cannot tell 999 from 1000
        output = net(x.to(dtype), steps, class_labels).to(x.dtype)
        return output if v_on is None else noise_of_v(output, x, v_on.sigma_of(t))

    return predict


def noise_of_v(output: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The output with ε = √ᾱ·(v + σx), √ᾱ = 1/√(1 + σ²), in the place of v; a variance after it stays."""
    v, variance = split_output(output, x.shape[1])
    eps = like((1 + sigma**2).rsqrt(), x) * (v + like(sigma, x) * x)
    return eps if variance is None else torch.cat([eps, variance], dim=1)


def denoiser(predict: Predictor, schedule: Schedule, *, clip: bool = False) -> Denoiser:
    """x₀ = x − σ·ε(x/√(1 + σ²), t(σ)): what continuous-time samplers see of a network on a discrete schedule."""

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma)
        t = schedule.timestep_of(sigma).reshape(-1)
        sigma = like(sigma, x)
        eps, _ = split_output(predict(x / (1 + sigma**2).sqrt(), t), x.shape[1])
        x0 = x - sigma * eps
        return x0.clamp(-1, 1) if clip else x0

    return denoise


class ADMLoss:
    """Mean squared error of ε or v and, for networks that learn their variance, the variational term.

    That term is in bits, and its mean is held fixed, so that it teaches the variance alone (iDDPM, Eq. 16).
    Timesteps are uniform.
    """

    level_name = "t"

    def __init__(self, schedule: Schedule, prediction: Prediction = "epsilon") -> None:
        self.schedule, self.prediction = schedule, prediction

    def draw_level(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One timestep an image, ``(B,)`` int64."""
        return torch.randint(len(self.schedule), (images.shape[0],), device=images.device, generator=generator)

    def bin_edges(self, bins: int) -> Tensor:
        """Timesteps between bins that training visits equally often."""
        return torch.arange(1, bins) * len(self.schedule) / bins

    def __call__(
        self,
        net: Callable[..., Tensor],
        images: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """``images`` ``(B, C, H, W)``, clean -> loss, a mean over pixels, ``(B,)``.

        ``generator`` lives on the images' device. ``level`` ``(B,)`` replaces the sampled timesteps.
        """
        schedule, i = self.schedule, self.draw_level(images, generator) if level is None else level
        noise = torch.randn(images.shape, device=images.device, dtype=images.dtype, generator=generator)
        # All but the network in float64. In float32 1 − ᾱ is off by 6e-5 at t = 0, and β − β̃, which is all that the
        # variance's gradient has to go by, by a quarter at t = 999.
        x0 = images.double()
        signal, spread = at(schedule.alpha_bar.sqrt(), i, x0), at((1 - schedule.alpha_bar).sqrt(), i, x0)
        x = signal * x0 + spread * noise
        t = schedule.timesteps.to(i.device)[i].to(images.dtype)
        extra = () if augment_labels is None else (augment_labels,)
        output = net(x.to(images.dtype), t, labels, *extra).double()
        target = noise if self.prediction == "epsilon" else signal * noise - spread * x0
        loss = (output[:, : images.shape[1]] - target).square().flatten(1).mean(1)
        if self.prediction == "v":
            output = noise_of_v(output, x, at(schedule.sigma, i, x0))
        eps, variance = split_output(output, images.shape[1])
        if variance is not None:
            loss = loss + self.variational_term(eps.detach(), variance, x0, x, i)
        return loss.to(images.dtype)

    def variational_term(self, eps: Tensor, place: Tensor, x0: Tensor, x: Tensor, i: Tensor) -> Tensor:
        """KL(q(x₋₁ | x, x₀) ‖ p(x₋₁ | x)) in bits a value, at the first timestep −log p(x₀ | x): ``(B,)``."""
        schedule = self.schedule
        mean, log_variance, _ = schedule.p_step(torch.cat([eps, place], dim=1), x, i)
        true_mean, true_log_variance = schedule.posterior_mean(x0, x, i), at(schedule.posterior_log_variance, i, x)
        kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance)
        nll = -discretized_gaussian_log_likelihood(x0, mean, log_variance / 2)
        return torch.where(i == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)


def gaussian_kl(mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor) -> Tensor:
    """KL between diagonal Gaussians, elementwise, in nats."""
    difference = log_variance1 - log_variance2
    return 0.5 * (difference.exp() - 1 - difference + (mean1 - mean2).square() * (-log_variance2).exp())


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability, elementwise in nats, of the 8-bit level whose value in [−1, 1] is ``x`` (DDPM, Eq. 13).

    The lowest and the highest level have the tails. The normal distribution function is the tanh approximation of the
    official implementation, within 3e-4 of the exact one.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    centred, scale = x - mean, (-log_std).exp()
    upper, lower = cdf(scale * (centred + 1 / 255)), cdf(scale * (centred - 1 / 255))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


@lru_cache(maxsize=4)
def schedule_of(diffusion: ADMDiffusion) -> Schedule:
    return Schedule.named(diffusion.schedule, diffusion.timesteps)
