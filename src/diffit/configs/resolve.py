"""From a preset, the command line's options and the data's facts to one complete configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from diffit.configs.presets import AUGMENT_LABELS, get_preset
from diffit.configs.schema import ADMDiffusion, Config, ImageModel, LatentModel, Sampling, StageSpec, Training, explain
from diffit.errors import UserError


@dataclass(frozen=True)
class DataFacts:
    """What an archive says of itself."""

    channels: int
    image_size: tuple[int, int]
    num_classes: int = 0
    class_names: tuple[str, ...] | None = None
    latent_scale: float | None = None
    """Of cached latents; None for images."""
    latent_shape: tuple[int, int, int] | None = None
    """(C, h, w) of cached latents."""


def preset_for(image_size: tuple[int, int]) -> str:
    """The published recipe nearest in size, for a command that spells out its numbers."""
    side = max(image_size)
    return "cifar10" if side <= 32 else "ffhq64" if side < 128 else "imagenet256" if side < 512 else "imagenet512"


def stage_count(image_size: tuple[int, int]) -> int:
    """Halve until the shorter side would fall below 8: three stages at 32 pixels, four at 64 (Table S.2)."""
    return max((min(image_size) // 8).bit_length(), 2)


def edit_stages(stages: tuple[StageSpec, ...], count: int, options: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """``count`` stages like ``stages`` (the last repeated), with the options that were given put in."""
    blocks = options.get("num_blocks")
    if isinstance(blocks, tuple) and len(blocks) == 1:
        blocks = blocks[0]
    edited = []
    for level in range(count):
        stage = stages[min(level, len(stages) - 1)].model_dump()
        width = options.get("base_dim") if level == 0 else options.get("hidden_dim")
        changes = {
            "width": width,
            "heads": options.get("num_heads"),
            "blocks": blocks[level] if isinstance(blocks, tuple) else blocks,
            "window": options.get("window_size"),
        }
        edited.append(stage | {key: value for key, value in changes.items() if value is not None})
    return tuple(edited)


def resolve(
    preset: str | None,
    options: Mapping[str, Any],
    facts: DataFacts | None = None,
    *,
    processes: int = 1,
) -> Config:
    """Options that are absent or None leave the preset's values.

    Keys are the fields of :class:`Training` and :class:`Sampling`, and ``resolution`` (H, W), ``base_dim``,
    ``hidden_dim``, ``num_heads``, ``num_blocks`` (a tuple, one a stage or one for all), ``window_size``, ``dropout``,
    ``diffusion`` (edm, cosine or linear), ``vae``, ``data``, ``val``, ``cond``. Without a preset the size of the images
    chooses one, and the batch is ``batch_gpu`` × processes.

    Raises :class:`UserError` for values that do not fit together.
    """
    options = {key: value for key, value in options.items() if value is not None}
    named = preset is not None  # a recipe that was not asked for does not ask for labels
    size: tuple[int, int] | None = options.get("resolution") or (facts.image_size if facts else None)
    if facts and size and size != facts.image_size:
        asked, found = (f"{s[1]}x{s[0]}" for s in (size, facts.image_size))
        raise UserError(
            f"--resolution {asked}, but the images are {found}: "
            f"leave it out, or resize them: diffit data convert --resolution {asked} --source … --dest …"
        )
    if preset is None:
        if facts and facts.latent_scale:
            preset = "imagenet512" if max(facts.image_size) > 256 else "imagenet256"
        elif size is None:
            raise UserError("nothing says what to train: give --preset, or --data, or --resolution")
        else:
            preset = preset_for(size)
        if "batch_gpu" in options:
            options.setdefault("batch", options["batch_gpu"] * processes)
        adapt_depth = True
    else:
        adapt_depth = "resolution" in options
    base = get_preset(preset)
    if facts and facts.latent_scale and isinstance(base.model, ImageModel):
        raise UserError(
            f"the data are latents, preset {base.preset} is an image-space model: take latent-s, imagenet256 …"
        )
    changed = base.model_dump()
    changed["training"] |= {key: options[key] for key in Training.model_fields if key in options}
    if "diffusion" in options:
        change_diffusion(changed, options["diffusion"])
    changed["sampling"] |= {key: options[key] for key in Sampling.model_fields if key in options}
    cond = options.get("cond", named and base.data.cond)
    changed["data"] |= {"path": options.get("data"), "val": options.get("val"), "cond": cond}
    if isinstance(base.model, ImageModel):
        if "vae" in options:
            raise UserError(f"--vae {options['vae']}: preset {base.preset} is an image-space model; leave it out")
        changed["model"] |= image_changes(base, options, size or base.model.image_size, facts, adapt_depth)
        changed["model"]["augment_dim"] = AUGMENT_LABELS if changed["training"]["augment"] else 0
    else:
        changed["model"] |= latent_changes(base, options, size or base.image_shape[1:])
        if "vae" in options:
            changed["autoencoder"]["vae"] = options["vae"]
        if facts and facts.latent_scale:
            changed["autoencoder"]["scale"] = facts.latent_scale
        if facts and facts.latent_shape:
            channels, height, width = facts.latent_shape
            changed["model"] |= {"in_channels": channels, "input_size": (height, width)}
            changed["autoencoder"]["factor"] = facts.image_size[0] // height
    if not cond:
        changed["model"]["num_classes"] = 0
        if "cfg_scale" not in options:
            changed["sampling"] |= {"cfg_scale": 1.0, "cfg_power": None}
    elif facts:
        changed["model"]["num_classes"] = facts.num_classes
        changed["data"]["class_names"] = facts.class_names
    if cond and not changed["training"]["label_drop"] and "cfg_scale" not in options:
        changed["sampling"] |= {"cfg_scale": 1.0, "cfg_power": None}  # guidance needs a null class that was trained
    try:
        return Config.model_validate(changed)
    except ValidationError as error:
        raise UserError(f"the options do not fit together: {explain(error)}") from None


def change_diffusion(changed: dict[str, Any], name: str) -> None:
    """Put the named diffusion in, and a sampler that suits it."""
    if name == "edm":
        if changed["diffusion"]["kind"] != "edm":
            raise UserError(
                "--diffusion edm: the latent model predicts noise on a discrete schedule; take linear or cosine"
            )
        return
    was_edm = changed["diffusion"]["kind"] == "edm"
    changed["diffusion"] = ADMDiffusion(schedule=name, clip=was_edm).model_dump()  # type: ignore[arg-type]
    if was_edm:
        changed["sampling"] |= {"sampler": "ddim", "steps": 50}


def image_changes(
    base: Config, options: Mapping[str, Any], size: tuple[int, int], facts: DataFacts | None, adapt_depth: bool
) -> dict[str, Any]:
    """What options and data change of an image-space model."""
    assert isinstance(base.model, ImageModel)
    blocks = options.get("num_blocks", ())
    if len(blocks) > 1:
        count = len(blocks)
    else:
        count = stage_count(size) if adapt_depth and size != base.model.image_size else len(base.model.stages)
    changes = {
        "image_size": tuple(size),
        "stages": edit_stages(base.model.stages, count, options),
        "dropout": options.get("dropout", base.model.dropout),
    }
    return changes | ({"channels": facts.channels} if facts else {})


def latent_changes(base: Config, options: Mapping[str, Any], size: tuple[int, int]) -> dict[str, Any]:
    """What options and data change of a latent model. ``base_dim`` has no place in it: all tokens are of one width."""
    model = base.model
    assert isinstance(model, LatentModel)
    assert base.autoencoder is not None
    for name in ("window_size", "dropout"):
        if name in options:
            raise UserError(f"--{name.replace('_', '-')} {options[name]}: the latent model has none; leave it out")
    blocks, factor = options.get("num_blocks", ()), base.autoencoder.factor
    if len(blocks) > 1:
        raise UserError(f"--num-blocks {','.join(map(str, blocks))}: the latent model has one depth; give one number")
    unit = factor * model.patch_size
    if any(side % unit for side in size):
        raise UserError(
            f"images of {size[1]}x{size[0]}: the latent model takes sides that are multiples of {unit}; "
            f"diffit data convert --resolution {size[1] // unit * unit}x{size[0] // unit * unit} …"
        )
    changes = {"hidden_size": "hidden_dim", "num_heads": "num_heads"}
    return {
        "input_size": tuple(side // factor for side in size),
        "depth": blocks[0] if blocks else model.depth,
        **{field: options[option] for field, option in changes.items() if option in options},
    }


def accumulation(batch: int, batch_gpu: int | None, processes: int) -> tuple[int, int]:
    """``(batch_gpu, rounds)`` with ``batch = batch_gpu × processes × rounds``, or a :class:`UserError`."""
    if batch % processes:
        raise UserError(f"--batch {batch} does not divide among {processes} processes; take a multiple of {processes}")
    batch_gpu = min(batch_gpu or batch, batch // processes)
    if batch % (batch_gpu * processes):
        above = -(-batch // (batch_gpu * processes)) * batch_gpu * processes
        raise UserError(
            f"--batch {batch} is not a multiple of --batch-gpu {batch_gpu} × {processes} processes; "
            f"take --batch {above}, or a --batch-gpu that divides"
        )
    return batch_gpu, batch // (batch_gpu * processes)
