"""Weights of one network as the beginning of another: other classes, other sizes, other channels."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.models import DiffiT
from diffit.models.attention import TMSA
from diffit.weights.file import read_network_file

BIAS_TABLE = "relative_position_bias_table"
LABELS = "y_embedder.embedding_table.weight"
TIME_BIAS = "t_embedder.mlp.2.bias"
INPUTS = ("tokenizer.weight", "x_embedder.proj.weight")
OUTPUTS = ("head.weight", "head.bias")
FIXED = "pos_embed"  # computed from the size


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
    state = _levels_from_the_bottom(state, net)
    own, notes, fresh = net.state_dict(), list[str](), list[str]()
    carried = 0
    for key, target in own.items():
        found = None if key == FIXED else _fitting(key, state, target, net, notes)
        if found is not None:
            target.copy_(found)
        if found is None or (key == LABELS and found is not state[LABELS]):
            fresh += [key] if key != FIXED else []
        else:
            carried += 1
    if LABELS in state and LABELS not in own:
        own[TIME_BIAS].add_(state[LABELS][-1])
        notes.append("the null class is part of the time token now")
    if not carried or carried < len(own) / 4:
        raise UserError(f"--init-from {path}: {carried} of {len(own)} tensors fit; it is another network")
    before, now = (getattr(each.diffusion, "prediction", "as EDM does") for each in (source, config))
    if before != now:
        notes.append(f"it predicted {before}, this network predicts {now}")
    line = f"{Path(path).name}: {carried} of {len(own) - (FIXED in own)} tensors carried over"
    if notes:
        line += f" ({'; '.join(dict.fromkeys(notes))})"
    groups = list(dict.fromkeys(key.split(".")[0] for key in fresh))
    return line + (f"; begun again: {len(fresh)} tensors of {', '.join(groups)}" if fresh else "")


def _fitting(key: str, state: Mapping[str, Tensor], target: Tensor, net: DiffiT, notes: list[str]) -> Tensor | None:
    """The source's tensor in the shape of ``target``, None where there is none."""
    found = state.get(key)
    if found is None or found.shape == target.shape:
        return found
    if key.endswith(BIAS_TABLE) and found.shape[1] == target.shape[1]:
        resampled = _resample(found, target, net.get_submodule(key.removesuffix(f".{BIAS_TABLE}")))
        if resampled is not None:
            notes.append("position biases resampled")
        return resampled
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


def _resample(table: Tensor, target: Tensor, layer: object) -> Tensor | None:
    """A position bias table for maps of another size, bilinear between offsets; None for one that was not square."""
    assert isinstance(layer, TMSA)
    height, width = (2 * side - 1 for side in layer.window)
    side = round(len(table) ** 0.5)
    if side**2 != len(table):
        return None
    # A map of another size is the same picture at more or fewer tokens, so offsets are scaled with it.
    y, x = (torch.linspace(-1, 1, n, dtype=table.dtype) for n in (height, width))
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    picture = table.T.reshape(1, -1, side, side)
    sampled = F.grid_sample(picture, grid, align_corners=True)
    return sampled.reshape(-1, height * width).T.reshape(target.shape)


def _levels_from_the_bottom(state: dict[str, Tensor], net: DiffiT) -> dict[str, Tensor]:
    """Keys of an image-space decoder counted from the full resolution, where the two have another number of stages.

    ``decoder.0`` and ``up.0`` are the deepest: with one stage more, what was the deepest is the second.
    """

    def depth(keys: Mapping[str, Tensor]) -> int:
        return len({match[1] for key in keys if (match := re.match(r"decoder\.(\d+)\.", key))})

    shift = depth(net.state_dict()) - depth(state)
    if not shift:
        return state
    moved = {}
    for key, tensor in state.items():
        match = re.match(r"(decoder|up)\.(\d+)\.(.*)", key)
        moved[f"{match[1]}.{int(match[2]) + shift}.{match[3]}" if match else key] = tensor
    return moved
