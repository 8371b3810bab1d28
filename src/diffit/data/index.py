"""The images of an archive as arrays, in its order: a million of them without a million objects.

An index is kept in a file, which processes map into memory and so share. The file is only what could be found again:
one that is damaged, of another version, or of an archive that has changed since is made again.
"""

import gc
import hashlib
import json
import os
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open

from diffit.data.files import FileTree, read_file, reading, require_images, shards_in
from diffit.data.formats import IMAGE_SUFFIXES
from diffit.data.labels import META, read_labels
from diffit.data.names import natural_key
from diffit.data.remote import DESCRIBING, Mirror, mirror_of
from diffit.data.sums import SUMS
from diffit.data.zips import LARGE, OTHER, Member, read_member
from diffit.errors import UserError, printable
from diffit.utils.files import cache_folder, whole_file
from diffit.weights.file import save_tensors
from diffit.weights.header import SUM_KEY, seal, verify

VERSION = 1
ABOUT = "diffit_index"  # the key in the file's header
KEPT_FROM = LARGE  # images: to list fewer takes a fraction of a second
PATIENCE = 120.0  # seconds to wait for another process that makes an index
RACE = 2 * 10**9  # nanoseconds in which what has just changed may change once more under the same time
TAIL = 1 << 16  # bytes at the end of a file that are looked at: a zip's directory is there

Array = npt.NDArray[Any]


class Index:
    """Names, places, sizes, CRC-32s and labels of an archive's images. Safe to fork; a pickle of it is a path.

    Attributes:
        path: of the archive.
        zips: that hold the images; none for a folder.
        labels: int64 (N,), −1 where an image has none; None without ``dataset.json`` or labels in it.
        top: the largest label.
        class_names: of ``dataset.json``.
    """

    def __init__(
        self,
        path: Path,
        arrays: dict[str, Array],
        about: dict[str, Any],
        *,
        file: Path | None = None,
        mirror: Mirror | None = None,
    ) -> None:
        self.path, self.arrays, self.about, self.file, self.mirror = path, arrays, about, file, mirror
        self.zips = [path / name for name in about["zips"]]
        self.labels = arrays.get("label")
        self.top: int = about["top"]
        self.class_names: list[str] | None = about["class_names"]
        self._files: dict[int, BinaryIO] = {}
        self._tree: FileTree | None = None

    def __len__(self) -> int:
        return len(self.arrays["name_end"]) - 1

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.path, self.file, self.mirror, None if self.file else (self.arrays, self.about))

    def __del__(self) -> None:
        for file in getattr(self, "_files", {}).values():
            file.close()

    def names(self, rows: Sequence[int] | Array) -> list[str]:
        """Of these images, relative to the archive."""
        chosen, ends, text = np.asarray(rows, np.int64), self.arrays["name_end"], self.arrays["name"].data
        spans = zip(ends[chosen].tolist(), ends[chosen + 1].tolist(), strict=True)
        return [str(text[begin:end], "utf-8", "surrogatepass") for begin, end in spans]

    @property
    def has_sums(self) -> bool:
        """Whether the CRC-32s are known without reading the images."""
        return "crc" in self.arrays

    def name(self, row: int) -> str:
        return self.names([row])[0]

    def checksums(self, rows: Sequence[int]) -> Iterator[tuple[int, int | None]]:
        """(size, CRC-32) of these images as a zip's directory or ``dataset.sfv`` has them; None where neither does."""
        for part in _chunks(rows):
            if self.has_sums:
                yield from zip(*(self.arrays[key][part].tolist() for key in ("size", "crc")), strict=True)
            else:
                for name in self.names(part):
                    with reading(self.path, name):
                        size = os.stat(self._on_disk(name)).st_size
                    yield size, None

    def digest(self, rows: Sequence[int], sums: Iterable[tuple[int, int | None]], labels: Array | None) -> str:
        """SHA-256 over a line of JSON for each of these images: its name, its size and CRC-32, its label."""
        total, sums, quote, at = hashlib.sha256(), iter(sums), json.JSONEncoder().encode, 0
        for part in _chunks(rows):
            given = ["null"] * len(part) if labels is None else labels[at : at + len(part)].tolist()
            at += len(part)
            lines = [
                f"[{quote(name)}, [{size}, {'null' if crc is None else crc}], {label}]\n"
                for name, label, (size, crc) in zip(self.names(part), given, sums)  # noqa: B905 (the sums are of all)
            ]
            total.update("".join(lines).encode())
        return total.hexdigest()

    def read(self, row: int) -> bytes:
        """The encoded image. Raises BrokenImageError, naming it, for one that is damaged or too large."""
        name, zipped = self.name(row), self.zips
        where = zipped[self._part(row)] if zipped else self.path
        with reading(where, name):
            if zipped:
                return self._member(row, name)
            return read_file(self._on_disk(name), int(self.arrays["crc"][row]) if self.has_sums else None)

    def _on_disk(self, name: str) -> Path:
        stored: str = self.about["stored"].get(name, name)
        return self.path / stored

    def _part(self, row: int) -> int:
        return int(self.arrays["part"][row]) if len(self.zips) > 1 else 0

    def _member(self, row: int, name: str) -> bytes:
        member = Member(*(int(self.arrays[key][row]) for key in Member._fields))
        if member.method != OTHER:
            return read_member(self._open(self._part(row)), member)
        self._tree = self._tree or FileTree(self.path, self.mirror)
        return self._tree.read(name)

    def _open(self, part: int) -> int:
        if part not in self._files:
            file = self.zips[part] if self.mirror is None else self.mirror.fetch(self.zips[part].name)
            # Of two threads that come here together, one's file is dropped.
            self._files.setdefault(part, open(file, "rb", buffering=0))  # noqa: SIM115 (closed with the index)
        return self._files[part].fileno()


def _chunks(rows: Sequence[int]) -> Iterator[Array]:
    """A million numbers of Python's take as much memory as all the rest."""
    for start in range(0, len(rows), 1 << 14):
        yield np.asarray(rows[start : start + (1 << 14)], np.int64)


def open_index(path: str | Path) -> Index:
    """The index of the archive ``path``, from its file where there is one that holds.

    Raises UserError for whatever :class:`FileTree` and :func:`read_labels` refuse, and for files that are not those
    that ``dataset.sfv`` lists.
    """
    mirror = mirror_of(path)
    path = Path(path) if mirror is None else mirror.path
    places = _places(path, mirror)
    if (kept := _first(places, path, mirror)) is not None:
        return kept
    with _alone():
        if (kept := _first(places, path, mirror)) is not None:  # another process has made it meanwhile
            return kept
        began = time.time_ns()
        with _uncollected():
            index = _build(FileTree(path, mirror))
        changing = mirror is None and any(stamp[1] > began - RACE for stamp in index.about["stamps"])
        for file in [] if len(index) < KEPT_FROM or changing else places:
            with suppress(UserError, OSError):
                _store(index, file)
                return _load(file, path, mirror, check=False) or index
    return index


def _places(path: Path, mirror: Mirror | None) -> list[Path]:
    """Where the index may be: next to zips, or in the user's cache.

    That of a folder is in the cache only: the names in it are opened as paths, and who hands on a folder could put any
    into it.
    """
    path = path.resolve()
    own = cache_folder() / "index" / f"{path.stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:16]}.safetensors"
    return [path.with_name(f".{path.name}.index"), own] if _zips(path, mirror) else [own]


def _zips(path: Path, mirror: Mirror | None) -> list[str]:
    """The zips of an archive, from ``path``."""
    if not path.is_dir():
        return ["."]
    if mirror is not None:
        return sorted(mirror.names.difference(DESCRIBING), key=natural_key)
    with suppress(OSError):
        return shards_in(path)
    return []


def _first(places: Iterable[Path], path: Path, mirror: Mirror | None) -> Index | None:
    return next((found for file in places if (found := _load(file, path, mirror)) is not None), None)


@contextmanager
def _alone() -> Iterator[None]:
    """Processes that start together need not all list the archive. Where no lock can be had, they do."""
    file = cache_folder() / "index.lock"
    lock = FileLock(file, timeout=PATIENCE)
    held = False
    with suppress(OSError, Timeout, NotImplementedError):
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        held = True
    try:
        yield
    finally:
        if held:
            lock.release()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the search for cycles, which millions of new objects set off again and again, and which have none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _build(tree: FileTree) -> Index:
    names = require_images(tree)
    for problem in tree.altered(META):
        raise UserError(problem)
    stamps = _stamps(tree.path, _watched(tree)) if tree.mirror is None else _entries(tree.mirror)
    table, class_names = read_labels(tree)
    encoded = [name.encode("utf-8", "surrogatepass") for name in names]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
    arrays: dict[str, Array] = {"name": np.frombuffer(bytearray().join(encoded), np.uint8), "name_end": ends}
    top = -1
    if table is not None:
        labels = [table.get(name, -1) for name in names]
        top = max(labels)
        if top > 2**62:  # refused where it is used
            labels = [min(label, 2**62) for label in labels]
        arrays["label"] = np.array(labels, np.int64)
    if tree.is_zip:
        arrays["part"], fields = tree.image_members
        arrays |= {key: fields[:, i].copy() for i, key in enumerate(Member._fields)}
    elif tree.sums is not None:
        sums = [tree.checksum(name) for name in names]
        arrays["size"], arrays["crc"] = np.array(sums, np.int64).T.copy()
    stored = {} if tree.is_zip else {name: old for name in names if (old := tree.stored_name(name)) != name}
    about = {
        "version": VERSION, "suffixes": IMAGE_SUFFIXES, "stamps": stamps, "top": top, "class_names": class_names,
        "zips": [os.path.relpath(file, tree.path) for file in tree.zips], "stored": stored,
    }  # fmt: skip
    return Index(tree.path, arrays, about, mirror=tree.mirror)


def _watched(tree: FileTree) -> list[Path]:
    """Files and folders of which one changes whenever the archive does, but for the content of a folder's images."""
    listed = [tree.path / name for name in (META, SUMS) if name in tree.names and tree.member(name) is None]
    return [*tree.zips, *tree.folders, *listed]


def _stamps(root: Path, paths: Iterable[Path]) -> list[list[Any]]:
    """[path, time of the last change in ns, size, CRC-32 of the end] of each; None for size and sum of a folder."""
    found: list[list[Any]] = []
    for path in paths:
        stat, size, crc = os.stat(path), None, None
        if not os.path.isdir(path):
            size = stat.st_size
            with open(path, "rb") as file:
                file.seek(max(size - TAIL, 0))
                crc = zlib.crc32(file.read(TAIL))
        found.append([os.path.relpath(path, root), stat.st_mtime_ns, size, crc])
    return found


def _entries(mirror: Mirror) -> list[list[Any]]:
    """The same of an archive behind a URL."""
    return [[name, version, size, None] for name, size, version in mirror.entries]


def _store(index: Index, file: Path) -> None:
    with whole_file(file) as part:
        tensors = {key: torch.from_numpy(array) for key, array in index.arrays.items()}
        save_tensors(tensors, part, {ABOUT: json.dumps(index.about), SUM_KEY: "0" * 64})
        seal(part)


def _load(file: Path, path: Path, mirror: Mirror | None, *, check: bool = True) -> Index | None:
    """What :func:`_store` wrote; None for a file that is not there, not whole, or not of the archive as it is now."""
    try:
        if not file.is_file() or (check and not verify(file)):
            return None
        with safe_open(file, framework="pt") as tensors:
            about = json.loads(tensors.metadata()[ABOUT])
            zips, suffixes, named = _zips(path, mirror), list(IMAGE_SUFFIXES), [stamp[0] for stamp in about["stamps"]]
            if zips and not {*named} <= {".", META, SUMS, *zips}:  # next to zips lies what anyone has put there
                return None
            stamps = _stamps(path, [path / name for name in named]) if mirror is None else _entries(mirror)
            now = {"version": VERSION, "suffixes": suffixes, "zips": zips, "stamps": stamps}
            if any(about[key] != value for key, value in now.items()):
                return None
            arrays = {key: tensors.get_tensor(key).numpy() for key in tensors.keys()}  # noqa: SIM118
        about["class_names"] = about["class_names"] and [printable(name) for name in about["class_names"]]
        index = Index(path, arrays, about, file=file, mirror=mirror)
        return index if _is_coherent(index) else None
    except (UserError, SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _is_coherent(index: Index) -> bool:
    """Whether a file by someone else, whole and with its sum, could be of ours."""
    arrays, count = index.arrays, len(index)
    rows = [array for key, array in arrays.items() if key not in ("name", "name_end")]
    ends, labels = arrays["name_end"], index.labels
    return bool(
        count > 0
        and all(array.shape == (count,) for array in rows)
        and (ends[0], ends[-1]) == (0, len(arrays["name"]))
        and (ends[1:] >= ends[:-1]).all()
        and ("size" not in arrays or arrays["size"].min() >= 0)
        and (not index.zips or {"offset", "packed", "size", "crc", "method"} <= arrays.keys())
        and (not index.zips or 0 <= arrays["part"].min() <= arrays["part"].max() < len(index.zips))
        and (labels is None or (labels.min() >= -1 and labels.max() == index.top))
    )


def _reopen(path: Path, file: Path | None, mirror: Mirror | None, content: Any) -> Index:
    if file is None:
        return Index(path, *content, mirror=mirror)
    index = _load(file, path, mirror, check=False)
    if index is None:
        raise UserError(f"{path}: changed since it was opened, or its index {file} was removed; start again")
    return index
