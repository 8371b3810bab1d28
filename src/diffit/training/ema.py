"""Exponential moving average of the weights, with EDM's half-life in images and its ramp-up."""

from collections.abc import Iterable

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


def ema_beta(batch: int, images_seen: int, halflife_kimg: float, rampup_ratio: float) -> float:
    """Share of the average that stays after a step of ``batch`` images: ½^(batch / half-life).

    The half-life is at most ``rampup_ratio`` of the images seen so far, so that during warm-up the average forgets the
    random weights that it began with.
    """
    halflife = min(halflife_kimg * 1000, images_seen * rampup_ratio)
    return 0.5 ** (batch / halflife) if halflife > 0 else 0.0


def update_ema(average: Iterable[Tensor], current: Iterable[Tensor], beta: float) -> None:
    """average ← beta·average + (1 − beta)·current, in place and outside autograd."""
    get_ema_multi_avg_fn(beta)(tuple(average), tuple(current), None)
