"""Statistics of an image archive, and everything that is wrong with it."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from diffit.data.archive import describe_shape, open_plain
from diffit.data.files import BrokenImageError, FileTree, convert_command, map_ordered, require_images, subset
from diffit.data.labels import META, count_classes, read_labels, require_classes
from diffit.data.names import name_some
from diffit.data.pixels import has_other_profile
from diffit.errors import UserError

Pixels = npt.NDArray[np.uint8]
SAMPLE_BYTES = 1 << 28  # of the samples: all 64 up to 1000 x 1000 pixels, fewer of photographs
USUAL_STD = 0.1  # on the scale -1 to 1: below it something went wrong
FEW = 100  # images


@dataclass
class CheckReport:
    """What an archive holds. ``problems`` is empty exactly if it can be trained on."""

    path: Path
    num_bytes: int
    count: int = 0  # images, the damaged ones included
    shapes: Counter[tuple[int, int, int]] = field(default_factory=Counter)  # (C, H, W) -> images
    mean: list[float] = field(default_factory=list)  # a channel, on the scale 0..255; of the commonest channel count
    std: list[float] = field(default_factory=list)
    duplicates: int = 0  # images whose pixels equal those of an earlier one
    labelled: int = 0  # images with a label
    class_counts: Counter[int] = field(default_factory=Counter)
    class_names: list[str] | None = None
    damaged: list[tuple[str, str]] = field(default_factory=list)  # (name, reason)
    num_classes: int = 0  # as a model would have them
    problems: list[str] = field(default_factory=list)  # one line each
    warnings: list[str] = field(default_factory=list)  # what can be trained on but is seldom meant, one line each
    samples: torch.Tensor | None = None  # uint8 (n, C, H, W): a seeded random choice of one shape


def check(
    path: str | Path,
    *,
    cond: bool = False,
    samples: int = 64,
    seed: int = 0,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> CheckReport:
    """Read every image of the archive ``path`` once and report on it; damage is listed, not raised.

    With ``cond``, images without a label are a problem. ``progress`` is called with (images done, images in all).
    Raises UserError if the path is no archive at all.
    """
    files = FileTree(path)
    names = require_images(files)
    report = CheckReport(files.path, files.num_bytes(), count=len(names), problems=files.altered(META))
    _check_labels(report, files, cond)

    histograms: dict[int, npt.NDArray[np.int64]] = {c: np.zeros((c, 256), np.int64) for c in (1, 3)}
    digests = np.zeros(len(names), np.uint64)  # 8 bytes an image: a million images collide with probability 3e-8
    small = report.num_bytes < 8192 * len(names)  # images for which threads cost more than they gain
    good = profiles = 0
    for i, result in enumerate(map_ordered(partial(_inspect, files), names, workers or int(small))):
        if isinstance(result, BrokenImageError):
            report.damaged.append((names[i], str(result)))
        else:
            report.shapes[result.shape] += 1
            histograms[result.shape[0]] += result.histogram
            digests[good] = result.digest
            good += 1
            profiles += result.other_profile
        if progress is not None:
            progress(i + 1, len(names))
    report.duplicates = good - len(np.unique(digests[:good]))
    if profiles:
        report.warnings.append(
            f"{profiles} images have a colour profile other than sRGB, which training does not look at: "
            f"`{convert_command(report.path)}` converts them"
        )
    _summarise(report, histograms)
    if few := few_images(good):
        report.warnings.append(few)
    _pick(report, files, [names[i] for i in subset(len(names), samples, seed)])
    return report


class Inspected(NamedTuple):
    """What is kept of an image: the pixels of many large ones would not fit into memory."""

    shape: tuple[int, int, int]  # (C, H, W)
    histogram: npt.NDArray[np.int64]  # (C, 256)
    digest: int
    other_profile: bool


def _inspect(files: FileTree, name: str) -> Inspected | BrokenImageError:
    try:
        pixels, other_profile = _pixels(files, name)
    except BrokenImageError as error:
        return error
    height, width, channels = pixels.shape
    histogram = np.stack([np.bincount(pixels[..., c].ravel(), minlength=256) for c in range(channels)])
    digest = int.from_bytes(blake2b(pixels.tobytes(), digest_size=8).digest(), "little")
    return Inspected((channels, height, width), histogram, digest, other_profile)


def _pick(report: CheckReport, files: FileTree, names: list[str]) -> None:
    """Read those of ``names`` again that have the commonest shape, as far as :data:`SAMPLE_BYTES` reaches."""
    if not report.shapes:
        return
    shape = report.shapes.most_common(1)[0][0]
    damaged, picked = {name for name, _ in report.damaged}, list[Pixels]()
    for name in names:
        if name not in damaged and len(picked) < max(SAMPLE_BYTES // math.prod(shape), 1):
            pixels, _ = _pixels(files, name)
            if (pixels.shape[2], *pixels.shape[:2]) == shape:
                picked.append(pixels)
    if picked:
        report.samples = torch.from_numpy(np.stack(picked)).permute(0, 3, 1, 2)


def _pixels(files: FileTree, name: str) -> tuple[Pixels, bool]:
    """uint8 (H, W, C), under the same conditions as :class:`ImageArchive`, and whether they are of another space."""
    image, fault = open_plain(files.read(name), name)
    if fault:
        raise BrokenImageError(f"'{name}' {fault}, and only upright 8-bit gray or RGB images are read")
    return np.asarray(image).reshape(image.height, image.width, -1), has_other_profile(image)


def _check_labels(report: CheckReport, files: FileTree, cond: bool) -> None:
    try:
        table, report.class_names = read_labels(files)
    except UserError as error:
        report.problems.append(str(error))
        return
    table = table or {}
    images = set(files.images)
    missing = [name for name in files.images if name not in table]
    report.labelled = len(images) - len(missing)
    report.class_counts = Counter(label for name, label in table.items() if name in images)
    if missing and (cond or table):
        report.problems.append(f"{len(missing)} of {len(images)} images have no label ({name_some(missing)})")
    if absent := [name for name in table if name not in images]:
        report.problems.append(f"{META} lists {len(absent)} files that are not there ({name_some(absent)})")
    if report.class_names and report.class_counts and len(report.class_names) <= max(report.class_counts):
        report.problems.append(
            f"{META} names {len(report.class_names)} classes, but labels go up to {max(report.class_counts)}"
        )
    if report.class_counts:
        _check_classes(report, cond)


def few_images(count: int) -> str | None:
    """The warning where a network would learn an archive by heart."""
    if count >= FEW:
        return None
    return f"{count} images are few: samples will come to repeat them; hundreds make new ones (--mirror doubles them)"


def _check_classes(report: CheckReport, cond: bool) -> None:
    report.num_classes = count_classes(report.class_counts, report.class_names)
    try:
        require_classes(report.path, report.num_classes, report.labelled, report.class_names)
    except UserError as error:
        (report.problems if cond else report.warnings).append(str(error))
        return
    if empty := [label for label in range(report.num_classes) if label not in report.class_counts]:
        report.warnings.append(
            f"{len(empty)} of {report.num_classes} classes have no images ({name_some([str(i) for i in empty])}), so "
            f"that no model samples them: `{convert_command(report.path)}` numbers the others densely"
        )


def _summarise(report: CheckReport, histograms: dict[int, npt.NDArray[np.int64]]) -> None:
    remedy = f"`{convert_command(report.path)}"
    if report.damaged:
        report.problems.append(
            f"{len(report.damaged)} images cannot be used: {remedy} --on-error skip` leaves them out"
        )
    if len(report.shapes) > 1:
        kinds = name_some([f"{n} of {describe_shape(shape)}" for shape, n in report.shapes.most_common()])
        report.problems.append(f"images differ ({kinds}): {remedy} --resolution WxH` makes them equal")
    if not report.shapes:
        return
    shape = report.shapes.most_common(1)[0][0]
    counts = histograms[shape[0]]
    values, total = np.arange(256), counts.sum(axis=1)
    mean = counts @ values / total
    report.mean = mean.tolist()
    report.std = np.sqrt(counts @ values**2 / total - mean**2).tolist()
    deviation = max(report.std) / 127.5
    if deviation < USUAL_STD:
        report.warnings.append(
            f"the images hardly differ from one gray: a standard deviation of {deviation:.2g} on the scale -1 to 1, "
            "where photographs have 0.5; if they are scans of 10 to 14 bits, convert the originals with --range auto"
        )
