"""Files and folders that are on disk whole or not at all."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffit.errors import UserError


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk or a missing right into a :class:`UserError` that names the place."""
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
        raise


@contextmanager
def whole_file(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Yields a path next to ``path``; what is written there takes its place at the end, or is removed on an error.

    Without ``sync`` a power cut may still take what was written last.
    """
    path = Path(path)
    with disk_errors(path):
        part = _beside(path)
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
        part = _beside(path)
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
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    shutil.rmtree(old, ignore_errors=True)  # of a killed process that had the same number
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    shutil.rmtree(old)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, none where there is no file; a last line that a kill cut off is left out.

    Raises UserError for a file that is not text and, with its number, for a damaged line before the last.
    """
    if not path.exists():
        return []
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
