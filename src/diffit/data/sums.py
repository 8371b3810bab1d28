"""``dataset.sfv``: the CRC-32 of every file of an archive, so that what the disk has changed is noticed on reading.

One line a file, its name and eight hexadecimal digits, as ``cksfv`` and ``rhash`` check it. Readers of the StyleGAN and
EDM layout pass over it. An archive without one is read as it is.
"""

import re
from collections.abc import Iterable

from diffit.errors import UserError

SUMS = "dataset.sfv"
LINES = re.compile(rb"(?:[^\n]* [0-9a-f]{8}\n)*+")
REMEDY = f"copy the archive again; if the change is meant, remove {SUMS} from it or write it again with `diffit data`"


def format_sums(sums: Iterable[tuple[str, int]]) -> bytes:
    """The file for names and their CRC-32s."""
    return "".join([f"{name} {crc:08x}\n" for name, crc in sums]).encode()


def parse_sums(data: bytes, where: str) -> dict[str, int]:
    """CRC-32 by name. UserError for anything that :func:`format_sums` would not have written: it may be damage too."""
    try:
        lines = data.decode().split("\n")
        sums = {line[:-9]: int(line[-8:], 16) for line in lines[:-1]}
    except ValueError:
        lines, sums = [], {}
    if len(sums) != len(lines) - 1 or not LINES.fullmatch(data):
        raise UserError(f"{where} is damaged: {REMEDY}")
    return sums
