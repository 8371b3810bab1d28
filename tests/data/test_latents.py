"""The latent cache, compared with diffusers' VAE on the images themselves."""

import json
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffit.cli import cli
from diffit.data.archive import ImageArchive
from diffit.data.encode import encode_archive
from diffit.data.latents import LatentArchive
from diffit.errors import UserError
from diffit.models.autoencoder import draw_latents, load_autoencoder
from helpers import command, write_archive, write_vae

diffusers = pytest.importorskip("diffusers")
COUNT, SIDE, SHARD = 11, 32, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_vae(tmp_path_factory.mktemp("vae") / "tiny")


@pytest.fixture(scope="module")
def vae(folder):
    return load_autoencoder(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("images") / "pets.zip", COUNT, side=SIDE)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, source, vae):
    dest = tmp_path_factory.mktemp("cache") / "latents"
    encode_archive(source, dest, vae, batch=3, shard_size=SHARD)
    return dest


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@torch.no_grad()
def live(folder, source, mirrored):
    """Moments by diffusers alone, of images flipped by NumPy."""
    images = ImageArchive(source).load_all().numpy()
    flipped = np.where(mirrored[:, None, None, None], images[..., ::-1], images)
    reference = diffusers.AutoencoderKL.from_pretrained(folder).eval()
    return reference.encode(torch.from_numpy(flipped / np.float32(127.5) - 1).float()).latent_dist


def moments(archive: LatentArchive, mirrored: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, std) of every image, or of its mirror image."""
    stored = torch.stack([archive[i] for i in range(len(archive))])
    which = torch.from_numpy(mirrored).view(-1, 1, 1, 1)
    return torch.where(which, stored[:, 2], stored[:, 0]), torch.where(which, stored[:, 3], stored[:, 1])


def test_cached_moments_are_those_of_the_images_and_of_their_mirror_images(cache, folder, source):
    archive = LatentArchive(cache)
    mirrored = np.arange(COUNT) % 2 == 0
    expected = live(folder, source, mirrored)
    mean, std = moments(archive, mirrored)
    assert mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, expected.mean)
    torch.testing.assert_close(std, expected.std)
    assert not torch.allclose(mean, live(folder, source, ~mirrored).mean)


def test_images_may_be_read_in_any_order_and_again(cache):
    archive = LatentArchive(cache)
    everything = archive.load_all()
    assert everything.shape == (COUNT, 4, 4, 4, 4)
    for index in (10, 0, 7, 7, 3):
        assert torch.equal(archive[index], everything[index])
    for index in (-1, COUNT):
        with pytest.raises(IndexError):
            archive[index]


def test_draws_from_the_cache_are_those_of_the_live_vae_on_the_same_noise(cache, folder, source):
    mirrored = np.zeros(COUNT, bool)
    expected = live(folder, source, mirrored).sample(torch.Generator().manual_seed(1)) * 0.18215
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    cached = moments(LatentArchive(cache), mirrored)
    torch.testing.assert_close(draw_latents(*cached, noise, 0.18215), expected)


def test_labels_and_facts_are_those_of_the_images(cache, source, vae):
    archive, images = LatentArchive(cache, cond=True), ImageArchive(source, cond=True)
    assert torch.equal(archive.labels, images.labels)
    assert (archive.num_classes, archive.class_names) == (3, ["ant", "bee", "cat"])
    assert (len(archive), archive.name) == (COUNT, "latents")
    assert (archive.image_size, archive.latent_shape) == ((SIDE, SIDE), (4, 4, 4))
    assert LatentArchive(cache).labels is None
    header = json.loads((cache / "header.json").read_text())
    assert (header["vae"], header["vae_sha256"], header["scale"]) == ("tiny", vae.sha256, 0.18215)
    assert (header["source"], header["count"], header["complete"]) == ("pets.zip", COUNT, True)
    archive.check_vae(vae.sha256, 0.18215)


def test_statistics_are_those_of_many_draws(cache):
    archive = LatentArchive(cache)
    both = [moments(archive, np.full(COUNT, flag)) for flag in (False, True)]
    mean, std = (torch.cat(parts) for parts in zip(*both, strict=True))
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([draw_latents(mean, std, torch.randn(mean.shape, generator=generator), 1) for _ in range(500)])
    draws = draws.transpose(0, 2).flatten(1).double() * 0.18215
    header = archive.header
    torch.testing.assert_close(torch.tensor(header.latent_mean).double(), draws.mean(1), rtol=0, atol=2e-3)
    torch.testing.assert_close(torch.tensor(header.latent_std).double(), draws.std(1), rtol=1e-2, atol=0)
    torch.testing.assert_close(archive.check(), (header.latent_mean, header.latent_std))


def test_a_pickled_archive_reads_the_same(cache):
    archive = LatentArchive(cache)
    assert torch.equal(archive[5], pickle.loads(pickle.dumps(archive))[5])


def test_half_precision_is_half_the_size_and_close(cache, source, vae, tmp_path):
    encode_archive(source, tmp_path / "half", vae, shard_size=SHARD, dtype="float16")
    half, whole = LatentArchive(tmp_path / "half").load_all(), LatentArchive(cache).load_all()
    assert (half.dtype, whole.dtype) == (torch.float16, torch.float32)
    torch.testing.assert_close(half.float(), whole, rtol=2e-3, atol=1e-3)
    assert load_file(tmp_path / "half" / "shard-00000.safetensors")["std"].dtype == torch.float16


def test_gray_images_without_labels_have_latents_too(folder, vae, tmp_path):
    source = write_archive(tmp_path / "gray.zip", 3, channels=1)
    unlabelled = tmp_path / "gray"
    unlabelled.mkdir()
    with zipfile.ZipFile(source) as archive:
        for name in archive.namelist():
            if name.endswith(".png"):
                (unlabelled / Path(name).name).write_bytes(archive.read(name))
    encode_archive(unlabelled, tmp_path / "out", vae)
    latents = LatentArchive(tmp_path / "out")
    assert (latents.has_labels, latents.num_classes, latents.latent_shape) == (False, 0, (4, 2, 2))
    rgb = ImageArchive(unlabelled).load_all().repeat(1, 3, 1, 1)
    expected, _ = vae.encode(rgb)
    torch.testing.assert_close(latents.load_all()[:, 0], expected)
    with pytest.raises(UserError, match="has no labels: drop --cond"):
        LatentArchive(tmp_path / "out", cond=True)


class Interrupted(Exception):
    pass


class Failing:
    """A VAE that works ``calls`` times."""

    def __init__(self, vae, calls: int) -> None:
        self.wrapped, self.calls = vae, calls

    def __getattr__(self, name: str):
        return getattr(self.wrapped, name)

    def encode(self, images, **how):
        self.calls -= 1
        if self.calls < 0:
            raise Interrupted
        return self.wrapped.encode(images, **how)


@pytest.mark.parametrize("calls", [0, 1, 5, 9])  # a shard takes 4
def test_after_an_interruption_the_files_become_those_of_an_uninterrupted_run(cache, source, vae, tmp_path, calls):
    with pytest.raises(Interrupted):
        encode_archive(source, tmp_path / "l", Failing(vae, calls), batch=3, shard_size=SHARD)
    made = sorted(path.name for path in (tmp_path / "l").glob("*.safetensors"))
    assert len(made) == calls // 4
    with pytest.raises(UserError, match=f"incomplete, {3 - len(made)} of 3 shards are missing: `diffit data encode"):
        LatentArchive(tmp_path / "l")
    (tmp_path / "l" / ".shard-00001.safetensors.1.part").write_bytes(b"left by a process that was killed")
    before = {name: (tmp_path / "l" / name).stat().st_ino for name in made}
    encode_archive(source, tmp_path / "l", vae, batch=3, shard_size=SHARD)
    assert contents(tmp_path / "l") == contents(cache)
    assert before == {name: (tmp_path / "l" / name).stat().st_ino for name in made}
    encode_archive(source, tmp_path / "l", Failing(vae, 0), batch=3, shard_size=SHARD)  # nothing is left to do


def test_a_shard_that_was_cut_short_is_named_and_made_again(cache, source, vae, tmp_path):
    encode_archive(source, tmp_path / "l", vae, batch=3, shard_size=SHARD)
    shard = tmp_path / "l" / "shard-00001.safetensors"
    archive = LatentArchive(tmp_path / "l")
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"shard-00001.safetensors: .*`diffit data encode"):
        archive[5]
    with pytest.raises(UserError, match="incomplete, 1 of 3 shards"):
        LatentArchive(tmp_path / "l")
    encode_archive(source, tmp_path / "l", Failing(vae, 4), batch=3, shard_size=SHARD)
    assert contents(tmp_path / "l") == contents(cache)


def test_values_that_changed_on_disk_are_found_by_check(source, vae, tmp_path):
    encode_archive(source, tmp_path, vae, shard_size=SHARD)
    tensors = load_file(tmp_path / "shard-00002.safetensors")
    tensors["mean_mirror"][1, 2, 3, 1] += 0.01
    save_file(tensors, tmp_path / "shard-00002.safetensors")
    with pytest.raises(UserError, match=r"shard-00002.safetensors: damaged \(image 9.*remove it"):
        LatentArchive(tmp_path).check()


def test_settings_that_differ_from_those_of_the_folder_are_named(cache, source, folder, vae, tmp_path):
    other_vae = load_autoencoder(write_vae(tmp_path / "other", seed=1))
    other_source = write_archive(tmp_path / "more.zip", COUNT + 1, side=SIDE)
    before = contents(cache)
    for change, message in [
        ({"vae": other_vae}, "made with --vae tiny .*, not other"),
        ({"vae": load_autoencoder(folder, scale=0.5)}, "made with --scale 0.18215, not 0.5"),
        ({"vae": load_autoencoder(folder, tiling=True)}, "made with --tiling False, not True"),
        ({"dtype": "float16"}, "made with --dtype float32, not float16"),
        ({"shard_size": 5}, "made with --shard-size 4, not 5"),
        ({"source": other_source}, "made with --source pets.zip .*, not more.zip .*: use that again"),
    ]:
        arguments = {"source": source, "dest": cache, "vae": vae, "shard_size": SHARD} | change
        with pytest.raises(UserError, match=message):
            encode_archive(**arguments)
    assert contents(cache) == before


def test_latents_of_another_vae_or_scale_are_refused(cache, vae):
    archive = LatentArchive(cache)
    with pytest.raises(UserError, match=r"latents of VAE tiny \(weights .*\), not of mine \(0000"):
        archive.check_vae("0" * 64, 0.18215, "mine")
    with pytest.raises(UserError, match=r"scaled by 0.18215, not 0.13"):
        archive.check_vae(vae.sha256, 0.13)


def test_nothing_is_written_where_something_else_is_or_the_images_do_not_fit(source, vae, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds other files \(thesis.tex\)"):
        encode_archive(source, tmp_path / "full", vae)
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        encode_archive(source, tmp_path / "full" / "thesis.tex", vae)
    odd = write_archive(tmp_path / "odd.zip", 2, side=20)
    with pytest.raises(UserError, match="images of 20x20: VAE tiny needs sides that are multiples of 8"):
        encode_archive(odd, tmp_path / "new", vae)
    with pytest.raises(UserError, match="dtype bfloat16: not known"):
        encode_archive(source, tmp_path / "new", vae, dtype="bfloat16")
    assert not (tmp_path / "new").exists()


def test_a_scale_that_does_not_fit_is_reported_with_the_one_that_does(source, folder, vae, tmp_path, caplog):
    header = encode_archive(source, tmp_path / "a", vae)
    (line,) = caplog.messages
    assert "with scale 0.18215, far from 1; --scale " in line
    good = load_autoencoder(folder, scale=float(line.rpartition("--scale ")[2].split()[0]))
    better = encode_archive(source, tmp_path / "b", good)
    assert len(caplog.messages) == 1
    torch.testing.assert_close(
        torch.tensor(better.latent_std) / torch.tensor(header.latent_std), torch.full((4,), good.scale / 0.18215)
    )


def test_a_header_that_is_no_header_is_named(cache, tmp_path):
    with pytest.raises(UserError, match=r"no header.json; a latent cache is a folder"):
        LatentArchive(tmp_path)
    text = (cache / "header.json").read_text()
    for broken, message in [("{", "Invalid JSON"), (text.replace('"version": 1', '"version": 2'), "version: 2")]:
        (tmp_path / "header.json").write_text(broken)
        with pytest.raises(UserError, match=message) as caught:
            LatentArchive(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_folder_and_a_zip_of_the_same_files_are_the_same_source(source, vae, cache, tmp_path):
    with zipfile.ZipFile(source) as archive:
        archive.extractall(tmp_path / "pets")
    assert ImageArchive(tmp_path / "pets", cond=True).hash_files() == ImageArchive(source, cond=True).hash_files()
    encode_archive(tmp_path / "pets", cache, Failing(vae, 0), shard_size=SHARD)
    name = tmp_path / "pets" / "00000" / "img00000003.png"
    name.write_bytes((tmp_path / "pets" / "00000" / "img00000004.png").read_bytes())
    with pytest.raises(UserError, match="--source"):
        encode_archive(tmp_path / "pets", cache, vae, shard_size=SHARD)


def encode_command(source, dest, vae, *more):
    return ["data", "encode", "--source", source, "--dest", dest, "--vae", vae, "--shard-size", SHARD, *more]


def test_the_command_encodes_and_check_prints_what_is_there(source, folder, cache, tmp_path, capsys):
    arguments = encode_command(source, tmp_path / "l", folder, "--batch", 3)
    cli([str(a) for a in arguments], standalone_mode=False)
    printed = capsys.readouterr()
    assert "encoding: 11 of 11" in printed.err
    assert f"next       diffit data check {tmp_path / 'l'}" in printed.out
    assert contents(tmp_path / "l") == contents(cache)
    cli(["data", "check", str(tmp_path / "l"), "--cond"], standalone_mode=False)
    out = capsys.readouterr().out
    header = json.loads((cache / "header.json").read_text())
    for part in (
        "11 of 32x32 from pets.zip",
        "tiny (weights",
        "4x4x4, float32, 3 files",
        " ".join(f"{value:.3f}" for value in header["latent_std"]),
        "3 classes",
        "warning    the latents' standard deviation",
        "--cond",
    ):
        assert part in out


@pytest.mark.slow
def test_two_processes_write_what_one_writes(source, folder, tmp_path):
    for processes in (1, 2):
        done = command(*encode_command(source, tmp_path / str(processes), folder), processes=processes)
        assert done.stdout.count("next ") == 1
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_an_unknown_hub_id_without_network_is_one_line_and_leaves_nothing(source, tmp_path):
    done = command(
        *encode_command(source, tmp_path / "l", "no-one/no-vae"),
        check=False,
        HF_HUB_OFFLINE="1",
        HF_HUB_CACHE=str(tmp_path / "hub"),
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: no-one/no-vae: no such folder here, and not available from the Hub (")
    assert "give a local folder" in line
    assert not (tmp_path / "l").exists()


def test_classes_that_were_renamed_are_so_in_a_finished_cache_too(source, vae, tmp_path):
    def renamed(name: str, dest: Path) -> Path:
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(dest, "w") as new:
            for item in old.namelist():
                data = old.read(item)
                new.writestr(item, data.replace(b"ant", name.encode()) if item == "dataset.json" else data)
        return dest

    for name in ("wrong", "right"):
        (tmp_path / name).mkdir()
    wrong, right = renamed("aunt", tmp_path / "wrong" / "pets.zip"), renamed("emu", tmp_path / "right" / "pets.zip")
    encode_archive(wrong, tmp_path / "l", vae, batch=3, shard_size=SHARD)
    before = contents(tmp_path / "l")
    encode_archive(right, tmp_path / "l", Failing(vae, 0), batch=3, shard_size=SHARD)
    assert LatentArchive(tmp_path / "l", cond=True).class_names == ["emu", "bee", "cat"]
    after = contents(tmp_path / "l")
    assert {name for name in after if after[name] != before[name]} == {"dataset.json", "dataset.sfv"}
    encode_archive(wrong, tmp_path / "l", Failing(vae, 0), batch=3, shard_size=SHARD)
    assert contents(tmp_path / "l") == before
    (tmp_path / "l" / "dataset.json").write_bytes(before["dataset.json"].replace(b"cat", b"cut"))
    with pytest.raises(UserError, match="damaged"):
        encode_archive(right, tmp_path / "l", Failing(vae, 0), batch=3, shard_size=SHARD)
