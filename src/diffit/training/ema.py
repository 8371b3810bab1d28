"""Exponential moving average of the weights, with EDM's half-life in images and its ramp-up."""

from collections.abc import Iterable

import torch
from torch import Tensor


def ema_beta(batch: int, images_seen: int, halflife_kimg: float, rampup_ratio: float) -> float:
    """Share of the average that stays after a step of ``batch`` images: ½^(batch / half-life).

    The half-life is at most ``rampup_ratio`` of the images seen so far, so that a young average forgets the random
    weights that it began with.
    """
    halflife = min(halflife_kimg * 1000, images_seen * rampup_ratio)
    return 0.5 ** (batch / halflife) if halflife > 0 else 0.0


@torch.no_grad()
def update_ema(average: Iterable[Tensor], current: Iterable[Tensor], beta: float) -> None:
    """average ← beta·average + (1 − beta)·current, in place."""
    torch._foreach_lerp_(list(average), [tensor.detach() for tensor in current], 1 - beta)
