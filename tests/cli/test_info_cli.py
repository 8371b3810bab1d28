"""``diffit info``: figures against the paper's and against sums made by hand."""

import hashlib
import re

import pytest
import torch

from diffit.cli import cli
from diffit.configs.presets import get_preset
from diffit.configs.schema import Data
from diffit.errors import UserError
from diffit.models import build
from diffit.models.cost import count_work
from diffit.sampling import with_sampling
from diffit.sampling.cost import count_evaluations
from diffit.weights.file import save_network


def info(capsys, *arguments) -> str:
    cli(["info", *map(str, arguments)], standalone_mode=False)
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "parameters", "linear"),
    [
        (["imagenet256"], "561,035,232", "114.2 G linear"),
        (["imagenet512"], "562,382,816", "456.7 G linear"),
        (["imagenet256", "--num-blocks", "30"], "600,906,752", "122.3 G linear"),
    ],
)
def test_the_published_models_have_the_published_size(capsys, arguments, parameters, linear):
    text = info(capsys, *arguments)
    assert f"{parameters} trainable" in text
    assert linear in text
    assert ("561 M parameters and 114 G" in text) == (arguments[0] == "imagenet256")


def test_multiply_accumulates_are_those_of_a_sum_by_hand():
    """A block: qkv and proj of 4·D², MLP of 8·D² a token; Q·Kᵀ and weights times V each N²·D; the time 3·D²."""
    D, N, depth = 1152, 256, 28
    patches_and_head = N * D * (2 * 2 * 4 + 2 * 2 * 8)
    work = count_work(get_preset("imagenet256"))
    assert work.linear == depth * N * 12 * D * D + patches_and_head
    assert work.attention == depth * 2 * N * N * D
    assert work.time == depth * 3 * D * D + 256 * D + D * D
    assert work.macs == work.linear + work.attention + work.time


@pytest.mark.parametrize(
    ("preset", "changes", "expected"),
    [
        ("imagenet512", {}, (250, 250)),
        ("imagenet512", {"cfg_scale": 1.0}, (250, 0)),
        ("imagenet512", {"sampler": "heun", "steps": 12}, (23, 23)),
        ("imagenet512", {"sampler": "ddim", "steps": "ddim50"}, (50, 50)),
        ("cifar10", {}, (35, 0)),
        ("cifar10", {"sampler": "dpm++", "steps": 7}, (7, 0)),
    ],
)
def test_evaluations_are_those_of_the_sampler(preset, changes, expected):
    assert count_evaluations(with_sampling(get_preset(preset), **changes)) == expected


def test_halves_that_guidance_skips_are_not_counted():
    """On the official schedule s − 1 = 3.4·½(1 − cos(π(1 − t/1000)⁴)), which is below 1e-2 from t ≈ 568 up."""
    config = with_sampling(get_preset("imagenet256"), cfg_skip=1e-2)
    cond, uncond = count_evaluations(config)
    timesteps = [round(i * 999 / 249) for i in range(250)]
    angle = torch.pi * (1 - torch.tensor(timesteps, dtype=torch.float64) / 1000) ** 4
    assert (cond, uncond) == (250, int((3.4 * 0.5 * (1 - angle.cos()) > 1e-2).sum()))
    assert 0 < uncond < 200


def test_a_file_says_what_it_is(tmp_path, capsys):
    base = get_preset("debug")
    config = base.model_copy(
        update={
            "model": base.model.model_copy(update={"num_classes": 3}),
            "data": Data(path="/home/alice/pets.zip", cond=True, class_names=("ant", "bee", "cat")),
            "sampling": base.sampling.model_copy(update={"cfg_scale": 1.5}),
        }
    )
    net = build(config.model)
    path = tmp_path / "net.safetensors"
    save_network(path, net.state_dict(), config, kimg=0.12)
    text = info(capsys, path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() in text
    assert "0.12 of 0.16 kimg on pets.zip" in text
    assert "ant, bee, cat" in text
    assert f"{sum(p.numel() for p in net.parameters()):,} trainable" in text
    assert re.search(r"the run of 14 passes\n", text), "Heun in 4 steps evaluates 7 times, both halves of each"
    assert re.search(r"the run of 7 passes\n", text)


def test_what_is_neither_preset_nor_file_is_one_line(tmp_path):
    for target, said in [("imagnet256", "preset"), (str(tmp_path / "no.safetensors"), "not there")]:
        with pytest.raises(UserError, match=said) as caught:
            cli(["info", target], standalone_mode=False)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="latent model has one depth"):
        cli(["info", "imagenet256", "--num-blocks", "2,3"], standalone_mode=False)
