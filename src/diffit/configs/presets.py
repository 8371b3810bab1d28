"""Named, complete configurations. Each cites the table that its figures come from.

A preset fixes the recipe; what only the data knows (channels, size, classes) is filled in by
:func:`diffit.configs.resolve.resolve`.
"""

from collections.abc import Callable
from typing import Any

from diffit.configs.sampling import Sampling
from diffit.configs.schema import (
    AUGMENT_LABELS,
    ADMDiffusion,
    AutoencoderSpec,
    Config,
    Data,
    ImageModel,
    LatentModel,
    StageSpec,
    Training,
)
from diffit.errors import UserError

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {"optimizer": "adam", "init": "xavier", "conv_lr": 1.0, "weighting": None, "lr_decay": 0.0},
    "muon": {"optimizer": "muon", "init": "fan_in", "conv_lr": 1.0, "weighting": "uncertainty", "lr_decay": 0.5},
}
"""How weights begin, move and come to rest, and noise levels weigh: as published, or as in the small presets
(docs/quality.md)."""


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
        sampling=Sampling(steps=18, cfg_scale=1.2),
        training=Training(
            batch=64,
            kimg=120,
            lr=2e-3,
            lr_rampup_kimg=4,
            ema_halflife_kimg=10,
            ema_rampup_ratio=0.1,
            tick=10,
            snap=4,
            dump=4,
            workers=0,
        ),
    )


def _small(preset: str, side: int, *widths: int, batch: int = 16, lr: float = 2e-3) -> Config:
    """Ours, for the machine at hand: the deepest stage attends globally, the others in windows of 4.

    Network and recipe were chosen by held-out loss after minutes of a core (docs/quality.md): Muon leaves the loss's
    first plateau in a thousand images, narrow MLPs pay for wider stages, and where steps are long, small batches learn
    more in the time. Where they are short, larger ones with a larger rate are as good from three minutes on.

    The length is the machine's: see :mod:`diffit.training.plan`. ``kimg`` is only that of a run of unknown speed.
    """
    stages = [StageSpec(blocks=1, width=width, heads=max(width // 32, 1), window=4) for width in widths[:-1]]
    last = StageSpec(blocks=2, width=widths[-1], heads=max(widths[-1] // 32, 1), window=None)
    return Config(
        preset=preset,
        model=ImageModel(image_size=(side, side), stages=(*stages, last), cond_dim=128, mlp_ratio=2.0),
        sampling=Sampling(steps=18),
        training=Training(
            batch=batch, kimg=50, lr=lr, lr_rampup_kimg=0.5, ema_halflife_kimg=2.5, tick=1, **RECIPES["muon"]
        ),
    )


def small8() -> Config:
    """8×8, for minutes on a CPU."""
    return _small("small8", 8, 48, 96, batch=32)


def small16() -> Config:
    """16×16, for minutes on a CPU."""
    return _small("small16", 16, 48, 96, batch=32, lr=4e-3)


def small32() -> Config:
    """32×32, for minutes on a CPU."""
    return _small("small32", 32, 48, 64, 128)


def small64() -> Config:
    """64×64, for minutes on a CPU."""
    return _small("small64", 64, 48, 64, 96, 128)


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


def _latent(preset: str, model: LatentModel, sampling: Sampling, *, cond: bool = False, **training: Any) -> Config:
    """What all latent models share: the official procedure, Adam with a constant rate, EMA 0.9999 a step."""
    recipe: dict[str, Any] = {"kimg": 1_000_000, "lr_rampup_kimg": 0.0, "ema_decay": 0.9999, "batch_gpu": 32}
    return Config(
        preset=preset,
        model=model,
        autoencoder=AutoencoderSpec(),
        diffusion=ADMDiffusion(schedule="linear"),
        sampling=sampling,
        training=Training(**recipe | training),
        data=Data(cond=cond),
    )


def official_sampling(side: int) -> Sampling:
    """NVIDIA's sampling for latents of this side: 250 DDPM steps; guidance that rises up to 32, else a constant one."""
    scale, power = (4.4, 4.0) if side <= 32 else (1.49, None)
    return Sampling(sampler="ddpm", steps=250, cfg_scale=scale, cfg_power=power, cfg_channels=3, rounding="truncate")


def imagenet256() -> Config:
    """256×256: DiffiT Table 9 and §I.2, with the official weights' depth of 28."""
    return _latent("imagenet256", LatentModel(), official_sampling(32), cond=True, batch=256, lr=3e-4)


def imagenet512() -> Config:
    """512×512: the same network on latents of 64×64."""
    return _latent(
        "imagenet512", LatentModel(input_size=(64, 64)), official_sampling(64), cond=True, batch=512, lr=1e-4
    )


def latent_s() -> Config:
    """The width and depth of DiT-S/2 (arXiv 2212.09748, Table 1), for one GPU."""
    model = LatentModel(hidden_size=384, depth=12, num_heads=6)
    return _latent("latent-s", model, official_sampling(32), batch=256, lr=3e-4, kimg=100_000)


def latent_b() -> Config:
    """The width and depth of DiT-B/2."""
    model = LatentModel(hidden_size=768, depth=12, num_heads=12)
    return _latent("latent-b", model, official_sampling(32), batch=256, lr=3e-4, kimg=100_000)


def latent_l() -> Config:
    """The width and depth of DiT-L/2."""
    model = LatentModel(hidden_size=1024, depth=24, num_heads=16)
    return _latent("latent-l", model, official_sampling(32), batch=256, lr=3e-4, kimg=100_000)


def latent_debug() -> Config:
    """Every part of a latent run in seconds on a CPU. Its samples are noise."""
    model = LatentModel(input_size=(4, 4), hidden_size=32, depth=2, num_heads=2, num_classes=0)
    sampling = Sampling(sampler="ddim", steps=4, cfg_channels=3, rounding="truncate")
    return _latent("latent-debug", model, sampling, batch=8, lr=1e-3, kimg=0.16, tick=0.04, workers=0)


PRESETS: dict[str, Callable[[], Config]] = {
    preset.__name__.replace("_", "-"): preset
    for preset in (
        small8, small16, small32, small64, cifar10, ffhq64, imagenet256, imagenet512, latent_s, latent_b, latent_l,
        digits, debug, latent_debug,
    )
}  # fmt: skip


def get_preset(name: str) -> Config:
    """The preset of that name; a :class:`UserError` lists the known ones."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]()


def latent_preset_for(side: int) -> Config:
    """The published recipe for latents of this side."""
    return imagenet256() if side <= 32 else imagenet512()


def get_diffit_config(name: str) -> dict[str, Any]:
    """The network of a preset as a plain dict, under the names of the command line's options."""
    config = get_preset(name)
    model = config.model
    common = {
        "resolution": config.image_shape[1],
        "in_channels": model.sample_shape[0],
        "mlp_ratio": model.mlp_ratio,
        "num_classes": model.num_classes,
    }
    if isinstance(model, LatentModel):
        return common | {
            "input_size": model.input_size[0],
            "patch_size": model.patch_size,
            "hidden_dim": model.hidden_size,
            "num_heads": model.num_heads,
            "num_blocks": model.depth,
        }
    stages = model.stages
    return common | {
        "base_dim": stages[0].width,
        "hidden_dim": stages[-1].width,
        "num_heads": stages[0].heads,
        "num_blocks": stages[0].blocks,
        "window_size": stages[0].window,
        "num_stages": len(stages),
        "stages": [stage.model_dump() for stage in stages],
        "cond_dim": model.cond_dim,
        "dropout": model.dropout,
        "augment_dim": model.augment_dim,
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
