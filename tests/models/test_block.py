"""Dropout whose mask is drawn four values at a time: how many, which, and what is learned through it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from diffit.configs.resolve import resolve
from diffit.models import block
from diffit.models.block import Mlp, has_fused_gelu, linear_gelu
from diffit.sampling.model import prepare
from diffit.training.step import build_network
from diffit.utils.precision import autocast

COUNT = 400_003  # no multiple of 4


def copies(p, size=1):
    """A layer of so many values that gives GELU(10) = 10 of each that it keeps, times what it scales by."""
    mlp = Mlp(size, size, dropout=p)
    for layer in (mlp.fc1, mlp.fc2):
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
    return mlp


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.13, 0.5, 0.9])
def test_values_are_dropped_as_often_as_is_said_and_the_others_scaled(p, dtype):
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        out = copies(p)(torch.full((COUNT, 1), 10.0)).flatten().float()
    kept = out != 0
    assert abs(float(kept.double().mean()) - (1 - p)) < 4 * (p * (1 - p) / COUNT) ** 0.5
    # p is a multiple of 2⁻¹⁶
    assert_close(
        out[kept], torch.full_like(out[kept], 10 / (1 - p)), rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=0
    )


def test_values_of_one_draw_are_dropped_independently():
    torch.manual_seed(0)
    kept = (copies(0.3)(torch.full((COUNT, 1), 10.0)).flatten()[: COUNT - 3] != 0).double()
    four = kept.view(-1, 4) - 0.7
    covariance = four.T @ four / len(four)
    assert_close(covariance, 0.21 * torch.eye(4, dtype=torch.float64), rtol=0, atol=4 * 0.21 / len(four) ** 0.5)


@pytest.mark.parametrize("p", [1e-7, 0.4, 1.0])
def test_what_is_learned_is_that_of_the_written_out_layer(p):
    mlp, x = Mlp(5, 6, dropout=p), torch.randn(7, 3, 5, requires_grad=True)
    mask = copies(p, 6)
    torch.manual_seed(1)
    keep = (mask(torch.full((7, 3, 6), 10.0)) / 10).detach()
    torch.manual_seed(1)
    out = mlp(x)
    expected = mlp.fc2(F.gelu(mlp.fc1(x), approximate="tanh") * keep)
    assert_close(out, expected)
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), [x, *mlp.parameters()])
    assert_close(found, torch.autograd.grad((expected * weights).sum(), [x, *mlp.parameters()]))


def test_no_value_of_a_network_is_large_enough_not_to_be_dropped():
    with torch.autocast("cpu", torch.bfloat16):
        out = copies(0.5)(torch.full((1000, 1), 2000.0))
    assert 0.4 < (out == 0).double().mean() < 0.6


def test_a_graph_has_the_dropout_of_pytorch():
    mlp = copies(0.5)
    torch.manual_seed(0)
    graph = torch.compile(mlp, fullgraph=True, backend="eager")
    found = graph(torch.full((400, 1), 10.0))
    torch.manual_seed(0)
    assert_close(found, F.dropout(torch.full((400, 1), 10.0), 0.5))


@pytest.mark.skipif(not has_fused_gelu(), reason="this CPU has no such kernel")
def test_gelu_of_a_layer_in_one_kernel_is_as_near_to_the_formula_as_two_are():
    torch.manual_seed(0)
    mlp, x = Mlp(40, 24).to(torch.bfloat16), torch.randn(300, 5, 40)
    exact = F.linear(x.to(torch.bfloat16).double(), mlp.fc1.weight.double(), mlp.fc1.bias.double())
    exact = 0.5 * exact * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (exact + 0.044715 * exact**3)))
    one = linear_gelu(x.to(torch.bfloat16), mlp.fc1.weight, mlp.fc1.bias).double()
    two = F.gelu(mlp.fc1(x.to(torch.bfloat16)), approximate="tanh").double()
    assert (one - exact).square().mean() < (two - exact).square().mean() < 1e-4


@pytest.mark.skipif(not has_fused_gelu(), reason="this CPU has no such kernel")
@pytest.mark.parametrize(("precision", "used"), [("bf16", True), ("fp32", False)])
def test_the_kernel_is_that_of_networks_prepared_for_sampling_in_bfloat16(precision, used, monkeypatch):
    called = []
    monkeypatch.setattr(block, "linear_gelu", lambda *args: called.append(args) or linear_gelu(*args))
    config = resolve("debug", {})
    net = build_network(config)
    inputs = torch.randn(2, 3, 16, 16), torch.zeros(2)
    with autocast(torch.device("cpu"), "bf16"), torch.no_grad():
        net.eval()(*inputs)
    assert not called
    net = prepare(net, precision)
    with autocast(torch.device("cpu"), precision), torch.no_grad():
        net(*inputs)
    assert bool(called) is used


@pytest.mark.parametrize("name", ["fc1", "fc2"])
def test_a_layer_that_another_has_taken_the_place_of_is_called(name):
    """As quantisation and adapters do."""
    mlp, called = copies(0.5).to(torch.bfloat16), []
    setattr(mlp, name, nn.Sequential(getattr(mlp, name)))
    getattr(mlp, name).register_forward_hook(lambda *_: called.append(name))
    mlp.fuses_gelu = has_fused_gelu()
    with torch.no_grad():
        mlp(torch.ones(4, 1, dtype=torch.bfloat16))
    mlp.train()(torch.ones(4, 1, dtype=torch.bfloat16))
    assert called == [name, name]
