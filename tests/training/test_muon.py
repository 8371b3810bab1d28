"""Muon against its polynomial in float64, PyTorch's own, and Adam for what it leaves alone."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffit.configs.presets import get_preset
from diffit.configs.resolve import DataFacts, resolve
from diffit.errors import UserError
from diffit.models import build
from diffit.training.muon import Muon, hidden_weights, orthogonal
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import alone


@pytest.mark.parametrize("shape", [(5, 5), (3, 8), (8, 3), (2, 6, 4)])
def test_singular_vectors_stay_and_values_go_through_the_polynomial(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert_close(orthogonal(matrices), u @ torch.diag_embed(s) @ vh, atol=1e-5, rtol=0)
    assert 0.6 < s.min() <= s.max() < 1.3


def three_steps(optimizer, weight):
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return weight.detach()


def weight_of(*shape):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("shape", [(6, 6), (4, 12), (12, 4)])
def test_steps_are_those_of_pytorch_which_rounds_to_bfloat16(shape):
    ours, theirs, first = weight_of(*shape), weight_of(*shape), weight_of(*shape)
    moved = three_steps(Muon([{"params": [ours], "muon": True}], lr=0.1), ours)
    library = torch.optim.Muon([theirs], lr=0.1, weight_decay=0, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    expected = three_steps(library, theirs)
    # Fifteen products in bfloat16, each within 2⁻⁸: 6 % at most.
    assert (moved - expected).norm() < 0.06 * (expected - first).norm()


def test_matrices_of_one_shape_move_as_they_would_alone_and_a_convolution_as_a_matrix():
    one, other, convolution = weight_of(4, 18), nn.Parameter(weight_of(4, 18).detach() * 2), weight_of(4, 2, 3, 3)
    optimizer = Muon([{"params": [one, other, convolution], "muon": True}], lr=0.1)
    gradient = torch.randn(4, 18, generator=torch.Generator().manual_seed(3))
    one.grad, other.grad, convolution.grad = gradient.clone(), gradient.flip(0).clone(), gradient.view(4, 2, 3, 3)
    before = [weight.detach().clone() for weight in (one, other, convolution)]
    optimizer.step()
    moves = [weight.detach() - old for weight, old in zip((one, other, convolution), before, strict=True)]
    assert_close(moves[1], moves[0].flip(0))
    assert_close(moves[2].flatten(1), moves[0])
    assert moves[0].square().mean().sqrt() == pytest.approx(0.2 * 0.1, rel=0.2)


def test_large_stacks_go_in_parts_with_the_same_steps(monkeypatch):
    gradients = torch.randn(5, 4, 12, generator=torch.Generator().manual_seed(3))
    found = []
    for together in (2**24, 100, 1):
        monkeypatch.setattr("diffit.training.muon.TOGETHER", together)
        weights = [weight_of(4, 12) for _ in gradients]
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        Muon([{"params": weights, "muon": True}], lr=0.1).step()
        found.append(torch.stack([weight.detach() for weight in weights]))
    assert_close(found[1], found[0], atol=1e-6, rtol=0)
    assert_close(found[2], found[0], atol=1e-6, rtol=0)


def test_a_scaled_loss_moves_as_another_does_and_one_that_overflows_moves_nothing():
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    plain, scaled = weight_of(4, 6), weight_of(4, 6)
    optimizers = [Muon([{"params": [weight], "muon": True}], lr=0.1) for weight in (plain, scaled)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for factor in (1.0, float("inf"), 1.0):
        before, momentum = scaled.detach().clone(), dict(optimizers[1].state[scaled])
        scaler.scale(factor * (x @ scaled.mT).square().sum()).backward()
        scaler.step(optimizers[1])
        scaler.update()
        if factor == 1:
            (x @ plain.mT).square().sum().backward()
            optimizers[0].step()
            assert_close(scaled, plain, atol=1e-6, rtol=0)
        else:
            assert torch.equal(scaled, before)
            assert torch.equal(optimizers[1].state[scaled]["momentum_buffer"], momentum["momentum_buffer"])
            scaled.grad = None


def test_a_closure_gives_the_gradients_and_its_loss_comes_back():
    weight, expected = weight_of(4, 6), weight_of(4, 6)
    optimizer = Muon([{"params": [weight], "muon": True}], lr=0.1)
    expected.square().sum().backward()
    Muon([{"params": [expected], "muon": True}], lr=0.1).step()

    def closure():
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == weight_of(4, 6).square().sum()
    assert torch.equal(weight, expected)


def test_the_rest_moves_by_adam_to_the_bit():
    ours, theirs, matrix = weight_of(7), weight_of(7), weight_of(3, 3)
    optimizer = Muon([{"params": [matrix], "muon": True}, {"params": [ours]}], lr=0.1, betas=(0.8, 0.9))
    expected = three_steps(torch.optim.Adam([theirs], lr=0.1, betas=(0.8, 0.9), fused=True), theirs)
    assert torch.equal(three_steps(optimizer, ours), expected)
    assert not optimizer.state[matrix]  # it never had a gradient


@pytest.mark.parametrize("preset", ["small16", "latent-debug"])
def test_hidden_weights_are_those_between_the_layers(preset):
    config = get_preset(preset)
    net = build(config.model)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = {names[id(weight)] for weight in hidden_weights(net)}
    rest = set(names.values()) - found
    assert all(name.endswith(".weight") for name in found)
    assert sum(".qkv." in name for name in found) == sum(name.endswith("qkv.weight") for name in names.values())
    assert {name for name in rest if name.endswith(".weight") and net.get_parameter(name).ndim > 1} == {
        name
        for name in names.values()
        if name.endswith("weight") and name.split(".")[0].endswith(("tokenizer", "head", "embedder", "final_layer"))
    }
    assert all("bias" in name for name in rest if net.get_parameter(name).ndim > 1 and not name.endswith(".weight"))


def stepper_of(**options):
    config = resolve("debug", {"batch": 4, "kimg": 0.1, **options}, DataFacts(3, (16, 16), 0))
    return Stepper(config, alone("cpu"), build_network(config), "fp32")


def images():
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randint(256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8), None


def test_a_run_goes_on_from_its_state_to_the_bit(tmp_path):
    whole, feed = stepper_of(optimizer="muon"), images()
    for step in range(6):
        if step == 3:
            whole.save(tmp_path / "training-state-000000")
        whole.step(feed)
    resumed, feed = stepper_of(optimizer="muon"), images()
    resumed.restore(tmp_path / "training-state-000000")
    for step in range(6):
        resumed.step(feed) if step >= 3 else next(feed)
    for name, tensor in whole.net.state_dict().items():
        assert torch.equal(tensor, resumed.net.state_dict()[name]), name


@pytest.mark.parametrize(("first", "then"), [("adam", "muon"), ("muon", "adam")])
def test_a_state_of_another_optimiser_is_refused(tmp_path, first, then):
    stepper = stepper_of(optimizer=first)
    stepper.step(images())
    stepper.save(tmp_path / "training-state-000000")
    with pytest.raises(UserError, match="another optimiser"):
        stepper_of(optimizer=then).restore(tmp_path / "training-state-000000")
