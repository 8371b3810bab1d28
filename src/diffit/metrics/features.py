"""One pass over images for everything that metrics ask of them, on any number of processes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from diffit.errors import UserError
from diffit.metrics.detectors import Detector
from diffit.metrics.frechet import Moments
from diffit.metrics.images import Batches
from diffit.metrics.inception_score import ScoreSums
from diffit.utils.distributed import Processes


@dataclass(frozen=True)
class Need:
    """``what`` of a detector's ``output``, over the images at positions 0 to ``count`` − 1."""

    detector: str
    what: Literal["moments", "score", "rows"]
    output: Literal["pool", "spatial", "probabilities"]
    count: int


@dataclass
class Rows:
    """The features themselves, float32, for metrics of pairs. After ``reduce`` the first process has them in order."""

    parts: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)

    def add(self, positions: Tensor, features: Tensor) -> None:
        self.parts.append(features.float().cpu())
        self.positions.append(positions)

    def reduce(self, procs: Processes, dim: int) -> None:
        rows = torch.cat([*self.parts, torch.empty(0, dim)])
        positions = torch.cat([*self.positions, torch.empty(0, dtype=torch.int64)])
        if procs.count > 1:
            # Every process sends as many rows as the one with most; positions mark the ones that count.
            most = torch.tensor(len(rows), device=procs.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            padding = int(most) - len(rows)
            rows = _collect(procs, torch.cat([rows, rows.new_zeros(padding, dim)]))
            positions = _collect(procs, torch.cat([positions, positions.new_full((padding,), -1)]))
            rows, positions = rows[positions >= 0], positions[positions >= 0]
        self.parts, self.positions = [rows[positions.argsort()]], []

    @property
    def features(self) -> Tensor:
        (features,) = self.parts
        return features


Sums = Moments | ScoreSums | Rows


def _collect(procs: Processes, tensor: Tensor) -> Tensor:
    """The tensors of all processes one after the other, on the first; nothing on the others."""
    tensor = tensor.to(procs.device)
    parts = [torch.empty_like(tensor) for _ in range(procs.count)] if procs.is_first else None
    dist.gather(tensor, parts)
    return torch.cat(parts).cpu() if parts is not None else tensor[:0].cpu()


def gather(
    needs: Collection[Need], batches: Batches, detectors: Mapping[str, Detector], procs: Processes
) -> dict[Need, Sums]:
    """Run the ``batches`` of this process through the ``detectors`` (by name) and add up over all processes.

    All processes call this together, with the same ``needs``. An error on one is raised on all.
    """
    found = {need: _empty(need, procs.device) for need in dict.fromkeys(needs)}  # in the same order everywhere
    used = {need.detector: detectors[need.detector] for need in found}
    dims: dict[tuple[str, str], int] = {}
    shape: tuple[int, ...] | None = None
    with procs.together():
        for positions, images in batches:
            shape = shape or tuple(images.shape[1:])
            for name, detector in used.items():
                if not detector.any_size and tuple(images.shape[1:]) != shape:
                    raise UserError(
                        f"images of several sizes, which inception takes and detector {detector.name} does not"
                    )
                outputs = detector(images)
                dims |= {(name, output): values.shape[1] for output, values in outputs.items()}
                for need, sums in found.items():
                    if need.detector == name:
                        _add(sums, need, positions, outputs[need.output])
    for need, sums in found.items():
        dim = torch.tensor(dims.get((need.detector, need.output), 0), device=procs.device)
        if procs.count > 1:  # a process may have seen no image
            dist.all_reduce(dim, op=dist.ReduceOp.MAX)
        sums.reduce(procs, int(dim))
    return found


def _empty(need: Need, device: torch.device) -> Sums:
    if need.what == "score":
        return ScoreSums(need.count, device=device)
    return Moments(device) if need.what == "moments" else Rows()


def _add(sums: Sums, need: Need, positions: Tensor, values: Tensor) -> None:
    inside = positions < need.count
    if not inside.all():
        positions, values = positions[inside], values[inside.to(values.device)]
    if not len(positions):
        return
    if isinstance(sums, Moments):
        sums.add(values)
    else:
        sums.add(positions, values)
