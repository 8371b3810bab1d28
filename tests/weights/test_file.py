"""Network files: what goes in comes out, nothing private goes in, and nothing hostile or broken gets through."""

import errno
import hashlib
import json
import pickle
import random
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from diffit.configs.presets import get_preset
from diffit.configs.schema import Config, Data
from diffit.errors import UserError
from diffit.models.image import ImageDiffiT
from diffit.weights.file import load_into, load_network, read_header, read_network_file, save_network
from diffit.weights.header import CONFIG_KEY, MAX_HEADER, SUM_KEY


def config_of(data: Data | None = None, **training) -> Config:
    config = get_preset("debug")
    model = config.model.model_copy(update={"num_classes": 3})
    data = data or Data(cond=True, class_names=("ant", "bee", "cat"))
    changes = {"model": model, "data": data, "training": config.training.model_copy(update=training)}
    return config.model_copy(update=changes)


@pytest.fixture(scope="module")
def net() -> ImageDiffiT:
    torch.manual_seed(0)
    return ImageDiffiT.from_config(config_of().model)


@pytest.fixture(scope="module")
def saved(net, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "network.safetensors"
    save_network(path, net.state_dict(), config_of(), kimg=12.5)
    return path


@pytest.fixture
def broken(saved, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copy(saved, tmp_path / "broken.safetensors"))


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def rewrite(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """As another program would write it: without the checksum of what was there before."""
    save_file(tensors, path, {key: value for key, value in metadata.items() if key != SUM_KEY})


def complaint(path: str | Path) -> str:
    """The one line that loading it raises, which names the file."""
    with pytest.raises(UserError) as caught:
        load_network(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_network_comes_back_as_it_was_saved(net, saved):
    loaded, config = load_network(saved)
    assert config == config_of()
    assert_close(loaded.state_dict(), net.state_dict(), rtol=0, atol=0)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    arguments = torch.randn(2, 3, 16, 16), torch.zeros(2), torch.tensor([0, 3])
    assert_close(loaded(*arguments), net.eval()(*arguments), rtol=0, atol=0)


def test_the_header_is_plain_json_and_strings(saved):
    metadata = header(saved)
    assert json.loads(metadata[CONFIG_KEY])["preset"] == "debug"
    assert metadata["diffit_kimg"] == "12.5"
    assert metadata["format"] == "pt"


def test_tensors_and_configuration_can_be_read_without_a_network(net, saved):
    state, config = read_network_file(str(saved))
    assert_close(state, dict(net.state_dict()), rtol=0, atol=0)
    assert config == config_of()
    assert_close(state, load_file(saved), rtol=0, atol=0)


@pytest.mark.parametrize(
    "config",
    [
        config_of(Data(path="/home/alice/secret/pets.zip", val="/home/alice/secret/val.zip")),
        config_of(init_from="/home/alice/secret/start.safetensors"),
    ],
    ids=["data", "init_from"],
)
def test_no_path_of_the_machine_is_in_the_file(net, tmp_path, config):
    path = tmp_path / "network.safetensors"
    save_network(path, net.state_dict(), config)
    assert b"alice" not in path.read_bytes()
    assert load_network(path)[1].model == config.model


def test_the_name_of_the_data_stays(net, tmp_path):
    path = tmp_path / "network.safetensors"
    save_network(path, net.state_dict(), config_of(Data(path="/home/alice/pets.zip")))
    assert load_network(path)[1].data.path == "pets.zip"


@pytest.mark.parametrize("kept", [0, 1, 8, 100, 5000, -1])
def test_a_truncated_file_is_refused(broken, kept):
    content = broken.read_bytes()
    broken.write_bytes(content[:kept])
    assert "cut short" in complaint(broken)


def test_a_path_that_is_not_there_or_a_folder_is_refused(tmp_path):
    assert "not there" in complaint(tmp_path / "missing.safetensors")
    assert "folder" in complaint(tmp_path)


def test_a_safetensors_file_of_others_is_refused_and_says_what_it_holds(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"blocks.0.weight": torch.zeros(2)}, path)
    assert "blocks.0.weight" in complaint(path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("write", [lambda thing, path: path.write_bytes(pickle.dumps(thing)), torch.save])
def test_a_pickle_is_refused_and_never_run(tmp_path, write):
    path, trap = tmp_path / "network.safetensors", tmp_path / "sprung"
    write({"weight": Bomb(trap)}, path)
    assert "not a safetensors file" in complaint(path)
    assert not trap.exists()
    with path.open("rb") as file:
        pickle.load(file) if write is not torch.save else torch.load(file, weights_only=False)
    assert trap.exists(), "the trap itself does not work"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("head.bias"), r"head\.bias is absent"),
        (lambda state: state.update(surplus=torch.zeros(3)), r"surplus is \(3,\).*absent"),
        (lambda state: state.update({"head.bias": torch.zeros(4)}), r"head\.bias is \(4,\).*\(3,\)"),
    ],
    ids=["missing", "surplus", "shape"],
)
def test_weights_of_another_model_are_refused_by_the_first_key_that_differs(broken, change, said):
    state, metadata = load_file(broken), header(broken)
    change(state)
    rewrite(broken, state, metadata)
    with pytest.raises(UserError, match=said):
        load_network(broken)
    assert "another model" in complaint(broken)


def test_a_refused_state_leaves_the_network_as_it_was(net):
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = {key: value + 1 for key, value in before.items()}
    del state["head.bias"]
    with pytest.raises(UserError):
        load_into(net, state, "somewhere")
    assert_close(dict(net.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "JSON"),
        ("[]", "configuration"),
        ('{"preset": "x"}', "model: Field required"),
    ],
)
def test_a_configuration_that_is_none_is_refused(broken, text, said):
    rewrite(broken, load_file(broken), header(broken) | {CONFIG_KEY: text})
    assert said in complaint(broken)


def test_an_unknown_key_in_the_configuration_is_refused_by_name(broken):
    config = json.loads(header(broken)[CONFIG_KEY])
    config["model"]["class_name"] = "os.system"
    rewrite(broken, load_file(broken), header(broken) | {CONFIG_KEY: json.dumps(config)})
    assert "model.class_name: unknown key" in complaint(broken)


def test_a_network_file_may_be_read_by_whoever_may_read_other_files(saved):
    """safetensors itself writes files that are for their owner alone."""
    ordinary = saved.parent / "ordinary"
    ordinary.touch()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (saved, ordinary)]
    ordinary.unlink()
    assert modes[0] == modes[1]


FULL = "No space left on device"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, FULL), SafetensorError(f"Error while serializing: I/O error: {FULL} (os error 28)")],
    ids=["the system's", "safetensors'"],
)
def test_a_full_disk_is_said_and_leaves_the_older_file(saved, net, monkeypatch, error):
    def full(*_):
        raise error

    content = saved.read_bytes()
    monkeypatch.setattr("diffit.weights.file.save_file", full)
    with pytest.raises(UserError, match="disk is full"):
        save_network(saved, net.state_dict(), config_of())
    assert saved.read_bytes() == content
    assert [item.name for item in saved.parent.iterdir()] == [saved.name]


def test_the_same_weights_and_settings_give_the_same_bytes(net, saved, tmp_path):
    """safetensors alone writes the strings of the header in another order from one process or map to the next."""
    for i in range(8):
        path = tmp_path / f"{i}.safetensors"
        save_network(path, net.state_dict(), config_of(), kimg=12.5)
        assert path.read_bytes() == saved.read_bytes()
    save_network(path, {key: value + 1 for key, value in net.state_dict().items()}, config_of(), kimg=12.5)
    assert path.read_bytes() != saved.read_bytes()


def test_the_checksum_is_the_sha_256_of_the_tensors_and_of_the_rest_of_the_header(saved):
    content = saved.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    parsed = json.loads(content[8:start])
    recorded = parsed["__metadata__"].pop(SUM_KEY)
    assert hashlib.sha256(content[start:] + json.dumps(parsed, sort_keys=True).encode()).hexdigest() == recorded


def test_every_flipped_bit_is_noticed(saved, broken):
    """In the tensors always by the checksum; in the header, an even smaller file of which is text, by whatever breaks.

    Only a flip in the checksum's own name leaves the file without one, and its content as it was.
    """
    content, rng = saved.read_bytes(), random.Random(0)
    start = 8 + int.from_bytes(content[:8], "little")
    positions = [rng.randrange(start, len(content)) for _ in range(60)] + [rng.randrange(start) for _ in range(60)]
    for position in positions:
        flipped = bytearray(content)
        flipped[position] ^= 1 << rng.randrange(8)
        broken.write_bytes(flipped)
        if SUM_KEY.encode() not in flipped:
            continue
        message = complaint(broken)
        if position >= start:
            assert "checksum" in message


def test_a_damaged_file_can_be_used_on_request(saved, broken, net):
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    broken.write_bytes(content)
    loaded, _ = load_network(broken, verify=False)
    differing = [k for k, v in loaded.state_dict().items() if not torch.equal(v, net.state_dict()[k])]
    assert len(differing) == 1
    assert "--no-verify" in complaint(broken)


def test_a_file_without_a_checksum_is_read_and_said_once(broken, caplog):
    rewrite(broken, load_file(broken), header(broken))
    for _ in range(2):
        load_network(broken)
    assert [record.getMessage() for record in caplog.records if "checksum" in record.getMessage()] == [
        f"{broken} has no checksum, as files of earlier versions: damage would go unnoticed"
    ]


@pytest.mark.parametrize("length", [MAX_HEADER + 1, 2**31, 2**40, 2**63, 2**64 - 1])
def test_a_header_of_an_impossible_length_is_refused_before_it_is_read(broken, length):
    broken.write_bytes(length.to_bytes(8, "little") + broken.read_bytes()[8:])
    assert "cut short" in complaint(broken)


def test_a_header_above_the_limit_is_refused_and_the_limit_named(tmp_path):
    path = tmp_path / "network.safetensors"
    with path.open("wb") as file:  # sparse: nothing of it is on the disk
        file.write((2**31).to_bytes(8, "little"))
        file.truncate(2**32)
    assert str(MAX_HEADER) in complaint(path)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("model", "stages", 0, "blocks"), 10**7, "stages.0.blocks: 10000000 should be less than or equal to 1000"),
        (("model", "image_size"), [2**40, 16], "image_size.0: 1099511627776 should be less"),
        (("sampling", "steps"), 10**12, "sampling.steps: 1000000000000 should be less than or equal to 100000"),
        (("preset",), "../../outside", "preset '../../outside'"),
        (("preset",), "/etc/passwd", "no name"),
        (("preset",), "a\nb", "no name"),
    ],
)
def test_a_configuration_that_would_take_for_ever_or_reach_elsewhere_is_refused(broken, place, value, said):
    config = json.loads(header(broken)[CONFIG_KEY])
    part = config
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    rewrite(broken, load_file(broken), header(broken) | {CONFIG_KEY: json.dumps(config)})
    assert said in complaint(broken)
    with pytest.raises(UserError):
        read_header(broken)


def test_a_training_length_that_is_no_number_is_refused(broken):
    rewrite(broken, load_file(broken), header(broken) | {"diffit_kimg": "many"})
    with pytest.raises(UserError, match="diffit_kimg"):
        read_header(broken)


def test_class_names_of_a_file_cannot_move_the_cursor(net, tmp_path):
    path = tmp_path / "network.safetensors"
    names = ("ant\n\x1b[2Kerror: all is well", "b" * 100_000, "گل\u200cها")
    save_network(path, net.state_dict(), config_of(Data(cond=True, class_names=names)))
    ant, bee, flowers = load_network(path)[1].data.class_names
    assert ant == "ant\\n\\x1b[2Kerror: all is well"
    assert len(bee) < 300
    assert flowers == names[2]
