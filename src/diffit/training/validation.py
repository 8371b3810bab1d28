"""The loss of the averaged weights on held-out images."""

import torch
import torch.distributed as dist

from diffit.data.open import Archive
from diffit.training.batches import image_indices
from diffit.training.step import Stepper
from diffit.utils.precision import autocast
from diffit.utils.randomness import VALIDATION, make_generator

VALIDATION_IMAGES = 1024


@torch.no_grad()
def validate(stepper: Stepper, archive: Archive) -> float:
    """Mean over at most 1,024 images, with the same noise every time. All processes call this together."""
    procs, seed = stepper.procs, stepper.config.training.seed
    net = stepper.whole(stepper.ema)
    count = min(len(archive), VALIDATION_IMAGES)
    chosen = image_indices(len(archive), seed, 0, count)
    sums = torch.zeros(2, dtype=torch.float64, device=procs.device)
    for start in range(0, count, stepper.batch_gpu)[procs.rank :: procs.count]:
        indices = chosen[start : start + stepper.batch_gpu]
        data = torch.stack([archive[i] for i in indices.tolist()]).to(procs.device)
        labels = archive.labels[indices].to(procs.device) if archive.labels is not None else None
        generator = make_generator(seed, VALIDATION, start, device=procs.device)
        images = stepper.clean(data, generator, mirror=False)
        with autocast(procs.device, stepper.precision):
            loss = stepper.loss(net, images, labels, generator=generator)
        sums += torch.stack([loss.double().sum(), torch.tensor(len(indices), device=procs.device)])
    if procs.count > 1:
        dist.all_reduce(sums, group=procs.steps)
    return float(sums[0] / sums[1])
