"""The Inception network of 2015 on which FID is defined: torch-fidelity's port of the TensorFlow graph."""

import os
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from diffit.errors import UserError, install_hint
from diffit.utils.files import sha256_of, whole_file

FILE_NAME = "weights-inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{FILE_NAME}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
VARIABLE = "DIFFIT_INCEPTION"
SPATIAL_CHANNELS = 7  # of mixed_6/conv, 17×17: 2023 numbers for sFID
TIMEOUT = 20  # seconds without a byte


def find_weights() -> Path:
    """The official weights: where ``DIFFIT_INCEPTION`` says, in the torch-hub cache, or downloaded into it.

    Raises UserError, saying what to fetch and where to put it, when they are nowhere or their SHA-256 is another.
    """
    cached = Path(torch.hub.get_dir()) / "checkpoints" / FILE_NAME
    named = os.environ.get(VARIABLE)
    path = Path(named) if named else cached
    if not path.is_file():
        if named:
            raise UserError(f"{VARIABLE}={named}: no such file; fetch it from {URL}")
        download(cached)
    if (found := sha256_of(path)) != SHA256:
        raise UserError(
            f"{path}: SHA-256 {found[:8]}… is not that of the official Inception weights ({SHA256[:8]}…): fetch them "
            f"again from {URL}, or measure under another name with --detector inception:{path}"
        )
    return path


def download(dest: Path) -> None:
    try:
        with urllib.request.urlopen(URL, timeout=TIMEOUT) as source, whole_file(dest) as part, part.open("wb") as file:
            while data := source.read(1 << 20):
                file.write(data)
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(
            f"the Inception weights of FID are not here and cannot be downloaded ({error}): use --detector pixels, "
            f"which needs none, or fetch {URL} elsewhere and put it at {dest}, or name its place in {VARIABLE}"
        ) from None


@contextmanager
def _weights_only() -> Iterator[None]:
    """torch's own switch that makes every ``torch.load`` refuse code: torch-fidelity asks for the unsafe kind."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def load_inception(path: Path, device: torch.device) -> Callable[[Tensor], dict[str, Tensor]]:
    """The network as a function of uint8 (B, 1 or 3, H, W) of any size, to

    ``pool`` (B, 2048); ``spatial`` (B, 2023), the first 7 channels of mixed_6/conv in the order of the TensorFlow graph
    (row, column, channel), as ADM's reference statistics have them; and ``probabilities`` (B, 1008), the softmax
    without biases that the published Inception scores use.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        raise UserError(f"FID needs torch-fidelity for the network: {install_hint('metrics')}") from None
    try:
        with _weights_only(), torch.random.fork_rng(devices=[]):
            net = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
    except Exception as error:  # damaged and foreign files fail in many ways
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path}: not weights of the Inception network ({reason}); fetch {URL}") from None
    net = net.to(device)
    if device.type == "cpu":
        net = net.to(memory_format=torch.channels_last)  # a fifth less time, the same to 1e-6
    kept: list[Tensor] = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, output: kept.append(output[:, :SPATIAL_CHANNELS]))

    def extract(images: Tensor) -> dict[str, Tensor]:
        kept.clear()
        pool, logits = net(images.expand(-1, 3, -1, -1))
        return {
            "pool": pool,
            "spatial": kept.pop().permute(0, 2, 3, 1).flatten(1),
            "probabilities": logits.softmax(dim=1),
        }

    return extract
