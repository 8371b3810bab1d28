"""The suite of numbers that ADM (Dhariwal & Nichol 2021) and those who compare with it report."""

from dataclasses import dataclass
from typing import Any

from diffit.metrics.features import Metric, Part
from diffit.metrics.frechet import FID
from diffit.metrics.inception_score import InceptionScore
from diffit.metrics.precision_recall import Precision, PrecisionRecall

REAL_FEATURES = 10_000  # real images for precision and recall
SPLIT_SIZE = 5000  # images of one split of the Inception score


@dataclass(frozen=True)
class ADM(Metric):
    """FID and sFID against statistics of all real images, Inception score, precision and recall.

    They are computed as the published evaluator does: the Inception score over splits of 5,000 images, precision and
    recall from 10,000 real images and distances in float16 (see :func:`diffit.metrics.precision_recall.published`).
    """

    kind = "adm"
    precision: Precision = "float16"

    @property
    def suffix(self) -> str:
        return "_full" * self.full + "_fp64" * (self.precision == "float64")

    @property
    def parts(self) -> list[Part[Any]]:
        n, spec = self.samples, self.spec
        return [
            FID(n, True, spec),
            FID(n, True, spec, output="spatial"),
            InceptionScore(n, spec=spec, split_size=SPLIT_SIZE),
            PrecisionRecall(n, spec=spec, precision=self.precision, most_real=REAL_FEATURES),
        ]
