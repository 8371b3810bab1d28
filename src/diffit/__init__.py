"""DiffiT: diffusion vision transformers (arXiv 2312.02139).

The public names are imported when they are first used, so that ``diffit --help`` need not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from diffit.registration import register

__version__ = "0.1.0"

if TYPE_CHECKING:
    from diffit.autoencoder import load_autoencoder
    from diffit.configs.presets import get_preset
    from diffit.data.archive import ImageArchive
    from diffit.data.latents import LatentArchive
    from diffit.errors import UserError
    from diffit.models.attention import TMSA
    from diffit.models.image import ImageDiffiT
    from diffit.models.latent import LatentDiffiT
    from diffit.pipeline import DiffiTPipeline
    from diffit.sampling import sample
    from diffit.weights import load_network, save_network

_HOMES = {
    "DiffiTPipeline": "diffit.pipeline",
    "ImageArchive": "diffit.data.archive",
    "ImageDiffiT": "diffit.models.image",
    "LatentArchive": "diffit.data.latents",
    "LatentDiffiT": "diffit.models.latent",
    "TMSA": "diffit.models.attention",
    "UserError": "diffit.errors",
    "get_preset": "diffit.configs.presets",
    "load_autoencoder": "diffit.autoencoder",
    "load_network": "diffit.weights",
    "sample": "diffit.sampling",
    "save_network": "diffit.weights",
}
__all__ = [
    "TMSA",
    "DiffiTPipeline",
    "ImageArchive",
    "ImageDiffiT",
    "LatentArchive",
    "LatentDiffiT",
    "UserError",
    "get_preset",
    "load_autoencoder",
    "load_network",
    "sample",
    "save_network",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'diffit' has no attribute {name!r}")


register()
