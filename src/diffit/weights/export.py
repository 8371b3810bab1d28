"""A network file in another form: the official layout, or a folder for the Hub."""

import html
import os
import re
from pathlib import Path

import torch

from diffit.configs.presets import latent_preset_for
from diffit.configs.schema import Config
from diffit.errors import UserError, printable
from diffit.models import DiffiT
from diffit.models.latent import LatentDiffiT
from diffit.utils.files import sweep, whole_file, whole_folder
from diffit.weights.file import load_network, locate, public, read_header, save_network, save_tensors, with_vae
from diffit.weights.official import to_official

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = ("official", "hub-folder")
OURS = re.compile(r".+\.safetensors|README\.md|model_index\.json|transformer|vae")  # in a folder that was exported


def export(
    network: str | Path,
    to: str,
    dest: str | Path,
    *,
    dtype: str | None = None,
    vae: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write ``network``, a file or Hub id, to ``dest`` in one of :data:`FORMS`; returns ``dest``.

    ``dtype`` is fp32, bf16 or fp16, None for that of the file. ``vae`` is what a folder for the Hub names, the file's
    own if None. Raises :class:`UserError` for what does not fit the form, and for an
    existing ``dest`` without ``overwrite``.
    """
    dest = check_dest(dest, overwrite)
    if vae is not None and to == "official":
        raise UserError(f"--vae {vae}: the official layout does not name its VAE; leave it out")
    file = locate(network)
    net, config = load_network(file, dtype=None if dtype is None else DTYPES[dtype])
    if vae is not None and config.autoencoder is None:
        raise UserError(f"--vae {vae}: {config.preset} is an image-space model and has no VAE; leave it out")
    if to == "official":
        write_official(net, config, dest)
    else:
        write_hub_folder(net, config if vae is None else with_vae(config, vae), dest, read_header(file)[1])
    return dest


def check_dest(dest: str | Path, overwrite: bool) -> Path:
    """``dest`` as a path. Raises :class:`UserError` where it exists and may not be overwritten.

    A folder with anything in it that no export writes, such as a clone's ``.git``, is nobody's to replace. What killed
    exports have left beside it is removed.
    """
    path = Path(dest)
    if path.exists() and not overwrite:
        raise UserError(f"{dest}: exists; choose another place, or --overwrite it")
    others = sorted(item.name for item in path.iterdir() if not OURS.fullmatch(item.name)) if path.is_dir() else ()
    if others:
        raise UserError(f"{dest}: holds more than an export ({others[0]}), so it is not replaced; choose another place")
    sweep(Path(os.path.abspath(path)).parent)
    return path


def write_official(net: DiffiT, config: Config, dest: Path) -> None:
    """One safetensors file with the official names, the index buffers in every layer included."""
    model = config.model
    if not isinstance(net, LatentDiffiT) or model.family != "latent":
        raise UserError(f"--to official: {config.preset} is an image-space model; only latent ones have that layout")
    height, width = model.input_size
    if height != width:
        raise UserError(f"--to official: latents of {width}x{height}; the official layout knows square ones only")
    if model.num_classes and config.training.label_drop == 0:
        raise UserError(
            "--to official: the model was trained without a null class (--label-drop 0), and the layout cannot say "
            "that it must not be guided; use --to hub-folder"
        )
    assert config.autoencoder is not None
    published = latent_preset_for(height)
    assert published.autoencoder is not None
    if (config.diffusion, config.autoencoder.scale) != (published.diffusion, published.autoencoder.scale):
        raise UserError(
            "--to official: the layout cannot say that the model has another noise schedule, prediction or scale of "
            "latents than the official ones, and its samples would be noise; use --to hub-folder"
        )
    with whole_file(dest) as part:
        save_tensors(to_official(net.state_dict(), model), part, {"format": "pt"})


def write_hub_folder(net: DiffiT, config: Config, dest: Path, kimg: float | None) -> None:
    """Our file and a model card. ``kimg`` None: nothing is known of the training."""
    config = public(config)
    with whole_folder(dest) as part:
        save_network(part / f"{config.preset}.safetensors", net.state_dict(), config, kimg=kimg)
        (part / "README.md").write_text(model_card(config, kimg), encoding="utf-8")


def model_card(config: Config, kimg: float | None) -> str:
    """What is known of the model, and what its author has still to say. Names are text in it, whatever they hold."""
    model, training, sampling = config.model, config.training, config.sampling
    channels, height, width = config.image_shape
    names = [_plain(name) for name in (config.data.class_names or ())[:50]]
    classes = f"{model.num_classes} classes" if model.num_classes else "unconditional"
    if kimg is None:
        origin = "Weights in NVIDIA's official layout, which does not say how they were trained."
        licence = "To be filled in by the author. NVIDIA's own weights are **for non-commercial use only**."
    else:
        data = _plain(config.data.path or "(name of the data: fill in)")
        origin = (
            f"Trained on {data} with preset {_plain(config.preset)}: "
            f"{kimg:g} of {training.expected_kimg(kimg):g} kimg, batch {training.batch}, "
            f"learning rate {training.lr:g}, seed {training.seed}."
        )
        licence = "To be filled in by the author, with that of the data in mind."
    more = ", …" if len(config.data.class_names or ()) > len(names) else ""
    listed = f"\nClasses: {', '.join(names)}{more}.\n" if names else ""
    vae = f"\nIts latents are those of the VAE {_plain(config.autoencoder.vae)}.\n" if config.autoencoder else ""
    return f"""---
library_name: diffit
license: other
license_name: to-be-filled-in
tags: [diffit, diffusion, image-generation]
---

# {_plain(config.preset)}

A DiffiT (arXiv 2312.02139) of the {model.family} family: images of {width}×{height}×{channels}, {classes}.
{listed}{vae}
## Training

{origin}

## Use

```
diffit sample --network OWNER/NAME --outdir samples --num-samples 16
```

By default it samples with {sampling.sampler}, {sampling.steps} steps, guidance {sampling.cfg_scale:g}.

## Quality

No metric comes with this file. To be filled in by the author: which, on how many samples, against what.

## Licence

{licence}
"""


def _plain(text: str) -> str:
    """``text`` from a file as it is in Markdown and HTML: neither markup nor a tag, a link or a line of its own."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~])", r"\\\1", html.escape(printable(text), quote=False))
