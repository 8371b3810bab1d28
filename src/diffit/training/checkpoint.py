"""Training states: one folder of safetensors and JSON, with a manifest of SHA-256 sums, on disk whole or not at all.

Tensors are full and named after parameters, so that any number of processes can take a state up.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffit.errors import UserError
from diffit.utils.files import sha256_of, whole_folder
from diffit.weights.file import save_tensors

PREFIX = "training-state-"
KEEP_STATES = 2
FILES = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}


def optimizer_tensors(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    """Adam's state as ``exp_avg.<parameter>`` and so on; empty before the first step."""
    return {
        f"{kind}.{name}": value
        for name, parameter in net.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, net: nn.Module, tensors: dict[str, Tensor]) -> None:
    parameters = dict(net.named_parameters())
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        parameter = parameters[name]
        scalar = kind == "step"
        if (value.shape != parameter.shape and not scalar) or not value.isfinite().all():
            raise UserError(
                f"the state's {key} is not finite, or of another shape than its weight; --resume an earlier state"
            )
        if not scalar:
            # The fused kernel reads parameter and moments in step through memory: strides must agree (channels_last).
            value = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
        optimizer.state[parameter][kind] = value.to(parameter.device)


def save_state(
    folder: Path, net: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, metadata: dict[str, Any]
) -> None:
    """``metadata`` is what JSON can hold: images seen, the loss scaler, the configuration."""
    with whole_folder(folder) as part:
        groups = {
            "model": net.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer_tensors(optimizer, net),
        }
        for name, tensors in groups.items():
            save_tensors(tensors, part / f"{name}.safetensors")
        (part / "state.json").write_text(json.dumps(metadata, indent=2))
        sums = {item.name: sha256_of(item) for item in sorted(part.iterdir())}
        (part / "manifest.json").write_text(json.dumps(sums, indent=2))


def verify_state(folder: Path) -> None:
    """Raises :class:`UserError` unless every file of a state is as the manifest has it."""
    try:
        sums = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        sums = None
    if not isinstance(sums, dict) or not sums.keys() >= FILES:
        raise UserError(f"{folder}: not a training state (its manifest.json is not one of ours); give another --resume")
    for name, expected in sums.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != expected:
            raise UserError(f"{folder}: {name} is missing or damaged; remove this state to resume from an earlier one")


def load_state(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors of ``model``, ``ema`` and ``optimizer``, and the metadata, of a state that :func:`verify_state` passed.

    Each process reads it, and only one need verify it.
    """
    tensors = {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}
    return tensors, json.loads((folder / "state.json").read_text())


def states(run_dir: Path) -> list[Path]:
    """The training states of a run, oldest first. Unfinished ones have other names."""
    found = [path for path in run_dir.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+(\.\d+)?", path.name)]
    return sorted(found, key=lambda path: float(path.name.removeprefix(PREFIX)))


def read_progress(folder: Path) -> tuple[int, float]:
    """Images seen and seconds taken, of a state; no tensor is read."""
    try:
        metadata = json.loads((folder / "state.json").read_text())
        return int(metadata["images_seen"]), float(metadata.get("seconds", 0.0))
    except (OSError, ValueError, KeyError, TypeError):  # `load_state` will say what is wrong with it
        return 0, 0.0


def prune_states(run_dir: Path) -> None:
    """Remove all but the newest states."""
    for old in states(run_dir)[:-KEEP_STATES]:
        for item in old.iterdir():
            item.unlink()
        old.rmdir()
