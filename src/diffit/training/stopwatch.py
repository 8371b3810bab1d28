"""The time that a run takes."""

import threading
import time
from types import TracebackType
from typing import Self

STOPPED = 10.0  # seconds without a look at the clock, after which this process was not running


class Stopwatch:
    """Seconds of a run, without those in which its process was stopped: by Ctrl-Z, a scheduler, or with its machine.

    Args:
        before: seconds that count already.
    """

    def __init__(self, before: float = 0.0) -> None:
        self.looked = time.monotonic()
        self.began = self.looked - before
        self.lock, self.closed = threading.Lock(), threading.Event()

    def __enter__(self) -> Self:
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closed.set()

    def seconds(self) -> float:
        with self.lock:
            now = time.monotonic()
            if now - self.looked > STOPPED:
                self.began += now - self.looked
            self.looked = now
            return now - self.began

    def _watch(self) -> None:
        while not self.closed.wait(1):
            self.seconds()
