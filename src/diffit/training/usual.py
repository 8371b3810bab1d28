"""What the loss of a small preset usually is after so many images, for comparison while a run goes on.

Measured on the crops of `examples/photos.py`, see docs/results.md, before noise levels weighed alike and with a rate
that stays, each of which changed a held-out loss by less than a hundredth (docs/quality.md). Other images have other
losses: many plain surfaces lower ones, noise and fine texture higher ones.
"""

from itertools import pairwise

from diffit.configs.presets import get_preset
from diffit.configs.schema import Config

CURVES: dict[str, tuple[tuple[float, float], ...]] = {
    "small32": (
        (0.8, 0.83),
        (1.5, 0.47),
        (2.3, 0.38),
        (3.1, 0.34),
        (3.9, 0.31),
        (4.6, 0.3),
        (5.4, 0.28),
        (6.2, 0.27),
        (7.7, 0.25),
        (9.3, 0.24),
        (11.5, 0.23),
        (13, 0.22),
        (15.5, 0.21),
        (18.5, 0.2),
        (22.4, 0.19),
        (26.8, 0.18),
    ),
}
"""Preset to (kimg, loss); between the points the loss is interpolated, after the last it is the last."""


def usual_loss(config: Config, kimg: float) -> float | None:
    """The loss that is usual after ``kimg``; None where it was not measured, or the recipe is another."""
    curve = CURVES.get(config.preset)
    if curve is None or kimg < curve[0][0] or config.distillation is not None:
        return None
    ours, measured = config.training, get_preset(config.preset).training
    if any(getattr(ours, name) != getattr(measured, name) for name in ("batch", "lr", "optimizer", "conv_lr", "init")):
        return None
    for (left, above), (right, below) in pairwise(curve):
        if kimg < right:
            return above + (below - above) * (kimg - left) / (right - left)
    return curve[-1][1]
