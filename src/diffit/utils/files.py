"""Files and folders that are on disk whole or not at all."""

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import platformdirs
import psutil

from diffit.errors import UserError


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _machine() -> str:
    """Eight digits for where a process number means something: this host and, of its containers, this one."""
    try:
        container = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        container = 0
    return f"{zlib.crc32(f'{socket.gethostname()} {container}'.encode()):08x}"


def _beside(path: Path, kind: str) -> Path:
    """A name next to ``path`` that says whose it is."""
    path = Path(os.path.abspath(path))  # "." has no name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}-{_machine()}.{kind}")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full or failing disk, or a missing right, into a :class:`UserError` that names the place."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent if path.parent.exists() else "/").free
            raise UserError(
                f"{path}: the disk is full ({free / 2**20:.0f} MiB free); make room and try again"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise UserError(f"{path}: not writable; choose another place") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"{path}: a file stands where a folder is needed; choose another place") from error
        if error.errno == errno.EISDIR:
            raise UserError(f"{path}: a folder stands where a file is to go; choose another place") from error
        if error.errno == errno.EIO:
            raise UserError(f"{error.filename or path}: the disk cannot be read or written; check it") from error
        raise


@contextmanager
def whole_file(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Yields a path next to ``path``; what is written there takes its place at the end, or is removed on an error.

    Without ``sync`` a power cut may still take what was written last.
    """
    path = Path(path)
    with disk_errors(path):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
        if path.exists() and not path.is_file():  # an administrator's command would put a file in place of /dev/null
            raise UserError(f"{path}: a device or pipe, which a file cannot replace; choose another place")
        part = _beside(path, "part")
        try:
            part.touch()
            mode = part.stat().st_mode  # that of ordinary files here; safetensors' would be for their owner alone
            yield part
            part.chmod(mode)
            if sync:
                _sync(part)
            os.replace(part, path)
            if sync:
                _sync(path.parent)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder; an older folder of that name is replaced."""
    path = Path(path)
    with disk_errors(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        if path.exists() and path.samefile(os.curdir):
            raise UserError(f"{path}: the current folder, which would be replaced as a whole; name another place")
        part = _beside(path, "part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
            _settle(part)
            _swap(part, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _settle(folder: Path) -> None:
    """Bring files and the folders that list them to the disk, readable like ordinary files."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for item in folder.rglob("*"):
        if item.is_file():
            item.chmod(mode)
        _sync(item)
    _sync(folder)


def _swap(new: Path, path: Path) -> None:
    if not path.exists():
        os.rename(new, path)
        return
    old = _beside(path, "old")
    shutil.rmtree(old, ignore_errors=True)  # of a killed process that had the same number
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def sweep(folder: Path) -> None:
    """Remove what dead processes of this host left half written in ``folder``, next to the files of living ones.

    An older folder whose replacement did not come gets its name back.
    """
    for path in folder.iterdir() if folder.is_dir() else ():
        match = re.fullmatch(r"\.(.+)\.(\d{1,9})-([0-9a-f]{8})\.(part|old)", path.name)
        if match is None or match[3] != _machine() or _has_writer(path, int(match[2])):
            continue
        with contextlib.suppress(OSError):  # it is in nobody's way
            target = path.with_name(match[1])
            if match[4] == "old" and not target.exists():
                path.rename(target)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _has_writer(path: Path, pid: int) -> bool:
    """Whether the process that made ``path`` lives: one that began later only has the same number."""
    try:
        process = psutil.Process(pid)
        # The minute is for a file server whose clock is behind.
        earlier: bool = process.create_time() < path.stat().st_ctime + 60
        return earlier and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, FileNotFoundError):
        return False
    except psutil.AccessDenied:
        return True


def cache_folder() -> Path:
    """Where what can be made again is kept; a user without a home has no such place, and nothing is kept."""
    if named := os.environ.get("DIFFIT_CACHE"):
        return Path(named)
    folder = platformdirs.user_cache_path("diffit")
    return folder if folder.is_absolute() else Path(os.devnull) / "none"  # "~" is nobody's folder here


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none where there is no file; a last line that a kill cut off is left out.

    Raises UserError for a file that is not text and, with its number, for a damaged line before the last.
    """
    if not path.exists():
        return []
    if path.is_char_device():  # /dev/zero has no end
        raise UserError(f"{path}: a device; expected a file with one JSON object on each line")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; expected one JSON object on each line") from None
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        elif number < len(lines):
            raise UserError(f"{path}: line {number} is not a JSON object; restore the file or remove that line")
    return found
