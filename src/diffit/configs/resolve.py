"""From a preset, options and what the data says of itself to one complete configuration."""

import difflib
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from diffit.configs.presets import RECIPES, get_preset
from diffit.configs.sampling import Sampling
from diffit.configs.schema import (
    AUGMENT_LABELS,
    FOLLOWING,
    ADMDiffusion,
    Config,
    ImageModel,
    LatentModel,
    StageSpec,
    Training,
    explain,
    require_null_class,
)
from diffit.errors import UserError

NETWORK = ("resolution", "base_dim", "hidden_dim", "num_heads", "num_blocks", "window_size", "dropout", "patch_size",
           "mlp_ratio")  # fmt: skip
"""Options that spell out a network: with one of them and no preset, the published recipe of that size is meant."""
NOISE = ("P_mean", "P_std", "sigma_data")
OTHER = ("recipe", "diffusion", "prediction", "vae", "data", "val", "cond", "default_minutes")
SHARE = 0.05  # of a run that is shorter than its preset's: the learning-rate ramp, and the EMA half-life
GRID_PIXELS = 45_000_000  # of a grid of samples
LINES = 50  # a run prints so many ticks


@dataclass(frozen=True)
class DataFacts:
    """What an archive says of itself."""

    channels: int
    image_size: tuple[int, int]
    num_classes: int = 0
    class_names: tuple[str, ...] | None = None
    empty_classes: tuple[int, ...] = ()
    """Numbered, but without an image."""
    content: str | None = None
    """A hash of the archive."""
    images: int = 0
    """Their number; 0 where it is not known."""
    latent_scale: float | None = None
    """Of cached latents; None for images."""
    latent_shape: tuple[int, int, int] | None = None
    """(C, h, w) of cached latents."""


def resolve(
    preset: str | Config | None,
    options: Mapping[str, Any],
    facts: DataFacts | None = None,
    *,
    processes: int = 1,
) -> Config:
    """Options that are absent or None leave the values of ``preset``, a name or a whole configuration.

    Keys are the fields of :class:`Training` and :class:`Sampling`, ``P_mean``, ``P_std``, ``sigma_data``, and
    ``resolution`` (H, W), ``base_dim``, ``hidden_dim``, ``num_heads``, ``num_blocks`` (a tuple, one per stage or one
    for all), ``window_size``, ``dropout``, ``patch_size``, ``mlp_ratio``, ``recipe`` (one of :data:`RECIPES`),
    ``diffusion`` (edm, cosine or linear), ``prediction`` (epsilon or v), ``vae``, ``data``, ``val``, ``cond``, and
    ``default_minutes``, a length that gives way to any other, and to that of a run which goes on. Without a preset,
    options that spell out a network choose the published recipe for the size of the images, and the batch is
    ``batch_gpu`` × processes; without such options a small network of ours is chosen. What follows from the length is
    put in proportion to it.

    Raises :class:`UserError` for unknown keys, and for values that do not fit together.
    """
    options = _known({key: value for key, value in options.items() if value is not None})
    size = _image_size(options, facts)
    base = preset if isinstance(preset, Config) else get_preset(preset or _preset_for(options, size, facts))
    if preset is None and "batch_gpu" in options and _spelled_out(options):
        options.setdefault("batch", options["batch_gpu"] * processes)
    changed = base.model_dump()
    if "recipe" in options:
        changed["training"] |= _recipe(options["recipe"], base)
    changed["training"] |= {key: options[key] for key in Training.model_fields if key in options}
    if "metrics_budget" in options and "metrics_ticks" not in options:
        changed["training"]["metrics_ticks"] = 1
    _in_proportion(changed["training"], base, options)
    _change_diffusion(changed, options)
    if changed["diffusion"]["kind"] != "edm" and "weighting" not in options:
        changed["training"]["weighting"] = None  # losses of a discrete schedule differ a hundredfold, EDM's threefold
    changed["sampling"] |= {key: options[key] for key in Sampling.model_fields if key in options}
    # A recipe that was not asked for does not ask for labels.
    cond = options.get("cond", preset is not None and base.data.cond)
    content = facts.content if facts else None
    changed["data"] |= {"path": options.get("data"), "val": options.get("val"), "cond": cond, "content": content}
    if isinstance(base.model, ImageModel):
        adapt_depth = preset is None or "resolution" in options
        _change_image_model(changed, base, options, size or base.model.image_size, facts, adapt_depth)
    else:
        _change_latent_model(changed, base, options, size or base.image_shape[1:], facts)
    _change_classes(changed, options, facts, cond)
    try:
        config = Config.model_validate(changed)
    except ValidationError as error:
        raise UserError(f"the options do not fit together: {explain(error)}") from None
    require_null_class(config)
    _check_grid(config)
    return config


def _recipe(name: str, base: Config) -> dict[str, Any]:
    if name not in RECIPES:
        raise UserError(f"recipe {name!r}: use {' or '.join(RECIPES)}")
    # A latent model begins as the official one does, and has one convolution.
    skipped = () if isinstance(base.model, ImageModel) else ("init", "conv_lr")
    return {key: value for key, value in RECIPES[name].items() if key not in skipped}


def _check_grid(config: Config) -> None:
    """UserError for pictures that those who read them refuse: the page, the report, TensorBoard's events."""
    (columns, rows), (height, width) = config.training.grid, config.image_shape[1:]
    if columns * rows * height * width > GRID_PIXELS:
        side, millions = math.isqrt(GRID_PIXELS // (height * width)), columns * rows * height * width / 1e6
        raise UserError(
            f"--grid {columns}x{rows}: {millions:,.0f} million pixels; at {width}x{height} use at most {side}x{side}"
        )


def _known(options: dict[str, Any]) -> dict[str, Any]:
    known = [*NETWORK, *NOISE, *OTHER, *Training.model_fields, *Sampling.model_fields]
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise UserError(f"unknown option {key!r}" + (f": did you mean {near[0]}?" if near else ""))
    return options


def _image_size(options: Mapping[str, Any], facts: DataFacts | None) -> tuple[int, int] | None:
    """(H, W): that of the data, or else the one asked for."""
    size: tuple[int, int] | None = options.get("resolution") or (facts.image_size if facts else None)
    if facts and size and size != facts.image_size:
        asked, found = (f"{s[1]}x{s[0]}" for s in (size, facts.image_size))
        raise UserError(
            f"--resolution {asked}, but the images are {found}: "
            f"leave it out, or resize them: diffit data convert --resolution {asked} --source … --dest …"
        )
    return size


def _spelled_out(options: Mapping[str, Any]) -> bool:
    return any(name in options for name in NETWORK)


def _preset_for(options: Mapping[str, Any], size: tuple[int, int] | None, facts: DataFacts | None) -> str:
    """The published recipe nearest in size where a network is spelled out, else a small one of ours."""
    latents = facts is not None and facts.latent_scale is not None
    if size is None:
        raise UserError("nothing says what to train: give --preset, or --data, or --resolution")
    side = max(size)
    if _spelled_out(options):
        if latents:
            return "imagenet512" if side > 256 else "imagenet256"
        return "cifar10" if side <= 32 else "ffhq64" if side < 128 else "imagenet256" if side < 512 else "imagenet512"
    if latents or side >= 128:
        return "latent-s"
    return next((f"small{small}" for small in (8, 16, 32) if side <= small), "small64")


def _in_proportion(training: dict[str, Any], base: Config, options: Mapping[str, Any]) -> None:
    """Put what follows from the length into ``training``, and name in its ``chosen`` what nobody asked for.

    A run's own options as the ``base`` leave to the clock, the length and the machine what the run had left to them.
    """
    before, preset = base.training, get_preset(base.preset).training
    asked = {"kimg", "minutes"} & options.keys()
    by_default = not asked and "default_minutes" in options
    if by_default:
        training["minutes"] = options["default_minutes"]
    timed = by_default or asked == {"minutes"} or (not asked and before.clock_minutes is not None)
    if asked == {"kimg"}:
        training["minutes"] = None
    if "compile" in before.chosen and "compile" not in options:
        training["compile"] = None
    free = unasked(base) - options.keys()
    if ema := {"ema_decay", "ema_halflife_kimg"} & options.keys():
        free -= {"ema_decay", "ema_halflife_kimg"}
        if "ema_decay" not in ema:
            training["ema_decay"] = None  # one of the two
    chosen = [name for name in FOLLOWING if name in free]
    if timed:
        chosen.append("kimg")
    if by_default or (not asked and "minutes" in before.chosen):
        chosen.append("minutes")
    if timed and "grid" not in options and ("grid" in before.chosen or before.grid == preset.grid):
        chosen.append("grid")
        training["grid"] = preset.grid
    if "batch_gpu" not in options and before.batch_gpu is not None:
        chosen.append("batch_gpu")  # a smaller one will do where that does not fit
    training["chosen"] = tuple(chosen)
    if timed or training["kimg"] != before.kimg:
        training |= _proportions(preset, chosen, training["kimg"])


def _proportions(preset: Training, chosen: Collection[str], kimg: float) -> dict[str, Any]:
    """Those of the ``chosen`` fields that follow from a length of ``kimg``; what a preset has is the upper limit.

    A preset of less than 1 kimg tries the code, not learning: nothing follows from its length.
    """
    if preset.kimg < 1:
        return {}
    values: dict[str, Any] = {}
    for name in ("lr_rampup_kimg", "ema_halflife_kimg"):
        own = getattr(preset, name)
        values[name] = min(own, max(SHARE, own / preset.kimg) * kimg)
    values["tick"] = min(preset.tick, kimg / LINES)
    values["ema_decay"] = preset.ema_decay
    if preset.ema_decay is not None:  # an average over more than the run would keep its random beginning
        halflife = preset.batch / 1000 * math.log(0.5) / math.log(preset.ema_decay)
        if SHARE * kimg < halflife and "ema_halflife_kimg" in chosen:
            values |= {"ema_decay": None, "ema_halflife_kimg": SHARE * kimg}
    return {name: value for name, value in values.items() if name in chosen}


def with_length(config: Config, kimg: float) -> Config:
    """``config`` for a length that was measured: what was ``chosen`` in proportion to it follows."""
    preset = get_preset(config.preset).training
    changes = {"kimg": kimg} | _proportions(preset, config.training.chosen, kimg)
    return config.model_copy(update={"training": config.training.model_copy(update=changes)})


def unasked(config: Config) -> set[str]:
    """Fields of the training that nobody asked for: those that follow from the length, the machine or a default.

    Not those that were edited in a configuration of the preset's own length.
    """
    training, preset = config.training, get_preset(config.preset).training
    names = set(training.chosen) | ({"batch_gpu"} if training.batch_gpu is None else set())
    if training.clock_minutes is None and training.kimg == preset.kimg:
        names -= {name for name in FOLLOWING if getattr(training, name) != getattr(preset, name)}
    return names


def _change_diffusion(changed: dict[str, Any], options: Mapping[str, Any]) -> None:
    """Put the named diffusion in, and a sampler that suits it; or another noise distribution of EDM's."""
    name, was_edm = options.get("diffusion"), changed["diffusion"]["kind"] == "edm"
    if name == "edm" and not was_edm:
        raise UserError("--diffusion edm: the latent model has a discrete schedule; use linear or cosine")
    if name not in (None, "edm"):
        changed["diffusion"] = ADMDiffusion(schedule=name, clip=was_edm).model_dump()
        if was_edm:
            changed["sampling"] |= {"sampler": "ddim", "steps": 50}
    if "prediction" in options:
        if changed["diffusion"]["kind"] == "edm":
            raise UserError(
                f"--prediction {options['prediction']}: only models on a discrete schedule have it, EDM's "
                "preconditioning fixes the target; use --diffusion cosine or linear, or leave it out"
            )
        changed["diffusion"]["prediction"] = options["prediction"]
    noise = {key: options[key] for key in NOISE if key in options}
    if noise and changed["diffusion"]["kind"] != "edm":
        given = ", ".join(f"--{key} {value:g}" for key, value in noise.items())
        raise UserError(f"{given}: of EDM's noise distribution, and this model has a discrete schedule; leave it out")
    changed["diffusion"] |= noise


def _change_image_model(
    changed: dict[str, Any],
    base: Config,
    options: Mapping[str, Any],
    size: tuple[int, int],
    facts: DataFacts | None,
    adapt_depth: bool,
) -> None:
    """What options and data change of an image-space model."""
    model = base.model
    assert isinstance(model, ImageModel)
    if facts and facts.latent_scale:
        raise UserError(
            f"the data are latents, preset {base.preset} is an image-space model: use latent-s, imagenet256 …"
        )
    if "vae" in options:
        raise UserError(f"--vae {options['vae']}: preset {base.preset} is an image-space model; leave it out")
    if "patch_size" in options:
        raise UserError(f"--patch-size {options['patch_size']}: preset {base.preset} has no patches; leave it out")
    blocks = options.get("num_blocks", ())
    count = len(model.stages)
    if len(blocks) > 1:
        count = len(blocks)
    elif adapt_depth and size != model.image_size:
        count = stage_count(size)
    changed["model"] |= {
        "image_size": tuple(size),
        "stages": edit_stages(model.stages, count, options),
        "dropout": options.get("dropout", model.dropout),
        "mlp_ratio": options.get("mlp_ratio", model.mlp_ratio),
        "augment_dim": AUGMENT_LABELS if changed["training"]["augment"] else 0,
        "channels": facts.channels if facts else model.channels,
    }


def stage_count(image_size: tuple[int, int]) -> int:
    """Halve until the shorter side would fall below 8: three stages at 32 pixels, four at 64 (Table S.2)."""
    return max((min(image_size) // 8).bit_length(), 2)


def edit_stages(stages: tuple[StageSpec, ...], count: int, options: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    """``count`` stages like ``stages`` (the last repeated), with the options that were given put in."""
    blocks = options.get("num_blocks")
    if isinstance(blocks, tuple) and len(blocks) == 1:
        blocks = blocks[0]
    # Of fewer stages the last stays the last: it is the one that attends globally in the small presets.
    kept = [*stages[: count - 1], stages[-1]] if count < len(stages) else stages
    edited = []
    for level in range(count):
        stage = kept[min(level, len(kept) - 1)].model_dump()
        width = options.get("base_dim") if level == 0 else options.get("hidden_dim")
        changes = {
            "width": width,
            "heads": options.get("num_heads"),
            "blocks": blocks[level] if isinstance(blocks, tuple) else blocks,
            "window": options.get("window_size"),
        }
        edited.append(stage | {key: value for key, value in changes.items() if value is not None})
    return tuple(edited)


def _change_latent_model(
    changed: dict[str, Any], base: Config, options: Mapping[str, Any], size: tuple[int, int], facts: DataFacts | None
) -> None:
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
    patch = options.get("patch_size", model.patch_size)
    unit = factor * patch
    if any(side % unit for side in size):
        raise UserError(
            f"images of {size[1]}x{size[0]}: the latent model takes sides that are multiples of {unit}; "
            f"diffit data convert --resolution {size[1] // unit * unit}x{size[0] // unit * unit} …"
        )
    fields = {
        "hidden_size": "hidden_dim",
        "num_heads": "num_heads",
        "patch_size": "patch_size",
        "mlp_ratio": "mlp_ratio",
    }
    changed["model"] |= {field: options[option] for field, option in fields.items() if option in options}
    changed["model"] |= {
        "input_size": tuple(side // factor for side in size),
        "depth": blocks[0] if blocks else model.depth,
    }
    if "vae" in options:
        changed["autoencoder"]["vae"] = options["vae"]
    if facts and facts.latent_scale:
        changed["autoencoder"]["scale"] = facts.latent_scale
    if facts and facts.latent_shape:
        channels, height, width = facts.latent_shape
        changed["model"] |= {"in_channels": channels, "input_size": (height, width)}
        changed["autoencoder"]["factor"] = facts.image_size[0] // height


def _change_classes(changed: dict[str, Any], options: Mapping[str, Any], facts: DataFacts | None, cond: bool) -> None:
    """The data's classes where they are asked for; no guidance where nothing would train its null class."""
    if not cond:
        changed["model"]["num_classes"] = 0
    elif facts:
        changed["model"]["num_classes"] = facts.num_classes
        changed["data"] |= {"class_names": facts.class_names, "empty_classes": facts.empty_classes}
    if "cfg_scale" not in options and not (cond and changed["training"]["label_drop"]):
        changed["sampling"] |= {"cfg_scale": 1.0, "cfg_power": None}


def accumulation(batch: int, batch_gpu: int | None, processes: int) -> tuple[int, int]:
    """``(batch_gpu, rounds)`` with ``batch = batch_gpu × processes × rounds``, or a :class:`UserError`."""
    if batch % processes:
        raise UserError(f"--batch {batch} does not divide among {processes} processes; use a multiple of {processes}")
    batch_gpu = min(batch_gpu or batch, batch // processes)
    if batch % (batch_gpu * processes):
        above = -(-batch // (batch_gpu * processes)) * batch_gpu * processes
        raise UserError(
            f"--batch {batch} is not a multiple of --batch-gpu {batch_gpu} × {processes} processes; "
            f"use --batch {above}, or a --batch-gpu that divides"
        )
    return batch_gpu, batch // (batch_gpu * processes)
