"""What the C library does with memory that is freed, and how much is free."""

import ctypes
import sys

import psutil

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's mallopt(3)


def keep_freed_memory() -> bool:
    """From now on this process keeps what it frees for its next need, where the library is glibc; whether it is so.

    By default blocks of over 32 MiB go back to the system, which clears their pages when it lends them again: four
    times what it takes to compute an elementwise function on them. A process that needs as much again in every step
    holds no more than before. It holds of its first thread's memory, which is the one that computes.
    """
    libc = _glibc()
    return libc is not None and bool(libc.mallopt(MMAP_MAX, 0) and libc.mallopt(TRIM_THRESHOLD, -1))


def free_memory() -> int:
    """Bytes that this process may still take; what it keeps and does not use is given back first."""
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)
    return int(psutil.virtual_memory().available)


def _glibc() -> ctypes.CDLL | None:
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None
