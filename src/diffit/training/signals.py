"""Requests to stop: Ctrl-C, SIGTERM, the warnings of job schedulers, and a launcher that is gone."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Self

from diffit.utils.locks import lost

NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
STOPPING = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
PATIENCE = 8.0  # seconds for which a person who pressed Ctrl-C waits for a grid or a metric


@contextlib.contextmanager
def undisturbed(give_up: Callable[[], None]) -> Iterator[None]:
    """In the block, requests to stop do nothing, but that a person's Ctrl-C calls ``give_up``. On the main thread."""

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            give_up()

    before = {number: signal.signal(number, note) for number in STOPPING}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _CutShort(BaseException):
    """Leaves the work that may be cut short."""


class StopSignals:
    """Remembers the first signal and acknowledges it; a second Ctrl-C leaves at once.

    Attributes:
        number: of the first signal; None before.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.cutting = False
        self.waited = False
        self.launched = "TORCHELASTIC_RUN_ID" in os.environ
        self.parent = os.getppid()
        self.speaks = os.environ.get("RANK", "0") == "0"

    def __enter__(self) -> Self:
        # What is ignored stays so: nohup ignores SIGHUP, a shell the SIGINT of its jobs in the background.
        heard = [number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN]
        self.before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.number == signal.SIGINT and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether to stop: on a signal, or because the launcher of this process is gone."""
        if self.number is None and self.launched and os.getppid() != self.parent:
            self._note(signal.SIGTERM, None)
        return self.number is not None

    @property
    def in_haste(self) -> bool:
        """Whether whoever asked will not wait: all but a person at a terminal, who waits for a little."""
        return self.number is not None and (self.number != signal.SIGINT or self.launched or self.waited)

    def unless_in_haste(self, work: Callable[[], None]) -> None:
        """Do ``work`` that can be made again, such as a grid or a metric: it is cut short where someone is in haste."""
        self.cutting = True
        try:
            if not self.in_haste:
                work()
        except _CutShort:
            pass
        finally:
            self.cutting = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if lost.is_set():  # the run is another process's now: nothing may be written
            raise KeyboardInterrupt
        if self.number is not None:
            # A launcher passes on the Ctrl-C that the terminal has sent already.
            if number == self.number == signal.SIGINT and not self.launched:
                raise KeyboardInterrupt
            return
        self.number = number
        if self.speaks:  # not by a logger or console, which may be at work right now
            with contextlib.suppress(OSError):  # the terminal may be what is gone
                os.write(2, b"\nstopping after this step, and saving; Ctrl-C once more leaves at once\n")
        if not self.in_haste and hasattr(signal, "setitimer"):
            self.before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._lose_patience)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        if self.cutting and self.in_haste:
            raise _CutShort

    def _lose_patience(self, number: int, frame: FrameType | None) -> None:
        self.waited = True
        if self.cutting:
            raise _CutShort
