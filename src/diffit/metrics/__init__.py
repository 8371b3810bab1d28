"""Numbers that judge samples. The functions compare features; :class:`Suite` begins with images."""

from diffit.metrics.frechet import frechet_distance, moments
from diffit.metrics.kid import kid
from diffit.metrics.precision_recall import precision_recall
from diffit.metrics.suite import Suite

__all__ = ["Suite", "frechet_distance", "kid", "moments", "precision_recall"]
