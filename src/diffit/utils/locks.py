"""One command at a time in a folder.

The lock is a ``filelock.SoftFileLease``: a file made with ``O_EXCL`` that names process, host and the process's start,
and whose modification time is a heartbeat. ``fcntl`` and ``flock`` would need no heartbeat, but on network file
systems, where runs and samples usually are, they are often refused or known to one host only. Taking over the lock of
a dead process without a race is the difficult part, and why it is not written here.
"""

import _thread
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from filelock import LeaseCompromise, LeaseSettingsMismatch, SoftFileLease, Timeout

from diffit.errors import UserError
from diffit.utils.files import disk_errors

logger = logging.getLogger(__name__)

NAME = ".lock"
lost = threading.Event()
"""Set when another process has taken a lock of this one: nothing may be written where it was."""
HEARTBEAT = 5.0  # seconds; a second command is told at the next beat of the first
LEASE = 180.0  # seconds without a heartbeat after which a process that cannot be looked up counts as dead


@contextmanager
def exclusive(path: Path, remedy: str, *, beside: bool = False) -> Iterator[None]:
    """Hold the lock of ``path``, an existing folder, for the block; it is released however the block ends.

    The lock of a process of this host that has died is taken over at once, that of one elsewhere (another host, another
    container) after 3 minutes without a heartbeat. A process that loses its lock nevertheless is interrupted.

    Args:
        remedy: what else can be done than wait, such as ``use another --outdir``.
        beside: put the lock file next to ``path``, which may then be a file or not exist, instead of into it.

    Raises UserError where another process holds it, or a thread of this one.
    """
    named = Path(os.path.abspath(path))  # "." has no name
    file = named.parent / f".{named.name}{NAME}" if beside else path / NAME
    with disk_errors(path):
        lock = _lease(file)
        holder = _Holder(lock, file)
        try:
            lock.acquire(timeout=LEASE + 2 * HEARTBEAT, poll_interval=0.1, cancel_check=holder.is_alive)
        except (Timeout, LeaseSettingsMismatch):
            raise UserError(f"{path}: in use by {holder}; wait for it, or {remedy}") from None
    try:
        yield
    finally:
        lock.release()


def is_free(path: Path) -> bool:
    """Whether no living process holds the lock of the folder ``path``, found out without waiting."""
    lock = _lease(path / NAME)
    try:
        lock.acquire(timeout=0)
    except (Timeout, LeaseSettingsMismatch, OSError):
        return False
    lock.release()
    return True


def _lease(file: Path) -> SoftFileLease:
    return SoftFileLease(
        file, lease_duration=LEASE, heartbeat_interval=HEARTBEAT, on_compromise=_interrupt, thread_local=False
    )


class _Holder:
    """Who holds a lock that is waited for. filelock itself takes over from the dead that it can look up."""

    def __init__(self, lock: SoftFileLease, file: Path) -> None:
        self.lock, self.file = lock, file
        self.first_beat = self._beat()
        self.began = time.monotonic()
        self.warned = False

    def _beat(self) -> int | None:
        try:
            return self.file.stat().st_mtime_ns
        except OSError:  # released meanwhile
            return None

    def is_alive(self) -> bool:
        """Whether there was a heartbeat since, or the process is here and only stopped (Ctrl-Z)."""
        beat = self._beat()
        if self.first_beat is None or beat is None:
            self.first_beat = beat
            return False
        if beat != self.first_beat:
            return True
        if self._look_up().get("status") == psutil.STATUS_STOPPED:
            return True
        if not self.warned and time.monotonic() - self.began > 2 * HEARTBEAT:
            self.warned = True
            logger.warning("%s: no heartbeat of %s; waiting up to %.0f s for one", self.file, self, LEASE)
        return False

    def _look_up(self) -> dict[str, Any]:
        """Its state and the time of its start, where it is a process of this host."""
        owner = self.lock.owner
        if owner is None or owner.hostname.partition("?")[0] != socket.gethostname():  # "?" begins a container's mark
            return {}
        try:
            found: dict[str, Any] = psutil.Process(owner.pid).as_dict(["status", "create_time"])
        except psutil.Error:
            return {}
        return found

    def __str__(self) -> str:
        owner, began = self.lock.owner, self._look_up().get("create_time")
        if owner is None:
            return "another process"
        since = "" if began is None else time.strftime(" since %Y-%m-%d %H:%M", time.localtime(began))
        return f"process {owner.pid} on {owner.hostname.partition('?')[0]}{since}"


def _interrupt(loss: LeaseCompromise) -> None:
    """On the heartbeat's thread: two must not write, and only the main thread can be made to stop."""
    if loss.reason == "owner-changed":
        lost.set()
        logger.error("%s: another process took this one for dead and its place; stopping", loss.lock_file)
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # by nohup, or a shell's `&`
            os.kill(os.getpid(), signal.SIGTERM)
        _thread.interrupt_main()
    else:
        logger.warning("%s: the lock is lost (%s); start nothing else in that folder", loss.lock_file, loss.reason)
