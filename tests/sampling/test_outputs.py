"""Where samples go: what an interrupted run leaves is taken up, and what other settings left is not."""

import errno
import json
import os
import re
import subprocess
import sys
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
from diffit.sampling import Model, NpzFile, PngFolder
from diffit.sampling.outputs import fingerprint
from diffit.utils.distributed import Processes
from diffit.utils.files import whole_file
from diffit.utils.images import to_uint8
from helpers import run_processes

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


def save(outdir: Path, net, config, seeds, *, npz=False, subdirs=False, precision="fp32", vae=None, **how):
    output = NpzFile(outdir) if npz else PngFolder(outdir, subdirs=subdirs)
    return Model(net, config, vae, precision).save(output, seeds, **how)


def write(outdir: Path, net, config, *, stop_at: int | None = None, seeds=SEEDS, **how) -> int:
    """Sample to disk in batches of two, perhaps up to an interruption; how many images were sampled."""
    counting = Counting(net, stop_at)
    try:
        save(outdir, net, config, seeds, batch=2, **how)
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
    expected = to_uint8(Model(net, config).sample(SEEDS, labels), config.sampling.rounding)
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
    assert not (tmp_path / "parts/.lock").exists()
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


@pytest.mark.parametrize("npz", [False, True])
def test_of_two_at_once_the_second_is_told_and_the_first_ends_as_if_alone(tmp_path, npz, monkeypatch):
    monkeypatch.setattr("diffit.utils.locks.HEARTBEAT", 0.1)
    net, config = tiny()
    write(tmp_path / "alone", net, config, npz=npz)
    second = ImageDiffiT.from_config(config.model).eval()
    told = []

    def start_another(*_):
        if not told:
            with pytest.raises(UserError) as caught:
                save(tmp_path / "both", second, config, SEEDS, npz=npz)
            told.append(str(caught.value))

    net.register_forward_pre_hook(start_another)
    write(tmp_path / "both", net, config, npz=npz)
    assert f"both: in use by process {os.getpid()} on " in told[0]
    assert told[0].endswith("wait for it, or use another --outdir")
    assert content(tmp_path / "both").keys() == content(tmp_path / "alone").keys()
    if npz:
        assert (arrays(tmp_path / "both")["arr_0"] == arrays(tmp_path / "alone")["arr_0"]).all()
    else:
        assert content(tmp_path / "both") == content(tmp_path / "alone")


def test_what_a_killed_command_left_half_written_is_removed(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    with whole_file(tmp_path / "000004.png") as part:
        name = part.name.replace(str(os.getpid()), str(dead.pid))
    (tmp_path / "000004.png").unlink()
    for folder in (tmp_path, tmp_path / "000000"):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"half")
    net, config = tiny()
    write(tmp_path, net, config, subdirs=True)
    assert not [found for found in content(tmp_path) if name in found]


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
@pytest.mark.parametrize(
    ("change", "said"),
    [(other_sampling, "sampling"), (other_labels, "seeds or classes"), (other_weights, "network"),
     (other_precision, "precision")],
)  # fmt: skip
def test_samples_of_other_settings_are_neither_deleted_nor_mixed(tmp_path, change, said, npz):
    net, config = tiny()
    how = {"npz": npz, "labels": torch.zeros(7, dtype=torch.int64)}
    write(tmp_path, net, config, stop_at=2 * CALLS + 2, **how)
    before = content(tmp_path)
    net, config, changed = change(net, config)
    with pytest.raises(UserError, match=rf"other settings \({said}\); give another --outdir"):
        write(tmp_path, net, config, **how | changed)
    assert content(tmp_path) == before


def test_samples_without_a_record_are_left_alone(tmp_path):
    net, config = tiny()
    (tmp_path / "000003.png").write_bytes(b"someone's")
    with pytest.raises(UserError, match=r"holds 000003\.png, and no samples\.json"):
        write(tmp_path, net, config)
    assert content(tmp_path) == {"000003.png": b"someone's"}


def test_records_of_before_the_spacing_had_a_name_are_known(tmp_path):
    net, config = tiny()
    write(tmp_path, net, config)
    record = json.loads((tmp_path / "samples.json").read_text())
    del record["sampling"]["spacing"]
    (tmp_path / "samples.json").write_text(json.dumps(record))
    assert write(tmp_path, net, config) == 0


def test_half_a_file_is_not_taken_for_a_sample(tmp_path):
    net, config = tiny()
    write(tmp_path, net, config)
    before = content(tmp_path)
    for name, data in (("000004.png", b""), ("000015.png", before["000015.png"][:-20])):
        (tmp_path / name).write_bytes(data)
    assert write(tmp_path, net, config) == 2
    assert content(tmp_path) == before


def test_images_of_another_vae_are_not_taken_for_finished(tmp_path):
    config = get_preset("latent-debug")
    torch.manual_seed(0)
    net = LatentDiffiT.from_config(config.model).eval()
    counting = Counting(net)
    for sha256, images in (("a", 3), ("a", 3), ("b", 6)):
        save(tmp_path / sha256, net, config, [0, 1, 2], vae=Vae(sha256))
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
    expected = to_uint8(Model(net, config).sample(SEEDS, labels)).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(found["arr_0"] - expected).max() <= 1
    assert sorted(content(tmp_path)) == ["samples.json", "samples_7x8x8x3.npz"]


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_met_before_the_first_sample_and_leaves_nothing(tmp_path, monkeypatch):
    net, config = tiny()
    monkeypatch.setattr(os, "posix_fallocate", full)
    counting = Counting(net)
    with pytest.raises(UserError, match="the disk is full"):
        save(tmp_path, net, config, SEEDS, npz=True)
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

    def save(self, path, kind, **_):
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


def test_a_class_grid_of_thousands_is_refused(tmp_path):
    net, config = tiny(classes=1000)
    with pytest.raises(UserError, match=r"1000 classes × 7 seeds are 7000 images.*fewer --seeds"):
        Model(net, config).save_class_grid(tmp_path / "out", SEEDS, range(1000), procs=ONE)
    assert content(tmp_path) == {}


APART = """
from pathlib import Path
from diffit.errors import UserError
from diffit.sampling import outputs
from diffit.utils import distributed
from diffit.utils.distributed import processes
distributed.SEEN_WITHIN = 0.3
with processes() as procs:
    with outputs.own_folder(Path("together"), procs):
        procs.barrier()
    try:
        with outputs.own_folder(Path(f"disk{procs.rank}"), procs):
            pass
    except UserError as error:
        print(f"<{error}>")
    procs.barrier()
    if procs.is_first:
        print([path.name for path in (*Path("together").iterdir(), *Path("disk0").iterdir())])
"""


@pytest.mark.slow
def test_processes_that_do_not_see_the_same_folder_are_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run_processes(APART, tmp_path)
    assert said.count("does not see what process 0 writes there; use a folder as --outdir that all nodes share") == 2
    assert "[]" in said


OTHER_WEIGHTS = """
import torch
from diffit.errors import UserError
from diffit.sampling.outputs import fingerprint
from diffit.utils.distributed import processes
with processes() as procs:
    for value in (1.0, float(procs.rank)):
        net = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(net.weight, value)
        torch.nn.init.zeros_(net.bias)
        try:
            procs.require_same(fingerprint(net), "runs/mine", "weights", "name one file")
            print("<the same>")
        except UserError as error:
            print(f"<{error}>")
"""


def test_processes_that_have_read_other_weights_are_told(tmp_path):
    said = re.findall("<(.*?)>", run_processes(OTHER_WEIGHTS, tmp_path))
    assert said.count("the same") == 2
    others = [line for line in said if line != "the same"]
    assert len(others) == 2
    assert all("has other weights there than process 0; name one file" in line for line in others)
