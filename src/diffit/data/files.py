"""The files of a folder, a zip, or a folder of zips: listed, named safely, read, and worked through in order."""

import errno
import os
import shlex
import struct
import time
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from diffit.data.bounds import require_bytes
from diffit.data.formats import IMAGE_SUFFIXES, unread
from diffit.data.names import (
    HIDDEN,
    are_plain,
    name_some,
    natural_key,
    natural_sorted,
    readable,
    safe_name,
    visible_sorted,
)
from diffit.data.remote import DESCRIBING, Mirror, mirror_of
from diffit.data.sums import REMEDY, SUMS, format_sums, parse_sums
from diffit.data.zips import OTHER, Directory, Member, member_of, read_directory, read_member
from diffit.errors import UserError

T = TypeVar("T")
R = TypeVar("R")

SUMS_BYTES = 1 << 20, 1 << 10  # of dataset.sfv: in all, and for each file
ZIP_UTF8 = 0x800  # the flag of a zip's member whose name is UTF-8; the name of any other may be in any encoding
# RuntimeError is an encrypted member, NotImplementedError an unknown compression, ValueError a name that is not UTF-8.
READ_ERRORS = (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, struct.error)


class BrokenImageError(UserError):
    """One file that cannot be read or decoded; the others may be fine."""


def convert_command(path: Path, *options: str) -> str:
    """What a person types to convert ``path``; it may hold spaces."""
    return shlex.join(["diffit", "data", "convert", "--source", str(path), "--dest", "NEW.zip", *options])


def subset(count: int, max_images: int | None, seed: int) -> Sequence[int]:
    """Indices of a seeded random choice of ``max_images`` out of ``count``, ascending; all of them when None."""
    if max_images is not None and max_images < 1:
        raise UserError(f"max_images is {max_images}: use 1 or more, or leave it out for all {count} images")
    if max_images is None or max_images >= count:
        return range(count)
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


def shards_in(folder: Path) -> list[str]:
    """The zips in ``folder`` that together are one archive; none where it has folders or images next to them."""
    found = []
    for entry in os.scandir(folder):
        if not HIDDEN.search(entry.name):
            if entry.is_dir() or entry.name.lower().endswith(IMAGE_SUFFIXES):
                return []
            found.append(entry.name)
    return sorted((name for name in found if name.lower().endswith(".zip")), key=natural_key)


class FileTree:
    """The files of a folder, a zip, or a folder of zips by relative name with forward slashes; no hidden ones.

    In natural order, and those of several zips zip by zip; what such a folder holds next to its zips comes last.
    Safe to pickle and to fork: every process opens its own zip handles when it first reads.
    Raises UserError for a path that is none of them, a damaged zip, unsafe names, a name that is in two zips, and links
    that lead out of the folder.

    Attributes:
        zips: their paths; none for a folder of files.
        folders: that were listed.
        mirror: of an archive behind a URL, whose zips need not be here yet.
    """

    def __init__(self, path: str | Path, mirror: Mirror | None = None) -> None:
        self.mirror = mirror = mirror or mirror_of(path)
        self.path = Path(path) if mirror is None else mirror.path
        self.zips: list[Path] = []
        self.folders: list[Path] = []
        self._handles: tuple[int, dict[int, zipfile.ZipFile]] = (0, {})
        self._directories: dict[int, Directory] = {}
        self._stored: dict[str, str] = {}  # the few files whose name on disk or in the zip is another
        self._part: dict[str, int] = {}  # of a folder of zips: the zip that holds a file
        if self.path.is_dir():
            self.names = self._folder_names()
        elif self.path.is_file() or mirror is not None:
            self.zips = [self.path]
            self.names = self._zip_names(0)
        else:
            raise UserError(f"{path}: no such file or folder; check the spelling")
        self.images = [name for name in self.names if name.lower().endswith(IMAGE_SUFFIXES)]

    @cached_property
    def _listed(self) -> bytes | None:
        """``dataset.sfv`` as it is."""
        limit = SUMS_BYTES[0] + SUMS_BYTES[1] * len(self.names)
        return self.read(SUMS, limit) if SUMS in self.names else None

    @cached_property
    def sums(self) -> dict[str, int] | None:
        """CRC-32 of each file by ``dataset.sfv``, None without one. UserError for one that is damaged."""
        return None if self._listed is None else parse_sums(self._listed, f"{self.path}: {SUMS}")

    @cached_property
    def image_members(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """:meth:`members` of the images, in zips."""
        return self.members(self.images)

    @property
    def is_zip(self) -> bool:
        """Whether the images are in one zip or several."""
        return bool(self.zips)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handles": (0, {})}

    def _folder_names(self) -> list[str]:
        if self.mirror is not None:
            described = sorted(self.mirror.names.intersection(DESCRIBING))
            for name in described:
                self.mirror.fetch(name)
            return self._shard_names(sorted(self.mirror.names.difference(described), key=natural_key)) + described
        try:
            shards = shards_in(self.path)
            names = list(self._walk(self.path, ""))
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"{error.filename or self.path} cannot be listed ({reason}): check its permissions"
            ) from error
        if shards:
            return self._shard_names(shards) + visible_sorted([name for name in names if name not in shards])
        # Python keeps bytes that are not UTF-8 as lone surrogates, which no file and no terminal takes.
        foreign = [name for name in names if not name.isascii() and not _is_text(name)]
        return visible_sorted(self._rename(names, foreign, readable([os.fsencode(name) for name in foreign], "cp1252")))

    def _shard_names(self, shards: Sequence[str]) -> list[str]:
        self.zips, names = [self.path / shard for shard in shards], []
        for part, shard in enumerate(shards):
            for name in self._zip_names(part):
                if (other := self._part.setdefault(name, part)) != part:
                    raise UserError(
                        f"{self.path}: '{name}' is in {shards[other]} and in {shard}; the zips of one archive have "
                        "different files: write them again with `diffit data convert --shard-size`"
                    )
                names.append(name)
        return names

    def _rename(self, names: list[str], old: list[str], new: list[str]) -> list[str]:
        if not old:
            return names
        taken = set(names)
        for stored, name in zip(old, new, strict=True):
            if name not in taken and name not in self._stored:
                self._stored[name] = stored
            else:  # two names that read alike
                self._stored[ascii(stored)[1:-1]] = stored
        shown = {stored: name for name, stored in self._stored.items()}
        return [shown.get(name, name) for name in names]

    def _walk(self, folder: Path, prefix: str) -> Iterator[str]:
        self.folders.append(folder)
        for entry in os.scandir(folder):
            name = prefix + entry.name
            if HIDDEN.search(entry.name):  # what is in it would not be used
                continue
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

    def _zip_names(self, part: int) -> list[str]:
        path = self.zips[part]
        if self.mirror is None and path.suffix.lower() != ".zip" and not zipfile.is_zipfile(path):
            raise UserError(
                f"{path} is not a folder or zip of images: "
                f"`{convert_command(path)}` makes one from the formats that it knows"
            )
        if self.mirror is None and (directory := read_directory(path)) is not None:
            self._directories[part] = directory
            return self._named(path, directory.names, {})
        infos = [info for info in self._zip(part).infolist() if not info.is_dir()]
        raw = {}
        for info in infos:
            if not info.flag_bits & ZIP_UTF8 and not info.filename.isascii():
                with suppress(UnicodeEncodeError):  # a name that zipfile found noted down elsewhere
                    raw[info.filename] = info.filename.encode("cp437")
        texts = dict(zip(raw, readable(list(raw.values()), "cp437"), strict=True))
        return self._named(path, [info.filename for info in infos], texts)

    def _named(self, path: Path, stored: list[str], texts: dict[str, str]) -> list[str]:
        """The names that are shown, in order; ``texts`` has those whose encoding was guessed."""
        if not texts and are_plain(stored):
            return natural_sorted(list(dict.fromkeys(stored)))
        safe = [safe_name(texts.get(name, name), str(path)) for name in stored]
        changed = [(old, new) for old, new in zip(stored, safe, strict=True) if old != new]
        return visible_sorted(self._rename(stored, [old for old, _ in changed], [new for _, new in changed]))

    def _zip(self, part: int) -> zipfile.ZipFile:
        # After a fork the children share the parent's file offset, so a handle belongs to the process that made it.
        if self._handles[0] != os.getpid():
            self._handles = os.getpid(), {}
        handles = self._handles[1]
        if part not in handles:
            try:
                file = self.zips[part]
                handles[part] = zipfile.ZipFile(file if self.mirror is None else self.mirror.open(file.name))
            except READ_ERRORS as error:
                _require_room(error, self.path)
                raise UserError(
                    f"{self.zips[part]} cannot be read as a zip ({error}): it is damaged or incomplete, copy it again"
                ) from error
        return handles[part]

    def member(self, name: str) -> tuple[int, Member] | None:
        """Which of the zips holds a file, and where in it; None for a file on the disk."""
        part = 0 if self.zips == [self.path] else self._part.get(name)
        if part is None:
            return None
        stored, directory = self.stored_name(name), self._directories.get(part)
        return part, member_of(self._zip(part).getinfo(stored)) if directory is None else directory[stored]

    def members(self, names: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Of files in zips: (N,) the zips, and (N, 5) the fields of :class:`Member`."""
        parts = np.zeros(len(names), np.int32)
        if self._part:
            parts[:] = [self._part.get(name, 0) for name in names]
        found: list[npt.NDArray[np.int64]] = []
        stops = np.flatnonzero(np.diff(parts)) + 1
        for begin, end in pairwise([0, *stops.tolist(), len(names)]):
            part, group = int(parts[begin]), names[begin:end]
            stored = list(map(self.stored_name, group)) if self._stored else group
            directory = self._directories.get(part)
            if directory is None:
                known = self._zip(part)
                found.append(np.array([member_of(known.getinfo(name)) for name in stored], np.int64))
            else:
                found.append(directory.several(stored))
        return parts, np.concatenate(found)

    def stored_name(self, name: str) -> str:
        """What the disk or the zip calls a file."""
        return self._stored.get(name, name)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """The bytes of one file. Raises BrokenImageError for a damaged one, and above ``limit`` bytes unpacked.

        None is the limit of an image: a small zip can claim to unfold to terabytes.
        """
        with reading(self.path, name):
            found = self.member(name)
            if found is None:
                crc = None if name == SUMS else (self.sums or {}).get(name)
                return read_file(self.path / self.stored_name(name), crc, limit)
            part, member = found
            file = self.zips[part] if self.mirror is None else self.mirror.fetch(self.zips[part].name)
            if member.method == OTHER:
                require_bytes(member.size, limit)
                with zipfile.ZipFile(file) if self.mirror is not None else nullcontext(self._zip(part)) as known:
                    return known.read(self.stored_name(name))
            with file.open("rb") as opened:
                return read_member(opened.fileno(), member, limit)

    def checksum(self, name: str) -> tuple[int, int | None]:
        """(size, CRC-32) of one file, as a zip's directory or ``dataset.sfv`` has them; None where neither does."""
        if (found := self.member(name)) is not None:
            return found[1].size, found[1].crc
        return os.stat(self.path / self.stored_name(name)).st_size, (self.sums or {}).get(name)

    def altered(self, *others: str) -> list[str]:
        """How the images and ``others`` differ from what ``dataset.sfv`` lists, one line each; nothing without one.

        The bytes of a folder's files are compared when they are read.
        """
        if self._listed is None or self._is_as_listed(others):
            return []
        assert self.sums is not None
        names = set(self.names)
        known = [*self.images, *(name for name in others if name in names)]
        kinds = {
            "listed in it are not there": [name for name in self.sums if name not in names],
            "are not listed in it": [name for name in known if name not in self.sums],
        }
        if self.is_zip:
            zipped = known if self.zips == [self.path] else [name for name in known if name in self._part]
            crcs = self.members(zipped)[1][:, Member._fields.index("crc")].tolist()
            if list(map(self.sums.get, zipped)) != crcs:
                kinds["have another CRC-32"] = [
                    name for name, crc in zip(zipped, crcs, strict=True) if self.sums.get(name, crc) != crc
                ]
        return [
            f"{self.path}: of its files and {SUMS}, {len(found)} {what} ({name_some(found)}): {REMEDY}"
            for what, found in kinds.items()
            if found
        ]

    def _is_as_listed(self, others: Sequence[str]) -> bool:
        """Whether a zip is what its ``dataset.sfv`` says, to the letter, as ``convert`` writes it."""
        if self.zips != [self.path]:
            return False
        crcs = self.image_members[1][:, Member._fields.index("crc")].tolist()
        sums = zip([*self.images, *others], [*crcs, *map(self._sum, others)], strict=True)
        return self._listed == format_sums((name, crc) for name, crc in sums if crc is not None)

    def _sum(self, name: str) -> int | None:
        return self.checksum(name)[1] if name in self.names else None

    def num_bytes(self) -> int:
        """Size on disk."""
        if self.mirror is not None:
            return sum(size for _, size, _ in self.mirror.entries)
        files = [self.path / self.stored_name(name) for name in self.names if self.member(name) is None]
        return sum(os.stat(file).st_size for file in [*self.zips, *files])


def require_images(files: FileTree) -> list[str]:
    """The image names; UserError when there are none."""
    if files.images:
        return files.images
    if known := unread(files.names):
        raise UserError(f"{files.path} holds no image that can be read: {'; '.join(known)}")
    found = f"found {name_some(files.names)}" if files.names else "it is empty"
    raise UserError(f"{files.path} holds no images ({' '.join(IMAGE_SUFFIXES)}): {found}; check the path")


@contextmanager
def reading(path: Path, name: str) -> Iterator[None]:
    """Whatever is raised over a file that cannot be read, as a BrokenImageError that names it."""
    try:
        yield
    except READ_ERRORS as error:
        _require_room(error, path)
        reason = getattr(error, "strerror", None) or error
        raise BrokenImageError(f"{path}: '{name}' cannot be read ({reason})") from error


def _require_room(error: Exception, path: Path) -> None:
    """UserError where ``error`` is that too many files are open, which is the fault of none of them."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        raise UserError(f"{path}: too many files are open at once; raise the limit (ulimit -n 8192)") from error


def read_file(path: Path, crc: int | None, limit: int | None = None) -> bytes:
    """A file on the disk; OSError where its CRC-32 is not ``crc``, where that is known."""
    require_bytes(os.stat(path).st_size, limit)
    data = path.read_bytes()
    if crc is not None and zlib.crc32(data) != crc:
        raise OSError(f"damaged: its CRC-32 is not that in {SUMS}")
    return data


def _is_text(name: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in name)
