"""From a preset, the command line's options and the data's facts to one complete configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from diffit.configs.presets import AUGMENT_LABELS, LATENT, get_preset
from diffit.configs.schema import Config, StageSpec, Training, explain
from diffit.errors import UserError


@dataclass(frozen=True)
class DataFacts:
    """What an archive says of itself."""

    channels: int
    image_size: tuple[int, int]
    num_classes: int = 0
    class_names: tuple[str, ...] | None = None


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
    ``data``, ``val``, ``cond``. Without a preset the size of the images chooses one, and the batch is
    ``batch_gpu`` × processes.

    Raises :class:`UserError` for values that do not fit together.
    """
    options = {key: value for key, value in options.items() if value is not None}
    size: tuple[int, int] | None = options.get("resolution") or (facts.image_size if facts else None)
    if facts and size and size != facts.image_size:
        asked, found = (f"{s[1]}x{s[0]}" for s in (size, facts.image_size))
        raise UserError(
            f"--resolution {asked}, but the images are {found}: "
            f"leave it out, or resize them: diffit data convert --resolution {asked} --source … --dest …"
        )
    if preset is None:
        if size is None:
            raise UserError("nothing says what to train: give --preset, or --data, or --resolution")
        preset = preset_for(size)
        if preset in LATENT:
            raise UserError(
                f"{size[1]}x{size[0]} pixels call for the latent model, which this release does not have yet; "
                "smaller images: diffit data convert --resolution 64x64 …"
            )
        if "batch_gpu" in options:
            options.setdefault("batch", options["batch_gpu"] * processes)
        adapt_depth = True
    else:
        adapt_depth = "resolution" in options
    base = get_preset(preset)
    return apply(base, options, size or base.model.image_size, facts, adapt_depth)


def apply(
    base: Config, options: Mapping[str, Any], size: tuple[int, int], facts: DataFacts | None, adapt_depth: bool
) -> Config:
    """``base`` with ``options`` and the data's facts put in, validated as a whole."""
    blocks = options.get("num_blocks", ())
    if len(blocks) > 1:
        count = len(blocks)
    else:
        count = stage_count(size) if adapt_depth and size != base.model.image_size else len(base.model.stages)

    changed = base.model_dump()
    changed["training"] |= {key: options[key] for key in Training.model_fields if key in options}
    changed["sampling"] |= {key: options[key] for key in type(base.sampling).model_fields if key in options}
    changed["data"] |= {"path": options.get("data"), "val": options.get("val"), "cond": options.get("cond", False)}
    changed["model"] |= {
        "image_size": tuple(size),
        "stages": edit_stages(base.model.stages, count, options),
        "dropout": options.get("dropout", base.model.dropout),
        "augment_dim": AUGMENT_LABELS if changed["training"]["augment"] else 0,
    }
    if facts:
        changed["model"]["channels"] = facts.channels
        if options.get("cond"):
            changed["model"]["num_classes"] = facts.num_classes
            changed["data"]["class_names"] = facts.class_names
    try:
        return Config.model_validate(changed)
    except ValidationError as error:
        raise UserError(f"the options do not fit together: {explain(error)}") from None


def accumulation(batch: int, batch_gpu: int | None, processes: int) -> tuple[int, int]:
    """``(batch_gpu, rounds)`` with ``batch = batch_gpu × processes × rounds``, or a :class:`UserError`."""
    if batch % processes:
        raise UserError(f"--batch {batch} does not divide among {processes} processes")
    batch_gpu = min(batch_gpu or batch, batch // processes)
    if batch % (batch_gpu * processes):
        above = -(-batch // (batch_gpu * processes)) * batch_gpu * processes
        raise UserError(
            f"--batch {batch} is not a multiple of --batch-gpu {batch_gpu} × {processes} processes; "
            f"take --batch {above}, or a --batch-gpu that divides"
        )
    return batch_gpu, batch // (batch_gpu * processes)
