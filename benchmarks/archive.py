"""Archives of very many images: to open one, a pickle of it, a worker, and the commands that people start.

``python -m benchmarks.archive 100000 1300000``; with ``--beside SRC`` the code in another checkout's ``src`` is
measured on the same archives. CPU seconds, since such a machine is seldom idle.
"""

import argparse
import io
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "images",
    "code",
    "opened",
    "open s",
    "hash s",
    "peak MiB",
    "pickle KiB",
    "worker MiB",
    "dry run s",
    "step s",
    "resume s",
)


def write_large(path: Path, count: int, classes: int = 1000) -> None:
    """A zip of ``count`` tiny images as ``diffit data convert`` lays it out; zipfile would take ten times as long."""
    from diffit.data.sums import format_sums

    rng, pictures = np.random.default_rng(0), []
    for _ in range(64):
        encoded = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(encoded, "PNG")
        pictures.append(encoded.getvalue())
    sums = [zlib.crc32(picture) for picture in pictures]
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(count)]
    meta = json.dumps({"labels": [[name, i * classes // count] for i, name in enumerate(names)]}).encode()
    listed = {name: sums[i % 64] for i, name in enumerate(names)} | {"dataset.json": zlib.crc32(meta)}

    def members() -> Iterator[tuple[bytes, bytes, int]]:
        for i, name in enumerate(names):
            yield name.encode(), pictures[i % 64], sums[i % 64]
        for name, data in (("dataset.json", meta), ("dataset.sfv", format_sums(listed.items()))):
            yield name.encode(), data, zlib.crc32(data)

    directory, at = [], 0
    with path.open("wb", buffering=1 << 22) as file:
        for name, data, crc in members():
            common = struct.pack("<5H3I2H", 20, 0, 0, 0, 33, crc, len(data), len(data), len(name), 0)
            file.write(b"PK\3\4" + common + name + data)
            directory.append(b"PK\1\2\24\3" + common + struct.pack("<3H2I", 0, 0, 0, 0o644 << 16, at) + name)
            at += 30 + len(name) + len(data)
        body, entries = b"".join(directory), len(directory)
        file.write(body + struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, entries, entries, len(body), at))
        file.write(struct.pack("<4sIQI", b"PK\6\7", 0, at + len(body), 1))
        file.write(
            struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, min(entries, 0xFFFF), min(entries, 0xFFFF), len(body), at, 0)
        )


def one(path: str) -> dict[str, float]:
    """In a process of its own: open, hash, pickle, and read a thousand images in a forked worker."""
    import psutil

    from diffit.data import ImageArchive

    process = psutil.Process()
    Path("/proc/self/clear_refs").write_text("5")
    before, began = process.memory_info().rss, time.process_time()
    archive = ImageArchive(path, cond=True)
    opened = time.process_time()
    assert len(archive.content_hash) == 64
    hashed = time.process_time()
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) - before
    size = len(pickle.dumps(archive))
    reader, writer = os.pipe()
    if not os.fork():
        chosen = np.random.default_rng(0).integers(0, len(archive), 1000).tolist()
        own()  # asking takes memory itself, the first time
        start = own()
        for i in chosen:
            archive[i]
        os.write(writer, str(own() - start).encode())
        os._exit(0)
    os.wait()
    worker = int(os.read(reader, 100))
    return {
        "open s": opened - began, "hash s": hashed - opened, "peak MiB": peak / 2**20,
        "pickle KiB": size / 2**10, "worker MiB": worker / 2**20,
    }  # fmt: skip


def own() -> int:
    """Bytes that this process alone has written to: the pages of a kept index are one copy for all that map it."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("Private_Dirty")))


STREAMED = """
from diffit.training import loop
loop.load_resident = lambda archive, procs, workers: (None, "streamed, as images of usual size would be")
from diffit.cli import main
main()
"""


def seconds(environment: dict[str, str], *words: object, program: tuple[str, ...] = ("-m", "diffit")) -> float:
    """CPU seconds of a whole command and its workers."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, *program, *map(str, words)]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(path: Path, environment: dict[str, str]) -> dict[str, float]:
    """What people start, each with the start of Python and torch in it; the steps are of a tiny network."""
    outdir = path.parent / f"runs-{len(list(path.parent.iterdir()))}"
    train = ["train", "--data", path, "--outdir", outdir, "--preset", "debug", "--cond", "--batch", 8, "--workers", 2,
             "--grid", "2x2"]  # fmt: skip
    how = {"program": ("-c", STREAMED)}
    return {
        "dry run s": seconds(environment, "train", "--data", path, "--outdir", outdir, "--dry-run"),
        "step s": seconds(environment, *train, "--kimg", 0.008, **how),
        "resume s": seconds(environment, *train, "--kimg", 0.016, **how),
    }


def rows(path: Path, sources: dict[str, Path], cache: str) -> Iterator[dict[str, object]]:
    for code, source in sources.items():
        environment = {**os.environ, "PYTHONPATH": f"{source}:{ROOT}", "DIFFIT_CACHE": cache, "OMP_NUM_THREADS": "1"}
        for opened in ("first", "again"):
            child = [sys.executable, "-m", "benchmarks.archive", "--one", str(path)]
            found = json.loads(subprocess.run(child, env=environment, check=True, stdout=subprocess.PIPE).stdout)
            yield {"code": code, "opened": opened} | found | commands(path, environment)
        if code == "this":
            checked = seconds(environment, "data", "check", path, "--no-grid")
            reference = seconds(environment, "metrics", "ref", "--data", path, "--detector", "pixels", "--dest",
                                path.with_suffix(".npz"))  # fmt: skip
            print(f"every image read: data check {checked:.0f} s, metrics ref {reference:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("counts", nargs="*", type=int, default=[100_000, 400_000])
    parser.add_argument("--beside", type=Path, metavar="SRC", help="Other code to measure on the same archives.")
    parser.add_argument("--one", metavar="ZIP", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one)))
        return
    sources = {} if arguments.beside is None else {"beside": arguments.beside}
    print("  ".join(f"{column:>10}" for column in COLUMNS))
    for count in arguments.counts:
        with tempfile.TemporaryDirectory() as folder:
            write_large(path := Path(folder) / "large.zip", count)
            for row in rows(path, sources | {"this": ROOT / "src"}, folder):
                shown = [count, *(row[column] for column in COLUMNS[1:])]
                print(
                    "  ".join(f"{cell:10.3g}" if isinstance(cell, float) else f"{cell:>10}" for cell in shown),
                    flush=True,
                )


if __name__ == "__main__":
    main()
