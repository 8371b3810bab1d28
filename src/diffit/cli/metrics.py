"""``diffit metrics``."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from diffit.cli.options import Steps
from diffit.errors import UserError

DETECTOR_HELP = "inception, pixels, or a file: TorchScript, or of `train-detector`.  [default: inception]"
FILE = click.Path(path_type=Path)


@click.group()
def metrics() -> None:
    """Judge samples: FID, sFID, Inception score, precision, recall, KID, near-copies."""


@metrics.command()
@click.option("--network", metavar="FILE|ID", help="Judge the samples of this network file, or …")
@click.option("--images", type=FILE, help="… these images: folder, zip, or npz with arr_0.")
@click.option("--ref", type=FILE, help="Real images (archive), or an npz of statistics: EDM's, ADM's, or of `ref`.")
@click.option(
    "--metrics",
    "names",
    required=True,
    multiple=True,
    metavar="NAMES",
    help="fid50k_full, kid50k_full, is50k, pr50k3_full, adm50k; any number for 50k (pr1500_3_full); joined by commas.",
)
@click.option("--detector", metavar="NAME|FILE", help=DETECTOR_HELP)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Draw new samples so many times: the best, and minimum, mean and spread.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="First seed; one a sample.")
@click.option("--sampler", type=click.Choice(["heun", "euler", "dpm++", "ddpm", "ddim"]), help="Default: the file's.")
@click.option("--steps", type=Steps(), metavar="N|ddimN", help="Steps of the solver. Default: the file's.")
@click.option("--vae", metavar="PATH|ID", help="Autoencoder of a latent model. Default: the file's.")
@click.option("--cfg-scale", type=float, help="Guidance scale, 1 for none. Default: the file's.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images at a time.")
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "bf16", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of the sampled network; detectors are fp32.",
)
def calc(
    network: str | None,
    images: Path | None,
    ref: Path | None,
    names: tuple[str, ...],
    detector: str | None,
    repeats: int,
    seed: int,
    batch: int,
    precision: str,
    vae: str | None,
    **changes: Any,
) -> None:
    """Compute metrics of a network or of images.

    Prints a JSON record a metric, complete with all that the number depends on, and the number itself on stderr.
    Under torchrun the same command uses several GPUs. Nothing is written to disk but cached statistics of --ref.
    """
    from diffit.metrics.evaluate import evaluate_images, evaluate_network
    from diffit.metrics.images import open_images
    from diffit.metrics.record import summarise_repeats
    from diffit.metrics.suite import Suite
    from diffit.utils.distributed import processes

    if (network is None) == (images is None):
        raise UserError("give either --network or --images: what is to be judged")
    asked = [name for text in names for name in text.split(",") if name]
    with processes() as procs:
        if images is not None:
            if repeats > 1:
                raise UserError("--repeats draws new samples: it needs --network")
            pictures = open_images(images)
            suite = Suite(asked, ref, pictures.shape, procs, detector=detector, batch=batch)
            cards = evaluate_images(suite, pictures, procs, batch=batch, progress=True)
        else:
            from diffit.sampling.model import load
            from diffit.weights import load_network, state_hash

            assert network is not None
            model = load(network, device=procs.device, precision=precision, vae=vae).with_sampling(**changes)
            suite = Suite(asked, ref, model.config.image_shape, procs, detector=detector, batch=batch)
            digest = state_hash(load_network(network)[0].state_dict())  # of the file, not of what precision makes of it
            runs = [
                evaluate_network(
                    suite, model, procs, first_seed=seed + i * suite.samples,
                    real_labels=labels_of(ref, model.config.model.num_classes), batch=batch, progress=True,
                    network=Path(network).name, weights_sha256=digest,
                )
                for i in range(repeats)
            ]  # fmt: skip
            cards = runs[0] if repeats == 1 else [summarise_repeats(cards) for cards in zip(*runs, strict=True)]
        if procs.is_first:
            report(cards)


def labels_of(ref: Path | None, classes: int) -> Any:
    """The labels of a reference that has the model's classes; None where classes are drawn evenly."""
    from diffit.data.archive import ImageArchive

    if not classes or ref is None or ref.suffix == ".npz":
        return None
    archive = ImageArchive(ref)
    return ImageArchive(ref, cond=True).labels if archive.has_labels and archive.num_classes == classes else None


def report(cards: list[dict[str, Any]]) -> None:
    from diffit.metrics.record import format_numbers

    for card in cards:
        click.echo(json.dumps(card))
        click.echo(f"{card['metric']}: {format_numbers(card['results'])}", err=True)
        for name, r in card.get("repeats", {}).get("numbers", {}).items():
            over = f"min {r['minimum']:.5g}, mean {r['mean']:.5g} ± {r['spread']:.2g}"
            click.echo(f"  {name} over {len(r['values'])} repeats: {over}", err=True)
        for note in card["notes"]:
            click.echo(f"  note: {note}", err=True)


@metrics.command()
@click.option("--data", type=FILE, required=True, help="Image archive.")
@click.option("--dest", type=FILE, required=True, help="NAME.npz to write.")
@click.option("--detector", metavar="NAME|FILE", default="inception", help=DETECTOR_HELP)
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images at a time.")
def ref(data: Path, dest: Path, detector: str, batch: int) -> None:
    """Write the statistics of an archive: mu, sigma, and for Inception mu_s, sigma_s."""
    from diffit.metrics.detectors import make_detector
    from diffit.metrics.images import open_images
    from diffit.metrics.reference import FIELDS, Reference, write_reference
    from diffit.utils.distributed import processes

    if dest.suffix != ".npz":
        raise UserError(f"--dest {dest}: statistics go into a file NAME.npz")
    with processes() as procs:
        images = open_images(data)
        if len(images) < 2:
            raise UserError(f"{data}: {len(images)} image has no covariance; take two or more")
        found = make_detector(detector, procs)
        reference = Reference(images.name, found, images)
        outputs = FIELDS if found.official else ["pool"]
        needs = {output: reference.need("moments", output, None) for output in outputs}
        reference.prepare(needs.values(), procs, batch=batch, progress=True)
        if procs.is_first:
            moments = {output: reference.moments(need) for output, need in needs.items()}
            write_reference(dest, reference, moments, len(images))
            click.echo(f"{dest}: statistics of {len(images)} images, detector {found.name}")


@metrics.command()
@click.argument("path", metavar="RUN|FILE", type=FILE)
def show(path: Path) -> None:
    """Print the metrics of a run, or of a file of `calc` records, as a table; write a run's report.html anew."""
    from diffit.metrics.record import format_numbers, read_cards
    from diffit.training.report import write_report

    files = sorted(path.glob("metric-*.jsonl")) if path.is_dir() else [path]
    if not path.exists():
        raise UserError(f"{path}: no such run or file; check the spelling")
    cards = [card for file in files for card in read_cards(file)]
    if not cards:
        raise UserError(f"{path}: no metrics in it; `diffit metrics calc --network …` makes some")
    width = max(len(card["metric"]) for card in cards)
    for card in cards:
        kimg = f"{card['kimg']:10.2f}" if "kimg" in card else f"{'':10}"
        click.echo(f"{card['metric']:<{width}}  {kimg}  {format_numbers(card['results'])}")
    if path.is_dir():
        click.echo(f"report      {write_report(path)}")


@metrics.command("train-detector")
@click.option("--data", type=FILE, required=True, help="Labelled image archive.")
@click.option("--dest", type=FILE, required=True, help="NAME.safetensors to write.")
@click.option("--epochs", type=click.IntRange(min=1), default=5, show_default=True, help="Passes over the images.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of weights and order.")
def train_detector(data: Path, dest: Path, epochs: int, seed: int) -> None:
    """Train a small classifier, for images that Inception's features do not describe."""
    from diffit.data.archive import ImageArchive
    from diffit.metrics.classifier import train_classifier
    from diffit.utils.distributed import pick_device

    if dest.suffix != ".safetensors":
        raise UserError(f"--dest {dest}: a detector is a file NAME.safetensors")
    archive = ImageArchive(data, cond=True)
    with _progress("training") as progress:
        accuracy = train_classifier(archive, dest, epochs=epochs, seed=seed, device=pick_device(), progress=progress)
    click.echo(f"{dest}: {accuracy:.1%} right on held-out images; next: --detector {dest}")


@metrics.command()
@click.option("--network", metavar="FILE|ID", help="Look at samples of this network file, or …")
@click.option("--vae", metavar="PATH|ID", help="Autoencoder of a latent model. Default: the file's.")
@click.option("--images", type=FILE, help="… at these images.")
@click.option("--data", type=FILE, required=True, help="The images that it was trained on.")
@click.option("--heldout", type=FILE, help="Real images that it was not. Default: each of --data against the others.")
@click.option("--dest", type=FILE, required=True, help="NAME.html to write.")
@click.option("--count", type=click.IntRange(min=1), default=1000, show_default=True, help="Samples to look at.")
@click.option("--detector", metavar="NAME|FILE", default="inception", help=DETECTOR_HELP)
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images at a time.")
def copies(
    network: str | None,
    vae: str | None,
    images: Path | None,
    data: Path,
    heldout: Path | None,
    dest: Path,
    count: int,
    detector: str,
    batch: int,
) -> None:
    """Find the training images nearest to samples: a report with pictures, and the share of near-copies.

    A near-copy is closer to a training image than 99 % of real images that were not trained on.
    """
    from diffit.metrics.copies import find_copies, samples_from, write_copies
    from diffit.metrics.detectors import make_detector
    from diffit.metrics.images import open_images
    from diffit.utils.distributed import processes

    if (network is None) == (images is None):
        raise UserError("give either --network or --images: what is to be looked at")
    with processes() as procs:
        if procs.count > 1:
            raise UserError("copies runs in one process; start it without torchrun")
        found = make_detector(detector, procs)
        samples = samples_from(network, images, count, batch, procs, vae)
        result = find_copies(
            samples, open_images(data), found, procs, heldout=open_images(heldout) if heldout else None, batch=batch
        )
        write_copies(dest, result)
        click.echo(json.dumps(result.facts))
        share, usual = result.facts["near_copies"], result.facts["near_copies_among_real"]
        click.echo(f"{dest}: {share:.2%} near-copies, {usual:.2%} of real images are", err=True)


@contextmanager
def _progress(title: str) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
