"""Attention maps against weights computed token by token from Eq. 6, and against what the layers put out."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffit.errors import UserError
from diffit.explore import (
    attention_layers,
    attention_maps,
    attention_weights,
    bias_maps,
    record_attention,
    time_norms,
)
from diffit.models import TMSA
from explore.toys import image_model, latent_model

# Map, window: global, dividing, padded on either side and on both, larger than the map.
CASES = [((4, 6), None), ((4, 6), 2), ((5, 7), 3), ((6, 7), (2, 3)), ((3, 5), 8)]


def layer_of(size, window, seed=0) -> TMSA:
    layer = TMSA(6, 5, 2, grid_size=size, window_size=window).double()
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.7, generator=generator)
    return layer


def by_hand(layer: TMSA, x: Tensor, cond: Tensor, token: tuple[int, int], window) -> np.ndarray:
    """Eq. 3–6 for one query in NumPy, reading nothing of the layer but its state: ``(B, heads, H, W)``."""
    p = {key: value.double().numpy() for key, value in layer.state_dict().items()}
    x, cond, heads = x.double().numpy(), cond.double().numpy(), layer.num_heads
    B, H, W, D = x.shape
    d = D // heads
    h, w = (H, W) if window is None else (window, window) if isinstance(window, int) else window
    table = np.asarray(p["relative_position_bias_table"])
    th, tw = min(h, layer.window[0]), min(w, layer.window[1])
    out = np.zeros((B, heads, H, W))
    for b, n in itertools.product(range(B), range(heads)):
        time = p["qkv_temb.weight"] @ cond[b] + p["qkv_temb.bias"]
        logits = {}
        for y, z in itertools.product(range(H), range(W)):
            if window is not None and (y // h, z // w) != (token[0] // h, token[1] // w):
                continue
            q = (p["qkv.weight"] @ x[b, token[0], token[1]] + p["qkv.bias"] + time)[:D].reshape(heads, d)[n]
            k = (p["qkv.weight"] @ x[b, y, z] + p["qkv.bias"] + time)[D : 2 * D].reshape(heads, d)[n]
            row = (token[0] - y + th - 1) * (2 * tw - 1) + (token[1] - z + tw - 1)
            logits[y, z] = q @ k / math.sqrt(d) + table[row, n]
        total = sum(math.exp(value) for value in logits.values())
        for (y, z), value in logits.items():
            out[b, n, y, z] = math.exp(value) / total
    return out


@pytest.mark.parametrize(("size", "window"), CASES, ids=str)
def test_weights_are_those_computed_token_by_token(size, window):
    layer = layer_of(size, window)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, *size, 6, generator=generator, dtype=torch.float64)
    cond = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    for token in ((0, 0), (size[0] - 1, size[1] - 1), (size[0] // 2, 1)):
        found = attention_weights(layer, x, cond, token)
        assert_close(found.numpy(), by_hand(layer, x, cond, token, window), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("size", "window"), CASES, ids=str)
def test_weights_times_values_are_what_the_layer_puts_out(size, window):
    layer = layer_of(size, window)
    x, cond = torch.randn(1, *size, 6, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
    values = (layer.qkv(x) + layer.qkv_temb(cond)[:, None, None])[..., 12:].unflatten(-1, (2, 3))  # (B, H, W, heads, d)
    out = layer(x, cond)
    for token in itertools.product(range(size[0]), range(size[1])):
        weights = attention_weights(layer, x, cond, token)
        mixed = torch.einsum("bnyx,byxnd->bnd", weights, values).flatten(1)
        assert_close(layer.proj(mixed), out[:, token[0], token[1]])


MODELS = [image_model, latent_model]


@pytest.mark.parametrize("make", MODELS)
def test_a_network_that_is_watched_puts_out_the_same_bits_and_keeps_no_hook(make):
    model = make()
    x, level, labels = torch.randn(2, *model.config.model.sample_shape), torch.tensor([0.3, 2.0]), torch.tensor([0, 2])
    before = model.net(x, level, labels)
    with record_attention(model.net, [(0.1, 0.9), (0.5, 0.5)]) as found:
        watched = model.net(x, level, labels)
    assert torch.equal(watched, before)
    assert torch.equal(model.net(x, level, labels), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.net.modules())
    assert list(found) == list(attention_layers(model.net))
    for (weights,) in found.values():  # one call each: that after the context is not recorded
        assert weights.shape[:2] == (2, 2)
        assert_close(weights.sum((-1, -2)), torch.ones(weights.shape[:3]))


def test_hooks_are_removed_where_the_network_fails():
    model = image_model()
    with pytest.raises(RuntimeError), record_attention(model.net, [(0, 0)]):
        model.net(torch.zeros(1, 2, 12, 20), torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert not any(module._forward_hooks for module in model.net.modules())


@pytest.mark.parametrize("make", MODELS)
def test_a_recorded_map_is_that_of_the_inputs_of_its_layer(make):
    model, places = make(), [(0.95, 0.95)]
    inputs, hooks = {}, []
    for name, layer in attention_layers(model.net).items():
        hooks.append(layer.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args)))
    with record_attention(model.net, places) as found:
        labels = torch.tensor([1])
        model.net(torch.randn(1, *model.config.model.sample_shape), torch.tensor([1.0]), labels)
    for name, layer in attention_layers(model.net).items():
        x, cond = inputs[name]
        window = None if layer.is_global else layer.window
        token = (int(0.95 * x.shape[1]), int(0.95 * x.shape[2]))
        assert_close(found[name][0][:, 0].double().numpy(), by_hand(layer, x, cond, token, window), rtol=0, atol=1e-6)


@pytest.mark.parametrize("how", [{}, {"cfg_scale": 2.0}], ids=str)
@pytest.mark.parametrize("make", MODELS)
def test_maps_follow_the_states_that_sampling_comes_through(make, how):
    """Step by step against the network called on the states by hand."""
    model, states = make(**how), []
    model.sample([5], 1, callback=lambda i, level, x, denoised: states.append((level, x.clone(), denoised)))
    maps = attention_maps(model, [5], 1, places=[(0.2, 0.6)], steps=[0, 3])
    assert maps.denoised.shape == (2, 1, *model.config.model.sample_shape)
    assert maps.sigmas[0] > maps.sigmas[1] > 0
    for at, step in enumerate((0, 3)):
        level, x, denoised = states[step]
        with record_attention(model.net, [(0.2, 0.6)]) as found:
            if model.config.diffusion.kind == "edm":
                total = level**2 + 0.25
                model.net((x / total.sqrt()).float(), (level.log() / 4).float().reshape(1), torch.tensor([1]))
            else:
                model.net(x.float(), level.float().reshape(1), torch.tensor([1]))
        for name, weights in maps.maps.items():
            assert_close(weights[at], found[name][0], rtol=1e-4, atol=1e-5)
        if not how:
            assert_close(maps.denoised[at], denoised.float(), rtol=1e-4, atol=1e-4)


def test_bias_pictures_have_the_query_in_the_middle():
    layer = layer_of((3, 4), None)
    pictures, table = bias_maps(layer), layer.relative_position_bias_table
    assert pictures.shape == (2, 5, 7)
    for head, y, x in itertools.product(range(2), range(3), range(4)):  # the query at (0, 0), the key at (y, x)
        row = (0 - y + 2) * 7 + (0 - x + 3)
        assert pictures[head, 2 + y, 3 + x] == table[row, head].float()


@pytest.mark.parametrize("make", MODELS)
def test_time_norms_are_those_of_the_projected_time_token(make):
    model, sigmas = make(), [0.1, 1.0, 10.0]
    norms = time_norms(model, sigmas, 2)
    net = model.net
    if model.config.diffusion.kind == "edm":
        cond = net.embed(torch.tensor(sigmas).log() / 4, torch.full((3,), 2), None, torch.float32)
    else:
        from diffit.diffusion.adm import schedule_of

        t = schedule_of(model.config.diffusion).timestep_of(torch.tensor(sigmas, dtype=torch.float64)).float()
        cond = net.embed(t, torch.full((3,), 2), torch.float32)
    for name, layer in attention_layers(net).items():
        moved = cond @ layer.qkv_temb.weight.T + layer.qkv_temb.bias
        expected = [part.reshape(3, layer.num_heads, -1).norm(dim=-1) for part in moved.chunk(3, dim=-1)]
        assert_close(norms[name], torch.stack(expected, dim=1), rtol=1e-4, atol=1e-5)
    assert time_norms(model, sigmas)[name].shape == norms[name].shape


def test_what_is_not_there_is_said():
    model = image_model()
    with pytest.raises(UserError, match=r"block blocks\.9: the network has encoder"):
        attention_maps(model, [0], 0, blocks=["blocks.9"])
    with pytest.raises(UserError, match="place"):
        attention_maps(model, [0], 0, places=[(1.0, 0.0)])
    with pytest.raises(UserError, match="steps 0 to 3"):
        attention_maps(model, [0], 0, steps=[9])
