"""The memory estimate against the peak of a training step: ``python -m benchmarks.memory``."""

import itertools
import sys

import torch

from benchmarks.measure import DEVICE, peak_mib, peak_of, reset_peak
from diffit.configs.resolve import resolve
from diffit.models.cost import estimate
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import alone

CASES = [("small32", 32), ("small64", 16), ("cifar10", 64), ("latent-s", 8)]


def step(preset: str, batch: int) -> float:
    """MiB that two steps add to what the program takes without them."""
    config = resolve(preset, {"batch": batch, "batch_gpu": batch, "precision": "fp32"})
    torch.nn.Linear(8, 8)(torch.zeros(2, 8)).sum().backward()  # what torch allocates once
    reset_peak()
    before = peak_mib()
    stepper = Stepper(config, alone(DEVICE), build_network(config), "fp32")
    shape = config.model.sample_shape
    if config.autoencoder is None:
        data = torch.zeros(batch, *shape, dtype=torch.uint8, device=DEVICE)
    else:
        data = torch.ones(batch, 4, *shape, device=DEVICE)  # cached moments
    labels = torch.zeros(batch, dtype=torch.int64, device=DEVICE) if config.model.num_classes else None
    for _ in range(2):
        stepper.step(itertools.repeat((data, labels)))
    return peak_mib() - before


def main() -> None:
    for preset, batch in CASES:
        config = resolve(preset, {"batch": batch, "batch_gpu": batch})
        estimated = estimate(config, batch, device=DEVICE.type).training_bytes / 2**20
        measured = peak_of("benchmarks.memory", preset, batch)
        print(
            f"training memory of {preset}, {batch} images: estimate {estimated / measured:.2f} of the measured peak "
            f"({estimated:.0f} : {measured:.0f} MiB)",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(step(sys.argv[1], int(sys.argv[2])))
    else:
        main()
