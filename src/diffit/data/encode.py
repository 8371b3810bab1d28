"""An image archive in, a latent cache out: goes on where it was interrupted; several processes share the work."""

import json
import logging
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TypedDict, Unpack
from zlib import crc32

import torch
from torch import Tensor

from diffit.data.archive import ImageArchive
from diffit.data.files import map_ordered
from diffit.data.labels import META
from diffit.data.latents import (
    DTYPES,
    HEADER,
    MOMENTS,
    Header,
    LatentArchive,
    channel_sums,
    is_latents,
    missing_shards,
    open_shard,
    read_header,
    row_crcs,
    scale_warning,
    scaled_statistics,
    shard_path,
)
from diffit.data.names import readable
from diffit.data.sums import SUMS, format_sums
from diffit.errors import UserError
from diffit.models.autoencoder import Autoencoder
from diffit.utils.distributed import Processes, require_shared
from diffit.utils.files import disk_errors, whole_file
from diffit.weights.file import save_tensors

logger = logging.getLogger(__name__)
# Option -> the header's fields that must not change while a cache is made: the first is compared, the others shown.
SETTINGS = {
    "--vae": ("vae_sha256", "vae"),
    "--scale": ("scale",),
    "--tiling": ("tiling",),
    "--dtype": ("dtype",),
    "--shard-size": ("shard_size",),
    "--source": ("source_sha256", "source"),
}


class EncodeOptions(TypedDict, total=False):
    """The options of :func:`encode_archive`."""

    batch: int
    """Images at a time (16)."""
    dtype: str
    """``float32`` (the default), or ``float16`` for half the size."""
    shard_size: int
    """Images a file (1024)."""


# A shard of 1024 has 64 MB in float32 at 256 pixels.
DEFAULTS: EncodeOptions = {"batch": 16, "dtype": "float32", "shard_size": 1024}


def encode_archive(
    source: str | Path,
    dest: str | Path,
    vae: Autoencoder,
    *,
    procs: Processes | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Unpack[EncodeOptions],
) -> Header:
    """Write the latents of every image of ``source``, and of its mirror image, to the folder ``dest``.

    A shard that is there already is kept. All processes call this together; each makes every ``count``-th of the
    shards that are missing, and holds one in memory. The same settings and batch give the same bytes, but for the
    rounding of another device or number of threads. The first process calls ``progress`` with (images done, images in
    all), and logs a warning if the first shard's scaled latents are far from a standard deviation of 1.

    Raises UserError for a source that cannot be encoded, and a ``dest`` that holds something else.
    """
    if unknown := set(options) - set(DEFAULTS):
        raise TypeError(f"encode_archive has no option {', '.join(sorted(unknown))}")
    settings = DEFAULTS | options
    procs = procs or Processes(rank=0, count=1, device=torch.device("cpu"))
    dest = Path(dest)
    archive = ImageArchive(source)
    if archive.has_labels:
        archive = ImageArchive(source, cond=True)
    if procs.count > 1:  # each node may have a copy of its own
        procs.require_same(archive.content_hash, archive.path, "images", "copy the archive again")
    header = _header(archive, vae, settings["dtype"], settings["shard_size"])
    missing: list[int] = procs.broadcast(_prepare(dest, archive, header) if procs.is_first else None)
    done = header.count - sum(len(header.shard_range(shard)) for shard in missing)

    def advance(images: int) -> None:
        nonlocal done
        done += images * procs.count  # as far as the first process can tell
        if progress is not None and procs.is_first and done < header.count:
            progress(done, header.count)

    require_shared(dest, procs, "--dest")
    own = missing[procs.rank :: procs.count]
    for shard in own:
        tensors = _encode_shard(archive, vae, header.shard_range(shard), header, settings["batch"], advance)
        if procs.is_first and shard == own[0]:
            statistics = scaled_statistics(tensors["sums"], len(header.shard_range(shard)), header)
            if warning := scale_warning(*statistics, header):
                logger.warning(warning)
        with whole_file(shard_path(dest, shard)) as part:
            save_tensors(tensors, part)
    procs.barrier()
    if procs.is_first:
        _finish(dest)
        if progress is not None:
            progress(header.count, header.count)
    procs.barrier()
    return read_header(dest)


def _header(archive: ImageArchive, vae: Autoencoder, dtype: str, shard_size: int) -> Header:
    """Of a cache that is to be made; the source's hash is left to the process that needs it."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype}: not known; use one of {', '.join(DTYPES)}")
    image_size = archive.image_shape[1:]
    facts = {
        "vae": vae.id,
        "vae_sha256": vae.sha256,
        "scale": vae.scale,
        "tiling": vae.tiling,
        "image_size": image_size,
        "latent_shape": vae.latent_shape(image_size),
        "count": len(archive),
        "shard_size": shard_size,
        "dtype": dtype,
        "source": readable([os.fsencode(archive.path.resolve().name)], "cp1252")[0],
        "source_sha256": "",
    }
    return Header.model_validate(facts)


def _prepare(dest: Path, archive: ImageArchive, header: Header) -> list[int]:
    """Begin the cache, or check that the one that is there is the same; the shards to be made."""
    with disk_errors(dest / HEADER):
        others = [item.name for item in dest.iterdir() if not item.name.startswith(".")] if dest.exists() else []
    if others and not is_latents(dest):
        raise UserError(f"{dest} holds other files ({sorted(others)[0]}): use a new or empty folder as --dest")
    header = header.model_copy(update={"source_sha256": archive.hash_files()})
    if is_latents(dest):
        _require_same(dest, read_header(dest), header)
        for part in dest.glob(".*.part"):  # of a process that was killed
            part.unlink(missing_ok=True)
    else:
        _write_header(dest, header)
    labels = None
    if archive.labels is not None:
        labels = list(zip(archive.file_names, archive.labels.tolist(), strict=True))
    text = json.dumps({"labels": labels, "class_names": archive.class_names}, ensure_ascii=False)
    _write_labels(dest, text.encode())
    return missing_shards(dest, header)


def _write_labels(dest: Path, data: bytes) -> None:
    """Where the classes have other names now, those; :func:`_finish` writes the sums again that told of the old."""
    path = dest / META
    with disk_errors(path):
        before = path.read_bytes() if path.is_file() else None
    if before == data:
        return
    if before is not None and (dest / SUMS).exists():
        LatentArchive(dest)  # damage is not mended unseen
        (dest / SUMS).unlink()
    with whole_file(path) as part:
        part.write_bytes(data)


def _require_same(dest: Path, old: Header, new: Header) -> None:
    for option, (field, *shown) in SETTINGS.items():
        if getattr(old, field) != getattr(new, field):
            before, now = (
                " ".join([*(str(getattr(h, name)) for name in shown), str(getattr(h, field))[:12]]) for h in (old, new)
            )
            raise UserError(f"{dest} was made with {option} {before}, not {now}: use that again, or another --dest")


def _encode_shard(
    archive: ImageArchive,
    vae: Autoencoder,
    indices: range,
    header: Header,
    batch: int,
    advance: Callable[[int], None],
) -> dict[str, Tensor]:
    shape = (len(indices), *header.latent_shape)
    tensors = {key: torch.empty(shape, dtype=DTYPES[header.dtype]) for key in MOMENTS}
    images = map_ordered(archive.__getitem__, indices)
    for start in range(0, len(indices), batch):
        part = torch.stack(list(islice(images, batch)))
        rows = slice(start, start + len(part))
        tensors["mean"][rows], tensors["std"][rows] = vae.encode(part, batch=batch)
        tensors["mean_mirror"][rows], tensors["std_mirror"][rows] = vae.encode(part.flip(3), batch=batch)
        advance(len(part))
    if not all(tensor.isfinite().all() for tensor in tensors.values()):
        remedy = "use --dtype float32" if header.dtype == "float16" else "use another VAE"
        raise UserError(f"latents of images {indices.start} to {indices.stop - 1} are not finite: {remedy}")
    return tensors | {"sums": channel_sums(tensors), "crc32": row_crcs(tensors)}


def _finish(dest: Path) -> None:
    """Write into the header that nothing is missing, with the statistics of all, and the sums of what is no shard."""
    header = read_header(dest)
    if not header.complete:
        shards = range(header.num_shards)
        sums = torch.stack([open_shard(dest, header, shard).get_tensor("sums") for shard in shards]).sum(0)
        mean, std = scaled_statistics(sums, header.count, header)
        _write_header(dest, header.model_copy(update={"complete": True, "latent_mean": mean, "latent_std": std}))
    if not (dest / SUMS).exists():  # those of a finished cache stay: they may be about to tell of damage
        with whole_file(dest / SUMS) as part:
            part.write_bytes(format_sums((name, crc32((dest / name).read_bytes())) for name in (META, HEADER)))


def _write_header(dest: Path, header: Header) -> None:
    with whole_file(dest / HEADER) as part:
        part.write_text(header.model_dump_json(indent=2))
