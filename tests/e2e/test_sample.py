"""Samples from a file, through the command line where that is what is promised."""

import json
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

import diffit
from diffit.cli import cli
from diffit.configs.resolve import DataFacts, resolve
from diffit.data.archive import ImageArchive
from diffit.errors import UserError
from diffit.sampling.labels import choose_labels
from diffit.training.step import build_network
from diffit.utils.randomness import PerSampleNoise
from diffit.weights.file import read_network_file, save_network
from helpers import command, start, wait, write_archive


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A network that is not trained, but whose every part has an effect on the image."""
    facts = DataFacts(3, (16, 16), 3, ("ant", "bee", "cat"))
    config = resolve(
        "debug", {"data": str(write_archive(tmp_path_factory.mktemp("d") / "pets.zip")), "cond": True}, facts
    )
    net = build_network(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    path = tmp_path_factory.mktemp("n") / "net.safetensors"
    save_network(path, net.state_dict(), config, kimg=1)
    return path


def sample(network, outdir, *arguments):
    cli(["sample", "--network", str(network), "--outdir", str(outdir), *map(str, arguments)], standalone_mode=False)
    return outdir


def pixels(folder, subdirs=False):
    paths = sorted(folder.glob("*/*.png" if subdirs else "[0-9]*.png"))
    return np.stack([np.array(Image.open(path)) for path in paths]).astype(int)


def assert_same_images(a, b):
    """What the project promises: no value more than one level apart, and fewer than one in a thousand apart at all."""
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 1
    assert (a != b).mean() < 1e-3


@pytest.mark.parametrize("churn", [(), ("--S-churn", 20)])
def test_images_do_not_depend_on_the_batch(network, tmp_path, churn):
    one, seven, all_ = (
        pixels(sample(network, tmp_path / str(batch), "--seeds", "0-13", "--batch", batch, *churn))
        for batch in (1, 7, 64)
    )
    assert one.std() > 10
    assert_same_images(one, seven)
    assert_same_images(one, all_)


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["png", "npz"])
def test_images_do_not_depend_on_the_number_of_processes(network, tmp_path, format_):
    how = ("--seeds", "0-13", "--batch", 4, "--format", format_, "--grid", "3x2")
    for processes in (1, 2):
        command("sample", "--network", network, "--outdir", tmp_path / str(processes), *how, processes=processes)
    if format_ == "png":
        arrays = [pixels(tmp_path / str(processes)) for processes in (1, 2)]
        assert (tmp_path / "1/dataset.json").read_text() == (tmp_path / "2/dataset.json").read_text()
    else:
        files = [np.load(tmp_path / str(processes) / "samples_14x16x16x3.npz") for processes in (1, 2)]
        arrays = [file["arr_0"].astype(int) for file in files]
        assert (files[0]["arr_1"] == files[1]["arr_1"]).all()
    assert_same_images(*arrays)
    assert [path.name for path in (tmp_path / "2").iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_a_killed_run_is_continued_by_the_same_command(network, tmp_path):
    words = ["sample", "--network", network, "--outdir", tmp_path / "out", "--seeds", "0-99", "--format", "npz"]
    words += ["--batch", 2]
    (process,) = start("diffit", *words, output=tmp_path)
    marks = tmp_path / "out/.samples_100x16x16x3.npz.marks"
    deadline = time.monotonic() + 60
    # The record is written when the arrays are there.
    while (
        not ((tmp_path / "out/samples.json").exists() and np.load(marks, mmap_mode="r").any())
        and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.kill()
    assert wait([process]) == -signal.SIGKILL
    assert not (tmp_path / "out/samples_100x16x16x3.npz").exists()
    finished = np.load(marks)
    assert 0 < finished.sum() < 100
    command(*words)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["samples.json", "samples_100x16x16x3.npz"]
    whole = np.load(sample(network, tmp_path / "whole", "--seeds", "0-99", "--format", "npz") / names[1])["arr_0"]
    assert_same_images(np.load(tmp_path / "out" / names[1])["arr_0"].astype(int), whole.astype(int))


def test_seeds_may_come_in_any_order_and_company(network, tmp_path):
    some = pixels(sample(network, tmp_path / "a", "--seeds", "5,2,9"))
    all_ = pixels(sample(network, tmp_path / "b", "--seeds", "0-9"))
    assert_same_images(some, all_[[2, 5, 9]])


def test_npz_and_png_hold_the_same(network, tmp_path):
    png = pixels(sample(network, tmp_path / "png", "--seeds", "0-4"))
    npz = np.load(sample(network, tmp_path / "npz", "--seeds", "0-4", "--format", "npz") / "samples_5x16x16x3.npz")
    assert npz["arr_0"].dtype == np.uint8
    assert (npz["arr_0"] == png).all()
    labels = dict(json.loads((tmp_path / "png/dataset.json").read_text())["labels"])
    assert npz["arr_1"].tolist() == [labels[f"{seed:06d}.png"] for seed in range(5)]


def test_a_folder_of_samples_is_an_archive(network, tmp_path):
    archive = ImageArchive(sample(network, tmp_path, "--seeds", "0-6", "--subdirs"), cond=True)
    assert len(archive) == 7
    assert archive.image_shape == (3, 16, 16)
    assert archive.class_names == ["ant", "bee", "cat"]


def test_classes_go_by_name_or_number_and_change_the_image(network, tmp_path):
    by_name = pixels(sample(network, tmp_path / "a", "--seeds", "0-3", "--class", "bee"))
    by_number = pixels(sample(network, tmp_path / "b", "--seeds", "0-3", "--class", "1"))
    other = pixels(sample(network, tmp_path / "c", "--seeds", "0-3", "--class", "cat"))
    assert (by_name == by_number).all()
    assert (by_name != other).any()


def cells(path, rows, columns):
    """The images of a grid, (rows, 16, columns, 16, 3), without its gaps and the names at the left."""
    picture = np.array(Image.open(path))[:, 2 - 66 * columns :]
    picture = np.pad(picture, ((0, 2), (0, 2), (0, 0))).reshape(rows, 66, columns, 66, 3)
    return picture[:, :64:4, :, :64:4].astype(int)


def test_a_trajectory_starts_in_noise_and_ends_in_the_samples(network, tmp_path):
    folder = sample(network, tmp_path / "out", "--seeds", "0-5", "--trajectory", "--steps", 3, "--batch", 4)
    assert not list(folder.glob("*.gif"))
    with Image.open(tmp_path / "out-trajectory.gif") as gif:
        assert (gif.n_frames, gif.size) == (4, (8 * 66 - 2, 2 * 66 - 2))  # six images are two rows of four
        gif.seek(3)
        last = np.array(gif.convert("RGB")).astype(int)
    white = last[66:, [*range(2 * 66, 4 * 66 - 2), *range(6 * 66, 8 * 66 - 2)]]
    assert white.min() > 250  # two free cells in each half
    fifth = last[66:130:4, 0:64:4]
    apart = [np.abs(fifth - image).mean() for image in pixels(folder)]
    assert np.argmin(apart) == 4
    assert apart[4] < 15  # a GIF has 256 colours
    model = diffit.load(network)
    steps = model.trajectory(range(6), steps=3)
    torch.testing.assert_close(steps[-1][0], model.sample(range(6), steps=3))
    state, denoised = steps[0]
    noise = PerSampleNoise(range(6))(torch.empty(6, 3, 16, 16, dtype=torch.float64)).float()
    torch.testing.assert_close(
        state / state.std(dim=(1, 2, 3), keepdim=True), noise / noise.std(dim=(1, 2, 3), keepdim=True)
    )
    torch.testing.assert_close(
        denoised,
        model.denoiser(choose_labels(model.config, range(6)))(noise.double() * 80, torch.tensor(80.0)).float(),
        atol=1e-4,
        rtol=1e-4,
    )


def test_class_grid_has_a_row_a_class_and_a_column_a_seed(network, tmp_path):
    sample(network, tmp_path / "out", "--seeds", "0-3", "--class-grid", "--batch", 5)
    grid = cells(tmp_path / "out-class-grid.png", 3, 4)
    bees = pixels(sample(network, tmp_path / "bees", "--seeds", "0-3", "--class", "bee"))
    assert_same_images(grid[1].transpose(1, 0, 2, 3), bees)
    sample(network, tmp_path / "some", "--seeds", "0-3", "--class-grid", "--class", "cat,ant")
    some = cells(tmp_path / "some-class-grid.png", 2, 4)
    assert_same_images(
        some.transpose(0, 2, 1, 3, 4).reshape(8, 16, 16, 3), grid[[2, 0]].transpose(0, 2, 1, 3, 4).reshape(8, 16, 16, 3)
    )
    assert not (tmp_path / "out").exists()


def test_guidance_has_an_effect(network, tmp_path):
    plain = pixels(sample(network, tmp_path / "a", "--seeds", "0-3"))
    assert (plain == pixels(sample(network, tmp_path / "b", "--seeds", "0-3", "--cfg-scale", "1"))).all()
    assert (plain != pixels(sample(network, tmp_path / "c", "--seeds", "0-3", "--cfg-scale", "3"))).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--class", "horse"], "horse: unknown; the model knows ant, bee, cat, or 0-2"),
        (["--class", "beee"], "beee: unknown; the model knows ant, bee, cat, or 0-2"),
        (["--class", "3"], "--class 3"),
        (["--grid", "9x9", "--num-samples", "64"], "--grid 9x9 needs 81 images, there are 64"),
        (["--steps", "0"], "steps: 0"),
        (["--seeds", "0-3,2"], "--seeds names 2 more than once"),
        (["--class-grid", "--grid", "2x2"], "takes no --grid"),
        (["--sampler", "euler", "--S-churn", "3"], "euler has no such setting; use --sampler heun"),
        (["--eta", "1"], "heun has no such setting; use --sampler ddim"),
        (["--S-noise", "2"], "no noise is added at S_churn 0"),
        (["--cfg-scale", "1", "--cfg-interval", "0.2,5"], "without guidance it has no effect"),
        (["--sigma-min", "100"], "sigma_min 100 must be below sigma_max 80"),
        (["--class", "bee", "--labels", "random"], "--class bee and --labels random both choose the classes"),
        (["--subdirs", "--format", "npz"], "--subdirs is of PNG files"),
        (["--class-grid", "--trajectory"], "takes no --trajectory"),
        (["--class-grid", "--labels", "balanced"], "takes no --labels balanced"),
        (["--class-grid", "--subdirs"], "takes no --subdirs"),
        (["--grid", "99999x99999"], "9,999,800,001 images, more than 10,000 in one picture"),
        (["--precision", "fp16"], "fp16 needs a CUDA device"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(network, tmp_path, arguments, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        sample(network, tmp_path / "out", *arguments)
    assert not (tmp_path / "out").exists()


def test_an_image_space_network_takes_no_vae(network, tmp_path):
    with pytest.raises(UserError, match="image-space"):
        sample(network, tmp_path / "out", "--vae", "someone/vae")
    assert not (tmp_path / "out").exists()


def test_a_class_may_be_given_by_name_in_any_case(network, tmp_path):
    by_number = pixels(sample(network, tmp_path / "a", "--seeds", "0-3", "--class", "1"))
    by_name = pixels(sample(network, tmp_path / "b", "--seeds", "0-3", "--class", "BEE"))
    np.testing.assert_array_equal(by_name, by_number)
    with pytest.raises(UserError, match="knows ant, bee, cat, or 0-2"):
        sample(network, tmp_path / "c", "--class", "catt")


def test_a_damaged_network_is_refused_and_sampled_on_request(network, tmp_path):
    damaged = tmp_path / "damaged.safetensors"
    content = bytearray(network.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged.safetensors: damaged.*--no-verify"):
        sample(damaged, tmp_path / "out", "--seeds", "0")
    assert len(pixels(sample(damaged, tmp_path / "out", "--seeds", "0", "--no-verify"))) == 1


def test_a_grid_says_how_many_images_there_are(network, tmp_path):
    out = sample(network, tmp_path / "out", "--grid", "3x2", "--steps", "2")
    assert len(pixels(out)) == 6


def test_of_a_run_the_snapshot_that_is_sampled_is_said_and_kept(network, tmp_path, capsys):
    newest = tmp_path / "runs/00000-pets/network-snapshot-000002.safetensors"
    newest.parent.mkdir(parents=True)
    for kimg in ("000001", "000002"):
        shutil.copy(network, newest.with_name(f"network-snapshot-{kimg}.safetensors"))
    sample(tmp_path / "runs", tmp_path / "out", "--seeds", "0", "--steps", 1)
    assert f"network {newest}\n" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/samples.json").read_text())["network"] == str(newest)


def test_a_guide_is_part_of_what_samples_are_made_with(network, tmp_path, capsys):
    other = tmp_path / "other.safetensors"
    state, config = read_network_file(network)
    save_network(other, {name: tensor * 1.1 for name, tensor in state.items()}, config)
    plain = pixels(sample(network, tmp_path / "plain", "--seeds", "0-3"))
    guided = sample(network, tmp_path / "guided", "--seeds", "0-3", "--guide-network", other, "--cfg-scale", 2)
    assert ", guidance 2" in (said := capsys.readouterr().out)
    assert "away from another network" in said
    assert not np.array_equal(pixels(guided), plain)
    with pytest.raises(UserError, match="other settings"):
        sample(network, guided, "--seeds", "0-3", "--guide-network", network, "--cfg-scale", 2)
    with pytest.raises(UserError, match="at guidance scale 1 it has no effect"):
        sample(network, tmp_path / "none", "--guide-network", other, "--cfg-scale", 1)


def test_of_a_run_that_guides_the_snapshot_is_said_and_two_processes_make_the_same(network, tmp_path, capsys):
    guide = tmp_path / "earlier/network-snapshot-000001.safetensors"
    guide.parent.mkdir()
    state, config = read_network_file(network)
    save_network(guide, {name: tensor * 1.1 for name, tensor in state.items()}, config)
    words = ["--seeds", "0-5", "--batch", "2", "--steps", "3", "--guide-network", guide.parent, "--cfg-scale", "2"]
    alone = sample(network, tmp_path / "alone", *words)
    assert f"guide {guide}\n" in capsys.readouterr().out
    command("sample", "--network", network, "--outdir", tmp_path / "together", *words, processes=2)
    assert_same_images(pixels(alone), pixels(tmp_path / "together"))


def test_the_null_class_that_was_never_trained_does_not_guide_but_another_network_does(network, tmp_path):
    state, config = read_network_file(network)
    never = config.model_copy(update={"training": config.training.model_copy(update={"label_drop": 0.0})})
    other = tmp_path / "other.safetensors"
    save_network(other, state, never)
    words = ["--seeds", "0", "--steps", "1", "--cfg-scale", "2"]
    with pytest.raises(UserError, match="needs the null class, which label_drop 0 never trains"):
        sample(other, tmp_path / "out", *words)
    assert len(pixels(sample(other, tmp_path / "out", *words, "--guide-network", network))) == 1
