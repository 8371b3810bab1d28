"""What the loss of a small preset usually is after so many images, for comparison while a run goes on.

Measured with the preset as it is, on the crops of `examples/photos.py`; see docs/results.md. Other images have other
losses: many plain surfaces lower ones, noise and fine texture higher ones.
"""

from itertools import pairwise

from diffit.configs.presets import get_preset
from diffit.configs.schema import Config

CURVES: dict[str, tuple[tuple[float, float], ...]] = {
    "small32": (
        (0.63, 0.98),
        (1.3, 0.83),
        (1.9, 0.78),
        (2.5, 0.76),
        (3.1, 0.76),
        (3.8, 0.69),
        (4.4, 0.54),
        (5, 0.45),
        (6.3, 0.4),
        (7.5, 0.37),
        (8.8, 0.34),
        (10, 0.33),
        (12.5, 0.32),
        (15, 0.3),
        (17.5, 0.29),
        (20, 0.29),
        (23.5, 0.27),
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
