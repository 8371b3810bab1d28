"""Raw images in, an image archive out: upright 8-bit gray or RGB PNGs of one size, with labels."""

import io
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from diffit.data.archive import META, orientation
from diffit.data.files import BrokenImageError, map_ordered, name_some, subset
from diffit.data.sources import Source, open_source
from diffit.errors import UserError
from diffit.utils.files import whole_file, whole_folder

TRANSFORMS = ("center-crop", "center-crop-wide", "center-crop-dhariwal")
GRAY_MODES = frozenset({"1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"})
TURNS = {  # EXIF orientation -> what makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass
class ConvertReport:
    """What a conversion did."""

    kind: str  # what the source was recognised as
    dest: Path
    found: int  # images in the source
    ignored: list[str]  # files of the source that are not images
    written: int = 0
    skipped: list[tuple[str, str]] = field(default_factory=list)  # (name, reason) of broken images left out
    image_shape: tuple[int, int, int] = (0, 0, 0)  # (C, H, W)
    labelled: bool = False
    unlabelled: list[str] = field(default_factory=list)  # names without a label where others have one
    class_names: list[str] | None = None
    num_classes: int = 0


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    resolution: tuple[int, int] | None = None,
    transform: str | None = None,
    channels: str = "auto",
    max_images: int | None = None,
    seed: int = 0,
    on_error: str = "stop",
    cond: bool = False,
    overwrite: bool = False,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Convert ``source`` into the archive ``dest``: an uncompressed zip if it ends in ``.zip``, otherwise a folder.

    The same arguments give the same bytes. The archive appears whole under its name or not at all.

    Args:
        resolution: (width, height) in pixels; None keeps the images' own size, which must then be one and the same.
        transform: how an image gets to ``resolution``: one of ``TRANSFORMS``, or None for a plain Lanczos resize.
        channels: ``gray``, ``rgb``, or ``auto``: gray if every image is stored without colour, otherwise RGB.
        max_images: convert a seeded random subset of this many, in the source's order.
        on_error: at a broken image ``stop`` with a UserError, or ``skip`` it and list it in the report.
        cond: require a label for every image. Without it labels are kept if every image has one.
        overwrite: replace ``dest`` if it is a zip or an archive folder.
        progress: called with (images done, images in all).

    Raises UserError for anything wrong with the arguments, the source or the disk.
    """
    source, dest = Path(source), Path(dest)
    for name, value, known in (
        ("on_error", on_error, ("stop", "skip")),
        ("channels", channels, ("auto", "gray", "rgb")),
    ):
        if value not in known:
            raise UserError(f"{name} {value!r} is not known: use one of {', '.join(known)}")
    to_size = _resizer(resolution, transform)
    _check_dest(source, dest, overwrite)
    raw = open_source(source, cond=cond)
    if cond:
        _require_labels(source, raw)
    indices = subset(len(raw.names), max_images, seed)
    mode = _choose_mode(raw, indices, channels)
    report = ConvertReport(raw.kind, dest, len(raw.names), raw.ignored)
    labels: list[tuple[str, int | None]] = []

    with _writing(dest) as write:
        for index, result in zip(
            indices, map_ordered(partial(_encode, raw, mode, to_size), indices, workers), strict=True
        ):
            if isinstance(result, BrokenImageError):
                if on_error == "stop":
                    raise UserError(f"{result}: repair or remove it, or leave such images out with --on-error skip")
                report.skipped.append((raw.names[index], str(result)))
            else:
                png, (width, height) = result
                shape = (1 if mode == "L" else 3, height, width)
                if not labels:
                    report.image_shape, first = shape, raw.names[index]
                elif shape != report.image_shape:
                    raise UserError(
                        f"{source}: '{raw.names[index]}' is {width}x{height} but '{first}' is "
                        f"{report.image_shape[2]}x{report.image_shape[1]}: give --resolution WxH to make them equal"
                    )
                name = f"{len(labels) // 1000:05d}/img{len(labels):08d}.png"
                write(name, png)
                labels.append((name, raw.labels[index]))
            if progress is not None:
                progress(len(labels) + len(report.skipped), len(indices))
        if not labels:
            raise UserError(f"{source}: none of {len(indices)} images can be read, the first: {report.skipped[0][1]}")
        report.written = len(labels)
        _describe_labels(report, raw)
        meta: dict[str, object] = {"labels": labels if report.labelled else None}
        if report.labelled and report.class_names is not None:
            meta["class_names"] = report.class_names
        write(META, json.dumps(meta, ensure_ascii=False).encode())
    return report


def _describe_labels(report: ConvertReport, raw: Source) -> None:
    known = [label for label in raw.labels if label is not None]
    report.labelled = len(known) == len(raw.labels)
    report.unlabelled = raw.unlabelled if known else []
    if report.labelled:
        report.class_names = raw.class_names
        report.num_classes = max(max(known) + 1, len(raw.class_names or ()))


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


def _choose_mode(raw: Source, indices: list[int], channels: str) -> str:
    """Pillow mode of the archive. ``auto`` reads headers up to the first colour image: soon over, but for gray sets."""
    if channels != "auto":
        return {"gray": "L", "rgb": "RGB"}[channels]
    for index in indices:
        try:
            if raw.open(index, header_only=True).mode not in GRAY_MODES:
                return "RGB"
        except BrokenImageError:
            continue  # met again and reported when its turn comes
    return "L"


def _encode(
    raw: Source, mode: str, to_size: Callable[[Image.Image], Image.Image], index: int
) -> tuple[bytes, tuple[int, int]] | BrokenImageError:
    """The i-th image as (PNG bytes, (width, height)); the error itself if it is broken, so that threads go on."""
    try:
        image = to_size(to_eight_bit(raw.open(index), mode, raw.names[index]))
    except BrokenImageError as error:
        return error
    # Pixels only: comments, colour profiles and EXIF of the source must not end up in the archive.
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), image.size


def to_eight_bit(image: Image.Image, mode: str, name: str = "image") -> Image.Image:
    """Any decoded image as upright 8-bit ``mode``, ``L`` or ``RGB``; transparency is laid on white.

    16-bit gray is scaled from 0..65535 to 0..255. Colour profiles are not applied.
    Raises BrokenImageError for 32-bit and float images, whose white is not defined.
    """
    turn = TURNS.get(orientation(image))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # Pillow's own conversion to 8 bits clips instead of scaling.
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise BrokenImageError(f"'{name}' has 32-bit pixels without a defined white; save it with 8 or 16 bits")
    try:
        if "transparency" in image.info or image.mode in ("LA", "PA", "RGBA", "RGBa"):
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(mode)
    except ValueError as error:
        raise BrokenImageError(f"'{name}' has the colour mode {image.mode}, which cannot be converted") from error
    return image if turn is None else image.transpose(turn)


def _resizer(resolution: tuple[int, int] | None, transform: str | None) -> Callable[[Image.Image], Image.Image]:
    if transform is not None and transform not in TRANSFORMS:
        raise UserError(f"transform {transform!r} is not known: use one of {', '.join(TRANSFORMS)}")
    if resolution is None:
        if transform is not None:
            raise UserError(f"transform {transform} needs a resolution: add --resolution WxH")
        return lambda image: image
    width, height = resolution
    if width < 1 or height < 1:
        raise UserError(f"resolution {width}x{height} is not possible: give two numbers of pixels, 1 or more")
    if transform == "center-crop-dhariwal" and width != height:
        raise UserError(f"center-crop-dhariwal makes squares, not {width}x{height}: use center-crop or a square size")
    if transform == "center-crop-wide" and width < height:
        raise UserError(f"center-crop-wide makes wide images, not {width}x{height}: use center-crop or a wider size")
    functions = {"center-crop": center_crop, "center-crop-wide": center_crop_wide}
    if transform == "center-crop-dhariwal":
        return lambda image: center_crop_dhariwal(image, width)
    return partial(functions.get(transform or "", _resize), size=(width, height))


def _resize(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest centred part with the proportions of ``size`` (W, H), resized to it (Lanczos)."""
    scale = min(image.width / size[0], image.height / size[1])
    width, height = (max(1, round(side * scale)) for side in size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return _resize(image.crop((left, top, left + width, top + height)), size)


def center_crop_wide(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """:func:`center_crop` to (W, H), then black bars above and below to W x W."""
    canvas = Image.new(image.mode, (size[0], size[0]))
    canvas.paste(center_crop(image, size), (0, (size[0] - size[1]) // 2))
    return canvas


def center_crop_dhariwal(image: Image.Image, size: int) -> Image.Image:
    """ADM's preprocessing (Dhariwal & Nichol 2021): halve by box filter while twice too large, bicubic, crop."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def _check_dest(source: Path, dest: Path, overwrite: bool) -> None:
    inner, outer = source.resolve(), dest.resolve()
    if inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"{dest} and the source {source} lie in one another: choose a --dest elsewhere")
    is_zip = dest.suffix.lower() == ".zip"
    if not dest.exists() or (not is_zip and dest.is_dir() and not any(dest.iterdir())):
        return
    if is_zip != dest.is_file() or (not is_zip and not _is_archive_folder(dest)):
        raise UserError(f"{dest} exists and is not an image archive, so it is never replaced: choose another --dest")
    if not overwrite:
        raise UserError(f"{dest} exists: choose another --dest, or replace it with --overwrite")


def _is_archive_folder(folder: Path) -> bool:
    names = {entry.name for entry in folder.iterdir()}
    return META in names and all(re.fullmatch(r"\d{5,}", name) for name in names - {META})


@contextmanager
def _writing(dest: Path) -> Iterator[Callable[[str, bytes], None]]:
    """Gives ``write(name, data)``; what it wrote takes the name ``dest`` at the end, and vanishes on any exception."""
    try:
        if dest.suffix.lower() == ".zip":
            with whole_file(dest) as part, zipfile.ZipFile(part, "w", zipfile.ZIP_STORED) as archive:
                yield lambda name, data: archive.writestr(_zip_entry(name), data)
        else:
            with whole_folder(dest) as folder:
                yield partial(_write_file, folder)
    except OSError as error:
        raise UserError(f"{dest} cannot be written ({error.strerror or error}): choose another --dest") from error


def _zip_entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)  # dated 1980: the same images give the same bytes
    entry.create_system, entry.external_attr = 3, 0o644 << 16  # on every system
    return entry


def _write_file(folder: Path, name: str, data: bytes) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
