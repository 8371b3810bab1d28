"""Each example runs as its first lines say, and does what it says there."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import solve_ivp

from helpers import command, run, write_archive

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str, *arguments: object, folder: Path) -> str:
    done = run(str(EXAMPLES / name), *arguments, folder=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_network_trained_with_a_loss_of_ones_own_is_sampled_by_a_sampler_of_ones_own(tmp_path):
    archive = write_archive(tmp_path / "pets.zip", 48)
    said = example("own_loss.py", "--data", archive, "--steps", 100, "--dest", "net.safetensors", folder=tmp_path)
    losses = [float(number) for number in re.findall(r"loss ([\d.]+)", said)]
    assert losses[1] < 0.8 < losses[0] < 0.9  # means over 50 steps; a network that does not learn stays at 0.95
    example("own_sampler.py", "--network", "net.safetensors", "--steps", 4, folder=tmp_path)
    assert min(Image.open(tmp_path / "own-sampler.png").size) >= 64
    command("sample", "--network", tmp_path / "net.safetensors", "--outdir", tmp_path / "samples", "--num-samples", 2)
    assert len(list((tmp_path / "samples").glob("*.png"))) == 2


def test_the_midpoint_method_is_of_second_order():
    spec = importlib.util.spec_from_file_location("own_sampler", EXAMPLES / "own_sampler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # Data of two points, −1 and 1: D(x; σ) = tanh(x/σ²). On a Gaussian the leading error would happen to cancel.
    top, end = 3.0, 0.5
    solution = solve_ivp(lambda t, x: (x - np.tanh(x / t**2)) / t, (top, end), [0.3 * top], rtol=1e-11, atol=1e-11)
    exact = solution.y[0, -1]
    start = torch.full((1,), 0.3, dtype=torch.float64)
    errors = []
    for steps in (80, 160, 320):
        sigmas = torch.linspace(top, end, steps + 1, dtype=torch.float64)
        x = module.midpoint(lambda x, sigma: (x / sigma**2).tanh(), start, sigmas)
        errors.append(abs(x.item() - exact))
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.1)


@pytest.mark.slow
def test_a_layer_alone_learns_and_serves_another_size(tmp_path):
    *_, last, other = re.findall(r"error ([\d.]+)", example("tmsa_alone.py", folder=tmp_path))
    assert float(last) < 0.05
    assert float(other) < 0.1


def test_the_photographs_come_out_of_the_packages(tmp_path):
    pytest.importorskip("skimage")
    pytest.importorskip("sklearn")
    assert "my-photos: 315 crops" in example("photos.py", "--dest", "my-photos", folder=tmp_path)
    files = sorted((tmp_path / "my-photos").iterdir())
    assert len(files) == 315
    assert {path.name.rsplit("-", 1)[0] for path in files} == {
        "astronaut", "chelsea", "china", "coffee", "flower", "motorcycle", "rocket",
    }  # fmt: skip
    with Image.open(files[0]) as first:
        assert first.format == "JPEG"
        assert first.mode == "RGB"
        assert first.width == first.height >= 150
