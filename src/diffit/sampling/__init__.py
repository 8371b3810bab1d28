"""From a network and seeds to images. The image of a seed depends on nothing else."""

from diffit.sampling.labels import choose_labels, find_class, find_classes
from diffit.sampling.model import Model, load, prepare, sample
from diffit.sampling.outputs import NpzFile, PngFolder
from diffit.sampling.settings import with_sampling

__all__ = [
    "Model",
    "NpzFile",
    "PngFolder",
    "choose_labels",
    "find_class",
    "find_classes",
    "load",
    "prepare",
    "sample",
    "with_sampling",
]
