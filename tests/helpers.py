"""What several test files need: a small archive, and the command line as a user runs it."""

import atexit
import io
import json
import multiprocessing
import os
import runpy
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
from PIL import Image


def write_archive(
    path: Path, count: int = 24, *, side: int = 16, channels: int = 3, classes: int = 3, in_order: bool = False
) -> Path:
    """A zip laid out as EDM's tool lays it out: smooth pictures whose colour tells the class.

    Its classes take turns, or follow one another ``in_order`` as those of a folder of folders do.
    """
    rng = np.random.default_rng(count + side)
    y, x = np.mgrid[:side, :side] / side
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            label = i * classes // count if in_order else i % classes
            phase = rng.uniform(0, 2 * np.pi, size=channels)
            waves = [np.sin(2 * np.pi * ((label + 1) * x + y) + p) for p in phase]
            pixels = np.round(127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
            encoded = io.BytesIO()
            Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(encoded, "PNG")
            name = f"00000/img{i:08d}.png"
            archive.writestr(name, encoded.getvalue())
            labels.append([name, label])
        archive.writestr("dataset.json", json.dumps({"labels": labels, "class_names": ["ant", "bee", "cat"][:classes]}))
    return path


FORKS = multiprocessing.get_context("forkserver")
"""Forks of a process that has torch and diffit loaded already: loading takes seconds of a core, each time."""
if sys.platform == "linux":
    FORKS.set_forkserver_preload(["diffit.cli.train", "diffit.training", "diffit.metrics", "scipy.linalg"])


def _be(program: str, arguments: list[str], output: Path, folder: Path | None, environment: dict[str, str]) -> None:
    """The program, a file or a module, as the interpreter would run it."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    import torch

    torch.set_num_threads(1)  # so that runs compare
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # the default
    os.environ.clear()
    os.environ.update(environment)
    if folder is not None:
        os.chdir(folder)
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


def start(
    program: str, *arguments: object, output: Path, folder: Path | None = None, processes: int = 1, **environment: str
) -> list[BaseProcess]:
    """Processes of a file or a module, with what torchrun tells its own where there are several.

    What they print is appended to ``stdout`` and ``stderr`` in ``output``; they run in ``folder``, where one is given.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    if processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test",
                        "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}  # fmt: skip
    started = []
    for rank in range(processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
        words = (program, list(map(str, arguments)), output, folder, environment | own)
        started.append(FORKS.Process(target=_be, args=words))
        started[-1].start()
        atexit.register(started[-1].kill)  # a test that fails before it waits for them must not leave them
    return started


def wait(started: list[BaseProcess], timeout: float = 240) -> int:
    """The first exit code that is not 0, upon which, as under torchrun, the other processes are ended."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        codes = [process.exitcode for process in started]
        failed = [code for code in codes if code]
        if failed or None not in codes:
            break
        time.sleep(0.02)
    else:
        failed = [-1]
    for process in started:
        process.kill()
        process.join()
    return failed[0] if failed else 0


def run(program: str, *arguments: object, **how: object) -> subprocess.CompletedProcess:
    with tempfile.TemporaryDirectory() as output:
        code = wait(start(program, *arguments, output=Path(output), **how))
        said = [path.read_text() if path.exists() else "" for path in (Path(output, "stdout"), Path(output, "stderr"))]
    return subprocess.CompletedProcess([program, *arguments], code, *said)


def command(
    *arguments: object, processes: int = 1, check: bool = True, **environment: str
) -> subprocess.CompletedProcess:
    """Run ``diffit …``, by several processes as under torchrun."""
    done = run("diffit", *arguments, processes=processes, **environment)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def write_vae(path: Path, *, latent_channels: int = 4, seed: int = 0) -> Path:
    """A folder as diffusers saves it: a tiny VAE of random weights, 8 x 8 pixels a latent position."""
    import torch
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=32,
        )
    vae.save_pretrained(path)
    return path


def run_processes(code: str, folder: Path, processes: int = 2) -> str:
    """Run Python text by several processes and return what it printed; an exception in any of them fails the test."""
    script = folder / "script.py"
    script.write_text(code)
    done = run(str(script), processes=processes)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def png_claiming(width: int, height: int) -> bytes:
    """A PNG whose header says so; its pixels are a few bytes of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )
