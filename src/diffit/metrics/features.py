"""What metrics ask of features, and one pass over images that answers all of them, on any number of processes."""

import mmap
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from diffit.errors import UserError
from diffit.metrics.detectors import OFFICIAL, Detector
from diffit.metrics.images import Batches
from diffit.utils.distributed import Processes

Output = Literal["pool", "spatial", "probabilities"]
Array = Tensor | npt.NDArray[Any]
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Accumulator(Protocol[R_co]):
    """Keeps of features what a metric needs, from batches in any order."""

    def add(self, positions: Tensor, features: Tensor) -> None:
        """``positions`` (b,) int64 say which of the images these are, ``features`` are (b, d)."""

    def reduce(self, procs: Processes, dim: int) -> R_co:
        """The result over all processes, of which some may have seen no features; those have ``dim`` values."""


@dataclass(frozen=True)
class Need(Generic[R]):
    """An accumulator of an output of the detector over the images at positions 0 to ``count`` − 1, None for all.

    ``what`` names it: needs that agree in their first three fields are one.
    """

    what: str
    output: Output
    count: int | None
    accumulator: Callable[[], Accumulator[R]] = field(compare=False)


@dataclass(frozen=True)
class Metric(ABC):
    """``samples`` generated images against at most as many real ones, or against all of them when ``full``."""

    samples: int
    full: bool = False
    spec: str = OFFICIAL
    """Argument of :func:`make_detector`."""

    kind: ClassVar[str]

    @property
    def suffix(self) -> str:
        """What follows the number in the name."""
        return "_full" * self.full

    def name(self, detector: Detector) -> str:
        """As it is written down: with another detector than FID's it is not an FID, and says whose number it is."""
        thousands, rest = divmod(self.samples, 1000)
        count = str(self.samples) if rest else f"{thousands}k"
        kind = self.kind if detector.official else self.kind.replace("id", "d")
        return f"{kind}{count}{self.suffix}{'' if detector.official else f':{detector.name}'}"

    @property
    @abstractmethod
    def parts(self) -> Sequence["Part[Any]"]:
        """What it consists of, the part whose first number stands for the others first."""


class Part(Metric, Generic[R]):
    """A metric of one accumulator: it is its own and only part."""

    compares: ClassVar[bool] = True
    """Whether it needs real images."""

    @property
    def parts(self) -> "Sequence[Part[Any]]":
        return [self]

    @property
    def protocol(self) -> dict[str, Any]:
        """What else the numbers depend on, for the record."""
        return {}

    @property
    @abstractmethod
    def need(self) -> Need[R]:
        """What it needs of generated images."""

    @property
    def real_need(self) -> Need[R]:
        """What it needs of real images."""
        return replace(self.need, count=None if self.full else self.samples)

    @abstractmethod
    def fewest(self, dim: int) -> tuple[int, str]:
        """Images without which ``dim`` features say nothing, and what for."""

    @abstractmethod
    def numbers(self, fake: R, real: R, detector: Detector) -> dict[str, float]:
        """By name, from the results of the accumulators."""


TILE = 128  # rows that are kept, and sent, together


class Rows:
    """The features themselves, float32 (N, d) in the order of their positions, for metrics of pairs.

    A machine holds them once: what has come to the first process is freed where it came from.
    """

    def __init__(self) -> None:
        self.tiles: deque[Tensor] = deque()
        self.positions: list[Tensor] = []
        self.room = 0  # rows left in the last tile

    def add(self, positions: Tensor, features: Tensor) -> None:
        self.positions.append(positions)
        while len(features):
            if self.room == 0:
                # A mapping of its own, which the system has back as soon as it is freed.
                memory = mmap.mmap(-1, 4 * TILE * features.shape[1])
                self.tiles.append(torch.frombuffer(memory, dtype=torch.float32).view(TILE, -1))
                self.room = TILE
            fitting, features = features[: self.room], features[self.room :]
            self.tiles[-1][TILE - self.room :][: len(fitting)] = fitting
            self.room -= len(fitting)

    def reduce(self, procs: Processes, dim: int) -> Tensor:
        """Once: it gives away what was added."""
        positions = torch.cat([*self.positions, torch.empty(0, dtype=torch.int64)])
        tiles = -(-procs.max(len(positions)) // TILE)  # every process sends as many; -1 marks rows that there are not
        padding = positions.new_full((tiles * TILE - len(positions),), -1)
        sent = _collect(procs, torch.cat([positions, padding]).view(1, tiles, TILE))
        order = torch.full_like(sent, -1)
        order[sent >= 0] = sent[sent >= 0].argsort().argsort()
        rows = torch.empty(int((sent >= 0).sum()), dim)
        room = torch.empty(len(sent), TILE, dim, device=procs.device)
        for tile in range(tiles):
            own = self.tiles.popleft() if self.tiles else torch.zeros(TILE, dim)
            for values, places in zip(_collect(procs, own[None], room), order[:, tile], strict=True):
                places = places[places >= 0]
                rows[places] = values[: len(places)]
        self.positions, self.room = [], 0
        return rows


def pooled(count: int | None) -> Need[Tensor]:
    """Pooled features of ``count`` images."""
    return Need("rows", "pool", count, Rows)


def _collect(procs: Processes, tensor: Tensor, room: Tensor | None = None) -> Tensor:
    """The (1, …) of all processes, in ``room`` where that is given, on the first (count, …), on the others (0, …)."""
    if procs.count == 1:
        return tensor
    tensor = tensor.to(procs.device)
    found = tensor.new_empty(procs.count * procs.is_first, *tensor.shape[1:]) if room is None else room
    dist.gather(tensor, list(found.split(1)) if procs.is_first else None)
    return found.cpu()


def gather(
    needs: Mapping[Detector, Sequence[Need[Any]]], batches: Batches, procs: Processes
) -> dict[Detector, dict[Need[Any], Any]]:
    """Run the ``batches`` of this process through the detectors and sum over all processes.

    Results by need; tensors are on the first process only.

    All processes call this together, with the same ``needs``. An error on one is raised on all.
    """
    accumulators = {detector: {need: need.accumulator() for need in wanted} for detector, wanted in needs.items()}
    dims: dict[tuple[Detector, str], int] = {}
    shape: tuple[int, ...] | None = None
    with procs.together():
        for positions, images in batches:
            shape = shape or tuple(images.shape[1:])
            for detector, wanted in accumulators.items():
                if not detector.any_size and tuple(images.shape[1:]) != shape:
                    raise UserError(
                        f"images of several sizes, which detector {detector.name} does not accept; inception does"
                    )
                outputs = detector(images)
                for need, accumulator in wanted.items():
                    values = outputs[need.output]
                    dims[detector, need.output] = values.shape[1]
                    inside = positions < (torch.inf if need.count is None else need.count)
                    if inside.any():
                        accumulator.add(positions[inside], values[inside.to(values.device)])
    found: dict[Detector, dict[Need[Any], Any]] = {detector: {} for detector in accumulators}
    for detector, wanted in accumulators.items():
        for need, accumulator in wanted.items():
            dim = torch.tensor(dims.get((detector, need.output), 0), device=procs.device)
            if procs.count > 1:  # a process may have seen no image
                dist.all_reduce(dim, op=dist.ReduceOp.MAX)
            found[detector][need] = accumulator.reduce(procs, int(dim))
    return found


def as_tensor(values: Array, name: str, ndim: int) -> Tensor:
    """A tensor of an array of any float dtype. Raises ValueError, by ``name``: another ``ndim``, or not all finite."""
    if isinstance(values, Tensor):
        tensor = values.detach()
    else:
        array = np.asarray(values)
        if array.dtype.kind not in "fiub":
            raise ValueError(f"{name} is an array of {array.dtype}; expected real numbers")
        if array.dtype not in (np.float16, np.float32):
            array = array.astype(np.float64)
        tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    if tensor.ndim != ndim or not tensor.numel():
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {ndim} dimensions and at least one value")
    if not tensor.isfinite().all():
        raise ValueError(f"{name} has values that are not finite")
    return tensor


def as_pair(fake: Array, real: Array) -> tuple[Tensor, Tensor]:
    """Features (n, d) and (m, d) as tensors. Raises ValueError where they are not."""
    x, y = as_tensor(fake, "fake", 2), as_tensor(real, "real", 2)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"fake has {x.shape[1]} features and real {y.shape[1]}; expected the same number of each")
    return x, y
