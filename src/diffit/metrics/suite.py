"""Metrics by name: what a name means, and the numbers of several from one pass over the images."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from diffit.errors import UserError
from diffit.metrics.adm import ADM
from diffit.metrics.detectors import OFFICIAL, Detector, make_detector
from diffit.metrics.features import Metric, gather
from diffit.metrics.frechet import FID
from diffit.metrics.images import Batches
from diffit.metrics.inception_score import InceptionScore
from diffit.metrics.kid import KID
from diffit.metrics.precision_recall import PrecisionRecall
from diffit.metrics.reference import Reference, open_reference
from diffit.utils.distributed import Processes

KINDS: dict[str, type[Metric]] = {
    "fid": FID,
    "fd": FID,
    "kid": KID,
    "kd": KID,
    "is": InceptionScore,
    "pr": PrecisionRecall,
    "adm": ADM,
}
NAME = re.compile(
    rf"({'|'.join(KINDS)})([0-9]{{1,18}})(?:(k)([0-9]{{0,9}})|_([0-9]{{1,9}}))?(_full)?(_fp64)?(?::(.+))?"
)
MOST_IMAGES = 10_000_000
EXAMPLES = "fid50k_full, fid10k_full, fid50k, kid50k_full, is50k, pr50k3_full, pr1500_3_full, adm50k, fd10k_full:pixels"


def parse_metric(text: str, detector: str | None = None) -> Metric:
    """The metric of a name, with ``detector`` where the name itself has none. UserError lists what is known."""
    match = NAME.fullmatch(text.strip())
    if match is None or not int(match[2]):
        raise UserError(f"unknown metric {text!r}; known are, with any number: {EXAMPLES}")
    kind, count, k, after_k, after_line, full, fp64, spec = match.groups()
    images = int(count) * (1000 if k else 1)
    if images > MOST_IMAGES:
        raise UserError(f"metric {text!r}: of more than {MOST_IMAGES:,} images; 50k is the field's number")
    neighbours = after_k or after_line
    if (kind == "pr") != bool(neighbours) or (neighbours and not int(neighbours)):
        raise UserError(
            f"metric {text!r}: neighbours are for precision and recall, and needed there: pr50k3_full, pr1500_3_full"
        )
    if fp64 and kind != "adm":
        raise UserError(f"metric {text!r}: _fp64 is for adm (adm50k_fp64); all others use float64 as they are")
    extra: dict[str, Any] = {"precision": "float64"} if fp64 else {}
    if neighbours:
        extra["neighbours"] = int(neighbours)
    return KINDS[kind](images, bool(full), spec or detector or OFFICIAL, **extra)


def parse_metrics(names: Sequence[str], detector: str | None = None) -> list[Metric]:
    return list(dict.fromkeys(parse_metric(name, detector) for name in names))


class Suite:
    """Named metrics with their detectors and references: all that can be wrong with them is said here, before work."""

    def __init__(
        self,
        names: Sequence[str],
        reference: Path | None,
        shape: tuple[int, int, int],
        procs: Processes,
        *,
        detector: str | None = None,
        batch: int = 64,
        allow_scripts: bool = False,
    ) -> None:
        """``shape`` (C, H, W) is that of the images to come, ``allow_scripts`` goes to :func:`make_detector`.

        All processes call this together.
        """
        self.procs, self.batch = procs, batch
        self.metrics = parse_metrics(names, detector)
        if not self.metrics:
            raise UserError(f"no metric is named; known are, with any number: {EXAMPLES}")
        specs = dict.fromkeys(metric.spec for metric in self.metrics)
        self.detectors = {spec: make_detector(spec, procs, allow_scripts=allow_scripts) for spec in specs}
        self.references: dict[str, Reference] = {}
        for metric in self.metrics:
            found = self.detectors[metric.spec]
            if any(part.compares for part in metric.parts) and metric.spec not in self.references:
                if reference is None:
                    raise UserError(f"{metric.name(found)} compares with real images: name them with --ref")
                self.references[metric.spec] = open_reference(reference, found)
            self._check(metric, found, shape)

    @property
    def samples(self) -> int:
        return max(metric.samples for metric in self.metrics)

    @property
    def names(self) -> list[str]:
        """Of the metrics, as their records have them."""
        return [metric.name(self.detectors[metric.spec]) for metric in self.metrics]

    def _check(self, metric: Metric, detector: Detector, shape: tuple[int, int, int]) -> None:
        name, reference = metric.name(detector), self.references.get(metric.spec)
        dims = {key: values.shape[1] for key, values in detector(torch.zeros(1, *shape, dtype=torch.uint8)).items()}
        images = None if reference is None else reference.images
        if images is not None and images.shape != shape and not detector.any_size:
            ours, theirs = (f"{s[2]}×{s[1]}×{s[0]}" for s in (shape, images.shape))
            raise UserError(f"{name}: samples of {ours}, reference {images.name} of {theirs}; they must be of one size")
        for part in metric.parts:
            output = part.need.output
            if output not in dims:
                raise UserError(f"{name}: detector {detector.name} has no {output} output; inception has")
            counts: list[int | None] = [metric.samples]
            if reference is not None and part.compares:
                counts.append(reference.count(part.real_need, dims[output]))
            fewest, purpose = part.fewest(dims[output])
            for count in counts:
                if count is not None and count < fewest:
                    raise UserError(f"{name}: {count} images are too few {purpose}; use {fewest} or more")

    def __call__(self, batches: Batches, *, progress: bool = False) -> list[dict[str, float]]:
        """The numbers of every metric from the images of this process, whose positions reach ``samples`` in all.

        All processes call this together and return the same. Real images are read the first time.
        """
        parts = {spec: [p for m in self.metrics if m.spec == spec for p in m.parts] for spec in self.detectors}
        real = {
            spec: reference.get(
                [part.real_need for part in parts[spec] if part.compares],
                self.procs,
                batch=self.batch,
                progress=progress,
            )
            for spec, reference in self.references.items()
        }
        needs = {detector: [part.need for part in parts[spec]] for spec, detector in self.detectors.items()}
        fake = gather(needs, batches, self.procs)
        results: list[dict[str, float]] = []
        with self.procs.together():
            for metric in self.metrics if self.procs.is_first else ():
                detector, numbers = self.detectors[metric.spec], dict[str, float]()
                for part in metric.parts:
                    others = real[part.spec][part.real_need] if part.compares else None
                    numbers |= part.numbers(fake[detector][part.need], others, detector)
                results.append(numbers)
        everywhere: list[dict[str, float]] = self.procs.broadcast(results)
        return everywhere


def headline(numbers: dict[str, float]) -> tuple[str, float]:
    """The number that stands for the others: (name, value)."""
    return next(iter(numbers.items()))


def better(name: str, a: float, b: float) -> bool:
    """Whether ``a`` is a better value than ``b`` of the number ``name``: distances fall, scores rise."""
    return a > b if name in ("is", "precision") else a < b


def best_record(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of records of one metric the first with the best main number."""
    best = records[0]
    for record in records[1:]:
        (name, value), (_, known) = headline(record["results"]), headline(best["results"])
        best = record if better(name, value, known) else best
    return best
