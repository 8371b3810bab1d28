"""``diffit metrics``."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffit.cli.options import GroupedCommand, Listed, Numbers, Options, with_options
from diffit.cli.sample import ALIASES, GUIDE, PRECISIONS, SAMPLERS, SETTINGS, require_scale, with_guide
from diffit.configs.sampling import Sampling
from diffit.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from diffit.utils.distributed import Processes

FILE = click.Path(path_type=Path)
BATCH = click.option(
    "--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images that are processed together."
)
VAE = click.option("--vae", metavar="PATH|ID", help="Autoencoder of a latent model.  [default: the file's]")
DETECTOR = click.option(
    "--detector", metavar="NAME|FILE", default="inception", show_default=True,
    help="Features: inception, pixels, or a file of `train-detector`.",
)  # fmt: skip
SCRIPTS = click.option(
    "--allow-scripts", is_flag=True,
    help="Let detectors be TorchScript too: a program with your rights; Linux keeps it from writing files.",
)  # fmt: skip


@click.group()
def metrics() -> None:
    """Evaluate samples: FID, sFID, Inception score, precision, recall, KID, near-copies."""


CALC: Options = {
  "What is evaluated": [
    click.option("--network", metavar="FILE|RUN|ID",
                 help="Evaluate samples of this snapshot, run (its newest snapshot) or Hub id; or use --images."),
    click.option("--images", type=FILE, help="Evaluate these images: folder, zip, or npz with arr_0."),
    click.option("--ref", type=FILE,
                 help="Real images (archive), or an npz of statistics: EDM's, ADM's, or of `ref`."),
    click.option("--metrics", "names", required=True, multiple=True, metavar="NAMES",
                 help="fid50k_full, kid50k_full, is50k, pr50k3_full, adm50k (adm50k_fp64: exact distances); any number "
                 "for 50k (pr1500_3_full); joined by commas."),
    DETECTOR,
    SCRIPTS,
    click.option("--repeats", type=click.IntRange(1, 1000), default=1, show_default=True,
                 help="Evaluate so many times with new seeds: the best, and minimum, mean and standard deviation."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True,
                 help="First seed of the samples, one per sample; with --images the seed that chooses among them."),
  ],
  "Solver and guidance": [*SETTINGS, GUIDE],
  "Machine": [
    VAE,
    BATCH,
    click.option("--precision", type=click.Choice(PRECISIONS),
                 help="Precision of the network; detectors are fp32.  [default: fp32]"),
  ],
}  # fmt: skip
REFUSED = {
    "--num": "the number is in the metric's name: --metrics fid50k_full",
    "--gpus": "start it under torchrun --nproc_per_node=N",
}


@metrics.command(cls=GroupedCommand, aliases=ALIASES | {"--data": "--ref"}, refused=REFUSED)
@with_options(CALC)
def calc(**options: Any) -> None:
    """Compute metrics of a network or of images.

    Prints one JSON record for each metric, with all that the number depends on, and the number itself on stderr.
    Under torchrun the same command uses several GPUs. No samples are written to disk; statistics of --ref, downloads
    and the index of a folder of images are cached.
    """
    from diffit.utils.distributed import processes

    require_one(options)
    options["names"] = [name for text in options["names"] for name in text.split(",") if name]
    if options["images"] is not None and options["repeats"] > 1:
        raise UserError("--repeats generates new samples: it needs --network")
    with processes() as procs:
        evaluate = evaluate_folder if options["network"] is None else evaluate_file
        records = evaluate(options, procs)
        if procs.is_first:
            report(records)


def require_one(options: dict[str, Any]) -> None:
    """Either a network or images, and with images no option of how samples are generated."""
    if (options["network"] is None) == (options["images"] is None):
        raise UserError("pass either --network or --images: what is to be evaluated")
    of_networks = {*Sampling.model_fields, "guide_network", "vae", "precision"}
    params = click.get_current_context().command.params
    given = [param.opts[0] for param in params if param.name in of_networks and options[param.name] is not None]
    if options["images"] is not None and given:
        raise UserError(f"{', '.join(given)} with --images: they exist already; leave it out, or use --network")


def detection(options: dict[str, Any]) -> dict[str, Any]:
    """What a suite is told of the detectors."""
    return {name: options[name] for name in ("detector", "allow_scripts", "batch")}


def evaluate_folder(options: dict[str, Any], procs: "Processes") -> list[dict[str, Any]]:
    from diffit.metrics.evaluate import evaluate_images
    from diffit.metrics.images import open_images
    from diffit.metrics.suite import Suite

    batch, images = options["batch"], open_images(options["images"])
    suite = Suite(options["names"], options["ref"], images.shape, procs, **detection(options))
    return evaluate_images(suite, images, seed=options["seed"], batch=batch, progress=True)


def evaluate_file(options: dict[str, Any], procs: "Processes") -> list[dict[str, Any]]:
    from diffit.metrics.evaluate import evaluate_network
    from diffit.metrics.record import summarise_repeats
    from diffit.metrics.suite import Suite
    from diffit.sampling import load
    from diffit.weights import locate

    network, batch, repeats = locate(options["network"]), options["batch"], options["repeats"]
    guide = None if options["guide_network"] is None else locate(options["guide_network"])
    model = load(network, device=procs.device, precision=options["precision"] or "fp32", vae=options["vae"])
    model = with_guide(model, guide)
    model = model.with_sampling(**{name: options[name] for name in Sampling.model_fields if name in options})
    require_scale(model)
    shape = model.config.image_shape
    suite = Suite(options["names"], options["ref"], shape, procs, **detection(options))
    facts = {"network": network.name, "weights_sha256": digest_of(network)}
    if guide is not None:
        facts |= {"guide": guide.name, "guide_sha256": digest_of(guide)}
    weights = [facts[key] for key in facts if key.endswith("_sha256")]
    procs.require_same(weights, network, "weights", "name one file")  # a run that trains writes newer ones
    labels = labels_of(options["ref"], model.config.model.num_classes)
    seeds = range(options["seed"], options["seed"] + repeats * suite.samples, suite.samples)
    runs = [
        evaluate_network(suite, model, first_seed=seed, real_labels=labels, batch=batch, progress=True, facts=facts)
        for seed in seeds
    ]
    return runs[0] if repeats == 1 else [summarise_repeats(records) for records in zip(*runs, strict=True)]


STEPS = [
    click.option("--network", "networks", required=True, multiple=True, metavar="FILE|RUN|ID",
                 help="Snapshot, run (its newest) or Hub id; several are compared. A student keeps its own steps."),
    click.option("--ref", type=FILE, help="Real images (archive), or an npz of statistics; distances need it."),
    click.option("--metric", required=True, metavar="NAME", help="fid10k_full, fd10k_full:DETECTOR and the like."),
    click.option("--evaluations", type=Numbers(), default="1,2,4,8,16,35", show_default=True, metavar="LIST",
                 help="Forward passes per image; guidance makes two a step. A sampler makes the most steps within."),
    click.option("--samplers", type=Listed(click.Choice(SAMPLERS)), metavar="LIST",
                 help="Samplers, joined by commas.  [default: all that the model knows]"),
    click.option("--cfg-scale", "scales", type=Listed(click.FLOAT), metavar="LIST",
                 help="Guidance scales, joined by commas.  [default: the file's]"),
    click.option("--dest", type=FILE, required=True, help="NAME.jsonl to write, and NAME.png next to it."),
    click.option("--format", "format_", type=click.Choice(["table", "md", "csv", "latex"]), default="table",
                 show_default=True, help="How the table is written."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="First seed of the samples."),
    click.option("--precision", type=click.Choice(PRECISIONS), help="Precision of the network.  [default: fp32]"),
    VAE,
    SCRIPTS,
    BATCH,
]  # fmt: skip


@metrics.command()
@with_options({"Options": STEPS})
def steps(**options: Any) -> None:
    """Compare samplers within budgets of evaluations.

    Makes a table, a plot and a record for every setting. Marks the cheapest setting within 5 % of the best. The
    same command goes on where it was stopped, and does not compute again what --dest holds.
    """
    from diffit.metrics.steps import Candidate, measure, plan, plot, tabulate
    from diffit.metrics.suite import Suite
    from diffit.metrics.table import FORMATS
    from diffit.sampling import load
    from diffit.utils.distributed import processes
    from diffit.utils.locks import exclusive
    from diffit.weights import locate

    dest, given = options["dest"], [options[name] for name in ("evaluations", "samplers", "scales")]
    if dest.suffix != ".jsonl":
        raise UserError(f"--dest {dest}: records go into a file NAME.jsonl")
    if 0 in options["evaluations"]:
        raise UserError("--evaluations 0: a sample needs 1 or more")
    with processes() as procs, ExitStack() as held:
        candidates = []
        for network in options["networks"]:
            file = locate(network)
            model = load(file, device=procs.device, precision=options["precision"] or "fp32", vae=options["vae"])
            labels = labels_of(options["ref"], model.config.model.num_classes)
            digest = digest_of(file)
            procs.require_same(digest, file, "weights", "name one file")
            candidates.append(Candidate(Path(network).name, model, digest, labels))
        shapes = {candidate.model.config.image_shape for candidate in candidates}
        if len(shapes) > 1:
            raise UserError(f"--network: images of {len(shapes)} sizes; compare networks of one")
        settings = [(it, model) for it in candidates for model in plan(it.model, *given)]
        how = {name: options[name] for name in ("batch", "allow_scripts")}
        suite = Suite([options["metric"]], options["ref"], shapes.pop(), procs, **how)
        if procs.is_first:
            held.enter_context(exclusive(dest, "use another --dest", beside=True))
        records = []
        for record in measure(suite, settings, dest, first_seed=options["seed"], batch=options["batch"]):
            records.append(record)
            if procs.is_first:
                click.echo(f"{len(records)}: {summary(record)}", err=True)
        if procs.is_first:
            click.echo(FORMATS[options["format_"]](*tabulate(records)))
            try:
                plot(records, dest.with_suffix(".png"))
            except UserError as error:  # the numbers are there
                click.echo(f"note: {error}", err=True)


def summary(record: dict[str, Any]) -> str:
    from diffit.metrics.record import format_numbers

    sampling = record["sampling"]
    return (
        f"{record['network']}, {sampling['sampler']}, guidance {sampling['cfg_scale']:g}, {record['evaluations']} "
        f"evaluations: {format_numbers(record['results'])}"
    )


def digest_of(network: Path) -> str:
    """Of the weights as the file has them, whatever precision they were loaded in; that has checked them."""
    from diffit.weights import read_network_file, state_hash

    return state_hash(read_network_file(network, verify=False)[0])


def labels_of(ref: Path | None, classes: int) -> "Tensor | None":
    """The labels of a reference that has the model's classes; None where classes are chosen evenly."""
    from diffit.data.archive import ImageArchive

    if not classes or ref is None or ref.suffix == ".npz":
        return None
    archive = ImageArchive(ref)
    return ImageArchive(ref, cond=True).labels if archive.has_labels and archive.num_classes == classes else None


def report(records: list[dict[str, Any]]) -> None:
    from diffit.metrics.record import format_numbers

    for record in records:
        click.echo(json.dumps(record))
        click.echo(f"{record['metric']}: {format_numbers(record['results'])}", err=True)
        for name, r in record.get("repeats", {}).get("numbers", {}).items():
            over = f"min {r['minimum']:.5g}, mean {r['mean']:.5g} ± {r['spread']:.2g}"
            click.echo(f"  {name} over {len(r['values'])} repeats: {over}", err=True)
        for note in record["notes"]:
            click.echo(f"  note: {note}", err=True)


@metrics.command()
@click.option("--data", type=FILE, required=True, help="Image archive.")
@click.option("--dest", type=FILE, required=True, help="NAME.npz to write.")
@DETECTOR
@SCRIPTS
@BATCH
def ref(data: Path, dest: Path, detector: str, allow_scripts: bool, batch: int) -> None:
    """Write the statistics of an archive.

    They are mu and sigma, and for Inception mu_s and sigma_s.
    """
    from diffit.metrics.detectors import make_detector
    from diffit.metrics.reference import write_statistics
    from diffit.utils.distributed import processes

    if dest.suffix != ".npz":
        raise UserError(f"--dest {dest}: statistics go into a file NAME.npz")
    with processes() as procs:
        found = make_detector(detector, procs, allow_scripts=allow_scripts)
        text = write_statistics(data, dest, found, procs, batch=batch, progress=True)
        if procs.is_first:
            click.echo(text)


@metrics.command()
@click.argument("paths", metavar="RUN|FILE...", type=FILE, nargs=-1, required=True)
@click.option("--format", "format_", type=click.Choice(["table", "md", "csv", "latex"]), default="table",
              show_default=True, help="How the table is written; csv has all digits.")  # fmt: skip
def show(paths: tuple[Path, ...], format_: str) -> None:
    """Print the metrics of runs or of files as one table.

    It has the settings that differ; files are of the records of `calc`. Also writes the report.html of each run
    again.
    """
    from diffit.metrics.record import read_records
    from diffit.metrics.table import FORMATS, compare
    from diffit.training.report import write_report

    sources: dict[str, list[dict[str, Any]]] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"{path}: no such run or file; check the spelling")
        files = sorted(path.glob("metric-*.jsonl")) if path.is_dir() else [path]
        records = [record for file in files for record in read_records(file)]
        if not records:
            raise UserError(f"{path}: no metrics in it; `diffit metrics calc --network …` makes some")
        name = path.resolve().name
        sources[str(path) if name in sources else name] = records
    click.echo(FORMATS[format_](*compare(sources, exact=format_ == "csv")))
    for path in paths:
        if path.is_dir():
            click.echo(f"report      {write_report(path)}", err=True)


@metrics.command("train-detector")
@click.option("--data", type=FILE, required=True, help="Labelled image archive.")
@click.option("--dest", type=FILE, required=True, help="NAME.safetensors to write.")
@click.option("--epochs", type=click.IntRange(1, 1000), default=5, show_default=True, help="Passes over the images.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of weights and order.  [default: 0]")
def train_detector(data: Path, dest: Path, epochs: int, seed: int) -> None:
    """Train a small classifier to measure distances by.

    For images that Inception's features do not describe.
    """
    from diffit.data.archive import ImageArchive
    from diffit.metrics.classifier import train_classifier
    from diffit.utils.distributed import pick_device
    from diffit.utils.progress import progress

    if dest.suffix != ".safetensors":
        raise UserError(f"--dest {dest}: a detector is a file NAME.safetensors")
    archive = ImageArchive(data, cond=True)
    with progress("training") as show:
        accuracy = train_classifier(archive, dest, epochs=epochs, seed=seed, device=pick_device(), progress=show)
    click.echo(f"{dest}: {accuracy:.1%} right on held-out images; next: --detector {dest}")


COPIES = [
    click.option("--network", metavar="FILE|RUN|ID",
                 help="Look at samples of this snapshot, run (its newest snapshot) or Hub id; or use --images."),
    click.option("--images", type=FILE, help="Look at these images: folder, zip, or npz with arr_0."),
    click.option("--data", type=FILE, required=True, help="The images that the network was trained on."),
    click.option("--heldout", type=FILE,
                 help="Real images that it was not trained on.  [default: each of --data against the others]"),
    click.option("--dest", type=FILE, required=True, help="NAME.html to write."),
    click.option("--count", type=click.IntRange(min=1), default=1000, show_default=True, help="Samples to look at."),
    VAE,
    DETECTOR,
    SCRIPTS,
    BATCH,
]  # fmt: skip


@metrics.command(cls=GroupedCommand, aliases={"--num-samples": "--count"})
@with_options({"Options": COPIES})
def copies(**options: Any) -> None:
    """Find the training images nearest to samples.

    Makes a report with pictures and the share of near-copies. A near-copy is closer to a training image than 99 %
    of real images that were not trained on.
    """
    from diffit.metrics.copies import find_copies, some_of, write_copies
    from diffit.metrics.detectors import make_detector
    from diffit.metrics.images import open_images
    from diffit.sampling import load
    from diffit.utils.distributed import processes

    require_one(options)
    dest, batch, heldout = options["dest"], options["batch"], options["heldout"]
    with processes() as procs:
        if procs.count > 1:
            raise UserError("copies runs in one process; start it without torchrun")
        detector = make_detector(options["detector"], procs, allow_scripts=options["allow_scripts"])
        if options["images"] is not None:
            samples = some_of(open_images(options["images"]), options["count"])
        else:
            model = load(options["network"], device=procs.device, precision="fp32", vae=options["vae"])
            parts = model.generate(range(options["count"]), batch=batch, progress=True)
            samples = [image for _, images in parts for image in images]
        unseen = None if heldout is None else open_images(heldout)
        result = find_copies(samples, open_images(options["data"]), detector, procs, heldout=unseen, batch=batch)
        write_copies(dest, result)
        click.echo(json.dumps(result.facts))
        click.echo(f"{dest}: {result.verdict()}", err=True)
