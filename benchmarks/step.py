"""A training step against the time of its matrix products alone: ``python -m benchmarks.step``.

The products (and convolutions) of a real step are recorded as they reach the backend, then repeated on tensors of the
same shapes and strides. What is left is the price of norms, activations, copies, the optimiser and Python.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from benchmarks.measure import DEVICE, in_turns
from diffit.configs.presets import cifar10
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import Processes

FUSED = "mkldnn::_linear_pointwise"
PRODUCTS = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::convolution", "aten::convolution_backward", FUSED
}  # fmt: skip
BATCH = 16


class Recorder(TorchDispatchMode):
    """Keeps every product as (operator, arguments), tensors replaced by shape, strides and dtype."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := func.name().split(".")[0]) in PRODUCTS:
            alone = (*args[:3], "none", [], "") if name == FUSED else args
            self.calls.append((func, *tree_map(self.describe, (alone, kwargs or {}))))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        return value


def replay(calls: list[tuple[Any, Any, Any]]) -> Callable[[], None]:
    """Runs the products one after the other; products of one shape share their operands."""
    made: dict[Any, Tensor] = {}

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        key = (value.shape, value.stride(), value.dtype)
        if key not in made:
            # By way of the memory below, since an expanded tensor cannot be filled itself.
            length = 1 + sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True))
            made[key] = torch.randn(length, dtype=value.dtype, device=DEVICE).as_strided(*key[:2])
        return made[key]

    ready = [(func, *tree_map(real, (args, kwargs))) for func, args, kwargs in calls]

    def run() -> None:
        with torch.no_grad():
            for func, args, kwargs in ready:
                func(*args, **kwargs)

    return run


def beside_products(step: Callable[[], object], rounds: int) -> tuple[float, float, int]:
    """Seconds of ``step`` and of its products alone, in turns, and how many products there are."""
    step()
    with Recorder() as recorder:
        step()
    whole, products = in_turns(step, replay(recorder.calls), rounds=rounds)
    return whole, products, len(recorder.calls)


def main() -> None:
    config = cifar10()
    training = config.training.model_copy(update={"batch": BATCH})
    for precision in ("fp32", "bf16"):
        config = config.model_copy(update={"training": training})
        stepper = Stepper(config, Processes(0, 1, DEVICE), build_network(config), precision)
        images = torch.randint(256, (BATCH, 3, 32, 32), dtype=torch.uint8, device=DEVICE)

        def step(stepper: Stepper = stepper, images: Tensor = images) -> None:
            stepper.step(iter([(images, None)]))

        whole, products, count = beside_products(step, rounds=3)
        print(
            f"cifar10 step, batch {BATCH}, {precision}: {whole / products:.2f} times its {count} matrix "
            f"products alone ({whole * 1e3:.0f} ms : {products * 1e3:.0f} ms)",
            flush=True,
        )


if __name__ == "__main__":
    main()
