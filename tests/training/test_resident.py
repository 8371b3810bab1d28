import os

import psutil
import pytest
import torch

from diffit.data.archive import ImageArchive
from diffit.data.encode import encode_archive
from diffit.data.latents import LatentArchive
from diffit.models.autoencoder import load_autoencoder
from diffit.training import resident
from diffit.training.resident import fits, load_resident
from diffit.utils.distributed import alone
from helpers import run_processes, write_archive, write_vae

CPU = alone("cpu")


def test_images_may_take_a_quarter_of_what_is_free():
    assert fits(100, 400)
    assert not fits(101, 400)


@pytest.mark.parametrize("chunk", [1, 5 * 16 * 16 * 3, 2**26])
def test_it_is_every_image_whatever_is_read_at_a_time(tmp_path, monkeypatch, chunk):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip", 24))
    monkeypatch.setattr(resident, "CHUNK", chunk)
    monkeypatch.setattr(resident, "FEWEST", 1)
    images, said = load_resident(archive, CPU, 0)
    assert torch.equal(images, torch.stack([archive[i] for i in range(24)]))
    assert "in memory, decoded in" in said


def test_what_does_not_fit_is_streamed_and_not_even_asked_for():
    """A hundred times the machine's memory, which the system would refuse."""

    class Huge:
        def __len__(self):
            return 100 * psutil.virtual_memory().total // 2**20

        def __getitem__(self, i):
            return torch.empty(2**20, dtype=torch.uint8)

    images, said = load_resident(Huge(), CPU, 2)
    assert images is None
    assert said.startswith("streamed by 2 workers: ")
    assert said.endswith(" GiB do not fit")


def test_latents_are_read_in_parts_across_their_shards(tmp_path, monkeypatch):
    source = write_archive(tmp_path / "pets.zip", 11, side=32)
    encode_archive(source, tmp_path / "latents", load_autoencoder(write_vae(tmp_path / "vae")), shard_size=4)
    archive = LatentArchive(tmp_path / "latents")
    rows = torch.stack([archive[i] for i in range(11)])
    for part in (range(11), range(3, 9), range(4, 8), range(10, 11), range(1)):
        assert torch.equal(archive.load(part), rows[part.start : part.stop])
    monkeypatch.setattr(resident, "CHUNK", 3 * rows[0].nbytes)
    monkeypatch.setattr(resident, "FEWEST", 1)
    assert torch.equal(load_resident(archive, CPU, 0)[0], rows)


SHARED = """
import os
import sys
import torch
import torch.distributed as dist
from diffit.data.archive import ImageArchive
from diffit.training import resident
from diffit.utils import shared
from diffit.utils.distributed import processes

archive = ImageArchive({path!r})
expected = archive.load_all()
with processes() as procs:
    resident.CHUNK, resident.FEWEST = 5 * expected[0].nbytes, 1
    read, honest = [], archive.load
    archive.load = lambda part: read.append(part) or honest(part)
    images, said = resident.load_resident(archive, procs, 0)
    assert torch.equal(images, expected)
    assert "one copy for 2 processes" in said, said
    assert [part.start for part in read] == ([0, 10, 20] if procs.is_first else [5, 15])
    procs.barrier()
    if procs.is_first:
        images[7] += 1
    procs.barrier()
    assert torch.equal(images[7], expected[7] + 1)  # the other's hand
    listed = [f"/proc/self/fd/{{number}}" for number in os.listdir("/proc/self/fd")]
    files = [os.readlink(file) for file in listed if os.path.lexists(file)]  # without the one for the listing
    assert not any("memfd" in file for file in files), files  # no descriptor is left

    if procs.rank == 1:  # one of them cannot
        torch.from_file = lambda *arguments, **options: (_ for _ in ()).throw(RuntimeError("unable to open file"))
    images, said = resident.load_resident(archive, procs, 0)
    assert torch.equal(images, expected)
    assert "in memory, decoded" in said, said

    archive.load = honest
    if procs.rank == 1:
        def broken(part):
            raise OSError(5, "broken")
        archive.load = broken
    try:
        resident.load_resident(archive, procs, 0)
    except Exception as error:
        assert "broken" in str(error)
    else:
        raise AssertionError("the first process did not hear of it")
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="no files in memory here")
def test_processes_of_a_machine_keep_one_copy_and_read_a_part_each(tmp_path):
    path = write_archive(tmp_path / "pets.zip", 24)
    run_processes(SHARED.format(path=str(path)), tmp_path)
