"""Readers of raw image collections, each giving a :class:`Source`: names, labels and a way to read the i-th image."""

import gzip
import io
import math
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from diffit.data.archive import decoding, open_image
from diffit.data.bounds import VARIABLE, max_bytes, max_pixels, require_size
from diffit.data.files import BrokenImageError, FileTree, require_images
from diffit.data.formats import suffix_of
from diffit.data.labels import META, read_labels
from diffit.data.names import name_some, natural_key
from diffit.data.parquet import Tables, tables_in
from diffit.data.remote import url_of
from diffit.data.sums import SUMS
from diffit.data.tars import list_tars, read_place, tars_in
from diffit.errors import UserError, install_hint

Pixels = npt.NDArray[np.uint8]
IDX_IMAGES = re.compile(r"images[-.]idx3-ubyte(\.gz)?$")
MAX_TAR_MEMBER = 1 << 26  # a CIFAR batch has 31 MB
MAX_TAR_MEMBERS = 100  # of which CIFAR-10 has 9
MAX_IDX_BYTES = 1 << 30  # of a compressed file; what is not compressed stays on the disk
SEVERAL_FRAMES = (".gif", ".png", ".apng", ".webp", ".tif", ".tiff", ".avif")
CLASS_ORDERS = ("natural", "plain")


@dataclass
class Source:
    """Raw images. ``read(i)`` gives encoded bytes or pixels, uint8 (H, W) or (H, W, 3)."""

    kind: str
    names: list[str]
    read: Callable[[int], bytes | Pixels]
    labels: list[int | None]
    class_names: list[str] | None = None
    ignored: list[str] = field(default_factory=list)  # files that are not images
    notes: list[str] = field(default_factory=list)  # what a person should know of it, one line each
    frames: list[tuple[int, int]] | None = None  # (file, frame) of each image, where a file may hold several
    _opened: threading.local = field(default_factory=threading.local, repr=False)

    def open(self, index: int, *, fresh: bool = False) -> Image.Image:
        """The i-th image in its own mode, its pixels not yet loaded. Raises BrokenImageError.

        A thread that asks for one frame after another gets the same object, unless ``fresh``, with the next one in it:
        a frame is decoded from those before it.
        """
        file, frame = self.frames[index] if self.frames else (index, 0)
        image: Image.Image | None
        last, image = self._opened.__dict__.pop("last", ((-1, 0), None))
        if image is None or fresh or last[0] != file or last[1] >= frame:
            data = self.read(file)
            if not isinstance(data, bytes):
                return Image.fromarray(data)
            image = open_image(data, self.names[index], header_only=True)
        with decoding(self.names[index]):
            if frame:
                image.seek(frame)
                require_size(*image.size)  # pages may have sizes of their own
        if self.frames and not fresh:
            self._opened.last = (file, frame), image
        return image

    @property
    def unlabelled(self) -> list[str]:
        return [name for name, label in zip(self.names, self.labels, strict=True) if label is None]

    def with_all_frames(self) -> "Source":
        """Every frame and page as an image of its own."""
        frames: list[tuple[int, int]] = []
        for file, name in enumerate(self.names):
            count = 1
            if suffix_of(name) in SEVERAL_FRAMES or "." not in name:
                with suppress(BrokenImageError), decoding(name):  # met again when its turn comes
                    count = frame_count(self.open(file))
            frames += [(file, frame) for frame in range(count)]
        names = [self.names[file] + (f"[{frame}]" if frame else "") for file, frame in frames]
        return replace(self, names=names, labels=[self.labels[file] for file, _ in frames], frames=frames)


def frame_count(image: Image.Image) -> int:
    """Of an animation, or pages of a file; 1 for all else: the second picture in a camera's JPEG is a preview."""
    return getattr(image, "n_frames", 1) if image.format in ("GIF", "PNG", "WEBP", "TIFF", "AVIF") else 1


def open_source(path: str | Path, *, cond: bool = False, class_order: str = "natural") -> Source:
    """Recognise what ``path`` is and list it, without decoding any image.

    ``cond`` says that labels are wanted, so that any folders count as classes; ``class_order`` how they are numbered.
    Raises UserError for a path that is missing, of no known kind, damaged or unsafe.
    """
    if url_of(path) is not None:
        return _tree(path, cond, class_order)
    path = Path(path)
    if path.is_dir():
        if (path / "data.mdb").is_file():
            return _lmdb(path)
        if idx := _idx_in(path):
            return _idx(idx)
        if tars := tars_in(path):
            return _tars(tars)
        tables, notes = tables_in(path)
        if tables:
            return _tables(tables, notes)
        return _tree(path, cond, class_order)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; check the spelling")
    with open(path, "rb") as file:
        start = file.read(4)
    if IDX_IMAGES.search(path.name) or start == b"\x00\x00\x08\x03":
        return _idx(path)
    if path.name.endswith((".tar", ".tar.gz", ".tgz")):
        return _tars([path]) if path.suffix == ".tar" and not _is_cifar10(path) else _cifar10(path)
    if start == b"PAR1":
        return _tables([path], [])
    if path.suffix.lower() == ".zip" or start == b"PK\x03\x04":
        return _tree(path, cond, class_order)
    raise UserError(
        f"{path} is none of the known sources: a folder or zip of images, cifar-10-python.tar.gz, WebDataset's tars, "
        "Parquet tables of the Hugging Face Hub, an MNIST idx file (train-images-idx3-ubyte.gz) or an LMDB folder"
    )


def _tree(path: str | Path, cond: bool, class_order: str) -> Source:
    files = FileTree(path)
    _ = files.sums  # what is wrong with them is said before anything is written
    names = require_images(files)
    table, class_names = read_labels(files)
    notes: list[str] = []
    labels: list[int | None]
    if table is not None:
        kind, labels = f"with {META}", [table.get(name) for name in names]
    else:
        labels, class_names, notes = labels_from_folders(names, cond, class_order)
        kind = "of class folders" if class_names and None not in labels else "of images"
    images = set(names)
    ignored = [name for name in files.names if name not in images and name not in (META, SUMS)]
    kind = f"{'zip' if files.zips == [files.path] else 'folder of zips' if files.is_zip else 'folder'} {kind}"
    return Source(kind, names, lambda i: files.read(names[i]), labels, class_names, ignored, notes)


def labels_from_folders(
    names: list[str], cond: bool, order: str = "natural"
) -> tuple[list[int | None], list[str] | None, list[str]]:
    """(labels, class names or None, notes). Classes are the folders below whatever folders all images share.

    ``order`` is natural (``2`` before ``10``) or plain (by character). Folders that only split a large collection
    (see :func:`_are_parts`) are classes only if ``cond`` says so.
    """
    folders = [name.split("/")[:-1] for name in names]
    shared = folders[0]
    for folder in folders:
        while folder[: len(shared)] != shared:
            shared = shared[:-1]
    depth = len(shared)
    classes = [folder[depth] if len(folder) > depth else None for folder in folders]
    found = {c for c in classes if c is not None}
    natural, plain = sorted(found, key=natural_key), sorted(found)
    if not found or (not cond and _are_parts(natural)):
        notes = [f"folders {name_some(natural)} are parts of one collection; --cond makes them classes"]
        return [None] * len(names), None, notes if found else []
    notes = []
    if natural != plain and order == "natural":
        notes = [
            f"classes are in natural order ({name_some(natural, 12)}); EDM's and other tools sort by character "
            f"({name_some(plain, 12)}), as --class-order plain does"
        ]
    ordered = natural if order == "natural" else plain
    number = {c: i for i, c in enumerate(ordered)}
    return [None if c is None else number[c] for c in classes], ordered, notes


def _are_parts(folders: Sequence[str]) -> bool:
    """``00000``, ``00001``, … or ``00000``, ``01000``, …, as archives number them; identities have gaps."""
    if not all(re.fullmatch(r"[0-9]{5,19}", folder) for folder in folders):
        return False
    numbers = [int(folder) for folder in folders]
    return numbers == list(range(len(numbers))) or all(number % 1000 == 0 for number in numbers)


class _InertUnpickler(pickle.Unpickler):
    """Reads CIFAR's batches without running anything that the file names.

    A pickle is a program that may call whatever it can import. Here an import never happens: the four names that
    numpy arrays and byte strings need are answered by the harmless stand-ins below, every other one is refused.
    """

    def find_class(self, module: str, name: str) -> Any:
        stand_ins: dict[tuple[str, str], Any] = {
            ("numpy.core.multiarray", "_reconstruct"): _Array,
            ("numpy._core.multiarray", "_reconstruct"): _Array,
            ("numpy", "ndarray"): "ndarray",
            ("numpy", "dtype"): _Dtype,
            ("_codecs", "encode"): _encode,
        }
        if (module, name) not in stand_ins:
            raise UserError(f"it asks for {module}.{name}, which no CIFAR-10 file needs: refused as unsafe")
        return stand_ins[module, name]


class _Dtype:
    def __init__(self, code: Any, *flags: Any) -> None:
        self.code = code.decode() if isinstance(code, bytes) else code

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """What numpy's pickled array holds, kept as plain values."""

    def __init__(self, *_: Any) -> None:
        self.pixels: Pixels | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if dtype.code == "u1" and not fortran:
            self.pixels = np.frombuffer(raw, np.uint8).reshape(shape)


def _encode(text: str, encoding: str) -> bytes:
    return text.encode("latin1")


def _unpickle(data: bytes, where: str) -> dict[bytes, Any]:
    try:
        content = _InertUnpickler(io.BytesIO(data), encoding="bytes").load()
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except Exception as error:  # damaged pickles fail in many ways
        raise UserError(f"{where} is damaged ({error or type(error).__name__}): download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{where} is not a CIFAR-10 batch: download cifar-10-python.tar.gz again")
    return {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}


def _batch(content: dict[bytes, Any], where: str) -> tuple[Pixels, list[int]]:
    """(pixels (N, 32, 32, 3), N labels) of one CIFAR batch, whose images are stored (3, 32, 32)."""
    data, labels = content.get(b"data"), content.get(b"labels")
    pixels = data.pixels if isinstance(data, _Array) else None
    if pixels is None or not isinstance(labels, list) or pixels.shape != (len(labels), 3072):
        raise UserError(f"{where} is not a CIFAR-10 batch (N x 3072 bytes with N labels): download it again")
    if not all(isinstance(label, int) and 0 <= label < 10 for label in labels):
        raise UserError(f"{where} has labels outside 0 to 9: download it again")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _tars(paths: list[Path]) -> Source:
    names, places, labels, ignored = list_tars(paths)
    if not names:
        raise UserError(f"{paths[0]} holds no images: found {name_some(ignored) or 'nothing'}; check the path")
    kind = f"WebDataset of {len(paths)} tars" if len(paths) > 1 else "WebDataset"
    return Source(kind, names, lambda i: read_place(places[i], names[i]), labels, ignored=ignored)


def _tables(paths: list[Path], notes: list[str]) -> Source:
    tables = Tables(paths)
    kind = f"{len(paths)} Parquet tables" if len(paths) > 1 else "Parquet table"
    return Source(kind, tables.names, tables.read, tables.labels, tables.class_names, notes=[*notes, *tables.notes])


def _is_cifar10(path: Path) -> bool:
    """By the names at the beginning."""
    with suppress(tarfile.TarError, OSError), tarfile.open(path, "r:") as tar:
        return any("data_batch" in member.name for member in islice(tar, MAX_TAR_MEMBERS))
    return False


def _cifar10(path: Path) -> Source:
    wanted = [f"data_batch_{i}" for i in range(1, 6)]
    found: dict[str, dict[bytes, Any]] = {}
    try:
        with tarfile.open(path, "r|*") as tar:  # members are read in memory and never unpacked to disk
            for count, member in enumerate(tar):
                if member.size > MAX_TAR_MEMBER or count >= MAX_TAR_MEMBERS:
                    raise UserError(
                        f"{path}: more than {MAX_TAR_MEMBERS} members or {MAX_TAR_MEMBER} bytes in one, which "
                        "CIFAR-10 has not: unpack any other tar file and use its folder"
                    )
                name = member.name.rsplit("/", 1)[-1]
                if member.isfile() and name in [*wanted, "batches.meta"]:
                    file = tar.extractfile(member)
                    assert file is not None
                    found[name] = _unpickle(file.read(), f"{path}: {name}")
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): it is damaged or incomplete, download it again") from error
    if missing := [name for name in wanted if name not in found]:
        raise UserError(
            f"{path} lacks {', '.join(missing)}: the only tar file that is read is cifar-10-python.tar.gz; "
            "unpack any other one and use its folder"
        )
    batches = [_batch(found[name], f"{path}: {name}") for name in wanted]
    images = np.concatenate([pixels for pixels, _ in batches])
    labels: list[int | None] = [label for _, batch_labels in batches for label in batch_labels]
    names = [f"{name}/{i:04d}" for name, (pixels, _) in zip(wanted, batches, strict=True) for i in range(len(pixels))]
    meta = found.get("batches.meta", {}).get(b"label_names", [])
    class_names = [c.decode() if isinstance(c, bytes) else str(c) for c in meta] or None
    return Source("CIFAR-10 batches (the training images)", names, lambda i: images[i], labels, class_names)


def _idx_in(folder: Path) -> Path | None:
    """The images file of an MNIST folder: the training images where there are several."""
    found = sorted(f for f in folder.iterdir() if f.is_file() and IDX_IMAGES.search(f.name))
    return next((f for f in found if f.name.startswith("train")), found[0] if found else None)


def _idx(path: Path) -> Source:
    images = _read_idx(path, 3)
    name = path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    candidates = [f for f in (path.with_name(name), path.with_name(name + ".gz")) if f.is_file() and f != path]
    labels: list[int | None] = [None] * len(images)
    if candidates:
        values = _read_idx(candidates[0], 1)
        if len(values) != len(images):
            raise UserError(f"{candidates[0]} has {len(values)} labels for the {len(images)} images of {path.name}")
        labels = values.tolist()
    names = [f"{path.name}[{i}]" for i in range(len(images))]
    kind = "MNIST idx file" + (f" with {candidates[0].name}" if candidates else f" (no {name}[.gz] next to it)")
    return Source(kind, names, lambda i: images[i], labels)


def _read_idx(path: Path, dims: int) -> Pixels:
    """An idx file of unsigned bytes: 2 zero bytes, type 8, number of dimensions, big-endian sizes, data.

    What is not compressed stays on the disk until it is used.
    """
    packed = path.name.endswith(".gz")
    try:
        with gzip.open(path, "rb") if packed else open(path, "rb") as file:
            magic = file.read(4)
            if magic != bytes([0, 0, 8, dims]):
                raise UserError(f"{path} is not an idx file of {dims} dimensions (it starts with {magic.hex()})")
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            count = math.prod(shape)
            _check_idx(path, shape, packed)
            data: Any = file.read(count) if packed else b""
            held = len(data) if packed else path.stat().st_size - file.tell()
            if not packed and held >= count:
                data = np.memmap(path, np.uint8, "r", file.tell(), (count,))
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{path} cannot be read ({error}): it is damaged or incomplete, download it again") from error
    if held < count:
        raise UserError(f"{path} holds {held} of {count} bytes: it is incomplete, download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _check_idx(path: Path, shape: tuple[int, ...], packed: bool) -> None:
    """UserError for sizes of nothing, or of more than is read."""
    count = math.prod(shape)
    if not count:
        raise UserError(f"{path} holds nothing: its sizes are {shape}")
    if math.prod(shape[1:]) > max_pixels():
        raise UserError(f"{path} claims {math.prod(shape[1:])} pixels an image, more than {VARIABLE} allows")
    if packed and count > MAX_IDX_BYTES:
        raise UserError(
            f"{path} unfolds to {count} bytes, more than the limit of {MAX_IDX_BYTES}: unpack it first (gunzip), and "
            "it is read from the disk"
        )


TOUCH = """
import lmdb, sys
with lmdb.open(sys.argv[1], readonly=True, lock=False, readahead=False).begin(buffers=True) as txn:
    for _, value in txn.cursor():
        value[:1], value[-1:]
"""


def _require_readable(path: Path) -> None:
    """UserError for pages that lie outside of the file: LMDB maps it, and who reads there dies of it."""
    died = subprocess.run([sys.executable, "-c", TOUCH, str(path)], stderr=subprocess.DEVNULL).returncode
    if died not in (0, 1):  # 1 is an exception, which comes here again
        raise UserError(f"{path / 'data.mdb'}: damaged, some of it lies behind the end of the file; copy it again")


def _lmdb(path: Path) -> Source:
    try:
        import lmdb
    except ImportError as error:
        raise UserError(f"{path} is an LMDB folder and needs the lmdb package: {install_hint('data')}") from error
    try:
        env = lmdb.open(str(path), readonly=True, lock=False, readahead=False)
        needed = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if (path / "data.mdb").stat().st_size < needed:  # LMDB itself would die of a bus error
            raise UserError(f"{path / 'data.mdb'}: cut short, {needed} bytes are needed; copy it again")
        _require_readable(path)
        with env.begin() as txn:
            keys = [bytes(key) for key in txn.cursor().iternext(keys=True, values=False)]
    except lmdb.Error as error:
        raise UserError(f"{path} cannot be read as an LMDB folder ({error}): it is damaged or incomplete") from error
    if not keys:
        raise UserError(f"{path} is an LMDB folder without entries")
    named = sorted(
        ((key.decode("utf-8", "backslashreplace"), key) for key in keys), key=lambda pair: natural_key(pair[0])
    )
    names = [name for name, _ in named]

    def read(index: int) -> bytes:
        try:
            with env.begin(buffers=True) as txn:  # a view, whose size is known before it is copied
                value = txn.get(named[index][1]) or b""
                if len(value) > max_bytes():
                    raise BrokenImageError(
                        f"'{names[index]}' has {len(value)} bytes, more than the limit of {max_bytes()} ({VARIABLE})"
                    )
                return bytes(value)
        except lmdb.Error as error:
            raise BrokenImageError(f"'{names[index]}' cannot be read ({error})") from error

    return Source("LMDB", names, read, [None] * len(names))
