"""Parquet tables of images as the Hugging Face Hub keeps them: a column of ``{bytes, path}``, the class next to it.

What the columns are is noted down by `datasets` in the tables' own metadata, else told from their types and names.
"""

import json
import re
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

from diffit.data.bounds import require_bytes
from diffit.data.files import BrokenImageError, reading
from diffit.data.formats import IMAGE_SUFFIXES
from diffit.data.names import name_some, natural_key
from diffit.errors import UserError, install_hint

SPLIT = re.compile(r"(.+?)-\d{5}-of-\d{5}.*\.parquet")
LABELS = ("label", "labels", "fine_label", "class", "cls", "target")
MAX_GROUP_BYTES = 4 << 30  # of the images in a row group, which are read together; the Hub's have 0.1 GiB
GROUPS_KEPT = 2  # threads that work through the rows may be on both sides of a border


def tables_in(folder: Path) -> tuple[list[Path], list[str]]:
    """(tables, notes) of a folder that holds no images: those of the split ``train`` where there are several splits.

    Of a downloaded repository they lie in the folder ``data``.
    """
    items = [item for item in folder.iterdir() if not item.name.startswith(".")]
    if not any(item.is_file() and item.suffix == ".parquet" for item in items) and (folder / "data").is_dir():
        inner = [] if any(item.name.lower().endswith(IMAGE_SUFFIXES) for item in items) else [folder / "data"]
        return next(map(tables_in, inner), ([], []))
    found = [item for item in items if item.suffix == ".parquet" and item.is_file()]
    if not found or any(item.name.lower().endswith(IMAGE_SUFFIXES) for item in items):
        return [], []
    found.sort(key=lambda item: natural_key(item.name))
    splits = {match[1]: None for item in found if (match := SPLIT.fullmatch(item.name))}
    if len(splits) < 2:
        return found, []
    chosen = "train" if "train" in splits else next(iter(splits))
    kept = [item for item in found if (match := SPLIT.fullmatch(item.name)) and match[1] == chosen]
    others = [name for name in splits if name != chosen]
    where = "put the tables of another into a folder of their own"
    return kept, [f"the tables of the split {chosen} are read, not of {name_some(others)}: {where}"]


class Tables:
    """The images of some tables, table by table and row by row.

    Raises UserError for tables that are damaged or hold no images. Safe to use from several threads.

    Attributes:
        labels: of each image; None where it has none (-1 too, as in test splits of the Hub).
        class_names: where the metadata has them.
        notes: what a person should know of the choice of columns.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(f"{paths[0]} is a Parquet table and needs pyarrow: {install_hint('data')}") from error
        self._failures = (pyarrow.ArrowException, OSError)
        self._groups: list[tuple[int, int]] = []  # (table, row group) of each group, and where its rows begin
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()
        self.paths, self.labels, self.class_names = list(paths), list[int | None](), None
        self.names: list[str] = []
        self._files, sizes, chosen = [], [0], set()
        for table, path in enumerate(paths):
            with _told(path, self._failures):
                file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
                if file.metadata.num_rows > path.stat().st_size:  # an image takes a byte at least
                    raise UserError(f"{path} claims {file.metadata.num_rows} rows, more than it has bytes")
                schema, features = file.schema_arrow, _features(file.schema_arrow)
                image, label, names = _columns(path, schema, features)
                if label is not None:
                    column = file.read(columns=[label]).column(0).to_pylist()
                else:
                    column = [None] * file.metadata.num_rows
            self._files.append((file, image))
            chosen.add((image, label))
            self.class_names = names if table == 0 else self.class_names
            self.labels += [_label(value, path, label or "") for value in column]
            self.names += [f"{path.stem}[{row}]" for row in range(len(column))]
            for group in range(file.num_row_groups):
                self._groups.append((table, group))
                sizes.append(file.metadata.row_group(group).num_rows)
        self._begins = list(accumulate(sizes))
        if not self.names:
            raise UserError(f"{paths[0]} is a Parquet table without rows")
        if len(chosen) > 1:
            raise UserError(f"{paths[0]} and the tables next to it have other columns; convert them one by one")
        image, label = chosen.pop()
        self.notes = _notes(image, label, features)
        if label is not None and (without := self.labels.count(None)):
            self.notes.append(f"{without} of {len(self.labels)} images have no class in the column '{label}'")

    def read(self, row: int) -> bytes:
        """An image's bytes. Raises BrokenImageError, naming it, for one that is damaged, missing or too large."""
        at = bisect_right(self._begins, row) - 1
        path = self.paths[self._groups[at][0]]
        with self._lock, _told(path, self._failures):
            value = self._group(at)[row - self._begins[at]]
            found = value["bytes"] if value.is_valid and isinstance(value, Mapping) else value
            data = found.as_buffer() if found.is_valid else None
        if data is None:
            raise BrokenImageError(
                f"{path}: '{self.names[row]}' has no bytes in the table, at most a path to elsewhere"
            )
        with reading(path, self.names[row]):
            require_bytes(data.size)
        return bytes(data)

    def _group(self, at: int) -> Any:
        """The images of one row group, as an array of pyarrow's."""
        if at not in self._kept:
            table, group = self._groups[at]
            file, image = self._files[table]
            meta = file.metadata.row_group(group)
            claimed = sum(
                meta.column(i).total_uncompressed_size
                for i in range(meta.num_columns)
                if meta.column(i).path_in_schema.split(".")[0] == image
            )
            if claimed > MAX_GROUP_BYTES:
                raise UserError(
                    f"{self.paths[table]}: {claimed / 2**30:.1f} GiB of images in one row group, more than the "
                    f"{MAX_GROUP_BYTES / 2**30:.1f} that are read at a time; write it again with smaller row groups"
                )
            while len(self._kept) >= GROUPS_KEPT:
                self._kept.popitem(last=False)
            self._kept[at] = file.read_row_group(group, columns=[image]).column(0)
        self._kept.move_to_end(at)
        return self._kept[at]


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` has noted down of the columns; nothing where it has not."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (ValueError, LookupError, TypeError):
        return {}
    items = found.items() if isinstance(found, dict) else ()
    return {name: feature for name, feature in items if isinstance(feature, dict)}


def _columns(path: Path, schema: Any, features: dict[str, Any]) -> tuple[str, str | None, list[str] | None]:
    """(column of images, column of classes, names of the classes)."""
    import pyarrow.types as kinds

    def holds_bytes(kind: Any) -> bool:
        return bool(kinds.is_binary(kind) or kinds.is_large_binary(kind))

    def of_images(field: Any) -> bool:
        if kinds.is_struct(field.type):
            return any(inner.name == "bytes" and holds_bytes(inner.type) for inner in field.type)
        return holds_bytes(field.type)

    images = [field.name for field in schema if of_images(field)]
    images.sort(key=lambda name: features.get(name, {}).get("_type") != "Image")
    if not images:
        raise UserError(f"{path} has no column of images: found {name_some(schema.names) or 'nothing'}")
    numbers = [field.name for field in schema if kinds.is_integer(field.type)]
    classes = [name for name in numbers if features.get(name, {}).get("_type") == "ClassLabel" or name in LABELS]
    classes.sort(key=lambda name: LABELS.index(name) if name in LABELS else len(LABELS))
    label = classes[0] if classes else None
    names = features.get(label or "", {}).get("names")
    given = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return images[0], label, names if given else None


def _notes(image: str, label: str | None, features: dict[str, Any]) -> list[str]:
    others = [name for name, feature in features.items() if feature.get("_type") == "Image" and name != image]
    classes = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel" and name != label]
    notes = [f"images are those of the column '{image}', not of {name_some(others)}"] if others else []
    return notes + ([f"classes are those of the column '{label}', not of {name_some(classes)}"] if classes else [])


def _label(value: Any, path: Path, column: str) -> int | None:
    if value is None or value == -1:
        return None
    if value < 0:
        raise UserError(f"{path}: {column} {value} is no class number")
    return int(value)


@contextmanager
def _told(path: Path, failures: tuple[type[Exception], ...]) -> Iterator[None]:
    """Errors of pyarrow in one line."""
    try:
        yield
    except failures as error:
        text = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise UserError(f"{path} cannot be read as a Parquet table ({text}): it is damaged, copy it again") from error
