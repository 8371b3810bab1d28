"""Small models of both families in which every parameter has an effect on the output, which stays of order one."""

import torch

from diffit.configs.presets import get_preset
from diffit.configs.sampling import Sampling
from diffit.configs.schema import StageSpec
from diffit.models import DiffiT, ImageDiffiT, LatentDiffiT
from diffit.sampling import Model


def stage(blocks: int, width: int, heads: int, window: int | None) -> StageSpec:
    return StageSpec(blocks=blocks, width=width, heads=heads, window=window)


def image_model(num_classes=3, **sampling) -> Model:
    """Three kinds of attention: windows that divide the map, windows that do not, and the whole map."""
    config = get_preset("debug")
    stages = (stage(1, 8, 2, 4), stage(1, 16, 2, 4), stage(1, 16, 4, None))
    model = config.model.model_copy(
        update={"num_classes": num_classes, "image_size": (12, 20), "stages": stages, "cond_dim": 16}
    )
    config = config.model_copy(update={"model": model, "sampling": Sampling(**{"steps": 4} | sampling)})
    return Model(filled(ImageDiffiT.from_config(model)), config)


def latent_model(**sampling) -> Model:
    config = get_preset("latent-debug")
    model = config.model.model_copy(update={"num_classes": 3, "input_size": (4, 8)})
    config = config.model_copy(
        update={"model": model, "sampling": config.sampling.model_copy(update={"steps": 4} | sampling)}
    )
    return Model(filled(LatentDiffiT.from_config(model)), config)


def filled(net: DiffiT) -> DiffiT:
    generator = torch.Generator().manual_seed(0)
    net.eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.normal_(std=0.15, generator=generator)
    return net
