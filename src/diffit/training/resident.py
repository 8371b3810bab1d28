"""A training set as one tensor: on the device, or in memory that the processes of a machine share."""

import os
import time

import torch
from torch import Tensor

from diffit.data.open import Archive
from diffit.utils.distributed import Processes
from diffit.utils.memory import free_memory
from diffit.utils.progress import duration
from diffit.utils.shared import shared_tensor

SHARE = 0.25  # of the free memory may go to keeping the decoded images
CHUNK = 2**23  # bytes that are read at a time, or so many images, on which threads are kept busy
FEWEST = 64


def load_resident(archive: Archive, procs: Processes, workers: int) -> tuple[Tensor | None, str]:
    """All images as one tensor, on the device or in memory, where they fit; None where they must be streamed.

    And what to say of it. All processes call this together; in memory those of a machine keep one copy, of which they
    read a part each.
    """
    began, first = time.monotonic(), archive[0]
    shape, need = (len(archive), *first.shape), len(archive) * first.nbytes
    on_device = procs.device.type == "cuda" and fits(need, torch.cuda.mem_get_info(procs.device)[0])
    streamed = f"streamed by {workers} workers: {need / 2**30:.1f} GiB do not fit"
    if procs.max(not on_device) == 0:
        images, place, sharers = torch.empty(shape, dtype=first.dtype, device=procs.device), 0, 1
        where = "on the device"
    elif procs.max(not fits(need, free_memory())):
        return None, streamed
    else:
        images, place, sharers = shared_tensor(shape, first.dtype, procs)
        copies = 1 if sharers > 1 else int(os.environ.get("LOCAL_WORLD_SIZE", procs.count))
        if procs.max(not fits(need * copies, free_memory())):  # nothing is written to it yet
            return None, f"{streamed} {copies} times"
        where = "in memory" if sharers == 1 else f"in memory, one copy for {sharers} processes"
    rows = max(CHUNK // first.nbytes, FEWEST)
    with procs.together():
        for start in range(place * rows, len(archive), sharers * rows):
            part = range(start, min(start + rows, len(archive)))
            images[part.start : part.stop] = archive.load(part)
    return images, f"{need / 2**20:.0f} MiB {where}, decoded in {duration(time.monotonic() - began)}"


def fits(need: int, free: int) -> bool:
    return need <= free * SHARE
