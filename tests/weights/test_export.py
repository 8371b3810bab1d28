"""Networks in other forms: the official layout checked key by key, the others by loading them again."""

import errno
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from diffit import load_network, sample
from diffit.cli import cli
from diffit.configs.presets import get_preset
from diffit.configs.schema import ADMDiffusion, Config, Data
from diffit.errors import UserError
from diffit.models import build
from diffit.weights.export import export
from diffit.weights.file import locate, read_header, save_network
from helpers import write_vae


def config_of(preset: str = "latent-debug", **changes) -> Config:
    base = get_preset(preset)
    model = base.model.model_copy(update={"num_classes": 3})
    data = Data(path="/home/alice/pets.zip", cond=True, class_names=("ant", "bee", "cat"))
    return base.model_copy(update={"model": model, "data": data, **changes})


def write_network(path: Path, config: Config) -> Path:
    torch.manual_seed(0)
    net = build(config.model)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    save_network(path, net.state_dict(), config, kimg=0.12)
    return path


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("latent") / "net.safetensors", config_of())


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("image") / "net.safetensors", config_of("debug"))


def released_shapes(side: int, width: int, depth: int, heads: int, classes: int) -> dict[str, list[int]]:
    """The table of the released keys, written out for any size: patches of 2, 4 channels, MLP ratio 4."""
    tokens, features, out = (side // 2) ** 2, 256, 2 * 2 * 8
    shapes = {
        "pos_embed": [1, tokens, width],
        "x_embedder.proj.weight": [width, 4, 2, 2],
        "x_embedder.proj.bias": [width],
        "t_embedder.mlp.0.weight": [width, features],
        "t_embedder.mlp.0.bias": [width],
        "t_embedder.mlp.2.weight": [width, width],
        "t_embedder.mlp.2.bias": [width],
        "y_embedder.embedding_table.weight": [classes + 1, width],
        "final_layer.linear.weight": [out, width],
        "final_layer.linear.bias": [out],
    }
    for i in range(depth):
        block = f"blocks.{i}."
        shapes[block + "attn.relative_position_bias_table"] = [(side - 1) ** 2, heads]
        shapes[block + "attn.relative_position_index"] = [tokens, tokens]
        for name, rows, columns in [
            ("attn.qkv_temb", 3 * width, width), ("attn.qkv", 3 * width, width), ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width),
        ]:  # fmt: skip
            shapes[f"{block}{name}.weight"] = [rows, columns]
            shapes[f"{block}{name}.bias"] = [rows]
    return shapes


def test_the_table_itself_is_that_of_the_released_files():
    small, large = (released_shapes(side, 1152, 28, 16, 1000) for side in (32, 64))
    assert len(small) == len(large) == 346
    assert small["blocks.27.attn.relative_position_bias_table"] == [961, 16]
    assert large["blocks.0.attn.relative_position_index"] == [1024, 1024]


def test_the_released_layout_has_every_key_and_shape_and_the_same_bits(latent, tmp_path):
    path = export(latent, "official", tmp_path / "official.safetensors")
    state, source = load_file(path), load_file(latent)
    assert {key: list(tensor.shape) for key, tensor in state.items()} == released_shapes(4, 32, 2, 2, 3)
    for key, tensor in state.items():
        if key.endswith("relative_position_index"):
            assert tensor.dtype == torch.int64
            # Tokens of a 2×2 map in row-major order; the row of a table of 3×3 offsets for each pair.
            places = [(0, 0), (0, 1), (1, 0), (1, 1)]
            assert tensor.tolist() == [[(y - v + 1) * 3 + (x - u + 1) for v, u in places] for y, x in places]
        else:
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, source[key]), key
    with safe_open(path, "pt") as file:
        assert "diffit_config" not in (file.metadata() or {})


def test_the_released_layout_round_trips(latent, tmp_path):
    """There, back through our form, and there again: the same file to the bit, and the same samples on the way."""
    first = export(latent, "official", tmp_path / "first.safetensors")
    hub = export(first, "hub-folder", tmp_path / "hub")
    second = export(next(hub.glob("*.safetensors")), "official", tmp_path / "second.safetensors")
    assert first.read_bytes() == second.read_bytes()
    assert read_header(next(hub.glob("*.safetensors")))[1] is None
    net, config = load_network(first)
    original, own = load_network(latent)
    assert config.model == own.model
    assert_close(dict(net.state_dict()), dict(original.state_dict()), rtol=0, atol=0)
    labels = torch.tensor([0, 2])
    # Not to the bit: matrix products round by where in memory, so where in the file, a matrix begins.
    assert_close(sample(net, own, [1, 2], labels), sample(original, own, [1, 2], labels), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_weights_are_converted_and_the_index_is_not(latent, tmp_path, dtype):
    path = export(latent, "official", tmp_path / "o.safetensors", dtype=dtype)
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    source = load_file(latent)
    for key, tensor in load_file(path).items():
        if key.endswith("index"):
            assert tensor.dtype == torch.int64
        else:
            assert_close(tensor, source[key].to(expected), rtol=0, atol=0)
    again = export(path, "official", tmp_path / "again.safetensors")
    assert again.read_bytes() == path.read_bytes(), "without --dtype the file's own stays"


def test_a_pipeline_folder_is_read_by_the_pipeline(latent, image, tmp_path):
    pytest.importorskip("diffusers")
    from diffit.pipeline import DiffiTPipeline, write_pipeline

    vae = write_vae(tmp_path / "vae")
    for network, how in [(latent, {"vae": str(vae), "dtype": "bf16"}), (image, {})]:
        dest = write_pipeline(network, tmp_path / network.parent.name, **how)
        dtype = torch.bfloat16 if how else torch.float32
        pipe = DiffiTPipeline.from_pretrained(dest, dtype=dtype)
        saved = load_file(dest / "transformer" / "diffusion_pytorch_model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {dtype}
        net, _ = load_network(network)
        assert_close(dict(pipe.transformer.net.state_dict()), {k: v.to(dtype) for k, v in net.state_dict().items()})
        assert not any(str(tmp_path).encode() in path.read_bytes() for path in dest.rglob("*.json"))


def test_a_folder_for_the_hub_is_read_by_its_id(latent, tmp_path, monkeypatch):
    dest = export(latent, "hub-folder", tmp_path / "pets")
    files = sorted(path.name for path in dest.iterdir())
    assert files == ["README.md", "latent-debug.safetensors"]
    card = (dest / "README.md").read_text()
    for said in ("pets.zip", "0.12 of 0.16 kimg", "ant, bee, cat", "32×32×3", "ddim, 4 steps", "To be filled in"):
        assert said in card
    assert re.match(r"---\n(.+\n)+---\n", card), "the Hub reads a block of YAML at the head"
    assert "alice" not in card

    def snapshot_download(repo, **_):
        return str(dest)

    def hf_hub_download(repo, file, **_):
        assert repo == "someone/pets"
        return str(dest / file)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    net, config = load_network("someone/pets")
    original, own = load_network(latent)
    assert config == own
    assert read_header(dest / files[1])[1] == 0.12
    assert_close(dict(net.state_dict()), dict(original.state_dict()), rtol=0, atol=0)


def test_a_folder_for_the_hub_names_a_vae_and_not_a_path(tmp_path):
    base = config_of()
    local = tmp_path / "my-vae"
    local.mkdir()
    spec = base.autoencoder.model_copy(update={"vae": str(local)})
    network = write_network(tmp_path / "n.safetensors", base.model_copy(update={"autoencoder": spec}))
    dest = export(network, "hub-folder", tmp_path / "a")
    assert read_header(dest / "latent-debug.safetensors")[0].autoencoder.vae == "my-vae"
    dest = export(network, "hub-folder", tmp_path / "b", vae="someone/vae")
    assert read_header(dest / "latent-debug.safetensors")[0].autoencoder.vae == "someone/vae"
    assert "VAE someone/vae." in (dest / "README.md").read_text()


def test_a_vae_for_an_image_space_model_is_refused(tmp_path):
    config = get_preset("debug")
    network = tmp_path / "n.safetensors"
    save_network(network, build(config.model).state_dict(), config)
    with pytest.raises(UserError, match="--vae someone/vae: debug is an image-space model and has no VAE"):
        export(network, "hub-folder", tmp_path / "a", vae="someone/vae")


def test_released_weights_are_published_with_their_licence_in_mind(latent, tmp_path):
    official = export(latent, "official", tmp_path / "o.safetensors")
    card = (export(official, "hub-folder", tmp_path / "hub") / "README.md").read_text()
    assert "non-commercial" in card
    assert "kimg" not in card


def refusal(*arguments, **options) -> str:
    with pytest.raises(UserError) as caught:
        export(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_refused_and_nothing_is_written(latent, image, tmp_path):
    dest = tmp_path / "out"
    assert "image-space" in refusal(image, "official", dest)
    pipeline = pytest.importorskip("diffit.pipeline")
    with pytest.raises(UserError, match="image-space"):
        pipeline.write_pipeline(image, dest, vae="someone/vae")
    assert "leave it out" in refusal(latent, "official", dest, vae="someone/vae")
    wide = config_of()
    wide = wide.model_copy(update={"model": wide.model.model_copy(update={"input_size": (4, 8)})})
    assert "square" in refusal(write_network(tmp_path / "wide.safetensors", wide), "official", dest)
    cosine = write_network(tmp_path / "c.safetensors", config_of(diffusion=ADMDiffusion(schedule="cosine")))
    assert "noise schedule" in refusal(cosine, "official", dest)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "not a DiffiT network" in refusal(tmp_path / "other.safetensors", "official", dest)
    assert not dest.exists()


def test_what_exists_is_kept_unless_it_is_to_be_overwritten(latent, tmp_path):
    dest = tmp_path / "o.safetensors"
    dest.write_text("precious")
    arguments = ["export", "--network", str(latent), "--to", "official", "--dest", str(dest)]
    with pytest.raises(UserError, match="--overwrite"):
        cli(arguments, standalone_mode=False)
    assert dest.read_text() == "precious"
    cli([*arguments, "--overwrite"], standalone_mode=False)
    assert len(load_file(dest)) == len(released_shapes(4, 32, 2, 2, 3))


def test_a_folder_that_holds_more_than_an_export_is_not_replaced(latent, tmp_path, monkeypatch):
    dest = tmp_path / "upload"
    arguments = ["export", "--network", str(latent), "--to", "hub-folder", "--dest"]
    cli([*arguments, str(dest)], standalone_mode=False)
    cli([*arguments, str(dest), "--overwrite"], standalone_mode=False)
    (dest / ".git").mkdir()
    with pytest.raises(UserError, match=r"holds more than an export \(.git\)"):
        cli([*arguments, str(dest), "--overwrite"], standalone_mode=False)
    (dest / ".git").rmdir()
    monkeypatch.chdir(dest)
    with pytest.raises(UserError, match="the current folder, which would be replaced as a whole"):
        cli([*arguments, ".", "--overwrite"], standalone_mode=False)
    assert (dest / "README.md").exists()


def test_a_folder_for_the_hub_is_a_network_before_it_is_there(latent, tmp_path):
    folder = export(latent, "hub-folder", tmp_path / "upload")
    assert locate(folder) == folder / "latent-debug.safetensors"
    (folder / "another.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="a folder without a network-snapshot file"):
        locate(folder)


def test_a_full_disk_leaves_nothing(latent, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffit.weights.file.save_file", full)
    for to in ("official", "hub-folder"):
        assert "disk is full" in refusal(latent, to, tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_a_model_without_a_trained_null_class_does_not_become_official(tmp_path):
    config = config_of()
    training = config.training.model_copy(update={"label_drop": 0.0})
    network = write_network(tmp_path / "net.safetensors", config.model_copy(update={"training": training}))
    with pytest.raises(UserError, match=r"without a null class \(--label-drop 0\).*hub-folder"):
        export(network, "official", tmp_path / "official.safetensors")
    assert not (tmp_path / "official.safetensors").exists()


def test_a_model_that_predicts_v_does_not_become_official(tmp_path):
    config = config_of()
    diffusion = config.diffusion.model_copy(update={"prediction": "v"})
    network = write_network(tmp_path / "net.safetensors", config.model_copy(update={"diffusion": diffusion}))
    with pytest.raises(UserError, match=r"another noise schedule, prediction or scale.*hub-folder"):
        export(network, "official", tmp_path / "official.safetensors")


def test_names_in_a_model_card_are_text_and_nothing_else(tmp_path):
    names = ("<script>alert(1)</script>", "[free](https://example.org)", "a\n# Licence\nfree\x1b[2J")
    data = Data(path="/home/alice/<img src=x>.zip", cond=True, class_names=names)
    network = write_network(tmp_path / "net.safetensors", config_of("debug", data=data))
    card = (export(network, "hub-folder", tmp_path / "hub") / "README.md").read_text()
    assert "<script" not in card
    assert "<img" not in card
    assert r"\[free\]\(https://example.org\)" in card
    assert "\x1b" not in card
    assert card.count("\n# ") == 1
    assert card.count("Licence\n") == 1


def test_a_preset_that_is_a_path_writes_nothing_outside_the_destination(image, tmp_path):
    config = read_header(image)[0].model_copy(update={"preset": "../../outside"})
    save_network(tmp_path / "net.safetensors", load_file(image), config)
    with pytest.raises(UserError, match=r"preset '\.\./\.\./outside' is no name"):
        export(tmp_path / "net.safetensors", "hub-folder", tmp_path / "a" / "b")
    assert [item.name for item in tmp_path.iterdir()] == ["net.safetensors"]


@pytest.mark.parametrize("vae", ["/etc/vae", "../vae", "vae", "local/vae"])
def test_a_folder_is_never_a_vae_because_a_file_names_it(tmp_path, monkeypatch, vae):
    """It is read where the user passes it, and its path is not written into files."""
    from diffit.models.autoencoder import autoencoder_of

    pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local").mkdir()
    base = config_of()
    config = base.model_copy(update={"autoencoder": base.autoencoder.model_copy(update={"vae": vae})})
    for local in ("vae", "local/vae"):
        write_vae(tmp_path / local)
    with pytest.raises(UserError, match="pass that folder" if vae != "local/vae" else "not available from the Hub"):
        autoencoder_of(config)
    assert autoencoder_of(config, "local/vae").id == "vae"
    write_network(tmp_path / "net.safetensors", config)
    assert read_header(tmp_path / "net.safetensors")[0].autoencoder.vae == "vae"
