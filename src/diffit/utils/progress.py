"""One progress bar for everything that takes a while."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_A_LINE = 30


def duration(seconds: float) -> str:
    """Two units are enough: ``3 h 20 min``."""
    seconds = round(seconds)
    for unit, size, part, part_size in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{seconds // size} {unit} {seconds % size // part_size} {part}"
    return f"{seconds} s"


def minutes_text(minutes: float) -> str:
    return f"{minutes:g} minute{'' if minutes == 1 else 's'}"


@contextmanager
def progress(title: str, *, quiet: bool = False, lines: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Yields ``show(done, total)``, which draws a bar on stderr if that is a terminal.

    Elsewhere it draws nothing, or with ``lines`` prints a plain line every half minute and at the end.
    ``quiet`` is for the processes that leave the talking to the first.
    """
    console = Console(stderr=True, quiet=quiet)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    shown = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal shown
        bar.update(task, completed=done, total=total)
        if bar.disable and lines and (done == total or time.monotonic() - shown > SECONDS_A_LINE):
            console.print(f"{title}: {done} of {total}", markup=False, highlight=False, soft_wrap=True)
            shown = time.monotonic()

    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield show
