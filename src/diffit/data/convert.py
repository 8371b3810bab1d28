"""Raw images in, an image archive out: upright 8-bit gray or RGB PNGs of one size, with labels."""

import json
import os
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Self, TypedDict, Unpack
from zlib import crc32

from diffit.data.files import BrokenImageError, map_ordered, subset
from diffit.data.labels import META
from diffit.data.names import name_some
from diffit.data.pixels import WHITE, Color, color
from diffit.data.png import Look, PngEncoder, value_range_of
from diffit.data.sources import CLASS_ORDERS, Source, open_source
from diffit.data.sums import SUMS, format_sums
from diffit.data.transforms import resizer
from diffit.errors import UserError
from diffit.utils.files import sweep, whole_file, whole_folder

MIN_SHARD = 1024  # bytes
OURS = re.compile(r"\d{5,}(-of-\d{5,}\.zip)?")  # folders and zips of an archive folder
CHOICES = {
    "channels": ("auto", "gray", "rgb"),
    "frames": ("first", "all"),
    "class_order": CLASS_ORDERS,
    "on_error": ("stop", "skip"),
}


class ConvertOptions(TypedDict, total=False):
    """The options of :func:`convert`; :class:`Settings` says what they mean."""

    resolution: tuple[int, int] | None
    transform: str | None
    channels: str
    value_range: str | tuple[float, float]
    background: str | Color
    frames: str
    class_order: str
    max_images: int | None
    seed: int
    on_error: str
    cond: bool
    overwrite: bool
    shard_size: int | None


@dataclass(frozen=True)
class Settings:
    """What :func:`convert` is asked to do. UserError for a choice that is not known."""

    resolution: tuple[int, int] | None = None
    """(width, height) in pixels; None keeps the images' own size, which must then be one and the same."""
    transform: str | None = None
    """How an image gets to ``resolution``: one of ``TRANSFORMS``, or None for a plain Lanczos resize."""
    channels: str = "auto"
    """``gray``, ``rgb``, or ``auto``: gray if every image is stored without colour, otherwise RGB."""
    value_range: str | tuple[float, float] = "auto"
    """Black and white of images with more than 8 bits: (low, high); ``full`` for 0 to 65535; or ``auto``: the fewest of
    8, 10, 12, 14 and 16 bits that hold the values of all of them."""
    background: str | Color = WHITE
    """What transparent images are laid on: ``white``, ``black``, ``#RRGGBB`` or ``R,G,B``."""
    frames: str = "first"
    """Of animations and files of several pages: ``first``, or ``all`` as images of their own."""
    class_order: str = "natural"
    """How class folders are numbered: ``natural`` (2 before 10) or ``plain`` (by character, as EDM's tool does)."""
    max_images: int | None = None
    """Convert a seeded random subset of this many, in the source's order."""
    seed: int = 0
    on_error: str = "stop"
    """At a broken image ``stop`` with a UserError, or ``skip`` it and list it in the report."""
    cond: bool = False
    """Require a label for every image. Without it labels are kept if every image has one."""
    overwrite: bool = False
    """Replace ``dest`` if it is a zip or an archive folder."""
    shard_size: int | None = None
    """Write a folder of zips of at most so many bytes each, but for those of one larger image."""

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise UserError(f"{name} {value!r} is not known: use one of {', '.join(known)}")
        if self.shard_size is not None and self.shard_size < MIN_SHARD:
            raise UserError(f"shard_size is {self.shard_size} bytes: use {MIN_SHARD} or more, such as 4GiB")


@dataclass
class ConvertReport:
    """What a conversion did."""

    kind: str  # what the source was recognised as
    dest: Path
    found: int  # images in the source
    ignored: list[str]  # files of the source that are not images
    notes: list[str]  # what a person should know of it, one line each
    written: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of broken images left out
    image_shape: tuple[int, int, int] = (0, 0, 0)  # (C, H, W)
    labelled: bool = False
    class_names: list[str] | None = None
    num_classes: int = 0


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 0,
    **options: Unpack[ConvertOptions],
) -> ConvertReport:
    """Convert ``source`` into the archive ``dest``: an uncompressed zip if it ends in ``.zip``, otherwise a folder.

    With ``shard_size`` it is a folder of zips, which is read, image by image, as the one zip would be.

    The same arguments give the same bytes, with any number of ``workers`` (threads; 0: one a CPU core). The archive
    appears whole under its name or not at all. ``progress`` is called with (images done, images in all).
    :class:`Settings` describes the options.

    Raises UserError for anything wrong with the arguments, the source or the disk.
    """
    settings = Settings(**options)
    source, dest = Path(source), Path(dest)
    look = Look(
        resizer(settings.resolution, settings.transform),
        settings.resolution is not None and settings.transform is None,
        settings.channels,
        value_range_of(settings.value_range),
        color(settings.background),
    )
    _check_dest(source, dest, settings)
    sweep(Path(os.path.abspath(dest)).parent)  # of what killed conversions have left
    raw = open_source(source, cond=settings.cond, class_order=settings.class_order)
    if settings.frames == "all":
        raw = raw.with_all_frames()
    if settings.cond:
        _require_labels(source, raw)
    indices = subset(len(raw.names), settings.max_images, settings.seed)
    encoder = PngEncoder(raw, indices, look, workers)
    report = ConvertReport(raw.kind, dest, len(raw.names), raw.ignored, list(raw.notes))
    labels: list[tuple[str, int | None]] = []
    done, sums = Counter[str](), dict[str, int]()

    with _writing(dest, settings.shard_size) as write:
        for index, image in zip(indices, map_ordered(encoder, indices, workers), strict=True):
            name = raw.names[index]
            if isinstance(image, BrokenImageError):
                if settings.on_error == "stop":
                    raise UserError(f"{image}: repair or remove it, or leave such images out with --on-error skip")
                report.skipped.append((name, str(image)))
            else:
                if not labels:
                    report.image_shape, first = image.shape, name
                elif image.shape != report.image_shape:
                    raise UserError(f"{source}: {_differ(name, image.shape, first, report.image_shape)}")
                stored = f"{len(labels) // 1000:05d}/img{len(labels):08d}.png"
                write(stored, image.png)
                sums[stored] = crc32(image.png)
                labels.append((stored, raw.labels[index]))
                done.update(image.done)
            if progress is not None:
                progress(len(labels) + len(report.skipped), len(indices))
        if not labels:
            raise UserError(f"{source}: none of {len(indices)} images can be read, the first: {report.skipped[0][1]}")
        report.written = len(labels)
        report.notes += encoder.notes(done)
        meta = json.dumps(_metadata(labels, raw, report), ensure_ascii=False).encode("utf-8", "replace")
        write(META, meta)
        write(SUMS, format_sums((sums | {META: crc32(meta)}).items()))
    return report


def _differ(name: str, shape: tuple[int, int, int], first: str, expected: tuple[int, int, int]) -> str:
    one, other = f"{shape[2]}x{shape[1]}", f"{expected[2]}x{expected[1]}"
    return (
        f"'{name}' is {one} but '{first}' is {other}: pass --resolution WxH to make them equal "
        "(--transform center-crop keeps proportions)"
    )


def _metadata(labels: list[tuple[str, int | None]], raw: Source, report: ConvertReport) -> dict[str, object]:
    """The content of ``dataset.json``. Classes are those of the whole source, numbered from 0 without gaps."""
    known = {label for label in raw.labels if label is not None}
    if raw.unlabelled:
        return {"labels": None}
    used = sorted(known)
    number = {label: i for i, label in enumerate(used)}
    given = raw.class_names
    names = None if given is None else [given[label] if label < len(given) else str(label) for label in used]
    if used[-1] >= len(used):
        names = names or [str(label) for label in used]
        report.notes.append(
            f"the labels {name_some([str(label) for label in used])} are numbered 0 to {len(used) - 1} in this order, "
            "and class_names keeps the originals"
        )
    if given is not None and (empty := [name for i, name in enumerate(given) if i not in number]):
        report.notes.append(f"{len(empty)} classes without images are left out ({name_some(empty)})")
    kept = {label for _, label in labels}
    if lost := [names[number[label]] if names else str(label) for label in used if label not in kept]:
        report.notes.append(f"{len(lost)} of {len(used)} classes keep no image ({name_some(lost)})")
    report.labelled, report.class_names, report.num_classes = True, names, len(used)
    meta: dict[str, object] = {"labels": [(name, number[label]) for name, label in labels if label is not None]}
    return meta if names is None else meta | {"class_names": names}


def _require_labels(source: Path, raw: Source) -> None:
    if len(raw.unlabelled) == len(raw.names):
        raise UserError(
            f"{source} ({raw.kind}) has no labels: drop --cond, or put the images of each class into their own folder"
        )
    if raw.unlabelled:
        raise UserError(
            f"{source}: {len(raw.unlabelled)} of {len(raw.names)} images have no label ({name_some(raw.unlabelled)}): "
            f"put them into class folders or {META}, or drop --cond"
        )


def _check_dest(source: Path, dest: Path, settings: Settings) -> None:
    inner, outer = source.resolve(), dest.resolve()
    if inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"{dest} and the source {source} lie in one another: choose a --dest elsewhere")
    is_zip = dest.suffix.lower() == ".zip"
    if is_zip and settings.shard_size is not None:
        raise UserError(f"{dest} is one zip, and --shard-size writes several: use a folder as --dest")
    if not dest.exists() or (not is_zip and dest.is_dir() and not any(dest.iterdir())):
        return
    if is_zip != dest.is_file() or (not is_zip and not _is_archive_folder(dest)):
        raise UserError(f"{dest} exists and is not an image archive, so it is never replaced: choose another --dest")
    if not settings.overwrite:
        raise UserError(f"{dest} exists: choose another --dest, or replace it with --overwrite")


def _is_archive_folder(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    return META in names and all(OURS.fullmatch(name) for name in names - {META, SUMS})


@contextmanager
def _writing(dest: Path, shard_size: int | None) -> Iterator[Callable[[str, bytes], None]]:
    """Yields ``write(name, data)``; what it wrote takes the name ``dest`` at the end, and vanishes on any exception."""
    try:
        if dest.suffix.lower() == ".zip":
            with whole_file(dest) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
                yield lambda name, data: archive.writestr(_zip_entry(name), data)
        else:
            with whole_folder(dest) as folder:
                if shard_size is None:
                    yield partial(_write_file, folder)
                else:
                    with _Shards(folder, shard_size) as shards:
                        yield shards.write
    except OSError as error:
        raise UserError(f"{dest} cannot be written ({error.strerror or error}): choose another --dest") from error


class _Shards:
    """Zips of limited size in a folder, and next to them what describes all of them."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self.size = folder, limit, 0
        self.zips: list[zipfile.ZipFile] = []

    def __enter__(self) -> Self:
        return self

    def write(self, name: str, data: bytes) -> None:
        if name in (META, SUMS):
            (self.folder / name).write_bytes(data)
            return
        size = len(data) + 2 * len(name) + 76 + 22  # with its two headers, and the end of the zip
        if not self.zips or self.size + size > self.limit:
            self._close()
            self.zips.append(zipfile.ZipFile(self.folder / f"{len(self.zips)}.part", "w", zipfile.ZIP_STORED))
            self.size = 0
        self.zips[-1].writestr(_zip_entry(name), data)
        self.size += size - 22

    def _close(self) -> None:
        if self.zips:
            self.zips[-1].close()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._close()
        if kind is None:  # only now is their number known, by which one that gets lost is missed
            for i in range(len(self.zips)):
                (self.folder / f"{i}.part").rename(self.folder / f"{i:05d}-of-{len(self.zips):05d}.zip")


def _zip_entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # dated 1980: the same images give the same bytes
    entry.create_system, entry.external_attr = 3, 0o644 << 16  # on every system
    return entry


def _write_file(folder: Path, name: str, data: bytes) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
