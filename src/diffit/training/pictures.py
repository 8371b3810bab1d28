"""A run's grids: training images, and samples whose seed and class at each place stay the same through the run."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffit.configs.sampling import Sampling
from diffit.configs.schema import Config
from diffit.data.open import Archive
from diffit.models import DiffiT
from diffit.sampling.labels import class_title, sampled_classes
from diffit.sampling.model import Model
from diffit.training.step import Stepper
from diffit.utils.images import save_gif, save_grid, to_uint8
from diffit.utils.randomness import SUBSET, make_generator

PREVIEW_STEPS = 25
PREVIEW_BATCH = 64
FRAMES = 60  # of the animation of a run


def row_classes(config: Config) -> list[int]:
    """A class for each row of a grid, spread over all of them; none for an unconditional model."""
    classes, rows = sampled_classes(config), config.training.grid[1]
    return [classes[row * len(classes) // rows] for row in range(rows)] if classes else []


def row_names(config: Config) -> list[str]:
    return [class_title(config, label) for label in row_classes(config)]


def save_reals(stepper: Stepper, archive: Archive, path: Path) -> None:
    """Training images; of a conditional model each row's of the class that it will sample there."""
    config = stepper.config
    columns, rows = config.training.grid
    generator = make_generator(config.training.seed, SUBSET)
    indices = torch.randperm(len(archive), generator=generator)
    classes = row_classes(config)
    if classes and archive.labels is not None:
        of_class = archive.labels[indices]
        parts = [indices[of_class == label] for label in classes]
        firsts = [columns * classes[:row].count(label) for row, label in enumerate(classes)]
        places = [torch.arange(first, first + columns) for first in firsts]  # a class's next row has others of it
        chosen = torch.cat([part[place % len(part)] for part, place in zip(parts, places, strict=True)])
        names = row_names(config)
    else:
        chosen, names = indices[: columns * rows].sort().values, []
    reals = torch.stack([archive[i] for i in chosen.tolist()])
    if reals.ndim == 5:  # cached latents: as the autoencoder shows them
        assert stepper.autoencoder is not None
        reals = to_uint8(stepper.autoencoder.decode(reals[:, 0].float() * stepper.autoencoder.scale)).cpu()
    save_grid(reals, path, (columns, rows), names)


def save_fakes(stepper: Stepper, net: DiffiT, path: Path) -> None:
    """A grid of ``net``, the averaged or the raw weights; a conditional model's rows are of one class each."""
    columns, rows = grid = stepper.config.training.grid
    config = stepper.config.model_copy(update={"sampling": preview_sampling(stepper.config.sampling)})
    was_training = net.training
    model = Model(net.eval(), config, stepper.autoencoder, stepper.precision)
    seeds, classes = range(columns * rows), row_classes(config)
    labels = torch.tensor(classes).repeat_interleave(columns) if classes else None
    # Not `generate`, which refuses samples that are not finite: a grid must not end a run.
    size = min(stepper.batch_gpu, PREVIEW_BATCH)
    images = list[Tensor]()
    try:
        for start in range(0, len(seeds), size):
            part = slice(start, start + size)
            samples = model.sample(seeds[part], None if labels is None else labels[part])
            images.append(to_uint8(samples, config.sampling.rounding).cpu())
    finally:  # also where a signal cuts it short: another step may follow
        net.train(was_training)
    save_grid(torch.cat(images), path, grid, row_names(config))


def save_progress(run_dir: Path) -> Path | None:
    """``progress.gif`` of a run's grids in their order; None where there is only one."""
    grids = [path for path in sorted(run_dir.glob("fakes[0-9]*.png")) if not path.stem.endswith("-raw")]
    if len(grids) > FRAMES:
        grids = [grids[round(i * (len(grids) - 1) / (FRAMES - 1))] for i in range(FRAMES)]
    frames = [Image.open(path) for path in (run_dir / "fakes_init.png", *grids) if path.exists()]
    frames = [frame for frame in frames if frame.size == frames[-1].size]  # --grid may have changed on the way
    if len(frames) < 2:
        return None
    save_gif(frames, run_dir / "progress.gif")
    return run_dir / "progress.gif"


def preview_sampling(sampling: Sampling) -> Sampling:
    """Settings for a run's grids: hundreds of ancestral steps a grid could take longer than what lies between two."""
    if sampling.sampler != "ddpm":
        return sampling
    steps = min(sampling.steps, PREVIEW_STEPS) if sampling.spacing == "linspace" else sampling.steps
    return sampling.model_copy(update={"sampler": "dpm++", "steps": steps})
