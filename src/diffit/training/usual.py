"""What the loss of a small preset usually is after so many images, for comparison while a run goes on.

Measured with the preset as it is, on the crops of `examples/photos.py`; see docs/results.md. Other images have other
losses: many plain surfaces lower ones, noise and fine texture higher ones.
"""

from itertools import pairwise

from diffit.configs.presets import get_preset
from diffit.configs.schema import Config

CURVES: dict[str, tuple[tuple[float, float], ...]] = {
    "small32": (
        (0.5, 0.95),
        (1, 0.84),
        (2, 0.79),
        (3, 0.78),
        (4, 0.78),
        (5, 0.71),
        (6, 0.56),
        (7, 0.45),
        (8, 0.39),
        (10, 0.34),
        (12, 0.33),
        (15, 0.3),
        (20, 0.29),
        (24, 0.28),
    ),
}
"""Preset to (kimg, loss); between the points the loss is interpolated, after the last it is the last."""


def usual_loss(config: Config, kimg: float) -> float | None:
    """The loss that is usual after ``kimg``; None where it was not measured, or the recipe is another."""
    curve = CURVES.get(config.preset)
    if curve is None or kimg < curve[0][0] or config.distillation is not None:
        return None
    ours, measured = config.training, get_preset(config.preset).training
    if any(getattr(ours, name) != getattr(measured, name) for name in ("batch", "lr", "conv_lr", "init")):
        return None
    for (left, above), (right, below) in pairwise(curve):
        if kimg < right:
            return above + (below - above) * (kimg - left) / (right - left)
    return curve[-1][1]
