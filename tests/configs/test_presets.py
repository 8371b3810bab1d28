"""Presets against the table of CONTRACT §2, typed in again, and the plain-dict functions of the documented commands."""

import json

import pytest

from diffit.configs.presets import PRESETS, get_diffit_config, get_preset, get_training_config
from diffit.errors import UserError
from diffit.models.image import ImageDiffiT


@pytest.mark.parametrize(
    ("name", "resolution", "widths", "blocks", "window", "batch", "lr", "steps", "dropout", "augment"),
    [
        ("cifar10", 32, [128, 256, 256], 2, 4, 512, 1e-3, 18, 0.13, 0.12),
        ("ffhq64", 64, [128, 256, 256, 256], 4, 8, 256, 2e-4, 40, 0.05, 0.15),
    ],
)
def test_published_presets_are_their_tables(
    name, resolution, widths, blocks, window, batch, lr, steps, dropout, augment
):
    config = get_preset(name)
    model, training, sampling = config.model, config.training, config.sampling
    assert (config.preset, model.image_size, model.channels) == (name, (resolution, resolution), 3)
    stages = [(stage.width, stage.blocks, stage.heads, stage.window) for stage in model.stages]
    assert stages == [(width, blocks, 4, window) for width in widths]
    assert (model.cond_dim, model.num_classes, model.augment_dim, model.dropout) == (512, 0, 9, dropout)
    assert (training.batch, training.lr, training.kimg, training.augment) == (batch, lr, 200_000, augment)
    assert (training.betas, training.eps, training.lr_rampup_kimg) == ((0.9, 0.999), 1e-8, 10_000)
    assert (training.ema_halflife_kimg, training.ema_rampup_ratio) == (500, 0.05)
    assert (sampling.sampler, sampling.steps, sampling.S_churn, sampling.cfg_scale) == ("heun", steps, 0, 1)
    assert (sampling.sigma_min, sampling.sigma_max, sampling.rho) == (0.002, 80, 7)
    diffusion = config.diffusion
    assert (diffusion.sigma_data, diffusion.P_mean, diffusion.P_std) == (0.5, -1.2, 1.2)
    assert training.label_drop == 0.1


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_named_after_itself_and_builds_a_network(name):
    config = get_preset(name)
    assert config.preset == name
    assert get_preset(name) == config
    if name in ("digits", "debug"):
        ImageDiffiT.from_config(config.model)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UserError, match="unknown preset 'cifar'") as caught:
        get_preset("cifar")
    for name in [*PRESETS, "imagenet256", "imagenet512"]:
        assert name in str(caught.value)


@pytest.mark.parametrize("get", [get_diffit_config, get_training_config])
@pytest.mark.parametrize("name", PRESETS)
def test_plain_dicts_are_plain(get, name):
    values = get(name)
    assert type(values) is dict
    assert json.loads(json.dumps(values)).keys() == values.keys()
    values.clear()
    assert get(name), "a caller's changes stay its own"


@pytest.mark.parametrize("get", [get_diffit_config, get_training_config])
def test_plain_dicts_of_unknown_names_are_refused(get):
    with pytest.raises(UserError, match="known: small8"):
        get("nothing")


def test_plain_dicts_speak_the_options_of_the_command_line():
    network, recipe = get_diffit_config("ffhq64"), get_training_config("ffhq64")
    expected = {"resolution": 64, "base_dim": 128, "hidden_dim": 256, "num_heads": 4, "num_blocks": 4, "window_size": 8}
    assert expected.items() <= network.items()
    expected = {"batch_size": 256, "lr": 2e-4, "kimg": 200_000, "sigma_data": 0.5, "P_mean": -1.2, "steps": 40}
    assert expected.items() <= recipe.items()
