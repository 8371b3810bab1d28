"""Archives behind a URL, through fsspec: a zip, or a folder of zips, each fetched whole when it is first read."""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from filelock import FileLock

from diffit.errors import UserError, install_hint
from diffit.utils.files import cache_folder, disk_errors
from diffit.utils.urls import public, remember, whole

SCHEMES = ("s3", "gs", "gcs", "hf", "http", "https", "file")
DESCRIBING = ("dataset.json", "dataset.sfv")
# What tells one content of a file from another, as the file systems call it.
VERSIONS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "mtime", "last_modified", "LastModified", "updated")
PIECE = 8 << 20  # bytes fetched at a time
TRIES = 3


def url_of(path: str | Path) -> str | None:
    """The URL that ``path`` is, also where a :class:`Path` has taken a slash from it; None for a path on the disk."""
    match = re.fullmatch(rf"({'|'.join(SCHEMES)}):/+([^/].*)", str(path))
    if match is None:
        return None
    url = f"{match[1]}://{'/' if match[1] == 'file' else ''}{match[2]}"
    return url if "?" in url else url.rstrip("/")


class Mirror:
    """A folder of the cache with what has been fetched of the archive at ``url``. Safe to fork and to pickle.

    Attributes:
        url: as it may be shown and recorded.
        path: of the archive: the folder, or the place of the one zip in it.
        entries: (name, size, version) of its zips and of what describes them, by name. Where these change,
            the folder is another one.

    Raises UserError for what cannot be reached and what is no archive.
    """

    def __init__(self, url: str) -> None:
        self.url = url = remember(url)
        self._whole = whole(url)
        single = url.lower().endswith(".zip")
        if not single and self._whole != url:
            raise UserError(f"{url}: not one zip by its name, and a signed URL is of one file; name a zip")
        with self._connected() as (files, root):
            listed = [files.info(root)] if single else files.ls(root, detail=True)
            found = {
                (url if single else str(info["name"])).rstrip("/").rsplit("/", 1)[-1]: info
                for info in listed
                if info["type"] != "directory"
            }
        if unknown := next((name for name, info in found.items() if info["size"] is None), None):
            raise UserError(f"{url}: the server does not say how large {unknown} is; fetch it, or name another place")
        self.entries: list[tuple[str, int, str]] = [
            (name, int(info["size"]), next((str(info[key]) for key in VERSIONS if info.get(key) is not None), ""))
            for name, info in sorted(found.items())
            if name in DESCRIBING or name.lower().endswith(".zip")
        ]
        if not any(name not in DESCRIBING for name, _, _ in self.entries):
            raise UserError(f"{url}: no zips there; `diffit data convert --shard-size 4GiB` writes a folder of them")
        mark = hashlib.sha256(json.dumps([url, self.entries]).encode()).hexdigest()[:16]
        stem = re.sub(r"[^\w.-]+", "_", url.rsplit("/", 1)[-1].removesuffix(".zip")) or "archive"
        self.folder = cache_folder() / "remote" / mark / stem
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / self.entries[0][0] if single else self.folder

    @property
    def names(self) -> set[str]:
        return {name for name, _, _ in self.entries}

    def size(self, name: str) -> int:
        return next(size for known, size, _ in self.entries if known == name)

    def open(self, name: str) -> BinaryIO:
        """A file as far as it is read: of a zip, the directory at its end."""
        if (local := self.folder / name).exists():
            return local.open("rb")
        with self._connected() as (files, root):
            source = files.open(self._place(root, name), "rb")
            if _is_seekable(source):
                return cast(BinaryIO, _Remote(source, self._explained))
        return self.fetch(name).open("rb")

    def fetch(self, name: str) -> Path:
        """The whole file on this disk. One process fetches it, from where an earlier one was interrupted."""
        local = self.folder / name
        if local.exists():
            return local
        with disk_errors(local), FileLock(self.folder / f".{name}.lock"):
            for attempt in range(TRIES):
                if local.exists():
                    break
                try:
                    self._fetch(name, local.with_name(f".{name}.part"))
                except UserError:
                    if attempt == TRIES - 1:
                        raise
        return local

    def _fetch(self, name: str, part: Path) -> None:
        size = self.size(name)
        with part.open("ab") as file:
            with self._connected() as (files, root):
                source = files.open(self._place(root, name), "rb", block_size=PIECE, cache_type="readahead")
            with source:
                if file.tell() > size or not _is_seekable(source):
                    file.truncate(0)
                source.seek(file.seek(0, os.SEEK_END))
                while piece := self._read(source):
                    file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if part.stat().st_size != size:
            part.unlink()
            raise UserError(f"{self.url}: {name} is not the {size} bytes that were listed; try again")
        part.replace(self.folder / name)

    def _read(self, source: Any) -> bytes:
        with self._explained():
            piece: bytes = source.read(PIECE)
            return piece

    def _place(self, root: str, name: str) -> str:
        return root if self.path != self.folder else f"{root.rstrip('/')}/{name}"

    @contextmanager
    def _connected(self) -> Iterator[tuple[Any, str]]:
        """The file system and the place in it, made where they are used: connections do not survive a fork."""
        scheme = self.url.split(":", 1)[0]
        with self._explained():
            try:
                from fsspec.core import url_to_fs

                files, root = url_to_fs(self._whole)
            except ImportError as error:
                remedy = "pip install gcsfs" if scheme in ("gs", "gcs") else install_hint("remote")
                raise UserError(f"{self.url}: {scheme}:// needs another package: {remedy}") from error
            yield files, root

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except Exception as error:  # every service has errors of its own
            # FileNotFoundError is fsspec's word for whatever a web server answers but the file.
            cause = error.__cause__ or error if isinstance(error, FileNotFoundError) else error
            if isinstance(error, FileNotFoundError) and getattr(cause, "status", 404) == 404:
                raise UserError(f"{self.url}: not there; check the spelling") from None
            reason = public(str(cause)) or type(cause).__name__
            raise UserError(
                f"{self.url}: cannot be read ({reason}); check the connection and the credentials"
            ) from None


class _Remote:
    """A file as :mod:`zipfile` reads it, which would call it no zip where the service fails."""

    def __init__(self, file: Any, explained: Callable[[], AbstractContextManager[None]]) -> None:
        self.file, self.explained = file, explained

    def read(self, size: int = -1) -> bytes:
        with self.explained():
            piece: bytes = self.file.read(size)
            return piece

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with self.explained():
            place: int = self.file.seek(offset, whence)
            return place

    def tell(self) -> int:
        place: int = self.file.tell()
        return place

    def seekable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()


def _is_seekable(source: Any) -> bool:
    """Whether a file can be read from any place; some servers send whole files only, whose ``seekable`` fsspec says."""
    try:
        source.seek(0, os.SEEK_END)
        source.seek(0)
    except (ValueError, OSError):
        return False
    return bool(source.seekable())


def mirror_of(path: str | Path) -> Mirror | None:
    """The mirror of a URL; None for a path on the disk."""
    url = url_of(path)
    return None if url is None else Mirror(url)
