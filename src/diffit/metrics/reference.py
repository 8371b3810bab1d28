"""What samples are compared with: the images of an archive, or statistics that somebody published."""

import hashlib
import os
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffit import __version__
from diffit.errors import UserError
from diffit.metrics.detectors import Detector
from diffit.metrics.features import Need, Rows, gather
from diffit.metrics.frechet import Moments
from diffit.metrics.images import ArchiveImages, Images, NpzImages, choose, open_images, stream
from diffit.metrics.inception_score import ScoreSums
from diffit.utils.distributed import Processes
from diffit.utils.files import sha256_of, whole_file

Gaussian = tuple[Tensor, Tensor]
FIELDS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}  # ADM's names; EDM has the first pair


def cache_folder() -> Path:
    return Path(os.environ.get("DIFFIT_CACHE") or Path.home() / ".cache" / "diffit")


class Reference:
    """Real images, or stored moments, or both (ADM's reference batches), seen by one detector.

    ``moments`` and ``features`` are there on the first process, after all have called ``prepare`` together.
    """

    def __init__(
        self,
        name: str,
        detector: Detector,
        images: Images | None,
        stored: dict[str, Gaussian] | None = None,
        key: str | None = None,
        stored_count: int | None = None,
    ) -> None:
        self.name, self.detector, self.images = name, detector, images
        self.stored_count = stored_count  # images that the stored moments are of, where the file says so
        self._key = key
        self.stored = stored or {}
        self.known: dict[Need, Gaussian | Tensor | None] = {}

    @property
    def key(self) -> str:
        """Hash of the content. Only asked for where it is used: a folder must be read for it."""
        if self._key is None:
            assert self.images is not None
            self._key = self.images.fingerprint()
        return self._key

    def count(self, limit: int | None = None) -> int | None:
        """How many images are used where at most ``limit`` are; None where a file of statistics does not say."""
        return None if self.images is None else min(len(self.images), limit or len(self.images))

    def need(self, what: Any, output: Any, limit: int | None) -> Need:
        """What of all real images, or of a random choice of ``limit``. UserError where the file does not hold it."""
        if what == "moments" and output in self.stored:
            return Need(self.detector.name, what, output, 0)
        count = self.count(limit)
        if count is None:
            lacking = "no spatial statistics (mu_s, sigma_s)" if output == "spatial" else "statistics but no images"
            raise UserError(f"{self.name}: holds {lacking}, which this metric needs: give an image archive as --ref")
        return Need(self.detector.name, what, output, count)

    def prepare(self, needs: Collection[Need], procs: Processes, *, batch: int = 64, progress: bool = False) -> None:
        """Fill in the ``needs``: from the file, from the cache, or in one pass over the images."""
        for need in needs:
            if need.count == 0:
                self.known[need] = self.stored[need.output]
            elif need not in self.known and need.what == "moments":
                cached = self._load(need) if procs.is_first else None
                if procs.broadcast(cached is not None):
                    self.known[need] = cached
        by_count: dict[int, list[Need]] = {}
        for need in needs:
            if need not in self.known:
                by_count.setdefault(need.count, []).append(need)
        for count, wanted in by_count.items():
            assert self.images is not None
            chosen = choose(len(self.images), count)
            batches = stream(self.images, chosen, batch, procs, progress=progress)
            for need, sums in gather(wanted, batches, {self.detector.name: self.detector}, procs).items():
                assert not isinstance(sums, ScoreSums)
                self.known[need] = sums.features if isinstance(sums, Rows) else sums.mean_and_cov()
                if isinstance(sums, Moments) and procs.is_first:
                    self._save(need)

    def moments(self, need: Need) -> Gaussian:
        found = self.known[need]
        assert isinstance(found, tuple)
        return found

    def features(self, need: Need) -> Tensor:
        found = self.known[need]
        assert isinstance(found, Tensor)
        return found

    def _cache_file(self, need: Need) -> Path:
        assert self.images is not None
        parts = (self.key, self.detector.key, self.images.shape, need.output, need.count)
        name = hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()
        return cache_folder() / f"moments-{name[:32]}.npz"

    def _load(self, need: Need) -> Gaussian | None:
        try:
            return read_arrays(self._cache_file(need))[need.output]
        except (UserError, KeyError):  # not there, or not whole: computed again
            return None

    def _save(self, need: Need) -> None:
        try:
            write_reference(self._cache_file(need), self, {need.output: self.moments(need)}, need.count)
        except UserError:  # a home that is full or not writable costs the next run time, and this one nothing
            return


def read_arrays(path: Path) -> dict[str, Gaussian]:
    """Moments by output from an npz. UserError for objects, missing arrays and wrong shapes."""
    moments = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for output, (mu_name, sigma_name) in FIELDS.items():
                if mu_name in file and sigma_name in file:
                    mu, sigma = (torch.from_numpy(file[n].astype(np.float64)) for n in (mu_name, sigma_name))
                    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
                        raise UserError(
                            f"{path}: {mu_name} {tuple(mu.shape)} and {sigma_name} {tuple(sigma.shape)} differ"
                        )
                    if not (mu.isfinite().all() and sigma.isfinite().all()):
                        raise UserError(f"{path}: {mu_name} or {sigma_name} has values that are not finite")
                    moments[output] = mu, sigma
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError, MemoryError) as error:
        reason = "it holds Python objects, which could run code" if "pickle" in str(error) else error
        raise UserError(f"{path}: not read as statistics ({reason})") from None
    return moments


def _text(path: Path, name: str) -> str | None:
    """A string in an npz; None where there is none."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return str(file[name]) if name in file and file[name].dtype.kind == "U" else None
    except (ValueError, MemoryError):  # Python objects, or a header that claims too much: not a string of ours
        return None


def open_reference(path: Path, detector: Detector) -> Reference:
    """An archive, or an npz with ``mu, sigma`` (EDM), ``mu_s, sigma_s, arr_0`` besides (ADM), or ``arr_0`` alone.

    Files that do not name their detector are taken for what such files are: statistics of Inception features.
    """
    if path.suffix != ".npz" or path.is_dir():
        images: ArchiveImages | NpzImages = open_images(path)
        return Reference(images.name, detector, images)
    if not path.is_file():
        raise UserError(f"{path}: no such file; check the spelling")
    stored = read_arrays(path)
    with zipfile.ZipFile(path) as file:
        pictures = NpzImages(path) if "arr_0.npy" in file.namelist() else None
    if not stored and pictures is None:
        raise UserError(f"{path}: neither statistics (mu, sigma) nor images (arr_0) in it")
    theirs = _text(path, "detector_key")
    if stored and theirs is not None and theirs != detector.key:
        raise UserError(
            f"{path}: statistics of detector {_text(path, 'detector')}, the metric's is {detector.name}: make new ones "
            "with `diffit metrics ref`, or give the images"
        )
    if stored and theirs is None and not detector.official:
        if pictures is None:
            raise UserError(f"{path}: statistics of Inception features; detector {detector.name} needs the images")
        stored = {}
    count = _text(path, "images") or ""
    return Reference(
        path.name, detector, pictures, stored, sha256_of(path), int(count) if stored and count.isdecimal() else None
    )


def write_reference(path: Path, reference: Reference, moments: dict[str, Gaussian], count: int) -> None:
    """An npz that EDM's tools read too, and that says what it was made of."""
    arrays: dict[str, Any] = {}
    for output, pair in moments.items():
        arrays |= {name: values.numpy() for name, values in zip(FIELDS[output], pair, strict=True)}
    facts = {
        "detector": reference.detector.name,
        "detector_key": reference.detector.key,
        "source": reference.name,
        "source_key": reference.key,
        "images": str(count),
        "diffit_version": __version__,
    }
    with whole_file(path) as part, part.open("wb") as file:
        arrays |= {name: np.array(value) for name, value in facts.items()}
        np.savez(file, **arrays)
