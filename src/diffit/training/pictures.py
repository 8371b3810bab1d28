"""A run's grids: training images, and samples whose seed and class at each place stay the same through the run."""

from pathlib import Path

import torch

from diffit.configs.schema import Sampling
from diffit.data.open import Archive
from diffit.models import DiffiT
from diffit.sampling.model import Model
from diffit.training.step import Stepper
from diffit.utils.images import save_grid, to_uint8
from diffit.utils.randomness import SUBSET, make_generator

PREVIEW_STEPS = 25
PREVIEW_BATCH = 64


def save_reals(stepper: Stepper, archive: Archive, path: Path) -> None:
    columns, rows = grid = stepper.config.training.grid
    count = min(columns * rows, len(archive))
    generator = make_generator(stepper.config.training.seed, SUBSET)
    indices = torch.randperm(len(archive), generator=generator)[:count]
    reals = torch.stack([archive[i] for i in sorted(indices.tolist())])
    if reals.ndim == 5:  # cached latents: as the autoencoder shows them
        assert stepper.autoencoder is not None
        reals = to_uint8(stepper.autoencoder.decode(reals[:, 0].float() * stepper.autoencoder.scale)).cpu()
    save_grid(reals, path, grid)


def save_fakes(stepper: Stepper, net: DiffiT, path: Path) -> None:
    """A grid of ``net``, the averaged or the raw weights; a conditional model's classes take turns."""
    columns, rows = grid = stepper.config.training.grid
    config = stepper.config.model_copy(update={"sampling": preview_sampling(stepper.config.sampling)})
    model = Model(net.eval(), config, stepper.autoencoder, stepper.precision)
    seeds = range(columns * rows)
    # Not `generate`, which refuses samples that are not finite: a grid must not end a run.
    size = min(stepper.batch_gpu, PREVIEW_BATCH)
    parts = [seeds[start : start + size] for start in range(0, len(seeds), size)]
    images = [to_uint8(model.sample(part, "balanced"), config.sampling.rounding).cpu() for part in parts]
    net.train(net is stepper.net)
    save_grid(torch.cat(images), path, grid)


def preview_sampling(sampling: Sampling) -> Sampling:
    """Settings for a run's grids: hundreds of ancestral steps a grid could take longer than what lies between two."""
    if sampling.sampler != "ddpm":
        return sampling
    steps = min(sampling.steps, PREVIEW_STEPS) if sampling.spacing == "linspace" else sampling.steps
    return sampling.model_copy(update={"sampler": "dpm++", "steps": steps})
