"""Processes: one without a launcher, or those that torchrun started."""

import logging
import os
import re
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffit.errors import UserError
from diffit.utils.files import disk_errors

logger = logging.getLogger(__name__)

# The first process may work alone for long (statistics of a large archive, packing 50,000 samples) while others wait.
PATIENCE = timedelta(hours=6)


ANSWER = timedelta(seconds=5)  # that a process which is at work has to say so
SEEN_WITHIN = 5.0  # seconds that a file server may need to show one node what another has written


@dataclass(frozen=True)
class Processes:
    """This process among the others."""

    rank: int
    count: int
    device: torch.device
    steps: Any = None
    """The group that training steps in, where no process waits long for another; None is the patient one."""
    watch: Any = None
    """A group to ask who is still there."""

    def impatient(self, minutes: float) -> "Processes":
        """The same processes, of which those left have saved and gone when one hangs in a training step for so long.

        All call this together.
        """
        if self.count == 1:
            return self
        limit = timedelta(minutes=minutes)
        limit -= min(2 * ANSWER, limit / 2)  # in which they ask who it is, and save
        return replace(self, steps=dist.new_group(timeout=limit), watch=dist.new_group(backend="gloo", timeout=limit))

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.count > 1:
            dist.barrier()

    def broadcast(self, value: Any) -> Any:
        """The first process's ``value`` (anything JSON-like), on all of them."""
        if self.count == 1 or not dist.is_initialized():
            return value
        box = [value]
        dist.broadcast_object_list(box, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def require_same(self, value: Any, place: str | Path, things: str, remedy: str) -> None:
        """UserError on all unless each has the ``value`` (JSON-like) of process 0 for the ``things`` at ``place``.

        Nodes may each have a copy on a disk of their own, or read while another writes.
        """
        first = self.broadcast(value)
        with self.together():
            if value != first:
                raise UserError(f"{place}: {socket.gethostname()} has other {things} there than process 0; {remedy}")

    def wait_for_first(self) -> None:
        """Until the first process, which may work alone for long, comes here too; then for each other as in a step."""
        if self.count > 1:
            token = torch.zeros(1, device=self.device)
            dist.broadcast(token, src=0)
            token.item()  # NCCL's call returns at once: the steps' limit must not run while the first is at work
            dist.barrier(group=self.steps)

    def maxima(self, values: Sequence[int]) -> list[int]:
        """The largest of all processes' values at each place, asked for in the group of the steps."""
        return self._maxima(values, self.steps)

    def missing(self) -> str | None:
        """After a failed step: which processes do not answer any more, in words; None where that cannot be told."""
        try:
            dist.monitored_barrier(self.watch, timeout=ANSWER, wait_all_ranks=True)
        except RuntimeError as error:
            if named := re.search(r"Ranks ([\d, ]+) failed", str(error)):
                return f"process {named[1]} of {self.count} (counted from 0) does not answer any more"
            if self.rank and "rank 0" in str(error) and "Connection" not in str(error):
                return f"process 0 of {self.count} does not answer any more"
        return None

    def max(self, value: int) -> int:
        """The largest of all processes' values."""
        return self._maxima([value], None)[0]

    def _maxima(self, values: Sequence[int], group: Any) -> list[int]:
        if self.count == 1 or not dist.is_initialized():
            return list(values)
        tensor = torch.tensor(values, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
        found: list[int] = tensor.tolist()
        return found

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error in this block on one process is raised on all, so that none waits for one that has gone.

        The block itself must not wait for other processes.
        """
        if self.count == 1:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
            # At once: the others may be at work for long before they hear of it.
            logger.error("process %d of %d: %s", self.rank, self.count, caught)
        messages: list[str | None] = [None] * self.count
        text = str(error) if isinstance(error, UserError) else repr(error)
        dist.all_gather_object(messages, None if error is None else text)
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise UserError(f"process {rank} of {self.count}: {message}")


def is_lost_connection(error: Exception) -> bool:
    """Whether a collective failed because another process is gone, or did not answer in time."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def alone(device: torch.device | str | None = None) -> Processes:
    """This process without others, on a GPU where there is one."""
    return Processes(0, 1, pick_device() if device is None else torch.device(device))


def pick_device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local, count = os.environ.get("LOCAL_RANK", "0"), torch.cuda.device_count()
    bound = count == 1 and local == os.environ.get("SLURM_LOCALID")  # srun shows each of its tasks one GPU alone
    index = 0 if bound else int(local)
    if index >= count:
        raise UserError(f"process {index + 1} of this machine finds {count} GPUs: give --nproc_per_node={count}")
    return torch.device("cuda", index)


def _keeps_store() -> bool:
    """Whether torchrun itself keeps the addresses of the processes, from one start of them to the next."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


@contextmanager
def processes(*, join: bool = True) -> Iterator[Processes]:
    """Join the process group that torchrun's environment describes, and leave it at the end.

    After an error it is not left: that may wait for processes which themselves wait for this one.
    Without ``join`` they are only counted, for what does not need the others.
    """
    count = int(os.environ.get("WORLD_SIZE", 1))
    if join and count > 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and _keeps_store():
        raise UserError(
            "torchrun started this again with the addresses of the processes before, to which nobody would answer "
            "(pytorch issue 135712): set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun starts"
        )
    if not join:
        try:
            device = pick_device()
        except UserError:  # more processes are planned than this machine has GPUs
            device = torch.device("cuda", 0)
        yield Processes(rank=int(os.environ.get("RANK", 0)), count=count, device=device)
        return
    device = pick_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if count == 1:
        yield Processes(rank=0, count=1, device=device)
        return
    if device.type == "cuda":
        dist.init_process_group("nccl", device_id=device, timeout=PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=PATIENCE)
    yield Processes(rank=dist.get_rank(), count=count, device=device)
    dist.destroy_process_group()


def require_shared(outdir: Path, procs: Processes, option: str = "--outdir") -> None:
    """UserError unless all processes see the same ``outdir``: nodes may each have a disk of their own there."""
    if procs.count == 1:
        return
    mark = outdir / procs.broadcast(f".shared-{uuid.uuid4().hex}" if procs.is_first else None)
    try:
        with procs.together():
            if procs.is_first:
                with disk_errors(mark):
                    mark.touch()
        with procs.together():
            deadline = time.monotonic() + SEEN_WITHIN
            while not mark.exists():
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{outdir}: {socket.gethostname()} does not see what process 0 writes there; use a folder as "
                        f"{option} that all nodes share, or one node"
                    )
                time.sleep(0.1)
    finally:
        if procs.is_first:
            mark.unlink(missing_ok=True)
