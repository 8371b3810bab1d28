"""Whether a run begins better with the weights of another: ``python -m benchmarks.finetune [--kimg K]``.

Two networks are trained on crops of photographs: one of 32×32 RGB pixels, and a small latent model in NVIDIA's layout.
Then runs of another kind begin with each, and afresh: the mean loss of their first images, side by side.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.measure import machine
from helpers import write_vae

ROOT = Path(__file__).parents[1]

FIRST = 0.128  # kimg whose loss is compared
LATENT = ["--preset", "latent-debug", "--hidden-dim", "96", "--num-blocks", "4", "--batch", "16", "--lr", "1e-3"]


def diffit(*words: object) -> str:
    done = subprocess.run([sys.executable, "-m", "diffit", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return done.stdout + done.stderr


def archive(folder: Path, name: str, size: str, source: str = "classes", *options: str) -> Path:
    dest = folder / f"{name}.zip"
    diffit("data", "convert", "--source", folder / source, "--dest", dest, "--resolution", size,
           "--transform", "center-crop", *options)  # fmt: skip
    return dest


def train(folder: Path, name: str, data: Path, kimg: float, *options: object) -> tuple[float, Path, str]:
    """The loss at the first tick, the last snapshot, and the line about what was carried over."""
    said = diffit("train", "--data", data, "--outdir", folder / name, "--kimg", kimg, "--tick", FIRST,
                  "--grid", "2x2", "--lr-rampup-kimg", "0", *options)  # fmt: skip
    (run_dir,) = (folder / name).iterdir()
    loss = json.loads((run_dir / "stats.jsonl").read_text().splitlines()[0])["loss"]
    line = next((line for line in said.splitlines() if "carried over" in line), "")
    return loss, sorted(run_dir.glob("network-snapshot-*"))[-1], line.strip()


def compare(folder: Path, title: str, network: Path, data: Path, *options: object) -> None:
    name = title.replace(" ", "-")
    tuned, _, line = train(folder, f"{name}-tuned", data, FIRST, "--init-from", network, *options)
    fresh, _, _ = train(folder, f"{name}-fresh", data, FIRST, *options)
    print(f"{title}: loss of the first {1000 * FIRST:.0f} images {tuned:.3f} : {fresh:.3f} afresh; {line}", flush=True)


def write_classes(folder: Path, names: Sequence[str]) -> None:
    """The crops in a folder for each photograph; ``few`` has three of them."""
    for path in sorted((folder / "photos").iterdir()):
        name = path.name.partition("-")[0]
        for room in ("classes", "few") if name in names else ("classes",):
            (folder / room / name).mkdir(parents=True, exist_ok=True)
            (folder / room / name / path.name).write_bytes(path.read_bytes())


def image_models(folder: Path, kimg: float) -> None:
    rgb = archive(folder, "rgb", "32x32")
    loss, network, _ = train(folder, "rgb-run", rgb, kimg)
    print(f"32×32 RGB: loss {loss:.3f} at first", flush=True)
    compare(folder, "image model 32 to 64 pixels", network, archive(folder, "large", "64x64"))
    gray = archive(folder, "gray", "32x32", "classes", "--channels", "gray")
    compare(folder, "image model RGB to gray", network, gray)


def latent_models(folder: Path, kimg: float) -> None:
    vae = write_vae(folder / "vae")
    latents = {}
    for name, size, room in (("all", 256, "classes"), ("larger", 384, "classes"), ("few", 256, "few")):
        latents[name] = folder / f"latents-{name}"
        source = archive(folder, name, f"{size}x{size}", room)
        diffit("data", "encode", "--source", source, "--dest", latents[name], "--vae", vae)
    latent = [*LATENT, "--vae", vae]
    loss, snapshot, _ = train(folder, "latent-run", latents["all"], kimg, *latent, "--cond")
    print(f"latent model: loss {loss:.3f} at first", flush=True)
    official = folder / "official.safetensors"
    diffit("export", "--network", snapshot, "--to", "official", "--dest", official)
    compare(folder, "official layout, three classes", official, latents["few"], *latent, "--cond")
    compare(folder, "official layout, no classes", official, latents["all"], *latent)
    compare(folder, "official layout, 48-pixel latents", official, latents["larger"], *latent, "--cond")


FAMILIES = {"image": image_models, "latent": latent_models}


@click.command()
@click.option("--kimg", type=float, default=4.0, show_default=True, help="That the first networks are trained for.")
@click.option("--family", "families", type=click.Choice(list(FAMILIES)), multiple=True, default=list(FAMILIES))
def main(kimg: float, families: Sequence[str]) -> None:
    print(machine(), flush=True)
    with tempfile.TemporaryDirectory(prefix="diffit-finetune-") as place:
        folder = Path(place)
        subprocess.run([sys.executable, ROOT / "examples/photos.py", "--dest", folder / "photos"], check=True)
        write_classes(folder, ("chelsea", "coffee", "flower"))
        for family in families:
            FAMILIES[family](folder, kimg)


if __name__ == "__main__":
    main()
