import os
import signal
import subprocess
import sys
import time
from functools import partial

import click
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from diffit.cli import cli, run
from diffit.errors import UserError
from diffit.utils.locks import exclusive
from helpers import write_archive


@pytest.fixture
def raw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        path = tmp_path / "raw" / ("cat" if i < 3 else "dog") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 8, 3), 20 * i, np.uint8)).save(path)
    (tmp_path / "raw" / "notes.txt").write_text("x")
    return tmp_path / "raw"


def invoke(command: str):
    return CliRunner().invoke(cli, command.split())


def test_convert_then_check_says_what_happened_and_what_to_do_next(raw, tmp_path):
    result = invoke("data convert --source raw --dest out.zip --resolution 4 --cond")
    assert result.exit_code == 0, result.output
    for part in (
        "raw: folder of class folders, 6 images",
        "1 files that are not images (1 .txt)",
        "6 images of 4x4 RGB",
        "2: cat, dog",
        "wrote      out.zip",
        "diffit data check out.zip --cond",
    ):
        assert part in result.output
    result = invoke("data check out.zip --cond")
    assert result.exit_code == 0, result.output
    for part in (
        "6 of 6 images, 2 classes",
        "0 cat: 3",
        "mean       50.00 50.00 50.00",
        "out-grid.png",
        "diffit train",
    ):
        assert part in result.output
    with Image.open(tmp_path / "out-grid.png") as grid:
        assert grid.size == (3 * 66 - 2, 2 * 66 - 2)


def test_the_folder_that_one_is_in_is_not_replaced(raw, tmp_path, monkeypatch):
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    result = invoke(f"data convert --source {raw} --dest .")
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == ".: the current folder, which would be replaced as a whole; name another place"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "raw"]


def test_the_picture_of_a_check_is_never_put_into_the_archive(raw, tmp_path, monkeypatch):
    assert invoke("data convert --source raw --dest archive").exit_code == 0
    monkeypatch.chdir(tmp_path / "archive" / "00000")
    for path in ("..", "../../archive"):
        assert invoke(f"data check {path}").exit_code == 0
    assert (tmp_path / "archive-grid.png").exists()
    assert not list((tmp_path / "archive").rglob("*grid*"))


def test_a_picture_that_cannot_be_written_keeps_no_finding_back(raw, tmp_path, monkeypatch):
    (raw / "cat" / "1.png").write_bytes(b"junk")

    def full(*_):
        raise UserError("raw-grid.png: not writable; choose another place")

    monkeypatch.setattr("diffit.cli.data.save_grid", full)
    result = invoke("data check raw")
    assert "grid       none: raw-grid.png: not writable" in result.output
    assert "problem" in result.output
    assert result.exit_code == 1
    assert isinstance(invoke("data check raw --grid mine.png").exception, UserError)


def test_of_two_conversions_at_once_the_second_is_told(raw, tmp_path, monkeypatch):
    monkeypatch.setattr("diffit.utils.locks.HEARTBEAT", 0.1)
    with exclusive(tmp_path / "out.zip", "", beside=True):
        result = invoke("data convert --source raw --dest out.zip")
    assert str(result.exception).startswith(f"out.zip: in use by process {os.getpid()} on ")
    assert isinstance(result.exception, UserError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["raw"]


def test_skipped_images_are_named_and_counted(raw):
    (raw / "cat" / "1.png").write_bytes(b"junk")
    result = invoke("data convert --source raw --dest out.zip --on-error skip")
    assert result.exit_code == 0
    assert "cat/1.png" in result.output
    assert "1 broken images in all" in result.output


def test_check_of_a_damaged_archive_names_the_file_and_fails(raw):
    (raw / "cat" / "1.png").write_bytes(b"junk")
    result = invoke("data check raw --grid sample.png")
    assert result.exit_code == 1
    assert "damaged    'cat/1.png'" in result.output
    assert "1 images cannot be used" in result.output
    assert (raw.parent / "sample.png").exists()
    invoke("data check raw --no-grid")
    assert not (raw.parent / "raw-grid.png").exists()


@pytest.mark.parametrize("size", ["32", "32x32", "48X32", "48,32"])
def test_resolution_is_width_by_height(raw, size):
    result = invoke(f"data convert --source raw --dest out.zip --resolution {size}")
    width, _, height = size.lower().replace(",", "x").partition("x")
    assert f"6 images of {width}x{height or width}" in result.output


@pytest.mark.parametrize("size", ["big", "32x", "-1", "3.5", "32x32x3"])
def test_a_resolution_that_is_no_size_is_a_usage_error(raw, size):
    result = invoke(f"data convert --source raw --dest out.zip --resolution={size}")
    assert result.exit_code == 2
    assert "is not a size" in result.output


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_conversion_that_is_stopped_leaves_nothing_behind(tmp_path, number, status):
    source = write_archive(tmp_path / "source.zip", 3000, side=32)
    (tmp_path / "out").mkdir()
    words = ["-m", "diffit", "data", "convert", "--source", source, "--dest", tmp_path / "out" / "a.zip"]
    # A shell that starts the tests in the background has its children ignore Ctrl-C.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([sys.executable, *map(str, words)], stderr=subprocess.PIPE, preexec_fn=heed)
    deadline = time.monotonic() + 60
    # The lock comes first; what is stopped in the very moment of taking it leaves it, and who comes next takes it over.
    while len(list((tmp_path / "out").iterdir())) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == status
    assert list((tmp_path / "out").iterdir()) == []


def test_printed_commands_can_be_typed_where_names_have_spaces(raw):
    result = CliRunner().invoke(cli, ["data", "convert", "--source", "raw", "--dest", "my photos.zip"])
    assert "next       diffit data check 'my photos.zip' --cond" in result.output
    result = CliRunner().invoke(cli, ["data", "check", "my photos.zip", "--no-grid"])
    assert "next       diffit train --outdir 'runs/my photos' --data 'my photos.zip' --cond" in result.output


def test_labels_that_no_one_asked_for_are_not_missed(raw):
    Image.new("RGB", (8, 6)).save(raw / "stray.png")
    result = invoke("data convert --source raw --dest out.zip")
    assert "raw: folder of images, 7 images" in result.output
    assert "classes    none" in result.output
    assert "label" not in result.output
    result = invoke("data convert --source raw --dest out.zip --cond --overwrite")
    assert "1 of 7 images have no label (stray.png)" in str(result.exception)


def test_kinds_of_images_that_are_not_read_are_counted_apart(raw):
    for name in ("a.CR2", "b.dng", "c.mov"):
        (raw / name).write_bytes(b"x")
    result = invoke("data convert --source raw --dest out.zip")
    assert "not read   2 RAW photographs (export them as TIFF or JPEG" in result.output
    assert "not read   1 videos (" in result.output
    assert "ignored    1 files that are not images (1 .txt)" in result.output


def test_what_was_done_to_the_pixels_is_said(raw):
    Image.fromarray(np.full((6, 8), 4000, np.uint16)).save(raw / "cat" / "0.png")
    Image.new("RGBA", (8, 6), (255, 255, 255, 0)).save(raw / "dog" / "3.png")
    result = invoke("data convert --source raw --dest out.zip --background 0,0,0")
    assert "note       1 images have 16 bits, and values up to 4000: 0 to 4095 became 0 to 255" in result.output
    assert "note       1 images are transparent: laid on black" in result.output
    result = invoke("data convert --source raw --dest out.zip --overwrite --range full")
    assert "16 bits" not in result.output


def test_a_warning_of_check_is_printed_and_is_no_failure(raw):
    for path in raw.rglob("*.png"):
        Image.new("RGB", (8, 6), (3, 4, 5)).save(path)
    result = invoke("data check raw --no-grid")
    assert result.exit_code == 0
    assert "warning    the images hardly differ from one gray: a standard deviation of 0" in result.output


@pytest.mark.slow
def test_an_output_that_lacks_letters_shows_question_marks_instead_of_a_traceback(tmp_path):
    """Windows, with ``> file``: names and minus signs that its encoding does not have."""
    for name in ("猫", "Łódź"):
        (tmp_path / "raw" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / "raw" / name / "a.png")

    def written(*words: object) -> tuple[int, str, str]:
        environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
        line = [sys.executable, "-m", "diffit", *map(str, words)]
        done = subprocess.run(line, env=environment, capture_output=True, timeout=120)
        return done.returncode, done.stdout.decode("cp1252"), done.stderr.decode("cp1252")

    status, out, err = written("data", "convert", "--source", tmp_path / "raw", "--dest", tmp_path / "out.zip")
    assert (status, err) == (0, "")
    assert "classes    2: ?ód?, ?" in out
    for name in ("sample", "train"):
        status, out, err = written(name, "--help")
        assert (status, err, out[:7]) == (0, "", "Usage: ")
    status, _, err = written("data", "check", "猫")
    assert (status, err.strip()) == (1, "error: ?: no such file or folder; check the spelling")


def test_a_user_error_is_one_line_without_traceback(raw, capsys):
    with pytest.raises(SystemExit) as stop:
        run(cli, ["data", "convert", "--source", "nowhere", "--dest", "out.zip"])
    assert stop.value.code == 1
    assert capsys.readouterr().err == "error: nowhere: no such file or folder; check the spelling\n"


@pytest.mark.parametrize(("cause", "status"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_a_complaint_while_tidying_up_after_an_interruption_is_no_error(capsys, cause, status):
    @click.command()
    def interrupted():
        try:
            raise cause
        finally:
            raise ValueError("Can't close the ZIP file while there is an open writing handle on it")

    with pytest.raises(SystemExit) as stop:
        run(interrupted, [])
    assert stop.value.code == status
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_number_that_no_header_can_hold_is_refused_in_one_line(capsys):
    """Found by `make faults`."""
    words = ["data", "encode", "--source", "pets.zip", "--dest", "latents", "--vae", "vae", "--shard-size", "9" * 30]
    with pytest.raises(SystemExit):
        run(cli, words)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: Invalid value for '--shard-size'")
