"""Numbers that judge samples. The functions take features; :class:`Suite` takes images."""

from diffit.metrics.frechet import frechet_distance
from diffit.metrics.kid import kid
from diffit.metrics.precision_recall import precision_recall
from diffit.metrics.suite import Suite

__all__ = ["Suite", "frechet_distance", "kid", "precision_recall"]
