"""The latent model as a user runs it: images through a tiny VAE, cached or live, to trained weights and images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from diffit.cli import cli
from diffit.configs.resolve import DataFacts, resolve
from diffit.data.encode import encode_archive
from diffit.errors import UserError
from diffit.models.autoencoder import load_autoencoder
from diffit.models.latent import LatentDiffiT
from diffit.training.step import build_network
from diffit.weights.file import load_network, save_network
from helpers import command, write_archive, write_vae

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def pets(tmp_path_factory) -> Path:
    return write_archive(tmp_path_factory.mktemp("data") / "pets.zip", 24, side=32)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    return write_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="module")
def latents(pets, vae, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("latents") / "pets"
    encode_archive(pets, folder, load_autoencoder(vae), shard_size=10)
    return folder


def train(outdir: Path, data: Path, vae: Path, *arguments: object, preset: str = "latent-debug") -> Path:
    words = ["--preset", preset, "--outdir", outdir, "--data", data, "--grid", "2x2"]
    words += ["--vae", vae] if preset.startswith("latent") else []
    cli(["train", *map(str, [*words, *arguments])], standalone_mode=False)
    return sorted(outdir.iterdir())[-1]


def sample(network: Path, outdir: Path, vae: Path, *arguments: object) -> Path:
    words = ["--network", network, "--outdir", outdir, "--vae", vae, *arguments]
    cli(["sample", *map(str, words)], standalone_mode=False)
    return outdir


def stats(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in stats(run)]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    (state,) = sorted(run.glob("training-state-*"))[-1:]
    kinds = ("model", "ema", "optimizer")
    return {f"{k}/{n}": v for k in kinds for n, v in load_file(state / f"{k}.safetensors").items()}


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("[0-9]*.png"))]).astype(int)


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [("--cond",), ("--cond", "--mirror", "--batch-gpu", 4)], ids=str)
def test_cached_and_live_latents_give_the_same_losses(pets, latents, vae, tmp_path, options):
    cached, live = (train(tmp_path / data.name, data, vae, *options) for data in (latents, pets))
    assert len(losses(cached)) == 4
    # The VAE runs on other batches, which rounds otherwise.
    assert_close(losses(cached), losses(live), rtol=1e-4, atol=0)
    assert_close(stats(cached)[0]["loss"], stats(live)[0]["loss"], rtol=1e-5, atol=0)
    for name in ("training_options.json", "reals.png", "fakes_init.png", "network-snapshot-000000.160.safetensors"):
        assert (cached / name).is_file(), name
    assert Image.open(cached / "reals.png").size == Image.open(cached / "fakes_init.png").size


def test_a_latent_model_is_distilled_with_its_vae_and_keeps_its_variances_rows(pets, latents, vae, tmp_path):
    teacher = train(tmp_path / "teacher", latents, vae, "--kimg", 0.016, "--lr", 0.01)

    def distill(*words: object) -> None:
        words = ("--network", teacher, "--outdir", tmp_path / "student", "--method", "progressive", *words)
        cli(["distill", *map(str, words), "--steps", "1", "--kimg", "0.016", "--grid", "2x2"], standalone_mode=False)

    with pytest.raises(UserError, match=r"the model's autoencoder: tiny: no such folder, .*--vae PATH\|ID") as error:
        distill("--data", pets)
    assert "\n" not in str(error.value)
    distill("--data", latents, "--vae", vae)
    student = tmp_path / "student" / "student-1.safetensors"
    assert len(pixels(sample(student, tmp_path / "images", vae, "--num-samples", 2))) == 2
    before, after = (load_network(path)[0].final_layer.linear.weight.detach() for path in (teacher, student))
    epsilon, variance = (before == after).unflatten(0, (2, 2, 8)).split(4, dim=2)  # rows are (p, q, c)
    assert not epsilon.all()
    assert variance.all()


def test_mirrored_training_draws_other_latents(latents, vae, tmp_path):
    """And half of them: at a learning rate of nothing only the data differ."""
    runs = [
        train(tmp_path / str(flag), latents, vae, "--mirror", flag, "--lr", 1e-12, "--batch", 64, "--kimg", 0.064)
        for flag in (False, True)
    ]
    assert losses(runs[0]) != losses(runs[1])
    assert_close(losses(runs[0]), losses(runs[1]), rtol=0.05, atol=0)


def test_stopped_and_resumed_equals_run_through_to_the_last_bit(latents, vae, tmp_path):
    options = ("--cond", "--mirror", "--batch-gpu", 4)
    through = train(tmp_path / "through", latents, vae, *options, "--kimg", 0.16)
    first = train(tmp_path / "parts", latents, vae, *options, "--kimg", 0.064)
    second = train(tmp_path / "parts", latents, vae, *options, "--kimg", 0.16)
    assert second == first
    expected, found = tensors(through), tensors(second)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    # And what can be resumed live or cached is the same run.
    assert losses(through)[-1] == losses(second)[-1]


def test_held_out_latents_are_evaluated_and_those_of_another_vae_refused(pets, latents, vae, tmp_path):
    run = train(tmp_path / "a", latents, vae, "--val", latents, "--kimg", 0.04)
    assert stats(run)[-1]["val_loss"] > 0
    encode_archive(pets, tmp_path / "other", load_autoencoder(write_vae(tmp_path / "vae", seed=7)))
    with pytest.raises(UserError, match="other: latents of VAE vae"):
        train(tmp_path / "b", latents, vae, "--val", tmp_path / "other")
    assert not (tmp_path / "b").exists()


def test_the_average_keeps_9999_parts_of_10000_a_step(latents, vae, tmp_path):
    run = train(tmp_path, latents, vae, "--kimg", 0.008)
    facts = DataFacts(3, (32, 32), 3, latent_scale=0.18215)
    start = build_network(resolve("latent-debug", {}, facts)).state_dict()
    state, checked = tensors(run), 0
    for name, value in start.items():
        if f"model/{name}" in state and name != "pos_embed":
            expected = 0.9999 * value + 1e-4 * state[f"model/{name}"]
            assert_close(state[f"ema/{name}"], expected, rtol=1e-6, atol=1e-9)
            checked += 1
    assert checked > 10
    assert not torch.equal(state["model/final_layer.linear.weight"], start["final_layer.linear.weight"])


def test_gradient_checkpointing_changes_rounding_only(latents, vae, tmp_path):
    runs = [train(tmp_path / str(flag), latents, vae, "--kimg", 0.08, "--grad-ckpt", flag) for flag in (False, True)]
    assert_close(losses(runs[1]), losses(runs[0]), rtol=1e-5, atol=0)


@pytest.mark.slow
def test_two_processes_learn_what_one_does(latents, vae, tmp_path):
    words = ["--cond", "--mirror", "--batch-gpu", 2, "--kimg", 0.08]
    one = train(tmp_path / "1", latents, vae, *words)
    words += ["--preset", "latent-debug", "--data", latents, "--vae", vae, "--grid", "2x2", "--outdir", tmp_path / "2"]
    command("train", *words, processes=2)
    (two,) = (tmp_path / "2").iterdir()
    for name in ("images", "loss", "grad_norm"):
        assert_close([line[name] for line in stats(two)], [line[name] for line in stats(one)], rtol=1e-5, atol=0)


@pytest.mark.slow
def test_pixels_train_and_sample_on_the_cosine_schedule(tmp_path):
    data = write_archive(tmp_path / "small.zip", 24, side=16)
    options = ("--diffusion", "cosine", "--cond", "--kimg", 0.8, "--tick", 0.2, "--lr", 3e-3, "--lr-rampup-kimg", 0)
    run = train(tmp_path / "runs", data, Path(), *options, "--augment", 0, preset="debug")
    assert losses(run)[-1] < 0.8 * losses(run)[0]
    assert any(name.startswith("loss_t_") for name in stats(run)[0])
    network = run / "network-snapshot-000000.800.safetensors"
    assert load_network(network)[1].diffusion.schedule == "cosine"
    for sampler in ("ddim", "ddpm", "dpm++", "heun"):
        words = [
            "--network",
            network,
            "--outdir",
            tmp_path / sampler,
            "--sampler",
            sampler,
            "--steps",
            4,
            "--seeds",
            "0-3",
        ]
        cli(["sample", *map(str, words)], standalone_mode=False)
        assert pixels(tmp_path / sampler).shape == (4, 16, 16, 3)


# --- sampling -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(vae, tmp_path_factory) -> Path:
    """Untrained, but with every part having an effect; it knows three classes."""
    facts = DataFacts(3, (32, 32), 3, ("ant", "bee", "cat"))
    config = resolve("latent-debug", {"cond": True, "vae": str(vae)}, facts)
    net = build_network(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(std=0.15, generator=generator)
    path = tmp_path_factory.mktemp("n") / "net.safetensors"
    save_network(path, net.state_dict(), config, kimg=1)
    return path


def test_the_network_sees_the_class_that_was_asked_for_and_the_null_class_when_guided(
    network, vae, tmp_path, monkeypatch
):
    seen: list[list[int]] = []
    forward = LatentDiffiT.forward
    monkeypatch.setattr(
        LatentDiffiT, "forward", lambda self, x, t, y: seen.append(y.tolist()) or forward(self, x, t, y)
    )
    sample(network, tmp_path / "a", vae, "--seeds", "0-3", "--class", "bee")
    assert seen == [[1] * 4] * 4
    seen.clear()
    sample(network, tmp_path / "b", vae, "--seeds", "0-6", "--labels", "balanced", "--batch", 4, "--cfg-scale", 2)
    assert seen == [[0, 1, 2, 0], [3] * 4] * 4 + [[1, 2, 0], [3] * 3] * 4
    seen.clear()
    sample(network, tmp_path / "c", vae, "--seeds", "0-6", "--sampler", "ddpm", "--steps", 2)
    listed = dict(json.loads((tmp_path / "c/dataset.json").read_text())["labels"])
    assert seen == [[listed[f"{seed:06d}.png"] for seed in range(7)]] * 2


def test_classes_and_guidance_change_the_image(network, vae, tmp_path):
    ants, bees = (
        pixels(sample(network, tmp_path / name, vae, "--seeds", "0-3", "--class", name)) for name in ("ant", "bee")
    )
    guided = pixels(sample(network, tmp_path / "g", vae, "--seeds", "0-3", "--class", "ant", "--cfg-scale", 4))
    assert ants.std() > 5
    assert (ants != bees).any()
    assert (ants != guided).any()


@pytest.mark.parametrize(
    "how", [("--sampler", "ddpm"), ("--sampler", "dpm++"), ("--sampler", "ddim", "--eta", 1)], ids=str
)
def test_images_do_not_depend_on_the_batch(network, vae, tmp_path, how):
    one, all_ = (
        pixels(sample(network, tmp_path / str(batch), vae, "--seeds", "0-6", "--batch", batch, "--steps", 6, *how))
        for batch in (1, 64)
    )
    assert np.abs(one - all_).max() <= 1
    assert (one != all_).mean() < 1e-2


# --- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--class", "3"], "--class 3: unknown; the model knows ant, bee, cat, or 0-2"),
        (["--class", "dog"], "--class dog: unknown"),
        (["--steps", "1001"], "steps 1001: the schedule has 1000 timesteps"),
        (["--steps", "ddim300"], "no whole stride takes 300"),
        (["--cfg-interval", "5,2"], "cfg_interval 5,2 is empty"),
        (["--sigma-max", "80"], "--sigma-max 80.0: this model has the noise levels of its own timesteps"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(network, vae, tmp_path, arguments, said):
    with pytest.raises(UserError, match=said) as caught:
        sample(network, tmp_path / "out", vae, *arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_vae_of_another_channel_count_is_refused(network, pets, tmp_path):
    other = write_vae(tmp_path / "wide", latent_channels=16)
    said = "VAE wide has latents of 16 channels, the model takes 4"
    with pytest.raises(UserError, match=said):
        sample(network, tmp_path / "out", other)
    with pytest.raises(UserError, match=said):
        train(tmp_path / "out", pets, other)
    assert not (tmp_path / "out").exists()


def test_latents_of_another_vae_are_refused(latents, tmp_path):
    other = write_vae(tmp_path / "other", seed=9)
    with pytest.raises(UserError, match=r"pets: latents of VAE tiny .* not of other"):
        train(tmp_path / "out", latents, other)
    assert not (tmp_path / "out").exists()


def test_latents_for_an_image_space_model_and_a_vae_for_one_are_refused(latents, pets, vae, tmp_path):
    with pytest.raises(UserError, match="the data are latents, preset debug is an image-space model"):
        train(tmp_path / "out", latents, vae, preset="debug")
    with pytest.raises(UserError, match="preset debug is an image-space model; leave it out"):
        train(tmp_path / "out", pets, vae, "--vae", vae, preset="debug")
    run = train(tmp_path / "runs", pets, vae, "--kimg", 0.008, preset="debug")
    with pytest.raises(UserError, match="is an image-space model"):
        sample(run, tmp_path / "out", vae)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_unknown_hub_id_without_network_is_one_line(tmp_path):
    name = "nobody/no-such-model/diffit_256.safetensors"
    done = command("sample", "--network", name, "--outdir", tmp_path / "out", check=False, HF_HOME=str(tmp_path / "hf"))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {name}: no such file here, and not available from the Hub")
    assert not (tmp_path / "out").exists()


def test_metrics_of_a_run_on_latents_compare_with_the_images_that_are_named(latents, vae, tmp_path):
    how = ("--kimg", 0.016, "--metrics", "kid16_full:pixels")
    with pytest.raises(UserError, match=r"holds latents; give the images.*--metrics-ref"):
        train(tmp_path / "refused", latents, vae, *how)
    assert not (tmp_path / "refused").exists()
    reals = write_archive(tmp_path / "reals.zip", 24, side=32)
    run = train(tmp_path / "run", latents, vae, *how, "--metrics-ref", reals)
    (card,) = (run / "metric-kd16_full-pixels.jsonl").read_text().splitlines()
    assert json.loads(card)["vae_sha256"] == load_autoencoder(vae).sha256
