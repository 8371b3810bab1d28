"""What is found, what is refused, and that nothing is executed from a file."""

import pickle
import shutil

import pytest
import torch
from click.testing import CliRunner
from torch.testing import assert_close

from diffit.cli import cli
from diffit.data.archive import ImageArchive
from diffit.errors import UserError
from diffit.metrics import inception
from diffit.metrics.classifier import train_classifier
from diffit.metrics.detectors import make_detector
from diffit.metrics.script import Script
from diffit.utils.distributed import Processes
from helpers import write_archive

ONE = Processes(0, 1, torch.device("cpu"))


class Trap:
    """A pickle that would leave a file behind when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def images(n=4, channels=3, side=8):
    return torch.randint(256, (n, channels, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def test_pixels_are_the_pixels_and_not_for_large_images():
    x = images()
    assert_close(make_detector("pixels", ONE)(x)["pool"], x.flatten(1) / 255)
    with pytest.raises(UserError, match="12288 values an image"):
        make_detector("pixels", ONE)(images(1, 3, 64))


def test_a_torchscript_file_is_a_detector_named_after_it(torchscript, monkeypatch):
    detector = make_detector(str(torchscript), ONE, allow_scripts=True)
    x = images()
    monkeypatch.chdir(torchscript.parent)
    assert make_detector(f"./{torchscript.name}", ONE, allow_scripts=True).key == detector.key
    assert detector.name == f"filters-{detector.key[:8]}"
    assert_close(detector(x)["pool"], torch.jit.load(str(torchscript))(x))
    with pytest.raises(UserError, match=r"filters\.pt: fails on uint8 images \(4, 1, 8, 8\)"):
        detector(images(channels=1))


@pytest.mark.slow
def test_a_trained_detector_tells_the_classes_apart(tmp_path):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip", 300), cond=True)
    path = tmp_path / "pets.safetensors"
    accuracy = train_classifier(archive, path, epochs=6)
    assert accuracy > 0.9
    assert train_classifier(archive, tmp_path / "again.safetensors", epochs=6) == accuracy
    detector = make_detector(str(path), ONE)
    outputs = detector(archive.load_all())
    assert outputs["pool"].shape == (300, 128)
    assert (outputs["probabilities"].argmax(1) == archive.labels).double().mean() > 0.9
    with pytest.raises(UserError, match="for 3 channels, the images have 1"):
        detector(images(channels=1))


def test_a_detector_needs_labels(tmp_path):
    with pytest.raises(UserError, match="labels of at least two classes"):
        train_classifier(ImageArchive(write_archive(tmp_path / "a.zip")), tmp_path / "d.safetensors")
    assert not (tmp_path / "d.safetensors").exists()


@pytest.fixture
def published(inception_weights, tmp_path, monkeypatch):
    """The random weights as if they were the official ones, to be fetched from a file."""
    monkeypatch.setattr(inception, "SHA256", inception.sha256_of(inception_weights))
    monkeypatch.setattr(inception, "URL", inception_weights.as_uri())
    return inception_weights


def test_weights_come_from_the_variable_or_the_cache_or_a_download(published, tmp_path, monkeypatch):
    hub = tmp_path / "hub"
    monkeypatch.setenv("TORCH_HOME", str(hub))
    monkeypatch.setenv("DIFFIT_INCEPTION", str(published))
    assert inception.find_weights() == published
    assert not hub.exists()
    monkeypatch.delenv("DIFFIT_INCEPTION")
    cached = inception.find_weights()
    assert cached == hub / "hub/checkpoints" / inception.FILE_NAME
    assert cached.read_bytes() == published.read_bytes()
    monkeypatch.setattr(inception, "URL", "http://127.0.0.1:9/never")
    assert inception.find_weights() == cached


def test_weights_that_are_nowhere_are_named_with_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "URL", "http://127.0.0.1:9/weights.pth")
    with pytest.raises(UserError, match=r"fetch http.* elsewhere and put it at .*checkpoints.*6726825d\.pth"):
        make_detector("inception", ONE)
    monkeypatch.setenv("DIFFIT_INCEPTION", str(tmp_path / "none.pth"))
    with pytest.raises(UserError, match=r"DIFFIT_INCEPTION=.*none\.pth: no such file; fetch it from http"):
        make_detector("inception", ONE)


def test_weights_with_another_hash_are_not_called_inception(inception_weights, monkeypatch):
    monkeypatch.setenv("DIFFIT_INCEPTION", str(inception_weights))
    with pytest.raises(UserError, match=r"SHA-256 .* is not that of the official .*--detector inception:"):
        make_detector("inception", ONE)


@pytest.mark.parametrize("spec", ["inception:{}", "{}"])
def test_a_pickle_with_code_in_it_is_refused_and_not_run(tmp_path, spec):
    left = tmp_path / "left-behind"
    for name, save in (("plain.pt", lambda p: p.write_bytes(pickle.dumps(Trap(left)))),
                       ("torch.pt", lambda p: torch.save({"fc.weight": Trap(left)}, p))):  # fmt: skip
        save(tmp_path / name)
        with pytest.raises(UserError, match=rf"{name}: not "):
            make_detector(spec.format(tmp_path / name), ONE, allow_scripts=True)
        assert not left.exists()


class Writer(torch.nn.Module):
    """Overwrites a file when it is called, by an operation that TorchScript has for mapping one into memory."""

    def __init__(self, path):
        super().__init__()
        self.path = str(path)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        written = torch.from_file(self.path, shared=True, size=4, dtype=torch.float32).fill_(0.0)
        return x.float().flatten(1) + written[0]


def test_a_script_is_not_run_unless_it_is_allowed(tmp_path, caplog):
    target = tmp_path / "precious"
    target.write_bytes(b"\1" * 16)
    torch.jit.script(Writer(target)).save(str(tmp_path / "writer.pt"))
    with pytest.raises(UserError, match=r"writer\.pt: .* a program .* can write files; use .* or pass --allow-scripts"):
        make_detector(str(tmp_path / "writer.pt"), ONE)
    assert target.read_bytes() == b"\1" * 16
    assert not caplog.text
    detector = make_detector(str(tmp_path / "writer.pt"), ONE, allow_scripts=True)
    if not detector.extract.confined:  # an old kernel, or none of Linux
        assert "writer.pt: a script is a program, and runs with your rights" in caplog.text
        return
    assert "writer.pt: a script is a program, and runs in a process that cannot write files" in caplog.text
    with pytest.raises(UserError, match=r"writer\.pt: fails on uint8 images .*Permission denied"):
        detector(images())
    assert target.read_bytes() == b"\1" * 16


def test_a_script_whose_process_is_gone_is_named(torchscript):
    script = Script(torchscript, ONE.device)
    script.process.kill()
    with pytest.raises(UserError, match=r"filters\.pt: the process of this script has died"):
        script(images())


@pytest.mark.parametrize("given", [["--detector", "{}", "--metrics", "fd4"], ["--metrics", "fd4:{}"]])
def test_the_command_line_refuses_scripts_as_well(torchscript, tmp_path, given):
    archive = write_archive(tmp_path / "a.zip", 12)
    words = ["metrics", "calc", "--images", archive, "--ref", archive, *(word.format(torchscript) for word in given)]
    for more, error in ((["--allow-scripts"], type(None)), ([], UserError)):
        result = CliRunner().invoke(cli, [*map(str, words), *more])
        assert isinstance(result.exception, error), result.output


def test_files_that_are_no_detectors_are_named(tmp_path, inception_weights):
    for name, content, message in (
        ("a.safetensors", b"nothing", "not a detector, or cut short"),
        ("a.pt", b"nothing", "not a TorchScript file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            make_detector(str(tmp_path / name), ONE, allow_scripts=True)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file; known: inception, pixels"):
        make_detector("vgg", ONE)
    cut = tmp_path / "cut.pth"
    shutil.copy(inception_weights, cut)
    with cut.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match=r"cut\.pth: not weights of the Inception network"):
        make_detector(f"inception:{cut}", ONE)


def test_features_that_are_not_finite_are_an_error(tmp_path):
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().flatten(1) / 0

    torch.jit.script(Broken()).save(str(tmp_path / "broken.pt"))
    with pytest.raises(UserError, match="features of an image are not finite"):
        make_detector(str(tmp_path / "broken.pt"), ONE, allow_scripts=True)(images())
