"""A folder of photographs to try diffit on: crops of the pictures that come with scikit-learn and scikit-image.

    python examples/photos.py --dest my-photos

Needs `pip install 'diffit-torch[demo]'`, and nothing from the network: all of these pictures are inside the packages.
"""

from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import skimage.data
from PIL import Image
from sklearn.datasets import load_sample_images

from diffit.cli import run
from diffit.errors import UserError

BUNDLED = ("astronaut", "chelsea", "coffee", "rocket")


def pictures() -> dict[str, npt.NDArray[np.uint8]]:
    """Photographs by name, each (H, W, 3)."""
    sample = load_sample_images()
    found = {Path(name).stem: image for name, image in zip(sample.filenames, sample.images, strict=True)}
    found |= {name: getattr(skimage.data, name)() for name in BUNDLED}
    return found | {"motorcycle": skimage.data.stereo_motorcycle()[0]}


@click.command()
@click.option("--dest", type=click.Path(path_type=Path), default="my-photos", show_default=True)
@click.option("--crops", type=click.IntRange(min=1), default=45, show_default=True, help="Of each of the 7 pictures.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of their places and sizes.")
def main(dest: Path, crops: int, seed: int) -> None:
    """Write square crops, each at least half as large as its picture, as JPEG files named after the picture."""
    if dest.exists() and any(dest.iterdir()):
        raise UserError(f"{dest}: not empty; name a new folder with --dest")
    dest.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    found = pictures()
    for name, picture in found.items():
        height, width = picture.shape[:2]
        for i in range(crops):
            side = int(rng.integers(min(height, width) // 2, min(height, width), endpoint=True))
            top, left = (int(rng.integers(0, full - side, endpoint=True)) for full in (height, width))
            crop = Image.fromarray(picture[top : top + side, left : left + side])
            crop.save(dest / f"{name}-{i:02d}.jpg", quality=92)
    click.echo(f"{dest}: {crops * len(found)} crops of {len(found)} photographs")


if __name__ == "__main__":
    run(main)
