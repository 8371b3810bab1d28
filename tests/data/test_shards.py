"""A folder of zips, here or behind a URL, is the one zip that it was split from."""

import json
import pickle
import shutil
import signal
import threading
import time
import traceback
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from diffit.cli import cli, run
from diffit.data import ImageArchive, check, convert
from diffit.data import remote as remote_module
from diffit.data.files import FileTree
from diffit.data.remote import Mirror, url_of
from diffit.errors import UserError
from helpers import command, start, wait, write_archive

COUNT, SIZE = 40, 6_000


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """The same images as one zip, and as a folder of zips."""
    place = tmp_path_factory.mktemp("made")
    source = write_archive(place / "source.zip", COUNT, side=16)
    paths = {"one": place / "pets.zip", "shards": place / "pets"}
    convert(source, paths["one"], cond=True)
    convert(source, paths["shards"], cond=True, shard_size=SIZE)
    return paths


def zips(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.zip"))


def assert_same(one: ImageArchive, other: ImageArchive) -> None:
    assert one.file_names == other.file_names
    assert torch.equal(one.load_all(), other.load_all())
    assert torch.equal(one.labels, other.labels)
    assert (one.content_hash, one.class_names, one.num_classes) == (
        other.content_hash,
        other.class_names,
        other.num_classes,
    )


def test_shards_are_read_as_the_one_zip_and_none_is_larger_than_asked(made):
    names = [path.name for path in zips(made["shards"])]
    assert names == [f"{i:05d}-of-{len(names):05d}.zip" for i in range(len(names))]
    assert len(names) > 2
    assert all(path.stat().st_size <= SIZE for path in zips(made["shards"]))
    assert_same(ImageArchive(made["shards"], cond=True), ImageArchive(made["one"], cond=True))
    assert ImageArchive(made["shards"]).name == ImageArchive(made["one"]).name == "pets"
    assert pickle.loads(pickle.dumps(ImageArchive(made["shards"])))[COUNT - 1].shape == (3, 16, 16)
    report = check(made["shards"], cond=True)
    assert (report.problems, report.count, report.labelled) == ([], COUNT, COUNT)


def test_converting_shards_gives_what_converting_the_one_zip_gives(made, tmp_path):
    for name, path in made.items():
        convert(path, tmp_path / f"{name}.zip", cond=True)
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "shards.zip").read_bytes()


def test_a_missing_or_damaged_shard_is_named(made, tmp_path):
    folder = Path(shutil.copytree(made["shards"], tmp_path / "pets"))
    second = zips(folder)[1]
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(UserError, match=r"listed in it are not there"):
        ImageArchive(folder)
    second.write_bytes(content[:200] + bytes([content[200] ^ 1]) + content[201:])
    with pytest.raises(UserError, match=rf"{second}.*cannot be read"):
        ImageArchive(folder).load_all()
    second.write_bytes(content[:300])
    with pytest.raises(UserError, match=rf"{second} cannot be read as a zip.*copy it again"):
        ImageArchive(folder)


def test_zips_with_a_file_of_the_same_name_are_refused(made, tmp_path):
    for name in ("a.zip", "b.zip"):
        shutil.copy(zips(made["shards"])[0], tmp_path / name)
    with pytest.raises(UserError, match=r"'00000/img00000000.png' is in a.zip and in b.zip"):
        ImageArchive(tmp_path)


def test_zips_without_sums_and_labels_are_read_in_the_order_of_their_names(made, tmp_path):
    for new, old in (("part10.zip", 0), ("part9.zip", 1)):
        shutil.copy(zips(made["shards"])[old], tmp_path / new)
    archive = ImageArchive(tmp_path)
    with zipfile.ZipFile(tmp_path / "part9.zip") as first:
        assert archive.file_names[: len(first.namelist())] == first.namelist()
    assert not archive.has_labels


def test_shards_are_written_into_folders_only_and_replace_their_like(made, tmp_path):
    with pytest.raises(UserError, match="is one zip, and --shard-size writes several"):
        convert(made["one"], tmp_path / "a.zip", shard_size=4096)
    with pytest.raises(UserError, match="use 1024 or more"):
        convert(made["one"], tmp_path / "a", shard_size=1)
    for size in ("9KB", "4kib"):
        words = [
            "data",
            "convert",
            "--source",
            made["one"],
            "--dest",
            tmp_path / "a",
            "--shard-size",
            size,
            "--overwrite",
        ]
        assert CliRunner().invoke(cli, list(map(str, words))).exit_code == 0
    assert max(path.stat().st_size for path in zips(tmp_path / "a")) <= 4 * 1024
    assert not list(tmp_path.glob("a/*.part"))
    assert CliRunner().invoke(cli, [*map(str, words[:-1]), "4 gigs"]).exit_code == 2


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("s3://bucket/pets", "s3://bucket/pets"),
        (Path("s3://bucket/pets/"), "s3://bucket/pets"),
        (Path("file:///a/b.zip"), "file:///a/b.zip"),
        ("hf://datasets/me/pets", "hf://datasets/me/pets"),
        ("/a/b", None),
        ("c:/a", None),
        ("ftp://a/b", None),
        ("simplecache::s3://a/b", None),
    ],
)
def test_urls_are_told_from_paths(path, url):
    assert url_of(path) == url


@pytest.fixture
def fetched(monkeypatch):
    """Bytes fetched of each file."""
    found: dict[str, int] = {}
    honest = Mirror._fetch

    def fetch(mirror, name, part):
        before = part.stat().st_size if part.exists() else 0
        honest(mirror, name, part)
        found[name] = found.get(name, 0) + (mirror.folder / name).stat().st_size - before

    monkeypatch.setattr(Mirror, "_fetch", fetch)
    return found


@pytest.mark.parametrize("kind", ["one", "shards"])
def test_behind_a_url_the_archive_is_the_same(made, fetched, kind):
    pytest.importorskip("fsspec")
    archive = ImageArchive(f"file://{made[kind]}", cond=True)
    assert (archive.name, archive.location) == ("pets", f"file://{made[kind]}")
    assert_same(archive, ImageArchive(made["one"], cond=True))
    sizes = {path.name: path.stat().st_size for path in [made[kind], *made[kind].glob("*")] if path.is_file()}
    assert fetched == sizes  # each once
    assert_same(pickle.loads(pickle.dumps(archive)), archive)
    assert_same(ImageArchive(Path(f"file://{made[kind]}"), cond=True), archive)
    assert fetched == sizes


def test_only_the_shards_that_are_read_are_fetched(made, fetched):
    pytest.importorskip("fsspec")
    archive = ImageArchive(f"file://{made['shards']}", cond=True)
    first, *_, last = (path.name for path in zips(made["shards"]))
    assert fetched.keys() == {"dataset.json", "dataset.sfv", first}  # the first image gives the shape
    archive[COUNT - 1]
    assert fetched.keys() == {"dataset.json", "dataset.sfv", first, last}


def test_what_was_fetched_before_an_interruption_is_not_fetched_again(made, fetched):
    pytest.importorskip("fsspec")
    mirror, (first, *_) = Mirror(f"file://{made['shards']}"), zips(made["shards"])
    content = first.read_bytes()
    (mirror.folder / f".{first.name}.part").write_bytes(content[:5000])
    assert mirror.fetch(first.name).read_bytes() == content
    assert fetched == {first.name: len(content) - 5000}


def test_a_connection_that_breaks_is_tried_again_and_given_up_in_a_line(made, monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.setattr(remote_module, "PIECE", 1000)
    honest, breaks = Mirror._read, [3, 3, 0]

    def read(mirror, source):
        breaks[0] -= 1
        if not breaks[0]:
            breaks.pop(0)
            raise UserError("the connection is gone")
        return honest(mirror, source)

    mirror, (first, second, *_) = Mirror(f"file://{made['shards']}"), zips(made["shards"])
    monkeypatch.setattr(Mirror, "_read", read)
    assert mirror.fetch(first.name).read_bytes() == first.read_bytes()
    breaks[:] = [2, 2, 2, 2]
    with pytest.raises(UserError, match="the connection is gone"):
        mirror.fetch(second.name)
    assert (mirror.folder / f".{second.name}.part").stat().st_size == 3000  # kept for the next time


def test_an_archive_that_changes_behind_its_url_is_fetched_again(made, tmp_path):
    pytest.importorskip("fsspec")
    folder = Path(shutil.copytree(made["shards"], tmp_path / "pets"))
    before = ImageArchive(f"file://{folder}")
    before.load_all()
    convert(write_archive(tmp_path / "b.zip", COUNT, side=8), folder, shard_size=SIZE, overwrite=True)
    assert ImageArchive(f"file://{folder}").image_shape == (3, 8, 8)


def test_a_url_that_leads_nowhere_or_needs_a_package_is_one_line(tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec")
    with pytest.raises(UserError, match=r"nowhere: not there; check the spelling"):
        ImageArchive(f"file://{tmp_path}/nowhere")
    with pytest.raises(UserError, match="no zips there"):
        ImageArchive(f"file://{tmp_path}")

    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"s3:// needs another package: pip install 'diffit-torch\[remote\]'"):
        ImageArchive("s3://bucket/pets")


class Service(SimpleHTTPRequestHandler):
    """Parts of files, to who has the token; ``refusals`` are the answers to requests for the end of a file."""

    refusals: ClassVar[list[int]] = []

    def do_GET(self) -> None:
        place, _, query = self.path.partition("?")
        content, part = (Path(self.directory) / place.lstrip("/")).read_bytes(), self.headers.get("Range")
        begin, end = 0, len(content) - 1
        if part:
            begin, end = map(int, part.removeprefix("bytes=").split("-"))
        denied = 403 if query != "token=SECRET//'x'/" else self.refusals.pop() if part and self.refusals else 0
        self.send_response(denied or (206 if part else 200))
        self.send_header("Content-Length", "0" if denied else str(end + 1 - begin))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Range", f"bytes {begin}-{end}/{len(content)}")
        self.end_headers()
        if not denied and self.command == "GET":
            self.wfile.write(content[begin : end + 1])

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def signed(made):
    """The URL of the one zip, for who has the token."""
    pytest.importorskip("aiohttp")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Service, directory=str(made["one"].parent))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/pets.zip?token=SECRET//'x'/"
        server.shutdown()


@pytest.mark.slow
def test_a_signed_url_is_one_zip_and_its_token_is_neither_recorded_nor_shown(made, signed, tmp_path, capfd):
    words = ["train", "--data", signed, f"--val={signed}", "--outdir", str(tmp_path / "runs"), "--cond"]
    words += ["--preset", "debug", "--batch-gpu", "8", "--grid", "2x2", "--metrics", "kid8_full:pixels", "--kimg", ""]
    for length in ("0.016", "0.032"):  # the second goes on with the first's run
        words[-1] = length
        with pytest.raises(SystemExit) as ended:
            run(cli, words)
        assert not ended.value.code
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert run_dir.name == "00000-pets-debug-gpus1-batch8"
    recorded = json.loads((run_dir / "training_options.json").read_text())["data"]
    assert recorded["path"] == recorded["val"] == signed.partition("?")[0]
    assert b"SECRET" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "SECRET" not in "".join(capfd.readouterr())
    assert "SECRET" not in str(Mirror(signed).folder)
    expired = signed.replace("SECRET", "WRONG")
    with pytest.raises(UserError, match=r"cannot be read \(403, .*credentials") as denied:
        ImageArchive(expired)
    assert "WRONG" not in "".join(traceback.format_exception(denied.value))
    with pytest.raises(UserError, match=r"/pets: not one zip by its name, and a signed URL is of one file; name a zip"):
        ImageArchive(signed.replace("pets.zip", "pets"))


def test_an_error_of_the_service_is_not_taken_for_a_damaged_zip(signed):
    Service.refusals[:] = [503] * 9
    with pytest.raises(UserError, match=r"pets.zip: cannot be read \(503, .*check the connection and the credentials"):
        FileTree(signed)
    Service.refusals.clear()
    assert FileTree(signed).images


OPTIONS = ["--preset", "debug", "--cond", "--grid", "2x2", "--batch-gpu", "4", "--kimg", "0.24", "--tick", "0.04",
           "--dump", "1", "--snap", "0"]  # fmt: skip


def newest(outdir: Path) -> dict[str, dict[str, torch.Tensor]]:
    state = sorted(outdir.glob("*/training-state-*"))[-1]
    return {name: load_file(state / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}


@pytest.fixture
def bucket(monkeypatch):
    """Puts the files of a folder onto an S3 server on the loopback interface; their URL."""
    pytest.importorskip("s3fs", reason="needs the optional package s3fs")
    server = pytest.importorskip("moto.server", reason="needs the optional package moto[server]")
    import boto3

    there = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    there.start()
    host, port = there.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    s3, name = boto3.client("s3"), f"data{port}"  # moto forgets nothing
    s3.create_bucket(Bucket=name)

    def put(folder: Path) -> str:
        for path in folder.iterdir():
            s3.upload_file(str(path), name, f"pets/{path.name}")
        return f"s3://{name}/pets"

    yield put
    there.stop()


@pytest.mark.slow
@pytest.mark.parametrize("place", ["file", "s3"])
def test_two_processes_killed_and_resumed_learn_from_shards_what_they_learn_from_the_one_zip(tmp_path, request, place):
    pytest.importorskip("fsspec")
    one, twenty = tmp_path / "pets.zip", tmp_path / "pets"
    convert(write_archive(tmp_path / "source.zip", 42, side=16), one, cond=True)
    convert(one, twenty, cond=True, shard_size=1100)
    assert len(zips(twenty)) == 20
    data = f"file://{twenty}" if place == "file" else request.getfixturevalue("bucket")(twenty)
    sharded = ["train", "--outdir", tmp_path / "shards", "--data", data, *OPTIONS]
    command("train", "--outdir", tmp_path / "one", "--data", one, *OPTIONS, processes=2)
    killed = start("diffit", *sharded, output=tmp_path, processes=2)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("shards/*/training-state-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in killed:
        process.kill()
    assert wait(killed) == -signal.SIGKILL
    command(*sharded, processes=2)
    (run_dir,) = (tmp_path / "shards").iterdir()
    assert "resumed at" in (run_dir / "log.txt").read_text()
    ours, theirs = newest(tmp_path / "shards"), newest(tmp_path / "one")
    assert all(torch.equal(ours[kind][name], theirs[kind][name]) for kind in ours for name in ours[kind])


@pytest.mark.slow
def test_an_s3_server_gives_the_same_images(made, bucket):
    url = bucket(made["shards"])
    archive = ImageArchive(url, cond=True)
    assert_same(archive, ImageArchive(made["one"], cond=True))
    loader = torch.utils.data.DataLoader(ImageArchive(url), batch_size=None, num_workers=2)
    assert torch.equal(torch.stack(list(loader)), archive.load_all())
