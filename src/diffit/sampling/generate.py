"""Many images, by one process or several, streamed to disk."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from diffit.configs.schema import Config, Sampling
from diffit.errors import UserError
from diffit.models import DiffiT
from diffit.models.autoencoder import Autoencoder
from diffit.sampling.labels import labels_of
from diffit.sampling.model import sample
from diffit.sampling.outputs import NpzFile, PngFolder, Record
from diffit.utils.distributed import Processes
from diffit.utils.images import save_grid, to_uint8

CLASS_GRID_LIMIT = 4096  # images in one picture


def draw(
    net: DiffiT,
    config: Config,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    *,
    sampling: Sampling | None = None,
    autoencoder: Autoencoder | None = None,
    precision: str = "fp32",
) -> Tensor:
    """One image a seed, ``(b, C, H, W)`` float32, nominally in [−1, 1]. A latent model needs its ``autoencoder``."""
    samples = sample(net, config, seeds, labels, sampling=sampling, precision=precision)
    if config.autoencoder is None:
        return samples
    assert autoencoder is not None, "a latent model's samples are latents"
    return autoencoder.decode(samples)


def generate(
    net: DiffiT,
    config: Config,
    seeds: Sequence[int],
    labels: Tensor | None = None,
    *,
    procs: Processes | None = None,
    sampling: Sampling | None = None,
    autoencoder: Autoencoder | None = None,
    batch: int = 64,
    precision: str = "fp32",
    progress: bool = False,
    done: Callable[[slice], bool] | None = None,
) -> Iterator[tuple[int, Tensor]]:
    """Yields ``(start, images)``: uint8 (b, C, H, W) on the CPU for the seeds from position ``start`` on.

    With ``procs``, batch j is drawn by process j mod their number; no process holds more than one batch. Batches of
    which ``done`` says so are left out.
    """
    rank, count = (procs.rank, procs.count) if procs else (0, 1)
    starts = range(0, len(seeds), batch)[rank::count]
    columns = (TextColumn("sampling"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(quiet=not progress or rank > 0, stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("sampling", total=len(seeds))
        for start in starts:
            part = slice(start, start + batch)
            if done is None or not done(part):
                own = None if labels is None else labels[part]
                images = draw(
                    net, config, seeds[part], own, sampling=sampling, autoencoder=autoencoder, precision=precision
                )
                if not images.isfinite().all():  # uint8 would show them as black or white, and a metric as a number
                    first, last = seeds[part][0], seeds[part][-1]
                    raise UserError(
                        f"the samples of seeds {first} to {last} are not finite: the weights are damaged, or the "
                        f"precision too low; take --precision fp32, and in training --metrics none to go on without"
                    )
                yield start, to_uint8(images, (sampling or config.sampling).rounding).cpu()
            bar.advance(task, len(seeds[part]) * count)


def generate_to_disk(
    net: DiffiT,
    config: Config,
    seeds: Sequence[int],
    outdir: Path,
    procs: Processes,
    *,
    labels: Tensor | None = None,
    source: str = "",
    autoencoder: Autoencoder | None = None,
    batch: int = 64,
    precision: str = "fp32",
    npz: bool = False,
    subdirs: bool = False,
    grid: tuple[int, int] | None = None,
) -> Path:
    """One image a seed into PNG files or an npz; ``grid`` (columns, rows) adds grid.png. Returns what was written.

    All processes call this together. ``labels`` default to random ones. ``source`` names the network; together with
    the settings it is kept in ``samples.json``, by which the same call knows what an interrupted one has finished.
    """
    if grid is not None and grid[0] * grid[1] > len(seeds):
        raise UserError(f"--grid {grid[0]}x{grid[1]} needs {grid[0] * grid[1]} images, there are {len(seeds)}")
    labels = labels_of(config, seeds) if labels is None else labels
    vae = None if autoencoder is None else autoencoder.sha256
    record = Record(outdir, source, net, config, precision, vae)
    output: NpzFile | PngFolder
    if npz:
        output = NpzFile(outdir, seeds, labels, record, shape=config.image_shape)
    else:
        output = PngFolder(outdir, seeds, labels, record, subdirs=subdirs)
    output.prepare(procs)
    batches = generate(
        net, config, seeds, labels,
        procs=procs, autoencoder=autoencoder, batch=batch, precision=precision, progress=True, done=output.done,
    )  # fmt: skip
    for start, images in batches:
        output.write(start, images)
    procs.barrier()
    if not procs.is_first:
        return outdir
    if grid is not None:
        save_grid(output.read(grid[0] * grid[1]), outdir / "grid.png", grid)
    return output.finish((config.model.num_classes and config.data.class_names) or None)


def generate_class_grid(
    net: DiffiT, config: Config, seeds: Sequence[int], outdir: Path, procs: Processes, **how: object
) -> Path:
    """``class-grid.png``: a row a class, a column a seed, by the first process. Returns its path."""
    classes = config.model.num_classes
    if not classes:
        raise UserError("--class-grid: the model has no classes; take --grid")
    if classes * len(seeds) > CLASS_GRID_LIMIT:
        raise UserError(
            f"--class-grid: {classes} classes × {len(seeds)} seeds are {classes * len(seeds)} images, more than "
            f"{CLASS_GRID_LIMIT} in one picture; give fewer --seeds"
        )
    path = outdir / "class-grid.png"
    if procs.is_first:
        labels = torch.arange(classes).repeat_interleave(len(seeds))
        images = [images for _, images in generate(net, config, list(seeds) * classes, labels, progress=True, **how)]  # type: ignore[arg-type]
        save_grid(torch.cat(images), path, (len(seeds), classes))
    procs.barrier()
    return path
