"""Between images and latents: an ``AutoencoderKL`` of diffusers, from a local folder or the Hub.

diffusers is imported when an autoencoder is loaded, never by ``import diffit``.
"""

import hashlib
import importlib.util
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffit.configs.schema import Config
from diffit.errors import UserError, install_hint, printable
from diffit.utils.images import to_float

SCALE = 0.18215  # brings the latents of Stable Diffusion's VAEs to unit variance (arXiv 2112.10752, D.1)
CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


@dataclass(frozen=True)
class Autoencoder:
    """A frozen VAE. Its latents are scaled where a diffusion model sees them, and only there.

    Attributes:
        vae: the ``AutoencoderKL``.
        id: the Hub id, or the name of the local folder; says which VAE it is, to people.
        sha256: of the file of weights; says it to programs.
        scale: scaled latent = latent · scale.
    """

    vae: Any
    id: str
    sha256: str
    scale: float

    @property
    def latent_channels(self) -> int:
        return int(self.vae.config.latent_channels)

    @property
    def factor(self) -> int:
        """Pixels a latent position, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def tiling(self) -> bool:
        return bool(self.vae.use_tiling)

    def latent_shape(self, image_size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the latents of images of ``image_size`` (H, W); UserError if the factor does not divide it."""
        height, width = image_size
        if height % self.factor or width % self.factor:
            raise UserError(
                f"images of {width}x{height}: VAE {self.id} needs sides that are multiples of {self.factor}; "
                "make such images with `diffit data convert --resolution WxH`"
            )
        return self.latent_channels, height // self.factor, width // self.factor

    @torch.no_grad()
    def encode(self, images: Tensor, *, batch: int = 16) -> tuple[Tensor, Tensor]:
        """(mean, std) of the latents' normal distribution, each (B, C, h, w) float32 and not scaled.

        ``images`` (B, 3, H, W) are uint8, or floats in [−1, 1]. Gray ones, (B, 1, H, W), become RGB.
        ``batch`` of them go through the VAE together.
        """
        images = images.to(self.vae.device)
        if images.dtype == torch.uint8:
            images = to_float(images)
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        posteriors = [self.vae.encode(part.to(self.vae.dtype)).latent_dist for part in images.split(batch)]
        mean = torch.cat([posterior.mean.float() for posterior in posteriors])
        return mean, torch.cat([(0.5 * posterior.logvar.float()).exp() for posterior in posteriors])

    @torch.no_grad()
    def decode(self, z: Tensor, *, batch: int = 16) -> Tensor:
        """Images (B, 3, H, W) float32, nominally in [−1, 1], of scaled latents (B, C, h, w), ``batch`` at a time."""
        z = (z.to(self.vae.device) / self.scale).to(self.vae.dtype)
        return torch.cat([self.vae.decode(part).sample.float() for part in z.split(batch)])


def draw_latents(mean: Tensor, std: Tensor, noise: Tensor, scale: float) -> Tensor:
    """Scaled latents of the distribution that :meth:`Autoencoder.encode` gives; ``noise`` is standard normal."""
    return (mean + std * noise) * scale


def check_autoencoder(vae: Autoencoder, sample_shape: tuple[int, int, int], image_size: tuple[int, int]) -> None:
    """UserError if ``vae`` does not make latents of ``sample_shape`` (C, h, w) of images of ``image_size`` (H, W)."""
    if vae.latent_channels != sample_shape[0]:
        raise UserError(
            f"VAE {vae.id} has latents of {vae.latent_channels} channels, the model takes {sample_shape[0]}: "
            "give the VAE that the model was trained with"
        )
    if vae.latent_shape(image_size) != sample_shape:
        raise UserError(
            f"VAE {vae.id} has a latent for every {vae.factor} pixels: images of {image_size[1]}x{image_size[0]} do "
            f"not become the {sample_shape[2]}x{sample_shape[1]} that the model takes; give the one it was trained with"
        )


def autoencoder_of(config: Config, vae: str | None = None, *, device: str | torch.device = "cpu") -> Autoencoder | None:
    """The VAE that a latent model's configuration names, or ``vae`` in its place; None for an image-space model.

    A configuration may come from anyone with its weights, so what it names is fetched from the Hub; a local folder is
    only read as ``vae``. UserError where the VAE is not there or does not fit the model.
    """
    if config.autoencoder is None:
        if vae is not None:
            raise UserError(f"--vae {vae}: {config.preset} is an image-space model, which makes pixels; leave it out")
        return None
    spec = config.autoencoder
    found = load_autoencoder(vae or spec.vae, scale=spec.scale, device=device, local=vae is not None)
    check_autoencoder(found, config.model.sample_shape, config.image_shape[1:])
    return found


def load_autoencoder(
    path_or_id: str | Path,
    *,
    scale: float = SCALE,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    slicing: bool = False,
    tiling: bool = False,
    local: bool = True,
) -> Autoencoder:
    """The VAE of a folder that diffusers saved, or of a Hub id; either may hold it in a subfolder ``vae``.

    ``slicing`` takes one image at a time and ``tiling`` overlapping parts of large ones: less memory, and with
    ``tiling`` slightly different numbers. Without ``local`` only a Hub id is accepted: for a name that comes from a
    file. Pickled weights are never read.

    Raises UserError for what is not there, not an AutoencoderKL, or damaged.
    """
    if not 0 < scale < math.inf:
        raise UserError(f"scale {scale:g}: must be a number above 0; Stable Diffusion's VAEs have {SCALE}")
    if importlib.util.find_spec("diffusers") is None:
        raise UserError(f"a VAE needs diffusers: {install_hint('latent')}")
    folder, name = _find(path_or_id) if local else _find_on_hub(str(path_or_id))
    _check_folder(folder, path_or_id)
    vae = _load(folder, path_or_id, dtype).to(device)
    if slicing:
        vae.enable_slicing()
    if tiling:
        vae.enable_tiling()
    with (folder / WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Autoencoder(vae.eval().requires_grad_(False), name, digest, scale)


def _find(path_or_id: str | Path) -> tuple[Path, str]:
    """(folder of the VAE itself, the name to know it by)."""
    path, name = Path(path_or_id), str(path_or_id)
    if path.is_file():
        raise UserError(f"{path}: a file; give the folder that holds {CONFIG} and {WEIGHTS}")
    if path.is_dir():
        name = path.resolve().name
    elif HUB_ID.fullmatch(name):
        path = _snapshot(name)
    else:
        raise UserError(
            f"{name}: no such folder, and not a Hub id such as stabilityai/sd-vae-ft-ema; check the spelling"
        )
    return _inner(path), name


def _find_on_hub(name: str) -> tuple[Path, str]:
    if not HUB_ID.fullmatch(name):
        raise UserError(
            f"VAE {printable(name)}, which the network's file names, is no Hub id but a folder of the machine that "
            "wrote the file: pass that folder, or a Hub id, with --vae"
        )
    return _inner(_snapshot(name)), name


def _inner(path: Path) -> Path:
    """The VAE in the folder of a whole pipeline, else the folder."""
    return path / "vae" if (path / "vae").is_dir() and not (path / CONFIG).is_file() else path


def _snapshot(hub_id: str) -> Path:
    """The repository in the Hub's cache, fetched where the network is allowed; only what a VAE needs."""
    import huggingface_hub

    try:
        wanted = [f"{folder}{file}" for folder in ("", "vae/") for file in (CONFIG, WEIGHTS)]
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:  # the client and the HTTP library below it raise several families
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise UserError(
            f"{hub_id}: no such folder here, and not available from the Hub ({type(error).__name__}: {reason}); "
            "check the spelling and the network, or give a local folder"
        ) from error


def _check_folder(folder: Path, source: str | Path) -> None:
    """What can be told without diffusers: the kind of model, and that its weights are there."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind, channels = config.get("_class_name"), config.get("in_channels", 3)
    except OSError:
        raise UserError(
            f"{source}: no {CONFIG}; a VAE is a folder as AutoencoderKL.save_pretrained writes it"
        ) from None
    except (ValueError, AttributeError):
        raise UserError(f"{source}: {CONFIG} is damaged; fetch it again") from None
    if kind != "AutoencoderKL":
        raise UserError(f"{source}: a {kind}, not an AutoencoderKL; give the folder or Hub id of the VAE")
    if channels != 3:
        raise UserError(f"{source}: a VAE of images with {channels} channels; give one of RGB images")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{source}: no {WEIGHTS}; other forms of weights (.bin is a pickle) are not read")


def _load(folder: Path, source: str | Path, dtype: torch.dtype) -> Any:
    from diffusers import AutoencoderKL

    remedy = "fetch or save it again"
    try:
        # Its loader, rather than a strict load_state_dict, because old files name the attention's weights differently.
        vae, found = AutoencoderKL.from_pretrained(
            folder, use_safetensors=True, torch_dtype=dtype, output_loading_info=True, local_files_only=True
        )
    except Exception as error:  # damaged files and impossible configurations fail in many ways
        reason = str(error).strip().partition("\n")[0].rstrip(".:")
        raise UserError(f"{source}: not a readable AutoencoderKL ({reason}); {remedy}") from error
    # diffusers leaves a weight that is absent at random values and only logs it.
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found[problem]:
            kind = problem.removesuffix("_keys")
            raise UserError(f"{source}: weights do not fit {CONFIG} ({kind}: {sorted(found[problem])[0]}); {remedy}")
    return vae
