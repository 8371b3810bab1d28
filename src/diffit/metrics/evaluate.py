"""From a network or a folder of images to records: samples go straight from the sampler to the detectors."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from diffit.errors import UserError
from diffit.metrics.images import Images, choose, stream
from diffit.metrics.record import make_record
from diffit.metrics.suite import Suite
from diffit.sampling.labels import training_labels
from diffit.sampling.model import Model
from diffit.weights.file import state_hash


def evaluate_network(
    suite: Suite,
    model: Model,
    *,
    first_seed: int = 0,
    real_labels: Tensor | None = None,
    batch: int = 64,
    progress: bool = False,
    facts: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Records of as many samples as the metrics of the ``suite`` ask for, of the seeds from ``first_seed`` on.

    ``real_labels`` are the classes of the training images; ``facts`` go into the records. All processes call this
    together and return the same.
    """
    began = time.monotonic()
    seeds = range(first_seed, first_seed + suite.samples)
    labels, policy = training_labels(model.config, real_labels, seeds)
    samples = model.generate(seeds, labels, procs=suite.procs, batch=batch, progress=progress)
    spent = [0.0, 0.0]
    batches = ((torch.arange(start, start + len(images)), images) for start, images in _timed(samples, spent))
    numbers = suite(batches, progress=progress)
    source: dict[str, Any] = {"preset": model.config.preset, **(facts or {}), "precision": model.precision}
    for name, each in {"weights_sha256": model, "guide_sha256": model.guide}.items():
        if each is not None and name not in source:  # in the precision that it was loaded in
            source[name] = state_hash(each.net.state_dict())
    if model.autoencoder is not None:
        source["vae_sha256"] = model.autoencoder.sha256
    if spent[1]:
        source["seconds_per_image"] = float(f"{spent[0] / spent[1]:.3g}")  # of this process
    source |= {"labels": policy, "sampling": model.config.sampling.model_dump(mode="json")}
    sources = [source | {"seeds": f"{first_seed}-{first_seed + metric.samples - 1}"} for metric in suite.metrics]
    return _records(suite, numbers, sources, began)


def _timed(samples: Iterator[tuple[int, Tensor]], spent: list[float]) -> Iterator[tuple[int, Tensor]]:
    """The same; ``spent`` counts the seconds that they took, and the images."""
    while True:
        began = time.monotonic()
        part = next(samples, None)
        spent[0] += time.monotonic() - began
        if part is None:
            return
        spent[1] += len(part[1])
        yield part


def evaluate_images(
    suite: Suite, images: Images, *, seed: int = 0, batch: int = 64, progress: bool = False
) -> list[dict[str, Any]]:
    """The same for images that exist already; where a metric's number is smaller, for a random choice by the ``seed``.

    UserError if they are fewer than the number says.
    """
    began = time.monotonic()
    for name, metric in zip(suite.names, suite.metrics, strict=True):
        if metric.samples > len(images):
            raise UserError(
                f"{name} is of {metric.samples} images, {images.name} holds {len(images)}: the number in a metric's "
                f"name is the number used; ask for {len(images)} or fewer"
            )
    chosen = choose(len(images), suite.samples, seed=seed)
    numbers = suite(stream(images, chosen, batch, suite.procs, progress=progress), progress=progress)
    fingerprint = images.fingerprint() if suite.procs.is_first else ""
    source = {"images": {"name": images.name, "sha256": fingerprint, "of": len(images), "seed": seed}}
    return _records(suite, numbers, [source] * len(numbers), began)


def _records(
    suite: Suite, numbers: list[dict[str, float]], sources: Sequence[dict[str, Any]], began: float
) -> list[dict[str, Any]]:
    seconds = time.monotonic() - began
    records: list[dict[str, Any]] = []
    with suite.procs.together():
        if suite.procs.is_first:
            every = zip(suite.metrics, numbers, sources, strict=True)
            records = [make_record(suite, metric, values, source, seconds) for metric, values, source in every]
    everywhere: list[dict[str, Any]] = suite.procs.broadcast(records)
    return everywhere
