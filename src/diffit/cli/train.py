"""``diffit train`` and ``train.py``."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from diffit.cli.options import Numbers, Size, switch, with_options
from diffit.configs.presets import PRESETS
from diffit.configs.resolve import resolve
from diffit.errors import UserError

INTERRUPTED = 130  # what shells expect of a program ended by Ctrl-C

OPTIONS: list[Callable[..., Any]] = [
    click.option("--outdir", "--results-dir", type=click.Path(path_type=Path), help="Where run folders go."),
    click.option("--data", "--data-path", help="Image archive: folder or zip (see `diffit data convert`)."),
    click.option("--preset", metavar="NAME", help=f"Recipe: {', '.join(PRESETS)}. Default: chosen by image size."),
    click.option("--vae", metavar="PATH|ID",
                 help="Autoencoder of a latent model. Default: the latents' own, or the preset's."),
    click.option("--diffusion", type=click.Choice(["edm", "cosine", "linear"]), help="Default: the preset's."),
    switch("--cond", help="Class-conditional, with the labels of the archive."),
    click.option("--val", help="Archive of held-out images: their loss is reported at every tick."),
    # Network
    click.option("--resolution", "--image-size", type=Size(), help="Size of the images. Default: that of the data."),
    click.option("--base-dim", type=int, help="Width of the first stage."),
    click.option("--hidden-dim", type=int, help="Width of the others."),
    click.option("--num-heads", type=int, help="Attention heads in every stage."),
    click.option("--num-blocks", "--depth", type=Numbers(),
                 help="ResBlocks a stage: one number, or one a stage (2,4,4). Latent model: its depth."),
    click.option("--window-size", type=int, help="Side of the attention windows, in tokens."),
    click.option("--dropout", type=float, help="Dropout in the MLPs."),
    # Recipe
    click.option("--batch", "--batch-size", "--global-batch-size", type=int, help="Images a step, over all processes."),
    click.option("--batch-gpu", type=int, help="Images a forward pass; accumulation makes up the rest of --batch."),
    click.option("--kimg", type=float, help="Length of the training in thousands of images."),
    click.option("--duration", type=float, metavar="MIMG", help="The same in millions of images."),
    click.option("--epochs", type=float, help="The same in passes over the data."),
    click.option("--lr", type=float, help="Learning rate."),
    click.option("--lr-rampup-kimg", type=float, help="Length of its linear ramp-up."),
    click.option("--ema", type=float, metavar="MIMG", help="Half-life of the moving average in millions of images."),
    click.option("--label-drop", type=float, help="Probability of training without the label, for guidance."),
    click.option("--augment", type=float, help="Probability of each augmentation; 0 for none."),
    switch("--mirror", "--xflip", help="Flip half of the images left to right."),
    click.option("--init-from", "--transfer", metavar="FILE", help="Begin with the weights of a network file."),
    click.option("--cfg-scale", type=float, help="Guidance scale that the file will sample with by default."),
    click.option("--seed", "--global-seed", type=int, help="Seed of everything random."),
    # Machine
    click.option("--precision", type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
                 help="auto: bf16 on GPUs, else fp32."),
    switch("--fp16", help="Same as --precision fp16."),
    switch("--grad-ckpt", help="Recompute activations: less memory, more time."),
    switch("--compile", help="torch.compile the network."),
    click.option("--workers", "--num-workers", type=int, help="Processes that decode what does not fit in memory."),
    # Run
    click.option("--tick", type=float, metavar="KIMG", help="Images between lines of statistics."),
    click.option("--snap", type=int, metavar="TICKS", help="Ticks between snapshots and grids; 0: at the end only."),
    click.option("--dump", type=int, metavar="TICKS", help="Ticks between training states; 0: at the end only."),
    click.option("--grid", type=Size(), help="Images in a grid of samples.  [default: 8x8]"),
    click.option("--metrics", help="Metrics, joined by commas: fid10k_full, fd1k_full:pixels (see `diffit metrics`)."),
    click.option("--metrics-ref", metavar="ARCHIVE|NPZ", help="What they compare with. Default: the training images."),
    click.option("--metrics-ticks", type=int, help="Ticks between them; default: at the end only."),
    click.option("--desc", help="Text to put into the run's name."),
    click.option("--resume", default="auto", show_default=True, metavar="auto|none|PATH",
                 help="auto: go on with the newest run in --outdir that has the same options."),
    click.option("-n", "--dry-run", is_flag=True, help="Print what would be done, and what it takes."),
]  # fmt: skip


@click.command(context_settings={"help_option_names": ["-h", "--help"]})  # also for train.py, which has no group
@with_options(OPTIONS)
def train(**options: Any) -> None:
    """Train DiffiT on an image archive.

    Starting the same command again resumes it. Under torchrun the same command uses several GPUs.
    """
    outdir, dry_run, resume = (options.pop(key) for key in ("outdir", "dry_run", "resume"))
    options["grid"] = options["grid"] and options["grid"][::-1]
    preset, epochs = options.pop("preset"), options.pop("epochs")
    normalise(options)
    # Imported here: `--help` and a mistyped option need not wait for torch.
    from diffit.cli.describe import describe_run
    from diffit.data.latents import LatentArchive
    from diffit.data.open import facts_of, open_data, open_val
    from diffit.metrics.suite import parse_metrics
    from diffit.models.autoencoder import autoencoder_of
    from diffit.training.loop import train as run_training
    from diffit.utils.distributed import processes

    if not dry_run and (options["data"] is None or outdir is None):
        raise UserError("--data and --outdir are needed (or --dry-run to see what would be done)")
    with processes(join=not dry_run) as procs:
        archive = val = None
        if options["data"] is not None and not (dry_run and not Path(options["data"]).exists()):
            archive = open_data(options["data"], options["cond"], preset)
            options["data"] = str(archive.path.resolve())
            if options["vae"] is None and isinstance(archive, LatentArchive):
                options["vae"] = archive.header.vae
        if options["vae"] is not None and Path(options["vae"]).is_dir():
            options["vae"] = str(Path(options["vae"]).resolve())  # the file will be sampled from elsewhere
        if epochs is not None:
            options["kimg"] = kimg_of(epochs, options["kimg"], archive)
        config = resolve(preset, options, facts_of(archive), processes=procs.count)
        parse_metrics(config.training.metrics)
        if dry_run:
            if procs.is_first:
                click.echo(describe_run(config, procs.count, archive))
            return
        assert archive is not None
        if options["val"] is not None:
            val = open_val(options["val"], archive, config)
        try:
            autoencoder = autoencoder_of(config, device=procs.device)
        except UserError as error:
            raise UserError(f"the model's autoencoder: {error} (--vae PATH|ID names another)") from None
        if autoencoder is not None:
            for latents in (archive, val):
                if isinstance(latents, LatentArchive):
                    latents.check_vae(autoencoder.sha256, autoencoder.scale, autoencoder.id)
        outcome = run_training(config, archive, outdir, procs, resume=resume, val=val, autoencoder=autoencoder)
        if outcome.snapshot is None and procs.is_first:
            click.echo(
                f"{outcome.run_dir}: already at {outcome.images_seen / 1000:g} kimg; "
                "a longer --kimg goes on, --resume none begins again"
            )
    if outcome.interrupted:
        sys.exit(INTERRUPTED)


def normalise(options: dict[str, Any]) -> None:
    """Other projects' spellings to ours, in place."""
    for ours, theirs, factor in (("kimg", "duration", 1000), ("ema_halflife_kimg", "ema", 1000)):
        value = options.pop(theirs)
        if value is not None:
            if options.get(ours) is not None:
                raise UserError(f"--{ours} and --{theirs} say the same thing: give one")
            options[ours] = value * factor
    if options.pop("fp16"):
        if options["precision"] not in (None, "fp16"):
            raise UserError(f"--fp16 and --precision {options['precision']} say different things: give one")
        options["precision"] = "fp16"
    if options["metrics"] is not None:
        options["metrics"] = tuple(name for name in options["metrics"].split(",") if name and name != "none")
    if options["num_blocks"] is not None:
        options["num_blocks"] = tuple(options["num_blocks"])


def kimg_of(epochs: float, kimg: float | None, archive: Any) -> float:
    if kimg is not None:
        raise UserError("--epochs says the same thing as --kimg and --duration: give one")
    if archive is None:
        raise UserError("--epochs counts passes over the data: give --data too, or --kimg")
    return epochs * len(archive) / 1000
