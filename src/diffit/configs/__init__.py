"""Complete configurations: validated, frozen, and free of torch."""

from diffit.configs.presets import PRESETS, get_preset
from diffit.configs.resolve import resolve
from diffit.configs.sampling import Sampling
from diffit.configs.schema import Config, ImageModel, LatentModel, StageSpec, Training

__all__ = [
    "PRESETS",
    "Config",
    "ImageModel",
    "LatentModel",
    "Sampling",
    "StageSpec",
    "Training",
    "get_preset",
    "resolve",
]
