"""What the C library does with memory that is freed."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of glibc's mallopt(3)


def keep_freed_memory() -> bool:
    """From now on this process keeps what it frees for its next need, where the library is glibc; whether it is so.

    By default blocks of over 32 MiB go back to the system, which clears their pages when it lends them again: four
    times what it takes to compute an elementwise function on them. A process that needs as much again in every step
    holds no more than before.
    """
    if not sys.platform.startswith("linux") or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    return bool(libc.mallopt(MMAP_MAX, 0) and libc.mallopt(TRIM_THRESHOLD, 2**31 - 1))
