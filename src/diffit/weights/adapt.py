"""Weights of one network as the beginning of another: other classes, other sizes, other channels."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.models import DiffiT
from diffit.models.attention import TMSA
from diffit.weights.file import read_network_file, without_weights

BIAS_TABLE = "relative_position_bias_table"
LABELS = "y_embedder.embedding_table.weight"
TIME_BIAS = "t_embedder.mlp.2.bias"
INPUTS = ("tokenizer.weight", "x_embedder.proj.weight")
OUTPUTS = ("head.weight", "head.bias")
FIXED = "pos_embed"  # computed from the size
Window = tuple[int, int]


@torch.no_grad()
def init_from(net: DiffiT, config: Config, path: str | Path) -> str:
    """Begin ``net``, which ``config`` describes, with the weights of a file; what was carried over, as a line.

    What has the same shape is copied. Position biases of another size are resampled; the label table of other classes
    begins again but for the null class; without classes the null class goes into the time token; input and output
    between gray and RGB are averaged or repeated. What else differs begins again. Raises :class:`UserError` where
    nothing fits.
    """
    state, source = read_network_file(path, dtype=torch.float32)
    if source.model.family != config.model.family:
        raise UserError(
            f"--init-from {path}: a network of the {source.model.family} family, the run's is of the "
            f"{config.model.family} family; give a file of the same kind"
        )
    if source.model.num_classes != config.model.num_classes and not source.training.label_drop:
        state.pop(LABELS, None)  # nothing has trained its null class
    state, windows = (_levels_from_the_bottom(each, net) for each in (state, _windows(source, path)))
    own, notes, fresh = net.state_dict(), list[str](), list[str]()
    carried = 0
    for key, target in own.items():
        found = None if key == FIXED else _fitting(key, state, target, net, windows, notes)
        if found is not None:
            target.copy_(found)
        if found is None or (key == LABELS and found is not state[LABELS]):
            fresh += [key] if key != FIXED else []
        else:
            carried += 1
    if not carried or carried < len(own) / 4:
        raise UserError(f"--init-from {path}: {carried} of {len(own)} tensors fit; it is another network")
    null = None if LABELS in own or LABELS not in state else state[LABELS][-1]
    if null is not None and null.shape == own[TIME_BIAS].shape:
        own[TIME_BIAS].add_(null)
        notes.append("the null class is part of the time token now")
    before, now = (getattr(each.diffusion, "prediction", "as EDM does") for each in (source, config))
    if before != now:
        notes.append(f"it predicted {before}, this network predicts {now}")
    line = f"{Path(path).name}: {carried} of {len(own) - (FIXED in own)} tensors carried over"
    if notes:
        line += f" ({'; '.join(dict.fromkeys(notes))})"
    groups = list(dict.fromkeys(key.split(".")[0] for key in fresh))
    return line + (f"; begun again: {len(fresh)} tensors of {', '.join(groups)}" if fresh else "")


def _fitting(
    key: str, state: Mapping[str, Tensor], target: Tensor, net: DiffiT, windows: Mapping[str, Window], notes: list[str]
) -> Tensor | None:
    """The source's tensor in the shape of ``target``, None where there is none."""
    found = state.get(key)
    if found is None:
        return None
    if key.endswith(BIAS_TABLE) and found.shape[1] == target.shape[1]:
        layer = net.get_submodule(key.removesuffix(f".{BIAS_TABLE}"))
        assert isinstance(layer, TMSA)
        if key not in windows:  # the file has other weights than its header says
            return None
        if windows[key] == layer.window:
            return found
        notes.append("position biases resampled")
        return _resample(found, windows[key], layer.window)
    if found.shape == target.shape:
        return found
    if key == LABELS and found.shape[1:] == target.shape[1:]:
        notes.append(f"label table begun again for {len(target) - 1} classes, null class kept")
        return torch.cat([target[:-1], found[-1:]])
    if key in INPUTS and found.shape[0] == target.shape[0] and found.shape[2:] == target.shape[2:]:
        if 1 not in (found.shape[1], target.shape[1]):
            return None
        notes.append(f"input of {found.shape[1]} channels as {target.shape[1]}")
        # Gray is one channel that all three see; three equal channels are as loud as one.
        mixed = found.sum(1, keepdim=True) if target.shape[1] == 1 else found / target.shape[1]
        return mixed.expand_as(target)
    if key in OUTPUTS and found.shape[1:] == target.shape[1:] and 1 in (len(found), len(target)):
        return found.mean(0, keepdim=True).expand_as(target)
    return None


def _windows(config: Config, path: str | Path) -> dict[str, Window]:
    """Key of a position bias table -> the (height, width) of tokens that it is of."""
    layers = without_weights(config, path).named_modules()
    return {f"{name}.{BIAS_TABLE}": layer.window for name, layer in layers if isinstance(layer, TMSA)}


def _resample(table: Tensor, before: Window, now: Window) -> Tensor:
    """A position bias table ``((2h − 1)(2w − 1), heads)`` for maps of another size, bilinear between offsets."""
    height, width = (2 * side - 1 for side in now)
    # A map of another size is the same picture at more or fewer tokens, so offsets are scaled with it.
    y, x = (torch.linspace(-1, 1, n, dtype=table.dtype) for n in (height, width))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    picture = table.T.reshape(1, -1, *(2 * side - 1 for side in before))
    sampled = F.grid_sample(picture, grid, align_corners=True)
    return sampled.reshape(-1, height * width).T


def _levels_from_the_bottom(state: dict[str, Any], net: DiffiT) -> dict[str, Any]:
    """Keys of an image-space decoder counted from the full resolution, where the two have another number of stages.

    ``decoder.0`` and ``up.0`` are the deepest: with one stage more, what was the deepest is the second.
    """

    def depth(keys: Mapping[str, Any]) -> int:
        return len({match[1] for key in keys if (match := re.match(r"decoder\.(\d+)\.", key))})

    shift = depth(net.state_dict()) - depth(state)
    if not shift:
        return state
    moved = {}
    for key, tensor in state.items():
        match = re.match(r"(decoder|up)\.(\d+)\.(.*)", key)
        moved[f"{match[1]}.{int(match[2]) + shift}.{match[3]}" if match else key] = tensor
    return moved
