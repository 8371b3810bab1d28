"""Embeddings against closed forms, in Python's own floats."""

import math

import pytest
import torch
from torch.testing import assert_close

from diffit.models.embeddings import LabelEmbedder, TimestepEmbedder, timestep_features


def closed_form(t: float, dim: int, max_period: float) -> list[float]:
    """CONTRACT §3: cos ‖ sin, frequencies exp(−ln(max_period)·i/(dim/2))."""
    frequencies = [max_period ** (-i / (dim / 2)) for i in range(dim // 2)]
    return [math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies]


@pytest.mark.parametrize(("dim", "max_period"), [(256, 10_000), (8, 10_000), (6, 100)])
def test_features_are_the_closed_form_in_float64(dim, max_period):
    t = torch.tensor([0, 0.25, 1, 17, 500.5, 999, -1.55], dtype=torch.float64)
    expected = torch.tensor([closed_form(value, dim, max_period) for value in t.tolist()], dtype=torch.float64)
    features = timestep_features(t, dim, max_period)
    assert features.dtype == torch.float64
    assert_close(features, expected, rtol=0, atol=1e-12)


def test_features_at_zero_are_ones_then_zeros():
    assert timestep_features(torch.zeros(1), 6).tolist() == [[1, 1, 1, 0, 0, 0]]


def test_the_lowest_frequency_has_half_the_width_in_its_denominator():
    turned = timestep_features(torch.tensor([1.0], dtype=torch.float64), 256)[0, 255]
    assert turned.item() == pytest.approx(math.sin(10_000 ** (-127 / 128)), rel=1e-12)  # not 10⁻⁴, as with half − 1


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16, torch.float32])
def test_features_are_float32_at_least(dtype):
    t = torch.tensor([0, 3, 250], dtype=dtype)
    expected = torch.tensor([closed_form(value, 16, 10_000) for value in (0, 3, 250)])
    assert_close(timestep_features(t, 16), expected, rtol=0, atol=3e-5)


def test_float32_features_tell_neighbouring_noise_levels_apart():
    c_noise = torch.linspace(math.log(0.002) / 4, math.log(80) / 4, 1000)
    features = timestep_features(c_noise, 256)
    assert (features[1:] - features[:-1]).abs().amax(dim=1).min() > 1e-4


def test_the_time_embedding_is_an_mlp_with_silu_over_the_features():
    embedder = TimestepEmbedder(5, feature_dim=8).double()
    first, second = (tuple(layer.parameters()) for layer in (embedder.mlp[0], embedder.mlp[2]))
    t = torch.tensor([0.3, 700.0], dtype=torch.float64)
    hidden = timestep_features(t, 8) @ first[0].T + first[1]
    assert_close(embedder(t), (hidden / (1 + torch.exp(-hidden))) @ second[0].T + second[1], rtol=1e-12, atol=1e-12)
    assert set(embedder.state_dict()) == {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}


def test_the_label_table_has_one_row_more_for_the_null_class():
    embedder = LabelEmbedder(10, 4)
    assert {key: tuple(value.shape) for key, value in embedder.state_dict().items()} == {
        "embedding_table.weight": (11, 4)
    }
    labels = torch.tensor([10, 0, 3])
    assert_close(embedder(labels), embedder.embedding_table.weight[labels], rtol=0, atol=0)


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_the_label_table_is_drawn_with_the_deviation_asked_for(std):
    torch.manual_seed(0)
    embedder = LabelEmbedder(999, 64)
    embedder.init_weights(std)
    assert embedder.embedding_table.weight.std().item() == pytest.approx(std, rel=0.02)
