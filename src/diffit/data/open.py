"""An archive of images or of latents by its path, and what training must know of it."""

from pathlib import Path
from typing import Any

import torch

from diffit.configs.presets import get_preset
from diffit.configs.resolve import DataFacts
from diffit.configs.schema import Config
from diffit.data.archive import ImageArchive
from diffit.data.latents import LatentArchive, is_latents
from diffit.data.names import name_some
from diffit.errors import UserError

Archive = ImageArchive | LatentArchive


def open_data(path: str | Path, cond: bool | None, preset: str | None, *, skip_broken: bool = False) -> Archive:
    """The archive at ``path``; with labels where ``cond``, or else the preset, asks for them."""
    if cond is None and preset is not None:
        cond = get_preset(preset).data.cond
    if is_latents(path):
        return LatentArchive(path, cond=bool(cond))
    return ImageArchive(path, cond=bool(cond), skip_broken=skip_broken)


def facts_of(archive: Archive | None) -> DataFacts | None:
    """What the configuration takes from the data; None without data."""
    if archive is None:
        return None
    said: dict[str, Any] = {
        "num_classes": archive.num_classes,
        "class_names": tuple(archive.class_names) if archive.class_names else None,
        "empty_classes": _empty_classes(archive),
        "content": archive.content_hash,
        "images": len(archive),
    }
    if isinstance(archive, LatentArchive):
        scale, shape = archive.header.scale, archive.latent_shape
        return DataFacts(3, archive.image_size, latent_scale=scale, latent_shape=shape, **said)
    channels, height, width = archive.image_shape
    return DataFacts(channels, (height, width), **said)


def _empty_classes(archive: Archive) -> tuple[int, ...]:
    if archive.labels is None:
        return ()
    counts = torch.bincount(archive.labels, minlength=archive.num_classes)
    return tuple((counts == 0).nonzero().flatten().tolist())


def open_val(path: str | Path, archive: Archive, config: Config) -> Archive:
    """The held-out images at ``path``. UserError unless they are of the kind and the classes of ``archive``."""
    val = open_data(path, config.data.cond, None)
    shapes = [tuple(a[0].shape) for a in (val, archive)]
    if shapes[0] != shapes[1]:
        raise UserError(f"--val {path}: holds {shapes[0]}, the training data {shapes[1]}; convert both alike")
    if config.data.cond:
        if val.num_classes > config.model.num_classes:
            raise UserError(f"--val {path}: {val.num_classes} classes, the training images have {archive.num_classes}")
        _number_alike(path, val, archive)
    return val


def _number_alike(path: str | Path, val: Archive, archive: Archive) -> None:
    """Give ``val`` the class numbers of ``archive`` where both name their classes: one may lack some."""
    names = val.class_names or []
    assert val.labels is not None
    labels: list[int] = val.labels.tolist()
    if not archive.class_names or names == archive.class_names or max(labels) >= len(names):
        return
    number = {name: i for i, name in enumerate(archive.class_names)}
    if unknown := sorted({names[label] for label in labels} - set(number)):
        raise UserError(f"--val {path}: the training images have no class {name_some(unknown)}; leave those images out")
    val.labels = torch.tensor([number[names[label]] for label in labels], dtype=torch.int64)
    val.class_names, val.num_classes = archive.class_names, archive.num_classes
