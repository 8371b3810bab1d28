"""Metrics: ``python -m benchmarks.metrics``.

Features a second against torch-fidelity's own loop, with random weights since only the time matters; and the distance
of 2,048 samples straight from the sampler against the way over PNG files.
"""

import tempfile
import warnings
from pathlib import Path
from unittest import mock

import torch

from benchmarks.measure import DEVICE, in_turns
from diffit.configs.presets import debug
from diffit.data.archive import ImageArchive
from diffit.metrics.detectors import make_detector
from diffit.metrics.evaluate import evaluate_images, evaluate_network
from diffit.metrics.features import gather
from diffit.metrics.frechet import FID
from diffit.metrics.images import ArchiveImages
from diffit.metrics.suite import Suite
from diffit.sampling import Model, PngFolder
from diffit.training.step import build_network
from diffit.utils.distributed import Processes

IMAGES, BATCH, SAMPLES = (2048, 64, 2048) if DEVICE.type == "cuda" else (16, 8, 2048)
ONE = Processes(0, 1, DEVICE)


def features(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch_fidelity import feature_extractor_inceptionv3 as theirs
        from torch_fidelity.utils import get_featuresdict_from_dataset
    network, outputs = theirs.FeatureExtractorInceptionV3, ["2048", "logits_unbiased"]
    with (
        mock.patch.object(theirs, "load_state_dict_from_url", return_value={}),
        mock.patch.object(network, "load_state_dict"),
    ):
        net = network("random", outputs).to(DEVICE)
    torch.save(net.state_dict(), folder / "random.pth")
    detector = make_detector(f"inception:{folder / 'random.pth'}", ONE)
    images = torch.randint(256, (IMAGES, 3, 32, 32), dtype=torch.uint8)
    need = FID(IMAGES).need

    def ours() -> None:
        batches = ((torch.arange(i, i + BATCH), images[i : i + BATCH]) for i in range(0, IMAGES, BATCH))
        gather({detector: [need]}, batches, ONE)

    class Rows(torch.utils.data.Dataset[torch.Tensor]):
        def __len__(self) -> int:
            return IMAGES

        def __getitem__(self, index: int) -> torch.Tensor:
            return images[index]

    def torch_fidelity() -> None:
        get_featuresdict_from_dataset(Rows(), net, BATCH, DEVICE.type == "cuda", True, False)

    a, b = in_turns(ours, torch_fidelity, rounds=3)
    print(
        f"Inception features of {IMAGES} images, batch {BATCH}, with the sums for FID: {b / a:.2f} times as many a "
        f"second as torch-fidelity's loop ({IMAGES / a:.1f} : {IMAGES / b:.1f} images a second)",
        flush=True,
    )


def samples(folder: Path) -> None:
    config = debug()
    net = build_network(config).to(DEVICE).eval()
    real = folder / "real"
    model = Model(net, config)
    model.save(PngFolder(real), range(10**6, 10**6 + SAMPLES), batch=BATCH)
    suite = Suite([f"fd{SAMPLES}_full:pixels"], real, (3, 16, 16), ONE, batch=BATCH)
    found: dict[str, float] = {}

    def direct() -> None:
        found["direct"] = evaluate_network(suite, model, batch=BATCH)[0]["results"]["fd"]

    def by_files() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            model.save(PngFolder(name), range(SAMPLES), batch=BATCH)
            images = ArchiveImages(ImageArchive(name))
            found["files"] = evaluate_images(suite, images, batch=BATCH)[0]["results"]["fd"]

    a, b = in_turns(direct, by_files, rounds=1)
    print(
        f"distance of {SAMPLES} samples, debug preset, pixels: straight from the sampler in {a / b:.2f} of the time "
        f"that PNG files take ({a:.1f} s : {b:.1f} s); {abs(found['direct'] / found['files'] - 1):.0e} apart",
        flush=True,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name, mock.patch.dict("os.environ", DIFFIT_CACHE=name):
        features(Path(name))
        samples(Path(name))


if __name__ == "__main__":
    main()
