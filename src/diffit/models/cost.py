"""How much arithmetic a network and a sampling run are, counted on tensors without memory: on any machine, at once."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from diffit.configs.schema import Config, ImageModel, LatentModel
from diffit.models import DiffiTBlock, DiffiTResBlock, build
from diffit.models.attention import SHORT, TMSA, plain_attention
from diffit.models.block import Mlp
from diffit.utils.precision import autocast

TIME = ("t_embedder", "augment_embedder", "qkv_temb")


@dataclass(frozen=True)
class Work:
    """A network's size, and the multiply-accumulates of one forward pass of one image; twice as many are FLOPs."""

    parameters: int
    """Trainable ones."""
    linear: int
    """Of linear layers and convolutions over tokens or pixels."""
    attention: int
    """Of Q·Kᵀ and of weights times V."""
    time: int
    """Of the time token and its projections in every block, which do not grow with the image."""

    @property
    def macs(self) -> int:
        return self.linear + self.attention + self.time


def count_work(config: Config) -> Work:
    """What the network of ``config`` is; norms, activations and sums are left out, as is the custom."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        net = build(config.model)
        net(*example_inputs(config.model, 1))
    counts = counter.get_flop_counts()
    attention = sum(flops for op, flops in counts["Global"].items() if "bmm" in str(op) or "attention" in str(op))
    time = sum(sum(ops.values()) for name, ops in counts.items() if name.endswith(TIME))  # by path of the module
    parameters = sum(parameter.numel() for parameter in net.parameters())
    linear = counter.get_total_flops() - attention - time
    return Work(parameters, linear // 2, attention // 2, time // 2)


FLOAT = 4  # bytes
STATE_COPIES = 5  # of the weights' size: weights, gradients, two moments, average
FORWARDS = 3  # evaluations in the time of a training step's forward and backward passes
OVERHEAD = {"cpu": 1.25, "cuda": 1.0}
"""What kernels and the allocator take on top of activations, measured on a CPU: ``python -m benchmarks.memory``."""


@dataclass(frozen=True)
class Cost:
    """What training takes of one process; sizes in bytes."""

    parameters: int
    state_bytes: int
    """Weights, gradients, two moments, the moving average and a teacher, float32; of all but the last a part, where
    they are sharded."""
    activation_bytes: int
    """What autograd keeps for one microbatch, and what one step of the backward pass holds next to it."""
    sent_bytes: int = 0
    """To other processes in a step."""

    @property
    def training_bytes(self) -> int:
        return self.state_bytes + self.activation_bytes


def example_inputs(model: ImageModel | LatentModel, batch: int) -> tuple[Tensor | None, ...]:
    """Inputs of the network for ``batch`` images, all zero."""
    labels = torch.zeros(batch, dtype=torch.int64) if model.num_classes else None
    inputs = (torch.zeros(batch, *model.sample_shape), torch.zeros(batch), labels)
    if isinstance(model, ImageModel) and model.augment_dim:
        return *inputs, torch.zeros(batch, model.augment_dim)
    return inputs


def estimate(config: Config, batch_gpu: int, precision: str = "fp32", device: str = "cpu", processes: int = 1) -> Cost:
    """Memory of training with microbatches of ``batch_gpu`` on a ``device`` of type cpu or cuda, from any machine.

    On a GPU attention is one kernel that keeps queries, keys, values, output and a number per query, but for short
    windows; there and on a CPU it keeps the weights of all pairs. Left out is the program itself. What is sent is that
    of a ring of ``processes``.
    """
    # All that is kept grows with the batch or does not depend on it.
    two, three = (_trace(config.model, n, config.training.grad_ckpt, precision, device) for n in (2, 3))
    activations = round((two + (batch_gpu - 2) * (three - two)) * OVERHEAD[device])
    (parameters, block, rest), student = _count(config.model), config.distillation
    whole = FLOAT * parameters
    state, ring = STATE_COPIES * whole, whole * (processes - 1) / processes
    sent = 2 * ring  # an all-reduce of the gradients
    if config.training.shard and processes > 1:
        state //= processes
        # A block's weights and the next one's, its gradients whole and sent; or the whole average, for samples.
        activations = max(activations + FLOAT * (4 * block + 2 * rest), whole)
        # Weights for the forward and the backward pass, and gradients, of each microbatch.
        sent = 3 * ring * max(config.training.batch // (batch_gpu * processes), 1)
    teacher = 0 if student is None or student.teacher_sampling is None else whole
    return Cost(parameters, state + teacher, activations, round(sent))


def count_parameters(model: ImageModel | LatentModel) -> int:
    return _count(model)[0]


@lru_cache
def _count(model: ImageModel | LatentModel) -> tuple[int, int, int]:
    """Parameters: all, those of the largest block, and those outside blocks."""
    with torch.device("meta"):
        net = build(model)
    kind = DiffiTResBlock if isinstance(model, ImageModel) else DiffiTBlock
    blocks = [_size(module) for module in net.modules() if isinstance(module, kind)]
    return _size(net), max(blocks), _size(net) - sum(blocks)


def _size(net: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


@lru_cache
def _trace(model: ImageModel | LatentModel, batch: int, grad_ckpt: bool, precision: str, device: str) -> int:
    """Bytes that autograd keeps of ``batch`` images, and those that a step of the backward pass holds next to them."""
    # Fake tensors pretend to be on the CPU, so that autocast has its effect on what is kept.
    with torch.device("meta"):
        net = build(model)
    with FakeTensorMode(allow_non_fake_inputs=True):
        net.to_empty(device="cpu").set_grad_ckpt(grad_ckpt)
        if device == "cuda":
            for module in net.modules():
                if isinstance(module, TMSA):
                    short = module.window[0] * module.window[1] <= SHORT
                    module.attention = plain_attention if short else _FusedAttention.apply
                elif isinstance(module, Mlp):
                    module.keeps_mask = True
        kept: dict[int, int] = {}  # storage -> bytes: a tensor and its views are kept once

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor), autocast(torch.device("cpu"), precision):
            output = net(*example_inputs(model, batch))  # held until the sum is made: storages must not be reused
        for parameter in net.parameters():
            kept.pop(parameter.untyped_storage()._cdata, None)
        # The backward pass holds the gradients of a block next to what the forward pass kept: of two of its widest.
        working = 2 * max(kept.values(), default=0)
        del output
    return sum(kept.values()) + working


class _FusedAttention(torch.autograd.Function):
    """Keeps for the backward pass what the fused kernels of a GPU keep; its values do not matter."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, bias, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        raise NotImplementedError("only the forward pass is traced")
