"""Whether a run compiles its network where nobody said so: on a GPU, in a run that is long enough for it to pay."""

import logging

import torch

from diffit.configs.schema import Config, ImageModel
from diffit.models.cost import FORWARDS, count_work
from diffit.utils.distributed import Processes

logger = logging.getLogger(__name__)

# Compiling `cifar10` takes a minute of an H100's time and 0.4 off a step (docs/results.md).
MINUTES = 15.0  # of a run by the clock, from which on it pays
FLOPS = 5e16  # of a run in images: twelve minutes of that


def decide_compile(config: Config, procs: Processes) -> Config:
    """``config`` with whether its network is compiled: as asked for, or else where that pays here.

    All processes call this together. How many they are has no part in it: a run may go on with more or fewer.
    """
    training = config.training
    if training.compile is not None:
        return config
    # A step must be the same of all.
    compiled = procs.device.type == "cuda" and pays(config) and not procs.max(int(not can_compile(procs.device)))
    training = training.model_copy(update={"compile": compiled, "chosen": (*training.chosen, "compile")})
    return config.model_copy(update={"training": training})


def pays(config: Config) -> bool:
    """Whether the run is long enough, on a GPU.

    Not for latents, whose step becomes shorter by a fifth alone, nor with what was not measured.
    """
    training = config.training
    if not isinstance(config.model, ImageModel):
        return False
    if training.shard or training.grad_ckpt or config.distillation is not None:
        return False
    if training.clock_minutes is not None:
        return training.clock_minutes >= MINUTES
    return 2 * FORWARDS * count_work(config).macs * training.kimg * 1000 >= FLOPS


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, found out on one number: it needs Triton and often a C compiler."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(1, device=device))
    except Exception as error:  # of the compiler, of Triton, or of the programs that they call
        reason = " ".join(str(error).split("\n")[:2])  # who failed, and with what
        logger.warning("the network is not compiled, torch.compile does not work here: %s", reason)
        return False
    return True
