"""``diffit data``: make and inspect image archives and latent caches."""

import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from diffit.data.archive import describe_shape
from diffit.data.check import CheckReport
from diffit.data.check import check as check_archive
from diffit.data.convert import TRANSFORMS
from diffit.data.convert import convert as convert_source
from diffit.data.latents import Header, LatentArchive, is_latents, scale_warning
from diffit.models.autoencoder import SCALE
from diffit.utils.images import save_grid

LISTED_CLASSES = 20
SECONDS_A_LINE = 30


class Resolution(click.ParamType):
    name = "WxH"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"(\d{1,6})(?:[xX×](\d{1,6}))?", str(value).strip())
        if not match:
            self.fail(f"{value!r} is not a size in pixels such as 32 or 64x48 (width x height)", param, ctx)
        return int(match[1]), int(match[2] or match[1])


@click.group()
def data() -> None:
    """Convert, encode, check and inspect image archives."""
    # Images above Pillow's limit are refused with a line of our own; its warning would only say it twice.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    # Strange metadata in photographs does not concern the pixels.
    warnings.filterwarnings("ignore", module=r"PIL\.")


@data.command()
@click.option("--source", required=True, type=click.Path(path_type=Path), help="Folder or file to read; see above.")
@click.option("--dest", required=True, type=click.Path(path_type=Path), help="Archive to write: NAME.zip, or a folder.")
@click.option("--resolution", type=Resolution(), help="Size of the images, 32 or 64x48.  [default: as they are]")
@click.option("--transform", type=click.Choice(TRANSFORMS), help="How to reach it.  [default: resize, Lanczos]")
@click.option(
    "--channels",
    type=click.Choice(["auto", "gray", "rgb"]),
    default="auto",
    show_default=True,
    help="auto is gray if every image is gray.",
)
@click.option("--max-images", type=click.IntRange(min=1), help="Take a random subset of this many.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the subset.")
@click.option(
    "--on-error", type=click.Choice(["stop", "skip"]), default="stop", show_default=True, help="Broken images."
)
@click.option("--cond", is_flag=True, help="Require a label for every image.")
@click.option("--overwrite", is_flag=True, help="Replace the archive at --dest.")
def convert(
    source: Path,
    dest: Path,
    resolution: tuple[int, int] | None,
    transform: str | None,
    channels: str,
    max_images: int | None,
    seed: int,
    on_error: str,
    cond: bool,
    overwrite: bool,
) -> None:
    """Convert raw images into an archive to train on.

    The source is a folder or zip of images, where folders are classes; another archive with dataset.json;
    cifar-10-python.tar.gz; MNIST idx files; or an LMDB folder.
    """
    started = time.monotonic()
    with _progress("converting") as progress:
        report = convert_source(
            source,
            dest,
            resolution=resolution,
            transform=transform,
            channels=channels,
            max_images=max_images,
            seed=seed,
            on_error=on_error,
            cond=cond,
            overwrite=overwrite,
            progress=progress,
        )
    _line("read", f"{source}: {report.kind}, {report.found} images")
    if report.ignored:
        suffixes = Counter(Path(name).suffix or name for name in report.ignored)
        listed = ", ".join(f"{n} {suffix}" for suffix, n in suffixes.most_common(5))
        _line("ignored", f"{len(report.ignored)} files that are not images ({listed})")
    for _, reason in report.skipped:
        _line("skipped", reason)
    if report.skipped:
        _line("skipped", f"{len(report.skipped)} broken images in all")
    _line("converted", f"{report.written} images of {describe_shape(report.image_shape)}")
    if report.labelled:
        names = report.class_names or [str(i) for i in range(report.num_classes)]
        shown = ", ".join(names[:LISTED_CLASSES]) + (", ..." if len(names) > LISTED_CLASSES else "")
        _line("classes", f"{report.num_classes}: {shown}")
    elif report.unlabelled:
        _line("classes", f"labels dropped: {len(report.unlabelled)} images have none; --cond names them")
    else:
        _line("classes", "none")
    seconds = time.monotonic() - started
    _line("wrote", f"{dest} in {seconds:.1f} s")
    _line("next", f"diffit data check {dest}" + (" --cond" if report.labelled else ""))


@data.command()
@click.option("--source", required=True, type=click.Path(path_type=Path), help="Image archive.")
@click.option("--dest", required=True, type=click.Path(path_type=Path), help="Folder to write the latents to.")
@click.option("--vae", metavar="PATH|ID", required=True, help="AutoencoderKL: a folder of diffusers, or a Hub id.")
@click.option("--scale", type=float, default=SCALE, show_default=True, help="Of the latents that a model sees.")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Images at a time.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True, help="On disk."
)
@click.option("--tiling", is_flag=True, help="Encode large images in parts: less memory, slightly other numbers.")
@click.option("--shard-size", type=click.IntRange(min=1), default=1024, show_default=True, help="Images a file.")
def encode(
    source: Path, dest: Path, vae: str, scale: float, batch: int, dtype: str, tiling: bool, shard_size: int
) -> None:
    """Encode an archive's images, and their mirror images, as latents to train on.

    The same command goes on where it was interrupted. Under torchrun it uses several GPUs.
    """
    from diffit.data.encode import encode_archive
    from diffit.models.autoencoder import load_autoencoder
    from diffit.utils.distributed import processes

    with processes() as procs:
        autoencoder = load_autoencoder(vae, scale=scale, device=procs.device, tiling=tiling)
        with _progress("encoding", quiet=not procs.is_first, lines=True) as progress:
            header = encode_archive(
                source,
                dest,
                autoencoder,
                procs=procs,
                batch=batch,
                dtype=dtype,
                shard_size=shard_size,
                progress=progress,
                warn=lambda text: _line("warning", text),
            )
        if procs.is_first:
            _print_latents(header)
            _line("wrote", str(dest))
            _line("next", f"diffit data check {dest}")


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--cond", is_flag=True, help="Require a label for every image.")
@click.option("--grid", type=click.Path(path_type=Path), help="Sample grid to write.  [default: ./NAME-grid.png]")
@click.option("--no-grid", is_flag=True, help="Write no sample grid.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the grid's choice.")
@click.pass_context
def check(ctx: click.Context, path: Path, cond: bool, grid: Path | None, no_grid: bool, seed: int) -> None:
    """Print what an archive or latent cache holds; exit with status 1 if something is wrong with it."""
    if is_latents(path):
        _check_latents(path, cond)
        return
    with _progress("reading") as progress:
        report = check_archive(path, cond=cond, seed=seed, progress=progress)
    _print_check(report)
    if report.samples is not None and not no_grid:
        grid = grid or Path(f"{path.resolve().name.removesuffix('.zip')}-grid.png")
        save_grid(report.samples, grid)
        _line("grid", f"{grid} ({len(report.samples)} random images, seed {seed})")
    for problem in report.problems:
        _line("problem", problem)
    if report.problems:
        ctx.exit(1)
    _line("next", f"diffit train --outdir runs --data {path}" + (" --cond" if report.labelled else ""))


def _print_check(report: CheckReport) -> None:
    _line("archive", f"{report.path}, {report.num_bytes / 1e6:.1f} MB")
    _line("images", str(report.count))
    for shape, count in report.shapes.most_common():
        _line("size", f"{describe_shape(shape)} (width x height): {count} images")
    classes = max(max(report.class_counts, default=-1) + 1, len(report.class_names or ())) if report.labelled else 0
    _line("labels", f"{report.labelled} of {report.count} images, {classes} classes")
    for label in range(min(classes, LISTED_CLASSES)):
        name = (report.class_names or [])[label : label + 1]
        _line("", f"  {label:3d} {' '.join(name)}: {report.class_counts[label]}")
    if classes > LISTED_CLASSES:
        counts = [report.class_counts[label] for label in range(classes)]
        _line("", f"  ... and {classes - LISTED_CLASSES} more; {min(counts)} to {max(counts)} images a class")
    if report.mean:
        _line("mean", " ".join(f"{value:.2f}" for value in report.mean) + "  (a channel, 0 to 255)")
        unit = sum(value / 127.5 for value in report.std) / len(report.std)
        _line("std", " ".join(f"{value:.2f}" for value in report.std) + f"  ({unit:.2f} on the scale -1 to 1)")
    _line("duplicates", str(report.duplicates))
    for _, reason in report.damaged:
        _line("damaged", reason)


def _check_latents(path: Path, cond: bool) -> None:
    archive = LatentArchive(path, cond=cond)
    with _progress("reading") as progress:
        mean, std = archive.check(progress)
    _line("latents", f"{path}, {sum(file.stat().st_size for file in path.iterdir()) / 1e6:.1f} MB")
    _print_latents(archive.header)
    labelled = f"{archive.num_classes} classes" if archive.has_labels else "none"
    _line("labels", labelled)
    if warning := scale_warning(mean, std, archive.header):
        _line("warning", warning)
    _line("next", f"diffit train --outdir runs --data {path}" + (" --cond" if archive.has_labels else ""))


def _print_latents(header: Header) -> None:
    height, width = header.image_size
    shape = "x".join(map(str, header.latent_shape))
    _line("images", f"{header.count} of {width}x{height} from {header.source}, with their mirror images")
    _line("vae", f"{header.vae} (weights {header.vae_sha256[:12]})" + (", tiled" if header.tiling else ""))
    _line("shape", f"{shape}, {header.dtype}, {header.num_shards} files")
    _line("mean", " ".join(f"{value:.3f}" for value in header.latent_mean or ()) + f"  (scaled by {header.scale:g})")
    _line("std", " ".join(f"{value:.3f}" for value in header.latent_std or ()))


def _line(label: str, text: str) -> None:
    click.echo(f"{label:<10} {text}")


@contextmanager
def _progress(title: str, *, quiet: bool = False, lines: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr if that is a terminal; otherwise nothing or, with ``lines``, a line now and then."""
    console = Console(stderr=True)
    shown = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown
        bar.update(task, completed=done, total=total)
        if bar.disable and lines and not quiet and (done == total or time.monotonic() - shown > SECONDS_A_LINE):
            click.echo(f"{title} {done} of {total} images", err=True)
            shown = time.monotonic()

    with Progress(console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield show
