"""Look into a model: interpolation, variation, inpainting, attention maps, and samples while they come about."""

from diffit.explore.attention import (
    attention_layers,
    attention_maps,
    attention_weights,
    bias_maps,
    denoising_states,
    record_attention,
    time_norms,
)
from diffit.explore.edit import inpaint, noise_levels, vary
from diffit.explore.interpolate import interpolate, sample_grid, slerp
from diffit.explore.live import Progress, live
from diffit.explore.neighbours import TrainingImages
from diffit.training.runs import RunView, compare_runs, read_run

__all__ = [
    "Progress",
    "RunView",
    "TrainingImages",
    "attention_layers",
    "attention_maps",
    "attention_weights",
    "bias_maps",
    "compare_runs",
    "denoising_states",
    "inpaint",
    "interpolate",
    "live",
    "noise_levels",
    "read_run",
    "record_attention",
    "sample_grid",
    "slerp",
    "time_norms",
    "vary",
]
