"""What the tabs of the page share: networks by name, kept while they are used, and the folders that may be read."""

import threading
from collections import OrderedDict
from pathlib import Path

import torch

from diffit.errors import UserError, printable
from diffit.sampling.cost import sampling_bytes
from diffit.sampling.model import Model, load
from diffit.training.run_dir import runs
from diffit.utils.distributed import pick_device
from diffit.utils.memory import free_memory
from diffit.weights import locate, read_header, snapshot_kimg, snapshots

MAX_IMAGES, MAX_STEPS = 64, 1000  # of one request
SHARE = 0.8  # of the free memory that one request may take


class Shelf:
    """Networks by the names that the page shows; at most ``keep`` are in memory, the least recently used one goes.

    Only what was named when the page was started can be asked for: ``networks`` (files, run folders or Hub ids), the
    snapshots of runs in ``runs``, and the archive ``data``. A name from the page is looked up, never opened as a path.
    """

    def __init__(
        self,
        networks: tuple[str, ...] = (),
        runs: Path | None = None,
        data: Path | None = None,
        vae: str | None = None,
        *,
        keep: int = 3,
        device: torch.device | None = None,
    ) -> None:
        self.given, self.runs_dir, self.data, self.vae, self.keep = networks, runs, data, vae, keep
        self.device = device or pick_device()
        self._kept: OrderedDict[tuple[str, str, float], Model] = OrderedDict()
        self._lock = threading.Lock()

    def runs(self) -> dict[str, Path]:
        """Run folders by name, the newest first: those in the folder of runs and in its folders."""
        if self.runs_dir is None or not self.runs_dir.is_dir():
            return {}
        folders = [self.runs_dir, *sorted(path for path in self.runs_dir.iterdir() if path.is_dir())]
        found = {str(run.relative_to(self.runs_dir)): run for folder in folders for run in runs(folder)}
        return dict(sorted(found.items(), key=lambda item: _modified(item[1]), reverse=True))

    def networks(self) -> dict[str, str]:
        """What may be sampled: name -> file, run folder or Hub id."""
        named = {printable(Path(name).name if Path(name).exists() else name): name for name in self.given}
        if len(named) < len(self.given):  # several files of one name
            named = {printable(name): name for name in self.given}
        for name, run in self.runs().items():
            # What tells them apart first: a list shows the beginning of a long name.
            named |= {f"{snapshot_kimg(path):g} kimg · {name}": str(path) for path in reversed(snapshots(run))}
        return named

    def model(self, name: str | None, precision: str = "auto", *, version: tuple[str, float] | None = None) -> Model:
        """The model of a name that :meth:`networks` has. Raises :class:`UserError`, also for another ``version``."""
        source, modified = found = self.version(name)
        if version not in (None, found):
            raise UserError(f"network {name}: there is a newer one of this name; press “Sample and look” again")
        with self._lock:
            key = (source, precision, modified)
            if key not in self._kept:
                while len(self._kept) >= self.keep:
                    self._kept.popitem(last=False)
                self._kept[key] = load(source, device=self.device, precision=precision, vae=self.vae_for(source))
            self._kept.move_to_end(key)
            return self._kept[key]

    def version(self, name: str | None) -> tuple[str, float]:
        """The file that a name means now, and when it was written: a run that trains has another one later.

        Raises :class:`UserError`.
        """
        source = self.networks().get(name or "")
        if source is None:
            raise UserError(f"network {name}: not among those that the page was started with; choose one of the list")
        file = locate(source)
        return str(file), _modified(file)

    def vae_for(self, source: str | Path) -> str | None:
        """The autoencoder that the page was started with, where the network has latents."""
        return self.vae if self.vae is not None and read_header(source)[0].autoencoder is not None else None

    def run(self, name: str | None) -> Path:
        """The run folder of a name that :meth:`runs` has. Raises :class:`UserError`."""
        found = self.runs().get(name or "")
        if found is None:
            raise UserError(f"run {name}: not (or no longer) in the folder of runs; choose one of the list")
        return found

    def require_few(self, images: int, steps: int | None = None) -> None:
        """Raises :class:`UserError` for more than one request may ask for, since others wait for it."""
        if not 1 <= images <= MAX_IMAGES:
            raise UserError(f"images {images}: one request has 1 to {MAX_IMAGES}; `diffit sample` makes any number")
        if steps is not None and not 1 <= steps <= MAX_STEPS:
            raise UserError(f"steps {steps}: one request has 1 to {MAX_STEPS}; `diffit sample` takes more")

    def require_memory(self, model: Model, images: int) -> None:
        """Raises :class:`UserError`, before any work, for more ``images`` than the device has memory for."""
        need = sampling_bytes(model.config, images, None if model.autoencoder is None else model.autoencoder.vae)
        free = free_bytes(self.device)
        if need > SHARE * free:
            raise UserError(
                f"images {images}: together they take about {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are "
                f"free on {self.device}; ask for {max(int(images * SHARE * free / need), 1)} or fewer"
            )


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free_memory()


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # a Hub id, or a folder that is being deleted
        return 0.0
