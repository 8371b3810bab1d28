"""Zips read in place: a member by its position, and the directory of a very large zip without an object a member.

PKWARE's APPNOTE.TXT 6.3.10 names the fields. What is not as plain as a directory of ours is left to :mod:`zipfile`.
"""

import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from diffit.data.bounds import require_bytes

LARGE = 20_000  # members from which zipfile's objects take long to make
END, END64, LOCATOR, ENTRY = b"PK\5\6", b"PK\6\6", b"PK\6\7", b"PK\1\2"
ENTRY_BYTES, LOCAL_BYTES = 46, 30
SLACK = 512  # bytes after a member's local header that are read at once: its name and the fields of some tool
PLAIN = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
OTHER = 255  # a method that zipfile is asked for, or an encrypted member
FULL = 0xFFFFFFFF  # stands for a number that a field of 64 bits has
FIELDS = {"flags": (8, "<u2"), "method": (10, "<u2"), "crc": (16, "<u4"), "packed": (20, "<u4"), "size": (24, "<u4"),
          "offset": (42, "<u4")}  # fmt: skip

Array = npt.NDArray[Any]


class Member(NamedTuple):
    """Where a file of a zip is, and what is known of it."""

    offset: int
    packed: int
    size: int
    crc: int
    method: int


def member_of(info: zipfile.ZipInfo) -> Member:
    method = info.compress_type if info.compress_type in PLAIN and not info.flag_bits & 1 else OTHER
    return Member(info.header_offset, info.compress_size, info.file_size, info.CRC, method)


def read_member(descriptor: int, member: Member, limit: int | None = None) -> bytes:
    """The bytes of one file. No file position is used, which processes that were forked would share.

    Raises OSError above ``limit`` bytes (None: that of an image) and BadZipFile for damage.
    """
    require_bytes(max(member.size, member.packed), limit)
    data = os.pread(descriptor, LOCAL_BYTES + SLACK + member.packed, member.offset)
    if data[:4] != b"PK\3\4":
        raise zipfile.BadZipFile("no file begins where the zip's directory says")
    begin = LOCAL_BYTES + sum(struct.unpack_from("<HH", data, 26))
    data = data[begin : begin + member.packed]
    if len(data) < member.packed:  # long fields of a tool of its own
        data += os.pread(descriptor, member.packed - len(data), member.offset + begin + len(data))
    if member.method == zipfile.ZIP_DEFLATED:
        data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size + 1)
    if len(data) != member.size or zlib.crc32(data) != member.crc:
        raise zipfile.BadZipFile("Bad CRC-32")
    return data


class Directory:
    """The members of a large zip, folders left out: their names, and arrays of what :class:`Member` has of each."""

    def __init__(self, names: list[str], arrays: dict[str, Array]) -> None:
        self.names = names
        self.members = np.stack([arrays[key] for key in Member._fields], axis=1)
        self._rows = {name: row for row, name in enumerate(names)}

    def __getitem__(self, name: str) -> Member:
        return Member(*self.members[self._rows[name]].tolist())

    def several(self, names: Sequence[str]) -> Array:
        """int64 (N, 5): the fields of a member in each row."""
        return self.members[list(map(self._rows.__getitem__, names))]


def read_directory(path: Path) -> Directory | None:
    """The directory of a zip with :data:`LARGE` members or more; None for all others, and what is not plain in it."""
    with path.open("rb") as file:
        found = _place(file)
        if found is None:
            return None
        entries, size, start, end = found
        before = end - size - start  # what some tools put before a zip is not counted in its offsets
        if entries < LARGE or before < 0:
            return None
        file.seek(end - size)
        data = file.read(size)
    return _parse(data, entries, before)


def _place(file: Any) -> tuple[int, int, int, int] | None:
    """(number of entries, bytes, offset by its own count, end) of the directory."""
    total = file.seek(0, os.SEEK_END)
    file.seek(max(total - 22, 0))
    last = file.read()
    if len(last) < 22 or last[:4] != END or last[-2:] != b"\0\0":  # a comment
        return None
    disk, first, here, entries, size, start, _ = struct.unpack("<4H2IH", last[4:])
    end = total - 22
    file.seek(max(total - 22 - 20, 0))
    locator = file.read(20)
    if locator[:4] == LOCATOR:
        end -= 20 + 56
        file.seek(end)
        record = file.read(56)
        if record[:4] != END64:
            return None
        _, _, _, disk, first, here, entries, size, start = struct.unpack("<Q2H2I4Q", record[4:])
    return None if disk or first or here != entries or not 0 < size <= end else (entries, size, start, end)


def _parse(data: bytes, entries: int, before: int) -> Directory | None:
    places: list[int] = []
    names: list[bytes] = []
    at, extras, lengths = 0, 0, struct.Struct("<3H").unpack_from
    try:
        for _ in range(entries):
            name, extra, comment = lengths(data, at + 28)
            places.append(at)
            at += ENTRY_BYTES
            names.append(data[at : at + name])
            at += name + extra + comment
            extras += extra
    except struct.error:
        return None
    if at != len(data):
        return None
    rows, raw = np.array(places), np.frombuffer(data, np.uint8)
    arrays: dict[str, Array] = {}
    for key, (begin, kind) in FIELDS.items():
        columns = rows[:, None] + (begin + np.arange(np.dtype(kind).itemsize))
        arrays[key] = raw[columns].view(kind)[:, 0].astype(np.int64)
    signatures = raw[rows[:, None] + np.arange(4)].view("<u4")[:, 0]
    if (signatures != int.from_bytes(ENTRY, "little")).any():
        return None
    large = (arrays["packed"] == FULL) | (arrays["size"] == FULL) | (arrays["offset"] == FULL)
    for row in np.flatnonzero(large).tolist():
        if not _large(data, places[row], arrays, row):
            return None
    try:
        # Of a name without the flag for UTF-8, zipfile guesses the encoding, or finds it in an extra field 0x7075.
        flagged = arrays["flags"] & 0x800 != 0
        if extras and not flagged.all() and b"\x75\x70" in data:
            return None
        together = b"\n".join(names)
        texts = together.decode("ascii").split("\n") if together.isascii() else []
        if len(texts) != len(names):
            kinds = ("utf-8" if flag else "ascii" for flag in flagged.tolist())
            texts = [name.decode(kind) for name, kind in zip(names, kinds, strict=True)]
    except UnicodeDecodeError:
        return None
    if b"\0" in together or len(set(texts)) != len(texts):
        return None
    arrays["offset"] += before
    odd = (arrays.pop("flags") & 1 != 0) | ~np.isin(arrays["method"], PLAIN)
    arrays["method"][odd] = OTHER
    files = [row for row, text in enumerate(texts) if not text.endswith("/")]
    return Directory([texts[row] for row in files], {key: array[files] for key, array in arrays.items()})


def _large(data: bytes, at: int, arrays: dict[str, Array], row: int) -> bool:
    """Take what does not fit into 32 bits from the extra field 1; whether it is there."""
    name, extra = struct.unpack_from("<2H", data, at + 28)
    begin = at + ENTRY_BYTES + name
    end = begin + extra
    while begin + 4 <= end:
        kind, length = struct.unpack_from("<2H", data, begin)
        begin += 4
        if kind == 1:
            wanted = [key for key in ("size", "packed", "offset") if arrays[key][row] == FULL]
            if length < 8 * len(wanted) or begin + length > end:
                return False
            numbers = struct.unpack_from(f"<{len(wanted)}Q", data, begin)
            for key, number in zip(wanted, numbers, strict=True):
                if number >= 1 << 63:
                    return False
                arrays[key][row] = number
            return True
        begin += length
    return False
