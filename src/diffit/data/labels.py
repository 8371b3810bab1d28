"""``dataset.json``: the labels of an archive's images, in the StyleGAN/EDM layout.

It is ``{"labels": [["00000/img00000000.png", 6], ...] or null, "class_names": [...]}``.
"""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from diffit.data.files import FileTree, convert_command
from diffit.data.names import safe_name
from diffit.errors import UserError, printable

META = "dataset.json"
MAX_CLASSES = 1_000_000
META_BYTES = 4 << 20, 1 << 10  # of dataset.json: in all, and for each image


def read_labels(files: FileTree, images: int | None = None) -> tuple[dict[str, int] | None, list[str] | None]:
    """(label of every listed file or None, class names or None) from ``dataset.json``. UserError if malformed.

    ``images`` is how many it may list, None for those of ``files``.
    """
    if META not in files.names:
        return None, None
    where = f"{files.path}: {META}"
    limit = META_BYTES[0] + META_BYTES[1] * (len(files.images) if images is None else images)
    try:
        meta = json.loads(files.read(META, limit))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}): write it again with `diffit data convert`") from error
    if not isinstance(meta, dict):
        raise UserError(f'{where} must be an object like {{"labels": [["a.png", 0]]}}, not a {type(meta).__name__}')
    class_names = meta.get("class_names")
    if class_names is not None:
        if not (isinstance(class_names, list) and all(isinstance(c, str) for c in class_names)):
            raise UserError(f"{where}: class_names must be a list of strings")
        class_names = [printable(name) for name in class_names]
    entries = meta.get("labels")
    if isinstance(entries, dict):
        entries = list(entries.items())
    if not entries:
        return None, class_names
    if not isinstance(entries, list):
        raise UserError(f"{where}: labels must be null or a list of [file name, class number] pairs")
    if (table := _plain(entries, files)) is not None:
        return table, class_names
    table = {}
    for entry in entries:
        if not (isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)):
            raise UserError(f"{where}: {entry!r} is not a [file name, class number] pair")
        name, label = entry
        if isinstance(label, bool) or not isinstance(label, int) or label < 0:
            raise UserError(f"{where}: the label of '{name}' is {label!r}; labels are class numbers 0, 1, 2, ...")
        table[safe_name(name, where)] = label
    return table, class_names


def _plain(entries: list[Any], files: FileTree) -> dict[str, int] | None:
    """The labels where all are as they should be, which of a million is found out faster together than singly."""
    try:
        table = dict(entries)
    except (TypeError, ValueError):
        return None
    kinds = {*map(type, table)}, {*map(type, table.values())}
    if kinds != ({str}, {int}) or min(table.values()) < 0:
        return None
    return table if [*table] == files.images or table.keys() <= {*files.names} else None


def count_classes(labels: Collection[int], class_names: Sequence[str] | None) -> int:
    """The largest label + 1, or the number of names where that is larger."""
    return max(max(labels) + 1, len(class_names or ()))


def require_classes(path: Path, num_classes: int, num_images: int, class_names: Sequence[str] | None) -> None:
    """UserError for labels such as 2,000,000,000: a model has a row of weights for every class below the largest."""
    most = max(1000, 100 * num_images, len(class_names or ()))
    if num_classes > min(most, MAX_CLASSES):
        raise UserError(
            f"{path}: its labels go up to {num_classes - 1}, too far for {num_images} images: "
            f"`{convert_command(path, '--cond')}` numbers the classes 0, 1, 2, ..."
        )
