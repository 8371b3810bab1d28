"""What the loss of a small preset usually is after so many images, for comparison while a run goes on.

Measured on the crops of `examples/photos.py`, see docs/results.md; from 18 kimg on before noise levels weighed alike,
which took 0.9 % off a held-out loss (docs/quality.md). Other images have other losses: many plain surfaces lower ones,
noise and fine texture higher ones.
"""

from itertools import pairwise

from diffit.configs.presets import get_preset
from diffit.configs.schema import Config

CURVES: dict[str, tuple[tuple[float, float], ...]] = {
    "small32": (
        (0.6, 0.89),
        (1.2, 0.54),
        (1.8, 0.41),
        (2.4, 0.36),
        (3, 0.33),
        (3.6, 0.31),
        (4.3, 0.29),
        (5.5, 0.27),
        (6.7, 0.24),
        (8.5, 0.23),
        (10.3, 0.21),
        (18.5, 0.2),
        (22.4, 0.19),
        (26.8, 0.18),
    ),
}
"""Preset to (kimg, loss); between the points the loss is interpolated, after the last it is the last."""


def usual_loss(config: Config, kimg: float, length: float) -> float | None:
    """The loss that is usual after ``kimg`` of a run of ``length``.

    None where it was not measured, where the recipe is another, and where the learning rate is already falling: then it
    depends on the share that is done.
    """
    curve = CURVES.get(config.preset)
    if curve is None or kimg < curve[0][0] or config.distillation is not None:
        return None
    if kimg > (1 - config.training.lr_decay) * length:
        return None
    ours, measured = config.training, get_preset(config.preset).training
    if any(getattr(ours, name) != getattr(measured, name) for name in ("batch", "lr", "optimizer", "conv_lr", "init")):
        return None
    for (left, above), (right, below) in pairwise(curve):
        if kimg < right:
            return above + (below - above) * (kimg - left) / (right - left)
    return curve[-1][1]
