"""The VAE, compared with diffusers called directly."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffit.errors import UserError
from diffit.models.autoencoder import check_autoencoder, draw_latents, load_autoencoder
from diffit.utils.images import to_uint8
from helpers import write_vae

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="module")
def reference(folder):
    return diffusers.AutoencoderKL.from_pretrained(folder).eval()


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_encode_is_that_of_diffusers_and_is_not_scaled(folder, reference, images):
    expected = reference.encode(images.float() / 127.5 - 1).latent_dist
    for given in (images, images.float() / 127.5 - 1):
        mean, std = load_autoencoder(folder, scale=3.0).encode(given)
        assert mean.shape == std.shape == (3, 4, 4, 6)
        torch.testing.assert_close(mean, expected.mean)
        torch.testing.assert_close(std, expected.std)


@torch.no_grad()
def test_drawn_latents_are_the_scaled_sample_of_diffusers(folder, reference, images):
    vae = load_autoencoder(folder)
    expected = reference.encode(images.float() / 127.5 - 1).latent_dist
    expected = expected.sample(torch.Generator().manual_seed(5)) * 0.18215
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(draw_latents(*vae.encode(images), noise, vae.scale), expected)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 2, 16])
def test_decode_undoes_the_scale_whatever_the_batch(folder, reference, batch):
    z = torch.randn(3, 4, 4, 6, generator=torch.Generator().manual_seed(1))
    decoded = load_autoencoder(folder).decode(z, batch=batch)
    assert decoded.shape == (3, 3, 32, 48)
    torch.testing.assert_close(decoded, reference.decode(z / 0.18215).sample, rtol=1e-4, atol=1e-5)


def test_half_precision_gives_float32_close_to_the_same(folder, images):
    mean, std = load_autoencoder(folder, dtype=torch.bfloat16).encode(images)
    assert mean.dtype == std.dtype == torch.float32
    exact_mean, exact_std = load_autoencoder(folder).encode(images)
    assert (mean - exact_mean).abs().max() < 0.05
    assert (std - exact_std).abs().max() < 0.05


def test_gray_images_count_as_rgb(folder):
    vae = load_autoencoder(folder)
    gray = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    torch.testing.assert_close(vae.encode(gray), vae.encode(gray.repeat(1, 3, 1, 1)))


def test_slicing_changes_nothing_and_tiling_is_that_of_diffusers(folder, reference):
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    plain = load_autoencoder(folder).encode(images)
    torch.testing.assert_close(load_autoencoder(folder, slicing=True).encode(images), plain)
    tiled, _ = load_autoencoder(folder, tiling=True).encode(images)
    assert not torch.allclose(tiled, plain[0])
    reference.enable_tiling()
    with torch.no_grad():
        torch.testing.assert_close(tiled, reference.encode(images).latent_dist.mean)
    reference.disable_tiling()


def test_levels_are_cut_off_as_in_the_official_program():
    x = torch.tensor([-2.0, -1.0, -0.9922, 0.0, 0.004, 0.9999, 1.0, 2.0])
    # In levels: -127.5, 0, 0.99, 127.5, 128.01, 254.99, 255, 382.5.
    assert to_uint8(x, "truncate").tolist() == [0, 0, 0, 127, 128, 254, 255, 255]


def test_facts_come_from_the_files(folder, tmp_path):
    vae = load_autoencoder(folder)
    assert (vae.id, vae.latent_channels, vae.factor, vae.scale) == ("tiny", 4, 8, 0.18215)
    assert vae.latent_shape((32, 48)) == (4, 4, 6)
    pipeline = tmp_path / "pipeline"
    write_vae(pipeline / "vae", seed=1)
    other = load_autoencoder(pipeline)
    assert other.id == "pipeline"
    assert other.sha256 != vae.sha256
    assert not any(parameter.requires_grad for parameter in vae.vae.parameters())


def test_files_with_the_old_names_of_the_attention_load(folder, images, tmp_path):
    """Stable Diffusion's own VAEs are such files."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(folder / "diffusion_pytorch_model.safetensors")
    renamed = {}
    for key, value in state.items():
        for new_name, old_name in old.items():
            key = key.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
        renamed[key] = value
    assert renamed.keys() != state.keys()
    save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.testing.assert_close(load_autoencoder(tmp_path).encode(images), load_autoencoder(folder).encode(images))


def test_a_model_of_other_channels_or_images_that_do_not_divide_are_named(folder, tmp_path):
    vae = load_autoencoder(folder)
    check_autoencoder(vae, (4, 4, 6), (32, 48))
    with pytest.raises(UserError, match="VAE tiny has latents of 4 channels, the model takes 16: give the VAE"):
        check_autoencoder(vae, (16, 4, 4), (32, 32))
    with pytest.raises(UserError, match="images of 30x32: VAE tiny needs sides that are multiples of 8"):
        check_autoencoder(vae, (4, 4, 4), (32, 30))
    with pytest.raises(UserError, match="a latent for every 8 pixels: images of 32x32 do not become the 8x8"):
        check_autoencoder(vae, (4, 8, 8), (32, 32))


def damage(folder, kind):
    config, weights = folder / "config.json", folder / "diffusion_pytorch_model.safetensors"
    if kind == "no config":
        config.unlink()
    elif kind == "broken config":
        config.write_text("{")
    elif kind == "another model":
        config.write_text('{"_class_name": "UNet2DModel"}')
    elif kind == "gray":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"in_channels": 1}))
    elif kind == "pickled weights":
        weights.rename(folder / "diffusion_pytorch_model.bin")
    elif kind == "cut short":
        weights.write_bytes(weights.read_bytes()[:5000])
    elif kind == "a weight is missing":
        state = load_file(weights)
        state.pop("decoder.conv_in.bias")
        save_file(state, weights, {"format": "pt"})
    elif kind == "another width":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"latent_channels": 8}))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no config", "no config.json; a VAE is a folder"),
        ("broken config", "config.json is damaged"),
        ("another model", "a UNet2DModel, not an AutoencoderKL"),
        ("gray", "a VAE of images with 1 channels"),
        ("pickled weights", "no diffusion_pytorch_model.safetensors"),
        ("cut short", "not a readable AutoencoderKL"),
        ("a weight is missing", r"missing: decoder.conv_in.bias"),
        ("another width", "fetch or save it again"),
    ],
)
def test_what_is_no_vae_is_named_in_one_line(tmp_path, kind, message):
    folder = write_vae(tmp_path / "tiny")
    damage(folder, kind)
    with pytest.raises(UserError, match=message) as caught:
        load_autoencoder(folder)
    assert str(caught.value).startswith(f"{folder}: ")
    assert "\n" not in str(caught.value)


def test_wrong_names_and_scales_are_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: a file; give the folder"):
        load_autoencoder(tmp_path / "file")
    with pytest.raises(UserError, match="no such folder, and not a Hub id"):
        load_autoencoder(tmp_path / "nowhere")
    for scale in (0, -1, float("inf"), float("nan")):
        with pytest.raises(UserError, match=f"scale {scale:g}: must be a number above 0"):
            load_autoencoder(tmp_path, scale=scale)


def test_without_diffusers_the_remedy_is_named(folder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'diffit-torch\[latent\]'"):
        load_autoencoder(folder)


def python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    run = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.slow
def test_a_hub_id_is_found_in_the_cache_without_network(folder, tmp_path):
    """The cache is laid out here by hand, as huggingface_hub documents it."""
    cache = tmp_path / "hub" / "models--someone--vae"
    snapshot = cache / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("0123abc")
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
    code = (
        "from diffit.models.autoencoder import load_autoencoder as load; v = load('someone/vae'); print(v.id, v.sha256)"
    )
    printed = python(code, HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "hub"))
    assert printed.split() == ["someone/vae", load_autoencoder(folder).sha256]


def test_import_diffit_does_not_import_diffusers():
    code = "import sys, diffit, diffit.models.autoencoder; assert 'diffusers' not in sys.modules"
    python(code)
    assert "diffusers" in sys.modules  # so that the name above is the right one
