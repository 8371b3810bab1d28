"""Files and folders that are whole or not at all, whatever happens while they are written."""

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from diffit.errors import UserError
from diffit.utils.files import disk_errors, sweep, whole_file, whole_folder

both = pytest.mark.parametrize("whole", [whole_file, whole_folder])


def fill(part: Path, text: str = "new") -> None:
    """Content for either: a file, or a folder with a folder in it."""
    if part.is_dir():
        (part / "inner").mkdir()
        (part / "inner" / "deep.txt").write_text(text)
        (part / "flat.txt").write_text(text)
    else:
        part.write_text(text)


def content(path: Path) -> dict[str, str]:
    """All files below ``path``, hidden ones too."""
    return {str(item.relative_to(path)): item.read_text() for item in sorted(path.rglob("*")) if item.is_file()}


def write(whole, path: Path, text: str = "new", error: BaseException | None = None) -> None:
    """Write it, up to ``error``."""
    with whole(path) as part:
        fill(part, text)
        if error is not None:
            raise error


@both
@pytest.mark.parametrize("kind", [str, Path])
def test_what_was_written_is_there_and_nothing_else(whole, kind, tmp_path):
    write(whole, kind(tmp_path / "a" / "b" / "thing"))
    names = {"a/b/thing"} if whole is whole_file else {"a/b/thing/flat.txt", "a/b/thing/inner/deep.txt"}
    assert content(tmp_path) == dict.fromkeys(names, "new")


@both
def test_it_is_written_beside_and_is_not_there_until_the_end(whole, tmp_path):
    path = tmp_path / "thing"
    with whole(path) as part:
        fill(part)
        assert part.parent == path.parent
        assert not path.exists()
    assert path.exists()


@both
def test_the_new_takes_the_place_of_the_old(whole, tmp_path):
    write(whole, tmp_path / "thing", "old")
    before = set(content(tmp_path))
    write(whole, tmp_path / "thing", "new")
    assert content(tmp_path) == dict.fromkeys(before, "new")


@both
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("older", [True, False], ids=["older", "first"])
def test_an_error_leaves_what_was_there_and_no_trace(whole, error, older, tmp_path):
    if older:
        write(whole, tmp_path / "thing", "old")
    before = content(tmp_path)
    with pytest.raises(error):
        write(whole, tmp_path / "thing", error=error())
    assert content(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == older


@both
def test_an_error_before_anything_was_written_is_that_error(whole, tmp_path):
    with pytest.raises(ZeroDivisionError), whole(tmp_path / "thing"):
        1 / 0  # noqa: B018
    assert not list(tmp_path.iterdir())


@both
@pytest.mark.parametrize("call", ["replace", "rename"])
def test_a_failure_at_the_last_moment_leaves_the_old(whole, call, tmp_path, monkeypatch):
    """Of the renames that put the new in place, each may be the one that fails."""
    real = getattr(os, call)
    write(whole, tmp_path / "thing", "old")
    before = content(tmp_path)
    for nth in (1, 2):
        count = itertools.count(1)

        def fail(*arguments, nth=nth, count=count):
            if next(count) == nth:
                raise OSError(errno.EIO, "broken")
            real(*arguments)

        monkeypatch.setattr(os, call, fail)
        with contextlib.suppress(UserError):
            write(whole, tmp_path / "thing", "new")
        monkeypatch.undo()
        if next(count) > nth:  # the one that was to fail was made
            assert content(tmp_path) == before
        write(whole, tmp_path / "thing", "old")


@both
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_with_the_place_and_leaves_no_trace(whole, code, tmp_path):
    with pytest.raises(UserError, match=r"thing: the disk is full \(\d+ MiB free\)"):
        write(whole, tmp_path / "thing", error=OSError(code, os.strerror(code)))
    assert not list(tmp_path.iterdir())


@both
def test_a_disk_that_fills_up_at_the_sync_is_the_same(whole, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write(whole, tmp_path / "thing")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.EACCES, "not writable"),
        (errno.EROFS, "not writable"),
        (errno.ENOTDIR, "a file stands where a folder is needed"),
    ],
)
def test_what_a_user_can_mend_is_said(code, said, tmp_path):
    with pytest.raises(UserError, match=said), disk_errors(tmp_path / "thing"):
        raise OSError(code, os.strerror(code))


def test_other_errors_pass_unchanged(tmp_path):
    with pytest.raises(ConnectionError), disk_errors(tmp_path):
        raise ConnectionResetError(errno.ECONNRESET, "of the network")


@pytest.mark.parametrize("named", [True, False])
def test_a_failing_disk_is_said_with_the_place(named, tmp_path):
    error = OSError(errno.EIO, "Input/output error", *([str(tmp_path / "inner")] if named else []))
    place = tmp_path / ("inner" if named else "thing")
    with (
        pytest.raises(UserError, match=rf"^{place}: the disk cannot be read or written"),
        disk_errors(tmp_path / "thing"),
    ):
        raise error


@both
def test_a_file_in_place_of_a_parent_folder_is_said(whole, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="a file stands where a folder is needed"):
        write(whole, tmp_path / "file" / "thing")
    assert content(tmp_path) == {"file": "x"}


def test_a_file_where_the_folder_is_to_go_is_left_alone(tmp_path):
    (tmp_path / "thing").write_text("x")
    with pytest.raises(UserError, match="thing"):
        write(whole_folder, tmp_path / "thing")
    assert content(tmp_path) == {"thing": "x"}


def test_a_folder_where_the_file_is_to_go_is_said_and_left_alone(tmp_path):
    (tmp_path / "thing").mkdir()
    (tmp_path / "thing" / "inner").write_text("x")
    with pytest.raises(UserError, match="thing"):
        write(whole_file, tmp_path / "thing")
    assert content(tmp_path) == {"thing/inner": "x"}


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe: a device or pipe"), whole_file(tmp_path / "pipe"):
        pass
    assert [path.is_fifo() for path in tmp_path.iterdir()] == [True]


@both
def test_everything_is_on_the_disk_before_it_takes_its_place(whole, tmp_path, monkeypatch):
    """A rename may reach the disk before the data: files, and the folders that list them, are synced ahead of it."""
    synced, ahead = set(), []
    real_sync, real_rename, real_replace = os.fsync, os.rename, os.replace

    def sync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        real_sync(descriptor)

    def moving(real):
        def move(source, target):
            inside = [source, *Path(source).rglob("*")]
            ahead.append({str(item) for item in inside if os.stat(item).st_ino not in synced})
            real(source, target)

        return move

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", moving(real_rename))
    monkeypatch.setattr(os, "replace", moving(real_replace))
    write(whole, tmp_path / "thing")
    assert ahead == [set()]
    assert tmp_path.stat().st_ino in synced, "the folder that lists it is synced after"


def test_what_a_killed_process_left_does_not_stop_the_next_of_its_number(tmp_path, monkeypatch):
    """In a container every process may have the same number."""

    def killed(*_, **__):
        raise KeyboardInterrupt

    write(whole_folder, tmp_path / "thing", "old")
    names = set(content(tmp_path))
    with (
        monkeypatch.context() as patch,
        contextlib.suppress(KeyboardInterrupt),
        whole_folder(tmp_path / "thing") as part,
    ):
        fill(part, "older")
        patch.setattr("shutil.rmtree", killed)  # from here on nothing is cleaned away
    write(whole_folder, tmp_path / "thing", "new")
    assert content(tmp_path) == dict.fromkeys(names, "new")


def dead_process() -> int:
    """The number of one that has ended."""
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


@both
def test_what_dead_processes_left_is_swept_and_that_of_living_ones_stays(whole, tmp_path):
    (tmp_path / ".notes.part").write_text("of the user")
    with whole(tmp_path / "dead") as part:
        left = part.with_name(part.name.replace(f".{os.getpid()}-", f".{dead_process()}-"))
    with whole(left):
        pass
    with whole(tmp_path / "living") as ours:
        sweep(tmp_path)
        assert set(tmp_path.iterdir()) == {tmp_path / ".notes.part", tmp_path / "dead", ours}


@pytest.mark.parametrize("whole", [True, False], ids=["replaced", "not replaced"])
def test_a_folder_that_was_on_its_way_out_comes_back_unless_the_new_one_is_there(whole, tmp_path):
    with whole_folder(tmp_path / "thing") as part:
        machine = part.name.split("-")[-1].removesuffix(".part")
        fill(part, "new")
    old = tmp_path / f".thing.{dead_process()}-{machine}.old"
    if not whole:
        (tmp_path / "thing").rename(old)
    else:
        shutil.copytree(tmp_path / "thing", old)
    sweep(tmp_path)
    assert content(tmp_path) == {"thing/flat.txt": "new", "thing/inner/deep.txt": "new"}


def test_of_two_processes_of_one_number_the_earlier_is_dead(tmp_path, monkeypatch):
    with whole_file(tmp_path / "thing") as part:
        for age, there in ((-1, True), (3600, False)):  # seconds from when the file was made to when we began
            monkeypatch.setattr(psutil.Process, "create_time", lambda self, age=age: part.stat().st_ctime + age)
            sweep(tmp_path)
            assert part.exists() == there
        part.touch()


def test_the_files_of_another_host_are_left_alone(tmp_path):
    path = tmp_path / f".thing.{dead_process()}-00000000.part"
    path.touch()
    sweep(tmp_path)
    assert path.exists()
