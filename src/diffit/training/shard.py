"""``--shard``: weights, average and moments in parts, one on each process, by PyTorch's FSDP2.

A block's weights are whole only while it is computed. What is saved, sampled and judged is whole, as without.
"""

import copy

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diffit.models import DiffiT, DiffiTBlock, DiffiTResBlock, ImageDiffiT
from diffit.utils.distributed import Processes
from diffit.utils.precision import channels_last


def shard(net: DiffiT, procs: Processes) -> None:
    """Leave each process its part of every parameter, on its device. All processes call this with the same ``net``."""
    group = dist.group.WORLD if procs.steps is None else procs.steps
    assert group is not None
    mesh = DeviceMesh.from_group(group, procs.device.type)
    block = DiffiTResBlock if isinstance(net, ImageDiffiT) else DiffiTBlock
    net.to(memory_format=torch.contiguous_format)  # FSDP2 refuses channels_last
    for module in [*(module for module in net.modules() if isinstance(module, block)), net]:
        fully_shard(module, mesh=mesh)


def part(tensor: Tensor) -> Tensor:
    """What this process has of ``tensor``: all of it, where it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole ``tensor``, for which all processes call this together where it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided(values: Tensor, like: Tensor) -> Tensor:
    """Whole ``values``, which all processes have, in the parts of ``like``, where that is sharded."""
    if isinstance(like, DTensor):
        return distribute_tensor(values, like.device_mesh, like.placements, src_data_rank=None)
    return values


@torch.no_grad()
def fill(tensor: Tensor, values: Tensor) -> None:
    """Copy whole ``values``, or this process's part of them, into ``tensor``."""
    tensor.copy_(divided(values, tensor))


@torch.no_grad()
def gathered(net: DiffiT, empty: DiffiT) -> DiffiT:
    """A copy of ``net`` that a process can run by itself; ``empty`` is such a network on the meta device."""
    found = copy.deepcopy(empty)
    found.load_state_dict({name: whole(tensor) for name, tensor in net.state_dict().items()}, assign=True)
    return channels_last(found) if isinstance(found, ImageDiffiT) else found
