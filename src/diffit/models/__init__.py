"""The two families of networks, and the autoencoder round the latent one."""

from diffit.configs.schema import ImageModel, LatentModel
from diffit.models.attention import TMSA
from diffit.models.autoencoder import Autoencoder, load_autoencoder
from diffit.models.block import DiffiTBlock
from diffit.models.image import DiffiTResBlock, ImageDiffiT
from diffit.models.latent import LatentDiffiT

__all__ = [
    "TMSA",
    "Autoencoder",
    "DiffiT",
    "DiffiTBlock",
    "DiffiTResBlock",
    "ImageDiffiT",
    "LatentDiffiT",
    "build",
    "load_autoencoder",
]

DiffiT = ImageDiffiT | LatentDiffiT


def build(config: ImageModel | LatentModel) -> DiffiT:
    """The network that a configuration describes, with fresh weights."""
    return ImageDiffiT.from_config(config) if isinstance(config, ImageModel) else LatentDiffiT.from_config(config)
