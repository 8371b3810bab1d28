"""What samples are compared with: the images of an archive, or statistics that somebody published."""

import hashlib
import zipfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffit import __version__
from diffit.data.files import READ_ERRORS
from diffit.errors import UserError
from diffit.metrics.detectors import Detector
from diffit.metrics.features import Need, gather
from diffit.metrics.frechet import FID, Gaussian
from diffit.metrics.images import Images, NpzImages, choose, open_images, stream
from diffit.utils.distributed import Processes
from diffit.utils.files import cache_folder, sha256_of, whole_file

FIELDS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # ADM's names; EDM has the first pair
MAX_ARRAY = 1 << 28  # bytes: a covariance of 5,000 features


class Reference:
    """Real images, or stored statistics by output, or both (ADM's reference batches), seen by one detector."""

    def __init__(
        self,
        name: str,
        detector: Detector,
        images: Images | None,
        fingerprint: Callable[[], str],
        stored: Mapping[str, Gaussian] | None = None,
    ) -> None:
        self.name, self.detector, self.images = name, detector, images
        self.stored = dict(stored or {})
        self._fingerprint = fingerprint
        self._known: dict[Need[Any], Any] = {}

    @cached_property
    def key(self) -> str:
        """SHA-256 of the content. Only found where it is used: a folder must be read for it."""
        return self._fingerprint()

    def _stored(self, need: Need[Any]) -> Gaussian | None:
        return self.stored.get(need.output) if need.what == "moments" else None

    def _images(self, need: Need[Any]) -> Images:
        if self.images is None:
            lacking = (
                "no spatial statistics (mu_s, sigma_s)" if need.output == "spatial" else "statistics but no images"
            )
            raise UserError(f"{self.name}: holds {lacking}, which this metric needs: use an image archive as --ref")
        return self.images

    def count(self, need: Need[Any], dim: int | None = None) -> int | None:
        """How many images serve the ``need``; None where a file of statistics does not say.

        Raises UserError where there are none, or statistics of another dimension than ``dim``.
        """
        stored = self._stored(need)
        if stored is None:
            available = len(self._images(need))
            return available if need.count is None else min(need.count, available)
        if dim not in (None, len(stored.mean)):
            raise UserError(
                f"{self.name}: statistics of {len(stored.mean)} dimensions, detector {self.detector.name} has {dim}"
            )
        return stored.count

    def get(
        self, needs: Collection[Need[Any]], procs: Processes, *, batch: int = 64, progress: bool = False
    ) -> dict[Need[Any], Any]:
        """The ``needs`` from the file, from the cache, or from one pass over the images for each number of them.

        All processes call this together; the first one gets what it asked for.
        """
        exact = {need: replace(need, count=self.count(need)) for need in needs}
        missing: dict[int | None, list[Need[Any]]] = {}
        for need in dict.fromkeys(exact.values()):
            if (stored := self._stored(need)) is not None:
                self._known[need] = stored
            elif need not in self._known:
                cached = self._load(need) if procs.is_first else None
                if procs.broadcast(cached is not None):
                    self._known[need] = cached
                else:
                    missing.setdefault(need.count, []).append(need)
        for count, wanted in missing.items():
            images = self._images(wanted[0])
            batches = stream(
                images, choose(len(images), len(images) if count is None else count), batch, procs, progress=progress
            )
            for need, result in gather({self.detector: wanted}, batches, procs)[self.detector].items():
                self._known[need] = result
                if need.what == "moments" and procs.is_first:
                    self._save(need, result)
        return {need: self._known[known] for need, known in exact.items()}

    def _cache_file(self, need: Need[Any]) -> Path:
        parts = (self.key, self.detector.key, self._images(need).shape, need.output, need.count)
        name = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
        return cache_folder() / f"{need.what}-{name[:32]}.npz"

    def _load(self, need: Need[Any]) -> Gaussian | None:
        try:
            return read_arrays(self._cache_file(need))[0][need.output]
        except (UserError, KeyError):  # not there, or not whole: computed again
            return None

    def _save(self, need: Need[Any], found: Gaussian) -> None:
        try:
            write_reference(self._cache_file(need), self, {need.output: found})
        except (UserError, OSError):  # a home that cannot be used costs the next run time, and this one nothing
            return


def read_arrays(path: Path) -> tuple[dict[str, Gaussian], dict[str, str]]:
    """Statistics by output from an npz, and the texts in it that say what they are of.

    UserError for objects, missing arrays and wrong shapes.
    """
    found: dict[str, Gaussian] = {}
    try:
        _check_sizes(path)
        with np.load(path, allow_pickle=False) as file:
            facts = {name: file[name] for name in ("detector", "detector_key", "images") if name in file}
            texts = {name: str(value) for name, value in facts.items() if value.dtype.kind == "U"}
            count = texts.get("images", "")
            for output, (mu_name, sigma_name) in FIELDS.items():
                if mu_name in file and sigma_name in file:
                    mu, sigma = (torch.from_numpy(file[n].astype(np.float64)) for n in (mu_name, sigma_name))
                    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
                        raise UserError(
                            f"{path}: {mu_name} {tuple(mu.shape)} and {sigma_name} {tuple(sigma.shape)} differ"
                        )
                    if not (mu.isfinite().all() and sigma.isfinite().all()):
                        raise UserError(f"{path}: {mu_name} or {sigma_name} has values that are not finite")
                    found[output] = Gaussian(mu, sigma, int(count) if count.isdecimal() else None)
    except (*READ_ERRORS, AttributeError, TypeError, MemoryError) as error:
        reason = "it holds Python objects, which could run code" if "pickle" in str(error) else error
        raise UserError(f"{path}: not read as statistics ({reason})") from None
    return found, texts


def _check_sizes(path: Path) -> None:
    """UserError for arrays that unfold to more than any statistics: a small npz can hold terabytes of zeros."""
    with zipfile.ZipFile(path) as file:
        for member in file.infolist():  # images are read row by row
            if member.file_size > MAX_ARRAY and not member.filename.startswith("arr_"):
                raise UserError(
                    f"{path}: {member.filename} has {member.file_size} bytes, more than {MAX_ARRAY} are read"
                )


def open_reference(path: Path, detector: Detector) -> Reference:
    """An archive, or an npz with ``mu, sigma`` (EDM), ``mu_s, sigma_s, arr_0`` too (ADM), or ``arr_0`` alone.

    Files that do not name their detector are what such files always are: statistics of Inception features.
    """
    if path.suffix != ".npz" or path.is_dir():
        images = open_images(path)
        return Reference(images.name, detector, images, images.fingerprint)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the spelling")
    stored, texts = read_arrays(path)
    with zipfile.ZipFile(path) as file:
        pictures = NpzImages(path) if "arr_0.npy" in file.namelist() else None
    if not stored and pictures is None:
        raise UserError(f"{path}: neither statistics (mu, sigma) nor images (arr_0) in it")
    theirs = texts.get("detector_key")
    if stored and theirs is not None and theirs != detector.key:
        raise UserError(
            f"{path}: statistics of detector {texts.get('detector')}, the metric's is {detector.name}: make new "
            "ones with `diffit metrics ref`, or use the images"
        )
    if stored and theirs is None and not detector.official:
        if pictures is None:
            raise UserError(f"{path}: statistics of Inception features; detector {detector.name} needs the images")
        stored = {}
    return Reference(path.name, detector, pictures, partial(sha256_of, path), stored)


def write_reference(path: Path, reference: Reference, found: Mapping[str, Gaussian]) -> None:
    """An npz that EDM's tools read too, and that says what it was made of."""
    arrays: dict[str, Any] = {}
    for output, gaussian in found.items():
        mu_name, sigma_name = FIELDS[output]
        arrays |= {mu_name: gaussian.mean.numpy(), sigma_name: gaussian.cov.numpy()}
    facts = {
        "detector": reference.detector.name,
        "detector_key": reference.detector.key,
        "source": reference.name,
        "source_key": reference.key,
        "images": str(next(iter(found.values())).count),
        "diffit_version": __version__,
    }
    with whole_file(path) as part, part.open("wb") as file:
        arrays |= {name: np.array(value) for name, value in facts.items()}
        np.savez(file, **arrays)


def write_statistics(
    data: Path, dest: Path, detector: Detector, procs: Processes, *, batch: int = 64, progress: bool = False
) -> str:
    """The statistics of all images of ``data`` as a file; returns what was done. All processes call this together."""
    images = open_images(data)
    if len(images) < 2:
        raise UserError(f"{data}: {len(images)} image has no covariance; use two or more")
    reference = Reference(images.name, detector, images, images.fingerprint)
    metrics = [FID(len(images), full=True), *([FID(len(images), full=True, output="spatial")] * detector.official)]
    needs = [metric.real_need for metric in metrics]
    held = reference.get(needs, procs, batch=batch, progress=progress)
    if procs.is_first:
        write_reference(dest, reference, {need.output: held[need] for need in needs})
    return f"{dest}: statistics of {len(images)} images, detector {detector.name}"
