"""Where samples go: what an interrupted run leaves is taken up, and what other settings left is not."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from diffit.configs.presets import get_preset
from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.models.image import ImageDiffiT
from diffit.models.latent import LatentDiffiT
from diffit.sampling.generate import draw, generate_class_grid, generate_to_disk
from diffit.sampling.outputs import fingerprint
from diffit.utils.distributed import Processes
from diffit.utils.images import to_uint8

ONE = Processes(0, 1, torch.device("cpu"))
SEEDS = [3, 1, 4, 15, 9, 2, 6]


def tiny(classes: int = 3, **sampling) -> tuple[ImageDiffiT, Config]:
    config = get_preset("debug")
    changes = {
        "model": config.model.model_copy(update={"num_classes": classes, "image_size": (8, 8)}),
        "sampling": config.sampling.model_copy(update={"steps": 2} | sampling),
    }
    torch.manual_seed(0)
    config = config.model_copy(update=changes)
    net = ImageDiffiT.from_config(config.model).eval()
    torch.nn.init.normal_(net.head.weight, std=0.1)
    return net, config


class Counting:
    """A network that counts the images that it is given, and stops the program at one of its calls."""

    def __init__(self, net: ImageDiffiT, stop_at: int | None = None) -> None:
        self.count, self.calls = 0, 0

        def count(_, arguments):
            self.calls += 1
            if self.calls == stop_at:
                raise KeyboardInterrupt
            self.count += len(arguments[0])

        self.handle = net.register_forward_pre_hook(count)


CALLS = 3  # of the network for a batch in two steps of Heun


def write(outdir: Path, net, config, *, stop_at: int | None = None, seeds=SEEDS, **how) -> int:
    """Sample to disk in batches of two, perhaps up to an interruption; how many images were drawn."""
    counting = Counting(net, stop_at)
    try:
        generate_to_disk(net, config, seeds, outdir, ONE, batch=2, **how)
    except KeyboardInterrupt:
        assert stop_at is not None
    finally:
        counting.handle.remove()
    return counting.count // CALLS


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "samples_7x8x8x3.npz") as file:
        return dict(file)


def test_png_files_are_the_images_of_their_seeds(tmp_path):
    net, config = tiny()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    assert write(tmp_path, net, config, labels=labels) == 7
    expected = to_uint8(draw(net, config, SEEDS, labels), config.sampling.rounding)
    for seed, image in zip(SEEDS, expected, strict=True):
        found = np.array(Image.open(tmp_path / f"{seed:06d}.png")).transpose(2, 0, 1).astype(int)
        assert np.abs(found - image.numpy()).max() <= 1
    listed = dict(json.loads((tmp_path / "dataset.json").read_text())["labels"])
    assert listed == {f"{seed:06d}.png": label for seed, label in zip(SEEDS, labels.tolist(), strict=True)}


@pytest.mark.parametrize("how", [{}, {"npz": True}, {"subdirs": True}, {"grid": (2, 2)}], ids=str)
def test_an_interrupted_run_goes_on_and_ends_in_the_same_files(tmp_path, how):
    net, config = tiny()
    write(tmp_path / "whole", net, config, **how)
    stopped = write(tmp_path / "parts", net, config, stop_at=2 * CALLS + 2, **how)
    assert stopped == 4
    assert not (tmp_path / "parts/dataset.json").exists()
    assert not (tmp_path / "parts/samples_7x8x8x3.npz").exists()
    assert write(tmp_path / "parts", net, config, **how) == 3
    assert content(tmp_path / "parts").keys() == content(tmp_path / "whole").keys()
    assert not any(name.startswith(".") for name in content(tmp_path / "parts"))
    if how == {"npz": True}:
        whole, parts = arrays(tmp_path / "whole"), arrays(tmp_path / "parts")
        assert all((whole[key] == parts[key]).all() for key in ("arr_0", "arr_1"))
    else:
        assert content(tmp_path / "parts") == content(tmp_path / "whole")


def test_a_finished_folder_is_not_drawn_again(tmp_path):
    net, config = tiny()
    write(tmp_path, net, config)
    before = content(tmp_path)
    assert write(tmp_path, net, config) == 0
    assert content(tmp_path) == before


def test_an_image_that_was_removed_is_drawn_again(tmp_path):
    net, config = tiny()
    write(tmp_path, net, config)
    before = content(tmp_path)
    (tmp_path / "000004.png").unlink()
    assert write(tmp_path, net, config) == 2
    assert content(tmp_path) == before


class Vae:
    """What the record needs of an autoencoder, and a decoder."""

    def __init__(self, sha256: str) -> None:
        self.sha256 = sha256

    def decode(self, z: Tensor) -> Tensor:
        return z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)


def other_sampling(net, config):
    return net, config.model_copy(update={"sampling": config.sampling.model_copy(update={"steps": 3})}), {}


def other_labels(net, config):
    return net, config, {"labels": torch.tensor([2] * 7)}


def other_weights(net, config):
    net.head.bias.data += 0.3
    return net, config, {}


def other_precision(net, config):
    return net, config, {"precision": "bf16"}


@pytest.mark.parametrize("npz", [False, True])
@pytest.mark.parametrize("change", [other_sampling, other_labels, other_weights, other_precision])
def test_with_other_settings_it_begins_anew(tmp_path, change, npz):
    net, config = tiny()
    how = {"npz": npz}
    write(tmp_path / "mixed", net, config, labels=torch.zeros(7, dtype=torch.int64), stop_at=2 * CALLS + 2, **how)
    net, config, changed = change(net, config)
    how |= {"labels": torch.zeros(7, dtype=torch.int64)} | changed
    write(tmp_path / "mixed", net, config, **how)
    write(tmp_path / "fresh", net, config, **how)
    if npz:
        mixed, fresh = (arrays(tmp_path / name) for name in ("mixed", "fresh"))
        assert all((mixed[key] == fresh[key]).all() for key in ("arr_0", "arr_1"))
    else:
        assert content(tmp_path / "mixed") == content(tmp_path / "fresh")


def test_images_of_another_vae_are_not_taken_for_finished(tmp_path):
    config = get_preset("latent-debug")
    torch.manual_seed(0)
    net = LatentDiffiT.from_config(config.model).eval()
    counting = Counting(net)
    for sha256, images in (("a", 3), ("a", 3), ("b", 6)):
        generate_to_disk(net, config, [0, 1, 2], tmp_path, ONE, autoencoder=Vae(sha256))
        assert counting.count == images * config.sampling.steps


def test_networks_are_told_apart_by_any_tensor():
    net, _ = tiny()
    seen = {fingerprint(net)}
    assert fingerprint(net) in seen
    for parameter in net.parameters():
        parameter.data.flatten()[:1].add_(0.01)
        seen.add(fingerprint(net))
    assert len(seen) == 1 + len(list(net.parameters()))


def test_npz_of_an_unconditional_model_has_no_labels(tmp_path):
    net, config = tiny(classes=0)
    write(tmp_path, net, config, npz=True)
    found = arrays(tmp_path)
    assert found.keys() == {"arr_0"}
    assert found["arr_0"].dtype == np.uint8


def test_npz_is_what_adm_reads_and_nothing_else_is_left(tmp_path):
    net, config = tiny()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    write(tmp_path, net, config, npz=True, labels=labels)
    found = arrays(tmp_path)
    assert found["arr_0"].shape == (7, 8, 8, 3)
    assert found["arr_1"].dtype == np.int64
    assert found["arr_1"].tolist() == labels.tolist()
    expected = to_uint8(draw(net, config, SEEDS, labels)).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(found["arr_0"] - expected).max() <= 1
    assert sorted(content(tmp_path)) == ["samples.json", "samples_7x8x8x3.npz"]


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_met_before_the_first_sample_and_leaves_nothing(tmp_path, monkeypatch):
    net, config = tiny()
    monkeypatch.setattr(os, "posix_fallocate", full)
    counting = Counting(net)
    with pytest.raises(UserError, match="the disk is full"):
        generate_to_disk(net, config, SEEDS, tmp_path, ONE, npz=True)
    assert counting.calls == 0
    assert content(tmp_path) == {}


def test_a_disk_that_fills_up_while_packing_keeps_the_samples_for_another_try(tmp_path, monkeypatch):
    net, config = tiny()
    with monkeypatch.context() as patch:
        patch.setattr("diffit.sampling.outputs.zipfile.ZipFile.write", full)
        with pytest.raises(UserError, match="the disk is full"):
            write(tmp_path, net, config, npz=True)
    assert not any(name.endswith((".npz", ".part")) for name in content(tmp_path))
    assert write(tmp_path, net, config, npz=True) == 0
    write(tmp_path / "fresh", net, config, npz=True)
    assert (arrays(tmp_path)["arr_0"] == arrays(tmp_path / "fresh")["arr_0"]).all()


def test_a_disk_that_fills_up_between_png_files_leaves_whole_files_only(tmp_path, monkeypatch):
    net, config = tiny()
    written = []

    def save(self, path, kind):
        if len(written) == 3:
            path.write_bytes(b"half")
            full()
        written.append(path)
        path.write_bytes(b"image")

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(UserError, match="the disk is full"):
        write(tmp_path, net, config)
    assert sorted(set(content(tmp_path)) - {"samples.json"}) == ["000001.png", "000003.png", "000004.png"]


@pytest.mark.parametrize("npz", [False, True])
def test_the_same_command_after_the_end_draws_nothing_however_the_network_is_spelled(tmp_path, npz):
    net, config = tiny()
    assert write(tmp_path, net, config, npz=npz, source="net.safetensors", grid=(2, 2)) == 7
    before = content(tmp_path)
    assert write(tmp_path, net, config, npz=npz, source="./net.safetensors", grid=(2, 2)) == 0
    assert content(tmp_path) == before
    assert write(tmp_path, net, config, npz=npz, labels=torch.zeros(7, dtype=torch.int64)) == 7


def test_images_of_other_settings_do_not_stay_among_the_new_ones(tmp_path):
    net, config = tiny()
    write(tmp_path, net, config)
    (tmp_path / "holiday.png").write_bytes(b"not ours")
    write(tmp_path, net, tiny(steps=1)[1], seeds=[3, 1])
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["000001.png", "000003.png", "holiday.png"]


def test_a_class_grid_of_thousands_is_refused(tmp_path):
    net, config = tiny(classes=1000)
    with pytest.raises(UserError, match=r"1000 classes × 7 seeds are 7000 images.*fewer --seeds"):
        generate_class_grid(net, config, SEEDS, tmp_path / "out", ONE)
    assert not (tmp_path / "out").exists()
