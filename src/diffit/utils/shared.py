"""Memory that the processes of one machine share."""

import os
import socket
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from diffit.utils.distributed import Processes

NAME = "diffit"


def shared_tensor(shape: tuple[int, ...], dtype: torch.dtype, procs: Processes) -> tuple[Tensor, int, int]:
    """A tensor of which the processes of a machine have one copy, and whose values are not set yet.

    Also the place of this process among those that share it, and how many they are: 0 and 1 where they cannot, and each
    has its own. All processes call this together. The memory is the system's again when the last of them is gone; no
    file has a name for it.
    """
    if procs.count == 1:
        return torch.empty(shape, dtype=dtype), 0, 1
    here: list[str | None] = [None] * procs.count
    dist.all_gather_object(here, _kernel())
    mates = [rank for rank, machine in enumerate(here) if machine == here[procs.rank]]
    owned = _reserve(prod(shape) * dtype.itemsize) if procs.rank == mates[0] and _kernel() else None
    places: list[tuple[int, int] | None] = [None] * procs.count
    dist.all_gather_object(places, None if owned is None else (os.getpid(), owned))
    place, tensor = places[mates[0]], None
    if place is not None:
        try:
            file = "/proc/{}/fd/{}".format(*place)
            if os.readlink(file).startswith(f"/memfd:{NAME}"):  # another machine may have another file by that number
                tensor = torch.from_file(file, shared=True, size=prod(shape), dtype=dtype)
        except (RuntimeError, OSError):  # a container that does not show the processes of another
            tensor = None
    failed = procs.max(tensor is None)
    if owned is not None:
        os.close(owned)
    if failed or tensor is None:
        return torch.empty(shape, dtype=dtype), 0, 1
    return tensor.view(shape), mates.index(procs.rank), len(mates)


def _kernel() -> str | None:
    """The same on all processes that see each other's file descriptors; None where there is no such thing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return boot + socket.gethostname() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _reserve(size: int) -> int | None:
    """The descriptor of a file in memory."""
    try:
        descriptor = os.memfd_create(NAME)
        os.ftruncate(descriptor, size)
    except (AttributeError, OSError):
        return None
    return descriptor
