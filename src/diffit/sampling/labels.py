"""Every way to choose a class: by number, by name, drawn by the seed, in turn, as often as in the training set."""

import difflib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.utils.randomness import LABEL, numpy_generator

Labels = Any
"""A class number or name for all samples; a list, array or tensor of one each; ``random`` or ``balanced``; or None."""


def class_names(config: Config) -> tuple[str, ...]:
    """The names of a model's classes in order, empty where they are not known.

    A model of 1,000 classes without names is taken as one of ImageNet, whose names torchvision has.
    """
    if config.data.class_names or config.model.num_classes != 1000:
        return config.data.class_names or ()
    try:
        from torchvision.models import ResNet18_Weights
    except ImportError:
        return ()
    return tuple(ResNet18_Weights.DEFAULT.meta["categories"])


def find_class(given: str | int, config: Config, argument: str = "class") -> int:
    """The index of a class given by number or name.

    A name is matched as it stands or else, without regard to case, as the whole name or one of the synonyms between
    its commas, where that is only one class. Raises :class:`UserError`, about ``argument``, with names that are near.
    """
    if not config.model.num_classes:
        raise UserError(f"{argument} {given}: the model has no classes; leave it out")
    label = _match(given, config, argument)
    if label in config.data.empty_classes:
        raise UserError(f"{argument} {given}: had no image in training, so the model never learnt it; choose another")
    return label


def _match(given: str | int, config: Config, argument: str) -> int:
    count, names, text = config.model.num_classes, class_names(config), str(given)
    if isinstance(given, str) and text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < count:
        return int(text)
    wanted = text.strip().casefold()
    found = [i for i, name in enumerate(names) if wanted in _spellings(name)]
    if len(found) == 1:
        return found[0]
    if found:
        meant = ", ".join(f"{i} ({names[i]})" for i in found)
        raise UserError(f"{argument} {text}: may be {meant}; give the number")
    near = difflib.get_close_matches(wanted, [spelling for name in names for spelling in _spellings(name)], n=5)
    few = len(names) <= 20
    shown = ", ".join(names if few else dict.fromkeys(near) or names[:20]) + ("" if few else ", …")
    known = f"{shown}, or 0-{count - 1}" if names else f"0-{count - 1}"
    raise UserError(f"{argument} {text}: unknown; the model knows {known}")


def _spellings(name: str) -> set[str]:
    return {part.strip().casefold() for part in [name, *name.split(",")]}


def find_classes(given: str, config: Config, argument: str = "class") -> list[int]:
    """The indices of one class or of several joined by commas; ``given`` as a whole, commas and all, goes first."""
    names = class_names(config)
    parts = [part for part in given.split(",") if part.strip()]
    if given in names or len(parts) < 2 or any(given.strip().casefold() in _spellings(name) for name in names):
        return [find_class(given, config, argument)]
    return [find_class(part.strip(), config, argument) for part in parts]


def sampled_classes(config: Config) -> list[int]:
    """The classes that had images in training, in order; none for an unconditional model."""
    empty = set(config.data.empty_classes)
    return [label for label in range(config.model.num_classes) if label not in empty]


def class_title(config: Config, label: int) -> str:
    """The name of a class, or else its number in words."""
    names = class_names(config)
    return names[label] if label < len(names) else f"class {label}"


def random_labels(seeds: Sequence[int], num_classes: int) -> Tensor:
    """A class drawn uniformly for every seed, ``(len(seeds),)`` int64 on the CPU."""
    return torch.tensor([numpy_generator(seed, LABEL).integers(num_classes) for seed in seeds], dtype=torch.int64)


def choose_labels(config: Config, seeds: Sequence[int], labels: Labels = "random") -> Tensor | None:
    """A class per seed, ``(len(seeds),)`` int64 on the CPU; None for an unconditional model.

    ``labels`` as in :data:`Labels`: ``random`` and None are drawn by the seed, ``balanced`` gives the seeds classes
    in turn. Raises :class:`UserError` for unknown classes, and for another number of them than of seeds.
    """
    classes = sampled_classes(config)
    policy = labels if isinstance(labels, str) and labels in ("random", "balanced") else None
    if labels is not None and policy is None and not classes:
        raise UserError(f"labels {labels}: the model has no classes; leave them out")
    if not classes:
        return None
    if labels is None or policy == "random":
        return torch.tensor(classes)[random_labels(seeds, len(classes))]
    if policy == "balanced":
        return torch.tensor(classes)[torch.tensor(list(seeds), dtype=torch.int64) % len(classes)]
    if isinstance(labels, str) or np.ndim(labels) == 0:
        return torch.full((len(seeds),), _index(labels, config))
    listed = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else list(labels)
    if len(listed) != len(seeds):
        raise UserError(f"{len(listed)} labels for {len(seeds)} samples: give one each, or one for all")
    return torch.tensor([_index(label, config) for label in listed], dtype=torch.int64)


def _index(label: Any, config: Config) -> int:
    # NumPy's and torch's integers are numbers too; the null class may be asked for by its number.
    if not isinstance(label, str) and int(label) == config.model.num_classes:
        return int(label)
    return find_class(label if isinstance(label, str) else int(label), config)


def training_labels(config: Config, real: Tensor | None, seeds: Sequence[int]) -> tuple[Tensor | None, str]:
    """A class per seed, and in words how: as often as in the training set where its labels ``real`` (N,) are known.

    A function of the seed, as the images are.
    """
    if not config.model.num_classes:
        return None, "none: the model is unconditional"
    if real is None:
        return choose_labels(config, seeds), "uniform over the classes"
    return real[random_labels(seeds, len(real))], "drawn from the labels of the training set"
