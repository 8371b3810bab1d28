"""The training images nearest to a sample: what ``diffit metrics copies`` does for many, for one at a time."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from diffit.errors import UserError
from diffit.metrics.copies import features
from diffit.metrics.detectors import make_detector
from diffit.metrics.images import Images, by_size, open_images, stream
from diffit.metrics.precision_recall import nearest
from diffit.utils.distributed import Processes, pick_device


class Neighbours(NamedTuple):
    """``distances`` and ``indices`` ``(B, k)``, nearest first, and the training images uint8, k for each sample."""

    distances: Tensor
    indices: Tensor
    images: list[list[Tensor]]


class TrainingImages:
    """Features of an archive, computed once, so that the neighbours of a sample are found in no time.

    ``detector`` as for ``diffit metrics copies``: ``inception``, ``pixels`` for small images, or a file.
    """

    def __init__(self, images: Images | str | Path, detector: str = "pixels", *, batch: int = 64) -> None:
        self.images = open_images(Path(images)) if isinstance(images, str | Path) else images
        self.procs = Processes(0, 1, pick_device())
        self.detector = make_detector(detector, self.procs)
        everything = stream(self.images, torch.arange(len(self.images)), batch, self.procs)
        self.features = features(everything, self.detector, self.procs)

    def nearest(self, samples: Tensor, k: int = 3) -> Neighbours:
        """Neighbours of ``samples``, uint8 ``(B, C, H, W)``, in the detector's features."""
        if tuple(samples.shape[1:]) != tuple(self.images.shape) and not self.detector.any_size:
            raise UserError(
                f"{self.images.name}: images of {tuple(self.images.shape)}, the samples are of "
                f"{tuple(samples.shape[1:])} (C, H, W); pass the archive that the model was trained on"
            )
        batches = by_size(torch.arange(len(samples)), list(samples))
        found = features(batches, self.detector, self.procs)
        distances, indices = nearest(found, self.features, min(k, len(self.features)), device=self.procs.device)
        wanted = sorted(set(indices.flatten().tolist()))
        rows = dict(zip(wanted, self.images.rows(wanted), strict=True))
        return Neighbours(distances, indices, [[rows[j] for j in row] for row in indices.tolist()])
