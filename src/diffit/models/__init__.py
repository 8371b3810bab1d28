"""The two families of networks."""

from diffit.configs.schema import ImageModel, LatentModel
from diffit.models.image import ImageDiffiT
from diffit.models.latent import LatentDiffiT

DiffiT = ImageDiffiT | LatentDiffiT


def build(config: ImageModel | LatentModel) -> DiffiT:
    """The network that a configuration describes, with fresh weights."""
    return ImageDiffiT.from_config(config) if isinstance(config, ImageModel) else LatentDiffiT.from_config(config)
