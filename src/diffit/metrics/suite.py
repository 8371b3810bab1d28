"""Metrics by name: what a name means, what it needs, and its numbers."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffit.errors import UserError
from diffit.metrics.detectors import OFFICIAL, Detector, make_detector
from diffit.metrics.features import Need, Rows, Sums, gather
from diffit.metrics.frechet import Moments, finite_sample_bias, frechet_distance
from diffit.metrics.images import Batches
from diffit.metrics.inception_score import SPLITS, ScoreSums
from diffit.metrics.kid import kid
from diffit.metrics.precision_recall import precision_recall
from diffit.metrics.reference import Reference, open_reference
from diffit.utils.distributed import Processes

NAME = re.compile(r"(fid|fd|kid|kd|is|pr|adm)(\d+)(?:(k)(\d*)|_(\d+))?(_full)?(?::(.+))?")
EXAMPLES = "fid50k_full, fid10k_full, fid50k, kid50k_full, is50k, pr50k3_full, pr1500_3_full, adm50k, fd10k_full:pixels"
PUBLISHED = 50_000  # samples of the field's figures
ADM_REAL_FEATURES = 10_000  # real images for precision and recall in the ADM protocol
SPARSEST = 10  # dimensions an image, above which a covariance says nothing


@dataclass(frozen=True)
class Metric:
    """``samples`` images against at most as many real ones, or against all of them when ``full``."""

    kind: str
    samples: int
    full: bool = False
    neighbours: int = 3
    spec: str = OFFICIAL
    """What :func:`make_detector` takes."""

    def name(self, detector: Detector) -> str:
        """As it is written down: with another detector than FID's it is not an FID, and says whose number it is."""
        thousands, rest = divmod(self.samples, 1000)
        count = str(self.samples) if rest else f"{thousands}k"
        k = f"{'_' * bool(rest)}{self.neighbours}" if self.kind == "pr" else ""  # a k or _ keeps two numbers apart
        kind = self.kind if detector.official else self.kind.replace("id", "d")
        return f"{kind}{count}{k}{'_full' * self.full}{'' if detector.official else f':{detector.name}'}"

    @property
    def real_limit(self) -> int | None:
        return None if self.full or self.kind == "adm" else self.samples

    def outputs(self) -> list[tuple[str, str]]:
        """(what, output) that the metric needs of generated images."""
        moments, features, score = ("moments", "pool"), ("rows", "pool"), ("score", "probabilities")
        return {
            "fid": [moments],
            "kid": [features],
            "is": [score],
            "pr": [features],
            "adm": [moments, ("moments", "spatial"), score, features],
        }[self.kind]

    def needs(self, detector: Detector) -> dict[tuple[str, str], Need]:
        return {pair: Need(detector.name, *pair, self.samples) for pair in self.outputs()}  # type: ignore[arg-type]

    def real_needs(self, reference: Reference) -> dict[tuple[str, str], Need]:
        """What it needs of real images. UserError where the reference cannot give it."""
        needs = {}
        for what, output in self.outputs():
            if what != "score":
                limit = ADM_REAL_FEATURES if self.kind == "adm" and what == "rows" else self.real_limit
                needs[what, output] = reference.need(what, output, limit)
        return needs


def parse_metric(text: str, detector: str | None = None) -> Metric:
    """The metric of a name, with ``detector`` where the name itself has none. UserError lists what is known."""
    match = NAME.fullmatch(text.strip())
    if match is None or not int(match[2]):
        raise UserError(f"unknown metric {text!r}; known are, with any number: {EXAMPLES}")
    kind, count, k, after_k, after_line, full, spec = match.groups()
    neighbours = after_k or after_line
    kind = {"fd": "fid", "kd": "kid"}.get(kind, kind)
    if (kind == "pr") != bool(neighbours) or (neighbours and not int(neighbours)):
        raise UserError(
            f"metric {text!r}: neighbours are for precision and recall, and needed there: pr50k3_full, pr1500_3_full"
        )
    samples = int(count) * (1000 if k else 1)
    return Metric(kind, samples, bool(full), int(neighbours or 3), spec or detector or OFFICIAL)


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
    ) -> None:
        """``shape`` (C, H, W) is that of the images to come. All processes call this together."""
        self.procs, self.batch = procs, batch
        self.metrics = parse_metrics(names, detector)
        if not self.metrics:
            raise UserError(f"no metric is named; known are, with any number: {EXAMPLES}")
        self.detectors = {m.spec: make_detector(m.spec, procs) for m in self.metrics}
        self.references: dict[str, Reference] = {}
        for metric in self.metrics:
            found = self.detectors[metric.spec]
            if metric.kind != "is" and metric.spec not in self.references:
                if reference is None:
                    raise UserError(f"{metric.name(found)} compares with real images: give them with --ref")
                self.references[metric.spec] = open_reference(reference, found)
            self._check(metric, found, shape)

    @property
    def samples(self) -> int:
        return max(metric.samples for metric in self.metrics)

    def _check(self, metric: Metric, detector: Detector, shape: tuple[int, int, int]) -> None:
        name = metric.name(detector)
        outputs = detector(torch.zeros(1, *shape, dtype=torch.uint8))
        for _, output in metric.outputs():
            if output not in outputs:
                raise UserError(f"{name}: detector {detector.name} has no {output} output; inception has")
        if ("score", "probabilities") in metric.outputs() and metric.samples < SPLITS:
            raise UserError(
                f"{name}: {metric.samples} images are too few for the {SPLITS} splits of the Inception score; "
                f"take {SPLITS} or more"
            )
        reference = self.references.get(metric.spec)
        images = None if reference is None else reference.images
        if images is not None and images.shape != shape and not detector.any_size:
            ours, theirs = (f"{s[2]}×{s[1]}×{s[0]}" for s in (shape, images.shape))
            raise UserError(f"{name}: samples of {ours}, reference {images.name} of {theirs}; they must be of one size")
        for (what, output), need in (metric.real_needs(reference) if reference else {}).items():
            assert reference is not None
            dim = outputs[output].shape[1]
            stored = reference.stored.get(output) if what == "moments" else None
            if stored is not None and len(stored[0]) != dim:
                raise UserError(
                    f"{reference.name}: statistics of {len(stored[0])} dimensions, detector {detector.name} has {dim}"
                )
            least = max(math.ceil(dim / SPARSEST), 2) if what == "moments" else metric.neighbours + 1
            for count in (metric.samples, need.count or reference.stored_count or least):
                if count < least:
                    raise UserError(
                        f"{name}: {count} images are too few "
                        + (f"for a {dim}×{dim} covariance" if what == "moments" else "to compare with each other")
                        + f"; take {least} or more"
                    )

    def __call__(self, batches: Batches, *, progress: bool = False) -> list[dict[str, float]]:
        """The numbers of every metric from the images of this process, whose positions reach ``samples`` in all.

        All processes call this together and return the same. Real images are read the first time.
        """
        for spec, reference in self.references.items():
            wanted = [n for m in self.metrics if m.spec == spec for n in m.real_needs(reference).values()]
            reference.prepare(wanted, self.procs, batch=self.batch, progress=progress)
        detectors = {detector.name: detector for detector in self.detectors.values()}
        needs = [need for m in self.metrics for need in m.needs(self.detectors[m.spec]).values()]
        found = gather(needs, batches, detectors, self.procs)
        results: list[dict[str, float]] = []
        with self.procs.together():
            if self.procs.is_first:
                results = [self._numbers(metric, found) for metric in self.metrics]
        return self.procs.broadcast(results)

    def _numbers(self, metric: Metric, found: dict[Need, Sums]) -> dict[str, float]:
        detector, reference = self.detectors[metric.spec], self.references.get(metric.spec)
        fake = {pair: found[need] for pair, need in metric.needs(detector).items()}
        real = metric.real_needs(reference) if reference is not None and metric.kind != "is" else {}
        numbers: dict[str, float] = {}
        for (what, output), sums in fake.items():
            if isinstance(sums, Moments):
                assert reference is not None
                gaussian = reference.moments(real[what, output])
                name = ("s" if output == "spatial" else "") + ("fid" if detector.official else "fd")
                numbers[name] = frechet_distance(*sums.mean_and_cov(), *gaussian)
                reals = real[what, output].count or reference.stored_count or torch.inf
                if min(sums.count, reals) >= 2 * len(gaussian[0]):  # below, the first order in 1/n is far off
                    numbers[f"{name}_bias"] = finite_sample_bias(gaussian[1], sums.count, reals)
            elif isinstance(sums, ScoreSums):
                numbers["is"], numbers["is_std"] = sums.score()
            else:
                assert reference is not None
                numbers |= _pairs(metric, detector, sums, reference.features(real[what, output]))
        return numbers


def _pairs(metric: Metric, detector: Detector, fake: Rows, real: Tensor) -> dict[str, float]:
    x, y, device = fake.features, real, detector.device  # features of millions of images do not fit on a GPU
    if metric.kind == "kid":
        name = "kid" if detector.official else "kd"
        value, error = kid(x, y, device=device)
        return {name: value} if math.isnan(error) else {name: value, f"{name}_error": error}
    pair = precision_recall(x, y, metric.neighbours, device=device)
    return dict(zip(("precision", "recall"), pair, strict=True))


def headline(numbers: dict[str, float]) -> tuple[str, float]:
    """The number that stands for the others: (name, value)."""
    return next(iter(numbers.items()))


def better(name: str, a: float, b: float) -> bool:
    """Whether ``a`` is a better value than ``b`` of the number ``name``: distances fall, scores rise."""
    return a > b if name in ("is", "precision") else a < b
