"""The demo: teach DiffiT scikit-learn's handwritten digits in minutes on a CPU, and say how well it went.

    python examples/digits.py --outdir runs/demo

Half of the 1,797 digits are for training; the other half stays unseen and judges the samples.
"""

import json
import time
from pathlib import Path

import click
import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors
from torch import Tensor

from diffit.cli import run
from diffit.configs.resolve import DataFacts, resolve
from diffit.data.archive import ImageArchive
from diffit.data.convert import convert
from diffit.metrics.frechet import frechet_distance, moments
from diffit.sampling import load
from diffit.sampling.labels import random_labels
from diffit.training.loop import train
from diffit.utils.distributed import processes
from diffit.utils.files import whole_file
from diffit.utils.images import save_grid, to_pil

SAMPLES = 1000
FIRST_SEED = 1000  # the grids of the training run show seeds from 0 on


def write_archives(folder: Path) -> tuple[Path, Path]:
    """The two halves as archives, by way of what a user would start from: a folder of PNG files a class."""
    halves = folder / "digits-train.zip", folder / "digits-heldout.zip"
    if all(half.exists() for half in halves):
        return halves
    digits = load_digits()
    images = torch.from_numpy(np.round(digits.images * 255 / 16).astype(np.uint8))[:, None]
    for half, parity in zip(halves, (0, 1), strict=True):
        source = folder / half.stem
        for i in range(parity, len(images), 2):
            path = source / str(digits.target[i]) / f"{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            to_pil(images[i]).save(path)
        convert(source, half, overwrite=True)
    return halves


def draw(network: Path) -> tuple[Tensor, Tensor]:
    """Samples uint8 (N, 1, 8, 8) and their classes (N,), drawn at random by the seeds."""
    model, seeds = load(network), range(FIRST_SEED, FIRST_SEED + SAMPLES)
    labels = random_labels(seeds, model.config.model.num_classes)
    return torch.cat([images for _, images in model.generate(seeds, labels, batch=250, progress=True)]), labels


def judge(samples: Tensor, classes: Tensor, real: ImageArchive, heldout: ImageArchive) -> dict[str, float]:
    """Class agreement, pixel Fréchet distances and near-copies of ``samples``."""
    train_x, test_x, fake_x = (x.flatten(1).double() / 255 for x in (real.load_all(), heldout.load_all(), samples))
    assert real.labels is not None
    assert heldout.labels is not None
    classifier = KNeighborsClassifier(3).fit(torch.cat([train_x, test_x]), torch.cat([real.labels, heldout.labels]))
    # A near-copy lies closer to a training image than 99 % of unseen real images do.
    nearest = NearestNeighbors(n_neighbors=1).fit(train_x)
    unseen, drawn = (nearest.kneighbors(x)[0][:, 0] for x in (test_x, fake_x))
    return {
        "samples": len(samples),
        "class_agreement": float(np.mean(classifier.predict(fake_x) == classes.numpy())),
        "frechet_pixels": frechet_distance(*moments(fake_x), *moments(test_x)),
        "frechet_pixels_real_halves": frechet_distance(*moments(train_x), *moments(test_x)),
        "near_copies": float(np.mean(drawn <= np.quantile(unseen, 0.01))),
        "near_copies_among_unseen_real": 0.01,
        "median_distance_to_training_image": float(np.median(drawn)),
        "median_distance_to_training_image_of_unseen_real": float(np.median(unseen)),
    }


@click.command()
@click.option("--outdir", type=click.Path(path_type=Path), default="runs/demo", show_default=True)
@click.option("--kimg", type=float, help="Length of the training. Default: the preset's.")
def main(outdir: Path, kimg: float | None) -> None:
    """Train on handwritten digits, sample, and write summary.json."""
    began = time.monotonic()
    train_zip, heldout_zip = write_archives(outdir / "data")
    real, heldout = (ImageArchive(path, cond=True) for path in (train_zip, heldout_zip))
    channels, height, width = real.image_shape
    facts = DataFacts(channels, (height, width), real.num_classes, tuple(real.class_names or ()))
    options = {"data": str(train_zip.resolve()), "cond": True, "kimg": kimg, "grid": (10, 8)}
    config = resolve("digits", options, facts)
    with processes() as procs:
        outcome = train(config, real, outdir, procs)
    if not outcome.complete:
        raise SystemExit(130)
    network = outcome.snapshot or max(outcome.run_dir.glob("network-snapshot-*.safetensors"))
    trained = time.monotonic()

    samples, classes = draw(network)
    by_class = torch.cat([samples[classes == digit][:8] for digit in range(10)])
    framed = torch.nn.functional.pad(by_class, (1, 1, 1, 1), value=80)
    save_grid(framed.unflatten(0, (10, 8)).transpose(0, 1).flatten(0, 1), outdir / "samples.png", (10, 8))
    summary = judge(samples, classes, real, heldout)
    summary |= {
        "images_seen": outcome.images_seen,
        "seconds_training": round(trained - began, 1),
        "seconds_total": round(time.monotonic() - began, 1),
    }
    with whole_file(outdir / "summary.json") as part:
        part.write_text(json.dumps(summary, indent=2) + "\n")
    click.echo(json.dumps(summary, indent=2))
    click.echo(
        f"""
{outdir}/samples.png shows ten digits, a column each. To go on:
  .venv/bin/diffit sample --network {network} --outdir {outdir}/sevens --seeds 0-15 --class 7 --grid 4x4
  .venv/bin/diffit data convert --source my-photos/ --dest datasets/mine.zip --resolution 64x64 --transform center-crop
  .venv/bin/diffit train --data datasets/mine.zip --outdir runs/mine"""
    )


if __name__ == "__main__":
    run(main)
