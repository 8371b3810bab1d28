"""Streams of images: every chosen one once, whatever the batch, the process, the container."""

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from diffit.data.archive import ImageArchive
from diffit.errors import UserError
from diffit.metrics.images import ArchiveImages, NpzImages, choose, open_images, stream
from diffit.utils.distributed import Processes
from helpers import write_archive

ONE = Processes(0, 1, torch.device("cpu"))


def pixels(n=23, side=6, channels=3):
    return np.random.default_rng(0).integers(256, size=(n, side, side, channels), dtype=np.uint8)


@pytest.mark.parametrize("batch", [1, 7, 64])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_chosen_image_comes_once_and_at_its_position(tmp_path, batch, processes):
    array = pixels()
    np.savez_compressed(tmp_path / "a.npz", arr_0=array)
    chosen = choose(23, 15)
    seen = {}
    for rank in range(processes):
        procs = Processes(rank, processes, torch.device("cpu"))
        for positions, images in stream(open_images(tmp_path / "a.npz"), chosen, batch, procs):
            assert len(images) <= batch
            seen |= {int(p): image for p, image in zip(positions, images, strict=True)}
    assert sorted(seen) == list(range(15))
    for position, image in seen.items():
        assert (image.permute(1, 2, 0).numpy() == array[chosen[position]]).all()


def test_a_choice_is_random_but_begins_with_every_smaller_one():
    chosen = choose(1000, 100)
    assert len(set(chosen.tolist())) == 100
    assert chosen[:10].max() > 200  # not the first images, which would be of one class
    for count in (1000, 2000):
        assert (choose(1000, count)[:100] == chosen).all()
        assert sorted(choose(1000, count).tolist()) == list(range(1000))
    assert (choose(1000, 100, seed=1) != chosen).any()


def test_a_folder_and_its_zip_have_one_fingerprint_and_other_pixels_another(tmp_path):
    archive = write_archive(tmp_path / "a.zip")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "folder")
    one, two = (ImageArchive(path).hash_files() for path in (archive, tmp_path / "folder"))
    assert one == two
    Image.new("RGB", (16, 16)).save(tmp_path / "folder/00000/img00000003.png")
    assert ImageArchive(tmp_path / "folder").hash_files() != one


def test_images_of_several_sizes_come_in_one_batch_for_each_size(tmp_path):
    for i in range(9):
        Image.new("RGB", (4 + i % 3, 5), (i, i, i)).save(tmp_path / f"{i}.png")
    batches = list(stream(ArchiveImages(ImageArchive(tmp_path)), torch.arange(9), 9, ONE))
    assert [tuple(images.shape) for _, images in batches] == [(3, 3, 5, 4), (3, 3, 5, 5), (3, 3, 5, 6)]
    for positions, images in batches:
        assert (images[:, 0, 0, 0] == positions).all()


def npz_of(path, array, **options):
    np.savez(path, arr_0=array, **options)
    return path


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((3, 4, 4, 3), np.nan, np.float32), r"arr_0 is float32 \(3, 4, 4, 3\); images are uint8"),
        (np.zeros((3, 3, 4, 4), np.uint8), r"uint8 \(3, 3, 4, 4\); images are uint8 \(N, H, W, 1 or 3\)"),
        (np.array([{"a": 1}], dtype=object), "arr_0 is object"),
        (np.zeros((0, 4, 4, 3), np.uint8), "arr_0 is uint8"),
    ],
)
def test_arrays_that_are_not_images_are_refused_by_their_header(tmp_path, array, message):
    with pytest.raises(UserError, match=message):
        NpzImages(npz_of(tmp_path / "a.npz", array))


def test_damaged_files_are_named(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a\.npz: not an npz file"):
        NpzImages(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", mu=np.zeros(3))
    with pytest.raises(UserError, match="no arr_0 in it"):
        NpzImages(tmp_path / "b.npz")
    whole = io.BytesIO()
    np.lib.format.write_array(whole, pixels())
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as file:
        file.writestr("arr_0.npy", whole.getvalue()[:-50])
    with pytest.raises(UserError, match="cut short at image 22 of 23"):
        list(stream(NpzImages(tmp_path / "c.npz"), torch.arange(23), 4, ONE))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no images"):
        open_images(tmp_path / "empty")
