"""Many images, by one process or several, streamed to disk."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffit.configs.schema import Config, Sampling
from diffit.data.grid import save_grid
from diffit.errors import UserError
from diffit.models.image import ImageDiffiT
from diffit.outputs import NpzFile, PngFolder
from diffit.randomness import random_labels
from diffit.sampling import sample, to_uint8
from diffit.training.distributed import Processes


def generate(
    net: ImageDiffiT,
    config: Config,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    *,
    procs: Processes | None = None,
    sampling: Sampling | None = None,
    batch: int = 64,
    precision: str = "fp32",
    progress: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """Yields ``(start, images)``: uint8 (b, C, H, W) on the CPU for the seeds from position ``start`` on.

    With ``procs``, batch j is drawn by process j mod their number; no process holds more than one batch.
    """
    rank, count = (procs.rank, procs.count) if procs else (0, 1)
    starts = range(0, len(seeds), batch)[rank::count]
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(quiet=not progress or rank > 0, stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("sampling", total=len(seeds))
        for start in starts:
            part = seeds[start : start + batch]
            own = None if labels is None else labels[start : start + batch]
            images = sample(net, config, part, own, sampling=sampling, precision=precision)
            if not images.isfinite().all():  # uint8 would show them as black or white, and a metric as a number
                raise UserError(f"the samples of seeds {part[0]} to {part[-1]} are not finite: the weights are damaged")
            yield start, to_uint8(images).cpu()
            bar.advance(task, len(part) * count)


def generate_to_disk(
    net: ImageDiffiT,
    config: Config,
    seeds: Sequence[int],
    outdir: Path,
    procs: Processes,
    *,
    label: int | None = None,
    sampling: Sampling | None = None,
    batch: int = 64,
    precision: str = "fp32",
    npz: bool = False,
    subdirs: bool = False,
    grid: tuple[int, int] | None = None,
) -> Path:
    """One image a seed into PNG files or an npz; ``grid`` (columns, rows) adds grid.png. Returns what was written.

    All processes call this together. ``label`` is the class of every image; None draws one a seed.
    """
    model = config.model
    if grid is not None and grid[0] * grid[1] > len(seeds):
        raise UserError(f"--grid {grid[0]}x{grid[1]} needs {grid[0] * grid[1]} images, --seeds names {len(seeds)}")
    labels = None
    if model.num_classes:
        labels = random_labels(seeds, model.num_classes) if label is None else torch.full((len(seeds),), label)
    output: NpzFile | PngFolder
    if npz:
        output = NpzFile(outdir, seeds, labels, shape=(model.channels, *model.image_size))
    else:
        output = PngFolder(outdir, seeds, labels, subdirs=subdirs)
    try:
        output.prepare(procs)
        batches = generate(
            net, config, seeds, labels, procs=procs, sampling=sampling, batch=batch, precision=precision, progress=True
        )
        for start, images in batches:
            output.write(start, images)
        procs.barrier()
        if procs.is_first:
            if grid is not None:
                save_grid(output.read(grid[0] * grid[1]), outdir / "grid.png", grid)
            return output.finish((model.num_classes and config.data.class_names) or None)
        return outdir
    finally:
        if isinstance(output, NpzFile) and procs.is_first:
            output.discard()


def generate_class_grid(
    net: ImageDiffiT, config: Config, seeds: Sequence[int], outdir: Path, procs: Processes, **how: object
) -> Path:
    """``class-grid.png``: a row a class, a column a seed, by the first process. Returns its path."""
    classes = config.model.num_classes
    if not classes:
        raise UserError("--class-grid: the model has no classes; take --grid")
    path = outdir / "class-grid.png"
    if procs.is_first:
        labels = torch.arange(classes).repeat_interleave(len(seeds))
        images = [images for _, images in generate(net, config, list(seeds) * classes, labels, progress=True, **how)]  # type: ignore[arg-type]
        save_grid(torch.cat(images), path, (len(seeds), classes))
    procs.barrier()
    return path
