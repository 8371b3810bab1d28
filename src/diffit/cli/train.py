"""``diffit train`` and ``train.py``."""

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
import yaml
from click.core import ParameterSource

from diffit.cli.options import GroupedCommand, Images, Numbers, Options, Percent, Size, switch, with_options
from diffit.configs.presets import PRESETS, RECIPES
from diffit.configs.resolve import resolve
from diffit.configs.sampling import Sampler
from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.utils.urls import public, remember

if TYPE_CHECKING:
    from diffit.data.open import Archive
    from diffit.models.autoencoder import Autoencoder

MINUTES = 10.0  # of a run whose network and length are left to us

BASE = "diffit.base"  # of click's context: the configuration of a run that --config names
LENGTHS = ("minutes", "hours", "kimg", "duration", "epochs")


def read_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> Path | None:
    """Make a file's options the defaults of the command: flat as on the command line, or a run's own options."""
    if path is None:
        return None
    if path.exists() and not path.is_file():
        raise UserError(f"--config {path}: not a file; name a JSON or YAML file")
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {path}: cannot be read as JSON or YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: holds no options; write a JSON object or a YAML mapping")
    if "model" in content and "training" in content:
        base = Config.from_json(remember(text), f"--config {path}")
        # Leave to run programs is given on the command line, not by a file.
        training = base.training.model_copy(update={"allow_scripts": False})
        base = base.model_copy(update={"training": training})
        ctx.meta[BASE] = base
        content = {"data": base.data.path, "val": base.data.val, "cond": base.data.cond}
    flat = {str(key).replace("-", "_"): value for key, value in content.items() if value is not None}
    known = {param.name for param in ctx.command.params}
    if unknown := sorted(flat.keys() - known):
        raise UserError(f"--config {path}: unknown option {unknown[0]!r}; see diffit train --help")
    flat = {name: remember(value) if isinstance(value, str) else value for name, value in flat.items()}
    ctx.default_map = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in flat.items()}
    return path


# Of `diffit distill` too.
FLIP = "Flip images left to right, each with probability ½."
VAE = click.option("--vae", metavar="PATH|ID", help="Autoencoder of a latent model.  [default: the latents' own]")
HOURS = click.option("--hours", type=click.FloatRange(min=0.01), help="Length by the clock, in hours.")
DURATION = click.option("--duration", type=Images(), metavar="MIMG", help="Length in millions of images.")
EPOCHS = click.option("--epochs", type=float, help="Length in passes over the data.")
GRAD_CLIP = click.option(
    "--grad-clip", type=float, metavar="NORM", help="Scale gradients down to this norm.  [default: the preset's, none]"
)
ON_SPIKE = click.option(
    "--on-spike",
    type=click.Choice(["skip", "rollback", "ignore"]),
    help="Steps whose gradient is far larger than before: leave them out, or after 20 in a row also "
    "go back to the newest state.  [default: skip]",
)
SEED = click.option("--seed", type=int, help="Seed of everything random.  [default: 0]")

OPTIONS: Options = {
    "Data and result": [
        click.option("--data", help="Image archive or latent cache: folder or zip (see `diffit data convert`)."),
        click.option("--outdir", type=click.Path(path_type=Path), help="Folder that the run's own folder goes into."),
        click.option("--val", help="Archive of held-out images: their loss is reported at every tick."),
        switch("--cond", help="Class-conditional, with the labels of the archive.  [default: no, or the preset's]"),
        switch("--mirror", help=f"{FLIP}  [default: no]"),
        click.option("--desc", help="Text to put into the name of the run's folder."),
        click.option("--resume", default="auto", show_default=True, metavar="auto|none|PATH",
                     help="auto: go on with the newest run in --outdir that has the same options."),
        click.option("--init-from", metavar="FILE", help="Begin with the weights of a network file."),
        click.option("--config", "config_file", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
                     is_eager=True, callback=read_config,
                     help="Options from JSON or YAML, or a run's training_options.json; options given here win."),
    ],
    "Length": [
        click.option("--minutes", type=click.FloatRange(min=0.1),
                     help=f"Length by the clock.  [default: {MINUTES:g}, unless a preset or network is chosen; a run "
                     "that goes on keeps its own]"),
        HOURS,
        click.option("--kimg", type=float, help="Length in thousands of images.  [default: the preset's]"),
        DURATION,
        EPOCHS,
    ],
    "Network": [
        click.option("--preset", metavar="NAME",
                     help=f"Recipe: {', '.join(PRESETS)}.  [default: a small one for the images]"),
        click.option("--resolution", type=Size(), help="Size of the images.  [default: that of the data]"),
        click.option("--base-dim", type=int, help="Width of the first stage.  [default: the preset's]"),
        click.option("--hidden-dim", type=int, help="Width of the other stages.  [default: the preset's]"),
        click.option("--num-heads", type=int, help="Attention heads in every stage.  [default: the preset's]"),
        click.option("--num-blocks", type=Numbers(), metavar="N[,N…]",
                     help="ResBlocks per stage, or depth of a latent model.  [default: the preset's]"),
        click.option("--window-size", type=int,
                     help="Side of the attention windows, in tokens.  [default: the preset's]"),
        click.option("--patch-size", type=int, help="Side of a latent model's patches.  [default: 2]"),
        click.option("--mlp-ratio", type=float, help="Width of the MLPs in multiples of the stage's.  [default: 4]"),
        click.option("--dropout", type=float, help="Dropout in the MLPs.  [default: the preset's]"),
        VAE,
    ],
    "Recipe": [
        click.option("--recipe", type=click.Choice(list(RECIPES)),
                     help="Initialisation, optimiser, weights of noise levels and fall of the rate: as published "
                     "(Adam), or those of the small presets (Muon).  [default: the preset's]"),
        click.option("--batch", type=int, help="Images per step, over all processes.  [default: the preset's]"),
        click.option("--lr", type=float, help="Learning rate.  [default: the preset's]"),
        click.option("--lr-rampup-kimg", type=float,
                     help="Learning rate's linear ramp-up.  [default: the preset's, 5 % of a shorter run]"),
        click.option("--lr-decay", type=float, metavar="SHARE",
                     help="Share of the run, at its end, in which the rate falls to 0.  [default: the preset's]"),
        click.option("--ema", type=float, metavar="MIMG",
                     help="Exponential moving average half-life, in millions of images.  [default: the preset's]"),
        click.option("--label-drop", type=float,
                     help="Probability of training without the label, for guidance.  [default: 0.1]"),
        click.option("--augment", type=float,
                     help="Probability of each augmentation; 0 for none.  [default: the preset's]"),
        click.option("--diffusion", type=click.Choice(["edm", "cosine", "linear"]),
                     help="EDM, or a discrete schedule.  [default: the preset's]"),
        click.option("--prediction", type=click.Choice(["epsilon", "v"]),
                     help="Target on a discrete schedule: the noise, or v.  [default: the preset's, epsilon]"),
        click.option("--P-mean", "P_mean", type=float, help="Mean of ln sigma in training (EDM).  [default: -1.2]"),
        click.option("--P-std", "P_std", type=float, help="Standard deviation of ln sigma (EDM).  [default: 1.2]"),
        click.option("--cfg-scale", type=float, help="Guidance scale that the file will be sampled with by default."),
        GRAD_CLIP,
        ON_SPIKE,
        click.option("--on-error", type=click.Choice(["stop", "skip"]),
                     help="Training images that cannot be read: save and stop, or leave them out.  [default: stop]"),
        SEED,
    ],
    "Machine": [
        click.option("--batch-gpu", type=int,
                     help="Images per forward pass; accumulation makes up --batch.  [default: the most that fits]"),
        click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
                     help="Of the network; auto is bf16 on GPUs that have it, else fp32.  [default: auto]"),
        switch("--fp16", hidden=True),
        switch("--grad-ckpt", help="Recompute activations: less memory, more time.  [default: no]"),
        switch("--shard", help="Spread weights, average and moments over the processes (FSDP2).  [default: no]"),
        switch("--compile",
               help="torch.compile the network: a minute or two at the start, then faster steps.  "
                    "[default: on a GPU, image-space runs of 15 minutes or 5e16 FLOPs and more, not of students]"),
        click.option("--timeout-minutes", type=float,
                     help="Minutes after which, where a process hangs, the others have saved and gone.  [default: 10]"),
        click.option("--workers", type=int, help="Processes that decode what does not fit in memory.  [default: 2]"),
        click.option("-n", "--dry-run", is_flag=True, help="Print what would be done, and what it takes."),
        click.option("--processes", type=click.IntRange(min=1),
                     help="With --dry-run: how many will train.  [default: those that torchrun has started]"),
        click.option("--json", "as_json", is_flag=True, help="With --dry-run, print the configuration as JSON."),
    ],
    "What a run prints and writes": [
        click.option("--tick", type=float, metavar="KIMG",
                     help="Images between lines of statistics.  [default: the preset's]"),
        click.option("--snap", type=int, metavar="TICKS",
                     help="Ticks between snapshots; 0: by time only.  [default: 50]"),
        click.option("--snap-minutes", type=float, help="Minutes between snapshots; 0: by ticks only.  [default: 10]"),
        click.option("--dump", type=int, metavar="TICKS",
                     help="Ticks between states to resume from; 0: by time only.  [default: 50]"),
        click.option("--dump-minutes", type=float, help="Minutes between states; 0: by ticks only.  [default: 10]"),
        click.option("--keep", type=int, help="Newest snapshots to keep, next to the best; 0: all.  [default: 10]"),
        click.option("--grid", type=Size(),
                     help="Images in a grid of samples.  [default: 8x8; fewer where they take long by the clock]"),
        click.option("--metrics",
                     help="Metrics, joined by commas: fid10k_full, fd1k_full:pixels (see `diffit metrics`)."),
        click.option("--metrics-ref", metavar="ARCHIVE|NPZ",
                     help="What metrics compare with.  [default: the training images]"),
        click.option("--metrics-ticks", type=int,
                     help="Ticks between metrics.  [default: at the end only; 1 with --metrics-budget]"),
        click.option("--metrics-budget", type=Percent(),
                     help="Share of the time for metrics, such as 5%; the first and the last are always made."),
        click.option("--metrics-sampler", type=click.Choice(get_args(Sampler)),
                     help="Solver of the samples for metrics.  [default: the model's]"),
        click.option("--metrics-steps", type=click.IntRange(min=1),
                     help="Steps of that solver.  [default: the model's]"),
        switch("--allow-scripts", help="Let detectors of --metrics be TorchScript: programs with your rights."),
        click.option("--track", type=click.Choice(["wandb", "trackio"]),
                     help="Also send numbers and grids there.  [default: TensorBoard's events alone]"),
    ],
}  # fmt: skip

ALIASES = {
    "--results-dir": "--outdir", "--data-path": "--data", "--image-size": "--resolution", "--depth": "--num-blocks",
    "--batch-size": "--batch", "--global-batch-size": "--batch", "--xflip": "--mirror", "--transfer": "--init-from",
    "--global-seed": "--seed", "--num-workers": "--workers", "--ref-lr": "--lr", "--guidance": "--cfg-scale",
    "--snapshot": "--snap", "--checkpoint": "--dump",
}  # fmt: skip
REFUSED = {
    "--arch": "EDM's choice of a U-Net; this is DiffiT: use --preset, or --num-blocks and --hidden-dim",
    "--precond": "EDM's choice of a preconditioning; use --diffusion edm, cosine or linear",
    "--cbase": "EDM's channel multiplier; use --base-dim and --hidden-dim",
    "--cres": "EDM's channels per resolution; use --base-dim and --hidden-dim",
    "--ls": "EDM's loss scaling; no loss is scaled by hand here: leave it out",
    "--channels": "edm2's width; use --base-dim and --hidden-dim",
    "--decay": "edm2's learning-rate decay by steps; use --lr-decay, the share of the run in which the rate falls to 0",
    "--bench": "EDM's cuDNN switch; leave it out",
    "--cache": "EDM's cache of decoded images; they are kept in memory where they fit: leave it out",
    "--nosubdir": "EDM's switch; a run always gets a folder of its own below --outdir",
    "--gpus": "StyleGAN's number of GPUs; use torchrun --nproc_per_node=N train.py …",
    "--cfg": "StyleGAN's base configuration; use --preset",
    "--gamma": "StyleGAN's regularisation; a diffusion model has none",
}  # fmt: skip


@click.command(
    cls=GroupedCommand, aliases=ALIASES, refused=REFUSED,
    context_settings={"help_option_names": ["-h", "--help"]},  # also for train.py, which has no group
)  # fmt: skip
@with_options(OPTIONS)
def train(**options: Any) -> None:
    """Train DiffiT on an image archive.

    With --data and --outdir alone, a small network for the images is trained for ten minutes. Starting the same command
    again resumes it. Under torchrun the same command uses several GPUs.
    """
    given, preset = read_options(options, click.get_current_context())
    planned = how_many(given)
    outdir, resume, dry_run, as_json = (given.pop(key) for key in ("outdir", "resume", "dry_run", "as_json"))
    missing = [option for option, value in (("--data", given.get("data")), ("--outdir", outdir)) if value is None]
    if missing and not dry_run:
        raise UserError(f"{' and '.join(missing)}: needed (or --dry-run to see what would be done)")
    # Imported here: `--help` and a mistyped option need not wait for torch.
    from diffit.cli.describe import describe_run
    from diffit.data.open import facts_of, open_val
    from diffit.metrics.suite import parse_metrics
    from diffit.training import train as run_training
    from diffit.training.run_dir import read_options as read_recorded
    from diffit.utils.distributed import processes
    from diffit.utils.progress import minutes_text

    with processes(join=not dry_run) as procs:
        archive = open_archive(given, preset, dry_run)
        count_epochs(given, archive)
        config = resolve(preset, given, facts_of(archive), processes=planned or procs.count)
        parse_metrics(config.training.metrics)
        if dry_run:
            if procs.is_first:
                said = config.model_dump_json(indent=2) if as_json else describe_run(config, procs, archive, planned)
                click.echo(said)
            return
        assert archive is not None
        val = None if config.data.val is None else open_val(config.data.val, archive, config)
        autoencoder = open_autoencoder(config, [archive, val], procs.device)
        outcome = run_training(config, archive, outdir, procs, resume=resume, val=val, autoencoder=autoencoder)
        minutes = (read_recorded(outcome.run_dir) or config).training.minutes
        if outcome.snapshot is None and outcome.complete and procs.is_first:
            whole = "its whole length" if minutes is None else f"its {minutes_text(minutes)}"
            click.echo(
                f"{outcome.run_dir}: already at {outcome.images_seen / 1000:g} kimg, {whole}; a longer --kimg or "
                "--minutes goes on, --resume none begins again"
            )
        if outcome.complete and minutes is not None and procs.is_first:
            click.echo(f"to go on: {longer(sys.argv, 3 * minutes)}")
        if not outcome.complete:  # in here: the other processes may be gone, and are not waited for
            assert outcome.signal is not None
            sys.exit(128 + outcome.signal)


def longer(words: list[str], minutes: float) -> str:
    """The command that was typed, with a length of ``minutes``."""
    program = ["python", "train.py"] if Path(words[0]).name == "train.py" else ["diffit"]
    kept, skip = list[str](), False
    for word in map(public, words[1:]):
        dropped = word.partition("=")[0] in ("--minutes", "--hours", "--resume")
        if not skip and not dropped:
            kept.append(word)
        skip = not skip and dropped and "=" not in word
    return shlex.join([*program, *kept, "--minutes", f"{minutes:g}"])


def read_options(options: dict[str, Any], ctx: click.Context) -> tuple[dict[str, Any], str | Config | None]:
    """The options as :func:`resolve` takes them, and the preset or the whole configuration of a file."""
    preset: str | Config | None = options.pop("preset")
    options.pop("config_file")
    if isinstance(base := ctx.meta.get(BASE), Config):
        if preset is not None:
            raise UserError(f"--preset {preset} and --config with a run's options both say what to train: give one")
        preset = base
    lengths = [name for name in LENGTHS if options[name] is not None]
    typed = [name for name in lengths if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    for name in lengths if typed else ():
        if name not in typed:  # of the file
            options[name] = None
    if options["num_blocks"] is not None:
        options["num_blocks"] = tuple(options["num_blocks"])
    found = in_our_terms(options)
    source = Path(found.get("init_from") or "")
    if source.suffix == ".safetensors" or (found.get("init_from") and source.exists()):
        found["init_from"] = str(source.resolve())  # also one that is gone: a run that began with it needs it no more
    if preset is None and not spelled_out(found):
        found["default_minutes"] = MINUTES
    return found, preset


def in_our_terms(options: dict[str, Any]) -> dict[str, Any]:
    """The options that were given, as :func:`resolve` takes them; UserError for two that say the same."""
    options["grid"] = options["grid"] and options["grid"][::-1]  # columns first
    if options["metrics"] is not None:
        options["metrics"] = tuple(name for name in options["metrics"].split(",") if name and name != "none")
    if options.pop("fp16"):
        if options["precision"] not in (None, "fp16"):
            raise UserError(f"--fp16 and --precision {options['precision']} say different things: give one")
        options["precision"] = "fp16"
    given = [f"--{name}" for name in LENGTHS if options[name] is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} say the same thing, how long to train: give one")
    hours, duration = options.pop("hours"), options.pop("duration")
    options["minutes"] = options["minutes"] if hours is None else hours * 60
    options["kimg"] = options["kimg"] if duration is None else duration
    ema = options.pop("ema")
    options["ema_halflife_kimg"] = None if ema is None else ema * 1000
    return {key: value for key, value in options.items() if value is not None or key == "outdir"}


def how_many(options: dict[str, Any]) -> int | None:
    """``--processes``, which leaves the options; UserError without a dry run."""
    planned: int | None = options.pop("processes", None)
    if planned is not None and not options["dry_run"]:
        raise UserError(f"--processes {planned}: is for --dry-run; torchrun --nproc_per_node={planned} starts so many")
    return planned


def count_epochs(options: dict[str, Any], archive: "Archive | None") -> None:
    """Put ``kimg`` in the place of ``epochs``."""
    epochs = options.pop("epochs", None)
    if epochs is not None:
        if archive is None:
            raise UserError("--epochs counts passes over the data: give --data too, or --kimg")
        options["kimg"] = epochs * len(archive) / 1000


def spelled_out(options: dict[str, Any]) -> bool:
    from diffit.configs.resolve import NETWORK

    return any(name in options for name in NETWORK)


def open_archive(options: dict[str, Any], preset: str | Config | None, dry_run: bool) -> "Archive | None":
    """The data, with its absolute path in the options; a latent cache brings its VAE."""
    from diffit.data.latents import LatentArchive
    from diffit.data.open import open_data
    from diffit.data.remote import url_of

    archive, path = None, options.get("data")
    if path is not None and not (dry_run and url_of(path) is None and not Path(path).exists()):
        skip = options.get("on_error") == "skip"
        archive = open_data(path, options.get("cond"), preset if isinstance(preset, str) else None, skip_broken=skip)
        options["data"] = archive.location
        if isinstance(archive, LatentArchive):
            options.setdefault("vae", archive.header.vae)
    if options.get("vae") is not None and Path(options["vae"]).is_dir():
        options["vae"] = str(Path(options["vae"]).resolve())  # the file will be sampled from elsewhere
    return archive


def open_autoencoder(config: Config, archives: "list[Archive | None]", device: Any) -> "Autoencoder | None":
    """The VAE of a latent model, which must be that of cached latents."""
    from diffit.data.latents import LatentArchive
    from diffit.models.autoencoder import autoencoder_of

    try:
        named = None if config.autoencoder is None else config.autoencoder.vae  # by the user, not by a file of others
        autoencoder = autoencoder_of(config, named, device=device)
    except UserError as error:
        raise UserError(f"the model's autoencoder: {error} (--vae PATH|ID names another)") from None
    for latents in archives:
        if autoencoder is not None and isinstance(latents, LatentArchive):
            latents.check_vae(autoencoder.sha256, autoencoder.scale, autoencoder.id)
    return autoencoder
