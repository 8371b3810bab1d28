"""The index against zipfile's and the disk's own view, and its file against everything that can happen to one."""

import json
import os
import pickle
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffit.data import ImageArchive, convert
from diffit.data import index as index_module
from diffit.data import names as names_module
from diffit.data import zips as zips_module
from diffit.data.files import FileTree
from diffit.data.index import open_index
from diffit.data.names import are_plain, natural_key, natural_sorted, safe_name
from diffit.data.sums import SUMS
from diffit.data.zips import read_directory
from diffit.errors import UserError
from helpers import write_archive

METHODS = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]


@pytest.fixture
def kept(monkeypatch):
    """Indices of small archives are kept too, and those of folders that have just been written."""
    monkeypatch.setattr(index_module, "KEPT_FROM", 1)
    monkeypatch.setattr(index_module, "RACE", -(2**62))


@pytest.fixture
def listings(monkeypatch):
    """Every path that is listed from the beginning."""
    found: list[Path] = []
    whole = FileTree.__init__
    monkeypatch.setattr(FileTree, "__init__", lambda tree, *given: (found.append(given[0]), whole(tree, *given))[1])
    return found


def awkward_zip(path: Path) -> Path:
    """Members of every method, one with long extra fields, one written without knowing its size, text before them."""
    path.write_bytes(b"#!/bin/sh\n" * 5)
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "a") as archive:
        for i in range(8):
            member = zipfile.ZipInfo(f"{i % 2}/é{10 - i}.png")
            member.compress_type = METHODS[i % 4]
            member.extra = b"\xfe\xca" + (900).to_bytes(2, "little") + bytes(900) if i == 4 else b""
            archive.writestr(member, rng.bytes(100 + i) + bytes(300))
        with archive.open(zipfile.ZipInfo("0/streamed.png"), "w", force_zip64=True) as file:
            file.write(rng.bytes(50))
    return path


def test_the_index_of_a_zip_is_zipfiles_view_of_it(tmp_path):
    path = awkward_zip(tmp_path / "a.zip")
    index = open_index(path)
    with zipfile.ZipFile(path) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        assert sorted(index.names(range(len(index)))) == sorted(infos)
        assert [name.split("/")[1] for name in index.names(range(4))] == ["streamed.png", "é4.png", "é6.png", "é8.png"]
        for row, name in enumerate(index.names(range(len(index)))):
            assert list(index.checksums([row])) == [(infos[name].file_size, infos[name].CRC)]
            assert index.read(row) == archive.read(name)


def large_zip(path: Path, kind: str) -> Path:
    """Of 40 members: as convert writes them, deflated, with names in UTF-8, beyond 4 GiB, after other bytes."""
    path.write_bytes(b"#!/bin/sh\n" if kind == "after" else b"")
    with zipfile.ZipFile(path, "a" if kind == "after" else "w") as archive:
        for i in range(40):
            member = zipfile.ZipInfo(("ä" if kind == "utf-8" else "a") + f"/{i}.png")
            member.compress_type = METHODS[i % 2] if kind != "bzip2" else METHODS[i % 3]
            with archive.open(member, "w", force_zip64=kind == "zip64") as file:
                file.write(bytes([i]) * (i * 50))
        archive.mkdir("a/empty")
    return path


@pytest.mark.parametrize("kind", ["plain", "utf-8", "zip64", "after", "bzip2"])
def test_the_directory_of_a_large_zip_is_read_as_zipfile_reads_it(tmp_path, monkeypatch, kind):
    path = large_zip(tmp_path / "a.zip", kind)
    assert read_directory(path) is None  # so few are left to zipfile
    monkeypatch.setattr(zips_module, "LARGE", 40)
    directory = read_directory(path)
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
        assert directory.names == [info.filename for info in infos]
        for info in infos:
            assert directory[info.filename] == zips_module.member_of(info)
        index = open_index(path)
        assert all(index.read(row) == archive.read(index.name(row)) for row in range(40))
        assert [FileTree(path).read(name) for name in index.names([3, 30])] == [index.read(3), index.read(30)]


def test_numbers_of_64_bits_in_the_directory_of_a_large_zip_are_read(tmp_path, monkeypatch):
    path, monkey = tmp_path / "a.zip", monkeypatch.setattr
    monkey(zips_module, "LARGE", 3)
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(3):
            archive.writestr(f"{i}.png", bytes(i))
    # A hole of 5 GiB in front of the third member moves it there, and the directory.
    with zipfile.ZipFile(path, "a") as archive:
        archive.fp.seek(5 << 30)
        archive.start_dir = 5 << 30
        archive.writestr("3.png", b"far away")
    directory = read_directory(path)
    with zipfile.ZipFile(path) as archive:
        assert directory["3.png"].offset == archive.getinfo("3.png").header_offset == 5 << 30
    assert open_index(path).read(3) == b"far away"
    path.unlink()


@pytest.mark.parametrize("flips", [300])
def test_a_damaged_directory_is_left_to_zipfile_or_read_as_zipfile_reads_it(tmp_path, monkeypatch, flips):
    monkeypatch.setattr(zips_module, "LARGE", 1)
    path = large_zip(tmp_path / "a.zip", "zip64")
    content, rng = path.read_bytes(), np.random.default_rng(0)
    begin = content.index(zips_module.ENTRY)
    for _ in range(flips):
        damaged = bytearray(content)
        damaged[rng.integers(begin, len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        if (directory := read_directory(path)) is None:
            continue
        with zipfile.ZipFile(path) as archive:
            infos = [info for info in archive.infolist() if not info.is_dir()]
        assert directory.names == [info.filename for info in infos]
        assert [directory[info.filename] for info in infos] == [zips_module.member_of(info) for info in infos]


def test_the_index_of_a_folder_is_what_lies_on_the_disk(tmp_path):
    convert(write_archive(tmp_path / "a.zip", 9, side=8), tmp_path / "a")
    index = open_index(tmp_path / "a")
    for row, name in enumerate(index.names(range(9))):
        content = (tmp_path / "a" / name).read_bytes()
        assert index.read(row) == content
        assert list(index.checksums([row])) == [(len(content), zlib.crc32(content))]


def old_natural_key(name: str):
    def component(text):
        chunks = re.split(r"(\d+)", text)
        return [(len(c.lstrip("0")), c.lstrip("0")) if i % 2 else c for i, c in enumerate(chunks)]

    return [component(part) for part in name.split("/")], name


@given(st.lists(st.text("a10/.-\x01\x02²٣", max_size=9)))
def test_the_order_is_that_of_states_trained_so_far(names):
    assert sorted(names, key=natural_key) == sorted(names, key=old_natural_key)


@given(
    st.lists(st.from_regex(r"[01a]\d/[ab]\d\d?\.x", fullmatch=True), max_size=12),
    st.lists(st.text("a10/.-²٣", max_size=6), max_size=2),
)
def test_very_many_names_are_in_the_same_order(usual, others):
    """Of 300 names of one shape and some others; the shape may leave places that digits and letters share."""
    many = [f"{n % 3}{n % 7}/b{n:02}.x" for n in range(100)] * 3
    names = [*many[:150], *usual, *others, *many[150:]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(names_module, "LARGE", 1)
        assert natural_sorted(names) == sorted(names, key=natural_key)


@given(st.lists(st.text("a1/.\\:\n\x00", max_size=5) | st.sampled_from(["__MACOSX/a", "a/__MACOSX", "b/a.png"])))
def test_names_that_are_plain_together_are_plain_singly(names):
    if are_plain(names):
        assert all(safe_name(name, "it") == name and not names_module.HIDDEN.search(name) for name in names)
    assert are_plain(["a/b1.png", *(name for name in names if name.isalnum())])


def test_the_content_hash_is_that_of_states_trained_so_far(tmp_path):
    import hashlib

    path = write_archive(tmp_path / "a.zip", 9, side=8)
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if info.filename != "dataset.json"]
    for cond in (True, False):
        rows = [(info.filename, (info.file_size, info.CRC), i % 3 if cond else None) for i, info in enumerate(infos)]
        expected = hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()
        assert ImageArchive(path, cond=cond).content_hash == expected


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_an_archive_opened_from_its_kept_index_is_the_same_without_listing_it(kept, listings, tmp_path, kind):
    path = tmp_path / ("b.zip" if kind == "zip" else "b")
    convert(write_archive(tmp_path / "a.zip", 24, side=8), path)
    listings.clear()
    first, again = ImageArchive(path, cond=True), ImageArchive(path, cond=True)
    assert listings == [path]
    assert first.file_names == again.file_names == ImageArchive(path, cond=True, max_images=24).file_names
    assert torch.equal(first.load_all(), again.load_all())
    assert torch.equal(first.labels, again.labels)
    assert (first.content_hash, first.class_names, first.num_classes) == (again.content_hash, ["ant", "bee", "cat"], 3)
    copied = pickle.loads(pickle.dumps(again))
    assert torch.equal(copied.load_all(), first.load_all())
    assert listings == [path]
    assert (tmp_path / ".b.zip.index").exists() == (kind == "zip")  # names of a folder are paths: not from strangers


def test_a_pickle_of_a_kept_index_does_not_grow_with_the_images(kept, tmp_path):
    sizes = []
    for count in (30, 300):
        path = write_archive(tmp_path / f"{count:03d}.zip", count, side=2)
        ImageArchive(path)
        sizes.append(len(pickle.dumps(ImageArchive(path))))
    assert abs(sizes[0] - sizes[1]) < 10
    assert sizes[1] < 2000


def damaged(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "cut short":
        file.write_bytes(content[: len(content) // 2])
    elif how == "flipped":
        file.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif how == "another version":
        file.write_bytes(content.replace(b'\\"version\\": 1', b'\\"version\\": 7'))
    elif how == "of another archive":
        other = write_archive(file.parent / "other.zip", 7, side=8)
        open_index(other)
        os.replace(file.parent / ".other.zip.index", file)
    else:
        file.write_text("nonsense")


@pytest.mark.parametrize("how", ["cut short", "flipped", "another version", "of another archive", "nonsense"])
def test_an_index_that_does_not_hold_is_made_again(kept, listings, tmp_path, how):
    path = write_archive(tmp_path / "a.zip", 9, side=8)
    expected = ImageArchive(path, cond=True).content_hash
    file = tmp_path / ".a.zip.index"
    before = file.read_bytes()
    damaged(file, how)
    assert file.read_bytes() != before
    listings.clear()
    assert ImageArchive(path, cond=True).content_hash == expected
    assert listings == [path]
    assert file.read_bytes() == before


def test_a_changed_archive_is_listed_again(kept, tmp_path):
    path = write_archive(tmp_path / "a.zip", 9, side=8)
    ImageArchive(path)
    stat = path.stat()
    convert(write_archive(tmp_path / "b.zip", 9, side=16), path, resolution=(8, 8), overwrite=True)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a copy keeps it
    assert len({ImageArchive(path).content_hash, ImageArchive(tmp_path / "b.zip").content_hash}) == 2
    assert ImageArchive(path).image_shape == (3, 8, 8)


@pytest.mark.parametrize("change", ["added", "removed", "renamed", "labels"])
def test_a_changed_folder_is_listed_again(kept, tmp_path, change):
    folder = tmp_path / "b"
    convert(write_archive(tmp_path / "a.zip", 9, side=8), folder)
    (folder / SUMS).unlink()
    before = ImageArchive(folder, cond=True).content_hash
    one = folder / "00000/img00000003.png"
    if change == "added":
        (folder / "00000/more.png").write_bytes(one.read_bytes())
        with pytest.raises(UserError, match=r"more\.png"):
            ImageArchive(folder, cond=True)
        return
    if change == "removed":
        one.unlink()
    elif change == "renamed":
        one.rename(folder / "img.png")
        with pytest.raises(UserError, match=r"img\.png"):
            ImageArchive(folder, cond=True)
        return
    else:
        meta = folder / "dataset.json"
        meta.write_text(meta.read_text().replace('.png", 1]', '.png", 0]'))
    assert ImageArchive(folder, cond=True).content_hash != before


def test_a_file_that_changed_in_place_is_noticed_by_the_hash_and_on_reading(kept, tmp_path):
    folder = tmp_path / "b"
    convert(write_archive(tmp_path / "a.zip", 9, side=8), folder)
    archive, one = ImageArchive(folder), folder / "00000/img00000003.png"
    one.write_bytes(one.read_bytes() + b"\0")
    with pytest.raises(UserError, match=r"img00000003.png' cannot be read .*CRC-32"):
        ImageArchive(folder)[3]
    (folder / SUMS).unlink()  # without which the sizes are looked at anew
    assert ImageArchive(folder).content_hash != archive.content_hash


def test_where_nothing_can_be_written_the_cache_folder_or_nothing_keeps_the_index(
    kept, listings, tmp_path, monkeypatch
):
    path = write_archive(tmp_path / "a.zip", 9, side=8)
    refused = []

    def refuse(file, **options):
        refused.append(file)
        raise UserError("not writable")

    whole = index_module.whole_file
    beside = path.with_name(".a.zip.index")
    monkeypatch.setattr(index_module, "whole_file", lambda file: refuse(file) if file == beside else whole(file))
    assert [len(ImageArchive(path)) for _ in range(2)] == [9, 9]
    assert listings == [path]
    assert len(list(Path(os.environ["DIFFIT_CACHE"]).glob("index/a-*.safetensors"))) == 1
    monkeypatch.setattr(index_module, "whole_file", refuse)
    monkeypatch.setenv("DIFFIT_CACHE", str(tmp_path / "none"))
    assert [len(ImageArchive(path)) for _ in range(2)] == [9, 9]
    assert listings == [path] * 3


def test_an_index_from_a_stranger_cannot_name_other_files(kept, tmp_path):
    """One next to a zip that names another zip, whole and with the sums of its own."""
    for name in "xy":
        (tmp_path / name).mkdir()
    path, secret = (write_archive(tmp_path / name / "a.zip", 9, side=side) for name, side in (("x", 8), ("y", 4)))
    index = open_index(secret)
    about = index.about | {"zips": ["../../y/a.zip"], "stamps": open_index(path).about["stamps"]}
    index_module._store(index_module.Index(path, index.arrays, about), path.with_name(".a.zip.index"))
    assert ImageArchive(path).image_shape == (3, 8, 8)
    about = index.about | {"stamps": [["/dev/zero", 0, 0, 0]]}  # which has no end
    index_module._store(index_module.Index(path, index.arrays, about), path.with_name(".a.zip.index"))
    assert ImageArchive(path).image_shape == (3, 8, 8)
