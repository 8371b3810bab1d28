"""Bombs: small files that unfold to more than the memory are refused by their headers, each with the limit named."""

import gzip
import io
import json
import resource
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffit.data import ImageArchive, check, convert
from diffit.data.archive import open_image
from diffit.data.bounds import max_bytes, max_pixels
from diffit.data.files import BrokenImageError
from diffit.data.sources import open_source
from diffit.errors import UserError
from helpers import png_claiming


def png_archive(path: Path, meta: bytes | None = None, count: int = 3) -> Path:
    path.mkdir()
    for i in range(count):
        Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(path / f"{i}.png")
    if meta is not None:
        (path / "dataset.json").write_bytes(meta)
    return path


def gz_idx(path: Path, shape: tuple[int, ...]) -> Path:
    path.write_bytes(gzip.compress(bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(100)))
    return path


def deflated_zip(path: Path) -> Path:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("a.png", "w", force_zip64=True) as file,
    ):
        for _ in range(600):
            file.write(bytes(1 << 20))
    return path


def tar_bomb(path: Path) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("cifar/data_batch_1")
        info.size = 1 << 27
        tar.addfile(info, io.BytesIO(bytes(1 << 27)))
    return path


def npz_of(path: Path, name: str, shape: tuple[int, ...]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open(f"{name}.npy", "w") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for _ in range(300):
            file.write(bytes(1 << 20))
    return path


ENTRIES = b'{"labels": [' + b'["a.png", 0],' * 500_000 + b'["a.png", 0]]}'
IDX = "images-idx3-ubyte.gz"


def write_bombs(folder: Path) -> list[tuple[Path, str]]:
    """Each bomb, and what its refusal says."""
    names = iter("abcdefghijklm")
    place = lambda: folder / next(names)  # noqa: E731
    tall, wide, sums = (png_archive(place(), count=n) for n in (0, 0, 3))
    (tall / "a.png").write_bytes(png_claiming(11_000, 8_000))
    (wide / "a.png").write_bytes(png_claiming(2**30, 2**30))
    (sums / "dataset.sfv").write_bytes(b"a 00000000\n" * 200_000)
    for name in "123":
        (folder / name).mkdir()
    return [
        (tall, "64 million"),
        (wide, "decompression bomb"),
        (sums, "more than the limit of"),
        (png_archive(place(), ENTRIES), "more than the limit of"),
        (png_archive(place(), b'{"labels":' + b"[" * 4_000_000), "not valid JSON"),
        (deflated_zip(folder / "a.zip"), "more than the limit of 512000000"),
        (gz_idx(folder / "1" / IDX, (60_000, 250, 240)), str(1 << 30)),
        (gz_idx(folder / "2" / IDX, (1, 2**31, 2**31)), "pixels"),
        (gz_idx(folder / "3" / IDX, (2**32 - 1, 1, 1)), str(1 << 30)),
        (tar_bomb(folder / "cifar.tar.gz"), str(1 << 26)),
    ]


MEASURED = """
import resource, sys, time
from diffit.data import ImageArchive
from diffit.data.sources import open_source
from diffit.errors import UserError
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
for path in sys.argv[1:]:
    try:
        source = open_source(path)
        source.open(0).load()
    except UserError as error:
        print(str(error))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.process_time() - began)
"""


def test_bombs_are_refused_with_their_limit_in_little_memory_and_time(tmp_path):
    bombs = write_bombs(tmp_path)
    paths = [str(path) for path, _ in bombs]
    done = subprocess.run([sys.executable, "-c", MEASURED, *paths], capture_output=True, text=True, timeout=200)
    *messages, measured = done.stdout.splitlines()
    assert len(messages) == len(bombs), done.stdout + done.stderr
    for message, (_, said) in zip(messages, bombs, strict=True):
        assert said in message
    kibibytes, seconds = measured.split()
    assert int(kibibytes) < 64 << 10
    assert float(seconds) < 5 * len(bombs)


def test_an_lmdb_value_above_the_limit_is_refused_before_it_is_copied(tmp_path, monkeypatch):
    lmdb = pytest.importorskip("lmdb", reason="needs the optional package lmdb")
    with lmdb.open(str(tmp_path), map_size=1 << 24) as env, env.begin(write=True) as txn:
        txn.put(b"0", bytes(1 << 20))
    monkeypatch.setenv("DIFFIT_MAX_MEGAPIXELS", "0.1")
    with pytest.raises(BrokenImageError, match="1048576 bytes, more than the limit of 800000"):
        open_source(tmp_path).open(0)


def test_an_uncompressed_idx_file_stays_on_the_disk(tmp_path):
    path = tmp_path / "train-images-idx3-ubyte"
    with path.open("wb") as file:  # sparse
        file.write(bytes([0, 0, 8, 3]) + struct.pack(">3I", 3_000_000, 32, 32))
        file.truncate(16 + 3_000_000 * 1024)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    source = open_source(path)
    assert np.asarray(source.open(2_999_999)).sum() == 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700 << 10  # names take some of it
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="holds 984 of 3072000000 bytes"):
        open_source(path)


def test_the_limit_can_be_raised(tmp_path, monkeypatch):
    path = png_archive(tmp_path / "a")
    monkeypatch.setenv("DIFFIT_MAX_MEGAPIXELS", "0.00001")
    with pytest.raises(UserError, match="DIFFIT_MAX_MEGAPIXELS=1 would read it"):
        ImageArchive(path)
    monkeypatch.setenv("DIFFIT_MAX_MEGAPIXELS", "300")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # so that it is set back
    assert len(ImageArchive(path)) == 3
    with pytest.raises(BrokenImageError, match="cannot be used"):
        open_image(png_claiming(20_000, 14_000), "it")  # far above Pillow's own limit, and read until its data ends
    assert (max_pixels(), max_bytes()) == (300_000_000, 2_400_000_000)


@pytest.mark.parametrize("text", ["many", "0", "-3", "nan", "inf", ""])
def test_a_limit_that_is_none_is_one_line(monkeypatch, text):
    monkeypatch.setenv("DIFFIT_MAX_MEGAPIXELS", text)
    with pytest.raises(UserError, match="DIFFIT_MAX_MEGAPIXELS="):
        max_pixels()


def test_a_page_with_a_size_of_its_own_is_bounded_too(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    first, second = (Image.new("RGB", size) for size in ((8, 8), (40, 40)))
    first.save(tmp_path / "in/a.tif", save_all=True, append_images=[second])
    monkeypatch.setenv("DIFFIT_MAX_MEGAPIXELS", "0.001")
    report = convert(tmp_path / "in", tmp_path / "out.zip", frames="all", on_error="skip")
    assert report.written == 1
    assert "40x40 pixels" in report.skipped[0][1]


def test_check_keeps_no_pixels_but_those_of_the_samples(tmp_path, monkeypatch):
    path = png_archive(tmp_path / "a", count=12)
    monkeypatch.setattr(sys.modules["diffit.data.check"], "SAMPLE_BYTES", 5 * 48)
    report = check(path, samples=10)
    assert report.samples.shape == (5, 3, 4, 4)
    assert report.count == 12
    assert json.dumps(report.mean) == json.dumps([5.5] * 3)


def test_npz_files_that_unfold_to_terabytes_are_refused(tmp_path):
    from diffit.metrics.images import NpzImages
    from diffit.metrics.reference import read_arrays

    with pytest.raises(UserError, match="100000x100000 pixels"):
        NpzImages(npz_of(tmp_path / "a.npz", "arr_0", (1, 100_000, 100_000, 3)))
    with pytest.raises(UserError, match="more than 268435456 are read"):
        read_arrays(npz_of(tmp_path / "b.npz", "sigma", (100_000, 100_000)))
