"""``diffit data``: make and inspect image archives and latent caches."""

import logging
import shlex
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import click
from PIL import Image
from rich.filesize import decimal

from diffit.cli.options import Bytes, Size
from diffit.data.archive import describe_shape
from diffit.data.check import CheckReport
from diffit.data.check import check as check_archive
from diffit.data.convert import CHOICES, ConvertReport
from diffit.data.convert import convert as convert_source
from diffit.data.formats import UNREAD, suffix_of, unread
from diffit.data.latents import Header, LatentArchive, is_latents, scale_warning
from diffit.data.transforms import TRANSFORMS
from diffit.errors import UserError, printable
from diffit.models.autoencoder import SCALE
from diffit.utils.images import save_grid
from diffit.utils.locks import exclusive
from diffit.utils.progress import progress

F = TypeVar("F", bound=Callable[..., Any])
LISTED = 20  # classes, broken images


@click.group()
def data() -> None:
    """Convert, encode, check and inspect image archives."""
    # Images above Pillow's limit are refused with a line of our own; its warning would only say it twice.
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    # Strange metadata in photographs does not concern the pixels.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.ERROR)


def _choice(name: str, help: str, default: str) -> Callable[[F], F]:
    known = click.Choice(CHOICES[name[2:].replace("-", "_")])
    return click.option(name, type=known, default=default, show_default=True, help=help)


@data.command()
@click.option("--source", required=True, type=click.Path(path_type=Path), help="Folder or file to read; see above.")
@click.option("--dest", required=True, type=click.Path(path_type=Path), help="Archive to write: NAME.zip, or a folder.")
@click.option("--resolution", type=Size(), help="Size of the images: 32, or 64x48 (width x height).  [default: theirs]")
@click.option("--transform", type=click.Choice(list(TRANSFORMS)), help="How images get to it.  [default: resize]")
@_choice("--channels", "Gray or colour; auto is gray if every image is gray.", "auto")
@click.option(
    "--range", "value_range", default="auto", show_default=True, metavar="auto|full|LOW,HIGH",
    help="Black and white of images with more than 8 bits; auto finds 10, 12, 14 or 16 bits.",
)  # fmt: skip
@click.option(
    "--background", default="white", show_default=True, metavar="COLOUR",
    help="What transparent images are laid on: white, black, #RRGGBB or R,G,B.",
)  # fmt: skip
@_choice("--frames", "Frames of animations and pages of files: the first, or all as images of their own.", "first")
@_choice("--class-order", "Numbering of class folders: natural is 2 before 10, plain by character.", "natural")
@click.option("--max-images", type=click.IntRange(min=1), help="Keep a random subset of this many.  [default: all]")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random subset.")
@_choice("--on-error", "At a broken image: stop, or skip it and say so.", "stop")
@click.option("--cond", is_flag=True, help="Require a label for every image; folders named by numbers are classes too.")
@click.option("--overwrite", is_flag=True, help="Replace the archive at --dest.")
@click.option("--shard-size", type=Bytes(), help="Write a folder of zips of at most this size, such as 4GiB.")
def convert(source: Path, dest: Path, resolution: tuple[int, int] | None, **options: Any) -> None:
    """Convert raw images into an archive to train on.

    The source is a folder or zip of images, where folders are classes; another archive with dataset.json;
    cifar-10-python.tar.gz; WebDataset's tars or the Hugging Face Hub's Parquet tables, one or a folder of them; MNIST
    idx files; or an LMDB folder.
    """
    started = time.monotonic()
    size = resolution and (resolution[1], resolution[0])
    with exclusive(dest, "use another --dest", beside=True), progress("converting") as show:
        report = convert_source(source, dest, progress=show, resolution=size, **options)
    how = "" if size is None else f" ({options['transform'] or 'resize'})"
    _print_conversion(source, report, how)
    _line("wrote", f"{dest} in {time.monotonic() - started:.1f} s")
    _next("data check", dest, report.labelled)


def _print_conversion(source: Path, report: ConvertReport, how: str) -> None:
    _line("read", f"{source}: {report.kind}, {report.found} images")
    for text in unread(report.ignored):
        _line("not read", text)
    if others := [name for name in report.ignored if suffix_of(name) not in UNREAD]:
        listed = ", ".join(f"{n} {suffix}" for suffix, n in Counter(map(suffix_of, others)).most_common(5))
        _line("ignored", f"{len(others)} files that are not images ({listed})")
    for _, reason in report.skipped[:LISTED]:
        _line("skipped", reason)
    if report.skipped:
        _line("skipped", f"{len(report.skipped)} broken images in all")
    for text in report.notes:
        _line("note", text)
    _line("converted", f"{report.written} images of {describe_shape(report.image_shape)}{how}")
    names = report.class_names or [str(i) for i in range(report.num_classes)]
    _line("classes", f"{report.num_classes}: {_some(names)}" if report.labelled else "none")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")


@data.command()
@click.option("--source", required=True, type=click.Path(path_type=Path), help="Image archive to encode.")
@click.option("--dest", required=True, type=click.Path(path_type=Path), help="Folder to write the latents to.")
@click.option("--vae", metavar="PATH|ID", required=True, help="AutoencoderKL: a folder of diffusers, or a Hub id.")
@click.option("--scale", type=float, default=SCALE, show_default=True, help="Factor from latents to what a model sees.")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Images encoded at a time.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16"]), default="float32", show_default=True,
    help="Precision of the latents on disk.",
)  # fmt: skip
@click.option("--tiling", is_flag=True, help="Encode large images in parts: less memory, slightly other numbers.")
@click.option("--shard-size", type=click.IntRange(1, 2**31 - 1), default=1024, show_default=True, help="Images a file.")
def encode(source: Path, dest: Path, vae: str, scale: float, tiling: bool, **options: Any) -> None:
    """Encode an archive's images as latents to train on.

    Their mirror images are encoded, too. The same command goes on where it was interrupted. Under torchrun it uses
    several GPUs.
    """
    from diffit.data.encode import encode_archive
    from diffit.models.autoencoder import load_autoencoder
    from diffit.utils.distributed import processes

    with processes() as procs:
        autoencoder = load_autoencoder(vae, scale=scale, device=procs.device, tiling=tiling)
        with ExitStack() as held:
            with procs.together():
                if procs.is_first:
                    held.enter_context(exclusive(dest, "use another --dest", beside=True))
            show = held.enter_context(progress("encoding", quiet=not procs.is_first, lines=True))
            header = encode_archive(source, dest, autoencoder, procs=procs, progress=show, **options)
        if procs.is_first:
            _print_latents(header)
            _line("wrote", str(dest))
            _next("data check", dest)


@data.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--cond", is_flag=True, help="Require a label for every image.")
@click.option(
    "--grid", type=click.Path(path_type=Path), help="Picture of random images to write.  [default: NAME-grid.png]"
)
@click.option("--no-grid", is_flag=True, help="Write no picture.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the random images.")
@click.pass_context
def check(ctx: click.Context, path: Path, cond: bool, grid: Path | None, no_grid: bool, seed: int) -> None:
    """Print what an archive or latent cache holds.

    The exit status is 1 if something is wrong with it.
    """
    if is_latents(path):
        _check_latents(path, cond)
        return
    with progress("reading") as show:
        report = check_archive(path, cond=cond, seed=seed, progress=show)
    _print_check(report)
    if report.samples is not None and not no_grid:
        where = grid or default_grid(path)
        try:
            save_grid(report.samples, where)
        except UserError as error:  # who did not ask for it need not have it
            if grid is not None:
                raise
            _line("grid", f"none: {error}")
        else:
            _line("grid", f"{where} ({len(report.samples)} images at random, in the order of the archive; seed {seed})")
    for warning in report.warnings:
        _line("warning", warning)
    for problem in report.problems:
        _line("problem", problem)
    if report.problems:
        ctx.exit(1)
    _next_training(path, bool(report.labelled))


def default_grid(path: Path) -> Path:
    """In the current folder, or next to the archive where that is in it: a picture in it would be one of its images."""
    whole = path.resolve()
    inside = Path.cwd().is_relative_to(whole)
    return (whole.parent if inside else Path()) / f"{whole.name.removesuffix('.zip')}-grid.png"


def _print_check(report: CheckReport) -> None:
    _line("archive", f"{report.path}, {decimal(report.num_bytes)}")
    _line("images", str(report.count))
    for shape, count in report.shapes.most_common():
        _line("size", f"{describe_shape(shape)} (width x height): {count} images")
    labelled = f"{report.labelled} of {report.count} images, {report.num_classes} classes"
    _line("labels", labelled if report.labelled else "none")
    for label in sorted(report.class_counts)[:LISTED]:
        name = (report.class_names or [])[label : label + 1]
        _line("", f"  {label:3d} {' '.join(name)}: {report.class_counts[label]}")
    if len(report.class_counts) > LISTED:
        counts = report.class_counts.values()
        _line("", f"  ... and {len(counts) - LISTED} more; {min(counts)} to {max(counts)} images a class")
    if report.mean:
        _line("mean", " ".join(f"{value:.2f}" for value in report.mean) + "  (a channel, 0 to 255)")
        unit = sum(value / 127.5 for value in report.std) / len(report.std)
        _line("std", " ".join(f"{value:.2f}" for value in report.std) + f"  ({unit:.2f} on the scale -1 to 1)")
    _line("duplicates", str(report.duplicates))
    for _, reason in report.damaged:
        _line("damaged", reason)


def _check_latents(path: Path, cond: bool) -> None:
    archive = LatentArchive(path, cond=cond)
    with progress("reading") as show:
        mean, std = archive.check(show)
    _line("latents", f"{path}, {decimal(sum(file.stat().st_size for file in path.iterdir()))}")
    _print_latents(archive.header)
    labelled = f"{archive.num_classes} classes" if archive.has_labels else "none"
    _line("labels", labelled)
    if warning := scale_warning(mean, std, archive.header):
        _line("warning", warning)
    _next_training(path, archive.has_labels)


def _print_latents(header: Header) -> None:
    height, width = header.image_size
    shape = "x".join(map(str, header.latent_shape))
    _line("images", f"{header.count} of {width}x{height} from {header.source}, with their mirror images")
    _line("vae", f"{header.vae} (weights {header.vae_sha256[:12]})" + (", tiled" if header.tiling else ""))
    _line("shape", f"{shape}, {header.dtype}, {header.num_shards} files")
    _line("mean", " ".join(f"{value:.3f}" for value in header.latent_mean or ()) + f"  (scaled by {header.scale:g})")
    _line("std", " ".join(f"{value:.3f}" for value in header.latent_std or ()))


def _next_training(path: Path, labelled: bool) -> None:
    outdir = shlex.quote(f"runs/{path.name.removesuffix('.zip')}")
    _next(f"train --outdir {outdir} --data", path, labelled)


def _next(command: str, path: Path, labelled: bool = False) -> None:
    _line("next", f"diffit {command} {shlex.quote(str(path))}" + (" --cond" if labelled else ""))


def _line(label: str, text: str) -> None:
    click.echo(f"{label:<10} {printable(text, 5000)}")  # names in archives may hold what a terminal obeys
