"""How a network is sampled: the part of a configuration that ``diffit sample`` changes."""

import re
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from diffit.configs.fields import Count, Frozen, Interval, Levels, NonNegative, Positive, Probability, Steps

ODESampler = Literal["heun", "euler", "dpm++", "dpm++3m", "unipc2", "unipc"]
Sampler = Literal[ODESampler, "dpm++2m-sde", "consistency", "ddpm", "ddim"]
DISCRETE = ("ddpm", "ddim")
"""Samplers on the schedule's own timesteps."""
CONTINUOUS = (*get_args(ODESampler), "dpm++2m-sde")
"""Samplers on continuous noise levels, for every model."""
MULTISTEP = CONTINUOUS[2:]
"""Samplers that use the denoised images of earlier steps again."""


class FittedLevels(Frozen):
    """Noise levels that ``diffit tune-schedule`` found for one sampler: as many as it makes steps."""

    sampler: ODESampler
    sigmas: Levels
    """From the noisiest on, without the 0 at the end."""

    @model_validator(mode="after")
    def _falls(self) -> "FittedLevels":
        for high, low in pairwise(self.sigmas):
            if low >= high:
                raise ValueError(f"sigmas: {low:g} follows {high:g}; noise levels fall from step to step")
        return self


class Sampling(Frozen):
    """What ``diffit sample`` does with the file when nothing else is asked for."""

    sampler: Sampler = "heun"
    steps: Steps = 18
    spacing: Literal["linspace", "leading", "trailing"] = "linspace"
    """Of a discrete schedule's timesteps: from end to end, or every k-th from 0 on for a whole k.

    ``trailing``, of either kind of schedule, ends in the noisiest level, and every second level is that of half as many
    steps: what progressive distillation needs.
    """
    levels: Literal["fitted", "own", "lambda"] = "fitted"
    """Noise levels of the steps: those of ``fitted`` for this sampler and number of steps, where there are such, else
    the model's own (EDM's with rho, or those of its timesteps); its own in any case; or evenly spaced in ln sigma."""
    fitted: Annotated[tuple[FittedLevels, ...], Field(strict=False, max_length=100)] = ()
    sigma_min: Positive = 0.002
    """This, sigma_max and rho space EDM's noise levels; a discrete schedule has its own."""
    sigma_max: Positive = 80.0
    rho: Positive = 7.0
    sigma_mid: Positive | None = None
    """Noise level of the second evaluation of ``consistency``."""
    S_churn: NonNegative = 0.0
    S_min: NonNegative = 0.0
    S_max: NonNegative = 1e6
    S_noise: Positive = 1.0
    eta: Probability = 0.0
    """Noise of ``ddim`` and ``dpm++2m-sde``: 0 is deterministic, 1 that of the posterior."""
    cfg_scale: NonNegative = 1.0
    cfg_power: Positive | None = None
    """Exponent of the power-cosine schedule that rises to cfg_scale at the end; None keeps the scale constant."""
    cfg_interval: Interval | None = None
    """Noise levels sigma between which guidance is on (arXiv 2404.07724)."""
    cfg_channels: Count | None = None
    """Guide only the first so many channels; None guides all."""
    cfg_skip: NonNegative = 0.0
    """Steps whose scale is within this of 1 count as 1: their unconditional half is not evaluated."""
    rounding: Literal["round", "truncate"] = "round"
    """How images become levels 0…255."""

    @model_validator(mode="before")
    @classmethod
    def _named_spacing(cls, values: Any) -> Any:
        """``steps`` may be ``ddim50``, as ADM's tools and older files spell 50 steps with leading spacing."""
        if not isinstance(values, dict) or not isinstance(steps := values.get("steps"), str):
            return values
        if not (match := re.fullmatch(r"ddim([1-9]\d*)", steps)):
            raise ValueError(f"steps: {steps!r} should be a number of steps from 1 on, or ddim50 and the like")
        return values | {"steps": int(match[1]), "spacing": "leading"}

    @model_validator(mode="after")
    def _range(self) -> "Sampling":
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min:g} must be below sigma_max {self.sigma_max:g}")
        if self.sampler == "consistency" and self.steps > (1 if self.sigma_mid is None else 2):
            raise ValueError(f"steps {self.steps}: consistency sampling takes 1, or 2 where sigma_mid is known")
        if self.cfg_interval is not None and self.cfg_interval[0] >= self.cfg_interval[1]:
            low, high = self.cfg_interval
            raise ValueError(f"cfg_interval {low:g},{high:g} is empty: the lower noise level comes first")
        return self

    @property
    def fitted_sigmas(self) -> tuple[float, ...] | None:
        """Of the ``fitted`` levels those that these settings use; None where they use others."""
        found = (fit.sigmas for fit in self.fitted if (fit.sampler, len(fit.sigmas)) == (self.sampler, self.steps))
        return next(found, None) if self.levels == "fitted" and self.spacing == "linspace" else None


def steps_text(sampling: Sampling) -> str:
    """The steps as the command line takes them."""
    return f"ddim{sampling.steps}" if sampling.spacing == "leading" else str(sampling.steps)


def check_steps(sampling: Sampling, timesteps: int) -> None:
    """ValueError where a schedule of so many timesteps cannot be respaced as ``sampling`` says."""
    steps = sampling.steps
    if steps > timesteps:
        raise ValueError(f"steps {steps}: the schedule has {timesteps} timesteps; use at most as many")
    # Every k-th of T timesteps are ⌈T/k⌉ of them: for no other k than ⌊(T − 1)/(n − 1)⌋ can they be n.
    stride = max((timesteps - 1) // (steps - 1), 1) if steps > 1 else timesteps
    if sampling.spacing == "leading" and -(-timesteps // stride) != steps:
        raise ValueError(f"steps ddim{steps}: no whole stride takes {steps} of {timesteps} timesteps; use {steps}")
