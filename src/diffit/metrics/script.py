"""TorchScript detectors, in a process of their own that cannot write files, where the system allows for that.

No Python is in a script, but operations that open and overwrite files can be, even while it loads.
"""

import os
import subprocess
import sys
import warnings
import weakref
from functools import cache
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from diffit.errors import UserError
from diffit.utils.confine import give_up_writing

DONE, FAILED = b"+", b"-"  # an answer begins with one of them


class Script:
    """A compiled network: a function of uint8 (B, C, H, W) to (B, d).

    Attributes:
        confined: whether its process cannot write files.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self.path, self.device = path, device
        self.pipe, theirs = Pipe()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "diffit.metrics.script", str(path), str(device), str(theirs.fileno())],
                pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=2,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )  # fmt: skip
        weakref.finalize(self, self.process.kill)
        self.confined = self._answer() == b"confined"

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        try:
            self.pipe.send_bytes(save({"images": images.cpu().contiguous()}))
        except OSError:
            raise self._died() from None
        return {"pool": load(self._answer())["features"].to(self.device)}

    def _answer(self) -> bytes:
        try:
            answer = self.pipe.recv_bytes()
        except (EOFError, OSError):
            raise self._died() from None
        if answer[:1] == FAILED:
            raise UserError(f"{self.path}: {answer[1:].decode()}")
        return answer[1:]

    def _died(self) -> UserError:
        return UserError(f"{self.path}: the process of this script has died (exit status {self.process.wait()})")


@cache
def run_script(path: Path, key: str, device: torch.device) -> Script:
    """The process of the file at ``path`` with the SHA-256 ``key``, started once. Raises UserError for other files."""
    return Script(path, device)


def serve(path: str, device: torch.device, pipe: Connection) -> None:
    """Answer batches with features until the other end is closed."""
    confined = give_up_writing(but_below=Path("/dev") if device.type == "cuda" else None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = torch.jit.load(path, map_location=device).eval()
    except Exception as error:  # damaged and foreign files fail in many ways
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return pipe.send_bytes(FAILED + f"not a TorchScript file ({reason})".encode())
    pipe.send_bytes(DONE + (b"confined" if confined else b""))
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return None
        pipe.send_bytes(_features(net, load(request)["images"].to(device)))


@torch.inference_mode()
def _features(net: torch.nn.Module, images: Tensor) -> bytes:
    try:
        features = net(images)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1]
        return FAILED + f"fails on uint8 images {tuple(images.shape)} ({reason})".encode()
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(images):
        return FAILED + b"a detector returns features (B, d) for images (B, C, H, W), this one does not"
    return DONE + save({"features": features.cpu().contiguous()})


if __name__ == "__main__":
    torch.backends.cudnn.allow_tf32 = False
    serve(sys.argv[1], torch.device(sys.argv[2]), Connection(int(sys.argv[3])))
