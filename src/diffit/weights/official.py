"""NVIDIA's official latent weights: told apart by keys and shapes, read and written in their layout."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from diffit.configs.presets import latent_preset_for
from diffit.configs.schema import Config, Data, LatentModel, explain
from diffit.errors import UserError
from diffit.models.attention import is_relative_position_index, relative_position_index

INDEX = ".attn.relative_position_index"
MARK = "blocks.0.attn.relative_position_bias_table"

# What else people have on their disks under a similar name, by a key that gives it away.
STRANGERS = {
    "adaLN_modulation": "a DiT network, which modulates its norms",
    "decoder.conv_in.weight": "an autoencoder: give it to --vae",
    "exp_avg.": "an optimiser's state: use the run's network-snapshot file",
    "Mixed_5b": "an Inception network: give it to --detector",
    "text_model.": "a text encoder",
    "tokenizer.weight": "bare weights without their configuration: use the run's network-snapshot file",
    "model.diffusion_model": "a Stable Diffusion checkpoint",
}


def stranger(keys: list[str]) -> str:
    """What a file with these keys seems to be."""
    for mark, what in STRANGERS.items():
        if any(mark in key for key in keys):
            return what
    return f"something else (it holds {', '.join(keys[:3])}, …)"


def recognise(shapes: Mapping[str, tuple[int, ...]], source: str) -> Config | None:
    """The configuration of a file in the official layout, None for another file.

    Size, depth, width, heads and classes come from the shapes, recipe and sampling from the preset nearest in size.
    Raises :class:`UserError` where the shapes contradict each other.
    """
    if MARK not in shapes or "pos_embed" not in shapes:
        return None
    try:
        width, channels, patch, _ = shapes["x_embedder.proj.weight"]
        tokens = shapes["pos_embed"][1]
        rows, heads = shapes[MARK]
        hidden = shapes["blocks.0.mlp.fc1.weight"][0]
        classes = (
            shapes["y_embedder.embedding_table.weight"][0] - 1 if "y_embedder.embedding_table.weight" in shapes else 0
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{source}: looks like official DiffiT weights, but {error} is missing or misshapen") from None
    side = isqrt(tokens)
    if side**2 != tokens or (2 * side - 1) ** 2 != rows:
        raise UserError(f"{source}: {tokens} tokens and a bias table of {rows} rows do not belong to one square map")
    try:
        model = LatentModel(
            input_size=(side * patch, side * patch),
            patch_size=patch,
            in_channels=channels,
            hidden_size=width,
            depth=len({key.split(".")[1] for key in shapes if key.startswith("blocks.")}),
            num_heads=heads,
            mlp_ratio=hidden / width,
            num_classes=classes,
        )
    except ValidationError as error:
        raise UserError(f"{source}: looks like official DiffiT weights, but {explain(error)}") from None
    changes: dict[str, Any] = {"model": model}
    preset = latent_preset_for(side * patch)
    if not classes:
        changes["sampling"] = preset.sampling.model_copy(update={"cfg_scale": 1.0, "cfg_power": None})
        changes["data"] = Data(cond=False)
    return preset.model_copy(update=changes)


def check_index(index: Tensor, config: Config, source: str) -> None:
    """:class:`UserError` unless ``index`` is that of the model's map of tokens."""
    window = token_map(config.model) if isinstance(config.model, LatentModel) else None
    if window is None or not is_relative_position_index(index, window):
        raise UserError(f"{source} is not that of the model's tokens: the file is damaged, fetch it again")


def token_map(model: LatentModel) -> tuple[int, int]:
    return model.input_size[0] // model.patch_size, model.input_size[1] // model.patch_size


def to_official(state: Mapping[str, Tensor], model: LatentModel) -> dict[str, Tensor]:
    """The state dict with the index buffers that the official layout has in every layer.

    Each is a tensor of its own, as safetensors wants them: 235 MB in all at 512 pixels.
    """
    index = relative_position_index(token_map(model))
    return {**state, **{f"blocks.{i}{INDEX}": index.clone() for i in range(model.depth)}}
