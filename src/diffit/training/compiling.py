"""Whether a run's network is compiled where nobody said so: on a GPU, in a run that is long enough for it to pay."""

import logging
from functools import cache

import torch

from diffit.configs.schema import Config
from diffit.models.cost import FORWARDS, count_work

logger = logging.getLogger(__name__)

# On an H100 compiling took one to one and a half minutes, and took a fifth to two fifths off a step (docs/results.md).
MINUTES = 10.0  # of a run by the clock, from which on it pays
FLOPS = 1e17  # of a run in images: ten minutes of the preset that uses an H100 best, and longer on all others


def is_compiled(config: Config, device: torch.device) -> bool:
    """Whether a run compiles its network on ``device``: as asked for, or else where that pays.

    The number of processes has no part in it, since compiled dropout draws other masks.
    """
    if config.training.compile is not None:
        return config.training.compile
    return device.type == "cuda" and pays(config) and can_compile(device)


def pays(config: Config) -> bool:
    """Whether the run is long enough, on a GPU. Where that was not measured, it is not."""
    training = config.training
    if training.shard or training.grad_ckpt or config.distillation is not None:
        return False
    if training.clock_minutes is not None:
        return training.clock_minutes >= MINUTES
    return 2 * FORWARDS * count_work(config).macs * training.kimg * 1000 >= FLOPS


@cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here, found out on one number: it needs Triton and often a C compiler."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(1, device=device))
    except Exception as error:  # of the compiler, of Triton, or of the programs that they call
        reason = " ".join(str(error).split("\n")[:2])  # who failed, and with what
        logger.warning("the network is not compiled, torch.compile does not work here: %s", reason)
        return False
    return True
