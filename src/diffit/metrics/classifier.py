"""A small classifier whose features describe images that ImageNet's do not: ``diffit metrics train-detector``."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from diffit.data.archive import ImageArchive
from diffit.data.augment import flip_half
from diffit.errors import UserError
from diffit.metrics.images import load_batch
from diffit.utils.files import whole_file
from diffit.utils.images import to_float
from diffit.utils.randomness import ORDER, make_generator
from diffit.weights.file import load_into, save_tensors

HEADER = "diffit_detector"
WIDTHS = (32, 64, 128)
BATCH = 128
LEARNING_RATE = 3e-3
HELD_OUT = 0.1


class Classifier(nn.Module):
    """Residual stages at 1, ½ and ¼ of the resolution; uint8 (B, C, H, W) to features (B, 128) and logits."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        widths = (channels, *WIDTHS)
        self.enter = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=1 if i == 0 else 2, padding=1) for i, (a, b) in enumerate(pairwise(widths))
        )
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in WIDTHS)
        self.inner = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for width in WIDTHS)
        self.head = nn.Linear(WIDTHS[-1], classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = to_float(images) if images.dtype == torch.uint8 else images  # (B, C, H, W)
        for enter, norm, inner in zip(self.enter, self.norms, self.inner, strict=True):
            x = enter(x)
            x = x + inner(F.silu(norm(x)))
        features = F.silu(x).mean(dim=(2, 3))  # (B, 128)
        return features, self.head(features)


def train_classifier(
    archive: ImageArchive,
    dest: Path,
    *,
    epochs: int = 5,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Train on nine tenths of a labelled ``archive``, write ``dest``, return the accuracy on the last tenth.

    The random crops and flips only augment; the features are those of whole images. ``progress`` gets (done, all).
    """
    if archive.labels is None or archive.num_classes < 2:
        raise UserError(f"{archive.path}: a detector learns from the labels of at least two classes; this has none")
    generator = make_generator(seed, ORDER)
    order = torch.randperm(len(archive), generator=generator)
    held = max(round(len(archive) * HELD_OUT), 1)
    test, train = order[:held], order[held:]
    channels = archive.image_shape[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Classifier(channels, archive.num_classes).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = -(-len(train) // BATCH) * epochs
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step, indices in enumerate(_epochs(train, epochs, generator)):
        images = shift(flip_half(to_float(load_batch(archive, indices)), generator), generator).to(device)
        loss = F.cross_entropy(net(images)[1], archive.labels[indices].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if progress is not None:
            progress(step + 1, steps)
    with torch.inference_mode():
        right = [
            net(load_batch(archive, i).to(device))[1].argmax(1).cpu() == archive.labels[i] for i in test.split(BATCH)
        ]
    accuracy = float(torch.cat(right).double().mean())
    facts = {"channels": channels, "classes": archive.num_classes, "accuracy": accuracy, "trained_on": archive.name}
    with whole_file(dest) as part:
        save_tensors(net.state_dict(), part, {"format": "pt", HEADER: json.dumps(facts)})
    return accuracy


def _epochs(indices: Tensor, epochs: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(epochs):
        yield from indices[torch.randperm(len(indices), generator=generator)].split(BATCH)


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move every image by up to an eighth of its size, edges mirrored."""
    b, _, height, width = images.shape
    room_y, room_x = height // 8, width // 8
    padded = F.pad(images, (room_x, room_x, room_y, room_y), mode="reflect")
    y = torch.randint(2 * room_y + 1, (b, 1), generator=generator) + torch.arange(height)
    x = torch.randint(2 * room_x + 1, (b, 1), generator=generator) + torch.arange(width)
    return padded[torch.arange(b)[:, None, None], :, y[:, :, None], x[:, None, :]].movedim(-1, 1)


def load_classifier(path: Path, device: torch.device) -> Callable[[Tensor], dict[str, Tensor]]:
    """A file of :func:`train_classifier` as a function of uint8 images to ``pool`` and ``probabilities``."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if HEADER not in metadata:
                raise UserError(
                    f"{path}: not a detector of `diffit metrics train-detector` (no {HEADER} in its header)"
                )
            facts = json.loads(metadata[HEADER])
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        net = Classifier(int(facts["channels"]), int(facts["classes"]))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a detector, or cut short ({error}); train it again") from None
    load_into(net, state, path)
    net = net.eval().requires_grad_(False).to(device)
    channels = int(facts["channels"])

    def extract(images: Tensor) -> dict[str, Tensor]:
        if images.shape[1] != channels:
            raise UserError(f"{path}: a detector for {channels} channels, the images have {images.shape[1]}")
        features, logits = net(images)
        return {"pool": features, "probabilities": logits.softmax(dim=1)}

    return extract
