"""Where a run's numbers and pictures go besides its own files: TensorBoard, Weights & Biases, Trackio."""

import importlib
import importlib.util
import math
import os
import threading
import uuid
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from diffit.configs.schema import Config
from diffit.errors import UserError

PROJECT = "diffit"


class Tracker(Protocol):
    """Takes numbers and pictures, each at a number of images seen."""

    def scalars(self, values: dict[str, float], images: int) -> None: ...
    def picture(self, name: str, path: Path, images: int) -> None: ...
    def close(self) -> None: ...


def require_tracker(name: str | None) -> None:
    """Raises :class:`UserError` where the package that ``--track`` names is not installed."""
    if name is not None and importlib.util.find_spec(name) is None:
        raise UserError(f"--track {name}: that package is not installed; pip install {name}, or leave the option out")


def open_trackers(run_dir: Path, config: Config, images_seen: int) -> list[Tracker]:
    """TensorBoard where it is installed, and the one that the options name."""
    found: list[Tracker] = []
    if importlib.util.find_spec("tensorboard") is not None:
        found.append(TensorBoard(run_dir, config, images_seen))
    if config.training.track is not None:
        found.append(Hosted(config.training.track, run_dir, config))
    return found


class TensorBoard:
    """Event files in the run's folder; what an abandoned continuation wrote is purged."""

    def __init__(self, run_dir: Path, config: Config, images_seen: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _without_tracebacks_of_tensorboard
        self.writer: Any = SummaryWriter(str(run_dir), purge_step=images_seen + 1)
        self.writer.add_text("options", f"```json\n{config.model_dump_json(indent=2)}\n```", images_seen)

    def scalars(self, values: dict[str, float], images: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name.replace(":", "-"), value, images)
        self.writer.flush()

    def picture(self, name: str, path: Path, images: int) -> None:
        pixels = np.array(Image.open(path))
        self.writer.add_image(name, pixels, images, dataformats="HW" if pixels.ndim == 2 else "HWC")

    def close(self) -> None:
        self.writer.close()


def _without_tracebacks_of_tensorboard(failed: threading.ExceptHookArgs) -> None:
    """What fails on its writing thread, as on a full disk, it raises again when it is given the next number."""
    if not type(failed.thread).__module__.startswith("tensorboard"):
        threading.__excepthook__(failed)


class Hosted:
    """``wandb``, or ``trackio``, which has the same functions. A resumed run keeps its name."""

    def __init__(self, package: str, run_dir: Path, config: Config) -> None:
        self.package: Any = importlib.import_module(package)
        # Another folder of the same name, elsewhere or later, is another run.
        key = run_dir / "tracker.txt"
        if not key.exists():
            key.write_text(uuid.uuid4().hex)
        name = f"{run_dir.name}-{key.read_text()[:8]}"
        which = {"id": name, "dir": str(run_dir)} if package == "wandb" else {}
        self.package.init(project=PROJECT, name=name, config=config.model_dump(mode="json"), resume="allow", **which)

    def scalars(self, values: dict[str, float], images: int) -> None:
        self.package.log({name: value for name, value in values.items() if math.isfinite(value)}, step=images)

    def picture(self, name: str, path: Path, images: int) -> None:
        self.package.log({name: self.package.Image(str(path))}, step=images)

    def close(self) -> None:
        self.package.finish()
