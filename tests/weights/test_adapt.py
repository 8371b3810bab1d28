"""Weights of one network as the beginning of another: what must come out is said by the network that they are from."""

import pytest
import torch
from torch.testing import assert_close

from diffit.configs.presets import get_preset
from diffit.configs.resolve import DataFacts, resolve
from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.models import DiffiT, build
from diffit.weights.adapt import init_from
from diffit.weights.export import export
from diffit.weights.file import save_network


def noisy(config: Config, seed: int = 0) -> DiffiT:
    """A network whose every part has an effect."""
    torch.manual_seed(seed)
    net = build(config.model).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return net


def begin(tmp_path, source: Config, target: Config) -> tuple[DiffiT, DiffiT, str]:
    old, new = noisy(source), noisy(target, seed=1)
    save_network(tmp_path / "net.safetensors", old.state_dict(), source)
    return old, new, init_from(new, target, tmp_path / "net.safetensors")


def image(*shape: int) -> torch.Tensor:
    return torch.randn(2, *shape, generator=torch.Generator().manual_seed(3))


LEVEL = torch.tensor([-0.3, 0.4])


@torch.no_grad()
def test_other_classes_keep_the_null_class(tmp_path):
    source, target = (resolve("debug", {"cond": True}, DataFacts(3, (16, 16), n)) for n in (3, 5))
    old, new, line = begin(tmp_path, source, target)
    x = image(3, 16, 16)
    assert_close(new(x, LEVEL, torch.tensor([5, 5])), old(x, LEVEL, torch.tensor([3, 3])))
    assert "label table begun again for 5 classes, null class kept" in line


@torch.no_grad()
@pytest.mark.parametrize("preset", ["debug", "latent-debug"])
def test_without_classes_it_is_the_null_class_of_before(tmp_path, preset):
    size = (16, 16) if preset == "debug" else (32, 32)
    source = resolve(preset, {"cond": True}, DataFacts(3, size, 3))
    target = resolve(preset, {}, DataFacts(3, size))
    old, new, line = begin(tmp_path, source, target)
    x = image(*source.model.sample_shape)
    assert_close(new(x, LEVEL), old(x, LEVEL, torch.tensor([3, 3])), rtol=1e-4, atol=1e-5)
    assert "part of the time token" in line


@torch.no_grad()
def test_colour_becomes_gray_and_gray_becomes_colour(tmp_path):
    rgb, gray = (resolve("debug", {}, DataFacts(channels, (16, 16))) for channels in (3, 1))
    x = image(1, 16, 16)
    old, new, line = begin(tmp_path, rgb, gray)
    assert_close(new(x, LEVEL), old(x.expand(-1, 3, -1, -1), LEVEL).mean(1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert "input of 3 channels as 1" in line
    old, new, _ = begin(tmp_path, gray, rgb)
    assert_close(new(x.expand(-1, 3, -1, -1), LEVEL), old(x, LEVEL).expand(-1, 3, -1, -1), rtol=1e-4, atol=1e-5)


def test_position_biases_are_the_same_function_of_the_place_on_a_larger_map(tmp_path):
    source, target = (resolve("latent-debug", {}, DataFacts(3, (side, side))) for side in (32, 48))
    old, new = noisy(source), noisy(target, seed=1)

    def plane(side: int) -> torch.Tensor:
        axis = torch.linspace(-1, 1, 2 * side - 1)
        return (2 * axis[:, None] - 3 * axis + 0.5).reshape(-1, 1).expand(-1, 2)

    for block in old.blocks:
        block.attn.relative_position_bias_table.data.copy_(plane(2))
    save_network(tmp_path / "net.safetensors", old.state_dict(), source)
    line = init_from(new, target, tmp_path / "net.safetensors")
    assert_close(new.blocks[1].attn.relative_position_bias_table.data, plane(3).contiguous())
    assert_close(new.blocks[0].mlp.fc1.weight, old.blocks[0].mlp.fc1.weight)
    assert "position biases resampled" in line


def test_position_biases_of_a_map_that_is_turned_are_not_taken_for_its_own(tmp_path):
    """Both tables have 21 offsets."""
    source, target = (resolve("latent-debug", {}, DataFacts(3, size)) for size in ((32, 64), (64, 32)))
    old, new = noisy(source), noisy(target, seed=1)

    def plane(height: int, width: int) -> torch.Tensor:
        y, x = (torch.linspace(-1, 1, 2 * side - 1) for side in (height, width))
        return (2 * y[:, None] - 3 * x + 0.5).reshape(-1, 1).expand(-1, 2)

    for block in old.blocks:
        block.attn.relative_position_bias_table.data.copy_(plane(2, 4))
    save_network(tmp_path / "net.safetensors", old.state_dict(), source)
    line = init_from(new, target, tmp_path / "net.safetensors")
    assert_close(new.blocks[1].attn.relative_position_bias_table.data, plane(4, 2).contiguous())
    assert "position biases resampled" in line


def test_a_file_with_more_than_its_header_says_gives_what_fits(tmp_path):
    config = resolve("latent-debug", {}, DataFacts(3, (32, 32)))
    shallow = config.model_copy(update={"model": config.model.model_copy(update={"depth": 1})})
    old, new = noisy(config), noisy(config, seed=1)
    save_network(tmp_path / "net.safetensors", old.state_dict(), shallow)
    assert "carried over" in init_from(new, config, tmp_path / "net.safetensors")
    assert_close(new.blocks[1].mlp.fc1.weight, old.blocks[1].mlp.fc1.weight)


def test_a_wider_time_token_leaves_the_null_class_behind(tmp_path):
    source = resolve("debug", {"cond": True}, DataFacts(3, (16, 16), 3))
    target = resolve("debug", {}, DataFacts(3, (16, 16)))
    wider = target.model_copy(update={"model": target.model.model_copy(update={"cond_dim": 2 * target.model.cond_dim})})
    old, new, line = begin(tmp_path, source, wider)
    assert_close(new.tokenizer.weight, old.tokenizer.weight)
    assert "null class" not in line
    assert "begun again" in line


def test_another_prediction_is_said(tmp_path):
    source = resolve("debug", {"diffusion": "cosine"})
    v = resolve("debug", {"diffusion": "cosine", "prediction": "v"})
    assert "it predicted epsilon, this network predicts v" in begin(tmp_path, source, v)[2]
    assert "predict" not in begin(tmp_path, source, source)[2]
    assert "it predicted as EDM does, this network predicts v" in begin(tmp_path, resolve("debug", {}), v)[2]


def test_one_stage_more_is_put_below_the_others(tmp_path):
    source, target = (resolve("small32", {"resolution": (side, side)}) for side in (32, 64))
    old, new, line = begin(tmp_path, source, target)
    assert (len(old.decoder), len(new.decoder)) == (2, 3)
    theirs, ours = old.decoder[-1][0].conv.weight, new.decoder[-1][0].conv.weight
    assert_close(ours, theirs)
    assert "tensors carried over" in line


def test_the_official_layout_is_tuned_on_other_classes(tmp_path):
    config = resolve("latent-debug", {"cond": True}, DataFacts(3, (32, 32), 7))
    old = noisy(config)
    save_network(tmp_path / "net.safetensors", old.state_dict(), config)
    official = export(tmp_path / "net.safetensors", "official", tmp_path / "official.safetensors")
    target = resolve("latent-debug", {"cond": True}, DataFacts(3, (32, 32), 3))
    new = noisy(target, seed=1)
    line = init_from(new, target, official)
    x = image(4, 4, 4)
    with torch.no_grad():
        assert_close(new(x, LEVEL, torch.tensor([3, 3])), old(x, LEVEL, torch.tensor([7, 7])))
    assert "null class kept" in line


def test_another_network_is_refused(tmp_path):
    save_network(tmp_path / "net.safetensors", noisy(get_preset("debug")).state_dict(), get_preset("debug"))
    with pytest.raises(UserError, match="of the image family, the run's is of the latent family"):
        init_from(build(get_preset("latent-debug").model), get_preset("latent-debug"), tmp_path / "net.safetensors")
    wide = resolve("debug", {"base_dim": 32, "hidden_dim": 64, "num_heads": 4})
    with pytest.raises(UserError, match="it is another network"):
        init_from(build(wide.model), wide, tmp_path / "net.safetensors")
