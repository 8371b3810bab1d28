"""The command line of training: what it accepts, and what a careless user is told."""

import errno
import json
import os
import subprocess
import sys
import zipfile

import click
import pytest
from PIL import Image

from diffit.cli import cli, run
from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.models.cost import estimate
from helpers import command, write_archive

DEBUG = ["--preset", "debug"]


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("data") / "pets.zip")


def diffit(*arguments):
    cli([str(argument) for argument in arguments], standalone_mode=False)


def dry_run(capsys, *arguments) -> tuple[Config, str]:
    diffit("train", *arguments, "--dry-run")
    text = capsys.readouterr().out
    diffit("train", *arguments, "--dry-run", "--json")
    return Config.from_json(capsys.readouterr().out, "output"), text


SPELLED = {
    "cifar10": """--outdir=./runs/cifar10 --data=./datasets/cifar10.zip --batch-gpu=128 --resolution=32 --base-dim=128
        --hidden-dim=256 --num-heads=4 --num-blocks=2 --lr=1e-3 --kimg=200000 --metrics=fid10k_full
        --metrics-ticks=50""",
    "ffhq64": """--outdir=./runs/ffhq64 --data=./datasets/ffhq64.zip --batch-gpu=64 --resolution=64 --base-dim=128
        --hidden-dim=256 --num-heads=4 --num-blocks=4 --lr=2e-4 --kimg=200000 --metrics=fid10k_full""",
}


@pytest.mark.parametrize("text", ["5%", "0.05", " 5.0 %"])
def test_a_share_of_the_time_for_metrics_makes_every_tick_one_for_them(text, capsys):
    config, _ = dry_run(capsys, "--preset", "debug", "--metrics", "fd80_full:pixels", "--metrics-budget", text)
    assert (config.training.metrics_budget, config.training.metrics_ticks) == (0.05, 1)


@pytest.mark.parametrize("text", ["0", "100%", "1", "five", "-5%"])
def test_what_is_no_share_of_the_time_is_refused_with_one_that_is(text):
    with pytest.raises(click.BadParameter, match=r"is not a share of the time; write 5% or 0\.05"):
        diffit("train", "--preset", "debug", "--metrics-budget", text, "--dry-run")


@pytest.mark.slow
@pytest.mark.parametrize("preset", SPELLED)
def test_the_documented_command_resolves_to_its_preset(preset, capsys):
    expected, text = dry_run(capsys, "--preset", preset)
    _, spelled = dry_run(capsys, *SPELLED[preset].split())
    config = Config.from_json(command("train", *SPELLED[preset].split(), "--dry-run", "--json", processes=4).stdout, "")
    assert config.model == expected.model
    assert config.sampling == expected.sampling
    free = {"batch_gpu", "metrics", "metrics_ticks"}
    assert config.training.model_dump(exclude=free) == expected.training.model_dump(exclude=free)
    parameters = next(line for line in text.splitlines() if line.startswith("parameters"))
    assert parameters in spelled


def test_a_dry_run_writes_nothing_and_says_what_it_takes(pets, tmp_path, capsys):
    config, text = dry_run(
        capsys, "--preset", "debug", "--data", pets, "--outdir", tmp_path / "runs", "--cond", "--batch-gpu", 4
    )
    assert not (tmp_path / "runs").exists()
    assert config.model.num_classes == 3
    assert config.data.class_names == ("ant", "bee", "cat")
    assert f"{estimate(config, 4).parameters:,}" in text
    assert "batch       8 = 4 per GPU × 1 processes × 2 accumulated" in text
    assert "24 images" in text
    assert "note        24 images are few" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cond"], True),
        (["--cond=True"], True),
        (["--cond=False"], False),
        (["--cond", "--seed", "1"], True),
        ([], False),
    ],
)
def test_cond_is_a_flag_and_takes_a_value(pets, capsys, words, expected):
    assert dry_run(capsys, "--preset", "debug", "--data", pets, *words)[0].data.cond is expected


def test_other_projects_spellings_mean_the_same(pets, capsys):
    theirs = (
        "--batch-size 16 --duration 0.5 --ema 0.25 --xflip=1 --global-seed 3 --num-workers 1 --image-size 16 --fp16"
    )
    ours = "--batch 16 --kimg 500 --mirror --seed 3 --workers 1 --resolution 16 --precision fp16"
    first = dry_run(capsys, "--preset", "debug", "--data-path", pets, *theirs.split())[0]
    second = dry_run(capsys, "--preset", "debug", "--data", pets, *ours.split(), "--ema", "0.25")[0]
    assert first == second
    assert first.training.ema_halflife_kimg == 250


def test_a_dry_run_without_data_does_not_deny_its_classes(capsys):
    assert "the data's classes" in dry_run(capsys, *DEBUG, "--cond")[1]
    assert "no classes" in dry_run(capsys, *DEBUG)[1]


def test_ten_minutes_are_the_length_of_what_nothing_is_said_of(pets, capsys):
    def length(*words) -> tuple[float | None, bool]:
        training = dry_run(capsys, "--data", pets, *words)[0].training
        return training.clock_minutes, "minutes" in training.chosen

    assert length() == (10.0, True)
    assert length("--minutes", 10) == (10.0, False)
    for words in (["--kimg", 3], ["--epochs", 5], DEBUG, ["--num-blocks", 1]):
        assert length(*words)[0] is None


def test_epochs_are_passes_over_the_data(pets, capsys):
    config, text = dry_run(capsys, *DEBUG, "--data", pets, "--epochs", 10)
    assert config.training.steps * config.training.batch == 240
    assert "30 steps, 10 epochs" in text


@pytest.mark.parametrize("size", ["16", "16x16", "16X16", "16×16", "016"])
def test_a_size_is_written_as_data_convert_takes_it(pets, capsys, size):
    assert dry_run(capsys, *DEBUG, "--data", pets, "--resolution", size)[0].model.image_size == (16, 16)


def test_underscores_are_as_good_as_hyphens(capsys):
    for underscored in ("--batch_gpu=2", "--dry_run"):
        with pytest.raises(SystemExit) as exit_:
            run(cli, ["train", *DEBUG, underscored, "-n"])
        assert not exit_.value.code


def test_size_and_channels_come_from_the_data(tmp_path, capsys):
    gray = write_archive(tmp_path / "gray.zip", side=28, channels=1)
    config = dry_run(capsys, "--data", gray)[0]
    assert config.preset == "small32"
    assert config.model.image_size == (28, 28)
    assert config.model.channels == 1
    assert len(config.model.stages) == 2


def unlabelled(path):
    with zipfile.ZipFile(write_archive(path / "b.zip")) as source, zipfile.ZipFile(path / "a.zip", "w") as dest:
        for name in source.namelist():
            content = source.read(name)
            if name == "dataset.json":
                content = json.dumps({"labels": json.loads(content)["labels"][3:]}).encode()
            dest.writestr(name, content)


def truncated(path):
    archive = write_archive(path / "a.zip")
    archive.write_bytes(archive.read_bytes()[:-100])


def large(path):
    write_archive(path / "a.zip", 2, side=128)


def fine(path):
    write_archive(path / "a.zip")


def more_classes(path):
    write_archive(path / "a.zip", classes=2)
    write_archive(path / "val.zip", classes=3)


MISTAKES = {
    "labels missing": (unlabelled, ["--cond"], "3 of 24 images have no label"),
    "truncated zip": (truncated, [], "a.zip cannot be read as a zip"),
    "another resolution": (fine, ["--resolution", 64], "--resolution 64x64, but the images are 16x16"),
    "no VAE": (large, [], "stabilityai/sd-vae-ft-ema"),
    "unknown preset": (fine, ["--preset", "cifar"], "known: small8"),
    "batch": (fine, [*DEBUG, "--batch-gpu", 3], "use --batch 9"),
    "heads": (fine, ["--num-heads", 3], "width 128 does not divide into 3 heads"),
    "negative": (fine, ["--lr", -1], "lr: -1.0 should be greater than 0"),
    "stages": (fine, ["--num-blocks", "1,1,1,1,1,1"], "6 stages halve 16x16"),
    "fp16": (fine, [*DEBUG, "--fp16"], "fp16 needs a CUDA device"),
    "resume": (fine, [*DEBUG, "--resume", "elsewhere"], "elsewhere: neither a training-state folder nor a run"),
    "init": (fine, [*DEBUG, "--init-from", __file__], "not a safetensors"),
    "two lengths": (fine, ["--kimg", 1, "--duration", 1], "give one"),
    "two precisions": (fine, ["--fp16", "--precision", "bf16"], "say different things"),
    "epochs": (fine, ["--kimg", 1, "--epochs", 1], "--kimg and --epochs say the same thing"),
    "classes of --val": (more_classes, [*DEBUG, "--cond", "--val", "val.zip"], "3 classes, the training images have 2"),
    "no data": (lambda path: None, [], "a.zip: no such file"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_any_work(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare, arguments, message = MISTAKES[mistake]
    prepare(tmp_path)
    with pytest.raises(UserError) as caught:
        diffit("train", "--data", tmp_path / "a.zip", "--outdir", tmp_path / "runs", *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "runs").exists()


def test_images_of_mixed_sizes_are_named(tmp_path):
    for name, side in (("a", 16), ("b", 8)):
        Image.new("RGB", (side, side)).save(tmp_path / f"{name}.png")
    with pytest.raises(UserError, match=r"b\.png' is 8x8 RGB but 'a\.png' is 16x16 RGB.*diffit data convert"):
        diffit("train", *DEBUG, "--data", tmp_path, "--outdir", tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_full_disk_is_named_and_leaves_no_half_files(pets, tmp_path, monkeypatch):
    def full(*arguments, **keywords):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffit.training.checkpoint.stream_tensors", full)
    with pytest.raises(UserError, match="the disk is full"):
        diffit("train", "--preset", "debug", "--data", pets, "--outdir", tmp_path, "--kimg", "0.008", "--grid", "1x1")
    (run_dir,) = tmp_path.iterdir()
    assert not [path for path in run_dir.iterdir() if path.name.startswith((".", "training-state"))]


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["train", "--kimgs", "3"], 2, "--kimg"),
        (["trian"], 2, "trian"),
        (["train", "--kimg", "many"], 2, "'many' is not a valid float"),
        (["train", "--preset", "nothing", "--dry-run"], 1, "unknown preset 'nothing'"),
        (["train", *DEBUG, "--grid", "00x3", "-n"], 2, "'00x3' is not a size"),
    ],
)
def test_exit_status_and_message(arguments, status, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(cli, arguments)
    error = capsys.readouterr().err
    assert exit_.value.code == status
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_failed_system_call_is_one_line(tmp_path, monkeypatch, capsys):
    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("diffit.data.files.os.scandir", forbidden)  # to the superuser nothing is unreadable
    with pytest.raises(SystemExit) as exit_:
        run(cli, ["train", *DEBUG, "--data", str(tmp_path), "--outdir", str(tmp_path / "runs")])
    assert exit_.value.code == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path} cannot be listed (Permission denied): check its permissions\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--resume", "nonsense"], ["--outdir", "a.zip"], ["--data", "nowhere"]])
def test_of_several_processes_one_tells_what_is_wrong(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    write_archive(tmp_path / "a.zip")
    base = ["train", *DEBUG, "--data", "a.zip", "--outdir", "runs"]
    done = command(*base, *arguments, processes=2, check=False)
    assert done.returncode
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1, done.stderr
    assert "[rank" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_error_of_another_process_than_the_first_is_told_alone(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import click\n"
        "from diffit.cli import run\n"
        "from diffit.errors import UserError\n"
        "from diffit.utils.distributed import processes\n"
        "@click.command()\n"
        "def main():\n"
        "    with processes() as procs:\n"
        "        if not procs.is_first:\n"
        "            raise UserError('only mine')\n"
        "        procs.barrier()\n"
        "run(main)\n"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launcher, str(script)], capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == ["error: only mine"]
    assert "[rank" not in done.stderr


def test_help_does_not_wait_for_torch():
    words = [sys.executable, "-X", "importtime", "-m", "diffit", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "Train a model" in done.stdout
    assert "torch.nn" not in done.stderr
