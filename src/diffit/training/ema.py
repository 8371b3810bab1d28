"""Exponential moving average of the weights, with EDM's half-life in images and its ramp-up."""

from collections.abc import Iterable

import torch
from torch import Tensor


def ema_beta(batch: int, images_seen: int, halflife_kimg: float, rampup_ratio: float) -> float:
    """Share of the average that stays after a step of ``batch`` images: ½^(batch / half-life).

    The half-life is at most ``rampup_ratio`` of the images seen so far, so that during warm-up the average forgets the
    random weights that it began with.
    """
    halflife = min(halflife_kimg * 1000, images_seen * rampup_ratio)
    return 0.5 ** (batch / halflife) if halflife > 0 else 0.0


@torch.no_grad()
def update_ema(average: Iterable[Tensor], current: Iterable[Tensor], beta: float, skip: Tensor | None = None) -> None:
    """average ← beta·average + (1 − beta)·current, in place and outside autograd; not a bit moves where ``skip`` ()."""
    share = 1 - beta if skip is None else torch.where(skip, 0.0, 1 - beta)  # on the device: nothing waits for it
    for mean, value in zip(average, current, strict=True):
        mean.lerp_(value, share)
