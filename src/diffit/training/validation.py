"""The loss of the averaged weights on held-out images."""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from diffit.data.open import Archive
from diffit.training.batches import image_indices
from diffit.training.resident import fits
from diffit.training.step import Stepper
from diffit.utils.memory import free_memory
from diffit.utils.precision import autocast
from diffit.utils.randomness import VALIDATION, make_generator

VALIDATION_IMAGES = 1024

Batch = tuple[int, Tensor, Tensor | None]


class Validation:
    """Mean loss over at most 1,024 images of ``archive``, with the same noise every time.

    Each process keeps its share of the images, decoded when they are first needed, where they fit.
    """

    def __init__(self, stepper: Stepper, archive: Archive) -> None:
        self.stepper, self.archive = stepper, archive
        self.kept: list[Batch] | None = None

    def batches(self) -> Iterator[Batch]:
        """Of this process: the place of the first image, the data and the labels, in the memory of the machine."""
        procs, size, labels = self.stepper.procs, self.stepper.batch_gpu, self.archive.labels
        count = min(len(self.archive), VALIDATION_IMAGES)
        chosen = image_indices(len(self.archive), self.stepper.config.training.seed, 0, count)
        for start in range(0, count, size)[procs.rank :: procs.count]:
            indices = chosen[start : start + size]
            data = torch.stack([self.archive[i] for i in indices.tolist()])
            yield start, data, None if labels is None else labels[indices]

    def decoded(self) -> Iterable[Batch]:
        """The same, kept where they fit."""
        if self.kept is None:
            need = min(len(self.archive), VALIDATION_IMAGES) * self.archive[0].nbytes
            if fits(need, free_memory()):
                self.kept = list(self.batches())
        return self.batches() if self.kept is None else self.kept

    @torch.no_grad()
    def __call__(self) -> float:
        """All processes call this together."""
        stepper, procs = self.stepper, self.stepper.procs
        net = stepper.whole(stepper.ema)
        sums = torch.zeros(2, dtype=torch.float64, device=procs.device)
        for start, data, labels in self.decoded():
            generator = make_generator(stepper.config.training.seed, VALIDATION, start, device=procs.device)
            images = stepper.clean(data.to(procs.device), generator, mirror=False)
            labels = None if labels is None else labels.to(procs.device)
            with autocast(procs.device, stepper.precision):
                loss = stepper.loss(net, images, labels, generator=generator)
            sums += torch.stack([loss.double().sum(), torch.tensor(len(data), device=procs.device)])
        if procs.count > 1:
            dist.all_reduce(sums, group=procs.steps)
        return float(sums[0] / sums[1])
