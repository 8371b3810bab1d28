"""Detectors: what turns images into the features that metrics compare.

``inception`` is FID's. Any other one lends its name to the metric (``fd10k_full:pixels``), so that its
number is not read as an FID.
"""

import hashlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffit.errors import UserError
from diffit.metrics.classifier import load_classifier
from diffit.metrics.inception import SHA256, find_weights, load_inception
from diffit.metrics.script import run_script
from diffit.utils.distributed import Processes
from diffit.utils.files import sha256_of

logger = logging.getLogger(__name__)

OFFICIAL = "inception"
PIXELS_LIMIT = 4096  # dimensions: 128 MiB of covariance, and its eigenvalues in a minute


@dataclass(frozen=True)
class Detector:
    """Features of uint8 images (B, C, H, W): ``extract`` returns ``pool`` (B, d) and, where it has them, ``spatial``
    (B, e) and ``probabilities`` (B, classes)."""

    name: str
    """``inception``, ``pixels``, or the name of a file with the start of its hash."""
    key: str
    """SHA-256 of the weights: it tells statistics of different detectors apart."""
    extract: Callable[[Tensor], dict[str, Tensor]]
    device: torch.device
    any_size: bool = False

    @property
    def official(self) -> bool:
        return self.name == OFFICIAL

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Features of a batch on any device. Raises UserError where one is not finite."""
        # TensorFloat-32, cuDNN's default, would move the third digit of the features.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            outputs = self.extract(images.to(self.device))
        for name, values in outputs.items():
            if not values.isfinite().all():
                raise UserError(f"detector {self.name}: its {name} features of an image are not finite; check its file")
        return outputs


def make_detector(spec: str, procs: Processes, *, allow_scripts: bool = False) -> Detector:
    """The detector that ``spec`` names: ``inception``, ``inception:PATH``, ``pixels``, or a file.

    A file is what ``diffit metrics train-detector`` wrote or, with ``allow_scripts``, TorchScript: a function of uint8
    (B, C, H, W) to (B, d), and a program. All processes call this together. Raises UserError before any work where it
    is missing or of another kind.
    """
    device = procs.device
    if spec == OFFICIAL:
        with procs.together():
            if os.environ.get("LOCAL_RANK", "0") == "0":  # one process of each machine downloads
                find_weights()
        path = find_weights()
        return Detector(OFFICIAL, SHA256, load_inception(path, device), device, any_size=True)
    if spec == "pixels":
        return Detector("pixels", hashlib.sha256(b"pixels / 255").hexdigest(), pixels, device)
    path = Path(spec.removeprefix(f"{OFFICIAL}:"))
    if not path.is_file():
        raise UserError(
            f"detector {spec!r}: no such file; known: inception, pixels, inception:WEIGHTS.pth, a file of "
            "`diffit metrics train-detector` (.safetensors) or, with --allow-scripts, TorchScript (.pt)"
        )
    key = sha256_of(path)
    if spec.startswith(f"{OFFICIAL}:"):
        name = OFFICIAL if key == SHA256 else f"{OFFICIAL}-{key[:8]}"
        return Detector(name, key, load_inception(path, device), device, any_size=True)
    name = f"{path.stem}-{key[:8]}"
    if path.suffix == ".safetensors":
        return Detector(name, key, load_classifier(path, device), device)
    if not allow_scripts:
        raise UserError(
            f"{path}: would be loaded as TorchScript, a program that runs with your rights and can write files; use "
            "inception, pixels or a file of `diffit metrics train-detector`, or pass --allow-scripts if you trust it"
        )
    script = run_script(path.resolve(), key, device)
    if procs.is_first:
        rights = "in a process that cannot write files" if script.confined else "with your rights"
        logger.warning("%s: a script is a program, and runs %s", path, rights)
    return Detector(name, key, script, device)


def pixels(images: Tensor) -> dict[str, Tensor]:
    """The pixels themselves, in [0, 1]."""
    flat = images.flatten(1)
    if flat.shape[1] > PIXELS_LIMIT:
        raise UserError(
            f"detector pixels: {flat.shape[1]} values an image; it is for {PIXELS_LIMIT} at most: train one with "
            "`diffit metrics train-detector`"
        )
    return {"pool": flat.float() / 255}
