"""Files in the layout of NVIDIA's release, made here from its description, and what else people may give instead."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from diffit.errors import UserError
from diffit.models.attention import is_relative_position_index, relative_position_index
from diffit.models.latent import LatentDiffiT
from diffit.weights.file import load_network, save_network
from diffit.weights.official import to_official

SIDE, WIDTH, DEPTH, HEADS, CLASSES = 3, 16, 2, 4, 6


def expected_index(side: int) -> Tensor:
    """CONTRACT's row of the table for a pair of tokens of a square map."""
    place = torch.arange(side**2)
    dy = place[:, None] // side - place[None] // side
    dx = place[:, None] % side - place[None] % side
    return (dy + side - 1) * (2 * side - 1) + (dx + side - 1)


def official_state(
    side: int = SIDE,
    width: int = WIDTH,
    depth: int = DEPTH,
    heads: int = HEADS,
    classes: int = CLASSES,
    dtype: torch.dtype = torch.float32,
    channels: int = 4,
) -> dict[str, Tensor]:
    """The names, shapes and index buffers of CONTRACT's table, with random numbers."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * 0.05).to(dtype)

    state = {
        "pos_embed": random(1, side**2, width),
        "x_embedder.proj.weight": random(width, channels, 2, 2),
        "x_embedder.proj.bias": random(width),
        "t_embedder.mlp.0.weight": random(width, 256),
        "t_embedder.mlp.0.bias": random(width),
        "t_embedder.mlp.2.weight": random(width, width),
        "t_embedder.mlp.2.bias": random(width),
        "y_embedder.embedding_table.weight": random(classes + 1, width),
        "final_layer.linear.weight": random(8 * channels, width),
        "final_layer.linear.bias": random(8 * channels),
    }
    for i in range(depth):
        state[f"blocks.{i}.attn.relative_position_bias_table"] = random((2 * side - 1) ** 2, heads)
        state[f"blocks.{i}.attn.relative_position_index"] = expected_index(side)
        for name, out, into in [
            ("attn.qkv_temb", 3 * width, width),
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ]:
            state[f"blocks.{i}.{name}.weight"] = random(out, into)
            state[f"blocks.{i}.{name}.bias"] = random(out)
    return state


def write(state: dict[str, Tensor], path: Path) -> Path:
    save_file(state, path)
    return path


def complaint(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_network(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def without_index(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if not key.endswith("relative_position_index")}


# --- what loads -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", [SIDE, 4])
def test_it_loads_to_the_last_bit_in_whatever_precision_it_is_stored(tmp_path, side, dtype):
    state = official_state(side, dtype=dtype)
    net, config = load_network(write(state, tmp_path / "diffit.safetensors"))
    model = config.model
    assert (model.input_size, model.patch_size, model.in_channels) == ((2 * side, 2 * side), 2, 4)
    assert (model.hidden_size, model.depth, model.num_heads) == (WIDTH, DEPTH, HEADS)
    assert (model.mlp_ratio, model.num_classes) == (4.0, CLASSES)
    expected = {key: tensor.float() for key, tensor in without_index(state).items()}
    assert_close(dict(net.state_dict()), expected, rtol=0, atol=0)
    assert not net.training
    net(torch.zeros(1, 4, 2 * side, 2 * side), torch.zeros(1), torch.tensor([CLASSES]))


def test_the_dtype_of_the_file_can_be_kept_or_another_chosen(tmp_path):
    path = write(official_state(dtype=torch.bfloat16), tmp_path / "diffit.safetensors")
    for dtype, expected in ((None, torch.bfloat16), (torch.float64, torch.float64)):
        net, _ = load_network(path, dtype=dtype)
        assert {parameter.dtype for parameter in net.state_dict().values()} == {expected}


def test_load_state_dict_is_strict_with_and_without_the_index():
    state = official_state()
    net = LatentDiffiT(2 * SIDE, hidden_size=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=CLASSES)
    before = state.keys()
    for given in (state, without_index(state)):
        assert not any(net.load_state_dict(given))
    assert state.keys() == before, "the caller's dict was changed"
    with pytest.raises(RuntimeError, match="final_layer"):
        net.load_state_dict({key: value for key, value in state.items() if key != "final_layer.linear.bias"})
    with pytest.raises(RuntimeError, match="surplus"):
        net.load_state_dict(state | {"surplus": torch.zeros(1)})


@pytest.mark.parametrize("side", [SIDE, 4])
def test_through_our_file_and_back_to_the_released_layout_bit_for_bit(tmp_path, side):
    state = official_state(side)
    net, config = load_network(write(state, tmp_path / "theirs.safetensors"))
    save_network(tmp_path / "ours.safetensors", net.state_dict(), config)
    ours, same = load_network(tmp_path / "ours.safetensors")
    assert same == config
    assert not any(key.endswith("index") for key in load_file(tmp_path / "ours.safetensors"))
    back = to_official(ours.state_dict(), same.model)
    assert back.keys() == state.keys()
    assert_close(back, state, rtol=0, atol=0)
    again = load_file(write(back, tmp_path / "back.safetensors"))
    assert_close(again, state, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("side", "scale", "power"), [(3, 4.4, 4.0), (16, 4.4, 4.0), (32, 1.49, None)], ids=["6", "32", "64"]
)
def test_the_official_sampling_is_chosen_by_size(tmp_path, side, scale, power):
    state = official_state(side, width=8, depth=1, heads=1)
    sampling = load_network(write(state, tmp_path / "diffit.safetensors"))[1].sampling
    assert (sampling.sampler, sampling.steps, sampling.cfg_channels) == ("ddpm", 250, 3)
    assert (sampling.cfg_scale, sampling.cfg_power) == (scale, power)
    assert sampling.rounding == "truncate"


def test_a_file_without_classes_is_unconditional_and_not_guided(tmp_path):
    state = official_state()
    del state["y_embedder.embedding_table.weight"]
    net, config = load_network(write(state, tmp_path / "diffit.safetensors"))
    assert net.y_embedder is None
    assert (config.model.num_classes, config.data.cond) == (0, False)
    assert (config.sampling.cfg_scale, config.sampling.cfg_power) == (1.0, None)


@pytest.mark.parametrize("window", [(1, 1), (3, 3), (2, 5), (5, 2)], ids=str)
def test_the_index_is_told_from_every_other(window):
    index = relative_position_index(window)
    if window == (3, 3):
        assert_close(index, expected_index(3), rtol=0, atol=0)
    assert is_relative_position_index(index, window)
    assert not is_relative_position_index(index + 1, window)
    assert not is_relative_position_index(index[:, :-1], window)
    last = index.clone()
    last[-1, -1] += 1
    assert not is_relative_position_index(last, window)
    if window in ((2, 5), (3, 3)):
        assert not is_relative_position_index(index.T.contiguous(), window)
    if window[0] != window[1]:
        assert not is_relative_position_index(index, window[::-1])


# --- what does not --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", range(DEPTH))
def test_a_wrong_index_in_any_layer_is_refused_by_name(tmp_path, layer):
    state = official_state()
    key = f"blocks.{layer}.attn.relative_position_index"
    state[key] = state[key].T.contiguous()
    said = complaint(write(state, tmp_path / "diffit.safetensors"))
    assert f"{key} is not that of" in said
    net = LatentDiffiT(2 * SIDE, hidden_size=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=CLASSES)
    with pytest.raises(RuntimeError, match=key.replace(".", r"\.")):
        net.load_state_dict(state)


def surplus(state):
    state["surplus"] = torch.zeros(3)


def no_bias(state):
    del state["blocks.1.attn.qkv.bias"]


def half_a_map(state):
    state["pos_embed"] = torch.zeros(1, 5, WIDTH)


def other_table(state):
    state["blocks.0.attn.relative_position_bias_table"] = torch.zeros(81, HEADS)


def odd_heads(state):
    for i in range(DEPTH):
        state[f"blocks.{i}.attn.relative_position_bias_table"] = torch.zeros(25, 5)


def flat_patches(state):
    state["x_embedder.proj.weight"] = torch.zeros(WIDTH, 16)


def no_mlp(state):
    del state["blocks.0.mlp.fc1.weight"]


def other_width(state):
    state["blocks.1.mlp.fc2.weight"] = torch.zeros(WIDTH, 2 * WIDTH)


def a_block_far_away(state):
    state["blocks.1000000000.attn.qkv.bias"] = torch.zeros(3)


def a_block_without_number(state):
    state["blocks.first.attn.qkv.bias"] = torch.zeros(3)


def lone_index(state):
    state["blocks.7.attn.relative_position_index"] = expected_index(SIDE)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (surplus, "surplus is (3,), this model needs absent"),
        (no_bias, "blocks.1.attn.qkv.bias is absent"),
        (half_a_map, "5 tokens and a bias table of 25 rows"),
        (other_table, "9 tokens and a bias table of 81 rows"),
        (odd_heads, "hidden_size 16 does not divide into 5 heads"),
        (flat_patches, "missing or misshapen"),
        (no_mlp, "missing or misshapen"),
        (other_width, "blocks.1.mlp.fc2.weight is (16, 32), this model needs (16, 64)"),
        (a_block_far_away, "blocks."),
        (a_block_without_number, "blocks."),
        (lone_index, "blocks."),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_shapes_that_contradict_each_other_are_named(tmp_path, change, said):
    state = official_state()
    change(state)
    assert said in complaint(write(state, tmp_path / "diffit.safetensors"))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["blocks.0.adaLN_modulation.1.weight", "x_embedder.proj.weight", "pos_embed"], "a DiT network"),
        (["encoder.conv_in.weight", "decoder.conv_in.weight"], "an autoencoder: give it to --vae"),
        (["exp_avg.blocks.0.attn.qkv.weight", "exp_avg_sq.x"], "an optimiser's state"),
        (["Mixed_5b.branch1x1.conv.weight"], "an Inception network"),
        (["text_model.embeddings.position_embedding.weight"], "a text encoder"),
        (["tokenizer.weight", "head.bias"], "bare weights without their configuration"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a Stable Diffusion checkpoint"),
        (["conv.weight"], "something else (it holds conv.weight"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_strangers_are_named_for_what_they_are(tmp_path, keys, said):
    path = write({key: torch.zeros(1) for key in keys}, tmp_path / "stranger.safetensors")
    assert said in complaint(path)


def test_a_truncated_official_file_is_refused(tmp_path):
    path = write(official_state(), tmp_path / "diffit.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut short" in complaint(path)


# --- memory ---------------------------------------------------------------------------------------------------------

MEASURE = """
import sys, torch
from diffit.weights import load_network
def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))
load_network(sys.argv[1])  # what the first call imports is not the weights'
for path in sys.argv[2:]:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is to be that from here on
    before = memory("VmRSS")
    net, _ = load_network(path)
    for tensor in net.state_dict().values():
        tensor.view(torch.int32).amax()  # what is only mapped becomes resident now
    print((memory("VmHWM") - before) / sum(tensor.nbytes for tensor in net.state_dict().values()))
    del net, tensor
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux to measure")
def test_loading_takes_no_more_memory_than_the_weights(tmp_path):
    """The index of a 512-pixel model is 8 MB a layer, which would come to half of this one's weights."""
    paths = [write(official_state(), tmp_path / "tiny.safetensors")]
    for dtype in (torch.float32, torch.bfloat16):
        state = official_state(32, width=512, depth=8, heads=8, dtype=dtype)
        paths.append(write(state, tmp_path / f"{dtype}.safetensors"))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", MEASURE, *map(str, paths)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shares = [float(line) for line in done.stdout.split()]
    assert len(shares) == 2
    assert all(0.9 < share <= 1.1 for share in shares), shares
