"""Hub ids, with a Hub that is made here."""

import pytest

from diffit.errors import UserError
from diffit.utils.hub import NOTICE, fetch, looks_like_id

huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """``add(name)`` puts a file of repository someone/net onto a Hub; returns the files that were downloaded."""
    online, cache, downloads = tmp_path / "online", tmp_path / "cache", []
    online.mkdir()
    cache.mkdir()

    def download(repo, file, local_files_only=False):
        assert repo == "someone/net"
        if not (cache / file).exists():
            if local_files_only or not (online / file).exists():
                raise FileNotFoundError(f"no {file}\nat all")
            downloads.append(file)
            (cache / file).write_bytes((online / file).read_bytes())
        return str(cache / file)

    def snapshot(repo, local_files_only):
        if not list(cache.iterdir()):
            raise FileNotFoundError
        return str(cache)

    class Api:
        def list_repo_files(self, repo):
            if repo != "someone/net":
                raise ConnectionError("no network")
            return [path.name for path in sorted(online.iterdir())]

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return online, downloads


def test_the_only_weights_of_a_repository_are_fetched_once_with_one_notice(hub, caplog):
    online, downloads = hub
    (online / "README.md").touch()
    (online / "diffit.safetensors").write_bytes(b"weights")
    for _ in range(2):
        assert fetch("someone/net").read_bytes() == b"weights"
    assert downloads == ["diffit.safetensors"]
    assert caplog.messages == [NOTICE]


def test_of_several_one_must_be_named(hub):
    online, _ = hub
    for name in ("diffit_256.safetensors", "diffit_512.safetensors"):
        (online / name).write_bytes(name.encode())
    with pytest.raises(UserError, match=r"someone/net/diffit_256.safetensors, someone/net/diffit_512.safetensors"):
        fetch("someone/net")
    assert fetch("someone/net/diffit_512.safetensors").read_bytes() == b"diffit_512.safetensors"


@pytest.mark.parametrize("name", ["someone/net/other.safetensors", "nobody/net", "someone/net"])
def test_what_the_hub_does_not_give_is_one_line_and_no_notice(hub, name, capsys):
    with pytest.raises(UserError, match=name) as caught:
        fetch(name)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "is_id"),
    [
        ("nvidia/DiffiT", True),
        ("nvidia/DiffiT/diffit_256.safetensors", True),
        ("net.safetensors", False),
        ("runs/net.safetensors", False),
        ("/abs/net", False),
        ("./net/x", False),
        ("../net", False),
        ("owner/name/folder", False),
        ("owner/", False),
    ],
)
def test_ids_are_told_from_paths(name, is_id):
    assert looks_like_id(name) == is_id


def test_a_folder_that_is_here_is_no_owner(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert not looks_like_id("runs/00000-pets")
