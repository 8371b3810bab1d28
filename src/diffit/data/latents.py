"""Latent caches: what a VAE makes of every image of an archive and of its mirror image, read by memory map.

A folder with ``header.json``, ``dataset.json`` as image archives have it, the sums of both in ``dataset.sfv``, and
``shard-00000.safetensors`` …, each with the tensors ``mean``, ``std``, ``mean_mirror``, ``std_mirror`` (n, C, h, w),
not scaled, ``sums`` (2, C), and ``crc32`` (n,) of each image's moments. :mod:`diffit.data.encode` writes it.
"""

import hashlib
import json
import math
import shlex
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffit.configs.fields import Count, Frozen, Positive
from diffit.configs.schema import explain
from diffit.data.files import FileTree
from diffit.data.labels import META, count_classes, read_labels, require_classes
from diffit.errors import UserError
from diffit.weights.header import read_tensor_header

HEADER = "header.json"
MOMENTS = ("mean", "std", "mean_mirror", "std_mirror")
MAX_HEADER = 1 << 20  # bytes of header.json
MAX_SHARDS = 1_000_000
DTYPES = {"float32": torch.float32, "float16": torch.float16}
USUAL_STD = (0.5, 2.0)  # of scaled latents: the noise levels of a diffusion model are made for data of about 1


class Header(Frozen):
    """``header.json``: what the latents were made of and how. ``complete`` and the statistics come last."""

    format: Literal["diffit-latents"] = "diffit-latents"
    version: Literal[1] = 1
    vae: str
    vae_sha256: str
    scale: Positive
    tiling: bool
    image_size: tuple[Count, Count]  # (H, W)
    latent_shape: tuple[Count, Count, Count]  # (C, h, w)
    count: Count
    shard_size: Count
    dtype: Literal["float32", "float16"]
    source: str
    source_sha256: str
    complete: bool = False
    latent_mean: tuple[float, ...] | None = None  # a channel, after scaling
    latent_std: tuple[float, ...] | None = None

    @property
    def num_shards(self) -> int:
        return math.ceil(self.count / self.shard_size)

    def shard_range(self, shard: int) -> range:
        """The images of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.count))

    def command(self, dest: Path) -> str:
        """What makes these latents in ``dest``."""
        options = {"--source": self.source, "--dest": dest, "--vae": self.vae, "--scale": self.scale}
        options |= {"--dtype": self.dtype, "--shard-size": self.shard_size}
        words = [str(word) for option in options.items() for word in option]
        return shlex.join(["diffit", "data", "encode", *words, *(["--tiling"] if self.tiling else [])])


def is_latents(path: str | Path) -> bool:
    """Whether ``path`` is a latent cache, finished or not."""
    return (Path(path) / HEADER).is_file()


def read_header(path: Path) -> Header:
    """UserError if there is none, or it is damaged or of a later version."""
    try:
        if (size := (path / HEADER).stat().st_size) > MAX_HEADER:
            raise UserError(f"{path / HEADER}: {size} bytes, more than the limit of {MAX_HEADER}; fetch it again")
        header = Header.model_validate_json((path / HEADER).read_bytes())
        if header.num_shards > MAX_SHARDS:
            raise UserError(
                f"{path / HEADER}: {header.num_shards} shards, more than the limit of {MAX_SHARDS}; make the latents "
                "again with a larger --shard-size"
            )
        return header
    except OSError:
        raise UserError(f"{path}: no {HEADER}; a latent cache is a folder that `diffit data encode` wrote") from None
    except ValidationError as error:
        raise UserError(
            f"{path / HEADER}: {explain(error)}; make the latents again with `diffit data encode`"
        ) from None


def shard_path(path: Path, shard: int) -> Path:
    return path / f"shard-{shard:05d}.safetensors"


def open_shard(path: Path, header: Header, shard: int) -> Any:
    """A shard's memory map. UserError if it is absent, truncated, or of other shapes than the header says."""
    file = shard_path(path, shard)
    expected = [len(header.shard_range(shard)), *header.latent_shape]
    try:
        if file.is_file():
            read_tensor_header(file)  # within bounds, which safe_open does not know
        tensors: Any = safe_open(file, framework="pt")
        if all(tensors.get_slice(key).get_shape() == expected for key in MOMENTS):
            return tensors
        reason = f"not {'x'.join(map(str, expected))}"
    except (SafetensorError, OSError) as error:
        reason = str(error) if file.is_file() else "not there"
    raise UserError(f"{file}: {reason}; `{header.command(path)}` makes it again")


def missing_shards(path: Path, header: Header) -> list[int]:
    """Shards that are not there, or not whole."""
    there = {item.name for item in path.iterdir()}

    def is_missing(shard: int) -> bool:
        if shard_path(path, shard).name not in there:
            return True
        try:
            open_shard(path, header, shard)
        except UserError:
            return True
        return False

    return [shard for shard in range(header.num_shards) if is_missing(shard)]


def row_crc(moments: Tensor) -> int:
    """CRC-32 of one image's moments (4, C, h, w), in the order of :data:`MOMENTS` and as they are on disk."""
    return zlib.crc32(moments.contiguous().numpy().data)


def row_crcs(moments: Mapping[str, Tensor]) -> Tensor:
    """:func:`row_crc` of every image of a shard, int64 (n,)."""
    rows = zip(*(moments[key] for key in MOMENTS), strict=True)
    return torch.tensor([row_crc(torch.stack(row)) for row in rows])


def channel_sums(moments: Mapping[str, Tensor]) -> Tensor:
    """(2, C) float64: a channel's expected sums of z and of z² over images, mirror images and positions."""
    over = (0, 2, 3)
    total = sum(moments[key].sum(over, dtype=torch.float64) for key in ("mean", "mean_mirror"))
    # E z² = mean² + std²; the norm accumulates in float64 without a copy of the shard in it.
    norms = [torch.linalg.vector_norm(moments[key], dim=over, dtype=torch.float64) for key in MOMENTS]
    return torch.stack([torch.as_tensor(total), torch.stack(norms).square().sum(0)])


def scaled_statistics(sums: Tensor, count: int, header: Header) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std), a channel, of the scaled latents of ``count`` images, from their :func:`channel_sums`."""
    _, height, width = header.latent_shape
    mean, square = sums / (2 * count * height * width)
    std = (square - mean**2).clamp(min=0).sqrt()
    return tuple((mean * header.scale).tolist()), tuple((std * header.scale).tolist())


def scale_warning(mean: Sequence[float], std: Sequence[float], header: Header) -> str | None:
    """One line if the standard deviation over all channels is far from 1."""
    centre = sum(mean) / len(mean)
    total = math.sqrt(sum((m - centre) ** 2 + s**2 for m, s in zip(mean, std, strict=True)) / len(mean))
    if USUAL_STD[0] <= total <= USUAL_STD[1]:
        return None
    remedy = f"; --scale {header.scale / total:.4g} makes it 1" if total else ""
    return f"the latents' standard deviation is {total:.3g} with scale {header.scale:g}, far from 1{remedy}"


class LatentArchive:
    """The counterpart of :class:`ImageArchive` for latents.

    Args:
        path: folder that ``diffit data encode`` wrote.
        cond: load the labels; it is a UserError if there are none.

    Attributes:
        header: what the latents were made of and how.
        location, name: the whole path, and the folder's name.
        image_size: (H, W) of the images.
        latent_shape: (C, h, w).
        has_labels, num_classes, class_names, labels: as in :class:`ImageArchive`.

    Raises UserError for a cache that is not finished, or damaged.
    """

    def __init__(self, path: str | Path, *, cond: bool = False) -> None:
        self.path = Path(path)
        self.location, self.name = str(self.path.resolve()), self.path.resolve().name
        self.header = read_header(self.path)
        self.image_size, self.latent_shape = self.header.image_size, self.header.latent_shape
        missing = missing_shards(self.path, self.header)
        if missing or not self.header.complete:
            raise UserError(
                f"{self.path}: incomplete, {len(missing)} of {self.header.num_shards} shards are missing: "
                f"`{self.header.command(self.path)}` makes them"
            )
        files = FileTree(self.path)
        for problem in files.altered(META, HEADER):
            raise UserError(problem)
        files.read(HEADER)  # for its sum
        table, self.class_names = read_labels(files, len(self))
        if table is not None and len(table) != len(self):
            raise UserError(f"{self.path}: {META} has {len(table)} labels for {len(self)} images; encode them again")
        if cond and table is None:
            raise UserError(f"{self.path} has no labels: drop --cond, or encode an archive that has them")
        self.has_labels = table is not None
        self.num_classes = count_classes(table.values(), self.class_names) if table else 0
        if cond:
            require_classes(self.path, self.num_classes, len(self), self.class_names)
        self.labels = torch.tensor(list(table.values())) if cond and table else None
        self._shards: dict[int, tuple[Any, list[int] | None]] = {}

    def __len__(self) -> int:
        return self.header.count

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_shards": {}}  # memory maps do not travel to other processes

    def _shard(self, shard: int) -> tuple[Any, list[int] | None]:
        """A shard and the CRC-32s of its rows, None for one that has none."""
        if shard not in self._shards:
            tensors = open_shard(self.path, self.header, shard)
            self._shards[shard] = tensors, self._row_crcs(tensors, shard)
        return self._shards[shard]

    def _row_crcs(self, tensors: Any, shard: int) -> list[int] | None:
        if "crc32" not in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
            return None
        crcs = tensors.get_tensor("crc32")
        if crcs.dtype != torch.int64 or crcs.shape != (len(self.header.shard_range(shard)),):
            raise self._damaged(shard, f"crc32 is {crcs.dtype} {tuple(crcs.shape)}")
        found: list[int] = crcs.tolist()
        return found

    def _damaged(self, shard: int, what: str) -> UserError:
        file = shard_path(self.path, shard)
        return UserError(f"{file}: damaged ({what}); remove it, and `{self.header.command(self.path)}` makes it again")

    def _require_whole(self, moments: Tensor, shard: int, row: int, crcs: list[int] | None) -> None:
        if crcs is not None and row_crc(moments) != crcs[row]:
            raise self._damaged(shard, f"image {shard * self.header.shard_size + row} is not that of its CRC-32")

    def __getitem__(self, index: int) -> Tensor:
        """Moments of one image and of its mirror image, (4, C, h, w) as stored: mean, std, mirrored mean and std."""
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        shard, row = divmod(index, self.header.shard_size)
        tensors, crcs = self._shard(shard)
        moments = torch.stack([tensors.get_slice(key)[row] for key in MOMENTS])
        self._require_whole(moments, shard, row, crcs)
        return moments

    def load_all(self) -> Tensor:
        """All of it, (N, 4, C, h, w) in the dtype of the file."""
        return self.load(range(len(self)))

    def load(self, indices: range) -> Tensor:
        """As :meth:`load_all` those of the ``indices``, which are at least one and without gaps."""
        found: Tensor | None = None  # made once: a list of parts and what they are joined to are twice the data
        size = self.header.shard_size
        for shard in range(indices.start // size, -(-indices.stop // size)):
            tensors, crcs = self._shard(shard)
            inside = range(max(indices.start - shard * size, 0), min(indices.stop - shard * size, size))
            begin = shard * size + inside.start - indices.start
            for place, key in enumerate(MOMENTS):
                moments = tensors.get_slice(key)[inside.start : inside.stop]
                if found is None:
                    found = moments.new_empty(len(indices), len(MOMENTS), *moments.shape[1:])
                found[begin : begin + len(inside), place] = moments
            assert found is not None
            for row, moments in zip(inside, found[begin : begin + len(inside)], strict=True):
                self._require_whole(moments, shard, row, crcs)
            self._shards.pop(shard)  # what is mapped and was read counts as memory of this process
        assert found is not None
        return found

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over what the latents are, the sums in their shards, and the labels where ``cond`` loaded them.

        The latents themselves are not read.
        """
        header = self.header.model_dump_json(exclude={"vae", "source", "latent_mean", "latent_std"})
        digest = hashlib.sha256(header.encode())
        for shard in range(self.header.num_shards):
            tensors, crcs = self._shard(shard)
            digest.update(json.dumps(tensors.get_tensor("sums").tolist() if crcs is None else crcs).encode())
        digest.update(json.dumps(None if self.labels is None else self.labels.tolist()).encode())
        return digest.hexdigest()

    def check_vae(self, sha256: str, scale: float, name: str = "another VAE") -> None:
        """UserError unless the latents are those of the VAE with these weights, to be scaled alike."""
        header = self.header
        if sha256 != header.vae_sha256:
            raise UserError(
                f"{self.path}: latents of VAE {header.vae} (weights {header.vae_sha256[:12]}), not of {name} "
                f"({sha256[:12]}): use that VAE, or encode the images again"
            )
        if scale != header.scale:
            raise UserError(
                f"{self.path}: latents to be scaled by {header.scale}, not {scale}: "
                "use that scale, or encode the images again"
            )

    def check(self, progress: Callable[[int, int], None] | None = None) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Read everything; (mean, std), a channel, after scaling. UserError if values have changed on disk."""
        total = torch.zeros(2, self.latent_shape[0], dtype=torch.float64)
        for shard in range(self.header.num_shards):
            tensors = open_shard(self.path, self.header, shard)
            moments, crcs = {key: tensors.get_tensor(key) for key in MOMENTS}, self._row_crcs(tensors, shard)
            for row, one in enumerate(zip(*moments.values(), strict=True)):
                self._require_whole(torch.stack(one), shard, row, crcs)
            sums = channel_sums(moments)
            if not torch.allclose(sums, tensors.get_tensor("sums"), rtol=1e-9, atol=1e-9):
                raise self._damaged(shard, "its values are not those of its sums")
            total += sums
            if progress is not None:
                progress(self.header.shard_range(shard).stop, len(self))
        return scaled_statistics(total, len(self), self.header)
