"""From a network and seeds to images. The image of a seed depends on nothing else."""

from diffit.sampling.model import sample

__all__ = ["sample"]
