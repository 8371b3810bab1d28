"""Dropout whose mask is drawn four values at a time: how many, which, and what is learned through it."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffit.models.block import dropped_linear

COUNT = 400_003  # no multiple of 4


def identity(size):
    layer = nn.Linear(size, size, bias=False)
    nn.init.eye_(layer.weight)
    return layer


@pytest.mark.parametrize("p", [0.1, 0.13, 0.5, 0.9])
def test_values_are_dropped_as_often_as_is_said_and_the_others_scaled(p):
    unit = identity(1)
    torch.manual_seed(0)
    out = dropped_linear(torch.ones(COUNT, 1), unit, p).flatten()
    kept = out != 0
    assert abs(float(kept.double().mean()) - (1 - p)) < 4 * (p * (1 - p) / COUNT) ** 0.5
    assert_close(out[kept], torch.full_like(out[kept], 1 / (1 - p)), rtol=1e-4, atol=0)  # p is a multiple of 2⁻¹⁶


def test_values_of_one_draw_are_dropped_independently():
    unit = identity(1)
    torch.manual_seed(0)
    kept = (dropped_linear(torch.ones(COUNT, 1), unit, 0.3).flatten()[: COUNT - 3] != 0).double()
    four = kept.view(-1, 4) - 0.7
    covariance = four.T @ four / len(four)
    assert_close(covariance, 0.21 * torch.eye(4, dtype=torch.float64), rtol=0, atol=4 * 0.21 / len(four) ** 0.5)


def test_a_layer_and_its_inputs_learn_from_what_is_kept():
    layer, unit, x = nn.Linear(5, 3), identity(5), torch.randn(7, 5, requires_grad=True)
    torch.manual_seed(1)
    kept = dropped_linear(torch.ones(7, 5), unit, 0.4)
    torch.manual_seed(1)
    out = dropped_linear(x, layer, 0.4)
    assert_close(out, layer(x * kept))
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), [x, *layer.parameters()])
    expected = torch.autograd.grad((layer(x * kept) * weights).sum(), [x, *layer.parameters()])
    assert_close(found, expected)
