"""The diffusers pipeline, compared with ``diffit.sample`` and with diffusers' own loading."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffit import load_network, sample
from diffit.configs.presets import get_preset
from diffit.configs.schema import Config, Data
from diffit.errors import UserError
from diffit.models import build
from diffit.sampling import Model, with_sampling
from diffit.utils.images import to_uint8
from diffit.utils.randomness import PerSampleNoise
from diffit.weights.file import save_network
from helpers import write_vae

diffusers = pytest.importorskip("diffusers")
from diffit.models.autoencoder import load_autoencoder  # noqa: E402
from diffit.pipeline import DiffiTModel, DiffiTPipeline  # noqa: E402

NAMES = ("ant", "bee", "cat")
SEEDS = [3, 1, 4]


def config_of(preset: str, **sampling) -> Config:
    base = get_preset(preset)
    config = base.model_copy(
        update={
            "model": base.model.model_copy(update={"num_classes": 3}),
            "data": Data(path="/home/alice/pets.zip", cond=True, class_names=NAMES),
        }
    )
    return with_sampling(
        config, **({"cfg_scale": 1.5, "cfg_power": 2.0, **sampling} if preset != "debug" else sampling)
    )


def write_network(path: Path, config: Config) -> Path:
    """Weights that are not those of the start, at which the output is 0 whatever goes in."""
    torch.manual_seed(0)
    net = build(config.model)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_network(path, net.state_dict(), config)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def vae(folder):
    return write_vae(folder / "vae")


@pytest.fixture(scope="module")
def latent(folder):
    return write_network(folder / "latent.safetensors", config_of("latent-debug"))


@pytest.fixture(scope="module")
def image(folder):
    return write_network(folder / "image.safetensors", config_of("debug", cfg_scale=2.0))


@pytest.fixture
def pipe(latent, vae):
    pipe = DiffiTPipeline.from_network(latent, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pixels(image):
    pipe = DiffiTPipeline.from_network(image)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_of(config: Config, seeds=SEEDS) -> torch.Tensor:
    return PerSampleNoise(seeds)(torch.empty(len(seeds), *config.model.sample_shape))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("changes", [{}, {"sampler": "dpm++", "steps": 6, "cfg_scale": 3.0}, {"steps": "ddim5"}])
def test_latents_are_those_of_sample_on_the_same_noise(pipe, latent, changes):
    net, config = load_network(latent)
    config = with_sampling(config, **changes)
    expected = sample(net, config, SEEDS, torch.tensor([2, 0, 1]))
    by_number = pipe(torch.tensor([2, 0, 1]), latents=noise_of(config), output_type="latent").images
    assert changes or torch.equal(by_number, expected)
    result = pipe(
        [2, "ant", "BEE"], latents=noise_of(config), output_type="latent", sampler=changes.get("sampler"),
        num_inference_steps=changes.get("steps"), guidance_scale=changes.get("cfg_scale"),
    )  # fmt: skip
    assert_close(result.images, expected, rtol=0, atol=0)


def test_images_are_those_of_diffit_sample(pipe, latent, vae):
    net, config = load_network(latent)
    expected = to_uint8(Model(net, config, load_autoencoder(vae)).sample(SEEDS, NAMES), config.sampling.rounding)
    images = pipe(NAMES, latents=noise_of(config)).images
    assert [picture.size for picture in images] == [(32, 32)] * 3
    pixels = torch.from_numpy(np.stack([np.array(picture) for picture in images])).permute(0, 3, 1, 2)
    assert_close(pixels, expected, rtol=0, atol=0)
    floats = pipe(NAMES, latents=noise_of(config), output_type="np").images
    assert floats.shape == (3, 32, 32, 3)
    assert_close(torch.from_numpy(floats * 255).permute(0, 3, 1, 2), expected.float() + 0.5, rtol=0, atol=0.501)
    tensors = pipe(NAMES, latents=noise_of(config), output_type="pt", return_dict=False)[0]
    assert_close(tensors.permute(0, 2, 3, 1), torch.from_numpy(floats), rtol=0, atol=1e-6)


def test_an_image_space_pipeline_has_no_vae_and_draws_the_same(pixels, image, tmp_path):
    net, config = load_network(image)
    expected = sample(net, config, SEEDS, torch.tensor([1, 1, 0]))
    assert pixels.vae is None
    assert_close(
        pixels(["bee", 1, 0], latents=noise_of(config), output_type="latent").images, expected, rtol=0, atol=1e-6
    )
    pixels.save_pretrained(tmp_path)
    assert not (tmp_path / "vae").exists()
    again = DiffiTPipeline.from_pretrained(tmp_path)
    assert_close(
        again(["bee", 1, 0], latents=noise_of(config), output_type="latent").images, expected, rtol=0, atol=1e-6
    )


def test_a_folder_comes_back_whole_through_our_class_and_through_diffusers_own(pipe, latent, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["diffit.pipeline", "DiffiTModel"]
    assert not any(b"alice" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert str(latent.parent) not in (tmp_path / "vae" / "config.json").read_text()
    state, config = load_network(latent)
    for loader in (DiffiTPipeline, diffusers.DiffusionPipeline):
        again = loader.from_pretrained(tmp_path)
        assert type(again) is DiffiTPipeline
        but = {"data": True, "autoencoder": {"vae"}}
        assert again.transformer.settings.model_dump(exclude=but) == config.model_dump(exclude=but)
        assert again.transformer.settings.autoencoder.vae == "vae"
        assert again.transformer.settings.data.class_names == NAMES
        assert_close(dict(again.transformer.net.state_dict()), dict(state.state_dict()), rtol=0, atol=0)
        assert_close(dict(again.vae.state_dict()), dict(pipe.vae.state_dict()), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports",
    [
        "import diffit.pipeline\nfrom diffusers import DiffusionPipeline",
        "from diffusers import DiffusionPipeline\nimport diffit.pipeline",
        "from diffit import DiffiTPipeline\nfrom diffusers import DiffusionPipeline",
    ],
)
def test_after_import_diffit_pipeline_diffusers_loads_it_whichever_is_imported_first(pipe, tmp_path, imports):
    pipe.save_pretrained(tmp_path)
    check = f"pipe = DiffusionPipeline.from_pretrained({str(tmp_path)!r})\nassert type(pipe) is diffit.DiffiTPipeline"
    program = f"{imports}\nimport diffit\n{check}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_import_diffit_imports_neither_diffusers_nor_torch():
    program = "import diffit, sys; assert not {'diffusers', 'torch', 'diffit.pipeline'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_generators_have_the_semantics_of_diffusers(pipe):
    """One for the batch, or one an image: then an image does not depend on its batch, per-step noise included."""
    run = {"sampler": "ddpm", "output_type": "latent"}
    together = pipe([0, 1], generator=[seeded(5), seeded(6)], **run).images
    alone = pipe([1], generator=[seeded(6)], **run).images
    assert_close(together[1:], alone, rtol=1e-5, atol=1e-5)
    one = pipe([0, 1], generator=seeded(5), **run).images
    assert_close(one, pipe([0, 1], generator=seeded(5), **run).images, rtol=0, atol=0)
    assert not torch.allclose(one, pipe([0, 1], generator=seeded(7), **run).images)
    noise = torch.randn(2, 4, 4, 4, generator=seeded(5))
    explicit = pipe([0, 1], latents=noise, output_type="latent").images
    assert_close(pipe([0, 1], generator=seeded(5), output_type="latent").images, explicit, rtol=0, atol=0)


def test_without_labels_classes_are_drawn_by_the_generator(pipe):
    first = pipe(batch_size=4, generator=seeded(2), output_type="latent").images
    assert first.shape == (4, 4, 4, 4)
    assert_close(pipe(batch_size=4, generator=seeded(2), output_type="latent").images, first, rtol=0, atol=0)
    listed = [seeded(i) for i in range(4)]
    assert len(pipe(batch_size=4, generator=listed, output_type="latent").images) == 4


@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_the_callback_sees_every_step_and_may_change_the_latents(pipe, sampler):
    seen = []

    def look(given, step, level, kwargs):
        assert given is pipe
        seen.append((step, float(level), kwargs["latents"].clone()))
        return kwargs

    noise = noise_of(pipe.transformer.settings)
    run = {"latents": noise, "sampler": sampler, "output_type": "latent"}
    plain = pipe(NAMES, **run).images
    assert_close(pipe(NAMES, callback_on_step_end=look, **run).images, plain, rtol=0, atol=0)
    assert [step for step, _, _ in seen] == [0, 1, 2, 3]
    assert [level for _, level, _ in seen] == sorted((level for _, level, _ in seen), reverse=True)
    assert seen[-1][2].dtype == torch.float32
    assert_close(seen[-1][2], plain)
    halved = pipe(NAMES, callback_on_step_end=lambda *a: {"latents": torch.full_like(noise, 0.5)}, **run).images
    assert_close(halved, torch.full_like(noise, 0.5))

    def fill(given, step, level, kwargs):
        kwargs["latents"].fill_(0.5)

    in_place = pipe(NAMES, callback_on_step_end=fill, **run).images
    assert_close(in_place, torch.full_like(noise, 0.5))
    none = pipe(NAMES, callback_on_step_end=lambda *a: None, callback_on_step_end_tensor_inputs=[], **run).images
    assert_close(none, plain, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["pipe", "pixels"])
def test_half_precision_is_near(kind, dtype, request):
    pipe = request.getfixturevalue(kind)
    noise = noise_of(pipe.transformer.settings)
    exact = pipe([0, 1, 2], latents=noise, output_type="pt").images
    half = pipe.to(dtype)([0, 1, 2], latents=noise, output_type="pt").images
    assert pipe.transformer.dtype == dtype
    assert half.dtype == torch.float32
    assert_close(half, exact, rtol=0, atol=0.05)


def test_loading_in_half_precision_and_replacing_the_vae(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = DiffiTPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16, vae=pipe.vae)
    assert again.transformer.dtype == torch.bfloat16
    assert again.vae is pipe.vae


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_offloading_to_the_cpu_changes_nothing_but_where_the_weights_are(pipe, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    noise = noise_of(pipe.transformer.settings)
    expected = pipe.to(device)(NAMES, latents=noise, output_type="pt").images.cpu()
    pipe.to("cpu").enable_model_cpu_offload(device=device)
    for _ in range(2):
        assert_close(pipe(NAMES, latents=noise, output_type="pt").images.cpu(), expected)
        assert pipe.transformer.device.type == "cpu"


def test_a_published_pipeline_loads_from_the_cache_of_the_hub(pipe, tmp_path, monkeypatch):
    """As far as it goes without the network: what snapshot_download gives is loaded as a folder."""
    pipe.save_pretrained(tmp_path / "published")
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / "published")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    again = DiffiTPipeline.from_pretrained("someone/pets", revision="v1")
    assert (asked["name"], asked["revision"]) == ("someone/pets", "v1")
    wanted = asked["allow_patterns"]
    files = [path.relative_to(tmp_path / "published") for path in (tmp_path / "published").rglob("*") if path.is_file()]
    assert all(any(file.match(pattern) for pattern in wanted) for file in files)
    assert_close(dict(again.transformer.state_dict()), dict(pipe.transformer.state_dict()), rtol=0, atol=0)


def test_push_to_hub_uploads_the_folder(pipe, monkeypatch):
    uploaded = {}

    def upload(self, working_dir, repo_id, **options):
        uploaded[repo_id] = sorted(str(p.relative_to(working_dir)) for p in Path(working_dir).rglob("*") if p.is_file())

    module = sys.modules[diffusers.utils.PushToHubMixin.__module__]
    monkeypatch.setattr(diffusers.utils.PushToHubMixin, "_upload_folder", upload)
    monkeypatch.setattr(module, "create_repo", lambda repo_id, **_: type("Repo", (), {"repo_id": repo_id}))
    pipe.push_to_hub("someone/pets")
    weights = ["config.json", "diffusion_pytorch_model.safetensors"]
    expected = {"model_index.json", *(f"{part}/{name}" for part in ("transformer", "vae") for name in weights)}
    assert expected <= set(uploaded["someone/pets"])


def refusal(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"class_labels": [3]}, "0-2"),
        ({"class_labels": [-1]}, "0-2"),
        ({"class_labels": "cow"}, "ant"),
        ({"output_type": "jpeg"}, "pil, np, pt, latent"),
        ({"num_inference_steps": 0}, "steps"),
        ({"sampler": "plms"}, "sampler"),
        ({"class_labels": [0, 1], "generator": [seeded(0)]}, "1 generators for 2 images"),
        ({"batch_size": 3, "generator": [seeded(0)]}, "1 generators for 3 images"),
        ({"class_labels": []}, "no images"),
        ({"batch_size": 0}, "no images"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"(1, 4, 8, 8)"),
        ({"latents": torch.zeros(4, 4, 4, 4), "batch_size": 8}, "(4, 4, 4, 4)"),
        ({"class_labels": [0], "generator": 2**32 + 5}, "generator 4294967301: a seed is from 0"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "prompt_embeds"),
    ],
)
def test_impossible_calls_are_refused_in_one_line(pipe, arguments, said):
    assert said in refusal(lambda: pipe(**arguments))


def test_a_network_without_classes_takes_none_and_no_guidance(folder, vae):
    pipe = DiffiTPipeline.from_network(write_network(folder / "plain.safetensors", get_preset("latent-debug")), vae=vae)
    assert len(pipe(batch_size=2, output_type="latent").images) == 2
    assert "no classes" in refusal(lambda: pipe([0]))
    assert "no classes" in refusal(lambda: pipe(guidance_scale=2.0))


def test_a_vae_that_does_not_suit_is_refused(image, latent, vae, tmp_path, pipe):
    assert "image-space" in refusal(lambda: DiffiTPipeline.from_network(image, vae=vae))
    assert "image-space" in refusal(lambda: DiffiTPipeline.from_network(image, vae=pipe.vae))
    other = write_vae(tmp_path / "other", latent_channels=8)
    assert "8 channels, the model takes 4" in refusal(lambda: DiffiTPipeline.from_network(latent, vae=other))
    loaded = load_autoencoder(other).vae
    pipe.save_pretrained(tmp_path / "pipe")
    assert "8 channels" in refusal(lambda: DiffiTPipeline.from_pretrained(tmp_path / "pipe", vae=loaded))


def test_without_a_vae_there_are_latents_only(latent):
    pipe = DiffiTPipeline(DiffiTModel.wrap(*load_network(latent)))
    assert pipe([0], output_type="latent").images.shape == (1, 4, 4, 4)
    assert "needs a VAE" in refusal(lambda: pipe([0]))


def test_what_is_no_pipeline_is_refused_for_what_it_is(latent, vae, tmp_path):
    load = DiffiTPipeline.from_pretrained
    assert "from_network" in refusal(lambda: load(latent))
    assert "model_index.json" in refusal(lambda: load(vae))
    assert "no such folder" in refusal(lambda: load(tmp_path / "missing"))
    assert "HF_HUB_OFFLINE" in refusal(lambda: load("someone/not-there"))
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    assert "StableDiffusionPipeline" in refusal(lambda: load(tmp_path))


def test_weights_that_are_absent_or_cut_short_are_refused(pipe, tmp_path):
    from safetensors.torch import load_file, save_file

    pipe.save_pretrained(tmp_path)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    content, state = weights.read_bytes(), load_file(weights)
    del state["net.blocks.1.mlp.fc1.bias"]
    save_file(state, weights, {"format": "pt"})
    assert "missing: net.blocks.1.mlp.fc1.bias" in refusal(lambda: DiffiTPipeline.from_pretrained(tmp_path))
    weights.write_bytes(content[:2000])
    refusal(lambda: DiffiTPipeline.from_pretrained(tmp_path))
    weights.unlink()
    refusal(lambda: DiffiTPipeline.from_pretrained(tmp_path))


def test_what_people_bring_from_other_pipelines(pipe):
    run = {"output_type": "latent", "num_inference_steps": 2}
    three = pipe(class_labels="bee", num_images_per_prompt=3, generator=7, **run).images
    assert len(three) == 3
    assert_close(pipe(class_labels=[1, 1, 1], generator=seeded(7), **run).images, three, rtol=0, atol=0)
    by_array = pipe(class_labels=np.array([0, 2]), generator=7, **run).images
    assert_close(pipe(class_labels=[np.int64(0), np.int64(2)], generator=7, **run).images, by_array, rtol=0, atol=0)
    assert len(pipe(class_labels=[0, 1], batch_size=2, **run).images) == 2
    assert "batch_size 3 and 2 class_labels" in refusal(lambda: pipe([0, 1], batch_size=3))
    wrong = {"callback_on_step_end": lambda *a: {"latents": torch.zeros(1, 4, 2, 2)}}
    assert "callback_on_step_end: latents of (1, 4, 2, 2)" in refusal(lambda: pipe([0], **run, **wrong))
    with pytest.raises(UserError, match="has no scheduler: choose with sampler="):
        pipe.scheduler = object()


def test_gradient_checkpointing_and_compiled_blocks(pipe):
    net = pipe.transformer
    net.enable_gradient_checkpointing()
    assert net.net.grad_ckpt
    net.disable_gradient_checkpointing()
    assert not net.net.grad_ckpt
    assert net.is_gradient_checkpointing is False
    compiled = []
    for block in net.net.blocks:
        block.compile = lambda *a, block=block, **k: compiled.append(block)
    net.compile_repeated_blocks(fullgraph=True)
    assert compiled == list(net.net.blocks)
