"""Where TMSA looks: its weights by block, head, place and noise level, read by hooks while a network runs.

The network's code and its results stay as they are: a hook sees what a layer was given, and Eq. 6 is evaluated once
more for the tokens that are asked about, in float32 (float64 for a float64 layer), whatever kernel the layer uses.
"""

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffit.configs.sampling import DISCRETE
from diffit.configs.schema import ADMDiffusion
from diffit.diffusion.adm import schedule_of
from diffit.diffusion.samplers import Callback
from diffit.errors import UserError
from diffit.explore.edit import denoiser_for
from diffit.models.attention import TMSA, relative_position_bias
from diffit.sampling.labels import Labels
from diffit.sampling.model import Model

Place = tuple[float, float]
"""Down and across the map, each a share in [0, 1): the same place on maps of every size."""


def attention_layers(net: nn.Module) -> dict[str, TMSA]:
    """The attention layers of a network by name, in the order of their blocks."""
    return {name: module for name, module in net.named_modules() if isinstance(module, TMSA)}


@torch.no_grad()
def attention_weights(layer: TMSA, x: Tensor, cond: Tensor, token: tuple[int, int]) -> Tensor:
    """softmax(Q Kᵀ/√d + B) of Eq. 6 for the query at ``token`` (row, column): ``(B, heads, H, W)``.

    ``x`` ``(B, H, W, dim)`` and ``cond`` ``(B, cond_dim)`` are the layer's inputs. Weights are at their keys' places on
    the map; outside the token's window they are 0. Over the map they sum to 1.
    """
    B, H, W, _ = x.shape
    h, w = min(layer.window[0], H), min(layer.window[1], W)
    row, column = token
    top, left = row // h * h, column // w * w
    bottom, right = min(top + h, H), min(left + w, W)  # a window at the edge ends there: the rest is padding

    qkv = layer.qkv(x[:, top:bottom, left:right]) + layer.qkv_temb(cond)[:, None, None]  # Eq. 3–5
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    q, k, _ = qkv.to(dtype).unflatten(-1, (3, layer.num_heads, -1)).unbind(3)  # (B, h', w', heads, d)
    q = q[:, row - top, column - left]  # (B, heads, d)
    bias = relative_position_bias(layer.relative_position_bias_table, layer.window, (h, w))  # (heads, N, N)
    bias = bias[:, (row - top) * w + column - left].unflatten(-1, (h, w))[:, : bottom - top, : right - left]
    logits = torch.einsum("bnd,byxnd->bnyx", q, k) / math.sqrt(q.shape[-1]) + bias

    weights: Tensor = logits.new_zeros(B, layer.num_heads, H, W)
    weights[:, :, top:bottom, left:right] = logits.flatten(2).softmax(-1).view_as(logits)
    return weights


@contextmanager
def record_attention(
    net: nn.Module, places: Sequence[Place], blocks: Sequence[str] | None = None
) -> Iterator[dict[str, list[Tensor]]]:
    """What each layer's queries at ``places`` attend to, for all that runs through ``net`` in the context.

    Yields a dictionary that fills: block -> for each call ``(B, places, heads, H, W)`` on the CPU, each block's map in
    its own size. ``blocks`` are names of :func:`attention_layers`, None is all. The hooks are gone afterwards.
    """
    layers = attention_layers(net)
    for name in blocks or ():
        if name not in layers:
            raise UserError(f"block {name}: the network has {', '.join(list(layers)[:6])}, …; choose one of these")
    for down, across in places:
        if not (0 <= down < 1 and 0 <= across < 1):
            raise UserError(f"place ({down:g}, {across:g}): give shares of the height and width, each in [0, 1)")
    found: dict[str, list[Tensor]] = {name: [] for name in (blocks or layers)}
    owner = threading.get_ident()

    def hook(name: str) -> Any:
        def record(layer: TMSA, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
            if threading.get_ident() != owner:  # another thread samples from the same network
                return
            x, cond = inputs
            H, W = x.shape[1:3]
            tokens = [(int(down * H), int(across * W)) for down, across in places]
            weights = [attention_weights(layer, x, cond, token).cpu() for token in tokens]
            found[name].append(torch.stack(weights, dim=1))

        return record

    handles = [layers[name].register_forward_hook(hook(name)) for name in found]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class AttentionMaps:
    """Attention over the denoising process, as in the paper's Figure 2.

    Attributes:
        sigmas: noise levels of the S steps that were looked at, falling.
        maps: block -> ``(S, B, places, heads, h, w)``.
        denoised: what the model took each state to show, ``(S, B, C, H, W)``, decoded.
    """

    sigmas: list[float]
    maps: dict[str, Tensor]
    denoised: Tensor


State = tuple[float, Tensor]
"""A noise level sigma, and what a sampler had there: x₀ + σε, ``(B, C, h, w)``."""


def denoising_states(
    model: Model, seeds: Sequence[int], labels: Labels = None, *, callback: Callback | None = None, **settings: Any
) -> list[State]:
    """The states that sampling comes through, one a step; of a discrete sampler after the change of variables."""
    if settings:
        model = model.with_sampling(**settings)
    states = list[State]()

    def keep_state(i: int, level: Tensor, x: Tensor, denoised: Tensor) -> None:
        sigma, scale = _sigma(model, level)
        states.append((sigma, x * scale))
        if callback is not None:
            callback(i, level, x, denoised)

    model.sample(seeds, labels, callback=keep_state)
    return states


@torch.no_grad()
def attention_maps(
    model: Model,
    seeds: Sequence[int],
    labels: Labels = None,
    *,
    places: Sequence[Place] = ((0.5, 0.5),),
    blocks: Sequence[str] | None = None,
    steps: Sequence[int] | None = None,
    states: Sequence[State] | None = None,
    **settings: Any,
) -> AttentionMaps:
    """Sample, and look where the queries at ``places`` attend in ``blocks`` at the chosen ``steps`` (None: all).

    What is looked at is the conditional network at the states that sampling, guided or not, comes through; ``states``
    are those of :func:`denoising_states` where they are there already.
    """
    if settings:
        model = model.with_sampling(**settings)
    states = denoising_states(model, seeds, labels) if states is None else states
    if steps is not None and not all(0 <= step < len(states) for step in steps):
        raise UserError(f"steps {list(steps)}: sampling has steps 0 to {len(states) - 1}")
    chosen = [states[step] for step in (range(len(states)) if steps is None else steps)]
    denoise = denoiser_for(model.with_sampling(guidance=1.0), seeds, labels)
    with record_attention(model.net, places, blocks) as found:
        shown = [denoise(x, torch.tensor(sigma, dtype=torch.float64)).float() for sigma, x in chosen]
    if model.autoencoder is not None:
        shown = [model.autoencoder.decode(x) for x in shown]
    maps = {name: torch.stack(calls) for name, calls in found.items()}
    return AttentionMaps([sigma for sigma, _ in chosen], maps, torch.stack(shown).cpu())


def _sigma(model: Model, level: Tensor) -> tuple[float, float]:
    """Sigma of a sampler's level, and what its state is multiplied by to be x₀ + σε: of ddpm and ddim 1/√ᾱ."""
    diffusion = model.config.diffusion
    if isinstance(diffusion, ADMDiffusion) and model.config.sampling.sampler in DISCRETE:
        sigma = float(schedule_of(diffusion).sigma_of(level))
        return sigma, math.sqrt(1 + sigma**2)
    return float(level), 1.0


def bias_maps(layer: TMSA) -> Tensor:
    """The learned relative position bias B by head as pictures, ``(heads, 2h − 1, 2w − 1)``.

    The query is in the middle, and a pixel is B of the key that lies there (the table goes by query − key).
    """
    h, w = layer.window
    table = layer.relative_position_bias_table.detach().float().cpu()
    return table.T.reshape(-1, 2 * h - 1, 2 * w - 1).flip(-2, -1)


@torch.no_grad()
def time_norms(model: Model, sigmas: Sequence[float] | Tensor, label: int | str | None = None) -> dict[str, Tensor]:
    """How far the time token moves queries, keys and values: ``‖x_t W_qt‖`` (Eq. 3) and so on, per head.

    Block -> ``(sigmas, 3, heads)`` for q, k, v. ``label`` is a class, None the null class, which sees the noise level
    alone (the first class of a model without one).
    """
    sigma, layers, found = (
        torch.as_tensor(sigmas, dtype=torch.float64),
        attention_layers(model.net),
        dict[str, Tensor](),
    )
    config, owner = model.config, threading.get_ident()
    if label is None and config.model.num_classes:
        label = config.model.num_classes if config.training.label_drop > 0 else 0

    def hook(name: str) -> Any:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if threading.get_ident() != owner:
                return
            found[name] = output.float().unflatten(-1, (3, layers[name].num_heads, -1)).norm(dim=-1).cpu()

        return record

    handles = [layer.qkv_temb.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        denoise = denoiser_for(model.with_sampling(guidance=1.0), range(len(sigma)), label)
        denoise(torch.zeros(len(sigma), *config.model.sample_shape, dtype=torch.float64, device=model.device), sigma)
    finally:
        for handle in handles:
            handle.remove()
    return found
