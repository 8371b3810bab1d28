"""A process that gives up what a program of others could do harm with, where the kernel can hold it to that."""

import ctypes
import os
import struct
import sys
from pathlib import Path

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls of Landlock, the same on every architecture
VERSION_FLAG, PATH_BENEATH, NO_NEW_PRIVILEGES = 1, 1, 38
EXECUTE, WRITE_FILE = 1 << 0, 1 << 1
REMOVE_AND_MAKE = sum(1 << bit for bit in range(4, 13))
REFER, TRUNCATE = 1 << 13, 1 << 14  # since versions 2 and 3
TCP = 0b11  # to bind and to connect, since version 4


def give_up_writing(*, but_below: Path | None = None) -> bool:
    """From now on this thread, and those that it starts, write, make and remove no file and run no program.

    Nor does it connect to anything by TCP, where the kernel knows of that. ``but_below`` is a folder whose files may be
    written to: those of devices. Returns whether it is so: Linux has Landlock since 5.13, where it is switched on.
    See landlock(7).
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    version = libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION_FLAG)
    if version < 1:
        return False
    denied = EXECUTE | WRITE_FILE | REMOVE_AND_MAKE | (REFER if version >= 2 else 0) | (TRUNCATE if version >= 3 else 0)
    attributes = struct.pack("=QQ", denied, TCP) if version >= 4 else struct.pack("=Q", denied)
    ruleset = libc.syscall(CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    if ruleset < 0:
        return False
    try:
        if but_below is not None:
            folder = os.open(but_below, os.O_PATH | os.O_CLOEXEC)
            try:
                rule = struct.pack("=Qi", denied & (WRITE_FILE | TRUNCATE), folder)
                if libc.syscall(ADD_RULE, ruleset, PATH_BENEATH, rule, 0):
                    return False
            finally:
                os.close(folder)
        libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        return bool(libc.syscall(RESTRICT_SELF, ruleset, 0) == 0)
    finally:
        os.close(ruleset)
