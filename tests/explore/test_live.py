"""A sampler that is watched gives the same sample, and stops when nobody watches."""

import gc
import threading
import time

import pytest
import torch

from diffit.explore import TrainingImages, live
from explore.toys import image_model
from helpers import write_archive


def watchers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "diffit-live"]


def test_every_step_is_seen_and_the_last_is_the_sample():
    model = image_model(steps=5)
    seen = list(live(lambda callback: model.sample([3], 1, callback=callback)))
    assert [progress.step for progress in seen] == [0, 1, 2, 3, 4, 5]
    assert all(progress.denoised.shape == (1, 3, 12, 20) for progress in seen[:-1])
    assert [p.level for p in seen[:-1]] == sorted((p.level for p in seen[:-1]), reverse=True)
    assert torch.equal(seen[-1].result, model.sample([3], 1))
    assert not watchers()


@pytest.mark.parametrize("how", ["closed", "dropped", "before the first step"])
def test_a_sampler_that_is_not_watched_any_more_stops_at_its_next_step(how):
    calls = []

    def work(callback):
        for i in range(10**6):
            calls.append(i)
            callback(i, torch.tensor(1.0), torch.zeros(1), torch.zeros(1))
        return torch.zeros(1)

    steps = live(work)
    if how != "before the first step":
        next(steps), next(steps)
    if how == "dropped":
        del steps
        gc.collect()
    else:
        steps.close()
    assert len(calls) <= 2
    deadline = time.monotonic() + 5
    while watchers() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not watchers()


def test_an_error_of_the_work_is_raised_to_who_watches():
    with pytest.raises(ZeroDivisionError):
        list(live(lambda callback: 1 / 0))
    assert not watchers()


def test_the_nearest_training_images_are_those_that_a_loop_finds(tmp_path):
    training = TrainingImages(write_archive(tmp_path / "a.zip", 12, side=8))
    everything = torch.stack(list(training.images.rows(range(12))))
    samples = torch.stack([everything[7], 255 - everything[2]])
    found = training.nearest(samples, k=2)
    for i, sample in enumerate(samples):
        distances = sorted(((float((sample - image.float()).div(255).norm()), j) for j, image in enumerate(everything)))
        assert found.indices[i].tolist() == [j for _, j in distances[:2]]
        assert torch.equal(found.images[i][0], everything[distances[0][1]])
    assert found.distances[0, 0] == 0
