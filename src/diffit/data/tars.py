"""WebDataset's tars as a source: files that share a name up to the first dot are one sample, ``.cls`` its class.

The format: https://github.com/webdataset/webdataset.
"""

import re
import tarfile
from collections.abc import Sequence
from pathlib import Path

from diffit.data.bounds import require_bytes
from diffit.data.files import READ_ERRORS, BrokenImageError, reading
from diffit.data.formats import IMAGE_SUFFIXES
from diffit.data.names import HIDDEN, natural_key, safe_name
from diffit.errors import UserError

MAX_CLASS_BYTES = 20  # of a .cls file, which holds a number
Place = tuple[Path, int, int]  # the tar, and the first byte and the size of a file in it


def tars_in(folder: Path) -> list[Path]:
    """The tars of a folder that holds nothing else but files that describe them; none where it holds images."""
    items = [item for item in folder.iterdir() if not item.name.startswith(".")]
    if any(item.is_dir() or item.name.lower().endswith(IMAGE_SUFFIXES) for item in items):
        return []
    return sorted((item for item in items if item.suffix == ".tar"), key=lambda item: natural_key(item.name))


def list_tars(tars: Sequence[Path]) -> tuple[list[str], list[Place], list[int | None], list[str]]:
    """(names, places, labels, other files) of the images in ``tars``, tar by tar and in their order there.

    Nothing is unpacked. Raises UserError for a damaged or compressed tar, unsafe names and labels that are no class
    numbers.
    """
    places: dict[str, Place] = {}
    labels: dict[str, int] = {}
    ignored: list[str] = []
    for path in tars:
        try:
            with tarfile.open(path, "r:") as tar, path.open("rb") as file:
                for member in tar:
                    if not member.isfile():  # links too: what they point to may be anywhere
                        continue
                    name = safe_name(member.name, str(path))
                    if HIDDEN.search(name):  # a Mac adds one to each
                        continue
                    full = f"{path.stem}/{name}" if len(tars) > 1 else name
                    if name.lower().endswith(IMAGE_SUFFIXES):
                        places[full] = path, member.offset_data, member.size
                    elif name.endswith(".cls"):
                        file.seek(member.offset_data)
                        labels[_key(full)] = _class(file.read(min(member.size, MAX_CLASS_BYTES)), path, name)
                    else:
                        ignored.append(full)
        except (tarfile.TarError, *READ_ERRORS) as error:
            raise UserError(
                f"{path} cannot be read ({error}): it is damaged, or compressed; copy it again, or unpack it (gunzip)"
            ) from error
    return list(places), list(places.values()), [labels.get(_key(name)) for name in places], ignored


def read_place(place: Place, name: str) -> bytes:
    """An image from its tar. Raises BrokenImageError, naming it, for one that is cut short or too large."""
    path, start, size = place
    with reading(path, name):
        require_bytes(size)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(size)
    if len(data) < size:
        raise BrokenImageError(f"{path}: '{name}' cannot be read (the tar is cut short)")
    return data


def _key(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.split('.', 1)[0]}"


def _class(text: bytes, path: Path, name: str) -> int:
    if not re.fullmatch(rb"\s*\d{1,9}\s*", text):
        raise UserError(f"{path}: {name} holds {text!r}, not a class number such as 7; correct it, or leave it out")
    return int(text)
