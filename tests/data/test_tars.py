"""Tars laid out by hand as WebDataset lays them out, and converted."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffit.data import ImageArchive, convert
from diffit.data.sources import open_source
from diffit.errors import UserError


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples(numbers) -> dict[str, bytes]:
    return {
        name: data
        for i in numbers
        for name, data in {f"{i:04d}.png": png(i), f"{i:04d}.cls": b"%d" % (i % 3), f"{i:04d}.txt": b"a toy"}.items()
    }


def test_a_folder_of_tars_is_converted_tar_by_tar_with_its_classes(tmp_path):
    for part, numbers in ((10, range(6, 9)), (9, range(6))):
        write_tar(tmp_path / "toys" / f"part-{part}.tar", samples(numbers))
    report = convert(tmp_path / "toys", tmp_path / "toys.zip", cond=True)
    assert (report.kind, report.written, len(report.ignored)) == ("WebDataset of 2 tars", 9, 9)
    archive = ImageArchive(tmp_path / "toys.zip", cond=True)
    assert archive.labels.tolist() == [i % 3 for i in range(9)]
    assert archive.load_all()[:, 0, 0, 0].tolist() == list(range(9))


def test_one_tar_without_classes_is_converted_unlabelled(tmp_path):
    files = {name: data for name, data in samples(range(3)).items() if not name.endswith(".cls")}
    convert(write_tar(tmp_path / "toys.tar", files), tmp_path / "toys.zip")
    assert len(ImageArchive(tmp_path / "toys.zip")) == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": b"", "a.cls": b"cat"}, "a.cls holds b'cat', not a class number"),
        ({"../a.png": b""}, "unsafe path"),
        ({"a.txt": b""}, "holds no images: found a.txt"),
    ],
)
def test_what_cannot_be_converted_is_one_line(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        open_source(write_tar(tmp_path / "a.tar", files))


def test_damaged_and_compressed_tars_are_one_line(tmp_path):
    whole = write_tar(tmp_path / "a.tar", samples(range(3))).read_bytes()
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=r"a.tar cannot be read"):
        open_source(tmp_path / "a.tar")
    with pytest.raises(UserError, match=r"b.tar cannot be read .*gunzip"):
        open_source(write_tar(tmp_path / "b.tar", samples(range(3)), "w:gz"))
    source = open_source(write_tar(tmp_path / "c.tar", samples(range(3))))
    (tmp_path / "c.tar").write_bytes(whole[:520])
    with pytest.raises(UserError, match=r"c.tar: '0000.png' cannot be read \(the tar is cut short\)"):
        source.read(0)


def test_the_files_that_a_mac_adds_are_no_images(tmp_path):
    files = samples(range(3))
    write_tar(
        tmp_path / "a.tar", {f"./._{name}": b"AppleDouble" for name in files} | {f"./{n}": d for n, d in files.items()}
    )
    assert convert(tmp_path / "a.tar", tmp_path / "out.zip").written == 3
