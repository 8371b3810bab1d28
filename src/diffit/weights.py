"""Network files: safetensors with the complete configuration in the header. Nothing is ever unpickled."""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffit import __version__
from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.files import whole_file
from diffit.models.image import ImageDiffiT

CONFIG_KEY = "diffit_config"


def save_network(path: str | Path, state: Mapping[str, Tensor], config: Config, *, kimg: float = 0.0) -> None:
    """Write ``state`` with ``config``; paths of the machine that it was trained on stay out of the header."""
    data = config.data.model_copy(update={"path": config.data.path and Path(config.data.path).name, "val": None})
    training = config.training.model_copy(update={"init_from": None})
    public = config.model_copy(update={"data": data, "training": training})
    metadata = {
        "format": "pt",
        CONFIG_KEY: public.model_dump_json(),
        "diffit_kimg": f"{kimg:g}",
        "diffit_version": __version__,
    }
    with whole_file(path) as part:
        save_tensors(state, part, metadata)


def save_tensors(state: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """safetensors' ``save_file``, whose complaint about a full disk is an ``OSError`` as everybody else's."""
    try:
        save_file({key: tensor.detach().contiguous() for key, tensor in state.items()}, path, metadata)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def state_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values: the same for weights in memory and in any file that holds them."""
    total = hashlib.sha256()
    for key in sorted(state):
        tensor = state[key].detach().cpu().contiguous()
        total.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def read_network_file(path: str | Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], Config]:
    """Tensors and configuration of a file that :func:`save_network` wrote."""
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not there"
        raise UserError(f"{path}: {kind}; a network is a file such as network-snapshot-000200.safetensors")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if CONFIG_KEY not in metadata:
                keys = ", ".join(list(file.keys())[:3])
                raise UserError(f"{path}: no diffit configuration in its header (it holds {keys}, …): not our network")
            config = Config.from_json(metadata[CONFIG_KEY], f"{path}: configuration in the header")
            return {key: file.get_tensor(key) for key in file.keys()}, config  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or cut short ({error}); fetch or save it again") from None


def load_network(path: str | Path, device: str | torch.device = "cpu") -> tuple[ImageDiffiT, Config]:
    """The network of a file, in evaluation mode, and its configuration. Every key and shape is checked."""
    state, config = read_network_file(path, device)
    with torch.device("meta"):
        net = ImageDiffiT.from_config(config.model)
    load_into(net, state, path, assign=True)
    return net.eval().requires_grad_(False), config


def load_into(net: torch.nn.Module, state: Mapping[str, Tensor], source: str | Path, *, assign: bool = False) -> None:
    """Strict ``load_state_dict`` whose complaint is one line that names the first key that differs."""
    own = net.state_dict()
    for key in [*own, *state]:
        if key not in state or key not in own or own[key].shape != state[key].shape:
            ours, theirs = (tuple(d[key].shape) if key in d else "absent" for d in (own, state))
            raise UserError(f"{source}: weights of another model: {key} is {theirs}, this model needs {ours}")
    net.load_state_dict(dict(state), assign=assign)
