"""The files of a folder or zip: listed, named safely, read, and worked through in order."""

import os
import re
import shlex
import struct
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from diffit.data.bounds import max_bytes
from diffit.data.formats import IMAGE_SUFFIXES
from diffit.data.sums import REMEDY, SUMS, parse_sums
from diffit.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

SUMS_BYTES = 1 << 20, 1 << 10  # of dataset.sfv: in all, and for each file
ZIP_UTF8 = 0x800  # the flag of a zip's member whose name is UTF-8; the name of any other may be in any encoding
# Kana, kanji and what goes with them, none of them next to a Latin letter.
_JAPANESE = re.compile(r"(?:(?<![A-Za-z])[\u3000-\u30ff\u4e00-\u9fff\uff01-\uff5e](?![A-Za-z])|[\x00-\x7f])*")
# RuntimeError is an encrypted member, NotImplementedError an unknown compression, ValueError a name that is not UTF-8.
READ_ERRORS = (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, struct.error)


class BrokenImageError(UserError):
    """One file that cannot be read or decoded; the others may be fine."""


def natural_key(name: str) -> tuple[list[list[Any]], str]:
    """Sort key: ``img2`` before ``img10``, folder by folder."""

    def component(text: str) -> list[Any]:
        # Digits compare as (length, text) rather than as int(): Python refuses to parse very long numbers.
        chunks = re.split(r"(\d+)", text)
        return [(len(c.lstrip("0")), c.lstrip("0")) if i % 2 else c for i, c in enumerate(chunks)]

    return [component(part) for part in name.split("/")], name  # the name itself decides between img1 and img01


def name_some(names: Sequence[str], limit: int = 3) -> str:
    """``a, b, c and 7 more``."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def convert_command(path: Path, *options: str) -> str:
    """What a person types to convert ``path``; it may hold spaces."""
    return shlex.join(["diffit", "data", "convert", "--source", str(path), "--dest", "NEW.zip", *options])


def subset(count: int, max_images: int | None, seed: int) -> list[int]:
    """Indices of a seeded random choice of ``max_images`` out of ``count``, ascending; all of them when None."""
    if max_images is not None and max_images < 1:
        raise UserError(f"max_images is {max_images}: use 1 or more, or leave it out for all {count} images")
    if max_images is None or max_images >= count:
        return list(range(count))
    return sorted(np.random.default_rng(seed).permutation(count)[:max_images].tolist())


def map_ordered(function: Callable[[T], R], items: Sequence[T], workers: int = 0) -> Iterator[R]:
    """``map`` on threads (0: one a CPU core, 16 at most), in order, a little ahead, so that memory stays flat.

    Threads are enough because Pillow and zlib release the GIL; below 64 x 64 pixels they cost more than they gain.
    """
    workers = workers or min(os.cpu_count() or 1, 16)
    if workers == 1:
        yield from map(function, items)
        return

    def work(part: Sequence[T]) -> tuple[list[R], float]:
        began = time.perf_counter()
        return [function(item) for item in part], (time.perf_counter() - began) / len(part)

    pending: deque[Future[tuple[list[R], float]]] = deque()
    start, chunk = 0, 1
    with ThreadPoolExecutor(workers) as pool:
        try:
            while start < len(items) or pending:
                while start < len(items) and len(pending) <= 2 * workers:
                    pending.append(pool.submit(work, items[start : start + chunk]))
                    start += chunk
                results, seconds = pending.popleft().result()
                # Several quick items at a time save hand-overs; large images go singly, since results wait in memory.
                chunk = min(max(int(0.01 / max(seconds, 1e-6)), 1), 64)
                yield from results
        finally:
            for future in pending:
                future.cancel()


def safe_name(raw: str, where: str) -> str:
    """Normalise a stored file name to ``a/b.png``; names that point outside their archive are a UserError."""
    name = raw.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name or re.match(r"[A-Za-z]:", name) or not parts:
        raise UserError(f"{where} holds the unsafe path {raw!r}, which points outside it: remove or rename that entry")
    return "/".join(parts)


def readable(raw: Sequence[bytes], fallback: str) -> list[str]:
    """Names whose encoding no one noted down, as text: UTF-8, Japanese Windows, or else ``fallback``."""
    for encoding in ("utf-8", "cp932"):
        try:
            texts = [name.decode(encoding) for name in raw]
        except UnicodeDecodeError:
            continue
        # Western names can pass for Japanese, but then their letters stand next to kanji.
        if encoding == "utf-8" or all(_JAPANESE.fullmatch(text) for text in texts):
            return texts
    return [name.decode(fallback, "backslashreplace") for name in raw]


class FileTree:
    """The files of a folder or zip by relative name with forward slashes; hidden files are left out.

    Safe to pickle and to fork: every process opens its own zip handle when it first reads.
    Raises UserError for a path that is neither, a damaged zip, unsafe names and links that lead out of the folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._handle: tuple[int, zipfile.ZipFile] | None = None
        self._stored: dict[str, str] = {}  # the few files whose name on disk or in the zip is another
        if self.path.is_dir():
            self.is_zip, names = False, self._folder_names()
        elif self.path.is_file():
            self.is_zip, names = True, self._zip_names()
        else:
            raise UserError(f"{path}: no such file or folder; check the spelling")
        visible = (n for n in names if not any(p.startswith(".") or p == "__MACOSX" for p in n.split("/")))
        self.names = sorted(dict.fromkeys(visible), key=natural_key)
        self.images = [name for name in self.names if name.lower().endswith(IMAGE_SUFFIXES)]
        self.sums: dict[str, int] | None = None
        if SUMS in self.names:
            self.sums = parse_sums(self.read(SUMS, SUMS_BYTES[0] + SUMS_BYTES[1] * len(self.names)), f"{path}: {SUMS}")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None}

    def _folder_names(self) -> list[str]:
        try:
            names = list(self._walk(self.path, ""))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{error.filename or self.path} cannot be listed ({reason}): check its permissions"
            ) from error
        # Python keeps bytes that are not UTF-8 as lone surrogates, which no file and no terminal takes.
        foreign = [name for name in names if not name.isascii() and not _is_text(name)]
        return self._rename(names, foreign, readable([os.fsencode(name) for name in foreign], "cp1252"))

    def _rename(self, names: list[str], old: list[str], new: list[str]) -> list[str]:
        taken = set(names)
        for stored, name in zip(old, new, strict=True):
            if name not in taken and name not in self._stored:
                self._stored[name] = stored
            else:  # two names that read alike
                self._stored[ascii(stored)[1:-1]] = stored
        shown = {stored: name for name, stored in self._stored.items()}
        return [shown.get(name, name) for name in names]

    def _walk(self, folder: Path, prefix: str) -> Iterator[str]:
        for entry in os.scandir(folder):
            name = prefix + entry.name
            # A link may show a file that the owner never meant to share, or lead in a circle.
            if entry.is_symlink() and (entry.is_dir() or not self._is_inside(entry.path)):
                raise UserError(
                    f"{entry.path} is a link that leads out of {self.path} or to a folder: "
                    f"replace links by files first (cp -rL {self.path} COPY)"
                )
            if entry.is_dir():
                yield from self._walk(Path(entry.path), name + "/")
            elif entry.is_file():
                yield name

    def _is_inside(self, path: str) -> bool:
        return Path(path).resolve().is_relative_to(self.path.resolve())

    def _zip_names(self) -> list[str]:
        if self.path.suffix.lower() != ".zip" and not zipfile.is_zipfile(self.path):
            raise UserError(
                f"{self.path} is not a folder or zip of images: "
                f"`{convert_command(self.path)}` makes one from the formats that it knows"
            )
        infos = [info for info in self._zip().infolist() if not info.is_dir()]
        raw = {}
        for info in infos:
            if not info.flag_bits & ZIP_UTF8 and not info.filename.isascii():
                with suppress(UnicodeEncodeError):  # a name that zipfile found noted down elsewhere
                    raw[info.filename] = info.filename.encode("cp437")
        texts = dict(zip(raw, readable(list(raw.values()), "cp437"), strict=True))
        stored = [info.filename for info in infos]
        safe = {name: safe_name(texts.get(name, name), str(self.path)) for name in stored}
        changed = [name for name in stored if safe[name] != name]
        return self._rename(stored, changed, [safe[name] for name in changed])

    def _zip(self) -> zipfile.ZipFile:
        # After a fork the children share the parent's file offset, so a handle belongs to the process that made it.
        if self._handle is None or self._handle[0] != os.getpid():
            try:
                self._handle = os.getpid(), zipfile.ZipFile(self.path)
            except READ_ERRORS as error:
                raise UserError(
                    f"{self.path} cannot be read as a zip ({error}): it is damaged or incomplete, copy it again"
                ) from error
        return self._handle[1]

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The bytes of one file. Raises BrokenImageError for a damaged one, and above ``limit`` bytes unpacked.

        None is the limit of an image: a small zip can claim to unfold to terabytes.
        """
        try:
            if self.is_zip:
                info = self._zip().getinfo(self._stored.get(name, name))
                size = info.file_size
            else:
                size = os.stat(self._on_disk(name)).st_size
            if size > (limit := max_bytes() if limit is None else limit):
                raise OSError(f"{size} bytes unpacked, more than the limit of {limit}")
            data = self._zip().read(info) if self.is_zip else self._on_disk(name).read_bytes()
            expected = None if self.is_zip or self.sums is None else self.sums.get(name)
            if expected is not None and zlib.crc32(data) != expected:
                raise OSError(f"damaged: its CRC-32 is not that in {SUMS}")
            return data
        except READ_ERRORS as error:
            reason = getattr(error, "strerror", None) or error
            raise BrokenImageError(f"{self.path}: '{name}' cannot be read ({reason})") from error

    def checksum(self, name: str, *, read: bool = True) -> tuple[int, int | None]:
        """(size, CRC-32) of one file, as a zip's directory or ``dataset.sfv`` has them.

        Otherwise the file is read for it, or, without ``read``, the second is None.
        """
        if self.is_zip:
            info = self._zip().getinfo(self._stored.get(name, name))
            return info.file_size, info.CRC
        if not read or (self.sums and name in self.sums):
            return os.stat(self._on_disk(name)).st_size, (self.sums or {}).get(name)
        data = self.read(name)
        return len(data), zlib.crc32(data)

    def altered(self, *others: str) -> list[str]:
        """How the images and ``others`` differ from what ``dataset.sfv`` lists, one line each; nothing without one.

        The bytes of a folder's files are compared when they are read.
        """
        if self.sums is None:
            return []
        names = set(self.names)
        known = [name for name in (*self.images, *others) if name in names]
        kinds = {
            "listed in it are not there": [name for name in self.sums if name not in names],
            "are not listed in it": [name for name in known if name not in self.sums],
        }
        if self.is_zip:
            listed = (name for name in known if name in self.sums)
            kinds["have another CRC-32"] = [name for name in listed if self.checksum(name)[1] != self.sums[name]]
        return [
            f"{self.path}: of its files and {SUMS}, {len(found)} {what} ({name_some(found)}): {REMEDY}"
            for what, found in kinds.items()
            if found
        ]

    def num_bytes(self) -> int:
        """Size on disk."""
        return sum(os.stat(f).st_size for f in ([self.path] if self.is_zip else map(self._on_disk, self.names)))

    def _on_disk(self, name: str) -> Path:
        return self.path / self._stored.get(name, name)


def _is_text(name: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in name)
