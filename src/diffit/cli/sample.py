"""``diffit sample``."""

import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from diffit.cli.options import Numbers, Size, switch
from diffit.configs.schema import Config, Sampling
from diffit.errors import UserError


@click.command()
@click.option("--network", "--ckpt", type=click.Path(path_type=Path), required=True, help="File that training wrote.")
@click.option("--outdir", type=click.Path(path_type=Path), required=True, help="Where the images go.")
@click.option("--seeds", type=Numbers(), default="0-63", show_default=True, help="One image a seed: 0-63 or 3,7,9.")
@click.option("--class", "class_", metavar="NAME|INDEX", help="Class of all images. Default: drawn by each seed.")
@switch("--class-grid", help="Write class-grid.png instead: a row a class, a column a seed.")
@click.option("--grid", type=Size(), metavar="WxH", help="Also write grid.png with the first images.")
@click.option("--sampler", "--solver", type=click.Choice(["heun", "euler"]), help="Solver. Default: the file's.")
@click.option("--steps", "--num-sampling-steps", type=int, help="Steps of the solver. Default: the file's.")
@click.option("--cfg-scale", type=float, help="Guidance scale, 1 for none. Default: the file's.")
@click.option("--sigma-min", type=float, help="Lowest noise level.")
@click.option("--sigma-max", type=float, help="Highest noise level.")
@click.option("--rho", type=float, help="Spacing of the noise levels.")
@click.option("--S-churn", "S_churn", type=float, help="Noise added anew over the whole run (Heun).")
@click.option("--S-min", "S_min", type=float, help="Lowest noise level at which it is.")
@click.option("--S-max", "S_max", type=float, help="Highest noise level at which it is.")
@click.option("--S-noise", "S_noise", type=float, help="Its standard deviation.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images at a time.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of the network's arithmetic; auto is bf16 on a GPU.",
)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["png", "npz"]),
    default="png",
    show_default=True,
    help="PNG files, or one array as the ADM evaluation reads it.",
)
@switch("--subdirs", help="A folder for every thousand PNG files.")
def sample(
    network: Path,
    outdir: Path,
    seeds: list[int],
    class_: str | None,
    class_grid: bool | None,
    grid: tuple[int, int] | None,
    batch: int,
    precision: str,
    format_: str,
    subdirs: bool | None,
    **changes: Any,
) -> None:
    """Draw images from a trained model.

    The image of a seed is the same whatever the batch and the number of processes. Under torchrun the
    same command uses several GPUs.
    """
    from diffit.generate import generate_class_grid, generate_to_disk
    from diffit.sampling import channels_last
    from diffit.training.distributed import processes
    from diffit.training.loop import check_precision
    from diffit.weights import load_network

    if len(set(seeds)) < len(seeds):
        twice = next(seed for seed, count in Counter(seeds).items() if count > 1)
        raise UserError(f"--seeds names {twice} more than once: one seed gives one image")
    given = {"--class": class_ is not None, "--grid": grid is not None, "--format npz": format_ == "npz"}
    if class_grid and any(given.values()):
        others = ", ".join(option for option in given if given[option])
        raise UserError(f"--class-grid writes one picture of all classes and takes no {others}: leave one of them out")

    with processes() as procs:
        net, config = load_network(network, procs.device)
        net = channels_last(net)
        precision = check_precision(precision, procs.device)
        sampling = change_sampling(config.sampling, changes, config)
        label = None if class_ is None else find_class(class_, config)
        if procs.is_first:
            click.echo(describe(config, sampling, len(seeds), label))
        began = time.monotonic()
        columns_rows = None if grid is None else (grid[1], grid[0])
        if class_grid:
            path = generate_class_grid(
                net, config, seeds, outdir, procs, sampling=sampling, batch=batch, precision=precision
            )
            count = len(seeds) * config.model.num_classes
        else:
            path = generate_to_disk(
                net,
                config,
                seeds,
                outdir,
                procs,
                label=label,
                sampling=sampling,
                batch=batch,
                precision=precision,
                npz=format_ == "npz",
                subdirs=bool(subdirs),
                grid=columns_rows,
            )
            count = len(seeds)
        if procs.is_first:
            seconds = time.monotonic() - began
            click.echo(f"{count} images in {seconds:.1f} s ({count / seconds:.1f} img/s): {path}")


def change_sampling(sampling: Sampling, changes: dict[str, Any], config: Config) -> Sampling:
    """The file's sampling settings with those that were given."""
    from pydantic import ValidationError

    from diffit.configs.schema import explain

    changes = {key: value for key, value in changes.items() if value is not None}
    if changes.get("cfg_scale", 1) != 1 and not config.model.num_classes:
        raise UserError(f"--cfg-scale {changes['cfg_scale']:g}: the model has no classes to be guided to; leave it out")
    try:
        return Sampling.model_validate(sampling.model_dump() | changes)
    except ValidationError as error:
        raise UserError(f"sampling options: {explain(error)}") from None


def find_class(text: str, config: Config) -> int:
    """The index of a class given by name or number."""
    count, names = config.model.num_classes, config.data.class_names or ()
    if not count:
        raise UserError(f"--class {text}: the model has no classes; leave it out")
    if text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < count:
        return int(text)
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    known = f"{shown}, or 0-{count - 1}" if names else f"0-{count - 1}"
    raise UserError(f"--class {text}: unknown; the model knows {known}")


def describe(config: Config, sampling: Sampling, count: int, label: int | None) -> str:
    height, width = config.model.image_size
    line = f"{config.preset}, {width}×{height}×{config.model.channels}: {sampling.sampler}, {sampling.steps} steps"
    if config.model.num_classes:
        chosen = "drawn by each seed" if label is None else str(label)
        if label is not None and label < len(config.data.class_names or ()):
            chosen += f" ({(config.data.class_names or ())[label]})"
        line += f", class {chosen}, guidance {sampling.cfg_scale:g}"
    return line
