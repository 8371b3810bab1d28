"""Interpolation: its ends are plain samples, and what lies between is what noise and embeddings say."""

import math
import threading

import pytest
import torch
from torch.testing import assert_close

from diffit.errors import UserError
from diffit.explore import interpolate, sample_grid, slerp
from diffit.utils.randomness import PerSampleNoise
from explore.toys import image_model, latent_model

MODELS = [image_model, latent_model]
HOW = [{}, {"cfg_scale": 2.0}]


def test_slerp_keeps_to_the_circle_and_ends_to_the_bit():
    first, second = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    angles = torch.linspace(0, 1, 7, dtype=torch.float64)
    expected = torch.stack([(angles * math.pi / 2).cos(), (angles * math.pi / 2).sin()], dim=1)
    assert_close(slerp(first, second, angles), expected)
    a, b = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    ends = slerp(a, b, torch.tensor([0.0, 1.0]))
    assert torch.equal(ends[0], a)
    assert torch.equal(ends[1], b)
    assert_close(slerp(a, a, angles), a.expand(7, *a.shape))


def test_noise_between_two_seeds_has_the_norm_of_noise():
    a, b = PerSampleNoise([0, 1])(torch.empty(2, 4, 32, 32, dtype=torch.float64))
    norms = slerp(a, b, torch.linspace(0, 1, 9)).flatten(1).norm(dim=1)
    assert ((norms / math.sqrt(4096) - 1).abs() < 0.05).all()


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("make", MODELS)
def test_the_ends_are_the_plain_samples_of_their_seeds_and_classes(make, how):
    model = make(**how)
    frames = interpolate(model, (3, 7), (0, 2), frames=4)
    assert frames.shape[0] == 4
    assert_close(frames[[0, 3]], model.sample([3, 7], [0, 2]), rtol=1e-4, atol=1e-4)
    drawn = interpolate(model, (3, 7), frames=2)  # each seed's own class
    assert_close(drawn, model.sample([3, 7]), rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks for module in model.net.modules())


@pytest.mark.parametrize("make", MODELS)
def test_between_two_classes_lies_the_sample_of_the_embedding_between_them(make):
    model = make(cfg_scale=2.0)
    frames = interpolate(model, (4, 4), (0, 2), frames=3)
    table = model.net.y_embedder.embedding_table.weight
    table.data[1] = (table[0] + table[2]) / 2  # a class of its own in the middle
    assert_close(frames[1:2], model.sample([4], 1), rtol=1e-4, atol=1e-4)


def test_the_guide_goes_between_the_classes_too():
    model = image_model(cfg_scale=2.0)
    torch.manual_seed(3)
    guide = image_model(cfg_scale=2.0)
    for parameter in guide.net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    guided = model.guided_by(guide)
    frames = interpolate(guided, (4, 4), (0, 2), frames=3)
    for net in (model.net, guide.net):
        table = net.y_embedder.embedding_table.weight
        table.data[1] = (table[0] + table[2]) / 2
        assert not net.y_embedder._forward_hooks
    assert_close(frames[1:2], guided.sample([4], 1), rtol=1e-4, atol=1e-4)


def test_the_frames_of_one_seed_and_class_are_all_the_same():
    model = image_model()
    frames = interpolate(model, (4, 4), 1, frames=3)
    assert_close(frames, model.sample([4], 1).expand_as(frames), rtol=1e-4, atol=1e-4)


def test_a_grid_has_a_row_per_class_and_a_column_per_seed():
    model = image_model()
    grid = sample_grid(model, [5, 6], [2, 0, 1])
    assert grid.shape[:2] == (3, 2)
    assert_close(grid[1, 1], model.sample([6], 0)[0], rtol=1e-4, atol=1e-4)


def test_one_frame_is_refused():
    with pytest.raises(UserError, match="frames 1"):
        interpolate(image_model(), (0, 1), frames=1)


@pytest.mark.parametrize("make", MODELS)
def test_who_samples_from_the_same_network_meanwhile_gets_plain_images(make):
    """As the page does when a request is cancelled and its last step is still computed."""
    model = make()
    expected = model.sample(range(4), 1)
    found = []

    def look(*_):
        if not found:
            other = threading.Thread(target=lambda: found.append(model.sample(range(4), 1)))
            other.start()
            other.join()

    interpolate(model, (3, 7), (0, 2), frames=4, callback=look)
    assert_close(found[0], expected, rtol=0, atol=0)
