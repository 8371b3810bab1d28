"""``diffit sample``."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from diffit.cli.options import Interval, Numbers, Size, Steps, switch, with_options
from diffit.configs.schema import Config
from diffit.errors import UserError

OPTIONS: list[Callable[..., Any]] = [
    click.option("--network", "--ckpt", required=True, metavar="FILE|ID",
                 help="File that training wrote, NVIDIA's released weights, or the Hub id of either."),
    click.option("--outdir", type=click.Path(path_type=Path), required=True, help="Where the images go."),
    click.option("--seeds", type=Numbers(), help="One image a seed: 0-63 or 3,7,9.  [default: 0-63]"),
    click.option("--num-samples", type=click.IntRange(min=1), help="The same as --seeds 0-(N−1)."),
    click.option("--class", "class_", metavar="NAME|INDEX", help="Class of all images. Default: as --labels says."),
    click.option("--labels", "label_policy", type=click.Choice(["random", "balanced"]), default="random",
                 show_default=True, help="Classes drawn by each seed, or in turn."),
    switch("--class-grid", help="Write class-grid.png instead: a row a class, a column a seed."),
    click.option("--grid", type=Size(), metavar="WxH", help="Also write grid.png with the first images."),
    # Solver and guidance; defaults come from the file
    click.option("--sampler", "--solver", type=click.Choice(["heun", "euler", "dpm++", "ddpm", "ddim"]),
                 help="Default: the file's. ddpm and ddim are for discrete schedules."),
    click.option("--steps", "--num-sampling-steps", type=Steps(), metavar="N|ddimN",
                 help="Steps of the solver. Default: the file's."),
    click.option("--eta", type=float, help="Noise of ddim: 0 is deterministic."),
    click.option("--cfg-scale", type=float, help="Guidance scale, 1 for none. Default: the file's."),
    click.option("--scale-pow", "cfg_power", type=float, help="Power-cosine exponent of the scale; 0: constant."),
    click.option("--cfg-interval", type=Interval(), metavar="LO,HI", help="Guide only at sigma in (LO, HI]."),
    click.option("--cfg-channels", type=click.Choice(["3", "all"]), help="Channels that are guided."),
    click.option("--cfg-skip", type=float, help="Take scales this near to 1 as 1: saves their unconditional half."),
    click.option("--sigma-min", type=float, help="Lowest noise level (EDM)."),
    click.option("--sigma-max", type=float, help="Highest noise level (EDM)."),
    click.option("--rho", type=float, help="Spacing of the noise levels (EDM)."),
    click.option("--S-churn", "S_churn", type=float, help="Noise added anew over the whole run (Heun)."),
    click.option("--S-min", "S_min", type=float, help="Lowest noise level at which it is."),
    click.option("--S-max", "S_max", type=float, help="Highest noise level at which it is."),
    click.option("--S-noise", "S_noise", type=float, help="Its standard deviation."),
    # Machine and output
    click.option("--vae", metavar="PATH|ID", help="Autoencoder of a latent model. Default: the file's."),
    click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images at a time."),
    click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True,
                 help="Of the network's arithmetic; auto is bf16 on a GPU that has it, else fp32."),
    switch("--compile", help="torch.compile the network: worth it for many images."),
    click.option("--rounding", type=click.Choice(["round", "truncate"]),
                 help="To the nearest of 255 levels, or down as the released program does. Default: the file's."),
    click.option("--format", "format_", type=click.Choice(["png", "npz"]), default="png", show_default=True,
                 help="PNG files, or one array as the ADM evaluation reads it."),
    switch("--subdirs", help="A folder for every thousand PNG files."),
]  # fmt: skip


@click.command()
@with_options(OPTIONS)
def sample(
    network: str,
    outdir: Path,
    seeds: list[int] | None,
    num_samples: int | None,
    class_: str | None,
    label_policy: str,
    class_grid: bool | None,
    grid: tuple[int, int] | None,
    vae: str | None,
    batch: int,
    precision: str,
    compile: bool | None,
    format_: str,
    subdirs: bool | None,
    **changes: Any,
) -> None:
    """Draw images from a trained model.

    The image of a seed is the same whatever the batch and the number of processes. Under torchrun the
    same command uses several GPUs. A command that was stopped goes on where it was when it is run again.
    """
    from diffit.models.autoencoder import autoencoder_of
    from diffit.sampling.generate import generate_class_grid, generate_to_disk
    from diffit.sampling.labels import find_class, labels_of
    from diffit.sampling.model import prepare
    from diffit.utils.distributed import processes
    from diffit.utils.precision import check_precision
    from diffit.weights.file import load_network

    if seeds is not None and num_samples is not None:
        raise UserError("--seeds and --num-samples say the same thing: give one")
    chosen: Sequence[int] = seeds if seeds is not None else range(num_samples or 64)
    if len(set(chosen)) < len(chosen):
        twice = next(seed for seed, count in Counter(chosen).items() if count > 1)
        raise UserError(f"--seeds names {twice} more than once: one seed gives one image")
    given = {"--class": class_ is not None, "--grid": grid is not None, "--format npz": format_ == "npz"}
    if class_grid and any(given.values()):
        others = ", ".join(option for option in given if given[option])
        raise UserError(f"--class-grid writes one picture of all classes and takes no {others}: leave one of them out")

    with processes() as procs:
        precision = check_precision(precision, procs.device)
        net, config = load_network(network, procs.device)
        config = with_sampling(config, changes)
        label = None if class_ is None else find_class(class_, config, "--class")
        autoencoder = autoencoder_of(config, vae, device=procs.device)
        net = prepare(net, precision)
        if compile:
            net.compile()
        if procs.is_first:
            click.echo(describe(config, len(chosen), label, precision))
        began = time.monotonic()
        how: dict[str, Any] = {"autoencoder": autoencoder, "batch": batch, "precision": precision}
        if class_grid:
            path = generate_class_grid(net, config, chosen, outdir, procs, **how)
            count = len(chosen) * config.model.num_classes
        else:
            labels = labels_of(config, chosen, label_policy if label is None else label)
            columns_rows = None if grid is None else (grid[1], grid[0])
            path = generate_to_disk(
                net, config, chosen, outdir, procs, labels=labels, source=str(network),
                npz=format_ == "npz", subdirs=bool(subdirs), grid=columns_rows, **how,
            )  # fmt: skip
            count = len(chosen)
        if procs.is_first:
            seconds = time.monotonic() - began
            click.echo(f"{count} images in {seconds:.1f} s ({count / seconds:.3g} img/s): {path}")


def with_sampling(config: Config, changes: dict[str, Any]) -> Config:
    """``config`` with the sampling settings that were given, checked against the model."""
    from diffit.sampling import model

    changes = {key: value for key, value in changes.items() if value is not None}
    for name in ("sigma_min", "sigma_max", "rho"):
        if name in changes and config.diffusion.kind != "edm":
            raise UserError(
                f"--{name.replace('_', '-')} {changes[name]:g}: this model walks the noise levels of its own "
                "timesteps; choose them with --steps"
            )
    if changes.get("cfg_power") == 0:
        changes["cfg_power"] = None
    if "cfg_channels" in changes:
        changes["cfg_channels"] = None if changes["cfg_channels"] == "all" else int(changes["cfg_channels"])
    return model.with_sampling(config, changes)


def describe(config: Config, count: int, label: int | None, precision: str) -> str:
    """What is about to be drawn, guidance included, in one line."""
    from diffit.sampling.labels import names_of

    sampling = config.sampling
    channels, height, width = config.image_shape
    line = (
        f"{config.preset}, {count} images of {width}×{height}×{channels}: "
        f"{sampling.sampler}, {sampling.steps} steps, {precision}"
    )
    if config.model.num_classes:
        chosen = "drawn" if label is None else str(label)
        if label is not None and label < len(names := names_of(config)):
            chosen += f" ({names[label]})"
        line += f", class {chosen}, guidance {sampling.cfg_scale:g}"
        if sampling.cfg_scale != 1:
            line += f", power-cosine {sampling.cfg_power:g}" if sampling.cfg_power else ", constant"
            line += f", first {sampling.cfg_channels} channels" if sampling.cfg_channels else ", all channels"
            if sampling.cfg_interval:
                line += ", sigma in ({:g}, {:g}]".format(*sampling.cfg_interval)
    return line
