"""Damage on the disk: every flipped bit is noticed when the archive is read, or changes nothing that is read."""

import io
import json
import random
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffit.cli import cli
from diffit.data import ImageArchive, LatentArchive, check, convert
from diffit.data.encode import encode_archive
from diffit.data.files import FileTree
from diffit.data.sums import SUMS, format_sums, parse_sums
from diffit.errors import UserError
from helpers import write_archive, write_vae

COUNT = 9
Content = tuple[torch.Tensor, torch.Tensor | None]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """The same images as a zip and as a folder, both by convert."""
    place = tmp_path_factory.mktemp("made")
    source = write_archive(place / "source.zip", COUNT, side=8)
    paths = {"zip": place / "pets.zip", "folder": place / "pets"}
    for path in paths.values():
        convert(source, path, cond=True)
    return paths


def images_of(path: Path) -> Content:
    archive = ImageArchive(path, cond=True)
    return archive.load_all(), archive.labels


def latents_of(path: Path) -> Content:
    archive = LatentArchive(path, cond=True)
    archive.check()
    return archive.load_all(), archive.labels


def flip_each(path: Path, read: Callable[[Path], Content], flips: int) -> list[str]:
    """Flip one bit at a time anywhere in the archive: the messages, "" where what is read is what was written."""
    rng, before = random.Random(0), read(path)
    files = [path] if path.is_file() else sorted(item for item in path.rglob("*") if item.is_file())
    sizes, messages = [file.stat().st_size for file in files], []
    for _ in range(flips):
        file = rng.choices(files, sizes)[0]
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            after = read(path)
        except UserError as error:
            messages.append(str(error))
        else:
            assert torch.equal(before[0], after[0]), file
            assert torch.equal(before[1], after[1]), file
            messages.append("")
        file.write_bytes(content)
    assert all(str(path) in message for message in messages if message)
    return messages


def test_every_flipped_bit_in_a_folder_is_noticed(made):
    messages = flip_each(made["folder"], images_of, 200)
    assert "" not in messages
    assert all("\n" not in message for message in messages)


def test_a_flipped_bit_in_a_zip_is_noticed_or_changes_nothing(made):
    messages = flip_each(made["zip"], images_of, 200)
    assert messages.count("") < 60  # dates, attributes and the like


def test_a_flipped_bit_in_a_latent_cache_is_noticed_or_changes_nothing(made, tmp_path):
    pytest.importorskip("diffusers")
    from diffit.models.autoencoder import load_autoencoder

    encode_archive(made["zip"], tmp_path / "latents", load_autoencoder(write_vae(tmp_path / "vae")), shard_size=4)
    messages = flip_each(tmp_path / "latents", latents_of, 100)
    assert messages.count("") < 5  # the name of the sums, which leaves a shard without them


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_a_flipped_bit_in_a_lossy_image_is_noticed(tmp_path, form):
    """Their decoders take most flips without a word."""
    files = {}
    for i in range(4):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8)).save(buffer, form)
        files[f"{i}.{form.lower()}"] = buffer.getvalue()
    files["dataset.json"] = json.dumps({"labels": [[name, 0] for name in files]}).encode()
    files[SUMS] = format_sums((name, zlib.crc32(data)) for name, data in files.items())
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    assert "" not in flip_each(tmp_path, images_of, 100)


def test_an_image_that_a_flip_hides_from_a_zips_directory_is_missed(made, tmp_path):
    path = Path(shutil.copy(made["zip"], tmp_path / "pets.zip"))
    content = path.read_bytes()
    at = content.rindex(b"img00000004.png")
    path.write_bytes(content[:at] + b"img00000004.qng" + content[at + 15 :])
    with pytest.raises(UserError, match=r"1 listed in it are not there \(00000/img00000004.png\)"):
        ImageArchive(path)
    assert any("img00000004.png" in problem for problem in check(path).problems)


def test_an_image_that_was_added_or_removed_is_named_and_the_remedy_works(made, tmp_path):
    path = Path(shutil.copytree(made["folder"], tmp_path / "pets"))
    shutil.copy(path / "00000/img00000000.png", path / "00000/more.png")
    with pytest.raises(UserError, match=r"1 are not listed in it \(00000/more.png\).*remove dataset.sfv"):
        ImageArchive(path)
    (path / SUMS).unlink()
    assert len(ImageArchive(path)) == COUNT + 1


def test_check_lists_every_damaged_file_and_exits_with_1(made, tmp_path):
    from click.testing import CliRunner

    path = Path(shutil.copytree(made["folder"], tmp_path / "pets"))
    for i in (2, 5):
        file = path / f"00000/img{i:08d}.png"
        Image.open(file).transpose(Image.Transpose.ROTATE_180).save(file)
    meta = path / "dataset.json"
    meta.write_text(meta.read_text().replace("ant", "cow"))
    report = check(path)
    assert [name for name, _ in report.damaged] == ["00000/img00000002.png", "00000/img00000005.png"]
    assert any("dataset.json" in problem for problem in report.problems)
    assert CliRunner().invoke(cli, ["data", "check", str(path), "--no-grid"]).exit_code == 1


def test_an_unpacked_zip_is_the_folder_and_both_have_the_sums_that_zlib_computes(made, tmp_path):
    zipfile.ZipFile(made["zip"]).extractall(tmp_path)
    contents = {name: (tmp_path / name).read_bytes() for name in FileTree(tmp_path).names}
    assert contents == {name: (made["folder"] / name).read_bytes() for name in FileTree(made["folder"]).names}
    assert parse_sums(contents.pop(SUMS), "it") == {name: zlib.crc32(data) for name, data in contents.items()}


def test_archives_without_sums_are_read_as_they_are(made, tmp_path):
    path = Path(shutil.copytree(made["folder"], tmp_path / "pets"))
    (path / SUMS).unlink()
    assert torch.equal(images_of(path)[0], images_of(made["folder"])[0])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.png 0012ABCD\n",
        "a.png 12\n",
        "a.png 00000012",
        "a.png  0\n",
        "\xff\n",
        "a\n",
        "a 00000012\nb\n",
        "a 00000012\n" * 2,
    ],
)
def test_sums_that_convert_would_not_have_written_are_damage(text):
    if not text:
        assert parse_sums(b"", "it") == {}
        return
    with pytest.raises(UserError, match="it is damaged"):
        parse_sums(text.encode("latin1"), "it")


def test_the_hash_of_the_content_is_cheap_and_says_what_changed(made, tmp_path, monkeypatch):
    by_zip, by_folder = (ImageArchive(made[kind], cond=True) for kind in ("zip", "folder"))
    monkeypatch.setattr(FileTree, "read", None)  # nothing more is read
    assert by_zip.content_hash == by_folder.content_hash == by_folder.hash_files()
    monkeypatch.undo()
    moved = Path(shutil.copytree(made["folder"], tmp_path / "elsewhere"))
    assert ImageArchive(moved, cond=True).content_hash == by_folder.content_hash
    assert ImageArchive(moved).content_hash != by_folder.content_hash  # without the labels
    other = tmp_path / "other.zip"
    convert(write_archive(tmp_path / "source.zip", COUNT, side=16), other, cond=True, resolution=(8, 8))
    assert ImageArchive(other, cond=True).content_hash != by_zip.content_hash


def test_without_sums_the_hash_of_a_folder_is_of_names_and_sizes(made, tmp_path):
    path = Path(shutil.copytree(made["folder"], tmp_path / "pets"))
    (path / SUMS).unlink()
    before = ImageArchive(path, cond=True)
    assert before.hash_files() == ImageArchive(made["zip"], cond=True).content_hash
    assert before.content_hash != before.hash_files()
    with (path / "00000/img00000003.png").open("ab") as file:
        file.write(b"\0")
    after = ImageArchive(path, cond=True)
    assert after.content_hash != before.content_hash


def test_the_hash_of_latents_follows_their_values_and_labels_and_not_their_place(made, tmp_path):
    pytest.importorskip("diffusers")
    from diffit.models.autoencoder import load_autoencoder

    vae = load_autoencoder(write_vae(tmp_path / "vae"))
    for name in ("a", "b"):
        encode_archive(made["zip"], tmp_path / name, vae, shard_size=4)
    first, again = (LatentArchive(tmp_path / name, cond=True).content_hash for name in ("a", "b"))
    assert first == again
    assert LatentArchive(tmp_path / "a").content_hash != first
    encode_archive(made["zip"], tmp_path / "c", load_autoencoder(write_vae(tmp_path / "other", seed=1)), shard_size=4)
    assert LatentArchive(tmp_path / "c", cond=True).content_hash != first
