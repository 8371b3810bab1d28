"""The header of a safetensors file: read within bounds, written in one order, with a checksum of the whole file.

A file is the length of the header (8 bytes, little-endian), the header (JSON: names, shapes and places of the tensors,
and under ``__metadata__`` strings), and the tensors.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from io import BufferedRandom, BufferedReader
from pathlib import Path
from typing import Any

from diffit.configs.fields import MAX_BLOCKS, MAX_SIZE
from diffit.configs.schema import Config, LatentModel
from diffit.errors import UserError, printable

logger = logging.getLogger(__name__)

METADATA = "__metadata__"
CONFIG_KEY = "diffit_config"
SUM_KEY = "diffit_sha256"
MAX_HEADER = 8 << 20  # bytes; the official model's has 35 kB, 100,000 class names some 3 MB

Header = dict[str, Any]


def read_tensor_header(path: Path) -> Header:
    """What the header says. Raises :class:`UserError` where it is damaged or larger than :data:`MAX_HEADER`."""
    try:
        with path.open("rb") as file:
            return _parse(file, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check the path") from None


def _parse(file: BufferedReader | BufferedRandom, path: Path) -> Header:
    """The header; ``file`` is then at the first tensor."""
    length = int.from_bytes(file.read(8), "little")
    size = path.stat().st_size
    if length > MAX_HEADER and 8 + length <= size:
        raise UserError(f"{path}: a header of {length} bytes, more than the limit of {MAX_HEADER}; fetch it again")
    text = file.read(length) if 8 + length <= size else b""
    try:
        header = json.loads(text)
        if isinstance(header, dict) and all(isinstance(entry, dict) for entry in header.values()):
            return header
        reason = "its header is no table of tensors"
    except (ValueError, RecursionError) as error:
        reason = f"its header says {length} bytes of {size}" if not text else f"header: {error}"
    raise UserError(f"{path}: not a safetensors file, or cut short ({reason}); fetch or save it again")


def seal(path: Path) -> None:
    """Bring the header of a file that safetensors wrote into one order, and :data:`SUM_KEY` in it to the file's sum.

    safetensors writes ``__metadata__`` in another order each time, and the sum can only be known at the end.
    """
    with path.open("r+b") as file:
        header = _parse(file, path)
        length = file.tell() - 8
        header[METADATA] = dict(sorted(header[METADATA].items())) | {SUM_KEY: _digest(file, header)}
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "the same JSON in another order is as long"
        file.seek(8)
        file.write(text.ljust(length))  # tensors begin at a multiple of 8, which safetensors fills with spaces


def verify(path: Path) -> bool | None:
    """Whether the file is as it was written; None where it has no sum. The tensors are read once, in pieces."""
    with path.open("rb") as file:
        header = _parse(file, path)
        recorded = header.get(METADATA, {}).get(SUM_KEY)
        return None if recorded is None else recorded == _digest(file, header)


def require_whole(path: Path) -> None:
    """:class:`UserError` where the file's sum is another; a line in the log where a file of ours has none."""
    whole = verify(path)
    if whole is False:
        raise UserError(
            f"{path}: damaged, or changed by another program: its content is not that of its checksum; "
            "fetch or save it again (`diffit sample --no-verify` uses it as it is; in the library, verify=False)"
        )
    if whole is None and CONFIG_KEY in read_tensor_header(path).get(METADATA, {}):
        _warn_unchecked(str(path))


@lru_cache(maxsize=1024)  # once a file
def _warn_unchecked(path: str) -> None:
    logger.warning("%s has no checksum, as files of earlier versions: damage would go unnoticed", path)


def _digest(file: BufferedReader | BufferedRandom, header: Header) -> str:
    """SHA-256 over the tensors, from where ``file`` is to its end, and over what the header says but for the sum."""
    rest = {key: value for key, value in header.get(METADATA, {}).items() if key != SUM_KEY}
    total = hashlib.file_digest(file, "sha256")
    total.update(json.dumps(header | {METADATA: rest}, sort_keys=True).encode())
    return total.hexdigest()


def parse_config(text: str, source: str) -> Config:
    """The configuration in a file that may come from anyone: bounded, and without text that a terminal would obey.

    Raises :class:`UserError`, naming ``source``.
    """
    config = Config.from_json(text, source)
    if not re.fullmatch(r"\w[\w.+-]{0,63}", config.preset):  # it becomes the name of a file
        raise UserError(f"{source}: preset {config.preset!r} is no name; use letters, digits and . _ + -")
    for name, value, limit in _sizes(config):
        if value > limit:
            raise UserError(f"{source}: {name} is {value:g}, more than the limit of {limit}; fetch the file again")
    names = config.data.class_names
    if names is None:
        return config
    clean = tuple(printable(name) for name in names)
    return config.model_copy(update={"data": config.data.model_copy(update={"class_names": clean})})


def _sizes(config: Config) -> Iterator[tuple[str, float, int]]:
    """What decides how much memory and time a network takes: its name, how much it is, and its limit."""
    model = config.model
    blocks = model.depth if isinstance(model, LatentModel) else sum(stage.blocks for stage in model.stages)
    yield "the number of blocks", blocks, MAX_BLOCKS
    yield "the largest number of the model", max(_numbers(model.model_dump())), MAX_SIZE


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping | tuple | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(part)
