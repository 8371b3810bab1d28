"""Who may write in a folder: one living process, and after its death the next."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

from diffit.data.archive import ImageArchive
from diffit.errors import UserError
from diffit.utils import locks
from diffit.utils.locks import exclusive
from helpers import write_archive

HOLD = """
import os, signal, sys, time
from pathlib import Path
from diffit.utils import locks
locks.HEARTBEAT, locks.LEASE = 0.1, 2.0
with locks.exclusive(Path(sys.argv[1]), "go elsewhere"):
    print("held", flush=True)
    {then}
"""


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.1)
    monkeypatch.setattr(locks, "LEASE", 2.0)
    yield
    locks.lost.clear()


def holding(folder: Path, then: str) -> subprocess.Popen:
    """A process that has the lock, and goes on with ``then``."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(then=then), str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def lock_of(folder: Path, **changes: object) -> None:
    """Leave a lock whose record differs from ours in ``changes``."""
    with exclusive(folder, ""):
        record = dict(line.partition("=")[::2] for line in (folder / ".lock").read_text().splitlines())
    record |= {key: str(value) for key, value in changes.items()}
    (folder / ".lock").write_text("".join(f"{key}={value}\n" if value else f"{key}\n" for key, value in record.items()))


def test_the_second_is_told_who_holds_it_in_one_line_and_the_first_is_not_disturbed(tmp_path):
    process = holding(tmp_path, "time.sleep(60)")
    with pytest.raises(UserError) as caught, exclusive(tmp_path, "use another --outdir"):
        pass
    today = time.strftime("%Y-%m-%d")
    start = f"{tmp_path}: in use by process {process.pid} on {socket.gethostname()} since {today}"
    assert str(caught.value).startswith(start)
    assert str(caught.value).endswith("; wait for it, or use another --outdir")
    assert (tmp_path / ".lock").exists()
    process.kill()
    process.wait()


def test_a_thread_of_the_same_process_is_told_as_well(tmp_path):
    with exclusive(tmp_path, ""), pytest.raises(UserError, match=f"in use by process {os.getpid()} "):  # noqa: SIM117
        with exclusive(tmp_path, ""):
            pass


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_it_is_released_however_the_block_ends(tmp_path, error):
    with pytest.raises(error), exclusive(tmp_path, ""):
        raise error
    assert not list(tmp_path.iterdir())


def test_the_lock_of_a_file_is_next_to_it(tmp_path):
    with exclusive(tmp_path / "a.zip", "", beside=True), exclusive(tmp_path / "b.zip", "", beside=True):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".a.zip.lock", ".b.zip.lock"]


def test_a_killed_process_is_followed_at_once(tmp_path):
    process = holding(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    process.wait()
    assert (tmp_path / ".lock").exists()
    began = time.monotonic()
    with exclusive(tmp_path, ""):
        assert time.monotonic() - began < locks.LEASE / 2
    assert not list(tmp_path.iterdir())


def test_another_process_of_the_same_number_is_not_taken_for_the_holder(tmp_path):
    lock_of(tmp_path, start=1)
    began = time.monotonic()
    with exclusive(tmp_path, ""):
        assert time.monotonic() - began < locks.LEASE / 2


def test_a_process_of_another_host_is_dead_when_its_heartbeat_stops(tmp_path, caplog):
    lock_of(tmp_path, host="elsewhere", pid=os.getpid())
    began = time.monotonic()
    with exclusive(tmp_path, ""):
        assert locks.LEASE <= time.monotonic() - began < 3 * locks.LEASE
    assert f"no heartbeat of process {os.getpid()} on elsewhere; waiting" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_process_of_another_host_that_has_a_heartbeat_is_alive(tmp_path):
    lock_of(tmp_path, host="elsewhere")
    beat = threading.Timer(0.3, lambda: os.utime(tmp_path / ".lock"))
    beat.start()
    with pytest.raises(UserError, match=rf"process {os.getpid()} on elsewhere; wait for it"), exclusive(tmp_path, ""):
        pass
    beat.join()


@pytest.mark.slow
def test_a_stopped_process_is_not_dead(tmp_path):
    process = holding(tmp_path, "time.sleep(60)")
    process.send_signal(signal.SIGSTOP)
    time.sleep(1.2 * locks.LEASE)
    with pytest.raises(UserError, match=f"process {process.pid} "), exclusive(tmp_path, ""):
        pass
    process.kill()
    process.wait()


@pytest.mark.slow
def test_half_a_lock_does_not_bar_the_folder_for_ever(tmp_path, monkeypatch):
    """A process may die between making the file and writing into it; filelock waits two seconds before it says so."""
    monkeypatch.setattr(locks, "LEASE", 4.0)
    (tmp_path / ".lock").write_text("filelock/2\npid=12")
    with exclusive(tmp_path, ""):
        pass


@pytest.mark.slow
def test_of_many_that_find_a_dead_lock_one_at_a_time_has_it(tmp_path):
    lock_of(tmp_path, start=1)
    then = "log = open(sys.argv[1] + '/log', 'a'); log.write('in '); log.flush(); time.sleep(0.05); log.write('out ')"
    code = HOLD.format(then=then).replace(
        "with locks", "time.sleep(max(0, float(sys.argv[2]) - time.time()))\nwith locks"
    )
    at = str(time.time() + 3)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path), at], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for _ in range(4)
    ]
    outputs = [racer.communicate() for racer in racers]
    log = (tmp_path / "log").read_text().split()
    assert log == ["in", "out"] * sum(held == b"held\n" for held, _ in outputs)
    assert log
    assert all(held or b"UserError" in error for held, error in outputs)


def test_who_loses_the_lock_is_stopped(tmp_path, caplog):
    def lose_it() -> None:
        other = tmp_path / "other"
        other.write_text((tmp_path / ".lock").read_text())
        other.rename(tmp_path / ".lock")
        for _ in range(3000):  # until the next heartbeat, which a busy machine delays
            time.sleep(0.01)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    with pytest.raises(KeyboardInterrupt), exclusive(tmp_path, ""):
        lose_it()
    signal.signal(signal.SIGINT, before)
    assert "took this one for dead" in caplog.text
    assert (tmp_path / ".lock").exists(), "it is the other's now"


def test_a_lock_is_no_image(tmp_path):
    write_archive(tmp_path / "a.zip", 3)
    (tmp_path / "a").mkdir()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        archive.extractall(tmp_path / "a")
    with exclusive(tmp_path / "a", ""):
        assert len(ImageArchive(tmp_path / "a")) == 3


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file stands where a folder is needed"), exclusive(tmp_path / "file", ""):
        pass
