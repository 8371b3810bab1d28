"""DiffiT: diffusion vision transformers (arXiv 2312.02139).

The public names are imported when they are first used, so that ``diffit --help`` need not wait for torch.
``import diffit.pipeline`` makes ``DiffusionPipeline.from_pretrained`` of diffusers know our pipelines.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

if TYPE_CHECKING:
    from diffit.configs import Config, get_preset
    from diffit.data import ImageArchive, LatentArchive
    from diffit.errors import UserError
    from diffit.models import TMSA, ImageDiffiT, LatentDiffiT, load_autoencoder
    from diffit.pipeline import DiffiTPipeline
    from diffit.sampling import Model, load, sample
    from diffit.weights import load_network, save_network

_ROOMS = {
    "Config": "configs",
    "DiffiTPipeline": "pipeline",
    "ImageArchive": "data",
    "ImageDiffiT": "models",
    "LatentArchive": "data",
    "LatentDiffiT": "models",
    "Model": "sampling",
    "TMSA": "models",
    "UserError": "errors",
    "get_preset": "configs",
    "load": "sampling",
    "load_autoencoder": "models",
    "load_network": "weights",
    "sample": "sampling",
    "save_network": "weights",
}
__all__ = [
    "TMSA",
    "Config",
    "DiffiTPipeline",
    "ImageArchive",
    "ImageDiffiT",
    "LatentArchive",
    "LatentDiffiT",
    "Model",
    "UserError",
    "get_preset",
    "load",
    "load_autoencoder",
    "load_network",
    "sample",
    "save_network",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return getattr(importlib.import_module(f"diffit.{_ROOMS[name]}"), name)
    raise AttributeError(f"module 'diffit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
