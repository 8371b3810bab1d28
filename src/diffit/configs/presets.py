"""Named, complete configurations. Each cites the table that its figures come from.

A preset fixes the recipe; what only the data knows (channels, size, classes) is filled in by
:func:`diffit.configs.resolve.resolve`.
"""

from collections.abc import Callable
from typing import Any

from diffit.configs.schema import Config, ImageModel, Sampling, StageSpec, Training
from diffit.errors import UserError

AUGMENT_LABELS = 9  # what diffit.data.augment tells of its transforms


def cifar10() -> Config:
    """32×32: DiffiT Tables S.2 and S.3 (2 ResBlocks a stage, window 4), the EDM recipe for CIFAR-10."""
    return Config(
        preset="cifar10",
        model=ImageModel(
            image_size=(32, 32),
            stages=(
                StageSpec(blocks=2, width=128, heads=4, window=4),
                StageSpec(blocks=2, width=256, heads=4, window=4),
                StageSpec(blocks=2, width=256, heads=4, window=4),
            ),
            augment_dim=AUGMENT_LABELS,
            dropout=0.13,
        ),
        sampling=Sampling(steps=18),
        training=Training(batch=512, kimg=200_000, lr=1e-3, augment=0.12),
    )


def ffhq64() -> Config:
    """64×64: DiffiT Tables S.2 and S.3 (4 ResBlocks a stage, window 8), the EDM recipe for FFHQ."""
    return Config(
        preset="ffhq64",
        model=ImageModel(
            image_size=(64, 64),
            stages=(
                StageSpec(blocks=4, width=128, heads=4, window=8),
                StageSpec(blocks=4, width=256, heads=4, window=8),
                StageSpec(blocks=4, width=256, heads=4, window=8),
                StageSpec(blocks=4, width=256, heads=4, window=8),
            ),
            augment_dim=AUGMENT_LABELS,
            dropout=0.05,
        ),
        sampling=Sampling(steps=40),
        training=Training(batch=256, kimg=200_000, lr=2e-4, augment=0.15),
    )


def digits() -> Config:
    """8×8 gray digits, class-conditional: minutes on a CPU. Ours, not the paper's."""
    return Config(
        preset="digits",
        model=ImageModel(
            image_size=(8, 8),
            channels=1,
            stages=(
                StageSpec(blocks=1, width=32, heads=2, window=4),
                StageSpec(blocks=2, width=96, heads=2, window=None),
            ),
            cond_dim=128,
        ),
        sampling=Sampling(steps=18),
        training=Training(
            batch=64,
            kimg=200,
            lr=2e-3,
            lr_rampup_kimg=4,
            ema_halflife_kimg=10,
            ema_rampup_ratio=0.1,
            tick=10,
            snap=10,
            dump=10,
            workers=0,
        ),
    )


def debug() -> Config:
    """Every part of a run in seconds on a CPU. Its samples are noise."""
    return Config(
        preset="debug",
        model=ImageModel(
            image_size=(16, 16),
            stages=(
                StageSpec(blocks=1, width=16, heads=2, window=4),
                StageSpec(blocks=1, width=32, heads=2, window=None),
            ),
            cond_dim=32,
            augment_dim=AUGMENT_LABELS,
            dropout=0.1,
        ),
        sampling=Sampling(steps=4),
        training=Training(batch=8, kimg=0.16, lr=1e-3, lr_rampup_kimg=0.04, augment=0.12, tick=0.04, workers=0),
    )


PRESETS: dict[str, Callable[[], Config]] = {preset.__name__: preset for preset in (cifar10, ffhq64, digits, debug)}
LATENT = ("imagenet256", "imagenet512")


def get_preset(name: str) -> Config:
    """The preset of that name; a :class:`UserError` lists the known ones."""
    if name in LATENT:
        raise UserError(f"preset {name!r} comes with the latent model, which this release does not have yet")
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; known: {', '.join([*PRESETS, *LATENT])}")
    return PRESETS[name]()


def get_diffit_config(name: str) -> dict[str, Any]:
    """The network of a preset as a plain dict, under the names of the command line's options."""
    config = get_preset(name)
    stages = config.model.stages
    return {
        "resolution": config.model.image_size[0],
        "in_channels": config.model.channels,
        "base_dim": stages[0].width,
        "hidden_dim": stages[-1].width,
        "num_heads": stages[0].heads,
        "num_blocks": stages[0].blocks,
        "window_size": stages[0].window,
        "num_stages": len(stages),
        "stages": [stage.model_dump() for stage in stages],
        "cond_dim": config.model.cond_dim,
        "mlp_ratio": config.model.mlp_ratio,
        "dropout": config.model.dropout,
        "augment_dim": config.model.augment_dim,
        "num_classes": config.model.num_classes,
    }


def get_training_config(name: str) -> dict[str, Any]:
    """The recipe of a preset as a plain dict: training, noise distribution and sampling defaults."""
    config = get_preset(name)
    training = config.training.model_dump()
    return {
        "batch_size": training.pop("batch"),
        **training,
        **config.diffusion.model_dump(),
        **config.sampling.model_dump(),
    }
