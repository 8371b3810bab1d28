"""The comparisons of `experiments`, at toy size: that they compare what they say."""

from functools import partial

import pytest
import torch
from experiments import ablations, learning, unet
from experiments.learning import Results
from experiments.variants import VARIANTS, AdaLN, Attention, make
from torch.testing import assert_close

from diffit.configs.presets import get_preset
from diffit.configs.resolve import resolve
from diffit.data.archive import ImageArchive
from diffit.models.attention import TMSA
from diffit.models.cost import count_parameters
from diffit.training.muon import hidden_weights
from diffit.training.step import build_network
from diffit.utils.images import to_float
from helpers import write_archive

MODEL = get_preset("small16").model.model_copy(update={"mlp_ratio": 4.0})


def inputs(requires_grad=False):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 16, 16, generator=generator).requires_grad_(requires_grad)
    return x, torch.tensor([-0.5, 0.8])


@pytest.mark.parametrize("window", [4, None])
def test_attention_by_its_parts_is_ours(window):
    torch.manual_seed(0)
    ours = TMSA(16, 8, 2, grid_size=8, window_size=window)
    parts = Attention(ours)
    parts.load_state_dict(ours.state_dict())
    x, cond = torch.randn(3, 8, 8, 16), torch.randn(3, 8)
    assert_close(parts(x, cond), ours(x, cond))


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_has_as_many_parameters_all_of_them_used_and_heeds_the_noise_level(name):
    net = make(name, MODEL, "xavier", 0).eval()
    assert abs(sum(p.numel() for p in net.parameters()) / count_parameters(MODEL) - 1) < 0.02
    for module in net.modules():  # what begins at 0 would hide the rest
        if isinstance(module, AdaLN):
            torch.nn.init.normal_(module.modulation.weight, std=0.1)
    torch.nn.init.normal_(net.head.weight, std=0.1)
    x, t = inputs()
    out = net(x, t)
    assert (net(x, t + 0.3) - out).abs().max() > 1e-5
    out.square().mean().backward()
    unused = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not unused


def test_ours_among_the_variants_is_the_network_that_is_trained():
    config = resolve("small16", {})
    net, ours = make("tmsa", config.model, "fan_in", 0), build_network(config)
    assert abs(net.encoder[0][0].block.mlp.fc1.out_features - ours.encoder[0][0].block.mlp.fc1.out_features) <= 1
    assert {key for key, _ in net.named_parameters()} == {key for key, _ in ours.named_parameters()}


def test_the_time_token_takes_its_part_in_every_window_and_is_dropped():
    """By hand: softmax over the window's tokens and one more."""
    net = make("time token", MODEL, "xavier", 0)
    attention = net.encoder[0][0].block.attn
    x, cond = torch.randn(1, 16, 16, 48), torch.randn(1, 128)
    qkv, time = attention.qkv(x)[0, :4, :4].reshape(16, -1), attention.qkv(attention.token(cond))[0]
    q, k, v = torch.cat([qkv, time[None]]).view(17, 3, 1, 48).permute(1, 2, 0, 3)
    bias = torch.nn.functional.pad(attention.bias(cond, (4, 4)), (0, 1, 0, 1))
    weights = (q @ k.mT / 48**0.5 + bias).softmax(-1)
    expected = attention.proj((weights @ v).transpose(0, 1).reshape(17, 48)[:16])
    assert_close(attention(x, cond)[0, :4, :4].reshape(16, -1), expected)


@pytest.fixture
def words(tmp_path, monkeypatch):
    """Of a command with few images, to be judged by few."""
    monkeypatch.setattr(learning, "VALIDATION", 8)
    few = partial(learning.distance, samples=80)
    monkeypatch.setattr(ablations, "distance", few)
    monkeypatch.setattr(unet, "distance", few)
    data, val = write_archive(tmp_path / "a.zip", 40), write_archive(tmp_path / "b.zip", 90)
    return ["--data", data, "--val", val, "--preset", "debug", "--seed", "0", "--dest", tmp_path / "found.jsonl"]


def test_a_command_that_is_started_again_does_only_what_is_missing(words, tmp_path, capsys):
    for other in ("global", "no bias"):
        ablations.main([*map(str, words), "--kimg", "0.08", "--name", "tmsa", "--name", other], standalone_mode=False)
    said = capsys.readouterr().out
    assert said.count("tmsa           seed 0") == 1
    assert said.count("no bias        seed 0") == 1
    records = Results(tmp_path / "found.jsonl").records
    assert [record["name"] for record in records] == ["tmsa", "global", "no bias"]
    assert [len(record["points"]) for record in records] == [5, 5, 5]
    assert all(len(record["points"][-1]["by_level"]) == 8 for record in records)
    assert "| no bias |" in said.splitlines()[-1]


def test_the_unet_has_as_many_multiply_accumulates_and_learns_for_as_long(words, tmp_path, capsys):
    pytest.importorskip("diffusers")
    config = resolve("small16", {})
    ours, other = (unet.products(net, config.model) for net in (build_network(config), unet.unet_like(config, 0)))
    assert abs(other / ours - 1) < 0.15
    marks = ["--minutes", "0.01", "--minutes", "0.02", "--side", "ours", "--side", "unet"]
    unet.main([*map(str, words), *marks], standalone_mode=False)
    records = Results(tmp_path / "found.jsonl").records
    assert [(record["name"], record["minutes"]) for record in records] == [
        (side, minutes) for minutes in (0.01, 0.02) for side in ("ours", "unet")
    ]
    for record in records:
        assert len(record["points"]) == 12
        assert 60 * record["minutes"] <= record["points"][-1]["seconds"] < 60 * record["minutes"] + 1.3
        assert 0 < record["points"][-1]["loss"] < 3
    said = capsys.readouterr().out
    unet.main([*map(str, words), *marks], standalone_mode=False)  # nothing is left to do
    assert said.endswith(capsys.readouterr().out)


def test_held_out_images_are_of_all_classes_of_an_archive_that_is_in_their_order(tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "VALIDATION", 30)
    archive = ImageArchive(write_archive(tmp_path / "a.zip", 90, in_order=True), cond=True)
    assert archive.labels[:30].unique().tolist() == [0]
    held_out = learning.HeldOut(get_preset("debug"), archive)
    assert held_out.labels.bincount().min() >= 5
    every = to_float(archive.load_all()).flatten(1)
    found = torch.cdist(held_out.images.flatten(1), every).argmin(1)
    assert len(found.unique()) == 30
    assert torch.equal(archive.labels[found], held_out.labels)


def test_where_a_curve_reaches_a_loss_is_read_off_between_its_points():
    points = [{"loss": 0.8, "images": 100}, {"loss": 0.4, "images": 200}]
    assert unet.place(points, 0.6, "images") == 150
    assert unet.place(points, 0.9, "images") == pytest.approx(50)
    assert unet.place(points, 0.3, "images") == float("inf")


def test_of_the_unet_muon_moves_what_it_moves_of_ours():
    pytest.importorskip("diffusers")
    net = unet.UNet(MODEL, 8)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    found = {names[id(weight)] for weight in hidden_weights(net)}
    outer = ("net.conv_in.weight", "net.conv_out.weight", "net.time_embedding.linear_1.weight")
    assert {net.get_parameter(name) for name in outer}.isdisjoint(hidden_weights(net))
    assert {"net.down_blocks.0.resnets.0.conv1.weight", "net.mid_block.attentions.0.to_q.weight"} <= found
