"""Network files: safetensors with the complete configuration in the header. Nothing is ever unpickled."""

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffit import __version__
from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.models import DiffiT, build
from diffit.models.autoencoder import HUB_ID
from diffit.utils import hub
from diffit.utils.files import whole_file
from diffit.weights.header import CONFIG_KEY, SUM_KEY, parse_config, read_tensor_header, require_whole, seal
from diffit.weights.official import INDEX, check_index, recognise, stranger

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
SNAPSHOT, NUMBERED = "network-snapshot-", r"network-snapshot-\d+(\.\d+)?"
PIECE = 1 << 24  # bytes that are hashed while they are still in a cache, and then written


def public(config: Config) -> Config:
    """``config`` without the paths of the machine that it was trained on: of a local VAE the folder's name is left."""
    if config.autoencoder is not None and is_local(config.autoencoder.vae):
        config = with_vae(config, Path(config.autoencoder.vae).resolve().name)
    data = config.data.model_copy(update={"path": config.data.path and Path(config.data.path).name, "val": None})
    metrics = tuple(re.sub(r"[^:]*/", "", name) for name in config.training.metrics)  # a detector may be a file
    training = config.training.model_copy(update={"init_from": None, "metrics": metrics, "metrics_ref": None})
    student = config.distillation
    if student is not None:
        student = student.model_copy(update={"teacher": Path(student.teacher).name})
    return config.model_copy(update={"data": data, "training": training, "distillation": student})


def is_local(vae: str) -> bool:
    """Whether the name of a VAE is a folder's, here or on the machine where it was given."""
    return Path(vae).is_dir() or not HUB_ID.fullmatch(vae)


def with_vae(config: Config, vae: str) -> Config:
    """``config`` of a latent model with another name of its VAE."""
    assert config.autoencoder is not None
    return config.model_copy(update={"autoencoder": config.autoencoder.model_copy(update={"vae": vae})})


def save_network(path: str | Path, state: Mapping[str, Tensor], config: Config, *, kimg: float | None = 0.0) -> None:
    """Write ``state`` with the :func:`public` form of ``config``; ``kimg`` None is a training not known.

    The same weights and settings give the same bytes, with a checksum of them in the header.
    """
    metadata = {"format": "pt", CONFIG_KEY: public(config).model_dump_json(), "diffit_version": __version__}
    metadata[SUM_KEY] = "0" * 64  # room for the sum
    if kimg is not None:
        metadata["diffit_kimg"] = f"{kimg:g}"
    with whole_file(path) as part:
        save_tensors(state, part, metadata)
        seal(part)


def save_tensors(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' ``save_file``, whose complaint about a full disk is an ``OSError`` as everybody else's."""
    try:
        save_file({key: tensor.detach().contiguous() for key, tensor in state.items()}, path, metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def stream_tensors(state: Mapping[str, Tensor], path: Path, given_up: threading.Event | None = None) -> str:
    """Write contiguous tensors of the CPU as safetensors' ``save_file`` does, hashing what is written; the SHA-256.

    Both release the GIL, so that a thread does this while others compute. Raises :class:`UserError` at the next piece
    once ``given_up`` is set.
    """
    order = sorted(state, key=lambda key: (-state[key].element_size(), key))  # safetensors': aligned, then by name
    header: dict[str, Any] = {}
    end = 0
    for key in order:
        begin, end = end, end + state[key].nbytes
        header[key] = {"dtype": DTYPES[state[key].dtype], "shape": list(state[key].shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    total = hashlib.sha256()
    with path.open("wb", buffering=0) as file:
        parts = (state[key].reshape(-1).view(torch.uint8).numpy().data for key in order)
        for part in chain((memoryview(len(text).to_bytes(8, "little")), memoryview(text)), parts):
            for start in range(0, len(part), PIECE):
                if given_up is not None and given_up.is_set():
                    raise UserError("a state was given up before it was on disk; the one before it stays")
                piece = part[start : start + PIECE]
                total.update(piece)
                written = 0
                while written < len(piece):  # a disk that fills up takes a part first
                    written += file.write(piece[written:])
    return total.hexdigest()


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values: the same for weights in memory and in any file that holds them."""
    total = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def locate(path: str | Path) -> Path:
    """The file that a path, a run folder (its newest snapshot), a folder of runs (the newest), or a Hub id means.

    A folder with one network file, as `diffit export` makes it for the Hub, means that.
    """
    if not Path(path).exists() and hub.looks_like_id(str(path)):
        return hub.fetch(str(path))
    path = Path(path)
    if path.is_file():
        return path
    if path.is_dir():
        for folder in (path, *sorted(path.glob("[0-9]" * 5 + "-*"), reverse=True)):
            if (newest := newest_snapshot(folder)) is not None:
                return newest
        if len(alone := list(path.glob("*.safetensors"))) == 1:
            return alone[0]
    kind = "a folder without a network-snapshot file" if path.is_dir() else "not there"
    raise UserError(
        f"{path}: {kind}; a network is a file such as network-snapshot-000200.safetensors, a run folder, or a Hub id"
    )


def snapshots(run_dir: Path) -> list[Path]:
    """The snapshots of a run, by the kimg in their names, oldest first."""
    numbered = (path for path in run_dir.glob(f"{SNAPSHOT}*.safetensors") if re.fullmatch(NUMBERED, path.stem))
    return sorted(numbered, key=lambda path: (snapshot_kimg(path), path))


def snapshot_kimg(snapshot: Path) -> float:
    """The thousands of images in the name of one of the :func:`snapshots`."""
    return float(snapshot.stem.removeprefix(SNAPSHOT))


def newest_snapshot(run_dir: Path) -> Path | None:
    return next(reversed(snapshots(run_dir)), None)


def read_header(path: str | Path) -> tuple[Config, float | None]:
    """Configuration and length of the training in kimg, None where the file does not say it; no tensor is read."""
    path = locate(path)
    with _opened(path) as file:
        return _config_of(file, path), _kimg_of(file, path)


def read_network_file(
    path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None, *, verify: bool = True
) -> tuple[dict[str, Tensor], Config]:
    """Tensors and configuration of a file that :func:`save_network` wrote, or of NVIDIA's official weights.

    Floating-point tensors are converted to ``dtype``; None keeps the file's. On the CPU what is not converted stays
    mapped from the file, and what is converted is unmapped one by one, so that loading takes no more memory than the
    weights. The index that the official layout repeats in every layer is checked and left out. With ``verify``, a file
    that is not as it was written is a :class:`UserError`; files without a checksum, as the official ones, are read.
    """
    path = locate(path)
    with _opened(path, str(device)) as file:
        config = _config_of(file, path)
        if verify:
            require_whole(path)
        keys = list(file.keys())
        state = {key: _as(file.get_tensor(key), dtype, path, key) for key in keys if not key.endswith(INDEX)}
    for key in keys:
        if key.endswith(INDEX):
            check_index(_read_alone(path, key), config, f"{path}: {key}")
    return state, config


@contextmanager
def _opened(path: Path, device: str = "cpu") -> Iterator[Any]:
    read_tensor_header(path)  # within bounds, which safe_open does not know
    try:
        with safe_open(path, framework="pt", device=device) as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or cut short ({error}); fetch or save it again") from None


def _config_of(file: Any, path: Path) -> Config:
    metadata = file.metadata() or {}
    if CONFIG_KEY in metadata:
        return parse_config(metadata[CONFIG_KEY], f"{path}: configuration in the header")
    keys = list(file.keys())
    config = recognise({key: tuple(file.get_slice(key).get_shape()) for key in keys}, str(path))
    if config is None:
        raise UserError(
            f"{path}: not a DiffiT network: no diffit configuration in its header, and by its keys it is "
            f"{stranger(keys)}"
        )
    return config


def _kimg_of(file: Any, path: Path) -> float | None:
    text = (file.metadata() or {}).get("diffit_kimg")
    try:
        return None if text is None else float(text)
    except ValueError:
        raise UserError(
            f"{path}: diffit_kimg in the header is {text!r}, not a number; fetch or save it again"
        ) from None


def _as(tensor: Tensor, dtype: torch.dtype | None, path: Path, key: str) -> Tensor:
    if dtype in (None, tensor.dtype) or not tensor.is_floating_point():
        return tensor
    return (tensor if tensor.is_cuda else _read_alone(path, key)).to(dtype)


def _read_alone(path: Path, key: str) -> Tensor:
    """A tensor in a mapping of its own: the pages that reading it brings to memory go when it goes."""
    with _opened(path) as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor


def load_network(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = torch.float32,
    *,
    verify: bool = True,
) -> tuple[DiffiT, Config]:
    """The network of a file or Hub id, in evaluation mode, and its configuration. Every key and shape is checked.

    Files of ours carry their configuration and a checksum, which ``verify`` compares with their content; NVIDIA's
    official files are known by their keys and shapes.
    """
    state, config = read_network_file(path, device, dtype, verify=verify)
    net = without_weights(config, path)
    load_into(net, state, path, assign=True)
    return net.eval().requires_grad_(False), config


def without_weights(config: Config, path: str | Path) -> DiffiT:
    """The network that the header of the file ``path`` describes, on the meta device."""
    try:
        with torch.device("meta"):
            return build(config.model)
    except (RuntimeError, OverflowError) as error:  # sizes that are no tensor's
        raise UserError(f"{path}: no network has the sizes in its header ({str(error).splitlines()[0]})") from None


def load_into(net: torch.nn.Module, state: Mapping[str, Tensor], source: str | Path, *, assign: bool = False) -> None:
    """Strict ``load_state_dict`` whose complaint is one line that names the first key that differs."""
    require_weights(net, state, source)
    try:
        net.load_state_dict(dict(state), assign=assign)
    except RuntimeError as error:  # keys and shapes fit, so a stored index does not
        raise UserError(f"{source}: {str(error).splitlines()[-1].strip()}") from None


def require_weights(net: torch.nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Raises :class:`UserError` unless ``state`` has the names and shapes of ``net``, but for an official index."""
    own = net.state_dict()
    for key in [*own, *(key for key in state if not key.endswith(INDEX))]:
        if key not in state or key not in own or own[key].shape != state[key].shape:
            ours, theirs = (tuple(d[key].shape) if key in d else "absent" for d in (own, state))
            raise UserError(f"{source}: weights of another model: {key} is {theirs}, this model needs {ours}")
