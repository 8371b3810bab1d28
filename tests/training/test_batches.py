from multiprocessing import reduction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffit.data.archive import ImageArchive
from diffit.errors import UserError
from diffit.training.batches import _loaded, feed, image_indices, microbatches
from helpers import write_archive


@given(count=st.integers(1, 40), epochs=st.integers(1, 4), seed=st.integers(0, 5))
def test_every_epoch_shows_each_image_once(count, epochs, seed):
    indices = image_indices(count, seed, 0, count * epochs).reshape(epochs, count)
    for epoch in indices:
        assert sorted(epoch.tolist()) == list(range(count))


@given(count=st.integers(1, 40), start=st.integers(0, 100), first=st.integers(1, 30), second=st.integers(1, 30))
def test_order_is_a_function_of_the_images_seen(count, start, first, second):
    whole = image_indices(count, 0, start, first + second)
    parts = [image_indices(count, 0, start, first), image_indices(count, 0, start + first, second)]
    assert torch.equal(whole, torch.cat(parts))


def test_epochs_and_seeds_differ():
    a, b = image_indices(50, 0, 0, 100).split(50)
    assert not torch.equal(a, b)
    assert not torch.equal(a, image_indices(50, 1, 0, 50))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_share_the_microbatches_of_one_process(processes):
    steps = 3
    single = microbatches(30, 7, 16, 16, 2, 0, 1)
    expected = [[next(single) for _ in range(8)] for _ in range(steps)]
    dealt = [microbatches(30, 7, 16, 16, 2, rank, processes) for rank in range(processes)]
    for step in range(steps):
        for m in range(8):
            assert torch.equal(next(dealt[m % processes]), expected[step][m])


@pytest.mark.parametrize("workers", [0, 2])
def test_streamed_images_are_those_in_memory(tmp_path, workers):
    archive = ImageArchive(write_archive(tmp_path / "a.zip"), cond=True)
    cpu = torch.device("cpu")
    resident = feed(archive, microbatches(24, 0, 0, 8, 4, 0, 1), cpu, resident=archive.load_all(), workers=0)
    streamed = feed(archive, microbatches(24, 0, 0, 8, 4, 0, 1), cpu, resident=None, workers=workers)
    for _ in range(8):
        (images, labels), (other_images, other_labels) = next(resident), next(streamed)
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_faulty_streamed_image_is_named_in_one_line(tmp_path, workers):
    for name, side in (("a", 16), ("b", 8)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    images = feed(
        ImageArchive(tmp_path), microbatches(2, 0, 0, 2, 2, 0, 1), torch.device("cpu"), resident=None, workers=workers
    )
    with pytest.raises(UserError, match=r"b\.png' is 8x8") as caught:
        next(images)
    assert "\n" not in str(caught.value)


def test_no_socket_of_this_process_serves_the_workers(tmp_path, monkeypatch):
    """Its thread would print a traceback when a worker dies while it is served."""
    honest, served = reduction.DupFd, []
    monkeypatch.setattr(reduction, "DupFd", lambda descriptor: served.append(descriptor) or honest(descriptor))
    archive = ImageArchive(write_archive(tmp_path / "a.zip", 12))
    images = feed(archive, microbatches(12, 0, 0, 4, 4, 0, 1), torch.device("cpu"), resident=None, workers=1)
    assert [next(images)[0].shape[0] for _ in range(3)] == [4, 4, 4]
    assert served == []  # the worker, a fork, has a list of its own


def test_order_does_not_touch_ambient_randomness():
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    image_indices(10, 0, 0, 10)
    assert torch.equal(before, torch.get_rng_state())
    assert (before_numpy == np.random.get_state()[1]).all()  # noqa: NPY002


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
    ],
)
def test_however_a_loader_process_dies_it_is_said_in_one_line(error):
    """By torch's word for it, or by the end of the pipe through which a batch was to come. Found by `make faults`."""

    def images():
        yield 1
        raise error

    found = _loaded(images())
    assert next(found) == 1
    with pytest.raises(UserError, match="a process that reads images has died"):
        next(found)


def test_what_a_loader_process_raises_is_not_taken_for_its_death():
    def images():
        yield 1
        raise ConnectionResetError("Caught ConnectionResetError in DataLoader worker process 0.")

    with pytest.raises(ConnectionResetError):
        list(_loaded(images()))
