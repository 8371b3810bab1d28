"""Timing in turns, peak memory in a process of its own, and the name of the machine."""

import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def machine() -> str:
    """Processor or GPU, threads and versions: a figure without them says nothing."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    gpu = f", {torch.cuda.get_device_name()}" if DEVICE.type == "cuda" else ""
    return (
        f"{name}, {torch.get_num_threads()} threads{gpu}; Python {platform.python_version()}, torch {torch.__version__}"
    )


def seconds(run: Callable[[], object]) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(*runs: Callable[[], object], rounds: int = 7) -> list[float]:
    """Median seconds of each, measured one after the other in every round, so that noise meets all alike."""
    for run in runs:
        run()
    times = [[seconds(run) for run in runs] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def reset_peak() -> None:
    """Forget the peak so far, where the system can: importing torch takes more than a small benchmark."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib() -> float:
    """The most memory this process has had since :func:`reset_peak`: on the GPU where there is one, else resident."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # bytes, on macOS


def peak_of(module: str, *arguments: object) -> float:
    """What ``python -m module arguments`` prints as its last word, in MiB: a peak needs a fresh process."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return float(output.split()[-1])
