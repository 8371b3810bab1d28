"""One network learning by the program's own loss, steps and samplers, with its held-out loss on the way."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import torch
from benchmarks.measure import machine

from diffit.configs.schema import Config
from diffit.data.archive import ImageArchive
from diffit.metrics.detectors import make_detector
from diffit.metrics.evaluate import evaluate_network
from diffit.metrics.suite import Suite, headline
from diffit.sampling.model import Model
from diffit.training.batches import feed, image_indices, microbatches
from diffit.training.step import Stepper
from diffit.utils.distributed import alone
from diffit.utils.images import to_float
from diffit.utils.precision import autocast, resolve_precision

LEVELS = 8
VALIDATION = 256  # images, each at all levels
SAMPLES, STEPS = 1000, 12  # of dpm++


@dataclass(frozen=True)
class Point:
    """Where a run is after so many images and seconds of its steps; ``by_level`` from low to high noise."""

    images: int
    seconds: float
    loss: float
    by_level: list[float]


def setting(archive: ImageArchive, others: ImageArchive, detector: str, **options: Any) -> dict[str, Any]:
    """What two runs must have in common to be compared."""
    key = make_detector(detector, alone()).key
    return {**options, "data": archive.content_hash, "val": others.content_hash, "detector": key, "machine": machine()}


def recipe_of(config: Config) -> dict[str, Any]:
    """What a preset decides and may decide otherwise one day."""
    return config.training.model_dump(include={"optimizer", "init", "weighting", "batch", "lr", "lr_decay"})


def begin(config: Config, net: Any) -> Stepper:
    """Training of ``net``, on a GPU where there is one."""
    procs = alone()
    return Stepper(config, procs, net, resolve_precision(config.training.precision, procs.device))


class HeldOut:
    """EDM's loss at the middles of eight equal parts of its noise distribution, with the same noise every time."""

    def __init__(self, config: Config, archive: ImageArchive) -> None:
        diffusion = config.diffusion
        assert diffusion.kind == "edm"
        normal = NormalDist(diffusion.P_mean, diffusion.P_std)
        self.levels = [torch.tensor(normal.inv_cdf((i + 0.5) / LEVELS)).exp() for i in range(LEVELS)]
        # Shuffled: an archive may be in the order of its classes.
        chosen = image_indices(len(archive), 0, 0, min(len(archive), VALIDATION))
        self.images = to_float(torch.stack([archive[i] for i in chosen.tolist()]))
        self.labels = None if archive.labels is None else archive.labels[chosen]

    @torch.no_grad()
    def __call__(self, stepper: Stepper) -> list[float]:
        device, found = stepper.procs.device, []
        generator = torch.Generator(device).manual_seed(0)
        for level in self.levels:
            losses = []
            for start in range(0, len(self.images), 128):
                images = self.images[start : start + 128].to(device)
                labels = None if self.labels is None else self.labels[start : start + 128].to(device)
                sigma = level.to(device).expand(len(images))
                with autocast(device, stepper.precision):
                    losses.append(stepper.loss(stepper.ema, images, labels, generator=generator, level=sigma))
            found.append(float(torch.cat(losses).mean()))
        return found


def learn(
    stepper: Stepper, archive: ImageArchive, held_out: HeldOut, shares: Iterable[float], seconds: float | None = None
) -> Iterator[Point]:
    """Train for the length of the configuration, or so many ``seconds``, and say after these ``shares`` of it how far.

    The time is that of the steps alone: of the processor, or of the clock where a GPU computes.
    """
    training, device, spent = stepper.config.training, stepper.procs.device, 0.0
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    order = microbatches(len(archive), training.seed, 0, training.batch, stepper.batch_gpu, 0, 1)
    images = feed(archive, order, device, resident=archive.load_all(), workers=0)
    for share in shares:
        while stepper.images_seen < share * stepper.end if seconds is None else spent < share * seconds:
            began = clock()
            stepper.step(images)
            if device.type == "cuda":
                torch.cuda.synchronize()
            spent += clock() - began
            if seconds is not None:  # the schedules follow the time, as in a run by the clock
                stepper.end = round(stepper.images_seen * max(seconds / spent, 1))
        by_level = held_out(stepper)
        yield Point(stepper.images_seen, round(spent, 2), fmean(by_level), by_level)


def distance(stepper: Stepper, reference: Path, detector: str, samples: int = SAMPLES) -> float:
    """Fréchet distance of so many samples, made by dpm++ in few steps, to the images of ``reference``."""
    config = stepper.config
    suite = Suite((f"fd{samples}_full:{detector}",), reference, config.image_shape, stepper.procs, batch=100)
    model = Model(stepper.ema, config, None, stepper.precision).with_sampling(sampler="dpm++", steps=STEPS)
    labels = ImageArchive(reference, cond=True).labels if config.model.num_classes else None
    (record,) = evaluate_network(suite, model, real_labels=labels, batch=100)
    return headline(record["results"])[1]


class Results:
    """Records of finished runs in a file of JSON lines, so that a command that is started again goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text().splitlines() if path.exists() else []
        self.records: list[dict[str, Any]] = [json.loads(line) for line in lines]

    def find(self, **key: Any) -> Iterator[dict[str, Any]]:
        return (record for record in self.records if all(record.get(name) == value for name, value in key.items()))

    def add(self, points: Sequence[Point], **facts: Any) -> None:
        record = {**facts, "points": [asdict(point) for point in points]}
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")


def spread(values: Sequence[float]) -> str:
    """Mean and range."""
    return f"{fmean(values):.4g} ({min(values):.4g} to {max(values):.4g})"
