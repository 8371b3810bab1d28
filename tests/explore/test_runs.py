"""A run as the page shows it, from a folder that something else writes; and what a request takes of the memory."""

import json
import os
import time

import pytest
import torch
from PIL import Image

from diffit.configs.presets import get_preset
from diffit.errors import UserError
from diffit.explore import compare_runs, read_run
from diffit.explore.pictures import difference, heat, numbers_of_difference, overlay, picture, window_grid
from diffit.sampling.cost import sampling_bytes


def write(run, *lines, config=True):
    run.mkdir(exist_ok=True)
    if config:
        (run / "training_options.json").write_text(get_preset("debug").model_dump_json())
    (run / "stats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"images": 30')
    (run / "log.txt").write_text("".join(f"line {i}\n" for i in range(1000)) + "\x1b[31mred")
    return run


LINES = (
    {"images": 10, "loss": 0.9, "loss_sigma_0_0.11": 0.5, "img_per_sec": 5.0, "sec": 2.0, "skipped_steps": 0},
    {"images": 20, "loss": None, "loss_sigma_0.11_inf": 0.7, "img_per_sec": 6.0, "sec": 2.0, "skipped_steps": 3},
)


def test_a_run_that_is_being_written_is_read_as_far_as_it_goes(tmp_path):
    run = write(tmp_path / "00000-a", *LINES)
    Image.new("L", (4, 4)).save(run / "fakes000001.png")
    Image.new("L", (4, 4)).save(run / "fakes_init.png")
    Image.new("L", (4, 4)).save(run / "fakes000001-raw.png")
    view = read_run(run)
    assert view.kimg == 0.02
    assert view.series("loss", "img_per_sec") == [
        (0.01, "loss", 0.9),
        (0.01, "img_per_sec", 5.0),
        (0.02, "img_per_sec", 6.0),
    ]
    assert view.by_level() == ["loss_sigma_0_0.11", "loss_sigma_0.11_inf"]
    assert list(view.grids) == [0.0, 1.0]
    assert len(view.log) == 40
    assert view.log[-1] == "\\x1b[31mred"
    health = "\n".join(view.health())
    assert "0.02 kimg" in health
    assert "not finite" in health
    assert "3 steps were skipped" in health
    assert "6 img/s" in health
    assert view.resume().startswith("#")  # nothing was saved yet


@pytest.mark.parametrize(
    ("images", "chosen", "expected"),
    [(20, (), ""), (40, (), " --kimg 0.08"), (40, ("kimg",), " --minutes 30")],
)
def test_the_command_that_goes_on_with_a_finished_run_makes_it_longer(tmp_path, images, chosen, expected):
    run = write(tmp_path / "00000-a", *LINES[:1], {"images": images, "sec": 2.0})
    (run / "training-state-000000.020").mkdir()
    config = get_preset("debug")
    training = config.training.model_copy(update={"kimg": 0.04, "minutes": 10.0, "chosen": chosen})
    (run / "training_options.json").write_text(config.model_copy(update={"training": training}).model_dump_json())
    assert read_run(run).resume().endswith(f"--resume {run}{expected}")


def test_how_far_a_run_by_the_clock_is_is_said_of_the_length_that_is_expected(tmp_path):
    run = write(tmp_path / "00000-a", {"images": 20, "sec": 2.0})
    config = get_preset("debug")
    training = config.training.model_copy(update={"kimg": 0.16, "minutes": 10.0, "chosen": ("kimg",)})
    (run / "training_options.json").write_text(config.model_copy(update={"training": training}).model_dump_json())
    assert read_run(run).health()[0].startswith("0.02 kimg (50% of 0.04), ")


def test_a_run_that_stands_still_is_said(tmp_path):
    run = write(tmp_path / "00000-a", *LINES)
    old = time.time() - 3600
    os.utime(run / "stats.jsonl", (old, old))
    assert "nothing new for 1 h 0 min" in "\n".join(read_run(run).health())


def test_runs_are_compared_by_settings_and_one_that_goes_is_left_out(tmp_path):
    paths = {"a": write(tmp_path / "a", *LINES), "b": write(tmp_path / "b", config=False), "gone": tmp_path / "gone"}
    header, rows = compare_runs(paths, ["training.lr", "model.nothing", "training.__class__"])
    assert header[-3:] == ["training.lr", "model.nothing", "training.__class__"]
    assert rows[0][:4] == ["a", "debug", 0.02, None]
    assert rows[0][-3:] == [get_preset("debug").training.lr, None, None]
    assert rows[1][0] == "b"
    assert len(rows) == 2
    with pytest.raises(UserError, match="gone"):
        read_run(tmp_path / "gone")


@pytest.mark.parametrize("preset", ["debug", "latent-debug", "digits", "small32"])
def test_memory_grows_with_the_images_and_covers_every_map_of_the_network(preset):
    """At least the largest map; of toys, whose tables are larger than their maps, an order of magnitude above all."""
    config = get_preset(preset)
    from diffit.models import build
    from diffit.models.cost import example_inputs

    sizes = []
    with torch.device("meta"):
        net = build(config.model).eval()
        for module in net.modules():
            module.register_forward_hook(
                lambda _, __, out: sizes.append(out.nbytes) if isinstance(out, torch.Tensor) else None
            )
        net(*example_inputs(config.model, 1))
    one = sampling_bytes(config, 1)
    assert max(sizes) < one < 16 * sum(sizes)
    assert sampling_bytes(config, 8) == 8 * one


def test_pictures_show_what_they_are_of():
    values = torch.tensor([[0.0, 1.0], [0.5, 0.25]])
    map_ = heat(values, side=4)
    assert map_.size == (4, 4)
    lightness = map_.convert("L")
    order = sorted(range(4), key=lambda i: lightness.getpixel((2 * (i % 2), 2 * (i // 2))))
    assert order == [0, 3, 2, 1]
    image = torch.full((3, 8, 8), -1.0)
    assert picture(image, 32).size == (32, 32)
    assert overlay(image, torch.eye(4), (0.9, 0.1), 32).getpixel((0, 31)) == (0, 255, 120)
    lines = window_grid(picture(image, 32), (8, 8), (4, 4))
    assert {lines.getpixel((16, y)) for y in range(32)} == {(0, 200, 255)}
    assert lines.getpixel((8, 8)) == (0, 0, 0)


def test_a_difference_is_gray_where_nothing_differs():
    a, b = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2)
    b[..., 0] = 1
    assert difference(a, b).flatten().tolist() == [0.5, 0, 0.5, 0]
    numbers = numbers_of_difference(a, b)
    assert numbers["mean |difference| (levels)"] == pytest.approx(63.5, abs=0.5)
    assert numbers["PSNR (dB)"] == pytest.approx(9.03, abs=0.1)  # 10 log10(255² / (127.5² / 2))
    assert numbers_of_difference(a, a)["PSNR (dB)"] == float("inf")
