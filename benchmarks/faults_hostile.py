"""Hostile files: nothing in one runs, writes outside of the destination, obeys the terminal or fills the memory.

Each is what somebody may have downloaded: pickles in every place where a file is read, names that lead out of a folder,
texts that a terminal, a page or a shell obeys, and small files that unfold to large ones. Every command that reads such
a file is run on it, in a process of its own; what it printed, what it took and every file that is new is looked at.

    python -m benchmarks.faults_hostile

prints what was wrong, then a table. Linux only.
"""

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import sys
import tarfile
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.faults_options import execute, make_inputs
from diffit.weights.header import CONFIG_KEY
from helpers import png_claiming

Attack = tuple[str, str, Callable[[Path], None], list[str]]
"""Kind, what it is, how its files get into a folder, and the words of the command that reads them."""

MARK = "executed"
SECONDS, MEMORY = 5.0, 64 << 20  # that a bomb may cost


class Payload:
    """Unpickled, it calls a function."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


PAYLOADS: dict[str, Callable[[], bytes]] = {
    "os.system": lambda: pickle.dumps(Payload(os.system, f"touch {MARK}")),
    "eval, protocol 0": lambda: pickle.dumps(Payload(eval, f"open('{MARK}', 'w')"), 0),
    "exec in a dictionary": lambda: pickle.dumps({"model": Payload(exec, f"open('{MARK}', 'w')")}),
    "torch.save": lambda: _torch_saved(Payload(os.system, f"touch {MARK}")),
    "NumPy objects": lambda: _npy(np.array([Payload(os.system, f"touch {MARK}")], dtype=object)),
}
ABSOLUTE = Path(tempfile.gettempdir()) / "diffit-evil.png"
PATHS = ["../evil.png", "../../evil.png", str(ABSOLUTE), "a/../../evil.png", "..\\evil.png", "C:/evil.png",
         "~/evil.png", "\x1b[2Jevil.png", "evil\nerror: all is well.png", "\u202egnp.evil.png",
         "e" * 240 + ".png"]  # fmt: skip
TEXTS = ["\x1b[2J\x1b[H", "\x1b]0;title\x07", "\x9b31m", "\rerror: all is well", "a\nerror: all is well", "\u202eevil",
         "<script>alert(1)</script>", "[free](https://example.org)", f"$(touch {MARK})", f"`touch {MARK}`",
         f"; touch {MARK}", "[bold red]markup[/]", "%s%n{0}", "A" * 50_000]  # fmt: skip


def _torch_saved(value: object) -> bytes:
    held = io.BytesIO()
    torch.save(value, held)
    return held.getvalue()


def _npy(array: Any) -> bytes:
    held = io.BytesIO()
    np.save(held, array, allow_pickle=True)
    return held.getvalue()


def _png() -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(held, "PNG")
    return held.getvalue()


def _write(name: str, data: bytes, folder: Path) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def _tar(name: str, members: dict[str, bytes], folder: Path) -> None:
    with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w") as archive:
        for member, data in members.items():
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def _zip(name: str, members: dict[str, bytes], folder: Path) -> None:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)


def pickles() -> Iterator[Attack]:
    """In the place of networks, detectors, statistics, data, latents and autoencoders."""
    places: dict[str, list[str]] = {
        "evil.pt": ["info evil.pt", "sample --network evil.pt --outdir out --seeds 0",
                    "train --data pets.zip --outdir runs --preset debug --kimg 0.004 --init-from evil.pt --dry-run",
                    "metrics calc --images pets.zip --ref pets.zip --metrics kd8 --detector evil.pt",
                    "metrics calc --images pets.zip --ref evil.pt --metrics kd8:pixels"],
        "evil.safetensors": ["info evil.safetensors", "export --network evil.safetensors --to official --dest o.pt"],
        "evil.pkl": ["metrics calc --images pets.zip --ref evil.pkl --metrics fd8:pixels", "data check evil.pkl"],
        "latents/header.json": ["data check latents"],
        "latents/shard-00000.safetensors": ["train --data latents --outdir runs --preset latent-debug --kimg 0.004"],
        "vae/diffusion_pytorch_model.bin": ["data encode --source pets.zip --dest l --vae vae"],
        "hub/diffit_256.pth": ["info hub/diffit_256.pth"],
        "raw/a/evil.png": ["data convert --source raw --dest new.zip --resolution 8"],
    }  # fmt: skip
    for name, make in PAYLOADS.items():
        data = make()
        for place, lines in places.items():
            for line in lines:
                yield "pickle", f"{name} as {place}", partial(_write, place, data), line.split()
        batches = {f"cifar-10-batches-py/data_batch_{i}": data for i in range(1, 6)}
        line = "data convert --source cifar-10-python.tar.gz --dest new.zip"
        yield "pickle", f"{name} in CIFAR's tar", partial(_tar, "cifar-10-python.tar.gz", batches), line.split()
        for member, line in (
            ("arr_0.npy", "metrics calc --images evil.npz --ref pets.zip --metrics kd4:pixels"),
            ("mu.npy", "metrics calc --images pets.zip --ref evil.npz --metrics fd8:pixels"),
        ):
            yield "pickle", f"{name} in an npz", partial(_zip, "evil.npz", {member: data}), line.split()


def paths() -> Iterator[Attack]:
    """Names of members that lead elsewhere."""
    png = _png()
    for name in PATHS:
        shown = ascii(name)[:60]
        for line in ("data check evil.zip", "data convert --source evil.zip --dest new"):
            yield "path", f"{shown} in a zip", partial(_zip, "evil.zip", {name: png, "b.png": png}), line.split()
        members = {name: png, "b.png": png, "b.cls": b"1"}
        yield "path", f"{shown} in a tar", partial(_tar, "evil.tar", members), (
            ["data", "convert", "--source", "evil.tar", "--dest", "new"]
        )  # fmt: skip
        labels = json.dumps({"labels": [[name, 0]], "class_names": [name]}).encode()
        yield "path", f"{shown} in labels", partial(_zip, "evil.zip", {"a.png": png, "dataset.json": labels}), (
            ["data", "check", "evil.zip", "--cond"]
        )  # fmt: skip
    for target in ("/etc/hostname", "../../.."):
        yield (
            "path",
            f"a link to {target}",
            partial(_link, target),
            ["data", "convert", "--source", "raw", "--dest", "new"],
        )


def _link(target: str, folder: Path) -> None:
    (folder / "raw/a/link.png").symlink_to(target)


def texts() -> Iterator[Attack]:
    """In headers, class names, records and logs."""
    for text in TEXTS:
        shown = ascii(text)[:40]
        for line in ("info net.safetensors", "sample --network net.safetensors --outdir out --seeds 0 --steps 1"):
            yield "text", f"{shown} in a header", partial(_rename_classes, text), line.split()
        record = json.dumps({"metric": text, "results": {text: 3.0}, "network": text, "images": 4}) + "\n"
        yield "text", f"{shown} in a record", partial(_write, "metric-fid.jsonl", record.encode()), (
            ["metrics", "show", "metric-fid.jsonl"]
        )  # fmt: skip
        names = json.dumps({"labels": [["a.png", 0]], "class_names": [text]}).encode()
        yield "text", f"{shown} as a class", partial(_zip, "evil.zip", {"a.png": _png(), "dataset.json": names}), (
            ["data", "check", "evil.zip", "--cond"]
        )  # fmt: skip


def _rename_classes(text: str, folder: Path) -> None:
    """``text`` for every text of the network's header that is free to be anything; its checksum says nothing then."""
    path = folder / "net.safetensors"
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    config = json.loads(header["__metadata__"][CONFIG_KEY])
    config["data"]["class_names"] = [text] * 3
    config["preset"] = text
    header["__metadata__"] = {CONFIG_KEY: json.dumps(config)}
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + size :])


def bombs() -> Iterator[Attack]:
    """Small files that claim, or unfold to, more than the memory."""
    claims = {"gif": _gif, "bmp": _bmp, "png": png_claiming, "webp": _webp, "tiff": _tiff}
    for form, make in claims.items():
        for width, height in ((11_000, 8_000), (16_000, 16_000), (65_000, 65_000)):
            data, title = make(width, height), f"a {form} of {width}×{height}"
            yield "bomb", title, partial(_zip, "evil.zip", {f"a.{form}": data}), ["data", "check", "evil.zip"]
            words = ["data", "convert", "--source", "evil.zip", "--dest", "new", "--resolution", "8"]
            yield "bomb", title, partial(_zip, "evil.zip", {f"a.{form}": data}), words
    for sizes in ((60_000, 250, 240), (1, 2**31, 2**31), (2**32 - 1, 1, 1), (2**20, 2**10, 2**10)):
        data = gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3I", *sizes) + bytes(100))
        words = ["data", "convert", "--source", "train-images-idx3-ubyte.gz", "--dest", "new"]
        yield "bomb", f"an idx of {sizes}", partial(_write, words[3], data), words
    for title, meta in (("brackets", b"[" * 4_000_000), ("entries", b'["a.png", 0],' * 400_000 + b'["a.png", 0]]}')):
        files = {"a.png": _png(), "dataset.json": b'{"labels": [' + meta}
        yield "bomb", f"{title} in labels", partial(_zip, "evil.zip", files), ["data", "check", "evil.zip", "--cond"]
    for shape in ((10**6, 1000, 1000, 3), (2**31, 2**31), (300_000, 32, 32, 3)):
        files, words = {"arr_0.npy": _header(shape)}, ["metrics", "calc", "--images", "evil.npz", "--ref", "pets.zip"]
        words += ["--metrics", "kd8:pixels"]
        yield "bomb", f"an npz of {shape}", partial(_deflated, "evil.npz", files), words
    for size in (2**63 - 1, 2**40, 200_000_000):
        data = struct.pack("<Q", size) + b"{" + b" " * 1000
        yield (
            "bomb",
            f"a header of {size} bytes",
            partial(_write, "evil.safetensors", data),
            ["info", "evil.safetensors"],
        )


def _gif(width: int, height: int) -> bytes:
    image = b"," + struct.pack("<4HB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"
    return b"GIF89a" + struct.pack("<2H", width, height) + b"\x80\0\0" + bytes(6) + image


def _bmp(width: int, height: int) -> bytes:
    return (
        b"BM"
        + struct.pack("<I2HI", 1000, 0, 0, 54)
        + struct.pack("<I2i2H6I", 40, width, height, 1, 24, *[0] * 6)
        + bytes(99)
    )


def _webp(width: int, height: int) -> bytes:
    """Its sides are of 14 bits."""
    bits = 0x2F | (min(width, 16_383) - 1) << 8 | (min(height, 16_383) - 1) << 22
    data = struct.pack("<Q", bits)[:5] + bytes(50)
    return b"RIFF" + struct.pack("<I", 12 + len(data)) + b"WEBPVP8L" + struct.pack("<I", len(data)) + data


def _tiff(width: int, height: int) -> bytes:
    tags = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 200, 277: 1, 278: height, 279: 100}
    table = b"".join(struct.pack("<2H2I", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + table + bytes(300)


def _header(shape: tuple[int, ...]) -> bytes:
    held = io.BytesIO()
    np.lib.format.write_array_header_1_0(held, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return held.getvalue()


def _deflated(name: str, members: dict[str, bytes], folder: Path) -> None:
    """Each member is followed by 300 MB of zeros."""
    with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as archive:
        for member, data in members.items():
            with archive.open(member, "w", force_zip64=True) as file:
                file.write(data)
                for _ in range(300):
                    file.write(bytes(1 << 20))


def outside(place: Path, before: set[Path]) -> list[str]:
    """What is new and not where the commands were told to write."""
    told = {"new", "new.zip", "out", "runs", "o.pt", "l", "cache", "latents", "evil-grid.png"}
    found = [path for path in place.parent.rglob("*") if path not in before and path.name not in ("stdout", "stderr")]
    return [str(path) for path in found if place not in path.parents or path.relative_to(place).parts[0] not in told]


def faults_of(attack: Attack, inputs: Path, place: Path, usual: int) -> list[str]:
    """``usual`` bytes of memory are those of a command on good files."""
    shutil.copytree(inputs, place, symlinks=True)
    attack[2](place)
    before = set(place.parent.rglob("*"))
    status, said, error, seconds, peak = execute(attack[3], place, {})
    faults = []
    if attack[0] == "bomb":
        if not status:
            faults.append("not refused")
        if seconds > SECONDS or peak - usual > MEMORY:
            faults.append(f"{seconds:.1f} s, {(peak - usual) / 2**20:.0f} MiB")
    if "Traceback (most recent" in error or not 0 <= status < 128:
        faults.append(f"traceback: {error.strip().splitlines()[-1][:200]}")
    if any(not (c.isprintable() or c == "\n") for c in said + error):
        faults.append("commands the terminal")
    if any(line.startswith("error: all is well") for line in (said + error).splitlines()):
        faults.append("pretends to be us")
    if new := outside(place, before):
        faults.append(f"wrote {new[0]}")
    if list(place.parent.rglob(MARK)) or ABSOLUTE.exists():
        faults.append("executed")
    shutil.rmtree(place)
    return faults


def main() -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"  # before its client reads it
    import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401  # before the forks: it takes seconds

    import diffit.sampling
    import diffit.training  # noqa: F401

    tried, wrong = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        inputs, place = Path(name) / "inputs", Path(name) / "box" / "place"
        make_inputs(inputs)
        place.parent.mkdir()
        shutil.copytree(inputs, place, symlinks=True)
        usual = max(execute(line.split(), place, {})[4] for line in ("data check pets.zip", "info net.safetensors"))
        shutil.rmtree(place)
        for attack in (*pickles(), *paths(), *texts(), *bombs()):
            tried[attack[0]] += 1
            if faults := faults_of(attack, inputs, place, usual):
                wrong[attack[0]] += 1
                print(f"{attack[0]}, {attack[1]}: {' '.join(attack[3])}: {'; '.join(faults)}", flush=True)
    for kind, count in tried.items():
        print(f"{kind:8}{count:5} tried {wrong[kind]:5} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
