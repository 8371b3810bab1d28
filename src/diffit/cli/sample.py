"""``diffit sample``."""

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, get_args

import click

from diffit.cli.options import LONGEST, GroupedCommand, Interval, Numbers, Options, Size, Steps, switch, with_options
from diffit.configs.sampling import Sampler, Sampling, steps_text
from diffit.errors import UserError

if TYPE_CHECKING:
    from diffit.sampling import Model

TRAJECTORY_IMAGES = 16
GRID_LIMIT = 10_000
PRECISIONS = ["auto", "fp32", "bf16", "fp16"]
SAMPLERS = get_args(Sampler)

# Settings of the solver and of guidance; fields of `Sampling`, whose defaults come from the file.
SETTINGS = [
    click.option("--sampler", type=click.Choice(SAMPLERS),
                 help="Solver; ddpm and ddim are for discrete schedules.  [default: the file's]"),
    click.option("--steps", type=Steps(), metavar="N|ddimN",
                 help="Steps of the solver.  [default: the file's]"),
    click.option("--levels", type=click.Choice(get_args(Sampling.model_fields["levels"].annotation)),
                 help="Noise levels: of `tune-schedule` where the file has them for these steps, the model's own, or "
                 "evenly spaced in ln sigma.  [default: fitted]"),
    click.option("--eta", type=float,
                 help="Noise of ddim and dpm++2m-sde, 0 to 1; 0 is deterministic.  [default: 0; 1 for dpm++2m-sde]"),
    click.option("--cfg-scale", type=float, help="Guidance scale, 1 for none.  [default: the file's]"),
    click.option("--scale-pow", "cfg_power", type=float,
                 help="Exponent of the power-cosine guidance scale; 0 for a constant scale.  [default: the file's]"),
    click.option("--cfg-interval", type=Interval(), metavar="LO,HI",
                 help="Guide only at noise levels sigma in (LO, HI].  [default: everywhere]"),
    click.option("--cfg-channels", type=click.Choice(["3", "all"]),
                 help="Channels that are guided.  [default: the file's]"),
    click.option("--cfg-skip", type=float,
                 help="Guidance scales this near to 1 count as 1: saves their unconditional half.  [default: 0]"),
    click.option("--sigma-min", type=float, help="Lowest noise level (EDM).  [default: the file's, 0.002]"),
    click.option("--sigma-max", type=float, help="Highest noise level (EDM).  [default: the file's, 80]"),
    click.option("--rho", type=float, help="Exponent of the spacing of noise levels (EDM).  [default: the file's, 7]"),
    click.option("--S-churn", "S_churn", type=float, help="Noise added over the trajectory (heun).  [default: 0]"),
    click.option("--S-min", "S_min", type=float, help="Lowest noise level at which heun adds noise.  [default: 0]"),
    click.option("--S-max", "S_max", type=float, help="Highest noise level at which heun adds noise.  [default: inf]"),
    click.option("--S-noise", "S_noise", type=float, help="Standard deviation of heun's added noise.  [default: 1]"),
    click.option("--rounding", type=click.Choice(["round", "truncate"]),
                 help="To the nearest level, or down as the official implementation does.  [default: the file's]"),
]  # fmt: skip

GUIDE = click.option("--guide-network", metavar="FILE|RUN|ID",
                     help="Guide away from this smaller or earlier network, in place of the network without the class "
                     "(autoguidance); with a guidance scale other than 1.")  # fmt: skip

OPTIONS: Options = {
  "Model and images": [
    click.option("--network", required=True, metavar="FILE|RUN|ID",
                 help="Snapshot, run folder (its newest snapshot), NVIDIA's official weights, or a Hub id."),
    click.option("--outdir", type=click.Path(path_type=Path), required=True,
                 help="Folder for the images; one that holds samples of other settings is refused."),
    click.option("--seeds", type=Numbers(), metavar="LIST",
                 help="One image per seed: 0-63 or 3,7,9.  [default: as many as --grid holds, or 64]"),
    click.option("--num-samples", type=click.IntRange(1, LONGEST), help="Short for --seeds 0-(N−1)."),
    click.option("--class", "classes", metavar="NAME|INDEX,…",
                 help="Class of the images; several take turns.  [default: as --labels says]"),
    click.option("--labels", "policy", type=click.Choice(["random", "balanced"]),
                 help="Classes chosen at random by each seed, or in turn.  [default: random]"),
    switch("--class-grid", help="Write OUTDIR-class-grid.png instead: a row per class, a column per seed (8)."),
    click.option("--grid", type=Size(), metavar="WxH", help="Also write OUTDIR-grid.png with the first images."),
    switch("--trajectory", help="Also write OUTDIR-trajectory.gif: how the first 16 images come about."),
  ],
  "Solver and guidance": [*SETTINGS, GUIDE],
  "Machine and output": [
    click.option("--vae", metavar="PATH|ID", help="Autoencoder of a latent model.  [default: the file's]"),
    click.option("--no-verify", is_flag=True, help="Use a network file that is not as its checksum says."),
    click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images sampled together."),
    click.option("--precision", type=click.Choice(PRECISIONS), default="auto", show_default=True,
                 help="Of the network's arithmetic; auto is bf16 on a GPU that has it, else fp32."),
    switch("--compile", help="torch.compile the network: worth it for many images."),
    click.option("--format", "format_", type=click.Choice(["png", "npz"]), default="png", show_default=True,
                 help="PNG files, or one array as the ADM evaluation reads it."),
    switch("--subdirs", help="Put every thousand PNG files into a folder of their own."),
  ],
}  # fmt: skip

ALIASES = {
    "--ckpt": "--network", "--net": "--network", "--solver": "--sampler", "--num-sampling-steps": "--steps",
    "--guidance": "--cfg-scale", "--max-batch-size": "--batch", "--num-fid-samples": "--num-samples",
    "--per-proc-batch-size": "--batch", "--sample-dir": "--outdir", "--scale-power": "--scale-pow",
    "--gnet": "--guide-network",
}  # fmt: skip
REFUSED = {
    "--disc": "EDM's choice of a discretisation; the noise levels here are EDM's own (--sigma-min, --sigma-max, --rho)",
    "--schedule": "EDM's choice of a noise schedule; the model's own is used, and --levels spaces its steps",
    "--scaling": "EDM's choice of a scaling; the model's own is used",
    "--trunc": "StyleGAN's truncation; use --cfg-scale",
}


@click.command(cls=GroupedCommand, aliases=ALIASES, refused=REFUSED)
@with_options(OPTIONS)
def sample(network: str, outdir: Path, **options: Any) -> None:
    """Sample images from a trained model.

    The image of a seed is the same whatever the batch and the number of processes. Under torchrun the same command
    uses several GPUs. A command that was stopped goes on where it was when it is run again.
    """
    settings = {name: options.pop(name) for name in list(options) if name in Sampling.model_fields}
    own = SimpleNamespace(**options)
    chosen = choose_seeds(own)
    check_together(own)
    # Imported here: `--help` and a mistyped option need not wait for torch.
    from diffit.sampling import NpzFile, PngFolder, find_classes, load
    from diffit.sampling.labels import sampled_classes
    from diffit.sampling.model import beside
    from diffit.utils.distributed import processes
    from diffit.weights import locate

    with processes() as procs:
        file = locate(network)
        model = load(file, device=procs.device, precision=own.precision, vae=own.vae, verify=not own.no_verify)
        guide = None if own.guide_network is None else locate(own.guide_network)
        model = with_guide(model, guide, verify=not own.no_verify).with_sampling(**settings)
        require_scale(model)
        indices = [] if own.classes is None else find_classes(own.classes, model.config, "--class")
        if own.compile:
            model.net.compile()
            if model.guide is not None:
                model.guide.net.compile()
        if procs.is_first:
            if file != Path(network):  # the newest of a run, or from the Hub
                click.echo(f"network {file}")
            if guide is not None and guide != Path(own.guide_network):
                click.echo(f"guide {guide}")
            click.echo(describe(model, len(chosen), indices))
        began = time.monotonic()
        if own.class_grid:
            rows = indices or sampled_classes(model.config)
            path = model.save_class_grid(outdir, chosen, rows, procs=procs, batch=own.batch)
            count = len(chosen) * len(rows)
        else:
            labels = [indices[i % len(indices)] for i in range(len(chosen))] if indices else own.policy
            output = NpzFile(outdir) if own.format_ == "npz" else PngFolder(outdir, subdirs=bool(own.subdirs))
            grid = None if own.grid is None else (own.grid[1], own.grid[0])
            path = model.save(output, chosen, labels, procs=procs, batch=own.batch, grid=grid, source=str(file))
            count = len(chosen)
            if grid is not None and procs.is_first:
                click.echo(f"the first {grid[0] * grid[1]} in one picture: {beside(outdir, 'grid')}")
            if own.trajectory and procs.is_first:
                some = slice(TRAJECTORY_IMAGES)
                gif = beside(outdir, "trajectory", ".gif")
                some_labels = labels[some] if isinstance(labels, list) else labels
                model.save_trajectory(gif, chosen[some], some_labels, batch=own.batch)
                click.echo(f"how the first {min(len(chosen), TRAJECTORY_IMAGES)} come about: {gif}")
        if procs.is_first:
            seconds = time.monotonic() - began
            click.echo(f"{count} images in {seconds:.1f} s ({count / seconds:.3g} img/s): {path}")


def with_guide(model: "Model", file: Path | None, *, verify: bool = True) -> "Model":
    """``model`` guided by the network of a file, where there is one."""
    from diffit.sampling.model import Model, prepare
    from diffit.weights import load_network

    if file is None:
        return model
    net, config = load_network(file, model.device, verify=verify)
    return model.guided_by(Model(prepare(net, model.precision), config, None, model.precision))


def require_scale(model: "Model") -> None:
    if model.guide is not None and model.config.sampling.cfg_scale == 1:
        raise UserError("--guide-network: at guidance scale 1 it has no effect; give --cfg-scale 2, or leave it out")


def check_together(own: SimpleNamespace) -> None:
    """Raises :class:`UserError` for options of which one would have no effect."""
    beside_class_grid = {
        "--grid": own.grid, "--trajectory": own.trajectory, "--format npz": own.format_ == "npz",
        f"--labels {own.policy}": own.policy, "--subdirs": own.subdirs,
    }  # fmt: skip
    if own.class_grid and (other := next((name for name, given in beside_class_grid.items() if given), None)):
        raise UserError(f"--class-grid writes one picture and takes no {other}: leave one of them out")
    if own.classes is not None and own.policy is not None:
        raise UserError(f"--class {own.classes} and --labels {own.policy} both choose the classes: leave one out")
    if own.subdirs and own.format_ == "npz":
        raise UserError("--subdirs is of PNG files, and --format npz writes one array: leave one of them out")


def choose_seeds(own: SimpleNamespace) -> Sequence[int]:
    if own.seeds is not None and own.num_samples is not None:
        raise UserError("--seeds and --num-samples say the same thing: give one")
    default = 8 if own.class_grid else math.prod(own.grid or (8, 8))
    if default > GRID_LIMIT:
        size = f"{own.grid[1]}x{own.grid[0]}"
        raise UserError(
            f"--grid {size}: {default:,} images, more than {GRID_LIMIT:,} in one picture; give a smaller one"
        )
    if own.seeds is None:
        return range(own.num_samples or default)
    chosen: Sequence[int] = own.seeds
    if len(set(chosen)) < len(chosen):
        twice = next(seed for seed, count in Counter(chosen).items() if count > 1)
        raise UserError(f"--seeds names {twice} more than once: one seed gives one image")
    return chosen


def describe(model: "Model", count: int, classes: Sequence[int]) -> str:
    """What is about to be sampled, guidance included, in one line."""
    from diffit.sampling.labels import class_names

    config, sampling = model.config, model.config.sampling
    channels, height, width = config.image_shape
    line = (
        f"{config.preset}, {count} images of {width}×{height}×{channels}: "
        f"{sampling.sampler}, {steps_text(sampling)} steps, {model.precision}"
    )
    if config.model.num_classes:
        names = class_names(config)
        listed = [f"{i} ({names[i]})" if i < len(names) else str(i) for i in classes]
        line += f", class {', '.join(listed) or 'chosen by the seed'}"
    if config.model.num_classes or model.guide is not None:
        line += f", guidance {sampling.cfg_scale:g}"
        if sampling.cfg_scale != 1:
            line += f", power-cosine {sampling.cfg_power:g}" if sampling.cfg_power else ", constant"
            line += f", first {sampling.cfg_channels} channels" if sampling.cfg_channels else ", all channels"
            if sampling.cfg_interval:
                line += ", sigma in ({:g}, {:g}]".format(*sampling.cfg_interval)
            if model.guide is not None:
                line += f", away from another network ({model.guide.config.preset})"
    return line
