"""The U-shaped network: shapes, structure by perturbation, costs by hand, gradients."""

import math

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffit.configs.presets import get_preset
from diffit.configs.resolve import resolve
from diffit.configs.schema import Config, ImageModel, StageSpec, Training
from diffit.diffusion import edm
from diffit.models import build
from diffit.models.cost import count_work, estimate
from diffit.models.image import DiffiTResBlock, GroupNorm, ImageDiffiT
from diffit.training.step import build_network

STAGES = (
    StageSpec(blocks=1, width=8, heads=2, window=2),
    StageSpec(blocks=2, width=12, heads=3, window=4),
    StageSpec(blocks=1, width=16, heads=2, window=None),
)


def specification(**changes) -> ImageModel:
    return ImageModel(**{"image_size": (12, 12), "stages": STAGES, "cond_dim": 16} | changes)


def network(*, seed=0, dtype=torch.float32, **changes) -> ImageDiffiT:
    """A network whose head is not zero."""
    torch.manual_seed(seed)
    net = ImageDiffiT.from_config(specification(**changes)).to(dtype)
    torch.nn.init.normal_(net.head.weight, std=0.1)
    return net


def batch(net: ImageDiffiT, size=(12, 12), count=3, *, channels=3, seed=1, dtype=torch.float32) -> list[Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, channels, *size, generator=generator, dtype=dtype)
    labels = torch.arange(count) % (net.num_classes + 1) if net.num_classes else None
    augment = net.augment_embedder and torch.randn(
        count, net.augment_embedder.in_features, generator=generator, dtype=dtype
    )
    return [x, torch.randn(count, generator=generator, dtype=dtype), labels, augment]


def gradients(net: ImageDiffiT, arguments: list[Tensor | None]) -> dict[str, Tensor | None]:
    net.zero_grad()
    net(*arguments).square().sum().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(12, 12), (8, 16), (9, 13), (5, 4)])
def test_the_output_has_the_shape_of_the_input(size, channels):
    net = network(image_size=size, channels=channels)
    assert net(*batch(net, size, channels=channels)).shape == (3, channels, *size)


@pytest.mark.parametrize("size", [(8, 20), (7, 7), (16, 12), (1, 1)])
def test_a_network_of_windows_takes_images_of_other_sizes(size):
    net = network(stages=STAGES[:2])
    out = net(*batch(net, size))
    assert out.shape == (3, 3, *size)
    assert out.isfinite().all()


def test_a_global_stage_refuses_larger_images():
    net = network()
    with pytest.raises(ValueError, match=r"4×4 tokens exceeds the 3×3"):
        net(*batch(net, (16, 16)))


def test_a_single_stage_is_a_network_too():
    net = network(stages=STAGES[:1])
    assert net(*batch(net)).shape == (3, 3, 12, 12)


@pytest.mark.parametrize(("classes", "labels"), [(5, None), (0, torch.zeros(3, dtype=torch.int64))])
def test_labels_missing_or_surplus_are_refused(classes, labels):
    net = network(num_classes=classes)
    x, c_noise, _, _ = batch(net)
    with pytest.raises(ValueError, match=f"{classes} classes"):
        net(x, c_noise, labels)


def test_augment_labels_are_refused_by_a_network_without_them():
    net = network()
    with pytest.raises(ValueError, match="augment_dim=0"):
        net(*batch(net)[:2], None, torch.zeros(3, 9))


def test_no_augment_labels_means_labels_of_zero():
    net = network(augment_dim=9)
    x, c_noise, _, augment = batch(net)
    assert_close(net(x, c_noise), net(x, c_noise, None, torch.zeros(3, 9)))
    assert (net(x, c_noise) != net(x, c_noise, None, augment)).any()


@pytest.mark.parametrize("labels", [[0, 1, 2], [3, 3, 3]])
def test_every_class_and_the_null_class_differ(labels):
    net = network(num_classes=3)
    x, c_noise, _, _ = batch(net)
    given, other = (net(x, c_noise, torch.tensor(row)) for row in (labels, [1, 2, 0]))
    assert (given != other).flatten(1).any(1).all()


def test_a_fresh_network_is_zero_and_its_denoiser_begins_at_c_skip():
    net = ImageDiffiT.from_config(specification())
    x, sigma = batch(net)[0], torch.tensor([0.01, 0.5, 80.0])
    assert not net(x, sigma).any()
    c_skip = 0.25 / (sigma**2 + 0.25)
    assert_close(edm.denoiser(net)(x, sigma), c_skip[:, None, None, None] * x)


def test_the_resblock_is_equations_7_to_10():
    torch.manual_seed(0)
    block = DiffiTResBlock(StageSpec(blocks=1, width=8, heads=2, window=2), 5, grid_size=(4, 4)).double()
    x, cond = torch.randn(2, 8, 4, 4, dtype=torch.float64), torch.randn(2, 5, dtype=torch.float64)

    def layer_norm(tokens: Tensor) -> Tensor:
        centred = tokens - tokens.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    groups = x.reshape(2, block.norm.num_groups, -1)
    normal = (groups - groups.mean(-1, keepdim=True)) / (groups.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    normal = normal.reshape(x.shape)  # the affine part is the identity in a fresh block
    hidden = block.conv(normal * torch.sigmoid(normal)).permute(0, 2, 3, 1)
    hidden = hidden + block.block.attn(layer_norm(hidden), cond)
    inner = block.block.mlp.fc1(layer_norm(hidden))
    gelu = inner / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    hidden = hidden + block.block.mlp.fc2(gelu)
    assert_close(block(x, cond), x + hidden.permute(0, 3, 1, 2), rtol=1e-10, atol=1e-10)


# --- the U ----------------------------------------------------------------------------------------------------------


def test_the_decoder_mirrors_the_encoder_without_its_bottleneck():
    net, seen = network(), []
    for stage in [*net.encoder, *net.decoder]:
        stage.register_forward_hook(lambda stage, _, out: seen.append((len(stage), *out.shape[1:])))
    net(*batch(net))
    assert seen == [(1, 8, 12, 12), (2, 12, 6, 6), (1, 16, 3, 3), (2, 12, 6, 6), (1, 8, 12, 12)]


def test_without_the_skips_everything_passes_through_the_bottleneck():
    net = network(seed=2)
    for up in net.up:
        up.merge.weight.data.chunk(2, dim=1)[1].zero_()
    x, y = (batch(net, seed=seed)[0] for seed in (1, 2))
    c_noise = torch.zeros(3)
    net.encoder[-1].register_forward_hook(lambda *_: torch.ones(3, 16, 3, 3))
    assert_close(net(x, c_noise), net(y, c_noise), rtol=0, atol=0)


@pytest.mark.parametrize("level", [0, 1])
def test_each_resolution_has_a_skip_from_the_end_of_its_encoder_stage(level):
    net = network(seed=3)
    cut = net.up[len(net.up) - 1 - level]
    cut.conv.register_forward_hook(lambda _, __, out: torch.zeros_like(out))
    found = gradients(net, batch(net))
    reached = {name for name, value in found.items() if value is not None and value.any()}
    for stage in range(3):
        last = f"encoder.{stage}.{len(net.encoder[stage]) - 1}.conv.weight"
        assert (last in reached) == (stage <= level), last


def test_samples_of_a_batch_do_not_see_each_other():
    net = network(num_classes=4, augment_dim=9, dtype=torch.float64)
    arguments = batch(net, dtype=torch.float64)
    together = net(*arguments)
    for i in range(3):
        assert_close(together[i : i + 1], net(*(a[i : i + 1] for a in arguments)), rtol=1e-10, atol=1e-10)


# --- gradients ------------------------------------------------------------------------------------------------------


def test_every_parameter_learns():
    net = network(num_classes=2, augment_dim=9)
    still = [name for name, gradient in gradients(net, batch(net)).items() if gradient is None or not gradient.any()]
    assert not still


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing_changes_no_gradient(dropout):
    net = network(num_classes=2, augment_dim=9, dropout=dropout).train()
    arguments, results, passes = batch(net), [], []
    net.encoder[1][0].register_forward_pre_hook(lambda *_: passes.append(len(results)))
    for enabled in (False, True):
        net.set_grad_ckpt(enabled)
        torch.manual_seed(7)
        results.append(gradients(net, arguments))
    assert_close(results[1], results[0])
    assert passes == [0, 1, 1], "checkpointing recomputes each block once"


def test_dropout_acts_in_training_only():
    net = network(dropout=0.5)
    arguments = batch(net)
    assert (net.train()(*arguments) != net(*arguments)).any()
    assert_close(net.eval()(*arguments), net(*arguments), rtol=0, atol=0)


def test_it_compiles_as_one_graph():
    torch.compiler.reset()
    net = network(stages=STAGES[:2], num_classes=2)
    arguments = batch(net, count=2)
    expected = net(*arguments)
    net.compile(fullgraph=True, backend="eager")
    assert_close(net(*arguments), expected)


# --- costs, counted by hand -----------------------------------------------------------------------------------------


def linear(n_in: int, n_out: int) -> int:
    return n_in * n_out + n_out


def conv(n_in: int, n_out: int, side: int) -> int:
    return n_in * n_out * side**2 + n_out


def resblock(width: int, heads: int, window: int, cond: int) -> int:
    attention = (
        linear(width, 3 * width) + linear(cond, 3 * width) + linear(width, width) + heads * (2 * window - 1) ** 2
    )
    return 2 * width + conv(width, width, 3) + attention + linear(width, 4 * width) + linear(4 * width, width)


def test_cifar10_has_as_many_parameters_as_its_layers_by_hand():
    narrow, wide = resblock(128, 4, 4, 512), resblock(256, 4, 4, 512)
    ends = conv(3, 128, 3) + 2 * 128 + conv(128, 3, 3)
    token = linear(256, 512) + linear(512, 512) + 9 * 512
    down = conv(128, 256, 3) + conv(256, 256, 3)
    up = conv(256, 256, 3) + conv(512, 256, 1) + conv(256, 128, 3) + conv(256, 128, 1)
    expected = ends + token + down + up + 4 * narrow + 6 * wide
    net = ImageDiffiT.from_config(get_preset("cifar10").model)
    assert sum(parameter.numel() for parameter in net.parameters()) == expected
    assert estimate(get_preset("cifar10"), 1).parameters == expected


def small_config(**changes) -> Config:
    return Config(preset="test", model=specification(**changes), training=Training(batch=4, kimg=1, lr=1e-3))


def test_multiply_accumulates_are_those_counted_by_hand():
    def block(width: int, tokens: int, window_tokens: int) -> int:
        weights = 9 * width**2 + 3 * width**2 + width**2 + 8 * width**2  # conv, qkv, proj, MLP: once a token
        return tokens * (weights + 2 * window_tokens * width) + 3 * width * 16  # QKᵀ and AV; qkv_temb: once an image

    # 12×12 in windows of 2×2; 6×6 in windows of 4×4, padded to four windows of sixteen; 3×3 globally.
    padded = block(12, 36, 0) + 4 * 16 * 2 * 16 * 12
    stages = 2 * block(8, 144, 4) + 4 * padded + block(16, 9, 9)
    ends = 2 * 144 * 9 * 3 * 8
    down = 36 * 9 * 8 * 12 + 9 * 9 * 12 * 16
    up = 36 * (9 * 16 * 12 + 24 * 12) + 144 * (9 * 12 * 8 + 16 * 8)
    token = 256 * 16 + 16 * 16 + 9 * 16
    assert count_work(small_config(augment_dim=9, num_classes=3)).macs == stages + ends + down + up + token


def test_the_state_is_five_float32_copies_of_the_weights():
    config = small_config()
    parameters = sum(parameter.numel() for parameter in network().parameters())
    assert estimate(config, 1).state_bytes == 5 * 4 * parameters


def test_activations_grow_with_the_batch_and_leave_the_weights_out():
    one, two = (estimate(get_preset("digits"), batch) for batch in (1, 2))
    constant = 2 * one.activation_bytes - two.activation_bytes  # the bias of the attention maps, small here
    assert constant < 4 * one.parameters / 20


def test_gradient_checkpointing_is_estimated_to_save_memory():
    config = get_preset("debug")
    saving = config.model_copy(update={"training": config.training.model_copy(update={"grad_ckpt": True})})
    assert estimate(saving, 8).activation_bytes < estimate(config, 8).activation_bytes / 2


def test_branches_that_begin_at_zero_leave_the_features_alone_and_convolutions_go_by_their_inputs():
    net = build(get_preset("small32").model)
    net.init_weights("fan_in")
    block = net.encoder[0][0].block
    x = torch.randn(2, 8, 8, 48, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(block(x, torch.randn(2, 128)), x, rtol=0, atol=0)
    for conv in (net.encoder[2][0].conv, net.up[0].conv, net.up[0].merge):
        fan_in = conv.in_channels * conv.kernel_size[0] ** 2
        assert float(conv.weight.detach().std()) == pytest.approx(fan_in**-0.5, rel=0.02)
        assert not conv.bias.any()
    assert not net.head.weight.any()


def test_how_weights_begin_is_the_recipe_s_and_of_the_same_seed():
    nets = [build_network(resolve(preset, {"seed": 3})) for preset in ("small16", "digits", "small16")]
    assert not nets[0].encoder[0][0].block.mlp.fc2.weight.any()
    assert nets[1].encoder[0][0].block.mlp.fc2.weight.any()
    for a, b in zip(nets[0].parameters(), nets[2].parameters(), strict=True):
        assert torch.equal(a, b)


def test_under_autocast_a_cpu_normalises_in_the_dtype_of_the_weights_and_otherwise_in_that_of_the_map():
    norm, x = GroupNorm(8), torch.randn(2, 8, 5, 5).to(torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(norm(x), norm(x.float()))
