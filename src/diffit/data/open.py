"""An archive of images or of latents by its path, and what training must know of it."""

from pathlib import Path

from diffit.configs.presets import get_preset
from diffit.configs.resolve import DataFacts
from diffit.configs.schema import Config
from diffit.data.archive import ImageArchive
from diffit.data.latents import LatentArchive, is_latents
from diffit.errors import UserError

Archive = ImageArchive | LatentArchive


def open_data(path: str | Path, cond: bool | None, preset: str | None) -> Archive:
    """The archive at ``path``; with labels where ``cond``, or else the preset, asks for them."""
    if cond is None and preset is not None:
        cond = get_preset(preset).data.cond
    return LatentArchive(path, cond=bool(cond)) if is_latents(path) else ImageArchive(path, cond=bool(cond))


def facts_of(archive: Archive | None) -> DataFacts | None:
    """What the configuration takes from the data; None without data."""
    if archive is None:
        return None
    names = tuple(archive.class_names) if archive.class_names else None
    if isinstance(archive, LatentArchive):
        scale, shape = archive.header.scale, archive.latent_shape
        return DataFacts(3, archive.image_size, archive.num_classes, names, scale, shape)
    channels, height, width = archive.image_shape
    return DataFacts(channels, (height, width), archive.num_classes, names)


def open_val(path: str | Path, archive: Archive, config: Config) -> Archive:
    """The held-out images at ``path``. UserError unless they are of the kind and the classes of ``archive``."""
    val = open_data(path, config.data.cond, None)
    shapes = [tuple(a[0].shape) for a in (val, archive)]
    if shapes[0] != shapes[1]:
        raise UserError(f"--val {path}: holds {shapes[0]}, the training data {shapes[1]}; convert both alike")
    if config.data.cond and val.num_classes > config.model.num_classes:
        raise UserError(f"--val {path}: {val.num_classes} classes, the training images have {archive.num_classes}")
    return val
