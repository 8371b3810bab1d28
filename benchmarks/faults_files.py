"""Damaged and hostile files: each is read as it was, or refused with a UserError of one line. Nothing else may happen.

    python -m benchmarks.faults_files [COUNT [SEED [KIND …]]]

mutates files of every kind that is read (bits flipped, bytes overwritten, cut short, JSON values of other types, text
that is not UTF-8), reads each as a command would, in a process of its own, and prints one row per kind.
"""

import gzip
import io
import json
import os
import random
import struct
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from diffit.cli.describe import describe_file
from diffit.configs.presets import get_preset
from diffit.data import ImageArchive, LatentArchive, check, convert
from diffit.data.encode import encode_archive
from diffit.errors import MESSAGE_LIMIT, UserError, printable
from diffit.metrics.images import NpzImages
from diffit.metrics.reference import read_arrays
from diffit.models import build
from diffit.models.autoencoder import Autoencoder
from diffit.training.checkpoint import load_state, verify_state
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import alone
from diffit.weights import load_network, save_network, state_hash

SECONDS = 20  # what one file may take
SAMPLES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    "",
    "\ud800",
    "x" * 40_000,
    [],
    {},
    [[]],
    {"a": 1},
    "NaN",
    -0.5,
)
"""JSON values that no one expects."""


@dataclass
class Row:
    """What became of the mutants of one kind of file."""

    kind: str
    refused: int = 0
    """With a UserError of one line."""
    same: int = 0
    """Read, to the same content."""
    other: int = 0
    """Read, to another content: of kinds without checksums."""
    faults: list[str] = field(default_factory=list)
    """Anything else: tracebacks, crashes, several lines, no end, unnoticed damage of kinds with checksums."""

    def __str__(self) -> str:
        counts = f"{self.refused:6} refused {self.same:6} same {self.other:6} other {len(self.faults):4} faults"
        line = f"{self.kind:14} {counts}"
        return "\n".join([line, *(f"    {text} ×{n}" for text, n in Counter(self.faults).most_common(8))])


@dataclass(frozen=True)
class Kind:
    """``write(folder)`` makes the good files, ``read(folder)`` all that a command would read of them, as a text."""

    write: Callable[[Path], object]
    read: Callable[[Path], object]
    whole: bool = False
    """Every change of what is read must be noticed."""


def _images(folder: Path, count: int = 4) -> None:
    rng = np.random.default_rng(0)
    for i in range(count):
        place = folder / f"class{i % 2}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(place / f"{i}.png")


def _converted(folder: Path, name: str) -> None:
    with tempfile.TemporaryDirectory() as raw:
        _images(Path(raw))
        convert(raw, folder / name, cond=True)


def _read_archive(path: Path) -> object:
    archive = ImageArchive(path, cond=True)
    found = archive.load_all().numpy().tobytes(), archive.labels, archive.class_names
    with suppress(UserError):
        check(path, cond=True)
    return found


def _network(folder: Path) -> None:
    config = get_preset("debug")
    model = config.model.model_copy(update={"num_classes": 3})
    data = config.data.model_copy(update={"class_names": ("ant", "bee", "cat"), "path": "pets.zip"})
    config = config.model_copy(update={"model": model, "data": data})
    torch.manual_seed(0)
    save_network(folder / "network.safetensors", build(config.model).state_dict(), config)


def _read_network(folder: Path) -> object:
    path = folder / "network.safetensors"
    net, config = load_network(path)
    describe_file(path)
    return state_hash(net.state_dict()), config


def _read_header(folder: Path) -> object:
    net, config = load_network(folder / "network.safetensors", verify=False)
    describe_file(folder / "network.safetensors")
    return state_hash(net.state_dict()), config


def _state(folder: Path) -> None:
    config = get_preset("debug")
    (folder / "state").mkdir()
    Stepper(config, alone("cpu"), build_network(config), "fp32").save(folder / "state")


def _read_state(folder: Path) -> object:
    verify_state(folder / "state")
    tensors, about = load_state(folder / "state")
    return [state_hash(group) for group in tensors.values()], about


class _Latents:
    """In place of a VAE, whose kind of numbers does not matter here."""

    id, sha256, scale, tiling = "someone/vae", "0" * 64, 1.0, False

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        return 3, *image_size

    def encode(self, images: torch.Tensor, *, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        return images.float() / 64, images.float() / 255


def _latents(folder: Path) -> None:
    with tempfile.TemporaryDirectory() as place:
        _converted(Path(place), "pets.zip")
        encode_archive(Path(place) / "pets.zip", folder / "latents", cast(Autoencoder, _Latents()), shard_size=3)


def _read_latents(folder: Path) -> object:
    archive = LatentArchive(folder / "latents", cond=True)
    archive.check()
    one = archive[0].numpy().tobytes()
    return one, archive.load_all().numpy().tobytes(), archive.labels, archive.class_names, archive.content_hash


def _read_source(path: Path) -> object:
    """As convert does, which leaves damaged images out when asked to."""
    with tempfile.TemporaryDirectory() as place:
        convert(path, Path(place) / "a.zip", on_error="skip", frames="all", resolution=(8, 8))
        archive = ImageArchive(Path(place) / "a.zip")
        return archive.load_all().numpy().tobytes(), archive.class_names


def _idx(folder: Path, packed: bool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 7), np.uint8)
    for name, array in (("images-idx3", pixels), ("labels-idx1", np.arange(5, dtype=np.uint8))):
        data = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        path = folder / f"train-{name}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(data) if packed else data)


def _lmdb(folder: Path) -> None:
    import lmdb

    with lmdb.open(str(folder), map_size=1 << 20, lock=False) as env, env.begin(write=True) as txn:
        for i in range(20):
            data = io.BytesIO()
            Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(data, "PNG")
            txn.put(f"{i}".encode(), data.getvalue())


def _cifar(folder: Path) -> None:
    import pickle

    with tarfile.open(folder / "cifar.tar.gz", "w:gz") as tar:
        for i in range(1, 6):
            content = {b"data": np.full((3, 3072), i, np.uint8), b"labels": [0, 1, 2]}
            data = pickle.dumps(content, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/data_batch_{i}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _npz(folder: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", arr_0=rng.integers(0, 256, (5, 6, 7, 3), np.uint8))
    np.savez_compressed(folder / "stats.npz", mu=rng.normal(size=6), sigma=np.eye(6), detector="inception", images="10")


def _read_npz(folder: Path) -> object:
    images = NpzImages(folder / "images.npz")
    pixels = [row.numpy().tobytes() for row in images.rows(range(len(images)))]
    found, texts = read_arrays(folder / "stats.npz")
    return pixels, images.fingerprint(), [gaussian.mean for gaussian in found.values()], texts


KINDS = {
    "network": Kind(_network, _read_network, whole=True),
    "network header": Kind(_network, _read_header),
    "state": Kind(_state, _read_state, whole=True),
    "folder": Kind(lambda f: _converted(f, "pets"), lambda f: _read_archive(f / "pets"), whole=True),
    "zip": Kind(lambda f: _converted(f, "pets.zip"), lambda f: _read_archive(f / "pets.zip"), whole=True),
    "latents": Kind(_latents, _read_latents, whole=True),
    "class folders": Kind(lambda f: _images(f / "raw"), lambda f: _read_source(f / "raw")),
    "idx": Kind(lambda f: _idx(f, packed=False), _read_source),
    "gzip idx": Kind(lambda f: _idx(f, packed=True), _read_source),
    "CIFAR tar": Kind(_cifar, lambda f: _read_source(f / "cifar.tar.gz")),
    "LMDB": Kind(_lmdb, _read_source),
    "npz": Kind(_npz, _read_npz),
}


def mutate(data: bytes, rng: random.Random, *, one_bit: bool = False) -> bytes:
    """``data`` with one fault in it; with ``one_bit`` no more than a flipped bit."""
    if one_bit or rng.random() < 0.4 or not data:
        damaged = bytearray(data or b"\0")
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        return bytes(damaged)
    at, how = rng.randrange(len(data)), rng.randrange(6)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + rng.randbytes(rng.randrange(1, 9)) + data[at:]
    if how == 2:
        return data[:at] + data[at + rng.randrange(1, 9) :]
    if how == 3:  # a number becomes huge, or a length negative
        return data[:at] + rng.choice([b"\xff", b"\x7f", b"\0"]) * 8 + data[at + 8 :]
    if how == 4:
        return data[:at] + b"\xc3\x28\xff" + data[at + 3 :]
    return mutate_json(data, rng)


def mutate_json(data: bytes, rng: random.Random) -> bytes:
    """Another type somewhere in the JSON that ``data`` is or, as a safetensors file, begins with; else no change."""
    start, stop = 0, len(data)
    if data[8:9] == b"{":
        start, stop = 8, 8 + int.from_bytes(data[:8], "little")
    try:
        content = json.loads(data[start:stop])
    except ValueError:
        return data
    changed = json.dumps(_replace(content, rng)).encode()
    return (len(changed).to_bytes(8, "little") if start else b"") + changed + data[stop:]


def _replace(content: Any, rng: random.Random) -> Any:
    """A copy with one value replaced, going into what JSON texts in it say too."""
    value = rng.choice(SAMPLES)
    if isinstance(content, str) and content.startswith("{"):
        with suppress(ValueError):
            return json.dumps(_replace(json.loads(content), rng))
    if not content or not isinstance(content, dict | list) or rng.random() < 0.1:
        return value
    if isinstance(content, dict):
        key = "__metadata__" if "__metadata__" in content and rng.random() < 0.7 else rng.choice(list(content))
        key = "diffit_config" if "diffit_config" in content and rng.random() < 0.7 else key
        if rng.random() < 0.1:
            return {k: v for k, v in content.items() if k != key}
        return content | {key: _replace(content[key], rng)}
    at = rng.randrange(len(content))
    return [*content[:at], _replace(content[at], rng), *content[at + 1 :]]


def _outcome(kind: Kind, folder: Path, expected: str) -> str:
    """One word, or what went wrong."""
    try:
        return "same" if str(kind.read(folder)) == expected else "other"
    except UserError as error:
        message = str(error)
        if printable(message, MESSAGE_LIMIT + 100) != message:
            return f"not one line: {message[:80]!r}"
        return "refused"
    except Exception as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f"{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""
        return f"{type(error).__name__} at {where}: {str(error)[:80]}"


def _in_a_child(work: Callable[[], str]) -> str:
    """``work()`` in a forked process: a library that crashes is a fault of one file, not the end of the trial."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        import signal

        signal.alarm(SECONDS)
        os.write(write, work().encode("utf-8", "replace")[:4000])
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if status:
        return f"ended by signal {status & 127}" if status & 127 else f"exit status {status >> 8}"
    return answer


def trials(kind: Kind, folder: Path, rng: random.Random, count: int) -> Iterator[tuple[str, str]]:
    """(what became of it, the file that was mutated) of each mutant; the files are as they were afterwards."""
    kind.write(folder)
    expected = str(kind.read(folder))
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for _ in range(count):
        path = rng.choice(files)
        content = path.read_bytes()
        path.write_bytes(mutate(content, rng))
        yield _in_a_child(lambda: _outcome(kind, folder, expected)), path.name
        path.write_bytes(content)


def trial(name: str, count: int, seed: int) -> Row:
    """The row of ``count`` mutants of one kind."""
    kind, row = KINDS[name], Row(name)
    with tempfile.TemporaryDirectory() as folder:
        for outcome, file in trials(kind, Path(folder), random.Random(f"{seed} {name}"), count):
            if outcome in ("refused", "same") or (outcome == "other" and not kind.whole):
                setattr(row, outcome, getattr(row, outcome) + 1)
            else:
                row.faults.append(f"{file}: {'damage was not noticed' if outcome == 'other' else outcome}")
    return row


def run(count: int = 1100, seed: int = 0, kinds: Sequence[str] = tuple(KINDS)) -> list[Row]:
    """``count`` mutants shared out over ``kinds``, the same for the same ``seed``."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of the others
    try:
        return [trial(name, -(-count // len(kinds)), seed) for name in kinds]
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    number, start, *chosen = [*sys.argv[1:], "1100", "0"][: max(2, len(sys.argv) - 1)]
    chosen = chosen or list(KINDS)
    faults = 0
    for kind_name in chosen:
        (found,) = run(int(number) // len(chosen), int(start), [kind_name])
        print(found, flush=True)
        faults += len(found.faults)
    sys.exit(faults > 0)
