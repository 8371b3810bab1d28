"""Image archives and latent caches: making, checking and reading them."""

from diffit.data.archive import ImageArchive
from diffit.data.check import check
from diffit.data.convert import convert
from diffit.data.latents import LatentArchive

__all__ = ["ImageArchive", "LatentArchive", "check", "convert"]
