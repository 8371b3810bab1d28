"""Muon for the weights between hidden layers, Adam for all others, as one optimiser.

Muon (K. Jordan et al. 2024) moves a matrix by its momentum made orthogonal, so that no direction of it is left behind.
PyTorch has one, of one matrix at a time, which asks the device whether the gradient is finite; here matrices of one
shape go together, as many as are not too large, and nothing waits.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from diffit.training.shard import divided, part, whole

NEWTON_SCHULZ = 3.4445, -4.7750, 2.0315  # a, b, c: the odd polynomial that draws singular values to about 1
ITERATIONS = 5
TOGETHER = 2**24  # values of matrices that are moved in one go: 64 MiB, and a few times that in between
EDGES = ("tokenizer", "head", "x_embedder", "t_embedder", "y_embedder", "augment_embedder", "final_layer")


def hidden_weights(net: nn.Module) -> list[Tensor]:
    """Weights of linear layers and convolutions, those excepted that see the image, the embeddings or the output."""
    return [
        module.weight
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.split(".")[0] not in EDGES
    ]


def orthogonal(matrices: Tensor) -> Tensor:
    """About U Vᵀ of each U S Vᵀ: ``(…, m, n)`` likewise; all but the smallest singular values come to about 1.

    Each iteration is x ← (a + b·x xᵀ + c·(x xᵀ)²) x. The factors are polynomials of the first x xᵀ, and so commute:
    they are multiplied with each other, m × m as they are, before one product with x.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    product = factor = _factor(gram)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    out: Tensor = product @ x
    return out.mT if tall else out


def _factor(gram: Tensor) -> Tensor:
    a, b, c = NEWTON_SCHULZ
    factor: Tensor = c * gram @ gram + b * gram
    factor.diagonal(dim1=-2, dim2=-1).add_(a)
    return factor


class Muon(torch.optim.Adam):
    """Groups with ``muon: True`` hold weights of two dimensions or more, of which all but the first count as one.

    Their steps have the root mean square that Adam's have, 0.2 times the rate (arXiv 2502.16982, Eq. 4), so that one
    rate fits both.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, *, momentum: float = 0.95, **adam: Any) -> None:
        super().__init__(groups, lr=lr, fused=True, **adam)
        self.defaults["momentum"] = momentum

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # The scaler's: not 0 where the step is to be left out, and what gradients are still multiplied by.
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"] if group.get("muon") else ():
                if parameter.grad is not None:
                    if scale is not None:
                        part(parameter.grad).div_(scale)
                    alike[parameter.shape].append(parameter)
            for shape, parameters in alike.items():
                count = max(TOGETHER // shape.numel(), 1)
                for start in range(0, len(parameters), count):
                    self._move(parameters[start : start + count], group["lr"], found)
        super().step()
        return loss

    def _move(self, parameters: list[Tensor], lr: float, found: Tensor | None) -> None:
        """Weights of one shape; their gradients are overwritten and left out, so that Adam leaves them alone."""
        ahead, momentum = [], self.defaults["momentum"]
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = part(state["momentum_buffer"])
            moved = buffer.lerp(part(gradient), 1 - momentum)
            part(gradient).lerp_(moved, momentum)  # Nesterov's
            buffer.copy_(moved if found is None else torch.where(found == 0, moved, buffer))
            ahead.append(whole(gradient).flatten(1))
        step = orthogonal(torch.stack(ahead))
        step *= -0.2 * math.sqrt(max(step.shape[1:])) * lr
        if found is not None:
            step = torch.where(found == 0, step, 0.0)
        for parameter, move in zip(parameters, step, strict=True):
            parameter.add_(divided(move.view(parameter.shape), parameter))
            parameter.grad = None
