"""Files and folders that are on disk whole or not at all."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
        raise


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yields a path beside ``path``; what is written there takes its place at the end, or is removed on an error."""
    path = Path(path)
    with disk_errors(path):
        part = _beside(path)
        try:
            yield part
            _sync(part)
            os.replace(part, path)
            _sync(path.parent)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: str | Path) -> Iterator[Path]:
    """The same for a folder; an older folder of that name is replaced."""
    path = Path(path)
    with disk_errors(path):
        part = _beside(path)
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        try:
            yield part
            for item in part.rglob("*"):
                if item.is_file():
                    _sync(item)
            if path.exists():
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                os.rename(path, old)
                os.rename(part, path)
                shutil.rmtree(old)
            else:
                os.rename(part, path)
            _sync(path.parent)
        finally:
            shutil.rmtree(part, ignore_errors=True)
