"""Whatever comes from a page is checked: names looked up, sizes bounded, uploads decoded by the package's reader."""

import io
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from diffit.cli import cli
from diffit.configs.presets import get_preset
from diffit.errors import UserError
from diffit.explore.attention import attention_layers
from diffit.models import build
from diffit.sampling import load
from diffit.training.runs import RunView
from diffit.utils.images import to_uint8
from diffit.weights import save_network

gr = pytest.importorskip("gradio", reason="the page needs gradio: extra studio")

from diffit.studio import Shelf, compare_tab, data_tab, explore_tab, inside_tab, runs_tab, sample_tab  # noqa: E402
from diffit.studio.app import read_auth, require_free, serve  # noqa: E402
from diffit.studio.common import Scratch, checked, escape  # noqa: E402
from diffit.studio.controls import solver_values  # noqa: E402
from diffit.studio.request import RANDOM, Request  # noqa: E402
from diffit.studio.uploads import decode, fit_image, painted, read_upload  # noqa: E402
from studio.folders import free_port, write_run  # noqa: E402

NETWORK, SECOND = (f"{kimg} kimg · 00000-a-debug-gpus1-batch8" for kimg in (1, 2))
OTHER = "3 kimg · 00001-b-debug-gpus1-batch8"
SCRATCH = Scratch()
OWN = ["heun", 4, 1.0, "", "all", "auto"]


def last(generator):
    *_, final = generator
    return final


def run_sample(shelf, *values):
    return last(sample_tab.sample(shelf, SCRATCH, *values))


@pytest.fixture(scope="module")
def model(shelf):
    return load(shelf.networks()[NETWORK], device="cpu")


def test_the_page_shows_what_the_library_samples_and_says_how(shelf, model):
    solver = ["euler", 3, 2.0, "0.1,50", "3", "fp32"]
    _, status, _, python, files, record = run_sample(shelf, NETWORK, "1", 5, 2, *solver)
    settings = {"sampler": "euler", "steps": 3, "cfg_scale": 2.0, "cfg_interval": (0.1, 50.0), "cfg_channels": 3}
    expected = to_uint8(model.sample([5, 6], "bee", **settings)).permute(0, 2, 3, 1).numpy()
    npz = next(path for path in files if path.endswith(".npz"))
    assert np.array_equal(np.load(npz)["arr_0"], expected)
    assert "5 evaluations" not in status
    assert "2 images" in status
    scope = {}
    exec(python, scope)
    assert np.array_equal(to_uint8(scope["images"]).permute(0, 2, 3, 1).numpy(), expected)
    assert sample_tab.title(record) in [sample_tab.title(entry) for entry in sample_tab.remember([], record)[0]]


def test_the_command_line_makes_the_same_images(shelf, model, tmp_path):
    import shlex

    from diffit.cli.sample import sample

    request = Request(NETWORK, 5, 2, 1, {"sampler": "euler", "cfg_interval": (0.1, 50.0), "cfg_scale": 2.0})
    words = shlex.split(request.command(shelf.networks()[NETWORK]))
    assert words[:2] == ["diffit", "sample"]
    words[words.index("samples")] = str(tmp_path / "samples")
    sample.main(words[2:], standalone_mode=False)
    expected = to_uint8(model.sample([5, 6], 1, **request.settings)).permute(0, 2, 3, 1).numpy()
    for seed, image in zip((5, 6), expected, strict=True):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "samples" / f"{seed:06d}.png")), image)


def test_a_line_of_the_history_brings_its_controls_back(shelf):
    *_, record = run_sample(shelf, NETWORK, "2", 7, 1, "euler", 2, 1.5, "", "all", "fp32")
    history, _ = sample_tab.remember([{"network": "gone"}, 3], record)
    back = sample_tab.recall(shelf, history, sample_tab.title(record))
    assert back == [NETWORK, "2", 7, 1, "euler", 2, 1.5, "", "all", "fp32"]
    assert solver_values(None)[0] == "heun"


BAD = [
    ({"network": "../../etc/passwd"}, "not among those"),
    ({"network": None}, "not among those"),
    ({"label": "../bee"}, "unknown; the model knows"),
    ({"label": "dog"}, "unknown; the model knows"),
    ({"first": -1}, "seed -1"),
    ({"first": 0.5}, "seed 0.5"),
    ({"first": float("nan")}, "seed nan"),
    ({"first": "../1"}, "seed ../1"),
    ({"count": 10**6}, "images 1000000"),
    ({"count": 0}, "images 0"),
    ({"steps": 10**6}, "steps 1000000"),
    ({"steps": 0}, "steps 0"),
    ({"sampler": "../heun"}, "sampler"),
    ({"sampler": "ddpm"}, "discrete schedule"),
    ({"scale": -1.0}, "cfg_scale"),
    ({"scale": "../2"}, "guidance scale ../2"),
    ({"interval": "5,1", "scale": 2.0}, "empty"),
    ({"interval": "../5"}, "guided sigmas ../5"),
    ({"interval": "0,inf", "scale": 2.0}, "guided sigma inf"),
    ({"channels": "../3"}, "guided channels"),
    ({"precision": "../fp32"}, "precision"),
]


@pytest.mark.parametrize(("wrong", "words"), BAD, ids=lambda value: str(value))
def test_a_bad_field_is_said_in_one_line(shelf, wrong, words):
    fields = {"network": NETWORK, "label": RANDOM, "first": 0, "count": 1}
    names = ["sampler", "steps", "scale", "interval", "channels", "precision"]
    fields |= dict(zip(names, OWN, strict=True)) | wrong
    with pytest.raises(gr.Error) as caught:
        last(checked(sample_tab.sample)(shelf, Scratch(), *fields.values()))
    text = caught.value.message
    assert words in text
    assert "\n" not in text
    assert "<" not in text


def test_names_from_files_are_no_markup(shelf):
    bad = checked(lambda: run_sample(shelf, NETWORK, "<img src=x onerror=alert(1)>", 0, 1, *OWN))
    with pytest.raises(gr.Error) as caught:
        bad()
    assert "<img" not in caught.value.message
    assert "&lt;img" in caught.value.message
    assert escape("<b>[x](javascript:1)`") == "&lt;b>&#91;x](javascript:1)&#96;"


def test_other_tabs_check_what_they_are_given_as_well(shelf):
    image, drawing = torch.zeros(1, 3, 16, 16), {"layers": [np.full((8, 8, 4), 255, np.uint8)]}
    edit = explore_tab.edit_of(shelf, image, NETWORK, RANDOM, 0, 1)
    for call in (
        lambda: runs_tab.read_run(shelf.run("../../etc")),
        lambda: inside_tab.layer_of(shelf.model(NETWORK), "../blocks"),
        lambda: data_tab.neighbours(shelf, "../x", RANDOM, 0, "pixels"),
        lambda: data_tab.neighbours(shelf, NETWORK, RANDOM, 0, "../weights.pt"),
        lambda: last(explore_tab.frames_between(shelf, SCRATCH, "../x", [(0, ""), (1, "")], 4, None)),
        lambda: last(explore_tab.frames_between(shelf, SCRATCH, NETWORK, [(0, "ant"), (1, "")], 4, None)),
        lambda: last(explore_tab.frames_between(shelf, SCRATCH, NETWORK, [(0, ""), (1, "")], 4, 10**6)),
        lambda: explore_tab.edit_of(shelf, None, NETWORK, RANDOM, 0, 1),
        lambda: explore_tab.edit_of(shelf, image, "../x", RANDOM, 0, 1),
        lambda: explore_tab.edit_of(shelf, image, NETWORK, "../bee", 0, 1),
        lambda: explore_tab.take_sample(shelf, NETWORK, RANDOM, "../1"),
        lambda: last(explore_tab.variations(edit, 10**9)),
        lambda: last(explore_tab.variations(edit, "../1")),
        lambda: last(explore_tab.paintings(edit, None, 5)),
        lambda: last(explore_tab.paintings(edit, drawing, 10**6)),
        lambda: runs_tab.side_by_side(shelf, ["../training.lr"]),
        lambda: inside_tab.show(shelf, None, "", 1, (0.5, 0.5), True),
    ):
        with pytest.raises(UserError):
            call()


def test_networks_of_two_sizes_are_not_compared(shelf):
    with pytest.raises(UserError, match=r"3×16×16 and of 3×8×8"):
        last(compare_tab.compare(shelf, RANDOM, 0, 1, NETWORK, *OWN, OTHER, *OWN))


def test_a_comparison_has_both_pictures_and_numbers(shelf, model):
    a, b, gray, table, status = last(compare_tab.compare(shelf, "0", 3, 2, NETWORK, *OWN, SECOND, *OWN))
    assert table[0] == ["class", "ant", "ant"]
    assert a.size == b.size == gray.size
    numbers = {row[0]: row[1:] for row in table}
    assert numbers["evaluations per image"] == [7, 7]
    other = load(shelf.networks()[SECOND], device="cpu")
    levels = [to_uint8(m.sample([3, 4], 0)).double() for m in (model, other)]
    assert f"mean |difference| (levels) **{(levels[0] - levels[1]).abs().mean():.3g}**" in status
    *_, status = last(compare_tab.compare(shelf, "0", 3, 2, NETWORK, *OWN, NETWORK, *OWN))
    assert "The same images" in status


def png_header(width: int, height: int) -> bytes:
    """A PNG that says that it is as large, with next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png_header(60_000, 60_000), "exceeds limit"),
        (png_header(9_000, 6_000), "9000×6000 pixels"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a known format"),
        (b"just text", "not an image of a known format"),
        (bytes((32 << 20) + 1), "larger than 32 MiB"),
        (png_header(64, 64), "cannot be used"),
    ],
    ids=["bomb", "too many pixels", "svg", "text", "bytes", "damaged"],
)
def test_what_is_no_image_is_not_decoded(tmp_path, data, words):
    path = tmp_path / "upload.png"
    path.write_bytes(data)
    with pytest.raises(UserError, match=words):
        read_upload(path)


def test_an_upload_comes_to_the_size_of_the_model(tmp_path):
    image = Image.new("RGBA", (40, 20), (255, 0, 0, 255))
    image.save(tmp_path / "a.png")
    assert torch.equal(fit_image(read_upload(tmp_path / "a.png"), (3, 8, 8))[0, :, 0, 0], torch.tensor([1.0, -1, -1]))
    assert fit_image(read_upload(tmp_path / "a.png"), (1, 8, 12)).shape == (1, 1, 8, 12)
    data = io.BytesIO()
    Image.new("P", (3, 3)).save(data, "GIF")
    assert decode(data.getvalue(), "a.gif").mode == "RGB"


def test_a_drawing_is_a_mask_of_the_size_of_the_model():
    layer = np.zeros((64, 64, 4), np.uint8)
    layer[:32, 16:48, 3] = 255
    mask = painted({"layers": [layer]}, (8, 8))
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4, 2:6] = True
    assert torch.equal(mask, expected)
    for nothing in (None, {"layers": []}, {"layers": [np.zeros_like(layer)]}):
        with pytest.raises(UserError, match="nothing is painted"):
            painted(nothing, (8, 8))


def test_the_least_recently_used_network_goes(shelf):
    small = Shelf(runs=shelf.runs_dir, keep=2, device=torch.device("cpu"))
    first = small.model(NETWORK)
    small.model(SECOND)
    assert small.model(NETWORK) is first
    small.model(OTHER)
    assert small.model(NETWORK) is first
    assert len(small._kept) == 2


def test_an_autoencoder_is_for_the_networks_that_have_latents(shelf, tmp_path):
    own = Shelf(runs=shelf.runs_dir, vae="someone/vae", device=torch.device("cpu"))
    assert own.model(NETWORK).autoencoder is None
    assert own.vae_for(own.networks()[NETWORK]) is None
    config = get_preset("latent-debug")
    save_network(tmp_path / "l.safetensors", build(config.model).state_dict(), config)
    assert own.vae_for(tmp_path / "l.safetensors") == "someone/vae"
    request = Request(NETWORK, 0, 1)
    assert "--vae someone/vae" in request.command("l.safetensors", "someone/vae")
    assert "vae='someone/vae'" in request.python("l.safetensors", "someone/vae")
    assert "vae" not in request.command("l.safetensors") + request.python("l.safetensors")


def test_what_is_looked_into_is_the_network_that_made_the_sample(tmp_path):
    run = write_run(tmp_path / "runs", kimg=(1,))
    shelf = Shelf(networks=(str(run),), device=torch.device("cpu"))
    (name,) = shelf.networks()
    looked = inside_tab.look(shelf, name, RANDOM, 0, 2)
    block = next(iter(attention_layers(shelf.model(name).net)))
    assert len(inside_tab.biases(shelf, looked, block)) > 0
    (run / "anything").touch()  # of the folder, not of the network
    assert len(inside_tab.biases(shelf, looked, block)) > 0
    (old,) = run.glob("network-snapshot-*.safetensors")
    shutil.copy(old, run / "network-snapshot-000009.000.safetensors")
    with pytest.raises(UserError, match="there is a newer one of this name"):
        inside_tab.biases(shelf, looked, block)


def test_a_request_larger_than_the_memory_is_refused_before_any_work(shelf, monkeypatch):
    monkeypatch.setattr("diffit.studio.shelf.free_bytes", lambda device: 10_000)
    with pytest.raises(UserError, match=r"images 16: together they take about .* ask for 1 or fewer"):
        shelf.require_memory(shelf.model(NETWORK), 16)


def test_a_run_that_is_deleted_while_it_is_shown_is_said(tmp_path):
    run = write_run(tmp_path / "runs", kimg=())
    shelf = Shelf(runs=tmp_path / "runs", device=torch.device("cpu"))
    name = next(iter(shelf.runs()))
    assert runs_tab.read_run(shelf.run(name)).kimg == 1
    shutil.rmtree(run)
    with pytest.raises(gr.Error) as caught:
        checked(lambda: shelf.run(name))()
    assert "no longer" in caught.value.message
    with pytest.raises(UserError, match="gone"):
        runs_tab.read_run(run)


def test_the_first_run_to_begin_is_shown_of_itself(tmp_path):
    shelf = Shelf(runs=tmp_path)
    assert "value" not in runs_tab.first_of(shelf, None)
    run = write_run(tmp_path)
    assert runs_tab.first_of(shelf, None)["value"] == run.name
    assert "value" not in runs_tab.first_of(shelf, "another")


def test_a_port_that_is_taken_is_said(shelf, served):
    port = int(served.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(UserError, match=rf"--port {port}: .* use another --port"):
        serve(shelf, port=port, block=False)
    require_free("127.0.0.1", free_port())


def test_passwords_come_from_a_file_and_are_never_quoted(tmp_path):
    path = tmp_path / "auth"
    path.write_text("ann:secret:with:colons\n\nbob:x\n")
    assert read_auth(path) == [("ann", "secret:with:colons"), ("bob", "x")]
    path.write_text("hunter2\n")
    with pytest.raises(UserError, match="USER:PASSWORD") as caught:
        read_auth(path)
    assert "hunter2" not in str(caught.value)


def test_what_nobody_foresaw_is_logged_and_the_page_goes_on(caplog):
    with pytest.raises(gr.Error) as caught:
        checked(lambda: 1 / 0)()
    assert "the server failed (ZeroDivisionError)" in caught.value.message
    assert "division by zero" in caplog.text


def test_the_command_says_what_it_cannot_show_before_it_serves(tmp_path):
    from diffit.cli.studio import studio

    for words, text in (
        ([], "nothing to show: pass --network"),
        (["--runs", str(tmp_path / "gone")], "--runs .*gone: not there"),
        (["--network", str(tmp_path / "gone.safetensors")], "gone.safetensors"),
        (["--runs", str(tmp_path), "--auth-file", str(tmp_path / "gone")], "--auth-file .*cannot be read"),
    ):
        with pytest.raises(UserError, match=text):
            studio.main(words, standalone_mode=False)


def test_a_long_run_keeps_every_curve_when_it_is_thinned(tmp_path):
    stats = [{"images": 1000 * i, "loss": 1.0, "val_loss": 2.0} for i in range(1300)]
    view = RunView(tmp_path, None, stats, [], {}, [], 0.0)
    table = runs_tab.curves(view, "loss", "val_loss")
    assert sorted(set(table["which"])) == ["loss", "val_loss"]
    assert table["kimg"].is_monotonic_increasing
    assert len(table) <= 4 * runs_tab.POINTS


@pytest.mark.parametrize("line", ["secret", "user:", ":secret"])
def test_a_password_that_cannot_be_one_is_refused_rather_than_left_out(shelf, line, monkeypatch):
    monkeypatch.setenv("DIFFIT_STUDIO_AUTH", line)
    with pytest.raises(UserError, match=r"^DIFFIT_STUDIO_AUTH: expected USER:PASSWORD"):
        cli(["studio", "--runs", str(shelf.runs_dir)], standalone_mode=False)
