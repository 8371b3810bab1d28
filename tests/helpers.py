"""What several test files need: a small archive, and the command line as a user runs it."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image


def write_archive(path: Path, count: int = 24, *, side: int = 16, channels: int = 3, classes: int = 3) -> Path:
    """A zip laid out as EDM's tool lays it out: smooth pictures whose colour tells the class."""
    rng = np.random.default_rng(count + side)
    y, x = np.mgrid[:side, :side] / side
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(count):
            label = i % classes
            phase = rng.uniform(0, 2 * np.pi, size=channels)
            waves = [np.sin(2 * np.pi * ((label + 1) * x + y) + p) for p in phase]
            pixels = np.round(127.5 + 120 * np.stack(waves, axis=-1)).astype(np.uint8)
            encoded = io.BytesIO()
            Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(encoded, "PNG")
            name = f"00000/img{i:08d}.png"
            archive.writestr(name, encoded.getvalue())
            labels.append([name, label])
        archive.writestr("dataset.json", json.dumps({"labels": labels, "class_names": ["ant", "bee", "cat"][:classes]}))
    return path


def command(
    *arguments: object, processes: int = 1, check: bool = True, **environment: str
) -> subprocess.CompletedProcess:
    """Run ``diffit …``, under torchrun when there are several processes, with one thread each so that runs compare."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    done = subprocess.run(
        [*launcher, "diffit", *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        timeout=240,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def write_vae(path: Path, *, latent_channels: int = 4, seed: int = 0) -> Path:
    """A folder as diffusers saves it: a tiny VAE of random weights, 8 x 8 pixels a latent position."""
    import torch
    from diffusers import AutoencoderKL

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 16, 16, 16),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=latent_channels,
            norm_num_groups=4,
            sample_size=32,
        )
    vae.save_pretrained(path)
    return path


def run_processes(code: str, folder: Path, processes: int = 2) -> str:
    """Run Python text under torchrun and return what it printed; an exception in any process fails the test."""
    script = folder / "script.py"
    script.write_text(code)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [sys.executable, *launcher, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
