"""``DiffiTPipeline``: both families for people who live in diffusers.

The one module that imports diffusers at its head. Everything that computes is the library's own: networks, samplers
and guidance are those of ``diffit sample``.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import diffusers
import numpy as np
import torch

# ModelMixin is also looked up among this module's names when diffusers loads our parts.
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.models import DiffiT, build
from diffit.models.autoencoder import Autoencoder, check_autoencoder, load_autoencoder
from diffit.sampling.labels import Labels, find_class, sampled_classes
from diffit.sampling.model import Model
from diffit.utils import hub
from diffit.utils.files import whole_folder
from diffit.utils.images import to_pil, to_uint8
from diffit.weights.export import DTYPES as WEIGHT_DTYPES
from diffit.weights.export import check_dest
from diffit.weights.file import load_network, public, with_vae
from diffit.weights.header import parse_config

Generators = torch.Generator | Sequence[torch.Generator] | None
OUTPUTS = ("pil", "np", "pt", "latent")
DECODED_TOGETHER = 16  # images
FILES = ["model_index.json", "*/config.json", "*/*.safetensors", "*/*.safetensors.index.json"]


class DiffiTModel(ModelMixin, ConfigMixin):
    """A network of either family with its complete configuration, for diffusers to save, load, move and compile.

    ``diffit`` is a :class:`~diffit.configs.schema.Config` as plain JSON types. ``(x, level, *labels)`` are the
    network's own arguments; x is brought to the dtype of the weights.
    """

    _supports_gradient_checkpointing = True
    _repeated_blocks = ["DiffiTBlock", "DiffiTResBlock"]  # noqa: RUF012 (diffusers' own form)

    @register_to_config
    def __init__(self, diffit: dict[str, Any]) -> None:
        super().__init__()
        self.settings = parse_config(json.dumps(diffit), "configuration of the pipeline's transformer")
        self.net = build(self.settings.model)

    @classmethod
    def wrap(cls, net: DiffiT, config: Config) -> Self:
        """``net`` itself, not a copy."""
        with torch.device("meta"):
            model = cls(json.loads(public(config).model_dump_json()))
        model.net = net
        return model.eval()

    @classmethod
    def from_pretrained(cls, path: str | Path, **options: Any) -> Any:
        """diffusers' loader, but strict: it would leave a weight that is absent as it happens to be."""
        info = options.pop("output_loading_info", False)
        options |= {"use_safetensors": True, "output_loading_info": True}
        try:
            model, found = super().from_pretrained(path, **options)
        except OSError as error:
            raise UserError(f"{path}: {str(error).strip().splitlines()[0]}; fetch or save it again") from None
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if found[problem]:
                kind = problem.removesuffix("_keys")
                raise UserError(f"{path}: weights do not fit config.json ({kind}: {sorted(found[problem])[0]})")
        return (model, found) if info else model

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Any = None) -> None:
        """Recompute each block in the backward pass; ours takes no function of its own."""
        self.net.set_grad_ckpt(True)

    def disable_gradient_checkpointing(self) -> None:
        self.net.set_grad_ckpt(False)

    def forward(self, x: Tensor, level: Tensor, *labels: Tensor | None) -> Tensor:
        return self.net(x.to(self.dtype), level, *labels)


class DiffiTPipeline(DiffusionPipeline):
    """Images of classes: ``pipe(class_labels=[207, "goldfish"]).images``.

    Args:
        transformer: the network and its configuration, whose sampling settings are the pipeline's defaults.
        vae: the autoencoder of a latent model; without it ``output_type="latent"`` still works. None for image space.

    Raises UserError for a VAE that does not suit the network.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]  # noqa: RUF012 (diffusers' own form)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(self, transformer: DiffiTModel, vae: AutoencoderKL | None = None) -> None:
        super().__init__()
        config = transformer.settings
        if vae is not None:
            if config.autoencoder is None:
                raise UserError(f"{config.preset} is an image-space model, which makes pixels: leave the VAE out")
            name = str(vae.config.get("_name_or_path") or "given")
            autoencoder = Autoencoder(vae, name, "", config.autoencoder.scale)
            check_autoencoder(autoencoder, config.model.sample_shape, config.image_shape[1:])
        self.register_modules(transformer=transformer, vae=vae)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> Self:
        """The pipeline of a folder that ``save_pretrained`` wrote, or of a repository on the Hub that holds one.

        ``options`` are those of diffusers: ``dtype``, ``vae``, and for the Hub ``revision``, ``token``,
        ``cache_dir``, ``local_files_only``, ``force_download``. Raises UserError for anything else than such a folder.
        """
        source = str(pretrained_model_name_or_path)
        known = ("revision", "token", "cache_dir", "local_files_only", "force_download")
        fetching = {name: options.pop(name) for name in known if name in options}
        path = Path(source)
        if path.is_file():
            raise UserError(f"{source}: a file; use DiffiTPipeline.from_network")
        if not path.exists():
            if not hub.looks_like_id(source):
                raise UserError(f"{source}: no such folder, and not a Hub id such as owner/name; check the spelling")
            path = hub.fetch_folder(source, FILES, **fetching)
        try:
            kind = json.loads((path / "model_index.json").read_text())["_class_name"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"{source}: no pipeline (model_index.json); is it for from_network?") from None
        if kind != cls.__name__:
            raise UserError(f"{source}: holds a {kind}, not a {cls.__name__}")
        return super().from_pretrained(path, **options)

    @classmethod
    def from_network(
        cls,
        path_or_id: str | Path,
        vae: str | Path | AutoencoderKL | None = None,
        dtype: torch.dtype | None = torch.float32,
    ) -> Self:
        """The pipeline of one of our .safetensors files or of NVIDIA's official weights, by path or Hub id.

        ``vae`` is a folder, a Hub id or a loaded one; the file's own if None. ``dtype`` is that of
        all weights, None the file's.
        """
        net, config = load_network(path_or_id, dtype=dtype)
        if config.autoencoder is not None and not isinstance(vae, AutoencoderKL):
            spec = config.autoencoder
            used = dtype or next(net.parameters()).dtype
            loaded = load_autoencoder(vae or spec.vae, scale=spec.scale, dtype=used, local=vae is not None)
            # A name instead of this machine's path, in both of a saved pipeline's configurations.
            loaded.vae.register_to_config(_name_or_path=loaded.id)
            vae, config = loaded.vae, with_vae(config, loaded.id)
        elif isinstance(vae, str | Path):
            raise UserError(f"{config.preset} is an image-space model, which makes pixels: leave the VAE {vae} out")
        return cls(DiffiTModel.wrap(net, config), vae)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        *,
        batch_size: int | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | str | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        generator: Generators | int = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any] | None] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """``num_images_per_prompt`` images per class label.

        Args:
            class_labels: numbers or names. None chooses ``batch_size`` classes at random, and is what an unconditional
                model takes.
            num_inference_steps: steps of the sampler, or ``"ddim50"`` and the like; by default the network's.
            guidance_scale: 1 for none; by default the network's, as are its schedule and channels.
            sampler: one of ``diffit.configs.schema.Sampler``; by default the network's.
            generator: one, one per image, or a seed; of the noise at the start and in every step. None is torch's own.
            latents: standard normal noise (B, C, h, w) to start from.
            output_type: pil; np (B, H, W, C) or pt (B, C, H, W) in [0, 1]; latent: what the sampler ends in.
            callback_on_step_end: called with (pipeline, step, level, {"latents": float32 state after the step}), where
                the level is the timestep of ddpm and ddim and sigma of the others. The latents in what it returns
                replace the state.

        Returns an ``ImagePipelineOutput``, or a tuple of the images without ``return_dict``. Raises UserError.
        """
        changes = {"sampler": sampler, "steps": num_inference_steps, "guidance": guidance_scale}
        model = Model(self.transformer, self.transformer.settings).with_sampling(**changes)
        classes = _listed(class_labels)
        count = _count(classes, batch_size, latents, num_images_per_prompt)
        if not isinstance(generator, Sequence | torch.Generator | None):
            if not 0 <= int(generator) < 2**32:  # of more torch's generator keeps the last 32 bits
                raise UserError(f"generator {generator}: a seed is from 0 to {2**32 - 1}; or pass a torch.Generator")
            generator = torch.Generator().manual_seed(int(generator))
        self._check(count, generator, output_type, callback_on_step_end_tensor_inputs)
        if classes is not None:
            found = [find_class(label, model.config) for label in classes]
            classes = [label for label in found for _ in range(num_images_per_prompt)]
        labels = self._labels(classes, count, generator)
        noise = self._noise(count, generator, latents)

        def noise_source(like: Tensor) -> Tensor:
            return self._normal(like.shape, generator).to(like.dtype)

        with self.progress_bar(total=model.config.sampling.steps) as bar:

            def after_step(step: int, level: Tensor, x: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return x
                state = x.float()
                wanted = dict.fromkeys(callback_on_step_end_tensor_inputs, state)
                changed = (callback_on_step_end(self, step, level, wanted) or {}).get("latents", state)
                if changed.shape != x.shape:
                    raise UserError(f"callback_on_step_end: latents of {tuple(changed.shape)}, not {tuple(x.shape)}")
                return x if torch.equal(changed, x.float()) else changed.to(x)  # x itself has more digits

            samples = model.sample(range(count), labels, noise=noise, noise_source=noise_source, after_step=after_step)
        images = self._finish(samples, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "scheduler":
            raise UserError("this pipeline has no scheduler: choose with sampler=… and num_inference_steps=…")
        super().__setattr__(name, value)

    def _check(self, count: int, generator: Generators, output_type: str, inputs: Sequence[str]) -> None:
        """UserError for arguments that cannot be, before any work starts."""
        if count < 1:
            raise UserError("no images are asked for: give class_labels, or a batch_size from 1 on")
        if isinstance(generator, Sequence) and len(generator) != count:
            raise UserError(f"{len(generator)} generators for {count} images: give one, or one per image")
        if output_type not in OUTPUTS:
            raise UserError(f"output_type {output_type!r}: use one of {', '.join(OUTPUTS)}")
        if self.transformer.settings.autoencoder is not None and self.vae is None and output_type != "latent":
            raise UserError(f"output_type {output_type!r} needs a VAE: load the pipeline with vae=…, or use 'latent'")
        if unknown := set(inputs) - set(self._callback_tensor_inputs):
            raise UserError(f"callback_on_step_end_tensor_inputs: {', '.join(unknown)} is not available, 'latents' is")

    def _labels(self, given: list[int | str] | None, count: int, generator: Generators) -> Labels:
        """Classes as given, or chosen at random by the generators; None for an unconditional model."""
        classes = sampled_classes(self.transformer.settings)
        if given is not None or not classes:
            return given
        sources = generator if isinstance(generator, Sequence) else [generator] * count
        drawn = [torch.randint(len(classes), (), generator=g, device=g.device if g else None) for g in sources]
        return [classes[int(i)] for i in drawn]

    def _noise(self, count: int, generator: Generators, latents: Tensor | None) -> Tensor:
        """The state to start from: float64 (B, C, h, w), as :func:`diffit.sample` has it."""
        shape = (count, *self.transformer.settings.model.sample_shape)
        if latents is None:
            latents = self._normal(shape, generator)
        elif latents.shape != shape:
            raise UserError(f"latents of {tuple(latents.shape)}: the model takes {shape} for {count} images")
        return latents.to(self._execution_device, torch.float64)

    def _normal(self, shape: Sequence[int], generator: Generators) -> Tensor:
        source = list(generator) if isinstance(generator, Sequence) else generator
        return randn_tensor(tuple(shape), generator=source, device=self._execution_device, dtype=torch.float32)

    def _finish(self, samples: Tensor, output_type: str) -> Any:
        """Samples (B, C, h, w) as what the caller asked for."""
        config = self.transformer.settings
        if output_type == "latent":
            return samples
        if config.autoencoder is not None:
            z = (samples / config.autoencoder.scale).to(self.vae.dtype)
            samples = torch.cat([self.vae.decode(part).sample.float() for part in z.split(DECODED_TOGETHER)])
        if output_type == "pil":
            return [to_pil(image) for image in to_uint8(samples, config.sampling.rounding)]
        images = (samples / 2 + 0.5).clamp(0, 1)
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def write_pipeline(
    network: str | Path, dest: str | Path, *, dtype: str | None = None, vae: str | None = None, overwrite: bool = False
) -> Path:
    """A folder that :meth:`DiffiTPipeline.from_pretrained` reads, VAE included; returns ``dest``.

    ``dtype`` is fp32, bf16 or fp16, None for that of the file; ``vae`` None is the file's own.
    """
    dest = check_dest(dest, overwrite)
    pipe = DiffiTPipeline.from_network(network, vae=vae, dtype=None if dtype is None else WEIGHT_DTYPES[dtype])
    with whole_folder(dest) as part:
        pipe.save_pretrained(part)
    return dest


def _count(labels: list[int | str] | None, batch_size: int | None, latents: Tensor | None, each: int) -> int:
    """How many images are asked for."""
    if labels is not None:
        if batch_size not in (None, len(labels)):
            raise UserError(f"batch_size {batch_size} and {len(labels)} class_labels: give one of them")
        return len(labels) * each
    if latents is not None and batch_size is None:
        return len(latents) // each * each
    return (1 if batch_size is None else batch_size) * each


def _listed(labels: Labels) -> list[int | str] | None:
    """One label, or a list, array or tensor of any shape, as a list."""
    if labels is None or isinstance(labels, str):
        return None if labels is None else [labels]
    if isinstance(labels, Tensor | np.ndarray):
        return labels.reshape(-1).tolist()
    return list(labels) if isinstance(labels, Iterable) else [int(labels)]


# Where DiffusionPipeline.from_pretrained looks for the class that model_index.json names.
diffusers.DiffiTPipeline = DiffiTPipeline
